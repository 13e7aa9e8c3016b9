"""benchmarks/readers.py - read the paper's seven benchmarks from the files their authors publish.

The idea.  Every benchmark has its own layout, and a quiet misreading costs more than most training
runs gain. Here one plain function per benchmark turns rows into items, and everything doubtful is
refused or counted before a model is loaded. Metrics are in scores.py, grading in grade.py.

In:  load(name, source): the official release (parquet, or json with a picture folder) or the TSV
     of VLMEvalKit, whichever `source`, a file or a folder, holds. Both give the same ids and golds.
Out: one dict a question, a superset of our record, so processor.prompt(item) takes it as it is:
     id, question   the whole prompt text; pictures come first, so MMMU's <image k> stays as text
     group          what belongs together: DynaMath's seed, We-Math's ID, the video
     images         paths, or Pictures (encoded bytes in memory, decoded when opened)
     video, fps     Video-MME only: a list of frame files and their rate, or a video file's path
     answer         the gold, or a list of golds of which any one is right
     options        {label: text} in order, or None; the gold of a "choice" is always the label
     answer_kind, precision, tolerance    what grade() takes as kind=, precision=, tolerance=
     meta           subject, version, duration and so on, for the tables

The one equation (frame i of n out of a video's N, as Qwen samples):   round(i (N - 1) / (n - 1))

Use it alone: standard library and pillow; pyarrow only for parquet files, av only for video files.
    items = load("mathvista", "data/MathVista"); print(describe(items))

What differs from the benchmarks' own readers, and why (facts: card and code of each, read in 2026):
1) Nothing from a file is evaluated. VLMEvalKit calls eval on option, choice and picture cells.
2) Cells are text: pandas turns the options None, N/A and 01 into missing, missing and 1.0.
3) Rows without picture are an error, not dropped, and paths may not leave the source folder.
4) Instructions are in our words, and ask what the benchmark asks: a letter, JSON, decimals.
   MathVista's query and MathVerse's question are the file's own, the latter without instruction,
   as VLMEvalKit sends it; query_wo and query_cot are not used.
5) A gold is turned into a label by equality only: never by the nearest option, never at random.
Left out: downloads, unpacking zips, subtitles, MathVerse's text-only rows, pictures between words.
Not verified, as no real TSV could be had: that the TSV's index is MathVista's pid and MathVerse's
sample_index, and that the TSVs of MMMU (within a subject) and Video-MME keep the official order.
Golds are unaffected.
"""
from __future__ import annotations

import ast
import base64
import csv
import io
import json
import os
import re
import string
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

# Name -> rows of the official file, None where nobody has published it (Vision-R1: about 820).
ROWS = {"vision-r1": None, "dynamath": 5010, "mathvista": 1000, "wemath": 1740, "mathverse": 3940,
        "mmmu": 900, "video-mme": 2700}
# Name -> where its files are below the source folder; the first pattern that matches is taken, and
# official files go before TSVs. No wildcard after "testmini": testmini_text_only is another set.
TESTMINI = ["data/testmini-*.parquet", "testmini-*.parquet", "data/testmini.json", "testmini.json"]
FILES = {
    "vision-r1": ["data/test*.parquet", "*test*.parquet", "test.json*", "Vision*R1*.tsv"],
    "dynamath": ["data/sample*.parquet", "sample*.parquet", "trial*/dataset.json",
                 "10trials/trial*/dataset.json", "samples and result/10trials/trial*/dataset.json",
                 "DynaMath.tsv", "DynaMath_local.tsv"],
    "mathvista": [*TESTMINI, "MathVista_MINI.tsv", "MathVista_MINI_local.tsv"],
    "wemath": [*TESTMINI, "WeMath.tsv", "WeMath_local.tsv"],
    "mathverse": ["testmini.parquet", *TESTMINI, "MathVerse_MINIV.tsv",
                  "MathVerse_MINIV_local.tsv"],
    "mmmu": ["[A-Z]*/validation-*.parquet", "data/validation-*.parquet", "validation-*.parquet",
             "validation.json*", "MMMU_DEV_VAL.tsv", "MMMU_DEV_VAL_local.tsv"],
    "video-mme": ["videomme/test-*.parquet", "test-*.parquet", "test.json*", "Video-MME.tsv"]}
