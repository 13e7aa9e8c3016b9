"""evaluate.py and data/toy.py: counting, grounded answers, and the toy world's own promises."""
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from analysis import probe
from benchmarks import readers, run
from scale import asked, checkpoint
import evaluate
import fabricate
from benchmarks.scores import PAPER_COLUMNS
import model as qwen
from conftest import ROOT
from data import cues, records as record_files, toy
from data.leaks import audit


def test_every_question_stays_in_the_denominator():
    """An answer that cannot be read is wrong, not left out."""
    record = {"id": "1", "question": "How many?", "answer": "2", "images": []}
    rows = [evaluate.judge(record, text, True, 5)
            for text in ("The answer is \\boxed{2}.", "no idea", "", "\\boxed{3}")]
    got = evaluate.summarise(rows)
    assert (got["n"], got["accuracy"], got["unparsed"]) == (4, 0.25, 0.5)


def test_interval_holds_at_the_ends():
    """Wilson's interval of 0 of n and n of n is inside [0, 1] and not empty."""
    low, high = evaluate.interval(0, 20)
    assert abs(low) < 1e-12 and 0.1 < high < 0.2
    low, high = evaluate.interval(20, 20)
    assert 0.8 < low < 0.9 and abs(high - 1) < 1e-12


def test_grounded_needs_evidence_that_is_there():
    record = {"id": "1", "images": [], "question": "How many red shapes are there?", "answer": "1",
              "objects": ["a red circle at row 1 column 2", "a blue square at row 2 column 1"]}
    box = "The answer is \\boxed{1}."
    cases = {f"I see a red circle at row 1 column 2. {box}": True,
             f"I see a red circle at row 3 column 2. {box}": False,       # invented place
             f"The [hint] says 1. {box}": False,                          # no evidence at all
             "I see a red circle at row 1 column 2. The answer is \\boxed{2}.": False}
    for text, expected in cases.items():
        assert evaluate.judge(record, text, True, 5)["grounded"] is expected, text
    assert not evaluate.judge({**record, "objects": []}, box, True, 5)["grounded"]
    del record["objects"]
    assert "grounded" not in evaluate.judge(record, box, True, 5)


def test_evaluation_counts_what_was_cut_off(tiny, records):
    model, processor = tiny
    rows = evaluate.evaluate(model, processor, records[:6], max_new_tokens=2, batch_size=4)
    assert [row["id"] for row in rows] == [r["id"] for r in records[:6]]
    assert all(row["length"] == 2 and not row["stopped"] for row in rows)
    assert evaluate.summarise(rows)["cut_off"] == 1.0


def test_evaluation_does_not_depend_on_the_batch(tiny, records):
    model, processor = tiny
    one, six = (evaluate.evaluate(model, processor, records[:6], max_new_tokens=24, batch_size=size)
                for size in (1, 6))
    assert [row["response"] for row in one] == [row["response"] for row in six]


def test_table_is_markdown_and_shows_the_hint_count():
    rows = [evaluate.judge({"id": "1", "question": "q", "answer": "2", "images": []},
                           "The hint says \\boxed{2}", True, 5)]
    text = evaluate.table({"base": evaluate.summarise(rows)})
    head, rule, body = text.splitlines()
    assert head.count("|") == rule.count("|") == body.count("|") and "grounded" not in head
    assert "hint rows" in head and "100.0" in body


def test_command_line_reports_bad_input_in_one_line(tmp_path):
    with pytest.raises(SystemExit, match="evaluate.py: .*no such record file"):
        evaluate.main(["--model", str(qwen.TINY), "--data", str(tmp_path / "none.jsonl")])


def test_command_line_with_a_hint(toy_folder, tmp_path, capsys):
    evaluate.main(["--model", str(qwen.TINY), "--data", str(toy_folder / "test.jsonl"),
                   "--privilege", "answer", "--max-new-tokens", "8", "--limit", "4",
                   "--out", str(tmp_path / "rows.jsonl"), "--device", "cpu"])
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 4
    assert "accuracy" in capsys.readouterr().out


