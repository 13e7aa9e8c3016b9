"""compare.py: intervals over seeds, what makes an arm, and nothing dropped silently."""
import csv
import doctest
import json
import re
from pathlib import Path

import pytest

from analysis import compare
from conftest import ROOT
import evaluate


def make_run(folder, name, accuracy=0.8, *, base=0.5, finished=True, steps=3, grounded=0.4, **args):
    """A run's folder as distill.py leaves it. accuracy, base: of 200 test answers."""
    path = folder / name
    path.mkdir()
    settings = dict(student="/home/a/data/tiny-qwen3-vl", teacher="self", privilege="cue",
                    data="/home/a/data/toy/train.jsonl", eval_data="/home/a/data/toy/test.jsonl",
                    eval_limit=0, max_new_tokens=96, batch_size=4, steps=steps, lr=1e-3,
                    cue_lr=1e-2, cue_recovery=True, every=0, sink="first", train="all", seed=0,
                    name=name, device="", attention="eager")
    (path / "args.json").write_text(json.dumps(settings | args))

    def summary(value):
        return {"n": 200, "accuracy": value, "interval": evaluate.interval(200 * value, 200),
                "grounded": grounded, "grounded_interval": [grounded - 0.1, grounded + 0.1],
                "hint_rows": 2, "hint_count": 5, "length": 30.0, "cut_off": 0.01}
    before = {"base": summary(base), "teacher": summary(0.95), "rows": []}
    (path / "before.json").write_text(json.dumps(before))
    lines = [{"step": s + 1, "hint_rows": s, "hint_count": 2 * s} for s in range(3)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in lines))
    if finished:
        models = before | {"student": summary(accuracy)}
        result = {f"{who}_{key}": value for who in ("base", "teacher", "student")
                  for key, value in models[who].items() if key != "n"}
        result |= {"n": 200, "parameters_added": 198912}
        (path / "result.json").write_text(json.dumps(result))
    return compare.load_run(path)


def arms(rows, kind="student"):
    return [row for row in rows if row["kind"] == kind]


# ---------------------------------------------------------------------------- intervals

def test_doctests():
    assert doctest.testmod(compare).failed == 0


@pytest.mark.parametrize("df, expected", [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764),
                                          (7, 2.3646), (10, 2.2281), (30, 2.0423), (120, 1.9799)])
def test_t_quantiles_of_the_printed_tables(df, expected):
    assert compare.t_quantile(df) == pytest.approx(expected, abs=5e-5)


def test_interval_over_seeds():
    """1, 2, 3: s = 1, so 2 +- 4.3027 / sqrt(3)."""
    assert compare.over_seeds([1, 2, 3]) == pytest.approx((2, 2 - 2.48414, 2 + 2.48414), abs=1e-4)
    assert compare.over_seeds([0.7]) == (0.7, None, None)
    assert compare.over_seeds([]) == (None, None, None)


# ---------------------------------------------------------------------------- arms

def test_runs_that_differ_in_seed_name_and_machine_are_one_arm(tmp_path):
    runs = [make_run(tmp_path, "a", 0.80, seed=0),
            make_run(tmp_path, "b", 0.84, seed=1, device="cuda", attention="sdpa",
                     student="/else/data/tiny-qwen3-vl", eval_data="data/toy/test.jsonl")]
    rows, notes = compare.compare(runs)
    assert [row["kind"] for row in rows] == ["base", "teacher", "student"] and not notes
    student = rows[-1]
    assert student["seeds"] == 2 and student["accuracy"] == pytest.approx(0.82)
    half = 12.7062 * 0.02                     # s = 0.02 sqrt(2), over sqrt(2)
    assert student["accuracy_low"] == pytest.approx(0.82 - half, abs=1e-5)
    assert student["gain"] == pytest.approx(0.32)
    # sums over both runs: steps with 0, 1, 2 rows, and 0, 2, 4 occurrences, of 3 x 4 rollouts
    assert (student["train_hint_rows"], student["train_hint_count"], student["train_rollouts"]) == (
        6, 12, 24)
    assert (student["test_hint_rows"], student["test_hint_count"], student["test_answers"]) == (
        4, 10, 400)
    assert student["parameters_added"] == 198912


@pytest.mark.parametrize("change", [{"privilege": "answer"}, {"teacher": "ema"}, {"lr": 1e-4},
                                    {"train": "cue"}, {"sink": "last"}, {"cue_recovery": False},
                                    {"steps": 9}, {"data": "other/train.jsonl"}])
def test_runs_that_differ_in_a_setting_are_two_arms(tmp_path, change):
    rows, _ = compare.compare([make_run(tmp_path, "a"), make_run(tmp_path, "b", seed=1, **change)])
    first, second = arms(rows)
    name, value = next(iter(change.items()))
    if name in compare.SHOWN:
        assert second[name] == value != first[name]
    elif name in ("sink", "cue_recovery"):
        assert first["module"] == "first"
        assert second["module"] == ("last" if value == "last" else "off")
    else:
        assert f"{name}={value}" in second["other"] and f"{name}=" in first["other"]