MAX_LITERAL = 20_000    # characters of a list or dict literal; the longest real ones have hundreds
REFERENCE = 64          # a picture cell up to this long names another row (VLMEvalKit image_base)
LABELS = string.ascii_uppercase
VIDEO_FRAMES = 64       # "Video-MME_64frame" in the paper's table 4
VIDEOS = (".mp4", ".MP4", ".mkv", ".webm", ".mov", ".avi")
PICTURES = {".jpg", ".jpeg", ".png", ".webp"}


def load(name: str, source, check_rows: bool = True) -> list[dict]:
    """The items of a benchmark (see the header), in file order.

    check_rows=False takes a file of another length, and keeps rows without picture or with a gold
    that no answer can match, for describe() to count. Duplicate ids, pictures that are named but
    absent or unreadable, and paths out of the folder are errors in any case. Raises ValueError or
    FileNotFoundError with file, row and both numbers; ImportError if a parquet file needs pyarrow.
    """
    if name not in ROWS:
        raise ValueError(f"no benchmark {name!r}; there are {', '.join(ROWS)}")
    reader = Source(name, *find(name, source))
    build = {"vision-r1": _vision_r1, "dynamath": _dynamath, "mathvista": _mathvista,
             "wemath": _wemath, "mathverse": _mathverse, "mmmu": _mmmu, "video-mme": _video_mme}
    try:
        items = list(build[name](reader))
    except KeyError as error:
        raise ValueError(f"{reader.where}: no column {error}, is this {name}?") from None
    except (ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{reader.where}: {error}") from None
    complaints = [f"{len(places)} {reason} ({'; '.join(places[:3])})"
                  for (reason, always), places in reader.problems.items() if always or check_rows]
    # An id twice is never fine: a resumed run knows by the id what it has answered.
    twice = [f"{key} x {n}" for key, n in Counter(item["id"] for item in items).items() if n > 1]
    if twice:
        complaints.append(f"{len(twice)} ids more than once ({'; '.join(twice[:3])})")
    if not items or check_rows and ROWS[name] not in (None, len(items)):
        complaints.append(f"{len(items)} rows instead of {ROWS[name]}: is it cut short, or another "
                          "split? check_rows=False takes it as it is")
    if complaints:
        raise ValueError(f"{name} in {source}: " + "\n  ".join(complaints))
    return items


def describe(items: list[dict], readable=None) -> dict:
    """What was loaded, to keep beside the scores: rows, groups, kinds, forms of the golds.

    readable(item) -> bool, for instance whether grading the gold against itself says "right", also
    gives the number and ids of the unparsed golds: questions that no answer can get right.
    """
    golds = [gold for item in items for gold in
             ([item["answer"]] if isinstance(item["answer"], str) else item["answer"][:1])]
    out = {"rows": len(items), "groups": len({item["group"] for item in items}),
           "kinds": dict(Counter(item["answer_kind"] for item in items)),
           "golds": dict(Counter(map(gold_form, golds))),
           "without_picture": sum(not (item["images"] or item.get("video")) for item in items),
           "longest_question": max((len(item["question"]) for item in items), default=0)}
    if readable:
        out["unparsed_golds"] = [item["id"] for item in items if not readable(item)]
    return out


def gold_form(gold: str) -> str:
    r"""letter, number, latex or other: the first look at golds nobody has described.

    >>> [gold_form(x) for x in ("C, D", "1,000.5", r"2\sqrt{3}", "N 34° W")]
    ['letter', 'number', 'latex', 'other']
    """
    if re.fullmatch(r"[A-J](, [A-J])*", gold):
        return "letter"
    if re.fullmatch(r"[-−+]?[\d,]*\.?\d+", gold):
        return "number"
    return "latex" if re.search(r"[\\$^_]", gold) else "other"


# ---------------------------------------------------------------------------- files to rows

def find(name: str, source) -> tuple[Path, list[Path]]:
    """(root, files): `source` itself if it is a file, else what FILES names in it or one below.

    One below: a folder called like the benchmark, so that one folder can hold all seven.
    """
    source = Path(source)
    if source.is_file():
        return source.parent, [source]
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such file or folder")
    short = name.replace("-", "")
    named = [folder for folder in sorted(source.iterdir()) if folder.is_dir() and
             re.sub(r"[\W_]", "", folder.name.lower()).startswith(short)]
    for folder in (source, *named):
        for pattern in FILES[name]:
            if files := sorted(folder.glob(pattern), key=_natural):
                return folder, files
    raise FileNotFoundError(f"{source}: no file of {name}; looked for {', '.join(FILES[name])}. "
                            "Is an archive still packed? A file's own path works too")


class Picture(io.BytesIO):
    """An encoded picture in memory, for Image.open, as often as wanted. Prints as its origin."""

    def __init__(self, content: bytes, origin: str):
        super().__init__(content)
        self.origin = origin

    def __repr__(self):
        return self.origin


@dataclass
class Source:
    """The files of one benchmark while they are read: where we are, and what was wrong."""
    name: str
    root: Path
    files: list[Path]
    where: str = ""                         # "FILE row N", for messages
    file: Path | None = None
    problems: dict = field(default_factory=lambda: defaultdict(list))   # (reason, always) -> places

    @property
    def tsv(self) -> bool:
        return self.file.suffix.lower() == ".tsv"

    def problem(self, reason: str, detail: str = "", always: bool = False) -> None:
        """Note what is wrong here and go on, so that load() can say how many rows have it."""
        self.problems[reason, always].append(f"{self.where}{': ' if detail else ''}{detail}")

    def rows(self):
        """Rows of all files as dicts. "@key" is the name of a row in a JSON object of rows."""
        read = {".tsv": self._tsv, ".parquet": _parquet, ".json": _json, ".jsonl": _json}
        for self.file in self.files:
            self.where = str(self.file)
            if self.file.suffix.lower() not in read:
                raise ValueError("neither .tsv nor .parquet, .json or .jsonl")
            for number, row in enumerate(read[self.file.suffix.lower()](self.file), 1):
                self.where = f"{self.file.name} row {number}"
                yield row

    def _tsv(self, path: Path) -> list[dict]:
        """Rows of a VLMEvalKit TSV; "image" becomes a list of Pictures or of paths."""
        rows, known, waiting = [], {}, []
        for number, row in enumerate(_cells(path), 1):
            self.where = f"{path.name} row {number}"
            cell, paths = row.get("image", "").strip(), row.get("image_path", "").strip()
            if len(cell) > REFERENCE:
                # No literal_eval for a list of pictures: base64 has neither quotes nor commas.
                parts = [part.strip(" '\"\n") for part in cell.strip("[]").split(",")]
                row["image"] = known[row["index"]] = [x for p in parts for x in self._decode(p)]
            elif cell:
                waiting.append((row, cell, self.where))
            else:
                row["image"] = literal(paths) if paths.startswith("[") else [paths] * bool(paths)
            rows.append(row)
            self.where = path.name          # for what _cells raises about the next one
        for row, index, where in waiting:
            if index not in known:          # nor may it name a row that names a row
                self.where = where
                raise ValueError(f"its picture is that of row {index!r}, which has none of its own")
            row["image"] = known[index]
        return rows

    def _decode(self, cell: str) -> list:
        """One base64 picture, strictly: b64decode by itself skips what is no base64."""
        try:
            return self.pictures(base64.b64decode("".join(cell.split()), validate=True))
        except ValueError as error:
            self.problem("unreadable pictures", str(error), always=True)
            return []

    def pictures(self, value) -> list:
        """Whatever a cell holds (bytes, path, {"bytes", "path"}, a list of them) as `images`."""
        if isinstance(value, (list, tuple)):
            return [picture for part in value for picture in self.pictures(part)]
        if isinstance(value, dict):                             # Hugging Face's Image feature
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            value = Picture(value, f"picture of {self.where}")
        elif isinstance(value, Picture):                        # looked at already
            return [value]
        else:
            value = self.path(text(value)) if text(value) else None
        if value is None:
            return []
        try:                                # the header only; a cut tail shows when it is decoded
            with Image.open(value):
                pass
        except Exception as error:          # Pillow's readers raise many kinds
            self.problem("unreadable pictures", str(error), always=True)
            return []
        return [value]

    def path(self, name: str) -> str | None:
        """Absolute path of a file that a row names, tried where archives are usually unpacked."""
        stem = self.file.stem.removesuffix("_local")
        for base in (self.file.parent, self.root, self.file.parent / stem, self.root / stem,
                     self.file.parent / "images", self.root / "images",
                     self.root / "images" / stem, self.root / "images" / self.name.upper()):
            target = self.inside(base / name)
            if target and target.is_file():
                return str(target)
        self.problem("files missing", name[:200], always=True)
        return None

    def inside(self, path: Path) -> Path | None:
        """The absolute path if something is there. What a data file names must lie beside it, by
        its spelling: a link there is its owner's, and snapshots of the hub are all links."""
        target = Path(os.path.abspath(path))
        if not target.is_relative_to(os.path.abspath(self.root)):
            raise ValueError(f"{str(path)[:200]} lies outside the source folder {self.root}")
        return target if os.path.exists(target) else None       # False, too, for a name too long

    def video(self, name: str, named: str = "") -> dict:
        """{"video": frame files, "fps": rate} from frames/NAME/, else {"video": a video file}."""
        folder = self.inside(self.root / "frames" / name)
        if folder and folder.is_dir():
            frames = [str(p) for p in sorted(folder.iterdir(), key=_natural)
                      if p.suffix.lower() in PICTURES]
            rates = [float(p.read_text()) for p in (folder / "fps.txt", folder.parent / "fps.txt")
                     if p.is_file()] or [0]
            if not frames or not 0 < rates[0] < 1000:   # without one, times would be invented
                self.problem("frame folders without pictures, or without the rate they were cut at "
                             "(one number in frames/fps.txt)", str(folder), always=True)
            return {"video": frames, "fps": rates[0]}
        for candidate in (named, *(f"{at}{name}{end}" for at in ("data/", "video/", "videos/", "")
                                   for end in VIDEOS)):
            path = self.inside(self.root / candidate) if candidate else None
            if path and path.is_file():
                return {"video": str(path)}
        self.problem("videos missing, as frames/ID/*.jpg or data/ID.mp4", name[:200], always=True)
        return {"video": None}


def _cells(path: Path):
    """Rows of a TSV, every cell a string."""
    limit = csv.field_size_limit(2**31 - 1)     # the default stops at 131,072: one small picture
    try:
        with open(path, encoding="utf-8-sig", newline="") as lines:
            reader = csv.reader(lines, delimiter="\t", strict=True)
            headings = next(reader, [])
            for cells in reader:
                if len(cells) != len(headings):
                    raise ValueError(f"line {reader.line_num}: {len(cells)} cells under "
                                     f"{len(headings)} headings")
                yield dict(zip(headings, cells))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"not a whole TSV: {error}") from None
    finally:
        csv.field_size_limit(limit)


