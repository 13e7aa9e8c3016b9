"""What the grader must get right, and what it must never do.

The table is section 3 of shared BENCHMARKS.md, each row a mistake that some public grader made;
its ids are that table's numbers. The rest are properties: reflexive, symmetric, idempotent,
silent on junk, linear in time. Times are asserted only as a guard against a hang.
"""
import doctest
import random
import runpy
import sys
import time
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]   # to run the long fuzz as a script
from benchmarks import grade as grading  # noqa: E402
from benchmarks.grade import KINDS as KIND_NAMES, grade  # noqa: E402
from grade_cases import KINDS, LENGTHS, hostile, responses  # noqa: E402

LETTERS = {letter: "" for letter in "ABCDE"}
POLYGENIC = {"A": "a karyotype", "B": "a pedigree", "C": "a haplotype", "D": "a locus",
             "E": "a polygenic score"}
LENGTHS = {"A": "10 cm", "B": "12 cm", "C": "14 cm", "D": "16 cm"}
NUMBERS = {"A": "11", "B": "-84", "C": "42", "D": "7", "E": "100"}
LONG = r"\frac{" + "+".join(f"x^{{{n}}}" for n in range(2, 40)) + "}{y}"
LOOP = r"so the total is \boxed{460} and "

# id, prediction, gold, options, keyword arguments, expected
TABLE = [
    ("1", r"\boxed{0.5}", r"\frac{1}{2}", None, {}, True),
    ("2", r"\boxed{0.33}", r"\frac{1}{3}", None, {}, False),
    ("2-two-decimals", r"\boxed{0.33}", r"\frac{1}{3}", None, {"precision": 2}, True),
    ("2-decimal-gold", r"\boxed{\frac13}", "0.33", None, {}, True),
    ("4-comma", "1,000", "1000", None, {}, True),
    ("4-braces", "1{,}000", "1000", None, {}, True),
    ("4-thin", r"1\,000", "1000", None, {}, True),
    ("5", r"\boxed{\text{B}}", "B", LETTERS, {}, True),
    ("6", r"\boxed{E: a polygenic score}", "E", None, {}, True),
    ("6-options", r"\boxed{E: a polygenic score}", "E", POLYGENIC, {}, True),
    ("7", r"First \boxed{C} but then so \boxed{E}", "E", LETTERS, {}, True),
    ("9", "**Answer: D.**", "D", LETTERS, {}, True),
    ("9-half-bold", "**Answer:** D.", "D", LETTERS, {}, True),
    ("10", "I considered (A), but no. Final answer: D", "D", LETTERS, {}, True),
    ("11", "Answer: A because it is red. No, actually, ANSWER: B", "A", LETTERS, {}, False),
    ("13", "The correct answer is **B**. Here is why: unlike option A, it fits.", "B", LETTERS, {}, True),
    ("15", "A rectangle has 4 sides. The answer is B.", "B", LETTERS, {}, True),
    ("17", "Answer: $B", "B", LETTERS, {}, True),
    ("19", "12 cm", "B", LENGTHS, {}, True),
    ("19-last-line", "The longer side is doubled.\n12 cm", "B", LENGTHS, {}, True),
    ("19-twice", "12 cm", "B", {**LENGTHS, "C": "12  cm"}, {}, True),    # both labels mean 12 cm
    ("20", "14", "E", NUMBERS, {}, False),
    ("20-boxed", r"\boxed{14}", "E", NUMBERS, {}, False),
    ("22", "Sorry, I can't recognize the image", "A", LETTERS, {}, False),
    ("23", "The two triangles share a side, so their areas are equal.", "C", LETTERS, {}, False),
    ("24", "I don't know.", "5", None, {}, False),
    ("24-choice", "I don't know.", "C", LETTERS, {}, False),
    ("25", LOOP * 6000 + r"so the total is \boxed{4", "460", None, {}, True),
    ("28", r"first \boxed{3}, no, \boxed{4}", "4", None, {}, True),
    ("30", r"\boxed{\frac{1}{2}}", r"\frac{1}{3}", None, {}, False),
    ("32", rf"\boxed{{{LONG}}}", LONG.replace("^{2}", "^2"), None, {}, True),
    ("33-prose", "I count 5 circles in the picture, all of them red.", "5", None, {}, False),
    ("33-commit", "The answer is 5.", "5", None, {"boxed_required": True}, False),
    ("34", "5", "5", None, {}, True),
    ("35", "Bugs Bunny", "Bugs Bunny", None, {}, True),
    ("35-other", "Daffy Duck", "Bugs Bunny", None, {}, False),
    ("36", "17", r"17^\circ", None, {}, True),
    ("36-sign", "17°", r"17^{\circ}", None, {}, True),
    ("36-word", "17 degrees", r"17^\circ", None, {}, True),
    ("37-cm", r"\boxed{10 cm}", "10", None, {}, True),
    ("37-square", "1,000.99m²", "1000.99", None, {}, True),
    ("39", "28", r"28\%", None, {}, True),
    ("40-percent", "28 percent", r"28\%", None, {}, True),
    ("40-pct", "28 pct", r"28\%", None, {}, True),
    ("41", "(-2, 1)", "(-2,1]", None, {}, False),
    ("42", r"\boxed{(-3, 1]}", "domain: [-4, 0) and range: (-3, 1]", None, {}, False),
    ("42-both", r"\boxed{\text{Domain: } [-4,0),\ \text{Range: } (-3,1]}",
     "domain: [-4, 0) and range: (-3, 1]", None, {}, True),
    ("44", "D = (0, 1.5)", "D = (0, 1)", None, {}, False),
    ("46", "n=1, 2, 3", "n=2, 3, 4", None, {}, False),
    ("48", "1:00", "12:00", None, {}, False),
    ("50", r"\boxed{1 + 1/e}", "1 - 1/e", None, {}, False),
    ("52", r"\sqrt2+\sqrt5", r"\sqrt{2}+\sqrt{5}", None, {}, True),
    ("52-unicode", "2√3", r"2\sqrt{3}", None, {}, True),
    ("53", r"\text{13}", "13", None, {}, True),
    ("55", r"\boxed{y=-\frac12x+\frac34}", "2x+4y-3=0", None, {}, True),
    ("58", r"1\frac{1}{2}", r"\frac32", None, {}, True),
    ("58-plain", "3 1/2", "3.5", None, {}, True),
    ("59-minus", "−5", "-5", None, {}, True),
    ("59-dot", r"\boxed{5.}", "5", None, {}, True),
    ("59-zeros", "5.00", "5", None, {}, True),
    ("60", r"2\sqrt{221}", r"2 \sqrt { 221 }", None, {}, True),
    ("60-capitals", r"2\sqrt{221}", r"2 \SQRT { 221 }", None, {}, True),
    ("60-wrong", "221", r"2 \SQRT { 221 }", None, {}, False),
    ("63", "62.6", "62.60", None, {}, True),
    ("63-fraction", "1/64", "0.015625", None, {}, True),
    ("64-tower", r"\boxed{9^{9^{9^{9}}}}", "9", None, {}, False),
    ("64-factorial", r"\boxed{99999999!}", "1", None, {}, False),
    ("64-digits", r"\boxed{" + "7" * 200_000 + "}", "7", None, {}, False),
    ("64-braces", r"\boxed{" + "{" * 5000 + "5" + "}" * 5000 + "}", "5", None, {}, False),
    ("64-short-braces", r"\boxed{" + "{" * 900 + "5" + "}" * 900 + "}", "5", None, {}, False),
]


