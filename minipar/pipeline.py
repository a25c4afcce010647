"""Pipeline parallelism: a stage is a slice of a model's blocks, an executor runs its rank's list of actions.

The model keeps its own forward, and every stage is given the batch, so that masks and positions come out right on
each. Blocks of other stages are skipped; the one in front of the first local block gives what was received; the forward
is left behind the last one.
"""

import json
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .collectives import Axis, Pending, bounds, broadcast, irecv, isend
from .deferral import Deferral, WeightGradients
from .schedule import Action, Op, Program

Batch = Tensor | dict[str, Tensor]

# -- cutting a model -----------------------------------------------------------------------------------------


class Leave(Exception):
    """Carries the state behind the last block of a stage."""


@dataclass
class Blocks:
    """What a pipeline cuts: lists of blocks by their names, in the order in which they run.

    beside: modules that are not used where they are registered, before or behind the blocks, and the place of a block
        of the stage that they belong to.
    everywhere: modules that run on each stage: what they give goes to all blocks, and does not travel.
    encoder: the module that has the first list, where what it gives is read by all blocks of the second.
    crossed: what goes from block to block past any cut, in words; "" if nothing does.
    """

    lists: dict[str, nn.ModuleList]
    beside: dict[str, int] = field(default_factory=dict)
    everywhere: tuple[str, ...] = ()
    encoder: nn.Module | None = None
    crossed: str = ""


@dataclass
class Window:
    """Which blocks run now: those at [first, end). `state`, where there is one, came from the block before them.

    next: the place whose turn it is, None while no stage runs. given: what the last block that ran gave.
    memory: what an encoder gave, whose last block is in front of `turn`. It travels with the state from there on.
    """

    first: int = 0
    end: int = 0
    state: Any = None
    next: int | None = None
    given: Any = None
    turn: int | None = None
    memory: Any = None

    def open(self, first: int, end: int, state: Any) -> None:
        self.first, self.end, self.state, self.next = first, end, state, 0
        if self.turn is not None and first >= self.turn:  # the encoder has run elsewhere
            self.next = self.turn
            self.state, self.memory = state if first > self.turn else (None, state)

    def leave(self) -> Leave:
        if self.turn is None or self.end < self.turn:
            return Leave(self.given)
        return Leave(self.memory if self.end == self.turn else (self.given, self.memory))

    def close(self) -> None:
        self.state = self.given = self.memory = self.next = None


