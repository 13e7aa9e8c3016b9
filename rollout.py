"""rollout.py - the hand-written sampling loop: the student answers its own prompts.

The idea.  On-policy distillation trains on what the student itself says. `sample` reads a batch of
left-padded prompts once (prefill), keeps the key/value cache, and then draws one token a row until
the row emits a stop id or the limit is reached. Rows that have stopped leave the batch, and prompts
that wait take their places. Several samples of one prompt share its prefill.

    prompts (B, L), left-padded          responses (B, T), right-padded
      . . a b c d   ->                     x y z <stop>
      e f g h i j   ->                     u v . .          stopped=False if cut off by the limit

In:  the model, the keyword arguments of its forward call (input_ids, attention_mask, pictures,
     ...), the sampling settings, a seeded generator.
Out: Rollout(ids, lengths, stopped, logprobs).
`append_response` then puts prompt and response together again, for a teacher or a student to score.

The one equation.  p(token) ~ softmax(logits' / temperature), logits' = logits after the penalties
and bans, cut to the top k and the nucleus of mass p, in this order. A token is drawn by inverting
the cumulative distribution at one uniform number per row and step:  first token with cdf > u.

Use it alone: imports torch only; works with Qwen3-VL of transformers 5.4 and later.

Choices a reader may wonder about:
1) Uniform numbers are drawn for all rows of the batch, finished or not, on the CPU. So a row's
   tokens do not depend on when its neighbours stop, and a seed gives the same draws anywhere.
2) Positions are computed once and passed at every step. The model would otherwise take them from
   `rope_deltas`, a hidden state that any other forward pass (say, the teacher's) overwrites.
3) Penalties look at generated tokens only, never at the prompt (vLLM's meaning of presence penalty;
   transformers' repetition penalty would include the prompt).
4) The cache is our own (KVCache below): a token is written into its place in a buffer, where
   transformers' copies all it holds to append one; and a row that stops gives its place to the last
   running row, so that one row is copied instead of all. Measured in tests/speed/README.md.
   When further prompts join, all is copied once; columns at which no row looks any more are
   dropped.
5) Decoding runs in inference mode, which saves bookkeeping at every operation. The prefill does
   not, so that what a hook or a sharded model keeps from it are ordinary tensors.
6) Every step calls the whole model, not its decoder or its layers: hooks, adapters and sharding see
   each step. A decoder step written out by hand is faster at small sizes, and would skip them all.
Left out: beam search, speculative decoding, contrastive anything.
"""
from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch

# Dimension letters: B prompts, K samples of each, R rows still running (of B K), L prompt tokens,
# T response tokens, V vocabulary.

JOIN = 8         # prompts that wait are read when one place in so many is free
PICTURES = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


