"""Pictures of meshes, rings and timelines, each with a sentence that describes it.

Every function here returns a matplotlib Figure that carries its own description (matplotlib calls it label).
`show` puts both into the notebook: the description is the image's alt text. The colors are those of Okabe and
Ito, which readers with the common color deficiencies tell apart; no picture relies on color alone.
"""

from __future__ import annotations

import base64
import html
import inspect
import io
import itertools
import math
import statistics
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch, Rectangle

from .mesh import Mesh
from .schedule import Op, Schedule
from .timeline import Costs, Memory, Seconds, Timeline, bubble, memory, peak, simulate

# Okabe & Ito, "Color Universal Design" (2008), without black, neighbors of different lightness.
PALETTE = ("#56B4E9", "#E69F00", "#009E73", "#F0E442", "#CC79A7", "#0072B2", "#D55E00", "#999999")
INK, PALE, LINE = "#222222", "#F2F2F2", "#666666"
CENTER: dict[str, Any] = {"ha": "center", "va": "center", "color": INK}
WIDTH = 8.0  # inches: about what fits beside the prompts of a notebook
DPI = 100  # of every picture in a notebook: fixed, so that a rebuilt notebook holds the same bytes


# -- figures and their descriptions --------------------------------------------------------------------------


def figure(width: float = 7.0, height: float = 3.0, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of `width` by `height` inches and its axes, row by row, without the top and right spines."""
    drawing = Figure(figsize=(width, height), layout="constrained")
    panels = [drawing.add_subplot(rows, columns, i + 1) for i in range(rows * columns)]
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    return drawing, panels


def describe(drawing: Figure, sentence: str) -> Figure:
    """Give a figure the sentence that a reader who cannot see it is told. Returns the figure."""
    drawing.set_label(sentence)
    return drawing


def description(drawing: Figure) -> str:
    """The sentence given to `describe`. Raises ValueError where there is none."""
    if not (sentence := str(drawing.get_label())):
        raise ValueError(
            "this figure has no description: call describe(figure, 'one sentence') or show(figure, alt=...)"
        )
    return sentence


def png(drawing: Figure, dpi: int = DPI, colors: int | None = None) -> bytes:
    """The figure as a PNG file, the same bytes each time. `colors` limits its palette, for a small file."""
    from PIL import Image  # matplotlib brings it; only pictures need it

    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    if colors is None:
        return buffer.getvalue()
    small = io.BytesIO()
    image = Image.open(buffer).convert("RGB")
    image.quantize(colors, dither=Image.Dither.NONE).save(small, format="PNG", optimize=True)
    return small.getvalue()


class Picture:
    """A figure as notebooks show it: HTML with alt text, because JupyterLab drops the alt text of a PNG."""

    def __init__(self, drawing: Figure, dpi: int = DPI):
        self.alt = description(drawing)
        self.source = "data:image/png;base64," + base64.b64encode(png(drawing, dpi, colors=128)).decode()

    def _repr_html_(self) -> str:
        return f'<img src="{self.source}" alt="{html.escape(self.alt)}" style="max-width: 100%">'

    def __repr__(self) -> str:
        return self.alt


def show(drawing: Figure, alt: str | None = None) -> None:
    """Display the figure below the cell, `alt` (or the description it carries) as its alt text.

    Raises ValueError if the figure has no description: a reader who cannot see it would be told nothing.
    """
    from IPython.display import display

    display(Picture(drawing if alt is None else describe(drawing, alt)))


def show_source(*functions: Callable[..., object]) -> None:
    """Display functions of the package as they stand in its files, after a line that names those."""
    from IPython.display import Markdown, display

    text = "\n\n".join(textwrap.dedent(inspect.getsource(function)).rstrip() for function in functions)
    # JupyterLab would break long lines within a word. In a box as wide as the longest line they scroll.
    wide = 0.62 * max(map(len, text.splitlines()))
    paths = [Path(inspect.getfile(inspect.unwrap(function))) for function in functions]
    files = dict.fromkeys(f"`{path.relative_to(Path(__file__).parents[1]).as_posix()}`" for path in paths)
    code = f'<div style="min-width: {wide:.0f}em">\n\n```python\n{text}\n```\n\n</div>'
    display(Markdown(f"From {', '.join(files)}:\n\n{code}"))


def _lighter(color: str, share: float) -> tuple[float, float, float]:
    """`color` moved towards white by `share` (0 to 1)."""
    r, g, b = (1 - share) * to_rgb(color)[0], (1 - share) * to_rgb(color)[1], (1 - share) * to_rgb(color)[2]
    return r + share, g + share, b + share


# -- meshes --------------------------------------------------------------------------------------------------


def _place(mesh: Mesh, rank: int, used: Sequence[str]) -> tuple[float, float]:
    """Where a rank's box stands: axes go right and down by turns, innermost first; gaps grow outwards."""
    where, at, step, gap = mesh.coordinate(rank), [0.0, 0.0], [1.0, 1.0], [0.12, 0.12]
    for depth, axis in enumerate(reversed(used)):
        side = depth % 2
        at[side] += where[axis] * step[side]
        step[side] = mesh.shape[axis] * step[side] + gap[side]
        gap[side] *= 2.5
    return at[0], at[1]


def draw_mesh(mesh: Mesh, axis: str | None = None) -> Figure:
    """The ranks of a mesh as boxes with their coordinates; the groups of one axis by color and letter.

    Args:
        mesh: readable for up to about 64 ranks.
        axis: one of the mesh's axes; ranks that share a letter and a color talk to each other along it.
    """
    if axis is not None and axis not in mesh.shape:
        raise ValueError(f"axis={axis!r} is not an axis of the mesh; its axes are {', '.join(mesh.shape)}")
    used = [name for name, size in mesh.shape.items() if size > 1]
    places = [_place(mesh, rank, used) for rank in range(mesh.size)]
    columns, rows = (max(place[i] for place in places) + 1 for i in (0, 1))
    scale = min(1.0, 9 / columns)
    height = rows * scale * 0.72 + 0.4
    drawing = Figure(
        figsize=(max(3.4, columns * scale + 0.2), height)
    )  # laid out by hand: explorers draw it many times
    panel = drawing.add_axes((0, 0, 1, 1 - 0.3 / height))
    crowded = scale < 0.8 or len(used) > 3
    groups = mesh.lines(axis) if axis else []
    group_of = {rank: i for i, line in enumerate(groups) for rank in line}
    for rank, (x, y) in enumerate(places):
        group = group_of.get(rank)
        color = PALE if group is None else _lighter(PALETTE[group % len(PALETTE)], 0.35)
        edge = LINE if group is None else INK
        panel.add_patch(
            FancyBboxPatch(
                (x + 0.08, y + 0.08), 0.84, 0.84, boxstyle="round,pad=0,rounding_size=0.1", fc=color, ec=edge
            )
        )
        beside = 0.2 if crowded and group is not None else 0  # makes room for two letters
        panel.text(x + 0.5 + beside, y + 0.36, str(rank), **CENTER, fontsize=15 * scale)
        where = mesh.coordinate(rank)
        coordinates = " ".join(f"{where[name]}" if crowded else f"{name}{where[name]}" for name in used)
        panel.text(x + 0.5, y + 0.72, coordinates, **CENTER, fontsize=7.5 * max(scale, 0.8))
        if group is not None:
            panel.text(x + 0.14, y + 0.26, _letters(group), va="center", fontsize=8 * max(scale, 0.8), weight="bold")
    panel.set(xlim=(-0.05, columns + 0.05), ylim=(rows + 0.05, -0.05), aspect=0.72)
    panel.axis("off")
    sizes = " × ".join(f"{name} {mesh.shape[name]}" for name in used) or "one rank"
    title = sizes if axis is None else f"{sizes}: {len(groups)} group{'s' * (len(groups) != 1)} along {axis}"
    panel.set_title(f"{title} (small digits: {' '.join(used)})" if crowded else title, fontsize=10)
    sentence = f"A grid of {mesh.size} ranks, {sizes}."
    if axis is not None:
        listed = "; ".join(f"{_letters(i)}: {', '.join(map(str, line))}" for i, line in enumerate(groups))
        sentence += f" The groups along {axis} are {listed}."
    return describe(drawing, sentence)


def slots(mesh: Mesh, innermost: str) -> dict[int, int]:
    """Rank -> the device it runs on, where neighbors along one axis are neighbors, and the other axes keep their order.

    With the last axis as the innermost every rank runs on the device of its own number.
    """
    if innermost not in mesh.shape:
        raise ValueError(f"innermost={innermost!r} is not an axis of the mesh; its axes are {', '.join(mesh.shape)}")
    order = [axis for axis in mesh.shape if axis != innermost] + [innermost]
    slot = {}
    for rank in range(mesh.size):
        where, device = mesh.coordinate(rank), 0
        for axis in order:
            device = device * mesh.shape[axis] + where[axis]
        slot[rank] = device
    return slot


def draw_layout(
    mesh: Mesh,
    sent: Mapping[str, float],
    axis: str,
    node: int = 8,
    innermost: str = "tp",
    rates: tuple[float, float] = (450e9, 50e9),
) -> Figure:
    """Ranks on the devices of their nodes, the groups of one axis by color and letter. Below, what each axis sends, and
    whether it crosses nodes.

    Args:
        sent: bytes that a rank sends along each axis in a step.
        axis: whose groups are shown.
        node: devices of a node, drawn as a row in a frame.
        innermost: the axis whose neighbors sit side by side.
        rates: bytes a second that a device sends inside its node, and to another one.
    """
    at = {device: rank for rank, device in slots(mesh, innermost).items()}
    nodes = [[at[d] for d in range(i, min(i + node, mesh.size))] for i in range(0, mesh.size, node)]
    high, bars = 0.74 * len(nodes) + 0.1, 0.36 * len(sent) + 0.2  # inches
    height = high + bars + 0.75
    drawing = Figure(figsize=(WIDTH, height))  # laid out by hand: explorers draw it many times
    groups = _nodes(drawing.add_axes((0, (bars + 0.46) / height, 1, high / height)), mesh, axis, nodes)
    panel = drawing.add_axes((0.08, 0.5 / height, 0.5, (bars - 0.1) / height))
    told = _traffic(panel, sent, {name: crosses(mesh, name, node, innermost) for name in sent}, rates)
    sizes = " × ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1) or "one rank"
    head = f"{sizes}, {innermost} innermost; a letter: a group along {axis}"
    drawing.text(0.01, 1 - 0.05 / height, head, va="top", fontsize=10, color=INK)
    return describe(drawing, f"{head}. Ranks and their groups: {groups}. {told}.")


def _nodes(panel: Axes, mesh: Mesh, axis: str, nodes: Sequence[Sequence[int]]) -> str:
    """Draw the ranks of each node in a frame. Returns how to say it."""
    group_of = {rank: i for i, line in enumerate(mesh.lines(axis)) for rank in line}
    used = [name for name, size in mesh.shape.items() if size > 1]
    widest = max(map(len, nodes))
    room = 0.8 * WIDTH / (widest + 1.1) * 72 / 0.6  # points of the letters that share a box
    shape = "round,pad=0,rounding_size=0.08"
    for row, ranks in enumerate(nodes):
        panel.add_patch(FancyBboxPatch((0.95, row + 0.06), widest, 0.88, boxstyle=shape, fc="white", ec=LINE, lw=1.2))
        panel.text(0.45, row + 0.5, f"node {row}", **CENTER, fontsize=9)
        for x, rank in enumerate(ranks, 1):
            where, group = mesh.coordinate(rank), group_of[rank]
            color = _lighter(PALETTE[group % len(PALETTE)], 0.35)
            panel.add_patch(Rectangle((x, row + 0.13), 0.9, 0.74, fc=color, ec=INK, lw=0.7))
            panel.text(x + 0.06, row + 0.34, _letters(group), va="center", fontsize=9, weight="bold", color=INK)
            panel.text(x + 0.55, row + 0.36, f"{rank}", **CENTER, fontsize=11)
            coordinates = " ".join(f"{name}{where[name]}" for name in used)
            panel.text(x + 0.45, row + 0.7, coordinates, **CENTER, fontsize=min(8, room / max(len(coordinates), 1)))
    panel.set(xlim=(0, widest + 1.1), ylim=(len(nodes), 0), xticks=[], yticks=[])
    panel.axis("off")
    return "; ".join(
        f"node {row}: {', '.join(f'{r}{_letters(group_of[r])}' for r in ranks)}" for row, ranks in enumerate(nodes)
    )


def _traffic(panel: Axes, sent: Mapping[str, float], far: Mapping[str, bool], rates: tuple[float, float]) -> str:
    """Draw the bytes of each axis, striped where they go to other nodes. Returns how to say it."""
    longest, told = max(sent.values()) / 1e9 or 1.0, []
    for row, (axis, size) in enumerate(sent.items()):
        color, hatch, where = (PALETTE[1], "///", "across nodes") if far[axis] else (PALETTE[0], None, "inside nodes")
        text = f"{size / 1e9:.3g} GB {where}: {size / rates[far[axis]]:.2g} s" if size else "nothing"
        panel.barh(row, size / 1e9, color=color, edgecolor=INK, linewidth=0.6, hatch=hatch)
        panel.text(size / 1e9 + 0.015 * longest, row, text, va="center", fontsize=9, color=INK)
        told.append(f"{axis} {text}")
    panel.set(ylim=(len(sent) - 0.5, -0.5), xlim=(0, longest * 1.02), xlabel="GB that a rank sends in a step")
    panel.set_yticks(range(len(sent)), list(sent))
    panel.tick_params(axis="y", length=0)
    panel.spines[["top", "right"]].set_visible(False)
    return "; ".join(told)


def crosses(mesh: Mesh, axis: str, node: int, innermost: str = "tp") -> bool:
    """Do any two ranks that talk along an axis sit in different nodes?"""
    slot = slots(mesh, innermost)
    return any(len({slot[rank] // node for rank in line}) > 1 for line in mesh.lines(axis))


def _letters(number: int) -> str:
    """A, B, ... Z, AA, AB, ..."""
    first, last = divmod(number, 26)
    return (_letters(first - 1) if first else "") + "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[last]


# -- the ring ------------------------------------------------------------------------------------------------


class Ring(NamedTuple):
    """A ring all-reduce after some of its steps."""

    phase: str
    sent: list[int | None]  # sent[rank]: the chunk this rank sent to rank + 1 in the last step
    held: list[list[frozenset[int]]]  # [rank][chunk]: whose numbers this copy of the chunk sums


def ring_state(ranks: int, step: int) -> Ring:
    """The state of a ring all-reduce of `ranks` chunks after `step` of its 2(ranks - 1) steps.

    In the first half (reduce-scatter) rank r sends chunk r - 1 - s and adds what comes to its own, so that it
    ends with the sum of chunk r. In the second (all-gather) it sends chunk r - s, which replaces the receiver's.
    """
    held = [[frozenset({rank})] * ranks for rank in range(ranks)]
    sent: list[int | None] = [None] * ranks
    phase = "start"
    for s in range(min(step, 2 * (ranks - 1))):
        reducing = s < ranks - 1
        phase = "reduce-scatter" if reducing else "all-gather"
        chunks = [(r - 1 - s) % ranks if reducing else (r - (s - ranks + 1)) % ranks for r in range(ranks)]
        before = [list(row) for row in held]
        for rank, chunk in enumerate(chunks):
            to = (rank + 1) % ranks
            held[to][chunk] = before[rank][chunk] | before[to][chunk] if reducing else before[rank][chunk]
        sent = list(chunks)
    return Ring(phase, sent, held)


def _circle(panel: Axes, ranks: Iterable[int], arrows: Mapping[tuple[int, int], str], color: str = INK) -> None:
    """Ranks on a circle, clockwise from the top, and arrows between them, a label beside each."""
    ranks = list(ranks)
    turn = {rank: 2 * math.pi * i / len(ranks) for i, rank in enumerate(ranks)}
    spot = {rank: (math.sin(angle), math.cos(angle)) for rank, angle in turn.items()}
    bend, out = (-0.5, 0.62) if len(ranks) == 2 else (-0.28, 1.17) if len(ranks) < 6 else (0, 1.24)
    for (start, end), label in arrows.items():
        panel.add_patch(
            FancyArrowPatch(
                spot[start],
                spot[end],
                connectionstyle=f"arc3,rad={bend}",
                arrowstyle="-|>",
                mutation_scale=12,
                shrinkA=14,
                shrinkB=14,
                color=color,
                lw=1.5,
            )
        )
        if label:
            middle = turn[start] + math.pi / len(ranks)
            box = {"boxstyle": "round,pad=0.25", "fc": "white", "ec": INK, "lw": 0.8}
            panel.text(out * math.sin(middle), out * math.cos(middle), label, **CENTER, fontsize=10, bbox=box)
    for rank, (x, y) in spot.items():
        box = {"boxstyle": "circle,pad=0.35", "fc": PALETTE[rank % len(PALETTE)], "ec": INK}
        panel.text(x, y, f"{rank}", **CENTER, fontsize=13, bbox=box)
    panel.set(xlim=(-1.5, 1.5), ylim=(-1.5, 1.5), aspect="equal")
    panel.axis("off")


def draw_waits(waits: Mapping[int, int]) -> Figure:
    """Who waits for whom: waits[rank] is the rank that it waits for. A closed loop of arrows is a deadlock."""
    drawing = Figure(figsize=(2.9, 2.9), layout="constrained")
    panel = drawing.add_subplot()
    _circle(panel, sorted({*waits, *waits.values()}), dict.fromkeys(waits.items(), ""))
    panel.set_title("an arrow: waits for", fontsize=9)
    listed = ", ".join(f"{rank} for {other}" for rank, other in sorted(waits.items()))
    return describe(
        drawing, f"Ranks on a circle. An arrow goes from each rank that waits to the one it waits for: {listed}."
    )


def draw_ring(ranks: int, step: int) -> Figure:
    """A ring all-reduce after `step` steps: who sent what to whom, and whose numbers each copy now sums.

    Args:
        ranks: 2 to 8; the tensor is cut into as many chunks.
        step: 0 (nothing sent yet) to 2(ranks - 1) (done); larger ones show the end.
    """
    last = 2 * (ranks - 1)
    step = min(step, last)
    phase, sent, held = ring_state(ranks, step)
    drawing = Figure(figsize=(7.6, 3.7))  # laid out by hand: explorers draw it many times
    circle, table = drawing.add_axes((0, 0, 0.42, 0.92)), drawing.add_axes((0.5, 0.13, 0.49, 0.8))

    arrows = {(r, (r + 1) % ranks): "" if sent[r] is None else f"{sent[r]}" for r in range(ranks)}
    _circle(circle, range(ranks), arrows, INK if step else "#BBBBBB")
    circle.set_title("circle: a rank; square: the chunk it sent on", fontsize=9)

    slot, boxes = 0.84 / ranks, []
    for rank, chunk in itertools.product(range(ranks), repeat=2):
        for other in sorted(held[rank][chunk]):
            left = chunk + 0.08 + other * slot
            boxes.append(Rectangle((left, rank + 0.12), slot, 0.76, fc=PALETTE[other], ec="white", lw=0.6))
            if ranks <= 5:
                table.text(left + slot / 2, rank + 0.5, f"{other}", **CENTER, fontsize=8)
        ink, width = (INK, 2.4) if sent[rank - 1] == chunk else ("#BBBBBB", 0.8)
        boxes.append(Rectangle((chunk + 0.08, rank + 0.12), 0.84, 0.76, fill=False, ec=ink, lw=width))
    table.add_collection(PatchCollection(boxes, match_original=True))
    table.set(xlim=(0, ranks), ylim=(ranks, 0))
    table.set_xticks([c + 0.5 for c in range(ranks)], [f"{c}" for c in range(ranks)])
    table.set_yticks([r + 0.5 for r in range(ranks)], [f"rank {r}" for r in range(ranks)])
    table.set_xlabel("chunk (stripes: whose numbers it sums; thick: just came)", fontsize=8)
    table.tick_params(length=0, labelsize=9)
    table.spines[:].set_visible(False)
    whole = sum(len(copy) == ranks for row in held for copy in row)
    table.set_title(f"step {step} of {last} ({phase}): {whole} of {ranks * ranks} copies complete", fontsize=9)

    sentence = f"Ring all-reduce on {ranks} ranks, after step {step} of {last}"
    if step == 0:
        sentence += ": nothing has been sent, each rank holds its own numbers only."
    else:
        moves = ", ".join(f"{r}→{(r + 1) % ranks} chunk {chunk}" for r, chunk in enumerate(sent))
        sentence += f" ({phase}): {moves}; {whole} of {ranks * ranks} copies are complete sums."
    return describe(drawing, sentence)


# -- tensors of all ranks -------------------------------------------------------------------------------------


def draw_tensors(states: Mapping[str, Sequence[Sequence[float]]], hue: Callable[[float], int]) -> Figure:
    """What every rank holds, side by side for several moments: a row a rank, a box a number.

    What does not fit beside the others begins a new line of pictures.

    Args:
        states: for each title, one list of numbers a rank; the lists of a rank may have any length.
        hue: the number of the palette's color for a value, so that values that belong together look alike.
    """
    widest = [max(map(len, rows)) for rows in states.values()]
    ranks = max(map(len, states.values()))
    box, margin, gap, high = 0.52, 0.45, 0.4, 0.4 * ranks + 0.4  # inches; high: a line of pictures with its titles
    places, line, left = [], 0, margin
    for title, wide in zip(states, widest, strict=True):
        if left > margin and left + box * wide > WIDTH:
            line, left = line + 1, margin
        places.append((line, left))
        left += max(box * wide, 0.07 * len(title)) + gap
    width = max(
        left + max(box * wide, 0.07 * len(t)) for (_, left), wide, t in zip(places, widest, states, strict=True)
    )
    width, height = width + 0.1, (line + 1) * high + 0.05
    drawing = Figure(figsize=(width, height))
    for (line, left), (title, rows), wide in zip(places, states.items(), widest, strict=True):
        bottom = height - (line + 1) * high
        panel = drawing.add_axes((left / width, bottom / height, box * wide / width, 0.4 * ranks / height))
        for rank, row in enumerate(rows):
            for i, value in enumerate(row):
                color = _lighter(PALETTE[hue(value)], 0.35)
                panel.add_patch(Rectangle((i + 0.04, rank + 0.08), 0.92, 0.84, fc=color, ec=INK, lw=0.6))
                panel.text(i + 0.5, rank + 0.5, f"{value:g}", **CENTER, fontsize=8)
        panel.set(xlim=(0, wide), ylim=(ranks, 0))
        panel.set_xticks([])
        panel.set_yticks([r + 0.5 for r in range(ranks)], [f"{r}" for r in range(ranks)])
        panel.tick_params(length=0, labelsize=8)
        panel.spines[:].set_visible(False)
        panel.set_title(title, fontsize=9, loc="left")
        if left == margin:
            panel.set_ylabel("rank", fontsize=8)
    listed = (
        f"{title}: " + "; ".join(", ".join(f"{v:g}" for v in row) for row in rows) for title, rows in states.items()
    )
    return describe(drawing, f"What ranks 0 to {ranks - 1} hold. {'. '.join(listed)}.")


# -- bars ----------------------------------------------------------------------------------------------------


def draw_bars(
    names: Sequence[str],
    parts: Mapping[str, Sequence[float]],
    unit: str,
    title: str = "",
    limit: tuple[str, float] | None = None,
) -> Figure:
    """Horizontal bars, one a name, stacked from `parts`, with the total written at the end of each.

    Args:
        names: the bars, top to bottom.
        parts: for each part of the legend, its size in each bar.
        unit: of the sizes, "MB" or "bytes" for instance.
        limit: a name and a size that is drawn as a line across the bars, a device's memory for instance.
    """
    entries = len(parts) + bool(limit)
    legend_rows = -(-entries // 4) if entries > 1 else 0
    rows = sum(1 + 0.25 * name.count("\n") for name in names)
    drawing, (panel,) = figure(7.0, 0.9 + 0.36 * rows + 0.24 * legend_rows)
    totals = [sum(part[i] for part in parts.values()) for i in range(len(names))]
    left = [0.0] * len(names)
    for i, (part, sizes) in enumerate(parts.items()):
        panel.barh(range(len(names)), sizes, left=left, color=PALETTE[i], edgecolor=INK, linewidth=0.6, label=part)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    longest = max([*totals, limit[1]] if limit else totals)
    for i, total in enumerate(totals):
        panel.text(
            total + longest * 0.012,
            i,
            f"{total:,.4g}" if total < 1e4 else f"{total:,.0f}",
            va="center",
            fontsize=9,
            bbox={"fc": "white", "ec": "none", "pad": 1} if limit else None,
            zorder=3,
        )
    panel.set_yticks(range(len(names)), names)
    panel.set(ylim=(len(names) - 0.4, -0.6), xlim=(0, longest * 1.14 or 1), xlabel=unit)
    panel.tick_params(axis="y", length=0)
    panel.set_title(title, fontsize=10)
    if limit:
        panel.axvline(limit[1], color=INK, lw=2, ls=(0, (4, 2)), label=f"{limit[0]}: {limit[1]:,.4g} {unit}")
    if len(parts) > 1 or limit:
        drawing.legend(loc="outside upper center", ncols=min(len(parts), 4), fontsize=9, frameon=False)
    listed = "; ".join(
        f"{name}: " + ", ".join(f"{part} {sizes[i]:,.4g}" for part, sizes in parts.items())
        for i, name in enumerate(names)
    )
    against = f" A line at {limit[1]:,.4g} {unit}: {limit[0]}." if limit else ""
    return describe(drawing, f"{title + '. ' if title else ''}Bars in {unit}. {listed}.{against}")


# -- timelines -----------------------------------------------------------------------------------------------

COLORS = {Op.F: PALETTE[0], Op.B: PALETTE[1], Op.I: PALETTE[6], Op.W: PALETTE[2]}
NAMES = {Op.F: "F forward", Op.B: "B backward", Op.I: "I input gradient", Op.W: "W weight gradient"}
UNITS = {"s": 1.0, "ms": 1e3, "µs": 1e6}
ROW = 0.42  # inches


def draw(
    timeline: Timeline,
    ax: Axes | None = None,
    title: str = "",
    unit: str | None = None,
    stages: bool = True,
    smallest: float = 5.5,
) -> Figure:
    """A timeline, predicted or recorded: a row a rank, a box an action, the microbatch written in it.

    Where a rank has several virtual stages, the stage stands below the microbatch, and later ones are paler.
    Thin gray bars are communication. A number is left out where it does not fit into its box.

    Args:
        ax: where to draw; a new figure by default. The figure is returned either way.
        unit: "s", "ms" or "µs"; other text names a prediction's unit. Chosen by length if None.
        stages: whether virtual stages are written into their boxes.
        smallest: points of the smallest numbers that are still written.
    """
    ranks = timeline.ranks
    if ax is None:
        _, (ax,) = figure(9.0, ROW * len(ranks) + 1.15)
    drawing = ax.get_figure(root=True)
    assert drawing is not None
    unit = unit or next((u for u, scale in UNITS.items() if timeline.end * scale >= 2), "µs")
    scale, origin = UNITS.get(unit, 1.0), min(s.start for s in timeline.spans)
    length = timeline.end * scale
    stages_of = {rank: sorted({s.action.stage for s in timeline.of(rank)}) for rank in ranks}
    virtual = stages and max(map(len, stages_of.values())) > 1
    points = 0.86 * drawing.get_figwidth() * 72 / length  # of the page, a unit of time

    for row, rank in enumerate(ranks):
        ax.add_patch(Rectangle((0, row - 0.42), length, 0.84, fc=PALE, ec="none"))
        for s in timeline.of(rank):
            start, wide = (s.start - origin) * scale, (s.end - s.start) * scale
            if s.action.op not in COLORS:
                ax.add_patch(Rectangle((start, row + 0.3), wide, 0.12, fc=LINE, ec="none", zorder=3))
                continue
            chunk, chunks = stages_of[rank].index(s.action.stage), len(stages_of[rank])
            color = _lighter(COLORS[s.action.op], 0.55 * chunk / max(chunks - 1, 1))
            ax.add_patch(Rectangle((start, row - 0.42), wide, 0.84, fc=color, ec=INK, lw=0.5, zorder=2))
            lines = [f"{s.action.microbatch}", f"s{s.action.stage}"] if virtual else [f"{s.action.microbatch}"]
            size = min(9.0, wide * points * 0.85 / (0.62 * max(map(len, lines))))
            if size >= smallest:
                ax.text(
                    start + wide / 2,
                    row,
                    "\n".join(lines),
                    **CENTER,
                    fontsize=size,
                    linespacing=1.0,
                    zorder=4,
                    clip_on=True,
                )

    ax.set(xlim=(0, length * 1.001), ylim=(len(ranks) - 0.5, -0.5), xlabel=f"time ({unit})")
    ax.set_yticks(range(len(ranks)), [f"rank {rank}" for rank in ranks])
    ax.tick_params(axis="y", length=0)
    ax.set_title(title, fontsize=10, loc="left")
    used = [op for op in COLORS if any(s.action.op == op for s in timeline.spans)]
    handles = [Patch(fc=COLORS[op], ec=INK, lw=0.5, label=NAMES[op]) for op in used]
    handles.append(Patch(fc=PALE, ec=LINE, lw=0.5, label="idle"))
    if any(s.action.op not in COLORS and s.end > s.start for s in timeline.spans):
        handles.append(Patch(fc=LINE, label="communication"))
    ax.legend(
        handles=handles,
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=len(handles),
        fontsize=8,
        frameon=False,
        borderaxespad=0.2,
        columnspacing=1.2,
        handlelength=1.2,
    )

    busy = sum(s.end - s.start for s in timeline.spans if s.action.op in COLORS)
    idle = 1 - busy / (timeline.end * len(ranks))
    sentence = f"{title or 'A timeline'}: {len(ranks)} ranks, {length:.3g} {unit}, {idle:.0%} of the rank time idle."
    for rank in ranks:
        order = [s for s in timeline.of(rank) if s.action.op in COLORS]
        sentence += f" Rank {rank}: {' '.join(str(s.action) for s in order)}."
    return describe(drawing, sentence)


def compare(predicted: Timeline, recorded: Timeline, unit: str = "forward passes") -> Figure:
    """A predicted run above the recorded one. Each panel has its own unit; within one all ranks share it.

    Args:
        unit: of the prediction; one of "s", "ms", "µs" puts both panels on the same scale.
    """
    rows = len(predicted.ranks) + len(recorded.ranks)
    drawing, (above, below) = figure(9.0, ROW * rows + 2.0, rows=2)
    first = description(draw(predicted, above, "predicted", unit))
    shared = unit if unit in UNITS else None
    second = description(draw(recorded, below, "recorded, on this machine", shared))
    if shared:
        longest = max(predicted.end, recorded.end) * UNITS[unit]
        above.set_xlim(0, longest)
        below.set_xlim(0, longest)
    return describe(drawing, f"{first} {second}")


# -- predictions ---------------------------------------------------------------------------------------------


def draw_memory(held: Memory, ax: Axes | None = None, title: str = "", unit: str = "microbatches") -> Figure:
    """What each rank holds over time (`timeline.memory`): a row a rank, one scale for all, its peak at the end.

    Args:
        held: what was there from the start is drawn in gray, what came and went on top of it in color.
        ax: where to draw; a new figure by default. The figure is returned either way.
        unit: of the sizes.
    """
    if ax is None:
        _, (ax,) = figure(9.0, 0.34 * len(held) + 0.9)
    drawing = ax.get_figure(root=True)
    assert drawing is not None
    peaks = peak(held)
    end, most = max(steps[-1][0] for steps in held.values()), max(peaks.values()) or 1.0
    for row, (rank, steps) in enumerate(held.items()):
        last = dict(steps) | {end: steps[-1][1]}  # of several sizes at one moment
        floor, base = row + 0.44, row + 0.44 - 0.88 * steps[0][1] / most
        times, tops = list(last), [floor - 0.88 * size / most for size in last.values()]
        ax.fill_between(times, base, floor, fc="#BBBBBB", ec="none", step="post")
        ax.fill_between(times, tops, base, fc=_lighter(PALETTE[5], 0.35), ec="none", step="post")
        ax.step(times, tops, where="post", color=INK, lw=0.8)
        ax.plot([times[0], end], [floor, floor], color=LINE, lw=0.5)
        ax.text(
            1.008, row, f"{peaks[rank]:.3g}", color=INK, va="center", fontsize=9, transform=ax.get_yaxis_transform()
        )
    ax.set(ylim=(len(held) - 0.5, -0.5), xlim=(min(steps[0][0] for steps in held.values()), end))
    ax.set_yticks(range(len(held)), [f"rank {rank}" for rank in held])
    ax.tick_params(axis="y", length=0)
    ax.set_title(title or f"held over time; at the end the peak, in {unit}", fontsize=9, loc="left")
    listed = ", ".join(f"rank {rank} {size:.3g}" for rank, size in peaks.items())
    return describe(drawing, f"{title or 'Memory over time'}. The most that each rank holds, in {unit}: {listed}.")


def draw_schedule(
    order: Schedule, costs: Costs | None = None, name: str = "A schedule", activation: Seconds = 1.0, **options: Any
) -> Figure:
    """A schedule as it would run: its timeline, its bubble in both conventions, and what each rank holds over time.

    Args:
        activation: what an F leaves behind, in microbatches of a rank's whole part of the model: 1/2 where each rank
            has two stages.
        options: of `simulate`.
    """
    run = simulate(order, costs, **options)
    held = memory(run, activation)
    ranks = len(order)
    gaps = (0.66, 0.34, 0.5)  # inches: above, between and below the panels
    high = (0.36 * ranks, 0.24 * ranks)
    width, height = WIDTH, sum(gaps) + sum(high)
    drawing = Figure(figsize=(width, height))  # laid out by hand: explorers draw it many times
    left, wide = 0.65 / width, 1 - 1.15 / width
    below = drawing.add_axes((left, gaps[2] / height, wide, high[1] / height))
    above = drawing.add_axes((left, (gaps[2] + high[1] + gaps[1]) / height, wide, high[0] / height), sharex=below)
    draw(run, above, unit="forward passes", stages=False, smallest=7)
    draw_memory(held, below)
    for panel in (above, below):
        panel.spines[["top", "right"]].set_visible(False)
    above.set_xlabel("")
    above.tick_params(labelbottom=False)
    below.set(xlabel="time (forward passes of a rank's whole part)", xlim=(0, run.end * 1.001))
    of_run, of_stage = (f"{100 * bubble(run, of=of):.1f} %" for of in ("run", "stage"))
    head = f"{name}: {run.end:.4g} long. Bubble: {of_run} of the run, {of_stage} of the longest rank's own span"
    drawing.text(0.08 / width, 1 - 0.08 / height, head, va="top", fontsize=10, color=INK)
    peaks = ", ".join(f"rank {rank} {size:.3g}" for rank, size in peak(held).items())
    sentence = f"{head}. The most microbatches that each rank holds: {peaks}."
    return describe(drawing, sentence)


def draw_predictions(names: Sequence[str], predicted: Sequence[float], measured: Sequence[float], unit: str) -> Figure:
    """What was predicted beside what was measured: a row a name, an open circle and a filled square, joined.

    The error of each row, (predicted - measured) / measured, stands at its right; the median of their sizes in the
    title.

    Args:
        names: the rows, top to bottom.
        predicted, measured: one number a name.
        unit: of both, "s" for instance.
    """
    drawing, (panel,) = figure(WIDTH, 1.1 + 0.27 * len(names))
    errors = [p / m - 1 for p, m in zip(predicted, measured, strict=True)]
    typical, worst = statistics.median(map(abs, errors)), max(map(abs, errors))
    longest = max(*predicted, *measured)
    rows = range(len(names))
    panel.hlines(rows, predicted, measured, color=LINE, lw=1.5, zorder=1)
    panel.scatter(measured, rows, marker="s", s=34, color=PALETTE[5], label="measured", zorder=2)
    panel.scatter(
        predicted, rows, marker="o", s=52, facecolors="none", edgecolors=PALETTE[6], lw=1.8, label="predicted", zorder=3
    )
    for row, error in zip(rows, errors, strict=True):
        panel.text(1.12 * longest, row, f"{error:+.0%}", va="center", ha="right", fontsize=9)
    panel.set_yticks(rows, names, fontsize=8)
    panel.set(ylim=(len(names) - 0.4, -0.6), xlim=(0, 1.13 * longest), xlabel=unit)
    panel.grid(axis="y", color=PALE, zorder=0)
    panel.tick_params(axis="y", length=0)
    panel.set_title(f"median error {typical:.0%}, largest {worst:.0%}", fontsize=10, loc="left")
    panel.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=9, frameon=False, borderaxespad=0.2)
    listed = "; ".join(
        f"{name}: predicted {p:.3g}, measured {m:.3g}" for name, p, m in zip(names, predicted, measured, strict=True)
    )
    return describe(drawing, f"Predicted and measured, in {unit}; median error {typical:.0%}. {listed}.")
