"""curves.py - what one training step costs as one thing grows: time and peak memory, four sweeps.

The idea.  Around a base point one number at a time is doubled: prompts a step, response tokens,
visual tokens a picture, words of the vocabulary. A cost that grows like x^p is a straight line of
slope p on log-log paper: 0 flat, 1 linear, 2 quadratic. Given are p over the whole sweep (least
squares) and p of the last doubling, which is nearer to where a real run lies.

    python tests/speed/curves.py --picture docs/costs.png     about 12 minutes on one core
    python tests/speed/curves.py --quick                      below one

The model is the 2B at an eighth of its width and half its depth, random weights. With 9,496 words,
a sixteenth, its head has the 2B's share of a token's work. Attention has not: it shrinks by an
eighth where the products shrink by its square, and so weighs eight times as much as in the 2B.

distill.training_step as it is. Stop ids are banned, so every response has its full length. A
micro-batch holds one row everywhere (a budget that fits the row), and 8 rows are sampled at a
time. So the sweep of the batch keeps both budgets fixed, as a run does; "unsplit" is its memory
with all rows in one micro-batch.
Time: CPU seconds of the process (CUDA: of the clock, synchronised), median of the rounds after one
that warms up; each round makes a step of every point, so that a drift hits all alike.
Memory: peak above what is there when a step begins (weights, teacher, moments), in a fresh process
a point; blocks go back to the system at once (memory.py). All gradients are in it: a floor.

What was expected, and what was found: README.md. Left out: two things at a time, --train cue.
Last line: one JSON object; draw() makes the picture from it.
"""
from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import step as steps           # first: it sets OMP_NUM_THREADS before torch is there
import memory
import pairs
import step_2b
from pairs import DEVICE

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import distill
import model as qwen
from scale import checks

BASE = {"batch": 2, "response": 64, "visual": 64, "vocabulary": 9_496}
SWEEPS = {"batch": [2, 4, 8, 16, 32], "response": [16, 32, 64, 128, 256, 512],
          "visual": [64, 128, 256, 512, 1024],
          "vocabulary": [9_496, 18_992, 37_984, 75_968, 151_936]}
QUICK = {"batch": [2, 4], "response": [16, 32], "visual": [64, 128], "vocabulary": [9_496, 18_992]}
UNITS = {"batch": "prompts a step", "response": "response tokens",
         "visual": "visual tokens a picture", "vocabulary": "words of the vocabulary"}
# what the names of step.Phases begin with. The loss makes its gradients in its forward pass; the
# tower's three readings are parts of the phases before it, and stand in the JSON only
PHASES = {"sample": ("sampling", "prefill", "decode"), "teacher": ("teacher",),
          "student": ("student", "backward"), "loss": ("loss",), "update": ("clip",),
          "tower": ("prefill: vision", "teacher: vision", "student: vision")}
ROWS, SAMPLED = 1, 8           # rows of a micro-batch; rows sampled at a time


# ---------------------------------------------------------------------------- one point

def shape(vocabulary: int) -> dict:
    """The 2B's config: an eighth as wide (step_2b.py), half as deep, with so many words."""
    config = step_2b.shape(small=True)
    config["text_config"] |= {"num_hidden_layers": 14, "vocab_size": vocabulary}
    config["vision_config"] |= {"depth": 12, "deepstack_visual_indexes": [2, 5, 8]}
    return config


