"""data/toy.py - two procedural worlds: pictures, questions, answers, cues and rationales.

The idea.  A picture is a grid of cells, some of which hold a coloured shape, drawn a little out of
place. Eight kinds of question need what is seen, not what is guessed:

    count    How many red shapes are there?
    add      What do the row numbers of the red shapes add up to?
    locate   In which row is the blue circle?
    compare  Are there more red shapes or more blue shapes?
  and, in the large world only,
    sum      How many shapes are red or blue?
    odd      Among the red shapes, exactly one kind appears only once. Which kind?
    left     What colour is the shape directly to the left of the only blue circle?
    most     Which colour is the most frequent in the top three rows?

Every question comes with its answer, a worked solution, the cue (the visible facts that matter,
never the answer) and the rationale (the reasoning that leads to the answer).

In:  a seed.  Out: records as data/records.py reads them, plus "objects": all that is in the
picture, so that evaluate.py can check whether an answer's evidence is real (`grounded`).

Use:  python data/toy.py                 data/toy: 3,000 train, 512 test and 256 dev records
      python data/toy.py --large         data/toy-large, for a real model: 7,040, 512 and 256
      python data/toy.py --cues wrong    data/toy-wrong: the same, but a teacher told falsehoods
      python data/toy.py --views masked  data/toy-masked: pictures for --privilege view
`python distill.py` does the first two by itself when no --data is given.

Train and test share no picture: the checksum of a picture's contents decides where it belongs.
Dev, by which a run chooses its best student, is of test's side and leaves out what test shows.
SMALL is kept easy on purpose: 9 to 12 cells, 3 shapes, 4 colours, no overlap. LARGE has 48 to 80
cells and 20 to 40 things. Each cell is four visual tokens of Qwen3-VL, thin lines show the grid,
and a question says all that a model must know to answer (where row 1 is, which words to use).
"""
from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import tempfile
import zlib
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {"red": (214, 45, 45), "blue": (40, 90, 215), "green": (35, 150, 70),
           "yellow": (235, 190, 30)}
SHAPES = ("circle", "square", "triangle")
KINDS = ("count", "add", "locate", "compare")
HARDER = ("sum", "odd", "left", "most")
PAPER, LINE, FRAME = (246, 244, 238), (222, 219, 210), (40, 40, 44)
# corners of the shapes that are polygons, from the middle, for a radius of 1; y grows downward
CORNERS = {"triangle": ((0, -1), (1, 1), (-1, 1)),
           "diamond": ((0, -1), (0.8, 0), (0, 1), (-0.8, 0)),
           "cross": ((-0.35, -1), (0.35, -1), (0.35, -0.35), (1, -0.35), (1, 0.35), (0.35, 0.35),
                     (0.35, 1), (-0.35, 1), (-0.35, 0.35), (-1, 0.35), (-1, -0.35),
                     (-0.35, -0.35)),
           "star": ((0, -1), (0.26, -0.36), (0.95, -0.31), (0.43, 0.14), (0.59, 0.81), (0, 0.45),
                    (-0.59, 0.81), (-0.43, 0.14), (-0.95, -0.31), (-0.26, -0.36))}


@dataclass(frozen=True, eq=False)
class World:
    """What differs between the world of the tiny model and that of a real one."""
    name: str
    cell: int                                # pixels
    sizes: tuple                             # (rows, columns); several, so that batches are ragged
    things: tuple[int, int]                  # fewest and most in a picture
    favourite: float                         # share of things in one colour, to have some to count
    colours: dict = field(default_factory=lambda: COLOURS)
    shapes: tuple = SHAPES
    kinds: tuple = KINDS
    notes: dict = field(default_factory=dict)   # kind -> what stands behind its questions
    records: tuple[int, int, int] = (3000, 512, 256)    # train, test and dev
    smooth: int = 4                          # drawn so many times too large, then shrunk by
    shrink: Image.Resampling = Image.Resampling.LANCZOS     # (BOX is three times as fast)
    lines: bool = False                      # between the cells


CELL = 16                                    # pixels: one visual token of the tiny model
SMALL = World("toy", CELL, ((3, 3), (3, 4), (4, 3)), (4, 6), 0.4)

