"""Long runs: killed before each write, on a full disk, ended by a limit; and using the result.

The disk changes only when a file is opened for writing, written by safetensors, renamed or removed.
So every kill has the same effect as a kill just before one of these calls (or leaves half a file
under a temporary name), and the calls can be counted. `runner` runs distill.py in forks of one
process that has imported it, since an import costs more than a run. A fork kills itself before its
n-th call.
"""
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


# ---------------------------------------------------------------------------- the forking process

def die(path=None) -> None:
    if path is not None:                    # in the middle of a safetensors file
        os.truncate(path, os.path.getsize(path) // 2)
    os.kill(os.getpid(), signal.SIGKILL)


def die_before(number: int) -> list:
    """Kill this process before its `number`-th write below runs/, with half of it written."""
    import safetensors.torch
    seen, write = [], safetensors.torch.serialize_file

    def hook(event, args):
        if event == "open":
            ours = "runs/" in str(args[0]) and set(str(args[1])) & set("wax")
        else:
            ours = event in ("os.rename", "os.remove", "os.rmdir")
        if ours:
            seen.append((event, str(args[0])))
            if len(seen) == number:
                die()

    def half(tensors, path, *args, **options):
        write(tensors, path, *args, **options)
        seen.append(("safetensors", str(path)))
        if len(seen) == number:
            die(path)
    safetensors.torch.serialize_file = half
    sys.addaudithook(hook)
    return seen


def limit_files(size: int) -> None:
    """No file may grow beyond `size` bytes: for a write this is the same as a full disk."""
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


LOADED = {}


def child(order: dict) -> int:
    os.chdir(order["cwd"])
    for number in (1, 2):
        os.dup2(os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    seen = die_before(order["die"]) if "die" in order else []
    if "limit" in order:
        limit_files(order["limit"])
    try:
        if "save" in order:
            distill.checkpoint.save_model(*LOADED[order["save"]], Path("runs") / "saved")
        else:
            distill.main(order["argv"])
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
        print(stop.code)
    except BaseException:
        code = 2
        traceback.print_exc()
    print(f"writes: {json.dumps(seen)}")
    sys.stdout.flush()
    return code


def serve() -> None:
    for line in sys.stdin:
        path = json.loads(line).get("save")
        if path and path not in LOADED:
            LOADED[path] = distill.qwen.load(path, device="cpu")
        pid = os.fork()
        if pid == 0:
            code = 3
            try:
                code = child(json.loads(line))
            finally:
                os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import distill          # noqa: F401  before the first fork, with what it imports late
    from transformers import Qwen3VLForConditionalGeneration          # noqa: F401
    serve()
    raise SystemExit


# ---------------------------------------------------------------------------- the tests' side

import torch  # noqa: E402

from scale import checkpoint  # noqa: E402
import cue_recovery  # noqa: E402
import distill  # noqa: E402
import evaluate  # noqa: E402
from scale import asked, longrun  # noqa: E402
import model as qwen  # noqa: E402
from rollout import sample  # noqa: E402


@contextlib.contextmanager
def forking(log: Path):
    """run(cwd, argv, die=, limit=) -> (exit code, what was printed). log: a file to write to."""
    process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, text=True,
                               stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def run(cwd, argv=(), **more):
        log.write_text("")
        order = {"cwd": str(cwd), "argv": list(argv), "log": str(log), **more}
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        code = int(process.stdout.readline())
        return code, log.read_text()
    yield run
    process.stdin.close()
    process.wait(timeout=60)


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    with forking(tmp_path_factory.mktemp("log") / "log") as run:
        yield run


SMALL = ["--batch-size", "2", "--sample-batch", "2", "--max-new-tokens", "3", "--eval-limit", "3",
         "--save-every", "2", "--eval-every", "2", "--steps", "6", "--device", "cpu", "--keep", "1",
         "--teacher", "ema", "--privilege", "answer"]


def command(toy_folder, name, *more):
    return ["--data", str(toy_folder / "train.jsonl"), "--name", name, *SMALL, *more]


@pytest.fixture(scope="module")
def whole(runner, toy_folder, tmp_path_factory):
    """The folder of a run without interruption."""
    cwd = tmp_path_factory.mktemp("whole")
    code, said = runner(cwd, command(toy_folder, "whole"))
    assert code == 0, said
    return cwd / "runs" / "whole"


def timeless(row: dict) -> dict:
    return {k: v for k, v in row.items() if "second" not in k and k != "name"}


def content(folder: Path) -> dict:
    """All files of a run, without times and the run's name."""
    out = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        value = path.read_bytes()
        if path.suffix == ".jsonl":
            value = [timeless(json.loads(line)) for line in value.splitlines()]
        elif path.name in ("args.json", "result.json"):
            value = timeless(json.loads(value))
        out[str(path.relative_to(folder))] = value
    return out


def same(a: Path, b: Path) -> None:
    """The files of two runs are equal, to the byte."""
    left, right = content(a), content(b)
    assert sorted(left) == sorted(right)
    assert [name for name in left if left[name] != right[name]] == []


# ---------------------------------------------------------------------------- kills

def test_a_run_killed_again_and_again_ends_as_if_it_never_was(runner, whole, toy_folder, tmp_path):
    """Killed before a random write, resumed, killed again, until it is done. Metrics, sampled
    answers, result, kept students and state are those of the run without interruption."""
    rng, kills, folder = random.Random(0), 0, tmp_path / "runs" / "cut"
    code, said = runner(tmp_path, command(toy_folder, "cut"), die=rng.randint(3, 40))
    while code == -signal.SIGKILL:
        kills += 1
        assert kills < 40, said
        code, said = runner(tmp_path, ["--resume", str(folder)], die=rng.randint(6, 60))
    assert code == 0, said
    assert kills >= 2
    same(whole, folder)


def test_a_folder_saved_over_an_old_one_is_the_old_or_the_new(runner, tmp_path, tiny):
    """A folder is replaced by two renames. A run that was killed between them once had no
    checkpoint that could be loaded. Now one is found, whichever write the kill precedes."""
    model, processor = tiny
    cue_recovery.attach(model, every=2)
    checkpoint.save_model(model, processor, tmp_path / "old")
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
        model.cue_recovery.blocks["0"].output.weight.add_(1.0)
    checkpoint.save_model(model, processor, tmp_path / "new")
    wanted = [(tmp_path / n / "model.safetensors").read_bytes()
              + (tmp_path / n / qwen.CUE_FILE).read_bytes() for n in ("old", "new")]
    folder, found, number, code = tmp_path / "runs" / "saved", [], 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        number += 1
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        shutil.copytree(tmp_path / "old", folder)
        code, said = runner(tmp_path, save=str(tmp_path / "new"), die=number)
        there = qwen.find_folder(folder)
        files = (there / "model.safetensors").read_bytes() + (there / qwen.CUE_FILE).read_bytes()
        found.append((wanted.index(files), there.name))
    assert code == 0, said
    assert number > 15 and found[-1] == (1, "saved")
    assert [new for new, _ in found] == sorted(new for new, _ in found)
    assert (0, "saved.old") in found, "the moment without a folder was not hit"
    checkpoint.put_back(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["saved"]


def test_a_moved_folder_is_put_back_once(tmp_path):
    """Resuming restores FOLDER.old, but never over a folder that exists."""
    (tmp_path / "best.old").mkdir()
    (tmp_path / "best.old" / "a").write_text("old")
    checkpoint.put_back(tmp_path / "best")
    assert (tmp_path / "best" / "a").read_text() == "old"
    (tmp_path / "best.old").mkdir()
    checkpoint.put_back(tmp_path / "best")
    assert (tmp_path / "best" / "a").read_text() == "old" and (tmp_path / "best.old").exists()


# ---------------------------------------------------------------------------- disks

@contextlib.contextmanager
def full_disk(size: int):
    """No file may grow beyond `size` bytes, in this process."""
    import resource
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit_files(size)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_state_that_cannot_be_saved_is_reported_and_the_older_one_goes_on(runner, whole,
                                                                            toy_folder, tmp_path):
    """A full disk during the run: a failed periodic save is reported and the run continues. A
    failed last save ends it with one line that says how to resume. Resumed, it loses nothing."""
    folder = tmp_path / "runs" / "cut"
    code, said = runner(tmp_path, command(toy_folder, "cut"), die=40)
    assert code == -signal.SIGKILL
    state = folder / "state" / "state.safetensors"
    before = state.read_bytes()
    code, said = runner(tmp_path, ["--resume", "runs/cut"], limit=1_000_000)
    assert code == 1 and "Traceback" not in said
    assert re.search(r"step 4: cannot write runs/cut/state/state.safetensors: .*; going on", said)
    assert re.search(r"step 4: cannot write runs/cut/checkpoints/step-000004: .*; going on", said)
    assert re.search(r"^distill.py: cannot write runs/cut/state/state.safetensors: .*"
                     r"python distill.py --resume runs/cut$", said, re.M)
    assert state.read_bytes() == before and os.listdir(state.parent) == [state.name]
    assert len(checkpoint.read_jsonl(folder / "metrics.jsonl")) == 6
    state.write_bytes(before[:-1])
    code, said = runner(tmp_path, ["--resume", "runs/cut"])
    assert code == 1 and "Traceback" not in said
    assert re.search(r"^distill.py: .*state.safetensors: damaged", said, re.M)
    state.write_bytes(before)
    code, said = runner(tmp_path, ["--resume", "runs/cut"])
    assert code == 0, said
    same(whole, folder)


def test_half_a_line_does_not_stay(tmp_path):
    """A full disk left half a line of metrics; the next was glued to it; reading ended there."""
    path = tmp_path / "metrics.jsonl"
    checkpoint.append_jsonl(path, {"step": 1})
    with full_disk(path.stat().st_size + 5):
        with pytest.raises(OSError, match=r"cannot write .*metrics.jsonl: .*"):
            checkpoint.append_jsonl(path, {"step": 2, "loss": 0.5})
    assert path.read_text() == '{"step": 1}\n'
    checkpoint.append_jsonl(path, {"step": 2}, sync=True)
    assert checkpoint.read_jsonl(path) == [{"step": 1}, {"step": 2}]


def test_a_full_disk_leaves_the_old_files_and_no_half_ones(tmp_path, tiny):
    """For every kind of file. Partial files are removed, since they fill the disk for nothing."""
    rows = [{"step": n, "text": "x" * 100} for n in range(9)]
    checkpoint.write_jsonl(tmp_path / "metrics.jsonl", rows)
    checkpoint.save_state(tmp_path / "state", 1, {"a": torch.ones(10)})
    checkpoint.save_model(*tiny, tmp_path / "best", {"step": 1})
    with full_disk(200):
        with pytest.raises(OSError, match="cannot write .*metrics.jsonl"):
            checkpoint.forget_after(tmp_path / "metrics.jsonl", 5)
        with pytest.raises(OSError, match="cannot write .*state.safetensors"):
            checkpoint.save_state(tmp_path / "state", 2, {"a": torch.ones(1000)})
        with pytest.raises(OSError, match="cannot write .*best"):
            checkpoint.save_model(*tiny, tmp_path / "best", {"step": 2})
    with full_disk(1_000_000):            # text files fit, weights do not
        with pytest.raises(OSError, match="cannot write .*best"):
            checkpoint.save_model(*tiny, tmp_path / "best", {"step": 2})
    assert checkpoint.read_jsonl(tmp_path / "metrics.jsonl") == rows
    assert checkpoint.load_state(tmp_path / "state")[0] == 1
    assert json.loads((tmp_path / "best" / "evaluation.json").read_text()) == {"step": 1}
    qwen.load(tmp_path / "best", device="cpu")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "metrics.jsonl", "state"]
    assert len(list((tmp_path / "state").iterdir())) == 1


@pytest.mark.parametrize("where", ["/sys/kernel", "a file"])
def test_a_folder_that_cannot_be_written_gets_one_line(runner, toy_folder, tmp_path, where):
    """/sys refuses even the superuser, who may write to read-only folders elsewhere."""
    if where == "a file":
        (tmp_path / "runs").write_text("")
    elif Path(where).is_dir():
        (tmp_path / "runs").symlink_to(where)
    else:
        pytest.skip(f"no {where} here")
    code, said = runner(tmp_path, command(toy_folder, "x"))
    assert code == 1 and "Traceback" not in said
    assert re.search(r"^distill.py: .*runs/x", said, re.M)


class NoOptimizer:
    def load_tensors(self, tensors):
        pass


def test_resume_refuses_a_run_whose_other_files_are_gone(tmp_path):
    """Limits and result.json count the lines of metrics.jsonl. The base of a trained student can
    no longer be measured. A finished run without its state must not start over its results."""
    settings = distill.Config()
    assert longrun.resume(tmp_path, NoOptimizer(), None, settings) == 0
    checkpoint.save_state(tmp_path / "state", 2, {"a": torch.ones(1)})
    checkpoint.append_jsonl(tmp_path / "metrics.jsonl", {"step": 1})
    with pytest.raises(ValueError, match="metrics.jsonl has 1 of the 2 steps"):
        longrun.resume(tmp_path, NoOptimizer(), None, settings)
    checkpoint.append_jsonl(tmp_path / "metrics.jsonl", {"step": 2})
    with pytest.raises(checkpoint.Refused, match="before.json is missing"):
        longrun.resume(tmp_path, NoOptimizer(), None, settings)
    checkpoint.write_json(tmp_path / "before.json", {})
    (tmp_path / "best.old").mkdir()                  # what a kill between two renames leaves
    assert longrun.resume(tmp_path, NoOptimizer(), None, settings) == 2
    assert (tmp_path / "best").is_dir()
    (tmp_path / "state" / "state.safetensors").unlink()
    checkpoint.write_json(tmp_path / "result.json", {})
    with pytest.raises(FileNotFoundError, match="no saved state"):
        longrun.resume(tmp_path, NoOptimizer(), None, settings)
    assert len(checkpoint.read_jsonl(tmp_path / "metrics.jsonl")) == 2


# ---------------------------------------------------------------------------- kept students

def fake_save(folder, seen):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(seen))


def test_the_newest_and_the_best_students_are_kept(tmp_path):
    """A tie keeps the earlier; steps are compared as numbers; a repeated evaluation counts once."""
    steps = [(50, 0.5), (100, 0.8), (100, 0.8), (150, 0.8), (999_950, 0.2), (1_000_000, 0.7)]
    for step, accuracy in steps:
        checkpoint.keep_student(tmp_path, 2, {"step": step, "accuracy": accuracy}, fake_save)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "step-1000000", "step-999950"]
    best = json.loads((tmp_path / "best" / "evaluation.json").read_text())
    assert best == {"step": 100, "accuracy": 0.8}
    last = {"step": 1_000_050, "accuracy": 0.9}
    assert checkpoint.keep_best(tmp_path, last, fake_save) == last
    assert checkpoint.keep_best(tmp_path, {**last, "step": 1_000_060}, fake_save) == last


