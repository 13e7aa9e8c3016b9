"""rollout.py - how fast rollout.sample is beside the class's own generate. Run by hand.

The idea.  Three ways of sampling the same answers from the same prompts, in one process and in
turns, so that other work on the machine hits both; a ratio a pair, and the median of the pairs.

    ours       rollout.sample with FastDecoder
    generate   model.generate: same temperature, bans (suppress_tokens), stop ids and limit, its
               default DynamicCache. It returns no log-probs, ours does.
    plain      rollout.sample with PlainDecoder: DynamicCache, a mask longer by one at every step,
               rows leaving by a copy of the cache

How both stop at the same steps, though they draw different tokens: hooks on the model's rotary
embedding and on lm_head see every row's position, and make the stop token certain at one position,
the same for all rows, and impossible before. So a row whose prompt is n tokens shorter answers n
tokens longer. `even`: all prompts of one length, all answers of about T tokens. `ragged`: answers
spread evenly from T / 8 to T. `queue`: the same, in random order, of which 32 run at a time; ours
reads four more when four have stopped, the others take 32 after 32. `toy` has no such hooks:
greedy, the tiny checkpoint's own stops, and the tokens are compared.

Run   OMP_NUM_THREADS=1 python tests/speed/rollout.py [--quick] [--only mid] [--pairs 1]
On a CPU with one thread the ratios are of CPU seconds, which other people's work disturbs least;
wall ratios stand beside them. On a GPU everything is wall time between synchronisations, and peak
memory.
"""
from __future__ import annotations

import argparse
import functools
import json
import os
import random
import statistics
import sys
import time
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
import transformers  # noqa: E402

import model as qwen  # noqa: E402
from data import toy  # noqa: E402
from rollout import PlainDecoder, sample  # noqa: E402
from scale.checks import quiet  # noqa: E402
from scale.decoder import FastDecoder  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# name, model, attention, prompts, tokens of the longest prompt, T, lengths, samples a prompt, pairs
FULL = [("toy, 48 rows", "tiny", "eager", 48, 0, 96, "own", 1, 7),
        *((f"{rows} x 128, {kind}", "tiny", "sdpa", rows, 128, 64, kind, 1, 5)
          for rows in (8, 32, 64) for kind in ("even", "ragged")),
        *((f"{rows} x 1,000, {kind}", "tiny", "sdpa", rows, 1000, T, kind, 1, 3)
          for rows, T in ((8, 256), (32, 128)) for kind in ("even", "ragged")),
        ("8 x 4 samples x 1,000, ragged", "tiny", "sdpa", 8, 1000, 128, "ragged", 4, 3),
        *((f"{rows} x {longest:,} + 1,000, {kind}", "tiny", "sdpa", rows, longest, 1000, kind, 1, 2)
          for rows in (8, 32) for longest, kind in ((128, "even"), (1000, "ragged"))),
        ("128 x 600 + 512, queue of 32", "tiny", "sdpa", 128, 600, 512, "queue", 1, 2),
        ("mid 8 x 72, even", "mid", "sdpa", 8, 72, 16, "even", 1, 3),
        ("mid 8 x 72, ragged", "mid", "sdpa", 8, 72, 16, "ragged", 1, 3),
        *((f"mid 8 x 128 + 64, {kind}", "mid", "sdpa", 8, 128, 64, kind, 1, 1)
          for kind in ("even", "ragged")),
        ("mid 2 x 4 samples x 72, even", "mid", "sdpa", 2, 72, 16, "even", 4, 3)]
QUICK = [("toy, 48 rows", "tiny", "eager", 48, 0, 96, "own", 1, 3),
         ("8 x 128, even", "tiny", "sdpa", 8, 128, 64, "even", 1, 3),
         ("32 x 128, ragged", "tiny", "sdpa", 32, 128, 64, "ragged", 1, 3),
         ("8 x 1,000, ragged", "tiny", "sdpa", 8, 1000, 64, "ragged", 1, 2),
         ("mid 2 x 64, ragged", "mid", "sdpa", 2, 64, 12, "ragged", 1, 1)]


# ---------------------------------------------------------------------------- models and prompts

def load(name: str, attention: str):
    """The shipped checkpoint, or 0.3 B random weights, the real vocabulary; and the processor."""
    model, processor = qwen.load(qwen.TINY, device=DEVICE, attention=attention)
    if name == "tiny":
        return model, processor
    config = transformers.AutoConfig.from_pretrained(qwen.TINY)
    for key, value in dict(hidden_size=1024, num_hidden_layers=10, num_attention_heads=16,
                           num_key_value_heads=8, head_dim=128, intermediate_size=3072,
                           vocab_size=151_936).items():
        setattr(config.text_config, key, value)
    config.vision_config.out_hidden_size = 1024
    config._attn_implementation = attention
    torch.manual_seed(0)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    return transformers.Qwen3VLForConditionalGeneration(config).to(DEVICE, dtype).eval(), processor


