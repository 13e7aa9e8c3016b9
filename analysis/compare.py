"""analysis/compare.py - many runs as one table: which is better, by how much, how surely.

The idea.  One run is one draw. Runs that differ in nothing but their seed are one *arm* of the
comparison, such as "with the recovery module". Two arms really differ only if they differ by more
than two seeds of one arm do. So an arm is one row, and its interval is over seeds.

In:  folders of runs (args.json, before.json, metrics.jsonl, result.json).
Out: a table in Markdown, printed, and with --out NAME also in NAME.md and, for programs, NAME.csv.

The one equation (m seeds, mean x, standard deviation s, t of m - 1 degrees of freedom):
    x +- t_{0.975, m - 1} s / sqrt(m)

Run  python analysis/compare.py runs/a0 runs/a1 runs/b0 runs/b1 --out grid
     python analysis/compare.py runs/grid/* --keep docs/results      small copies: a table to check

How to read it
1) A student's interval is over seeds (Student's t) and one seed has none. The base and the teacher
   are one model each, decoded greedily: their interval is over questions (Wilson), marked q. The
   two kinds of interval measure different things; do not compare their widths.
2) "gain over base" is student - base, seed by seed. "gain by the module" is this arm minus the
   same arm without the module, over the seeds that both have. Seeds are paired, because both arms
   share the data order and the first rollouts.
3) Hint counts are sums over all seeds of the row: while training, and among the test answers.
4) A run without result.json is listed as unfinished. Nothing is dropped silently.

Left out: multiple-comparison corrections, and intervals over seeds and questions at once.
"""
from __future__ import annotations

import argparse
import csv
import io
import json
import math
import re
import sys
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.counting import grid  # noqa: E402
from distill import Config  # noqa: E402
from scale.checkpoint import read_run, write_json, write_jsonl  # noqa: E402
from scale.checks import one_line  # noqa: E402

# Settings that do not make another arm: the seed, names, the machine, how work is cut up.
NOT_ARM = ("seed", "name", "device", "attention", "sample_batch", "micro_batch_tokens",
           "gradient_checkpointing", "graph_decoding", "dev_data", "eval_every", "save_every",
           "keep", "threads")
MODULE = ("cue_recovery", "every", "cue_lr", "sink")     # an arm without the module has none
SHOWN = ("privilege", "teacher", "module", "train")      # have columns of their own
# Settings that the base model's own number depends on; for the teacher's, two more.
BASE = ("student", "eval_data", "eval_limit", "max_new_tokens", "min_pixels", "max_pixels", "dtype")
TEACHER = (*BASE, "teacher", "privilege")
# Of each step, what keep() keeps.
KEPT = ("step", "loss", "length", "tokens", "hint_rows", "hint_count", "cut_off", "accuracy",
        "grounded", "reward", "informative")
COLUMNS = ("kind", *SHOWN, "other", "seeds", "interval_over", "accuracy", "accuracy_low",
           "accuracy_high", "gain", "gain_low", "gain_high", "module_gain", "module_gain_low",
           "module_gain_high", "module_gain_seeds", "grounded", "grounded_low", "grounded_high",
           "train_hint_rows", "train_hint_count", "train_rollouts", "test_hint_rows",
           "test_hint_count", "test_answers", "length", "cut_off", "parameters_added", "steps_done",
           "runs")


# ---------------------------------------------------------------------------- intervals

def inside_t(t: float, df: int) -> float:
    """P(|T| <= t) for Student's t with `df` degrees of freedom: a finite sum over an angle.

    >>> round(inside_t(12.7062, 1), 5), round(inside_t(2.7764, 4), 5)
    (0.95, 0.95)
    """
    angle = math.atan(t / math.sqrt(df))
    sin, cos, odd = math.sin(angle), math.cos(angle), df % 2
    total, term = 0.0, cos if odd else 1.0
    for k in range(odd, df - 1, 2):
        total, term = total + term, term * cos * cos * (k + 1) / (k + 2)
    return 2 / math.pi * (angle + sin * total) if odd else sin * total


def t_quantile(df: int, share: float = 0.95) -> float:
    """The t with P(|T| <= t) = share, by bisection."""
    low, high = 0.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside_t(middle, df) < share else (low, middle)
    return high


def over_seeds(values) -> tuple:
    """(mean, low, high). No values: all None. One value: no interval."""
    values = list(values)
    if not values:
        return None, None, None
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, None, None
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    half = t_quantile(len(values) - 1) * deviation / math.sqrt(len(values))
    return mean, mean - half, mean + half


# ---------------------------------------------------------------------------- runs

