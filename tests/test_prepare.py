"""data/prepare.py, with tidy.py, output.py and sources.py, on made-up files: no download.

    OMP_NUM_THREADS=1 python -m pytest -q tests/test_prepare.py

Each test builds its own source folder in the published layout, breaks at most one thing, and
looks at the files that come out or at the message that refuses. Parquet needs pyarrow, or is
skipped. `prepare.py` is loaded by its path, since
`data` is a folder of scripts and no package.
"""

import base64
import csv
import hashlib
import importlib.util
import io
import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

SCRIPT = Path(__file__).resolve().parent.parent / "data" / "prepare.py"
spec = importlib.util.spec_from_file_location("prepare", SCRIPT)
prepare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prepare)

import model as qwen  # noqa: E402
from data import records, sources, tidy  # noqa: E402
from benchmarks.grade import grade  # noqa: E402

TRAIN = [["what color is the shape?", "red", 0], ["is there a circle?", "yes", 0],
         ["  is there a circle? ", "no\n", 1], ["what shape is present?", "triangle", 3]]
TEST = [["what shape is in the image?", "circle", 0], ["is no red shape present?", "yes", 1]]


@pytest.fixture
def source(tmp_path):
    """The installed package's layout: easy_vqa/data/{train,test}/{questions.json,images/N.png}."""
    for split, entries, count in (("train", TRAIN, 4), ("test", TEST, 2)):
        images = tmp_path / "easy_vqa" / "data" / split / "images"
        images.mkdir(parents=True)
        for n in range(count):
            Image.new("RGB", (64, 64), (40 * n, 0, 0)).save(images / f"{n}.png")
        (images.parent / "questions.json").write_text(json.dumps(entries))
    return tmp_path / "easy_vqa"


def edit(source, entries, split="train"):
    """Replace a split's entries by `entries`; return the file."""
    path = source / "data" / split / "questions.json"
    path.write_text(json.dumps(entries))
    return path


def convert(source, out, *more):
    """Run the command line in this process, which is faster than a shell and shows the same."""
    prepare.main(["easy-vqa", "--source", str(source), "--out", str(out), *more])


def refused(source, out):
    """Run the command line, which must fail with one line and no JSONL; return the line."""
    with pytest.raises(SystemExit) as failure:
        convert(source, out)
    assert not list(out.glob("*.jsonl"))
    return str(failure.value)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def snapshot(folder):
    """Every file below a folder with its bytes, so that two states can be compared with ==."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- what comes out ----------------------------------------------------------------------------

def test_records_are_exactly_these(source, tmp_path):
    """The third entry carries white space at its ends: that goes, and nothing else changes."""
    convert(source, tmp_path / "out")
    train, test = lines(tmp_path / "out/train.jsonl"), lines(tmp_path / "out/test.jsonl")
    assert train[2] == {"id": "easy-vqa-train-2", "images": ["images/train/1.png"],
                        "question": "is there a circle?", "answer": "no", "source": "easy-vqa"}
    assert [r["answer"] for r in train] == ["red", "yes", "no", "triangle"]
    assert len({r["id"] for r in train + test}) == 6
    for record in train + test:
        assert list(record) == ["id", "images", "question", "answer", "source"]
        assert (tmp_path / "out" / record["images"][0]).is_file()


def test_pictures_are_the_same_bytes_and_only_the_named_ones(source, tmp_path):
    convert(source, tmp_path / "out")
    copied = sorted((tmp_path / "out/images/train").iterdir())
    assert [p.name for p in copied] == ["0.png", "1.png", "3.png"]      # no row asks about 2.png
    for path in copied:
        assert path.read_bytes() == (source / "data/train/images" / path.name).read_bytes()
    assert not list((tmp_path / "out").rglob("*.tmp"))


@pytest.mark.parametrize("below", ["..", ".", "data"])
def test_source_may_be_the_target_folder_the_package_or_its_data(source, tmp_path, below):
    """A reader tries any of these first; none of them should need a second look at the manual."""
    convert((source / below).resolve(), tmp_path / "out")
    assert len(lines(tmp_path / "out/train.jsonl")) == 4


def test_summary_counts_rows_answers_sizes_and_drops(source, tmp_path, capsys):
    edit(source, TRAIN + [TRAIN[1], [" ", "yes", 2]])
    convert(source, tmp_path / "out")
    shown = capsys.readouterr().out
    for part in ("train.jsonl: 4 rows", "test.jsonl: 2 rows", "red 1, yes 1, no 1, triangle 1",
                 "always 'red' is right on 25.0 %", "3 of 64x64",
                 "1 repeat of an earlier entry, 1 blank question or answer"):
        assert part in shown


def test_the_script_runs_from_a_shell(source, tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, "easy-vqa", "--source", source, "--out",
                           tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 0 and "4 rows" in done.stdout
    done = subprocess.run([sys.executable, SCRIPT, "easy-vqa", "--source", tmp_path / "nowhere",
                           "--out", tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: no train/questions.json")


# ---- --limit -----------------------------------------------------------------------------------

def test_limit_keeps_the_mix_the_ids_and_the_order(source, tmp_path, capsys):
    """60, 30 and 10 of 100 answers become 12, 6 and 2 of 20, and twice the same ones."""
    entries = [[f"question {n}?", answer, n % 4]
               for n, answer in enumerate(["yes"] * 60 + ["no"] * 30 + ["red"] * 10)]
    edit(source, entries)
    for out in ("a", "b"):
        convert(source, tmp_path / out, "--limit", "20")
    rows = lines(tmp_path / "a/train.jsonl")
    assert Counter(r["answer"] for r in rows) == {"yes": 12, "no": 6, "red": 2}
    for record in rows:                                   # the id still says which entry it was
        assert record["question"] == f"question {record['id'].split('-')[-1]}?"
    numbers = [int(r["id"].split("-")[-1]) for r in rows]
    assert numbers == sorted(set(numbers)) and "80 beyond --limit" in capsys.readouterr().out
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")
    assert len(lines(tmp_path / "a/test.jsonl")) == 2     # fewer rows than the limit: all of them


def test_no_answer_is_off_by_a_whole_row():
    """The header's promise, on counts that no limit divides."""
    counts = {"yes": 37, "no": 23, "red": 5, "blue": 1}
    records = [{"answer": a} for a, n in counts.items() for _ in range(n)]
    for limit in range(1, len(records) + 1):
        kept = Counter(r["answer"] for r in prepare.even_sample(records, limit))
        assert sum(kept.values()) == limit
        for answer, n in counts.items():
            assert abs(kept[answer] - n * limit / len(records)) < 1


