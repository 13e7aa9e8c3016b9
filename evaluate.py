"""evaluate.py - how often a model answers right: sample, grade, count; or ask it one question.

The idea.  A loss that falls is not evidence; accuracy on held-out questions, beside the base
model's, is. Every question stays in the denominator: an answer that cannot be read is wrong, never
guessed.

In:  a checkpoint folder, a record file.  Out: one line a question as JSONL, a summary, a table.

Run
    python evaluate.py --model runs/NAME/checkpoint                      its run's test records
    python evaluate.py --model M --data my/test.jsonl --out rows.jsonl   killed? the same goes on
    python evaluate.py --model M --data my/test.jsonl --privilege cue    as a teacher would see it
    python evaluate.py --model M --ask "How many dots?" --image a.png    one question, to look at
Public benchmarks have a runner of their own, benchmarks/run.py.

How an answer is read and compared stands in benchmarks/grade.py. On records that list their
"objects" (the toy world) an answer is also *grounded* if it is right, states evidence, and every
object it states is really in the picture.
Left out: an LLM as judge.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import model as qwen
import teacher as teaching
from benchmarks.counting import before_after, interval, line, table, unparsed_warning
from benchmarks.grade import Grade, grade
from benchmarks.readers import with_frames
from data import records as record_files, toy
from rollout import sample
from scale.answers import answer_into, answers_kept, saved_answers
from scale.asked import DECODING, add_decoding, fill_in, load_asked
from scale.checks import is_tiny, number, one_line, quiet
from scale.decoder import FastDecoder
from scale.identity import checkpoint_digest, file_digest
from scale.measure import count_hints

GROUP = 4                # batches sampled as one queue and saved together
MOVED = {"report": "python analysis/report.py RUN", "compare": "python analysis/compare.py RUN ...",
         "--benchmark": "python benchmarks/run.py --model M --benchmark NAME --source DIR"}
__all__ = ["Grade", "grade", "evaluate", "summarise", "interval", "table", "line", "before_after",
           "unparsed_warning"]


# ---------------------------------------------------------------------------- answer and grade

def evaluate(model, processor, records: list[dict], *, label: str = "", **settings) -> list[dict]:
    """Answer and grade every record, in order; see answer() for the settings and the rows.

    label: of the progress bar, none if empty.
    """
    groups = answer(model, processor, records, **settings)
    total = -(-len(records) // (GROUP * settings.get("batch_size", 64)))
    return [row for rows in tqdm(groups, label, total, disable=not label, leave=False)
            for row in rows]


def answer(model, processor, records: list[dict], *, hint=lambda record: None,
           max_new_tokens: int = 1024, batch_size: int = 64, temperature: float = 0.0,
           top_p: float = 1.0, top_k: int = 0, presence_penalty: float = 0.0, seed: int = 0,
           done=()):
    """Yield the graded rows of one group after the other. Greedy unless a temperature is given.

    batch_size: rows that run at a time. In a group of four times as many, prompts wait for the
    places of rows that stop.
    hint(record): the privileged line, or None. done: ids that need no answer any more; a group
    with no other record is skipped, and skipping it does not change the other groups' samples.
    A row: id, question, gold, response, correct, extracted, rule, reason, stopped, length (tokens),
    grounded where the record lists its objects, group and meta where a benchmark has them.
    """
    for start in range(0, len(records), GROUP * batch_size):
        part = records[start:start + GROUP * batch_size]
        if all(record["id"] in done for record in part):
            continue
        generator = torch.Generator().manual_seed(seed * 1_000_003 + start)
        # a prompt is made when there is a place for it: videos are large
        prompts = (processor.prompt(r, hint(r)) for r in map(with_frames, part))
        read = processor.in_turn(prompts, model.device)
        got = sample(model, read(batch_size), more=read, max_new_tokens=max_new_tokens,
                     temperature=temperature, top_p=top_p, top_k=top_k, decoder=FastDecoder,
                     presence_penalty=presence_penalty, generator=generator, **processor.sampling)
        yield [judge(record, processor.decode(ids[:n]), stopped, n) for record, ids, n, stopped
               in zip(part, got.ids.tolist(), got.lengths.tolist(), got.stopped.tolist())]


def judge(record: dict, response: str, stopped: bool, length: int) -> dict:
    """One graded row. A record's own answer_kind, precision and tolerance go to the grader."""
    verdict = grade(response, record["answer"], options=record.get("options"),
                    kind=record.get("answer_kind", "auto"), precision=record.get("precision"),
                    tolerance=record.get("tolerance"))
    row = {"id": record["id"], "question": record["question"], "gold": record["answer"],
           "response": response, "correct": verdict.correct, "extracted": verdict.extracted,
           "rule": verdict.rule, "reason": verdict.reason, "stopped": stopped, "length": length}
    if "objects" in record:
        row["grounded"] = verdict.correct and toy.grounded(response, record)
    return row | {name: record[name] for name in ("group", "meta") if name in record}


# ---------------------------------------------------------------------------- count

