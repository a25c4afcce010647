"""What a calibration makes of its measurements is exact; what it measures is about right, on however busy a machine."""

from dataclasses import replace
from itertools import product

import pytest

from minipar import Config, Mesh
from minipar import calibration as cal
from minipar.calibration import Comparison
from minipar.cost import FP32, Layout, traffic
from minipar.machine import Heard, Machine, Observations, Piece, Sizes, Talk, fit, load_machine, reduction, sizes
from minipar.rank import cores
from minipar.transformer import from_config

CONFIG = Config(depth=8, width=256, heads=8)
MODEL = from_config(CONFIG)
TRUTH = Machine(
    MODEL,
    cores=2,
    forward=Sizes(1e-3, 2e-4, 3e-10, 2e-11, 4e-9),
    backward_input=Sizes(5e-4, 3e-4, 5e-10, 2.5e-11, 2e-9),
    backward_weight=Sizes(0.0, 1e-4, 1e-10, 1.8e-11, 0.0),
    crowd={1: 1.1, 2: 1.0, 4: 1.05, 8: 1.2},
    crowd_effort={1: 1.05, 2: 1.0, 4: 1.02, 8: 1.1},
    talk={2: Talk(6e-4, 3e-4, 1e-9), 4: Talk(3e-3, 1e-3, 1.6e-9), 8: Talk(6e-3, 1.2e-3, 3e-9)},
    talk_effort={2: Talk(5e-4, 2e-4, 8e-10), 4: Talk(1e-3, 3e-4, 7e-10), 8: Talk(1e-3, 2e-4, 6e-10)},
    overlap=0.4,
)
NOTHING = dict.fromkeys(TRUTH.talk, Talk(0.0, 0.0, 0.0))
SAME = dict.fromkeys(TRUTH.crowd, 1.0)
FREE = replace(TRUTH, crowd=SAME, crowd_effort=SAME, talk=NOTHING, talk_effort=NOTHING)
IDLE = Sizes(0.0, 0.0, 0.0, 0.0, 0.0)
# A second for each byte, and nothing else takes time.
A_BYTE = dict.fromkeys(TRUTH.talk, Talk(0.0, 0.0, 1.0))
BYTES = replace(FREE, cores=8, forward=IDLE, backward_input=IDLE, backward_weight=IDLE, talk=A_BYTE, overlap=0.0)


def observations(truth: Machine) -> Observations:
    """What would be measured on a machine with these numbers, without noise."""
    pieces = []
    for tp, blocks, rows in product((1, 4), (1, 8), (2, 8)):
        tokens = rows * CONFIG.context
        counted = sizes(MODEL, blocks, True, tokens, tokens, CONFIG.context, tp)
        parts = truth.forward, truth.backward_input, truth.backward_weight
        seconds = tuple(sum(a * b for a, b in zip(part, counted, strict=True)) for part in parts)
        pieces.append(Piece(tp, blocks, rows, seconds))
    crowds = {n: (0.2 * x * max(1, n / truth.cores), 0.1 * truth.crowd_effort[n]) for n, x in truth.crowd.items()}
    talks = []
    for ranks, line, size in product(truth.talk, (2, 4, 8), (1e4, 1e6)):
        talk = reduction(size, line)
        took = (
            sum(a * b for a, b in zip(table[ranks], talk, strict=True)) for table in (truth.talk, truth.talk_effort)
        )
        talks.append(Heard(ranks, talk, *took))
    layout = Layout(Mesh(dp=2))
    return Observations(MODEL, truth.cores, pieces, crowds, talks, (layout, 16, truth.step_seconds(layout, 16)))


def numbers(machine: Machine) -> list[float]:
    """Everything that is fitted."""
    parts = machine.forward, machine.backward_input, machine.backward_weight
    talks = [*machine.talk.values(), *machine.talk_effort.values()]
    return [
        x for numbers in (*parts, *talks, machine.crowd.values(), machine.crowd_effort.values()) for x in numbers
    ] + [machine.overlap]


# -- without a clock -----------------------------------------------------------------------------------------------


