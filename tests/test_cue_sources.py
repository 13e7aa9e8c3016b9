"""The converters that bring cues (nlvr.py, tabmwp.py, geometry3k.py) and the hub's download.

    OMP_NUM_THREADS=1 python -m pytest -q tests/test_cue_sources.py

Most tests write a tiny copy of a published layout. Those of real files skip where there are none
beside the checkout, and the hub is a server of this process.
"""
import doctest
import hashlib
import itertools
import json
import os
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from PIL import Image

from benchmarks.grade import grade
from conftest import ROOT
from data import geometry3k, nlvr, prepare, records, sources, tabmwp, tidy

REAL = ROOT.parent / "shared" / "real"
real = pytest.mark.skipif(not REAL.is_dir(), reason="no real files beside the checkout")


def convert(*command):
    prepare.main([str(part) for part in command])


def fails(*command):
    with pytest.raises(SystemExit) as failure:
        convert(*command)
    assert "\n" not in str(failure.value)
    return str(failure.value)


def paint(path, shade=0, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, 80, 160)).save(path)


@pytest.mark.parametrize("module", [nlvr, tabmwp, geometry3k, tidy])
def test_the_examples_in_the_docstrings(module):
    assert doctest.testmod(module).failed == 0 < doctest.testmod(module).attempted


# ---- NLVR --------------------------------------------------------------------------------------

CIRCLE = nlvr.thing("circle", "Yellow", 90, 45, 10)
BLOCKS = [nlvr.thing("square", colour, 40, y, 20) for colour, y in (("Black", 80), ("#0099ff", 59))]


def write_nlvr(folder, name, directory="3", label="true", orders=range(6), sentence="Ther is one."):
    """One more example of a split, and its pictures, each another one."""
    path = folder / name / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps({"sentence": sentence, "label": label, "identifier": "7-1",
                               "directory": directory,
                               "structured_rep": [[CIRCLE, CIRCLE], BLOCKS[:1], []]}) + "\n")
    for order in orders:
        paint(path.parent / f"images/{directory}/{name}-7-1-{order}.png", order)
    return path


def test_nlvr_has_a_record_a_picture_and_keeps_the_official_splits(tmp_path, capsys):
    """The sentence stays misspelt, the id says in which directory its like are."""
    write_nlvr(tmp_path / "in", "train")
    write_nlvr(tmp_path / "in", "dev", orders=[0, 5], label="false")
    convert("nlvr", "--source", tmp_path / "in", "--out", tmp_path / "out")
    train = records.load(tmp_path / "out/train.jsonl", needs=("cue",))
    assert [r["id"] for r in train] == [f"nlvr-train-3-7-1-{k}" for k in range(6)]
    assert {r["question"] for r in train} == {nlvr.ASKED + "Ther is one."}
    dev = records.load(tmp_path / "out/validation.jsonl")
    assert [r["id"] for r in dev] == ["nlvr-dev-3-7-1-0", "nlvr-dev-3-7-1-5"]
    assert {r["answer"] for r in train} == {"true"} and {r["answer"] for r in dev} == {"false"}
    assert "4 picture that is not in this copy (first:" in capsys.readouterr().out


def test_nlvr_cue_says_each_kind_once_and_every_edge():
    corner = nlvr.thing("triangle", "Black", 0, 0, 20)
    assert nlvr.cue([[CIRCLE, CIRCLE], [corner, *BLOCKS], []]) == (
        "One box holds two small yellow circles, at the right (touching the right edge) and at the "
        "right (touching the right edge). Another box holds a medium black triangle at the top "
        "left (touching the left and top edges), a medium black square at the bottom (touching "
        "the bottom edge) and a medium blue square at the bottom. The third box is empty.")
    assert nlvr.cue([BLOCKS, BLOCKS[:1], BLOCKS[:1]]).startswith(
        "One box holds a tower of two squares, from the bottom up black and blue. Another box "
        "holds a tower of one black square.")


@pytest.mark.parametrize("change, part", [({"label": "maybe"}, "neither true nor false"),
                                          ({"structured_rep": [[]]}, "1 boxes instead of 3"),
                                          ({"sentence": None}, "not an example of NLVR")])
