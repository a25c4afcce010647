"""What a training step takes, counted: FLOPs, bytes in memory, bytes on the wire. Nothing is run.

Seconds are made of these in `minipar.prediction`.
"""

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from .mesh import Mesh, bounds
from .schedule import SCHEDULES, Schedule, in_flight, interleaved, owners
from .transformer import Transformer

RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Layout:
    """How a model is laid out: what `parallelize` takes, as plain data.

    microbatches: of each data rank's rows. schedule: "gpipe", "1f1b", "interleaved", "zero-bubble-h1", "zero-bubble-h2"
        or "zero-bubble-v". chunks: of "interleaved", stages on each rank.
    zero: 0 to 3, what data ranks share out; whole_gradients, sequence_parallel as in `parallelize`.
    recompute: "none", "selective" or "full".
    """

    mesh: Mesh
    microbatches: int = 1
    schedule: str = "1f1b"
    chunks: int = 1
    zero: int = 0
    whole_gradients: bool = False
    sequence_parallel: bool = False
    recompute: str = "none"

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, str) or self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r}: one of {', '.join(SCHEDULES)}")
        if self.recompute not in RECOMPUTE:
            raise ValueError(f"recompute={self.recompute!r}: one of {', '.join(RECOMPUTE)}")
        if not isinstance(self.mesh, Mesh):
            raise TypeError(f"Layout({self.mesh!r}): a Mesh, such as Mesh(dp=8)")
        if self.zero not in range(4):
            raise ValueError(f"zero={self.zero!r}: 0, 1, 2 or 3")
        for name in ("microbatches", "chunks"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r}: a whole number, at least 1")
        if self.chunks > 1 and self.schedule != "interleaved":
            raise ValueError(f"chunks={self.chunks} goes with the schedule interleaved, not with {self.schedule}")

    def options(self) -> dict[str, Any]:
        """What `parallelize` takes beside the model and the mesh."""
        schedule = (
            partial(interleaved, chunks=self.chunks) if self.schedule == "interleaved" else SCHEDULES[self.schedule]
        )
        names = ("microbatches", "zero", "whole_gradients", "sequence_parallel", "recompute")
        return {"schedule": schedule} | {name: getattr(self, name) for name in names}

    def order(self) -> Schedule:
        """The schedule itself, the same that the executor runs."""
        return _order(self.schedule, self.mesh.pp, self.microbatches, self.chunks)

    @property
    def replicas(self) -> int:
        """Ranks that have the same dense parameters."""
        return self.mesh.dp * self.mesh.ep * self.mesh.cp

    def rows(self, batch: int) -> int:
        """Rows of a microbatch. ValueError if they do not come out even."""
        parts = self.mesh.dp * self.mesh.ep * self.microbatches
        if batch % parts:
            what = f"{self.mesh.dp * self.mesh.ep} data ranks x {self.microbatches} microbatches"
            raise ValueError(f"a batch of {batch} rows is not divisible by {what} = {parts}")
        return batch // parts


@lru_cache(maxsize=256)
def _order(schedule: str, stages: int, microbatches: int, chunks: int) -> Schedule:
    if schedule == "interleaved":
        return interleaved(stages, microbatches, chunks)
    return SCHEDULES[schedule](stages, microbatches)


@dataclass(frozen=True)
class Formats:
    """Bytes of a number: of weights, gradients, the optimizer's states of one parameter, activations and what travels
    of them."""

    weights: float = 2
    gradients: float = 2
    optimizer: float = 12
    activations: float = 2


MIXED = Formats()  # 16 bits, and Adam's two moments and main weights in 32: 16 bytes (Rajbhandari et al. 2020, 3.1)
FP32 = Formats(4, 4, 8, 4)  # 16 bytes as well


@dataclass(frozen=True)
class Kernels:
    """What software makes of a device.

    reach: the part of a data sheet's peak that large matrix products, copies in memory and transfers see. One round
        figure for all: an assumption, not a measurement. What hangs on it: see `minipar.prediction`.
    fused_attention: attention that never has its scores in memory (Dao et al. 2022, arXiv 2205.14135) and leaves out
        what a causal mask hides. Without it scores are written and read several times, and nothing is left out.
    dropout: keeps a byte an element as its mask.
    overlap: collectives of the data, context and expert axes hide behind computation where there is some.
    """

    reach: float = 0.8
    fused_attention: bool = True
    dropout: bool = False
    overlap: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.reach <= 1:
            raise ValueError(f"Kernels(reach={self.reach!r}): a share of the data sheet, above 0 and at most 1")


