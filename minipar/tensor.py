"""Tensor parallelism: weights are cut along one axis, the model stays as it was.

A plan is a dict from layer name to style, with the style names that transformers publishes. Modules keep their place
and their name; only the forward of a layer that is cut changes.
"""

import difflib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .collectives import SEQUENCE, Axis, all_reduce, bounds, enter, enter_sequence, gather, leave, leave_sequence, split
from .cut import cut
from .deferral import Deferral
from .randomness import Streams

# -- styles --------------------------------------------------------------------------------------------------


@dataclass
class Entrance:
    """Layers that read the same tensor (q, k and v) enter together: their gradients add before they travel, once."""

    enter: Callable[[Tensor], Tensor]
    seen: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.seen is None or self.seen[0] is not x:
            self.seen = x, self.enter(x)
        return self.seen[1]

    def forget(self, *_: object) -> None:
        self.seen = None


@dataclass
class Region:
    """What the styles of one model share: the axis, how activations enter and leave a cut layer, random streams.

    deferral: a cut layer's weight gradient is put off until the next gradient of an activation travels.
    """

    axis: Axis
    sequence: bool
    streams: Streams
    deferral: Deferral
    heads: list["Head"] = field(default_factory=list)

    def enter(self, x: Tensor) -> Tensor:
        return (enter_sequence if self.sequence else enter)(x, self.axis, meanwhile=self.deferral.meanwhile)

    def leave(self, x: Tensor) -> Tensor:
        return leave_sequence(x, self.axis) if self.sequence else leave(x, self.axis)


def _is_plain(layer: nn.Module, kind: type[nn.Module]) -> None:
    """ValueError for a layer whose own forward a style would replace."""
    if type(layer).forward is not kind.forward:
        raise ValueError(
            f"{type(layer).__name__} has a forward of its own, so it cannot be cut as nn.{kind.__name__} is"
        )


def colwise(layer: nn.Linear, region: Region, entrance: Entrance) -> None:
    """Cut the outputs: (..., in) -> (..., out/tp)."""
    _is_plain(layer, nn.Linear)
    cut(layer, "weight", 0, region.axis)
    cut(layer, "bias", 0, region.axis)

    def forward(x: Tensor) -> Tensor:
        y = region.deferral.linear(entrance(x), layer.weight, layer.bias)
        region.streams.go(inside=True)
        return y

    layer.forward = forward


@dataclass
class Head:
    """A cut layer that gives the model's output: whole, or left as shares of the vocabulary for the loss."""

    vocabulary: int
    gathers: bool = True


def colwise_gather_output(layer: nn.Linear, region: Region, entrance: Entrance) -> Head:
    """Cut the outputs, then put them together: (..., in) -> (..., out)."""
    _is_plain(layer, nn.Linear)
    head = Head(layer.out_features)
    cut(layer, "weight", 0, region.axis)
    cut(layer, "bias", 0, region.axis)

    def forward(x: Tensor) -> Tensor:
        y = F.linear(entrance(x), layer.weight, layer.bias)
        return gather(y, region.axis, size=head.vocabulary) if head.gathers else y

    layer.forward = forward
    return head


def rowwise(layer: nn.Linear, region: Region, entrance: Entrance) -> None:
    """Cut the inputs: (..., in/tp) -> (..., out). Each rank has a partial sum; the bias is added once, after it."""
    _is_plain(layer, nn.Linear)
    cut(layer, "weight", 1, region.axis)

    def forward(x: Tensor) -> Tensor:
        region.streams.go(inside=False)
        y = region.leave(region.deferral.linear(x, layer.weight))
        return y if layer.bias is None else y + layer.bias

    layer.forward = forward
    if region.sequence and layer.bias is not None:
        _mark_partial(layer.bias)  # added to this rank's part of the sequence only


def rowwise_split_input(layer: nn.Linear, region: Region, entrance: Entrance) -> None:
    """The same for an input that is whole: each rank takes its share of it first."""
    rowwise(layer, region, entrance)
    inner = layer.forward
    layer.forward = lambda x: inner(split(x, region.axis))


