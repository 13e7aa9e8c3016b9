"""Does a training file hold a benchmark's pictures or questions? Find them, list them, drop them.

Idea. A score on questions that were trained on says nothing, and public training sets do hold
pieces of public benchmarks: MathVista and MathVerse took diagrams from Geometry3K. Four kinds
of match are listed, from certain to merely suspicious:
    same picture       equal pixels after decoding, whatever the file format
    near picture       looks alike: re-encoded, rescaled; shown side by side, never dropped
    same question      equal letters and digits, options and the benchmark's instructions aside
    template question  the same, but the training file asks it about several pictures ("Find x."),
                       so it is no sign that one of them was seen; listed, never dropped

In and out. --data is a records file (records.py). --against is any number of files: records, or a
benchmark's parquet, JSON or TSV as its authors or VLMEvalKit publish it, read by the names of its
columns (QUESTIONS, PICTURES below), rows whose picture is another row's included. Out of it come
    train.contamination.jsonl   {"id": .., "why": {"near picture": {"rows": 3, "first": [
                                 {"file": .., "row": .., "bits": 5}, ..]}}} for each record found
    train.contamination.html    near pictures side by side, the nearest first
    train.clean.jsonl           with --drop: the lines without a "same" match, as they were
and the counts on the screen, also of what could not be compared.

The one equation. A picture is made grey and averaged to 9 x 8 cells for its rows, and to 8 x 9 for
its columns. Each of the 2 * 64 steps d from a cell to the next gives two bits,
    d > 2   and   d < -2         in grey levels of 256
and two pictures are near when at most 12 of the 256 bits differ, their shapes (width by height) by
at most 5 %, the mean colours of 4 x 4 cells by at most 36 levels, and at a second look no cell of
80 x 80 by more than 40 levels from all the cells around its place in the other picture.
Why steps, and above 2: a little brighter is the same, and the noise of JPEG stays below. Why
colours: red and blue shapes in the same places have the same steps. Why the second look: plots
share axes and grid, and 8 x 8 cells of a thin curve say nearly nothing. Why around: a line that is
rescaled moves a little.
Measured: copies found in %, and different pictures called near, without and with the second look,
of 684 plots as DynaMath has them (234,000 pairs), 600 toy scenes and 600 line drawings (180,000
pairs each). tests/test_contamination.py draws such plots and repeats it smaller.
              JPEG 60    half    half + JPEG    0.7 + JPEG    quarter      wrong: 1st    both
    plots       100.0    99.9           99.9          99.7       99.3           1,774     120
    toy         100.0    99.5           93.7          99.0       25.7               0       0
    drawings    100.0    98.3           98.2          99.8       93.8               0       0
The wrong ones left are plots that differ by a hair, or by a number at a side: look at them.

Run.
    python data/prepare.py contamination --data data/vision_r1/train.jsonl --against FILE [FILE ..]
    python data/contamination.py --data train.jsonl --against testmini.json --drop

Left out. Crops, mirrors and turned copies, the same figure drawn anew, a question reworded: those
take a model. Pictures without steps (a blank page) are compared by pixels only, video frames never.
"""
import argparse
import base64
import hashlib
import html
import io
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import records as record_files, sources  # noqa: E402
from data.output import write_atomic, write_jsonl  # noqa: E402
from model import to_rgb  # noqa: E402

# Columns that are read, the first that has something; MathVerse's Vision Only has no "question".
QUESTIONS = ("question", "problem", "question_for_eval", "query", "prompt")
# "decoded_image" first: beside it, "image" is only the path of the same picture.
PICTURES = ("decoded_image", "images", "image", "image_path", "img")
NAMES = ("index", "id", "pid", "sample_index", "ID")     # a TSV refers to pictures by index
CELLS, STEP = 8, 2.0        # of the fingerprint, see the header
NEAR, SHAPE, COLOUR = 12, 0.05, 36
SMALL, FINE, UNLIKE = 192, 80, 40       # of the second look: pixels kept, cells, grey levels
PLAIN = 6                   # with fewer bits set there is too little to compare
LISTED = 5                  # matches of a record that are written out; the rest is counted
SHOWN = 300                 # pairs in the .html
REASONS = ("same picture", "near picture", "same question", "template question")
DROPPED = ("same picture", "same question")