_MORE = COLOURS | {"purple": (125, 60, 175), "pink": (240, 135, 185), "black": (40, 40, 44)}
_SHAPES = (*SHAPES, *(name for name in CORNERS if name not in SHAPES))
_NAME_COLOUR = f" Answer with one of: {', '.join(_MORE)}."
LARGE = World(
    "toy-large", 64, ((6, 8), (6, 10), (7, 9), (8, 8), (8, 10)), (20, 40), 0.25, _MORE, _SHAPES,
    KINDS + HARDER, records=(7040, 512, 256),    # 55 steps of 128: an epoch of the paper's main run
    notes={"add": " Row 1 is at the top.", "locate": " Row 1 is at the top.",
           "compare": ' Answer with the colour, or "equal".', "left": _NAME_COLOUR,
           "most": _NAME_COLOUR, "odd": f" Answer with one of: {', '.join(_SHAPES)}."},
    smooth=2, shrink=Image.Resampling.BOX, lines=True)


@dataclass(frozen=True, order=True)
class Thing:
    """One object. Rows and columns count from 1, from the top left."""
    row: int
    column: int
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.colour} {self.shape} at row {self.row} column {self.column}"


@dataclass(frozen=True)
class Scene:
    rows: int
    columns: int
    things: tuple[Thing, ...]                # in reading order
    world: World = field(default=SMALL, repr=False)

    @property
    def split(self) -> str:
        """'test' for one scene in eight, by checksum: no picture can be in both."""
        text = f"{self.rows}x{self.columns} " + "; ".join(map(str, self.things))
        return "test" if zlib.crc32(text.encode()) % 8 == 0 else "train"


def make_scene(rng: random.Random, split: str, world: World = SMALL, without=()) -> Scene:
    """A few things, many of them in one colour, so that questions have something to count.

    without: "objects" of records whose pictures are taken.
    """
    while True:
        rows, columns = rng.choice(world.sizes)
        cells = [(r, c) for r in range(1, rows + 1) for c in range(1, columns + 1)]
        colours = list(world.colours)
        favourite = rng.choice(colours)
        things = []
        for row, column in sorted(rng.sample(cells, rng.randint(*world.things))):
            colour = favourite if rng.random() < world.favourite else rng.choice(colours)
            things.append(Thing(row, column, colour, rng.choice(world.shapes)))
        scene = Scene(rows, columns, tuple(things), world)
        if scene.split == split and list(map(str, things)) not in without:
            return scene


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """The picture. Drawn too large and shrunk, for smooth edges; each thing jittered."""
    world = scene.world
    size = world.cell * world.smooth
    unit = size / CELL                       # one pixel of the small world
    image = Image.new("RGB", (scene.columns * size, scene.rows * size), PAPER)
    pen = ImageDraw.Draw(image)
    if world.lines:
        for n in range(1, max(scene.rows, scene.columns)):
            pen.line((n * size, 0, n * size, image.height), LINE, world.smooth)
            pen.line((0, n * size, image.width, n * size), LINE, world.smooth)
    for thing in scene.things:
        radius = rng.uniform(4.8, 6.4) * unit
        x = (thing.column - 0.5) * size + rng.uniform(-1.2, 1.2) * unit
        y = (thing.row - 0.5) * size + rng.uniform(-1.2, 1.2) * unit
        fill = tuple(max(0, min(255, c + rng.randint(-12, 12)))
                     for c in world.colours[thing.colour])
        left, top, right, bottom = x - radius, y - radius, x + radius, y + radius
        if thing.shape == "circle":
            pen.ellipse((left, top, right, bottom), fill=fill)
        elif thing.shape == "square":
            pen.rectangle((left + unit, top + unit, right - unit, bottom - unit), fill=fill)
        else:
            pen.polygon([(x + dx * radius, y + dy * radius) for dx, dy in CORNERS[thing.shape]],
                        fill=fill)
    return image.resize((scene.columns * world.cell, scene.rows * world.cell), world.shrink)


# ---------------------------------------------------------------------------- questions