def _parquet(path: Path):
    """Rows of a parquet file, 64 at a time: pictures sit in the rows as bytes."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ImportError(f"{path} is a parquet file, to read it: pip install pyarrow") from None
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=64):
            yield from batch.to_pylist()


def _json(path: Path):
    """Rows of a JSON list, of a JSON object of rows (MathVista, DynaMath), or of JSON lines."""
    content = path.read_text(encoding="utf-8")
    rows = ([json.loads(line) for line in content.split("\n") if line.strip()]
            if path.suffix.lower() == ".jsonl" else json.loads(content))
    if isinstance(rows, dict):
        rows = [{"@key": key, **row} for key, row in rows.items() if isinstance(row, dict)]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("expected a list, or an object, of rows")
    yield from rows


def _natural(path: Path):
    """trial2 before trial10."""
    return [(int(p), "") if p.isdecimal() else (0, p) for p in re.split(r"(\d+)", str(path))]


# ---------------------------------------------------------------------------- cells to values

def text(value) -> str:
    """A cell as text: nothing for null and NaN, but "None", "nan" and "01" stay what they are."""
    if value is None or value != value:
        return ""
    value = str(value).replace("\r\n", "\n").strip()
    value.encode()              # half a character (a lone surrogate) would end the run when written
    return value


def literal(cell, kind=list):
    """The list (of text) or dict that a cell is, or spells as a Python literal. Never evaluated."""
    if not isinstance(cell, kind):
        spelled = text(cell) or str(kind())
        if len(spelled) > MAX_LITERAL:
            raise ValueError(f"a literal of {len(spelled)} characters, over {MAX_LITERAL}")
        try:
            cell = ast.literal_eval(spelled)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, OverflowError):
            raise ValueError(f"not a {kind.__name__} literal: {spelled[:60]!r}") from None
        if not isinstance(cell, kind):
            raise ValueError(f"a {type(cell).__name__} literal, expected a {kind.__name__}")
    return [text(part) for part in cell] if kind is list else cell


def options_in(question: str) -> dict | None:
    """Options that a question lists itself: lines "A. red", "A: red", else "(A) red (B) blue".

    >>> options_in("Is (A) odd? Choices: (A) yes (B) no")
    {'A': 'yes', 'B': 'no'}
    """
    listed = re.split(r"\bchoices?\s*:", question, flags=re.I)[-1]
    for pattern in (r"(?:^|\n)[ \t]*([A-J])[ \t]*[.:．：)]", r"\(([A-J])\)"):
        marks = list(re.finditer(pattern, listed))
        for start in [i for i, mark in enumerate(marks) if mark[1] == "A"][::-1]:
            if len(found := _in_order(listed, marks[start:])) > 1:
                return found
    return None


def _in_order(listed, marks, gaps=False) -> dict:
    """{label: text up to the next mark}; a mark out of the alphabet's order is part of a text."""
    kept = []
    for mark in marks:
        if not kept or (mark[1] > kept[-1][1] if gaps else ord(mark[1]) == ord(kept[-1][1]) + 1):
            kept.append(mark)
    ends = [mark.start() for mark in kept[1:]] + [len(listed)]
    return {mark[1]: listed[mark.end():end].strip(" ;\n\t") for mark, end in zip(kept, ends)}


