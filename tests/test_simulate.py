"""The simulator against published runs, closed forms, and another simulator that is written quite differently."""

import gc
import statistics
import sys
import time
from functools import partial
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipar import (
    Costs,
    bubble,
    gpipe,
    interleaved,
    one_f_one_b,
    simulate,
    zero_bubble_h1,
    zero_bubble_h2,
    zero_bubble_v,
)
from minipar.schedule import COMPUTE, Action, Op, communicate, depends_on, in_flight, owners
from minipar.timeline import Deadlock, memory, peak

EVERY = [gpipe, one_f_one_b, interleaved, partial(interleaved, chunks=3), zero_bubble_h1, zero_bubble_h2, zero_bubble_v]
MODES = [(sends, overlap) for sends in ("buffered", "rendezvous") for overlap in (True, False)]
every = st.tuples(st.sampled_from(EVERY), st.integers(1, 5), st.integers(1, 9))
seconds = st.floats(0.01, 100)

# -- published runs ------------------------------------------------------------------------------------------------

# Zero Bubble Pipeline Parallelism (Qi et al. 2023, arxiv.org/abs/2401.10241): ranks, microbatches, milliseconds of F,
# B, W and of communication as profiled (Table 9), bubble rates of 1F1B, ZB-H1 and ZB-H2 (Table 5).
ZERO_BUBBLE = [
    (8, 24, 18.522, 18.086, 9.337, 0.601, 0.2431, 0.1585, 0.1083),
    (8, 32, 18.513, 18.086, 9.331, 0.626, 0.1985, 0.1242, 0.0837),
    (8, 64, 18.546, 18.097, 9.321, 0.762, 0.1240, 0.0674, 0.0444),
    (8, 24, 29.718, 29.444, 19.927, 0.527, 0.2347, 0.1323, 0.0698),
    (8, 32, 29.802, 29.428, 19.530, 0.577, 0.1898, 0.1045, 0.0559),
    (8, 64, 29.935, 29.621, 19.388, 0.535, 0.1091, 0.0554, 0.0294),
]


@pytest.mark.parametrize("row", ZERO_BUBBLE, ids=lambda row: f"{row[1]} microbatches, F {row[2]} ms")
def test_the_published_bubble_rates_of_zero_bubble_pipelines_come_out_to_four_decimals(row):
    ranks, microbatches, *costs = row[:6]
    schedules = (one_f_one_b, zero_bubble_h1, zero_bubble_h2)
    runs = [simulate(schedule(ranks, microbatches), Costs(*costs)) for schedule in schedules]
    assert [round(bubble(run, of="stage"), 4) for run in runs] == list(row[6:])


# -- closed forms, with free communication -------------------------------------------------------------------------


def bubbles(order, *costs):
    run = simulate(order, Costs(*costs))
    return bubble(run, of="run"), bubble(run, of="stage")


@pytest.mark.parametrize("p", range(1, 9))
def test_gpipe_and_1f1b_have_the_bubble_of_their_closed_form_in_both_conventions(p):
    """(p-1)/(m+p-1) of the run (Narayanan et al. 2021), and of the first rank's own span, which is the whole run."""
    for m, schedule in product((*range(1, 13), 50), (gpipe, one_f_one_b)):
        share = pytest.approx((p - 1) / (m + p - 1), abs=1e-12)
        assert bubbles(schedule(p, m), 1.25, 2.5, 0.75) == (share, share)


@pytest.mark.parametrize("p", range(1, 7))
def test_interleaving_has_the_bubble_of_its_closed_form_in_both_conventions(p):
    """(p-1)/(vm+p-1), where p divides m (Narayanan et al. 2021)."""
    for v, rounds in product(range(1, 5), range(1, 5)):
        m = p * rounds
        share = pytest.approx((p - 1) / (v * m + p - 1), abs=1e-12)
        assert bubbles(interleaved(p, m, chunks=v), 1.25, 2.5, 0.75) == (share, share)


