"""rollout.py: against model.generate, against a loop without cache, and against fakes whose answer
is known in closed form.

The real class is used with loud random weights (`wild`), so nothing here depends on what the
shipped checkpoint knows, and greedy text wanders instead of repeating itself.
"""
import copy
import doctest
import functools
import importlib.util
import math
from types import SimpleNamespace

import pytest
import torch

import conftest
import cue_recovery
import rollout
from conftest import ROOT, append_response
from rollout import PlainDecoder, Rollout, sample
from scale import decoder
from scale.decoder import FastDecoder
from scale.graphs import GraphDecoder

# ---------------------------------------------------------------------------- the real class


@pytest.fixture(scope="module")
def wild(loaded):
    """The tiny model with random weights and a head of its own."""
    model, generator = copy.deepcopy(loaded[0]), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
        head = 0.3 * torch.randn(model.lm_head.weight.shape, generator=generator)
    model.lm_head.weight = torch.nn.Parameter(head)
    return model


@pytest.fixture
def batch(loaded, ragged):
    return loaded[1].batch(ragged)


@pytest.fixture(name="sample", params=[PlainDecoder, FastDecoder, GraphDecoder])
def sample_with(request):
    """A test that takes `sample` as an argument runs with every decoder."""
    return functools.partial(rollout.sample, decoder=request.param)


def textbook(model, batch, steps, seed=None):
    """(B, steps) tokens by a whole forward each step: no cache, and no row ever leaves the batch.

    Greedy without a seed; else the first token whose cumulative probability is above u.
    """
    B = batch["input_ids"].shape[0]
    ids = torch.zeros(B, 0, dtype=torch.long)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for t in range(steps):
        with torch.no_grad():
            logits = model(**append_response(batch, ids, torch.full((B,), t))).logits[:, -1]
        if seed is None:
            token = logits.argmax(-1)
        else:
            u = torch.rand(B, generator=generator, dtype=torch.float64)
            token = (logits.double().softmax(-1).cumsum(-1) <= u[:, None]).sum(-1)
        ids = torch.cat([ids, token[:, None]], dim=1)
    return ids


def cut(ids, stop_ids):
    """Each row up to and with its first stop id."""
    rows = []
    for row in ids.tolist():
        first = next((t for t, token in enumerate(row) if token in stop_ids), len(row) - 1)
        rows.append(row[:first + 1])
    return rows


def responses(out: Rollout):
    return [row[:n] for row, n in zip(out.ids.tolist(), out.lengths.tolist())]


def test_greedy_equals_generate(sample, wild, batch):
    """Token for token, with three stop ids that end three rows at different steps."""
    free = textbook(wild, batch, 16)
    stop = {int(free[0, 3]), int(free[2, 8]), int(free[3, 12])}
    ours = sample(wild, batch, max_new_tokens=16, temperature=0, stop_ids=stop, pad_id=7)
    stock = {k: v for k, v in batch.items() if k != "position_ids"}      # generate makes its own
    theirs = wild.generate(**stock, max_new_tokens=16, do_sample=False, eos_token_id=list(stop),
                           pad_token_id=7)[:, batch["input_ids"].shape[1]:]
    assert ours.ids.tolist() == theirs.tolist()
    assert len(set(ours.lengths.tolist())) > 1, "rows should stop at different steps"


def test_cached_equals_uncached(sample, wild, batch):
    out = sample(wild, batch, max_new_tokens=12, temperature=0, stop_ids=())
    assert out.ids.tolist() == textbook(wild, batch, 12).tolist()
    assert not out.stopped.any() and out.mask.all()


def test_padded_equals_alone(sample, loaded, wild, ragged, batch):
    out = sample(wild, batch, max_new_tokens=12, temperature=0, stop_ids=())
    for row, prompt in enumerate(ragged):
        alone = sample(wild, loaded[1].batch([prompt]), max_new_tokens=12, temperature=0,
                       stop_ids=())
        assert alone.ids[0].tolist() == out.ids[row].tolist()
        torch.testing.assert_close(alone.logprobs[0], out.logprobs[row], atol=1e-4, rtol=0)


