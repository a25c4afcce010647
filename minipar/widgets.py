"""Explorers: a picture with controls that works with a kernel and without one.

`explore(fn, **choices)` shows controls over the real function, and in the same output a static copy with one
frame for every setting, drawn beforehand. Which of the two a reader sees:

- after running the cell, in JupyterLab or Notebook: the live one, which calls `fn` for each move;
- on a saved page (nbconvert, a web site) or in a trusted notebook: the static one, moved by the script it
  carries;
- in a notebook that the reader's Jupyter does not trust yet, which drops scripts: the first frame, its
  description, and a line that says to run the cell.

The output holds no random ids but the live widget's own. The notebook builder leaves that one out, since its
kernel is gone; so a rebuild changes nothing.
"""

from __future__ import annotations

import base64
import hashlib
import html
import itertools
import json
import math
from collections.abc import Callable, Iterable
from typing import Any

from matplotlib.figure import Figure

from . import viz
from .mesh import Mesh

MOST_FRAMES = 200
DPI, COLORS = 80, 48  # of a frame: about 6 kB each
LIVE = "application/vnd.jupyter.widget-view+json"  # the kind of output that needs a kernel


def explore(fn: Callable[..., Figure], **choices: Iterable[Any]) -> None:
    """Show `fn(**setting)` with a control for each choice: a slider for a range of integers, else a menu.

    Args:
        fn: draws and returns a figure with a description (`viz.describe`); it depends on its arguments only.
        choices: for each argument of `fn` its values, the first one shown first.

    Raises ValueError if the settings are none or more than 200, since each is drawn and saved with the page;
    TypeError if `fn` returns something else than a figure.
    """
    from IPython.display import display

    grid = {name: list(values) for name, values in choices.items()}
    static = static_page(fn, grid)
    live = _live(fn, grid)
    bundle = {
        LIVE: {"version_major": 2, "version_minor": 0, "model_id": live.model_id},
        "text/html": static,
        "text/plain": _frame(fn, {name: values[0] for name, values in grid.items()})[1],
    }
    display(bundle, raw=True)


def _frame(fn: Callable[..., Figure], setting: dict[str, Any]) -> tuple[str, str]:
    """One setting's picture as a data URL, and its description."""
    drawing = fn(**setting)
    if not isinstance(drawing, Figure):
        raise TypeError(f"{_name(fn)} returned {type(drawing).__name__}; explore needs a matplotlib Figure")
    data = base64.b64encode(viz.png(drawing, DPI, COLORS)).decode()
    return f"data:image/png;base64,{data}", viz.description(drawing)


def _name(fn: Callable[..., Figure]) -> str:
    return getattr(fn, "__name__", type(fn).__name__)


def _is_range(values: list[Any]) -> bool:
    """Whole numbers one after the other get a slider, anything else a menu."""
    return all(type(v) is int for v in values) and values == list(range(values[0], values[0] + len(values)))


def _live(fn: Callable[..., Figure], grid: dict[str, list[Any]]) -> Any:
    """The same picture under ipywidgets' controls, for as long as the kernel runs.

    A row for each choice: a field, which has a name that a screen reader can say, and a slider, which has none but
    keeps the arrow keys that JupyterLab takes from a menu.
    """
    import ipywidgets

    picture, fields, rows = ipywidgets.HTML(), {}, []
    field: Any  # ipywidgets: fields and sliders of either kind
    slider: Any
    for name, values in grid.items():
        if _is_range(values):
            ends = {"value": values[0], "min": values[0], "max": values[-1]}
            field, slider = ipywidgets.BoundedIntText(**ends), ipywidgets.IntSlider(**ends, readout=False)
        else:
            options = {"options": [(str(v), v) for v in values]}
            field, slider = ipywidgets.Dropdown(**options), ipywidgets.SelectionSlider(**options, readout=False)
        field.description, field.style.description_width = name, "initial"  # as wide as the name is
        ipywidgets.link((field, "value"), (slider, "value"))
        fields[name] = field
        rows.append(ipywidgets.HBox([field, slider]))

    def move(_: object = None) -> None:
        picture.value = _figure(*_frame(fn, {name: field.value for name, field in fields.items()}))

    for field in fields.values():
        field.observe(move, "value")
    move()
    return ipywidgets.VBox([*rows, picture])


def _figure(source: str, sentence: str) -> str:
    text = html.escape(sentence)
    return (
        f'<figure style="margin: 0"><img src="{source}" alt="{text}" style="max-width: 100%">'
        f'<figcaption role="status" style="max-width: 46em">{text}</figcaption></figure>'
    )


