"""Which layout for a model on a cluster? All that fit, the fastest first, and why.

    print(plan(find_model("llama-405b"), CLUSTERS["h100"].of(16384), batch=2048, sequence=8192))

Tried are all ways to lay the devices on dp, pp, ep, cp and tp whose sizes divide what they cut, with 1 to 16 rows a
microbatch, a few schedules, the optimizer's states or all parameters shared out, and as little recompute as memory
asks for. Each is priced by `predict`, first by a formula, then the best by simulation.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

from .cost import MIXED, RECOMPUTE, TODAY, Formats, Kernels, Layout, stage_memory
from .hardware import Cluster
from .mesh import Mesh
from .prediction import Prediction, known, predict
from .transformer import Transformer

ROWS = (1, 2, 4, 8, 16)  # of a microbatch
SCHEDULES = (("1f1b", 1), ("interleaved", 2), ("interleaved", 4), ("interleaved", 8), ("zero-bubble-h1", 1))
SIMULATED = 24  # of the layouts that look best
LONGEST_SIMULATION = 30_000  # microbatches times stages
LONGEST_SEQUENCE_PART = 1024  # tokens of a chunk, two of which a context rank has: shorter ones are not worth a ring


@dataclass(frozen=True)
class Neighbor:
    """A layout that differs from the best in one thing, and what it lacks: memory, or time, and where that goes."""

    change: str
    layout: Layout
    prediction: Prediction | None
    lacks: str

    @property
    def seconds(self) -> float:
        """Of a step; infinite if it is not possible or does not fit."""
        return self.prediction.seconds if self.prediction and self.prediction.fits else float("inf")

    def __str__(self) -> str:
        return f"{self.change}: {self.lacks}"


KEY = "rows x m: a microbatch's rows, and how many microbatches; pipe: the share of a step in which stages wait"


@dataclass(frozen=True, repr=False)
class Plan:
    """ranked: layouts that fit, the fastest first, as far as they were simulated. tried: how many were priced, or found
    not to fit in memory."""

    model: Transformer
    cluster: Cluster
    batch: int
    sequence: int
    formats: Formats
    kernels: Kernels
    ranked: list[Prediction]
    tried: int
    fitting: int

    @property
    def best(self) -> Prediction:
        return self.ranked[0]

    @cached_property
    def neighbors(self) -> list[Neighbor]:
        """What differs from the best in one thing, and what it lacks: memory, or time, and where that goes."""
        found: dict[str, Neighbor] = {}
        for change, layout in _neighbors(self.best.layout, self.model):
            neighbor = self._judge(change, layout)
            if change not in found or neighbor.seconds < found[change].seconds:
                found[change] = neighbor
        return list(found.values())

    def _judge(self, change: str, layout: Layout) -> Neighbor:
        try:
            given = self.formats, self.kernels, _is_short(layout)
            other = predict(self.model, layout, self.cluster, self.batch, self.sequence, *given)
        except ValueError as problem:
            return Neighbor(change, layout, None, f"not possible: {problem}")
        if not other.fits:
            most = max(other.memory, key=other.memory.__getitem__)
            needed = f"{_gb(other.peak_memory)} of {_gb(self.cluster.device.memory)} GB"
            return Neighbor(change, layout, other, f"does not fit: {needed}, {_gb(other.memory[most])} {most}")
        slower = other.seconds / self.best.seconds - 1
        if slower <= 0.001:
            return Neighbor(change, layout, other, "as fast")
        more = {name: s - self.best.parts[name] for name, s in other.parts.items()}
        part = max(more, key=more.__getitem__)
        how = f"{slower:.0%} slower" if slower >= 0.005 else f"{slower:.1%} slower"
        return Neighbor(change, layout, other, f"{how}, most of it {part} ({more[part]:+.2f} s)")

    def table(self, top: int = 10) -> str:
        """The best ones, a line each."""
        axes = ("dp", "pp", "ep", "cp", "tp")
        columns = ("schedule", "rows x m", "zero", "recompute", "step", "MFU", "memory", "pipe")
        lines: list[tuple[str, ...]] = [("", *axes, *columns)]
        for place, p in enumerate(self.ranked[:top], 1):
            layout, shape = p.layout, p.layout.mesh.shape
            lines.append(
                (
                    str(place),
                    *(str(shape[axis]) for axis in axes),
                    _schedule(layout) or "-",
                    self._rows(layout),
                    str(layout.zero),
                    layout.recompute,
                    f"{p.seconds:.2f} s",
                    f"{p.mfu:.1%}",
                    f"{_gb(p.peak_memory)} GB",
                    f"{p.parts['pipeline'] / p.seconds:.0%}",
                )
            )
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rows = ("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)
        return "\n".join(row.rstrip() for row in rows)

    def why(self) -> str:
        """Where the best one's time goes, and what its neighbors lack."""
        best, device = self.best, self.cluster.device
        spent = [f"{name} {s / best.seconds:.0%}" for name, s in best.parts.items() if s > 0.005 * best.seconds]
        held = [f"{name} {_gb(size)}" for name, size in best.memory.items() if size > 5e8]
        lines = [
            f"The best takes {best.seconds:.2f} s a step: {', '.join(spent)}.",
            f"Its fullest rank has {_gb(best.peak_memory)} of {_gb(device.memory)} GB: {', '.join(held)}.",
            "With one thing changed:",
            *(f"  {neighbor}" for neighbor in self.neighbors),
        ]
        return "\n".join(lines)

    def bars(self, top: int = 10) -> tuple[list[str], dict[str, list[float]]]:
        """For `viz.draw_bars`: a name for each of the best, and the seconds of each part."""
        some = self.ranked[:top]
        names = []
        for place, p in enumerate(some, 1):
            layout, axes = p.layout, str(p.layout.mesh).removeprefix("Mesh(").removesuffix(")")
            rest = [_schedule(layout), self._rows(layout), f"zero={layout.zero}", layout.recompute.removeprefix("none")]
            names.append(f"{place}: {axes}\n{', '.join(filter(None, rest))}")
        return names, {part: [p.parts[part] for p in some] for part in self.best.parts}

    def _rows(self, layout: Layout) -> str:
        return f"{layout.rows(self.batch)} x {layout.microbatches}"

    def headline(self) -> str:
        return (
            f"{self.model.name} ({self.model.parameters / 1e9:,.1f}B parameters) on {self.cluster.gpus:,} "
            f"{self.cluster.device.name}, {self.batch:,} rows of {self.sequence:,} tokens a step: "
            f"{self.tried:,} layouts tried, {self.fitting:,} fit."
        )

    def __repr__(self) -> str:
        return f"Plan({self.model.name}, {self.cluster.gpus} {self.cluster.device.name}; best: {self.best.layout.mesh})"

    def __str__(self) -> str:
        return self.text()

    def text(self, top: int = 10) -> str:
        """All of it: the `top` best ones, and why."""
        return f"{self.headline()}\n\n{self.table(top)}\n{KEY}\n\n{self.why()}"


