"""analysis/baselines.py: each baseline's gradient against its formula, one answer at a time."""
import doctest
import json
import statistics

import pytest
import torch

import cue_recovery
import distill
import evaluate
import teacher as teaching
from analysis import baselines, report
from loss import forward_kl
from rollout import PlainDecoder
from scale import checkpoint
from test_distill import KeepGradients, config


def one_step(method, tiny, records, **changes):
    """(sums, rollout, gradients, student, teacher) of a step that updates nothing, plain parts."""
    student, processor = tiny
    teacher = teaching.frozen_copy(student)
    cue_recovery.attach(student, every=2)
    settings, keep = config(batch_size=len(records), **changes), KeepGradients(student)
    sums, rollout = method(student, teacher, processor, records,
                           distill.uniform_numbers(settings, 0), settings, 0, keep, distill.Scale())
    return sums, rollout, keep.kept, student, teacher


def log_probs(model, processor, record, hint, response):
    """(T, V) log p of the tokens of one response, read alone, by the class's own forward."""
    prompt = processor.prompt(record, hint)
    prompt.ids = prompt.ids + response
    batch = processor.batch([prompt])
    cue = getattr(model, "cue_recovery", None)
    end = torch.tensor([len(prompt.ids) - len(response)])
    with cue.prompt(end) if cue else torch.no_grad():
        logits = model(**batch, use_cache=False).logits
    return logits[0, -len(response) - 1:-1].log_softmax(-1)


def assert_gradients(student, found: dict, loss) -> None:
    student.zero_grad()
    loss.backward()
    expected = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    assert any(g.abs().max() > 1e-3 for g in expected.values())
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=2e-3, atol=2e-6)


# ---------------------------------------------------------------------------- supervised

def test_supervised_is_the_kl_on_the_teachers_own_answers(tiny, records):
    """The answers are the hinted teacher's; the student reads them behind its own prompt."""
    processor, batch = tiny[1], records[:3]
    sums, rollout, kept, student, teacher = one_step(baselines.supervised, tiny, batch)
    hinted = [processor.prompt(r, r["cue"]) for r in batch]
    settings = config(batch_size=3)
    same = distill.sample_responses(teacher, processor, hinted,
                                    distill.uniform_numbers(settings, 0), settings, PlainDecoder)
    assert rollout.ids.tolist() == same.ids.tolist()
    loss = 0.0
    for record, ids, n in zip(batch, same.ids.tolist(), same.lengths.tolist()):
        log_p = log_probs(student, processor, record, None, ids[:n])
        with torch.no_grad():
            log_q = log_probs(teacher, processor, record, record["cue"], ids[:n])
        loss = loss + forward_kl(log_p, log_q).mean() / 3
    assert sums.loss == pytest.approx(float(loss.detach()), rel=1e-4)
    assert_gradients(student, kept, loss)


def test_supervised_without_privilege_teaches_nothing(tiny, records):
    """Student and teacher are one model then: the loss and every gradient are zero."""
    sums, _, kept, *_ = one_step(baselines.supervised, tiny, records[:3], privilege="none")
    assert abs(sums.loss) < 1e-5 and max(float(g.abs().max()) for g in kept.values()) < 1e-5


def test_the_supervising_teacher_answers_without_the_module(tiny, records):
    """--train cue: the teacher is the student, whose module must be off while it answers."""
    student, processor = tiny
    plain = teaching.frozen_copy(student)
    cue_recovery.attach(student, every=2, sink="last")
    for name, weight in student.named_parameters():
        if name.startswith("cue_recovery."):
            torch.nn.init.normal_(weight)
    settings = config(batch_size=3, train="cue", temperature=2.0)
    arguments = (processor, records[:3], distill.uniform_numbers(settings, 0), settings, 0,
                 KeepGradients(student), distill.Scale())
    drawn = [baselines.supervised(student, teacher, *arguments)[1].ids.tolist()
             for teacher in (student, plain)]
    prompts = [processor.prompt(r, r["cue"]) for r in records[:3]]
    with_it = distill.sample_responses(student, processor, prompts, arguments[2], settings,
                                       PlainDecoder).ids.tolist()
    assert drawn[0] == drawn[1] != with_it


# ---------------------------------------------------------------------------- grpo

def graded(monkeypatch, *verdicts):
    """The grader's verdicts, one an answer in their order."""
    verdicts = iter(verdicts)
    monkeypatch.setattr(evaluate, "judge", lambda *a: {"correct": bool(next(verdicts))})


