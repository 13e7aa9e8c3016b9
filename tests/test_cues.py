"""cues.py and leaks.py: the writer never sees the answer, nothing is lost; the audit's rates."""
import json
import subprocess
import sys

import pytest
import torch

from scale import checkpoint
from data import cues, prepare
from data import leaks
import model as qwen
import rollout
from conftest import ROOT

CASES = [json.loads(line) for line in (ROOT / "tests" / "leak_cases.jsonl").open(encoding="utf-8")]


# ---------------------------------------------------------------------------- the audit

@pytest.mark.parametrize("part, precision, recall",
                         [("tuned", 0.97, 0.95), ("held out", 0.90, 0.85)])
def test_audit_on_labelled_cues(part, precision, recall):
    """Measured: tuned 149 of 151 leaks found, held out 18 of 20; no clean cue flagged in either."""
    cases = [case for case in CASES if case["part"] == part]
    said = [bool(leaks.audit(case["cue"], case["answer"], case["question"], case.get("options")))
            for case in cases]
    hits = sum(flagged and case["leak"] for flagged, case in zip(said, cases))
    assert hits / sum(said) >= precision
    assert hits / sum(case["leak"] for case in cases) >= recall


@pytest.mark.parametrize("cue, reason", [
    ("", "empty"), ("...", "empty"), ("A triangle with the side", "cut off"),
    ("How long is the side AB of the triangle?", "parrots the question"),
    ("By the Pythagorean theorem the sides are related.", "theorem"),
    ("The sides are 3 and 4, so 3 + 4 = 7.", "calculation"),
    ("The side AB is 5.", "answer")])
def test_audit_names_its_reason(cue, reason):
    assert reason in leaks.audit(cue, "5", "How long is the side AB of the triangle?")


TABLE = "Name | Number of blocks\nGarrett | 19\nJason | 14\nMs. Lee | 1, 2, 4"


@pytest.mark.parametrize("cue", [
    TABLE, "The table reads:\n" + TABLE + "\n", TABLE.replace("\n", "; ") + ".",
    "| Name | Blocks |\n| --- | --- |\n| Garrett | 19 |\n| Jason | 14 |",
    "The table reads: Name, Number of blocks; Garrett, 19; Jason, 14.",
    "Garrett: 19; Jason: 14; Quincy: -4."])
def test_a_table_that_holds_the_answer_is_evidence(cue):
    """98 of 1,000 TabMWP tables were called leaks: the answer to "who?" is one of the cells.
    What is said beside the table is still read."""
    for question, answer in (("Who lives the closest to school?", "Jason"),
                             ("How many people are there?", "4")):
        assert leaks.audit(cue, answer, question) == []
        for verdict in (f"So the answer is {answer}.", f"The answer: {answer}"):
            told = f"{cue.rstrip('.')}.\n{verdict}"
            assert "answer" in leaks.audit(told, answer, question, stopped=True)


@pytest.mark.parametrize("cue", [
    TABLE, "AB is marked 12; ∠ABC is marked 3x-4; A lies on OF", "BC is marked a",
    "a 5\" screen", "x: 4, y: 7", "red, green, blue", "Mr. Lee | 3\nMs. Poe | 4",
    "Four boxes\nA ball. A cube.\na | b"])
def test_a_missing_full_stop_is_no_cut(cue):
    """894 of 1,000 tables and all facts of Geometry3K were called "cut off"."""
    assert "cut off" not in leaks.audit(cue, "77")


@pytest.mark.parametrize("cue", [
    "A ball, a cube,", "A ball, a cube and", "A ball. A cube stands behi", "A grid (4 by",
    "A sign reads “EX", 'A sign "EX', "The label on the side is", "A bar of", "Prices: ", "x =",
    "It shows \\frac{1", "AB is 5. BC is labelled"])
def test_a_text_that_stops_in_the_middle_is_cut_off(cue):
    assert "cut off" in leaks.audit(cue, "77")
    assert "cut off" not in leaks.audit(cue, "77", stopped=True), "its writer ended by itself"


