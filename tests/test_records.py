"""data/records.py: a good file loads, and everything wrong is refused with file and line."""
import base64
import json
import os
import re
import time

import pytest
from PIL import Image, PngImagePlugin

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
    """Upwards, absolute, or in a neighbour whose name begins alike."""
    (folder.parent / "set2").mkdir()
    (folder.parent / "set2" / "1.png").write_bytes(b"x")
    for name in ("../secret.png", "images/../../secret.png", str(folder.parent / "secret.png"),
                 "images/../../set/../secret.png", "../set2/1.png", "/etc/hostname"):
        refused(write(folder, {**GOOD, "images": [name]}), f"{re.escape(repr(name))} lies outside")


def test_links_of_the_owner_are_followed(folder):
    """A snapshot of the hub is nothing but links into its cache; all of them "lay outside"."""
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    (folder / "linked").symlink_to(folder.parent)
    (folder.parent / "snapshot").symlink_to(folder)
    (folder / "lost.png").symlink_to(folder / "nothing.png")
    names = ["link.png", "linked/secret.png"]
    write(folder, {**GOOD, "images": names})
    for place in (folder, folder.parent / "snapshot"):      # the folder itself may be a link
        loaded = records.load(place / "train.jsonl")[1]["images"]
        assert loaded == [str(place / name) for name in names]
        records.check_pictures([{**GOOD, "images": loaded}])
    refused(write(folder, {**GOOD, "images": ["linked/../../secret.png"]}), "lies outside")
    refused(write(folder, {**GOOD, "images": ["lost.png"]}), "does not exist .a link to nowhere.")


def test_links_that_stay_inside_are_fine(folder):
    """Also a link in a circle is an error with a line, and not a crash."""
    (folder / "inside.png").symlink_to(folder / "images" / "1.png")
    inside = [str(folder / "inside.png"), "inside.png"]
    assert len(records.load(write(folder, {**GOOD, "images": inside}))) == 2
    (folder / "circle.png").symlink_to(folder / "circle.png")
    refused(write(folder, {**GOOD, "images": ["circle.png"]}), "picture 'circle.png'")


VIDEO = {**GOOD, "images": [], "video": ["images/1.png"] * 2}


@pytest.mark.parametrize("record, message", [
    ({**VIDEO}, '"fps" or "seconds"'), ({**VIDEO, "video": [], "fps": 1}, "needs frames"),
    ({**VIDEO, "seconds": [0]}, "2 frames in 'video' but 1 times"),
    ({**VIDEO, "seconds": [0, "1"]}, "'seconds' is a str"),
    ({**VIDEO, "seconds": [0, True]}, "'seconds' is a bool"),
    ({**VIDEO, "fps": 0}, "'fps' is 0, must be above 0"), ({**VIDEO, "fps": True}, "is a bool"),
    ({**GOOD, "options": ["a", 2]}, "'options' is a int"),
    ({**GOOD, "options": {"A": None}}, "'options' is a NoneType"),
    ({**GOOD, "precision": 1.5}, "'precision' is a float"),
    ({**GOOD, "precision": -1}, "'precision' is -1"), ({**GOOD, "tolerance": -.1}, "negative"),
    ({**GOOD, "answer_kind": "letter"}, "'answer_kind' is 'letter', none of auto, choice"),
    ({**GOOD, "instruction": 1}, "'instruction' is a int"),
    ({**GOOD, "teacher_images": "images/1.png"}, "'teacher_images' is a str"),
    ({**GOOD, "teacher_images": ["../secret.png"]}, "lies outside")])
def test_fields_that_would_fail_late_are_refused(folder, record, message):
    """Wrong times ended the first evaluation with a traceback, a wrong kind the first grading."""
    refused(write(folder, record), message)


@pytest.mark.parametrize("value, word", [("NaN", "NaN"), ("-Infinity", "-Infinity"),
                                         ("1e999", "1e999"), ("9" * 400, "99999")])
