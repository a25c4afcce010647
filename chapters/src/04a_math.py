# %% [markdown] lang="en"
# # Why a model that is cut learns the same
#
# The chapters before this one cut the batch, the matrices, the layers and the optimizer, and each time the gradient was
# the one of a single process. Why does that work? This chapter goes back to the formulas and shows it three times: by
# hand with numbers so small that you can check them in your head, by algebra, and by float64 on the small GPT. At its
# end you can
#
# - take a step of gradient descent by hand, and cut it for two ranks in four ways;
# - say which two facts carry all of it: a gradient of a sum is a sum of gradients, and the chain rule;
# - find the mean of means in a program, and show a step that it sends the wrong way;
# - derive what a tensor rank has to sum in forward and what in backward, and test such a pair by one equation;
# - say for which optimizers updates may be merged in place of gradients, and for how many steps;
# - say why a right result agrees to 1e-12 and not to 0, and choose a tolerance that lets no bug through.
#
# **Time:** about two hours. **You need:** [data](03a_data_parallel.ipynb), [tensor](03b_tensor_parallel.ipynb) and
# [pipeline parallelism](03c_pipeline_parallel.ipynb), and school calculus. The chapter mirrors sections 4.1 and 4.2 of
# the document that this course follows and tests, 《大规模语言模型从理论到实践 混合并行》.
#
# ## Three questions on the chapters before
#
# 1. Four ranks have two rows each. Each computes the gradient of its own mean loss. What must be done with the four?
# 2. A matrix is cut by columns and the next one by rows. Where do the ranks talk, in forward and in backward?
# 3. What does the second stage of a pipeline send back to the first one?
#
# <details><summary>Answers</summary>
#
# 1. Summed and divided by 4: the shares are equal.
# 2. Forward: a sum behind the second matrix. Backward: a sum before the first one.
# 3. The gradient of the loss with respect to what it was sent.
#
# </details>

# %%
import numpy as np
import torch
import torch.nn.functional as F

import minipar
from minipar import Config, Mesh, World, connect, corpus, parallelize, viz
from minipar.collectives import (
    Collective,
    all_gather,
    all_reduce,
    enter,
    enter_sequence,
    gather,
    leave,
    leave_sequence,
    recv,
    reduce_scatter,
    send,
    split,
)
from minipar.data import rows
from minipar.widgets import explore

# %%
two, four = World(2), World(4)


def exact(values, **more):
    """A tensor of float64: 8 bytes a number, 53 significant bits."""
    return torch.tensor(values, dtype=torch.float64, **more)


# %% [markdown] lang="en"
# ## 1. One step, by hand
#
# The document's model (4.1) is $\hat y = f(W, b, x)$: a prediction from inputs $x$, weights $W$ and biases $b$. Its
# loss is the mean squared error, and it learns by gradient descent (4.2), with $\theta$ for all parameters together:
#
# $$L(\theta) = \frac1n \sum_{i=1}^{n} (y_i - \hat y_i)^2
#   \qquad \theta_\text{new} = \theta_\text{old} - \alpha\,\nabla_\theta L(\theta)$$
#
# ($b$ is a parameter as well as $W$: $\theta$ is both.) It is a simple example, and the document says so. A language
# model has a vector of logits for $\hat y$ and the cross-entropy for a loss. All that follows needs only what both have
# in common: the loss is a **sum over rows, divided by a number**.
#
# The smallest $f$ is a line, $\hat y = w x + b$. Two rows: $x = 1$ with $y = 3$, and $x = 2$ with $y = 5$. We begin at
# $w = 1$, $b = 0$.
#
# **Compute by hand:** the two predictions, the loss, and its derivatives for $w$ and $b$. (The derivative of
# $(\hat y - y)^2$ is $2(\hat y - y)\,x$ for $w$ and $2(\hat y - y)$ for $b$.) Then the step with $\alpha = 0.1$.

# %%
prediction = None  # (loss, for w, for b, new w, new b)

x, y = exact([1, 2]), exact([3, 5])


def squares(theta, x, y):
    """The squared errors of the rows, not yet divided by anything."""
    w, b = theta
    return (w * x + b - y) ** 2


def gradient(total, theta):
    return torch.autograd.grad(total, theta)[0]


start = exact([1, 0], requires_grad=True)
errors = squares(start, x, y)
g = gradient(errors.mean(), start)
after = start.detach() - 0.1 * g
print("you wrote:", prediction)
print("squares", errors.tolist(), "loss", errors.mean().item(), "gradient", g.tolist(), "after", after.tolist())
assert errors.tolist() == [4, 9] and g.tolist() == [-8, -5] and after.tolist() == [1.8, 0.5]

# %% [markdown] lang="en"
# The predictions are 1 and 2, so they miss by −2 and −3. The loss is (4 + 9)/2 = 6.5. For $w$:
# (2 · (−2) · 1 + 2 · (−3) · 2)/2 = (−4 − 12)/2 = −8. For $b$: (−4 − 6)/2 = −5. The step goes to $w = 1.8$, $b = 0.5$.
#
# The numbers that you just added are what this chapter is about: −4 and −12 come from one row each. Here they are as
# arrows. Lines are places of equal loss.

# %%
each = torch.stack([gradient(squares(start, x[i : i + 1], y[i : i + 1]).sum(), start) for i in (0, 1)])
drawing, (panel,) = viz.figure(6, 3.8)
w, b = torch.meshgrid(torch.linspace(0.4, 3.2, 80), torch.linspace(-0.6, 2, 80), indexing="xy")
loss = sum((w * xi + b - yi) ** 2 for xi, yi in zip(x, y, strict=True)) / 2
panel.contour(w, b, loss, levels=[0.1, 0.5, 1, 2, 4, 6.5, 9], colors=viz.LINE, linewidths=0.7)
arrows = {"row 1": each[0], "row 2": each[1], "their mean: the step": each.mean(0)}
for (name, arrow), color, width in zip(arrows.items(), (0, 1, 6), (1.5, 1.5, 3), strict=True):
    dw, db = (-0.1 * arrow).tolist()
    head = {"width": 0.006 * width, "head_width": 0.07, "length_includes_head": True}
    panel.arrow(1, 0, dw, db, color=viz.PALETTE[color], label=name, **head)
