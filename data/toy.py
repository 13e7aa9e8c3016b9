"""data/toy.py - a procedural toy world: pictures, questions, answers, cues and rationales.

The idea.  A picture is a grid of 16-pixel cells, some of which hold a coloured shape, drawn a
little out of place. Four kinds of question need what is seen, not what is guessed:

    count    How many red shapes are there?
    add      What do the row numbers of the red shapes add up to?
    locate   In which row is the blue circle?
    compare  Are there more red shapes or more blue shapes?

Every question comes with its answer, a worked solution, the cue (the visible facts that matter,
never the answer) and the rationale (the reasoning that leads to the answer).

In:  a seed.  Out: records as data/records.py reads them, plus "objects": all that is in the
picture, so that evaluate.py can check whether an answer's evidence is real (`grounded`).

Use:  python data/toy.py --out data/toy        3,000 train and 512 test records with PNG files
`python distill.py` does this by itself when no --data is given.

Train and test share no picture: the checksum of a picture's contents decides where it belongs.
The world is kept easy on purpose: 9 to 12 cells, 3 shapes, 4 colours, no overlap.
"""
from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

CELL = 16                                    # pixels: one visual token of the tiny model
SIZES = ((3, 3), (3, 4), (4, 3))             # (rows, columns); more than one, so batches are ragged
COLOURS = {"red": (214, 45, 45), "blue": (40, 90, 215), "green": (35, 150, 70),
           "yellow": (235, 190, 30)}
SHAPES = ("circle", "square", "triangle")
KINDS = ("count", "add", "locate", "compare")
PAPER = (246, 244, 238)


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

    @property
    def split(self) -> str:
        """'test' for one scene in eight, by checksum: no picture can be in both."""
        text = f"{self.rows}x{self.columns} " + "; ".join(map(str, self.things))
        return "test" if zlib.crc32(text.encode()) % 8 == 0 else "train"


def make_scene(rng: random.Random, split: str) -> Scene:
    """4 to 6 things, half of them in one colour, so that questions have something to count."""
    while True:
        rows, columns = rng.choice(SIZES)
        cells = [(r, c) for r in range(1, rows + 1) for c in range(1, columns + 1)]
        favourite = rng.choice(list(COLOURS))
        things = []
        for row, column in sorted(rng.sample(cells, rng.randint(4, 6))):
            colour = favourite if rng.random() < 0.4 else rng.choice(list(COLOURS))
            things.append(Thing(row, column, colour, rng.choice(SHAPES)))
        scene = Scene(rows, columns, tuple(things))
        if scene.split == split:
            return scene


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """The picture. Drawn four times too large and shrunk, for smooth edges; each thing jittered."""
    scale = 4
    size = CELL * scale
    image = Image.new("RGB", (scene.columns * size, scene.rows * size), PAPER)
    pen = ImageDraw.Draw(image)
    for thing in scene.things:
        radius = rng.uniform(4.8, 6.4) * scale
        x = (thing.column - 0.5) * size + rng.uniform(-1.2, 1.2) * scale
        y = (thing.row - 0.5) * size + rng.uniform(-1.2, 1.2) * scale
        fill = tuple(max(0, min(255, c + rng.randint(-12, 12))) for c in COLOURS[thing.colour])
        box = (x - radius, y - radius, x + radius, y + radius)
        if thing.shape == "circle":
            pen.ellipse(box, fill=fill)
        elif thing.shape == "square":
            left, top, right, bottom = box
            pen.rectangle((left + scale, top + scale, right - scale, bottom - scale), fill=fill)
        else:
            pen.polygon([(x, box[1]), (box[2], box[3]), (box[0], box[3])], fill=fill)
    return image.resize((scene.columns * CELL, scene.rows * CELL), Image.Resampling.LANCZOS)


# ---------------------------------------------------------------------------- questions

@dataclass(frozen=True)
class Question:
    """A question about `colours` (and a `shape`); relevant(things) are those it asks about."""
    kind: str
    text: str
    colours: tuple[str, ...]
    shape: str | None = None

    def relevant(self, things) -> list[Thing]:
        """The things the question is about, colour by colour, each in reading order."""
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
        first, second = (sum(t.colour == colour for t in seen) for colour in self.colours)
        winner = "equal" if first == second else self.colours[first < second]
        return f"{self.colours[0]} {first}, {self.colours[1]} {second}.", winner

    def solution(self, seen: list[Thing]) -> str:
        """The answer reasoned aloud, from evidence to \\boxed{}."""
        words, answer = self.reason(seen)
        return " ".join(filter(None, (f"I see {listing(seen)}.", words,
                                      f"The answer is \\boxed{{{answer}}}.")))


