"""scale/lora.py: adapters against full fine-tuning of the merged weight, and against peft.

    OMP_NUM_THREADS=1 python -m pytest -q tests/test_lora.py

"Awake" adapters have a B that is not zero, so that they change the model.
"""
import copy
import json

import pytest
import torch
from safetensors.torch import load_file

import cue_recovery
import model as qwen
import rollout
from conftest import append_response
from scale import checkpoint
from scale.lora import TARGETS, attach


def awaken(lora):
    generator = torch.Generator().manual_seed(5)
    for _, adapter in lora.adapters():
        with torch.no_grad():
            adapter.B.copy_(0.05 * torch.randn(adapter.B.shape, generator=generator))
    return lora


@pytest.fixture
def batch(loaded, ragged):
    """Left-padded rows with one, no, two and one picture."""
    return loaded[1].batch(ragged)


def logits_of(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def gradients(model, batch) -> dict:
    """name -> gradient of a loss that depends on every logit of the batch's real tokens."""
    model.zero_grad()
    logits = model(**batch, use_cache=False).logits[batch["attention_mask"].bool()]
    (logits.log_softmax(-1) ** 2).mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


# ---------------------------------------------------------------------------- the mathematics

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identity_at_the_start_and_when_off(tiny, batch, dtype):
    """B is zero: bit for bit the base model. Off: the same, whatever was learnt; also nested, and
    after an error inside."""
    model = tiny[0].to(dtype)
    stock = logits_of(model, batch)
    lora = attach(model)
    assert torch.equal(logits_of(model, batch), stock)
    assert {p.dtype for p in lora.parameters()} == {dtype}
    on = logits_of(awaken(lora) and model, batch)
    assert not torch.equal(on, stock)
    with pytest.raises(KeyError):
        with lora.off():
            with lora.off():
                pass
            assert torch.equal(logits_of(model, batch), stock)
            raise KeyError
    assert torch.equal(logits_of(model, batch), on)


def test_every_linear_layer_of_the_language_model_has_one(tiny):
    """And nothing else has: not the head, not the vision tower, not the module."""
    model = tiny[0]
    cue_recovery.attach(model, every=2)
    names = set(model.state_dict())
    lora = attach(model, rank=3)
    assert names == {name for name in model.state_dict() if not name.startswith("lora.")}
    found = {name for name, part in model.model.language_model.named_modules()
             if isinstance(part, torch.nn.Linear)}
    assert {adapter.path for _, adapter in lora.adapters()} == {
        f"model.language_model.{name}" for name in found}
    assert len(found) == 6 * len(TARGETS)
    sizes = [(p.A.shape, p.B.shape) for _, p in lora.adapters()]
    assert all(A[0] == B[1] == 3 for A, B in sizes)


def test_gradients_are_the_chain_rule_of_full_fine_tuning(tiny, batch):
    """With G the gradient of a merged weight W + s B A: dA = s B^T G and dB = s G A^T, exactly."""
    model, s = tiny[0].double(), 24 / 4
    full = copy.deepcopy(model)
    lora = awaken(attach(model, rank=4, alpha=24))
    full.load_state_dict(lora.merge())
    found, wanted = gradients(model, batch), gradients(full, batch)
    assert len(lora.adapters()) == 42
    for name, adapter in lora.adapters():
        G = wanted[adapter.path + ".weight"]
        for grad, exact in ((found[name + ".A"], s * adapter.B.T @ G),
                            (found[name + ".B"], s * G @ adapter.A.T)):
            assert exact.abs().max() > 0
            assert (grad - exact).abs().max() <= 1e-10 * exact.abs().max(), name


def test_a_frozen_backbone_gets_no_gradient(tiny, batch):
    model = tiny[0].requires_grad_(False)
    attach(model)
    found = {name for name, grad in gradients(model, batch).items() if grad is not None}
    assert found == {name for name, _ in model.named_parameters() if name.startswith("lora.")}


@pytest.mark.parametrize("dtype, within", [(torch.float64, 1e-12), (torch.float32, 1e-5),
                                           (torch.bfloat16, 3e-2)])
def test_merged_is_attached(tiny, batch, dtype, within):
    model = tiny[0].to(dtype)
    merged = copy.deepcopy(model)
    lora = awaken(attach(model))
    merged.load_state_dict(lora.merge())
    found, expected = logits_of(merged, batch), logits_of(model, batch)
    stock = logits_of(tiny[0], batch) if lora.detach() is None else None
    assert (found - expected).abs().max() <= within * expected.abs().max()
    assert (found - stock).abs().max() > 3 * within * expected.abs().max()


def test_gradient_checkpointing_gives_the_same_gradients(tiny, batch):
    """Layers run again in backward, and their hooks with them."""
    model = tiny[0].requires_grad_(False)
    awaken(attach(model))
    model.train()
    expected = gradients(model, batch)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    found = gradients(model, batch)
    for name, grad in expected.items():
        assert (grad is None) == (found[name] is None)
        if grad is not None:
            assert (found[name] - grad).abs().max() <= 1e-4 * grad.abs().max(), name


def test_cached_is_uncached(tiny, batch):
    """The adapters are on in prefill and in every decoding step."""
    model, processor = tiny
    awaken(attach(model))
    out = rollout.sample(model, batch, max_new_tokens=6, stop_ids=())
    whole = append_response(batch, out.ids, out.lengths)
    scored = logits_of(model, {**whole, "use_cache": False})[:, -7:-1].log_softmax(-1)
    assert torch.allclose(scored.gather(2, out.ids[:, :, None])[:, :, 0], out.logprobs, atol=1e-4)


# ---------------------------------------------------------------------------- attach and detach

def test_a_seed_draws_the_same_adapters_and_leaves_the_generator_alone(tiny):
    before = torch.get_rng_state()
    first, again, other = (attach(copy.deepcopy(tiny[0]), seed=seed) for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), before)
    for (name, A), (_, B), (_, C) in zip(first.adapters(), again.adapters(), other.adapters()):
        assert torch.equal(A.A, B.A) and not torch.equal(A.A, C.A), name