def test_half_a_removed_student_does_not_bear_its_name(tmp_path, monkeypatch):
    """A kill while removing left a folder with a config and no weights, or the reverse."""
    def killed(*args, **options):
        raise KeyboardInterrupt
    for step in (1, 2):
        with monkeypatch.context() as patch:
            patch.setattr("scale.checkpoint.shutil.rmtree", killed)
            with pytest.raises(KeyboardInterrupt) if step == 2 else contextlib.nullcontext():
                checkpoint.keep_student(tmp_path, 1, {"step": step, "accuracy": 0.5}, fake_save)
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"step-000001.gone", "step-000002"}
    checkpoint.keep_student(tmp_path, 1, {"step": 2, "accuracy": 0.5}, fake_save)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]


def test_a_run_keeps_what_it_says(whole):
    """step-000004 is the last evaluation during the run, checkpoint/ is the end, result.json names
    the best. The last step is evaluated once, even if --eval-every divides it; its answers stand
    in rollouts.jsonl as those of the others do, where a short run had no such file."""
    assert [p.name for p in (whole / "checkpoints").iterdir()] == ["step-000004"]
    assert {r["step"] for r in checkpoint.read_jsonl(whole / "rollouts.jsonl")} == {2, 4, 6}
    accuracy = {m["step"]: m["accuracy"] for m in checkpoint.read_jsonl(whole / "metrics.jsonl")
                if "accuracy" in m}
    assert list(accuracy) == [2, 4, 6]
    result = json.loads((whole / "result.json").read_text())
    best = max(accuracy, key=accuracy.get)
    assert result["best"] == {"step": best, "accuracy": accuracy[best], "split": "test",
                              "folder": "best"}
    assert accuracy[6] == result["student_accuracy"] and result["steps"] == 6
    qwen.load(whole / "best", device="cpu")
    qwen.load(whole / "checkpoints" / "step-000004", device="cpu")
    own = asked.run_settings(whole / "checkpoints" / "step-000004")
    assert own["max_new_tokens"] == 3 and asked.run_settings(whole / "best") == own


