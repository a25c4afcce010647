"""How long a step takes on a cluster: computed, with the schedule that would run.

    from minipar import Mesh
    from minipar.cost import Layout
    from minipar.hardware import CLUSTERS
    from minipar.transformer import find_model

    layout = Layout(Mesh(dp=128, pp=16, tp=8), microbatches=16, zero=1, sequence_parallel=True)
    print(predict(find_model("llama-405b"), layout, CLUSTERS["h100"].of(16384), batch=2048, sequence=8192))

A step is priced from below. Each kernel of a block takes as long as its FLOPs or its bytes, whichever is longer (the
roofline of Williams et al. 2009); each collective what the alpha-beta model says for the link that its axis has; the
pipeline what `simulate` says of its schedule. One number is assumed and on no data sheet: `Kernels.reach`.

What is left out: starts of kernels, other traffic on the network, slow devices, failures, loading and saving. So a
prediction is a bound that good software comes near, and says more about two layouts than about one.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from .cost import (
    MIXED,
    TODAY,
    Formats,
    Kernels,
    Layout,
    Share,
    all_reduce_bytes,
    gather_bytes,
    shares,
    stage_memory,
    step_flops,
)
from .hardware import Cluster, Link
from .schedule import Action, Op
from .timeline import Costs, Timeline, simulate
from .transformer import Transformer, find_model

# -- one block -----------------------------------------------------------------------------------------------


class Kernel(NamedTuple):
    """What one kernel of forward does. again: how many times as much its backward does, split into the gradient of the
    input and that of the weight."""

    flops: float
    bytes: float
    again: tuple[float, float] = (2.0, 0.0)

    def seconds(self, cluster: Cluster, kernels: Kernels) -> float:
        device = cluster.device
        return max(self.flops / device.bf16, self.bytes / device.bandwidth) / kernels.reach


def product(tokens: float, inputs: float, outputs: float, matrices: float = 1, size: float = 2) -> Kernel:
    """(tokens, inputs) @ (inputs, outputs), the tokens shared out over several such matrices."""
    moved = tokens * inputs + matrices * inputs * outputs + tokens * outputs
    return Kernel(2 * tokens * inputs * outputs, size * moved, (1.0, 1.0))


def pointwise(tokens: float, width: float, passes: float, size: float = 2) -> Kernel:
    """Reads and writes `passes` times (tokens, width). Backward reads a gradient as well: twice as much."""
    return Kernel(0, size * passes * tokens * width)


def block_kernels(model: Transformer, layout: Layout, rows: int, sequence: int, kernels: Kernels) -> list[Kernel]:
    """The kernels of one block's forward on one rank, for one microbatch of `rows`.

    Norms read and write; a residual reads twice and writes; an activation function reads what its matrices gave and
    writes what the next one takes; rotary embeddings read and write queries and keys. Attention that is not fused
    writes its scores, reads and writes them for the softmax, again for dropout, and reads them.
    """
    mesh, h, t = layout.mesh, model.hidden, layout.mesh.tp
    tokens = rows * sequence / mesh.cp
    outside = tokens / (t if layout.sequence_parallel else 1)  # tokens between cut layers
    queries, keys, wide = model.queries / t, model.keys / t, model.mlp / t
    routed, experts = tokens * model.top, max(model.experts / mesh.ep, 1)
    inputs = 2 if model.gated else 1
    found = [
        pointwise(outside, h, 2 + 2 + 3 + 3),  # two norms, two residuals
        product(tokens, h, queries + 2 * keys),
        product(tokens, queries, h),
        product(routed, h, inputs * wide, experts),
        pointwise(routed, wide, inputs + 1),
        product(routed, wide, h, experts),
    ]
    if model.experts:
        found.append(pointwise(routed, h, 4))  # into the slots of the experts, and back
    if not model.positions:
        found.append(pointwise(tokens, queries + keys, 2))
    pairs = 4 * tokens * sequence * queries  # FLOPs of both products with all keys
    if kernels.fused_attention:
        return [*found, Kernel(pairs / 2, 2 * tokens * 2 * (queries + keys), (2.5, 0.0))]  # makes the scores again
    scores = tokens * sequence * model.heads / t
    moved = scores + 2 * tokens * queries
    products = [Kernel(pairs / 2, 2 * moved, (2.0, 0.0))] * 2
    return [*found, *products, pointwise(scores, 1, 4 if kernels.dropout else 2)]


class Block(NamedTuple):
    """Seconds of one block and microbatch: forward, and backward by input and weight; `products` and `tensor` are what
    of forward and backward together goes to matrix products and to the tensor axis."""

    forward: float
    backward_input: float
    backward_weight: float
    products: float
    tensor: float
    others: float  # of the context and expert axes, as far as computation does not hide it


@lru_cache(maxsize=4096)
def block_seconds(
    model: Transformer, layout: Layout, rows: int, sequence: int, cluster: Cluster, kernels: Kernels
) -> Block:
    """One block on one rank. What recompute makes again counts as backward of the input."""
    mesh = layout.mesh
    parts = [(k, k.seconds(cluster, kernels)) for k in block_kernels(model, layout, rows, sequence, kernels)]
    forward = sum(s for _, s in parts)
    by_input, by_weight = (sum(k.again[i] * s for k, s in parts) for i in (0, 1))
    products = sum(s * (1 + sum(k.again)) for k, s in parts if k.flops)

    activation = rows * sequence / mesh.cp * model.hidden * 2
    link = _link(cluster, layout, "tp", kernels)
    once = 2 * link.seconds(all_reduce_bytes(activation, mesh.tp), 2 * (mesh.tp - 1)) if mesh.tp > 1 else 0.0
    share = 2 * model.keys / mesh.tp * rows * sequence / mesh.cp * 2  # of keys and values
    ring = _link(cluster, layout, "cp", kernels).seconds((mesh.cp - 1) * share, mesh.cp - 1)
    attention = max((s for k, s in parts if k.flops and k.again[1] == 0), default=0.0)
    ring = max(ring - attention, 0.0) if kernels.overlap else ring
    slots = gather_bytes(model.top * activation, mesh.ep) if model.experts else 0.0
    there_and_back = 2 * _link(cluster, layout, "ep", kernels).seconds(slots, 1) if slots else 0.0
    others, others_backward = ring + there_and_back, 2 * ring + there_and_back  # a ring takes gradients along

    again = {
        "none": 0.0,
        "selective": sum(s for k, s in parts if not k.flops) if kernels.fused_attention else attention,
        "full": forward + once + others,
    }[layout.recompute]
    forwards = 2 if layout.recompute == "full" else 1
    return Block(
        forward + once + others,
        by_input + once + others_backward + again,
        by_weight,
        products,
        (forwards + 1) * once,
        forwards * others + others_backward,
    )


def _link(cluster: Cluster, layout: Layout, axis: str, kernels: Kernels) -> Link:
    link = cluster.link(layout.mesh, axis)
    return Link(link.latency, link.bandwidth * kernels.reach)


# -- a step --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Prediction:
    """A step as it is expected. parts: seconds of the busiest rank by what they go to; they add up to `seconds`.

    memory: bytes by what they are for, on the rank that needs most. exact: the pipeline was simulated, not estimated.
    """

    model: Transformer
    layout: Layout
    cluster: Cluster
    batch: int
    sequence: int
    parts: dict[str, float]
    memory: dict[str, float]
    costs: Costs
    exact: bool

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def peak_memory(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """In the device's memory, a twentieth of it left for what is not counted here."""
        return self.peak_memory <= 0.95 * self.cluster.device.memory

    @property
    def tokens_per_second(self) -> float:
        """Of the whole cluster."""
        return self.batch * self.sequence / self.seconds

    def flops_per_device(self, recompute: bool = False, causal: bool = False) -> float:
        """FLOP/s of one device: the model's, or with what is recomputed, as `step_flops` counts them."""
        how = self.layout.recompute if recompute else "none"
        done = step_flops(self.model, self.batch, self.sequence, how, causal)
        return done / self.seconds / self.layout.mesh.size

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization: the model's FLOP/s over the data sheet's peak (Chowdhery et al. 2022, PaLM)."""
        return self.flops_per_device() / self.cluster.device.bf16

    @property
    def hfu(self) -> float:
        """Hardware FLOPs utilization: recomputed FLOPs count too (Korthikanti et al. 2022)."""
        return self.flops_per_device(recompute=True) / self.cluster.device.bf16

    @cached_property
    def timeline(self) -> Timeline:
        """The pipeline's part of the step, action by action."""
        return simulate(self.layout.order(), self.costs)

    def __repr__(self) -> str:
        return f"<{self}>"

    def __str__(self) -> str:
        shares = {name: seconds / self.seconds for name, seconds in self.parts.items()}
        spent = ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if share > 0.005)
        memory = f"{self.peak_memory / 1e9:.0f} of {self.cluster.device.memory / 1e9:.0f} GB"
        return (
            f"{self.model.name} on {self.layout.mesh}: {self.seconds:.2f} s a step, "
            f"{self.flops_per_device() / 1e12:.0f} TFLOP/s a device (MFU {self.mfu:.0%}), "
            f"{memory}{'' if self.fits else ', which does not fit'}; {spent}"
        )


