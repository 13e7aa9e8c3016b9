r"""Texts of public data sets, tidied: answers in one spelling, questions without placeholders.

Idea. A gold that is wrapped or spelled oddly does harm twice: the grader may not read it, and as
a hint it is shown to the teacher as it stands. So a few spellings that are known from
published copies are undone here, each by a rule that cannot change what the text means, and each
reported by name, so that a summary can say how many rows it touched.

In and out.
    answer, changes = tidy_answer(r"<answer> 2 \SQRT { 221 } </answer>")
        answer   2\sqrt{221}
        changes  the names of the rules that did something
    question, inside = take_placeholders("<image>Find x.", pictures=1, where="FILE: row 3")
        question "Find x."; inside: whether a placeholder stood within the text
    text, mended = mend_escapes("\frac{1}{2} read by JSON as a form feed and rac{1}{2}", where)

The one rule. tidy_answer(tidy_answer(x)) = tidy_answer(x), and a grader gives both the same value.

Run, copy. No command line. This file alone; standard library.

Left out, on purpose. No mathematics: \frac{2}{4} stays. No rewording: 28\% and 30^\circ and units
stay, grade.py reads them. Questions lose placeholders and outer blanks, nothing else.
"""
import re

ESCAPED = "backslash of a LaTeX command that JSON had read as an escape put back"
UNWRAPPED = "wrapper around the answer taken off"
LOWERED = "capital LaTeX command in small letters"
CLOSED_UP = "blanks of tokenised LaTeX closed up"
MAX_CHARS = 2000        # no answer, and 20,000 boxes in each other would take minutes

# <answer>..</answer> and $..$ around everything, and only if it is one pair, not two side by side.
_WRAPPERS = [re.compile(r"\s*<answer>((?:(?!</?answer>).)*)</answer>\s*", re.S | re.I),
             re.compile(r"\s*\$([^$]+)\$\s*")]
_CAPITALS = re.compile(r"\\([A-Z]{2,})(?![A-Za-z])")
_LETTERS = {"AA", "AE", "OE", "SS"}         # Å, Æ, Œ and SS: LaTeX does spell these in capitals
_UNITS = re.compile(r"(\\(?:text\w*|math[a-z]+|mbox|operatorname)\s*\{[^{}]*\})")
# Each takes blanks away where LaTeX ignores them. A backslash before a blank makes it a real one
# (`5\ cm`), and after a command the blank ends its name: \pi r is not \pir.
_BLANKS = [(re.compile(pattern), new) for pattern, new in (
    (r"(\\[A-Za-z]+|[}\]])\s+(?=\{)", r"\1"),       # \frac { 1 } { 2 }: before an argument
    (r"(\\sqrt)\s+(?=\[)", r"\1"),
    (r"(?<!\\)([{^_])\s+", r"\1"),
    (r"(?<!\\)\s+(?=[}^_])", ""),
    (r"(?<=[\d})])\s+(?=\\[A-Za-z])", ""))]         # 2 \sqrt, but "the angle \theta" stays


def tidy_answer(text):
    r"""Return (answer, names of the rules that changed it).

    >>> tidy_answer(r"\FRAC { 9 \SQRT { 3 } } { 2 }")[0]
    '\\frac{9\\sqrt{3}}{2}'
    >>> tidy_answer("<answer>B</answer>")
    ('B', ['wrapper around the answer taken off'])
    """
    changes, answer = [], text.strip()
    if len(answer) > MAX_CHARS:
        return answer, changes
    for rule, name in ((_unwrap, UNWRAPPED), (_lower, LOWERED), (_close_up, CLOSED_UP)):
        before, answer = answer, rule(answer)
        if answer != before:
            changes.append(name)
    return answer, changes


def _unwrap(text):
    while True:                             # <answer>$\boxed{5}$</answer> has three layers
        before = text
        for wrapper in _WRAPPERS:
            match = wrapper.fullmatch(text)
            text = match[1].strip() if match else text
        if text.startswith(r"\boxed{") and _closes_at(text, 6) == len(text) - 1:
            text = text[7:-1].strip()
        if text == before:
            return text


