"""What carries the bytes of an axis, and the ledger of what was sent.

A transport is any object with the six methods of `Transport`: torch.distributed, nothing at all (an axis of one
rank), torch.distributed by way of host memory (gloo with GPU tensors), or one of your own.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor

# -- the ledger ----------------------------------------------------------------------------------------------


@dataclass
class Entry:
    """One call: who sent how much, when, from which line. `end` is when this rank stopped waiting for it."""

    op: str
    axis: str
    bytes: int
    start: float
    source: str
    end: float = float("nan")


@dataclass
class Ledger:
    """What this rank sent. Bytes are counted by the algorithm that sends them, receives are not booked."""

    entries: list[Entry] = field(default_factory=list)

    def select(self, axis: str | None = None, op: str | None = None) -> list[Entry]:
        return [e for e in self.entries if axis in (None, e.axis) and op in (None, e.op)]

    def bytes(self, axis: str | None = None, op: str | None = None) -> int:
        """Bytes that this rank sent along one axis, or along all."""
        return sum(e.bytes for e in self.select(axis, op))

    def calls(self, axis: str | None = None, op: str | None = None) -> int:
        """Collectives and sends that this rank called."""
        return len(self.select(axis, op))

    def __str__(self) -> str:
        rows: dict[tuple[str, str], list[int]] = {}
        for e in self.entries:
            row = rows.setdefault((e.axis, e.op), [0, 0])
            row[0], row[1] = row[0] + 1, row[1] + e.bytes
        lines = [f"{axis:<5} {op:<14} {calls:>6} {sent:>14,}" for (axis, op), (calls, sent) in sorted(rows.items())]
        return "\n".join([f"{'axis':<5} {'op':<14} {'calls':>6} {'bytes sent':>14}", *lines])


_reading: list[Ledger] = []  # the ledgers that are open now; usually none


@contextmanager
def ledger() -> Iterator[Ledger]:
    """Everything that this rank sends inside the `with` is entered in the ledger that it gives.

    >>> with ledger() as l:
    ...     model.step(tokens, targets)
    >>> l.bytes("dp"), l.calls("tp")
    """
    book = Ledger()
    _reading.append(book)
    try:
        yield book
    finally:
        _reading.remove(book)


@contextmanager
def unbooked() -> Iterator[None]:
    """What this rank sends inside of the `with` is entered in no ledger."""
    books, _reading[:] = [*_reading], []
    try:
        yield
    finally:
        _reading[:] = books


def _enter(op: str, axis: str, sent: float) -> Entry:
    entry = Entry(op, axis, round(sent), time.perf_counter(), _source() if _reading else "")
    for book in _reading:
        book.entries.append(entry)
    return entry


def _source() -> str:
    """file:line of the nearest caller that is neither minipar's nor torch's."""
    inside = (str(Path(__file__).parent), str(Path(torch.__file__).parent))
    frame = sys._getframe(1)
    while frame.f_back and frame.f_code.co_filename.startswith(inside):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


# -- transports ----------------------------------------------------------------------------------------------


class Work(Protocol):
    def wait(self) -> object: ...


@dataclass
class Pending:
    """A transfer under way. `wait()` returns its tensor once it is there."""

    work: Work
    tensor: Tensor
    entry: Entry | None = None

    def wait(self) -> Tensor:
        self.work.wait()
        if self.entry:
            self.entry.end = time.perf_counter()
        return self.tensor


class Transport(Protocol):
    """What an axis needs of whatever carries its bytes. All of them start at once and are waited for later."""

    def all_reduce(self, x: Tensor, op: str) -> Pending: ...  # in place
    def all_gather(self, x: Tensor, out: Tensor | None = None) -> Pending: ...  # -> (size, *x.shape), or into `out`
    def all_to_all(self, x: Tensor, sizes: list[int], got: list[int], op: str) -> Pending: ...  # 1-d, cut by sizes
    def broadcast(self, x: Tensor, root: int) -> Pending: ...  # in place
    def send(self, x: Tensor, to: int, tag: int) -> Pending: ...
    def recv(self, x: Tensor, source: int, tag: int) -> Pending: ...  # in place


class Done:
    def wait(self) -> None: ...


class Alone:
    """The transport of an axis with one rank: every collective is there already, and nothing is sent."""

    def all_reduce(self, x: Tensor, op: str) -> Pending:
        return Pending(Done(), x)

    def all_gather(self, x: Tensor, out: Tensor | None = None) -> Pending:
        return Pending(Done(), x[None].clone() if out is None else out.copy_(x))

    def all_to_all(self, x: Tensor, sizes: list[int], got: list[int], op: str) -> Pending:
        return Pending(Done(), x)

    def broadcast(self, x: Tensor, root: int) -> Pending:
        return Pending(Done(), x)

    def send(self, x: Tensor, to: int, tag: int) -> Pending:
        raise ValueError("an axis with one rank has nobody to send to")

    def recv(self, x: Tensor, source: int, tag: int) -> Pending:
        raise ValueError("an axis with one rank has nobody to receive from")


Group = dist.ProcessGroup | None


class Torch:
    """torch.distributed under an axis. Books what gloo's and nccl's algorithms send, for M bytes and n ranks."""

    OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
    living: WeakSet["Torch"] = WeakSet()  # those that somebody has

    def __init__(self, axis: str, ranks: tuple[int, ...], index: int, group: Group, upward: Group):
        """upward: the group of messages to a lower index. Under nccl it is another one than `group`, because nccl
        carries out the messages of a pair of ranks one by one in the order in which they were started."""
        self.axis, self.ranks, self.index, self.group, self.upward = axis, ranks, index, group, upward
        self.living.add(self)

    def all_reduce(self, x: Tensor, op: str) -> Pending:
        entry = _enter("all_reduce", self.axis, 2 * x.nbytes * self._others)  # a ring: 2 (n-1)/n M
        return Pending(dist.all_reduce(x, self.OPS[op], self.group, async_op=True), x, entry)

    def all_gather(self, x: Tensor, out: Tensor | None = None) -> Pending:
        whole = x.new_empty((len(self.ranks), *x.shape)) if out is None else out
        entry = _enter("all_gather", self.axis, whole.nbytes * self._others)  # (n-1)/n of the whole
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before 2.13
        return Pending(gather(whole.view(-1), x.view(-1), self.group, async_op=True), whole, entry)

    def all_to_all(self, x: Tensor, sizes: list[int], got: list[int], op: str) -> Pending:
        out = x.new_empty(sum(got))
        kept = sizes[self.index] * x.element_size()
        entry = _enter(op, self.axis, x.nbytes - kept)
        return Pending(dist.all_to_all_single(out, x, got, sizes, self.group, async_op=True), out, entry)

    def broadcast(self, x: Tensor, root: int) -> Pending:
        n, place = len(self.ranks), (self.index - root) % len(self.ranks)
        lowest = place & -place or 1 << n.bit_length()  # a binomial tree: one child for each lower power of two
        children = sum(place + 2**k < n for k in range(n.bit_length()) if 2**k < lowest)
        entry = _enter("broadcast", self.axis, x.nbytes * children)
        return Pending(dist.broadcast(x, self.ranks[root], self.group, async_op=True), x, entry)

    def send(self, x: Tensor, to: int, tag: int) -> Pending:
        entry = _enter("send", self.axis, x.nbytes)
        group = self.group if to > self.index else self.upward
        return Pending(_there(dist.isend(x, self.ranks[to], group, tag)), x, entry)

    def recv(self, x: Tensor, source: int, tag: int) -> Pending:
        group = self.group if source < self.index else self.upward
        return Pending(_there(dist.irecv(x, self.ranks[source], group, tag)), x)

    @property
    def _others(self) -> float:
        return (len(self.ranks) - 1) / len(self.ranks)


def _there(work: Work | None) -> Work:
    if work is None:
        raise RuntimeError("this rank is not in the group that it wants to talk to")
    return work


class Staged(Torch):
    """gloo with GPU tensors: by way of host memory, since gloo has no GPU sends."""

    def all_reduce(self, x: Tensor, op: str) -> Pending:
        return _landing(super().all_reduce(x.cpu(), op), x)

    def all_gather(self, x: Tensor, out: Tensor | None = None) -> Pending:
        pending = super().all_gather(x.cpu())
        return _landing(pending, x.new_empty(pending.tensor.shape) if out is None else out)

    def all_to_all(self, x: Tensor, sizes: list[int], got: list[int], op: str) -> Pending:
        return _landing(super().all_to_all(x.cpu(), sizes, got, op), x.new_empty(sum(got)))

    def broadcast(self, x: Tensor, root: int) -> Pending:
        return _landing(super().broadcast(x.cpu(), root), x)

    def send(self, x: Tensor, to: int, tag: int) -> Pending:
        return super().send(x.cpu(), to, tag)

    def recv(self, x: Tensor, source: int, tag: int) -> Pending:
        return _landing(super().recv(torch.empty_like(x, device="cpu"), source, tag), x)


@dataclass
class _Landing:
    host: Pending
    target: Tensor

    def wait(self) -> None:
        self.target.view(-1).copy_(self.host.wait().view(-1))


def _landing(host: Pending, target: Tensor) -> Pending:
    return Pending(_Landing(host, target), target)
