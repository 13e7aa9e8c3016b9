"""analysis/report.py - one run as one page: what changed, token by token and cell by cell.

The idea.  A table says that a student got better; it does not say how. Two pictures do. One colours
every token of an answer: does it come from the hint, from any hint, or from the picture? The other
shows where in the picture the sink token looks. Both are drawn before and after training. The page
is one file: it needs no network and no library, and can be mailed. This file collects a run's files
and its models' answers, and writes the page; figures.py draws.

In:  the folder of a run, finished, killed or still running; its models, if they can be loaded.
Out: an HTML file; with --pictures also attention.png and rollouts.png for a README.

The equation.  Student and teacher read the student's answer y. X: picture and question; S: the
hint; Q: the question alone; S': the hint of another record. Token n is coloured three times, by
    with the hint         log p_T(y_n | X, S, y_<n)  - log p_theta(y_n | X, y_<n)
    with a wrong hint     log p_T(y_n | X, S', y_<n) - log p_theta(y_n | X, y_<n)
    without the picture   log p_theta(y_n | Q, y_<n) - log p_theta(y_n | X, y_<n)
The sum of the first over the answer, log p_T(y | X, S) - log p_theta(y | X), is its *nats of
privilege*. While both share their weights (before training, --teacher self) that is the pointwise
information i(y; S | X) of the hint about the answer; later it also has what the student learnt. Its
mean over the student's samples is -KL(p_theta || p_T): on average a hint speaks against them.

Run  python analysis/report.py runs/NAME --out report.html
     python analysis/report.py runs/NAME --pictures docs/

Choices a reader may wonder about
1) The answers are made now, greedily as in evaluate.py, by the run's starting model and by its
   checkpoint, for the first records of its test file: they are not picked. (Training samples.)
2) "Before" is the start as distill.py builds it, with the module's weights drawn by the run's seed.
   The module adds nothing then (W_O = 0), but its attention is defined, so the map shows it.
3) If something is missing (no checkpoint yet, a data file that moved), the page says so and shows
   the rest.

Left out: anything interactive but tooltips; the attention of single heads (maps are their mean).
"""
from __future__ import annotations

import argparse
import math
import shlex
import sys
from dataclasses import dataclass, field, fields
from html import escape
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import distill  # noqa: E402
import teacher as teaching  # noqa: E402
from analysis.figures import (SCRIPT, STYLE, attention_picture, attention_rows,  # noqa: E402
                              chart, forest, frame, image_tag, legend, missing,
                              rollouts_picture, spread, table, token_spans)
from benchmarks.counting import percent  # noqa: E402
from benchmarks.readers import with_frames  # noqa: E402
from data import records as record_files  # noqa: E402
from distill import TOY, Config, response_states  # noqa: E402
from evaluate import judge  # noqa: E402
from model import TINY, last_hidden_state, load, to_rgb  # noqa: E402
from rollout import sample  # noqa: E402
from scale import checkpoint, longrun  # noqa: E402
from scale.checks import one_line, quiet  # noqa: E402

# Dimension letters: T response tokens, h x w visual tokens of a picture, D hidden, V vocabulary.

TOKENS = 1000                        # of an answer are shown: a page must stay a page
TILES = 2                            # pictures of one record
HINTED = "with the hint"             # what the teacher reads in training


@dataclass
class Answer:
    """One model's answer to one record. Lists have one entry per token.

    pieces    texts of the tokens; joined, the answer's text
    student   log-probs of the tokens
    read      {what was read: log-probs}: "with the hint", the teacher's; others where they exist
    maps      {layer: [the sink's attention (h, w), mean over heads, for each picture]}
    """
    pieces: list[str]
    student: list[float]
    read: dict[str, list[float]]
    correct: bool = False
    extracted: str | None = None
    stopped: bool = True
    maps: dict = field(default_factory=dict)

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def tokens(self, what: str = HINTED) -> list[tuple[str, float, float]]:
        """(text, the student's log-prob, the other's) of each token, as figures.py takes them."""
        return list(zip(self.pieces, self.student, self.read[what]))


