"""Grading: what passes, what does not, and what a learner is told."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from itertools import count
from pathlib import Path
from queue import Empty

import mutants
import nbformat
import pytest
import torch
from nbformat import NotebookNode
from test_notebooks import EXERCISE, ROOT

from minipar.__main__ import main
from minipar.course import build, checks, engine
from minipar.course.grade import Verdict, _File, grade
from minipar.course.kernel import Kernel

NAMES = [path.stem for path in sorted((ROOT / "solutions").glob("*.ipynb"))]


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def course_of(folder: Path, name: str, attempts: list[tuple[str, str]], seconds: float | None = None) -> Path:
    """A course whose tasks are tasks of the notebook `name`, one for each (task, answer): all share a kernel.

    seconds: that a check may take, in place of its own limit. Returns the learner's file, with the answers in it.
    """
    solution = read(ROOT / "solutions" / f"{name}.ipynb")
    given = {kind: {c.metadata[kind]: c for c in solution.cells if kind in c.metadata} for kind in ("task", "check")}
    setup = [cell for cell in solution.cells if "setup" in cell.metadata.get("tags", [])]
    reference, learner = [*setup], []
    for number, (task, answer) in enumerate(attempts):
        for kind, cells in given.items():
            cell = nbformat.from_dict(cells[task])
            cell.id, cell.metadata[kind] = f"{kind}-{number}", f"{task}/{number}"
            cell.metadata["seconds"] = seconds or cell.metadata.get("seconds", 60)
            reference.append(cell)
        learner.append(nbformat.v4.new_code_cell(answer, id=f"task-{number}"))
    for place, cells in (("solutions", reference), ("exercises", learner)):
        (folder / place).mkdir()
        nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / place / f"{name}.ipynb")
    for other in {*(ROOT / "solutions").glob("*.ipynb")} - {ROOT / "solutions" / f"{name}.ipynb"}:
        (folder / "solutions" / other.name).symlink_to(other)  # a capstone takes the pieces of all
    return folder / "exercises" / f"{name}.ipynb"


@pytest.mark.parametrize("name", NAMES)
def test_solutions_pass_blanks_are_to_do_and_wrong_answers_are_refused_by_name(name, tmp_path):
    solved, blank = (
        {c.metadata["task"]: c.source for c in read(ROOT / folder / f"{name}.ipynb").cells if "task" in c.metadata}
        for folder in ("solutions", "exercises")
    )
    wrong = [
        (c.metadata["task"], c.source, c.metadata["says"])
        for c in build.read(ROOT / f"tests/wrong_answers/{name}.py").cells
        if "task" in c.metadata
    ]
    code = build.code_cells(read(ROOT / "solutions" / f"{name}.ipynb"))
    folded = {line.strip() for cell in code for line in cell.source.splitlines() if len(line.strip()) > 20}
    attempts = [*solved.items(), *blank.items(), *[(task, answer) for task, answer, _ in wrong]]
    verdicts = grade(course_of(tmp_path, name, attempts))
    good, todo, bad = verdicts[: len(solved)], verdicts[len(solved) : 2 * len(solved)], verdicts[2 * len(solved) :]
    assert [(v.task.id, v.reason) for v in good if v.outcome != "pass"] == []
    for verdict, answer in zip(todo, blank.values(), strict=True):  # a bug to mend runs, and is refused
        assert verdict.outcome == ("todo" if "NotImplementedError" in answer else "fail"), verdict.reason
    other = []
    for verdict, (task, answer, says) in zip(bad, wrong, strict=True):
        if verdict.outcome != "fail" or says not in verdict.reason:
            other.append(f"{task}\n{answer}\nsays: {verdict.outcome}: {verdict.reason}\nnot:  {says}")
        quoted = [line for line in folded if line in verdict.reason and line not in answer]
        if quoted:
            other.append(f"{task}\n{answer}\nis told of code that gives things away: {verdict.reason}")
    assert not other, "\n\n".join(other)


def test_an_error_is_told_with_the_lines_of_the_answer_and_none_of_a_library():
    def answer():
        torch.ones(2, requires_grad=True).backward()

    with pytest.raises(checks.Refused) as told, checks.verdict():
        answer()
    error, line = str(told.value).splitlines()
    assert error == "RuntimeError: grad can be implicitly created only for scalar outputs"
    assert line.endswith(" of answer: torch.ones(2, requires_grad=True).backward()")


@pytest.mark.parametrize("name", NAMES)
def test_a_small_mistake_in_a_solution_is_noticed(name):
    """One of each task; `python tests/mutants.py` plants them all."""
    assert mutants.survivors(name, sample=1)[1] == []


@pytest.mark.parametrize("name", NAMES)
def test_plain_nbval_fails_exactly_at_the_checks_of_a_blank_exercise(name):
    options = ["--nbval", "--nbval-current-env", "--nbval-cell-timeout=60", "-v", "--tb=no", "-c", os.devnull]
    found = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-p", "no:cacheprovider", f"exercises/{name}.ipynb"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout
    failed = {int(number) for number in re.findall(r"Cell (\d+) FAILED", found)}
    passed = {int(number) for number in re.findall(r"Cell (\d+) PASSED", found)}
    code = build.code_cells(read(ROOT / f"exercises/{name}.ipynb"))
    assert failed == {i for i, cell in enumerate(code) if "check" in cell.metadata}, found
    assert passed == set(range(len(code))) - failed


GOOD = "def double(x): return 2 * x"
# What a learner may leave in the cell of a task, and what grading says of it. Some end or hang the kernel.
ANSWERS = {
    "": "NameError: name 'double' is not defined",
    GOOD: "pass",
    'def double(x):\n    raise NotImplementedError("your turn")': "Not begun",
    "def double(x): return x + 2 if x == 2 else 0": "The check prints\n  double 0\nand should print\n  double 6",
    "def double(x): return 5": "double(2) is 5, not 4",
    "def double(x): return 2 *": "SyntaxError: invalid syntax (line 1 of the answer)",
    "def double(x): return x.y": "AttributeError: 'int' object has no attribute 'y'\n----> 1 def double(x): return x.y",
    f"two = 3\n{GOOD}": "pass",
    "two = 1\ndef double(x): return x": "double(2) is 2, not 4",  # the check's own names are not the learner's to give
    "def double(x): return two * x": "pass",  # the set-up's two, not that of the answer before
    f"exit()\n{GOOD}": "calls exit()",
    f"{GOOD} if x else exit()": "pass",
    "def double(x):\n    exit()\n    return 2 * x": "calls exit()",
    "import sys\ndef double(x): sys.exit(0)": "SystemExit",
    "import os\ndef double(x): os._exit(0)": "ended the kernel",
    "def double(x):\n    while True: pass": "ran for more than 3 s",
    "import torch\ndef double(x): return torch.ones(10, 2**30).byte()": "more memory than a task may have, 4 GB",
    "def double(x): return len(bytearray(10 * 2**30))": "more memory than a task may have, 4 GB",
    "import os, signal\ndef double(x): os.kill(os.getpid(), signal.SIGKILL)": "ended the kernel",
    f"import builtins\n{GOOD}\nbuiltins.divmod = max": "This answer replaces builtins.divmod, for everybody",
    "import math\ndef double(x):\n    math.floor = int\n    return 2 * x": "This answer replaces math.floor",
    "import math\ndef double(x): return 2 * x + math.floor(-0.5) + divmod(7, 4)[0]": "pass",  # both are whole again
    "def double(x): return 2 * x if globals() else 0": "This answer uses globals, which belongs to its check",
    "get_ipython().set_custom_exc((Exception,), print)\ndef double(x): return 5": "This answer uses get_ipython",
    f"%%capture\n{GOOD}": "This answer has a line of % or !, which cannot be graded",
    "def double(x):\n    print(x)\n    return 2 * x": "pass",  # what it prints besides does no harm
    "def double(x):\n    print('double 6')\n    return x + 2 if x == 2 else 0": "and should print\n  double 6",
    f"{GOOD} ": "pass",
    "import builtins\ndef double(x): return builtins.eval('two * x')": "This answer uses eval, which belongs to",
    "import IPython\ndef double(x): return IPython.get_ipython().ev('2 * x')": "This answer uses get_ipython",
    "import sys\ndef double(x): return sys._getframe(1) and 2 * x": "This answer uses _getframe",
    "class Any(int):\n    def __eq__(self, other): return True\n\ndouble = Any": "This answer uses __eq__",
    # What holds for all that runs later is as it was before.
    f"import torch\ntorch.set_grad_enabled(False)\ntorch.set_default_device('meta')\n{GOOD}": "pass",
    "import torch\ndef double(x): return x * int(torch.ones(2, requires_grad=True).sum().backward() or 2)": "pass",
    f"import torch\ntorch.inference_mode().__enter__()\n{GOOD}": "pass",
    "import torch\ndef double(x):\n    torch.ones(2, requires_grad=True).sum().backward()\n    return 2 * x": "pass",
    f"import os, sys\nos.chdir('/')\nsys.stdout = open(os.devnull, 'w')\n{GOOD}": "The check prints\n  (nothing)",
    f"{GOOD}\n": "pass",
}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A built course of one exercise with two tasks, in a folder of its own."""
    root = tmp_path_factory.mktemp("small")
    (root / "solutions/src").mkdir(parents=True)
    (root / "solutions/src/90_small.py").write_text(EXERCISE.replace("seconds=5", "seconds=3"), encoding="utf-8")
    build.build(root)
    return root


