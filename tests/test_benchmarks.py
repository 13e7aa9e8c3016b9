"""readers.py and scores.py on fabricated files: every layout, every trap, sums by hand."""
import csv
import json
import random
import sys
import time

import pytest
from PIL import Image

from benchmarks import readers
import fabricate
from benchmarks.readers import describe, frame_indices, frames, literal, load, options_in
from benchmarks.scores import PAPER_COLUMNS, aggregate

NAMES = list(readers.ROWS)
COMPARED = ("id", "answer", "options", "answer_kind", "precision", "tolerance", "group")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """The official row counts, but of the fabricated files."""
    counts = {name: len(make()) for name, make in fabricate.ROWS.items()}
    monkeypatch.setattr(readers, "ROWS", counts | {"mmmu": counts["mmmu"] - 1})


def get(name, folder, form="json"):
    make = {"tsv": fabricate.tsv, "local": lambda n, f: fabricate.tsv(n, f, local=True)}
    make.get(form, lambda n, f: fabricate.official(n, f, form))(name, folder)
    return {item["id"]: item for item in load(name, folder)}


def content(items):
    """What every way of reading must agree on. A MathVerse TSV does not say which problem it is."""
    return [[item[key] for key in COMPARED if (key, item["source"]) != ("group", "mathverse")]
            for item in items.values()]


def pixels(image):
    with Image.open(image) as opened:
        return opened.convert("RGB").tobytes()


# ---------------------------------------------------------------------------- one content

@pytest.mark.parametrize("name", NAMES)
def test_the_tsv_gives_what_the_official_release_gives(name, tmp_path):
    here, there = get(name, tmp_path / "a"), get(name, tmp_path / "b", "tsv")
    assert content(here) == content(there)
    for one, other in zip(here.values(), there.values()):
        assert [*map(pixels, one["images"])] == [*map(pixels, other["images"])]


@pytest.mark.parametrize("name", NAMES)
def test_parquet_gives_what_json_gives(name, tmp_path):
    pytest.importorskip("pyarrow")
    here, there = get(name, tmp_path / "a"), get(name, tmp_path / "b", "parquet")
    assert content(here) == content(there)
    for one, other in zip(here.values(), there.values()):
        assert one["question"] == other["question"] and one["meta"] == other["meta"]
        assert [*map(pixels, one["images"])] == [*map(pixels, other["images"])]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "video-mme"])
def test_a_local_tsv_names_pictures_in_the_images_folder(name, tmp_path):
    assert content(get(name, tmp_path / "a")) == content(get(name, tmp_path / "b", "local"))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "testmini.parquet").write_bytes(b"PAR1")
    with pytest.raises(ImportError, match="testmini.parquet.*pip install pyarrow"):
        load("mathverse", tmp_path)


def test_one_folder_can_hold_all_seven(tmp_path):
    for name, folder in zip(NAMES, ("Vision-R1-rl", "DynaMath_Sample", "MathVista", "We-Math",
                                    "MathVerse", "MMMU", "Video-MME")):
        fabricate.official(name, tmp_path / folder)
    for name in NAMES:
        assert len(load(name, tmp_path)) == readers.ROWS[name]
    lmu = tmp_path / "LMUData"
    for name in NAMES:
        fabricate.tsv(name, lmu)
        assert len(load(name, lmu)) == readers.ROWS[name]
    assert len(load("wemath", lmu / "WeMath.tsv")) == 7


def test_items_are_records_that_the_processor_takes(tmp_path):
    import model as qwen
    processor = qwen.Processor(qwen.TINY)
    for name in ("mmmu", "vision-r1"):
        for form in ("json", "tsv"):
            for item in get(name, tmp_path / name / form, form).values():
                prompt = processor.prompt(item)
                assert len(prompt.grids) == len(item["images"]) > 0
                assert processor.prompt(item).ids == prompt.ids     # a Picture opens again


