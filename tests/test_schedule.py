"""Schedules are complete and correct data, and simulating them gives the closed forms."""

import time
from functools import partial
from itertools import pairwise, product

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from minipar import (
    Costs,
    Mesh,
    bubble,
    gpipe,
    interleaved,
    one_f_one_b,
    parallelize,
    simulate,
    zero_bubble_h1,
    zero_bubble_h2,
    zero_bubble_v,
)
from minipar.model import Config, gpt
from minipar.schedule import COMPUTE, Action, Op, check, communicate, depends_on, forward_only, in_flight, owners
from minipar.timeline import Deadlock

SCHEDULES = [gpipe, one_f_one_b]
CHUNKED = {interleaved: 2, partial(interleaved, chunks=3): 3, zero_bubble_v: 2}  # -> stages of a rank
SPLIT = [zero_bubble_h1, zero_bubble_h2, zero_bubble_v]
EVERY = [*SCHEDULES, *CHUNKED, *SPLIT[:2]]
sizes = st.tuples(st.sampled_from(SCHEDULES), st.integers(1, 9), st.integers(1, 12))
every = st.tuples(st.sampled_from(EVERY), st.integers(1, 9), st.integers(1, 12))
seconds = st.floats(0.01, 100)


def stages_of(schedule, ranks):
    return ranks * CHUNKED.get(schedule, 1)


@given(every)
def test_every_schedule_is_complete_and_in_order(size):
    schedule, ranks, microbatches = size
    order, stages = schedule(ranks, microbatches), stages_of(schedule, ranks)
    assert len(order) == ranks
    check(order, microbatches)
    ops = (Op.F, Op.I, Op.W) if schedule in SPLIT else (Op.F, Op.B)
    everything = sorted(Action(op, s, m) for op, s, m in product(ops, range(stages), range(microbatches)))
    assert sorted(action for program in order for action in program) == everything


def test_the_v_turns_at_the_last_rank_and_interleaved_stages_go_around():
    assert owners(zero_bubble_v(3, 4)) == {0: 0, 1: 1, 2: 2, 3: 2, 4: 1, 5: 0}
    assert owners(interleaved(3, 4)) == {0: 0, 1: 1, 2: 2, 3: 0, 4: 1, 5: 2}


@given(every, seconds, seconds, seconds, st.floats(0, 10))
def test_nothing_starts_before_what_it_needs(size, forward, backward_input, backward_weight, communication):
    schedule, ranks, microbatches = size
    costs = Costs(forward, backward_input, backward_weight, communication)
    order = schedule(ranks, microbatches)
    timeline, owner = simulate(order, costs), owners(order)
    ended = {s.action: s.end for s in timeline.spans}
    ended |= {a._replace(op=Op.I): end for a, end in ended.items() if a.op == Op.B}
    for s in timeline.spans:
        for needed in depends_on(s.action, max(owner)):
            latency = communication if owner[needed.stage] != s.rank else 0
            assert s.start >= ended[needed._replace(op=Op.I) if needed.op == Op.B else needed] + latency
    for rank in timeline.ranks:  # a rank does one thing at a time, in the order of its program
        own = timeline.of(rank)
        assert [s.action for s in own] == order[rank]
        assert all(a.end <= b.start for a, b in pairwise(own))


@given(sizes, seconds, seconds, seconds)
def test_with_free_communication_the_bubble_is_the_closed_form(size, forward, backward_input, backward_weight):
    """(p-1)/(m+p-1) of the run, whatever forward and backward cost (Narayanan et al. 2021)."""
    schedule, p, m = size
    timeline = simulate(schedule(p, m), Costs(forward, backward_input, backward_weight))
    one = forward + backward_input + backward_weight
    assert timeline.end == pytest.approx((m + p - 1) * one)
    assert bubble(timeline) == pytest.approx((p - 1) / (m + p - 1), abs=1e-9)


@given(sizes)
def test_the_bubble_of_a_stage_is_that_of_the_longest_one(size):
    """The convention of Qi et al. 2023: from a rank's own first start to its own last end."""
    schedule, p, m = size
    timeline = simulate(schedule(p, m), Costs(1, 1, 1))
    assert bubble(timeline, of="stage") == pytest.approx((p - 1) / (m + p - 1))  # the first rank waits the longest


@given(st.integers(1, 9), st.integers(1, 12))
def test_gpipe_holds_all_microbatches_and_1f1b_as_many_as_stages_follow(p, m):
    assert [in_flight(program) for program in gpipe(p, m)] == [m] * p
    assert [in_flight(program) for program in one_f_one_b(p, m)] == [min(m, p - r) for r in range(p)]


