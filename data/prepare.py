"""Turn a public data set into records: one JSONL file per split, pictures beside it.

Idea. Every data set on the net has its own layout; training and evaluation know only one, the
record. Here a converter is one plain function that finds the files, refuses what is broken,
and hands rows to the shared helpers. To add a data set, write such a function and give it a
sub-command in `main`; nothing else has to know. Around this file: sources.py reads rows and
picture cells, tidy.py cleans texts, output.py writes and reports, contamination.py finds a
benchmark's pictures and questions among the records.

In. easy-vqa, the package's layout (https://github.com/vzhou842/easy-VQA, MIT):
    data/train/questions.json     [["what is the blue shape?", "rectangle", 0], ...]
    data/train/images/0.png       the entry's third item is the picture's number; same for test
geometry3k (hiyouga/geometry3k) and vision-r1 (Osilly/Vision-R1-rl), as downloaded or exported:
    DIR[/data]/train-00000-of-00001.parquet, or train.parquet; validation, test alike
        images [{"bytes": .., "path": ..}]   problem "<image>Find x."   answer "2 \\SQRT { 221 }"
        and in newer copies of Geometry3K   id, choices, ground_truth
    DIR/train.jsonl, or train.json with a list, and the pictures at the paths that they name:
        {"images": ["images/0.png"], "problem": "<image>Find x.", "answer": "3"}
geometry3k also in its own layout, nlvr, tabmwp: see geometry3k.py, nlvr.py, tabmwp.py beside this
file. They bring a cue with every row, made of what the pictures were drawn or annotated with.
jsonl: one file of anybody's, with the same kind of rows; flags say what its fields are called.
Out. OUT/train.jsonl               {"id": "easy-vqa-train-0", "images": ["images/train/0.png"],
                                    "question": "what is the blue shape?", "answer": "rectangle",
                                    "source": "easy-vqa"}
     OUT/images/train/0.png        the source's bytes; a split that exists becomes a file, alone
Picture paths are relative to the JSONL file. The number in an id is the row's position in its
split, counted from 0, so a row has the same id whatever --limit is and whatever was left out.
Only easy-vqa numbers its pictures; the others' are named by a hash of their bytes, once a split.

The one equation. --limit k of n rows: shuffle, sort by answer, keep the rows at
    floor((i + 1/2) * n / k),   i = 0 .. k-1
which gives an answer with n_a rows n_a * k / n of the k places, off by less than one.

Run.
    pip install easy-vqa; python data/prepare.py easy-vqa --out data/easy_vqa   or --source DIR
    pip install pyarrow; python data/prepare.py geometry3k --source DIR --out data/geometry3k
    python data/prepare.py vision-r1 --source DIR --out data/vision_r1 --model Qwen3-VL-FOLDER
    python data/prepare.py jsonl --source my.jsonl --question-field q --out data/mine
    python data/prepare.py nlvr --source DIR --out data/nlvr          tabmwp alike
    python data/prepare.py geometry3k --source hub:OWNER/NAME --out data/geometry3k      downloads
    python data/prepare.py contamination --data data/vision_r1/train.jsonl --against FILE [FILE ..]
A second run keeps the pictures that are there and replaces the JSONL files, which are written
last and under a temporary name: a run that was killed leaves no half file that looks whole.

What becomes of a doubtful row (easy-vqa is generated, so there nearly all of it is an error):
1) Error, with file and row: a field or a picture that is missing, <image> marks that are not as
   many as the pictures, a path out of the folder, a shard that is missing. The copy is damaged.
2) Left out and counted: blank text, a picture that cannot be decoded or is over 200 times as long
   as wide. It is the published row that is damaged, and nobody here can mend it.
3) Left out of train alone: repeats, one question about the same pictures with two answers, and
   what has no cue in a set that brings cues. Validation and test keep them: a score is out of all.
4) Kept as it is: which of the choices in Geometry3K's parquet is right. There the question does
   not show them, so no `options` are written; an answer that is not its choice is counted.
5) Mended and counted: LaTeX that lost its backslash to JSON (tidy.py); what is beyond mending is
   an error. An <image> mark in an option is one too, since nobody could see that picture there.

Left out, on purpose. No download but from the hub. No re-encoding, resizing or rewording: what
tidy.py does to answers is counted, questions lose <image> and outer blanks. No deleting: pictures
of an earlier, larger run stay, because a cue file beside the records may still name them. No
shuffling: the head of a file is not a fair sample of it; --limit is.
"""

