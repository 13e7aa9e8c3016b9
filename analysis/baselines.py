"""analysis/baselines.py - what on-policy distillation is compared with: two other training steps.

The idea.  On-policy distillation takes the student's own answers and a teacher's word on every
token. Each baseline has one of the two and lacks the other:

    step                     who answers             what is said of an answer
    distill.training_step    student, no hint        teacher's distribution at every token
    supervised               teacher, told its hint  teacher's distribution at every token
    grpo                     student, no hint        one bit from the grader: right or wrong

In:  the arguments of distill.training_step.  Out: (Sums, Rollout), as from it. All else is
distill.py's: prompts, sampler, micro-batches, optimizer, loop, evaluation, saving and resuming.

The two equations, with the mean over the step's responses in front of both:
    supervised   1/|y| sum_n KL( p_T(. | X, S, y_<n) || p_theta(. | X, y_<n) ),    y ~ p_T
    grpo        -1/|y| sum_n A log p_theta(y_n | X, y_<n),                         y ~ p_theta
        A = (r - mean r) / std r,   over the K answers to the prompt

Run (every flag of distill.py; the same number of sampled answers a step as its tiny default, 48)
    python analysis/baselines.py supervised
    python analysis/baselines.py grpo --batch-size 12 --samples-per-prompt 4 --lr 1e-4 --cue-lr 3e-4
    python analysis/baselines.py grpo --resume runs/NAME

1) supervised is generalised knowledge distillation (GKD, arXiv 2306.13649) at lambda = 0, by a
   teacher with a hint. Prompts, updates and loss are ours; the prefixes are not the student's.
2) grpo is as published (arXiv 2402.03300): A is divided by the standard deviation, and a response's
   loss by its length. Dr. GRPO (arXiv 2503.20783) argues against both divisions.
3) One update per rollout, so the ratio is 1 and the clip idle. No reference model.
4) K answers to one prompt with one reward say nothing: A is 0. `informative` counts the others.
5) At the tiny default's --lr 5e-4 grpo made the student worse (one seed, 100 steps: 54.9 % right
   before, 38.7 after), at a fifth of it better (67.0): this reward is noisier than a teacher.
Left out: logits by the chunk (grpo holds all of a micro-batch: a small vocabulary, or small
--micro-batch-tokens), filling up a step with informative prompts, rewards for the form.
"""
from __future__ import annotations

import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import distill  # noqa: E402
import evaluate  # noqa: E402
import teacher as teaching  # noqa: E402
from rollout import Rollout  # noqa: E402
from scale.checks import one_line  # noqa: E402
from scale.measure import Sums  # noqa: E402

# Dimension letters: B prompts, K responses to each, N scored tokens, D hidden size, V vocabulary.


def supervised(student, teacher, processor, records: list[dict], uniforms, config: distill.Config,
               step: int, optimizer, scale: distill.Scale) -> tuple[Sums, Rollout]:
    """Off-policy distillation: distill.training_step, but the teacher answers (step 2)."""
    refuse("supervised", config)

    @contextmanager
    def sampling(model):                 # the teacher, without module or adapters
        with teaching.at_work(model), scale.sampling(model):
            yield
    return distill.training_step(student, teacher, processor, records, uniforms, config, step,
                                 optimizer, replace(scale, sampling=sampling), off_policy=True)


def grpo(student, teacher, processor, records: list[dict], uniforms, config: distill.Config,
         step: int, optimizer, scale: distill.Scale) -> tuple[Sums, Rollout]:
    """Reinforcement learning with the grader's verdict as reward. The teacher is not asked."""
    refuse("grpo", config)
    K = config.samples_per_prompt
    # 1) prompts: what the student sees
    prompts, _ = distill.read_prompts(processor, records, "none", scale.read_pictures)
    sums = Sums()
    # 2) rollout: the student answers its own prompts, K times each
    with scale.sampling(student):
        rollout = distill.sample_responses(student, processor, prompts, uniforms, config,
                                           scale.decoder)
    sums.lap("sample")
    responses = [ids[:n] for ids, n in zip(rollout.ids.tolist(), rollout.lengths.tolist())]
    # 3) reward: right or not, as the evaluation grades; then each answer against its prompt's mean
    rewards = torch.tensor([evaluate.judge(records[row // K], processor.decode(ids), True,
                                           len(ids))["correct"]
                            for row, ids in enumerate(responses)]).float().view(-1, K)  # (B, K)
    advantages = advantages_of(rewards)                                               # (B, K)
    sums.extra = {"reward": float(rewards.mean(1).sum()) / config.batch_size,
                  "informative": int((advantages != 0).any(1).sum()) / config.batch_size}
    # 4) score: log p of the tokens, pushed up where A > 0 and down where A < 0; backward
    prompts = [p for p in prompts for _ in range(K)]
    groups = distill.micro_batches(prompts, prompts, responses, config.micro_batch_tokens)
    groups = scale.even_out(groups, prompts, list(prompts), responses)
    student.train()
    for rows in groups:
        hidden = distill.response_states(processor, responses, scale.hidden, prompts, student,
                                         rows)                                         # (N, D)
        tokens = torch.tensor([t for row in rows for t in responses[row]], device=student.device)
        lengths = torch.tensor([len(responses[row]) for row in rows], device=student.device)
        weights = (1 / (config.batch_size * K * lengths)).repeat_interleave(lengths)   # (N,)
        A = torch.tensor([advantages[divmod(row, K)] for row in rows for _ in responses[row]],
                         device=student.device)                                        # (N,)
        log_p = (hidden @ student.lm_head.weight.T).float().log_softmax(-1)            # (N, V)
        losses = -A * log_p.gather(1, tokens[:, None])[:, 0]                           # (N,)
        if losses.requires_grad:    # not so if only the module is trained and there is no picture
            (losses * weights).sum().backward()
        log_p = log_p.detach()
        sums.add(losses.detach(), weights, lengths, {"entropy": -(log_p.exp() * log_p).sum(-1)})
    # 5) update: clip, AdamW
    sums.gradient_norm = optimizer.step(step)
    sums.lap("score")
    return sums, rollout


def advantages_of(rewards: torch.Tensor) -> torch.Tensor:
    """(B, K) rewards, less their prompt's mean, over its standard deviation. Equal rewards: 0.

    >>> advantages_of(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    tensor([[ 0.7070, -0.7070],
            [ 0.0000,  0.0000]])
    """
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)


def refuse(method: str, config: distill.Config) -> None:
    """ValueError for settings that a step cannot work with."""
    if method == "supervised" and config.loss == "sampled":
        raise ValueError("--loss sampled estimates a divergence from the student's own tokens; "
                         "supervised has the teacher's: choose another --loss")
    if method == "grpo" and config.samples_per_prompt < 2:
        raise ValueError("grpo compares the answers to one prompt: --samples-per-prompt is 1, "
                         "expected at least 2")


METHODS = {"supervised": supervised, "grpo": grpo}


def main(argv=None) -> None:
    method, *flags = (sys.argv[1:] if argv is None else argv) or [""]
    if method in ("-h", "--help"):
        return print(__doc__)
    if method not in METHODS:
        raise SystemExit(f"baselines.py: {method!r}, expected supervised or grpo, then the flags "
                         "of distill.py")
    with one_line("baselines.py"):           # the steps refuse as well, but only after loading
        refuse(method, distill.read_config(flags, method)[0])
    distill.main(flags, METHODS[method])


if __name__ == "__main__":
    main()
