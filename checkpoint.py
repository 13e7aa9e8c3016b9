"""checkpoint.py - a run's folder: what is written while training, so that a killed run goes on.

    runs/NAME/args.json          the settings of the run
    runs/NAME/metrics.jsonl      one object a step
    runs/NAME/rollouts.jsonl     a few sampled answers at every evaluation
    runs/NAME/result.json        written at the end
    runs/NAME/checkpoint/        the student, an ordinary Hugging Face folder (model.save)
    runs/NAME/state/             state.safetensors: all that is needed to go on, in one file

The idea.  Every file is written under a temporary name and renamed when whole, so it is either the old
one or the new one. All that must agree (weights, optimizer moments, averaged teacher, step) is in *one*
file: a kill between two renames cannot leave a pair that does not match. Random numbers need no saving:
each step seeds its own generator from (seed, step), and so does the order of the data.

Use it alone: torch and safetensors.
"""
from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


def write_text(path: Path, text: str) -> None:
    """The old text or the new one, never a part of it."""
    temporary = Path(path).with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def append_jsonl(path: Path, value: dict) -> None:
    """One line, flushed at once: it survives a kill of this process."""
    with open(path, "a", encoding="utf-8") as out:
        out.write(json.dumps(value, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: list[dict]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[dict]:
    """All whole lines; a last line cut by a kill is left out."""
    if not Path(path).exists():
        return []
    out = []
    # bytes, not splitlines(): text may hold U+2028, and a kill may cut a character in two
    for line in Path(path).read_bytes().split(b"\n"):
        try:
            out.append(json.loads(line))
        except ValueError:
            break
    return out


def forget_after(path: Path, step: int) -> None:
    """Drop the lines of steps beyond `step`: a resumed run is going to make them again."""
    if Path(path).exists():
        write_jsonl(path, [m for m in read_jsonl(path) if m["step"] <= step])


def save_state(folder: Path, step: int, tensors: dict[str, torch.Tensor]) -> None:
    """Write FOLDER/state.safetensors: the state after `step` finished steps."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "state.safetensors.tmp"
    tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    save_file(tensors, str(temporary), metadata={"step": str(step)})
    with open(temporary, "rb+") as file:       # the data must be on disk before the name is
        os.fsync(file.fileno())
    os.replace(temporary, folder / "state.safetensors")


def load_state(folder: Path) -> tuple[int, dict[str, torch.Tensor]]:
    """(finished steps, tensors). Raises FileNotFoundError or ValueError naming the file."""
    path = folder / "state.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"{path}: no saved state, so there is nothing to resume")
    try:
        with safe_open(str(path), framework="pt") as file:
            return int(file.metadata()["step"]), {k: file.get_tensor(k) for k in file.keys()}
    except (SafetensorError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: damaged or not a saved state: {error}") from None
