r"""Was the model right? Pull the answer out of a response, then compare it with the gold.

Idea     Grading is two questions: what did the model commit to (`extract`), and is that the gold
         (`grade`)? Both say "I cannot tell" rather than guess, and that counts as wrong. An
         extractor that takes the nearest option, or any number in the prose, measures itself.
In, out  grade(response, gold, options, kind, precision) -> Grade(correct, extracted, rule, reason)
         extract(response, labels, number) -> (answer or None, rule)
Equation p and g are the same when, both being exact rationals,   p = g
           otherwise                                              |p - g| <= 1e-6 max(|p|, |g|)
           a gold printed with d >= 2 decimals                    |p - g| <= 10^-d / 2
           a gold like 4/3, p printed with d >= 5 decimals        |p - g| <= 10^-d
           two equations, at fixed points x_k                     f_p(x_k) = c f_g(x_k), c constant
Run      python grade.py 'so the answer is \boxed{\frac12}' 0.5
Copy     this file alone; it needs only the standard library.

Departures from the benchmarks' own graders, and what is left out:
1) No LLM extracts or judges, so MathVerse golds that are sentences are compared as text and the
   score is a lower bound there.
2) No random option (MMMU), no nearest option (MathVista), no first capital letter (Video-MME), no
   substring (DynaMath, MMMU): each gives points to a refusal or to a wrong answer.
3) No sympy, no eval, no timeout. Sympy can spend a minute and a gigabyte on `99999999!` inside one
   C call that no signal interrupts. Here the text is short, the nesting shallow and every exact
   number bounded, so the work is bounded too and grading may run inside the training loop.
4) Left out, that is compared as text: functions (sin, log), matrices, complex numbers, repeating
   decimals, numbers in words ("two"). Units are compared, not converted: 50 cm is not 0.5 m.
"""
import ast
import math
import operator
import re
import string
import sys
import unicodedata
import zlib
from collections import deque
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate

KINDS = ("auto", "choice", "number", "math", "text", "list")
MAX_CHARS = 2000    # a longer answer is compared as text only
MAX_DEPTH = 50      # nesting of brackets, exponents and lists
MAX_BITS = 8192     # of one exact number, numerator and denominator together
MAX_POWER = 1000    # integer exponent of an exact number
MAX_ITEMS = 64      # of a set or list: sets are compared pair by pair
POINTS = 16         # where formulas with variables are compared


@dataclass(frozen=True)
class Grade:
    """The verdict and enough to argue with it: what was read, by which rule, and why."""
    correct: bool
    extracted: str | None   # None: the response commits to nothing
    rule: str               # one of RULES, none, or unclosed think
    reason: str             # count the "no answer"s: a benchmark should report their share


# ---- 1) What did the model commit to? ----------------------------------------------------------

def extract(prediction, labels=None, number=False):
    """(answer or None, rule): what the response commits to, never what it merely mentions.

    labels  of a multiple-choice item, alone or as a dict label -> text: the answer is a label
    number  the answer is a number: it may be taken out of a sentence

    The rules are tried in the order of RULES, and the first to find something decides. What
    contradicts itself or is taken back ("A or B", "not A", a refusal) is no answer.

    >>> for name, find, why, example in RULES:
    ...     assert extract(example, {"A": "the sun", "B": "the moon"}) == ("B", name)
    """
    text = prediction.rpartition("</think>")[2].strip()
    text = re.sub(r"(?:\s{0,9}(?:</s>|<\|\w{1,30}\|>)){1,9}$", "", text)     # the stop token
    if "<think>" in text:           # cut off while thinking: nothing in there is an answer yet
        return None, "unclosed think"
    if labels and not isinstance(labels, dict):
        labels = dict.fromkeys(labels, "")
    # Small models go on and invent the next question; its options and answer are not this one's.
    own_part = re.split(r"\n\s{0,9}(?:Question|Hint|Choices):", text, maxsplit=1)[0]
    found = extract(own_part, labels, number) if own_part != text else (None, "none")
    if found[0] is not None and (found[1] in ("boxed", "tag", "commit") or
                                 (labels or number) and not _boxed(text)):
        return found
    unnamed = None, "none"
    for rule, find, *_ in RULES:
        answer = find(text, labels, number)
        if answer and labels and rule in ("boxed", "tag"):      # names no option: what follows may
            unnamed, text = (answer, rule), text.rpartition(answer)[2]
            answer = _pick(answer, labels) or None
        if answer is not None:
            return (answer, rule) if answer else (None, "none")
    return unnamed


_BRACE = re.compile(r"\\{1,2}boxed\s*\{|\\[\\{}]|[{}]")
_AND = re.compile(r"\}[\s$,\\]*(?:(?:\\text\s*\{\s*)?and\b[\s}$]*)?\\+boxed\s*\{")


def _boxed(text, labels=None, number=False):
    r"""Content of the last closed, non-empty \boxed{}; of nested boxes the innermost.

    One pass with a stack: a model that loops to its token limit writes thousands of boxes, the
    last of them cut off, and counting braces anew from every one would be quadratic.
    """
    stack, boxes = [], deque([(-1, -1)], maxlen=16)
    for match in _BRACE.finditer(text):
        token = match.group()
        if token == "}" and stack:
            opened = stack.pop()
            if opened > boxes[-1][0] and text[opened:match.start()].strip():
                boxes.append((opened, match.start()))
        elif token[-1] == "{" and token != r"\{":
            stack.append(match.end() if "boxed" in token else -1)
    start, end = boxes.pop()
    answer = text[start:end].strip() if end > 0 else None
    while boxes and _AND.fullmatch(text[boxes[-1][1]:start]):   # \boxed{2} and \boxed{3}: both
        start, end = boxes.pop()
        answer = f"{text[start:end].strip()}, {answer}"
    return answer


