"""What a step costs on this machine: fitted to a minute of measurements, predicted for layouts that were not measured.

    machine = calibrate(Config(depth=8, width=256))
    print(machine)
    machine.step_seconds(Layout(Mesh(dp=2, pp=2), microbatches=4), rows=16)

Work. One microbatch takes a rank so many seconds a call, a block, an element of what is between cut layers (norms and
sums, which every tensor rank computes whole), a FLOP (with what is cut as matrix products are, GELU for one), and a
logit. These are fitted to shares of the model as one tensor rank has them, cut by the engine, with nobody to talk to.

Talk. A collective takes so many seconds a call, a message (alpha) and a byte that a rank sends (beta), with every line
of the mesh talking. It is measured between computations, where it takes two to three times as long as in a loop of its
own: ranks are out of step, and the threads that carry it have gone to sleep. What travels over the data axis hides
behind computation as far as it did in one measured step of dp=2.

Sharing. Where ranks outnumber cores, those that compute share them: n of them on c cores each go on at c/n of their
speed (processor sharing). So eight data ranks on two cores are no faster than two, they only talk more. A pipeline is
another matter: while one rank waits for its input another has its core, so a bubble costs nothing as long as there are
as many ranks with work as cores. What changing between ranks costs beyond that is `crowd`.

Left out: the optimizer, which `step` does not run; selective recompute; experts and a context axis.
"""

import json
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.nn.functional import gelu
from tqdm import tqdm

from .collectives import Axis, all_reduce, connect, start_all_gather, start_reduce_scatter
from .cost import Formats, Layout, Share, all_reduce_bytes, forward_flops, gather_bytes, shares
from .data import BUCKET
from .deferral import Deferral
from .device import default_generator
from .mesh import Mesh
from .model import Config, gpt
from .randomness import Streams
from .rank import cores, here
from .schedule import Action
from .tensor import Region, cross_entropy, cut_layers, vocabulary_parallel_cross_entropy
from .timeline import Costs, Timeline, simulate
from .train import parallelize
from .transformer import Transformer, from_config
from .transport import Alone
from .world import World

FP32 = Formats(4, 4, 8, 4)
WORLDS = (1, 2, 4, 8)  # numbers of ranks that are measured
PARTS = ("forward", "backward_input", "backward_weight")


# -- what is fitted ------------------------------------------------------------------------------------------


def _product(some: Sequence[float], others: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(some, others, strict=True))


class Sizes(NamedTuple):
    """What one rank computes for one microbatch on one stage, counted; or the seconds of one of each."""

    call: float
    block: float
    element: float
    flop: float
    logit: float


def sizes(model: Transformer, blocks: int, last: bool, tokens: float, whole: float, context: int, tp: int) -> Sizes:
    """blocks, last: what the stage has, the head with the last. tokens: of the microbatch; whole: those that this rank
    has between cut layers."""
    flops = forward_flops(model, context)
    products = blocks / model.layers * (flops["matrices"] + flops["attention"]) + last * flops["head"]
    logits = last * tokens * model.vocabulary / tp
    return Sizes(1, blocks, blocks * whole * model.hidden, products * tokens / tp, logits)


class Talk(NamedTuple):
    """What a collective takes: calls, messages one after the other, bytes sent; or the seconds of one of each."""

    call: float
    message: float
    byte: float


def reduction(size: float, ranks: int) -> Talk:
    """An all-reduce of `size` bytes in a ring."""
    return Talk(1, 2 * (ranks - 1), all_reduce_bytes(size, ranks))


def gathering(size: float, ranks: int) -> Talk:
    """An all-gather or reduce-scatter of `size` bytes in all."""
    return Talk(1, ranks - 1, gather_bytes(size, ranks))


