"""Rows and pictures out of the files in which data sets come: parquet, JSON, JSONL, TSV.

Idea. Whoever reads somebody's data needs two things of every file, whatever it is about: its rows,
each with the place where it stands, so that a complaint can name it; and the pictures in a cell,
which come in half a dozen disguises. Nothing here knows a data set, and nothing is converted.

In and out.
    for where, row in rows(path):               where: "FILE: row 17 (counting from 0)"
        for content in contents(row["images"], [path.parent], where):
            image = decode(content)             a PIL image whose pixels are there
What a file may be:
    .parquet    Hugging Face's layout, a picture is {"bytes": .., "path": ..}; needs pyarrow
    .jsonl      one object a line
    .json       a list of objects, or an object of objects, whose keys become the "id" they lack
    .tsv        VLMEvalKit's: a header, quoted cells over many lines, every cell text
What a picture cell may hold: bytes, a path, base64 text, {"bytes", "path"}, a list of those, or in
a TSV such a list written out as text. An empty cell is no picture.

The one rule. A path is looked for in the folders given and nowhere else: a file from the net must
not be able to name /etc/passwd, or ../../keys.png, as a picture.

Run, copy. No command line. This file alone; standard library and pillow. download() alone imports
huggingface_hub, which comes with transformers, and keeps to the hub's own cache: it shows bars,
and a download that was cut goes on where it stopped.

Left out, on purpose. No eval, not even a literal one: a list of base64 texts has no quotes or
commas inside its items, so a pattern reads it. No zip files: unpack them, then the paths fit. No
guessing of types: pandas makes the option text "None" a missing value and 01 the number 1.0.
"""
import base64
import csv
import io
import json
import os
import re
from pathlib import Path

from PIL import Image

SUFFIXES = (".parquet", ".jsonl", ".json", ".tsv")
BATCH = 64              # parquet rows in memory at once: pictures are big
LONGEST_PATH = 1000     # a longer text in a picture cell can only be base64


# ---- rows --------------------------------------------------------------------------------------

def rows(path):
    """Yield (where, row) for each row of a file, `row` a dict.

    Raises ValueError with the place for what cannot be read, ImportError for parquet without
    pyarrow. Parquet and JSONL are read as they are asked for, so a long file needs little memory.
    """
    readers = dict(zip(SUFFIXES, (_parquet, _jsonl, _json, _tsv)))
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path}: is no {', '.join(SUFFIXES)} file")
    for where, row in readers[path.suffix.lower()](path):
        if not isinstance(row, dict):
            raise ValueError(f"{where}: {str(row)[:80]!r} is no object with named fields")
        yield where, row


def load_json(path):
    """Parse a JSON file; a ValueError says in which file, line and column it breaks."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8 text") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}:{error.colno}: not JSON ({error.msg}), "
                         f"was the file cut short or edited?") from error


def parse(text, where):
    """Parse the JSON of one line; a ValueError begins with `where`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg})") from error


def _place(path, number):
    return f"{path}: row {number} (counting from 0)"


