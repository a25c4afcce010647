"""The ranks of a world as processes: start them, hand out jobs, listen until all have answered or none will, end them.

On Linux a rank is forked from a server process that has imported torch once. Forking the caller itself is not safe:
it has threads. Elsewhere fork is not safe at all, and ranks start as fresh processes.
"""

import multiprocessing
import os
import re
import selectors
import shutil
import signal
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from . import travel
from .board import Board
from .rank import Failure, Frame, Seat, live
from .report import TORCH, Output, Witness, ending

FORK = sys.platform == "linux"
# Imported once for all ranks. torch asks for its compiler when the first optimizer is made.
PRELOAD = ["torch._dynamo", "minipar.rank", "minipar.train"]
LOOK = 0.25  # seconds between two looks at the board
QUIET = 5.0  # seconds without any movement after which ranks that all wait are called deadlocked
SLOW = 60.0  # the same where all have come to their call, and only bytes may be under way
SURE = 2.0  # seconds for which a rank's stack must not change to be taken as waiting
REST = 0.2  # the same once a rank has failed
GRACE = 1.0  # seconds at most that the others get to come to rest once a rank has failed
LEAVE = 0.5  # seconds at most that ranks without a job get to end by themselves
# Where in torch a rank may wait for others in C++: collectives, and backward passes with DDP's hooks.
WAITS = tuple(f"{TORCH}{folder}" for folder in ("distributed/", "autograd/", "nn/parallel/", "_ops.py"))


class Exit(int):
    """How a rank's process ended: a status, or minus a signal."""


def warm() -> None:
    """Start the server process now, without waiting for it, so that the first World starts faster.

    Worth a call before anything slow is imported: both then import torch at the same time.
    """
    if FORK:
        forkserver.set_forkserver_preload(PRELOAD)
        with _main_hidden():
            forkserver.ensure_running()


_hiding = threading.Lock()


@contextmanager
def _main_hidden() -> Iterator[None]:
    """A new process imports the caller's __main__ if it can tell where that lies. A rank must not: it would run the
    whole script once more."""
    main: dict[str, Any] = vars(sys.modules["__main__"])
    with _hiding:
        kept = [(name, main[name]) for name in ("__file__", "__spec__") if name in main]
        main["__file__"] = main["__spec__"] = None
        try:
            yield
        finally:
            del main["__file__"], main["__spec__"]
            main.update(kept)


