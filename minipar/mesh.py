"""Where each rank sits: a grid with one axis per kind of parallelism. Pure arithmetic, no processes."""

from dataclasses import dataclass, fields
from functools import cached_property
from math import prod


def bounds(size: int, parts: int) -> list[int]:
    """Where to cut `size` things into `parts` shares that differ by one at most: share i is [b[i], b[i+1])."""
    return [size * i // parts for i in range(parts + 1)]


@dataclass(frozen=True)
class Mesh:
    """A grid of ranks, numbered row by row: the last axis varies fastest.

    The order is the order of the fields. `tp` is innermost, because tensor peers talk the most and
    neighboring ranks share a node. `dp` is outermost, because data peers talk once a step.

    dp: data, pp: pipeline, ep: expert, cp: context, tp: tensor. For all layers but experts, ep is a data axis too.
    """

    dp: int = 1
    pp: int = 1
    ep: int = 1
    cp: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        for axis, size in self.shape.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"Mesh({axis}={size!r}): an axis has a whole number of ranks, at least 1")

    @cached_property
    def shape(self) -> dict[str, int]:
        """Axis name -> number of ranks along it, outermost first."""
        return {axis.name: getattr(self, axis.name) for axis in fields(self)}

    @property
    def size(self) -> int:
        """The number of ranks."""
        return prod(self.shape.values())

    def coordinate(self, rank: int) -> dict[str, int]:
        """Mesh(dp=2, pp=2, tp=2).coordinate(5) == {"dp": 1, "pp": 0, "ep": 0, "cp": 0, "tp": 1}"""
        if not 0 <= rank < self.size:
            raise ValueError(f"rank {rank} is not on {self}, which has ranks 0 to {self.size - 1}")
        place = {}
        for axis, size in reversed(self.shape.items()):
            rank, place[axis] = divmod(rank, size)
        return {axis: place[axis] for axis in self.shape}

    def line(self, axis: str, rank: int) -> tuple[int, ...]:
        """The ranks that differ from `rank` only along `axis`, in order of their index."""
        step = self.step(axis)
        first = rank - step * self.coordinate(rank)[axis]
        return tuple(range(first, first + step * self.shape[axis], step))

    def step(self, axis: str) -> int:
        """By how much the ranks of neighbors along `axis` differ."""
        if axis not in self.shape:
            raise ValueError(f"{axis!r} is not an axis; the axes are {', '.join(self.shape)}")
        names = list(self.shape)
        return prod(self.shape[inner] for inner in names[names.index(axis) + 1 :])

    def plane(self, axes: tuple[str, ...], rank: int) -> tuple[int, ...]:
        """The ranks that differ from `rank` only along some of `axes`, in order."""
        fixed = {axis: i for axis, i in self.coordinate(rank).items() if axis not in axes}
        return tuple(r for r in range(self.size) if fixed.items() <= self.coordinate(r).items())

    def lines(self, axis: str) -> list[tuple[int, ...]]:
        """Every line of ranks along `axis`: together they cover the mesh once."""
        return sorted({self.line(axis, rank) for rank in range(self.size)})

    def __str__(self) -> str:
        return "Mesh(" + ", ".join(f"{axis}={size}" for axis, size in self.shape.items() if size > 1) + ")"