def _columns(row) -> dict:
    """Options of a TSV that has a column for each; an empty cell is an option the item lacks.

    Empty is the only way to lack one. Pandas would also take None, N/A and nan for lacking.
    """
    return {label: text(row[label]) for label in LABELS if text(row.get(label))}


def _lines(options) -> str:
    """Options as VLMEvalKit shows them."""
    return "\n".join(f"{label}. {option}" for label, option in options.items())


def _label(gold: str, options=None) -> str | None:
    r"""The label a gold means: `(B)` is B, `C\nD` is "C, D", an option's text is its label."""
    parts = [part.strip("() .") for part in re.split(r"[\n,;]+", gold)]
    if all(part in (options or list(LABELS[:10])) for part in parts):
        return ", ".join(parts)
    return next((label for label, option in (options or {}).items() if option == gold), None)


def _item(reader, key, question, answer, kind, /, group=None, images=(), options=None, video=None,
          precision=None, tolerance=None, **meta) -> dict:
    """One item, with all keys of the header. Counts what no run should start with."""
    if not images and video is None:
        reader.problem("rows without a picture")
    unknown = kind == "choice" and options is not None and set(answer.split(", ")) - set(options)
    if not question or not answer or unknown:
        reader.problem("rows without a question, or with a gold that is no option", repr(answer))
    return {"id": key, "group": group or key, "images": list(images), **(video or {}),
            "question": question, "answer": answer, "options": options, "answer_kind": kind,
            "precision": precision, "tolerance": tolerance, "meta": meta, "source": reader.name}


