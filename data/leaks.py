r"""data/leaks.py - does a cue say only what is seen, or does it run ahead to the answer?

The idea.  A cue is S = f(picture, question). Whoever wrote it without the answer cannot leak a
secret, but can still do the student's thinking: state the result, calculate, compare, name the
theorem. `audit` reads one cue by rules and returns the reasons to reject it.

    Find x.   "One chord is cut into parts marked x and 8, the other into 4 and 6."   []
              "The products of the parts are equal, so 8x = 24 and x is three."
                                           ["solving step", "calculation", "answer"]

The hard part is a number that *equals* the answer. Rows, labels, prices and side lengths often do,
and a cue without them is worthless. So a number is judged by how it is said: the policy stands at
`audit`. What equals what is decided by grade.py, which later marks the student by the same rule.

In:  a cue, the answer, the question, the options if any.
Out: a list of reasons, empty when the cue is clean.
Run  python data/cues.py audit my/cued.jsonl
Copy this file together with benchmarks/grade.py; both need only the standard library.

What is left out, and so what the rules cannot see
1) Truth: a cue may describe a picture that does not exist.
2) Knowledge: "the base is 10" is a label or a result, only the picture can tell which. What the
   question does not ask for gets the benefit of the doubt, so a result on the way may pass.
3) Other languages than English; a model as judge, which would need an audit of its own.

Measured.  On tests/leak_cases.jsonl: 149 of 151 leaks found in the part that the rules were tuned
on, 18 of 20 in the part they never saw, no clean cue flagged in either. On real cues: none of 120
TabMWP tables is flagged, none of 2,986 Geometry3K figures as sentences, none of 1,979 NLVR
pictures; up to 6 of the 120 tables if they are written as lists of columns. Of clean cues cut
between two words 53 % look cut: pass `stopped` where it is known.
"""
from __future__ import annotations

import re

from benchmarks.grade import grade

# Two kinds of reasons: the cue runs ahead of the eyes, or it is no evidence at all.
LEAKS = ("answer", "option", "calculation", "formula", "theorem", "solving step", "comparison")
DEFECTS = ("empty", "cut off", "refusal", "parrots the question")


def audit(cue: str, answer: str, question: str = "", options=None,
          stopped: bool | None = None) -> list[str]:
    """Reasons (out of LEAKS and DEFECTS) not to use this cue; empty when it is clean.

    options: list of texts, or dict label -> text. stopped: whether the writer ended by itself; if
    that is unknown (None), the text is searched for signs of a cut (`_looks_cut`).

    The policy
    table    Lines of cells ("Jason | 14") are printed in the picture, and the answer is often one
             of the cells. Only the sentences around them are read.
    number   Visible until it is stated. Stated is: behind "gives", "so", "the answer is", ...;
             behind "=", "is", "of", ... if the words before are what the question asks for
             ("x is 12" to "Find x.", not "AB is 12", not "marked 12"); as the count of what is
             to be counted ("three red shapes", not "row 3"); beside a superlative, if the
             question has one, too.
    text     A leak wherever it stands ("Paris"), except as one label of several, quoted, behind a
             word like "labelled", or with a reading of its own ("Paris 12"). If the question
             prints it ("more red or more blue?"), only a verdict or a comparison gives it away.
    option   "option B", "(B)" as a verdict; the right text, of three words or more, alone.
    the rest Theorems, rules, formulas, steps, sums and relations ("twice as long as"), unless the
             question prints the same words; an equation that cannot be a label ("8x = 24").
    """
    cue = str(cue or "").strip()
    if not re.search(r"\w", cue):
        return ["empty"]
    text, asked = plain(_prose(cue)), plain(question)
    found = []
    if stopped is False or stopped is None and _looks_cut(cue):
        found.append("cut off")
    if _REFUSAL.search(text):
        found.append("refusal")
    words, known = (list(map(str.lower, _words(told))) for told in (plain(cue), asked))
    said = set(words)       # a long list of the things that the question names is no echo of it
    if said and len(said & set(known)) >= 0.8 * len(said) and len(words) <= 2 * len(known):
        found.append("parrots the question")

    found += [reason for reason, pattern in _LANGUAGE.items()
              if any(not _printed(match.group(), asked) for match in pattern.finditer(text))]
    letter, golds = _golds(str(answer), options, asked)
    for clause in filter(None, map(str.strip, _CLAUSE.split(text))):
        found += _sums(clause, asked) + _equations(clause, asked)
        if any(_states(clause, gold, asked) for gold in golds):
            found.append("answer")
    if _chooses(text, letter, golds, options):
        found.append("option")
    return list(dict.fromkeys(found))


