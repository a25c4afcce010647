"""Torch's own data parallelism around a stage: fully_shard (FSDP2) or DistributedDataParallel.

`parallelize(..., wrap=f)` calls f(stage, device_mesh) and trains what it gives. Gradients are summed over "dp" by the
wrapper then; everything else stays minipar's.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from .collectives import Axis

Wrap = Callable[["Stage", DeviceMesh], nn.Module | None]


class Stage(nn.Module):
    """A stage as a module of its own: (state of the stage before or None, inputs) -> state, or the model's output.

    blocks: those of this stage, in order, for who wants to wrap each of them.
    """

    def __init__(self, model: nn.Module, blocks: Iterable[nn.Module], run: Callable[[Any, Any], Any]):
        super().__init__()
        self.model, self.run = model, run
        self.blocks = tuple(blocks)  # not a list of modules: they are the model's already

    def forward(self, state: Any, inputs: Any) -> Any:
        return self.run(state, inputs)


class Wrapped:
    """A wrapped stage. Stands where `data.Gradients` does."""

    def __init__(self, stage: Stage, wrap: Wrap, device_mesh: DeviceMesh, axis: Axis):
        self.module: Any = wrap(stage, device_mesh) or stage
        if not isinstance(self.module, nn.Module):
            raise TypeError(f"wrap gave a {type(self.module).__name__}: it must give the wrapped stage, a module")
        ddp = isinstance(self.module, DistributedDataParallel)
        left_out = [n for n, p in self.module.named_parameters() if not (ddp or isinstance(p, DTensor))]
        if left_out and axis.size > 1:
            raise ValueError(
                f"wrap left out {left_out[0]}, whose gradient nobody would sum over dp={axis.size}: wrap the stage "
                "too, not only its blocks"
            )
        self.axis = axis

    def __call__(self, state: Any, inputs: Any) -> Any:
        ddp = isinstance(self.module, DistributedDataParallel)
        with self.module.no_sync() if ddp else nullcontext():  # its reduction is prepared in `arm`
            return self.module(state, inputs)

    def attach(self) -> None:
        self.module.zero_grad()
        self._synchronize(False)

    def arm(self, coming: set[Tensor] | None = None) -> None:
        """The last backward comes: after it gradients are reduced."""
        self._synchronize(True)
        if isinstance(self.module, DistributedDataParallel):
            self.module.reducer.prepare_for_backward([])  # as forward would, if it were the last before backward

    def _synchronize(self, last: bool) -> None:
        if isinstance(self.module, FSDPModule):
            self.module.set_requires_gradient_sync(last)
            self.module.set_is_last_backward(last)

    def finish(self) -> None:
        if any(isinstance(m, FSDPModule | DistributedDataParallel) for m in self.module.modules()):
            self.scale(self.axis.size)  # both give the mean over the data ranks, and a sum is wanted

    def scale(self, factor: float) -> None:
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)


def hide(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Let a wrapper not see parameters that live elsewhere. The layers that have them still do."""
    elsewhere = set(parameters)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter in elsewhere:
                del module._parameters[name]
                setattr(module, name, parameter.detach())


def local(x: Tensor) -> Tensor:
    """The part of a tensor that this rank has."""
    return x.to_local() if isinstance(x, DTensor) else x


def together(x: Tensor) -> Tensor:
    """The whole of it. A collective."""
    return x.full_tensor() if isinstance(x, DTensor) else x


@torch.no_grad()
def copy_part(whole: Tensor, into: Tensor) -> None:
    """Take this rank's part of a whole tensor."""
    if isinstance(into, DTensor):
        whole = distribute_tensor(whole, into.device_mesh, into.placements)
    into.copy_(whole)