TODAY = Kernels()
MEGATRON_2021 = Kernels(fused_attention=False, dropout=True, overlap=False)  # as Narayanan et al. 2021 describe theirs


# -- FLOPs ---------------------------------------------------------------------------------------------------


def forward_flops(model: Transformer, sequence: int, causal: bool = False) -> dict[str, float]:
    """FLOPs of the matrix products of one token's forward: 2 for each weight that works on it, and 4 s h for the two
    products of attention with the s tokens of its row (half of it if what the mask hides is not counted). All else is
    left out: it is a matter of bytes, not of FLOPs.

    For a GPT, 24 h^2 + 4 s h a layer and 2 h V: what Narayanan et al. 2021 (appendix) and Korthikanti et al. 2022
    (appendix A) count.
    """
    return {
        "matrices": 2.0 * model.layers * (model.attention_matrices + model.top * model.mlp_matrices + model.router),
        "attention": 4.0 * model.layers * sequence * model.queries * (0.5 if causal else 1),
        "head": 2.0 * model.hidden * model.vocabulary,
    }


def step_flops(model: Transformer, batch: int, sequence: int, recompute: str = "none", causal: bool = False) -> float:
    """FLOPs of a step over `batch` rows. Backward is twice forward: each product has two, for its input's gradient and
    for its weight's.

    recompute="none" is what the model needs, whatever the hardware does: MFU counts it. "full" adds the blocks' forward
    again, "selective" attention's two products again (Korthikanti et al. 2022): HFU counts those.

    "none"  = 72 B s l h^2 (1 + s/(6h) + V/(12 l h)) for a GPT
    "full"  = 96 B s l h^2 (1 + s/(6h) + V/(16 l h)), the F of Narayanan et al. 2021 (eq. 3)
    "selective" has 2s/(9h) for s/(6h). Korthikanti et al. print s/(3h), which counts attention's products six times in
    place of four; see
    `published.korthikanti_hardware_flops`.
    """
    parts = forward_flops(model, sequence, causal)
    again = {
        "none": 0.0,
        "selective": parts["attention"],
        "full": parts["matrices"] + parts["attention"],
    }[recompute]
    return batch * sequence * (3 * sum(parts.values()) + again)


