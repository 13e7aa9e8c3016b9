"""rollout.py - the hand-written sampling loop: the student answers its own prompts.

The idea.  On-policy distillation trains on what the student itself says. `sample` reads a batch of
left-padded prompts once (prefill), keeps the key/value cache, and then draws one token a row until
the row emits a stop id or the limit is reached. Rows that have stopped leave the batch.

    prompts (B, L), left-padded          responses (B, T), right-padded
      . . a b c d   ->                     x y z <stop>
      e f g h i j   ->                     u v . .          stopped=False if cut off by the limit

In:  the model, the keyword arguments of its forward call (input_ids, attention_mask, pictures, ...),
     the sampling settings, a seeded generator.
Out: Rollout(ids, lengths, stopped, logprobs).
`append_response` then puts prompt and response together again, for a teacher or a student to score.

The one equation.  p(token) ~ softmax(logits' / temperature), logits' = logits after the penalties and
bans, cut to the top k and the nucleus of mass p, in this order. A token is drawn by inverting the
cumulative distribution at one uniform number per row and step:  first token with cdf > u.

Use it alone: imports torch only; works with Qwen3-VL of transformers 5.4 and later.

Choices a reader may wonder about:
1) Uniform numbers are drawn for all rows of the batch, finished or not, on the CPU. So a row's tokens
   do not depend on when its neighbours stop, and one seed gives the same draws on any device.
2) Positions are computed once and passed at every step. The model would otherwise take them from
   `rope_deltas`, a hidden state that any other forward pass (say, the teacher's) overwrites.
3) Penalties look at generated tokens only, never at the prompt (vLLM's meaning of presence penalty;
   transformers' repetition penalty would include the prompt).
Left out: beam search, speculative decoding, contrastive anything.
"""
from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch

# Dimension letters: B rows, R rows still running, L prompt tokens, T response tokens, V vocabulary.

PICTURES = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


@dataclass
class Rollout:
    """Sampled responses of B rows, on the model's device.

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
        """(B, T) bool, True at response tokens. From lengths, not ids: the pad id may be a stop id."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.lengths[:, None]


