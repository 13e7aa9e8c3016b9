"""benchmarks/scores.py - from graded answers to the numbers that the seven benchmarks publish.

The idea.  A score is a denominator and a rule, and most disagreements between two tables are about
the denominator. Here it is the whole benchmark: a question that was not answered, was cut off, or
was answered unreadably counts as wrong. Nothing is dropped and nothing is guessed.

In:  rows {"id", "group", "correct", "meta"}, one a question: what load() of benchmarks.py gave, and
     what grade() of grade.py said. items: the whole benchmark; those without a row count as wrong.
Out: aggregate(name, rows, items) -> dict: n, unanswered, accuracy, the benchmark's own numbers, and
     headline: the key of the number in the paper's column. points / of is that number as a fraction
     (points may be a half), for an interval.

The one equation (We-Math, of its 525 groups N; strict and loose differ in what CM and RM are):
    score = (N - 0.5 IG - RM - IK) / N = (CM + 0.5 IG) / N

Use it alone: standard library only.
    out = aggregate("wemath", rows); print(out[out["headline"]])

What the paper's columns hold was found by arithmetic on its table (all are k/n), not read in it:
DynaMath's average, We-Math's score (strict is only more likely), MathVerse pooled, MMMU by rows.
What differs from the official code: RM's rate is None, not a crash, when no composite is right; an
incomplete We-Math group is reported and no score given; Video-MME counts what was not answered.
Left out: intervals. Variants and versions of a problem are not independent, so a binomial interval
over all rows is too narrow for DynaMath and MathVerse: resample whole groups.
"""
from __future__ import annotations

from collections import Counter, defaultdict

VARIANTS = 10           # of a DynaMath seed
# Table 1 of arXiv 2606.05718: name -> (column, base Qwen3-VL-2B-Instruct, base 8B), in percent.
PAPER_COLUMNS = {"vision-r1": ("VisionR1", 23.90, 41.22), "dynamath": ("DynaMath", 53.23, 67.13),
                 "mathvista": ("MathVista", 61.0, 75.8), "wemath": ("WeMath", 31.43, 55.33),
                 "mathverse": ("MathVerse", 39.09, 53.40), "mmmu": ("MMMU", 51.11, 66.56),
                 "video-mme": ("VideoMME", 58.2, 65.9)}
# Name -> meta keys by which accuracy is also given, {value: {"n", "accuracy"}} under "by_KEY".
SPLITS = {"vision-r1": (), "dynamath": ("subject", "level"), "mathvista": ("type", "task"),
          "wemath": (), "mathverse": ("version", "subject", "type"), "mmmu": ("subject",),
          "video-mme": ("duration", "domain", "task_type")}


def aggregate(name: str, rows: list[dict], items: list[dict] | None = None) -> dict:
    """The numbers of one benchmark (see the header). Shares are between 0 and 1.

    Without `items` the denominator is the rows given, so pass them unless every question has a row.
    Raises ValueError for an unknown name, no rows, an id twice, or a row of another benchmark.
    """
    if name not in SPLITS:
        raise ValueError(f"no benchmark {name!r}; there are {', '.join(SPLITS)}")
    answered = len(rows)
    rows = complete(rows, items)
    if not rows:
        raise ValueError(f"{name}: no rows, so no score")
    right = sum(bool(row["correct"]) for row in rows)
    out = {"n": len(rows), "unanswered": len(rows) - answered, "accuracy": right / len(rows),
           "headline": "accuracy", "points": right, "of": len(rows)}
    out |= {f"by_{key}": by(rows, key) for key in SPLITS[name]}
    if name == "dynamath":
        out |= dynamath(rows)
    elif name == "wemath":
        out |= wemath(rows)
    return out


