"""Weight gradients of matrix products, put off until there is time for them.

The backward of y = x wᵀ is two products. The ranks beside this one wait for the gradient of x. Nobody waits for that of
w before the end of the step, so it can fill time that would be idle: while another tensor travels, or in a pipeline's
bubble (Qi et al. 2023, Zero Bubble Pipeline Parallelism).
"""

from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PutOff = Callable[[Tensor, Tensor], None]  # x, gradient of y


class WeightGradients:
    """Those of one forward. Its backward puts them off, `run` makes up for it."""

    def __init__(self) -> None:
        self.uses: Counter[Tensor] = Counter()  # products of the forward whose gradient is still to come
        self.waiting: deque[tuple[Tensor, Tensor, Tensor]] = deque()  # weight, x, gradient of y
        self.parts: dict[Tensor, Tensor] = {}  # of weights with several uses

    def used(self, weight: Tensor) -> PutOff:
        """The forward has a product with this weight. Its backward calls what this returns."""
        self.uses[weight] += 1
        return lambda x, gradient: self.waiting.append((weight, x, gradient))

    def run(self) -> None:
        """Compute what was put off so far. A weight's gradient is added to `.grad` once, with all its uses in it, so
        that whoever waits for it hears of it once."""
        while self.waiting:
            weight, x, gradient = self.waiting.popleft()
            part = _rows(gradient).t() @ _rows(x)
            self.uses[weight] -= 1
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


class Deferral:
    """Where a forward that runs now finds its `WeightGradients`."""

    def __init__(self) -> None:
        self.now = WeightGradients()

    def begin(self) -> WeightGradients:
        """Another forward begins."""
        self.now = WeightGradients()
        return self.now

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """F.linear, whose backward puts the weight's gradient off. All other gradients come with it."""
        if not (x.requires_grad and weight.requires_grad and torch.is_grad_enabled()):
            return F.linear(x, weight, bias)  # there is one product in its backward, or none
        return _Linear.apply(x, weight.detach(), bias, self.now.used(weight))


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
        ctx.put_off(x, gradient)
        return gradient @ weight, None, _rows(gradient).sum(0) if ctx.needs_input_grad[2] else None, None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.size(-1))  # (..., C) -> (N, C)
