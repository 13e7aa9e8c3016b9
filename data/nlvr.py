"""NLVR as it is published: sentences about three boxes of shapes, with a cue from the drawing list.

Idea. Cornell NLVR v1.0 (Suhr et al. 2017, CC BY 4.0) draws its pictures from a list of things, and
publishes the list: shape, colour, size and place of each. Put into words, it is a cue that nobody
had to write and that cannot contain the answer: the sentence is not looked at.

In. The repository's layout; SPLIT is train, dev or test, and is DIR/SPLIT or DIR/nlvr/SPLIT:
    SPLIT/SPLIT.json                       one example a line: sentence, label, identifier "N-M",
                                           directory D, structured_rep (three lists of things)
    SPLIT/images/D/SPLIT-N-M-K.png         K = 0..5: the three boxes in each of their six orders
Out. Rows for prepare.py, one a picture. Their ids hold D, "nlvr-dev-D-N-M-K": whoever wants to
split further must keep whole directories together, because only they share no example.

The one rule. The file does not say which order is which K, so the cue says only what is true in
all six: "One box .. Another box .. The third box ..". Nothing is lost: a sentence of NLVR is true
or false whatever the order is.

    >>> circle, block = thing("circle", "Yellow", 0, 45, 10), thing("square", "Black", 40, 80, 20)
    >>> for sentence in cue([[circle], [block, circle], []]).split(". "): print(sentence)
    One box holds a small yellow circle at the left (touching the left edge)
    Another box holds a medium black square at the bottom (touching the bottom edge) and a small \
yellow circle at the left (touching the left edge)
    The third box is empty.
    >>> print(cue([[block, thing("square", "#0099ff", 40, 59, 20)], [block], [block]])[:72])
    One box holds a tower of two squares, from the bottom up black and blue.

Run. python data/prepare.py nlvr --source DIR --out data/nlvr      Copy: with sources.py.

Left out, on purpose. No correction of the sentences, which people wrote: misspelt as they are.
No statement about things that touch each other, or which is larger than which: that would be work
done for the reader. The hidden test set.
"""
from collections import defaultdict

from data import sources

SPLITS = {"train": "train", "validation": "dev", "test": "test"}       # ours -> theirs
ORDERS = 6
ASKED = "Is this statement about the picture true or false? "
BOX = 100                                   # pixels; x_loc and y_loc are a thing's top left corner
SIZES = {10: "small", 20: "medium", 30: "large"}
COLOURS = {"yellow": "yellow", "black": "black", "#0099ff": "blue"}
COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")


# ---- files -> rows -----------------------------------------------------------------------------

def find(source):
    """Return {split: (its JSON file, its images/)}; FileNotFoundError if there is none."""
    for folder in (source, source / "nlvr"):
        found = {ours: (folder / name / f"{name}.json", folder / name / "images")
                 for ours, name in SPLITS.items() if (folder / name / f"{name}.json").is_file()}
        if found:
            return found
    raise FileNotFoundError(f"no train/train.json, dev/dev.json or test/test.json in {source}: "
                            f"wanted a clone of https://github.com/lil-lab/nlvr, its folder nlvr/")


def rows(path, images):
    """Yield (where, row) for every picture of a split, or (where, why there is no row)."""
    name = path.stem
    for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        where = f"{path}:{line}"
        example = sources.parse(text, where)
        try:
            identifier, directory = example["identifier"], example["directory"]
            statement, label = example["sentence"].strip(), str(example["label"]).lower()
            evidence = cue(example["structured_rep"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{where}: not an example of NLVR ({error!r})") from error
        if label not in ("true", "false"):
            raise ValueError(f"{where}: the label is {label!r}, neither true nor false")
        for order in range(ORDERS):
            picture = f"{directory}/{name}-{identifier}-{order}.png"
            if not (images / picture).is_file():
                yield where, "picture that is not in this copy"
                continue
            yield where, {"id": f"nlvr-{name}-{directory}-{identifier}-{order}",
                          "question": ASKED + statement, "answer": label, "images": picture,
                          "cue": evidence}


# ---- things -> sentences -----------------------------------------------------------------------

def thing(shape, colour, x, y, size):
    """A thing as the file spells it."""
    return {"type": shape, "color": colour, "x_loc": x, "y_loc": y, "size": size}


def cue(boxes):
    """Three lists of things -> three sentences that are true in every order of the boxes."""
    if len(boxes) != 3:
        raise TypeError(f"{len(boxes)} boxes instead of 3")
    towers = all(is_tower(box) for box in boxes)
    return " ".join(f"{start} {contents(box, towers)}." for start, box in
                    zip(("One box", "Another box", "The third box"), boxes))


def is_tower(box):
    """Whether squares of 20 stand on each other in the middle, on the floor, 1 pixel apart."""
    spots = sorted(((t["x_loc"], t["y_loc"], t["size"], t["type"]) for t in box), reverse=True)
    return spots == [(40, 80 - 21 * n, 20, "square") for n in range(len(box))]


def contents(box, towers):
    """What one box holds; `towers`: all three hold towers, so one block alone is a tower too."""
    if not box:
        return "is empty"
    if towers:
        upwards = sorted(box, key=lambda t: -t["y_loc"])
        number = COUNTS[len(box)]
        if len(box) == 1:
            return f"holds a tower of one {colour(box[0])} square"
        return (f"holds a tower of {number} squares, from the bottom up "
                f"{listed([colour(t) for t in upwards])}")
    # Like things together, which is shorter and is how people tell them.
    groups = defaultdict(list)
    for t in box:
        groups[f"{SIZES[t['size']]} {colour(t)} {t['type']}"].append(place(t))
    return "holds " + listed([
        f"a {kind} {places[0]}" if len(places) == 1 else
        f"{COUNTS[len(places)]} {kind}s, {listed(places)}" for kind, places in groups.items()],
        "; " if any(len(places) > 1 for places in groups.values()) else ", ")


def colour(t):
    return COLOURS[t["color"].lower()]


def place(t):
    """Where the middle of a thing is, in thirds of the box, and which edges it touches.

    >>> place(thing("circle", "Black", 80, 80, 20)), place(thing("circle", "Black", 45, 40, 10))
    ('at the bottom right (touching the right and bottom edges)', 'in the middle')
    """
    x, y, size = t["x_loc"], t["y_loc"], t["size"]
    column, row = ((at + size / 2) * 3 // BOX for at in (x, y))      # y grows downwards
    words = [("top", "", "bottom")[int(row)], ("left", "", "right")[int(column)]]
    spot = " ".join(filter(None, words))
    where = f"at the {spot}" if spot else "in the middle"
    edges = [name for name, gap in (("left", x), ("top", y), ("right", BOX - x - size),
                                    ("bottom", BOX - y - size)) if gap == 0]
    if edges:
        where += f" (touching the {listed(edges)} edge{'s' * (len(edges) > 1)})"
    return where


def listed(parts, comma=", "):
    """a; a and b; a, b and c."""
    last = " and " if comma == ", " else "; and "
    return last.join(filter(None, (comma.join(parts[:-1]), parts[-1])))
