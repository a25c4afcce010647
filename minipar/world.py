"""Start ranks on this machine, run functions on all of them, and say what went wrong where."""

import multiprocessing
import os
import selectors
import shutil
import signal
import sys
import tempfile
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from . import rank, travel
from .rank import Here, here

__all__ = ["Here", "RankError", "World", "here"]

FORK = sys.platform == "linux"


class RankError(RuntimeError):
    """A run failed. The message is the report."""

    def _render_traceback_(self) -> list[str]:
        return [f"RankError: {self}"]


class _Rank:
    """The caller's ends of one rank: its process and its pipes."""

    def __init__(self, context: Any, seat: rank.Seat) -> None:
        self.jobs, jobs = context.Pipe()
        self.control, control = context.Pipe()
        self.out, out = context.Pipe(duplex=False)
        self.err, err = context.Pipe(duplex=False)
        self.process: BaseProcess = context.Process(target=rank.live, args=(seat, jobs, control, out, err), daemon=True)
        self.process.start()
        for end in (jobs, control, out, err):
            end.close()


class World:
    def __init__(self, n: int, device: str | None = None, watch: bool = True) -> None:
        self.n, self.device, self.watch = n, device, watch
        self._ranks: list[_Rank] = []
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver" if FORK else "spawn")
        if FORK:
            context.set_forkserver_preload(["torch._dynamo", "minipar.rank"])
        self._folder = tempfile.mkdtemp(prefix="minipar-")
        with _main_hidden():
            self._ranks = [
                _Rank(context, rank.Seat(i, self.n, self.device, self._folder + "/store", self.watch))
                for i in range(self.n)
            ]
        self._end = weakref.finalize(self, _end, self._ranks, self._folder)
        self._events = selectors.DefaultSelector()
        self._tails: dict = {}
        for i, r in enumerate(self._ranks):
            for what, file in (("answer", r.jobs), ("stdout", r.out), ("stderr", r.err), ("end", r.process.sentinel)):
                self._events.register(file, selectors.EVENT_READ, (i, what))
        self._ready = False

    def run(self, fn: Callable[..., Any], *args: Any, limit: float | None = None, seed: int = 0, **kwargs: Any) -> list[Any]:
        if not self._ready:
            self._collect()
            self._ready = True
        job = travel.dumps((seed, fn, args, kwargs))
        for r in self._ranks:
            r.jobs.send_bytes(job)
        answers = self._collect()
        bad = {i: a for i, (ok, a) in answers.items() if not ok}
        if bad:
            i, failure = min(bad.items(), key=lambda item: item[1].when)
            self._restart()
            raise RankError(f"rank {i} raised {failure.kind}: {failure.text}\n{failure.frames}")
        return [answers[i][1] for i in range(self.n)]

    def _collect(self) -> dict[int, Any]:
        answers: dict[int, Any] = {}
        while len(answers) < self.n:
            for key, _ in self._events.select():
                i, what = key.data
                if what == "answer":
                    raw = key.fileobj.recv_bytes()
                    answers[i] = travel.loads(raw) if raw else None
                elif what == "end":
                    self._restart()
                    raise RankError(f"rank {i} died")
                else:
                    self._show(key)
        for key, _ in self._events.select(0):
            self._show(key)
        return answers

    def _show(self, key: Any) -> None:
        i, what = key.data
        data = os.read(key.fd, 1 << 16)
        lines = (self._tails.get(key.data, b"") + data).split(b"\n")
        self._tails[key.data] = lines.pop()
        for line in lines:
            print(f"[{i}] {line.decode(errors='replace')}", file=getattr(sys, what))

    def _restart(self) -> None:
        self._end()
        self._start()

    def close(self) -> None:
        self._end()

    def __enter__(self) -> "World":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _end(ranks: list[_Rank], folder: str) -> None:
    for r in ranks:
        r.process.kill()
    for r in ranks:
        r.process.join()
        for end in (r.jobs, r.control, r.out, r.err):
            end.close()
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _main_hidden():
    """A new process imports the caller's __main__ again if it knows where it lies. Ranks must not."""
    main = sys.modules["__main__"]
    hidden = {name: vars(main).pop(name) for name in ("__file__", "__spec__") if name in vars(main)}
    main.__spec__ = None
    try:
        yield
    finally:
        vars(main).update(hidden)