def test_nlvr_names_the_line_of_a_damaged_example(tmp_path, change, part):
    path = write_nlvr(tmp_path, "dev")
    path.write_text(path.read_text() + json.dumps(json.loads(path.read_text()) | change))
    message = fails("nlvr", "--source", tmp_path, "--out", tmp_path / "out")
    assert f"{path}:2" in message and part in message


def looks_like(picture, boxes):
    """Whether the pixels just around the middle of each thing have its colour, in this order."""
    shades = {"yellow": (255, 255, 0), "black": (0, 0, 0), "blue": (0, 153, 255)}
    for left, box in zip((0, 150, 300), boxes):
        for t in box:
            x, y = (t[key] + t["size"] // 2 for key in ("x_loc", "y_loc"))
            if picture.getpixel((left + x, y)) != shades[nlvr.colour(t)]:
                return False
        if sum(picture.getpixel((left + x, y)) != (211, 211, 211)
               for x in range(100) for y in range(100)) and not box:
            return False
    return True


@real
@pytest.mark.parametrize("split", ["dev", "test"])
def test_nlvr_cue_is_true_of_all_six_orders(split):
    """Which order a picture has is in no file. The six pictures of an example are indeed the six
    orders of the boxes that the cue tells of, so it must not say which box is first. (15 of the
    80 examples of each split that have six pictures; all of them passed once, in 20 seconds.)"""
    lines = (REAL / "nlvr" / split / f"{split}.json").read_text().splitlines()[:15]
    for example in map(json.loads, lines):
        possible = []
        for order in range(6):
            name = f"{example['directory']}/{split}-{example['identifier']}-{order}.png"
            picture = Image.open(REAL / "nlvr" / split / "images" / name).convert("RGB")
            possible.append({p for p in itertools.permutations(range(3)) if looks_like(
                picture, [example["structured_rep"][n] for n in p])})
        assert all(possible), example["identifier"]
        assert len(set.union(*possible)) == 6, example["identifier"]
        # no position in the row: only the places inside a box are named
        assert not {"first", "leftmost"} & set(nlvr.cue(example["structured_rep"]).split())


# ---- TabMWP ------------------------------------------------------------------------------------

PROBLEM = {"question": "How many?", "choices": None, "answer": "1.40", "unit": "$",
           "table_title": "Costs", "table": "Day | Cost\nMonday | $1.40", "solution": "It is 1.40."}


def test_tabmwp_records(tmp_path, capsys):
    """The whole dev split is read, not its part dev1k; a problem without a picture is counted."""
    (tmp_path / "in/tables").mkdir(parents=True)
    problems = {"5": PROBLEM, "7": PROBLEM | {"choices": ["yes", "no"], "answer": "no",
                                              "unit": None}, "9": PROBLEM}
    (tmp_path / "in/problems_dev.json").write_text(json.dumps(problems))
    (tmp_path / "in/problems_dev1k.json").write_text("not read")
    for key in ("5", "7"):
        paint(tmp_path / f"in/tables/{key}.png", int(key))
    convert("tabmwp", "--source", tmp_path / "in", "--out", tmp_path / "out")
    one, two = records.load(tmp_path / "out/validation.jsonl", needs=("cue", "rationale"))
    assert one["question"] == "How many? (Unit: $. Give the number alone.)"
    assert one["cue"] == ('The table is headed "Costs". Its rows read:\nDay | Cost\n'
                          "Monday | $1.40.")
    assert two["question"] == "How many?\nA. yes\nB. no" and two["answer"] == "no"
    assert "1 picture that is not in this copy" in capsys.readouterr().out
    (tmp_path / "in/problems_dev.json").write_text(json.dumps({"5": PROBLEM | {"table": None}}))
    assert "problem 5: table is 'None', not a text" in fails(
        "tabmwp", "--source", tmp_path / "in", "--out", tmp_path / "other")


@real
def test_every_gold_of_tabmwp_is_gradable(tmp_path):
    convert("tabmwp", "--source", REAL / "tabmwp", "--out", tmp_path)
    rows = records.load(tmp_path / "validation.jsonl", needs=("cue", "rationale"))
    assert len(rows) == 120
    for row in rows:
        assert grade(rf"\boxed{{{row['answer']}}}", row["answer"], row.get("options")).correct
        for label, text in row.get("options", {}).items():
            right = grade(rf"\boxed{{{label}}}", row["answer"], row["options"]).correct
            assert right == (text == row["answer"])


# ---- Geometry3K --------------------------------------------------------------------------------

FORM = {"diagram_logic_form": ["Equals(LengthOf(Line(A, B)), 10)",
                               "Equals(LengthOf(Line(A, C)), y)",
                               "Equals(MeasureOf(Angle(A, B, C)), 60)",
                               "Perpendicular(Line(A, C), Line(B, C))"],
        "text_logic_form": ["Find(y)"], "line_instances": ["AB", "AC", "BC"],
        "point_positions": {"A": [154, 1], "B": [1, 236], "C": [152, 237]}}
BY_PLACE = ("The segment from the vertex at the top right to the vertex at the bottom left is "
            "marked 10. The segment from the vertex at the top right to the vertex at the bottom "
            "right is marked y. The angle at the vertex at the bottom left is marked 60°. The angle "
            "at the vertex at the bottom right is marked as a right angle.")
BY_LETTER = ("The segment AB is marked 10. The segment AC is marked y. The angle ABC is marked "
             "60°. The angle ACB is marked as a right angle.")


def facts(*diagram, text=(), **more):
    """The triangle of FORM with other facts."""
    return FORM | {"diagram_logic_form": list(diagram), "text_logic_form": list(text)} | more


def test_points_are_told_by_letter_only_where_one_is_printed():
    """Problem 15 is a triangle without letters: its facts name A, B and C all the same, and a cue
    that did so would tell the teacher of something that nobody can see."""
    assert geometry3k.cue(FORM, "Find y.") == (BY_PLACE, [])
    lettered = FORM | {"text_logic_form": ["Triangle(A,B,C)", "Find(y)"]}
    assert geometry3k.cue(lettered, "In \\triangle A B C, find y.")[0] == BY_LETTER
    assert geometry3k.cue(lettered, "In \\triangle ABC, find y.")[0] == BY_LETTER
    # the annotators' letters, which the question does not print
    assert geometry3k.cue(lettered, "Find y in the triangle. A nice one.")[0] == BY_PLACE


def test_the_goal_and_what_the_question_says_are_no_part_of_the_cue():
    form = facts("Find(MeasureOf(Angle(A, B, C)))", "Equals(LengthOf(Line(A,B)), 10)",
                 text=["Equals(LengthOf(Line(A, B)),10)", "Equals(LengthOf(Line(A,C)),7)"])
    assert geometry3k.cue(form, "AB = 10, AC = 7.") == ("", [geometry3k.KNOWN, geometry3k.KIND])


@pytest.mark.parametrize("fact, said, note", [
    ("", "", [geometry3k.EMPTY]),
    ("Equals(LengthOf(Line(A, B)), 66--y)", "", [geometry3k.GARBLED]),
    ("Equals(MeasureOf(Angle(A, B, C)), 4y-10)",
     "The angle at the vertex at the bottom left is marked (4y - 10)°.", []),
    ("Equals(MeasureOf(Angle(A, B, C)), MeasureOf(angle 4))", "", [geometry3k.NUMBERED]),
    ("Equals(LengthOf(PerimeterOf(Cirle(C))), 12)", "", [geometry3k.MENDED, geometry3k.KIND]),
    ("PointLiesOnLine(A, Line(B, C)) K))", "", [geometry3k.MENDED, geometry3k.UNLETTERED]),
    ("Equals(Line(A, B), Line(A, C))",
     "The segments from the vertex at the top right to the vertex at the bottom left and from the "
     "vertex at the top right to the vertex at the bottom right are marked as equal.",
     [geometry3k.MENDED])])
def test_facts_that_are_damaged_or_not_visible(fact, said, note):
    assert geometry3k.cue(facts(fact), "Find y.") == (said, note)


def test_one_garbled_expression_makes_its_neighbours_doubtful():
    """Problem 14: the drawing says 66 - 2y/3 and x/4 + 5, the facts "66--y" and "x+5". The first is
    seen to be damaged, the second is not. Numbers without letters are kept."""
    text, notes = geometry3k.cue(facts(
        "Equals(LengthOf(Line(A, B)), 66--y)", "Equals(LengthOf(Line(A, C)), x+5)",
        "Equals(LengthOf(Line(B, C)), 7)"), "Find x.")
    assert text == ("The segment from the vertex at the bottom left to the vertex at the bottom "
                    "right is marked 7.")
    assert notes == [geometry3k.GARBLED] * 2


def test_numbered_angles_only_if_the_question_numbers_angles():
    form = facts("Equals(MeasureOf(Angle(A, B, C)), MeasureOf(angle 4))")
    assert geometry3k.cue(form, "Find m \\angle 4.")[0].endswith("bottom left is numbered 4.")


def test_points_of_one_place_are_told_apart_or_not_at_all():
    """Two points in one third are its upper and its lower one; for three there are no words."""
    spots = {"A": [0, 0], "B": [2, 60], "C": [300, 300]}
    form = facts("Equals(LengthOf(Line(A, B)), 5)", point_positions=spots, line_instances=["AB"])
    assert geometry3k.cue(form, "?")[0] == ("The segment from the upper of the two points at the "
                                            "top left to the lower of the two points at the top "
                                            "left is marked 5.")
    form["point_positions"] = spots | {"D": [1, 30]}
    assert geometry3k.cue(form, "?") == ("", [geometry3k.PLACE])


def test_points_on_a_line_are_told_once_in_order_and_only_if_that_is_true():
    spots = {"A": [0, 0], "B": [50, 1], "C": [99, 0], "D": [150, 2], "E": [50, 80]}
    lying = ("PointLiesOnLine(B, Line(A, C))", "PointLiesOnLine(C, Line(B, D))",
             "PointLiesOnLine(E, Line(A, D))")
    text = "In the figure, AB = 5, CD = 4 and DE = 2."
    form = facts(*lying, text=["Line(A,B)", "Line(C,D)", "Line(D,E)"], point_positions=spots)
    assert geometry3k.cue(form, text) == ("A, B, C and D lie on one line in this order.",
                                          [geometry3k.UNTRUE])


def write_problem(folder, number, split="train", form=FORM, **more):
    paint(folder / str(number) / "img_diagram.png", number)
    (folder / str(number) / "data.json").write_text(json.dumps(
        {"id": number, "problem_text": "Find y .", "compact_text": "Find y.", "answer": "C",
         "choices": ["5", "5 \\sqrt { 2 }", "5 \\sqrt { 3 }", "10"], "data_type": split} | more))
    if form:
        (folder / str(number) / "logic_form.json").write_text(json.dumps(form))


def test_the_own_layout_with_official_splits(tmp_path, capsys):
    """The folder above a problem, or else its data_type, says the split; no cue: not for train."""
    write_problem(tmp_path / "in/train", 2)
    write_problem(tmp_path / "in/train", 10, form=facts(""))
    write_problem(tmp_path / "in/val", 3, form=None)
    write_problem(tmp_path / "in/elsewhere", 4, "test")
    convert("geometry3k", "--source", tmp_path / "in", "--out", tmp_path / "out")
    [row] = records.load(tmp_path / "out/train.jsonl", needs=("cue",))
    assert row["id"] == "geometry3k-2" and row["cue"] == BY_PLACE
    assert row["answer"] == r"5\sqrt{3}" and row["options"]["C"] == r"5 \sqrt { 3 }"
    assert row["question"].startswith("Find y.\nA. 5\nB. ")
    assert "cue" not in records.load(tmp_path / "out/validation.jsonl")[0]
    assert len(records.load(tmp_path / "out/test.jsonl")) == 1
    shown = capsys.readouterr().out
    assert "1 no cue (first: geometry3k-10)" in shown and geometry3k.EMPTY in shown


def archive(path, forms):
    """logic_forms.zip as it is published: the key of the facts is plural."""
    with zipfile.ZipFile(path, "w") as file:
        for kind in ("diagram", "text"):
            file.writestr(f"logic_forms/{kind}_logic_forms_annot.json", json.dumps(
                {key: {f"{kind}_logic_forms": form[f"{kind}_logic_form"],
                       **({"point_positions": form["point_positions"], "line_instances":
                           form["line_instances"]} if kind == "diagram" else {})}
                 for key, form in forms.items()}))
    return path


def test_the_archive_gives_rows_of_the_hub_their_cue_if_the_ids_fit(tmp_path):
    forms = archive(tmp_path / "logic_forms.zip", {str(n): FORM for n in range(9)} | {
        "9": facts("", text=["Equals(LengthOf(Line(A,B)),77)"])})
    rows = [{"id": n, "images": ["a.png"], "problem": f"<image>Find y{n}.", "answer": "1"}
            for n in range(10)]
    paint(tmp_path / "in/a.png")
    (tmp_path / "in/train.json").write_text(json.dumps(rows))
    command = ("geometry3k", "--source", tmp_path / "in", "--logic-forms", forms, "--out")
    convert(*command, tmp_path / "out")
    assert [r["cue"] for r in records.load(tmp_path / "out/train.jsonl")] == [BY_PLACE] * 9
    (tmp_path / "in/train.json").write_text(json.dumps([r | {"id": 9} for r in rows]))
    assert "another numbering" in fails(*command, tmp_path / "other")
    for row in rows:
        del row["id"]
    (tmp_path / "in/train.json").write_text(json.dumps(rows))
    assert "no field 'id'" in fails(*command, tmp_path / "other")


@real
def test_all_published_facts_are_read_and_none_names_an_unprinted_letter():
    forms = geometry3k.read_forms(REAL / "geometry3k" / "logic_forms.zip")
    assert len(forms) == 3002
    empty = cued = 0
    for form in forms.values():
        text, notes = geometry3k.cue(form, "Find x.")           # a question without a letter
        empty += notes.count(geometry3k.EMPTY)
        cued += bool(text)
        assert not any(word.strip(".,").isupper() for word in text.split() if word[0].isalpha())
    assert empty == 165 and cued > 2400


@real
def test_the_ten_official_folders(tmp_path):
    convert("geometry3k", "--source", REAL / "geometry3k", "--out", tmp_path)
    rows = {r["id"]: r for r in records.load(tmp_path / "train.jsonl", needs=("cue",))}
    assert len(rows) == 9 and "geometry3k-14" not in rows       # "give up", says its annotator
    assert "angles PNM and PQM are marked as equal" in rows["geometry3k-17"]["cue"]
    for row in rows.values():
        assert grade(rf"\boxed{{{row['answer']}}}", row["answer"], row["options"]).correct
        assert not row["answer"].isdigit() or f"marked {row['answer']}." not in row["cue"] \
            or row["id"] == "geometry3k-15"


# ---- the hub -----------------------------------------------------------------------------------

@pytest.fixture
def hub(tmp_path):
    """A stand-in on 127.0.0.1 for what huggingface_hub asks: `files` and `refuse` say its answers.
    """
    state = SimpleNamespace(files={}, refuse=None, asked=[], cut=None)

    class Answer(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            state.asked.append((self.command, self.path.split("?")[0]))
            name, sha = self.path.split("?")[0].split("/resolve/")[-1].partition("/")[2], "a" * 40
            if state.refuse:
                status, code = state.refuse
                return self.reply(status, b"{}", {"X-Error-Code": code} if code else {})
            if "/api/datasets/" in self.path:
                found = [{"rfilename": file} for file in state.files]
                if "/tree/" in self.path:
                    found = [{"type": "file", "path": file, "size": len(content), "oid": "0" * 40}
                             for file, content in state.files.items()]
                    return self.reply(200, json.dumps(found).encode(), {})
                return self.reply(200, json.dumps({"id": "me/set", "sha": sha, "private": False,
                                                   "siblings": found}).encode(), {})
            content = state.files[name]
            head = {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
            begin = int((self.headers.get("Range") or "bytes=0-").split("=")[1].split("-")[0])
            self.reply(206 if begin else 200, content[begin:], head, cut=name == state.cut)

        def reply(self, status, body, headers, cut=False):
            self.send_response(status)
            for key, value in ({"Content-Length": len(body)} | headers).items():
                self.send_header(key, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[:len(body) // 2] if cut else body)
            if cut and self.command == "GET":
                state.cut = None                # once
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.address = f"http://127.0.0.1:{server.server_port}"
    yield state
    server.shutdown()
    server.server_close()


def fetch(state, tmp_path, name="me/set", address=None):
    """The command in a process of its own: HF_ENDPOINT is read when the library is imported."""
    return subprocess.run(
        [sys.executable, "data/prepare.py", "geometry3k", "--source", f"hub:{name}", "--out",
         tmp_path / "out"], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=os.environ | {"HF_ENDPOINT": address or state.address, "HF_HUB_OFFLINE": "0",
                          "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1",
                          "HF_HUB_DISABLE_TELEMETRY": "1"})


def test_from_the_hub_in_one_command_even_if_it_is_cut(hub, tmp_path):
    """In the hub's cache every file is a link out of its folder: such pictures were "outside"."""
    paint(tmp_path / "0.png")
    picture = (tmp_path / "0.png").read_bytes()
    rows = [{"images": [f"images/{n}.png"], "problem": "<image>Find x.", "answer": str(n)}
            for n in range(2)]
    hub.files = {"train.json": json.dumps(rows).encode(), "images/0.png": picture,
                 "images/1.png": picture + b"more"}
    hub.cut = "images/1.png"
    done = fetch(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(records.load(tmp_path / "out/train.jsonl")) == 2
    assert "%" in done.stderr                                       # bars
    assert sum(how == "GET" and path.endswith("1.png") for how, path in hub.asked) == 2
    # everything is there: a second run fetches no file again
    hub.asked.clear()
    assert fetch(hub, tmp_path).returncode == 0
    assert not any(path.startswith("/datasets") for how, path in hub.asked if how == "GET")


@pytest.mark.parametrize("refuse, part", [
    ((401, "RepoNotFound"), "is not there, or is private: check the name"),
    ((401, "GatedRepo"), "is gated: accept its terms"), ((403, None), "token may not read it"),
    ((404, "RepoNotFound"), "is not there"), ((503, None), "status 503; try again later"),
    ((None, None), "cannot be reached")])
def test_the_hub_says_no_in_one_line_with_advice(hub, tmp_path, refuse, part):
    hub.refuse = refuse
    done = fetch(hub, tmp_path, address=None if refuse[0] else "http://127.0.0.1:9")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("error: hub:me/set") and part in last
    assert "Traceback" not in done.stderr


# ---- raw files ---------------------------------------------------------------------------------

@pytest.mark.parametrize("file, name", [
    ("train/questions.json", "easy-vqa"), ("dev/dev.json", "nlvr"), ("nlvr/dev/dev.json", "nlvr"),
    ("problems_train.json", "tabmwp"), ("12/img_diagram.png", "geometry3k"),
    ("train/12/img_diagram.png", "geometry3k"),
    ("data/train-00000-of-00001.parquet", "geometry3k")])
def test_raw_files_of_a_known_set_name_their_command(tmp_path, file, name):
    assert sources.known_raw(tmp_path) is None
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("{}")
    assert sources.known_raw(tmp_path).startswith(f"python data/prepare.py {name} ")


def test_records_are_no_raw_files(tmp_path):
    """A folder of converted records must never be called raw, or nobody could train on it."""
    write_nlvr(tmp_path / "in", "train")
    convert("nlvr", "--source", tmp_path / "in", "--out", tmp_path / "out")
    assert sources.known_raw(tmp_path / "out") is None