panel.plot([2], [1], "*", color=viz.INK, ms=12)
panel.text(2.1, 1.0, "loss 0", color=viz.INK, va="center", bbox={"fc": "white", "ec": "none", "pad": 1})
panel.set(xlabel="w", ylabel="b", aspect="equal")
panel.legend(fontsize=9, loc="upper right", framealpha=1)
alt = (
    "Lines of equal loss over w and b, an ellipse around the best point (2, 1). From (1, 0) three arrows: the step of "
    "row 1 alone to (1.4, 0.4), of row 2 alone to (2.2, 0.6), and between them their mean to (1.8, 0.5)."
)
viz.show(drawing, alt)
assert each.tolist() == [[-4, -4], [-12, -6]] and each.mean(0).tolist() == [-8, -5]

# %% [markdown] lang="en"
# ## 2. Data: the gradient of a sum
#
# Rank 0 has row 1, rank 1 has row 2. Write $\ell_i$ for the loss of row $i$, and $R_r$ for the rows of rank $r$. Then
#
# $$\nabla L = \nabla\,\frac1n \sum_{i=1}^n \ell_i = \frac1n \sum_r \sum_{i \in R_r} \nabla \ell_i
#   = \frac1n \sum_r g_r \qquad g_r = \nabla \sum_{i \in R_r} \ell_i$$
#
# Nothing is used but that a derivative of a sum is the sum of the derivatives. No row needs to know of another. It
# holds for every $f$ and for every loss that is a sum over rows. It holds at *one* $\theta$: all ranks must have the
# same parameters.
#
# Now two ranks, for real. Each computes $g_r$ from its row alone, one all-reduce sums, and then comes the division.


# %%
def data_parallel(theta, x, y):
    axis = connect(Mesh(dp=2))["dp"]
    mine = rows(x, 2)[axis.index], rows(y, 2)[axis.index]
    own = gradient(squares(theta, *mine).sum(), theta)
    return own, all_reduce(own, axis) / len(x)


for rank, (own, whole) in enumerate(two.run(data_parallel, start, x, y)):
    print(f"rank {rank}: own gradient {own.tolist()}, of all {whole.tolist()}")
    assert torch.equal(whole, g)

# %% [markdown] lang="en"
# −4 and −12 make −16, divided by 2 that is −8. Equal to one process, bit for bit: these numbers are small integers, and
# floating point has no need to round them. (Section 8 is about the other numbers.)
#
# ### Which n?
#
# The $n$ in the formula is the number of rows of the **whole** batch. A rank sees only its own. It is tempting to let
# each rank use the $n$ it knows, take a mean, and average the means. With equal shares that gives the same.
#
# There are three rows now: rank 0 has rows 1 and 2, and rank 1 has row 3, with $x = 3$ and $y = 1$.
#
# **Compute by hand** at $w = 1$, $b = 0$: the gradient of row 3, the right gradient of the three rows, and the mean of
# the two ranks' means. Then a step with $\alpha = 0.1$ for each: does the loss fall?

# %%
prediction = None  # for instance {"right": "falls", "mean of means": "falls"}

x3, y3 = exact([1, 2, 3]), exact([3, 5, 1])


def unequal(theta, x, y):
    axis = connect(Mesh(dp=2))["dp"]
    mine = slice(0, 2) if axis.index == 0 else slice(2, 3)
    errors = squares(theta, x[mine], y[mine])
    mean_of_means = all_reduce(gradient(errors.mean(), theta), axis) / axis.size
    count = all_reduce(exact(len(errors)), axis)
    return mean_of_means, all_reduce(gradient(squares(theta, x[mine], y[mine]).sum(), theta), axis) / count


wrong, right = two.run(unequal, start, x3, y3)[0]
losses = {"start": squares(start, x3, y3).mean().item()}
for name, direction in (("right", right), ("mean of means", wrong)):
    losses[name] = squares(start.detach() - 0.1 * direction, x3, y3).mean().item()
    print(f"{name:<14} gradient {[round(v, 3) for v in direction.tolist()]}")
print("you wrote:", prediction, "- losses:", {name: round(loss, 3) for name, loss in losses.items()})
assert losses["right"] < losses["start"] < losses["mean of means"]

# %% [markdown] lang="en"
# Row 3 has $\hat y = 3$ and misses by +2, so its gradient is (12, 4). The right mean for $w$ is
# (−4 − 12 + 12)/3 = −4/3. The mean of means is (−8 + 12)/2 = +2. It has the **other sign**: the step goes uphill. No
# learning rate, however small, would make it go down.
#
# What is wrong can be said exactly. With $n_r$ rows on each of $R$ ranks and the means $\bar g_r = g_r / n_r$,
#
# $$\underbrace{\sum_r \frac1R\,\bar g_r}_{\text{mean of means}}
#   - \underbrace{\sum_r \frac{n_r}{n}\,\bar g_r}_{\nabla L} = \sum_r \Big(\frac1R - \frac{n_r}{n}\Big)\,\bar g_r$$
#
# It is zero if all $n_r$ are equal, or if all means are. Else rows on a rank with few of them weigh too much.
#
# Does it always go uphill? **Before you move it:** for which $y$ of the third row does it, among the whole numbers from
# −2 to 7?

# %%
prediction = None  # for instance [-2, -1, 0, 1]


def both_gradients(third):
    target = exact([3, 5, third])
    three = torch.stack([gradient(squares(start, x3[i : i + 1], target[i : i + 1]).sum(), start) for i in range(3)])
    return target, three.mean(0), (three[:2].mean(0) + three[2]) / 2


def draw_steps(third):
    target, good, bad = both_gradients(third)
    drawing, (panel,) = viz.figure(6.4, 2.8)
    lengths = torch.linspace(0, 0.06, 41)
    for name, direction, color, style in (("right", good, 0, "-"), ("mean of means", bad, 6, "--")):
        curve = [squares(start.detach() - a * direction, x3, target).mean().item() for a in lengths]
        panel.plot(lengths, curve, style, color=viz.PALETTE[color], label=name, lw=2)
    way = "uphill" if good @ bad < 0 else "downhill"
    panel.set(xlabel="length of the step, α", ylabel="loss of all three rows")
    panel.set_title(f"third row: y = {third}; the mean of means goes {way}", fontsize=10)
    panel.legend(frameon=False, fontsize=9)
    slopes = f"gradient for w: {good[0].item():.2f}, by mean of means {bad[0].item():.2f}"
    return viz.describe(drawing, f"Loss along both steps, third row y = {third}; {slopes}: {way}.")


