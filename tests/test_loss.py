"""loss.py: every divergence against the plain form on whole logits, and the ways such losses
broke.

The plain form below lets autograd work on (N, V) logits in float64. It is written apart from the
functions on loss.py's board, with ratios of probabilities, so that one can prove the other wrong.
"""
import math
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import loss
from loss import distill_loss, divergence

KINDS = ("forward_kl", "reverse_kl", "jsd", "sampled")
EXACT = KINDS[:3]
VOCABULARY, STUDENT, TEACHER = 11, 5, 7        # hidden sizes differ: a bigger teacher


def make(N, seed=0, scale=0.7, vocabulary=VOCABULARY):
    """Random states and heads in float64: (student hidden, teacher hidden, both heads, tokens)."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return scale * torch.randn(*shape, generator=g, dtype=torch.float64)
    return (normal(N, STUDENT).requires_grad_(), normal(N, TEACHER),
            normal(vocabulary, STUDENT).requires_grad_(), normal(vocabulary, TEACHER),
            torch.randint(vocabulary, (N,), generator=g))


def plain(student, teacher, kind, tokens):
    """(N,) nats of whole logits, as a textbook writes them; autograd finds the gradients."""
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    if kind == "forward_kl":
        return (q * (q / p).log()).sum(-1)
    if kind == "reverse_kl":
        return (p * (p / q).log()).sum(-1)
    if kind == "jsd":
        m = (p + q) / 2
        return ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2
    at = torch.arange(len(tokens)), tokens
    advantage = (log_q[at] - log_p[at]).detach()
    surrogate = -advantage * log_p[at]                       # its gradient, with the value of k1
    return surrogate - surrogate.detach() - advantage


def gradients(nats, weights, *inputs):
    return torch.autograd.grad((nats * weights).sum(), inputs)


# ---------------------------------------------------------------------------- values and gradients

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("N, chunk", [(0, 4), (1, 4), (8, 4), (9, 4), (9, 1), (9, 100)])
def test_chunked_equals_whole(kind, N, chunk):
    """Value, and gradients of hidden states and head, with a weight of its own for every token."""
    hidden, teacher_hidden, head, teacher_head, tokens = make(N)
    weights = torch.linspace(0.1, 2.0, N, dtype=torch.float64)
    nats = distill_loss(hidden, teacher_hidden, head, teacher_head, kind, chunk=chunk,
                        weights=weights, tokens=tokens)
    whole = plain(hidden @ head.T, teacher_hidden @ teacher_head.T, kind, tokens)
    assert nats.shape == (N,) and nats.dtype == torch.float64
    torch.testing.assert_close(nats, whole, atol=1e-12, rtol=1e-9)
    for ours, theirs in zip(gradients(nats, weights, hidden, head),
                            gradients(whole, weights, hidden, head)):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_board_the_hand_and_the_chunks_are_one_function(kind):
    """What a reader takes from the board is what is trained: values and gradients, in float64."""
    hidden, teacher_hidden, head, teacher_head, tokens = make(9)
    weights = torch.linspace(0.1, 2.0, 9, dtype=torch.float64)
    logits, teacher_logits = hidden @ head.T, teacher_hidden @ teacher_head.T
    log_p, log_q = logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    board = getattr(loss, kind)(log_p, log_q, *([tokens] if kind == "sampled" else []))
    expected = gradients(board, weights, logits, hidden, head)
    nats, slope = divergence(log_p.detach(), log_q, kind, tokens)
    chunked = distill_loss(hidden, teacher_hidden, head, teacher_head, kind, chunk=4,
                           weights=weights, tokens=tokens)
    found = slope * weights[:, None], *gradients(chunked, weights, hidden, head)
    for ours, theirs in zip((nats, chunked, *found), (board, board, *expected)):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(board, plain(logits, teacher_logits, kind, tokens))


@pytest.mark.parametrize("kind", EXACT)
def test_gradients_are_those_of_finite_differences(kind):
    """Independent of any autograd rule. (`sampled` is a score-function gradient, not that of its
    value: see the two tests of its mean.)"""
    hidden, teacher_hidden, head, teacher_head, _ = make(5, seed=1)
    weights = torch.tensor([1.0, 0.5, 2.0, 0.0, 3.0], dtype=torch.float64)

    def total(hidden, head):
        return (distill_loss(hidden, teacher_hidden, head, teacher_head, kind, chunk=2,
                             weights=weights) * weights).sum()
    assert torch.autograd.gradcheck(total, (hidden, head), eps=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_student_equal_to_teacher_has_no_loss_and_no_gradient(kind, dtype):
    """PITFALLS 16. A fused JSD gave 6.0 for equal models (trl#5731); elsewhere beta was
    swapped."""
    hidden, _, head, _, tokens = make(6, scale=3.0)
    hidden, head = (x.detach().to(dtype).requires_grad_() for x in (hidden, head))
    nats = distill_loss(hidden, hidden, head, head, kind, chunk=4, tokens=tokens)
    tiny = 1e-6 if dtype != torch.float64 else 1e-14
    assert nats.abs().max() < tiny
    for gradient in torch.autograd.grad(nats.sum(), (hidden, head)):
        assert gradient.abs().max() < 20 * tiny


def test_nats_of_a_small_example_by_hand():
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2): both divergences are ln 2 / 4.

    PITFALLS 19. torch's KLDivLoss divides by the vocabulary too by default: 150,000 times too
    small, so the loss looked converged from the first step. Here the words of the vocabulary are
    summed."""
    p, q = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.25, 0.5]]).log()
    one = torch.ones(1, 1)
    for kind in ("forward_kl", "reverse_kl"):
        nats = distill_loss(one, one, p.T, q.T, kind)
        assert nats.item() == pytest.approx(math.log(2) / 4, abs=1e-6)
    halves = torch.tensor([[0.375, 0.25, 0.375]])        # their mean; JSD = H(mean) - mean of H
    expected = -(halves * halves.log()).sum().item() - 1.5 * math.log(2)
    assert distill_loss(one, one, p.T, q.T, "jsd").item() == pytest.approx(expected, abs=1e-6)
    sampled = distill_loss(one.expand(3, 1), one.expand(3, 1), p.T, q.T, "sampled",
                           tokens=torch.arange(3))
    assert sampled.tolist() == pytest.approx([math.log(2), 0, -math.log(2)], abs=1e-6)