def made(vocabulary: int):
    """(model, processor) with random weights; no response ends early, no picture is resized."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32       # as qwen.load chooses
    with tempfile.TemporaryDirectory() as folder:
        model, processor = memory.random_model(shape(vocabulary), Path(folder), dtype, "sdpa")
    processor.min_pixels, processor.max_pixels = 1, 1 << 24
    processor.sampling["banned_ids"] = sorted({*processor.banned_ids, *processor.stop_ids})
    return model.to(DEVICE), processor


def records(point: dict) -> list[dict]:
    """Pictures of noise that make exactly so many visual tokens, each 32 x 32 pixels."""
    height = 2 ** ((point["visual"].bit_length() - 1) // 2)
    size = (32 * (point["visual"] // height), 32 * height)
    data = memory.records(point["batch"], 32)
    return [r | {"images": [r["images"][0].resize(size)]} for r in data]


def settings(point: dict, processor, data: list[dict], rows: int = ROWS) -> distill.Config:
    visual, _ = steps.processor_tokens(processor, data[0])
    if visual != point["visual"]:
        raise AssertionError(f"{visual} visual tokens, expected {point['visual']}")
    row = processor.length(data[0], data[0]["answer"]) + point["response"]   # the teacher's, longer
    return distill.Config(**{**memory.COMMON, "device": DEVICE.type, "train": "all",
                             "batch_size": point["batch"], "sample_batch": SAMPLED,
                             "max_new_tokens": point["response"], "micro_batch_tokens": rows * row})


def clock() -> float:
    if DEVICE.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def times(points: list[dict], rounds: int) -> list[dict]:
    """{phase: median seconds} of each point, with "total"."""
    steps.clock = clock                                  # Phases reads it; on a GPU it must wait
    trios, taken = {}, [[] for _ in points]
    for number in range(rounds + 1):
        for point, found in zip(points, taken):
            data, V = records(point), point["vocabulary"]
            if V not in trios:
                pair = made(V)
                with mock.patch.object(qwen, "load", lambda *_, **__: pair):
                    models = distill.build_models(settings(point, pair[1], data))
                trios[V] = (*models, steps.optimizer_of(models[0]))
            student, teacher, processor, optimizer = trios[V]
            config = settings(point, processor, data)
            watch = steps.Phases(student, teacher, processor, optimizer)
            with watch.undo:
                start = clock()
                metrics, _ = distill.run_step(
                    student, teacher, processor, data, config, number, optimizer,
                    distill.scale_for(config, student, teacher, processor))
                total = clock() - start
            if metrics["tokens"] != point["batch"] * point["response"]:
                raise AssertionError(f"{metrics['tokens']} tokens at {point}")
            found.append({"total": total} | {
                name: sum(s for part, s in watch.seconds.items() if part.startswith(starts))
                for name, starts in PHASES.items()})
            print(f"round {number}: {point}  {total:.2f} s", flush=True)
    return [{name: round(statistics.median(row[name] for row in found[1:]), 4) for name in found[0]}
            for found in taken]


# ---------------------------------------------------------------------------- memory

class Peaks(memory.Peaks):
    """memory.Peaks, counted from the moment the optimizer's moments are there; on a GPU too."""

    def take(self, name):
        gpu = DEVICE.type == "cuda"
        if name == "moments":
            self.base = torch.cuda.memory_allocated() if gpu else memory.status("VmRSS")
            self.seen = {}
        highest = torch.cuda.max_memory_allocated() if gpu else memory.status("VmHWM")
        self.seen[name] = max(self.seen.get(name, 0), highest - self.base)
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")


def one_case(point: dict, rows: int) -> dict:
    """What a fresh process does: a step of the tiny checkpoint, then one of the point, measured."""
    memory.warm_up(distill, "", DEVICE.type)
    peaks, pair, data = Peaks(), made(point["vocabulary"]), records(point)
    _, found = memory.measure(distill, settings(point, pair[1], data, rows), pair, data, peaks)
    return found | {"peak": max(found.values())}


def peaks_of(point: dict, rows: int = ROWS) -> dict:
    """{phase: bytes} of one_case(), with "peak"."""
    got = subprocess.run([sys.executable, __file__, "--case", json.dumps([point, rows])],
                         env={**os.environ, **memory.MALLOC}, capture_output=True, text=True)
    if got.returncode:
        raise RuntimeError(f"memory at {point}: {got.stderr[-2000:]}")
    found = json.loads(got.stdout.splitlines()[-1])
    print(f"memory, {rows} rows: {point}  {found['peak'] / 2**20:.0f} MiB", flush=True)
    return found


# ---------------------------------------------------------------------------- slopes, table

def slopes(x: list[float], y: list[float]) -> tuple[float, float]:
    """Exponents p of y = c x^p: least squares over all points, and from the last two alone.

    >>> [round(p, 6) for p in slopes([1, 2, 4], [3, 12, 48])]
    [2.0, 2.0]
    """
    x, y = np.log(x), np.log(y)
    return float(np.polyfit(x, y, 1)[0]), float((y[-1] - y[-2]) / (x[-1] - x[-2]))