@pytest.mark.parametrize("prediction, gold, options, more, expected", [row[1:] for row in TABLE],
                         ids=[row[0] for row in TABLE])
def test_table(prediction, gold, options, more, expected):
    verdict = grade(prediction, gold, options, **more)
    assert verdict.correct is expected, verdict


# ---- properties ---------------------------------------------------------------------------------

GOLDS = ["145", "374.1", "2 \\sqrt { 221 }", "\\frac { 9 \\sqrt { 3 } } { 2 }", "12 \\PI",
         "30^\\circ", "28\\%", "Area $=9 \\pi \\mathrm{cm}^{2}$",
         "domain: [-4, 0) and range: (-3, 1]", "N 34° W", "1:64", "$y \\leq 5$",
         "\\frac{x^2}{81}+\\frac{y^2}{9}=1", "f(x)=|x-3|", "even", "Bugs Bunny", "$13 \\%$",
         "-4.9\\n-4.9", "118°T", "{8}{5} \\pi", "Sep", "(3.000, 1.000)", "17:06", "12/12/2011",
         "68, 27, 20", "Product A", "100000000", "[2014, 2016]", "24/7", "$MgS$", "none", "red",
         "yes"]


@pytest.mark.parametrize("gold", GOLDS)
def test_every_gold_equals_itself(gold):
    """A grader that fails a benchmark's own gold marks perfect answers wrong."""
    assert grade(f"\\boxed{{{gold}}}", gold).correct
    assert grade(f"The answer is \\boxed{{{gold}}}.", gold).correct


