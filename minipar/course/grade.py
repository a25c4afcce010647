"""Grade exercise notebooks with nbval, one verdict a task.

From the learner's file come the answers and nothing else, found by cell id. Set-up, checks and what a check
prints come from the solution. Before each answer the names in the kernel are those of the reference: its set-up
and its earlier answers, so a task never fails for an earlier one. An answer may use of the set-up what it imports and
what the reference uses, since the rest makes up the checks, and may not replace parts of libraries. One that ends or
hangs the kernel costs its own task only: the next starts in a fresh kernel.
"""

import contextlib
import io
import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat import NotebookNode
from nbval.plugin import IPyNbCell, IPyNbFile, NbCellError

from .kernel import CellFailed, Kernel, KernelDied
from .launch import MOST_MEMORY
from .names import defined
from .tasks import CourseError, Solution, Task, read_solution, solutions_folder

SECONDS = 60.0  # a cell may take; `seconds` in the metadata of a check says otherwise
NAMES = "__import__('minipar.course.names', fromlist=['names'])"
PRINTS, SHOULD = "The check prints", "and should print"
NO_MEMORY = r"MemoryError|can't allocate memory|bad_alloc"
MEMORY = f"This asks for more memory than a task may have, {MOST_MEMORY / 2**30:g} GB: is a size wrong?"
ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Verdict:
    """How one task went: "pass", "fail" or "todo" (not begun). `answer` is the learner's, `reason` is for them."""

    task: Task
    outcome: str
    reason: str
    seconds: float
    answer: str = ""


def grade(
    notebook: Path,
    report: Callable[[Verdict], None] = lambda verdict: None,
    kernel: Kernel | None = None,
    only: str | None = None,
) -> list[Verdict]:
    """The verdict on every task of an exercise notebook, in order; `report` hears of each as it falls.

    kernel: one that was started ahead. It is used up.
    only: the one task to grade.
    Raises CourseError when the notebook or its solution cannot be read, CellFailed when its set-up does not run.
    """
    kernel = kernel or Kernel(notebook.resolve().parent)
    try:
        solution = read_solution(solutions_folder(notebook) / notebook.name)
        tasks = [task for task in solution.tasks if only in (None, task.id)]
        if not tasks:
            raise CourseError(f"{notebook.name} has no task {only}; it has {', '.join(t.id for t in solution.tasks)}")
        grader = _Grader(solution, tasks, _answers(notebook, solution), kernel, report)
    except BaseException:
        kernel.stop()
        raise
    options = f"-c {os.devnull} --noconftest --color=no -s -p nbval.plugin -p no:cacheprovider".split()
    options += ["--disable-plugin-autoload", "--rootdir", str(notebook.resolve().parent)]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            pytest.main([*options, str(notebook)], plugins=[grader])
    finally:
        grader.kernel.stop()
    if grader.broken:
        raise grader.broken
    if len(grader.verdicts) != len(tasks):
        raise RuntimeError(f"the grader itself failed:\n{printed.getvalue()}")
    return grader.verdicts