@pytest.mark.parametrize("name", NAMES)
def test_every_gold_is_graded_right_against_itself(name, tmp_path):
    from benchmarks.grade import grade

    def readable(item):
        gold = item["answer"] if isinstance(item["answer"], str) else item["answer"][0]
        return grade(rf"\boxed{{{gold}}}", item["answer"], options=item["options"],
                     kind=item["answer_kind"], precision=item["precision"],
                     tolerance=item["tolerance"]).correct
    report = describe([*get(name, tmp_path).values()], readable)
    assert report["unparsed_golds"] == [] and report["rows"] == readers.ROWS[name]


# ---------------------------------------------------------------------------- traps, set by set

@pytest.mark.parametrize("form", ["json", "tsv"])
def test_mathvista(form, tmp_path):
    items = get("mathvista", tmp_path, form)
    assert items["3"]["options"] == {"A": "None", "B": "N/A", "C": "nan", "D": "01"}
    assert items["3"]["answer"] == "D"                      # pandas: missing, missing, missing, 1.0
    assert items["10"]["answer"] == "E"
    assert items["342"]["answer"] == "B"                    # the option that reads "A"
    assert items["587"]["answer"] == "A"                    # of equal options the first
    assert [items[k]["precision"] for k in ("1", "2", "601")] == [1, None, 2]
    assert items["600"]["answer_kind"] == "list" and items["2"]["answer"] == "100000000"
    assert items["1"]["question"].startswith("Hint: Please give with one decimal")
    assert "\r" not in items["1"]["question"]


def test_mathvista_rebuilds_a_missing_query(tmp_path):
    fabricate.official("mathvista", tmp_path)
    (tmp_path / "data" / "query.json").unlink()
    items = {item["id"]: item for item in load("mathvista", tmp_path)}
    assert items["342"]["question"].endswith("Choices:\n(A) B\n(B) A")
    assert "letter" in items["342"]["question"].split("\n")[0]
    assert items["2"]["question"].endswith("(Unit: years)")
    assert "1 decimals" in items["1"]["question"] and "2 decimals" in items["601"]["question"]


def test_mathvista_precision_of_a_gold_without_decimals(tmp_path):
    """`precision` may be null and the gold a whole number; that crashed on int('')."""
    fabricate.tsv("mathvista", tmp_path)
    edit(tmp_path / "MathVista_MINI.tsv", 0, question="What?", answer="3")
    assert load("mathvista", tmp_path)[0]["precision"] == 0


def test_wemath_options(tmp_path):
    items = get("wemath", tmp_path / "json")
    trap = items["2steps_1/2steps_2"]
    assert trap["options"] == {"A": "point ;O.", "B": "②", "C": "∠AB;E.", "D": "None",
                               "E": "No answer"}
    assert trap["question"].endswith("A. point ;O.;B．②;C. ∠AB;E.;D. None; E. No answer")
    assert list(items["3steps_1/3steps_1"]["options"]) == ["A", "C", "F"]   # glued, out of order
    assert trap["meta"]["key"] == "2steps_2" and trap["group"] == "2steps_1"
    assert get("wemath", tmp_path / "tsv", "tsv")["2steps_1/2steps_2"]["question"].endswith(
        "Options:\nA. point ;O.\nB. ②\nC. ∠AB;E.\nD. None\nE. No answer")


@pytest.mark.parametrize("form", ["json", "tsv"])
def test_dynamath(form, tmp_path):
    items = get("dynamath", tmp_path, form)
    assert len(items) == 30 and {item["group"] for item in items.values()} == {"1", "2", "3"}
    number, letter, line = items["1-v10"], items["2-v2"], items["2-v1"]
    assert (number["answer"], number["answer_kind"], number["tolerance"]) == (
        "3.3333", "number", 0.001)
    assert letter["options"] == {"A": "yes", "B": "no"} and letter["answer"] == "A"
    assert line["options"] == {"A": "None", "B": "N/A"} and line["answer"] == "B"
    assert number["options"] is None
    assert number["meta"]["subject"] == "analytic geometry"             # five blanks in the file
    assert number["meta"]["level"] == "high school"
    assert '"short answer"' in number["question"] and "letter" in letter["question"]