def test_a_deep_copy_has_its_own_adapters(tiny, loaded, batch):
    """A hook that closes over the adapters would make the copy use the original's."""
    model = tiny[0]
    lora = awaken(attach(model))
    before = logits_of(model, batch)
    twin = copy.deepcopy(model)
    assert torch.equal(logits_of(twin, batch), before)
    with twin.lora.off():
        assert torch.equal(logits_of(twin, batch), logits_of(loaded[0], batch))
        assert torch.equal(logits_of(model, batch), before)
    twin.lora.detach()
    assert torch.equal(logits_of(twin, batch), logits_of(loaded[0], batch))
    assert torch.equal(logits_of(model, batch), before) and model.lora is lora
    assert not hasattr(twin, "lora") and twin.state_dict().keys() == loaded[0].state_dict().keys()


def test_bad_attachments_are_refused(tiny):
    with pytest.raises(ValueError, match="rank 0"):
        attach(tiny[0], rank=0)
    attach(tiny[0])
    with pytest.raises(ValueError, match="already; detach"):
        attach(tiny[0])


# ---------------------------------------------------------------------------- files

def test_a_merged_checkpoint_loads_everywhere(tiny, batch, tmp_path):
    """What is saved is merged: a plain folder, without a trace of the adapters. The second
    dict stands for whole weights that came from several GPUs."""
    model, processor = tiny
    lora = awaken(attach(model))
    checkpoint.save_model(model, processor, tmp_path / "out")
    again, _ = qwen.load(tmp_path / "out", device="cpu")
    assert not any("lora" in name for name in again.state_dict())
    expected = logits_of(model, batch)
    assert (logits_of(again, batch) - expected).abs().max() < 1e-5 * expected.abs().max()
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lora.detach()
    for name, tensor in lora.merge(whole).items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert lora.merge({}) == {}


def test_the_file_is_in_pefts_format(tiny, tmp_path):
    lora = awaken(attach(tiny[0], rank=4, alpha=8))
    lora.save(tmp_path / "adapter", base="somebody/some-model")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and (config["r"], config["lora_alpha"]) == (4, 8)
    assert config["target_modules"] == sorted(TARGETS)
    assert config["base_model_name_or_path"] == "somebody/some-model"
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    key = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_B.weight"
    assert torch.equal(tensors[key], lora.layers["0"]["q_proj"].B) and len(tensors) == 84


def test_peft_reads_it(tiny, loaded, batch, tmp_path):
    """The same logits through peft's own layers, every tensor of the file found its place."""
    peft = pytest.importorskip("peft")
    model = tiny[0]
    lora = awaken(attach(model))
    lora.save(tmp_path / "adapter")
    expected = logits_of(model, batch)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(loaded[0]), tmp_path / "adapter").eval()
    found = logits_of(theirs, batch)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    stock = logits_of(loaded[0], batch)
    assert (expected - stock).abs().max() > 1e-3 * stock.abs().max()