explore(draw_steps, third=range(-2, 8))

# %%
uphill = [third for third in range(-2, 8) if both_gradients(third)[1] @ both_gradients(third)[2] < 0]
print("you wrote:", prediction, "- uphill for y =", uphill)
assert uphill == [1]

# %% [markdown] lang="en"
# Only where the ranks pull in opposite directions with about the same force. Everywhere else the loss falls, along a
# wrong direction. That is the worse news: you would not notice. Nor does it average out with time, since whoever has
# short texts weighs more in every step.
#
# ### On the engine
#
# A language model's $n$ is the number of **tokens whose label counts**. Rows are unequal as soon as texts are: the
# short ones are filled up, and the labels of the filling are set to −100, which means "does not count". So even ranks
# with equally many rows have unequal $n_r$.
#
# We give four ranks two rows each. Of the first row all 32 labels count, of the second 28, and so on down to 4 of the
# last. With `step(..., local=True)` each rank brings its own rows. **Predict:** how far from the gradient of one
# process is the mean of means, and how far the one of `step`, as a share of the largest number in it?

# %%
prediction = None  # (mean of means, step)

config = Config()
tokens, targets = next(corpus.batches(steps=1, rows=8, context=32))
padded = targets.masked_fill(torch.arange(32) >= torch.arange(32, 0, -4)[:, None], -100)


def fresh(dtype=torch.float64):
    torch.manual_seed(0)
    return minipar.gpt(config).to(dtype)


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients])


def one_process(tokens, targets, dtype=torch.float64):
    model = fresh(dtype)
    F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=-100).backward()
    return flat(p.grad for p in model.parameters())


def distance(got, wanted):
    """The largest difference, as a share of the largest number."""
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


# %%
def mean_of_means(tokens, targets):
    axis = connect(Mesh(dp=4))["dp"]
    return all_reduce(one_process(rows(tokens, 4)[axis.index], rows(targets, 4)[axis.index]), axis) / axis.size


def by_step(tokens, targets):
    axis, model = connect(Mesh(dp=4))["dp"], parallelize(fresh(), Mesh(dp=4))
    model.step(rows(tokens, 4)[axis.index], rows(targets, 4)[axis.index], local=True)
    return flat(model.full_gradients().values())


counts = [(share != -100).sum().item() for share in rows(padded, 4)]
truth = one_process(tokens, padded)
unfair, fair = (distance(four.run(how, tokens, padded)[0], truth) for how in (mean_of_means, by_step))
print("labels that count, by rank:", counts)
print(f"you wrote: {prediction} - mean of means {unfair:.2f}, step {fair:.0e}")
assert counts == [60, 44, 28, 12] and unfair > 0.05 and fair < 1e-12

# %% [markdown] lang="en"
# One rank has five times as many labels as another, and its labels weigh five times less. `step` lets ranks pass
# **sums and counts** around: each divides by the count of all. The loss function it is given returns the two apart, so
# that the mistake is hard to make:

# %%
viz.show_source(minipar.cross_entropy)

# %% [markdown] lang="en"
# The same trap lies in gradient accumulation: microbatches with unequal counts, each with its own mean. In 2024 it was
# found in widely used training code, long after its release ([Hugging Face: Fixing Gradient
# Accumulation](https://huggingface.co/blog/gradient_accumulation)). Everybody's loss had been falling. `microbatches=`
# of `parallelize` is held to the same law:


# %%
def accumulated(tokens, targets, microbatches):
    model = parallelize(fresh(), Mesh(dp=4), microbatches=microbatches)
    model.step(tokens, targets)
    return flat(model.full_gradients().values())


for microbatches in (1, 2):
    off = distance(four.run(accumulated, tokens, padded, microbatches)[0], truth)
    print(f"microbatches: {microbatches}, distance to one process {off:.0e}")
    assert off < 1e-12

# %% [markdown] lang="en"
# ## 3. Tensor: the chain rule, sideways
#
# Now the parameters are cut, and every rank sees every row. The model gets a hidden layer with two numbers and a bend
# $\varphi$ between the two layers; ReLU, $\varphi(z) = \max(z, 0)$, is easy by hand:
#
# $$\hat y = v_1\,\varphi(u_1 x) + v_2\,\varphi(u_2 x)$$
#
# Rank 0 has $u_1$ and $v_1$, rank 1 has $u_2$ and $v_2$: the first layer is cut by columns, the second by rows. Take
# $x = 2$, $y = 7$, $u = (1, 3)$, $v = (2, 1)$.
#
# **Compute by hand:** $\hat y$, the loss $(\hat y - 7)^2$, and its derivatives for $v$, for $u$, and for $x$ (which a
# layer below would need). Which of them can a rank compute from its own numbers and $\hat y$ alone?

# %%
prediction = None  # {"y": ..., "v": [...], "u": [...], "x": ...}

x, y = exact(2, requires_grad=True), exact(7)
u, v = exact([1, 3], requires_grad=True), exact([2, 1], requires_grad=True)
output = (v * torch.relu(u * x)).sum()
((output - y) ** 2).backward()
alone = {"y": output.item(), "v": v.grad.tolist(), "u": u.grad.tolist(), "x": x.grad.item()}
print("you wrote:", prediction)
print("one process:", alone)
assert alone == {"y": 10, "v": [12, 36], "u": [12 * 2, 6 * 2], "x": 12 * 1 + 6 * 3}

