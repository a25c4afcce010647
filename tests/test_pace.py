"""With `pace=` real ranks take as long as a prediction says, however few cores there are."""

import math

import pytest
import torch
from laws import batch_of, model_of

from minipar import (
    Config,
    Costs,
    Mesh,
    bubble,
    gpipe,
    interleaved,
    ledger,
    one_f_one_b,
    parallelize,
    simulate,
    zero_bubble_h1,
    zero_bubble_v,
)
from minipar.schedule import COMPUTE

CONFIG = Config(vocab=19, context=8, depth=8, width=16, heads=4)
COSTS = Costs(forward=0.03, backward_input=0.03, backward_weight=0.015)
MICROBATCHES = 6


def step_of(layout, costs):
    def work():
        parallel = parallelize(model_of(CONFIG), **layout, pace=costs)
        batch = batch_of(CONFIG, 12, 8)
        parallel.step(*batch)  # learns shapes
        with ledger() as book:
            loss = parallel.step(*batch)
        return parallel.timeline(), loss.item(), book.bytes("pp"), book.bytes("dp")

    return work


def computed(timeline):
    """What each rank computed, in order."""
    return [[s.action for s in timeline.of(rank) if s.action.op in COMPUTE] for rank in timeline.ranks]


@pytest.mark.parametrize("schedule", [gpipe, one_f_one_b, interleaved, zero_bubble_h1, zero_bubble_v])
def test_a_paced_run_has_the_timeline_that_was_predicted(world4, schedule):
    layout = {"mesh": Mesh(pp=4), "schedule": schedule, "microbatches": MICROBATCHES}
    predicted = simulate(schedule(4, MICROBATCHES), COSTS)
    for _ in range(5):  # others on the machine can only make a run longer: the first that they leave alone will do
        recorded = world4.run(step_of(layout, COSTS))[0][0]
        if recorded.end < 1.15 * predicted.end:
            break
    assert computed(predicted) == computed(recorded)
    assert predicted.end <= recorded.end < 1.15 * predicted.end
    assert abs(bubble(recorded) - bubble(predicted)) < 0.08
    for spans in zip(*(sorted(t.spans, key=lambda s: (s.rank, s.action)) for t in (predicted, recorded)), strict=True):
        assert abs(spans[0].start - spans[1].start) < 0.15 * predicted.end


@pytest.mark.parametrize("options", [{}, {"zero": 1}, {"zero": 2}, {"recompute": "full"}])
def test_a_paced_run_sends_what_a_real_one_sends_and_computes_nothing(world4, options):
    layout = {"mesh": Mesh(dp=2, pp=2), "microbatches": 2, **options}
    paced, real = (world4.run(step_of(layout, costs)) for costs in (Costs(0.001, 0.001, 0.001), None))
    for (_, loss, *sent), (_, true_loss, *wanted) in zip(paced, real, strict=True):
        assert sent == wanted and math.isnan(loss) and not math.isnan(true_loss)


def test_costs_may_differ_by_action(world2):
    """The second stage takes twice as long as the first."""
    costs = Costs(forward=lambda action: 0.02 * (1 + action.stage), backward_input=0.01, backward_weight=0.01)
    timeline = world2.run(step_of({"mesh": Mesh(pp=2), "microbatches": 2}, costs))[0][0]
    forwards = {s.rank: s.end - s.start for s in timeline.spans if s.action.op == "F"}
    assert forwards[0] == pytest.approx(0.02, rel=0.3) and forwards[1] == pytest.approx(0.04, rel=0.3)


def test_gradients_of_a_paced_step_are_zero(world2):
    def work():
        parallel = parallelize(model_of(CONFIG), Mesh(dp=2), pace=Costs(0.001, 0.001, 0.001))
        parallel.step(*batch_of(CONFIG, 4, 8))
        return [p.grad.abs().max().item() for p in parallel.parameters()]

    assert set(world2.run(work)[0]) == {0.0}


def test_a_pace_that_is_none_is_refused():
    with pytest.raises(TypeError, match=r"pace=0.1: minipar.Costs\(forward=...\), in seconds"):
        parallelize(torch.nn.Linear(1, 1), Mesh(), pace=0.1)
    for option in ({"wrap": lambda stage, mesh: stage}, {"zero": 3}):
        with pytest.raises(ValueError, match="pace does not go with wrap or zero=3"):
            parallelize(torch.nn.Linear(1, 1), Mesh(), pace=Costs(), **option)
