"""rollout.py - the hand-written sampling loop: the student answers its own prompts.

The idea.  On-policy distillation trains on what the student itself says. `sample` reads left-padded
prompts once (prefill), then draws a token per row per step until the row emits a stop id or reaches
the limit. It then leaves the batch, and a prompt that waits may take its place. Several samples of
one prompt share its prefill.

    prompts (B, L), left-padded          responses (B, T), right-padded
      . . a b c d   ->                     x y z <stop>
      e f g h i j   ->                     u v . .          stopped=False if cut off by the limit

In:  the model, the keyword arguments of its forward call, sampling settings, a seeded generator.
Out: Rollout(ids, lengths, stopped, logprobs).

The one equation.  p(token) ~ softmax(logits' / temperature), cut to its top k, then to its nucleus
of mass p; logits' = logits after penalties and bans. A token is drawn by inverting the cumulative
distribution at one uniform number per row and step:  first token with cdf > u.

Two decoders.  What the loop needs of a model is three methods (read prompts, one step, keep these
rows) and one flag, joins. PlainDecoder has them on the model's own cache, so this file works alone
(torch only; Qwen3-VL of transformers 5.4 and later). The one in scale/decoder.py is faster and
draws the same tokens: sample(model, batch, ..., decoder=FastDecoder).

Choices a reader may wonder about:
1) Uniform numbers are drawn for all rows of the batch, finished or not, on the CPU. So a row's
   tokens do not depend on when its neighbours stop, and a seed gives the same draws anywhere.
   With more=, or prompts cut into other batches, that holds only for numbers given as `uniforms`.
2) Positions are computed once and passed at every step. The model would otherwise take them from
   `rope_deltas`, a hidden state that any other forward pass (say, the teacher's) overwrites.
3) Penalties look at generated tokens only, never at the prompt (as vLLM's presence penalty does).
4) Steps run in inference mode, which is cheaper; the prefill does not, so that hooks and sharded
   models keep ordinary tensors of it. A step calls the whole model, so that they see it.
Left out: beam search, speculative decoding, contrastive anything.
"""
from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

# Dimension letters: B prompts, K samples of each, R rows still running (of B K), L prompt tokens,
# T response tokens, V vocabulary.

JOIN = 8         # waiting prompts are read when 1 / JOIN of the places is free
PICTURES = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


