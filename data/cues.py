r"""data/cues.py - a vision-language model writes cues (or rationales); what leaks is set aside.

The idea.  A cue S is what can be *seen* and matters, S = f(picture, question). The writer is shown
the picture and the question and nothing else, so S cannot know the answer any better than the
student could. What a cue can still do is run ahead: conclude, calculate, name the theorem. leaks.py
finds that by rules; such a cue is drawn again, and what fails every try is set aside with reasons.

    picture + question --model--> text --audit--> OUT.jsonl             record + cue + cue_meta
                            ^               '---> OUT.rejected.jsonl    after --retries more tries
                            '--- again, other draws

In:  records (data/records.py) for `write`; any JSONL with "cue" and "answer" for `audit`.
Out: records beside the source (picture paths stay valid), with the writer's model, prompt version,
     seed and rejected tries of every cue.
Run  python data/cues.py write --model M --data my/train.jsonl --out my/cued.jsonl
     python data/cues.py audit my/cued.jsonl --examples 5

A rationale is written the same way (--kind rationale). It may state the answer, so the audit looks
only for empty and cut-off ones, and it is kept only if its own final answer is right.

Draws depend on (seed, place in the file, try), and a batch that a kill left half written is drawn
again as a whole: a resumed file equals an uninterrupted one at the same --batch-size.
Left out: a model as judge, and any check that a cue is *true*.
"""
from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.counting import interval  # noqa: E402
from benchmarks.grade import grade  # noqa: E402
from data import records as record_files  # noqa: E402
from data.leaks import audit  # noqa: E402
from model import load  # noqa: E402
from rollout import sample  # noqa: E402
from scale.checkpoint import Refused, append_jsonl, read_jsonl, write_jsonl  # noqa: E402
from scale.checks import check_placement, number, one_line, quiet  # noqa: E402

# Asked for under a version: change a word, change the version, and old cues can be told from new.
PROMPT_VERSION = {"cue": "cue-1", "rationale": "rationale-1"}
PROMPT = {"cue": """Below is a question about the picture. Do not answer it. Instead, write one to \
three plain sentences that tell what is visible in the picture and matters for the question: the \
objects and where they are, labels and numbers as they are printed, lengths, angles and tick \
marks, which label belongs to which part, the series and readings of a chart, the cells of a table.
Write only what can be seen. Leave out the answer, the letter of an option, totals, comparisons \
and conclusions, the names of theorems, rules or laws, formulas, and every step of a calculation. \
Do not repeat the question. End with a full stop.

Question: """, "rationale": """Answer the question about the picture below. Name what is visible \
and matters, reason in a few short steps, and end with the final answer as \\boxed{answer}.

Question: """}


def writer_view(record: dict, kind: str) -> dict:
    """All that the writer sees: the pictures and the question, never the answer or a rationale."""
    return {"id": record["id"], "images": record["images"],
            "question": PROMPT[kind] + record["question"]}


def reasons_against(text: str, record: dict, kind: str, stopped: bool) -> list[str]:
    """Why this text is not used; empty if it is."""
    if kind == "cue":
        return audit(text, record["answer"], record["question"], record.get("options"), stopped)
    if not text.strip() or not stopped:
        return ["empty" if not text.strip() else "cut off"]
    right = grade(text, record["answer"], options=record.get("options")).correct
    return [] if right else ["wrong answer"]


def write_batch(model, processor, part: list[dict], args, start: int) -> list[dict]:
    """[{"text", "tries", "rejected": [[reason, ..], ..]}] for the records of one batch."""
    out = [{"text": None, "tries": 0, "rejected": []} for _ in part]
    for attempt in range(args.retries + 1):
        open_rows = [row for row, got in enumerate(out) if got["text"] is None]
        if not open_rows:
            break
        prompts = [processor.prompt(writer_view(part[row], args.kind)) for row in open_rows]
        batch = processor.batch(prompts, device=model.device)
        seed = (args.seed * 1_000_003 + start) * 101 + attempt
        got = sample(model, batch, max_new_tokens=args.max_new_tokens, temperature=args.temperature,
                     generator=torch.Generator().manual_seed(seed), **processor.sampling)
        for row, ids, n, stopped in zip(open_rows, got.ids, got.lengths.tolist(),
                                        got.stopped.tolist()):
            text = processor.decode(ids[:n]).strip()
            against = reasons_against(text, part[row], args.kind, stopped)
            out[row]["tries"] += 1
            if against:
                out[row]["rejected"].append({"text": text, "reasons": against})
            else:
                out[row]["text"] = text
    return out