def plan(
    model: Transformer | str,
    cluster: Cluster,
    batch: int,
    sequence: int,
    formats: Formats = MIXED,
    kernels: Kernels = TODAY,
) -> Plan:
    """Rank the layouts of a model for steps over `batch` rows of `sequence` tokens.

    model: a Transformer, or the name of one in `transformer.MODELS`. cluster: `CLUSTERS["h100"].of(16)` for instance.

        found = plan("llama-8b", CLUSTERS["h100"].of(16), batch=128, sequence=4096)
        print(found)                                       # a table, and why
        parallelize(model, found.best.layout.mesh, **found.best.layout.options())

    ValueError if none fits, with the one that lacks least.
    """
    model, cluster = known(model, cluster, sequence)
    for name, value in (("batch", batch), ("sequence", sequence)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: a whole number, at least 1")
    found, tried, nearest = list[Prediction](), 0, (float("inf"), "")
    for choices in _layouts(model, cluster, batch, sequence):
        for layout in choices:  # the less recompute, the faster: the first that fits counts
            tried += 1
            memory = stage_memory(model, layout, batch, sequence, formats, kernels)
            need = max(sum(parts.values()) for parts in memory)
            nearest = min(nearest, (need, f"{layout.mesh}, zero={layout.zero}, recompute={layout.recompute}"))
            if need <= 0.95 * cluster.device.memory:
                found.append(predict(model, layout, cluster, batch, sequence, formats, kernels, exact=False))
                break
    if not tried:
        raise ValueError(
            f"no layout of {cluster.gpus} devices divides a batch of {batch} rows and the {model.layers} blocks and "
            f"{model.heads} heads of {model.name}: try another batch"
        )
    if not found:
        raise ValueError(
            f"{model.name} does not fit on {cluster.gpus} {cluster.device.name}: the least that a layout needs is "
            f"{_gb(nearest[0])} GB ({nearest[1]}), and a device has {_gb(cluster.device.memory)}"
        )
    found.sort(key=lambda p: p.seconds)
    best = [
        predict(model, p.layout, cluster, batch, sequence, formats, kernels, exact=_is_short(p.layout))
        for p in found[:SIMULATED]
    ]
    best.sort(key=lambda p: p.seconds)
    return Plan(model, cluster, batch, sequence, formats, kernels, best, tried, len(found))


def _is_short(layout: Layout) -> bool:
    """Whether simulating it takes a fraction of a second. Longer pipelines are full nearly all the time anyway."""
    return layout.mesh.pp * layout.microbatches * layout.chunks <= LONGEST_SIMULATION


def _layouts(model: Transformer, cluster: Cluster, batch: int, sequence: int) -> Iterator[list[Layout]]:
    """Layouts that divide what they cut, each with every kind of recompute, the least first."""
    for mesh in _meshes(model, cluster, sequence):
        parts = mesh.dp * mesh.ep
        schedules = [(s, v) for s, v in SCHEDULES if mesh.pp * v <= model.layers] if mesh.pp > 1 else [("1f1b", 1)]
        for rows, (schedule, chunks) in product(ROWS, schedules):
            microbatches, rest = divmod(batch, parts * rows)
            if rest or not microbatches or (chunks > 1 and microbatches % mesh.pp):
                continue
            for zero in (0, 1, 3) if mesh.dp * mesh.ep * mesh.cp > 1 else (0,):
                yield [
                    Layout(mesh, microbatches, schedule, chunks, zero, False, mesh.tp > 1, recompute)
                    for recompute in RECOMPUTE
                ]


def _meshes(model: Transformer, cluster: Cluster, sequence: int) -> Iterator[Mesh]:
    gpus = cluster.gpus
    for tp in _divisors(gpus, 2 * cluster.node):
        if model.heads % tp or (model.kv_heads % tp and tp % model.kv_heads):
            continue
        for cp in _divisors(gpus // tp, max(sequence // (2 * LONGEST_SEQUENCE_PART), 1)):
            for ep in _divisors(gpus // tp // cp, model.experts or 1):
                if model.experts % ep:
                    continue
                for pp in _divisors(gpus // tp // cp // ep, model.layers):
                    yield Mesh(dp=gpus // tp // cp // ep // pp, pp=pp, ep=ep, cp=cp, tp=tp)


def _divisors(number: int, most: int) -> list[int]:
    return [n for n in range(1, min(number, most) + 1) if number % n == 0]


def _neighbors(layout: Layout, model: Transformer) -> Iterator[tuple[str, Layout]]:
    """Layouts that differ from this one in one thing. Ranks for another axis come from dp, or go there."""
    shape, m = layout.mesh.shape, layout.microbatches
    for axis in ("tp", "pp", "cp", "ep"):
        if axis == "ep" and not model.experts:
            continue
        if shape["dp"] % 2 == 0:
            mesh = Mesh(**shape | {axis: 2 * shape[axis], "dp": shape["dp"] // 2})
            for microbatches in (2 * m, m):  # of as many rows as now, or of twice as many
                yield f"{axis}={mesh.shape[axis]}", replace(layout, mesh=mesh, microbatches=microbatches)
        if shape[axis] % 2 == 0:
            mesh = Mesh(**shape | {axis: shape[axis] // 2, "dp": 2 * shape["dp"]})
            for microbatches in (max(m // 2, 1), m):
                yield f"{axis}={mesh.shape[axis]}", replace(layout, mesh=mesh, microbatches=microbatches)
    for microbatches in [m // 2] * (m % 2 == 0) + [2 * m]:
        yield f"{microbatches} microbatches", replace(layout, microbatches=microbatches)
    for schedule, chunks in SCHEDULES if shape["pp"] > 1 else ():
        if (schedule, chunks) != (layout.schedule, layout.chunks):
            name = f"{schedule} with {chunks} chunks" if chunks > 1 else schedule
            yield name, replace(layout, schedule=schedule, chunks=chunks)
    for zero in {0, 1, 2, 3} - {layout.zero} if layout.replicas > 1 else ():
        yield f"zero={zero}", replace(layout, zero=zero)
    for recompute in RECOMPUTE:
        if recompute != layout.recompute:
            yield f"recompute={recompute}", replace(layout, recompute=recompute)
    if shape["tp"] > 1:
        yield "without sequence parallelism", replace(layout, sequence_parallel=not layout.sequence_parallel)


def _schedule(layout: Layout) -> str:
    if layout.mesh.pp == 1:
        return ""
    return f"{layout.schedule} x{layout.chunks}" if layout.chunks > 1 else layout.schedule


def _gb(size: float) -> str:
    return f"{size / 1e9:.0f}"


# -- what a run costs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bill:
    """A run over so many tokens. seconds: of the clock, without failures. energy: joules."""

    seconds: float
    gpu_hours: float
    money: float
    energy: float

    def __str__(self) -> str:
        return (
            f"{self.seconds / 86400:,.1f} days, {self.gpu_hours:,.0f} GPU-hours, {self.money:,.0f} in money, "
            f"{self.energy / 3.6e9:,.0f} MWh"
        )


def bill(prediction: Prediction, tokens: float, price: float, power_factor: float = 1.0) -> Bill:
    """What a run of so many tokens costs at the predicted speed.

    price: of a device for an hour, in whatever currency. power_factor: how many times its devices' full power a
        cluster draws, with hosts, network and cooling.
    """
    seconds = tokens / prediction.tokens_per_second
    hours = seconds / 3600 * prediction.cluster.gpus
    energy = seconds * prediction.cluster.gpus * prediction.cluster.device.watts * power_factor
    return Bill(seconds, hours, hours * price, energy)
