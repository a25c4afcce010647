"""Talking along one axis of the mesh: collectives, their adjoints, and a ledger of what was sent.

Every collective returns a new tensor and leaves its input alone, so it is safe inside autograd. Indices count along
the axis. What carries the bytes is the axis's *transport*: torch.distributed, nothing at all (an axis of one rank),
or torch.distributed by way of host memory (gloo with GPU tensors). Any object with its six methods will do.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from .mesh import Mesh
from .world import here

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
    def all_gather(self, x: Tensor) -> Pending: ...  # -> (size, *x.shape)
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

    def all_gather(self, x: Tensor) -> Pending:
        return Pending(Done(), x[None])

    def all_to_all(self, x: Tensor, sizes: list[int], got: list[int], op: str) -> Pending:
        return Pending(Done(), x)

    def broadcast(self, x: Tensor, root: int) -> Pending:
        return Pending(Done(), x)

    def send(self, x: Tensor, to: int, tag: int) -> Pending:
        raise ValueError("an axis with one rank has nobody to send to")

    def recv(self, x: Tensor, source: int, tag: int) -> Pending:
        raise ValueError("an axis with one rank has nobody to receive from")


class Torch:
    """torch.distributed under an axis. Books what gloo's and nccl's algorithms send, for M bytes and n ranks."""

    OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}

    def __init__(self, axis: str, ranks: tuple[int, ...], index: int, group: dist.ProcessGroup):
        self.axis, self.ranks, self.index, self.group = axis, ranks, index, group

    def all_reduce(self, x: Tensor, op: str) -> Pending:
        entry = _enter("all_reduce", self.axis, 2 * x.nbytes * self._others)  # a ring: 2 (n-1)/n M
        return Pending(dist.all_reduce(x, self.OPS[op], self.group, async_op=True), x, entry)

    def all_gather(self, x: Tensor) -> Pending:
        whole = x.new_empty((len(self.ranks), *x.shape))
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
        return Pending(_there(dist.isend(x, self.ranks[to], self.group, tag)), x, entry)

    def recv(self, x: Tensor, source: int, tag: int) -> Pending:
        return Pending(_there(dist.irecv(x, self.ranks[source], self.group, tag)), x)

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

    def all_gather(self, x: Tensor) -> Pending:
        pending = super().all_gather(x.cpu())
        return _landing(pending, x.new_empty(pending.tensor.shape))

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
        self.target.copy_(self.host.wait())


def _landing(host: Pending, target: Tensor) -> Pending:
    return Pending(_Landing(host, target), target)


# -- axes ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """One line of the mesh, seen from one of its ranks: `ranks` are global, `index` is this rank's place."""

    name: str
    ranks: tuple[int, ...]
    index: int
    transport: Transport

    @property
    def size(self) -> int:
        return len(self.ranks)


@cache
def connect(mesh: Mesh) -> dict[str, Axis]:
    """This rank's axes by name. Every rank of the mesh calls it. ValueError if the mesh has another size."""
    me = here()
    if mesh.size != me.size:
        what = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
        raise ValueError(f"{what} is {mesh.size} ranks, but {me.size} are running: change an axis or the World's size")
    axes = {}
    for name in mesh.shape:
        ranks = mesh.line(name, me.rank)
        axes[name] = Axis(name, ranks, ranks.index(me.rank), _transport(name, ranks))
    return axes


def everyone() -> Axis:
    """All ranks, as one axis."""
    me = here()
    ranks = tuple(range(me.size))
    return Axis("all", ranks, me.rank, _transport("all", ranks))


def _transport(axis: str, ranks: tuple[int, ...]) -> Transport:
    me = here()
    if len(ranks) == 1:
        return Alone()
    kind = Staged if me.device.type != "cpu" and me.backend == "gloo" else Torch
    return kind(axis, ranks, ranks.index(me.rank), _group(ranks))


@cache
def _group(ranks: tuple[int, ...]) -> dist.ProcessGroup:
    """One group for each line of ranks, whatever mesh it is a line of. Only its members need to call."""
    if len(ranks) == here().size:
        return dist.group.WORLD
    return dist.new_group(ranks, use_local_synchronization=True)


