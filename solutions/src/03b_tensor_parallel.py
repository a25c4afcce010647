# %% [markdown] lang="en"
# # Exercises of 03b: tensor parallelism
#
# Eight small functions, two hours or so. Together they are the tensor-parallel part of a training engine: in the last
# cell four ranks share every matrix of a GPT, with your layers, and train it on Python's documentation. They go with
# [chapter 03b](../chapters/03b_tensor_parallel.ipynb): tasks 1 to 3 with its sections 2 and 3, task 4 with section 5,
# tasks 5 and 6 with section 7, task 7 with section 8, task 8 with section 9.
#
# **How it works.** Run the cells from the top with Shift+Enter. Each task is a cell with a function for you to
# finish, where it says `raise NotImplementedError("your turn")`. The cell below it is its check, folded away since it
# gives things away; run it after yours. For a right answer it prints one line, the one that stands there already. For
# a wrong one it says what is wrong, and on which rank. Checks do not use your earlier answers: once the cells above
# the first task have run, start anywhere.
#
# Or let a terminal check, in the folder of the course:
#
#     # all tasks, a line each; with --watch again at each save
#     python -m minipar grade exercises/03b_tensor_parallel.ipynb
#
#     # hints for task 2, one at a time; its solution, once it passes
#     python -m minipar hint 03b.2
#     python -m minipar solution 03b.2
#
# `grade` reads only the cells with a function to finish. Cells that you add are for trying things out. The folded cells
# belong to the checks, so an answer may not use their variables and functions: take what your function is given, and
# what is imported here.

# %% tags=["setup"]
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipar import Axis, Config, Mesh, World, corpus, gpt, ledger, parallelize
from minipar.collectives import all_gather, all_reduce, enter, enter_sequence, leave, leave_sequence, shard
from minipar.course.checks import difference, names_in, returned, verdict
from minipar.course.given import along, fresh_model, one_process, targets, tokens

world = World(4)

# %% [markdown] lang="en"
# The next cells are folded, too. They say what is wrong with a tensor, and hold what tasks 4 and 7 start from. Run them
# all; read them when you want to know.
#
# What you need to know is the `axis` that your functions are given, the line of ranks that share each matrix:
# `axis.size` is the number of ranks, $t$ in the text, here 4 or 2, and `axis.index` is this rank's place, from 0 on.
# `shard(x, axis, dim)` is this rank's share of a tensor along a dim. Where sizes do not divide, shares differ by one.
# `all_reduce(x, axis)` is the sum of every rank's `x`, a new tensor.


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given: how to call a function on each rank, and what is wrong with a tensor
def on_each_rank(function: Callable, *args, tp: int = 4) -> list:
    """What function(axis, *args) returns on rank 0, 1, ... of an axis of `tp` ranks."""
    return along(world, "tp", function, *args, size=tp)[:tp]


