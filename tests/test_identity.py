"""identity.py: one folder is one run's, and a resumed run is the same run or is refused by name."""
import json
import os
import re
import shutil
import signal
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import distill
import evaluate
import model as qwen
from data import records as record_files, toy
from scale import checkpoint, identity

SMALL = ["--batch-size", "2", "--sample-batch", "2", "--max-new-tokens", "3", "--eval-limit", "2",
         "--save-every", "1", "--eval-every", "0", "--steps", "1", "--device", "cpu"]


@pytest.fixture
def world(toy_folder, tmp_path, monkeypatch):
    """An empty folder to run in, with records and a start checkpoint of its own."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(toy_folder, tmp_path / "data")
    shutil.copytree(qwen.TINY, tmp_path / "start")
    return tmp_path


def begin(*more):
    distill.main(["--data", "data/train.jsonl", "--student", "start", "--name", "a",
                  "--attention", "eager", *SMALL, *more])


def refused(argv, capsys=None) -> str:
    """What is said by a run that does not start: one line."""
    with pytest.raises(SystemExit) as stop:
        distill.main(argv)
    said = str(stop.value) if stop.value.code != 2 else capsys.readouterr().err.splitlines()[-1]
    assert "\n" not in said
    return said


# ---------------------------------------------------------------------------- one owner

def test_a_second_run_in_a_folder_is_refused_before_it_loads_anything(world, monkeypatch):
    """Two runs of one name both ended with 0: metrics of both mixed, the last checkpoint won. So
    did two --resume, of which the second also forgot the lines that the first had just written."""
    begin()
    monkeypatch.setattr(distill.checks, "check_models", None)        # not reached
    before = sorted(os.listdir("runs/a"))
    assert "lock" not in before
    with identity.owned(Path("runs/a"), new=False):
        for argv in (["--resume", "runs/a", "--steps", "2"], ["--name", "a"]):
            assert f"runs/a is in use by process {os.getpid()} on" in refused(argv)
    assert sorted(os.listdir("runs/a")) == before


def test_a_killed_run_leaves_no_lock_behind(tmp_path):
    """A file with a process's number would: nobody removes it. The kernel's lock dies with it."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            with identity.owned(tmp_path / "a", new=True):
                os.write(writing, b"x")
                signal.pause()
        finally:
            os._exit(1)
    os.read(reading, 1)
    with pytest.raises(ValueError, match=f"in use by process {child} on"):
        identity.take_lock(tmp_path / "a" / "lock")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / "a" / "lock").exists()
    with identity.owned(tmp_path / "a", new=True):
        checkpoint.write_json(tmp_path / "a" / "args.json", {})
    assert os.listdir(tmp_path / "a") == ["args.json"]


def test_a_lock_removed_between_opening_and_locking_is_not_taken_for_one(tmp_path, monkeypatch):
    """The owner before removes its file as it leaves. Who had opened that file held a lock on a
    name that was gone, beside the next one's."""
    path, flock = tmp_path / "lock", identity.fcntl.flock

    def removed_first(file, how):
        monkeypatch.setattr(identity.fcntl, "flock", flock)
        path.unlink()
        flock(file, how)
    monkeypatch.setattr(identity.fcntl, "flock", removed_first)
    file = identity.take_lock(path)
    assert os.path.samestat(os.fstat(file.fileno()), path.stat())
    file.close()


def test_where_there_are_no_locks_a_run_says_so_and_goes_on(tmp_path, monkeypatch, capsys):
    def none(file, how):
        raise OSError(38, "Function not implemented")
    monkeypatch.setattr(identity.fcntl, "flock", none)
    with identity.owned(tmp_path / "a", new=True):
        assert "cannot be locked" in capsys.readouterr().out


def test_a_run_that_does_not_begin_leaves_no_folder(world):
    assert "none.jsonl" in refused(["--data", "none.jsonl", "--name", "a"])
    assert os.listdir("runs") == []


def test_runs_without_a_name_that_start_in_one_second_are_two(monkeypatch):
    names = set()
    for process in (1, 2):
        monkeypatch.setattr(os, "getpid", lambda: process)
        monkeypatch.setattr(distill.time, "strftime", lambda form: "2026-01-01-120000")
        names.add(distill.read_config([])[0].name)
    assert len(names) == 2


# ---------------------------------------------------------------------------- the same run

