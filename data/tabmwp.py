r"""TabMWP as it is published: word problems about a table, and the table's own text as the cue.

Idea. Each picture of TabMWP (Lu et al. 2023, CC BY-NC-SA 4.0) is a table that was drawn from text,
and the text is published. It says exactly what can be read off the picture, no more: a cue.

In. The layout of https://github.com/lupantech/PromptPG, DIR or DIR/data/tabmwp:
    problems_train.json, problems_dev.json, problems_test.json     {"ID": {"question": .., ..}}
    problems_dev1k.json, problems_test1k.json                      used where the whole is missing
    tables/ID.png
Out. Rows for prepare.py: question (with the unit it is asked in), answer, options, cue, rationale
(the published solution, which ends in the answer: for the privilege of that name only).

    >>> print(cue("Miles driven", "Month | Miles\nApril | 8,428\nMay | "))
    The table is headed "Miles driven". Its rows read:
    Month | Miles
    April | 8,428
    May | (empty).

Run. python data/prepare.py tabmwp --source DIR --out data/tabmwp      Copy: with sources.py.

Left out, on purpose. No guess which rows are headings: half of the tables have none, and the
published column names differ from the picture where there are no headings ("Column 1").
"""
from data import sources

SPLITS = {"train": ("train",), "validation": ("dev", "dev1k"), "test": ("test", "test1k")}
TEXTS = ("question", "answer", "table", "solution")


def find(source):
    """Return {split: (its problems_*.json, tables/)}; FileNotFoundError if there is none."""
    for folder in (source, source / "data" / "tabmwp"):
        found = {}
        for split, names in SPLITS.items():
            paths = [folder / f"problems_{name}.json" for name in names]
            if there := [path for path in paths if path.is_file()]:
                found[split] = there[0], folder / "tables"
        if found:
            break
    else:
        raise FileNotFoundError(f"no problems_train.json, problems_dev.json or problems_test.json "
                                f"in {source} or its data/tabmwp/: wanted the data of PromptPG")
    for _, tables in found.values():
        if not tables.is_dir():
            raise FileNotFoundError(f"{tables} is missing: the pictures belong beside the JSON")
    return found


def rows(path, tables):
    """Yield (where, row) for every problem, or (where, why there is no row)."""
    for key, problem in sources.load_json(path).items():
        where = f"{path}: problem {key}"
        for name in TEXTS:
            if not isinstance(problem.get(name), str):
                raise ValueError(f"{where}: {name} is {str(problem.get(name))[:40]!r}, not a text")
        if not (tables / f"{key}.png").is_file():
            yield where, "picture that is not in this copy"
            continue
        # The official prompt names the unit, too: the gold is the number alone, and the grader
        # cannot know that "15 per square mile" is meant.
        unit = problem.get("unit")
        row = {"id": f"tabmwp-{key}", "question": problem["question"].strip() + (
                   f" (Unit: {unit}. Give the number alone.)" if unit else ""),
               "answer": problem["answer"], "images": f"{key}.png",
               "options": problem.get("choices"), "rationale": problem["solution"],
               "cue": cue(problem.get("table_title"), problem["table"])}
        yield where, row


def cue(title, table):
    """The table as lines of cells, `title` (None: it has none) in a sentence before it."""
    lines = [" | ".join(cell.strip() or "(empty)" for cell in line.split("|"))
             for line in table.strip("\n").splitlines()]
    head = f'The table is headed "{title}". Its rows read:' if title else "The table's rows read:"
    return "\n".join([head, *lines]) + "."