@pytest.mark.parametrize("a, b", [("0.5", "1/2"), ("1,000", "1000"), ("2", "3"), ("-4", "−4"),
                                  ("\\sqrt{8}", "2\\sqrt2"), ("3e2", "300"), ("7/3", "2.5")])
def test_numbers_compare_the_same_both_ways(a, b):
    assert grade(f"\\boxed{{{a}}}", b).correct == grade(f"\\boxed{{{b}}}", a).correct


def test_no_text_raises_or_earns_a_point():
    """Random junk, half-open braces and control characters: always a verdict, never a right one."""
    rng, alphabet = random.Random(0), "\\{}()[]^_$%°√π+-*/=<>:,.!01e\x00\u2028 boxedfracsqrt\n"
    for _ in range(2000):
        junk = "".join(rng.choices(alphabet, k=rng.randint(0, 60)))
        assert not grade(junk, "417").correct
        grade("1", junk), grade(junk, junk, options=["a", "b"])


@pytest.mark.parametrize("text", ["not blue", "I see blue and red", "The answer is not blue.", ""])
def test_a_word_inside_a_sentence_is_not_an_answer(text):
    assert not grade(text, "blue").correct


@pytest.mark.parametrize("text", ["so " * 60_000, "\\boxed{" * 30_000, "(" * 200_000,
                                  "1+" * 100_000, "The answer is \\boxed{460}. " * 8_000,
                                  "^" * 200_000, "\\frac{" * 30_000, "<think>" * 30_000])
def test_long_loops_end(text):
    """A model that repeats itself to the token limit must not stall the evaluation."""
    start = time.perf_counter()
    grade(text, "461")
    assert time.perf_counter() - start < 5         # a guard against a hang, not a timing


def test_repeated_right_answer_counts():
    assert grade("The answer is \\boxed{460}. " * 8_000, "460").correct


# ---- kinds of mistakes, real responses, hostile texts ------------------------------------------

CASES = [(f"{n}-{k}", story, case) for n, (story, cases) in enumerate(KINDS.items())
         for k, case in enumerate(cases)]


@pytest.mark.parametrize("story, case", [row[1:] for row in CASES], ids=[row[0] for row in CASES])
def test_kinds(story, case):
    prediction, gold, options, right = case
    verdict = grade(prediction, gold, options)
    assert verdict.correct is right, f"{story}\n{case}\n{verdict}"


def test_the_table_of_rules():
    """Every rule has an example, and the example is decided by that rule and no earlier one."""
    result = doctest.testmod(grading)
    assert result.failed == 0 and result.attempted > 1


# The official verdict (extraction by a language model) says wrong; the response says the gold.
OFFICIAL_IS_WRONG = {
    **dict.fromkeys((f"idefics_9b_instruct/{n}" for n in
                    (143, 150, 155, 355, 364, 373, 396, 635, 643, 768)),
                    "it says '(X) text', label and text of the gold, and invents more questions"),
    "llama_adapter_v2/291": "its only sentence ends 'is the maximum in May '21', the gold",
}