@pytest.mark.parametrize(("schedule", "depth"), [(zero_bubble_h1, 1), (zero_bubble_h2, 2)])
@pytest.mark.parametrize("p", range(1, 9))
def test_zero_bubble_has_the_bubble_of_its_closed_form_in_both_conventions(schedule, depth, p):
    """(p-1)(F+I-dW) by the longest rank's own span (Qi et al. 2023), with d = 1 for ZB-H1 and 2 for ZB-H2.

    The last rank begins (p-1)F after the first and never waits, so no run is shorter than that and its work.
    """
    for more, (f, i, w) in product((0, 1, 5, 30), ((1, 1, 1), (1.5, 1.0, 0.5), (1.0, 1.75, 0.75), (2.0, 1.5, 1.5))):
        m = 2 * p - 1 + more
        work, waits = m * (f + i + w), (p - 1) * max(f + i - depth * w, 0)
        run, stage = bubbles(schedule(p, m), f, i, w)
        assert stage == pytest.approx(waits / (work + waits), abs=1e-12)
        waits = max(waits, (p - 1) * f)
        assert run == pytest.approx(waits / (work + waits), abs=1e-12)


# -- another simulator ---------------------------------------------------------------------------------------------


sys.setrecursionlimit(max(sys.getrecursionlimit(), 10_000))  # for the questions of `reference`
SENDS = (Op.SEND_ACTIVATION, Op.SEND_GRADIENT)
RECEIVES = (Op.RECV_ACTIVATION, Op.RECV_GRADIENT)


def partner(action):
    """The other end of a send or a receive."""
    op, stage, microbatch = action
    other = dict(zip(SENDS + RECEIVES, RECEIVES + SENDS, strict=True))[op]
    return Action(other, stage + (1 if op in (Op.SEND_ACTIVATION, Op.RECV_GRADIENT) else -1), microbatch)


def reference(order, costs, sends="buffered", overlap=True):
    """(rank, action) -> (start, end), each by asking when what comes before it has ended.

    A question that leads back to itself is a deadlock.
    """
    items = [[a for a in p if a.op in (*COMPUTE, *SENDS, *RECEIVES)] for p in communicate(order, ahead=0)]
    place = {a: (rank, i) for rank, program in enumerate(items) for i, a in enumerate(program)}
    answers, spans, last = {}, {}, max(owners(order))

    def free(rank, i):
        """When a rank goes on after its item i."""
        if i < 0:
            return 0.0
        if answers.setdefault((rank, i), "asked") == "asked":
            if (rank, i) in asked:
                raise Deadlock
            asked.add((rank, i))
            answers[rank, i] = answer(rank, i, items[rank][i], free(rank, i - 1))
        return answers[rank, i]

    def answer(rank, i, action, at):
        if action.op in COMPUTE:
            needs = [n if n in place else n._replace(op=Op.B) for n in depends_on(action, last)]
            if any(owners(order)[n.stage] == rank and place[n] > (rank, i) for n in needs):
                raise Deadlock
            spans[rank, action] = at, at + costs(action)
            return at + costs(action)
        is_send = action.op in SENDS
        c = costs(action if is_send else partner(action))
        if is_send and sends == "buffered":
            s = r = at
        else:
            other, j = place[partner(action)]
            s, r = (at, free(other, j - 1)) if is_send else (free(other, j - 1), at)
        sender, receiver = {
            ("buffered", True): (s, max(r, s + c)),
            ("buffered", False): (s + c, max(r, s) + c),
            ("rendezvous", True): (max(r, s), max(r, s) + c),
            ("rendezvous", False): (max(r, s) + c, max(r, s) + c),
        }[sends, overlap]
        end = sender if is_send else receiver
        if not overlap:
            spans[rank, action] = end - c, end
        return end

    asked = set()
    for rank, program in enumerate(items):
        for i in range(len(program)):
            free(rank, i)
    return spans


def spans_of(run):
    return {(s.rank, s.action): (s.start, s.end) for s in run.spans}


def agree(order, costs, sends, overlap):
    """Do the simulators give the same spans, or both a deadlock?"""
    try:
        expected = reference(order, costs, sends, overlap)
    except Deadlock:
        with pytest.raises(Deadlock):
            simulate(order, costs, sends, overlap=overlap)
        return "deadlock"
    run = simulate(order, costs, sends, overlap=overlap)
    found = spans_of(run)
    assert len(run.spans) == len(found) and found.keys() == expected.keys()
    for key, times in expected.items():
        assert found[key] == pytest.approx(times, rel=1e-9, abs=1e-9), key
    return "run"


def uneven(a):
    """Seconds that differ for each action."""
    return 1 + (3 * a.stage + 5 * a.microbatch) % 7 / 4 + len(a.op) / 8


UNEVEN = Costs(uneven, uneven, uneven, lambda a: uneven(a) / 3)


