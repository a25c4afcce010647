"""Pictures say what they should, to everyone: descriptions, colors, labels that do not overlap, frames that agree."""

import inspect
import itertools
import math
import queue
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from minipar import viz, widgets
from minipar.collectives import Axis
from minipar.mesh import Mesh
from minipar.rings import ring_all_reduce
from minipar.schedule import Action, Op, gpipe, interleaved, one_f_one_b, zero_bubble_h2, zero_bubble_v
from minipar.timeline import Costs, Span, Timeline, bubble, memory, peak, simulate
from minipar.train import Parallel
from minipar.transformer import find_model
from minipar.transport import Done, Pending

CHAPTERS = Path(__file__).parents[1] / "chapters"

# -- descriptions --------------------------------------------------------------------------------------------------


def test_a_figure_without_a_description_is_refused():
    drawing, _ = viz.figure()
    with pytest.raises(ValueError, match="no description"):
        viz.show(drawing)


def test_a_picture_carries_its_description_as_alt_text_in_html():
    picture = viz.Picture(viz.describe(viz.figure()[0], 'a "quoted" <word>'))
    assert 'alt="a &quot;quoted&quot; &lt;word&gt;"' in picture._repr_html_()
    assert repr(picture) == 'a "quoted" <word>'


def drawings() -> dict[str, Figure]:
    run = simulate(one_f_one_b(4, 6), Costs(0.01, 0.01, 0.01, 0.001))
    return {
        "mesh": viz.draw_mesh(Mesh(dp=2, pp=2, tp=2), "tp"),
        "ring": viz.draw_ring(4, 2),
        "waits": viz.draw_waits({0: 1, 1: 0}),
        "tensors": viz.draw_tensors({"before": [[1, 2], [3]]}, hue=int),
        "bars": viz.draw_bars(["one", "two"], {"weights": [1, 2], "gradients": [3, 4]}, "MB", limit=("device", 5)),
        "timeline": viz.draw(run),
        "memory": viz.draw_memory(memory(run, 2, base=3), unit="MB"),
        "schedule": viz.draw_schedule(one_f_one_b(4, 6)),
        "layout": viz.draw_layout(Mesh(dp=2, tp=4), {"dp": 1e9, "tp": 2e9}, "dp", node=4),
        "compare": viz.compare(simulate(one_f_one_b(4, 6)), run),
        "predictions": viz.draw_predictions(["dp=2", "tp=2"], [1.0, 2.0], [1.1, 1.8], "seconds a step"),
    }


def test_every_drawing_describes_itself_and_comes_out_the_same_each_time():
    for (name, first), again in zip(drawings().items(), drawings().values(), strict=True):
        assert len(viz.description(first)) > 20, name
        assert viz.png(first, colors=64) == viz.png(again, colors=64), name


def test_descriptions_say_what_the_picture_shows():
    assert "A: 0, 1; B: 2, 3" in viz.description(viz.draw_mesh(Mesh(dp=2, tp=2), "tp"))
    assert "two: weights 2, gradients 4" in viz.description(drawings()["bars"])
    assert "Rank 1: F0 F1 B0 B1" in viz.description(viz.draw(simulate(gpipe(2, 2))))
    assert "A line at 5 MB: device." in viz.description(drawings()["bars"])
    assert "rank 0 11, rank 1 9, rank 2 7, rank 3 5" in viz.description(drawings()["memory"])  # 3 and twice 4, 3, 2, 1
    assert "20% of the rank time idle" in viz.description(viz.draw(simulate(gpipe(2, 4))))  # (p-1) / (m+p-1)


# -- colors --------------------------------------------------------------------------------------------------------

