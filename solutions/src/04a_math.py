# %% [markdown] lang="en"
# # Exercises of 04a: the mathematics
#
# Four small functions, half an hour, no ranks: here a "rank" is an entry of a list. They are what the engine rests on.
# A gradient of a sum is a sum of gradients; the chain rule does not mind where a matrix is cut; and a mean of means is
# not the mean. They go with [chapter 04a](../chapters/04a_math.ipynb).
#
# **How it works.** Run the cells from the top with Shift+Enter. Each task is a cell with a function for you to finish,
# where it says `raise NotImplementedError("your turn")`. The folded cell below it is its check: run it after yours. For
# a right answer it prints the line that stands there already, for a wrong one it says what is wrong. Or let a terminal
# check, in the folder of the course, after you have saved:
#
#     python -m minipar grade exercises/04a_math.ipynb
#     python -m minipar hint 04a.1
#     python -m minipar solution 04a.1    # once it has passed

# %% tags=["setup"]
from fractions import Fraction

import torch
from torch import Tensor

from minipar.course.checks import returned, verdict

# %% [markdown] lang="en"
# ## 04a.1 · Trace: one step by hand
#
# The line $\hat y = w x + b$ and the document's loss, the mean of $(y_i - \hat y_i)^2$. Three rows: $x = (1, 2, 4)$,
# $y = (2, 2, 9)$. Begin at $w = 1$, $b = 1$, take one step of gradient descent with $\alpha = 0.1$.
#
# Work it out on paper: the three errors $\hat y_i - y_i$, the derivative for $w$, the one for $b$, then the new $w$ and
# $b$.

# %% [markdown] lang="en" hint="04a.1"
# The predictions are 2, 3 and 5, so the errors are 0, 1 and −4.

# %% [markdown] lang="en" hint="04a.1"
# $\partial L/\partial w = \frac{1}{3}\sum 2\,(\hat y_i - y_i)\,x_i = \frac{1}{3}(0 + 4 - 32)$, and for $b$ it is
# $\frac{1}{3}(0 + 2 - 8)$.


# %% task="04a.1" title="Trace: one step by hand"
def one_step() -> tuple[float, float]:
    """w and b after one step."""
    ### BEGIN SOLUTION
    return 1 - 0.1 * (-28 / 3), 1 - 0.1 * (-6 / 3)
    ### END SOLUTION


# %% check="04a.1" seconds=20
# Check of 04a.1: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    x, y = torch.tensor([1.0, 2, 4], dtype=torch.float64), torch.tensor([2.0, 2, 9], dtype=torch.float64)
    theta = torch.ones(2, dtype=torch.float64, requires_grad=True)
    ((theta[0] * x + theta[1] - y) ** 2).mean().backward()
    wanted = (theta - 0.1 * theta.grad).tolist()
    got = [float(v) for v in returned(one_step(), "one_step")]
    assert len(got) == 2, f"one_step gives {len(got)} numbers: w and b are two."
    mistakes = {
        "the sum over the rows, not their mean": (theta - 0.3 * theta.grad).tolist(),
        "a step up the hill: the gradient is subtracted": (theta + 0.1 * theta.grad).tolist(),
        "without the 2 that comes from the square": (theta - 0.05 * theta.grad).tolist(),
        "the gradient, not the weights after the step": theta.grad.tolist(),
    }
    for mistake, values in mistakes.items():
        same = all(abs(a - b) < 1e-3 for a, b in zip(got, values, strict=True))
        assert not same, f"w = {got[0]:.4g}, b = {got[1]:.4g}: that is {mistake}."
    for name, mine, right in zip("wb", got, wanted, strict=True):
        off = abs(mine - right)
        assert not 1e-3 <= off < 0.01, f"{name} is nearly {mine:.4g}: give four decimals, or an expression."
        assert off < 1e-3, f"{name} is not {mine:.4g} after the step. Check the derivative for {name}."
    before, after = (float(((w * x + b - y) ** 2).mean()) for w, b in ((1, 1), wanted))
    print(f"the loss falls from {before:.2f} to {after:.2f}")

# %% [markdown] lang="en"
# ## 04a.2 · Write: what a rank gives to the sum
#
# A linear model $\hat Y = X W$, the mean of squared errors over *all* numbers of $Y$. The rows of $X$ and $Y$ are cut
# over ranks, not equally. Write what one rank computes from its own rows, such that the plain **sum** over the ranks is
# the gradient of the whole loss. The only thing that it knows of the others is the global count.

# %% [markdown] lang="en" hint="04a.2"
# $\nabla_W \sum (XW - Y)^2 = 2\,X^\top (XW - Y)$, over any set of rows.

