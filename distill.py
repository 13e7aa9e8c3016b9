"""distill.py - multimodal on-policy distillation with visual cues, on a Qwen3-VL student.

    picture + question ----------------------> student --samples--> y_1 y_2 ... y_T
                       \\                          |                      | the same tokens
                        + [Hint]: visible facts -> teacher               v
                                                   |      KL( teacher || student ) at every token
        sink token <--- asks the picture ---.      '--------------------> pulls the student
        (cue_recovery.py, prefill only)

The idea.  The student answers its own prompts; a teacher that was also told what is relevant in the
picture (ViCuR, arXiv 2606.05718) scores the same tokens; the student is pulled toward the teacher
token by token. At inference nothing is changed: no hint, the picture must do.

In:  a checkpoint, records (data/records.py).  Out: runs/NAME/ with a checkpoint for AutoModel.

The one equation (eq. 6-8, with the exact divergence in place of its one-sample estimate):
    L = mean over prompts of 1/|y| sum_n D( p_T(. | X, S, y_<n), p_theta(. | X, y_<n) ), y ~ p_theta

Run
    python distill.py                                            the tiny default: minutes on a CPU
    python distill.py --student Qwen/Qwen3-VL-2B-Instruct --data my/train.jsonl
    python distill.py --resume runs/NAME                         goes on where it was killed

Departures from the paper and its release
1) The loss is the exact forward KL over the whole vocabulary (OPSD's objective, appendix F.3) by
   default. `--loss sampled` is what the paper trains with: k1, one sample per position, clamped.
   `--loss reverse_kl` is that objective without the sampling noise of the current token: for one
   state, E_{y ~ p_theta}[-A grad log p_theta(y)] is exactly the gradient of KL(p_theta || p_T).
2) One update per rollout batch, so the PPO ratio is 1 and the clip idle; neither is written here.
3) The recovery module has its own learning rate: 1e-6 from W_O = 0 goes nowhere.
Left out: rewards, GRPO, a value model, a reference-model penalty, several updates per rollout.
"""
from __future__ import annotations

import argparse
import json
import math
import random
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from tqdm import tqdm

import cue_recovery
import evaluate
import model as qwen
import teacher as teaching
from data import records as record_files, toy
from loss import distill_loss
from rollout import Rollout, append_response, sample
from scale import checkpoint, longrun, plan, sharding, vision
from scale.optimizer import Optimizer

# Dimension letters: B rows, L prompt tokens, T response tokens, N scored tokens, D hidden size,
# V vocabulary.

HERE = Path(__file__).resolve().parent


# ---------------------------------------------------------------------------- settings