def _closes_at(text, start):
    r"""Where the brace at `start` closes. \boxed{1}+\boxed{2} begins and ends like one box."""
    depth = 0
    for brace in re.finditer(r"(?<!\\)[{}]", text[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return start + brace.start()
    return None


def _lower(text):
    return _CAPITALS.sub(lambda m: m[0] if m[1] in _LETTERS else m[0].lower(), text)


def _close_up(text):
    if "\\" not in text and "{" not in text:
        return text                         # no LaTeX, so a blank beside _ or ^ is just a blank
    pieces = _UNITS.split(text)             # the odd ones are texts, whose blanks are real
    for pattern, new in _BLANKS:
        pieces[::2] = [pattern.sub(new, piece) for piece in pieces[::2]]
    return "".join(pieces)


def answer_kind(answer):
    r"""letter, number, LaTeX or other: a first look at golds nobody has described.

    >>> [answer_kind(x) for x in ("B", "A, C", "1,000.5", "1/64", "30°", r"30^\circ", "N 34° W")]
    ['letter', 'letter', 'number', 'number', 'number', 'LaTeX', 'other']
    """
    if re.fullmatch(r"\(?[A-J]\)?\.?(?:\s*[,&]\s*\(?[A-J]\)?)*", answer):
        return "letter"
    if re.fullmatch(r"[-−+]?(?=\.?\d)(?:\d{1,3}(?:,\d{3})+(?!\d)|\d*)\.?\d*(?:/\d+)?\s?[%°]?",
                    answer):
        return "number"
    return "LaTeX" if re.search(r"[\\$^_{]", answer) else "other"


# What JSON reads in "\frac": \f is an escape, a form feed, and rac{..} is left. Whole names only:
# a tab may be a tab, so its list has no English word ("\to", "\top") that could begin a cell.
_LOST = {"\f": ("f", r"rac|orall|lat|rown"),
         "\b": ("b", r"eta|ar|inom|oxed|mod|ullet|igl|igr|igg?|ecause|oldsymbol|egin|ot|ackslash"),
         "\r": ("r", r"ho|ight|angle|floor|ceil|m|ightarrow"),
         "\t": ("t", r"heta|imes|frac|au|riangle|ilde|herefore|ext\w*(?=\{)|an(?= ?[({\\\d])"),
         "\n": ("n", r"abla|eq|otin")}
_ESCAPES = re.compile("|".join(rf"{control}(?:{names})(?![A-Za-z])"
                               for control, (_, names) in _LOST.items()))


def mend_escapes(text, where):
    r"""Return (text, whether a backslash was put back) for LaTeX written with one in JSON.

    Raises ValueError for a form feed or backspace that belongs to no known command: nobody types
    those, so a letter is lost there, and which one is not for this file to guess.

    >>> mend_escapes("\frac{1}{2} of \theta, \tcell\nline", "here")
    ('\\frac{1}{2} of \\theta, \tcell\nline', True)
    """
    mended = _ESCAPES.sub(lambda m: "\\" + _LOST[m[0][0]][0] + m[0][1:], text)
    if match := re.search("[\f\b].{0,20}", mended, re.S):
        letter = _LOST[match[0][0]][0]
        raise ValueError(f"{where}: a control character before {match[0][1:]!r}: JSON reads "
                         f"\\{letter} as an escape, so LaTeX needs two backslashes there")
    return mended, mended != text


_MARK = re.compile(r"<image(?: ?\d+)?>")        # MMMU numbers them


def take_placeholders(problem, pictures, where, required=True):
    """Return (question without <image> marks, whether a mark stood within the text).

    The prompt puts all pictures first, so the marks say nothing once their number is checked; a
    sentence such as "In <image>, .." is counted by the caller, since it loses a word. Raises
    ValueError when marks and pictures differ; with `required` false, no marks at all are fine.
    """
    marks = len(_MARK.findall(problem))
    if marks != pictures and (marks or required):
        raise ValueError(f"{where}: {marks} <image> placeholders but {pictures} pictures")
    head = re.match(rf"(?:\s*{_MARK.pattern})*", problem).end()
    inside = bool(_MARK.search(re.sub(rf"{_MARK.pattern}\Z", "", problem[head:].strip())))
    return re.sub(rf" ?{_MARK.pattern}", "", problem).strip(), inside
