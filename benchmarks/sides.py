"""One training step of the same model, made in several ways. All of this runs inside ranks.

A side is minipar, a form of torch's own, or a floor: a rank's share of the work alone, without any communication.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

import minipar
from minipar import Config, Mesh, parallelize

RANKS = 2


@dataclass(frozen=True)
class Setting:
    """The model and the batch. Everything is in fp32."""

    config: Config = field(default_factory=lambda: Config(vocab=512, context=128, depth=8, width=256, heads=8))
    rows: int = 16
    microbatches: int = 8

    def long(self) -> "Setting":
        """As many tokens, in a row for each rank: attention over long sequences."""
        context = self.config.context * self.rows // RANKS
        return replace(self, config=replace(self.config, context=context), rows=RANKS)

    def model(self) -> minipar.model.GPT:
        """The same weights on every call and every rank."""
        torch.manual_seed(0)
        return minipar.gpt(self.config)

    def batch(self) -> tuple[Tensor, Tensor]:
        """The global batch: tokens and targets, both (rows, context)."""
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(self.config.vocab, (self.rows, self.config.context + 1), generator=generator)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


SMALL = Setting(Config(vocab=32, context=16, depth=4, width=32, heads=4), rows=8, microbatches=4)


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """(B, T, vocab), (B, T) -> the mean over all tokens."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@dataclass
class Side:
    """backward() runs forward and backward on this rank's part of the batch. gradients() gives whole gradients,
    under the names of the whole model, of at least those parameters that live on this rank."""

    backward: Callable[[], object]
    named_parameters: list[tuple[str, nn.Parameter]]
    gradients: Callable[[], dict[str, Tensor]]
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        # The fused AdamW is torch's fastest on the CPU. It takes DTensors or plain tensors, so each has its group.
        parameters = [p for _, p in self.named_parameters]
        kinds = [[p for p in parameters if isinstance(p, DTensor) == cut] for cut in (True, False)]
        groups = [{"params": kind} for kind in kinds if kind]
        self.optimizer = torch.optim.AdamW(groups, lr=3e-4, fused=True)

    def step(self) -> None:
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def _plain(backward: Callable[[], object], *modules: nn.Module) -> Side:
    named = [pair for module in modules for pair in module.named_parameters()]

    def gradients() -> dict[str, Tensor]:
        return {name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for name, p in named}

    return Side(backward, named, gradients)


# -- minipar -------------------------------------------------------------------------------------------------------


def ours(setting: Setting, mesh: Mesh, **options) -> Side:
    model = parallelize(setting.model(), mesh, **options)
    tokens, targets = setting.batch()
    return Side(lambda: model.step(tokens, targets), list(model.named_parameters()), model.full_gradients)


def our_pipeline(setting: Setting, schedule: minipar.schedule.Scheduler) -> Side:
    return ours(setting, Mesh(pp=RANKS), schedule=schedule, microbatches=setting.microbatches)


def our_backward(setting: Setting, schedule: minipar.schedule.Scheduler) -> Side:
    """No pipeline: one stage on each rank, whose backward is whole or split as the schedule says."""
    return ours(setting, Mesh(dp=RANKS), schedule=schedule, microbatches=setting.microbatches // RANKS)


# -- data ----------------------------------------------------------------------------------------------------------


def _own_rows(setting: Setting) -> list[Tensor]:
    return [x.chunk(RANKS)[dist.get_rank()] for x in setting.batch()]


def ddp(setting: Setting, **options) -> Side:
    module = setting.model()
    model = DistributedDataParallel(module, gradient_as_bucket_view=True, **options)
    tokens, targets = _own_rows(setting)
    return _plain(lambda: mean_loss(model(tokens), targets).backward(), module)


def data_floor(setting: Setting) -> Side:
    model, (tokens, targets) = setting.model(), _own_rows(setting)
    return _plain(lambda: mean_loss(model(tokens), targets).backward(), model)


def fsdp(setting: Setting) -> Side:
    """torch's ZeRO-3: each block is a unit, and what is left the last; resharded behind its forward, as by default."""
    model, mesh = setting.model(), init_device_mesh("cpu", (RANKS,))
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh)
    tokens, targets = _own_rows(setting)
    return _plain(lambda: mean_loss(model(tokens), targets).backward(), model)


# -- context -------------------------------------------------------------------------------------------------------


