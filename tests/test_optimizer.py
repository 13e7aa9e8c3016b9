"""optimizer.py: rates, clipping, masters, and resuming bit for bit."""
import math

import pytest
import torch

from scale.optimizer import Optimizer

SETTINGS = dict(lr=0.01, cue_lr=0.1, warmup=4, steps=20, final=0.1, clip=1.0)


def make(value=1.0, dtype=torch.float32, names=("model.w", "cue_recovery.w"), **settings):
    """(parameters by name, their Optimizer)."""
    parameters = {name: torch.nn.Parameter(torch.full((3,), value, dtype=dtype)) for name in names}
    return parameters, Optimizer(list(parameters.items()), **{**SETTINGS, **settings})


def give(parameters, gradient):
    for parameter in parameters.values():
        parameter.grad = torch.full_like(parameter, gradient)


def rates(optimizer):
    return sorted(group["lr"] for group in optimizer.adam.param_groups)


@pytest.mark.parametrize("step, share", [
    (0, 0.25), (1, 0.5 * 0.955), (3, 1.0 * 0.865), (4, 0.82), (10, 0.55), (19, 0.145)])
def test_rate_at_each_step(step, share):
    """Warm-up over 4 steps, times a line from 1 at step 0 to 0.1 at step 20."""
    parameters, optimizer = make()
    give(parameters, 0.1)
    optimizer.step(step)
    assert rates(optimizer) == pytest.approx([0.01 * share, 0.1 * share])


def test_without_warmup_and_decay_the_rate_is_constant():
    parameters, optimizer = make(warmup=0, final=1.0)
    for step in (0, 7, 19):
        give(parameters, 0.1)
        optimizer.step(step)
        assert rates(optimizer) == pytest.approx([0.01, 0.1])