# A JSON field as models write it: bare numbers, and LaTeX backslashes that break a JSON parser.
_JSON = re.compile(
    r'"(?:(?:short|final)[ _])?answer"\s{0,9}:\s{0,9}(?:"((?:[^"\\]|\\.){0,2000})"'
    r'|(\[[^\]\n]{0,2000}\]|-?\d{1,3}(?:,\d{3})+(?:\.\d+)?|[^\s",}\[][^",}\n]{0,200}))', re.I)


def _tagged(text, labels=None, number=False):
    """Content of the last <answer>..</answer>, else of the last "short answer" field of a JSON."""
    head, closed, _ = text.rpartition("</answer>")
    _, opened, inside = head.rpartition("<answer>")
    if closed and opened:
        return inside.strip()
    for match in deque(_JSON.finditer(text), maxlen=1):
        quoted, bare = match.groups()
        return (bare or quoted.replace("\\\\", "\\").replace('\\"', '"')).strip()
    return None


# No "=" here: `answer = 'No'` is a line of code, and its other branch may say Yes.
_COMMIT = re.compile(
    r"(?:\b(?:answer|(?P<option>option|choice)(?: letter)?)\b|答案)(?:\s(?:to|for)\s[^.:\n]{1,80}?)?"
    r"[\s*_>]{0,4}(?:(?:is|are|was|would be|should be|must be)\b|[:：是为])"
    r"|^[#*_ ]{0,9}(?:final )?answer[*_ ]{0,4}\n|\bfinal answer[*_ ]{0,4}(?=\n)"
    r"|\b(?:is|be|matches|choose|select|pick|corresponds to)\s(?:the\s)?"
    r"(?P<named>option|choice|letter)(?=\s)"
    r"|(?:\boption\s|选项)\s?(?=(?P<before>[^.\n]{1,80}?)\s?"
    r"(?:\bis\s(?:the\s)?(?:correct|right|best)\b|是?正确))", re.I | re.M)
_LEAD = re.compile(r"(?:[\s*_:：$\"“`}]|>+\s|\\[\[(]|<<|(?:approximately|about|roughly)\s)*", re.I)
# Where a commit's sentence ends. Not after the B of "B. 12 cm": the rest may contradict it.
_END = re.compile(r"(?<!\b[A-J])[.?](?=[\s*\"”]|$)|。|(?<=[a-z]{2})!|>>|\n|,?\s(?:because|since)\b")
_SENTENCE = re.compile(r"(?<!\b[A-J])(?<=[.!?])[*_]{0,3}\s+|(?<=。)|\n+")
_REFUSAL = re.compile(
    r"\b(?:cannot|can't|can not|(?:unable|(?:im|not )possible) to)\s(?:be\s|definitively\s){0,2}"
    r"(?:determin|answer|tell|say|know|identif|infer|conclude|decide)|\b(?:not (?:enough|sufficient)"
    r"|insufficient|not provide (?:enough|any|information)|don't know)\b", re.I)
_BRANCH = re.compile(r"(?:^|[.\n。])\s*(?:but\s)?(?:(if|when|unless)|otherwise|else)\b", re.I)
_NEGATION = re.compile(r"\b(?:not|neither|nor|never|unlike|rather than|instead|or)\b|n't\b", re.I)


def _undone(text, start, end):
    """Is text[start:end] taken back behind it, or does it hold in one of several cases only?"""
    sentence = max(text.rfind(mark, 0, start) for mark in (". ", "\n", "。")) + 1
    case = _BRANCH.match(text[sentence:end])
    several = case and (not case[1] or len(_BRANCH.findall(text)) > 1)
    return bool(several or _REFUSAL.search(text, end))


def _committed(text, labels, number):
    # A phrase loop holds thousands of commits; its last few say all that it has to say.
    for match in reversed(deque(_COMMIT.finditer(text), maxlen=20)):
        start = _LEAD.match(text, match.end()).end()
        said = match["before"] or _END.split(text[start:start + MAX_CHARS], maxsplit=1)[0].strip()
        if labels:
            answer = _pick(said, labels)
        elif match["option"] or match["named"] or match["before"] or not said:
            continue
        else:
            answer = _leading_number(said) if number else said
        answer = _in_sentence(said, labels) if answer is None else answer
        if answer is not None:
            undone = said.startswith("not ") or _undone(text, match.start(), start + len(said))
            return "" if undone else answer
    return None


def _whole(text, labels, number):
    if labels:
        return None if "\n" in text else _pick(text, labels, "whole")
    few = 1 <= len(text.split()) <= 5 and "\n" not in text and not number
    return text if few or _value(text) is not None else None


def _line(text, labels, number):
    if not labels:
        return None
    lines = [line for line in text.splitlines() if line.strip()][-100:] or [""]
    listed = {line: label for line in lines if line.strip("*_().") not in labels
              and (label := _pick(line, labels, "line"))}
    if len(set(listed.values())) > 1:
        lines = [line for line in lines if line not in listed] or [""]
    opening = re.split("[,.:;!]", lines[0])[0]              # "No, it is not": the option No
    early = None if _REFUSAL.search(text) else _pick(lines[0], labels, "line") or (
        opening not in labels and _option_with_text(opening, labels)) or None
    return _pick(lines[-1], labels, "line") or early


def _last_sentence(text, labels, number):
    sentences = _SENTENCE.split(text[-MAX_CHARS:])[-20:] if labels or number else ()
    for sentence in reversed(sentences):
        end = text.rfind(sentence) + len(sentence)
        answer = "" if _REFUSAL.search(sentence) else _in_sentence(sentence, labels)
        if answer is not None or re.search(r"\d", sentence):
            return "" if answer and _undone(text, end - len(sentence), end) else answer
    return None


# Words that make another number of the one before them, and words that do not: 12 \pi is not 12.
_SCALES = (r"and|or|not|than|more|less|times|plus|minus|dozen|hundred|thousand|half|halves"
           r"|quarters?|thirds?|[a-z]{1,9}[nfxhd]ths?|[a-z]{1,9}illion|squared|cubed|sin|cos|tan"
           r"|log|ln|pi|sqrt")
