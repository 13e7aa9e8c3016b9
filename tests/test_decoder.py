"""scale/decoder.py and graphs.py: they draw what the plain decoder and a loop without cache draw,
whatever rows come, leave and wait.
"""
import copy
import doctest
import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import transformers

import cue_recovery
import model as qwen
from rollout import PlainDecoder, sample
from scale import decoder, lora
from scale.decoder import FastDecoder, without_flash
from scale.graphs import GraphDecoder
from simulated_cuda import CUDA, simulated_cuda, to_device
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from test_rollout import Fake, countdown, cut, one_token_prompts, responses, scored, textbook
from test_rollout import batch, wild  # noqa: F401, fixtures

# One unit in the last place of the largest logits of `wild`, which are between 8 and 16. A row in a
# batch of another size goes through other matrix kernels, which add in another order, and which
# ones depends on the CPU: a few such units.
ULP = 8 * torch.finfo(torch.float32).eps

@pytest.mark.parametrize("attention, way", [("plain mask", FastDecoder), *(
    (attention, way) for attention in ("sdpa", "eager") for way in (FastDecoder, GraphDecoder))])
@pytest.mark.parametrize("padded", [True, False])
def test_own_cache_and_mask_change_no_token(loaded, wild, ragged, attention, way, padded,
                                            monkeypatch):
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
    out = sample(model, batch, max_new_tokens=12, stop_ids=stop, decoder=way,
                 generator=torch.Generator().manual_seed(8))
    assert responses(out) == cut(free, stop)
    assert len(set(out.lengths.tolist())) > 1, "rows should leave at different steps"
    torch.testing.assert_close(scored(wild, batch, out), out.logprobs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("K, attention, way", [
    (1, "eager", FastDecoder), (1, "sdpa", FastDecoder), (2, "sdpa", FastDecoder),
    (1, "eager", GraphDecoder), (2, "sdpa", GraphDecoder)])
def test_waiting_prompts_change_no_token(loaded, wild, ragged, K, attention, way, monkeypatch):
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
    together = sample(model, loaded[1].batch(prompts), decoder=way, **settings)
    model.register_forward_pre_hook(lambda module, args, kwargs: calls.append((
        *kwargs["input_ids"].shape, next((kwargs[k].get_seq_length() for k in
                                          ("cache", "past_key_values") if k in kwargs), 0))),
        with_kwargs=True)
    read = loaded[1].in_turn(prompts)
    out = sample(model, read(3), more=read, decoder=way, **settings)
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
def test_all_decoders_draw_the_same_tokens(wild, batch, attention, settings, monkeypatch):
    monkeypatch.setattr(decoder, "ROOM", 4)
    model, K = copy.deepcopy(wild), settings.get("samples_per_prompt", 1)
    model.set_attn_implementation(attention)
    uniforms = torch.rand(4 * K, 12, dtype=torch.float64,
                          generator=torch.Generator().manual_seed(6))
    settings = dict(max_new_tokens=12, uniforms=uniforms, **settings)
    free = sample(model, batch, stop_ids=(), **settings).ids
    settings["stop_ids"] = {int(free[0, 3]), int(free[-1, 7])}
    plain = sample(model, batch, decoder=PlainDecoder, **settings)
    assert len(set(plain.lengths.tolist())) > 1
    for way in (FastDecoder, GraphDecoder):
        fast = sample(model, batch, decoder=way, **settings)
        assert fast.ids.tolist() == plain.ids.tolist()
        assert fast.stopped.tolist() == plain.stopped.tolist()
        torch.testing.assert_close(fast.logprobs, plain.logprobs, atol=16 * ULP, rtol=0)


# ---------------------------------------------------------------------------- recorded steps

class Recording(TorchDispatchMode):
    """A CUDA graph for a CPU: it keeps the operations with their arguments, and replay() runs them
    again on the same tensors. Python has no part in it, so a number it once gave stays."""
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        def tensors(tree):
            return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]
        for func, args, kwargs, out in self.calls:
            given = {x.untyped_storage()._cdata for x in tensors((args, kwargs))}
            for old, new in zip(tensors(out), tensors(func(*args, **kwargs))):
                if old.untyped_storage()._cdata not in given:         # no view, and not in place
                    old.copy_(new)


