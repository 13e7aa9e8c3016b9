"""scale/settings.py - settings: one dataclass, its flags, and those that only concern the machine.

The idea.  A setting is a field of a dataclass, with its help, its choices and its range beside it;
the command line is made of the fields. Machine has the knobs that say how and how long a run uses
a machine, and how it is measured. distill.Config adds those of the method.

In:  a dataclass, the command line.  Out: what was typed.
Use it alone: imports the standard library only.
"""
from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, field, fields


def option(default, text: str, choices=None, low=-math.inf, high=math.inf):
    return field(default=default, metadata={"help": text, "choices": choices, "range": (low, high)})


@dataclass
class Machine:
    """What a run may use, and how it is measured. None is part of the method."""
    eval_data: str = option("", "test records; empty for test.jsonl beside the training records")
    dev_data: str = option("", "records for the evaluations inside a run, which choose its best "
                           "student; empty for dev.jsonl beside the training records, if it is "
                           "there; test for the test records")
    eval_limit: int = option(512, "use the first so many test and dev records, 0 for all", low=0)
    before_limit: int = option(64, "of the test records, how many before step 1, by both models; 0 "
                               "for all", low=0)
    eval_every: int = option(50, "steps between evaluations, 0 for only before and after", low=0)
    min_pixels: int = option(0, "smallest picture in pixels, 0 for the checkpoint's own", low=0)
    max_pixels: int = option(1_310_720, "largest picture in pixels, 0 for the checkpoint's own",
                             low=0)
    sample_batch: int = option(0, "rows sampled at a time; 0 for the most that fit, see --plan",
                               low=0)
    micro_batch_tokens: int = option(0, "tokens, padding included, scored at a time; 0: what fits",
                                     low=0)
    gradient_checkpointing: bool = option(True, "recompute activations: less memory, more time")
    score_privilege: bool = option(False, "before step 1 the teacher only scores right answers, "
                                   "with and without it: for one that no GPU holds whole")
    graph_decoding: bool = option(False, "a GPU replays each decoding step as one CUDA graph: up "
                                  "to twice as fast")
    offload_teacher: bool = option(False, "the teacher in CPU memory, on the GPU only to score")
    offload_optimizer: bool = option(False, "keep masters and moments in CPU memory, updated there")
    check: str = option("decode", "pictures before the start: decode all, or read their headers",
                        ("decode", "headers"))
    name: str = option("", "of the run's folder below runs/ (default: the time)")
    save_every: int = option(25, "steps between saved states for --resume", low=1)
    keep: int = option(0, "keep the students of the last so many evaluations, and the best", low=0)
    max_hours: float = option(0.0, "end after so many hours of steps and evaluations, 0: no limit",
                              low=0)
    max_tokens: int = option(0, "end after so many sampled response tokens, 0: no limit", low=0)
    device: str = option("", "such as cuda or cpu (default: cuda if available)")
    threads: int = option(0, "CPU threads, 0 for torch's choice; OMP_NUM_THREADS, if set, decides",
                          low=0)
    dtype: str = option("", "of the weights (default: float32 on a CPU, else bfloat16)")
    plan: bool = option(False, "print how much memory the run needs, and stop")
    gpu_memory: float = option(0.0, "with --plan: GB of one GPU, to say whether the run fits",
                               low=0)
    gpus: int = option(0, "with --plan: number of GPUs; 0 for WORLD_SIZE, or 1", low=0)
    attention: str = option("sdpa", "attention kernel", ("sdpa", "eager", "flash_attention_2"))


def method_first(settings) -> list:
    """The fields of a dataclass that extends Machine: its own, then Machine's."""
    machine = Machine.__dataclass_fields__
    return sorted(fields(settings), key=lambda f: f.name in machine)


def parser_of(settings, description: str) -> argparse.ArgumentParser:
    """A flag for each field. What is not typed is not in the result."""
    parser = argparse.ArgumentParser(description=description,
                                     argument_default=argparse.SUPPRESS)
    vision = parser.add_mutually_exclusive_group()
    vision.add_argument("--freeze-vision", dest="train", action="store_const", const="language",
                        help="the same as --train language")
    for f in method_first(settings):
        kind = {"action": argparse.BooleanOptionalAction} if isinstance(f.default, bool) else {
            "type": type(f.default), "choices": f.metadata["choices"]}
        shown = "" if f.default == "" else f" (default: {f.default})"
        (vision if f.name == "train" else parser).add_argument(
            "--" + f.name.replace("_", "-"), help=f.metadata["help"] + shown, **kind)
    parser.add_argument("--resume", metavar="FOLDER",
                        help="go on with this run, with its own settings (limits and what changes "
                             "memory only may be typed; --data, --eval-data and --dev-data, if "
                             "they moved)")
    return parser
