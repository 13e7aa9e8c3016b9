"""Tiny files in the official layouts of the seven benchmarks, with every trap that was reported.

official(name, folder, form) writes the authors' release as "json" or "parquet" with its pictures,
tsv(name, folder) the file VLMEvalKit would have made of the same questions. Questions are invented;
column names, nesting and the form of golds and options follow ../shared/BENCHMARKS.md.
"""
import ast
import base64
import csv
import io
import json
from pathlib import Path

from PIL import Image

VERSIONS = ("Text Dominant", "Text Lite", "Vision Intensive", "Vision Dominant", "Vision Only")


def png(name: str) -> bytes:
    """A small picture, another one for every name."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), tuple((hash_of(name) >> k) % 256 for k in (0, 8, 16))).save(
        buffer, "PNG")
    return buffer.getvalue()


def hash_of(name: str) -> int:
    return sum(ord(letter) * 7919 * (n + 1) for n, letter in enumerate(name))


# ---------------------------------------------------------------------------- rows, as released

def vision_r1():
    rows = [("<image>Find x.", "145", 1), ("<image>\n<image>Which is larger?\nA. left\nB. right",
                                           "<answer>B</answer>", 2),
            ("<image>Find the area.", r"\frac { 9 \SQRT { 3 } } { 2 }", 1),
            ("<image>How long is it? Choices: (A) 4 cm (B) 5 cm", "5 cm", 1)]
    return [{"problem": problem, "answer": answer,
             "images": [f"images/{n}_{k}.png" for k in range(count)]}
            for n, (problem, answer, count) in enumerate(rows)]


def dynamath():
    """Three seeds, ten variants each; "variant" is in the file's name, not in the row."""
    rows = []
    for variant in range(1, 11):
        rows += [{"variant": variant, "id": "1", "question": "What is the period?",
                  "answer": f"{variant / 3:.4f}", "answer_type": "float",
                  "subject": "analytic     geometry", "level": "high school"},
                 {"variant": variant, "id": "2", "answer": "AB"[variant % 2], "question":
                  ("Is it odd? Choices: (A) yes (B) no", "Which?\nA. None\nB: N/A")[variant % 2],
                  "answer_type": "multiple choice", "subject": "arithmetic",
                  "level": "elementary school"},
                 {"variant": variant, "id": "3", "question": "Which month, or which point?",
                  "answer": ("Sep", "(3.000, 1.000)", "DE")[variant % 3], "answer_type": "text",
                  "subject": "statistics", "level": "undergraduate"}]
    return [{**row, "image": f"image/image{row['id']}.png"} for row in rows]


def mathvista():
    free, multi = "free_form", "multi_choice"
    rows = [("1", free, "float", "1.2", None, 1.0, None), ("2", free, "integer", "100000000", None,
            None, "years"), ("3", multi, "text", "01", ["None", "N/A", "nan", "01"], None, None),
            ("10", multi, "text", "E", list("ABCDE"), None, None),
            ("342", multi, "text", "A", ["B", "A"], None, None),     # text A has label B
            ("587", multi, "text", "2", ["2", "3", "2"], None, None),
            ("600", free, "list", "[2014, 2016]", None, None, None),
            ("601", free, "float", "0.21", None, 2.0, None)]
    return [{"pid": pid, "question": f"Question {pid}?\r\nWith two lines.", "answer": answer,
             "image": f"images/{pid}.jpg", "choices": choices, "unit": unit, "precision": precision,
             "question_type": kind, "answer_type": form,
             "metadata": {"split": "testmini", "task": "math word problem", "skills": ["a", "b"]}}
            for pid, kind, form, answer, choices, precision, unit in rows]


def query(row):
    """The official query of a MathVista row, as far as reading it goes."""
    hint = {"float": f"with {'one' if row['precision'] == 1 else 'two'} decimal places",
            "integer": "an integer"}.get(row["answer_type"], "a letter or a list")
    listed = "".join(f"\n({'ABCDE'[n]}) {text}" for n, text in enumerate(row["choices"] or []))
    return (f"Hint: Please give {hint}.\nQuestion: {row['question']}"
            + (f"\nChoices:{listed}" if listed else ""))