# -- what a rank has -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """What one index on the pipeline axis has of a model: its blocks, a list a stage, and which ends.

    dense, experts: parameters on one rank, cut by tp (and experts by ep). All tensor ranks have norms, row biases and
        routers. crossings: boundaries with other ranks that a microbatch's activations cross, in or out.
    """

    stages: dict[int, int]  # stage -> its blocks
    dense: float
    experts: float
    crossings: int
    first: bool
    last: bool

    @property
    def blocks(self) -> int:
        return sum(self.stages.values())


def shares(model: Transformer, layout: Layout) -> list[Share]:
    """A share for each index on the pipeline axis. ValueError if there are fewer blocks than stages."""
    return _shares(model, layout.mesh, layout.schedule, layout.chunks)


@lru_cache(maxsize=4096)
def _shares(model: Transformer, mesh: Mesh, schedule: str, chunks: int) -> list[Share]:
    owner = _owners(schedule, mesh.pp, chunks)
    edges = bounds(model.layers, len(owner))
    if model.layers < len(owner):
        raise ValueError(f"{model.name} has {model.layers} blocks, and this layout {len(owner)} stages")
    found = []
    for index in range(mesh.pp):
        stages = {stage: edges[stage + 1] - edges[stage] for stage, rank in owner.items() if rank == index}
        blocks, first, last = sum(stages.values()), 0 in stages, len(owner) - 1 in stages
        cut = (model.attention_matrices + model.cut_biases) / mesh.tp
        dense = blocks * (cut + model.row_biases + model.norms + model.router)
        experts = 0.0
        if model.experts:
            experts = blocks * model.experts * model.mlp_matrices / (mesh.ep * mesh.tp)
        else:
            dense += blocks * model.mlp_matrices / mesh.tp
        vocabulary = model.vocabulary * model.hidden / mesh.tp
        if first:
            dense += vocabulary + model.positions * model.hidden
        if last:  # a tied weight is on both ends
            dense += model.norm * model.hidden + (0 if model.tied and first else vocabulary)
        crossings = sum(owner.get(s + side, index) != index for s in stages for side in (-1, 1))
        found.append(Share(stages, dense, experts, crossings, first, last))
    return found


@lru_cache(maxsize=256)
def _owners(schedule: str, stages: int, chunks: int) -> dict[int, int]:
    return owners(_order(schedule, stages, 1, chunks))


# -- memory --------------------------------------------------------------------------------------------------


def states(parameters: float, ranks: int, zero: int, formats: Formats = MIXED) -> dict[str, float]:
    """Bytes of weights, gradients and optimizer states of a rank for so many parameters (Rajbhandari et al. 2020, 5):
    what is shared out is divided by the ranks of the data axis. Without padding, at most ranks - 1 elements a unit."""
    return {
        "weights": parameters * formats.weights / (ranks if zero >= 3 else 1),
        "gradients": parameters * formats.gradients / (ranks if zero >= 2 else 1),
        "optimizer": parameters * formats.optimizer / (ranks if zero >= 1 else 1),
    }


def block_activations(
    model: Transformer, layout: Layout, rows: int, sequence: int, formats: Formats = MIXED, kernels: Kernels = TODAY
) -> float:
    """Bytes that one block keeps of one microbatch between forward and backward.

    Counted are the inputs of everything that needs them in backward. With 16 bits, dropout, attention that is not
    fused, and a GPT of s tokens and b rows this is Korthikanti et al. 2022, Table 2:
    none sbh(34 + 5as/h), tensor sbh(10 + 24/t + 5as/(ht)), with sequence parallelism sbh/t (34 + 5as/h), selective
    34 sbh/t, full 2 sbh. (With sequence parallelism full is 2 sbh/t here.)

    Selective recompute is theirs, attention's scores are made again, where attention is not fused. Fused attention does
    that anyway; there, as in `minipar.recompute`, it keeps what matrix products and attention give, and makes norms and
    activation functions again. Statistics of norms and attention are left out: a few numbers a token.
    """
    mesh, h, numbers = layout.mesh, model.hidden, formats.activations
    tokens, t = rows * sequence / mesh.cp, mesh.tp
    around = t if layout.sequence_parallel else 1  # between cut layers
    if layout.recompute == "full":
        return tokens * numbers * h / around
    selective = layout.recompute == "selective" and kernels.fused_attention
    mask = h if kernels.dropout else 0  # a byte an element
    hidden = model.top * model.mlp * (3 if model.gated else 2)  # in front of the activation function and behind it
    if selective:
        hidden = model.top * model.mlp * (2 if model.gated else 1)
    copies = 3 if selective else 4  # norms' inputs and outputs; or a block's input, and what its two halves add to it
    outside = (copies * h * numbers + 2 * mask) / around
    inside = (2 * model.queries + 2 * model.keys + hidden) * numbers / t
    scores = 0.0
    if not kernels.fused_attention and layout.recompute == "none":
        scores = model.heads * sequence * (2 * numbers + 1 if kernels.dropout else numbers) / t
    return tokens * (outside + inside + scores)


def stage_memory(
    model: Transformer,
    layout: Layout,
    batch: int,
    sequence: int,
    formats: Formats = MIXED,
    kernels: Kernels = TODAY,
) -> list[dict[str, float]]:
    """Peak bytes of a rank by what they are for, one entry for each index on the pipeline axis.

    weights, gradients, optimizer: see `states`; a stage-3 unit that is whole for a while, two blocks at a time, and
    zero=2's gradients on their way count as "gathered". activations: what the schedule has in flight, and a block's own
    while full recompute makes it again. logits: of one microbatch and their gradient, in 32 bits.
    """
    rows, mesh = layout.rows(batch), layout.mesh
    block = block_activations(model, layout, rows, sequence, formats, kernels)
    again = 0.0
    if layout.recompute == "full":
        whole = Layout(mesh, sequence_parallel=layout.sequence_parallel)
        again = block_activations(model, whole, rows, sequence, formats, kernels)
    flights = _flights(layout.schedule, mesh.pp, layout.microbatches, layout.chunks)
    found = []
    for share, held in zip(shares(model, layout), flights, strict=True):
        memory = dict.fromkeys(("weights", "gradients", "optimizer"), 0.0)
        for parameters, ranks in ((share.dense, layout.replicas), (share.experts, mesh.dp * mesh.cp)):
            zero = layout.zero
            if zero == 2 and layout.whole_gradients:
                zero = 1
            for what, size in states(parameters, ranks, zero, formats).items():
                memory[what] += size
        own = (share.dense + share.experts) / max(share.blocks, 1)  # about one block
        memory["gathered"] = 2 * own * {2: formats.gradients, 3: formats.weights}.get(layout.zero, 0)
        memory["activations"] = held * block * share.blocks / len(share.stages) + again
        memory["logits"] = 0.0
        if share.last:
            memory["logits"] = 2 * 4 * rows * sequence / mesh.cp * model.vocabulary / mesh.tp
        found.append(memory)
    return found


@lru_cache(maxsize=1024)
def _flights(schedule: str, stages: int, microbatches: int, chunks: int) -> list[int]:
    """The most microbatches (of a stage) that each rank holds. Behind the first few rounds nothing new happens."""
    enough = microbatches if schedule == "gpipe" else min(microbatches, 4 * stages)
    return [in_flight(program) for program in _order(schedule, stages, enough, chunks)]


# -- what travels --------------------------------------------------------------------------------------------


def all_reduce_bytes(size: float, ranks: int) -> float:
    """What each rank sends in a ring all-reduce of `size` bytes: 2(n-1)/n of them (Patarasuk & Yuan 2009)."""
    return 2 * size * (ranks - 1) / ranks


def gather_bytes(size: float, ranks: int) -> float:
    """... in an all-gather, reduce-scatter or all-to-all of `size` bytes in all: (n-1)/n of them."""
    return size * (ranks - 1) / ranks


def traffic(
    model: Transformer, layout: Layout, batch: int, sequence: int, formats: Formats = MIXED
) -> list[dict[str, float]]:
    """Bytes that a rank sends in a step along each axis, one entry for each index on the pipeline axis.

    dp (all data ranks, over ep and cp too): the gradients once, or what `minipar.zero` says, m times where gradients or
        weights are shared out. Experts travel over dp and cp alone.
    tp: four all-reduces of an activation for each block and microbatch, one for the embedding (of whole rows, which are
        cut over cp behind it) and one for the head's input, three numbers a token for the loss. Sequence parallelism
        makes each a gather and a scatter, and gathers the embedding's gradient; what saw only a part of the sequence is
        summed once.
    pp: an activation over each boundary and its gradient back; a tied weight's gradient from one end to the other.
    cp: keys and values around the ring, and with their gradients back: 3(n-1) shares a block and microbatch.
    ep: four all-to-alls of all slots a block and microbatch; `top` slots a token, empty ones not counted.
    The sums of loss and count, a few bytes, are left out.
    """
    mesh, m = layout.mesh, layout.microbatches
    tokens = layout.rows(batch) * sequence / mesh.cp
    activation = tokens * model.hidden * formats.activations
    boundary = activation / (mesh.tp if layout.sequence_parallel else 1)
    found = []
    for share in shares(model, layout):
        size = share.dense, layout.replicas
        experts = share.experts, mesh.dp * mesh.cp
        tensor = (4 * share.blocks + share.first * mesh.cp + share.last) * activation * m
        sent = {
            "dp": sum(_data_bytes(layout, parameters, ranks, formats) for parameters, ranks in (size, experts)),
            "tp": all_reduce_bytes(tensor + share.last * 3 * tokens * m * max(formats.activations, 4), mesh.tp),
            "pp": share.crossings * boundary * m,
            "cp": 3 * (mesh.cp - 1) * 2 * model.keys / mesh.tp * tokens * formats.activations * share.blocks * m,
            "ep": 4 * gather_bytes(model.top * activation, mesh.ep) * share.blocks * m if model.experts else 0.0,
        }
        if layout.sequence_parallel:
            sent["tp"] += gather_bytes(share.first * activation * m, mesh.tp)
            parts = share.blocks * (model.norms + model.row_biases) + share.last * model.norm * model.hidden
            sent["tp"] += all_reduce_bytes(parts * formats.gradients, mesh.tp)
        if model.tied and share.first != share.last:
            tied = model.vocabulary * model.hidden / mesh.tp
            sent["pp"] += tied * formats.gradients / (layout.replicas if layout.zero else 1)
        found.append(sent)
    return found


def _data_bytes(layout: Layout, parameters: float, ranks: int, formats: Formats) -> float:
    """What a rank sends of gradients and weights in a step."""
    m = layout.microbatches
    scatters = m if layout.zero >= 2 and not layout.whole_gradients else 1
    gathers = 2 * m if layout.zero == 3 else 1
    if layout.zero == 0:
        return all_reduce_bytes(parameters * formats.gradients, ranks)
    return gather_bytes(parameters * (scatters * formats.gradients + gathers * formats.weights), ranks)
