"""Run a notebook's cells in order, and store what they show: no Jupyter is needed.

  python -m benchmarks.notebook                                # docs/quickstart.ipynb, in place
  python -m benchmarks.notebook --out=FILE --folder=DIR        # another file, in another folder

What a cell prints is stored, progress bars are not; a last line that is an expression is shown as a
notebook would show it, pictures at a reader's size. tests/api/test_api.py runs it on a tiny model.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import os
import pathlib
from typing import Any

from absl import app, flags

_ROOT = pathlib.Path(__file__).absolute().parents[1]
_WIDTH = 1000  # pixels of a picture
_NOTEBOOK = flags.DEFINE_string("notebook", "docs/quickstart.ipynb", "The notebook.")
_OUT = flags.DEFINE_string("out", None, "Where to store it; default: in place.")
_FOLDER = flags.DEFINE_string("folder", None, "Where it runs; default: the current folder.")


def run_cell(source: str, names: dict[str, Any]) -> list[dict[str, Any]]:
    """Run a cell's code in a namespace; return its outputs, as a notebook stores them."""
    tree, last, value = ast.parse(source), None, None
    if tree.body and isinstance(tree.body[-1], ast.Expr):
        last = ast.Expression(tree.body.pop().value)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(tree, "cell", "exec"), names)
        if last is not None:
            value = eval(compile(last, "cell", "eval"), names)
    outputs: list[dict[str, Any]] = []
    if text := printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": _lines(text)})
    if value is not None:
        outputs.append({"output_type": "display_data", "metadata": {}, "data": shown(value)})
    return outputs


def shown(value: Any) -> dict[str, Any]:
    """Return what a notebook stores of a value, by kind."""
    data: dict[str, Any] = {"text/plain": _lines(repr(value))}
    if hasattr(value, "_repr_markdown_"):
        data["text/markdown"] = _lines(value._repr_markdown_())
    if hasattr(value, "_repr_png_"):
        data = {"text/plain": [type(value).__name__]}
        data["image/png"] = base64.b64encode(_small(value._repr_png_())).decode()
    return data


def _lines(text: str) -> list[str]:
    """Return the lines of a text; folders of this machine are told from the current one, the
    repository and the home folder."""
    for folder, name in ((pathlib.Path.cwd(), ""), (_ROOT, ""), (pathlib.Path.home(), "~/")):
        text = text.replace(f"{folder}/", name)
    return text.splitlines(True)


def _small(png: bytes) -> bytes:
    """Return a picture at a reader's size, in few colours."""
    from PIL import Image  # matplotlib needs it

    with Image.open(io.BytesIO(png)) as image:
        height = round(image.height * _WIDTH / image.width)
        small = image.convert("RGB").resize((_WIDTH, height), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    small.quantize(256, dither=Image.Dither.NONE).save(data, "png", optimize=True)
    return data.getvalue()


def main(_: list[str]) -> None:
    path = pathlib.Path(_NOTEBOOK.value).absolute()
    out = pathlib.Path(_OUT.value or path).absolute()
    notebook = json.loads(path.read_text())
    if _FOLDER.value:
        os.chdir(_FOLDER.value)
    names: dict[str, Any] = {"__name__": "__main__"}
    count = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            count += 1
            cell["outputs"] = run_cell("".join(cell["source"]), names)
            cell["execution_count"] = count
    out.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    app.run(main)
