"""loss.py - how far the student's next-token distribution is from the teacher's, token by token.

The idea.  Student and teacher have read the same response. At each of its N tokens each model holds
a hidden state, from which its lm_head makes V logits. The divergence of the two distributions is
exact: over the whole vocabulary, at temperature 1. It is written twice. First plainly: whole (N, V)
tensors, two or three lines a function. Then distill_loss, with the same values and gradients
but no (N, V) tensor: V is 151,936, so the logits of 1,024 tokens are 0.6 GB a copy. It makes them a
chunk at a time, and their gradient at once: logits are neither kept nor computed twice.

In:  hidden states (N, D) of both models, both heads.
Out: (N,) nats, differentiable in the student's states and head.

The one equation.  With p = softmax(student logits), the gradient in the logits:
    forward_kl  p - p_T     reverse_kl  p (log p - log p_T - KL)     sampled  A_n (p - onehot(y_n))

Why `sampled` and `reverse_kl` are one objective: the mean of the sampled gradient over y ~ p is the
gradient of reverse_kl (E[A] = -KL, E[A onehot] = p (log p_T - log p)); a test checks it. The exact
form has no noise from the current token; the noise of the sampled prefix stays.

Use it alone: imports torch only.
Left out: temperatures other than 1, clamps on single entries of the vocabulary (they flip
gradients), top-k truncation (it throws the tail's gradient away).
"""
from __future__ import annotations

import math

import torch

# Dimension letters: N scored tokens, n tokens of one chunk, D hidden size, V vocabulary.
# p is the student's distribution, q the teacher's (p_T in the paper).

ROWS = 16        # tokens between the matrix products: four (16, V) float32 tensors are 39 MB
WORDS = 2048     # of the head's gradient in bf16: one (2048, 2048) tensor is 8 MB


# The plain form. Autograd finds the gradients.

def kl(log_a, log_b):
    """KL(a || b) of two log-distributions (N, V): (N,) nats."""
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def forward_kl(log_p, log_q):       # where the teacher goes, be there too: OPSD's, our default
    return kl(log_q, log_p)


def reverse_kl(log_p, log_q):       # do not go where the teacher does not
    return kl(log_p, log_q)


def jsd(log_p, log_q):              # both against their mean; at most ln 2
    log_mean = torch.logaddexp(log_p, log_q) - math.log(2)
    return 0.5 * (kl(log_p, log_mean) + kl(log_q, log_mean))


def sampled(log_p, log_q, tokens):
    """k1 at the sampled tokens (N,), the paper's (eq. 6-8): value -A, gradient of -A log p(y)."""
    log_p, log_q = (x.gather(1, tokens[:, None])[:, 0] for x in (log_p, log_q))           # (N,)
    # floored and clamped as in the release
    A = (log_q.clamp(min=-10) - log_p.clamp(min=-10)).clamp(-10, 10).detach()
    return -A * (log_p - log_p.detach()) - A


# The same by hand, a chunk at a time.

def divergence(log_p, log_q, kind: str, tokens=None):
    """The plain function of that name: nats (n,), and d nats / d student logits (n, V).

    Works in place where it can: at most two (n, V) tensors beside the two that came in (jsd three).
    """
    if kind == "forward_kl":
        q = log_q.exp()
        nats = (log_q - log_p).mul_(q).sum(-1)
        return nats, log_p.exp().sub_(q)
    if kind == "reverse_kl":
        p = log_p.exp()
        weighted = (log_p - log_q).mul_(p)
        nats = weighted.sum(-1)
        return nats, weighted.addcmul_(p, nats[:, None], value=-1)
    if kind == "jsd":                        # the gradient through the mean is zero
        log_mean = torch.logaddexp(log_p, log_q).sub_(math.log(2))
        nats, slope = divergence(log_p, log_mean, "reverse_kl")
        return 0.5 * (nats + kl(log_q, log_mean)), slope.mul_(0.5)
    if kind == "sampled":
        nats, at = sampled(log_p, log_q, tokens), tokens[:, None]                       # -A_n
        return nats, log_p.exp().mul_(-nats[:, None]).scatter_add_(1, at, nats[:, None])
    raise ValueError(f"loss {kind!r}, expected forward_kl, reverse_kl, jsd or sampled")


