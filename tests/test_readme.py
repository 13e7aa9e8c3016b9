"""The README and its pages: short enough to read, their links and quoted code real, the picture true.

That every command and flag exists is checked in test_alone.py.
"""
import re

import pytest
from conftest import ROOT
from PIL import Image, ImageChops, ImageStat

from analysis import first_picture

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_readme_is_read_in_one_sitting():
    assert len(README.splitlines()) <= 200


def test_each_equation_stands_where_the_readme_says():
    """Rows of the table: | eq. ...: what it says | `file` | `a piece of one of its lines` |."""
    rows = re.findall(r"^\| eq\. .* \| `(\w+\.py)` \| `(.+)` \|$", README, re.M)
    assert len(rows) >= 5
    for file, code in rows:
        assert code in (ROOT / file).read_text(), f"{file} has no line with {code}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for text, target in re.findall(r"\[([^]]*)\]\(([^)]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, heading = target.partition("#")
        there = (page.parent / path) if path else page
        assert there.exists(), f"{page.name}: {target}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", there.read_text(), re.M)
            assert heading in [re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles]


def test_every_page_is_linked_from_the_readme():
    for page in PAGES[1:]:
        assert f"(docs/{page.name})" in README


@pytest.fixture(scope="module")
def case():
    return first_picture.compute()


def test_the_first_picture_says_what_the_model_says(case):
    """The alt text repeats the picture's numbers: all of them are computed here again."""
    student, teacher = case.student[case.worst], case.teacher[case.worst]
    share = float(case.kl.max() / case.kl.sum())
    alt = re.search(r"!\[(.*?)\]", README)[1]
    for number in (student["."], student[","], teacher[","], share):
        assert f"{number:.0%}".replace("%", " %") in alt
    assert case.pieces[case.worst] == "."
    assert "".join(case.pieces[case.worst:]).startswith(". The answer is \\boxed{3}")


def test_the_picture_in_docs_is_the_one_drawn_now(case):
    """Compared when shrunk, so that a palette, or a glyph moved by a pixel, makes no difference."""
    path = ROOT / "docs" / "one_token.png"
    assert path.stat().st_size < 100_000
    small = [image.convert("RGB").resize((220, 165)) for image in
             (first_picture.draw(case), Image.open(path))]
    assert max(ImageStat.Stat(ImageChops.difference(*small)).mean) < 1      # of 255
