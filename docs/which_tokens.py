"""docs/which_tokens.py - which tokens a student learns last: its loss by kind of token, over a run.

The idea.  The loss is a mean over tokens, and most tokens are words that nobody has to learn. So
the students of a run that were kept answer the same test questions, and the mean of each *kind* of
token is taken by itself: colours, shapes, rows, the comma that goes on or the full stop that stops.

In:  the folder of a finished run of the drawn world, whose teacher is the start (--teacher self);
     the students between (--eval-every 25 --keep 6), if it kept them.
Out: docs/which_tokens.png, and its table in the terminal, as Markdown. First: what learns last.

The one equation: over the tokens of a kind k in the student's own sampled answers, the mean of
    KL_n = sum_v p_T(v | X, S, y_<n) log( p_T(v | X, S, y_<n) / p_theta(v | X, y_<n) )

Run  python distill.py --seed 0 --eval-every 25 --keep 6 --name learn
     python docs/which_tokens.py runs/learn

Left out: other worlds; their answers have other words.
"""
from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from dataclasses import fields
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import distill  # noqa: E402
import drawings  # noqa: E402
from benchmarks.counting import grid  # noqa: E402
from data import records as record_files  # noqa: E402
from loss import distill_loss  # noqa: E402
from model import last_hidden_state, load  # noqa: E402
from rollout import sample  # noqa: E402
from scale import checkpoint  # noqa: E402
from scale.checks import one_line, quiet  # noqa: E402
from teacher import hint  # noqa: E402

# Dimension letters: B answers, T tokens of an answer, N tokens of all answers, D hidden.

# The kind of a token follows from the text before it: a wrong colour is a colour. First that fits.
KINDS = {"answer in the box": r"\\boxed{$", "row number": r" row$", "column number": r" column$",
         "colour": r"(I see|\d,) an?$", "shape": r"(I see|\d,) an? \w+$",
         "go on or stop , .": r"row \d+ column \d+$", "calculation": r"\. \d+( [+=] \d+)*( [+=])?$",
         "all other words": ""}


def kind_of(before: str) -> str:
    """
    >>> [kind_of("I see" + more) for more in ("", " a", " a red", " a red square at row")]
    ['all other words', 'colour', 'shape', 'row number']
    """
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, before))


@torch.no_grad()
def by_kind(student, teacher, processor, records, hints, seed: int = 0) -> dict[str, list[float]]:
    """{kind: KL of each such token}, in answers that the student samples now."""
    prompts = [processor.prompt(record) for record in records]
    hinted = [processor.prompt(record, h, p) for record, h, p in zip(records, hints, prompts)]
    got = sample(student, processor.batch(prompts), max_new_tokens=96,
                 generator=torch.Generator().manual_seed(seed), **processor.sampling)
    answers = [ids[:n].tolist() for ids, n in zip(got.ids, got.lengths)]              # B lists of T
    states = [distill.response_states(processor, answers, last_hidden_state, asked, model,
                                      range(len(records)))
              for model, asked in ((student, prompts), (teacher, hinted))]            # (N, D) each
    kl = distill_loss(*states, student.lm_head.weight, teacher.lm_head.weight)        # (N,)
    kinds = [kind_of(processor.decode(ids[:n])) for ids in answers for n in range(len(ids))]
    out = defaultdict(list)
    for kind, nats in zip(kinds, kl.tolist(), strict=True):
        out[kind].append(nats)
    return out


def measure(run: Path, count: int) -> dict[int, dict[str, list[float]]]:
    """{step: as by_kind}, step 0 being the start, the last the run's checkpoint."""
    files = checkpoint.read_run(run)
    args, kept = files["args"], sorted((run / "checkpoints").glob("step-*"))
    if args["teacher"] != "self" or not (run / "checkpoint").is_dir():
        raise ValueError(f"{run}: expected a finished run with --teacher self, "
                         f"not {args['teacher']}")
    students = {int(path.name[5:]): path for path in kept}
    students[files["metrics"][-1]["step"]] = run / "checkpoint"
    config = distill.Config(**{f.name: args[f.name] for f in fields(distill.Config)
                               if f.name in args})
    start, teacher, processor = distill.build_models(config)
    records = record_files.load(config.eval_data)[:count]
    hints = [hint(record, config.privilege) for record in records]
    found = {0: by_kind(start, teacher, processor, records, hints)}
    for step, path in students.items():
        student, _ = load(path, device="cpu")
        found[step] = by_kind(student, teacher, processor, records, hints)
    return found


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run")
    parser.add_argument("--records", type=int, default=512, help="test questions, 512")
    parser.add_argument("--out", default="", help="the picture (default: RUN/which_tokens.png)")
    args = parser.parse_args(argv)
    with one_line("docs/which_tokens.py"):
        show(args.run, args.records, args.out)


def show(run: Path, records: int, out: str) -> None:
    """Print the table and draw it."""
    quiet()
    torch.set_num_threads(1)
    found = measure(run, records)
    means = {kind: [sum(of[kind]) / len(of[kind]) for of in found.values()] for kind in KINDS}
    rows = dict(sorted(means.items(), key=lambda row: -row[1][-1] / row[1][0]))
    rows["all tokens"] = [sum(map(sum, of.values())) / sum(map(len, of.values()))
                          for of in found.values()]
    print(grid([["kind", "tokens", *(f"step {step}" for step in found)]]
               + [[kind, str(len(found[0].get(kind, [])) or sum(map(len, found[0].values()))),
                   *(f"{nats:.3f}" for nats in row)] for kind, row in rows.items()]))
    drawings.kinds([*found], rows).save(out or run / "which_tokens.png", optimize=True)


if __name__ == "__main__":
    main()