# ---------------------------------------------------------------------------- form

# What parts rows and sentences, but for the stop of "Mr."; a row is a part with a bar in it.
_PART = re.compile(r"(\n|;|(?<!\b[A-Z][a-z])[.!?:](?=\s|$))")
_DANGLING = re.compile(r"""[,:=+(\[{-]$|\b(?:and|or|the|(?<!ed\ )an?|of|in|on|at|to|by|with|from|
    for|than|is|are|was|were|has|have|its|their|that|which|between|labell?ed|marked|reads?)$|
    \bthe\ (?:side|angle|line|length|point|label|number|row|column)$""", re.X)
_STOP = r"(?<![A-Z][a-z])(?<!Mrs)[.!?。…][\"'”’)\]}$*`]*"      # but not that of "Mr."


def _prose(cue: str) -> str:
    """The cue without the rows of a table; one bar alone, as in P(A|B), makes no table.

    >>> _prose("The table reads: Name | Blocks; Jason | 14; Matt | 16. The answer is Jason.")
    'The table reads:;;. The answer is Jason.'
    """
    parts = _PART.split(cue)                                # text, mark, text, mark, .., text
    rows = {n for n, part in enumerate(parts) if "|" in part and "answer" not in part}
    return "".join("" if len(rows) > 1 and n in rows else part for n, part in enumerate(parts))


def _looks_cut(cue: str) -> bool:
    """Signs that a text stops in the middle. A missing full stop alone is none: tables, lists.

    >>> [_looks_cut(cue) for cue in ("AB is 5; BC is 6", "AB is 5. BC is", "AB is 5. The cir",
    ...                              "a ball and", 'a sign "EX', "Jason | 14")]
    [False, True, True, True, True, False]
    """
    text = cue.rstrip("*`$ ")
    if re.search(_STOP + "$", cue):
        return False
    opened = sum(map(text.count, "([{“")) > sum(map(text.count, ")]}”"))
    quoted = len(re.findall(r'(?<!\d)"', text)) % 2 == 1           # 5" are inches
    # where other sentences have their stops, the last one has lost it; rows of a table have none
    lost = "|" not in cue.rpartition("\n")[2] and re.search(_STOP + r"\s", cue)
    return bool(opened or quoted or lost or _DANGLING.search(text))


# ---------------------------------------------------------------------------- one spelling

_SPELLING = [(re.compile(old), new) for old, new in (
    (r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2"), (r"\\sqrt\s*\{([^{}]*)\}", r"√\1"),
    (r"\\(?:text|mathrm)\s*\{([^{}]*)\}", r"\1"), (r"\^?\s*\{?\\circ\}?", "°"),
    (r"\\pi\b", "π"), (r"\\(?:times|cdot)\b", "×"), (r"\\div\b", "÷"), (r"\\m?angle\s*", "∠"),
    (r"\\approx\b", "≈"), (r"\\(?:left|right|boxed)\b|[$*`]|\\[()\[\],;! ]", ""), ("²", "^2"),
    ("³", "^3"), (r"[−–]", "-"), (r"\bhalf an? ", "1/2 "), (r"\s+", " "))]
_SMALL = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
          "fifteen sixteen seventeen eighteen nineteen").split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_WORTH = {word: n for n, word in enumerate(_SMALL)} | {w: 10 * n for n, w in enumerate(_TENS, 2)}
_DIGIT = "|".join(_SMALL[1:10])
_BELOW_100 = rf"(?:(?:{'|'.join(_TENS)})(?:[ -](?:{_DIGIT}))?|{'|'.join(_SMALL)})"
_BELOW_1000 = rf"(?:(?:{_DIGIT}|a) hundred(?:(?: and)? {_BELOW_100})?|{_BELOW_100})"
_IN_WORDS = re.compile(rf"\b{_BELOW_1000}(?: thousand(?:(?: and)? {_BELOW_1000})?)?\b", re.I)
_PARTS = {"half": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "eighth": 8,
          "tenth": 10}