def write_cues(args) -> None:
    """The command write: every record ends up in OUT or in OUT's .rejected.jsonl."""
    data, out = Path(args.data), Path(args.out)
    if out.resolve().parent != data.resolve().parent or out.resolve() == data.resolve():
        raise Refused(f"--out {out} must be another file beside {data}: picture paths are "
                      "relative to the record file")
    device, dtype = check_placement(args.device, args.dtype)
    records = record_files.load(data)[:args.limit or None]
    record_files.check_pictures(records)
    raw = {r["id"]: r for r in map(json.loads, filter(str.strip, data.open(encoding="utf-8")))}
    rejected = out.with_suffix(".rejected.jsonl")
    kept = {path: read_jsonl(path) for path in (out, rejected)}
    meta = {"model": str(args.model), "prompt": PROMPT_VERSION[args.kind], "seed": args.seed}
    for row in (row for rows in kept.values() for row in rows[:1]):
        before = {key: row[f"{args.kind}_meta"].get(key) for key in meta} if (
            f"{args.kind}_meta" in row) else None
        if before != meta:
            raise Refused(f"{out} was written with {before}, not with {meta}; give another --out")
    done = {row["id"] for rows in kept.values() for row in rows}
    starts = [s for s in range(0, len(records), args.batch_size)
              if not done.issuperset(r["id"] for r in records[s:s + args.batch_size])]
    again = {r["id"] for s in starts for r in records[s:s + args.batch_size]}
    for path, rows in kept.items():
        if rows:
            write_jsonl(path, [row for row in rows if row["id"] not in again])
    quiet()
    model, processor = load(args.model, dtype, device, min_pixels=args.min_pixels or None,
                            max_pixels=args.max_pixels or None)
    for start in tqdm(starts, f"write {args.kind}s"):
        part = records[start:start + args.batch_size]
        for record, got in zip(part, write_batch(model, processor, part, args, start)):
            row = {**raw[record["id"]], f"{args.kind}_meta": {
                **meta, "tries": got["tries"], "rejected": got["rejected"]}}
            if got["text"] is not None:
                row[args.kind] = got["text"]
            append_jsonl(out if got["text"] is not None else rejected, row)
    report_written(read_jsonl(out), read_jsonl(rejected), args.kind, out, rejected)


def report_written(rows, refused, kind, out, rejected) -> None:
    print(f"{len(rows)} {kind}s in {out}, {len(refused)} records without one in {rejected}")
    reasons = Counter(reason for row in rows + refused for one in row[f"{kind}_meta"]["rejected"]
                      for reason in one["reasons"])
    for reason, count in reasons.most_common():
        print(f"  {count:6} rejected tries: {reason}")


def audit_file(args) -> None:
    """The command audit: the leak rate of anybody's cues, by reason, with examples."""
    flagged, n, reasons = [], 0, Counter()
    for number, line in enumerate(Path(args.file).read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            cue, answer = record["cue"], record["answer"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{args.file}:{number}: a line needs \"cue\" and \"answer\": {error!r}"
                             ) from None
        found = audit(cue, answer, record.get("question", ""), record.get("options"))
        n += 1
        reasons.update(found)
        if found:
            flagged.append((number, record, found))
    if not n:
        raise ValueError(f"{args.file}: no cues in it")
    low, high = interval(len(flagged), n)
    print(f"{len(flagged)} of {n} cues flagged: {100 * len(flagged) / n:.1f} % "
          f"[{100 * low:.1f}, {100 * high:.1f}]")
    for reason, count in reasons.most_common():
        print(f"  {count:6} {reason}")
    for number, record, found in flagged[:args.examples]:
        print(f"{args.file}:{number} {record.get('id', '')} ({', '.join(found)})\n"
              f"    question {record.get('question', '')}   answer {record['answer']}\n"
              f"    cue      {record['cue']}")


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description="Write cues; audit them.")
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("write", help="a model writes cues or rationales",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    write.add_argument("--model", required=True, help="checkpoint folder or hub name")
    write.add_argument("--data", required=True, help="records, JSONL")
    write.add_argument("--out", required=True, help="JSONL to write, beside --data")
    write.add_argument("--kind", default="cue", choices=tuple(PROMPT))
    count = number(int, 0)
    write.add_argument("--retries", type=count, default=2, help="tries after a rejected one")
    write.add_argument("--batch-size", type=number(int, 1), default=8)
    write.add_argument("--max-new-tokens", type=number(int, 1), default=256)
    write.add_argument("--temperature", type=number(float, 0, 1e6), default=0.7)
    write.add_argument("--seed", type=number(int, 0, 1e9), default=0)
    write.add_argument("--limit", type=count, default=0, help="first so many records, 0 for all")
    write.add_argument("--min-pixels", type=count, default=0, help="0 for the checkpoint's own")
    write.add_argument("--max-pixels", type=count, default=0, help="0 for the checkpoint's own")
    write.add_argument("--device", default="")
    write.add_argument("--dtype", default="")
    look = commands.add_parser("audit", help="the leak rate of a file of cues")
    look.add_argument("file")
    look.add_argument("--examples", type=count, default=5)
    args = parser.parse_args(argv)
    with one_line("cues.py", lambda: "; the same command goes on" * (args.command == "write")):
        (write_cues if args.command == "write" else audit_file)(args)


if __name__ == "__main__":
    main()