def test_numbers_that_json_does_not_have_are_refused(folder, value, word):
    """Python reads NaN and turns 1e999 into infinity; times and rates then were NaN."""
    for line in ('"fps": %s', '"extra": {"deep": [1, %s]}'):
        refused(write(folder, json.dumps(GOOD)[:-1] + ", " + line % value + "}"),
                f"not valid JSON: {re.escape(word)}.* is not a number")


def test_half_a_character_is_refused_in_any_field(folder):
    """A lone surrogate passed every check, and the run ended when its answers were written."""
    for line in (json.dumps({**GOOD, "question": "a \ud83d b"}),
                 json.dumps({**GOOD, "x": ["\udc00"]}), json.dumps({**GOOD, "\ud83d": 1}),
                 json.dumps(GOOD).encode().replace(b"How", b"\xed\xa0\xbd")):
        refused(write(folder, line), "half a character|utf-8")
    assert records.load(write(folder, json.dumps({**GOOD, "question": "\U0001f600"})))


@pytest.mark.parametrize("latex, said", [
    (r"\frac{1}{2}", "frac"), (r"\theta", "theta"), (r"3 \times 4", "times"), (r"\beta", "beta"),
    (r"\boxed{1}", "boxed"), (r"\rho", "rho"), (r"\right)", "right"), (r"\text{cm}", "text"),
    (r"\triangle ABC", "triangle"), (r"\forall x", "forall"), (r"a \neq b", "neq")])
def test_latex_with_one_backslash_is_refused(folder, latex, said):
    r"""JSON reads \frac as a form feed and "rac": 1/2 was "rac{1}{2}", and graded wrong."""
    line = json.dumps(GOOD).replace('"2"', f'"{latex}"')
    refused(write(folder, line), rf"'answer' holds .*JSON makes of \\{said}.*write \\\\{said}")
    assert records.load(write(folder, line.replace("\\", "\\\\")))[1]["answer"] == latex
    refused(write(folder, {**GOOD, "options": ["x", json.loads(f'"{latex}"')]}), "'options' holds")


def test_other_latex_with_one_backslash_says_how_to_write_it(folder):
    r"""\sqrt is no escape of JSON at all."""
    line = json.dumps(GOOD).replace('"2"', r'"\sqrt{2}"')
    refused(write(folder, line), "two backslashes in JSON")


def test_long_names_do_not_fill_the_screen(folder):
    """Found by changing bytes at random: a name or an id of 4,000 characters was printed."""
    refused(write(folder, {**GOOD, "x" * 4000: "\ud800"}), "half a character")
    refused(write(folder, {**GOOD, "id": "x" * 4000}, {**GOOD, "id": "x" * 4000}), "already", line=3)
    refused(write(folder, b'{"a":' * 5000), "not valid JSON")


def test_the_kinds_of_answers_are_those_of_the_grader():
    from benchmarks.grade import KINDS
    assert set(records.ANSWER_KINDS) == set(KINDS)


def test_tabs_and_lines_of_ordinary_text_are_fine(folder):
    """Tables have tabs, questions have lines, some of them with the ends of Windows."""
    text = "Name\tage\nan ox\tan apple\r\nright?\ntimes:\tone\two\tauto\nequal\nnot\tangle"
    assert records.load(write(folder, {**GOOD, "question": text}))[1]["question"] == text


@pytest.mark.parametrize("mark", ["<image>", "<video>"])
def test_a_literal_picture_mark_is_refused(folder, mark):
    """Data for other trainers marks the place of its pictures; the model read it as text."""
    refused(write(folder, {**GOOD, "question": f"{mark}\nHow many?"}), f"literal {mark}")
    assert records.load(write(folder, {**GOOD, "question": "<image 1> or <img>?"}))


def test_new_fields_load(folder):
    record = {**GOOD, "instruction": "Box it.", "teacher_images": ["images/1.png"], "precision": 2,
              "answer_kind": "number", "tolerance": 0.01, "options": {"A": "x"}}
    got = records.load(write(folder, record))[1]
    assert got["teacher_images"] == [str(folder / "images" / "1.png")]
    refused(write(folder), "needs 'teacher_images'", needs=("teacher_images",), line=1)