def summarise(rows: list[dict]) -> dict:
    """n, accuracy and interval, shares unparsed and cut off, mean length, hint counts, grounded."""
    n = len(rows)
    right = sum(row["correct"] for row in rows)
    hints = [count_hints(row["response"]) for row in rows]
    out = {"n": n, "accuracy": right / n, "interval": interval(right, n),
           "unparsed": sum(row["extracted"] is None for row in rows) / n,
           "cut_off": sum(not row["stopped"] for row in rows) / n,
           "length": sum(row["length"] for row in rows) / n,
           "hint_rows": sum(count > 0 for count in hints), "hint_count": sum(hints)}
    if all("grounded" in row for row in rows):
        grounded = sum(row["grounded"] for row in rows)
        out |= {"grounded": grounded / n, "grounded_interval": interval(grounded, n)}
    return out


# ---------------------------------------------------------------------------- command line

def read_arguments(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_decoding(parser)
    parser.add_argument("--data", default="",
                        help="records, JSONL (default: the test records of the run that the "
                        "checkpoint belongs to, else the toy world's)")
    parser.add_argument("--limit", type=number(int, -1), default=-1,
                        help="first so many records, 0 for all, -1 for the run's own or all")
    parser.add_argument("--privilege", default="none", choices=teaching.PRIVILEGES,
                        help="tell or show the model this, as if it were a teacher")
    parser.add_argument("--instruction", help="behind each question that has none of its own "
                        "(default: the run's; for a hub model: to reason and box the answer)")
    parser.add_argument("--out", default="", help="write every question and answer here as JSONL, "
                        "group by group; a second start goes on behind the last")
    parser.add_argument("--ask", help="answer this one question, print the answer, grade nothing")
    parser.add_argument("--image", action="append", default=[],
                        help="with --ask: a picture; may be given several times, or not at all")
    parser.add_argument("--hint", help="with --ask: a privileged line, as a teacher would see it")
    args = parser.parse_args(argv)
    if args.ask is None and (args.image or args.hint):
        parser.error("--image and --hint belong to --ask")
    for_records = [f"--{name}" for name in ("data", "limit", "privilege", "out")
                   if getattr(args, name) != parser.get_default(name)]
    if args.ask is not None and for_records:
        parser.error(f"--ask answers one question: leave out {', '.join(for_records)}")
    return args


def main(argv=None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    for word in (argv[:1] + [word.partition("=")[0] for word in argv if word.startswith("--b")]):
        if word in MOVED:
            raise SystemExit(f"evaluate.py: `{word}` has moved: {MOVED[word]}")
    args = read_arguments(argv)
    quiet()
    with one_line("evaluate.py", lambda: answers_kept(args.out)):
        own = fill_in(args)
        main_records(args, own) if args.ask is None else main_ask(args)


def main_records(args, own: dict) -> None:
    """Answer a file of records and print the table. own: the settings of the model's run."""
    data = args.data or own["eval_data"] or str(
        toy.default(large=not is_tiny(args.model)) / "test.jsonl")
    limit = own["eval_limit"] if args.limit < 0 and not args.data else max(0, args.limit)
    records = record_files.load(data, teaching.NEEDS[args.privilege])[:limit or None]
    records = [teaching.seen({"instruction": args.instruction, **record}, args.privilege)
               for record in records]
    record_files.check_pictures(records)
    decoding = {name: getattr(args, name) for name in DECODING}
    asked = {"hint": lambda r: teaching.hint(r, args.privilege), **decoding}
    if args.out:
        rows = saved_answers(Path(args.out), records, {
            "records": file_digest(data), "limit": limit, "privilege": args.privilege,
            "checkpoint": checkpoint_digest(qwen.find_folder(args.model)),
            "instruction": args.instruction, **decoding,
            "min_pixels": args.min_pixels, "max_pixels": args.max_pixels})
        model, processor = load_asked(args)
        rows = answer_into(Path(args.out), rows, records, GROUP * args.batch_size, label="evaluate",
                           ask=lambda done: answer(model, processor, records, done=done, **asked))
    else:
        rows = evaluate(*load_asked(args), records, label="evaluate", **asked)
    print(f"{args.model} on {data}")
    print(table({Path(args.model).resolve().name: summarise(rows)}))


def main_ask(args) -> None:
    """Print the answer to one question; a wrong picture is found before the model is loaded."""
    for path in args.image:
        try:
            with Image.open(path) as picture:
                picture.load()
        except Exception as error:      # Pillow's readers raise many kinds
            reason = "no such file" if isinstance(error, FileNotFoundError) else error
            raise ValueError(f"--image {path}: cannot be read: {reason}") from None
    model, processor = load_asked(args)
    record = {"id": "of --ask", "images": args.image, "question": args.ask,
              "instruction": args.instruction}
    batch = processor.batch([processor.prompt(record, args.hint)], device=model.device)
    got = sample(model, batch, max_new_tokens=args.max_new_tokens,
                 temperature=args.temperature, top_p=args.top_p, top_k=args.top_k,
                 presence_penalty=args.presence_penalty, **processor.sampling,
                 generator=torch.Generator().manual_seed(args.seed))
    print(processor.decode(got.ids[0]))
    if not got.stopped[0]:
        print(f"(cut off after {int(got.lengths[0])} tokens; --max-new-tokens)", file=sys.stderr)


if __name__ == "__main__":
    main()
