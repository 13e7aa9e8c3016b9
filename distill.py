"""distill.py - multimodal on-policy distillation with visual cues, on a Qwen3-VL student.

    picture + question ----------------------> student --samples--> y_1 y_2 ... y_T
                       \\                          |                      | the same tokens
                        + [Hint]: visible facts -> teacher               v
                                                   |      KL( teacher || student ) at every token
        sink token <--- asks the picture ---.      '--------------------> pulls the student
        (cue_recovery.py, prefill only)

The idea.  The student answers its own prompts; a teacher that was also told what is relevant in the
picture (ViCuR, arXiv 2606.05718) scores the same tokens; the student is pulled toward the teacher
token by token. Inference is unchanged: there is no hint, only the picture.

In:  a checkpoint, records (data/records.py).  Out: runs/NAME/ with a Hugging Face checkpoint.
Read training_step first. What is not the method (memory, saving, several processes) is in scale/.

The one equation (eq. 6-8, with the exact divergence in place of its one-sample estimate):
    L = mean over prompts of 1/|y| sum_n D( p_T(. | X, S, y_<n), p_theta(. | X, y_<n) ), y ~ p_theta

Run
    python distill.py                                            the tiny default: minutes on a CPU
    python distill.py --student Qwen/Qwen3-VL-2B-Instruct        on a drawn world of its own size
    python distill.py --student Qwen/Qwen3-VL-2B-Instruct --data my/train.jsonl
    python distill.py --resume runs/NAME                         goes on where it was killed

Departures from the paper and its release
1) The default loss is the exact forward KL over the whole vocabulary (OPSD's objective, appendix
   F.3). `--loss sampled` is what the paper trains with: k1, one sample per position, clamped.
   `--loss reverse_kl` is that without the sampling noise of the current token (why: loss.py).
2) One update per rollout batch, so the PPO ratio is 1 and the clip idle; neither is written here.
3) The recovery module has its own learning rate: 1e-6 from W_O = 0 goes nowhere.
Left out: rewards, GRPO, a value model, a reference-model penalty, several updates per rollout.
"""
from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import evaluate
import model as qwen
import teacher as teaching
from benchmarks import counting
from data.records import batch_of
from loss import distill_loss
from rollout import Rollout, sample
from scale import checkpoint, checks, identity, longrun, offload, plan, sharding
from scale.build import (Scale, build_models, choose_weights, optimizer_for, print_settings,
                         scale_for)
from scale.measure import Sums, decoded, metrics_of, micro_batches
from scale.optimizer import Optimizer
from scale.settings import Machine, option

# Dimension letters: B prompts, K responses to each, T response tokens, W columns of a batch,
# N scored tokens, D hidden size, V vocabulary.


# ---------------------------------------------------------------------------- settings

@dataclass
class Config(Machine):
    """The knobs of the method; Machine has the others. The defaults are for a real model (paper,
    table 3), TOY for the tiny one."""
    student: str = option(str(qwen.TINY), "folder or hub name of the model to train")
    teacher: str = option("self", "self (the frozen start), ema, or a folder or hub name")
    ema_decay: float = option(0.99, "share of an ema teacher that each step keeps", low=0, high=1)
    privilege: str = option("cue", "what only the teacher is told", teaching.PRIVILEGES)
    loss: str = option("forward_kl", "divergence at each token",
                       ("forward_kl", "reverse_kl", "jsd", "sampled"))
    data: str = option("", "training records, JSONL; empty for a drawn world of the student's size")
    instruction: str = option(qwen.INSTRUCTION, "behind each question that has none of its own")
    steps: int = option(275, "updates; 275 is the paper's main run", low=1)
    batch_size: int = option(128, "prompts an update", low=1)
    samples_per_prompt: int = option(1, "responses to each prompt, which is read once", low=1)
    max_prompt_tokens: int = option(2048, "longer prompts are left out, never cut", low=1)
    max_new_tokens: int = option(4096, "response tokens", low=1)
    temperature: float = option(1.0, "of sampling; scoring is always at 1", low=0, high=1e6)
    top_p: float = option(1.0, "nucleus of sampling, 1: the whole distribution", low=1e-9, high=1)
    top_k: int = option(0, "sample from the k most likely, 0 for all", low=0)
    lr: float = option(1e-6, "learning rate of the model", low=0, high=1e6)
    cue_lr: float = option(1e-4, "learning rate of the module and of LoRA", low=0, high=1e6)
    warmup: int = option(10, "steps until the full learning rate", low=0)
    final_lr: float = option(0.1, "share of it left at the last step (paper: 1)", low=0, high=1)
    clip: float = option(1.0, "largest gradient norm", low=1e-12)
    weight_decay: float = option(0.0, "AdamW's", low=0, high=1e6)
    cue_recovery: bool = option(True, "attach the sink-token module to the student")
    every: int = option(0, "layers from block to block; 0: 5, or a third of a shallow model", low=0)
    sink: str = option("first", "the token that asks the picture: first of the sequence (paper), "
                       "or last of the prompt, which has read the question", ("first", "last"))
    train: str = option("all", "which weights: all, language (no vision tower), lora (adapters and "
                        "the module), cue (the module)", ("all", "language", "lora", "cue"))
    lora_rank: int = option(16, "with --train lora", low=1)
    lora_alpha: float = option(32.0, "with --train lora: adapters count alpha / rank", low=0)
    seed: int = option(0, "of data order, sampling and the module's start", low=0, high=10**12)


