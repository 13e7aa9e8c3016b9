"""docs/one_step.py: the tour runs, what it says is so, and the notebook shows what it does now."""
import ast
import base64
import doctest
import io
import json
import re
import sys

import pytest
import torch
from PIL import Image, ImageChops, ImageStat

from analysis import figures
from conftest import ROOT
from data import toy
from teacher import hint

sys.path.insert(0, str(ROOT / "docs"))
import drawings  # noqa: E402
import make_notebook  # noqa: E402
import which_tokens  # noqa: E402

CELLS = make_notebook.read_cells(make_notebook.SCRIPT.read_text(encoding="utf-8"))
CODE = [source for kind, source in CELLS if kind == "code"]
NOTEBOOK = json.loads(make_notebook.NOTEBOOK.read_text(encoding="utf-8"))
SABOTAGES = [source for source in CODE if source.startswith("sabotage(")]


@pytest.fixture(scope="module")
def tour():
    """(names, outputs of each code cell), all cells run in order.

    Of the five sabotages, which take a process each, only the first is run: None for the others.
    """
    toy.default()            # in a fresh clone it is drawn now, and says so outside of the cells
    threads, path = torch.get_num_threads(), [*sys.path]
    names = {"__name__": "__main__", "__file__": str(make_notebook.SCRIPT)}
    outputs = [None if source in SABOTAGES[1:] else make_notebook.run_cell(source, names)
               for source in CODE]
    torch.set_num_threads(threads)
    sys.path[:] = path
    return names, outputs


def shown():
    """Outputs of each code cell in the notebook."""
    return [cell["outputs"] for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def text_of(outputs) -> str:
    return "".join("".join(out.get("text", "")) for out in outputs)


# ---------------------------------------------------------------------------- what it says is so

def test_one_token_matters_and_one_step_changes_it(tour):
    """The numbers of the README's first picture, and what the text of the tour says about them."""
    names, _ = tour
    n, likeliest = names["worst"], names["likeliest"]
    student, teacher, after = (likeliest(names[x][n], 2) for x in ("log_p", "log_q", "after"))
    assert student == pytest.approx({".": 0.55, ",": 0.45}, abs=0.02)
    assert teacher[","] > 0.99 and after[","] > 0.9
    assert names["nats"][n] > 0.5 * sum(names["nats"])
    greedy = names["processor"].decode(names["greedy"].ids[0])
    assert greedy.count("blue square at row 3") == 2 and "{5}" in greedy
    torch.testing.assert_close(names["pull"], (names["log_p"].exp() - names["log_q"].exp())[n],
                               atol=1e-4, rtol=1e-3)


def test_what_the_tour_says_of_where_the_token_comes_from(tour):
    """The full stop: this cue alone is against it. Row numbers: seen, and the cue agrees."""
    names, _ = tour
    why, n = names["why"], names["worst"]
    assert why[n, 0] < -5 and (why[n, 1:] > 0.1).all()
    spoken = [names["name"](token) for token in names["answer"]]
    rows = [place + 1 for place, word in enumerate(spoken) if word == " row"]
    assert (why[rows, 0] > 0).all() and (why[rows, 2] < -0.5).all()
    answers, of_answer = names["answers"], []
    for asked in (names["hinted"], names["prompt"]):       # the nats of privilege, added up anew
        with torch.no_grad():
            log_p = names["teacher"](**names["join"]([asked], answers)).logits[0, :-1].log_softmax(-1)[-len(spoken):]
        of_answer.append(float(log_p.gather(1, answers.ids[0, :, None]).sum()))
    assert float(why[:, 0].sum()) == pytest.approx(of_answer[0] - of_answer[1], abs=1e-3)


def test_the_module_is_nothing_at_first_and_learns(tour):
    names, outputs = tour
    last = next(n for n, source in enumerate(CODE) if source.startswith("fresh ="))
    assert text_of(outputs[last]) == "True\n"
    assert names["losses"](names["student"], names["teacher"]).mean() < names["before"][1]


def test_a_sabotage_is_caught_and_an_innocent_change_is_not(tour, capsys):
    names, outputs = tour
    assert "fails: caught" in text_of(outputs[CODE.index(SABOTAGES[0])])
    names["sabotage"]("loss.py", "def kl(log_a, log_b):", "def kl(log_a, log_b):  # as before",
                      "tests/test_loss.py::test_forward_and_reverse_are_not_swapped")
    assert "passes: NOT caught" in capsys.readouterr().out
    with pytest.raises(ValueError, match="loss.py has 0 times 'no such line', expected one"):
        names["sabotage"]("loss.py", "no such line", "", "tests/test_loss.py")


@pytest.mark.parametrize("number", range(5))
def test_every_sabotage_still_has_its_line_and_its_test(number):
    """The tour names lines and tests of files that change; the notebook shows each one caught."""
    file, line, wrong, test = (ast.literal_eval(argument) for argument in
                               ast.parse(SABOTAGES[number]).body[0].value.args)
    assert (ROOT / file).read_text().count(line) == 1 and wrong != line
    where, name = test.split("::")
    assert f"\ndef {name}(" in (ROOT / where).read_text()
    assert "fails: caught" in text_of(shown()[CODE.index(SABOTAGES[number])])


# ---------------------------------------------------------------------------- the notebook

def test_the_notebook_has_the_cells_of_the_script():
    """After a change of the script: python docs/make_notebook.py"""
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in NOTEBOOK["cells"]]
    assert cells == CELLS and len(SABOTAGES) == 5
    assert make_notebook.NOTEBOOK.stat().st_size < 400_000


