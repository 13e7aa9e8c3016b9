"""loss.py - the exact KL over the whole vocabulary: time and memory against other ways to get it.

The idea.  All sides take the same hidden states and the same head, and return the same nats and
gradients (compared before anything is timed):

    whole   plain torch: all logits of both models, log_softmax, kl_div, backward
    ours    loss.distill_loss: logits of one chunk at a time, gradients made in the forward pass
    trl     TRL's ChunkedDivergenceFunction: tiles of the vocabulary, logits made again in backward
    liger   Liger's fused linear JSD at beta 0, which is this KL

    python tests/speed/loss.py [--quick] [--threads 1] [--cpu-seconds] [--tokens 256 1024]

trl and liger are left out, with a line saying so, where they cannot be imported. To have them:
    python -m venv --system-site-packages /tmp/trl
    /tmp/trl/bin/pip install --no-deps trl liger-kernel accelerate datasets psutil
    /tmp/trl/bin/pip install pandas pyarrow multiprocess dill xxhash httpx
    /tmp/trl/bin/python tests/speed/loss.py

Memory is the peak above what the inputs take, of one call: on a CPU in a fresh process a case, as
the kernel counts it (VmHWM); on a GPU as torch's allocator counts it. With a trainable head its
gradient (V x D in float32) is a floor for everybody and given beside. Malloc is left as it is, for
times too: what fresh pages cost is part of what large tensors cost (--malloc keep leaves it out).

Out: a table, Markdown rows for README.md beside this file, and one line of JSON with the ratios.
"""
from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import pairs                                  # puts the project's root first on the path, so that
from loss import distill_loss                 # this is loss.py of the root and not this file
from memory import status
from pairs import DEVICE

VOCABULARY, HIDDEN = 151_936, 2048            # Qwen3-VL-2B


# ---------------------------------------------------------------------------- the sides

def whole(hidden, teacher_hidden, head, weights):
    student = (hidden @ head.T).float().log_softmax(-1)                                  # (T, V)
    with torch.no_grad():
        teacher = (teacher_hidden @ head.T).float().log_softmax(-1)
    nats = F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
    return (nats * weights).sum()


def ours(hidden, teacher_hidden, head, weights, chunk=None):
    size = {} if chunk is None else {"chunk": chunk}
    nats = distill_loss(hidden, teacher_hidden, head, head, weights=weights, **size)
    return (nats * weights).sum()


def trl(hidden, teacher_hidden, head, weights):
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    nats, _ = ChunkedDivergenceFunction.apply(
        hidden, head, None, teacher_hidden, head.detach(), None, 0.0)
    return (nats * weights).sum()


def liger(hidden, teacher_hidden, head, weights):
    """A mean over tokens: the weights must be 1 / T. Compiled only where that is its default."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    loss = LigerFusedLinearJSDLoss(0.0, 1.0, beta=0.0, chunk_size=128,
                                   compiled=DEVICE.type == "cuda")
    return loss(hidden, head, teacher_hidden, head.detach(),
                torch.zeros(len(hidden), dtype=torch.long, device=hidden.device))


SIDES = {"whole": whole, "ours": ours, "trl": trl, "liger": liger}


def available() -> list[str]:
    found = ["whole", "ours"]
    for name, module in (("trl", "trl.kernels.chunked_divergence"),
                         ("liger", "liger_kernel.chunked_loss")):
        try:
            __import__(module)
            found.append(name)
        except Exception as error:  # not installed, or not for this torch: either way, without it
            print(f"{name} is left out: {type(error).__name__}: {str(error).splitlines()[0]}")
    return found


def make(T, hidden_size, dtype, train_head):
    """Hidden states of T tokens, of a student and of a teacher a little off; one head for both."""
    g = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g, device=DEVICE, dtype=dtype)
    head = normal(VOCABULARY, hidden_size).mul_(3 * hidden_size**-0.5)
    hidden = normal(T, hidden_size)
    teacher_hidden = hidden + 0.3 * normal(T, hidden_size)
    weights = torch.full((T,), 1 / T, device=DEVICE)
    return hidden.requires_grad_(), teacher_hidden, head.requires_grad_(train_head), weights


def once(side, inputs):
    """Loss and gradients of the states, and of the head if it learns."""
    learn = [x for x in inputs if x.requires_grad]
    loss = side(*inputs)
    return loss.detach(), *torch.autograd.grad(loss, learn)


def check(names, inputs):
    expected = once(whole, inputs)
    limit = 1e-4 if inputs[0].dtype == torch.float32 else 5e-2     # each rounds its logits to bf16
    for name in names:
        for found, right in zip(once(SIDES[name], inputs), expected):
            error = float((found - right).float().norm() / right.float().norm())
            if not error < limit:
                raise AssertionError(f"{name} differs from whole by {error:.1e}")


# ---------------------------------------------------------------------------- memory

def peak_extra(side, inputs) -> int:
    """Bytes above what is there before, at the worst moment of one call."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        once(side, inputs)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")                 # VmHWM starts again from here
    before = status("VmRSS")
    once(side, inputs)
    return status("VmHWM") - before


