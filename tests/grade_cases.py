r"""What the grader once got wrong, kind by kind: the story, then cases of the same kind.

A case is (prediction, gold, options, right?). The first of each kind was seen in outputs, golds or
options of public benchmarks; the others are variants, so that a kind is mended and not a case.
hostile(rng) makes texts to be survived.
"""
import json
from pathlib import Path

LENGTHS = ["3 cm", "4 cm", "5 cm", "6 cm"]
ANGLES = ["30°", "40°", "50°", "60°"]
LETTERS = ["D", "B", "F", "H"]
YES = ["Yes", "No"]
REAL = Path(__file__).resolve().parents[2] / "shared" / "real" / "mathvista_responses.jsonl"

KINDS = {
    # ---- it raised, and ended the evaluation
    "A relation was kept as text, so a ° on one side met a parser that knows no degrees.": [
        (r"\boxed{x < 90^\circ}", r"x < 180^\circ", None, False),
        (r"\boxed{x < 90^\circ}", r"x<90°", None, True),
        (r"\boxed{a + b = 90^\circ}", r"b + a = 90", None, True)],
    "The same with a percent sign; 50 % is not 5 either.": [
        (r"\boxed{y < 50\%}", "y < 5", None, False),
        (r"\boxed{y < 50\%}", r"y < 50\%", None, True),
        (r"\boxed{2y = 50\%}", "2y = 5", None, False)],
    "The same with the comma of a thousand.": [
        (r"\boxed{x + y = 1,000}", "x + y = 1000", None, True),
        (r"\boxed{x + y = 1,000}", "x + y = 100", None, False),
        (r"\boxed{2x < 10{,}000}", "2x < 10,000", None, True)],
    "More than 308 digits are no float, and math.isfinite said so by raising.": [
        (r"\boxed{" + "9" * 310 + "}", "5", None, False),
        (r"\boxed{-" + "7" * 1500 + ".5}", "5", None, False),
        (r"\boxed{x = " + "9" * 310 + "y}", "x = 3y", None, False)],
    "Options with °C in a relation raised when they were compared by value.": [
        (r"(A) $T_{1}=105^{\circ}C,T_{2}=700^{\circ}C$", "B",
         [r"$T_{1}=105^{\circ}C,T_{2}=700^{\circ}C$", r"$T_{1}=100^{\circ}C,T_{2}=550^{\circ}C$"], False),
        (r"(A) $T_{1}=105^{\circ}C$", "A", [r"$T_{1}=105^{\circ}C$", r"$T_{1}=100^{\circ}C$"], True),
        (r"\boxed{t > 20^{\circ}C}", "B", [r"t > 10^{\circ}C", r"t > 20^{\circ}C"], True)],
    "Without options a zero byte stood for the labels, and '(\\0)' is in a hostile text.": [
        ("The value of (\0)if .", "15.5", None, False), ("It is (\0) 5.", "4", None, False)],
    # ---- a wrong answer counted
    "s, s+ and s* were one option once the star was taken for bold type (MMMU-val).": [
        ("A", "C", ["s", "s+", "s*", "ss"], False), ("C", "C", ["s", "s+", "s*", "ss"], True),
        (r"\boxed{s*}", "C", ["s", "s+", "s*", "ss"], True),
        (r"\boxed{s*}", "A", ["s", "s+", "s*", "ss"], False)],
    "AA, Aa and aa were one option once case was folded (MMMU-val, genetics).": [
        ("D", "E", ["AA", "Aa", "Aa or AA", "XAXA", "XAXa"], False),
        ("The answer is Aa.", "B", ["AA", "Aa", "aa"], True),
        ("The answer is Aa.", "A", ["AA", "Aa", "aa"], False)],
    "The last line was a label, and an option happens to read like that label.": [
        ("Some long work on it.\n\nD", "A", LETTERS, False),
        ("Some long work on it.\n\nD", "D", LETTERS, True), ("**B**", "B", ["A", "C", "B"], True)],
    "The same in a box that says Answer.": [
        (r"\boxed{\text{Answer: D}}", "A", LETTERS, False),
        (r"\boxed{\text{Answer: D}}", "D", LETTERS, True), (r"\boxed{Option D}", "A", LETTERS, False)],
    "A small model went on and invented another question with another answer.": [
        ("The answer is (B) 4 cm.\n\nQuestion: How wide?\nChoices:\n(A) 3 cm\n\nAnswer: (A) 3 cm", "A",
         LENGTHS, False),
        ("(B) 4 cm.\n\nQuestion: How wide?\n\nAnswer: (A) 3 cm", "B", LENGTHS, True),
        ("The answer is 5.\n\nHint: Give a number.\nQuestion: How wide?\nAnswer: 6", "5", None, True),
        ("I repeat it.\nQuestion: How wide?\nThe answer is 6.", "6", None, True),
        ("I repeat it.\nQuestion: Which month?\nThe answer is May.", "May", None, True),
        ("There are 3 things.\nQuestion: How many are red?\n\\boxed{2}", "2", None, True)],
    "Label and text contradict each other; the text was taken. It is neither.": [
        ("The correct option letter is C: 40°.", "B", ANGLES, False),
        ("The correct option letter is C: 40°.", "C", ANGLES, False),
        ("Answer: (A) 6 cm", "D", LENGTHS, False)],
    "A last line of marks only was equal to the option '*' (DynaMath 500, 501).": [
        ("Work without an answer:\n\\[\nx = 3\n\\]", "C", ["+", "-", "*", "/"], False),
        ("Work.\n---", "B", ["+", "-", "*", "/"], False),
        (r"\boxed{*}", "C", ["+", "-", "*", "/"], True)],
    "An assignment in a program was taken for a commit.": [
        ("if a > b:\n    answer = 'Yes'\nelse:\n    answer = 'No'\n\nprint(answer)", "B", YES, False),
        ("answer = 'No'\nif a > b:\n    answer = 'Yes'", "A", YES, False),
        ("```python\nanswer = 'No'\n```", "B", YES, False)],
    "Answers under conditions, then a refusal: none of them is a commit.": [
        ("If it is wide, the answer is (A) Yes. Otherwise, the answer is (B) No.\n\n"
         "Without data we cannot determine the option.", "B", YES, False),
        ("If it is wide, the answer is (A) Yes. Otherwise, the answer is (B) No.", "B", YES, False),
        ("If x is 1, the answer is 5. If x is 2, the answer is 6.", "6", None, False),
        ("The answer is B if it is wide, otherwise A.", "B", YES, False),
        ("The answer may be B. I cannot determine it from the image.", "B", YES, False)],
    # ---- a right answer was missed: options
    "An option without text, a picture, was dropped although it is the gold (DynaMath 139, 140).": [
        (r"\boxed{D}", "D", {"A": "A", "B": "B", "C": "C", "D": ""}, True),
        (r"\boxed{C}", "D", {"A": "A", "B": "B", "C": "C", "D": ""}, False),
        ("The answer is (D).", "D", {"A": "", "B": "x", "C": "", "D": ""}, True)],
    "'The correct option letter is X': MathVista asks for the option letter.": [
        ("The correct option letter is B.", "B", LENGTHS, True),
        ("So the option letter is: **B**", "B", LENGTHS, True),
        ("The correct option letter is A.", "B", LENGTHS, False)],
    "The last line is only the label.": [
        ("The sides add up to this.\n\nB", "B", LENGTHS, True),
        ("The sides add up to this.\n**(B)**", "B", LENGTHS, True),
        ("The sides add up.\nA\n\nB", "A", LENGTHS, False)],
    "The last line is the label with its own text; a list of all options is no answer.": [
        ("The sides add up to this.\n\n**B. 4 cm**", "B", LENGTHS, True),
        ("The sides add up to this.\n(B) 4 cm", "B", LENGTHS, True),
        ("We have\nA. 3 cm\nB. 4 cm\nC. 5 cm\nD. 6 cm", "D", LENGTHS, False)],
    "The first line is label and own text, then come remarks.": [
        ("B. 4 cm\n\nThe sides add up to this.", "B", LENGTHS, True),
        ("(B) 4 cm.\n\nExplanation: the sides add up.", "B", LENGTHS, True),
        ("No, it is not round.", "B", YES, True), ("Yes, it is.", "B", YES, False)],
    "The last sentence says '.. is (X) own text'.": [
        ("The length of the side is (B) 4 cm.", "B", LENGTHS, True),
        ("So it is (B). I hope this helps!", "B", LENGTHS, True),
        ("It is not (B) 4 cm.", "B", LENGTHS, False),
        ("It is (A) 3 cm or (B) 4 cm.", "B", LENGTHS, False)],
    "A box with a number that names no option, then 'the answer is (X)'.": [
        (r"so the side is $\boxed{7}$. Therefore, the answer is (B).", "B", LENGTHS, True),
        (r"The answer is (B). So the side is $\boxed{7}$.", "B", LENGTHS, False),
        (r"$\boxed{7}$. Option (A) is correct.", "A", LENGTHS, True)],
    r"'\text{Answer: X}' in a display.": [
        ("Thus, the correct answer is:\n\\[\n\\text{Answer: B}\n\\]", "B", LENGTHS, True),
        ("\\[\n\\text{Final answer: (B)}\n\\]", "B", LENGTHS, True),
        (r"\(\text{Answer: }\mathbf{B}\)", "B", LENGTHS, True)],
    "The box holds 'Answer: X'.": [
        (r"\[\boxed{\text{Answer: B}}\]", "B", LENGTHS, True),
        (r"\boxed{\text{Option B}}", "B", LENGTHS, True), (r"\boxed{answer is b}", "B", LENGTHS, True)],
    "'Option X is the correct answer': the label stands before the words.": [
        ("Therefore, option (B) is the correct answer.", "B", LENGTHS, True),
        ("So option B is correct.", "B", LENGTHS, True), ("所以选项B正确。", "B", LENGTHS, True),
        ("Option (B) is not the correct answer.", "B", LENGTHS, False)],
    "'.. is option X', 'matches option X'.": [
        ("The missing side is option **B. 4 cm**.", "B", LENGTHS, True),
        ("This matches option B.", "B", LENGTHS, True),
        ("The right one is not option B.", "B", LENGTHS, False)],
    "Label, blank, remark in brackets: the blank was eaten.": [
        ("Answer: B (the nearest of them)", "B", LENGTHS, True),
        ("Answer: A (the nearest of them)", "A", LENGTHS, True),
        ("The correct option is C (5 cm).", "C", LENGTHS, True),
        ("The correct option is C (6 cm).", "C", LENGTHS, False)],
    "A Chinese full stop ends the sentence without a blank behind it.": [
        ("正确答案是 B。因为两边相等。", "B", LENGTHS, True), ("答案：B。", "B", LENGTHS, True),
        ("答案是 12。因为 3*4=12。", "12", None, True)],
    "The heading Answer has no colon.": [
        ("Work.\n\n### Answer\nB. 4 cm", "B", LENGTHS, True), ("Work.\n**Answer**\n\n(B)", "B", LENGTHS, True),
        ("Work.\n\n## Final Answer\n12", "12", None, True)],
    "The box was never closed. A label is whole all the same, a number may not be.": [
        (r"The answer is \boxed{B.", "B", LENGTHS, True), (r"Answer: \boxed{\text{B", "B", LENGTHS, True),
        (r"The answer is \boxed{4", "4", None, False)],
    "The minus sign of the option's text was taken for a dash.": [
        ("Answer: (B) -$1,000", "B", ["$1,000", "-$1,000", "$500"], True),
        ("Answer: (A) -$1,000", "A", ["$1,000", "-$1,000", "$500"], False),
        ("Answer: B - 4 cm", "B", LENGTHS, True)],
    "The letters of an ordering were read as labels before the option's own text.": [
        (r"\boxed{C, A, B}", "B", ["A, B, C", "C, A, B", "B, A, C"], True),
        (r"\boxed{A, B, C}", "B", ["A, B, C", "C, A, B", "B, A, C"], False),
        ("The answer is C, A, B.", "B", ["A, B, C", "C, A, B", "B, A, C"], True)],
    "The > of the answer was eaten as decoration.": [
        ("So the answer is >60%.", "C", ["<30%", "30%-60%", ">60%"], True),
        ("So the answer is <30%.", "A", ["<30%", "30%-60%", ">60%"], True),
        ("Answer: > B", "B", LENGTHS, True)],
    "A small label alone in brackets.": [
        ("(b)", "B", LENGTHS, True), ("(b).", "B", LENGTHS, True), ("a side", "A", LENGTHS, False)],
    # ---- a right answer was missed: numbers and formulas
    r"Thousands with ',\!' (41 golds of MATH).": [
        (r"\boxed{15000}", r"15,\!000", None, True), (r"\boxed{\$16,\!386.20}", "16386.20", None, True),
        (r"\boxed{1,\!000,\!000}", "1000000", None, True), (r"\boxed{15}", r"15,\!000", None, False)],
    "A decimal of many digits against a fraction that has no last decimal.": [
        (r"\boxed{1.3333333333333333}", r"\frac{4}{3}", None, True),
        (r"\boxed{(0.6, 2.6666667]}", r"(\frac{3}{5}, \frac{8}{3}]", None, True),
        (r"\boxed{0.66666}", r"\frac{2}{3}", None, True), (r"\boxed{1.33}", r"\frac{4}{3}", None, False),
        (r"\boxed{0.500001}", r"\frac{1}{2}", None, False)],
    "Units in Chinese.": [
        (r"\boxed{6.0}", "6米", None, True), (r"\boxed{6 m}", "6米", None, True),
        (r"\boxed{6厘米}", "6米", None, False)],
    "A ratio is a fraction.": [
        (r"\boxed{\frac{3}{2}}", "3:2", None, True), (r"\boxed{1:1}", "1", None, True),
        (r"\boxed{2:3}", r"\frac{3}{2}", None, False), (r"\boxed{0.5}", "2:4", None, True)],
    "The gold begins with = (MathVerse).": [
        (r"\boxed{\frac{7}{4}}", r"=\frac{7}{4}", None, True), (r"\boxed{= 5}", "5", None, True),
        (r"\boxed{-5}", "=5", None, False)],
    "The gold has a name with full stops (MathVerse).": [
        (r"\boxed{1209.84}", "S.A. $=1209.84$", None, True), (r"\boxed{L.A. = 12}", "12", None, True),
        (r"\boxed{120.9}", "S.A. $=1209.84$", None, False)],
    "A long name, and behind the number a unit in capitals (MathVerse).": [
        (r"\boxed{15.5}", "Weekly water intake $=15.5$ Litres", None, True),
        (r"\boxed{15.5 litres}", "Weekly water intake $=15.5$ Litres", None, True),
        (r"\boxed{15.5 Meters}", "15.5 Litres", None, False)],
    "'LHS = value' where the left side is a name in LaTeX.": [
        (r"\boxed{S_{\triangle ABC} = 8}", "8", None, True), (r"\boxed{|AB| = 5}", "5", None, True),
        (r"\boxed{\tan \theta = \frac{3}{4}}", r"\frac{3}{4}", None, True),
        (r"\boxed{\overline{AB} = 5}", "5", None, True),
        (r"\boxed{\tan \theta = \frac{3}{4}}", r"\sin \theta = \frac{3}{4}", None, False),
        (r"\boxed{\sqrt{x} = 5}", "5", None, False)],
    "The same with three names.": [
        (r"\boxed{(p,q,r) = (3,2,7)}", "(3,2,7)", None, True),
        (r"\boxed{(p,q,r) = (3,2,7)}", "(2,3,7)", None, False),
        (r"\boxed{(a, b, c, d) = (1, 2, 3, 4)}", "(1,2,3,4)", None, True)],
    "A name with a subscript.": [
        (r"\boxed{2n+1}", "a_{n} = 2n+1", None, True), (r"\boxed{a_n = 1+2n}", "a_{n} = 2n+1", None, True),
        (r"\boxed{2n-1}", "a_{n} = 2n+1", None, False)],
    r"MathType writes {}^\circ.": [
        (r"\boxed{30^\circ}", r"30{}^\circ", None, True), (r"\boxed{30}", r"30{ }^{\circ}", None, True),
        (r"\boxed{31}", r"30{}^\circ", None, False)],
    "MathType puts a group behind a number, and groups into groups.": [
        (r"\boxed{6a^2}", "6{{a}^{2}}", None, True), (r"\boxed{6{a^2}}", "6a^2", None, True),
        (r"\boxed{6a}", "6{{a}^{2}}", None, False)],
    r"\mathrm without braces.": [
        (r"\boxed{108\pi}", r"108\mathrm \pi", None, True), (r"\boxed{5 \rm cm}", "5", None, True),
        (r"\boxed{108}", r"108\mathrm \pi", None, False)],
    "The base of a number, in braces or not.": [
        (r"\boxed{2112_{6}}", "2112_6", None, True), (r"\boxed{2112_6}", "2112_{6}", None, True),
        (r"\boxed{2112_7}", "2112_6", None, False)],
    "A noun behind the number.": [
        (r"\boxed{210}", r"210\text{ ways}", None, True), (r"\boxed{210 \text{ ways}}", "210", None, True),
        (r"\boxed{5 apples}", "5 pears", None, False), (r"\boxed{5 million}", "5", None, False),
        (r"\boxed{2 thirds}", "2", None, False), (r"\boxed{5 less than x}", "5", None, False)],
    "A clause behind the commit: ', as the table shows'.": [
        ("So the answer is 1982, as the table shows.", "1982", None, True),
        ("The answer is 1982 with an income of $931,441.", "1982", None, True),
        ("The answer is 5 or 6.", "5", None, False), ("The answer is not 5.", "5", None, False),
        ("The answer is 12 \\pi.", "12", None, False), ("The answer is 5 million.", "5", None, False),
        ("The answer is 3 - 4.", "3", None, False), ("It is 2 \\sqrt { 3 }.", "2", None, False)],
    "Several boxes joined by 'and' are one answer.": [
        (r"\boxed{(2, 2)} \text{ and } \boxed{(6, 2)}", "(2, 2), (6, 2)", None, True),
        (r"$\boxed{2}$ and $\boxed{3}$", "2, 3", None, True), (r"\boxed{2} and \boxed{3}", "3", None, False)],
    "A list of points has no order; a list of numbers has.": [
        (r"\boxed{(3,1),(2,1)}", "(2,1),(3,1)", None, True), (r"\boxed{(1,3),(2,1)}", "(2,1),(3,1)", None, False),
        (r"\boxed{3, 2, 1}", "1, 2, 3", None, False)],
    "An interval is an inequality.": [
        (r"\boxed{(-\infty, 5]}", r"y \leq 5", None, True), (r"\boxed{(-\infty, 5)}", r"y \leq 5", None, False),
        (r"\boxed{x > 3}", r"(3, \infty)", None, True), (r"\boxed{-2 < x \le 1}", "(-2, 1]", None, True),
        (r"\boxed{-2 < x < 1}", "(-2, 1]", None, False)],
    "Prose that ends '.. is N': the prompt asked for no box.": [
        ("The perimeter of the square is 16 m.", "16", None, True),
        ("There are **4** blue shapes.", "4", None, True),
        ("4 m + 4 m + 4 m + 4 m = **16 m**. Do you have other questions?", "16", None, True),
        ("The range is 1 to 7.", "7", None, False), ("The side is 4 and the area is 16.", "16", None, False),
        ("The side is 4. The area cannot be determined.", "4", None, False)],
}


