"""Tensor parallelism: weights are cut along one axis, the model stays as it was.

A plan is a dict from layer name to style, with the style names that transformers publishes. Modules keep their place
and their name; only the forward of a layer that is cut changes. `*` in a name stands for a number, and a name may be a
parameter's. A style may have arguments: "packed_colwise(3)".
"""

import difflib
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .collectives import SEQUENCE, Axis, all_reduce, bounds, enter, enter_sequence, gather, leave, leave_sequence, split
from .cut import cut, is_cut
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

    def product(self, x: Tensor, layer: Any, bias: Tensor | None = None) -> Tensor:
        """What a linear layer gives, (..., in) -> (..., out)."""
        if not _is_transposed(layer):
            return self.deferral.linear(x, layer.weight, bias)
        y = x @ layer.weight
        return y if bias is None else y + bias


def _is_transposed(layer: nn.Module) -> bool:
    """nn.Linear's weight is (out, in). A layer whose weights are (..., in, out) says so."""
    return getattr(layer, "is_transposed", False)


def _out_dim(layer: nn.Module) -> int:
    return -1 if _is_transposed(layer) else -2


def _in_dim(layer: nn.Module) -> int:
    return -2 if _is_transposed(layer) else -1


def _is_plain(layer: nn.Module, kind: type[nn.Module]) -> None:
    """ValueError for a layer whose own forward a style would replace."""
    if type(layer).forward is not kind.forward and not _is_transposed(layer):
        inside = ", ".join(name for name, _ in layer.named_children())
        instead = f": let the plan name the layers in it, {inside}" if inside else ""
        raise ValueError(
            f"{type(layer).__name__} has a forward of its own, so it cannot be cut as nn.{kind.__name__} is{instead}"
        )


def colwise(layer: nn.Linear, region: Region, entrance: Entrance, sections: Sequence[int] = ()) -> None:
    """Cut the outputs, or each section of them: (..., in) -> (..., out/tp)."""
    _is_plain(layer, nn.Linear)
    cut(layer, "weight", _out_dim(layer), region.axis, sections)
    cut(layer, "bias", 0, region.axis, sections)

    def forward(x: Tensor) -> Tensor:
        y = region.product(entrance(x), layer, layer.bias)
        region.streams.go(inside=True)
        return y

    layer.forward = forward


def packed_colwise(layer: nn.Linear, region: Region, entrance: Entrance, *sections: str) -> None:
    """The same for several matrices in one (q, k and v; gate and up): packed_colwise is of two halves,
    packed_colwise(3) of three thirds, packed_colwise(64, 16, 16) of parts of these sizes."""
    colwise(layer, region, entrance, sizes(sections, layer.weight.size(_out_dim(layer))))