def test_size_of_the_loss_does_not_depend_on_the_vocabulary():
    """PITFALLS 19 again: the same doubt between two words, with 20,000 impossible words beside
    them."""
    one, rest = torch.ones(1, 1), torch.full((20_000, 1), -60.0)
    small = [torch.tensor([[0.9], [0.1]]).log(), torch.tensor([[0.1], [0.9]]).log()]
    for kind in EXACT:
        few = distill_loss(one, one, *small, kind)
        many = distill_loss(one, one, *(torch.cat([x, rest]) for x in small), kind)
        torch.testing.assert_close(few, many)
        assert few.item() > 0.3


def test_jsd_is_symmetric_and_at_most_ln_2():
    hidden, teacher_hidden, head, teacher_head, _ = make(50, scale=4.0)
    there = distill_loss(hidden, teacher_hidden, head, teacher_head, "jsd")
    back = distill_loss(teacher_hidden, hidden, teacher_head, head, "jsd")
    torch.testing.assert_close(there, back)
    assert 0 < there.min() and 0.6 < there.max() <= math.log(2) + 1e-12
    apart = torch.tensor([[50.0, -50.0]])
    assert divergence(apart.log_softmax(-1), (-apart).log_softmax(-1), "jsd")[0].item() == (
        pytest.approx(math.log(2), abs=1e-6))


def test_forward_and_reverse_are_not_swapped():
    """PITFALLS 16 (trl#2202): the teacher has two modes, the student sits on one. Forward KL minds
    the mode that the student misses, reverse KL hardly does."""
    student = torch.tensor([[0.98, 0.01, 0.01]]).log()
    teacher = torch.tensor([[0.495, 0.495, 0.01]]).log()
    forward, _ = divergence(student, teacher, "forward_kl")
    reverse, _ = divergence(student, teacher, "reverse_kl")
    assert forward.item() > 2 * reverse.item() > 1


# ---------------------------------------------------------------------------- the sampled form

