"""The architecture, as a test: a module imports only from floors below its own."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import minipar

FLOORS = [
    # These know nothing of minipar.
    {"mesh", "schedule", "model", "device", "transport", "board", "travel", "deferral", "randomness", "precision"}
    | {"transformer"},
    {"watch"},  # from here to world: start ranks, stop them, say why they hang
    {"rank"},
    {"report"},
    {"crew"},
    {"world"},
    {"collectives", "timeline", "hardware", "cost"},  # talk along one axis; predict a run
    {"cut", "prediction", "published"},  # what is kept of a parameter; what a step takes, and took others
    # One file a strategy.
    {"data", "zero", "tensor", "pipeline", "context", "expert", "rings", "recording", "recompute", "wrap"},
    {"interop"},  # models of others, for tensor and pipeline
    # The only one that knows every strategy; the one that tries every layout; what this machine takes for one.
    {"train", "planner", "machine"},
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
ENGINE = set(FLOOR)
BESIDE = {  # on no floor: what each may import
    "viz": {"mesh", "schedule", "timeline", "hardware"},
    "widgets": {"mesh", "schedule", "timeline", "viz", "transformer", "hardware", "cost", "prediction", "planner"},
    "corpus": set(),
    "checkpoint": {"collectives", "cut", "interop", "train", "world"},
    "loading": {"collectives", "train"},
    "magic": {"rank", "world"},
    "doctor": {"rank", "world"},
    "cli": ENGINE | {"corpus", "checkpoint"},
    "cli_plan": {"cost", "hardware", "planner", "transformer", "viz"},
    "calibration": ENGINE | {"corpus"},
    # What it loads before ranks are forked, and what exercises work on.
    "course": {"world", "crew", "train", "collectives", "corpus", "mesh", "model"},
    "__main__": {"cli", "cli_plan", "doctor", "course"},
    "__init__": ENGINE | {"magic", "checkpoint", "loading", "calibration"},
}
ONLY_IN = {"torch.cuda": {"device"}, "os.environ": {"rank", "world"}, "os.getenv": set()}


def sources() -> dict[str, list[ast.AST]]:
    """Module -> its syntax trees; the course is a folder, and one module here."""
    root = Path(minipar.__file__).parent
    found: dict[str, list[ast.AST]] = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).parts[0].removesuffix(".py")
        found.setdefault(name, []).append(ast.parse(path.read_text(encoding="utf-8")))
    return found


def imported(tree: ast.AST, depth: int) -> Iterator[str]:
    """The modules of minipar that a file imports, at its top or later. depth: dots that lead to minipar itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else []
            if node.level == depth:
                yield from (name.split(".")[0] for name in names or [a.name for a in node.names])
            elif node.level == 0 and names and names[0].split(".")[0] == "minipar":
                yield from names[0].split(".")[1:2] or [a.name for a in node.names]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "minipar":
                    yield (alias.name.split(".")[1:2] or ["__init__"])[0]


def used(tree: ast.AST) -> Iterator[str]:
    """Attributes of modules that a file names, such as torch.cuda."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def violations(modules: dict[str, list[ast.AST]]) -> list[str]:
    found = []
    for name, trees in modules.items():
        for other in {other for tree in trees for other in imported(tree, 2 if name == "course" else 1)} - {name}:
            allowed = other in BESIDE[name] if name in BESIDE else FLOOR.get(other, len(FLOORS)) < FLOOR[name]
            if not allowed:
                found.append(f"{name} imports {other}")
        for thing, where in ONLY_IN.items():
            if name not in where and thing in {use for tree in trees for use in used(tree)}:
                found.append(f"{name} uses {thing}")
    return sorted(found)


def test_every_module_has_its_floor():
    assert sources().keys() == FLOOR.keys() | BESIDE.keys()


def test_imports_go_down_and_siblings_do_not_meet():
    assert violations(sources()) == []


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("model", "from .mesh import Mesh"),  # the same floor
        ("data", "from . import tensor"),
        ("context", "from .data import Gradients"),
        ("expert", "from .tensor import STYLES"),
        ("collectives", "from .timeline import Timeline"),
        ("schedule", "from minipar.timeline import simulate"),
        ("mesh", "import minipar.train"),
        ("world", "def late():\n    from .collectives import all_reduce"),
        ("train", "from . import viz"),
        ("viz", "from .train import parallelize"),
        ("course", "from ..tensor import cross_entropy"),
        ("tensor", "import torch\nn = torch.cuda.device_count()"),
        ("data", "from os import environ"),
        ("pipeline", "import os\nos.getenv('RANK')"),
    ],
)
def test_a_wrong_import_is_found(name, line):
    assert len(violations({name: [ast.parse(line)]})) == 1


def test_the_engine_comes_without_the_course():
    heavy = ["matplotlib", "ipywidgets", "transformers", "IPython", "jupyter_client", "nbformat", "minipar.viz"]
    program = f"import sys, minipar; minipar.World, minipar.parallelize; print(set({heavy}) & set(sys.modules))"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert told.strip() == "set()"
