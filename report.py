"""report.py - one run as one page: what changed, token by token and cell by cell.

The idea.  A table says that a student got better; it does not say how. Two pictures do. Every token
of an answer is coloured by what the teacher thinks of it, and the picture is covered with what the
sink token asks it for, both before training and after. The page is one file: no network, no
library, nothing to install to read it, and it can be mailed.

In:  the folder of a run, finished, killed or still running; its models, if they can be loaded.
Out: an HTML file; with --pictures also attention.png and rollouts.png for a README.

The one equation (the colour of token n; what training pulls to zero on average):
    log p_T(y_n | picture, question, hint, y_<n) - log p_theta(y_n | picture, question, y_<n)

Run  python evaluate.py report runs/NAME --out report.html
     python evaluate.py report runs/NAME --pictures docs/

Choices a reader may wonder about
1) The answers are given now, greedily (as evaluate.py asks), by the run's starting model and by its
   checkpoint, to the first records of its test file: not picked. Training samples at a temperature.
2) "Before" is the start as distill.py builds it, so the module has the weights drawn with the run's
   seed. It adds nothing then (W_O = 0), yet its attention is defined: that is the map shown.
3) What is missing (no checkpoint yet, a data file that moved) is named on the page, the rest shown.
4) Sign is never told by colour alone: a solid underline is more likely to the teacher, dotted less.

Use it alone: imports torch and pillow; asking the models needs the files beside it.
Left out: anything interactive but tooltips; the attention of single heads (maps are their mean).
"""
from __future__ import annotations

import argparse
import base64
import io
import math
import shlex
from dataclasses import dataclass, field, fields
from html import escape
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

# Dimension letters: T response tokens, H heads, h x w visual tokens of a picture, V vocabulary.

LEVELS = (0.1, 0.5, 1.5, 4.0)        # nats of difference from which a token is coloured stronger
TOKENS = 1000                        # of an answer are shown: a page must stay a page
TILES = 2                            # pictures of one record
INK = ((17, 17, 17), (255, 255, 255))     # text, and the rim that keeps it readable on anything
MORE = ((222, 235, 247), (179, 211, 238), (127, 181, 224), (88, 154, 208))     # blue
LESS = ((253, 235, 213), (253, 207, 156), (249, 169, 92), (232, 131, 58))      # orange
HEAT = (106, 27, 154)                # violet: no shape of the toy world has it


@dataclass
class Answer:
    """What one model says to one record. Lists have an entry a token.

    pieces    texts of the tokens; joined, the answer's text
    student, teacher   log-probs of the tokens, the teacher's with the hint
    maps      {layer: [(h, w) attention of the sink, mean over heads, one a picture]}
    """
    pieces: list[str]
    student: list[float]
    teacher: list[float]
    correct: bool = False
    extracted: str | None = None
    stopped: bool = True
    maps: dict = field(default_factory=dict)

    @property
    def text(self) -> str:
        return "".join(self.pieces)


@dataclass
class Example:
    """A test record with the answers before and after training; None where there is no model."""
    record: dict
    hint: str | None
    tiles: list[Image.Image]
    before: Answer | None = None
    after: Answer | None = None


@dataclass
class Run:
    """All that the page shows. missing: {section: why it is not whole}."""
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
        """{base, teacher, student: summary as evaluate.summarise gives it}, what there is."""
        found = {name: self.before[name] for name in ("base", "teacher") if name in self.before}
        student = {key[8:]: value for key, value in self.result.items()
                   if key.startswith("student_")}
        return found | ({"student": {**student, "n": self.result.get("n")}} if student else {})


# ---------------------------------------------------------------------------- from the run's folder

def read_run(folder) -> Run:
    """The files of a run, whichever there are. Raises OSError or ValueError if it is none."""
    from checkpoint import read_run as read_files
    run = Run(Path(folder), **read_files(folder))
    data = Path(run.args.get("data") or ".")
    if data.is_file():
        with open(data, "rb") as lines:
            run.records = sum(bool(line.strip()) for line in lines)
    run.command, run.helps = command_line(run.args)
    return run


def command_line(args: dict) -> tuple[str, dict[str, str]]:
    """The command that gives these settings, and each setting's help text."""
    from distill import HERE, TOY, Config
    plain, words = {f.name: f.default for f in fields(Config)}, ["python", "distill.py"]
    if args.get("student") == plain["student"]:
        plain |= TOY
    for name, value in args.items():
        toy = name in ("data", "eval_data") and Path(str(value)).parent == HERE / "data" / "toy"
        if name not in plain or value == plain[name] or toy:
            continue
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else "--no-" + flag[2:])
        else:
            words += [flag, str(value)]
    return shlex.join(words), {f.name: f.metadata["help"] for f in fields(Config)}


def epochs(metrics: list[dict], records: int, batch_size: int, samples: int = 1) -> list[dict]:
    """Hint counts by epoch, of `samples` answers a prompt. A step belongs to its first prompt's epoch.

    >>> epochs([{"step": s, "hint_rows": 1, "hint_count": 2} for s in (1, 2, 3)], 8, 4)
    [{'epoch': 1, 'first': 1, 'last': 2, 'rollouts': 8, 'rows': 2, 'count': 4, 'whole': True}, \
{'epoch': 2, 'first': 3, 'last': 3, 'rollouts': 4, 'rows': 1, 'count': 2, 'whole': False}]
    """
    out = []
    for m in metrics:
        epoch = (m["step"] - 1) * batch_size // records + 1
        if not out or out[-1]["epoch"] != epoch:
            out.append({"epoch": epoch, "first": m["step"], "last": m["step"], "rollouts": 0,
                        "rows": 0, "count": 0, "whole": False})
        now = out[-1]
        now["last"] = m["step"]
        now["rollouts"] += batch_size * samples
        now["rows"] += m.get("hint_rows", 0)
        now["count"] += m.get("hint_count", 0)
        now["whole"] = m["step"] * batch_size >= epoch * records
    return out