def test_counting_aloud_goes_up_by_one():
    """"1, 2, 4, 4, 5": a row of a stem-and-leaf plot was read as somebody's counting to four."""
    question = "How many packs are there?"
    assert leaks.audit("The leaves are 1, 2, 4.", "4", question) == []
    assert leaks.audit("One, two, three, four.", "4", question) == ["answer"]


SHARED = ROOT.parent / "shared" / "real"


@pytest.mark.skipif(not SHARED.is_dir(), reason="real files are not there")
def test_real_cues_are_clean():
    """Of 120 TabMWP tables 109 were flagged, of 10 figures of Geometry3K all; of NLVR none."""
    problems = json.loads((SHARED / "tabmwp" / "problems_dev1k.json").read_text("utf-8")).values()
    assert not [p["table"] for p in problems
                if leaks.audit(p["table"], p["answer"], p["question"], p["choices"])]
    for folder in (SHARED / "geometry3k" / "examples").iterdir():
        about = json.loads((folder / "data.json").read_text("utf-8"))
        facts = json.loads((folder / "logic_form.json").read_text("utf-8"))["diagram_logic_form"]
        assert not leaks.audit("; ".join(filter(None, facts)), about["answer"],
                               about["compact_text"], about["compact_choices"])
    for line in (SHARED / "nlvr" / "dev" / "dev.json").open(encoding="utf-8"):
        example = json.loads(line)
        cue = "; ".join("a box with " + ", ".join(f"a {thing['color']} {thing['type']}"
                        for thing in box) for box in example["structured_rep"])
        assert not leaks.audit(cue, example["label"], example["sentence"])


def test_audit_never_raises_on_junk():
    for junk in ("\\frac{", "(((", "=" * 500, "$" * 99, "is is is = : of", "\u2028\x00", "[Hint]:"):
        leaks.audit(junk, junk, junk, [junk, junk])
        leaks.audit(junk, "", "", None)


def test_toy_cues_are_clean(records):
    """Row numbers equal answers all the time there: visible evidence, not a leak."""
    assert not [r["cue"] for r in records if leaks.audit(r["cue"], r["answer"], r["question"])]


# ---------------------------------------------------------------------------- the writer

def test_the_writer_never_sees_the_answer(loaded, records):
    """A writer that knows the answer puts it into the cue; here the prompt cannot depend on it."""
    _, processor = loaded
    for kind in cues.PROMPT:
        one = processor.prompt(cues.writer_view(records[0], kind))
        changed = {"answer": "999", "rationale": "999", "options": ["999"], "cue": "9"}
        other = processor.prompt(cues.writer_view(records[0] | changed, kind))
        assert one.ids == other.ids and torch.equal(one.pixels, other.pixels)


def write(folder, out, *more):
    cues.main(["write", "--model", str(qwen.TINY), "--data", str(folder / "train.jsonl"),
               "--out", str(folder / out), "--batch-size", "4", "--max-new-tokens", "40",
               "--limit", "10", "--retries", "1", "--device", "cpu", *more])
    return [checkpoint.read_jsonl(folder / name) for name in
            (out, out.replace(".jsonl", ".rejected.jsonl"))]


@pytest.fixture
def world(toy_folder, tmp_path):
    import shutil
    shutil.copytree(toy_folder, tmp_path / "w")
    return tmp_path / "w"


def test_every_record_is_written_or_set_aside(world, capsys):
    kept, refused = write(world, "cued.jsonl")
    source = checkpoint.read_jsonl(world / "train.jsonl")[:10]
    assert sorted(r["id"] for r in kept + refused) == sorted(r["id"] for r in source)
    for row in kept:
        assert row["cue_meta"]["prompt"] == "cue-1" and row["cue"]
        assert not leaks.audit(row["cue"], row["answer"], row["question"], None, True)
    for row in refused:
        assert len(row["cue_meta"]["rejected"]) == 2 and row["cue_meta"]["rejected"][0]["reasons"]
    assert f"{len(kept)} cues" in capsys.readouterr().out
    if kept:
        from data import records as record_files
        record_files.load(world / "cued.jsonl", ("cue",))