@dataclass
class Rollout:
    """Sampled responses of B rows, on the model's device. With K samples a prompt there are B K
    rows, those of a prompt together.

    ids       (B, T) int64, right-padded with the pad id; T is the longest response
    lengths   (B,) int64, scored tokens a row, the stop token included
    stopped   (B,) bool, False where the row was cut off by max_new_tokens
    logprobs  (B, T) float32, log-probability of each token under the distribution it was drawn from
              (at temperature 0: under the untempered softmax), 0 at padding
    """
    ids: torch.Tensor
    lengths: torch.Tensor
    stopped: torch.Tensor
    logprobs: torch.Tensor

    @property
    def mask(self) -> torch.Tensor:
        """(B, T) bool, True at response tokens. By length, since the pad id may be a stop id."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.lengths[:, None]


@dataclass
class Running:
    """The R rows that have not stopped yet. Each field is (R,), the last (R, V)."""
    at: torch.Tensor           # the row's place in the result
    drawn: torch.Tensor        # how many tokens it has said
    read: torch.Tensor         # tokens of its prompt, without padding
    position: torch.Tensor     # rotary position of its first response token
    logits: torch.Tensor       # of its next token

    def __len__(self):
        return len(self.at)

    def __getitem__(self, which):
        return Running(*(field[which] for field in vars(self).values()))


@torch.no_grad()
def sample(model, batch, *, max_new_tokens: int, temperature: float = 1.0, top_p: float = 1.0,
           top_k: int = 0, presence_penalty: float = 0.0, repetition_penalty: float = 1.0,
           stop_ids, banned_ids=(), pad_id: int = 0, samples_per_prompt: int = 1, more=None,
           generator=None, uniforms=None) -> Rollout:
    """Sample responses to every prompt of `batch`; see the header for what and why.

    temperature 0 is greedy; top_k 0 and top_p 1 switch those off. presence_penalty is subtracted
    once from every id already generated; repetition_penalty divides positive and multiplies
    negative logits of them. samples_per_prompt K: row b K + k of the result is sample k of prompt
    b, and the prompt is read once for all K.
    more: a function that makes a batch of at most n prompts that wait, or None if none do; their
    rows follow in the result. As many prompts run at a time as `batch` has: when an eighth of them
    have stopped, so many are asked for, and as many as there were when all have.
    uniforms (rows of the result, max_new_tokens) in [0, 1): the numbers to draw with, in place of
    the generator's. Then no token depends on how the prompts are cut into batches.
    The model is put in eval mode, and back.
    """
    device, K = batch["input_ids"].device, samples_per_prompt
    cache_name = "cache" if "cache" in inspect.signature(
        type(model).forward).parameters else "past_key_values"    # renamed in transformers 5.24
    stop = torch.tensor(sorted(stop_ids), device=device)
    banned = torch.tensor(list(banned_ids), device=device, dtype=torch.long)
    uniforms = None if uniforms is None else uniforms.to(device)
    penalised = presence_penalty != 0 or repetition_penalty != 1

    places = len(batch["input_ids"])                             # prompts that may run at a time
    out = rows = cache = mask = None
    modes = [(module, module.training) for module in model.modules()]   # a frozen part may differ
    model.eval()
    try:
        while batch is not None or rows:
            # 1) prefill: read prompts when there is room for them, and make K rows of each
            if batch is not None:
                _check(batch["attention_mask"], max_new_tokens, temperature, top_p, top_k,
                       repetition_penalty, K)
                cache = cache if rows else None
                found, new = _prefill(model, batch, K, cache_name)
                new.at += len(out.ids) if out else 0
                cache = _joined(cache, found, K, len(rows or ()))
                columns = max(columns if rows else 0, batch["input_ids"].shape[1])
                rows = _and(rows, new)
                out = _and(out, _unwritten(len(new), max_new_tokens, pad_id, device))
                mask = _decode_mask(model, rows.read + rows.drawn, columns, max_new_tokens)
                batch = _waiting(more, cache, len(rows), places, K)
                continue
            with torch.inference_mode():
                # 2) the distribution of the next token
                # a copy: penalties and bans are written in place, and these are the model's own
                logits, t = rows.logits.to(torch.float32, copy=True), rows.drawn    # (R, V), (R,)
                if penalised:
                    _penalise(logits, out.ids[rows.at], t, presence_penalty, repetition_penalty)
                if len(banned):
                    logits[:, banned] = float("-inf")
                # 3) draw, on every row so far, so that finished neighbours change nothing
                uniform = None
                if temperature > 0:
                    uniform = uniforms[rows.at, t] if uniforms is not None else torch.rand(
                        len(out.ids), generator=generator, dtype=torch.float64).to(device)[rows.at]
                tokens, logprobs = _draw(logits, uniform, temperature, top_p, top_k)    # (R,), (R,)
                out.ids[rows.at, t], out.logprobs[rows.at, t] = tokens, logprobs
                rows.drawn = t + 1
                # 4) rows that stopped leave the batch
                stopped = (tokens[:, None] == stop).any(dim=1)
                done = stopped | (rows.drawn == max_new_tokens)
                if bool(done.any()):
                    out.stopped[rows.at], out.lengths[rows.at] = stopped, rows.drawn
                    keep = _close_gaps(done)
                    rows, tokens = rows[keep], tokens[keep]
                    mask = None if mask is None else mask[keep]
                    if rows:
                        cache.batch_select_indices(keep)
                        blank = columns + 1 - int((rows.read + rows.drawn).max())
                        if blank >= KVCache.ROOM and isinstance(cache, KVCache):
                            cache.drop(blank, len(rows))   # columns at which nobody looks any more
                            columns, mask = columns - blank, mask[..., blank:]
                # 5) one forward step on the cache
                if rows:
                    columns += 1
                    position = rows.position + rows.drawn - 1
                    step = {cache_name: cache, "use_cache": True, "input_ids": tokens[:, None],
                            "attention_mask": None if mask is None else mask[..., :columns],
                            "position_ids": position.expand(3, -1)[..., None]}          # (3, R, 1)
                    rows.logits = model(**step).logits[:, -1]
            batch = _waiting(more, cache, len(rows), places, K)
    finally:
        for module, training in modes:
            module.training = training
    T = int(out.lengths.max())
    return Rollout(out.ids[:, :T], out.lengths, out.stopped, out.logprobs[:, :T])


def _waiting(more, cache, R: int, places: int, K: int):
    """The next batch of prompts that wait, if there is room; only our own cache can be joined."""
    few = max(1, places // JOIN)
    if more is None or R and (R > K * (places - few) or not isinstance(cache, KVCache)):
        return None
    return more(few if R else places)


def _prefill(model, batch, K: int, cache_name: str):
    """Read B prompts: the model's cache of them, and the B K rows that go on from there."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    positions = rope_positions(model, batch)                                        # (3, B, L)
    output = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True,
                   logits_to_keep=1, **{k: batch[k] for k in PICTURES if k in batch})
    after, rows = position_after(positions, mask), K * len(ids)
    return getattr(output, cache_name), Running(
        torch.arange(rows, device=ids.device), torch.zeros_like(after).repeat_interleave(K),
        *(x.repeat_interleave(K, dim=0) for x in (mask.sum(dim=1), after, output.logits[:, -1])))