def plain(text: str) -> str:
    r"""One spelling for all rules: LaTeX opened up, numbers in words as digits.

    >>> plain(r"It is $\frac{1}{4}$, not two hundred and five or three quarters; a dozen eggs.")
    'It is 1/4, not 205 or 3/4; 12 eggs.'
    """
    for pattern, new in _SPELLING:
        text = pattern.sub(new, text)
    text = _IN_WORDS.sub(lambda match: str(_in_digits(match.group())), text)
    text = re.sub(rf"\b(a|\d+)[ -]({'|'.join(_PARTS)})s?\b",
                  lambda match: f"{match[1].replace('a', '1')}/{_PARTS[match[2]]}", text)
    text = re.sub(r"\b(an?|\d+) dozen\b", lambda match: str(
        12 * int(re.sub("an?", "1", match[1].lower()))), text, flags=re.I)
    text = re.sub(r"\ba (?:pair|couple) of\b|\bboth(?: of)?\b", "2", text, flags=re.I)
    return re.sub(r"\ba (?:single|lone|sole)\b", "1", text, flags=re.I).strip()


def _in_digits(words: str) -> int:
    total = part = 0
    for word in re.split("[ -]", words.lower()):
        if word == "thousand":
            total, part = 1000 * part, 0
        elif word == "hundred":
            part *= 100
        elif word != "and":
            part += 1 if word == "a" else _WORTH[word]
    return total + part


# Words that tell nothing about what a question asks for.
_EMPTY_WORDS = set("""a an and are as at be been being below by can could did do does down each
either every find for from had has have he her his how i if in into is it its many much of off on
onto or our out over she so than that the their them there these they this those through to under
until up was we were what when where which while who whose why will with would you your determine
calculate give compute answer question picture image figure diagram shown photo value""".split())


def _words(text: str) -> list[str]:
    """Content words. Names (AB, x) stay as they are, others lose capitals and a plural s."""
    out = []
    for word in re.findall(r"∠?\w+", text):
        bare = word.lower() if len(word) < 4 else re.sub("s$", "", word.lower())
        if bare not in _EMPTY_WORDS or word == "A":
            out.append(bare if word.islower() or len(word) > 3 and word.istitle() else word)
    return out


def _whole(text: str) -> str:
    """Pattern for `text` where it is no part of a longer word or number."""
    return rf"(?<![\w.]){re.escape(text.strip())}(?!\w|\.\d)"


def _printed(text: str, question: str) -> bool:
    return bool(text.strip()) and re.search(_whole(text), question, re.I) is not None


# ---------------------------------------------------------------------------- telling words

def _any(phrases: str, after: str = "") -> re.Pattern:
    """One pattern from patterns that are parted by " | " or a new line."""
    parts = re.split(r" \| |\s*\n\s*", phrases.strip())
    return re.compile(rf"(?:\b(?:{'|'.join(parts)})){after}", re.I)