# ---------------------------------------------------------------------------- budgets

def test_a_token_budget_ends_a_run_and_raising_it_goes_on(runner, whole, toy_folder, tmp_path):
    """The step that reaches the limit is the last: it is evaluated, saved, and counted over a kill.
    The learning rate follows --steps, so with a higher limit the run equals the uncut one."""
    folder, tokens = tmp_path / "runs" / "cut", [
        m["tokens"] for m in checkpoint.read_jsonl(whole / "metrics.jsonl")]
    budget = str(sum(tokens[:2]) + 1)                       # reached by step 3
    code, said = runner(tmp_path, command(toy_folder, "cut", "--max-tokens", budget), die=35)
    assert code == -signal.SIGKILL
    code, said = runner(tmp_path, ["--resume", "runs/cut"])
    assert code == 0 and f"ended by --max-tokens {budget} after step 3 of 6" in said
    result = json.loads((folder / "result.json").read_text())
    assert result["steps"] == 3 and result["tokens"] == sum(tokens[:3])
    assert checkpoint.load_state(folder / "state")[0] == 3 and (folder / "checkpoint").is_dir()
    first = content(folder)
    code, said = runner(tmp_path, ["--resume", "runs/cut"])         # nothing left to do
    assert code == 0 and content(folder) == first
    code, said = runner(tmp_path, ["--resume", "runs/cut", "--max-tokens", "999999"])
    assert code == 0, said
    now, wanted = content(folder), content(whole)
    assert now["metrics.jsonl"][2].pop("accuracy") == result["student_accuracy"]
    for name in ("metrics.jsonl", "checkpoint/model.safetensors", "state/state.safetensors"):
        assert now[name] == wanted[name], name


