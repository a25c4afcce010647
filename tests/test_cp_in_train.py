"""A mesh with a context axis gives the gradients and the logits of one process."""

import pytest
from laws import batch_of, model_of, problems

import minipar
from minipar import Config, Mesh

SHAPE = {"vocab": 19, "context": 16, "depth": 4, "width": 16, "heads": 4}
LAYOUTS = {
    "world4": [
        {"mesh": Mesh(cp=4)},
        {"mesh": Mesh(dp=2, cp=2)},
        {"mesh": Mesh(pp=2, cp=2), "microbatches": 2},
        {"mesh": Mesh(pp=2, cp=2), "microbatches": 4, "schedule": minipar.zero_bubble_v},
        {"mesh": Mesh(cp=2, tp=2)},
        {"mesh": Mesh(cp=2, tp=2), "sequence_parallel": True},
    ],
    "world8": [
        {"mesh": Mesh(dp=2, pp=2, cp=2), "microbatches": 2},
        {"mesh": Mesh(pp=2, cp=2, tp=2), "microbatches": 2, "sequence_parallel": True},
        {"mesh": Mesh(cp=4, tp=2)},
        {"mesh": Mesh(dp=2, cp=4)},
        {"mesh": Mesh(dp=2, cp=2, tp=2), "sequence_parallel": True},
    ],
}


@pytest.mark.parametrize("tied", [False, True], ids=["plain", "tied"])
@pytest.mark.parametrize("world", LAYOUTS)
def test_every_layout_gives_the_gradients_of_one_process(request, world, tied):
    config = Config(**SHAPE, tied=tied)
    layouts = LAYOUTS[world]
    assert problems(request.getfixturevalue(world), layouts, lambda: model_of(config), *batch_of(config, 8, 16)) == []


def test_forward_and_generate_give_what_data_ranks_give(world4):
    def compared():
        config = Config(**SHAPE)
        model, (tokens, _) = model_of(config), batch_of(config, 8, 16)
        here, there = (minipar.parallelize(model, mesh) for mesh in (Mesh(dp=2, cp=2), Mesh(dp=4)))
        apart = (here(tokens) - model(tokens)).abs().max().item()
        return apart, here.generate(tokens[:2, :5], 4).equal(there.generate(tokens[:2, :5], 4))

    for apart, same in world4.run(compared):
        assert apart <= 1e-12 and same