def test_rows_that_leave_change_no_token(sample, wild, batch):
    """Sampled, against the loop that keeps all rows to the end, with the same uniform numbers."""
    free = textbook(wild, batch, 14, seed=3)
    stop = {int(free[0, 2]), int(free[2, 6])}
    sizes = []
    hook = wild.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True)
    out = sample(wild, batch, max_new_tokens=14, stop_ids=stop,
                 generator=torch.Generator().manual_seed(3))
    hook.remove()
    assert responses(out) == cut(free, stop)
    assert sizes[0] == 4 and sizes[-1] < 4, "stopped rows should have left the batch"
    if sample.keywords["decoder"] is GraphDecoder:      # they stay as idle rows until they are half
        return
    assert sizes == [4] + [int((out.lengths > t).sum()) - int(((out.lengths == t + 1)
                           & out.stopped).sum()) for t in range(len(sizes) - 1)]


def test_samples_of_a_prompt_share_its_prefill(sample, loaded, wild, ragged, batch, monkeypatch):
    """Token for token what three rows of each prompt give, though every prompt is read once."""
    monkeypatch.setattr(decoder, "ROOM", 3)
    again = loaded[1].batch([prompt for prompt in ragged for _ in range(3)])
    uniforms = torch.rand(12, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    free = sample(wild, again, max_new_tokens=10, stop_ids=(), uniforms=uniforms)
    settings = dict(max_new_tokens=10, uniforms=uniforms,
                    stop_ids={int(free.ids[1, 2]), int(free.ids[5, 4]), int(free.ids[10, 6])})
    apart, sizes = sample(wild, again, **settings), []
    hook = wild.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True)
    shared = sample(wild, batch, samples_per_prompt=3, **settings)
    hook.remove()
    assert sizes[:2] == [4, 12] and sizes[-1] < 12
    assert shared.ids.tolist() == apart.ids.tolist()
    assert shared.lengths.tolist() == apart.lengths.tolist()
    assert shared.stopped.tolist() == apart.stopped.tolist() and shared.stopped.any()
    torch.testing.assert_close(shared.logprobs, apart.logprobs, atol=1e-4, rtol=0)
    assert len({tuple(row) for row in free.ids[:3].tolist()}) == 3, "samples of a prompt differ"


def test_the_plain_decoder_lets_the_rows_finish_first():
    """It cannot add rows to those that run: as many as at first are read when none does."""
    asked, waiting = [], [one_token_prompts(3, 3), one_token_prompts(2)]
    out = sample(Fake(countdown), one_token_prompts(2, 5), max_new_tokens=9, stop_ids={1},
                 more=lambda n: asked.append(n) or (waiting.pop(0) if waiting else None))
    assert out.lengths.tolist() == [2, 5, 3, 3, 2] and set(asked) == {2}


def test_recovery_module_reads_the_prompt_only(sample, wild, batch):
    """Its hooks go by the cache: with either it is on in the prefill, and off in every step. The
    uncached loop has it on in every forward, where the prompt's sink is the same."""
    model = copy.deepcopy(wild)
    cue = cue_recovery.attach(model, every=2)
    for block in cue.blocks.values():
        torch.nn.init.normal_(block.output.weight, std=0.3)
    on = []
    model.lm_head.register_forward_hook(
        lambda head, args, output: on.append(cue.prefill is not None))
    expected = textbook(model, batch, 8, seed=1)
    on.clear()
    out = sample(model, batch, max_new_tokens=8, stop_ids=(),
                 generator=torch.Generator().manual_seed(1))
    assert on == [True] + [False] * 7
    assert out.ids.tolist() == expected.tolist() != textbook(wild, batch, 8, seed=1).tolist()


def test_results_can_be_trained_on(sample, wild, batch):
    """Decoding runs in inference mode, whose tensors autograd refuses to save."""
    out = sample(wild, batch, max_new_tokens=3, stop_ids=(), generator=torch.Generator())
    table, scale = torch.ones(512, 2, requires_grad=True), torch.ones(1, requires_grad=True)
    (torch.nn.functional.embedding(out.ids, table).sum() + (scale * out.logprobs).sum()).backward()
    assert float(table.grad.sum()) == 2 * out.ids.numel()
    assert float(scale.grad) == pytest.approx(float(out.logprobs.sum()))


