"""report.py: the page shows the models' answers, where the sink looked, and what is missing."""
import copy
import doctest
import json
import re
import shlex
from dataclasses import asdict

import pytest
import torch
from PIL import Image

from scale import checkpoint
import cue_recovery
import distill
import evaluate
from analysis import figures
import model as qwen
from analysis import report
import teacher as teaching
from data import records as record_files
from conftest import ROOT, append_response
from test_figures import Outline

EVIL = '<script>alert("x")</script> & <img src=http://evil.example/p.png>'


@pytest.fixture(scope="module")
def finished(loaded, tmp_path_factory):
    """The folder of a finished run; its checkpoint is a perturbed tiny model with the module."""
    from data import toy
    root = tmp_path_factory.mktemp("run")
    toy.write(root / "toy", train=20, test=4, seed=3)
    folder = root / "runs" / "x"
    config = distill.Config(**distill.TOY | dict(
        steps=12, name="x", data=str(root / "toy" / "train.jsonl"), seed=7, batch_size=5,
        eval_data=str(root / "toy" / "test.jsonl"), max_new_tokens=14, eval_every=4))
    folder.mkdir(parents=True)
    checkpoint.write_json(folder / "args.json", asdict(config))
    model, processor = copy.deepcopy(loaded[0]), loaded[1]
    cue = cue_recovery.attach(model, every=2, seed=7)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for block in cue.blocks.values():
            block.output.weight.normal_(std=0.05, generator=generator)
        for weight in model.model.language_model.layers[-1].mlp.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    checkpoint.save_model(model, processor, folder / "checkpoint")
    rows = [evaluate.judge({"id": str(n), "question": EVIL, "answer": "1", "images": []},
                           f"\\boxed{{{n % 2}}}", True, 9) for n in range(20)]
    summary = evaluate.summarise(rows)
    checkpoint.write_json(folder / "before.json",
                          {"base": summary, "teacher": summary, "rows": rows})
    checkpoint.write_json(folder / "result.json", {
        **{f"{who}_{key}": value for who in ("base", "teacher", "student")
           for key, value in summary.items() if key != "n"}, "n": 20, "seconds": 3.0,
        "parameters_added": 5})
    for step in range(1, 13):
        checkpoint.append_jsonl(folder / "metrics.jsonl", {
            "step": step, "loss": 1 / step, "gap_front": -1 / step, "gap_back": -2 / step,
            "length": 30 + step, "hint_rows": 1, "hint_count": 3,
            **({"accuracy": step / 20} if step % 4 == 0 else {})})
    return folder


@pytest.fixture(scope="module")
def asked(finished):
    """The run with three of its records answered before and after."""
    run = report.read_run(finished)
    report.ask_models(run, 3, device="cpu")
    assert not run.missing
    return run


def test_doctests():
    assert doctest.testmod(report).failed == 0


# ---------------------------------------------------------------------------- answers

def test_pieces_join_to_the_answer_even_where_a_character_is_cut(loaded):
    """Emoji and accents take several tokens each; a part of their bytes is no text."""
    _, processor = loaded
    text = "caf\u00e9 \U0001f388 \u65e5\u672c, I see <b> & \\boxed{2}.\n"
    ids = processor.encode(text) + [min(processor.stop_ids)]
    got = report.pieces(ids, processor.decode)
    assert len(got) == len(ids) and "".join(got) == text and got[-1] == ""
    assert "" in got[:-1] and not any("\ufffd" in piece for piece in got)
    cut = ids[:next(n for n, piece in enumerate(got) if piece == "") + 1]     # ends inside one
    assert "".join(report.pieces(cut, processor.decode)) == processor.decode(cut)


def test_answers_are_those_of_the_start_and_of_the_checkpoint(asked, loaded):
    """One row at a time here, in batches in evaluate.py: the answers are the same."""
    records = record_files.load(asked.args["eval_data"])[:3]
    student, _ = qwen.load(asked.folder / "checkpoint", device="cpu")
    for model, which in ((loaded[0], "before"), (student, "after")):
        rows = evaluate.evaluate(model, loaded[1], records, max_new_tokens=14)
        got = [getattr(example, which) for example in asked.examples]
        assert [a.text for a in got] == [row["response"] for row in rows]
        assert [a.correct for a in got] == [row["correct"] for row in rows]
    assert [e.before.text for e in asked.examples] != [e.after.text for e in asked.examples]


