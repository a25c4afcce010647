"""What a step costs on this machine: numbers that `minipar.calibrate` fits, and predictions from them. Nothing is run.

Work. One microbatch takes a rank so many seconds a call, a block, an element of what is between cut layers (norms and
sums, which every tensor rank computes whole), a FLOP (with what is cut as matrix products are, GELU for one), and a
logit. These are fitted to shares of the model as one tensor rank has them, cut by the engine, with nobody to talk to.

Talk. A collective takes so many seconds a call, a message (alpha) and a byte that a rank sends (beta), while every line
of the mesh talks. What travels over the data axis hides behind computation as far as it did in one step of dp=2.

Sharing. Where ranks outnumber cores, those that compute share them: n of them on c cores each go on at c/n of their
speed (processor sharing). So eight data ranks on two cores are no faster than two, they only talk more. A pipeline is
another matter: while one rank waits for its input another has its core, so a bubble costs nothing as long as there are
as many ranks with work as cores. The same goes for other waiting, such as that of tensor ranks for each other: where
stages share cores, only seconds of a core count ("effort"); elsewhere those of the clock do.

Left out: the optimizer, which `step` does not run; copies that ZeRO makes of gradients; selective recompute; experts
and a context axis.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .cost import Layout, Share, all_reduce_bytes, forward_flops, gather_bytes, shares
from .data import BUCKET
from .schedule import Action
from .timeline import Costs, Timeline, simulate
from .transformer import Transformer

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
        with several threads. crowd_effort: the same in seconds of a core; what is left is waiting.
    talk, talk_effort: ranks of a World -> seconds of `Talk`, when all of them do, and seconds of a core.
    overlap: the part of the data axis's talk that computation hides.
    """

    model: Transformer
    cores: int
    forward: Sizes
    backward_input: Sizes
    backward_weight: Sizes
    crowd: dict[int, float]
    crowd_effort: dict[int, float]
    talk: dict[int, Talk]
    talk_effort: dict[int, Talk]
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
        if mesh.cp * mesh.ep > 1 or layout.recompute == "selective":
            raise ValueError(f"no prediction for cp, ep or selective recompute: {layout}")
        tokens = layout.rows(rows) * context
        whole = tokens / (mesh.tp if layout.sequence_parallel else 1)
        stages = self._stages(layout)
        crowd = self._of_world(self.crowd_effort if self._fills(layout) else self.crowd, layout)
        once = sums = 0.0  # an activation over the tensor ranks; what the loss sums over them
        if mesh.tp > 1:
            activation = 4 * tokens * self.model.hidden
            once = self._talk(layout, reduction(activation, mesh.tp))
            if layout.sequence_parallel:
                once = 2 * self._talk(layout, gathering(activation, mesh.tp))
            sums = 2 * self._talk(layout, reduction(6 * tokens, mesh.tp))

        def work(seconds: Sizes, share: Share) -> float:
            counted = sizes(self.model, share.blocks, share.last, tokens, whole, context, mesh.tp)
            return crowd * _product(seconds, counted)

        def travel(share: Share, times: int) -> float:
            return (1 - self.overlap) * self._travel(layout, share, times)

        def through(share: Share) -> float:
            talk = (2 * share.blocks + share.first) * once + share.last * sums
            return work(self.forward, share) + talk

        def forward(action: Action) -> float:
            return through(stages[action.stage]) + travel(stages[action.stage], layout.zero == 3)

        def by_input(action: Action) -> float:
            share = stages[action.stage]
            seconds = work(self.backward_input, share) + (2 * share.blocks + share.last) * once
            if layout.recompute == "full":
                seconds += through(replace(share, first=False, last=False))
            return seconds + travel(share, layout.zero == 3)

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

    def _fills(self, layout: Layout) -> bool:
        """Stages of a pipeline share cores: while one waits, for whatever it is, another computes."""
        return layout.mesh.pp > 1 and layout.mesh.size > self.cores

    def _talk(self, layout: Layout, talk: Talk) -> float:
        """What it adds to the work of a rank."""
        if self._fills(layout):
            return _product(self._of_world(self.talk_effort, layout), talk)
        return _product(self._of_world(self.talk, layout), talk) / max(1, layout.mesh.size / self.cores)

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
        for title, table in (("seconds of talk", self.talk), ("of a core", self.talk_effort)):
            lines += ["", f"{title:<18}" + "".join(f"{n:>12}" for n in ("a call", "a message", "a byte"))]
            lines += [f"{f'{n} ranks':<18}" + "".join(f"{s:12.2e}" for s in talk) for n, talk in table.items()]
        lines += ["", f"{'slower by, among':<18}{'in all':>12}{'of a core':>12}"]
        lines += [f"{f'{n} ranks':<18}{slower:12.2f}{self.crowd_effort[n]:12.2f}" for n, slower in self.crowd.items()]
        return "\n".join([*lines, "", f"{self.overlap:.0%} of the data axis's talk is hidden by computation"])

    def save(self, file: str | Path) -> None:
        Path(file).write_text(json.dumps(asdict(self), indent=2) + "\n")


def load_machine(file: str | Path) -> Machine:
    """Read what `Machine.save` wrote."""
    read = json.loads(Path(file).read_text())
    read["model"] = Transformer(**read["model"])
    read |= {part: Sizes(*read[part]) for part in PARTS}
    for field in ("crowd", "crowd_effort"):
        read[field] = {int(n): slower for n, slower in read[field].items()}
    for field in ("talk", "talk_effort"):
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
    """What was measured. crowds: ranks of a World -> seconds of the same piece in it, every rank at once, and seconds
    of a core."""

    model: Transformer
    cores: int
    pieces: list[Piece]
    crowds: dict[int, tuple[float, float]]
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
    seconds, effort = seen.crowds[seen.cores]
    crowd = {n: some[0] / seconds / max(1, n / seen.cores) for n, some in seen.crowds.items()}
    crowd_effort = {n: some[1] / effort for n, some in seen.crowds.items()}
    talk, talk_effort = {}, {}
    for n in sorted({heard.ranks for heard in seen.talks}):
        some = [heard for heard in seen.talks if heard.ranks == n]
        talk[n] = Talk(*_factors([heard.talk for heard in some], [heard.seconds for heard in some]))
        talk_effort[n] = Talk(*_factors([heard.talk for heard in some], [heard.effort for heard in some]))
    machine = Machine(model, seen.cores, works[0], works[1], works[2], crowd, crowd_effort, talk, talk_effort)
    layout, batch, took = seen.step
    open_, hidden = (replace(machine, overlap=o).step_seconds(layout, batch) for o in (0.0, 1.0))
    overlap = (open_ - took) / (open_ - hidden) if open_ > hidden else 0.0
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