# What `python distill.py` changes when the student is the tiny default.
TOY = dict(steps=140, batch_size=48, sample_batch=256, micro_batch_tokens=8192, max_new_tokens=96,
           lr=5e-4, cue_lr=1.5e-3, threads=1, gradient_checkpointing=False, max_pixels=0,
           before_limit=0, eval_every=70, instruction="")


def read_config(argv=None, method: str = "") -> tuple[Config, Path | None]:
    """Settings from the command line; with --resume those of the run, and its folder."""
    return identity.read_settings(Config, TOY, __doc__.split("\n\n")[0], argv, method)


# ---------------------------------------------------------------------------- one step

def training_step(student, teacher, processor, records, uniforms, config: Config, step: int,
                  optimizer: Optimizer, scale: Scale, off_policy=False) -> tuple[Sums, Rollout]:
    """The algorithm, in the paper's four steps. Returns what was measured, and the rollout.

    records: B of them. uniforms (B, K, max_new_tokens): the numbers that draw the tokens.
    scale: what scale/ adds; Scale() is the plain thing. off_policy: the teacher answers instead.
    """
    # 1) prompts: what the student sees, and the same with the privilege
    prompts, hinted = read_prompts(processor, records, config.privilege, scale.read_pictures)
    sums, K = Sums(), config.samples_per_prompt         # the clock of a step starts here
    # 2) rollout: the student answers its own prompts, K times each (eq. 6: y ~ p_theta)
    author, asked = (teacher, hinted) if off_policy else (student, prompts)
    with scale.sampling(author):
        rollout = sample_responses(author, processor, asked, uniforms, config, scale.decoder)
    sums.lap("sample")
    # 3) score: both read the same token ids; the divergence at each of them; backward
    responses = [ids[:n] for ids, n in zip(rollout.ids.tolist(), rollout.lengths.tolist())]
    prompts, hinted = ([p for p in side for _ in range(K)] for side in (prompts, hinted))  # B K
    groups = micro_batches(prompts, hinted, responses, config.micro_batch_tokens)
    groups = scale.even_out(groups, prompts, hinted, responses)
    read = partial(response_states, processor, responses, scale.hidden)
    student.train()
    for rows, teacher_hidden, teacher_head in scale.teach(teacher, groups, partial(read, hinted)):
        student_hidden = read(prompts, student, rows)                                  # (N, D)
        tokens = torch.tensor([t for row in rows for t in responses[row]], device=student.device)
        lengths = torch.tensor([len(responses[row]) for row in rows], device=student.device)
        # the mean over a response's tokens, then over all responses of the step (eq. 7)
        weights = (1 / (config.batch_size * K * lengths)).repeat_interleave(lengths)   # (N,)
        stats = {}
        nats = distill_loss(student_hidden, teacher_hidden, student.lm_head.weight, teacher_head,
                            config.loss, weights=weights, tokens=tokens, stats=stats)
        if nats.requires_grad:      # not so if only the module is trained and there is no picture
            (nats * weights).sum().backward()
        sums.add(nats.detach(), weights, lengths, stats)
    # 4) update: clip, AdamW; an averaged teacher follows
    sums.gradient_norm = optimizer.step(step)
    if config.teacher == "ema" and math.isfinite(sums.gradient_norm):
        teaching.update_ema(teacher, student, config.ema_decay)
    sums.lap("score")
    return sums, rollout


def read_prompts(processor, records, privilege: str, read_pictures=list) -> tuple[list, list]:
    """What the student sees of each record, and what the teacher; a picture is decoded once."""
    # with a view the teacher has its own pictures; otherwise both prompts share their pixels
    others = ([teaching.seen(r, privilege) for r in records]
              if "teacher_images" in teaching.NEEDS[privilege] else [])
    # Pillow and numpy release the GIL; for small pictures more threads than this only wait for it
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        prompts = read_pictures(list(pool.map(processor.prompt, records + others)))
    prompts, shown = prompts[:len(records)], prompts[-len(records):]
    return prompts, [processor.prompt(record, teaching.hint(record, privilege), pictures_from=of)
                     for record, of in zip(records, shown)]


