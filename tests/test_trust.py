"""What chapter 08b builds, where it has no check of its own: gaps in a text, private and secure sums at their edges."""

import pytest
import torch
import torch.nn.functional as F
from excerpts import defined

from minipar import Mesh, connect
from minipar.collectives import all_reduce


@pytest.fixture(scope="module")
def chapter() -> dict:
    """What is tested here. Nothing of the chapter is run on ranks."""
    hidden = "seeds_of_pairs", "masked_share", "mask", "uniformity", "STEP"
    return defined("08b_trust_and_beyond", "surprise", "network", "row_gradients", "clipped_sum", *hidden)


# -- a cloze without labels ----------------------------------------------------------------------------------------


def test_the_surprise_by_a_text_is_that_of_its_tokens_alone(chapter):
    """Here without padding, and one text at a time."""
    weights = chapter["reader"](seed=3).state_dict()
    texts = "return the shape of an array", "a tensor"
    model = chapter["reader"]()
    model.load_state_dict(weights)
    for text, found in zip(texts, chapter["surprise"](weights, list(texts)), strict=True):
        ids = torch.tensor(chapter["corpus"].tokenizer().encode(text).ids)
        total = 0.0
        for first in range(6):
            gaps = torch.where(torch.arange(len(ids)) % 6 == first, chapter["MASK"], ids)
            chances = model(gaps[None]).logits[0].log_softmax(-1)
            total -= chances[range(len(ids)), ids][first::6].sum().item()
        assert found.item() == pytest.approx(total / len(ids), rel=1e-5)


# -- rows that are clipped -----------------------------------------------------------------------------------------


def test_clipped_gradients_are_those_of_opacus(chapter):
    from opacus.grad_sample import GradSampleModule

    x, y = torch.randn(12, 64, requires_grad=True), torch.arange(12) % 10
    model = GradSampleModule(chapter["network"](0), loss_reduction="sum")
    F.cross_entropy(model(x), y, reduction="sum").backward()
    theirs = torch.cat([p.grad_sample.flatten(1) for p in model.parameters()], 1)
    ours = chapter["row_gradients"](chapter["network"](0), x.detach(), y)
    torch.testing.assert_close(ours, theirs)
    small = theirs.norm(dim=1).median().item()  # half of the rows are clipped
    factors = (small / theirs.norm(dim=1)).clamp(max=1)
    torch.testing.assert_close(chapter["clipped_sum"](ours, small), (theirs * factors[:, None]).sum(0))


def test_no_row_moves_the_sum_by_more_than_the_bound(chapter):
    rows = torch.randn(40, 7, generator=torch.Generator().manual_seed(0)).double()
    for size in (0.0, 1e-300, 1e-6, 1.0, 1e6, 1e150):
        with_it = torch.cat([rows, size * torch.ones(1, 7).double()])
        moved = chapter["clipped_sum"](with_it, 1.5) - chapter["clipped_sum"](rows, 1.5)
        assert moved.isfinite().all() and moved.norm() <= 1.5 + 1e-9


def test_without_a_bound_rows_are_just_added(chapter):
    rows = torch.randn(40, 7, generator=torch.Generator().manual_seed(0)).double()
    assert torch.equal(chapter["clipped_sum"](rows, torch.inf), rows.sum(0))


def test_a_rank_without_rows_adds_nothing(chapter):
    """With few rows and small lots, it happens."""
    none = chapter["row_gradients"](chapter["network"](0), torch.zeros(0, 64), torch.zeros(0, dtype=torch.long))
    assert torch.equal(chapter["clipped_sum"](none, 1.0), torch.zeros(4810))


# -- sums that are hidden ------------------------------------------------------------------------------------------


def hidden(chapter, size, scale):
    """On a rank: what it adds, its share, its seeds, the sum over all."""
    seeds_of_pairs, masked_share, step = (chapter[name] for name in ("seeds_of_pairs", "masked_share", "STEP"))

    def work():
        axis = connect(Mesh(dp=size))["dp"]
        own = scale * torch.randn(3000, generator=torch.Generator().manual_seed(axis.index)).double()
        seeds = seeds_of_pairs(axis, own=axis.index)
        share = masked_share(own, axis, seeds)
        return own, share, seeds, all_reduce(share, axis).double() * step

    return work


@pytest.mark.parametrize(("size", "scale"), [(2, 1.0), (3, 1e-6), (4, 1e6)])
def test_the_sum_is_right_to_the_step(worlds, chapter, size, scale):
    owns, shares, seeds, sums = zip(*worlds(size).run(hidden(chapter, size, scale)), strict=True)
    true = torch.stack(owns).sum(0)
    for found in sums:
        assert (found - true).abs().max() <= size / 2 * chapter["STEP"] + 1e-15 * true.abs().max()
    for share in shares:  # small gradients are hidden as well as large ones
        assert max(chapter["uniformity"](share)) < 347.7
    assert all(seeds[a][b] == seeds[b][a] for a in range(size) for b in range(size) if a != b)


@pytest.mark.parametrize("gone", range(4))
def test_whoever_drops_out_the_others_can_mend_it(world4, chapter, gone):
    owns, shares, seeds, _ = zip(*world4.run(hidden(chapter, 4, 1.0)), strict=True)
    left = [rank for rank in range(4) if rank != gone]
    total = sum(shares[rank] for rank in left)
    assert max(chapter["uniformity"](total)) < 347.7  # nothing yet
    for rank in left:
        total -= chapter["mask"](seeds[rank][gone], 3000) * (1 if rank < gone else -1)
    true = sum(owns[rank] for rank in left)
    assert (total.double() * chapter["STEP"] - true).abs().max() <= 2 * chapter["STEP"]


def test_what_one_partner_knows_does_not_open_a_share(world4, chapter):
    """Three ranks that are masked by four: two of them, together against the third, are left with one unknown mask."""
    _, shares, seeds, _ = zip(*world4.run(hidden(chapter, 4, 1.0)), strict=True)
    opened = shares[0] - chapter["mask"](seeds[1][0], 3000) - chapter["mask"](seeds[2][0], 3000)
    assert max(chapter["uniformity"](opened)) < 347.7
    bare = opened - chapter["mask"](seeds[3][0], 3000)
    assert chapter["uniformity"](bare)[0] > 347.7  # all three together have it


@pytest.mark.parametrize("bits", [62, 40])
def test_masks_that_are_too_small_are_found(chapter, bits):
    small = torch.randint(2**bits, (4810,), generator=torch.Generator().manual_seed(0))
    assert chapter["uniformity"](small)[0] > 347.7