def test_a_machine_whose_truth_is_known_is_found():
    found = fit(observations(TRUTH))
    assert numbers(found) == pytest.approx(numbers(TRUTH), rel=1e-6, abs=1e-15)
    for layout in (Layout(Mesh(dp=4, tp=2), zero=3), Layout(Mesh(pp=4, tp=2), 8, "zero-bubble-h1")):
        assert found.step_seconds(layout, 32) == pytest.approx(TRUTH.step_seconds(layout, 32))


def test_a_number_is_never_negative():
    seen = observations(TRUTH)
    pieces = [piece._replace(seconds=tuple(s * (1 + 0.1 * (-1) ** i) for s in piece.seconds)) for i, piece in
              enumerate(seen.pieces)]  # fmt: skip
    assert min(numbers(fit(replace(seen, pieces=pieces)))) >= 0


def test_a_machine_is_saved_and_loaded(tmp_path):
    TRUTH.save(tmp_path / "machine.json")
    assert load_machine(tmp_path / "machine.json") == TRUTH
    assert "40%" in str(TRUTH) and "1.20" in str(TRUTH)


def test_one_rank_takes_the_sum_of_its_parts():
    tokens = 4 * CONFIG.context
    counted = sizes(MODEL, 8, True, tokens, tokens, CONFIG.context, tp=1)
    parts = TRUTH.forward, TRUTH.backward_input, TRUTH.backward_weight
    one = sum(a * b for part in parts for a, b in zip(part, counted, strict=True))
    assert TRUTH.step_seconds(Layout(Mesh(), 4), 16) == pytest.approx(4 * one * TRUTH.crowd[1])


def test_ranks_beyond_the_cores_gain_nothing():
    """Of data ranks each has the same work, and the cores are shared. Two cores do it in half the time of one."""
    fixed = Sizes(0.0, 0.0, 3e-10, 2e-11, 4e-9)  # nothing that a smaller microbatch does not make smaller
    free = replace(FREE, forward=fixed, backward_input=fixed, backward_weight=fixed)
    one, two, eight = (free.step_seconds(Layout(Mesh(dp=n)), 16) for n in (1, 2, 8))
    assert one == pytest.approx(2 * two) and two == pytest.approx(eight)


def test_a_bubble_is_filled_by_ranks_that_wait_for_a_core():
    """Four stages on four cores idle for three sevenths of the run. Two cores do it in less than twice the time."""
    layout = Layout(Mesh(pp=4), microbatches=4)
    two, four, many = (replace(FREE, cores=n).step_seconds(layout, 16) for n in (2, 4, 64))
    assert four == pytest.approx(many)
    assert 1.05 * four < two < 1.6 * four


def test_only_the_work_of_talk_counts_where_other_stages_compute_meanwhile():
    alone, piped = Layout(Mesh(tp=4)), Layout(Mesh(pp=2, tp=2), microbatches=4)
    slower = {n: Talk(*(10 * x for x in talk)) for n, talk in TRUTH.talk.items()}
    waits = replace(TRUTH, talk=slower)
    assert waits.step_seconds(alone, 16) > 1.5 * TRUTH.step_seconds(alone, 16)
    assert waits.timeline(piped, 16).end == pytest.approx(TRUTH.timeline(piped, 16).end)


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({}, {"recompute": "full"}),
        ({}, {"zero": 3}),
        ({"zero": 1}, {"zero": 2}),
        ({"zero": 2, "whole_gradients": True}, {"zero": 2}),
        ({}, {"sequence_parallel": True}),  # as many bytes in twice as many calls
    ],
)
def test_what_computes_or_sends_more_takes_longer(less, more):
    few, many = (Layout(Mesh(dp=2, pp=2, tp=2), microbatches=4, **options) for options in (less, more))
    assert TRUTH.step_seconds(few, 16) < TRUTH.step_seconds(many, 16)


