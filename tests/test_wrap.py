"""Torch's own data parallelism around a stage gives the gradients of one process too."""

from functools import partial

import pytest
import torch
from laws import alone, batch_of, differences, model_of
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import minipar
from minipar import Config, Mesh, parallelize

SHAPE = {"vocab": 19, "context": 8, "depth": 4, "width": 16, "heads": 4}
LAYOUTS = {
    "world2": [{"mesh": Mesh(dp=2)}, {"mesh": Mesh(dp=2), "microbatches": 3}],
    "world4": [
        {"mesh": Mesh(dp=4)},
        {"mesh": Mesh(dp=2, pp=2), "microbatches": 4},
        {"mesh": Mesh(dp=2, tp=2), "sequence_parallel": True, "recompute": "full"},
    ],
    "world8": [{"mesh": Mesh(dp=2, pp=2, tp=2), "microbatches": 2, "schedule": minipar.gpipe}],
}


def sharded(stage, device_mesh):
    for block in stage.blocks:
        fully_shard(block, mesh=device_mesh["dp"])
    return fully_shard(stage, mesh=device_mesh["dp"])


def replicated(stage, device_mesh):
    return DistributedDataParallel(stage, process_group=device_mesh.get_group("dp"))


@pytest.mark.parametrize("tied", [False, True], ids=["plain", "tied"])
@pytest.mark.parametrize("wrap", [sharded, replicated])
@pytest.mark.parametrize("world", LAYOUTS)
def test_every_layout_gives_the_gradients_of_one_process(request, world, wrap, tied):
    config = Config(**SHAPE, tied=tied)
    tokens, targets = batch_of(config, 8, 8)

    def run(layout):
        parallel = parallelize(model_of(config), wrap=wrap, **layout)
        optimizer = torch.optim.SGD(parallel.parameters(), 0.5)
        loss = parallel.step(tokens, targets).item()
        gradients, norm = parallel.full_gradients(), parallel.clip_gradients(1e9).item()
        optimizer.step()
        after = parallel.full_state_dict()
        parallel.load_full_state_dict(after)
        same = all(x.equal(after[name]) for name, x in parallel.full_state_dict().items())
        shares = {isinstance(p, DTensor) for p in parallel.parameters()}
        return loss, gradients, norm, after, same, shares, parallel(tokens)

    wanted = alone(model := model_of(config), tokens, targets)
    norm = torch.cat([g.flatten() for g in wanted.gradients.values()]).norm().item()
    for layout in LAYOUTS[world]:
        for loss, gradients, total, after, same, shares, logits in request.getfixturevalue(world).run(run, layout):
            assert abs(loss - wanted.loss) <= 1e-12 * wanted.loss
            assert differences(gradients, wanted.gradients) == ""
            assert abs(total - norm) <= 1e-12 * norm
            assert all((after[name] - x).abs().max() <= 1e-12 for name, x in wanted.after.items()) and same
            assert shares == {wrap is sharded}
            assert (logits - model(tokens)).abs().max() <= 1e-12


def test_the_device_mesh_names_the_axes(world8):
    def coordinate():
        mesh = Mesh(dp=2, pp=2, tp=2)
        theirs = minipar.collectives.device_mesh(mesh)
        mine = mesh.coordinate(minipar.here().rank)
        return mine == dict(zip(theirs.mesh_dim_names, theirs.get_coordinate(), strict=True))

    assert all(world8.run(coordinate))


@pytest.mark.parametrize(
    "layout", [{"zero": 1}, {"schedule": minipar.zero_bubble_h1}, {"schedule": minipar.interleaved, "microbatches": 2}]
)
def test_what_does_not_go_together_is_refused(world2, layout):
    with pytest.raises(Exception, match="wrap needs zero=0, cp=1, ep=1 and a schedule with one stage a rank"):
        world2.run(partial(parallelize, model_of(Config(**SHAPE)), Mesh(pp=2), wrap=sharded, **layout))


def test_a_wrapper_that_leaves_parameters_out_is_refused(world2):
    def blocks_only(stage, device_mesh):
        for block in stage.blocks:
            fully_shard(block, mesh=device_mesh["dp"])

    with pytest.raises(Exception, match=r"wrap left out .*embed.token.weight, whose gradient nobody"):
        world2.run(partial(parallelize, model_of(Config(**SHAPE)), Mesh(dp=2), wrap=blocks_only))
