"""Who did what, when. A predicted run and a recorded run are the same kind of thing."""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .schedule import COMPUTE, Action, Op, Program, Schedule, depends_on, owners

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

    def fixed(self) -> dict[Op, float]:
        """The ops that take the same time wherever they are."""
        numbers = {name for name, part in vars(self).items() if not callable(part)}
        return {op: self(Action(op, 0, 0)) for op, parts in PARTS.items() if numbers.issuperset(parts)}


PARTS = {
    Op.F: ("forward",),
    Op.B: ("backward_input", "backward_weight"),
    Op.I: ("backward_input",),
    Op.W: ("backward_weight",),
    Op.SEND_ACTIVATION: ("communication",),
    Op.SEND_GRADIENT: ("communication",),
}


class Deadlock(RuntimeError):
    """Ranks wait for each other, or for what never comes. The message names the cycle."""


def simulate(
    schedule: Schedule,
    costs: Costs | None = None,
    sends: Literal["buffered", "rendezvous"] = "buffered",
    *,
    overlap: bool = True,
    cores: float | None = None,
) -> Timeline:
    """Run every rank's list in order, each action as soon as what it depends on is there. Linear in the actions.

    A rank sends a result to the next stage as soon as it has it, at time s. The rank of that stage comes to its
    receive just before it computes with the result, at time r. With c seconds of communication they go on at

        sends         overlap   the sender at     the receiver at
        "buffered"    True      s                 max(r, s + c)        the executor's
        "buffered"    False     s + c             max(r, s) + c
        "rendezvous"  True      max(r, s)         max(r, s) + c
        "rendezvous"  False     max(r, s) + c     max(r, s) + c

    Args:
        schedule: orders of computation; the communication they imply is understood.
        sends: a "rendezvous" begins when both ranks have come to it; a "buffered" send waits for nobody.
        overlap: whether messages travel while ranks compute. If not, each takes c seconds of both ranks' own time,
            and these are spans of the timeline, too.
        cores: how many serve all ranks together, a fraction of one too; by default, one each. Where more ranks are
            at work (computing, or with a message if overlap=False), each gets an equal share, and all slow down.

    Raises Deadlock, which names who waits for whom.
    """
    if callable(schedule) or not isinstance(costs, Costs | None):
        what = "a schedule and its costs, such as one_f_one_b(4, 8) and Costs(1, 1, 1)"
        raise TypeError(f"simulate({schedule!r:.40}, {costs!r:.40}): it takes {what}")
    if sends not in ("buffered", "rendezvous"):
        raise ValueError(f'sends={sends!r}: "buffered" or "rendezvous"')
    if cores is not None and not cores > 0:
        raise ValueError(f"cores={cores!r}: more than 0, or None for one a rank")
    if cores is None:
        return _Run(schedule, costs or Costs(), sends == "rendezvous", overlap).timeline()
    return _SharedCores(schedule, costs or Costs(), sends == "rendezvous", overlap, cores=cores).timeline()


@dataclass(frozen=True)
class _Channel:
    """What goes from one stage to its neighbor on another rank: activations down, or gradients up."""

    op: Op  # of the sends
    stage: int  # that sends
    sender: int | None  # None: no rank has that stage
    receiver: int | None
    sent: dict[int, float] = field(default_factory=dict)  # microbatch, buffered and not received yet -> when
    first: dict[int, int] = field(default_factory=dict)  # microbatch -> the rank that is at its end and waits


class _Job(NamedTuple):
    """What computations of one kind and stage have in common, whatever the microbatch."""

    own: dict[tuple[Op, int], set[int]]  # what they need from their own rank -> the microbatches that it has done
    source: _Channel | None  # where results of another rank come in
    target: _Channel | None  # where theirs go out
    done: set[int]  # microbatches