# Reason enough wherever they stand, unless the question prints the same words.
_LANGUAGE = {
    "theorem": _any(r"""
        theorem | pythagor | postulate | lemma\b | axiom | corollar | conservation of
        laws? of (?:co)?sines? | \w+['’]s (?:\w+ )?(?:law|rule|principle)\b | \w+ rule\b
        (?:are|is) (?:supplementary|complementary|proportional)\b | in proportion | scale factor
        (?:similar|congruent) triangles | triangles?\b[\w ,]{0,40} (?:are|is) (?:similar|congruent)
        sum of the (?:\w+ )?angles | \w+ angles are (?:equal|congruent) | power of a point
        by (?:SSS|SAS|ASA|AAS|AA|HL|symmetry|definition)\b | propert(?:y|ies) of
        \d+-\d+-\d+ (?:right )?(?:triangle|triple)
        is the (?:value|number|line|point|angle|ratio|side|sum) (?:that|which|where|of all)"""),
    "formula": _any(r"""
        formula | reciprocal | (?:co)?sine of | tangent of (?:the )?angle
        (?:sin|cos|tan)(?-i: ?[(∠\dA-Zα-ω]) | area (?:=|is|equals) \w+ [×*/·÷] \w+
        (?:area|base|length|width|height|mass|distance|speed|force|rate) (?:times|over|[×*/·÷]) \w+"""),
    "solving step": _any(r"""
        (?:therefore|thus|hence|because|must)\b | since (?!\d{4})\w | so (?!that\b)
        it follows | impl(?:y|ies)\b | (?:which|that|this) means | (?:has|have) to be\b
        (?:note|recall|remember|given|knowing) that\b | to find\b | let [a-z] (?:be|=)
        (?:we|you|1) (?:can|get|have to|need|should|find|know|use|obtain|conclude)\b
        solv(?:e|es|ing)\b | substitut | calculat | comput(?:e|es|ed|ing)\b | appl(?:y|ying)\b
        multipl[yi] | subtract | divid(?:e|es|ed|ing) by\b | use (?:the|that|a)\b | remaining \d
        add(?:ing)? (?:the|up|these|them|both|all)\b | set up (?:an|the) equation
        work(?:s|ed|ing)? out | (?:comes?|turns?) out\b | (?:sorted|ordered|ranked) by\b
        previous (?:1|number|term|figure)\b
        (?-i:(?:^|(?<=[.!?] ))(?:Add|Count|Compare|Divide|Find|Set|Start|Sum|Take) \w+)"""),
    "calculation": _any(r"""
        add(?:s|ed|ing)? up to | sums? (?:up )?to\b | sum of | in total\b | altogether\b
        a total of | averag(?:ing|es to|e of)\b | differences? (?:of|between|is)\b | product of
        combined\b | taken together\b | \d\S* (?:plus|minus|times|multiplied by) \S*\d"""),
    "comparison": _any(r"""
        (?:twice|double|triple|half|\d+/\d+|\d+ times) (?:as|that|its)\b
        (?:twice|doubles?|triples?|halves|\d+ times|the same as) the\b
        \d+ times (?:\w+er|more)\b
        (?:is|are|was|be) (?:exactly )?(?:half|twice|double|triple|\d+ times)\b""")}
_REFUSAL = _any(r"""
    i'?m sorry | as an ai
    i (?:can(?:no|')t|am unable|do not|don't) (?:see|view|read|tell|answer)""")
_CLAUSE = re.compile(r"(?<=[.!?])(?<!i\.e\.)\s+|;|(?<=\w)(?<!answer): (?![$€]?-?\d)|"
                     r", (?=(?:so|and|but|hence|which|while)\b)")
# A number or an equation behind one of these is printed in the picture ...
_LABEL = _any(r"""label\w* | mark(?:ed|s|ing)? | reads? | printed | written | titled | captioned
    says | given | legend | lists? | displays? | engraved | numbered | named""", after=r"\b")
# ... and behind one of these it is somebody's conclusion.
_CONCLUDES = re.compile(r"[=≈→]|" + _any(r"""
    equal to | equals? | gives? | giving | makes? | making | yields? | totals? | totall?ing
    sums? to | adds? up to | (?:comes?|works?|turns?|ends?)(?: out| up)? (?:to be|to|as|at)
    (?:amounts?|equates?|corresponds?|translates?|equivalent|leads?|leading|reduces?|evaluates?) to
    simplif(?:y|ies) to | averag(?:es|ing) | together | altogether | so | thus | hence | therefore
    namely | leaves | leaving | (?:must|has to|have to|found to) be | that is,? | i\.e\.,?
    gets? | getting | obtain(?:s|ed|ing)? | results? in | resulting in
    (?:solution|result|increase|decrease|drop|rise|gain|loss|difference|gap|total|sum|ratio) """
    r"""(?:of|is|was) | (?:product|chance|probability) (?:of|is|was)""", r"(?!\w)").pattern, re.I)
# A most or a more; of endings in -est only adjectives.
_COMPARES = _any(r"""
    (?!west|east|rest|test|forest|interest|request)\w+est | most | least | more | fewer
    \w+er than | outnumber | exceed | majority | leads? | dominat\w+ | ahead | wins? | faster
    longer | larger | taller | bigger | smaller | shorter | higher | lower | greater | heavier
    older | farther""", after=r"\b")


def _labelled(before: str) -> bool:
    """Does `before` end in, or shortly after, a label word, with no conclusion drawn since?"""
    since = _LABEL.split(before)
    return len(since) > 1 and len(since[-1].split()) <= 8 and not _CONCLUDES.search(since[-1])


# ---------------------------------------------------------------------------- stating the answer

def _equal(candidate: str, gold: str) -> bool:
    return grade(f"\\boxed{{{candidate}}}", gold, kind="math").correct