def curves(result: dict, axis: str, kind: str) -> dict[str, tuple[list, list]]:
    """{name: (x, y)} of one sweep; kind "seconds" or "bytes"."""
    rows = [p for p in result["points"]
            if all(p[k] == v for k, v in result["base"].items() if k != axis)]
    rows = sorted(rows, key=lambda p: p[axis])
    names = [name for name in rows[0][kind] if all(name in p[kind] for p in rows)]
    return {name: ([p[axis] for p in rows], [p[kind][name] for p in rows]) for name in names}


def table(result: dict) -> list[tuple]:
    """A row a point and a row of exponents a sweep, for step.markdown."""
    shown = ("total", *list(PHASES)[:-1])
    out = [("sweep", "x", *(f"{name} s" for name in shown), "peak MiB", "sampling MiB")]
    for axis in SWEEPS:
        time_of, bytes_of = curves(result, axis, "seconds"), curves(result, axis, "bytes")
        for n, x in enumerate(time_of["total"][0]):
            out.append((UNITS[axis] if n == 0 else "", f"{x:,}",
                        *(f"{time_of[name][1][n]:.2f}" for name in shown),
                        *(f"{bytes_of[name][1][n] / 2**20:.0f}" for name in ("peak", "sample"))))
        lines = [*(time_of[name] for name in shown), bytes_of["peak"], bytes_of["sample"]]
        out.append(("", "exponent", *("{:.2f} / {:.2f}".format(*slopes(*xy)) for xy in lines)))
    return out


# ---------------------------------------------------------------------------- picture

COLOURS = {"total": "#111111", "sample": "#1f6fb4", "teacher": "#c65a00", "student": "#1a8a4a",
           "loss": "#8a3fa8", "update": "#8a8a8a", "score": "#111111", "unsplit": "#c02a4a"}
SCALE, WIDTH, HEIGHT = 4, 305, 255         # drawn at 4, kept at 2: pillow's lines have rough edges
LEFT, TOP, RIGHT, BOTTOM = 44, 34, 88, 42  # of a panel: room for numbers, heading, labels, units


def spread(places: list[float], gap: float, bottom: float) -> list[float]:
    """Moves labels as far apart as their height, and none below the panel."""
    order, out, last = sorted(range(len(places)), key=places.__getitem__), list(places), -1e9
    for n in order:
        out[n] = last = max(places[n], last + gap)
    for n in reversed(order):
        out[n], bottom = min(out[n], bottom), min(out[n], bottom) - gap
    return out


