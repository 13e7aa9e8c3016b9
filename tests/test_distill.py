"""distill.py: the step, the loop, the command line. Everything on the tiny checkpoint."""
import dataclasses
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from scale import checkpoint, longrun, offload
from scale.decoder import FastDecoder
import cue_recovery
import distill
import evaluate
import model as qwen
import teacher as teaching
from analysis import compare, report
from conftest import ROOT
from data import toy
from rollout import sample


def config(**changes) -> distill.Config:
    small = dict(batch_size=6, sample_batch=6, max_new_tokens=12, lr=1e-3, cue_lr=1e-3, warmup=1,
                 steps=4, micro_batch_tokens=100_000)
    return distill.Config(**{**small, **changes})


class KeepGradients:
    """Stands in for the optimizer: keeps the gradients and changes nothing."""

    def __init__(self, student):
        self.student = student

    def step(self, step):
        self.kept = {n: p.grad.clone() for n, p in self.student.named_parameters()
                     if p.grad is not None}
        self.student.zero_grad()
        return 1.0


def take_step(student, teacher, processor, records, settings, step, optimizer):
    """(metrics, answers) of a step with the parts of scale/ that the loop would give it."""
    return distill.run_step(student, teacher, processor, records, settings, step, optimizer,
                            distill.scale_for(settings, student, teacher, processor))


def rows_of(student, processor, prompts, settings, seed):
    """The rollout of a step's prompts, each K times."""
    settings = dataclasses.replace(settings, batch_size=len(prompts), seed=seed)
    return distill.sample_responses(student, processor, prompts,
                                    distill.uniform_numbers(settings, 0), settings,
                                    FastDecoder)


def one_step(tiny, records, step=0, **changes):
    """(metrics, gradients) of a training step that updates nothing."""
    student, processor = tiny
    teacher = teaching.frozen_copy(student)
    if getattr(student, "cue_recovery", None) is None:
        cue_recovery.attach(student, every=2)
    keep = KeepGradients(student)
    metrics, _ = take_step(student, teacher, processor, records[:6],
                           config(batch_size=len(records[:6]), **changes), step, keep)
    return metrics, keep.kept


# ---------------------------------------------------------------------------- the step

@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd", "sampled"])
def test_step_student_equals_teacher_gives_zero(tiny, records, kind):
    """PITFALLS 16: without privilege the frozen copy is the student, module and all."""
    metrics, gradients = one_step(tiny, records, privilege="none", loss=kind)
    assert abs(metrics["loss"]) < 1e-5
    assert max(float(g.abs().max()) for g in gradients.values()) < 1e-5


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_step_with_privilege_has_a_loss_and_moves_the_module(tiny, records, kind):
    metrics, gradients = one_step(tiny, records, privilege="cue", loss=kind)
    assert metrics["loss"] > 1e-3
    moved = [n for n, g in gradients.items() if n.startswith("cue_recovery.") and g.abs().max() > 0]
    # W_O = 0 at the start: nothing behind it has a gradient yet, and W_O itself has
    assert moved and all(".output." in name for name in moved)


def test_step_accumulation_does_not_change_the_gradient(tiny, records):
    """PITFALLS 18: divided by the whole batch's counts, 1 x 6 and 6 x 1 rows give one gradient."""
    whole, a = one_step(tiny, records, micro_batch_tokens=100_000)
    single, b = one_step(tiny, records, micro_batch_tokens=1)
    assert whole["loss"] == pytest.approx(single["loss"], rel=1e-4)
    for key in ("entropy", "gap_front", "gap_back", "length"):   # sums, not the last micro-batch
        assert whole[key] == pytest.approx(single[key], rel=1e-3)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=2e-3, atol=2e-6)


