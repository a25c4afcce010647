"""Run functions on ranks of this machine, and say what went wrong where.

A World keeps its ranks between runs. When a run leaves them in a state that nobody can know, it replaces them.
"""

import gc
import inspect
import os
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from . import report, travel
from .crew import Crew, Exit, warm
from .rank import Failure, Here, cores, follow, here, in_world, leaving, settle, sow

__all__ = ["Here", "RankError", "World", "here", "main", "warm"]

MOST = 64  # ranks that a world starts without being asked twice


class RankError(RuntimeError):
    """A run failed. The message is a report: what happened, on which line, and where the other ranks stood.

    rank: the rank to blame, None for a deadlock. exception: what it raised, where that could travel.
    reports: a line for every rank.
    """

    def __init__(
        self,
        message: str,
        rank: int | None = None,
        exception: BaseException | None = None,
        reports: dict[int, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.rank, self.exception, self.reports = rank, exception, reports or {}

    def _render_traceback_(self) -> list[str]:  # what a notebook shows
        return [f"RankError: {self}"]


class Interrupted(KeyboardInterrupt):
    """The caller was interrupted during a run. The message says where the ranks were."""

    def _render_traceback_(self) -> list[str]:
        return [f"KeyboardInterrupt: {self}"]


class World:
    """`n` ranks on this machine (Linux or macOS), ready to run functions.

    >>> with World(4) as world:
    ...     answers = world.run(function, argument)

    n: ranks. device: None for the CPU, or "cuda". watch: write the ranks' calls of torch.distributed on a board,
    which catches calls that do not fit together and explains deadlocks. most: how many ranks are not too many.
    Raises TypeError or ValueError where these make no sense, RuntimeError inside a rank.
    """

    def __init__(self, n: int, device: str | None = None, watch: bool = True, most: int = MOST) -> None:
        _check_size(n, most)
        self.n, self.device, self.watch = n, device, watch
        self._running = threading.Lock()
        self.closed = False
        self._crew: Crew | None = None
        self._ready_crew()

    def __repr__(self) -> str:
        device = f", device={self.device!r}" if self.device else ""
        return f"World({self.n}{device}{', closed' if self.closed else ''})"

    def __reduce__(self) -> Any:
        raise TypeError("a World cannot travel to its own ranks: what runs there must not use it")

    def __enter__(self) -> "World":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the ranks. Without it they end with this object, or with this process."""
        self.closed = True
        self._end_crew()

    def run(
        self, fn: Callable[..., Any], *args: Any, limit: float | None = None, seed: int = 0, **kwargs: Any
    ) -> list[Any]:
        """Call `fn(*args, **kwargs)` on every rank and return the answers in rank order.

        limit: seconds after which the run is given up, with a report of where every rank was. Without it, a run ends
        when all ranks have answered, when one fails, or when they wait for each other. seed: of the random numbers
        of every rank.
        Raises RankError when a rank fails, TypeError for arguments that do not fit `fn` or cannot travel.
        """
        _check_call(fn, args, kwargs)
        job = _pack(seed, fn, args, kwargs)
        if not self._running.acquire(blocking=False):
            raise RuntimeError(f"{self} is busy with another run: wait for that one, or use a second World")
        try:
            if self.closed:
                raise RuntimeError(f"{self} has no ranks any more: make a new World")
            return self._run(self._ready_crew(), job, limit)
        finally:
            self._running.release()

    def _run(self, crew: Crew, job: memoryview, limit: float | None) -> list[Any]:
        clean = False  # whether no rank is busy and no message is under way
        try:
            crew.send(job)
            ended, verdict = crew.listen(limit)
            failed = bool(verdict) or any(isinstance(outcome, (Failure, Exit)) for outcome in ended.values())
            clean = crew.at_rest(ended) and (self.watch or not failed)
            if failed:
                raise _error(crew, ended, verdict)
            if not clean:
                warnings.warn(report.unmatched(crew.board.leftovers()), stacklevel=3)
        except (OSError, ValueError):
            if not self.closed:
                raise
            raise RuntimeError(f"{self} was closed while it ran") from None
        except KeyboardInterrupt:
            lines = report.table(crew.witnesses({})).values()
            raise Interrupted("stopped by you, while\n" + report.indent(lines)) from None
        finally:
            if not clean and crew.end():  # unless it was ended from outside: by `close`, or with this process
                self._crew = None
                self._crew = self._new_crew()  # it gets ready while the caller reads
        return [ended[rank] for rank in range(self.n)]

    def _new_crew(self) -> Crew:
        return Crew(self.n, self.device, self.watch)

    def _end_crew(self) -> None:
        if self._crew:
            self._crew.end()
        self._crew = None

    def _ready_crew(self) -> Crew:
        gone = self._crew.gone() if self._crew else {}
        if gone:
            what = ", ".join(f"rank {rank} {report.ending(code)}" for rank, code in gone.items())
            warnings.warn(f"since the last run {what}: {self} has fresh ranks now", stacklevel=4)
            self._end_crew()
        crew = self._crew = self._crew or self._new_crew()
        try:
            crew.wait_until_ready()
            if crew.path != sys.path:  # what the caller can import, ranks can
                crew.path = list(sys.path)
                crew.send(_pack(0, follow, (crew.path,), {}))
                crew.listen(None)
        except BaseException:
            self._end_crew()
            raise
        return crew


def main(
    fn: Callable[..., Any],
    *args: Any,
    ranks: int = 8,
    device: str | None = None,
    limit: float | None = None,
    seed: int = 0,
    **kwargs: Any,
) -> list[Any]:
    """Call `fn(*args, **kwargs)` on every rank: torchrun's where this script runs under torchrun, else a World's.

    Returns the answers in rank order, under torchrun on every rank, so that what follows works either way; let it
    print where `here().rank == 0`. Whatever follows runs once with a World and once a rank under torchrun.
    ranks, limit: of the World. device: as in World; under torchrun None means a GPU for each rank where the machine
    has that many, else the CPU.
    """
    if not _under_torchrun():
        with World(ranks, device=device) as world:
            return world.run(fn, *args, limit=limit, seed=seed, **kwargs)
    _check_call(fn, args, kwargs)
    local_rank, local_ranks = (int(os.environ[name]) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    rank, size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    settle(rank, size, local_rank, local_ranks, device or "auto", store=_store(rank, size))
    try:
        sow(seed)
        answers: list[Any] = [None] * size
        dist.all_gather_object(answers, fn(*args, **kwargs))
        return answers
    finally:
        _leave()


def _leave() -> None:
    """Destroy the groups, and with them gloo's threads, which end when nobody holds a group any more. One that still
    lets go of a tensor while Python shuts down aborts the process, after all its work is done."""
    for let_go in leaving:
        let_go()
    dist.destroy_process_group()
    gc.collect()  # what torch's own wrappers hold


def _under_torchrun() -> bool:
    return {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"} <= set(os.environ)


def _store(rank: int, size: int) -> dist.Store:
    """Where torchrun's ranks find each other. Its store outlives a restart, and with it the addresses of ranks that are
    gone: each attempt gets a part of its own. Several nodes each count their own attempts, so there it is the whole."""
    store = next(dist.rendezvous("env://", rank, size))[0]
    alone = os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if alone else "0"
    return dist.PrefixStore(f"attempt {attempt}", store)


def _error(crew: Crew, ended: dict[int, Any], verdict: str) -> RankError:
    witnesses = crew.witnesses(ended)
    text, rank = report.explain(witnesses, verdict)
    failure = ended.get(rank) if rank is not None else None
    exception = None
    if isinstance(failure, Failure) and failure.exception:
        try:
            exception = travel.loads(failure.exception)
        except Exception:  # of a type that only the rank could make
            exception = None
    return RankError(text, rank, exception, report.table(witnesses))


# -- what a run cannot begin with ----------------------------------------------------------------------------------


def _check_size(n: int, most: int) -> None:
    if not isinstance(n, int) or isinstance(n, bool):
        raise TypeError(f"World({n!r}): the number of ranks is a whole number")
    if n < 1:
        raise ValueError(f"World({n}): a world has at least 1 rank")
    if n > most:
        raise ValueError(
            f"World({n}): {n} ranks on {cores()} cores and {_memory():.0f} GiB would mostly wait for each other; "
            f"World({n}, most={n}) starts them all the same"
        )
    if in_world():
        raise RuntimeError(f"World({n}) inside rank {here().rank} of a World: ranks cannot start ranks of their own")


def _memory() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _check_call(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not callable(fn):
        raise TypeError(f"run({fn!r}): the first argument is the function, not its answer: run(function, arguments)")
    try:
        signature = inspect.signature(fn)
    except ValueError:  # some builtins have none
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as e:
        name = getattr(fn, "__name__", repr(fn))
        raise TypeError(f"{name}{signature} cannot be run with these arguments: {e}") from None


def _pack(seed: int, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> memoryview:
    try:
        return travel.dumps((seed, fn, args, kwargs))
    except Exception:
        named = {f"the function {getattr(fn, '__name__', fn)}": fn}
        named |= {f"argument {i}": arg for i, arg in enumerate(args)}
        named |= {f"argument {name!r}": arg for name, arg in kwargs.items()}
        for name, value in named.items():
            try:
                travel.dumps(value)
            except Exception as e:
                kind = type(value).__qualname__
                raise TypeError(f"{name}, of type {kind}, cannot travel to the ranks: {e}") from None
        raise