# ---------------------------------------------------------------------------- from the run's models

def ask_models(run: Run, count: int, max_new_tokens: int = 0, device: str = "",
               dtype: str = "") -> None:
    """Fill run.examples with the first `count` test records, asked before and after training.

    Whatever cannot be had is named in run.missing: a page about a killed run is still a page.
    """
    import distill
    import teacher as teaching
    from data import records as record_files
    from evaluate import with_frames
    from model import load
    config = distill.Config(**{f.name: run.args[f.name] for f in fields(distill.Config)
                               if f.name in run.args})
    if not torch.cuda.is_available():        # a run of another machine, looked at on this one
        config.device = "" if config.device.startswith("cuda") else config.device
        config.attention = config.attention.replace("flash_attention_2", "sdpa")
    config.device, config.dtype = device or config.device, dtype or config.dtype
    limit = max_new_tokens or min(config.max_new_tokens, 1024)
    needs = () if config.privilege == "none" else (config.privilege,)
    try:
        records = [with_frames(r) for r in record_files.load(config.eval_data, needs)[:count]]
        start, teacher, processor = distill.build_models(config)
        if config.teacher == "ema":
            load_averaged(teacher, run)
        run.examples = [Example(r, teaching.hint(r, config.privilege), tiles_of(r, processor))
                        for r in records]
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
    import longrun
    from checkpoint import load_state
    try:
        _, tensors = load_state(run.folder / "state")
    except OSError:
        run.missing["teacher"] = ("The averaged teacher has no saved state: the log-probs are "
                                  "those of the teacher at the start.")
        return
    longrun.load_averaged(teacher, tensors)


@torch.no_grad()
def answer(student, teacher, processor, example: Example, max_new_tokens: int) -> Answer:
    """One record's greedy answer, scored by both, and where the sink looked while it was read."""
    from evaluate import judge
    from rollout import sample
    prompt = processor.prompt(example.record)
    batch = processor.batch([prompt], device=student.device)
    cue = getattr(student, "cue_recovery", None)
    kept = cue is not None and cue.keep_attention
    try:
        if cue is not None:
            cue.keep_attention = True
        got = sample(student, batch, max_new_tokens=max_new_tokens, temperature=0,
                     **processor.sampling)
        visual = (batch["input_ids"][0] == processor.image_id) | (
            batch["input_ids"][0] == processor.video_id)
        grids = tile_grids(prompt, processor.merge)
        # decoding leaves the maps of the prefill alone; without a picture there are none
        maps = {} if cue is None else {layer: split(a[0].float().mean(0)[visual].cpu(), grids)
                                       for layer, a in sorted(cue.attention.items())}
    finally:
        if cue is not None:
            cue.keep_attention = kept
    ids = got.ids[0, :int(got.lengths[0])]                                               # (T,)
    hinted = processor.prompt(example.record, example.hint, seen=prompt)
    verdict = judge(example.record, processor.decode(ids), bool(got.stopped[0]), len(ids))
    return Answer(pieces(ids.tolist(), processor.decode),
                  token_logprobs(student, processor, prompt, ids),
                  token_logprobs(teacher, processor, hinted, ids), verdict["correct"],
                  verdict["extracted"], verdict["stopped"], maps)


@torch.no_grad()
def token_logprobs(model, processor, prompt, ids: torch.Tensor, chunk: int = 128) -> list[float]:
    """log p of every response token ids (T,) behind `prompt`, at temperature 1, nothing banned."""
    from distill import response_states          # the very states that training scores
    hidden = response_states(model, processor, [prompt], [0], ids[None],
                             torch.ones_like(ids[None], dtype=torch.bool))               # (T, D)
    out = []
    for start in range(0, len(ids), chunk):         # (T, V) logits of a long answer are gigabytes
        part = slice(start, start + chunk)
        logits = model.lm_head(hidden[part]).float()
        out += logits.log_softmax(-1).gather(1, ids[part, None])[:, 0].tolist()
    return out


