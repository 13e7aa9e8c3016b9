"""module.py - how fast is the recovery module's absorbed form, and what does it add to a prefill?

The idea.  With one query, W_K and W_V need not be applied to every visual token (cue_recovery.py,
departure 2). A is the textbook form: normalise the visual tokens, project all of them to K and U,
and let torch's own attention kernel read them. B is cue_recovery.Block. Same weights, same input;
first their values and every gradient must agree, then they are timed in turn.

    python tests/speed/module.py [--quick] [--threads 1] [--cpu-seconds]

The one equation, multiply-adds times 2 of one block for N visual tokens, D hidden, H heads:
    textbook  2 (2 D^2 + 2 N D^2 + 2 N D)        absorbed  2 (4 D^2 + 2 H N D)

Out: a table, Markdown rows for README.md beside this file, and one line of JSON with the ratios.
Left out: the rest of the model (its work is counted, not timed).
"""
from __future__ import annotations

import argparse
import json
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import pairs
from pairs import DEVICE
from cue_recovery import Block

HIDDEN, HEADS = 2048, 16                      # Qwen3-VL-2B
BEFORE, BEHIND = 4, 26                        # tokens of text around the picture

# The language model of Qwen3-VL-2B: what a prefill costs without the module.
LANGUAGE = SimpleNamespace(hidden=2048, layers=28, heads=16, kv_heads=8, head=128, mlp=6144)


# ---------------------------------------------------------------------------- the two sides

def textbook(block, x, sink, visual, lo, hi):
    """Eq. 3-5 as the paper writes them: K and U for every visual token."""
    B, D = len(x), x.shape[-1]
    rows = torch.arange(B, device=x.device)

    def project(linear, states):                                           # -> (B, H, tokens, d)
        return linear(states).view(B, -1, block.heads, D // block.heads).transpose(1, 2)
    h = x[rows, sink]
    v = F.rms_norm(x[:, lo:hi], (D,), block.visual_norm.weight, 1e-6)               # (B, N, D)
    q = F.rms_norm(h, (D,), block.sink_norm.weight, 1e-6)[:, None]
    z = F.scaled_dot_product_attention(project(block.query, q), project(block.key, v),
                                       project(block.value, v), attn_mask=visual[:, None, None])
    return x.index_put((rows, sink), h + block.output(z.reshape(B, D)))


def absorbed(block, x, sink, visual, lo, hi):
    return block(x, sink, visual, lo, hi)[0]


def make(B, N, dtype, hidden=HIDDEN, heads=HEADS):
    """A block with random weights, and states of B rows with N visual tokens each."""
    g = torch.Generator().manual_seed(0)
    block = Block(hidden, heads, 1e-6)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=g)
            else:
                parameter.normal_(std=hidden**-0.5, generator=g)
    x = torch.randn(B, BEFORE + N + BEHIND, hidden, generator=g).to(DEVICE, dtype)
    visual = torch.ones(B, N, dtype=torch.bool, device=DEVICE)
    sink = torch.zeros(B, dtype=torch.long, device=DEVICE)
    return block.to(DEVICE, dtype), (x.requires_grad_(), sink, visual, BEFORE, BEFORE + N)


def gradients(side, block, inputs, upstream):
    out = side(block, *inputs)
    names = [name for name, _ in block.named_parameters()]
    grads = torch.autograd.grad(out, [inputs[0], *block.parameters()], upstream)
    return {"value": out.detach(), **dict(zip(["x", *names], grads))}


def check(block, inputs):
    """Largest relative error of value and gradients; raises if the two are not one function."""
    x, sink = inputs[:2]
    rows = torch.arange(len(x), device=x.device), sink
    # only the sink's output is the block's: elsewhere upstream would hide what the block adds
    torch.manual_seed(0)
    upstream = torch.zeros_like(x)
    upstream[rows] = torch.randn_like(x[rows])
    ours, theirs = (gradients(side, block, inputs, upstream) for side in (absorbed, textbook))
    limit = 2e-5 if x.dtype == torch.float32 else 5e-2
    ours["value"], theirs["value"] = (d["value"][rows] - x.detach()[rows] for d in (ours, theirs))
    worst = 0.0
    for name, expected in theirs.items():
        error = float((ours[name] - expected).float().norm() / expected.float().norm())
        if not error < limit:
            raise AssertionError(f"{name}: absorbed and textbook differ by {error:.1e} ({x.dtype})")
        worst = max(worst, error)
    return worst