def test_dynamath_seeds_counted_from_zero_get_the_same_ids(tmp_path):
    fabricate.tsv("dynamath", tmp_path)
    path = tmp_path / "DynaMath.tsv"
    for n, row in enumerate(fabricate.dynamath()):
        edit(path, n, qid=int(row["id"]) - 1)
    assert {item["group"] for item in load("dynamath", path)} == {"1", "2", "3"}


@pytest.mark.parametrize("form", ["json", "tsv"])
def test_mathverse(form, tmp_path):
    items = get("mathverse", tmp_path, form)
    only = items["5"]
    assert only["meta"]["version"] == "Vision Only" and "picture" in only["question"]
    assert only["answer"] == "D" and only["options"]["C"] == "120°"     # though it has no question
    assert only["meta"]["question_for_eval"].startswith("Which?")
    assert [items[k]["answer"] for k in ("6", "11", "16", "21")] == [
        "B", "C, D", "B", r"090^\circ T"]
    assert items["21"]["answer_kind"] == items["26"]["answer_kind"] == "math"
    assert items["21"]["options"] is None and items["31"]["answer_kind"] == "math"     # a point A
    assert items["1"]["meta"]["subject"] == "Plane Geometry"


@pytest.mark.parametrize("form", ["json", "tsv"])
def test_mmmu(form, tmp_path):
    items = get("mmmu", tmp_path, form)
    assert all(key.startswith("validation_") for key in items)          # the TSV holds dev too
    assert items["validation_Accounting_1"]["options"] == {
        "A": "None", "B": "N/A", "C": "nan", "D": "01"}
    assert items["validation_Accounting_2"]["answer"] == "I"
    many = items["validation_Architecture_and_Engineering_1"]
    assert len(many["images"]) == 3 and "B. <image 3>" in many["question"]
    towns, letter = (items[f"validation_Architecture_and_Engineering_{k}"] for k in (2, 3))
    assert towns["answer"] == ["Tampa", "Florida"] and towns["options"] is None
    assert letter["answer"] == "B" and letter["answer_kind"] == "math"  # open, though a letter
    assert "Options" not in letter["question"]
    assert many["meta"]["subject"] == "Architecture_and_Engineering"


def test_mmmu_pictures_that_the_text_refers_to_must_be_there(tmp_path):
    fabricate.tsv("mmmu", tmp_path)
    path = tmp_path / "MMMU_DEV_VAL.tsv"
    edit(path, 1, A="<image 2>")
    with pytest.raises(ValueError, match="1 rows that refer to a picture .*row 2: image 2 of 1"):
        load("mmmu", path)


@pytest.mark.parametrize("form", ["json", "tsv"])
def test_video_mme(form, tmp_path):
    items = get("video-mme", tmp_path, form)
    first, second, third = (items[key] for key in ("001-1", "002-2", "003-3"))
    assert [path.rsplit("/", 1)[1] for path in first["video"]] == [f"{n}.jpg" for n in range(1, 13)]
    assert first["fps"] == 2 and first["options"]["D"] == "It is A."
    assert second["video"].endswith("data/fghij.MP4") and third["video"].endswith("klmno.mkv")
    assert [item["meta"]["duration"] for item in (first, second, third)] == [
        "short", "medium", "long"]
    assert "A. None.\nB. 01." in first["question"]


def test_video_mme_missing_videos_and_rates_are_refused(tmp_path):
    fabricate.official("video-mme", tmp_path)
    (tmp_path / "data" / "klmno.mkv").unlink()
    (tmp_path / "frames" / "fps.txt").unlink()
    with pytest.raises(ValueError, match=r"(?s)1 frame folders.*1 videos missing.*klmno"):
        load("video-mme", tmp_path)
    (tmp_path / "frames" / "-abc_DE" / "fps.txt").write_text("soon")
    with pytest.raises(ValueError, match="row 1: could not convert"):
        load("video-mme", tmp_path)


def test_vision_r1(tmp_path):
    items = get("vision-r1", tmp_path)
    wrapped, boxed, by_text = (items[f"vision-r1-{k}"] for k in (1, 2, 3))
    assert wrapped["answer"] == "B" and len(wrapped["images"]) == 2
    assert "<image>" not in wrapped["question"]
    assert boxed["answer"] == r"\frac { 9 \SQRT { 3 } } { 2 }" and boxed["answer_kind"] == "auto"
    assert by_text["answer"] == "B" and by_text["options"]["B"] == "5 cm"