def test_the_notebook_shows_what_the_script_prints_now(tour):
    """Equal words, and numbers within 2 % or 0.02: another CPU rounds otherwise."""
    if NOTEBOOK["metadata"]["torch"] != torch.__version__:
        pytest.skip(f"made with torch {NOTEBOOK['metadata']['torch']}")
    number = re.compile(r"\d+(?:\.\d+)?(?:e-\d+)?")
    for source, now, then in zip(CODE, tour[1], shown(), strict=True):
        if now is not None:
            now, then = text_of(now), text_of(then)
            assert number.sub("#", now) == number.sub("#", then), source
            assert [*map(float, number.findall(now))] == pytest.approx(
                [*map(float, number.findall(then))], rel=0.02, abs=0.02), source


def test_the_notebook_shows_what_the_script_draws_now(tour):
    """Compared when shrunk, so that a glyph moved by a pixel makes no difference."""
    drawn = 0
    for now, then in zip(tour[1], shown(), strict=True):
        pair = [[decoded(out) for out in outputs if "data" in out] for outputs in (now or [], then)]
        assert now is None or len(pair[0]) == len(pair[1])
        for one, other in zip(*pair):
            drawn += 1
            assert one.size == other.size
            small = [image.convert("RGB").resize((220, 110)) for image in (one, other)]
            assert max(ImageStat.Stat(ImageChops.difference(*small)).mean) < 2      # of 255
    assert drawn == 8


def decoded(output) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(output["data"]["image/png"])))


# ---------------------------------------------------------------------------- which tokens

def test_tokens_of_each_kind(loaded, records):
    """Every token has one kind, and a teacher that is told nothing more agrees with all of them."""
    student, processor = loaded
    assert doctest.testmod(which_tokens).failed == 0
    answer = "I see a red square at row 1 column 3, a red circle at row 2 column 1. 1 + 2 = 3. So"
    kinds = {}
    for n, word in enumerate(words := re.findall(r"^I| ?[^ ,.]+|[,.]", answer)):
        kinds.setdefault(which_tokens.kind_of("".join(words[:n])), []).append(word.strip())
    assert kinds == {
        "colour": ["red", "red"], "shape": ["square", "circle"], "row number": ["1", "2"],
        "column number": ["3", "1"], "go on or stop , .": [",", "."],
        "calculation": ["+", "2", "=", "3", "."], "all other words": kinds["all other words"]}
    found = [which_tokens.by_kind(student, student, processor, records[:4], hints)
             for hints in ([None] * 4, [hint(record, "cue") for record in records[:4]])]
    for kind, nats in found[0].items():
        assert max(nats) < 1e-4 and len(nats) == len(found[1][kind])
    assert sum(found[1]["column number"]) > 0.01


def test_which_tokens_needs_a_finished_run_whose_teacher_is_the_start(tmp_path):
    for teacher, finished in (("self", False), ("ema", True)):
        (tmp_path / "args.json").write_text(json.dumps({"teacher": teacher}))
        if finished:
            (tmp_path / "checkpoint").mkdir()
        with pytest.raises(ValueError, match=f"a finished run with --teacher self, not {teacher}"):
            which_tokens.measure(tmp_path, 1)


def test_the_table_of_kinds_is_coloured_by_its_numbers():
    image = drawings.kinds([0, 50], {"a": [1.0, 0.25], "b": [0.0001, 0.0]}).convert("RGB")
    places = [(510, 100), (image.width - 250, 100), (image.width - 250, 170)]
    deep, half, none = (image.getpixel(place) for place in places)
    assert deep == figures.LESS[3] and none == (255, 255, 255)
    assert half == tuple(round((255 + c) / 2) for c in deep)


def test_cells_are_read_by_their_marks():
    text = '"""Header."""\n# %% [markdown]\n# # Title\n#\n# text\n\n# %%\nx = 1\n\n\nx + 1\n'
    cells = make_notebook.read_cells(text)
    assert cells == [("markdown", "# Title\n\ntext"), ("code", "x = 1\n\n\nx + 1")]
    assert make_notebook.run_cell("print('a')\n1 + 1", {}) == [
        {"output_type": "stream", "name": "stdout", "text": ["a\n"]},
        {"output_type": "display_data", "data": {"text/plain": ["2"]}, "metadata": {}}]