def memory_of(name, T, hidden_size, dtype, train_head, chunk=None) -> int:
    """peak_extra, on a CPU in a process of its own."""
    if DEVICE.type == "cuda":
        return peak_extra(SIDES[name], make(T, hidden_size, dtype, train_head))
    case = json.dumps([name, T, hidden_size, str(dtype).removeprefix("torch."), train_head, chunk])
    command = [sys.executable, __file__, "--one-case", case]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"memory of {case}: {done.stderr[-800:]}")
    return int(done.stdout.split()[-1])


def one_case(case) -> None:
    """What a fresh process does: a small call first, so that code and libraries are there."""
    name, T, hidden_size, dtype, train_head, chunk = json.loads(case)
    side = SIDES[name] if chunk is None else lambda *x: ours(*x, chunk=chunk)
    inputs = make(T, hidden_size, getattr(torch, dtype), train_head)
    hidden, teacher_hidden, head, weights = inputs
    small = [hidden.detach()[:2].requires_grad_(), teacher_hidden[:2],
             head.detach()[:64].clone(), weights[:2]]
    once(side, small)
    print(peak_extra(side, inputs))


# ---------------------------------------------------------------------------- command line

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    pairs.add_arguments(parser, malloc="system")
    parser.add_argument("--sides", nargs="*", choices=SIDES, help="whole is always among them")
    parser.add_argument("--heads", nargs="*", choices=("frozen", "trainable"),
                        default=("frozen", "trainable"))
    parser.add_argument("--tokens", type=int, nargs="*", help="response tokens (256 1024)")
    parser.add_argument("--hidden", type=int, default=0, help="hidden size (2048, quick 256)")
    parser.add_argument("--dtype", default="bfloat16" if DEVICE.type == "cuda" else "float32")
    parser.add_argument("--chunks", type=int, nargs="*", default=[],
                        help="instead of the comparison: our time and memory at these chunk sizes")
    parser.add_argument("--one-case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one_case:
        return one_case(args.one_case)
    how = pairs.prepare(args)
    count = args.pairs or (1 if args.quick else 3)
    tokens = args.tokens or ([256] if args.quick else [256, 1024])
    hidden_size, dtype = args.hidden or (256 if args.quick else HIDDEN), getattr(torch, args.dtype)
    how |= {"hidden": hidden_size, "vocabulary": VOCABULARY, "dtype": args.dtype, "pairs": count}
    print(how)
    if args.chunks:
        return chunks(args, tokens, hidden_size, dtype, count)
    names = [n for n in available() if not args.sides or n in ("whole", *args.sides)]
    floor = VOCABULARY * hidden_size * 4 / 2**20
    print("\nhead          T  side   | seconds  of whole | peak MiB  of whole | above the head's "
          "gradient  of whole")
    rows, ratios = [], {}
    for kind in args.heads:
        train_head = kind == "trainable"
        for T in tokens:
            inputs = make(T, hidden_size, dtype, train_head)
            check(names, inputs)
            times = pairs.alternate({n: lambda n=n: once(SIDES[n], inputs) for n in names}, count,
                                    args.cpu_seconds, warm=0)          # check() was the warm-up
            del inputs
            peaks = {n: memory_of(n, T, hidden_size, dtype, train_head) / 2**20 for n in names}
            base = floor if train_head else 0
            for n in names:
                share = (times[n] / times["whole"], peaks[n] / peaks["whole"],
                         (peaks[n] - base) / (peaks["whole"] - base))
                print("{:9s} {:5d}  {:6s} | {:7.2f} {:8.2f}x | {:8.0f} {:8.3f}x | {:25.0f} {:8.3f}x"
                      .format(kind, T, n, times[n], share[0], peaks[n], share[1], peaks[n] - base,
                              share[2]), flush=True)
                rows.append(pairs.markdown(kind, f"{T:,}", n, f"{times[n]:.2f}", f"{share[0]:.2f}",
                                           f"{peaks[n]:.0f}", f"{peaks[n] - base:.0f}",
                                           f"1/{1 / share[2]:.1f}"))
                ratios[f"{kind}_T{T}_{n}"] = {
                    "time": round(share[0], 3), "memory": round(share[1], 4),
                    "memory_above_head_gradient": round(share[2], 4)}
    print("\n" + "\n".join(rows))
    print(json.dumps({"benchmark": "loss", **how, "ratios_to_whole": ratios}))


def chunks(args, tokens, hidden_size, dtype, count) -> None:
    """The choice of the chunk size: time and memory of ours alone."""
    found = {}
    for kind in args.heads:
        train_head = kind == "trainable"
        for T in tokens:
            inputs = make(T, hidden_size, dtype, train_head)
            times = pairs.alternate({c: lambda c=c: once(lambda *x: ours(*x, chunk=c), inputs)
                                     for c in args.chunks}, count, args.cpu_seconds)
            del inputs
            for c in args.chunks:
                peak = memory_of("ours", T, hidden_size, dtype, train_head, c) / 2**20
                print(pairs.markdown(kind, T, c, f"{times[c]:.2f}", f"{peak:.0f}"), flush=True)
                found[f"{kind}_T{T}_chunk{c}"] = {"seconds": round(times[c], 3), "MiB": round(peak)}
    print(json.dumps({"benchmark": "loss chunks", "chunks": found}))


if __name__ == "__main__":
    main()
