"""step_2b.py - one whole training step of the 2B shape on a CPU: time of each phase, peak memory.

Random weights in bf16, made in bf16 (no float32 copy, no file), through distill.build_models and
distill.training_step: --train cue, whose teacher is the student's own frozen backbone. One picture
of 512 x 512 pixels a prompt, 256 visual tokens, and a few sampled tokens. The tokenizer is the tiny
checkpoint's, the vocabulary the 2B's 151,936 rows.

Run:  OMP_NUM_THREADS=1 python tests/speed/step_2b.py              7 GB by the plan
      OMP_NUM_THREADS=1 python tests/speed/step_2b.py --small      at an eighth of the width
It shows that the real shape goes through, with which memory; times on a CPU say nothing of a GPU,
and random weights nothing of learning. Its last line is one JSON object.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from memory import (MALLOC, Peaks, available, expected_peaks, measure, random_model, records,
                    warm_up)


def shape(small: bool) -> dict:
    import model as qwen
    from scale import plan
    config = plan.published("Qwen/Qwen3-VL-2B-Instruct")
    tiny = json.loads((qwen.TINY / "config.json").read_text())
    config |= {k: tiny[k] for k in ("image_token_id", "video_token_id")}
    if small:
        config["text_config"] |= {
            "hidden_size": 256, "intermediate_size": 768, "vocab_size": 18992,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
        config["text_config"]["rope_scaling"] = {
            "mrope_interleaved": True, "mrope_section": [12, 10, 10], "rope_type": "default"}
        config["vision_config"] |= {"hidden_size": 128, "intermediate_size": 512, "num_heads": 4,
                                    "out_hidden_size": 256}
    return config


def run(args) -> dict:
    import torch
    import distill
    from scale import plan
    config, data = shape(args.small), records(args.batch, 512)
    warm_up(distill, "bfloat16")
    peaks, started = Peaks(), time.time()
    settings = distill.Config(
        train=args.train, batch_size=args.batch, sample_batch=args.batch,
        max_new_tokens=args.tokens, max_prompt_tokens=300, micro_batch_tokens=300 + args.tokens,
        privilege="answer", device="cpu", dtype="bfloat16",
        gradient_checkpointing=args.checkpointing)
    planned = plan.plan(plan.from_settings(settings), config, most=512 * 512)
    if planned.peak > 0.9 * available():
        raise SystemExit(f"needs {planned.peak / 1e9:.1f} GB by the plan, this machine has "
                         f"{available() / 1e9:.1f} GB to give")
    with tempfile.TemporaryDirectory() as folder:
        made = random_model(config, Path(folder), torch.bfloat16, "sdpa")
        made[1].max_pixels = 512 * 512     # the tiny processor's own limit gives 64 visual tokens
        built = time.time() - started
        metrics, found = measure(distill, settings, made, data, peaks)
    kept = ("sample_seconds", "score_seconds", "length", "loss", "gradient_norm")
    return {"benchmark": "step_2b", "small": args.small, "train": args.train, "batch": args.batch,
            "parameters": planned.parameters["student"], "module": planned.parameters["module"],
            "build_seconds": round(built, 1), **{k: metrics[k] for k in kept},
            "peak_gb": {k: round(v / 1e9, 3) for k, v in found.items()},
            "measured_gb": round(max(found.values()) / 1e9, 3),
            "planned_gb": round(max(expected_peaks(planned).values()) / 1e9, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", "--quick", action="store_true", help="an eighth of the width")
    parser.add_argument("--batch", type=int, default=1, help="prompts")
    parser.add_argument("--tokens", type=int, default=8, help="sampled, at most")
    parser.add_argument("--train", default="cue", choices=("all", "language", "cue"))
    parser.add_argument("--checkpointing", action="store_true", help="--gradient-checkpointing")
    args = parser.parse_args()
    if not MALLOC.items() <= os.environ.items():      # malloc reads them when a process starts
        raise SystemExit(subprocess.run([sys.executable, *sys.argv], env={**os.environ, **MALLOC}
                                        ).returncode)
    got = run(args)
    print("\n".join(f"{key:16} {value}" for key, value in got.items()))
    print(json.dumps(got))


if __name__ == "__main__":
    main()
