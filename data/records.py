r"""data/records.py - the record format: read a JSONL file of questions about pictures; check it.

One JSON object a line:

    {"id": "toy-17", "images": ["images/17.png"], "question": "How many red shapes are there?",
     "answer": "2", "cue": "...", "rationale": "...", "options": ["..."], "source": "toy"}

id, images (may be empty), question and answer are required; OPTIONAL below lists what else is
known, and other fields are kept as they are. A video is "video", a list of frame files, with "fps",
or with "seconds", one time a frame. Picture paths are relative to the file and may not leave its
folder by "..", though a link in it may lead anywhere: its owner made it, and snapshots of the hub
are all links. Everything wrong is refused at once, with file and line, before any model is loaded:
a training run must not die of line 8,000 after an hour.

In:  load(path): the records, with absolute picture paths. An id is a str that knows its line.
     check_pictures(records): nothing, or one ValueError that names the pictures that do not decode.
     batch_of(records, step, size, seed): those of one training step.
Copy this file alone; it needs pillow and tqdm, and only for check_pictures.

Left out: whether answers are right, whether a cue says what is seen (leaks.py), other formats
(prepare.py turns them into this one).
"""
from __future__ import annotations

import json
import math
import os
import random
import re
import stat
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path

from PIL import Image
from tqdm import tqdm

NUMBER = (int, float)
REQUIRED = {"id": str, "images": list, "question": str, "answer": str}
OPTIONAL = {"cue": str, "rationale": str, "options": (list, dict), "source": str, "kind": str,
            "instruction": str,         # how to answer, for student and teacher
            "teacher_images": list,     # what only the teacher sees (privilege "view")
            "video": list, "fps": NUMBER, "seconds": list,
            "answer_kind": str, "precision": int, "tolerance": NUMBER}      # how to grade it
HELD = {"options": str, "seconds": NUMBER}      # what is in such a list
PICTURES = ("images", "video", "teacher_images")
ANSWER_KINDS = ("auto", "choice", "number", "math", "text", "list")         # grade.py's
# In JSON "\frac" is a form feed and "rac": what is left of LaTeX written with one backslash. A tab
# or a line may begin with a word, so only beginnings that are no English words are listed.
EATEN = re.compile(r"\f[a-z]+|[\b][a-z]+"
                   r"|\t(?:heta|imes|ext[a-z]*\{|riangle|ilde|herefore|frac|au\b)"
                   r"|\r(?:ho|ight|angle|ceil|floor|m)\b|\n(?:abla|eq|otin|exists)\b")
LETTER = {"\f": "f", "\b": "b", "\t": "t", "\r": "r", "\n": "n"}
BIG = 16_000_000        # pixels; larger pictures are decoded one at a time, so memory stays bounded


class Id(str):
    """A record's id, equal to the plain text, that also knows its place as .where, FILE:LINE."""
    where = ""


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
            try:
                record = _checked(line, needs)
                for field in PICTURES:
                    if field in record:
                        record[field] = [_inside(path.parent, name) for name in record[field]]
                if record["id"] in first_seen:
                    raise ValueError(f"id {record['id'][:80]!r} stands on line "
                                     f"{first_seen[record['id']]} already")
            except RecursionError:
                raise ValueError(f"{where}: not valid JSON: nested too deeply") from None
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            first_seen[record["id"]] = number
            record["id"] = Id(record["id"])
            record["id"].where = where
            records.append(record)
    if not records:
        raise ValueError(f"{path}: no records in it")
    return records


# ---------------------------------------------------------------------------- one line

def _no_number(word: str) -> float:
    """What json.loads calls for NaN and Infinity, which Python reads and JSON does not have."""
    raise ValueError(f"{word} is not a number in JSON")


def _number(word: str) -> int | float:
    """Numbers beyond the range of a float end a run late: 1e999, or an integer of 400 digits."""
    value = float(word)
    if not math.isfinite(value):
        _no_number(word[:40])
    return int(word) if word.lstrip("-").isdecimal() else value


def _checked(line: bytes, needs) -> dict:
    """One record, whose fields have their types, make sense together, and hold undamaged text."""
    try:
        record = json.loads(line, parse_constant=_no_number, parse_float=_number,
                            parse_int=_number)
    except ValueError as error:
        hint = ("; LaTeX needs two backslashes in JSON, \\\\sqrt" if "escape" in str(error) else "")
        raise ValueError(f"not valid JSON: {error}{hint}") from None
    if not isinstance(record, dict):
        raise ValueError(f"a {type(record).__name__}, expected one JSON object a line")
    for name in REQUIRED:
        if name not in record:
            raise ValueError(f"field {name!r} is missing")
    kinds = [(name, record[name], kind) for name, kind in {**REQUIRED, **OPTIONAL}.items()
             if name in record]
    for name, value, kind in kinds:                 # grows: what a list holds is looked at after it
        if not isinstance(value, kind) or isinstance(value, bool):      # a bool is an int to Python
            raise ValueError(f"field {name!r} is a {type(value).__name__}: {str(value)[:40]!r}")
        if name in HELD and value is record[name]:
            held = value.values() if isinstance(value, dict) else value
            kinds += [(name, part, HELD[name]) for part in held]
    for name in needs:
        if not str(record.get(name) or "").strip():
            raise ValueError(f"this run needs {name!r}, which the record lacks; "
                             "choose another --privilege or add the field")
    for name, value in record.items():
        for part in (value, name):
            _whole(name, part, latex=name in REQUIRED or name in OPTIONAL)
    if not record["question"].strip():
        raise ValueError("the question is empty")
    mark = re.search("<(?:image|video)>", record["question"])
    if mark:
        raise ValueError(f"the question holds a literal {mark[0]}; pictures stand before the "
                         "question by themselves, so take the mark out")
    if "video" in record:
        frames, seconds = len(record["video"]), record.get("seconds")
        if not frames or seconds is None and "fps" not in record:
            raise ValueError('a video needs frames, and "fps" or "seconds" for their times')
        if seconds is not None and len(seconds) != frames:
            raise ValueError(f"{frames} frames in 'video' but {len(seconds)} times in 'seconds'")
    if record.get("fps", 1) <= 0:
        raise ValueError(f"'fps' is {record['fps']}, must be above 0")
    for name in ("precision", "tolerance"):
        if record.get(name, 0) < 0:
            raise ValueError(f"{name!r} is {record[name]}, must not be negative")
    if record.get("answer_kind", "auto") not in ANSWER_KINDS:
        raise ValueError(f"'answer_kind' is {record['answer_kind'][:40]!r}, "
                         f"none of {', '.join(ANSWER_KINDS)}")
    return record


