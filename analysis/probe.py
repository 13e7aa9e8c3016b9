"""analysis/probe.py - what does the sink know? A linear probe from its state to the cue's facts.

The idea.  The module is there so that the sink token's state holds what the cue says. This can be
tested without sampling: read the prompts (no hint), take the sink's state at every layer, and see
how well a linear map predicts which facts the record's cue states. A fact is a word,
or two words side by side ("red circle", "row 2"), found in some cues and not in others.

In:  a checkpoint, training and test records with cues.
Out: a table, one row per layer: balanced accuracy on the test records, averaged over the facts
     (50 % is chance, however frequent a fact is); and who reads it: the share of their attention
     that the tokens of the model's own answers give to the sink.

The one equation (ridge regression in closed form, for each fact; y in {-1, +1}, X standardised):
    w = (X^T B X + lambda n I)^-1 X^T B y,    the guess: sign of X w.    B: classes weigh the same

Run
    python analysis/probe.py --model runs/NAME/checkpoint       the sink that the run trained with
    python analysis/probe.py --model data/tiny-qwen3-vl --sink last       a model without the module

What to expect.  Without the module the first token sees nothing but itself: its state is the same
for every prompt, and the probe is at 50 %. The last token of the prompt has read everything anyway;
there the question is what the module adds.
Left out: probes that are not linear. They could find what the model itself cannot read.
"""
from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import records as record_files, toy  # noqa: E402
from distill import response_states  # noqa: E402
from model import find_folder, load  # noqa: E402
from rollout import sample  # noqa: E402
from scale.asked import run_settings  # noqa: E402
from scale.checks import is_tiny, quiet  # noqa: E402

# Dimension letters: N records, D hidden, F facts.


@torch.no_grad()
def sink_states(model, processor, records: list[dict], sink: str, batch_size: int = 64) -> list:
    """The sink's state (N, D) in float32, as read by each decoder layer, and last by the head.

    With the module attached, what a layer reads includes the module's update.
    """
    layers = [*model.model.language_model.layers, model.model.language_model.norm]
    states = [[] for _ in layers]
    column = None

    def keep(place):
        return lambda module, args: states[place].append(
            args[0][torch.arange(len(column)), column].float().cpu())

    hooks = [layer.register_forward_pre_hook(keep(place)) for place, layer in enumerate(layers)]
    try:
        for start in tqdm(range(0, len(records), batch_size), "reading prompts", leave=False):
            prompts = [processor.prompt(r) for r in records[start:start + batch_size]]
            batch = processor.batch(prompts, device=model.device)
            mask = batch["attention_mask"].long()            # left-padded: the last column is real
            column = mask.argmax(dim=1) if sink == "first" else torch.full_like(
                mask[:, 0], mask.shape[1] - 1)
            model.model(**batch, use_cache=True)             # a prefill, so that the module is on
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(parts) for parts in states]


@torch.no_grad()
def attention_on(model, processor, records: list[dict], sink: str, limit: int = 96) -> list:
    """Per layer: the share of attention that the tokens of a greedy answer give to the sink, mean
    over heads, tokens and records; last, the share under uniform attention."""
    kind, shares = model.config._attn_implementation, []
    for record in records:
        prompt = processor.prompt(record)
        out = sample(model, processor.batch([prompt], device=model.device), temperature=0,
                     max_new_tokens=limit, **processor.sampling)
        start = len(prompt.ids)
        column = 0 if sink == "first" else start - 1

        def look(model, batch):
            seen = model.model(**batch, use_cache=False, output_attentions=True)
            maps = torch.cat(seen.attentions)[:, :, start - 1:-1].float()   # (layers, heads, T, W)
            even = (1 / torch.arange(start, batch["input_ids"].shape[1])).mean()
            shares.append(torch.cat([maps[..., column].mean((1, 2)).cpu(), even[None]]))
            return seen.last_hidden_state
        model.set_attn_implementation("eager")           # the others keep no map
        try:
            response_states(processor, [out.ids[0].tolist()], look, [prompt], model, [0])
        finally:
            model.set_attn_implementation(kind)
    return torch.stack(shares).mean(0).tolist()


def facts_of(cue: str) -> set[str]:
    """The cue's words, and all pairs of neighbouring words.

    >>> sorted(facts_of("A red circle."))
    ['a', 'a red', 'circle', 'red', 'red circle']
    """
    words = re.findall(r"\w+", cue.lower())
    return set(words) | {f"{a} {b}" for a, b in zip(words, words[1:])}


def choose_facts(records: list[dict], rare: float = 0.05) -> list[str]:
    """Facts that 5 to 95 % of the cues state; of those that always go together, the shortest."""
    cues = [facts_of(record["cue"]) for record in records]
    counts = Counter(fact for cue in cues for fact in cue)
    chosen = {}
    for fact in sorted(counts, key=lambda fact: (len(fact), fact)):
        if rare <= counts[fact] / len(cues) <= 1 - rare:
            chosen.setdefault(tuple(fact in cue for cue in cues), fact)
    return sorted(chosen.values())