class Stages:
    """The stages of a model cut into `count` that this rank holds.

    The blocks are cut evenly; what is registered before them goes with the first, what comes behind with the last.
    The module that is given is changed: what lives on other ranks gives up its memory.

    given: the blocks, where they are known; else they are looked for.
    blocks: stage -> its blocks by name; none where there is one stage only and nobody needs them.
    home: name of a parameter or buffer -> its stage.
    homes: parameter -> the stages that use it: two if it is tied and its names lie apart, all if each stage runs it.
    """

    def __init__(
        self, model: nn.Module, count: int, mine: set[int], needs_blocks: bool = False, given: Blocks | None = None
    ):
        found = Blocks({})  # one stage needs no cut, so any model will do
        if count > 1 or needs_blocks:
            found = given or find_blocks(model)
            _check_blocks(found, count)
        self.model, self.lists = model, found.lists
        blocks = {f"{name}.{i}": block for name, some in self.lists.items() for i, block in enumerate(some)}
        self.window, self.cuts = Window(), bounds(len(blocks), count)
        self.home = home = self._home_of_names(found.beside)
        self.homes: dict[nn.Parameter, set[int]] = defaultdict(set)
        for parameter_name, parameter in model.named_parameters(remove_duplicate=False):
            self.homes[parameter].add(home[parameter_name])
        shared = {layer for name in found.everywhere for layer in model.get_submodule(name).modules()}
        for parameter in chain(*(layer.parameters(recurse=False) for layer in shared)):
            self.homes[parameter] = set(range(count))
        for layer_name, layer in model.named_modules():
            plain = type(layer).forward is nn.Embedding.forward or hasattr(layer, "embed_scale")
            own = isinstance(layer, nn.Embedding) and plain and layer not in shared
            if own and home[f"{layer_name}.weight"] not in mine:
                _look_up_nothing(layer)
        for parameter, stages in self.homes.items():
            if not stages & mine:
                _give_up(parameter)
        self.blocks: dict[int, dict[str, nn.Module]] = defaultdict(dict)  # stage -> name -> block
        for place, (name, block) in enumerate(blocks.items()):
            self.blocks[self._stage_of_block(place)][name] = block
            if self._stage_of_block(place) not in mine:  # it stays, as the model may ask it things, but never runs
                for layer in block.modules():
                    layer._buffers.clear()
        if found.encoder:
            self.window.turn = len(next(iter(self.lists.values())))
            _run_once(found.encoder, self.window)

    def open_window(self) -> None:
        """From now on a forward runs one stage."""
        for place, block in enumerate(chain(*self.lists.values())):
            if len(self.cuts) > 2:
                _check_once(block, place, self.window)
            _ask_window(block, place, self.window)

    def __call__(self, stage: int, state: Any, inputs: Batch) -> Any:
        """Run one stage: the state that leaves it, or, from the last one, what the model returns."""
        self.window.open(self.cuts[stage], self.cuts[stage + 1], state)
        try:
            return self.model(**inputs) if isinstance(inputs, dict) else self.model(inputs)
        except Leave as way_out:
            return way_out.args[0]
        finally:
            self.window.close()

    def _stage_of_block(self, place: int) -> int:
        return next(stage for stage, end in enumerate(self.cuts[1:]) if place < end)

    def _home_of_names(self, beside: dict[str, int]) -> dict[str, int]:
        """Name of a parameter or buffer -> stage, in the order of registration."""
        home, stage = {}, 0
        starts = dict(zip(self.lists, accumulate(map(len, self.lists.values()), initial=0), strict=False))
        begins = {name.rpartition(".")[0]: start for name, start in starts.items()}  # the module that has the list
        for prefix, module in self.model.named_modules(remove_duplicate=False):
            parent, _, own_name = prefix.rpartition(".")
            if prefix in begins:
                stage = self._stage_of_block(begins[prefix])
            elif parent in starts:
                stage = self._stage_of_block(starts[parent] + int(own_name))
            for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                home[f"{prefix}.{name}" if prefix else name] = stage  # what comes behind the last block stays with it
        for prefix, place in beside.items():
            home |= {name: self._stage_of_block(place) for name in home if name.startswith(f"{prefix}.")}
        return home


def outermost_lists(model: nn.Module, kind: type[nn.Module] = nn.Module) -> dict[str, nn.ModuleList]:
    """The ModuleLists of this kind of modules that are not inside of another, by name."""
    found: dict[str, nn.ModuleList] = {}
    for name, some in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(some, nn.ModuleList) and len(some) and not inside and all(isinstance(x, kind) for x in some):
            found[name] = some
    return found


def find_blocks(model: nn.Module) -> Blocks:
    """The model's list of blocks: the one ModuleList that is not inside of another. ValueError where that leaves a
    doubt."""
    found = outermost_lists(model)
    if len(found) != 1:
        what = f"{len(found)}: {', '.join(found)}" if found else "none"
        raise ValueError(
            "a pipeline, zero=3, recompute and wrap need a model with one list of blocks (nn.ModuleList); "
            f"{type(model).__name__} has {what}"
        )
    return Blocks(found)


def _check_blocks(blocks: Blocks, stages: int) -> None:
    every, names = list(chain(*blocks.lists.values())), " and ".join(blocks.lists)
    if blocks.crossed and stages > 1:
        raise ValueError(f"pp={stages} stages take each block once, in order, but {blocks.crossed}")
    if len(every) < stages:
        raise ValueError(
            f"pp={stages} stages need {stages} blocks or more, but {names} has {len(every)}: use pp <= {len(every)}"
        )
    if len(set(every)) < len(every):
        raise ValueError(f"{names} has one block several times: a pipeline needs {len(every)} blocks of their own")