def make_prompts(processor, count: int, longest: int, shorter: list[int]) -> list[qwen.Prompt]:
    """Toy prompts with a picture each. longest > 0: filled with random words to `longest` tokens,
    row i to shorter[i] tokens less; the fill stands before the picture."""
    rng, prompts = random.Random(5), []
    for row in range(count):
        scene = toy.make_scene(rng, "test")
        record = toy.make_record(scene, toy.make_question(scene, rng), str(row), "")
        prompt = processor.prompt({**record, "images": [toy.draw(scene, rng)]})
        if longest:
            fill = longest - shorter[row] - len(prompt.ids)
            if fill < 0:
                raise ValueError(f"a prompt of {len(prompt.ids)} tokens is too long by {-fill}")
            prompt.ids = [rng.randrange(100, 400) for _ in range(fill)] + prompt.ids
        prompts.append(prompt)
    return prompts


def answer_lengths(kind: str, rows: int, T: int) -> list[int]:
    lengths = [T if kind not in ("ragged", "queue") else
               round(T / 8 + (T - T / 8) * row / max(1, rows - 1)) for row in range(rows)]
    if kind == "queue":
        random.Random(5).shuffle(lengths)
    return lengths


@contextmanager
def stop_at(model, position: int, stop_id: int):
    """Every row says `stop_id` as the token that stands at this position, and never before."""
    now = {}

    def look(module, args, kwargs):
        ids = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
        now["next"] = ids[0, :, -1] + 1              # (R,), where the token now drawn will stand

    def decide(module, args, logits):
        logits = logits.clone()
        logits[:, -1, stop_id] = torch.where(now["next"] >= position, 1e4, -1e4).to(logits.dtype)
        return logits

    rotary = model.model.language_model.rotary_emb
    hooks = [rotary.register_forward_pre_hook(look, with_kwargs=True),
             model.lm_head.register_forward_hook(decide)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# ---------------------------------------------------------------------------- the ways to sample

def ours(model, batch, T, K, temperature, sampling, more=None, decoder=FastDecoder):
    out = sample(model, batch, max_new_tokens=T, temperature=temperature, samples_per_prompt=K,
                 generator=torch.Generator().manual_seed(0), more=more, decoder=decoder, **sampling)
    return out.ids, out.lengths


plain = functools.partial(ours, decoder=PlainDecoder)


def generate(model, batch, T, K, temperature, sampling):
    batch = {k: v for k, v in batch.items() if k != "position_ids"}         # it makes its own
    choice = dict(do_sample=False, temperature=None, top_k=None, top_p=None)
    if temperature:
        choice = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0)
    ids = model.generate(**batch, **choice, max_new_tokens=T, num_return_sequences=K,
                         suppress_tokens=list(sampling["banned_ids"]),
                         eos_token_id=sorted(sampling["stop_ids"]), pad_token_id=sampling["pad_id"])
    ids = ids[:, batch["input_ids"].shape[1]:]
    stops = torch.isin(ids, torch.tensor(sorted(sampling["stop_ids"]), device=ids.device))
    first = torch.where(stops.any(1), stops.int().argmax(1) + 1, ids.shape[1])
    return ids, first


WAYS = {"ours": ours, "generate": generate, "plain": plain}


def one_by_one(way, model, batches, *settings):
    """A way that knows no queue: one batch after the other. The ids are those of the first."""
    ids, lengths = zip(*(way(model, batch, *settings) for batch in batches))
    return ids[0], torch.cat(lengths)


# ---------------------------------------------------------------------------- measuring