@dataclass(frozen=True)
class Question:
    """A question about some `colours`, a `shape`, or all things in `rows`.

    What it needs seen is `relevant(things)`.
    """
    kind: str
    text: str
    colours: tuple[str, ...]
    shape: str | None = None
    rows: tuple[int, ...] = ()

    def relevant(self, things) -> list[Thing]:
        """The things the question is about, in reading order; if colours are asked, one by one."""
        if self.rows:
            return [t for t in things if t.row in self.rows]
        return [t for colour in self.colours for t in things
                if t.colour == colour and self.shape in (None, t.shape)]

    def reason(self, seen: list[Thing]) -> tuple[str, str]:
        """(the calculation in words, the answer) that follow if exactly `seen` is visible."""
        if self.kind == "count":
            return "", str(len(seen))
        if self.kind == "add":
            total = sum(t.row for t in seen)
            sums = " + ".join(str(t.row) for t in seen)
            return (f"{sums} = {total}." if len(seen) > 1 else ""), str(total)
        if self.kind == "locate":
            return "", str(seen[0].row) if seen else "none"
        if self.kind == "left":
            here = next(t for t in seen if (t.colour, t.shape) == (*self.colours, self.shape))
            left = next(t for t in seen if t.column == here.column - 1)
            return f"To the left of {here} is {left}.", left.colour
        counts = Counter(t.shape if self.kind == "odd" else t.colour for t in seen)
        names = self.colours if self.kind in ("compare", "sum") else sorted(counts)
        words = ", ".join(f"{name} {counts[name]}" for name in names) + "."
        if self.kind == "sum":
            return words, str(len(seen))
        wanted = 1 if self.kind == "odd" else max(counts[name] for name in names)
        found = [name for name in names if counts[name] == wanted]
        return words, found[0] if len(found) == 1 else "equal"

    def solution(self, seen: list[Thing]) -> str:
        """The answer reasoned aloud, from evidence to \\boxed{}."""
        words, answer = self.reason(seen)
        return " ".join(filter(None, (f"I see {listing(seen)}.", words,
                                      f"The answer is \\boxed{{{answer}}}.")))


def make_question(scene: Scene, rng: random.Random, kind: str | None = None) -> Question:
    """A question that the scene can answer, of a random kind."""
    kind = kind or rng.choice(scene.world.kinds)
    # Asking about a colour of some thing, not any colour, makes the common ones commoner.
    colour = rng.choice(scene.things).colour
    note = scene.world.notes.get(kind, "")
    if kind == "count":
        return Question(kind, f"How many {colour} shapes are there?{note}", (colour,))
    if kind == "add":
        return Question(kind, f"What do the row numbers of the {colour} shapes add up to?{note}",
                        (colour,))
    if kind in ("compare", "sum"):
        other = rng.choice([c for c in scene.world.colours if c != colour])
        pair = (colour, other) if rng.random() < 0.5 else (other, colour)
        text = ("Are there more {} shapes or more {} shapes?" if kind == "compare" else
                "How many shapes are {} or {}?")
        return Question(kind, text.format(*pair) + note, pair)
    fitting = {"locate": _locate, "left": _left, "odd": _odd, "most": _most}[kind](scene)
    if not fitting:
        return make_question(scene, rng, "count")
    text, colours, shape, rows = rng.choice(fitting)
    return Question(kind, text + note, colours, shape, rows)


# Each: all questions of a kind that have one right answer, as (text, colours, shape, rows).

def _unique(scene: Scene) -> list[Thing]:
    names = Counter((t.colour, t.shape) for t in scene.things)
    return [t for t in scene.things if names[t.colour, t.shape] == 1]


def _locate(scene: Scene) -> list[tuple]:
    return [(f"In which row is the {t.colour} {t.shape}?", (t.colour,), t.shape, ())
            for t in _unique(scene)]


def _left(scene: Scene) -> list[tuple]:
    taken = {(t.row, t.column) for t in scene.things}
    return [(f"What colour is the shape directly to the left of the only {t.colour} {t.shape}?",
             (t.colour,), t.shape, (t.row,))
            for t in _unique(scene) if (t.row, t.column - 1) in taken]


def _odd(scene: Scene) -> list[tuple]:
    counts = {c: Counter(t.shape for t in scene.things if t.colour == c).values()
              for c in scene.world.colours}
    return [(f"Among the {c} shapes, exactly one kind appears only once. Which kind?", (c,), None,
             ()) for c, found in counts.items() if list(found).count(1) == 1 and len(found) > 1]


def _most(scene: Scene) -> list[tuple]:
    out = []
    for n, word in enumerate(("two", "three", "four"), 2):
        first, *rest = Counter(t.colour for t in scene.things if t.row <= n).most_common()
        if not rest or first[1] > rest[0][1]:
            out.append((f"Which colour is the most frequent in the top {word} rows?", (), None,
                        tuple(range(1, n + 1))))
    return out


def listing(things) -> str:
    return ", ".join(map(str, things)) if things else "nothing"