import argparse
import functools
import hashlib
import importlib.util
import itertools
import os
import re
import string
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from data import contamination, sources  # noqa: E402
from data import geometry3k as geometry  # noqa: E402
from data import nlvr as boxes  # noqa: E402
from data import tabmwp as tables  # noqa: E402
from data.output import (check_replaceable, even_sample, place, report,  # noqa: E402
                         write_jsonl)
from data.tidy import ESCAPED, mend_escapes, take_placeholders, tidy_answer  # noqa: E402

SPLITS = ("train", "validation", "test")
EASY_VQA_SPLITS = ("train", "test")
HUB = {"question": "problem", "answer": "answer", "images": "images"}      # Hugging Face's columns
# What the rows of nlvr.py, tabmwp.py and geometry3k.py are called: as in a record. "notes" are
# texts that say what was mended or left out; they are counted and not written.
OWN = {key: key for key in ("id", "question", "answer", "images", "options", "cue", "rationale",
                            "notes")}
# Rows of each split by the data card: another number is worth a word, not an error. Nobody has
# published Vision-R1's.
CARD = {"geometry3k": {"train": 2101, "validation": 300, "test": 601},
        "nlvr": {"train": 74460, "validation": 5934, "test": 5940},
        "tabmwp": {"train": 23059, "validation": 7686, "test": 7686}}
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
    for split in EASY_VQA_SPLITS:
        for path in (root / split / "questions.json", root / split / "images"):
            if not path.exists():
                raise FileNotFoundError(f"{path} is missing, is the copy complete? {GET_EASY_VQA}")
    return root


def read_easy_vqa(root, split):
    """Read one split and return (records, dropped), `dropped` counting rows by reason.

    Blank texts and exact repeats are dropped and counted. What points at a damaged copy is a
    ValueError with file and entry number: an entry of another shape, a picture that is not there,
    two answers to one question about one picture, or a split that has no rows.
    """
    path = root / split / "questions.json"
    entries = sources.load_json(path)
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


def copy_pictures(pictures, out):
    """Copy {path below `out`: source file} byte for byte; return a Counter of (width, height).

    Every picture is decoded once to see that it can be, but what is written is the source's bytes.
    """
    sizes = Counter()
    for relative, source in tqdm(pictures.items(), desc="pictures", disable=None):  # None: no tty
        content = source.read_bytes()
        try:
            sizes[sources.decode(content).size] += 1
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        place(out / relative, content, source)
    return sizes


# ---- the other data sets: files of splits, rows of one kind ------------------------------------

@dataclass
class Split:
    """One split between reading and writing."""
    records: list = field(default_factory=list)
    pictures: dict = field(default_factory=dict)        # path below OUT -> bytes or a file's Path
    sizes: dict = field(default_factory=dict)           # path below OUT -> (width, height)
    dropped: Counter = field(default_factory=Counter)   # reason -> rows left out
    changed: Counter = field(default_factory=Counter)   # what was done or noticed -> rows kept
    first: dict = field(default_factory=dict)           # either of those -> where it came first

    def count(self, counter, reason, where):
        counter[reason] += 1
        self.first.setdefault(reason, where)


def find_splits(source, split=None):
    """Return ({split: its files, shards in order}, data files that are none of those).

    `source` is a folder, whose data/ is tried too, or a file, whose name or else `split` says what
    it holds. Raises FileNotFoundError with what was looked for, ValueError for a missing shard.
    """
    if split:
        if not source.is_file():
            raise ValueError(f"{source} is no file: --split says which split a single file holds")
        return {split: [source]}, []
    name = re.compile(r"(train|validation|test)(?:-(\d{5})-of-(\d{5})(?:-[0-9a-f]+)?)?")
    for folder in (source, source / "data"):
        paths = [source] if source.is_file() else sorted(folder.glob("*"))
        paths = [p for p in paths if p.suffix.lower() in sources.SUFFIXES]
        matches = {path: match for path in paths if (match := name.fullmatch(path.stem.lower()))}
        if matches:
            break
    else:
        raise FileNotFoundError(
            f"no train, validation or test file in {source} or its data/: wanted train.parquet, "
            f"train-00000-of-00001.parquet, train.jsonl or train.json (any other: --split)")
    splits = {}
    for split in SPLITS:
        files = [path for path, match in matches.items() if match[1] == split]
        shards = [(int(matches[p][2] or 0), int(matches[p][3] or 1)) for p in files]
        if shards != [(n, len(files)) for n in range(len(files))]:
            raise ValueError(f"{folder}: {', '.join(p.name for p in files)} are not the shards of "
                             f"one {split} split: is one missing, or are there two copies?")
        if files:
            splits[split] = files
    return splits, [path for path in paths if path not in matches]


