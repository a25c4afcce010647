"""Pipeline schedules as plain data: for each rank the list of actions it takes, in order. No tensors, no processes.

    order = one_f_one_b(stages=4, microbatches=8)   # what to compute, in what order
    program = communicate(order)                    # ... with the sends and receives that it implies

A schedule has three readers: `simulate` predicts it, the executor runs it, `viz.draw` shows it.
"""

from collections import Counter, defaultdict
from collections.abc import Callable
from enum import StrEnum
from itertools import chain, pairwise, repeat, zip_longest
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
    PASS_ACTIVATION = "pass x"  # stands where the next stage is on the same rank, and nothing is sent
    PASS_GRADIENT = "pass g"
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


def interleaved(stages: int, microbatches: int, chunks: int = 2) -> Schedule:
    """1F1B with several smaller stages on each rank: rank r has the stages r, r + p, r + 2p ... of p * chunks.

    The bubble is (p-1)/(chunks * m) of the work, and a rank holds up to 2(p-r-1) + (chunks-1)p + 1 of the smaller
    stages' activations (Narayanan et al. 2021). Microbatches go around in groups of p, or of a few more where p does
    not divide their number.
    """
    rounds = max(microbatches // stages, 1)
    edges = [microbatches * i // rounds for i in range(rounds + 1)]
    groups = [range(*edge) for edge in pairwise(edges)]
    longest = max(map(len, groups), default=0)

    def program(rank: int) -> Program:
        down = [(rank + chunk * stages, m) for group in groups for chunk in range(chunks) for m in group]
        up = [(rank + chunk * stages, m) for group in groups for chunk in reversed(range(chunks)) for m in group]
        forwards, backwards = [Action(Op.F, *place) for place in down], [Action(Op.B, *place) for place in up]
        warmup = min(2 * (stages - 1 - rank) + (chunks - 1) * longest, len(forwards))
        steady = len(forwards) - warmup
        pairs = zip(forwards[warmup:], backwards[:steady], strict=True)
        return forwards[:warmup] + list(chain(*pairs)) + backwards[steady:]

    return [program(rank) for rank in range(stages)]


def zero_bubble_h1(stages: int, microbatches: int) -> Schedule:
    """1F1B with split backwards: weight gradients wait for the time in which 1F1B would wait.

    Every rank holds at most p microbatches, as 1F1B's first. The bubble is (p-1)(F + I - W) (Qi et al. 2023).
    """
    return _zero_bubble(stages, microbatches, 1)


def zero_bubble_h2(stages: int, microbatches: int) -> Schedule:
    """The same with twice the microbatches in flight, 2p - 1, and a bubble of (p-1)(F + I - 2W): none if all three
    take as long. The ranks' runs are shifted against each other by what is left."""
    return _zero_bubble(stages, microbatches, 2)


def _zero_bubble(stages: int, microbatches: int, depth: int) -> Schedule:
    """A weight gradient comes `depth * rank` microbatches after its input gradient."""

    def program(rank: int) -> Program:
        forwards, inputs, weights = (_row(op, rank, microbatches) for op in (Op.F, Op.I, Op.W))
        warmup, delay = depth * (stages - 1 - rank), depth * rank
        steady = zip_longest(forwards[warmup:], inputs, chain(repeat(None, delay), weights))
        return forwards[:warmup] + [action for action in chain(*steady) if action]

    return [program(rank) for rank in range(stages)]


def zero_bubble_v(stages: int, microbatches: int) -> Schedule:
    """Two stages a rank, laid out as a V: rank r has stage r on the way down and stage 2p - 1 - r on the way up.

    There is no bubble if F, I and W take as long, in the memory of 1F1B: 2p of the halved stages (Qi et al. 2023).
    """

    def program(rank: int) -> Program:
        places = {"0": rank, "1": 2 * stages - 1 - rank}
        left = {f"{op}{way}": iter(_row(op, s, microbatches)) for way, s in places.items() for op in (Op.F, Op.I, Op.W)}
        after = stages - rank  # ranks from here to the tip of the V
        order = ["F0"] * (2 * after - 1) + ["F1", "F0"] * rank + ["F1", "I1", "W1"] * after
        order += ["F0", "I0", "W0", "F1", "I1", "W1"] * (microbatches - stages)
        order += ["I0", "I1"] * rank + ["I0", "W0"] * after + ["W1", "W0"] * microbatches
        order += ["I0", "I1", "W0", "W1"] * microbatches  # where there are fewer microbatches than ranks
        return [action for key in order if (action := next(left[key], None))]

    return [program(rank) for rank in range(stages)]


SCHEDULES: dict[str, Scheduler] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "zero-bubble-h1": zero_bubble_h1,
    "zero-bubble-h2": zero_bubble_h2,
    "zero-bubble-v": zero_bubble_v,
}


def forward_only(schedule: Schedule) -> Schedule:
    """Inference: one microbatch through the same stages on the same ranks."""
    return [[a for a in program if a.op == Op.F and a.microbatch == 0] for program in schedule]


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
    mine = {action.stage for action in program}
    for i, action in enumerate(program):
        early = before[max(i - ahead, 0)]
        above, below = action.stage - 1, action.stage + 1
        if action.op == Op.F:
            if above not in mine:
                early.append(action._replace(op=Op.LOAD if action.stage == 0 else Op.RECV_ACTIVATION))
            on = Op.PASS_ACTIVATION if below in mine else Op.SEND_ACTIVATION
            after[i].append(action._replace(op=Op.LOSS if action.stage == last else on))
        elif action.op in (Op.B, Op.I):
            if action.stage < last and below not in mine:
                early.append(action._replace(op=Op.RECV_GRADIENT))
            if action.stage > 0:
                after[i].append(action._replace(op=Op.PASS_GRADIENT if above in mine else Op.SEND_GRADIENT))
        if final.get(action.stage) == i:
            before[i].append(action._replace(op=Op.REDUCE))
    return list(chain(*([*b, a, *c] for b, a, c in zip(before, program, after, strict=True))))