def _golds(answer: str, options, question: str) -> tuple[str, list[str]]:
    """(letter of the right option or "", texts that would give the answer away)."""
    table = options if isinstance(options, dict) else dict(zip("ABCDEFGHIJ", options or ()))
    if not table:       # many files print them in the question: (A) 10 (B) 12
        label = r"\(?\b[A-J][).:] ?"
        table = {name: text for name, text in re.findall(
            rf"\(?\b([A-J])[).:] ?(.+?)(?=[\s,;]*{label}|$)", question)}
    named = re.fullmatch(r"\(?([A-J])\)?\.?", answer.strip())
    if named:
        letter, texts = named[1], [str(table.get(named[1], answer)).strip()]
    else:
        letter = next((str(k) for k, text in table.items() if _equal(str(text), answer)), "")
        texts = [answer.strip()]
    # "there are 5" gives away "5 apples", and "half an ampere" 0.5 A: the grader wants the noun
    texts += re.findall(r"^[-$]?\d[\d,./]*(?= [A-Za-zΩ/^\d]+$)", texts[0])
    return letter, [text for text in texts if text]


_FILLERS = re.compile(
    r"^[\s:,]*(?:(?:about|exactly|only|just|roughly|clearly|simply|then|the|an?|"
    r"equal to|(?:length|measure|value|area|size|height|width|total)(?: of)?)\s+)*")


def _begins(rest: str, gold: str) -> bool:
    """Does `rest` begin with the answer? Its first one to five words go to the grader."""
    rest = _FILLERS.sub("", rest)
    words = rest.split()[:5]
    heads = [" ".join(words[:n]).rstrip(" ,.;:!?") for n in range(1, len(words) + 1)]
    if roman := re.match(r"[IVXLC]+(?!\w)", rest):
        values = [{"I": 1, "V": 5, "X": 10, "L": 50, "C": 100}[c] for c in roman.group()]
        heads.append(str(sum(-a if a < b else a for a, b in zip(values, values[1:] + [0]))))
    return any(head and _equal(head, gold) for head in heads)


def _states(clause: str, gold: str, question: str) -> bool:
    """Does this clause state the answer, rather than show a number or a name that equals it?"""
    if verdict := re.search(r"\banswer\b.{0,40}?(?:\bis|\bbe|:|=)", clause, re.I):
        words = clause[verdict.end():].split()              # "the answer is in row 3"
        if any(_begins(" ".join(words[n:]), gold) for n in range(min(4, len(words)))):
            return True
    if re.fullmatch("yes|no|true|false", gold, re.I):       # "no legend" is not an answer
        said = rf"^{gold}\b(?:,|\.| it| the|$)|\b(?:statement|claim) is {gold}\b"
        return re.search(said, clause, re.I) is not None
    if any(rule(clause, gold, question) for rule in (_concluded, _predicated, _as_part, _counted,
                                                     _compared)):
        return True
    return not re.search(r"[\d√π\\]", gold) and _shown(clause, gold, question)


def _concluded(clause: str, gold: str, question: str) -> bool:
    """"gives 12", "so twelve", "x = 12"; but AB = 12 may be printed in the picture."""
    for match in _CONCLUDES.finditer(clause):
        before = clause[:match.start()]
        visible = match.group() == "=" and not _asks(before, _target(question)) and (
            _labelled(before) or re.search(r"(?:[A-Z]{2}|∠\w+) ?$", before))
        if not visible and _begins(clause[match.end():], gold):
            return True
    return False


def _predicated(clause: str, gold: str, question: str) -> bool:
    """"x is 12", "a slope of 3", "the tension equals the weight of the lantern, 50 N"."""
    verbs = r"\b(?:is|are|was|equals|measures|of|has|covers|weighs|costs|holds)\b"
    for match in re.finditer(verbs, clause):
        rest = clause[match.end():]
        last = re.search(r"[A-Za-z], ([^,]+)$", rest)
        if _asks(clause[:match.start()], _target(question)) and (
                _begins(rest, gold) or last and _equal(last[1].rstrip(" .!"), gold)):
            return True
    unknown = re.search(r"\b(?:missing|unknown) \w+", clause)
    return unknown is not None and _begins(clause[unknown.end():], gold)