def cell_text(row, column, where, changes=None):
    """The text in a cell, a number as Python writes it, "" for null and NaN. Else ValueError.

    `changes`, a list, learns of backslashes that were put back.
    """
    if column not in row:
        raise ValueError(f"{where}: no field {column!r}, the row has {', '.join(map(repr, row))}")
    value = row[column]
    if not isinstance(value, (str, int, float, type(None))) or isinstance(value, bool):
        raise ValueError(f"{where}: {column} is {str(value)[:60]!r}, neither a text nor a number")
    text, mended = mend_escapes("" if value is None or value != value else str(value),
                                f"{where}: {column}")
    if mended and changes is not None:
        changes.append(ESCAPED)
    return text.strip()


def to_record(row, where, columns, folders, marks, split, out):
    """Return the record of one row, less its source; None for a row left out and counted."""
    mended = []
    question, answer = (cell_text(row, columns[name], where, mended)
                        for name in ("question", "answer"))
    if columns["images"] and columns["images"] not in row:
        raise ValueError(f"{where}: no field {columns['images']!r} for the pictures, the row has "
                         f"{', '.join(map(repr, row))}")
    found = sources.contents(row.get(columns["images"]), folders, where)
    question, inside = take_placeholders(question, len(found), where, required=marks)
    answer, changes = tidy_answer(answer)
    changes = mended + changes + list(row.get(columns.get("notes")) or ())
    if not question or not answer:
        return out.count(out.dropped, "blank question or answer", where)
    images = []
    for content in found:
        try:
            image = sources.decode(content)
        except ValueError:
            return out.count(out.dropped, "undecodable picture", where)
        if max(image.size) > 200 * min(image.size):         # model.fit() would refuse it later
            return out.count(out.dropped, "picture too thin for Qwen3-VL", where)
        name = hashlib.sha256(sources.read(content)).hexdigest()[:20]
        suffix = image.format.lower().replace("jpeg", "jpg")
        images.append(f"images/{split}/{name}.{suffix}")
        out.pictures[images[-1]], out.sizes[images[-1]] = content, image.size
    record = {"images": images, "question": question, "answer": answer}
    if "id" in columns:
        record["id"] = cell_text(row, columns["id"], where)
    for name in ("cue", "rationale"):
        if columns.get(name) in row and (
                text := cell_text(row, columns[name], where, changes)):
            record[name] = text
    if row.get(columns.get("options")):
        changes += add_options(record, row[columns["options"]], where)
    if inside:
        changes.append("<image> taken out of the middle of the question")
    if misses_choice(row, answer):
        changes.append("answer is not the choice that ground_truth names, kept")
    for change in changes:
        out.count(out.changed, change, where)
    return record


def add_options(record, options, where):
    """Put options into a record, and under its question if not shown there; return changes."""
    if isinstance(options, list) and len(options) <= len(string.ascii_uppercase):
        options = dict(zip(string.ascii_uppercase, options))
    if not isinstance(options, dict) or not all(isinstance(o, str) for o in options.values()):
        raise ValueError(f"{where}: options {str(options)[:60]!r} are no list or object of texts")
    changes = [ESCAPED] * any(mend_escapes(o, where)[1] for o in options.values())
    options = {label: mend_escapes(text, where)[0] for label, text in options.items()}
    if any("<image" in text for text in options.values()):
        raise ValueError(f"{where}: an option holds an <image> mark: {str(options)[:80]!r}; "
                         f"the prompt puts pictures before the question only")
    record["options"] = options
    # The prompt shows the question alone, so what is not written there nobody sees. With its
    # label, since the option 1 would be found in "an angle of 120 degrees".
    if not all(re.search(rf"\b{re.escape(label)}\s*[).:]\s*{re.escape(text.strip())}",
                         record["question"]) for label, text in options.items()):
        record["question"] += "".join(f"\n{label}. {text}" for label, text in options.items())
        changes.append("options written under the question")
    if record["answer"] not in (*options, *options.values()):
        changes.append("answer is neither an option's label nor its text, kept")
    return changes


