"""data/prepare.py on a made-up easy-VQA of six tiny pictures: no download, no installed package.

    OMP_NUM_THREADS=1 python -m pytest -q tests/test_prepare.py

Each test builds its own source folder in the real layout, breaks at most one thing, and looks at
the files that come out or at the message that refuses. `prepare.py` is loaded by its path, since
`data` is a folder of scripts and no package.
"""

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

SCRIPT = Path(__file__).resolve().parent.parent / "data" / "prepare.py"
spec = importlib.util.spec_from_file_location("prepare", SCRIPT)
prepare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prepare)

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
