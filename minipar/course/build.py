"""Notebooks from their sources: `python -m minipar.course.build`.

    chapters/src/*.py   ->  chapters/*.ipynb    executed, with outputs
    solutions/src/*.py  ->  solutions/*.ipynb   executed, with outputs
                        ->  exercises/*.ipynb   answers and outputs taken out, checks folded

A source is a Python file in jupytext's percent format. What a cell is for stands on its first line:

    # %% [markdown] lang="en"                           prose; each language has its own cells, code is shared
    # %% [markdown] lang="en" hint="03a.1"              a hint for a task, left out of the exercise
    # %% tags=["setup"]                                 needed by every task below
    # %% task="03a.1" title="Which rows are mine?"      an answer; between the markers stands the solution
    # %% check="03a.1" seconds=10                       its verdict: asserts, then one printed line
    # %% tags=["solution"]                              stays in the solution only
    # %% tags=["raises-exception"]                      may fail in a chapter; in an exercise, while answers are blank

In an answer, the lines between `### BEGIN SOLUTION` and `### END SOLUTION` become
`raise NotImplementedError("your turn")`; where `### INSTEAD` divides them, the comment below it, without its
comment signs, stands there instead (a bug to mend).

A notebook whose code has not changed is not run again, so a second build changes nothing.
"""

import argparse
import hashlib
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jupytext
import nbformat
from nbformat import NotebookNode

LONGEST_CELL = 25  # lines of code
LONGEST_FOLDED = 40  # of a cell that readers need not read: set-up and checks of exercises
LARGEST_NOTEBOOK = 1_000_000  # bytes
CELL_SECONDS = 60  # a cell may take; `seconds=` on the cell says otherwise