def test_budgets_count_what_the_metrics_say():
    log = [{"step": 1, "seconds": 1800.0, "tokens": 70},
           {"step": 2, "seconds": 1800.0, "tokens": 30}]
    assert longrun.spent(log, distill.Config()) == ""
    assert longrun.spent(log, distill.Config(max_hours=1.0)) == "--max-hours 1.0"
    assert longrun.spent(log, distill.Config(max_hours=1.01, max_tokens=101)) == ""
    assert longrun.spent(log, distill.Config(max_tokens=100)) == "--max-tokens 100"
    assert longrun.spent([{"step": 1}], distill.Config(max_hours=1.0)) == ""     # an older run's


def test_resume_may_raise_steps_and_budgets_only(tmp_path, capsys):
    checkpoint.write_json(tmp_path / "args.json", {"name": "x", "lr": 0.5})
    raised, folder = distill.read_config(["--resume", str(tmp_path), "--steps", "9", "--max-hours",
                                          "1.5", "--max-tokens", "7"])
    assert (raised.steps, raised.max_hours, raised.max_tokens, raised.lr) == (9, 1.5, 7, 0.5)
    assert folder == tmp_path
    for argv in (["--resume", str(tmp_path), "--keep", "3"], ["--keep", "-1"]):
        with pytest.raises(SystemExit):
            distill.read_config(argv)
    assert "keep" in capsys.readouterr().err