# ---------------------------------------------------------------------------- rows to items

def _vision_r1(reader):
    """Vision-R1's test split: problem, images, answer. Golds may be wrapped in <answer> tags.

    The files have no ids, so the id is the position, from 0. <image> marks must match pictures.
    """
    for number, row in enumerate(reader.rows()):
        problem = text(row["problem"] if "problem" in row else row["question"])
        gold = re.sub(r"^<answer>(.*)</answer>$", r"\1", text(row["answer"]), flags=re.S).strip()
        images = reader.pictures(row["images"] if "images" in row else row["image"])
        marks = problem.count("<image>")
        if marks not in (0, len(images)):
            reader.problem("rows whose <image> marks and pictures differ",
                           f"{marks} marks, {len(images)} pictures")
        problem = problem.replace("<image>", "").strip()
        options = options_in(problem)
        label = _label(gold, options)
        question = f"{problem}\nReason step by step, then put the final answer in \\boxed{{}}."
        yield _item(reader, f"vision-r1-{number}", question, label or gold,
                    "choice" if label else "auto", images=images,
                    options=options if label else None)


def _dynamath(reader):
    """501 seeds x 10 variants. Names differ between the hub (ground_truth, knowledge_level, one
    parquet file a variant), GitHub (one trialN folder a variant) and the TSV (qid, varid).

    Asked for JSON, graded with the official +-0.001; text golds by value: `(3.000, 1.000)`.
    """
    kinds = {"float": ("number", "a number with three decimals"),
             "multiple choice": ("choice", "the letter of the option alone")}
    text_kind = "math", "as brief as possible, numbers with three decimals"
    items = []
    for row in reader.rows():
        seed = text(row.get("qid", row.get("@key", row.get("id"))))
        named = re.search(r"(?:trial|sample\D*)(\d+)", "/".join(reader.file.parts[-2:]))
        variant = text(row.get("varid")) or (named[1] if named else "")
        if not seed or not variant:
            raise ValueError(f"no seed or no variant, in the row or in the name {reader.file}")
        question, options = text(row["question"]), None
        gold = text(row["ground_truth"] if "ground_truth" in row else row["answer"])
        kind, wanted = kinds.get(text(row["answer_type"]), text_kind)
        if kind == "choice":
            options = options_in(question)
            gold = _label(gold, options) or _label(gold) or gold
            options = options if options and gold in options else None
        prompt = (f'{question}\n\nAnswer with one JSON object that has two keys: "solution", the '
                  f'steps that lead to the answer, and "short answer", {wanted}.')
        items.append(_item(
            reader, seed, prompt, gold, kind, seed, options=options,
            images=reader.pictures(row.get("decoded_image") or row["image"]),
            tolerance=None if kind == "choice" else 0.001, variant=variant,
            subject=" ".join(text(row.get("subject")).split()),     # one has five blanks in a row
            level=text(row.get("knowledge_level", row.get("level")))))
    # GitHub counts seeds from 1; a file that counts from 0 gets the same ids.
    # No seed of the ten trials is 0 otherwise, so a zero says it all.
    shift = any(item["group"] == "0" for item in items)
    for item in items:
        item["group"] = str(int(item["group"]) + 1) if shift else item["group"]
        item["id"] = f"{item['group']}-v{item['meta']['variant']}"
    return items


