"""pairs.py - what the benchmarks share: alternating measurements in one process, and a table.

The idea.  A machine drifts (other people, clocks, caches), so a time alone says little. Two sides
are measured in turn, A B A B ..., in one process on the same tensors; each gets the median of its
times, and the ratio of the medians is the result.

On a GPU the times are those of CUDA events; on a CPU they are wall seconds, or with --cpu-seconds
the seconds this process was given, which other people's work on the machine stretches far less.

Torch's CPU allocator gives large tensors back to the system at once, and on a virtual machine the
page faults of the next one can cost more than the arithmetic (here 29 ms instead of 1.7 to copy
33 MB): keep_pages() asks glibc to keep them, for all sides alike.
"""
from __future__ import annotations

import ctypes
import platform
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def add_arguments(parser, malloc="keep") -> None:
    """The options that every benchmark has. malloc: the default of --malloc."""
    parser.add_argument("--quick", action="store_true",
                        help="fewer sizes and pairs: below a minute")
    parser.add_argument("--pairs", type=int, default=0, help="measurements of each side")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's own)")
    parser.add_argument("--cpu-seconds", action="store_true",
                        help="count this process's seconds instead of the wall's (with one thread)")
    parser.add_argument("--malloc", choices=("keep", "system"), default=malloc,
                        help=f"keep freed pages, or leave malloc as it is (default: {malloc})")


def prepare(args) -> dict:
    """Set what the options ask for; returns how it was measured, for the JSON line."""
    if args.threads:
        torch.set_num_threads(args.threads)
    kept = args.malloc == "keep" and DEVICE.type == "cpu" and keep_pages()
    return {"machine": machine(), "pages_kept": kept,
            "clock": "cuda events" if DEVICE.type == "cuda" else
                     "cpu seconds" if args.cpu_seconds else "wall seconds"}


def keep_pages() -> bool:
    """Tell glibc to reuse freed memory; False where there is no mallopt (macOS, musl)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    trim_threshold, mmap_threshold = -1, -3                    # names of malloc.h
    return bool(mallopt(mmap_threshold, 2**31 - 1) and mallopt(trim_threshold, 2**31 - 1))


def seconds(function, clock=time.perf_counter) -> float:
    """One call, waited for."""
    if DEVICE.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    start = clock()
    function()
    return clock() - start


def alternate(sides: dict, pairs: int, cpu_seconds=False, warm=1) -> dict[str, float]:
    """Median seconds of each side, measured in turn after `warm` calls of each."""
    times = {name: [] for name in sides}
    for n in range(pairs + warm):
        for name, function in sides.items():
            spent = seconds(function, time.process_time if cpu_seconds else time.perf_counter)
            if n >= warm:
                times[name].append(spent)
    return {name: statistics.median(found) for name, found in times.items()}


def machine() -> str:
    """What ran: for the Markdown row and the JSON line."""
    if DEVICE.type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = next((line.split(":")[1].strip() for line in _cpuinfo() if "model name" in line),
                    platform.processor() or platform.machine())
        name += f", {torch.get_num_threads()} thread(s)"
    return f"{name}, torch {torch.__version__}, Python {platform.python_version()}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def markdown(*cells) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"