def _parquet(path):
    try:
        import pyarrow.parquet
    except ImportError:
        raise ImportError(f"{path} is a parquet file, and reading those takes pyarrow: "
                          f"pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=BATCH):
                for row in batch.to_pylist():
                    yield _place(path, number), row
                    number += 1
    except pyarrow.ArrowException as error:     # a git clone without LFS leaves a text
        raise ValueError(f"{path}: not a whole parquet file ({str(error)[:200]}); "
                         f"was it cut short, or is it a Git LFS pointer?") from error


def _jsonl(path):
    with path.open(encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{path}:{number}", parse(line, f"{path}:{number}")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text ({error.reason})") from error


def _json(path):
    content = load_json(path)
    if isinstance(content, dict):
        # MathVista's testmini.json and DynaMath's dataset.json: the key is the item's name.
        content = [{"id": key, **row} if isinstance(row, dict) else row
                   for key, row in content.items()]
    if not isinstance(content, list):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a list of rows")
    for number, row in enumerate(content):
        yield _place(path, number), row


def _tsv(path):
    # By default the csv module stops at 131,072 characters, less than one picture. The limit
    # belongs to the whole process, so it is put back. The largest long of Windows has 31 bits.
    limit = csv.field_size_limit(2**31 - 1)
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            for number, row in enumerate(csv.DictReader(lines, delimiter="\t", strict=True)):
                if None in row or None in row.values():     # how DictReader marks a wrong length
                    raise ValueError(f"{_place(path, number)}: not as many cells as the header")
                yield _place(path, number), row
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a whole TSV ({error})") from error
    finally:
        csv.field_size_limit(limit)


# ---- pictures ----------------------------------------------------------------------------------

# 'a.png' or "a.png", then more of them: a list of texts as Python prints it.
_LISTED = re.compile(r"""\s*(?:'([^']*)'|"([^"]*)")\s*(?:,|$)""")


def contents(cell, folders, where):
    """The pictures in a cell, in order, each as bytes or as the Path of an existing file.

    Paths are relative to one of `folders`, tried in turn. Raises FileNotFoundError for a path that
    is in none of them, ValueError for one that leaves them and for a cell of an unknown kind.
    """
    if cell is None or isinstance(cell, (str, bytes, list, tuple)) and not len(cell):
        return []
    if isinstance(cell, (list, tuple)):
        return [content for part in cell for content in contents(part, folders, where)]
    if isinstance(cell, bytes):
        return [cell]
    if isinstance(cell, dict) and ("bytes" in cell or "path" in cell):
        # The path beside the bytes is where the picture once was, on somebody else's disk.
        return contents(cell.get("bytes") or cell.get("path"), folders, where)
    if not isinstance(cell, str):
        raise ValueError(f"{where}: no picture can be made of {str(cell)[:80]!r}")
    if cell.startswith("[") and cell.endswith("]"):
        if _LISTED.sub("", cell[1:-1]).strip():
            raise ValueError(f"{where}: {cell[:60]!r} is no list of quoted texts")
        parts = [one or other for one, other in _LISTED.findall(cell[1:-1])]
        return contents(parts, folders, where)
    if len(cell) <= LONGEST_PATH and re.search(r"\.\w{2,5}$", cell):
        return [_file(cell, folders, where)]
    try:
        return [base64.b64decode("".join(cell.rpartition("base64,")[2].split()), validate=True)]
    except ValueError as error:
        raise ValueError(f"{where}: {cell[:60]!r} is neither a path with a suffix nor base64 "
                         f"({error})") from error


def _file(name, folders, where):
    for folder in folders:
        path, home = (folder / name).resolve(), folder.resolve()
        # In the hub's cache every file is a link, snapshots/COMMIT/.. -> blobs/..: of one set.
        links = [p.parent / "blobs" for p in home.parents if p.name == "snapshots"]
        written = Path(os.path.normpath(home / name)).is_relative_to(home)
        if not path.is_relative_to(home) and not (
                written and any(path.is_relative_to(blobs) for blobs in links)):
            raise ValueError(f"{where}: picture {name!r} lies outside {folder}")
        if path.is_file():
            return path
    raise FileNotFoundError(f"{where}: no picture {name!r} in {' or '.join(map(str, folders))}; "
                            f"is the copy complete?")


def read(content):
    """The bytes of a picture that `contents` found."""
    return content if isinstance(content, bytes) else content.read_bytes()


def decode(content):
    """Bytes or Path -> PIL image, decoded to the last pixel; ValueError if that cannot be."""
    try:
        image = Image.open(io.BytesIO(read(content)))
        image.load()                            # open() alone reads only the header
    except Exception as error:                  # each of Pillow's readers raises its own kinds
        raise ValueError(f"not a readable picture ({error})") from error
    return image


# ---- where a data set is -----------------------------------------------------------------------

# A file that gives a published layout away, and the command of prepare.py that reads it. Where a
# parquet file is from cannot be seen from its name: hub data sets in these columns share it.
LAYOUTS = (("train/questions.json", "easy-vqa"), ("train/train.json", "nlvr"),
           ("dev/dev.json", "nlvr"), ("test/test.json", "nlvr"), ("problems_*.json", "tabmwp"),
           ("*/img_diagram.png", "geometry3k"), ("*/*/img_diagram.png", "geometry3k"),
           ("*.parquet", "geometry3k (or vision-r1)"))


def known_raw(folder):
    """The prepare command for a folder with a known set's raw files, None for any other folder.

    Looked for in `folder` and in data/, nlvr/ and data/tabmwp/ below it, where clones keep them.
    """
    folder = Path(folder)
    for below in ("", "data", "nlvr", "data/tabmwp", "data/geometry3k"):
        for pattern, name in LAYOUTS:
            if next((folder / below).glob(pattern), None) is not None:
                return f"python data/prepare.py {name} --source {folder} --out FOLDER"
    return None


def download(name):
    """Fetch the hub's data set `name` (OWNER/NAME) and return the folder that holds it.

    Whatever goes wrong is a ValueError of one line that says what to do.
    """
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        raise ImportError("hub: needs huggingface_hub: pip install huggingface_hub") from None
    page = f"https://huggingface.co/datasets/{name}"
    try:
        return Path(snapshot_download(name, repo_type="dataset"))
    except errors.HFValidationError as error:
        raise ValueError(f"hub:{name} is no OWNER/NAME of the hub ({error})") from None
    except Exception as failure:            # each of its HTTP libraries has its own kinds
        # "Not in the cache" is what it says last; why it looked there, its cause, is what counts.
        local = isinstance(failure, errors.LocalEntryNotFoundError)
        error = failure.__cause__ if local and failure.__cause__ else failure
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):        # before RepositoryNotFound, its parent
        advice = f"is gated: accept its terms at {page}, then run `hf auth login`"
    elif isinstance(error, errors.RepositoryNotFoundError):
        advice = (f"is not there, or is private: check the name at {page}; if it is private, run "
                  f"`hf auth login`")
    elif isinstance(error, errors.OfflineModeIsEnabled):
        advice = "is not in the cache, and HF_HUB_OFFLINE forbids to fetch it: unset that"
    elif status in (401, 403):
        advice = f"status {status}: your token may not read it; see {page}, run `hf auth login`"
    elif status:
        advice = f"status {status}; try again later, what is there already is kept"
    else:
        advice = (f"the hub cannot be reached ({type(error).__name__}): check the connection and "
                  f"run it again, it goes on; or get {page} elsewhere and name the folder")
    raise ValueError(f"hub:{name} {advice}") from error