def pieces(ids: list[int], decode) -> list[str]:
    """The text of each token, such that they join to decode(ids).

    A character may be cut across tokens; it goes whole to the token that completes it, and those
    before it are empty, as a stop token is.
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
    """(h, w) visual tokens of each picture, and of each moment of a video, in prompt order."""
    grids = [*prompt.grids, *prompt.video_grids]
    return [(h // merge, w // merge) for t, h, w in grids for _ in range(t)]


def split(attention: torch.Tensor, grids: list[tuple[int, int]]) -> list[torch.Tensor]:
    """Attention over all visual tokens, in reading order, as one (h, w) map a picture."""
    if len(attention) != sum(h * w for h, w in grids):
        raise ValueError(f"{len(attention)} visual tokens, but grids of {grids}: was the prompt "
                         "cut?")
    return [part.view(grid) for part, grid in
            zip(attention.split([h * w for h, w in grids]), grids)]


def tiles_of(record: dict, processor, side: int = 256) -> list[Image.Image]:
    """The first pictures of a record as the model sees them: stretched to whole visual tokens."""
    from model import to_rgb
    prompt, out = processor.prompt(record), []
    frames = record.get("video") or []
    sources = [*record.get("images", []), *frames[::processor.temporal]]
    for source, (h, w) in list(zip(sources, tile_grids(prompt, processor.merge)))[:TILES]:
        cell = max(2, min(64, side // max(h, w)))
        image = source if isinstance(source, Image.Image) else Image.open(source)
        out.append(to_rgb(image).resize((w * cell, h * cell), Image.Resampling.BICUBIC))
    return out


# ---------------------------------------------------------------------------- drawing: the picture

def mean_maps(maps: dict) -> list[torch.Tensor]:
    """The mean over blocks, one map a picture."""
    return [torch.stack(same).mean(0) for same in zip(*maps.values())]


def overlay(tile: Image.Image, attention: torch.Tensor, top: float) -> Image.Image:
    """The picture, paled and greyed, under the attention (h, w); the share `top` is painted full.

    The strongest cell has a frame; where cells are large enough each has its share in percent.
    """
    h, w = attention.shape
    cell = tile.width // w
    grey = Image.blend(tile, tile.convert("L").convert("RGB"), 0.7)     # so that violet stands out
    pale = Image.blend(grey, Image.new("RGB", tile.size, "white"), 0.4)
    mask = (attention / max(top, 1e-9)).clamp(0, 1).mul(0.8 * 255).round().to(torch.uint8)
    mask = Image.fromarray(mask.numpy(), "L").resize(tile.size, Image.Resampling.NEAREST)
    out = Image.composite(Image.new("RGB", tile.size, HEAT), pale, mask)
    pen, best = ImageDraw.Draw(out), int(attention.argmax())
    if cell >= 32:
        font = ImageFont.load_default(size=cell // 3)
        for n, part in enumerate(attention.flatten().tolist()):
            x, y = n % w * cell + cell // 2, n // w * cell + cell // 2
            pen.text((x, y), f"{100 * part:.0f}", INK[0], font, anchor="mm", stroke_width=2,
                     stroke_fill=INK[1])
    x, y = best % w * cell, best // w * cell
    pen.rectangle((x, y, x + cell - 1, y + cell - 1), outline=INK[0], width=max(1, cell // 20))
    return out


def peak(attention: torch.Tensor) -> str:
    """Where most of it goes, in words."""
    best, w = int(attention.argmax()), attention.shape[1]
    return (f"most at row {best // w + 1}, column {best % w + 1}: "
            f"{100 * float(attention.flatten()[best]):.0f} %")


def spread(maps: list[torch.Tensor]) -> float:
    """exp(entropy): over how many visual tokens the attention is spread, as if evenly."""
    p = torch.cat([m.flatten() for m in maps]).double()
    return float(torch.special.entr(p).sum().exp())


def image_tag(image: Image.Image, alt: str) -> str:
    """The picture inside the page, as PNG or JPEG, whichever is shorter."""
    best = None
    for kind, options in (("png", {}), ("jpeg", {"quality": 85})):
        out = io.BytesIO()
        image.save(out, kind, **options)
        best = min(best or (kind, out.getvalue()), (kind, out.getvalue()), key=lambda x: len(x[1]))
    data = base64.b64encode(best[1]).decode()
    return (f'<img src="data:image/{best[0]};base64,{data}" alt="{escape(alt)}" '
            f'width="{image.width}" height="{image.height}">')


# ---------------------------------------------------------------------------- drawing: curves

def points(metrics: list[dict], name: str) -> list[tuple[float, float]]:
    """(step, value) wherever the value is there and finite."""
    return [(m["step"], m[name]) for m in metrics
            if isinstance(m.get(name), (int, float)) and math.isfinite(m[name])]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from below `low` to above `high`.

    >>> ticks(0, 0.93)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    rough = (high - low) / count or abs(high) or 1
    unit = 10 ** math.floor(math.log10(rough))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def smooth(line: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """A running mean over about a fifteenth of the points; short lines are left as they are."""
    half = len(line) // 30
    out = []
    for i, (x, _) in enumerate(line):
        part = [y for _, y in line[max(0, i - half):i + half + 1]]
        out.append((x, sum(part) / len(part)))
    return out


def chart(key: str, title: str, lines: list[tuple], *, levels=(), bars=(), dots=False,
          form: str = ".3g") -> str:
    """One inline SVG. lines: (name, [(x, y)], class); levels: (name, y, class), drawn across;

    bars: (x, low, high). Classes a and b differ in colour and in dashes.
    """
    lines = [line for line in lines if line[1]]
    if not lines:
        return f'<p class="missing">{escape(title)}: no values in metrics.jsonl.</p>'
    W, H, left, right, top, bottom = 360, 220, 46, 12, 30, 34
    ys = [y for _, line, _ in lines for _, y in line] + [y for _, y, _ in levels]
    ys += [y for _, *ends in bars for y in ends]
    xs = [x for _, line, _ in lines for x, _ in line]
    marks, steps = ticks(min(ys), max(ys)), ticks(min(xs), max(xs))
    steps = [s for s in steps if s <= max(xs)]
    x_low, x_high = min(min(xs), steps[0]), max(xs)

    def px(x):
        return left + (x - x_low) / ((x_high - x_low) or 1) * (W - left - right)

    def py(y):
        return H - bottom - (y - marks[0]) / (marks[-1] - marks[0]) * (H - top - bottom)

    out = [f'<line class="grid" x1="{left}" x2="{W - right}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>'
           f'<text x="{left - 6}" y="{py(y) + 4:.1f}" text-anchor="end">{y:{form}}</text>'
           for y in marks]
    out += [f'<text x="{px(x):.1f}" y="{H - bottom + 16}" text-anchor="middle">{x:g}</text>'
            for x in steps]
    out.append(f'<text x="{W - right}" y="{H - 4}" text-anchor="end" class="soft">step</text>')
    for name, y, kind in levels:
        out.append(f'<line class="line {kind}" x1="{left}" x2="{W - right}" y1="{py(y):.1f}" '
                   f'y2="{py(y):.1f}"/><text x="{W - right}" y="{py(y) - 5:.1f}" text-anchor="end" '
                   f'class="on">{escape(name)}</text>')
    for x, low, high in bars:
        out.append(f'<line class="line a" x1="{px(x):.1f}" x2="{px(x):.1f}" y1="{py(low):.1f}" '
                   f'y2="{py(high):.1f}"/>')
    for n, (name, line, kind) in enumerate(lines):
        for which, style in ((line, "raw"), (smooth(line), "line")):
            path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in which)
            out.append(f'<polyline class="{style} {kind}" points="{path}"/>')
        if dots or len(line) < 3:
            out += [f'<circle class="{kind}" cx="{px(x):.1f}" cy="{py(y):.1f}" r="3.5"/>'
                    for x, y in line]
        if len(lines) > 1:
            x = left + 110 * n
            out.append(f'<line class="line {kind}" x1="{x}" x2="{x + 26}" y1="14" y2="14"/>'
                       f'<text x="{x + 32}" y="18">{escape(name)}</text>')
    said = "; ".join(f"{name} from {line[0][1]:{form}} at step {line[0][0]:g} to "
                     f"{line[-1][1]:{form}} at step {line[-1][0]:g}, between "
                     f"{min(y for _, y in line):{form}} and {max(y for _, y in line):{form}}"
                     for name, line, _ in lines)
    said += "".join(f"; {name}" for name, _, _ in levels)
    return (f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
            f'<svg viewBox="0 0 {W} {H}" role="img" aria-labelledby="{key}-t {key}-d">'
            f'<title id="{key}-t">{escape(title)}</title><desc id="{key}-d">{escape(said)}</desc>'
            + "".join(out) + "</svg></figure>")


def forest(models: dict[str, dict]) -> str:
    """Accuracies as points on one scale from 0 to 100 %, with their intervals."""
    H, left, W = 34 * len(models) + 26, 70, 360

    def px(share):
        return left + share * (W - left - 16)

    out = [f'<line class="grid" x1="{px(s / 4)}" x2="{px(s / 4)}" y1="4" y2="{H - 22}"/>'
           f'<text x="{px(s / 4)}" y="{H - 6}" text-anchor="middle">{25 * s}</text>'
           for s in range(5)]
    for n, (name, s) in enumerate(models.items()):
        y, (low, high) = 22 + 34 * n, s.get("interval") or (s["accuracy"],) * 2
        out.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{name}</text>'
                   f'<line class="line a solid" x1="{px(low):.1f}" x2="{px(high):.1f}" y1="{y}" '
                   f'y2="{y}"/><circle class="a" cx="{px(s["accuracy"]):.1f}" cy="{y}" r="5"/>')
    said = "; ".join(f"{name} {share(s['accuracy'], s.get('interval'))} %"
                     for name, s in models.items())
    return (f'<figure class="chart"><svg viewBox="0 0 {W} {H}" role="img" '
            'aria-labelledby="f-t f-d"><title id="f-t">Accuracy with 95 % intervals</title>'
            f'<desc id="f-d">{escape(said)}</desc>' + "".join(out) + "</svg></figure>")


# ---------------------------------------------------------------------------- the page's sections

def share(value: float, bounds=None) -> str:
    """A share in percent.

    >>> share(0.5, (0.404, 0.596))
    '50.0 [40.4, 59.6]'
    """
    return f"{100 * value:.1f}" + (f" [{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]"
                                   if bounds else "")


def table(caption: str, head: list[str], rows: list[list], kind: str = "") -> str:
    """An HTML table; the first cell of a row is its heading. Cells are text, escaped here."""
    body = "".join("<tr>" + "".join(
        f'<th scope="row">{escape(str(c))}</th>' if n == 0 else f"<td>{escape(str(c))}</td>"
        for n, c in enumerate(row)) + "</tr>" for row in rows)
    return (f'<div class="scroll"><table class="{kind}"><caption>{escape(caption)}</caption>'
            "<thead><tr>"
            + "".join(f'<th scope="col">{escape(h)}</th>' for h in head)
            + f"</tr></thead><tbody>{body}</tbody></table></div>")


def absent(text: str) -> str:
    return f'<p class="missing">{escape(text)}</p>'


def result_section(run: Run) -> str:
    models = run.models()
    if not models:
        return absent("No accuracy yet: before.json and result.json are not there. The base and "
                      "the teacher are asked before the first step.")
    names = {"base": "base, no hint",
             "teacher": f"teacher, {run.args.get('privilege', '?')} as hint",
             "student": "student, no hint"}
    cards = "".join(f'<div class="card"><p>{escape(names[name])}</p><p class="big">'
                    f'{share(s["accuracy"])} %</p><p>{share(s["accuracy"], s.get("interval"))[5:]}'
                    "</p></div>" for name, s in models.items())
    gain = ""
    if {"base", "student"} <= set(models):
        points_won = 100 * (models["student"]["accuracy"] - models["base"]["accuracy"])
        gain = f"<p>Student minus base: <strong>{points_won:+.1f} points</strong>.</p>"
    columns = {"accuracy %": lambda s: share(s["accuracy"], s.get("interval")),
               "grounded %": lambda s: share(s["grounded"], s.get("grounded_interval"))
               if s.get("grounded") is not None else "-",
               "answers with \u201chint\u201d": lambda s: s.get("hint_rows", "-"),
               "cut off %": lambda s: share(s["cut_off"]) if "cut_off" in s else "-",
               "unparsed %": lambda s: share(s["unparsed"]) if "unparsed" in s else "-",
               "length": lambda s: f"{s['length']:.1f}" if "length" in s else "-",
               "n": lambda s: s.get("n", "-")}
    columns = {k: f for k, f in columns.items() if any(f(s) != "-" for s in models.values())}
    late = "" if "student" in models else absent(
        "No student yet: result.json is written at the end.")
    return f'<div class="cards">{cards}</div>{gain}{late}{forest(models)}' + table(
        "Test answers, greedy. In brackets: 95 % intervals over questions (Wilson). Grounded: "
        "right, with evidence stated, all of it really in the picture.", ["model", *columns],
        [[name, *(f(s) for f in columns.values())] for name, s in models.items()])


def curves_section(run: Run) -> str:
    if not run.metrics:
        return absent("No curves: metrics.jsonl has no step yet.")
    models = run.models()
    seen = points(run.metrics, "accuracy")
    ends = [(x, models[name]) for x, name in ((0, "base"), (run.metrics[-1]["step"], "student"))
            if name in models]
    line = sorted({**dict(seen), **{x: s["accuracy"] for x, s in ends}}.items())
    taught = models.get("teacher", {}).get("accuracy")
    levels = [] if taught is None else [(f"teacher {share(taught)}", 100 * taught, "b")]
    charts = [
        chart("loss", "Loss, nats per response token",
              [("loss", points(run.metrics, "loss"), "a")]),
        chart("acc", "Accuracy on the test records, %",
              [("student", [(x, 100 * y) for x, y in line], "a")], levels=levels, dots=True,
              form=".0f",
              bars=[(x, *(100 * v for v in s["interval"])) for x, s in ends if s.get("interval")]),
        chart("gap", "Log-prob, teacher minus student, of the sampled tokens",
              [("front half", points(run.metrics, "gap_front"), "a"),
               ("back half", points(run.metrics, "gap_back"), "b")]),
        chart("length", "Response length, tokens", [("length", points(run.metrics, "length"), "a")],
              form=".0f")]
    few = "" if seen else absent("No evaluations during training (--eval-every 0, or not reached): "
                                 "the accuracy has its ends only.")
    return ('<p>Thin: every step. Thick: running mean.</p>'
            f'<div class="charts">{"".join(charts)}</div>{few}'
            + (table("Accuracy while training, %. Step 0 is the base.", ["step", "accuracy"],
                     [[x, share(y)] for x, y in line]) if line else ""))


def hints_section(run: Run) -> str:
    if not run.metrics:
        return absent("No counts: metrics.jsonl has no step yet.")
    size, note = run.args.get("batch_size", 0), ""
    records = run.records
    if not records or not size:
        note = absent(f"Not by epoch: {run.args.get('data') or 'the training records'} cannot be "
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


def level(gap: float) -> str:
    """The CSS class of a difference: p1..p4 above zero, n1..n4 below, z about zero."""
    n = sum(abs(gap) >= edge for edge in LEVELS)
    return "z" if n == 0 else f"{'p' if gap > 0 else 'n'}{n}"


def token_spans(answer: Answer) -> str:
    """The answer's text in coloured spans; the text inside them joins to the answer."""
    out = []
    for text, s, t in list(zip(answer.pieces, answer.student, answer.teacher))[:TOKENS]:
        out.append(f'<span class="t {level(t - s)}" title="teacher {t:.2f}, student {s:.2f}, '
                   f'difference {t - s:+.2f}">{escape(text)}</span>')
    return "".join(out)