def test_a_teacher_forward_between_steps_changes_nothing(sample, loaded, wild, ragged, batch):
    """PITFALLS 13. The model keeps `rope_deltas` of its last prefill and adds them to positions it
    has to guess. A teacher's forward between two decoding steps overwrote them
    (transformers#44873)."""
    expected = sample(wild, batch, max_new_tokens=10, temperature=0, stop_ids=())
    other, busy = loaded[1].batch(ragged[1:2]), []

    def teacher_forward(module, args, output):
        if not busy:
            busy.append(True)
            module(**other)
            busy.clear()

    hook = wild.register_forward_hook(teacher_forward)
    out = sample(wild, batch, max_new_tokens=10, temperature=0, stop_ids=())
    hook.remove()
    assert out.ids.tolist() == expected.ids.tolist()


def test_batch_of_a_stock_processor(sample, wild, batch):
    """Without position_ids and mm_token_type_ids the model's own rule gives the same positions."""
    stock = {k: v for k, v in batch.items() if k not in ("position_ids", "mm_token_type_ids")}
    out = sample(wild, stock, max_new_tokens=10, temperature=0, stop_ids=())
    assert out.ids.tolist() == textbook(wild, batch, 10).tolist()


def test_works_in_training_with_gradient_checkpointing(sample, wild, batch):
    """Checkpointing switches the cache off in train mode: on some versions generate then returned
    wrong tokens without a word (QWEN3VL section 0)."""
    model = copy.deepcopy(wild).train()
    model.gradient_checkpointing_enable()
    modes = []
    model.lm_head.register_forward_hook(lambda head, args, output: modes.append(head.training))
    out = sample(model, batch, max_new_tokens=10, temperature=0, stop_ids=())
    assert len(modes) == 10 and not any(modes), "no dropout while sampling"
    assert out.ids.tolist() == textbook(wild, batch, 10).tolist()
    assert model.training and model.model.language_model.gradient_checkpointing
    assert not out.logprobs.requires_grad


def test_leaves_every_mode_as_found(sample, wild, batch):
    """Also of a part that is in eval mode inside a model in training, such as a frozen tower."""
    model = copy.deepcopy(wild).train()
    model.model.visual.eval()
    before = {name: module.training for name, module in model.named_modules()}
    sample(model, batch, max_new_tokens=2, temperature=0, stop_ids=())
    assert {name: module.training for name, module in model.named_modules()} == before
    with pytest.raises(IndexError):
        sample(model, batch, max_new_tokens=2, temperature=0, stop_ids=(), banned_ids=[10**6])
    assert {name: module.training for name, module in model.named_modules()} == before


def test_kinds_of_tokens_grow_with_the_ids(loaded, batch):
    """PITFALLS 13. mm_token_type_ids was padded on the other side than the ids (trl#5785). A
    picture's tokens stay marked where they stand, and no token of a response is one."""
    ids, lengths = torch.full((4, 3), loaded[1].image_id), torch.tensor([3, 1, 2, 3])
    whole = append_response(batch, ids, lengths)
    kinds, L = whole["mm_token_type_ids"], batch["input_ids"].shape[1]
    assert kinds.shape == whole["input_ids"].shape and not kinds[:, L:].any()
    assert torch.equal(kinds[:, :L].bool(), batch["input_ids"] == loaded[1].image_id)


def scored(model, batch, out):
    """(B, T) log-probs of the response by one teacher-forced forward."""
    T = out.ids.shape[1]
    with torch.no_grad():
        logits = model(**append_response(batch, out.ids, out.lengths)).logits[:, -T - 1:-1]
    return logits.log_softmax(-1).gather(2, out.ids[..., None])[..., 0] * out.mask


def test_logprobs_are_those_of_scoring(sample, wild, batch):
    """PITFALLS 7. Logit t predicts token t + 1; read one column late, training runs "fine" and
    learns nothing (AReaL#1729). At temperature 1 sampling and scoring must name the same
    numbers."""
    free = textbook(wild, batch, 9, seed=5)
    out = sample(wild, batch, max_new_tokens=9, stop_ids={int(free[1, 3])},
                 generator=torch.Generator().manual_seed(5))
    assert out.lengths[1] < out.ids.shape[1], "one row should be shorter, to have padding"
    torch.testing.assert_close(scored(wild, batch, out), out.logprobs, atol=1e-4, rtol=0)