# Frames are numbered as itertools.product goes through the settings: the last choice moves fastest.
_SCRIPT = """(() => {
  const {names, sliders, values, frames, pictures, sentences} = DATA;
  for (const root of document.querySelectorAll(".KEY")) {
    if (root.dataset.ready) continue;
    root.dataset.ready = "yes";
    root.querySelector(".hint").remove();
    const image = root.querySelector("img"), caption = root.querySelector("figcaption");
    const controls = root.querySelector(".controls"), inputs = [];
    const show = () => {
      const frame = frames[inputs.reduce((at, input, i) => at * values[i].length + Number(input.value), 0)];
      inputs.forEach((input, i) => {
        input.setAttribute("aria-valuetext", values[i][input.value]);
        if (sliders[i]) input.parentNode.lastChild.textContent = values[i][input.value];
      });
      image.src = "data:image/png;base64," + pictures[frame[0]];
      image.alt = caption.textContent = sentences[frame[1]];
    };
    names.forEach((name, i) => {
      const label = document.createElement("label");
      const input = document.createElement(sliders[i] ? "input" : "select");
      label.style.marginRight = "2em";
      label.append(name + " ", input);
      if (sliders[i]) {
        Object.assign(input, {type: "range", min: 0, max: values[i].length - 1, value: 0});
        label.append(" ", document.createElement("span"));
      } else values[i].forEach((value, at) => input.append(new Option(value, at)));
      input.dataset.lmSuppressShortcuts = "true";  // else JupyterLab takes the arrow keys
      input.oninput = show;
      inputs.push(input);
      controls.append(label);
    });
    show();
  }
})()"""


def static_page(fn: Callable[..., Figure], grid: dict[str, list[Any]]) -> str:
    """The explorer as HTML that needs no kernel and no network: every frame is in it, equal ones once."""
    count = math.prod(len(values) for values in grid.values())
    if not grid or not 1 <= count <= MOST_FRAMES:
        sizes = " × ".join(f"{len(values)} of {name}" for name, values in grid.items()) or "no choices"
        raise ValueError(
            f"{sizes} is {count if grid else 0} frames; an explorer draws and saves each of them: "
            f"give values for 1 to {MOST_FRAMES} frames"
        )
    pictures: dict[str, int] = {}
    sentences: dict[str, int] = {}
    frames = []
    for setting in itertools.product(*grid.values()):
        source, sentence = _frame(fn, dict(zip(grid, setting, strict=True)))
        data = source.partition(",")[2]
        frames.append((pictures.setdefault(data, len(pictures)), sentences.setdefault(sentence, len(sentences))))
    data = json.dumps(
        {
            "names": list(grid),
            "sliders": [_is_range(values) for values in grid.values()],
            "values": [[str(v) for v in values] for values in grid.values()],
            "frames": frames,
            "pictures": list(pictures),
            "sentences": list(sentences),
        }
    ).replace("</", "<\\/")  # a text that ends a script must not end this one
    key = "minipar-" + hashlib.sha256(data.encode()).hexdigest()[:12]
    first = _figure(f"data:image/png;base64,{next(iter(pictures))}", next(iter(sentences)))
    return (
        f'<div class="{key}"><p class="hint"><em>Run this cell (Shift+Enter) to get the controls.</em></p>'
        f'<div class="controls"></div>{first}</div>'
        f"<script>{_SCRIPT.replace('KEY', key).replace('DATA', data)}</script>"
    )


# -- explorers that several chapters use ---------------------------------------------------------------------


def ring_explorer(ranks: Iterable[int] = (4, 2, 3)) -> None:
    """The ring all-reduce step by step: which chunk goes where, and whose numbers are in it."""
    ranks = list(ranks)
    explore(viz.draw_ring, ranks=ranks, step=range(2 * (max(ranks) - 1) + 1))


def mesh_explorer(meshes: Iterable[Mesh] | None = None, axes: Iterable[str] = ("dp", "pp", "tp")) -> None:
    """Meshes and the groups of each of their axes. By default: every way to lay 8 ranks on dp, pp and tp."""
    powers = (1, 2, 4, 8)
    layouts = [Mesh(dp=8 // (pp * tp), pp=pp, tp=tp) for pp in powers for tp in powers if pp * tp <= 8]
    explore(viz.draw_mesh, mesh=layouts if meshes is None else meshes, axis=axes)