def option(default, text: str, choices=None):
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass
class Config:
    """Every knob. The defaults are for a real model (paper, table 3), TOY for the tiny default."""
    student: str = option(str(qwen.TINY), "folder or hub name of the model to train")
    teacher: str = option("self", "self (the frozen start), ema, or a folder or hub name")
    ema_decay: float = option(0.99, "with --teacher ema: share of the old teacher kept each step")
    privilege: str = option("cue", "what only the teacher is told", teaching.PRIVILEGES)
    loss: str = option("forward_kl", "divergence at each token",
                       ("forward_kl", "reverse_kl", "jsd", "sampled"))
    data: str = option("", "training records, JSONL (default: the toy world, made in data/toy)")
    eval_data: str = option("", "test records (default: test.jsonl beside the training records)")
    eval_limit: int = option(512, "use the first so many test records, 0 for all")
    steps: int = option(275, "updates; 275 is the paper's main run")
    batch_size: int = option(128, "prompts an update")
    samples_per_prompt: int = option(1, "responses to each prompt, which is read once for all")
    sample_batch: int = option(32, "rows sampled at a time: bounds the key/value cache")
    micro_batch_tokens: int = option(16384, "tokens, padding included, scored at a time")
    max_prompt_tokens: int = option(2048, "longer prompts are left out and counted, never cut")
    max_new_tokens: int = option(4096, "response tokens")
    temperature: float = option(1.0, "of sampling; scoring is always at 1")
    top_p: float = option(1.0, "nucleus of sampling, 1 for the whole distribution")
    top_k: int = option(0, "sample from the k most likely, 0 for all")
    lr: float = option(1e-6, "learning rate of the model")
    cue_lr: float = option(1e-4, "learning rate of the recovery module")
    warmup: int = option(10, "steps until the full learning rate")
    final_lr: float = option(0.1, "share of the rate left at the last step (paper: constant, 1)")
    clip: float = option(1.0, "largest gradient norm")
    weight_decay: float = option(0.0, "AdamW's")
    cue_recovery: bool = option(True, "attach the sink-token module to the student")
    every: int = option(0, "a module block each so many layers; 0: 5, or a third of a shallow one")
    sink: str = option("first", "the token that asks the picture: first of the sequence (paper), "
                       "or last of the prompt, which has read the question", ("first", "last"))
    train: str = option("all", "which weights: all, language (no vision tower), cue (the module)",
                        ("all", "language", "cue"))
    gradient_checkpointing: bool = option(False, "recompute activations: less memory, more time")
    offload_teacher: bool = option(False, "the teacher in CPU memory, on the GPU only to score")
    offload_optimizer: bool = option(False, "keep masters and moments in CPU memory, updated there")
    min_pixels: int = option(0, "smallest picture in pixels, 0 for the checkpoint's own")
    max_pixels: int = option(0, "largest picture in pixels, 0 for the checkpoint's own")
    seed: int = option(0, "of data order, sampling and the module's start")
    name: str = option("", "of the run's folder below runs/ (default: the time)")
    eval_every: int = option(50, "steps between evaluations, 0 for only before and after")
    save_every: int = option(25, "steps between saved states for --resume")
    keep: int = option(0, "keep the students of the last so many evaluations, and the best")
    max_hours: float = option(0.0, "end after so many hours of steps and evaluations, 0: no limit")
    max_tokens: int = option(0, "end after so many sampled response tokens, 0: no limit")
    device: str = option("", "cuda, cpu, ... (default: cuda if there is one)")
    dtype: str = option("", "of the weights (default: float32 on a CPU, else bfloat16)")
    plan: bool = option(False, "print how much memory the run needs, and stop")
    gpu_memory: float = option(0.0, "with --plan: GB of one GPU, to say whether the run fits")
    gpus: int = option(0, "with --plan: number of GPUs (default: WORLD_SIZE, or 1)")
    attention: str = option("sdpa", "attention kernel", ("sdpa", "eager", "flash_attention_2"))


# What `python distill.py` changes when the student is the tiny default.
TOY = dict(steps=150, batch_size=48, sample_batch=48, micro_batch_tokens=8192, max_new_tokens=96,
           lr=5e-4, cue_lr=1.5e-3, attention="eager")


