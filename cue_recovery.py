"""cue_recovery.py - the sink token asks the picture: a small cross-attention hooked into Qwen3-VL.

The idea.  The student must recover from the picture what the teacher was told in words. At a few
decoder layers, while the prompt is read (prefill), the first token of the sequence - the attention
sink, which every later token can see - asks all visual tokens of its own row one question and adds
the answer to itself. Decoding is untouched: the answer already sits in the key/value cache.

    q = h_sink W_Q   K = V W_K   U = V W_V   z = Attn(q, K, U) W_O   h_sink <- h_sink + z  (eq. 3-5)

V are the hidden states at the visual positions at this layer; RMSNorm comes before the projections.

In:  a stock Qwen3-VL model.  Out: the same model with hooks, and a CueRecovery module holding the
new weights, reachable as model.cue_recovery (so .to(), .parameters() and deepcopy include it).

Use it alone (imports torch, and safetensors to save):
    cue = attach(model, every=5)         # the model's logits are still exactly what they were
    with cue.prompt(end): model(...)     # sink="last" only: where the prompt of a training row ends
    cue.save("cue_recovery.safetensors"); cue.detach()
While it is attached, model.save_pretrained writes the module's weights too: detach() it first.

Departures from the paper and its release
1) W_O starts at zero: at step 0 the student is the base model, exactly.
2) Block.absorbed computes what Block.textbook does, with a hundredth of the multiplications at
   1,782 visual tokens. It needs less memory and on a CPU is faster by far; on a GPU the textbook
   is, by 1 ms of 3 (docs/speed.md).
3) A block stands before layer l + 1 for l = 0, every, 2 every, ... (after layer l *and* its
   DeepStack addition), and never behind the last layer, where no token could read the sink any
   more. The 8B model of the release has such a block: 67 M parameters without a useful gradient.
4) sink="last" goes beyond the paper. The first token cannot see the question, so it asks every
   picture the same thing. The last token of the prompt has read both.
Prefill means: no cached positions yet. A training forward has no cache, so the module is on there.
With gradient checkpointing and transformers before 5.23, run backward before the next forward: the
layers are run again in backward and read the masks of the last forward.
Left out: anything while decoding, an auxiliary loss, more than one sink at a time.
"""
from __future__ import annotations

import json
import math
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

# Dimension letters: B rows, L tokens, N columns between the first and last visual token of the
# batch, D hidden size, H heads, d = D / H.


class Block(nn.Module):
    """The cross-attention of one layer: 4 D^2 weights, no biases."""

    def __init__(self, hidden: int, heads: int, eps: float):
        super().__init__()
        if hidden % heads:
            raise ValueError(f"hidden size {hidden} is not a multiple of {heads} heads")
        self.heads = heads
        self.sink_norm, self.visual_norm = nn.RMSNorm(hidden, eps), nn.RMSNorm(hidden, eps)
        # skip_init: nn.Linear would draw from the global generator; CueRecovery fills all four
        self.query, self.key, self.value, self.output = (
            nn.utils.skip_init(nn.Linear, hidden, hidden, bias=False) for _ in range(4))

    def forward(self, x, sink, visual, lo: int, hi: int):
        """x (B, L, D); sink (B,) column of the sink; visual (B, N) bool for columns lo..hi-1 of x.

        Returns x with every row's sink updated, out of place, and the attention (B, H, N).
        """
        B, _, D = x.shape
        rows = torch.arange(B, device=x.device)
        h = x[rows, sink]                                                          # (B, D)
        q = self.query(self.sink_norm(h)).view(B, self.heads, -1)                  # (B, H, d)
        z, attention = self.absorbed(q, x[:, lo:hi], visual)
        h = h + self.output(z.reshape(B, D))
        return x.index_put((rows, sink), h), attention

    def textbook(self, q, v, visual):
        """Attn(q, K, U) as the paper writes it, with K and U of every visual token.

        q (B, H, d), v (B, N, D), visual (B, N) -> (B, H, d), and the attention (B, H, N).
        """
        V = self.visual_norm(v)
        K, U = (W(V).unflatten(-1, q.shape[1:]) for W in (self.key, self.value))   # (B, N, H, d)
        scores = torch.einsum("bhd,bnhd->bhn", q, K) / math.sqrt(q.shape[-1])
        attention = softmax(scores, visual)                                        # (B, H, N)
        return torch.einsum("bhn,bnhd->bhd", attention.to(v.dtype), U), attention

    def absorbed(self, q, v, visual):
        """The same function. One query needs no K and no U:

            q . (W_K x_j) = (W_K^T q) . x_j        sum_j a_j W_V x_j = W_V (sum_j a_j x_j)

        Project the one query and the one mean, not N tokens. RMSNorm factors out: a diagonal gain
        and one 1/rms per token, in at least float32 without copying v to it.
        """
        W_K, W_V = (W.weight.unflatten(0, q.shape[1:]) for W in (self.key, self.value))  # (H, d, D)
        gain, exact = self.visual_norm.weight, torch.promote_types(v.dtype, torch.float32)
        square = torch.linalg.vector_norm(v, dim=-1, dtype=exact).square()
        r = (square / v.shape[-1] + self.visual_norm.eps).rsqrt()[:, None]         # (B, 1, N)
        asked = torch.einsum("bhd,hdD->bhD", q, W_K) * gain                        # (B, H, D)
        scores = (v @ asked.mT).mT * r / math.sqrt(q.shape[-1])                    # (B, H, N)
        attention = softmax(scores, visual)
        mean = (attention * r).to(v.dtype) @ v * gain                              # (B, H, D)
        return torch.einsum("bhD,hdD->bhd", mean, W_V), attention