@pytest.fixture
def recordings(monkeypatch):
    """GraphDecoder records with Recording. A list that grows by the rows of each recording."""
    made = []

    def record(self):
        self.run()                                                # as on a GPU: to warm up
        with Recording() as recording:
            logits = self.run()
        made.append(len(logits))
        return lambda: recording.replay() or logits
    monkeypatch.setattr(GraphDecoder, "record", record)
    return made


@pytest.mark.parametrize("K", [1, 2])
def test_a_recorded_step_is_every_step(loaded, wild, ragged, recordings, K, monkeypatch):
    """Replays give the tokens of PlainDecoder with module and adapters, while rows leave, prompts
    join and buffers grow; and they are many more than the recordings."""
    monkeypatch.setattr(decoder, "ROOM", 8)
    model, prompts = copy.deepcopy(wild), [ragged[i] for i in (1, 0, 2, 3) * 2]
    for part in (cue_recovery.attach(model, every=2), lora.attach(model, rank=2)):
        for parameter in part.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    uniforms = torch.rand(8 * K, 40, dtype=torch.float64,
                          generator=torch.Generator().manual_seed(2))
    settings = dict(max_new_tokens=40, samples_per_prompt=K, uniforms=uniforms)
    free = sample(model, loaded[1].batch(prompts), stop_ids=(), **settings).ids
    settings["stop_ids"] = {int(free[row, t]) for row, t in ((0, 30), (1, 17), (5, 36))}
    plain = sample(model, loaded[1].batch(prompts), **settings)
    read, steps = loaded[1].in_turn(prompts), []
    step = GraphDecoder.step
    monkeypatch.setattr(GraphDecoder, "step", lambda self, tokens: steps.append(
        (len(tokens), len(self.given))) or step(self, tokens))
    out = sample(model, read(4), more=read, decoder=GraphDecoder, **settings)
    assert responses(out) == responses(plain)
    # a random module makes large states: FastDecoder is 4e-5 from PlainDecoder here
    torch.testing.assert_close(out.logprobs, plain.logprobs, atol=1e-3, rtol=0)
    assert len(set(out.lengths.tolist())) > 2
    assert 3 < len(recordings) < len(steps) / 3 and len(set(recordings)) > 1
    assert any(rows < recorded for rows, recorded in steps), "some rows should have been idle"
    assert all(recorded < 2 * rows for rows, recorded in steps), "never half of them"


def test_mixtures_of_experts_are_not_recorded():
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_experts=8))
    with pytest.raises(ValueError, match="mixture of experts: use FastDecoder"):
        GraphDecoder(SimpleNamespace(config=config))


# ---------------------------------------------------------------------------- on a simulated GPU

