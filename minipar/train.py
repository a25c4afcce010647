"""parallelize: a model on a mesh. The only file that knows every strategy."""

import copy
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import partial
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from . import context, cut, data, interop, tensor
from .collectives import (
    Axis,
    all_gather,
    all_reduce,
    bounds,
    broadcast,
    connect,
    device_mesh,
    everyone,
    irecv,
    isend,
    join,
    shard,
)
from .deferral import Deferral
from .device import default_generator
from .expert import cut_experts
from .mesh import Mesh
from .model import MoE
from .pipeline import Batch, Executor, Idle, Stages, spread
from .precision import LossScale, computing_in
from .randomness import Masks, Shared, Streams, remember
from .recompute import HOW, keep_less
from .recording import collect
from .schedule import Action, Op, Scheduler, check, communicate, forward_only, one_f_one_b, owners
from .timeline import Costs, Span, Timeline, simulate
from .transport import unbooked
from .world import here
from .wrap import Stage, Wrap, Wrapped, copy_part, hide, local, together
from .zero import Shares, Unit

Loss = Callable[[Any, Any], tuple[Tensor, Tensor | int]]
Some = TypeVar("Some", bound=Tensor)


def parallelize(
    model: nn.Module,
    mesh: Mesh,
    *,
    schedule: Scheduler = one_f_one_b,
    microbatches: int = 1,
    loss: Loss = tensor.cross_entropy,
    sequence_parallel: bool = False,
    plan: dict[str, str] | None = None,
    zero: int = 0,
    whole_gradients: bool = False,
    recompute: str = "none",
    dtype: torch.dtype | None = None,
    wrap: Wrap | None = None,
    pace: Costs | None = None,
    **unknown: Any,
) -> "Parallel":
    """Lay a model out on a mesh. Every rank of the mesh calls it, with the same model and weights.

    model: `minipar.gpt(...)`, a model of transformers (also an encoder with its decoder), or any module with one list
        of blocks. Its weights are the initial ones; the module itself is left alone.
    mesh: dp and ep share out the rows; ep also the experts of layers that the plan gives the style moe_tp_experts.
    schedule: order of the pipeline's work, one of `gpipe`, `one_f_one_b`, `interleaved`, `zero_bubble_h1`,
        `zero_bubble_h2`, `zero_bubble_v`, or your own function of (ranks of pp, microbatches).
    microbatches: parts into which a step cuts each data rank's rows; their gradients add up.
    loss: (outputs, targets) -> (sum, count). The step divides by the global count, so padding, ignored labels and
        unequal rows come out right. By default the cross-entropy over all tokens that are not labeled -100. Outputs are
        the logits where the model's output has such, else all of it; the loss of a model of transformers is not used.
    sequence_parallel: between cut layers, tensor ranks hold parts of the sequence in place of copies.
    plan: layer name -> style, see `minipar.tensor`; by default the model's own `tp_plan`, or one that is known for its
        architecture, see `minipar.interop`. To change a line: `interop.plan_of(model) | {layer: style}`.
    zero: what data ranks share out instead of holding it all, see `minipar.zero`: 1 the optimizer's states, 2 also
        gradients, 3 also parameters. `parameters()` then gives 1-d shares.
    whole_gradients: with zero=2 or 3, keep whole gradients until the end of the step. They are sent once a step then,
        not once a microbatch.
    recompute: "full": keep only what goes into a block, and compute the rest again in backward; "selective": keep also
        what is dear to compute. See `minipar.recompute`.
    dtype: torch.bfloat16 or torch.float16: what matrix products and attention compute in. Weights, gradients and their
        sums stay in the module's own. With float16 the loss is scaled; after an overflow gradients are None, so that
        the optimizer's step changes nothing.
    wrap: (stage, device_mesh) -> a module: torch's fully_shard or DistributedDataParallel around each rank's stage. The
        device mesh has the axes by their names. See `minipar.wrap`.
    pace: what actions cost. Ranks then wait so long where they would compute, and only what travels between stages and
        for gradients is real: the loss is NaN and gradients are zero, but the recorded timeline is that of a machine
        with a core for each rank, on however few there are.

    Raises ValueError, with what would fit, if the mesh is not the number of ranks, tp does not divide the heads, there
    are fewer blocks than stages, ep does not divide the experts, the plan does not match the model, or the schedule is
    not complete.
    """
    if unknown:
        names = ", ".join(field.name for field in fields(Options))
        raise TypeError(f"parallelize has no option {', '.join(unknown)}; its options are {names}")
    if not isinstance(model, nn.Module) or not isinstance(mesh, Mesh):
        raise TypeError(f"parallelize takes a module and a Mesh, not {type(model).__name__} and {type(mesh).__name__}")
    options = schedule, microbatches, loss, sequence_parallel, plan, zero, whole_gradients, recompute, dtype, wrap, pace
    return Parallel(model, mesh, Options(*options))