# ---------------------------------------------------------------------------- never lose an answer

def on_records(toy_folder, out, *more):
    return ["--model", str(qwen.TINY), "--data", str(toy_folder / "test.jsonl"), "--out", str(out),
            "--batch-size", "1", "--max-new-tokens", "3", "--device", "cpu", *more]


def test_a_killed_evaluation_goes_on_and_draws_the_same(toy_folder, tmp_path, monkeypatch, capsys):
    """All answers were written at the end: a kill lost hours of them, a missing folder all."""
    hot, sample, calls = ("--temperature", "1.5", "--seed", "3"), evaluate.sample, []
    whole, cut = tmp_path / "new" / "folder" / "whole.jsonl", tmp_path / "cut.jsonl"
    evaluate.main(on_records(toy_folder, whole, *hot))

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sample(*args, **options)
    monkeypatch.setattr(evaluate, "sample", interrupted)
    with pytest.raises(SystemExit, match="130"):
        evaluate.main(on_records(toy_folder, cut, *hot))
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == (f"evaluate.py: stopped; 8 answers are in {cut}, the same command goes on")
    with open(cut, "ab") as file:
        file.write(whole.read_bytes().split(b"\n")[8] + b'\n{"id": "cut')   # what a kill may leave
    evaluate.main(on_records(toy_folder, cut, *hot))
    assert cut.read_bytes() == whole.read_bytes()
    assert len(calls) == 3 + 2, "of four groups of four the first two are not asked again"
    monkeypatch.setattr(qwen, "load", None)              # what follows is refused before
    for more, message in ((("--seed", "4"), "seed 3, not 4"), (("--limit", "3"), "limit 0, not 3"),
                          (("--privilege", "cue"), "privilege none, not cue")):
        with pytest.raises(SystemExit, match=f"was made with {message}: give another --out$"):
            evaluate.main(on_records(toy_folder, cut, *hot, *more))
    assert cut.read_bytes() == whole.read_bytes()
    lines = whole.read_bytes().split(b"\n")
    for line, message in ((b"garbage", ":2: damaged"), (lines[0], "a question twice"),
                          (b'{"id": "toy-test-9"}', "a row without a verdict")):
        cut.write_bytes(b"\n".join([lines[0], line, *lines[2:]]))
        with pytest.raises(SystemExit, match=message) as stop:
            evaluate.main(on_records(toy_folder, cut, *hot))
        assert "goes on" not in str(stop.value)


def test_ctrl_c_in_a_benchmark_is_one_line(tmp_path, monkeypatch, capsys):
    """And the answers up to here count: see test_a_killed_benchmark_goes_on_and_draws_the_same."""
    source, calls, sample = fabricate.official("dynamath", tmp_path / "files"), [], evaluate.sample

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sample(*args, **options)
    monkeypatch.setattr(evaluate, "sample", interrupted)
    with pytest.raises(SystemExit, match="130"):
        run.main(bench(source, tmp_path / "out", "--benchmark", "dynamath", "--batch-size", "2"))
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"run.py: stopped; answers up to here are in {tmp_path / 'out'}, the same command goes on")
    assert len(checkpoint.read_jsonl(tmp_path / "out" / "dynamath.jsonl")) == 1 + 8


def test_an_evaluation_does_not_write_over_another_file(toy_folder, tmp_path):
    """--out test.jsonl by mistake took the place of the records."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": "mine"}\n')
    with pytest.raises(SystemExit, match="cannot be gone on with: give another --out"):
        evaluate.main(on_records(toy_folder, path))
    assert path.read_text() == '{"id": "mine"}\n'


def test_a_trained_checkpoint_is_not_given_old_answers(toy_folder, tmp_path, monkeypatch):
    """The folder has the name of the one before; what it answered is another model's."""
    shutil.copytree(qwen.TINY, tmp_path / "model")
    argv = on_records(toy_folder, tmp_path / "rows.jsonl", "--model", str(tmp_path / "model"))
    evaluate.main(argv)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.language_model.norm.weight"] += 1
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(qwen, "load", None)
    with pytest.raises(SystemExit, match="was made with checkpoint"):
        evaluate.main(argv)


