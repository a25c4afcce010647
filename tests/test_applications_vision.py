"""What the chapters on vision and finance define and measure by: functions of their cells, on cases of their own."""

import numpy as np
import pytest
import torch
from excerpts import defined
from scipy import stats


def functions(chapter: str, *names: str) -> list:
    """Functions as a chapter defines them."""
    found = defined(chapter, *names)
    return [found[name] for name in names]


def boxes(*rows):
    return torch.tensor(rows, dtype=torch.float64)


# -- boxes -------------------------------------------------------------------------------------------------------


def test_overlap_does_not_depend_on_scale_place_or_order():
    (iou,) = functions("06c_vision", "iou")
    a, b = boxes([0, 0, 4, 4], [1, 2, 5, 9]), boxes([2, 2, 6, 6], [3, 0, 8, 5])
    wanted = boxes([4 / 28, 6 / (28 + 25 - 6)])[0]
    for one, other in ((a, b), (b, a), (3 * a, 3 * b), (a - 7, b - 7), (a[:, [1, 0, 3, 2]], b[:, [1, 0, 3, 2]])):
        assert torch.allclose(iou(one, other), wanted, atol=1e-15)
    assert iou(boxes([0, 0, 2, 2]), boxes([3, 3, 3, 9])).item() == 0  # a box without an area


def test_generalized_overlap_is_at_most_the_plain_one_and_falls_with_distance():
    giou, iou = functions("06c_vision", "giou", "iou")
    a = boxes([0, 0, 4, 4]).repeat(20, 1)
    moved = a + torch.arange(20.0, dtype=torch.float64)[:, None] * boxes([1, 0, 1, 0])
    found = giou(a, moved)
    assert (found <= iou(a, moved) + 1e-15).all() and (found.diff() < 0).all() and found[-1] > -1
    assert found[8].item() == pytest.approx(0 - (12 * 4 - 32) / 48)
    d = boxes([4, 4, 8, 8])  # corner to corner: the hull has 64, both together cover 32
    assert giou(a[:1], d).item() == pytest.approx(-0.5)


# -- shares ------------------------------------------------------------------------------------------------------


def test_intervals_hold_the_true_share_as_often_as_they_say():
    (wilson,) = functions("06c_vision", "wilson")
    for share in (0.5, 0.9, 0.97):
        right = np.random.default_rng(0).binomial(597, share, 4000)
        held = np.mean([low <= share <= high for low, high in (wilson(int(x), 597) for x in right)])
        assert 0.94 < held < 0.965


def test_a_coin_toss_by_hand():
    (coin_toss,) = functions("06c_vision", "coin_toss")
    first, second = np.array([1, 1, 1, 1, 0, 1, 0], bool), np.array([1, 0, 0, 0, 1, 0, 0], bool)
    assert coin_toss(first, second) == (4, 1, 2 * (1 + 5) / 32)
    assert coin_toss(first, first) == (0, 0, 1.0)
    assert coin_toss(torch.tensor(second), torch.tensor(first))[:2] == (1, 4)


# -- exceedances -------------------------------------------------------------------------------------------------


def test_exceedances_that_pass_are_those_of_the_likelihood_ratio():
    (kupiec,) = functions("06d_finance", "kupiec")
    assert kupiec(10, 1000, 0.01) == (0.0, 1.0)
    for hits, days, level in ((5, 250, 0.01), (0, 250, 0.01), (20, 1000, 0.05), (1000, 1000, 0.05)):
        ratio, chance = kupiec(hits, days, level)
        plain = stats.binom.logpmf(hits, days, hits / days) - stats.binom.logpmf(hits, days, level)
        assert ratio == pytest.approx(2 * plain) and chance == pytest.approx(stats.chi2.sf(ratio, 1))
    # What the table of Kupiec 1995 lets pass at 5 percent, for a level of 1 percent.
    for days, low, high in ((255, 0, 7), (510, 1, 11), (1000, 4, 17)):
        passing = [x for x in range(40) if kupiec(x, days, 0.01)[1] > 0.05]
        assert (passing[0], passing[-1]) == (low + 1, high - 1)


def test_exceedances_in_clusters_are_refused_and_independent_ones_mostly_are_not():
    (christoffersen,) = functions("06d_finance", "christoffersen")
    draw, refused = np.random.default_rng(0), 0
    for _ in range(500):
        refused += christoffersen(draw.random(2000) < 0.05)[1] < 0.05
    assert 0.02 < refused / 500 < 0.09
    days = np.zeros(2000, bool)
    days[[*range(100, 110), *range(900, 910)]] = True
    assert christoffersen(days)[1] < 1e-10
    assert christoffersen(np.zeros(10, bool)) == (0.0, 1.0)  # nothing to find, and nothing that breaks


# -- forecasts and profits ---------------------------------------------------------------------------------------


def test_the_pinball_loss_is_least_at_the_quantile():
    (pinball,) = functions("06d_finance", "pinball")
    drawn = np.random.default_rng(0).standard_t(5, 20_001)
    for level in (0.05, 0.5, 0.9):
        quantile = np.quantile(drawn, level)
        least = pinball(drawn, quantile, level).mean()
        assert all(pinball(drawn, quantile + off, level).mean() > least for off in (-0.05, 0.05))
    q = torch.tensor([0.5], requires_grad=True)
    pinball(torch.tensor([1.0]), q, 0.05).sum().backward()
    assert q.grad.item() == pytest.approx(-0.05)


def test_profits_pay_for_what_is_traded():
    (profits,) = functions("06d_finance", "profits")
    held, returns = np.array([1, 1, -1, 0]), np.array([0.01, -0.02, 0.03, 0.5])
    assert profits(held, returns, cost=0.001) == pytest.approx([0.009, -0.02, -0.032, -0.001])


def test_the_best_rule_holds_on_when_trading_costs_and_follows_the_sign_when_it_does_not():
    (best_rule,) = functions("06d_finance", "best_rule")
    free, gain = best_rule(cost=0.0)
    grid = np.linspace(-6, 6, 241)
    up = 0.0002 + 0.001 * grid > 1e-12
    assert (free[:, up] == 1).all() and (free[:, 0.0002 + 0.001 * grid < -1e-12] == -1).all()
    dear, less = best_rule(cost=0.01)
    assert less < gain and (np.diff(dear, axis=1) >= 0).all()  # the better the forecast, the more is held
    assert (dear[0] <= dear[1]).all() and (dear[1] <= dear[2]).all()
