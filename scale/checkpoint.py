"""scale/checkpoint.py - a run's folder: what training writes, so that a killed run can be resumed.

    runs/NAME/args.json          the settings of the run, and digests of what it is made from
    runs/NAME/lock               while a process writes here (identity.py)
    runs/NAME/metrics.jsonl      one object a step
    runs/NAME/rollouts.jsonl     a few sampled answers at every evaluation
    runs/NAME/result.json        written at the end
    runs/NAME/checkpoint/        the student, an ordinary Hugging Face folder
    runs/NAME/checkpoints/       with --keep N, the students of the last N evaluations: step-000050
    runs/NAME/best/              the best student so far; its evaluation.json says how good it is
    runs/NAME/state/             state.safetensors: all that is needed to go on, in one file

The idea.  Every file is written under a temporary name and renamed when complete. A reader finds
either the old file or the new one. All that must agree (weights, optimizer moments, averaged
teacher, step) is in *one* file, so a kill between two renames cannot leave a pair that differs.
Random numbers are not saved: those of a step come from (seed, step), the order of an epoch from
(seed, epoch).

Order.  A line of metrics.jsonl is written before the state of its step. A resumed run drops the
lines that come after its state. So a kill costs the steps since the last state, no more.
If a write fails (a full disk), it raises OSError, removes its part and leaves the old file intact.

Use it alone: torch and safetensors.
"""
from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

PROCESSOR_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
                   "chat_template.json", "preprocessor_config.json", "processor_config.json",
                   "generation_config.json", "vocab.json", "merges.txt",
                   "video_preprocessor_config.json")


def write_text(path: Path, text: str) -> None:
    """Write a file so that it holds either the old text or the new one, never a part."""
    temporary = Path(path).with_suffix(".tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8", newline="") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())             # the data must be on disk before the name is
        os.replace(temporary, path)
    except OSError as error:
        _remove(temporary)
        raise OSError(f"cannot write {path}: {error}") from error