@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 4), seconds, seconds)
def test_interleaving_divides_the_bubble_by_the_chunks(p, groups, v, forward, backward):
    """(p-1)/(vm) of the work, where p divides m (Narayanan et al. 2021). Costs are of a chunk."""
    m = p * groups
    order = interleaved(p, m, chunks=v)
    timeline = simulate(order, Costs(forward, backward, 0))
    work = m * v * (forward + backward)
    assert timeline.end - work == pytest.approx((p - 1) * (forward + backward), rel=1e-6, abs=1e-6 * work)
    assert [in_flight(program) for program in order] == [
        min(m * v, 2 * (p - r - 1) + (v - 1) * p + 1) for r in range(p)
    ]


@given(st.integers(1, 8), st.integers(0, 9), seconds, seconds, seconds)
def test_split_backwards_fill_the_bubble_as_the_paper_says(p, more, f, i, w):
    """(p-1)(F+I-W) and (p-1)(F+I-2W) by a rank's own span (Qi et al. 2023, Zero Bubble Pipeline Parallelism), where
    weight gradients fit into the time that is left for them."""
    w = min(w, f, i)
    m = 2 * p - 1 + more
    for schedule, held, gap in ((zero_bubble_h1, p, f + i - w), (zero_bubble_h2, 2 * p - 1, f + i - 2 * w)):
        order = schedule(p, m)
        timeline = simulate(order, Costs(f, i, w))
        longest = max(own[-1].end - own[0].start for own in map(timeline.of, timeline.ranks))
        assert longest - m * (f + i + w) == pytest.approx((p - 1) * gap, rel=1e-6, abs=1e-6 * m * (f + i + w))
        assert [in_flight(program) for program in order] == [min(m, held)] * p


@given(st.integers(1, 8), st.integers(0, 9))
def test_the_v_has_no_bubble_where_all_three_take_as_long_and_holds_as_much_as_1f1b(p, more):
    order = zero_bubble_v(p, 2 * p - 1 + more)
    assert bubble(simulate(order, Costs(1, 1, 1)), of="stage") == pytest.approx(0)
    assert [in_flight(program) for program in order] == [2 * p] * p or p == 1  # halves of 1F1B's stages


def test_with_latency_1f1b_waits_longer_than_gpipe():
    """8 stages, 24 microbatches, F 1, B 2, latency 0.1.

    GPipe fills and drains: (m+p-1)·3 and 2(p-1) crossings. In 1F1B's steady phase the last stages go back and forth
    over each boundary, and those crossings add up.
    """
    costs = Costs(forward=1, backward_input=1, backward_weight=1, communication=0.1)
    assert simulate(gpipe(8, 24), costs).end == pytest.approx(94.4)
    assert simulate(one_f_one_b(8, 24), costs).end == pytest.approx(98.4)


def test_costs_may_depend_on_the_action():
    slow = simulate(
        gpipe(2, 3), Costs(forward=lambda a: 5.0 if a.stage == 1 else 1.0, backward_input=2, backward_weight=3)
    )
    length = {(s.action.op, s.action.stage): s.end - s.start for s in slow.spans}
    assert length == {(Op.F, 0): 1, (Op.F, 1): 5, (Op.B, 0): 5, (Op.B, 1): 5}


# Communication.


@given(every, st.integers(0, 3))
@example((one_f_one_b, 3, 1), 0)
def test_each_send_has_one_receive_on_the_neighbor(size, ahead):
    schedule, ranks, microbatches = size
    order = schedule(ranks, microbatches)
    program, owner = communicate(order, ahead), owners(order)
    have = [set(actions) for actions in program]
    assert [len(actions) for actions in program] == [len(s) for s in have]
    last = max(owner)
    for s, rank in owner.items():
        above, below = s > 0 and owner[s - 1] != rank, s < last and owner[s + 1] != rank
        expected = {
            Op.SEND_ACTIVATION: below,
            Op.PASS_ACTIVATION: s < last and not below,
            Op.RECV_ACTIVATION: above,
            Op.SEND_GRADIENT: above,
            Op.PASS_GRADIENT: s > 0 and not above,
            Op.RECV_GRADIENT: below,
            Op.LOAD: s == 0,
            Op.LOSS: s == last,
        }
        for op, m in product(expected, range(microbatches)):
            assert (Action(op, s, m) in have[rank]) == expected[op]


