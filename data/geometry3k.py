r"""Geometry3K in its own layout: school geometry, and the drawing's annotations as the cue.

Idea. Geometry3K (Lu et al. 2021) comes with facts read off every drawing by people:
    Equals(LengthOf(Line(A, B)), 10)     PointLiesOnLine(Q, Line(R, N))     Perpendicular(..)
Put into words they are a cue: the marks in the drawing, not what follows from them.

In. One folder a problem, DIR/[train|val|test/]ID with data.json, img_diagram.png, logic_form.json;
or all facts in one archive, logic_forms.zip, whose key is the plural diagram_logic_forms.
Out. Rows for prepare.py; read_forms() for rows of the hub's parquet files that have an `id`.

The one rule: a cue is what can be seen. The facts name every point by a letter, but in more than
half of the problems the drawing prints none, and nothing in the data says which. So
1) a letter is used if the question prints it and the question's own facts take it for a point;
2) every other point is told by its place, "the vertex at the bottom left", from point_positions
   in thirds of the drawing; facts about points that this cannot tell apart are left out;
3) a numbered angle is named if the question numbers angles, too;
4) Find(..) and all other facts of the question are never read, but for the letters of rule 1, and
   a fact that stands in both is left out: the student is told it anyway.

    >>> form = {"diagram_logic_form": ["Equals(LengthOf(Line(A, B)), 2x+1)",
    ...                                "Equals(MeasureOf(Angle(A, B, C)), 60)", ""],
    ...         "text_logic_form": ["Find(x)"], "line_instances": ["AB", "AC", "BC"],
    ...         "point_positions": {"A": [154, 1], "B": [1, 236], "C": [152, 237]}}
    >>> text, notes = cue(form, "Find x.")
    >>> for sentence in text.split(". "): print(sentence)
    The segment from the vertex at the top right to the vertex at the bottom left is marked 2x + 1
    The angle at the vertex at the bottom left is marked 60°.
    >>> notes
    ['empty fact left out of the cue']

Run. python data/prepare.py geometry3k --source DIR --out data/geometry3k   Copy: with sources.py.

Departures. 5) Misspelt names and brackets are mended. 6) Annotators lost fractions ("66--y" for
66 - 2y/3): where one expression is garbled, every expression of the problem is left out.
7) What lies on a line or circle is said of lettered points only, of a line if the positions agree.
Left out, on purpose. Kinds of facts that occur less than ten times. Nobody compared all 3,002
drawings with their facts: an annotator's mistake that is well-formed stays in the cue.
"""
import json
import math
import re
import zipfile
from collections import defaultdict

from data import sources

SPLITS = {"train": "train", "validation": "val", "test": "test"}       # ours -> theirs
LONGEST = 14                    # sentences; a drawing with more marks is not told by a list
MISSPELT = {"Cirle": "Circle"}
SHAPES = ("Triangle", "Quadrilateral", "Kite", "Trapezoid", "Rectangle", "Pentagon", "Square",
          "Parallelogram")
_TERM = (r"(?=[\w\\])\d*(?:\.\d+)?(?:\\sqrt\{\d+\}|\\frac\{[\da-z]+\}\{[\da-z]+\})?[a-z]?"
         r"(?:\^\{?\d\}?)?")
_EXPRESSION = re.compile(rf"-?{_TERM}(?:[-+*/]{_TERM})*")

EMPTY = "empty fact left out of the cue"
MENDED = "misspelt, unbalanced or shortened fact mended"
KIND = "fact of a rare kind left out of the cue"
PLACE = "fact about points that no letter or place tells apart left out of the cue"
GARBLED = "expression beside a garbled one left out of the cue"
NUMBERED = "numbered angle whose number may not be printed left out of the cue"
UNLETTERED = "point on a line or circle without a printed letter left out of the cue"
UNTRUE = "point on a line against its own position left out of the cue"
KNOWN = "fact that the question states left out of the cue"
BEYOND = f"sentence beyond the first {LONGEST} left out of the cue"
NO_CUE = "no fact to make a cue of"


# ---- files -> rows -----------------------------------------------------------------------------

