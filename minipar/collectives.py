"""Talking along one axis of the mesh: collectives, and their adjoints.

Every collective returns a new tensor and leaves its input alone, so it is safe inside autograd. Indices count along
the axis.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from .mesh import Mesh, bounds
from .rank import leaving
from .transport import Alone, Pending, Staged, Torch, Transport
from .world import here

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
        raise ValueError(
            f"{mesh} is for {mesh.size} ranks, but {me.size} are running: start World({mesh.size}), "
            f"or choose axes whose product is {me.size}"
        )
    axes = {}
    for name in mesh.shape:
        ranks = mesh.line(name, me.rank)
        axes[name] = Axis(name, ranks, ranks.index(me.rank), _transport(name, ranks))
    return axes


def join(mesh: Mesh, *names: str) -> Axis:
    """Several axes of the mesh as one: parameters are the same along all of them."""
    me = here()
    ranks = mesh.plane(names, me.rank)
    name = "·".join([n for n in names if mesh.shape[n] > 1] or names[:1])
    return Axis(name, ranks, ranks.index(me.rank), _transport(name, ranks))


@cache
def device_mesh(mesh: Mesh) -> DeviceMesh:
    """The same mesh as torch knows it, with the axes by their names, for FSDP2, DTensor and their like. Every rank of
    the mesh calls it."""
    return init_device_mesh(here().device.type, tuple(mesh.shape.values()), mesh_dim_names=tuple(mesh.shape))


def disconnect() -> None:
    """Let go of all groups, so that torch can end them, also where a model is still there that used them."""
    for known in (connect, device_mesh, _group):
        known.cache_clear()
    for transport in list(Torch.living):
        transport.group = transport.upward = None


leaving.append(disconnect)


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
    upward = "nccl" in (me.backend or "")
    return kind(axis, ranks, ranks.index(me.rank), _group(ranks, False), _group(ranks, upward))


@cache
def _group(ranks: tuple[int, ...], second: bool) -> dist.ProcessGroup | None:
    """One group for each line of ranks, whatever mesh it is a line of. Only its members need to call."""
    if len(ranks) == here().size and not second:
        return dist.group.WORLD
    # torch names such a group by its ranks and by how many groups this rank has. Members may have unlike numbers of
    # other groups, and would wait for each other under two names.
    name = f"minipar {ranks} {second}"
    with patch.object(distributed_c10d, "_hash_ranks_to_str", lambda _: name, create=True):
        return dist.new_group(ranks, use_local_synchronization=True)


# -- collectives ---------------------------------------------------------------------------------------------


def identity(x: Tensor, axis: Axis) -> Tensor:
    return x.view_as(x)


def nothing() -> None: ...


def all_reduce(x: Tensor, axis: Axis, op: str = "sum", meanwhile: Callable[[], None] = nothing) -> Tensor:
    """The sum ("max", "min") of every rank's x, on every rank. Sends 2 (n-1)/n of x.

    meanwhile: work to do while it travels.
    """
    pending = start_all_reduce(x.clone(memory_format=torch.contiguous_format), axis, op)
    meanwhile()
    return pending.wait()


def start_all_reduce(x: Tensor, axis: Axis, op: str = "sum") -> Pending:
    """The same in place, and without waiting: x must not be touched before `.wait()`."""
    return axis.transport.all_reduce(x, op)


def start_all_gather(x: Tensor, axis: Axis, out: Tensor) -> Pending:
    """Every rank's x, 1-d, side by side in `out`, without waiting. x may be its own part of `out`."""
    return axis.transport.all_gather(x, out)


def start_reduce_scatter(x: Tensor, axis: Axis) -> Pending:
    """This rank's share of the sum of every rank's x, 1-d and divisible, without waiting."""
    share = [len(x) // axis.size] * axis.size
    parts = axis.transport.all_to_all(x, share, share, "reduce_scatter")
    return Pending(_Sum(parts, total := x.new_empty(share[0])), total)


@dataclass
class _Sum:
    parts: Pending
    total: Tensor

    def wait(self) -> None:
        torch.sum(self.parts.wait().view(-1, len(self.total)), 0, out=self.total)


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


def reduce_scatter(x: Tensor, axis: Axis, dim: int = 0, meanwhile: Callable[[], None] = nothing) -> Tensor:
    """This rank's share, along `dim`, of the sum of every rank's x. Sends (n-1)/n of x.

    Written as an all-to-all and a local sum: gloo's own reduce_scatter sends a whole all-reduce.
    """
    parts = _exchange(x, axis, dim, "reduce_scatter", meanwhile)
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def all_to_all(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """Share i of x goes to index i; what comes is put side by side along `dim`. Sends (n-1)/n of x."""
    return torch.cat(_exchange(x, axis, dim, "all_to_all"), dim)


def _exchange(x: Tensor, axis: Axis, dim: int, op: str, meanwhile: Callable[[], None] = nothing) -> list[Tensor]:
    """Share i of x along `dim` to index i; the shares that came, in the order of their index."""
    shares = x.tensor_split(bounds(x.size(dim), axis.size)[1:-1], dim)
    mine = shares[axis.index]
    flat = torch.cat([s.reshape(-1) for s in shares])
    pending = axis.transport.all_to_all(flat, [s.numel() for s in shares], [mine.numel()] * axis.size, op)
    meanwhile()
    return list(pending.wait().view(axis.size, *mine.shape))


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


Map = Callable[[Tensor, Axis], Tensor]


class Collective(torch.autograd.Function):
    """A collective whose gradient travels by another one, its adjoint."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, forward: Map, adjoint: Map) -> Tensor:
        ctx.axis, ctx.adjoint = axis, adjoint
        return forward(x, axis)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return ctx.adjoint(gradients[0], ctx.axis), None, None, None


def enter(x: Tensor, axis: Axis, meanwhile: Callable[[], None] = nothing) -> Tensor:
    """Into a cut region (Megatron's f): every rank reads the same x, so their gradients add.

    meanwhile: work for backward to do while they travel.
    """
    return Collective.apply(x, axis, identity, partial(all_reduce, meanwhile=meanwhile))


def leave(x: Tensor, axis: Axis) -> Tensor:
    """Out of it (Megatron's g): every rank holds a partial sum, and goes on with the whole."""
    return Collective.apply(x, axis, all_reduce, identity)


def gather(x: Tensor, axis: Axis, dim: int = -1, size: int | None = None) -> Tensor:
    """Shares put together; every rank goes on with the same whole, so its gradient is whole already."""
    return Collective.apply(x, axis, partial(all_gather, dim=dim, size=size), partial(shard, dim=dim))


def split(x: Tensor, axis: Axis, dim: int = -1) -> Tensor:
    """Every rank goes on with its share of the same x."""
    return Collective.apply(x, axis, partial(shard, dim=dim), partial(all_gather, dim=dim, size=x.size(dim)))


SEQUENCE = 1  # the dim of activations (batch, sequence, width) that sequence parallelism cuts between the layers


def enter_sequence(x: Tensor, axis: Axis, meanwhile: Callable[[], None] = nothing) -> Tensor:
    """`enter` for an x that is cut along the sequence: a gather, whose adjoint sums and cuts again."""
    adjoint = partial(reduce_scatter, dim=SEQUENCE, meanwhile=meanwhile)
    return Collective.apply(x, axis, partial(all_gather, dim=SEQUENCE), adjoint)


def leave_sequence(x: Tensor, axis: Axis) -> Tensor:
    """`leave` for what goes on cut along the sequence."""
    return Collective.apply(x, axis, partial(reduce_scatter, dim=SEQUENCE), partial(all_gather, dim=SEQUENCE))
