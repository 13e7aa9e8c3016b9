"""data/records.py - the record format: read a JSONL file of questions about pictures, and check it.

One JSON object a line (DESIGN, "The record"):

    {"id": "toy-17", "images": ["images/17.png"], "question": "How many red shapes are there?",
     "answer": "2", "cue": "...", "rationale": "...", "options": ["..."], "source": "toy"}

id, images (may be empty), question and answer are required; a video is "video", a list of frame
files, with "fps" or "seconds". Picture paths are relative to the file
and may not leave its folder. Everything wrong is refused at once, with file and line, before any
model is loaded: a training run must not die of line 8,000 after an hour.

In:  a path.  Out: the records, with picture paths made absolute.
Use it alone: standard library only.
"""
from __future__ import annotations

import json
from pathlib import Path

REQUIRED = {"id": str, "images": list, "question": str, "answer": str}
OPTIONAL = {"cue": str, "rationale": str, "options": (list, dict), "source": str, "kind": str,
            "video": list, "fps": (int, float), "seconds": list}


def load(path, needs: tuple[str, ...] = ()) -> list[dict]:
    """Records of a JSONL file. `needs` names optional fields this run cannot do without (a cue).

    Raises FileNotFoundError or ValueError("FILE:LINE: what is wrong").
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such record file"
                                + (f" (a folder; did you mean {path / 'train.jsonl'}?)"
                                   if path.is_dir() else ""))
    records, first_seen = [], {}
    with open(path, "rb") as lines:              # bytes: a wrong encoding, too, has its line
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            record = _parse(line, where, needs)
            for field in ("images", "video"):        # a video is a list of frame files
                if field in record:
                    record[field] = [_inside(path.parent, name, where) for name in record[field]]
            if record["id"] in first_seen:
                raise ValueError(f"{where}: id {record['id']!r} stands on line "
                                 f"{first_seen[record['id']]} already")
            first_seen[record["id"]] = number
            records.append(record)
    if not records:
        raise ValueError(f"{path}: no records in it")
    return records


def _parse(line: bytes, where: str, needs) -> dict:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a {type(record).__name__}, expected one JSON object a line")
    for name, kind in (*REQUIRED.items(), *OPTIONAL.items()):
        if name in REQUIRED and name not in record:
            raise ValueError(f"{where}: field {name!r} is missing")
        if name in record and not isinstance(record[name], kind):
            raise ValueError(f"{where}: field {name!r} is a {type(record[name]).__name__}: "
                             f"{str(record[name])[:40]!r}")
    for name in needs:
        if not str(record.get(name) or "").strip():
            raise ValueError(f"{where}: this run needs {name!r}, which the record lacks; "
                             "choose another --privilege or add the field")
    if not record["question"].strip():
        raise ValueError(f"{where}: the question is empty")
    return record


def _inside(folder: Path, name, where: str) -> str:
    """The absolute path of a picture; only files below the record file's folder are read."""
    if not isinstance(name, str):
        raise ValueError(f"{where}: picture {name!r} is not a path")
    short = repr(name[:80])          # someone may have put the picture itself here, as base64
    try:
        target = (folder / name).resolve()
        inside, exists = target.is_relative_to(folder.resolve()), target.is_file()
    except (OSError, ValueError, RuntimeError) as error:     # too long, a NUL, links in a circle
        reason = getattr(error, "strerror", None) or str(error)[:200]
        raise ValueError(f"{where}: picture {short} is not a path: {reason}") from None
    if not inside:
        raise ValueError(f"{where}: picture {short} lies outside {folder}")
    if not exists:
        raise ValueError(f"{where}: picture {short} does not exist")
    return str(target)
