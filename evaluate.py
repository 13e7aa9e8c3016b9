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

import sys
from pathlib import Path

import torch
from tqdm import tqdm

import teacher as teaching
from benchmarks.counting import interval, table
from benchmarks.grade import grade
from benchmarks.readers import with_frames
from data import records as record_files, toy
from rollout import sample
from scale.answers import answer_into, answers_kept, saved_answers
from scale.asked import check_images, decoding, fill_in, identity_of, load_asked, read_arguments
from scale.checks import is_tiny, one_line, quiet
from scale.decoder import FastDecoder
from scale.measure import count_hints

GROUP = 4                # batches sampled as one queue and saved together


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

def main(argv=None) -> None:
    args = read_arguments(argv, __doc__.split("\n\n")[0])
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
    asked = {"hint": lambda r: teaching.hint(r, args.privilege), **decoding(args)}
    if args.out:
        rows = saved_answers(Path(args.out), records, identity_of(args, data, limit))
        model, processor = load_asked(args)
        rows = answer_into(Path(args.out), rows, records, GROUP * args.batch_size, label="evaluate",
                           ask=lambda done: answer(model, processor, records, done=done, **asked))
    else:
        rows = evaluate(*load_asked(args), records, label="evaluate", **asked)
    print(f"{args.model} on {data}")
    print(table({Path(args.model).resolve().name: summarise(rows)}))


def main_ask(args) -> None:
    """Print the answer to one question; a wrong picture is found before the model is loaded."""
    check_images(args.image)
    record = {"id": "of --ask", "images": args.image, "question": args.ask, "answer": "",
              "instruction": args.instruction}
    row, = evaluate(*load_asked(args), [record], hint=lambda _: args.hint, **decoding(args))
    print(row["response"])
    if not row["stopped"]:
        print(f"(cut off after {row['length']} tokens; --max-new-tokens)", file=sys.stderr)


if __name__ == "__main__":
    main()