def test_scoring_a_batch_equals_scoring_one_row_alone(loaded, wild, ragged, batch):
    """PITFALLS 7, the other half: prompt and response of one row as one plain sequence,
    unpadded."""
    out = sample(wild, batch, max_new_tokens=6, stop_ids=(), generator=torch.Generator())
    for row, prompt in enumerate(ragged):
        n, whole = len(prompt.ids), copy.copy(prompt)
        whole.ids = prompt.ids + out.ids[row].tolist()
        with torch.no_grad():
            logprobs = wild(**loaded[1].batch([whole])).logits[0].log_softmax(-1)
        alone = torch.stack([logprobs[n - 1 + t, token] for t, token in enumerate(out.ids[row])])
        torch.testing.assert_close(scored(wild, batch, out)[row], alone, atol=1e-4, rtol=0)


def test_image_pad_is_never_sampled(loaded, wild, batch):
    """PITFALLS 6. A policy sampled <|image_pad|>, and scoring died of "image features and image
    tokens do not match" (verl#7038, EasyR1#110). Here the model wants hardly anything else."""
    processor = loaded[1]
    hook = wild.lm_head.register_forward_hook(
        lambda module, args, logits: logits.index_fill(-1, torch.tensor(processor.image_id), 1e4))
    settings = dict(max_new_tokens=5, stop_ids=(), generator=torch.Generator())
    bad = sample(wild, batch, **settings)
    out = sample(wild, batch, banned_ids=processor.banned_ids, **settings)
    hook.remove()
    assert (bad.ids == processor.image_id).all(), "without the ban the story repeats itself"
    with pytest.raises(ValueError, match="do not match"):
        scored(wild, batch, bad)
    assert not torch.isin(out.ids, torch.tensor(processor.banned_ids)).any()
    assert scored(wild, batch, out).isfinite().all() and out.logprobs.isfinite().all()


# ---------------------------------------------------------------------------- fakes

class FakeCache:
    """Remembers ids (R, t), prompt included, as a key/value cache does."""

    def __init__(self):
        self.ids = torch.zeros(0)

    def batch_select_indices(self, keep):
        self.ids = self.ids[keep]


class Fake(torch.nn.Module):
    """A model with logits (R, V) = rule(ids (R, t)); 'prompt id' below is its first column."""

    def __init__(self, rule):
        super().__init__()
        self.rule = rule

    def forward(self, input_ids, cache=None, **rest):
        cache = cache or FakeCache()
        cache.ids = torch.cat([cache.ids.long().reshape(len(input_ids), -1), input_ids], dim=1)
        return SimpleNamespace(logits=self.rule(cache.ids)[:, None], cache=cache)


def constant(logits):
    """The same logits whatever was said; one buffer for all calls, as an engine might have."""
    buffer = {}
    return Fake(lambda ids: buffer.setdefault(len(ids), torch.tensor(logits).repeat(len(ids), 1)))


def one_token_prompts(*ids):
    ids = torch.tensor(ids)[:, None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids),
            "position_ids": torch.zeros(3, *ids.shape, dtype=torch.long)}


def countdown(ids):
    """Says 9, and the stop id 1 at last, as many tokens in all as the prompt id tells."""
    over = ids.shape[1] >= ids[:, 0]
    return torch.nn.functional.one_hot(torch.where(over, 1, 9), 12) * 100.0


def test_stop_token_is_part_of_the_response():
    out = sample(Fake(countdown), one_token_prompts(2, 9, 4), max_new_tokens=5, stop_ids={1, 3})
    assert out.ids.tolist() == [[9, 1, 0, 0, 0], [9, 9, 9, 9, 9], [9, 9, 9, 1, 0]]
    assert out.lengths.tolist() == [2, 5, 4]
    assert out.stopped.tolist() == [True, False, True], "the second was cut off"
    assert (out.logprobs == 0).all()
    assert out.mask.tolist() == [[t < n for t in range(5)] for n in (2, 5, 4)]


def test_response_is_as_wide_as_the_longest_row():
    out = sample(Fake(countdown), one_token_prompts(2, 3), max_new_tokens=50, stop_ids={1})
    assert out.ids.tolist() == [[9, 1, 0], [9, 9, 1]]
    assert out.logprobs.shape == out.mask.shape == (2, 3)


def test_stopping_at_the_last_allowed_token_is_not_a_cut():
    out = sample(Fake(countdown), one_token_prompts(3, 4), max_new_tokens=3, stop_ids={1})
    assert out.lengths.tolist() == [3, 3] and out.stopped.tolist() == [True, False]