def _run_once(encoder: nn.Module, window: Window) -> None:
    """Let an encoder remember what it gives, and give it on stages where it does not run."""
    inner = encoder.forward

    def forward(*arguments: Any, **more: Any) -> Any:
        if window.memory is None:
            window.memory = inner(*arguments, **more)
        return window.memory

    encoder.forward = forward


def _ask_window(block: nn.Module, place: int, window: Window) -> None:
    """Let a block's forward ask whether it is its turn."""
    inner = block.forward

    def forward(*arguments: Any, **more: Any) -> Any:
        if window.next is None:
            raise RuntimeError(
                f"block {place} runs outside of its stage's forward: put a checkpoint inside of the block"
            )
        if place != window.next:
            raise ValueError(
                f"block {place} runs where block {window.next} should: a pipeline takes each once, in order"
            )
        window.next += 1
        if place == window.end:
            raise window.leave()
        if place == window.first - 1:
            return window.state
        if place < window.first:  # what uses it here by mistake shows at once, as NaN
            return pytree.tree_map_only(Tensor, _nothing, window.state)
        window.given = inner(*arguments, **more)
        return window.given

    block.forward = forward


def _check_once(block: nn.Module, place: int, window: Window) -> None:
    """Let a block refuse, where it runs first, what another stage has: it is given NaN, though what arrived and the
    state, which is given first, have numbers."""
    inner, checked = block.forward, False

    def forward(*arguments: Any, **more: Any) -> Any:
        nonlocal checked
        if checked:
            return inner(*arguments, **more)
        given, arrived = _floats((arguments, more)), _floats((window.state, window.memory))
        before = any(x.isnan().any() for x in (*given[:1], *arrived))
        if not before and any(x.isnan().any() for x in given[1:]):
            raise ValueError(
                f"block {place} is given NaN beside the state: what all blocks read comes from a module that lives on "
                "another stage. Use pp=1; for a model of transformers, interop.EVERYWHERE can name that module"
            )
        checked = True
        return inner(*arguments, **more)

    block.forward = forward


def _give_up(parameter: nn.Parameter) -> None:
    """Free a parameter that lives elsewhere. Its shape stays; a use by mistake shows at once, as NaN."""
    parameter.requires_grad_(False)
    parameter.data = _nothing(parameter.data)


def _look_up_nothing(embedding: nn.Embedding) -> None:
    """In front of a later stage's blocks, the embedding's result is never used: do not compute it."""
    width, like = embedding.embedding_dim, embedding.weight.new_empty(())
    embedding.forward = lambda ids: like.new_full((*ids.shape, width), float("nan"))


def _nothing(like: Tensor) -> Tensor:
    """The shape of a tensor of floats without its numbers, NaN throughout. Others stay as they are."""
    return like.new_full((), float("nan")).expand_as(like) if like.is_floating_point() else like


# -- running a program ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """Shapes and structure of what crosses a boundary: a tensor or None, or tuples, lists and dicts of them."""

    structure: pytree.TreeSpec
    leaves: tuple[tuple[tuple[int, ...], torch.dtype] | None, ...]

    @staticmethod
    def of(state: Any) -> "Spec":
        leaves, structure = pytree.tree_flatten(state)
        if strange := [leaf for leaf in leaves if not isinstance(leaf, Tensor | None)]:
            raise TypeError(f"a boundary between stages is crossed by tensors only, not by {strange[0]!r}")
        return Spec(structure, tuple(None if x is None else (tuple(x.shape), x.dtype) for x in leaves))

    def to_bytes(self) -> bytes:
        leaves = [leaf and [leaf[0], str(leaf[1]).removeprefix("torch.")] for leaf in self.leaves]
        return json.dumps([pytree.treespec_dumps(self.structure), leaves]).encode()

    @staticmethod
    def from_bytes(data: bytes) -> "Spec":
        structure, leaves = json.loads(data)
        leaves = tuple(leaf and (tuple(leaf[0]), getattr(torch, leaf[1])) for leaf in leaves)
        return Spec(pytree.treespec_loads(structure), leaves)

    def empty(self, device: torch.device) -> list[Tensor]:
        return [torch.empty(leaf[0], dtype=leaf[1], device=device) for leaf in self.leaves if leaf]

    def put_together(self, tensors: Iterable[Tensor]) -> Any:
        rest = iter(tensors)
        return pytree.tree_unflatten([next(rest) if leaf else None for leaf in self.leaves], self.structure)


