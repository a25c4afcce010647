"""Parameters that are cut: each rank of an axis keeps a share, and the parameter remembers which.

A parameter may be cut along several axes, each along a dim of its own: the weights of experts, say, once by experts
and once by their hidden width.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from .collectives import Axis, bounds


@dataclass(frozen=True)
class Cut:
    """How a parameter of `size` along `dim` was shared: shares[i] are the places that index i of `axis` keeps."""

    axis: Axis
    dim: int
    size: int
    shares: tuple[Tensor, ...]

    def take(self, whole: Tensor) -> Tensor:
        """This rank's share of a whole tensor."""
        return whole.index_select(self.dim, self.shares[self.axis.index].to(whole.device))

    def pad(self, share: Tensor) -> Tensor:
        """A share as long as the longest: (widest, ...), with the dim that was cut in front."""
        share = share.movedim(self.dim, 0)
        missing = max(map(len, self.shares)) - len(share)
        return torch.cat([share, share.new_zeros((missing, *share.shape[1:]))])

    def join(self, shares: Tensor) -> Tensor:
        """Every rank's share, padded, (n, widest, ...) -> the whole tensor."""
        whole = shares.new_empty((self.size, *shares.shape[2:]))
        for share, places in zip(shares, self.shares, strict=True):
            whole[places.to(whole.device)] = share[: len(places)]
        return whole.movedim(0, self.dim)


def cuts(parameter: Any) -> tuple[Cut, ...]:
    """The cuts of a parameter, in the order in which they were made; none if it is whole."""
    return getattr(parameter, "cuts", ())


def is_cut(parameter: nn.Parameter, axis: Axis) -> bool:
    """Does each rank of the axis have another share of this parameter?"""
    return any(cut.axis.name == axis.name for cut in cuts(parameter))


def cut(module: nn.Module, name: str, dim: int, axis: Axis, sections: Sequence[int] = ()) -> None:
    """Keep this rank's share of a parameter along `dim`, in place, so that ties survive.

    sections: sizes of what lies side by side along `dim`, each of them cut by itself; by default it is all one.
    """
    parameter: Any = getattr(module, name, None)
    if parameter is None or is_cut(parameter, axis):  # no bias; or tied, and cut already
        return
    dim %= parameter.dim()
    size = parameter.size(dim)
    parts = [
        section.tensor_split(bounds(len(section), axis.size)[1:-1])
        for section in torch.arange(size).split(list(sections) or size)
    ]
    shares = tuple(torch.cat(of_one_rank) for of_one_rank in zip(*parts, strict=True))
    mine = Cut(axis, dim, size, shares)
    parameter.cuts = (*cuts(parameter), mine)
    parameter.data = mine.take(parameter.data)


def take(parameter: nn.Parameter, whole: Tensor) -> Tensor:
    """This rank's share of a tensor of the whole parameter's shape."""
    for cut in cuts(parameter):
        whole = cut.take(whole)
    return whole


def put_together(parameters: Iterable[nn.Parameter], shares: Iterable[Tensor]) -> list[Tensor]:
    """The wholes of shares, which are the parameters' own data or their gradients, all of one dtype. One all-gather for
    each axis along which they are cut last, then those along which they were cut before."""
    shares, left = list(shares), [list(cuts(p)) for p in parameters]
    while any(left):
        axis = next(some[-1].axis for some in left if some)
        chosen = [i for i, some in enumerate(left) if some and some[-1].axis.name == axis.name]
        last = [left[i].pop() for i in chosen]
        padded = [cut.pad(shares[i]) for i, cut in zip(chosen, last, strict=True)]
        parts = axis.transport.all_gather(torch.cat([x.flatten() for x in padded])).wait()  # (n, elements)
        columns = parts.split([x.numel() for x in padded], 1)
        for i, cut, x, column in zip(chosen, last, padded, columns, strict=True):
            shares[i] = cut.join(column.reshape(axis.size, *x.shape))
    return shares


def widest(parameters: Iterable[nn.Parameter], axis: Axis) -> int:
    """Elements that the rank of `axis` with the largest shares has of all these parameters together."""

    def elements(parameter: nn.Parameter, index: int) -> int:
        shape = list(parameter.shape)
        for cut in cuts(parameter):
            if cut.axis.name == axis.name:
                shape[cut.dim] = len(cut.shares[index])
        return prod(shape)

    parameters = list(parameters)
    return max(sum(elements(p, i) for p in parameters) for i in range(axis.size))
