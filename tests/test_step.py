"""A whole step: no picture is decoded twice, and few of the scored tokens are padding."""
import inspect
import math
import random
import re
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

import cue_recovery
import distill
import model as qwen
import teacher as teaching
from conftest import ROOT
from data import records as record_files
from scale import build
from test_distill import KeepGradients, config, take_step


def test_freeze_vision_is_train_language(tmp_path):
    assert distill.read_config(["--freeze-vision"])[0].train == "language"
    assert distill.read_config([])[0].train == "all"
    assert distill.read_config(["--train", "cue"])[0].train == "cue"
    for wrong in (["--freeze-vision", "--train", "cue"], ["--freeze-vision", "--resume", "x"]):
        with pytest.raises(SystemExit):
            distill.read_config(wrong)


@pytest.mark.parametrize("train", ["all", "language"])
def test_pictures_are_decoded_once_a_record_and_step(tiny, records, monkeypatch, train):
    """The hinted prompt, sampling and the micro-batches all use the same decoded pixels."""
    student, processor = tiny
    teacher, count = teaching.frozen_copy(student), {"decoded": 0, "patched": 0}

    def counted(name, function):
        def wrapper(*args):
            count[name] += 1
            return function(*args)
        return wrapper

    monkeypatch.setattr(qwen, "to_rgb", counted("decoded", qwen.to_rgb))
    monkeypatch.setattr(qwen.Processor, "_patches",
                        counted("patched", qwen.Processor._patches))
    distill.choose_weights(student, train)
    world = [{**r, "images": r["images"] * (1 + n % 2)} for n, r in enumerate(records[:6])]
    epoch = [distill.batch_of(world, step, 3, seed=0) for step in range(2)]
    for step, batch in enumerate(epoch):
        take_step(student, teacher, processor, batch,
                  config(batch_size=3, sample_batch=2, micro_batch_tokens=1, train=train), step,
                  KeepGradients(student))
    assert count == {"decoded": 9, "patched": 9}         # 3 records with a picture, 3 with two


# ---------------------------------------------------------------------------- padding

class Counter:
    """Stands in for a model: records the width and number of rows of every batch it reads."""
    device = torch.device("cpu")

    def __init__(self):
        self.seen, self.model = [], self.forward

    def forward(self, input_ids, attention_mask=None, **rest):
        self.seen.append(tuple(input_ids.shape))
        return SimpleNamespace(last_hidden_state=torch.zeros(*input_ids.shape, 1))


def heavy_tailed(seed: int, rows: int = 128):
    """Prompts of 200 to 2,000 tokens, hints of 30 to 200, answers of 64 to 4,096 (Pareto, 0.7)."""
    rng = random.Random(seed)
    prompts = [qwen.Prompt([5] * int(math.exp(rng.uniform(math.log(200), math.log(2000)))))
               for _ in range(rows)]
    hinted = [qwen.Prompt(p.ids + [6] * rng.randint(30, 200)) for p in prompts]
    return prompts, hinted, [[7] * min(4096, int(64 * rng.paretovariate(0.7)))
                             for _ in range(rows)]


def padded_share(processor, prompts, hinted, responses, groups) -> tuple[float, int]:
    """Over both scoring passes: the share of padding, and the tokens of the largest pass."""
    counter, real = Counter(), 0
    for rows in groups:
        answered = sum(len(responses[row]) for row in rows)
        for side in (hinted, prompts):
            states = distill.response_states(processor, responses, qwen.last_hidden_state, side,
                                             counter, rows)
            assert len(states) == answered
            real += sum(len(side[row].ids) for row in rows) + answered
    read = [rows * columns for rows, columns in counter.seen]
    return 1 - real / sum(read), max(read)


@pytest.mark.parametrize("seed", range(2))
def test_at_most_a_tenth_of_what_is_scored_is_padding(loaded, seed):
    """Measured on the batches of the forward passes, with the paper's batch and the default budget.

    Once, a row was as wide as the longest prompt plus the longest answer of its group. Then a third
    was padding, and a pass read 27,706 tokens under a budget of 16,384.
    """
    _, processor = loaded
    prompts, hinted, responses = heavy_tailed(seed)
    groups = distill.micro_batches(prompts, hinted, responses, 16384)
    assert sorted(row for group in groups for row in group) == list(range(128))
    share, largest = padded_share(processor, prompts, hinted, responses, groups)
    assert share <= 0.10 and largest <= 16384
    assert len(groups) <= 20                # one row per pass would need no padding, but 128 passes


