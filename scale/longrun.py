"""scale/longrun.py - when a long run ends, what it saves, and how it resumes.

The idea.  A run of days ends in many ways: a signal, a kill, a limit, a full disk. After each of
them `--resume` must find a complete state and continue as if nothing had happened. checkpoint.py
knows how a file is written. This file knows *when*: which limit ends a run, what a signal does,
what happens when a write fails, and how a killed run's state is loaded.

    a step is done -> a line of metrics.jsonl -> (every --save-every) state/ -> the next step
                   killed here: the resumed run drops the line and makes the step again

In:  the run's folder, its settings, the models.  Out: functions that distill.py's loop calls.
With several processes, all must call these functions, since all gather weights; rank 0 writes.
Left out: saving in the background; a copy of the state on another disk.
"""
from __future__ import annotations

import signal
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import teacher as teaching
from benchmarks.counting import before_after, table
from scale import checkpoint, sharding


# ---------------------------------------------------------------------------- how a run ends

def spent(log: list[dict], config) -> str:
    """The limit that the run has reached over all resumes, as text; empty if none."""
    hours, tokens = (sum(m.get(key, 0) for m in log) for key in ("seconds", "tokens"))
    if config.max_hours and hours >= 3600 * config.max_hours:
        return f"--max-hours {config.max_hours}"
    return f"--max-tokens {config.max_tokens}" if 0 < config.max_tokens <= tokens else ""