def make_question(scene: Scene, rng: random.Random, kind: str | None = None) -> Question:
    """A question that the scene can answer, of a random kind."""
    kind = kind or rng.choice(KINDS)
    # The colour of a random thing, so colours that occur more often are asked about more often.
    colour = rng.choice(scene.things).colour
    if kind == "count":
        return Question(kind, f"How many {colour} shapes are there?", (colour,))
    if kind == "add":
        return Question(kind, f"What do the row numbers of the {colour} shapes add up to?",
                        (colour,))
    if kind == "locate":
        names = [(t.colour, t.shape) for t in scene.things]
        unique = [name for name in names if names.count(name) == 1]
        if not unique:
            return make_question(scene, rng, "count")
        colour, shape = rng.choice(unique)
        return Question(kind, f"In which row is the {colour} {shape}?", (colour,), shape)
    other = rng.choice([c for c in COLOURS if c != colour])
    pair = (colour, other) if rng.random() < 0.5 else (other, colour)
    return Question(kind, f"Are there more {pair[0]} shapes or more {pair[1]} shapes?", pair)


def listing(things) -> str:
    return ", ".join(map(str, things)) if things else "nothing"


def make_record(scene: Scene, question: Question, name: str, image: str) -> dict:
    seen = question.relevant(scene.things)
    words, answer = question.reason(seen)
    return {
        "id": name, "images": [image], "question": question.text, "answer": answer,
        "cue": f"The picture shows {listing(seen)}.",
        "rationale": f"{words or f'There are {len(seen)} to look at.'} So the answer is {answer}.",
        "source": "toy", "kind": question.kind, "objects": list(map(str, scene.things)),
    }


STATED = re.compile(rf"a (?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)}) at row \d+ column \d+")


def grounded(response: str, record: dict) -> bool:
    """Whether the response states evidence, and every object that it states is in the picture."""
    stated = STATED.findall(response)
    return bool(stated) and all(thing in record["objects"] for thing in stated)


# ---------------------------------------------------------------------------- writing

def write(folder, train: int = 3000, test: int = 512, seed: int = 0, replace: bool = True) -> None:
    """Write FOLDER/train.jsonl, test.jsonl and images/; the folder appears only when complete.

    replace=False keeps a folder that another process wrote meanwhile, since it may be in use.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # a unique name: two first runs side by side must not draw into one folder
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=folder.name + "."))
    for split, count in (("train", train), ("test", test)):
        rng = random.Random(f"{seed} {split}")
        (temporary / "images" / split).mkdir(parents=True)
        with open(temporary / f"{split}.jsonl", "w", encoding="utf-8") as out:
            for n in range(count):
                scene = make_scene(rng, split)
                image = f"images/{split}/{n}.png"
                draw(scene, rng).save(temporary / image)
                record = make_record(scene, make_question(scene, rng), f"toy-{split}-{n}", image)
                out.write(json.dumps(record) + "\n")
    temporary.chmod(0o755)                   # mkdtemp makes it private
    if replace:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        os.replace(temporary, folder)
    except OSError:
        shutil.rmtree(temporary)
        if replace or not folder.is_dir():
            raise


def default() -> Path:
    """The toy world of the default run, data/toy, drawn when it is first asked for."""
    folder = Path(__file__).resolve().parent / "toy"
    if not (folder / "train.jsonl").exists():
        print(f"drawing the toy world in {folder}")
        write(folder, replace=False)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the toy world as records and PNG files.")
    parser.add_argument("--out", default="data/toy", help="folder to write (replaced if it exists)")
    parser.add_argument("--train", type=int, default=3000, help="training records")
    parser.add_argument("--test", type=int, default=512, help="test records")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write(args.out, args.train, args.test, args.seed)
    print(f"{args.train} train and {args.test} test records in {args.out}")


if __name__ == "__main__":
    main()