_GOES_BY = re.compile(rf"(?!(?:{_SCALES})\b)[\"'(]?(?:[^\W\d_]{{2}}|a\b|[.,;!?–—)])", re.I)
_IS = re.compile(
    r"(?:\b(?:is|are|was|were|be|equals?|needs?|spends?|spent|costs?|total of)\b|[=≈])[\s*_`]{1,4}"
    r"(?:(?:equal to|about|approximately|around|roughly|only|exactly|a total of)\s)?(?=\S)", re.I)


def _in_sentence(sentence, labels=None):
    """The number or option of which it says "is"; "" if it says so of two, None if of none."""
    names = "|".join(map(re.escape, labels or ())) or "(?!)"        # (?!) matches nothing
    label = rf"(\b(?:is|are|be|was|option|choose)\s[*_]{{0,3}})?\(({names})\)(?=(.*))"
    found = [*re.finditer(label, sentence[-MAX_CHARS:], re.S)]
    if found and (len({match[2] for match in found}) > 1 or _NEGATION.search(sentence)):
        return ""
    for match in found:
        if match[1] or _begins(match[3], labels[match[2]]):
            return _pick(f"({match[2]}){match[3]}", labels)
    ends = [match.end() for match in _IS.finditer(sentence[:MAX_CHARS])][-20:]
    numbers = [number for end in ends if (number := _leading_number(sentence[end:])) is not None]
    if not numbers or not all(_same(_value(number), _value(numbers[-1])) for number in numbers):
        return "" if numbers else None
    return _option_with_value(numbers[-1], labels) if labels else numbers[-1]


def _leading_number(text):
    """The number that `text` begins with, "" if another may be meant, None if there is none.

    >>> [_leading_number(text) for text in ("16 m long", "3 or 4 of them", "4 + 4 apples")]
    ['16 m', '', '4 + 4']
    """
    words, unclear = text[:300].split()[:16], None
    for k in range(1, len(words) + 1):
        value, after = _value(" ".join(words[:k])), "".join(words[k:k + 1]).strip("*_`")
        if value and value.number is not None:
            if re.match(r"(?:or|and|to|if|through)$|\d", after):
                unclear = ""                    # "3 or 4"; but "3 1/2" is read with the next word
            elif not after or _GOES_BY.match(after):
                longer = None if value.unit else _value(" ".join(words[:k + 1]))
                if not longer or longer.unit not in _UNITS.values():
                    return " ".join(words[:k]).strip(" *_`.,;:")
    return unclear


def _mentioned(text, labels, number):
    sentences = _SENTENCE.split(text) if labels and len(text) < MAX_CHARS else ()
    words, said = {_words(labels[label]): label for label in labels or ()}, _words(text)
    hits = {word for word in words if word.strip() and word in said}
    hits = {word for word in hits if not any(word != hit and word in hit for hit in hits)}
    if len(hits) != 1 or len(min(hits)) < 5 or len(sentences) > 5 or _REFUSAL.search(text):
        return None
    hit = hits.pop()
    denied = any(hit in _words(line) and _NEGATION.search(line) for line in sentences)
    return None if denied else words[hit]


def _words(text):
    return " " + " ".join(re.findall(r"[^\W_]+", text.casefold())) + " "


# Name, how to find it, why it counts, and an example that means B in extract's doctest.
RULES = (
    ("boxed", _boxed, "prompts ask for it; if it names no option, what follows still may",
     r"first \boxed{A}, no, \boxed{B}"),
    ("tag", _tagged, "prompts that ask for <answer> or JSON",
     '{"solution": "it is night", "short answer": "B"}'),
    ("commit", _committed, "the response says so in as many words; the last time counts",
     "The answer is A. No: the correct option letter is B."),
    ("whole", _whole, "the response is nothing but an answer", "(b)"),
    ("line", _line, "the last line or the first is an option, and no list of all options",
     "The moon, for it is night."),
    ("sentence", _last_sentence, 'the last one with an answer in it says "is 16 m" or "is (B)"',
     "At noon it is (A). So at night it is (B). I hope this helps!"),
    ("mention", _mentioned, "a short response has the words of only one option, without not",
     "One sees the moon at night."),
)


# ---- 2) Multiple choice ------------------------------------------------------------------------

def _table(options):
    """Ordered label -> text. A list gets A, B, C..; "A. red" loses the label that it repeats."""
    if not isinstance(options, dict):
        options = dict(zip(string.ascii_uppercase, options or ()))
    return {str(label): re.sub(rf"^\s*\(?{re.escape(str(label))}[.:)．]\s*", "", str(text)).strip()
            for label, text in options.items()}


def _option_with_text(answer, labels):
    """The label of the one option that reads `answer`: exactly, else but for marks and case.

    s, s+ and s* are three options: "**s**" may be any of them, as a star may be bold type.
    """
    for form in (_collapse, normalise, _plain):
        said = form(answer)
        hits = [label for label, text in labels.items() if said and form(text) == said]
        if hits:
            return hits[0] if len({_collapse(labels[label]) for label in hits}) == 1 else None
    return None


def _option_with_value(answer, labels):
    value = _value(answer)
    hits = {_plain(text): label for label, text in reversed(labels.items())
            if value and _same(value, _value(text))}
    return min(hits.values()) if len(hits) == 1 else None


def _begins(said, option):
    """Does `said` begin with the option's own text?"""
    said, own = (_plain(text.strip(" .,;:")).strip("()") for text in (said, option))
    return own and re.match(re.escape(own) + r"(?!\w|\.\d)", said)


