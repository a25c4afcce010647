"""Pipeline schedules as plain data: for each rank the list of actions it takes, in order. No tensors, no processes.

    order = one_f_one_b(stages=4, microbatches=8)   # what to compute, in what order
    program = communicate(order)                    # ... with the sends and receives that it implies

A schedule has three readers: `simulate` predicts it, the executor runs it, `viz.draw` shows it.
"""

from collections import Counter, defaultdict
from collections.abc import Callable
from enum import StrEnum
from itertools import chain
from typing import NamedTuple


class Op(StrEnum):
    """What a rank does. The first four compute; the others stand around them in a program."""

    F = "F"  # forward
    B = "B"  # whole backward: I and W in one
    I = "I"  # backward, gradient of the input only
    W = "W"  # backward, gradient of the weights only
    LOAD = "load"  # the first stage's input ...
    RECV_ACTIVATION = "recv x"  # ... stands where the others receive
    SEND_ACTIVATION = "send x"
    LOSS = "loss"  # the last stage's loss gives the gradient ...
    RECV_GRADIENT = "recv g"  # ... that the others receive
    SEND_GRADIENT = "send g"
    REDUCE = "reduce"  # from here on, gradients of this stage are final: sum them over the data axis


COMPUTE = {Op.F, Op.B, Op.I, Op.W}


class Action(NamedTuple):
    """One thing that a rank does, for one (virtual) stage and one microbatch."""

    op: Op
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.op}{self.microbatch}"


Program = list[Action]  # what one rank does, in order
Schedule = list[Program]  # one program a rank
Scheduler = Callable[[int, int], Schedule]  # (stages, microbatches) -> Schedule


def gpipe(stages: int, microbatches: int) -> Schedule:
    """All forwards, then all backwards. Every stage holds every microbatch."""
    return [_row(Op.F, s, microbatches) + _row(Op.B, s, microbatches) for s in range(stages)]


def one_f_one_b(stages: int, microbatches: int) -> Schedule:
    """Fill the pipe, then one forward for each backward, then drain. Stage r holds min(m, p - r) microbatches."""

    def program(stage: int) -> Program:
        forwards, backwards = _row(Op.F, stage, microbatches), _row(Op.B, stage, microbatches)
        warmup = min(stages - 1 - stage, microbatches)
        steady = microbatches - warmup
        pairs = zip(forwards[warmup:], backwards[:steady], strict=True)
        return forwards[:warmup] + list(chain(*pairs)) + backwards[steady:]

    return [program(stage) for stage in range(stages)]


def forward_only(stages: int, microbatches: int) -> Schedule:
    """Inference: no backward."""
    return [_row(Op.F, stage, microbatches) for stage in range(stages)]


def _row(op: Op, stage: int, microbatches: int) -> Program:
    return [Action(op, stage, m) for m in range(microbatches)]


def owners(schedule: Schedule) -> dict[int, int]:
    """Stage -> the rank (index on the pipeline axis) that computes it. ValueError if two ranks do, or none has any."""
    owner: dict[int, int] = {}
    for rank, program in enumerate(schedule):
        for action in program:
            if owner.setdefault(action.stage, rank) != rank:
                raise ValueError(f"stage {action.stage} is on rank {owner[action.stage]} and on rank {rank}")
    if not owner:
        raise ValueError("the schedule is empty: it needs at least one stage and one microbatch")
    return dict(sorted(owner.items()))


def depends_on(action: Action, last: int) -> list[Action]:
    """What must be finished, anywhere, before this action can start; `last` is the last stage."""
    op, stage, m = action
    if op == Op.F:
        return [Action(op, stage - 1, m)] if stage > 0 else []
    if op == Op.W:
        return [Action(Op.I, stage, m)]
    here = [Action(Op.F, stage, m)]
    return here if stage == last else [*here, Action(op, stage + 1, m)]


def check(schedule: Schedule, microbatches: int) -> None:
    """Is every microbatch carried once through every stage, forward and back, and do messages arrive in the order in
    which they are sent? ValueError names what is not."""
    stages = len(owners(schedule))
    count = Counter(chain(*schedule))
    backward = {Op.F, Op.I, Op.W} if any(a.op == Op.I for a in count) else {Op.F, Op.B}
    wanted = {Action(op, s, m) for op in backward for s in range(stages) for m in range(microbatches)}
    for problem, actions in {
        "leaves out": wanted - count.keys(),
        "has an action that belongs to no microbatch or stage:": count.keys() - wanted,
        "repeats": {a for a, times in count.items() if times > 1},
    }.items():
        if actions:
            first = min(actions)
            raise ValueError(f"the schedule {problem} {first} of stage {first.stage} ({len(actions)} such actions)")
    for rank, program in enumerate(schedule):
        place = {action: i for i, action in enumerate(program)}
        for action in program:
            for needed in depends_on(action, stages - 1):
                if needed in place and place[needed] > place[action]:
                    raise ValueError(f"rank {rank} has {action} before {needed}, which it needs")
    orders: dict[tuple[Op, int], list[int]] = defaultdict(list)
    for action in chain(*schedule):
        orders[action.op, action.stage].append(action.microbatch)
    for (op, stage), order in orders.items():
        if op != Op.W and order != orders.get((op, stage - 1), order):
            raise ValueError(f"stage {stage} takes the microbatches of {op} in another order than stage {stage - 1}")


def in_flight(program: Program) -> int:
    """The most microbatches whose activations one rank holds at a time (forward done, backward not)."""
    held = peak = 0
    for action in program:
        held += {Op.F: 1, Op.B: -1, Op.W: -1}.get(action.op, 0)
        peak = max(peak, held)
    return peak


def communicate(schedule: Schedule, ahead: int = 1) -> Schedule:
    """Add the communication that an order of computation implies.

    A receive is posted `ahead` computations before the one that needs it, so that the data can arrive while the
    rank still computes; a send follows its computation. REDUCE stands before the last backward of a stage.
    """
    last = max(owners(schedule))
    return [_communicate(program, last, ahead) for program in schedule]


def _communicate(program: Program, last: int, ahead: int) -> Program:
    before: list[Program] = [[] for _ in program]
    after: list[Program] = [[] for _ in program]
    final = {a.stage: i for i, a in enumerate(program) if a.op in (Op.B, Op.W)}  # the last one of a stage wins
    for i, action in enumerate(program):
        early = before[max(i - ahead, 0)]
        if action.op == Op.F:
            first_stage, last_stage = action.stage == 0, action.stage == last
            early.append(action._replace(op=Op.LOAD if first_stage else Op.RECV_ACTIVATION))
            after[i].append(action._replace(op=Op.LOSS if last_stage else Op.SEND_ACTIVATION))
        elif action.op in (Op.B, Op.I):
            if action.stage < last:
                early.append(action._replace(op=Op.RECV_GRADIENT))
            if action.stage > 0:
                after[i].append(action._replace(op=Op.SEND_GRADIENT))
        if final.get(action.stage) == i:
            before[i].append(action._replace(op=Op.REDUCE))
    return list(chain(*([*b, a, *c] for b, a, c in zip(before, program, after, strict=True))))
