"""benchmarks/counting.py - what several files need to count with, and to show what was counted.

The idea.  A share without its interval says too little, and every table of the project is Markdown
that also reads well in a terminal. A summary is what evaluate.summarise() counts, a row one graded
answer of evaluate.judge(). These functions stand below all other files.

The one equation (95 % interval of k right out of n, Wilson's, z = 1.96):
    (k + z^2/2 +- z sqrt(k (n - k) / n + z^2/4)) / (n + z^2)

Use it alone: standard library only.
"""
from __future__ import annotations

import math


def interval(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share.

    >>> tuple(round(x, 3) for x in interval(50, 100))
    (0.404, 0.596)
    """
    z = 1.96
    middle = right + z * z / 2
    half = z * math.sqrt(right * (n - right) / n + z * z / 4)
    return (middle - half) / (n + z * z), (middle + half) / (n + z * z)


def percent(share: float, bounds=None) -> str:
    """A share in percent, with the bounds of its interval.

    >>> percent(0.5, (0.404, 0.596))
    '50.0 [40.4, 59.6]'
    """
    ends = f" [{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]" if bounds else ""
    return f"{100 * share:.1f}{ends}"


def grid(table: list[list[str]]) -> str:
    """A Markdown table that also reads well as plain text."""
    table = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in table]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths)) + " |"
             for row in table]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


# ---------------------------------------------------------------------------- graded answers

def line(summary: dict) -> str:
    """One line for a log."""
    text = f"accuracy {percent(summary['accuracy'], summary['interval'])} %"
    if "grounded" in summary:
        text += f"  grounded {percent(summary['grounded'])} %"
    return (text + f"  unparsed {percent(summary['unparsed'])} %  length {summary['length']:.0f}"
            f"  n {summary['n']}")


def unparsed_warning(rows: list[dict]) -> str:
    """What to say when many answers cannot be read: one of them, and the likely cause."""
    lost = [row for row in rows if row["extracted"] is None]
    return (f"WARNING: no answer was found in {len(lost)} of {len(rows)} responses, which count as "
            f"wrong. The first ({lost[0]['id']}): {lost[0]['response'][-300:]!r}. Ask for a box "
            "(--instruction), or give more --max-new-tokens if it was cut off.")


def table(summaries: dict[str, dict]) -> str:
    """Models as rows, in Markdown."""
    columns = [("accuracy % [95 %]", lambda s: percent(s["accuracy"], s["interval"])),
               ("grounded % [95 %]", lambda s: percent(s["grounded"], s["grounded_interval"])
                if "grounded" in s else None),
               ("hint rows", lambda s: str(s["hint_rows"])),
               ("unparsed %", lambda s: percent(s["unparsed"])),
               ("cut off %", lambda s: percent(s["cut_off"])),
               ("length", lambda s: f"{s['length']:.1f}"),
               ("n", lambda s: str(s["n"]))]
    columns = [(name, show) for name, show in columns if all(show(s) for s in summaries.values())]
    rows = [[name, *(show(s) for _, show in columns)] for name, s in summaries.items()]
    return grid([["", *(name for name, _ in columns)], *rows])


def before_after(before: list[dict], after: list[dict]) -> str:
    """The first question that the base got wrong, and both answers, whatever the second is."""
    for old, new in zip(before, after):
        if not old["correct"]:
            return (f"the first test question that the base got wrong ({old['id']}):\n"
                    f"  question  {old['question']}   (answer: {old['gold']})\n"
                    f"  before    {old['response']}\n  after     {new['response']}")
    return "the base got every test question right"