def _pick(answer, labels, place="said"):
    """The label(s) that `answer` names ("B" or "C, D"), None if none, "" if it contradicts itself.

    place: "said" in a box or after "answer is", where "b" and "B because.." mean B; else the
    "whole" response, where only `B`, `(B)` and `B. text` do; or a "line", where the text must be
    the option's own. "A rectangle has.." names nothing, ever.
    """
    text = answer[:MAX_CHARS].replace(r"\boxed{", "")
    missing = text.count("{") - text.count("}")         # of a box never closed, \text{Answer: B}
    text = normalise(text + "}" * missing if missing > 0 else text).rstrip("}" * (missing < 0))
    if place == "said":
        named = r"^(?:the )?(?:correct )?(?:answer|option|choice|letter)\b(?: is)?[\s:]*"
        text = re.sub(named, "", text, flags=re.I)
    flags = re.S | re.I if place == "said" or text[:1] == "(" else re.S
    names = "|".join(map(re.escape, sorted(labels, key=len, reverse=True)))
    spelled = {label.casefold(): label for label in labels}
    lone = [re.fullmatch(rf"[(\[]?\s*({names})\s*[)\]]?\.?", part, flags)
            for part in re.split(r"\s*(?:,|;|&|\n|\band\b)\s*", text)]
    # A lone label first, for an option may read "D"; then texts, for one may read "C, A, B".
    by_text = _option_with_text(answer, labels) or _option_with_text(text, labels)
    if all(lone) and (len(lone) == 1 or not by_text):
        return ", ".join(sorted({spelled[match[1].casefold()] for match in lone}))
    match = re.match(rf"[(\[]?\s*({names})(?:\s*([)\]]))?(?![\w'])\**(.*)", text, flags)
    if by_text or not match:
        return by_text or _option_with_value(text, labels)
    name, bracket, rest = match.groups()
    label, reads = spelled[name.casefold()], re.sub(r"^\s*[.:,;]?\s*(?:- )?", "", rest)
    own = _begins(reads, labels[label])
    other = (_option_with_text(reads, labels)
             or _option_with_value(reads.strip("()"), labels) or label)
    if not own and other != label or re.match(
            rf"\s*(?:[,;/&]|or\b|and\b)\s*[(\[]?(?:{names})\b| (?:if|when|unless)\b", rest):
        return ""                               # "B or C"; "B. 12 cm" where 12 cm is option C
    # With only a blank between, "B because" is fine, but A, I and small letters may be words.
    wordlike = name in ("A", "I") or name not in labels
    follows = r" (?:because|since|as|is|which)\b| \(" if wordlike else r" [\w(]"
    clear = own or place != "line" and (bracket or re.match(r"\s*[.:]|\s*[,;-]\s", rest)
                                        or place == "said" and re.match(follows, rest))
    return label if clear else _option_with_value(text, labels)


# ---- 3) One spelling for everything ------------------------------------------------------------

_COMMANDS = {word: symbol for symbol, words in {
    r"\frac": "dfrac tfrac cfrac", "≤": "le leq leqslant", "≥": "ge geq geqslant", "≠": "ne neq",
    "<": "lt", ">": "gt", "≈": "approx simeq", "*": "times cdot ast", "/": "div", "±": "pm",
    "∪": "cup", "∈": "in", "∞": "infty", "π": "pi", "°": "degree", "∠": "angle", ":": "colon",
    " ": "quad qquad", "|": "vert lvert rvert",
    "": "left right big bigl bigr displaystyle triangle",
}.items() for word in words.split()}
# 掳 is a degree sign that somebody upstream decoded as Chinese (MathVerse).
_CHARACTERS = str.maketrans({
    **dict.fromkeys("−–—‐‑‒", "-"), **dict.fromkeys("×·⋅∙", "*"), **dict.fromkeys("掳º˚", "°"),
    **dict.fromkeys("\u200b\ufeff△", None), "÷": "/", "√": r"\sqrt ", "∛": r"\sqrt[3]", "’": "'"})
_REWRITE = [(re.compile(old), new) for old, new in (
    (r"\\\\(?=[A-Za-z])", r"\\"),                               # a command escaped twice
    (r"\\(?:text[a-z]*|math[a-z]+|operatorname|overline|mbox|rm|bm)\s*"
     r"(?:\{([^{}]*)\}|(?![A-Za-z]))", lambda m: f" {m[1] or ''} "),
    (r"\\!|\{\s*\}", ""), (r"\{([A-Za-z])\}(?=\^)", r"\1"),     # {}^\circ, {a}^{2}
    (r"_\{\s*(\w+)\s*\}", r"_\1"), (r"\^\s*\{?\s*\\circ\s*\}?", "°"),
    # Some copies of Geometry3K are in capitals: 12 \PI, 2 \SQRT { 221 }.
    (r"\\([A-Za-z]+)", lambda m: _COMMANDS.get(m[1].lower(), m[0].lower())),
    (r"(?<=\d)(?:\{,\}|\\,)(?=\d{3})", ","), (r"\\[,;: >]|~", " "), (r"\\\\", "\n"),
    (r"\\\{", "⦃"), (r"\\\}", "⦄"),                             # braces of a set, not of a group
    (r"\\([%&#_])", r"\1"), (r"\\?[$€£]|\\[\[\]()]", ""),
    (r"<=", "≤"), (r">=", "≥"), (r"!=", "≠"),
    (r"(?<=[\w)])\*\*(?=[\w(])", "^"), (r"\*\*", ""),           # a power in code, else bold type
    (r"\\frac\s*(\d)", r"\\frac{\1}"),
    (r"\\frac\s*(\{[^{}]*\})\s*(\d)", r"\\frac\1{\2}"), (r"[^\S\n]+", " "), (r"\s*\n\s*", "\n"),
    (r"^[\s*_=]+|[\s*_.,;。]+$", ""), (r"^([\"'`])(.*)\1$", r"\2"))]
_MONTHS = {name[:3]: name for name in (
    "january february march april may june july august september october november december"
).split()} | {"sept": "september"}


def _unfold(match):
    """NFKC alone would turn m² into m2, x₁ into x1 and 1½ into 11/2, so these go first."""
    plain = unicodedata.normalize("NFKC", match.group()).replace("⁄", "/")
    return f" {plain}" if "/" in plain else f"{'_' if match.group() >= '₀' else '^'}{{{plain}}}"


def _collapse(text):
    return " ".join(text.split())


