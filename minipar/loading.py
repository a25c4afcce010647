"""Loading: each data rank reads only its own rows, in an order that seed and epoch say, and goes on where it was.

An epoch is one order of all rows. Batch by batch it is cut as `step` cuts a global batch, so that any layout trains on
the same global batches. The position is counted in rows of the global order that have been handed out: it does not
matter how many were prefetched, nor which layout comes next.
"""

import sys
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .collectives import bounds
from .train import Parallel

FORK = "fork" if sys.platform == "linux" else None  # workers get the dataset as it is, also one from a notebook cell
ORDER = ("size", "seed", "shuffle")  # what the order of rows follows from, beside the epoch


class Loader:
    """Batches for `model.step(*batch, local=True)`: this data rank's rows of each global batch.

    >>> loader = Loader(dataset, 16, model)
    >>> for tokens, targets in loader:  # one epoch, or what is left of it
    ...     loss = model.step(tokens, targets, local=True)

    dataset: with `len(dataset)` and `dataset[i]` -> one row, on every rank. What it draws at random must follow from i,
        else it is not drawn again.
    rows: of the global batch. The last batch of an epoch has the rest. Ranks that are not data ranks of each other
        (tensor, pipeline, context) get the same rows.
    shuffle: another order each epoch, drawn from (seed, epoch) alone. drop_last: leave out a last batch that is not
        full. workers, prefetch: processes that read ahead, and batches that each reads ahead. collate: list of rows ->
        batch, by default torch's.
    Raises ValueError if a batch, the last one too, has fewer rows than data ranks x microbatches.
    """

    def __init__(
        self,
        dataset: Dataset,
        rows: int,
        model: Parallel,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        workers: int = 0,
        prefetch: int = 2,
        collate: Callable[[list[Any]], Any] | None = None,
    ):
        if type(rows) is not int or rows < 1:
            raise ValueError(f"rows={rows!r}: a whole number, at least 1")
        self.dataset, self.rows, self.axis, self.microbatches = dataset, rows, model.dp, model.microbatches
        self.seed, self.shuffle, self.drop_last = seed, shuffle, drop_last
        self.workers, self.prefetch, self.collate = workers, prefetch, collate
        self.size: int = len(dataset)  # type: ignore[arg-type]
        self.epoch, self.row = 0, 0  # what comes next
        self._check()

    def _check(self) -> None:
        least = self.axis.size * self.microbatches
        what = f"{self.axis.name}={self.axis.size} x {self.microbatches} microbatches"
        sizes = [len(batch) for batch in self._batches()]
        if not sizes:
            raise ValueError(f"there is no batch of {self.rows} rows in {self.size}")
        if sizes[0] < least:
            raise ValueError(f"batches of {sizes[0]} rows are too few for {what}: give at least rows={least}")
        if sizes[-1] < least:
            left = self.size - self.row
            fit = [rows for rows in range(least, 4 * self.rows) if not 0 < left % rows < least]
            near = sorted(sorted(fit, key=lambda rows: abs(rows - self.rows))[:3])
            raise ValueError(
                f"the last batch of {left} rows by {self.rows} has {sizes[-1]}, too few for {what}: "
                f"drop_last=True leaves it out, rows={' or '.join(map(str, near))} would fit"
            )

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self.size // self.rows if self.drop_last else -(-self.size // self.rows)

    def __iter__(self) -> Iterator[Any]:
        """The batches that are left of this epoch."""
        epoch, order, batches = self.epoch, self.order(), self._batches()
        read = DataLoader(
            self.dataset,
            batch_sampler=[order[self._mine(batch)].tolist() for batch in batches],
            num_workers=self.workers,
            prefetch_factor=self.prefetch if self.workers else None,
            multiprocessing_context=FORK if self.workers else None,
            collate_fn=self.collate,
            generator=self._draw(),  # for the workers' seeds: the caller's random numbers go on undisturbed
        )
        for rows, batch in zip(batches, read, strict=True):
            self.epoch, self.row = (epoch, rows.stop) if rows is not batches[-1] else (epoch + 1, 0)
            yield batch

    def batches(self, number: int) -> Iterator[Any]:
        """So many batches, over as many epochs as they take."""
        while number > 0:
            for batch in islice(self, number):
                number -= 1
                yield batch

    def order(self) -> Tensor:
        """This epoch's order: places in the dataset, (rows of the dataset,) int64."""
        return torch.randperm(self.size, generator=self._draw()) if self.shuffle else torch.arange(self.size)

    def _draw(self) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {self.epoch}".encode()))

    def _batches(self) -> list[range]:
        """The global batches that are left of this epoch, as places in its order."""
        cuts = range(self.row, self.size, self.rows)
        batches = [range(first, min(first + self.rows, self.size)) for first in cuts]
        return [batch for batch in batches if len(batch) == self.rows or not self.drop_last]

    def _mine(self, batch: range) -> slice:
        """This data rank's part of a global batch, as `step` would cut it."""
        edges = bounds(len(batch), self.axis.size)
        return slice(batch.start + edges[self.axis.index], batch.start + edges[self.axis.index + 1])

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it counts in: for `save(..., data=loader.state_dict())`."""
        return {name: getattr(self, name) for name in ("epoch", "row", *ORDER)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. The layout may be another, and so may `rows`. ValueError if it is of another order."""
        for name in ORDER:
            if state[name] != getattr(self, name):
                raise ValueError(f"the position is for {name}={state[name]}, and this loader has {getattr(self, name)}")
        self.epoch, self.row = state["epoch"], state["row"]
        if not self._batches():  # all that is left is less than a batch, and drop_last leaves it out
            self.epoch, self.row = self.epoch + 1, 0
        self._check()