class Member:
    """The caller's ends of one rank: its process and its pipes."""

    def __init__(self, context: Any, seat: Seat) -> None:
        self.jobs, jobs = context.Pipe()
        self.control, control = context.Pipe()
        self.out, out = context.Pipe(duplex=False)
        self.err, err = context.Pipe(duplex=False)
        args = seat, jobs, control, out, err
        self.process = context.Process(target=live, args=args, name=f"rank {seat.rank}", daemon=True)
        self.process.start()
        self.free = False  # whether it waits for a job
        for end in (jobs, control, out, err):
            end.close()

    def where(self) -> tuple[tuple[Frame, ...], float]:
        """The stack of the rank's main thread and the CPU seconds that it has used, if it answers."""
        try:
            while self.control.poll():  # an answer that came too late
                self.control.recv_bytes()
            self.control.send_bytes(b"?")
            if self.control.poll(0.5):
                return travel.loads(self.control.recv_bytes())
        except (OSError, EOFError):
            pass
        return (), 0.0

    def kill(self) -> None:
        """End the process and what it has started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it is gone, or so young that it leads no group yet
            self.process.kill()

    def close(self) -> None:
        """Wait for the end of the process and free what belongs to it here."""
        self.process.join()
        for end in (self.jobs, self.control, self.out, self.err):
            end.close()


class Crew:
    """`size` ranks from their start to their end. They get ready by themselves; `wait_until_ready` waits for it."""

    def __init__(self, size: int, device: str | None, watch: bool) -> None:
        self.size = size
        self.path = list(sys.path)
        self.output = Output()
        self.events = selectors.DefaultSelector()
        self.members: list[Member] = []
        self.folder = tempfile.mkdtemp(prefix="minipar-")
        # Ends the ranks: when called, with this object, or with this process. True the first time.
        self.end = weakref.finalize(self, _end, os.getpid(), self.members, self.events, self.folder)
        Board.create(f"{self.folder}/board", size)
        self.board = Board(f"{self.folder}/board", size)
        self.ready = False
        warm()
        context = multiprocessing.get_context("forkserver" if FORK else "spawn")
        with _main_hidden():
            for rank in range(size):
                self.members.append(Member(context, Seat(rank, size, device, self.folder, watch)))
        for rank, m in enumerate(self.members):
            for what, file in (("answer", m.jobs), ("end", m.process.sentinel), ("stdout", m.out), ("stderr", m.err)):
                self.events.register(file, selectors.EVENT_READ, (rank, what))

    def wait_until_ready(self) -> None:
        """Raises RuntimeError where a rank cannot start, ValueError where that is for a wrong argument."""
        if self.ready:
            return
        for rank, outcome in self.listen(None)[0].items():
            if isinstance(outcome, Failure):
                if outcome.kind == "ValueError":
                    raise ValueError(outcome.text)
                raise RuntimeError(f"rank {rank} cannot start: {outcome.kind}: {outcome.text}")
            if isinstance(outcome, Exit):
                raise RuntimeError(f"rank {rank} cannot start: it {ending(outcome)}")
        os.unlink(f"{self.folder}/board")  # all have it open
        self.ready = True

    def gone(self) -> dict[int, Exit]:
        """The ranks whose processes have ended, and how."""
        ends = [key.data[0] for key, _ in self.events.select(0) if key.data[1] == "end"]
        return {rank: self._exit(rank) for rank in ends}

    def _exit(self, rank: int) -> Exit:
        self.members[rank].process.join()
        return Exit(self.members[rank].process.exitcode)

    def send(self, job: memoryview) -> None:
        """Give every rank the same job."""
        for member in self.members:
            member.free = False
            with suppress(BrokenPipeError):  # it has ended, as `listen` will see
                member.jobs.send_bytes(job)

    def listen(self, limit: float | None) -> tuple[dict[int, Any], str]:
        """Show the ranks' output until every one has ended its job, or until it is clear that some will not.

        Returns each rank's answer, Failure or Exit, and in words why nobody waits for the others.
        """
        ended: dict[int, Any] = {}
        guard = Guard(self, limit)
        verdict = ""
        while len(ended) < self.size and not verdict:
            for key, _ in self.events.select(guard.patience()):
                rank, what = key.data
                if what in ("stdout", "stderr"):
                    self._show(key)
                elif what == "answer":
                    self._take(rank, ended)
                else:
                    self._take(rank, ended)  # it may have answered and ended
                    self.events.unregister(key.fileobj)
                    ended.setdefault(rank, self._exit(rank))
            verdict = guard.verdict(ended)
        for key, _ in self.events.select(0):
            if key.data[1] in ("stdout", "stderr"):
                self._show(key)
        self.output.finish()
        return ended, verdict

    def _take(self, rank: int, ended: dict[int, Any]) -> None:
        jobs = self.members[rank].jobs
        try:
            if jobs.poll():
                ended[rank] = travel.loads(jobs.recv_bytes())
                self.members[rank].free = True
        except (EOFError, OSError):  # its process has ended; the sentinel will say how
            if jobs in self.events.get_map():
                self.events.unregister(jobs)

    def _show(self, key: selectors.SelectorKey) -> None:
        data = os.read(key.fd, 1 << 17)
        if data:
            rank, stream = key.data
            self.output.add(rank, stream, data)
        else:
            self.events.unregister(key.fileobj)

    def at_rest(self, ended: dict[int, Any]) -> bool:
        """Whether all ranks are free for another job and nothing is under way between them."""
        ended_well = len(ended) == self.size and not any(isinstance(e, Exit) for e in ended.values())
        return ended_well and self.board.balanced()

    def _last_words(self, rank: int) -> tuple[Frame, ...]:
        """The stack that Python wrote when the rank crashed, if it did."""
        words = re.findall(r'File "(.*)", line (\d+) in (.*)', Path(f"{self.folder}/crash{rank}").read_text())
        return tuple(Frame(file, int(line), function) for file, line, function in reversed(words))

    def witnesses(self, ended: dict[int, Any]) -> list[Witness]:
        """All that is known of each rank."""
        found = []
        for rank, member in enumerate(self.members):
            outcome, standing = ended.get(rank), self.board.standing(rank)
            if rank not in ended:
                found.append(Witness(rank, frames=member.where()[0], standing=standing))
            elif isinstance(outcome, Failure):
                found.append(Witness(rank, failure=outcome, standing=standing))
            elif isinstance(outcome, Exit):
                found.append(Witness(rank, exit=outcome, frames=self._last_words(rank), standing=standing))
            else:
                found.append(Witness(rank, returned=True, standing=standing))
        return found


def _end(owner: int, members: list[Member], events: selectors.BaseSelector, folder: str) -> bool:
    if os.getpid() != owner:  # a fork of the caller does not own the ranks
        return False
    events.close()
    free, stop = [member for member in members if member.free], time.monotonic() + LEAVE
    for member in free:
        member.jobs.close()  # it ends by itself then, and gives back to the system what it has of it
    for member in free:
        member.process.join(max(0.0, stop - time.monotonic()))
    for member in members:
        member.kill()
    for member in members:
        member.close()
    shutil.rmtree(folder, ignore_errors=True)
    return True


class Guard:
    """Judges during a run whether it is worth waiting on."""

    def __init__(self, crew: Crew, limit: float | None) -> None:
        self.crew, self.limit = crew, limit
        self.start = self.since = time.monotonic()
        self.next = self.start + LOOK
        self.failed: float | None = None  # when a rank was first seen to have failed
        self.state: object = None  # of the board and the answers; while it stays the same, nothing moves
        self.samples: dict[int, tuple[tuple[Frame, ...], float, float]] = {}

    def patience(self) -> float:
        """Seconds until the next look."""
        return max(0.0, self.next - time.monotonic())

    def verdict(self, ended: dict[int, Any]) -> str:
        """Why to wait no longer, or nothing."""
        now = time.monotonic()
        if self.failed is None and any(isinstance(e, (Failure, Exit)) for e in ended.values()):
            self.failed = self.next = now
        if now < self.next:
            return ""
        self.next = now + (LOOK if self.failed is None else REST / 4)
        if self.limit is not None:
            if now - self.start >= self.limit:
                return f"the limit of {self.limit:g} s is over"
            self.next = min(self.next, self.start + self.limit)
        board = self.crew.board
        state = board.moved(), len(ended), self.crew.output.lines
        if state != self.state:
            self.state, self.since = state, now
            self.samples.clear()
        quiet = now - self.since
        waiting = [rank for rank in range(self.crew.size) if rank not in ended]
        if self.failed is not None:
            at_rest = quiet >= REST and all(board.waits(rank) for rank in waiting)
            return "a rank failed" if at_rest or now - self.failed >= GRACE else ""
        if not self.crew.ready or quiet < QUIET:
            return ""
        if all([self._stuck(rank, quiet, now) for rank in waiting]):  # a list: each is looked at every time
            who = "every rank that has not returned waits" if ended else "every rank waits"
            return f"deadlock: {who}, and nothing has moved for {quiet:.0f} s"
        return ""

    def _stuck(self, rank: int, quiet: float, now: float) -> bool:
        """Whether a rank waits for something that has not begun to come."""
        standing = self.crew.board.standing(rank)
        if standing and standing.waiting:
            return bool(standing.missing) or quiet >= SLOW
        # The board knows nothing of calls from C++. A rank that stays where torch may make one, and does not use
        # the CPU, waits in one. One that sleeps is elsewhere.
        frames, used = self.crew.members[rank].where()
        before = self.samples.setdefault(rank, (frames, used, now))
        if frames != before[0] or used - before[1] > 0.05 + 0.05 * (now - before[2]):
            self.samples[rank] = frames, used, now
            return False
        return bool(frames) and frames[-1].file.startswith(WAITS) and now - before[2] >= SURE