class _Run:
    """A simulation in which each rank has a clock, and goes on by it until it waits for another rank."""

    def __init__(self, schedule: Schedule, costs: Costs, rendezvous: bool, overlap: bool):
        self.costs, self.fixed = costs, costs.fixed()
        self.rendezvous, self.overlap = rendezvous, overlap
        self.jobs = _jobs(schedule)
        self.spans: list[Span] = []
        self.clock = [0.0] * len(schedule)
        self.at: dict[int, Action] = {}  # what a rank computes next or now; no entry: it has done all
        self.lives = [self.life(rank, program) for rank, program in enumerate(schedule)]
        self.ready = list(range(len(schedule)))

    def timeline(self) -> Timeline:
        self.run()
        if self.at:
            raise Deadlock(f"deadlock: {self.who_waits()}")
        return Timeline(self.spans)

    def run(self) -> None:
        while self.ready:
            next(self.lives[self.ready.pop()], None)

    def life(self, rank: int, program: Program) -> Iterator[None]:
        """What a rank does. It yields where it is held, and goes on when it is woken."""
        for action in program:
            self.at[rank] = action
            op, stage, microbatch = action
            own, source, target, done = self.jobs[op, stage]
            for finished in own.values():
                if microbatch not in finished:
                    yield  # for good: what the rank itself has not done, nobody does
            if source and self.receive(rank, source, microbatch):
                yield
            if self.spend(rank, action, self.seconds(action), self.clock[rank]):
                yield
            done.add(microbatch)
            if target and self.send(rank, target, microbatch):
                yield
        self.at.pop(rank, None)

    # The two ends of a message. Who comes second knows when its transfer begins, and takes the other along.

    def send(self, rank: int, channel: _Channel, microbatch: int) -> bool:
        """Does it hold the rank?"""
        since, receiver = self.clock[rank], channel.first.pop(microbatch, None)
        if receiver is not None:
            since = max(since, self.clock[receiver]) if self.rendezvous else since
            self.take(receiver, channel, microbatch, since)
            self.wake(receiver)
        elif self.rendezvous:
            channel.first[microbatch] = rank
            return True
        else:
            channel.sent[microbatch] = since
        return self.give(rank, channel, microbatch, since)

    def receive(self, rank: int, channel: _Channel, microbatch: int) -> bool:
        """Does it hold the rank?"""
        since, sender = channel.sent.pop(microbatch, None), channel.first.pop(microbatch, None)
        if sender is not None:
            since = max(self.clock[sender], self.clock[rank])
            self.give(sender, channel, microbatch, since)
            self.wake(sender)
        elif since is None:
            channel.first[microbatch] = rank
            return True
        return self.take(rank, channel, microbatch, since)

    def give(self, rank: int, channel: _Channel, microbatch: int, since: float) -> bool:
        if self.overlap:
            return self.rest(rank, since)
        send = Action(channel.op, channel.stage, microbatch)
        return self.spend(rank, send, self.seconds(send), since)

    def take(self, rank: int, channel: _Channel, microbatch: int, since: float) -> bool:
        send = Action(channel.op, channel.stage, microbatch)
        if self.overlap:
            return self.rest(rank, max(self.clock[rank], since + self.seconds(send)))
        return self.spend(rank, _received(send), self.seconds(send), max(self.clock[rank], since))

    def seconds(self, action: Action) -> float:
        fixed = self.fixed.get(action.op)
        return self.costs(action) if fixed is None else fixed

    # What takes time. With a clock of its own, a rank need not be held for it.

    def spend(self, rank: int, action: Action, seconds: float, start: float) -> bool:
        end = self.clock[rank] = start + seconds
        self.spans.append(Span(rank, action, start, end))
        return False

    def rest(self, rank: int, until: float) -> bool:
        self.clock[rank] = until
        return False

    def wake(self, rank: int) -> None:
        self.ready.append(rank)

    # Who waits for whom, once nobody can go on.

    def who_waits(self) -> str:
        """The cycle of ranks that wait for each other, or the chain of them that ends at what never comes."""
        rank: int | None = min(self.at)
        chain: list[int] = []
        while rank in self.at and rank not in chain:
            chain.append(rank)
            rank, _ = self.wait(rank)
        if rank in chain:
            chain = chain[chain.index(rank) :]  # who waits for the cycle is not in it
        end = "itself" if [rank] == chain else _name(rank)
        if rank is not None and rank not in self.at:
            end += ", which has come to the end of its list"
        first, *more = [*map(_name, chain), end]
        lines = [f"{first} waits for {', which waits for '.join(more)}"]
        lines += [self.wait(rank)[1] for rank in chain]
        if behind := [_name(rank) for rank in sorted(self.at) if rank not in chain]:
            lines.append(f"behind: {', '.join(behind)}")
        return "\n".join(lines)

    def wait(self, rank: int) -> tuple[int | None, str]:
        """For whom a rank waits, and how to say it."""
        action = self.at[rank]
        op, stage, microbatch = action
        own, source, target, _ = self.jobs[op, stage]
        at = f"rank {rank} waits at {action} (stage {stage}) for"
        if target and target.first.get(microbatch) == rank:
            message = f"{target.op} of microbatch {microbatch} (stage {stage})"
            return target.receiver, f"rank {rank} waits in {message} for {_name(target.receiver)}"
        if source and source.first.get(microbatch) == rank:
            return source.sender, f"{at} {op}{microbatch} of stage {source.stage}, {_name(source.sender)}"
        need, of = next(place for place, finished in own.items() if microbatch not in finished)
        return rank, f"{at} {need}{microbatch} of stage {of}, which its own list does not have before"


