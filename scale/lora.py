"""scale/lora.py - low-rank adapters, by hand: train a hundredth of the weights beside frozen ones.

The idea.  Every linear layer of the language model (q, k, v, o of attention; gate, up, down of the
feed-forward) keeps its weight W and gets two thin matrices beside it. Only these learn: gradients
and optimizer then cost a hundredth. And with the adapters off, the model is the one it started as,
so that one backbone is both student and teacher.

    y = W x + (alpha / rank) B A x       A (rank, in) random, B (out, rank) zero     (LoRA, eq. 3)

In:  a Qwen3-VL, dense or a mixture of experts.  Out: the same model with hooks, and a LoRA module
reachable as model.lora. No weight of the model changes its name.

Use it alone (imports torch, and safetensors to save):
    lora = attach(model, rank=16, alpha=32)      # the logits are still exactly what they were
    with lora.off(): model(...)                  # the stock model: the teacher
    model.save_pretrained(folder, state_dict=lora.merge())        # plain weights, loadable anywhere
    lora.save("adapter")                         # adapter_config.json and weights, as PEFT has them

Choices
1) B starts at zero, as in the paper: at step 0 the student is the base model, bit for bit.
2) Hooks, not other classes in place of nn.Linear: state dict, saving and sharding stay as they are.
   All adapters are below model.lora, so that sharding keeps them in the root's group.
3) Adapters have the type of their weight; optimizer.py keeps float32 masters where that is bf16.
4) Experts are 3D tensors in their class, not linear layers: a mixture gets adapters in attention.
5) merge() adds in float32 at least and rounds once. In bf16 the merged model is the attached one up
   to that rounding.
Left out: dropout, biases, embeddings, head and vision tower; sampling with merged weights, which
would save two small products a layer but not be the model that is scored.
"""
from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Adapter(nn.Module):
    """A and B beside one linear layer. path: where that stands in the model."""

    def __init__(self, linear: nn.Linear, path: str, rank: int, generator, shared):
        super().__init__()
        self.path, self.shared = path, shared
        A = torch.empty(rank, linear.in_features)
        A.uniform_(-linear.in_features**-0.5, linear.in_features**-0.5, generator=generator)
        self.A, self.B = nn.Parameter(A), nn.Parameter(torch.zeros(linear.out_features, rank))
        self.to(linear.weight)
        # a method, not a closure: a deep copy of the model then calls the copy's adapters
        self.handle = linear.register_forward_hook(self.add)

    def add(self, linear, args, output):
        """Forward hook. args[0] (..., in) -> output (..., out)."""
        if self.shared.off:
            return None
        return output + self.shared.scale * (args[0] @ self.A.T @ self.B.T)


class LoRA(nn.Module):
    """All adapters, as layers["0"]["q_proj"]: lora.layers.0.q_proj.A in the model's state dict."""

    def __init__(self, model, rank: int, alpha: float, seed: int):
        super().__init__()
        self.rank, self.alpha = rank, alpha
        self.shared = SimpleNamespace(off=False, scale=alpha / rank)    # what all adapters ask
        self.layers = nn.ModuleDict()
        self.owner = [model]        # in a list: as an attribute it would become our own submodule
        generator = torch.Generator().manual_seed(seed)
        for n, layer in enumerate(model.model.language_model.layers):
            self.layers[str(n)] = nn.ModuleDict({
                name.split(".")[-1]: Adapter(part, f"model.language_model.layers.{n}.{name}", rank,
                                             generator, self.shared)
                for name, part in layer.named_modules()
                if isinstance(part, nn.Linear) and name.split(".")[-1] in TARGETS})

    def adapters(self):
        """(name in the model's state dict without .A or .B, Adapter)"""
        return [(f"lora.layers.{n}.{name}", adapter) for n, layer in self.layers.items()
                for name, adapter in layer.items()]

    @contextmanager
    def off(self):
        """The model as it was before attach(), bit for bit."""
        was, self.shared.off = self.shared.off, True
        try:
            yield
        finally:
            self.shared.off = was

    def detach(self) -> None:
        """Remove every hook; the model is the stock model again."""
        for _, adapter in self.adapters():
            adapter.handle.remove()
        for model in self.owner:
            del model.lora
        self.owner.clear()

    @torch.no_grad()
    def merge(self, weights: dict | None = None) -> dict:
        """The model's state dict with each W + (alpha / rank) B A in CPU memory, and no adapters.

        weights: in place of the model's own state dict, as of a model cut over several GPUs; {} is
        returned for {}, which is what all ranks but the first have.
        """
        weights = self.owner[0].state_dict() if weights is None else weights
        merged = {k: v for k, v in weights.items() if not k.startswith("lora.")}
        for name, adapter in self.adapters() if weights else ():
            W, A, B = (weights[k] for k in (adapter.path + ".weight", name + ".A", name + ".B"))
            exact = torch.promote_types(W.dtype, torch.float32)
            added = self.shared.scale * (B.to(exact) @ A.to(exact))
            merged[adapter.path + ".weight"] = (W.to(exact) + added).to(W.dtype).cpu()
        return merged

    def save(self, folder, weights: dict | None = None, base: str = "") -> None:
        """Write the adapters as PEFT does. weights: as of merge(). base: name of the base model."""
        from safetensors.torch import save_file
        folder, weights = Path(folder), self.owner[0].state_dict() if weights is None else weights
        folder.mkdir(parents=True, exist_ok=True)
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": self.rank, "bias": "none",
                  "lora_alpha": self.alpha, "lora_dropout": 0.0, "inference_mode": True,
                  "base_model_name_or_path": base or None,
                  "target_modules": sorted({name.split(".")[-1] for name, _ in self.adapters()})}
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        tensors = {f"base_model.model.{adapter.path}.lora_{part}.weight":
                   weights[f"{name}.{part}"].detach().contiguous().cpu()
                   for name, adapter in self.adapters() for part in "AB"}
        save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})


def attach(model, rank: int = 16, alpha: float = 32, seed: int = 0) -> LoRA:
    """Hook adapters into a Qwen3-VL model, in place, and return them. `seed` draws every A.

    Raises ValueError if the model has adapters already, or a rank that cannot be.
    """
    if getattr(model, "lora", None) is not None:
        raise ValueError("this model has adapters already; detach() them first")
    if rank < 1:
        raise ValueError(f"a LoRA of rank {rank}: expected at least 1")
    model.lora = LoRA(model, rank, alpha, seed)
    return model.lora