def compare(B, N, dtype, count, cpu_seconds):
    block, inputs = make(B, N, dtype)
    upstream = torch.randn_like(inputs[0])
    error = check(block, inputs)

    def forward(side):
        with torch.no_grad():
            side(block, *inputs)
    sides = (("textbook", textbook), ("absorbed", absorbed))
    prefill = pairs.alternate({name: lambda s=side: forward(s) for name, side in sides}, count,
                              cpu_seconds)
    train = pairs.alternate({name: lambda s=side: gradients(s, block, inputs, upstream)
                             for name, side in sides}, count, cpu_seconds)
    return prefill, train, error


# ---------------------------------------------------------------------------- counting

def block_flops(N, D=HIDDEN, H=HEADS, form="absorbed") -> int:
    """Matrix products of one block and one row, a multiply-add as two."""
    if form == "absorbed":
        return 2 * (4 * D * D + 2 * H * N * D)
    return 2 * (2 * D * D + 2 * N * D * D + 2 * N * D)


def prefill_flops(L, m=LANGUAGE) -> int:
    """Matrix products of the decoder layers over L tokens; head and vision tower left out."""
    weights = m.hidden * m.head * (2 * m.heads + 2 * m.kv_heads) + 3 * m.hidden * m.mlp
    return m.layers * (2 * L * weights + 4 * L * L * m.heads * m.head)


def counted(function) -> int:
    # the CPU's fused attention kernel is unknown to the counter: take the plain one
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    return counter.get_total_flops()


def check_counts() -> None:
    """The formulas against torch's counter, on a small block and a small Qwen3 decoder."""
    block, inputs = make(1, 50, torch.float32, hidden=64, heads=4)
    for form, side in (("absorbed", absorbed), ("textbook", textbook)):
        found, formula = counted(lambda: side(block, *inputs)), block_flops(50, 64, 4, form)
        if found != formula:
            raise AssertionError(f"{form} block: {found} counted, {formula} by the formula")
    from transformers import Qwen3VLTextConfig, Qwen3VLTextModel
    small = SimpleNamespace(hidden=64, layers=2, heads=4, kv_heads=2, head=16, mlp=96)
    model = Qwen3VLTextModel(Qwen3VLTextConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, intermediate_size=96, vocab_size=32))
    ids = torch.zeros(1, 40, dtype=torch.long)
    found = counted(lambda: model(input_ids=ids, use_cache=False))
    if found != prefill_flops(40, small):
        raise AssertionError(f"decoder: {found} counted, {prefill_flops(40, small)} by the formula")


def extra(N, blocks=6, form="absorbed") -> float:
    """Share of the language model's prefill that the module adds, for the 2B's six blocks."""
    return blocks * block_flops(N, form=form) / prefill_flops(BEFORE + N + BEHIND)


# ---------------------------------------------------------------------------- command line

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    pairs.add_arguments(parser)
    parser.add_argument("--dtypes", nargs="*", default=("float32", "bfloat16"))
    args = parser.parse_args()
    how = pairs.prepare(args)
    count = args.pairs or (3 if args.quick else 7)
    check_counts()
    cases = [(1, 256), (1, 1782), (1, 4096), (8, 256), (8, 1782), (8, 4096)]
    if args.quick:
        cases = cases[:2]
    print(f"{how}; median of {count} pairs, ms\n")
    print("type      B     N |  forward: textbook absorbed  ratio "
          "| with backward:  A       B  ratio | error")
    rows, ratios = [], {}
    for kind in args.dtypes:
        for B, N in cases:
            prefill, train, error = compare(B, N, getattr(torch, kind), count, args.cpu_seconds)
            numbers = []
            for name, found in (("forward", prefill), ("with_backward", train)):
                ratio = found["textbook"] / found["absorbed"]
                ratios[f"{name}_{kind}_B{B}_N{N}"] = round(ratio, 2)
                numbers += [1e3 * found["textbook"], 1e3 * found["absorbed"], ratio]
            print("{:8s} {:2d} {:5d} | {:17.2f} {:8.2f} {:5.1f}x "
                  "| {:14.2f} {:7.2f} {:5.1f}x | {:.0e}"
                  .format(kind, B, N, *numbers, error), flush=True)
            rows.append(pairs.markdown(kind, B, f"{N:,}", *(f"{x:.1f}" for x in numbers)))
    shares = {form: {N: extra(N, form=form) for N in (256, 1782, 4096)}
              for form in ("absorbed", "textbook")}
    print("\nextra matrix products in a prefill of the 2B language model (formula, checked against"
          " torch's counter):")
    for form, share in shares.items():
        print(f"  {form}: " + ", ".join(f"{N:,} tokens {100 * s:.3f} %" for N, s in share.items()))
    print("\n" + "\n".join(rows))
    percent = {form: {str(N): round(100 * s, 4) for N, s in share.items()}
               for form, share in shares.items()}
    print(json.dumps({"benchmark": "module", **how, "pairs": count, "ratios": ratios,
                      "extra_flops_percent": percent}))


if __name__ == "__main__":
    main()