def test_an_answer_costs_its_own_task_only(small, tmp_path, monkeypatch):
    monkeypatch.setattr("test_grading.ROOT", small)
    verdicts = grade(course_of(tmp_path, "90_small", [("90.1", answer) for answer in ANSWERS]))
    for verdict, (answer, expected) in zip(verdicts, ANSWERS.items(), strict=True):
        got = "pass" if verdict.outcome == "pass" else verdict.reason
        assert expected in got, f"{answer}\nexpected: {expected}\ngot: {got}"


def test_a_kernel_whose_output_is_lost_is_told_of_and_replaced(small, tmp_path, monkeypatch):
    """As that of an answer that prints without end: messages are dropped, the last one too."""
    messages, whole = count(), _File.get_kernel_message

    def lost(file, **options):
        if next(messages) == 0:
            raise Empty
        return whole(file, **options)

    monkeypatch.setattr("test_grading.ROOT", small)
    monkeypatch.setattr(_File, "get_kernel_message", lost)
    first, second = grade(course_of(tmp_path, "90_small", [("90.1", GOOD), ("90.1", f"{GOOD} ")]))
    assert first.outcome == "fail" and "This prints more than can be read" in first.reason
    assert second.outcome == "pass"


def learner(small: Path, folder: Path, edit, minor: int = 5) -> list[Verdict]:
    """The verdicts on a copy of the blank exercise that `edit` has changed, given its cells by id."""
    notebook = read(small / "exercises/90_small.ipynb")
    notebook.cells, notebook.nbformat_minor = edit({cell.id: cell for cell in notebook.cells}), minor
    (folder / "exercises").mkdir()
    (folder / "solutions").symlink_to(small / "solutions")
    nbformat.write(notebook, folder / "exercises/90_small.ipynb")
    return grade(folder / "exercises/90_small.ipynb")


