"""scale/answers.py - answers are never lost: written as they come, and gone on with.

The idea.  An evaluation of a real model takes hours. Each group of answers is written when it is
graded; the same command, started again, reads them, checks that they are answers to the same
questions by the same model and settings, and goes on behind the last whole group.

In:  a file of rows, the records, and a function that answers groups of them.  Out: all rows.
"""
from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from scale.checkpoint import (Refused, append_jsonl, read_json, read_jsonl, write_json,
                              write_jsonl)


def check_saved(path: Path, rows: list[dict], records: list[dict], before: dict,
                settings: dict) -> None:
    """ValueError unless the answers that an earlier start left are to these records and settings.

    The file is written anew when it goes on: what is not asked now would get lost.
    """
    changed = [f"{key} {before[key]}, not {settings.get(key)}"
               for key in before if before[key] != settings.get(key)]
    if changed:
        raise Refused(f"{path} was made with {'; '.join(changed)}: give another --out")
    ids = {record["id"] for record in records}
    if len({row.get("id") for row in rows}) < len(rows) or any("correct" not in r for r in rows):
        raise Refused(f"{path} has a question twice, or a row without a verdict: give another --out")
    strange = [row.get("id") for row in rows if row.get("id") not in ids]
    if strange:
        raise Refused(f"{path} has answers to {len(strange)} other questions, such as "
                      f"{strange[0]}: give another --out, or the records and --limit of then")


def answer_into(path: Path, rows: list[dict], records: list[dict], group: int, ask, *,
                header=(), label: str = "") -> list[dict]:
    """Answer what `rows`, saved earlier, lack, each group written when it is done; all rows.

    ask(done): yields the rows of each group of records but those whose ids are all done. header:
    lines in front of the rows. A half group that a kill left is drawn again as a whole, so the file
    is that of a process that nobody killed.
    """
    if len(rows) < len(records):
        rows = rows[:len(rows) // group * group]
    write_jsonl(path, [*header, *rows])
    for answered in tqdm(ask({row["id"] for row in rows}), label,
                         total=-(-(len(records) - len(rows)) // group)):
        for row in answered:
            append_jsonl(path, row)
        rows += answered
    return rows


def answers_kept(out: str) -> str:
    """What an evaluation that ends now leaves on disk."""
    rows = len(read_jsonl(Path(out))) if Path(out).is_file() else 0
    return f"; {rows} answers are in {out}, the same command goes on" if rows else ""


def saved_answers(out: Path, records: list[dict], settings: dict) -> list[dict]:
    """Rows of an earlier start of the same command. Its settings stand in OUT.settings.json."""
    path = out.with_name(out.name + ".settings.json")
    if out.exists() and out.stat().st_size and not path.exists():
        raise Refused(f"{out} exists, and {path.name} beside it does not, so it cannot be gone "
                      "on with: give another --out")
    rows = read_jsonl(out)
    check_saved(out, rows, records, read_json(path) if rows else {}, settings)
    write_json(path, settings)
    return rows
