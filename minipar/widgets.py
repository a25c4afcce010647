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
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from matplotlib.figure import Figure

from . import viz
from .cost import RECOMPUTE, Layout, stage_memory, traffic
from .hardware import CLUSTERS
from .mesh import Mesh
from .schedule import Scheduler, gpipe, interleaved, one_f_one_b, owners, zero_bubble_h1, zero_bubble_h2, zero_bubble_v
from .timeline import Costs
from .transformer import find_model

MOST_FRAMES = 200
DPI, COLORS = 80, 48  # of a frame: about 6 kB each
LIVE = "application/vnd.jupyter.widget-view+json"  # the kind of output that needs a kernel


def explore(fn: Callable[..., Figure], **choices: Iterable[Any]) -> None:
    """Show `fn(**setting)` with a control for each choice: a slider for a range of integers, else a menu. What has one
    value only gets none.

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
        if len(values) > 1:
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
      if (values[i].length > 1) controls.append(label);  // nothing to choose: no control
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


SCHEDULES: dict[str, Scheduler] = {
    "GPipe": gpipe,
    "1F1B": one_f_one_b,
    "interleaved, 2 chunks": interleaved,
    "interleaved, 4 chunks": partial(interleaved, chunks=4),
    "ZB-H1": zero_bubble_h1,
    "ZB-H2": zero_bubble_h2,
    "ZB-V": zero_bubble_v,
}
# F, I, W and communication of a rank's whole part of the model.
COSTS = {
    "F = I = W, messages free": (1, 1, 1, 0),
    "F = I = 2 W, messages F/4": (1, 1, 0.5, 0.25),
}


def schedule_explorer(
    ranks: Iterable[int] = (4, 2),
    microbatches: Iterable[int] = (8, 4),
    schedules: Mapping[str, Scheduler] = SCHEDULES,
    costs: Mapping[str, tuple[float, float, float, float]] = COSTS,
) -> None:
    """Pipeline schedules as they would run: timeline, bubble in both conventions, and what each rank holds over time.

    A rank has the same part of the model in each of them, so its stages are smaller where it has several.

    costs: seconds of F, I, W and communication for a rank's whole part.

    As it stands, 56 frames of about 12 kB. Give fewer values where a notebook has other pictures, too.
    """

    def draw_run(schedule: str, ranks: int, microbatches: int, cost: str) -> Figure:
        order = schedules[schedule](ranks, microbatches)
        chunks = len(owners(order)) // ranks
        f, i, w, communication = costs[cost]
        part = Costs(f / chunks, i / chunks, w / chunks, communication)
        return viz.draw_schedule(order, part, schedule, 1 / chunks)

    explore(draw_run, schedule=list(schedules), ranks=ranks, microbatches=microbatches, cost=list(costs))


def memory_explorer(
    model: Iterable[str] = ("llama-8b", "llama-70b"),
    tp: Iterable[int] = (1, 8),
    pp: Iterable[int] = (1, 4),
    dp: Iterable[int] = (8, 64),
    recompute: Iterable[str] = RECOMPUTE,
    cluster: str = "h100",
    sequence: int = 8192,
) -> None:
    """What the fullest rank holds of a model at each ZeRO stage, against its device's memory."""
    device = CLUSTERS[cluster].device

    def draw_bytes(model: str, tp: int, pp: int, dp: int, recompute: str) -> Figure:
        shape, m = find_model(model), 4 * pp
        fullest = []
        for zero in range(4):
            layout = Layout(Mesh(dp=dp, pp=pp, tp=tp), m, zero=zero, sequence_parallel=tp > 1, recompute=recompute)
            fullest.append(max(stage_memory(shape, layout, dp * m, sequence), key=lambda parts: sum(parts.values())))
        parts = {part: [size[part] / 1e9 for size in fullest] for part in fullest[0]}
        title = f"the fullest rank: {model}, {dp * pp * tp} devices, a row of {sequence:,} tokens a microbatch"
        return viz.draw_bars([f"ZeRO {z}" for z in range(4)], parts, "GB", title, (device.name, device.memory / 1e9))

    explore(draw_bytes, model=model, tp=tp, pp=pp, dp=dp, recompute=recompute)


def layout_explorer(
    meshes: Iterable[Mesh] | None = None,
    axes: Iterable[str] = ("tp", "pp", "dp"),
    innermost: Iterable[str] = ("tp", "dp"),
    model: str = "llama-8b",
    batch: int = 64,
    sequence: int = 8192,
    cluster: str = "h100",
) -> None:
    """Layouts of a model on the devices of their nodes: what each axis sends in a step, and which of them cross nodes.
    By default: 16 devices in two nodes."""
    machine, shape, axes = CLUSTERS[cluster], find_model(model), list(axes)
    sizes = ((2, 1, 8), (4, 1, 4), (16, 1, 1), (2, 2, 4), (4, 4, 1), (1, 2, 8), (1, 16, 1), (1, 1, 16))
    layouts = [Mesh(dp=dp, pp=pp, tp=tp) for dp, pp, tp in sizes] if meshes is None else list(meshes)

    def draw_axes(mesh: Mesh, groups: str, innermost: str) -> Figure:
        layout = Layout(mesh, batch // (mesh.dp * mesh.ep), zero=1, sequence_parallel=mesh.tp > 1)
        stages = traffic(shape, layout, batch, sequence)
        sent = {axis: max(stage[axis] for stage in stages) for axis in axes}
        rates = machine.inside.bandwidth, machine.between.bandwidth
        return viz.draw_layout(mesh, sent, groups, machine.node, innermost, rates)

    explore(draw_axes, mesh=layouts, groups=axes, innermost=innermost)
