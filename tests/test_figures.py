"""figures.py: a figure says what its numbers say, to eyes and to ears, and needs nothing else."""
import doctest
import re
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from analysis import figures


class Outline(HTMLParser):
    """Tags of a page; complains about tags that are not closed in order."""
    VOID = {"meta", "img", "br", "line", "circle", "polyline"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append((self.open[-1] if self.open else "", data))

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def test_doctests():
    assert doctest.testmod(figures).failed == 0


# ---------------------------------------------------------------------------- curves and tables

def test_a_chart_says_its_ends_and_survives_little_to_draw():
    drawn = figures.chart("k", "Loss", [("loss", [(1, 2.0), (4, 1.0)], "a")])
    assert "loss from 2 at step 1 to 1 at step 4" in drawn
    assert "no values" in figures.chart("k", "Loss", [("loss", [], "a")])
    flat = figures.chart("k", "Length", [("length", [(1, 0.0), (2, 0.0)], "a")])
    assert flat.count("<polyline") == 2


def test_every_point_stands_inside_the_drawing():
    """Lines, levels and the ends of intervals all have room, wherever the numbers lie."""
    drawn = Outline(figures.chart("k", "T", [("one", [(7, -3e4), (90, 12.5)], "a"),
                                             ("two", [(1, 0.0), (8, 1e-3)], "b")],
                                  levels=[("level", 7e4, "b")], bars=[(40, -5e4, 1)], dots=True))
    drawn.tags += Outline(figures.forest("f", "T", {"a": (0.0, None), "b": (1.0, (0.9, 1))})).tags
    points = [pair.split(",") for line in drawn.all("polyline") for pair in line["points"].split()]
    points += [(line[f"x{end}"], line[f"y{end}"]) for line in drawn.all("line") for end in (1, 2)]
    points += [(one["cx"], one["cy"]) for one in drawn.all("circle")]
    assert len(points) > 30
    assert all(0 <= float(x) <= 360 and 0 <= float(y) <= 220 for x, y in points)


def test_text_in_a_table_stays_text():
    evil = "<script>alert(1)</script>"
    drawn = Outline(figures.table(evil, [evil], [[evil, evil]]))
    assert not drawn.all("script") and sum(evil in text for _, text in drawn.text) == 4


# ---------------------------------------------------------------------------- tokens

@pytest.mark.parametrize("gap, expected", [(0.0, "z"), (0.05, "z"), (-0.05, "z"), (0.2, "p1"),
                                           (-0.2, "n1"), (1.0, "p2"), (-3.0, "n3"), (9.0, "p4"),
                                           (-9.0, "n4")])
def test_colour_has_the_sign_of_teacher_minus_student(gap, expected):
    span, = Outline(figures.token_spans([("x", -10.0, -10.0 + gap)])).all("span")
    assert span["class"] == f"t {expected}" and f"difference {gap:+.2f}" in span["title"]


def test_the_sign_is_not_told_by_colour_alone():
    """Solid underline above zero, dotted below, on light and on dark pages; orange, and blue."""
    style = figures.token_style()
    for name, line in (("p", "solid"), ("n", "dotted")):
        rules = re.findall(rf"\.{name}\d{{background:rgb\((\d+), \d+, (\d+)\);"
                           r"border-bottom:2px (\w+)}", style)
        assert len(rules) == 8 and {found for *_, found in rules} == {line}
        assert all((int(blue) > int(red)) == (name == "p") for red, blue, _ in rules)


# ---------------------------------------------------------------------------- attention

def test_spread_counts_tokens():
    assert figures.spread([torch.full((3, 4), 1 / 12)]) == pytest.approx(12)
    assert figures.spread([torch.tensor([[0.0, 1.0]])]) == pytest.approx(1)


def test_the_pictures_have_a_row_for_each_answer_there_is():
    """A missing answer leaves its column of text empty; a missing module has no row of maps."""
    tile = Image.new("RGB", (96, 64), "white")
    maps = {0: torch.full((2, 3), 1 / 6), 5: torch.eye(3)[:2] / 2}
    one, both = (figures.attention_picture(tile, {"before training": before, "after": maps})
                 for before in ({}, maps))
    assert one.width == both.width and both.height - one.height == 64 + 20
    page = Outline(figures.attention_rows(tile, {"before training": {}, "after training": maps}))
    assert any(text == "before training: no module" for _, text in page.text)
    assert [attrs["alt"].split(": ")[0] for attrs in page.all("img")] == [
        "The picture", *(f"Sink attention after training, {name}" for name in
                         ("block at layer 1", "block at layer 6", "mean of blocks"))]
    tokens = [("Blue", -1.0, -6.0), (" or red\n?", -6.0, -1.0)]
    picture = figures.rollouts_picture([("Which?", {"before": None, "after: right": tokens})], 900)
    colours = {colour for _, colour in picture.getcolors(1 << 16)}
    assert picture.width == 900 and {figures.MORE[3], figures.LESS[3]} <= colours
    left = picture.crop((0, 40, 440, picture.height - 60))          # the missing answer's column
    assert left.getcolors() == [(left.width * left.height, (255, 255, 255))]


def test_a_token_without_text_is_drawn_as_nothing():
    """The stop token, and a space that a line break ate, have no width: --pictures died of them."""
    tokens = [("a", -1.0, -1.0), ("", -9.0, -1.0)]
    assert figures.rollouts_picture([("Which?", {"before: right": tokens})], 900).width == 900
