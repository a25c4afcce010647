# %% [markdown] lang="en"
# # Exercises of 03g: hybrid parallelism
#
# Six small functions, an hour or so, on what is new where several axes meet: who talks to whom, which groups leave a
# node, how many bytes go along each axis, a norm over a whole mesh, and over which axes a gradient is summed.
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
#     python -m minipar grade exercises/03g_hybrid.ipynb
#
#     # hints for task 2, one at a time; its solution, once it passes
#     python -m minipar hint 03g.2
#     python -m minipar solution 03g.2
#
# `grade` reads only the cells with a function to finish. Cells that you add are for trying things out. The folded cells
# belong to the checks, so an answer may not use their variables and functions: take what your function is given, and
# what is imported here.

# %% tags=["setup"]
from collections.abc import Callable
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipar import Axis, Mesh, World, connect, ledger, parallelize
from minipar.collectives import all_reduce, enter_sequence, leave_sequence, shard
from minipar.course.checks import names_in, returned, verdict
from minipar.course.given import fresh_model, targets, tokens
from minipar.cut import is_cut
from minipar.data import rows

world = World(4)

# %% [markdown] lang="en"
# The next cells are folded, too: they hold what the checks of tasks 4, 5 and 6 run. Run them all; read them when you
# want to know.
#
# What you need to know: `axes` are this rank's axes by name. `axes["tp"].size` is the number of ranks along one,
# `axes["tp"].index` this rank's place, from 0 on, and `all_reduce(x, axes["tp"])` the sum of every rank's `x` along it,
# a new tensor.


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given: on a mesh of the four ranks
def on_mesh(function: Callable, mesh: Mesh, *args) -> list:
    """What function(axes, *args) returns on rank 0, 1, 2, 3; axes: this rank's, by name."""
    return world.run(lambda: function(connect(mesh), *args), limit=15)


def called(mesh: Mesh) -> str:
    """As in "dp 2 × tp 2"."""
    return " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)


def numbers(*shape: int, seed: int) -> Tensor:
    """Random ones in float64, the same for whoever asks."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def share(x: Tensor, axis: Axis, dim: int | None) -> Tensor:
    """This rank's part along a dim, a tensor of its own; all of x for dim=None."""
    return (x if dim is None else shard(x, axis, dim)).clone()


def right_groups(sizes: dict[str, int], axis: str) -> list[list[int]]:
    """All groups of an axis, in order."""
    grid = torch.arange(prod(sizes.values())).view(*sizes.values())
    return sorted(grid.movedim(list(sizes).index(axis), -1).reshape(-1, sizes[axis]).tolist())


def off(got: Tensor | None, wanted: Tensor) -> float:
    """The largest difference, as a share of the largest number; infinite for another shape, or none."""
    if got is None or got.shape != wanted.shape:
        return float("inf")
    return float((got - wanted).abs().max() / wanted.abs().max())


def reduced(bytes_of_it: float, ranks: int) -> float:
    """Bytes that a rank sends in an all-reduce."""
    return 2 * (ranks - 1) / ranks * bytes_of_it


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for task 5: gradients on a mesh
SHAPES = {"query": (10, 6), "out": (6, 10), "norm": (6,), "bias": (5,)}  # in each stage
DIMS = {"query": 0, "out": 1, "norm": None, "bias": None}  # along which tensor ranks have shares


def whole_gradients(stages: int) -> list[dict[str, Tensor]]:
    """Of each stage, by name."""
    return [
        {name: numbers(*shape, seed=10 * stage + i) for i, (name, shape) in enumerate(SHAPES.items())}
        for stage in range(stages)
    ]


