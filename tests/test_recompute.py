"""Recompute changes what is kept, and nothing else."""

import pytest
import torch
from laws import batch_of, differences, model_of, problems
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import minipar
from minipar import Config, Mesh, World, parallelize
from minipar.schedule import zero_bubble_h1, zero_bubble_v

CONFIG = Config(vocab=19, context=8, depth=4, width=16, heads=4)
LAYOUTS = {
    "world4": [
        {"mesh": Mesh(dp=4), "zero": 3},
        {"mesh": Mesh(dp=2, tp=2), "sequence_parallel": True, "zero": 2},
        {"mesh": Mesh(pp=2, tp=2), "microbatches": 4, "schedule": zero_bubble_h1},
        {"mesh": Mesh(pp=2, cp=2), "microbatches": 2, "schedule": zero_bubble_v, "zero": 3},
        {"mesh": Mesh(cp=2, tp=2), "sequence_parallel": True},
    ],
    "world8": [{"mesh": Mesh(dp=2, pp=2, tp=2), "microbatches": 2, "zero": 3}],
}


@pytest.mark.parametrize("how", ["selective", "full"])
@pytest.mark.parametrize("world", LAYOUTS)
def test_every_layout_gives_the_gradients_of_one_process(request, world, how):
    layouts = LAYOUTS[world]
    model, batch = lambda: model_of(CONFIG), batch_of(CONFIG, 8, 8)
    assert problems(request.getfixturevalue(world), layouts, model, *batch, recompute=how) == []


class Alive(TorchDispatchMode):
    """Bytes of the tensors that were made inside of `with` and are still there, beside `weights`."""

    def __init__(self, weights):
        super().__init__()
        self.weights = {StorageWeakRef(p.untyped_storage()) for p in weights}
        self.made = {}  # storage -> bytes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, torch.Tensor) and x.is_floating_point():  # the state of a generator is of bytes
                self.made[StorageWeakRef(x.untyped_storage())] = x.untyped_storage().nbytes()
        return result

    def bytes(self):
        return sum(size for storage, size in self.made.items() if storage not in self.weights and not storage.expired())


def test_full_keeps_a_blocks_input_and_selective_less_than_everything():
    rows, length, depth = 4, 8, CONFIG.depth

    def kept(depth, how):
        config = Config(vocab=19, context=8, depth=depth, width=16, heads=4)
        parallel, found = parallelize(minipar.gpt(config), Mesh(), recompute=how), []
        alive = Alive(parallel.parameters())
        parallel.executor.prepare = parallel.executor.settle = lambda action: found.append(alive.bytes())
        with alive:
            parallel.step(*batch_of(config, rows, length))
        return found[1] - found[0]  # behind the forward, before it

    with World(1) as alone:
        block = {
            how: (alone.run(kept, 2 * depth, how)[0] - alone.run(kept, depth, how)[0]) / depth
            for how in minipar.recompute.HOW
        }
    assert block["full"] == rows * length * CONFIG.width * 4
    assert block["full"] < block["selective"] < 0.75 * block["none"], block


def test_full_sends_forwards_traffic_once_more(world2):
    """A block of tp sends 2 all-reduces forward and 2 backward. Computed again are those that backward needs something
    behind of: the first one."""

    def calls(how):
        parallel = parallelize(model_of(CONFIG), Mesh(tp=2), recompute=how)
        with minipar.ledger() as ledger:
            parallel.step(*batch_of(CONFIG, 8, 8))
        return ledger.calls("tp")

    (none, _), (full, _) = (world2.run(calls, how) for how in ("none", "full"))
    assert full - none == CONFIG.depth


def test_what_draws_by_itself_draws_the_same_again(world2):
    """Dropout that is not nn.Dropout, inside the cut region and outside of it."""
    from test_randomness import FromStreams, batch, build

    def gradients(how):
        parallel = build(FromStreams, mesh=Mesh(tp=2), microbatches=2, recompute=how)
        parallel.step(*batch())
        return parallel.full_gradients()

    wanted = world2.run(gradients, "none")[0]
    for how in ("selective", "full"):
        assert differences(world2.run(gradients, how)[0], wanted) == ""


def test_a_word_that_is_not_known_is_refused(world2):
    with pytest.raises(Exception, match="recompute='some': one of none, selective, full"):
        world2.run(lambda: parallelize(minipar.gpt(CONFIG), Mesh(dp=2), recompute="some"))
