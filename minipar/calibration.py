"""Fit what a step costs on this machine to a minute of measurements, and hold predictions against measured steps.

    machine = calibrate(Config(depth=8, width=256))
    print(machine)
    machine.step_seconds(Layout(Mesh(dp=2, pp=2), microbatches=4), rows=16)

    print(compare(machine, Config(depth=8, width=256), [Layout(Mesh(tp=2)), Layout(Mesh(dp=4), zero=1)]))

What is fitted, and what it says where ranks outnumber cores: see `minipar.machine`. Measured are pieces of a step:
what a tensor rank computes with nobody to talk to, and collectives between computations, where a small one takes up to
several times as long as in a loop of its own: ranks are out of step, and threads have gone to sleep. The one whole step
is of data parallelism, one rank a core. All go in rounds, each once a round in random order, and medians count.
"""

import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, product
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from .collectives import Axis, all_reduce, connect, start_all_gather, start_reduce_scatter
from .cost import Layout
from .deferral import Deferral
from .device import default_generator
from .machine import Heard, Machine, Observations, Piece, fit, gathering, reduction
from .mesh import Mesh
from .model import MLP, Config, gpt
from .randomness import Streams
from .rank import cores, here
from .tensor import Region, cross_entropy, cut_layers, vocabulary_parallel_cross_entropy
from .train import parallelize
from .transformer import from_config
from .transport import Alone
from .world import World

WORLDS = (1, 2, 4, 8)  # numbers of ranks that are measured


# -- measuring: on ranks -------------------------------------------------------------------------------------


def _compute(config: Config, tp: int, rows: int) -> list[float]:
    """Seconds of PARTS for what one of `tp` tensor ranks computes, all ranks of this world at a time, and seconds of a
    core. The loss counts as forward."""
    alone = Axis("tp", tuple(range(tp)), 0, Alone())
    model, deferral = gpt(config), Deferral(holds=True)
    loss: Callable[..., Any] = cross_entropy
    if tp > 1:
        region = Region(alone, False, Streams(default_generator(here().device)), deferral)
        cut_layers(model, model.tp_plan, region)
        region.heads[-1].gathers = False
        loss = partial(vocabulary_parallel_cross_entropy, axis=alone, vocabulary=config.vocab)
    tokens = torch.randint(config.vocab, (rows, config.context))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(2):  # the second counts
        dist.barrier()
        before, weights = time.process_time(), deferral.begin()
        moments = [time.perf_counter()]
        with deferral:
            total, _ = loss(model(tokens), tokens)
        moments.append(time.perf_counter())
        deferral.backward([total], [torch.ones_like(total)])
        moments.append(time.perf_counter())
        weights.finish()
        moments.append(time.perf_counter())
    return [*(b - a for a, b in pairwise(moments)), time.process_time() - before]