class _Grader:
    """A pytest plugin that collects one notebook and listens to how its cells go."""

    def __init__(
        self,
        solution: Solution,
        tasks: list[Task],
        answers: dict[str, NotebookNode],
        kernel: Kernel,
        report: Callable[[Verdict], None],
    ):
        self.solution, self.tasks, self.answers = solution, tasks, answers
        self.kernel, self.report = kernel, report
        self.out = sys.stdout
        self.verdicts: list[Verdict] = []
        self.failed: dict[str, tuple[str, str]] = {}  # task -> outcome, reason
        self.started = 0.0
        self.ready_for = -1  # the task that the names in the kernel are right for
        self.broken: Exception | None = None

    def pytest_collect_file(self, file_path: Path, parent: pytest.Collector) -> "_File":
        return _File.from_parent(parent, path=file_path, grader=self)

    def prepare(self, task: Task) -> None:
        """Names as they should be before this task: on the reference's earlier answers."""
        try:
            self._advance(task)
        except KernelDied:  # an earlier answer left something behind that ended it just now
            self._advance(task)
        self.started = time.perf_counter()

    def _advance(self, task: Task) -> None:
        wanted = self.solution.tasks.index(task)
        if self.kernel.spoiled:
            folder = self.kernel.folder
            self.kernel.stop()
            self.kernel, self.ready_for = Kernel(folder), -1
        self.kernel.ready()
        if self.ready_for < 0:
            for source in self.solution.setup:
                self.kernel.do(source)
            self.ready_for = 0
        else:
            try:
                self.kernel.do(f"{NAMES}.restore(globals())")
            except CellFailed:  # an earlier answer has closed what cannot be opened again
                self.kernel.spoiled = True
                return self._advance(task)
        for earlier in self.solution.tasks[self.ready_for : wanted]:
            self.kernel.do(earlier.answer.source)
        self.ready_for = wanted
        self.kernel.do(f"{NAMES}.keep(globals())")

    def fell(self, task: Task) -> None:
        outcome, reason = self.failed.get(task.id, ("pass", ""))
        seconds, answer = time.perf_counter() - self.started, self.answers.get(task.answer.id)
        self.verdicts.append(Verdict(task, outcome, reason, seconds, answer.source if answer else ""))
        with contextlib.redirect_stdout(self.out):
            self.report(self.verdicts[-1])


class _File(IPyNbFile):
    """nbval's collector, over the learner's answers and the reference's checks."""

    def __init__(self, *, grader: _Grader, **kwargs: Any):
        super().__init__(**kwargs)
        self.grader = grader

    @property
    def kernel(self) -> Kernel:  # type: ignore[override]
        return self.grader.kernel

    def setup(self) -> None: ...

    def teardown(self) -> None: ...

    def collect(self) -> Iterator["_Cell"]:
        for task in self.grader.tasks:
            yield self._cell(task, self.grader.answers.get(task.answer.id), checks=False)
            yield self._cell(task, task.check, checks=True)

    def _cell(self, task: Task, cell: NotebookNode | None, checks: bool) -> "_Cell":
        options = defaultdict(bool, check=checks)
        name = f"{task.id} {'check' if checks else 'answer'}"
        made: _Cell = _Cell.from_parent(self, name=name, cell_num=0, cell=cell, options=options)
        made.task, made.checks = task, checks
        return made