def mean_sampled_gradient(hidden, teacher_hidden, head, teacher_head, tokens, shares):
    """Gradients of one state repeated for each of `tokens`, averaged with `shares`."""
    n = len(tokens)
    nats = distill_loss(hidden.expand(n, -1), teacher_hidden.expand(n, -1), head, teacher_head,
                        "sampled", weights=shares, tokens=tokens)
    return gradients(nats, shares, hidden, head)


def test_mean_of_the_sampled_gradient_is_the_reverse_kl_gradient():
    """E over y ~ p of A_y (p - onehot_y), as the exact sum over all y: why the two are one
    objective."""
    hidden, teacher_hidden, head, teacher_head, _ = make(1, seed=2)
    p = (hidden @ head.T).softmax(-1)[0].detach()
    mean = mean_sampled_gradient(hidden, teacher_hidden, head, teacher_head,
                                 torch.arange(VOCABULARY), p)
    nats = distill_loss(hidden, teacher_hidden, head, teacher_head, "reverse_kl")
    for ours, exact in zip(mean, gradients(nats, torch.ones(1), hidden, head)):
        torch.testing.assert_close(ours, exact, atol=1e-12, rtol=1e-9)


def test_mean_of_many_sampled_gradients_approaches_the_reverse_kl_gradient():
    """The same by Monte Carlo: 40,000 draws, within five standard errors in every coordinate."""
    hidden, teacher_hidden, head, teacher_head, _ = make(1, seed=2)
    p = (hidden @ head.T).softmax(-1)[0].detach()
    n = 40_000
    tokens = torch.multinomial(p, n, replacement=True, generator=torch.Generator().manual_seed(0))
    states = hidden.detach().repeat(n, 1).requires_grad_()
    nats = distill_loss(states, teacher_hidden.expand(n, -1), head.detach(), teacher_head,
                        "sampled", tokens=tokens)
    each, = torch.autograd.grad(nats.sum(), states)                                  # (n, D)
    exact, = gradients(distill_loss(hidden, teacher_hidden, head, teacher_head, "reverse_kl"),
                       torch.ones(1), hidden)
    error = (each.mean(0) - exact[0]).abs()
    standard_error = each.std(0) / n**0.5
    assert (error < 5 * standard_error).all()
    assert (exact[0].abs() > 20 * standard_error).any(), "noise would hide any gradient"


def test_sampled_floor_and_clamp():
    """PITFALLS 17. Per token, never per entry: log-probs are floored at -10, the advantage is kept
    within 10, and the gradient keeps the sign of the advantage."""
    # not normalised: with a log-prob above 0 the clamp can be seen behind the floor
    student = torch.tensor([[-1.0, -40.0, -30.0, 12.0, 2.0]]).double().repeat(5, 1)
    teacher = torch.tensor([[-60.0, -2.0, -50.0, -3.0, 3.0]]).double().repeat(5, 1)
    nats, slope = divergence(student, teacher, "sampled", torch.arange(5))
    assert nats.tolist() == [9.0, -8.0, 0.0, 10.0, -1.0]
    for y, loss in enumerate(nats.tolist()):
        pull = slope[y] + loss * student[y].exp()        # A (p - onehot) without A p is -A onehot
        torch.testing.assert_close(pull, loss * torch.eye(5).double()[y], atol=1e-8, rtol=0)


def test_gradient_pulls_towards_a_token_the_student_finds_impossible():
    """PITFALLS 17. Clamping single entries of the sum before adding them up flipped the gradient
    of exactly these tokens (OPSD#24). In forward KL it is p - q, whatever the ratio."""
    student = torch.tensor([[30.0, -30.0, 0.0]]).log_softmax(-1)
    teacher = torch.tensor([[-30.0, 30.0, 0.0]]).log_softmax(-1)
    nats, slope = divergence(student, teacher, "forward_kl")
    assert nats.item() == pytest.approx(60.0)
    assert slope[0].tolist() == pytest.approx([1.0, -1.0, 0.0], abs=1e-6)


# ---------------------------------------------------------------------------- weights and batches

