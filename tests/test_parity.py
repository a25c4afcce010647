"""Every layout of a model computes what one process computes: the same loss, gradients, step."""

import sys
from functools import cache
from itertools import product

import cloudpickle
import pytest
from laws import Case, alone, batch_of, broken_laws, laid_out, model_of

from minipar import Config, Mesh, World, gpipe, one_f_one_b

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # ranks need not import pytest

MESHES = [Mesh(dp=dp, pp=pp, tp=tp) for dp, pp, tp in product(range(1, 9), repeat=3) if dp * pp * tp <= 8]
MICROBATCHES = {1: 2, 2: 3, 3: 4}  # by pp: enough that 1F1B has a steady phase; deeper pipelines get 3


def case_of(mesh, schedule, sequence, tied):
    """Uneven wherever the law allows it: vocabulary over tp, blocks over pp, rows over dp and microbatches."""
    heads = mesh.tp * (2 if mesh.tp in (1, 2, 3) else 1)
    config = Config(vocab=37, context=12, depth=min(mesh.pp + 1, 8), width=4 * heads, heads=heads, tied=tied)
    microbatches = MICROBATCHES.get(mesh.pp, 3)
    length = {4: 8, 5: 5, 7: 7, 8: 8}.get(mesh.tp, 6)
    return Case(mesh, config, schedule, microbatches, sequence, rows=mesh.dp * microbatches + 1, length=length)


@cache
def one_process(config, rows, length):
    return alone(model_of(config), *batch_of(config, rows, length))


def on_a_rank(cases, wanted):
    found = []
    for case, answer in zip(cases, wanted, strict=True):
        model = model_of(case.config)
        parallel = case.lay_out(model)
        got = laid_out(parallel, *batch_of(case.config, case.rows, case.length))
        found.append(broken_laws(parallel, got, answer, dict(model.named_parameters())))
    return found


@cache
def every_layout(ranks):
    """Law -> the cases that break it, over all ranks and all layouts of so many ranks."""
    cases = [
        case_of(mesh, *choice)
        for mesh in MESHES
        if mesh.size == ranks
        for choice in product([gpipe, one_f_one_b], [False, True], [False, True])
    ]
    wanted = [one_process(case.config, case.rows, case.length) for case in cases]
    with World(ranks) as world:
        found = world.run(on_a_rank, cases, wanted)
    broken = {"loss": [], "gradients": [], "step": []}
    for rank, problems in enumerate(found):
        for case, laws in zip(cases, problems, strict=True):
            for law, what in laws.items():
                broken[law].append(f"{case}, rank {rank}: {what}")
    return broken


@pytest.mark.parametrize("ranks", range(1, 9))
def test_every_layout_gives_the_gradients_of_one_process(ranks):
    assert every_layout(ranks)["gradients"] == []


@pytest.mark.parametrize("ranks", range(1, 9))
def test_every_layout_gives_the_loss_of_one_process(ranks):
    assert every_layout(ranks)["loss"] == []


@pytest.mark.parametrize("ranks", range(1, 9))
def test_every_layout_makes_the_step_of_one_process(ranks):
    assert every_layout(ranks)["step"] == []


def test_these_are_all_the_layouts():
    assert len(MESHES) == len(set(MESHES)) == 38