def responses():
    """The real responses, none where they are not at hand: they are not part of the project."""
    return [json.loads(line) for line in REAL.open()] if REAL.is_file() else []


PIECES = ["\\boxed{", "{", "}", "\\frac", "\\sqrt[3]{", "^", "^{", "_", "$", "(", ")", "[", "|", "!", "9" * 400,
          "1e999", ".", ",", "1,000", "%", "°", "±", "∞", "∪", "or", "and", "=", "<", "≤", "≈", ":", "\n", "\0",
          "\ud800", "\u202e", "\u2028", "½", "x²", "√", "掳", "The answer is ", "Answer: ", "option ", "(A)", "B.",
          "if ", "otherwise ", "</think>", "<think>", "<answer>", '"answer": "', "\\text{", "\\\\", "**", "5 ways",
          "9^9^9^9", "99999999!", "170!", "-" * 50, "((((((((", "the ", "cm^2", "is ", "= ", "1/0", "0^-1", "(-8)^(1/3)",
          "答案是", "\\circ", "é", "\u0301", "１２", "𝟙", "x", "A", "\\{"]


def hostile(rng, texts):
    """A text to be survived: a known one cut, doubled and sprinkled with what is in PIECES."""
    text = rng.choice(texts) if rng.random() < .7 else ""
    text = text[-rng.choice((100, 400, 1500)):]
    for _ in range(rng.randint(1, 8)):
        at, piece = rng.randint(0, len(text)), rng.choice(PIECES)
        piece *= 1 if rng.random() < .9 else rng.randint(2, 120)
        text = text[:at] + piece + text[at + rng.choice((0, 0, 1, 5, 50)):]
    return text