class OnPositions(nn.Module):
    """The model on some tokens of a sequence. They do not stand side by side, so their positions are given."""

    def __init__(self, model: minipar.model.GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:  # (B, T/n), (T/n,) -> (B, T/n, vocab)
        x = self.model.embed.token(tokens) + self.model.embed.position(positions)
        for block in self.model.blocks:
            x = block(x)
        return self.model.head(self.model.norm(x))


def torch_context(setting: Setting) -> Side:
    """torch's context parallelism: it cuts the batch and the positions, and replaces attention."""
    module, mesh = setting.model(), init_device_mesh("cpu", (RANKS,))
    model = DistributedDataParallel(OnPositions(module), gradient_as_bucket_view=True)
    (tokens, targets), positions = setting.batch(), torch.arange(setting.config.context)

    def backward() -> None:
        with context_parallel(mesh, buffers=[tokens, targets, positions], buffer_seq_dims=[1, 1, 0]):
            mean_loss(model(tokens, positions), targets).backward()

    return _plain(backward, module)


# -- tensor --------------------------------------------------------------------------------------------------------


def dtensor(setting: Setting, sharded_loss: bool = False, together: bool = True) -> Side:
    """torch's tensor parallelism.

    sharded_loss: logits stay cut along the vocabulary, under `loss_parallel`. together: the input of q, k and v is
    made a DTensor once, so that their gradients are added before they travel.
    """
    model, mesh = setting.model(), init_device_mesh("cpu", (RANKS,))
    logits = Shard(-1) if sharded_loss else Replicate()
    plan: dict = {
        "embed.token": RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=logits, use_local_output=not sharded_loss),
    }
    for i in range(setting.config.depth):
        for column in ("attention.q", "attention.k", "attention.v", "mlp.up"):
            plan[f"blocks.{i}.{column}"] = ColwiseParallel()
        for row in ("attention.out", "mlp.down"):
            plan[f"blocks.{i}.{row}"] = RowwiseParallel()
        if together:
            plan[f"blocks.{i}.attention"] = PrepareModuleInput(
                input_layouts=(Replicate(),), desired_input_layouts=(Replicate(),)
            )
    parallelize_module(model, mesh, plan)
    tokens, targets = setting.batch()

    def backward() -> None:
        with loss_parallel() if sharded_loss else contextlib.nullcontext():
            mean_loss(model(tokens), targets).backward()

    return _plain(backward, model)


def tensor_floor(setting: Setting) -> Side:
    """Half of the heads, of the hidden units and of the vocabulary; all of the norms and residuals."""
    model = setting.model()

    def narrow(layer: nn.Linear, dim: int) -> nn.Linear:
        sizes = [layer.in_features, layer.out_features]
        sizes[1 - dim] //= RANKS
        return nn.Linear(*sizes, bias=layer.bias is not None)

    for block in model.blocks:
        attention, mlp = block.attention, block.mlp
        attention.q, attention.k, attention.v = (narrow(x, 0) for x in (attention.q, attention.k, attention.v))
        attention.out, mlp.up, mlp.down = narrow(attention.out, 1), narrow(mlp.up, 0), narrow(mlp.down, 1)
    share = setting.config.vocab // RANKS
    model.embed.token, model.head = nn.Embedding(share, setting.config.width), narrow(model.head, 0)
    tokens, targets = (x % share for x in setting.batch())
    return _plain(lambda: mean_loss(model(tokens), targets).backward(), model)


# -- pipeline ------------------------------------------------------------------------------------------------------


Layout = Callable[[int], list[int]]  # the stages of a rank


def one_each(rank: int) -> list[int]:
    return [rank]


def around(rank: int) -> list[int]:
    """Two chunks a rank, interleaved."""
    return [rank, rank + RANKS]


def folded(rank: int) -> list[int]:
    """Two chunks a rank, down and up again: a V."""
    return [rank, 2 * RANKS - 1 - rank]