def panel(pen, corner, unit: str, lines: dict, low: float, high: float) -> None:
    """One sweep on log-log paper, labels at the lines' ends. low, high: of y, shared by a row."""
    def font(size):
        return ImageFont.load_default(size * SCALE)

    left, top = corner[0] + LEFT, corner[1] + TOP
    right, bottom = corner[0] + WIDTH - RIGHT, corner[1] + HEIGHT - BOTTOM
    xs = next(iter(lines.values()))[0]

    def at(x, y):                          # pixels of a point
        across = np.log(x / xs[0]) / np.log(xs[-1] / xs[0])
        up = np.log(y / low) / np.log(high / low)
        return SCALE * (left + across * (right - left)), SCALE * (bottom - up * (bottom - top))

    for power in range(-9, 10):
        for y in (m * 10.0**power for m in (1, 2, 5)):
            if low <= y <= high:
                ink, number = ("#c8c8c8", f"{y:g}") if y == 10.0**power else ("#eeeeee", "")
                pen.line([at(xs[0], y), at(xs[-1], y)], ink, SCALE // 2)
                pen.text((SCALE * (left - 5), at(xs[0], y)[1]), number, "#444444", font(11), "rm")
    for x in xs:
        pen.line([at(x, low), at(x, high)], "#eeeeee", SCALE // 2)
        number = f"{x / 1000:.3g}k" if x >= 4096 else f"{x:g}"
        pen.text((at(x, low)[0], SCALE * (bottom + 5)), number, "#444444", font(11), "mt")
    pen.text((SCALE * (left + right) / 2, SCALE * (bottom + 22)), unit, "#111111", font(12), "mt")
    first = next(iter(lines.values()))[1][0]
    reach = min(xs[-1] / xs[0], high / first)            # slope 1, until it leaves the panel
    dashes = [at(xs[0] * by, first * by) for by in np.geomspace(1, reach, 40)]
    for pair in zip(dashes[::2], dashes[1::2]):
        pen.line(pair, "#777777", SCALE)
    for name, (x, y) in lines.items():
        spots = [at(*xy) for xy in zip(x, y)]
        thick = 5 if name in ("total", "score") else 3
        pen.line(spots, COLOURS[name], thick * SCALE // 2, "curve")
        for px, py in spots:
            pen.ellipse([px - 9, py - 9, px + 9, py + 9], COLOURS[name])
    ends = [at(x[-1], y[-1])[1] / SCALE for x, y in lines.values()]
    for (name, xy), end, place in zip(lines.items(), ends, spread(ends, 13, bottom)):
        pen.line([(SCALE * (right + 3), SCALE * end), (SCALE * (right + 12), SCALE * place)],
                 COLOURS[name], SCALE // 2)
        pen.text((SCALE * (right + 14), SCALE * place), f"{name} {slopes(*xy)[1]:.2f}",
                 COLOURS[name], font(11), "lm")


def draw(result: dict, path) -> None:
    """Two rows (time, memory) of four sweeps, as a PNG of twice the pixels it is shown at."""
    big = Image.new("RGB", (4 * WIDTH * SCALE, (2 * HEIGHT + 26) * SCALE), "white")
    pen = ImageDraw.Draw(big)
    rows = (("seconds", f"{result['clock']} a step", ("total", *list(PHASES)[:-1]), 1),
            ("bytes", "peak MiB of a step", ("score", "sample", "update", "unsplit"), 2**20))
    for n, (kind, heading, wanted, unit) in enumerate(rows):
        sweeps = {axis: {name: (x, [value / unit for value in y])
                         for name, (x, y) in curves(result, axis, kind).items() if name in wanted}
                  for axis in SWEEPS}
        every = [y for lines in sweeps.values() for _, ys in lines.values() for y in ys]
        for column, (axis, lines) in enumerate(sweeps.items()):
            corner = column * WIDTH, n * HEIGHT
            panel(pen, corner, UNITS[axis], lines, min(every) / 1.3, max(every) * 1.3)
        pen.text((8 * SCALE, (n * HEIGHT + 10) * SCALE), heading, "#111111",
                 ImageFont.load_default(14 * SCALE), "lt")
    base = ", ".join(f"{k} {v:,}" for k, v in result["base"].items())
    note = (f"Numbers: exponent of the last doubling. Dashes: slope 1. What is not swept: {base}. "
            f"{result['machine']}")
    pen.text((8 * SCALE, (2 * HEIGHT + 4) * SCALE), note, "#555555",
             ImageFont.load_default(11 * SCALE), "lt")
    big.reduce(SCALE // 2).quantize(128).save(path, optimize=True)


# ---------------------------------------------------------------------------- command line

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="two small points a sweep, one round")
    parser.add_argument("--rounds", type=int, default=0, help="measured steps (3, quick 1)")
    parser.add_argument("--picture", metavar="PATH", help="also draw the curves, as a PNG")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    checks.quiet()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if args.case:
        return print(json.dumps(one_case(*json.loads(args.case))))
    sweeps = QUICK if args.quick else SWEEPS
    base = {axis: xs[0] for axis, xs in QUICK.items()} if args.quick else BASE
    points = [base]
    points += [p for axis in sweeps for x in sweeps[axis] if (p := base | {axis: x}) != base]
    held = [peaks_of(point) for point in points]
    for point, found in zip(points, held):
        if point == base | {"batch": point["batch"]} and not args.quick:
            found["unsplit"] = peaks_of(point, point["batch"])["peak"]
    pairs.keep_pages()          # for the times: fresh pages cost more than much of the arithmetic
    spent = times(points, args.rounds or (1 if args.quick else 3))
    result = {"benchmark": "curves", "machine": pairs.machine(), "base": base,
              "clock": "seconds" if DEVICE.type == "cuda" else "CPU seconds",
              "points": [{**point, "bytes": found, "seconds": took}
                         for point, found, took in zip(points, held, spent)]}
    result["slopes"] = {axis: {f"{kind} {name}": [round(p, 3) for p in slopes(*xy)]
                               for kind in ("seconds", "bytes")
                               for name, xy in curves(result, axis, kind).items()}
                        for axis in sweeps}
    steps.markdown("One step; exponents: whole sweep / last doubling", table(result))
    print(json.dumps(result))
    if args.picture:
        draw(result, args.picture)


if __name__ == "__main__":
    main()
