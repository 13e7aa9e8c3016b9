"""analysis/first_picture.py - the README's first picture: one answer, and the token that matters.

The idea.  On-policy distillation gives each token of the student's own answer a loss of its own.
One example shows what that buys. Asked to count four blue shapes, the tiny base lists three and
stops. The teacher, told what is in the picture, agrees with every token but the full stop: it
would write a comma and go on. Most of the answer's loss stands at that token.

In:  data/tiny-qwen3-vl and the toy world's second test record (data/toy is drawn if missing).
Out: a PNG with a palette. Every number in it is computed here.

The one equation, the loss of token n (the deepest colour is the largest of the answer):
    KL_n = sum_v p_T(v | X, S, y_<n) log( p_T(v | X, S, y_<n) / p_theta(v | X, y_<n) )

Run  python analysis/first_picture.py --out docs/one_token.png

Left out: other questions. The layout is made for an answer of two or three lines.
"""
from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model as qwen  # noqa: E402
from analysis.figures import INK, LESS, MORE  # noqa: E402
from data import records, toy  # noqa: E402
from loss import distill_loss  # noqa: E402
from rollout import sample  # noqa: E402
from scale.checks import quiet  # noqa: E402
from teacher import hint  # noqa: E402

# Dimension letters: L prompt tokens, T response tokens, D hidden, V vocabulary.

RECORD = "toy-test-1"
SCALE = 2                            # drawn twice as large as the README shows it
WIDTH, EDGE = 880 * SCALE, 28 * SCALE
SOFT, RULE = (95, 95, 95), (205, 205, 205)


@dataclass
class Case:
    """The record, its hint, and per token of the answer: text, KL, and two distributions."""
    record: dict
    hint: str
    pieces: list[str]
    kl: torch.Tensor                 # (T,)
    student: list[dict]              # T times {next token: probability}, likeliest first
    teacher: list[dict]

    @property
    def worst(self) -> int:
        return int(self.kl.argmax())


# ---------------------------------------------------------------------------- compute

@torch.no_grad()
def compute() -> Case:
    """The base's greedy answer, scored by the base as student and, with the hint, as teacher."""
    model, processor = qwen.load(qwen.TINY, device="cpu")
    record = next(r for r in records.load(toy.default() / "test.jsonl") if r["id"] == RECORD)
    prompt, cue = processor.prompt(record), hint(record, "cue")
    got = sample(model, processor.batch([prompt]), max_new_tokens=96, temperature=0,
                 **processor.sampling)
    ids = got.ids[0, :int(got.lengths[0])].tolist()

    def read(prompt) -> torch.Tensor:
        batch = processor.batch([replace(prompt, ids=[*prompt.ids, *ids])])
        hidden = model.model(**batch).last_hidden_state[0]                           # (L + T, D)
        # the state at one token predicts the next, so the answer is read one place early
        return hidden[len(prompt.ids) - 1:-1]                                        # (T, D)

    def likeliest(hidden) -> list[dict]:
        probs = model.lm_head(hidden).softmax(-1)                                    # (T, V)
        return [{processor.decode([int(v)]): float(p) for p, v in zip(*row.topk(3))}
                for row in probs]

    student, teacher = read(prompt), read(processor.prompt(record, cue))
    kl = distill_loss(student, teacher, model.lm_head.weight, model.lm_head.weight)  # (T,)
    return Case(record, cue, [processor.decode([n]) for n in ids], kl, likeliest(student),
                likeliest(teacher))


# ---------------------------------------------------------------------------- draw

def font(size: int):
    return ImageFont.load_default(size=size * SCALE)


def write(pen, x: int, y: int, width: int, text: str, size: int, ink=INK[0]) -> int:
    """Text wrapped into `width`; returns the y below it."""
    lines, face = [""], font(size)
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if pen.textlength(longer, face) <= width else [*lines, word]
    for line in lines:
        pen.text((x, y), line, ink, face)
        y += int(1.32 * size * SCALE)
    return y