def numbers(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Random ones in float64, the same for whoever asks."""
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def part(x: Tensor, index: int, ranks: int, dim: int | None) -> Tensor:
    """The share of a rank along a dim; all of x for dim=None."""
    return x if dim is None else x.tensor_split([x.size(dim) * i // ranks for i in range(1, ranks)], dim)[index]


def wrong_with(got: Tensor | None, wanted: Tensor, what: str, ranks: int) -> str:
    """Why a tensor is not the one that it should be, in a sentence; "" if it is."""
    if not isinstance(got, Tensor):
        return f"{what} is {got!r}, and a tensor is wanted."
    if got.shape != wanted.shape:
        return f"{what} has the shape {tuple(got.shape)}, and should have {tuple(wanted.shape)}."
    largest, off = float(wanted.abs().max()), float((got - wanted).abs().max())
    if off <= 1e-12 * largest:
        return ""
    if not got.isfinite().all():
        return f"{what} is not finite."
    if not got.dim():
        return f"{what} is {got:.6g}, and should be {wanted:.6g}."
    if not got.any():
        return f"{what} is zero everywhere."
    factor = float((got * wanted).sum() / (wanted * wanted).sum())
    if float((got - factor * wanted).abs().max()) <= 1e-9 * float(got.abs().max()) and abs(factor - 1) > 1e-5:
        cause = {ranks: ": counted by each rank?", 1 / ranks: ": divided by the ranks?"}.get(round(factor, 9), ".")
        return f"{what} is {factor:.4g} times what it should be{cause}"
    if off < 1e-5 * largest:
        return f"{what} is off by {off / largest:.0e}, as a share of its largest value: was it rounded to float32?"
    return f"{what} is off by {off / largest:.2g}, as a share of its largest value."


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given: a forward and backward through a function, alone or on ranks
def through(function: Callable, inputs: dict, name: str, *dy: Tensor) -> dict:
    """What function(*inputs) gives as y, the gradients of inputs for dy, and (calls, bytes) forward and backward."""
    inputs = {k: v.clone().requires_grad_(v.is_floating_point()) for k, v in inputs.items()}
    with warnings.catch_warnings(record=True) as told, ledger() as book:
        warnings.simplefilter("always")
        torch.set_warn_always(True)
        y = function(*inputs.values())
        y = y if isinstance(y, tuple) else (y,)
        assert isinstance(returned(y[0], name), Tensor), f"{name} must return a tensor"
        assert y[0].shape == dy[0].shape, f"{name} must return the shape {tuple(dy[0].shape)}, not {tuple(y[0].shape)}"
        assert y[0].requires_grad, f"{name}: no gradient can go back through what it returns"
        forward = book.calls("tp"), book.bytes("tp")
        torch.autograd.backward(y, dy)
    blind = any("autograd kernel was not registered" in str(warning.message) for warning in told)
    assert not blind, (
        f"{name}: PyTorch warns that a gradient goes through a collective that autograd knows nothing of. "
        "Use one that it knows, or write a torch.autograd.Function around it"
    )
    grads = {f"the gradient of {k}": v.grad for k, v in inputs.items() if v.requires_grad}
    backward = book.calls("tp") - forward[0], book.bytes("tp") - forward[1]
    return {"y": y[0].detach(), **grads, "forward": forward, "backward": backward}


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given: what is wrong with what ranks have, and with what they send
def wrong_on(ranks: list[dict], whole: dict, dims: dict, case: str) -> str:
    """What is wrong on which rank. dims: along which dim of y and of gradients the ranks have shares."""
    for rank, got in enumerate(ranks):
        for name in [name for name in whole if name not in ("forward", "backward", "at the end")]:
            dim = dims.get(name.removeprefix("the gradient of "))
            if told := wrong_with(got[name], part(whole[name], rank, len(ranks), dim), name, len(ranks)):
                term = " off by " in told and dim is None and adds_up([one[name] for one in ranks], whole[name])
                return f"{case}, rank {rank}: {told}{' It is a term: the sum over the ranks is right.' * term}"
    return ""


def adds_up(terms: list, wanted: Tensor) -> bool:
    """Are these the terms of the tensor that is wanted?"""
    fit = all(isinstance(x, Tensor) and x.shape == wanted.shape for x in terms)
    return fit and torch.allclose(sum(terms), wanted, atol=1e-12)


def wrong_sent(ranks: list[dict], case: str, **wanted: tuple[int, int]) -> str:
    """What a rank should not send. wanted: calls and bytes forward and backward."""
    for rank, got in enumerate(ranks):
        for when, (calls, sent) in wanted.items():
            if got[when] != (calls, sent):
                what = f"it makes {got[when][0]} call{'s' * (got[when][0] != 1)} with {got[when][1]:,} bytes"
                right = f"{calls} with {sent:,} bytes" if calls else "none"
                return f"{case}, rank {rank}: the values are right, but {when} {what}, and should make {right}."
    return ""


def reduced(x: Tensor, ranks: int) -> tuple[int, int]:
    """Calls and bytes of one all-reduce of x."""
    return 1, round(2 * (ranks - 1) / ranks * x.nbytes)


NONE = 0, 0


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for task 4: the same in one process, and a run of both
def whole_attention(x: Tensor, q: Tensor, k: Tensor, v: Tensor, head_dim: int) -> Tensor:
    """What all heads give."""
    many = (F.linear(x, w).unflatten(-1, (-1, head_dim)).transpose(1, 2) for w in (q, k, v))
    return F.scaled_dot_product_attention(*many, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(-2)


def compared_attention(attention: Callable, of_queries: int, of_keys: int, ranks: int) -> tuple[list, dict, dict]:
    """Forward and backward on ranks, in one process, and the dims that are cut."""
    sizes = {"q": of_queries, "k": of_keys, "v": of_keys}
    inputs = {"x": numbers(2, 5, 10, seed=1)} | {w: numbers(3 * sizes[w], 10, seed=ord(w)) for w in sizes}
    dy, dims = numbers(2, 5, 3 * of_queries, seed=2), {"y": -1, "q": 0, "k": 0, "v": 0}

    def on_rank(axis):
        mine = {name: part(w, axis.index, axis.size, dims.get(name)) for name, w in inputs.items()}
        name = "attention_of_my_heads"
        return through(lambda *inputs: attention(*inputs, 3, axis), mine, name, shard(dy, axis, -1))

    whole = through(lambda *inputs: whole_attention(*inputs, 3), inputs, "", dy)
    return on_each_rank(on_rank, tp=ranks), whole, dims


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for task 7: what a block has, and a run of yours
CUT = {"up.weight": 0, "up.bias": 0, "down.weight": 1}  # name -> the dim along which ranks have shares


def block_weights() -> dict[str, Tensor]:
    """Of a norm and an MLP of width 6, by name."""
    shapes = {"norm.weight": (6,), "norm.bias": (6,), "up.weight": (24, 6), "up.bias": (24,)}
    shapes |= {"down.weight": (6, 24), "down.bias": (6,)}
    return {name: numbers(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def whole_block(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """All positions, in one process."""
    inside = F.layer_norm(x, x.shape[-1:], p["norm.weight"], p["norm.bias"])
    middle = F.gelu(F.linear(inside, p["up.weight"], p["up.bias"]))
    return x + F.linear(middle, p["down.weight"], p["down.bias"])


def compared_block(finish: Callable, ranks: int) -> tuple[list, dict, dict]:
    """A step on ranks, finished by a function; in one process; and the dims that are cut."""
    inputs = {"x": numbers(2, 8, 6, seed=10)} | block_weights()
    dy, dims = numbers(2, 8, 6, seed=11), {"x": 1, "y": 1} | CUT

    def named(weights):
        return dict(zip(block_weights(), weights, strict=True))

    def on_rank(axis):
        mine = {name: part(w, axis.index, axis.size, dims.get(name)) for name, w in inputs.items()}
        found = through(lambda x, *w: my_block(x, named(w), axis), mine, "", shard(dy, axis, 1))
        p = {name: mine[name].clone().requires_grad_() for name in block_weights()}
        for name in p:
            p[name].grad = found[f"the gradient of {name}"]
        with ledger() as book:
            finish(p, axis)
        found["at the end"] = book.calls("tp"), book.bytes("tp")
        return found | {f"the gradient of {name}": w.grad for name, w in p.items()}

    whole = through(lambda x, *w: whole_block(x, named(w)), inputs, "", dy)
    return on_each_rank(on_rank, tp=ranks), whole, dims


# %% [markdown] lang="en"
# ## 03b.1 · Trace: what a rank holds
#
# An MLP has two linear layers: `up` makes 24 numbers of 6, `down` makes 6 of 24. Between them is GELU. Two ranks share
# it: `up` is cut by columns, that is, between its outputs, and `down` by rows, between its inputs. What goes in, `x`,
# are 10 tokens. What `up` and GELU give is called `middle`. What `down` gives before the ranks sum is `partial`; after
# the sum and the bias it is `y`.
#
# Write down the shapes that a rank holds. (Both ranks have the same shapes.) PyTorch stores the weight of a linear
# layer as (out, in).

# %% [markdown] lang="en" hint="03b.1"
# `up` has 24 outputs, and a rank has 12 of them: 12 rows of the stored weight, 12 biases, and 12 columns of `middle`.

# %% [markdown] lang="en" hint="03b.1"
# `down` gets those 12 columns, so it has 12 inputs, and still 6 outputs. What it gives has the full shape: it is a term
# of a sum. The bias is added once, after the sum, so it is whole.


# %% task="03b.1" title="Trace: what a rank holds"
def shapes_on_a_rank() -> dict[str, tuple[int, ...]]:
    """Width 6, in the middle 24, 2 ranks, 10 tokens: name -> shape on one rank."""
    ### BEGIN SOLUTION
    return {
        "x": (10, 6),
        "up.weight": (12, 6),
        "up.bias": (12,),
        "middle": (10, 12),
        "down.weight": (6, 12),
        "partial": (10, 6),
        "down.bias": (6,),
        "y": (10, 6),
    }
    ### INSTEAD
    # raise NotImplementedError("your turn")  # put numbers for the zeros, then take this out
    # return {
    #     "x": (0, 0),
    #     "up.weight": (0, 0),
    #     "up.bias": (0,),
    #     "middle": (0, 0),
    #     "down.weight": (0, 0),
    #     "partial": (0, 0),
    #     "down.bias": (0,),
    #     "y": (0, 0),
    # }
    ### END SOLUTION


# %% check="03b.1" seconds=20
# Check of 03b.1: run this after your answer
# NBVAL_CHECK_OUTPUT
def really_held(axis):
    model = parallelize(gpt(Config(context=10, depth=1, width=6, heads=2)), Mesh(dp=2, tp=2))
    mlp = model.module.blocks[0].mlp
    seen = {name: tuple(p.shape) for name, p in mlp.named_parameters()}
    mlp.up.register_forward_hook(lambda layer, args, y: seen.update(x=tuple(args[0].shape[1:])))
    mlp.down.register_forward_hook(lambda layer, args, y: seen.update(middle=tuple(args[0].shape[1:])))
    mlp.down.register_forward_hook(lambda layer, args, y: seen.update(y=tuple(y.shape[1:])))
    model.step(*torch.zeros(2, 2, 10, dtype=torch.int64))
    return seen | {"partial": seen["y"]}


why = {
    "x": "each rank reads all of x: a column cut sends nothing forward",
    "up.weight": "it is stored as (out, in), and a column cut shares out the 24 outputs",
    "up.bias": "it has a number for each output that the rank has",
    "middle": "these are 10 tokens, and the outputs of up that this rank has",
    "down.weight": "it is stored as (out, in), and a row cut shares out the 24 inputs",
    "partial": "a term of a sum has the shape of the sum",
    "down.bias": "it is added once, after the sum, and there are 6 outputs on each rank",
    "y": "after the sum each rank has all of it",
}
with verdict():
    yours, held = dict(returned(shapes_on_a_rank(), "shapes_on_a_rank")), on_each_rank(really_held, tp=2)[0]
    for name, reason in why.items():
        assert name in yours, f"shapes_on_a_rank says nothing about {name!r}."
        shape = yours[name]
        assert not isinstance(shape, int), f"{name}: the shape of {shape} numbers in a line is written ({shape},)."
        assert tuple(shape) == held[name], f"{name}: you give the shape {tuple(shape)}, but {reason}."
    on_a_rank = sum(torch.Size(held[name]).numel() for name in why if name.endswith(("weight", "bias")))
    print(f"a rank has {on_a_rank} of the 318 parameters: all is shared out but the bias of the row cut")

# %% [markdown] lang="en"
# ## 03b.2 · Complete: a layer cut by columns
#
# Each rank $r$ reads all of $X$ and computes its own outputs, $Y_r = XA_r$. Forward, nothing is sent. Backward, each
# rank has the gradient of its own outputs. What it makes of it is only *its* part of the gradient of $X$: the whole is
# the sum over the ranks. Autograd works within one process, and does not know that three others read the same $X$. You
# have to tell it, with an operation that does nothing forward and sums backward.
#
# Complete the two. **Target:** nothing is sent forward; backward one all-reduce of the gradient of $X$, so $2(t-1)/t$
# of its bytes, and nothing for weight and bias. The imported `enter` is this operation; here it is refused.

# %% [markdown] lang="en" hint="03b.2"
# `backward` is given the gradient of what `forward` returned, as this rank has it. It returns a gradient for each
# argument of `forward`: one for `x`, and `None` for the axis. The axis is in `ctx.axis`.

# %% [markdown] lang="en" hint="03b.2"
# `all_reduce(gradient, ctx.axis)` is the sum over the ranks, a new tensor.

# %% [markdown] lang="en" hint="03b.2"
# A Function is called as `CopyToRanks.apply(x, axis)`. What that gives is the input of `F.linear(..., weight, bias)`.


# %% task="03b.2" title="Complete: a layer cut by columns" engine="column_linear"
class CopyToRanks(torch.autograd.Function):
    """Every rank goes on with the same x."""

    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        ### BEGIN SOLUTION
        return all_reduce(gradient, ctx.axis), None
        ### END SOLUTION


def column_linear(x: Tensor, weight: Tensor, bias: Tensor | None, axis: Axis) -> Tensor:
    """All of x, (..., in) -> this rank's outputs, (..., its share of out).

    weight: (its share of out, in), bias: (its share of out,) or None.
    """
    ### BEGIN SOLUTION
    return F.linear(CopyToRanks.apply(x, axis), weight, bias)
    ### END SOLUTION


# %% check="03b.2" seconds=20
# Check of 03b.2: run this after your answer
# NBVAL_CHECK_OUTPUT
def column_step(axis, inputs, dims, dy, around):
    mine = {name: part(x, axis.index, axis.size, dims.get(name)) for name, x in inputs.items()}

    def with_residual(x, weight, bias=None):
        return column_linear(x, weight, bias, axis), x.view_as(x)

    return through(with_residual, mine, "column_linear", shard(dy, axis, -1), around)


with verdict():
    told = "column_linear uses the imported `enter`: here write what it does."
    assert not names_in(column_linear) & {"enter", "Collective"}, told
    dims = {"y": -1, "weight": 0, "bias": 0}
    for n, shape, out, bias in [(4, (2, 3, 6), 10, True), (2, (5, 6), 8, False)]:
        inputs = {"x": numbers(*shape, seed=1), "weight": numbers(out, 6, seed=2), "bias": numbers(out, seed=3)}
        dy, around = numbers(*shape[:-1], out, seed=4), numbers(*shape, seed=5)
        if not bias:
            del inputs["bias"]
        whole = through(lambda x, *layer: (F.linear(x, *layer), x.view_as(x)), inputs, "", dy, around)
        ranks = on_each_rank(column_step, inputs, dims, dy, around, tp=n)
        for one in (whole, *ranks):  # what came by the other way, around the layer, is right
            one["the gradient of x"] = one["the gradient of x"] - around
        case = f"{out} outputs on {n} ranks, with{'out' * (not bias)} bias"
        wrong = wrong_on(ranks, whole, dims, case)
        assert not wrong, wrong
        wrong = wrong_sent(ranks, case, forward=NONE, backward=reduced(inputs["x"], n))
        assert not wrong, wrong
    print(f"2 ranks: nothing is sent forward, {ranks[0]['backward'][1]} bytes backward, all for the gradient of x")

# %% [markdown] lang="en"
# ## 03b.3 · Write: a layer cut by rows
#
# The mirror image. Each rank has its columns of the input and the weights that meet them: $Y = \sum_r X_rA_r$. Forward,
# the ranks sum. Backward, the gradient of $Y$ is the same on every rank, and it is all that each needs.
#
# Two things to watch. A collective of minipar returns a tensor that autograd knows nothing of, so again you need a
# Function, this time all of it. And the bias is whole on every rank, but it may count only once. (A fresh model has
# biases of zero, so its first step does not show this mistake. The check starts elsewhere.)
#
# **Target:** forward one all-reduce of $Y$, backward nothing. The imported `leave` is refused here.

# %% [markdown] lang="en" hint="03b.3"
# `forward(ctx, x, axis)` returns `all_reduce(x, axis)`. If all ranks' `x` are added, what is the gradient of one of
# them, given that of the sum?

# %% [markdown] lang="en" hint="03b.3"
# The gradient of $a + b$ with respect to $a$ is that of the sum, unchanged: `backward` returns `gradient, None`.

# %% [markdown] lang="en" hint="03b.3"
# First `F.linear(x, weight)` without a bias, then the sum over the ranks, then `+ bias`, if there is one.


# %% task="03b.3" title="Write: a layer cut by rows" engine="row_linear"
class SumOverRanks(torch.autograd.Function):
    """Every rank has a term, and goes on with the sum."""

    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis) -> Tensor:
        ### BEGIN SOLUTION
        return all_reduce(x, axis)
        ### END SOLUTION

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        ### BEGIN SOLUTION
        return gradient, None
        ### END SOLUTION


def row_linear(x: Tensor, weight: Tensor, bias: Tensor | None, axis: Axis) -> Tensor:
    """This rank's columns of x, (..., its share of in) -> all of y, (..., out).

    weight: (out, its share of in), bias: (out,), whole on every rank, or None.
    """
    ### BEGIN SOLUTION
    y = SumOverRanks.apply(F.linear(x, weight), axis)
    return y if bias is None else y + bias
    ### END SOLUTION


# %% check="03b.3" seconds=20
# Check of 03b.3: run this after your answer
# NBVAL_CHECK_OUTPUT
def row_step(axis, inputs, dims, dy):
    mine = {name: part(x, axis.index, axis.size, dims.get(name)) for name, x in inputs.items()}
    return through(lambda x, weight, bias=None: row_linear(x, weight, bias, axis), mine, "row_linear", dy)


with verdict():
    told = "row_linear uses the imported `leave`: here write what it does."
    assert not names_in(row_linear) & {"leave", "Collective"}, told
    dims = {"x": -1, "weight": 1}
    for n, shape, out, bias in [(4, (2, 3, 10), 5, True), (2, (5, 8), 4, True), (4, (3, 8), 5, False)]:
        inputs = {"x": numbers(*shape, seed=1), "weight": numbers(out, shape[-1], seed=2), "bias": numbers(out, seed=3)}
        dy = numbers(*shape[:-1], out, seed=4)
        if not bias:
            del inputs["bias"]
        whole = through(F.linear, inputs, "", dy)
        ranks = on_each_rank(row_step, inputs, dims, dy, tp=n)
        case = f"{shape[-1]} inputs on {n} ranks, with{'out' * (not bias)} bias"
        wrong = wrong_on(ranks, whole, dims, case)
        often = bias and all(torch.allclose(one["y"], whole["y"] + (n - 1) * inputs["bias"]) for one in ranks)
        assert not wrong, wrong + f" The bias is in it {n} times." * often
        wrong = wrong_sent(ranks, case, forward=reduced(dy, n), backward=NONE)
        assert not wrong, wrong
    print(f"4 ranks: {ranks[0]['forward'][1]} bytes are sent forward, nothing backward, and the bias counts once")

# %% [markdown] lang="en"
# ## 03b.4 · Mend: heads that share their keys
#
# Attention is cut between heads: each rank has some of the heads of queries, and some of the heads of keys and values.
# Models with *grouped-query attention* have fewer heads of keys. With 8 heads of queries and 4 of keys, queries 0 and 1
# read keys 0, queries 2 and 3 read keys 1, and so on.
#
# The function below is right on 4 ranks, where each has 2 heads of queries and 1 of keys, and wrong on 2. And it always
# sends too much. The cell after it shows both. Say which keys are read on 2 ranks, then mend the function. **Target:**
# backward one all-reduce of the gradient of `x`.

# %% [markdown] lang="en" hint="03b.4"
# The bytes first. `q`, `k` and `v` each enter by themselves, so three gradients of `x` travel. If `x` enters once,
# before the three, autograd adds the three on the rank, and their sum travels.

# %% [markdown] lang="en" hint="03b.4"
# `repeat` puts one whole copy behind the other: `torch.tensor([0, 1]).repeat(2)` is 0, 1, 0, 1. With one head of keys
# on a rank any way to repeat it is right.

# %% [markdown] lang="en" hint="03b.4"
# Queries 0 and 1 should read keys 0, queries 2 and 3 keys 1: `keys.repeat_interleave(times, dim=1)`.


# %% task="03b.4" title="Mend: heads that share their keys"
def keys_read() -> list[int]:
    """8 heads of queries, 4 of keys, 2 ranks: which keys do queries 0 to 3 read, before you mend it?"""
    ### BEGIN SOLUTION
    return [0, 1, 0, 1]
    ### END SOLUTION


def attention_of_my_heads(
    x: Tensor,  # (rows, positions, width), all of it
    q: Tensor,  # (heads of queries of this rank * head_dim, width)
    k: Tensor,  # (heads of keys of this rank * head_dim, width)
    v: Tensor,  # the same
    head_dim: int,
    axis: Axis,
) -> Tensor:
    """-> what this rank's heads give, (rows, positions, its heads * head_dim)"""

    def heads(y: Tensor) -> Tensor:  # -> (rows, heads, positions, head_dim)
        return y.unflatten(-1, (-1, head_dim)).transpose(1, 2)

    ### BEGIN SOLUTION
    inside = enter(x, axis)
    queries, keys, values = (heads(F.linear(inside, w)) for w in (q, k, v))
    times = queries.size(1) // keys.size(1)  # so many heads of queries read one of keys
    keys, values = (some.repeat_interleave(times, dim=1) for some in (keys, values))
    ### INSTEAD
    # queries, keys, values = (heads(F.linear(enter(x, axis), w)) for w in (q, k, v))
    # times = queries.size(1) // keys.size(1)  # so many heads of queries read one of keys
    # keys, values = (some.repeat(1, times, 1, 1) for some in (keys, values))
    ### END SOLUTION
    y = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    return y.transpose(1, 2).flatten(-2)


# %%
print(f"{'8 heads of queries, 4 of keys':<32}{'4 ranks':>14}{'2 ranks':>14}")
runs = [compared_attention(attention_of_my_heads, 8, 4, ranks) for ranks in (4, 2)]
for what, name in {"y": "y", "gradient of x": "the gradient of x", "gradient of k": "the gradient of k"}.items():
    wrong = [wrong_on(found, {name: whole[name]}, dims, "") for found, whole, dims in runs]
    print(f"{what:<32}{'wrong' if wrong[0] else 'right':>14}{'wrong' if wrong[1] else 'right':>14}")
for when in ("forward", "backward"):
    print(f"{f'calls {when}':<32}{runs[0][0][0][when][0]:>14}{runs[1][0][0][when][0]:>14}")

# %% check="03b.4" seconds=20
# Check of 03b.4: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    read = list(returned(keys_read(), "keys_read"))
    assert len(read) == 4, f"keys_read gives {read}: a number for each of the four heads of queries."
    told = f"keys_read gives {read}: rank 0 has keys 0 and 1, and `repeat` puts one copy of all behind the other."
    assert read == [0, 1, 0, 1], told
    for of_queries, of_keys, n in [(8, 4, 4), (8, 4, 2), (8, 2, 2), (8, 8, 4)]:
        ranks, whole, dims = compared_attention(attention_of_my_heads, of_queries, of_keys, n)
        case = f"{of_queries} heads of queries, {of_keys} of keys on {n} ranks"
        wrong = wrong_on(ranks, whole, dims, case)
        assert not wrong, f"{wrong} Which keys does each head of queries read?"
        wrong = wrong_sent(ranks, case, forward=NONE, backward=reduced(whole["the gradient of x"], n))
        assert not wrong, f"{wrong} How often does x enter?"
    print("mended: 1 call backward in place of 3, and every head of queries reads its own keys")

# %% [markdown] lang="en"
# ## 03b.5 · Write: an embedding cut by the vocabulary
#
# The table of the embedding has a row for each token id. Rank $r$ of $t$ has the rows from
# $\lfloor V\,r/t \rfloor$ on, to where those of rank $r+1$ begin, with $V$ the number of ids in all. With 10 ids on 4
# ranks: 0 and 1; 2, 3 and 4; 5 and 6; 7, 8 and 9. Each rank looks up the ids that it has, puts zeros for all others,
# and the ranks sum.
#
# **Target:** forward one all-reduce of the result, backward nothing. A table of 128,000 rows stays where it is.
# `leave(x, axis)` sums, and autograd knows it: it is what you wrote in task 3.

# %% [markdown] lang="en" hint="03b.5"
# Where do this rank's rows begin? Take $\lfloor V\,r/t \rfloor$ from the text: $V$ is `vocabulary`, $r$ is
# `axis.index`, $t$ is `axis.size`. They end `len(table)` rows later. An id is here if it lies between the two.

# %% [markdown] lang="en" hint="03b.5"
# `first = vocabulary * axis.index // axis.size`, `here = (ids >= first) & (ids < first + len(table))`. Row 0 of this
# rank's table is that of id `first`, so look up `ids - first`. For the ids of others that is no row of this table: take
# row 0 in its place, `.masked_fill(~here, 0)`, and make zeros of what it gives.

# %% [markdown] lang="en" hint="03b.5"
# `here` has the shape of `ids`, and the result one dim more: multiply with `here[..., None]`. Then `leave`.


# %% task="03b.5" title="Write: an embedding cut by the vocabulary" engine="vocabulary_embedding"
def vocabulary_embedding(ids: Tensor, table: Tensor, vocabulary: int, axis: Axis) -> Tensor:
    """ids (...) -> their rows of the whole table, (..., width), on every rank.

    table: this rank's rows, (its share of vocabulary, width)
    vocabulary: how many ids there are
    """
    ### BEGIN SOLUTION
    first = vocabulary * axis.index // axis.size
    here = (ids >= first) & (ids < first + len(table))
    found = F.embedding((ids - first).masked_fill(~here, 0), table)
    return leave(found * here[..., None], axis)
    ### END SOLUTION


# %% check="03b.5" seconds=20
# Check of 03b.5: run this after your answer
# NBVAL_CHECK_OUTPUT
def embedding_step(axis, inputs, dims, dy, vocabulary):
    mine = {name: part(x, axis.index, axis.size, dims.get(name)) for name, x in inputs.items()}
    return through(lambda *both: vocabulary_embedding(*both, vocabulary, axis), mine, "vocabulary_embedding", dy)


with verdict():
    for vocabulary, n, few in [(5, 4, False), (10, 4, True), (10, 4, False), (7, 2, False)]:
        every = torch.cat([torch.arange(vocabulary), torch.tensor([0, vocabulary - 1, 3, 3])])  # some twice
        ids = every[every < 2] if few else every[None]
        inputs = {"ids": ids, "table": numbers(vocabulary, 3, seed=1)}
        dy = numbers(*ids.shape, 3, seed=2)
        whole = through(F.embedding, inputs, "", dy)
        ranks = on_each_rank(embedding_step, inputs, {"table": 0}, dy, vocabulary, tp=n)
        case = f"{vocabulary} ids on {n} ranks, {'only those of rank 0' if few else 'all of them'} looked up"
        wrong = wrong_on(ranks, whole, {"table": 0}, case)
        told = " Which rows does a rank have, and what does it add for ids that others have?"
        assert not wrong, wrong + told * (": y is off" in wrong)
        wrong = wrong_sent(ranks, case, forward=reduced(dy, n), backward=NONE)
        assert not wrong, wrong
    print(f"2 ranks: {ranks[0]['forward'][1]} bytes for {ids.numel()} tokens of width 3, however large the table is")

# %% [markdown] lang="en"
# ## 03b.6 · Write: a loss without the logits
#
# The head gives each rank the logits of its own ids, those from $\lfloor V\,r/t \rfloor$ on, as before. The loss of a
# token with logits $z_j$ and target $y$ is
#
# $$\log\sum_j e^{z_j - m} - (z_y - m), \qquad m = \max_j z_j$$
#
# where $m$ keeps the exponentials from overflowing. Give the *sum* of that over the tokens. A target of −100 is not
# labeled, and counts for nothing.
#
# **Budget:** all-reduces of three numbers a token in all, in at most three calls; backward nothing. minipar makes two
# calls. On 4 ranks each sends 4.5 numbers a token so; to gather the logits of 512 ids, it would send 384.
#
# `all_reduce(x, axis, "max")` gives the largest of every rank's `x`, elementwise. The maximum needs no gradient, since
# the loss does not depend on it. All else that is summed over the ranks needs one: `leave(x, axis)`.

# %% [markdown] lang="en" hint="03b.6"
# `top = all_reduce(logits.detach().amax(-1), axis, "max")`, one number a token. Subtract it from the logits at once,
# `logits - top[:, None]`, and use nothing else from there on.

# %% [markdown] lang="en" hint="03b.6"
# Two sums over the ranks: of the exponentials, `shifted.exp().sum(-1)`; and of the target's logit, which one rank has
# and the others replace by 0. As in the embedding: which targets are here, and in which column?

# %% [markdown] lang="en" hint="03b.6"
# `shifted.gather(-1, place[:, None]).squeeze(-1)` takes from each line the number in column `place`. Where the target
# is not here, take column 0 and multiply by `here`.

# %% [markdown] lang="en" hint="03b.6"
# `leave(torch.stack([total, own]), axis)` sums both in one call. At the end, multiply each token's loss by
# `targets != -100`, and sum.


# %% task="03b.6" title="Write: a loss without the logits" engine="vocabulary_loss"
def vocabulary_loss(logits: Tensor, targets: Tensor, vocabulary: int, axis: Axis) -> Tensor:
    """The cross-entropy, summed over the labeled tokens, 0-d.

    logits: of this rank's ids, (tokens, its share of vocabulary)
    targets: (tokens,), -100 where there is no label
    vocabulary: how many ids there are
    """
    ### BEGIN SOLUTION
    first = vocabulary * axis.index // axis.size
    shifted = logits - all_reduce(logits.detach().amax(-1), axis, "max")[:, None]
    here = (targets >= first) & (targets < first + logits.size(-1))
    place = (targets - first).masked_fill(~here, 0)
    own = shifted.gather(-1, place[:, None]).squeeze(-1) * here
    total, own = leave(torch.stack([shifted.exp().sum(-1), own]), axis)
    return ((total.log() - own) * (targets != -100)).sum()
    ### END SOLUTION


# %% check="03b.6" seconds=20
# Check of 03b.6: run this after your answer
# NBVAL_CHECK_OUTPUT
def loss_step(axis, inputs, dims, dy, vocabulary):
    mine = {name: part(x, axis.index, axis.size, dims.get(name)) for name, x in inputs.items()}
    return through(lambda *both: vocabulary_loss(*both, vocabulary, axis), mine, "vocabulary_loss", dy)


with verdict():
    dy = torch.tensor(0.5, dtype=torch.float64)  # half of the loss goes on
    for vocabulary, n, scale in [(5, 4, 3), (10, 4, 3), (7, 2, 3), (10, 4, 900)]:
        labels = torch.cat([torch.arange(vocabulary), torch.tensor([0, -100, vocabulary - 1, -100, 3])])
        inputs = {"logits": numbers(len(labels), vocabulary, seed=1, scale=scale), "targets": labels}
        whole = through(lambda *both: F.cross_entropy(*both, reduction="sum"), inputs, "", dy)
        ranks = on_each_rank(loss_step, inputs, {"logits": -1}, dy, vocabulary, tp=n)
        case = f"{vocabulary} ids on {n} ranks, {'large' if scale > 3 else 'small'} logits"
        wrong = wrong_on(ranks, whole, {"logits": -1}, case).replace(": y is", ": the loss is")
        told = f" It is a sum over the {int((labels >= 0).sum())} labeled tokens of {len(labels)}."
        assert not wrong, wrong + told * (": the loss is" in wrong)
        budget = 3 * reduced(inputs["logits"][:, 0], n)[1]
        for rank, ((calls, sent), backward) in enumerate((got["forward"], got["backward"]) for got in ranks):
            told = f"{case}, rank {rank}: the loss and its gradient are right, but"
            over = f"{sent:,} bytes are sent forward in {calls} call{'s' * (calls != 1)}"
            assert sent <= budget, f"{told} {over}, and three numbers a token are {budget:,}."
            assert calls <= 3, f"{told} {over}: three are enough, and two will do."
            assert backward == NONE, f"{told} backward sends {backward[1]:,} bytes: each rank has all that it needs."
    print(f"the budget is kept: {budget // len(labels)} bytes a token on 4 ranks, for a vocabulary of any size")

# %% [markdown] lang="en"
# ## 03b.7 · Mend: norms that all ranks agree on
#
# With sequence parallelism each rank has its own *positions* between the cut layers. Here is the second half of a block
# in this form. `enter_sequence` gathers positions forward, and sums and cuts their gradients backward; `leave_sequence`
# is its mirror image. `p` has the parameters by name: of `up.weight`, `up.bias` and `down.weight` this rank's share, of
# the other three the whole.


# %% tags=["setup"]
def my_block(x: Tensor, p: dict[str, Tensor], axis: Axis) -> Tensor:
    """x + MLP(norm(x)) for this rank's positions: (rows, its positions, width) -> the same."""
    normed = F.layer_norm(x, x.shape[-1:], p["norm.weight"], p["norm.bias"])
    middle = F.gelu(F.linear(enter_sequence(normed, axis), p["up.weight"], p["up.bias"]))
    return x + leave_sequence(F.linear(middle, p["down.weight"]), axis) + p["down.bias"]


# %% [markdown] lang="en"
# After backward, `finish_gradients` does what is left to do. In its first form it did nothing, and after some steps the
# norms of the four ranks had drifted apart. So somebody had them averaged. Now all ranks agree on them, and the loss
# falls as before.
#
# The cell below the function compares each gradient with one process. Say which ones are wrong, and mend the function.
# **Target:** one call at the end of the step, an all-reduce of 18 numbers.

# %% [markdown] lang="en" hint="03b.7"
# Each rank saw its own positions. A gradient of a parameter is a sum over all positions. What a rank has of it is a
# term of that sum, not a sample of it.

# %% [markdown] lang="en" hint="03b.7"
# Which of the six parameters act on a rank's own positions, before `enter_sequence` or after `leave_sequence`? The
# other three are inside, where each rank sees all positions: their gradients are done. `up.bias` is one of these.

# %% [markdown] lang="en" hint="03b.7"
# Three names: `norm.weight`, `norm.bias` and `down.bias`. Put their gradients side by side with `torch.cat`, call
# `all_reduce` once, and take the sum apart with `.chunk(3)`.


# %% task="03b.7" title="Mend: norms that all ranks agree on"
def wrong_gradients() -> set[str]:
    """The names of those parameters whose gradients are wrong before you mend it."""
    ### BEGIN SOLUTION
    return {"norm.weight", "norm.bias", "down.bias"}
    ### END SOLUTION


def finish_gradients(p: dict[str, Tensor], axis: Axis) -> None:
    """After backward: set .grad in p to the gradients over all positions."""
    ### BEGIN SOLUTION
    names = ["norm.weight", "norm.bias", "down.bias"]
    total = all_reduce(torch.cat([p[name].grad for name in names]), axis)
    for name, gradient in zip(names, total.chunk(3), strict=True):
        p[name].grad = gradient
    ### INSTEAD
    # for name in ("norm.weight", "norm.bias"):
    #     p[name].grad = all_reduce(p[name].grad, axis) / axis.size
    ### END SOLUTION


# %%
ranks, whole, dims = compared_block(finish_gradients, 4)
print(f"{'4 ranks, the gradient of':<28}{'do ranks agree?':<18}compared with one process")
for short in ("x", *block_weights()):
    name = f"the gradient of {short}"
    agree = "yes" if all(torch.equal(rank[name], ranks[0][name]) for rank in ranks) else "no"
    wrong = wrong_on(ranks, {name: whole[name]}, dims, "").partition(name)[2]
    print(f"{short:<28}{'(shares)' if short in dims else agree:<18}{wrong.strip() or 'equal'}")

# %% check="03b.7" seconds=20
# Check of 03b.7: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    named = {*returned(wrong_gradients(), "wrong_gradients")}
    for name in block_weights():
        partial = name in ("norm.weight", "norm.bias", "down.bias")
        where = "on a rank's own positions only" if partial else "where a rank has gathered all positions"
        told = f"wrong_gradients {'leaves out' if partial else 'names'} {name}, which acts {where}."
        assert (name in named) == partial, told
    assert len(named) == 3, f"wrong_gradients has {named - {*block_weights()}}: that is no parameter of the block."
    for n in (4, 2):
        ranks, whole, dims = compared_block(finish_gradients, n)
        wrong = wrong_on(ranks, whole, dims, f"{n} ranks")
        assert not wrong, wrong
        wrong = wrong_sent(ranks, f"{n} ranks", **{"at the end": reduced(numbers(18, seed=0), n)})
        assert not wrong, wrong
    print(f"mended: 1 call of 18 numbers at the end, on 2 ranks {ranks[0]['at the end'][1]} bytes")

# %% [markdown] lang="en"
# ## 03b.8 · Write: dropout that knows its place
#
# Dropout sets each element to zero with probability $p$, and multiplies the others by $1/(1-p)$. Outside of the cut
# layers the ranks hold *copies* of an activation, and must drop the same elements. Inside they hold *shares*, and must
# not repeat one pattern $t$ times. Now more than that: which elements are dropped should not depend on the layout at
# all. Then four ranks can be compared with one, digit by digit, dropout or not.
#
# So let it depend on an element's place in the *whole* tensor, and on the seed. Draw from a `torch.Generator` of your
# own: other random numbers of the run must not be disturbed. **Target:** nothing is sent.

# %% [markdown] lang="en" hint="03b.8"
# `draw = torch.Generator().manual_seed(seed)`, then `torch.rand(shape, generator=draw) >= p`. Each rank draws the
# pattern of the *whole* tensor, all the same.

# %% [markdown] lang="en" hint="03b.8"
# For a share, cut the pattern as the tensor was cut: `shard(kept, axis, dim)`. For a copy (`dim` is None), all of it.

# %% [markdown] lang="en" hint="03b.8"
# What is kept is divided by `1 - p`: `x * kept / (1 - p)`.


# %% task="03b.8" title="Write: dropout that knows its place" engine="dropout_by_place"
def dropout_by_place(
    x: Tensor,  # this rank's share of the whole tensor, or a copy of it
    p: float,
    seed: int,  # the same on all ranks, another one for each layer and step
    shape: tuple[int, ...],  # of the whole tensor
    dim: int | None,  # along which it is cut; None: x is a copy of all of it
    axis: Axis,
) -> Tensor:
    """Zero where an element is dropped, else x / (1 - p). -> the shape of x"""
    ### BEGIN SOLUTION
    draw = torch.Generator().manual_seed(seed)
    kept = torch.rand(shape, generator=draw) >= p
    if dim is not None:
        kept = shard(kept, axis, dim)
    return x * kept / (1 - p)
    ### END SOLUTION


# %% check="03b.8" seconds=20
# Check of 03b.8: run this after your answer
# NBVAL_CHECK_OUTPUT
def dropped(axis, x, p, seed, dim):
    torch.manual_seed(axis.index)
    before, mine = torch.get_rng_state(), part(x, axis.index, axis.size, dim)
    ones = torch.ones_like(mine)
    found = through(lambda x: dropout_by_place(x, p, seed, shape, dim, axis), {"x": mine}, "dropout_by_place", ones)
    undisturbed = torch.equal(before, torch.get_rng_state())
    assert undisturbed, "dropout_by_place draws from torch's own generator, or seeds it: have one of your own"
    return found


with verdict():
    shape = 6, 20, 10
    x = numbers(*shape, seed=1)
    for p in (0.5, 0.1):
        alone, other = (on_each_rank(dropped, x, p, seed, None, tp=1)[0] for seed in (5, 6))
        y = alone["y"]
        right = (y == 0) | ((y / x - 1 / (1 - p)).abs() < 1e-9)
        assert right.all(), f"p={p}, 1 rank: an element is neither 0 nor 1/(1-p) times what it was."
        share = float((y == 0).double().mean())
        assert abs(share - p) < 0.1, f"p={p}, 1 rank: {share:.0%} of the elements are zero."
        assert not torch.equal(y, other["y"]), f"p={p}: with another seed the same elements are dropped."
        for d in range(3):
            same = (y.narrow(d, 0, 2) == 0) == (y.narrow(d, 2, 2) == 0)
            assert not same.all(), f"p={p}, 1 rank: the pattern repeats itself along dim {d}."
        for n, dim in [(4, None), (4, 1), (4, -1), (2, 0)]:
            what = "copies" if dim is None else f"shares along dim {dim}"
            ranks = on_each_rank(dropped, x, p, 5, dim, tp=n)
            wrong = wrong_on(ranks, alone, {"y": dim, "x": dim}, f"p={p}, {n} ranks with {what}")
            assert not wrong, f"{wrong} On 1 rank your function gives another y: are the same elements dropped?"
            wrong = wrong_sent(ranks, f"{n} ranks with {what}", forward=NONE, backward=NONE)
            assert not wrong, wrong
    print(f"1, 2 and 4 ranks drop the same of {y.numel():,} elements, and send {ranks[0]['forward'][1]} bytes")

# %% [markdown] lang="en"
# ## All together
#
# Your pieces, at work: in a GPT on four ranks they take the places of its own layers. It runs once tasks 2, 3, 5 and 6
# are done. Its gradients are compared with one process, and then it trains. What is left for the engine in
# `minipar/tensor.py` is task 7, and a plan that says which layer is cut how.


# %% tags=["raises-exception"]
def cut(layer: nn.Module, dim: int, forward: Callable, axis: Axis) -> None:
    """Keep a share of the weight along a dim, and of the bias where outputs are cut."""
    for name, p in list(layer.named_parameters()):
        if name == "weight" or dim == 0:
            setattr(layer, name, nn.Parameter(shard(p.detach(), axis, dim)))
            getattr(layer, name).dim_cut = dim
    layer.forward = forward


def your_gpt(axis: Axis) -> nn.Module:
    """The small GPT with your layers. Its head gives this rank's logits."""
    model = fresh_model()
    token = model.embed.token
    cut(token, 0, lambda ids: vocabulary_embedding(ids, token.weight, 512, axis), axis)
    for name, layer in model.named_modules():
        if name.endswith((".q", ".k", ".v", ".up", "head")):
            cut(layer, 0, lambda x, one=layer: column_linear(x, one.weight, one.bias, axis), axis)
        if name.endswith((".out", ".down")):
            cut(layer, 1, lambda x, one=layer: row_linear(x, one.weight, one.bias, axis), axis)
    return model


# %% tags=["raises-exception"]
def your_mean_loss(model, ids, targets, axis):
    return vocabulary_loss(model(ids).flatten(0, 1), targets.flatten(), 512, axis) / targets.numel()


def your_training(axis, steps):
    model = your_gpt(axis)
    your_mean_loss(model, tokens, targets, axis).backward()
    dims = {name: getattr(p, "dim_cut", None) for name, p in model.named_parameters()}
    first = {name: p.grad.clone() for name, p in model.named_parameters()}
    whole = {name: g if dims[name] is None else all_gather(g, axis, dims[name]) for name, g in first.items()}
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=3e-3), []
    for ids, labels in corpus.batches(steps, rows=8, context=32):
        model.zero_grad()
        loss = your_mean_loss(model, ids, labels, axis)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return whole, losses


answers = on_each_rank(your_training, 40)
wrong = difference([whole for whole, _ in answers], one_process(tokens, targets))
print(wrong or "gradients equal to one process")
print("loss:", *(f"{loss:.2f}" for loss in answers[0][1][::5]))