def make_record(scene: Scene, question: Question, name: str, image: str) -> dict:
    seen = question.relevant(scene.things)
    words, answer = question.reason(seen)
    return {
        "id": name, "images": [image], "question": question.text, "answer": answer,
        "cue": f"The picture shows {listing(seen)}.",
        "rationale": f"{words or f'There are {len(seen)} to look at.'} So the answer is {answer}.",
        "source": scene.world.name, "kind": question.kind, "objects": list(map(str, scene.things)),
    }


# real models also write "A red circle (row 1, column 2)"
STATED = re.compile(rf"\ba ({'|'.join(LARGE.colours)}) ({'|'.join(LARGE.shapes)}) "
                    r"(?:at |in |is in )?\(?row (\d+),? (?:and )?column (\d+)", re.I)


def grounded(response: str, record: dict) -> bool:
    """Whether the response states evidence, and every object that it states is in the picture."""
    stated = STATED.findall(response)
    return bool(stated) and all(
        str(Thing(int(row), int(column), colour.lower(), shape.lower())) in record["objects"]
        for colour, shape, row, column in stated)


# ---------------------------------------------------------------------------- controls

CUES = ("own", "wrong", "empty")
NOTHING = "Look at the picture."


def replace_cues(records: list[dict], cues: str, rng: random.Random) -> None:
    """What does a cue teach, beside what it says? The same records with other cues, in place.

    "wrong": each record has another's cue (now and then of the same text). "empty": all have one
    sentence that says nothing. "own": as they are.
    """
    given = [record["cue"] for record in records]
    if cues == "wrong":         # a ring through all records in random order: none keeps its own
        order = rng.sample(range(len(given)), len(given))
        other = dict(zip(order, order[1:] + order[:1]))
        given = [given[other[n]] for n in range(len(given))]
    elif cues == "empty":
        given = [NOTHING] * len(given)
    for record, cue in zip(records, given):
        record["cue"] = cue


# ---------------------------------------------------------------------------- views

VIEWS = ("own", "enlarged", "marked", "masked", "blurred")