def test_checks_come_from_the_solution_whatever_the_file_says(small, tmp_path):
    def edit(cells):
        cells["check-90-1"].source = "# NBVAL_CHECK_OUTPUT\nprint('double', 0)"  # edited, with a saved output
        cells["check-90-1"].outputs[0].text = "double 0\n"
        cells["task-90-1"].source = "def double(x): return 0"
        del cells["check-90-2"]  # deleted
        return list(cells.values())

    assert [v.outcome for v in learner(small, tmp_path, edit)] == ["fail", "fail"]


def test_an_answer_is_found_by_its_task_where_ids_are_lost_and_saved_outputs_do_not_count(small, tmp_path):
    def edit(cells):
        cells["task-90-1"].source = GOOD
        cells["task-90-1"].outputs = [nbformat.v4.new_output("stream", text="6")]  # and no execution_count
        return [nbformat.from_dict({k: v for k, v in cell.items() if k != "id"}) for cell in cells.values()]

    assert [v.outcome for v in learner(small, tmp_path, edit, minor=4)] == ["pass", "fail"]


def test_an_answer_is_found_by_its_id_and_a_missing_one_is_named(small, tmp_path):
    def edit(cells):
        cells["task-90-1"].source = GOOD
        return [nbformat.v4.new_code_cell("1 / 0"), cells["task-90-1"]]  # the rest is gone, a cell is new

    first, second = learner(small, tmp_path, edit)
    assert first.outcome == "pass"
    assert second.outcome == "fail" and "(id task-90-2) is no longer in the notebook" in second.reason


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere ranks are not forked")
def test_the_server_of_ranks_is_a_fork_of_the_kernel_can_be_replaced_and_ends_with_it(tmp_path):
    kernel = Kernel(tmp_path)
    kernel.ready()
    try:
        kernel.do("""
            import os, signal, sys, time, torch
            from multiprocessing import forkserver
            from minipar import World

            server = forkserver._forkserver
            first = server._forkserver_pid
            assert open(f"/proc/{first}/cmdline").read() == open("/proc/self/cmdline").read()

            def compiled():
                torch.optim.Adam([torch.ones(1, requires_grad=True)]).step()
                before = "torch._dynamo.eval_frame" in sys.modules
                return before, torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item()

            with World(1) as world:
                assert world.run(compiled) == [(False, 2.0)]  # the compiler is imported when it is needed
                assert world.run(lambda: os.getppid()) == [first]
            os.kill(first, signal.SIGKILL)
            time.sleep(0.1)
            with World(2) as world:
                assert world.run(lambda: os.getppid()) == [server._forkserver_pid] * 2 != [first] * 2
            open("server", "w").write(str(server._forkserver_pid))
        """)
        alive = Path("/proc", (tmp_path / "server").read_text())
        assert alive.exists()
    finally:
        kernel.stop()
    deadline = time.monotonic() + 10
    while alive.exists() and "Z" not in (alive / "stat").read_text().split()[2] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive.exists() or "Z" in (alive / "stat").read_text().split()[2]