# ---------------------------------------------------------------------------- using the result

@pytest.fixture(scope="module")
def student(tmp_path_factory, loaded):
    """A folder as training leaves it, with a module whose W_O is far from zero."""
    folder = tmp_path_factory.mktemp("student") / "checkpoint"
    model, processor = qwen.load(qwen.TINY, device="cpu")
    generator = torch.Generator().manual_seed(0)
    for block in cue_recovery.attach(model, every=2).blocks.values():
        torch.nn.init.normal_(block.output.weight, std=2.0, generator=generator)
    checkpoint.save_model(model, processor, folder)
    return folder


def test_generate_and_sample_say_the_same(student, loaded, records):
    """transformers' own loop on a loaded student, module and all, token for token."""
    model, processor = qwen.load(student, device="cpu")
    batch = processor.batch([processor.prompt(r) for r in records[:6]])
    ours = sample(model, batch, max_new_tokens=48, temperature=0, **processor.sampling)
    theirs = model.generate(**batch, max_new_tokens=48, do_sample=False)
    for row, n in enumerate(ours.lengths.tolist()):
        start = batch["input_ids"].shape[1]
        assert theirs[row, start:start + n].tolist() == ours.ids[row, :n].tolist()
    plain = sample(loaded[0], batch, max_new_tokens=48, temperature=0, **processor.sampling)
    assert plain.ids.tolist() != ours.ids.tolist(), "the module changes nothing: a useless test"


