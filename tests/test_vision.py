"""vision.py: a frozen tower reads each picture once, and nothing else changes."""
import copy
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import cue_recovery
import distill
import teacher as teaching
from scale import vision
from test_distill import KeepGradients, config, take_step


def film(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (64, 48), (40 * n, 200 - 30 * n, 90)) for n in range(count)]


@pytest.fixture(scope="module")
def mixed(records):
    """Records with one picture, none, two of different size, a video, a picture and a video."""
    text = {"images": [], "question": "What is behind the door?"}
    two = {"images": records[1]["images"] + records[5]["images"], "question": "Are they alike?"}
    video = {"images": [], "video": film(4), "fps": 2.0, "question": "What happens?"}
    both = {"images": records[2]["images"], "video": film(3), "fps": 1.0,
            "question": "Is it there?"}
    rest = {"answer": "2", "cue": "The picture shows a red circle at row 1 column 1."}
    return [{"id": str(n), **record, **rest}
            for n, record in enumerate([records[0], text, two, video, both, records[3]])]


def pair(tiny):
    """(student with a module that does something, its teacher, processor), the tower frozen."""
    student, processor = tiny
    teacher = teaching.frozen_copy(student)
    cue = cue_recovery.attach(student, every=2)
    for block in cue.blocks.values():
        torch.nn.init.normal_(block.output.weight, std=0.05)
    distill.choose_weights(student, "language")
    return student, teacher, processor


def step(models, records, **changes):
    student, teacher, processor = models
    keep = KeepGradients(student)
    settings = config(**{"batch_size": len(records), "micro_batch_tokens": 500, "sample_batch": 4, "train": "language",
                         "temperature": 1.5, **changes})
    got = take_step(student, teacher, processor, records, settings, 0, keep)
    return *got, keep.kept


def test_features_give_the_hidden_states_of_the_pixels(tiny, mixed):
    student, teacher, processor = pair(tiny)
    prompts = [processor.prompt(record) for record in mixed]
    read = vision.read_once(prompts, student, teacher, rows=2)
    for order in ([0, 1, 2, 3, 4, 5], [4, 2, 1], [1]):
        for model in (student, teacher):
            plain = model.model(**processor.batch([prompts[n] for n in order])).last_hidden_state
            fed = model.model(**processor.batch([read[n] for n in order])).last_hidden_state
            torch.testing.assert_close(fed, plain, rtol=1e-5, atol=2e-6)


def test_a_step_is_the_same_with_and_without(tiny, mixed, monkeypatch):
    """Loss, sampled tokens and gradients, for 0, 1 and 2 pictures and videos in ragged batches."""
    models = pair(tiny)
    once, said, gradients = step(models, mixed)
    monkeypatch.setattr(vision, "read_once", lambda prompts, *models, rows: prompts)
    thrice, said_before, expected = step(models, mixed)
    assert said == said_before
    assert once["loss"] == pytest.approx(thrice["loss"], rel=1e-6)
    assert gradients.keys() == expected.keys()
    assert not any(name.startswith("model.visual.") for name in gradients)
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("changes, times", [
    ({}, 1), ({"train": "cue"}, 1), ({"train": "all"}, 3), ({"teacher": "ema"}, 3),
    ({"teacher": "another/model"}, 3)])
def test_each_picture_goes_through_the_tower_so_many_times(tiny, mixed, changes, times):
    """Counted at the patches that enter its blocks, in both models, whatever the cutting."""
    student, teacher, processor = models = pair(tiny)
    distill.choose_weights(student, changes.get("train", "language"))
    if changes.get("teacher") == "ema":
        teacher = teacher.float()
    seen = [0] * len(student.model.visual.blocks)
    for model in (student, teacher):
        for n, block in enumerate(model.model.visual.blocks):
            def count(module, args, n=n):
                seen[n] += len(args[0])
            block.register_forward_pre_hook(count)
    step(models, mixed, **changes)
    prompts = [processor.prompt(record) for record in mixed]
    patches = sum(len(x) for p in prompts for x in (p.pixels, p.video) if x is not None)
    assert seen == [times * patches] * len(seen)


def test_pixels_are_read_as_ever_afterwards(tiny, mixed):
    """Evaluation gives the same models pixels, between steps."""
    student, teacher, processor = pair(tiny)
    batch = processor.batch([processor.prompt(record) for record in mixed])
    before = student.model(**batch).last_hidden_state
    vision.read_once([processor.prompt(mixed[0])], student, teacher)
    assert torch.equal(student.model(**batch).last_hidden_state, before)


def test_a_deep_copy_reads_with_its_own_tower(tiny, mixed):
    student, teacher, processor = pair(tiny)
    prompts = vision.read_once([processor.prompt(mixed[0])], student, teacher)
    other = copy.deepcopy(student)
    torch.nn.init.zeros_(other.model.visual.merger.linear_fc2.weight)
    plain = processor.batch([processor.prompt(mixed[0])])
    mine, theirs = (m.model.visual(plain["pixel_values"], grid_thw=plain["image_grid_thw"])
                    for m in (student, other))
    assert not torch.allclose(mine.pooler_output, theirs.pooler_output)
    torch.testing.assert_close(prompts[0].pixels[:, :128], mine.pooler_output.detach(),
                               rtol=1e-5, atol=1e-6)


def test_features_as_wide_as_pixels_are_told_apart():
    """Hidden 512 and two DeepStack layers give 1,536 columns, which is 3 x 2 x 16 x 16 as well."""
    class Tower:
        config = SimpleNamespace(out_hidden_size=512)

        def forward(self, pixels, grid_thw):
            return "read"

    grid, read = torch.tensor([[1, 4, 6], [1, 2, 2]]), vision.read_or_hand_through
    assert read(Tower(), torch.zeros(28, 1536), grid) == "read"
    given = torch.arange(7 * 1536.).view(7, 1536)
    back = read(Tower(), given, grid)
    assert torch.equal(torch.cat([back.pooler_output, *back.deepstack_features], dim=1), given)
