"""docs/make_notebook.py - runs docs/one_step.py cell by cell and writes docs/one_step.ipynb.

The idea.  The script is the source, so the tour can be read, searched and compared like any code.
The notebook is the script's cells with what they printed and drew. It is plain JSON (nbformat 4.5),
so nothing has to be installed to make it.

    # %% [markdown]     the comment lines that follow are text
    # %%                the lines that follow are code, run in one namespace

In:  the script.  Out: the notebook. What the last expression of a cell gives is shown as a PNG if
it is a picture, else as its repr; what is printed comes before it.

Run  python docs/make_notebook.py        after every change of the script, or of what it shows

Left out: errors as outputs (an error ends the making), standard error, anything interactive.
"""
from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import io
import json
import re
from pathlib import Path

import torch

SCRIPT = Path(__file__).resolve().with_name("one_step.py")
NOTEBOOK = SCRIPT.with_suffix(".ipynb")
WIDTH = 880                              # pixels, as pictures are shown
MARK = re.compile(r"^# %%( \[markdown\])?\n", re.M)


def read_cells(text: str) -> list[tuple[str, str]]:
    """("markdown" or "code", source) of each cell; what stands before the first mark is skipped."""
    _, *parts = MARK.split(text)
    cells = []
    for kind, source in zip(parts[::2], parts[1::2]):
        source = source.strip("\n")
        if kind:
            source = re.sub(r"^# ?", "", source, flags=re.M)
        cells.append(("markdown" if kind else "code", source))
    return cells


def run_cell(source: str, namespace: dict) -> list[dict]:
    """Execute a cell; returns its outputs as the notebook keeps them."""
    tree, outputs, value = ast.parse(source), [], None
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(tree, str(SCRIPT), "exec"), namespace)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), str(SCRIPT), "eval"), namespace)
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout",
                        "text": printed.getvalue().splitlines(keepends=True)})
    if value is not None:
        data, size = {"text/plain": [repr(value)]}, {}
        if hasattr(value, "_repr_png_"):
            data = {"image/png": base64.b64encode(value._repr_png_()).decode(),
                    "text/plain": ["(a picture)"]}
            size = {"image/png": {"width": WIDTH}}
        outputs.append({"output_type": "display_data", "data": data, "metadata": size})
    return outputs


def notebook(cells, outputs) -> dict:
    """outputs: one list for each code cell, in order."""
    outputs, made, count = iter(outputs), [], 0
    for number, (kind, source) in enumerate(cells):
        cell = {"cell_type": kind, "id": f"cell-{number}", "metadata": {},
                "source": source.splitlines(keepends=True)}
        if kind == "code":
            count += 1
            cell |= {"execution_count": count, "outputs": next(outputs)}
        made.append(cell)
    python = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": made, "metadata": {"kernelspec": python, "language_info": {"name": "python"},
                                        "torch": torch.__version__},    # other versions round otherwise
            "nbformat": 4, "nbformat_minor": 5}


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n\n")[0]).parse_args()
    cells = read_cells(SCRIPT.read_text(encoding="utf-8"))
    namespace = {"__name__": "__main__", "__file__": str(SCRIPT)}
    outputs = [run_cell(source, namespace) for kind, source in cells if kind == "code"]
    text = json.dumps(notebook(cells, outputs), indent=1, ensure_ascii=False) + "\n"
    NOTEBOOK.write_text(text, encoding="utf-8")
    print(f"{NOTEBOOK}: {len(cells)} cells, {len(text.encode()) / 1000:.0f} kB")


if __name__ == "__main__":
    main()
