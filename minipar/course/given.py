"""What exercises work on: a small GPT in float64, eight rows of text, and what one process gets for them."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import corpus
from ..collectives import connect
from ..mesh import Mesh
from ..model import Config, gpt
from ..world import World

CONTEXT = 32
ROWS = 8


def fresh_model(depth: int = 1, **changes: Any) -> nn.Module:
    """The same GPT with the same weights, whoever calls. `changes` are those of Config."""
    torch.manual_seed(0)
    return gpt(Config(context=CONTEXT, depth=depth, width=32, heads=4, **changes)).double()


def rows_of_text() -> tuple[Tensor, Tensor]:
    """Tokens and targets, (8, 32) each. A target is the token that comes next."""
    text = torch.tensor(corpus.tokenizer().encode(corpus.text()[:2000]).ids)
    size = ROWS * CONTEXT
    return text[:size].view(ROWS, CONTEXT), text[1 : size + 1].view(ROWS, CONTEXT)


tokens, targets = rows_of_text()


def padded(lengths: list[int]) -> Tensor:
    """The targets of rows of these lengths: what is behind them is not labeled (-100)."""
    return targets.masked_fill(torch.arange(CONTEXT) >= torch.tensor(lengths)[:, None], -100)


def total_loss(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy, summed over the labeled tokens. A target of -100 is not labeled (padding). -> 0-d"""
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="sum")


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """The gradient of each parameter, by its name."""
    return {name: p.grad for name, p in model.named_parameters()}


def one_process(tokens: Tensor, targets: Tensor, depth: int = 1, **changes: Any) -> dict[str, Tensor]:
    """Gradients of the mean loss over all labeled tokens of the batch, by parameter name."""
    model = fresh_model(depth, **changes)
    (total_loss(model, tokens, targets) / (targets != -100).sum()).backward()
    return gradients(model)  # type: ignore[return-value]


def loss_of_one_process(targets: Tensor, depth: int = 1, **changes: Any) -> float:
    """The mean loss over the labeled tokens."""
    model = fresh_model(depth, **changes)
    return float((total_loss(model, tokens, targets) / (targets != -100).sum()).detach())


def along(
    world: World, name: str, function: Callable[..., Any], *args: Any, size: int | None = None, limit: float = 15
) -> list[Any]:
    """What function(axis, *args) returns on each rank of the world, `axis` being the one of this name.

    size: of the axis, by default all ranks. With fewer there are several lines of ranks, and each does the same: the
    ranks of the first line are those at [:: world.n // size] along an outer axis, at [:size] along tp.
    """
    size = size or world.n
    other = "dp" if name == "tp" else "tp"
    mesh = Mesh(**{name: size, other: world.n // size})
    return world.run(lambda: function(connect(mesh)[name], *args), limit=limit)