@pytest.mark.parametrize(("sends", "overlap"), MODES)
def test_every_kind_of_communication_gives_what_another_simulator_gives(sends, overlap):
    outcomes = [
        agree(schedule(p, m), costs, sends, overlap)
        for schedule, p, m in product(EVERY, range(1, 5), range(1, 6))
        for costs in (UNEVEN, Costs(1, 1.5, 0.5, 0.25))
    ]
    assert "run" in outcomes and ("deadlock" in outcomes) == (sends == "rendezvous")


@given(every, st.sampled_from(MODES), st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), max_size=3))
def test_orders_that_are_mixed_up_run_or_deadlock_as_in_another_simulator(size, mode, swaps):
    schedule, p, m = size
    order = schedule(p, m)
    for which, i in swaps:
        program = order[which % p]
        i %= len(program)
        program[i - 1], program[i] = program[i], program[i - 1]
    agree(order, UNEVEN, *mode)


@pytest.mark.parametrize("p", range(2, 6))
def test_interleaving_with_any_number_of_microbatches_gives_what_another_simulator_gives(p):
    """Where the ranks do not divide the microbatches, too."""
    for v, m in product((2, 3), range(1, 14)):
        order, costs = interleaved(p, m, chunks=v), Costs(1, 1.25, 0.75)
        spans = reference(order, costs)
        work, length = 3 * v * m, max(end for _, end in spans.values())
        own = [[times for (rank, _), times in spans.items() if rank == r] for r in range(p)]
        longest = max(max(end for _, end in times) - min(start for start, _ in times) for times in own)
        assert bubbles(order, 1, 1.25, 0.75) == (pytest.approx(1 - work / length), pytest.approx(1 - work / longest))


@given(every, seconds, seconds, seconds, st.floats(0, 10))
def test_waiting_for_each_other_and_own_time_for_messages_never_make_a_run_quicker(size, f, i, w, c):
    schedule, p, m = size
    order, costs = schedule(p, m), Costs(f, i, w, c)
    quick, slow = (simulate(order, costs, overlap=overlap).end for overlap in (True, False))
    assert slow >= quick - 1e-9 * quick
    try:
        met, met_slow = (simulate(order, costs, "rendezvous", overlap=overlap).end for overlap in (True, False))
    except Deadlock:
        return
    assert met >= quick - 1e-9 * quick and met_slow >= max(met, slow) - 1e-9 * slow


def test_messages_without_overlap_are_spans_of_both_ranks():
    run = simulate(gpipe(2, 2), Costs(1, 1, 1, 0.5), overlap=False)
    assert [f"{a} {start:g}-{end:g}" for _, a, start, end in run.of(0)] == [
        "F0 0-1", "send x0 1-1.5", "F1 1.5-2.5", "send x1 2.5-3",
        "recv g0 6-6.5", "B0 6.5-8.5", "recv g1 8.5-9", "B1 9-11",
    ]  # fmt: skip
    assert [f"{a} {start:g}-{end:g}" for _, a, start, end in run.of(1)] == [
        "recv x0 1-1.5", "F0 1.5-2.5", "recv x1 2.5-3", "F1 3-4",
        "B0 4-6", "send g0 6-6.5", "B1 6.5-8.5", "send g1 8.5-9",
    ]  # fmt: skip


# -- fewer cores than ranks ----------------------------------------------------------------------------------------


@given(every, st.sampled_from(MODES), st.integers(0, 3))
def test_with_a_core_for_each_rank_nothing_changes(size, mode, more):
    schedule, p, m = size
    sends, overlap = mode
    try:
        plain = simulate(schedule(p, m), UNEVEN, sends, overlap=overlap)
    except Deadlock:
        with pytest.raises(Deadlock):
            simulate(schedule(p, m), UNEVEN, sends, overlap=overlap, cores=p + more)
        return
    assert spans_of(simulate(schedule(p, m), UNEVEN, sends, overlap=overlap, cores=p + more)) == spans_of(plain)


def test_two_ranks_share_one_core():
    """F0 alone from 0 to 1. F1 of the first rank and F0 of the second take twice as long, and so on."""
    forward = [[a for a in program if a.op == Op.F] for program in gpipe(2, 2)]
    spans = spans_of(simulate(forward, Costs(1, 1, 1), cores=1))
    assert {f"{a} of {rank}": times for (rank, a), times in spans.items()} == {
        "F0 of 0": (0, 1),
        "F1 of 0": (1, 3),
        "F0 of 1": (1, 3),
        "F1 of 1": (3, 4),
    }


