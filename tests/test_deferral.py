"""Weight gradients that are put off are the same, come once, and come when they are asked for."""

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

from minipar.deferral import Deferral


def matrix(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(rows, columns, generator=generator, dtype=torch.float64))


def gradients(linear, forward, *parameters):
    """Of the sum of what forward(linear) gives."""
    for p in parameters:
        p.grad = None
    forward(linear).sum().backward()
    return [p.grad for p in parameters]


def deferred(forward, *parameters):
    """The same through a deferral: before the weights' gradients are run, and after."""
    deferral = Deferral()
    weights = deferral.begin()
    before = gradients(deferral.linear, forward, *parameters)
    weights.finish()
    return before, [p.grad for p in parameters]


@pytest.mark.parametrize("shape", [(3,), (2, 3), (4, 2, 3)])
def test_gradients_are_those_of_a_linear_layer(shape):
    x, w, b = nn.Parameter(torch.randn(shape, dtype=torch.float64)), matrix(5, 3), matrix(5, 1)
    forward = lambda linear: linear(x, w, b[:, 0]).square()  # noqa: E731
    wanted = gradients(F.linear, forward, x, w, b)
    before, after = deferred(forward, x, w, b)
    assert before[1] is None, "the weight's gradient came with the backward"
    torch.testing.assert_close([before[0], *after[1:]], wanted, rtol=0, atol=1e-14)


def test_a_weight_that_is_used_twice_gets_one_gradient_with_both_uses():
    x, w = matrix(4, 3, 1), matrix(3, 3)
    heard = []
    forward = lambda linear: linear(linear(x, w).tanh(), w).square()  # noqa: E731
    (wanted,) = gradients(F.linear, forward, w)
    w.register_post_accumulate_grad_hook(lambda p: heard.append(p.grad.clone()))
    _, (got,) = deferred(forward, w)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-13)
    assert len(heard) == 1
    torch.testing.assert_close(heard[0], wanted, rtol=0, atol=1e-13)


def test_a_use_that_backward_does_not_reach_loses_nothing():
    x, w = matrix(4, 3, 1), matrix(3, 3)

    def forward(linear):
        linear(x, w)  # thrown away
        return linear(x, w).square()

    (wanted,) = gradients(F.linear, forward, w)
    _, (got,) = deferred(forward, w)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-14)


def test_what_is_frozen_stays_without_a_gradient():
    x, w, b = matrix(4, 3, 1), matrix(5, 3).requires_grad_(False), nn.Parameter(torch.zeros(5, dtype=torch.float64))
    forward = lambda linear: linear(x, w, b).square()  # noqa: E731
    wanted = gradients(F.linear, forward, x, b)
    _, got = deferred(forward, x, b)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-14)
    assert w.grad is None


def test_what_runs_in_the_middle_of_a_backward_is_right():
    """As between the layers of a cut model: the weights' gradients run while an activation's travels."""
    x, w1, w2 = matrix(4, 3, 2), matrix(6, 3), matrix(2, 6, 1)
    deferral = Deferral()

    def forward(linear):
        y = linear(x, w1)
        if linear == deferral.linear:
            y.register_hook(lambda _: deferral.now.run())
        return linear(y, w2).square()

    wanted = gradients(F.linear, forward, w1, w2)
    weights = deferral.begin()
    before = gradients(deferral.linear, forward, w1, w2)
    assert before[0] is None and before[1] is not None
    weights.finish()
    torch.testing.assert_close([w1.grad, w2.grad], wanted, rtol=0, atol=1e-14)


# Inside `with`, a deferral that holds finds the products by itself.

PRODUCTS = {
    "x @ w": lambda x, w, b: x @ w,
    "matmul": lambda x, w, b: torch.matmul(x, w) + b,
    "mm": lambda x, w, b: x.mm(w),
    "linear by keyword": lambda x, w, b: F.linear(input=x, weight=w, bias=b),
    "addmm": lambda x, w, b: torch.addmm(b, x, w),
    "addmm of a matrix": lambda x, w, b: torch.addmm(x, x, w),
    "addmm of a row": lambda x, w, b: torch.addmm(b[None], x, w),
}
OTHERS = {
    "addmm with a factor": lambda x, w, b: torch.addmm(b, x, w, alpha=0.5),
    "the weight on the left": lambda x, w, b: (w @ x.t()).t(),
    "both are weights": lambda x, w, b: x * (w @ w).sum(),
    "einsum": lambda x, w, b: torch.einsum("nc,cd->nd", x, w),
    "transposed": lambda x, w, b: x @ w.t(),
}


@pytest.mark.parametrize("name", [*PRODUCTS, *OTHERS])
@pytest.mark.parametrize("constant", [False, True])
def test_products_with_a_weight_wait_and_whatever_else_is_right_at_once(name, constant):
    product = (PRODUCTS | OTHERS)[name]
    x, w, b = matrix(4, 3, 1).requires_grad_(not constant), matrix(3, 3, 2), matrix(1, 3, 3)
    if constant and name == "the weight on the left":
        pytest.skip("there is no activation in it")
    forward = lambda _: product(x, w, b[0]).square()  # noqa: E731
    wanted = gradients(None, forward, x, w, b)
    deferral = Deferral(holds=True)
    weights = deferral.begin()
    with deferral:
        y = product(x, w, b[0]).square().sum()
    for p in (x, w, b):
        p.grad = None
    y.backward()
    if name in PRODUCTS and not constant:
        assert w.grad is None and weights.coming == {w}
    weights.finish()
    assert weights.coming == set()
    torch.testing.assert_close([x.grad, w.grad, b.grad], wanted, rtol=0, atol=1e-13)


def test_what_backward_computes_again_is_not_counted_twice():
    x, w, b = matrix(4, 3, 1), matrix(3, 3, 2), matrix(1, 3, 3)

    def forward(linear):
        def inner(x):
            return F.linear(torch.tanh(F.linear(x, w, b[0])), w)

        return torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=False).square()

    wanted = gradients(None, forward, x, w, b)
    deferral = Deferral(holds=True)
    weights = deferral.begin()
    with deferral:
        y = forward(None).sum()
    for p in (x, w, b):
        p.grad = None
    deferral.backward([y], [torch.ones_like(y)])
    assert w.grad is None and x.grad is not None
    weights.finish()
    torch.testing.assert_close([x.grad, w.grad, b.grad], wanted, rtol=0, atol=1e-13)


def test_float64_stays_float64_where_all_else_computes_in_16_bits():
    x, w = torch.randn(4, 3, dtype=torch.float64), nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
    deferral = Deferral()
    weights = deferral.begin()
    with torch.autocast("cpu", torch.bfloat16):
        y = deferral.linear(x, w)
        assert y.dtype is F.linear(x, w).dtype is torch.float64 and y.equal(F.linear(x, w))
    y.sum().backward()
    weights.finish()
    assert w.grad.dtype is torch.float64


def test_a_hook_on_a_weight_sees_a_gradient_that_was_put_off():
    x, w = torch.randn(4, 3), nn.Parameter(torch.randn(5, 3))
    w.grad = torch.zeros_like(w)
    seen = []
    w.register_hook(lambda g: seen.append(g.clone()) or g * 2)
    weights = (deferral := Deferral()).begin()
    deferral.linear(x, w).sum().backward()
    weights.finish()
    assert len(seen) == 1 and torch.allclose(w.grad, 2 * seen[0])