def test_step_loss_equals_scoring_each_row_alone(tiny, records):
    """PITFALLS 7, 8 and 10: shift, mask and padding, against one unpadded row at a time."""
    student, processor = tiny
    teacher = teaching.frozen_copy(student)
    prompts = [processor.prompt(r) for r in records[:6]]
    rollout = rows_of(student, processor, prompts, config(), seed=0)
    total = 0.0
    for record, ids, n in zip(records, rollout.ids, rollout.lengths.tolist()):
        logprobs = []
        for model, hint in ((student, None), (teacher, teaching.hint(record, "cue"))):
            prompt = processor.prompt(record, hint)
            prompt.ids = prompt.ids + ids[:n].tolist()
            with torch.no_grad():
                logits = model(**processor.batch([prompt])).logits[0, -n - 1:-1]
            logprobs.append(logits.double().log_softmax(-1))
        p, q = logprobs
        total += float((q.exp() * (q - p)).sum(-1).mean()) / 6
    metrics, _ = one_step((student, processor), records)
    assert metrics["loss"] == pytest.approx(total, rel=1e-4)


def two_steps(student, teacher, processor, records, config):
    """(metrics of two steps that train the module, its weights afterwards)."""
    weights = distill.choose_weights(student, config.train)
    optimizer = distill.Optimizer(weights, lr=config.lr, cue_lr=0.05, warmup=1, steps=4, final=1.0,
                                  clip=1.0)
    batch = records[:6]
    out = [take_step(student, teacher, processor, batch, config, step, optimizer)[0]
           for step in range(2)]
    return [{k: v for k, v in m.items() if "second" not in k} for m in out], dict(weights)


def test_a_shared_teacher_is_the_copied_teacher(tiny, records):
    """--train cue: the frozen backbone is its own teacher with the module off, for half the memory.
    Same losses and weights, also at the second step, when the module does something."""
    settings = config(train="cue", micro_batch_tokens=200)
    copied, processor = tiny
    teacher = teaching.frozen_copy(copied)
    cue_recovery.attach(copied, 2)
    shared, same, _ = distill.build_models(distill.Config(
        student=str(qwen.TINY), train="cue", every=2, device="cpu", attention="sdpa"))
    assert same is shared
    expected, weights = two_steps(copied, teacher, processor, records, settings)
    found, others = two_steps(shared, same, processor, records, settings)
    assert found == expected and expected[0]["loss"] != expected[1]["loss"]
    assert weights.keys() == others.keys() and all(n.startswith("cue_recovery.") for n in weights)
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_a_teacher_from_a_folder_is_frozen():
    """As frozen_copy() leaves its own: eval mode, no gradients, no module."""
    _, teacher, _ = distill.build_models(distill.Config(
        student=str(qwen.TINY), teacher=str(qwen.TINY), device="cpu"))
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not hasattr(teacher, "cue_recovery")


def test_an_offloaded_teacher_teaches_the_same(tiny, records, monkeypatch):
    """It comes once a step, reads all micro-batches, and its states wait; nothing else changes."""
    student, processor = tiny
    expected, kept = one_step(tiny, records, micro_batch_tokens=200)
    turns = []
    monkeypatch.setattr(offload, "carry", lambda x, device: turns.append(device) or x.clone())
    found, again = one_step(tiny, records, micro_batch_tokens=200, offload_teacher=True)
    assert found["loss"] == expected["loss"]
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    assert len(turns) == len(list(student.model.parameters())) - sum(
        "cue" in n for n, _ in student.model.named_parameters()) + len(list(student.buffers()))


def test_step_samples_differ_between_steps_and_repeat_for_one(tiny, records):
    """PITFALLS 22 and 25: draws come from (seed, step), so a resumed run repeats them exactly."""
    student, processor = tiny
    prompts = [processor.prompt(records[0])] * 8
    hot = config(temperature=3.0)
    first = rows_of(student, processor, prompts, hot, seed=1).ids
    assert torch.equal(first, rows_of(student, processor, prompts, hot, seed=1).ids)
    other = rows_of(student, processor, prompts, hot, seed=2).ids
    assert first.shape != other.shape or not torch.equal(first, other)
    assert len({tuple(row.tolist()) for row in first}) > 4


