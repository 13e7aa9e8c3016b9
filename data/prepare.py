"""Turn a public data set into records: one JSONL file per split, pictures beside it.

Idea. Every data set on the net has its own layout; training and evaluation know only one, the
record. Here a converter is one plain function that finds the files, refuses what is broken,
and hands rows to the four shared helpers (sample, copy, write, report). To add a data set,
write such a function and give it a sub-command in `main`; nothing else has to know.

In and out. easy-VQA (https://github.com/vzhou842/easy-VQA, MIT) comes as
    data/train/questions.json     [["what is the blue shape?", "rectangle", 0], ...]
    data/train/images/0.png       one coloured shape on a light ground; the same under data/test
where the third item of an entry is the picture's number. Out of it come
    OUT/train.jsonl               {"id": "easy-vqa-train-0", "images": ["images/train/0.png"],
                                   "question": "what is the blue shape?", "answer": "rectangle",
                                   "source": "easy-vqa"}
    OUT/images/train/0.png        the source's bytes; the same for test
Picture paths are relative to the JSONL file. The number in an id is the entry's position in
questions.json, counted from 0, so a row has the same id whatever --limit is.

The one equation. --limit k of n rows: shuffle, sort by answer, keep the rows at
    floor((i + 1/2) * n / k),   i = 0 .. k-1
which gives an answer with n_a rows n_a * k / n of the k places, off by less than one.

Run.
    pip install easy-vqa
    python data/prepare.py easy-vqa --out data/easy_vqa                    the installed package
    python data/prepare.py easy-vqa --source DIR --out data/easy_vqa       a folder you have
A second run keeps the pictures that are there and replaces the JSONL files, which are written
last and under a temporary name: a run that was killed leaves no half file that looks whole.

Left out, on purpose. No download (pip does that). No re-encoding, resizing or rewording: only
white space around a text goes. No deleting: pictures of an earlier, larger run stay, because a
cue file beside the records may still name them. No shuffling: the questions about one picture
stay neighbours, so the head of a file is not a fair sample of it; --limit is.
"""

import argparse
import importlib.util
import io
import json
import os
import random
import sys
from collections import Counter
from pathlib import Path

from PIL import Image
from tqdm import tqdm

SPLITS = ("train", "test")
GET_EASY_VQA = "get the data set with `pip install easy-vqa`, or name its folder with --source"


# ---- easy-VQA: where it is, what is in it ------------------------------------------------------

def find_easy_vqa(source=None):
    """Return the folder that holds train/ and test/, at `source` or up to three folders below it.

    So `source` may be the data folder, the package's folder, a clone of the repository, or what
    `pip install --target` filled. Without it the installed package is looked up. Raises
    FileNotFoundError with what was looked for, ValueError when two copies are equally near.
    """
    if source is None:
        # find_spec only looks for the package, it runs none of its code. A spec without an origin
        # is a mere folder called easy_vqa on the path, such as our own output data/easy_vqa.
        spec = importlib.util.find_spec("easy_vqa")
        if spec is None or spec.origin is None:
            raise FileNotFoundError(f"no --source given, and no package easy_vqa is installed for "
                                    f"{sys.executable}: {GET_EASY_VQA}")
        source = Path(spec.origin).parent
    wanted = "train/questions.json"
    for depth in range(4):
        found = sorted(source.glob("*/" * depth + wanted))
        if len(found) > 1:
            raise ValueError(f"{source}: {found[0]} and {found[1]} could both be meant: "
                             f"name one of their folders with --source")
        if found:
            root = found[0].parent.parent
            break
    else:
        raise FileNotFoundError(f"no {wanted} in {source} or up to three folders below it: "
                                f"{GET_EASY_VQA}")
    for split in SPLITS:
        for path in (root / split / "questions.json", root / split / "images"):
            if not path.exists():
                raise FileNotFoundError(f"{path} is missing, is the copy complete? {GET_EASY_VQA}")
    return root