def _unwritten(rows: int, T: int, pad_id: int, device) -> Rollout:
    return Rollout(torch.full((rows, T), pad_id, device=device),
                   torch.zeros(rows, dtype=torch.long, device=device),
                   torch.zeros(rows, dtype=torch.bool, device=device),
                   torch.zeros(rows, T, device=device))


def _and(some, others):
    """The rows of two Rollouts, or of two Runnings, in one."""
    if some is None:
        return others
    return type(some)(*map(torch.cat, zip(vars(some).values(), vars(others).values())))


def _check(mask, max_new_tokens, temperature, top_p, top_k, repetition_penalty, K) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
    if K < 1:
        raise ValueError(f"samples_per_prompt is {K}, expected at least 1")
    if not (0 <= temperature < float("inf") and 0 < top_p <= 1 and top_k >= 0
            and repetition_penalty > 0):
        raise ValueError(f"temperature {temperature}, top_p {top_p}, top_k {top_k}, "
                         f"repetition_penalty {repetition_penalty}: out of range")
    if not bool(mask[:, -1].all()) or bool((mask.diff(dim=1) < 0).any()):
        raise ValueError("prompts must be left-padded: there is padding behind a token")


# ---------------------------------------------------------------------------- the next token

def _penalise(logits, ids, drawn, presence, repetition) -> None:
    """In place. logits (R, V), ids (R, T), of which the first drawn (R,) have been said."""
    if int(drawn.max()) == 0:
        return
    # what a row has not said yet is its last word again, and an id that occurs twice is written
    # twice with the same value
    place = torch.arange(int(drawn.max()), device=ids.device).minimum((drawn - 1)[:, None])
    said = ids.gather(1, place.clamp(min=0))
    before = logits.gather(1, said)
    after = torch.where(before > 0, before / repetition, before * repetition) - presence
    logits.scatter_(1, said, torch.where(drawn[:, None] > 0, after, before))


def _draw(logits, uniform, temperature, top_p, top_k):
    """Tokens (R,) and their log-probs (R,). logits (R, V), ours to write into; uniform (R,) in
    [0, 1), None for greedy."""
    if temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
    logits /= temperature
    order = None
    if top_k:          # a whole sort of 151,936 words takes a hundred times as long
        logits, order = logits.topk(min(top_k, logits.shape[1]))                    # (R, top_k)
    elif top_p < 1:
        logits, order = logits.sort(dim=-1, descending=True)
    probs = logits.softmax(-1)
    if top_p < 1:
        # keep a token if the mass before it is below top_p: the most likely one always stays
        probs[probs.cumsum(-1) - probs >= top_p] = 0
        probs /= probs.sum(-1, keepdim=True)
    index = _invert_cdf(probs, uniform)                                             # (R, 1)
    tokens = index if order is None else order.gather(1, index)
    return tokens[:, 0], probs.gather(1, index)[:, 0].log()