def sizes(sections: Sequence[str], total: int) -> list[int]:
    """The sizes of what is packed into one. ValueError if they are not `total` together."""
    numbers = [int(n) for n in sections] or [2]
    found = numbers if len(numbers) > 1 else [total // numbers[0]] * numbers[0]
    if sum(found) != total:
        raise ValueError(f"parts {', '.join(map(str, found))} are {sum(found)} together, and the layer has {total}")
    return found


def colwise_for_some_heads(layer: nn.Linear, region: Region, entrance: Entrance, features: Tensor) -> None:
    """Keys or values of fewer heads than there are ranks: each computes them all, and goes on with `features` of them,
    those that its queries read. (Not for plans: a colwise layer becomes this where it has to.)"""
    replicated_with_grad_allreduce(layer, region, entrance)

    def forward(x: Tensor) -> Tensor:
        y = region.product(entrance(x), layer, layer.bias)[..., features.to(x.device)]
        region.streams.go(inside=True)
        return y

    layer.forward = forward


@dataclass
class Head:
    """A cut layer that gives the model's output: whole, or left as shares of the vocabulary for the loss."""

    vocabulary: int
    gathers: bool = True


def colwise_gather_output(layer: Any, region: Region, entrance: Entrance) -> Head:
    """Cut the outputs, then put them together: (..., in) -> (..., out)."""
    _is_plain(layer, nn.Linear)
    head = Head(
        layer.nf if _is_transposed(layer) else layer.out_features
    )  # its weight may be cut already, if it is tied
    cut(layer, "weight", _out_dim(layer), region.axis)
    cut(layer, "bias", 0, region.axis)

    def forward(x: Tensor) -> Tensor:
        weight = layer.weight.t() if _is_transposed(layer) else layer.weight
        y = F.linear(entrance(x), weight, layer.bias)
        return gather(y, region.axis, size=head.vocabulary) if head.gathers else y

    layer.forward = forward
    return head


def rowwise(layer: nn.Linear, region: Region, entrance: Entrance) -> None:
    """Cut the inputs: (..., in/tp) -> (..., out). Each rank has a partial sum; the bias is added once, after it."""
    _is_plain(layer, nn.Linear)
    cut(layer, "weight", _in_dim(layer), region.axis)

    def forward(x: Tensor) -> Tensor:
        region.streams.go(inside=False)
        y = region.leave(region.product(x, layer))
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
    if not hasattr(layer, "embed_scale"):  # one that looks up and then scales
        _is_plain(layer, nn.Embedding)
    edges = bounds(layer.num_embeddings, region.axis.size)
    first, end = edges[region.axis.index], edges[region.axis.index + 1]
    if layer.max_norm is not None or layer.scale_grad_by_freq:
        raise ValueError("an embedding with max_norm or scale_grad_by_freq cannot be cut: leave it out of the plan")
    cut(layer, "weight", 0, region.axis)
    padding, inner = layer.padding_idx, layer.forward
    layer.padding_idx = None if padding is None or not first <= padding < end else padding - first

    def forward(ids: Tensor) -> Tensor:  # (B, T) -> (B, T, C)
        here = (ids >= first) & (ids < end)
        elsewhere = ~here & (ids >= 0) & (ids < layer.num_embeddings)  # an id that is nowhere stays, and raises
        local = (ids - first).masked_fill(elsewhere, 0)
        return leave(inner(local) * here.unsqueeze(-1), region.axis)

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
    """Experts side by side. Entries for their parameters cut these along the hidden width. What goes in (tokens, and
    perhaps what an expert weighs for each) is the same on every rank, and each has a partial sum of what comes out."""
    for name, parameter in layer.named_parameters():
        if parameter.dim() > 1 and not is_cut(parameter, region.axis):
            raise ValueError(
                f"moe_tp_experts sums what ranks have of experts, but the plan does not cut their {name!r}"
            )
    inner = layer.forward

    def into(x: Tensor) -> Tensor:
        return enter(x, region.axis, meanwhile=region.deferral.meanwhile) if x.is_floating_point() else x

    layer.forward = lambda *arguments: leave(inner(*map(into, arguments)), region.axis)


def mla_kv_a_proj(layer: nn.Module, region: Region, entrance: Entrance, rotary: str) -> None:
    """What keys and values are made of (multi-head latent attention, DeepSeek-V2): the last `rotary` of its features go
    to the heads of every rank as they are, the others by a layer that is cut."""
    inner = layer.forward

    def forward(x: Tensor) -> Tensor:
        latent, position = inner(x).tensor_split([-int(rotary)], -1)
        return torch.cat([latent, enter(position, region.axis)], -1)

    layer.forward = forward


def divided(layer: Any, region: Region, entrance: Entrance, *names: str) -> None:
    """A layer that knows by numbers how wide it is (heads, features): each rank has its share of them."""
    for name in names:
        value, ranks = getattr(layer, name), region.axis.size
        if value % ranks:
            raise ValueError(f"{region.axis.name}={ranks} does not divide {name}={value} of {type(layer).__name__}")
        setattr(layer, name, value // ranks)


def all_reduce_output(layer: nn.Module, region: Region, entrance: Entrance) -> None:
    """A layer that gives a partial sum."""
    inner = layer.forward
    layer.forward = lambda *arguments, **more: leave(inner(*arguments, **more), region.axis)


def replicate(layer: nn.Module, region: Region, entrance: Entrance) -> None:
    """Whole on every rank, and so is its gradient. What it draws is the same, too, even between cut layers."""
    inner = layer.forward

    def forward(*arguments: Any, **more: Any) -> Any:
        inside = region.streams.inside
        region.streams.go(inside=False)
        y = inner(*arguments, **more)
        region.streams.go(inside)
        return y

    layer.forward = forward


STYLES: dict[str, Callable[..., Head | None]] = {
    style.__name__: style
    for style in (
        colwise,
        packed_colwise,
        colwise_gather_output,
        rowwise,
        rowwise_split_input,
        embedding_rowwise,
        replicated_with_grad_allreduce,
        sequence_parallel,
        sequence_split,
        sequence_gather,
        moe_tp_experts,
        mla_kv_a_proj,
        divided,
        replicate,
    )
} | {"all_reduce": all_reduce_output}


# Where a plan names a parameter, its layer's forward stays as it is. What counts is the dim, whatever it means there.
DIMS = {"colwise": -2, "packed_colwise": -2, "rowwise": -1, "packed_rowwise": -1}
PARAMETER_STYLES = (*DIMS, "replicated_with_grad_allreduce", "replicate")


def cut_parameter(owner: nn.Module, name: str, region: Region, style: str, *sections: str) -> None:
    parameter = getattr(owner, name)
    if style in DIMS:
        dim = max(DIMS[style], -parameter.dim())
        packed = sizes(sections, parameter.size(dim)) if style.startswith("packed") else ()
        cut(owner, name, dim, region.axis, packed)
    elif style == "replicated_with_grad_allreduce":
        _mark_partial(parameter)


# -- plans -----------------------------------------------------------------------------------------------------


def pattern(name: str) -> str:
    """What a plan calls a layer: `*` stands for a number."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def layers_of_style(model: nn.Module, plan: dict[str, str], style: str) -> Iterator[nn.Module]:
    """The layers for which a plan has this style."""
    for name, layer in model.named_modules():
        if plan.get(pattern(name)) == style:
            yield layer


def cut_layers(model: nn.Module, plan: dict[str, str], region: Region) -> None:
    """Cut, in place, every layer and parameter that the plan names.

    ValueError: a style that is not known, an entry that matches nothing, heads that the axis does not divide; and what
    would be wrong without a word: a weight that is cut and that another layer uses, too, or a norm of heads left out.
    """
    layers, parameters = dict(model.named_modules()), dict(model.named_parameters(remove_duplicate=False))
    _check_entries(plan, {pattern(name) for name in layers}, {pattern(name) for name in parameters})
    if region.sequence and "sequence_split" not in plan.values():
        raise ValueError(
            "sequence_parallel=True needs a plan that says where the sequence is cut: a layer with the "
            "style sequence_split, and sequence_parallel for the norms between"
        )
    styles = {name: parse(plan[pattern(name)]) for name in (*layers, *parameters) if pattern(name) in plan}
    for name in parameters:
        if name in styles:
            owner, _, own_name = name.rpartition(".")
            cut_parameter(layers[owner], own_name, region, *styles[name])
    siblings: dict[str, dict[str, tuple[str, ...]]] = defaultdict(dict)
    for name in layers:
        if name in styles:
            siblings[name.rpartition(".")[0]][name] = styles[name]
    *_, last = layers
    for parent, children in siblings.items():
        entrance = Entrance(region.enter)
        layers[parent].register_forward_hook(entrance.forget, always_call=True)
        few = _few_heads(parent, layers[parent], children, region.axis)
        _check_left_out(parent, layers[parent], styles)
        for name, (style, *arguments) in children.items():
            if name in few:
                colwise_for_some_heads(layers[name], region, entrance, few[name])
            elif (head := STYLES[style](layers[name], region, entrance, *arguments)) and name == last:
                added = any(x.shape[-1:] == (head.vocabulary,) for x in model.buffers(recurse=False))  # to whole logits
                region.heads += [head] * (not added)  # a gather anywhere else is an ordinary one
    _check_ties(layers, styles, region.axis)


def parse(style: str) -> tuple[str, ...]:
    """ "packed_colwise(3)" -> ("packed_colwise", "3")"""
    name, _, arguments = style.removesuffix(")").partition("(")
    return (name, *(x.strip() for x in arguments.split(",") if x.strip()))


def _check_entries(plan: dict[str, str], layers: set[str], parameters: set[str]) -> None:
    for entry, style in plan.items():
        known = PARAMETER_STYLES if entry in parameters - layers else STYLES
        if parse(style)[0] not in known:
            raise ValueError(f"plan: {entry!r} cannot be {style!r}, only {', '.join(known)}")
        if entry not in layers | parameters:
            near = difflib.get_close_matches(entry, layers, 3, 0.4) or sorted(layers)[1:6]
            raise ValueError(f"plan: {entry!r} matches no layer; there are {', '.join(near)}")


def _check_ties(layers: dict[str, nn.Module], styles: dict[str, tuple[str, ...]], axis: Axis) -> None:
    for owner, layer in layers.items():
        for name, parameter in layer.named_parameters(recurse=False):
            if is_cut(parameter, axis) and parameter.dim() > 1 and not {owner, f"{owner}.{name}"} & styles.keys():
                raise ValueError(f"plan: {owner!r} has the weight of a layer that is cut, so it needs a style, too")


def _few_heads(name: str, attention: Any, styles: dict[str, tuple[str, ...]], axis: Axis) -> dict[str, Tensor]:
    """A column cut of an attention must fall between heads. Keys and values may have fewer heads than there are ranks:
    layer -> the features of them that this rank's queries read, a head for each."""
    size = _head_size(attention)
    heads = {layer: _heads(attention, layer, style, size) for layer, style in styles.items()} if size else {}
    queries, few = max(chain(*heads.values()), default=0), {}
    for layer, counts in heads.items():
        if all(n % axis.size == 0 for n in counts):
            continue
        groups = getattr(attention, "num_key_value_groups", 1)
        if groups == 1 or counts != [queries // groups] or queries % axis.size:
            n = next(n for n in counts if n % axis.size)
            fits = [ranks for ranks in range(1, n + 1) if n % ranks == 0]
            raise ValueError(
                f"{axis.name}={axis.size} does not divide the {n} heads of {name}; it can be one of {fits}"
            )
        read = torch.arange(queries).chunk(axis.size)[axis.index] // groups
        few[layer] = (read[:, None] * size + torch.arange(size)).flatten()
    if few:
        attention.num_key_value_groups = 1  # each query has a head of keys for itself
    return few


def _head_size(attention: Any) -> int:
    """Features of a head; 0 for a layer that is no attention."""
    return getattr(attention, "head_dim", None) or getattr(attention, "attention_head_size", None) or 0


def _heads(attention: nn.Module, name: str, style: tuple[str, ...], size: int) -> list[int]:
    """How many heads a layer gives, for each of the parts that are packed into it; none if it is not cut by heads."""
    layer: Any = attention.get_submodule(name.rpartition(".")[2])
    if style[0] not in ("colwise", "packed_colwise"):
        return []
    _is_plain(layer, nn.Linear)
    width = layer.weight.size(_out_dim(layer))
    return [n // size for n in (sizes(style[1:], width) if style[0] == "packed_colwise" else [width])]


def _check_left_out(name: str, parent: nn.Module, styles: dict[str, tuple[str, ...]]) -> None:
    """A norm of heads that stands between cut layers, or an activation with a number of its own, sees this rank's part
    only, so its gradients are partial sums. If the plan did not say so, nothing would tell."""
    cut_here = {styles[f"{name}.{child}"][0] for child, _ in parent.named_children() if f"{name}.{child}" in styles}
    size = _head_size(parent)
    deeper = any("." in x.removeprefix(f"{name}.") for x in styles if x.startswith(f"{name}."))
    if not {"colwise", "rowwise"} <= cut_here or deeper:
        return
    for child, layer in parent.named_children():
        own = [p for p in layer.parameters(recurse=False) if p.numel() == 1 or p.shape[-1:] == (size,)]
        if own and f"{name}.{child}" not in styles and not isinstance(layer, nn.Linear):
            entry = pattern(f"{name}.{child}")
            raise ValueError(
                f"plan: {entry!r} is left out, but layers around it are cut. plan=interop.plan_of(model) | "
                f"{{{entry!r}: style}}; 'replicated_with_grad_allreduce' where it sees a part, so that its gradients "
                "are partial sums, 'replicate' where all ranks see the same"
            )


# -- the loss over a cut vocabulary --------------------------------------------------------------------------

IGNORED = -100  # the label that counts for nothing, as in torch


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The sum over all tokens but those labeled -100, and their number. logits (..., vocab), targets (...). A sum of 16
    bits would be worth little: it is made in 32."""
    targets = _class_numbers(targets, logits)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum", ignore_index=IGNORED)
    return total, (targets != IGNORED).sum()


def vocabulary_parallel_cross_entropy(
    logits: Tensor, targets: Tensor, axis: Axis, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """The same where every rank holds only its share of the logits, (..., vocab/tp). No rank ever holds them all.

    Three numbers a token travel: the largest logit, then the sum of exponentials and the target's logit.
    """
    targets = _class_numbers(targets, logits, vocabulary)
    edges = bounds(vocabulary, axis.size)
    total = _VocabularyParallel.apply(logits.flatten(0, -2), targets.flatten(), axis, edges[axis.index], vocabulary)
    return total, (targets != IGNORED).sum()


def _class_numbers(targets: Tensor, logits: Any, classes: int = 0) -> Tensor:
    """The targets, if they fit the logits, as what torch can look up. Classes are as many as a row has logits, or as
    given. ValueError names the first target that is none of them, TypeError outputs that are no logits."""
    if not isinstance(logits, Tensor):
        what = "the default loss takes logits: give a model that has a head for its task, or loss=f of its outputs"
        raise TypeError(f"the model's output is a {type(logits).__name__} without logits, and {what}")
    classes = classes or logits.size(-1)
    if targets.numel() != logits.numel() // logits.size(-1):
        what = "each row of logits needs one target"
        raise ValueError(f"targets {tuple(targets.shape)} for logits {(*logits.shape[:-1], classes)}: {what}")
    numbers = targets.long()
    if targets.device.type == "cpu":  # a GPU would have to be waited for
        strange = (numbers != targets) | (numbers != IGNORED) & ((numbers < 0) | (numbers >= classes))
        if strange.any():
            what = f"class numbers from 0 to {classes - 1}, or {IGNORED} for what does not count"
            raise ValueError(f"targets have {targets[strange][0].item()}: they must be {what}")
    return numbers


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