@pytest.mark.parametrize("limit", ["0", "-3", "many"])
def test_limit_must_be_positive(source, tmp_path, capsys, limit):
    with pytest.raises(SystemExit):
        convert(source, tmp_path / "out", "--limit", limit)
    assert "--limit" in capsys.readouterr().err


# ---- what is refused ---------------------------------------------------------------------------

def test_missing_picture_names_file_and_entry(source, tmp_path):
    (source / "data/train/images/3.png").unlink()
    message = refused(source, tmp_path / "out")
    assert "train/questions.json: entry 3" in message and "images/3.png" in message
    assert not (tmp_path / "out").exists()                # refused before the first byte


def test_limit_does_not_hide_a_missing_picture(source, tmp_path):
    """The whole file is checked before it is sampled, so a small trial run finds the damage."""
    edit(source, TRAIN + [["is there a circle?", "yes", 99]])
    with pytest.raises(SystemExit, match="entry 4 .*99.png"):
        convert(source, tmp_path / "out", "--limit", "1")


def test_malformed_json_names_file_line_and_column(source, tmp_path):
    """A download that stopped early: the text ends inside the second entry."""
    path = edit(source, TRAIN)
    path.write_text('[["is there a circle?", "yes", 0],\n ["cut of')
    assert f"{path}:2:3: not JSON" in refused(source, tmp_path / "out")


def test_bytes_that_are_not_text_name_the_file(source, tmp_path):
    path = edit(source, TRAIN)
    path.write_bytes(b'[["caf\xe9", "yes", 0]]')
    assert f"{path}: byte 6 is not UTF-8" in refused(source, tmp_path / "out")


@pytest.mark.parametrize("entry", [["question?", "yes"], ["question?", "yes", "0"],
                                   ["question?", 2, 0], ["question?", "yes", True], "question?"])
def test_entry_of_another_shape(source, tmp_path, entry):
    """True among them: to isinstance() it is an int, and would be read as picture 1."""
    edit(source, TRAIN + [entry])
    assert "entry 4 (counting from 0)" in refused(source, tmp_path / "out")