# ---------------------------------------------------------------------------- the pictures

def broken_world(folder, count=7):
    """`count` records with a JPEG, a PNG and a frame each that are cut short, and good ones."""
    rows = []
    for n in range(count):
        for kind in ("jpg", "png"):
            path = folder / "images" / f"cut{n}.{kind}"
            Image.effect_noise((64, 48), 50).save(path)
            path.write_bytes(path.read_bytes()[:-300])
        rows.append({**GOOD, "id": f"r{n}", "images": ["images/1.png", f"images/cut{n}.jpg"],
                     "teacher_images": [f"images/cut{n}.png"]})
    return records.load(write(folder, *rows))


def test_a_picture_that_opens_but_does_not_decode_is_named_with_its_line(folder):
    """Headers were fine: the run ended at step 6, and so did every resume after it."""
    loaded = broken_world(folder)
    records.check_pictures(loaded, how="headers")
    with pytest.raises(ValueError) as error:
        records.check_pictures(loaded, workers=3)
    lines = str(error.value).split("\n")
    assert lines[0].startswith("14 of 15 pictures cannot be read") and lines[-1] == "  and 9 more"
    assert len(lines) == 7
    path = folder / "images" / "cut0.jpg"
    assert lines[1].startswith(f"  {folder / 'train.jsonl'}:2: record 'r0': {path}: ")
    assert "truncated" in lines[1]


def test_a_picture_of_no_known_format_fails_at_its_header(folder):
    (folder / "images" / "page.png").write_text("<html>404</html>")
    loaded = records.load(write(folder, {**GOOD, "images": ["images/page.png"]}))
    for how in ("decode", "headers"):
        with pytest.raises(ValueError, match="jsonl:2: record 'a': .*page.png: cannot identify"):
            records.check_pictures(loaded, how)
    with pytest.raises(ValueError, match="must be decode or headers"):
        records.check_pictures(loaded, "none")


def test_the_line_of_a_record_does_not_leak_into_what_is_written(folder):
    """It is known by the id alone, which stays a plain text to JSON and to comparisons."""
    first = records.load(write(folder))[0]
    assert first["id"].where == f"{folder / 'train.jsonl'}:1" and first["id"] == "first"
    assert json.dumps(first) == json.dumps({**GOOD, "id": "first", "images": first["images"]})


def test_huge_pictures_are_decoded_one_at_a_time(folder, monkeypatch):
    """Eight pictures of 108 megapixels at once would be 2.6 GB of pixels."""
    monkeypatch.setattr(records, "BIG", 10)
    running, most, load = [], [], Image.Image.load

    def slow(image):
        running.append(1)
        most.append(len(running))
        time.sleep(.01)
        running.pop()
        return load(image)

    names = [f"images/{n}.png" for n in range(2, 8)]
    for name in names:
        Image.new("RGB", (4, 4)).save(folder / name)
    loaded = records.load(write(folder, {**GOOD, "images": names}))
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", slow)
    records.check_pictures(loaded, workers=4)
    assert max(most) == 1 and len(most) == 7
    most.clear()
    monkeypatch.setattr(records, "BIG", 1000)
    records.check_pictures(loaded, workers=4)
    assert max(most) > 1, "small ones are decoded beside each other"


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


@pytest.mark.parametrize("pictures, said", [
    (None, "needs 'teacher_images'"), ([], "needs 'teacher_images'"), (["no.png"], "no.png")])
def test_a_missing_view_is_refused_by_file_and_line(folder, pictures, said):
    path = write(folder, {**GOOD, **({} if pictures is None else {"teacher_images": pictures})})
    path.write_text(path.read_text().replace(
        '"first"', f'"first", "teacher_images": {json.dumps(GOOD["images"])}', 1))
    refused(path, said, needs=("teacher_images",))


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
