"""evaluate.py - how often a model answers right: sample, grade, count.

The idea.  A loss that falls is not evidence; accuracy on held-out questions, beside the base model's,
is. Every question stays in the denominator: an answer that cannot be read is wrong, never guessed.

In:  a checkpoint folder, a record file.  Out: one line a question as JSONL, a summary, a table.

The one equation (95 % interval of k right out of n, Wilson's, z = 1.96):
    (k + z^2/2 +- z sqrt(k (n - k) / n + z^2/4)) / (n + z^2)

Run
    python evaluate.py --model runs/NAME/checkpoint                      on the toy world's test records
    python evaluate.py --model M --data my/test.jsonl --out rows.jsonl
    python evaluate.py --model M --data my/test.jsonl --privilege cue    as a teacher would see it

Grading lives in grade.py. On records that list their "objects" (the toy world) an answer is also
*grounded* if it is right, states evidence, and every object it states is really in the picture.
Left out: an LLM as judge.
"""
from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path

import torch
from tqdm import tqdm

import teacher as teaching
from data import records as record_files, toy
from grade import Grade, grade
from model import load, quiet
from rollout import sample

HERE = Path(__file__).resolve().parent
__all__ = ["Grade", "grade", "evaluate", "summarise", "interval", "table", "line", "before_after"]


def evaluate(model, processor, records: list[dict], *, hint=lambda record: None,
             max_new_tokens: int = 1024, batch_size: int = 64, temperature: float = 0.0,
             top_p: float = 1.0, top_k: int = 0, presence_penalty: float = 0.0, seed: int = 0,
             label: str = "") -> list[dict]:
    """Answer and grade every record, in order. Greedy unless a temperature is given.

    hint(record): the privileged line, or None. label: of the progress bar, none if empty.
    Returns a dict a record: id, question, gold, response, correct, extracted, rule, reason, stopped,
    length (tokens), and grounded where the record lists its objects.
    """
    generator, rows = torch.Generator().manual_seed(seed), []
    starts = tqdm(range(0, len(records), batch_size), desc=label, disable=not label, leave=False)
    for start in starts:
        part = records[start:start + batch_size]
        batch = processor.batch([processor.prompt(r, hint(r)) for r in part])
        batch = {name: tensor.to(model.lm_head.weight.device) for name, tensor in batch.items()}
        got = sample(model, batch, max_new_tokens=max_new_tokens, temperature=temperature,
                     top_p=top_p, top_k=top_k, presence_penalty=presence_penalty,
                     stop_ids=processor.stop_ids, banned_ids=processor.banned_ids,
                     pad_id=processor.pad_id, generator=generator)
        for record, ids, n, stopped in zip(part, got.ids, got.lengths.tolist(), got.stopped.tolist()):
            rows.append(judge(record, processor.decode(ids[:n]), stopped, n))
    return rows


def judge(record: dict, response: str, stopped: bool, length: int) -> dict:
    """One graded row."""
    verdict = grade(response, record["answer"], options=record.get("options"))
    row = {"id": record["id"], "question": record["question"], "gold": record["answer"],
           "response": response, "correct": verdict.correct, "extracted": verdict.extracted,
           "rule": verdict.rule, "reason": verdict.reason, "stopped": stopped, "length": length}
    if "objects" in record:
        row["grounded"] = verdict.correct and toy.grounded(response, record)
    return row