@given(every, st.integers(0, 3))
def test_communication_stands_where_it_must(size, ahead):
    """A receive before its computation, a send behind it; computations keep their order; REDUCE stands once a stage,
    before the computation that makes its gradients final."""
    schedule, ranks, microbatches = size
    backward, final = (Op.I, Op.W) if schedule in SPLIT else (Op.B, Op.B)
    order = schedule(ranks, microbatches)
    for plain, program in zip(order, communicate(order, ahead), strict=True):
        assert [a for a in program if a.op in COMPUTE] == plain
        at = {action: i for i, action in enumerate(program)}
        computed = [a for a in program if a.op in COMPUTE]
        for action, i in at.items():
            forth, back = (at[action._replace(op=op)] for op in (Op.F, backward))
            if action.op in (Op.LOAD, Op.RECV_ACTIVATION):
                assert i < forth
                between = [a for a in program[i:forth] if a.op in COMPUTE]
                assert len(between) == min(ahead, computed.index(action._replace(op=Op.F)))
            elif action.op == Op.RECV_GRADIENT:
                assert i < back
            elif action.op in (Op.SEND_ACTIVATION, Op.PASS_ACTIVATION, Op.LOSS):
                assert forth < i < back
            elif action.op in (Op.SEND_GRADIENT, Op.PASS_GRADIENT):
                assert back < i
        for stage in {a.stage for a in plain}:
            (reduce,) = [i for i, a in enumerate(program) if a.op == Op.REDUCE and a.stage == stage]
            assert len([a for a in program[reduce:] if a.op == final and a.stage == stage]) == 1


def test_inference_takes_one_microbatch_through_the_same_stages():
    program = communicate(forward_only(zero_bubble_v(2, 3)))
    assert [[f"{a.op} of {a.stage}" for a in actions] for actions in program] == [
        ["load of 0", "recv x of 3", "F of 0", "send x of 0", "F of 3", "loss of 3"],
        ["recv x of 1", "F of 1", "pass x of 1", "F of 2", "send x of 2"],
    ]


# Deadlock.


@given(every)
def test_with_buffered_sends_there_is_no_deadlock(size):
    schedule, ranks, microbatches = size
    backward = 2 if schedule in SPLIT else 1
    spans = simulate(schedule(ranks, microbatches)).spans
    assert len(spans) == (1 + backward) * stages_of(schedule, ranks) * microbatches


@given(sizes)
def test_with_rendezvous_sends_1f1b_deadlocks_and_gpipe_does_not(size):
    """Two neighbors in the steady phase both begin with a send: F down and B up, each waiting for the other."""
    schedule, stages, microbatches = size
    order = schedule(stages, microbatches)
    if schedule is one_f_one_b and stages >= 2 and microbatches >= 2:
        with pytest.raises(Deadlock):
            simulate(order, sends="rendezvous")
    else:
        timeline = simulate(order, sends="rendezvous")
        assert len(timeline.spans) == 2 * stages * microbatches


@given(st.integers(1, 6), st.integers(1, 8), seconds, seconds, st.floats(0, 3))
def test_a_rendezvous_is_never_quicker_than_a_buffer(stages, microbatches, forward, backward, communication):
    order, costs = gpipe(stages, microbatches), Costs(forward, backward, backward, communication)
    buffered, rendezvous = (simulate(order, costs, sends=sends).end for sends in ("buffered", "rendezvous"))
    assert rendezvous >= buffered - 1e-9
    if communication == 0 and microbatches == 1:
        assert rendezvous == pytest.approx(buffered)


def test_a_deadlock_names_who_waits_for_what():
    order = one_f_one_b(2, 2)
    with pytest.raises(Deadlock) as report:
        simulate(order, sends="rendezvous")
    lines = str(report.value).splitlines()[1:]
    assert len(lines) == 2
    assert all(line.startswith(f"rank {rank} waits in send") for rank, line in enumerate(lines))


# What check refuses.