# %% [markdown] lang="en"
# Hidden: 2 and 6. Then $\hat y$ = 2 · 2 + 1 · 6 = 10, the error is 3, and $d\hat y$ = 2 · 3 = 6 (we write $dz$ for the
# derivative of the loss with respect to $z$). Then $dv$ = 6 · (2, 6) = (12, 36). The hidden numbers get 6 · (2, 1) =
# (12, 6), and $du$ is that times $x$: (24, 12). For $x$, *both* paths count: 12 · 1 + 6 · 3 = 30.
#
# So a rank needs two things from the other: its part of $\hat y$, in forward, and its part of $dx$, in backward. Both
# are **sums**. For $dv$ and $du$ it needs nothing.
#
# In matrices, with $X$ for the inputs (a row each) and $d$ for derivatives of the loss: from $Y = XW$ follow
# $dX = dY\,W^\top$ and $dW = X^\top dY$. Cut $W$ and read off what each rank has:
#
# | cut | forward | $dW$ of a rank | $dX$ |
# |---|---|---|---|
# | columns, $W = [W_1\ W_2]$ | $Y_j = X W_j$, no talk | $X^\top dY_j$, no talk | $\sum_j dY_j W_j^\top$, **a sum** |
# | rows, $X = [X_1\ X_2]$ | $Y = \sum_i X_i W_i$, **a sum** | $X_i^\top dY$, no talk | $dX_i = dY\,W_i^\top$, no talk |
#
# Columns then rows: what the first gives, cut by columns, is what the second takes, and $\varphi$ acts on each number
# alone. So there is one sum in forward and one in backward. minipar's `leave` sums in forward and does nothing in
# backward, `enter` does nothing in forward and sums in backward.


# %%
def tensor_parallel(x, y, u, v, leave=leave):
    axis = connect(Mesh(tp=2))["tp"]
    x = x.detach().requires_grad_()
    mine = slice(axis.index, axis.index + 1)
    u, v = u.detach()[mine].requires_grad_(), v.detach()[mine].requires_grad_()
    output = leave((v * torch.relu(u * enter(x, axis))).sum(), axis)
    ((output - y) ** 2).backward()
    return {"y": output.item(), "v": v.grad.tolist(), "u": u.grad.tolist(), "x": x.grad.item()}


for rank, got in enumerate(two.run(tensor_parallel, x, y, u, v)):
    print(f"rank {rank}:", got)
    assert (got["y"], got["x"]) == (alone["y"], alone["x"])
    assert got["v"] + got["u"] == [alone["v"][rank], alone["u"][rank]]

# %% [markdown] lang="en"
# **Predict** three ways to get it wrong, with the numbers of our example:
#
# 1. The bend acts on each rank's partial sum, not on the whole: $\varphi(a) + \varphi(b)$ for $\varphi(a + b)$, with
#    $a = 4$ and $b = -6$.
# 2. The second layer has a bias of 1, and each rank adds it before the sum.
# 3. `leave` sums in backward, too. What is $du$ then?

# %%
prediction = None  # (φ(a) + φ(b) and φ(a + b), ŷ, du)


def sums_twice(x, axis):
    return Collective.apply(x, axis, all_reduce, all_reduce)


doubled = [got["u"] for got in two.run(tensor_parallel, x, y, u, v, sums_twice)]
a, b = exact([4, -6])
bends = (torch.relu(a) + torch.relu(b)).item(), torch.relu(a + b).item()
print("you wrote:", prediction, "- measured:", bends, "4 + 1 + 6 + 1 =", 12, "du", doubled)
assert bends == (4, 0) and doubled == [[48], [24]]

# %% [markdown] lang="en"
# 1. 4 in place of 0. A bend is not linear, so a sum must come before it. That is why a layer cut by rows cannot wait
#    with its sum until after the next GELU.
# 2. 12 in place of 11: the bias counts once for each rank. So the package adds it behind the sum.
# 3. (48, 24) in place of (24, 12): twice too large, as many times as there are ranks. Every rank computes the *same*
#    loss from the same $\hat y$. It is one loss, and not the sum of two. The way back from it is a copy.
#
# ### A test for pairs
#
# How do you know that a collective has the right partner? There is one equation for all of them. Forward is a linear
# map $A$ from what goes in to what comes out, over all ranks together. Backward must be its **adjoint** $A^\top$: for
# any $p$ that goes in and any $q$ of the shape of what comes out,
#
# $$\langle A p, q \rangle = \langle p, A^\top q \rangle$$
#
# The brackets are the sum of products of all numbers. One thing needs care: a number that every rank has a *copy* of
# is one number, and counts once. A number that each rank has for itself counts on each.
#
# | | goes in | comes out | forward | backward |
# |---|---|---|---|---|
# | `enter` | one, copied | each its own | nothing (a copy for each) | sum |
# | `leave` | each its own | one, copied | sum | nothing |
# | `gather` | shares | one, copied | all-gather | take your share |
# | `split` | one, copied | shares | take your share | all-gather |
# | `enter_sequence` | shares | each its own | all-gather | reduce-scatter |
# | `leave_sequence` | each its own | shares | reduce-scatter | all-gather |
#
# **Predict:** the test runs for these six and for `sums_twice`. Which one fails, and by which factor on four ranks?

# %%
prediction = None  # (name, factor)

COPIES_IN, COPIES_OUT = {"enter", "split"}, {"leave", "gather", "sums_twice"}


def two_sides(pair, name):
    axis = connect(Mesh(tp=4))["tp"]

    def some(shape, copied, seed):
        generator = torch.Generator().manual_seed(seed + (0 if copied else 1 + axis.index))
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def inner(a, b, copied):
        product = (a * b).sum()
        return (product if copied else all_reduce(product, axis)).item()

    p = some((2, 8, 4), name in COPIES_IN, 0).requires_grad_()
    y = pair(p, axis)
    q = some(y.shape, name in COPIES_OUT, 100)
    y.backward(q)
    return inner(y.detach(), q, name in COPIES_OUT), inner(p.detach(), p.grad, name in COPIES_IN)


# %%
pairs = (enter, leave, gather, split, enter_sequence, leave_sequence, sums_twice)
print("you wrote:", prediction)
for pair in pairs:
    for left, right in four.run(two_sides, pair, pair.__name__):
        verdict = "an adjoint" if abs(left - right) < 1e-12 * abs(left) else f"WRONG by {right / left:.3f}"
    print(f"{pair.__name__:<15} {left:>8.4f} {right:>8.4f}  {verdict}")
    assert ("WRONG" in verdict) == (pair is sums_twice)