@pytest.fixture
def at(small, tmp_path, monkeypatch) -> Path:
    """A learner's copy of the small course, as the current folder."""
    for folder in ("solutions", "exercises"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "90_small.ipynb").write_text((small / folder / "90_small.ipynb").read_text())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_line_leads_from_a_failure_over_hints_to_the_solution(at, capsys):
    def say(*arguments: str) -> tuple[int, str]:
        status = main(list(arguments))
        return status, "".join(capsys.readouterr())

    status, text = say("grade", "exercises/90_small.ipynb")
    assert status == 1
    assert "todo  90.1    Double" in text and "fail  90.2    Mend" in text and "0 of 2 pass" in text
    assert "90.2 Mend\n  triple(2) is 5, not 6" in text
    assert re.search(r"0 of 2 pass, \d+\.\d s \(\d+\.\d s of it to start the kernel and the ranks\)", text)
    assert "hint 1 of 2\n\nTwo times." in say("hint", "90.1")[1]
    assert "hint 2 of 2\n\nUse `two * x`." in say("hint", "90.1")[1]
    assert "hint 2 of 2" in say("hint", "90.1")[1]  # stays at the last one
    assert "hint 1 of 2" in say("hint", "90.1", "--all")[1]
    status, text = say("solution", "90.1")
    assert status == 1 and "two * x" not in text
    assert "two * x" in say("solution", "90.1", "--reveal")[1]
    notebook = read(at / "exercises/90_small.ipynb")
    next(cell for cell in notebook.cells if cell.id == "task-90-1").source = GOOD
    nbformat.write(notebook, at / "exercises/90_small.ipynb")
    assert "pass  90.1" in say("grade", "exercises/90_small.ipynb")[1]
    assert "two * x" in say("solution", "90.1")[1]
    text = say("progress")[1]
    assert "pass  90.1" in text and "pass  90.2" not in text and "1 of 2 tasks have passed" in text