class _SharedCores(_Run):
    """The same, where ranks at work share cores: everything in the order of time.

    `now` is in seconds. `work` is in seconds of a whole core: while ranks share cores it goes slower, and since the
    shares are equal, one such clock does for all of them.
    """

    def __init__(self, *arguments: Any, cores: float):
        super().__init__(*arguments)
        self.cores = cores
        self.now = self.work = 0.0
        self.working: list[tuple[float, int, Action, float]] = []  # heap: (clock `work` when done, rank, what, since)
        self.resting: list[tuple[float, int]] = []  # heap: (until when, rank)

    def run(self) -> None:
        super().run()
        while self.working or self.resting:
            rank = self.next_event()
            self.clock[rank] = self.now
            next(self.lives[rank], None)

    def next_event(self) -> int:
        """Move both clocks on to where a rank is done or woken. Which one?"""
        share = min(1.0, self.cores / max(len(self.working), 1))  # of a core, for each
        late = self.now - self.work  # both formulas below are exact where there are cores for all: late 0, share 1
        done = self.working[0][0] if self.working else self.work
        end = done + late + (done - self.work) * (1 / share - 1) if self.working else math.inf
        if self.resting and self.resting[0][0] <= end:
            until, rank = heappop(self.resting)
            self.work, self.now = until - late - (until - self.now) * (1 - share), until
        else:
            self.work, rank, action, start = heappop(self.working)
            self.now = end
            self.spans.append(Span(rank, action, start, end))
        return rank

    def spend(self, rank: int, action: Action, seconds: float, start: float) -> bool:
        heappush(self.working, (self.work + seconds, rank, action, start))
        return True

    def rest(self, rank: int, until: float) -> bool:
        heappush(self.resting, (until, rank))
        return True

    def wake(self, rank: int) -> None:
        """Its work or rest ends by itself."""


def _jobs(schedule: Schedule) -> dict[tuple[Op, int], _Job]:
    owner = owners(schedule)
    channels: dict[tuple[Op, int], _Channel] = {}
    done: dict[tuple[Op, int], set[int]] = defaultdict(set)

    def channel(op: Op, stage: int, neighbor: int) -> _Channel:
        send = Op.SEND_ACTIVATION if op == Op.F else Op.SEND_GRADIENT
        return channels.setdefault((send, stage), _Channel(send, stage, owner.get(stage), owner.get(neighbor)))

    def job(op: Op, stage: int) -> _Job:
        rank, next_stage = owner[stage], stage + 1 if op == Op.F else stage - 1
        needs = depends_on(Action(op, stage, 0), max(owner))
        own = {need[:2]: done[_gift(need.op), need.stage] for need in needs if owner.get(need.stage) == rank}
        source = [channel(op, need.stage, stage) for need in needs if owner.get(need.stage) != rank]
        target = channel(op, stage, next_stage) if op != Op.W and owner.get(next_stage, rank) != rank else None
        return _Job(own, source[0] if source else None, target, done[_gift(op), stage])

    return {(op, stage): job(op, stage) for op, stage in {action[:2] for program in schedule for action in program}}


def _gift(op: Op) -> Op:
    """What others wait for. A whole backward gives the input gradient, so what waits for B may find I, too."""
    return Op.I if op == Op.B else op


def _name(rank: int | None) -> str:
    return "no rank" if rank is None else f"rank {rank}"


def _received(message: Action) -> Action:
    """The other end of a send."""
    if message.op == Op.SEND_ACTIVATION:
        return Action(Op.RECV_ACTIVATION, message.stage + 1, message.microbatch)
    return Action(Op.RECV_GRADIENT, message.stage - 1, message.microbatch)


def bubble(timeline: Timeline, of: Literal["run", "stage"] = "run") -> float:
    """The share of time in which ranks do not compute.

    of="run": of ranks x length of the run. of="stage": 1 - (one rank's work) / (the longest span of any rank, from
    its own first start to its last end), the convention of Qi et al. 2023 (Zero Bubble Pipeline Parallelism).
    """
    work: dict[int, float] = defaultdict(float)
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    for rank, action, start, end in timeline.spans:
        if action.op in COMPUTE:
            work[rank] += end - start
            first[rank] = min(start, first.get(rank, start))
            last[rank] = max(end, last.get(rank, end))
    if of == "run":
        return 1 - sum(work.values()) / (len(work) * timeline.end)
    if of != "stage":
        raise ValueError(f'of={of!r}: "run" or "stage"')
    return 1 - max(work.values()) / max(last[rank] - first[rank] for rank in work)


Memory = dict[int, list[tuple[float, float]]]  # rank -> (since when, bytes), in the order of time


def memory(timeline: Timeline, activation: Seconds = 1.0, base: float | Callable[[int], float] = 0.0) -> Memory:
    """What each rank holds over time: a microbatch's activations from the start of F to the end of B, or of W.

    activation: bytes that an F leaves behind for the backward, a number or a function of the action. By default
        microbatches are counted. base: bytes that are there all the time, a number or a function of the rank.
    """
    start = min((s.start for s in timeline.spans), default=0.0)
    held: Memory = {rank: [(start, base(rank) if callable(base) else base)] for rank in timeline.ranks}
    kept: dict[tuple[int, int, int], float] = {}  # by rank, stage and microbatch
    for rank, action, start, end in sorted(timeline.spans, key=lambda s: s.start):
        place = rank, action.stage, action.microbatch
        size = held[rank][-1][1]
        if action.op == Op.F:
            kept[place] = activation(action) if callable(activation) else activation
            held[rank].append((start, size + kept[place]))
        elif action.op in (Op.B, Op.W):
            held[rank].append((end, size - kept.pop(place, 0.0)))
    return held


def peak(held: Memory) -> dict[int, float]:
    """The most bytes that each rank holds at a time, of what `memory` gives."""
    return {rank: max(size for _, size in steps) for rank, steps in held.items()}