SOLUTION = re.compile(
    r"^(?P<indent>[ \t]*)### BEGIN SOLUTION\n"
    r"(?P<solution>.*?)"
    r"(?:^[ \t]*### INSTEAD\n(?P<instead>.*?))?"
    r"^[ \t]*### END SOLUTION(?:\n|\Z)",
    re.DOTALL | re.MULTILINE,
)
NOTEBOOK_METADATA = {
    "kernelspec": {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"},
    "language_info": {"name": "python"},
}


class BuildError(Exception):
    """A source or what it printed is not fit for readers. The message has a line for each problem."""


def read(source: Path, language: str = "en") -> NotebookNode:
    """The notebook that a source describes, in one language, solutions in place, not yet run."""
    notebook = jupytext.reads(source.read_text(encoding="utf-8"), fmt="py:percent")
    notebook.cells = [c for c in notebook.cells if c.cell_type == "code" or _language(c, source) == language]
    notebook.metadata = nbformat.from_dict(NOTEBOOK_METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    seen: Counter[str] = Counter()
    for cell in notebook.cells:
        cell.metadata.pop("lines_to_next_cell", None)  # jupytext's own, of the spacing in the source
        name = _name(cell)
        cell.id = name + f"-{seen[name]}" * (seen[name] > 0)
        seen[name] += 1
    return notebook


def _language(cell: NotebookNode, source: Path) -> str:
    if "lang" not in cell.metadata:
        raise BuildError(f'{source.name}: prose without lang="en" on its first line: {cell.source[:60]!r}')
    return cell.metadata["lang"]


def _name(cell: NotebookNode) -> str:
    """An id that stays: of the task for answers and checks, of the text for all else."""
    for kind in ("task", "check"):
        if kind in cell.metadata:
            return f"{kind}-{cell.metadata[kind].replace('.', '-')}"
    return hashlib.sha256(cell.source.encode()).hexdigest()[:8]


def solve(notebook: NotebookNode) -> NotebookNode:
    """The notebook with its solutions, the markers taken out."""
    return _rewritten(notebook, lambda match: match["solution"])


def blank(notebook: NotebookNode, solved: NotebookNode) -> NotebookNode:
    """The exercise: answers, hints and outputs taken out, checks folded, with what those of `solved` print."""
    printed = {cell.id: cell for cell in solved.cells if "check" in cell.metadata}
    exercise = _rewritten(notebook, _your_turn)
    exercise.cells = [c for c in exercise.cells if "hint" not in c.metadata and "solution" not in _tags(c)]
    for cell in exercise.cells:
        if cell.id in printed:
            cell.outputs = printed[cell.id].outputs
            cell.execution_count = printed[cell.id].execution_count
            cell.metadata.update(editable=False, deletable=False, jupyter={"source_hidden": True})
        elif "task" in cell.metadata:
            cell.metadata.update(deletable=False)
        elif cell.cell_type == "code":  # nbval has nothing to compare it with
            cell.metadata["tags"] = [*_tags(cell), "nbval-ignore-output"]
    return exercise


def _tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def _your_turn(match: re.Match[str]) -> str:
    if match["instead"] is None:
        return f'{match["indent"]}raise NotImplementedError("your turn")\n'
    return re.sub(r"^([ \t]*)# ?", r"\1", match["instead"], flags=re.MULTILINE)


def _rewritten(notebook: NotebookNode, replacement: Callable[[re.Match[str]], str]) -> NotebookNode:
    notebook = nbformat.from_dict(notebook)
    for cell in notebook.cells:
        cell.source = SOLUTION.sub(replacement, cell.source + "\n").rstrip("\n")
    return notebook


def run(notebook: NotebookNode, folder: Path) -> None:
    """Run every cell in a kernel of this Python, in `folder`, and keep the outputs in the notebook."""
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError
    from traitlets.config import Config

    from .kernel import by_file

    client = NotebookClient(
        notebook,
        timeout_func=lambda cell: cell.metadata.get("seconds", CELL_SECONDS),
        resources={"metadata": {"path": str(folder)}},
        kernel_name="python3",
        config=Config(KernelManager=by_file()),
        extra_arguments=["--log-level=40"],  # not that a loopback connection is not encrypted
        coalesce_streams=True,
        record_timing=False,
        store_widget_state=False,
    )
    try:
        client.execute()
    except CellExecutionError as error:
        raise BuildError(str(error)) from None
    notebook.metadata = nbformat.from_dict(NOTEBOOK_METADATA)
    _drop_live_widgets(notebook)


def _drop_live_widgets(notebook: NotebookNode) -> None:
    """Take out what needs the kernel that has just ended; the static version stands beside it in the same output."""
    for cell in code_cells(notebook):
        for output in cell.outputs:
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)


def reuse(notebook: NotebookNode, target: Path) -> bool:
    """Take the outputs from an earlier build, if its code is the same. Says whether it is."""
    if not target.exists():
        return False
    old = code_cells(nbformat.read(target, as_version=4))
    new = code_cells(notebook)
    if [c.source for c in old] != [c.source for c in new]:
        return False
    for before, cell in zip(old, new, strict=True):
        cell.outputs, cell.execution_count = before.outputs, before.execution_count
    _drop_live_widgets(notebook)
    return True


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def problems(notebook: NotebookNode) -> list[str]:
    """What readers should not meet in a finished notebook, a line each."""
    found, tasks = [], any("task" in cell.metadata for cell in notebook.cells)
    for cell in code_cells(notebook):
        where = f"cell {cell.id} ({cell.source.splitlines()[0][:50] if cell.source else 'empty'})"
        lines = len(cell.source.splitlines())
        longest = LONGEST_FOLDED if "check" in cell.metadata or "setup" in _tags(cell) else LONGEST_CELL
        if lines > longest:
            found.append(f"{where}: {lines} lines of code, {longest} are allowed")
        printed = [out for out in cell.outputs if out.get("name") == "stdout"]
        if "check" in cell.metadata and ("# NBVAL_CHECK_OUTPUT" not in cell.source or len(printed) != 1):
            found.append(f"{where}: a check cell has the comment # NBVAL_CHECK_OUTPUT and prints once")
        # With all answers there nothing fails, but for a cell that the solution has for itself.
        may_fail = "raises-exception" in _tags(cell) and (not tasks or "solution" in _tags(cell))
        for output in cell.outputs:
            found += [f"{where}: {problem}" for problem in _output_problems(output, may_fail)]
    size = len(to_text(notebook).encode())
    if size > LARGEST_NOTEBOOK:
        found.append(f"the notebook has {size:,} bytes, {LARGEST_NOTEBOOK:,} are allowed")
    return found


def _output_problems(output: NotebookNode, may_fail: bool) -> list[str]:
    found = []
    text = str(output)
    if output.output_type == "error" and not may_fail:
        found.append(f"raises {output.ename}: {output.evalue}")
    if output.get("name") == "stderr":
        found.append(f"writes to stderr: {output.text[:200]!r}")
    for path in (str(Path.cwd()), sys.prefix, str(Path.home())):
        if len(path) > 5 and path in text:  # "/root" counts, "/" does not
            found.append(f"shows a path of this machine: {path}")
    for kind in output.get("data", {}):
        described = output.metadata.get("alt") or output.metadata.get(kind, {}).get("alt")
        if kind.startswith("image/") and not described:
            found.append(f"{kind} without a description for those who cannot see it (metadata: alt)")
    html = "".join(output.get("data", {}).get("text/html", ""))
    if any("alt=" not in tag for tag in re.findall(r"<img\b[^>]*>", html)):
        found.append("an <img> without alt text")
    return found


def to_text(notebook: NotebookNode) -> str:
    return nbformat.writes(notebook, version=4) + "\n"


def build(root: Path, only: str = "", force: bool = False) -> list[Path]:
    """Build every notebook whose source's path from `root` contains `only`. Returns the files that changed.

    `force` runs the unchanged ones too. Raises BuildError, at the end, when a notebook does not run or is not fit for
    readers: its files stay as they were.
    """
    changed, found = [], []
    for source in [*sorted(root.glob("chapters/src/*.py")), *sorted(root.glob("solutions/src/*.py"))]:
        if only in str(source.relative_to(root)):
            try:
                results = _build(source, root, force)
            except BuildError as error:
                found.append(f"{source.relative_to(root)}: {error}")
            else:
                changed += [path for path, notebook in results.items() if _write(path, to_text(notebook))]
    if found:
        raise BuildError("\n".join(found))
    return changed


def _build(source: Path, root: Path, force: bool) -> dict[Path, NotebookNode]:
    """The notebooks of one source, by the files that they belong in."""
    target = source.parents[1] / f"{source.stem}.ipynb"
    written = read(source)
    solved = solve(written)
    if force or not reuse(solved, target):
        started = time.perf_counter()
        print(f"{target.relative_to(root)} ...", end=" ", flush=True)
        run(solved, target.parent)
        print(f"{time.perf_counter() - started:.0f} s")
    if found := problems(solved):
        raise BuildError("\n".join(found))
    if target.parent.name == "chapters":
        return {target: solved}
    return {target: solved, root / "exercises" / target.name: blank(written, solved)}


def _write(path: Path, text: str) -> bool:
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return False
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return True


def main() -> None:
    parser = argparse.ArgumentParser("python -m minipar.course.build", description="Build the notebooks.")
    parser.add_argument("only", nargs="?", default="", help="only sources with this in their path")
    parser.add_argument("--force", action="store_true", help="run notebooks whose code has not changed, too")
    options = parser.parse_args()
    try:
        changed = build(Path.cwd(), options.only, options.force)
    except BuildError as error:
        sys.exit(str(error))
    print("\n".join(str(path.relative_to(Path.cwd())) for path in changed) or "nothing has changed")


if __name__ == "__main__":
    main()