def misses_choice(row, answer):
    """Whether Geometry3K's letter and choices, where a copy has them, contradict its answer."""
    choices, letter = row.get("choices"), row.get("ground_truth")
    if not choices or not isinstance(letter, str) or letter not in "ABCDEFGH"[:len(choices)]:
        return False
    return tidy_answer(str(choices["ABCDEFGH".index(letter)]))[0] != answer


def collect(rows, name, split, columns, folders, marks=True):
    """Turn (where, row) pairs into a Split; the header says what becomes of a doubtful row.

    A row may be a text, the reason why it is left out.

    columns: field of the record -> column of the row. question, answer and images ("": there are
    none) must be there, and id if it is named; options, cue and rationale may be.
    marks: each picture needs its <image>. Raises ValueError or FileNotFoundError with the place.
    """
    out, first_seen = Split(), {}
    for number, (where, row) in enumerate(tqdm(rows, desc=f"{split} rows", disable=None)):
        if isinstance(row, str):                # a converter says why there is no row here
            out.count(out.dropped, row, where)
            continue
        record = to_record(row, where, columns, folders, marks, split, out)
        if record is not None:
            record = {"id": f"{name}-{split}-{number}", **record, "source": name}
            earlier = first_seen.setdefault(record["id"], where)
            if earlier != where:
                raise ValueError(f"{where}: id {record['id']!r} stands at {earlier} already")
            out.records.append(record)
    if split == "train":
        leave_out_repeats(out)
    if not out.records:
        raise ValueError(f"no usable rows in the {split} split; left out: {dict(out.dropped)}")
    return out


def leave_out_repeats(out):
    """Keep one of equal rows, and none of those that answer one question in two ways."""
    answers, seen, kept = defaultdict(set), set(), []
    for record in out.records:
        answers[record["question"], tuple(record["images"])].add(record["answer"])
    for record in out.records:
        asked = record["question"], tuple(record["images"])
        if len(answers[asked]) > 1:
            out.count(out.dropped, "same question and pictures, another answer", record["id"])
        elif asked in seen:
            out.count(out.dropped, "repeat of an earlier row", record["id"])
        else:
            seen.add(asked)
            kept.append(record)
    out.records = kept


def leave_out_cueless(out):
    """Keep what has a cue: `distill.py --privilege cue` refuses a file with one record that has
    none."""
    for record in out.records:
        if "cue" not in record:
            out.count(out.dropped, "no cue", record["id"])
    out.records = [record for record in out.records if "cue" in record]


def save(splits, out, name, limit, model):
    """Write {split: Split} below `out`, pictures before records, and print the summary."""
    for split in splits:
        check_replaceable(out / f"{split}.jsonl", name)
    for split, part in splits.items():
        rows = len(part.records) + part.dropped.total()
        if rows != CARD.get(name, {}).get(split, rows):
            print(f"note: {rows} {split} rows, the data card says {CARD[name][split]}")
        kept = even_sample(part.records, limit)
        if len(kept) < len(part.records):
            part.dropped["beyond --limit"] = len(part.records) - len(kept)
        part.records = kept
        used = {picture: None for record in kept for picture in record["images"]}
        for picture in tqdm(used, desc=f"{split} pictures", disable=None):
            content = part.pictures[picture]
            place(out / picture, sources.read(content), f"a picture of {name}")
        part.sizes = Counter(part.sizes[picture] for picture in used)
    for split, part in splits.items():
        write_jsonl(out / f"{split}.jsonl", part.records)
    for split, part in splits.items():
        report(out / f"{split}.jsonl", part.records, part.sizes, part.dropped, part.changed,
               part.first, model)