def test_options_in():
    assert options_in("What is AB? (A) is a point.") is None
    assert options_in("The symbol? Choices: (A) + (B) - (C) * (D) /") == dict(
        zip("ABCD", "+-*/"))
    assert options_in("Circles (A) and (B).\nChoices:\nA: (B)\nB: (A)") == {"A": "(B)", "B": "(A)"}


# ---------------------------------------------------------------------------- damage and malice

def edit(path, number, **cells):
    """Change cells of one row of a TSV; None deletes the column."""
    rows = read(path)
    for column, value in cells.items():
        for row in rows:
            row.setdefault(column, "")
            if value is None:
                del row[column]
        if value is not None:
            rows[number][column] = value
    fabricate.write_tsv(path, rows)


def read(path):
    limit = csv.field_size_limit(2**31 - 1)
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    csv.field_size_limit(limit)
    return rows


@pytest.fixture
def tsv(tmp_path):
    fabricate.tsv("mathvista", tmp_path)
    return tmp_path / "MathVista_MINI.tsv"


def test_row_counts_are_checked_with_both_numbers(tsv, monkeypatch):
    monkeypatch.setitem(readers.ROWS, "mathvista", 1000)
    with pytest.raises(ValueError, match="8 rows instead of 1000.*check_rows=False"):
        load("mathvista", tsv)
    assert len(load("mathvista", tsv, check_rows=False)) == 8


def test_the_real_row_counts():
    import importlib
    fresh = importlib.util.module_from_spec(readers.__spec__)
    sys.modules["fresh"] = fresh        # dataclass looks its module up
    readers.__spec__.loader.exec_module(fresh)
    assert fresh.ROWS == {"vision-r1": None, "dynamath": 5010, "mathvista": 1000, "wemath": 1740,
                          "mathverse": 3940, "mmmu": 900, "video-mme": 2700}
    assert set(PAPER_COLUMNS) == set(fresh.ROWS)


def test_duplicate_ids_are_refused_even_without_checks(tsv):
    edit(tsv, 1, index=1)
    with pytest.raises(ValueError, match="1 ids more than once.*1 x 2"):
        load("mathvista", tsv, check_rows=False)


def test_rows_without_picture_are_refused_or_counted_never_dropped(tsv):
    edit(tsv, 7, image="")
    with pytest.raises(ValueError, match=r"1 rows without a picture \(MathVista_MINI.tsv row 8"):
        load("mathvista", tsv)
    items = load("mathvista", tsv, check_rows=False)
    assert len(items) == 8 and describe(items)["without_picture"] == 1


def test_golds_that_no_answer_can_match_are_refused_or_counted(tsv):
    edit(tsv, 2, answer="02", answer_option="")
    with pytest.raises(ValueError, match="1 rows without a question, or with a gold.*'02'"):
        load("mathvista", tsv)
    assert len(load("mathvista", tsv, check_rows=False)) == 8


def test_a_picture_cell_that_names_no_picture(tsv):
    edit(tsv, 3, image="no such row")
    with pytest.raises(ValueError, match="row 4: its picture is that of row 'no such row'"):
        load("mathvista", tsv)


def test_a_picture_cell_may_name_a_later_row(tsv):
    rows = read(tsv)
    edit(tsv, 0, image="2")
    first, second = load("mathvista", tsv)[:2]
    assert pixels(first["images"][0]) == pixels(second["images"][0])
    assert rows[0]["image"] != rows[1]["image"]


@pytest.mark.parametrize("cell", ["!" * 100, "QUJD" * 30, str(["QUJD" * 20] * 2)])
def test_unreadable_pictures_are_refused_and_counted(tsv, cell):
    edit(tsv, 3, image=cell)
    with pytest.raises(ValueError, match=r"\d unreadable pictures \(MathVista_MINI.tsv row 4"):
        load("mathvista", tsv, check_rows=False)