@pytest.mark.parametrize("budget", [1, 100_000])
def test_grpo_is_the_textbook_gradient(tiny, records, monkeypatch, budget):
    """-A / |y| grad log p(y), the mean over all answers; however micro-batches are cut."""
    rewards, processor = [[1, 0, 0], [0, 1, 1], [1, 1, 1]], tiny[1]
    graded(monkeypatch, *sum(rewards, []))
    sums, rollout, kept, student, _ = one_step(baselines.grpo, tiny, records[:3],
                                               samples_per_prompt=3, micro_batch_tokens=budget)
    assert sums.extra == {"reward": pytest.approx(6 / 9), "informative": pytest.approx(2 / 3)}
    loss, answers = 0.0, zip(rollout.ids.tolist(), rollout.lengths.tolist())
    for record, group in zip(records, rewards):
        for reward in group:
            ids, n = next(answers)
            A = (reward - statistics.mean(group)) / (statistics.stdev(group) + 1e-4)
            log_p = log_probs(student, processor, record, None, ids[:n])
            chosen = log_p[torch.arange(n), torch.tensor(ids[:n])]
            loss = loss - A * chosen.sum() / n / 9
    assert sums.loss == pytest.approx(float(loss.detach()), rel=1e-4)
    assert_gradients(student, kept, loss)


def test_doctests():
    assert doctest.testmod(baselines) == (0, 1)


def test_equal_rewards_say_nothing(tiny, records, monkeypatch):
    graded(monkeypatch, 1, 1, 0, 0)
    sums, _, kept, *_ = one_step(baselines.grpo, tiny, records[:2], samples_per_prompt=2)
    assert sums.extra == {"reward": 0.5, "informative": 0.0}
    assert kept and all(not g.any() for g in kept.values())


def test_the_reward_is_what_the_evaluation_counts(tiny, records):
    processor, batch = tiny[1], records[:6]
    sums, rollout, *_ = one_step(baselines.grpo, tiny, batch, samples_per_prompt=2,
                                 max_new_tokens=64)
    texts = [processor.decode(ids[:n]) for ids, n in zip(rollout.ids.tolist(),
                                                         rollout.lengths.tolist())]
    right = [evaluate.grade(text, batch[n // 2]["answer"]).correct for n, text in enumerate(texts)]
    assert 0 < sum(right) < 12 and sums.extra["reward"] == pytest.approx(sum(right) / 12)


@pytest.mark.parametrize("method, changes, message", [
    (baselines.grpo, {}, "--samples-per-prompt is 1"),
    (baselines.supervised, {"loss": "sampled"}, "choose another --loss")])
def test_settings_that_a_method_cannot_use_are_refused(method, changes, message):
    with pytest.raises(ValueError, match=message):
        method(*[None] * 5, config(**changes), 0, None, None)


# ---------------------------------------------------------------------------- whole runs

@pytest.mark.parametrize("method, other", [("supervised", "grpo"), ("grpo", "supervised")])
def test_a_run_keeps_its_method(method, other, toy_folder, tmp_path, monkeypatch, capsys):
    """It is logged, a resumed run goes on with it, and any other script names the right command."""
    monkeypatch.chdir(tmp_path)
    baselines.main([method, "--data", str(toy_folder / "train.jsonl"), "--name", "a", "--steps",
                    "1", "--batch-size", "2", "--samples-per-prompt", "2", "--max-new-tokens", "8",
                    "--eval-limit", "4", "--eval-every", "0", "--device", "cpu"])
    assert json.loads((tmp_path / "runs/a/args.json").read_text())["method"] == method
    right = f"python analysis/baselines.py {method} --resume runs/a"
    for wrong in (distill.main, lambda argv: baselines.main([other, *argv])):
        with pytest.raises(SystemExit):
            wrong(["--resume", "runs/a"])
        assert capsys.readouterr().err.splitlines()[-1].endswith(f"go on with {right}")
    baselines.main([method, "--resume", "runs/a", "--steps", "2"])
    rows = checkpoint.read_jsonl(tmp_path / "runs/a/metrics.jsonl")
    assert [m["step"] for m in rows] == [1, 2]
    assert {"loss", "entropy", "length", "hint_rows", "tokens"} <= rows[1].keys()
    # what was not measured is null: grpo asks no teacher, supervised no grader
    assert [("reward" in m, m["gap_front"] is None) for m in rows] == [(method == "grpo",) * 2] * 2
    assert report.read_run("runs/a").command.startswith(f"python analysis/baselines.py {method} --")


def test_an_error_names_the_script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="^analysis/baselines.py supervised: nowhere.jsonl: no"):
        baselines.main(["supervised", "--data", "nowhere.jsonl"])
    for wrong, said in ((["grpo"], "--samples-per-prompt is 1"),
                        (["supervised", "--loss", "sampled"], "choose another --loss")):
        with pytest.raises(SystemExit, match=f"^baselines.py: .*{said}"):
            baselines.main([*wrong, "--name", "x"])
    assert not (tmp_path / "runs" / "x").exists()        # refused before there is a folder


def test_a_method_must_be_named():
    for argv in ([], ["--steps", "1"]):
        with pytest.raises(SystemExit, match="expected supervised or grpo"):
            baselines.main(argv)