@torch.no_grad()
def sample(model, batch, *, max_new_tokens: int, temperature: float = 1.0, top_p: float = 1.0,
           top_k: int = 0, presence_penalty: float = 0.0, repetition_penalty: float = 1.0,
           stop_ids, banned_ids=(), pad_id: int = 0, generator=None, uniforms=None) -> Rollout:
    """Sample a response to every prompt of `batch`; see the header for what and why.

    temperature 0 is greedy; top_k 0 and top_p 1 switch those off. presence_penalty is subtracted once
    from every id already generated; repetition_penalty divides positive and multiplies negative logits
    of them. uniforms (B, max_new_tokens) in [0, 1): the numbers to draw with, in place of the generator's;
    a caller that cuts one batch into parts hands each part its rows, and the cut changes no token.
    The model is put in eval mode and left as it was found.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
    if not (0 <= temperature < float("inf") and 0 < top_p <= 1 and top_k >= 0
            and repetition_penalty > 0):
        raise ValueError(f"temperature {temperature}, top_p {top_p}, top_k {top_k}, "
                         f"repetition_penalty {repetition_penalty}: out of range")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    if not bool(mask[:, -1].all()):
        raise ValueError("prompts must be left-padded: the last column has padding in it")
    device, B = ids.device, ids.shape[0]
    positions = rope_positions(model, batch)                                        # (3, B, L)
    next_position = positions.masked_fill(mask[None] == 0, -1).amax(dim=(0, 2)) + 1  # (B,)
    cache_name = "cache" if "cache" in inspect.signature(
        type(model).forward).parameters else "past_key_values"    # renamed in transformers 5.24
    stop = torch.tensor(sorted(stop_ids), device=device)
    banned = torch.tensor(list(banned_ids), device=device, dtype=torch.long)

    out_ids = torch.full((B, max_new_tokens), pad_id, device=device)
    out_logprobs = torch.zeros(B, max_new_tokens, device=device)
    lengths = torch.zeros(B, dtype=torch.long, device=device)
    stopped = torch.zeros(B, dtype=torch.bool, device=device)
    running = torch.arange(B, device=device)                     # rows of the batch still in play
    penalised = presence_penalty != 0 or repetition_penalty != 1
    modes = [(module, module.training) for module in model.modules()]   # a frozen part may differ
    model.eval()
    try:
        # 1) prefill: read every prompt once
        output = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True,
                       logits_to_keep=1, **{k: batch[k] for k in PICTURES if k in batch})
        for t in range(max_new_tokens):
            # 2) the distribution of the next token
            # a copy: penalties and bans are written in place, and these are the model's own
            logits = output.logits[:, -1].to(torch.float32, copy=True)              # (R, V)
            if penalised:
                _penalise(logits, out_ids[running, :t], presence_penalty, repetition_penalty)
            if len(banned):
                logits[:, banned] = float("-inf")
            # 3) draw, on every row of the batch so that finished neighbours change nothing
            uniform = None
            if temperature > 0:
                uniform = uniforms[:, t] if uniforms is not None else torch.rand(
                    B, generator=generator, dtype=torch.float64)
                uniform = uniform.to(device)[running]
            tokens, logprobs = _draw(logits, uniform, temperature, top_p, top_k)    # (R,), (R,)
            out_ids[running, t], out_logprobs[running, t] = tokens, logprobs
            lengths[running] += 1
            # 4) rows that stopped leave the batch
            done = torch.isin(tokens, stop)
            stopped[running[done]] = True
            cache = getattr(output, cache_name)
            if bool(done.any()):
                keep = (~done).nonzero()[:, 0]
                running, tokens, mask = running[keep], tokens[keep], mask[keep]
                if len(running):
                    cache.batch_select_indices(keep)
            if len(running) == 0 or t + 1 == max_new_tokens:
                break
            # 5) one forward step on the cache
            mask = torch.cat([mask, mask.new_ones(len(running), 1)], dim=1)
            position = (next_position[running] + t)[None, :, None].expand(3, -1, -1)  # (3, R, 1)
            output = model(input_ids=tokens[:, None], attention_mask=mask, position_ids=position,
                           use_cache=True, **{cache_name: cache})
    finally:
        for module, training in modes:
            module.training = training
    T = int(lengths.max())
    return Rollout(out_ids[:, :T], lengths, stopped, out_logprobs[:, :T])


def _penalise(logits, generated, presence, repetition) -> None:
    """In place. logits (R, V), generated (R, t): ids this row has produced so far."""
    if generated.shape[1] == 0:
        return
    seen = logits.gather(1, generated)
    seen = torch.where(seen > 0, seen / repetition, seen * repetition) - presence
    logits.scatter_(1, generated, seen)      # an id seen twice is written twice with the same value


def _draw(logits, uniform, temperature, top_p, top_k):
    """Tokens (R,) and their log-probs (R,). logits (R, V); uniform (R,) in [0, 1), None for greedy."""
    if temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    logits = logits / temperature
    order = None
    if top_k or top_p < 1:
        logits, order = logits.sort(dim=-1, descending=True)
        if top_k:
            logits[:, top_k:] = float("-inf")
        if top_p < 1:
            # keep a token if the mass before it is below top_p: the most likely one always stays
            probs = logits.softmax(-1)
            logits[probs.cumsum(-1) - probs >= top_p] = float("-inf")
    logprobs = logits.log_softmax(-1)
    # float64: summed over 151,936 words, float32 would be off by more than a rare token's whole mass
    cdf = logprobs.double().exp().cumsum(-1)                                        # (R, V)
    index = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True)    # (R, 1)
    logprobs = logprobs.gather(1, index)[:, 0]
    tokens = index if order is None else order.gather(1, index)
    return tokens[:, 0], logprobs


def rope_positions(model, batch) -> torch.Tensor:
    """(3, B, L) M-RoPE positions: the batch's own, or the model's rule for a batch without them."""
    if "position_ids" in batch:
        return batch["position_ids"]
    ids, rule = batch["input_ids"], model.model.get_rope_index
    kinds = (ids == model.config.image_token_id).int() + 2 * (ids == model.config.video_token_id).int()
    return rule(input_ids=ids, mm_token_type_ids=kinds, attention_mask=batch["attention_mask"],
                **{k: batch[k] for k in ("image_grid_thw", "video_grid_thw") if k in batch})[0]


def append_response(batch: dict, ids: torch.Tensor, lengths: torch.Tensor) -> dict:
    """Left-padded prompts (B, L) and right-padded responses (B, T) as one batch (B, L + T) to score.

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
    last = positions.masked_fill(mask[None] == 0, -1).amax(dim=(0, 2))              # (B,)
    after = (last[:, None] + 1 + steps)[None].expand(3, -1, -1)                     # (3, B, T)
    out = dict(batch)
    out["input_ids"] = torch.cat([batch["input_ids"], ids], dim=1)
    out["attention_mask"] = torch.cat([mask, (steps < lengths[:, None]).to(mask.dtype)], dim=1)
    out["position_ids"] = torch.cat([positions, after], dim=2)
    if "mm_token_type_ids" in out:
        kinds = out["mm_token_type_ids"]
        out["mm_token_type_ids"] = torch.cat([kinds, kinds.new_zeros(ids.shape)], dim=1)
    return out