def known(model: Any, cluster: Any, sequence: int) -> tuple[Transformer, Cluster]:
    """What a caller means by a model and a cluster. TypeError, with what would fit, if that is not clear; ValueError if
    the model has no positions for rows as long."""
    model = find_model(model) if isinstance(model, str) else model
    if not isinstance(model, Transformer):
        raise TypeError(f"model={model!r}: a Transformer, or the name of one, such as 'llama-8b'")
    if not isinstance(cluster, Cluster):
        raise TypeError(f"cluster={cluster!r}: a Cluster, such as CLUSTERS['h100'].of(16)")
    if type(sequence) is not int or sequence < 1:
        raise ValueError(f"sequence={sequence!r}: a whole number, at least 1")
    if 0 < model.positions < sequence:
        raise ValueError(f"a row of {sequence} tokens is longer than the {model.positions} positions of {model.name}")
    return model, cluster


def predict(
    model: Transformer | str,
    layout: Layout,
    cluster: Cluster,
    batch: int,
    sequence: int,
    formats: Formats = MIXED,
    kernels: Kernels = TODAY,
    exact: bool = True,
) -> Prediction:
    """A step over `batch` rows of `sequence` tokens.

    model: a Transformer, or the name of one in `transformer.MODELS`. cluster: `CLUSTERS["h100"].of(16)` for instance.
        It has as many devices as the layout's mesh has ranks.
    formats, kernels: bytes of a number, and what software makes of a device; see `minipar.cost`.
    exact: simulate the schedule. Else its length is estimated as that of the busiest rank, plus the time in which the
        pipe fills and drains: (p-1) times a stage's forward and input gradient, where a schedule does not shorten it.
    ValueError if the mesh is not the cluster's size, or model and batch do not fit on the layout.
    """
    model, cluster = known(model, cluster, sequence)
    if not isinstance(layout, Layout):
        raise TypeError(f"layout={layout!r}: a Layout, such as Layout(Mesh(dp=8), microbatches=4)")
    mesh = layout.mesh
    if mesh.size != cluster.gpus:
        raise ValueError(f"{mesh} has {mesh.size} ranks, and the cluster {cluster.gpus} devices")
    if type(batch) is not int or batch < 1:
        raise ValueError(f"batch={batch!r}: a whole number, at least 1")
    if mesh.ep > 1 and (not model.experts or model.experts % mesh.ep):
        raise ValueError(f"ep={mesh.ep} does not divide the {model.experts} experts of {model.name}")
    if model.heads % mesh.tp or (model.kv_heads % mesh.tp and mesh.tp % model.kv_heads):
        raise ValueError(f"tp={mesh.tp} does not divide the {model.heads} heads of {model.name}")
    rows, m = layout.rows(batch), layout.microbatches
    block = block_seconds(model, layout, rows, sequence, cluster, kernels)
    owned = shares(model, layout)
    blocks = {stage: count for share in owned for stage, count in share.stages.items()}
    last = max(blocks)
    head = product(rows * sequence / mesh.cp, model.hidden, model.vocabulary / mesh.tp)
    loss = pointwise(rows * sequence / mesh.cp, model.vocabulary / mesh.tp, 2, size=4)
    top, soft = head.seconds(cluster, kernels), loss.seconds(cluster, kernels)

    def forward(action: Action) -> float:
        return blocks[action.stage] * block.forward + (top + soft if action.stage == last else 0)

    def by_input(action: Action) -> float:
        return blocks[action.stage] * block.backward_input + (top + soft if action.stage == last else 0)

    def by_weight(action: Action) -> float:
        return blocks[action.stage] * block.backward_weight + (top if action.stage == last else 0)

    activation = rows * sequence / mesh.cp * model.hidden * 2 / (mesh.tp if layout.sequence_parallel else 1)
    crossing = _link(cluster, layout, "pp", kernels).seconds(activation, 1) if mesh.pp > 1 else 0.0
    costs = Costs(forward, by_input, by_weight, crossing)

    def work(share: Share) -> float:
        each = (Action(op, stage, 0) for stage in share.stages for op in (Op.F, Op.B))
        return m * sum(costs(action) for action in each)

    busy = max(owned, key=work)
    if exact:
        end = simulate(layout.order(), costs).end
    else:
        end = work(busy) + _estimated_bubble(layout, costs, len(blocks)) + 2 * (len(blocks) - 1) * crossing
    fullest = max(owned, key=lambda share: share.dense + share.experts)
    data = _data_seconds(layout, cluster, fullest, kernels, formats, work(fullest))
    own = busy.dense / layout.replicas + busy.experts / (mesh.dp * mesh.cp)
    own = own if layout.zero else busy.dense + busy.experts
    update = 2 * own * (formats.optimizer + formats.weights + formats.gradients) / cluster.device.bandwidth
    update /= kernels.reach

    per = m * busy.blocks
    products = per * block.products + (3 * m * top if busy.last else 0)
    parts = {
        "matrix products": products,
        "other kernels": work(busy) - products - per * (block.tensor + block.others),
        "tensor axis": per * block.tensor,
        "context and expert axes": per * block.others,
        "pipeline": max(end - work(busy), 0.0),
        "data axis": data,
        "optimizer": update,
    }
    memory = max(stage_memory(model, layout, batch, sequence, formats, kernels), key=lambda x: sum(x.values()))
    return Prediction(model, layout, cluster, batch, sequence, parts, memory, costs, exact)