def test_a_resumed_run_refuses_what_changed_by_name(world):
    """Before and after were computed on different questions, and a gain was printed."""
    begin("--teacher", "start")
    resume = ["--resume", "runs/a", "--steps", "2"]
    for path, name in (("data/test.jsonl", "the test records"), ("data/train.jsonl",
                       "the training records"), ("start/config.json", "the start checkpoint")):
        old = Path(path).read_bytes()
        Path(path).write_bytes(old + b"\n")
        assert f"{name} changed: {world / path}".removesuffix("/config.json") in refused(resume)
        Path(path).write_bytes(old)
    weights = load_file("start/model.safetensors")
    weights["model.language_model.norm.weight"][3] += 1
    save_file(weights, "start/model.safetensors", metadata={"format": "pt"})
    said = refused(resume)             # as when a student is saved over its own start
    assert "the start checkpoint changed" in said and "the teacher changed" in said
    assert len(checkpoint.read_jsonl(Path("runs/a/metrics.jsonl"))) == 1


def test_the_digest_of_a_large_file_sees_training_and_a_cut(tmp_path, monkeypatch):
    """Sixteen blocks of it are read, not all; what training touches is everywhere in it."""
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    monkeypatch.setattr(identity, "BLOCK", 64)
    path, content = tmp_path / "model.safetensors", bytes(range(256)) * 64
    digests = set()
    for changed in (content, content[:-1], content + b"x", bytes(b ^ 1 for b in content),
                    b"x" + content[1:]):
        path.write_bytes(changed)
        digests.add(identity.checkpoint_digest(tmp_path))
    (tmp_path / "config.json").write_text("{ }")
    assert len(digests | {identity.checkpoint_digest(tmp_path)}) == 6


def test_moved_data_can_be_pointed_at_again_and_from_another_folder(world, monkeypatch, capsys):
    """Paths were stored as typed, so a run went on only from the folder where it began; and
    --resume refused --data, so records that had moved ended a run for good."""
    begin()
    args = json.loads(Path("runs/a/args.json").read_text())
    assert args["data"] == str(world / "data" / "train.jsonl") and args["digests"]["data"]
    assert args["student"] == str(world / "start") and args["teacher"] == "self"
    (world / "elsewhere").mkdir()
    monkeypatch.chdir(world / "elsewhere")
    run = str(world / "runs" / "a")
    distill.main(["--resume", run, "--steps", "2", "--sample-batch", "1",
                  "--micro-batch-tokens", "500"])
    (world / "data").rename(world / "moved")
    assert "no such record file" in refused(["--resume", run, "--steps", "3"])
    other = world / "moved" / "other.jsonl"
    other.write_text((world / "moved" / "train.jsonl").read_text() + "\n")
    assert "the training records changed" in refused(["--resume", run, "--data", str(other)])
    distill.main(["--resume", run, "--steps", "3", "--data", "../moved/train.jsonl"])
    args = checkpoint.read_run(Path(run))["args"]
    assert args["eval_data"] == str(world / "moved" / "test.jsonl")      # it had moved along
    assert (args["steps"], args["sample_batch"], args["micro_batch_tokens"]) == (3, 1, 500)
    assert len(checkpoint.read_jsonl(Path(run) / "metrics.jsonl")) == 3
    # fewer steps than are done were accepted, and stood in args.json then
    assert "--steps 2: " in (said := refused(["--resume", run, "--steps", "2"], capsys))
    assert said.endswith("runs/a has done 3 already")


def test_dev_records_are_the_runs_own(world):
    """Changed, gone or new since the run began: its choice of the best student goes on by the
    records that it began with, or not at all."""
    toy.add_dev(world / "data", count=3)
    begin("--eval-every", "1")
    args = json.loads(Path("runs/a/args.json").read_text())
    assert args["dev_data"] == str(world / "data" / "dev.jsonl") and args["digests"]["dev_data"]
    old = Path("data/dev.jsonl").read_text()
    Path("data/dev.jsonl").write_text(old + "\n")
    assert "the dev records changed" in refused(["--resume", "runs/a", "--steps", "2"])
    Path("data/dev.jsonl").unlink()
    assert "no such record file" in refused(["--resume", "runs/a", "--steps", "2"])
    (world / "data").rename(world / "moved")
    moved = ["--resume", "runs/a", "--data", "moved/train.jsonl"]
    assert distill.read_config(moved)[0].dev_data == ""         # looked for beside them
    assert "the dev records changed: test has the digest test" in refused(moved)
    args |= {"dev_data": "test", "digests": args["digests"] | {"dev_data": "test"}}
    checkpoint.write_json(Path("runs/a/args.json"), args)
    assert distill.read_config(moved)[0].dev_data == "test"
    Path("moved/dev.jsonl").write_text(old)
    assert "the dev records changed" in refused([*moved, "--dev-data", "moved/dev.jsonl"])


