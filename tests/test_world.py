"""Ranks start, answer, print, and leave nothing behind."""

import gc
import os
import random
import subprocess
import sys
import textwrap
import threading
import time
import types
from pathlib import Path
from unittest.mock import patch

import numpy
import psutil
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from minipar import RankError, World, crew, here, main, travel
from minipar.report import Output


def script(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(text))
    return path


# -- answers -------------------------------------------------------------------------------------------------------


def test_answers_come_in_rank_order(world4: World) -> None:
    def answer(a: int, b: int) -> tuple[int, int, int]:
        time.sleep(0.05 * (4 - here().rank))  # the last rank answers first
        return a + b + here().rank, here().rank, here().size

    assert world4.run(answer, 10, b=20) == [(30 + rank, rank, 4) for rank in range(4)]


def test_ranks_are_in_one_gloo_group(world4: World) -> None:
    def total() -> float:
        assert here().backend == dist.get_backend() == "gloo"
        x = torch.tensor(float(here().rank))
        dist.all_reduce(x)
        return x.item()

    assert world4.run(total) == [6.0] * 4


def test_here_describes_a_plain_process() -> None:
    assert (here().rank, here().size, here().device, here().backend) == (0, 1, torch.device("cpu"), None)


def test_every_run_begins_with_the_same_seed_on_every_rank(world2: World) -> None:
    def draw() -> tuple[float, float, float]:
        return torch.rand(1).item(), random.random(), float(numpy.random.rand())

    first, again, other = (world2.run(draw, seed=seed) for seed in (0, 0, 1))
    assert first[0] == first[1] == again[0] == again[1]
    assert all(x != y for x, y in zip(first[0], other[0], strict=True))
    torch.manual_seed(1)
    assert other[0][0] == torch.rand(1).item()