def test_sequence_parallelism_cuts_norms_too():
    whole, cut = (Layout(Mesh(tp=2), sequence_parallel=sequence) for sequence in (False, True))
    assert TRUTH.step_seconds(Layout(Mesh(), sequence_parallel=True), 16) == TRUTH.step_seconds(Layout(Mesh()), 16)
    assert FREE.step_seconds(cut, 16) < FREE.step_seconds(whole, 16)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(Mesh(tp=2), 2),
        Layout(Mesh(tp=4), 1),
        Layout(Mesh(dp=2), 2),
        Layout(Mesh(dp=4), 2, zero=1),
        Layout(Mesh(dp=2), 2, zero=2),
        Layout(Mesh(dp=2), 2, zero=2, whole_gradients=True),
        Layout(Mesh(dp=2), 2, zero=3),
        Layout(Mesh(dp=2, tp=2), 2, zero=3),
    ],
    ids=cal.name,
)
def test_where_only_bytes_take_time_a_step_takes_those_that_are_counted(layout):
    """But for the sums of loss and count."""
    (sent,) = traffic(MODEL, layout, 16, CONFIG.context, FP32)
    assert 0 <= BYTES.step_seconds(layout, 16) - sum(sent.values()) <= 2 * 16


def test_between_stages_a_rank_sends_what_it_has_of_the_sequence():
    for sequence, parts in ((False, 1), (True, 2)):
        costs = BYTES.costs(Layout(Mesh(pp=2, tp=2), 2, sequence_parallel=sequence), 16)
        assert costs.communication == 4 * 8 * CONFIG.context * CONFIG.width / parts


def test_a_world_of_unknown_size_is_refused():
    with pytest.raises(ValueError, match="has 16 ranks; calibrated are 1, 2, 4, 8"):
        TRUTH.step_seconds(Layout(Mesh(dp=16)), 16)


@pytest.mark.parametrize("layout", [Layout(Mesh(cp=2)), Layout(Mesh(ep=2)), Layout(Mesh(), recompute="selective")])
def test_what_is_not_fitted_is_not_predicted(layout):
    with pytest.raises(ValueError, match="no prediction for cp, ep or selective recompute"):
        TRUTH.step_seconds(layout, 16)


def test_full_recompute_runs_the_blocks_again_and_not_the_head():
    plain, full = (Layout(Mesh(), recompute=how) for how in ("none", "full"))
    tokens = 16 * CONFIG.context
    again = sizes(MODEL, 8, False, tokens, tokens, CONFIG.context, tp=1)
    seconds = TRUTH.crowd[1] * sum(a * b for a, b in zip(TRUTH.forward, again, strict=True))
    assert TRUTH.step_seconds(full, 16) - TRUTH.step_seconds(plain, 16) == pytest.approx(seconds)


def test_a_comparison_states_its_errors():
    layouts = [Layout(Mesh(dp=2)), Layout(Mesh(pp=2), 4, "gpipe"), Layout(Mesh(tp=2), sequence_parallel=True)]
    some = Comparison(layouts, [1.1, 0.98, 2.0], [1.0, 1.0, 1.0])
    assert some.median_error == pytest.approx(0.1) and some.errors[1] == pytest.approx(-0.02)
    assert "pp=2 m=4 gpipe" in str(some) and "median 10.0%, largest 100.0%; 1 within 5%" in str(some)


# -- with one ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(cores() not in (2, 4), reason="a small model is cut for two cores or four")
def test_steps_of_this_machine_are_predicted_roughly():
    config = Config(vocab=64, context=64, depth=4, width=128, heads=4)
    machine = cal.calibrate(config, rows=8, ranks=(1, cores()))
    layouts = [Layout(Mesh(pp=cores()), 4), Layout(Mesh(tp=cores())), Layout(Mesh(dp=cores()), 2)]
    seen = cal.compare(machine, config, layouts, rows=8)
    assert all(1 / 3 < p / m < 3 for p, m in zip(seen.predicted, seen.measured, strict=True)), seen


def test_any_number_of_cores_will_do(monkeypatch):
    """Three ranks divide neither the rows nor the sizes of what is sent, and are no line of a mesh of four."""
    monkeypatch.setattr(cal, "cores", lambda: 3)
    config = Config(vocab=64, context=16, depth=2, width=16, heads=4)
    machine = cal.calibrate(config, rows=8, ranks=(3, 4))
    assert machine.step_seconds(Layout(Mesh(dp=4)), 8) > 0 and set(machine.talk) == {3, 4}