def _invert_cdf(probs, uniform, block: int = 128):
    """(R, 1): the first index of probs (R, V) whose cumulative probability is above `uniform`.

    Summed in float64: over 151,936 words, float32 would be off by more than a rare token's whole
    mass. But as one finds a word in a dictionary, first the page and then the word: sums of 128 are
    exact enough in float32; only the pages' sums and one page's words are added up in float64.
    """
    pages = torch.nn.functional.pad(probs, (0, -probs.shape[1] % block)).unflatten(1, (-1, block))
    cdf = pages.sum(-1).cumsum(-1, dtype=torch.float64)                             # (R, V / 128)
    target = (uniform * cdf[:, -1])[:, None]                                        # (R, 1)
    page = torch.searchsorted(cdf, target, right=True)
    before = torch.nn.functional.pad(cdf, (1, 0)).gather(1, page)
    words = pages[torch.arange(len(pages), device=page.device), page[:, 0]]         # (R, 128)
    cdf = before + words.cumsum(-1, dtype=torch.float64)
    # the two ways of adding a page differ in the last digits: never run past its last possible word
    target = torch.minimum(target, torch.nextafter(cdf[:, -1:], torch.zeros_like(target)))
    word = torch.searchsorted(cdf, target, right=True)
    return page * block + word


# ---------------------------------------------------------------------------- the cache

class KVCache:
    """Keys and values of the running rows, with room for what comes: what the model calls a cache.

    A buffer a layer, (2, rows, heads, capacity, d), first the keys and then the values. It grows by
    ROOM tokens at a time, and then takes along only the rows that are still running. All rows end
    in the same column: a prompt that joins longer answers has blank columns before it, which the
    mask hides. The model asks a cache for nothing but update() and the three sizes.
    """
    ROOM = 128

    def __init__(self, layers: int):
        self.buffers, self.lengths = [None] * layers, [0] * layers

    def join(self, layers, K: int, R: int) -> None:
        """Put a prefill's layers, each row K times, behind our R rows; the layers are emptied."""
        for i, layer in enumerate(layers):
            both = torch.stack([layer.keys, layer.values]).repeat_interleave(K, dim=1)
            layer.keys = layer.values = None        # or the prompt would be held twice
            if R:
                parts = self.buffers[i][:, :R, :, :self.lengths[i]], both
                wide = max(part.shape[3] for part in parts)
                both = torch.cat([torch.nn.functional.pad(part, (0, 0, wide - part.shape[3], 0))
                                  for part in parts], dim=1)
            self.lengths[i], self.buffers[i] = both.shape[3], self._grown(both)

    def drop(self, columns: int, R: int) -> None:
        """Leave out so many columns at the beginning; R rows are kept."""
        for i, n in enumerate(self.lengths):
            self.buffers[i] = self._grown(self.buffers[i][:, :R, :, columns:n])
            self.lengths[i] = n - columns

    def _grown(self, buffer):
        return torch.nn.functional.pad(buffer, (0, 0, 0, self.ROOM))

    def update(self, keys, values, layer: int, *args, **kwargs):
        """Append one token a row, (R, heads, 1, d) each; returns all, (R, heads, n + 1, d) each."""
        n, R, buffer = self.lengths[layer], keys.shape[0], self.buffers[layer]
        if n == buffer.shape[3]:
            buffer = self.buffers[layer] = self._grown(buffer[:, :R])
        buffer[0, :R, :, n:n + 1], buffer[1, :R, :, n:n + 1] = keys, values
        self.lengths[layer] = n + 1
        return buffer[0, :R, :, :n + 1], buffer[1, :R, :, :n + 1]

    def batch_select_indices(self, keep) -> None:
        """Row i is now what row keep[i] was. Only rows that change their place are copied."""
        moved = (keep != torch.arange(len(keep), device=keep.device)).nonzero()[:, 0]
        for buffer, n in zip(self.buffers, self.lengths):
            buffer[:, moved, :, :n] = buffer[:, keep[moved], :, :n]

    def get_seq_length(self, layer: int = 0) -> int:
        return self.lengths[layer]

    get_query_offset = get_seq_length

    def get_mask_sizes(self, query_length: int, layer: int) -> tuple[int, int]:
        return self.lengths[layer] + query_length, 0