# %% [markdown] lang="en"
# One line of algebra and a few random numbers, and no model at all. `sums_twice` is wrong by 4, the number of ranks.
# (It *is* the adjoint of a sum if what comes out counts on each rank for itself. Whether backward is right depends on
# what the copies mean.) The package says each pair once, side by side, so that nobody has to remember the partner:

# %%
viz.show_source(Collective, enter, leave, gather, split)

# %% [markdown] lang="en"
# ## 4. Pipeline: the chain rule, lengthwise
#
# Rank 0 has the first layer, rank 1 the second: $h = u x$ and $\hat y = v h$. Rank 0 sends $h$. The loss is known on
# rank 1 only. The chain rule says what has to come back:
#
# $$dv = d\hat y \cdot h \qquad \underbrace{dh = d\hat y \cdot v}_{\text{sent back}} \qquad du = dh \cdot x$$
#
# **Compute by hand** for $x = 2$, $y = 20$, $u = 3$, $v = 4$: the two numbers that travel, and both derivatives.
#
# **Your turn:** fill in the two halves, with `send(x, axis, to=...)` and `recv(like, axis, source=...)`.

# %%
prediction = None  # (there, back, du, dv)


def my_pipeline(x, y, u, v):
    axis = connect(Mesh(pp=2))["pp"]
    if axis.index == 0:
        return torch.zeros(())  # send h, receive dh, return du: your lines in place of this one
    return torch.zeros(())  # receive h, compute dŷ, send dh, return dv


numbers = [exact(value) for value in (2, 20, 3, 4)]
print("yours:", [got.item() for got in two.run(my_pipeline, *numbers)])


# %% jupyter={"source_hidden": true}
# One answer
def pipeline(x, y, u, v):
    axis = connect(Mesh(pp=2))["pp"]
    if axis.index == 0:
        send(u * x, axis, to=1)
        back = recv(x, axis, source=1)
        return {"sent": (u * x).item(), "du": (back * x).item()}
    h = recv(x, axis, source=0)
    error = 2 * (v * h - y)
    send(error * v, axis, to=0)
    return {"sent": (error * v).item(), "dv": (error * h).item()}


answers = two.run(pipeline, *numbers)
print("you wrote:", prediction, "- rank 0 and 1:", answers)
x, y, u, v = (number.clone().requires_grad_() for number in numbers)
((v * (u * x) - y) ** 2).backward()
assert answers == [{"sent": 6, "du": u.grad.item()}, {"sent": 32, "dv": v.grad.item()}]

# %% [markdown] lang="en"
# 6 goes there; $\hat y$ = 24 misses by 4, $d\hat y$ = 8, and 32 comes back. Rank 0 never learns $y$, nor $v$, nor the
# loss: **all that it needs to know of the rest of the model is one number** for each number that it sent. That is the
# whole chain rule.
#
# Microbatches bring nothing new: they are the sum of section 2 again, in time in place of space, and the same $n$ has
# to divide it.
#
# ## 5. ZeRO: a step for each number alone
#
# The document's update, $\theta_\text{new} = \theta_\text{old} - \alpha\,\nabla L$, is one equation for a whole vector.
# Written out it is an equation for each number, $w_\text{new} = w - \alpha\,dw$, and $b_\text{new} = b - \alpha\,db$,
# and neither knows of the other. So one rank can take the step for $w$, another the one for $b$. Take the two rows of
# section 1 again; rank 0 is to own $w$, rank 1 owns $b$.
#
# **Predict:** what does each rank hold after the reduce-scatter, after its step, and after the all-gather?

# %%
prediction = None  # for instance [[-8], [1.8], [1.8, 0.5]] for rank 0


def in_shares(theta, x, y):
    axis = connect(Mesh(dp=2))["dp"]
    own = gradient(squares(theta, rows(x, 2)[axis.index], rows(y, 2)[axis.index]).sum(), theta)
    share = reduce_scatter(own, axis) / len(x)
    stepped = theta.detach()[axis.index : axis.index + 1] - 0.1 * share
    return [t.tolist() for t in (own, share, stepped, all_gather(stepped, axis))]


x, y = exact([1, 2]), exact([3, 5])
held = two.run(in_shares, start, x, y)
print("you wrote:", prediction)
titles = ("gradient of own row", "reduce-scatter, ÷ 2", "step", "all-gather")
states = {title: [[round(value, 4) for value in h[i]] for h in held] for i, title in enumerate(titles)}
viz.show(viz.draw_tensors(states, hue=lambda value: 0 if value < 0 else 1))
assert all(h[3] == after.tolist() for h in held)

# %% [markdown] lang="en"
# The same (1.8, 0.5). An update that treats each number alone is **elementwise**. SGD is, with momentum too, and so is
# Adam: its $m$ and $v$ belong to one number. So whoever owns the number can own them.
#
# What is not elementwise: clipping by norm, which multiplies by $c / \lVert g \rVert$, a number that depends on all of
# $g$. A share of $g$ is not enough, but a *number* from each share is: $\lVert g \rVert^2 = \sum_r \lVert g_r
# \rVert^2$. **Predict** for $g = (-8, -5)$, clipped to norm 1: what does $w$'s share become with the right norm, and
# with the norm of the share alone?

# %%
prediction = None  # (right, by its own share)

norm = exact([-8, -5]).norm()
assert torch.isclose(norm**2, exact(64 + 25))
print(f"you wrote: {prediction} - right {-8 / norm.item():.3f}, by its own share {-8 / 8:.3f}")

# %% [markdown] lang="en"
# By its own share every rank's part has norm 1, whatever it was before: small gradients become as long as large ones.
#
# ## 6. All of it, on the model
#
# Four strategies, two facts. Data and microbatches: the gradient of a sum. Tensor and pipeline: the chain rule. ZeRO
# adds a third, about the update. Since each is an identity, they may be combined, in any order, and the result is still
# the gradient of one process. Now on the GPT, in float64 and in float32, each layout against one process in the same
# precision; the labels of section 2, so that counts are unequal.
#
# **Predict:** the distance for one layout in float64, and in float32? Does it grow with the number of axes?

# %%
prediction = None  # (float64, float32, grows?)