def broken(kind):
    order = one_f_one_b(3, 4)
    first = order[1]
    if kind == "repeats":
        first.append(first[-1])
    elif kind == "leaves out":
        first.remove(Action(Op.B, 1, 2))
    elif kind == "belongs to no microbatch":
        first.append(Action(Op.F, 1, 4))
    elif kind == "before":
        first.insert(0, first.pop(first.index(Action(Op.B, 1, 0))))
    elif kind == "on rank":
        order[2].append(first.pop())
    elif kind == "in another order":
        i, j = (first.index(Action(Op.F, 1, m)) for m in (0, 1))
        first[i], first[j] = first[j], first[i]
        i, j = (first.index(Action(Op.B, 1, m)) for m in (0, 1))
        first[i], first[j] = first[j], first[i]
    elif kind == "of I in another order":
        order = zero_bubble_h1(3, 4)
        i, j = (order[1].index(Action(Op.I, 1, m)) for m in (2, 3))
        order[1][i], order[1][j] = order[1][j], order[1][i]
        order[1] = sorted(order[1], key=lambda a: a.op == Op.W)  # what a weight gradient needs still comes before it
    elif kind == "of B in another order":
        order = gpipe(3, 4)
        i, j = (order[1].index(Action(Op.B, 1, m)) for m in (0, 1))
        order[1][i], order[1][j] = order[1][j], order[1][i]
    return order


@pytest.mark.parametrize(
    "kind",
    [
        "repeats",
        "leaves out",
        "belongs to no microbatch",
        "before",
        "on rank",
        "in another order",
        "of B in another order",
        "of I in another order",
    ],
)
def test_a_schedule_that_is_wrong_is_refused(kind):
    with pytest.raises(ValueError, match=kind) as report:
        check(broken(kind), 4)
    assert "\n" not in str(report.value)


@given(sizes, st.data())
def test_any_missing_or_repeated_action_is_refused(size, data):
    schedule, stages, microbatches = size
    order = schedule(stages, microbatches)
    stage = data.draw(st.integers(0, stages - 1))
    i = data.draw(st.integers(0, 2 * microbatches - 1))
    if data.draw(st.booleans()):
        order[stage].insert(i, order[stage][i])
    else:
        del order[stage][i]
    with pytest.raises(ValueError):
        check(order, microbatches)


def test_owners_say_which_rank_has_a_stage():
    assert owners(gpipe(3, 2)) == {0: 0, 1: 1, 2: 2}
    assert owners([[Action(Op.F, 2, 0), Action(Op.F, 0, 0)], [Action(Op.F, 1, 0)]]) == {0: 0, 1: 1, 2: 0}


def test_simulation_is_linear_in_the_actions():
    """64 stages and 1,024 microbatches, 131,072 actions, in under 2 s of a processor that does nothing else.

    Others may use the same cores, so the best of several tries counts.
    """

    def seconds_for(microbatches):
        order, start = one_f_one_b(64, microbatches), time.process_time()
        simulate(order)
        return time.process_time() - start

    for _ in range(5):
        seconds = {microbatches: seconds_for(microbatches) for microbatches in (128, 1024)}
        if seconds[1024] < min(2, 8 * seconds[128] * 2):
            return
    raise AssertionError(f"seconds by microbatches: {seconds}")


def test_activations_and_gradients_may_take_different_times_to_travel():
    costs = Costs(communication=lambda action: {Op.SEND_ACTIVATION: 1.0, Op.SEND_GRADIENT: 5.0}[action.op])
    starts = {(span.rank, str(span.action)): span.start for span in simulate(gpipe(2, 1), costs).spans}
    assert starts == {(0, "F0"): 0, (1, "F0"): 2, (1, "B0"): 3, (0, "B0"): 10}


# The executor holds what the schedule says.


@pytest.mark.parametrize("schedule", EVERY, ids=lambda s: getattr(s, "__name__", "interleaved, 3 chunks"))
@pytest.mark.parametrize("microbatches", [2, 6])
def test_a_rank_holds_as_many_microbatches_as_the_schedule_says(world4, schedule, microbatches):
    held = [in_flight(program) for program in schedule(4, microbatches)]
    assert world4.run(most_held, schedule, microbatches) == held


def most_held(schedule, microbatches):
    """The largest number of microbatches of which a rank's executor held something for backward during a step."""
    tokens = torch.arange(64).view(8, 8)
    parallel = parallelize(
        gpt(Config(vocab=64, depth=12, width=8, heads=2)), Mesh(pp=4), schedule=schedule, microbatches=microbatches
    )
    executor, most = parallel.executor, 0
    do = dict(executor.DO)

    def counting(op):
        def action(self, action):
            nonlocal most
            do[op](self, action)
            most = max(most, len(self.weights))

        return action

    executor.DO = {op: counting(op) for op in do}
    parallel.step(tokens, tokens)
    assert not executor.outputs and not executor.gradients and not executor.posted and not executor.weights
    assert not any(state is not None for state in executor.states.values())
    return most