def test_logprobs_are_those_of_a_fresh_forward(asked, loaded):
    """Student with the module and no hint, teacher without it and with the hint; logits in full."""
    base, processor = loaded
    student = qwen.load(asked.folder / "checkpoint", device="cpu")[0]
    example = asked.examples[0]
    ids = torch.tensor(processor.encode(example.after.text))
    assert len(ids) == 14 == len(example.after.student)              # cut off: no stop token
    wrong, blind = asked.examples[1].hint, example.record | {"images": []}
    assert wrong != example.hint
    read = example.after.read
    for model, record, hint, shown in (
            (student, example.record, None, example.after.student),
            (base, example.record, example.hint, read["with the hint"]),
            (base, example.record, wrong, read["with a wrong hint"]),
            (student, blind, None, read["without the picture"])):
        prompt = processor.prompt(record, hint)
        both = append_response(processor.batch([prompt]), ids[None], torch.tensor([14]))
        with torch.no_grad():
            logits = model(**both, use_cache=False).logits[0, len(prompt.ids) - 1:-1]
        logprobs = logits.log_softmax(-1)
        assert shown == pytest.approx(logprobs[range(14), ids].tolist(), abs=1e-4)
    spans = Outline(figures.token_spans(example.after.tokens()))
    titles = [attrs["title"] for attrs in spans.all("span")]
    _, s, t = example.after.tokens()[3]
    assert titles[3] == f"teacher {t:.2f}, student {s:.2f}, difference {t - s:+.2f}"
    assert "".join(text for _, text in spans.text) == example.after.text


def test_an_answer_is_shown_once_for_each_reading(asked):
    """Its nats of privilege are the sum over its tokens; the table has the three differences."""
    answer = asked.examples[0].before
    block = report.answer_block("Before", answer)
    nats = sum(answer.read["with the hint"]) - sum(answer.student)
    assert f"with the hint: {nats:+.2f} nats of privilege, {nats / 14:+.3f} a token" in block
    assert block.count('<p class="answer">') == 3 and block.count("nats of privilege") == 1
    rows = re.findall(r"<td>([^<]*)</td>" * 4, block)
    assert len(rows) == 14
    for row, s, *others in zip(rows, answer.student, *answer.read.values(), strict=True):
        assert row == (f"{s:.2f}", *(f"{other - s:+.2f}" for other in others))
    only = report.Answer(["a"], [-1.0], {"with the hint": [-1.0]})       # no picture, no other hint
    assert report.answer_block("Before", only).count('<p class="answer">') == 1


def test_scoring_knows_where_the_prompt_ends_for_a_sink_that_is_last(tiny, records):
    """sink="last" is the prompt's last token, not the answer's."""
    student, processor = tiny
    teacher = teaching.frozen_copy(student)
    cue = cue_recovery.attach(student, every=2, sink="last")
    with torch.no_grad():
        for block in cue.blocks.values():
            block.output.weight.normal_(std=0.3)
    example = report.Example(records[0], None, [])
    got = report.answer(student, teacher, processor, example, 6)
    assert len(got.student) == 6 and cue.keep_attention is False
    prompt = processor.prompt(records[0])
    with torch.no_grad():
        logits = student(**processor.batch([prompt]), use_cache=True).logits[0, -1]
    first = processor.encode(got.text)[0]
    assert got.student[0] == pytest.approx(float(logits.log_softmax(-1)[first]), abs=1e-4)


# ---------------------------------------------------------------------------- attention