@dataclass(frozen=True)
class Options:
    """Those of `parallelize`."""

    schedule: Scheduler
    microbatches: int
    loss: Loss
    sequence_parallel: bool
    plan: dict[str, str] | None
    zero: int
    whole_gradients: bool
    recompute: str
    dtype: torch.dtype | None
    wrap: Wrap | None
    pace: Costs | None

    def __post_init__(self) -> None:
        if not callable(self.schedule):
            what = "a function of (stages, microbatches), such as minipar.one_f_one_b"
            raise TypeError(f"schedule={self.schedule!r}: {what}")
        if not callable(self.loss):
            what = "a function (outputs, targets) -> (sum, count), such as minipar's cross_entropy"
            raise TypeError(f"loss={self.loss!r}: {what}")
        if type(self.microbatches) is not int or self.microbatches < 1:
            raise ValueError(f"microbatches={self.microbatches!r}: a whole number, at least 1")
        if self.zero not in (0, 1, 2, 3):
            raise ValueError(f"zero={self.zero!r}: 0, 1, 2 or 3")
        if self.recompute not in HOW:
            raise ValueError(f"recompute={self.recompute!r}: one of {', '.join(HOW)}")
        if self.dtype not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype={self.dtype!r}: torch.bfloat16, torch.float16, or None for the module's own")
        if not isinstance(self.pace, Costs | None):
            raise TypeError(f"pace={self.pace!r}: minipar.Costs(forward=...), in seconds")
        if self.pace and (self.wrap or self.zero == 3):
            raise ValueError("pace does not go with wrap or zero=3: blocks that compute nothing ask for no weights")


