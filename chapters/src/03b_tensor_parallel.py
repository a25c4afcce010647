# %% [markdown] lang="en"
# # Tensor parallelism
#
# Data parallelism gives every rank the whole model. This chapter cuts the model itself: first between its layers, then
# through the middle of every matrix. At its end you can
#
# - say why ranks that own different layers mostly wait, and measure it;
# - cut a matrix by columns and by rows, and derive what has to be sent forward and backward;
# - write the two functions that all of Megatron-style parallelism rests on, and test that they are right;
# - cut an MLP, an attention, an embedding and a [cross-entropy](../docs/glossary.md#cross-entropy), and train a GPT on
#   four ranks with equal gradients;
# - count the bytes: 8 *bsh* (*t* − 1)/*t* elements for each layer and microbatch, whatever the size of the weights;
# - cut the sequence between the layers, too, and find a bug that a loss curve hides;
# - say when all this pays, and why it stays inside one machine.
#
# **Time:** about three hours. **You need:** [Ranks and collectives](02b_ranks_and_collectives.ipynb), and the first
# section of [Data parallelism](03a_data_parallel.ipynb). The chapter mirrors sections 3.2.1 and 3.3.1 of the document
# that this course follows and tests, an article in Chinese: 《大规模语言模型从理论到实践 混合并行》.
#
# **How to read it.** As before: write your prediction into the cell before you run it. Where you are asked to write a
# function, one answer follows in a folded cell: run it as any other, and click on its three dots to read it.
#
# ## Three questions on the chapters before
#
# 1. Four ranks all-reduce a tensor of 16 MB. How many bytes does each send? And in a reduce-scatter of it?
# 2. In data parallelism, a step with twice as many rows sends how many times as many bytes?
# 3. In `Mesh(dp=2, tp=4)`, which ranks are in the `tp` group of rank 6?
#
# <details><summary>Answers</summary>
#
# 1. 2 × 3/4 × 16 MB = 24 MB, and 12 MB.
# 2. The same number. What travels are gradients, as many as there are parameters, once a step.
# 3. 4, 5, 6 and 7.
#
# </details>

# %%
from functools import partial

import torch
import torch.nn.functional as F
from matplotlib.patches import Rectangle

import minipar
from minipar import Config, Mesh, RankError, World, connect, corpus, ledger, parallelize, tensor, train, viz
from minipar.collectives import (
    Collective,
    all_gather,
    all_reduce,
    enter,
    enter_sequence,
    gather,
    identity,
    leave,
    leave_sequence,
    recv,
    send,
    shard,
    split,
)
from minipar.cut import is_cut
from minipar.widgets import explore

# %% [markdown] lang="en"
# The same small GPT and the same text as always, in float64, so that whatever differs by more than the last digits is
# a bug. First the truth that everything below is compared with: the gradient of one process.

# %%
assert 2 * 3 / 4 * 16 == 24 and Mesh(dp=2, tp=4).line("tp", 6) == (4, 5, 6, 7)  # the answers above
world = World(4)
config = Config()  # 4 blocks of width 128 with 8 heads; 512 token ids
tokens, targets = next(corpus.batches(steps=1, rows=8, context=32))


def fresh(config=config, dtype=torch.float64):
    torch.manual_seed(0)  # the same seed, so the same weights, in every process
    return minipar.gpt(config).to(dtype)


def mean_loss(model, tokens, targets):
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def distance(got, wanted):
    """The largest difference, as a share of the largest number. Tensors, or dicts of them by name."""
    if isinstance(wanted, dict):
        got, wanted = (torch.cat([x[name].flatten() for name in wanted]) for x in (got, wanted))
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


# %%
model = fresh()
mean_loss(model, tokens, targets).backward()
alone = gradients(model)
P = sum(p.numel() for p in model.parameters())
print(f"{P:,} parameters in {len(alone)} tensors")
assert P == 940_800

# %% [markdown] lang="en"
# ## 1. First idea: each rank has other layers
#
# Section 3.2.1 of the document gives four steps for [model parallelism](../docs/glossary.md#model-parallelism): split
# the model (into layers, or into neurons), pass *parameters and gradients* between the nodes, compute *independently*
# on each, and put the results together. We try it with layers. Four blocks, four ranks, a block each. Rank 0 also has
# the embedding, rank 3 the head.
#
# What must travel? A block takes an **activation**, a tensor of $b$ rows × $s$ positions × $h$ numbers (the *width*,
# or *hidden size*), and gives another one of the same shape. That goes to the next rank. On the way back, each rank
# needs the gradient of what it gave, and computes the gradient of what it was given.
#
# (So that the cell stays short, every rank builds the whole model, and uses its own part only.)
#
# **Predict:** how many bytes does rank 1 send in a forward and backward pass? A number has 8 bytes. For comparison: a
# block has 198,272 parameters.

# %%
prediction = None  # bytes

b, s, h = *tokens.shape, config.width  # 8 rows, 32 positions, width 128


def layer_by_layer(tokens, targets):
    axis, model = connect(Mesh(pp=4))["pp"], fresh()
    me, last, like = axis.index, axis.size - 1, torch.empty(b, s, h, dtype=torch.float64)
    with ledger() as book:
        x = model.embed(tokens) if me == 0 else recv(like, axis, me - 1).requires_grad_()
        y = model.blocks[me](x)
        if me == last:
            logits = model.head(model.norm(y))
            F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        else:
            send(y, axis, me + 1)
            y.backward(recv(like, axis, me + 1))  # the gradient of y, from the one who used it
        if me > 0:
            send(x.grad, axis, me - 1)
    return gradients(model), book.bytes("pp")


# %%
parts, sent = zip(*world.run(layer_by_layer, tokens, targets), strict=True)
together = {name: grad for part in parts for name, grad in part.items()}
print("you wrote:", prediction, "- sent by ranks 0 to 3:", *(f"{n:,}" for n in sent))
print(f"distance to one process: {distance(together, alone):.0e}")
assert sum(p.numel() for p in model.blocks[0].parameters()) == 198_272
assert sent == (b * s * h * 8, 2 * b * s * h * 8, 2 * b * s * h * 8, b * s * h * 8)
assert distance(together, alone) < 1e-12

# %% [markdown] lang="en"
# 524,288 bytes: an activation forward, a gradient of an activation backward. **Not one parameter and not one gradient
# of a parameter traveled.** Each rank keeps the parameters of its own block and their gradients, and updates them by
# itself. Here the document is not right. What it describes is what *data* parallelism sends. The difference matters
# for every estimate: what travels here grows with the rows and positions of the batch, and not with the model's
# weights.
#
# The other half of the third step, "compute independently", is not right either.
#
# **Predict:** in which share of the time does a rank compute, if all blocks take equally long?

# %%
prediction = None  # 1, 1/2, 1/4 ...


def recorded(tokens, targets):
    model = parallelize(fresh(dtype=torch.float32), Mesh(pp=4))
    for _ in range(2):  # the first step is for warming up
        model.step(tokens, targets)
    return model.timeline()


long = next(corpus.batches(steps=1, rows=8, context=128))  # more to compute
run = world.run(recorded, *long)[0]
viz.show(viz.draw(run, title="four ranks, a block each: recorded on this machine"))
computing = sorted((span for span in run.spans if span.action.op.name in "FB"), key=lambda span: span.start)
assert [span.rank for span in computing] == [0, 1, 2, 3, 3, 2, 1, 0]
share = 1 - minipar.bubble(minipar.simulate(minipar.one_f_one_b(4, 1)))
print(f"you wrote: {prediction} - by arithmetic: {share}")
assert share == 1 / 4

# %% [markdown] lang="en"
# The order is the truth here: one rank after the other, forward from 0 to 3, backward from 3 to 0. At no time do two
# of them compute. Four ranks are exactly as fast as one (somewhat slower: they send), and each of them is idle for
# three quarters of the time. Section 3.3.1 of the document counts among the advantages of model parallelism that it
# makes full use of the computing resources and makes training faster, and among its drawbacks that some nodes may
# idle. For layers on different ranks, the drawback is the rule, and the advantage does not exist. What it does give is
# memory: each rank holds a quarter of the blocks.
#
# Two ways lead out. One gives the idle ranks other rows to work on in the meantime: that is
# [pipeline parallelism](03c_pipeline_parallel.ipynb), the next chapter. The other way lets all ranks work on *the
# same layer* at the same time. This is what the document's word "neurons" points at, and it is the subject of this
# one.
#
# ## 2. Second idea: each rank has a part of every matrix
#
# Nearly all parameters of a GPT sit in linear layers: $Y = XA$, with $X$ of $n$ tokens × *in* numbers, and $A$ of
# *in* × *out* weights. There are two ways to cut $A$ for two ranks.
#
# **By columns.** Each rank has some of the columns of $A$, that is, some of the output neurons:
#
# $$X\,[A_0 \;\; A_1] = [XA_0 \;\; XA_1]$$
#
# Each rank needs all of $X$, and gets its share of the columns of $Y$. Nothing is sent.
#
# **By rows.** Each rank has some of the rows of $A$, and needs only the columns of $X$ that meet them:
#
# $$[X_0 \;\; X_1]\begin{bmatrix}A_0 \\ A_1\end{bmatrix} = X_0A_0 + X_1A_1$$
#
# Each rank gets a matrix of the full shape of $Y$, but only one term of the sum: a **partial sum**. To have $Y$, the
# ranks must all-reduce.
#
# The explorer shows both. **Before you move it:** with 8 ranks, what does rank 3 hold of $X$, $A$ and $Y$ when $A$ is
# cut by rows?