def softmax(scores, visual):
    """Over the visual tokens of a row, in float32 at least; 0 in rows without. (B, H, N)."""
    # a finite fill: -inf would give NaN in rows without a picture, and NaN * 0 is NaN
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = scores.masked_fill(~visual[:, None], torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1) * visual.any(dim=-1)[:, None, None]


class CueRecovery(nn.Module):
    """All blocks, and what they need to know of the prompt that is being read.

    blocks       ModuleDict, "l" -> the Block applied between layer l and layer l + 1
    prefill      (sink, visual, lo, hi) as Block.forward takes them; None: the blocks are off
    attention    {l: (B, H, L)} of the last prefill, zero off the visual tokens, if keep_attention
    """

    def __init__(self, model, every: int, seed: int, sink: str):
        super().__init__()
        config = model.config.text_config
        self.every, self.sink, self.end = every, sink, None
        self.image_ids = (model.config.image_token_id, model.config.video_token_id)
        self.prefill, self.attention = None, {}
        self.muted = self.keep_attention = False
        self.owner = [model]        # in a list: as an attribute it would become our own submodule
        self.hooks = [model.model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        self.blocks = nn.ModuleDict()
        generator = torch.Generator().manual_seed(seed)
        decoder = model.model.language_model.layers
        for layer in range(0, len(decoder) - 1, every):
            block = Block(config.hidden_size, config.num_attention_heads, config.rms_norm_eps)
            for linear in (block.query, block.key, block.value):
                nn.init.normal_(linear.weight, std=config.hidden_size**-0.5, generator=generator)
            nn.init.zeros_(block.output.weight)
            reader = decoder[layer + 1]
            self.blocks[str(layer)] = block.to(reader.input_layernorm.weight)
            # a method, not a closure: a deep copy of the model then asks the copy's blocks
            self.hooks.append(reader.register_forward_pre_hook(partial(self._ask, layer)))

    def _ask(self, layer: int, _, args):
        """Before the decoder layer that follows `layer`: its states, with the sinks updated."""
        if self.prefill is None:
            return None
        *_, lo, hi = self.prefill
        x, attention = self.blocks[str(layer)](args[0], *self.prefill)
        if self.keep_attention:
            self.attention[layer] = F.pad(attention.detach(), (lo, x.shape[1] - hi))
        return (x, *args[1:])

    def _begin(self, module, args, kwargs) -> None:
        """Before a forward: is this a prefill, where is each row's sink, where are its pictures?"""
        self.prefill, cache = None, kwargs.get("cache", kwargs.get("past_key_values"))
        if self.muted or cache is not None and cache.get_seq_length() > 0:
            return
        self.attention = {}
        ids, mask = kwargs.get("input_ids", args[0] if args else None), kwargs.get("attention_mask")
        if ids is None:
            raise ValueError("cue recovery finds the visual tokens by their ids: pass input_ids, "
                             "not inputs_embeds, or detach() the module")
        if mask is not None and (not torch.is_tensor(mask) or mask.shape != ids.shape):
            raise ValueError("cue recovery needs the (B, L) attention mask to find each row's "
                             f"sink, got {getattr(mask, 'shape', type(mask))} for {ids.shape}")
        visual = (ids == self.image_ids[0]) | (ids == self.image_ids[1])           # (B, L)
        columns = visual.any(dim=0).nonzero()[:, 0]
        if len(columns) == 0:                           # a batch of text only: nothing to ask
            return
        mask = torch.ones_like(ids) if mask is None else mask.long()
        if self.sink == "first":
            sink = mask.argmax(dim=1)                   # (B,), the first that is not padding
        elif self.end is not None:
            sink = torch.as_tensor(self.end, device=mask.device).expand(len(mask)) - 1
        elif cache is not None or kwargs.get("use_cache"):
            sink = mask.shape[1] - 1 - mask.flip(1).argmax(dim=1)      # the last that is not
        else:
            raise ValueError("sink=\"last\": without a cache this forward may hold a response too; "
                             "say where the prompt ends: `with model.cue_recovery.prompt(end):`")
        # pictures come first in a prompt, so this span is nearly all visual tokens
        lo, hi = int(columns[0]), int(columns[-1]) + 1
        self.prefill = sink, visual[:, lo:hi], lo, hi

    @contextmanager
    def prompt(self, end):
        """`with cue.prompt(end):` prompts end before column `end`, (B,) or one for all; responses
        may follow. sink="last" needs it wherever there is no cache; sink="first" ignores it.
        """
        self.end = end
        try:
            yield
        finally:
            self.end = None

    @contextmanager
    def off(self):
        """`with cue.off():` the stock model, so that a frozen backbone can teach without a copy."""
        was, self.muted = self.muted, True
        try:
            yield
        finally:
            self.muted = was

    def detach(self) -> None:
        """Remove every hook; the model is the stock model again."""
        for hook in self.hooks:
            hook.remove()
        for model in self.owner:
            del model.cue_recovery
        self.owner.clear()

    def save(self, path, weights: dict | None = None) -> None:
        """Write the weights, with the settings in the file's metadata, as safetensors.

        weights: to be written instead of the module's own, as of a module cut over several GPUs.
        """
        from safetensors.torch import save_file
        weights = self.state_dict() if weights is None else weights
        weights = {k: v.detach().contiguous().cpu() for k, v in weights.items()}
        save_file(weights, str(path), metadata={"cue_recovery": json.dumps(self.settings())})

    def load(self, path) -> None:
        """Read weights written by save(). Raises ValueError if they belong to another shape."""
        from safetensors.torch import load_file
        found, own = read_settings(path), self.settings()
        if found != own:
            raise ValueError(f"{path} was saved with {found}, this module has {own}")
        self.load_state_dict(load_file(str(path)))

    def settings(self) -> dict:
        block = next(iter(self.blocks.values()))
        return {"every": self.every, "layers": [int(name) for name in self.blocks],
                "hidden": block.query.in_features, "heads": block.heads, "sink": self.sink}


def attach(model, every: int = 5, seed: int = 0, sink: str = "first") -> CueRecovery:
    """Hook the module into a Qwen3-VL model, in place, and return it. `seed` draws its weights.

    every: one block each `every` layers (the paper: 5). sink: the token that asks, "first" of the
    sequence (the paper) or "last" of the prompt. Raises ValueError if there is a module already.
    """
    if sink not in ("first", "last"):
        raise ValueError(f"sink {sink!r}, expected first or last")
    if getattr(model, "cue_recovery", None) is not None:
        raise ValueError("this model has a cue recovery module already; detach() it first")
    if not hasattr(getattr(model, "model", None), "language_model"):
        raise ValueError(f"{type(model).__name__} has no model.language_model: the module needs a "
                         "Qwen3-VL model, with pictures to ask")
    depth = len(model.model.language_model.layers)
    if every < 1 or depth < 2:
        raise ValueError(f"every={every} with {depth} decoder layers leaves no place for a block")
    model.cue_recovery = CueRecovery(model, every, seed, sink)
    return model.cue_recovery


def load(model, path) -> CueRecovery:
    """Attach a module saved by CueRecovery.save, with the settings it was saved with."""
    settings = read_settings(path)
    cue = attach(model, every=settings["every"], sink=settings["sink"])
    try:
        cue.load(path)
    except Exception:
        cue.detach()
        raise
    return cue


def read_settings(path) -> dict:
    from safetensors import safe_open
    with safe_open(str(path), framework="pt") as file:
        text = (file.metadata() or {}).get("cue_recovery")
    if text is None:
        raise ValueError(f"{path}: not a cue recovery file (its metadata has no settings)")
    return {"sink": "first", **json.loads(text)}     # files from before there was a choice
