"""loss.py - how far the student's next-token distribution is from the teacher's, token by token.

The idea.  Student and teacher have read the same response; at each of its N tokens each holds a
hidden state from which its lm_head makes V logits. The divergence of the two distributions is
exact, over the whole vocabulary, at temperature 1. V is 151,936: logits of a whole response would
be the largest tensors of the step (1,024 tokens: 0.6 GB a copy, several copies), so they exist a
chunk at a time, and the gradient is made right there, instead of keeping the logits or computing
them twice.

    forward_kl  KL(p_T || p)   covers what the teacher would say; OPSD's objective, the default
    reverse_kl  KL(p || p_T)   avoids what the teacher would not say
    jsd         between the two, at most ln 2
    sampled     k1 at the sampled token only: what the paper trains with (eq. 6-8)

In:  hidden states (N, D) of both models, both heads.
Out: (N,) nats, differentiable in the student's.

The one equation.  With p = softmax(student logits), the gradient in the logits:
    forward_kl  p - p_T     reverse_kl  p (log p - log p_T - KL)     sampled  A_n (p - onehot(y_n))

Why `sampled` and `reverse_kl` are one objective: the mean of the sampled gradient over y ~ p is the
gradient of reverse_kl (E[onehot] = p, E[A] = -KL); a test checks it. The exact form has no noise
from the current token; the noise of the sampled prefix stays.

Use it alone: imports torch only.
Left out: temperatures other than 1, clamps on single entries of the vocabulary (they flip
gradients), top-k truncation (it throws the tail's gradient away).
"""
from __future__ import annotations

import math

import torch

# Dimension letters: N scored tokens, n tokens of one chunk, D hidden size, V vocabulary.

ROWS = 16        # tokens between the matrix products: four (16, V) float32 tensors are 39 MB
WORDS = 2048     # of the head's gradient in bf16: one (2048, 2048) tensor is 8 MB


def divergence(student: torch.Tensor, teacher: torch.Tensor, kind: str, tokens=None):
    """Divergence of two log-distributions (n, V) at n positions, and its gradient.

    Returns nats (n,) and d nats / d student logits (n, V), a tensor of its own. `tokens` (n,): the
    sampled ids, for "sampled". Here p is the student's distribution, q the teacher's. Written in
    place where it can be: at most two (n, V) tensors beside the two that came in (jsd three).
    """
    if kind == "forward_kl":                  # KL(q || p): where the teacher goes, be there too
        q = teacher.exp()
        nats = (teacher - student).mul_(q).sum(-1)
        return nats, student.exp().sub_(q)
    if kind == "reverse_kl":                  # KL(p || q): do not go where the teacher does not
        return _through_softmax(student.exp(), student - teacher)
    if kind == "jsd":                         # both, against the mean of the two; at most ln 2
        middle = torch.logaddexp(student, teacher).sub_(math.log(2))
        theirs = (teacher - middle).mul_(teacher.exp()).sum(-1)
        ours, slope = _through_softmax(student.exp(), student - middle)
        return 0.5 * (ours + theirs), slope.mul_(0.5)
    if kind == "sampled":                     # k1 at the sampled token (eq. 6-8); in the release
        floor, clamp = -10.0, 10.0            # log-probs floored, the advantage clamped
        at = tokens[:, None]
        advantage = (teacher.gather(1, at).clamp(min=floor)
                     - student.gather(1, at).clamp(min=floor)).clamp(-clamp, clamp)   # A_n
        # the loss -A_n log p(y_n): its gradient in the logits is A_n (p - onehot)
        slope = student.exp().mul_(advantage)
        return -advantage[:, 0], slope.scatter_add_(1, at, -advantage)
    raise ValueError(f"loss {kind!r}, expected forward_kl, reverse_kl, jsd or sampled")


def _through_softmax(p: torch.Tensor, ratio: torch.Tensor):
    """E_p[ratio] (n,), and its gradient in the logits of p, p (ratio - E_p[ratio]) (n, V).

    ratio (n, V) is log p minus something; what p itself adds to the gradient there sums to zero. It
    is overwritten.
    """
    weighted = ratio.mul_(p)
    mean = weighted.sum(-1, keepdim=True)
    return mean[:, 0], weighted.addcmul_(p, mean, value=-1)


def _logits_to_gradient(student, teacher, kind, tokens, here: slice, stats) -> torch.Tensor:
    """nats of a few rows of logits; writes the gradient over the student's, fills stats[...][here].

    Products like many tokens at a time. What is between them likes few: its half dozen tensors are
    then small and stay in the cache. And all but the result is freed on return.
    """
    exact = torch.promote_types(student.dtype, torch.float32)
    log_p, log_q = (logits.log_softmax(-1, dtype=exact) for logits in (student, teacher))
    at = None if tokens is None else tokens[here]
    nats, slope = divergence(log_p, log_q, kind, at)
    student.copy_(slope)
    if stats is not None:
        stats["gap"][here] = (log_q.gather(1, at[:, None]) - log_p.gather(1, at[:, None]))[:, 0]
        stats["entropy"][here] = -torch.exp(log_p, out=slope).mul_(log_p).sum(-1)
    return nats