def answer_block(title: str, answer: Answer | None) -> str:
    if answer is None:
        return f'<div class="said"><h4>{title}</h4>{absent("no model")}</div>'
    verdict = "right" if answer.correct else (
        "wrong" if answer.extracted is not None else "wrong: no answer found")
    verdict += "" if answer.stopped else ", cut off"
    gaps = [t - s for s, t in zip(answer.student, answer.teacher)]
    more = len(gaps) - TOKENS
    rows = [[repr(text)[1:-1] or "(none)", f"{t:.2f}", f"{s:.2f}", f"{t - s:+.2f}"]
            for text, s, t in list(zip(answer.pieces, answer.student, answer.teacher))[:TOKENS]]
    return (f'<div class="said"><h4>{title}: {verdict}</h4>'
            f'<p class="answer">{token_spans(answer)}</p>'
            + (absent(f"{more} more tokens are not shown.") if more > 0 else "")
            + f'<p class="soft">mean difference {sum(gaps) / len(gaps):+.3f} nats a token, '
            f"{len(gaps)} tokens</p><details><summary>the tokens as a table</summary>"
            + table(f"Log-probs of each token, {title}.", ["token", "teacher", "student",
                                                           "difference"], rows, "tokens")
            + "</details></div>")


def legend() -> str:
    a, b, c, d = (f"{edge:g}" for edge in LEVELS)
    less = [f"below -{d}", f"-{d} to -{c}", f"-{c} to -{b}", f"-{b} to -{a}"]
    more = [f"+{a} to +{b}", f"+{b} to +{c}", f"+{c} to +{d}", f"above +{d}"]
    parts = [f'<span class="t n{4 - n}">{text}</span>' for n, text in enumerate(less)]
    parts.append(f'<span class="t z">-{a} to +{a}</span>')
    parts += [f'<span class="t p{n + 1}">{text}</span>' for n, text in enumerate(more)]
    return ('<p class="legend"><span>Less likely to the teacher (orange, dotted line):</span> '
            + " ".join(parts).replace("-", "\u2212")
            + " <span>more likely (blue, solid line). \u25aa is the stop token.</span></p>")


