"""Weight gradients of matrix products, put off until there is time for them; and hooks that do not hold their object.

The backward of y = x wᵀ is two products. The ranks beside this one wait for the gradient of x. Nobody waits for that of
w before the end of the step, so it can fill time that would be idle: while another tensor travels, or in a pipeline's
bubble (Qi et al. 2023, Zero Bubble Pipeline Parallelism).
"""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakMethod

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode

PutOff = Callable[[Tensor, Tensor], None]


def weakly(method: Callable[[Any], None]) -> Callable[[Any], None]:
    """A hook for a tensor that does not keep the method's object. Python's collector does not look at the hooks of a
    tensor: an object that holds it, and is held by its hook, would stay for good, with all that it holds."""
    weak = WeakMethod(method)

    def hook(tensor: Tensor) -> None:
        if (call := weak()) is not None:
            call(tensor)

    return hook


class WeightGradients:
    """Those of one forward. Its backward puts them off, `run` makes up for it."""

    def __init__(self) -> None:
        self.uses: Counter[Tensor] = Counter()  # products of the forward whose gradient is still to come
        self.waiting: deque[tuple[Tensor, Tensor, Tensor]] = deque()  # weight, and the factors of its gradient
        self.parts: dict[Tensor, Tensor] = {}  # of weights with several uses

    def used(self, weight: Tensor) -> PutOff:
        """The forward has a product with this weight. Its backward gives (N, rows), (N, columns) to what this returns:
        their product over N is the weight's gradient."""
        self.uses[weight] += 1
        return lambda left, right: self.waiting.append((weight, left, right))

    @property
    def coming(self) -> set[Tensor]:
        """The weights whose gradient waits."""
        return {weight for weight, _, _ in self.waiting}

    def run(self) -> None:
        """Compute what was put off so far. A weight's gradient is added to `.grad` once, with all its uses in it, so
        that whoever waits for it hears of it once."""
        while self.waiting:
            weight, left, right = self.waiting.popleft()
            self.uses[weight] -= 1
            the_only_one = not self.uses[weight] and weight not in self.parts
            if the_only_one and _adds_in_place(weight, left):
                _add_in_place(weight, left, right)
                continue
            part = (left.t() @ right).to(weight.dtype)
            total = self.parts.pop(weight) + part if weight in self.parts else part
            if self.uses[weight]:
                self.parts[weight] = total
            else:
                torch.autograd.backward(weight, total)

    def finish(self) -> None:
        """Backward is through: what is there is all there will be."""
        self.run()
        for weight, total in self.parts.items():  # a use that backward did not come to
            torch.autograd.backward(weight, total)
        self.parts.clear()


class Deferral(TorchFunctionMode):
    """Where a forward that runs now finds its `WeightGradients`.

    holds: inside `with` every product with a parameter is put off, and only the schedule says when it is made up for.
        Else the forward says which are, by `linear`, and they are done while the next gradient travels.
    puts_off: else `linear` does not: somebody waits for a block's gradients when its backward is through.
    """

    def __init__(self, holds: bool = False, puts_off: bool = True) -> None:
        super().__init__()
        self.holds, self.puts_off, self.now = holds, puts_off, WeightGradients()

    def begin(self) -> WeightGradients:
        """Another forward begins."""
        self.now = WeightGradients()
        return self.now

    @property
    def meanwhile(self) -> Callable[[], None]:
        """What to do while the gradient that enters here travels."""
        return (lambda: None) if self.holds else self.now.run

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """F.linear, whose backward puts the weight's gradient off. All other gradients come with it."""
        if not (self.puts_off and weight.requires_grad and weight.is_leaf and torch.is_grad_enabled()):
            return F.linear(input, weight, bias)
        if not input.requires_grad:
            input = input.detach().requires_grad_()  # so that backward comes by
        put_off = self.now.used(weight)
        return _Linear.apply(*_autocast(input, weight.detach(), bias), put_off)

    def matmul(self, x: Tensor, weight: Tensor) -> Tensor:
        """The same for x @ weight."""
        used = self.now.used(weight)
        return _Linear.apply(*_autocast(x, weight.detach().t(), None), lambda left, right: used(right, left))

    def backward(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Through a graph. What it computes again (a checkpoint) saves what it saved before, and is not counted."""
        now, self.now = self.now, WeightGradients()
        try:
            if self.holds:
                with self:  # torch.autograd.backward itself takes modes off
                    _engine_run_backward(tuple(outputs), tuple(gradients), False, False, (), True, True)
            else:
                torch.autograd.backward(outputs, gradients)
        finally:
            self.now = now

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self.holds and torch.is_grad_enabled():
            if function is F.linear:
                return self.linear(*args, **kwargs)
            if function in MATMUL and not kwargs and _may_wait(*args):
                return self.matmul(*args)
            if function is torch.addmm and not kwargs and _may_wait(*args[1:]):
                bias, x, weight = args
                return bias + self.matmul(x, weight)
        return function(*args, **kwargs)


MATMUL = {torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__}


def _may_wait(x: Any, weight: Any) -> bool:
    """Is this a product of an activation with a matrix that is a parameter?"""
    return x.requires_grad and weight.requires_grad and weight.is_leaf and weight.dim() == 2


def _adds_in_place(weight: Any, factor: Tensor) -> bool:
    """Is there a gradient to add to, of the same dtype, and nobody who wants to see what is added?"""
    return weight.grad is not None and weight.grad.dtype == factor.dtype and not weight._backward_hooks


@torch.no_grad()
def _add_in_place(weight: Any, left: Tensor, right: Tensor) -> None:
    """What autograd does at a leaf, with one pass less over the gradient: it is added to as it is computed."""
    weight.grad.addmm_(left.t(), right)
    for hook in (weight._post_accumulate_grad_hooks or {}).values():
        hook(weight)


def _autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """What torch's autocast would do to the arguments of a matrix product. An autograd function has to do it itself,
    in sight of autograd."""
    device = next(x.device.type for x in tensors if x is not None)
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    return [x if x is None or x.dtype is torch.float64 else x.to(torch.get_autocast_dtype(device)) for x in tensors]


class _Linear(torch.autograd.Function):
    """It is given the weight without its history: autograd would tell the weight of a gradient that is not there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, put_off: PutOff) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.put_off = put_off
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (x, weight), (gradient,) = ctx.saved_tensors, gradients
        ctx.put_off(_rows(gradient), _rows(x))
        return gradient @ weight, None, _rows(gradient).sum(0) if ctx.needs_input_grad[2] else None, None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.size(-1))  # (..., C) -> (N, C)