def sample_responses(student, processor, prompts, uniforms, config, decoder) -> Rollout:
    """K responses per prompt; each prompt is prefilled once.

    About `sample_batch` rows run at a time. Waiting prompts take the places of rows that stop, so
    long answers do not keep the others waiting.
    """
    K = config.samples_per_prompt
    if not prompts:                          # more processes than prompts
        none = torch.zeros(0, 1, device=student.device)
        return Rollout(none.long(), none[:, 0].long(), none[:, 0].bool(), none)
    read = processor.in_turn(prompts, student.device)
    return sample(student, read(max(1, config.sample_batch // K)), more=read, decoder=decoder,
                  max_new_tokens=config.max_new_tokens, temperature=config.temperature,
                  top_p=config.top_p, top_k=config.top_k, samples_per_prompt=K,
                  uniforms=uniforms.flatten(0, 1), **processor.sampling)


def uniform_numbers(config, step: int) -> torch.Tensor:
    """(B, K, max_new_tokens) in [0, 1): for the whole step at once, from (seed, step).

    So tokens do not depend on batches or processes, and a resumed run redraws them.
    """
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    return torch.rand(config.batch_size, config.samples_per_prompt, config.max_new_tokens,
                      dtype=torch.float64, generator=generator)


def response_states(processor, responses, hidden, prompts, model, rows) -> torch.Tensor:
    """(N, D) hidden states that predict each response token of these rows.

    prompts, responses: of all rows. hidden(model, batch) -> (B, W, D).
    """
    both = [replace(prompts[row], ids=prompts[row].ids + responses[row]) for row in rows]
    batch = processor.batch(both, side="right", device=model.device)
    # padding only follows, and no token looks ahead: without a mask the kernels are faster
    del batch["attention_mask"], batch["mm_token_type_ids"]
    end = torch.tensor([len(prompts[row].ids) for row in rows], device=model.device)[:, None]
    lengths = torch.tensor([len(responses[row]) for row in rows], device=model.device)[:, None]
    cue = getattr(model, "cue_recovery", None)
    with cue.prompt(end[:, 0]) if cue else nullcontext():
        states = hidden(model, batch)                                                  # (B, W, D)
    # the state at column t predicts the token at t + 1, so the response is read one column early
    place = torch.arange(states.shape[1], device=model.device) - (end - 1)             # (B, W)
    return states[(place >= 0) & (place < lengths)]


# ---------------------------------------------------------------------------- the run

def evaluate_on(model, processor, records, config, scale, privilege="none", label=""):
    """(graded rows, their summary) of test or dev records, greedily; shared by all processes."""
    with scale.sampling(model), checks.named("evaluation"):
        asked = [teaching.seen(r, privilege) for r in sharding.share(records)]
        rows = evaluate.evaluate(model, processor, asked,
                                 hint=lambda r: teaching.hint(r, privilege),
                                 max_new_tokens=config.max_new_tokens,
                                 batch_size=min(scale.evaluation_rows, config.sample_batch),
                                 label=label if sharding.is_main() else "")
    rows = sharding.collect(rows)
    summary = evaluate.summarise(rows)
    if summary["unparsed"] > 0.1:
        tqdm.write(counting.unparsed_warning(rows))
    return rows, summary


def answer_gain(teacher, processor, test, config, scale) -> float:
    """How much likelier the privilege makes the answer to the teacher, in nats per record:
    log p(answer | privilege) - log p(answer), the answer read as "\\boxed{...}"."""
    records = sharding.share(test)
    prompts, hinted = read_prompts(processor, records, config.privilege)
    responses = [processor.encode(f"\\boxed{{{r['answer']}}}") for r in records]
    groups = micro_batches(prompts, hinted, responses, config.micro_batch_tokens)
    groups = scale.even_out(groups, prompts, hinted, responses)
    read, gain = partial(response_states, processor, responses, scale.hidden), 0.0
    told = [states for _, states, _ in scale.teach(teacher, groups, partial(read, hinted))]
    untold = scale.teach(teacher, groups, partial(read, prompts))
    for (rows, plain, head), hinted_states in zip(untold, told):
        stats = {}
        tokens = [t for row in rows for t in responses[row]]
        with torch.no_grad():
            distill_loss(plain, hinted_states, head, head, stats=stats,
                         tokens=torch.tensor(tokens, dtype=torch.long, device=plain.device))
        gain += float(stats["gap"].sum())
    return sharding.total(gain) / len(test)


def evaluate_before(student, teacher, processor, test, config, scale, folder) -> dict:
    """Accuracy of the base, and of the teacher with its privilege. A resumed run reads the file."""
    before = longrun.read_before(folder)
    if before is not None:
        return before
    test = test[:config.before_limit or None]
    began = time.perf_counter()
    rows, base = evaluate_on(student, processor, test, config, scale, label="base, no hint")
    seconds = (time.perf_counter() - began) / len(test)               # of one answer
    print("base     " + counting.line(base))
    taught = {}
    if config.privilege != "none":
        taught = {"answer_gain": answer_gain(teacher, processor, test[:64], config, scale)}
        print(f"the privilege makes the right answer {taught['answer_gain']:+.2f} nats likelier to "
              f"the teacher ({len(test[:64])} records, scored)")
    if not config.score_privilege:
        visit = offload.brought(teacher, student.device)
        with visit if config.offload_teacher else nullcontext(), teaching.at_work(teacher):
            taught |= evaluate_on(teacher, processor, test, config, scale, config.privilege,
                                  f"teacher, {config.privilege}")[1]
        print(f"teacher  {counting.line(taught)}  (privilege: {config.privilege})")
    before = {"base": base, "teacher": taught, "rows": rows}
    longrun.write_before(folder, config, before, seconds)
    return before | {"seconds": seconds}


def run_step(student, teacher, processor, records, config, step, optimizer, scale):
    """training_step on this process's share. Returns the metrics and an answer to each record."""
    take = partial(scale.method or training_step, student, teacher, processor,
                   sharding.share(records), sharding.share(uniform_numbers(config, step)),
                   config, step, optimizer, scale)
    sums, rollout = checks.halved_if_too_large(take, config, student, scale)
    answers = sharding.collect(decoded(rollout, processor.decode, config.samples_per_prompt))
    metrics = metrics_of(step + 1, sharding.gather(sums), sum(answers, []))
    return metrics, [responses[0]["response"] for responses in answers]


def train_loop(student, teacher, processor, train, dev, config, optimizer, scale, folder,
               before) -> None:
    """The steps that are left, each logged as a line of metrics.jsonl."""
    def ask(done: int) -> dict:
        _, now = evaluate_on(student, processor, dev, config, scale)
        tqdm.write(f"step {done:4}  {counting.line(now)}")
        return now

    log = longrun.Log(folder, config, before.get("seconds", 0) * len(dev))
    for step in log.steps():
        records = batch_of(train, step, config.batch_size, config.seed)
        with checks.named(f"step {step + 1}"), log.saved_first(teacher, optimizer):
            metrics, answers = run_step(student, teacher, processor, records, config, step,
                                        optimizer, scale)
        log.end_step(metrics, list(zip(records, answers)), ask, student, teacher, processor,
                     optimizer)


@sharding.peers()
def main(argv=None, method=None) -> None:
    """method: another step with the arguments of training_step, see analysis/baselines.py."""
    name = method.__name__ if method else ""
    config, resume = read_config(argv, name)
    checks.quiet()
    script = checkpoint.script({"method": name})
    with checks.one_line(script):
        if config.plan:
            return print(plan.report(config))
        sharding.start(config.device, config.threads)
        config = sharding.from_main(config)     # a default name has the time in it: ranks differ
        folder = resume or Path("runs") / config.name
        with identity.owned(folder, not resume, script):
            run(config, folder, resume, method)


def run(config: Config, folder: Path, resume: Path | None, method=None) -> None:
    """All of a run, in a folder that is its own: check, load, train, evaluate."""
    started = time.monotonic()                  # immune to clock changes
    config, train, test, dev = checks.check_all(config)
    digests = identity.check_sources(folder, config)
    student, teacher, processor = build_models(config)
    weights = choose_weights(student, config.train)
    optimizer = optimizer_for(config, weights)
    print_settings(config, student, teacher, weights)
    if resume:
        longrun.resume(folder, optimizer, teacher, config)
        started -= sum(m.get("seconds", 0) for m in checkpoint.read_jsonl(folder / "metrics.jsonl"))
    identity.write_settings(folder, config, digests, method)
    scale = replace(scale_for(config, student, teacher, processor), method=method)
    with checks.memory_advice(config, folder):
        before = evaluate_before(student, teacher, processor, test, config, scale, folder)
        train_loop(student, teacher, processor, train, dev, config, optimizer, scale, folder,
                   before)
        rows, after = evaluate_on(student, processor, test, config, scale, label="student, no hint")
        # the last student is compared with those before it on their records
        last = after if dev is test else evaluate_on(student, processor, dev, config, scale)[1]
        longrun.finish(folder, config, before, rows, after, last, started, student, processor)


if __name__ == "__main__":
    main()
