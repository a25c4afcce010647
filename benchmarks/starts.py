"""What a World costs: to start, to run nothing, to watch, to come back after a failure. And how long grading takes."""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from measure import Row

from minipar import RankError, World
from minipar.rank import LOOPBACK

RANKS = 4
HERE = Path(__file__).resolve().parent


def _timed(do: Callable[[], object]) -> float:
    start = time.perf_counter()
    do()
    return time.perf_counter() - start


# -- inside ranks --------------------------------------------------------------------------------------------------


def nothing() -> None: ...


def reduce_once() -> None:
    dist.all_reduce(torch.ones(1))


def reduce_often(calls: int) -> float:
    """Seconds for one of many small all-reduces."""
    x = torch.zeros(4)
    dist.barrier()
    start = time.perf_counter()
    for _ in range(calls):
        dist.all_reduce(x)
    return (time.perf_counter() - start) / calls


def fail() -> None:
    if dist.get_rank() == 1:
        raise ValueError("on purpose")
    reduce_once()


def die() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    reduce_once()


# -- start ---------------------------------------------------------------------------------------------------------


def start(rounds: int, peer_rounds: int) -> list[Row]:
    """Until a first all-reduce is done on four ranks. The World is warm: one was started before in this process.

    A torch start takes seconds, so there are fewer of them: a World is started beside each for the ratio, and more
    Worlds follow for the World's own time.
    """
    _start_world()
    rows = []
    for name, peer in (("mp.spawn", _spawn), ("torchrun", _torchrun)):
        pairs = [(_start_world(), peer()) for _ in range(peer_rounds)]
        ours, theirs = map(list, zip(*pairs, strict=True))
        rows.append(Row(f"start beside {name}", f"World({RANKS}) ready", ours, theirs, name))
    own = [_start_world() for _ in range(rounds)]
    return [*rows, Row("start", f"World({RANKS}) ready, warm", own, most_seconds=0.2)]


def _start_world() -> float:
    began = time.perf_counter()
    with World(RANKS) as world:
        world.run(reduce_once)
        return time.perf_counter() - began


def _spawn() -> float:
    with tempfile.TemporaryDirectory() as folder:
        output = _python([str(HERE / "first_reduce.py"), "spawn", f"{folder}/meet"])
    return _ats(output) - float(output.split("from ")[1].split()[0])


def _torchrun() -> float:
    began = time.perf_counter()
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    return _ats(_python([*torchrun, "--nproc-per-node", str(RANKS), str(HERE / "first_reduce.py")])) - began


def _python(arguments: list[str]) -> str:
    quiet = {"GLOO_SOCKET_IFNAME": LOOPBACK, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], env=os.environ | quiet, check=True, capture_output=True, text=True
    ).stdout


def _ats(output: str) -> float:
    """When the last of the ranks had the sum."""
    words = output.split()
    ats = [float(words[i + 1]) for i, word in enumerate(words) if word == "at"]
    assert len(ats) == RANKS, output
    return max(ats)


# -- run, watch, restart -------------------------------------------------------------------------------------------


def empty_run(rounds: int) -> Row:
    with World(RANKS) as world:
        for _ in range(10):
            world.run(nothing)
        took = [_timed(lambda: world.run(nothing)) for _ in range(10 * rounds)]
    return Row("empty run", f"a run that does nothing, World({RANKS})", took, most_seconds=1e-3)


def watching(rounds: int, calls: int = 200) -> Row:
    """A small all-reduce in a World that watches, beside one in a World that does not."""
    order = random.Random(0)
    with World(2) as watched, World(2, watch=False) as plain:
        worlds = [watched, plain]
        for world in worlds:
            world.run(reduce_often, calls)
        took: list[list[float]] = [[], []]
        for _ in range(rounds):
            for i in order.sample([0, 1], 2):
                took[i].append(max(worlds[i].run(reduce_often, calls)))
    return Row("watching", "a small all_reduce, 2 ranks", *took, peer_name="not watched")


def restart(rounds: int) -> list[Row]:
    """From the call that fails to the end of the next run."""
    rows = []
    with World(RANKS) as world:

        def recover(failure: Callable[[], None]) -> None:
            try:
                world.run(failure)
            except RankError:
                world.run(reduce_once)
            else:
                raise AssertionError(f"{failure.__name__} went unnoticed")

        for failure, what in ((fail, "an exception on one rank"), (die, "a killed rank")):
            took = [_timed(lambda f=failure: recover(f)) for _ in range(rounds)]
            rows.append(
                Row(f"after {what}", f"{what}, reported, next run done, World({RANKS})", took, most_seconds=0.5)
            )
    return rows


# -- grading -------------------------------------------------------------------------------------------------------


def grading(rounds: int) -> Row:
    """`python -m minipar grade` of the solved first exercise, as a learner has it at the end."""
    solved = sorted((HERE.parent / "solutions").glob("*.ipynb"))[0]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "exercises").mkdir()
        mine = shutil.copy(solved, Path(folder) / "exercises")

        def grade() -> None:
            command = [sys.executable, "-m", "minipar", "grade", mine]
            subprocess.run(command, cwd=folder, check=True, capture_output=True)

        took = [_timed(grade) for _ in range(rounds)]
    return Row("grading", f"grade {solved.stem}, all solved", took, most_seconds=5.0)
