"""scale/asked.py - what a script that lets a model answer is told: flags, and what they leave open.

The idea.  A run's checkpoint is evaluated with the settings of the run, so that its number comes
out again; each of them can be typed instead.

In:  the command line of evaluate.py or benchmarks/run.py.  Out: all settings, and the model.
"""
from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from PIL import Image

import model as qwen
import teacher as teaching
from scale import checks
from scale.checkpoint import read_run
from scale.identity import checkpoint_digest, file_digest

DECODING = ("temperature", "top_p", "top_k", "presence_penalty", "seed", "batch_size",
            "max_new_tokens")
MOVED = {"report": "python analysis/report.py RUN", "compare": "python analysis/compare.py RUN ...",
         "--benchmark": "python benchmarks/run.py --model M --benchmark NAME --source DIR"}


def add_decoding(parser) -> None:
    """The flags that every script has which lets a model answer."""
    parser.add_argument("--model", required=True, help="checkpoint folder or hub name")
    for name, kind, default, low, high, text in (
            ("max-new-tokens", int, 0, 0, math.inf, "0 for the run's own or 1024"),
            ("batch-size", int, 64, 1, math.inf, "rows that run at a time"),
            ("temperature", float, 0.0, 0, 1e6, "0 is greedy"),
            ("top-p", float, 1.0, 1e-9, 1, "nucleus of sampling, 1 for the whole distribution"),
            ("top-k", int, 0, 0, math.inf, "sample from the k most likely, 0 for all"),
            ("presence-penalty", float, 0.0, -1e6, 1e6, "off the logit of what was said before"),
            ("seed", int, 0, 0, 1e12, "of sampling"),
            ("min-pixels", int, 0, 0, math.inf, "0 for the checkpoint's own"),
            ("max-pixels", int, 0, 0, math.inf, "0 for the checkpoint's own")):
        parser.add_argument(f"--{name}", type=checks.number(kind, low, high), default=default,
                            help=text)
    parser.add_argument("--device", default="")
    parser.add_argument("--dtype", default="")


def read_arguments(argv, about: str) -> argparse.Namespace:
    """The command line of evaluate.py."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for word in (argv[:1] + [word.partition("=")[0] for word in argv if word.startswith("--b")]):
        if word in MOVED:
            raise SystemExit(f"evaluate.py: `{word}` has moved: {MOVED[word]}")
    parser = argparse.ArgumentParser(description=about,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_decoding(parser)
    parser.add_argument("--data", default="",
                        help="records, JSONL (default: the test records of the run that the "
                        "checkpoint belongs to, else the toy world's)")
    parser.add_argument("--limit", type=checks.number(int, -1), default=-1,
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


def run_settings(model: Path) -> dict:
    """What a run evaluated its checkpoint with, so that its number comes out; else defaults."""
    model = model.resolve()                               # it may be a link, or "."
    own = {"eval_data": "", "eval_limit": 0, "max_new_tokens": 1024, "min_pixels": 0,
           "max_pixels": 0, "instruction": ""}
    for run in (model.parent, model.parent.parent):       # of checkpoint/, of checkpoints/step-N/
        if (run / "args.json").exists():
            return own | read_run(run)["args"]
    return own if checks.is_tiny(model) else own | {"instruction": qwen.INSTRUCTION}


def fill_in(args) -> dict:
    """Give `args` the run's own setting wherever none was typed; returns run_settings().

    A model that is not there is refused here, before anything is drawn or read for it.
    """
    own = run_settings(Path(args.model))
    if getattr(args, "instruction", None) is None:      # "" was typed: none is wanted
        args.instruction = own["instruction"]
    for name in ("max_new_tokens", "min_pixels", "max_pixels"):
        setattr(args, name, getattr(args, name) or own[name])
    if not getattr(args, "rescore", False):             # which asks no model
        checks.small_files(args.model, args.min_pixels or None, args.max_pixels or None)
    return own


def decoding(args) -> dict:
    """How the model is to answer, as evaluate.answer() takes it."""
    return {name: getattr(args, name) for name in DECODING}


def identity_of(args, data, limit: int) -> dict:
    """All that the answers of evaluate.py depend on: other ones are never gone on with."""
    return {"records": file_digest(data), "limit": limit, "privilege": args.privilege,
            "checkpoint": checkpoint_digest(qwen.find_folder(args.model)),
            "instruction": args.instruction, **decoding(args),
            "min_pixels": args.min_pixels, "max_pixels": args.max_pixels}


def check_images(paths: list[str]) -> None:
    """Every --image can be read, or ValueError: before the model is loaded."""
    for path in paths:
        try:
            with Image.open(path) as picture:
                picture.load()
        except Exception as error:      # Pillow's readers raise many kinds
            reason = "no such file" if isinstance(error, FileNotFoundError) else error
            raise ValueError(f"--image {path}: cannot be read: {reason}") from None


def load_asked(args):
    """(model, processor) of the command line, after fill_in()."""
    device, dtype = checks.check_placement(args.device, args.dtype)
    pixels = {name: getattr(args, name) or None for name in ("min_pixels", "max_pixels")}
    with checks.hub_advice(args.model):
        return qwen.load(args.model, dtype, device, **pixels)