def _remove(temporary: Path) -> None:
    """Free the space of a failed write. If removing fails too, there is nothing more to do."""
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def append_jsonl(path: Path, value: dict, sync: bool = False) -> None:
    """Append one line. It survives a kill; with `sync` it also survives a power cut.

    On a full disk: OSError, and the part that was written is removed, since the next line would be
    glued to it.
    """
    line = (json.dumps(value, ensure_ascii=False) + "\n").encode()
    try:
        with open(path, "ab", buffering=0) as out:
            size = out.seek(0, os.SEEK_END)
            if out.write(line) < len(line):
                out.truncate(size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if sync:
                os.fsync(out.fileno())
    except OSError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def write_jsonl(path: Path, rows: list[dict]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


class Refused(ValueError):
    """What the same command would meet again: no advice to repeat it may stand behind it."""


def read_jsonl(path: Path) -> list[dict]:
    """All complete lines; a last line that a kill cut short is left out. ValueError, with the line,
    if another one is damaged."""
    if not Path(path).exists():
        return []
    out = []
    # bytes, not splitlines(): text may hold U+2028, and a kill may cut a character in two
    lines = Path(path).read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            out.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise Refused(f"{path}:{number}: damaged, not valid JSON: {error}") from None
    return out


def read_json(path: Path) -> dict:
    """The object in a JSON file; ValueError naming the file if it is damaged."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise Refused(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise Refused(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_run(folder: Path) -> dict:
    """A run's files: {"args", "before", "result", "metrics"}; those not written yet are empty.

    "args" are the settings, without the digests that stand beside them in args.json. Raises
    FileNotFoundError if the folder is not a run's, ValueError naming a damaged file.
    """
    folder = Path(folder)
    if not (folder / "args.json").is_file():
        raise FileNotFoundError(f"{folder} is not the folder of a run: it has no args.json")
    parts = {"metrics": read_jsonl(folder / "metrics.jsonl")}
    for name in ("args", "before", "result"):
        path = folder / f"{name}.json"
        parts[name] = read_json(path) if path.exists() else {}
    parts["args"].pop("digests", None)
    return parts


def script(args: dict) -> str:
    """The script that made a run with these settings, as it is typed behind `python`."""
    return f"analysis/baselines.py {args['method']}" if args.get("method") else "distill.py"


def resume_command(folder: Path) -> str:
    return f"python {script(read_json(folder / 'args.json'))} --resume {folder}"


def forget_after(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`: a resumed run makes these steps again."""
    if Path(path).exists():
        write_jsonl(path, [m for m in read_jsonl(path) if m["step"] <= step])


def put_back(path: Path) -> None:
    """If a kill came between the two renames of save_model, the folder before is the folder."""
    old = Path(path).with_name(Path(path).name + ".old")
    if old.exists() and not Path(path).exists():
        os.replace(old, path)


def save_model(model, processor, folder, notes: dict | None = None, weights: dict | None = None,
               max_shard_size="5GB") -> None:
    """Write a plain Hugging Face folder, plus cue_recovery.safetensors when the module is attached.

    The folder gets its name only when complete: a kill leaves FOLDER.tmp, never half a folder. A
    kill between the two renames leaves the previous FOLDER.old, which model.load then reads.
    notes: written beside the weights as evaluation.json. weights: a state dict to write instead of
    the model's own, for a model in slices on several GPUs. Weights larger than `max_shard_size` go
    to several files with an index, as in the published 8B. Raises OSError when the disk is full.
    """
    folder = Path(folder)
    temporary, old = (folder.with_name(folder.name + end) for end in (".tmp", ".old"))
    weights = model.state_dict() if weights is None else weights
    lora, adapted = getattr(model, "lora", None), weights
    weights = lora.merge(adapted) if lora else adapted
    module = {name.removeprefix("cue_recovery."): tensor for name, tensor in weights.items()
              if name.startswith("cue_recovery.")}
    rest = {name: tensor for name, tensor in weights.items()
            if not name.startswith("cue_recovery.")}
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(temporary, max_shard_size=max_shard_size, state_dict=rest)
        if module:
            model.cue_recovery.save(temporary / "cue_recovery.safetensors", module)
        if lora:             # merged into the weights; on their own as well, as PEFT has them
            lora.save(temporary / "adapter", adapted)
        save_processor(processor, temporary)
        if notes is not None:
            (temporary / "evaluation.json").write_text(json.dumps(notes) + "\n", encoding="utf-8")
        mode = (temporary / "config.json").stat().st_mode
        for path in filter(Path.is_file, temporary.rglob("*")):
            path.chmod(mode)                # safetensors makes files that only their owner can read
            with open(path, "rb+") as file:
                os.fsync(file.fileno())     # the data must be on disk before the name is
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)    # on a full disk every byte counts
        raise OSError(f"cannot write {folder}: {error}") from error
    # FOLDER.old goes only now: after a kill between the two renames it may be the last whole one
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def save_processor(processor, folder: Path) -> None:
    """Copy what the processor was read from, so that `folder` loads as its own does."""
    for name in PROCESSOR_FILES:
        if (processor.folder / name).exists():
            shutil.copyfile(processor.folder / name, folder / name)
    # a student trained on pictures of one size is to be used on pictures of that size
    path = folder / "processor_config.json"         # where transformers 5 has it
    settings = read_json(path) if path.exists() else {}
    if settings.get("image_processor") is None:
        path = folder / "preprocessor_config.json"
        settings = read_json(path)
    pictures = settings.get("image_processor", settings)
    pictures["size"] = {"shortest_edge": processor.min_pixels,
                        "longest_edge": processor.max_pixels}
    for other_name in ("min_pixels", "max_pixels"):
        pictures.pop(other_name, None)
    path.write_text(json.dumps(settings, indent=2) + "\n")


def keep_student(run: Path, keep: int, seen: dict, save) -> None:
    """Save RUN/checkpoints/step-N, drop all but the newest `keep`, and update RUN/best.

    seen: this evaluation's {"step", "accuracy"}. save(folder, seen) writes student and `seen`.
    At equal accuracy the earlier student stays. The same evaluation twice changes nothing.
    """
    save(run / "checkpoints" / f"step-{seen['step']:06}", seen)
    found = [path for path in (run / "checkpoints").glob("step-*") if path.name[5:].isdigit()]
    for path in sorted(found, key=lambda path: int(path.name[5:]))[:-keep]:
        os.replace(path, path.with_suffix(".gone"))     # deleting takes time: first rename
    for path in (run / "checkpoints").glob("*.gone"):   # a killed run's as well
        shutil.rmtree(path, ignore_errors=True)
    keep_best(run, seen, save)


def keep_best(run: Path, seen: dict, save) -> dict:
    """Save the student as RUN/best if it beats the one there; returns the `seen` of the best."""
    path = run / "best" / "evaluation.json"
    best = read_json(path) if path.exists() else None
    if best and best["accuracy"] >= seen["accuracy"]:
        return best
    save(run / "best", seen)
    return seen


def save_state(folder: Path, step: int, tensors: dict[str, torch.Tensor]) -> None:
    """Write FOLDER/state.safetensors, the state after `step` finished steps."""
    path, temporary = folder / "state.safetensors", folder / "state.safetensors.tmp"
    tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(b"")
        mode = temporary.stat().st_mode        # what the umask gives; safetensors: only the owner
        save_file(tensors, str(temporary), metadata={"step": str(step)})
        temporary.chmod(mode)
        with open(temporary, "rb+") as file:   # the data must be on disk before the name is
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        _remove(temporary)
        raise OSError(f"cannot write {path}: {error}") from error


def load_state(folder: Path) -> tuple[int, dict[str, torch.Tensor]]:
    """(finished steps, tensors). Raises FileNotFoundError or ValueError naming the file."""
    path = folder / "state.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"{path}: no saved state, so there is nothing to resume")
    try:
        with safe_open(str(path), framework="pt") as file:
            return int(file.metadata()["step"]), {k: file.get_tensor(k) for k in file.keys()}
    except (SafetensorError, TypeError, KeyError, ValueError) as error:
        raise Refused(f"{path}: damaged or not a saved state: {error}") from None


def saved_step(folder: Path) -> int | None:
    """The step of a saved state, None if there is none that can be read."""
    try:
        with safe_open(str(folder / "state.safetensors"), framework="pt") as file:
            return int(file.metadata()["step"])
    except (OSError, SafetensorError, TypeError, KeyError, ValueError):
        return None
