"""ZeRO: what data ranks hold in common is cut into shares (Rajbhandari et al. 2020).

    stage 1: optimizer states       Every rank updates its own share of the weights; the shares are gathered.
    stage 2: ... and gradients      A sum of gradients goes to the rank that needs it, and is kept nowhere else.
    stage 3: ... and parameters     A block's weights are gathered just before it runs, and freed just after.

For P parameters on d ranks and m microbatches a rank sends, in elements times (d-1)/d: stage 1, 2P a step, as much as
an all-reduce; stage 2, (m+1)P; stage 3, 3mP, or (2m+1)P if gradients stay. Padding included, P is the sum of
`Unit.padded`.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .collectives import Axis, Pending, start_all_gather, start_reduce_scatter
from .deferral import weakly
from .schedule import Op


class Unit:
    """Parameters that travel together, side by side and padded: `whole` is (n * share,), and this rank owns
    whole[index * share : (index + 1) * share].

    pieces: name -> what this rank owns of that parameter, 1-d, itself a parameter for an optimizer. Parameters of
        which it owns nothing are not in it.
    size: elements that `whole` must have room for, at least.
    weights_stay, gradients_stay: kept whole between their uses (else freed).
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        axis: Axis,
        size: int,
        weights_stay: bool = True,
        gradients_stay: bool = True,
    ):
        self.parameters, self.axis = parameters, axis
        self.weights_stay, self.gradients_stay = weights_stay, gradients_stay
        self.trained = {name for name, p in parameters.items() if p.requires_grad}
        self.share = -(-size // axis.size)
        like = next(iter(parameters.values()))
        self.whole = like.new_zeros(self.padded, requires_grad=False)
        self.places: dict[str, tuple[int, int]] = {}
        end = 0
        for name, parameter in parameters.items():
            start, end = end, end + parameter.numel()
            self.places[name] = start, end
            view = self.whole[start:end].view_as(parameter)
            view.copy_(parameter.data)
            parameter.data = view
        self.own = self._share_of(self.whole) if weights_stay else self._share_of(self.whole).clone()
        self.gradient = like.new_zeros(self.padded if gradients_stay and self.trained else 0, requires_grad=False)
        self.own_gradient = self._share_of(self.gradient)
        if self.trained and not gradients_stay:
            self.own_gradient = torch.zeros_like(self.own)
        owned = self.owned(self.own)
        self.pieces = {name: nn.Parameter(x, name in self.trained) for name, x in owned.items() if len(x)}
        self.gathering: Pending | None = None
        self.reducing: list[Pending] = []
        self.here = True  # are the weights?
        self.free()

    @property
    def padded(self) -> int:
        return self.share * self.axis.size

    def _share_of(self, whole: Tensor) -> Tensor:
        return whole[self.axis.index * self.share :][: self.share]

    def owned(self, share: Tensor) -> dict[str, Tensor]:
        """What a rank's share has of each parameter, 1-d, perhaps nothing."""
        first = self.axis.index * self.share
        edges = {name: [min(max(e - first, 0), self.share) for e in place] for name, place in self.places.items()}
        return {name: share[start:end] for name, (start, end) in edges.items()}

    def views(self, whole: Tensor) -> dict[str, Tensor]:
        """A padded whole as the parameters' shapes."""
        return {n: whole[a:b].view(self.parameters[n].shape) for n, (a, b) in self.places.items()}

    def put_together(self, what: str) -> dict[str, Tensor]:
        """The whole parameters or gradients ("data", "grad"), in their own shapes. A collective."""
        share = self.own.clone()
        for name, mine in self.owned(share).items():
            value = getattr(self.pieces[name], what) if name in self.pieces else None
            mine.copy_(torch.zeros_like(mine) if value is None else value.detach())
        whole = share.new_empty(self.padded)
        start_all_gather(share, self.axis, whole).wait()
        return self.views(whole)

    def start(self, name: str) -> int:
        """Where in a parameter, counted row by row, this rank's own elements begin."""
        return max(self.axis.index * self.share - self.places[name][0], 0)

    def take(self, name: str, whole: Tensor) -> Tensor:
        """What this rank owns of a whole parameter, 1-d."""
        return whole.flatten()[self.start(name) :][: len(self.owned(self.own)[name])]

    def load(self, name: str, whole: Tensor) -> None:
        self.owned(self.own)[name].copy_(self.take(name, whole))

    # -- weights

    def start_gather(self) -> None:
        if not self.here and not self.gathering:
            self._make_room()
            self.gathering = start_all_gather(self.own, self.axis, self.whole)

    def _make_room(self) -> None:
        self.whole.untyped_storage().resize_(self.padded * self.whole.element_size())

    def gather(self) -> None:
        """Make the whole weights be there."""
        self.start_gather()
        self._arrive()
        self.here = True

    def _arrive(self) -> None:
        if self.gathering:
            self.gathering.wait()
            self.gathering = None

    def free(self) -> None:
        """The weights are not needed for a while, or their owners change them. Views of them stay valid: what is
        gathered next lies in the same place."""
        if not self.weights_stay:
            self._arrive()  # it may be under way to a block that did not run
            self.whole.untyped_storage().resize_(0)
        self.here = False

    def blank(self) -> None:
        """Another stage of this rank computes, and its forward may come by: room for weights, without their values."""
        if not self.weights_stay and not self.here:
            self._make_room()
            self.whole.fill_(float("nan"))

    # -- gradients

    def attach(self) -> None:
        """A step begins: all gradients are zero."""
        self.own_gradient.zero_()
        self.gradient.zero_()
        views = self.views(self.gradient) if len(self.gradient) else {}
        for name in self.trained:
            self.parameters[name].grad = views.get(name)
        for name, gradient in self.owned(self.own_gradient).items():
            if name in self.trained and name in self.pieces:
                self.pieces[name].grad = gradient

    def start_reduce(self) -> None:
        """Send the gradients to their owners."""
        if self.gradients_stay:
            whole = self.gradient
        else:
            whole = self.own_gradient.new_zeros(self.padded)
            for name, view in self.views(whole).items():
                gradient, self.parameters[name].grad = self.parameters[name].grad, None
                if gradient is not None:
                    view.copy_(gradient)
        self.reducing.append(start_reduce_scatter(whole, self.axis))

    def finish_reduce(self) -> None:
        for pending in self.reducing:
            total = pending.wait()
            self.own_gradient.copy_(total) if self.gradients_stay else self.own_gradient.add_(total)
        self.reducing.clear()


class Shares:
    """The units of one stage, in the order in which backward comes to them. Stands where `data.Gradients` does.

    blocks: in the order of forward, each with its own units. What is in no block is there whenever the stage computes.
    """

    def __init__(self, units: Iterable[Unit], blocks: list[tuple[nn.Module, list[Unit]]]):
        self.units = list(units)
        self.gradients_stay = all(unit.gradients_stay for unit in self.units)
        inside = {id(unit) for _, some in blocks for unit in some}
        self.outside = [unit for unit in self.units if id(unit) not in inside]
        self.first, self.last = (blocks[0][1], blocks[-1][1]) if blocks else ([], [])
        for place, (block, some) in enumerate(blocks):
            before = blocks[place - 1][1] if place else []
            behind = blocks[place + 1][1] if place + 1 < len(blocks) else []
            gather_around(block, some, before, behind)
        self.unit_of = {p: i for i, unit in enumerate(self.units) for p in unit.parameters.values()}
        self.missing, self.started, self.armed = [0] * len(self.units), 0, False
        for parameter in self.unit_of:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(weakly(self._ready))

    def attach(self) -> None:
        for unit in self.units:
            unit.attach()

    def arm(self, coming: set[Tensor] | None = None) -> None:
        """What comes now is all there will be: start each unit as soon as its gradients are there.

        coming: the parameters whose gradient is not there yet; by default all.
        """
        self.armed, self.started, self.missing = True, 0, [0] * len(self.units)
        for parameter, unit in self.unit_of.items():
            self.missing[unit] += parameter.requires_grad and (coming is None or parameter in coming)
        self._start_complete()

    def _ready(self, parameter: nn.Parameter) -> None:
        if self.armed:
            self.missing[self.unit_of[parameter]] -= 1
            self._start_complete()

    def _start_complete(self) -> None:
        while self.started < len(self.units) and self.missing[self.started] == 0:
            self._start()  # in order, so that all ranks start the same one

    def _start(self) -> None:
        for unit in self.units[max(self.started - 2, 0) : max(self.started - 1, 0)]:
            unit.finish_reduce()  # it has had the time of a unit's backward, and its whole gradients can go
        if self.units[self.started].trained:
            self.units[self.started].start_reduce()
        self.started += 1

    def flush(self) -> None:
        """Start what no gradient reached."""
        while self.armed and self.started < len(self.units):
            self._start()
        self.armed = False

    def finish(self) -> None:
        """Start the rest, and wait for all of it."""
        self.flush()
        for unit in self.units:
            unit.finish_reduce()

    def scale(self, factor: float) -> None:
        for unit in self.units:
            unit.own_gradient.mul_(factor)

    def refresh(self) -> None:
        """An optimizer has changed what each rank owns: gather the weights that stay."""
        stay = [unit for unit in self.units if unit.weights_stay]
        for unit in stay:
            unit.start_gather()
        for unit in stay:
            unit.gather()
            unit.free()  # until they change

    def prepare(self, op: Op) -> None:
        """Before an action of this stage: what is outside of the blocks is needed throughout, and then a block."""
        if op != Op.W:
            outside = [unit for unit in self.outside if not unit.weights_stay]  # `refresh` has gathered the others
            for unit in [*outside, *(self.first if op == Op.F else self.last)]:
                unit.start_gather()
            for unit in outside:
                unit.gather()
        if op == Op.B and not self.gradients_stay:
            self.finish()
            self.arm()

    def settle(self, op: Op) -> None:
        """Behind an action of this stage."""
        self.free()
        if op == Op.W and not self.gradients_stay:
            self.finish()
            self.arm(set())
        if op in (Op.B, Op.W) and not self.gradients_stay:
            self.flush()

    def blank(self) -> None:
        for unit in self.outside:
            unit.blank()

    def free(self) -> None:
        for unit in self.units:
            if not unit.weights_stay:
                unit.free()


# -- stage 3: weights come and go --------------------------------------------------------------------------------


def gather_around(block: nn.Module, units: list[Unit], before: list[Unit], behind: list[Unit]) -> None:
    """Have a block's weights there in its forward and in its backward, and only then.

    before, behind: the units of its neighbors. The next one's are gathered while this block computes.
    """
    inner = block.forward

    def forward(*arguments: Any, **more: Any) -> Any:
        _exchange(units, free=before, ahead=behind)
        output = inner(*arguments, **more)
        for unit in units:
            unit.free()
        return pytree.tree_map_only(Tensor, lambda y: _Gather.apply(y, back), output)

    def back() -> None:
        _exchange(units, free=behind, ahead=before)

    block.forward = forward


def _exchange(units: list[Unit], free: list[Unit], ahead: list[Unit]) -> None:
    """These units' weights are needed now, the ones of `free` no more, the ones of `ahead` soon."""
    for unit in free:
        unit.free()
    for unit in units:
        unit.gather()
    for unit in ahead:
        unit.start_gather()


class _Gather(torch.autograd.Function):
    """Nothing in forward. In backward it comes just before the block."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gather: Callable[[], None]) -> Tensor:
        ctx.gather = gather
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.gather()
        return gradients[0], None