def test_the_run_of_an_older_version_goes_on(world, capsys):
    """Its args.json has no digests, fewer settings and paths as they were typed."""
    begin()
    args = checkpoint.read_run(Path("runs/a"))["args"]
    for name in ("check", "keep", "max_hours", "dev_data"):
        del args[name]
    toy.add_dev(world / "data", count=3)               # it has none, and chose by the test records
    args |= {"data": "data/train.jsonl", "eval_data": "data/test.jsonl", "student": "start"}
    checkpoint.write_json(Path("runs/a/args.json"), args)
    said = refused(["--resume", "runs/a", "--data", "data/train.jsonl"], capsys)
    assert "no digest to compare" in said
    distill.main(["--resume", "runs/a", "--steps", "2"])
    args = json.loads(Path("runs/a/args.json").read_text())
    assert args["digests"].keys() == identity.SOURCES.keys() and args["dev_data"] == "test"


@pytest.mark.parametrize("content, message", [
    ('{"steps": 3', "not valid JSON"), ("[]", "expected a JSON object"),
    ('{"step": 3}', "not the settings of a run of this version: step"),
    ('{"steps": "3"}', "--steps is '3', expected int"), ('{"lr": NaN}', "--lr is nan"),
    ('{"loss": "mse"}', "--loss is 'mse', none of"), ('{"keep": true}', "--keep is True"),
    ('{"digests": 1}', "digests"), ("{}", "it names no setting")])
def test_damaged_settings_are_one_line(content, message, world, capsys):
    Path("args.json").write_text(content)
    assert message in refused(["--resume", "."], capsys)


@pytest.mark.parametrize("argv", [["--temperature", "-1"], ["--top-p", "0"], ["--lr", "nan"],
                                  ["--eval-limit", "-3"], ["--seed", "9" * 20]])
def test_flags_out_of_range_are_one_line(argv, capsys):
    said = refused(argv, capsys)
    assert f"{argv[0]} is" in said and "expected" in said


def test_a_name_stays_below_runs(tmp_path, capsys):
    """`--name ../evil` wrote beside runs/."""
    for name in ("../evil", "a/../../evil", str(tmp_path), "."):
        assert "is no folder below runs/" in refused(["--name", name], capsys)
    assert distill.read_config(["--name", "grid/cue-0"])[0].name == "grid/cue-0"


def test_files_follow_the_umask(world):
    """Weights and state were 0600 under umask 022: a colleague could not read them."""
    for umask, mode in ((0o022, 0o644), (0o077, 0o600)):
        old = os.umask(umask)
        try:
            begin("--name", f"u{umask}")
        finally:
            os.umask(old)
        files = [p for p in Path(f"runs/u{umask}").rglob("*") if p.is_file()]
        assert len(files) > 10
        assert {stat.S_IMODE(p.stat().st_mode) for p in files} == {mode}


# ---------------------------------------------------------------------------- pictures, Ctrl-C, NaN

def test_text_only_records_cannot_train_the_module_alone(world):
    """--train cue on them trained nothing, without a warning: the module asks the picture."""
    rows = [json.loads(line) for line in Path("data/train.jsonl").read_text().splitlines()]
    checkpoint.write_jsonl(Path("data/text.jsonl"), [{**row, "images": []} for row in rows])
    said = refused(["--data", "data/text.jsonl", "--train", "cue"])
    assert "text.jsonl: no record has a picture" in said
    assert "--no-cue-recovery" in refused(["--train", "cue", "--no-cue-recovery"])


@pytest.mark.parametrize("teacher", ["self", "ema", str(distill.qwen.TINY)])
def test_a_teacher_that_is_the_student_and_told_nothing_is_refused(teacher):
    """It trained at a loss of zero, without a warning."""
    config = distill.Config(privilege="none", teacher=teacher)
    with pytest.raises(ValueError, match=f"--teacher {re.escape(teacher)}.*give a bigger --teacher"):
        distill.checks.check_models(config)


def test_a_teacher_that_is_a_copy_of_the_student_and_told_nothing_is_refused(world, tmp_path):
    """By its weights: it trained at a loss of zero, under another path."""
    shutil.copytree(qwen.TINY, tmp_path / "copy")
    said = refused(["--privilege", "none", "--teacher", str(tmp_path / "copy"), *SMALL])
    assert "holds the student's own weights" in said and "go on with" not in said


def test_settings_without_effect_are_said(capsys):
    idle = dict(lora_rank=4, ema_decay=0.5, every=2)
    distill.checks.check_models(distill.Config(cue_recovery=False, **idle))
    assert capsys.readouterr().out.splitlines() == [
        f"WARNING: --{name} has no effect without {flag}" for name, flag in (
            ("lora-rank", "--train lora"), ("ema-decay", "--teacher ema"),
            ("every", "--cue-recovery"))]
    distill.checks.check_models(distill.Config(train="lora", lora_rank=4))
    assert not capsys.readouterr().out


