"""benchmarks/run.py - ask a model one of the paper's seven benchmarks, or all, and count.

The idea.  The files are read and checked first (readers.py), the answers are written group by group
so that a killed run goes on, each is graded (grade.py), and the benchmark's own numbers are taken
over the whole file (scores.py): what was not answered is wrong.

In:  a checkpoint, the files of a benchmark.
Out: OUT/NAME.jsonl, one line an answer behind one with the settings; OUT/scores.json; a table beside
     the paper's base models.

Run
    python benchmarks/run.py --model M --benchmark mathvista --source DIR --preset paper --out OUT
    python benchmarks/run.py --model M --benchmark mathvista --source DIR --out OUT --rescore
Left out: downloading the benchmarks; several processes.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import readers, scores  # noqa: E402
from benchmarks.counting import interval, percent  # noqa: E402
from evaluate import (GROUP, add_decoding, answer, judge, load_asked,  # noqa: E402
                      run_settings, summarise)
from model import quiet  # noqa: E402
from scale import checkpoint  # noqa: E402

# The paper's decoding, table 4: temperature, nucleus, penalty, pixels of a picture or frame.
PAPER = dict(temperature=0.7, top_p=0.8, top_k=20, presence_penalty=1.5, max_new_tokens=4096,
             min_pixels=3584, max_pixels=401408)
DECODING = (*PAPER, "seed", "batch_size")


def run_benchmark(name: str, items: list[dict], args, model, processor) -> dict:
    """Answer one benchmark into OUT/NAME.jsonl, group by group, and return its numbers.

    A run that was killed goes on behind its last whole group and draws the same answers. With
    --rescore (model None) the saved responses are graded again and nothing is asked.
    """
    path, group = Path(args.out) / f"{name}.jsonl", GROUP * args.batch_size
    path.parent.mkdir(parents=True, exist_ok=True)
    decoding = {key: getattr(args, key) for key in DECODING}
    by_id, saved = {item["id"]: item for item in items}, checkpoint.read_jsonl(path)
    header, rows = saved[0] if saved else {}, saved[1:]
    # The file is written anew below: answers to questions that are not asked now must not get lost.
    strange = [row["id"] for row in rows if row["id"] not in by_id]
    if strange:
        raise ValueError(f"{path} has answers to {len(strange)} other questions, such as "
                         f"{strange[0]}; give another --out, or the same --source and --limit")
    if args.rescore:
        if not rows:
            raise ValueError(f"{path}: no saved answers to grade again")
        rows = [judge(by_id[r["id"]], r["response"], r["stopped"], r["length"]) for r in rows]
        checkpoint.write_jsonl(path, [header, *rows])
    else:
        settings = {"model": str(args.model), **decoding}
        if saved and header["settings"] != settings:
            raise ValueError(f"{path} was made with {header['settings']}, not with {settings}; "
                             "give another --out")
        if len(rows) < len(items):       # what a kill left of a group is drawn again, all of it
            rows = rows[:len(rows) // group * group]
        checkpoint.write_jsonl(path, [{"settings": settings}, *rows])
        groups = answer(model, processor, items, done={row["id"] for row in rows},
                        **{key: value for key, value in decoding.items() if "pixels" not in key})
        for answered in tqdm(groups, name, total=-(-(len(items) - len(rows)) // group)):
            for row in answered:
                checkpoint.append_jsonl(path, row)
            rows += answered
    file = readers.describe(items, readable=lambda item: judge(
        item, f"\\boxed{{{first_gold(item)}}}", True, 0)["correct"])
    return summarise(rows) | scores.aggregate(name, rows, items) | {"file": file}


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
    own = run_settings(Path(args.model))
    for key in ("max_new_tokens", "min_pixels", "max_pixels"):
        setattr(args, key, getattr(args, key) or own[key])
    names = readers.ROWS if args.benchmark == "all" else [args.benchmark]
    # All files are read and checked first: a missing one must not show after hours of answers.
    items = {name: readers.load(name, args.source, check_rows=not args.any_rows)
             [:args.limit if args.limit > 0 else None] for name in names}
    model = processor = None
    if not args.rescore:
        model, processor = load_asked(args, own)
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
    parser.add_argument("--limit", type=int, default=0, help="first so many questions, 0 for all")
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
    try:
        run(args)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"run.py: {error}")


if __name__ == "__main__":
    main()
