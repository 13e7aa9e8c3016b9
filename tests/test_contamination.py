"""data/contamination.py on fabricated benchmark files; near pictures: toy scenes, drawings, plots.

    OMP_NUM_THREADS=1 python -m pytest -q tests/test_contamination.py
"""
import base64
import io
import json
import math
import random
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw

from conftest import ROOT
from data import contamination, prepare, records, toy


def drawing(chance):
    """A random line drawing on white paper, as geometry problems have them."""
    width, height = chance.randint(200, 500), chance.randint(150, 400)
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    points = [(chance.uniform(.08, .92) * width, chance.uniform(.08, .92) * height)
              for _ in range(chance.randint(4, 6))]
    pen.polygon(points, outline="black", width=2)
    pen.line(chance.sample(points, 2), fill="black", width=2)
    for x, y in points:
        label = chance.choice("ABCxyz") + str(chance.randint(1, 99))
        pen.text((x + 5, y + 5), label, fill="black")
    return image


CURVES = {"line": lambda x, a, b, c: a * x + b,
          "parabola": lambda x, a, b, c: a * (x - b)**2 / 2 + c,
          "hyperbola": lambda x, a, b, c: a / (x - b) + c if x != b else 99,
          "root": lambda x, a, b, c: a * math.sqrt(x - b) + c if x >= b else 99,
          "sine": lambda x, a, b, c: a * math.sin(x + b) + c / 2}


def plot(chance, side=400):
    """A curve over axes and a grid as DynaMath has them, from -5 to 5 on both axes."""
    image = Image.new("RGB", (side, side), "white")
    pen, curve = ImageDraw.Draw(image), CURVES[chance.choice(list(CURVES))]
    for n in range(1, 10):
        at = side * n / 10
        for ends in ((at, 0, at, side), (0, at, side, at)):
            pen.line(ends, "black" if n == 5 else "#dddddd", 2 if n == 5 else 1)
        pen.text((at - 4, side / 2 + 3), str(n - 5), fill="black")
    a, b, c = chance.choice([-3, -2, -1, -.5, .5, 1, 2, 3]), *(chance.randint(-4, 4) for _ in "bc")
    points = []
    for x in (n / 40 - 5 for n in range(401)):
        y = curve(x, a, b, c)
        if abs(y) <= 8:
            points.append((side / 2 + x * side / 10, side / 2 - y * side / 10))
        if points and (abs(y) > 8 or x == 5):
            pen.line(points, "blue", 3)
            points = []
    return image


def ace(suit):
    """A playing card: two of them share everything but the pip."""
    image = Image.new("RGB", (200, 280), "white")
    pen = ImageDraw.Draw(image)
    pen.rounded_rectangle((2, 2, 197, 277), 12, outline="black", width=2)
    for x, y, n in ((100, 140, 30), (24, 58, 12), (176, 222, 12)):
        if suit == "spades":
            pen.polygon([(x - n, y + n / 3), (x + n, y + n / 3), (x, y - n)], "black")
        else:
            pen.ellipse((x - n / 2, y - n, x + n / 2, y), "black")
        for side in (-n, 0):
            pen.ellipse((x + side, y - n / 5, x + side + n, y + n * .8), "black")
        pen.rectangle((x - n / 10, y, x + n / 10, y + n), "black")
    return image


def encode(image, kind="PNG", **more):
    file = io.BytesIO()
    image.save(file, kind, **more)
    return file.getvalue()


def half(image):
    return image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC)


CHANCE = random.Random(4)
DRAWINGS = [drawing(CHANCE) for _ in range(8)]