def _mathvista(reader):
    """testmini. Multiple-choice golds are the option's text; the TSV also has its letter.

    The prompt is the official query: a column, query.json, the TSV's question, or rebuilt here.
    """
    queries = {}
    for path in {file.with_name("query.json") for file in reader.files}:
        queries |= json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    kinds = {"integer": "number", "float": "number", "list": "list"}
    for row in reader.rows():
        pid = text(row.get("pid") or row.get("@key") or row.get("index"))
        form, gold, options = text(row["answer_type"]), text(row["answer"]), None
        kind = kinds.get(form, "text")
        if text(row["question_type"]) == "multi_choice":
            kind, options = "choice", dict(zip(LABELS, literal(row["choices"])))
            # By text: an option may read like another one's label. Of equal texts, the first.
            label = next((label for label, option in options.items() if option == gold), None)
            gold = label or text(row.get("answer_option")) or gold
        query = text(row.get("query")) or text(queries.get(pid)) or text(row["question"])
        precision = None
        if form == "float":     # the column, else what the hint asks for, else the gold's own
            asked = re.search(r"with (one|two) decimal", query)
            precision = (int(float(text(row["precision"]))) if text(row.get("precision"))
                         else {"one": 1, "two": 2}[asked[1]] if asked
                         else len(gold.partition(".")[2]))
        if not query.startswith("Hint:"):
            query = _mathvista_query(query, form, options, text(row.get("unit")), precision)
        about = {**row, **literal(row.get("metadata"), dict)}
        yield _item(reader, pid, query, gold, kind, options=options, precision=precision,
                    images=reader.pictures(row.get("decoded_image") or row["image"]),
                    type="choice" if options else form, task=text(about.get("task")))


