"""scale/longrun.py - a run that may be stopped, killed or out of time or disk, and goes on.

The idea.  Days of training end in many ways, and in each the next `--resume` must find a state that
is whole and go on as if nothing had been. What is written, and how a file is never half, is
checkpoint.py's; this file says *when*: which limit ends a run, what a signal does, what a failed
write costs, and how the state of a killed run is taken up.

    a step is done -> a line of metrics.jsonl -> (every --save-every) state/ -> the next step
         kill in between: the line is forgotten by the resumed run, which makes the step again

In:  the run's folder, its settings, the models.  Out: functions that distill.py's loop calls.
With several processes all of them call, since weights are gathered by all; rank 0 writes.
Left out: saving in the background; a copy of the state on another disk.
"""
from __future__ import annotations

import signal
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import model as qwen
import teacher as teaching
from scale import checkpoint, sharding


# ---------------------------------------------------------------------------- how a run ends

def spent(log: list[dict], config) -> str:
    """The limit that a run's metrics (over all resumes) have reached, if any: it ends early."""
    hours, tokens = (sum(m.get(key, 0) for m in log) for key in ("seconds", "tokens"))
    if config.max_hours and hours >= 3600 * config.max_hours:
        return f"--max-hours {config.max_hours}"
    return f"--max-tokens {config.max_tokens}" if 0 < config.max_tokens <= tokens else ""


class StopSignal:
    """Ctrl-C, or a cluster's SIGTERM, ends the run after the current step; a second one at once.

    Not at once with several processes: torchrun passes on what the terminal has sent already.
    """

    def __init__(self):
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self)

    def __call__(self, number, frame) -> None:
        signal.signal(number, signal.SIG_DFL if sharding.world == 1 else signal.SIG_IGN)
        self.asked = True
        tqdm.write("stopping after this step")


# ---------------------------------------------------------------------------- what it leaves

@contextmanager
def forgiven(step: int, fatal: bool = False):
    """A failed save amid a run is reported: the one before is whole, the next one may succeed."""
    try:
        yield
    except OSError as error:
        if fatal:
            raise
        tqdm.write(f"step {step}: {error}; going on, what was saved before is whole")


def keep_samples(folder, step, records, answers, privilege, count: int = 4) -> None:
    """A few sampled answers into rollouts.jsonl, to look at."""
    if not sharding.is_main():
        return
    for record, answer in list(zip(records, answers))[:count]:
        checkpoint.append_jsonl(folder / "rollouts.jsonl", {
            "step": step, "id": record["id"], "question": record["question"],
            "hint": teaching.hint(record, privilege), "gold": record["answer"], "response": answer})


def student_saver(student, processor):
    """save(folder, notes=None) writes the student; all processes gather its weights here."""
    return partial(qwen.save, student, processor, weights=sharding.weights(student))


def evaluation(step: int, summary: dict) -> dict:
    return {"step": step, "accuracy": summary["accuracy"], "n": summary["n"]}


def keep_student(folder: Path, step: int, summary: dict, student, processor, config) -> None:
    """With --keep: this student among the newest, and as the best if it is."""
    if config.keep:
        save = student_saver(student, processor)
        with forgiven(step):
            if sharding.is_main():
                checkpoint.keep_student(folder, config.keep, evaluation(step, summary), save)


def save_state(folder: Path, step: int, optimizer, teacher, config, fatal: bool) -> None:
    """Write state/. fatal: a failure ends the run; else the state before is good enough for now."""
    tensors = sharding.whole(state_tensors(optimizer, teacher, config))
    with forgiven(step, fatal):
        if sharding.is_main():
            checkpoint.save_state(folder / "state", step, tensors)


# ---------------------------------------------------------------------------- how it goes on

def state_tensors(optimizer, teacher, config) -> dict[str, torch.Tensor]:
    """All that a resumed run cannot recompute: masters, moments and an averaged teacher."""
    tensors = optimizer.tensors()
    if config.teacher == "ema":
        tensors |= {f"teacher/{name}": p for name, p in teacher.named_parameters()}
    return tensors


@torch.no_grad()
def load_averaged(teacher, tensors: dict[str, torch.Tensor]) -> None:
    """An averaged teacher as it was saved. tensors: those of state_tensors()."""
    for name, parameter in teacher.named_parameters():
        parameter.copy_(tensors[f"teacher/{name}"])


def read_state(folder: Path) -> tuple[int, dict]:
    """(finished steps, tensors) of a killed run, whose files are then brought back to that step."""
    done, tensors, log = 0, {}, checkpoint.read_jsonl(folder / "metrics.jsonl")
    if (folder / "state" / "state.safetensors").exists() or (folder / "result.json").exists():
        done, tensors = checkpoint.load_state(folder / "state")
    if len(log) < done:
        raise ValueError(f"{folder / 'metrics.jsonl'} has {len(log)} of the {done} steps of the "
                         "saved state; budgets and result.json count them. Was it changed?")
    if done and not (folder / "before.json").exists():
        raise FileNotFoundError(f"{folder / 'before.json'} is missing, and the base of a student "
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