@dataclass
class Run:
    """One run's folder. result is {} until the run ends, before is {} until it begins."""
    folder: Path
    args: dict
    before: dict
    result: dict
    metrics: list[dict]

    @property
    def module(self) -> str:
        """"off", or the module's sink token: "first" or "last"."""
        return self.args.get("sink", "first") if self.args.get("cue_recovery") else "off"

    def setting(self, name: str):
        """A setting as it is compared; paths of the project's own files lose their checkout."""
        if name in MODULE[1:] and self.module == "off":
            return None                      # settings of a module that is not there
        value = self.module if name == "module" else self.args.get(name)
        return relative(value)


def relative(value):
    """A path below data/ without the checkout before it; anything else as it is."""
    return re.sub(r"^.*/(?=data/(tiny-[\w-]+$|toy[\w-]*/))", "", value) if isinstance(
        value, str) else value


def keep(run: Run, folder: Path) -> None:
    """A copy of a few kB in folder/NAME that compare() reads like the run: no answers, no paths,
    four digits of what a step measured."""
    folder = folder / run.folder.name
    before = {name: value for name, value in run.before.items() if name != "rows"}
    for name, part in (("args", run.args), ("before", before), ("result", run.result)):
        write_json(folder / f"{name}.json", {key: relative(value) for key, value in part.items()})
    write_jsonl(folder / "metrics.jsonl",
                [{name: float(f"{value:.4g}") if isinstance(value, float) else value
                  for name, value in step.items() if name in KEPT} for step in run.metrics])


def load_run(folder, defaults: dict | None = None) -> Run:
    """Raises OSError or ValueError naming the file. defaults: settings that an older run lacks."""
    run = Run(Path(folder), **read_run(folder))
    run.args = {**(defaults or {}), **run.args}
    if run.result and "student_accuracy" not in run.result:
        raise ValueError(f"{run.folder / 'result.json'}: no student_accuracy: "
                         "is it a run's result?")
    return run


def group(runs: list[Run], names) -> dict[tuple, list[Run]]:
    """Runs by the settings `names`, in the order in which they first appear."""
    groups = defaultdict(list)
    for run in runs:
        # as JSON: hashable, and 1 stays apart from true
        groups[tuple(json.dumps(run.setting(name)) for name in names)].append(run)
    return dict(groups)


def varying(runs: list[Run], names) -> list[str]:
    """The settings in `names` that differ between runs."""
    return [n for n in names if len({json.dumps(run.setting(n)) for run in runs}) > 1]


# ---------------------------------------------------------------------------- the table

def compare(runs: list[Run]) -> tuple[list[dict], list[str]]:
    """Rows with the COLUMNS as keys (base, teacher, student, unfinished), and notes for people."""
    if not runs:
        raise ValueError("no run to compare")
    settings = sorted(set().union(*(run.args for run in runs)) - set(NOT_ARM))
    other = [n for n in varying(runs, settings) if n not in (*SHOWN, "cue_recovery", "sink")]
    notes, rows = [], []
    rows += reference_rows(runs, "base", BASE, other, notes)
    rows += reference_rows(runs, "teacher", TEACHER, other, notes)
    finished = [run for run in runs if run.result]
    arms = {key: one_a_seed(members, notes) for key, members in group(finished, settings).items()}
    without = {tuple(v for n, v in zip(settings, key) if n not in MODULE): members
               for key, members in arms.items() if members[0].module == "off"}
    for key, members in arms.items():
        rest = tuple(v for n, v in zip(settings, key) if n not in MODULE)
        plain = without.get(rest) if members[0].module != "off" else None
        rows.append(label(members[0], "student", other) | student_row(members, plain))
    for run in runs:
        if not run.result:
            rows.append(label(run, "unfinished", other) | {
                "seeds": run.args.get("seed"), "runs": str(run.folder),
                "steps_done": f"{len(run.metrics)} of {run.args.get('steps', '?')}"})
    return [{name: row.get(name) for name in COLUMNS} for row in rows], notes


def label(run: Run, kind: str, other) -> dict:
    """The cells that name a row."""
    return {"kind": kind, **{name: run.setting(name) for name in SHOWN},
            "other": ", ".join(f"{name}={run.setting(name)}" for name in other
                               if run.setting(name) is not None)}


def one_a_seed(members: list[Run], notes: list[str]) -> list[Run]:
    """The first run of each seed: the same seed twice would narrow the interval for nothing."""
    kept = {}
    for run in members:
        first = kept.setdefault(run.args.get("seed"), run)
        if first is not run:
            notes.append(f"{run.folder} has the settings and the seed of {first.folder}: left out")
    return list(kept.values())


