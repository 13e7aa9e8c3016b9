"""scale/build.py - student and teacher as a run needs them: copied, shared, offloaded or cut.

The idea.  A teacher is a frozen copy of the student, an average of it, a bigger model, or the
student itself with its module off. Which of them, on which device and in how many slices, is
decided here, once; a training step then sees two models.

In:  the settings (distill.Config).  Out: student (with the module), teacher (without), processor.
"""
from __future__ import annotations

from dataclasses import asdict

import torch

import cue_recovery
import model as qwen
import teacher as teaching
from scale import lora, sharding
from scale.checks import check_placement, hub_advice


def build_models(config):
    """Student (with the module), teacher (without), and the student's processor."""
    if sharding.world > 1:
        if config.offload_teacher or config.offload_optimizer:
            raise ValueError("--offload-teacher and --offload-optimizer are for one process: of "
                             "several, each holds its slice on its own GPU")
        if config.graph_decoding:
            raise ValueError("--graph-decoding is for one process: several gather their weights "
                             "anew before they sample")
    device, dtype = check_placement(config.device, config.dtype, config.attention)
    options = sharding.load_options(dict(
        dtype=dtype, device=device, attention=config.attention,
        min_pixels=config.min_pixels or None, max_pixels=config.max_pixels or None))
    with hub_advice(config.student):
        student, processor = qwen.load(config.student, **options)
    if config.teacher == "self" and config.train in ("cue", "lora") and sharding.world == 1:
        teacher = student        # one frozen backbone; what was added is off while it teaches
    elif config.teacher in ("self", "ema"):
        teacher = teaching.frozen_copy(student)
        if config.teacher == "ema":
            teacher = teacher.float()        # in bf16 an average would be rounded to where it was
    else:
        there = {"device": "cpu"} if config.offload_teacher else {}
        with hub_advice(config.teacher):
            teacher, _ = qwen.load(config.teacher, cue=False,
                                   **{**options, "dtype": student.dtype, **there})
        teaching.freeze(teacher)
    if config.offload_teacher and teacher is not student:
        teacher.to("cpu")
    if config.cue_recovery and getattr(student, "cue_recovery", None) is None:
        depth = student.config.text_config.num_hidden_layers
        cue_recovery.attach(student, config.every or min(5, max(1, depth // 3)), seed=config.seed,
                            sink=config.sink)
    if config.train == "lora":
        lora.attach(student, config.lora_rank, config.lora_alpha, config.seed)
    if config.gradient_checkpointing:
        # renamed in transformers 5.24, the old name warns
        getattr(student, "activation_checkpointing_enable", student.gradient_checkpointing_enable)()
    for model in (student, teacher):         # last: by now every hook is registered
        sharding.shard(model)
    return student, teacher, processor


def print_settings(config, student, teacher, weights) -> None:
    print("\n".join(f"  {name:22} {value}" for name, value in asdict(config).items()))
    millions = {name: sum(p.numel() for p in parameters) / 1e6 for name, parameters in (
        ("student", student.parameters()), ("teacher", teacher.parameters()),
        ("trained", (p for _, p in weights)))}
    print(", ".join(f"{name} {size:.2f} M" for name, size in millions.items())
          + f" parameters, {student.dtype} on {student.device}, {torch.get_num_threads()} threads")
    cue = getattr(student, "cue_recovery", None)
    if cue is not None:
        print(f"cue recovery before layers {[layer + 1 for layer in cue.settings()['layers']]}: "
              f"{sum(p.numel() for p in cue.parameters()) / 1e6:.2f} M parameters")