def test_micro_batches_add_up():
    """PITFALLS 18. Tokens are divided by the response tokens of the whole batch, counted once: 1 x
    4 and 4 x 1 give one gradient (trl#6006)."""
    hidden, teacher_hidden, head, teacher_head, tokens = make(10)
    lengths = (1, 5, 2, 2)
    weights = torch.cat([torch.full((n,), 1 / (4 * n), dtype=torch.float64) for n in lengths])

    def gradient(parts):
        total = torch.zeros_like(head)
        for part in parts:
            nats = distill_loss(hidden[part], teacher_hidden[part], head, teacher_head,
                                weights=weights[part])
            total += gradients(nats, weights[part], head)[0]
        return total
    cuts = (0, 1, 6, 8, 10)
    torch.testing.assert_close(gradient([slice(a, b) for a, b in zip(cuts, cuts[1:])]),
                               gradient([slice(0, 10)]))


@pytest.mark.parametrize("reduce", [torch.sum, torch.mean, lambda nats: 3 * nats.sum()])
def test_any_multiple_of_the_weights_is_fine(reduce):
    """.sum() and .mean() need no weights, and a loss scale may come on top."""
    hidden, teacher_hidden, head, teacher_head, tokens = make(7)
    nats = distill_loss(hidden, teacher_hidden, head, teacher_head, chunk=3)
    whole = plain(hidden @ head.T, teacher_hidden @ teacher_head.T, "forward_kl", tokens)
    torch.testing.assert_close(torch.autograd.grad(reduce(nats), head),
                               torch.autograd.grad(reduce(whole), head))


def test_other_weights_are_refused_when_the_head_learns():
    """The head's gradient is summed over tokens in the forward pass, so it cannot be
    reweighted."""
    hidden, teacher_hidden, head, teacher_head, _ = make(7)
    for weights in (torch.arange(7.0), torch.eye(7)[0], -torch.ones(7) + 0.01 * torch.eye(7)[3]):
        nats = distill_loss(hidden, teacher_hidden, head, teacher_head)
        with pytest.raises(ValueError, match="other weights"):
            (nats * weights).sum().backward()


def test_any_weights_will_do_when_only_the_states_learn():
    hidden, teacher_hidden, head, teacher_head, tokens = make(7)
    frozen, weights = head.detach(), torch.arange(7.0)
    nats = distill_loss(hidden, teacher_hidden, frozen, teacher_head)
    whole = plain(hidden @ frozen.T, teacher_hidden @ teacher_head.T, "forward_kl", tokens)
    torch.testing.assert_close(gradients(nats, weights, hidden), gradients(whole, weights, hidden))


@pytest.mark.parametrize("N", [0, 4])
def test_weights_of_zero_give_a_gradient_of_zero(N):
    """Also no tokens at all: 0 / 0 was NaN here, and one NaN in the head is the end of a run."""
    hidden, teacher_hidden, head, teacher_head, _ = make(N)
    weights = torch.zeros(N)
    nats = distill_loss(hidden, teacher_hidden, head, teacher_head, weights=weights)
    for gradient in gradients(nats, weights, hidden, head):
        assert (gradient == 0).all()


def test_tied_head_learns_from_both_of_its_uses():
    """A 2B student ties lm_head to the embedding: the gradient of the one use is added to the
    other."""
    _, teacher_hidden, head, teacher_head, tokens = make(6)
    read = torch.tensor([3, 1, 4, 1, 5, 9])

    def gradient(loss):
        nats = loss(torch.tanh(head[read]), head)            # the states come from the embedding
        return torch.autograd.grad(nats.mean(), head)
    torch.testing.assert_close(
        gradient(lambda hidden, head: distill_loss(hidden, teacher_hidden, head, teacher_head)),
        gradient(lambda hidden, head: plain(hidden @ head.T, teacher_hidden @ teacher_head.T,
                                            "forward_kl", tokens)))


def test_the_teacher_gets_no_gradient():
    hidden, teacher_hidden, head, teacher_head, _ = make(3)
    teacher_hidden.requires_grad_(), teacher_head.requires_grad_()
    distill_loss(hidden, teacher_hidden, head, teacher_head).sum().backward()
    assert teacher_hidden.grad is None and teacher_head.grad is None
    assert hidden.grad.abs().sum() > 0 and head.grad.abs().sum() > 0