def test_stop_token_is_scored_when_the_pad_id_is_a_stop_id():
    """PITFALLS 8. With pad == eos, a mask made of ids hides the stop token, and the model never
    learns to stop (trl#6357). Masks come from lengths."""
    batch = one_token_prompts(2, 4)
    out = sample(Fake(countdown), batch, max_new_tokens=9, stop_ids={1}, pad_id=1)
    assert out.ids.tolist() == [[9, 1, 1, 1], [9, 9, 9, 1]]
    assert out.mask.tolist() == [[True, True, False, False], [True] * 4]
    whole = append_response(batch, out.ids, out.lengths)
    assert whole["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]


def test_cache_under_its_older_name():
    """transformers renamed the cache argument in 5.24, and older models swallow the new name
    without a word: every step would then see one token of context (QWEN3VL section 0)."""
    class Older(Fake):
        def forward(self, input_ids, past_key_values=None, **rest):
            out = super().forward(input_ids, past_key_values)
            return SimpleNamespace(logits=out.logits, past_key_values=out.cache)
    out = sample(Older(countdown), one_token_prompts(3, 4), max_new_tokens=9, stop_ids={1})
    assert responses(out) == [[9, 9, 1], [9, 9, 9, 1]]


def test_any_of_several_stop_ids_stops():
    """PITFALLS 3. Stop ids are a set; two models may disagree about it (ms-swift#9526)."""
    def says_next(ids):
        return torch.nn.functional.one_hot(ids[:, -1] + 1, 12) * 100.0
    out = sample(Fake(says_next), one_token_prompts(2, 5), max_new_tokens=9, stop_ids={4, 8})
    assert responses(out) == [[3, 4], [6, 7, 8]]


P = (0.10, 0.40, 0.05, 0.30, 0.15)       # of five tokens, out of order
ROOTS = tuple(p**0.5 for p in P)         # at temperature 2


@pytest.mark.parametrize("settings, weights", [
    ({}, P),
    ({"temperature": 2.0}, ROOTS),
    ({"top_k": 2}, (0, 0.40, 0, 0.30, 0)),
    ({"top_k": 9}, P),
    ({"top_p": 0.6}, (0, 0.40, 0, 0.30, 0)),                 # .40 is not yet .6, .70 is
    ({"top_p": 1e-9}, (0, 1, 0, 0, 0)),                      # the most likely token always stays
    ({"top_p": 0.8}, (0, 0.40, 0, 0.30, 0.15)),
    # at temperature 2 the three largest are .30, .26, .18: temperature goes before the nucleus
    ({"temperature": 2.0, "top_p": 0.6}, (0, ROOTS[1], 0, ROOTS[3], ROOTS[4])),
    # of the two kept by top-k the first has .57 of the mass: top-k goes before the nucleus
    ({"top_k": 2, "top_p": 0.5}, (0, 1, 0, 0, 0)),
    # with token 1 banned, .30 and .15 have 3/4 of what is left: bans go before the nucleus
    ({"top_p": 0.6, "banned_ids": [1]}, (0, 0, 0, 0.30, 0.15)),
    ({"banned_ids": [1, 3]}, (0.10, 0, 0.05, 0, 0.15)),
], ids=str)
def test_distribution(settings, weights):
    """20,000 draws: frequencies within a chi-square bound, and exact log-probs."""
    expected = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    n, model = 20_000, constant([3 + math.log(p) for p in P])
    out = sample(model, one_token_prompts(*[0] * n), max_new_tokens=1, stop_ids=(),
                 generator=torch.Generator().manual_seed(1), **settings)
    drawn = torch.bincount(out.ids[:, 0], minlength=5)
    possible = expected > 0
    assert drawn[~possible].sum() == 0
    chi_square = ((drawn - n * expected)[possible] ** 2 / (n * expected)[possible]).sum()
    assert chi_square < 18.5             # 0.1 % of fair draws with 4 degrees of freedom are above
    torch.testing.assert_close(out.logprobs[:, 0].double(), expected.log()[out.ids[:, 0]],
                               atol=1e-5, rtol=0)


def test_inverting_the_distribution_in_pages():
    """Against a float64 sum over a real vocabulary, and where rounding could run past the end: the
    last possible tokens stand in the middle of a page, with nothing but banned ones behind."""
    probs = (4 * torch.randn(40, 151_936)).softmax(-1)
    probs[::2, 100_000:] = 0
    uniform = torch.rand(40, dtype=torch.float64)
    uniform[:8], uniform[8:16] = 0, 1 - 2**-53
    got = rollout._invert_cdf(probs, uniform)
    cdf = probs.double().cumsum(-1)
    gap = (cdf.gather(1, got) - (uniform * cdf[:, -1])[:, None])[:, 0]
    size = probs.gather(1, got)[:, 0].double()
    assert (size > 0).all(), "a token of probability 0"
    # inside the token's own stretch of the line, up to the rounding of float32 sums
    assert (gap > -1e-7).all() and (gap - size < 1e-7).all()
    ends = torch.tensor([1 - 2**-53, 0], dtype=torch.float64)
    assert rollout._invert_cdf(torch.eye(5)[[0, 4]], ends).tolist() == [[0], [4]]


def test_greedy_logprobs_are_of_the_untempered_softmax():
    """After bans, without temperature and cuts: what a teacher-forced pass would say."""
    out = sample(constant([2.0, 1.0, 0.0]), one_token_prompts(0), max_new_tokens=1, temperature=0,
                 top_k=1, top_p=0.1, banned_ids=[0], stop_ids=())
    assert out.ids.tolist() == [[1]]
    assert out.logprobs[0, 0].item() == pytest.approx(-math.log1p(math.exp(-1)))


def penalised(logits, said, presence, repetition):
    """By hand: the logits of a row that has said these tokens."""
    logits = list(logits)
    for token in set(said):
        seen = logits[token]
        logits[token] = (seen / repetition if seen > 0 else seen * repetition) - presence
    return torch.tensor(logits)


@pytest.mark.parametrize("presence, repetition", [(0.8, 1.0), (0.0, 1.7), (0.5, 1.3), (-0.4, 1.0)])
def test_penalties_of_generated_tokens(presence, repetition):
    """Exact at every step of 64 rows, of which some leave early; once for a token said twice."""
    logits, rows = [1.5, 1.0, -0.5, -1.0], 64
    out = sample(constant(logits), one_token_prompts(*[0, 1, 2, 3] * (rows // 4)),
                 presence_penalty=presence, repetition_penalty=repetition, max_new_tokens=6,
                 stop_ids={3}, generator=torch.Generator().manual_seed(2))
    for row, said in enumerate(responses(out)):
        for t, token in enumerate(said):
            expected = penalised(logits, said[:t], presence, repetition).log_softmax(0)[token]
            assert out.logprobs[row, t].item() == pytest.approx(expected.item(), abs=1e-5)
    assert any(len(set(said)) < len(said) for said in responses(out)), "no row repeated itself"
    assert 1 < len(set(out.lengths.tolist())), "no row left early"


def test_presence_penalty_does_not_look_at_the_prompt():
    """Greedy: 0 is likeliest, once said it falls to 2.2 and no further."""
    out = sample(constant([3.0, 2.5, 2.0]), one_token_prompts(0, 1, 2), max_new_tokens=5,
                 temperature=0, presence_penalty=0.8, stop_ids=())
    assert out.ids.tolist() == [[0, 1, 0, 0, 0]] * 3


def test_writes_into_nothing_that_belongs_to_the_model():
    """PITFALLS 11. Bans and penalties were once written into a view of the model's own logits: an
    engine that reuses its buffer would be penalised again at every step."""
    model = constant([3.0, 2.5, 2.0])
    sample(model, one_token_prompts(0), max_new_tokens=4, temperature=0, presence_penalty=0.8,
           banned_ids=[2], stop_ids=())
    assert model.rule(torch.zeros(1, 1)).tolist() == [[3.0, 2.5, 2.0]]


def test_rows_draw_different_tokens():
    """PITFALLS 25. All rows shared the first sampled token (nanochat#38). Sixteen samples from
    flat logits over 1,000 tokens differ, at the first step and from step to step."""
    out = sample(constant([0.0] * 1000), one_token_prompts(*[0] * 16), max_new_tokens=2,
                 stop_ids=(), generator=torch.Generator().manual_seed(4))
    assert len(set(out.ids[:, 0].tolist())) > 12
    assert out.ids[:, 0].tolist() != out.ids[:, 1].tolist()


def test_seed_decides_and_the_global_generator_is_left_alone():
    def draw(seed):
        return sample(constant([0.0] * 1000), one_token_prompts(0, 0), max_new_tokens=8,
                      stop_ids=(), generator=torch.Generator().manual_seed(seed)).ids.tolist()
    before = torch.get_rng_state()
    assert draw(1) == draw(1) != draw(2)
    assert torch.equal(torch.get_rng_state(), before)


def test_generator_advances_by_one_number_for_each_row_and_step():
    """Of all rows, finished or not; none when greedy."""
    used, fresh = torch.Generator().manual_seed(6), torch.Generator().manual_seed(6)
    settings = dict(max_new_tokens=9, stop_ids={1}, generator=used)
    out = sample(Fake(countdown), one_token_prompts(2, 4, 3), **settings)
    for _ in range(out.ids.shape[1]):
        torch.rand(3, generator=fresh, dtype=torch.float64)
    assert torch.equal(used.get_state(), fresh.get_state())
    sample(Fake(countdown), one_token_prompts(2, 4, 3), temperature=0, **settings)
    assert torch.equal(used.get_state(), fresh.get_state())


def test_a_neighbour_that_stops_early_changes_no_draw():
    """The neighbours' prompt id says when they stop; the first and last row draw from flat
    logits."""
    def rule(ids):
        flat = torch.zeros(len(ids), 1000).masked_fill(torch.arange(1000) == 1, -1e9)
        return torch.where(ids[:, :1] > 0, countdown(ids).repeat(1, 84)[:, :1000], flat)

    def ends(*neighbours):
        out = sample(Fake(rule), one_token_prompts(0, *neighbours, 0), max_new_tokens=12,
                     stop_ids={1}, generator=torch.Generator().manual_seed(7))
        return out.ids[[0, -1]].tolist()
    assert ends(1, 2) == ends(9, 3) == ends(20, 20)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("cuts", [{}, {"top_k": 2}, {"top_p": 0.9}], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_named(temperature, cuts, bad):
    """A learning rate that was too high makes weights NaN. Sampling then died of an IndexError, and
    greedy evaluation drew token 0 for ever and reported 0 %. Here the second of three rows breaks
    at its third token, when the first has left."""
    def rule(ids):
        broken = (ids[:, :1] == 8) & (ids.shape[1] == 3)
        return torch.where(broken & (torch.arange(12) == 7), bad, countdown(ids))
    with pytest.raises(FloatingPointError, match="step 3: .* row 1, token 3 .* learning rate"):
        sample(Fake(rule), one_token_prompts(2, 8, 9), max_new_tokens=6, stop_ids={1},
               temperature=temperature, generator=torch.Generator(), **cuts)


def test_right_padded_prompts_are_refused(loaded, wild, ragged):
    """PITFALLS 10. With right padding the first token of a short row is drawn from the logits of a
    padding token (OPSD snapshot); a VLM lost .338 -> .302 by it (nanoVLM#116)."""
    with pytest.raises(ValueError, match="left-padded"):
        sample(wild, loaded[1].batch(ragged, side="right"), max_new_tokens=2, stop_ids=())


@pytest.mark.parametrize("setting", [
    {"max_new_tokens": 0}, {"temperature": -0.1}, {"temperature": float("nan")},
    {"temperature": float("inf")}, {"top_p": 0.0}, {"top_p": 1.01}, {"top_k": -1},
    {"repetition_penalty": 0.0}, {"samples_per_prompt": 0}], ids=str)
def test_bad_settings_are_refused(setting):
    (name, value), = setting.items()
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        sample(constant([0.0, 0.0]), one_token_prompts(0),
               **{"max_new_tokens": 1, "stop_ids": (), **setting})


def test_drawings_in_the_docstrings():
    result = doctest.testmod(conftest)
    assert result.attempted > 1 and result.failed == 0


def test_the_benchmark_still_measures(loaded):
    """tests/speed/rollout.py by its smallest case: all ways must stop where it meant them to."""
    path = ROOT / "tests" / "speed" / "rollout.py"
    spec = importlib.util.spec_from_file_location("rollout_benchmark", path)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    bench.DEVICE = "cpu"
    case = ("3 x 2 samples", "tiny", "sdpa", 3, 60, 8, "ragged", 2, 1)
    result = bench.run_case(case, *loaded)
    assert bench.answer_lengths("ragged", 3, 8) == [1, 4, 8]
    assert result["rows"] == 6 and result["max_length"] == 8 and result["mean_length"] == 4.3
    assert result["generate_wall"] > 0 and result["plain_wall"] > 0