class Parallel:
    """A model on a mesh, as one of its ranks has it. Made by `parallelize`."""

    def __init__(self, model: nn.Module, mesh: Mesh, options: Options):
        self.mesh, axes, me = mesh, connect(mesh), here()
        self.pp, self.ep, self.cp, self.tp, self.device = axes["pp"], axes["ep"], axes["cp"], axes["tp"], me.device
        self.dp = join(mesh, "dp", "ep")  # who shares out the rows
        self.replicas = join(mesh, "dp", "ep", "cp")  # who has the same parameters
        self.replicas_of_experts = join(mesh, "dp", "cp")

        microbatches, loss, plan, zero = options.microbatches, options.loss, options.plan, options.zero
        order = options.schedule(self.pp.size, microbatches)
        if len(order) != self.pp.size:
            raise ValueError(f"the schedule has programs for {len(order)} ranks, but pp={self.pp.size}")
        check(order, microbatches)
        simulate(order)  # raises Deadlock before a rank can hang
        self.microbatches, self.owner = microbatches, owners(order)
        self.training_program = communicate(order)[self.pp.index]
        self.inference_program = communicate(forward_only(order))[self.pp.index]

        _check_replicas(model, self.device)
        self.config = getattr(model, "config", None)
        self.module = _twin(model).to(self.device)
        interop.prepare(self.module)
        self.state_names = _first_names(self.module)
        self.everything = dict(self.module.named_parameters())  # of all stages: name -> parameter
        self.shapes = {name: p.shape for name, p in self.everything.items()}
        self.buffers = {
            key: x for key, x in self.module.state_dict().items() if self.state_names[key] not in self.shapes
        }
        self.streams = Streams(default_generator(self.device))
        deferral = Deferral(holds=any(action.op == Op.W for action in chain(*order)), puts_off=options.wrap is None)
        self.region = tensor.Region(self.tp, options.sequence_parallel and self.tp.size > 1, self.streams, deferral)
        self.masks = Masks(torch.Generator(self.device), self._shared_dims)
        self.masks.replace_in(self.module)
        self.attention: AbstractContextManager = nullcontext()
        if self.cp.size > 1:
            context.cut_behind(_place_of_the_cut(self.module, plan), self.cp)
            self.attention = context.WholeAttention(self.cp)
        tensor.cut_layers(self.module, _plan(model, plan, self.tp), self.region)
        self.mixtures = [layer for layer in self.module.modules() if isinstance(layer, MoE)]
        self._share_experts(plan)
        self.trained = {name for name, p in self.everything.items() if p.requires_grad}
        mine = {stage for stage, index in self.owner.items() if index == self.pp.index}
        needs_blocks = zero == 3 or options.recompute != "none" or options.wrap is not None
        self.stages = Stages(self.module, len(self.owner), mine, needs_blocks, interop.blocks_of(self.module))
        self.homes = {name: self.stages.homes[p] for name, p in self.everything.items()}
        self.here = {name: p for name, p in self.everything.items() if self.homes[name] & mine}
        _own_memory(self.here.values(), model)
        kind = nn.modules.batchnorm._BatchNorm
        if options.recompute != "none":
            for block in chain(*(self.stages.blocks[stage].values() for stage in sorted(mine))):
                keep_less(block, options.recompute, self._remember)
        self.batch_norms = [(name, x) for name, x in self.module.named_modules() if isinstance(x, kind)]

        self.loss = self._loss(loss)
        self.zero, self.whole_gradients = zero, options.whole_gradients or zero < 2
        self.dtype, self.scale = options.dtype, LossScale() if options.dtype is torch.float16 else LossScale(1.0)
        self.shares = {stage: self._shares(stage) for stage in sorted(mine)} if zero else {}
        self.gradients: dict[int, Sequence[data.Gradients | Shares | Wrapped]]
        self.run: Callable[[int, Any, Batch], Any] = Idle(self.stages) if options.pace else self.stages
        if options.wrap:
            self.gradients = {min(mine): [self._wrap(options.wrap)]}
        elif zero:
            self.gradients = {stage: [shares] for stage, shares in self.shares.items()}
        else:
            self.gradients = {stage: self._gradients(stage) for stage in sorted(mine)}
        self.units = {name: unit for some in self.shares.values() for unit in some.units for name in unit.parameters}
        self.owned = {name: p for name, p in self.here.items() if name not in self.units}  # what this rank updates
        self.owned |= {name: unit.pieces[name] for name, unit in self.units.items() if name in unit.pieces}
        if options.wrap:
            self.owned = dict(self.module.named_parameters())
        self.stages.open_window()
        self.executor = Executor(
            self._run_stage,
            self.pp,
            self.owner,
            deferral,
            self.device,
            self._prepare,
            self._settle,
            self._reduce,
            options.pace or (lambda action: 0.0),
        )
        seed = torch.tensor(torch.initial_seed() % 2**63, device=self.device)
        self.seed, self.steps = int(broadcast(seed, everyone())), 0
        self.rows: list[range] = []  # of each microbatch, in the global batch
        self.spans: list = []  # of the last step

    # -- a step ---------------------------------------------------------------------------------------------------

    def step(self, inputs: Batch, targets: Any = None, *, local: bool = False) -> Tensor:
        """Forward and backward over the whole mesh. Sets the gradients (does not add to them).

        inputs: what the model's forward takes, a tensor or a dict of tensors, rows first. The global batch, the same
            on every rank; with `local` this data rank's own rows, which may be of another number than its peers'.
        targets: what the loss takes, rows first; by default `inputs["labels"]`, as they are: a causal model of
            transformers would shift them by one, here that is yours to do.
        Returns the global loss, detached, 0-d, the same on every rank. What balances experts is in the gradients only,
            where a token weighs what a label does in the loss, see `minipar.model.MoE`.
        Raises ValueError for fewer rows than data ranks x microbatches, or if no label counts.
        """
        if targets is None and self.steps == 0:
            interop.look_at_labels(self.module, inputs)
        inputs, targets = self._with_targets(inputs, targets)
        sizes = [len(x) for batch in (inputs, targets) for x in _tensors(batch)]
        inputs, targets = _to(inputs, self.device), _to(targets, self.device)
        if len(set(sizes)) > 1:
            raise ValueError(f"inputs and targets have {sizes} rows: all must have the same number")
        if self.steps == 0 and not local:
            _check_rows([*_tensors(inputs), *_tensors(targets)], self.device)
        # A count that all ranks agree on before the true one is known. Where all labels count, it is the true one.
        guess = 1 if local else next(iter(_tensors(targets))).numel()
        batches, labels = self._microbatches(inputs, local), self._microbatches(self._share(targets), local)
        first = self._first_row(sizes[0], local)
        ends = list(accumulate(len(next(iter(_tensors(x)))) for x in batches))
        self.rows = [range(first + a, first + b) for a, b in pairwise([0, *ends])]  # of the global batch
        total = torch.zeros(2, dtype=torch.float64, device=self.device)  # loss, count

        def conclude(output: Any, microbatch: int) -> Tensor:
            with computing_in(self.dtype, self.device):
                loss, count = _pair(self.loss(getattr(output, "logits", output), labels[microbatch]))
            total.add_(torch.stack([loss.detach().double(), torch.as_tensor(count, device=self.device).double()]))
            return loss * (self.scale.value / guess)

        self._check_layers()
        self._refresh()
        for some in self._all_gradients():
            some.attach()
        self._gather_heads(self.loss is self.given_loss)
        for mixture in self.mixtures:
            mixture.token_weight = self.scale.value / guess  # as a label's
        with self._own_randomness():
            self.executor.run(self.training_program, batches, conclude)
        for some in self._all_gradients():
            some.finish()
        loss, count = all_reduce(all_reduce(total, self.pp), self.replicas)
        if count == 0:
            raise ValueError("no label counts: the loss gave a count of 0 for the whole batch")
        if count != guess or self.scale.value != 1:
            for some in self._all_gradients():
                some.scale(guess / count.item() / self.scale.value)
        self._sum_partial()
        self._sum_tied()
        if self.dtype is torch.float16:
            self._check_overflow()
        if self.steps == 0 and loss.isnan() and len(self.owner) > 1 and isinstance(self.run, Stages):
            warnings.warn(
                "the first loss is NaN. Where one process has a number, a stage uses what lives on another: parameters "
                "go with the first block or the last one as they are registered before or behind the blocks",
                stacklevel=2,
            )
        self.steps, self.spans = self.steps + 1, self.executor.spans
        return (loss / count).to(next(iter(self.everything.values())).dtype)

    def _share_experts(self, plan: dict[str, str] | None) -> None:
        """Experts over ep; and over cp what a mixture of them needs to know of whole rows."""
        if self.ep.size > 1:
            experts = _layers_of_style(self.module, plan, "moe_tp_experts")
            if not experts:
                raise ValueError(
                    f"ep={self.ep.size} needs experts, and the plan has no layer with the style moe_tp_experts: "
                    "Config(experts=) makes some"
                )
            for layer in experts:
                cut_experts(layer, self.ep)
        if self.cp.size > 1:
            for mixture in self.mixtures:
                mixture.whole_row = partial(context.unzigzag, axis=self.cp, dim=1)
                mixture.own_tokens = partial(context.zigzag, axis=self.cp, dim=1)

    def _replicas(self, parameter: nn.Parameter) -> Axis:
        """The ranks that have the same parameter, or share of one, and other tokens."""
        return self.replicas_of_experts if cut.is_cut(parameter, self.ep) else self.replicas

    def _run_stage(self, stage: int, state: Any, inputs: Batch) -> Any:
        with self.attention, computing_in(self.dtype, self.device):
            return self.run(stage, state, inputs)

    def _wrap(self, wrap: Wrap) -> Wrapped:
        others = self.cp.size * self.ep.size > 1
        if self.zero or others or len(self.owner) > self.pp.size or self.region.deferral.holds:
            what = "zero=0, cp=1, ep=1 and a schedule with one stage a rank and whole backwards"
            raise ValueError(f"wrap needs {what}: the wrapper shares out parameters by itself")
        (stage,) = (s for s, index in self.owner.items() if index == self.pp.index)
        hide(self.module, [p for name, p in self.everything.items() if name not in self.here])
        module = Stage(self.module, self.stages.blocks[stage].values(), partial(self.stages, stage))
        wrapped = Wrapped(module, wrap, device_mesh(self.mesh), self.dp)
        self.run = lambda stage, state, inputs: wrapped(state, inputs)
        return wrapped

    def _check_overflow(self) -> None:
        """After a gradient that is not finite, on whatever rank, there are no gradients: optimizers skip those."""
        finite = [local(p.grad).isfinite().all() for p in self.owned.values() if p.grad is not None]
        worst = 1 - torch.stack([torch.ones((), device=self.device), *finite]).min()
        overflow = all_reduce(worst, everyone(), "max").item() > 0
        if overflow:
            for parameter in self.owned.values():
                parameter.grad = None
        self.scale.update(overflow)

    def _share(self, targets: Any) -> Any:
        """The targets of this rank's tokens: (rows, T, ...) -> (rows, T/cp, ...)"""
        if self.cp.size == 1:
            return targets
        if isinstance(targets, dict):
            return {name: context.zigzag(x, self.cp, 1) for name, x in targets.items()}
        return context.zigzag(targets, self.cp, 1)

    def _with_targets(self, inputs: Batch, targets: Any) -> tuple[Batch, Any]:
        if targets is None and isinstance(inputs, dict) and "labels" in inputs:
            targets = inputs["labels"]
            inputs = {name: x for name, x in inputs.items() if name != "labels"}
        if targets is None:
            raise ValueError('step needs targets, or inputs with "labels"')
        return inputs, targets

    def _microbatches(self, batch: Any, local: bool) -> list:
        """This data rank's rows, cut into microbatches."""
        size, parts = len(next(iter(_tensors(batch)))), self.microbatches * (1 if local else self.dp.size)
        if size < parts:
            what = f"{self.microbatches} microbatches"
            what = what if local else f"{self.dp.name}={self.dp.size} x {what}"
            raise ValueError(f"{size} rows are too few for {what}: give at least {parts} rows, or fewer microbatches")
        mine = batch if local else data.rows(batch, self.dp.size)[self.dp.index]
        return data.rows(mine, self.microbatches)

    def _check_layers(self) -> None:
        """Refuse what would be wrong without a word: statistics of a part of the batch, parameters frozen too late."""
        if not torch.is_grad_enabled():
            raise RuntimeError("step inside torch.no_grad() has no gradients: use forward there")
        for name, parameter in self.here.items():
            if parameter.requires_grad != (name in self.trained):
                now = "trained" if parameter.requires_grad else "frozen"
                raise ValueError(f"{name} is {now} since parallelize: set requires_grad before it, and call it again")
        for name, layer in self.batch_norms:
            if layer.training and self.dp.size * self.microbatches > 1:
                raise ValueError(
                    f"{name} ({type(layer).__name__}) takes its statistics from the whole batch, and each rank and "
                    "microbatch has only a part of it: use LayerNorm or GroupNorm, or put it into eval()"
                )

    def _refresh(self) -> None:
        """An optimizer may have changed what each rank owns."""
        for shares in self.shares.values():
            shares.refresh()

    def _all_gradients(self) -> Iterator[data.Gradients | Shares | Wrapped]:
        for some in self.gradients.values():
            yield from some

    def _own(self, stage: int) -> dict[str, nn.Parameter]:
        """The parameters of a stage by name; a parameter of two stages here is in the one that is through last."""
        through = {action.stage: i for i, action in enumerate(self.training_program) if action.op in (Op.B, Op.W)}
        home = {n: max((s for s in self.homes[n] if s in through), key=through.__getitem__) for n in self.here}
        return {name: p for name, p in self.here.items() if home[name] == stage}

    def _gradients(self, stage: int) -> list[data.Gradients]:
        """Flat buffers for a stage's parameters: one for each dtype, and for each set of ranks that sum it."""
        summed: dict[Axis, list[nn.Parameter]] = defaultdict(list)
        for name, p in self._own(stage).items():
            if name in self.trained:
                summed[self._replicas(p)].append(p)
        return [data.Gradients(some, axis) for axis, own in summed.items() for some in _by_dtype(own).values()]

    def _shares(self, stage: int) -> Shares:
        """A stage's parameters in units that travel together: blocks where those come and go, else buckets. What
        several stages have is a unit of its own, cut alike on each; its weights stay, as any of them may need it."""
        own, blocks = self._own(stage), self.stages.blocks[stage]
        names = defaultdict(list)  # a shared parameter has several
        for name, p in self.module.named_parameters(remove_duplicate=False):
            names[p].append(name)

        def block_of(parameter: nn.Parameter) -> str:
            """The block that has this parameter for itself, else ""."""
            return next((b for b in blocks if all(n.startswith(f"{b}.") for n in names[parameter])), "")

        groups: dict[tuple, dict[str, nn.Parameter]] = {}
        filled = 0
        for name, p in reversed(own.items()):
            several = name if len(self.homes[name]) > 1 else ""
            part = block_of(p) if self.zero == 3 else filled // data.BUCKET
            key = several, part, p.dtype, self._replicas(p)
            groups[key] = groups.pop(key, {}) | {name: p}  # in the order in which backward is through with them
            filled += p.nbytes
        units = {}
        for key, some in groups.items():
            # Sums over tensor ranks want the same places in each rank's share: those parameters come first.
            ordered = dict(sorted(some.items(), key=lambda item: not hasattr(item[1], "partial")))
            size, (several, *_, axis) = cut.widest(ordered.values(), self.tp), key
            units[key] = Unit(ordered, axis, size, self.zero < 3 or bool(several), self.whole_gradients)
        inside = [(block, [u for key, u in units.items() if key[1] == name]) for name, block in blocks.items()]
        return Shares(units.values(), inside if self.zero == 3 else [])

    def _reduce(self, stage: int, coming: set[Tensor] | None) -> None:
        if self.whole_gradients:  # else each microbatch's travel by themselves
            for some in self.gradients[stage]:
                some.arm(coming)

    def _prepare(self, action: Action) -> None:
        if action.op == Op.F:
            self._seed(action)
        for stage, shares in self.shares.items():
            if stage == action.stage:
                shares.prepare(action.op)
            elif action.op == Op.F:
                shares.blank()

    def _settle(self, action: Action) -> None:
        for stage, shares in self.shares.items():
            if stage == action.stage:
                shares.settle(action.op)
            elif action.op == Op.F:
                shares.free()

    def _sum_partial(self) -> None:
        """Whole parameters that saw only a part (of the sequence, of the heads): sum over the tensor ranks."""
        partial = [
            local(p.grad) for n, p in self.owned.items() if hasattr(self.here[n], "partial") and p.grad is not None
        ]
        for some in _by_dtype(partial).values():
            flat = all_reduce(torch.cat([g.flatten() for g in some]), self.tp)
            for gradient, total in zip(some, flat.split([g.numel() for g in some]), strict=True):
                gradient.copy_(total.view_as(gradient))

    def _sum_tied(self) -> None:
        """A parameter of several stages: each gets the sum, added in one order, so that all copies stay equal."""
        for name, parameter in self.owned.items():
            ranks = sorted({self.owner[s] for s in self.homes[name]})
            if len(ranks) > 1 and name in self.trained and parameter.grad is not None:
                mine = local(parameter.grad)
                sending = [isend(mine, self.pp, other) for other in ranks if other != self.pp.index]
                parts = [mine if r == self.pp.index else irecv(mine, self.pp, r).wait() for r in ranks]
                for pending in sending:
                    pending.wait()
                mine.copy_(torch.stack(parts).sum(0))

    # -- randomness -----------------------------------------------------------------------------------------------

    @contextmanager
    def _own_randomness(self) -> Iterator[None]:
        """Dropout draws from streams of its own; the caller's random numbers go on as if nothing had been drawn."""
        state = self.streams.generator.get_state()
        try:
            yield
        finally:
            self.streams.generator.set_state(state)

    def _first_row(self, size: int, local: bool) -> int:
        """Where this data rank's rows begin in the global batch."""
        if not local:
            return bounds(size, self.dp.size)[self.dp.index]
        sizes = all_gather(torch.tensor([size], device=self.device), self.dp)
        return int(sizes[: self.dp.index].sum())

    def _shared_dims(self, x: Tensor) -> list[Shared]:
        """Of activations (rows, sequence, width) or attention's (rows, heads, ...): what this rank has a part of."""
        by_sequence, by_width = x.dim() == 3, 2 if x.dim() == 3 else 1
        shares = [Shared(1, self.cp.size, lambda y, dim: context.zigzag(y, self.cp, dim))] if by_sequence else []
        if self.streams.inside:
            shares.append(Shared(by_width, self.tp.size, lambda y, dim: shard(y, self.tp, dim)))
        elif self.region.sequence and by_sequence:
            shares.append(Shared(1, self.tp.size, lambda y, dim: shard(y, self.tp, dim)))
        return shares

    def _remember(self) -> AbstractContextManager[None]:
        """What a block needs, beside its input, to compute again what it computes now."""
        bring_back = remember(self.streams, self.masks)

        @contextmanager
        def again() -> Iterator[None]:
            bring_back()
            with self.attention:
                yield

        return again()

    def _seed(self, action: Action) -> None:
        """Before a forward: random numbers that depend on what is computed, not on the order of the schedule."""
        self.masks.begin((self.seed, self.steps), self.rows[action.microbatch])
        place = (self.seed, self.steps, self.replicas.index, action.stage, action.microbatch)
        own = 1 + self.tp.index
        outside = self.tp.size + own if self.region.sequence else 0  # parts of a sequence differ, copies of it agree
        self.streams.begin(hash((*place, outside)) % 2**63, hash((*place, own)) % 2**63)

    # -- inference ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def forward(self, inputs: Batch) -> Any:
        """The model's output (its logits, where it has such), whole, on every rank. inputs: the same on every rank.

        Data ranks share the rows where there are enough of them.
        """
        self._refresh()
        return self._forward(inputs)

    __call__ = forward

    def _forward(self, inputs: Batch) -> Any:
        inputs = _to(inputs, self.device)
        size = len(next(iter(_tensors(inputs))))
        shared = size >= self.dp.size
        mine = data.rows(inputs, self.dp.size)[self.dp.index] if shared else inputs
        first = self._first_row(size, local=False) if shared else 0
        self.rows = [range(first, first + len(next(iter(_tensors(mine)))))]
        outputs = []
        self._gather_heads(True)
        with self._own_randomness():
            self.executor.run(self.inference_program, [mine], lambda output, _: outputs.append(output))
        last = self.owner[max(self.owner)]
        output = spread([getattr(y, "logits", y) for y in outputs], self.pp, last, self.device)[0]

        def whole(x: Tensor) -> Tensor:
            x = context.unzigzag(x, self.cp, 1) if self.cp.size > 1 else x
            return all_gather(x, self.dp, size=size) if shared else x

        return pytree.tree_map_only(Tensor, whole, output)

    @torch.no_grad()
    def generate(self, tokens: Tensor, new: int, *, temperature: float = 0.0, seed: int = 0) -> Tensor:
        """Go on writing: (rows, length) token ids -> (rows, length + new), the same on every rank.

        temperature 0 takes the likeliest token, above 0 draws. Each token costs a forward over the whole context.
        """
        if getattr(self.config, "is_encoder_decoder", False):
            raise ValueError("generate goes on from token ids alone: save_pretrained, and generate with transformers")
        if tokens.dim() != 2 or not tokens.numel():
            raise ValueError(f"generate needs token ids (rows, length) to begin with, not {tuple(tokens.shape)}")
        generator = torch.Generator().manual_seed(seed)
        training = {layer: layer.training for layer in self.module.modules()}
        config: Any = self.module.config
        limits = (getattr(config, name, None) for name in ("context", "max_position_embeddings"))
        tokens, longest = tokens.to(self.device), next(filter(None, limits), tokens.size(1) + new)  # ALiBi has no limit
        pieces = self.tp.size * (2 * self.cp.size if self.cp.size > 1 else 1)  # that the sequence is cut into
        longest -= longest % pieces
        self.eval()
        self._refresh()
        for _ in range(new):
            seen = tokens[:, -longest:]
            padded = nn.functional.pad(seen, (0, -seen.size(1) % pieces))  # behind: causal attention ignores it
            logits = self._forward(padded)[:, seen.size(1) - 1].float().cpu()
            if temperature > 0:
                drawn = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            else:
                drawn = logits.argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, drawn.to(tokens)], 1)
        for layer, mode in training.items():
            layer.training = mode
        return tokens

    def train(self, mode: bool = True) -> "Parallel":
        self.module.train(mode)
        return self

    def eval(self) -> "Parallel":
        return self.train(False)

    def _loss(self, given: Loss) -> Loss:
        """The default loss works on shares of the vocabulary where the model's head is cut."""
        self.given_loss = given
        if given is tensor.cross_entropy and self.region.heads:
            return partial(
                tensor.vocabulary_parallel_cross_entropy,
                axis=self.tp,
                vocabulary=self.region.heads[-1].vocabulary,
            )
        return given

    def _gather_heads(self, gathers: bool) -> None:
        for head in self.region.heads:
            head.gathers = gathers

    # -- parameters -----------------------------------------------------------------------------------------------

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What this rank updates (its stages, its shares) under the names of the unsharded model."""
        yield from self.owned.items()

    def parameters(self) -> Iterator[nn.Parameter]:
        yield from self.owned.values()

    def counts(self, name: str) -> bool:
        """Whether this rank's part of a parameter is the first of all its copies on the mesh."""
        whole = self.here[name]
        counted = self.owner[min(self.homes[name])] == self.pp.index
        counted &= cut.is_cut(whole, self.tp) or self.tp.index == 0
        return counted and (name in self.units or self._replicas(whole).index == 0)

    def clip_gradients(self, max_norm: float) -> Tensor:
        """Scale all gradients so that their norm over the whole mesh is at most max_norm. Returns the norm before.

        Replicated and tied parameters count once. The factor is torch's: max_norm / (norm + 1e-6), at most 1.
        """
        squares = torch.zeros((), dtype=torch.float64, device=self.device)
        for name, parameter in self.owned.items():
            if parameter.grad is None:
                continue
            square = together(parameter.grad.double().square().sum())
            if self.counts(name):
                squares += square
        norm = all_reduce(all_reduce(all_reduce(squares, self.tp), self.pp), self.replicas).sqrt()
        factor = max_norm / (norm.item() + 1e-6)
        for parameter in self.owned.values():
            if parameter.grad is not None and factor < 1:
                parameter.grad.mul_(factor)
        return norm

    def full_gradients(self) -> dict[str, Tensor]:
        """Every gradient, whole, on every rank, under the keys of the original `named_parameters()` (tied: once)."""
        return self._wholes([name for name in self.everything if name in self.trained], "grad")

    def full_state_dict(self) -> dict[str, Tensor]:
        """Every parameter and buffer, whole, on every rank, under the keys of the original `state_dict()`."""
        whole = self._wholes(list(self.everything), "data")
        whole |= {key: self._whole_buffer(key) for key in self.buffers}
        return {key: whole[name] for key, name in self.state_names.items()}

    def load_full_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take this rank's part of whole tensors, as `full_state_dict` gives them, from any layout."""
        if missing := self.state_names.keys() - state.keys():
            raise ValueError(f"the state has no {sorted(missing)[0]!r} ({len(missing)} keys are missing)")
        if strange := state.keys() - self.state_names.keys():
            raise ValueError(f"the model has no {sorted(strange)[0]!r} ({len(strange)} keys are not its own)")
        for key, needed in (self.shapes | {key: x.shape for key, x in self.buffers.items()}).items():
            if state[key].shape != needed:
                have, need = tuple(state[key].shape), tuple(needed)
                raise ValueError(f"{key!r} has shape {have} in the state, and {need} in this model")
        for name, parameter in self.here.items():
            whole = state[name].to(self.device)
            share = cut.take(parameter, whole)
            if name in self.units:
                self.units[name].load(name, share)
            else:
                copy_part(share, self.owned[name])
        for key, buffer in self.buffers_here().items():
            buffer.copy_(state[key])

    def buffers_here(self) -> dict[str, Tensor]:
        """The buffers that this rank's forward may use: its stages', and all that are outside of blocks."""
        return {key: x for key, x in self.module.named_buffers() if key in self.buffers}

    def _wholes(self, names: list[str], what: str) -> dict[str, Tensor]:
        """Whole parameters or gradients ("data", "grad"), from the first of their stages to all. A collective."""
        shared, found = self._shared(what), dict[str, Tensor]()
        by_root: dict[tuple, list[str]] = defaultdict(list)
        for name in names:
            by_root[self.owner[min(self.homes[name])], self.everything[name].dtype].append(name)
        for (root, dtype), some in by_root.items():
            sizes = [self.shapes[name].numel() for name in some]
            if root == self.pp.index:
                values = []
                for name in some:
                    value = shared.get(name, getattr(self.owned.get(name, self.everything[name]), what))
                    values.append(torch.zeros_like(self.everything[name]) if value is None else value.detach())
                wholes = cut.put_together([self.everything[name] for name in some], values)
                flat = torch.cat([x.flatten() for x in wholes])
            else:
                flat = torch.empty(sum(sizes), dtype=dtype, device=self.device)
            parts = broadcast(flat, self.pp, root).split(sizes)
            found |= {name: x.view(self.shapes[name]).clone() for name, x in zip(some, parts, strict=True)}
        return {name: found[name] for name in names}

    def _shared(self, what: str) -> dict[str, Tensor]:
        """What the data ranks share out, whole again, by name. A collective."""
        found: dict[str, Tensor] = {}
        for some in self.shares.values():
            for unit in some.units:
                found |= unit.put_together(what)
        for name, parameter in self.owned.items():
            if isinstance(value := getattr(parameter, what), DTensor):
                found[name] = value.full_tensor()
        return found

    def _whole_buffer(self, key: str) -> Tensor:
        root = self.buffer_owner(key)
        value = self.module.get_buffer(key) if root == self.pp.index else torch.empty_like(self.buffers[key])
        return broadcast(value, self.pp, root)

    def buffer_owner(self, key: str) -> int:
        return self.owner[self.stages.home[key]]

    # -- what happened --------------------------------------------------------------------------------------------

    def timeline(self) -> Timeline:
        """The last step's spans of every rank, on one clock, from its first start. A collective."""
        if not self.spans:
            raise ValueError("there is no timeline before the first step")
        return collect([Span(here().rank, *span) for span in self.spans])

    if not TYPE_CHECKING:  # who knows the types knows the names

        def __getattr__(self, name: str) -> Any:
            way_out = f": {INSTEAD[name]}" if name in INSTEAD else ""
            raise AttributeError(f"a model on a mesh has no {name}{way_out}", name=name, obj=self)