# Machado, Oliveira, Fernandes 2009, severity 1.0, on linear RGB.
DEFICIENCIES = {
    "none": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.01182, 0.04294, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.3039)),
}
TO_XYZ = torch.tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def lab(color: str, deficiency: str) -> torch.Tensor:
    """A color as such eyes see it, in CIELAB."""
    rgb = torch.tensor(to_rgb(color))
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = TO_XYZ @ (torch.tensor(DEFICIENCIES[deficiency], dtype=torch.float32) @ linear).clamp(0, 1)
    f = (xyz / torch.tensor([0.9505, 1.0, 1.089])).clamp(min=0.008856) ** (1 / 3)
    return torch.stack([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_the_colors_of_a_timeline_differ_for_every_eye(deficiency):
    used = [*viz.COLORS.values(), viz.PALE, viz.LINE]
    for a, b in itertools.combinations(used, 2):
        distance = (lab(a, deficiency) - lab(b, deficiency)).norm()
        assert distance > 12, f"{a} and {b} look alike ({distance:.0f}) with deficiency: {deficiency}"


# -- labels --------------------------------------------------------------------------------------------------------


def boxes_of_texts(drawing: Figure) -> list:
    canvas = FigureCanvasAgg(drawing)
    canvas.draw()
    renderer = canvas.get_renderer()
    texts = [
        t
        for ax in drawing.axes
        for t in [*ax.texts, ax.title, ax._left_title, *ax.get_xticklabels(), *ax.get_yticklabels()]
    ]
    return [t.get_window_extent(renderer) for t in texts if t.get_visible() and t.get_text()]


RUNS = {
    "few": simulate(gpipe(2, 2)),
    "many microbatches": simulate(one_f_one_b(4, 32)),
    "uneven": simulate(gpipe(4, 12), Costs(forward=lambda a: 0.2 + 0.5 * (a.microbatch % 3), backward_weight=0.1)),
    "virtual stages": Timeline(
        [
            Span(r, Action(Op.F, r + 2 * c, m), 4 * c + m, 4 * c + m + 0.9)
            for r in (0, 1)
            for c in (0, 1)
            for m in range(4)
        ]
    ),
    "with communication": Timeline(
        [
            Span(0, Action(Op.F, 0, 0), 0, 1),
            Span(0, Action(Op.SEND_ACTIVATION, 0, 0), 1, 1.5),
            Span(1, Action(Op.F, 1, 0), 1.5, 2.5),
        ]
    ),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_no_label_of_a_timeline_overlaps_another_or_leaves_its_box(run):
    drawing = viz.draw(run, title="a title")
    for a, b in itertools.combinations(boxes_of_texts(drawing), 2):
        assert not a.overlaps(b), (a, b)
    (panel,) = drawing.axes
    boxes = [p.get_window_extent() for p in panel.patches if p.get_zorder() == 2]
    for text in panel.texts:
        label = text.get_window_extent()
        middle = (label.x0 + label.x1) / 2, (label.y0 + label.y1) / 2
        (box,) = [b for b in boxes if b.contains(*middle)]
        assert text.get_fontsize() >= 5.5
        assert box.x0 <= label.x0 and label.x1 <= box.x1 and box.y0 <= label.y0 and label.y1 <= box.y1


def test_a_legend_of_many_parts_stays_on_the_page():
    drawing = viz.draw_bars(["one"], {f"a long name {i}": [1] for i in range(8)}, "MB")
    canvas = FigureCanvasAgg(drawing)
    canvas.draw()
    page, legend = drawing.bbox, drawing.legends[0].get_window_extent(canvas.get_renderer())
    assert page.x0 <= legend.x0 and legend.x1 <= page.x1 and legend.y1 <= page.y1


def test_the_source_that_is_shown_is_the_one_in_the_file(monkeypatch):
    bundles = shown(monkeypatch)
    viz.show_source(Mesh.line, ring_all_reduce)
    text = bundles[0].data
    assert text.startswith("From `minipar/mesh.py`, `minipar/rings.py`:\n")
    assert "\n\n```python\ndef line(self" in text and inspect.getsource(ring_all_reduce).rstrip() in text
    viz.show_source(Parallel.forward)  # torch.no_grad wraps it in a function of another file
    assert bundles[1].data.startswith("From `minipar/train.py`:\n")


def test_pictures_of_tensors_fit_a_notebook_and_their_labels_do_not_overlap():
    some = [[1000 * i for i in range(4)]] * 3
    drawing = viz.draw_tensors(
        {f"a title of {i}": some for i in range(5)} | {"a very long title": [[1]]}, hue=lambda x: 0
    )
    assert drawing.get_figwidth() < 9
    page, texts = drawing.bbox, boxes_of_texts(drawing)
    assert all(page.x0 <= t.x0 and t.x1 <= page.x1 and page.y0 <= t.y0 and t.y1 <= page.y1 for t in texts)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(texts, 2))


@pytest.mark.parametrize("order", [one_f_one_b(4, 8), zero_bubble_h2(8, 16), interleaved(2, 3), zero_bubble_v(1, 1)])
def test_a_schedules_picture_has_its_bubble_in_both_conventions_and_its_peaks_and_no_label_overlaps(order):
    costs = Costs(1, 1, 1, 0.25)
    drawing, run = viz.draw_schedule(order, costs, "this one", activation=0.5), simulate(order, costs)
    told = f"{100 * bubble(run):.1f} % of the run, {100 * bubble(run, of='stage'):.1f} % of the longest rank's own span"
    assert told in viz.description(drawing)
    peaks = peak(memory(run, 0.5))
    assert ", ".join(f"rank {rank} {size:.3g}" for rank, size in peaks.items()) in viz.description(drawing)
    below, above = drawing.axes
    assert [t.get_text() for t in below.texts] == [f"{size:.3g}" for size in peaks.values()]
    assert above.get_xlim() == below.get_xlim()
    texts = boxes_of_texts(drawing)
    outside = [t.get_window_extent() for t in (*drawing.texts, *below.texts, above.get_legend())]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(texts + outside[:1] + outside[-1:], 2))
    page = drawing.bbox
    assert all(page.x0 <= t.x0 and t.x1 <= page.x1 and page.y0 <= t.y0 and t.y1 <= page.y1 for t in outside)


def test_memory_is_drawn_as_high_as_it_is_on_what_is_always_there():
    held = {0: [(0.0, 2.0), (1.0, 4.0), (2.0, 3.0)], 1: [(0.0, 2.0), (3.0, 2.0)]}
    (panel,) = viz.draw_memory(held).axes
    for row, (steps, rank) in enumerate(zip(held.values(), panel.lines[::2], strict=True)):
        bottom = row + 0.44
        heights = {x: bottom - y for x, y in zip(rank.get_xdata(), rank.get_ydata(), strict=True)}
        assert heights == pytest.approx(
            {time: 0.88 * size / 4 for time, size in {3.0: steps[-1][1], **dict(steps)}.items()}
        )


def test_a_timeline_names_its_unit_and_the_stages_where_they_are_virtual():
    assert viz.draw(simulate(gpipe(2, 2), Costs(0.004, 0.004, 0.004))).axes[0].get_xlabel() == "time (ms)"
    assert viz.draw(simulate(gpipe(2, 2)), unit="steps").axes[0].get_xlabel() == "time (steps)"
    assert {t.get_text() for t in viz.draw(RUNS["virtual stages"]).axes[0].texts} >= {"0\ns0", "3\ns3"}


def test_compared_runs_in_seconds_share_one_scale():
    short, long = simulate(gpipe(2, 2), Costs(0.004, 0.004, 0.004)), simulate(gpipe(2, 4), Costs(0.004, 0.004, 0.004))
    above, below = viz.compare(short, long, unit="ms").axes
    assert above.get_xlim() == below.get_xlim()


MESHES = [Mesh(dp=8), Mesh(dp=2, pp=2, tp=2), Mesh(dp=4, tp=4), Mesh(dp=2, pp=4, ep=2, tp=4), Mesh()]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_every_rank_of_a_mesh_has_its_own_box_and_nothing_overlaps(mesh):
    drawing = viz.draw_mesh(mesh, "dp")
    for a, b in itertools.combinations(boxes_of_texts(drawing), 2):
        assert not a.overlaps(b), (a, b)
    boxes = [p.get_window_extent() for p in drawing.axes[0].patches if isinstance(p, FancyBboxPatch)]
    assert len(boxes) == mesh.size
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_groups_have_the_letter_and_the_color_of_their_members():
    mesh = Mesh(dp=2, pp=2, tp=2)
    panel = viz.draw_mesh(mesh, "pp").axes[0]
    colors = [patch.get_facecolor() for patch in panel.patches]
    for line in mesh.lines("pp"):
        assert len({colors[rank] for rank in line}) == 1
    assert len(set(colors)) == len(mesh.lines("pp"))
    with pytest.raises(ValueError, match="'xp' is not an axis"):
        viz.draw_mesh(mesh, "xp")


LAYOUTS = [Mesh(dp=2, tp=8), Mesh(dp=2, pp=2, tp=4), Mesh(dp=2, pp=4, ep=2, cp=2, tp=2), Mesh(dp=6, tp=2), Mesh(tp=2)]


@pytest.mark.parametrize("mesh", LAYOUTS, ids=str)
def test_devices_are_the_ranks_with_one_axis_side_by_side(mesh):
    assert viz.slots(mesh, "tp") == {rank: rank for rank in range(mesh.size)}
    for axis in mesh.shape:
        slot = viz.slots(mesh, axis)
        assert sorted(slot.values()) == list(range(mesh.size))
        for line in mesh.lines(axis):
            assert [slot[rank] for rank in line] == list(range(slot[line[0]], slot[line[0]] + len(line)))


def test_an_axis_crosses_nodes_where_two_that_talk_are_in_different_ones():
    mesh = Mesh(dp=2, pp=2, tp=4)
    assert [axis for axis in mesh.shape if viz.crosses(mesh, axis, 8)] == ["dp"]
    assert [axis for axis in mesh.shape if viz.crosses(mesh, axis, 8, innermost="dp")] == ["pp"]
    assert [axis for axis in mesh.shape if viz.crosses(mesh, axis, 2)] == ["dp", "pp", "tp"]
    assert [axis for axis in mesh.shape if viz.crosses(mesh, axis, 16)] == []
    assert viz.crosses(Mesh(dp=2, tp=6), "tp", 8)  # its second line, not its first
    with pytest.raises(ValueError, match="'xp' is not an axis"):
        viz.crosses(mesh, "dp", 8, innermost="xp")


@pytest.mark.parametrize("mesh", LAYOUTS, ids=str)
@pytest.mark.parametrize("innermost", ["tp", "dp"])
def test_a_layouts_picture_has_each_rank_in_its_node_and_no_label_overlaps(mesh, innermost):
    sent = {"tp": 490e9, "pp": 0.0, "dp": 2e9}
    drawing = viz.draw_layout(mesh, sent, "dp", 8, innermost, rates=(100e9, 10e9))
    panel, below = drawing.axes
    texts = boxes_of_texts(drawing) + [t.get_window_extent() for t in drawing.texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(texts, 2))
    page, written = drawing.bbox, [t.get_window_extent() for t in (*drawing.texts, *panel.texts, *below.texts)]
    assert all(page.x0 <= t.x0 and t.x1 <= page.x1 and page.y0 <= t.y0 and t.y1 <= page.y1 for t in written)
    frames = [p.get_window_extent() for p in panel.patches if isinstance(p, FancyBboxPatch)]
    boxes = [p.get_window_extent() for p in panel.patches if not isinstance(p, FancyBboxPatch)]
    assert len(boxes) == mesh.size and len(frames) == -(-mesh.size // 8)
    inside = [sum(f.x0 < b.x0 and b.x1 < f.x1 and f.y0 < b.y0 and b.y1 < f.y1 for f in frames) for b in boxes]
    assert inside == [1] * mesh.size
    far = {axis: viz.crosses(mesh, axis, 8, innermost) for axis in sent}
    assert [bool(p.get_hatch()) for p in below.patches] == list(far.values())
    told = f"tp 490 GB across nodes: {490 / 10:.2g} s" if far["tp"] else f"tp 490 GB inside nodes: {490 / 100:.2g} s"
    assert told in viz.description(drawing) and "pp nothing" in viz.description(drawing)


# -- the ring ------------------------------------------------------------------------------------------------------


@dataclass
class Arrival:
    """What `wait` waits for: the tensor comes, and is written into `target`."""

    target: torch.Tensor
    box: queue.Queue

    def wait(self):
        self.target.copy_(self.box.get(timeout=10))


@dataclass
class Wire:
    """Carries tensors between threads, and remembers what each rank sent."""

    index: int
    size: int
    boxes: dict
    sent: list = field(default_factory=list)

    def send(self, x, to, tag):
        assert to == (self.index + 1) % self.size
        self.sent.append(x.clone())
        self.boxes[self.index, to].put(x.clone())
        return Pending(Done(), x)

    def recv(self, x, source, tag):
        return Pending(Arrival(x, self.boxes[source, self.index]), x)


@pytest.mark.parametrize("n", [2, 3, 4, 7])
def test_the_picture_of_the_ring_shows_what_the_ring_does(n):
    boxes = {pair: queue.Queue() for pair in itertools.product(range(n), repeat=2)}
    wires = [Wire(rank, n, boxes) for rank in range(n)]
    ranks = tuple(range(n))
    # Chunk c of rank r holds 2^r and 1000 c: a sum tells whose numbers are in it, and its chunk where n terms are.
    mine = [torch.tensor([2.0**r + 1000 * c for c in range(n)], dtype=torch.float64) for r in ranks]
    threads = [
        threading.Thread(target=ring_all_reduce, args=(mine[r], Axis("dp", ranks, r, wires[r])), daemon=True)
        for r in ranks
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    for step in range(2 * (n - 1)):
        before, after = viz.ring_state(n, step).held, viz.ring_state(n, step + 1)
        for rank, chunk in enumerate(after.sent):
            inside = before[rank][chunk]
            assert wires[rank].sent[step].item() == sum(2.0**r + 1000 * chunk for r in inside)
    assert all(copy == frozenset(ranks) for row in viz.ring_state(n, 99).held for copy in row)
    assert len(wires[0].sent) == 2 * (n - 1)


# -- explorers -----------------------------------------------------------------------------------------------------


def a_frame(a: int, b: str = "x") -> Figure:
    drawing, (panel,) = viz.figure(2, 1)
    panel.plot([0, a])
    return viz.describe(drawing, f"a is {a}, b is {b}; </script>")


def test_a_static_page_has_every_frame_once_and_comes_out_the_same():
    grid = {"a": [1, 2, 3], "b": ["x", "y"]}
    page = widgets.static_page(a_frame, grid)
    assert page == widgets.static_page(a_frame, grid)
    assert "http" not in page
    for a, b in itertools.product([1, 2, 3], "xy"):
        assert f"a is {a}, b is {b}" in page
    pictures = re.search(r'"pictures": \[(.*?)\]', page)[1].split(", ")
    assert len(pictures) == 3  # b changes the sentence, not the picture
    assert page.count("</script>") == 1  # a text cannot end the script


@pytest.mark.parametrize(
    ("choices", "named"),
    [({"a": range(201)}, "201 of a is 201 frames"), ({"a": []}, "0 of a is 0 frames"), ({}, "no choices is 0 frames")],
)
def test_too_many_or_no_frames_are_refused(choices, named):
    with pytest.raises(ValueError, match=named):
        widgets.explore(a_frame, **choices)


def test_a_function_that_gives_no_figure_is_refused():
    with pytest.raises(TypeError, match="str returned str"):
        widgets.explore(str, object=[1])


def shown(monkeypatch) -> list[dict]:
    bundles: list[dict] = []
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw=False: bundles.append(bundle))
    return bundles


def test_an_explorer_shows_the_live_and_the_static_version_in_one_output(monkeypatch):
    import ipywidgets

    made = []
    ipywidgets.Widget.on_widget_constructed(made.append)
    bundles = shown(monkeypatch)
    widgets.explore(a_frame, a=[1, 2, 3], b=["x", "y"])
    (bundle,) = bundles
    assert bundle["text/html"] == widgets.static_page(a_frame, {"a": [1, 2, 3], "b": ["x", "y"]})
    ipywidgets.Widget.on_widget_constructed(None)
    number, slider, menu, menu_slider, picture = (
        next(w for w in made if isinstance(w, getattr(ipywidgets, kind)))
        for kind in ("BoundedIntText", "IntSlider", "Dropdown", "SelectionSlider", "HTML")
    )
    assert (number.description, menu.description) == ("a", "b")
    slider.value = 3
    assert number.value == 3 and "a is 3, b is x" in picture.value
    menu_slider.value = "y"
    assert "a is 3, b is y" in picture.value
    number.value, menu.value = 2, "x"
    assert "a is 2, b is x" in picture.value


def explored(monkeypatch, explorer):
    """What it explores: the function and its choices."""
    got = []
    monkeypatch.setattr(widgets, "explore", lambda fn, **choices: got.append((fn, choices)))
    explorer()
    ((fn, choices),) = got
    return fn, {name: list(values) for name, values in choices.items()}


EXPLORERS = [
    widgets.ring_explorer,
    widgets.mesh_explorer,
    widgets.schedule_explorer,
    widgets.memory_explorer,
    widgets.layout_explorer,
]


@pytest.mark.parametrize("explorer", EXPLORERS, ids=lambda e: e.__name__)
def test_an_explorer_is_small_enough_to_be_saved_in_a_notebook(monkeypatch, explorer):
    """Less than 700 kB, where a notebook has 1 MB: some of its frames, times their number."""
    fn, grid = explored(monkeypatch, explorer)
    count = math.prod(len(values) for values in grid.values())
    first, last = ({name: values[i] for name, values in grid.items()} for i in (0, -1))
    sizes = [len(widgets._frame(fn, setting)[0]) for setting in (first, last)]
    assert count <= widgets.MOST_FRAMES and count * sum(sizes) / 2 < 700_000, (count, sizes)


def test_the_schedule_explorer_gives_every_rank_the_same_work_whatever_the_schedule(monkeypatch):
    fn, grid = explored(monkeypatch, widgets.schedule_explorer)
    for schedule in grid["schedule"]:
        text = viz.description(fn(schedule=schedule, ranks=4, microbatches=8, cost="F = I = W, messages free"))
        length, share = re.search(r": ([\d.]+) long\. Bubble: ([\d.]+) %", text).groups()
        assert float(length) * (1 - float(share) / 100) == pytest.approx(8 * 3, rel=2e-3), text


def test_the_memory_explorer_has_the_fullest_rank_of_each_stage(monkeypatch):
    fn, _ = explored(monkeypatch, widgets.memory_explorer)
    text = viz.description(fn(model="llama-8b", tp=1, pp=1, dp=8, recompute="none"))
    parameters = find_model("llama-8b").parameters / 1e9  # 2, 2 and 12 bytes each
    for zero, shares in enumerate([(2, 2, 12), (2, 2, 12 / 8), (2, 2 / 8, 12 / 8), (2 / 8, 2 / 8, 12 / 8)]):
        numbers = re.search(rf"ZeRO {zero}: weights ([\d.]+), gradients ([\d.]+), optimizer ([\d.]+)", text).groups()
        assert [float(n) for n in numbers] == pytest.approx([parameters * share for share in shares], rel=1e-3)
    assert "A line at 80 GB: H100" in text


def test_the_layout_explorer_shows_what_crosses_nodes(monkeypatch):
    fn, _ = explored(monkeypatch, widgets.layout_explorer)
    good, bad = (viz.description(fn(mesh=Mesh(dp=2, tp=8), groups="tp", innermost=i)) for i in ("tp", "dp"))
    assert re.search(r"tp [\d.]+ GB inside nodes", good) and re.search(r"dp [\d.]+ GB across nodes", good)
    assert re.search(r"tp [\d.]+ GB across nodes", bad) and re.search(r"dp [\d.]+ GB inside nodes", bad)


@pytest.mark.parametrize("chapter", sorted(CHAPTERS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_built_chapter_holds_no_live_widget_whose_kernel_is_gone(chapter):
    """JupyterLab would show "model not found" in its place, and not the static version beside it."""
    assert widgets.LIVE not in chapter.read_text(encoding="utf-8")