@pytest.mark.parametrize("content, part", [({"questions": []}, "holds a dict"),
                                           ([], "no usable rows among 0 entries"),
                                           ([["q?", " ", 0]], "no usable rows among 1 entries")])
def test_file_without_rows(source, tmp_path, content, part):
    edit(source, content, "test")
    assert part in refused(source, tmp_path / "out")


def test_two_answers_to_one_question_about_one_picture(source, tmp_path):
    edit(source, TRAIN + [["is there a circle?", "no", 0]])
    message = refused(source, tmp_path / "out")
    assert "entry 4" in message and "entry 1 with 'yes'" in message


def test_broken_picture(source, tmp_path):
    """Cut in the middle of its pixels: the header is whole, so only decoding notices."""
    path = source / "data/train/images/1.png"
    path.write_bytes(path.read_bytes()[:60])
    assert f"{path}: not a readable picture" in refused(source, tmp_path / "out")


@pytest.mark.parametrize("gone", ["train/questions.json", "test/questions.json", "test/images"])
def test_missing_part_says_what_and_how_to_get_it(source, tmp_path, gone):
    (source / "data" / gone).rename(tmp_path / "elsewhere")
    message = refused(source, tmp_path / "out")
    assert gone in message and "pip install easy-vqa" in message


def test_two_copies_equally_near_are_not_guessed_between(source, tmp_path):
    other = tmp_path / "other" / "data" / "train"
    other.mkdir(parents=True)
    (other / "questions.json").write_text("[]")
    assert "could both be meant" in refused(tmp_path, tmp_path / "out")


# ---- no --source -------------------------------------------------------------------------------