def load_json(path):
    """Parse a JSON file; a ValueError says in which file, line and column it breaks."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8 text") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}:{error.colno}: not JSON ({error.msg}), "
                         f"was the file cut short or edited?") from error


def read_easy_vqa(root, split):
    """Read one split and return (records, dropped), `dropped` counting rows by reason.

    Blank texts and exact repeats are dropped and counted. What points at a damaged copy is a
    ValueError with file and entry number: an entry of another shape, a picture that is not there,
    two answers to one question about one picture, or a split that has no rows.
    """
    path = root / split / "questions.json"
    entries = load_json(path)
    if not isinstance(entries, list):
        raise ValueError(f"{path}: holds a {type(entries).__name__}, not a list of entries")
    pictures = {p.name for p in (root / split / "images").iterdir()}
    records, dropped, first_seen = [], Counter(), {}
    for n, entry in enumerate(entries):
        where = f"{path}: entry {n} (counting from 0)"
        # By exact type, since True is an int to isinstance and would be read as picture 1.
        if not isinstance(entry, list) or [type(item) for item in entry] != [str, str, int]:
            raise ValueError(f"{where}: {str(entry)[:80]!r} is not [question, answer, picture]")
        question, answer, name = entry[0].strip(), entry[1].strip(), f"{entry[2]}.png"
        if name not in pictures:
            raise ValueError(f"{where}: no picture {root / split / 'images' / name}; "
                             f"the folder has {len(pictures)} files, is the copy complete?")
        if not question or not answer:
            dropped["blank question or answer"] += 1
            continue
        earlier, earlier_answer = first_seen.setdefault((question, name), (n, answer))
        if earlier_answer != answer:
            raise ValueError(f"{where}: answers {question!r} on {name} with {answer!r}, "
                             f"entry {earlier} with {earlier_answer!r}")
        if earlier != n:
            dropped["repeat of an earlier entry"] += 1
            continue
        records.append({"id": f"easy-vqa-{split}-{n}", "images": [f"images/{split}/{name}"],
                        "question": question, "answer": answer, "source": "easy-vqa"})
    if not records:
        raise ValueError(f"{path}: no usable rows among {len(entries)} entries")
    return records, dropped


# ---- shared by every converter -----------------------------------------------------------------

def even_sample(records, limit, seed=0):
    """Keep `limit` records, each answer in its share (see the header), in their old order."""
    if limit is None or limit >= len(records):
        return records
    order = list(range(len(records)))
    random.Random(seed).shuffle(order)                    # which rows of an answer: by chance
    order.sort(key=lambda n: records[n]["answer"])        # stable, so chance survives inside one
    picks = [order[(2 * i + 1) * len(order) // (2 * limit)] for i in range(limit)]
    return [records[n] for n in sorted(picks)]


def check_replaceable(path, source):
    """Refuse a `path` that exists with records of another data set: a mistyped --out, most likely.

    Files of our own are fine to replace. Only the first line is looked at.
    """
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        line = file.readline()
    try:
        ours = json.loads(line)["source"] == source
    except (ValueError, TypeError, KeyError):
        ours = False
    if not ours:
        raise ValueError(f"{path} exists and does not start with a record of {source}: "
                         f"choose another --out, or move that file away")


def write_atomic(path, content):
    """Write bytes under a temporary name beside `path`, then rename: all of it or nothing."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def copy_pictures(pictures, out):
    """Copy {path below `out`: source file} byte for byte; return a Counter of (width, height).

    Every picture is decoded once to see that it can be, but what is written is the source's bytes.
    Raises ValueError for one that cannot, and for one that would change a picture already there:
    records and cues that somebody made from the old picture would silently be about another.
    """
    sizes = Counter()
    for relative, source in tqdm(pictures.items(), desc="pictures", disable=None):  # None: no tty
        content = source.read_bytes()
        try:
            with Image.open(io.BytesIO(content)) as image:
                image.load()                              # open() alone reads only the header
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{source}: not a readable picture ({error})") from error
        sizes[image.size] += 1
        target = out / relative
        if target.exists():
            if target.read_bytes() != content:
                raise ValueError(f"{target} exists and differs from {source}: "
                                 f"choose a new --out, or delete the old folder first")
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, content)
    return sizes


def write_jsonl(path, records):
    """Write one JSON object a line, all ASCII, so that no reader's encoding can spoil it."""
    write_atomic(path, "".join(json.dumps(r) + "\n" for r in records).encode("ascii"))


def report(path, records, sizes, dropped, shown=20):
    """Print what went into one file. The commonest answer's share is the score to beat."""
    answers = Counter(r["answer"] for r in records).most_common()
    listing = ", ".join(f"{answer} {count}" for answer, count in answers[:shown])
    more = f", and {len(answers) - shown} more" if len(answers) > shown else ""
    best, count = answers[0]
    size_list = ", ".join(f"{n} of {w}x{h}" for (w, h), n in sizes.most_common(shown))
    drop_list = ", ".join(f"{n} {reason}" for reason, n in dropped.items()) or "none"
    print(f"{path}: {len(records)} rows")
    print(f"  answers   {len(answers)} distinct: {listing}{more}")
    print(f"  baseline  always {best!r} is right on {100 * count / len(records):.1f} % of rows")
    print(f"  pictures  {size_list}")
    print(f"  left out  {drop_list}")


# ---- one function per data set -----------------------------------------------------------------

def easy_vqa(source, out, limit):
    """Convert easy-VQA from folder `source` (None: the installed package) into folder `out`."""
    # 1) Find and read everything, so that a damaged source is refused before a byte is written.
    root = find_easy_vqa(source)
    splits = {}
    for split in SPLITS:
        check_replaceable(out / f"{split}.jsonl", "easy-vqa")
        records, dropped = read_easy_vqa(root, split)
        kept = even_sample(records, limit)
        if len(kept) < len(records):
            dropped["beyond --limit"] = len(records) - len(kept)
        splits[split] = kept, dropped
    # 2) Pictures first: a record must never name a file that is not there yet.
    sizes = {}
    for split, (records, _) in splits.items():
        names = dict.fromkeys(Path(r["images"][0]).name for r in records)   # ordered, no repeats
        sizes[split] = copy_pictures({f"images/{split}/{n}": root / split / "images" / n
                                      for n in names}, out)
    # 3) Records last.
    for split, (records, _) in splits.items():
        write_jsonl(out / f"{split}.jsonl", records)
    # 4) Say what happened.
    print(f"easy-vqa: from {root}")
    for split, (records, dropped) in splits.items():
        report(out / f"{split}.jsonl", records, sizes[split], dropped)


def positive(text):
    """An argparse type: a whole number from 1 up."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return int(text)


def main(argv=None):
    """Read the command line and call the converter it names with its options as keywords."""
    parser = argparse.ArgumentParser(description="Turn a public data set into records.",
                                     allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="DATASET")

    command = commands.add_parser("easy-vqa", allow_abbrev=False,
                                  help="one shape a picture, short questions, 13 answers")
    command.add_argument("--source", type=Path, metavar="DIR",
                         help="the package's folder or its data (default: the installed package)")
    command.add_argument("--out", type=Path, required=True, help="folder to write to")
    command.add_argument("--limit", type=positive, metavar="N",
                         help="rows per split, the answers' mix kept (default: all)")
    command.set_defaults(run=easy_vqa)

    options = vars(parser.parse_args(argv))
    run = options.pop("run")
    try:
        run(**options)
    except (OSError, ValueError) as error:                # what a user can mend needs no traceback
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