def test_a_picture_cut_short_is_found_before_a_weight_is_loaded(world, monkeypatch):
    """Its header is whole, so it passed; it ended the run at step 6, and every resume after it."""
    monkeypatch.setattr(distill, "build_models", None)
    path = record_files.load("data/test.jsonl")[0]["images"][0]
    Path(path).write_bytes(Path(path).read_bytes()[:-60])
    with pytest.raises(SystemExit, match="1 of .* pictures cannot be read(?s:.*)test.jsonl:1: "):
        distill.main(["--data", "data/train.jsonl"])


def test_a_picture_that_vanishes_ends_the_run_with_its_steps_saved(world, capsys):
    """And --resume goes on when it is back, reading the batch again: the metrics are those of a
    run that lost nothing."""
    more = ["--save-every", "100", "--steps", "4"]
    begin("--name", "whole", *more)
    config, _ = distill.read_config(["--resume", "runs/whole"])
    records = record_files.load("data/train.jsonl")
    gone = Path(distill.batch_of(records, 2, 2, config.seed)[0]["images"][0])
    read_prompts, away = distill.read_prompts, gone.with_suffix(".away")

    def vanish(*arguments):
        if gone.exists() and arguments[1][0]["images"][0] == str(gone):
            gone.rename(away)
        return read_prompts(*arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "read_prompts", vanish)
        with pytest.raises(SystemExit) as stop:
            begin(*more)
    assert f"cannot read picture {gone}" in str(stop.value)
    assert "the state after step 2 is saved, go on with" in str(stop.value)
    away.rename(gone)
    distill.main(["--resume", "runs/a"])
    a, whole = ([m["loss"] for m in checkpoint.read_jsonl(Path(f"runs/{n}/metrics.jsonl"))]
                for n in ("a", "whole"))
    assert a == whole and len(a) == 4


@pytest.mark.parametrize("place, saved", [
    ("build_models", "nothing is saved yet"), ("evaluate_before", "no state is saved"),
    ("run_step", "no state is saved"), ("finish", "the state after step 1 is saved")])
def test_ctrl_c_at_any_moment_is_one_line(place, saved, world, monkeypatch, capsys):
    """In the first evaluation it was a trace. During the steps the first one ends the run behind
    the step, and the second, which comes here, at once."""
    def interrupt(*arguments):
        raise KeyboardInterrupt
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(distill.longrun if place == "finish" else distill, place, interrupt)
        with pytest.raises(SystemExit, match="130"):
            begin()
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("distill.py: stopped") and saved in said
    assert Path("runs/a").exists() == (place != "build_models")
    assert place == "run_step" or signal.getsignal(signal.SIGINT) is handler
    signal.signal(signal.SIGINT, handler)
    if Path("runs/a").exists():
        assert "--resume runs/a" in said
        distill.main(["--resume", "runs/a"])
        assert Path("runs/a/result.json").exists()


def test_the_second_ctrl_c_ends_a_step_at_once():
    signals = distill.longrun.StopSignal()
    try:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signals.release()


def test_logits_that_are_no_numbers_name_the_step_and_leave_the_state(world, monkeypatch):
    """They were an IndexError in sampling, and 0 % in a greedy evaluation."""
    read_prompts = distill.read_prompts

    def spoil(processor, records, *more):
        if spoil.model is not None:
            with torch.no_grad():
                spoil.model.model.language_model.norm.weight.fill_(float("nan"))
        return read_prompts(processor, records, *more)
    spoil.model, loop = None, distill.longrun.Log.end_step

    def end_step(log, metrics, samples, ask, student, *more):
        spoil.model = student
        return loop(log, metrics, samples, ask, student, *more)
    with monkeypatch.context() as patch:
        patch.setattr(distill, "read_prompts", spoil)
        patch.setattr(distill.longrun.Log, "end_step", end_step)
        with pytest.raises(SystemExit, match=r"step 2: decoding step .*NaN.*the state after step 1"):
            begin("--steps", "3")
    distill.main(["--resume", "runs/a"])
    assert len(checkpoint.read_jsonl(Path("runs/a/metrics.jsonl"))) == 3
    weights = load_file("start/model.safetensors")
    weights["model.language_model.norm.weight"].fill_(float("nan"))
    save_file(weights, "start/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit, match="evaluation: decoding step .*NaN"):
        begin("--name", "b")
    with pytest.raises(SystemExit, match="^evaluate.py: .*NaN"):
        evaluate.main(["--model", "start", "--data", "data/test.jsonl", "--limit", "2"])


def test_a_clock_that_is_set_back_does_not_count(world, monkeypatch):
    """result.json had negative seconds when the clock was set while a run went on."""
    monkeypatch.setattr(distill.time, "time", iter(range(10**6, 0, -1000)).__next__)
    begin()
    assert 0 < json.loads(Path("runs/a/result.json").read_text())["seconds"] < 1000
