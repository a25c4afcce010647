"""Who did what, when. A predicted run and a recorded run are the same kind of thing."""

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from .schedule import COMPUTE, Action, Op, Schedule, communicate, depends_on, owners

Seconds = float | Callable[[Action], float]


class Span(NamedTuple):
    """One action of one rank, in seconds since the run began."""

    rank: int
    action: Action
    start: float
    end: float


@dataclass
class Timeline:
    """The spans of a run, predicted or recorded."""

    spans: list[Span]

    @property
    def ranks(self) -> list[int]:
        return sorted({s.rank for s in self.spans})

    @property
    def end(self) -> float:
        """Seconds from the first start to the last end."""
        return max(s.end for s in self.spans) - min(s.start for s in self.spans)

    def of(self, rank: int) -> list[Span]:
        return [s for s in self.spans if s.rank == rank]

    def save(self, file: str | Path) -> None:
        """Write Chrome's trace format, which ui.perfetto.dev opens: a row a rank."""
        names = [
            {"ph": "M", "name": "thread_name", "pid": 0, "tid": rank, "args": {"name": f"rank {rank}"}}
            for rank in self.ranks
        ]
        events = [
            {"ph": "X", "name": f"{s.action}", "cat": s.action.op.name, "pid": 0, "tid": s.rank}
            | {"ts": s.start * 1e6, "dur": (s.end - s.start) * 1e6}
            | {"args": {"stage": s.action.stage, "microbatch": s.action.microbatch}}
            for s in self.spans
        ]
        Path(file).write_text(json.dumps({"traceEvents": names + events}))


@dataclass(frozen=True)
class Costs:
    """Seconds an action takes, a number or a function of the action. B costs both backwards together.

    communication: seconds until what one stage computed has reached the next.
    """

    forward: Seconds = 1.0
    backward_input: Seconds = 1.0
    backward_weight: Seconds = 1.0
    communication: Seconds = 0.0

    def __call__(self, action: Action) -> float:
        seconds = 0.0
        for name in PARTS.get(action.op, ()):
            part = getattr(self, name)
            seconds += part(action) if callable(part) else part
        return seconds


PARTS = {
    Op.F: ("forward",),
    Op.B: ("backward_input", "backward_weight"),
    Op.I: ("backward_input",),
    Op.W: ("backward_weight",),
    Op.SEND_ACTIVATION: ("communication",),
    Op.SEND_GRADIENT: ("communication",),
}


class Deadlock(RuntimeError):
    """No rank can go on. The message says what each one waits for."""


def simulate(
    schedule: Schedule, costs: Costs | None = None, sends: Literal["buffered", "rendezvous"] = "buffered"
) -> Timeline:
    """Run every rank's list in order, each action as soon as what it depends on is there. Linear in the actions.

    schedule: orders of computation; the communication they imply is understood.
    sends: "buffered" ones leave the sender free (the executor's). In a "rendezvous" the sender waits until the
        receiver has come to its receive, which it does just before it needs the data, and both are held meanwhile.
    Raises Deadlock, which names who waits for what.
    """
    costs = costs or Costs()
    if sends == "rendezvous":
        return _rendezvous(communicate(schedule, ahead=0), costs)
    if sends != "buffered":
        raise ValueError(f'sends={sends!r}: "buffered" or "rendezvous"')
    owner = owners(schedule)
    last = max(owner)
    clock, place = [0.0] * len(schedule), [0] * len(schedule)
    finished: dict[Action, float] = {}  # by what it gives
    waiting: dict[Action, list[int]] = defaultdict(list)  # action -> ranks that cannot go on before it
    spans, ready = [], list(range(len(schedule)))
    while ready:
        rank = ready.pop()
        while place[rank] < len(schedule[rank]):
            action = schedule[rank][place[rank]]
            needs = depends_on(action, last)
            if missing := [a for a in needs if _gift(a) not in finished]:
                waiting[_gift(missing[0])].append(rank)
                break
            start = max([clock[rank], *(finished[_gift(a)] + _latency(a, action, owner, costs) for a in needs)])
            clock[rank] = finished[_gift(action)] = start + costs(action)
            spans.append(Span(rank, action, start, clock[rank]))
            place[rank] += 1
            ready += waiting.pop(_gift(action), [])
    if stuck := {r: schedule[r][i] for r, i in enumerate(place) if i < len(schedule[r])}:
        lines = []
        for rank, action in stuck.items():
            need = next(a for a in depends_on(action, last) if _gift(a) not in finished)
            where = f"rank {owner[need.stage]}" if need.stage in owner else "no rank"
            lines.append(
                f"rank {rank} waits at {action} (stage {action.stage}) for {need} of stage {need.stage}, {where}"
            )
        raise Deadlock("deadlock:\n" + "\n".join(lines))
    return Timeline(spans)