def normalise(text):
    """One spelling per meaning, idempotent. Capital and small letters stay distinct."""
    bare = re.fullmatch(r"[A-Za-z\d](?:[A-Za-z\d ,-]*[A-Za-z\d])?", text, re.A)
    return _collapse(text) if bare or len(text) > MAX_CHARS else _rewrite(text)


@lru_cache(1024)
def _rewrite(text):
    for _ in range(9):              # taking off one layer can uncover another: \text{\text{5}}
        before, text = text, re.sub("[⁰¹²³⁴-⁹⁺⁻]+|[₀-₉]+|[¼-¾⅐-⅞]", _unfold, text)
        text = unicodedata.normalize("NFKC", text.translate(_CHARACTERS)).translate(_CHARACTERS)
        for pattern, new in _REWRITE:
            text = pattern.sub(new, text)
        if text == before:
            break
    return text


def _plain(text):
    """The form in which texts are compared: caseless, blanks only where blanks mean something."""
    text = _collapse(normalise(text).casefold())
    # "N 34° W" is N34°W, but "3 1/2" is not 31/2 and "not able" is not notable.
    text = re.sub(r"(?<=[^\W\d_]) (?=[^\W\d_])|(?<=\d) (?=\d)", "\0", text).replace(" ", "")
    return _MONTHS.get(text, text.replace("\0", " "))


# ---- 4) A small calculator ---------------------------------------------------------------------

class Unreadable(Exception):
    """Not mathematics, or more of it than this file is willing to compute."""


# LaTeX to brackets, innermost first. "{8}{5}" stays as it is: nobody knows what it means.
_BRACKETS = [(re.compile(old), new) for old, new in (
    (r"\\frac ?\{([^{}]*)\} ?\{([^{}]*)\}", r"((\1)/(\2))"),
    (r"\\?sqrt ?\[([^][]*)\] ?(?:\{([^{}]*)\}|(\d+))", r"((\2\3)^(1/(\1)))"),
    (r"\\?sqrt ?(?:\{([^{}]*)\}|([\d.]+|\\?[a-zα-ω]+))", r" sqrt(\1\2)"),
    (r"(?<=\d)\{(?=[A-Za-z])([^{}]*)\}", r"(\1)"),
    (r"(?<![\w})\]] )(?<![\w})\]])\{([^{}]*)\}(?! ?[{\d])", r"(\1)"),
    (r"\|([^|{}]+)\|", r"(((\1)^2)^(1/2))"),
    (r"(?<![\d.])(1?\d{1,2})!", lambda m: f"({math.factorial(int(m[1]))})"))]
_TOKEN = re.compile(r"(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)"
                    r"|(?P<name>[A-Za-z]_(?:\d+|[A-Za-z])|\\?[A-Za-z]+|[α-ω])|\S")
_CONSTANTS = {"π": math.pi, "pi": math.pi, "e": math.e}
_GREEK = {"\\" + name for name in "alpha beta gamma delta theta lambda mu rho phi omega".split()}


@lru_cache(256)
def _parse(text):
    """(tree, names): Python's own parser reads it, as names, + - * / **, sqrt and brackets."""
    names = {}

    def rename(match):
        token = match.group()
        if match["number"] and abs(int(re.split("[eE]", token + "e0")[1])) <= MAX_POWER:
            names[word := f"n{len(names)}"] = Fraction(token)
            return f" {word} "
        if not match["name"] and token in "+-*/^()" or token == "sqrt":
            return f" {token} ".replace("^", "**")
        whole = len(token) == 1 or "_" in token or token in _GREEK or token in _CONSTANTS
        if not match["name"] or not whole and (len(token) > 3 or not token.isalpha()
                                               or not token.islower()):
            raise Unreadable(token)         # a word, or a segment AB
        words = []
        for letter in [token] if whole else token:      # xy is x times y
            names[word := f"v{len(names)}"] = _CONSTANTS.get(letter, letter)
            words.append(word)
        return f" {' '.join(words)} "

    for _ in range(MAX_DEPTH):
        before = text
        for pattern, new in _BRACKETS:
            text = pattern.sub(new, text)
        if text == before:
            break
    text = _TOKEN.sub(rename, text.replace("[", "(").replace("]", ")"))
    # 2x and 2(3) are products; "2 3" is not, nobody knows what it means.
    text = re.sub(r"([nv]\d+|\))\s*(?=v|\(|sqrt)", r"\1*", text)
    try:
        return ast.parse(text.strip(), mode="eval").body, names
    except (SyntaxError, MemoryError, RecursionError):
        raise Unreadable(text) from None


_BINARY = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
           ast.Div: operator.truediv}


def _compute(node, values, depth=0):
    """A Fraction while all is rational, else a float; ArithmeticError where undefined."""
    if depth > 4 * MAX_DEPTH:
        raise Unreadable("too deep")
    if isinstance(node, ast.Name) and node.id in values:
        return values[node.id]
    if isinstance(node, ast.UnaryOp):
        value = _compute(node.operand, values, depth + 1)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.Call) and len(node.args) == 1:          # sqrt
        return _power(_compute(node.args[0], values, depth + 1), Fraction(1, 2))
    if not isinstance(node, ast.BinOp):
        raise Unreadable("no formula")
    value = _BINARY.get(type(node.op), _power)(
        _compute(node.left, values, depth + 1), _compute(node.right, values, depth + 1))
    if isinstance(value, Fraction) and (
            value.numerator.bit_length() + value.denominator.bit_length() > MAX_BITS):
        raise Unreadable("number too long")
    return value


def _power(base, exponent):
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        # The size is known before the work is done: 9^9^9 stops here, not at a gigabyte.
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if abs(exponent) > MAX_POWER or bits * abs(exponent) > MAX_BITS:
            raise Unreadable("power too big")
        return base ** int(exponent)
    if base < 0 and isinstance(exponent, Fraction) and exponent.denominator % 2:
        return _power(-base, exponent) * (-1) ** exponent.numerator     # the cube root of -8
    if base < 0:
        raise ArithmeticError("not real")
    return float(base) ** float(exponent)


