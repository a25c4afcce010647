"""Random numbers that do not depend on who computes what.

nn.Dropout: an element is dropped or not by where it lies in the whole tensor, so every layout drops the same ones.
All else that draws (dropout inside of torch's attention, say) draws from streams, which agree where tensor ranks hold
copies and differ where they hold parts.
"""

import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Streams:
    """Two streams of random numbers: every tensor rank draws the same outside the cut region, its own inside of it."""

    generator: torch.Generator
    inside: bool = False
    other: Tensor = field(default_factory=lambda: torch.empty(0))

    def begin(self, outside_seed: int, inside_seed: int) -> None:
        self.other = self.generator.manual_seed(inside_seed).get_state()
        self.generator.manual_seed(outside_seed)
        self.inside = False

    def go(self, inside: bool) -> None:
        """Switch to one of the two streams; does nothing where it flows already."""
        if inside != self.inside and self.other.numel():
            now = self.generator.get_state()
            self.generator.set_state(self.other)
            self.other = now
            self.inside = inside


@dataclass
class Shared:
    """A dim of which this rank has a part. take: (whole, dim) -> that part."""

    dim: int
    parts: int
    take: Callable[[Tensor, int], Tensor]


@dataclass
class Masks:
    """Dropout by place. A row's mask is drawn whole, from a seed that names step, layer and row; ranks that share a row
    each take their part of it.

    shared: the dims of an activation that this rank has a part of, in the order in which they were cut.
    """

    generator: torch.Generator  # of its own: what it draws disturbs nobody
    shared: Callable[[Tensor], list[Shared]]
    step: tuple[int, ...] = ()
    rows: range = range(0)  # of the global batch, that are computed now
    uses: Counter[int] = field(default_factory=Counter)  # of a layer, in this forward

    def begin(self, step: tuple[int, ...], rows: range) -> None:
        self.step, self.rows, self.uses = step, rows, Counter()

    def replace_in(self, model: nn.Module) -> None:
        for name, layer in model.named_modules():
            if type(layer) is nn.Dropout and layer.p:
                self._replace(layer, zlib.crc32(name.encode()))

    def _replace(self, layer: Any, number: int) -> None:
        inner = layer.forward

        def forward(x: Tensor) -> Tensor:
            if not layer.training or x.dim() < 2 or len(x) != len(self.rows):
                return inner(x)  # rows are not where they should be: leave it to the streams
            return x * self.mask(x, number, layer.p)

        layer.forward = forward

    def mask(self, x: Tensor, layer: int, p: float) -> Tensor:
        """0, or 1/(1-p) with probability 1-p: (rows, ...) as x is."""
        self.uses[layer] += 1
        shared = self.shared(x)
        whole = list(x.shape[1:])
        for share in shared:
            whole[share.dim - 1] *= share.parts
        rows = []
        for row in self.rows:
            self.generator.manual_seed(hash((*self.step, layer, self.uses[layer], row)) % 2**63)
            kept = torch.rand(whole, generator=self.generator, device=x.device) >= p
            for share in shared:
                kept = share.take(kept, share.dim - 1)
            rows.append(kept)
        return torch.stack(rows).to(x.dtype).div_(1 - p)


def remember(streams: Streams, masks: Masks) -> Callable[[], None]:
    """What brings back this moment, so that what is computed again draws what it drew. The generator of the streams is
    not in it: whoever computes again has its state."""
    other, inside, step, rows, uses = streams.other, streams.inside, masks.step, masks.rows, Counter(masks.uses)

    def bring_back() -> None:
        streams.other, streams.inside = other, inside
        masks.step, masks.rows, masks.uses = step, rows, Counter(uses)

    return bring_back