def test_installed_package_is_found_but_not_imported(source, tmp_path, monkeypatch):
    """The package's own code would stop the run: that it goes through shows nobody ran it."""
    (source / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    prepare.main(["easy-vqa", "--out", str(tmp_path / "out")])
    assert len(lines(tmp_path / "out/train.jsonl")) == 4


def test_absent_package_is_said_even_beside_our_own_output(source, tmp_path, monkeypatch):
    """A script's folder is on its path, and data/easy_vqa, the usual --out, lies in it: Python
    takes that folder for a package without code. It must not count as the data set."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])     # tmp_path/easy_vqa has no __init__.py
    with pytest.raises(FileNotFoundError, match="no package easy_vqa .*pip install easy-vqa"):
        prepare.find_easy_vqa()


# ---- an OUT that exists ------------------------------------------------------------------------

def test_second_run_gives_the_same_files_and_leaves_others_alone(source, tmp_path):
    """Cues are written beside the records and name the same pictures: neither may be lost."""
    out = tmp_path / "out"
    convert(source, out)
    (out / "train.cues.jsonl").write_text("hours of work\n")
    before = snapshot(out)
    convert(source, out)
    assert snapshot(out) == before
    convert(source, out, "--limit", "1")                  # fewer rows; no picture goes away
    assert len(lines(out / "train.jsonl")) == 1
    assert snapshot(out).keys() == before.keys()


def test_killed_run_leaves_the_old_records_whole(source, tmp_path, monkeypatch):
    """Stopped just before the rename, the moment when a half-written file would be in place."""
    out = tmp_path / "out"
    convert(source, out)
    before = snapshot(out)
    edit(source, TRAIN[:2])

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        convert(source, out)
    after = snapshot(out)
    assert {k: v for k, v in after.items() if k.suffix != ".tmp"} == before
    monkeypatch.undo()
    convert(source, out)
    assert len(lines(out / "train.jsonl")) == 2 and not list(out.rglob("*.tmp"))


def test_picture_that_would_change_is_refused(source, tmp_path):
    """Cues written from the old picture would otherwise be about a picture they never saw."""
    out = tmp_path / "out"
    convert(source, out)
    before = snapshot(out)
    Image.new("RGB", (64, 64), "blue").save(source / "data/train/images/1.png")
    with pytest.raises(SystemExit, match="train/1.png exists and differs"):
        convert(source, out)
    assert snapshot(out) == before


@pytest.mark.parametrize("content", ['{"source": "toy"}\n', "not json\n", "[]\n", ""])
def test_records_of_another_data_set_are_not_overwritten(source, tmp_path, content):
    """Somebody typed the toy world's folder after --out."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "test.jsonl").write_text(content)
    with pytest.raises(SystemExit, match="test.jsonl exists and does not start with a record"):
        convert(source, out)
    assert snapshot(out) == {Path("test.jsonl"): content.encode()}


# ---- geometry3k, vision-r1 and jsonl: fabricated files in the published layouts ----------------

def picture(shade, kind="PNG", size=(40, 30), **more):
    """An encoded picture, another one for each shade."""
    file = io.BytesIO()
    Image.new("RGB", size, (shade, 80, 160)).save(file, kind, **more)
    return file.getvalue()


GEOMETRY = [("<image>Find x.", r"2 \SQRT { 221 }"), ("<image>Find y. ", "145"),
            ("<image>Find the area.", r"\frac { 9 \pi } { 2 }"), ("<image>Find x.", "374.1")]


def export(folder, split="train", rows=GEOMETRY, **more):
    """The exported layout: DIR/train.jsonl and the pictures that it names; return the file."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    path = folder / f"{split}.jsonl"
    with path.open("w") as file:
        for n, (problem, answer) in enumerate(rows):
            (folder / f"images/{split}{n}.png").write_bytes(picture(n))
            file.write(json.dumps({"images": [f"images/{split}{n}.png"], "problem": problem,
                                   "answer": answer, **more}) + "\n")
    return path


def parquet(path, rows, columns=("images", "problem", "answer")):
    """The hub's layout: a picture is a struct of its bytes and of its name at the uploader's."""
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"images": [[{"bytes": p, "path": "/home/them/img_diagram.png"} for p in row[0]]
                          for row in rows]}
    content |= {c: [row[i] for row in rows] for i, c in enumerate(columns) if c != "images"}
    pyarrow.parquet.write_table(pyarrow.table(content), path)
    return path


def run(*command):
    """Run the command line in this process."""
    prepare.main([str(part) for part in command])


def fails(*command):
    """Run the command line, which must fail with one line; return the line."""
    with pytest.raises(SystemExit) as failure:
        run(*command)
    return str(failure.value)


def test_exported_folder_becomes_records_that_load(tmp_path, capsys):
    """Golds in one spelling, placeholders gone, splits apart, and records.py takes the result."""
    export(tmp_path / "in")
    export(tmp_path / "in", "test", GEOMETRY[:1])
    export(tmp_path / "in", "validation", GEOMETRY[1:2])
    (tmp_path / "in/train.cues.jsonl").write_text("{}\n")             # not a split
    run("geometry3k", "--source", tmp_path / "in", "--out", tmp_path / "out")
    rows = records.load(tmp_path / "out/train.jsonl")
    assert [(r["question"], r["answer"]) for r in rows] == [
        ("Find x.", r"2\sqrt{221}"), ("Find y.", "145"),
        ("Find the area.", r"\frac{9\pi}{2}"), ("Find x.", "374.1")]
    assert [r["id"] for r in rows] == [f"geometry3k-train-{n}" for n in range(4)]
    for n, row in enumerate(rows):
        assert Path(row["images"][0]).read_bytes() == picture(n)
    for split in ("test", "validation"):
        [row] = records.load(tmp_path / f"out/{split}.jsonl")
        assert row["id"] == f"geometry3k-{split}-0" and f"images/{split}/" in row["images"][0]
    shown = capsys.readouterr().out
    for part in ("4 train rows, the data card says 2101", "kinds     LaTeX 2, number 2",
                 "14 characters of question", "4 of 40x30", "smallest 40x30, largest 40x30",
                 "1 capital LaTeX command in small letters (first:", "2 blanks of tokenised LaTeX",
                 "not read  train.cues.jsonl"):
        assert part in shown


def test_parquet_gives_the_records_of_the_exported_folder(tmp_path):
    """Two shards under data/, the optional columns there: same ids, same golds, same pictures."""
    rows = [([picture(n)], problem, answer, n, ["1", answer], "B")
            for n, (problem, answer) in enumerate(GEOMETRY)]
    columns = ("images", "problem", "answer", "id", "choices", "ground_truth")
    for n, part in enumerate((rows[:3], rows[3:])):
        parquet(tmp_path / f"hub/data/train-0000{n}-of-00002.parquet", part, columns)
    export(tmp_path / "in")
    for source in ("hub", "in"):
        run("geometry3k", "--source", tmp_path / source, "--out", tmp_path / f"out-{source}")
    assert snapshot(tmp_path / "out-hub") == snapshot(tmp_path / "out-in")


def test_vision_r1_parquet(tmp_path, capsys):
    """Wrapped letters, two pictures a row, a JPEG, a repeat, two golds for one question."""
    one, two, jpeg = picture(1), picture(2), picture(3, "JPEG")
    parquet(tmp_path / "in/train.parquet", [
        ([one], "<image>Which?\nA. 1\nB. 2", "<answer>B</answer>"),
        ([one, two], "Compare <image> and <image>.", "equal"), ([jpeg], "<image> How many?", "7"),
        ([one], "<image>Which?\nA. 1\nB. 2", "B"),
        ([two], "<image>How long?", "5"), ([two], "<image>How long?", "6")])
    parquet(tmp_path / "in/test.parquet", [([one], "<image>Which?", "B")] * 2)
    run("vision-r1", "--source", tmp_path / "in", "--out", tmp_path / "out")
    rows = records.load(tmp_path / "out/train.jsonl")
    assert [r["answer"] for r in rows] == ["B", "equal", "7"]
    assert rows[1]["question"] == "Compare and." and len(rows[1]["images"]) == 2
    assert rows[1]["images"][0] == rows[0]["images"][0]               # written once
    assert rows[2]["images"][0].endswith(".jpg")
    assert len(list((tmp_path / "out/images/train").iterdir())) == 3
    assert len(records.load(tmp_path / "out/test.jsonl")) == 2        # a score is out of all rows
    shown = capsys.readouterr().out
    for part in ("1 repeat of an earlier row (first: vision-r1-train-3)",
                 "2 same question and pictures, another answer",
                 "1 <image> taken out of the middle of the question",
                 "1 wrapper around the answer taken off"):
        assert part in shown


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow" in fails("vision-r1", "--source", tmp_path,
                                          "--out", tmp_path / "out")


def test_git_lfs_pointer_is_named(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "train.parquet").write_text("version https://git-lfs.github.com/spec/v1\n")
    message = fails("vision-r1", "--source", tmp_path, "--out", tmp_path / "out")
    assert "train.parquet" in message and "Git LFS pointer" in message


@pytest.mark.parametrize("problem, part", [("Find x.", "0 <image> placeholders but 1 pictures"),
                                           ("<image><image>?", "2 <image> placeholders but 1")])
def test_placeholders_and_pictures_must_match(tmp_path, problem, part):
    path = export(tmp_path / "in", rows=[GEOMETRY[0], (problem, "1")])
    message = fails("geometry3k", "--source", tmp_path / "in", "--out", tmp_path / "out")
    assert f"{path}:2: {part}" in message and not (tmp_path / "out").exists()


@pytest.mark.parametrize("row, part", [
    ({"images": ["images/gone.png"]}, "no picture 'images/gone.png'"),
    ({"images": ["../secret.png"]}, "lies outside"),
    ({"images": [7]}, "no picture can be made of"),
    ({"answer": ["1", "2"]}, "neither a text nor a number"), ({"images": None}, "but 0 pictures")])
def test_damaged_rows_name_file_and_line(tmp_path, row, part):
    path = export(tmp_path / "in")
    (tmp_path / "secret.png").write_bytes(picture(0))
    with path.open("a") as file:
        file.write(json.dumps({"images": ["images/train0.png"], "problem": "<image>?",
                               "answer": "1", **row}) + "\n")
    message = fails("geometry3k", "--source", tmp_path / "in", "--out", tmp_path / "out")
    assert f"{path}:5" in message and part in message


def test_undecodable_thin_and_blank_rows_are_left_out_and_counted(tmp_path, capsys):
    """Nobody can mend a row of a published file, so it costs that row and not the whole run."""
    path = export(tmp_path / "in", rows=[*GEOMETRY, ("<image>Find z.", " "), ("<image>", "3"),
                                        ("<image>Find w.", float("nan")), ("<image>?", None)])
    (tmp_path / "in/images/train1.png").write_bytes(picture(1)[:50])
    (tmp_path / "in/images/train2.png").write_bytes(picture(2, size=(402, 2)))
    run("geometry3k", "--source", tmp_path / "in", "--out", tmp_path / "out")
    assert [r["id"][-1] for r in lines(tmp_path / "out/train.jsonl")] == ["0", "3"]
    shown = capsys.readouterr().out
    for part in (f"1 undecodable picture (first: {path}:2)", f"4 blank question or answer (first: "
                 f"{path}:5)", "1 picture too thin for Qwen3-VL"):
        assert part in shown


@pytest.mark.parametrize("names, part", [
    (["train-00000-of-00002.jsonl"], "is one missing"),
    (["train.json", "train.jsonl"], "two copies"),
    (["data.jsonl"], "no train, validation or test file")])
def test_split_files_that_are_not_whole(tmp_path, names, part):
    for name in names:
        (tmp_path / name).write_text("[]")
    assert part in fails("vision-r1", "--source", tmp_path, "--out", tmp_path / "out")


def test_a_file_of_another_name_needs_its_split(tmp_path):
    path = export(tmp_path / "in").rename(tmp_path / "in/part.jsonl")
    assert "--split" in fails("vision-r1", "--source", path, "--out", tmp_path / "out")
    run("vision-r1", "--source", path, "--out", tmp_path / "out", "--split", "test")
    assert [p.name for p in (tmp_path / "out").glob("*.jsonl")] == ["test.jsonl"]


def test_answer_that_contradicts_ground_truth_is_counted(tmp_path, capsys):
    export(tmp_path / "in", rows=[("<image>Find x.", r"2 \SQRT { 3 }")], ground_truth="A",
           choices=[r"2 \sqrt { 3 }", "4"])
    export(tmp_path / "in", "test", [("<image>Find x.", "5")], ground_truth="B",
           choices=["5", "4"])
    run("geometry3k", "--source", tmp_path / "in", "--out", tmp_path / "out")
    train, test = capsys.readouterr().out.split("test.jsonl: ")
    assert "ground_truth" not in train and "1 answer is not the choice that ground_truth" in test
    assert "options" not in lines(tmp_path / "out/train.jsonl")[0]    # the question shows none


def test_jsonl_with_other_names(tmp_path, capsys):
    """Fields by flags, pictures from another folder, options that the question does not show."""
    (tmp_path / "pics").mkdir()
    (tmp_path / "pics/a.png").write_bytes(picture(1))
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in (
        {"q": "Which one?", "gold": "B", "img": "a.png", "n": 7, "choices": ["red", "blue"]},
        {"q": "How many?", "gold": 3, "img": [], "n": 8, "hint": "Two and one."})))
    command = ["jsonl", "--source", path, "--out", tmp_path / "out", "--pictures",
               tmp_path / "pics", "--question-field", "q", "--answer-field", "gold", "--id-field",
               "n", "--images-field", "img", "--options-field", "choices"]
    run(*command, "--cue-field", "hint")
    assert lines(tmp_path / "out/train.jsonl") == [
        {"id": "7", "images": [f"images/train/{hash_name(picture(1))}.png"],
         "question": "Which one?\nA. red\nB. blue", "answer": "B",
         "options": {"A": "red", "B": "blue"}, "source": "mine"},
        {"id": "8", "images": [], "question": "How many?", "answer": "3", "cue": "Two and one.",
         "source": "mine"}]
    records.load(tmp_path / "out/train.jsonl")
    assert "1 options written under the question" in capsys.readouterr().out
    assert f"{path}:1: no field 'uid'" in fails(*command, "--id-field", "uid")
    assert "no row has anything in the field 'hnit'" in fails(*command, "--cue-field", "hnit")
    message = fails("jsonl", "--source", path, "--out", tmp_path / "out")
    assert f"{path}:1: no field 'question', the row has 'q', 'gold'" in message


def hash_name(content):
    return hashlib.sha256(content).hexdigest()[:20]


def test_jsonl_never_overwrites_its_source_and_refuses_repeated_ids(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"question": "q?", "answer": "1", "id": 3}\n' * 2)
    plain = ["--source", path, "--images-field", ""]
    assert "would be overwritten" in fails("jsonl", *plain, "--out", tmp_path)
    message = fails("jsonl", *plain, "--out", tmp_path / "out", "--id-field", "id")
    assert f"{path}:2: id '3' stands at {path}:1 already" in message


def test_longest_prompt_in_tokens_of_a_model(tmp_path, capsys, loaded):
    """The number that decides --max-prompt-tokens, counted by what builds the prompts."""
    export(tmp_path / "in")
    run("geometry3k", "--source", tmp_path / "in", "--out", tmp_path / "out", "--model", qwen.TINY)
    lengths = {r["id"]: loaded[1].length(r) for r in records.load(tmp_path / "out/train.jsonl")}
    longest = max(lengths, key=lengths.get)
    assert f"; {lengths[longest]} tokens with pictures, {longest}" in capsys.readouterr().out


def test_limit_writes_the_pictures_of_its_rows_only_and_twice_the_same(tmp_path):
    export(tmp_path / "in")
    for _ in range(2):
        run("geometry3k", "--source", tmp_path / "in", "--out", tmp_path / "out", "--limit", 2)
        assert len(lines(tmp_path / "out/train.jsonl")) == 2
        assert len(list((tmp_path / "out/images/train").iterdir())) == 2


# ---- tidy.py: answers, placeholders ------------------------------------------------------------

TIDY = {r"2 \SQRT { 221 }": r"2\sqrt{221}", r"\FRAC { 26 } { 3 }": r"\frac{26}{3}",
        r"12 \PI": r"12\pi", r"\frac { 9 \sqrt { 3 } } { 2 }": r"\frac{9\sqrt{3}}{2}",
        r"<answer> $\boxed{\text{5 cm}}$ </answer>": r"\text{5 cm}", r"30 ^ \circ": r"30^\circ",
        r"\sqrt [ 3 ] { 8 }": r"\sqrt[ 3 ]{8}", r"\pi r": r"\pi r", r"\Delta ABC": r"\Delta ABC",
        r"\boxed{1}+\boxed{2}": r"\boxed{1}+\boxed{2}", "$1$ or $2$": "$1$ or $2$",
        r"5\ cm": r"5\ cm", r"6 \AA": r"6\AA", r"the angle \theta": r"the angle \theta",
        "N 34° W": "N 34° W", r"12 \text{ or } 5": r"12 \text{ or } 5", "a _ b": "a _ b",
        "<answer>A</answer> or <answer>B</answer>": "<answer>A</answer> or <answer>B</answer>"}


@pytest.mark.parametrize("answer", TIDY)
def test_tidied_answers(answer):
    tidied, changes = tidy.tidy_answer(answer)
    assert tidied == TIDY[answer] and bool(changes) == (tidied != answer)
    assert grade(rf"\boxed{{{tidied}}}", answer).correct or "or" in answer     # means the same


def test_tidying_twice_changes_nothing_more_and_hostile_text_takes_no_time():
    pieces = [r"\SQRT", r"\pi", "{", "}", " ", "  ", "2", "x", "^", "_", "[", "]", "\\ ", r"\{",
              "$", r"\text{ a b }", r"\boxed{", "<answer>", "</answer>", "\\"]
    chance = random.Random(0)
    for _ in range(3000):
        once, _ = tidy.tidy_answer("".join(chance.choices(pieces, k=9)))
        assert tidy.tidy_answer(once) == (once, [])
    start = time.perf_counter()
    for text in (r"\boxed{" * 20000 + "}" * 20000, "{ " * 990, "<answer>" * 249,
                 " " * 10**5 + "}"):
        tidy.tidy_answer(text)
        tidy.answer_kind(text)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("problem, question, inside", [
    ("<image>\nFind x.", "Find x.", False), ("Find x. <image>", "Find x.", False),
    ("In <image>, find x.", "In, find x.", True), ("<image> <image>a", "a", False)])
def test_placeholders(problem, question, inside):
    pictures = problem.count("<image>")
    assert tidy.take_placeholders(problem, pictures, "here") == (question, inside)


def test_placeholders_may_be_absent_but_never_wrong_in_number():
    """The jsonl command: most people write none, but two for one picture is a mistake."""
    assert tidy.take_placeholders("Why?", 1, "here", required=False) == ("Why?", False)
    for required in (True, False):
        with pytest.raises(ValueError, match="^here: 2 <image> placeholders but 1 pictures"):
            tidy.take_placeholders("<image><image>", 1, "here", required)


# ---- sources.py: what a picture cell may hold --------------------------------------------------

def test_every_disguise_of_a_picture(tmp_path):
    content = picture(5)
    (tmp_path / "a.png").write_bytes(content)
    text = base64.b64encode(content).decode()
    for cell in (content, "a.png", text, f"data:image/png;base64,{text}", {"path": "a.png"},
                 {"bytes": content, "path": "x.png"}, {"bytes": None, "path": "a.png"}, ["a.png"],
                 f"['{text}']", '["a.png"]', [{"bytes": text}]):
        [found] = sources.contents(cell, [tmp_path / "no", tmp_path], "here")
        assert sources.read(found) == content and sources.decode(found).size == (40, 30)
    for cell in (None, "", [], b"", {"bytes": None, "path": None}):
        assert sources.contents(cell, [tmp_path], "here") == []
    for cell in ("[open('x')]", "no base64!", 3, {"url": "x"}):
        with pytest.raises(ValueError, match="^here: "):
            sources.contents(cell, [tmp_path], "here")


def test_tsv_is_read_as_text_and_leaves_the_csv_module_as_it_was(tmp_path):
    """pandas would make None a missing value and 01 a 1.0; a picture is longer than csv allows."""
    path = tmp_path / "a.tsv"
    path.write_text('index\tA\tB\timage\n01\tNone\t"two\nlines"\t' + "x" * 200_000 + "\n")
    before = csv.field_size_limit()
    [(where, row)] = sources.rows(path)
    assert (row["index"], row["A"], row["B"]) == ("01", "None", "two\nlines")
    assert csv.field_size_limit() == before and "row 0 (counting from 0)" in where
    path.write_text("index\tA\n1\n")
    with pytest.raises(ValueError, match="row 0 .*not as many cells"):
        list(sources.rows(path))


# ---- text that JSON or a converter spoilt ------------------------------------------------------

def test_records_without_pictures_go_into_a_new_folder(tmp_path):
    """The folder was made by the first picture, so without one the last step failed: no such file
    train.jsonl.tmp, after all rows had been read."""
    (tmp_path / "in.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    run("jsonl", "--source", tmp_path / "in.jsonl", "--images-field", "", "--out",
        tmp_path / "new/deeper")
    assert records.load(tmp_path / "new/deeper/train.jsonl")[0]["images"] == []


def test_latex_with_one_backslash_in_json_is_mended(tmp_path, capsys):
    r"""JSON reads "\frac{1}{2}" as a form feed and rac{1}{2}; so the gold was never matched."""
    (tmp_path / "in.jsonl").write_text(
        r'{"question": "Find \theta\tin $2 \times \beta$\nor \rho.", "answer": "\frac{1}{2}",'
        r' "options": {"A": "\frac{1}{2}", "B": "\\frac{1}{3}"}, "cue": "It reads \text{cm}."}')
    run("jsonl", "--source", tmp_path / "in.jsonl", "--images-field", "", "--out", tmp_path / "out")
    [row] = records.load(tmp_path / "out/train.jsonl")
    assert row["question"].startswith("Find \\theta\tin $2 \\times \\beta$\nor \\rho.")
    assert row["answer"] == row["options"]["A"] == r"\frac{1}{2}" and "\f" not in row["question"]
    assert row["options"]["B"] == r"\frac{1}{3}" and row["cue"] == r"It reads \text{cm}."
    assert f"4 {tidy.ESCAPED}" in capsys.readouterr().out


@pytest.mark.parametrize("answer", [r"\foo{1}", r"1\b", r"\bat"])
def test_control_characters_of_no_known_command_are_refused(tmp_path, answer):
    path = tmp_path / "in.jsonl"
    path.write_text('{"question": "q?", "answer": "1"}\n'
                    '{"question": "q?", "answer": "%s"}' % answer)
    message = fails("jsonl", "--source", path, "--images-field", "", "--out", tmp_path / "out")
    assert f"{path}:2: answer: a control character" in message and "two backslashes" in message


@pytest.mark.parametrize("text", ["a\tan apple", "a\ttext", "line\nless", "one\r\ntwo", "\tto",
                                  "a\ttimesheet", r"\frac{1}{2}", "\nequal"])
def test_tabs_and_line_breaks_that_are_meant_stay(text):
    assert tidy.mend_escapes(text, "here") == (text, False)


def test_a_literal_placeholder_never_reaches_a_prompt(tmp_path):
    """MMMU numbers its marks, "<image 1>"; an option that is a mark shows nothing."""
    assert tidy.take_placeholders("In <image 1>, why?", 1, "here") == ("In, why?", True)
    path = tmp_path / "in.jsonl"
    row = {"question": "Which? <image>", "answer": "A", "images": []}
    for change, part in (({}, "1 <image> placeholders but 0 pictures"),
                         ({"question": "Which?", "options": ["<image>", "2"]},
                          "an option holds an <image> mark")):
        path.write_text(json.dumps(row | change))
        message = fails("jsonl", "--source", path, "--out", tmp_path / "out")
        assert f"{path}:1" in message and part in message