LAYOUTS = {
    "data 4": (Mesh(dp=4), {}),
    "ZeRO-1, 4": (Mesh(dp=4), {"zero": 1}),
    "ZeRO-2, 4": (Mesh(dp=4), {"zero": 2, "microbatches": 2}),
    "ZeRO-3, 4": (Mesh(dp=4), {"zero": 3, "microbatches": 2}),
    "tensor 4": (Mesh(tp=4), {}),
    "tensor 4, sequence": (Mesh(tp=4), {"sequence_parallel": True}),
    "context 4": (Mesh(cp=4), {}),
    "pipeline 4": (Mesh(pp=4), {"microbatches": 4}),
    "data 2 × tensor 2": (Mesh(dp=2, tp=2), {}),
    "data 2 × pipeline 2": (Mesh(dp=2, pp=2), {"microbatches": 2}),
    "pipeline 2 × tensor 2": (Mesh(pp=2, tp=2), {"microbatches": 2}),
    "data 2 × pipeline 2 × tensor 2": (Mesh(dp=2, pp=2, tp=2), {"microbatches": 2}),
}


def gradients_on(mesh, options, tokens, targets, dtype):
    model = parallelize(fresh(dtype), mesh, **options)
    model.step(tokens, targets)
    return flat(model.full_gradients().values())


# %%
eight, found = World(8), {}
truths = {dtype: one_process(tokens, padded, dtype) for dtype in (torch.float64, torch.float32)}
for name, (mesh, options) in LAYOUTS.items():
    world = eight if mesh.size == 8 else four
    for dtype in truths:
        answers = world.run(gradients_on, mesh, options, tokens, padded, dtype)
        found[name, dtype] = max(distance(got, truths[dtype]) for got in answers)
    print(f"{name:<32} float64 {found[name, torch.float64]:.0e}   float32 {found[name, torch.float32]:.0e}")
    assert found[name, torch.float64] < 1e-12 and found[name, torch.float32] < 1e-4
eight.close()
print("you wrote:", prediction)

# %% [markdown] lang="en"
# In float64 about 2e-15, ten times the distance between neighboring numbers near 1, whatever the layout; in float32
# about 6e-7, five times the distance there. It does not grow with the number of axes. Cutting adds no error of its own:
# it adds the same terms in another order. (Context parallelism, which cuts the positions of a row, has its own chapter,
# [03e](03e_long_context.ipynb). It is one more case of section 3: paths that meet are summed.)
#
# ## 7. Gradients or updates?
#
# Section 3.2.2 of the document merges *parameter updates*, and section 4.2 has the update rule that decides whether one
# may. Call the update $U(g)$, what a step adds to $\theta$. Ranks have gradients $g_r$. Merging gradients gives
# $U(\frac1R \sum_r g_r)$, merging updates $\frac1R \sum_r U(g_r)$. They are equal if $U$ is **linear**.
#
# - The document's rule has $U(g) = -\alpha g$. Linear. With momentum, $U$ is a weighted sum of all gradients so far:
#   linear, too.
# - Adam's first step is $-\alpha\,g / |g|$ for each number, its sign. Not linear: $U(c\,g) = U(g)$ for every $c > 0$.
#
# Our two rows again: their gradients for $w$ are −4 and −12, for $b$ −4 and −6. And once more with $y = 4$ in place of
# 5 for the second row. **Predict:** with Adam, are merged gradients and merged updates equal after the first step?
# After the second? In both cases?

# %%
prediction = None  # for instance {"y = 5": [True, False], "y = 4": [True, False]}


def train(kind, merge, steps, x, y, every=1):
    """Where θ ends on two ranks that merge gradients, or updates after every `every` steps."""
    axis = connect(Mesh(dp=2))["dp"]
    theta = exact([1, 0], requires_grad=True)
    optimizer = kind([theta], lr=0.1)
    mine = rows(x, 2)[axis.index], rows(y, 2)[axis.index]
    for step in range(1, steps + 1):
        theta.grad = gradient(squares(theta, *mine).mean(), theta)
        if merge == "gradients":
            theta.grad = all_reduce(theta.grad, axis) / axis.size
        optimizer.step()
        if merge == "updates" and step % every == 0:
            theta.data = all_reduce(theta.data, axis) / axis.size
    return theta.detach()


# %%
for kind in (torch.optim.SGD, torch.optim.Adam):
    for last, steps in ((5, 1), (5, 2), (4, 1), (4, 2), (4, 10)):
        a, b = (two.run(train, kind, merge, steps, x, exact([3, last]))[0] for merge in ("gradients", "updates"))
        shown = [[round(value, 4) for value in theta.tolist()] for theta in (a, b)]
        off = distance(b, a)
        print(f"{kind.__name__:<4} y = {last}, after {steps:>2}: {shown[0]} and {shown[1]}, apart {off:.0e}")
        assert (off < 1e-8) == (kind is torch.optim.SGD or last == 5 or steps == 1)
print("you wrote:", prediction)

# %% [markdown] lang="en"
# (First the weights for merged gradients, then for merged updates.) After one step Adam's two ways agree, because both
# ranks' gradients have the same sign, and a mean of equal signs is that sign. From the second step on $m/\sqrt v$
# depends on how a rank's gradients have *changed*, and for $y = 4$ the two part. For $y = 5$ they do not: by chance
# Adam's steps make both errors smaller by the same share each time. A test with these friendly numbers would have
# called the two ways equal. Test with random ones. (Chapter [03a](03a_data_parallel.ipynb) has the case in which the
# signs differ, and the first step already does.)
#
# The second half of the document's description says that nodes train *independently*, and then merge. For how long?
# **Predict** for plain SGD: the ranks take two steps each before they merge. Is that equal to two steps with merged
# gradients?

# %%
prediction = None

together = two.run(train, torch.optim.SGD, "gradients", 2, x, y)[0]
apart = two.run(train, torch.optim.SGD, "updates", 2, x, y, 2)[0]
print("you wrote:", prediction, "- merged each step:", [round(v, 4) for v in together.tolist()])
print("merged after two steps:", [round(v, 4) for v in apart.tolist()])
assert distance(apart, together) > 0.01