# %%
prediction = None  # for instance "all of X, an eighth of A, ..."


def draw_cut(cut, ranks):
    drawing, (panel,) = viz.figure(8, 2.7)
    columns = cut == "columns"
    #            left, wide, high, in how many columns and rows, what ranks have
    matrices = {
        "X": (0.0, 2.2, 1.6, 1 if columns else ranks, 1, "whole on every rank" if columns else "a share each"),
        "A": (3.4, 2.4, 2.2, ranks if columns else 1, 1 if columns else ranks, "a share each"),
        "Y": (7.2, 2.4, 1.6, ranks if columns else 1, 1, "a share each" if columns else f"{ranks} partial sums"),
    }
    for name, (left, wide, high, across, down, text) in matrices.items():
        sheets = ranks if "partial" in text else 1
        for i in range(across * down * sheets):
            step = 0.6 * i / max(sheets - 1, 1) if sheets > 1 else 0
            x, y = left + wide / across * (i % across) + step, high / 2 - high / down * (1 + i % down) - step
            color = viz.PALE if across * down * sheets == 1 else viz.PALETTE[i]
            panel.add_patch(Rectangle((x, y), wide / across, high / down, fc=color, ec=viz.INK, lw=0.8))
            number = "" if color == viz.PALE or sheets > 1 else f"{i}"
            panel.text(x + 0.5 * wide / across, y + 0.06, number, fontsize=8, ha="center")
        panel.text(left + wide / 2, 1.45, f"{name}: {text}", ha="center", fontsize=10)
    panel.set(xlim=(-0.7, 10.6), ylim=(-1.6, 1.9), aspect="equal")
    return finish_cut(drawing, panel, matrices, cut, ranks)


# %%
def finish_cut(drawing, panel, matrices, cut, ranks):
    for x, sign in ((2.8, "×"), (6.5, "=")):
        panel.text(x, 0, sign, fontsize=16, ha="center", va="center")
    panel.axis("off")
    sends = "nothing is sent" if cut == "columns" else "an all-reduce adds the partial sums"
    panel.set_title(f"Y = XA with A cut by {cut} for {ranks} ranks: forward, {sends}", fontsize=10)
    held = "; ".join(f"{name}: {text}" for name, (*_, text) in matrices.items())
    return viz.describe(drawing, f"Y = XA, A cut by {cut} for {ranks} ranks. {held}. Forward, {sends}.")


explore(draw_cut, cut=["columns", "rows"], ranks=[4, 2, 8])

# %% [markdown] lang="en"
# Rank 3 holds an eighth of the columns of $X$, an eighth of the rows of $A$, and a $Y$ of full size that is one of
# eight terms.
#
# **Your turn.** Write both for a `nn.Linear`, without gradients for now. Two things to know. PyTorch stores the weight
# of a linear layer *transposed*, as (out, in), and computes `F.linear(x, weight, bias)` = x @ weight.T + bias. So the
# columns of $A$ are the rows of `weight`: dim 0. And `shard(x, axis, dim)` gives this rank's share of a tensor along a
# dimension. It sends nothing.


# %%
def my_columns(x, layer, axis):
    """All of x (..., in) -> this rank's share (..., out/t)."""
    return shard(layer(x), axis, -1)  # right, but every rank computes it all: your lines in place of this one


def my_rows(x_share, layer, axis):
    """This rank's share of x (..., in/t) -> all of y (..., out)."""
    return layer(all_gather(x_share, axis, -1))  # right, and useless for the same reason


# %% jupyter={"source_hidden": true}
# One answer: the bias of a row cut is added once, after the sum
def by_columns(x, layer, axis):
    return F.linear(x, shard(layer.weight, axis, 0), shard(layer.bias, axis, 0))


def by_rows(x_share, layer, axis):
    return all_reduce(F.linear(x_share, shard(layer.weight, axis, 1)), axis) + layer.bias


# %%
def a_layer(rows=16, inside=128, outside=512, seed=3):
    torch.manual_seed(seed)
    layer = torch.nn.Linear(inside, outside, dtype=torch.float64)
    return torch.randn(rows, inside, dtype=torch.float64), layer, torch.randn(rows, outside, dtype=torch.float64)


@torch.no_grad()
def both_cuts(columns, rows):
    axis, (x, layer, _) = connect(Mesh(tp=4))["tp"], a_layer()
    with ledger() as book:
        first = columns(x, layer, axis)
        after_columns = book.bytes("tp")
        second = rows(shard(x, axis, -1), layer, axis)
    return first, second, after_columns, book.bytes("tp")


x, layer, _ = a_layer()
y = layer(x).detach()
for name, cuts in {"yours": (my_columns, my_rows), "the answer": (by_columns, by_rows)}.items():
    first, second, sent, sent_by_both = zip(*world.run(both_cuts, *cuts), strict=True)
    assert distance(torch.cat(first, -1), y) < 1e-12 and all(distance(part, y) < 1e-12 for part in second)
    print(f"{name}: equal to one process; columns sent {sent[0]} bytes, rows {sent_by_both[0] - sent[0]:,}")
assert set(sent) == {0} and set(sent_by_both) == {2 * 3 / 4 * y.nbytes}

# %% [markdown] lang="en"
# ## 3. The way back
#
# Training needs gradients. Call the gradients of the loss $dX$, $dA$, $dY$. For $Y = XA$ the chain rule gives
# $dA = X^T dY$ and $dX = dY A^T$. Now with the cuts:
#
# | | cut by columns | cut by rows |
# |---|---|---|
# | forward | $Y_i = XA_i$ | $Y = \sum_i X_iA_i$: **all-reduce** |
# | gradient of the weight | $dA_i = X^T dY_i$, all here | $dA_i = X_i^T dY$, all here |
# | gradient of the input | $dX = \sum_i dY_i A_i^T$: **all-reduce** | $dX_i = dY A_i^T$, all here |
#
# The two are mirror images. The gradient of a weight never travels: each rank has all that it needs for the gradient of
# its own share. And where a [column cut](../docs/glossary.md#column-cut) needs nothing forward, it needs a sum
# backward.
#
# Does autograd know? Every rank gets the same `x`, computes its columns, and calls `backward`.
#
# **Predict:** each rank's `x.grad` is compared with the one of a single process. Is it right? If not, what is it?

# %%
prediction = None


def gradient_of_x(entered):
    axis, (x, layer, dy) = connect(Mesh(tp=4))["tp"], a_layer()
    x.requires_grad_()
    y = by_columns(entered(x, axis), layer, axis)
    y.backward(shard(dy, axis, -1))  # the gradient of this rank's columns
    return x.grad, all_reduce(layer.weight.grad, axis)


x, layer, dy = a_layer()
x.requires_grad_()
layer(x).backward(dy)
found, weights = zip(*world.run(gradient_of_x, identity), strict=True)
print("you wrote:", prediction)
print("distance of x.grad on ranks 0 to 3:", *(f"{distance(dx, x.grad):.2f}" for dx in found))
print(f"distance of their sum: {distance(sum(found), x.grad):.0e}")
print(f"distance of the weight's gradient, shares put together: {distance(weights[0], layer.weight.grad):.0e}")
assert min(distance(dx, x.grad) for dx in found) > 0.1 and distance(sum(found), x.grad) < 1e-12

# %% [markdown] lang="en"
# The weight is right, and every rank's `x.grad` is wrong: a partial sum. Nothing failed. Autograd works within one
# process, and cannot know that three other processes read the same `x`, too. Someone has to tell it.
#
# So we need an operation that does nothing forward, and an all-reduce backward. And for the [row
# cut](../docs/glossary.md#row-cut), one that does an all-reduce forward, and backward nothing, since $dY$ is the same
# on every rank already. They are known as $f$ and $g$ (Shoeybi et al. 2019,
# [Megatron-LM](https://arxiv.org/abs/1909.08053)). We call them `enter` and `leave`: you enter and leave a region of
# the model where ranks compute different things.
#
# **Your turn.** A `torch.autograd.Function` has two static methods: `forward(ctx, x, axis)` gives the result;
# `backward(ctx, gradient)` gets the gradient of that result, and gives one for each argument of `forward` (`None` for
# the axis). What `backward` needs to know is kept on `ctx`.


# %%
class MyEnter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return x.view_as(x)  # x itself, as a new tensor: autograd needs to tell the two apart

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None  # not yet right


def my_enter(x, axis):
    return MyEnter.apply(x, axis)


mine = world.run(gradient_of_x, my_enter)
print("yours:", "right" if max(distance(dx, x.grad) for dx, _ in mine) < 1e-12 else "not yet")


# %% jupyter={"source_hidden": true}
# One answer, and its mirror image
class Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return all_reduce(gradient, ctx.axis), None


class Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        return all_reduce(x, axis)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


for dx, _ in world.run(gradient_of_x, lambda x, axis: Enter.apply(x, axis)):
    assert distance(dx, x.grad) < 1e-12
print("right on every rank")