def _whole(name: str, value, latex: bool) -> None:
    """Every text in `value`, however deep, is as it was written.

    Half a character (a lone surrogate) fits no file; half a LaTeX command is another answer.
    """
    if isinstance(value, dict):
        value = [part for pair in value.items() for part in pair]
    if isinstance(value, list):
        for part in value:
            _whole(name, part, latex)
    if not isinstance(value, str):
        return
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"field {ascii(name[:40])[1:-1]!r} holds half a character, "
                         f"{ascii(value[error.start])}: was an emoji cut in two?") from None
    if latex and (eaten := EATEN.search(value)):
        word = LETTER[eaten[0][0]] + eaten[0][1:11]
        raise ValueError(f"field {name!r} holds {eaten[0][:11]!r}, which JSON makes of \\{word}; "
                         f"write \\\\{word} with two backslashes")


def _inside(folder: Path, name) -> str:
    """The absolute path of a picture below the record file's folder; links may lead elsewhere."""
    if not isinstance(name, str):
        raise ValueError(f"picture {name!r} is not a path")
    short = repr(name[:80])          # someone may have put the picture itself here, as base64
    base = os.path.abspath(folder)
    target = os.path.abspath(os.path.join(base, name))       # by its spelling, links not followed
    if not Path(target).is_relative_to(base):
        raise ValueError(f"picture {short} lies outside {folder}")
    try:
        regular = stat.S_ISREG(os.stat(target).st_mode)
    except FileNotFoundError:
        link = " (a link to nowhere)" if os.path.islink(target) else ""
        raise ValueError(f"picture {short} does not exist{link}") from None
    except (OSError, ValueError) as error:                   # too long, links in a circle, a NUL
        raise ValueError(f"picture {short} is not a path: "
                         f"{getattr(error, 'strerror', error)}") from None
    if not regular:
        raise ValueError(f"picture {short} does not exist as a file")
    return target


# ---------------------------------------------------------------------------- the pictures

def check_pictures(records, how: str = "decode", workers: int | None = None) -> None:
    """Every picture of the records can be read, or one ValueError that names up to five.

    how: "decode" reads each to its last byte, as a run will; "headers" only looks at its size: ten
    times faster, and a file that was cut short passes. At most `workers` pictures of BIG pixels and
    one larger are in memory at once.
    """
    if how not in ("decode", "headers"):
        raise ValueError(f"how={how!r}, must be decode or headers")
    first = {}                              # each picture once, and the record that names it first
    for record in records:
        for field in PICTURES:
            if not isinstance(record.get(field), str):         # a film as one file is not ours
                for picture in record.get(field) or ():
                    key = str(picture) if isinstance(picture, (str, Path)) else id(picture)
                    first.setdefault(key, (picture, record["id"]))
    alone = threading.Lock()

    def check(item):
        picture, name = item
        reason = _why_unreadable(picture, how, alone)
        place = f"{name.where}: " if isinstance(name, Id) else ""
        return reason and f"{place}record {str(name)!r}: {picture}: {reason}"

    pool = ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1))
    try:
        with warnings.catch_warnings():     # 108 megapixels are a warning to Pillow
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            found = pool.map(check, first.values())
            broken = [said for said in tqdm(found, f"check pictures ({how})", total=len(first),
                                            unit=" pictures", disable=None) if said]
    finally:
        pool.shutdown(cancel_futures=True)                      # Ctrl-C does not wait for the rest
    if broken:
        more = f"\n  and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise ValueError(f"{len(broken)} of {len(first)} pictures cannot be read, was a copy cut "
                         "short?\n  " + "\n  ".join(broken[:5]) + more)


def _why_unreadable(picture, how: str, alone: threading.Lock) -> str | None:
    """The reason why a picture cannot be decoded, None if it can."""
    try:
        with Image.open(picture) as image:
            if how == "headers":
                return None
            with alone if image.width * image.height > BIG else nullcontext():
                # a JPEG is read to its end at an eighth of its size, in a 64th of the memory
                image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
                image.load()
                image.close()               # its pixels are gone before the next one may begin
    except Exception as error:              # Pillow's readers raise many kinds
        return str(error)[:200] or type(error).__name__
    return None


# ---------------------------------------------------------------------------- the order of a run

def batch_of(records: list[dict], step: int, size: int, seed: int) -> list[dict]:
    """This step's records: epoch follows epoch, each shuffled by (seed, epoch)."""
    places = (divmod(n, len(records)) for n in range(step * size, (step + 1) * size))
    return [records[order_of(epoch, len(records), seed)[place]] for epoch, place in places]


@lru_cache(2)          # shuffling a million records takes a second
def order_of(epoch: int, count: int, seed: int) -> list[int]:
    return random.Random(f"{seed} {epoch}").sample(range(count), count)