def test_a_link_to_a_checkpoint_finds_the_run_it_belongs_to(tmp_path, monkeypatch):
    """`--model LINK` and `--model .` found no args.json, and other questions were asked."""
    folder = tmp_path / "runs" / "a" / "checkpoint"
    folder.mkdir(parents=True)
    checkpoint.write_json(folder.parent / "args.json", {"max_new_tokens": 7, "digests": {}})
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    for path in (folder, tmp_path / "link", Path(".")):
        own = asked.run_settings(path)
        assert own["max_new_tokens"] == 7 and own["min_pixels"] == 0        # an older run's
    (folder.parent / "args.json").write_text("{")
    with pytest.raises(ValueError, match="args.json: not valid JSON"):
        asked.run_settings(folder)


@pytest.mark.parametrize("main", [evaluate.main, probe.main])
def test_a_model_that_is_not_there_is_said_before_a_world_is_drawn(main, monkeypatch):
    """A mistyped name drew the large world, for minutes, and was refused then."""
    monkeypatch.setattr(toy, "default", None)
    with pytest.raises(SystemExit, match="runs/zz/checkpoint is not a folder"):
        main(["--model", "runs/zz/checkpoint"])


@pytest.mark.parametrize("main, flags", [
    (evaluate.main, ["--model", "m"]),
    (run.main, ["--model", "m", "--benchmark", "mmmu", "--source", "s"]),
    (cues.main, ["write", "--model", "m", "--data", "d", "--out", "o"])])
@pytest.mark.parametrize("flag, value", [("--temperature", "-1"), ("--temperature", "nan"),
                                         ("--limit", "-3"), ("--batch-size", "0"),
                                         ("--seed", "-1"), ("--max-pixels", "-5")])
def test_a_flag_out_of_range_is_one_line(main, flags, flag, value, capsys):
    """Some were accepted, some a trace after minutes."""
    with pytest.raises(SystemExit, match="2"):
        main([*flags, flag, value])
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {flag}: is {value}" in said and "expected" in said


def test_a_console_of_another_encoding_loses_no_answer(tmp_path):
    """cp1252 cannot show most characters: the first answer in Chinese was a trace."""
    script = ("import sys; sys.path.insert(0, sys.argv[1]); import evaluate, model\n"
              "evaluate.load_asked = lambda *a, **k: (None, None)\n"
              "evaluate.evaluate = lambda *a, **k: [evaluate.judge({'id': '1', 'question': 'q', "
              "'answer': '2'}, '2', True, 1)]\n"
              "evaluate.table = lambda s: chr(0x5706)\n"
              "evaluate.main(['--model', sys.argv[2], '--data', sys.argv[3]])")
    data = tmp_path / "r.jsonl"
    data.write_text('{"id": "1", "images": [], "question": "圆", "answer": "2"}\n', encoding="utf-8")
    got = subprocess.run([sys.executable, "-c", script, str(ROOT), str(qwen.TINY), str(data)],
                         capture_output=True, env={**os.environ, "PYTHONIOENCODING": "cp1252",
                                                   "LC_ALL": "C", "PYTHONUTF8": "0"})
    assert got.returncode == 0, got.stderr
    assert b"\\u5706" in got.stdout


# ---------------------------------------------------------------------------- the toy world

ASKED = [(world, kind) for world in (toy.SMALL, toy.LARGE) for kind in world.kinds]
NAMES = [f"{world.name}-{kind}" for world, kind in ASKED]
both_worlds = pytest.mark.parametrize("world", (toy.SMALL, toy.LARGE), ids=lambda w: w.name)