def read_config(argv=None) -> tuple[Config, Path | None]:
    """Settings from the command line; with --resume those of the run, and its folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    vision_flags = parser.add_mutually_exclusive_group()
    vision_flags.add_argument("--freeze-vision", dest="train", action="store_const",
                              const="language", default=argparse.SUPPRESS,
                              help="the same as --train language")
    for f in fields(Config):
        kind = {"action": argparse.BooleanOptionalAction} if isinstance(f.default, bool) else {
            "type": type(f.default), "choices": f.metadata["choices"]}
        (vision_flags if f.name == "train" else parser).add_argument(
            "--" + f.name.replace("_", "-"), default=f.default, help=f.metadata["help"], **kind)
    parser.add_argument("--resume", metavar="FOLDER", default="",
                        help="go on with this run, with its own settings (--steps, --max-hours and "
                             "--max-tokens may be raised)")
    typed = vars(parser.parse_args(argv))
    # argparse leaves alone what has a value already: parsed over Nones, only what was typed is set
    blank = argparse.Namespace(**dict.fromkeys(typed))
    changed = {k: v for k, v in vars(parser.parse_args(argv, blank)).items() if v is not None}
    resume, _ = typed.pop("resume"), changed.pop("resume", None)
    if resume:
        other = sorted(set(changed) - {"steps", "max_hours", "max_tokens"})
        if other:
            parser.error(f"--resume takes the run's own settings; leave out {', '.join(other)}")
        path = Path(resume) / "args.json"
        if not path.exists():
            parser.error(f"{path} does not exist: is {resume} the folder of a run?")
        return Config(**{**json.loads(path.read_text()), **changed}), Path(resume)
    if Path(typed["student"]).resolve() == qwen.TINY:
        typed = {**typed, **TOY, **changed}
    config = Config(**typed)
    config.name = config.name or time.strftime("%Y-%m-%d-%H%M%S")
    for name in ("steps", "batch_size", "samples_per_prompt", "sample_batch", "max_new_tokens",
                 "save_every"):
        if getattr(config, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("keep", "max_hours", "max_tokens"):
        if getattr(config, name) < 0:
            parser.error(f"--{name.replace('_', '-')} must not be negative")
    return config, None


# ---------------------------------------------------------------------------- one step

def training_step(student, teacher, processor, records: list[dict], config: Config, step: int,
                  optimizer: Optimizer) -> tuple[dict, list[str]]:
    """The algorithm. Returns the step's metrics and an answer to each record as text."""
    # 1) prompts: what the student sees, and the same with the privilege in it
    prompts, hinted = read_prompts(student, teacher, processor, records, config)
    clock, K = Clock(), config.samples_per_prompt      # K rows a prompt, one beside the other
    # 2) rollout: the student answers (eq. 6: y ~ p_theta)
    with sharding.gathered(student):
        rollout = sample_all(student, processor, prompts, config, config.seed * 1_000_003 + step)
    clock.lap("sample")
    # 3) score the same tokens with both, and take the divergence, a micro-batch at a time
    total = Totals()
    student.train()
    groups = sharding.in_step(micro_batches(prompts, hinted, rollout, config.micro_batch_tokens),
                              prompts, processor)
    taught = teacher_says(teacher, processor, hinted, groups, rollout, config, student.device)
    for (rows, blanks), (said_by_teacher, teacher_head) in zip(groups, taught):
        lengths, ids, mask = responses(rollout, rows)
        said_by_student = response_states(student, processor, prompts, rows, ids, mask, blanks)
        # the mean over a response's tokens, and then over all responses of the step (eq. 7)
        weights = (1 / (len(records) * K * lengths)).repeat_interleave(lengths)          # (N,)
        stats = {}
        nats = distill_loss(said_by_student, said_by_teacher, student.lm_head.weight, teacher_head,
                            config.loss, weights=weights, tokens=ids[mask], stats=stats)
        if nats.requires_grad:      # not so if only the module is trained and there is no picture
            (nats * weights).sum().backward()
        if rows:
            total.add(nats.detach(), weights, lengths, stats)
    sharding.release(teacher)
    # 4) update
    norm = optimizer.step(step)
    finite = math.isfinite(norm)
    if config.teacher == "ema" and finite:
        teaching.update_ema(teacher, student, config.ema_decay)
    clock.lap("score")
    answers = [processor.decode(ids[:n]) for ids, n in zip(rollout.ids, rollout.lengths)]
    metrics = {"step": step + 1, **total.metrics(), **describe(rollout, answers),
               "gradient_norm": norm if finite else None,               # JSON has no NaN
               "skipped": int(not finite)}
    return metrics | clock.metrics(metrics["tokens"]), sharding.collect(answers[::K])


def read_prompts(student, teacher, processor, records, config) -> tuple[list, list]:
    """What the student sees of each record, and what the teacher; each K times, the same object.

    A picture is decoded here, once a step, never again.
    """
    mine = sharding.share(records)        # all of them, unless several processes share the step
    with ThreadPoolExecutor() as pool:        # Pillow and numpy leave Python to the other threads
        prompts = list(pool.map(processor.prompt, mine))
    if config.train != "all" and config.teacher == "self" and sharding.world == 1:
        # one frozen tower in both models: each picture goes through it once, not three times
        prompts = vision.read_once(prompts, student, teacher, rows=config.sample_batch)
    hinted = [processor.prompt(record, teaching.hint(record, config.privilege),
                               pictures_from=prompt)
              for record, prompt in zip(mine, prompts)]
    K = config.samples_per_prompt
    return [p for p in prompts for _ in range(K)], [p for p in hinted for _ in range(K)]