def _evaluate(body, point=0):
    """(value, has variables); the value is NaN where `body` is undefined.

    A variable has a fixed value per `point`, so two formulas can be compared without any algebra.
    """
    tree, names = _parse(body)
    # In -8..8. crc32 and not hash(), which Python salts anew in every process.
    values = {name: zlib.crc32(f"{value} {point}".encode()) / 2 ** 28 - 8
              if isinstance(value, str) else value for name, value in names.items()}
    try:
        value = _compute(tree, values)
        return value if _finite(value) else math.nan, values != names
    except ArithmeticError:
        return math.nan, True


def _finite(value):
    return isinstance(value, Fraction) or math.isfinite(value)      # a Fraction may exceed floats


# ---- 5) What an answer denotes -----------------------------------------------------------------

@dataclass(frozen=True)
class Value:
    """An item (a number or a formula), a relation, or a group. `x = 5 cm`: name x, body 5."""
    kind: str                               # "item"; the sign in `body = 0`; brackets of a group,
    body: str = ""                          # "," for none, ":" for a ratio, "clock" for a time
    number: Fraction | float | None = None  # of an item without variables
    unit: str = ""
    items: tuple = ()                       # of a group
    name: str = ""


_UNITS = {spelling: row.split()[0] for row in (
    "mm millimeter 毫米", "cm centimeter centimetre 厘米", "m meter metre 米", "km kilometer 千米 公里",
    "in inch inches", "ft foot feet", "yd yard", "mi mile", "mL ml 毫升", "L liter litre 升", "mg",
    "g gram 克", "kg kilogram 千克 公斤", "lb pound", "s sec second 秒", "min minute 分钟", "h hr hour 小时",
    "day 天", "week", "month", "year yr 年 岁", "N", "J", "W", "V", "K", "Hz", "Pa", "mol", "dollar",
    "cent", "元", "unit 个", "°C", "°F", "° deg degree 度", "% percent pct"
) for word in row.split() for plural in {word, word + "s" * (len(word) > 1)}
    for spelling in {plural, plural.capitalize() if len(word) > 3 else plural}}
_ONE = f"(?:{'|'.join(sorted(_UNITS, key=len, reverse=True))})" + r"(?: ?\^ ?\{? ?\d ?\}?)?"
_UNIT = re.compile(rf"(?<![A-Za-z\\_])((?:square|sq\.?) |cubic )?({_ONE}(?: ?(?:/|per) ?{_ONE})?)$")
# A noun that only names what is counted: 210 ways. "5 million" and "2 thirds" are other numbers.
_NOUN = re.compile(
    rf"(?<=[\d}})π°]) ?(?!(?:[a-z]+ )?(?:{_SCALES})\b)(?:[a-z]+ )?([a-z]{{3,}}?)s?$", re.I)
# S_ABC, Area, S.A., |AB|, \tan θ, f(x) or (p, q, r), when "= value" follows.
_NAME = re.compile(
    r"(?!\\(?:sqrt|frac)\b)(?:m?∠ ?)?([A-Za-zα-ω|\\][\w.| \\∠]{0,40}|\([a-z](?:, ?[a-z])+\))"
    r"(\([A-Za-z]\))? ?([=≈:∈]) ?(?=\S)")
_NOT_MATH = re.compile(r"(?!pi$)[^\W\d_]{2,}|\d{1,2}/\d{1,2}/\d{4}")        # a word, a date
_MIXED = re.compile(r"(?<![\w.^}])(\d+) ?(?:\\frac ?\{ ?(\d+) ?\} ?\{ ?(\d+) ?\}|(?<= )(\d+)/(\d+))"
                    r"(?![\d.])")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:,\d{3})+|(?: \d{3})+)(?![\d,/])")
_COMMA = r"(?<!\d),|,(?!\d{3}(?!\d))"       # between the items of a list, not inside 1,000


def _value(text):
    """The Value of a text, None if it is no mathematics."""
    try:
        return _read(normalise(text)) if len(text) <= MAX_CHARS else None
    except Unreadable:
        return None


def _read(text, depth=0):
    """Normalised text to Value, loosest binding first: or, comma, name, brackets, =, ratio."""
    text = text.strip(" \n,;")
    if not text or depth > MAX_DEPTH or _NOT_MATH.fullmatch(text):
        raise Unreadable(text)
    if "±" in text:
        return Value("{}", items=tuple(_read(text.replace("±", s), depth + 1) for s in "+-"))
    for kind, separator in (("{}", r"∪|\bor\b"), (",", rf"\n|;|{_COMMA}|\band\b|&")):
        if len(parts := _split(text, separator)) > 1:
            return _group(kind, parts, depth)
    match = _NAME.match(text)
    if match and (match[3] != ":" or len(match[1]) > 1):
        value = _read(text[match.end():], depth + 1)        # f(x) = .. is y = ..
        return replace(value, name="y" if match[2] else match[1].strip())
    text = text.partition("≈")[0].strip()                   # 9π ≈ 28.27 is 9π
    depths = [*accumulate((c in "([{⦃") - (c in ")]}⦄") for c in text)]
    if text[:1] in (*"([{⦃",) and text[-1] in ")]}⦄" and all(depths[:-1]):  # one pair around all
        inside = text[1:-1]
        parts = _split(inside, rf";|{_COMMA}" if ", " in inside or ";" in inside else ",")
        if len(parts) > 1 or text[0] == "⦃":
            return _group("{}" if text[0] in "{⦃" else text[0] + text[-1], parts, depth)
    sides = re.split("([<≤>≥=])", text)
    if len(sides) > 1:
        return _relation(sides[::2], sides[1::2])
    if len(parts := _split(text, ":")) > 1:
        clock = re.fullmatch(r"\d{1,2}(?::[0-5]\d){1,2}", text)
        return _group("clock" if clock else ":", parts, depth)
    return _item(text)