# %% [markdown] lang="en"
# ### Adjoints, and a test for them
#
# Why is "nothing" the gradient of a sum, and a sum that of "nothing"? Think of all ranks as one. `leave` takes four
# vectors and gives one, their sum: $L(x_0, x_1, x_2, x_3) = x_0 + x_1 + x_2 + x_3$. (That each rank gets a copy of the
# result is a matter of storage.) `enter` takes one vector and gives four, all equal: $E(x) = (x, x, x, x)$. As
# matrices, $L = [I\;I\;I\;I]$ and $E = L^T$. Backward multiplies by the transpose, also called the
# **[adjoint](../docs/glossary.md#adjoint)**. The transpose of a sum is a copy, and that of a copy is a sum.
#
# A transpose can be tested without knowing the matrix: $\langle Lx, g\rangle = \langle x, L^Tg\rangle$ for *all* $x$
# and $g$, where $\langle\,,\rangle$ is the sum of products of corresponding numbers. Draw random ones, and compare two
# numbers. Only one thing to watch: what is the *same* on every rank is one vector, and counts once; what differs from
# rank to rank counts on each.
#
# **Predict** which of these pass: `enter`; `leave`; a sum whose gradient is summed, too (which is what you get if
# every collective is taken to be its own gradient).

# %%
prediction = None


def random(shape, axis, same):
    """The same numbers on every rank, or other ones on each."""
    seed = 7 if same else 8 + axis.index
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def product(x, y, axis, same):
    total = (x * y).sum()
    return total if same else all_reduce(total, axis)


def both_products(operation, same_in, same_out):
    axis = connect(Mesh(tp=4))["tp"]
    x = random((4, 8, 16), axis, same_in).requires_grad_()
    y = operation(x, axis)
    g = random(y.shape, axis, same_out)
    y.backward(g)
    return product(y.detach(), g, axis, same_out).item(), product(x.detach(), x.grad, axis, same_in).item()


def summed_both_ways(x, axis):
    return Collective.apply(x, axis, all_reduce, all_reduce)


# %%
def check(operation, same_in, same_out):
    forward, backward = world.run(both_products, operation, same_in, same_out)[0]
    holds = abs(forward - backward) < 1e-9
    print(f"{operation.__name__:<17} {forward:>9.4f} {backward:>9.4f}  {'adjoint' if holds else 'NOT adjoint'}")
    return holds, backward / forward


print("you wrote:", prediction)
assert check(enter, True, False)[0] and check(leave, False, True)[0]
holds, factor = check(summed_both_ways, False, True)
assert not holds and abs(factor - 4) < 1e-9

# %% [markdown] lang="en"
# The third is four times too large. In a deep model, gradients would grow by a factor of four at each layer, from the
# back to the front. And Adam divides by a gradient's own size, so that a loss curve need not show it (chapter 3a).
# (The first two lines have equal numbers: what one was given as $x$, the other got as $g$.)
#
# (There is a way to read the matter in which a sum is its own adjoint: if each rank has a loss of its own, and one
# asks for the gradient of the sum of the four. PyTorch's `torch.distributed.nn` takes that view. Ours is that there is
# one loss, of which every rank has a copy. Both are consistent. Mixing them is the bug.)
#
# The package has three pairs, made by one class. `split` and `gather` cut a whole and put it together. The other two
# are for section 8.

# %%
viz.show_source(enter, leave, gather, split)

# %%
pairs = {split: (True, False), gather: (False, True), enter_sequence: (False, False), leave_sequence: (False, False)}
for operation, (same_in, same_out) in pairs.items():
    assert check(operation, same_in, same_out)[0]

# %% [markdown] lang="en"
# | | forward | backward |
# |---|---|---|
# | `enter` | nothing | all-reduce |
# | `leave` | all-reduce | nothing |
# | `split` | take a share | all-gather |
# | `gather` | all-gather | take a share |
# | `enter_sequence` | all-gather | reduce-scatter |
# | `leave_sequence` | reduce-scatter | all-gather |
#
# Read the table in pairs: each pair is one line, and the same line read backwards.
#
# **Exercise:** [tasks 03b.1 to 03b.3](../exercises/03b_tensor_parallel.ipynb): the shapes that a rank holds, and the
# two cuts with their way back, as layers of an engine of your own.
#
# ## 4. An MLP: columns, then rows
#
# An MLP is two linear layers with a nonlinear function between: $Z = \text{GELU}(XA)\,B$. The width of the middle is
# four times $h$. Each of the two matrices can be cut by columns or by rows.
#
# **Question.** Which of the four combinations lets the ranks compute from $X$ to $Z$ with a single all-reduce? Hint:
# GELU takes one number and gives one number.

# %%
prediction = None  # for instance ("rows", "rows")

gelu = F.gelu(torch.tensor([1.0, -1.0, 0.0]))
print("you wrote:", prediction)
print(f"GELU(1) + GELU(-1) = {gelu[0] + gelu[1]:.3f}, GELU(1 + -1) = {gelu[2]:.3f}")
assert gelu[0] + gelu[1] > 0.6 and gelu[2] == 0

# %% [markdown] lang="en"
# **Columns, then rows.** After a column cut a rank has complete numbers, for some of the neurons; GELU can be applied
# to them at once. And these are just the columns that the row cut of $B$ wants as its input. The all-reduce comes at
# the end. After a *row* cut, on the other hand, each rank has a term of a sum, and GELU of a sum is not the sum of
# the GELUs: one has to send before it.
#
# **Your turn.** With `enter` and `leave`, from `mlp.up` and `mlp.down`, in at most 6 lines:


# %%
def my_mlp(mlp, x, axis):
    return mlp(x)  # every rank computes all of it: your lines in place of this one


# %% jupyter={"source_hidden": true}
# One answer
def cut_mlp(mlp, x, axis):
    x = enter(x, axis)
    hidden = F.gelu(F.linear(x, shard(mlp.up.weight, axis, 0), shard(mlp.up.bias, axis, 0)))
    return leave(F.linear(hidden, shard(mlp.down.weight, axis, 1)), axis) + mlp.down.bias


# %%
def activations():
    draw = torch.Generator().manual_seed(4)
    return [torch.randn(b, s, h, generator=draw, dtype=torch.float64) for _ in range(2)]


def run_part(name, part, change=lambda module: None):
    """Forward and backward of one part of block 0: output, gradients of the input and of all parameters."""
    axis, module = connect(Mesh(tp=4))["tp"], fresh().blocks[0].get_submodule(name)
    change(module)
    x, dy = activations()
    with ledger() as book:
        y = part(module, x.requires_grad_(), axis)
        forward = book.calls("tp")
        y.backward(dy)
    return y.detach(), x.grad, gradients(module), forward, book.calls("tp") - forward, book.bytes("tp")


def in_one_process(name, change=lambda module: None):
    module = fresh().blocks[0].get_submodule(name)
    change(module)
    x, dy = activations()
    y = module(x.requires_grad_())
    y.backward(dy)
    return y.detach(), x.grad, gradients(module)


# %% [markdown] lang="en"
# Each rank's `shard` took a share of a whole weight, so its gradient is zero elsewhere. The sum over the ranks is the
# whole gradient. (Only for the comparison: in training, nobody needs it.) The bias of `down` is not cut. Its gradient
# must be whole on every rank by itself.


# %%
WHOLE = {"down.bias", "out.bias"}  # parameters that every rank has whole


def check_part(name, part, change=lambda module: None):
    """Largest distance to one process: of output, gradient of x, gradients of the parameters; and what was sent."""
    y, dx, wanted = in_one_process(name, change)
    answers = world.run(run_part, name, part, change)
    whole = {n: answers[0][2][n] if n in WHOLE else sum(answer[2][n] for answer in answers) for n in wanted}
    off = max(distance(found, right) for answer in answers for found, right in zip(answer[:2], (y, dx), strict=True))
    return max(off, distance(whole, wanted)), *answers[0][3:]


y, dx, wanted = in_one_process("mlp")
off, forward, backward, sent = check_part("mlp", cut_mlp)
print(f"the answer: distance {off:.0e}; calls forward {forward}, backward {backward}; {sent:,} bytes")
assert off < 1e-12 and (forward, backward) == (1, 1)
assert sent == 2 * (2 * 3 / 4 * b * s * h * 8)  # two all-reduces of an activation
yours = [answer[0] for answer in world.run(run_part, "mlp", my_mlp)]
print("yours: the output is", "right" if distance(yours[0], y) < 1e-12 else "not yet right")

# %% [markdown] lang="en"
# One call forward, one backward. Between them, each rank has a quarter of both matrices, a quarter of the hidden
# activations, and a quarter of the work.
#
# ### A bug that the first step cannot see
#
# It is tempting to give the row cut its bias as any other layer: `F.linear(hidden, share, mlp.down.bias)`. Then all
# four ranks add it, and the sum has it four times.
#
# **Predict:** we compare this version with one process: output, gradient of the input, all gradients of parameters.
# Once on the fresh model, and once after all parameters have been moved a little. What do you see?

# %%
prediction = None  # for instance ("wrong", "wrong")


def bias_on_every_rank(mlp, x, axis):
    x = enter(x, axis)
    hidden = F.gelu(F.linear(x, shard(mlp.up.weight, axis, 0), shard(mlp.up.bias, axis, 0)))
    return leave(F.linear(hidden, shard(mlp.down.weight, axis, 1), mlp.down.bias), axis)


