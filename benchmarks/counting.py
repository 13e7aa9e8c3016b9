"""benchmarks/counting.py - what several files need to count with: an interval, a percent, a table.

The idea.  A share without its interval says too little, and every table of the project is Markdown
that also reads well in a terminal. These three functions stand below all other files.

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
