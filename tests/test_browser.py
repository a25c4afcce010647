"""What a reader sees: explorers and chapters in a real browser, JupyterLab and all its parts included."""

import inspect
import shutil
import time
from functools import partial
from pathlib import Path

import nbformat
import pytest
from browser import CHROMIUM, browser, lab
from nbformat.sign import NotebookNotary

from minipar import Mesh, gpipe, viz, widgets, zero_bubble_h1

pytest.importorskip("playwright", reason="the browser tests drive Chromium with playwright, which is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome on this machine")

CHAPTERS = Path(__file__).parents[1] / "chapters"


def bars(height, color):
    drawing, (panel,) = viz.figure(2, 1)
    panel.bar([0], [height], color=color)
    return viz.describe(drawing, f"a {color} bar of height {height}")


def test_the_saved_page_of_an_explorer_is_moved_by_keyboard_without_kernel_or_network():
    page = widgets.static_page(bars, {"height": [1, 2, 3], "color": ["red", "blue"]})
    with browser() as tab:
        tab.page.set_content(f"<!doctype html><main>{page}{page}</main>")  # twice on one page: both work
        for first in (0, 1):
            explorer = tab.page.locator("main > div").nth(first)
            image, pictures = explorer.locator("img"), set()
            pictures.add(image.get_attribute("src"))
            assert image.get_attribute("alt") == "a red bar of height 1"
            explorer.get_by_role("slider", name="height").press("ArrowRight")
            pictures.add(image.get_attribute("src"))
            assert image.get_attribute("alt") == "a red bar of height 2"
            explorer.get_by_role("combobox", name="color").select_option("blue")
            pictures.add(image.get_attribute("src"))
            assert explorer.get_by_role("status").inner_text() == "a blue bar of height 2"
            assert len(pictures) == 3
            assert explorer.get_by_text("Run this cell").count() == 0  # there are controls: nothing to run
        assert tab.errors == [] and tab.outside == []


@pytest.fixture(scope="module")
def jupyter(tmp_path_factory):
    """A JupyterLab: the address of its files, the folder they are in, and the folder of its own data."""
    folder, home = tmp_path_factory.mktemp("chapters"), tmp_path_factory.mktemp("home")
    with lab(folder, home) as address:
        yield address, folder, home / "data"


def test_the_saved_explorer_of_a_trusted_notebook_is_moved_by_keyboard_in_jupyterlab(jupyter):
    address, folder, data = jupyter
    page = widgets.static_page(bars, {"height": [1, 2, 3], "color": ["red", "blue"]})
    shown = nbformat.v4.new_output("display_data", {"text/html": page})
    cell = nbformat.v4.new_code_cell("explore()", outputs=[shown], execution_count=1)
    kernel = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": kernel})
    nbformat.write(notebook, folder / "trusted.ipynb")
    notary = NotebookNotary(data_dir=str(data))
    notary.sign(nbformat.read(folder / "trusted.ipynb", as_version=4))
    notary.store.close()
    with browser() as tab:
        tab.open(address.format("trusted.ipynb"))
        caption = tab.page.locator("figcaption")
        tab.page.get_by_role("slider", name="height").press("ArrowRight")  # JupyterLab wants this key, too
        assert caption.inner_text() == "a red bar of height 2"
        tab.page.get_by_role("combobox", name="color").press("ArrowDown")
        assert caption.inner_text() == "a blue bar of height 2"
        assert tab.errors == [] and tab.outside == []


def moves(explorer):
    """Its menus, or fields, or sliders, each with ways to move it, and the way back."""
    menus = explorer.get_by_role("combobox").all()
    fields = explorer.get_by_role("spinbutton").all() or explorer.get_by_role("slider").all()
    for menu in menus:
        others = range(1, menu.locator("option").count())
        if others:
            yield menu, [partial(menu.select_option, index=i) for i in others], partial(menu.select_option, index=0)
    if not (menus and explorer.get_by_role("spinbutton").count() == 0 and "widget" in explorer.get_attribute("class")):
        for field in fields:  # a live menu has a slider beside it, which moves the same
            keys = ("ArrowUp", "ArrowDown") if field.get_attribute("type") == "number" else ("ArrowRight", "ArrowLeft")
            forth, back = (partial(field.press, key) for key in keys)
            yield field, [forth], back


def until(is_so, seconds, page):
    """Whether it is so at some time."""
    deadline = time.monotonic() + seconds
    while not (so := is_so()) and time.monotonic() < deadline:
        page.wait_for_timeout(50)
    return so


def move_all(explorer, where):
    """Move each control until the picture is another one (for some values two schedules are the same), and see that its
    caption says so. How many controls there were."""
    image, caption, moved = explorer.locator("figure img"), explorer.get_by_role("status"), 0
    for control, ways, back in moves(explorer):
        before = image.get_attribute("src")
        for way in ways:
            way()
            if until(lambda old=before: image.get_attribute("src") != old, 20 / len(ways), explorer.page):
                break
        assert image.get_attribute("src") != before, f"{where}: {control} moves, and the picture stays"
        # Picture and caption change one after the other.
        fits = until(lambda: caption.inner_text() == image.get_attribute("alt"), 20, explorer.page)
        assert fits, f"{where}: {control} moves, and its caption is {caption.inner_text()}"
        back()
        until(lambda old=before: image.get_attribute("src") == old, 5, explorer.page)  # where it began at the first
        moved += 1
    return moved