def clipped_on_mesh(axes: dict[str, Axis], clip: Callable, max_norm: float) -> dict:
    """What a function makes of this rank's part of the gradients, and what it sends."""
    mine = whole_gradients(axes["pp"].size)[axes["pp"].index]
    parameters = {}
    for name, gradient in mine.items():
        parameters[name] = nn.Parameter(share(torch.zeros_like(gradient), axes["tp"], DIMS[name]))
        parameters[name].grad = share(gradient, axes["tp"], DIMS[name])
    shares = [p for name, p in parameters.items() if DIMS[name] is not None]
    wholes = [p for name, p in parameters.items() if DIMS[name] is None]
    with ledger() as book:
        norm = returned(clip(shares, wholes, axes, max_norm), "clip_over_mesh")
    sent = {axis: (book.calls(axis), book.bytes(axis)) for axis in ("dp", "pp", "tp")}
    return {"norm": float(norm), "gradients": {name: p.grad for name, p in parameters.items()}, "sent": sent}


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for task 6: half a block, alone and on a mesh
CUT = {"norm.weight": None, "norm.bias": None, "up.weight": 0, "up.bias": 0, "down.weight": 1, "down.bias": None}


def block_weights() -> dict[str, Tensor]:
    """Of a norm and an MLP of width 6, by name."""
    shapes = [(6,), (6,), (24, 6), (24,), (6, 24), (6,)]
    return {name: numbers(*shape, seed=i) for i, (name, shape) in enumerate(zip(CUT, shapes, strict=True))}


def one_process(x: Tensor, wanted: Tensor) -> dict[str, Tensor]:
    """The loss and its gradients."""
    p = {name: w.requires_grad_() for name, w in block_weights().items()}
    middle = F.gelu(F.linear(F.layer_norm(x, (6,), p["norm.weight"], p["norm.bias"]), p["up.weight"], p["up.bias"]))
    loss = (x + F.linear(middle, p["down.weight"], p["down.bias"]) - wanted).square().mean()
    loss.backward()
    return {"the loss": loss.detach()} | {name: w.grad for name, w in p.items()}


def batch_of(many: int) -> tuple[Tensor, Tensor]:
    """x and what is wanted: rows of 8 positions, of width 6."""
    return numbers(many, 8, 6, seed=20), numbers(many, 8, 6, seed=21)


def stepped(axes: dict[str, Axis], step: Callable, many: int) -> dict:
    """Loss and gradients of this rank after a step, and how far they are off; bytes at each axis."""
    x, wanted = batch_of(many)
    p = {name: share(w, axes["tp"], CUT[name]).requires_grad_() for name, w in block_weights().items()}
    for w in p.values():
        w.grad = torch.ones_like(w)  # of a step before
    with ledger() as book:
        loss = returned(step(p, x, wanted, axes), "hybrid_step").detach()
    whole = one_process(x, wanted)
    found = {"the loss": off(loss, whole.pop("the loss"))}
    found |= {name: off(p[name].grad, share(g, axes["tp"], CUT[name])) for name, g in whole.items()}
    held = sum(w.nbytes for w in p.values())
    return {"off": found, "sent": {axis: book.bytes(axis) for axis in ("dp", "tp")}, "held": held}


# %% [markdown] lang="en"
# ## 03g.1 · Trace: who talks to whom
#
# A mesh has 2 data ranks, 3 pipeline stages and 4 tensor ranks. `tp` is innermost: neighboring rank numbers differ
# along `tp`. Then comes `pp`, and `dp` is outermost. So
#
# $$\text{rank} = (\text{dp} \cdot 3 + \text{pp}) \cdot 4 + \text{tp}$$
#
# A *group* of an axis are the ranks that differ only along it. Work out, on paper, the three groups of rank 13.

# %% [markdown] lang="en" hint="03g.1"
# Where is rank 13? Dividing by 4 gives 3, and 1 is left: that is its place along `tp`. Dividing 3 by 3 gives 1, its
# place along `dp`, and 0 is left, its place along `pp`.

# %% [markdown] lang="en" hint="03g.1"
# One step along `tp` is 1, one along `pp` is 4, one along `dp` is 12.