def _joined(cache, found, K: int, R: int):
    """The cache that a prefill `found`, each row K times, behind the R rows that run on `cache`.

    One of another kind than the usual is used as it is; then no rows run.
    """
    layers = getattr(found, "layers", [])
    if layers and all(type(layer).__name__ == "DynamicLayer" for layer in layers):
        cache = cache if R else KVCache(len(layers))
        cache.join(layers, K, R)
        return cache
    if K > 1:
        found.batch_repeat_interleave(K)
    return found


def _close_gaps(done):
    """Which row each place takes when rows that are done (R,) leave: the last ones fill the gaps.

    >>> _close_gaps(torch.tensor([False, True, False, False, True, False])).tolist()
    [0, 5, 2, 3]
    """
    left = (~done).nonzero()[:, 0]
    keep = torch.arange(len(left), device=done.device)
    keep[done[:len(left)]] = left[left >= len(left)]
    return keep


def _decode_mask(model, seen, columns: int, room: int):
    """The mask of the next `room` steps, made once: each looks at one more column of it.

    seen (R,): how many of the cache's columns, its last ones, are a row's own tokens. The result
    (R, 1, 1, columns + room) is what the attention adds up or selects by, so it goes through the
    model untouched, where a plain one is prepared anew every step. None when nothing is padded:
    then attention has its fastest kernels.
    """
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    mask = torch.arange(columns + room, device=seen.device) >= columns - seen[:, None]
    if attention not in ("sdpa", "eager"):
        return mask.long()                          # flash attention wants the plain one
    if bool(mask.all()):
        return None
    mask = mask[:, None, None]
    if attention == "sdpa":
        return mask
    return torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill(
        ~mask, torch.finfo(model.dtype).min)


# ---------------------------------------------------------------------------- positions

def rope_positions(model, batch) -> torch.Tensor:
    """(3, B, L) M-RoPE positions: the batch's own, or the model's rule for a batch without them."""
    if "position_ids" in batch:
        return batch["position_ids"]
    ids, rule, config = batch["input_ids"], model.model.get_rope_index, model.config
    kinds = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
    return rule(input_ids=ids, mm_token_type_ids=kinds, attention_mask=batch["attention_mask"],
                **{k: batch[k] for k in ("image_grid_thw", "video_grid_thw") if k in batch})[0]


def position_after(positions, mask) -> torch.Tensor:
    """(B,) where the next token stands: one behind the largest of positions (3, B, L) in use."""
    return positions.masked_fill(mask[None] == 0, -1).amax(dim=(0, 2)) + 1


def append_response(batch: dict, ids: torch.Tensor, lengths: torch.Tensor) -> dict:
    """Left-padded prompts (B, L) and right-padded responses (B, T) as one batch (B, L + T).

    The response stands in the last T columns of every row, so its logits are those of columns
    L - 1 .. L + T - 2: logit t predicts token t + 1. Pictures are passed through.

    >>> prompt = {"input_ids": torch.tensor([[0, 7, 8], [4, 5, 6]]),
    ...           "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
    ...           "position_ids": torch.tensor([[0, 0, 1], [0, 1, 2]]).expand(3, 2, 3)}
    >>> both = append_response(prompt, torch.tensor([[1, 2], [3, 0]]), torch.tensor([2, 1]))
    >>> both["input_ids"].tolist()
    [[0, 7, 8, 1, 2], [4, 5, 6, 3, 0]]
    >>> both["attention_mask"].tolist()
    [[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    >>> both["position_ids"][0].tolist()
    [[0, 0, 1, 2, 3], [0, 1, 2, 3, 4]]
    """
    T = ids.shape[1]
    steps = torch.arange(T, device=ids.device)
    mask, positions = batch["attention_mask"], batch["position_ids"]
    after = (position_after(positions, mask)[:, None] + steps).expand(3, -1, -1)    # (3, B, T)
    out = dict(batch)
    out["input_ids"] = torch.cat([batch["input_ids"], ids], dim=1)
    out["attention_mask"] = torch.cat([mask, (steps < lengths[:, None]).to(mask.dtype)], dim=1)
    out["position_ids"] = torch.cat([positions, after], dim=2)
    if "mm_token_type_ids" in out:
        kinds = out["mm_token_type_ids"]
        out["mm_token_type_ids"] = torch.cat([kinds, kinds.new_zeros(ids.shape)], dim=1)
    return out