def test_ranks_share_the_cores(world2: World, world8: World) -> None:
    cores = len(os.sched_getaffinity(0))
    assert world2.run(torch.get_num_threads) == [max(1, cores // 2)] * 2
    assert world8.run(torch.get_num_threads) == [max(1, cores // 8)] * 8


@pytest.mark.parametrize(
    "x",
    [
        torch.arange(6.0).reshape(2, 3).t(),
        torch.tensor(3, dtype=torch.int64),
        torch.empty(0, 4),
        torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        torch.tensor([1 + 2j]).conj(),
        torch.ones(2, requires_grad=True),
        torch.nn.Parameter(torch.ones(2)),
    ],
    ids=lambda x: f"{type(x).__name__}-{x.dtype}-{tuple(x.shape)}",
)
def test_tensors_travel_both_ways_unchanged(world2: World, x: Tensor) -> None:
    for y in world2.run(lambda x: x, x):
        assert torch.equal(x, y) and type(x) is type(y) and (x.dtype, x.requires_grad) == (y.dtype, y.requires_grad)
        assert not y.is_shared()


def test_a_view_travels_without_the_tensor_that_it_is_a_view_of() -> None:
    assert len(travel.dumps(torch.zeros(1_000_000)[3:5])) < 1000


def test_a_function_of_a_notebook_may_use_torch_distributed_and_something_called_config() -> None:
    """There is a torch.distributed.config, which is no plain module; cloudpickle takes it along by its name."""
    cell = {"__name__": "__main__"}
    exec("import torch.distributed as dist\nconfig = 7\ndef cell(): return config, dist.is_initialized()", cell)
    assert travel.loads(travel.dumps(cell["cell"]))() == (7, False)


def test_a_computed_answer_travels_without_its_graph(world2: World) -> None:
    def loss() -> Tensor:
        return (torch.ones(2, requires_grad=True) * 3).sum()

    assert [(y.item(), y.requires_grad) for y in world2.run(loss)] == [(6.0, False)] * 2


def test_ranks_import_what_the_caller_can_import(
    world2: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_module_beside_the_notebook.py").write_text("answer = 42")
    monkeypatch.syspath_prepend(tmp_path)
    module = __import__("a_module_beside_the_notebook")
    assert world2.run(lambda m: m.answer, module) == [42, 42]


def test_a_rank_may_start_processes(world2: World) -> None:
    def loaded() -> list[float]:
        loader = torch.utils.data.DataLoader(torch.arange(4.0), batch_size=2, num_workers=1)
        return [batch.sum().item() for batch in loader]

    assert world2.run(loaded) == [[1.0, 5.0]] * 2


# -- output --------------------------------------------------------------------------------------------------------


def test_each_line_of_output_stands_behind_its_rank(world2: World, capsys: pytest.CaptureFixture[str]) -> None:
    def talk() -> None:
        print(f"one\ntwo é of {here().rank}")
        print("error", file=sys.stderr)
        os.write(1, b"from C\n")
        subprocess.run(["echo", "from a program"], check=True)
        print("not ended", end="")

    world2.run(talk)
    out, err = capsys.readouterr()
    for rank in range(2):
        mine = [line for line in out.splitlines() if line.startswith(f"[{rank}] ")]
        said = ["one", f"two é of {rank}", "from C", "from a program", "not ended"]
        assert mine == [f"[{rank}] {text}" for text in said]
        assert f"[{rank}] error\n" in err
    assert len(out.splitlines()) == 10 and len(err.splitlines()) == 2


def test_output_is_shown_while_the_run_goes_on(world2: World, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, float] = {}
    stream = types.SimpleNamespace(write=lambda text: seen.setdefault(text, time.monotonic()), flush=lambda: None)

    def talk() -> None:
        if here().rank == 0:
            print("begun")
        time.sleep(0.5)

    monkeypatch.setattr(sys, "stdout", stream)
    world2.run(talk)
    assert time.monotonic() - seen["[0] begun\n"] > 0.3


def test_any_number_of_lines_gets_through(world2: World, capsys: pytest.CaptureFixture[str]) -> None:
    def talk() -> None:
        for i in range(20_000):
            print(f"line {i} of many, longer than a pipe has room for in all", file=(sys.stdout, sys.stderr)[i % 2])

    world2.run(talk, limit=60)
    out, err = capsys.readouterr()
    assert out.count("\n") == err.count("\n") == 20_000


def test_a_bar_that_redraws_itself_is_redrawn_in_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output()
    for text in (b"\r 10%", b"\r 50%", b"\r100%\n"):
        output.add(1, "stdout", text)
    assert capsys.readouterr().out == "[1]  10%\r[1]  50%\r[1] 100%\n"
    output.add(1, "stdout", b"\r 10%")
    output.add(0, "stdout", b"hello\r\n")
    output.finish()
    assert capsys.readouterr().out == "[1]  10%\n[0] hello\n[1]  10%\n"


# -- processes -----------------------------------------------------------------------------------------------------


def lives(pid: int) -> bool:
    """Whether a process runs. It may end while it is asked about."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def gone(pids: list[int], within: float = 3.0) -> bool:
    """Whether all these processes end in time."""
    end = time.monotonic() + within
    while alive := [pid for pid in pids if lives(pid)]:
        if time.monotonic() > end:
            print("still there:", alive)
            return False
        time.sleep(0.02)
    return True


def test_closing_a_world_ends_its_ranks_and_a_closed_world_says_so() -> None:
    world = World(2)
    pids = world.run(os.getpid)
    assert repr(world) == "World(2)"
    world.close()
    world.close()
    assert gone(pids, within=0.5)
    assert repr(world) == "World(2, closed)"
    with pytest.raises(RuntimeError, match=r"World\(2, closed\) has no ranks any more"):
        world.run(os.getpid)


def test_a_forgotten_world_ends_its_ranks() -> None:
    world = World(2)
    pids = world.run(os.getpid)
    del world
    gc.collect()
    assert gone(pids)


def test_a_world_may_be_closed_while_it_runs() -> None:
    world = World(2)
    closing = threading.Timer(0.2, world.close)
    closing.start()
    with pytest.raises(RuntimeError, match=r"World\(2, closed\) was closed while it ran"):
        world.run(time.sleep, 1000)
    closing.join()
    with pytest.raises(RuntimeError, match="make a new World"):
        world.run(time.sleep, 0)


def test_what_a_rank_started_ends_with_it() -> None:
    def start() -> int:
        return subprocess.Popen(["sleep", "1000"]).pid

    with World(2) as world:
        pids = world.run(start)
    assert gone(pids)


def test_every_listener_is_on_the_loopback(world4: World) -> None:
    def listeners() -> list[str]:
        dist.barrier(dist.new_group([0, 1, 2, 3]))
        return [c.laddr.ip for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN]

    addresses = [ip for listening in world4.run(listeners) for ip in listening]
    assert addresses and set(addresses) == {"127.0.0.1"}


def test_a_script_needs_no_guard_and_runs_once(tmp_path: Path) -> None:
    path = script(
        tmp_path,
        """
        from dataclasses import dataclass
        from minipar import World, here
        print("the script runs")

        @dataclass
        class Answer:
            rank: int

        def double(answer):
            return Answer(2 * answer.rank + here().rank)

        with World(2) as world:
            assert world.run(double, Answer(5)) == [Answer(10), Answer(11)]
        world = World(2)
        print(*world.run(lambda: __import__("os").getpid()))
        """,
    )
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, check=True, timeout=60)
    first, pids = done.stdout.splitlines()
    assert first == "the script runs" and not done.stderr
    assert gone([int(pid) for pid in pids.split()]), "the last world was never closed, but the script has ended"


def test_a_lock_of_several_processes_that_a_rank_holds_is_given_back(tmp_path: Path) -> None:
    """tqdm makes one for each bar's line. Python's tracker of resources complains of those that are left at the end."""
    path = script(
        tmp_path,
        """
        import multiprocessing
        from minipar import World

        def hold():
            multiprocessing.kept = multiprocessing.RLock()

        with World(2) as world:
            world.run(hold)
        """,
    )
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, check=True, timeout=60)
    assert not done.stderr


def test_only_ranks_without_work_are_waited_for_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "LEAVE", 30.0)
    start = time.monotonic()
    with World(2) as world:
        world.run(os.getpid)
        with pytest.raises(RankError, match="limit"):
            world.run(time.sleep, 1000, limit=0.2)
    assert time.monotonic() - start < 20


def test_ranks_that_do_not_end_are_waited_for_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "LEAVE", 1.0)
    world = World(4)
    world.run(lambda: threading.Thread(target=time.sleep, args=(1000,)).start())
    start = time.monotonic()
    world.close()
    assert 0.9 < time.monotonic() - start < 3


def test_a_fork_of_the_caller_does_not_end_its_ranks() -> None:
    with World(2) as world:
        pids = world.run(os.getpid)
        if (fork := os.fork()) == 0:
            world.close()
            os._exit(0)
        os.waitpid(fork, 0)
        assert world.run(os.getpid) == pids


def test_a_killed_caller_leaves_no_process_and_no_file(tmp_path: Path) -> None:
    path = script(
        tmp_path,
        """
        import os, threading, time, psutil, torch, torch.distributed as dist
        from minipar import World, here

        def idle():
            pass

        def loop():
            while True:
                pass

        def wait():
            if here().rank:
                dist.barrier()
            time.sleep(1000)

        worlds = [World(2) for _ in range(3)]
        for world, busy in zip(worlds, (idle, loop, wait)):
            threading.Thread(target=world.run, args=(busy,), daemon=True).start()
        time.sleep(0.5)
        print(*[p.pid for p in psutil.Process().children(recursive=True)], flush=True)
        time.sleep(1000)
        """,
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, path], stdout=subprocess.PIPE, text=True, env=environment) as caller:
        assert caller.stdout
        pids = [int(pid) for pid in caller.stdout.readline().split()]
        folders = list(tmp_path.glob("minipar-*"))
        caller.kill()
    assert len(pids) == 8, "the server, the tracker of resources and three times two ranks"
    assert len(folders) == 3
    assert gone(pids, within=30)
    assert not list(tmp_path.glob("minipar-*"))


def test_the_same_script_gives_the_same_numbers_under_torchrun_and_no_thread_outlives_it(
    tmp_path: Path,
) -> None:
    """A thread that still works while Python shuts down aborts it, now and then, after all is done."""
    path = script(
        tmp_path,
        """
        from pathlib import Path
        import torch
        from minipar import Mesh, connect, here, main
        from minipar.collectives import all_reduce

        kept = []

        def mean(n):
            x = torch.rand(n, dtype=torch.float64) * (here().rank + 1)
            kept.append(connect(Mesh(dp=8))["dp"])  # as a model does
            x = all_reduce(x, kept[0])
            return here().rank, here().size, torch.get_num_threads(), (x / here().size).tolist()

        answers = main(mean, 3, ranks=8, seed=7)
        if here().rank == 0:
            print(answers)
            print(sum("gloo" in file.read_text() for file in Path("/proc/self/task").glob("*/comm")), "left")
        """,
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "8"]
    ours, theirs = (
        subprocess.run([*command, path], capture_output=True, text=True, check=True, timeout=120).stdout
        for command in ([sys.executable], torchrun)
    )
    assert ours == theirs and ours.startswith("[(0, 8, ") and ours.endswith("\n0 left\n")


def test_main_needs_no_torchrun() -> None:
    assert main(lambda x: x + here().rank, 1, ranks=2) == [1, 2]


def test_under_torchrun_the_local_rank_chooses_the_device(monkeypatch):
    names = {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4, "MASTER_ADDR": "here"}
    for name, value in names.items():
        monkeypatch.setenv(name, str(value))

    class Asked(Exception):
        pass

    def settle(*arguments, **_):
        raise Asked(*arguments[:4])

    with (
        patch("minipar.world._store", lambda *_: None),
        patch("minipar.world.settle", settle),
        pytest.raises(Asked) as asked,
    ):
        main(lambda: None)
    assert asked.value.args == (5, 8, 1, 4)