def rollouts_section(run: Run) -> str:
    note = "".join(absent(run.missing[k]) for k in ("models", "teacher") if k in run.missing)
    if not run.examples:
        return note or absent("No answers: the models were not asked (--records 0).")
    out = [note, "<p>The first test records, answered greedily now. Each token is coloured by "
           "teacher minus student log-prob of that token, in nats; the teacher reads the hint, the "
           "student does not. Point at a token or touch it for both.</p>", legend()]
    for example in run.examples:
        record = example.record
        out.append(
            f'<article><h3>{escape(str(record["id"]))}: {escape(record["question"])}</h3>'
            '<div class="asked">'
            + "".join(image_tag(tile, f"Picture {n + 1} of the question")
                      for n, tile in enumerate(example.tiles))
            + f'<dl><dt>Answer</dt><dd>{escape(str(record["answer"]))}</dd>'
            '<dt>Hint, for the teacher only</dt>'
            f'<dd>{escape(example.hint or "none")}</dd></dl></div><div class="both">'
            + answer_block("Before training", example.before)
            + answer_block("After training", example.after) + "</div></article>")
    return "".join(out)


def attention_section(run: Run) -> str:
    if not run.args.get("cue_recovery", True):
        return absent("This run has no recovery module (--no-cue-recovery): nothing to see.")
    shown = [e for e in run.examples[:8] if e.tiles and any(
        a is not None and a.maps for a in (e.before, e.after))]
    if not shown:
        return absent(run.missing.get("models") or "No maps: the module was not run on a picture.")
    out = ["<p>What the sink token asks the picture for while the prompt is read: the share of its "
           "attention on each visual token, mean over the heads of a block. Darker is more, on one "
           "scale for all maps of a picture; framed: the strongest. Before training a new module's "
           "maps are those of random weights, and nothing of them reaches the student."
           + (" The sink stands before the question, so a map depends on the picture alone."
              if run.args.get("sink", "first") == "first" else "") + "</p>"]
    for example in shown:
        out.append(f"<article><h3>{escape(str(example.record['id']))}: "
                   f"{escape(example.record['question'])}</h3>")
        for n, tile in enumerate(example.tiles):
            out.append(map_rows(example, n, tile))
        out.append("</article>")
    return "".join(out) + spread_table(shown)


