"""Seventeen architectures of transformers, as their users have them: same gradients as one process on every layout."""

from functools import partial

import pytest
import zoo
from laws import double_precision, mean_cross_entropy, problems
from zoo import batch, build

from minipar import Mesh

ON_TWO = [
    {"mesh": Mesh(tp=2)},
    {"mesh": Mesh(pp=2), "microbatches": 2},
    {"mesh": Mesh(dp=2)},
    *({"mesh": Mesh(dp=2), "zero": stage} for stage in (1, 2, 3)),
]
ON_FOUR = [
    {"mesh": Mesh(tp=4)},  # more than heads of keys
    {"mesh": Mesh(pp=2, tp=2), "microbatches": 2},
    {"mesh": Mesh(dp=2, tp=2), "zero": 2},
    {"mesh": Mesh(dp=2, pp=2), "microbatches": 2},
]
ON_EIGHT = [{"mesh": Mesh(dp=2, pp=2, tp=2), "microbatches": 2}]


class Precise:
    """A world whose ranks compute in float64 what these models compute in float32 on purpose."""

    def __init__(self, world):
        self.world = world

    def run(self, work, *args):
        def run():
            with double_precision():
                return work(*args)

        return self.world.run(run)


def broken(world, name, layouts, changes=None, **options):
    """How a model on these layouts breaks the laws."""
    with double_precision():
        make = partial(build, name, **(changes or {}))
        return problems(Precise(world), layouts, make, *batch(name), mean=mean_cross_entropy, **options)


@pytest.mark.parametrize("name", zoo.MODELS)
def test_on_two_ranks(world2, name):
    assert broken(world2, name, ON_TWO) == []


@pytest.mark.parametrize("name", zoo.MODELS)
def test_on_four_ranks(world4, name):
    assert broken(world4, name, ON_FOUR) == []


@pytest.mark.parametrize("name", zoo.MODELS)
def test_on_eight_ranks(world8, name):
    assert broken(world8, name, ON_EIGHT) == []
