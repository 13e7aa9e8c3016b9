"""memory.py - the memory plan against measured peaks: training steps of random models on a CPU.

Each case runs in a process of its own: imports and one step of the tiny checkpoint first, then the
kernel's high-water mark of resident memory is set back and a step of the case is taken (with the
optimizer's moments there already). The mark less what was resident before, beside plan.plan() of
the same settings, by phase and in all. The goal: within 15 %.

Run:  OMP_NUM_THREADS=1 python tests/speed/memory.py            about 10 minutes, up to 9 GB
      OMP_NUM_THREADS=1 python tests/speed/memory.py --quick    two small cases
Prints a table, a Markdown row a case, and as its last line one JSON object.

glibc's malloc would keep freed blocks below 32 MB for itself, so it is told to hand blocks beyond
64 kB back at once (MALLOC_MMAP_THRESHOLD_): what is measured is memory in use.
Not measured: a GPU, whose allocator and kernels differ. Linux only (/proc).
"""
import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

GOAL = 0.15
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
# text: hidden, layers, heads, key heads, head size, ff, vocabulary; vision: hidden, ff, depth
SIZES = {"0.05B": ((512, 10, 8, 4, 64, 1536, 8192), (256, 1024, 6)),
         "0.15B": ((768, 14, 12, 6, 64, 2304, 16384), (384, 1536, 8)),
         "0.4B": ((1024, 24, 16, 8, 64, 3072, 32768), (512, 2048, 12))}
SIDE = {"0.05B": 192, "0.15B": 128, "0.4B": 128}      # of the pictures, in pixels
COMMON = dict(batch_size=4, sample_batch=4, max_new_tokens=16, attention="sdpa", device="cpu",
              privilege="answer", every=5, loss="forward_kl", lr=1e-6, steps=9)
CASES = {                    # rows of a micro-batch, and what differs from COMMON
    "0.05B all": (2, dict(train="all")),
    "0.05B cue": (2, dict(train="cue")),
    "0.05B cue, prompts wait": (2, dict(train="cue", batch_size=12, sample_batch=8)),
    "0.05B all checkpointed": (2, dict(train="all", gradient_checkpointing=True)),
    "0.05B language eager": (2, dict(train="language", attention="eager")),
    "0.15B all bf16": (2, dict(train="all", dtype="bfloat16")),
    "0.15B language ema": (2, dict(train="language", teacher="ema")),
    "0.05B experts all": (2, dict(train="all")),
    "0.05B experts cue": (2, dict(train="cue")),
    "0.4B all": (1, dict(train="all", batch_size=2, sample_batch=2)),
    "0.4B cue": (2, dict(train="cue")),
}
QUICK = ("0.05B all", "0.05B cue")
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 512,
           "decoder_sparse_step": 1, "mlp_only_layers": []}       # of the cases that say so