@pytest.mark.skipif(not responses(), reason="the real responses are not at hand")
def test_real_responses():
    """1,200 responses to MathVista. Before: 441 right ones missed, 9 others counted.

    The rules were tuned on the 800 rows whose ids have the smallest crc32.
    """
    missed, counted = [], []
    for row in responses():
        verdict = grade(row["response"], row["gold"], row["options"], kind=row["kind"],
                        precision=row["precision"])
        if verdict.correct != row["official"]:
            (counted if verdict.correct else missed).append(row["id"])
    assert len(missed) <= 441 / 3
    assert set(counted) <= set(OFFICIAL_IS_WRONG)


MORE_GOLDS = ["C\nD", "(B)", "False", r"090^\circ T", "118掳T", "17:06", "DE", "-4.9\n-4.9", "3:2", "01",
              r"\FRAC { 26 } { 3 }", "28%", "N/A", "nan", "None", "090", "x>5", r"x \in (2,3]", "y=2x+1",
              r"\{1,2,3\}", r"\frac{3}{4} hours", "$1,234.50", "1/3", "−5", "3π", "2±√3", "∠ABC", "AB",
              "S.A. $=1209.84$", "Weekly water intake $=15.5$ Litres", "6{{a}^{2}}", r"2\sin x", "∞",
              r"\begin{pmatrix}1\\2\end{pmatrix}", "3+4i", r"3 \times 10^{8}", "x=2 or x=3", r"\pm 3",
              r"(-\infty, 5]", "B.", "7 hours 30 minutes", "2 1/2", "(2, 3), (4, 5)", "x ≠ 2", "6米"]


@pytest.mark.parametrize("gold", MORE_GOLDS)
def test_every_form_of_gold_equals_itself(gold):
    """Letters, words, formulas nobody computes: what a benchmark has for a gold must be reachable."""
    assert grade(f"\\boxed{{{gold}}}", gold).correct


@pytest.mark.parametrize("text", [
    " " * 200_000 + "x", "</s>" * 50_000 + "x", "A. 3 cm\n" * 30_000, "If x, the answer is 5. " * 9_000,
    "is (B) 4 cm. " * 20_000, "option " * 40_000, "answer to " * 30_000, "\\boxed{5}," * 30_000])
@pytest.mark.parametrize("options", [None, LENGTHS])
def test_long_loops_of_prose_end(text, options):
    """The rules that read prose must be linear too."""
    start = time.perf_counter()
    grade(text, "B", options)
    assert time.perf_counter() - start < 20         # a guard against a hang, not a timing


def test_hostile_texts():
    """A short run of what `python tests/test_grade.py 1000000` does at length."""
    fuzz(1500, seed=0)


def fuzz(count, seed):
    """The slowest grading of `count` hostile texts: (seconds, arguments). Raises if one does."""
    rng, slowest = random.Random(seed), (0, None)
    cases = [case for cases in KINDS.values() for case in cases]
    texts = [text for case in cases for text in case[:2]]
    texts += [row["response"] for row in responses()]
    for _ in range(count):
        prediction, gold = hostile(rng, texts), rng.choice(cases)[1]
        gold = gold if rng.random() < .6 else hostile(rng, texts)[:200]
        options = rng.choice((None, None, LENGTHS, ["s", "s*"], {"A": "", "B": "x"},
                              [hostile(rng, texts)[:100] for _ in range(4)]))
        more = {"kind": rng.choice(KIND_NAMES), "precision": rng.choice((None, 1, 2)),
                "tolerance": rng.choice((None, .001))}
        start = time.perf_counter()
        try:
            grade(prediction, gold, options, **more)
        except Exception as error:
            raise AssertionError(f"raises: {(prediction, gold, options, more)!r}") from error
        slowest = max(slowest, (time.perf_counter() - start, (prediction, gold, options, more)),
                      key=lambda pair: pair[0])
    return slowest


if __name__ == "__main__":
    print(fuzz(int(sys.argv[1]), seed=int(sys.argv[2])))


def test_the_command_without_its_arguments_says_what_they_are(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["grade.py"])
    with pytest.raises(SystemExit, match="usage: python grade.py RESPONSE GOLD"):
        runpy.run_path(grading.__file__, run_name="__main__")