def test_base64_with_other_characters_inside_is_refused(tsv):
    """b64decode skips them by default, and what is left may happen to be a picture."""
    edit(tsv, 3, image="??" + read(tsv)[3]["image"])
    with pytest.raises(ValueError, match="1 unreadable pictures"):
        load("mathvista", tsv)


def test_missing_picture_files_are_all_counted(tmp_path):
    fabricate.official("mathverse", tmp_path)
    for path in (tmp_path / "images_version_6").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="7 files missing .*images_version_6/image_1.png"):
        load("mathverse", tmp_path, check_rows=False)


def test_a_tsv_cut_short_is_refused(tsv):
    whole = tsv.read_bytes()
    tsv.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"MINI.tsv: line \d+: 4 cells under 10 headings"):
        load("mathvista", tsv)
    tsv.write_bytes(whole + b'9\t"a quote that never closes\n')
    with pytest.raises(ValueError, match="not a whole TSV"):
        load("mathvista", tsv)


def test_the_field_limit_is_raised_and_put_back(tsv):
    """csv stops at 131,072 characters, less than one photograph in base64."""
    buffer = fabricate.io.BytesIO()
    noise = random.Random(0).randbytes(300 * 300 * 3)
    Image.frombytes("RGB", (300, 300), noise).save(buffer, "PNG")
    limit = csv.field_size_limit(131_072)
    edit(tsv, 0, image=fabricate.base64.b64encode(buffer.getvalue()).decode())
    assert pixels(load("mathvista", tsv)[0]["images"][0]) == noise
    assert csv.field_size_limit(limit) == 131_072


def test_missing_columns_name_the_likely_mistake(tmp_path):
    fabricate.official("mathvista", tmp_path)
    with pytest.raises(ValueError, match="testmini.json row 1: no column 'ID', is this wemath"):
        load("wemath", tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file of mmmu; looked for"):
        load("mmmu", tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load("mmmu", tmp_path / "gone")
    with pytest.raises(ValueError, match="no benchmark 'mmlu'"):
        load("mmlu", tmp_path)
    (tmp_path / "test.csv").write_text("a")
    with pytest.raises(ValueError, match="neither .tsv nor .parquet"):
        load("mmmu", tmp_path / "test.csv")


EVIL = "[__import__('pathlib').Path(r'{}').touch()]"


@pytest.mark.parametrize("column", ["choices", "image_path"])
def test_cells_are_never_evaluated(column, tsv, tmp_path):
    """VLMEvalKit calls eval() on these cells, so a data file could run any code."""
    cells = {column: EVIL.format(tmp_path / "owned")} | ({"image": ""} if "path" in column else {})
    edit(tsv, 2, **cells)
    with pytest.raises(ValueError, match="row 3: not a list literal"):
        load("mathvista", tsv, check_rows=False)
    assert not (tmp_path / "owned").exists()


def test_metadata_and_candidates_are_never_evaluated(tmp_path):
    for name, column in (("mathverse", "metadata"), ("video-mme", "candidates")):
        fabricate.tsv(name, tmp_path / name)
        path = tmp_path / name / f"{fabricate.TSV[name]}.tsv"
        edit(path, 0, **{column: EVIL.format(tmp_path / "owned")})
        with pytest.raises(ValueError, match="row 1: not a (list|dict) literal"):
            load(name, path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("cell", [
    "[" * 9000, "[" * 60 + "]" * 60, "[" + "-" * 9000 + "1]", "[" + "9" * 9000 + "]",
    "[" + "1+" * 5000 + "1]", "['a'" + ", 'a'" * 10**6 + "]", "[9**9**9**9]", "{'a': 1}", "(1, 2)",
    "['a' * 10**10]", "[f'{1}']", "['\\x00']", "\0[]"])
def test_hostile_literals_are_refused_quickly(cell):
    start = time.perf_counter()
    try:
        assert all(isinstance(part, str) for part in literal(cell))
    except ValueError as error:
        assert len(str(error)) < 200
    assert time.perf_counter() - start < 0.5


def test_hostile_json(tmp_path):
    path = tmp_path / "test.json"
    for content in ("[" * 100_000, '"text"', "[1, 2]", "{", b"\xff\xfe"):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ValueError):
            load("vision-r1", path)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "a/../../secret.png",
                                  "linked/../../secret.png"])
