"""gpu.py - one command on one card: is it right there, how fast, and does the plan hold?

The idea.  Kernels, roundings and the allocator of a GPU are not those of a CPU. Each part below is
one function; if one fails, that is its result, and the rest still runs. The model has the shape of
Qwen3-VL-2B and random weights, made on the device: nothing is downloaded.

    equality    two ways to the same numbers, float32 and bf16: the largest difference, its bound
    sampling    FastDecoder, PlainDecoder and the class's `generate`, in tokens a second
    module      the recovery module as the paper writes it, and absorbed
    losses      the chunked loss and whole logits: time and peak memory
    step        a training step of all weights, of adapters, of the module alone: seconds of each
                phase; measured peaks beside scale/plan.py's
    launches    of one decoding step: its time, the time its kernels take, and how often it waits
    graph       GraphDecoder: do its answers differ, its step, tokens a second

Run:  python tests/speed/gpu.py                          48 GB by the plan; on a smaller card the
                                                         training step is one of the module alone
      python tests/speed/gpu.py --device cpu --quick     the tiny shape, to test this script
Each part is printed when it is done. The last line is one JSON object with all numbers; the exit
code is 1 if a part failed or a difference is above its bound.

Choices a reader may wonder about:
1) A difference is max |a - b| / max |b|, but for sampled tokens: nats of a log-probability, and the
   number of other tokens. In bf16 the last has no bound: FastDecoder's fused norm rounds otherwise.
2) The bounds were chosen on a CPU. A GPU may ask for others.
3) The tokenizer is the tiny checkpoint's. No row stops early, so all sides sample as many tokens.
4) A part that would begin after --minutes is skipped; one that has begun is not stopped.
"""
from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
import transformers
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import memory                                     # puts the project's root first on the path
import module
import pairs
import distill
import model as qwen
from loss import distill_loss, forward_kl
from rollout import PlainDecoder, sample
from scale import checks, decoder as decoding, plan
from scale.decoder import FastDecoder, fused_norm, norms_of
from scale.graphs import GraphDecoder
from step_2b import shape

# Dimension letters: R rows, L prompt tokens, T sampled tokens, N tokens, D hidden, V vocabulary.

SKIPPED = "skipped: no CUDA"


class Bench:
    """The device, and the sizes of every part."""

    def __init__(self, device: str, quick: bool):
        self.device, self.quick = torch.device(device), quick
        self.cuda = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.side, self.T, self.rows = (48, 6, (2,)) if quick else (512, 64, (8, 64))
        self.pairs = 1 if quick else 3
        self.config = (json.loads((qwen.TINY / "config.json").read_text()) if quick
                       else shape(False))

    def make(self, dtype=None):
        """(model, processor) with random weights on the device."""
        config = self.config
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder, self.device:
            model, processor = memory.random_model(config, Path(folder), dtype or self.dtype,
                                                   "sdpa")
        processor.max_pixels = self.side**2
        # no row stops, and none says a picture's token, which scoring would look a picture up for
        last = config["text_config"]["vocab_size"] - 1
        processor.sampling = {"stop_ids": {last}, "pad_id": processor.pad_id,
                              "banned_ids": [processor.image_id, processor.video_id, last]}
        return model, processor

    def batch(self, processor, rows: int) -> dict:
        return processor.batch(self.prompts(processor, rows), device=self.device)

    def prompts(self, processor, rows: int) -> list:
        """A picture of noise each, and questions of different length."""
        return [processor.prompt({**record, "question": "How many? " * (1 + n % 8)})
                for n, record in enumerate(memory.records(rows, self.side))]

    def sample(self, model, processor, batch, decoder=FastDecoder):
        return sample(model, batch, max_new_tokens=self.T, decoder=decoder,
                      generator=torch.Generator().manual_seed(0), **processor.sampling)

    def normal(self, *size, dtype=None):
        return torch.randn(*size, device=self.device, dtype=dtype or self.dtype)

    def peak_gb(self, function):
        """The most that a call needs beside what is there before."""
        if not self.cuda:
            return SKIPPED
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 1e9


