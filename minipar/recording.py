"""A recorded run: the spans of every rank, brought together on one clock."""

import time

import torch
from torch import Tensor

from .collectives import Axis, all_gather, all_reduce, everyone, recv, send
from .schedule import Action, Op
from .timeline import Span, Timeline

OPS = list(Op)


def collect(spans: list[Span]) -> Timeline:
    """This rank's spans (of time.perf_counter) and everyone else's, from the first start on. A collective."""
    ranks = everyone()
    late = clock_offset(ranks)
    rows = [
        [s.rank, OPS.index(s.action.op), s.action.stage, s.action.microbatch, s.start - late, s.end - late]
        for s in spans
    ]
    table = torch.tensor(rows, dtype=torch.float64).view(-1, 6)
    longest = int(all_reduce(torch.tensor(len(table)), ranks, "max"))
    padding = table.new_full((longest - len(table), 6), -1)
    table = all_gather(torch.cat([table, padding]), ranks)
    table = table[table[:, 0] >= 0]
    table[:, 4:] -= table[:, 4].min()
    return Timeline(
        [Span(int(r), Action(OPS[int(op)], int(s), int(m)), start, end) for r, op, s, m, start, end in table.tolist()]
    )


def clock_offset(ranks: Axis, rounds: int = 5) -> float:
    """Seconds by which this rank's perf_counter is ahead of the first rank's.

    Each rank asks the first one for its time and takes the answer to be from the middle of the round trip; the
    shortest of several counts (Cristian 1989). A difference that is smaller than the trip is none: ranks of one
    machine read the same clock.
    """
    best = (float("inf"), 0.0)
    for other in range(1, ranks.size):
        for _ in range(rounds):
            if ranks.index == 0:
                recv(torch.zeros(1), ranks, other)
                send(_now(), ranks, other)
            elif ranks.index == other:
                asked = time.perf_counter()
                send(torch.zeros(1), ranks, 0)
                answer = recv(_now(), ranks, 0).item()
                answered = time.perf_counter()
                best = min(best, (answered - asked, (asked + answered) / 2 - answer))
    trip, offset = best
    return offset if abs(offset) > trip else 0.0


def _now() -> Tensor:
    return torch.tensor([time.perf_counter()], dtype=torch.float64)