def top_share(example: Example, n: int) -> float:
    """The largest share in any map of picture n: painted full, so that before and after compare."""
    return max(float(maps[n].max()) for a in (example.before, example.after) if a is not None
               for maps in a.maps.values())


def map_rows(example: Example, n: int, tile: Image.Image) -> str:
    """One picture: a row of maps before training and one after."""
    top, out = top_share(example, n), []
    for title, answer in (("before", example.before), ("after", example.after)):
        if answer is None or not answer.maps:
            out.append(absent(f"{title} training: no module"))
            continue
        blocks = [(f"block at layer {layer + 1}", maps[n]) for layer, maps in answer.maps.items()]
        blocks.append(("mean of blocks", mean_maps(answer.maps)[n]))
        figures = [f'<figure>{image_tag(tile, "The picture")}<figcaption>the picture</figcaption>'
                   "</figure>"]
        for name, m in blocks:
            alt = f"Sink attention {title} training, {name}: {peak(m)}"
            figures.append(f"<figure>{image_tag(overlay(tile, m, top), alt)}<figcaption>{name}<br>"
                           f"{peak(m)}</figcaption></figure>")
        out.append(f'<h4>{title.capitalize()} training</h4>'
                   f'<div class="maps">{"".join(figures)}</div>')
    return "".join(out)


def spread_table(examples: list[Example]) -> str:
    """How focussed each block is: its spread before and after, mean over the pictures shown."""
    def of(which, layer):
        found = [spread(a.maps[layer]) for e in examples
                 if (a := getattr(e, which)) is not None and layer in a.maps]
        return f"{sum(found) / len(found):.1f}" if found else "-"
    layers = sorted({layer for e in examples for a in (e.before, e.after) if a for layer in a.maps})
    tokens = [sum(m.numel() for m in next(iter(a.maps.values()))) for e in examples
              for a in (e.before or e.after,) if a.maps]
    return table("Over how many visual tokens a block's attention is spread (exp of the entropy of "
                 f"the maps above); evenly it would be {sum(tokens) / len(tokens):.1f}, the mean "
                 "number of visual tokens.", ["block at", "before", "after"],
                 [[f"layer {layer + 1}", of("before", layer), of("after", layer)]
                  for layer in layers])


def settings_section(run: Run) -> str:
    rows = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(str(value)) or "&ndash;"}'
                   f'</td><td class="soft">{escape(run.helps.get(name, ""))}</td></tr>'
                   for name, value in run.args.items())
    return ("<p>The command, from the settings that are not the defaults:</p>"
            f"<pre>{escape(run.command)}</pre>"
            '<div class="scroll"><table class="settings"><caption>All settings '
            f'({escape(str(run.folder))}/args.json).</caption><thead><tr><th scope="col">setting'
            '</th><th scope="col">value</th><th scope="col">meaning</th></tr></thead>'
            f"<tbody>{rows}</tbody></table></div>")


def status(run: Run) -> str:
    done, steps = len(run.metrics), run.args.get("steps", "?")
    if run.result:
        seconds = run.result.get("seconds")
        added = run.result.get("parameters_added")
        return (f"Finished: {done} of {steps} steps"
                + (f", {seconds:.0f} s" if seconds else "")
                + (f"; the module adds {added:,} parameters" if added else "") + ".")
    return (f"Not finished: {done} of {steps} steps are logged. The run goes on, or was stopped; "
            f"python distill.py --resume {run.folder} goes on with a stopped one.")


SECTIONS = (("result", "Result", result_section), ("curves", "Curves", curves_section),
            ("hints", "The word \u201chint\u201d", hints_section),
            ("answers", "Answers, token by token", rollouts_section),
            ("attention", "Where the sink looks", attention_section),
            ("settings", "Settings", settings_section))


def page(run: Run) -> str:
    """The whole page. The policy in its head forbids the browser any request."""
    name = escape(run.args.get("name") or run.folder.name)
    links = "".join(f'<li><a href="#{key}">{escape(title)}</a></li>' for key, title, _ in SECTIONS)
    body = "".join(f'<section id="{key}"><h2>{escape(title)}</h2>{draw(run)}</section>'
                   for key, title, draw in SECTIONS)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Run {name}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><style>{STYLE}{token_style()}</style></head>
