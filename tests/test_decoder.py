"""scale/decoder.py: it draws what the plain decoder and a loop without cache draw, whatever rows
come, leave and wait.
"""
import copy
import doctest
from types import SimpleNamespace

import pytest
import torch

from rollout import PlainDecoder, sample
from scale import decoder
from scale.decoder import FastDecoder
from test_rollout import Fake, countdown, cut, one_token_prompts, responses, scored, textbook
from test_rollout import batch, wild  # noqa: F401, fixtures

# One unit in the last place of the largest logits of `wild`, which are between 8 and 16. A row in a
# batch of another size goes through other matrix kernels, which add in another order, and which
# ones depends on the CPU: a few such units.
ULP = 8 * torch.finfo(torch.float32).eps

@pytest.mark.parametrize("attention", ["sdpa", "eager", "plain mask"])
@pytest.mark.parametrize("padded", [True, False])
def test_own_cache_and_mask_change_no_token(loaded, wild, ragged, attention, padded, monkeypatch):
    """Buffers that must grow every two tokens, also after a row has left, and each form of the
    mask: additive, boolean, left out because nothing is padded, and prepared anew by the model."""
    model = copy.deepcopy(wild)
    if attention == "plain mask":
        monkeypatch.setattr(decoder, "decode_mask", lambda model, tokens, columns, device: (
            torch.arange(columns + 2) >= columns - torch.tensor(tokens)[:, None]).long())
    else:
        model.set_attn_implementation(attention)
    monkeypatch.setattr(decoder, "ROOM", 2)
    batch = loaded[1].batch(ragged if padded else [ragged[0]] * 4)
    free = textbook(wild, batch, 12, seed=8)
    stop = {int(free[1, 2]), int(free[0, 7])}
    out = sample(model, batch, max_new_tokens=12, stop_ids=stop, decoder=FastDecoder,
                 generator=torch.Generator().manual_seed(8))
    assert responses(out) == cut(free, stop)
    assert len(set(out.lengths.tolist())) > 1, "rows should leave at different steps"
    torch.testing.assert_close(scored(wild, batch, out), out.logprobs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("K, attention", [(1, "eager"), (1, "sdpa"), (2, "sdpa")])
def test_waiting_prompts_change_no_token(loaded, wild, ragged, K, attention, monkeypatch):
    """Twelve prompts, some without a picture, through three places: each takes a place that was
    left, in a cache of other lengths, and is answered as when all are read together, with either
    decoder. The cache is never wider than its longest row, though rows come and go for longer than
    any of them runs."""
    monkeypatch.setattr(decoder, "ROOM", 3)
    model, prompts = copy.deepcopy(wild), [ragged[i] for i in (1, 0, 2, 3) * 3]
    model.set_attn_implementation(attention)
    uniforms = torch.rand(12 * K, 14, dtype=torch.float64,
                          generator=torch.Generator().manual_seed(4))
    settings = dict(max_new_tokens=14, samples_per_prompt=K, uniforms=uniforms,
                    presence_penalty=0.7, repetition_penalty=1.2)
    free = sample(model, loaded[1].batch(prompts), stop_ids=(), **settings).ids
    settings["stop_ids"] = {int(free[row, t]) for row, t in ((0, 9), (1, 5), (4, 7))}
    settings["pad_id"] = int(free.flatten().mode().values)     # no penalty for what is not said yet
    whole = sample(model, loaded[1].batch(prompts), **settings)
    read, calls = loaded[1].in_turn(prompts), []
    in_turn = sample(model, read(3), more=read, **settings)
    together = sample(model, loaded[1].batch(prompts), decoder=FastDecoder, **settings)
    model.register_forward_pre_hook(lambda module, args, kwargs: calls.append((
        *kwargs["input_ids"].shape, next((kwargs[k].get_seq_length() for k in
                                          ("cache", "past_key_values") if k in kwargs), 0))),
        with_kwargs=True)
    read = loaded[1].in_turn(prompts)
    out = sample(model, read(3), more=read, decoder=FastDecoder, **settings)
    for other in (in_turn, together, out):
        assert responses(other) == responses(whole)
        assert other.stopped.tolist() == whole.stopped.tolist()
        torch.testing.assert_close(other.logprobs, whole.logprobs, atol=16 * ULP, rtol=0)
    assert len(set(out.lengths.tolist())) > 3 and int(out.lengths.min()) < 14
    prefills = [i for i, (_, length, _) in enumerate(calls) if length > 1]
    steps = [(rows, width) for rows, length, width in calls if length == 1]
    assert max(rows for rows, _ in steps) == 3 * K
    # not one after the other: some are read amid the answers of others, which then go on
    assert any(calls[i + 1][0] > K * calls[i][0] for i in prefills if i + 1 < len(calls))
    longest = max(len(prompt.ids) for prompt in prompts)
    assert max(width for _, width in steps) < longest + 13 + 3 < longest + len(steps)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("settings", [
    dict(temperature=0), dict(), dict(top_k=5, presence_penalty=0.5), dict(top_p=0.9),
    dict(samples_per_prompt=3, repetition_penalty=1.3)], ids=str)
def test_both_decoders_draw_the_same_tokens(wild, batch, attention, settings, monkeypatch):
    monkeypatch.setattr(decoder, "ROOM", 4)
    model, K = copy.deepcopy(wild), settings.get("samples_per_prompt", 1)
    model.set_attn_implementation(attention)
    uniforms = torch.rand(4 * K, 12, dtype=torch.float64,
                          generator=torch.Generator().manual_seed(6))
    settings = dict(max_new_tokens=12, uniforms=uniforms, **settings)
    free = sample(model, batch, stop_ids=(), **settings).ids
    settings["stop_ids"] = {int(free[0, 3]), int(free[-1, 7])}
    plain, fast = (sample(model, batch, decoder=way, **settings)
                   for way in (PlainDecoder, FastDecoder))
    assert fast.ids.tolist() == plain.ids.tolist() and len(set(fast.lengths.tolist())) > 1
    assert fast.stopped.tolist() == plain.stopped.tolist()
    torch.testing.assert_close(fast.logprobs, plain.logprobs, atol=16 * ULP, rtol=0)


def test_a_cache_that_is_not_understood_is_refused_by_name():
    """A sliding window, say, whose columns are not those of the mask."""
    with pytest.raises(ValueError, match="FakeCache .* rollout.PlainDecoder"):
        sample(Fake(countdown), one_token_prompts(2), max_new_tokens=2, stop_ids=(),
               decoder=FastDecoder)


def test_drawings_in_the_docstrings():
    result = doctest.testmod(decoder, extraglobs={"SimpleNamespace": SimpleNamespace})
    assert result.attempted > 2 and result.failed == 0