def wemath():
    """(ID, key, option string, what a TSV has in its columns, answer)."""
    rows = [("2steps_1", "2steps_1", "A. 300, 400;B. 400, 300; E. No correct answer",
             {"A": "300, 400", "B": "400, 300", "E": "No correct answer"}, "B"),
            ("2steps_1", "2steps_2", "A. point ;O.;B．②;C. ∠AB;E.;D. None; E. No answer",
             {"A": "point ;O.", "B": "②", "C": "∠AB;E.", "D": "None", "E": "No answer"},
             "E"),
            ("2steps_1", "2steps_multi", "A. B; B. C; C. A; D. No correct answer",
             {"A": "B", "B": "C", "C": "A", "D": "No correct answer"}, "A"),
            ("3steps_1", "3steps_1", "A. 45° B. 60° ;C. 75°; F. No correct answer",
             {"A": "45° B. 60°", "C": "75°", "F": "No correct answer"}, "C"),
            *(("3steps_1", f"3steps_{k}", "A. 1;B. 2", {"A": "1", "B": "2"}, "A")
              for k in ("2", "3", "multi"))]
    return [{"ID": group, "key": key, "split": "testmini", "knowledge concept": "Angles",
             "question": f"Question {key}?", "option": option, "answer": answer, "columns": columns,
             "image_path": f"2steps/image/{group}-{key}.png", "question number": 1}
            for group, key, option, columns, answer in rows]


def mathverse():
    problems = [("multi-choice", "Which?\nChoices:\nA:40°\nB:60°\nC:120°\nD:140°", "D"),
                ("multi-choice", "Which?\nChoice:\nA. 1\nB. 2", "(B)"),
                ("multi-choice", "Which two?\nChoices:\nA:1\nB:2\nC:3\nD:4", "C\nD"),
                ("multi-choice", "Is it?\nChoices:\nA:True\nB:False", "False"),
                ("multi-choice", "Where?\nChoices:\nA:north\nB:south", r"090^\circ T"),
                ("free-form", "Give the area.", r"Area $=9 \pi \mathrm{cm}^{2}$"),
                ("free-form", "Which point is the centre?", "A")]
    rows = []
    for n, (kind, question, answer) in enumerate(problems, 1):
        for k, version in enumerate(VERSIONS):
            folder = "images_version_" + ("1-4", "1-4", "1-4", "5", "6")[k]
            rows.append({"sample_index": str(len(rows) + 1), "problem_index": str(n),
                         "problem_version": version, "question": "" if k == 4 else question,
                         "question_for_eval": question, "image": f"{folder}/image_{n}.png",
                         "answer": answer, "question_type": kind, "query_wo": "", "query_cot": "",
                         "metadata": {"split": "testmini", "subject": "Plane Geometry",
                                      "subfield": "Angle", "source": "it's"}})
    return rows


def mmmu():
    """The official files hold one split each; "dev" rows are for the TSV, which mixes them."""
    many = [str(n) for n in range(9)]
    rows = [("dev_Accounting_1", ["1", "2"], "A", 1), ("validation_Accounting_1", ["None", "N/A",
            "nan", "01"], "D", 1), ("validation_Accounting_2", many, "I", 1),
            ("validation_Architecture_and_Engineering_1", ["<image 2>", "<image 3>"], "B", 3),
            ("validation_Architecture_and_Engineering_2", [], ["Tampa", "Florida"], 1),
            ("validation_Architecture_and_Engineering_3", [], "B", 1)]
    return [{"id": key, "question": "See <image 1> and <image 1>. Which?", "options": str(options),
             "question_type": "multiple-choice" if options else "open", "answer": str(answer),
             "explanation": "", "subfield": "", **{f"image_{k}": f"images/{key}_{k}.png" if
                                                   k <= count else None for k in range(1, 8)}}
            for key, options, answer, count in rows]


def video_mme():
    rows = []
    for n, (video, duration) in enumerate((("-abc_DE", "short"), ("fghij", "medium"),
                                           ("klmno", "long")), 1):
        rows += [{"video_id": f"{n:03}", "duration": duration, "domain": "Knowledge", "url": "",
                  "sub_category": "History", "videoID": video, "question_id": f"{n:03}-{k}",
                  "task_type": "Counting Problem", "question": f"How often, {k}?",
                  "options": ["A. None.", "B. 01.", "C. Once.", "D. It is A."],
                  "answer": "ABD"[k - 1]} for k in (1, 2, 3)]
    return rows


