"""scale/graphs.py - the decoder whose step is one launch: a CUDA graph, recorded and replayed.

The idea.  A decoding step is some 900 small kernels. The GPU is done with each before the host has
launched the next, so launches set the time of a step: for a 2B on an H200, 14.2 ms for kernels
of 3.9 ms. A CUDA graph is a list of kernels that was recorded once and is launched as a whole; such
a step took 4.7 ms. It repeats the same kernels on the same memory, so shapes and addresses must
stay:

    rows       those that left stay as idle rows, until half of the rows are idle
    columns    attention reads the whole buffer; the mask hides what is not written yet
    column     where this token is written is a number on the device, not in the recording

When one of them must change (prompts join, a buffer is full, blank columns are dropped, half of the
rows are idle) the step is recorded anew, which takes as long as ten.

In:  the model.   Out: the logits of the next token, as from PlainDecoder.
Run: rollout.sample(model, batch, ..., decoder=GraphDecoder), or distill.py --graph-decoding.
Copy it together with decoder.py and rollout.py. On a CPU the same step runs unrecorded, so that it
can be tested there. On an H200 (2B's shape, bf16, no module, no adapters) its answers were those of
FastDecoder, at twice its tokens a second with 8 rows, 1.07 times with 64 rows of one length, and
1.5 times with 32 rows whose answers end at random. Not yet run on a GPU with the recovery module or
adapters inside; until it is, nothing uses it by default.
Left out: mixtures of experts, whose routing the host may wait for (refused); sharded models.
"""
from __future__ import annotations

from functools import lru_cache
from types import SimpleNamespace

import torch
from torch.nn.functional import pad

from scale import decoder
from scale.decoder import FastDecoder, KVCache, fill_gaps, fused

# Dimension letters: R rows that run, S rows of the recording (idle ones included), V vocabulary,
# C columns of the buffers, d numbers of one head.


class GraphDecoder(FastDecoder):
    """The methods of FastDecoder, with a step of fixed shapes that a GPU replays."""

    def __init__(self, model):
        if getattr(model.config.get_text_config(), "num_experts", 0):
            raise ValueError("GraphDecoder cannot record a mixture of experts: use FastDecoder")
        super().__init__(model)
        self.new_cache, self.replay = FixedCache, None

    def read(self, batch, K: int):
        """Prefill B prompts and put K rows of each behind those that run. Returns (B K, V)."""
        if self.tokens:
            self.position = self.position[:len(self.tokens)]
        logits = super().read(batch, K)
        self.fit()
        return logits

    @torch.inference_mode()
    def step(self, tokens):
        """Append one token (R,) to each row. Returns (R, V): logits of the next."""
        R, n = len(tokens), self.cache.get_seq_length()
        if n == self.mask.shape[-1]:
            self.cache.drop(0, R)                # drops nothing, but makes room
            self.fit()
        self.given[:R] = tokens                  # an idle row says its last token again
        self.cache.column.fill_(n)
        self.replay = self.replay or self.record()
        logits = self.replay()[:R].clone()       # the next replay writes over its own
        self.position += 1
        self.tokens = [own + 1 for own in self.tokens]
        self.cache.lengths = [n + 1] * len(self.cache.lengths)
        return logits

    @torch.inference_mode()
    def keep(self, rows: list[int]) -> list[int]:
        """Forget all but these rows. Returns them in the order in which they now stand."""
        order = fill_gaps(rows)
        self.tokens = [self.tokens[row] for row in order]
        R = len(order)
        if R and order != list(range(R)):
            index = torch.tensor(order).to(self.position.device, non_blocking=True)
            self.cache.move(order)
            self.position[:R], self.mask[:R] = self.position[index], self.mask[index]
        blank = self.cache.get_seq_length() - max(self.tokens, default=0)
        if R and blank >= decoder.ROOM:
            self.cache.drop(blank, R)
            self.fit()
        elif 0 < R <= len(self.given) // 2:
            self.fit()
        return order

    def fit(self) -> None:
        """New inputs for the rows that run and the columns that there are; to be recorded anew."""
        S, n, device = len(self.tokens), self.cache.get_seq_length(), self.position.device
        own = torch.tensor(self.tokens).to(device, non_blocking=True)[:, None]
        column = torch.arange(self.cache.buffers[0].shape[3], device=device)
        hidden = (column < n - own) | (column >= n)                                 # (S, C)
        self.mask = torch.zeros(S, 1, 1, len(column), dtype=self.model.dtype, device=device)
        self.mask.masked_fill_(hidden[:, None, None], torch.finfo(self.model.dtype).min)
        self.position = self.position[:S].clone()
        self.given = torch.zeros(S, dtype=torch.long, device=device)
        self.cache.column = torch.zeros(1, dtype=torch.long, device=device)
        self.replay = None

    def run(self):
        """The step, (S, V). It changes no input, so it may run any number of times: the column is
        shown again, the token written again, and the position is moved on by step()."""
        position = self.position
        self.mask.index_fill_(3, self.cache.column, 0)
        with fused(self.norms):
            logits = self.forward(self.given, self.mask)
        self.position = position
        return logits

    def record(self):
        """A function that runs the step on the inputs as they are by then, and returns (S, V)."""
        if self.mask.device.type != "cuda":
            return self.run
        here, now = recorder(self.mask.device), torch.cuda.current_stream()
        graph = torch.cuda.CUDAGraph()
        here.stream.wait_stream(now)
        with torch.cuda.stream(here.stream):
            for _ in range(2):              # what is made at first use may not be recorded
                self.run()
            # not torch.cuda.graph(), which hands all cached memory back first, each time.
            # The last recording is let go only now: it keeps the memory that this one takes over.
            graph.capture_begin(pool=here.last and here.last.pool(),
                                capture_error_mode="thread_local")
            try:
                logits = self.run()
            finally:
                graph.capture_end()
        now.wait_stream(here.stream)
        here.last = graph

        def replay():
            graph.replay()
            return logits
        return replay


@lru_cache
def recorder(device):
    """Of all decoders: the stream to record on, and the last recording, which holds the memory."""
    return SimpleNamespace(stream=torch.cuda.Stream(device), last=None)


class FixedCache(KVCache):
    """Buffers that are written at a column of the device's, and read as a whole."""
    column = None                  # (1,) int64

    def grown(self, buffer):
        # a mask whose rows begin at multiples of 8 need not be copied by every attention
        return pad(buffer, (0, 0, 0, decoder.ROOM + -(buffer.shape[3] + decoder.ROOM) % 8))

    def update(self, keys, values, layer: int, *args, **kwargs):
        """Write one token a row, (S, heads, 1, d) each; returns all columns, (S, heads, C, d)."""
        buffer = self.buffers[layer][:, :len(keys)]
        buffer[0].index_copy_(2, self.column, keys)
        buffer[1].index_copy_(2, self.column, values)
        return buffer[0], buffer[1]
