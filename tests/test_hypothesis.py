"""Hypothesis draws models, layouts and batches of every shape; each step is that of one process."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from laws import batch_of, model_of, problems

from minipar import Config, Mesh, gpipe, one_f_one_b


@st.composite
def cases(draw):
    """A layout on four ranks, and any model and batch that fit it."""
    dp, pp, tp = draw(st.sampled_from([(4, 1, 1), (1, 4, 1), (1, 1, 4), (2, 2, 1), (2, 1, 2), (1, 2, 2)]))
    microbatches, sequence = draw(st.integers(1, 5)), draw(st.booleans())
    layout = {
        "mesh": Mesh(dp=dp, pp=pp, tp=tp),
        "schedule": draw(st.sampled_from([gpipe, one_f_one_b])),
        "microbatches": microbatches,
        "sequence_parallel": sequence,
    }
    heads = tp * draw(st.integers(1, 2))
    length = draw(st.integers(1, 3)) * tp if sequence else draw(st.integers(1, 10))
    config = Config(
        vocab=draw(st.integers(tp, 40)),
        context=length + draw(st.integers(0, 3)),
        depth=pp + draw(st.integers(0, 3)),
        width=heads * draw(st.integers(1, 6)),
        heads=heads,
        tied=draw(st.booleans()),
    )
    rows = dp * microbatches + draw(st.integers(0, 6))
    return layout, config, rows, length


@settings(
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(case=cases())
def test_any_layout_of_any_model_makes_the_step_of_one_process(world4, case):
    layout, config, rows, length = case
    tokens, targets = batch_of(config, rows, length)
    if (targets == -100).all():
        targets = torch.zeros_like(targets)
    assert problems(world4, [layout], lambda: model_of(config), tokens, targets) == []