def stir(module):
    """Move all parameters away from their initial values; the same on every rank."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=draw, dtype=p.dtype), alpha=0.1)


at_first = check_part("mlp", bias_on_every_rank)[0]
later, right = (check_part("mlp", part, stir)[0] for part in (bias_on_every_rank, cut_mlp))
print(f"you wrote: {prediction} - fresh: {at_first:.0e}, stirred: {later:.2f}; the right version, stirred: {right:.0e}")
assert at_first < 1e-12 and later > 0.01 and right < 1e-12

# %% [markdown] lang="en"
# On the fresh model the bug passes every test: biases start at zero, and four times zero is zero. Even the gradients
# are right. After the first step of an optimizer it shows. So a test of parallel code should start away from the
# initial point: minipar's own tests stir every parameter first.
#
# ## 5. Attention: whole heads
#
# Attention has four matrices: `q`, `k` and `v` make queries, keys and values from the input, `out` mixes what comes
# out. In between, every **head** works by itself, on its own columns of q, k and v. Here are 8 heads of 16 columns
# each. That is a column cut made by nature: give each rank some of the heads.
#
# - `q`, `k`, `v`: cut by columns, between heads;
# - softmax and all that: each rank for its own heads;
# - `out`: cut by rows, then one all-reduce.
#
# All three of `q`, `k` and `v` read the same `x`. Backward, each gives a partial sum of $dX$. **Question.** How many
# all-reduces does backward need for them?

# %%
prediction = None  # calls in backward


def cut_attention(attention, x, axis, together=True):
    def share(layer):
        return F.linear(inside if together else enter(x, axis), shard(layer.weight, axis), shard(layer.bias, axis))

    def heads(y):  # (rows, positions, heads * 16) -> (rows, heads, positions, 16)
        return y.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    inside = enter(x, axis)
    q, k, v = heads(share(attention.q)), heads(share(attention.k)), heads(share(attention.v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
    return leave(F.linear(y, shard(attention.out.weight, axis, 1)), axis) + attention.out.bias


three = check_part("attention", partial(cut_attention, together=False), stir)
one = check_part("attention", cut_attention, stir)
print("you wrote:", prediction)
print(f"each enters alone:     distance {three[0]:.0e}, backward {three[2]} calls, in all {three[3]:>9,} bytes")
print(f"they enter together:   distance {one[0]:.0e}, backward {one[2]} call,  in all {one[3]:>9,} bytes")
assert max(three[0], one[0]) < 1e-12 and (three[2], one[2]) == (3, 1) and three[3] == 2 * one[3]

# %% [markdown] lang="en"
# One is enough. If `x` enters once, autograd adds the three partial sums *on the rank*, and the total travels. If each
# layer enters by itself, three tensors travel. Both are right, so no test of values finds it; the bytes do. Megatron-LM
# makes one matrix of the three, which has the same effect. minipar leaves a model's layers as they are, so its layers
# remember what has entered already:

# %%
viz.show_source(tensor.Entrance.__call__, tensor.Entrance.forget)

# %% [markdown] lang="en"
# `enter` is called again only if another tensor comes in. `forget` is called when the attention is through.
#
# A head must not be cut in the middle, so $t$ has to divide the number of heads. The package checks it and says what
# would fit:


# %%
def two_heads():
    parallelize(minipar.gpt(Config(heads=2)), Mesh(tp=4))


try:
    world.run(two_heads)
except RankError as report:
    message = str(report)
    print(message[message.index("tp=4") :].splitlines()[0])

# %% [markdown] lang="en"
# (Models with *grouped-query attention* have fewer heads for keys and values than for queries: 8 in all sizes of Llama
# 3, [Llama Team 2024](https://arxiv.org/abs/2407.21783). With more ranks than that, each head of keys is on several.)
#
# **Exercise:** [task 03b.4](../exercises/03b_tensor_parallel.ipynb): heads that share their keys, right on 4 ranks and
# wrong on 2.
#
# ## 6. A whole model, and what it sends
#
# We have all that a block needs. We put the two functions into every block of the GPT. Embedding, norms and head stay
# whole for now: every rank computes them, with the same result.
#
# **Predict:** is the gradient of this model, cut by some twenty lines of ours, the one of a single process? And how
# many all-reduces are there in a forward and backward pass of 4 blocks?

# %%
prediction = None  # (equal?, calls)


def by_hand(tokens, targets):
    axis, model = connect(Mesh(tp=4))["tp"], fresh()
    stir(model)
    for block in model.blocks:
        block.attention.forward = partial(cut_attention, block.attention, axis=axis)
        block.mlp.forward = partial(cut_mlp, block.mlp, axis=axis)
    with ledger() as book:
        mean_loss(model, tokens, targets).backward()
    return gradients(model), book.calls("tp"), book.bytes("tp")


stirred = fresh()
stir(stirred)
mean_loss(stirred, tokens, targets).backward()
answers = world.run(by_hand, tokens, targets)
cut_here = {n for n in alone if (".attention." in n or ".mlp." in n) and not n.endswith(tuple(WHOLE))}
found = {n: sum(a[0][n] for a in answers) if n in cut_here else answers[0][0][n] for n in alone}
_, calls, sent = answers[0]
off = distance(found, gradients(stirred))
print(f"you wrote: {prediction} - distance {off:.0e}, {calls} calls, {sent:,} bytes")
assert off < 1e-12 and calls == 4 * 4 and sent == 4 * 8 * b * s * h * 3 / 4 * 8

# %% [markdown] lang="en"
# Equal. Four all-reduces a block: one forward and one backward for the attention, and the same for the MLP. An
# all-reduce of an activation of $bsh$ elements sends 2 *bsh* (*t* − 1)/*t*, so each rank sends
#
# $$8\,bsh\,\frac{t-1}{t} \quad\text{elements for each layer and microbatch.}$$
#
# **The package's version.** Our functions keep whole weights and take shares of them in each forward. That is fine to
# learn from, and saves no memory. The package cuts once: the parameter keeps its place and its name, and becomes
# smaller. Only the `forward` of the layer changes.

# %%
viz.show_source(tensor.colwise, tensor.rowwise)

# %% [markdown] lang="en"
# You know nearly all of it. `_is_plain` refuses a layer with a forward of its own. `sections` are for other models, in
# which several matrices lie in one (q, k and v, say), `_out_dim` and `_in_dim` for layers that store their weight as
# (in, out). `streams.go` is for section 9, `sequence` for section 8. `region.product` is a linear layer that computes
# the gradient of its weight a little later: while the all-reduce of the input's gradient is under way. Nobody waits for
# the gradient of a weight, so it can fill that time.
#
# `parallelize(model, Mesh(tp=4))` goes through all layers. **Predict:** how many of the 940,800 parameters does each
# of 4 ranks hold: exactly a quarter, more, less?

# %%
prediction = None  # parameters on a rank


def held(tokens, targets):
    axis, model = connect(Mesh(tp=4))["tp"], parallelize(fresh(), Mesh(tp=4))
    loss = model.step(tokens, targets)
    shares = sum(p.numel() for p in model.parameters() if is_cut(p, axis))
    return loss.item(), model.full_gradients(), shares, sum(p.numel() for p in model.parameters()) - shares


answers = world.run(held, tokens, targets)
for _, found, shares, copies in answers:
    assert distance(found, alone) < 1e-12 and 4 * shares + copies == P
print(f"you wrote: {prediction} - shares: {shares:,}, copies: {copies:,}, together {shares + copies:,} of {P:,}")
bars = {"shares": [P, (P - copies) / 4], "the same on every rank": [0, copies]}
viz.show(viz.draw_bars(["one process", "each of 4 ranks"], bars, "parameters", "What a rank holds at tp=4"))

# %% [markdown] lang="en"
# A little more than a quarter. Norms and the biases of row cuts are small, and whole on every rank, and so is the table
# of positions. All else is cut. And so are its gradients and what an optimizer keeps for it, without any further work:
# no rank ever sees another rank's share.
#
# ### Bytes, counted
#
# Now hold the formula against the ledger. Beside the layers, the package cuts the embedding and the head (section 7).
# They add 4 *bsh* elements, and the loss 6 *bs* (three numbers a token), all times (*t* − 1)/*t*.
#
# **Predict** what happens to the bytes of a step if you double the rows; the width; the number of blocks; the number
# of microbatches, with the same rows. And to the number of parameters, each time?

# %%
prediction = None  # for instance {"rows": (2, 1), "width": ..., "blocks": ..., "microbatches": ...}


def sent_in_a_step(config, rows, microbatches):
    tokens, targets = next(corpus.batches(steps=1, rows=rows, context=32))
    model = parallelize(fresh(config), Mesh(tp=4), microbatches=microbatches)
    with ledger() as book:
        model.step(tokens, targets)
    return book.bytes("tp"), book.calls("tp")


def formula(config, rows, t=4):
    b, s, h, layers = rows, 32, config.width, config.depth
    return round((8 * layers * b * s * h + 4 * b * s * h + 6 * b * s) * (t - 1) / t * 8)


cases = {
    "as before": (config, 8, 1),
    "rows": (config, 16, 1),
    "width": (Config(width=256), 8, 1),
    "blocks": (Config(depth=8), 8, 1),
    "microbatches": (config, 8, 2),
}

# %%
measured = {name: world.run(sent_in_a_step, *case)[0] for name, case in cases.items()}
sizes = {name: sum(p.numel() for p in fresh(case[0]).parameters()) for name, case in cases.items()}
print("you wrote:", prediction)
for name, (sent, calls) in measured.items():
    ratios = f"bytes × {sent / measured['as before'][0]:.2f}, parameters × {sizes[name] / P:.2f}"
    print(f"{name if name == 'as before' else 'twice the ' + name:<22} {sent:>11,} bytes, {calls} calls: {ratios}")
    assert sent == formula(*cases[name][:2])

# %% [markdown] lang="en"
# Rows and width double the bytes, while the parameters stay the same or grow almost fourfold. So the ratio of
# computing to sending gets *better* as models get wider: computing a layer costs $h^2$ a token, sending $h$. With more
# microbatches the bytes stay the same, and the calls double: each is smaller. (In data parallelism it is the other way
# round. There, bytes are those of the parameters, once a step.)
#
# When does a rank send? Let us record every call of rank 0, under data and under [tensor
# parallelism](../docs/glossary.md#tensor-parallelism).
#
# **Predict:** the number of calls of a step with 4 blocks, in each case.

# %%
prediction = None  # {"dp": ..., "tp": ...}


def calls_of_a_step(name, tokens, targets):
    model = parallelize(fresh(dtype=torch.float32), Mesh(**{name: 4}))
    model.step(tokens, targets)  # for warming up
    with ledger() as book:
        model.step(tokens, targets)
    start = min(span[1] for span in model.spans)
    return [(entry.start - start, entry.end - start) for entry in book.select(name)], model.spans[-1][2] - start


# %%
records = {name: world.run(calls_of_a_step, name, *long)[0] for name in ("dp", "tp")}
drawing, panels = viz.figure(8, 2.6, rows=2)
for panel, (name, (calls, end)) in zip(panels, records.items(), strict=True):
    end = max(end, *(stop for _, stop in calls))
    panel.barh(0, 1000 * end, 0.8, color=viz.PALE)
    for start, stop in calls:
        panel.barh(0, 1000 * (stop - start), 0.8, left=1000 * start, color=viz.PALETTE[5], ec=viz.INK, lw=0.4)
    panel.set(yticks=[], xlim=(0, 1010 * end), xlabel="ms since the step began, on this machine")
    panel.set_title(f"Mesh({name}=4): {len(calls)} calls, from the start of each until it was waited for", fontsize=9)
alt = "Calls of one step on rank 0. Under data parallelism they come at the end; under tensor parallelism all through."
viz.show(drawing, alt)
counts = {name: len(calls) for name, (calls, _) in records.items()}
print("you wrote:", prediction, "- recorded:", counts)
assert counts == {"dp": 2, "tp": 4 * 4 + 4}

# %% [markdown] lang="en"
# Data parallelism talks at the end of a step (two calls: one bucket of gradients, and the loss). Tensor parallelism
# talks all the time, and mostly somebody waits for it: the next layer cannot begin before the sum of this one is there.
# Gradients of weights can travel while other things are computed. Activations are needed *now*.
#
# ## 7. The two ends: embedding and loss
#
# A real vocabulary has more than 100,000 entries, so the embedding and the head are large matrices. Both are cut along
# the vocabulary.
#
# **The embedding** is a table with a row for each token id. Each rank has the rows of some ids. It looks up the ids
# that it has, puts zeros for all others, and the ranks add up: exactly one of them has no zero. (This is a row cut: an
# embedding is a product with a matrix of zeros and ones.)


# %%
def cut_embedding(ids, table, axis):
    share = shard(table, axis)
    first = axis.index * len(share)
    here = (ids >= first) & (ids < first + len(share))
    rows = F.embedding((ids - first).clamp(0, len(share) - 1), share)
    return leave(rows * here[..., None], axis)


def look_up(tokens):
    axis, table = connect(Mesh(tp=4))["tp"], fresh().embed.token.weight
    y = cut_embedding(tokens, table, axis)
    y.backward(activations()[1])
    return y.detach(), table.grad


y = F.embedding(tokens, table := fresh().embed.token.weight)
y.backward(activations()[1])
found = world.run(look_up, tokens)
assert torch.equal(found[0][0], y.detach()) and distance(sum(grad for _, grad in found), table.grad) < 1e-12
print("equal, even bit for bit: all but one of the terms are zero")

# %% [markdown] lang="en"
# **The head** makes **logits**, one number for each token and each entry of the vocabulary. Cut by columns, it gives
# each rank the logits of its entries. The obvious next step is to gather them and to call `F.cross_entropy`.
#
# **Question.** 8,192 tokens, a vocabulary of 128,000 (about that of Llama 3), float32. How many bytes are the whole
# logits on each rank, and how many does each of 8 ranks send to gather them?

# %%
prediction = None  # (bytes held, bytes sent)

whole = 8192 * 128_000 * 4
print(f"you wrote: {prediction} - held {whole / 1e9:.1f} GB, sent {7 / 8 * whole / 1e9:.1f} GB")
assert (round(whole / 1e9, 1), round(7 / 8 * whole / 1e9, 1)) == (4.2, 3.7)

# %% [markdown] lang="en"
# Too much, twice. But the loss does not need the logits together. For one token with logits $z_1 \dots z_V$ and the
# target $y$ it is
#
# $$-\log\frac{e^{z_y}}{\sum_j e^{z_j}} = \log\sum_j e^{z_j - m} - (z_y - m), \qquad m = \max_j z_j$$
#
# ($m$ changes nothing in exact arithmetic. It keeps the exponentials from overflowing.) A maximum, a sum, and one
# number that one rank has: three numbers a token travel, whatever the size of the vocabulary.
#
# **Your turn.** This rank has `logits` (tokens, vocab/t), those of the ids from `axis.index * logits.size(-1)` on, and
# all `targets` (tokens,). Give the mean loss, in at most 10 lines. `all_reduce(x, axis, "max")` gives the largest;
# `leave` sums, so that gradients come back. Which of the three needs no gradient?


# %%
def my_cross_entropy(logits, targets, axis):
    return F.cross_entropy(gather(logits, axis), targets)  # right, with whole logits: your lines in place of this one


# %% jupyter={"source_hidden": true}
# One answer: the maximum needs no gradient, since it does not change the result
def cut_cross_entropy(logits, targets, axis):
    size = logits.size(-1)
    first = axis.index * size
    top = all_reduce(logits.detach().amax(-1), axis, "max")
    total = leave((logits - top[:, None]).exp().sum(-1), axis)
    here = (targets >= first) & (targets < first + size)
    place = (targets - first).clamp(0, size - 1)
    own = logits.gather(-1, place[:, None]).squeeze(-1) - top
    return (total.log() - leave(own * here, axis)).mean()


# %%
def some_logits():
    torch.manual_seed(6)
    return 30 * torch.randn(b * s, config.vocab, dtype=torch.float64)


def loss_on_shares(loss, targets):
    axis = connect(Mesh(tp=4))["tp"]
    logits = shard(some_logits(), axis, -1).requires_grad_()
    with ledger() as book:
        value = loss(logits, targets.flatten(), axis)
        value.backward()
    return value.item(), logits.grad, book.bytes("tp")


logits = some_logits().requires_grad_()
value = F.cross_entropy(logits, targets.flatten())
value.backward()
for name, loss in {"yours": my_cross_entropy, "the answer": cut_cross_entropy}.items():
    values, shares, sent = zip(*world.run(loss_on_shares, loss, targets), strict=True)
    assert abs(values[0] - value.item()) < 1e-12 * value and distance(torch.cat(shares, -1), logits.grad) < 1e-12
    print(f"{name}: equal to one process, each rank sends {sent[0] / (b * s):g} bytes a token")
assert sent[0] == 3 * 2 * 3 / 4 * 8 * b * s

# %% [markdown] lang="en"
# Three numbers of 8 bytes, each sent 2 × 3/4 times: 36 bytes a token. Backward sends nothing at all: the gradient of
# the logits is softmax minus one at the target, and each rank has all that its own share needs.
#
# The package writes that backward out, so that only the probabilities are kept, in the memory of the exponentials:

# %%
viz.show_source(tensor._VocabularyParallel.forward, tensor._VocabularyParallel.backward)

# %% [markdown] lang="en"
# It also sends the sum and the target's logit in one call, treats labels of −100 (which do not count), and takes
# shares of unequal size. Let us look at the head of the parallel model during a step. Are there whole logits on any
# rank?


# %%
def shapes_at_the_head(tokens, targets):
    model, seen = parallelize(fresh(), Mesh(tp=4)), []
    model.module.head.register_forward_hook(lambda layer, inputs, logits: seen.append(tuple(logits.shape)))
    model.step(tokens, targets)
    model(tokens)  # for inference, one wants them whole
    return seen


print(*world.run(shapes_at_the_head, tokens, targets))
assert world.run(shapes_at_the_head, tokens, targets) == [[(b, s, 512 // 4), (b, s, 512)]] * 4

# %% [markdown] lang="en"
# In training, each rank has a quarter of the vocabulary. In inference the head gathers.
#
# **Exercise:** [tasks 03b.5 and 03b.6](../exercises/03b_tensor_parallel.ipynb): embedding and loss for any number of
# ids, padding too, under a budget of bytes.
#
# ## 8. Sequence parallelism: between the cuts
#
# Follow an activation through a block. Inside attention and MLP each rank has a quarter. But between them, where
# norms, dropout and the sums with `x` are, every rank has *all* of it, and all four compute the same. That wastes a
# little work, and not so little memory: what is kept for backward.
#
# A norm treats each position by itself. So do dropout and the sum. Then each rank could do a part of the *positions*.
# Before the cut region the ranks need all positions: an all-gather. Behind it, they need the sum, but each only for its
# own positions: a reduce-scatter. This is **[sequence parallelism](../docs/glossary.md#sequence-parallelism)**
# (Korthikanti et al. 2022, [Reducing activation recomputation](https://arxiv.org/abs/2205.05198)).
#
# **Before you move the explorer:** an all-reduce becomes an all-gather and a reduce-scatter. Does a rank send more than
# before, less, the same?

# %%
prediction = None

PARTS = ("x", "norm", "q, k, v", "heads", "out", "x +", "norm", "up, GELU", "down", "x +")
INSIDE = {2, 3, 7}  # cut by width; 4 and 8 give partial sums
TALK = {  # forward at the entrance, forward at the exit, backward at the exit, backward at the entrance
    "tensor": ("", "all-reduce", "", "all-reduce"),
    "tensor + sequence": ("all-gather", "reduce-scatter", "all-gather", "reduce-scatter"),
}


def state(i, cut, direction):
    """What each rank has of the activation (or of its gradient) behind a part."""
    if i in INSIDE:
        return "columns"
    if i in (4, 8):
        return "partial" if direction == "forward" else "whole"
    return "whole" if cut == "tensor" else "positions"


# %%
def draw_block(cut, direction, ranks=4):
    drawing, (panel,) = viz.figure(9, 3.3)
    for i, name in enumerate(PARTS):
        how = state(i, cut, direction)
        for rank in range(ranks):
            look = {"ec": viz.INK, "lw": 0.6, "fc": viz.PALETTE[rank], "hatch": "///" if how == "partial" else None}
            wide, high = (0.64 / ranks if how == "columns" else 0.64), (0.64 / ranks if how == "positions" else 0.64)
            x = i + (0.16 * rank if how == "columns" else 0)
            y = rank + (0.16 * rank if how == "positions" else 0)
            panel.add_patch(Rectangle((i, rank), 0.64, 0.64, fc="white", ec=viz.LINE, lw=0.4, ls=":"))
            panel.add_patch(Rectangle((x, y), wide, high, **look))
        panel.text(i + 0.32, -0.2, name, ha="center", fontsize=9)
    enters, leaves = TALK[cut][:2] if direction == "forward" else TALK[cut][:1:-1]
    for place, talk in ((1, enters), (4, leaves), (6, enters), (8, leaves)):
        if talk:
            panel.axvline(place + 0.82, 0.12, 0.86, color=viz.PALETTE[6], lw=2)
            panel.text(place + 0.82, 4.1, talk, ha="center", fontsize=9, color=viz.INK)
    panel.set(xlim=(-0.75, 10.1), ylim=(4.4, -0.6))
    panel.set_yticks([rank + 0.32 for rank in range(ranks)], [f"rank {rank}" for rank in range(ranks)])
    return finish_block(drawing, panel, cut, direction, (enters, leaves))


# %%
def finish_block(drawing, panel, cut, direction, talks):
    panel.set(xticks=[])
    panel.tick_params(axis="y", length=0)
    panel.spines[:].set_visible(False)
    arrow = "→ forward: activations" if direction == "forward" else "← backward: gradients of activations"
    panel.set_title(f"{cut}, {arrow} (full box: whole; strip: a share; hatched: a partial sum)", fontsize=9)
    listed = "; ".join(f"{name}: {state(i, cut, direction)}" for i, name in enumerate(PARTS))
    talk = f"at the entrances {talks[0] or 'nothing'}, at the exits {talks[1] or 'nothing'}"
    return viz.describe(drawing, f"A block under {cut}, {direction}. What ranks have of {listed}. Sent {talk}.")


explore(draw_block, cut=list(TALK), direction=["forward", "backward"])

# %% [markdown] lang="en"
# The same number of bytes, as an all-reduce *is* a reduce-scatter and an all-gather: each half sends
# *bsh* (*t* − 1)/*t*. Again 8 of them for each layer, counting both directions. Only the embedding costs one *bsh*
# more: its result is summed, then cut, and the gradient of a cut is an all-gather. And at the end of a step 26 small
# vectors of *h* elements are summed. What they are, you will find out below.
#
# (If a rank keeps only its share of the gathered inputs for backward, and gathers once more there, it sends 10 in place
# of 8 and keeps less. minipar keeps the gathered ones.)


# %%
def step_of(config, sequence, tokens, targets, dtype=torch.float64):
    """A step on tp=4: gradients, bytes sent, and bytes that forward keeps for backward, parameters not counted."""
    model, kept = parallelize(fresh(config, dtype), Mesh(tp=4), sequence_parallel=sequence), {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(x):  # PyTorch calls it with each tensor that it keeps for backward
        if (memory := x.untyped_storage()).data_ptr() not in own:
            kept[memory.data_ptr()] = memory.nbytes()
        return x

    with ledger() as book, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model.step(tokens, targets)
    return model.full_gradients(), book.bytes("tp"), sum(kept.values())


for sequence in (False, True):
    for found, sent, _ in world.run(step_of, config, sequence, tokens, targets):
        assert distance(found, alone) < 1e-12
        assert sent == formula(config, b) + sequence * (b * s * h + 2 * 26 * h) * 3 / 4 * 8
    print(f"sequence_parallel={sequence!s:<5} distance {distance(found, alone):.0e}, {sent:,} bytes")

# %% [markdown] lang="en"
# Now the memory: what does a rank keep of a layer's forward for its backward? In units of *bsh* numbers:
#
# | kept | tensor | tensor + sequence |
# |---|---|---|
# | inputs of the two norms | 2 | 2/*t* |
# | inputs of q, k, v and of `up`, whole | 2 | 2 |
# | q, k, v, and what attention gives | 4/*t* | 4/*t* |
# | before and after GELU, each four times as wide | 8/*t* | 8/*t* |
#
# **Predict** both sums for *t* = 4. We measure with hooks that PyTorch calls for every tensor it keeps, on models of 4
# and 8 blocks: the difference is four layers.

# %%
prediction = None  # (tensor, tensor + sequence)

by_hand = {"tensor": 4 + 12 / 4, "tensor + sequence": 2 + 14 / 4}
kept = {}
for name, sequence in (("tensor", False), ("tensor + sequence", True)):
    four, eight = (world.run(step_of, Config(depth=depth), sequence, *long, torch.float32)[0][2] for depth in (4, 8))
    kept[name] = (eight - four) / 4 / (long[0].numel() * h * 4)
    assert abs(kept[name] - by_hand[name]) < 0.2
print("you wrote:", prediction, "- by hand:", *by_hand.values())
bars = {"kept for backward": list(kept.values())}
viz.show(viz.draw_bars(list(kept), bars, "× bsh numbers on each of 4 ranks, measured", "Activations kept for a layer"))

# %% [markdown] lang="en"
# (The measured numbers are a little larger: each norm also keeps two numbers a position, attention one a head.) What
# does not shrink are the gathered inputs in the second line of the table. Korthikanti et al. keep only this rank's
# share of them, and gather again in backward, as said above: then 5.5 becomes 4.

# %%
assert 14 / 4 + 2 / 4 == 4

# %% [markdown] lang="en"
# ### The bug that hides in the norms
#
# A norm has two parameters, a scale and a shift. With sequence parallelism each rank's norm sees a quarter of the
# positions. So what is the gradient of its scale on that rank? A partial sum. Nothing in the layer shows it: the norm
# is not cut, it is an ordinary `nn.LayerNorm`. The same holds for the biases of row cuts, which are added to a quarter
# of the positions.
#
# The package marks such parameters when it lays the model out, and sums their gradients once at the end of a step:

# %%
viz.show_source(tensor.sequence_parallel, tensor.replicated_with_grad_allreduce, train.Parallel._sum_partial)

# %% [markdown] lang="en"
# Suppose that we forget the sum. We replace `_sum_partial` by a function that does nothing, and train for 12 steps with
# AdamW, right and wrong.
#
# **Predict:** the loss of the first step; the loss after 12 steps; which parameters of the gradient are wrong.

# %%
prediction = None


def train_for(steps, forget, kind=torch.optim.AdamW, lr=1e-3):
    model = parallelize(fresh(dtype=torch.float32), Mesh(tp=4), sequence_parallel=True)
    if forget:
        model._sum_partial = lambda: None
    optimizer, losses = kind(model.parameters(), lr=lr), []
    for batch in corpus.batches(steps=steps, rows=8, context=32, seed=1):
        losses.append(model.step(*batch).item())
        optimizer.step()
    return losses, {name: p.detach().clone() for name, p in model.named_parameters() if "norm" in name}


# %%
right, wrong = (world.run(train_for, 12, forget) for forget in (False, True))
drawing, (panel,) = viz.figure(6.5, 2.8)
panel.plot(range(1, 13), right[0][0], color=viz.PALETTE[0], linewidth=6, label="right")
panel.plot(range(1, 13), wrong[0][0], color=viz.PALETTE[6], label="norm gradients not summed")
panel.set(xlabel="step", ylabel="loss", xticks=range(1, 13))
panel.legend(frameon=False, fontsize=9)
viz.show(drawing, "Loss over 12 steps with and without the sum of norm gradients: the two curves lie on each other.")
gap = max(abs(x - y) for x, y in zip(right[0][0], wrong[0][0], strict=True))
print(f"you wrote: {prediction} - the largest difference of the losses: {gap:.4f}")
assert abs(right[0][0][0] - wrong[0][0][0]) < 1e-6 and gap < 0.1

# %% [markdown] lang="en"
# Would you have seen it? Two things would have told. The first is a look at the weights: a norm is a copy on each
# rank, so all four must be equal, always. The second is the law: the raw gradient, in float64, against one process.


# %%
def first_gradient(tokens, targets, forget):
    model = parallelize(fresh(), Mesh(tp=4), sequence_parallel=True)
    if forget:
        model._sum_partial = lambda: None
    model.step(tokens, targets)
    return model.full_gradients()


for name, answers in {"right": right, "wrong": wrong}.items():
    apart = max((answer[1][n] - answers[0][1][n]).abs().max().item() for answer in answers for n in answer[1])
    print(f"{name}: norms of the four ranks differ by at most {apart:.0e}")
    assert (apart == 0) == (name == "right")
found = world.run(first_gradient, tokens, targets, True)[0]
largest = max(g.abs().max() for g in alone.values())
broken = [name for name in alone if (found[name] - alone[name]).abs().max() > 1e-12 * largest]
print(f"gradient law broken for {len(broken)} of {len(alone)} tensors, in block 0 and at the end:")
print(*(name for name in broken if name.startswith(("blocks.0", "norm"))), sep="\n")
assert all("norm" in name or name.endswith(("out.bias", "down.bias")) for name in broken) and len(broken) == 4 * 6 + 2

# %% [markdown] lang="en"
# Every norm and every bias of a row cut, and nothing else. The ranks have drifted apart: they no longer train one
# model.
#
# **Exercise:** [task 03b.7](../exercises/03b_tensor_parallel.ipynb): somebody has mended this, and now all ranks agree
# on a wrong gradient.
#
# ## 9. Randomness
#
# Dropout sets random elements to zero. On four ranks, each draws its own random numbers. From which seed?
#
# **Predict,** for `tp` = 4: outside of the cut region (on `x`, which every rank has whole), should the ranks draw the
# same numbers or their own? And inside, on their shares of the heads?

# %%
prediction = None  # ("same" or "own" outside, "same" or "own" inside)


def kept_elements(own):
    axis = connect(Mesh(tp=4))["tp"]
    torch.manual_seed(11 + axis.index * own)
    return (F.dropout(torch.ones(7), 0.5) != 0).int().tolist()


masks = {f"{'own seeds' if own else 'one seed'} (1: kept)": world.run(kept_elements, own) for own in (False, True)}
viz.show(viz.draw_tensors(masks, hue=lambda value: 0 if value else 1))
one, several = masks.values()
assert len(set(map(tuple, one))) == 1 and len(set(map(tuple, several))) == 4

# %% [markdown] lang="en"
# - **Outside**, the rows of the picture are copies of one activation. They must stay equal: *one seed*. With own seeds
#   each rank goes on with another `x`, the sums mix them, and the gradient is one of no model at all.
# - **Inside**, the rows are shares of one wide activation. There, *own seeds*: with one seed the pattern repeats after
#   every share, so that head 0 and head 2 always lose the same elements. The model still trains, only with less
#   randomness than it was promised.
#
# Neither raises an error. Megatron-LM keeps two random streams for this and switches at the borders, and so does
# minipar for whatever draws random numbers. `go` was called in the column and row cuts of section 6:

# %%
viz.show_source(minipar.randomness.Streams.go)

# %% [markdown] lang="en"
# This makes dropout *correct*, but a run on 4 ranks drops other elements than a run on one, so the two cannot be
# compared. For `nn.Dropout`, minipar does more: whether an element is dropped depends on where it lies in the *whole*
# tensor, and on nothing else. Each rank draws the row's mask whole and takes its part. It costs some drawing, and it
# makes the law hold with dropout, too.
#
# **Predict:** the gradient of a model with dropout, on four ranks that share the rows (`dp`), and on four that share
# each matrix, with and without sequence parallelism. How far apart are they?

# %%
prediction = None


dropping = Config(dropout=0.1)


def dropped(mesh, sequence, tokens, targets):
    model = parallelize(fresh(dropping), mesh, sequence_parallel=sequence)
    model.step(tokens, targets)
    return model.full_gradients()


by_rows_of_the_batch = world.run(dropped, Mesh(dp=4), False, tokens, targets)[0]
print("you wrote:", prediction)
print(f"with and without dropout: {distance(by_rows_of_the_batch, alone):.2f}")
for sequence in (False, True):
    off = distance(world.run(dropped, Mesh(tp=4), sequence, tokens, targets)[0], by_rows_of_the_batch)
    print(f"dp=4 and tp=4, sequence_parallel={sequence}: {off:.0e}")
    assert off < 1e-12
assert distance(by_rows_of_the_batch, alone) > 0.01

# %% [markdown] lang="en"
# Four ranks drop what one would drop, and the law holds to the last digits.
#
# **Exercise:** [task 03b.8](../exercises/03b_tensor_parallel.ipynb): dropout that knows its place, on copies and on
# shares.
#
# ## 10. A plan
#
# Which layers are cut how? The model says it, in a **[plan](../docs/glossary.md#plan)**: a dictionary from the names of
# layers to styles, where `*` stands for a number.

# %%
for layer, style in fresh().tp_plan.items():
    print(f"{layer:<22} {style}")

# %% [markdown] lang="en"
# Each style is one function, as `colwise` and `rowwise` above. `cut_layers` walks through the model and applies them.
# So a model needs no parallel code of its own: `minipar.model` does not import anything of this chapter.
#
# The names of the styles are not ours. The library *transformers* publishes such plans with many of its models, and
# uses the same names. So a plan for one is a plan for the other. We take a guest: a small model of transformers with
# random weights, and the plan that it brings along.


# %%
def guest():
    from transformers import Starcoder2Config, Starcoder2ForCausalLM

    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    rest = {"bos_token_id": 0, "eos_token_id": 0, "use_cache": False, "tie_word_embeddings": False}
    torch.manual_seed(0)
    return Starcoder2ForCausalLM(Starcoder2Config(**sizes, **heads, **rest)).double()


model = guest()
for layer, style in model.tp_plan.items():
    print(f"{layer:<34} {style}")

# %% [markdown] lang="en"
# It is a small StarCoder2 (Lozhkov et al. 2024, [StarCoder 2](https://arxiv.org/abs/2402.19173)), a GPT with
# rotary positions and fewer heads for keys and values (2) than for queries (4).
#
# **Predict:** two ranks, `parallelize(guest(), Mesh(tp=2))`, and nothing else. Is the gradient the one that
# transformers and PyTorch compute in one process? And on four ranks, two for each head of keys?

# %%
prediction = None


def guest_in_parts(ranks, tokens, targets):
    model = parallelize(guest(), Mesh(tp=ranks))
    model.step(tokens, targets)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return model.full_gradients(), shapes["model.layers.0.self_attn.k_proj.weight"], shapes["lm_head.weight"]


F.cross_entropy(model(tokens).logits.flatten(0, 1), targets.flatten()).backward()
print("you wrote:", prediction)
with World(2) as two:
    answers = {one.n: one.run(guest_in_parts, one.n, tokens, targets) for one in (two, world)}
for ranks, parts in answers.items():
    off = max(distance(found, gradients(model)) for found, _, _ in parts)
    _, keys, head = parts[0]
    print(f"tp={ranks}: k_proj {keys}, head {head} on each rank, distance to one process {off:.0e}")
    assert off < 1e-12 and keys == (16 if ranks == 2 else 32, 64) and head == (512 // ranks, 64)

# %% [markdown] lang="en"
# Equal, though the author of the model never saw this course. On four ranks there are too few heads of keys to share
# out. There each rank keeps the whole layer, computes both heads, and goes on with the one that its queries read. Then
# the gradient of that layer is a partial sum, and is summed at the end of the step, as those of the norms in section 8.
#
# A plan can be wrong, too. A name that matches nothing, or a style that does not exist, is refused with what would
# fit. But one can also run and be wrong. Qwen3's plan, say, gives the norms inside its heads the style
# `replicated_with_grad_allreduce`. Without that entry their gradients would be partial sums. minipar refuses a plan
# without it, since it looks for this very case. For the next one, only the law tells.
#
# ## 11. When does it pay?
#
# An estimate, with the assumed speeds of [chapter 3a](03a_data_parallel.ipynb): a GPU sustains $4 \times 10^{14}$
# operations a second; inside a machine, 8 GPUs send 300 GB/s each; between machines 50 GB/s. A layer costs
# $72\,bsh^2(1 + s/(6h))$ operations for forward and backward together (Narayanan et al. 2021,
# [Efficient large-scale training](https://arxiv.org/abs/2104.04473), without its recomputation), shared by $t$ ranks.
# It sends $8\,bsh(t-1)/t$ numbers of 2 bytes. We take it that nothing of that hides.
#
# **Question.** You double the number of rows. What becomes of the *share* of time that goes into sending? And if you
# double the width $h$?

# %%
prediction = None  # ("same", "half", "double" for rows; the same for the width)

SPEED = 4e14
INSIDE_NODE, BETWEEN_NODES = (5e-6, 300e9), (1e-5, 50e9)  # seconds a message, bytes a second


def layer_seconds(hidden, tokens, ranks, link, context=4096):
    """Computing and sending of a layer, forward and backward, on each rank: an estimate."""
    computing = 72 * tokens * hidden**2 * (1 + context / (6 * hidden)) / ranks / SPEED
    alpha, bandwidth = link
    sending = 4 * (2 * (ranks - 1) * alpha + 2 * (ranks - 1) / ranks * 2 * tokens * hidden / bandwidth)
    return computing, sending


def ratio(hidden, tokens, ranks=8, link=INSIDE_NODE):
    computing, sending = layer_seconds(hidden, tokens, ranks, link)
    return sending / computing


print("you wrote:", prediction)
for case in ((4096, 8192), (4096, 16384), (8192, 8192), (16384, 8192)):
    near, far = ratio(*case), ratio(*case, link=BETWEEN_NODES)
    print(f"h = {case[0]:>6,}, {case[1]:>6,} tokens, t = 8: sending / computing = {near:.2f} inside, {far:.2f} between")
assert abs(ratio(4096, 16384) / ratio(4096, 8192) - 1) < 0.1 and ratio(8192, 8192) < 0.6 * ratio(4096, 8192)

# %% [markdown] lang="en"
# Without latency and the small term $s/(6h)$, the ratio is
#
# $$\frac{\text{sending}}{\text{computing}} = \frac{2\,(t-1)\,S}{9\,h\,B}$$
#
# with $S$ the speed and $B$ the bandwidth. Rows and positions cancel: both sides grow with them. (In data parallelism,
# more tokens hid the sending.) What helps is a wide model, a fast link, a small $t$.
#
# In the explorer, ranks up to 8 share a machine; beyond that, the sums go over the network. **Before you move it:** how
# many times as fast as one rank are 8? And 32, compared with 8? For $h$ = 4,096, and for $h$ = 16,384.

# %%
prediction = None  # for instance {4096: (8, 4), 16384: (8, 4)}

RANKS = (1, 2, 4, 8, 16, 32)
ABOVE = {"textcoords": "offset points", "ha": "center", "fontsize": 8}


def short(number):
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def by_ranks(hidden, tokens):
    """Milliseconds of computing and sending for each number of ranks."""
    links = [INSIDE_NODE if ranks <= 8 else BETWEEN_NODES for ranks in RANKS]
    both = [layer_seconds(hidden, tokens, ranks, link) for ranks, link in zip(RANKS, links, strict=True)]
    return [[1000 * seconds for seconds in part] for part in zip(*both, strict=True)]


# %%
def draw_layer(hidden, tokens):
    computing, sending = by_ranks(hidden, tokens)
    drawing, (panel,) = viz.figure(7, 3)
    places, totals = range(len(RANKS)), [x + y for x, y in zip(computing, sending, strict=True)]
    panel.bar(places, computing, color=viz.PALETTE[0], ec=viz.INK, lw=0.6, label="computing")
    panel.bar(places, sending, bottom=computing, color=viz.PALETTE[6], ec=viz.INK, lw=0.6, label="sending")
    for i, total in enumerate(totals):
        panel.annotate(short(total), (i, total), (0, 3), **ABOVE)
    panel.axvline(3.5, color=viz.INK, ls="--", lw=1)
    panel.set_xticks(places, [f"{ranks}" for ranks in RANKS])
    panel.set(
        xlabel="t (right of the dashed line: over the network)", ylabel="ms a layer", ylim=(0, 1.15 * max(totals))
    )
    panel.legend(frameon=False, fontsize=9)
    best = RANKS[totals.index(min(totals))]
    panel.set_title(f"h = {hidden:,}, {tokens:,} tokens: fastest with t = {best} (an estimate)", fontsize=10)
    listed = ", ".join(f"t={ranks}: {short(total)}" for ranks, total in zip(RANKS, totals, strict=True))
    return viz.describe(drawing, f"Milliseconds of a layer of width {hidden:,} on t ranks, estimated: {listed}.")


# %%
explore(draw_layer, hidden=[4096, 1024, 8192, 16384], tokens=[8192, 1024, 65536])

# %%
faster = {}
for hidden in (4096, 16384):
    one, *_, eight, _, many = (sum(both) for both in zip(*by_ranks(hidden, 8192), strict=True))
    faster[hidden] = one / eight, eight / many
    print(f"h = {hidden:>6,}: 8 ranks are {one / eight:.1f} × as fast as 1, 32 are {eight / many:.2f} × as fast as 8")
    assert one / eight > 5 and eight / many < 1.15
print("you wrote:", prediction)

# %% [markdown] lang="en"
# Up to 8, the size of the machine, each doubling helps. Beyond it, what is saved in computing is lost on the
# network: for $h$ = 4,096 a layer gets slower, and for $h$ = 16,384 four times the GPUs bring a few per cent.
# That is the rule of practice, too. Narayanan et al. (2021) advise tensor parallelism up to the number of GPUs in a
# server, and pipelines beyond. Llama 3's 405B model was trained with $t$ = 8 on servers of 8 GPUs (Llama Team 2024,
# Table 4). It is also why a mesh numbers its ranks with `tp` fastest: neighbors are in one machine.
#
# - **It pays** when a layer, its optimizer state or its activations are too large for one GPU; when there are more
#   GPUs than rows, since it shares out the work on *one* row; on fast links, with wide models.
# - **It does not pay** for a model that fits: data parallelism sends less often, and nothing waits for it. Nor across
#   machines. Nor for small $h$, where a quarter of a matrix is too small to keep a GPU busy. (The estimate knows
#   nothing of that last point.)
# - **Its limits:** $t$ divides the heads of queries. Copies remain: norms, heads of keys where there are fewer than
#   $t$, and without sequence parallelism the activations between the cut regions.
#
# What has become of the document's four steps? *Split the model*: by layers or by neurons, and only the second keeps
# all ranks busy on one microbatch. *Pass parameters and gradients*: activations, and their gradients. *Compute
# independently*: between two all-reduces. *Put the results together*: four times a layer, and at the very end, for the
# loss, not at all.
#
# ## What you have now
#
# - **layer-wise**: a rank, some layers; without microbatches all but one rank wait.
# - **column cut**: nothing forward, all-reduce of the input's gradient. **row cut**: the other way round.
# - **enter, leave**: the adjoint pair; `<Lx, g> = <x, Lᵀg>` is a test for any such pair.
# - **MLP**: columns, then rows. **attention**: by heads; q, k and v enter together.
# - **vocabulary-parallel**: embedding, head, loss; three numbers a token, and never whole logits.
# - **sequence parallelism**: all-gather and reduce-scatter in place of all-reduce: the same bytes, less memory; norm
#   gradients are partial sums.
# - **randomness**: copies agree, shares differ.
# - **8 *bsh* (*t* − 1)/*t*** elements for each layer and microbatch; 2(*t* − 1)*S*/(9*hB*) of the computing time.
# - **plan**: layer name → style.
#
# **Things to try here.** Write `my_mlp`, `my_enter` and `my_cross_entropy`, if you have not. Break `cut_mlp` by leaving
# out its `enter`: which gradients are wrong, and does the test with the input's gradient find it? Give `parallelize` a
# plan in which only the MLPs are cut, and predict the bytes first.
#
# ## Three questions to take along
#
# 1. A layer has $h$ = 8,192, a microbatch 8,192 tokens, numbers have 2 bytes. How many bytes does each of 8 ranks send
#    for this layer and microbatch? And how many bytes are the layer's $12h^2$ weights?
# 2. A colleague reports that `t` = 2 and `t` = 1 give the same loss for 100 steps, so the code is right. What do you
#    ask for?
# 3. Why is the gradient of a norm's scale whole on each rank without sequence parallelism, and a partial sum with it?
#
# <details><summary>Answers</summary>
#
# 1. 8 × 8,192 × 8,192 × 7/8 × 2 = 939,524,096, about 0.94 GB, and it is sent for every microbatch. The weights are
#    1.61 GB.
# 2. The gradient of one step, raw, in float64, from stirred weights, against one process, parameter by parameter. And
#    the bytes.
# 3. Without it, each rank sees all positions. With it, each sees its own, and a gradient is a sum over positions.
#
# </details>

# %%
assert 8 * 8192 * 8192 * 7 // 8 * 2 == 939_524_096 and round(2 * 12 * 8192**2 / 1e9, 2) == 1.61  # the answers above
world.close()

# %% [markdown] lang="en"
# **Next:** [the exercises](../exercises/03b_tensor_parallel.ipynb), eight graded tasks, from the two cuts to dropout:
#
#     python -m minipar grade exercises/03b_tensor_parallel.ipynb
#
# Then [03c, pipeline parallelism](03c_pipeline_parallel.ipynb), which takes the layers on different ranks from section
# 1, and gives the idle ones something to do.
#
# ## References
#
# - Mohammad Shoeybi et al. 2019, *Megatron-LM: Training multi-billion parameter language models using model
#   parallelism*, [arXiv:1909.08053](https://arxiv.org/abs/1909.08053): column and row cuts, $f$ and $g$, the
#   vocabulary-parallel loss.
# - Deepak Narayanan et al. 2021, *Efficient large-scale language model training on GPU clusters using Megatron-LM*,
#   [arXiv:2104.04473](https://arxiv.org/abs/2104.04473): tensor parallelism inside a server, pipelines between them.
# - Vijay Korthikanti et al. 2022, *Reducing activation recomputation in large transformer models*,
#   [arXiv:2205.05198](https://arxiv.org/abs/2205.05198): sequence parallelism.
# - Anton Lozhkov et al. 2024, *StarCoder 2 and The Stack v2: The next generation*,
#   [arXiv:2402.19173](https://arxiv.org/abs/2402.19173): the guest.
# - Llama Team 2024, *The Llama 3 herd of models*, [arXiv:2407.21783](https://arxiv.org/abs/2407.21783): $t$ = 8 in
#   practice.
