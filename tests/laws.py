"""What the tests of the laws share: one process to compare with, and the comparison. Ranks import it: keep it small."""

from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import minipar
from minipar import Config, Mesh, cut
from minipar.model import MoE

LEARNING_RATE = 0.5


def model_of(config: Config, seed: int = 0) -> nn.Module:
    """A small GPT in float64, away from its initial point, where some gradients are close to nothing."""
    torch.manual_seed(seed)
    return stirred(minipar.gpt(config).double())


def weighed(model: nn.Module, targets: Tensor) -> nn.Module:
    """In one process experts are to be balanced as on a mesh: a token weighs in that what a label does in the loss."""
    for layer in model.modules():
        if isinstance(layer, MoE):
            layer.token_weight = 1 / (targets != -100).sum().item()
    return model


def stirred(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def batch_of(config: Config, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets. Rows have unequal numbers of labels that count, so a mean of means is wrong."""
    draw = torch.Generator().manual_seed(1)
    tokens, targets = (torch.randint(config.vocab, (rows, length), generator=draw) for _ in range(2))
    ignored = torch.arange(length) < torch.arange(rows)[:, None] * (length // 2 + 1) % (length + 1)
    return tokens, targets.masked_fill(ignored, -100)


@dataclass(frozen=True)
class Case:
    """One layout of one model."""

    mesh: Mesh
    config: Config
    schedule: Callable[..., Any] = minipar.one_f_one_b
    microbatches: int = 1
    sequence: bool = False
    rows: int = 8
    length: int = 8

    def __str__(self) -> str:
        marks = ["sequence"] * self.sequence + ["tied"] * self.config.tied
        name = getattr(self.schedule, "__name__", str(self.schedule))
        return " ".join([str(self.mesh), name, f"microbatches={self.microbatches}", *marks])

    def lay_out(self, model: nn.Module, **options: Any) -> Any:
        """The model on this case's mesh; called on a rank."""
        return minipar.parallelize(
            model,
            self.mesh,
            schedule=self.schedule,
            microbatches=self.microbatches,
            sequence_parallel=self.sequence,
            **options,
        )


@dataclass
class Answer:
    """What one step gave: the loss, the gradients, and what plain SGD made of the weights (on a rank: of its own)."""

    loss: float
    gradients: dict[str, Tensor]
    after: dict[str, Tensor]


def mean_cross_entropy(output: Any, targets: Tensor) -> Tensor:
    """torch's own, over the labels that count."""
    logits = getattr(output, "logits", output)
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def alone(model: nn.Module, inputs: Any, targets: Any, loss: Callable[..., Tensor] = mean_cross_entropy) -> Answer:
    """One step of plain torch in one process. Changes the model."""
    value = loss(model(**inputs) if isinstance(inputs, dict) else model(inputs), targets)
    value.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in trained.items()}
    torch.optim.SGD(trained.values(), LEARNING_RATE).step()
    return Answer(value.item(), gradients, {name: p.detach().clone() for name, p in model.named_parameters()})


def laid_out(parallel: Any, inputs: Any, targets: Any = None, whole: bool = True, **options: Any) -> Answer:
    """The same step over the mesh. whole: gradients put together, by communication; else this rank's own shares."""
    loss = parallel.step(inputs, targets, **options)
    gradients = parallel.full_gradients() if whole else own_gradients(parallel)
    torch.optim.SGD(parallel.parameters(), LEARNING_RATE).step()
    return Answer(loss.item(), gradients, {name: p.detach().clone() for name, p in parallel.named_parameters()})


def own_gradients(parallel: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in parallel.named_parameters() if p.requires_grad}


def broken_laws(
    parallel: Any, got: Answer, wanted: Answer, before: dict[str, Tensor], whole: bool = True
) -> dict[str, str]:
    """Law -> what is wrong with it; empty if all is well. before: the weights of the model that was laid out."""
    problems = {}
    if not abs(got.loss - wanted.loss) <= 1e-12 * abs(wanted.loss):
        problems["loss"] = f"{got.loss!r} for {wanted.loss!r}"
    gradients, largest = wanted.gradients, max(g.abs().max().item() for g in wanted.gradients.values())
    if not whole:
        gradients = {name: share(parallel, name, gradients[name]) for name in own_gradients(parallel)}
    if wrong := differences(got.gradients, gradients, largest=largest):
        problems["gradients"] = wrong
    # This rank's own weights. They are rounded, so a small change of a large weight is not exact: take those that move.
    moved = {name: after - share(parallel, name, before[name]) for name, after in got.after.items()}
    should = {name: share(parallel, name, wanted.after[name] - before[name]) for name in got.after}
    if wrong := differences(moved, should, smallest=1e-4, largest=LEARNING_RATE * largest):
        problems["step"] = wrong
    return problems


def share(parallel: Any, name: str, whole: Tensor) -> Tensor:
    """What this rank updates of a parameter."""
    mine = cut.take(parallel.here[name], whole)
    return parallel.units[name].take(name, mine) if name in parallel.units else mine


def differences(
    got: dict[str, Tensor], wanted: dict[str, Tensor], smallest: float = 1e-9, largest: float | None = None
) -> str:
    """How gradients break the law, or "": no element is off by more than 1e-12 of the model's largest, and no
    parameter by more than 1e-10 of its own norm, unless that is below `smallest` of the largest."""
    if got.keys() != wanted.keys():
        return f"keys differ: {sorted(got.keys() ^ wanted.keys())}"
    largest = largest or max(y.abs().max().item() for y in wanted.values())
    wrong = []
    for name, y in wanted.items():
        if got[name].shape != y.shape:
            wrong.append(f"{name} has shape {tuple(got[name].shape)} for {tuple(y.shape)}")
            continue
        off, norm = got[name] - y, y.norm().item()
        if not off.abs().max().item() <= 1e-12 * largest:
            wrong.append(f"{name} is off by {off.abs().max().item() / largest:.1e} of the largest gradient")
        elif norm > smallest * largest and not off.norm().item() <= 1e-10 * norm:
            wrong.append(f"{name} is off by {off.norm().item() / norm:.1e} of its norm")
    return f"{len(wrong)} of {len(wanted)} parameters: {'; '.join(wrong[:3])}" if wrong else ""


@contextmanager
def double_precision():
    """Some models compute parts in float32 on purpose; here they do it in float64, so that parity is to rounding."""
    import minipar.checkpoint  # noqa: F401  what it imports makes tables of dtypes, once: not in here

    single, to_single = torch.float32, Tensor.float
    torch.float32 = torch.float = torch.float64
    Tensor.float = Tensor.double
    try:
        yield
    finally:
        torch.float32 = torch.float = single
        Tensor.float = to_single


def problems(
    world: Any,
    layouts: list[dict[str, Any]],
    make: Callable[[], nn.Module],
    inputs: Any,
    targets: Any,
    mean: Callable[..., Tensor] = mean_cross_entropy,
    prepare: Callable[[Any, Any, Any], tuple] = lambda parallel, inputs, targets: (inputs, targets),
    **options: Any,
) -> list[str]:
    """How a step of a model on some layouts differs from the same step in one process.

    mean: the loss in one process. prepare: on a rank, (parallel, inputs, targets) -> arguments of `step`, the last
    of them a dict if it is one of options. options: for parallelize, beside those of each layout.
    """
    wanted = alone(make(), inputs, targets, mean)
    layouts = [options | layout for layout in layouts]
    found = world.run(_compare, layouts, make, inputs, targets, prepare, wanted)
    return [
        f"{layout['mesh']}, rank {rank}: {law}: {what}"
        for rank, answers in enumerate(found)
        for layout, laws in zip(layouts, answers, strict=True)
        for law, what in laws.items()
    ]


def _compare(
    layouts: list[dict[str, Any]], make: Callable, inputs: Any, targets: Any, prepare: Callable, wanted: Answer
) -> list[dict[str, str]]:
    answers = []
    for layout in layouts:
        model = make()
        parallel = minipar.parallelize(model, **layout)
        inputs_here, targets_here, *more = prepare(parallel, inputs, targets)
        got = laid_out(parallel, inputs_here, targets_here, **(more[0] if more else {}))
        answers.append(broken_laws(parallel, got, wanted, dict(model.named_parameters())))
    return answers


class Planted:
    """A world whose ranks run everything with a bug."""

    def __init__(self, world, bug):
        self.world, self.bug = world, bug

    def run(self, work, *args, **options):
        bug = self.bug

        def with_bug():
            with bug() if bug else ExitStack():
                return work(*args, **options)

        return self.world.run(with_bug)