# %% [markdown] lang="en" hint="04a.2"
# Divide by `count`, the number of elements of the whole $Y$. Not by this rank's rows, and not by the number of ranks.


# %% task="04a.2" title="Write: what a rank gives to the sum"
def my_term(x: Tensor, y: Tensor, w: Tensor, count: int) -> Tensor:
    """This rank's term of the gradient for w. x: (rows, in), y: (rows, out), w: (in, out), count: elements of all y."""
    ### BEGIN SOLUTION
    return 2 * x.T @ (x @ w - y) / count
    ### END SOLUTION


# %% check="04a.2" seconds=20
# Check of 04a.2: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    draw = torch.Generator().manual_seed(1)
    for shares, inner, outer in [([4, 4], 3, 2), ([5, 1, 2], 3, 2), ([1, 0, 6], 4, 5)]:
        x = torch.randn(sum(shares), inner, generator=draw, dtype=torch.float64)
        y = torch.randn(sum(shares), outer, generator=draw, dtype=torch.float64)
        w = torch.randn(inner, outer, generator=draw, dtype=torch.float64, requires_grad=True)
        ((x @ w - y) ** 2).mean().backward()
        v = w.detach()
        terms = [
            returned(my_term(a, b, v, y.numel()), "my_term")
            for a, b in zip(x.split(shares), y.split(shares), strict=True)
        ]
        shape = tuple(terms[0].shape)
        assert shape == tuple(w.shape), f"A term has the shape {shape}, and w is {tuple(w.shape)}."
        total, case = sum(terms), f"Shares of {shares} rows"
        assert total.isfinite().all(), f"{case}: the sum is not finite. What does a rank without rows give?"
        factor = float((total * w.grad).sum() / (w.grad**2).sum())
        off = float((total - w.grad).abs().max())
        multiple = float((total - factor * w.grad).abs().max()) < 1e-9
        told = (
            f"{case}: the sum of the terms is {factor:.4g} times the gradient"
            if multiple
            else f"{case}: off by {off:.2g}"
        )
        assert off < 1e-12, f"{told}. By what does each rank divide?"
    print("sums of terms equal gradients, for shares of 4+4, 5+1+2 and 1+0+6 rows")

# %% [markdown] lang="en"
# ## 04a.3 · Write: how unfair a mean of means is
#
# Ranks with $n_r$ labeled tokens each; every rank takes the mean over its own, then the means are averaged. What does
# one token of rank $r$ weigh? And how many times more does the heaviest token weigh than the lightest? (On a rank
# without tokens nothing weighs anything; leave it out of the second answer. The average is over all ranks all the
# same.)
#
# `Fraction(1, 3)` is exactly a third.

# %% [markdown] lang="en" hint="04a.3"
# In its rank's mean, a token weighs $1/n_r$. That mean weighs $1/R$ in the average, with $R$ ranks.

# %% [markdown] lang="en" hint="04a.3"
# The heaviest is on the rank with the fewest tokens: $\max n_r / \min n_r$, over ranks that have some.


# %% task="04a.3" title="Write: how unfair a mean of means is"
def weights(counts: list[int]) -> tuple[list[Fraction], Fraction]:
    """What one token of each rank weighs in the mean of means (0 where there is none), and heaviest over lightest."""
    ### BEGIN SOLUTION
    each = [Fraction(1, len(counts) * n) if n else Fraction(0) for n in counts]
    some = [n for n in counts if n]
    return each, Fraction(max(some), min(some))
    ### END SOLUTION


# %% check="04a.3" seconds=20
# Check of 04a.3: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    for counts in ([4, 4], [60, 20], [60, 44, 28, 12], [3, 0, 6]):
        each, worst = returned(weights(list(counts)), "weights")
        assert len(each) == len(counts), f"{counts}: {len(each)} weights for {len(counts)} ranks."
        for number in (*each, worst):
            assert isinstance(number, Fraction | int), f"{counts}: {number!r} is no Fraction, and is not exact."
        loss = [torch.randn(n, dtype=torch.float64, requires_grad=True) for n in counts]
        means = [one.mean() for one in loss if len(one)]
        (sum(means) / len(counts)).backward()
        for rank, (mine, tokens) in enumerate(zip(each, loss, strict=True)):
            right = float(tokens.grad[0]) if len(tokens) else 0.0
            total = sum(counts)
            fair = (
                f" {mine} is what it should weigh, in the mean over all {total}." if mine == Fraction(1, total) else ""
            )
            told = f"{counts}: a token of rank {rank} weighs {right:.5g}, you give {float(mine):.5g}.{fair}"
            assert abs(float(mine) - right) < 1e-12, told
        filled = [float(w) for w in each if w]
        ratio = max(filled) / min(filled)
        assert abs(float(worst) - ratio) < 1e-9, (
            f"{counts}: heaviest over lightest is {ratio:.4g}, you give {float(worst):.4g}."
        )
    print(f"60 and 20 tokens: one weighs {weights([60, 20])[1]} times another")

