"""benchmarks/run.py - ask a model one of the paper's seven benchmarks, or all, and count.

The idea.  The files are read and checked first (readers.py), the answers are written group by group
so that a killed run goes on, each is graded (grade.py), and the benchmark's own numbers are taken
over the whole file (scores.py): what was not answered is wrong.

In:  a checkpoint, the files of a benchmark.
Out: OUT/NAME.jsonl, one line an answer behind one with the settings; OUT/scores.json; a table
     beside the paper's base models.

Run
    python benchmarks/run.py --model M --benchmark mathvista --source DIR --preset paper --out OUT
    python benchmarks/run.py --model M --benchmark mathvista --source DIR --out OUT --rescore
Left out: downloading the benchmarks; several processes.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import readers, scores  # noqa: E402
from benchmarks.counting import interval, percent  # noqa: E402
from evaluate import GROUP, answer, judge, summarise  # noqa: E402
from model import find_folder  # noqa: E402
from scale import checkpoint  # noqa: E402
from scale.answers import answer_into, check_saved  # noqa: E402
from scale.asked import add_decoding, fill_in, load_asked  # noqa: E402
from scale.checks import number, one_line, quiet  # noqa: E402
from scale.identity import checkpoint_digest  # noqa: E402

# The paper's decoding, table 4: temperature, nucleus, penalty, pixels of a picture or frame.
PAPER = dict(temperature=0.7, top_p=0.8, top_k=20, presence_penalty=1.5, max_new_tokens=4096,
             min_pixels=3584, max_pixels=401408)
DECODING = (*PAPER, "seed", "batch_size")


def run_benchmark(name: str, items: list[dict], args, model, processor) -> dict:
    """Answer one benchmark into OUT/NAME.jsonl, group by group, and return its numbers.

    A run that was killed goes on behind its last whole group and draws the same answers. With
    --rescore (model None) the saved responses are graded again and nothing is asked.
    """
    path = answers_of(name, args)
    decoding = {key: getattr(args, key) for key in DECODING if "pixels" not in key}
    header, rows = saved_answers(name, items, args)
    if args.rescore:
        if not rows:
            raise ValueError(f"{path}: no saved answers to grade again")
        by_id = {item["id"]: item for item in items}
        rows = [judge(by_id[r["id"]], r["response"], r["stopped"], r["length"]) for r in rows]
        checkpoint.write_jsonl(path, [header, *rows])
    else:
        rows = answer_into(path, rows, items, GROUP * args.batch_size, header=[header], label=name,
                           ask=lambda done: answer(model, processor, items, done=done, **decoding))
    file = readers.describe(items, readable=lambda item: judge(
        item, f"\\boxed{{{first_gold(item)}}}", True, 0)["correct"])
    return summarise(rows) | scores.aggregate(name, rows, items) | {"file": file}


def answers_of(name: str, args) -> Path:
    return Path(args.out) / f"{name}.jsonl"


def saved_answers(name: str, items: list[dict], args) -> tuple[dict, list[dict]]:
    """(first line, rows) of a benchmark's file; ValueError if it is not what is asked for now."""
    path = answers_of(name, args)
    header, *rows = checkpoint.read_jsonl(path) or [{}]
    settings = {} if args.rescore else {"model": str(args.model), "checkpoint": args.digest,
                                        **{key: getattr(args, key) for key in DECODING}}
    check_saved(path, rows, items, {} if args.rescore else header.get("settings", {}), settings)
    return header if args.rescore else {"settings": settings}, rows


def first_gold(item: dict) -> str:
    return item["answer"] if isinstance(item["answer"], str) else item["answer"][0]


def benchmark_table(results: dict[str, dict]) -> str:
    """A row a benchmark, in Markdown: our headline number beside the paper's base models."""
    lines = ["| benchmark | score % [95 %] | what | n | no answer % | cut off % | "
             "paper's base 2B, 8B |",
             "|---|---|---|---|---|---|---|"]
    for name, got in results.items():
        score = got[got["headline"]]
        bounds = None if got["points"] is None else interval(got["points"], got["of"])
        column, small, large = scores.PAPER_COLUMNS[name]
        shown = "groups incomplete" if score is None else percent(score, bounds)
        lines.append(f"| {column} | {shown} | {got['headline']} | {got['n']} | "
                     f"{percent(got['unparsed'])} | {percent(got['cut_off'])} | {small}, {large} |")
        more = {key: got[key] for key in ("worst_case", "score_loose") if got.get(key) is not None}
        more |= {f"{value}": part["accuracy"] for key in ("by_version", "by_duration")
                 for value, part in got.get(key, {}).items()}
        lines += [f"|   {key} | {percent(value)} | | | | | |" for key, value in more.items()]
        if "strict" in got and got["strict"]:
            for setting in ("strict", "loose"):
                counts = ", ".join(f"{k} {got[setting][k]}" for k in ("IK", "IG", "CM", "RM"))
                lines.append(f"|   {setting} | {counts} | | | | | |")
    return "\n".join(lines)


def run(args) -> None:
    fill_in(args)
    names = readers.ROWS if args.benchmark == "all" else [args.benchmark]
    # All files are read and checked first: a missing one must not show after hours of answers.
    items = {name: readers.load(name, args.source, check_rows=not args.any_rows)
             [:args.limit if args.limit > 0 else None] for name in names}
    args.digest = None if args.rescore else checkpoint_digest(find_folder(args.model))
    for name in names:                  # other answers in --out are refused before weights are read
        saved_answers(name, items[name], args)
    model, processor = (None, None) if args.rescore else load_asked(args)
    results = {name: run_benchmark(name, items[name], args, model, processor) for name in names}
    folder = Path(args.out)
    checkpoint.write_json(folder / "scores.json", results)
    print(benchmark_table(results))
    for name, got in results.items():
        if got["file"]["unparsed_golds"]:
            print(f"{name}: {len(got['file']['unparsed_golds'])} golds that no answer can match, "
                  f"such as {got['file']['unparsed_golds'][:3]}")
    print(f"answers and scores in {folder}")


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_decoding(parser)
    parser.add_argument("--benchmark", required=True, choices=["all", *readers.ROWS])
    parser.add_argument("--source", required=True, help="the benchmark's file or folder")
    parser.add_argument("--preset", default="", choices=["", "paper"],
                        help="decoding and pixel budget of the paper's table 4")
    parser.add_argument("--limit", type=number(int, 0), default=0,
                        help="first so many questions, 0 for all")
    parser.add_argument("--any-rows", action="store_true",
                        help="take a benchmark file whose number of rows is not the official one")
    parser.add_argument("--out", default="results", help="folder of the answers and scores")
    parser.add_argument("--rescore", action="store_true",
                        help="grade the saved answers of --out again, without the model")
    args = parser.parse_args(argv)
    if args.preset == "paper":         # its values are defaults, so that single flags override them
        parser.set_defaults(**PAPER)
        args = parser.parse_args(argv)
    quiet()
    with one_line("run.py", lambda: f"; answers up to here are in {args.out}, the same command "
                  "goes on" if Path(args.out).exists() else ""):
        run(args)


if __name__ == "__main__":
    main()