@dataclass
class Rollout:
    """Sampled responses, on the model's device. Of K samples a prompt, B K rows: row b K + k is
    sample k of prompt b.

    ids       (B K, T) int64, right-padded with the pad id; T is the longest response
    lengths   (B K,) int64, scored tokens a row, the stop token included
    stopped   (B K,) bool, False where the row was cut off by max_new_tokens
    logprobs  (B K, T) float32, log-probability of each token under what it was drawn from
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


class PlainDecoder:
    """What the loop needs of a model, on the cache that its class makes."""
    joins = False              # may read() add rows while others are running?

    def __init__(self, model):
        self.model, self.cache = model, None
        self.cache_name = "cache" if "cache" in inspect.signature(
            type(model).forward).parameters else "past_key_values"    # renamed in transformers 5.24

    def read(self, batch, K: int):
        """Prefill B prompts, make K rows of each. Returns (B K, V): logits of the first tokens."""
        ids, mask, positions = map(batch.get, ("input_ids", "attention_mask", "position_ids"))
        if not bool(mask[:, -1].all()) or bool((mask.diff(dim=1) < 0).any()):
            raise ValueError("prompts must be left-padded: there is padding behind a token")
        if positions is None:                                      # (3, B, L), by the model's rule
            config = self.model.config
            kinds = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
            positions, _ = self.model.model.get_rope_index(
                input_ids=ids, mm_token_type_ids=kinds, attention_mask=mask,
                **{k: batch[k] for k in ("image_grid_thw", "video_grid_thw") if k in batch})
        self.cache = None                                          # frees the last prompts' first
        output = self.model(input_ids=ids, attention_mask=mask, use_cache=True,
                            position_ids=positions, logits_to_keep=1,
                            **{k: batch[k] for k in PICTURES if k in batch})
        self.cache = getattr(output, self.cache_name)
        if K > 1:
            self.cache.batch_repeat_interleave(K)
        after = positions.masked_fill(mask == 0, -1).amax(dim=(0, 2)) + 1          # (B,)
        # of each row: logits (V,), mask (L,), next position
        logits, self.mask, self.position = (x.repeat_interleave(K, dim=0) for x in (
            output.logits[:, -1], mask, after))
        return logits

    @torch.inference_mode()
    def step(self, tokens):
        """Append one token (R,) to each row. Returns (R, V): logits of the next."""
        self.mask = pad(self.mask, (0, 1), value=1)                # (R, L + t)
        return self.forward(tokens, self.mask)

    @torch.inference_mode()
    def keep(self, rows: list[int]) -> list[int]:
        """Forget all but these rows. Returns them in the order in which they now stand."""
        index = torch.tensor(rows, dtype=torch.long).to(self.mask.device, non_blocking=True)
        self.cache.batch_select_indices(index)
        self.mask, self.position = self.mask[index], self.position[index]
        return rows

    def forward(self, tokens, mask):
        """Logits (R, V) behind one more token a row."""
        output = self.model(input_ids=tokens[:, None], attention_mask=mask, use_cache=True,
                            position_ids=self.position.expand(3, -1)[..., None],    # (3, R, 1)
                            **{self.cache_name: self.cache})
        self.position = self.position + 1
        return output.logits[:, -1]


@torch.no_grad()
def sample(model, batch, *, max_new_tokens: int, temperature: float = 1.0, top_p: float = 1.0,
           top_k: int = 0, presence_penalty: float = 0.0, repetition_penalty: float = 1.0,
           stop_ids, banned_ids=(), pad_id: int = 0, samples_per_prompt: int = 1, more=None,
           generator=None, uniforms=None, decoder=PlainDecoder) -> Rollout:
    """Responses to every prompt of `batch`. The model is put in eval mode, and back.

    temperature 0 is greedy; top_k 0 and top_p 1 switch those off.
    more(n): makes a batch of at most n waiting prompts, or None if none are left; their rows
    follow in the result. As many prompts run at a time as `batch` has.
    uniforms: (rows of the result, max_new_tokens) in [0, 1), in place of the generator's numbers.
    """
    if not (max_new_tokens > 0 and samples_per_prompt > 0 and 0 <= temperature < float("inf")
            and 0 < top_p <= 1 and top_k >= 0 and repetition_penalty > 0):
        raise ValueError(f"out of range: {max_new_tokens=}, {samples_per_prompt=}, "
                         f"{temperature=}, {top_p=}, {top_k=}, {repetition_penalty=}")
    device, K, places = batch["input_ids"].device, samples_per_prompt, len(batch["input_ids"])
    stop = torch.tensor(sorted(stop_ids), device=device)
    banned = torch.tensor(list(banned_ids), device=device, dtype=torch.long)
    uniforms = None if uniforms is None else uniforms.to(device)
    none = torch.zeros(0, max_new_tokens, device=device)
    out = Rollout(none.long(), none[:, 0].long(), none[:, 0].bool(), none)
    # of each row that runs, (R,): its place in the result, and how many tokens it has drawn
    at, drawn, step = none[:, 0].long(), none[:, 0].long(), 0
    modes = [(module, module.training) for module in model.modules()]   # a frozen part may differ
    decoder = decoder(model.eval())
    try:
        while True:
            # 1) prefill: the batch; later prompts that wait, when a few can join or none is running
            few = max(1, places // JOIN) if len(at) else places
            room = (decoder.joins or not len(at)) and len(at) <= K * (places - few)
            batch = batch or (more(few) if more and room else None)
            if batch:
                new = decoder.read(batch, K)                                        # (B K, V)
                logits, n, batch = torch.cat([logits, new]) if len(at) else new, len(new), None
                at = torch.cat([at, torch.arange(n, device=device) + len(out.ids)])
                drawn = pad(drawn, (0, n))
                out = Rollout(pad(out.ids, (0, 0, 0, n), value=pad_id), pad(out.lengths, (0, n)),
                              pad(out.stopped, (0, n)), pad(out.logprobs, (0, 0, 0, n)))
                continue
            if not len(at):
                break
            # 2) draw. A copy: penalties and bans are written in place, and these are the model's
            logits, uniform = logits.to(torch.float32, copy=True), None
            if presence_penalty != 0 or repetition_penalty != 1:
                _penalise(logits, out.ids[at, :step], drawn, presence_penalty, repetition_penalty)
            if len(banned):
                logits[:, banned] = float("-inf")
            if temperature > 0 and uniforms is not None:
                uniform = uniforms[at, drawn]
            elif temperature > 0:     # for all rows so far, so that finished ones change nothing
                uniform = torch.rand(len(out.ids), generator=generator, dtype=torch.float64)
                uniform = uniform.to(device, non_blocking=True)[at]
            tokens, logprobs = _draw(logits, uniform, temperature, top_p, top_k)    # (R,), (R,)
            # 3) record
            out.ids[at, drawn], out.logprobs[at, drawn] = tokens, logprobs
            drawn, step = drawn + 1, step + 1
            # 4) drop the rows that stopped. The host waits for the device here, and only here
            stopped = (tokens[:, None] == stop).any(dim=1)
            done, broken = torch.stack([stopped | (drawn == max_new_tokens),
                                        logprobs.isnan()]).tolist()
            if any(broken):
                row = broken.index(True)
                raise FloatingPointError(
                    f"decoding step {step}: the logits of row {at[row]}, token {drawn[row]} of its "
                    "response, are NaN or infinite: a learning rate too high, or a damaged file?")
            if any(done):
                out.stopped[at], out.lengths[at] = stopped, drawn
                order = decoder.keep([row for row, over in enumerate(done) if not over])
                order = torch.tensor(order, dtype=torch.long).to(device, non_blocking=True)
                at, drawn, tokens = at[order], drawn[order], tokens[order]
            # 5) one step
            if len(at):
                logits = decoder.step(tokens)                                       # (R, V)
    finally:
        for module, training in modes:
            module.training = training
    T = int(out.lengths.max())
    return Rollout(out.ids[:, :T], out.lengths, out.stopped, out.logprobs[:, :T])


# ---------------------------------------------------------------------------- the next token

def _penalise(logits, ids, drawn, presence, repetition) -> None:
    """In place, once for every id that a row has generated: repetition divides a positive logit
    and multiplies a negative one, presence is subtracted.

    logits (R, V); ids (R, t), of which the first drawn (R,) are the row's own.
    """
    # unused slots repeat the row's last token; writing the same value twice is harmless
    place = torch.arange(ids.shape[1], device=ids.device).minimum((drawn - 1)[:, None])
    generated = ids.gather(1, place.clamp(min=0))                                   # (R, t)
    before = logits.gather(1, generated)
    after = torch.where(before > 0, before / repetition, before * repetition) - presence
    logits.scatter_(1, generated, torch.where(drawn[:, None] > 0, after, before))


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
        probs.masked_fill_(probs.cumsum(-1) - probs >= top_p, 0)
        probs /= probs.sum(-1, keepdim=True)
    index = _invert_cdf(probs, uniform)                                             # (R, 1)
    tokens = index if order is None else order.gather(1, index)
    return tokens[:, 0], probs.gather(1, index)[:, 0].log()


def _invert_cdf(probs, uniform, block: int = 128):
    """(R, 1): the first index of probs (R, V) whose cumulative probability is above `uniform`.

    Over 151,936 words a float32 sum is off by more than a rare token's mass, and a float64 one is
    slow. So, as in a dictionary, first the page and then the word: only the pages' sums (of 128
    words each) and one page's words are added up in float64.
    """
    pages = pad(probs, (0, -probs.shape[1] % block)).unflatten(1, (-1, block))
    cdf = pages.sum(-1).cumsum(-1, dtype=torch.float64)                             # (R, V / 128)
    target = (uniform * cdf[:, -1])[:, None]                                        # (R, 1)
    # searchsorted puts NaN behind the end: the clamps keep such a row legal until it is refused
    page = torch.searchsorted(cdf, target, right=True).clamp(max=cdf.shape[1] - 1)
    before = pad(cdf, (1, 0)).gather(1, page)
    words = pages[torch.arange(len(pages), device=page.device), page[:, 0]]         # (R, 128)
    cdf = before + words.cumsum(-1, dtype=torch.float64)
    # the two ways of adding a page differ in the last digits: never run past its last possible word
    target = torch.minimum(target, torch.nextafter(cdf[:, -1:], torch.zeros_like(target)))
    word = torch.searchsorted(cdf, target, right=True)
    return (page * block + word).clamp(max=probs.shape[1] - 1)