@pytest.mark.parametrize("cell", [0, 5, 8])
def test_attention_stands_on_its_cell(tiny, cell, monkeypatch):
    """All attention on one visual token of the second picture: that cell alone is painted."""
    student, processor = tiny
    teacher = teaching.frozen_copy(student)
    cue_recovery.attach(student, every=2)
    pictures = [Image.new("RGB", (64, 48), "white"), Image.new("RGB", (48, 48), "white")]
    record = {"id": "1", "question": "How many?", "answer": "2", "images": pictures}
    ids = torch.tensor(processor.prompt(record).ids)
    token = int((ids == processor.image_id).nonzero()[12 + cell, 0])       # 3 x 4 cells come before

    def one_hot(self, x, sink, visual, lo, hi):
        attention = torch.zeros(1, self.heads, hi - lo)
        attention[:, :, token - lo] = 1
        return x, attention
    monkeypatch.setattr(cue_recovery.Block, "forward", one_hot)
    tiles = report.tiles_of(record, processor)
    got = report.answer(student, teacher, processor, report.Example(record, None, tiles), 2)
    for first, second in got.maps.values():
        assert first.shape == (3, 4) and second.shape == (3, 3) and not first.any()
        assert int(second.argmax()) == cell and float(second.sum()) == 1
        row, column = divmod(cell, 3)
        assert figures.peak(second) == f"most at row {row + 1}, column {column + 1}: 100 %"
        image, size = figures.overlay(tiles[1], second, 1.0), tiles[1].width // 3
        for n in range(9):       # a corner of each cell: beside the number, inside the frame
            pixel = image.getpixel((n % 3 * size + size - 8, n // 3 * size + 8))
            assert (max(pixel) < 240) == (n == cell), (n, pixel)


def test_maps_before_training_are_those_of_the_run_s_own_start(asked, loaded):
    """The module is random at the start, so another seed would show another map."""
    maps = {}
    for seed in (7, 8):
        model = copy.deepcopy(loaded[0])
        cue = cue_recovery.attach(model, every=2, seed=seed)
        cue.keep_attention = True
        batch = loaded[1].batch([loaded[1].prompt(asked.examples[0].record)])
        with torch.no_grad():
            model(**batch, use_cache=True)
        seen = batch["input_ids"][0] == loaded[1].image_id
        maps[seed] = cue.attention[0][0].mean(0)[seen]
    shown = asked.examples[0].before.maps[0][0]
    assert float(shown.sum()) == pytest.approx(1, abs=1e-5)
    assert torch.allclose(shown.flatten(), maps[7], atol=1e-5)
    assert not torch.allclose(shown.flatten(), maps[8], atol=1e-3)


def test_a_prompt_that_was_cut_is_refused():
    with pytest.raises(ValueError, match="11 visual tokens"):
        report.split(torch.zeros(11), [(3, 4)])


# ---------------------------------------------------------------------------- the page

def test_the_page_stands_alone_and_is_accessible(asked):
    text = report.page(asked)
    page = Outline(text)
    assert len(text) < 5e6 and not re.search(r"https?://", text)
    links = [attrs[key] for _, attrs in page.tags
             for key in ("src", "href", "xlink:href") if key in attrs]
    assert links and all(link.startswith(("data:image/", "#")) for link in links)
    assert not page.all("link") and len(page.all("script")) == 1
    assert text.count("<table") == text.count("<caption>") >= 5
    assert all(content.strip() for tag, content in page.text if tag == "caption")
    assert text.count("<svg") == text.count("<title id=") == text.count("<desc id=") == 5
    assert page.all("img") and all(attrs["alt"] for attrs in page.all("img"))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids)) and {link[1:] for link in links if link[0] == "#"} <= set(ids)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert levels.count(1) == 1 and all(b <= a + 1 for a, b in zip(levels, levels[1:]))
    assert "prefers-color-scheme:dark" in text and "width=device-width" in text
    for found in ("50.0 %", "[29.9, 70.1]", "the module adds 5 parameters", "forward_kl"):
        assert found in text
    assert "class=\"missing\"" not in text


def test_text_from_data_stays_text(asked):
    """A question, a hint, a name or an answer may hold markup: the page shows it, never runs it."""
    run = copy.copy(asked)
    example = copy.copy(asked.examples[0])
    example.record = example.record | {"question": EVIL, "id": EVIL, "answer": EVIL}
    example.hint = EVIL
    example.after = report.Answer([EVIL, ""], [-1.0, -2.0], {"with the hint": [-3.0, -2.0]},
                                  maps=example.after.maps)
    run.examples, run.args = [example], asked.args | {"name": EVIL, "data": EVIL, "privilege": EVIL}
    run.command, run.missing = EVIL, {"models": EVIL}
    text = report.page(run)
    page = Outline(text)
    assert len(page.all("script")) == 1 and "<img src=http" not in text
    assert sum(EVIL in data for _, data in page.text) >= 8


@pytest.mark.parametrize("accuracy, shown", [(0.5, "50.0"), (0.083, "8.3"), (1.0, "100.0")])
def test_a_card_has_the_whole_interval(asked, accuracy, shown):
    """Its first five letters were once cut off: right only for two digits before the point."""
    run = copy.copy(asked)
    run.before, run.result = {"base": {"accuracy": accuracy, "interval": [0.012, 1.0]}}, {}
    assert f'<p class="big">{shown} %</p><p>[1.2, 100.0]</p>' in report.result_section(run)


def test_hint_counts_by_epoch(asked):
    """20 records at 5 a step: steps 1-4, 5-8, 9-12, each with 1 row and 3 occurrences a step."""
    text = report.hints_section(asked)
    rows = re.findall(r"<tr><th scope=\"row\">(.*?)</th>(.*?)</tr>", text)
    cells = [[name, *re.findall("<td>(.*?)</td>", rest)] for name, rest in rows]
    assert cells == [["1", "1 - 4", "20", "4", "12"], ["2", "5 - 8", "20", "4", "12"],
                     ["3", "9 - 12", "20", "4", "12"], ["sum", "", "60", "12", "36"]]


