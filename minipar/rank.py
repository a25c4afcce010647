"""Inside a rank: join the group, then wait for functions, call them, send their answers."""

import datetime
import faulthandler
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from . import device as devices
from . import travel

LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


@dataclass(frozen=True)
class Here:
    """What this process is among the ranks."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    backend: str | None = None


_here: Here | None = None


def here() -> Here:
    """This process's rank, the number of ranks, its device and backend.

    Works in a World's rank, under `main`, in a process that made its own group, and alone (rank 0 of 1, on the CPU).
    """
    if _here is None and dist.is_initialized():
        return Here(dist.get_rank(), dist.get_world_size(), backend=dist.get_backend())
    return _here or Here()


def settle(rank: int, size: int, local_rank: int, local_ranks: int, device: str | None, **group: Any) -> Here:
    """Make this process one of `size` ranks: its device, its share of the cores, the default group."""
    global _here
    mine, backend = devices.pick(device, local_rank, local_ranks)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // local_ranks))
    dist.init_process_group(backend, rank=rank, world_size=size, **group)
    _here = Here(rank, size, mine, backend)
    return _here


def sow(seed: int) -> None:
    """Seed the generators of this process."""
    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


@dataclass(frozen=True)
class Failure:
    """What ended a function on a rank."""

    kind: str  # the exception's type
    text: str
    frames: list[tuple[str, int, str]]  # file, line, function; outermost first
    when: float  # of time.monotonic
    exception: bytes | None  # pickled, where it can be


@dataclass(frozen=True)
class Seat:
    """What a rank is told when it starts."""

    rank: int
    size: int
    device: str | None
    store: str  # path of the file through which the ranks find each other
    watch: bool


def live(seat: Seat, jobs: Connection, control: Connection, out: Connection, err: Connection) -> None:
    """A rank's whole life. It ends when the world closes it or the world's process is gone."""
    os.setsid()  # what this rank starts can be ended with it, and Ctrl-C in a terminal does not reach it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    multiprocessing.current_process().daemon = False  # a daemon may not start processes, a DataLoader must
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    faulthandler.enable(sys.stderr, all_threads=False)
    threading.Thread(target=_report_where, args=(control, threading.get_ident()), daemon=True).start()
    os.environ["GLOO_SOCKET_IFNAME"] = LOOPBACK
    settle(
        seat.rank,
        seat.size,
        seat.rank,
        seat.size,
        seat.device,
        store=dist.FileStore(seat.store, seat.size),
        timeout=datetime.timedelta(days=7),  # the world decides when a wait is too long
    )
    jobs.send_bytes(b"")
    while True:
        try:
            job = jobs.recv_bytes()
        except EOFError:
            os._exit(0)
        jobs.send_bytes(_answer(job))


def _answer(job: bytes) -> memoryview:
    try:
        seed, fn, args, kwargs = travel.loads(job)
        sow(seed)
        value = fn(*args, **kwargs)
    except BaseException as e:
        answer = _failure(e)
    else:
        try:
            answer = travel.dumps((True, value))
        except Exception as e:
            what = f"its answer, of type {type(value).__qualname__}, cannot be pickled: {e}"
            answer = travel.dumps((False, Failure(type(e).__name__, what, [], time.monotonic(), None)))
    sys.stdout.flush()
    sys.stderr.flush()
    return answer


def _failure(e: BaseException) -> memoryview:
    frames = [(f.filename, f.lineno or 0, f.name) for f in traceback.extract_tb(e.__traceback__)]
    try:
        exception = bytes(travel.dumps(e))
    except Exception:
        exception = None
    return travel.dumps((False, Failure(type(e).__name__, str(e), frames, time.monotonic(), exception)))


def stack(thread: int) -> list[tuple[str, int, str]]:
    """File, line and function of each frame of a thread, outermost first."""
    frames = traceback.extract_stack(sys._current_frames().get(thread))
    return [(f.filename, f.lineno or 0, f.name) for f in frames]


def _report_where(control: Connection, thread: int) -> None:
    """Tell the world where this rank is, each time it asks, and end when the world is gone."""
    while True:
        try:
            control.recv_bytes()
            control.send_bytes(travel.dumps((stack(thread), time.process_time())))
        except (EOFError, OSError):
            os._exit(0)