def draw_answer(pen, case: Case, y: int) -> tuple[int, tuple]:
    """The answer, coloured; returns the y below it and the worst token's box."""
    face, high, x = font(27), 27 * SCALE, EDGE
    words = []                                           # lists of token numbers
    for n, text in enumerate(case.pieces):
        if n == 0 or text.startswith(" "):               # a line breaks before a word, not in it
            words.append([])
        words[-1].append(n)
    for word in words:
        if x + pen.textlength("".join(case.pieces[n] for n in word), face) > WIDTH - EDGE:
            x, y = EDGE, y + int(1.7 * high)
        for n in word:
            text = case.pieces[n]
            if text.startswith(" ") and x > EDGE:
                x += pen.textlength(" ", face)
            text = text.strip(" ")
            room = 7 * SCALE if n == case.worst else 0   # a full stop alone is too thin to see
            end = x + pen.textlength(text, face) + 2 * room
            box = (x - 1, y - 0.1 * high, end, y + 1.22 * high)
            if text:                                     # the stop token has none
                part = float(case.kl[n] / case.kl.max())
                pen.rectangle(box, tuple(round(255 + part * (c - 255)) for c in LESS[3]))
            pen.text((x + room, y), text, INK[0], face)
            if n == case.worst:
                worst_box = box
            x = end
    pen.rectangle(worst_box, outline=INK[0], width=2 * SCALE)
    return y + int(1.7 * high), worst_box


def draw_bar(pen, title: str, shares: dict, x: int, y: int, width: int) -> int:
    """A distribution over the next token as one bar of length 1; returns the y below it."""
    names = {".": ("full stop", LESS[3]), ",": ("comma", MORE[1])}
    high, left = 52 * SCALE, x + 112 * SCALE
    whole = x + width - left
    pen.text((x, y + high / 2), title, INK[0], font(24), anchor="lm")
    for token, share in shares.items():
        name, colour = names.get(token, (repr(token), RULE))
        right = left + share * whole
        pen.rectangle((left, y, right, y + high), fill=colour)
        said = f"{name}  {share:.0%}".replace("%", " %")
        if pen.textlength(said, font(24)) < right - left:
            pen.text(((left + right) / 2, y + high / 2), said, INK[0], font(24), anchor="mm")
        left = right
    return y + high + 12 * SCALE


def draw(case: Case) -> Image.Image:
    out = Image.new("RGB", (WIDTH, 2000), "white")
    pen, inner, gap = ImageDraw.Draw(out), WIDTH - 2 * EDGE, 20 * SCALE
    # the picture as the model gets it: 48 pixels a side, each drawn as a square
    tile, side = Image.open(case.record["images"][0]).convert("RGB"), 240 * SCALE
    tile = tile.resize((side, side * tile.height // tile.width), Image.Resampling.NEAREST)
    out.paste(tile, (EDGE, EDGE))
    pen.rectangle((EDGE, EDGE, EDGE + side, EDGE + tile.height), outline=RULE, width=SCALE)
    x = EDGE + side + gap
    y = write(pen, x, EDGE, inner, "question", 20, SOFT)
    y = write(pen, x, y, WIDTH - EDGE - x, case.record["question"], 27) + gap
    y = write(pen, x, y, inner, "hint, told to the teacher only", 20, SOFT)
    y = write(pen, x, y, WIDTH - EDGE - x, case.hint, 23)

    y = max(y, EDGE + tile.height) + gap
    y = write(pen, EDGE, y, inner,
              "the student's own answer, each token coloured by its share of the loss", 20, SOFT)
    y, box = draw_answer(pen, case, y + gap // 2)

    top, x = y + gap, EDGE + gap
    share = f"{case.kl.max() / case.kl.sum():.0%}".replace("%", " %")
    y = write(pen, x, top + gap, inner, f"{share} of the answer's loss is at this one token.", 27)
    y += gap // 2
    for title, shares in (("student", case.student), ("teacher", case.teacher)):
        y = draw_bar(pen, title, shares[case.worst], x, y, inner - 2 * gap)
    y += gap // 2
    pen.rounded_rectangle((EDGE, top, WIDTH - EDGE, y), 8 * SCALE, outline=INK[0], width=2 * SCALE)
    middle = (box[0] + box[2]) / 2
    pen.line((middle, box[3], middle, top), fill=INK[0], width=2 * SCALE)
    return out.crop((0, 0, WIDTH, y + EDGE))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", default="docs/one_token.png", help="the PNG to write")
    args = parser.parse_args(argv)
    quiet()
    case = compute()
    draw(case).quantize(192, dither=Image.Dither.NONE).save(args.out, optimize=True)
    print(json.dumps({"answer": "".join(case.pieces), "token": case.pieces[case.worst],
                      "share": round(float(case.kl.max() / case.kl.sum()), 3),
                      "nats": [round(float(k), 3) for k in case.kl],
                      "student": case.student[case.worst], "teacher": case.teacher[case.worst]}))


if __name__ == "__main__":
    main()