def _add_product(total, slope, hidden) -> None:
    """total (V, D) += slope^T hidden, for slope (n, V), hidden (n, D); no second (V, D) tensor.

    In bf16 the product is taken in bf16, three times as fast as in float32 even on a CPU, and added
    up in float32. Few words at a time, since torch cannot add a product in another type in place.
    """
    hidden = hidden.to(slope.dtype)
    if total.dtype == slope.dtype:
        total.addmm_(slope.T, hidden)
        return
    for word in range(0, len(total), WORDS):
        few = slice(word, word + WORDS)
        total[few] += slope[:, few].T @ hidden


class _ChunkedDivergence(torch.autograd.Function):
    """distill_loss, with the gradients made in the forward pass, while a chunk's logits exist."""

    @staticmethod
    def forward(ctx, student_hidden, student_head, teacher_hidden, teacher_head, weights, tokens,
                kind, chunk, stats):
        exact = torch.promote_types(student_hidden.dtype, torch.float32)
        need_hidden, need_head = ctx.needs_input_grad[:2]
        N = student_hidden.shape[0]
        nats = torch.empty(N, dtype=exact, device=student_hidden.device)
        grad_hidden = torch.empty_like(student_hidden) if need_hidden else None
        grad_head = torch.zeros_like(student_head, dtype=exact) if need_head else None
        # the two largest tensors here, written again for every chunk
        logits = [hidden.new_empty(min(chunk, N), len(head)) for hidden, head in
                  ((student_hidden, student_head), (teacher_hidden, teacher_head))]
        for start in range(0, N, chunk):
            part = slice(start, min(start + chunk, N))
            student, teacher = (x[:part.stop - start] for x in logits)                   # (n, V)
            torch.mm(student_hidden[part], student_head.T, out=student)
            torch.mm(teacher_hidden[part], teacher_head.T, out=teacher)
            for row in range(0, len(student), ROWS):
                few = slice(row, row + ROWS)
                here = slice(start + row, min(start + row + ROWS, part.stop))
                nats[here] = _logits_to_gradient(student[few], teacher[few], kind, tokens, here,
                                                 stats)
            if need_hidden:
                grad_hidden[part] = student @ student_head
            if need_head:
                _add_product(grad_head, student, student_hidden[part] * weights[part, None])
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
                raise ValueError("distill_loss: the result was reduced with other weights than the "
                                 "`weights` it was given (default: all alike)")
            # exactly 1 when the weights were these. Otherwise in place, since a copy is as large as
            # the head; torch notices if a retained graph then comes here again
            if scale != 1:
                grad_head.mul_(scale)
        return grad_hidden, grad_head, None, None, None, None, None, None, None


def distill_loss(student_hidden, teacher_hidden, student_head, teacher_head, kind="forward_kl", *,
                 chunk: int = 256, weights=None, tokens=None, stats: dict | None = None):
    """Divergence between teacher and student at each of N response tokens: (N,) nats per token.

    student_hidden (N, D), teacher_hidden (N, D'): last hidden states *at the position before* each
    token. student_head (V, D), teacher_head (V, D'): lm_head weights. kind: see divergence().
    chunk: tokens whose logits exist at one time; no (N, V) tensor is made. The peak is little above
      two (chunk, V) tensors, and the head's gradient if it learns. Fewer tokens: slower products.
    weights (N,): what the caller multiplies the result with before summing, needed for the head's
      gradient only (default: all alike, as for .sum() or .mean()); other weights raise in backward.
    tokens (N,): the sampled ids; needed for kind "sampled" and for stats.
    stats: a dict to be filled with "entropy" of the student and "gap", log p_T(y) - log p_theta(y).
    """
    if student_head.shape[0] != teacher_head.shape[0]:
        raise ValueError(f"student head has {student_head.shape[0]} rows, teacher head "
                         f"{teacher_head.shape[0]}")
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}, expected at least 1")
    if tokens is None and (kind == "sampled" or stats is not None):
        raise ValueError(f"kind {kind!r} or stats: pass the sampled ids as tokens")
    if not torch.is_grad_enabled():
        # a custom function is told what has requires_grad, not whether anybody will ask for it
        student_hidden, student_head = student_hidden.detach(), student_head.detach()
    exact = torch.promote_types(student_hidden.dtype, torch.float32)
    N = student_hidden.shape[0]
    weights = student_hidden.new_ones(N, dtype=exact) if weights is None else weights.to(exact)
    if stats is not None:
        stats.update({k: torch.empty(N, dtype=exact, device=weights.device)
                      for k in ("entropy", "gap")})
    return _ChunkedDivergence.apply(student_hidden, student_head, teacher_hidden.detach(),
                                    teacher_head.detach(), weights, tokens, kind, chunk, stats)