_DEVICE = "ranks are on a device from the start, see World(n, device=...)"
_TYPE = "give the model its type before parallelize, or compute in 16 bits with parallelize(..., dtype=...)"
INSTEAD = {  # what modules of torch and models of transformers have, and what to do here
    "state_dict": "full_state_dict() has all of it on every rank, minipar.save writes each rank's part",
    "load_state_dict": "load_full_state_dict(state) takes a whole one, minipar.load what minipar.save wrote",
    "zero_grad": "step sets gradients and adds to none, so nothing has to zero them",
    "backward": "step(inputs, targets) runs forward and backward",
    "save_pretrained": "minipar.save_pretrained(folder, parallel)",
    "from_pretrained": "load the model first, then parallelize it",
    "modules": "this rank's part is parallel.module",
    "buffers": "this rank's are buffers_here()",
    **dict.fromkeys(["to", "cuda", "cpu"], _DEVICE),
    **dict.fromkeys(["half", "float", "double", "bfloat16"], _TYPE),
}


# -- helpers -------------------------------------------------------------------------------------------------


def _pair(answer: Any) -> tuple[Tensor, Tensor | int]:
    if not isinstance(answer, tuple) or len(answer) != 2:
        raise TypeError(f"loss gave a {type(answer).__name__}: it must give (sum, count), as cross_entropy does")
    if not isinstance(answer[0], Tensor) or answer[0].numel() != 1:
        what = tuple(answer[0].shape) if isinstance(answer[0], Tensor) else answer[0]
        raise TypeError(f"loss gave {what} for the sum: it must be a tensor with one number, as reduction='sum' gives")
    return answer


