"""The collectives written out from send and receive, for the lessons. The engine uses the library's own.

Each takes and gives what its namesake in `collectives` does, and sends as many bytes. In a ring every rank talks to
its two neighbors only: what it sends to the right in one step is what came from the left in the step before.
"""

import torch
from torch import Tensor

from .collectives import Axis, bounds, irecv, isend


def _shift(x: Tensor, like: Tensor, axis: Axis) -> Tensor:
    """Send x to the right, receive a tensor shaped as `like` from the left. The send must not block: all do it."""
    incoming = irecv(like, axis, (axis.index - 1) % axis.size)
    outgoing = isend(x, axis, (axis.index + 1) % axis.size)
    arrived = incoming.wait()
    outgoing.wait()
    return arrived


def _chunks(x: Tensor, axis: Axis) -> list[Tensor]:
    return list(x.tensor_split(bounds(x.size(0), axis.size)[1:-1]))


def ring_reduce_scatter(x: Tensor, axis: Axis) -> Tensor:
    """This rank's chunk (of dim 0) of the sum. n-1 steps; a chunk travels once around and collects a term a rank."""
    chunks = _chunks(x, axis)
    for step in range(axis.size - 1):
        leaving = (axis.index - 1 - step) % axis.size
        coming = (leaving - 1) % axis.size
        chunks[coming] = chunks[coming] + _shift(chunks[leaving], chunks[coming], axis)
    return chunks[axis.index].clone()


def ring_all_gather(x: Tensor, axis: Axis) -> Tensor:
    """Every rank's x (same shape everywhere) side by side along dim 0. n-1 steps: pass on what came last."""
    parts = {axis.index: x}
    for step in range(axis.size - 1):
        leaving = (axis.index - step) % axis.size
        parts[(leaving - 1) % axis.size] = _shift(parts[leaving], x, axis)
    return torch.cat([parts[i] for i in range(axis.size)])


def ring_all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """The sum of every rank's x: a reduce-scatter, then an all-gather of its chunks. Sends 2 (n-1)/n of x."""
    flat = x.reshape(-1)
    padded = torch.cat([flat, flat.new_zeros(-flat.numel() % axis.size)])  # chunks of one size
    return ring_all_gather(ring_reduce_scatter(padded, axis), axis)[: flat.numel()].view_as(x)


def tree_broadcast(x: Tensor, axis: Axis, root: int = 0) -> Tensor:
    """The root's x on every rank. Those who have it double in each of log2(n) rounds."""
    place, have, x = (axis.index - root) % axis.size, 1, x.clone()  # counted from the root
    while have < axis.size:
        if place < have and place + have < axis.size:
            isend(x, axis, (axis.index + have) % axis.size).wait()
        elif have <= place < 2 * have:
            x = irecv(x, axis, (axis.index - have) % axis.size).wait()
        have *= 2
    return x


def pairwise_all_to_all(x: Tensor, axis: Axis) -> Tensor:
    """Chunk i of x goes to index i. In step k everyone sends to the rank k to the right, so no link is crowded."""
    chunks = _chunks(x, axis)
    mine = chunks[axis.index]
    came = {axis.index: mine}
    for step in range(1, axis.size):
        right, left = (axis.index + step) % axis.size, (axis.index - step) % axis.size
        incoming, outgoing = irecv(mine, axis, left), isend(chunks[right], axis, right)
        came[left] = incoming.wait()
        outgoing.wait()
    return torch.cat([came[i] for i in range(axis.size)])
