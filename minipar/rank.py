"""Inside a rank: join the others, then wait for functions, call them, send their answers."""

import datetime
import faulthandler
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from . import device as devices
from . import travel
from .board import Board
from .watch import Watch

LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


@dataclass(frozen=True)
class Here:
    """What this process is among the ranks."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    backend: str | None = None


# What this process is; set once, when it becomes a rank.
_here: Here | None = None
_in_world = False

leaving: list[Callable[[], None]] = []  # called before the groups are destroyed: let go of them


def here() -> Here:
    """This process's rank, the number of ranks, its device and backend.

    Works in a World's rank, under `main`, in a process that made its own group, and alone (rank 0 of 1).
    """
    if _here is None and dist.is_initialized():
        return Here(dist.get_rank(), dist.get_world_size(), backend=dist.get_backend())
    return _here or Here()


def in_world() -> bool:
    """Whether this process is a rank of a World."""
    return _in_world


def settle(rank: int, size: int, local_rank: int, local_ranks: int, device: str | None, **group: Any) -> None:
    """Make this process one of `size` ranks: its device, its share of the cores, the default group."""
    global _here
    mine, backend = devices.pick(device, local_rank, local_ranks)
    torch.set_num_threads(max(1, cores() // local_ranks))
    dist.init_process_group(backend, rank=rank, world_size=size, **group)
    _here = Here(rank, size, mine, backend)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def sow(seed: int) -> None:
    """Seed the generators of this process: torch's, Python's, and numpy's if it is used."""
    devices.seed(seed, here().device)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


def follow(path: list[str]) -> None:
    """Look for modules where the caller does."""
    sys.path[:] = path


# -- what a rank tells ---------------------------------------------------------------------------------------------


class Frame(NamedTuple):
    """A place in a stack."""

    file: str
    line: int
    function: str


@dataclass(frozen=True)
class Failure:
    """What ended a function on a rank."""

    kind: str  # the exception's type
    text: str
    frames: tuple[Frame, ...] = ()  # outermost first
    when: float = 0.0  # of time.monotonic
    exception: bytes | None = None  # pickled, where it can be


def _frames(walk: Iterable[tuple[FrameType, int]]) -> tuple[Frame, ...]:
    return tuple(Frame(f.f_code.co_filename, line, f.f_code.co_name) for f, line in walk)


def _failure(e: BaseException, trace: TracebackType | None) -> Failure:
    try:
        exception = bytes(travel.dumps(e))
    except Exception:
        exception = None
    return Failure(type(e).__name__, str(e), _frames(traceback.walk_tb(trace)), time.monotonic(), exception)


def _answer(job: bytes) -> memoryview:
    """Call the function of a job. The answer is what it returned, or the Failure that ended it."""
    try:
        seed, fn, args, kwargs = travel.loads(job)
        sow(seed)
        value = fn(*args, **kwargs)
    except BaseException as e:  # exit() too must not end the rank
        trace = e.__traceback__.tb_next if e.__traceback__ else None  # without this function
        return travel.dumps(_failure(e, trace))
    try:
        return travel.dumps(value)
    except Exception as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        text = f"the answer, of type {type(value).__qualname__}, cannot be pickled and so cannot travel: {reason}"
        return travel.dumps(Failure("TypeError", text, when=time.monotonic()))


# -- a rank's life -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seat:
    """What a rank is told when it starts."""

    rank: int
    size: int
    device: str | None
    folder: str  # with the file through which ranks find each other, the board, and what a crash leaves
    watch: bool


def live(seat: Seat, jobs: Connection, control: Connection, out: Connection, err: Connection) -> None:
    """A rank's whole life. It ends when the world ends it, or when the world's own process is gone."""
    os.setsid()  # what this rank starts can be ended with it, and Ctrl-C in a terminal does not reach it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    multiprocessing.current_process().daemon = False  # else no DataLoader could start its workers
    threading.Thread(target=_tell_where, args=(control, threading.get_ident(), seat.folder), daemon=True).start()
    for number, pipe in ((1, out), (2, err)):
        os.dup2(pipe.fileno(), number)
        pipe.close()
    sys.stdout, sys.stderr = (
        open(number, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        for number in (1, 2)
    )
    faulthandler.enable(open(f"{seat.folder}/crash{seat.rank}", "w"), all_threads=False)  # noqa: SIM115
    board = Board(f"{seat.folder}/board", seat.size, seat.rank)
    try:
        _join(seat)
        if seat.watch:
            Watch(board)
        jobs.send_bytes(travel.dumps(None))
    except Exception as e:
        jobs.send_bytes(travel.dumps(_failure(e, e.__traceback__)))
    while True:
        try:
            job = jobs.recv_bytes()
        except EOFError:
            return  # multiprocessing then gives back what this process has of the system, such as semaphores
        board.begin()
        answer = _answer(job)
        sys.stdout.flush()
        sys.stderr.flush()
        jobs.send_bytes(answer)


def _join(seat: Seat) -> None:
    global _in_world
    _in_world = True
    os.environ["GLOO_SOCKET_IFNAME"] = LOOPBACK  # gloo listens nowhere else
    store = dist.FileStore(f"{seat.folder}/store", seat.size)
    forever = datetime.timedelta(days=7)  # the world says when a wait is too long
    settle(seat.rank, seat.size, seat.rank, seat.size, seat.device, store=store, timeout=forever)


def _tell_where(control: Connection, thread: int, folder: str) -> None:
    """Tell the world where a thread of this rank is, each time it asks. End when the world is gone."""
    while True:
        try:
            control.recv_bytes()
            frames = _frames(traceback.walk_stack(sys._current_frames()[thread]))
            control.send_bytes(travel.dumps((frames[::-1], time.process_time())))
        except (EOFError, OSError):
            for _ in range(5):  # a killed caller could not; and this rank's main thread may write there still
                shutil.rmtree(folder, ignore_errors=True)
                if not os.path.exists(folder):
                    break
                time.sleep(0.02)
            os._exit(0)