def _twin(model: nn.Module) -> nn.Module:
    """A copy that shares the parameters' memory, so that cutting it leaves the original alone at no cost."""
    shared = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, shared)


def _own_memory(parameters: Iterable[nn.Parameter], model: nn.Module) -> None:
    """Copy what still shares the original's memory, so that an update does not reach it."""
    theirs = {p.data_ptr() for p in model.parameters()}
    for parameter in parameters:
        if parameter.data_ptr() in theirs:
            parameter.data = parameter.data.clone()


def _check_replicas(model: nn.Module, device: torch.device) -> None:
    """ValueError if the ranks were given different weights. The sum of all of them says so."""
    total = sum((p.detach().double().sum().to(device) for p in model.parameters()), torch.zeros((), device=device))
    if _differs(total):
        raise ValueError(
            "the ranks have different initial weights: seed every rank alike before the model is built, or load the "
            "same weights on all"
        )


def _check_rows(tensors: Iterable[Tensor], device: torch.device) -> None:
    """ValueError if the ranks were given different rows, or the same in another order. A sum with weights that no two
    places share says so. It is made once, and is no part of what a step sends."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for x in tensors:
        places = torch.arange(x.numel(), dtype=torch.float64, device=device)
        total += (1 + x.detach().flatten().double()) @ (1.5 + places.sin())
    with unbooked():
        if _differs(total):
            raise ValueError(
                "the ranks were given different batches: step takes the global batch, the same rows in the same order "
                "on every rank (draw them with one seed), and shares it out. Or give each data rank its own, local=True"
            )


def _differs(number: Tensor) -> bool:
    """Whether the ranks have different ones."""
    most, least = all_reduce(torch.stack([number, -number]).double(), everyone(), "max").tolist()
    return most + least > 1e-9 * (1 + abs(most))


def _first_names(model: nn.Module) -> dict[str, str]:
    """Key of the state -> its name. A tied parameter has several keys, and one name among the parameters: the first."""
    everywhere, first = dict(model.named_parameters(remove_duplicate=False)), dict[nn.Parameter, str]()
    for name, parameter in everywhere.items():
        first.setdefault(parameter, name)
    return {key: first[everywhere[key]] if key in everywhere else key for key in model.state_dict()}


def _plan(model: nn.Module, given: dict[str, str] | None, tp: Axis) -> dict[str, str]:
    if given is None and tp.size == 1:
        return {}  # one rank cuts nothing: the model's layers are as fast as they were
    plan = interop.plan_of(model) if given is None else given
    if not plan and tp.size > 1:
        draft = "".join(f"\n    {layer!r}: {style!r}," for layer, style in interop.draft(model).items())
        draft = draft and f". By the shapes of its layers it may be{draft}\nCompare gradients before you trust it"
        raise ValueError(
            f"tp={tp.size} needs a plan: {type(model).__name__} has no tp_plan; give plan={{layer: style}}{draft}"
        )
    return plan


def _place_of_the_cut(model: nn.Module, given: dict[str, str] | None) -> nn.Module:
    found = _layers_of_style(model, given, "sequence_split")
    if not found:
        raise ValueError("cp needs a plan that says where the sequence is cut: a layer with the style sequence_split")
    return found[0]


def _layers_of_style(model: nn.Module, given: dict[str, str] | None, style: str) -> list[nn.Module]:
    plan = interop.plan_of(model) if given is None else given
    return list(tensor.layers_of_style(model, plan, style))


def _tensors(batch: Any) -> Iterable[Tensor]:
    tensors = list(batch.values()) if isinstance(batch, dict) else [batch]
    for x in tensors:
        if not isinstance(x, Tensor):
            raise TypeError(f"a batch is a tensor or a dict of tensors, and {type(x).__name__} is neither")
    return tensors


def _to(batch: Any, device: torch.device) -> Any:
    return {k: x.to(device) for k, x in batch.items()} if isinstance(batch, dict) else batch.to(device)


def _by_dtype(tensors: Iterable[Some]) -> dict[torch.dtype, list[Some]]:
    kinds: dict[torch.dtype, list[Some]] = defaultdict(list)
    for x in tensors:
        kinds[x.dtype].append(x)
    return kinds