def _talking(config: Config, line: int, op: str, size: int, calls: int = 6) -> list[float]:
    """Seconds, and seconds of a core, of a call on `size` bytes between forwards of an MLP, in lines of so many ranks,
    all lines at a time."""
    axis = connect(Mesh(dp=here().size // line, tp=line))["tp"]
    x, whole = torch.ones(size // 4), torch.empty(size // 4)
    compute, tokens = MLP(config).requires_grad_(False), torch.randn(2, config.context, config.width)

    def talk() -> None:
        if op == "all_reduce":
            all_reduce(x, axis)
        elif op == "gather":
            start_all_gather(x[: len(x) // line], axis, whole).wait()
        else:
            start_reduce_scatter(x, axis).wait()

    def seconds(talk: Callable[[], None]) -> list[float]:
        dist.barrier()
        before = time.perf_counter(), time.process_time()
        for _ in range(calls):
            compute(tokens)
            talk()
        return [time.perf_counter() - before[0], time.process_time() - before[1]]

    talk()
    return [max(a - b, 1e-6) / calls for a, b in zip(seconds(talk), seconds(lambda: None), strict=True)]


OPS = {"all_reduce": reduction, "gather": gathering, "scatter": gathering}
SIZES = (2**14, 2**21)  # bytes
_models: dict[int, Callable[[], Any]] = {}  # on a rank: the layouts that are measured


def _build(key: int, config: Config, layout: Layout, rows: int) -> None:
    model = parallelize(
        gpt(config),
        layout.mesh,
        schedule=lambda stages, microbatches: layout.order(),
        microbatches=layout.microbatches,
        zero=layout.zero,
        whole_gradients=layout.whole_gradients,
        sequence_parallel=layout.sequence_parallel,
        recompute=layout.recompute,
    )
    tokens = torch.randint(config.vocab, (rows, config.context + 1))
    _models[key] = partial(model.step, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    _models[key]()  # the first one has more to do


def _time(key: int) -> tuple[float, float]:
    dist.barrier()
    start = time.perf_counter()
    _models[key]()
    return start, time.perf_counter()


# -- measuring: from outside ---------------------------------------------------------------------------------

Job = tuple[int, Callable[..., Any], tuple]  # ranks, what they run, with which arguments


def _rounds(worlds: dict[int, World], jobs: Sequence[Job], rounds: int, what: str) -> list[list[list[Any]]]:
    """What all ranks answer to each job in each round. A round runs each once, in random order, so that what slows the
    machine for a while slows all of them."""
    order, answers = random.Random(0), [list[list[Any]]() for _ in jobs]
    for i in tqdm([i for _ in range(rounds) for i in order.sample(range(len(jobs)), len(jobs))], desc=what):
        ranks, function, arguments = jobs[i]
        answers[i].append(worlds[ranks].run(function, *arguments))
    return answers


def _steps(worlds: dict[int, World], config: Config, layouts: Sequence[Layout], rows: int) -> list[Job]:
    """Build the layouts in their Worlds. The jobs run a step of each."""
    jobs: list[Job] = []
    for key, layout in enumerate(tqdm(layouts, desc="building")):
        worlds[layout.mesh.size].run(_build, key, config, layout, rows)
        jobs.append((layout.mesh.size, _time, (key,)))
    return jobs


def _length(rounds: list[list[Any]]) -> float:
    """Median seconds from the first rank's start to the last one's end."""
    return statistics.median(max(ends) - min(starts) for starts, ends in (zip(*all_, strict=True) for all_ in rounds))


def _slowest(rounds: list[list[Any]]) -> list[float]:
    """Median seconds of the slowest rank, number by number."""
    slowest = [[max(number) for number in zip(*ranks, strict=True)] for ranks in rounds]
    return [statistics.median(number) for number in zip(*slowest, strict=True)]


@contextmanager
def _worlds(ranks: Iterable[int]) -> Iterator[dict[int, World]]:
    with ExitStack() as stack:
        yield {n: stack.enter_context(World(n)) for n in sorted(set(ranks))}


def measure(config: Config, layouts: Sequence[Layout], rows: int = 16, rounds: int = 5) -> list[float]:
    """Median seconds of a step of each layout."""
    with _worlds(layout.mesh.size for layout in layouts) as worlds:
        return [_length(some) for some in _rounds(worlds, _steps(worlds, config, layouts, rows), rounds, "measuring")]


def observe(config: Config, rows: int = 16, ranks: Sequence[int] = WORLDS, rounds: int = 4) -> Observations:
    """Measure what a fit needs, in Worlds of so many ranks. The number of cores has to be one of them."""
    few, layout = max(rows // 8, 1), Layout(Mesh(dp=cores()))
    rows = -(-rows // cores()) * cores()  # so that every rank of the step gets as many
    shapes = list(product((1, min(config.heads, 4)), (1, config.depth), (few, 4 * few)))
    lines = [(n, line) for n in ranks for line in ranks if 1 < line <= n and n % line == 0]
    talks = [(n, line, op, size // (4 * line) * 4 * line) for n, line in lines for op in OPS for size in SIZES]
    jobs: list[Job] = [(n, _compute, (config, 1, few)) for n in ranks]
    jobs += [(cores(), _compute, (replace(config, depth=blocks), tp, some)) for tp, blocks, some in shapes]
    jobs += [(n, _talking, (config, line, op, size)) for n, line, op, size in talks]
    with _worlds(ranks) as worlds:
        jobs += _steps(worlds, config, [layout], rows)
        *answers, steps = _rounds(worlds, jobs, rounds, "calibrating")
    numbers = [_slowest(some) for some in answers]
    crowds = {n: (sum(parts), effort) for n, (*parts, effort) in zip(ranks, numbers, strict=False)}
    pieces = [Piece(*shape, tuple(s[:-1])) for shape, s in zip(shapes, numbers[len(ranks) :], strict=False)]
    heard = [
        Heard(n, OPS[op](size, line), *seconds)
        for (n, line, op, size), seconds in zip(talks, numbers[len(ranks) + len(shapes) :], strict=True)
    ]
    return Observations(from_config(config), cores(), pieces, crowds, heard, (layout, rows, _length(steps)))


def calibrate(config: Config, rows: int = 16, ranks: Sequence[int] = WORLDS) -> Machine:
    """Fit this machine's costs of the model. Takes about a minute, in which nothing else should run."""
    return fit(observe(config, rows, ranks))


# -- predicted against measured ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Seconds of a step, predicted and measured."""

    layouts: list[Layout]
    predicted: list[float]
    measured: list[float]

    @property
    def errors(self) -> list[float]:
        return [p / m - 1 for p, m in zip(self.predicted, self.measured, strict=True)]

    @property
    def median_error(self) -> float:
        return statistics.median(map(abs, self.errors))

    @property
    def names(self) -> list[str]:
        return [name(layout) for layout in self.layouts]

    def __str__(self) -> str:
        wide = max(map(len, self.names))
        lines = [f"{'':<{wide}}  predicted  measured   error"]
        for row in zip(self.names, self.predicted, self.measured, self.errors, strict=True):
            lines.append("{:<{wide}}  {:7.3f} s {:7.3f} s  {:+6.1%}".format(*row, wide=wide))
        sizes = sorted(map(abs, self.errors))
        within = ", ".join(f"{sum(e <= mark for e in sizes)} within {mark:.0%}" for mark in (0.05, 0.1, 0.15, 0.25))
        return "\n".join([*lines, f"error: median {self.median_error:.1%}, largest {sizes[-1]:.1%}; {within}"])


def name(layout: Layout) -> str:
    """A layout in a few words, without what is as by default."""
    mesh = " ".join(f"{axis}={size}" for axis, size in layout.mesh.shape.items() if size > 1) or "one rank"
    words = [mesh, f"m={layout.microbatches}"]
    if layout.mesh.pp > 1:
        words.append(layout.schedule)
    words += [f"ZeRO-{layout.zero}"] * bool(layout.zero) + ["sequence"] * layout.sequence_parallel
    return " ".join(words + [f"recompute {layout.recompute}"] * (layout.recompute != "none"))


def compare(machine: Machine, config: Config, layouts: Sequence[Layout], rows: int = 16, rounds: int = 5) -> Comparison:
    """Predict all layouts, then measure them."""
    predicted = [machine.step_seconds(layout, rows) for layout in layouts]
    return Comparison(list(layouts), predicted, measure(config, layouts, rows, rounds))