# ---- fingerprints ------------------------------------------------------------------------------

def fingerprint(image):
    """Grey steps along both axes -> 256 bits as (4,) uint64; see the header.

    >>> left_to_right = Image.linear_gradient("L").rotate(90)
    >>> int(np.bitwise_count(fingerprint(left_to_right)).sum())     # every step along one axis
    64
    """
    grey = image.convert("L").convert("F")      # floats: rounding the averages would make noise
    rows = np.asarray(grey.resize((CELLS + 1, CELLS), Image.Resampling.BOX))
    columns = np.asarray(grey.resize((CELLS, CELLS + 1), Image.Resampling.BOX))
    steps = np.concatenate([np.diff(rows, axis=1).ravel(), np.diff(columns, axis=0).ravel()])
    return np.packbits(np.concatenate([steps > STEP, steps < -STEP])).view(np.uint64)


@dataclass
class Print:
    """What is kept of a picture."""
    pixels: str             # hash of the decoded pixels and the size
    bits: np.ndarray        # the fingerprint
    shape: float            # log of width / height
    colours: np.ndarray     # (4, 4, 3) mean colours, int16 so that their differences are numbers
    small: bytes            # a JPEG of it, for the second look and for the sheet


def take_print(content):
    """Bytes or Path of a picture -> Print; ValueError if it cannot be decoded."""
    image = to_rgb(sources.decode(content))
    pixels = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
    colours = np.asarray(image.resize((4, 4), Image.Resampling.BOX), dtype=np.int16)
    small = image.copy()
    small.thumbnail((SMALL, SMALL), Image.Resampling.BILINEAR)      # never larger than it is
    small.save(file := io.BytesIO(), "JPEG", quality=90, subsampling=0)
    return Print(pixels, fingerprint(image), float(np.log(image.width / image.height)), colours,
                 file.getvalue())