def _mathvista_query(question, form, options, unit, precision) -> str:
    """The official query's parts in our words: a hint by type, question, unit, (A) options."""
    wanted = {"integer": "an integer", "float": f"a number with {precision} decimals",
              "list": "a list in brackets"}.get(form, "the answer")
    lines = [f"Hint: Give {'the letter of the right option' if options else wanted} at the end.",
             f"Question: {question}" + (f" (Unit: {unit})" if unit else "")]
    if options:
        lines += ["Choices:", *(f"({label}) {option}" for label, option in options.items())]
    return "\n".join(lines)


def _wemath(reader):
    """525 groups of two or three one-step problems (key 2steps_1 ..) and the composite (.._multi).

    The raw option string is shown, as splitting it is unsafe: `;` and letters occur in the texts.
    """
    for row in reader.rows():
        group, key, hint = text(row["ID"]), text(row["key"]), text(row.get("hint"))
        if reader.tsv:
            options = _columns(row)
            shown, image = _lines(options), row["image"]
        else:
            shown, image = text(row["option"]), row["image_path"]
            marks = re.finditer(r"(?:^|;)\s*([A-H])\s*[.．]\s*(?=[^;\s])", shown)
            options = _in_order(shown, list(marks), gaps=True)
        question = f"Question: {text(row['question'])}\nOptions:\n{shown}"
        yield _item(reader, f"{group}/{key}", (f"Hint: {hint}\n" if hint else "") + question,
                    text(row["answer"]), "choice", group, reader.pictures(image), options, key=key,
                    concept=text(row.get("knowledge concept")))


def _mathverse(reader):
    """788 problems in five versions. Vision Only has no question text: it stands in the picture.

    Options come from question_for_eval, or where that is missing (GitHub) from a sister version.
    """
    items, asked = [], {}
    for row in reader.rows():
        key = text(row.get("sample_index") or row.get("index"))
        group = text(row.get("problem_index")) or key
        question, about = text(row["question"]), literal(row.get("metadata"), dict)
        whole = text(row.get("question_for_eval")) or question
        asked[group] = asked.get(group) or whole        # the first version, Text Dominant, has all
        items.append(_item(
            reader, key, question or "The question is in the picture. Answer it.",
            text(row["answer"]), "math", group, reader.pictures(row["image"]),
            version=text(row["problem_version"]), subject=text(about.get("subject")),
            type=text(row.get("question_type")), question_for_eval=whole))
    for item in items:
        meta = item["meta"]
        meta["question_for_eval"] = meta["question_for_eval"] or asked[item["group"]]
        options = options_in(meta["question_for_eval"])
        # A few golds of multiple-choice problems name no option, `090^\circ T`: they go by value.
        listed = meta["type"] == "multi-choice" or options and meta["type"] != "free-form"
        if listed and (label := _label(item["answer"], options)):
            item |= {"answer": label, "answer_kind": "choice", "options": options}
    return items


