"""scale/measure.py - how a step is cut into micro-batches, and what it reports: one line of log.

The idea.  A step is cut into micro-batches, and perhaps over processes. What it reports must not
depend on the cut: so sums are kept, and divided once, over all of the step's tokens.

In:  the prompts and responses of a step; divergences and gaps of each micro-batch.
Out: groups of rows; one line of metrics.jsonl. docs/looking_at_a_run.md says what the numbers mean.

The one equation (figure 3 of the paper; one half of every response each):
    gap = mean over tokens of  log p_T(y_n | X, S, y_<n) - log p_theta(y_n | X, y_<n)

Use it alone: imports torch only.
"""
from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass, field

import torch


def micro_batches(prompts, hinted, responses, budget: int) -> list[list[int]]:
    """Rows grouped by length; a group padded to its longest row stays within `budget` tokens.

    A row longer than the budget gets a group of its own, and a row much shorter than its group
    starts the next one: a small forward pass costs less than a large one of padding.
    """
    sizes = [max(len(a.ids), len(b.ids)) + len(c) for a, b, c in zip(prompts, hinted, responses)]
    groups = []
    for row in sorted(range(len(sizes)), key=lambda row: -sizes[row]):
        # longest first: the first row of a group sets its width
        width = sizes[groups[-1][0]] if groups else 0
        if width and (len(groups[-1]) + 1) * width <= budget and sizes[row] >= 0.8 * width:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


@dataclass
class Sums:
    """Sums over micro-batches, so that a step reports all of its tokens and not the last ones."""
    loss: float = 0.0
    entropy: float = 0.0
    front: float = 0.0                  # of the gap, over the first half of every response
    back: float = 0.0
    front_tokens: int = 0
    back_tokens: int = 0
    gradient_norm: float = 0.0
    seconds: dict = field(default_factory=dict)                 # name of a part -> its time
    start: float = field(default_factory=time.perf_counter)     # of the part that is running
    extra: dict = field(default_factory=dict)       # another method's: name -> this process's share

    def lap(self, name: str) -> None:
        """Note the seconds since the last lap."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[name], self.start = now - self.start, now

    def add(self, nats, weights, lengths, stats) -> None:
        """nats, weights, and entropy and gap in stats: (N,). lengths (B,): tokens of each row.

        No gap if there is no teacher.
        """
        self.loss += float((nats * weights).sum())
        self.entropy += float((stats["entropy"] * weights).sum())
        if "gap" not in stats:
            return
        place = torch.cat([torch.arange(n, device=nats.device) < n / 2 for n in lengths.tolist()])
        self.front += float(stats["gap"][place].sum())
        self.back += float(stats["gap"][~place].sum())
        self.front_tokens += int(place.sum())
        self.back_tokens += int((~place).sum())


def metrics_of(step: int, parts: list[Sums], answers: list[dict]) -> dict:
    """One line of metrics.jsonl. parts: the sums of every process; answers: of all, see decoded."""
    loss, entropy, front, back, n_front, n_back = (sum(getattr(part, name) for part in parts) for
        name in ("loss", "entropy", "front", "back", "front_tokens", "back_tokens"))
    hints = [count_hints(answer["response"]) for answer in answers]
    lengths = torch.tensor([answer["length"] for answer in answers])
    stopped = torch.tensor([answer["stopped"] for answer in answers])
    tokens, norm, seconds = int(lengths.sum()), parts[0].gradient_norm, parts[0].seconds
    return {"step": step, "loss": loss, "entropy": entropy,
            "gap_front": front / n_front if n_front else None,
            "gap_back": back / n_back if n_back else None, "length": float(lengths.float().mean()),
            "tokens": tokens, "cut_off": float((~stopped).float().mean()),
            "hint_rows": sum(n > 0 for n in hints), "hint_count": sum(hints),
            "gradient_norm": norm if math.isfinite(norm) else None,            # JSON has no NaN
            "skipped": int(not math.isfinite(norm)),
            **{name: sum(part.extra[name] for part in parts) for name in parts[0].extra},
            **{f"{name}_seconds": round(s, 3) for name, s in seconds.items()},
            **{f"{name}_tokens_per_second": round(tokens / s) for name, s in seconds.items()}}


def decoded(rollout, decode, K: int) -> list[list[dict]]:
    """K responses to each prompt: as text, with its tokens, and whether it ended by itself."""
    rows = [{"response": decode(ids[:n]), "length": n, "stopped": stopped} for ids, n, stopped in
            zip(rollout.ids.tolist(), rollout.lengths.tolist(), rollout.stopped.tolist())]
    return [rows[start:start + K] for start in range(0, len(rows), K)]


def count_hints(response: str) -> int:
    """How often the word "hint" stands there: whole word, any case (table 8)."""
    return len(re.findall(r"\bhint\b", response, re.IGNORECASE))