def unlike(one, other):
    """The second look at two Prints: the largest grey difference of a cell from all around it."""
    greys = [Image.open(io.BytesIO(picture.small)).convert("L") for picture in (one, other)]
    size = [min(FINE, *(max(grey.size) * 2 // 3 + 1 for grey in greys))] * 2
    cells = [np.asarray(grey.resize(size, Image.Resampling.BILINEAR), dtype=np.int16)
             for grey in greys]     # not BOX: its cells have hard edges, a thin line would jump
    worst = 0
    for a, b in (cells, cells[::-1]):
        around = np.lib.stride_tricks.sliding_window_view(np.pad(b, 1, mode="edge"), (3, 3))
        worst = max(worst, (a - around.max((2, 3))).max(), (around.min((2, 3)) - a).max())
    return int(worst)


def plain_question(text):
    """Letters and digits of a question, without what a benchmark writes around it.

    >>> plain_question("Hint: Answer with a letter.\\nQuestion: Find $x$.\\nChoices:\\n(A) 3")
    'find x'
    """
    text = unicodedata.normalize("NFKC", text).casefold().replace("\u2212", "-")
    text = re.sub(r"<image[ \d]*>", " ", text)
    text = re.sub(r"^\s*hint:.{0,2000}?\bquestion:", " ", text, flags=re.S)
    text = re.split(r"\b(?:choices?|options?):", text, maxsplit=1)[0]
    # Signs stay: x + 1 and x - 1 are two questions. Blanks and braces of LaTeX do not matter.
    return " ".join(re.findall(r"[^\W_]+|[^\w\s.,;:?!$(){}\[\]\\\"'`]", text))


# ---- reading -----------------------------------------------------------------------------------

@dataclass
class Item:
    """One row of a file as far as it is compared."""
    name: str
    question: str                               # by plain_question, "" if there is none
    prints: list = field(default_factory=list)


@dataclass
class File:
    """A file that was read, and what in it could not be."""
    path: Path
    items: list = field(default_factory=list)
    lost: Counter = field(default_factory=Counter)      # reason -> pictures not compared
    first: dict = field(default_factory=dict)           # reason -> the first of them
    near: list = field(default_factory=list)            # (bits, text, our Print, its Print)

    def take(self, item, content, where):
        """Add the print of a picture, or count it as lost."""
        try:
            item.prints.append(take_print(content))
        except ValueError as error:
            self.lose("pictures that cannot be decoded", f"{where}: {error}")

    def lose(self, reason, detail):
        self.lost[reason] += 1
        self.first.setdefault(reason, detail)


def read_data(path):
    """Read the records that are to be cleaned, with their pictures."""
    file = File(path)
    for record in tqdm(record_files.load(path), desc=path.name, disable=None):
        file.items.append(Item(record["id"], plain_question(record["question"])))
        for picture in record["images"]:
            file.take(file.items[-1], Path(picture), picture)
    return file


def read_against(path, folders=()):
    """Read any file that sources.rows reads: the question and the pictures of every row.

    Pictures named by path are looked for in `folders`, beside the file, in images/ there, and for
    a file in data/ (MathVista's testmini.json) in the folder that holds data/.
    Raises ValueError for a file without known columns, or of whose pictures none was found: an
    archive that nobody unpacked must not look like a clean bill.
    """
    folders = [*folders, path.parent, path.parent / "images", path.parent / path.stem]
    if path.parent.name == "data":
        folders.append(path.parent.parent)
    file, names, by_index, waiting = File(path), set(), {}, []
    for where, row in tqdm(sources.rows(path), desc=path.name, disable=None):
        texts = [row[c] for c in QUESTIONS if isinstance(row.get(c), str) and row[c].strip()]
        cells = [row[c] for c in PICTURES if row.get(c)][:1]
        cells += [row[c] for c in row if re.fullmatch(r"image_\d", c) and row[c]]      # MMMU
        name = next((str(row[c]) for c in NAMES if row.get(c) not in (None, "")), where)
        name = where if name in names else name         # We-Math's ID names a group of rows
        names.add(name)
        item = Item(name, plain_question(texts[0]) if texts else "")
        file.items.append(item)
        if len(cells) == 1 and isinstance(cells[0], str) and cells[0].isalnum() and (
                len(cells[0]) <= 64):           # VLMEvalKit: the index of the row with the picture
            waiting.append((item, cells[0], where))
            continue
        for cell in cells:
            try:
                for content in sources.contents(cell, folders, where):
                    file.take(item, content, where)
            except (ValueError, FileNotFoundError) as error:
                file.lose("pictures that are not there", str(error))
        by_index[name] = item.prints
    for item, index, where in waiting:          # that row may come later than the one naming it
        if index in by_index:
            item.prints = by_index[index]
        else:
            file.lose("pictures that are not there", f"{where}: no row {index!r} has one")
    if not any(item.question or item.prints for item in file.items) and not file.lost:
        raise ValueError(f"{path}: none of the columns {', '.join(QUESTIONS + PICTURES)} holds "
                         f"anything in its {len(file.items)} rows")
    if file.lost and not any(item.prints for item in file.items):
        raise ValueError(f"{path}: none of its pictures can be read: unpack them beside it, or "
                         f"name their folder with --pictures ({next(iter(file.first.values()))})")
    return file


# ---- comparing ---------------------------------------------------------------------------------

def near(prints, others):
    """Pairs of near but not equal pictures: a list of (i, j, bits that differ)."""
    if not prints or not others:
        return []
    bits, shapes = np.stack([p.bits for p in others]), np.array([p.shape for p in others])
    rich = np.bitwise_count(bits).sum(-1) >= PLAIN
    pairs = []
    for i, one in enumerate(prints):            # one row of the distance table at a time
        distance = np.bitwise_count(bits ^ one.bits).sum(-1)
        hit = (distance <= NEAR) & rich & (np.abs(shapes - one.shape) <= np.log1p(SHAPE))
        if np.bitwise_count(one.bits).sum() >= PLAIN:
            pairs += [(i, int(j), int(distance[j])) for j in np.flatnonzero(hit)
                      if others[j].pixels != one.pixels
                      and np.abs(others[j].colours - one.colours).max() <= COLOUR
                      and unlike(one, others[j]) <= UNLIKE]
    return pairs


def find(data, file):
    """Compare File `data` with File `file`; return {item number in data: {reason: [match, ..]}}.

    A match is {"file", "row"} and for a near picture "bits", how many of the 256 differ.
    """
    found = defaultdict(lambda: defaultdict(dict))

    def add(i, reason, item, **more):
        # By row: a row with two matching pictures is one match. The nearest one comes first.
        found[i][reason].setdefault(item.name, {"file": str(file.path), "row": item.name, **more})

    theirs, questions = defaultdict(list), defaultdict(list)
    for item in file.items:
        for picture in item.prints:
            theirs[picture.pixels].append(item)
        if item.question:
            questions[item.question].append(item)
    ours, asked = defaultdict(list), defaultdict(set)
    for i, item in enumerate(data.items):
        for picture in item.prints:
            ours[picture.pixels].append(i)
            for other in theirs.get(picture.pixels, ()):
                add(i, "same picture", other)
        asked[item.question].add(tuple(picture.pixels for picture in item.prints))
    for i, item in enumerate(data.items):
        reason = "template question" if len(asked[item.question]) > 1 else "same question"
        for other in questions.get(item.question, ()):
            add(i, reason, other)
    # Each distinct picture once: MathVerse shows one diagram in four versions of a problem.
    left, right = (list({p.pixels: p for item in f.items for p in item.prints}.values())
                   for f in (data, file))
    for a, b, bits in sorted(near(left, right), key=lambda pair: pair[2]):
        for i in ours[left[a].pixels]:
            for other in theirs[right[b].pixels]:
                if other.name not in found[i]["same picture"]:
                    add(i, "near picture", other, bits=bits)
                    said = f"{data.items[i].name} and row {other.name} of {file.path}"
                    file.near.append((bits, said, left[a], right[b]))
    return {i: {reason: list(rows.values()) for reason, rows in reasons.items() if rows}
            for i, reasons in found.items() if any(reasons.values())}


# ---- the command -------------------------------------------------------------------------------

def summary(file, matches):
    """Print how one file compares: records of ours, and rows of theirs, by reason."""
    pictures = sum(len(item.prints) for item in file.items)
    print(f"{file.path}: {len(file.items)} rows, {pictures} pictures compared")
    for reason in REASONS:
        hits = [reasons[reason] for reasons in matches.values() if reason in reasons]
        rows = {match["row"] for hit in hits for match in hit}
        print(f"  {reason:18} {len(hits)} records, {len(rows)} rows")
    lost(file)


def lost(file):
    """Print which pictures of a file were not compared."""
    for reason, n in file.lost.items():
        print(f"  NOT COMPARED       {n} {reason} (first: {file.first[reason]})")


def check(data, against, pictures=(), out=None, drop=False):
    """Compare records file `data` with each file of `against`; write the listing, print counts.

    Near pictures go to a sheet beside the listing. With `drop`, DATA.clean.jsonl gets the lines of
    the records without a match of a kind in DROPPED. Returns {record id: {reason: matches}}. Raises
    ValueError, OSError with file and row.
    """
    out = out or data.with_name(f"{data.stem}.contamination.jsonl")
    clean = data.with_name(f"{data.stem}.clean.jsonl")
    for path in against:
        if path.resolve() in (data.resolve(), out.resolve()):
            raise ValueError(f"{path} is --data or --out itself, name a benchmark's file")
    if data.resolve() in (out.resolve(), clean.resolve()):
        raise ValueError(f"{data} would be overwritten, choose another --out")
    ours, found, pairs = read_data(data), defaultdict(lambda: defaultdict(list)), []
    print(f"{data}: {len(ours.items)} records, "
          f"{len({p.pixels for item in ours.items for p in item.prints})} distinct pictures")
    lost(ours)
    for path in against:
        file = read_against(path, pictures)
        matches = find(ours, file)
        pairs += file.near
        summary(file, matches)
        for i, reasons in matches.items():
            for reason, rows in reasons.items():
                found[i][reason] += rows
    listing = []
    # What would be dropped first: template questions can be most of the file.
    for i in sorted(found, key=lambda i: (found[i].keys().isdisjoint(DROPPED), i)):
        why = {reason: {"rows": len(rows), "first": rows[:LISTED]}
               for reason, rows in found[i].items()}
        listing.append({"id": ours.items[i].name, "why": why})
    write_jsonl(out, listing)
    bad = {i for i in found if not found[i].keys().isdisjoint(DROPPED)}
    print(f"{out}: {len(listing)} records with a match, {len(bad)} to drop")
    if pairs:
        write_sheet(out.with_suffix(".html"), pairs)
    if drop:
        write_clean(data, clean, bad)
    return {ours.items[i].name: dict(reasons) for i, reasons in found.items()}


def write_sheet(path, pairs):
    """A page with the nearest pairs side by side: only eyes can tell a copy from a near miss."""
    rows = [f"<tr><th colspan=2>{html.escape(said)}, {bits} bits<tr>" + "".join(
        f'<td><img src="data:image/jpeg;base64,{base64.b64encode(one.small).decode()}">'
        for one in prints) for bits, said, *prints in sorted(pairs, key=lambda p: p[0])[:SHOWN]]
    write_atomic(path, ("<!doctype html><meta charset=utf-8><table>" + "\n".join(rows)).encode())
    print(f"{path}: {len(rows)} of {len(pairs)} near pairs to look at")


def write_clean(data, clean, bad):
    """Copy the lines of `data` to `clean`, as they are, but for the records numbered in `bad`."""
    with data.open(encoding="utf-8", newline="") as lines:      # newline="": line ends stay too
        lines = [line for line in lines if line.strip()]        # records.load skips blank ones
    kept = [line for i, line in enumerate(lines) if i not in bad]
    if not kept:
        raise ValueError(f"{data}: every record has a match, nothing would be left")
    write_atomic(clean, "".join(kept).encode("utf-8"))
    print(f"{clean}: {len(kept)} records, {len(bad)} dropped")


def add_arguments(parser):
    """The options of `check`, for this file's command line and for prepare.py's."""
    parser.add_argument("--data", type=Path, required=True, metavar="JSONL",
                        help="records, to be trained on")
    parser.add_argument("--against", type=Path, required=True, nargs="+", metavar="FILE",
                        help="benchmark files: records, parquet, JSON or TSV")
    parser.add_argument("--pictures", type=Path, nargs="+", default=[], metavar="DIR",
                        help="where the benchmarks' picture paths start, if not beside the file")
    parser.add_argument("--out", type=Path, metavar="JSONL",
                        help="the listing (default: DATA.contamination.jsonl beside DATA)")
    parser.add_argument("--drop", action="store_true",
                        help="write DATA.clean.jsonl beside DATA, without what was found")


def main(argv=None):
    """The command line of this file alone."""
    parser = argparse.ArgumentParser(description="Find a benchmark's items in training records.",
                                     allow_abbrev=False)
    add_arguments(parser)
    try:
        check(**vars(parser.parse_args(argv)))
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