def test_every_failure_is_told_and_one_task_can_be_graded_alone(at, capsys):
    path = at / "exercises/90_small.ipynb"
    notebook = read(path)
    next(cell for cell in notebook.cells if cell.id == "task-90-1").source = "def double(x): return 5"
    nbformat.write(notebook, path)
    assert main(["grade", "exercises/90_small.ipynb"]) == 1
    text = capsys.readouterr().out
    assert "90.1 Double\n  double(2) is 5, not 4\n  next hint" in text and "90.2 Mend\n  triple(2) is 5" in text
    assert "python -m minipar grade exercises/90_small.ipynb --task 90.2" in text
    next(cell for cell in notebook.cells if cell.id == "task-90-2").source = "def triple(x):\n    return 6"
    nbformat.write(notebook, path)
    assert main(["grade", "exercises/90_small.ipynb"]) == 1
    assert "90.2 Mend\n  The check prints 'triple 6' and should print 'triple 9'\n" in capsys.readouterr().out
    next(cell for cell in notebook.cells if cell.id == "task-90-2").source = "def triple(x): return 5"
    nbformat.write(notebook, path)
    assert main(["grade", "exercises/90_small.ipynb", "--task", "90.2"]) == 1
    text = capsys.readouterr().out
    assert "triple(2) is 5" in text and "0 of 1 pass" in text and "90.1" not in text


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["grade", "exercises/91.ipynb"], "there is no exercises/91.ipynb"),
        (["grade", "other.ipynb"], "other.ipynb is not an exercise of this course: there are 90_small.ipynb"),
        (["grade", "exercises/90_broken.ipynb"], "cannot be read as a notebook"),
        (
            ["grade", "exercises/90_small.ipynb", "--task", "3a.7"],
            "90_small.ipynb has no task 03a.7; it has 90.1, 90.2",
        ),
        (["hint", "3a.7"], "there is no task '3a.7'; there are 90.1, 90.2"),
    ],
)
def test_what_is_not_there_gets_one_line_that_says_what_is(at, capsys, arguments, says):
    (at / "other.ipynb").write_text((at / "exercises/90_small.ipynb").read_text())
    for folder in ("solutions", "exercises"):
        (at / folder / "90_broken.ipynb").write_text("{")
    if "broken" not in arguments[1]:
        (at / "solutions/90_broken.ipynb").unlink()
    else:
        (at / "solutions/90_broken.ipynb").write_text((at / "solutions/90_small.ipynb").read_text())
    assert main(arguments) == 2
    assert says in capsys.readouterr().err


def test_what_passes_joins_the_engine_of_the_learner_and_the_rest_is_the_references(tmp_path, monkeypatch, capsys):
    (tmp_path / "solutions/src").mkdir(parents=True)
    source = EXERCISE.replace("two * x", "2 * x").replace('title="Double"', 'title="Double" engine="double"')
    source = source.replace('title="Mend"', 'title="Mend" engine="triple"')
    (tmp_path / "solutions/src/90_small.py").write_text(source, encoding="utf-8")
    build.build(tmp_path)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "exercises/90_small.ipynb"
    assert main(["grade", str(path)]) == 1
    assert not (tmp_path / engine.NAME).exists()
    for task, answer, yours in [
        ("90.2", "def triple(x):\n    return x + 2 * x  # mine", ["triple"]),
        ("90.1", "def double(x): return x + x  # mine", ["double", "triple"]),
    ]:
        notebook = read(path)
        next(one for one in notebook.cells if one.metadata.get("task") == task).source = answer
        nbformat.write(notebook, path)
        main(["grade", str(path), "--task", task])  # what passed before stays
        assert f"my_parallel.py: your own engine has your {', '.join(yours)}" in capsys.readouterr().out
        text = (tmp_path / engine.NAME).read_text()
        assert text.count("# mine") == len(yours) and text.count("reference(") == 2 - len(yours)
        monkeypatch.chdir(tmp_path / "exercises")
        mine = engine.load()
        assert (mine.double(4), mine.triple(4)) == (8, 12)
        monkeypatch.chdir(tmp_path)
    (tmp_path / engine.NAME).unlink()
    assert engine.load(tmp_path).double(4) == 8  # all of it the reference's


def test_watch_grades_at_each_save_and_ends_with_ctrl_c(at):
    notebook = at / "exercises/90_small.ipynb"
    watch = subprocess.Popen(
        [sys.executable, "-u", "-m", "minipar", "grade", "--watch", str(notebook)], stdout=subprocess.PIPE, text=True
    )
    late = threading.Timer(120, watch.kill)  # then the lines end, too
    late.start()
    try:
        lines = iter(watch.stdout.readline, "")
        assert any("waiting for the next save" in line for line in lines)
        changed = read(notebook)
        next(cell for cell in changed.cells if cell.id == "task-90-1").source = GOOD
        time.sleep(0.01)
        nbformat.write(changed, notebook)
        assert any("1 of 2 pass" in line for line in lines)
        watch.send_signal(signal.SIGINT)
        assert watch.wait(20) in (0, 1)
    finally:
        late.cancel()
        watch.kill()
