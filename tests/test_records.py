"""data/records.py: a good file loads, and everything wrong is refused with file and line."""
import base64
import json
import os
import re

import pytest
from PIL import Image

from data import records, toy

GOOD = {"id": "a", "images": ["images/1.png"], "question": "How many?", "answer": "2"}


@pytest.fixture
def folder(tmp_path):
    """A folder `set` with one picture, and another picture outside of it."""
    (tmp_path / "set" / "images").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "set" / "images" / "1.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    return tmp_path / "set"


def write(folder, *lines):
    """Records or raw lines to a file; a good record stands before them, on line 1."""
    path = folder / "train.jsonl"
    lines = [json.dumps({**GOOD, "id": "first"}), *lines]
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else
                                (line if isinstance(line, str) else json.dumps(line)).encode()
                                for line in lines))
    return path


def refused(path, message, needs=(), line=2):
    """The error must begin with FILE:LINE: and say what is wrong."""
    with pytest.raises(ValueError) as error:
        records.load(path, needs)
    text = str(error.value)
    assert text.startswith(f"{path}:{line}: "), text
    assert re.search(message, text), text
    assert len(text) < 400, "an error is read by a person"


def test_a_good_file_loads(folder):
    """Optional and unknown fields are kept, blank lines skipped, a picture twice is fine."""
    full = {**GOOD, "images": ["images/1.png", "./images/1.png"], "cue": "c", "rationale": "r",
            "options": ["x", "y"], "source": "toy", "kind": "number", "objects": [1]}
    text = {**GOOD, "id": "b", "images": [], "question": "Zürich\u2028圆?", "options": {"A": "x"}}
    path = write(folder, "", full, "   ", json.dumps(text, ensure_ascii=False), "", "")
    first, second, third = records.load(path)
    picture = str(folder / "images" / "1.png")
    assert second == {**full, "images": [picture, picture]}
    assert third == text and first["id"] == "first"
    assert records.load(str(path), needs=("answer",))[0] == first


def test_a_file_of_another_editor_loads(folder):
    """Windows line ends, and a byte order mark at the start."""
    path = write(folder, {**GOOD}, "")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert [r["id"] for r in records.load(path)] == ["first", "a"]


def test_paths_are_relative_to_the_file_not_to_the_shell(folder, monkeypatch):
    write(folder)
    monkeypatch.chdir(folder.parent)
    loaded, = records.load("set/train.jsonl")
    assert os.path.isabs(loaded["images"][0]) and os.path.isfile(loaded["images"][0])


@pytest.mark.parametrize("field", ["id", "images", "question", "answer"])
def test_a_missing_field_is_refused(folder, field):
    refused(write(folder, {k: v for k, v in GOOD.items() if k != field}), f"'{field}' is missing")


@pytest.mark.parametrize("field, value, kind", [
    ("id", 5, "int"), ("images", "images/1.png", "str"), ("images", None, "NoneType"),
    ("question", ["x"], "list"), ("answer", 2, "int"), ("answer", None, "NoneType"),
    ("cue", 1.5, "float"), ("rationale", None, "NoneType"), ("options", "A", "str"),
    ("source", {}, "dict"), ("kind", True, "bool")])
def test_a_field_of_the_wrong_type_is_refused(folder, field, value, kind):
    refused(write(folder, {**GOOD, field: value}), f"field '{field}' is a {kind}: ")


@pytest.mark.parametrize("line, message", [
    ('{"id": "a", ', "not valid JSON"), ("id: a", "not valid JSON"), ("[]", "a list, expected"),
    ("null", "a NoneType, expected"), ("7", "an? int, expected"),
    (json.dumps(GOOD)[:-1] + "} {}", "not valid JSON"),
    (json.dumps({**GOOD, "answer": "Zürich"}, ensure_ascii=False).encode("latin-1"),
     "not valid JSON.*utf-8")])
def test_a_line_that_is_no_json_object_is_refused(folder, line, message):
    """Also one in another encoding, which broke the reading of the file before a line was
    known."""
    refused(write(folder, line), message)


def test_a_picture_as_base64_is_refused(folder):
    """Other data sets hold the picture itself there; the file system said "File name too long", to
    no line in particular and with the whole picture in the message."""
    data = base64.b64encode((folder / "images" / "1.png").read_bytes() * 100).decode()
    refused(write(folder, {**GOOD, "images": [data]}), r"picture '\S{80}' ")


