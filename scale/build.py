"""scale/build.py - student and teacher as a run needs them: copied, shared, offloaded or cut.

The idea.  A teacher is a frozen copy of the student, an average of it, a bigger model, or the
student itself with its module off. Which of them, on which device and in how many slices, is
decided here, once, and so is what this asks of a step (Scale). A training step then sees two models
and calls what it is given.

In:  the settings (distill.Config).
Out: student (with the module), teacher (without), processor; the weights that are trained; a Scale.
"""
from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Callable

import torch

import cue_recovery
import model as qwen
import teacher as teaching
from rollout import PlainDecoder
from scale import lora, offload, sharding, vision
from scale.checks import check_placement, hub_advice
from scale.decoder import FastDecoder, without_flash
from scale.graphs import GraphDecoder
from scale.optimizer import Optimizer
from scale.settings import method_first

AHEAD = 4        # micro-batches whose teacher states may wait, in memory: one costs 5 % of a step


@dataclass
class Scale:
    """What scale/ adds to a step. The defaults are the plain thing: one process, one device."""
    decoder: type = PlainDecoder              # how sample() reads prompts and takes a step
    sampling: Callable = nullcontext          # around sampling: the student's weights in one place
    hidden: Callable = qwen.last_hidden_state     # (model, batch) -> last hidden states
    teach: Callable = teaching.teach          # how the teacher reads the micro-batches
    even_out: Callable = lambda groups, *lists: groups      # as many micro-batches on every rank
    evaluation_rows: int = 64                 # at a time, at most: a bigger teacher must fit too
    read_pictures: Callable = list            # prompts -> prompts; a frozen tower reads them once
    method: Callable | None = None            # another step than distill.training_step
    halved: bool = False                      # a step ran out of memory before


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
        teacher.eval().requires_grad_(False)
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


def choose_weights(student, train: str) -> list:
    """Mark what is trained; returns [(name, parameter)], shared weights once."""
    for name, parameter in student.named_parameters():
        added = name.startswith(("cue_recovery.", "lora."))
        parameter.requires_grad_(added or train == "all"
                                 or (train == "language" and not name.startswith("model.visual.")))
    return [(n, p) for n, p in student.named_parameters() if p.requires_grad]


def optimizer_for(config, weights) -> Optimizer:
    return Optimizer(weights, lr=config.lr, cue_lr=config.cue_lr, warmup=config.warmup,
                     steps=config.steps, final=config.final_lr, clip=config.clip,
                     weight_decay=config.weight_decay,
                     device="cpu" if config.offload_optimizer else None)


def scale_for(config, student, teacher, processor) -> Scale:
    """The parts of scale/ that this run needs."""
    scale = Scale(GraphDecoder if config.graph_decoding else FastDecoder, without_flash)
    if sharding.world > 1:
        @contextmanager
        def sampling(model):
            with sharding.gathered(model), without_flash(model):
                yield

        def teach(*arguments):
            yield from teaching.teach(*arguments)
            sharding.release(teacher)
        return Scale(FastDecoder, sampling, sharding.last_hidden_state, teach,
                     partial(sharding.even_out, processor))
    if config.offload_teacher:
        scale.teach = partial(offload.teach, student.device)
    elif teacher is not student and student.device.type == "cpu" and torch.get_num_threads() == 1:
        scale.teach = teach_beside
    if student.device.type == "cpu":
        scale.evaluation_rows = 256
    if config.train != "all" and config.teacher == "self":
        # one frozen tower in both models: each picture goes through it once, not three times
        scale.read_pictures = lambda prompts: vision.read_once(
            prompts, student, teacher, rows=config.sample_batch)
    return scale


def teach_beside(teacher, groups, read):
    """teacher.teach on a second core: the teacher reads the next micro-batches while the student
    learns from this one. The same numbers, bit for bit.

    For a CPU run of one thread. Two threads of one product would be faster on an idle machine, but
    each waits for the other at every product, and on a busy machine they collapse (docs/speed.md).
    """
    def states(rows):
        with teaching.at_work(teacher):         # here: gradients are switched off for one thread
            return read(teacher, rows)

    # asked for once, the number of threads holds in the new thread too
    pool = ThreadPoolExecutor(1, initializer=torch.get_num_threads)
    groups, waiting = iter(groups), deque()
    try:
        while True:
            waiting += [(rows, pool.submit(states, rows))
                        for rows in islice(groups, AHEAD - len(waiting))]
            if not waiting:
                break
            rows, future = waiting.popleft()
            yield rows, future.result(), teacher.lm_head.weight
            del future                          # or its states would be kept beside the next
    finally:
        pool.shutdown(cancel_futures=True)      # a step that failed leaves nothing running


def print_settings(config, student, teacher, weights) -> None:
    print("\n".join(f"  {f.name:22} {getattr(config, f.name)}" for f in method_first(config)))
    millions = {name: sum(p.numel() for p in parameters) / 1e6 for name, parameters in (
        ("student", student.parameters()), ("teacher", teacher.parameters()),
        ("trained", (p for _, p in weights)))}
    print(", ".join(f"{name} {size:.2f} M" for name, size in millions.items())
          + f" parameters, {student.dtype} on {student.device}, {torch.get_num_threads()} threads")
    cue = getattr(student, "cue_recovery", None)
    if cue is not None:
        print(f"cue recovery before layers {[layer + 1 for layer in cue.settings()['layers']]}: "
              f"{sum(p.numel() for p in cue.parameters()) / 1e6:.2f} M parameters")
