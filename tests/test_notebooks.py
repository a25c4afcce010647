"""Notebooks are what their sources say, and fit for readers."""

import ast
import builtins
import contextlib
import importlib
import keyword
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path
from urllib.parse import unquote

import nbformat
import numpy as np
import pytest
from IPython.core.inputtransformer2 import TransformerManager

from minipar.course import build

ROOT = Path(__file__).parents[1]
COMMANDS = {"doctor", "grade", "hint", "plan", "progress", "solution", "train"}
SOURCES = sorted(ROOT.glob("chapters/src/*.py")) + sorted(ROOT.glob("solutions/src/*.py"))

CHAPTER = """\
# %% [markdown] lang="en"
# # A chapter

# %% [markdown] lang="zh"
# # 一章

# %%
def double(x: int) -> int:
    return 2 * x


# %%
print(double(2))

# %% tags=["raises-exception"]
double(1 / 0)
"""

EXERCISE = """\
# %% [markdown] lang="en"
# # An exercise

# %% tags=["setup"]
two = 2

# %% [markdown] lang="en" hint="90.1"
# Two times.

# %% [markdown] lang="en" hint="90.1"
# Use `two * x`.

# %% task="90.1" title="Double"
def double(x):
    ### BEGIN SOLUTION
    y = two * x
    ### END SOLUTION
    return y


# %% check="90.1" seconds=5
# NBVAL_CHECK_OUTPUT
assert double(2) == two * 2, f"double(2) is {double(2)}, not 4"
print("double", double(3))

# %% task="90.2" title="Mend"
def triple(x):
    if x:
        ### BEGIN SOLUTION
        return 3 * x
        ### INSTEAD
        # if x > 0:
        #     return x + 3
        ### END SOLUTION
    return x


# %% check="90.2"
# NBVAL_CHECK_OUTPUT
assert triple(2) == 6, f"triple(2) is {triple(2)}, not 6"
print("triple", triple(3))

# %% [markdown] lang="en" tags=["solution"]
# Why it is so.
"""


def course(folder: Path) -> Path:
    for name, text in (("chapters", CHAPTER), ("solutions", EXERCISE)):
        (folder / name / "src").mkdir(parents=True)
        (folder / name / "src" / "90_small.py").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    root = course(tmp_path_factory.mktemp("course"))
    assert len(build.build(root)) == 3
    return root


def cells(path: Path) -> dict:
    return {cell.id: cell for cell in nbformat.read(path, as_version=4).cells}


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: f"{path.parts[-3]}/{path.stem}")
def test_notebooks_are_what_their_sources_say(source):
    notebook = source.parents[1] / f"{source.stem}.ipynb"
    written = build.read(source)
    solved = build.solve(written)
    assert build.reuse(solved, notebook), f"the code of {notebook.name} is not that of its source: make notebooks"
    assert build.to_text(solved) == notebook.read_text(encoding="utf-8"), "make notebooks"
    assert build.problems(solved) == []
    if source.parts[-3] == "solutions":
        exercise = ROOT / "exercises" / notebook.name
        assert build.to_text(build.blank(written, solved)) == exercise.read_text(encoding="utf-8"), "make notebooks"


@pytest.mark.parametrize("chapter", sorted(ROOT.glob("chapters/*.ipynb")), ids=lambda path: path.stem)
def test_what_a_chapter_shows_of_the_package_is_its_source_of_today(chapter, monkeypatch):
    """A build keeps the outputs of a notebook whose own code has not changed. It does not look at the package."""
    names, shown = {}, []
    monkeypatch.setattr("IPython.display.display", lambda markdown: shown.append(markdown.data))
    for cell in build.code_cells(nbformat.read(chapter, as_version=4)):
        code = ast.parse(TransformerManager().transform_cell(cell.source))  # of %magic
        imports = [node for node in code.body if isinstance(node, ast.Import | ast.ImportFrom)]
        calls = [node for node in ast.walk(code) if isinstance(node, ast.Call) and "show_source" in ast.dump(node.func)]
        shown.clear()
        for node in [*imports, *map(ast.Expr, calls)]:
            exec(compile(ast.fix_missing_locations(ast.Module([node], [])), chapter.name, "exec"), names)
        stored = [text for out in cell.outputs if (text := out.get("data", {}).get("text/markdown"))]
        again = f"{cell.source}\nshows old code: python -m minipar.course.build {chapter.stem} --force"
        assert not calls or stored == shown, again


