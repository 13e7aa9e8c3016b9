"""analysis/figures.py - the drawings of a report: curves, coloured tokens, attention maps.

The idea.  A figure should work everywhere: in a mail, on a phone, in print, for a reader who cannot
tell orange from blue, and for a screen reader. So every curve is SVG with a text description. Every
token shows its sign by an underline (solid above zero, dotted below), and its numbers when pointed
at. Pictures are inside the page. Nothing is fetched, nothing is installed.

In:  plain numbers: points (x, y), tokens (text, log-prob of the student, of the teacher), and maps
     (h, w) of attention that sum to one over a prompt, beside the picture they belong to.
Out: HTML as text, styled by STYLE; or a PIL image, for a README.

The two equations.  The colour of token n, in steps at LEVELS; and the number of visual tokens that
attention p is spread over, if it were spread evenly:
    log p_T(y_n | picture, question, hint, y_<n) - log p_theta(y_n | picture, question, y_<n)
    exp(-sum_i p_i log p_i)

Use it in another project (torch, pillow, and benchmarks/counting.py):
    curve = chart("loss", "Loss", [("loss", [(1, 2.0), (2, 1.5)], "a")])
    Path("loss.html").write_text(f"<meta charset=utf-8><style>{STYLE}</style>{curve}")

Left out: anything interactive but tooltips; zooming; more than two lines in a chart.
"""
from __future__ import annotations

import base64
import io
import math
from html import escape

import torch
from PIL import Image, ImageDraw, ImageFont

from benchmarks.counting import percent

# Dimension letters: h x w visual tokens of a picture, W x H the size of a chart.

LEVELS = (0.1, 0.5, 1.5, 4.0)        # nats of difference from which a token is coloured stronger
INK = ((17, 17, 17), (255, 255, 255))     # text, and the rim that keeps it readable on anything
MORE = ((222, 235, 247), (179, 211, 238), (127, 181, 224), (88, 154, 208))     # blue
LESS = ((253, 235, 213), (253, 207, 156), (249, 169, 92), (232, 131, 58))      # orange
DARK_MORE = ((22, 50, 74), (29, 74, 112), (36, 95, 145), (40, 110, 170))       # on a dark page
DARK_LESS = ((64, 41, 15), (97, 58, 14), (130, 75, 14), (160, 88, 12))
HEAT = (106, 27, 154)                # violet: no shape of the toy world has it


# ---------------------------------------------------------------------------- text and tables

def missing(text: str) -> str:
    """A note in the place of what is missing."""
    return f'<p class="missing">{escape(text)}</p>'


def table(caption: str, head: list[str], rows: list[list], kind: str = "") -> str:
    """An HTML table; the first cell of a row is its heading. Cells are text, escaped here."""
    body = "".join("<tr>" + "".join(
        f'<th scope="row">{escape(str(c))}</th>' if n == 0 else f"<td>{escape(str(c))}</td>"
        for n, c in enumerate(row)) + "</tr>" for row in rows)
    return frame(caption, head, body, kind)


def frame(caption: str, head: list[str], body: str, kind: str = "") -> str:
    """A table around rows of HTML. A wide table scrolls by itself; the page does not."""
    columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    return (f'<div class="scroll"><table class="{kind}"><caption>{escape(caption)}</caption>'
            f"<thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table></div>")


# ---------------------------------------------------------------------------- curves

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
    """A running mean over about a fifteenth of the points; short lines stay unchanged."""
    half = len(line) // 30
    out = []
    for i, (x, _) in enumerate(line):
        part = [y for _, y in line[max(0, i - half):i + half + 1]]
        out.append((x, sum(part) / len(part)))
    return out


def number(value) -> str:
    """A coordinate: tenths of a pixel are enough."""
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def stroke(kind: str, x1, x2, y1, y2) -> str:
    ends = zip(("x1", "x2", "y1", "y2"), (x1, x2, y1, y2))
    return f'<line class="{kind}" ' + " ".join(f'{n}="{number(v)}"' for n, v in ends) + "/>"