def reference_rows(runs, kind, names, other, notes) -> list[dict]:
    """One row per base or teacher: a single model each, with Wilson's interval."""
    rows = []
    for members in group(runs, names).values():
        found = [(run, s) for run in members if (s := reference(run, kind))]
        if not found:
            continue
        run, s = found[0]
        seen = sorted({round(summary["accuracy"], 6) for _, summary in found})
        if len(seen) > 1:
            notes.append(f"the {kind} of {run.folder} has {100 * seen[0]:.1f} to "
                         f"{100 * seen[-1]:.1f} % in {len(found)} runs of the same settings; the "
                         "first is shown")
        blank = SHOWN if kind == "base" else ("module", "train")
        rows.append(label(run, kind, [n for n in other if n in names])
                    | dict.fromkeys(blank, None) | {
            "interval_over": "questions", "accuracy": s["accuracy"],
            **dict(zip(("accuracy_low", "accuracy_high"), s.get("interval") or ())),
            "grounded": s.get("grounded"),
            **dict(zip(("grounded_low", "grounded_high"), s.get("grounded_interval") or ())),
            "test_hint_rows": s.get("hint_rows"), "test_hint_count": s.get("hint_count"),
            "test_answers": s.get("n"), "length": s.get("length"), "cut_off": s.get("cut_off"),
            "runs": " ".join(str(member.folder) for member, _ in found)})
    return rows


def reference(run: Run, kind: str) -> dict | None:
    """The summary of the base or the teacher: from before.json, else from result.json."""
    if "accuracy" in run.before.get(kind, {}):         # a teacher may only have scored
        return run.before[kind]
    found = {key[len(kind) + 1:]: value for key, value in run.result.items()
             if key.startswith(kind + "_")}
    return {**found, "n": run.result.get("n")} if "accuracy" in found else None


def student_row(members: list[Run], plain: list[Run] | None) -> dict:
    """The figures of one arm. plain: the same arm without the module."""
    def each(name):
        return [run.result[name] for run in members if run.result.get(name) is not None]

    def total(values):
        values = list(values)
        return None if not values or None in values else sum(values)

    accuracy = {run.args.get("seed"): run.result["student_accuracy"] for run in members}
    gain = [run.result["student_accuracy"] - run.result["base_accuracy"] for run in members
            if run.result.get("base_accuracy") is not None]
    by_module = [accuracy[run.args.get("seed")] - run.result["student_accuracy"]
                 for run in plain or () if run.args.get("seed") in accuracy]
    row = {"seeds": len(members), "interval_over": "seeds" if len(members) > 1 else None}
    for name, values in (("accuracy", accuracy.values()), ("gain", gain),
                         ("module_gain", by_module), ("grounded", each("student_grounded"))):
        row |= dict(zip((name, f"{name}_low", f"{name}_high"), over_seeds(values)))
    steps = [m for run in members for m in run.metrics]
    return row | {
        "module_gain_seeds": len(by_module) if plain is not None else None,
        "train_hint_rows": total(m.get("hint_rows") for m in steps),
        "train_hint_count": total(m.get("hint_count") for m in steps),
        "train_rollouts": total(len(run.metrics) * run.args.get("batch_size", 0)
                                * run.args.get("samples_per_prompt", 1) for run in members),
        "test_hint_rows": total(run.result.get("student_hint_rows") for run in members),
        "test_hint_count": total(run.result.get("student_hint_count") for run in members),
        "test_answers": total(run.result.get("n") for run in members),
        "length": over_seeds(each("student_length"))[0],
        "cut_off": over_seeds(each("student_cut_off"))[0],
        "parameters_added": next(iter(each("parameters_added")), None),
        "runs": " ".join(str(run.folder) for run in members)}


# ---------------------------------------------------------------------------- for people

def share(row: dict, name: str, sign: str = "") -> str:
    """A share in percent with its interval, or a note if there is none."""
    value, low, high = (row[key] for key in (name, f"{name}_low", f"{name}_high"))
    if value is None:
        return "-"
    text = f"{100 * value:{sign}.1f}"
    if low is None:
        return text + (" (1 seed)" if row["kind"] == "student" else "")
    return text + f" [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]" + (
        " q" if row["interval_over"] == "questions" else "")


def hints(row: dict, where: str, of: str) -> str:
    """Answers with the word / occurrences, of all answers, as in the paper's table 8."""
    rows, count, n = row[f"{where}_hint_rows"], row[f"{where}_hint_count"], row[of]
    count = 0 if rows == 0 else "?" if count is None else count
    return "-" if rows is None else f"{rows} / {count} of {n}"


def module_gain(row: dict) -> str:
    if row["module_gain_seeds"] == 0:
        return "no common seed"
    return share(row, "module_gain", "+")