@pytest.mark.parametrize("name, message", [
    ("images/2.png", "'images/2.png' does not exist"), ("images", "does not exist"),
    ("", "does not exist"), (3, "picture 3 is not a path"), (None, "None is not a path"),
    ("images/\0.png", r"picture 'images/\\x00.png'")])
def test_a_picture_that_is_no_file_is_refused(folder, name, message):
    refused(write(folder, {**GOOD, "images": ["images/1.png", name]}), message)


def test_a_picture_outside_the_folder_is_refused(folder):
    """Upwards, absolute, through a link, or in a neighbour whose name begins alike."""
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    (folder / "linked").symlink_to(folder.parent)
    (folder.parent / "set2").mkdir()
    (folder.parent / "set2" / "1.png").write_bytes(b"x")
    for name in ("../secret.png", "images/../../secret.png", str(folder.parent / "secret.png"),
                 "link.png", "linked/secret.png", "../set2/1.png", "/etc/hostname"):
        refused(write(folder, {**GOOD, "images": [name]}), f"{re.escape(repr(name))} lies outside")


def test_links_that_stay_inside_are_fine(folder):
    """Also a link in a circle is an error with a line, and not a crash."""
    (folder / "inside.png").symlink_to(folder / "images" / "1.png")
    inside = [str(folder / "inside.png"), "inside.png"]
    assert len(records.load(write(folder, {**GOOD, "images": inside}))) == 2
    (folder / "circle.png").symlink_to(folder / "circle.png")
    refused(write(folder, {**GOOD, "images": ["circle.png"]}), "picture 'circle.png'")


def test_an_id_that_stands_twice_is_refused(folder):
    refused(write(folder, GOOD, "", {**GOOD, "id": "b"}, GOOD), "id 'a' stands on line 2 already",
            line=5)


@pytest.mark.parametrize("question", ["", " \n "])
def test_an_empty_question_is_refused(folder, question):
    refused(write(folder, {**GOOD, "question": question}), "question is empty")


@pytest.mark.parametrize("value", [None, "", "  "])
def test_a_missing_privilege_is_refused_before_training(folder, value):
    """A run must not die of line 8,000 after an hour, nor train with a teacher that knows
    nothing."""
    told = {"cue": "one"}
    path = write(folder, {**GOOD, **({} if value is None else {"cue": value})})
    path.write_text(path.read_text().replace('"first"', '"first", "cue": "here"', 1))
    refused(path, "needs 'cue'.*--privilege", needs=("cue",))
    assert len(records.load(write(folder, {**GOOD, **told}))) == 2, "nothing is needed by default"


def test_a_file_without_records_is_refused(folder):
    path = folder / "empty.jsonl"
    for text in ("", "\n \n"):
        path.write_text(text)
        with pytest.raises(ValueError, match="empty.jsonl: no records"):
            records.load(path)


def test_no_file_and_a_folder_are_refused(folder):
    with pytest.raises(FileNotFoundError, match="other.jsonl: no such record file$"):
        records.load(folder / "other.jsonl")
    with pytest.raises(FileNotFoundError, match="no such record file.*mean .*train.jsonl"):
        records.load(folder)


def test_frames_of_a_video_are_checked_like_pictures(tmp_path):
    (tmp_path / "f").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "f" / "0.png")
    line = {"id": "a", "images": [], "question": "q", "answer": "1", "video": ["f/0.png"], "fps": 2}
    (tmp_path / "v.jsonl").write_text(json.dumps(line))
    assert records.load(tmp_path / "v.jsonl")[0]["video"] == [str(tmp_path / "f" / "0.png")]
    (tmp_path / "v.jsonl").write_text(json.dumps({**line, "video": ["../x.png"]}))
    with pytest.raises(ValueError, match="v.jsonl:1: .*outside"):
        records.load(tmp_path / "v.jsonl")


def test_two_first_runs_may_draw_the_toy_world_at_once(tmp_path, monkeypatch):
    """Both shared one temporary folder, and the second ended with "No such file": train/3.png."""
    whole = toy.draw

    def draw(scene, rng):                    # the other run finishes while this one draws
        if not (tmp_path / "toy").exists():
            monkeypatch.setattr(toy, "draw", whole)
            toy.write(tmp_path / "toy", 3, 1, replace=False)
            (tmp_path / "toy" / "read by the other run").touch()
        return whole(scene, rng)

    monkeypatch.setattr(toy, "draw", draw)
    toy.write(tmp_path / "toy", 3, 1, replace=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["toy"]
    assert len(list((tmp_path / "toy" / "images" / "train").iterdir())) == 3
    assert (tmp_path / "toy" / "read by the other run").exists()
