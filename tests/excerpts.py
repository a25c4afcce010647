"""Chapters for tests: taken apart for what they define, or made to run on data of one's own."""

import ast
import dis
from pathlib import Path
from typing import Any

from nbformat import NotebookNode

from minipar.course import build
from minipar.course.names import nested

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"  # the real files, where somebody has put them beside the repository


def source(name: str) -> Path:
    return ROOT / "chapters" / "src" / f"{name}.py"


def defined(name: str, *wanted: str) -> dict[str, Any]:
    """What a chapter defines under these names, and what that needs: imports, functions, classes, constants. Nothing
    else of the chapter is run."""
    body = ast.parse(source(name).read_text(encoding="utf-8")).body
    makers: dict[str, ast.stmt] = {}
    for node in body:
        for made in _names(node):
            makers.setdefault(made, node)
    needed, left = list[ast.stmt](), [makers[one] for one in wanted]
    while left:
        needed.append(node := left.pop())
        left += [makers[one] for one in _reads(node) if one in makers and makers[one] not in needed + left]
    imports = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    found: dict[str, Any] = {"__name__": f"chapter_{name}"}
    code = ast.Module(imports + [node for node in body if node in needed], [])
    exec(compile(code, name, "exec"), found)
    return found


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    return [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]


def _reads(node: ast.stmt) -> list[str]:
    codes = nested(compile(ast.Module([node], []), "chapter", "exec"))
    return [i.argval for c in codes for i in dis.get_instructions(c) if i.opname in ("LOAD_NAME", "LOAD_GLOBAL")]


def with_data(name: str, switch: str, folder: Path) -> NotebookNode:
    """A chapter whose line `switch = None` names a folder. Its cells may take long: other tests run beside it."""
    notebook = build.read(source(name))
    (cell,) = [cell for cell in build.code_cells(notebook) if f"{switch} = None" in cell.source]
    cell.source = cell.source.replace(f"{switch} = None", f"{switch} = {str(folder)!r}", 1)
    for cell in build.code_cells(notebook):
        cell.metadata["seconds"] = 240
    return notebook