def plain(value, form: str = "", scale: float = 1) -> str:
    return "-" if value is None else f"{value * scale:{form}}" if form else str(value)


def other_settings(row: dict) -> list[str]:
    """["lr=0.1", ...] of a row; a value may hold a comma."""
    return re.split(r", (?=\w+=)", row["other"]) if row["other"] else []


def shared(arms: list[list[str]]) -> set[str]:
    """The settings that most arms share, to be said once. One that some arms lack stays in its
    row, or it would be read into theirs; but the module's are lacking only where it is off.

    >>> shared([["lr=1"], ["lr=1"], ["lr=2"]]), shared([["method=grpo"], ["method=grpo"], []])
    ({'lr=1'}, set())
    """
    said = Counter(part for arm in arms for part in arm)
    of = Counter(part.partition("=")[0] for part in said.elements())
    return {part for part, count in said.items() if 2 * count > of[name := part.partition("=")[0]]
            and (of[name] == len(arms) or name in MODULE)}


def markdown(rows: list[dict], notes: list[str]) -> str:
    """The table for people: one line per arm, how to read it, then the unfinished runs."""
    done = [row for row in rows if row["kind"] != "unfinished"]
    students = [row for row in done if row["kind"] == "student"]
    usual = shared([other_settings(row) for row in students])
    columns = {
        "": lambda r: r["kind"], **{name: lambda r, n=name: plain(r[n]) for name in SHOWN},
        "other settings": lambda r: ", ".join(
            part for part in other_settings(r) if part not in usual) or "-",
        "seeds": lambda r: plain(r["seeds"]),
        "accuracy % [95 %]": lambda r: share(r, "accuracy"),
        "gain over base": lambda r: share(r, "gain", "+"),
        "gain by the module": module_gain,
        "grounded % [95 %]": lambda r: share(r, "grounded"),
        "hint while training": lambda r: hints(r, "train", "train_rollouts"),
        "hint in test answers": lambda r: hints(r, "test", "test_answers"),
        "length": lambda r: plain(r["length"], ".1f"),
        "cut off %": lambda r: plain(r["cut_off"], ".1f", 100),
        "added parameters": lambda r: plain(r["parameters_added"], ",d")}
    columns = {name: show for name, show in columns.items()      # leave out columns of dashes
               if name in ("", "accuracy % [95 %]") or any(show(row) != "-" for row in done)}
    text = grid([list(columns), *([show(row) for show in columns.values()] for row in done)])
    text += ("\n\nStudents: mean over seeds, interval over seeds (Student's t); q: one model, "
             "interval over questions (Wilson).\nHint: rows with the word / occurrences of all "
             "answers, summed over seeds.\n")
    if usual:
        text += f"Other settings, where a row says nothing else: {', '.join(sorted(usual))}.\n"
    left = [row for row in rows if row["kind"] == "unfinished"]
    if left:
        text += "\nUnfinished, so not in the table:\n\n" + grid(
            [["run", "steps", "seed", *SHOWN, "other settings"],
             *([r["runs"], r["steps_done"], plain(r["seeds"]), *(plain(r[n]) for n in SHOWN),
                r["other"] or "-"] for r in left)]) + "\n"
    return text + ("\n" + "\n".join(f"Note: {note}." for note in notes) + "\n" if notes else "")


def as_csv(rows: list[dict]) -> str:
    """The same rows as bare numbers: shares between 0 and 1, empty cells for missing values."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument("--out", default="", metavar="NAME", help="also write NAME.md and NAME.csv")
    parser.add_argument("--keep", default="", metavar="FOLDER",
                        help="also copy what the table needs of each finished run to FOLDER/RUN")
    args = parser.parse_args(argv)
    found = list({Path(run).resolve(): run for run in args.runs}.values())     # each folder once
    files = [name for name in found if Path(name).is_file()]     # such as logs that runs/* matches
    with one_line("compare.py"):
        defaults = asdict(Config())
        runs = [load_run(name, defaults) for name in found if name not in files]
        rows, notes = compare(runs)
        for run in runs if args.keep else ():
            if run.result:
                keep(run, Path(args.keep))
    if files:
        notes.append(f"{len(files)} files left out, such as {files[0]}: a run is a folder")
    text = markdown(rows, notes)
    print(text, end="")
    if args.out:
        name = re.sub(r"\.(md|csv)$", "", args.out)
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name + ".md").write_text(text, encoding="utf-8")
        Path(name + ".csv").write_text(as_csv(rows), encoding="utf-8")
        print(f"\nwritten: {name}.md, {name}.csv")


if __name__ == "__main__":
    main()