def timed(way, *args) -> dict:
    """Wall and CPU seconds, peak GPU memory in MiB, and the lengths."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    wall, cpu = time.perf_counter(), time.process_time()
    ids, lengths = way(*args)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "ids": ids,
            "lengths": lengths.tolist(),
            "peak": torch.cuda.max_memory_allocated() / 2**20 if DEVICE == "cuda" else 0.0}


def run_case(case, model, processor) -> dict:
    name, _, _, prompts, longest, T, kind, K, pairs = case
    answers = answer_lengths(kind, prompts, T)
    rows = make_prompts(processor, prompts, longest, [n - min(answers) for n in answers])
    places = 32 if kind == "queue" else prompts
    batches = [processor.batch(rows[i:i + places], device=model.device)
               for i in range(0, prompts, places)]
    temperature = 0.0 if kind == "own" else 1.0
    sampling = processor.sampling
    after = torch.cat([b["position_ids"].amax(dim=(0, 2)) + 1 for b in batches])   # padding has 0
    stop_id = min(processor.stop_ids)
    if kind != "own":
        sampling = {**sampling, "stop_ids": {stop_id}}
    place = int((after + torch.tensor(answers, device=after.device)).min()) - 1

    def everything(limit):
        out = {}
        for way in order:
            settings = limit, K, temperature, sampling
            if way == "ours":
                out[way] = timed(ours, model, batches[0], *settings,
                                 processor.in_turn(rows[places:], model.device))
            else:
                out[way] = timed(one_by_one, WAYS[way], model, batches, *settings)
        return out

    order, runs, first = list(WAYS), [], []
    with stop_at(model, place, stop_id) if kind != "own" else torch.no_grad():
        everything(2)                                                    # warm up
        for _ in range(pairs):
            runs.append(everything(T))
            first.append(everything(1))                                  # the prefill and one token
            order.reverse()
    lengths = {way: runs[0][way]["lengths"] for way in order}
    if not lengths["ours"] == lengths["generate"] == lengths["plain"]:
        raise AssertionError(f"{name}: the ways stopped at different steps: {lengths}")
    if kind == "own" and runs[0]["ours"]["ids"].tolist() != runs[0]["generate"]["ids"].tolist():
        raise AssertionError(f"{name}: greedy tokens differ from generate's")
    return report(name, runs, first, lengths["ours"])


def report(name, runs, first, lengths) -> dict:
    clock = "cpu" if DEVICE == "cpu" and torch.get_num_threads() == 1 else "wall"
    median = statistics.median
    seconds = median(r["ours"]["wall"] for r in runs)
    result = {"rows": len(lengths), "mean_length": round(statistics.mean(lengths), 1),
              "max_length": max(lengths), "seconds": round(seconds, 3),
              "tokens_per_second": round(sum(lengths) / seconds),
              "prefill_share": round(median(f["ours"][clock] / r["ours"][clock]
                                            for r, f in zip(runs, first)), 2)}
    for way in ("generate", "plain"):
        for kind in {clock, "wall"}:
            result[f"{way}_{kind}"] = round(median(r[way][kind] / r["ours"][kind] for r in runs), 2)
        result[f"{way}_decoding"] = round(median(
            (r[way][clock] - f[way][clock]) / max(1e-9, r["ours"][clock] - f["ours"][clock])
            for r, f in zip(runs, first)), 2)
    spread = sorted(r["generate"][clock] / r["ours"][clock] for r in runs)
    result["generate_range"] = [round(spread[0], 2), round(spread[-1], 2)]
    if DEVICE == "cuda":
        result["peak_mib"] = {way: round(max(r[way]["peak"] for r in runs)) for way in WAYS}
    line = (f"{name:32} {result['tokens_per_second']:6} {result['prefill_share']:5.0%}   "
            f"generate {result[f'generate_{clock}']:5.2f} [{spread[0]:.2f}, {spread[-1]:.2f}]  "
            f"decoding only {result['generate_decoding']:5.2f}  wall {result['generate_wall']:5.2f}"
            f"   plain {result[f'plain_{clock}']:5.2f}  decoding only "
            f"{result['plain_decoding']:5.2f}")
    print(line + (f"   peak MiB {result['peak_mib']}" if DEVICE == "cuda" else ""), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few small cases, under a minute")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--pairs", type=int, default=0, help="turns a case (default: its own)")
    args = parser.parse_args()
    quiet()
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    clock = "CPU seconds" if DEVICE == "cpu" and torch.get_num_threads() == 1 else "wall seconds"
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, transformers "
          f"{transformers.__version__}; time of the other / ours in {clock}: above 1 ours is faster"
          f"\n{'prompts x tokens':32} {'tok/s':>6} prefill")
    results, loaded = {}, {}
    for case in QUICK if args.quick else FULL:
        if args.only not in case[0]:
            continue
        if case[1:3] not in loaded:
            loaded = {case[1:3]: load(*case[1:3])}           # one model in memory at a time
        results[case[0]] = run_case((*case[:-1], args.pairs or case[-1]), *loaded[case[1:3]])
    day = time.strftime("%Y-%m-%d")
    ratio = "generate_cpu" if clock == "CPU seconds" else "generate_wall"
    print(f"\n| {day} | {name}, {torch.get_num_threads()} threads | "
          + " | ".join(f"{case}: {r[ratio]}" for case, r in results.items()) + " |")
    print(json.dumps({"benchmark": "rollout", "date": day, "device": name, "clock": clock,
                      "threads": torch.get_num_threads(), "quick": args.quick, "cases": results}))


if __name__ == "__main__":
    main()