def sample_all(student, processor, prompts, config, seed: int) -> Rollout:
    """A response to each of `prompts`, of which every K are one and read once.

    About `sample_batch` rows run at a time. Prompts that wait take the places of rows that stop, so
    that long answers do not keep the others waiting.
    """
    K, prompts = config.samples_per_prompt, prompts[::config.samples_per_prompt]
    # drawn for the whole step at once, so that a token does not depend on how the step is cut
    count = sharding.total(len(prompts))
    uniforms = torch.rand(count * K, config.max_new_tokens, dtype=torch.float64,
                          generator=torch.Generator().manual_seed(seed))
    uniforms = sharding.share(uniforms.view(count, K, -1)).flatten(0, 1)
    if not prompts:                          # more processes than prompts
        none = torch.zeros(0, 1, device=student.device)
        return Rollout(none.long(), none[:, 0].long(), none[:, 0].bool(), none)
    read = processor.in_turn(prompts, student.device)
    return sample(student, read(max(1, config.sample_batch // K)), more=read,
                  max_new_tokens=config.max_new_tokens, temperature=config.temperature,
                  top_p=config.top_p, top_k=config.top_k, samples_per_prompt=K, uniforms=uniforms,
                  **processor.sampling)


def response_states(model, processor, prompts, rows, ids, mask, blanks=()) -> torch.Tensor:
    """(N, D) last hidden states from which each response token of `rows` is predicted.

    ids, mask (B, T): the responses of these rows, and where there are tokens in them.
    blanks: prompts to be read along, without a response (sharding.in_step).
    """
    batch = processor.batch([*(prompts[row] for row in rows), *blanks], device=model.device)
    ids, mask = (torch.cat([x, x.new_zeros(len(blanks), x.shape[1])]) for x in (ids, mask))
    lengths = mask.sum(dim=1, keepdim=True)                                              # (B, 1)
    both = close_gaps(append_response(batch, ids, lengths[:, 0]))
    end = batch["attention_mask"].sum(dim=1)             # (B,) columns of each prompt, gaps closed
    cue = getattr(model, "cue_recovery", None)
    with cue.prompt(end) if cue else nullcontext():
        hidden = sharding.last_hidden_state(model, **both, use_cache=False)              # (B, W, D)
    # the state at column t predicts the token at t + 1, so the response is read one column early
    place = torch.arange(hidden.shape[1], device=ids.device) - (end[:, None] - 1)        # (B, W)
    return hidden[(place >= 0) & (place < lengths)]


def close_gaps(batch: dict) -> dict:
    """Move every row to the left, so that W columns are the longest row and no more.

    A long prompt with a short answer and a short prompt with a long one, padded on their own sides,
    are as wide as both long ones together. Padding then only follows: no token can look ahead to
    it, so the mask is left out, and the attention kernel need not read one.

    >>> batch = {"input_ids": torch.tensor([[0, 7, 8, 1, 2], [0, 0, 6, 3, 9]]), "position_ids":
    ...          torch.arange(5).expand(3, 2, 5), "attention_mask":
    ...          torch.tensor([[0, 1, 1, 1, 1], [0, 0, 1, 1, 0]]), "image_grid_thw": "as it was"}
    >>> close_gaps(batch)["input_ids"].tolist()
    [[7, 8, 1, 2], [6, 3, 9, 9]]
    """
    mask = batch["attention_mask"].long()
    # padding is what the last column holds: the end of this response, never a piece of a picture
    columns = mask.argmax(dim=1, keepdim=True) + torch.arange(int(mask.sum(dim=1).max()),
                                                              device=mask.device)
    columns = columns.clamp(max=mask.shape[1] - 1)                                       # (B, W)
    pictures = {k: v for k, v in batch.items()
                if k.startswith(("pixel_values", "image_", "video_"))}
    return {"input_ids": batch["input_ids"].gather(1, columns), **pictures,
            "position_ids": batch["position_ids"].gather(2, columns.expand(3, -1, -1))}


def responses(rollout: Rollout, rows: list[int]):
    """Lengths (B,), ids and mask (B, T) of some rows, no wider than the longest of them."""
    lengths = rollout.lengths[rows]
    longest = max(lengths.tolist(), default=1)
    return lengths, rollout.ids[rows, :longest], rollout.mask[rows, :longest]


def teacher_says(teacher, processor, hinted, groups, rollout, config, device):
    """Yields for each micro-batch the teacher's states (N, D) and its head (V, D).

    A generator: the teacher reads a micro-batch when the student is about to. But one that is
    offloaded comes to `device` once a step and reads all of them; what it said waits in CPU memory.
    """
    def score(rows, blanks):
        _, ids, mask = responses(rollout, rows)
        return response_states(teacher, processor, hinted, rows, ids, mask, blanks)

    if config.offload_teacher:
        head = teacher.lm_head.weight.to(device)
        with teaching.at_work(teacher, device):
            waiting = [score(*group).cpu() for group in groups]
        yield from ((states.to(device), head) for states in waiting)
        return
    for group in groups:
        with teaching.at_work(teacher):
            states = score(*group)
        # out of at_work: while the student reads, its module is on again
        yield states, teacher.lm_head.weight


def micro_batches(prompts, hinted, rollout, budget: int) -> list[list[int]]:
    """Rows grouped by length; a group padded to its longest row stays within `budget` tokens.

    A row longer than the budget gets a group of its own, and a row much shorter than its group
    starts the next one: a small forward pass costs less than a large one of padding.
    """
    sizes = [max(len(a.ids), len(b.ids)) + int(n)
             for a, b, n in zip(prompts, hinted, rollout.lengths)]
    groups = []
    for row in sorted(range(len(sizes)), key=lambda row: -sizes[row]):
        # longest first: the first row of a group sets its width
        width = sizes[groups[-1][0]] if groups else 0
        if width and (len(groups[-1]) + 1) * width <= budget and sizes[row] >= 0.8 * width:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


# ---------------------------------------------------------------------------- what is measured

class Clock:
    """Seconds and tokens per second of each phase of a step."""

    def __init__(self):
        self.start, self.laps = time.perf_counter(), {}

    def lap(self, name: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.laps[name], self.start = now - self.start, now

    def metrics(self, tokens: int) -> dict:
        out = {f"{k}_seconds": round(s, 3) for k, s in self.laps.items()}
        return out | {f"{k}_tokens_per_second": round(tokens / s) for k, s in self.laps.items()}


class Totals:
    """Sums over micro-batches, so that a step reports all of its tokens and not the last ones."""

    def __init__(self):
        self.loss = self.entropy = 0.0
        self.gaps = {"front": [0.0, 0], "back": [0.0, 0]}

    def add(self, nats, weights, lengths, stats) -> None:
        self.loss += float((nats * weights).sum())
        self.entropy += float((stats["entropy"] * weights).sum())
        place = torch.cat([torch.arange(n, device=nats.device) < n / 2 for n in lengths.tolist()])
        for name, half in (("front", place), ("back", ~place)):       # figure 3's two halves
            self.gaps[name][0] += float(stats["gap"][half].sum())
            self.gaps[name][1] += int(half.sum())

    def metrics(self) -> dict:
        sums = self.loss, self.entropy, *self.gaps["front"], *self.gaps["back"]
        loss, entropy, front, n_front, back, n_back = map(sum, zip(*sharding.gather(sums)))
        return {"loss": loss, "entropy": entropy, "gap_front": front / max(1, n_front),
                "gap_back": back / max(1, n_back)}


def describe(rollout: Rollout, answers: list[str]) -> dict:
    """Length, share cut off, and the word "hint" in the answers (those of all processes)."""
    hints, lengths, stopped = zip(*sharding.gather((
        [evaluate.count_hints(answer) for answer in answers],
        rollout.lengths.cpu(), rollout.stopped.cpu())))
    hints, lengths, stopped = sum(hints, []), torch.cat(lengths), torch.cat(stopped)
    return {"length": float(lengths.float().mean()), "tokens": int(lengths.sum()),
            "cut_off": float((~stopped).float().mean()),
            "hint_rows": sum(n > 0 for n in hints), "hint_count": sum(hints)}


# ---------------------------------------------------------------------------- the run

def prepare_data(config: Config, processor) -> tuple[list[dict], list[dict]]:
    """Training and test records, checked; prompts over the limit left out and counted."""
    config.data = config.data or str(toy.default() / "train.jsonl")
    config.eval_data = config.eval_data or str(Path(config.data).with_name("test.jsonl"))
    needs = () if config.privilege == "none" else (config.privilege,)
    train = record_files.load(config.data, needs)
    test = record_files.load(config.eval_data, needs)
    # the teacher's prompt is the student's and a line more, so its length decides for both
    fits = [processor.length(r, teaching.hint(r, config.privilege)) <= config.max_prompt_tokens
            for r in train]
    kept = [record for record, ok in zip(train, fits) if ok]
    if not kept:
        raise ValueError(f"{config.data}: no prompt fits in --max-prompt-tokens "
                         f"{config.max_prompt_tokens}; lower --max-pixels or raise the limit")
    print(f"{len(kept)} training records from {config.data}"
          + f", {len(train) - len(kept)} left out as longer than {config.max_prompt_tokens} tokens")
    return kept, test[:config.eval_limit or None]


def batch_of(records: list[dict], step: int, size: int, seed: int) -> list[dict]:
    """The records of this step: an endless reading in epochs, each shuffled by (seed, epoch)."""
    out, orders = [], {}
    for position in range(step * size, (step + 1) * size):
        epoch, place = divmod(position, len(records))
        if epoch not in orders:
            shuffled = random.Random(f"{seed} {epoch}").sample(range(len(records)), len(records))
            orders[epoch] = shuffled
        out.append(records[orders[epoch][place]])
    return out


def choose_weights(student, train: str) -> list:
    """Mark what is trained; returns [(name, parameter)], shared weights once."""
    for name, parameter in student.named_parameters():
        cue = name.startswith("cue_recovery.")
        parameter.requires_grad_(cue or train == "all"
                                 or (train == "language" and not name.startswith("model.visual.")))
    return [(n, p) for n, p in student.named_parameters() if p.requires_grad]


def build_models(config: Config):
    """Student (with the module), teacher (without), and the student's processor."""
    if config.offload_teacher and config.teacher == "ema":
        raise ValueError("--offload-teacher: an averaged teacher changes at every step, so it must "
                         "stay beside the student")
    if (config.offload_teacher or config.offload_optimizer) and sharding.world > 1:
        raise ValueError("--offload-teacher and --offload-optimizer are for one process: of "
                         "several, each holds its slice on its own GPU")
    budget = dict(min_pixels=config.min_pixels or None, max_pixels=config.max_pixels or None)
    options = dict(dtype=config.dtype or None, device=config.device or None,
                   attention=config.attention, **budget)
    options = sharding.load_options(options)
    student, processor = qwen.load(config.student, **options)
    if config.teacher == "self" and config.train == "cue" and sharding.world == 1:
        teacher = student        # its backbone stays as it is; the module is off while it teaches
    elif config.teacher in ("self", "ema"):
        teacher = teaching.frozen_copy(student)
        if config.teacher == "ema":
            teacher = teacher.float()        # in bf16 an average would be rounded to where it was
    else:
        there = {"device": "cpu"} if config.offload_teacher else {}
        teacher, other = qwen.load(config.teacher, cue=False,
                                   **{**options, "dtype": student.dtype, **there})
        teaching.check_same_vocabulary(processor.vocab, other.vocab, len(student.lm_head.weight),
                                       len(teacher.lm_head.weight))
        if (processor.patch, processor.merge) != (other.patch, other.merge):
            raise ValueError(f"student and teacher cut pictures into patches of {processor.patch} "
                             f"and {other.patch} pixels, so they cannot read the same prompt")
        print(f"stop ids: student {sorted(processor.stop_ids)}, teacher {sorted(other.stop_ids)}")
        teaching.freeze(teacher)
    if config.offload_teacher and teacher is not student:
        teacher.to("cpu")
    if config.cue_recovery and getattr(student, "cue_recovery", None) is None:
        depth = student.config.text_config.num_hidden_layers
        cue_recovery.attach(student, config.every or min(5, max(1, depth // 3)), seed=config.seed,
                            sink=config.sink)
    if config.gradient_checkpointing:
        # renamed in transformers 5.24, the old name warns
        getattr(student, "activation_checkpointing_enable", student.gradient_checkpointing_enable)()
    for model in (student, teacher):         # last: by now every hook is registered
        sharding.shard(model)
    return student, teacher, processor


def print_settings(config: Config, student, teacher, weights) -> None:
    millions = {"student": sum(p.numel() for p in student.parameters()) / 1e6,
                "teacher": sum(p.numel() for p in teacher.parameters()) / 1e6,
                "trained": sum(p.numel() for _, p in weights) / 1e6}
    cue = getattr(student, "cue_recovery", None)
    print("\n".join(f"  {name:22} {value}" for name, value in asdict(config).items()))
    print(", ".join(f"{name} {size:.2f} M" for name, size in millions.items())
          + f" parameters, {student.dtype} on {student.device}, {torch.get_num_threads()} threads")
    if cue is not None:
        print(f"cue recovery before layers {[layer + 1 for layer in cue.settings()['layers']]}: "
              f"{sum(p.numel() for p in cue.parameters()) / 1e6:.2f} M parameters")


def evaluate_on(model, processor, test, config, privilege="none", label="") -> tuple[list, dict]:
    with sharding.gathered(model):
        rows = evaluate.evaluate(model, processor, sharding.share(test),
                                 hint=lambda r: teaching.hint(r, privilege),
                                 max_new_tokens=config.max_new_tokens,
                                 batch_size=min(64, config.sample_batch),
                                 label=label if sharding.is_main() else "")
    rows = sharding.collect(rows)
    return rows, evaluate.summarise(rows)


def evaluate_before(student, teacher, processor, test, config, folder) -> dict:
    """Accuracy of the base, and of the teacher with its privilege. A resumed run reads the file."""
    path = folder / "before.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    before = sharding.from_main(found)
    if before:
        return before
    rows, base = evaluate_on(student, processor, test, config, label="base, no hint")
    print("base     " + evaluate.line(base))
    with teaching.at_work(teacher, student.device if config.offload_teacher else None):
        _, taught = evaluate_on(teacher, processor, test, config, config.privilege,
                                "teacher, hinted")
    print(f"teacher  {evaluate.line(taught)}  (privilege: {config.privilege})")
    if config.privilege != "none" and taught["accuracy"] - base["accuracy"] < 0.02:
        print("WARNING: the privilege does not make the teacher better than the base, so there is "
              "little to learn. Look at the hints, or choose another --privilege.")
    before = {"base": base, "teacher": taught, "rows": rows}
    if sharding.is_main():
        checkpoint.write_json(path, before)
    return before


def train_loop(student, teacher, processor, train, test, config, optimizer, folder, start) -> None:
    """Steps start .. config.steps - 1, each logged as a line of metrics.jsonl."""
    stop = longrun.StopSignal()
    log = sharding.from_main(checkpoint.read_jsonl(folder / "metrics.jsonl"))
    if longrun.spent(log, config):           # resumed after its end
        return
    clock = time.perf_counter()
    bar = tqdm(range(start, config.steps), initial=start, total=config.steps, desc="distil",
               dynamic_ncols=True, disable=not sharding.is_main())
    for step in bar:
        records = batch_of(train, step, config.batch_size, config.seed)
        metrics, answers = training_step(student, teacher, processor, records, config, step,
                                         optimizer)
        done = step + 1
        log.append(metrics)
        if len(log) >= 5 and all(m["skipped"] for m in log[-5:]):
            raise FloatingPointError(f"step {done}: the gradient was not finite five times in a "
                                     "row; lower --lr, or use --dtype float32")
        bar.set_postfix(loss=f"{metrics['loss']:.3f}", length=f"{metrics['length']:.0f}",
                        tok_s=metrics["sample_tokens_per_second"])
        # one clock for all processes: they must agree on when the time is up
        metrics["seconds"] = sharding.from_main(round(time.perf_counter() - clock, 3))
        last = done == config.steps or longrun.spent(log, config)
        if config.eval_every and done % config.eval_every == 0 and not last:
            _, now = evaluate_on(student, processor, test, config)
            metrics["accuracy"] = now["accuracy"]
            tqdm.write(f"step {done:4}  {evaluate.line(now)}")
            longrun.keep_samples(folder, done, records, answers, config.privilege)
            longrun.keep_student(folder, done, now, student, processor, config)
            metrics["seconds"] = sharding.from_main(round(time.perf_counter() - clock, 3))
        clock = time.perf_counter()
        if sharding.is_main():
            checkpoint.append_jsonl(folder / "metrics.jsonl", metrics, sync=True)
        asked = any(sharding.gather(stop.asked))     # a signal may reach one process a step earlier
        if asked or last or done % config.save_every == 0:
            longrun.save_state(folder, done, optimizer, teacher, config, fatal=asked or last)
        if asked:
            bar.close()
            sharding.barrier()                       # torchrun ends all as soon as one has left
            print(f"stopped after step {done}; go on with\n  python distill.py --resume {folder}")
            raise SystemExit(130)
        if last:
            bar.close()
            break


def finish(student, processor, test, config, folder, before, started) -> None:
    """Last evaluation, checkpoint, result.json and the table."""
    rows, after = evaluate_on(student, processor, test, config, label="student, no hint")
    save = longrun.student_saver(student, processor)
    if not sharding.is_main():
        return
    save(folder / "checkpoint")
    metrics = checkpoint.read_jsonl(folder / "metrics.jsonl")
    metrics[-1]["accuracy"] = after["accuracy"]
    checkpoint.write_jsonl(folder / "metrics.jsonl", metrics)
    best = max((m for m in metrics if "accuracy" in m), key=lambda m: m["accuracy"])
    if config.keep:
        best = checkpoint.keep_best(folder, longrun.evaluation(metrics[-1]["step"], after), save)
    models = {"base": before["base"], "teacher": before["teacher"], "student": after}
    result = {f"{name}_{key}": value for name, summary in models.items()
              for key, value in summary.items() if key != "n"}
    result |= {"n": after["n"], "seconds": round(time.time() - started, 1),
               "steps": len(metrics), "tokens": sum(m.get("tokens", 0) for m in metrics),
               "best": {"step": best["step"], "accuracy": best["accuracy"],
                        "folder": "best" if config.keep else None},
               "hint_rows": sum(m["hint_rows"] for m in metrics),
               "rollouts": config.batch_size * config.samples_per_prompt * len(metrics),
               "parameters_added": sum(p.numel() for name, p in student.named_parameters()
                                       if name.startswith("cue_recovery."))}
    checkpoint.write_json(folder / "result.json", result)
    print(evaluate.before_after(before["rows"], rows))
    print(evaluate.table(models))
    why = longrun.spent(metrics, config)
    if why and len(metrics) < config.steps:
        print(f"ended by {why} after step {len(metrics)} of {config.steps}; raise it to go on")
    print(f"best of {sum('accuracy' in m for m in metrics)} evaluations: step {best['step']}, "
          f"accuracy {evaluate.percent(best['accuracy'])} %"
          + (f", kept in {folder / 'best'}" if config.keep else ""))
    print(f"rollouts with the word \"hint\": {result['hint_rows']} of {result['rollouts']}\n"
          f"{result['seconds']:.0f} s; checkpoint: {folder / 'checkpoint'}; evaluate it again with"
          f"\n  python evaluate.py --model {folder / 'checkpoint'}")


@sharding.peers()
def main(argv=None) -> None:
    config, resume = read_config(argv)
    qwen.quiet()
    started = time.time()
    try:
        if config.plan:
            return print(plan.report(config))
        sharding.start(config.device)
        config = sharding.from_main(config)          # its name may be the time, which differs
        folder = resume or Path("runs") / config.name
        if not resume and (folder / "args.json").exists():
            raise FileExistsError(f"{folder} exists: choose another --name, or go on with "
                                  f"--resume {folder}")
        student, teacher, processor = build_models(config)
        with sharding.main_first():
            train, test = prepare_data(config, processor)
        weights = choose_weights(student, config.train)
        optimizer = Optimizer(weights, lr=config.lr, cue_lr=config.cue_lr, warmup=config.warmup,
                              steps=config.steps, final=config.final_lr, clip=config.clip,
                              weight_decay=config.weight_decay,
                              device="cpu" if config.offload_optimizer else None)
        print_settings(config, student, teacher, weights)
        start = longrun.resume(folder, optimizer, teacher, config) if resume else 0
        if sharding.is_main():
            folder.mkdir(parents=True, exist_ok=True)
            checkpoint.write_json(folder / "args.json", asdict(config))
            log = checkpoint.read_jsonl(folder / "metrics.jsonl")      # of a run that is resumed
            started -= sum(m.get("seconds", 0) for m in log)
    except (ValueError, OSError) as error:        # wrong input gets one line, not a trace
        raise SystemExit(f"distill.py: {error}")
    try:
        before = evaluate_before(student, teacher, processor, test, config, folder)
        train_loop(student, teacher, processor, train, test, config, optimizer, folder, start)
        finish(student, processor, test, config, folder, before, started)
    except OSError as error:                      # a full disk: what was saved before is whole
        raise SystemExit(f"distill.py: {error}; when this is mended, go on with "
                         f"python distill.py --resume {folder}") from error


if __name__ == "__main__":
    main()
