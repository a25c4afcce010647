"""Hypothesis draws meshes, strategies, models and batches of every shape; each step is that of one process."""

from itertools import product
from math import prod

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from laws import batch_of, model_of, problems, weighed

from minipar import Config, Mesh, gpipe, interleaved, one_f_one_b, zero_bubble_h1, zero_bubble_h2, zero_bubble_v

EXAMPLES = {1: 20, 2: 45, 3: 25, 4: 60, 6: 30, 8: 30}  # ranks -> compositions: 210 in all
CHUNKS = {interleaved: 2, zero_bubble_v: 2}  # stages a rank, else 1


def meshes(ranks):
    sizes = [n for n in range(1, ranks + 1) if ranks % n == 0]
    return [Mesh(*shape) for shape in product(sizes, repeat=5) if prod(shape) == ranks]


@st.composite
def compositions(draw, ranks):
    """A layout on so many ranks, and any model and batch that fit it."""
    mesh, microbatches, sequence = draw(st.sampled_from(meshes(ranks))), draw(st.integers(1, 5)), draw(st.booleans())
    schedules = [gpipe, one_f_one_b, interleaved, zero_bubble_h1, zero_bubble_h2, zero_bubble_v]
    layout = {
        "mesh": mesh,
        "schedule": draw(st.sampled_from(schedules)),
        "microbatches": microbatches,
        "sequence_parallel": sequence,
        "zero": draw(st.integers(0, 3)),
        "whole_gradients": draw(st.booleans()),
        "recompute": draw(st.sampled_from(["none", "selective", "full"])),
    }
    experts = mesh.ep * draw(st.integers(1, 3)) if mesh.ep > 1 else draw(st.sampled_from([0, 0, 0, 3]))
    heads = mesh.tp * draw(st.integers(1, 2))
    pieces = (2 * mesh.cp if mesh.cp > 1 else 1) * (mesh.tp if sequence else 1)
    length = pieces * draw(st.integers(1, 10 if pieces == 1 else 2))
    config = Config(
        vocab=draw(st.integers(mesh.tp, 40)),
        context=length + draw(st.integers(0, 3)),
        depth=mesh.pp * CHUNKS.get(layout["schedule"], 1) + draw(st.integers(0, 2)),
        width=heads * draw(st.integers(-(-4 // heads), 6)),  # of fewer numbers a norm's gradient is all rounding
        heads=heads,
        tied=draw(st.booleans()),
        experts=experts,
        top=draw(st.integers(1, min(3, max(1, experts)))),
        capacity=draw(st.sampled_from([0.5, 1.0, 1.5])),
        balance=0.5,
    )
    # Rows of each data rank. If they are as the step would cut them it is given the global batch, else each its own.
    local, ways = draw(st.booleans()), mesh.dp * mesh.ep
    rows = [microbatches + draw(st.integers(0, 3)) for _ in range(ways)] if local else []
    total = sum(rows) if local else ways * microbatches + draw(st.integers(0, 6))
    return layout, config, rows, total, length


def own_rows(rows):
    def prepare(parallel, tokens, targets):
        if not rows:
            return tokens, targets
        place = parallel.dp.index
        return tokens.split(rows)[place], targets.split(rows)[place], {"local": True}

    return prepare


@pytest.mark.parametrize("ranks", EXAMPLES)
def test_any_composition_makes_the_step_of_one_process(worlds, ranks):
    @settings(max_examples=EXAMPLES[ranks], suppress_health_check=[HealthCheck.too_slow])
    @given(case=compositions(ranks))
    def any_composition(case):
        layout, config, rows, total, length = case
        tokens, targets = batch_of(config, total, length)
        if (targets == -100).all():
            targets = torch.zeros_like(targets)
        model = lambda: weighed(model_of(config), targets)  # noqa: E731
        assert problems(worlds(ranks), [layout], model, tokens, targets, prepare=own_rows(rows)) == []

    any_composition()