# ---- one function per data set -----------------------------------------------------------------

def easy_vqa(source, out, limit, model=None):
    """Convert easy-VQA from folder `source` (None: the installed package) into folder `out`."""
    # 1) Find and read everything, so that a damaged source is refused before a byte is written.
    root = find_easy_vqa(source)
    splits = {}
    for split in EASY_VQA_SPLITS:
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
        report(out / f"{split}.jsonl", records, sizes[split], dropped, model=model)


def nlvr(source, out, limit=None, model=None):
    """Convert NLVR. A record a picture: an example has six, alike but for the boxes' order."""
    splits = {split: collect(boxes.rows(path, images), "nlvr", split, OWN, [images], marks=False)
              for split, (path, images) in boxes.find(source).items()}
    save(splits, out, "nlvr", limit, model)


def tabmwp(source, out, limit=None, model=None):
    """Convert TabMWP; its licence, CC BY-NC-SA, is that of the records too."""
    splits = {split: collect(tables.rows(path, images), "tabmwp", split, OWN, [images],
                             marks=False)
              for split, (path, images) in tables.find(source).items()}
    save(splits, out, "tabmwp", limit, model)


def hub(name, source, out, limit, model, only, annotate=None):
    """Convert a data set in Geometry3K's columns from `source`; each split into its own file.

    annotate: (where, row) pairs -> the same with a cue and notes in the rows; None: no cues.
    """
    files, others = find_splits(source, only)
    splits = {}
    for split, paths in files.items():
        rows = itertools.chain.from_iterable(map(sources.rows, paths))
        columns = HUB | ({"cue": "cue", "notes": "notes"} if annotate else {})
        splits[split] = collect(annotate(rows) if annotate else rows, name, split, columns,
                                [paths[0].parent])
        if annotate and split == "train":
            leave_out_cueless(splits[split])
    save(splits, out, name, limit, model)
    print(f"{name}: from {', '.join(str(path) for paths in files.values() for path in paths)}")
    if others:
        print(f"  not read  {', '.join(path.name for path in others)}")


def geometry3k(source, out, limit=None, model=None, split=None, logic_forms=None):
    """Convert Geometry3K. Train on train.jsonl alone: MathVista and MathVerse hold some of it.

    In its own layout, or the hub's columns; those have cues only with `logic_forms` and an id.
    """
    forms = geometry.read_forms(logic_forms) if logic_forms else None
    folders = geometry.find(source) if source.is_dir() else {}
    if not folders:
        annotate = forms and functools.partial(add_forms, forms)
        return hub("geometry3k", source, out, limit, model, split, annotate)
    splits = {}
    for name, problems in folders.items():
        if split in (None, name):
            splits[name] = collect(geometry.rows(problems, forms), "geometry3k", name, OWN,
                                   sorted({folder.parent for folder in problems}), marks=False)
            if name == "train":
                leave_out_cueless(splits[name])
    save(splits, out, "geometry3k", limit, model)


def add_forms(forms, rows):
    """Give rows of the hub's columns their cue, by their `id`; refuse ids that do not fit."""
    read = strange = 0
    for where, row in rows:
        if "id" not in row:
            raise ValueError(f"{where}: no field 'id', so --logic-forms cannot be told apart: "
                             f"take a copy that has it, or Geometry3K's own layout")
        form, question = forms.get(str(row["id"])), str(row.get("problem"))
        read += 1
        strange += form is None or not geometry.belongs(form, question)
        # A few questions were reworded; many strange ones are another numbering.
        if strange > 3 and strange > 0.1 * read:
            raise ValueError(f"{where}: {strange} of {read} questions are not what --logic-forms "
                             f"holds under their id: another numbering?")
        fits = form is not None and geometry.belongs(form, question)
        yield where, row | geometry.with_cue(form if fits else None, question, where)


def vision_r1(source, out, limit=None, model=None, split=None):
    """Convert Vision-R1-rl: mixed sources, options within the question, answers often letters."""
    hub("vision-r1", source, out, limit, model, split)