def write_records(folder, rows, name="train"):
    """Records with the given (picture, question); pictures are PIL images, None for no picture."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.jsonl"
    with path.open("w", encoding="utf-8", newline="") as file:
        for n, (image, question) in enumerate(rows):
            images = [] if image is None else [f"{name}{n}.png"]
            if image is not None:
                image.save(folder / images[0])
            file.write(json.dumps({"id": f"r{n}", "images": images, "question": question,
                                   "answer": "é", "extra": n}, ensure_ascii=False) + "\r\n")
    return path


@pytest.fixture
def train(tmp_path):
    """Six records: a template question about two pictures, four others, one of them without."""
    return write_records(tmp_path / "data", [
        (DRAWINGS[0], "Find x."), (DRAWINGS[1], "Find x."), (DRAWINGS[2], "How long is AB?"),
        (DRAWINGS[3], "What is the area of the square?"), (None, "What is 3 + 4?"),
        (DRAWINGS[4], "How many sides are there?")])


def reasons(result):
    return {name: sorted(why) for name, why in result.items()}


# ---- the fingerprint ---------------------------------------------------------------------------

DRAW = {"toy": toy.draw, "drawing": lambda scene, chance: drawing(chance),
        "plot": lambda scene, chance: plot(chance)}


@pytest.mark.parametrize("kind, found, wrong", [
    ("toy", (.99, .97, .88), 0), ("drawing", (.98, .98, .97), 1), ("plot", (.99, .99, .99), 1)])
def test_copies_are_near_and_other_pictures_are_not(kind, found, wrong):
    """The header's table, smaller: JPEG of quality 60, half the size, both; 19,900 wrong pairs.

    Without the second look 316 of 16,653 pairs of plots are near: they share axes and grid, and
    the curve is thin. Of 250,000 pairs of DynaMath's own 202 were."""
    chance, scenes = random.Random(2), {}
    while len(scenes) < 200:
        scene = toy.make_scene(chance, "train") if kind == "toy" else len(scenes)
        scenes.setdefault(scene, DRAW[kind](scene, chance))
    scenes = {image.tobytes(): image for image in scenes.values()}      # a plot may come twice

    def prints(change):
        return [contamination.take_print(change(image)) for image in scenes.values()]

    ours = prints(encode)
    copies = (lambda i: encode(i, "JPEG", quality=60), lambda i: encode(half(i)),
              lambda i: encode(half(i), "JPEG", quality=60))
    for change, share in zip(copies, found):
        theirs = prints(change)
        hits = sum(bool(contamination.near([a], [b])) for a, b in zip(ours, theirs))
        assert hits >= share * len(ours)
    pairs = [(i, j) for i, j, _ in contamination.near(ours, ours) if i < j]
    assert len(pairs) <= wrong


def test_two_aces_and_two_curves_are_two_pictures():
    """Real aces had equal fingerprints; a line and a hyperbola differed in 6 of 256 bits."""
    one, other = (contamination.take_print(encode(ace(suit))) for suit in ("spades", "clubs"))
    assert np.bitwise_count(one.bits ^ other.bits).sum() <= contamination.NEAR
    assert contamination.near([one], [other]) == []
    copy = contamination.take_print(encode(half(ace("clubs")), "JPEG", quality=60))
    assert contamination.near([other], [copy]) and contamination.near([one], [copy]) == []


def test_the_same_places_in_another_colour_are_another_picture():
    """Grey steps alone took red and green shapes for each other in 51 pairs of toy scenes."""
    def scene(colour):
        image = Image.new("RGB", (64, 48), toy.PAPER)
        ImageDraw.Draw(image).ellipse((20, 10, 40, 30), fill=colour)
        return contamination.take_print(encode(image))

    red, green = scene((200, 60, 60)), scene((30, 140, 68))          # both about grey 99
    assert np.bitwise_count(red.bits ^ green.bits).sum() <= contamination.NEAR
    assert contamination.near([red], [green]) == []
    assert contamination.near([red], [scene((205, 60, 60))])


def test_equal_pixels_in_another_format_are_the_same_picture():
    """Palette, alpha, BMP, an EXIF turn: what a viewer would show is equal, so it is the same."""
    image = DRAWINGS[0].quantize(16).convert("RGB")
    upright = contamination.take_print(encode(image)).pixels
    exif = Image.Exif()
    exif[0x0112] = 3                                      # turn by 180 degrees when showing it
    for content in (encode(image, "BMP"), encode(image.quantize(16)),
                    encode(image.convert("RGBA")),
                    encode(image.rotate(180), exif=exif)):
        assert contamination.take_print(content).pixels == upright
    assert contamination.take_print(encode(image.rotate(180))).pixels != upright


def test_dark_16_bit_pictures_are_not_all_white():
    """Pillow clips 16 bits at 255: two scans would have become the same white page."""
    one, two = (Image.fromarray(np.full((20, 30), v, np.uint16)) for v in (9000, 20000))
    assert contamination.take_print(encode(one)).pixels != (
        contamination.take_print(encode(two)).pixels)


def test_blank_pages_are_near_to_nothing():
    """Their fingerprint has no bit set, so all of them would be near to each other."""
    pages = [contamination.take_print(encode(Image.new("RGB", (60, 40), colour)))
             for colour in ("red", "blue", "white")]
    assert contamination.near(pages, pages) == []
    line = Image.new("RGB", (60, 40), "white")
    ImageDraw.Draw(line).line((30, 20, 30, 30), "black", 2)
    line = contamination.take_print(encode(line))
    assert contamination.PLAIN <= np.bitwise_count(line.bits).sum() <= contamination.NEAR
    assert contamination.near([line], pages) == contamination.near(pages, [line]) == []


