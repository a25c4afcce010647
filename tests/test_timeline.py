"""A recorded run is a timeline like a predicted one: every rank, its own order, one clock."""

import itertools
import json
import time
from collections import defaultdict
from unittest.mock import patch

import pytest
import torch
from laws import batch_of, model_of

from minipar import Config, Costs, Mesh, Timeline, bubble, gpipe, one_f_one_b, parallelize, simulate
from minipar.collectives import Axis, everyone
from minipar.recording import clock_offset
from minipar.schedule import COMPUTE, Action, Op, depends_on
from minipar.timeline import Span
from minipar.transport import Alone

TINY = Config(vocab=19, context=8, depth=4, width=16, heads=4)
MESHES = [Mesh(pp=4), Mesh(dp=2, pp=2), Mesh(pp=2, tp=2)]
MICROBATCHES = 4


def record(mesh, schedule, ahead=0.0):
    """On a rank: two steps, the timeline of the second. ahead: seconds by which a clock is before that of rank - 1."""
    clock, rank = time.perf_counter, torch.distributed.get_rank()
    with patch.object(time, "perf_counter", lambda: clock() + ahead * rank):
        parallel = parallelize(model_of(TINY), mesh, schedule=schedule, microbatches=MICROBATCHES)
        parallel.step(*batch_of(TINY, 16, 8))
        parallel.step(*batch_of(TINY, 16, 8))
        parallel.forward(batch_of(TINY, 16, 8)[0])  # no step: the timeline stays
        return parallel.timeline()


@pytest.fixture(
    scope="module",
    params=[(mesh, s) for mesh in MESHES for s in (gpipe, one_f_one_b)],
    ids=lambda p: f"{p[0]} {p[1].__name__}",
)
def recorded(request, world4):
    mesh, schedule = request.param
    return mesh, schedule, world4.run(record, mesh, schedule)


def test_every_rank_gets_the_spans_of_all_ranks(recorded):
    mesh, _, timelines = recorded
    assert all(timeline == timelines[0] for timeline in timelines)
    assert timelines[0].ranks == list(range(mesh.size))
    assert min(span.start for span in timelines[0].spans) == 0
    assert 0 < timelines[0].end < 60


def test_each_rank_does_one_thing_at_a_time_in_the_order_of_its_program(recorded):
    mesh, schedule, (timeline, *_) = recorded
    order = schedule(mesh.pp, MICROBATCHES)
    for rank in timeline.ranks:
        own = timeline.of(rank)
        assert [s.action for s in own if s.action.op in COMPUTE] == order[mesh.coordinate(rank)["pp"]]
        assert all(s.start <= s.end for s in own)
        assert all(a.end <= b.start for a, b in itertools.pairwise(own))


def broken_dependencies(mesh, timeline, tolerance=0.0):
    """Spans that began before what they need had ended on the neighboring stage of the same line."""
    ended = {(s.rank, s.action): s.end for s in timeline.spans}
    found = []
    for s in timeline.spans:
        if s.action.op in COMPUTE:
            line = mesh.line("pp", s.rank)
            for needed in depends_on(s.action, mesh.pp - 1):
                if s.start < ended[line[needed.stage], needed] - tolerance:
                    found.append((s, needed))
    return found


def test_nothing_begins_before_what_it_needs_has_ended_elsewhere(recorded):
    mesh, _, (timeline, *_) = recorded
    assert broken_dependencies(mesh, timeline) == []


def test_clocks_that_disagree_are_brought_together(world4):
    mesh = Mesh(pp=4)
    (timeline, *_) = world4.run(record, mesh, one_f_one_b, ahead=1000.0)
    assert timeline.end < 60
    assert broken_dependencies(mesh, timeline, tolerance=0.5) == []


def test_a_clocks_offset_is_found_and_equal_clocks_have_none(world4):
    def offsets(ahead):
        clock, rank = time.perf_counter, torch.distributed.get_rank()
        with patch.object(time, "perf_counter", lambda: clock() + ahead * rank):
            return clock_offset(everyone())

    assert world4.run(offsets, 0.0) == [0.0] * 4
    for rank, offset in enumerate(world4.run(offsets, -50.0)):
        assert offset == pytest.approx(-50.0 * rank, abs=0.5)


def test_a_timeline_opens_as_a_chrome_trace(tmp_path, recorded):
    _, _, (timeline, *_) = recorded
    timeline.save(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    rows = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    assert rows == {rank: f"rank {rank}" for rank in timeline.ranks}
    spans = [e for e in events if e["ph"] == "X"]
    assert len(spans) == len(timeline.spans) and len(events) == len(rows) + len(spans)
    for event, span in zip(spans, timeline.spans, strict=True):
        assert (event["tid"], event["name"]) == (span.rank, str(span.action))
        assert event["ts"] == pytest.approx(span.start * 1e6) and event["dur"] == pytest.approx(
            1e6 * (span.end - span.start)
        )
        assert event["args"] == {"stage": span.action.stage, "microbatch": span.action.microbatch}


def test_a_predicted_run_is_saved_the_same_way(tmp_path):
    simulate(one_f_one_b(2, 2), Costs(1, 1, 1)).save(tmp_path / "trace.json")
    spans = [e for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if e["ph"] == "X"]
    by_row = defaultdict(list)
    for e in spans:
        by_row[e["tid"]].append((e["name"], e["ts"] / 1e6, e["dur"] / 1e6))
    assert by_row == {
        0: [("F0", 0, 1), ("F1", 1, 1), ("B0", 4, 2), ("B1", 7, 2)],
        1: [("F0", 1, 1), ("B0", 2, 2), ("F1", 4, 1), ("B1", 5, 2)],
    }


def test_the_bubble_of_any_timeline_is_what_is_not_computed():
    f, b = Action(Op.F, 0, 0), Action(Op.B, 0, 0)
    timeline = Timeline([Span(0, f, 5.0, 6.0), Span(0, b, 8.0, 10.0), Span(1, f, 7.0, 8.0), Span(1, b, 8.0, 9.0)])
    assert timeline.end == 5
    assert bubble(timeline) == pytest.approx(1 - 5 / 10)
    assert bubble(timeline, of="stage") == pytest.approx(1 - 3 / 5)


def test_of_several_round_trips_the_shortest_counts_and_its_middle():
    """A clock 100 s ahead; each way takes as long, the second of the trips is the shortest."""
    true, waits = [0.0], iter([3.0, 0.5, 2.0, 4.0, 5.0])
    axis = Axis("all", (0, 1), 1, Alone())

    def send(x, ranks, to):
        true[0] += (wait := next(waits))
        pending.append((true[0], wait))

    def recv(like, ranks, source):
        now, wait = pending.pop()
        true[0] += wait
        return torch.tensor([now], dtype=torch.float64)

    pending = []
    clock = patch("minipar.recording.time.perf_counter", lambda: true[0] + 100)
    with clock, patch("minipar.recording.send", send), patch("minipar.recording.recv", recv):
        assert clock_offset(axis) == pytest.approx(100.0, abs=1e-9)