# %% [markdown] lang="en"
# ## 04a.4 · Mend: two matrices, cut
#
# Two layers, $h = \varphi(x A)$ and $y = h B$, with $\varphi$ = ReLU. $A$ is cut by columns and $B$ by rows: rank $r$
# has $A_r$ and $B_r$, all of $x$, and no other rank's numbers. In forward one thing is summed over the ranks, in
# backward another. This code was written by someone who thought that the two sums are the same. Its loss is right, the
# gradients of the last layer are right, and all that lies below learns from wrong gradients.
#
# `total(list)` stands for the all-reduce: it returns the sum of the ranks' tensors.

# %% [markdown] lang="en" hint="04a.4"
# Which gradients can a rank compute alone, given $\partial L/\partial y$, which all ranks have? $B_r$'s and $A_r$'s.

# %% [markdown] lang="en" hint="04a.4"
# $x$ goes into every rank's part. By the chain rule its gradient is the sum over all the ways on which $x$ reaches the
# loss: one term for each rank.

# %% [markdown] lang="en" hint="04a.4"
# $\partial L/\partial x = \sum_r \big((g\,B_r^\top) \odot \varphi'(x A_r)\big) A_r^\top$, with
# $g = \partial L/\partial y$. In forward, $y = \sum_r h_r B_r$.


# %% task="04a.4" title="Mend: two matrices, cut"
def cut_layers(x: Tensor, a: list[Tensor], b: list[Tensor], gradient_of, total) -> tuple[Tensor, list[Tensor], Tensor]:
    """y, the gradients of each rank's A_r, and the gradient of x.

    x: (rows, in), a[r]: (in, share), b[r]: (share, out), gradient_of(y) -> the gradient of y, total(list) -> their sum.
    """
    h = [(x @ part).relu() for part in a]  # rank r has h[r] only
    y = total([one @ part for one, part in zip(h, b, strict=True)])
    g = gradient_of(y)
    ### BEGIN SOLUTION
    before = [(g @ part.T) * (one > 0) for one, part in zip(h, b, strict=True)]
    da = [x.T @ one for one in before]
    dx = total([one @ part.T for one, part in zip(before, a, strict=True)])
    ### INSTEAD
    # before = [total([g @ part.T for part in b]) * (one > 0) for one in h]
    # da = [x.T @ one for one in before]
    # dx = before[0] @ a[0].T
    ### END SOLUTION
    return y, da, dx


# %% check="04a.4" seconds=20
# Check of 04a.4: run this after your answer
# NBVAL_CHECK_OUTPUT
sums = []


def counted_total(terms):
    sums.append(len(terms))
    return torch.stack(list(terms)).sum(0)


with verdict():
    draw = torch.Generator().manual_seed(2)
    for ranks, share in [(2, 3), (4, 2), (1, 5)]:
        sums.clear()
        x = torch.randn(5, 4, generator=draw, dtype=torch.float64, requires_grad=True)
        a = torch.randn(4, ranks * share, generator=draw, dtype=torch.float64, requires_grad=True)
        b = torch.randn(ranks * share, 3, generator=draw, dtype=torch.float64)
        (((x @ a).relu() @ b) ** 2).sum().backward()
        parts = a.detach().chunk(ranks, 1), b.chunk(ranks, 0)
        y, da, dx = cut_layers(x.detach(), *map(list, parts), lambda y: 2 * y, counted_total)
        case = f"{ranks} rank{'s' * (ranks > 1)}"
        off = float((y - (x @ a).relu() @ b).detach().abs().max())
        assert off < 1e-9, f"{case}: y is off by {off:.2g}."
        for rank, (mine, whole) in enumerate(zip(da, a.grad.chunk(ranks, 1), strict=True)):
            assert mine.shape == whole.shape, f"{case}: rank {rank}'s gradient of A has the shape {tuple(mine.shape)}."
            off = float((mine - whole).abs().max())
            assert off < 1e-9, (
                f"{case}: rank {rank}'s gradient of its part of A is off by {off:.2g}. It needs only its B."
            )
        off = float((dx - x.grad).abs().max())
        assert off < 1e-9, (
            f"{case}: y and A's gradients are right, x's is off by {off:.2g}. From where does x get terms?"
        )
        made = f"{len(sums)} sum{'s' * (len(sums) != 1)} over the ranks"
        assert sums == [ranks] * 2, f"{case}: {made}, of {sums} tensors. Two do, one each way."
    print("one sum forward, one sum backward, on 1, 2 and 4 ranks")
