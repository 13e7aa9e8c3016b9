"""scale/asked.py - what a script that lets a model answer is told: flags, and what they leave open.

The idea.  A run's checkpoint is evaluated with the settings of the run, so that its number comes
out again; each of them can be typed instead.

In:  the command line of evaluate.py or benchmarks/run.py.  Out: all settings, and the model.
"""
from __future__ import annotations

import math
from pathlib import Path

import model as qwen
from scale import checks
from scale.checkpoint import read_run

DECODING = ("temperature", "top_p", "top_k", "presence_penalty", "seed", "batch_size",
            "max_new_tokens")


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


def load_asked(args):
    """(model, processor) of the command line, after fill_in()."""
    device, dtype = checks.check_placement(args.device, args.dtype)
    pixels = {name: getattr(args, name) or None for name in ("min_pixels", "max_pixels")}
    with checks.hub_advice(args.model):
        return qwen.load(args.model, dtype, device, **pixels)