def dot(kind: str, x, y, radius) -> str:
    return f'<circle class="{kind}" cx="{number(x)}" cy="{number(y)}" r="{radius}"/>'


def label(text: str, x, y, anchor: str = "", kind: str = "") -> str:
    more = "".join(f' {name}="{value}"' for name, value in
                   (("text-anchor", anchor), ("class", kind)) if value)
    return f'<text x="{number(x)}" y="{number(y)}"{more}>{escape(text)}</text>'


def svg(key: str, title: str, said: str, parts: list[str], size, caption: str = "") -> str:
    """A drawing with its title and, for screen readers, a description. key: an id."""
    return (f'<figure class="chart">{caption}'
            f'<svg viewBox="0 0 {size[0]} {size[1]}" role="img" aria-labelledby="{key}-t {key}-d">'
            f'<title id="{key}-t">{escape(title)}</title><desc id="{key}-d">{escape(said)}</desc>'
            + "".join(parts) + "</svg></figure>")


def chart(key: str, title: str, lines: list[tuple], *, levels=(), bars=(), dots=False,
          form: str = ".3g") -> str:
    """Lines over training steps: thin, and their running means thick.

    lines: (name, [(x, y)], class). levels: (name, y, class), drawn across. bars: (x, low, high).
    Classes a and b differ in colour and in dashes. form: how a y is written.
    """
    lines = [line for line in lines if line[1]]
    if not lines:
        return missing(f"{title}: no values in metrics.jsonl.")
    W, H, left, right, top, bottom = 360, 220, 46, 12, 30, 34
    xs = [x for _, line, _ in lines for x, _ in line]
    ys = [y for _, line, _ in lines for _, y in line] + [y for _, y, _ in levels]
    ys += [y for _, *ends in bars for y in ends]
    marks, steps = ticks(min(ys), max(ys)), [x for x in ticks(min(xs), max(xs)) if x <= max(xs)]
    x_low, x_high = min(min(xs), steps[0]), max(xs)

    def px(x):
        return left + (x - x_low) / ((x_high - x_low) or 1) * (W - left - right)

    def py(y):
        return H - bottom - (y - marks[0]) / (marks[-1] - marks[0]) * (H - top - bottom)

    out = [stroke("grid", left, W - right, py(y), py(y))
           + label(f"{y:{form}}", left - 6, py(y) + 4, "end") for y in marks]
    out += [label(f"{x:g}", px(x), H - bottom + 16, "middle") for x in steps]
    out.append(label("step", W - right, H - 4, "end", "soft"))
    for name, y, kind in levels:
        out.append(stroke(f"line {kind}", left, W - right, py(y), py(y)))
        out.append(label(name, W - right, py(y) - 5, "end", "on"))
    out += [stroke("line a", px(x), px(x), py(low), py(high)) for x, low, high in bars]
    for n, (name, line, kind) in enumerate(lines):
        for which, style in ((line, "raw"), (smooth(line), "line")):
            path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in which)
            out.append(f'<polyline class="{style} {kind}" points="{path}"/>')
        if dots or len(line) < 3:
            out += [dot(kind, px(x), py(y), 3.5) for x, y in line]
        if len(lines) > 1:
            x = left + 110 * n
            out += [stroke(f"line {kind}", x, x + 26, 14, 14), label(name, x + 32, 18)]
    said = [f"{name} from {line[0][1]:{form}} at step {line[0][0]:g} to {line[-1][1]:{form}} at "
            f"step {line[-1][0]:g}, between {min(y for _, y in line):{form}} and "
            f"{max(y for _, y in line):{form}}" for name, line, _ in lines]
    return svg(key, title, "; ".join(said + [name for name, *_ in levels]), out, (W, H),
               f"<figcaption>{escape(title)}</figcaption>")