class Idle:
    """Stages that compute nothing. They give what `stages` gave for inputs of that shape, with NaN for numbers."""

    def __init__(self, stages: Callable[[int, Any, Batch], Any]):
        self.stages = stages
        self.given: dict[tuple[int, Any], Any] = {}  # (stage, shapes of its inputs) -> what it gives

    def __call__(self, stage: int, state: Any, inputs: Batch) -> Any:
        key = stage, _shapes(inputs)
        if key not in self.given:
            with torch.no_grad():
                given = self.stages(stage, state, inputs)
            self.given[key] = pytree.tree_map_only(Tensor, lambda x: _nothing(x).contiguous(), given)
        return self.given[key]


Place = tuple[int, int]  # (stage, microbatch)


class Executor:
    """Carries out one rank's program. It has no opinion on the order.

    Sends never block. Receives are posted where the program says, and waited for where their data is needed. The
    first time that a stage sees inputs of some shape, the shape of what it sends travels ahead.

    owner: stage -> index on the axis. prepare(action) and settle(action) are called around each computation;
    reduce(stage, coming) at REDUCE, with the parameters whose gradient is still to come, or None for all.
    pace(action): seconds that a computation takes at least.
    """

    def __init__(
        self,
        stages: Callable[[int, Any, Batch], Any],
        axis: Axis,
        owner: dict[int, int],
        deferral: Deferral,
        device: torch.device,
        prepare: Callable[[Action], None],
        settle: Callable[[Action], None],
        reduce: Callable[[int, set[Tensor] | None], None],
        pace: Callable[[Action], float] = lambda action: 0.0,
    ):
        self.stages, self.axis, self.owner, self.deferral, self.device = stages, axis, owner, deferral, device
        self.prepare, self.settle, self.reduce_stage, self.pace = prepare, settle, reduce, pace
        self.specs: dict[tuple[int, Any], Spec] = {}  # (stage, shapes of its inputs) -> what it gives
        self.spans: list[tuple[Action, float, float]] = []

    def run(self, program: Program, inputs: list[Batch], conclude: Callable[[Any, int], Tensor | None]) -> None:
        """Run a whole step. inputs: one batch a microbatch, on every rank. conclude(output, microbatch) of the last
        stage gives the scalar that backward starts from."""
        self.inputs, self.conclude = inputs, conclude
        self.shapes = [_shapes(batch) for batch in inputs]
        self.states: dict[Place, Any] = {}  # what went into a stage
        self.outputs: dict[Place, list[Tensor]] = {}  # what came out of it
        self.gradients: dict[Place, list[Tensor]] = {}  # of what came out
        self.weights: dict[Place, WeightGradients] = {}  # that its backward puts off
        self.wanted: dict[tuple[Op, int], deque[Action]] = defaultdict(deque)  # receives whose shape is not known
        self.posted: dict[Action, list[Pending]] = {}
        self.sent: list[Pending] = []
        self.spans = []
        for action in program:
            self.DO[action.op](self, action)
        for pending in self.sent:
            pending.wait()

    # What the first and the last stage do in place of receiving.

    def load(self, action: Action) -> None:
        self.states[action.stage, action.microbatch] = None

    def loss(self, action: Action) -> None:
        place = (action.stage, action.microbatch)
        root = self.conclude(self.outputs.pop(place), action.microbatch)
        if root is not None:
            self.outputs[place], self.gradients[place] = [root], [torch.ones_like(root)]

    # Computation. The time of a span begins when everything that the action needs is there.

    def forward(self, action: Action) -> None:
        place = (action.stage, action.microbatch)
        if place not in self.states:
            self.states[place] = self._arrived_state(action)
        with self._computing(action):
            self.weights[place] = self.deferral.begin()
            with self.deferral:
                self.outputs[place] = self.stages(action.stage, self.states[place], self.inputs[action.microbatch])

    def backward(self, action: Action) -> None:
        self._backward(action, whole=True)

    def input_backward(self, action: Action) -> None:
        self._backward(action, whole=False)

    def _backward(self, action: Action, whole: bool) -> None:
        place = (action.stage, action.microbatch)
        if place not in self.gradients:
            self.gradients[place] = self._arrived(action._replace(op=Op.RECV_GRADIENT))
        outputs, gradients = self.outputs.pop(place), self.gradients.pop(place)
        pairs = [(y, g) for y, g in zip(outputs, gradients, strict=True) if y.requires_grad]
        with self._computing(action):
            self.deferral.backward([y for y, _ in pairs], [g for _, g in pairs])
            if whole:
                self.weights.pop(place).finish()

    def weight_backward(self, action: Action) -> None:
        with self._computing(action):
            self.weights.pop((action.stage, action.microbatch)).finish()

    @contextmanager
    def _computing(self, action: Action) -> Iterator[None]:
        start = time.perf_counter()
        self.prepare(action)
        yield
        self.settle(action)
        if (left := start + self.pace(action) - time.perf_counter()) > 0:
            time.sleep(left)
        self.spans.append((action, start, time.perf_counter()))

    def reduce(self, action: Action) -> None:
        weights = self.weights[action.stage, action.microbatch]
        self.reduce_stage(action.stage, weights.coming if self.deferral.holds else None)

    # Communication. Activations go down from stage to stage + 1, gradients of their floats come back up.

    def send_activation(self, action: Action) -> None:
        place, peer = (action.stage, action.microbatch), self.owner[action.stage + 1]
        spec, key = Spec.of(self.outputs[place]), (action.stage, self.shapes[action.microbatch])
        leaves = _tensors(self.outputs[place])
        if self.specs.setdefault(key, spec) is spec:
            note = torch.frombuffer(bytearray(spec.to_bytes()), dtype=torch.uint8).to(self.device)
            leaves = [torch.tensor([note.numel()], device=self.device), note, *leaves]
        self.sent += [isend(x, self.axis, peer, self._tag(action)) for x in leaves]
        self.outputs[place] = _floats(self.outputs[place])

    def receive(self, action: Action) -> None:
        """Post the receive as soon as its shape is known, in order: messages of a boundary arrive one by one."""
        self.wanted[action.op, action.stage].append(action)
        self._post(action)

    def _post(self, action: Action) -> None:
        queue = self.wanted[action.op, action.stage]
        while queue and (like := self._expected(queue[0])) is not None:
            peer, first = self._sender(action), queue.popleft()
            self.posted[first] = [irecv(x, self.axis, peer, self._tag(first)) for x in like]

    def _expected(self, action: Action) -> list[Tensor] | None:
        """Tensors as this receive will get them; None while their shape is not known."""
        if action.op == Op.RECV_GRADIENT:
            return self.outputs.get((action.stage, action.microbatch))
        spec = self.specs.get((action.stage - 1, self.shapes[action.microbatch]))
        return spec.empty(self.device) if spec else None

    def _arrived(self, action: Action) -> list[Tensor]:
        if action not in self.posted:
            if action.op == Op.RECV_ACTIVATION:
                self._read_note(action)
            self._post(action)
        return [pending.wait() for pending in self.posted.pop(action)]

    def _read_note(self, action: Action) -> None:
        """The first of its shape: its spec comes ahead."""
        peer, tag = self._sender(action), self._tag(action)
        length = irecv(torch.empty(1, dtype=torch.long, device=self.device), self.axis, peer, tag).wait()
        note = irecv(torch.empty(int(length), dtype=torch.uint8, device=self.device), self.axis, peer, tag).wait()
        self.specs[action.stage - 1, self.shapes[action.microbatch]] = Spec.from_bytes(bytes(note.tolist()))

    def _arrived_state(self, action: Action) -> Any:
        tensors = _ask_gradients(self._arrived(action._replace(op=Op.RECV_ACTIVATION)))
        return self.specs[action.stage - 1, self.shapes[action.microbatch]].put_together(tensors)

    def send_gradient(self, action: Action) -> None:
        peer = self.owner[action.stage - 1]
        self.sent += [isend(g, self.axis, peer, self._tag(action)) for g in self._gradient_of_state(action)]

    def _gradient_of_state(self, action: Action) -> list[Tensor]:
        state = self.states.pop((action.stage, action.microbatch))
        return [torch.zeros_like(x) if x.grad is None else x.grad for x in _floats(state)]

    # Between two stages on one rank nothing travels, and their graphs stay apart.

    def pass_activation(self, action: Action) -> None:
        place = (action.stage, action.microbatch)
        state = pytree.tree_map_only(Tensor, Tensor.detach, self.outputs[place])
        self.states[action.stage + 1, action.microbatch] = _ask_gradients(state)
        self.outputs[place] = _floats(self.outputs[place])

    def pass_gradient(self, action: Action) -> None:
        self.gradients[action.stage - 1, action.microbatch] = self._gradient_of_state(action)

    def _sender(self, action: Action) -> int:
        return self.owner[action.stage + (1 if action.op == Op.RECV_GRADIENT else -1)]

    def _tag(self, action: Action) -> int:
        """One for each boundary and direction. Along each, microbatches go in the order of the schedule."""
        down = action.op in (Op.SEND_ACTIVATION, Op.RECV_ACTIVATION)
        boundary = action.stage + (action.op in (Op.SEND_ACTIVATION, Op.RECV_GRADIENT))
        return 2 * boundary + down

    DO: dict[Op, Callable[["Executor", Action], None]] = {
        Op.LOAD: load,
        Op.LOSS: loss,
        Op.F: forward,
        Op.B: backward,
        Op.I: input_backward,
        Op.W: weight_backward,
        Op.REDUCE: reduce,
        Op.PASS_ACTIVATION: pass_activation,
        Op.PASS_GRADIENT: pass_gradient,
        Op.SEND_ACTIVATION: send_activation,
        Op.RECV_ACTIVATION: receive,
        Op.SEND_GRADIENT: send_gradient,
        Op.RECV_GRADIENT: receive,
    }


def _ask_gradients(state: Any) -> Any:
    for x in _floats(state):
        x.requires_grad_(torch.is_grad_enabled())
    return state


def _tensors(state: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(state) if isinstance(x, Tensor)]


def _floats(state: Any) -> list[Tensor]:
    return [x for x in _tensors(state) if x.is_floating_point()]


def _shapes(batch: Batch) -> Any:
    return tuple((name, tuple(x.shape)) for name, x in batch.items()) if isinstance(batch, dict) else tuple(batch.shape)


def spread(outputs: list[Any], axis: Axis, root: int, device: torch.device) -> list[Any]:
    """What index `root` has (tensors, or tuples, lists and dicts of them), on every rank of the axis."""
    note = torch.frombuffer(bytearray(Spec.of(outputs).to_bytes()), dtype=torch.uint8).to(device)
    length = broadcast(torch.tensor([note.numel()], device=device), axis, root)
    note = broadcast(note if axis.index == root else note.new_empty(int(length)), axis, root)
    spec = Spec.from_bytes(bytes(note.tolist()))
    tensors = _tensors(outputs) if axis.index == root else spec.empty(device)
    return spec.put_together([broadcast(x, axis, root) for x in tensors])