<body><header><h1>Run {name}</h1><p>{escape(status(run))}</p>
<nav aria-label="Sections"><ul>{links}</ul></nav></header>
<main>{body}</main>
<script>{SCRIPT}</script></body></html>
"""


# ---------------------------------------------------------------------------- how it looks

DARK_MORE = ((22, 50, 74), (29, 74, 112), (36, 95, 145), (40, 110, 170))
DARK_LESS = ((64, 41, 15), (97, 58, 14), (130, 75, 14), (160, 88, 12))


def token_style() -> str:
    """The diverging scale in CSS, for light and for dark pages."""
    def rules(more, less):
        return "".join(f".{letter}{n + 1}{{background:rgb{colour};border-bottom:2px {line}}}"
                       for letter, scale, line in (("p", more, "solid"), ("n", less, "dotted"))
                       for n, colour in enumerate(scale))
    dark = rules(DARK_MORE, DARK_LESS)
    return rules(MORE, LESS) + "@media(prefers-color-scheme:dark){" + dark + "}"


STYLE = """
:root{--bg:#fff;--ink:#1a1a1a;--soft:#595959;--line:#d0d0d0;--panel:#f5f5f3;--a:#1f5fa8;--b:#a84f00}
@media(prefers-color-scheme:dark){:root{--bg:#16181b;--ink:#e8e8e6;--soft:#a9adb3;--line:#43474d;
--panel:#212429;--a:#7db4ee;--b:#f0a04b}}
*{box-sizing:border-box}
body{margin:0 auto;padding:16px;max-width:1100px;background:var(--bg);color:var(--ink);
font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.7rem;line-height:1.2;margin:.4em 0}h2{margin:2em 0 .6em;padding-top:.5em;
border-top:2px solid var(--line);font-size:1.35rem}h3{font-size:1.05rem;margin:1.6em 0 .5em}
h4{font-size:.95rem;margin:.8em 0 .3em}
a{color:var(--a)}nav ul{display:flex;flex-wrap:wrap;gap:4px 18px;padding:0;list-style:none}
figure{margin:0}img{max-width:100%;height:auto;border:1px solid var(--line)}
.soft,.help{color:var(--soft);font-size:.88rem}
.missing{border-left:4px solid var(--b);padding:.4em .8em;background:var(--panel)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px}
.card{background:var(--panel);padding:10px 14px;border-radius:6px}.card p{margin:0}
.big{font-size:1.9rem;font-weight:650;line-height:1.3}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:20px}
.chart{max-width:520px}.chart figcaption{font-weight:600;font-size:.92rem}
svg{display:block;width:100%;height:auto;font-size:12px}svg text{fill:var(--ink)}
svg .soft{fill:var(--soft);font-size:12px}
svg .on{paint-order:stroke;stroke:var(--bg);stroke-width:4px}
.grid{stroke:var(--line);stroke-width:1}
.line,.raw{fill:none;stroke-width:2}.raw{stroke-width:1;opacity:.4}
.line.a,.raw.a{stroke:var(--a)}.line.b,.raw.b{stroke:var(--b)}.line.b{stroke-dasharray:6 3}
circle.a{fill:var(--a)}circle.b{fill:var(--b)}
.scroll{overflow-x:auto}table{border-collapse:collapse;margin:1em 0;font-size:.92rem;
overflow-wrap:normal;min-width:min(100%,24em);
font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--soft);font-size:.88rem;padding-bottom:.4em;
max-width:min(44em,calc(100vw - 34px))}
th,td{text-align:right;padding:4px 10px;border-bottom:1px solid var(--line)}
th:first-child{text-align:left;padding-left:0}thead th{vertical-align:bottom}
th,td{white-space:nowrap}thead th,.settings td{white-space:normal}
.settings td,.settings thead th{text-align:left}.settings td{min-width:8em;overflow-wrap:anywhere}
.tokens th{font-family:ui-monospace,monospace;font-weight:400;white-space:pre}
pre{white-space:pre-wrap;background:var(--panel);padding:10px 14px}
.asked{display:flex;flex-wrap:wrap;gap:14px;align-items:flex-start}.asked img{max-width:128px}
.asked dl{margin:0;flex:1 1 220px}dt{color:var(--soft);font-size:.88rem}dd{margin:0 0 .5em}
.both{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:8px 28px}
.answer{white-space:pre-wrap;line-height:2;margin:.3em 0}
.t{border-bottom:2px solid transparent;padding:1px 0}.t:empty::before{content:"\\25AA"}
.t:hover,.t:focus{outline:2px solid var(--ink)}
.legend{display:flex;flex-wrap:wrap;gap:6px 8px;font-size:.85rem;align-items:baseline}
.legend .t{padding:1px 6px}
.maps{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:12px}
.maps img{width:100%}.maps figcaption{font-size:.82rem;line-height:1.35}
#tip{position:absolute;background:var(--ink);color:var(--bg);font-size:.85rem;padding:4px 8px;
border-radius:4px;pointer-events:none;max-width:260px}
@media print{.scroll{overflow:visible}}
"""

# Without it the browser's own tooltips do the same for a mouse; this also answers a finger.
SCRIPT = """
(function(){var tip=document.createElement('div');tip.id='tip';tip.hidden=true;
tip.setAttribute('role','status');document.body.appendChild(tip);
document.querySelectorAll('.answer .t').forEach(function(t){t.dataset.tip=t.title;
t.removeAttribute('title')});
function show(e){var t=e.target.closest?e.target.closest('.answer .t'):null;tip.hidden=!t;
if(!t)return;tip.textContent=t.dataset.tip;var r=t.getClientRects()[0];
tip.style.left=Math.max(4,Math.min(r.left,innerWidth-tip.offsetWidth-8))+scrollX+'px';
tip.style.top=r.bottom+scrollY+6+'px'}
document.addEventListener('mouseover',show);document.addEventListener('click',show)})();
"""


# ---------------------------------------------------------------------------- pictures for a README

def attention_picture(example: Example, n: int = 0) -> Image.Image:
    """Maps of one picture as an image: before above, after below, blocks beside each other."""
    tile, top = example.tiles[n], top_share(example, n)
    both = (("before training", example.before), ("after training", example.after))
    rows = [(title, a) for title, a in both if a is not None and a.maps]
    width = len(rows[0][1].maps) + 2
    gap, head, side = 20, 34, 150
    size = (side + width * (tile.width + gap), head + len(rows) * (tile.height + gap))
    out = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(out), ImageFont.load_default(size=17)
    for y, (title, a) in enumerate(rows):
        top_y = head + y * (tile.height + gap)
        pen.multiline_text((8, top_y + tile.height // 2), title.replace(" ", "\n"), INK[0], font,
                           anchor="lm", spacing=6)
        columns = [("picture", tile)]
        columns += [(f"block at layer {layer + 1}", overlay(tile, maps[n], top))
                    for layer, maps in a.maps.items()]
        columns.append(("mean of blocks", overlay(tile, mean_maps(a.maps)[n], top)))
        for x, (name, image) in enumerate(columns):
            left = side + x * (tile.width + gap)
            out.paste(image, (left, top_y))
            pen.rectangle((left, top_y, left + tile.width - 1, top_y + tile.height - 1),
                          outline=(150, 150, 150))
            if y == 0:
                pen.text((left + tile.width // 2, head - 10), name, INK[0], font, anchor="ms")
    return out


def rollouts_picture(examples: list[Example], width: int = 1400) -> Image.Image:
    """Coloured answers as an image: before left, after right, an example a row."""
    font, bold = ImageFont.load_default(size=21), ImageFont.load_default(size=23)
    out = Image.new("RGB", (width, 3000), "white")
    pen, y, column = ImageDraw.Draw(out), 16, (width - 60) // 2
    for example in examples:
        pen.text((16, y), f"{example.record['question']}   (answer: {example.record['answer']})",
                 INK[0], bold)
        y += 40
        ends = []
        for n, (title, a) in enumerate((("before training", example.before),
                                        ("after training", example.after))):
            if a is not None:
                x = 16 + n * (column + 28)
                verdict = "right" if a.correct else "wrong"
                pen.text((x, y), f"{title}: {verdict}", (90, 90, 90), font)
                ends.append(draw_tokens(pen, a, x, y + 34, column, font))
        y = max(ends) + 26
    x = 16
    for text, gap in (("teacher minus student log-prob, nats:", 0), (" below -4 ", -5),
                      (" below -0.5 ", -1), (" about 0 ", 0), (" above 0.5 ", 1), (" above 4 ", 5)):
        x = draw_token(pen, text, gap, x, y, font) + 12
    return out.crop((0, 0, width, y + 44))


def draw_tokens(pen, answer: Answer, x: int, y: int, width: int, font) -> int:
    """Lay an answer out in a column; returns the y below it."""
    left, words = x, []
    for text, s, t in zip(answer.pieces, answer.student, answer.teacher):
        text = text.replace("\n", " ")
        if not words or text.startswith(" "):        # a line breaks before a word, not in it
            words.append([])
        words[-1].append((text, t - s))
    for word in words:
        if x > left and x + pen.textlength("".join(text for text, _ in word), font) > left + width:
            x, y = left, y + 40
            word[0] = (word[0][0].lstrip(" "), word[0][1])
        for text, gap in word:
            x = draw_token(pen, text, gap, x, y, font)
    return y + 40


def draw_token(pen, text: str, gap: float, x: float, y: int, font) -> float:
    """One token, coloured and underlined (solid above zero, dotted below); returns the next x."""
    end, n = x + pen.textlength(text, font), sum(abs(gap) >= edge for edge in LEVELS)
    if n:
        pen.rectangle((x, y, end - 1, y + 27), fill=(MORE if gap > 0 else LESS)[n - 1])
        step = 3 if gap > 0 else 7
        for dot in range(int(x), int(end), step):
            pen.rectangle((dot, y + 29, min(dot + 2, int(end) - 1), y + 31), fill=INK[0])
    pen.text((x, y), text, INK[0], font)
    return end


def write_pictures(run: Run, folder: Path) -> list[Path]:
    """attention.png and rollouts.png, of the first record that has them."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {}
    answered = [e for e in run.examples if e.before or e.after]
    if answered:
        pictures["rollouts.png"] = rollouts_picture(answered[:2])
    with_maps = [e for e in answered if e.tiles and any(a and a.maps for a in (e.before, e.after))]
    if with_maps:
        pictures["attention.png"] = attention_picture(with_maps[0])
    if not pictures:
        raise ValueError(f"{run.folder}: no pictures without answers: "
                         f"{run.missing.get('models', 'ask some --records')}")
    for name, picture in pictures.items():
        # a palette: few colours are in there, and a README is fetched often
        picture.quantize(255).save(folder / name, optimize=True)
    return [folder / name for name in pictures]


def main(argv=None) -> None:
    """`evaluate.py report`. Raises OSError or ValueError for a folder that is no run."""
    from checkpoint import write_text
    from model import quiet
    parser = argparse.ArgumentParser(prog="evaluate.py report",
                                     description=__doc__.split("\n\n")[0],
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
    run = read_run(args.run)
    if args.records > 0:
        ask_models(run, args.records, args.max_new_tokens, args.device, args.dtype)
    out = Path(args.out or run.folder / "report.html")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page(run))
    for reason in run.missing.values():
        print(f"missing: {reason}")
    print(f"{out}: {out.stat().st_size / 1e6:.2f} MB")
    if args.pictures:
        for path in write_pictures(run, Path(args.pictures)):
            print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")