def _gift(action: Action) -> Action:
    """What others wait for. A whole backward gives the input gradient, so what waits for B may find I, too."""
    return Action(Op.I, action.stage, action.microbatch) if action.op == Op.B else action


def _latency(need: Action, action: Action, owner: dict[int, int], costs: Costs) -> float:
    """How long the result of `need` travels to where `action` wants it."""
    if owner[need.stage] == owner[action.stage]:
        return 0.0
    return costs(need._replace(op=Op.SEND_ACTIVATION if need.op == Op.F else Op.SEND_GRADIENT))


def _rendezvous(program: Schedule, costs: Costs) -> Timeline:
    """The same with sends and receives in the list: each pair is one event, for which both ranks must have come."""
    clock, place = [0.0] * len(program), [0] * len(program)
    spans: list[Span] = []
    offered: dict[Action, tuple[int, float]] = {}  # a send or receive, named by its send -> who waits at it, since when
    ready = list(range(len(program)))
    while ready:
        rank = ready.pop()
        while place[rank] < len(program[rank]):
            action = program[rank][place[rank]]
            if action.op in COMPUTE:
                spans.append(Span(rank, action, clock[rank], clock[rank] + costs(action)))
                clock[rank] = spans[-1].end
            elif (event := _meeting(action)) is not None:
                if event not in offered:
                    offered[event] = rank, clock[rank]
                    break
                other, since = offered.pop(event)
                clock[rank] = clock[other] = max(clock[rank], since) + costs(event)
                place[other] += 1
                ready.append(other)
            place[rank] += 1
    if stuck := {r: p[i] for r, (p, i) in enumerate(zip(program, place, strict=True)) if i < len(p)}:
        lines = [f"rank {rank} waits in {a.op} of microbatch {a.microbatch}" for rank, a in stuck.items()]
        raise Deadlock("deadlock with rendezvous sends:\n" + "\n".join(lines))
    return Timeline(spans)


def _meeting(action: Action) -> Action | None:
    """A send and its receive have one name: the send's. None for what concerns one rank alone."""
    if action.op in (Op.SEND_ACTIVATION, Op.SEND_GRADIENT):
        return action
    if action.op == Op.RECV_ACTIVATION:
        return Action(Op.SEND_ACTIVATION, action.stage - 1, action.microbatch)
    if action.op == Op.RECV_GRADIENT:
        return Action(Op.SEND_GRADIENT, action.stage + 1, action.microbatch)
    return None


def bubble(timeline: Timeline, of: Literal["run", "stage"] = "run") -> float:
    """The share of time in which ranks do not compute.

    of="run": of ranks x length of the run. of="stage": 1 - (one rank's work) / (the longest span of any rank, from
    its own first start to its last end), the convention of Qi et al. 2023 (Zero Bubble Pipeline Parallelism).
    """
    work: dict[int, float] = defaultdict(float)
    for s in timeline.spans:
        if s.action.op in COMPUTE:
            work[s.rank] += s.end - s.start
    if of == "run":
        return 1 - sum(work.values()) / (len(work) * timeline.end)
    if of != "stage":
        raise ValueError(f'of={of!r}: "run" or "stage"')
    own = {rank: timeline.of(rank) for rank in work}
    longest = max(max(s.end for s in spans) - min(s.start for s in spans) for spans in own.values())
    return 1 - max(work.values()) / longest