def test_sample_in_parts_changes_no_token(tiny, records):
    """Rows draw from numbers of their own: how a step is cut (by memory, by ranks) is not seen."""
    student, processor = tiny
    prompts = [processor.prompt(r) for r in records[:5]]
    whole = rows_of(student, processor, prompts, config(temperature=1.5), seed=0)
    parts = rows_of(student, processor, prompts,
                               config(temperature=1.5, sample_batch=2), seed=0)
    assert torch.equal(whole.ids, parts.ids) and torch.equal(whole.lengths, parts.lengths)


def test_several_samples_of_a_prompt_are_averaged(tiny, records):
    """Two responses a prompt: sampled as by prompts given twice, and a mean over all twelve."""
    student, processor = tiny
    prompts = [processor.prompt(r) for r in records[:6]]
    twice, cut = config(samples_per_prompt=2), config(samples_per_prompt=2, sample_batch=5)
    doubled = [p for p in prompts for _ in range(2)]
    rollout = rows_of(student, processor, prompts, twice, seed=0)
    again = rows_of(student, processor, doubled, config(sample_batch=12), seed=0)
    parts = rows_of(student, processor, prompts, cut, seed=0)
    assert len(rollout.ids) == 12 and rollout.ids.tolist() == again.ids.tolist()
    assert rollout.ids.tolist() == parts.ids.tolist()
    one, a = one_step(tiny, [r for r in records[:3] for _ in range(2)], sample_batch=12)
    two, b = one_step(tiny, records[:3], samples_per_prompt=2)
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=2e-3, atol=2e-6)


def test_micro_batches_cover_all_rows_within_the_budget(tiny, records):
    student, processor = tiny
    prompts = [processor.prompt(r) for r in records]
    hinted = [processor.prompt(r, r["cue"]) for r in records]
    rollout = rows_of(student, processor, prompts, config(sample_batch=24), seed=0)
    responses = [ids[:n].tolist() for ids, n in zip(rollout.ids, rollout.lengths)]
    groups = distill.micro_batches(prompts, hinted, responses, 300)
    assert sorted(row for group in groups for row in group) == list(range(24))
    assert len(groups) > 1
    for group in groups:
        longest = max(len(hinted[row].ids) + int(rollout.lengths[row]) for row in group)
        assert len(group) == 1 or longest * len(group) <= 300


def test_batches_read_every_record_once_an_epoch():
    data = [{"id": n} for n in range(10)]
    seen = [r["id"] for step in range(5) for r in distill.batch_of(data, step, 4, seed=0)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:] != list(range(10))
    assert seen[4:8] == [r["id"] for r in distill.batch_of(data, 1, 4, seed=0)]