def attempt(function, *args):
    """The function's result, or what went wrong and where."""
    try:
        return function(*args)
    except Exception as error:          # whatever it is, the other parts are still worth running
        at = traceback.extract_tb(error.__traceback__)[-1]
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]} "
                          f"({Path(at.filename).name}:{at.lineno})"}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def difference(found, expected) -> float:
    found, expected = (x.detach().double() for x in (found, expected))
    return float((found - expected).abs().max() / expected.abs().max())


# ---------------------------------------------------------------------------- equality

@torch.no_grad()
def padded_is_alone(bench, model, processor):
    """Logits behind a prompt, left-padded beside a longer one and alone."""
    prompts = bench.prompts(processor, 3)

    def logits(rows):
        batch = processor.batch(rows, device=bench.device)
        return model(**batch, use_cache=False, logits_to_keep=1).logits[:, -1]
    return difference(logits(prompts), torch.cat([logits([prompt]) for prompt in prompts]))


@torch.no_grad()
def cached_is_uncached(bench, model, processor):
    """Nats between a token's log-probability when sampled and when all are read at once."""
    prompts = bench.prompts(processor, 3)
    out = bench.sample(model, processor, processor.batch(prompts, device=bench.device))
    both = processor.batch([replace(p, ids=p.ids + ids)
                            for p, ids in zip(prompts, out.ids.tolist())], device=bench.device)
    logits = model(**both, use_cache=False, logits_to_keep=bench.T + 1).logits[:, :-1].float()
    logits[..., processor.sampling["banned_ids"]] = float("-inf")
    scored = logits.log_softmax(-1).gather(2, out.ids[..., None])[..., 0]           # (R, T)
    return float((out.logprobs - scored).abs().max())


def decoders_agree(bench, model, processor):
    """Tokens that differ between PlainDecoder and FastDecoder, from the same uniform numbers."""
    batch = bench.batch(processor, 3)
    fast, plain = (bench.sample(model, processor, batch, decoder).ids
                   for decoder in (FastDecoder, PlainDecoder))
    return int((fast != plain).sum())


def loss_is_whole(bench, model, processor):
    """Nats and gradients of the states and of the head; the last chunk is not full."""
    head = model.lm_head.weight.detach().clone().requires_grad_()
    hidden, other = (bench.normal(40, head.shape[1], dtype=head.dtype) for _ in range(2))
    hidden.requires_grad_()
    whole = whole_loss(hidden, other, head)
    ours = distill_loss(hidden, other, head, head, chunk=16)
    both = [(nats, *torch.autograd.grad(nats.sum(), (hidden, head))) for nats in (ours, whole)]
    return max(difference(*pair) for pair in zip(*both))


def whole_loss(hidden, other, head):
    """The loss on the board, from all logits of both models. (N,) nats."""
    log_p = (hidden @ head.T).float().log_softmax(-1)                               # (N, V)
    return forward_kl(log_p, (other @ head.detach().T).float().log_softmax(-1))


