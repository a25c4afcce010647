"""The tasks of the course, read from the solution notebooks, and how far the learner is."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
from nbformat import NotebookNode


@dataclass(frozen=True)
class Task:
    """One graded function. `answer` and `check` are cells of the solution; `engine`, those of its functions that are
    pieces of the learner's own engine."""

    id: str
    title: str
    answer: NotebookNode
    check: NotebookNode
    hints: tuple[str, ...]
    engine: tuple[str, ...] = ()


@dataclass(frozen=True)
class Solution:
    """A finished exercise notebook: its set-up cells in order, and its tasks in order."""

    path: Path
    setup: tuple[str, ...]
    tasks: tuple[Task, ...]


class CourseError(Exception):
    """What was asked for is not there. The message says what is."""


def solutions_folder(near: Path | None = None) -> Path:
    """`solutions/` beside the folder of an exercise, here, beside this folder, or beside the package."""
    places = [Path.cwd(), Path.cwd().parent, Path(__file__).resolve().parents[2]]
    if near is not None:
        places.insert(0, near.resolve().parent.parent)
    for place in places:
        if (place / "solutions").is_dir():
            return place / "solutions"
    looked = " or ".join(str(place) for place in places)
    raise CourseError(f"no folder solutions/ in {looked}: run this in the repository")


def read_solution(path: Path) -> Solution:
    """The tasks of one solution notebook. Raises CourseError where there is none."""
    if not path.exists():
        names = ", ".join(p.name for p in sorted(path.parent.glob("*.ipynb")))
        raise CourseError(f"{path.name} is not an exercise of this course: there are {names}")
    cells = nbformat.read(path, as_version=4).cells
    checks = {c.metadata["check"]: c for c in cells if "check" in c.metadata}
    hints: dict[str, list[str]] = {}
    for cell in cells:
        if "hint" in cell.metadata:
            hints.setdefault(cell.metadata["hint"], []).append(cell.source)
    tasks = tuple(
        Task(
            name,
            cell.metadata["title"],
            cell,
            checks[name],
            tuple(hints.get(name, ())),
            tuple(cell.metadata.get("engine", "").split()),
        )
        for cell in cells
        if (name := cell.metadata.get("task"))
    )
    setup = tuple(c.source for c in cells if c.cell_type == "code" and "setup" in c.metadata.get("tags", []))
    return Solution(path, setup, tasks)


def course(folder: Path) -> list[Solution]:
    """Every exercise notebook, in order."""
    return [read_solution(path) for path in sorted(folder.glob("*.ipynb"))]


def full_name(name: str) -> str:
    """A task may be called "3a.2" for "03a.2"."""
    return name if name[:2].isdigit() else f"0{name}"


def find(name: str, folder: Path) -> Task:
    """The task of this name. Raises CourseError when there is none."""
    full = full_name(name)
    every = {task.id: task for solution in course(folder) for task in solution.tasks}
    if full not in every:
        near = [one for one in every if one.split(".")[0] == full.split(".")[0]]
        raise CourseError(f"there is no task {name!r}; there are {', '.join(near or every)}")
    return every[full]


@dataclass
class Progress:
    """What has passed and how many hints were shown, in `.minipar/progress.json` of the current folder."""

    path: Path
    passed: set[str] = field(default_factory=set)
    hints: dict[str, int] = field(default_factory=dict)

    @classmethod
    def load(cls) -> "Progress":
        path = Path.cwd() / ".minipar" / "progress.json"
        if not path.exists():
            return cls(path)
        kept = json.loads(path.read_text(encoding="utf-8"))
        return cls(path, set(kept["passed"]), kept["hints"])

    def save(self) -> None:
        self.path.parent.mkdir(exist_ok=True)
        kept = {"passed": sorted(self.passed), "hints": self.hints}
        self.path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