def forest(key: str, title: str, shares: dict[str, tuple]) -> str:
    """Points with their intervals, from 0 to 100 %. shares: {name: (share, bounds or None)}."""
    W, H, left = 360, 34 * len(shares) + 26, 70

    def px(share):
        return left + float(share) * (W - left - 16)

    out = [stroke("grid", px(s / 4), px(s / 4), 4, H - 22)
           + label(str(25 * s), px(s / 4), H - 6, "middle") for s in range(5)]
    for n, (name, (share, bounds)) in enumerate(shares.items()):
        y, (low, high) = 22 + 34 * n, bounds or (share, share)
        out += [label(name, left - 8, y + 4, "end"),
                stroke("line a solid", px(low), px(high), y, y), dot("a", px(share), y, 5)]
    said = "; ".join(f"{name} {percent(*share)} %" for name, share in shares.items())
    return svg(key, title, said, out, (W, H))


# ---------------------------------------------------------------------------- tokens

def strength(gap: float) -> int:
    """The step of the colour scale for a difference in nats: 1 to 4 above zero, -1 to -4 below.

    >>> [strength(gap) for gap in (0.05, 0.2, -9.0)]
    [0, 1, -4]
    """
    n = sum(abs(gap) >= edge for edge in LEVELS)
    return n if gap > 0 else -n


def token_spans(tokens: list[tuple[str, float, float]], who: str = "teacher") -> str:
    """The answer as coloured spans, one per token.

    tokens: (text, log-prob of the student, of `who`). Classes: p1 to p4 above zero, n1 to n4
    below, z about zero.
    """
    out = []
    for text, s, t in tokens:
        n = strength(t - s)
        kind = f"p{n}" if n > 0 else f"n{-n}" if n < 0 else "z"
        out.append(f'<span class="t {kind}" title="{who} {t:.2f}, student {s:.2f}, '
                   f'difference {t - s:+.2f}">{escape(text)}</span>')
    return "".join(out)


def legend() -> str:
    """The colour scale, to stand above the answers."""
    a, b, c, d = (f"{edge:g}" for edge in LEVELS)
    less = [f"below -{d}", f"-{d} to -{c}", f"-{c} to -{b}", f"-{b} to -{a}"]
    more = [f"+{a} to +{b}", f"+{b} to +{c}", f"+{c} to +{d}", f"above +{d}"]
    parts = [f'<span class="t n{4 - n}">{text}</span>' for n, text in enumerate(less)]
    parts.append(f'<span class="t z">-{a} to +{a}</span>')
    parts += [f'<span class="t p{n + 1}">{text}</span>' for n, text in enumerate(more)]
    return ('<p class="legend"><span>Less likely than to the student (orange, dotted line):</span> '
            + " ".join(parts).replace("-", "\u2212")
            + " <span>more likely (blue, solid line). \u25aa is the stop token.</span></p>")


def rollouts_picture(asked: list[tuple[str, dict]], width: int = 1400) -> Image.Image:
    """Coloured answers as an image: one row per question, its answers side by side.

    asked: (question, {title: tokens as token_spans takes them, or None for an empty column}).
    """
    font, bold = ImageFont.load_default(size=21), ImageFont.load_default(size=23)
    out = Image.new("RGB", (width, 3000), "white")
    pen, y, column = ImageDraw.Draw(out), 16, (width - 60) // 2
    for question, answers in asked:
        pen.text((16, y), question, INK[0], bold)
        ends = []
        for n, (title, tokens) in enumerate(answers.items()):
            if tokens is not None:
                x = 16 + n * (column + 28)
                pen.text((x, y + 40), title, (90, 90, 90), font)
                ends.append(draw_tokens(pen, tokens, x, y + 74, column, font))
        y = max(ends) + 26
    x = 16
    for text, gap in (("teacher minus student log-prob, nats:", 0), (" below -4 ", -5),
                      (" below -0.5 ", -1), (" about 0 ", 0), (" above 0.5 ", 1), (" above 4 ", 5)):
        x = draw_token(pen, text, gap, x, y, font) + 12
    return out.crop((0, 0, width, y + 44))


