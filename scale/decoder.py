"""scale/decoder.py - the decoder that makes sampling fast: same loop, same tokens, other memory.

The idea.  PlainDecoder leaves keys and values to the model's own cache, which copies all it holds
to append one token, and copies it again when a row leaves. Here every layer has a buffer with room:
a token is written into its column, and the last rows fill the places of those that left, so one row
moves instead of all. Prompts that wait join rows that are running.

    two rows run, one prompt joins; columns are the buffer's     . blank, hidden by the mask
      a b c d e f _ _          a b c d e f _ _
      g h i j k l _ _    ->    g h i j k l _ _
                               . . . x y z _ _                   _ room for what comes

In:  the model.   Out: the logits of the next token, as from PlainDecoder.
Run: rollout.sample(model, batch, ..., decoder=FastDecoder).
Copy it together with rollout.py. The one equation is attention's own; nothing here changes it.

Choices a reader may wonder about:
1) All rows end in the same column, so a step writes one column for all. A prompt that joins longer
   rows has blank columns before it; columns that are blank in every row are dropped from time to
   time.
2) The mask is made when prompts are read, in the form that attention uses, and each step looks at
   one more column of it. The model would prepare a plain mask anew at every step.
3) On a GPU a step takes as long as it takes to launch its kernels (docs/speed.md). The class's
   RMSNorm is 8 of them, F.rms_norm is one: during a step, and only on a GPU, it stands in for the
   class's. At 28 layers a step is then 837 operations instead of 1,627, counted on a simulated
   device (tests/simulated_cuda.py). This changes last digits: in bf16 the class rounds before and
   after the gain, F.rms_norm once. The prefill and a CPU keep the class's own, bit for bit.
Measured in tests/speed/README.md, beside `generate` and a loop on the class's own cache.
Left out: a cache in pages; caches that slide or quantise (refused by name); CUDA graphs, which are
in graphs.py.
"""
from __future__ import annotations

from contextlib import contextmanager
from functools import partial

import torch
from torch.nn.functional import pad, rms_norm

from rollout import PlainDecoder

# Dimension letters: B prompts, K samples of each, R rows that run, L prompt tokens, V vocabulary,
# C columns of the cache, d numbers of one head.

ROOM = 128             # tokens by which the buffers and the mask grow


@contextmanager
def without_flash(model):
    """Around sampling: sdpa, whatever scoring uses. Of padded rows flash attention takes out the
    padding in every layer and step, and waits for the device each time."""
    was = model.config._attn_implementation
    try:
        if "flash" in was:
            model.set_attn_implementation("sdpa")
        yield model
    finally:
        if "flash" in was:
            model.set_attn_implementation(was)


class FastDecoder(PlainDecoder):
    """The methods of PlainDecoder, on buffers of our own."""
    joins = True

    def __init__(self, model):
        super().__init__(model)
        self.tokens = []           # of each row that runs: how many columns are its own, the last
        self.mask = None           # (R, 1, 1, >= C), see decode_mask
        self.norms = []            # those that a step runs in one kernel; see choice 3
        self.new_cache = KVCache

    def read(self, batch, K: int):
        """Prefill B prompts and put K rows of each behind those that run. Returns (B K, V)."""
        R = len(self.tokens)
        running, position = (self.cache, self.position) if R else (None, None)
        logits = super().read(batch, K)               # cache, mask and position of the new rows
        found, mask = self.cache, self.mask
        if not {type(layer).__name__ for layer in getattr(found, "layers", [])} == {"DynamicLayer"}:
            raise ValueError(f"FastDecoder cannot take over a {type(found).__name__} whose layers "
                             "are not all DynamicLayer: sample with rollout.PlainDecoder")
        self.cache = running or self.new_cache(len(found.layers))
        self.cache.join(found.layers, R)
        self.position = torch.cat([position, self.position]) if R else self.position
        self.tokens += mask.sum(dim=1).tolist()
        self.norms = [] if mask.device.type == "cpu" else norms_of(self.model)
        self.mask = decode_mask(self.model, self.tokens, self.cache.get_seq_length(), mask.device)
        return logits

    @torch.inference_mode()
    def step(self, tokens):
        """Append one token (R,) to each row. Returns (R, V): logits of the next."""
        self.tokens = [n + 1 for n in self.tokens]
        columns = self.cache.get_seq_length() + 1
        if self.mask is not None and columns > self.mask.shape[-1]:
            # every row may look at what comes: 0 if the mask is added, 1 if it selects
            self.mask = pad(self.mask, (0, ROOM), value=0 if self.mask.is_floating_point() else 1)
        with fused(self.norms):
            return self.forward(tokens, None if self.mask is None else self.mask[..., :columns])

    @torch.inference_mode()
    def keep(self, rows: list[int]) -> list[int]:
        """Forget all but these rows. Returns them in the order in which they now stand."""
        order = fill_gaps(rows)
        self.tokens = [self.tokens[row] for row in order]
        if not order:
            return order
        index = torch.tensor(order).to(self.position.device, non_blocking=True)
        self.cache.move(order)
        self.position = self.position[index]
        self.mask = None if self.mask is None else self.mask[index]
        blank = self.cache.get_seq_length() - max(self.tokens)
        if blank >= ROOM:
            self.cache.drop(blank, len(order))
            self.mask = decode_mask(self.model, self.tokens, self.cache.get_seq_length(),
                                    index.device)
        return order


