"""Expert parallelism: the ranks of an axis share out the experts of every layer, and tokens travel to them and back.

Each rank has rows of its own, so for all other layers the axis is a data axis. Between router and experts its slots
change over from all experts of its own rows to its own experts of all rows (Lepikhin et al. 2020, GShard):

    (E, N, C)  --all-to-all-->  (E/n, n N, C)  --experts-->  (E/n, n N, C)  --all-to-all-->  (E, N, C)

The gradients of a rank's experts come from the tokens of the whole axis: they need no sum over it.
"""

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .collectives import Axis, Collective, all_reduce, all_to_all
from .cut import cut


def cut_experts(layer: nn.Module, axis: Axis) -> None:
    """Keep this rank's experts, in place, and let the others' tokens come to them.

    layer: forward maps slots (E, N, C) -> (E, N, C), expert by expert; dim 0 of every parameter counts the experts.
        N may be another on each rank: the largest is agreed on first, and what is missing is sent as zeros.

    Bytes that each rank sends, with M those of (E, largest N, C):
        forward   2 (n-1)/n M  in 2 all-to-alls, and an all-reduce of one number
        backward  2 (n-1)/n M  in 2

    ValueError if the axis does not divide the experts, or if they are given more than slots.
    """
    _, *takes = inspect.signature(type(layer).forward).parameters
    if len(takes) != 1:
        what = f"{type(layer).__name__} takes {', '.join(takes)}"
        raise ValueError(
            f"{axis.name} takes experts that map slots to slots, and {what}: use {axis.name}=1, and dp or tp"
        )
    experts = next(layer.parameters()).size(0)
    if experts % axis.size:
        fits = [n for n in range(1, experts + 1) if experts % n == 0]
        raise ValueError(f"{axis.name}={axis.size} does not divide the {experts} experts; it can be one of {fits}")
    for module in layer.modules():
        for name, _ in module.named_parameters(recurse=False):
            cut(module, name, 0, axis)
    inner = layer.forward

    def forward(slots: Tensor) -> Tensor:
        own = slots.size(1)
        most = int(all_reduce(torch.tensor([own], device=slots.device), axis, "max"))
        here = dispatch(F.pad(slots, (0, 0, 0, most - own)), axis)
        return combine(inner(here), axis)[:, :own]

    layer.forward = forward


def dispatch(slots: Tensor, axis: Axis) -> Tensor:
    """From every expert's slots for this rank's rows to this rank's experts': (E, N, C) -> (E/n, n N, C), where
    index i's rows have the slots [i N, (i+1) N). N is the same on all ranks."""
    arrived = _exchange(slots, axis).unflatten(0, (axis.size, -1))  # (n, E/n, N, C), by whence it came
    return arrived.transpose(0, 1).flatten(1, 2)


def combine(slots: Tensor, axis: Axis) -> Tensor:
    """And back: (E/n, n N, C) -> (E, N, C)."""
    leaving = slots.unflatten(1, (axis.size, -1)).transpose(0, 1)  # (n, E/n, N, C), by whither it goes
    return _exchange(leaving.flatten(0, 1), axis)


def _exchange(x: Tensor, axis: Axis) -> Tensor:
    """Share i of dim 0 goes to index i: a transposition of equal shares, so it is its own adjoint."""
    return Collective.apply(x, axis, all_to_all, all_to_all)