def scenes(split, count=300, world=toy.SMALL):
    rng = random.Random(1)
    return [toy.make_scene(rng, split, world) for _ in range(count)]


@both_worlds
def test_toy_train_and_test_share_no_picture(world):
    assert not set(scenes("train", 3000, world)) & set(scenes("test", 1000, world))


def test_the_small_world_has_not_moved(tmp_path):
    """Every result in the README is about its records: a change of it would be a new experiment."""
    toy.write(tmp_path / "toy", train=60, test=20, seed=0)
    text = "".join((tmp_path / "toy" / f"{split}.jsonl").read_text() for split in ("train", "test"))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "2c1312de52272966"


def test_the_large_world_is_a_real_models(tmp_path):
    """Whole visual tokens, enough to see, and no prompt near the paper's limit of 2,048 tokens."""
    toy.write(tmp_path / "world", train=60, test=20, world=toy.LARGE)
    train, test = (record_files.load(tmp_path / "world" / f"{split}.jsonl", ("cue", "rationale"))
                   for split in ("train", "test"))
    assert {r["kind"] for r in train} == set(toy.KINDS + toy.HARDER)
    assert not {r["id"] for r in train} & {r["id"] for r in test}
    assert len({Image.open(r["images"][0]).size for r in train}) > 1
    for record in train + test:
        width, height = Image.open(record["images"][0]).size
        assert width % 32 == height % 32 == 0 and 150 <= width * height // 32**2 <= 320
        assert 20 <= len(record["objects"]) <= 40
        assert len((record["question"] + record["cue"]).split()) < 450


def test_the_audit_flags_no_cue_of_the_large_world():
    """Of 1,000 cues written by construction none was flagged when this test was written."""
    rng = random.Random(7)
    for scene in scenes("train", 200, toy.LARGE):
        record = toy.make_record(scene, toy.make_question(scene, rng), "x", "x.png")
        assert audit(record["cue"], record["answer"], record["question"]) == [], record


@pytest.mark.parametrize("said, expected", [
    ("I see A red star (row 1, column 2).", True), ("a red star is in row 1 and column 2", True),
    ("There is a red star at row 1 column 2 and a red star at row 2 column 2.", False),
    ("The red shapes are 1.", False)])
def test_evidence_is_read_as_real_models_write_it(said, expected):
    assert toy.grounded(said, {"objects": ["a red star at row 1 column 2"]}) is expected