def embedding_rowwise(layer: nn.Embedding, region: Region, entrance: Entrance) -> None:
    """Cut the vocabulary: each rank looks up the ids it has, the others give zeros, and the parts are summed."""
    _is_plain(layer, nn.Embedding)
    edges = bounds(layer.num_embeddings, region.axis.size)
    first, end = edges[region.axis.index], edges[region.axis.index + 1]
    if layer.max_norm is not None or layer.scale_grad_by_freq:
        raise ValueError("an embedding with max_norm or scale_grad_by_freq cannot be cut: leave it out of the plan")
    cut(layer, "weight", 0, region.axis)
    padding = None if layer.padding_idx is None or not first <= layer.padding_idx < end else layer.padding_idx - first

    def forward(ids: Tensor) -> Tensor:  # (B, T) -> (B, T, C)
        here = (ids >= first) & (ids < end)
        elsewhere = ~here & (ids >= 0) & (ids < layer.num_embeddings)  # an id that is nowhere stays, and raises
        local = (ids - first).masked_fill(elsewhere, 0)
        rows = F.embedding(local, layer.weight, padding) * here.unsqueeze(-1)
        return leave(rows, region.axis)

    layer.forward = forward


def replicated_with_grad_allreduce(layer: nn.Module, region: Region, entrance: Entrance) -> None:
    """A whole layer inside a cut region: its gradients are partial sums."""
    for parameter in layer.parameters():
        _mark_partial(parameter)


def _mark_partial(parameter: Any) -> None:
    """Its gradient on one rank is a partial sum: `step` adds them up, once, at its end."""
    parameter.partial = True


def sequence_parallel(layer: nn.Module, region: Region, entrance: Entrance) -> None:
    """A whole layer that sees only this rank's part of the sequence, so its gradients are partial sums."""
    if region.sequence:
        replicated_with_grad_allreduce(layer, region, entrance)


def sequence_split(layer: nn.Module, region: Region, entrance: Entrance) -> None:
    """From behind this layer on, each rank has its part of the sequence: (B, T, C) -> (B, T/tp, C)."""
    inner = layer.forward

    def forward(*args: Tensor) -> Tensor:
        y = inner(*args)
        if y.size(1) % region.axis.size:
            raise ValueError(f"sequence length {y.size(1)} is not divisible by tp={region.axis.size}: pad the sequence")
        return split(y, region.axis, dim=1)

    if region.sequence:
        layer.forward = forward


def sequence_gather(layer: nn.Module, region: Region, entrance: Entrance) -> None:
    """A whole layer that needs whole sequences between cut ones: (B, T/tp, C) -> (B, T, C) -> (B, T/tp, C). Every rank
    computes the same in it."""
    inner = layer.forward
    if region.sequence:
        layer.forward = lambda x: split(inner(gather(x, region.axis, dim=SEQUENCE)), region.axis, dim=SEQUENCE)


def moe_tp_experts(layer: nn.Module, region: Region, entrance: Entrance) -> None:
    """Experts side by side, with weights `up` (E, in, hidden) and `down` (E, hidden, out), cut along hidden. The slots,
    (E, N, in) -> (E, N, out), are the same on every rank; each has a partial sum of what comes out."""
    if [name for name, _ in layer.named_parameters()] != ["up", "down"]:
        raise ValueError(f"{type(layer).__name__}: moe_tp_experts needs the two weights up and down, and no others")
    cut(layer, "up", 2, region.axis)
    cut(layer, "down", 1, region.axis)
    inner = layer.forward

    def forward(slots: Tensor) -> Tensor:
        return leave(inner(enter(slots, region.axis, meanwhile=region.deferral.meanwhile)), region.axis)

    layer.forward = forward


STYLES: dict[str, Callable[..., Head | None]] = {
    style.__name__: style
    for style in (
        colwise,
        colwise_gather_output,
        rowwise,
        rowwise_split_input,
        embedding_rowwise,
        replicated_with_grad_allreduce,
        sequence_parallel,
        sequence_split,
        sequence_gather,
        moe_tp_experts,
    )
}


