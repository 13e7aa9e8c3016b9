"""docs/drawings.py - the drawings of the tour in one_step.py; nothing of the method is here.

    picture(image, rows, columns)    a picture, with the visual tokens that the model makes of it
    prompt(tokens), chips(tokens)    tokens in a row, each with its own colour and a line below it
    bars(rows)                       next-token distributions, one bar of length 1 each
    maps(image, rows)                where the sink token looks, a row of maps each
    kinds(steps, rows)               which tokens learn last: a table of numbers, coloured

In:  PIL images and plain numbers.  Out: a PIL image, which a notebook shows as it is.
Most are drawn twice as large as they are shown, so that text is sharp. A palette keeps the notebook
small.
"""
from __future__ import annotations

import torch
from PIL import Image, ImageDraw, ImageFont

from analysis import figures

WIDTH, EDGE = 1760, 24
INK, SOFT, RULE = (17, 17, 17), (105, 105, 105), (205, 205, 205)
# what a token is: plain text, control token, visual token, question, hint
FILL = {"text": (240, 240, 240), "control": (214, 214, 214), "visual": (226, 208, 238),
        "question": figures.MORE[0], "hint": figures.LESS[0]}


def font(size: int):
    return ImageFont.load_default(size=size)


def blank(height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (WIDTH, height), "white")
    return image, ImageDraw.Draw(image)


def small(image: Image.Image) -> Image.Image:
    return image.quantize(96, dither=Image.Dither.NONE)