def jsonl(source, out, limit=None, model=None, split="train", name=None, pictures=None, **given):
    """Convert anybody's file of rows; `given` names its fields, as in question_field="q".

    Fields are called as in a record unless given; images_field="" says that there are no pictures.
    Options not in the question are written under it. An <image> mark is taken out where there is
    one, and then there must be one a picture. Raises ValueError for a name that no row has.
    """
    given = {key.removesuffix("_field"): column for key, column in given.items()
             if column is not None}
    needed = {key: key for key in ("question", "answer", "images", "cue", "rationale", "options")}
    if (out / f"{split}.jsonl").resolve() == source.resolve():
        raise ValueError(f"{source} would be overwritten: choose another --out")
    part = collect(sources.rows(source), name or source.stem, split, needed | given,
                   [pictures or source.parent], marks=False)
    for key in given:
        if given[key] and key != "id" and not any(key in record for record in part.records):
            raise ValueError(f"{source}: no row has anything in the field {given[key]!r} ({key})")
    save({split: part}, out, name or source.stem, limit, model)


def positive(text):
    """An argparse type: a whole number from 1 up."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return int(text)


def add_command(commands, name, run, help, source_help, required=True):
    """Add the sub-command of a converter with the options that all of them have; return it."""
    command = commands.add_parser(name, allow_abbrev=False, help=help)
    command.add_argument("--source", type=Path, required=required, metavar="PATH",
                         help=f"{source_help}; or hub:OWNER/NAME, which is downloaded")
    command.add_argument("--out", type=Path, required=True, help="folder to write to")
    command.add_argument("--limit", type=positive, metavar="N",
                         help="rows per split, the answers' mix kept (default: all)")
    command.add_argument("--model", type=Path, metavar="FOLDER",
                         help="a Qwen3-VL folder: print the longest prompt in its tokens too")
    command.set_defaults(run=run)
    return command


def main(argv=None):
    """Read the command line and call the function it names with its options as keywords."""
    parser = argparse.ArgumentParser(description="Turn a public data set into records.",
                                     allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_command(commands, "easy-vqa", easy_vqa, "one shape a picture, short questions, 13 answers",
                "the package's folder or its data (default: the installed package)", False)
    for name, run, text in (("geometry3k", geometry3k, "2,101 geometry problems to train on"),
                            ("vision-r1", vision_r1, "the paper's training set")):
        command = add_command(commands, name, run, text, "folder with the splits, or one file")
        command.add_argument("--split", choices=SPLITS, help="what --source, a file, holds "
                             "(default: as its name says)")
        if name == "geometry3k":
            command.add_argument("--logic-forms", type=Path, metavar="ZIP", help="logic_forms.zip "
                                 "or its folder: cues for rows that have none of their own")
    add_command(commands, "nlvr", nlvr, "sentences about three boxes of shapes, with cues",
                "a clone of the repository, or its folder nlvr/")
    add_command(commands, "tabmwp", tabmwp, "word problems about tables, with cues",
                "PromptPG's data/tabmwp: problems_*.json beside tables/")
    command = add_command(commands, "jsonl", jsonl, "anybody's file, a row a question",
                          "the file: JSONL, or one that sources.py reads")
    command.add_argument("--split", choices=SPLITS, default="train", help="(default: train)")
    command.add_argument("--name", help="of the data set (default: as the file)")
    command.add_argument("--pictures", type=Path, metavar="DIR",
                         help="folder that picture paths start from (default: the file's)")
    for key in ("question", "answer", "images", "id", "options", "cue", "rationale"):
        command.add_argument(f"--{key}-field", metavar="NAME", help=f"field with the {key} "
                             f"(default: {'the row number' if key == 'id' else key})")
    command = commands.add_parser("contamination", allow_abbrev=False,
                                  help="find a benchmark's pictures and questions in records")
    contamination.add_arguments(command)
    command.set_defaults(run=contamination.check)

    options = vars(parser.parse_args(argv))
    run = options.pop("run")
    try:
        if str(options.get("source")).startswith("hub:"):
            options["source"] = sources.download(str(options["source"]).removeprefix("hub:"))
        run(**options)
    except (OSError, ValueError, ImportError) as error:   # what a user can mend needs no traceback
        known = getattr(error, "filename", None)
        sys.exit(f"error: {error.filename}: {error.strerror}" if known else f"error: {error}")


if __name__ == "__main__":
    main()