def _split(text, separator):
    """Cut at the separators outside all brackets; "(" may close with "]", as intervals do."""
    parts, start, depth = [], 0, 0
    for match in re.finditer(rf"[()\[\]{{}}⦃⦄]|(?P<cut>{separator})", text):
        if match["cut"] is None:
            depth += 1 if match.group() in "([{⦃" else -1
        elif depth == 0:
            parts.append(text[start:match.start()])
            start = match.end()
    return parts + [text[start:]]


def _group(kind, parts, depth):
    if len(parts) > MAX_ITEMS:
        raise Unreadable("too many")
    items = [_read(part, depth + 1) for part in parts]
    names = {item.name for item in items}
    if kind in (":", "clock") and not all(item.number for item in items):
        raise Unreadable("no ratio")
    if kind in ("{}", ",") and items[0].name and len(names - {""}) == 1:
        # n = 1, 2, 3 or x = 2 or x = 3: several values of one unknown, so their order is free
        kind, items = "{}", [replace(item, name="") for item in items]
    elif all(len(name) == 1 for name in names):
        items.sort(key=lambda item: item.name)              # y = 3, x = 2 is the point (2, 3)
    ratio = items[0].number / items[1].number if kind == ":" and len(items) == 2 else None
    return Value(kind, number=ratio, items=tuple(items))


def _relation(sides, signs):
    """An equation or inequality. A chain is the set of its links; of equal numbers, the number."""
    if signs[0] in ">≥":                                    # x > 3 is 3 < x
        sides, signs = sides[::-1], [{">": "<", "≥": "≤"}.get(s, s) for s in signs[::-1]]
    values = [_item(side) for side in sides]
    units = {value.unit for value in values} - {""}
    if None not in [value.number for value in values]:
        if set(signs) == {"="} and all(_near(value, values[0]) for value in values):
            return values[0]                                # 18/2 = 9, but never 5 = 6
        raise Unreadable("no relation between numbers")
    if len(units) > 1:
        raise Unreadable("two units")
    links = [Value(s, f"({a.body})-({b.body})", unit="".join(units))
             for a, s, b in zip(values, signs, values[1:])]
    return links[0] if len(links) == 1 else Value("{}", items=tuple(links))


def _item(text):
    """A number, with or without a unit, or a formula."""
    text = _THOUSANDS.sub(lambda match: re.sub("[ ,]", "", match.group()), text.strip())
    if text in ("∞", "+∞", "-∞"):
        return Value("item", text, -math.inf if text[0] == "-" else math.inf)
    match = _UNIT.search(text)
    body = match and text[:match.start()].strip()
    # "3 + 2m" is a formula in m, "3 m" a length: a lone letter is the unit of a product only.
    if body and not (re.fullmatch("[A-Za-z]", match.group()) and re.search(r".[-+]", body)):
        words = re.findall(r"[^\W\d_]+|[°%][CF]?|\d|/", match[2].replace("per ", "/"))
        unit = "".join(_UNITS.get(word, word) for word in words)
        unit += {"s": "2", "c": "3"}.get((match[1] or "")[:1], "")
        try:
            return replace(_item(body), unit=unit)
        except Unreadable:
            pass
    body = _MIXED.sub(r"(\1+\2\4/\3\5)", text)
    try:
        # Where a formula is undefined at one point, sqrt(x - 5) at 0, another point has to do.
        values = (_evaluate(body, point) for point in range(POINTS))
        value, variables = next(found for found in values if found[0] == found[0])
        return Value("item", body, None if variables else value)
    except StopIteration:
        raise Unreadable("undefined") from None
    except Unreadable:
        if not (match := _NOUN.search(text)):
            raise
        value = _item(text[:match.start()])
        return replace(value, unit=value.unit or match[1].lower())


# ---- 6) Are two values the same? ---------------------------------------------------------------

def _near(p, g, precision=None, tolerance=None):
    """Two numbers with units. A missing unit is forgiven, another one is another answer."""
    if p.unit and g.unit and p.unit != g.unit:
        return False
    scales = [1]
    if p.unit != g.unit and "%" in (p.unit, g.unit):        # 28% may stand for 28 or for 0.28
        scales.append(Fraction(1, 100) if p.unit else 100)
    return any(_close(p.number * scale, g.number, p.body, g.body, precision, tolerance)
               for scale in scales)


def _close(a, b, said="", printed="", precision=None, tolerance=None):
    """Is a, written as `said`, the gold b, written as `printed`?"""
    if a == b:
        return True
    decimals = re.fullmatch(r"[-+]?\d*\.(\d{2,})", printed)
    digits = re.fullmatch(r"[-+]?\d*\.(\d{5,})", said)
    try:
        if tolerance is not None:
            return abs(a - b) <= Fraction(str(tolerance))
        # 0.33 is one third written down. 0.3 could be anything; 0.00 and 0.05 are no roundings.
        if precision is None and decimals and len(re.sub(r"^[-+0.]*|\.", "", printed)) > 1:
            precision = len(decimals[1])
        if precision is not None:
            return abs(a - b) <= Fraction(1, 2) / Fraction(10) ** precision
        if not (isinstance(a, Fraction) and isinstance(b, Fraction)):
            return abs(a - b) <= 1e-6 * max(abs(a), abs(b)) < math.inf
        # 4/3 has no last decimal, so it may be cut off after the fifth.
        return bool(digits and 10 ** MAX_POWER % b.denominator) and (
            abs(a - b) <= Fraction(1, 10 ** len(digits[1])))
    except (ArithmeticError, ValueError):                   # a number beyond any float
        return False


def _same(p, g, near=_near):
    """Prediction against gold; `near` compares two numbers."""
    if p is None or g is None:
        return False
    p, g = _as_inequality(p, g), _as_inequality(g, p)
    a, b = p.name.casefold(), g.name.casefold()
    # x = 5 is not y = 5, but a bare 5, or A = 5 for Area = 5, names no other quantity
    named = a.startswith(b) or b.startswith(a)
    if p.items and g.items:
        return named and _same_group(p, g, near)
    if p.number is not None or g.number is not None:
        return named and None not in (p.number, g.number) and near(p, g)
    if p.kind == g.kind == "item" and (a == b or not a or not b):
        return _proportional(p, g)
    # y = 2x + 1 against 2x - y + 1 = 0
    p, g = (Value("=", f"({v.name})-({v.body})") if v.kind == "item" and len(v.name) == 1 else v
            for v in (p, g))
    return (p.kind == g.kind in "<≤=" and (p.unit == g.unit or not p.unit or not g.unit)
            and _proportional(p, g))