ROWS = {"vision-r1": vision_r1, "dynamath": dynamath, "mathvista": mathvista, "wemath": wemath,
        "mathverse": mathverse, "mmmu": mmmu, "video-mme": video_mme}
# Column that holds the picture in parquet; where that is not the column with its path.
DECODED = {"dynamath": "decoded_image", "mathvista": "decoded_image"}
IMAGES = {"vision-r1": ["images"], "wemath": ["image_path"],
          "mmmu": [f"image_{k}" for k in range(1, 8)]}


# ---------------------------------------------------------------------------- official layouts

def official(name: str, folder: Path, form: str = "json") -> Path:
    """Write the release and return the folder to load from."""
    rows = ROWS[name]()
    if name == "mmmu":
        rows = [row for row in rows if row["id"].startswith("validation")]
    if name == "video-mme":
        videos(folder)
    for row in rows:
        row.pop("columns", None)
    if form == "parquet":
        for path, part in parquet_files(name, rows):
            write_parquet(folder / path, part, name)
        return folder
    if name == "mathverse":                                 # the GitHub json lacks it
        rows = [{k: v for k, v in row.items() if k != "question_for_eval"} for row in rows]
    if name == "dynamath":
        for variant in range(1, 11):
            trial = folder / "samples and result" / "10trials" / f"trial{variant}"
            part = [row for row in rows if row["variant"] == variant]
            write_json(trial / "dataset.json", {row.pop("id"): row for row in part}, part, trial)
        return folder
    path = {"mathvista": "data/testmini.json", "wemath": "data/testmini.json",
            "mathverse": "testmini.json", "mmmu": "validation.json"}.get(name, "test.jsonl")
    content = {row["pid"]: row for row in rows} if name == "mathvista" else rows
    write_json(folder / path, content, rows, folder if name == "mathvista" else
               (folder / path).parent, IMAGES.get(name, ["image"]))
    if name == "mathvista":
        (folder / "data" / "query.json").write_text(
            json.dumps({row["pid"]: query(row) for row in rows}))
    return folder