@pytest.fixture(scope="module")
def deep():
    """28 layers, as Qwen3-VL-2B has, and hardly anything in them; float32."""
    config = json.loads((qwen.TINY / "config.json").read_text())
    config.pop("model_type")
    config["text_config"] |= {"num_hidden_layers": 28, "hidden_size": 64, "intermediate_size": 128,
                              "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    config["vision_config"]["out_hidden_size"] = 64
    torch.manual_seed(0)
    return transformers.Qwen3VLForConditionalGeneration._from_config(
        transformers.Qwen3VLConfig(**config), dtype=torch.float32, attn_implementation="sdpa"
    ).eval().requires_grad_(False)


@contextmanager
def counted(model, device):
    """A list that grows by (rows, tokens, kernels so far, waits so far) before each forward."""
    calls = []
    hook = model.register_forward_pre_hook(lambda module, args, kwargs: calls.append(
        (*kwargs["input_ids"].shape, device.kernels, device.waits)), with_kwargs=True)
    yield calls
    hook.remove()


def test_a_step_on_a_gpu_is_few_kernels_and_one_wait(loaded, deep, ragged):
    """A step of the 2B was 1,627 operations, and the host waited six times when a row left. Here
    rows leave, samples share a prompt, prompts wait and penalties count; no tensor meets one of
    another device, and the tokens are those of a CPU."""
    prompts = [ragged[i] for i in (1, 0, 2, 3, 1, 0)]
    uniforms = torch.rand(12, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    settings = dict(max_new_tokens=10, uniforms=uniforms, samples_per_prompt=2, stop_ids=range(80),
                    presence_penalty=0.5, top_p=0.95, banned_ids=[500], decoder=FastDecoder)
    read = loaded[1].in_turn(prompts)
    expected = sample(deep, read(3), more=read, **settings)
    with simulated_cuda() as device:
        model, read = to_device(copy.deepcopy(deep)), loaded[1].in_turn(prompts, CUDA)
        with counted(model, device) as calls:
            out = sample(model, read(3), more=read, **settings)
        assert out.ids.device == CUDA and not any(
            "forward" in vars(module) for module in model.modules()), "the norms are put back"
        assert out.ids.tolist() == expected.ids.tolist()
        assert out.lengths.tolist() == expected.lengths.tolist()
        torch.testing.assert_close(out.logprobs.cpu(), expected.logprobs, atol=1e-5, rtol=0)
        assert decoder.decode_mask(model, [3, 1], 3, CUDA).dtype == model.dtype, "added, not bool"
    pairs = [(a, b) for a, b in zip(calls, calls[1:]) if a[1] == b[1] == 1]     # no prefill
    assert {b[3] - a[3] for a, b in pairs} == {1}, "the host waits once a step"
    assert max(b[2] - a[2] for a, b in pairs if a[0] == b[0]) <= 1000
    assert any(a[0] != b[0] for a, b in pairs), "rows should have left"
    assert sum(tokens > 1 for _, tokens, _, _ in calls) > 1, "prompts should have joined"


@pytest.mark.parametrize("way", [PlainDecoder, FastDecoder])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sampling_with_a_generator_on_a_gpu(loaded, deep, ragged, way, temperature):
    with simulated_cuda() as device:
        model = to_device(copy.deepcopy(deep))
        with counted(model, device) as calls:
            sample(model, loaded[1].batch(ragged, device=CUDA), max_new_tokens=4, stop_ids=(),
                   temperature=temperature, generator=torch.Generator(), decoder=way)
    waits = {b[3] - a[3] for a, b in zip(calls[1:], calls[2:])}
    assert waits == {1} or way is PlainDecoder


def test_a_replay_on_a_gpu_is_given_all_it_needs_in_few_kernels(loaded, deep, ragged, monkeypatch):
    """All tensors of the recorded step are on the device, and the host waits for none of them; what
    is launched beside the replay are the inputs, the copy of the logits, and the draw."""
    read = loaded[1].in_turn([ragged[i] for i in (1, 0, 2, 3)])
    uniforms = torch.rand(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    settings = dict(max_new_tokens=8, uniforms=uniforms, stop_ids=range(80))
    expected = sample(deep, read(2), more=read, **settings)
    recorded, run = [], GraphDecoder.run
    monkeypatch.setattr(GraphDecoder, "record", lambda self: self.run)
    with simulated_cuda() as device:
        def counting(self):
            before = device.kernels, device.waits
            logits = run(self)
            recorded.append((device.kernels - before[0], device.waits - before[1]))
            return logits
        monkeypatch.setattr(GraphDecoder, "run", counting)
        model, read = to_device(copy.deepcopy(deep)), loaded[1].in_turn(
            [ragged[i] for i in (1, 0, 2, 3)], CUDA)
        with counted(model, device) as calls:
            out = sample(model, read(2), more=read, decoder=GraphDecoder, **settings)
        assert out.ids.tolist() == expected.ids.tolist()
        assert out.lengths.tolist() == expected.lengths.tolist()
    assert {waits for _, waits in recorded} == {0}
    pairs = [(a, b) for a, b in zip(calls, calls[1:]) if a[1] == b[1] == 1 and a[0] == b[0]]
    beside = [b[2] - a[2] - recorded[0][0] for a, b in pairs]
    assert {b[3] - a[3] for a, b in pairs} == {1} and min(beside) < 40, beside


def test_the_simulated_gpu_sees_what_a_gpu_would_refuse_or_wait_for():
    with simulated_cuda() as device:
        x, cpu = torch.arange(6.0, device=CUDA), torch.arange(6.0)
        with pytest.raises(RuntimeError, match="cuda:0 and cpu"):
            x + cpu
        with pytest.raises(RuntimeError, match="cuda:0 and cpu"):
            cpu[x.long()]
        for waiting in (lambda: bool(x[0]), lambda: x.tolist(), lambda: x[x > 2], x.nonzero,
                        x.cpu, x.max().item, lambda: cpu.to(CUDA), lambda: torch.tensor(
                            [1], device=CUDA)):
            before = device.waits
            waiting()
            assert device.waits > before
        before = device.waits, device.kernels
        y = x.view(2, 3)[:, 1:] * 2
        y += cpu.to(CUDA, non_blocking=True)[:2] + cpu[0]
        assert (device.waits, device.kernels) == (before[0], before[1] + 4)
    assert y.numbers.tolist() == [[2.0, 5.0], [8.0, 11.0]]


@pytest.mark.parametrize("size", [128, 2048])
def test_the_fused_norm_computes_what_the_class_does(size):
    """In float64 to what the class loses by computing in float32; in bf16 to one rounding, and no
    farther from the exact value than the class."""
    norm = transformers.models.qwen3_vl.modeling_qwen3_vl.Qwen3VLTextRMSNorm(size).double()
    norm.weight = torch.nn.Parameter(1 + 0.3 * torch.randn(size).double(), requires_grad=False)
    x = (torch.randn(64, size) * torch.logspace(-3, 3, 64)[:, None]).double()
    torch.testing.assert_close(decoder.fused_norm(norm, x), norm(x), rtol=1e-6, atol=1e-6)
    norm, x = norm.bfloat16(), x.bfloat16()
    exact = decoder.fused_norm(norm.double(), x.double())
    norm = norm.bfloat16()
    theirs, ours = norm(x), decoder.fused_norm(norm, x)
    assert theirs.dtype == ours.dtype == torch.bfloat16
    error = [float(((y.double() - exact) / exact).abs().max()) for y in (ours, theirs)]
    assert error[0] <= error[1] and error[0] < 2**-8 + 1e-6           # half a unit: rounded once


def test_norms_are_put_back_after_an_error(deep):
    norms = decoder.norms_of(deep)
    assert len(norms) == 4 * 28 + 1
    with pytest.raises(KeyError), decoder.fused(norms):
        assert "forward" in vars(norms[0])
        raise KeyError
    assert not any("forward" in vars(norm) for norm in norms)
    cpu = FastDecoder(deep)
    cpu.read({"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.ones(1, 2).long()}, 1)
    assert cpu.norms == [], "a CPU keeps the class's own arithmetic"


def test_the_mask_begins_where_an_attention_kernel_may_read_it(deep, monkeypatch):
    """The memory-efficient one pads a mask whose strides are no multiples of 8, and refuses one
    that does not begin at such an address. Behind dropped blanks it began anywhere."""
    monkeypatch.setattr(decoder, "ROOM", 8)
    mask = (torch.arange(12) >= 12 - torch.tensor([12, 3, 2])[:, None]).long()
    fast = FastDecoder(deep)
    with torch.no_grad():
        fast.read({"input_ids": 5 + mask, "attention_mask": mask}, 1)
    assert fast.keep([1, 2]) == [2, 1] and fast.cache.get_seq_length() == 3
    assert fast.mask[:, 0, 0, :3].tolist() == [[False, True, True], [True, True, True]]
    assert fast.mask.storage_offset() == 0 and fast.mask.stride(0) % 8 == 0


# ---------------------------------------------------------------------------- refused

def test_a_cache_that_is_not_understood_is_refused_by_name():
    """A sliding window, say, whose columns are not those of the mask."""
    with pytest.raises(ValueError, match="FakeCache .* rollout.PlainDecoder"):
        sample(Fake(countdown), one_token_prompts(2), max_new_tokens=2, stop_ids=(),
               decoder=FastDecoder)


def test_drawings_in_the_docstrings():
    result = doctest.testmod(decoder, extraglobs={"SimpleNamespace": SimpleNamespace})
    assert result.attempted > 2 and result.failed == 0


def test_sampling_never_uses_flash_attention():
    """It unpadded rows in every layer of every step, more than 56 waits a token."""
    asked = []
    model = SimpleNamespace(config=SimpleNamespace(_attn_implementation="flash_attention_2"),
                            set_attn_implementation=asked.append)
    with pytest.raises(KeyError), without_flash(model):
        assert asked == ["sdpa"]
        raise KeyError
    assert asked == ["sdpa", "flash_attention_2"]
    model.config._attn_implementation = "eager"
    with without_flash(model):
        assert len(asked) == 2