def fill_gaps(rows: list[int]) -> list[int]:
    """Which of `rows` each place takes when all others leave: the last ones fill the gaps.

    >>> fill_gaps([0, 2, 3, 5])
    [0, 5, 2, 3]
    """
    stay = {row for row in rows if row < len(rows)}
    movers = iter(row for row in rows if row >= len(rows))
    return [place if place in stay else next(movers) for place in range(len(rows))]


def decode_mask(model, tokens: list[int], columns: int, device):
    """(R, 1, 1, >= columns + ROOM): which columns each row may look at, as the attention wants it.

    tokens: how many of the cache's columns, the last ones, are a row's own. None where nothing is
    padded: then attention has its fastest kernels.

    >>> model = SimpleNamespace(config=SimpleNamespace(_attn_implementation="sdpa"))
    >>> decode_mask(model, [3, 1], 3, "cpu")[:, 0, 0, :4].int().tolist()
    [[1, 1, 1, 1], [0, 0, 1, 1]]
    """
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    own = torch.tensor(tokens, device=device)[:, None]
    # an attention kernel copies a mask whose rows do not begin at multiples of 8
    width = columns + ROOM + -(columns + ROOM) % 8
    mask = torch.arange(width, device=device) >= columns - own
    if attention not in ("sdpa", "eager"):
        return mask.long()                          # flash attention wants the plain one
    if min(tokens) == columns:
        return None
    mask = mask[:, None, None]
    if attention == "sdpa" and mask.device.type == "cpu":
        return mask                    # on a GPU every layer would make an additive one of it
    return torch.zeros(mask.shape, dtype=model.dtype, device=device).masked_fill(
        ~mask, torch.finfo(model.dtype).min)


def norms_of(model) -> list:
    """The modules that compute weight * x / sqrt(mean(x^2) + eps), by their class's own forward."""
    return [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")
            and hasattr(module, "variance_epsilon") and "forward" not in vars(module)]


def fused_norm(norm, x):
    """(..., D) as norm(x), in one kernel."""
    return rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


@contextmanager
def fused(norms):
    """Inside, these modules run as fused_norm. Their hooks still see each call."""
    for norm in norms:
        norm.forward = partial(fused_norm, norm)
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


class KVCache:
    """Keys and values of the running rows, with room for what comes: what the model calls a cache.

    A buffer a layer, (2, rows, heads, capacity, d), first the keys and then the values. When it is
    full it grows by ROOM columns, and takes along only the rows that are still running. The model
    asks a cache for nothing but update() and the three sizes.
    """

    def __init__(self, layers: int):
        self.buffers, self.lengths = [None] * layers, [0] * layers

    def join(self, layers, R: int) -> None:
        """Put a prefill's layers behind our R rows; the layers are emptied."""
        for i, layer in enumerate(layers):
            both = torch.stack([layer.keys, layer.values])
            layer.keys = layer.values = None        # or the prompt would be held twice
            if R:
                parts = self.buffers[i][:, :R, :, :self.lengths[i]], both
                wide = max(part.shape[3] for part in parts)
                both = torch.cat([pad(part, (0, 0, wide - part.shape[3], 0)) for part in parts],
                                 dim=1)
            self.lengths[i], self.buffers[i] = both.shape[3], self.grown(both)

    def move(self, order: list[int]) -> None:
        """Row i is now what row order[i] was. Only rows that change their place are copied."""
        moved = [place for place, row in enumerate(order) if place != row]
        if not moved:
            return
        to, source = torch.tensor([moved, [order[place] for place in moved]]).to(
            self.buffers[0].device, non_blocking=True)
        for buffer, n in zip(self.buffers, self.lengths):
            buffer[:, to, :, :n] = buffer[:, source, :, :n]

    def drop(self, columns: int, R: int) -> None:
        """Leave out so many columns at the beginning; R rows are kept."""
        for i, n in enumerate(self.lengths):
            self.buffers[i] = self.grown(self.buffers[i][:, :R, :, columns:n])
            self.lengths[i] = n - columns

    def grown(self, buffer):
        return pad(buffer, (0, 0, 0, ROOM))

    def update(self, keys, values, layer: int, *args, **kwargs):
        """Append one token a row, (R, heads, 1, d) each; returns all, (R, heads, C + 1, d) each."""
        n, R, buffer = self.lengths[layer], keys.shape[0], self.buffers[layer]
        if n == buffer.shape[3]:
            buffer = self.buffers[layer] = self.grown(buffer[:, :R])
        buffer[0, :R, :, n:n + 1], buffer[1, :R, :, n:n + 1] = keys, values
        self.lengths[layer] = n + 1
        return buffer[0, :R, :, :n + 1], buffer[1, :R, :, :n + 1]

    def get_seq_length(self, layer: int = 0) -> int:
        return self.lengths[layer]

    get_query_offset = get_seq_length

    def get_mask_sizes(self, query_length: int, layer: int) -> tuple[int, int]:
        return self.lengths[layer] + query_length, 0
