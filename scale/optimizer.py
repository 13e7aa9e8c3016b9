"""scale/optimizer.py - AdamW for a bf16 or fp32 student; the recovery module has its own rate.

The idea.  A learning rate of 1e-6 changes a weight by far less than bf16 can resolve (about 0.4 %
of its value): updates of bf16 weights are rounded away and nothing is learnt. So every trained
weight that is not float32 has a float32 master copy. Gradients go to the master, AdamW updates it,
and the rounded result is copied back.

In:  named parameters, rates.  Out: an object with step() and what a resumed run needs (tensors()).

The one equation (warm-up, and linear decay to a fraction f after S steps):
    rate(s) = lr * min(1, (s + 1) / warmup) * (1 - (1 - f) * s / S)

Use it alone: imports torch only.
Left out: 8-bit states; exceptions from weight decay (it is off by default, or applies to all).
"""
from __future__ import annotations

import math

import torch


class Optimizer:
    """AdamW over float32 masters, two rates, clipping, and a guard against non-finite gradients.

    parameters: [(name, parameter)]; what was added to the model (names that begin with
    "cue_recovery." or "lora.") gets `cue_lr`.
    device: where masters and moments live and are updated, 12 bytes per weight (default: where the
    weights are). "cpu" frees the GPU of them, at the cost of one round trip per step.
    """

    def __init__(self, parameters, *, lr: float, cue_lr: float, warmup: int, steps: int,
                 final: float, clip: float, weight_decay: float = 0.0, device=None):
        self.names = [name for name, _ in parameters]
        self.parameters = [parameter for _, parameter in parameters]
        if not self.parameters:
            raise ValueError("nothing to train: no parameter has a gradient")
        device = None if device is None else torch.device(device)
        self.masters = [self._master(p, device) for p in self.parameters]
        self.warmup, self.steps, self.final, self.clip = warmup, steps, final, clip
        groups = {}
        for name, master in zip(self.names, self.masters):
            rate = cue_lr if name.startswith(("cue_recovery.", "lora.")) else lr
            groups.setdefault(rate, []).append(master)
        # fused: one pass over the weights; the default would make copies of them
        self.adam = torch.optim.AdamW([{"params": masters, "base": rate, "lr": rate}
                                       for rate, masters in groups.items()],
                                      betas=(0.9, 0.999), weight_decay=weight_decay, fused=True)

    @staticmethod
    def _master(parameter, device) -> torch.Tensor:
        """The weight itself if it is float32 and in place; otherwise such a copy on `device`."""
        exact = torch.promote_types(parameter.dtype, torch.float32)
        if parameter.dtype == exact and device in (None, parameter.device):
            return parameter
        return parameter.detach().to(device or parameter.device, exact)

    def step(self, step: int) -> float:
        """Clip, set the rate of step `step` (from 0), update, clear. Returns the unclipped norm.

        If the norm is not finite, no weight changes; the caller counts such steps.
        """
        for parameter, master in zip(self.parameters, self.masters):
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.to(
                    master.device, master.dtype)
                parameter.grad = None
        norm = torch.nn.utils.clip_grad_norm_(self.masters, self.clip)
        # with sharded weights (DTensors) the norm must still be summed over the ranks
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if math.isfinite(norm):
            scale = min(1.0, (step + 1) / max(1, self.warmup))
            scale *= 1 - (1 - self.final) * step / max(1, self.steps)
            for group in self.adam.param_groups:
                group["lr"] = group["base"] * scale
            self.adam.step()
            with torch.no_grad():
                for parameter, master in zip(self.parameters, self.masters):
                    if master is not parameter:
                        parameter.copy_(master)
        for master in self.masters:
            master.grad = None
        return norm

    def tensors(self) -> dict[str, torch.Tensor]:
        """Masters and both moments by name: with these a run continues bit for bit."""
        out = {}
        for name, master in zip(self.names, self.masters):
            out[f"weight/{name}"] = master.detach()
            out.update({f"{key}/{name}": value for key, value in self.adam.state[master].items()})
        return out

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Load what tensors() gave. ValueError if it was given by another set of weights."""
        saved = {name.removeprefix("weight/") for name in tensors if name.startswith("weight/")}
        if other := saved ^ set(self.names):
            raise ValueError(f"the saved state and these settings train other weights, such as "
                             f"{min(other)}: is args.json that of another run?")
        for name, parameter, master in zip(self.names, self.parameters, self.masters):
            master.copy_(tensors[f"weight/{name}"])
            if master is not parameter:
                parameter.copy_(master)
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if f"{key}/{name}" in tensors:          # absent if it never had a gradient
                    self.adam.state[master][key] = tensors[f"{key}/{name}"].to(master.device,
                                                                               copy=True)