def _mmmu(reader):
    """Validation only, though the TSV holds dev too. Open questions may have several golds.

    A TSV may lack the official id; it is then rebuilt as the k-th validation row of its subject.
    """
    seen = Counter()
    for row in reader.rows():
        key, gold = text(row.get("id")), text(row["answer"])
        if (text(row.get("split")) or key.partition("_")[0]) != "validation":
            continue
        subject = (re.sub(r"^validation_|_\d+$", "", key) if key
                   else re.sub(r"\W+", "_", text(row["category"])))
        seen[subject] += 1      # after the filter: dev rows have a numbering of their own
        if reader.tsv:
            options, pictures = _columns(row), row["image"]
        else:
            options = dict(zip(LABELS, literal(row["options"])))
            pictures = [row.get(f"image_{k}") for k in range(1, 8)]
        question, kind = f"Question: {text(row['question'])}", "math"
        if options and text(row.get("question_type")) not in ("open", "short-answer"):
            kind = "choice"
            question += (f"\nOptions:\n{_lines(options)}\n"
                         "Please select the correct answer from the options above.")
        elif isinstance(row["answer"], list) or re.match(r"\[\s*['\"]", gold):
            gold = literal(row["answer"])
        images = reader.pictures(pictures)
        last = max(map(int, re.findall(r"<image (\d)>", question)), default=0)
        if last > len(images):
            reader.problem("rows that refer to a picture they lack",
                           f"image {last} of {len(images)}")
        yield _item(reader, key or f"validation_{subject}_{seen[subject]}", question, gold, kind,
                    images=images, options=options if kind == "choice" else None, subject=subject)


def _video_mme(reader):
    """900 videos, three questions each. The TSV lacks the official id, NUMBER OF VIDEO-1 .. -3; it
    is then counted in file order.
    """
    seen, videos = Counter(), {}
    for row in reader.rows():
        name = text(row["videoID"] if "videoID" in row else row["video"])
        listed = literal(row["options"] if "options" in row else row["candidates"])
        options = {label: re.sub(rf"^{label}[.:)]\s*", "", option)
                   for label, option in zip(LABELS, listed)}
        if name not in videos:
            videos[name] = reader.video(name, text(row.get("video_path")))
        seen[name] += 1
        question = ("Choose the best answer to this question about the video. Reply with its "
                    f"letter only ({', '.join(options)}).\n{text(row['question'])}\n"
                    f"{_lines(options)}\nThe best answer is:")
        key = text(row.get("question_id")) or f"{len(videos):03}-{seen[name]}"
        yield _item(reader, key, question, text(row["answer"]), "choice", name,
                    options=options, video=videos[name],
                    **{k: text(row.get(k)) for k in ("duration", "domain", "task_type")})


# ---------------------------------------------------------------------------- frames of a video

def frame_indices(total: int, count: int) -> list[int]:
    """`count` frames spread over `total`, first and last included; all if there are fewer.

    >>> frame_indices(10, 4)
    [0, 3, 6, 9]
    """
    count = min(total, count)
    return [round(i * (total - 1) / max(1, count - 1)) for i in range(count)]


def with_frames(record: dict, count: int = VIDEO_FRAMES) -> dict:
    """The record with at most `count` frames of its video, chosen or decoded now, not before."""
    if not record.get("video") or record.get("seconds"):
        return record
    pictures, seconds = frames(record, count)
    return {**record, "video": pictures, "seconds": seconds}


def frames(item: dict, count: int) -> tuple[list, list[float]]:
    """(pictures, their times in seconds): `count` frames of an item with a video, evenly spread."""
    if isinstance(item["video"], list):
        chosen = frame_indices(len(item["video"]), count)
        return [item["video"][i] for i in chosen], [i / item["fps"] for i in chosen]
    try:
        import av
    except ImportError:
        raise ImportError(f"{item['video']}: to decode a video, pip install av; or cut it once: "
                          "ffmpeg -i ID.mp4 -vf fps=2 frames/ID/%06d.jpg, and 2 in frames/fps.txt"
                          ) from None
    pictures, times = [], []
    with av.open(item["video"]) as container:
        stream = container.streams.video[0]
        rate, start = float(stream.average_rate), float((stream.start_time or 0) * stream.time_base)
        length = float(stream.duration * stream.time_base if stream.duration else
                       container.duration / 1e6)    # .mkv: the container knows, in microseconds
        for index in frame_indices(stream.frames or round(length * rate), count):
            # Back to the key frame before it, then forward: a film is long, the wanted frames few.
            time, image = index / rate, None
            container.seek(int((time + start) / stream.time_base), stream=stream)
            for image in container.decode(stream):
                if image.time - start >= time - 0.5 / rate:
                    break
            if image is not None:
                pictures.append(image.to_image())
                times.append(image.time - start)
    return pictures, times