def test_second_derivatives_are_refused():
    """The gradient is made in the forward pass, so differentiating it again would give a wrong
    number."""
    hidden, teacher_hidden, head, teacher_head, _ = make(3)
    nats = distill_loss(hidden, teacher_hidden, head.detach(), teacher_head)
    first, = torch.autograd.grad((nats**2).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        first.sum().backward()


def test_a_retained_graph_never_gives_a_gradient_scaled_twice():
    """The head's gradient is scaled in place, to save a copy as large as the head. With the
    announced weights nothing is scaled, and a second backward is right; with a multiple of them
    torch refuses it."""
    hidden, teacher_hidden, head, teacher_head, _ = make(5)
    nats = distill_loss(hidden, teacher_hidden, head, teacher_head)
    twice = [torch.autograd.grad(nats.sum(), head, retain_graph=True)[0].clone() for _ in range(2)]
    assert torch.equal(*twice)
    total = 3 * nats.sum()
    assert torch.allclose(torch.autograd.grad(total, head, retain_graph=True)[0], 3 * twice[0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(total, head)


def test_weights_that_need_no_scaling_give_exactly_the_sum():
    """The training loop's case: no pass over the head at all, so no rounding either."""
    hidden, teacher_hidden, head, teacher_head, _ = make(9)
    weights = torch.rand(9, dtype=torch.float64)
    nats = distill_loss(hidden, teacher_hidden, head, teacher_head, weights=weights)
    saved = nats.grad_fn.saved_tensors[1]
    assert torch.autograd.grad((nats * weights).sum(), head)[0].data_ptr() == saved.data_ptr()


def test_only_gradients_that_are_asked_for_are_made():
    """Products with a head in one chunk: two for logits, one for each gradient. Under no_grad the
    parameters still have requires_grad, and an evaluation paid for a training step's gradients."""
    hidden, teacher_hidden, head, teacher_head, _ = make(5)

    def products(hidden, head):
        with Watch() as seen:
            distill_loss(hidden, teacher_hidden, head, teacher_head)
        return seen.calls["aten.mm"] + seen.calls["aten.addmm_"]
    assert products(hidden, head) == 4
    assert products(hidden, head.detach()) == products(hidden.detach(), head) == 3
    assert products(hidden.detach(), head.detach()) == 2
    with torch.no_grad():
        assert products(hidden, head) == 2


# ---------------------------------------------------------------------------- numbers at the edge

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_stay_finite(kind, dtype):
    """PITFALLS 9. -inf times 0 is NaN, and nan_to_num repairs the value but not the gradient
    (trl#5594). Logits of +-1e4, alike, opposed, and one-sided."""
    head = torch.tensor([[1e4], [-1e4], [0.0]], dtype=dtype).requires_grad_()
    states = torch.tensor([[1.0], [1.0], [-1.0], [0.0]], dtype=dtype).requires_grad_()
    other = torch.tensor([[1.0], [-1.0], [1.0], [1.0]], dtype=dtype)
    for tokens in (torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=torch.long)):
        stats = {}
        nats = distill_loss(states, other, head, head.detach(), kind, tokens=tokens, stats=stats)
        assert nats.isfinite().all() and nats[0].abs() < 1e-6
        assert all(value.isfinite().all() for value in stats.values())
        for gradient in torch.autograd.grad(nats.sum(), (states, head)):
            assert gradient.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_models_get_float32_nats(kind, monkeypatch):
    """Softmax over rounded logits but in float32; gradients come back in the models' own type. The
    head's is made of several pieces of the vocabulary."""
    monkeypatch.setattr(loss, "WORDS", 7)
    exact = make(40)
    hidden, teacher_hidden, head, teacher_head = (
        x.detach().bfloat16().requires_grad_() for x in exact[:4])
    weights = torch.linspace(0.1, 2.0, 40)
    nats = distill_loss(hidden, teacher_hidden, head, teacher_head, kind, chunk=16,
                        weights=weights, tokens=exact[4])
    whole = plain((hidden @ head.T).double(), (teacher_hidden @ teacher_head.T).double(), kind,
                  exact[4])
    assert nats.dtype == torch.float32
    torch.testing.assert_close(nats.double(), whole, atol=1e-5, rtol=1e-4)
    for ours, theirs in zip(gradients(nats, weights, hidden, head),
                            gradients(whole, weights.double(), hidden, head)):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours, theirs, atol=2e-2 * theirs.abs().max().item(), rtol=2e-2)


def test_teacher_of_another_precision():
    """An averaged teacher is float32 beside a bf16 student: the nats are those of the exact
    teacher."""
    hidden, teacher_hidden, head, teacher_head, tokens = make(9)
    ours = hidden.detach().bfloat16(), teacher_hidden.float(), head.detach().bfloat16()
    nats = distill_loss(*ours, teacher_head.float())
    whole = plain((ours[0] @ ours[2].T).double(), teacher_hidden @ teacher_head.T, "forward_kl",
                  tokens)
    torch.testing.assert_close(nats, whole.float(), atol=1e-5, rtol=1e-4)


def test_stats_are_exact():
    hidden, teacher_hidden, head, teacher_head, tokens = make(9)
    stats = {"kept": 1}
    distill_loss(hidden, teacher_hidden, head, teacher_head, chunk=4, tokens=tokens, stats=stats)
    log_p = (hidden @ head.T).log_softmax(-1).detach()
    log_q = (teacher_hidden @ teacher_head.T).log_softmax(-1)
    entropy = torch.distributions.Categorical(logits=log_p).entropy()
    torch.testing.assert_close(stats["entropy"], entropy)
    torch.testing.assert_close(stats["gap"], (log_q - log_p)[torch.arange(9), tokens])
    assert stats["kept"] == 1 and not any(stats[k].requires_grad for k in ("entropy", "gap"))


class Watch(TorchDispatchMode):
    """Counts the operations, and records the most elements of any tensor that one returned."""

    def __init__(self):
        super().__init__()
        self.calls, self.numbers = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls[str(func.overloadpacket)] += 1
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_of_all_logits_is_ever_made(kind):
    """Neither forward nor backward: the largest tensor is one chunk of logits, or the head."""
    N, vocabulary, chunk = 96, 200, 8
    hidden, teacher_hidden, head, teacher_head, tokens = make(N, vocabulary=vocabulary)
    with Watch() as seen:
        stats = {}
        distill_loss(hidden, teacher_hidden, head, teacher_head, kind, chunk=chunk, tokens=tokens,
                     stats=stats).sum().backward()
    assert seen.numbers == max(chunk * vocabulary, vocabulary * TEACHER)
    with Watch() as seen:
        plain(hidden @ head.T, teacher_hidden @ teacher_head.T, kind, tokens)
    assert seen.numbers >= N * vocabulary, "the recorder must see what the plain form makes"


# ---------------------------------------------------------------------------- refused

def test_heads_of_different_rows_are_refused():
    """PITFALLS 4. 151,936 and 152,064 rows: two vocabularies, whose ids must not be compared."""
    one = torch.ones(1, 2)
    with pytest.raises(ValueError, match="6 rows.*5"):
        distill_loss(one, one, torch.ones(6, 2), torch.ones(5, 2))


@pytest.mark.parametrize("name", ["teacher_hidden", "weights", "tokens"])
def test_another_number_of_tokens_is_refused(name):
    """Seven teacher rows for five of the student gave values, weights of seven unwritten memory."""
    given = dict(teacher_hidden=torch.ones(5, 2), weights=torch.ones(5), tokens=torch.ones(5).long())
    for rows in (4, 7):
        wrong = given | {name: given[name][:1].expand(rows, *given[name].shape[1:])}
        with pytest.raises(ValueError, match=rf"\(5, 2\) and {name} \({rows},"):
            distill_loss(torch.ones(5, 2), student_head=torch.ones(6, 2),
                         teacher_head=torch.ones(6, 2), **wrong)


def test_missing_tokens_and_unknown_kinds_are_refused():
    one, head = torch.ones(1, 2), torch.ones(6, 2)
    with pytest.raises(ValueError, match="tokens"):
        distill_loss(one, one, head, head, "sampled")
    with pytest.raises(ValueError, match="tokens"):
        distill_loss(one, one, head, head, stats={})
    with pytest.raises(ValueError, match="forwardkl.*expected forward_kl"):
        distill_loss(one, one, head, head, "forwardkl")
    with pytest.raises(ValueError, match="chunk is -1"):
        distill_loss(one, one, head, head, chunk=-1)