def _as_part(clause: str, gold: str, question: str) -> bool:
    """"3/8 of it", "three of the six faces" where the question asks for a part."""
    if not re.search(r"\b(?:fraction|part|share|proportion|percent|probability|chance)", question):
        return False
    parts = re.findall(r"\b(\d+/\d+) of\b", clause)
    parts += map("/".join, re.findall(r"\b(\d+) (?:out of|of the|of|in) (\d+)\b", clause))
    return any(_equal(part, gold) for part in parts)


def _target(question: str) -> set[str]:
    """Content words of the part of the question that asks: of "If AB = 10, find BC" only BC."""
    parts = re.split(r"[.,;?]\s|\bif\b|\bgiven\b", question, flags=re.I)
    asking = [part for part in parts if re.search(
        r"\b(?:find|what|which|how|determine|calculate|who|where|when|give)\b", part, re.I)]
    return set(_words(" ".join(asking or parts)))


def _asks(before: str, target: set[str]) -> bool:
    """Is the subject at the end of `before` what the question asks for?

    Names decide where there are any: the length of AB is not the length of AC.
    """
    parts = re.split(r"[,;:=]|\b(?:and|with|where)\b", before)
    subject = next((part for part in reversed(parts) if part.strip()), "")
    words = _words(subject)[-5:]
    names = [word for word in words if len(word) <= 2 or not word.islower()]
    if names and any(len(word) <= 2 or word.isupper() for word in target):
        return names[-1].lstrip("∠") in {word.lstrip("∠") for word in target}
    return bool(set(words) & target)


def _counted(clause: str, gold: str, question: str) -> bool:
    """"three red shapes", "there are 3", "3 in total", "1, 2, 3" where the question counts."""
    counts = re.search(r"\bhow many (?!times)((?:[\w-]+ ?){1,4})", question, re.I)
    if not counts:
        return False
    things = set(_words(counts[1]))
    number = r"(?<![\w.])(\d[\d,]*|none|no)\b(?=(?: of (?:the|these)\b)?((?: [A-Za-z-]+){0,4}))"
    for match in re.finditer(number, clause, re.I):
        before, after = clause[:match.start()].rstrip().lower(), match[2]
        # the nouns right behind the number, up to a word that begins another phrase
        noun = re.split(r" (?:at|in|on|of|with|and|under|from|by|to|for|has|column)\b", after)[0]
        index = re.search(r"(?:row|column|number|no\.)$", before)
        told = (set(_words(noun)) & things and not index
                or not after.strip() and re.search(r"\bthere (?:is|are)$", before)
                or after.startswith(" of them") and set(_words(before + after)) & things
                or after.startswith((" in total", " in all", " overall"))
                or before.endswith("(") and set(_words(before)[-3:]) & things)
        if told and _equal(match[1].rstrip(",") if match[1][0].isdigit() else "0", gold):
            return True
    for aloud in re.findall(r"\b1, 2,? (?:\d+,? )*(?:and )?\d+\b", clause):
        last = (numbers := re.findall(r"\d+", aloud))[-1]
        if numbers == [str(n) for n in range(1, len(numbers) + 1)] and _equal(last, gold):
            return True
    return False


def _compared(clause: str, gold: str, question: str) -> bool:
    """"the tallest bar is that of 2018" where the question, too, asks for a most or a more."""
    ordinal = r"\b(?:first|second|third|fourth|last)\b"     # "came second": of names only
    ranked = not re.search(r"\d", gold) and all(
        re.search(ordinal, text, re.I) for text in (question, clause))
    if not (ranked or _COMPARES.search(question) and _COMPARES.search(clause)):
        return False
    at = re.search(_whole(gold), clause, re.I if len(gold) > 1 else 0)
    return at is not None and not _labelled(clause[:at.start()])


def _shown(clause: str, gold: str, question: str) -> bool:
    """Is the text answer there, other than as a label: listed, quoted, with a reading?"""
    if _printed(gold, question) or len(gold) == 1:
        return False
    for match in re.finditer(_whole(gold), clause, re.I):
        before, after = clause[:match.start()], clause[match.end():]
        listed = (re.match(r", [\w ]+(?:,| and\b| or\b)", after)
                  or re.search(r", [\w ]+ (?:and|or) $", before)
                  or before.endswith(", ") and re.match(r"\.?$|,| and\b| or\b", after))
        reading = re.match(r"(?: \w+){0,2}[,:(]? [(]?[$€]?-?\d", after)
        quoted = before.endswith(("'", '"', "“", "‘"))
        if not (listed or reading or quoted or _labelled(before)):
            return True
    return False


