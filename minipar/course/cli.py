"""The course on the command line: `grade`, `hint`, `solution`, `progress`."""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from . import engine
from .tasks import CourseError, Progress, Solution, course, find, full_name, solutions_folder

if TYPE_CHECKING:
    from .grade import Verdict
    from .kernel import Kernel

COMMAND = "python -m minipar"


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the course's commands. Each sets `run`, a function from the parsed options to an exit status."""
    grade = commands.add_parser("grade", help="grade exercise notebooks, one line a task")
    grade.add_argument("notebooks", nargs="+", type=Path, help="for example exercises/03a*.ipynb")
    grade.add_argument("--task", help="grade this one only, for example 03a.2")
    grade.add_argument("--watch", action="store_true", help="grade again each time a notebook is saved")
    grade.set_defaults(run=lambda options: _said(_grade, options))

    hint = commands.add_parser("hint", help="show the next hint for a task, for example 03a.2")
    hint.add_argument("task")
    hint.add_argument("--all", action="store_true", help="show all its hints")
    hint.set_defaults(run=lambda options: _said(_hint, options))

    solution = commands.add_parser("solution", help="show the solution of a task that you have passed")
    solution.add_argument("task")
    solution.add_argument("--reveal", action="store_true", help="show it in any case")
    solution.set_defaults(run=lambda options: _said(_solution, options))

    progress = commands.add_parser("progress", help="show which tasks of the course have passed")
    progress.set_defaults(run=lambda options: _said(_progress, options))