@pytest.fixture
def picture(records, tmp_path):
    records[0]["images"][0].save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


def ask(capsys, *argv):
    evaluate.main([*argv, "--device", "cpu"])
    return capsys.readouterr().out


def test_one_question_is_answered(student, records, picture, tmp_path, capsys):
    model, processor = qwen.load(student, device="cpu")
    records[1]["images"][0].save(tmp_path / "b.png")
    images, question = [records[0]["images"][0], records[1]["images"][0]], "Are they alike?"
    for count, hint in ((0, None), (1, None), (1, "a red circle"), (2, None)):
        # a student of the tiny model is asked as it was trained, wherever its folder is
        for instruction in ("", qwen.INSTRUCTION):
            flags = ["--instruction", instruction] if instruction else []
            record = {"images": images[:count], "question": question, "instruction": instruction}
            got = sample(model, processor.batch([processor.prompt(record, hint)]), temperature=0,
                         max_new_tokens=24, **processor.sampling)
            argv = ["--model", str(student), "--ask", question, "--max-new-tokens", "24", *flags]
            for path in (picture, str(tmp_path / "b.png"))[:count]:
                argv += ["--image", path]
            assert ask(capsys, *argv, *(["--hint", hint] if hint else [])) == processor.decode(
                got.ids[0]) + "\n"


def test_a_question_can_be_sampled(student, picture, capsys):
    argv = ["--model", str(student), "--ask", "What is there?", "--image", picture,
            "--temperature", "3", "--max-new-tokens", "12", "--seed"]
    first, again, other = (ask(capsys, *argv, seed) for seed in "001")
    assert first == again != other


@pytest.mark.parametrize("argv, message", [
    (["--image", "none.png"], r"--image none.png: cannot be read: no such file$"),
    (["--image", __file__], r"--image .*test_long.py: cannot be read: cannot identify[^\n]*$"),
    (["--model", "/no/such"], r"/no/such is not a folder[^\n]*$")])
def test_a_question_that_cannot_be_asked_gets_one_line(argv, message):
    with pytest.raises(SystemExit, match="^evaluate.py: " + message):
        evaluate.main(["--model", str(qwen.TINY), "--ask", "What?", *argv])


@pytest.mark.parametrize("argv", [["--image", "a.png"], ["--hint", "x"],
                                  ["--ask", "x", "--data", "y"], ["--ask", "x", "--out", "y"],
                                  ["--ask", "x", "--limit", "3"],
                                  ["--ask", "x", "--privilege", "cue"]])
def test_flags_of_a_question_belong_together(argv, capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--model", str(qwen.TINY), *argv])
    assert "--ask" in capsys.readouterr().err


def test_the_pages_example_runs_without_this_repository(student, picture, tmp_path, capsys):
    """As printed, except for the paths, beside cue_recovery.py alone: it gives our answer."""
    page = (ROOT / "docs" / "using_a_checkpoint.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    code = next(block for block in blocks if "cue_recovery.load" in block)
    assert len(code.splitlines()) <= 20
    question = re.search(r'"([^"]*\?)"', code)[1]
    for name, path in (("runs/NAME/checkpoint", str(student)), ("picture.png", picture)):
        assert name in code
        code = code.replace(name, path)
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    shutil.copy(ROOT / "cue_recovery.py", folder)
    (folder / "example.py").write_text(code)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    got = subprocess.run([sys.executable, "example.py"], cwd=folder, env=environment, text=True,
                         capture_output=True)
    assert got.returncode == 0, got.stderr
    assert got.stdout == ask(capsys, "--model", str(student), "--ask", question, "--image", picture,
                             "--instruction", qwen.INSTRUCTION)