def test_a_killed_writer_goes_on_to_the_same_cues(world):
    """Half a batch and half a line are left by a kill; the batch is drawn again as a whole."""
    whole = write(world, "cued.jsonl")
    paths = [world / "cued.jsonl", world / "cued.rejected.jsonl"]
    for path, rows in zip(paths, whole):
        if rows:
            checkpoint.write_jsonl(path, rows[:len(rows) // 2])
            with open(path, "a") as file:
                file.write('{"id": "cut')
    again = write(world, "cued.jsonl")
    by_id = [{row["id"]: row for row in part} for part in whole]
    assert [{row["id"]: row for row in part} for part in again] == by_id


def test_a_leaking_draw_is_tried_again(loaded, records, monkeypatch):
    """First everybody leaks, then nobody does: two tries, and the reasons of the first are kept."""
    model, processor = loaded
    texts = iter(["The answer is 5."] * 2 + ["A red circle stands in a corner."] * 2)

    def fake(model, batch, **settings):
        ids = [processor.encode(next(texts)) for _ in batch["input_ids"]]
        lengths = torch.tensor([len(i) for i in ids])
        width = int(lengths.max())
        return rollout.Rollout(torch.tensor([i + [0] * (width - len(i)) for i in ids]), lengths,
                               torch.ones(len(ids), dtype=torch.bool), torch.zeros(len(ids), width))
    monkeypatch.setattr(cues, "sample", fake)
    from types import SimpleNamespace
    args = SimpleNamespace(kind="cue", retries=2, seed=0, max_new_tokens=9, temperature=1.0)
    part = [{**records[0], "answer": "5"}, {**records[1], "answer": "5"}]
    for got in cues.write_batch(model, processor, part, args, 0):
        assert got["text"] == "A red circle stands in a corner." and got["tries"] == 2
        assert "answer" in got["rejected"][0]["reasons"]


def test_a_rationale_is_kept_only_if_its_answer_is_right(records):
    record = {**records[0], "answer": "3"}
    assert not cues.reasons_against("Two and one, so \\boxed{3}", record, "rationale", True)
    assert cues.reasons_against("So \\boxed{4}", record, "rationale", True) == ["wrong answer"]
    assert cues.reasons_against("So \\boxed{3}", record, "rationale", False) == ["cut off"]


def test_cues_belong_beside_their_source(world, tmp_path):
    """Picture paths are relative to the record file: elsewhere they would point nowhere."""
    for out in (tmp_path / "elsewhere.jsonl", world / "train.jsonl"):
        with pytest.raises(SystemExit, match="beside"):
            cues.main(["write", "--model", str(qwen.TINY), "--data",
                       str(world / "train.jsonl"), "--out", str(out)])


def test_other_settings_do_not_mix_in_one_file(world):
    write(world, "cued.jsonl")
    with pytest.raises(SystemExit, match="was written with"):
        write(world, "cued.jsonl", "--seed", "7")


def test_the_audit_command_prints_rate_and_examples(tmp_path):
    rows = [{"cue": "The answer is 5.", "answer": "5", "question": "Find x."},
            {"cue": "A triangle with a side labelled 4.", "answer": "5", "question": "Find x."}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    command = [sys.executable, str(ROOT / "data" / "cues.py"), "audit", str(tmp_path / "c.jsonl")]
    got = subprocess.run(command, capture_output=True, text=True)
    assert got.returncode == 0, got.stderr
    assert "1 of 2 cues flagged: 50.0 %" in got.stdout and "c.jsonl:1" in got.stdout
    (tmp_path / "c.jsonl").write_text('{"cue": "x"}\n')
    with pytest.raises(SystemExit, match="c.jsonl:1"):
        cues.main(["audit", str(tmp_path / "c.jsonl")])


@pytest.mark.parametrize("main, argv", [
    (cues.main, ["audit", "none.jsonl"]),
    (prepare.main, ["jsonl", "--source", "none.jsonl", "--out", "out"])])
def test_a_file_that_is_not_there_is_a_sentence(main, argv, tmp_path, monkeypatch):
    """It was "[Errno 2] No such file or directory: 'none.jsonl'"."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="^(cues.py|error): none.jsonl: No such file or directory$"):
        main(argv)