def test_hints_are_counted_as_whole_words_in_any_case():
    """Table 8 of the paper: rows with the word, and how often it stands there."""
    texts = ["The [hint] says: HINT", "hints are hinting", "no"]
    got = distill.metrics_of(1, [distill.Sums()], [
        {"response": text, "length": n, "stopped": stopped}
        for text, n, stopped in zip(texts, (2, 1, 2), (True, True, False))])
    assert (got["hint_rows"], got["hint_count"]) == (1, 2)
    assert got["length"] == pytest.approx(5 / 3) and got["cut_off"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("train, moving", [
    ("all", "visual"), ("language", "language"), ("cue", "cue")])
def test_only_the_chosen_weights_are_trained(tiny, train, moving):
    student, _ = tiny
    cue_recovery.attach(student, every=2)
    names = [name for name, _ in distill.choose_weights(student, train)]
    kinds = {"visual": any(".visual." in n for n in names),
             "language": any("language_model" in n for n in names),
             "cue": any("cue_recovery" in n for n in names)}
    assert kinds[moving] and kinds["cue"]
    assert kinds["visual"] == (train == "all") and kinds["language"] == (train != "cue")
    assert len(names) == len(set(names)) and "lm_head.weight" not in names   # tied: once


# ---------------------------------------------------------------------------- the command line

def test_an_unknown_flag_is_an_error(capsys):
    with pytest.raises(SystemExit):
        distill.read_config(["--learning-rate", "1"])
    assert "--learning-rate" in capsys.readouterr().err


def test_the_toy_settings_hold_for_the_tiny_student_only():
    toy_run, _ = distill.read_config(["--lr", "0.25"])
    real, _ = distill.read_config(["--student", "Qwen/Qwen3-VL-2B-Instruct"])
    assert toy_run.lr == 0.25 and toy_run.steps == distill.TOY["steps"]
    assert real.lr == 1e-6 and real.batch_size == 128 and real.steps == 275


def test_a_shortened_flag_counts_as_typed():
    """argparse takes --step for --steps; the toy's own value must not win over it."""
    shortened, _ = distill.read_config(["--step", "7", "--no-cue", "--clip=2"])
    assert (shortened.steps, shortened.cue_recovery, shortened.clip) == (7, False, 2.0)


@pytest.mark.parametrize("argv, message", [
    (["--student", "Qwen/No-Such-Model"], "the tiny default"),
    (["--student", "/no/such/folder"], "the tiny default"),
    (["--data", "/no/such/file.jsonl"], "/no/such/file.jsonl"),
    (["--max-prompt-tokens", "3"], "--max-prompt-tokens"),
    (["--teacher", "/no/such/folder"], "/no/such/folder"),
])
def test_wrong_input_gets_one_line(argv, message, tmp_path, monkeypatch, toy_folder):
    monkeypatch.chdir(tmp_path)
    data = [] if "--data" in argv else ["--data", str(toy_folder / "train.jsonl")]
    with pytest.raises(SystemExit) as stop:
        distill.main([*argv, *data])
    text = str(stop.value)
    assert message in text and "\n" not in text


def test_a_teacher_with_a_view_reads_its_own_pictures(tiny, records):
    """Student and teacher are one model, so only the other pictures make a loss: those of the next
    record. With the frozen tower, which reads each picture once, it is the same loss."""
    other = [{**r, "teacher_images": of["images"]} for r, of in zip(records, records[1:])]
    same = [{**r, "teacher_images": r["images"]} for r in records[:6]]
    assert abs(one_step(tiny, same, privilege="view")[0]["loss"]) < 1e-5
    _, processor = tiny
    prompts, hinted = distill.read_prompts(processor, other[:6], "view+cue")
    for n, (mine, its) in enumerate(zip(prompts, hinted)):
        assert torch.equal(mine.pixels, processor.prompt(records[n]).pixels)
        assert torch.equal(its.pixels, processor.prompt(records[n + 1]).pixels)
        assert "[Hint]: " + records[n]["cue"] in processor.decode(its.ids)
    seen, _ = one_step(tiny, other, privilege="view")
    once, _ = one_step(tiny, other, privilege="view", train="language")
    assert seen["loss"] > 0.05 and once["loss"] == pytest.approx(seen["loss"], rel=1e-5)


def test_dev_records_choose_the_best_student(toy_folder, tmp_path, monkeypatch, capsys):
    """Chosen by the test records, the best of many evaluations is better there than it is."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(toy_folder, "w")
    toy.add_dev(tmp_path / "w", count=6)
    asked, ask = [], distill.evaluate_on

    def evaluate_on(model, processor, test, config, scale, *more, **named):
        rows, summary = ask(model, processor, test, config, scale, *more, **named)
        kinds = {record["id"].split("-")[1] for record in test}
        asked.append((*kinds, len(test)))
        # a dev accuracy that is never that of the test records
        return rows, summary if kinds == {"test"} else {**summary, "accuracy": 0.9 - len(asked) / 99}
    monkeypatch.setattr(distill, "evaluate_on", evaluate_on)
    distill.main(["--data", "w/train.jsonl", *SMALL, "--name", "d", "--steps", "2", "--keep", "1",
                  "--eval-every", "1", "--before-limit", "4", "--max-new-tokens", "2"])
    assert asked == [("test", 4), ("test", 4), ("dev", 6), ("test", 8), ("dev", 6)]
    said, folder = capsys.readouterr().out, tmp_path / "runs" / "d"
    result = json.loads((folder / "result.json").read_text())
    assert result["best"] == {"step": 1, "accuracy": 0.9 - 3 / 99, "split": "dev", "folder": "best"}
    assert "best of 2 evaluations on the dev records: step 1" in said
    assert "6 dev records from" in said and "no dev records" not in said
    metrics = checkpoint.read_jsonl(folder / "metrics.jsonl")
    assert [m.get("accuracy") for m in metrics] == [0.9 - 3 / 99, 0.9 - 5 / 99]
    assert json.loads((folder / "best" / "evaluation.json").read_text())["n"] == 6
    report.main(["runs/d", "--records", "0"])
    assert "between the ends on the dev records" in (folder / "report.html").read_text()


def test_a_run_with_a_view(tmp_path, monkeypatch, capsys):
    """Before, during and after; the page of the run; and a record that lacks its view."""
    monkeypatch.chdir(tmp_path)
    toy.write("w", 8, 4, views="masked")
    distill.main(["--data", "w/train.jsonl", "--name", "v", *SMALL, "--steps", "1",
                  "--privilege", "view"])
    assert "(privilege: view)" in capsys.readouterr().out
    report.main(["runs/v", "--records", "2", "--device", "cpu"])
    page = (tmp_path / "runs" / "v" / "report.html").read_text()
    assert "other pictures" in page and page.count("Picture 1 as the teacher sees it") == 2
    text = (tmp_path / "w" / "train.jsonl").read_text()
    (tmp_path / "w" / "train.jsonl").write_text(text.replace("teacher_images", "x", 1))
    monkeypatch.setattr(distill, "build_models", None)
    with pytest.raises(SystemExit, match="w/train.jsonl:1: .*'teacher_images'"):
        distill.main(["--data", "w/train.jsonl", "--privilege", "view"])


def test_a_record_without_its_privilege_is_refused_before_training(
        toy_folder, tmp_path, monkeypatch):
    """PITFALLS 27: a teacher that falls back to the plain prompt has KL 0 and teaches nothing."""
    monkeypatch.chdir(tmp_path)
    lines = (toy_folder / "train.jsonl").read_text().splitlines()
    broken = json.loads(lines[2])
    del broken["cue"]
    data = toy_folder / "broken.jsonl"
    data.write_text("\n".join([*lines[:2], json.dumps(broken), *lines[3:]]))
    with pytest.raises(SystemExit, match=r"broken.jsonl:3: .*cue"):
        distill.main(["--data", str(data), "--eval-data", str(toy_folder / "test.jsonl")])


def other_vocabulary(folder, target):
    """A checkpoint like the tiny one whose tokenizer swaps two tokens: same size, other meaning."""
    import shutil
    shutil.copytree(folder, target)
    tokenizer = json.loads((target / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["red"], vocab["blue"] = vocab["blue"], vocab["red"]
    (target / "tokenizer.json").write_text(json.dumps(tokenizer))
    return target


def test_a_teacher_that_swaps_two_words_is_refused(tmp_path, monkeypatch, toy_folder):
    """PITFALLS 4: equal vocabulary sizes are not enough, ids must mean the same."""
    monkeypatch.chdir(tmp_path)
    other = other_vocabulary(qwen.TINY, tmp_path / "other")
    with pytest.raises(SystemExit, match="name 2 tokens differently"):
        distill.main(["--teacher", str(other), "--data", str(toy_folder / "train.jsonl")])


# ---------------------------------------------------------------------------- whole runs

SMALL = ["--batch-size", "4", "--sample-batch", "4", "--max-new-tokens", "8", "--eval-limit", "8",
         "--save-every", "1", "--eval-every", "2", "--device", "cpu"]


def command(toy_folder, name, *more):
    return ["--data", str(toy_folder / "train.jsonl"), "--name", name, *SMALL, *more]


def losses(folder):
    return [m["loss"] for m in checkpoint.read_jsonl(folder / "metrics.jsonl")]


def test_a_run_leaves_all_that_it_promises(toy_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    distill.main(command(toy_folder, "a", "--steps", "3"))
    printed, folder = capsys.readouterr().out, tmp_path / "runs" / "a"
    result = json.loads((folder / "result.json").read_text())
    assert {"base_accuracy", "teacher_accuracy", "student_accuracy", "student_interval",
            "student_grounded", "student_hint_count", "n", "seconds"} <= result.keys()
    assert result["n"] == 8
    cue = cue_recovery.read_settings(folder / "checkpoint" / qwen.CUE_FILE)
    blocks, size = len(cue["layers"]), cue["hidden"]
    assert result["parameters_added"] == blocks * (4 * size**2 + 2 * size)  # and two RMSNorm gains
    metrics = checkpoint.read_jsonl(folder / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3] and "accuracy" in metrics[1]
    assert {"loss", "gap_front", "gap_back", "entropy", "length", "cut_off", "hint_rows",
            "hint_count", "gradient_norm", "skipped",
            "sample_tokens_per_second"} <= metrics[0].keys()
    assert [r["step"] for r in checkpoint.read_jsonl(folder / "rollouts.jsonl")] == [2] * 4 + [3] * 4
    assert "| student" in printed and "--model" in printed
    assert "no dev records (--dev-data): evaluations inside the run" in printed
    assert "best of 2 evaluations on the test records" in printed
    assert result["best"]["split"] == "test"
    from transformers import AutoModelForImageTextToText
    AutoModelForImageTextToText.from_pretrained(folder / "checkpoint")
    # evaluate.py gives the same number again, from the checkpoint alone
    evaluate.main(["--model", str(folder / "checkpoint"), "--out", str(tmp_path / "rows.jsonl"),
                   "--device", "cpu"])
    rows = checkpoint.read_jsonl(tmp_path / "rows.jsonl")
    assert sum(r["correct"] for r in rows) / len(rows) == result["student_accuracy"]
    # and the folder is not overwritten by a second run of that name
    with pytest.raises(SystemExit, match="exists"):
        distill.main(command(toy_folder, "a", "--steps", "3"))


@pytest.mark.parametrize("more", [
    ("--teacher", "ema", "--privilege", "answer"),
    ("--teacher", str(qwen.TINY), "--privilege", "rationale", "--loss", "sampled",
     "--train", "language", "--offload-teacher", "--offload-optimizer"),
    ("--no-cue-recovery", "--loss", "jsd", "--gradient-checkpointing", "--graph-decoding"),
    ("--train", "cue", "--loss", "reverse_kl", "--dtype", "bfloat16")])
def test_other_settings_run(toy_folder, tmp_path, monkeypatch, more):
    monkeypatch.chdir(tmp_path)
    distill.main(command(toy_folder, "b", "--steps", "1", *more))
    folder = tmp_path / "runs" / "b"
    assert math.isfinite(losses(folder)[0])
    assert (folder / "checkpoint" / qwen.CUE_FILE).exists() == ("--no-cue-recovery" not in more)


def test_an_averaged_teacher_cannot_be_offloaded(toy_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="--offload-teacher: an averaged teacher changes"):
        distill.main(["--teacher", "ema", "--offload-teacher", "--data",
                      str(toy_folder / "train.jsonl")])


def test_the_warning_when_the_privilege_changes_nothing(toy_folder, tmp_path, monkeypatch, capsys):
    """PITFALLS 27: print teacher accuracy with privilege, and warn when it is that of the base."""
    monkeypatch.chdir(tmp_path)
    lines = [json.loads(line) for line in (toy_folder / "train.jsonl").read_text().splitlines()]
    data = toy_folder / "useless.jsonl"
    data.write_text("".join(json.dumps({**r, "cue": "."}) + "\n" for r in lines))
    distill.main(["--data", str(data), "--eval-data", str(data), "--name", "w", *SMALL,
                  "--steps", "1", "--max-new-tokens", "1"])
    said = capsys.readouterr().out
    assert "WARNING: the privilege" in said and "is trained on and is the test" in said


def test_five_non_finite_steps_end_the_run(toy_folder, tmp_path, monkeypatch):
    """PITFALLS 29: a skipped step is counted and logged; a run of them is not trained through."""
    monkeypatch.chdir(tmp_path)

    original = distill.response_states
    monkeypatch.setattr(distill, "response_states", lambda *a: original(*a) * float("nan"))
    with pytest.raises(SystemExit, match="five times.*--resume runs/n"):
        distill.main(command(toy_folder, "n", "--steps", "9"))
    metrics = checkpoint.read_jsonl(tmp_path / "runs" / "n" / "metrics.jsonl")
    assert [m["skipped"] for m in metrics] == [1, 1, 1, 1]


def start(arguments, cwd):
    # as many threads as here: another number adds up in another order
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen([sys.executable, str(ROOT / "distill.py"), *arguments], cwd=cwd,
                            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True)


def wait_for_steps(folder, count, process):
    deadline = time.time() + 120
    while len(checkpoint.read_jsonl(folder / "metrics.jsonl")) < count:
        assert process.poll() is None, process.stdout.read()
        assert time.time() < deadline, "the run does not get on"
        time.sleep(0.02)


def test_a_killed_and_a_stopped_run_resume_to_the_same_losses(toy_folder, tmp_path, monkeypatch):
    """PITFALLS 22: SIGKILL at some moment, then Ctrl-C, then to the end: one sequence of losses."""
    monkeypatch.chdir(tmp_path)
    arguments = ["--steps", "9", "--teacher", "ema"]
    folder = tmp_path / "runs" / "cut"
    process = start(command(toy_folder, "cut", *arguments, "--save-every", "2"), tmp_path)
    distill.main(command(toy_folder, "whole", *arguments))      # while the other one imports torch
    wait_for_steps(folder, 3, process)
    time.sleep(random.Random().random() * 0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process = start(["--resume", str(folder)], tmp_path)
    wait_for_steps(folder, 5, process)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    if process.returncode != 0:        # else it was already at the end when the signal came
        assert process.returncode == 130 and f"--resume {folder}" in said
    distill.main(["--resume", str(folder)])
    assert losses(folder) == losses(tmp_path / "runs" / "whole")
    a, b = (qwen.load(tmp_path / "runs" / n / "checkpoint")[0].state_dict()
            for n in ("whole", "cut"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_resume_takes_no_other_settings(tmp_path, capsys):
    with pytest.raises(SystemExit):
        distill.read_config(["--resume", str(tmp_path), "--lr", "1"])
    assert "leave out lr" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        distill.read_config(["--resume", str(tmp_path / "none")])
    assert "args.json does not exist" in capsys.readouterr().err


def test_swapped_pictures_change_both_models(tiny, records):
    """PITFALLS 12: an engine that never loads the vision weights still shows a falling loss."""
    student, processor = tiny
    teacher = teaching.frozen_copy(student)
    a, b = dict(records[0]), dict(records[0], images=records[1]["images"])
    same_size = [r for r in records[1:] if r["images"][0].size == a["images"][0].size]
    b["images"] = same_size[0]["images"]
    for model in (student, teacher):
        model.requires_grad_(False)
        one, two = (model(**processor.batch([processor.prompt(r)])).logits[0, -1] for r in (a, b))
        assert float((one - two).abs().max()) > 1e-3


def test_sampled_vision_ids_are_impossible(tiny, records):
    """PITFALLS 6: even a student that wants nothing else never says <|image_pad|>."""
    student, processor = tiny
    student.config.text_config.tie_word_embeddings = False
    head = torch.nn.Linear(*reversed(student.lm_head.weight.shape), bias=True)
    torch.nn.init.zeros_(head.weight)
    head.bias.data.fill_(-9.0)
    head.bias.data[[processor.image_id, processor.video_id]] = 90.0
    student.lm_head = head
    batch = processor.batch([processor.prompt(r) for r in records[:4]])
    got = sample(student, batch, max_new_tokens=16, stop_ids=processor.stop_ids,
                 banned_ids=processor.banned_ids, generator=torch.Generator().manual_seed(0))
    assert not torch.isin(got.ids, torch.tensor([processor.image_id, processor.video_id])).any()


def test_the_time_left_counts_steps_and_evaluations(tmp_path):
    """The bar's own guess took one evaluation amid ten steps for slow steps to come."""
    settings = config(steps=10, eval_every=5)
    log = longrun.Log(tmp_path, settings, evaluation=60.0)
    step = {"step": 4, "sample_seconds": 10.0, "score_seconds": 20.0}
    assert log.time_left(step) == "05:00"              # six steps, one evaluation amid and one last
    assert log.time_left({**step, "step": 10}) == "01:00"


def test_adapters_train_and_are_merged_into_the_checkpoint(toy_folder, tmp_path, monkeypatch):
    """One backbone is both models; the checkpoint is a plain one, the adapters stand beside it."""
    monkeypatch.chdir(tmp_path)
    distill.main(command(toy_folder, "l", "--steps", "2", "--train", "lora", "--lora-rank", "2",
                         "--gradient-checkpointing"))
    folder = tmp_path / "runs" / "l" / "checkpoint"
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["r"] == 2
    student, _ = qwen.load(folder, device="cpu")
    base, _ = qwen.load(qwen.TINY, device="cpu")
    before, after = base.state_dict(), student.state_dict()
    changed = {n for n, w in before.items() if not torch.equal(w, after[n])}
    assert changed and all(n.rsplit(".", 2)[1].endswith("_proj") for n in changed)
    assert not any(".visual." in n for n in changed) and not any("lora" in n for n in after)
    whole = losses(tmp_path / "runs" / "l")
    # a resumed run takes up adapters and moments
    distill.main(command(toy_folder, "m", "--steps", "1", "--train", "lora", "--lora-rank", "2"))
    distill.main(["--resume", "runs/m", "--steps", "2"])
    assert losses(tmp_path / "runs" / "m")[0] == pytest.approx(whole[0])


def test_half_the_rows_when_memory_runs_out_and_then_one_line(toy_folder, tmp_path, monkeypatch,
                                                              capsys):
    """The error came after both evaluations, as a traceback, and --resume refused smaller sizes."""
    monkeypatch.chdir(tmp_path)
    original, sizes = distill.training_step, []

    def small_memory(*arguments):
        sizes.append((arguments[5].sample_batch, arguments[5].micro_batch_tokens))
        if len(sizes) in (2, 4):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return original(*arguments)

    distill.main(command(toy_folder, "plain", "--steps", "2"))
    monkeypatch.setattr(distill, "training_step", small_memory)
    arguments = command(toy_folder, "o", "--micro-batch-tokens", "1000")
    with pytest.raises(SystemExit, match="^distill.py: out of memory .*: python distill.py --resume "
                       "runs/o --sample-batch 1 --micro-batch-tokens 250"):
        distill.main([*arguments, "--steps", "3"])
    assert sizes == [(4, 1000), (4, 1000), (2, 500), (2, 500)]
    assert "going on with --sample-batch 2" in capsys.readouterr().out
    assert losses(tmp_path / "runs" / "o") == pytest.approx(losses(tmp_path / "runs" / "plain"),
                                                            rel=1e-4)


def test_a_privilege_can_be_measured_without_sampling(toy_folder, tmp_path, monkeypatch, capsys):
    """Generating would need the whole 32B on every GPU; scoring the right answer needs a slice."""
    monkeypatch.chdir(tmp_path)
    distill.main(command(toy_folder, "p", "--steps", "1", "--score-privilege", "--privilege",
                         "answer"))
    before = json.loads((tmp_path / "runs" / "p" / "before.json").read_text())
    assert before["teacher"].keys() == {"answer_gain"} and before["teacher"]["answer_gain"] > 1
    out = capsys.readouterr().out
    assert "| student" in out and "| teacher" not in out
    report.main(["runs/p", "--records", "0"])
    compare.main(["runs/p"])
