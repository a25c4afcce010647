"""The learner's own engine, `my_parallel.py`: each function that passes its task, in place of the reference's.

A task whose answer is a piece of the engine names it in its metadata, `engine="column_linear"`. The file stands
beside the folder of the exercises and is written anew each time a piece passes.
"""

import ast
import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from .names import CHECKS
from .tasks import CourseError, Solution, Task, course, solutions_folder

NAME = "my_parallel.py"
HEAD = '''"""The training engine that you have written, task by task. `python -m minipar grade` keeps it up to date.

A piece that has not passed yet is the reference's. What you change here is lost when the next piece passes: change it
in the exercise.
"""
'''
BEGIN, END = "# --- yours: ", "# --- end"


def write(folder: Path, passed: dict[str, str]) -> list[str]:
    """Write the engine into a folder. The names of those of its functions that are the learner's, in order.

    passed: answers that have passed by now, by task. Those that stand in the file already are kept.
    """
    path, every = folder / NAME, _pieces(solutions_folder(folder / "exercises" / NAME)).values()
    kept = {**_kept(path), **passed}
    needed = dict.fromkeys(line for solution, task in every if task.id in kept for line in _imports(solution))
    parts = [HEAD, *needed, f"from {CHECKS}.engine import reference", "", ""]
    for _, task in every:
        if task.id in kept:
            parts += [f"{BEGIN}{task.id} {task.title}", kept[task.id].strip(), END, "", ""]
        else:
            parts += [*[f'{name} = reference("{task.id}")["{name}"]' for name in task.engine], "", ""]
    path.write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8")
    return [name for _, task in every if task.id in kept for name in task.engine]


def load(folder: Path | None = None) -> ModuleType:
    """The engine as a module: from `my_parallel.py` in this folder, by default the one above the current folder, else
    all of it from the reference."""
    path = (folder or Path.cwd().parent) / NAME
    if path.exists():
        spec = importlib.util.spec_from_file_location("my_parallel", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    module = ModuleType("my_parallel")
    for name in _pieces(solutions_folder()):
        vars(module).update(reference(name))
    return module


def reference(name: str) -> dict[str, Any]:
    """The pieces that the solution of a task defines, by name. CourseError for a task that has none."""
    every = _pieces(solutions_folder())
    if name not in every:
        raise CourseError(f"the answer to {name!r} is no piece of the engine; there are {', '.join(every)}")
    solution, task = every[name]
    names: dict[str, Any] = {"__name__": "my_parallel"}
    exec("\n".join(_imports(solution)), names)
    exec(task.answer.source, names)
    return {piece: names[piece] for piece in task.engine}


@cache
def _pieces(folder: Path) -> dict[str, tuple[Solution, Task]]:
    """The tasks whose answers are pieces, by name, in order. Notebooks are read once, whoever asks for how many."""
    every = [(solution, task) for solution in course(folder) for task in solution.tasks]
    return {task.id: (solution, task) for solution, task in every if task.engine}


def _imports(solution: Solution) -> list[str]:
    """What a notebook's set-up imports, but for what is only for checks."""
    nodes = [node for source in solution.setup for node in ast.parse(source).body]
    imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    return [ast.unparse(node) for node in imports if not (getattr(node, "module", None) or "").startswith(CHECKS)]


def _kept(path: Path) -> dict[str, str]:
    """The learner's pieces in a file that was written before, by task."""
    parts = path.read_text(encoding="utf-8").split(f"\n{BEGIN}")[1:] if path.exists() else []
    found = {}
    for part in parts:
        head, _, rest = part.partition("\n")
        found[head.split()[0]] = rest.partition(f"\n{END}\n")[0]
    return found