@dataclass
class Example:
    """A test record and its answers before and after training; None where there is no model."""
    record: dict
    hint: str | None
    tiles: list[Image.Image]
    wrong: str | None = None                         # the hint of another record
    before: Answer | None = None
    after: Answer | None = None
    seen: dict | None = None             # the record with the pictures that the teacher sees
    shown: list[Image.Image] = field(default_factory=list)     # those, if they are others

    @property
    def title(self) -> str:
        return f"{self.record['id']}: {self.record['question']}"

    @property
    def told(self) -> str:
        """The privilege, in words."""
        return "; ".join(filter(None, ["other pictures" * bool(self.shown), self.hint])) or "none"

    def answers(self) -> dict[str, Answer | None]:
        return {"before training": self.before, "after training": self.after}

    def maps(self, n: int) -> dict[str, dict]:
        """Attention over picture n, {when: {layer: (h, w)}}, empty where there is no module."""
        return {when: {layer: maps[n] for layer, maps in a.maps.items()} if a else {}
                for when, a in self.answers().items()}

    def has_maps(self) -> bool:
        return bool(self.tiles) and any(self.maps(0).values())


@dataclass
class Run:
    """All that the page shows. missing: {what: why it is missing or incomplete}."""
    folder: Path
    args: dict
    before: dict
    result: dict
    metrics: list[dict]
    records: int | None = None                       # training records, None if the file is gone
    examples: list[Example] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    command: str = ""
    helps: dict[str, str] = field(default_factory=dict)

    def models(self) -> dict[str, dict]:
        """{base, teacher, student: summary of evaluate.summarise}, those that exist."""
        found = {name: self.before[name] for name in ("base", "teacher")
                 if "accuracy" in self.before.get(name, {})}        # a teacher may only score
        student = {key[8:]: value for key, value in self.result.items()
                   if key.startswith("student_")}
        return found | ({"student": {**student, "n": self.result.get("n")}} if student else {})


# ---------------------------------------------------------------------------- from the run's folder

def read_run(folder) -> Run:
    """A run's files, as far as they exist. Raises OSError or ValueError if it is not a run."""
    run = Run(Path(folder), **checkpoint.read_run(folder))
    data = Path(run.args.get("data") or ".")
    if data.is_file():
        with open(data, "rb") as lines:
            run.records = sum(bool(line.strip()) for line in lines)
    run.command, run.helps = command_line(run.args)
    return run


def command_line(args: dict) -> tuple[str, dict[str, str]]:
    """The command with these settings, and each setting's help text."""
    plain = {f.name: f.default for f in fields(Config)}
    words = ["python", *checkpoint.script(args).split()]
    if args.get("student") == plain["student"]:
        plain |= TOY
    for name, value in args.items():
        toy = (name in ("data", "eval_data", "dev_data")
               and Path(str(value)).parent == TINY.parent / "toy")
        if name not in plain or value == plain[name] or toy:
            continue
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else "--no-" + flag[2:])
        else:
            words += [flag, str(value)]
    return shlex.join(words), {f.name: f.metadata["help"] for f in fields(Config)}