def test_curves_keep_the_ends_and_leave_out_what_is_not_a_number(asked):
    values = {1: 2.0, 2: float("nan"), 3: None, 4: 1.0}
    assert report.points([{"step": n, "loss": value} for n, value in values.items()],
                         "loss") == [(1, 2.0), (4, 1.0)]
    accuracy = report.curves_section(asked)        # base at 0, then 4, 8, and the student's at 12
    assert re.findall(r'<th scope="row">(\d+)</th><td>([\d.]+)</td>', accuracy) == [
        ("0", "50.0"), ("4", "20.0"), ("8", "40.0"), ("12", "50.0")]


def test_the_command_gives_the_run_s_settings_again(monkeypatch):
    from data import toy
    monkeypatch.setattr(toy, "default", lambda: ROOT / "data" / "toy")
    for words in (["--steps", "7", "--no-cue-recovery", "--name", "a b"],
                  ["--student", "some/model", "--data", "my/train.jsonl", "--eval-data", "t.jsonl",
                   "--gradient-checkpointing", "--name", "b"]):
        config, _ = distill.read_config(words)
        command, helps = report.command_line(asdict(config))
        assert command.startswith("python distill.py ")
        again, _ = distill.read_config(shlex.split(command)[2:])
        assert again == config and helps["steps"]


# ---------------------------------------------------------------------------- what is missing

def test_a_killed_run_is_a_page_that_says_so(finished, tmp_path):
    """No result, no checkpoint, no evaluation reached, the data moved away."""
    args = json.loads((finished / "args.json").read_text()) | {"data": "gone.jsonl"}
    checkpoint.write_json(tmp_path / "args.json", args)
    checkpoint.append_jsonl(tmp_path / "metrics.jsonl", {"step": 1, "loss": 0.5, "hint_rows": 2,
                                                         "hint_count": 3})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    run = report.read_run(tmp_path)
    report.ask_models(run, 1, 4, device="cpu")
    text = report.page(run)
    Outline(text)
    for found in ("Not finished: 1 of 12 steps", "no checkpoint yet", "No accuracy yet",
                  "gone.jsonl cannot be read", "No evaluations during training",
                  "Response length, tokens: no values", "Before training"):
        assert found in text, found
    assert run.examples[0].before.text and run.examples[0].after is None


def test_a_folder_with_settings_only_is_a_page(tmp_path):
    checkpoint.write_json(tmp_path / "args.json",
                          {"student": "/gone/model", "eval_data": "no.jsonl"})
    run = report.read_run(tmp_path)
    report.ask_models(run, 2)
    text = report.page(run)
    Outline(text)
    assert text.count('class="missing"') >= 4 and "no.jsonl" in run.missing["models"]


def test_an_averaged_teacher_is_the_saved_one(finished, tiny, tmp_path):
    """--teacher ema: the page uses the teacher from the saved state, not the initial one."""
    teacher = teaching.frozen_copy(tiny[0])
    saved = {f"teacher/{n}": p + 1 for n, p in teacher.named_parameters()}
    run = copy.copy(report.read_run(finished))
    run.missing = {}
    report.load_averaged(teacher, run)
    assert "no saved state" in run.missing["teacher"]
    run.folder, before = tmp_path, teacher.lm_head.weight.clone()
    checkpoint.save_state(tmp_path / "state", 3, saved)
    report.load_averaged(teacher, run)
    assert torch.equal(teacher.lm_head.weight, before + 1)


def test_a_run_without_the_module_has_no_maps(asked):
    run = copy.copy(asked)
    run.args = asked.args | {"cue_recovery": False}
    assert "no recovery module" in report.attention_section(run)


def test_a_folder_that_is_no_run_is_one_line(tmp_path):
    for content, message in ((None, "not the folder of a run"), ("{", "not valid JSON"),
                             ("[]", "expected a JSON object")):
        if content:
            (tmp_path / "args.json").write_text(content)
        with pytest.raises(SystemExit, match=f"^report.py: .*{message}") as error:
            report.main([str(tmp_path)])
        assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------- the command

def test_the_command_writes_the_page_and_the_pictures(finished, tmp_path, capsys):
    out = tmp_path / "new" / "r.html"
    report.main([str(finished), "--out", str(out), "--records", "1", "--max-new-tokens",
                 "5", "--pictures", str(tmp_path / "docs"), "--device", "cpu"])
    assert "5 tokens" in out.read_text() and str(out) in capsys.readouterr().out
    for name in ("attention.png", "rollouts.png"):
        path = tmp_path / "docs" / name
        assert Image.open(path).width > 600 and path.stat().st_size < 150_000
    with pytest.raises(SystemExit, match="no pictures without answers"):
        report.main([str(finished), "--out", str(out), "--records", "0", "--pictures",
                     str(tmp_path / "docs")])
    assert "the models were not asked" in out.read_text()