def enlarged(image: Image.Image, side: int) -> Image.Image:
    """`side` pixels high. Nearest: each pixel of the model's picture stays a visible square."""
    return image.convert("RGB").resize((side * image.width // image.height, side),
                                       Image.Resampling.NEAREST)


def picture(image: Image.Image, rows: int, columns: int, notes: dict[str, str]) -> Image.Image:
    """The picture, cut into its rows x columns visual tokens, which are numbered; notes beside it.
    """
    tile = enlarged(image, 480)
    out, pen = blank(tile.height + 2 * EDGE)
    out.paste(tile, (EDGE, EDGE))
    w, h = tile.width / columns, tile.height / rows
    for n in range(rows * columns):
        x, y = EDGE + n % columns * w, EDGE + n // columns * h
        pen.rectangle((x, y, x + w, y + h), outline=figures.HEAT, width=3)
        pen.text((x + 9, y + 5), str(n + 1), INK, font(30), stroke_width=3, stroke_fill="white")
    x, y = tile.width + 3 * EDGE, EDGE
    for title, text in notes.items():
        pen.text((x, y), title, SOFT, font(28))
        y += 38
        for line in wrap(pen, text, WIDTH - EDGE - x, font(36)):
            pen.text((x, y), line, INK, font(36))
            y += 48
        y += 22
    return small(out)


def wrap(pen, text: str, width: int, face) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if pen.textlength(longer, face) <= width else [*lines, word]
    return lines


def chips(tokens: list[tuple[str, str, str | float]]) -> Image.Image:
    """tokens: (text, line below, what). A line ends behind a token that is a line break.

    what: a name in FILL, or a share from 0 to 1, which is painted from white to orange.
    """
    out, pen = blank(4000)
    x, y, high, face = EDGE, EDGE, 92, font(32)
    for text, below, what in tokens:
        shown = text.replace("\n", "\\n").replace(" ", "\u00b7")     # a space belongs to its token
        wide = max(pen.textlength(shown, face), pen.textlength(below, font(22))) + 20
        if x + wide > WIDTH - EDGE:
            x, y = EDGE, y + high
        fill = FILL.get(what) or tuple(round(255 + what * (c - 255)) for c in figures.LESS[3])
        pen.rounded_rectangle((x, y, x + wide, y + 48), 8, fill, RULE if what == 0 else None)
        pen.text((x + wide / 2, y + 24), shown, INK, face, anchor="mm")
        pen.text((x + wide / 2, y + 64), below, SOFT, font(22), anchor="mm")
        x += wide + 6
        if text.endswith("\n"):
            x, y = EDGE, y + high
    return small(out.crop((0, 0, WIDTH, y + (high if x > EDGE else 0) + EDGE // 2)))


def prompt(tokens: list[tuple[str, int]]) -> Image.Image:
    """Chips of a whole prompt. tokens: (text, id). What a token is follows from where it stands."""
    what, out, squares = "text", [], 0
    for text, number in tokens:
        shown = "control" if text.startswith("<|") else what
        if text == "<|image_pad|>":
            squares += 1
            out.append((f"square {squares}", str(number), "visual"))
            continue
        out.append((text, str(number), shown))
        if text == "<|vision_end|>":
            what = "question"
        elif text == "\n" and what == "question":
            what = "hint"
        elif text == "<|im_end|>":
            what = "text"
    return chips(out)


def bars(rows: dict[str, dict[str, float]]) -> Image.Image:
    """rows: {who: {next token: probability}}; a full stop is orange, a comma blue."""
    known = {".": ("full stop", figures.LESS[3]), ",": ("comma", figures.MORE[2])}
    high, left = 84, 420
    out, pen = blank(len(rows) * (high + 16) + EDGE)
    for n, (who, shares) in enumerate(rows.items()):
        x, y = left, EDGE // 2 + n * (high + 16)
        pen.text((EDGE, y + high / 2), who, INK, font(34), anchor="lm")
        for token, share in shares.items():
            right = x + share * (WIDTH - EDGE - left)
            said, colour = known.get(token, (repr(token), RULE))
            pen.rectangle((x, y, right, y + high), colour)
            said = f"{said}  {share:.0%}".replace("%", " %")
            if pen.textlength(said, font(34)) < right - x - 8:
                pen.text(((x + right) / 2, y + high / 2), said, INK, font(34), anchor="mm")
            x = right
    return small(out)


def maps(image: Image.Image, rows: dict[str, dict[int, torch.Tensor]]) -> Image.Image:
    """rows: {when: {layer: (h, w) shares of attention}}."""
    return figures.attention_picture(enlarged(image, 126), rows).quantize(
        128, dither=Image.Dither.NONE)


def kinds(steps: list[int], rows: dict[str, list[float]]) -> Image.Image:
    """rows: {kind of token: nats at each step}, drawn in this order. Last: what is left of each."""
    high, left, edge = 70, 500, WIDTH - EDGE - 190
    wide = (edge - left) / len(steps)
    out, pen = blank((len(rows) + 1) * high + 2 * EDGE)
    top = max(max(row) for row in rows.values())
    for text, x in (*((str(step), left + (n + 0.5) * wide) for n, step in enumerate(steps)),
                    ("left", (edge + WIDTH) / 2)):
        pen.text((x, EDGE + high / 2), text, SOFT, font(32), anchor="mm")
    pen.text((EDGE, EDGE + high / 2), "nats a token, at step", SOFT, font(32), anchor="lm")
    for k, (kind, nats) in enumerate(rows.items()):
        y = EDGE + (k + 1) * high
        pen.text((EDGE, y + high / 2), kind, INK, font(34), anchor="lm")
        for n, one in enumerate(nats):       # the root, so that small numbers differ to the eye
            fill = tuple(round(255 + (one / top)**0.5 * (c - 255)) for c in figures.LESS[3])
            x = left + n * wide
            pen.rectangle((x, y, x + wide - 5, y + high - 5), fill)
            pen.text((x + wide / 2 - 2, y + high / 2 - 2), f"{one:.3f}", INK, font(34), anchor="mm")
        pen.text(((edge + WIDTH) / 2, y + high / 2 - 2), f"{100 * nats[-1] / nats[0]:.0f} %", INK,
                 font(34), anchor="mm")
    return small(out)