def epochs(metrics: list[dict], records: int, batch_size: int, samples: int = 1) -> list[dict]:
    """Hint counts by epoch. samples: answers per prompt.

    A step belongs to the epoch of its first prompt.

    >>> epochs([{"step": s, "hint_rows": 1, "hint_count": 2} for s in (1, 2, 3)], 8, 4)
    [{'epoch': 1, 'first': 1, 'last': 2, 'rollouts': 8, 'rows': 2, 'count': 4, 'whole': True}, \
{'epoch': 2, 'first': 3, 'last': 3, 'rollouts': 4, 'rows': 1, 'count': 2, 'whole': False}]
    """
    out = []
    for epoch, steps in groupby(metrics, lambda m: (m["step"] - 1) * batch_size // records + 1):
        steps = list(steps)
        out.append({"epoch": epoch, "first": steps[0]["step"], "last": steps[-1]["step"],
                    "rollouts": len(steps) * batch_size * samples,
                    "rows": sum(m.get("hint_rows", 0) for m in steps),
                    "count": sum(m.get("hint_count", 0) for m in steps),
                    "whole": steps[-1]["step"] * batch_size >= epoch * records})
    return out


# ---------------------------------------------------------------------------- from the run's models

def ask_models(run: Run, count: int, max_new_tokens: int = 0, device: str = "",
               dtype: str = "") -> None:
    """Fill run.examples with the first `count` test records, asked before and after training.

    What is not available is named in run.missing, so that a killed run gets a page too.
    """
    config = distill.Config(**{f.name: run.args[f.name] for f in fields(distill.Config)
                               if f.name in run.args})
    if not torch.cuda.is_available():        # a run of another machine, looked at on this one
        config.device = "" if config.device.startswith("cuda") else config.device
        config.attention = config.attention.replace("flash_attention_2", "sdpa")
    config.device, config.dtype = device or config.device, dtype or config.dtype
    config.offload_teacher = False           # it reads beside the student here, on one device
    limit = max_new_tokens or min(config.max_new_tokens, 1024)
    try:
        records = record_files.load(config.eval_data, teaching.NEEDS[config.privilege])
        hints = [teaching.hint(r, config.privilege) for r in records]
        start, teacher, processor = distill.build_models(config)
        if config.teacher == "ema":
            load_averaged(teacher, run)
        for n, record in enumerate(records[:count]):
            record = with_frames({"instruction": run.args.get("instruction", ""), **record})
            wrong = next((hint for hint in hints[n:] + hints[:n] if hint != hints[n]), None)
            seen = teaching.seen(record, config.privilege)
            run.examples.append(Example(
                record, hints[n], tiles_of(record, processor), wrong, seen=seen,
                shown=[] if seen is record else tiles_of(seen, processor)))
        for example in run.examples:
            example.before = answer(start, teacher, processor, example, limit)
        del start
        if not (run.folder / "checkpoint").is_dir():
            run.missing["models"] = ("The run has no checkpoint yet (it is written at the end), so "
                                     "there are no answers after training.")
            return
        student, processor = load(run.folder / "checkpoint", config.dtype or None,
                                  config.device or None, attention=config.attention)
        for example in run.examples:
            example.after = answer(student, teacher, processor, example, limit)
    except (ValueError, OSError, ImportError, torch.OutOfMemoryError) as error:
        run.missing["models"] = f"The models could not be asked: {error}"


def load_averaged(teacher, run: Run) -> None:
    """An averaged teacher as it was at the last saved step."""
    try:
        _, tensors = checkpoint.load_state(run.folder / "state")
    except OSError:
        run.missing["teacher"] = ("The averaged teacher has no saved state: the log-probs are "
                                  "those of the teacher at the start.")
        return
    longrun.load_averaged(teacher, tensors)


@torch.no_grad()
def answer(student, teacher, processor, example: Example, max_new_tokens: int) -> Answer:
    """One record's greedy answer, scored by each reader, with the sink's attention maps."""
    record, prompt = example.record, processor.prompt(example.record)
    batch = processor.batch([prompt], device=student.device)
    cue = getattr(student, "cue_recovery", SimpleNamespace(keep_attention=False, attention={}))
    kept, cue.keep_attention = cue.keep_attention, True
    try:
        got = sample(student, batch, max_new_tokens=max_new_tokens, temperature=0,
                     **processor.sampling)
        visual = (batch["input_ids"][0] == processor.image_id) | (
            batch["input_ids"][0] == processor.video_id)
        grids = tile_grids(prompt, processor.merge)
        # decoding leaves the maps of the prefill alone; without a picture there are none
        maps = {layer: split(a[0].float().mean(0)[visual].cpu(), grids)
                for layer, a in sorted(cue.attention.items())}
    finally:
        cue.keep_attention = kept
    ids = got.ids[0, :int(got.lengths[0])]                                               # (T,)
    told = example.seen or record
    shown = prompt if told is record else None       # with a view the teacher has its own pictures
    reads = {HINTED: (teacher, processor.prompt(told, example.hint, shown))}
    if example.wrong:
        reads["with a wrong hint"] = teacher, processor.prompt(told, example.wrong, shown)
    if grids:        # the student itself, so that its weights make no difference
        blind = processor.prompt(record | {"images": [], "video": []})
        reads["without the picture"] = student, blind
    read = {what: token_logprobs(model, processor, asked, ids)
            for what, (model, asked) in reads.items()}
    verdict = judge(record, processor.decode(ids), bool(got.stopped[0]), len(ids))
    return Answer(pieces(ids.tolist(), processor.decode),
                  token_logprobs(student, processor, prompt, ids), read, verdict["correct"],
                  verdict["extracted"], verdict["stopped"], maps)


@torch.no_grad()
def token_logprobs(model, processor, prompt, ids: torch.Tensor, chunk: int = 128) -> list[float]:
    """log p of the response tokens ids (T,) after `prompt`: temperature 1, no token banned."""
    # the very states that training scores
    hidden = response_states(processor, [ids.tolist()], last_hidden_state, [prompt], model,
                             [0])                                                        # (T, D)
    out = []
    for start in range(0, len(ids), chunk):         # (T, V) logits of a long answer are gigabytes
        part = slice(start, start + chunk)
        logits = model.lm_head(hidden[part]).float()
        out += logits.log_softmax(-1).gather(1, ids[part, None])[:, 0].tolist()
    return out


def pieces(ids: list[int], decode) -> list[str]:
    """The text of each token; joined, they are decode(ids).

    If a character is split over tokens, it belongs to the token that completes it. Those before it
    are empty, like a stop token.
    """
    out, waiting = [], []
    for n, token in enumerate(ids):
        waiting.append(token)
        text = decode(waiting)
        if text.endswith("\ufffd") and n + 1 < len(ids):     # not yet a character
            text = ""
        else:
            waiting = []
        out.append(text)
    return out


def tile_grids(prompt, merge: int) -> list[tuple[int, int]]:
    """(h, w) visual tokens of each picture and each video frame pair, in prompt order."""
    grids = [*prompt.grids, *prompt.video_grids]
    return [(h // merge, w // merge) for t, h, w in grids for _ in range(t)]


def split(attention: torch.Tensor, grids: list[tuple[int, int]]) -> list[torch.Tensor]:
    """Cut the attention over all visual tokens into one (h, w) map per picture."""
    if len(attention) != sum(h * w for h, w in grids):
        raise ValueError(f"{len(attention)} visual tokens, but grids of {grids}: was the prompt "
                         "cut?")
    return [part.view(grid) for part, grid in
            zip(attention.split([h * w for h, w in grids]), grids)]


def tiles_of(record: dict, processor, side: int = 256) -> list[Image.Image]:
    """A record's first pictures as the model sees them: resized to full visual tokens."""
    prompt, out = processor.prompt(record), []
    frames = record.get("video") or []
    sources = [*record.get("images", []), *frames[::processor.temporal]]
    for source, (h, w) in list(zip(sources, tile_grids(prompt, processor.merge)))[:TILES]:
        cell = max(2, min(64, side // max(h, w)))
        image = source if isinstance(source, Image.Image) else Image.open(source)
        out.append(to_rgb(image).resize((w * cell, h * cell), Image.Resampling.BICUBIC))
    return out


# ---------------------------------------------------------------------------- the page's sections

def points(metrics: list[dict], name: str) -> list[tuple[float, float]]:
    """(step, value) of each step whose value exists and is finite."""
    return [(m["step"], m[name]) for m in metrics
            if isinstance(m.get(name), (int, float)) and math.isfinite(m[name])]


def result_section(run: Run) -> str:
    models = run.models()
    if not models:
        return missing("No accuracy yet: before.json and result.json are not there. The base and "
                       "the teacher are asked before the first step.")
    names = {"base": "base, no hint",
             "teacher": f"teacher, {run.args.get('privilege', '?')} as hint",
             "student": "student, no hint"}
    rows = {name: result_row(s) for name, s in models.items()}
    cards = ""
    for name, row in rows.items():
        accuracy, _, bounds = row["accuracy %"].partition(" ")
        cards += (f'<div class="card"><p>{escape(names[name])}</p><p class="big">{accuracy} %</p>'
                  f"<p>{bounds}</p></div>")
    gain = ""
    if {"base", "student"} <= set(models):
        points_won = 100 * (models["student"]["accuracy"] - models["base"]["accuracy"])
        gain = f"<p>Student minus base: <strong>{points_won:+.1f} points</strong>.</p>"
    late = "" if "student" in models else missing(
        "No student yet: result.json is written at the end.")
    plot = forest("f", "Accuracy with 95 % intervals",
                  {name: (s["accuracy"], s.get("interval")) for name, s in models.items()})
    columns = [k for k in next(iter(rows.values())) if any(row[k] != "-" for row in rows.values())]
    return f'<div class="cards">{cards}</div>{gain}{late}{plot}' + table(
        "Test answers, greedy. In brackets: 95 % intervals over questions (Wilson). Grounded: "
        "right, with evidence stated, all of it really in the picture.", ["model", *columns],
        [[name, *(row[k] for k in columns)] for name, row in rows.items()])


def result_row(s: dict) -> dict:
    """A summary as {column: cell}, a dash where it has no number."""
    def cell(name, show=str):
        return "-" if s.get(name) is None else show(s[name])
    return {"accuracy %": percent(s["accuracy"], s.get("interval")),
            "grounded %": cell("grounded", lambda x: percent(x, s.get("grounded_interval"))),
            "answers with \u201chint\u201d": cell("hint_rows"),
            "cut off %": cell("cut_off", percent), "unparsed %": cell("unparsed", percent),
            "length": cell("length", "{:.1f}".format), "n": cell("n")}


def curves_section(run: Run) -> str:
    if not run.metrics:
        return missing("No curves: metrics.jsonl has no step yet.")
    models = run.models()
    seen = points(run.metrics, "accuracy")
    ends = [(x, models[name]) for x, name in ((0, "base"), (run.metrics[-1]["step"], "student"))
            if name in models]
    line = sorted({**dict(seen), **{x: s["accuracy"] for x, s in ends}}.items())
    amid = ("" if run.args.get("dev_data", "test") == "test" else
            "; between the ends on the dev records")
    taught = models.get("teacher", {}).get("accuracy")
    levels = [] if taught is None else [(f"teacher {percent(taught)}", 100 * taught, "b")]
    charts = [
        chart("loss", "Loss, nats per response token",
              [("loss", points(run.metrics, "loss"), "a")]),
        chart("acc", f"Accuracy on the test records, %{amid}",
              [("student", [(x, 100 * y) for x, y in line], "a")], levels=levels, dots=True,
              form=".0f",
              bars=[(x, *(100 * v for v in s["interval"])) for x, s in ends if s.get("interval")]),
        chart("gap", "Log-prob, teacher minus student, of the sampled tokens",
              [("front half", points(run.metrics, "gap_front"), "a"),
               ("back half", points(run.metrics, "gap_back"), "b")]),
        chart("length", "Response length, tokens", [("length", points(run.metrics, "length"), "a")],
              form=".0f")]
    few = "" if seen else missing("No evaluations during training (--eval-every 0, or not "
                                  "reached): the accuracy has its ends only.")
    return ('<p>Thin: every step. Thick: running mean.</p>'
            f'<div class="charts">{"".join(charts)}</div>{few}'
            + (table(f"Accuracy while training, %{amid}. Step 0 is the base.", ["step", "accuracy"],
                     [[x, percent(y)] for x, y in line]) if line else ""))


def hints_section(run: Run) -> str:
    if not run.metrics:
        return missing("No counts: metrics.jsonl has no step yet.")
    size, note = run.args.get("batch_size", 0), ""
    records = run.records
    if not records or not size:
        note = missing(f"Not by epoch: {run.args.get('data') or 'the training records'} cannot be "
                       "read, so the length of an epoch is not known.")
        records, size = 10 ** 12, size or 1
    rows = epochs(run.metrics, records, size, run.args.get("samples_per_prompt", 1))
    cells = [[("all" if note else e["epoch"]) if e["whole"] or note else f"{e['epoch']} (part)",
              f"{e['first']} - {e['last']}", e["rollouts"], e["rows"], e["count"]] for e in rows]
    if len(rows) > 1:
        cells.append(["sum", "", *(sum(e[k] for e in rows) for k in ("rollouts", "rows", "count"))])
    caption = ("Rollouts with the word \u201chint\u201d, and how often it stands there (table 8 of "
               "the paper).")
    if not note:
        caption += f" An epoch is {records} records / {size} a step = {records / size:.1f} steps."
    return note + table(caption, ["epoch", "steps", "rollouts", "rows", "occurrences"], cells)


def answer_block(title: str, answer: Answer | None) -> str:
    """A coloured answer, and its tokens as a table for those who cannot point at them."""
    if answer is None:
        return f'<div class="said"><h4>{title}</h4>{missing("no model")}</div>'
    verdict = "right" if answer.correct else (
        "wrong" if answer.extracted is not None else "wrong: no answer found")
    verdict += "" if answer.stopped else ", cut off"
    n, lines = len(answer.pieces), ""
    for what in answer.read:
        tokens = answer.tokens(what)
        nats = sum(other - s for _, s, other in tokens)
        lines += (f'<p class="soft">{what}: {nats:+.2f} nats'
                  f'{" of privilege" if what == HINTED else ""}, {nats / n:+.3f} a token</p>'
                  f'<p class="answer">{token_spans(tokens[:TOKENS], what)}</p>')
    rows = [[repr(text)[1:-1] or "(none)", f"{s:.2f}", *(f"{other - s:+.2f}" for other in others)]
            for text, s, *others in zip(answer.pieces[:TOKENS], answer.student,
                                        *answer.read.values())]
    return (f'<div class="said"><h4>{title}: {verdict}, {n} tokens</h4>{lines}'
            + (missing(f"{n - TOKENS} more tokens are not shown.") if n > TOKENS else "")
            + "<details><summary>the tokens as a table</summary>"
            + table(f"Log-probs of each token, {title}: the student's, and by how much each of the "
                    "others is above it.", ["token", "student", *answer.read], rows, "tokens")
            + "</details></div>")


def rollouts_section(run: Run) -> str:
    note = "".join(missing(run.missing[k]) for k in ("models", "teacher") if k in run.missing)
    if not run.examples:
        return note or missing("No answers: the models were not asked (--records 0).")
    out = [note, "<p>The first test records, answered greedily now. Each answer stands there once "
           "for each other reader; a colour is how much more likely that reader finds the token "
           "than the student, in nats. Coloured only with the hint: the token hangs on this hint. "
           "The same with a wrong hint: any hint does it. Orange without the picture (the student "
           "itself): it was seen. Point at a token or touch it for its numbers.</p>", legend()]
    for example in run.examples:
        pictures, others = (
            "".join(image_tag(tile, f"Picture {n + 1} {whose}") for n, tile in enumerate(tiles))
            for tiles, whose in ((example.tiles, "of the question"),
                                 (example.shown, "as the teacher sees it")))
        said = "".join(answer_block(when.capitalize(), answer)
                       for when, answer in example.answers().items())
        out.append(f'<article><h3>{escape(example.title)}</h3><div class="asked">{pictures}'
                   f'<dl><dt>Answer</dt><dd>{escape(str(example.record["answer"]))}</dd>'
                   '<dt>Hint, for the teacher only</dt>'
                   f'<dd>{escape(example.told)}{others}</dd>'
                   '<dt>Wrong hint, of another record</dt>'
                   f'<dd>{escape(example.wrong or "none")}</dd></dl></div>'
                   f'<div class="both">{said}</div></article>')
    return "".join(out)


def attention_section(run: Run) -> str:
    if not run.args.get("cue_recovery", True):
        return missing("This run has no recovery module (--no-cue-recovery): nothing to see.")
    shown = [example for example in run.examples[:8] if example.has_maps()]
    if not shown:
        return missing(run.missing.get("models") or "No maps: the module was not run on a picture.")
    out = ["<p>What the sink token asks the picture for while the prompt is read: the share of its "
           "attention on each visual token, mean over the heads of a block. Darker is more, on one "
           "scale for all maps of a picture; framed: the strongest. Before training a new module's "
           "maps are those of random weights, and nothing of them reaches the student."
           + (" The sink stands before the question, so a map depends on the picture alone."
              if run.args.get("sink", "first") == "first" else "") + "</p>"]
    for example in shown:
        maps = "".join(attention_rows(tile, example.maps(n))
                       for n, tile in enumerate(example.tiles))
        out.append(f"<article><h3>{escape(example.title)}</h3>{maps}</article>")
    return "".join(out) + spread_table(shown)


def spread_table(examples: list[Example]) -> str:
    """How focused each block is, before and after: the mean spread over the pictures shown."""
    before, after = ([a for a in answers if a] for answers in
                     zip(*((e.before, e.after) for e in examples)))

    def of(answers, layer):
        found = [spread(a.maps[layer]) for a in answers if layer in a.maps]
        return f"{sum(found) / len(found):.1f}" if found else "-"
    layers = sorted({layer for a in before + after for layer in a.maps})
    tokens = [sum(m.numel() for m in next(iter(a.maps.values()))) for e in examples
              for a in (e.before or e.after,) if a.maps]
    return table("Over how many visual tokens a block's attention is spread (exp of the entropy of "
                 f"the maps above); evenly it would be {sum(tokens) / len(tokens):.1f}, the mean "
                 "number of visual tokens.", ["block at", "before", "after"],
                 [[f"layer {layer + 1}", of(before, layer), of(after, layer)]
                  for layer in layers])


def settings_section(run: Run) -> str:
    rows = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(str(value)) or "&ndash;"}'
                   f'</td><td class="soft">{escape(run.helps.get(name, ""))}</td></tr>'
                   for name, value in run.args.items())
    return ("<p>The command, from the settings that are not the defaults:</p>"
            f"<pre>{escape(run.command)}</pre>"
            + frame(f"All settings ({run.folder}/args.json).", ["setting", "value", "meaning"],
                    rows, "settings"))


def status(run: Run) -> str:
    done, steps = len(run.metrics), run.args.get("steps", "?")
    if run.result:
        seconds = run.result.get("seconds")
        added = run.result.get("parameters_added")
        return (f"Finished: {done} of {steps} steps"
                + (f", {seconds:.0f} s" if seconds else "")
                + (f"; the module adds {added:,} parameters" if added else "") + ".")
    return (f"Not finished: {done} of {steps} steps are logged. The run goes on, or was stopped; "
            f"{checkpoint.resume_command(run.folder)} goes on with a stopped one.")


SECTIONS = (("result", "Result", result_section), ("curves", "Curves", curves_section),
            ("hints", "The word \u201chint\u201d", hints_section),
            ("answers", "Answers, token by token", rollouts_section),
            ("attention", "Where the sink looks", attention_section),
            ("settings", "Settings", settings_section))


def page(run: Run) -> str:
    """The page. The policy in its head forbids the browser to request anything."""
    name = escape(run.args.get("name") or run.folder.name)
    links = "".join(f'<li><a href="#{key}">{escape(title)}</a></li>' for key, title, _ in SECTIONS)
    body = "".join(f'<section id="{key}"><h2>{escape(title)}</h2>{draw(run)}</section>'
                   for key, title, draw in SECTIONS)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Run {name}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><style>{STYLE}</style></head>
<body><header><h1>Run {name}</h1><p>{escape(status(run))}</p>
<nav aria-label="Sections"><ul>{links}</ul></nav></header>
<main>{body}</main>
<script>{SCRIPT}</script></body></html>
"""


# ---------------------------------------------------------------------------- pictures for a README

def write_pictures(run: Run, folder: Path) -> list[Path]:
    """Write attention.png and rollouts.png, from the first records that have them."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {}
    answered = [e for e in run.examples if e.before or e.after]
    if answered:
        pictures["rollouts.png"] = rollouts_picture([
            (f"{e.record['question']}   (answer: {e.record['answer']})",
             {f"{when}: {'right' if a.correct else 'wrong'}" if a else when: a and a.tokens()
              for when, a in e.answers().items()}) for e in answered[:2]])
    for example in answered:
        if example.has_maps():
            pictures["attention.png"] = attention_picture(example.tiles[0], example.maps(0))
            break
    if not pictures:
        raise ValueError(f"{run.folder}: no pictures without answers: "
                         f"{run.missing.get('models', 'ask some --records')}")
    for name, picture in pictures.items():
        # a palette makes it small: there are few colours, and a README is fetched often
        picture.quantize(255).save(folder / name, optimize=True)
    return [folder / name for name in pictures]


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="the folder of a run")
    parser.add_argument("--out", default="", help="the page to write (default: RUN/report.html)")
    parser.add_argument("--records", type=int, default=4, help="test records to ask, 0 for none")
    parser.add_argument("--max-new-tokens", type=int, default=0,
                        help="of an answer; 0 for the run's own, at most 1024")
    parser.add_argument("--pictures", default="", metavar="FOLDER",
                        help="also draw attention.png and rollouts.png there")
    parser.add_argument("--device", default="", help="(default: the run's own)")
    parser.add_argument("--dtype", default="", help="(default: the run's own)")
    args = parser.parse_args(argv)
    quiet()
    with one_line("report.py"):
        report(args)


def report(args) -> None:
    run = read_run(args.run)
    if args.records > 0:
        ask_models(run, args.records, args.max_new_tokens, args.device, args.dtype)
    out = Path(args.out or run.folder / "report.html")
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_text(out, page(run))
    for reason in run.missing.values():
        print(f"missing: {reason}")
    print(f"{out}: {out.stat().st_size / 1e6:.2f} MB")
    if args.pictures:
        for path in write_pictures(run, Path(args.pictures)):
            print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