# %% task="03g.1" title="Trace: who talks to whom"
def groups_of_rank_13() -> dict[str, list[int]]:
    """The ranks of each group that rank 13 is in, itself among them."""
    ### BEGIN SOLUTION
    return {"tp": [12, 13, 14, 15], "pp": [13, 17, 21], "dp": [1, 13]}
    ### END SOLUTION


# %% check="03g.1" seconds=20
# Check of 03g.1: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    yours, mesh = dict(returned(groups_of_rank_13(), "groups_of_rank_13")), Mesh(dp=2, pp=3, tp=4)
    for axis, size in (("tp", 4), ("pp", 3), ("dp", 2)):
        assert axis in yours, f"groups_of_rank_13 says nothing about {axis!r}."
        group = sorted(yours[axis])
        assert len(group) == size, f"{axis}: you give {len(group)} ranks, and there are {size} along this axis."
        assert 13 in group, f"{axis}: rank 13 is not in {group}, and it is in its own group."
        assert max(group) < 24, f"{axis}: {group} has ranks that do not exist: there are 24, from 0 on."
        step = mesh.step(axis)
        told = f"{axis}: you give {group}. One step along it changes the rank number by {step}"
        assert group == list(mesh.line(axis, 13)), f"{told}: where does the group of rank 13 begin?"
    print("one step along tp, pp, dp:", *(mesh.step(axis) for axis in ("tp", "pp", "dp")))

# %% [markdown] lang="en"
# ## 03g.2 · Write: all groups of an axis
#
# Every engine for hybrid training makes these groups when it starts. Write it for any axes: `sizes` has them by name,
# the outermost first, so that the last one is innermost. `{"dp": 2, "tp": 2}` are the ranks 0, 1 and 2, 3 along `tp`,
# and 0, 2 and 1, 3 along `dp`.
#
# Every rank is in exactly one group of an axis, and within a group ranks are in the order of their place along it.

# %% [markdown] lang="en" hint="03g.2"
# One step along an axis changes the rank number by the product of the sizes of all axes *inside* of it, that is, behind
# it in `sizes`. For the innermost that is `prod([]) = 1`.

# %% [markdown] lang="en" hint="03g.2"
# Which ranks are the first ones of their group? Those whose place along the axis is 0: `rank // step % size == 0`.

# %% [markdown] lang="en" hint="03g.2"
# From a first one on, the group is `first, first + step, first + 2 * step, ...`, `size` of them.