@pytest.mark.parametrize(
    "name", ["02b_ranks_and_collectives", "03c_pipeline_parallel", "03d_schedules", "04b_cost_models"]
)
def test_a_chapter_runs_in_jupyterlab_and_each_control_of_its_explorers_moves_the_picture(jupyter, name):
    address, folder, _ = jupyter
    shutil.copy(CHAPTERS / f"{name}.ipynb", folder)
    with browser() as tab:
        tab.open(address.format(f"{name}.ipynb"))
        # Not trusted yet: JupyterLab drops the script. The first frame is there, and how to go on.
        waiting = tab.page.get_by_text("Run this cell (Shift+Enter)")
        number = waiting.count()
        assert number >= 1
        tab.run_all(seconds=400)
        assert tab.tracebacks() == []
        images = tab.page.locator(".jp-OutputArea-output img")
        assert images.count() >= 5
        assert all(len(image.get_attribute("alt") or "") > 20 for image in images.all())
        assert waiting.count() == 0  # the live versions took their places
        live = tab.page.locator(".jp-OutputArea-output .widget-vbox:has(figure)")
        assert live.count() == number
        assert all(move_all(explorer, name) >= 1 for explorer in live.all())
        assert tab.errors == []
        assert tab.outside == []


@pytest.mark.parametrize("chapter", sorted(CHAPTERS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_the_saved_page_of_a_chapter_keeps_its_explorers_without_a_kernel(chapter):
    cells = nbformat.read(chapter, as_version=4).cells
    pages = [page for c in cells for out in c.get("outputs", []) if "<script" in (page := html_of(out))]
    assert pages or "widgets" not in "".join(c.source for c in cells if c.cell_type == "code")
    with browser() as tab:
        tab.page.set_content(f"<!doctype html><main>{''.join(pages)}</main>")
        for i in range(len(pages)):
            assert move_all(tab.page.locator("main > div").nth(i), chapter.stem) >= 1
        assert tab.errors == [] and tab.outside == []


def html_of(output) -> str:
    return output.get("data", {}).get("text/html", "")


def explorers():
    """Every explorer of minipar.widgets that is not in chapter 02b, with few frames. It is the cell of a notebook."""
    widgets.schedule_explorer([2], [2, 4], {"GPipe": gpipe, "ZB-H1": zero_bubble_h1})
    widgets.memory_explorer(["llama-8b"], tp=[1, 8], pp=[1, 4], dp=[8], recompute=["none", "full"])
    widgets.layout_explorer([Mesh(dp=2, tp=8), Mesh(dp=16)], axes=["tp", "dp"])


MOVES = [  # of each explorer: a control, its value, what the caption says then and did not say before
    [
        ("schedule", "ZB-H1", "ZB-H1: 7 long. Bubble: 14.3 % of the run"),
        ("microbatches", "4", "ZB-H1: 13 long. Bubble: 7.7 % of the run, 7.7 % of the longest rank's own span"),
    ],
    [
        ("tp", "8", "llama-8b, 64 devices"),
        ("pp", "4", "llama-8b, 256 devices"),
        ("recompute", "full", "activations 0.2097, logits 1.051"),
    ],
    [
        ("innermost", "dp", "dp 2 × tp 8, dp innermost; a letter: a group along tp"),
        ("mesh", "Mesh(dp=16)", "dp 16, dp innermost"),
        ("groups", "dp", "a group along dp. Ranks and their groups: node 0: 0A, 1A,"),
    ],
]


def move(explorer, moves):
    """Move controls of an explorer: each time its picture changes, and its caption says what it shows."""
    image, caption = explorer.locator("img"), explorer.get_by_role("status")
    for name, value, said in moves:
        before = image.get_attribute("src")
        explorer.get_by_role("combobox", name=name, exact=True).select_option(value)
        caption.get_by_text(said).wait_for(timeout=30_000)
        moved = until(lambda old=before: image.get_attribute("src") != old, 30, explorer.page)
        assert moved and said in image.get_attribute("alt"), (name, value)


def test_every_explorer_moves_on_a_saved_page(monkeypatch):
    bundles = []
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw=False: bundles.append(bundle))
    explorers()
    with browser() as tab:
        tab.page.set_content(f"<!doctype html><main>{''.join(bundle['text/html'] for bundle in bundles)}</main>")
        for i, moves in enumerate(MOVES):
            move(tab.page.locator("main > div").nth(i), moves)
        assert tab.errors == [] and tab.outside == []


def test_every_explorer_moves_in_jupyterlab(jupyter):
    address, folder, _ = jupyter
    head = "from minipar import Mesh, gpipe, widgets, zero_bubble_h1"
    lines = [line.strip() for line in inspect.getsource(explorers).splitlines()[2:]]
    cells = [nbformat.v4.new_code_cell(f"{head}\n{line}") for line in lines]
    kernel = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder / "explorers.ipynb")
    with browser() as tab:
        tab.open(address.format("explorers.ipynb"))
        tab.run_all(seconds=240)
        assert tab.tracebacks() == []
        for i, moves in enumerate(MOVES):
            move(tab.page.locator(".jp-CodeCell").nth(i), moves)
        assert tab.errors == [] and tab.outside == []