def interval(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share.

    >>> tuple(round(x, 3) for x in interval(50, 100))
    (0.404, 0.596)
    """
    z = 1.96
    middle = right + z * z / 2
    half = z * math.sqrt(right * (n - right) / n + z * z / 4)
    return (middle - half) / (n + z * z), (middle + half) / (n + z * z)


def summarise(rows: list[dict]) -> dict:
    """n, accuracy and its interval, and the shares unparsed, cut off and saying "hint"."""
    n = len(rows)
    right = sum(row["correct"] for row in rows)
    out = {"n": n, "accuracy": right / n, "interval": interval(right, n),
           "unparsed": sum(row["extracted"] is None for row in rows) / n,
           "cut_off": sum(not row["stopped"] for row in rows) / n,
           "length": sum(row["length"] for row in rows) / n,
           "hint_rows": sum(bool(re.search(r"\bhint\b", row["response"], re.I)) for row in rows)}
    if all("grounded" in row for row in rows):
        grounded = sum(row["grounded"] for row in rows)
        out |= {"grounded": grounded / n, "grounded_interval": interval(grounded, n)}
    return out


# ---------------------------------------------------------------------------- for people

def percent(share: float, bounds=None) -> str:
    return f"{100 * share:.1f}" + (f" [{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]" if bounds else "")


def line(summary: dict) -> str:
    """One line for a log."""
    text = f"accuracy {percent(summary['accuracy'], summary['interval'])} %"
    if "grounded" in summary:
        text += f"  grounded {percent(summary['grounded'])} %"
    return text + f"  length {summary['length']:.0f}  n {summary['n']}"


def table(summaries: dict[str, dict]) -> str:
    """Models as rows, in Markdown."""
    columns = [("accuracy % [95 %]", lambda s: percent(s["accuracy"], s["interval"])),
               ("grounded % [95 %]", lambda s: percent(s["grounded"], s["grounded_interval"])
                if "grounded" in s else None),
               ("hint rows", lambda s: str(s["hint_rows"])), ("unparsed %", lambda s: percent(s["unparsed"])),
               ("cut off %", lambda s: percent(s["cut_off"])), ("length", lambda s: f"{s['length']:.1f}"),
               ("n", lambda s: str(s["n"]))]
    columns = [(name, show) for name, show in columns if all(show(s) for s in summaries.values())]
    grid = [["", *(name for name, _ in columns)]]
    grid += [[name, *(show(s) for _, show in columns)] for name, s in summaries.items()]
    widths = [max(len(row[i]) for row in grid) for i in range(len(grid[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths)) + " |" for row in grid]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def before_after(before: list[dict], after: list[dict]) -> str:
    """The first question that the base got wrong, and both answers to it, whatever the second is."""
    for old, new in zip(before, after):
        if not old["correct"]:
            return (f"the first test question that the base got wrong ({old['id']}):\n"
                    f"  question  {old['question']}   (answer: {old['gold']})\n"
                    f"  before    {old['response']}\n  after     {new['response']}")
    return "the base got every test question right"


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder or hub name")
    parser.add_argument("--data", default="", help="records, JSONL (default: the test records of the "
                        "run that the checkpoint belongs to, else the toy world's)")
    parser.add_argument("--limit", type=int, default=-1,
                        help="first so many records, 0 for all, -1 for the run's own or all")
    parser.add_argument("--privilege", default="none", choices=teaching.PRIVILEGES,
                        help="give the model this hint, as a teacher would see it")
    parser.add_argument("--max-new-tokens", type=int, default=0, help="0 for the run's own or 1024")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--presence-penalty", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--min-pixels", type=int, default=0, help="0 for the checkpoint's own")
    parser.add_argument("--max-pixels", type=int, default=0, help="0 for the checkpoint's own")
    parser.add_argument("--out", default="", help="write every question and answer here as JSONL")
    parser.add_argument("--device", default="")
    parser.add_argument("--dtype", default="")
    args = parser.parse_args(argv)
    quiet()
    try:
        own = run_settings(Path(args.model))
        data = args.data or own["eval_data"]
        limit = own["eval_limit"] if args.limit < 0 and not args.data else max(0, args.limit)
        needs = () if args.privilege == "none" else (args.privilege,)
        records = record_files.load(data, needs)[:limit or None]
        model, processor = load(args.model, args.dtype or None, args.device or None,
                                min_pixels=args.min_pixels or own["min_pixels"] or None,
                                max_pixels=args.max_pixels or own["max_pixels"] or None)
    except (ValueError, OSError) as error:
        raise SystemExit(f"evaluate.py: {error}")
    rows = evaluate(model, processor, records, hint=lambda r: teaching.hint(r, args.privilege),
                    max_new_tokens=args.max_new_tokens or own["max_new_tokens"],
                    batch_size=args.batch_size, temperature=args.temperature,
                    top_p=args.top_p, top_k=args.top_k,
                    presence_penalty=args.presence_penalty, seed=args.seed, label="evaluate")
    if args.out:
        Path(args.out).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
                                  encoding="utf-8")
    print(f"{args.model} on {data}")
    print(table({Path(args.model).name: summarise(rows)}))


def run_settings(model: Path) -> dict:
    """What a run evaluated its checkpoint with, so that the same number comes out; else defaults."""
    args = model.parent / "args.json"
    if args.exists():
        return json.loads(args.read_text(encoding="utf-8"))
    return {"eval_data": str(toy.default() / "test.jsonl"), "eval_limit": 0, "max_new_tokens": 1024,
            "min_pixels": 0, "max_pixels": 0}


if __name__ == "__main__":
    main()