# %% task="03g.2" title="Write: all groups of an axis" engine="groups_along"
def groups_along(sizes: dict[str, int], axis: str) -> list[list[int]]:
    """All groups along an axis. sizes: name -> ranks along it, the outermost first."""
    ### BEGIN SOLUTION
    names = list(sizes)
    step = prod(sizes[name] for name in names[names.index(axis) + 1 :])
    firsts = [rank for rank in range(prod(sizes.values())) if rank // step % sizes[axis] == 0]
    return [[first + step * i for i in range(sizes[axis])] for first in firsts]
    ### END SOLUTION


# %% check="03g.2" seconds=20
# Check of 03g.2: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    told = "groups_along uses minipar's Mesh: here work them out from the sizes."
    assert not names_in(groups_along) & {"Mesh", "line", "lines", "plane", "connect"}, told
    for sizes in [
        {"dp": 2, "tp": 2}, {"dp": 2, "pp": 2, "tp": 2}, {"dp": 4, "pp": 3, "tp": 2}, {"tp": 2, "dp": 3, "pp": 5},
        {"dp": 2, "pp": 1, "ep": 3, "cp": 2, "tp": 4}, {"tp": 5},
    ]:  # fmt: skip
        for axis in sizes:
            mesh = f"groups_along({sizes}, {axis!r})"
            yours = [list(group) for group in returned(groups_along(sizes, axis), "groups_along")]
            ranks = prod(sizes.values())
            lengths = sorted({len(group) for group in yours})
            assert lengths == [sizes[axis]], (
                f"{mesh} has groups of {lengths} ranks, and {sizes[axis]} are along {axis}."
            )
            members = sorted(rank for group in yours for rank in group)
            told = f"{mesh}: each of the {ranks} ranks is in one group, and you give {len(members)}: {members}"
            assert members == list(range(ranks)), f"{told}."
            told = f"{mesh} begins with {yours[0]}, and should with {right_groups(sizes, axis)[0]}"
            assert sorted(yours) == right_groups(sizes, axis), f"{told}: which axes are inside of {axis}?"
    print("right for 6 meshes of up to 48 ranks, and for any order of the axes")

# %% [markdown] lang="en"
# ## 03g.3 · Complete: which axes leave the node
#
# GPUs of one node have fast links, and links between nodes are slower, for H100s by a factor of nine. Ranks 0 to 7 are
# in the first node of 8, 8 to 15 in the second, and so on. An axis leaves the node if *any* of its groups has ranks in
# two nodes. This is what to look at first when a layout that was fast elsewhere is slow here.
#
# The sly case: with 6 tensor ranks and nodes of 8 each group is smaller than a node, and still some lie in two.

# %% [markdown] lang="en" hint="03g.3"
# The node of a rank is `rank // node`. A group is within a node if all its ranks have the same.

# %% [markdown] lang="en" hint="03g.3"
# `len({rank // node for rank in group})` is the number of nodes that a group lies in.


# %% task="03g.3" title="Complete: which axes leave the node"
def axes_between_nodes(groups: dict[str, list[list[int]]], node: int) -> set[str]:
    """The axes that leave the node. groups: all of each axis; node: ranks in a node."""
    found = set()
    for axis, some in groups.items():
        ### BEGIN SOLUTION
        if any(len({rank // node for rank in group}) > 1 for group in some):
            found.add(axis)
        ### END SOLUTION
    return found


# %% check="03g.3" seconds=20
# Check of 03g.3: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    for sizes, node, wanted in [
        ({"dp": 2, "tp": 8}, 8, {"dp"}), ({"dp": 2, "tp": 4}, 8, set()), ({"dp": 4, "pp": 2, "tp": 4}, 8, {"dp"}),
        ({"dp": 2, "pp": 4, "tp": 8}, 8, {"dp", "pp"}), ({"dp": 4, "tp": 6}, 8, {"dp", "tp"}),
        ({"dp": 1, "tp": 8}, 4, {"tp"}), ({"tp": 2, "dp": 8}, 8, {"tp"}), ({"dp": 3, "tp": 2}, 4, {"dp"}),
    ]:  # fmt: skip
        groups = {axis: right_groups(sizes, axis) for axis in sizes}
        yours = set(returned(axes_between_nodes(groups, node), "axes_between_nodes"))
        for axis in sizes:
            crossing = next((group for group in groups[axis] if len({rank // node for rank in group}) > 1), None)
            why = f"its group {crossing} lies in more than one" if crossing else "each of its groups lies in one"
            told = f"{sizes}, nodes of {node}: {axis} {'leaves' if crossing else 'does not leave'} the node, {why}."
            assert (axis in yours) == (axis in wanted), told
    sly = sum(len({rank // 8 for rank in group}) > 1 for group in right_groups({"dp": 4, "tp": 6}, "tp"))
    print(f"the sly one, dp 4 × tp 6 on nodes of 8: {sly} of 4 tensor groups lie in two nodes")

# %% [markdown] lang="en"
# ## 03g.4 · Predict: bytes of a step, by axis
#
# A GPT trains on a mesh, in float64, 8 bytes a number. What does a rank send in one step along each axis? Put together
# what the chapters on the three axes say, for a rank that is at place `stage` of the pipeline:
#
# - `dp`: one all-reduce of the gradients of the parameters that it holds;
# - `tp`: four all-reduces of an activation for each of its blocks; one more for the embedding, on the first stage; one
#   more for the input of the head, on the last stage, where the loss also sums three numbers for each token;
# - `pp`: an activation over each boundary forward, and its gradient back. A rank sends to the next stage, if there is
#   one, and to the one before, if there is one.
#
# An activation has `width` numbers for each position of each row *of this data rank*. An all-reduce of $M$ bytes on $n$
# ranks sends $2M(n-1)/n$. The few bytes for the sums of loss and count are left out.
#
# The check compares with the ledgers of real ranks, **to the byte**, on seven layouts. One argument is of no use.

# %% [markdown] lang="en" hint="03g.4"
# Microbatches are smaller and more: their activations are together as large as that of the whole batch. So the number
# of microbatches is of no use. (It counts calls.)

# %% [markdown] lang="en" hint="03g.4"
# `here = rows // mesh.dp * positions` are the tokens of this data rank, `8 * here * width` the bytes of an activation
# of all its microbatches.

# %% [markdown] lang="en" hint="03g.4"
# `first = stage == 0` and `last = stage == mesh.pp - 1` count as 1 and 0 in a sum: `4 * blocks + first + last`
# activations along `tp`, and along `pp` it is `2 - first - last`. Then `last * 3 * 8 * here` for the loss.


# %% task="03g.4" title="Predict: bytes of a step, by axis"
def bytes_of_a_step(
    mesh: Mesh,
    stage: int,  # place along pp
    blocks: int,  # of this stage
    parameters: int,  # numbers that this rank holds
    rows: int,  # of the whole batch
    positions: int,  # of a row
    width: int,
    microbatches: int,
) -> dict[str, float]:
    """Bytes that a rank sends in a step along "dp", "tp" and "pp"."""
    ### BEGIN SOLUTION
    here = rows // mesh.dp * positions
    activation = 8 * here * width
    first, last = stage == 0, stage == mesh.pp - 1
    return {
        "dp": 2 * (mesh.dp - 1) / mesh.dp * 8 * parameters,
        "tp": 2 * (mesh.tp - 1) / mesh.tp * ((4 * blocks + first + last) * activation + last * 3 * 8 * here),
        "pp": (2 - first - last) * activation,
    }
    ### END SOLUTION


# %% check="03g.4" seconds=30
# Check of 03g.4: run this after your answer
# NBVAL_CHECK_OUTPUT
def really_sent(axes, mesh, many, microbatches):
    model = parallelize(fresh_model(mesh.pp), mesh, microbatches=microbatches)
    if mesh.pp > 1:
        model.step(tokens[:many], targets[:many])  # in the first step, shapes travel ahead
    with ledger() as book:
        model.step(tokens[:many], targets[:many])
    blocks = {name.split(".")[1] for name, _ in model.named_parameters() if name.startswith("blocks.")}
    sums = {"dp": reduced(16, mesh.dp), "pp": reduced(16, mesh.pp), "tp": 0}  # of loss and count
    sent = {axis: book.bytes(axis) - round(sums[axis]) for axis in sums}
    return sent, axes["pp"].index, len(blocks), sum(p.numel() for p in model.parameters())


with verdict():
    for mesh, many, microbatches in [
        (Mesh(dp=4), 8, 1), (Mesh(tp=4), 4, 2), (Mesh(pp=4), 8, 4), (Mesh(dp=2, tp=2), 8, 1),
        (Mesh(dp=2, pp=2), 8, 2), (Mesh(pp=2, tp=2), 8, 2), (Mesh(dp=2, tp=2), 4, 2),
    ]:  # fmt: skip
        for sent, stage, blocks, parameters in on_mesh(really_sent, mesh, mesh, many, microbatches):
            yours = returned(
                bytes_of_a_step(mesh, stage, blocks, parameters, many, 32, 32, microbatches), "bytes_of_a_step"
            )
            for axis, real in sent.items():
                case = f"{called(mesh)}, {many} rows, {microbatches} microbatch{'es' * (microbatches > 1)}"
                case += f", stage {stage} of {mesh.pp}"
                assert axis in yours, f"bytes_of_a_step says nothing about {axis!r}."
                told = f"{case}: along {axis} you predict {yours[axis]:,.0f} bytes, and {real:,} were sent."
                factor = yours[axis] / real if real else 0
                hint = {0.125: " A number has 8 bytes.", 2: " That is twice as much.", 0.5: " That is half of it."}
                hint[microbatches] = " Are microbatches smaller, or only more?"
                assert abs(yours[axis] - real) < 1, told + hint.get(round(factor, 9), "")
    print("7 layouts, to the byte; the last:", ", ".join(f"{axis} {real:,}" for axis, real in sent.items()))

# %% [markdown] lang="en"
# ## 03g.5 · Write: clip over the mesh
#
# Before a step, gradients are scaled down if their norm is above a limit: the norm of *the whole model's* gradient, all
# parameters together. No rank has them all. A tensor rank has shares of most matrices, and copies of norms and some
# biases. A stage has its own layers. If each rank clips by the norm of what it holds, copies that must stay equal drift
# apart, and nothing in the loss shows it.
#
# So the ranks add up *squares*. Each number of the model should count once: shares are summed over `tp`, copies are
# not, and then all stages are summed over `pp`. Data ranks have the same gradients already.
#
# **Target:** two calls of one number each, one along `tp` and one along `pp`, nothing along `dp`.

# %% [markdown] lang="en" hint="03g.5"
# The square of the norm is the sum of `p.grad.square().sum()`. Not of the norms.

# %% [markdown] lang="en" hint="03g.5"
# First the squares of the shares, summed over `axes["tp"]`. To that add the squares of the copies, as they are on this
# rank. Then sum over `axes["pp"]`, and take the root.

# %% [markdown] lang="en" hint="03g.5"
# If the norm is larger than `max_norm`, multiply each gradient by `max_norm / norm`, in place: `p.grad.mul_(...)`.


# %% task="03g.5" title="Write: clip over the mesh" engine="clip_over_mesh"
def clip_over_mesh(
    shares: list[nn.Parameter],  # each tensor rank has another part
    copies: list[nn.Parameter],  # whole on each tensor rank, with equal gradients
    axes: dict[str, Axis],  # stages have parameters of their own, data ranks the same
    max_norm: float,
) -> Tensor:
    """Scale every .grad so that the whole model's gradient has at most this norm.

    Returns the norm before, 0-d.
    """
    ### BEGIN SOLUTION
    squares = all_reduce(sum(p.grad.square().sum() for p in shares), axes["tp"])
    squares = squares + sum(p.grad.square().sum() for p in copies)
    norm = all_reduce(squares, axes["pp"]).sqrt()
    if norm > max_norm:
        for p in [*shares, *copies]:
            p.grad.mul_(max_norm / norm)
    return norm
    ### END SOLUTION


# %% check="03g.5" seconds=20
# Check of 03g.5: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    for mesh in (Mesh(tp=4), Mesh(pp=4), Mesh(pp=2, tp=2), Mesh(dp=2, tp=2)):
        whole = whole_gradients(mesh.pp)
        right = float(torch.cat([g.flatten() for stage in whole for g in stage.values()]).norm())
        for limit in (1.0, 100.0):
            for rank, got in enumerate(on_mesh(clipped_on_mesh, mesh, clip_over_mesh, limit)):
                case = f"{called(mesh)}, rank {rank}"
                told = f"{case}: the norm is {got['norm']:.6f}, and that of the whole gradient is {right:.6f}."
                assert abs(got["norm"] - right) < 1e-9 * right, f"{told} Does each number count once?"
                place = mesh.coordinate(rank)
                for name, gradient in got["gradients"].items():
                    wanted = whole[place["pp"]][name] * min(1, limit / right)
                    if DIMS[name] is not None:
                        cut = [wanted.size(DIMS[name]) * i // mesh.tp for i in range(1, mesh.tp)]
                        wanted = wanted.tensor_split(cut, DIMS[name])[place["tp"]]
                    factor = float((gradient * wanted).sum() / (wanted * wanted).sum())
                    told = f"{case}: the norm is right, but with a limit of {limit:g} the gradient of {name} is"
                    assert off(gradient, wanted) < 5e-6, f"{told} {factor:.4g} times what it should be."
                for axis, (calls, sent) in got["sent"].items():
                    least = (
                        (1, round(reduced(8, mesh.shape[axis]))) if axis != "dp" and mesh.shape[axis] > 1 else (0, 0)
                    )
                    told = f"{case}: all is right, but along {axis} {calls} calls are made with {sent} bytes"
                    assert (calls, sent) == least, f"{told}, and {least[0]} with {least[1]} will do."
    print(f"norm {right:.4f} on every rank of {called(mesh)}, for {got['sent']['tp'][1]} bytes along tp")

# %% [markdown] lang="en"
# ## 03g.6 · Mend: summed over everybody
#
# A step on data and tensor axes: each data rank has its rows, and between the cut layers each tensor rank has its part
# of their positions (sequence parallelism). The block is this; of `up.weight`, `up.bias` and `down.weight` each tensor
# rank has a share.


# %% tags=["setup"]
def my_block(x: Tensor, p: dict[str, Tensor], tp: Axis) -> Tensor:
    """x + MLP(norm(x)) for this rank's positions: (rows, its positions, 6) -> the same."""
    normed = F.layer_norm(x, (6,), p["norm.weight"], p["norm.bias"])
    middle = F.gelu(F.linear(enter_sequence(normed, tp), p["up.weight"], p["up.bias"]))
    return x + leave_sequence(F.linear(middle, p["down.weight"]), tp) + p["down.bias"]


# %% [markdown] lang="en"
# Whoever wrote the step below knew data parallelism: each rank takes the mean over what it has, and at the end
# gradients are averaged over all four ranks. But a gradient has to be summed over those ranks that have *the same
# parameter and saw something else*. For all six parameters that is `dp`. Say for which of them it is `tp`, too, and
# mend the step. It has to be right for any number of rows, seven on two data ranks, say. The cell after it compares the
# loss and each gradient with one process.
#
# `x` and `wanted` are the whole batch, the same on every rank. `rows(batch, n)` cuts it in `n` parts.
#
# **Target:** along `dp` each rank sends an all-reduce of the gradients that it holds, along `tp` (beside the four
# gathers and scatters of the block) of 18 numbers. The loss is a number more for each.

# %% [markdown] lang="en" hint="03g.6"
# Tensor ranks have *other* shares of `up.weight`, `up.bias` and `down.weight`. Of the remaining three they have copies,
# and used them on other positions.

# %% [markdown] lang="en" hint="03g.6"
# The mean over everything is the sum over this rank's numbers, divided by how many there are in all: `wanted.numel()`.
# Then nothing is to be divided at the end, only summed.

# %% [markdown] lang="en" hint="03g.6"
# For each name in `p`: `gradient = all_reduce(p[name].grad, dp)`; if `name` is not one of `up.weight`, `up.bias` and
# `down.weight`, `all_reduce` it over `tp`, too. The loss is summed over both.


# %% task="03g.6" title="Mend: summed over everybody"
def summed_over_both() -> set[str]:
    """The parameters whose gradients are to be summed over "tp", too."""
    ### BEGIN SOLUTION
    return {"norm.weight", "norm.bias", "down.bias"}
    ### END SOLUTION


def hybrid_step(p: dict, x: Tensor, wanted: Tensor, axes: dict[str, Axis]) -> Tensor:
    """Set .grad of each parameter in p. The loss is the mean square of y - wanted.

    x, wanted: (rows, positions, 6), the whole batch. Returns the loss of all of it.
    """
    dp, tp = axes["dp"], axes["tp"]
    for w in p.values():
        w.grad = None
    mine, goal = (shard(rows(batch, dp.size)[dp.index], tp, 1) for batch in (x, wanted))
    y = my_block(mine, p, tp)
    ### BEGIN SOLUTION
    loss = (y - goal).square().sum() / wanted.numel()
    loss.backward()
    for name, w in p.items():
        w.grad = all_reduce(w.grad, dp)
        if name not in ("up.weight", "up.bias", "down.weight"):
            w.grad = all_reduce(w.grad, tp)
    return all_reduce(all_reduce(loss.detach(), dp), tp)
    ### INSTEAD
    # loss = (y - goal).square().mean()
    # loss.backward()
    # for w in p.values():
    #     w.grad = all_reduce(all_reduce(w.grad, dp), tp) / (dp.size * tp.size)
    # return all_reduce(all_reduce(loss.detach(), dp), tp) / (dp.size * tp.size)
    ### END SOLUTION


# %%
print(f"{'dp 2 × tp 2':<16}{'8 rows':>16}{'7 rows':>16}")
both = [on_mesh(stepped, Mesh(dp=2, tp=2), hybrid_step, many) for many in (8, 7)]
for name in ("the loss", *CUT):
    worst = [max(rank["off"][name] for rank in ranks) for ranks in both]
    print(f"{name:<16}" + "".join(f"{'equal' if far < 1e-12 else f'off by {far:.1%}':>16}" for far in worst))

# %% check="03g.6" seconds=20
# Check of 03g.6: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    named = {*returned(summed_over_both(), "summed_over_both")}
    for name, dim in CUT.items():
        why = "each tensor rank has another share of it" if dim is not None else "each used it on its own positions"
        told = f"summed_over_both {'leaves out' if dim is None else 'names'} {name}: {why}."
        assert (name in named) == (dim is None), told
    assert len(named) == 3, f"summed_over_both has {named - {*CUT}}, which are no parameters."
    for mesh, many in [(Mesh(dp=2, tp=2), 8), (Mesh(dp=2, tp=2), 7), (Mesh(dp=4), 6), (Mesh(tp=4), 3)]:
        for rank, got in enumerate(on_mesh(stepped, mesh, hybrid_step, many)):
            case = f"{called(mesh)}, {many} rows, rank {rank}"
            for name, far in got["off"].items():
                what = name if name == "the loss" else f"the gradient of {name}"
                assert far < 1e-12, f"{case}: {what} is off by {far:.2g}, as a share of its largest number."
            activation = (
                4 * (mesh.tp - 1) / mesh.tp * rows(torch.empty(many, 48), mesh.dp)[mesh.coordinate(rank)["dp"]].numel()
            )
            least = {"dp": reduced(got["held"] + 8, mesh.dp), "tp": reduced(18 * 8 + 8, mesh.tp) + 8 * activation}
            for axis, sent in got["sent"].items():
                told = (
                    f"{case}: all is right, but {sent:,} bytes are sent along {axis}, and {least[axis]:,.0f} will do."
                )
                assert sent <= least[axis] + 16, told
    print(f"mended, for equal rows and unequal ones; {many} rows on {called(mesh)}: {least['tp']:,.0f} bytes along tp")

# %% [markdown] lang="en"
# ## All together
#
# Your clipping, on a GPT that `parallelize` has cut over two stages and two tensor ranks, beside the package's own. It
# runs once task 5 is done.


# %% tags=["raises-exception"]
def clipped(axes, mesh, by_hand):
    model = parallelize(fresh_model(2), mesh)
    model.step(tokens, targets)
    if not by_hand:
        norm = model.clip_gradients(0.1)
    else:
        shares = [p for p in model.parameters() if is_cut(p, axes["tp"])]
        copies = [p for p in model.parameters() if not is_cut(p, axes["tp"])]
        norm = clip_over_mesh(shares, copies, axes, 0.1)
    return norm.item(), model.full_gradients()


(norm, yours), (right, package) = (
    on_mesh(clipped, Mesh(pp=2, tp=2), Mesh(pp=2, tp=2), one)[0] for one in (True, False)
)
far = max(off(yours[name], package[name]) for name in package)
print(f"norm before: {norm:.6f}, and by the package {right:.6f}; clipped gradients differ by at most {far:.0e}")