def spans(markdown: str) -> list[str]:
    """What stands between single backticks."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"```.*?```", "", markdown, flags=re.S))


def names(code: str) -> set[str]:
    """The names in a piece of Python: variables, attributes, arguments, modules, and words that are quoted in it."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        mine = [getattr(node, field, None) for field in ("id", "attr", "arg", "name", "asname", "value")]
        found |= {part for name in mine if isinstance(name, str) for part in name.split(".") if part.isidentifier()}
        found |= {*(getattr(node, "module", None) or "").split(".")}
    return found


def is_there(dotted: str) -> bool:
    """minipar.data.rows, torch.optim.Adam, ...: does it lead somewhere?"""
    head, *rest = dotted.split(".")
    here = importlib.import_module(head)
    for name in rest:
        try:
            here = getattr(here, name) if hasattr(here, name) else importlib.import_module(f"{here.__name__}.{name}")
        except (ImportError, AttributeError):
            return False
    return True


def is_of_a_library(span: str) -> bool:
    """statistics.stdev, sklearn.metrics.f1_score, ..."""
    known = {*sys.stdlib_module_names, *packages_distributions()}
    dotted = re.fullmatch(r"(\w+)(\.\w+)+(\(\))?", span)
    return dotted is not None and dotted[1] in known and is_there(span.removesuffix("()"))


# Other words that stand in code's letters in prose.
WORDS = {"ps", "unpack", "F1", "B1", "pip", "make", "torchrun"}


def unknown(text: str, known: set[str]) -> list[str]:
    """Code in prose that names what nobody defines, commands that are none, files that are not there."""
    found = []
    for span in spans(text):
        if re.fullmatch(r"[\w./*-]+/[\w./*-]*|[\w-]+\.(md|ipynb|toml|yml)", span):  # a file, here or of a library
            there = [*ROOT.glob(span.rstrip("/"))] or [*Path(np.__file__).parents[1].glob(span)]
            found += [] if there or span.startswith(("step-", ".venv")) else [span]
        elif command := re.match(r"python -m minipar (\w+)", span):
            found += [] if command[1] in COMMANDS else [span]
        elif not span.startswith(("--", "source ", "torchrun ")) and not is_of_a_library(span):
            with contextlib.suppress(SyntaxError):
                code = re.sub(r"\.\.\.|…", "", span)
                stored = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)]
                given = {node.id for node in stored if isinstance(node.ctx, ast.Store)}
                used = names(code) - known - given - WORDS
                found += [f"{name} in {span}" for name in used if not keyword.iskeyword(name)]
        found += [name for name in re.findall(r"\b(?:minipar|torch)(?:\.\w+)+", span) if not is_there(name)]
    return found