def _chooses(text: str, letter: str, golds: list[str], options) -> bool:
    """"Option B", "(B) fits", or the right option's whole text and no other option's."""
    if letter and re.search(
            rf"\b(?:[Oo]ption|[Cc]hoice|[Aa]nswer)\s*(?:is\s*)?\(?{letter}\b|"
            rf"(?:^|[.;,:]\s|\b(?:so|hence|thus|is|choose|pick)\s)\({letter}\)|"
            rf"\b{letter} is (?:the )?(?:correct|right|true|best|only)\b", text):
        return True
    table = options.values() if isinstance(options, dict) else options or ()
    texts = [plain(str(option)) for option in table]
    right = [plain(gold) for gold in golds if len(gold.split()) >= 3]
    return any(_printed(gold, text) and not any(
        other != gold and _printed(other, text) for other in texts) for gold in right)


# ---------------------------------------------------------------------------- arithmetic

_SUM = re.compile(r"\d\s*°?\s*[+×·÷*]\s*\d|\d\s+[-/]\s+\d|\d\s+x\s+\d")
_MATH = re.compile(     # a word that can be a part of an equation
    r"[-+*/×·÷^:()\[\]{}√π°∠]+|\S*\d\S*|[A-Za-zα-ω]|(?:m?∠)?[A-Z]{1,4}'?|[a-z]\([a-z]\)|"
    r"[A-Za-z\d]+(?:[-+*/×·÷^][A-Za-z\d]+)+")
_OPERATOR = re.compile(r"[+*×·÷^]|[A-Za-z]\s*[:/]|[:/]\s*[A-Za-z]|\w\s+-\s+\w|\d[A-Za-z(]|"
                       r"[A-Za-z]\d")


def _sums(clause: str, question: str) -> list[str]:
    """"4 × 6", unless it is printed (a card that reads 3 + 4) or a size (a 4 × 6 grid)."""
    for match in _SUM.finditer(clause):
        before, after = clause[:match.start()], clause[match.end():]
        size = re.match(r"\d*\s*(?:grid|table|array|matrix|board|rectangle|square)", after)
        used = _CONCLUDES.match(re.sub(r"^[\w)]*\s*", "", after))       # "4 × 6 gives"
        if not (size or _labelled(before) and not used or _printed(match.group(), question)):
            return ["calculation"]
    return []


def _equations(clause: str, question: str) -> list[str]:
    """Reasons for the equations that cannot be labels of the picture."""
    found = []
    for match in re.finditer("=", clause):
        words, left, right = clause[:match.start()].split(), [], []
        while words and _MATH.fullmatch(words[-1]):
            left.insert(0, words.pop())
        for word in clause[match.end():].split():
            if not _MATH.fullmatch(word.rstrip(",.")):
                break
            right.append(word.rstrip(",."))
            if right[-1] != word:                           # a comma ends the equation
                break
        lhs, rhs, before = " ".join(left), " ".join(right), " ".join(words)
        if not (_labelled(before) or _printed(f"{lhs} = {rhs}", question)
                or _can_be_label(lhs, rhs, before)):
            # I = V/R holds anywhere, 8x = 24 in this picture
            anywhere = re.search("[A-Za-z]", rhs) and re.fullmatch(r"[A-Za-z]|\d/[A-Za-z]", lhs)
            found.append("formula" if anywhere else "calculation")
    return found


def _can_be_label(lhs: str, rhs: str, before: str) -> bool:
    """AB = 12, ∠A = (2x + 3)° and the line y = 2x can stand in a picture; 8x = 24 is a step."""
    if not _OPERATOR.search(lhs) and not _OPERATOR.search(rhs):
        return True
    curve = re.fullmatch(r"y|[fgh]\(x\)", lhs) or re.search(
        r"\b(?:line|curve|graph|parabola)$", before)
    part = re.fullmatch(r"(?:m?∠\s?)?[A-Z]{2,3}|m?∠\s?[A-Z\d]", lhs)
    return bool(curve or part and not re.search(r"[A-Z]{2}|\d\s*[+×*/]\s*\d", rhs))
