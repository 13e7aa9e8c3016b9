"""teacher.py: what only the teacher is told, and that it is a frozen model without the module."""
import copy

import pytest
import torch
from PIL import ImageOps

import cue_recovery
import teacher as teaching
from scale import offload
from conftest import append_response
from teacher import (PRIVILEGES, at_work, check_same_vocabulary, frozen_copy, hint, seen,
                     update_ema)

RECORD = {"id": "r-9", "question": "How many?", "answer": " 2 ", "cue": "Two red circles.",
          "rationale": "One and one is two.\n"}


@pytest.fixture
def student(tiny):
    """In training, with a module that really changes something."""
    model, _ = tiny
    cue = cue_recovery.attach(model, every=2)
    for block in cue.blocks.values():
        torch.nn.init.normal_(block.output.weight, std=0.3)
    return model.train()


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


# ---------------------------------------------------------------------------- the privilege

def test_hint_of_each_privilege():
    told = {privilege: hint(RECORD, privilege) for privilege in PRIVILEGES}
    assert told.pop("view") is None and told.pop("view+cue") == told["cue"]
    assert told == {
        "none": None, "answer": "2", "rationale": "One and one is two.", "cue": "Two red circles."}
    assert hint({"answer": 0}, "answer") == "0"         # no record file has it, a caller may


@pytest.mark.parametrize("privilege", ["answer", "rationale", "cue", "view"])
@pytest.mark.parametrize("value", ["", " \n", None, "absent"])
def test_a_record_without_its_privilege_is_an_error(privilege, value):
    """PITFALLS 27. A teacher that fell back to the plain prompt agreed with the student from step
    0: the loss was about zero, and nobody noticed."""
    name = {"view": "teacher_images"}.get(privilege, privilege)
    record = {k: v for k, v in {**RECORD, name: value}.items() if v != "absent"}
    if privilege == "view":
        record[name] = value and []
    with pytest.raises(ValueError, match=f"record r-9 has no {name}"):
        hint(seen(record, privilege), privilege)


def test_a_view_replaces_the_pictures_and_nothing_else():
    record = {**RECORD, "images": ["a.png"], "teacher_images": ["b.png", "c.png"]}
    for privilege in PRIVILEGES:
        other = {**record, "images": ["b.png", "c.png"]} if "view" in privilege else record
        assert seen(record, privilege) == other


def test_no_privilege_needs_no_field():
    assert hint({"id": "r-1", "question": "?"}, "none") is None


def test_unknown_privilege_is_refused():
    with pytest.raises(ValueError, match="'cues'.*none, answer, rationale, cue"):
        hint(RECORD, "cues")


def test_prompts_end_in_one_header_and_score_the_same_tokens(loaded, records):
    """PITFALLS 1 and 2. Where the prompts ended differently, the first tokens were scored as
    disagreement (OPSD#10); where the text was tokenised again, all of them were (trl#5241). Each
    hint moves the response by another distance; the scored ids are those of the rollout, one by
    one."""
    processor, four = loaded[1], records[:4]
    plain = [processor.prompt(record) for record in four]
    told = [processor.prompt(record, hint(record, "cue")) for record in four]
    for a, b in zip(plain, told):
        turn = processor.control["<|im_start|>"]
        start = max(n for n, token in enumerate(a.ids) if token == turn)
        header = a.ids[start:]
        assert b.ids[-len(header):] == header and processor.decode(header[1:]) == "assistant\n"
        assert len(b.ids) > len(a.ids) and torch.equal(a.pixels, b.pixels)
    lengths = torch.tensor([5, 2, 7, 1])
    ids = torch.randint(0, processor.image_id, (4, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(7) < lengths[:, None]
    views = [append_response(processor.batch(prompts), ids, lengths) for prompts in (plain, told)]
    scored = [view["input_ids"][:, -7:][mask] for view in views]
    assert scored[0].tolist() == scored[1].tolist() == ids[mask].tolist()
    assert len(scored[0]) == lengths.sum() == views[1]["attention_mask"][:, -7:].sum()
    starts = [view["position_ids"][0, :, -7] for view in views]
    assert len(set((starts[1] - starts[0]).tolist())) > 1, "the hints should differ in length"


def test_another_picture_changes_the_logits_of_both_models(loaded, student, records):
    """PITFALLS 12. One engine never loaded the vision weights: the loss fell as usual, and the
    score was 1 % (KDFlow#9)."""
    processor, record = loaded[1], records[0]
    other = {**record, "images": [ImageOps.invert(record["images"][0])]}
    for model in (student, frozen_copy(student)):
        for told in (None, hint(record, "cue")):
            here, there = (logits(model, processor.batch([processor.prompt(r, told)]))[0, -1]
                           for r in (record, other))
            assert (here - there).abs().max() > 1e-3


# ---------------------------------------------------------------------------- the model

def test_frozen_copy_is_the_base_model(loaded, student, ragged):
    """Without the module and its hooks, in eval mode, without gradients."""
    base, processor = loaded
    teacher, batch = frozen_copy(student), processor.batch(ragged)
    assert torch.equal(logits(teacher, batch), logits(base, batch))
    assert not torch.equal(logits(student, batch), logits(base, batch))
    assert getattr(teacher, "cue_recovery", None) is None
    assert not any("cue" in name for name, _ in teacher.named_parameters())
    assert not any(module._forward_pre_hooks for module in teacher.modules())
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())


def test_frozen_copy_leaves_the_student_as_it_was(loaded, student, ragged):
    batch = loaded[1].batch(ragged)
    before = logits(student, batch)
    frozen_copy(student)
    assert torch.equal(logits(student, batch), before)
    assert all(module.training for module in student.modules())
    assert all(p.requires_grad for p in student.parameters())


def test_training_the_student_does_not_move_the_teacher(loaded, student, ragged):
    """Not even through shared storage, gradients or the masks of a prefill."""
    batch = loaded[1].batch(ragged)
    student(**batch).logits.square().mean().backward()
    teacher = frozen_copy(student)
    before = logits(teacher, batch)
    torch.optim.SGD(student.parameters(), lr=0.1).step()
    assert torch.equal(logits(teacher, batch), before)
    assert all(p.grad is None for p in teacher.parameters())
    assert any(p.grad is not None for p in student.parameters())


def test_a_student_at_work_as_its_teacher_is_the_base_model(loaded, student, ragged):
    """Without a copy: the module is off, nothing has a gradient; then all is as it was, also the
    mode of a part that was not in training."""
    base, processor = loaded
    batch = processor.batch(ragged)
    student.model.visual.eval()
    modes = [module.training for module in student.modules()]
    before = logits(student, batch)
    with at_work(student) as teacher:
        taught = teacher(**batch).logits
        assert not any(module.training for module in teacher.modules())
    assert not taught.requires_grad and torch.equal(taught, logits(base, batch))
    assert torch.equal(logits(student, batch), before) and not torch.equal(before, taught)
    assert [module.training for module in student.modules()] == modes


def test_an_offloaded_teacher_is_away_between_its_turns(loaded, ragged, monkeypatch):
    """Its weights are carried once a turn and the copies dropped, not carried back. Two memories
    cannot be had on a CPU, so a clone stands for the copy on the GPU."""
    model, processor = copy.deepcopy(loaded[0]), loaded[1]
    batch, carried = processor.batch(ragged), []
    home = {name: p.data_ptr() for name, p in model.named_parameters()}

    def carry(tensor, device):
        carried.append(device)
        return tensor.clone()

    monkeypatch.setattr(offload, "carry", carry)
    expected = logits(model, batch)
    with offload.brought(model, "gpu"), at_work(model):
        assert not any(p.data_ptr() == home[name] for name, p in model.named_parameters())
        # a tied head is still the embedding: carried once, not as two
        assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
        assert torch.equal(logits(model, batch), expected)
    assert carried == ["gpu"] * (len(list(model.parameters())) + len(list(model.buffers())))
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == home


def linear(value, dtype=torch.float32):
    model = torch.nn.Linear(2, 2).to(dtype)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, value)
    return model