def write_json(path, content, rows, pictures, columns=("image",)):
    """The rows, and their pictures below the folder `pictures`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) for row in content]
    path.write_text("\n".join(lines) if path.suffix == ".jsonl" else json.dumps(content, indent=1),
                    encoding="utf-8")
    for row in rows:
        for image in names(row, columns):
            (pictures / image).parent.mkdir(parents=True, exist_ok=True)
            (pictures / image).write_bytes(png(image))


def names(row, columns):
    found = [row.get(column) for column in columns]
    return [name for part in found for name in (part if isinstance(part, list) else [part]) if name]


def parquet_files(name, rows):
    if name == "dynamath":      # the hub's own names
        renamed = [{("ground_truth" if k == "answer" else "knowledge_level" if k == "level" else k):
                    v for k, v in row.items()} for row in rows]
        return [(f"data/sample_variant{n}-00000-of-00001.parquet",
                 [row for row in renamed if row["variant"] == n]) for n in range(1, 11)]
    if name == "mmmu":
        subjects = sorted({row["id"].split("_", 1)[1].rsplit("_", 1)[0] for row in rows})
        return [(f"{subject}/validation-00000-of-00001.parquet",
                 [row for row in rows if f"_{subject}_" in row["id"]]) for subject in subjects]
    rows = [{**row, "query": query(row)} if name == "mathvista" else row for row in rows]
    return [({"vision-r1": "test.parquet", "mathverse": "testmini.parquet",
              "video-mme": "videomme/test-00000-of-00001.parquet"}.get(
                  name, "data/testmini-00000-of-00001.parquet"), rows)]


def write_parquet(path, rows, name):
    import pyarrow
    import pyarrow.parquet
    def struct(image):
        return {"bytes": png(image), "path": image.split("/")[-1]} if image else None
    path.parent.mkdir(parents=True, exist_ok=True)
    table = []
    for row in rows:
        row = {k: v for k, v in row.items() if k != "variant"}
        for column in IMAGES.get(name, ["image"] if "image" in row else []):
            value = row[column]
            row[DECODED.get(name, column)] = ([struct(v) for v in value] if isinstance(value, list)
                                              else struct(value))
        table.append(row)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path)


def videos(folder: Path) -> None:
    """One video as frames, one as .mp4, one as .mkv; nobody decodes these files."""
    frames = folder / "frames" / "-abc_DE"
    frames.mkdir(parents=True)
    for n in range(1, 13):                                  # 2 comes before 10
        (frames / f"{n}.jpg").write_bytes(png(str(n)))
    (folder / "frames" / "fps.txt").write_text("2\n")
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / "fghij.MP4").write_bytes(b"video")
    (folder / "data" / "klmno.mkv").write_bytes(b"video")


# ---------------------------------------------------------------------------- VLMEvalKit's TSV

TSV = {"vision-r1": "Vision-R1_TEST", "dynamath": "DynaMath", "mathvista": "MathVista_MINI",
       "wemath": "WeMath", "mathverse": "MathVerse_MINIV", "mmmu": "MMMU_DEV_VAL",
       "video-mme": "Video-MME"}


def tsv(name: str, folder: Path, local: bool = False) -> Path:
    """Write the TSV, or with `local` the one that has image_path instead of image."""
    rows = [tsv_row(name, n, row) for n, row in enumerate(ROWS[name]())]
    if name == "video-mme":
        videos(folder)
    if local:
        for row in rows:
            images = row.pop("image")
            row["image_path"] = str(images) if len(images) > 1 else images[0]
            for image in images:
                path = folder / "images" / ("MMMU" if name == "mmmu" else TSV[name]) / image
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(png(image))
    elif name != "video-mme":
        first = {}                          # an equal picture is named, not repeated
        for row in rows:
            images = tuple(row["image"])
            cells = [base64.b64encode(png(image)).decode() for image in images]
            row["image"] = str(first.get(images, str(cells) if len(cells) > 1 else cells[0]))
            first.setdefault(images, row["index"])
    write_tsv(folder / f"{TSV[name]}{'_local' * local}.tsv", rows)
    return folder


def tsv_row(name, n, row):
    """One row with the columns that VLMEvalKit's code uses; "image" is a list of names."""
    images = names(row, IMAGES.get(name, ["image"]))
    out = {"index": n, "question": row.get("question"), "answer": row["answer"], "image": images}
    if name == "vision-r1":
        out["question"] = row["problem"]
    elif name == "dynamath":
        out |= {"qid": row["id"], "varid": row["variant"], "knowledge_level": row["level"],
                "answer_type": row["answer_type"], "subject": row["subject"]}
    elif name == "mathvista":
        out |= {"index": row["pid"], "question": query(row), "choices": row["choices"] or "",
                "question_type": row["question_type"], "answer_type": row["answer_type"],
                "task": row["metadata"]["task"], "skills": row["metadata"]["skills"],
                "answer_option": "ABCDE"[row["choices"].index(row["answer"])] if row["choices"]
                else ""}
    elif name == "wemath":
        out |= {"ID": row["ID"], "key": row["key"], "knowledge concept": row["knowledge concept"],
                "hint": "", **{label: row["columns"].get(label, "") for label in "ABCDEF"}}
    elif name == "mathverse":
        out |= {"index": row["sample_index"], "question_for_eval": row["question_for_eval"],
                "query_cot": "", "problem_version": row["problem_version"],
                "metadata": row["metadata"]}
    elif name == "mmmu":
        split, subject = row["id"].split("_", 1)
        listed = dict(zip("ABCDEFGHI", ast.literal_eval(row["options"])))
        out |= {"split": split, "category": subject.rsplit("_", 1)[0].replace("_", " "),
                "l2-category": "", **{label: listed.get(label, "") for label in "ABCDEFGHI"}}
    elif name == "video-mme":
        del out["image"]
        out |= {"video": row["videoID"], "video_path": f"./video/{row['videoID']}.mp4",
                "candidates": row["options"], **{k: row[k] for k in (
                    "duration", "domain", "sub_category", "task_type")}}
    return out


def write_tsv(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path