@given(every, st.sampled_from(MODES), st.floats(0.1, 6), st.booleans())
def test_every_action_gets_its_share_of_the_cores_until_its_work_is_done(size, mode, cores, slow_network):
    """From the spans alone: its cost is what it gets, and it begins when its rank and what it needs are there."""
    schedule, p, m = size
    sends, overlap = mode
    costs = Costs(1, 1.5, 0.5, 2.0 if slow_network else 0.25)
    try:
        run = simulate(schedule(p, m), costs, sends, overlap=overlap, cores=cores)
    except Deadlock:
        return
    edges = sorted({t for s in run.spans for t in (s.start, s.end)})
    got = dict.fromkeys(run.spans, 0.0)
    for start, end in pairwise(edges):
        if end - start < 1e-9:
            continue
        active = [s for s in run.spans if s.start < (start + end) / 2 < s.end]
        for s in active:
            got[s] += (end - start) * min(1, cores / len(active))
    for s, work in got.items():
        cost = s.action if s.action.op not in RECEIVES else partner(s.action)
        assert work == pytest.approx(costs(cost), abs=1e-6), s
    if overlap:  # the other simulator finds the same run, if it is told how long each action took
        took = {s.action: s.end - s.start for s in run.spans}
        for key, times in reference(schedule(p, m), lambda a: took.get(a, costs.communication), sends).items():
            assert spans_of(run)[key] == pytest.approx(times, abs=1e-6), key


@given(every, st.floats(0.1, 1))
def test_one_core_or_less_is_never_idle_where_messages_take_no_time(size, cores):
    schedule, p, m = size
    run = simulate(schedule(p, m), UNEVEN_FREE, cores=cores)
    work = sum(UNEVEN_FREE(s.action) for s in run.spans)
    assert run.end == pytest.approx(work / cores)


UNEVEN_FREE = Costs(uneven, uneven, uneven)


@pytest.mark.parametrize("cores", [0, -1, float("nan")])
def test_no_cores_are_refused(cores):
    with pytest.raises(ValueError, match="more than 0"):
        simulate(gpipe(2, 2), cores=cores)


def test_other_sends_are_refused():
    with pytest.raises(ValueError, match='"buffered" or "rendezvous"'):
        simulate(gpipe(2, 2), sends="blocking")


# -- deadlocks -----------------------------------------------------------------------------------------------------


def order(*programs):
    """A schedule from a line of names a rank: F0 of the stage with the rank's number, F0.3 of stage 3."""

    def action(rank, name):
        microbatch, _, stage = name[1:].partition(".")
        return Action(Op(name[0]), int(stage or rank), int(microbatch))

    return [[action(rank, name) for name in line.split()] for rank, line in enumerate(programs)]


DEADLOCKS = {
    "two ranks": (
        order("F0 B0 F1 B1", "F0 F1 B0 B1"),
        "buffered",
        "rank 0 waits for rank 1, which waits for rank 0",
        [
            "rank 0 waits at B0 (stage 0) for B0 of stage 1, rank 1",
            "rank 1 waits at F1 (stage 1) for F1 of stage 0, rank 0",
        ],
    ),
    "a ring of three": (
        order("F0.3 F0", "F0", "F0"),
        "buffered",
        "rank 0 waits for rank 2, which waits for rank 1, which waits for rank 0",
        [
            "rank 0 waits at F0 (stage 3) for F0 of stage 2, rank 2",
            "rank 2 waits at F0 (stage 2) for F0 of stage 1, rank 1",
            "rank 1 waits at F0 (stage 1) for F0 of stage 0, rank 0",
        ],
    ),
    "who waits for the cycle": (
        order("F0 F1 B0 B1", "F0 B0 F1 B1", "F0 F1 B0 B1"),
        "buffered",
        "rank 1 waits for rank 2, which waits for rank 1",
        [
            "rank 1 waits at B0 (stage 1) for B0 of stage 2, rank 2",
            "rank 2 waits at F1 (stage 2) for F1 of stage 1, rank 1",
            "behind: rank 0",
        ],
    ),
    "a rank that never sends": (
        order("F0", "F0 F1"),
        "buffered",
        "rank 1 waits for rank 0, which has come to the end of its list",
        ["rank 1 waits at F1 (stage 1) for F1 of stage 0, rank 0"],
    ),
    "a stage that nobody has": (
        order("F0", "F0.2"),
        "buffered",
        "rank 1 waits for no rank",
        ["rank 1 waits at F0 (stage 2) for F0 of stage 1, no rank"],
    ),
    "its own list": (
        order("F0 B0", "B0 F0"),
        "buffered",
        "rank 1 waits for itself",
        ["rank 1 waits at B0 (stage 1) for F0 of stage 1, which its own list does not have before", "behind: rank 0"],
    ),
    "sends that meet": (
        one_f_one_b(2, 2),
        "rendezvous",
        "rank 0 waits for rank 1, which waits for rank 0",
        [
            "rank 0 waits in send x of microbatch 1 (stage 0) for rank 1",
            "rank 1 waits in send g of microbatch 0 (stage 1) for rank 0",
        ],
    ),
    "a send to a rank that is done": (
        order("F0 F1", "F0"),
        "rendezvous",
        "rank 0 waits for rank 1, which has come to the end of its list",
        ["rank 0 waits in send x of microbatch 1 (stage 0) for rank 1"],
    ),
}