def _said(command: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    try:
        return command(options)
    except CourseError as error:
        print(error, file=sys.stderr)
        return 2


def _grade(options: argparse.Namespace) -> int:
    from .kernel import Kernel

    for notebook in options.notebooks:
        if not notebook.exists():
            raise CourseError(f"there is no {notebook}")
    first, *others = options.notebooks
    # The kernel's own imports take longest: it starts before all else is loaded here.
    kernels = [Kernel(first.resolve().parent), *[None for _ in others]]
    only = full_name(options.task) if options.task else None
    passed = [_grade_one(*some, only) for some in zip(options.notebooks, kernels, strict=True)]
    if options.watch:
        _watch(options.notebooks, only)
    return 0 if all(passed) else 1


def _grade_one(notebook: Path, kernel: "Kernel | None", only: str | None) -> bool:
    from .grade import grade

    started, ready = time.perf_counter(), 0.0

    def show(verdict: "Verdict") -> None:
        nonlocal ready
        ready = ready or time.perf_counter() - verdict.seconds
        task = verdict.task
        print(f"  {verdict.outcome:<4}  {task.id:<6}  {task.title:<52}{verdict.seconds:5.1f} s", flush=True)

    print(f"{notebook.name}", flush=True)
    verdicts = grade(notebook, show, kernel, only)
    good = [v.task.id for v in verdicts if v.outcome == "pass"]
    took = f"{time.perf_counter() - started:.1f} s ({ready - started:.1f} s of it to start the kernel and the ranks)"
    print(f"{len(good)} of {len(verdicts)} pass, {took}")
    progress = Progress.load()
    progress.passed |= set(good)
    progress.save()
    if joined := {v.task.id: v.answer for v in verdicts if v.outcome == "pass" and v.task.engine}:
        yours = engine.write(notebook.resolve().parents[1], joined)
        print(f"{engine.NAME}: your own engine has your {', '.join(yours)}")
    _explain(verdicts, progress, notebook)
    return len(good) == len(verdicts)


def _explain(verdicts: "list[Verdict]", progress: Progress, notebook: Path) -> None:
    """What is wrong with the first failure, and a line for each other; without one, which task is next."""
    order = [v for outcome in ("fail", "todo") for v in verdicts if v.outcome == outcome]
    if not order:
        return
    first = order[0]
    print(f"\n{first.task.id} {first.task.title}")
    print("  " + first.reason.replace("\n", "\n  "))
    shown, there = progress.hints.get(first.task.id, 0), len(first.task.hints)
    if shown < there:
        print(f"  next hint ({shown + 1} of {there}): {COMMAND} hint {first.task.id}")
    elif there:
        print(f"  all {there} hints are read; the solution: {COMMAND} solution {first.task.id} --reveal")
    others = [v for v in order[1:] if v.outcome == "fail"]
    for other in others:
        print(f"\n{other.task.id} {other.task.title}\n  {_brief(other.reason)}")
    if others:
        print(f"\none task alone, in full: {COMMAND} grade {notebook} --task {others[0].task.id}")


def _brief(reason: str) -> str:
    """A reason in a line: its first one, or what a check prints and should print where the two begin to differ."""
    from .grade import PRINTS, SHOULD

    line, *more = reason.split("\n")
    if line != PRINTS:
        return line + " ..." * bool(more)
    middle = more.index(SHOULD)
    printed, wanted = more[:middle], more[middle + 1 :]
    pairs = zip(printed[-len(wanted) :], wanted, strict=False)  # those before are the answer's own
    got, right = next(((g, w) for g, w in pairs if g.strip() != w.strip()), (more[0], wanted[-1]))
    return f"{PRINTS} {got.strip()!r} {SHOULD} {right.strip()!r}"


def _watch(notebooks: list[Path], only: str | None) -> None:
    """Grade a notebook each time it is saved, until Ctrl-C. A kernel waits ready meanwhile."""
    from .kernel import Kernel

    kernel = Kernel(notebooks[0].resolve().parent)
    seen = {notebook: notebook.stat().st_mtime_ns for notebook in notebooks}
    print("\nwaiting for the next save (Ctrl-C ends)", flush=True)
    try:
        while True:
            time.sleep(0.3)
            for notebook in notebooks:
                if notebook.exists() and notebook.stat().st_mtime_ns != seen[notebook]:
                    seen[notebook] = notebook.stat().st_mtime_ns
                    _grade_one(notebook, kernel, only)
                    kernel = Kernel(notebook.resolve().parent)
    except KeyboardInterrupt:
        print()
    finally:
        kernel.stop()


def _hint(options: argparse.Namespace) -> int:
    task, progress = find(options.task, solutions_folder()), Progress.load()
    if not task.hints:
        print(f"{task.id} has no hints")
        return 0
    shown = min(progress.hints.get(task.id, 0) + 1, len(task.hints))
    progress.hints[task.id] = len(task.hints) if options.all else shown
    progress.save()
    for number in range(1 if options.all else shown, progress.hints[task.id] + 1):
        print(f"{task.id} {task.title}, hint {number} of {len(task.hints)}\n\n{task.hints[number - 1]}\n")
    if progress.hints[task.id] == len(task.hints):
        reveal = "" if task.id in progress.passed else " --reveal"
        print(f"That was the last hint. The solution: {COMMAND} solution {task.id}{reveal}")
    return 0


def _solution(options: argparse.Namespace) -> int:
    task = find(options.task, solutions_folder())
    if task.id not in Progress.load().passed and not options.reveal:
        print(f"{task.id} has not passed here yet. Grade it, or add --reveal to see the solution anyway.")
        return 1
    print(task.answer.source)
    return 0


def _progress(options: argparse.Namespace) -> int:
    passed = Progress.load().passed
    solutions: list[Solution] = course(solutions_folder())
    for solution in solutions:
        done = sum(task.id in passed for task in solution.tasks)
        print(f"{solution.path.stem:<32} {done} of {len(solution.tasks)}")
        for task in solution.tasks:
            print(f"  {'pass' if task.id in passed else '    '}  {task.id:<6}  {task.title}")
    every = [task for solution in solutions for task in solution.tasks]
    print(f"\n{sum(task.id in passed for task in every)} of {len(every)} tasks have passed")
    return 0