def pattern(name: str) -> str:
    """What a plan calls a layer: `*` stands for a number."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def layers_of_style(model: nn.Module, plan: dict[str, str], style: str) -> Iterator[nn.Module]:
    """The layers for which a plan has this style."""
    for name, layer in model.named_modules():
        if plan.get(pattern(name)) == style:
            yield layer


def cut_layers(model: nn.Module, plan: dict[str, str], region: Region) -> None:
    """Cut, in place, every layer that the plan names; `*` in a name stands for a number.

    ValueError: a style that is not known, an entry that matches no layer, heads that the axis does not divide.
    """
    layers = {name: pattern(name) for name, _ in model.named_modules()}
    for entry, style in plan.items():
        if style not in STYLES:
            raise ValueError(f"plan: style {style!r} of {entry!r} is not known; known are {', '.join(STYLES)}")
        if entry not in layers.values():
            near = difflib.get_close_matches(entry, set(layers.values()), 3, 0.4) or sorted(set(layers.values()))[1:6]
            raise ValueError(f"plan: {entry!r} matches no layer; there are {', '.join(near)}")
    if region.sequence and "sequence_split" not in plan.values():
        raise ValueError(
            "sequence_parallel=True needs a plan that says where the sequence is cut: a layer with the "
            "style sequence_split, and sequence_parallel for the norms between"
        )
    entrances: dict[str, Entrance] = {}
    *_, last = layers
    for name, entry in layers.items():
        if entry in plan:
            parent, layer = name.rpartition(".")[0], model.get_submodule(name)
            if parent not in entrances:
                entrances[parent] = Entrance(region.enter)
                model.get_submodule(parent).register_forward_hook(entrances[parent].forget, always_call=True)
            _check_heads(parent, model.get_submodule(parent), layer, plan[entry], region.axis)
            head = STYLES[plan[entry]](layer, region, entrances[parent])
            if head and name == last:  # a gather anywhere else is an ordinary one
                region.heads.append(head)


def _check_heads(name: str, attention: nn.Module, layer: nn.Module, style: str, axis: Axis) -> None:
    """A column cut of an attention must fall between heads."""
    head_dim = getattr(attention, "head_dim", None) or getattr(attention, "attention_head_size", None)
    if head_dim and style == "colwise" and isinstance(layer, nn.Linear):
        heads = layer.out_features // head_dim
        if heads % axis.size:
            fits = [n for n in range(1, heads + 1) if heads % n == 0]
            raise ValueError(f"tp={axis.size} does not divide the {heads} heads of {name}; tp can be one of {fits}")


# -- the loss over a cut vocabulary --------------------------------------------------------------------------

IGNORED = -100  # the label that counts for nothing, as in torch


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The sum over all tokens but those labeled -100, and their number. logits (..., vocab), targets (...)."""
    total = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum", ignore_index=IGNORED)
    return total, (targets != IGNORED).sum()


def vocabulary_parallel_cross_entropy(
    logits: Tensor, targets: Tensor, axis: Axis, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """The same where every rank holds only its share of the logits, (..., vocab/tp). No rank ever holds them all.

    Three numbers a token travel: the largest logit, then the sum of exponentials and the target's logit.
    """
    edges = bounds(vocabulary, axis.size)
    total = _VocabularyParallel.apply(logits.flatten(0, -2), targets.flatten(), axis, edges[axis.index], vocabulary)
    return total, (targets != IGNORED).sum()


class _VocabularyParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, axis: Axis, first: int, vocabulary: int) -> Tensor:
        ctx.dtype = logits.dtype
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        top = all_reduce(logits.amax(-1), axis, "max")  # (N,)
        shares = (logits - top[:, None]).exp_()
        here = (targets >= first) & (targets < first + logits.size(-1))
        counts = targets != IGNORED
        elsewhere = ~counts | ~here & (targets >= 0) & (targets < vocabulary)  # one that is nowhere raises
        place = (targets - first).masked_fill(elsewhere, 0)[:, None]
        target_logit = (logits.gather(-1, place).squeeze(-1) - top) * here
        total, target_logit = all_reduce(torch.stack([shares.sum(-1), target_logit]), axis)
        ctx.save_for_backward(shares.div_(total[:, None]), place, here, counts)
        return ((total.log() - target_logit) * counts).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        probabilities, place, here, counts = ctx.saved_tensors
        gradient = probabilities.scatter_add(-1, place, -here[:, None].to(probabilities.dtype))
        return gradient.mul_((gradients[0] * counts)[:, None]).to(ctx.dtype), None, None, None, None