@torch.no_grad()
def absorbed_is_textbook(bench, model, processor):
    """What a block reads from the picture, and its attention; a row has fewer visual tokens."""
    D, heads, N = (64, 4, 20) if bench.quick else (2048, 16, 1024)
    block, (x, _, visual, lo, hi) = module.make(2, N, model.dtype, D, heads)
    visual[0, N // 2:] = False
    q = bench.normal(2, heads, D // heads, dtype=model.dtype)
    both = [form(q, x[:, lo:hi], visual) for form in (block.absorbed, block.textbook)]
    return max(difference(*pair) for pair in zip(*both))


@torch.no_grad()
def fused_norm_is_the_class(bench, model, processor):
    norm = norms_of(model)[0]
    norm.weight.uniform_(0.5, 1.5)
    x = 3 * bench.normal(64, len(norm.weight), dtype=norm.weight.dtype)
    return difference(fused_norm(norm, x), norm(x))


BOUNDS = {                      # check: (float32, bf16); None: reported only
    padded_is_alone: (1e-4, 5e-2), cached_is_uncached: (1e-3, 0.2), decoders_agree: (0, None),
    loss_is_whole: (1e-4, 5e-2), absorbed_is_textbook: (1e-4, 5e-2),
    fused_norm_is_the_class: (1e-6, 2**-6)}


def equality(bench) -> dict:
    out = {}
    for n, dtype in enumerate((torch.float32, torch.bfloat16)):
        made = bench.make(dtype)
        for check, bounds in BOUNDS.items():
            found, bound = attempt(check, bench, *made), bounds[n]
            if not isinstance(found, dict):
                found = {"difference": found, "bound": bound,
                         "within": bound is None or bool(found <= bound)}       # NaN is not
            out[f"{check.__name__} {str(dtype).removeprefix('torch.')}"] = found
    return out


# ---------------------------------------------------------------------------- the other parts

def sampling(bench) -> dict:
    """Tokens a second of all rows together, prefill included, without penalties or nucleus."""
    model, processor = bench.make()
    banned = processor.sampling["banned_ids"]
    out = {}
    for rows in bench.rows:
        batch = bench.batch(processor, rows)

        def generate(batch=batch):
            inputs = {k: v for k, v in batch.items() if k != "position_ids"}    # it makes its own
            ids = model.generate(**inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                                 max_new_tokens=bench.T, suppress_tokens=banned,
                                 eos_token_id=banned[-1], pad_token_id=processor.pad_id)
            if ids.shape[1] != batch["input_ids"].shape[1] + bench.T:
                raise ValueError(f"generate returned {tuple(ids.shape)}: a row has stopped early")
        sides = {"generate": generate}
        for decoder in (FastDecoder, PlainDecoder):
            sides[decoder.__name__] = lambda batch=batch, decoder=decoder: bench.sample(
                model, processor, batch, decoder)
        seconds = pairs.alternate(sides, bench.pairs)
        out[f"{rows} rows"] = {name: rows * bench.T / s for name, s in seconds.items()}
    return out


def module_forms(bench) -> dict:
    """Milliseconds of one block at the 2B's width, forward and with backward."""
    out = {}
    for rows, N in [(1, 32)] if bench.quick else [(1, 1782), (8, 1782)]:
        forward, both, error = module.compare(rows, N, bench.dtype, bench.pairs, False)
        out[f"{rows} x {N} tokens"] = {
            "forward_ms": {k: 1e3 * s for k, s in forward.items()},
            "with_backward_ms": {k: 1e3 * s for k, s in both.items()}, "difference": error}
    return out


def losses(bench) -> dict:
    """Loss and gradients of states and head: milliseconds, and memory beside the inputs."""
    N, D, V = (32, 64, 512) if bench.quick else (1024, 2048, 151_936)
    head = bench.normal(V, D).mul_(3 * D**-0.5).requires_grad_()
    hidden, other = bench.normal(N, D).requires_grad_(), bench.normal(N, D)

    def once(side):
        torch.autograd.grad(side().sum(), (hidden, head))
    sides = {"whole": lambda: once(lambda: whole_loss(hidden, other, head)),
             "chunked": lambda: once(lambda: distill_loss(hidden, other, head, head))}
    seconds = pairs.alternate(sides, bench.pairs)
    return {name: {"ms": 1e3 * seconds[name], "peak_gb": bench.peak_gb(side)}
            for name, side in sides.items()}


class Peaks(memory.Peaks):
    """Peak of each phase by torch's allocator, less what was there before. On a CPU: none."""

    def __init__(self, cuda: bool):
        self.seen, self.cuda = {}, cuda
        self.base = torch.cuda.memory_allocated() if cuda else 0

    def take(self, name):
        if self.cuda:
            found = torch.cuda.max_memory_allocated() - self.base
            self.seen[name] = max(self.seen.get(name, 0), found)
            torch.cuda.reset_peak_memory_stats()


def training_step(bench) -> dict:
    """distill.run_step, for each choice of weights that the plan says would fit."""
    return {train: attempt(step_of, bench, train) for train in ("all", "lora", "cue")}


def step_of(bench, train: str):
    rows, T = max(bench.rows), 4 * bench.T
    data = memory.records(rows, bench.side)
    dtype = str(bench.dtype).removeprefix("torch.")
    with ExitStack() as stack:
        for owner, name in ((qwen, "load"), (distill, "read_prompts"),
                            (distill, "sample_responses"), (distill.Optimizer, "step")):
            # memory.measure puts its own in their place; here they are put back
            stack.enter_context(patch.object(owner, name, getattr(owner, name)))
        memory.warm_up(distill, dtype, str(bench.device))
        peaks = Peaks(bench.cuda)
        made = bench.make()
        length = made[1].length(data[0], "2")
        settings = distill.Config(
            train=train, batch_size=rows, sample_batch=rows, max_new_tokens=T,
            max_prompt_tokens=length, micro_batch_tokens=-(-rows // 8) * (length + T),
            privilege="answer", device=str(bench.device), dtype=dtype)
        planned = plan.plan(plan.from_settings(settings), bench.config, most=bench.side**2)
        if bench.cuda and planned.peak > torch.cuda.mem_get_info()[0]:
            return f"skipped: needs {planned.peak / 1e9:.0f} GB by the plan"
        metrics, found = memory.measure(distill, settings, made, data, peaks)
    expected = memory.expected_peaks(planned)
    if bench.cuda:              # the plan's context and gaps are not in what torch has allocated
        expected = {k: (v - plan.ALLOWANCE) / (1 + plan.SLACK) for k, v in expected.items()}
    return {"rows": rows, "prompt_tokens": length,
            **{k: metrics[k] for k in ("length", "sample_seconds", "score_seconds", "loss",
                                       "gradient_norm")},
            "planned_gb": {k: v / 1e9 for k, v in expected.items()},
            "measured_gb": {k: v / 1e9 for k, v in found.items()} if bench.cuda else SKIPPED}


def decoding_step(bench):
    """A function that takes one step after a prefill, always the same one; logits (R, V)."""
    model, processor = bench.make()
    decoder, batch = FastDecoder(model), bench.batch(processor, bench.rows[0])
    with torch.no_grad():
        tokens = decoder.read(batch, 1).argmax(-1)
    before = decoder.tokens, decoder.position, decoder.cache.lengths

    def step():
        decoder.tokens, decoder.position, decoder.cache.lengths = (
            [*before[0]], before[1], [*before[2]])
        return decoder.step(tokens)
    return step


def launches(bench) -> dict:
    """If the kernels take much less than the step, the host's launching is what takes the time."""
    step = decoding_step(bench)
    out = {"rows": bench.rows[0], "step_ms": 1e3 * pairs.alternate({"": step}, 10)[""]}
    if not bench.cuda:
        return {**out, "kernels": SKIPPED, "kernels_ms": SKIPPED}
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    found = [row for row in seen.key_averages() if row.device_type == DeviceType.CUDA]
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        step()
        torch.cuda.set_sync_debug_mode("default")
    return {**out, "kernels": sum(row.count for row in found), "waits": len(waits),
            "kernels_ms": sum(row.self_device_time_total for row in found) / 1e3}


def graph_agrees(bench, dtype) -> int:
    """Answers that differ between FastDecoder and GraphDecoder, while rows leave, prompts join and
    buffers grow: all that makes it record anew."""
    (model, processor), T = bench.make(dtype), bench.T
    uniforms = torch.rand(8, T, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def answers(decoder, stop=()):
        read = processor.in_turn(bench.prompts(processor, 8), bench.device)
        settings = processor.sampling | {"stop_ids": processor.sampling["stop_ids"].union(stop)}
        # of 20 words: the ends of 151,936 equal ones are closer to each other than float32 can tell
        out = sample(model, read(4), more=read, max_new_tokens=T, top_k=20, uniforms=uniforms,
                     decoder=decoder, **settings)
        return [ids[:n] for ids, n in zip(out.ids.tolist(), out.lengths.tolist())]
    free = answers(FastDecoder)
    stop = {free[0][T // 4], free[2][T // 2], free[5][T - 2]}
    with patch.object(decoding, "ROOM", 16):
        fast, recorded = (answers(decoder, stop) for decoder in (FastDecoder, GraphDecoder))
    if len(set(map(len, fast))) == 1:
        raise ValueError(f"all rows have stopped after {len(fast[0])} tokens: nothing was checked")
    return sum(a != b for a, b in zip(fast, recorded))


def graph_step(bench, rows: int) -> dict:
    """A step of GraphDecoder, also if it is recorded first; then tokens a second of whole answers,
    as in sampling()."""
    model, processor = bench.make()
    batch = bench.batch(processor, rows)

    def prepared(kind):
        decoder = kind(model)
        with torch.no_grad():
            tokens = decoder.read(batch, 1).argmax(-1)
        return decoder, lambda: decoder.step(tokens)

    def recorded():
        decoder.replay = None
        replayed()
    (_, launched), (decoder, replayed) = prepared(FastDecoder), prepared(GraphDecoder)
    error = difference(replayed(), launched())
    steps = pairs.alternate({"launched": launched, "graph": replayed, "recorded": recorded}, 10)
    seconds = pairs.alternate({kind.__name__: lambda kind=kind: bench.sample(
        model, processor, batch, kind) for kind in (GraphDecoder, FastDecoder)}, bench.pairs)
    return {"difference": error, **{f"{name}_ms": 1e3 * s for name, s in steps.items()},
            **{name: rows * bench.T / s for name, s in seconds.items()}}


def graph(bench) -> dict:
    """Unrecorded on a CPU, so there only the answers and the difference say something."""
    out = {}
    for dtype, bound in ((torch.float32, 0), (torch.bfloat16, None)):
        found = attempt(graph_agrees, bench, dtype)
        out[f"other answers {str(dtype).removeprefix('torch.')}"] = found if isinstance(
            found, dict) else {"difference": found, "within": bound is None or found <= bound}
    return out | {f"{rows} rows": attempt(graph_step, bench, rows) for rows in bench.rows}


# A failed recording may leave the device unusable, so the graph comes last.
PARTS = {"equality": equality, "sampling": sampling, "module": module_forms, "losses": losses,
         "step": training_step, "launches": launches, "graph": graph}


def wrong(part) -> bool:
    """Did it fail, or is a difference out of its bound?"""
    return isinstance(part, dict) and ("failed" in part or part.get("within") is False
                                       or any(map(wrong, part.values())))


def rounded(part):
    """Four digits of every number, which is all that a measurement has."""
    if isinstance(part, dict):
        return {name: rounded(value) for name, value in part.items()}
    return float(f"{part:.4g}") if isinstance(part, float) else part


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default=str(pairs.DEVICE), choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="the tiny shape and few tokens")
    parser.add_argument("--minutes", type=float, default=8, help="begin no part after so many")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=[*PARTS])
    args = parser.parse_args(argv)
    checks.quiet()
    torch.backends.cuda.enable_cudnn_sdp(False)                  # as model.load does
    pairs.DEVICE = module.DEVICE = torch.device(args.device)     # their clock, and their tensors
    bench, start, parts, seconds = Bench(args.device, args.quick), time.monotonic(), {}, {}
    for name in args.only:
        began = time.monotonic()
        if began - start > 60 * args.minutes:
            parts[name] = f"skipped: {args.minutes:g} minutes are over"
        else:
            parts[name] = rounded(attempt(PARTS[name], bench))
        seconds[name] = round(time.monotonic() - began, 1)
        print(f"{name:10} {seconds[name]:6.1f} s  {json.dumps(parts[name])}", flush=True)
    result = {"benchmark": "gpu", "device": pairs.machine(), "torch": torch.__version__,
              "transformers": transformers.__version__, "quick": args.quick, "seconds": seconds,
              "wrong": [name for name, part in parts.items() if wrong(part)], "parts": parts}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    sys.exit(bool(main()["wrong"]))