def test_pictures_may_not_lie_outside_the_source_folder(name, tmp_path):
    """The message names the path."""
    (tmp_path / "secret.png").write_bytes(fabricate.png("secret"))
    folder = tmp_path / "source"
    fabricate.official("mathverse", folder)
    (folder / "linked").symlink_to(tmp_path)
    rows = json.loads((folder / "testmini.json").read_text())
    rows[0]["image"] = name
    (folder / "testmini.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="row 1: .* lies outside the source folder"):
        load("mathverse", folder, check_rows=False)


@pytest.mark.parametrize("cell", ["[" + "9" * 400 + "+1j]", "[" * 9000, "[1 +", "{[]: 1}",
                                  "[\x00]"])
def test_a_hostile_literal_is_refused(cell):
    """The first was found by changing bytes at random: an OverflowError ended the reading."""
    with pytest.raises(ValueError, match="not a list literal"):
        literal(cell)


def test_links_of_the_owner_are_followed(tmp_path):
    """A snapshot of the hub is nothing but links into its cache; all of them "lay outside"."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    fabricate.official("mathverse", blobs)
    snapshot.mkdir()
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert content({i["id"]: i for i in load("mathverse", snapshot)}) == content(
        {i["id"]: i for i in load("mathverse", blobs)})


def test_values_that_no_file_or_number_can_be(tmp_path):
    """Found by changing bytes at random: each was a traceback, or ended the run when written."""
    for name, old, new in (("vision-r1", "images/0_0.png", "x" * 5000 + ".png"),
                           ("vision-r1", "Find x", "\\ud83d"),
                           ("mathvista", '"precision": 1.0', '"precision": 1e999'),
                           ("video-mme", "fghij", "v" * 5000)):
        folder = tmp_path / f"{name}{len(new)}"
        fabricate.official(name, folder)
        path, = readers.find(name, folder)[1]
        whole = path.read_text()
        assert old in whole
        path.write_text(whole.replace(old, new))
        with pytest.raises(ValueError, match="row \\d") as error:
            load(name, folder, check_rows=False)
        assert len(str(error.value)) < 1000


def test_videos_may_not_lie_outside_the_source_folder(tmp_path):
    (tmp_path / "secret.mp4").write_bytes(b"")
    fabricate.official("video-mme", tmp_path / "source")
    path = tmp_path / "source" / "test.jsonl"
    path.write_text(path.read_text().replace("fghij", "../../secret"))
    with pytest.raises(ValueError, match="lies outside"):
        load("video-mme", tmp_path / "source")


def test_jsonl_lines_end_at_line_feeds_only(tmp_path):
    r"""str.splitlines also cuts at U+2028, which JSON allows inside a string."""
    rows = get("vision-r1", tmp_path)
    path = tmp_path / "test.jsonl"
    path.write_text(path.read_text().replace("Find x", "Find\u2028x"), encoding="utf-8")
    assert len(load("vision-r1", tmp_path)) == len(rows)


# ---------------------------------------------------------------------------- frames

def test_frame_indices_are_those_of_linspace():
    import torch
    for total in (1, 2, 7, 64, 1000):
        for count in (1, 2, 5, 64):
            n = min(total, count)
            assert frame_indices(total, count) == torch.linspace(
                0, total - 1, n, dtype=torch.float64).round().long().tolist()


def test_frames_of_a_picture_folder(tmp_path):
    item = get("video-mme", tmp_path)["001-1"]
    pictures, times = frames(item, 4)
    assert [path.rsplit("/", 1)[1] for path in pictures] == ["1.jpg", "5.jpg", "8.jpg", "12.jpg"]
    assert times == [0, 2, 3.5, 5.5]
    assert len(frames(item, 64)[0]) == 12


def test_a_video_file_needs_a_decoder_and_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match="x.mp4.*pip install av.*ffmpeg"):
        frames({"video": "x.mp4"}, 4)


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_frames_of_a_video_file(ending, tmp_path):
    """Frame n is a grey of 10 n, so what was decoded says which frame it is."""
    av = pytest.importorskip("av")
    path = tmp_path / f"video.{ending}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for n in range(24):
            grey = Image.new("RGB", (64, 64), (10 * n,) * 3)
            container.mux(stream.encode(av.VideoFrame.from_image(grey)))
        container.mux(stream.encode(None))
    pictures, times = frames({"video": str(path)}, 4)
    assert [round(p.getpixel((32, 32))[0] / 10) for p in pictures] == [0, 8, 15, 23]
    assert times == pytest.approx([0, 1.6, 3, 4.6], abs=0.01)


# ---------------------------------------------------------------------------- metrics

def row(key, correct, group=None, /, **meta):
    return {"id": key, "group": group or key, "correct": correct, "meta": meta}


def group(name, *rights):
    """A We-Math group: its steps in order, then the composite."""
    steps = len(rights) - 1
    keys = [f"{steps}steps_{k}" for k in (*range(1, steps + 1), "multi")]
    return [row(f"{name}/{key}", right, name, key=key) for key, right in zip(keys, rights)]


def test_wemath_by_hand():
    """Groups: IG, IK, CM in both, RM strict and CM loose, RM in both, and a three-step IG."""
    rows = [*group("a", 1, 1, 0), *group("b", 1, 0, 0), *group("c", 1, 1, 1), *group("d", 0, 1, 1),
            *group("e", 0, 0, 1), *group("f", 1, 1, 1, 0)]
    out = aggregate("wemath", rows)
    assert {k: out["strict"][k] for k in ("IK", "IG", "CM", "RM")} == {
        "IK": 1, "IG": 2, "CM": 1, "RM": 2}
    assert {k: out["loose"][k] for k in ("IK", "IG", "CM", "RM")} == {
        "IK": 1, "IG": 2, "CM": 2, "RM": 1}
    assert out["score_strict"] == pytest.approx(2 / 6) and out["score_loose"] == pytest.approx(0.5)
    assert out["strict"]["RM_rate"] == pytest.approx(2 / 3)
    assert out["loose"]["RM_rate"] == pytest.approx(1 / 3)
    assert out["S1"] == pytest.approx(9 / 13) and out["S2"] == 3 / 5 and out["S3"] == 0
    assert out["headline"] == "score_strict" and (out["points"], out["of"]) == (2, 6)
    assert out["accuracy"] == pytest.approx(12 / 19)


def test_wemath_formula_is_cm_plus_half_ig():
    """(N - 0.5 IG - RM - IK) / N, as published, equals (CM + 0.5 IG) / N: 525 groups, both ways."""
    rng = random.Random(1)
    rows = [r for n in range(525) for r in group(
        f"{n}", *(rng.random() < 0.6 for _ in range(3 if n < 360 else 4)))]
    out = aggregate("wemath", rows)
    for setting in ("strict", "loose"):
        n = out[setting]
        assert sum(n[k] for k in ("IK", "IG", "CM", "RM")) == 525
        assert out[f"score_{setting}"] == pytest.approx(
            (525 - 0.5 * n["IG"] - n["RM"] - n["IK"]) / 525)
    assert len(rows) == out["n"] == 1740 and out["score_loose"] > out["score_strict"]


def test_wemath_without_any_composite_right_does_not_divide_by_zero():
    out = aggregate("wemath", group("a", 1, 1, 0))
    assert out["strict"]["RM_rate"] is None and out["score_strict"] == 0.5


def test_wemath_incomplete_groups_are_reported_and_not_scored():
    rows = [*group("a", 1, 1, 1), *group("b", 1, 1, 1)[:2]]
    out = aggregate("wemath", rows)
    assert out["incomplete_groups"] == 1 and out["groups"] == 2
    assert out["score_strict"] is None and out["points"] is None and out["loose"] is None
    assert out["accuracy"] == 1
    whole = aggregate("wemath", rows, [*group("a", 0, 0, 0), *group("b", 0, 0, 0)])
    assert whole["unanswered"] == 1 and whole["score_strict"] == 0.75   # b is IG now


def variants(seed, right, count=10):
    return [row(f"{seed}-v{v}", v <= right, seed, subject="arithmetic", level="high school")
            for v in range(1, count + 1)]


def test_dynamath_average_and_worst_case():
    out = aggregate("dynamath", [*variants("1", 10), *variants("2", 9), *variants("3", 1)])
    assert out["accuracy"] == pytest.approx(20 / 30) and out["worst_case"] == pytest.approx(1 / 3)
    assert out["robustness"] == pytest.approx(0.5) and out["headline"] == "accuracy"
    assert out["by_level"] == {"high school": {"n": 30, "accuracy": 20 / 30}}
    assert aggregate("dynamath", variants("1", 0))["robustness"] is None


def test_dynamath_a_missing_variant_is_not_right():
    out = aggregate("dynamath", [*variants("1", 10), *variants("2", 10)[:9]])
    assert out["worst_case"] == 0.5 and out["incomplete_groups"] == 1
    out = aggregate("dynamath", variants("1", 10)[:9], variants("1", 0))
    assert out["accuracy"] == 0.9 and out["n"] == 10 and out["unanswered"] == 1


def test_mathverse_pooled_and_by_version():
    rows = [row(f"{n}-{version}", version == "Text Lite" or n == 0, version=version)
            for n in range(4) for version in fabricate.VERSIONS]
    out = aggregate("mathverse", rows)
    assert out["accuracy"] == 8 / 20
    assert out["by_version"]["Text Lite"] == {"n": 4, "accuracy": 1}
    assert out["by_version"]["Vision Only"] == {"n": 4, "accuracy": 0.25}


def test_video_mme_counts_what_was_not_answered():
    """The official script leaves unanswered questions out, which rewards silence."""
    items = [row(f"{d}-{n}", None, duration=d) for d in ("short", "medium", "long")
             for n in range(4)]
    rows = [row(item["id"], True, **item["meta"]) for item in items[:6]]
    out = aggregate("video-mme", rows, items)
    assert out["accuracy"] == 0.5 and out["unanswered"] == 6 and out["of"] == 12
    assert out["by_duration"]["long"] == {"n": 4, "accuracy": 0}
    assert out["by_duration"]["medium"] == {"n": 4, "accuracy": 0.5}


def test_mmmu_is_the_mean_over_questions_not_over_subjects():
    rows = [row("1", True, subject="Art"), *(row(f"{n}", False, subject="Music")
                                             for n in range(2, 5))]
    out = aggregate("mmmu", rows)
    assert out["accuracy"] == 0.25 and out["by_subject"]["Art"]["accuracy"] == 1
    assert (out["headline"], out["points"], out["of"]) == ("accuracy", 1, 4)


@pytest.mark.parametrize("name", ["mathvista", "vision-r1"])
def test_plain_means(name):
    assert aggregate(name, [row("1", True), row("2", False)])["accuracy"] == 0.5


def test_aggregate_refuses_doubtful_rows():
    with pytest.raises(ValueError, match="no rows"):
        aggregate("mmmu", [])
    with pytest.raises(ValueError, match="1 questions have more than one row: 1"):
        aggregate("mmmu", [row("1", True), row("1", False)])
    with pytest.raises(ValueError, match="1 of 1 rows are none of the 1 questions: 2"):
        aggregate("mmmu", [row("2", True)], [row("1", None)])
    with pytest.raises(ValueError, match="no benchmark"):
        aggregate("mmlu", [])


@pytest.mark.parametrize("name", NAMES)
def test_from_files_to_the_headline(name, tmp_path):
    """All right gives 1, nothing answered gives 0, in every benchmark's headline."""
    items = [*get(name, tmp_path).values()]
    rows = [{**item, "correct": True} for item in items]
    for graded, expected in ((rows, 1), ([], 0)):
        out = aggregate(name, graded, items)
        assert out[out["headline"]] == expected == out["points"] / out["of"]
        json.dumps(out)