def test_a_setting_that_most_rows_share_is_said_once(tmp_path):
    runs = [make_run(tmp_path, f"a{n}", seed=n, lr=lr, steps=steps)
            for n, (lr, steps) in enumerate([(0.1, 3), (0.1, 4), (0.1, 5), (0.2, 5)])]
    table, _, below = compare.markdown(*compare.compare(runs)).partition("\n\n")
    assert "lr=0.1" not in table and table.count("lr=0.2") == 1 and table.count("steps=5") == 2
    assert "where a row says nothing else: lr=0.1." in below and "steps" not in below


def test_a_setting_that_an_arm_lacks_is_not_read_into_it(tmp_path):
    """"method=grpo" of the only baseline was said below the table, as if of every row."""
    runs = [make_run(tmp_path, "a"), make_run(tmp_path, "b", seed=1, method="grpo"),
            make_run(tmp_path, "c", seed=2, instruction="Think, then answer.")]
    table, _, below = compare.markdown(*compare.compare(runs)).partition("\n\n")
    assert table.count("method=grpo") == 1 and "method" not in below
    assert table.count("instruction=Think, then answer.") == 1 and "then" not in below


def test_the_gain_by_the_module_is_paired_by_seed(tmp_path):
    """Seeds 0 and 1 exist in both arms. The arms differ by 0.05 and 0.07, the seeds by 0.2."""
    off = dict(cue_recovery=False)     # the rate of a module that is off does not matter: one arm
    runs = [make_run(tmp_path, "a0", 0.60, seed=0, cue_lr=7.0, **off),
            make_run(tmp_path, "a1", 0.80, seed=1, cue_lr=8.0, **off),
            make_run(tmp_path, "b0", 0.65, seed=0), make_run(tmp_path, "b1", 0.87, seed=1),
            make_run(tmp_path, "b2", 0.10, seed=2), make_run(tmp_path, "c", 0.9, seed=0, lr=5.0)]
    without, with_module, other = arms(compare.compare(runs)[0])
    assert with_module["module_gain"] == pytest.approx(0.06)
    assert with_module["module_gain_seeds"] == 2
    assert with_module["module_gain_high"] == pytest.approx(0.06 + 12.7062 * 0.01, abs=1e-5)
    assert without["module_gain"] is None and other["module_gain"] is None      # of another lr


def test_a_seed_run_twice_counts_once_and_is_noted(tmp_path):
    runs = [make_run(tmp_path, "a", 0.8), make_run(tmp_path, "again", 0.9)]
    rows, notes = compare.compare(runs)
    assert arms(rows)[0]["seeds"] == 1 and arms(rows)[0]["accuracy"] == 0.8
    assert "again has the settings and the seed of" in notes[0]
    assert "Note: " in compare.markdown(rows, notes)


def test_bases_that_disagree_are_noted(tmp_path):
    runs = [make_run(tmp_path, "a", seed=0), make_run(tmp_path, "b", seed=1, base=0.55)]
    rows, notes = compare.compare(runs)
    assert len(arms(rows, "base")) == 1 and "50.0 to 55.0 %" in notes[0]


def test_teachers_have_a_row_for_each_privilege(tmp_path):
    runs = [make_run(tmp_path, "a"), make_run(tmp_path, "b", privilege="answer")]
    rows = compare.compare(runs)[0]
    assert [row["privilege"] for row in arms(rows, "teacher")] == ["cue", "answer"]
    assert len(arms(rows, "base")) == 1 and rows[0]["interval_over"] == "questions"


# ---------------------------------------------------------------------------- for people

def test_one_seed_has_no_interval_and_says_so(tmp_path):
    text = compare.markdown(*compare.compare([make_run(tmp_path, "a")]))
    student = next(line for line in text.splitlines() if line.startswith("| student"))
    assert "80.0 (1 seed)" in student and "+30.0 (1 seed)" in student and "[" not in student
    assert "50.0 [43.1, 56.9] q" in text


def test_an_unfinished_run_is_listed(tmp_path):
    runs = [make_run(tmp_path, "a"), make_run(tmp_path, "killed", finished=False, steps=9, seed=1)]
    rows, notes = compare.compare(runs)
    assert arms(rows)[0]["seeds"] == 1
    assert arms(rows, "unfinished")[0]["steps_done"] == "3 of 9"
    assert "killed" in compare.markdown(rows, notes) and "killed" in compare.as_csv(rows)
    alone, _ = compare.compare([runs[1]])       # its base and teacher were measured, so they show
    assert [row["kind"] for row in alone] == ["base", "teacher", "unfinished"]


def test_a_result_of_an_older_version_still_makes_a_row(tmp_path):
    """Without occurrences, added parameters or a newer setting: these are shown as unknown."""
    run = make_run(tmp_path, "old")
    for name in ("parameters_added", "student_hint_count", "student_grounded"):
        del run.result[name]
    del run.args["sink"]
    rows, notes = compare.compare([run, make_run(tmp_path, "new", seed=1)])
    old = next(row for row in arms(rows) if "old" in row["runs"])
    assert old["module"] == "first" and old["grounded"] is None
    assert "2 / ? of 200" in compare.markdown(rows, notes)