def bounds(size: int, parts: int) -> list[int]:
    """Where to cut `size` things into `parts` shares that differ by one at most: share i is [b[i], b[i+1])."""
    return [size * i // parts for i in range(parts + 1)]


# -- collectives ---------------------------------------------------------------------------------------------


def identity(x: Tensor, axis: Axis) -> Tensor:
    return x.view_as(x)


def all_reduce(x: Tensor, axis: Axis, op: str = "sum") -> Tensor:
    """The sum ("max", "min") of every rank's x, on every rank. Sends 2 (n-1)/n of x."""
    return start_all_reduce(x.clone(memory_format=torch.contiguous_format), axis, op).wait()


def start_all_reduce(x: Tensor, axis: Axis, op: str = "sum") -> Pending:
    """The same in place, and without waiting: x must not be touched before `.wait()`."""
    return axis.transport.all_reduce(x, op)


def all_gather(x: Tensor, axis: Axis, dim: int = 0, size: int | None = None) -> Tensor:
    """Every rank's x side by side along `dim`. Sends (n-1)/n of the result.

    size: of the result along `dim`, where shares are uneven (as `shard` cuts them).
    """
    share = x.size(dim)
    size = share * axis.size if size is None else size
    widest = -(-size // axis.size)
    x = x.movedim(dim, 0)
    if share < widest:
        x = torch.cat([x, x.new_zeros((widest - share, *x.shape[1:]))])
    whole = axis.transport.all_gather(x.contiguous()).wait()  # (n, widest, ...)
    if size == widest * axis.size:
        return whole.flatten(0, 1).movedim(0, dim)
    cut = bounds(size, axis.size)
    return torch.cat([part[: b - a] for part, a, b in zip(whole, cut, cut[1:], strict=False)]).movedim(0, dim)


def shard(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """This rank's share of x along `dim`. Sends nothing."""
    cut = bounds(x.size(dim), axis.size)
    return x.narrow(dim, cut[axis.index], cut[axis.index + 1] - cut[axis.index]).contiguous()


def reduce_scatter(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """This rank's share, along `dim`, of the sum of every rank's x. Sends (n-1)/n of x.

    Written as an all-to-all and a local sum: gloo's own reduce_scatter sends a whole all-reduce.
    """
    parts = _exchange(x, axis, dim, "reduce_scatter")
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def all_to_all(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """Share i of x goes to index i; what comes is put side by side along `dim`. Sends (n-1)/n of x."""
    return torch.cat(_exchange(x, axis, dim, "all_to_all"), dim)


def _exchange(x: Tensor, axis: Axis, dim: int, op: str) -> list[Tensor]:
    """Share i of x along `dim` to index i; the shares that came, in the order of their index."""
    shares = x.tensor_split(bounds(x.size(dim), axis.size)[1:-1], dim)
    mine = shares[axis.index]
    flat = torch.cat([s.reshape(-1) for s in shares])
    got = axis.transport.all_to_all(flat, [s.numel() for s in shares], [mine.numel()] * axis.size, op).wait()
    return list(got.view(axis.size, *mine.shape))


def broadcast(x: Tensor, axis: Axis, root: int = 0) -> Tensor:
    """The x of index `root`, on every rank; all give one of its shape and dtype. A tree of log2(n) rounds."""
    return axis.transport.broadcast(x.clone(memory_format=torch.contiguous_format), root).wait()


def isend(x: Tensor, axis: Axis, to: int, tag: int = 0) -> Pending:
    """Start sending x to index `to`. Never blocks."""
    return axis.transport.send(x.detach().contiguous(), to, tag)


def irecv(like: Tensor, axis: Axis, source: int, tag: int = 0) -> Pending:
    """Start receiving a tensor of the shape and dtype of `like` from index `source`; `.wait()` gives it."""
    return axis.transport.recv(torch.empty_like(like, memory_format=torch.contiguous_format), source, tag)


def send(x: Tensor, axis: Axis, to: int, tag: int = 0) -> None:
    """Send x to index `to`, and wait until the other side has it: two ranks that both send first wait forever."""
    isend(x, axis, to, tag).wait()


def recv(like: Tensor, axis: Axis, source: int, tag: int = 0) -> Tensor:
    """Wait for a tensor of the shape and dtype of `like` from index `source`."""
    return irecv(like, axis, source, tag).wait()


# -- the same, differentiable: each is the adjoint of another ------------------------------------------------


class _Collective(torch.autograd.Function):
    """A collective whose gradient travels by another one, its adjoint."""

    @staticmethod
    def forward(ctx, x, axis, forward, adjoint):
        ctx.axis, ctx.adjoint = axis, adjoint
        return forward(x, axis)

    @staticmethod
    def backward(ctx, *gradients):
        return ctx.adjoint(gradients[0], ctx.axis), None, None, None


def enter(x: Tensor, axis: Axis) -> Tensor:
    """Into a cut region (Megatron's f): every rank reads the same x, so their gradients add."""
    return _Collective.apply(x, axis, identity, all_reduce)


def leave(x: Tensor, axis: Axis) -> Tensor:
    """Out of it (Megatron's g): every rank holds a partial sum, and goes on with the whole."""
    return _Collective.apply(x, axis, all_reduce, identity)


def gather(x: Tensor, axis: Axis, dim: int = -1, size: int | None = None) -> Tensor:
    """Shares put together; every rank goes on with the same whole, so its gradient is whole already."""
    return _Collective.apply(x, axis, partial(all_gather, dim=dim, size=size), partial(shard, dim=dim))


def split(x: Tensor, axis: Axis, dim: int = -1) -> Tensor:
    """Every rank goes on with its share of the same x."""
    return _Collective.apply(x, axis, partial(shard, dim=dim), partial(all_gather, dim=dim, size=x.size(dim)))


SEQUENCE = 1  # the dim of activations (batch, sequence, width) that sequence parallelism cuts between the layers


def enter_sequence(x: Tensor, axis: Axis) -> Tensor:
    """`enter` for an x that is cut along the sequence: a gather, whose adjoint sums and cuts again."""
    return _Collective.apply(x, axis, partial(all_gather, dim=SEQUENCE), partial(reduce_scatter, dim=SEQUENCE))


def leave_sequence(x: Tensor, axis: Axis) -> Tensor:
    """`leave` for what goes on cut along the sequence."""
    return _Collective.apply(x, axis, partial(reduce_scatter, dim=SEQUENCE), partial(all_gather, dim=SEQUENCE))