def find(source):
    """Return {split: its problems' folders}, {} if `source` has no folder of this layout."""
    for depth in range(4):
        folders = [path.parent for path in source.glob("*/" * depth + "data.json")
                   if (path.parent / "img_diagram.png").is_file()]
        if folders:
            break
    found = defaultdict(list)
    for folder in sorted(folders, key=lambda f: (len(f.name), f.name)):      # 2 before 10
        theirs = folder.parent.name
        if theirs not in SPLITS.values():
            theirs = sources.load_json(folder / "data.json").get("data_type")
        ours = [name for name, their in SPLITS.items() if their == theirs]
        if not ours:
            raise ValueError(f"{folder / 'data.json'}: data_type is {theirs!r}, not train, val "
                             f"or test, and neither is the folder above")
        found[ours[0]].append(folder)
    return {split: found[split] for split in SPLITS if split in found}


def rows(folders, forms=None):
    """Yield (where, row) for each problem's folder; `forms` as read_forms gives them, or None."""
    for folder in folders:
        where = f"{folder / 'data.json'}"
        problem = sources.load_json(folder / "data.json")
        try:
            question = (problem.get("compact_text") or problem["problem_text"]).strip()
            choices = problem.get("compact_choices") or problem["choices"]
            answer = choices["ABCDEFGH".index(problem["answer"])]
            name = str(problem["id"])
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise ValueError(f"{where}: not a problem of Geometry3K ({error!r})") from error
        path = folder / "logic_form.json"
        form = sources.load_json(path) if path.is_file() else (forms or {}).get(name)
        yield where, {"id": f"geometry3k-{name}", "question": question, "answer": str(answer),
                      "options": [str(choice) for choice in choices],
                      "images": f"{folder.name}/img_diagram.png",
                      **with_cue(form, question, where)}


def with_cue(form, question, where):
    """The fields "cue" and "notes" of a row; a problem without facts has notes alone."""
    if form is None:
        return {"notes": [NO_CUE]}
    try:
        text, notes = cue(form, question)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: the logic form is damaged ({error!r})") from error
    return {"cue": text, "notes": notes} if text else {"notes": [*notes, NO_CUE]}


def read_forms(path):
    """{problem's number as text: logic form} from logic_forms.zip or the folder it unpacks to."""
    parts = {}
    for kind in ("diagram", "text"):
        name = f"{kind}_logic_forms_annot.json"
        if path.is_dir():
            [file] = list(path.rglob(name)) or [path / name]
            parts[kind] = sources.load_json(file)
            continue
        try:
            with zipfile.ZipFile(path) as archive:
                [member] = [m for m in archive.namelist() if m.rsplit("/")[-1] == name]
                parts[kind] = json.loads(archive.read(member))
        except (zipfile.BadZipFile, ValueError) as error:
            raise ValueError(f"{path}: no archive with {name} ({error})") from error
    return {key: {**form, "diagram_logic_form": form["diagram_logic_forms"],
                  "text_logic_form": parts["text"].get(key, {}).get("text_logic_forms", [])}
            for key, form in parts["diagram"].items()}


def belongs(form, question):
    """Whether the numbers and letters of the question's facts stand in `question`.

    A copy that counts its problems otherwise would give each drawing the cue of another one.
    """
    said = set(re.findall(r"\d+|[A-Z]", question.replace(" ", "")))
    facts = " ".join(form["text_logic_form"])
    return set(re.findall(r"\d+|(?<=[(,])[A-Z](?=[,)])", facts)) <= said


# ---- facts: text -> (name, *arguments) ---------------------------------------------------------

def parse(fact):
    """Return (nested tuples, whether it was mended); (None, False) for what cannot be read.

    >>> parse("Equals(LengthOf(PerimeterOf(Cirle(C))), 12)")
    (('Equals', ('LengthOf', ('PerimeterOf', ('Circle', 'C'))), '12'), True)
    >>> parse("PointLiesOnLine(Y, Line(Z, I)) K))")
    (('PointLiesOnLine', 'Y', ('Line', 'Z', 'I')), True)
    """
    text, depth = re.sub(r"\s", "", fact), 0
    end = len(text)
    for n, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character == ")" and depth == 0:
            end = n + 1
            break
    mended = end < len(text) or depth > 0
    text = text[:end] + ")" * depth
    for wrong, right in MISSPELT.items():
        mended |= f"{wrong}(" in text
        text = text.replace(f"{wrong}(", f"{right}(")
    fact = _nested(text)
    if not isinstance(fact, tuple):
        return None, False
    if fact[0] == "Equals" and all(part[0] == "Line" for part in fact[1:]):     # of lengths
        return ("Equals", *(("LengthOf", part) for part in fact[1:])), True
    return fact, mended