# %% [markdown] lang="en"
# Not equal, even for SGD. The second step's gradient is taken at another $\theta$ on each rank. For a squared error and
# a line, the gradient of rank $r$ is $H_r \theta - c_r$ with a matrix $H_r$, and two steps multiply $\theta$ by
# $(I - \alpha H_r)^2$. The mean of squares is not the square of the mean:
#
# $$\frac1R \sum_r (I - \alpha H_r)^2 - \Big(I - \alpha\,\frac1R \sum_r H_r\Big)^2
#   = \alpha^2\,\Big(\frac1R \sum_r H_r^2 - \bar H^2\Big)$$
#
# What is left is $\alpha^2$ times the *variance* of the $H_r$: small for a small learning rate and for ranks whose data
# are alike. That is why merging rarely (*local SGD*, Stich 2019; *federated averaging*, McMahan et al. 2017) works in
# practice, and why it is another algorithm. We can check the formula on our rows, where $H_r = 2\,(x, 1)^\top (x, 1)$:

# %%
vectors = torch.stack([x, torch.ones_like(x)], 1)  # (x, 1) of each row
H = 2 * vectors[:, :, None] * vectors[:, None, :]  # of each rank
c = 2 * vectors * y[:, None]
alpha, theta = 0.1, start.detach()
variance = (H @ H).mean(0) - H.mean(0) @ H.mean(0)
shift = (H @ c[:, :, None]).mean(0)[:, 0] - H.mean(0) @ c.mean(0)
difference = alpha**2 * (variance @ theta - shift)
print("formula ", [round(v, 6) for v in difference.tolist()])
print("measured", [round(v, 6) for v in (apart - together).tolist()])
assert distance(apart - together, difference) < 1e-12

# %% [markdown] lang="en"
# (The $c_r$ bring a second term of the same kind, `shift`.)
#
# ## 8. How large may a right answer's error be?
#
# The tables above show distances like 1e-15, and the tests of minipar allow 1e-12. Why not 0? Because the identities of
# this chapter are about real numbers, and computers have others. A float64 has 53 significant bits: between 1 and 2
# neighbors are $2^{-52}$ = 2.2e-16 apart, and each operation rounds to the nearest one.
#
# **Predict:** is 0.1 + 0.2 + 0.3 the same from the left as from the right? And 1 + 2 + 3?

# %%
prediction = None  # (tenths, whole numbers)

print("you wrote:", prediction)
print("tenths:", (0.1 + 0.2) + 0.3, 0.1 + (0.2 + 0.3), "- whole numbers:", (1.0 + 2) + 3 == 1.0 + (2 + 3))
assert (0.1 + 0.2) + 0.3 != 0.1 + (0.2 + 0.3)

# %% [markdown] lang="en"
# Whole numbers are exact up to $2^{53}$, which is why the examples by hand agreed bit for bit. For others the *order*
# of a sum shows in its last digits. And parallel training is nothing but another order: one process adds the rows'
# terms one way, four ranks another.
#
# How large does that get? Each addition makes an error of at most $2^{-53}$ of its result. In the worst case $N$ of
# them add up. Errors have either sign, so that they mostly cancel: like a walk with steps to the left and right, which
# after $N$ steps is about $\sqrt N$ away. We add the same random numbers in many orders:

# %%
random = np.random.default_rng(0)


def spread(count, dtype, orders=20):
    """The largest difference between sums of the same positive numbers, one after the other, as a share of the sum."""
    numbers = random.random(count).astype(dtype)
    sums = [np.add.accumulate(random.permutation(numbers))[-1].item() for _ in range(orders)]
    return (max(sums) - min(sums)) / sums[0]


sizes = [10**k for k in range(1, 7)]
spreads = {dtype: [spread(n, dtype) for n in sizes] for dtype in (np.float64, np.float32)}
for dtype, seen in spreads.items():
    eps = np.finfo(dtype).eps
    print(f"{dtype.__name__}: a million numbers in 20 orders lie within {seen[-1]:.0e} of their sum")
    assert all(found <= eps * n**0.5 for found, n in zip(seen, sizes, strict=True))

# %%
drawing, (panel,) = viz.figure(6.6, 3.2)
for (dtype, seen), color, marker in zip(spreads.items(), (0, 1), "os", strict=True):
    panel.loglog(sizes, [max(s, 1e-17) for s in seen], color=viz.PALETTE[color], marker=marker, label=dtype.__name__)
    walk = [np.finfo(dtype).eps * n**0.5 for n in sizes]
    panel.loglog(sizes, walk, color=viz.PALETTE[color], ls=":", lw=1)
panel.axhline(1e-12, color=viz.INK, ls="--", lw=1)
panel.text(10, 1.6e-12, "1e-12", color=viz.INK, fontsize=9)
panel.set(xlabel="numbers in the sum", ylabel="spread over 20 orders", ylim=(1e-17, 1e-2))
panel.legend(frameon=False, fontsize=9, loc="upper left")
alt = (
    "How far sums of the same positive numbers in 20 random orders lie apart, as a share of the sum, for 10 to a "
    "million numbers: rising about like the root of their number, in float64 to below 1e-12, in float32 to about 1e-5."
)
viz.show(drawing, alt)

# %% [markdown] lang="en"
# The dotted lines are $\sqrt N$ times the distance between neighbors. The spread stays below, and rises like them. So
# float64 reaches 1e-12 only with sums of very many numbers, while float32 is far above it from the start.
#
# Sums hide in every matrix product, and a product of another shape may add in another order. That is why even a layout
# that only cuts rows differs in the last digits.
#
# ### Which tolerance?
#
# A test has to let right programs pass and stop wrong ones. So look at both. Right ones: the layouts of section 6, in
# float64, in float32, and one with `dtype=torch.bfloat16`, in which matrix products have 8 bits. Wrong ones, planted:
#
# - all gradients four times too large;
# - the mean of means of section 2;
# - one label too many in the count, 145 in place of 144;
# - the same with a batch of 4 million labels;
# - one norm's bias, 128 numbers, of which one rank's part is not summed.
#
# **Predict:** which of them would a test in float32 with a tolerance of 1e-5 miss? And which in bfloat16 with 0.01?

# %%
prediction = None  # (float32, bfloat16)