def _estimated_bubble(layout: Layout, costs: Costs, stages: int) -> float:
    """Seconds that the busiest rank waits, about: see the docstrings of the schedules."""
    p, middle = layout.mesh.pp, stages // 2
    f, i, w = (costs(Action(op, middle, 0)) for op in (Op.F, Op.I, Op.W))
    one = {"1f1b": f + i + w, "gpipe": f + i + w, "interleaved": f + i + w}.get(layout.schedule)
    if layout.schedule == "zero-bubble-h1":
        one = max(f + i - w, 0)
    elif layout.schedule == "zero-bubble-h2":
        one = max(f + i - 2 * w, 0)
    elif layout.schedule == "zero-bubble-v":
        one = max(f, i, w) - min(f, i, w)
    assert one is not None
    return (p - 1) * one


def _data_seconds(
    layout: Layout, cluster: Cluster, share: Share, kernels: Kernels, formats: Formats, work: float
) -> float:
    """Seconds of a step that gradients and weights travel and nothing hides.

    Gradients that travel once hide behind the last microbatch's backward; weights that come back after the step
    (ZeRO-1, 2) hide behind nothing. What travels with every microbatch hides behind all of them.
    """
    mesh, m = layout.mesh, layout.microbatches
    exposed = 0.0
    axes = [name for name in ("dp", "ep", "cp") if mesh.shape[name] > 1]
    for parameters, ranks, used in (
        (share.dense, layout.replicas, axes),
        (share.experts, mesh.dp * mesh.cp, [a for a in axes if a != "ep"]),
    ):
        if ranks == 1 or not parameters:
            continue
        link = min((_link(cluster, layout, axis, kernels) for axis in used), key=lambda x: x.bandwidth)
        calls = (ranks - 1) * (share.blocks if layout.zero == 3 else 1)
        gradients = link.seconds(gather_bytes(parameters * formats.gradients, ranks), calls)
        weights = link.seconds(gather_bytes(parameters * formats.weights, ranks), calls)
        backward = work / m * 2 / 3 if kernels.overlap else 0.0
        if layout.zero == 0:
            exposed += max(2 * gradients - backward, 0)
        elif layout.zero == 1 or (layout.zero == 2 and layout.whole_gradients):
            exposed += max(gradients - backward, 0) + weights
        elif layout.zero == 2:
            exposed += max(m * gradients - backward * m, 0) + weights
        else:
            scatters = 1 if layout.whole_gradients else m
            exposed += max(scatters * gradients + 2 * m * weights - (work if kernels.overlap else 0), 0)
    return exposed