def _nested(text):
    match = re.fullmatch(r"([A-Za-z]+)\((.*)\)", text)
    if not match:
        return text
    arguments, depth = [""], 0
    for character in match[2]:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character == "," and depth == 0:
            arguments.append("")
        else:
            arguments[-1] += character
    return (match[1], *map(_nested, arguments))


def expression(text):
    r"""A value as a person writes it, None if it is garbled.

    >>> [expression(x) for x in ("2x-14", r"\frac{1}{2}y+20", "66--y", "5mny44")]
    ['2x - 14', '\\frac{1}{2}y + 20', None, None]
    """
    if not isinstance(text, str) or not _EXPRESSION.fullmatch(text):
        return None
    return re.sub(r"(?<=[\w}])([-+])", r" \1 ", text)


def letters_in(question, facts):
    """The capitals that `question` prints and its own facts take for points (rule 1).

    >>> sorted(letters_in("In A B C, A square is cut. Find \\angle A.", ["Angle(A)", "Line(E,B)"]))
    ['A', 'B']
    """
    # "A" before a small word is the article, and a word that begins with a capital is no letter.
    words = re.findall(r"(?<![A-Za-z])(?!A [a-z])[A-Z]+(?![A-Za-z])", question)
    return set("".join(words)) & set(re.findall(r"(?<=[(,])[A-Z](?=[,)])",
                                                " ".join(facts).replace(" ", "")))


# ---- points -> words ---------------------------------------------------------------------------

class Drawing:
    """The points of one drawing and how each may be called: `name[point]`, None if nothing fits."""

    def __init__(self, form, letters):
        self.at = {point: (float(x), float(y)) for point, (x, y)
                   in form["point_positions"].items()}
        self.lines = [tuple(line) for line in form.get("line_instances", ()) if len(line) == 2]
        self.letters = letters & self.at.keys()
        centres = {fact[2][1] for text in form["diagram_logic_form"] if (fact := parse(text)[0])
                   and fact[0] == "PointLiesOnCircle" and isinstance(fact[2], tuple)}
        places = self._places()
        if len(centres) == 1:
            places.update(dict.fromkeys(centres & places.keys(), "the centre of the circle"))
        self.name = {point: point if point in self.letters else places[point]
                     for point in self.at}

    def _places(self):
        """Where each point is, in thirds of what the points span (not of the white margin).

        Of two points in one third of the drawing one is the upper or the left one, if that can be
        seen; of three or more none has a name.
        """
        sides = [(min(axis), max(axis) - min(axis)) for axis in zip(*self.at.values())]
        share = {point: [(at - low) / span if span > 10 else 0.5       # one row: neither is top
                         for at, (low, span) in zip(position, sides)]
                 for point, position in self.at.items()}
        spots = defaultdict(list)
        for point, (x, y) in share.items():
            spots[min(int(y * 3), 2), min(int(x * 3), 2)].append(point)
        places = {}
        for (row, column), points in spots.items():
            words = ("top", "", "bottom")[row], ("left", "", "right")[column]
            spot = f"at the {' '.join(filter(None, words))}" if any(words) else "in the middle"
            places |= dict.fromkeys(points, None)
            if len(points) == 1:
                kind = "vertex" if self._is_vertex(points[0]) else "point"
                places[points[0]] = f"the {kind} {spot}"
            elif len(points) == 2:
                one, other = points
                apart = [abs(share[one][n] - share[other][n]) for n in (0, 1)]
                axis = int(apart[1] > apart[0])
                if apart[axis] > 0.1:
                    first, last = sorted(points, key=lambda p: share[p][axis])
                    less, more = (("left", "right"), ("upper", "lower"))[axis]
                    places[first] = f"the {less} of the two points {spot}"
                    places[last] = f"the {more} of the two points {spot}"
        return places

    def _is_vertex(self, point):
        """Whether lines end here and none goes straight through."""
        found = self._directions(point)
        return len(found) > 1 and not any(abs(abs(a - b) - 180) < 10 for a in found for b in found)

    def segment(self, line):
        """'segment AB', or from where to where; None if an end has no name."""
        a, b = (self.name.get(point) for point in line[1:3])
        if a is None or b is None or a == b or len(line) != 3:
            return None
        lettered = {line[1], line[2]} <= self.letters
        return f"segment {a}{b}" if lettered else f"segment from {a} to {b}"

    def angle(self, angle):
        """'angle ABC', or at which vertex, and between which lines if more than two meet there."""
        points = angle[1:]
        if len(points) == 1 and points[0] in self.letters:
            return f"angle {points[0]}"
        if len(points) != 3 or self.name.get(points[1]) is None:
            return None
        if set(points) <= self.letters:
            return f"angle {''.join(points)}"
        a, b, c = (self.name.get(point) for point in points)
        if self._is_vertex(points[1]) and len(self._directions(points[1])) == 2:
            return f"angle at {b}"
        return a and c and f"angle at {b} between the lines to {a} and {c}"

    def _directions(self, point):
        """The directions, 8 degrees apart or more, in which lines leave a point."""
        found = []
        for line in self.lines:
            if point in line and set(line) <= self.at.keys():
                other = self.at[line[line[0] == point]]
                angle = math.degrees(math.atan2(other[1] - self.at[point][1],
                                                other[0] - self.at[point][0])) % 360
                if all(min(abs(angle - o), 360 - abs(angle - o)) > 8 for o in found):
                    found.append(angle)
        return found

    def lies_between(self, point, a, b):
        """Whether `point` is on the segment from a to b, within a twentieth of its length."""
        if not {point, a, b} <= self.at.keys():
            return False
        (px, py), (ax, ay), (bx, by) = (self.at[p] for p in (point, a, b))
        dx, dy = bx - ax, by - ay
        length = dx * dx + dy * dy or 1.0
        along, aside = (px - ax) * dx + (py - ay) * dy, (px - ax) * dy - (py - ay) * dx
        return 0 < along < length and abs(aside) < 0.05 * length