class _ChunkedDivergence(torch.autograd.Function):
    """distill_loss, with the gradients made in the forward pass, while a chunk's logits exist."""

    @staticmethod
    def forward(ctx, student_hidden, student_head, teacher_hidden, teacher_head, weights, tokens,
                kind, chunk, stats):
        N, (need_hidden, need_head) = len(student_hidden), ctx.needs_input_grad[:2]
        nats, exact = torch.empty_like(weights), weights.dtype                           # (N,)
        grad_hidden = torch.empty_like(student_hidden) if need_hidden else None
        grad_head = torch.zeros_like(student_head, dtype=weights.dtype) if need_head else None
        # the two largest tensors here, written again for every chunk: (chunk, V)
        logits = [head.new_empty(min(chunk, N), len(head)) for head in (student_head, teacher_head)]
        for start in range(0, N, chunk):
            part = slice(start, min(start + chunk, N))
            student, teacher = (x[:part.stop - start] for x in logits)                   # (n, V)
            torch.mm(student_hidden[part], student_head.T, out=student)
            torch.mm(teacher_hidden[part], teacher_head.T, out=teacher)
            # matmuls want large chunks; the softmax between them wants small ones, to stay in cache
            for row in range(0, len(student), ROWS):
                few = slice(row, row + ROWS)
                here = slice(start + row, min(start + row + ROWS, part.stop))
                log_p, log_q = (x[few].log_softmax(-1, dtype=exact) for x in (student, teacher))
                said = None if tokens is None else tokens[here]
                nats[here], slope = divergence(log_p, log_q, kind, said)
                student[few] = slope                     # logits become their gradient
                if stats is not None:
                    untold, told = (x.gather(1, said[:, None])[:, 0] for x in (log_p, log_q))
                    stats["gap"][here] = told - untold
                    stats["entropy"][here] = -torch.exp(log_p, out=slope).mul_(log_p).sum(-1)
                del log_p, log_q, slope                  # or they would stand beside the next ones
            if need_hidden:
                grad_hidden[part] = student @ student_head
            if not need_head:
                continue
            hidden = (student_hidden[part] * weights[part, None]).to(student.dtype)      # (n, D)
            if grad_head.dtype == student.dtype:
                grad_head.addmm_(student.T, hidden)
                continue
            # Products in bf16, their sum in float32: torch cannot do both in one call. A few words
            # at a time, so that there is no second (V, D) tensor.
            for word in range(0, len(grad_head), WORDS):
                few = slice(word, word + WORDS)
                grad_head[few] += student[:, few].T @ hidden
        ctx.save_for_backward(grad_hidden, grad_head, weights)
        return nats

    @staticmethod
    @torch.autograd.function.once_differentiable    # a second derivative would be silently wrong
    def backward(ctx, upstream):
        grad_hidden, grad_head, weights = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * upstream[:, None].to(grad_hidden.dtype)
        if grad_head is not None:
            # The head's gradient sums over tokens, so it had to know their weights beforehand.
            squares = (weights * weights).sum()      # 0 without tokens: 0 / 0 would be NaN
            scale = (upstream * weights).sum() / squares.clamp(min=torch.finfo(squares.dtype).tiny)
            if not torch.allclose(upstream, scale * weights, rtol=1e-4, atol=0):
                raise ValueError("distill_loss: result reduced with other weights than `weights`")
            # exactly 1 when the weights were these. Otherwise in place: a copy is as large as the
            # head. torch raises if a retained graph then comes here again
            if scale != 1:
                grad_head.mul_(scale)
        return grad_hidden, grad_head, None, None, None, None, None, None, None


def distill_loss(student_hidden, teacher_hidden, student_head, teacher_head, kind="forward_kl", *,
                 chunk: int = 256, weights=None, tokens=None, stats: dict | None = None):
    """Divergence between teacher and student at each of N response tokens: (N,) nats per token.

    student_hidden (N, D), teacher_hidden (N, D'): last hidden states *at the position before* each
    token. student_head (V, D), teacher_head (V, D'): lm_head weights. kind: a plain one's name.
    chunk: tokens whose logits exist at one time: the peak is little above two (chunk, V) tensors.
    weights (N,): what the caller multiplies the result with before summing, needed for the head's
      gradient only (default: all alike, as for .sum() or .mean()); other weights raise in backward.
    tokens (N,): the sampled ids; needed for kind "sampled" and for stats.
    stats: a dict to be filled with "entropy" of the student and "gap", log p_T(y) - log p_theta(y).
    """
    if len(student_head) != len(teacher_head):
        raise ValueError(f"student head has {len(student_head)} rows, "
                         f"teacher head {len(teacher_head)}")
    for name, given in dict(teacher_hidden=teacher_hidden, weights=weights, tokens=tokens).items():
        if given is not None and len(given) != len(student_hidden):
            raise ValueError(f"student_hidden is {tuple(student_hidden.shape)} and {name} "
                             f"{tuple(given.shape)}: expected the same N tokens in both")
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}, expected at least 1")
    if tokens is None and (kind == "sampled" or stats is not None):
        raise ValueError(f"kind {kind!r} or stats: pass the sampled ids as tokens")
    if not torch.is_grad_enabled():
        # a custom function is told what has requires_grad, not whether anybody will ask for it
        student_hidden, student_head = student_hidden.detach(), student_head.detach()
    if weights is None:
        weights = student_hidden.new_ones(len(student_hidden))
    weights = weights.to(torch.promote_types(student_hidden.dtype, torch.float32))
    if stats is not None:
        stats.update(entropy=torch.empty_like(weights), gap=torch.empty_like(weights))
    return _ChunkedDivergence.apply(student_hidden, student_head, teacher_hidden.detach(),
                                    teacher_head.detach(), weights, tokens, kind, chunk, stats)