class _Cell(IPyNbCell):
    """nbval's cell, which waits no longer than its task may take and knows what ended it."""

    parent: _File
    task: Task
    checks: bool

    def setup(self) -> None: ...

    def runtest(self) -> None:
        grader = self.parent.grader
        if grader.broken:
            return
        try:
            if not self.checks:
                grader.prepare(self.task)
        except CellFailed as error:
            grader.broken = error
            return
        if self.task.id not in grader.failed:
            outcome = self._judge(grader.kernel)
            if outcome:
                grader.failed[self.task.id] = outcome
        if self.checks:
            grader.fell(self.task)

    def _judge(self, kernel: Kernel) -> tuple[str, str] | None:
        """None if the cell does what it should, else the outcome and the reason."""
        if self.cell is None:
            lost = f"The cell of this answer (id {self.task.answer.id}) is no longer in the notebook"
            return "fail", f"{lost}, or no code cell any more."
        seconds = self.task.check.metadata.get("seconds", SECONDS)
        self.config.option.nbval_cell_timeout = seconds
        self.parent.timed_out = False
        try:
            if not self.checks:
                kernel.do(f"{NAMES}.call({self.answer!r}, {self.task.id!r})")
            else:
                texts = self.task.answer.source, self.answer, self.given, self.task.check.source
                kernel.do(f"{NAMES}.protect(globals(), *{texts!r})")
            super().runtest()
            if kernel.asked_to_exit or kernel.reply["status"] != "ok":
                return "fail", "This answer calls exit(): take that out."
            if self.checks:
                kernel.do(f"{NAMES}.untouched()")
        except CellFailed as error:
            kernel.spoiled |= "get_ipython" in self.answer  # it may have changed what runs the checks
            return "fail", kernel.reply.get("evalue", str(error))
        except (KernelDied, RuntimeError):  # nbval's own, where the kernel was gone before the cell
            kernel.spoiled = True
            return "fail", "This answer ended the kernel: does it call os._exit(), or run out of memory?"
        except NbCellError as error:
            if "waiting for output" in str(error):  # of a flood that the kernel's end was lost in
                return "fail", "This prints more than can be read: is there a print in a loop?"
            if self.parent.timed_out:
                return "fail", f"This ran for more than {seconds:g} s: is there a loop that does not end?"
            return self._explain(error)
        return None

    @property
    def answer(self) -> str:
        """What the learner wrote."""
        return self.parent.grader.answers[self.task.answer.id].source

    @property
    def given(self) -> set[str]:
        """The names that the set-up defines."""
        return {name for source in self.parent.grader.solution.setup for name in defined(source)}

    def compare_outputs(self, test: list[NotebookNode], ref: list[NotebookNode], skip_compare: Any = None) -> bool:
        """What the check prints is its last lines. Those before are an answer's own, and do no harm."""
        wanted = "".join(out.get("text", "") for out in ref)
        printed = "".join(out.get("text", "") for out in test if out.get("name") == "stdout")
        if wanted and all(out.output_type == "stream" for out in [*test, *ref]):
            return f"\n{printed}".endswith(f"\n{wanted}") or bool(super().compare_outputs(test, ref, skip_compare))
        return bool(super().compare_outputs(test, ref, skip_compare))

    def _explain(self, error: NbCellError) -> tuple[str, str]:
        raised = next((out for out in self.test_outputs if out.output_type == "error"), None)
        if raised is None:
            printed = "".join(out.get("text", "") for out in self.test_outputs).strip()
            wanted = "".join(out.get("text", "") for out in self.cell.outputs).strip()
            return "fail", f"{PRINTS}\n  {printed or '(nothing)'}\n{SHOULD}\n  {wanted}"
        name, message = raised.ename, ANSI.sub("", raised.evalue).strip()
        message = re.sub(r"\(\d+\.py, line (\d+)\)", r"(line \1 of the answer)", message)  # of a SyntaxError
        if name == "NotImplementedError" or message.startswith("Not begun"):
            return "todo", "Not begun: NotImplementedError stands where your code goes."
        if re.search(NO_MEMORY, f"{name}: {message}"):
            return "fail", MEMORY
        if name in ("Refused", "AssertionError") and message:
            return "fail", message
        if name == "SystemExit":
            return "fail", "This answer raises SystemExit, which ends a program: take that out."
        trace = ANSI.sub("", "\n".join(raised.traceback)).splitlines()
        at = [line for line in trace if line.startswith("--") and "-> " in line][-1:]
        return "fail", "\n".join([f"{name}: {message}", *at])


def _answers(notebook: Path, solution: Solution) -> dict[str, NotebookNode]:
    """The code cells of the learner's file by id: their own, or that of the task in their metadata."""
    try:
        cells = nbformat.read(notebook, as_version=4).cells
    except (OSError, nbformat.reader.NotJSONError, nbformat.ValidationError) as error:
        raise CourseError(f"{notebook} cannot be read as a notebook: {error}") from error
    code = [cell for cell in cells if cell.cell_type == "code"]
    for cell in code:
        cell.outputs = []  # saved while it ran, they have no number, and nbval refuses that
    ids = {task.id: task.answer.id for task in solution.tasks}  # some editors save none
    named = {ids[name]: cell for cell in code if (name := cell.metadata.get("task")) in ids}
    return named | {cell.id: cell for cell in code if "id" in cell}
