"""Mixed precision: products in 16 bits, weights and gradients in the module's dtype, and no step after an overflow."""

import pytest
import torch
from laws import batch_of

import minipar
from minipar import Config, Mesh, connect, parallelize, tensor

CONFIG = Config(vocab=64, context=16, depth=4, width=64, heads=4)
LAYOUTS = [
    {"mesh": Mesh(dp=4), "zero": 3},
    {"mesh": Mesh(dp=2, tp=2), "sequence_parallel": True, "recompute": "full"},
    {"mesh": Mesh(pp=2, tp=2), "microbatches": 4, "schedule": minipar.schedule.zero_bubble_h1},
    {"mesh": Mesh(pp=2, cp=2), "microbatches": 2, "zero": 2, "recompute": "selective"},
]


def model():
    torch.manual_seed(0)
    return minipar.gpt(CONFIG)


def step(layout, dtype):
    parallel = parallelize(model(), dtype=dtype, **layout)
    loss = parallel.step(*batch_of(CONFIG, 8, 16))
    return loss, parallel.full_gradients(), {p.dtype for p in parallel.parameters()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_close_to_those_in_float32_and_not_equal(world4, dtype):
    for layout in LAYOUTS:
        loss, gradients, kept = world4.run(step, layout, dtype)[0]
        exact, wanted, _ = world4.run(step, layout, None)[0]
        assert kept == {torch.float32}
        assert loss != exact and abs(loss - exact) < 2e-3 * exact
        assert not torch.equal(gradients["head.weight"], wanted["head.weight"])
        for name, y in wanted.items():
            if y.norm() > 1e-6:  # a key's bias has no gradient
                assert gradients[name].dtype == torch.float32
                assert (gradients[name] - y).norm() < 0.03 * y.norm(), (layout, name)


def test_the_scale_is_gone_from_gradients_where_every_label_counts_too(world2):
    """Then the count is known before the step, and there is nothing else to divide by."""

    def gradients(dtype):
        parallel, (tokens, _) = parallelize(model(), Mesh(dp=2), dtype=dtype), batch_of(CONFIG, 8, 16)
        parallel.step(tokens, tokens.roll(-1, 1))
        return parallel.full_gradients()

    got, wanted = (world2.run(gradients, dtype)[0]["head.weight"] for dtype in (torch.float16, None))
    assert (got - wanted).norm() < 0.03 * wanted.norm()


def test_a_loss_over_a_cut_vocabulary_is_summed_in_32_bits(world2):
    def both():
        axis, draw = connect(Mesh(tp=2))["tp"], torch.Generator().manual_seed(0)
        logits, targets = torch.randn(64, 512, generator=draw).bfloat16(), torch.randint(512, (64,), generator=draw)
        whole, mine = logits.clone().requires_grad_(), logits.chunk(2, 1)[axis.index].clone().requires_grad_()
        wanted, _ = tensor.cross_entropy(whole, targets)
        got, _ = tensor.vocabulary_parallel_cross_entropy(mine, targets, axis, 512)
        wanted.backward()
        got.backward()
        return (got / wanted - 1).item(), (mine.grad - whole.grad.chunk(2, 1)[axis.index]).abs().max().item()

    for loss, gradient in world2.run(both):
        assert abs(loss) < 1e-6 and gradient < 2**-8  # a bit of bfloat16's


def test_products_compute_in_the_dtype(world2):
    def dtypes():
        parallel, seen = parallelize(model(), Mesh(tp=2), dtype=torch.bfloat16), {}
        for name in ("blocks.0.mlp.up", "blocks.0.norm1"):
            layer = parallel.module.get_submodule(name)
            layer.register_forward_hook(lambda module, args, y, name=name: seen.update({name: y.dtype}))
        parallel.step(*batch_of(CONFIG, 8, 16))
        return seen

    assert world2.run(dtypes)[0] == {"blocks.0.mlp.up": torch.bfloat16, "blocks.0.norm1": torch.float32}


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[1], LAYOUTS[2]], ids=["zero", "tensor", "pipeline"])
def test_after_an_overflow_the_step_changes_nothing(world4, layout):
    """One rank's gradient is made infinite; on no rank does the optimizer move a weight or its own state."""

    def run():
        parallel = parallelize(model(), dtype=torch.float16, **layout)
        optimizer = torch.optim.AdamW(parallel.parameters())
        tokens, targets = batch_of(CONFIG, 8, 16)
        parallel.step(tokens, targets)
        optimizer.step()
        weights, states = parallel.full_state_dict(), repr(optimizer.state_dict())
        scale, check = parallel.scale.value, parallel._check_overflow

        def broken():
            if minipar.world.here().rank == 2:
                next(p for p in parallel.parameters() if p.grad is not None).grad.view(-1)[0] = float("inf")
            check()

        parallel._check_overflow = broken
        loss = parallel.step(tokens, targets)
        optimizer.step()
        unchanged = all(torch.equal(x, weights[name]) for name, x in parallel.full_state_dict().items())
        halved, parallel._check_overflow = parallel.scale.value == scale / 2, check
        same_state = repr(optimizer.state_dict()) == states
        parallel.step(tokens, targets)
        optimizer.step()
        moved = any(not torch.equal(x, weights[name]) for name, x in parallel.full_state_dict().items())
        return loss.isfinite().item(), unchanged, same_state, halved, moved

    assert world4.run(run) == [(True,) * 5] * 4


def test_a_scale_that_is_too_large_comes_down_until_training_goes_on(world2):
    def losses():
        parallel = parallelize(model(), Mesh(dp=2), dtype=torch.float16)
        parallel.scale.value = 2.0**30
        optimizer, batch = torch.optim.AdamW(parallel.parameters(), lr=1e-2), batch_of(CONFIG, 8, 16)
        losses = [(parallel.step(*batch).item(), optimizer.step())[0] for _ in range(30)]
        return losses, parallel.scale.value

    losses, scale = world2.run(losses)[0]
    assert losses[0] == losses[1] and losses[-1] < 0.9 * losses[0] and 1 < scale < 2.0**30


def test_the_scale_doubles_after_many_good_steps():
    scale = minipar.precision.LossScale(value=4.0, patience=3)
    values = [(scale.update(overflow), scale.value)[1] for overflow in (False, False, False, True, False, False, False)]
    assert values == [4, 4, 8, 4, 4, 4, 8]


def test_a_dtype_that_is_not_half_is_refused(world2):
    with pytest.raises(Exception, match=r"dtype=torch.int8: torch.bfloat16, torch.float16, or None"):
        world2.run(lambda: parallelize(model(), Mesh(dp=2), dtype=torch.int8))