def complete(rows: list[dict], items: list[dict] | None = None) -> list[dict]:
    """`rows` and a wrong one for every item that has none."""
    twice = [key for key, n in Counter(row["id"] for row in rows).items() if n > 1]
    if twice:
        raise ValueError(f"{len(twice)} questions have more than one row: {', '.join(twice[:3])}")
    if items is None:
        return rows
    left = {item["id"]: item for item in items}
    strange = [row["id"] for row in rows if not left.pop(row["id"], None)]
    if strange:
        raise ValueError(f"{len(strange)} of {len(rows)} rows are none of the {len(items)} "
                         f"questions: {', '.join(strange[:3])}; are they of another benchmark?")
    return rows + [{"id": item["id"], "group": item["group"], "correct": False,
                    "meta": item["meta"]} for item in left.values()]


def by(rows: list[dict], key: str) -> dict:
    """{value of meta[key]: {"n", "accuracy"}}, in order of the values."""
    parts = defaultdict(list)
    for row in rows:
        parts[row["meta"].get(key) or "unknown"].append(bool(row["correct"]))
    return {value: {"n": len(part), "accuracy": sum(part) / len(part)}
            for value, part in sorted(parts.items())}


def dynamath(rows: list[dict]) -> dict:
    """The worst case: seeds with all ten variants right. A variant that is missing is not right.

    robustness = worst case / average, None if nothing is right (DynaMath, section "metrics").
    """
    seeds = defaultdict(list)
    for row in rows:
        seeds[row["group"]].append(bool(row["correct"]))
    solid = sum(len(part) >= VARIANTS and all(part) for part in seeds.values())
    right = sum(map(sum, seeds.values()))
    return {"worst_case": solid / len(seeds), "seeds": len(seeds),
            "incomplete_groups": sum(len(part) < VARIANTS for part in seeds.values()),
            "robustness": solid / len(seeds) / (right / len(rows)) if right else None}


def wemath(rows: list[dict]) -> dict:
    """Did the model get the composite by getting its steps? Four verdicts a group:

                             steps all right    some right      none right
      composite wrong        IG                 IK              IK
      composite right        CM                 RM | CM loose   RM
    IG: knows the steps, does not combine them (inadequate generalisation). IK: insufficient
    knowledge. CM: complete mastery. RM: rote memorisation.

    With a group incomplete all scores are None: which of the four it is cannot be known.
    """
    groups = defaultdict(dict)
    for row in rows:
        groups[row["group"]][row["meta"]["key"]] = bool(row["correct"])
    steps = [right for part in groups.values() for key, right in part.items()
             if not key.endswith("multi")]
    out = {"headline": "score_strict", "groups": len(groups), "of": len(groups), "S1": _mean(steps),
           "incomplete_groups": sum(not _whole(part) for part in groups.values())}
    for n in "23":
        multi = f"{n}steps_multi"
        out[f"S{n}"] = _mean([part[multi] for part in groups.values() if multi in part])
    for setting, enough in (("strict", all), ("loose", any)):
        if out["incomplete_groups"]:
            out |= {"points": None, f"score_{setting}": None, setting: None}
            continue
        n = Counter(_verdict(part, enough) for part in groups.values())
        points, right = n["CM"] + 0.5 * n["IG"], n["CM"] + n["RM"]
        out[setting] = {key: n[key] for key in ("IK", "IG", "CM", "RM")}
        out[setting] |= {f"{key}_rate": n[key] / len(groups) for key in ("IK", "IG", "CM")}
        out[setting]["RM_rate"] = n["RM"] / right if right else None    # of the right composites
        out[f"score_{setting}"] = points / len(groups)
        if setting == "strict":
            out["points"] = points
    return out


def _verdict(part: dict, enough) -> str:
    """One group's verdict; `enough` of the steps must be right for mastery: all, or any (loose)."""
    steps = [right for key, right in part.items() if not key.endswith("multi")]
    if any(right for key, right in part.items() if key.endswith("multi")):
        return "CM" if enough(steps) else "RM"
    return "IG" if all(steps) else "IK"


def _whole(part: dict) -> bool:
    """Has the group all its keys: 2steps_1, 2steps_2, 2steps_multi, or the four of 3steps?"""
    kind = next(iter(part)).partition("_")[0]
    return set(part) == {f"{kind}_{k}" for k in (*range(1, int(kind[0]) + 1), "multi")}


def _mean(values):
    return sum(values) / len(values) if values else None