def test_two_shapes_are_two_pictures():
    """Blank pages of 60 x 40 and 40 x 60 have equal bytes; a stretched picture has equal steps."""
    prints = [contamination.take_print(encode(image)) for image in (
        Image.new("RGB", (60, 40)), Image.new("RGB", (40, 60)), DRAWINGS[0],
        DRAWINGS[0].resize((DRAWINGS[0].width, DRAWINGS[0].height * 5 // 4)))]
    assert len({p.pixels for p in prints}) == 4 and contamination.near(prints, prints) == []


# ---- questions ---------------------------------------------------------------------------------

@pytest.mark.parametrize("one, other", [
    ("<image>Find x.", "find  $x$"), ("<image 1> Find \u2212x", "Find -x"),
    ("Hint: Please answer with a number.\nQuestion: Find x.\nChoices:\n(A) 1\n(B) 2", "Find x."),
    ("Find x. Choices: A:1 B:2", "Find x"),
    (r"Is $\frac{1}{2}$ it?", r"Is \frac { 1 } { 2 } it?")])
def test_questions_that_are_equal(one, other):
    assert contamination.plain_question(one) == contamination.plain_question(other)


@pytest.mark.parametrize("one, other", [("x + 1", "x - 1"), ("x ≤ 1", "x ≥ 1"),
                                        ("Find x", "Find y")])
def test_questions_that_are_not(one, other):
    assert contamination.plain_question(one) != contamination.plain_question(other)


# ---- whole files -------------------------------------------------------------------------------

def test_reasons_listing_and_clean_copy(train, tmp_path, capsys):
    """One record for each reason; a template question alone drops nothing."""
    other = write_records(tmp_path / "bench", [
        (DRAWINGS[1], "Which angle?"), (half(DRAWINGS[2]), "Which side?"),
        (DRAWINGS[7], "what is the area of the SQUARE"), (DRAWINGS[6], "Find x."),
        (None, "What is 3+4?")], "test")
    found = contamination.check(train, [other], drop=True)
    assert reasons(found) == {
        "r0": ["template question"], "r1": ["same picture", "template question"],
        "r2": ["near picture"], "r3": ["same question"], "r4": ["same question"]}
    listing = {row["id"]: row["why"] for row in
               map(json.loads, (train.parent / "train.contamination.jsonl").open())}
    assert listing["r1"]["same picture"] == {
        "rows": 1, "first": [{"file": str(other), "row": "r0"}]}
    assert listing["r2"]["near picture"]["first"][0]["bits"] <= contamination.NEAR
    clean = (train.parent / "train.clean.jsonl").read_bytes().splitlines(keepends=True)
    lines = train.read_bytes().splitlines(keepends=True)
    # byte for byte, "é" and "\r\n" too; a near picture (r2) is for the user to judge
    assert clean == [lines[0], lines[2], lines[5]]
    sheet = (train.parent / "train.contamination.html").read_text("utf-8")
    assert sheet.count("<img") == 2 and "r2 and row r1 of" in sheet
    records.load(train.parent / "train.clean.jsonl")
    shown = capsys.readouterr().out
    for part in ("train.jsonl: 6 records, 5 distinct pictures",
                 "same picture       1 records, 1 rows",
                 "template question  2 records, 1 rows", "3 records, 3 dropped"):
        assert part in shown


def b64(image, kind="PNG"):
    return base64.b64encode(encode(image, kind)).decode()


def test_tsv_with_references_and_lists(train, tmp_path):
    """VLMEvalKit's three picture cells; the referring row comes before the row it refers to."""
    path = tmp_path / "MathVerse_MINIV.tsv"
    rows = [("2", "7", "Where?", ""), ("7", b64(DRAWINGS[0]), "", "How long is AB?"),
            ("8", str([b64(DRAWINGS[6]), b64(DRAWINGS[4])]), "Which?", ""),
            ("9", "99", "Nobody asks this", "")]
    path.write_text("index\timage\tquestion\tquestion_for_eval\n" + "".join(
        "\t".join(f'"{cell}"' for cell in row) + "\n" for row in rows))
    found = contamination.check(train, [path], out=tmp_path / "list.jsonl")
    assert reasons(found) == {"r0": ["same picture"], "r2": ["same question"],
                              "r5": ["same picture"]}
    assert [match["row"] for match in found["r0"]["same picture"]] == ["2", "7"]
    assert contamination.read_against(path).lost == {"pictures that are not there": 1}


def test_official_json_with_a_picture_folder(train, tmp_path, capsys):
    """MathVista's layout, a dict by pid; one path leads nowhere and one out of the folder."""
    folder = tmp_path / "MathVista"
    (folder / "images").mkdir(parents=True)
    (folder / "data").mkdir()
    DRAWINGS[3].save(folder / "images/1.jpg", quality=60)
    path = folder / "data/testmini.json"
    path.write_text(json.dumps({
        "1": {"pid": "1", "image": "images/1.jpg", "question": "Which?"},
        "2": {"pid": "2", "image": "images/2.jpg", "question": "How many sides are there?"},
        "3": {"pid": "3", "image": "../../data/train0.png", "question": "?"}}))
    found = contamination.check(train, [path])
    assert reasons(found) == {"r3": ["near picture"], "r5": ["same question"]}
    assert "NOT COMPARED       2 pictures that are not there" in capsys.readouterr().out


def test_pictures_still_in_their_archive_are_no_clean_bill(train, tmp_path):
    """Compared by questions alone, a benchmark without its images.zip unpacked looks innocent."""
    path = tmp_path / "testmini.json"
    path.write_text(json.dumps([{"image": "images/1.jpg", "question": "Which?"}]))
    with pytest.raises(ValueError, match="none of its pictures can be read.*--pictures"):
        contamination.check(train, [path])
    (tmp_path / "elsewhere/images").mkdir(parents=True)
    DRAWINGS[0].save(tmp_path / "elsewhere/images/1.jpg")
    found = contamination.check(train, [path], pictures=[tmp_path / "elsewhere"])
    assert reasons(found) == {"r0": ["near picture"]}


def test_parquet(train, tmp_path):
    """The picture is the decoded_image, not the path beside it; MMMU has image_1 to image_7."""
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    def struct(image):
        return {"bytes": encode(image), "path": "x.png"} if image else None

    for name, columns in (("testmini-00000-of-00001", {
            "pid": ["5", "6"], "image": ["images/5.jpg", "images/6.jpg"],
            "decoded_image": [struct(DRAWINGS[0]), struct(DRAWINGS[6])],
            "question": ["Which?", "Why?"]}), ("validation-00000-of-00001", {
            "id": ["a", "b"], "question": ["<image 1> or <image 2>?", "How long is AB?"],
            "image_1": [struct(DRAWINGS[6]), struct(DRAWINGS[7])],
            "image_2": [struct(DRAWINGS[1]), None]})):
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / f"{name}.parquet")
    found = contamination.check(train, sorted(tmp_path.glob("*.parquet")))
    assert reasons(found) == {"r0": ["same picture"], "r1": ["same picture"],
                              "r2": ["same question"]}


def test_rows_that_share_an_id_are_counted_apart(train, tmp_path):
    """We-Math's ID names a group of three or four rows."""
    path = tmp_path / "testmini.json"
    path.write_text(json.dumps([{"ID": "2steps_1", "question": "How long is AB?"}] * 3))
    assert len(contamination.check(train, [path])["r2"]["same question"]) == 3


def test_what_is_refused(train, tmp_path):
    unknown = tmp_path / "a.jsonl"
    unknown.write_text('{"text_en": "What?"}\n')
    same = write_records(tmp_path / "same", [(None, "What is 3 + 4?")])
    for data, against, part in ((train, train, "is --data or --out itself"),
                                (train, unknown, "none of the columns"),
                                (train, tmp_path / "x.zip", "is no .parquet"),
                                (same, train, "nothing would be left")):
        with pytest.raises(ValueError, match=part):
            contamination.check(data, [against], drop=True)
    assert not (same.parent / "train.clean.jsonl").exists()


def test_undecodable_picture_of_ours_is_counted(train, tmp_path, capsys):
    (train.parent / "train0.png").write_bytes(encode(DRAWINGS[0])[:200])
    contamination.check(train, [write_records(tmp_path / "b", [(DRAWINGS[0], "?")])])
    assert "NOT COMPARED       1 pictures that cannot be decoded" in capsys.readouterr().out


def test_both_command_lines(train, tmp_path, capsys):
    other = write_records(tmp_path / "bench", [(DRAWINGS[0], "Which?")], "test")
    options = ["--data", str(train), "--against", str(other), "--drop"]
    prepare.main(["contamination", *options])
    shown = capsys.readouterr().out
    done = subprocess.run([sys.executable, ROOT / "data/contamination.py", *options],
                          capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == shown and "5 records, 1 dropped" in shown
    done = subprocess.run([sys.executable, ROOT / "data/contamination.py", "--data", other,
                           "--against", tmp_path / "none.tsv"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: ")