def test_each_world_has_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "__file__", str(tmp_path / "toy.py"))
    drawn = []
    monkeypatch.setattr(toy, "write", lambda folder, *more, **named: drawn.append(
        (folder.name, *more, named["dev"], named["world"].name)))
    assert toy.default() == tmp_path / "toy" and toy.default(large=True) == tmp_path / "toy-large"
    assert drawn == [("toy", 3000, 512, 256, "toy"),
                     ("toy-large", 7040, 512, 256, "toy-large")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_drawing_that_is_stopped_leaves_nothing_behind(tmp_path, monkeypatch, number):
    monkeypatch.setattr(toy, "write_split", lambda *_: os.kill(os.getpid(), number))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        toy.write(tmp_path / "toy", 6, 4)
    assert not list(tmp_path.iterdir()) and signal.getsignal(signal.SIGTERM) == before


def test_a_world_without_dev_records_gets_them_and_keeps_the_rest(tmp_path, monkeypatch, capsys):
    """Worlds drawn by an older version are on people's disks, some where nobody may write."""
    monkeypatch.setattr(toy, "__file__", str(tmp_path / "toy.py"))
    monkeypatch.setattr(toy, "SMALL", replace(toy.SMALL, records=(6, 4, 8)))
    toy.write(tmp_path / "toy", 6, 4)
    old = {path: path.read_bytes() for path in (tmp_path / "toy").rglob("*") if path.is_file()}
    def forbidden(**folder):
        raise PermissionError
    with monkeypatch.context() as patch:
        patch.setattr(toy.tempfile, "mkdtemp", forbidden)
        assert not (toy.default() / "dev.jsonl").exists()
    shutil.copytree(tmp_path / "toy", tmp_path / "killed")
    toy.default()
    assert f"drawing {tmp_path / 'toy' / 'dev.jsonl'}" in capsys.readouterr().out
    dev = Path("images", "dev")                 # a kill left the pictures, and no records yet
    shutil.copytree(tmp_path / "toy" / dev, tmp_path / "killed" / dev)
    toy.add_dev(tmp_path / "killed", toy.SMALL, 8)
    toy.default()
    assert not capsys.readouterr().out and all(p.read_bytes() == b for p, b in old.items())
    toy.write(tmp_path / "whole", 6, 4, dev=8)
    drawn = [{p.relative_to(tmp_path / name): p.read_bytes() for p in
              (tmp_path / name).rglob("*") if p.is_file()} for name in ("toy", "killed", "whole")]
    assert drawn[0] == drawn[1] == drawn[2]
    assert len(record_files.load(tmp_path / "toy" / "dev.jsonl", ("cue", "rationale"))) == 8


@both_worlds
def test_toy_dev_shares_no_picture_with_train_or_test(tmp_path, world):
    """It is on test's side of the checksum, and leaves out what test shows: here the very scenes
    that would have come."""
    toy.write(tmp_path / "first", 1, 1, world=world, dev=3)
    taken = toy.objects_in(tmp_path / "first" / "dev.jsonl")
    toy.write_split(tmp_path, "dev", 3, 0, world, "own", "own", taken)
    assert not any(things in taken for things in toy.objects_in(tmp_path / "dev.jsonl"))
    rng, seen = random.Random(4), scenes("test", 50, world)
    taken = [list(map(str, scene.things)) for scene in seen]
    made = [toy.make_scene(rng, "test", world, taken) for _ in range(50)]
    assert {scene.split for scene in made} == {"test"} and not set(made) & set(seen)


def test_toy_is_the_same_for_a_seed_and_another_for_another(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        toy.write(tmp_path / name, train=6, test=4, seed=seed)
    a, b, c = ((tmp_path / n / "train.jsonl").read_text() for n in "abc")
    assert a == b != c
    picture = "images/train/3.png"
    assert (tmp_path / "a" / picture).read_bytes() == (tmp_path / "b" / picture).read_bytes()


def test_controls_change_the_cues_and_nothing_else(tmp_path):
    """A teacher told another record's cue, or nothing: what is left then is not the cue's doing."""
    for cues in toy.CUES:
        toy.write(tmp_path / cues, train=30, test=8, cues=cues)
    for split in ("train", "test"):
        own, wrong, empty = (record_files.load(tmp_path / cues / f"{split}.jsonl", ("cue",))
                             for cues in toy.CUES)
        assert sorted(r["cue"] for r in own) == sorted(r["cue"] for r in wrong)
        assert all(a["cue"] != b["cue"] for a, b in zip(own, wrong))
        assert {r["cue"] for r in empty} == {toy.NOTHING}
        for rows in (own, wrong, empty):
            for row in rows:
                row.pop("cue")
                row["images"] = Path(row["images"][0]).read_bytes()
        assert own == wrong == empty


@both_worlds
@pytest.mark.parametrize("views", toy.VIEWS[1:])
def test_views_are_other_looks_at_the_same_pictures(tmp_path, views, world):
    toy.write(tmp_path / "own", 3, 2, world=world)
    toy.write(tmp_path / "other", 3, 2, world=world, views=views)
    for split in ("train", "test"):
        own, other = (record_files.load(tmp_path / name / f"{split}.jsonl", needs) for name, needs
                      in (("own", ()), ("other", ("teacher_images",))))
        for a, b in zip(own, other):
            kept, changed = (b["teacher_images"], b["images"]) if views == "blurred" else (
                b["images"], b["teacher_images"])
            assert Path(kept[0]).read_bytes() == Path(a["images"][0]).read_bytes()
            assert a == {name: b[name] for name in a} | {"images": a["images"]}
            first, second = (Image.open(path[0]).convert("RGB") for path in (kept, changed))
            scale = 2 if views == "enlarged" else 1
            assert second.size == (scale * first.width, scale * first.height)
            assert first.tobytes() != second.tobytes()


def test_a_masked_picture_shows_what_the_question_is_about_and_a_marked_one_frames_it():
    rng = random.Random(3)
    for scene in scenes("test", 20):
        picture, question = toy.draw(scene, rng), toy.make_question(scene, rng)
        about = question.relevant(scene.things)
        masked, marked = (toy.view(picture, about, kind, toy.CELL) for kind in ("masked", "marked"))
        for thing in scene.things:
            middle = ((2 * thing.column - 1) * toy.CELL // 2, (2 * thing.row - 1) * toy.CELL // 2)
            corner = ((thing.column - 1) * toy.CELL, (thing.row - 1) * toy.CELL)
            assert marked.getpixel(middle) == picture.getpixel(middle)
            assert (marked.getpixel(corner) == toy.FRAME) == (thing in about)
            assert masked.getpixel(middle) == (picture.getpixel(middle) if thing in about
                                               else toy.PAPER)


def test_toy_records_are_records(toy_folder):
    records = record_files.load(toy_folder / "train.jsonl", ("cue", "rationale"))
    assert len(records) == 40 and len({Image.open(r["images"][0]).size for r in records}) > 1


@pytest.mark.parametrize("world, kind", ASKED, ids=NAMES)
def test_toy_solution_gives_the_answer_and_the_cue_only_the_evidence(world, kind):
    """A cue that contained the answer, or evidence that is not there, would spoil comparisons."""
    rng = random.Random(2)
    for scene in scenes("train", 300 if world is toy.SMALL else 100, world):
        question = toy.make_question(scene, rng, kind)
        record = toy.make_record(scene, question, "x", "x.png")
        solution = question.solution(question.relevant(scene.things))
        assert evaluate.judge(record, solution, True, 1)["correct"], (record, solution)
        assert evaluate.judge(record, solution, True, 1)["grounded"]
        assert record["cue"] == f"The picture shows {toy.listing(question.relevant(scene.things))}."
        assert "answer" not in record["cue"]
        assert record["rationale"].endswith(f"the answer is {record['answer']}.")


@pytest.mark.parametrize("world, kind", ASKED, ids=NAMES)
def test_toy_answers_equal_a_count_by_hand(world, kind):
    """From the words of the question and the picture alone."""
    rng, asked = random.Random(3), 0
    for scene in scenes("test", 100, world):
        question = toy.make_question(scene, rng, kind)
        asked += question.kind == kind
        words = re.findall(r"\w+", re.split(r"\?|(?<=once)\.", question.text)[0])
        mine = [t for t in scene.things if t.colour in words and (
            question.kind not in ("locate", "left") or t.shape in words)]
        expected = {"count": lambda: str(len(mine)), "add": lambda: str(sum(t.row for t in mine)),
                    "sum": lambda: str(len(mine)), "locate": lambda: str(mine[0].row),
                    "compare": lambda: winner(mine, words), "odd": lambda: odd(mine),
                    "left": lambda: left_of(*mine, scene), "most": lambda: most(scene, words),
                    }[question.kind]()
        assert toy.make_record(scene, question, "x", "x")["answer"] == expected, question
    assert asked > 50, "most scenes must have a question of this kind"


def winner(things, words):
    named = [w for w in words if w in toy.LARGE.colours]
    counts = [sum(t.colour == name for t in things) for name in named]
    return "equal" if counts[0] == counts[1] else named[counts.index(max(counts))]


def odd(things):
    single, = (t.shape for t in things if sum(t.shape == o.shape for o in things) == 1)
    return single


def left_of(thing, scene):
    beside, = (t for t in scene.things if (t.row, t.column) == (thing.row, thing.column - 1))
    return beside.colour


def most(scene, words):
    rows = {"two": 2, "three": 3, "four": 4}[words[words.index("rows") - 1]]
    upper = [t.colour for t in scene.things if t.row <= rows]
    first, second = sorted(map(upper.count, set(upper)))[:-3:-1]
    assert first > second
    return max(set(upper), key=upper.count)


@both_worlds
def test_toy_pictures_show_their_things(world):
    """The middle of a thing's cell has its colour, an empty cell has the paper's."""
    rng, cell = random.Random(4), world.cell
    for scene in scenes("test", 30 if world is toy.SMALL else 10, world):
        picture = toy.draw(scene, rng)
        assert picture.size == (scene.columns * cell, scene.rows * cell)
        full = {(t.row, t.column): world.colours[t.colour] for t in scene.things}
        for row in range(1, scene.rows + 1):
            for column in range(1, scene.columns + 1):
                got = picture.getpixel((int((column - .5) * cell), int((row - .5) * cell)))
                want = full.get((row, column), toy.PAPER)
                assert max(abs(a - b) for a, b in zip(got, want)) < 40, (scene, row, column)


def test_tiny_checkpoint_is_small_and_ordinary():
    """Under 8 MB; DeepStack, M-RoPE and a tied head; control tokens at ids of its own."""
    config = json.loads((qwen.TINY / "config.json").read_text())
    assert sum(f.stat().st_size for f in qwen.TINY.iterdir()) < 8_000_000
    vision = config["vision_config"]
    assert config["tie_word_embeddings"] and vision["deepstack_visual_indexes"]
    assert config["text_config"]["rope_parameters"]["mrope_section"]
    assert max(vision["deepstack_visual_indexes"]) < vision["depth"]
    assert config["image_token_id"] < 1000


def test_tiny_checkpoint_is_what_the_default_run_needs(tiny):
    """It sees, follows a cue, and errs when alone: without this gap there is nothing to recover."""
    model, processor = tiny
    rng, rows = random.Random(6), []
    for n in range(64):
        scene = toy.make_scene(rng, "test")
        record = toy.make_record(scene, toy.make_question(scene, rng), str(n), "")
        rows.append({**record, "images": [toy.draw(scene, rng)]})
    alone = evaluate.summarise(evaluate.evaluate(model, processor, rows, max_new_tokens=96))
    hinted = evaluate.summarise(evaluate.evaluate(model, processor, rows, max_new_tokens=96,
                                                  hint=lambda r: r["cue"]))
    assert alone["accuracy"] < 0.7 and hinted["accuracy"] > alone["accuracy"] + 0.25
    assert torch.get_num_threads() >= 1


# ---------------------------------------------------------------------------- benchmarks

def bench(source, out, *more):
    return ["--model", str(qwen.TINY), "--source", str(source), "--out", str(out), "--any-rows",
            "--max-new-tokens", "3", "--batch-size", "4", "--device", "cpu", *more]


@pytest.mark.parametrize("name", list(readers.ROWS))
def test_every_benchmark_runs_from_both_kinds_of_file(name, tmp_path, capsys):
    """Fabricated files in the official layout and as VLMEvalKit's TSV: the same ids and golds."""
    few = ("--limit", "1") if name == "video-mme" else ()     # its first video is a frame folder
    golds = []
    for kind in ("official", "tsv"):
        source = getattr(fabricate, kind)(name, tmp_path / kind)
        run.main(bench(source, tmp_path / f"out-{kind}", "--benchmark", name, *few))
        header, *rows = checkpoint.read_jsonl(tmp_path / f"out-{kind}" / f"{name}.jsonl")
        assert header["settings"]["max_new_tokens"] == 3 and rows
        golds.append({row["id"]: row["gold"] for row in rows})
        scores = json.loads((tmp_path / f"out-{kind}" / "scores.json").read_text())[name]
        assert scores["n"] == len(rows) and scores["unanswered"] == 0
    assert golds[0] == golds[1]
    assert PAPER_COLUMNS[name][0] in capsys.readouterr().out


def test_a_killed_benchmark_goes_on_and_draws_the_same(tmp_path, monkeypatch):
    """The half group and the half line that a kill leaves are drawn again, with the same draws."""
    source, calls, sample = fabricate.official("dynamath", tmp_path / "files"), [], evaluate.sample
    monkeypatch.setattr(evaluate, "sample", lambda *a, **k: calls.append(1) or sample(*a, **k))
    hot = ("--benchmark", "dynamath", "--temperature", "1.5", "--top-k", "20", "--batch-size", "2")
    run.main(bench(source, tmp_path / "out", *hot))
    path, groups = tmp_path / "out" / "dynamath.jsonl", len(calls)
    whole = path.read_bytes()
    path.write_bytes(b"\n".join(whole.split(b"\n")[:12]) + b'\n{"id": "cut')     # 11 of them
    run.main(bench(source, tmp_path / "out", *hot))
    assert path.read_bytes() == whole
    assert len(calls) - groups == groups - 1, "the first group of eight is not asked again"
    with pytest.raises(SystemExit, match="was made with"):
        run.main(bench(source, tmp_path / "out", "--benchmark", "dynamath"))


def test_a_smaller_limit_does_not_delete_answers(tmp_path):
    """The answers' file is written anew on every start; rows beyond --limit were lost with it."""
    source = fabricate.official("mathvista", tmp_path / "files")
    run.main(bench(source, tmp_path / "out", "--benchmark", "mathvista"))
    before = (tmp_path / "out" / "mathvista.jsonl").read_bytes()
    for more in ((), ("--rescore",)):
        with pytest.raises(SystemExit, match="other questions"):
            run.main(bench(source, tmp_path / "out", "--benchmark", "mathvista",
                           "--limit", "2", *more))
    assert (tmp_path / "out" / "mathvista.jsonl").read_bytes() == before


def test_rescoring_needs_no_model_and_keeps_the_answers(tmp_path, monkeypatch):
    source = fabricate.official("mathvista", tmp_path / "files")
    run.main(bench(source, tmp_path / "out", "--benchmark", "mathvista"))
    path = tmp_path / "out" / "mathvista.jsonl"
    header, *rows = checkpoint.read_jsonl(path)
    rows[0]["response"] = f"\\boxed{{{rows[0]['gold']}}}"
    checkpoint.write_jsonl(path, [header, *rows])
    monkeypatch.setattr(qwen, "load", None)
    run.main(bench(source, tmp_path / "out", "--benchmark", "mathvista", "--rescore"))
    again = checkpoint.read_jsonl(path)[1:]
    assert again[0]["correct"] and [r["response"] for r in again] == [r["response"] for r in rows]


def test_preset_paper_is_table_4_and_single_flags_override(monkeypatch):
    seen = {}
    monkeypatch.setattr(run, "run", lambda args: seen.update(vars(args)))
    run.main(["--model", "m", "--benchmark", "mmmu", "--source", "s", "--preset", "paper",
              "--top-k", "7"])
    assert (seen["temperature"], seen["top_p"], seen["presence_penalty"]) == (0.7, 0.8, 1.5)
    assert seen["max_pixels"] == 401408 and seen["max_new_tokens"] == 4096 and seen["top_k"] == 7


def test_the_official_number_of_rows_is_asked_for(tmp_path):
    source = fabricate.official("mmmu", tmp_path)
    with pytest.raises(SystemExit, match="900"):
        run.main(["--model", str(qwen.TINY), "--benchmark", "mmmu", "--source", str(source)])