def test_a_row_is_as_wide_as_itself(loaded):
    """A long prompt with a short answer, a short one with a long answer: 110 columns, not 200."""
    _, processor = loaded
    prompts = [qwen.Prompt([5] * 100), qwen.Prompt([5] * 10)]
    counter = Counter()
    distill.response_states(processor, [[7] * 10, [7] * 100], qwen.last_hidden_state, prompts,
                            counter, [0, 1])
    assert counter.seen == [(2, 110)]


# ---------------------------------------------------------------------------- two cores

@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_teacher_on_the_second_core_gives_the_same_gradients(tiny, records, one_thread):
    """With one thread, the teacher reads ahead in another; the student's step is the same."""
    student, processor = tiny
    teacher = teaching.frozen_copy(student)
    cue_recovery.attach(student, every=2)
    distill.choose_weights(student, "all")
    settings = config(batch_size=6, micro_batch_tokens=150)
    scale = distill.scale_for(settings, student, teacher, processor)
    assert scale.teach is build.teach_beside
    assert distill.scale_for(settings, student, student, processor).teach is teaching.teach
    kept, readers = [], set()
    hidden = scale.hidden

    def noted(model, batch):
        readers.add((model is teacher, threading.current_thread() is threading.main_thread()))
        return hidden(model, batch)

    scale.hidden = noted
    for teach in (teaching.teach, build.teach_beside):
        scale.teach, keep = teach, KeepGradients(student)
        distill.training_step(student, teacher, processor, records[:6],
                              distill.uniform_numbers(settings, 0), settings, 0, keep, scale)
        kept.append(keep.kept)
    assert readers == {(False, True), (True, True), (True, False)}
    assert kept[0].keys() == kept[1].keys() and len(kept[0]) > 50
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])


def test_a_teacher_on_the_second_core_that_fails_ends_the_step(tiny, one_thread):
    """Its error is the step's, its mode is as it was, and what waited behind it is not read."""
    student, _ = tiny
    teacher, read = teaching.frozen_copy(student).train(), []

    def broken(model, rows):
        read.append(rows)
        raise ValueError(f"rows {rows}")

    with pytest.raises(ValueError, match="rows \\[0\\]"):
        list(build.teach_beside(teacher, [[0], [1], [2]], broken))
    assert teacher.training and [0] in read

    states = build.teach_beside(teacher, [[n] for n in range(50)], lambda model, rows: time.sleep(
        0.01) or read.append(rows))
    next(states)
    time.sleep(0.3)
    assert [3] in read and [4] not in read, "few micro-batches wait: their states take memory"
    states.close()                                      # as when the student's own pass failed
    assert [49] not in read and teacher.training


# ---------------------------------------------------------------------------- few hops

def test_few_functions_run_from_a_record_to_its_loss(tiny, toy_folder):
    """Readers follow a record through the code: each function is a place they have to look up.

    85 functions in 10 files ran once, 8 of which did nothing. Counted with the plain
    decoder, the module attached, in one process; inner functions count too.
    """
    student, processor = tiny
    teacher = teaching.frozen_copy(student)
    cue_recovery.attach(student, every=2)
    settings = config(batch_size=4)
    distill.choose_weights(student, "all")
    optimizer = distill.Optimizer(list(student.named_parameters()), lr=1e-4, cue_lr=1e-4, warmup=1,
                                  steps=1, final=1, clip=1)
    uniforms, found = distill.uniform_numbers(settings, 0), set()

    def note(frame, event, argument):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(f"{ROOT}/") and (
                "/tests/" not in code.co_filename and not code.co_name.startswith("<")):
            found.add((code.co_filename.removeprefix(f"{ROOT}/"), code.co_qualname))

    threading.setprofile(note)          # pictures are read by threads
    sys.setprofile(note)
    try:
        batch = record_files.load(toy_folder / "train.jsonl")[:4]
        distill.training_step(student, teacher, processor, batch, uniforms, settings, 0, optimizer,
                              distill.Scale())
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    assert len(found) <= 45, sorted(found)


def test_training_step_is_short_and_knows_of_no_machinery():
    """The paper's four numbered steps in at most 40 lines, no word of processes or moving models."""
    lines = inspect.getsource(distill.training_step).splitlines()
    text = "\n".join(lines)
    assert len(lines) <= 40
    assert [text.index(f"# {n}) ") for n in (1, 2, 3, 4)] == sorted(
        text.index(f"# {n}) ") for n in (1, 2, 3, 4))
    code = text.replace(distill.training_step.__doc__, "")
    assert not re.search(r"rank|world|shard|gather|offload|process(es)?\b|\.to\(|cpu", code)