def test_defaults_stand_in_for_settings_newer_than_a_run(tmp_path):
    run = make_run(tmp_path, "old")
    del run.args["sink"]
    (run.folder / "args.json").write_text(json.dumps(run.args))
    new = make_run(tmp_path, "new", seed=1)
    old = compare.load_run(run.folder, {"sink": "first", "lr": 5.0})
    assert old.args["lr"] == 1e-3 and arms(compare.compare([old, new])[0])[0]["seeds"] == 2


def test_the_command_writes_the_same_table_twice(tmp_path, capsys):
    for seed, accuracy in enumerate((0.7, 0.8, 0.9)):
        make_run(tmp_path, f"s{seed}", accuracy, seed=seed)
    folders = [str(tmp_path / f"s{seed}") for seed in (0, 1, 2, 0)]          # one of them twice
    (tmp_path / "s0.log").touch()                                            # as runs/* takes it in
    compare.main([*folders, str(tmp_path / "s0.log"),
                   "--out", str(tmp_path / "out" / "grid.md")])
    printed, text = capsys.readouterr().out, (tmp_path / "out" / "grid.md").read_text()
    assert printed.startswith(text) and "80.0 [55.2, 104.8]" in text
    assert "Note: 1 files left out" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    with open(tmp_path / "out" / "grid.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["kind"] for row in rows] == ["base", "teacher", "student"]
    assert float(rows[2]["accuracy"]) == pytest.approx(0.8) and rows[2]["seeds"] == "3"
    assert float(rows[2]["accuracy_low"]) == pytest.approx(0.8 - 4.3027 * 0.1 / 3**0.5, abs=1e-5)


def test_small_copies_give_the_same_table(tmp_path, capsys):
    runs = [make_run(tmp_path, f"a{n}", 0.8 + n / 100, seed=n, before_limit=0,
                     data=f"/home/me/{n}/data/toy-wrong/train.jsonl").folder for n in range(2)]
    compare.main([*map(str, runs), "--keep", str(tmp_path / "kept")])
    before = capsys.readouterr().out
    kept = sorted((tmp_path / "kept").iterdir())
    assert [folder.name for folder in kept] == ["a0", "a1"]
    compare.main([*map(str, kept)])
    assert capsys.readouterr().out == before
    assert "home" not in (kept[0] / "args.json").read_text()
    assert json.loads((kept[1] / "args.json").read_text())["data"] == "data/toy-wrong/train.jsonl"
    assert sum(file.stat().st_size for file in kept[0].iterdir()) < 20_000


def test_names_cannot_break_the_table(tmp_path):
    text = compare.grid([["a"], ["x|y\nz"]])
    assert text.splitlines()[-1] == "| x\\|y z |" and len(text.splitlines()) == 3


@pytest.mark.parametrize("file, content, message", [
    (None, None, "is not the folder of a run"), ("args.json", "{", "not valid JSON"),
    ("args.json", "[]", "expected a JSON object"),
    ("result.json", '{"n": 1}', "no student_accuracy")])
def test_a_folder_that_is_no_run_is_one_line(tmp_path, file, content, message):
    folder = tmp_path / "x"
    if file:
        make_run(tmp_path, "x")
        (folder / file).write_text(content)
    else:
        folder.mkdir()
    with pytest.raises(SystemExit, match=f"^compare.py: .*x.*{message}") as error:
        compare.main([str(folder)])
    assert "\n" not in str(error.value)


def test_the_table_of_every_arm_is_that_of_the_committed_runs():
    """docs/results.md and docs/results: each row is computed again from the runs it names."""
    folders = sorted((ROOT / "docs" / "results").iterdir())
    rows, _ = compare.compare([compare.load_run(folder) for folder in folders])
    found = {Path(row["runs"].split()[0]).name.rpartition("-")[0]: row for row in rows
             if row["kind"] == "student"}
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    shown = [line.strip("| ").split(" | ") for line in page.partition("## Every arm")[2].splitlines()
             if re.match(r"\| [a-z]+\d?-", line)]
    assert [cells[0] for cells in shown] and {cells[0] for cells in shown} == found.keys()
    for name, _, seeds, accuracy, gain, module, grounded, hint, length in shown:
        row = found[name]
        assert [seeds, length] == [str(row["seeds"]), f"{row['length']:.1f}"], name
        for cell, key, sign in ((accuracy, "accuracy", ""), (gain, "gain", "+"),
                                (grounded, "grounded", ""), (module, "module_gain", "+")):
            text = compare.share(row, key, sign).removesuffix(" (1 seed)")
            assert cell.strip() == ("" if text == "-" else text), (name, key)
        assert hint == f"{row['train_hint_rows']:,} of {row['train_rollouts']:,}", name