# ---- facts -> sentences ------------------------------------------------------------------------

def cue(form, question):
    """Return (the cue, "" if nothing can be said; notes: what was mended or left out, and why)."""
    drawing = Drawing(form, letters_in(question, form["text_logic_form"]))
    known = {re.sub(r"\s", "", fact) for fact in form["text_logic_form"]}
    numbered = bool(re.search(r"(?i)angle\s*\d", question))
    facts, notes = [], []
    for text in dict.fromkeys(form["diagram_logic_form"]):
        fact, mended = parse(text)
        if mended:
            notes.append(MENDED)
        if fact is None:
            notes.append(KIND if text.strip() else EMPTY)
        elif re.sub(r"\s", "", text) in known:
            notes.append(KNOWN)
        else:
            facts.append(fact)
    notes += [EMPTY] * (form["diagram_logic_form"].count("") - ("" in form["diagram_logic_form"]))

    sentences, alike = [], {"segments": [], "angles": []}
    garbled = any(is_value(fact) and expression(fact[2]) is None for fact in facts)
    for fact in facts:
        if fact[0] in ("PointLiesOnLine", "PointLiesOnCircle"):
            continue                                       # told together, below
        said = say(fact, drawing, alike, garbled, numbered)
        (notes if said in REASONS else sentences).append(said)
    for kind, groups in alike.items():
        sentences += [f"The {kind} {listed([n.split(' ', 1)[1] for n in group])} are marked as "
                      f"equal" for group in groups]
    sentences += circles(facts, drawing, notes) + collinear(facts, drawing, notes)
    sentences = list(dict.fromkeys(filter(None, sentences)))
    notes += [BEYOND] * (len(sentences) - LONGEST)
    return " ".join(f"{s}." for s in sentences[:LONGEST]), notes


REASONS = (KIND, PLACE, GARBLED, NUMBERED)


def is_value(fact):
    """Whether a fact gives a segment, angle or arc a value: Equals(LengthOf(Line(A,B)),2x)."""
    return fact[0] == "Equals" and len(fact) == 3 and isinstance(fact[2], str)