def forgotten(name):
    """The gradient if half of the rows is missing in that of one parameter."""
    names = [n for n, _ in fresh().named_parameters()]
    sizes = [p.numel() for p in fresh().parameters()]
    half = padded.clone()
    half[::2] = -100
    parts, others = (list(g.split(sizes)) for g in (truth, one_process(tokens, half)))
    at = names.index(name)
    parts[at] = others[at] * (half != -100).sum() / (padded != -100).sum()
    return torch.cat(parts)


bugs = {
    "four times too large": 3.0,
    "mean of means": unfair,
    "one norm's bias": distance(forgotten("blocks.0.norm1.bias"), truth),
    "145 for 144": distance(truth * 144 / 145, truth),
    "4,000,001 for 4,000,000": distance(truth * 4_000_000 / 4_000_001, truth),
}
half_precision = four.run(gradients_on, Mesh(dp=4), {"dtype": torch.bfloat16}, tokens, padded, torch.float32)[0]
bf16 = distance(half_precision, truths[torch.float32])
print("you wrote:", prediction)

# %%
right = {
    "right, float64": [d for (_, dtype), d in found.items() if dtype is torch.float64],
    "right, float32": [d for (_, dtype), d in found.items() if dtype is torch.float32],
    "right, bfloat16": [bf16],
}
drawing, (panel,) = viz.figure(8, 3.6)
for place, (dots, color) in enumerate(zip(right.values(), (0, 1, 2), strict=True)):
    panel.semilogx(dots, [place] * len(dots), "o", color=viz.PALETTE[color], mec=viz.INK, ms=7)
for place, d in enumerate(bugs.values(), start=len(right)):
    panel.semilogx([d], [place], "X", color=viz.PALETTE[6], mec=viz.INK, ms=9)
panel.axvline(1e-12, color=viz.INK, ls="--", lw=1)
panel.text(1.3e-12, -0.75, "1e-12", color=viz.INK, fontsize=9, va="center")
panel.set_yticks(range(len(right) + len(bugs)), [*right, *bugs])
panel.set(xlim=(1e-16, 30), ylim=(len(right) + len(bugs) - 0.5, -1), xlabel="distance to one process")
told = "; ".join(f"{name} {d:.0e}" for name, d in bugs.items())
alt = (
    f"Distances on a logarithmic scale. Right layouts: in float64 below 1e-14, in float32 near 1e-6, in bfloat16 "
    f"{bf16:.0e}. Bugs: {told}. Only in float64 is there a wide gap between right and wrong, and 1e-12 lies in it."
)
viz.show(drawing, alt)
assert max(right["right, float64"]) < 1e-13 < 1e-12 < 1e-7 < min(bugs.values())
assert bugs["4,000,001 for 4,000,000"] < max(right["right, float32"]) < 1e-5 and bugs["145 for 144"] < 0.01
assert 1e-3 < bf16 < 0.01

# %% [markdown] lang="en"
# - In **float64** right programs lie near 2e-15, the smallest bug at 2e-7. Between them is nothing, over eight orders
#   of magnitude. A limit of 1e-12 leaves right programs a factor of 500, for larger models and longer sums, and is
#   200,000 times smaller than that bug.
# - In **float32** the smallest bug lies *below* the right programs. No limit can tell them apart, and 1e-5, a usual
#   one, lets it pass. Is a bug of 2e-7 worth finding? Here it is a count that is wrong by one, and with fewer labels it
#   is the one of 7e-3.
# - In **bfloat16** a right program is off by 5e-3, and the wrong count of 145 by 7e-3. A test in the precision of
#   training finds only bugs that are as large as its noise.
#
# So a program that is to run in 16 bits is tested in 64. What such a test shows is that the program computes the right
# *formula*. After an optimizer's step the limit must be wider: where a gradient is all but zero, Adam divides last
# digits by last digits ([03a](03a_data_parallel.ipynb)). So compare raw gradients.
#
# ## What you have now
#
# - **a gradient of a sum is the sum of gradients**: data parallelism and microbatches. The number that divides is the
#   count of the *whole* batch.
# - **the chain rule**: tensor ranks sum where paths meet; pipeline stages hand back one number for each that they got.
# - **adjoint**: the backward of a collective; $\langle Ap, q\rangle = \langle p, A^\top q\rangle$ tests it.
# - **elementwise updates** may be shared out. Clipping needs one sum more.
# - **linear updates** may be merged in place of gradients, after every step. Adam's may not.
# - **order shows in the last digits**: compare raw gradients in float64, with 1e-12.
#
# ## Four questions to take along
#
# 1. Two ranks have 3 and 1 rows. How much does the single row weigh in the mean of means, and how much should it?
# 2. What is the adjoint of a broadcast from rank 0?
# 3. Does a test with integers as weights and inputs find a wrong order of a sum? And a missing division?
# 4. Someone proposes to merge the ranks' weights every ten steps, with Adam, "since the document says so". What do you
#    answer?
#
# <details><summary>Answers</summary>
#
# 1. 1/2; it should be 1/4.
# 2. A sum to rank 0 (a *reduce*): what was copied must be added up on the way back.
# 3. It does not find the order, since sums of whole numbers are exact. It finds the division at once.
# 4. It trains, and it is another algorithm, for two reasons: Adam's update is not linear, and ten gradients are taken
#    at places that differ between ranks. Compare it by held-out loss, not by the law of equal gradients.
#
# </details>

# %%
two.close()
four.close()

# %% [markdown] lang="en"
# **Exercises:** [four small tasks](../exercises/04a_math.ipynb), with paper and pencil for the first:
#
#     python -m minipar grade exercises/04a_math.ipynb
#
# **Next:** [04b, cost models](04b_cost_models.ipynb): every layout gives the same gradient. Which one is the fastest?
#
# ## References
#
# - McMahan et al. 2017, Communication-Efficient Learning of Deep Networks from Decentralized Data,
#   [arxiv.org/abs/1602.05629](https://arxiv.org/abs/1602.05629)
# - Stich 2019, Local SGD Converges Fast and Communicates Little,
#   [arxiv.org/abs/1805.09767](https://arxiv.org/abs/1805.09767)
# - Hugging Face 2024, Fixing Gradient Accumulation,
#   [huggingface.co/blog/gradient_accumulation](https://huggingface.co/blog/gradient_accumulation)