def draw_tokens(pen, tokens: list[tuple], x: int, y: int, width: int, font) -> int:
    """Lay an answer out in a column; returns the y below it."""
    left, words = x, []
    for text, s, t in tokens:
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
    end, n = x + pen.textlength(text, font), strength(gap)
    if n and text:                # a stop token has no text to colour
        pen.rectangle((x, y, end - 1, y + 27), fill=(MORE if n > 0 else LESS)[abs(n) - 1])
        for left in range(int(x), int(end), 3 if n > 0 else 7):
            pen.rectangle((left, y + 29, min(left + 2, int(end) - 1), y + 31), fill=INK[0])
    pen.text((x, y), text, INK[0], font)
    return end


# ---------------------------------------------------------------------------- attention

def overlay(tile: Image.Image, attention: torch.Tensor, top: float) -> Image.Image:
    """The picture, faded to grey, with attention (h, w) painted over it; `top` is the full colour.

    The strongest cell has a frame. Cells that are large enough show their share in percent.
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


def panels(maps: dict[int, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    """The map of each block, {layer: (h, w)}, and their mean, with their names."""
    blocks = [(f"block at layer {layer + 1}", one) for layer, one in maps.items()]
    return [*blocks, ("mean of blocks", torch.stack([*maps.values()]).mean(0))]


def strongest(rows: dict[str, dict]) -> float:
    """The largest share in any map of a picture: painted full, so that its rows compare."""
    return max(float(one.max()) for maps in rows.values() for one in maps.values())


def attention_rows(tile: Image.Image, rows: dict[str, dict]) -> str:
    """A picture under its maps. rows: {title: {layer: (h, w)}, empty where there is no module}."""
    top, out = strongest(rows), []
    for title, maps in rows.items():
        if not maps:
            out.append(missing(f"{title}: no module"))
            continue
        figures = [f'<figure>{image_tag(tile, "The picture")}<figcaption>the picture</figcaption>'
                   "</figure>"]
        for name, one in panels(maps):
            picture = image_tag(overlay(tile, one, top),
                                f"Sink attention {title}, {name}: {peak(one)}")
            figures.append(f"<figure>{picture}<figcaption>{name}<br>{peak(one)}</figcaption>"
                           "</figure>")
        out.append(f'<h4>{title.capitalize()}</h4><div class="maps">{"".join(figures)}</div>')
    return "".join(out)


def image_tag(image: Image.Image, alt: str) -> str:
    """The picture embedded in the page, as PNG or JPEG, whichever is smaller."""
    encoded = {}
    for kind, options in (("png", {}), ("jpeg", {"quality": 85})):
        image.save(out := io.BytesIO(), kind, **options)
        encoded[kind] = out.getvalue()
    kind, data = min(encoded.items(), key=lambda item: len(item[1]))
    data = base64.b64encode(data).decode()
    return (f'<img src="data:image/{kind};base64,{data}" alt="{escape(alt)}" '
            f'width="{image.width}" height="{image.height}">')


def attention_picture(tile: Image.Image, rows: dict[str, dict]) -> Image.Image:
    """The same as an image: one row per title, blocks side by side."""
    rows, top = {title: maps for title, maps in rows.items() if maps}, strongest(rows)
    columns = 2 + max(len(maps) for maps in rows.values())
    gap, head, side = 20, 34, 150
    size = (side + columns * (tile.width + gap), head + len(rows) * (tile.height + gap))
    out = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(out), ImageFont.load_default(size=17)
    for n, (title, maps) in enumerate(rows.items()):
        y = head + n * (tile.height + gap)
        pen.multiline_text((8, y + tile.height // 2), title.replace(" ", "\n"), INK[0], font,
                           anchor="lm", spacing=6)
        images = [("picture", tile)]
        images += [(name, overlay(tile, one, top)) for name, one in panels(maps)]
        for column, (name, image) in enumerate(images):
            x = side + column * (tile.width + gap)
            out.paste(image, (x, y))
            pen.rectangle((x, y, x + tile.width - 1, y + tile.height - 1), outline=(150, 150, 150))
            if n == 0:
                pen.text((x + tile.width // 2, head - 10), name, INK[0], font, anchor="ms")
    return out


# ---------------------------------------------------------------------------- how it looks

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
""" + token_style()

# The browser's own tooltips need a mouse; this also works by touch.
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