class StopSignal:
    """Ctrl-C, or a cluster's SIGTERM, ends the run after the current step.

    A second signal ends it at once, but not with several processes: there torchrun repeats the
    signal that the terminal has already sent.
    """

    def __init__(self):
        self.asked = False
        self.before = {number: signal.signal(number, self)
                       for number in (signal.SIGINT, signal.SIGTERM)}

    def __call__(self, number, frame) -> None:
        # the next one raises KeyboardInterrupt, of which checks.one_line makes a line
        signal.signal(number, signal.default_int_handler if sharding.world == 1
                      else signal.SIG_IGN)
        self.asked = True
        tqdm.write("stopping after this step")

    def release(self) -> None:
        """Behind the steps a signal does again what it did before them."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


def expected(config, seconds: float) -> str:
    """What the run will take, said before it samples; seconds: that one test answer took."""
    answers = config.steps * config.batch_size * config.samples_per_prompt
    return (f"{answers} answers in {config.steps} steps; at the pace of the evaluation sampling "
            f"takes {tqdm.format_interval(answers * seconds)} (hours:minutes:seconds), and scoring "
            "comes on top: the bar shows the time left from the first step on")


# The progress bar without its own guess of the time left, which knows nothing of evaluations.
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


class Log:
    """The steps of a run, over all resumes, and what follows each: evaluate, log, save, stop.

    rows: the lines of metrics.jsonl. evaluation: seconds of the last one, for the time left.
    """

    def __init__(self, folder: Path, config, evaluation: float):
        self.folder, self.config, self.evaluation = folder, config, evaluation
        self.rows = sharding.from_main(checkpoint.read_jsonl(folder / "metrics.jsonl"))
        self.start, self.begun, self.stop = len(self.rows), time.perf_counter(), StopSignal()
        # a run that is resumed after its end has no step left
        self.end = self.start if spent(self.rows, config) else config.steps

    def steps(self):
        """The numbers of the steps that are left, from 0, behind a progress bar."""
        self.bar = tqdm(range(self.start, self.end), initial=self.start, total=self.config.steps,
                        desc="distil", dynamic_ncols=True, disable=not sharding.is_main(),
                        bar_format=BAR)
        for step in self.bar:
            yield step
            if self.last:
                break
        self.bar.close()
        self.stop.release()

    @contextmanager
    def saved_first(self, teacher, optimizer):
        """Around a step: if a picture of it cannot be read, the steps before are saved.

        They are whole, since pictures are read before anything changes. Not so with several
        processes, of which the others go on: there the state of the last --save-every is left.
        """
        try:
            yield
        except (ValueError, OSError):
            if sharding.world == 1 and self.rows:
                save_state(self.folder, len(self.rows), optimizer, teacher, self.config, False)
            raise

    def seconds(self) -> float:
        """Seconds of the last step, with its evaluation and the save before it.

        The same on all processes, which must agree on when the time is up.
        """
        earlier = sum(m.get("seconds", 0) for m in self.rows[self.start:])
        return sharding.from_main(round(time.perf_counter() - self.begun - earlier, 3))

    def time_left(self, metrics: dict) -> str:
        """Predicted from the last ten steps and the last evaluation."""
        done, every = metrics["step"], self.config.eval_every
        recent = [*self.rows, metrics][-10:]
        step = sum(m["sample_seconds"] + m["score_seconds"] for m in recent) / len(recent)
        amid = max(0, (self.config.steps - 1) // every - done // every) if every else 0
        return tqdm.format_interval((self.config.steps - done) * step
                                    + (amid + 1) * self.evaluation)

    def end_step(self, metrics: dict, samples, ask, student, teacher, processor,
                 optimizer) -> None:
        """All that follows a step: evaluate, log, save, stop.

        samples: (record, answer) pairs. ask(step): evaluates the student, and returns the summary.
        """
        done, config, folder = metrics["step"], self.config, self.folder
        self.bar.set_postfix(loss=f"{metrics['loss']:.3f}", length=f"{metrics['length']:.0f}",
                             tok_s=metrics["sample_tokens_per_second"],
                             left=self.time_left(metrics))
        metrics["seconds"] = self.seconds()
        self.rows.append(metrics)
        if len(self.rows) >= 5 and all(m["skipped"] for m in self.rows[-5:]):
            raise FloatingPointError(f"step {done}: the gradient was not finite five times in a "
                                     "row; lower --lr, or use --dtype float32")
        self.last = last = done == config.steps or bool(spent(self.rows, config))
        due = config.eval_every and done % config.eval_every == 0
        if due or last:
            keep_samples(folder, done, samples, config.privilege)
        if due and not last:
            now = ask(done)
            metrics["accuracy"] = now["accuracy"]
            keep_student(folder, done, now, student, processor, config)
            self.evaluation = self.seconds()
            metrics["seconds"] += self.evaluation
        if sharding.is_main():
            checkpoint.append_jsonl(folder / "metrics.jsonl", metrics, sync=True)
        asked = any(sharding.gather(self.stop.asked))    # a signal may reach one a step earlier
        if asked or last or done % config.save_every == 0:
            save_state(folder, done, optimizer, teacher, config, fatal=asked or last)
        if asked:
            sharding.barrier()                   # torchrun ends all as soon as one has left
            print(f"\nstopped after step {done}; go on with\n  {checkpoint.resume_command(folder)}")
            raise SystemExit(130)


# ---------------------------------------------------------------------------- what it leaves

def read_before(folder: Path) -> dict | None:
    """What write_before() wrote, on all processes; None if the run was not begun."""
    path = folder / "before.json"
    before = sharding.from_main(checkpoint.read_json(path) if path.exists() else None)
    if before is not None and not {"base", "teacher", "rows"} <= before.keys():
        raise checkpoint.Refused(f"{path}: damaged, it has not what a run writes before step 1")
    return before


def write_before(folder: Path, config, before: dict, seconds: float) -> None:
    """Write before.json. Say what the run will take (seconds: of one answer), and warn of a teacher
    that is no better with its privilege than the base."""
    base, taught = before["base"], before["teacher"]
    if config.privilege != "none" and (
            taught["accuracy"] - base["accuracy"] < 0.02 if "accuracy" in taught
            else taught["answer_gain"] <= 0):
        print("WARNING: the privilege does not make the teacher better than the base, so there is "
              "little to learn. Look at what it is told, or choose another --privilege.")
    if sharding.is_main():
        checkpoint.write_json(folder / "before.json", before)
    print(expected(config, seconds))


@contextmanager
def forgiven(step: int, fatal: bool = False):
    """Report a failed save and continue: the last save is intact, the next one may succeed."""
    try:
        yield
    except OSError as error:
        if fatal:
            raise
        tqdm.write(f"step {step}: {error}; going on, what was saved before is whole")


def keep_samples(folder, step, samples, privilege, count: int = 4) -> None:
    """Append a few (record, answer) pairs to rollouts.jsonl, for people to look at."""
    if not sharding.is_main():
        return
    for record, answer in samples[:count]:
        checkpoint.append_jsonl(folder / "rollouts.jsonl", {
            "step": step, "id": record["id"], "question": record["question"],
            "hint": teaching.hint(record, privilege), "gold": record["answer"], "response": answer})


def student_saver(student, processor):
    """save(folder, notes=None) writes the student; all processes gather its weights here."""
    return partial(checkpoint.save_model, student, processor, weights=sharding.weights(student))


def evaluation(step: int, summary: dict) -> dict:
    return {"step": step, "accuracy": summary["accuracy"], "n": summary["n"]}


def keep_student(folder: Path, step: int, summary: dict, student, processor, config) -> None:
    """With --keep: save this student, and make it the best if it is."""
    if config.keep:
        save = student_saver(student, processor)
        with forgiven(step):
            if sharding.is_main():
                checkpoint.keep_student(folder, config.keep, evaluation(step, summary), save)


def save_state(folder: Path, step: int, optimizer, teacher, config, fatal: bool) -> None:
    """Write state/. fatal: a failure ends the run; otherwise the previous state will do."""
    tensors = sharding.whole(state_tensors(optimizer, teacher, config))
    with forgiven(step, fatal):
        if sharding.is_main():
            checkpoint.save_state(folder / "state", step, tensors)


def finish(folder: Path, config, before: dict, rows: list[dict], after: dict, last: dict,
           started: float, student, processor) -> None:
    """Write checkpoint/ and result.json, add the accuracy to the last line of metrics.jsonl, and
    print the table.

    before: what before.json holds. rows, after: the student's graded test records, their summary.
    last: its summary on the records that choose the best one. started: by time.monotonic().
    """
    save = student_saver(student, processor)
    if not sharding.is_main():
        return
    save(folder / "checkpoint")
    seconds = time.monotonic() - started
    models = {"base": before["base"], "teacher": before["teacher"], "student": after}
    metrics = checkpoint.read_jsonl(folder / "metrics.jsonl")
    metrics[-1]["accuracy"] = last["accuracy"]
    split = "test" if config.dev_data == "test" else "dev"
    checkpoint.write_jsonl(folder / "metrics.jsonl", metrics)
    evaluated = [m for m in metrics if "accuracy" in m]
    best = max(evaluated, key=lambda m: m["accuracy"])
    if config.keep:
        best = checkpoint.keep_best(folder, evaluation(metrics[-1]["step"], last), save)
    out = {f"{name}_{key}": value for name, summary in models.items()
           for key, value in summary.items() if key != "n"} | {
        "n": after["n"], "seconds": round(seconds, 1), "steps": len(metrics),
        "tokens": sum(m.get("tokens", 0) for m in metrics),
        "best": {"step": best["step"], "accuracy": best["accuracy"], "split": split,
                 "folder": "best" if config.keep else None},
        "hint_rows": sum(m["hint_rows"] for m in metrics),
        "rollouts": config.batch_size * config.samples_per_prompt * len(metrics),
        "parameters_added": sum(p.numel() for name, p in student.named_parameters()
                                if name.startswith("cue_recovery."))}
    checkpoint.write_json(folder / "result.json", out)
    limit, path = spent(metrics, config), folder / "checkpoint"
    ended = f"ended by {limit} after step {len(metrics)} of {config.steps}; raise it to go on"
    shown = {name: summary for name, summary in models.items() if "accuracy" in summary}
    print(before_after(before["rows"], rows), table(shown),
          *([ended] if limit and len(metrics) < config.steps else []),
          f"best of {len(evaluated)} evaluations on the {split} records: step {best['step']}, "
          f"accuracy {100 * best['accuracy']:.1f} %"
          + (f", kept in {folder / 'best'}" if config.keep else ""),
          f"rollouts with the word \"hint\": {out['hint_rows']} of {out['rollouts']}",
          f"{seconds:.0f} s; checkpoint: {path}; evaluate it again with",
          f"  python evaluate.py --model {path}", sep="\n")


# ---------------------------------------------------------------------------- how it goes on

def state_tensors(optimizer, teacher, config) -> dict[str, torch.Tensor]:
    """All that a resumed run cannot recompute: masters, moments and an averaged teacher."""
    tensors = optimizer.tensors()
    if config.teacher == "ema":
        tensors |= {f"teacher/{name}": p for name, p in teacher.named_parameters()}
    return tensors


@torch.no_grad()
def load_averaged(teacher, tensors: dict[str, torch.Tensor]) -> None:
    """Load an averaged teacher from the tensors that state_tensors() gave."""
    for name, parameter in teacher.named_parameters():
        parameter.copy_(tensors[f"teacher/{name}"])


def read_state(folder: Path) -> tuple[int, dict]:
    """(finished steps, tensors) of a killed run. Its other files are cut back to that step."""
    done, tensors, log = 0, {}, checkpoint.read_jsonl(folder / "metrics.jsonl")
    if (folder / "state" / "state.safetensors").exists() or (folder / "result.json").exists():
        done, tensors = checkpoint.load_state(folder / "state")
    if len(log) < done:
        raise checkpoint.Refused(
            f"{folder / 'metrics.jsonl'} has {len(log)} of the {done} steps of the saved state; "
            "budgets and result.json count them. Was it changed?")
    for n, line in enumerate(log, 1):
        if line.get("step") != n:
            raise checkpoint.Refused(f"{folder / 'metrics.jsonl'}:{n}: not the line of step {n}: "
                                     "was it changed?")
    if done and not (folder / "before.json").exists():
        raise checkpoint.Refused(f"{folder / 'before.json'} is missing, and the base of a student "
                                 "that is trained already cannot be evaluated")
    for name in ("checkpoint", "best"):
        checkpoint.put_back(folder / name)
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        checkpoint.forget_after(folder / name, done)
    return done, tensors


def resume(folder: Path, optimizer, teacher, config) -> int:
    """Load the saved state; returns the number of finished steps.

    A run that was killed before its first state begins again, at step 0.
    """
    done, tensors = read_state(folder) if sharding.is_main() else (0, {})
    done = sharding.from_main(done)
    if done:
        tensors = sharding.cut(tensors)
        optimizer.load_tensors(tensors)
        if config.teacher == "ema":
            load_averaged(teacher, tensors)
    print(f"resuming {folder} after step {done}" + (" (no saved state yet)" if not done else ""))
    return done