def view(picture: Image.Image, things: list[Thing], kind: str, cell: int) -> Image.Image:
    """Another look at a picture for --privilege view. things: what the question is about.

    "enlarged" has four times the visual tokens; "marked" frames the cells of `things`; "masked"
    shows nothing else; "blurred" leaves two pixels to the side of a cell: colours, hardly shapes.
    All are functions of the picture and the question. Only of "blurred" the student is the reader,
    so that its teacher knows what the student cannot see.
    """
    width, height = picture.size
    if kind == "enlarged":
        return picture.resize((2 * width, 2 * height), Image.Resampling.BICUBIC)
    if kind == "blurred":
        few = picture.resize((2 * width // cell, 2 * height // cell), Image.Resampling.BOX)
        return few.resize((width, height), Image.Resampling.BICUBIC)
    out = picture.copy() if kind == "marked" else Image.new("RGB", (width, height), PAPER)
    for thing in things:
        left, top = (thing.column - 1) * cell, (thing.row - 1) * cell
        if kind == "marked":
            ImageDraw.Draw(out).rectangle((left, top, left + cell - 1, top + cell - 1),
                                          outline=FRAME, width=cell // CELL)
        else:
            box = (left, top, left + cell, top + cell)
            out.paste(picture.crop(box), box)
    return out


# ---------------------------------------------------------------------------- writing

def write(folder, train: int = 3000, test: int = 512, seed: int = 0, replace: bool = True,
          world: World = SMALL, cues: str = "own", views: str = "own", dev: int = 0) -> None:
    """Write FOLDER/train.jsonl, test.jsonl and images/; the folder appears only when complete.

    dev: records of a dev.jsonl beside them, 0 for no such file.
    replace=False keeps a folder that another process wrote meanwhile, since it may be in use.
    cues, views: as replace_cues() and view() have them; pictures, questions and ids do not depend
    on them.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # a unique name: two first runs side by side must not draw into one folder
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=folder.name + "."))
    # SIGTERM becomes an exception, as Ctrl-C is: neither leaves half a world behind
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for split, count in (("train", train), ("test", test)):
            write_split(temporary, split, count, seed, world, cues, views)
        if dev:
            taken = objects_in(temporary / "test.jsonl")
            write_split(temporary, "dev", dev, seed, world, cues, views, taken)
        temporary.chmod(0o755)                   # mkdtemp makes it private
        if replace:
            shutil.rmtree(folder, ignore_errors=True)
        try:
            os.replace(temporary, folder)
        except OSError:
            if replace or not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)         # there unless it was renamed
        signal.signal(signal.SIGTERM, handler)


def write_split(folder: Path, split: str, count: int, seed: int, world: World, cues: str,
                views: str, without=()) -> None:
    """FOLDER/SPLIT.jsonl and its pictures, drawn from a stream of its own."""
    rng, records = random.Random(f"{seed} {split}"), []
    for kind in ("images",) if views == "own" else ("images", "views"):
        (folder / kind / split).mkdir(parents=True)
    for n in range(count):
        scene = make_scene(rng, "train" if split == "train" else "test", world, without)
        image = f"images/{split}/{n}.png"
        picture = draw(scene, rng)
        picture.save(folder / image)
        question = make_question(scene, rng)
        records.append(make_record(scene, question, f"{world.name}-{split}-{n}", image))
        if views != "own":
            other = f"views/{split}/{n}.png"
            view(picture, question.relevant(scene.things), views, world.cell).save(folder / other)
            pair = (other, image) if views == "blurred" else (image, other)
            records[-1] |= {"images": [pair[0]], "teacher_images": [pair[1]]}
    replace_cues(records, cues, random.Random(f"{seed} {split} cues"))
    with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as out:
        out.writelines(json.dumps(record) + "\n" for record in records)


def objects_in(path: Path) -> list[list[str]]:
    """What the pictures of a record file show."""
    return [json.loads(line)["objects"] for line in path.read_text(encoding="utf-8").splitlines()]


def add_dev(folder: Path, world: World = SMALL, count: int = 256) -> None:
    """Draw dev.jsonl into a world that was drawn before there was one. Nothing else is touched."""
    temporary = Path(tempfile.mkdtemp(dir=folder, prefix="dev."))
    try:
        write_split(temporary, "dev", count, 0, world, "own", "own",
                    objects_in(folder / "test.jsonl"))
        with suppress(OSError):      # they are there: of another process, or of one that was killed
            os.replace(temporary / "images" / "dev", folder / "images" / "dev")
        os.replace(temporary / "dev.jsonl", folder / "dev.jsonl")
    finally:
        shutil.rmtree(temporary)


def default(large: bool = False) -> Path:
    """The world of a run without --data, drawn when it is first asked for: data/toy, for the tiny
    model, or data/toy-large. One without dev.jsonl gets it, if its folder can be written to.
    """
    world = LARGE if large else SMALL
    folder = Path(__file__).resolve().parent / world.name
    if not (folder / "train.jsonl").exists():
        print(f"drawing the {'large ' if large else ''}toy world in {folder}", flush=True)
        train, test, dev = world.records
        write(folder, train, test, replace=False, world=world, dev=dev)
    elif not (folder / "dev.jsonl").exists():
        print(f"drawing {folder / 'dev.jsonl'}", flush=True)
        with suppress(OSError):
            add_dev(folder, world, world.records[2])
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a toy world as records and PNG files.")
    parser.add_argument("--large", action="store_true", help="the world of a real model")
    parser.add_argument("--cues", choices=CUES, default="own", help="wrong: each record has "
                        "another's cue; empty: a sentence that says nothing")
    parser.add_argument("--views", choices=VIEWS, default="own", help="other pictures for the "
                        "teacher, enlarged, marked or masked; or blurred ones for the student")
    parser.add_argument("--out", help="folder to write, replaced if it exists (default: data/toy "
                        "or data/toy-large, with the kind of cues and views behind it)")
    parser.add_argument("--train", type=int, help="training records (default: 3000, large 7040)")
    parser.add_argument("--test", type=int, help="test records (default: 512)")
    parser.add_argument("--dev", type=int, help="dev records (default: 256), 0 for none")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    world = LARGE if args.large else SMALL
    train, test, dev = (default if typed is None else typed for typed, default in
                        zip((args.train, args.test, args.dev), world.records))
    changed = [kind for kind in (args.cues, args.views) if kind != "own"]
    out = args.out or "data/" + "-".join([world.name, *changed])
    write(out, train, test, args.seed, world=world, cues=args.cues, views=args.views, dev=dev)
    print(f"{train} train, {test} test and {dev} dev records in {out}")


if __name__ == "__main__":
    main()