@pytest.fixture(scope="module")
def package() -> set[str]:
    """All names in the code of minipar, those of installed libraries and of the language."""
    found = {*dir(builtins), *sys.stdlib_module_names, *(name for name in packages_distributions())}
    for file in ROOT.glob("minipar/**/*.py"):
        found |= {file.stem} | names(file.read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize(
    "page", sorted([*ROOT.glob("chapters/*.ipynb"), *ROOT.glob("solutions/*.ipynb")]), ids=lambda path: path.stem
)
def test_every_code_name_in_prose_exists(page, package):
    cells = nbformat.read(page, as_version=4).cells
    code = [TransformerManager().transform_cell(cell.source) for cell in cells if cell.cell_type == "code"]
    known = package.union(*map(names, code))
    assert unknown("\n".join(cell.source for cell in cells if cell.cell_type == "markdown"), known) == []


def test_a_code_name_that_does_not_exist_is_found(package):
    text = (
        "`minipar.simulate` `minipar.simulat` `Mesh(pd=2)` `python -m minipar gread` `minipar/date.py` `tests/laws.py`"
    )
    said = ["minipar.simulat", "pd in Mesh(pd=2)", "python -m minipar gread", "minipar/date.py"]
    assert [found for found in unknown(text, package) if "simulat in" not in found] == said


PAGES = [*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("chapters/*.ipynb"), *ROOT.glob("*s/*.ipynb")]


@pytest.mark.parametrize("page", sorted({*PAGES}), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_links_lead_to_files_that_are_there(page):
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        cells = nbformat.reads(text, as_version=4).cells
        text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text) + re.findall(r"^\[[^\]]+\]: (\S+)", text, re.M)
    local = [unquote(link) for link in links if not re.match(r"\w+:", link)]
    assert [link for link in local if not (page.parent / link).exists()] == []


GLOSSARY = re.findall(
    r'^\| <a id="(.+?)"></a>(.+?) \| (.+?) \| .+? \| \[\w+\]\(\.\./(.+?)\) \|$',
    (ROOT / "docs/glossary.md").read_text(encoding="utf-8"),
    re.M,
)


def test_the_glossary_has_its_terms_in_order_and_each_in_chinese():
    lines = [line for line in (ROOT / "docs/glossary.md").read_text(encoding="utf-8").splitlines() if "|" in line]
    terms = [term.lower() for _, term, *_ in GLOSSARY]
    assert len(terms) == len(lines) - 2, "a row of another form"
    assert len(terms) >= 60 and len(set(terms)) == len(terms) and terms == sorted(terms)
    assert len({place for place, *_ in GLOSSARY}) == len(terms)
    same = [term for _, term, chinese, _ in GLOSSARY if chinese.isascii()]
    assert same == ["bfloat16"], "what is called the same in both languages"


def test_the_chapter_of_a_term_links_it_to_the_glossary_and_no_link_goes_elsewhere():
    pages = {path: path.read_text(encoding="utf-8") for path in ROOT.glob("chapters/src/*.py")}
    missing = [
        f"{page}: {term}"
        for place, term, _, page in GLOSSARY
        if f"(../docs/glossary.md#{place})" not in pages[ROOT / "chapters/src" / f"{Path(page).stem}.py"]
    ]
    assert missing == []
    places = {place for place, *_ in GLOSSARY}
    linked = {found for text in pages.values() for found in re.findall(r"glossary\.md#([^)]*)\)", text)}
    assert linked <= places


def test_every_exercise_has_at_least_three_wrong_answers_for_each_task():
    for source in ROOT.glob("solutions/src/*.py"):
        tasks = [c.metadata["task"] for c in build.read(source).cells if "task" in c.metadata]
        wrong = build.read(ROOT / "tests" / "wrong_answers" / source.name).cells
        count = {task: sum(c.metadata.get("task") == task for c in wrong) for task in tasks}
        assert min(count.values()) >= 3, count


def test_a_second_build_changes_nothing_and_runs_nothing(built, monkeypatch):
    monkeypatch.setattr(build, "run", lambda *_: pytest.fail("a notebook was run again"))
    before = {path: path.stat().st_mtime_ns for path in built.rglob("*.ipynb")}
    assert build.build(built) == []
    assert {path: path.stat().st_mtime_ns for path in built.rglob("*.ipynb")} == before


def test_running_again_gives_the_same_file(built):
    assert build.build(built, force=True) == []


def test_changed_prose_keeps_the_outputs_and_changed_code_is_run(tmp_path, monkeypatch):
    root, ran = course(tmp_path), []
    run = build.run
    monkeypatch.setattr(build, "run", lambda notebook, folder: (ran.append(folder.name), run(notebook, folder)))
    build.build(root, "small")
    source, target = root / "chapters/src/90_small.py", root / "chapters/90_small.ipynb"
    source.write_text(CHAPTER.replace("A chapter", "Another"), encoding="utf-8")
    assert build.build(root) == [target]
    assert ran == ["chapters", "solutions"] and "4\\n" in target.read_text() and "Another" in target.read_text()
    source.write_text(CHAPTER.replace("double(2)", "double(4)"), encoding="utf-8")
    assert build.build(root) == [target]
    assert ran == ["chapters", "solutions", "chapters"] and "8\\n" in target.read_text()


def test_an_exercise_has_no_solution_no_hint_and_only_what_checks_print(built):
    exercise, solution = cells(built / "exercises/90_small.ipynb"), cells(built / "solutions/90_small.ipynb")
    assert exercise["task-90-1"].source == ('def double(x):\n    raise NotImplementedError("your turn")\n    return y')
    assert exercise["task-90-2"].source == (
        "def triple(x):\n    if x:\n        if x > 0:\n            return x + 3\n    return x"
    )
    assert solution["task-90-1"].source == "def double(x):\n    y = two * x\n    return y"
    assert solution["task-90-2"].source == "def triple(x):\n    if x:\n        return 3 * x\n    return x"
    text = (built / "exercises/90_small.ipynb").read_text()
    assert "Two times" not in text and "Why it is so" not in text and "SOLUTION" not in text
    printed = {name: cell.outputs[0].text for name, cell in exercise.items() if cell.get("outputs")}
    assert printed == {"check-90-1": "double 6\n", "check-90-2": "triple 9\n"}


def test_a_language_has_its_own_prose_and_the_same_code(tmp_path):
    source = course(tmp_path) / "chapters/src/90_small.py"
    english, chinese = build.read(source, "en"), build.read(source, "zh")
    assert english.cells[0].source == "# A chapter" and chinese.cells[0].source == "# 一章"
    assert build.code_cells(english) == build.code_cells(chinese)
    source.write_text("# %% [markdown]\n# no language\n")
    with pytest.raises(build.BuildError, match="no language"):
        build.read(source)


PNG = {"image/png": "aWNvbg=="}


@pytest.mark.parametrize(
    "source, output, says",
    [
        ("x = 1\n" * 26, None, "26 lines of code, 25 are allowed"),
        ("1 / 0", ("error", {"ename": "ZeroDivisionError", "evalue": "division"}), "raises ZeroDivisionError"),
        ("warn()", ("stream", {"name": "stderr", "text": "UserWarning: x"}), "writes to stderr"),
        ("where()", ("stream", {"name": "stdout", "text": f"{Path.cwd()}/x.py"}), "shows a path of this machine"),
        ("draw()", ("display_data", {"data": PNG}), "image/png without a description"),
        ("draw()", ("display_data", {"data": {"text/html": "<img src='x'>"}}), "an <img> without alt text"),
        ("print(x)", ("stream", {"name": "stdout", "text": "x" * 1_000_000}), "1,000,000 are allowed"),
    ],
)
def test_what_readers_should_not_meet_is_refused(source, output, says):
    cell = nbformat.v4.new_code_cell(source.strip(), id="cell")
    if output:
        cell.outputs = [nbformat.v4.new_output(output[0], **output[1])]
    found = build.problems(nbformat.v4.new_notebook(cells=[cell]))
    assert len(found) == 1 and says in found[0]


def test_live_widgets_are_taken_out_and_their_static_version_stays(tmp_path):
    root = course(tmp_path)
    both = '{"text/html": "static", "application/vnd.jupyter.widget-view+json": {"model_id": "1"}}'
    show = f"from IPython.display import display\n\ndisplay({both}, raw=True)\n"
    (root / "chapters/src/90_small.py").write_text(f"# %%\n{show}")
    build.build(root, "chapters")
    (cell,) = cells(root / "chapters/90_small.ipynb").values()
    assert [output.data for output in cell.outputs] == [{"text/html": "static"}]


def test_described_images_and_expected_errors_are_fine():
    described = nbformat.v4.new_output("display_data", data=PNG, metadata={"image/png": {"alt": "a ring"}})
    error = nbformat.v4.new_output("error", ename="RankError", evalue="rank 1 waits")
    shown = [
        nbformat.v4.new_code_cell("draw()", outputs=[described]),
        nbformat.v4.new_code_cell("hang()", outputs=[error], metadata={"tags": ["raises-exception"]}),
    ]
    assert build.problems(nbformat.v4.new_notebook(cells=shown)) == []


@pytest.mark.parametrize(("tags", "fine"), [(["raises-exception"], False), (["raises-exception", "solution"], True)])
def test_what_fails_in_a_solution_is_refused_though_it_may_in_the_blank_exercise(tmp_path, tags, fine):
    root = course(tmp_path)
    failing = f"\n\n# %% tags={tags}\n1 / 0\n".replace("'", '"')
    (root / "solutions/src/90_small.py").write_text(EXERCISE + failing, encoding="utf-8")
    if fine:
        assert build.build(root, "solutions")
    else:
        with pytest.raises(build.BuildError, match="raises ZeroDivisionError"):
            build.build(root, "solutions")


def test_a_check_that_prints_nothing_is_refused(tmp_path):
    root = course(tmp_path)
    (root / "chapters/src/90_small.py").unlink()
    (root / "solutions/src/90_small.py").write_text(EXERCISE.replace('print("triple", triple(3))', ""))
    with pytest.raises(build.BuildError, match=r"check-90-2.*prints once"):
        build.build(root)


def test_a_cell_that_fails_stops_the_build(tmp_path):
    root = course(tmp_path)
    (root / "chapters/src/90_small.py").write_text(CHAPTER.replace("double(2)", "doble(2)"))
    with pytest.raises(build.BuildError, match="name 'doble' is not defined"):
        build.build(root)
    assert not (root / "chapters/90_small.ipynb").exists()