@pytest.mark.parametrize("what", DEADLOCKS)
@pytest.mark.parametrize("cores", [None, 1])
def test_a_deadlock_names_its_cycle_or_who_never_comes(what, cores):
    schedule, sends, cycle, waits = DEADLOCKS[what]
    with pytest.raises(Deadlock) as report:
        simulate(schedule, sends=sends, cores=cores)
    assert str(report.value).splitlines() == [f"deadlock: {cycle}", *waits]


def test_whole_and_split_backwards_may_be_mixed():
    """What waits for the gradient of a stage's input finds it, whether a B or an I gives it."""
    for program in ("F0.0 F0.1 B0.1 I0.0 W0.0", "F0.0 F0.1 I0.1 B0.0 W0.1"):
        assert simulate(order(program)).end == 6
    assert simulate(order("F0 I0 W0", "F0 B0")).end == 6


# -- memory --------------------------------------------------------------------------------------------------------


@given(every, st.one_of(st.none(), st.floats(0.3, 4)))
def test_the_most_that_a_rank_holds_is_its_microbatches_in_flight(size, cores):
    schedule, p, m = size
    run = simulate(schedule(p, m), UNEVEN, cores=cores)
    held = memory(run)
    assert peak(held) == {rank: in_flight(program) for rank, program in enumerate(schedule(p, m))}
    for steps in held.values():
        assert steps[0] == (0, 0) and steps[-1][1] == 0  # all is given back
        assert all(a[0] <= b[0] and abs(a[1] - b[1]) == 1 for a, b in pairwise(steps))
    bytes_of = memory(run, activation=lambda a: 100 + a.stage, base=lambda rank: 1000 * rank)
    for rank, program in enumerate(schedule(p, m)):
        now = most = 0
        for a in program:
            now += {Op.F: 1, Op.B: -1, Op.W: -1}.get(a.op, 0) * (100 + a.stage)
            most = max(most, now)
        assert peak(bytes_of)[rank] == 1000 * rank + most


def test_memory_is_held_from_the_start_of_f_to_the_end_of_the_backward():
    assert memory(simulate(one_f_one_b(2, 2), Costs(1, 1, 1)), activation=8, base=100) == {
        0: [(0, 100), (0, 108), (1, 116), (6, 108), (9, 100)],
        1: [(0, 100), (1, 108), (4, 100), (4, 108), (7, 100)],
    }


def test_a_split_backward_holds_a_microbatch_until_its_weight_gradient_is_done():
    run = simulate(zero_bubble_h1(1, 1), Costs(1, 1, 1))
    assert memory(run) == {0: [(0, 0), (0, 1), (3, 0)]}


# -- speed ---------------------------------------------------------------------------------------------------------


def seconds_of(schedule, microbatches, costs):
    """Of the processor: others may use it, too. What was there before is kept out of the garbage collector's way."""
    run = schedule(64, microbatches)
    gc.collect()
    start = time.process_time()
    simulate(run, costs)
    return time.process_time() - start


def test_64_stages_and_1024_microbatches_of_three_actions_take_less_than_two_seconds():
    assert min(seconds_of(zero_bubble_h1, 1024, Costs(1, 1, 1, 0.1)) for _ in range(3)) < 2


@pytest.mark.parametrize("costs", [Costs(1, 1, 1, 0.1), UNEVEN], ids=["numbers", "functions"])
def test_the_time_of_a_simulation_grows_as_the_actions_do(costs):
    ratios = []
    for _ in range(5):  # one after the other, so that a busy moment of the machine meets both
        few, many = (seconds_of(zero_bubble_h1, microbatches, costs) for microbatches in (96, 384))
        ratios.append(many / few)
    assert statistics.median(ratios) < 6, ratios  # 4 times the actions
