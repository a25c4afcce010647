"""Data parallelism: the same weights, other rows. Gradients are summed in buckets while backward still runs."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .collectives import Axis, Pending, bounds, start_all_reduce
from .deferral import weakly

BUCKET = 4 * 2**20  # bytes: small enough to start early, large enough that latency does not count


def rows(batch: Tensor | dict[str, Tensor], parts: int) -> list:
    """Cut a batch, a tensor or a dict of them, into parts by rows. Sizes differ by one at most."""
    if isinstance(batch, dict):
        cuts = {name: rows(x, parts) for name, x in batch.items()}
        return [{name: part[i] for name, part in cuts.items()} for i in range(parts)]
    return list(batch.tensor_split(bounds(len(batch), parts)[1:-1]))


class Gradients:
    """The gradients of some parameters, as views into one flat buffer, cut into buckets.

    Parameters fill the buffer from the back of the model, in about the order in which backward finishes with them.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], axis: Axis, bucket: int = BUCKET):
        self.parameters, self.axis = list(parameters)[::-1], axis
        self.flat = torch.zeros(
            sum(p.numel() for p in self.parameters),
            dtype=self.parameters[0].dtype,
            device=self.parameters[0].device,
        )
        self.views = [
            part.view_as(p)
            for part, p in zip(self.flat.split([p.numel() for p in self.parameters]), self.parameters, strict=True)
        ]
        self.buckets: list[Tensor] = []
        self.bucket_of: dict[nn.Parameter, int] = {}
        start = end = 0
        for parameter in self.parameters:
            self.bucket_of[parameter] = len(self.buckets)
            end += parameter.numel()
            if (end - start) * self.flat.element_size() >= bucket or parameter is self.parameters[-1]:
                self.buckets.append(self.flat[start:end])
                start = end
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(weakly(self._ready))
        self.attach()

    def attach(self) -> None:
        """Empty the buffer and make every `.grad` a view of it again: zero_grad() drops the views."""
        self.flat.zero_()
        for parameter, view in zip(self.parameters, self.views, strict=True):
            parameter.grad = view
        self.armed, self.pending = False, list[Pending]()

    def arm(self, coming: set[Tensor] | None = None) -> None:
        """From now on gradients are final: start each bucket as soon as its own are there.

        coming: the parameters whose gradient is not there yet; by default all.
        """
        self.armed = True
        self.missing = [0] * len(self.buckets)
        for parameter, bucket in self.bucket_of.items():
            self.missing[bucket] += coming is None or parameter in coming
        self._start_complete()

    def _ready(self, parameter: nn.Parameter) -> None:
        if self.armed:
            self.missing[self.bucket_of[parameter]] -= 1
            self._start_complete()

    def _start_complete(self) -> None:
        while len(self.pending) < len(self.buckets) and self.missing[len(self.pending)] == 0:
            self._start()  # in order, so that all ranks start the same one

    def _start(self) -> None:
        self.pending.append(start_all_reduce(self.buckets[len(self.pending)], self.axis))

    def finish(self) -> None:
        """Start what no gradient reached, and wait for all of it."""
        while len(self.pending) < len(self.buckets):
            self._start()
        for pending in self.pending:
            pending.wait()

    def scale(self, factor: float) -> None:
        self.flat.mul_(factor)