def test_ema_moves_by_the_small_share():
    """PITFALLS 20. With the rate inverted the teacher is the student of a moment ago
    (trl#4935)."""
    teacher, student = linear(0.0), linear(1.0)
    update_ema(teacher, student, decay=0.99)
    assert teacher.weight[0, 0].item() == pytest.approx(0.01)
    update_ema(teacher, student, decay=0.99)
    assert teacher.bias[0].item() == pytest.approx(0.0199)
    assert student.weight[0, 0].item() == 1.0
    for decay, value in ((1.0, 0.0), (0.0, 1.0)):
        teacher = linear(0.0)
        update_ema(teacher, student, decay)
        assert teacher.weight[0, 0].item() == value


def test_ema_of_a_student_with_the_module(loaded, student, ragged):
    """Every base weight is averaged, the module is left out, and the teacher stays frozen."""
    teacher = frozen_copy(student)
    start = copy.deepcopy(dict(teacher.named_parameters()))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.5
    update_ema(teacher, student, decay=0.9)
    for name, parameter in teacher.named_parameters():
        torch.testing.assert_close(parameter, start[name] + 0.05)
        assert not parameter.requires_grad
    assert logits(teacher, loaded[1].batch(ragged)).isfinite().all()


def test_ema_in_bf16_is_refused():
    """A hundredth of a 5 % difference is rounded away in bf16: such a teacher stood still for
    ever, and `--teacher ema` was `--teacher self` without a word. In float32 it follows a bf16
    student."""
    student = linear(1.05, torch.bfloat16)
    still = linear(1.0, torch.bfloat16)
    with torch.no_grad():
        still.weight.lerp_(student.weight, 0.01)
    assert (still.weight == 1).all(), "the story"
    with pytest.raises(ValueError, match="bfloat16 would not move.*float32"):
        update_ema(linear(1.0, torch.bfloat16), student, decay=0.99)
    teacher = linear(1.0)
    update_ema(teacher, student, decay=0.99)
    assert teacher.weight[0, 0].item() == pytest.approx(1.0005, abs=1e-4)


# ---------------------------------------------------------------------------- vocabularies

WORDS = {"a": 0, "b": 1, "<|image_pad|>": 2}


def test_equal_vocabularies_pass():
    check_same_vocabulary(WORDS, dict(reversed(WORDS.items())), 4, 4)


@pytest.mark.parametrize("other, rows, message", [
    (WORDS, 6, "4 logits.*6"),
    ({"a": 1, "b": 0, "<|image_pad|>": 2}, 4, "2 tokens differently.*'a': id 0 and 1"),
    ({"a": 0, "b": 1, "<|video_pad|>": 2}, 4, "2 tokens.*'<|image_pad|>': id 2 and None"),
    ({"a": 0, "b": 1}, 4, "1 tokens.*id 2 and None"),
    ({**WORDS, "c": 3}, 4, "1 tokens.*'c': id None and 3")])
def test_other_vocabularies_are_refused(other, rows, message):
    """PITFALLS 4. Two vocabularies may be equally large, or padded to equally many rows, and still
    name their ids differently: then probabilities of different words are compared (trl#2215,
    #6252)."""
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        check_same_vocabulary(WORDS, other, 4, rows)