def test_the_module_has_its_own_rate():
    """AdamW's first step is one rate long, whatever the gradient: 1e-6 from W_O = 0 goes nowhere.
    A weight belongs to the module if its name begins with the word, not if it contains it."""
    names = ("model.w", "cue_recovery.blocks.0.output.weight", "model.cue_recovery.w")
    parameters, optimizer = make(names=names, warmup=0, final=1.0)
    give(parameters, 0.1)
    optimizer.step(0)
    moved = [1 - parameter[0].item() for parameter in parameters.values()]
    assert moved == pytest.approx([0.01, 0.1, 0.01], rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_is_that_of_adamw_with_clipping(dtype):
    """Two steps against torch's own AdamW fed with gradients clipped by hand, over all weights."""
    parameters, optimizer = make(dtype=dtype, warmup=0, final=1.0, cue_lr=0.01, weight_decay=0.1)
    other = [torch.nn.Parameter(torch.ones(3)) for _ in parameters]
    adam = torch.optim.AdamW(other, lr=0.01, weight_decay=0.1)
    for step, gradients in enumerate([(3.0, -4.0), (0.125, 0.0)]):
        for parameter, mine, gradient in zip(parameters.values(), other, gradients):
            parameter.grad, mine.grad = (torch.full_like(p, gradient) for p in (parameter, mine))
        norm = math.sqrt(3 * sum(g * g for g in gradients))       # three entries in each weight
        for mine in other:
            mine.grad /= max(1.0, norm)
        adam.step()
        assert optimizer.step(step) == pytest.approx(norm), "the norm before clipping"
        for parameter, mine in zip(parameters.values(), other):
            torch.testing.assert_close(parameter, mine.to(dtype))
            assert parameter.grad is None


def test_a_weight_without_gradient_stays():
    parameters, optimizer = make(weight_decay=0.1)
    parameters["model.w"].grad = torch.ones(3)
    optimizer.step(0)
    assert (parameters["cue_recovery.w"] == 1).all() and (parameters["model.w"] < 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(dtype, bad):
    """Non-finite losses were skipped silently. Here the caller gets the norm, to count them, and no
    weight, master or moment has moved: the next good step is the same as a first step."""
    parameters, optimizer = make(dtype=dtype)
    give(parameters, 0.5)
    parameters["model.w"].grad[1] = bad
    assert not math.isfinite(optimizer.step(0))
    fresh, reference = make(dtype=dtype)
    for each, optim in ((parameters, optimizer), (fresh, reference)):
        assert all((p == 1).all() and p.grad is None for p in each.values())
        give(each, 0.5)
        assert math.isfinite(optim.step(0))
    for name, parameter in parameters.items():
        assert torch.equal(parameter, fresh[name]) and (parameter < 1).all()
    assert all(torch.equal(value, reference.tensors()[name])
               for name, value in optimizer.tensors().items())


def test_bf16_weights_move_at_a_rate_of_1e_6():
    """A typical weight, 0.02, in bf16: its neighbours are 1.2e-4 away, so an update of 1e-6 is
    rounded to nothing, at every step. Plain AdamW trained for 200 steps and changed no weight,
    while the loss curve looked merely flat. The float32 master adds the updates up: 200 x 1e-6 =
    2e-4."""
    plain = torch.nn.Parameter(torch.full((3,), 0.02, dtype=torch.bfloat16))
    adam = torch.optim.AdamW([plain], lr=1e-6, weight_decay=0)
    parameters, optimizer = make(0.02, torch.bfloat16, ("model.w",), lr=1e-6, warmup=0, final=1.0)
    start = plain.detach().clone()
    for step in range(200):
        plain.grad = torch.ones_like(plain)
        adam.step()
        give(parameters, 1.0)
        optimizer.step(step)
    assert torch.equal(plain, start), "the story"
    moved = (start - parameters["model.w"]).float()
    assert moved.tolist() == pytest.approx([2e-4] * 3, abs=6.2e-5)  # to half a bf16 step
    assert parameters["model.w"].dtype == torch.bfloat16
    assert optimizer.tensors()["weight/model.w"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masters_may_live_elsewhere(dtype):
    """--offload-optimizer: then even a float32 weight has a master of its own. The device "meta"
    holds no values, so this checks the place only."""
    weight = torch.nn.Parameter(torch.ones(3, dtype=dtype))
    master = Optimizer._master(weight, torch.device("meta"))
    assert (master.device.type, master.dtype) == ("meta", torch.float32)
    for near in (None, torch.device("cpu")):
        assert (Optimizer._master(weight, near) is weight) == (dtype == torch.float32)


def test_a_float32_weight_with_a_master_elsewhere_steps_alike(monkeypatch):
    """The same numbers as without; a clone stands in for a master on another device."""
    names = ("model.w", "cue_recovery.w", "silent")
    near, reference = make(0.02, names=names)
    monkeypatch.setattr(Optimizer, "_master", staticmethod(lambda p, device: p.detach().clone()))
    far, optimizer = make(0.02, names=names)
    for parameters, optim in ((near, reference), (far, optimizer)):
        random_steps(parameters, optim, range(5))
    assert all(torch.equal(near[name], far[name]) for name in names)
    assert (near["model.w"] != 0.02).all() and all(p.grad is None for p in far.values())


def random_steps(parameters, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for name, parameter in parameters.items():
            if name != "silent":
                parameter.grad = torch.randn(3, generator=generator).to(parameter.dtype)
        optimizer.step(step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_continues_bit_for_bit(dtype):
    """Ten steps at once equal five, a reload and five more, to the last bit, including the digits
    that only the masters hold. One weight never has a gradient."""
    names = ("model.w", "cue_recovery.w", "silent")
    whole, reference = make(0.02, dtype, names)
    random_steps(whole, reference, range(10))
    first, optimizer = make(0.02, dtype, names)
    random_steps(first, optimizer, range(5))
    saved = {name: tensor.clone() for name, tensor in optimizer.tensors().items()}
    second, resumed = make(0.5, dtype, names)             # other weights: all comes from the file
    resumed.load_tensors(saved)
    assert all(torch.equal(second[name], first[name]) for name in names)
    random_steps(second, resumed, range(5, 10))
    assert all(torch.equal(second[name], whole[name]) for name in names)
    expected = reference.tensors()
    assert resumed.tensors().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.tensors().items())


def test_loaded_moments_are_copies():
    """Training after a load must not write into the tensors of the caller."""
    parameters, optimizer = make()
    random_steps(parameters, optimizer, range(2))
    saved = {name: tensor.clone() for name, tensor in optimizer.tensors().items()}
    kept = {name: tensor.clone() for name, tensor in saved.items()}
    parameters, optimizer = make()
    optimizer.load_tensors(saved)
    random_steps(parameters, optimizer, range(2, 4))
    assert all(torch.equal(saved[name], kept[name]) for name in kept)


def test_a_state_of_other_weights_is_refused():
    """With the settings of another run beside it, what it had too many was dropped in silence."""
    _, optimizer = make()
    whole = optimizer.tensors()
    for tensors in ({}, {**whole, "weight/model.more": torch.ones(1)}, {
            name: tensor for name, tensor in whole.items() if name != "weight/model.w"}):
        with pytest.raises(ValueError, match="train other weights, such as .*another run"):
            optimizer.load_tensors(tensors)


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="nothing to train"):
        make(names=())