def shape(size: str, experts: bool = False) -> dict:
    """config.json of a random model with the tiny checkpoint's tokenizer."""
    import model as qwen
    from scale import plan
    (D, layers, heads, keys, d, F, V), (vD, vF, depth) = SIZES[size]
    config = plan.published("Qwen/Qwen3-VL-2B")
    tiny = json.loads((qwen.TINY / "config.json").read_text())
    config |= {k: tiny[k] for k in ("image_token_id", "video_token_id")}
    config["text_config"] |= {
        "hidden_size": D, "num_hidden_layers": layers, "num_attention_heads": heads, "head_dim": d,
        "num_key_value_heads": keys, "intermediate_size": F, "vocab_size": V,
        "rope_scaling": {"mrope_interleaved": True, "rope_type": "default",
                         "mrope_section": [d // 2 - 2 * (d // 6), d // 6, d // 6]}}
    if experts:
        config["model_type"] = "qwen3_vl_moe"
        config["text_config"] |= EXPERTS
    config["vision_config"] |= {
        "hidden_size": vD, "intermediate_size": vF, "depth": depth, "num_heads": vD // 64,
        "out_hidden_size": D, "patch_size": 8, "num_position_embeddings": 1024,
        "deepstack_visual_indexes": [1, 2, 3]}
    return config


def random_model(config: dict, folder: Path, dtype, attention: str):
    """(model, processor) with random weights made in `dtype`: no float32 copy, no weight file."""
    import shutil
    import transformers
    import model as qwen
    from scale.checkpoint import PROCESSOR_FILES
    folder.mkdir(parents=True, exist_ok=True)
    for name in PROCESSOR_FILES:
        if (qwen.TINY / name).exists():
            shutil.copyfile(qwen.TINY / name, folder / name)
    (folder / "config.json").write_text(json.dumps(config))
    pictures = json.loads((folder / "preprocessor_config.json").read_text())
    pictures["patch_size"] = config["vision_config"]["patch_size"]
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    kind = "Qwen3VLMoe" if config["model_type"] == "qwen3_vl_moe" else "Qwen3VL"
    made = getattr(transformers, kind + "Config")(
        **{k: v for k, v in config.items() if k != "model_type"})
    model = getattr(transformers, kind + "ForConditionalGeneration")._from_config(
        made, dtype=dtype, attn_implementation=attention)
    return model.eval(), qwen.Processor(folder)


def records(count: int, side: int) -> list[dict]:
    """Pictures of noise, side x side pixels, and a short question."""
    import numpy as np
    from PIL import Image
    rng = np.random.default_rng(0)
    return [{"id": str(n), "question": "How many?", "answer": "2", "images": [Image.fromarray(
        rng.integers(0, 256, (side, side, 3), dtype=np.uint8))]} for n in range(count)]


# ---------------------------------------------------------------------------- one case, one process

def available() -> int:
    """Bytes that this machine can still give."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    line = next(x for x in lines if x.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


def status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


class Peaks:
    """The high-water mark of each phase: it is set back whenever a phase begins."""

    def __init__(self):
        self.base, self.seen = status("VmRSS"), {}

    def phase(self, name, function):
        def wrapped(*args, **more):
            self.take("score")
            out = function(*args, **more)
            self.take(name)
            return out
        return wrapped

    def take(self, name):
        self.seen[name] = max(self.seen.get(name, 0), status("VmHWM") - self.base)
        Path("/proc/self/clear_refs").write_text("5")


def run_case(name: str) -> dict:
    """A training step of a case in this process; what was measured and what was planned."""
    import tempfile
    import torch
    import distill
    from scale import plan
    size, (rows, changes) = name.split()[0], CASES[name]
    of_model = shape(size, "experts" in name)
    data = records(12, SIDE[size])
    dtype = changes.get("dtype", "float32")
    warm_up(distill, dtype)
    with tempfile.TemporaryDirectory() as folder:
        peaks = Peaks()
        made = random_model(of_model, Path(folder), getattr(torch, dtype),
                            changes.get("attention", COMMON["attention"]))
        prompt = made[1].length(data[0], "2")
        config = distill.Config(**{**COMMON, "max_prompt_tokens": prompt, "dtype": dtype,
                                   "micro_batch_tokens": rows * (prompt + COMMON["max_new_tokens"]),
                                   **changes})
        planned = plan.plan(plan.from_settings(config), of_model, most=SIDE[size]**2)
        if planned.peak > 0.9 * available():
            return {"case": name, "skipped": f"needs {planned.peak / 1e9:.1f} GB, this machine has "
                                             f"{available() / 1e9:.1f} GB to give"}
        started = time.time()
        metrics, found = measure(distill, config, made, data[:config.batch_size], peaks)
    expected = expected_peaks(planned)
    weights = planned.parameters
    return {"case": name, "parameters": weights["student"] + weights["module"],
            "measured": max(found.values()), "planned": max(expected.values()),
            "error": max(expected.values()) / max(found.values()) - 1, "length": metrics["length"],
            "seconds": round(time.time() - started, 1),
            "phases": {k: [found[k], expected[k]] for k in expected}}


def expected_peaks(planned) -> dict:
    """The plan's phases as they are measured here: teach and learn alternate, and are one."""
    return {"sample": planned.peaks["sample"], "update": planned.peaks["update"],
            "score": max(planned.peaks["teach"], planned.peaks["learn"])}


def warm_up(distill, dtype: str, device: str = "cpu") -> None:
    """A step of the tiny checkpoint, for what is imported and allocated once."""
    from scale.checks import quiet
    quiet()
    warm = distill.Config(batch_size=2, max_new_tokens=4, privilege="answer", device=device,
                          dtype=dtype)
    step(distill, warm, distill.build_models(warm), records(2, 32))


def measure(distill, config, made, data, peaks) -> tuple[dict, dict]:
    """(metrics of a step, peak of each of its phases) with `made` in place of a loaded model."""
    import model as qwen
    load, qwen.load = qwen.load, lambda *_, **__: made          # the rest is build_models' own
    models = distill.build_models(config)
    qwen.load = load
    distill.read_prompts = peaks.phase("sample", distill.read_prompts)
    distill.sample_responses = peaks.phase("sample", distill.sample_responses)
    distill.Optimizer.step = peaks.phase("update", distill.Optimizer.step)
    peaks.take("build")
    metrics = step(distill, config, models, data, peaks)
    return metrics, {k: v for k, v in peaks.seen.items() if k not in ("build", "moments")}


def step(distill, config, models, data, peaks=None) -> dict:
    """A training step that finds the optimizer's moments there, as all but the first do."""
    import torch
    student, teacher, processor = models
    weights = distill.choose_weights(student, config.train)
    optimizer = distill.Optimizer(weights, lr=config.lr, cue_lr=config.cue_lr, warmup=1,
                                  steps=config.steps, final=1.0, clip=1.0)
    for _, parameter in weights:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0)
    if peaks:
        peaks.take("moments")
    scale = distill.scale_for(config, student, teacher, processor)
    return distill.run_step(student, teacher, processor, data, config, 1, optimizer, scale)[0]


# ---------------------------------------------------------------------------- all cases

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two small cases, under a minute")
    parser.add_argument("--case", help="one case, in this process; prints its JSON only")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(run_case(args.case)))
        return
    env = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **os.environ, **MALLOC}
    out = []
    for name in QUICK if args.quick else CASES:
        got = subprocess.run([sys.executable, __file__, "--case", name], env=env, cwd=ROOT,
                             capture_output=True, text=True)
        if got.returncode:
            raise SystemExit(f"{name}: {got.stderr[-2000:]}")
        row = json.loads(got.stdout.splitlines()[-1])
        if "skipped" in row:
            print(f"{name:30} skipped: {row['skipped']}", flush=True)
            continue
        out.append(row)
        phases = ", ".join(f"{k} {a / 1e9:.3f}/{b / 1e9:.3f}"
                           for k, (a, b) in row["phases"].items())
        print(f"{name:30} {row['parameters'] / 1e6:6.0f} M  "
              f"measured {row['measured'] / 1e9:6.3f} GB  planned {row['planned'] / 1e9:6.3f}  "
              f"{100 * row['error']:+5.1f} %   {phases}   {row['seconds']} s", flush=True)
    print("\n| run | parameters | measured GB | planned GB | error |\n|---|---|---|---|---|")
    for row in out:
        print(f"| {row['case']} | {row['parameters'] / 1e6:.0f} M | {row['measured'] / 1e9:.2f} | "
              f"{row['planned'] / 1e9:.2f} | {100 * row['error']:+.0f} % |")
    if not out:
        raise SystemExit("every case was skipped")
    worst = max(abs(row["error"]) for row in out)
    print(json.dumps({"benchmark": "memory", "worst_error": round(worst, 4), "goal": GOAL,
                      "passed": worst < GOAL, "cases": out}))


if __name__ == "__main__":
    main()