@dataclass(frozen=True)
class Machine:
    """The fitted numbers. Seconds are those of a rank that has a core for itself while all other cores are busy.

    forward, backward_input, backward_weight: seconds of one of each of `Sizes`.
    crowd: ranks of a World -> how much longer the same takes there than a share of the cores explains. Below 1: a rank
        with several threads.
    talk: ranks of a World -> seconds of `Talk`, when all of them do.
    effort: the same in seconds of a core. What is left is waiting.
    overlap: the part of the data axis's talk that computation hides.
    """

    model: Transformer
    cores: int
    forward: Sizes
    backward_input: Sizes
    backward_weight: Sizes
    crowd: dict[int, float]
    talk: dict[int, Talk]
    effort: dict[int, Talk]
    overlap: float = 0.0

    def step_seconds(self, layout: Layout, rows: int, context: int | None = None) -> float:
        """A step over `rows`, all its parts: what travels before it, the pipeline, and the sums of the loss."""
        before = 0.0
        if layout.zero in (1, 2):  # the weights that others have updated
            before = max(self._travel(layout, share, 1) for share in self._stages(layout).values())
        sums = sum(self._talk(layout, reduction(16, ranks)) for ranks in (layout.mesh.pp, layout.replicas) if ranks > 1)
        return max(1, layout.mesh.size / self.cores) * (before + sums) + self.timeline(layout, rows, context).end

    def timeline(self, layout: Layout, rows: int, context: int | None = None) -> Timeline:
        """One pipeline of the mesh; the others do the same at the same time, so it has its share of the cores."""
        lines = layout.mesh.size // layout.mesh.pp
        return simulate(layout.order(), self.costs(layout, rows, context), cores=self.cores / lines)

    def costs(self, layout: Layout, rows: int, context: int | None = None) -> Costs:
        """What actions cost: seconds of a rank that has a core for itself."""
        context, mesh = context or self.model.positions, layout.mesh
        tokens = layout.rows(rows) * context
        whole = tokens / (mesh.tp if layout.sequence_parallel else 1)
        stages, crowd = self._stages(layout), self._of_world(self.crowd, layout)
        activation, sums = 4 * tokens * self.model.hidden, 0.0
        once = 0.0  # an activation over the tensor ranks
        if layout.sequence_parallel:
            once = 2 * self._talk(layout, gathering(activation, mesh.tp))
        elif mesh.tp > 1:
            once = self._talk(layout, reduction(activation, mesh.tp))
        if mesh.tp > 1:
            sums = 2 * self._talk(layout, reduction(6 * tokens, mesh.tp))  # of the loss

        def work(seconds: Sizes, share: Share) -> float:
            counted = sizes(self.model, share.blocks, share.last, tokens, whole, context, mesh.tp)
            return crowd * _product(seconds, counted)

        def travel(share: Share, times: int) -> float:
            return (1 - self.overlap) * self._travel(layout, share, times)

        def forward(action: Action) -> float:
            share = stages[action.stage]
            talk = (2 * share.blocks + share.first) * once + share.last * sums
            return work(self.forward, share) + talk + travel(share, layout.zero == 3)

        def by_input(action: Action) -> float:
            share = stages[action.stage]
            again = forward(action) if layout.recompute == "full" else travel(share, layout.zero == 3)
            return work(self.backward_input, share) + (2 * share.blocks + share.last) * once + again

        def by_weight(action: Action) -> float:
            share, final = stages[action.stage], action.microbatch == layout.microbatches - 1
            reduces = final or (layout.zero >= 2 and not layout.whole_gradients)
            return work(self.backward_weight, share) + travel(share, int(reduces))

        crossing = self._talk(layout, Talk(0, 1, 4 * whole * self.model.hidden)) if mesh.pp > 1 else 0.0
        return Costs(forward, by_input, by_weight, crossing)

    def _stages(self, layout: Layout) -> dict[int, Share]:
        """What a rank has of each stage."""
        stages = sum(len(share.stages) for share in shares(self.model, layout))
        alone = replace(layout, mesh=replace(layout.mesh, pp=stages), schedule="1f1b", chunks=1)
        return dict(enumerate(shares(self.model, alone)))

    def _travel(self, layout: Layout, share: Share, times: int) -> float:
        """Gradients or weights of a stage, scattered or gathered over the data axis, so many times."""
        ranks, size = layout.replicas, 4 * share.dense
        if ranks == 1:
            return 0.0
        units = share.blocks + 1 if layout.zero == 3 else -(-size // BUCKET)
        one = reduction(size, ranks) if layout.zero == 0 else gathering(size, ranks)
        return times * self._talk(layout, one._replace(call=units, message=units * one.message))

    def _talk(self, layout: Layout, talk: Talk) -> float:
        """What it adds to the work of a rank. Where stages of a pipeline share cores, others compute while it waits, so
        only its effort counts."""
        more = max(1, layout.mesh.size / self.cores)
        if layout.mesh.pp > 1 and more > 1:
            return _product(self._of_world(self.effort, layout), talk)
        return _product(self._of_world(self.talk, layout), talk) / more

    def _of_world(self, table: dict[int, Any], layout: Layout) -> Any:
        if layout.mesh.size not in table:
            raise ValueError(
                f"{layout.mesh} has {layout.mesh.size} ranks; calibrated are {', '.join(map(str, self.crowd))}"
            )
        return table[layout.mesh.size]

    # -- as text

    def __str__(self) -> str:
        names = ("a call", "a block", "an element", "a FLOP", "a logit")
        lines = [f"{self.model.name}, {self.cores} cores", f"{'seconds of':<18}" + "".join(f"{n:>12}" for n in names)]
        for part in PARTS:
            lines.append(f"{part.replace('_', ', '):<18}" + "".join(f"{s:12.2e}" for s in getattr(self, part)))
        for title, table in (("seconds of talk", self.talk), ("of them work", self.effort)):
            lines += ["", f"{title:<18}" + "".join(f"{n:>12}" for n in ("a call", "a message", "a byte"))]
            lines += [f"{f'{n} ranks':<18}" + "".join(f"{s:12.2e}" for s in talk) for n, talk in table.items()]
        lines += ["", "slower by, among"] + [f"{f'{n} ranks':<18}{crowd:12.2f}" for n, crowd in self.crowd.items()]
        return "\n".join([*lines, "", f"{self.overlap:.0%} of the data axis's talk is hidden by computation"])

    def save(self, file: str | Path) -> None:
        Path(file).write_text(json.dumps(asdict(self), indent=2) + "\n")


def load_machine(file: str | Path) -> Machine:
    """Read what `Machine.save` wrote."""
    read = json.loads(Path(file).read_text())
    read["model"] = Transformer(**read["model"])
    read |= {part: Sizes(*read[part]) for part in PARTS}
    read["crowd"] = {int(n): crowd for n, crowd in read["crowd"].items()}
    for field in ("talk", "effort"):
        read[field] = {int(n): Talk(*talk) for n, talk in read[field].items()}
    return Machine(**read)


# -- fitting -------------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """What one of `tp` tensor ranks computes of `blocks` blocks for one microbatch, and how long its parts took."""

    tp: int
    blocks: int
    rows: int
    seconds: tuple[float, ...]  # of PARTS


class Heard(NamedTuple):
    """One collective, in a World of so many ranks."""

    ranks: int
    talk: Talk
    seconds: float
    effort: float


@dataclass(frozen=True)
class Observations:
    """What was measured. crowds: ranks of a World -> seconds of the same piece in it, every rank at once."""

    model: Transformer
    cores: int
    pieces: list[Piece]
    crowds: dict[int, float]
    talks: list[Heard]
    step: tuple[Layout, int, float]  # of a data axis: layout, rows, seconds


def fit(seen: Observations) -> Machine:
    """The numbers that explain what was seen. Nothing is measured here."""
    model, context = seen.model, seen.model.positions
    rows = []
    for piece in seen.pieces:
        tokens = piece.rows * context
        rows.append(sizes(model, piece.blocks, True, tokens, tokens, context, piece.tp))
    works = [Sizes(*_factors(rows, [piece.seconds[i] for piece in seen.pieces])) for i in range(len(PARTS))]
    base = seen.crowds[seen.cores]
    crowd = {n: seconds / base / max(1, n / seen.cores) for n, seconds in seen.crowds.items()}
    talk, effort = {}, {}
    for n in sorted({heard.ranks for heard in seen.talks}):
        some = [heard for heard in seen.talks if heard.ranks == n]
        talk[n] = Talk(*_factors([heard.talk for heard in some], [heard.seconds for heard in some]))
        effort[n] = Talk(*_factors([heard.talk for heard in some], [heard.effort for heard in some]))
    machine = Machine(model, seen.cores, works[0], works[1], works[2], crowd, talk, effort)
    layout, batch, seconds = seen.step
    open_, hidden = (replace(machine, overlap=o).step_seconds(layout, batch) for o in (0.0, 1.0))
    overlap = (open_ - seconds) / (open_ - hidden) if open_ > hidden else 0.0
    return replace(machine, overlap=min(max(overlap, 0.0), 1.0))


def _factors(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Factors, none negative, with which the rows' sums come nearest to the seconds, as parts of those."""
    matrix = torch.tensor(rows, dtype=torch.float64) / torch.tensor(seconds, dtype=torch.float64)[:, None]
    scale = matrix.abs().amax(0).clamp(min=1e-300)
    matrix, kept = matrix / scale, list(range(matrix.size(1)))
    while True:
        found = torch.linalg.lstsq(matrix[:, kept], torch.ones(len(matrix), 1, dtype=torch.float64)).solution[:, 0]
        if found.min() >= 0:
            break
        del kept[int(found.argmin())]  # what would have to be negative is not there
    factors = dict(zip(kept, (found / scale[kept]).tolist(), strict=True))
    return [factors.get(i, 0.0) for i in range(matrix.size(1))]


# -- measuring: on ranks -------------------------------------------------------------------------------------


def _compute(config: Config, tp: int, rows: int) -> list[float]:
    """Seconds of PARTS for what one of `tp` tensor ranks computes, all ranks of this world at a time. The loss counts
    as forward."""
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
        moments, weights = [time.perf_counter()], deferral.begin()
        with deferral:
            total, _ = loss(model(tokens), tokens)
        moments.append(time.perf_counter())
        deferral.backward([total], [torch.ones_like(total)])
        moments.append(time.perf_counter())
        weights.finish()
        moments.append(time.perf_counter())
    return [b - a for a, b in pairwise(moments)]


def _talking(line: int, op: str, size: int, calls: int = 6) -> list[float]:
    """Seconds, and seconds of a core, of a call on `size` bytes between computations, in lines of so many ranks, all
    lines at a time."""
    axis = connect(Mesh(dp=here().size // line, tp=line))["tp"]
    x, whole, other = torch.ones(size // 4), torch.empty(size // 4), torch.randn(2**22)

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
            gelu(other)
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
    shapes = list(product((1, min(config.heads, 4)), (1, config.depth), (few, 4 * few)))
    talks = [(n, line, op, size) for n in ranks for line in ranks for op in OPS for size in SIZES if 1 < line <= n]
    jobs: list[Job] = [(n, _compute, (config, 1, few)) for n in ranks]
    jobs += [(cores(), _compute, (replace(config, depth=blocks), tp, some)) for tp, blocks, some in shapes]
    jobs += [(n, _talking, (line, op, size)) for n, line, op, size in talks]
    with _worlds(ranks) as worlds:
        jobs += _steps(worlds, config, [layout], rows)
        *answers, steps = _rounds(worlds, jobs, rounds, "calibrating")
    numbers = [_slowest(some) for some in answers]
    crowds = {n: sum(parts) for n, parts in zip(ranks, numbers, strict=False)}
    pieces = [Piece(*shape, tuple(s)) for shape, s in zip(shapes, numbers[len(ranks) :], strict=False)]
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