def say(fact, drawing, alike, garbled, numbered):
    """A sentence, one of REASONS, or None for what goes into `alike`: names that share a mark."""
    name, *parts = fact
    if name in ("Parallel", "Perpendicular") and all(p[0] == "Line" for p in parts):
        return relation(name, parts, drawing)
    if name != "Equals" or len(parts) != 2 or not isinstance(parts[0], tuple):
        return KIND
    measure, of = parts[0][0], parts[0][1]
    of = of if isinstance(of, tuple) else (of,)
    thing = {"Line": drawing.segment, "Angle": drawing.angle}.get(of[0], lambda _: None)(of)
    if (measure, of[0]) not in (("LengthOf", "Line"), ("MeasureOf", "Angle"), ("MeasureOf", "Arc"),
                                *(("AreaOf", shape) for shape in SHAPES)):
        return KIND
    if of[0] in ("Arc", *SHAPES) and set(of[1:]) <= drawing.letters:
        thing = f"{of[0].lower()} {''.join(of[1:])}"
    if thing is None:
        return PLACE
    value = parts[1]
    if isinstance(value, tuple) and value[0] == measure and len(value) == 2:
        inner = value[1]
        if isinstance(inner, tuple) and inner[0] == of[0]:          # two things share a mark
            if inner[0] == "Angle" and inner[1].isdigit():
                return f"The {thing} is numbered {inner[1]}" if numbered else NUMBERED
            other = drawing.segment(inner) if of[0] == "Line" else drawing.angle(inner)
            return join(alike["segments" if of[0] == "Line" else "angles"], thing, other) \
                if other and of[0] in ("Line", "Angle") else PLACE
        if isinstance(inner, str) and (match := re.fullmatch(r"angle(\d+)", inner)):
            return f"The {thing} is numbered {match[1]}" if numbered else NUMBERED
        value = inner                                               # LengthOf(w): the letter w
    text = expression(value)
    if text is None or garbled and re.search(r"[a-z]", text):
        return GARBLED
    if of[0] in ("Angle", "Arc"):
        text = f"({text})°" if " " in text else f"{text}°"
    return f"The {thing} is marked {'with the area ' if measure == 'AreaOf' else ''}{text}"


def join(groups, one, other):
    """Put two names into the group that has either of them, or into a new one."""
    found = [group for group in groups if one in group or other in group]
    merged = list(dict.fromkeys([*(n for group in found for n in group), one, other]))
    groups[:] = [group for group in groups if group not in found] + [merged]


def relation(name, lines, drawing):
    """Parallel or perpendicular segments; two that meet in an end have a right angle there."""
    shared = set(lines[0][1:]) & set(lines[1][1:])
    if name == "Perpendicular" and len(shared) == 1:
        [corner] = shared
        ends = [next((p for p in line[1:] if p != corner), corner) for line in lines]
        angle = drawing.angle(("Angle", ends[0], corner, ends[1]))
        return f"The {angle} is marked as a right angle" if angle else PLACE
    one, other = map(drawing.segment, lines)
    return f"The {one} and the {other} are marked as {name.lower()}" if one and other else PLACE


def circles(facts, drawing, notes):
    """A sentence a circle: its centre, if it has a letter or is the only one, and lettered points.
    """
    on = defaultdict(list)
    for fact in facts:
        if fact[0] == "PointLiesOnCircle":
            on[fact[2][1] if isinstance(fact[2], tuple) else fact[2]].append(fact[1])
    sentences = []
    for centre, points in on.items():
        names = [point for point in points if point in drawing.letters]
        notes += [UNLETTERED] * (len(points) - len(names))
        if names and centre in drawing.letters:
            sentences.append(f"The circle with centre {centre} passes through {listed(names)}")
        elif names and len(on) == 1:
            sentences.append(f"The circle passes through {listed(names)}")
        else:
            notes += [PLACE] * len(names)
    return sentences


def collinear(facts, drawing, notes):
    """Lettered points of one line, in their order, each line told once."""
    lines = []
    for fact in facts:
        if fact[0] != "PointLiesOnLine":
            continue
        points = {fact[1], *fact[2][1:]}
        if not points <= drawing.letters:
            notes.append(UNLETTERED)
        elif not drawing.lies_between(fact[1], *fact[2][1:]):
            notes.append(UNTRUE)
        else:                                   # two points in common: the same line
            same = [line for line in lines if len(line & points) > 1]
            lines = [line for line in lines if line not in same] + [points.union(*same)]
    sentences = []
    for line in lines:
        order = sorted(line, key=lambda p: (drawing.at[p], p))
        width, height = (abs(drawing.at[order[0]][n] - drawing.at[order[-1]][n]) for n in (0, 1))
        if height > width:                      # upright: from the top down
            order = sorted(line, key=lambda p: (drawing.at[p][1], p))
        sentences.append(f"{listed(order)} lie on one line in this order")
    return sentences


def listed(parts):
    """a; a and b; a, b and c."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))