def stated(records: list[dict], facts: list[str]) -> torch.Tensor:
    """(N, F) float32, +1 where the record's cue states the fact, else -1."""
    return torch.tensor([[1.0 if f in found else -1.0 for f in facts]
                         for found in (facts_of(r["cue"]) for r in records)])


def probe(train_x, train_y, test_x, test_y, strength: float = 1e-2) -> torch.Tensor:
    """(F,) balanced accuracy: mean of the accuracy where the fact is stated and where it is not."""
    mean, spread = train_x.double().mean(0), train_x.double().std(0)
    # a constant dimension says nothing; do not scale its rounding noise up into a feature
    scale = torch.where(spread > 1e-6 * mean.abs().clamp(min=1), 1 / spread, 0)
    x, test = ((part.double() - mean) * scale for part in (train_x, test_x))
    y, n = train_y.double(), len(x)
    # both classes weigh the same, as in the score: a row weighs one over the size of its class
    out = []
    for column, gold in zip(y.T, test_y.T):
        weight = torch.where(column > 0, 0.5 / (column > 0).sum(), 0.5 / (column < 0).sum()) * n
        a, b = torch.cat([x, torch.ones(n, 1)], 1), weight[:, None]
        gram = a.T @ (a * b) + strength * n * torch.eye(a.shape[1])
        w = torch.linalg.solve(gram, a.T @ (column * weight))
        guess = torch.cat([test, torch.ones(len(test), 1)], 1) @ w > 0
        out.append((guess[gold > 0].double().mean() + (~guess[gold < 0]).double().mean()) / 2)
    return torch.stack(out).float()


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder or hub name")
    parser.add_argument("--data", default="",
                        help="training records with cues; test.jsonl beside them is what is "
                        "scored (default: the records of the model's run, else the toy world's)")
    parser.add_argument("--limit", type=int, default=0, help="first so many of each, 0 for all")
    parser.add_argument("--sink", default="", choices=["", "first", "last"],
                        help="whose state is read (default: the module's sink, else first)")
    parser.add_argument("--device", default="")
    args = parser.parse_args(argv)
    quiet()
    try:
        find_folder(args.model, weights=False)          # before a world is drawn for it
        own = run_settings(Path(args.model))            # of the run, if it is a run's checkpoint
        path = Path(args.data or own.get("data")
                    or toy.default(large=not is_tiny(args.model)) / "train.jsonl")
        scored = not args.data and own["eval_data"] or path.with_name("test.jsonl")
        train, test = ([{"instruction": own["instruction"], **record} for record in
                        record_files.load(p, ("cue",))[:args.limit or None]]
                       for p in (path, scored))
        model, processor = load(args.model, None, args.device or None,
                                **{side: own[side] or None
                                   for side in ("min_pixels", "max_pixels")})
    except (ValueError, OSError) as error:
        raise SystemExit(f"probe.py: {error}")
    cue = getattr(model, "cue_recovery", None)
    sink = args.sink or (cue.sink if cue else "first")
    facts = choose_facts(train)
    # a fact that no test cue states, or every one, has no balanced accuracy
    facts = [f for f in facts if 0 < sum(f in facts_of(r["cue"]) for r in test) < len(test)]
    if not facts:
        raise SystemExit("probe.py: no word stands in 5 to 95 % of the cues: too few records?")
    blocks = [int(name) + 1 for name in cue.blocks] if cue else []
    train_y, test_y = stated(train, facts), stated(test, facts)
    print(f"{args.model}, the {sink} token: {len(facts)} facts, {len(train)} records to fit, "
          f"{len(test)} to score\n"
          "| state read by | balanced accuracy % | best fact | worst fact | attention on it % |\n"
          "|---|---|---|---|---|")
    *shares, even = attention_on(model, processor, test[:64], sink)
    states = (sink_states(model, processor, records, sink) for records in (train, test))
    for place, (x, test_x) in enumerate(zip(*states)):
        score = 100 * probe(x, train_y, test_x, test_y)
        best, worst = int(score.argmax()), int(score.argmin())
        name = f"layer {place}" if place < len(model.model.language_model.layers) else "the head"
        print(f"| {name}{' (behind a block)' if place in blocks else ''} | {score.mean():.1f} | "
              f"{facts[best]} {score[best]:.0f} | {facts[worst]} {score[worst]:.0f} | "
              f"{f'{100 * shares[place]:.1f}' if place < len(shares) else '-'} |", flush=True)
    print(f"A token that looks at all before it alike gives {100 * even:.1f} % to each.")


if __name__ == "__main__":
    main()