class Part(nn.Module):
    """A stage as a user of torch's pipelining writes it: some of the layers, under the names of the whole model."""

    def __init__(self, model: minipar.model.GPT, stage: int, stages: int) -> None:
        super().__init__()
        depth, first, last = len(model.blocks), stage == 0, stage == stages - 1
        mine = range(depth * stage // stages, depth * (stage + 1) // stages)
        self.embed = model.embed if first else None
        self.blocks = nn.ModuleDict({str(i): model.blocks[i] for i in mine})
        self.norm, self.head = (model.norm, model.head) if last else (None, None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) if self.embed else x
        for block in self.blocks.values():
            x = block(x)
        return self.head(self.norm(x)) if self.head else x


def _parts(setting: Setting, layout: Layout) -> dict[int, Part]:
    """This rank's stages."""
    model, mine = setting.model(), layout(dist.get_rank())
    return {stage: Part(model, stage, len(mine) * RANKS) for stage in mine}


def torch_pipeline(
    setting: Setting, schedule: type[PipelineScheduleSingle] | type[PipelineScheduleMulti], layout: Layout = one_each
) -> Side:
    parts = _parts(setting, layout)
    count = len(parts) * RANKS
    stages = [PipelineStage(part, stage, count, torch.device("cpu")) for stage, part in parts.items()]
    several = issubclass(schedule, PipelineScheduleMulti)
    runner = schedule(stages if several else stages[0], n_microbatches=setting.microbatches, loss_fn=mean_loss)
    tokens, targets = setting.batch()
    arguments = [tokens] if 0 in parts else []
    given = {"target": targets, "losses": []} if count - 1 in parts else {}
    return _plain(lambda: runner.step(*arguments, **given, return_outputs=False), *parts.values())


def pipeline_floor(setting: Setting, layout: Layout = one_each) -> Side:
    """This rank's layers on every microbatch, one after the other. What stands idle in a pipeline is not in it."""
    parts, c = _parts(setting, layout).values(), setting.config
    tokens, targets = (x.chunk(setting.microbatches) for x in setting.batch())
    state = torch.randn(len(tokens[0]), c.context, c.width)

    def backward() -> None:
        for x, y in zip(tokens, targets, strict=True):
            for part in parts:
                out = part(x if part.embed else state.clone().requires_grad_())
                if part.head:
                    (mean_loss(out, y) / setting.microbatches).backward()
                else:
                    out.backward(state)

    return _plain(backward, *parts)


# -- what is compared ----------------------------------------------------------------------------------------------

Maker = Callable[[Setting], Side]


@dataclass(frozen=True)
class Comparison:
    """minipar beside one or several forms of a peer, of which the fastest in the same run counts."""

    what: str
    ours: Maker
    peers: dict[str, Maker]
    floor: Maker
    mark: float | None = None  # the most that the ratio may be
    long: bool = False  # in long sequences

    @property
    def sides(self) -> dict[str, Maker]:
        return {"minipar": self.ours, **self.peers, "floor": self.floor}


COMPARISONS = {
    "data": Comparison(
        "data parallel step",
        partial(ours, mesh=Mesh(dp=RANKS)),
        {"DDP": ddp, "DDP, 4 MiB buckets": partial(ddp, bucket_cap_mb=4)},
        data_floor,
        mark=1.00,
    ),
    "tensor": Comparison(
        "tensor parallel step",
        partial(ours, mesh=Mesh(tp=RANKS)),
        {"DTensor": partial(dtensor, together=False)},
        tensor_floor,
        mark=0.86,
    ),
    "tensor-tuned": Comparison(
        "tensor parallel step, DTensor tuned",
        partial(ours, mesh=Mesh(tp=RANKS)),
        {"DTensor": dtensor, "DTensor, loss_parallel": partial(dtensor, sharded_loss=True)},
        tensor_floor,
    ),
    "1f1b": Comparison(
        "pipeline step, 1F1B",
        partial(our_pipeline, schedule=minipar.one_f_one_b),
        {"Schedule1F1B": partial(torch_pipeline, schedule=Schedule1F1B)},
        pipeline_floor,
        mark=1.00,
    ),
    "gpipe": Comparison(
        "pipeline step, GPipe",
        partial(our_pipeline, schedule=minipar.gpipe),
        {"ScheduleGPipe": partial(torch_pipeline, schedule=ScheduleGPipe)},
        pipeline_floor,
    ),
    "interleaved": Comparison(
        "pipeline step, interleaved",
        partial(our_pipeline, schedule=minipar.interleaved),
        {"ScheduleInterleaved1F1B": partial(torch_pipeline, schedule=ScheduleInterleaved1F1B, layout=around)},
        partial(pipeline_floor, layout=around),
        mark=0.97,
    ),
    "zero-bubble": Comparison(
        "pipeline step, zero bubble",
        partial(our_pipeline, schedule=minipar.zero_bubble_v),
        {
            "ScheduleZBVZeroBubble": partial(torch_pipeline, schedule=ScheduleZBVZeroBubble, layout=folded),
            "ScheduleInterleavedZeroBubble": partial(
                torch_pipeline, schedule=ScheduleInterleavedZeroBubble, layout=around
            ),
        },
        partial(pipeline_floor, layout=folded),
        mark=0.97,
    ),
    "split": Comparison(
        "step with split backwards",
        partial(our_backward, schedule=minipar.zero_bubble_h1),
        {"whole backwards": partial(our_backward, schedule=minipar.one_f_one_b)},
        data_floor,
        mark=1.05,
    ),
    "zero3": Comparison(
        "ZeRO-3 step",
        partial(ours, mesh=Mesh(dp=RANKS), zero=3),
        {"FSDP2": fsdp},
        data_floor,
        mark=0.92,
    ),
    "ring": Comparison(
        "context parallel step, ring attention",
        partial(ours, mesh=Mesh(cp=RANKS)),
        {"context_parallel": torch_context},
        data_floor,  # half of the rows: as many tokens, and as much attention, as half of every row in zigzag shares
        long=True,
    ),
}

# -- what the driver asks of a rank --------------------------------------------------------------------------------

_made: dict[tuple[str, str], Side] = {}  # (comparison, side), kept from one run to the next


def make(comparison: str, side: str, setting: Setting) -> dict[str, Tensor] | str:
    """Build a side and warm it up. Returns its gradients, before the first update, or torch's words if torch has
    nothing that does this on a CPU."""
    torch.set_num_threads(1)
    made = COMPARISONS[comparison].sides[side](setting)
    try:
        made.backward()
    except NotImplementedError as missing:
        return str(missing)
    _made[comparison, side] = made
    gradients = {name: g.clone() for name, g in made.gradients().items()}
    made.optimizer.zero_grad()
    for _ in range(2):
        made.step()
    return gradients


def time_step(comparison: str, side: str) -> tuple[float, float]:
    """Begin and end of one step, on the clock that the processes of a machine share."""
    made = _made[comparison, side]
    dist.barrier()
    start = time.perf_counter()
    made.step()
    return start, time.perf_counter()


def peak_memory(comparison: str, side: str, setting: Setting) -> int:
    """The most bytes that this rank's tensors take during a step, with all that stays from one step to the next.

    They are counted by torch's profiler, at every allocation from the side's making on: exact, and the same for
    everybody. What is not a tensor (gloo's own buffers, Python's objects) is not counted, for anybody.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        made = COMPARISONS[comparison].sides[side](setting)
        made.step()
        begin = time.time_ns()
        made.step()
    changes = sorted((e.start_ns(), e.nbytes()) for e in p.profiler.kineto_results.events() if e.name() == "[memory]")
    totals = accumulate(size for _, size in changes)
    return max(total for (when, _), total in zip(changes, totals, strict=True) if when >= begin)


def alone(setting: Setting) -> dict[str, Tensor]:
    """The gradients of one process."""
    model, (tokens, targets) = setting.model(), setting.batch()
    mean_loss(model(tokens), targets).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# -- where a step's time goes --------------------------------------------------------------------------------------


def where(comparison: str, side: str, steps: int) -> dict[str, float]:
    """Medians over some steps, in seconds. The main thread computes; gloo's own threads send, receive and add.

    step: from begin to end. main thread: its processor time. waiting: the rest of the step, for peers or for a core.
    other threads: their processor time. optimizer: update and zero_grad.
    """
    made, rows = _made[comparison, side], []
    for _ in range(steps):
        dist.barrier()
        wall, thread, process = time.perf_counter(), time.thread_time(), time.process_time()
        made.backward()
        update = time.perf_counter()
        made.optimizer.step()
        made.optimizer.zero_grad()
        end = time.perf_counter()
        main = time.thread_time() - thread
        others = time.process_time() - process - main
        rows.append([end - wall, main, end - wall - main, others, end - update])
    names = ("step", "main thread", "waiting", "other threads", "optimizer")
    return dict(zip(names, torch.tensor(rows, dtype=torch.float64).median(0).values.tolist(), strict=True))


def operators(comparison: str, side: str, rows: int = 25) -> str:
    """torch's own table of one step's operators, those that take longest on top."""
    dist.barrier()
    with profile(activities=[ProfilerActivity.CPU]) as p:
        _made[comparison, side].step()
    return p.key_averages().table(sort_by="self_cpu_time_total", row_limit=rows, max_name_column_width=50)