def _as_inequality(value, other):
    """(-∞, 5] as y ≤ 5, if `other` is an inequality in y."""
    link = other.items[0] if other.kind == "{}" else other
    y = re.search(r"[A-Za-zα-ω]", link.body)
    if value.kind not in ("()", "(]", "[)", "[]") or len(value.items) != 2 or (
            link.kind not in "<≤" or not y):
        return value
    sides = (value.items[0].body, y[0], value.items[1].body)
    links = [Value("≤" if bracket in "[]" else "<", f"({a})-({b})")
             for a, b, bracket in zip(sides, sides[1:], value.kind) if "∞" not in a + b]
    return links[0] if len(links) == 1 else Value("{}", items=tuple(links))


def _same_group(p, g, near):
    kinds, a, b = {p.kind, g.kind}, p.items, [*g.items]
    if len(a) != len(b):
        return False
    if ":" in kinds and kinds <= {":", "clock"}:    # 2:4 is 1:2, but at 2:40 it is not 1:20
        return all(_close(x.number * b[0].number, y.number * a[0].number) for x, y in zip(a, b))
    if len(kinds) > 1 and kinds not in ({",", "()"}, {",", "[]"}, {",", "{}"}):
        return False                                # (-2, 1) is not (-2, 1]
    if "{}" not in kinds and not (kinds == {","} and all(x.items for x in a)):
        return all(_same(x, y, near) for x, y in zip(a, b))
    for x in a:                                     # a set, or a list of points: any order
        hit = next((y for y in b if _same(x, y, near)), None)
        if hit is None:
            return False
        b.remove(hit)
    return True


def _proportional(p, g):
    """Is p = c g at all points? c is 1 for formulas, positive for < and ≤, free for equations."""
    ratios = []
    for point in range(POINTS):
        try:
            a, b = (float(_evaluate(value.body, point)[0]) for value in (p, g))
        except OverflowError:
            return False
        if math.isfinite(a) != math.isfinite(b):
            return False                            # sqrt(x)^2 and x differ in their domain
        if abs(a) > 1e-12 and abs(b) > 1e-12:
            ratios.append(a / b)
        elif max(abs(a), abs(b)) > 1e-9:
            return False
    c = 1 if g.kind == "item" or not ratios else ratios[0]
    return (len(ratios) > 1 and all(abs(ratio - c) <= 1e-9 * abs(c) for ratio in ratios)
            and (c > 0 or g.kind == "="))


# ---- 7) The verdict ----------------------------------------------------------------------------

_LETTERS = re.compile(r"\(?[A-J]\)?\.?(?:\s*[,\n]\s*\(?[A-J]\)?)*")


def grade(prediction, gold, options=None, kind="auto", precision=None, *, tolerance=None,
          boxed_required=False):
    r"""Grade one response (the response only: a prompt may hold a \boxed{} of its own).

    gold            str, or a list of them of which any one will do
    options         ordered option texts, or a dict label -> text, of a multiple-choice item
    kind            "choice": labels, gold is a label or an option's text; "number" and "math": by
                    value, as text if the gold is no mathematics; "text": caseless equality;
                    "list": by value, in order, whatever the brackets; "auto": from gold, options
    precision       decimals to which a number must agree (MathVista)
    tolerance       absolute error allowed instead (DynaMath: 0.001)
    boxed_required  only a \boxed{} counts, as a training reward wants it
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is none of {', '.join(KINDS)}")
    verdict = Grade(False, None, "none", "no gold")
    for one in [gold] if isinstance(gold, str) else gold:
        one = (_boxed(one) or _tagged(one) or one).strip()
        verdict = _grade(prediction, one, _table(options), kind, boxed_required,
                         lambda p, g: _near(p, g, precision, tolerance))
        if verdict.correct:
            break
    return verdict


def _grade(prediction, gold, labels, kind, boxed_required, near):
    choice = kind == "choice" or kind == "auto" and (labels or _LETTERS.fullmatch(gold))
    known = labels or dict.fromkeys("ABCDEFGHIJ", "")
    wanted = _pick(gold, known) if choice else None
    if choice and labels and not wanted:
        return Grade(False, None, "none", "the gold is no option")
    g = None if kind == "text" or wanted else _value(gold)
    answer, rule = extract(prediction, known if wanted else None, bool(g and g.number is not None))
    if boxed_required and rule != "boxed":
        return Grade(False, None, rule, "no box")
    if answer is None and not wanted and _plain(prediction) == _plain(gold):
        answer, rule = prediction.strip(), "whole"      # a gold too long for `extract`
    if answer is None or not _plain(gold):
        return Grade(False, answer, rule, "no gold" if answer else "no answer")
    if wanted:
        named = set(answer.split(", ")) <= set(known)
        # Duplicate options are one option, whichever of their labels is named.
        a, b = (" ".join(known.get(label, "").split()) or label for label in (answer, wanted))
        return Grade(a == b, answer, rule, "option" if named else "names no option")
    if _plain(answer) == _plain(gold):
        return Grade(True, answer, rule, "same text")
    p = None if g is None else _value(answer)
    if g is not None and p is None and rule == "whole":
        return Grade(False, None, "none", "no answer")  # prose around a number is no number
    if kind == "list" and p and g:
        p, g = (Value(",", items=value.items or (value,)) for value in (p, g))
    if _same(p, g, near):
        return Grade(True, answer, rule, "same value")
    reason = "different text" if g is None else "unreadable" if p is None else "different value"
    return Grade(False, answer, rule, reason)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python grade.py RESPONSE GOLD")
    print(grade(*sys.argv[1:]))
