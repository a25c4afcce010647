# %% [markdown] lang="en"
# # Exercises of 03a: data parallelism
#
# Eleven small functions, an hour and a half or so. Together they are the data-parallel half of a training engine: by
# the end four ranks on your machine train a GPT on Python's documentation, with gradients equal to those of one process
# to twelve digits.
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
#     python -m minipar grade exercises/03a_data_parallel.ipynb
#
#     # hints for task 2, one at a time; its solution, once it passes
#     python -m minipar hint 03a.2
#     python -m minipar solution 03a.2
#
# `grade` reads only the cells with a function to finish. Cells that you add are for trying things out. The folded cells
# belong to the checks, so an answer that uses their variables (`tokens`, `targets`, ...) or functions is refused: take
# what your function is given, and what is imported.

# %% tags=["setup"]
from collections.abc import Callable, Iterable
from itertools import pairwise, product
from math import isnan
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipar import Axis, Mesh, World, connect, corpus, ledger
from minipar.collectives import all_gather, all_reduce, reduce_scatter, start_all_reduce, start_reduce_scatter
from minipar.course.checks import difference, names_in, returned, verdict
from minipar.course.given import (
    along,
    fresh_model,
    gradients,
    loss_of_one_process,
    one_process,
    padded,
    targets,
    tokens,
    total_loss,
)
from minipar.data import rows
from minipar.transport import Pending

world = World(4)

# %% [markdown] lang="en"
# The next cells are folded, too: training loops for the later tasks. Run them all; read them when you want to know.
# What they and the checks work on is in `minipar/course/given.py`: a small GPT in float64, its loss as a *sum* over
# tokens, eight rows of text, and what one process gets for them.
#
# What you need to know is the `axis` that your functions are given, the line of ranks that share the data:
# `axis.size` is the number of ranks, here 4, and `axis.index` is this rank's place, 0 to 3.


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given: how to call a function on each rank, and a backward on each
def on_each_rank(function: Callable, *args, dp: int = 4) -> list:
    """What function(axis, *args) returns on rank 0, 1, 2, 3. With dp=2 the axis has two ranks, and is there twice."""
    return along(world, "dp", function, *args, size=dp)


def my_gradients(axis: Axis, divide_by: int) -> nn.Module:
    """The model after a backward over this rank's two rows of the eight; the loss is divided by a number."""
    model = fresh_model()
    mine, labels = rows(tokens, axis.size)[axis.index], rows(targets, axis.size)[axis.index]
    (total_loss(model, mine, labels) / divide_by).backward()
    return model


def summed_gradients(model: nn.Module, axis: Axis) -> dict[str, Tensor]:
    """Each gradient summed over the ranks, by parameter name."""
    flat = all_reduce(nn.utils.parameters_to_vector(gradients(model).values()), axis)
    nn.utils.vector_to_parameters(flat, model.parameters())
    return {name: p.detach() for name, p in model.named_parameters()}


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for task 7: parameters in buckets
def make_buckets(model: nn.Module, number: int) -> list[tuple[list[nn.Parameter], Tensor]]:
    """Parameters from the back of the model, each group with the flat tensor of which its .grad are views."""
    parameters = list(model.parameters())[::-1]
    cut = [len(parameters) * i // number for i in range(number + 1)]
    buckets = []
    for a, b in pairwise(cut):
        group = parameters[a:b]
        flat = torch.zeros(sum(p.numel() for p in group), dtype=group[0].dtype)
        for p, part in zip(group, flat.split([p.numel() for p in group]), strict=True):
            p.grad = part.view_as(p)
        buckets.append((group, flat))
    return buckets


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for task 7: which of the calls are under way when backward comes to the embedding, the last of all
def watch(model: nn.Module, launched: list) -> list[list[bool]]:
    """Gets a list for each backward: of each call, whether nobody has waited for it yet."""
    early = []

    def note(_):
        what = "`launched` must get what start_all_reduce returns. all_reduce waits for the sum and returns that"
        assert all(isinstance(pending, Pending) for pending in launched), what
        early.append([isnan(pending.entry.end) for pending in launched])

    model.embed.token.weight.register_hook(note)
    return early


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for task 7: two steps of training that use your function
def train_overlapped(axis: Axis, launch_early: Callable) -> list[dict]:
    """Steps of two microbatches and of one: calls, gradients, and which of the early calls were still under way."""
    model, state, launched = fresh_model(), {"last": False}, []
    buckets, early = make_buckets(model, 3), watch(model, launched)
    for bucket, flat in buckets:
        launch_early([*bucket[3:], *bucket[:3]], flat, axis, lambda: state["last"], launched)  # in no order
    steps = []
    for microbatches in (2, 1):  # this rank's two rows, one at a time, then both
        mine = slice(2 * axis.index, 2 * axis.index + 2)
        with ledger() as book:
            for i in range(microbatches):
                state["last"] = i == microbatches - 1
                x, y = (rows(batch[mine], microbatches)[i] for batch in (tokens, targets))
                (total_loss(model, x, y) / (8 * 32)).backward()
        for pending in launched:
            pending.wait()
        got = {name: p.grad.clone() for name, p in model.named_parameters()}
        steps.append({"calls": book.calls("dp"), "early": early[-1], "gradients": got})
        launched.clear()
        for _, flat in buckets:
            flat.zero_()
    return steps


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for task 8: a model and optimizers
def two_layers() -> nn.Module:
    """A model of three parameters, so that little is sent."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(512, 8), nn.Linear(8, 512)).double()


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "SGD, clipped": lambda p: torch.optim.SGD(p, lr=0.1),
}


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for task 8: training in both ways
def weights_after(axis: Axis, optimizer: str, merge: Callable | None) -> dict[str, Tensor]:
    """The weights after two steps. Without `merge`, each rank runs the whole batch: the mean gradient, unsent."""
    model = two_layers()
    stepper = OPTIMIZERS[optimizer](model.parameters())
    each = 8 // axis.size
    mine = slice(each * axis.index, each * (axis.index + 1)) if merge else slice(8)
    for step in range(2):
        x, y = tokens[mine].roll(step, 1), targets[mine].roll(step, 1)
        model.zero_grad()
        (total_loss(model, x, y) / y.numel()).backward()
        if optimizer == "SGD, clipped":
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        merge(model, stepper, axis) if merge else stepper.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for task 9: a run of your step
def train(axis: Axis, step: Callable, targets: Tensor, microbatches: int, steps: int) -> dict:
    """Steps of Adam on the eight rows. All losses; rows, gradients, calls and bytes of the first step."""
    model, losses, seen = fresh_model(), [], []
    model.register_forward_pre_hook(lambda model, args: seen.append(len(args[0])))
    for p in model.parameters():
        p.grad = torch.ones_like(p)  # of a step before
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for i in range(steps):
        with ledger() as book:
            losses.append(step(model, tokens, targets, axis, microbatches).item())
        if i == 0:
            first = {"gradients": gradients(model), "calls": book.calls("dp"), "bytes": book.bytes("dp")}
            first["rows"] = list(seen)
        optimizer.step()
    return first | {"losses": losses}


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for task 10: two steps of training that use your function
def train_in_shares(axis: Axis, optimizer: str, step: Callable) -> dict:
    """What one of the ranks ends with, and the weights of one process."""
    model, each = two_layers(), 8 // axis.size
    flat = nn.utils.parameters_to_vector(model.parameters()).detach()
    own = nn.Parameter(flat.view(axis.size, -1)[axis.index].clone())
    stepper, mine = OPTIMIZERS[optimizer]([own]), slice(each * axis.index, each * (axis.index + 1))
    for i in range(2):
        x, y = tokens[mine].roll(i, 1), targets[mine].roll(i, 1)
        model.zero_grad()
        (total_loss(model, x, y) / targets.numel()).backward()
        flat = nn.utils.parameters_to_vector(gradients(model).values())
        with ledger() as book:
            whole = returned(step(flat, own, stepper, axis), "zero_step")
        right = isinstance(whole, Tensor) and whole.shape == flat.shape
        assert right, f"zero_step must return all weights, a tensor of the shape {tuple(flat.shape)}"
        nn.utils.vector_to_parameters(whole.detach(), model.parameters())
    state = sum(x.numel() for x in stepper.state[own].values() if x.dim())
    got = {name: p.detach().clone() for name, p in model.named_parameters()}
    return {"weights": got, "bytes": book.bytes("dp"), "state": state, "right": weights_after(axis, optimizer, None)}


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for task 11: the gradients of a step, a microbatch at a time
def add_up(axis: Axis, function: Callable, numbers: int) -> dict:
    """What your function returns for three microbatches, and how many whole gradients it held meanwhile."""
    made, held = [], [0]

    def microbatches():
        for i in range(3):
            held.append(sum(one() is not None for one in made))
            gradient = (axis.index + 1) * 10.0**i * torch.arange(1, numbers + 1, dtype=torch.float64)
            made.append(ref(gradient))
            yield gradient
            del gradient

    with ledger() as book:
        share = returned(function(microbatches(), axis), "my_share_of_gradients")
    assert isinstance(share, Tensor), f"my_share_of_gradients must return a tensor, not {share!r}"
    return {"share": share, "held": max(held), "calls": book.calls("dp"), "bytes": book.bytes("dp")}


# %% [markdown] lang="en"
# ## 03a.1 · Trace: who loads what
#
# A step takes 10 rows of text, on 4 ranks. The share of rank $r$ begins at row $\lfloor 10\,r/4 \rfloor$ and ends
# where the share of rank $r+1$ begins. In Python: `10 * r // 4`.
#
# Work out the row numbers of each rank, on paper. Do not write code for it: that is the next task.

# %% [markdown] lang="en" hint="03a.1"
# Rank 0 begins at row `10 * 0 // 4 = 0`, rank 1 at row `10 * 1 // 4 = 2`. So rank 0 has the rows 0 and 1.

# %% [markdown] lang="en" hint="03a.1"
# The shares begin at rows 0, 2, 5 and 7. The last one ends with row 9.


# %% task="03a.1" title="Trace: who loads what"
def rows_of_each_rank() -> list[list[int]]:
    """10 rows on 4 ranks: the row numbers of rank 0, of rank 1, of rank 2, of rank 3."""
    ### BEGIN SOLUTION
    return [[0, 1], [2, 3, 4], [5, 6], [7, 8, 9]]
    ### END SOLUTION


# %% check="03a.1" seconds=20
# Check of 03a.1: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    yours = [list(share) for share in returned(rows_of_each_rank(), "rows_of_each_rank")]
    loaded = on_each_rank(lambda axis: rows(torch.arange(10), axis.size)[axis.index].tolist())
    assert len(yours) == 4, f"There are 4 ranks, and you give {len(yours)} lists: one list for each rank."
    for row in range(10):
        owners = [rank for rank, share in enumerate(yours) if row in share]
        assert owners, f"Row {row} is on no rank: it would never be learned from."
        assert len(owners) == 1, f"Row {row} is on ranks {owners}: it would count {len(owners)} times."
    for rank in range(4):
        first, end = 10 * rank // 4, 10 * (rank + 1) // 4
        why = f"its share begins at row 10 * {rank} // 4 = {first} and ends before row 10 * {rank + 1} // 4 = {end}"
        assert yours[rank] == loaded[rank], f"Rank {rank}: you give the rows {yours[rank]}, but {why}."
    print("rows per rank:", *map(len, loaded))

# %% [markdown] lang="en"
# ## 03a.2 · Complete: load your own rows
#
# Now as a function, for any number of rows. No row may be lost and none be on two ranks; and no rank should have two
# rows more than another, since all wait for the slowest. Three rows on four ranks must work too: then one rank gets
# an empty share, shape `(0, context)`.
#
# The imported `rows` does this already. It is for the tasks further down; here it is refused.

# %% [markdown] lang="en" hint="03a.2"
# It is the formula of the task before, with `total` for 10, `axis.size` for 4 and `axis.index` for $r$.

# %% [markdown] lang="en" hint="03a.2"
# Multiply first, then divide: `total * axis.index // axis.size`. `(total // axis.size) * axis.index` loses the
# remainder.


# %% task="03a.2" title="Complete: load your own rows" engine="my_rows"
def my_rows(batch: Tensor, axis: Axis) -> Tensor:
    """This rank's share of a batch. (total, context) -> (its rows, context)"""
    total = batch.size(0)
    ### BEGIN SOLUTION
    first = total * axis.index // axis.size
    end = total * (axis.index + 1) // axis.size
    ### END SOLUTION
    return batch[first:end]


# %% check="03a.2" seconds=20
# Check of 03a.2: run this after your answer
# NBVAL_CHECK_OUTPUT
def loaded_by(axis, total):
    batch = torch.arange(total)[:, None].expand(total, 32)  # each row holds its own number
    return my_rows(batch, axis)


with verdict():
    for name in names_in(my_rows):
        ours = str(getattr(globals().get(name), "__module__", "")).startswith("minipar.")
        what = f"my_rows uses the imported `{name}`"
        assert not ours and name != "rows", f"{what}: here cut the batch yourself, from total and axis."
    sizes = {}
    for total, n in [(8, 4), (10, 4), (3, 4), (9, 2)]:
        shares = on_each_rank(loaded_by, total, dp=n)[:: 4 // n]
        sizes[total] = [len(s) for s in shares]
        for rank, s in enumerate(shares):
            assert s.shape[1:] == (32,), f"{total} rows, rank {rank}: shape {tuple(s.shape)}, not (its rows, 32)."
        for row in range(total):
            owners = [rank for rank, s in enumerate(shares) if row in s]
            assert owners, f"{total} rows on {n} ranks, shares of {sizes[total]}: row {row} is on no rank."
            assert len(owners) == 1, f"{total} rows on {n} ranks: row {row} is on ranks {owners}, so it counts twice."
        spread = max(sizes[total]) - min(sizes[total])
        assert spread <= 1, f"{total} rows on {n} ranks: shares of {sizes[total]} rows. The others wait for one."
    print("sizes of shares:", {total: sorted(s) for total, s in sizes.items()})

# %% [markdown] lang="en"
# ## 03a.3 · Write: average the gradients
#
# Each rank has run forward and backward on its own two rows, with the mean loss over *its* tokens. All ranks have
# equally many tokens here, so the gradient of the whole batch is the mean of the ranks' gradients. Bring it to every
# rank, parameter by parameter.
#
# `all_reduce(x, axis)` returns the sum of every rank's `x`, a new tensor, and leaves `x` alone.

# %% [markdown] lang="en" hint="03a.3"
# Loop over the parameters. Each has its gradient in `.grad`, with the shape of the parameter.

# %% [markdown] lang="en" hint="03a.3"
# `all_reduce` returns a new tensor: assign it, `p.grad = ...`. It sums, and you want the mean: there are `axis.size`
# ranks.


# %% task="03a.3" title="Write: average the gradients"
def average_gradients(parameters: Iterable[nn.Parameter], axis: Axis) -> None:
    """Replace each .grad by its mean over the ranks, with one all_reduce for each parameter."""
    ### BEGIN SOLUTION
    for p in parameters:
        p.grad = all_reduce(p.grad, axis) / axis.size
    ### END SOLUTION


# %% check="03a.3" seconds=20
# Check of 03a.3: run this after your answer
# NBVAL_CHECK_OUTPUT
def averaged(axis):
    model = my_gradients(axis, divide_by=8 // axis.size * 32)  # of eight rows of 32 tokens
    with ledger() as book:
        average_gradients(model.parameters(), axis)
    return gradients(model), book.calls("dp"), book.bytes("dp")


with verdict():
    answers = on_each_rank(averaged)
    whole = one_process(tokens, targets)
    wrong = difference([got for got, *_ in answers], whole)
    assert not wrong, f"After average_gradients, {wrong}"
    parameters, least = len(whole), sum(2 * 3 * g.nbytes // 4 for g in whole.values())  # n-1 of n chunks, twice
    for rank, (_, calls, sent) in enumerate(answers):
        what = f"rank {rank} makes {calls} all_reduce calls for {parameters} parameters"
        assert calls == parameters, f"The gradients are right, but {what}: make one for each."
        what = f"rank {rank} sends {sent:,} bytes, and an all_reduce of each gradient {least:,}"
        assert abs(sent - least) <= parameters, f"The gradients are right, but {what}: send nothing else."
    wrong = difference([got for got, *_ in on_each_rank(averaged, dp=2)], whole)
    assert not wrong, f"Right on 4 ranks, but on 2 ranks, {wrong} How many are there along the axis?"
    print(f"{calls} calls for {parameters} parameters, gradients equal to one process")

# %% [markdown] lang="en"
# ## 03a.4 · Write: a mean of means is not the mean
#
# Now the texts have different lengths. What is missing at the end of a row is padding, labeled -100, and does not
# count. If each rank divides by *its* number of tokens and you average, a token on a rank with few of them weighs
# more than one on a full rank. With 60 tokens on one rank and 20 on another, three times as much. Nothing crashes,
# the loss falls, and the model is another one.
#
# Every token should weigh $1/N$, with $N$ the number of labeled tokens on **all** ranks. From here on, gradients are
# *summed* over the ranks, and the division is done where the loss is made.

# %% [markdown] lang="en" hint="03a.4"
# This rank knows its own `count`. How does it learn the sum of all counts?

# %% [markdown] lang="en" hint="03a.4"
# The gradient of a sum is the sum of gradients: $\nabla \frac{\sum_r L_r}{N} = \sum_r \nabla \frac{L_r}{N}$. So each
# rank divides its own total $L_r$ by the global $N$. There is no average left to take.


# %% task="03a.4" title="Write: a mean of means is not the mean" engine="my_part_of_the_loss"
def my_part_of_the_loss(total: Tensor, count: Tensor, axis: Axis) -> Tensor:
    """What this rank calls backward on: gradients *summed* over ranks are those of the mean.

    total: the loss summed over this rank's labeled tokens, 0-d.
    count: how many those are, 0-d int64.
    """
    ### BEGIN SOLUTION
    return total / all_reduce(count, axis)
    ### END SOLUTION


# %% check="03a.4" seconds=20
# Check of 03a.4: run this after your answer
# NBVAL_CHECK_OUTPUT
def summed(axis, targets):
    model, (mine, labels) = fresh_model(), (rows(batch, axis.size)[axis.index] for batch in (tokens, targets))
    part = my_part_of_the_loss(total_loss(model, mine, labels), (labels != -100).sum(), axis)
    right = isinstance(returned(part, "my_part_of_the_loss"), Tensor) and part.shape == ()
    assert right, "my_part_of_the_loss must return a 0-d tensor"
    part.backward()
    return part.item(), summed_gradients(model, axis)


with verdict():
    for case, lengths in {
        "equal lengths": [32] * 8,
        "rows of different lengths": [32, 28, 20, 4, 6, 1, 2, 17],
        "no labeled token on rank 3": [32, 28, 20, 4, 6, 1, 0, 0],
    }.items():
        labels = padded(lengths)
        for n in (2, 4):
            answers = on_each_rank(summed, labels, dp=n)[:: 4 // n]
            wrong = difference([got for _, got in answers], one_process(tokens, labels))
            told = "Divide by the labeled tokens of all ranks, and by nothing else."
            assert not wrong, f"With {case}, on {n} ranks, {wrong} {told}"
        added, mean = sum(part for part, _ in answers), loss_of_one_process(labels)
        what = f"With {case}, the gradients are right, but the ranks' parts add up to {added:.4f}"
        assert abs(added - mean) < 1e-9, f"{what}, and the loss is {mean:.4f}: give this rank's part, in float64."
    print("every token weighs the same, with padding and without")

# %% [markdown] lang="en"
# ## 03a.5 · Write: one call for all gradients
#
# Each call has a cost of its own, however little it sends: on a network tens of microseconds, times thousands of
# parameters. So put all gradients side by side in one flat tensor, reduce that, and take it apart again.

# %% [markdown] lang="en" hint="03a.5"
# `torch.cat([p.grad.flatten() for p in parameters])` is 1-d, with `sum(p.numel())` elements.

# %% [markdown] lang="en" hint="03a.5"
# `flat.split([p.numel() for p in parameters])` cuts it again, in the same order; `part.view_as(p)` has the shape of
# the parameter.


# %% task="03a.5" title="Write: one call for all gradients" engine="reduce_flat"
def reduce_flat(parameters: list[nn.Parameter], axis: Axis) -> None:
    """Replace each .grad by its *sum* over the ranks, with a single all_reduce."""
    ### BEGIN SOLUTION
    flat = all_reduce(torch.cat([p.grad.flatten() for p in parameters]), axis)
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = part.view_as(p)
    ### END SOLUTION


# %% check="03a.5" seconds=20
# Check of 03a.5: run this after your answer
# NBVAL_CHECK_OUTPUT
def reduced(axis):
    model = my_gradients(axis, divide_by=8 * 32)  # the whole batch: gradients are summed
    with ledger() as book:
        reduce_flat(list(model.parameters()), axis)
    return gradients(model), book.calls("dp"), book.bytes("dp")


with verdict():
    answers = on_each_rank(reduced)
    wrong = difference([answer[0] for answer in answers], one_process(tokens, targets))
    assert not wrong, f"After reduce_flat, {wrong}"
    for rank, (_, calls, _) in enumerate(answers):
        what = f"rank {rank} makes {calls} calls"
        assert calls == 1, f"The gradients are right, but {what}: make one, an all_reduce of the flat tensor."
    wrong = difference([answer[0] for answer in on_each_rank(reduced, dp=2)], one_process(tokens, targets))
    assert not wrong, f"Right on 4 ranks, but on 2 ranks, {wrong} How many are there along the axis?"
    print(f"{calls} call, {answers[0][2]:,} bytes sent by each rank")

# %% [markdown] lang="en"
# ## 03a.6 · Predict: how many bytes
#
# An all-reduce on a ring has two halves. In the first, a *reduce-scatter*, the tensor is cut into as many chunks as
# there are ranks, and in $n-1$ steps each rank passes one chunk to its right, adding as it goes. In the second, an
# *all-gather*, the finished chunks go around once more, again $n-1$ steps of one chunk each.
#
# How many bytes does one rank send in all? Predict it; the check compares with the ledger of real ranks.

# %% [markdown] lang="en" hint="03a.6"
# How many steps does one rank take, in both halves together, and how large is one chunk?

# %% [markdown] lang="en" hint="03a.6"
# $2\,(n-1)$ steps, each with a chunk of $M/n$ bytes, where $M$ is `numbers * bytes_each`.


# %% task="03a.6" title="Predict: how many bytes"
def ring_bytes(numbers: int, bytes_each: int, ranks: int) -> float:
    """Bytes that one rank sends in a ring all-reduce of a tensor of `numbers` elements."""
    ### BEGIN SOLUTION
    return 2 * (ranks - 1) / ranks * numbers * bytes_each
    ### END SOLUTION


# %% check="03a.6" seconds=20
# Check of 03a.6: run this after your answer
# NBVAL_CHECK_OUTPUT
def sent(numbers, dtype, mesh):
    with ledger() as book:
        all_reduce(torch.ones(numbers, dtype=dtype), connect(mesh)["dp"])
    return book.bytes("dp")


with verdict():
    for dtype, n in [(torch.float32, 4), (torch.float64, 4), (torch.float32, 2), (torch.float32, 1)]:
        numbers, size = 11_640 * n, dtype.itemsize
        yours = returned(ring_bytes(numbers, size, n), "ring_bytes")
        real = world.run(sent, numbers, dtype, Mesh(dp=n, tp=4 // n), limit=15)[0]
        mistakes = {
            numbers * 2 * (n - 1) / n: "That counts elements: a byte is smaller.",
            size * numbers * (n - 1) / n: "That is one half of it: after the reduce-scatter comes the all-gather.",
            size * numbers * 2: "Each rank keeps one chunk at home: n-1 steps, not n.",
            size * numbers * 2 * (n - 1): "What travels in a step is one chunk, not the whole tensor.",
            size * numbers * (n - 1): "That is each rank sending all it has to all others: a ring does better.",
        }
        what = f"{numbers:,} elements of {dtype} on {n} rank{'s' * (n > 1)}: you predict {yours:,.0f} bytes"
        assert abs(float(yours) - real) < 1, f"{what}, a rank sends {real:,}. {mistakes.get(yours, '')}"
    chunks = ring_bytes(8, 1, 8)  # more ranks than there are here, chunks of a byte
    assert abs(chunks - 14) < 1e-6, f"Right up to 4 ranks, but not on 8, where you predict {chunks:.4g} chunks."
    print("46,560 float32 on 4 ranks:", f"{ring_bytes(46_560, 4, 4):,.0f} bytes sent by each")

# %% [markdown] lang="en"
# ## 03a.7 · Complete: send while backward still runs
#
# Backward finishes the last layer's gradients first. Those could travel while the earlier layers still compute. So
# cut the parameters into *buckets*, from the back of the model, and start a bucket's all-reduce when its last
# gradient is there. PyTorch calls a hook for each parameter when its gradient has been added up.
#
# Two things make it tricky. A step may have several microbatches, whose gradients add up in `.grad`: only during the
# last one's backward are they final. And the hooks stay for the next step.
#
# `start_all_reduce(flat, axis)` starts the sum, in place, and returns at once.


# %% [markdown] lang="en" hint="03a.7"
# `ready(p)` is called in every microbatch, for every parameter of the bucket. While `is_last()` is false there is
# nothing to do.

# %% [markdown] lang="en" hint="03a.7"
# In the last microbatch, take `p` out of `missing`. When `missing` is empty, the bucket is complete: start its
# all-reduce, and append what it returns to `launched`.

# %% [markdown] lang="en" hint="03a.7"
# After the launch `missing` is empty, and in the next step it has to be full again: `missing.update(bucket)`.


# %% task="03a.7" title="Complete: send while backward still runs"
def launch_early(
    bucket: list[nn.Parameter],
    flat: Tensor,  # the gradients of the bucket, 1-d
    axis: Axis,
    is_last: Callable[[], bool],  # is this the backward of the step's last microbatch?
    launched: list[Pending],  # append here what start_all_reduce returns
) -> None:
    """Have the bucket's all-reduce start, in each step, when its last gradient is there."""
    missing = set(bucket)

    def ready(p: nn.Parameter) -> None:  # p.grad has been added to
        ### BEGIN SOLUTION
        if is_last():
            missing.remove(p)
            if not missing:
                launched.append(start_all_reduce(flat, axis))
                missing.update(bucket)
        ### END SOLUTION

    for p in bucket:
        p.register_post_accumulate_grad_hook(ready)


# %% check="03a.7" seconds=20
# Check of 03a.7: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    ranks, whole = on_each_rank(train_overlapped, launch_early), one_process(tokens, targets)
    for step, rank in product(range(2), range(4)):
        calls, early = ranks[rank][step]["calls"], ranks[rank][step]["early"]
        microbatches = ("two microbatches", "one microbatch")[step]
        when = f"Step {step + 1}, three buckets, {microbatches}: rank {rank} makes {calls} calls"
        after = f"{when}. In step 1 it made {ranks[rank][0]['calls']}:"
        assert calls or not step, f"{after} did `missing` stay empty?"
        assert calls, f"{when}. Nothing was ever sent: when is a bucket complete?"
        assert calls != 6, f"{when}. Each bucket was sent in each microbatch: wait for the last one."
        assert calls <= 3 or not step, f"{after} then `missing` stayed empty, so that every hook sends."
        assert calls <= 3, (
            f"{when}. Send a bucket once, when *all* its gradients are there, not for each parameter. "
            "Is `missing` filled again after a send, and does it wait for the last microbatch?"
        )
        wrong = difference([rank[step]["gradients"] for rank in ranks], whole)
        assert not wrong, f"{when}. {wrong[0].upper() + wrong[1:]} Was a bucket sent before it was complete?"
        assert calls == 3, f"{when}. One for each bucket should be made."
        n = len(early)
        assert n == 2, f"{when}, {n} of them before backward came to the embedding: 2 buckets are complete."
        assert all(early), f"{when}, and waits for them before backward goes on: start them, and wait for none."
    print(f"{calls} calls a step, {n} of them before backward is through")

# %% [markdown] lang="en"
# ## 03a.8 · Write and predict: merge the updates instead?
#
# There is another way to keep the ranks together. Each takes an optimizer step on its **own** gradients; then the
# *weights* are averaged. It sends as much, and needs no hook in backward. Does it give the weights that averaged
# gradients give? Write it, and predict for each optimizer. Then think about why: what must an update be, as a function
# of the gradient, for the mean of the updates to be the update of the mean?

# %% [markdown] lang="en" hint="03a.8"
# Weights are changed under `with torch.no_grad():`, for example with `p.copy_(...)`.

# %% [markdown] lang="en" hint="03a.8"
# SGD's update is $-\eta g$. It is *linear* in $g$: the mean of $-\eta g_r$ is $-\eta$ times the mean of $g_r$. Momentum
# adds up past gradients with fixed weights. Adam divides by the square root of a mean of squares.

# %% [markdown] lang="en" hint="03a.8"
# Clipping divides by the norm of the gradient, if that is too large. The ranks' norms differ, so they divide by
# different numbers.


# %% task="03a.8" title="Write and predict: merge the updates instead?"
def merge_updates(model: nn.Module, optimizer: torch.optim.Optimizer, axis: Axis) -> None:
    """Step on this rank's own gradients, then replace each parameter by the ranks' mean."""
    ### BEGIN SOLUTION
    optimizer.step()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(all_reduce(p, axis) / axis.size)
    ### END SOLUTION


def same_weights() -> dict[str, bool]:
    """Does merging updates give the same weights as merging gradients? True or False for
    "SGD", "SGD with momentum", "Adam", and "SGD, clipped" (each rank clips before its step)."""
    ### BEGIN SOLUTION
    return {"SGD": True, "SGD with momentum": True, "Adam": False, "SGD, clipped": False}
    ### END SOLUTION


# %% check="03a.8" seconds=30
# Check of 03a.8: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    start = {name: p.detach() for name, p in two_layers().named_parameters()}
    predicted = returned(same_weights(), "same_weights")
    for name in OPTIMIZERS:
        assert name in predicted, f"same_weights() says nothing about {name!r}."
        by_gradients = on_each_rank(weights_after, name, None)[0]
        by_updates = on_each_rank(weights_after, name, merge_updates)
        moved = max(float((by_updates[0][p] - start[p]).abs().max()) for p in start)
        assert moved, f"{name}: after two steps no weight has moved: merge_updates takes the optimizer's step."
        for rank in range(1, 4):
            apart = [p for p in start if not torch.equal(by_updates[rank][p], by_updates[0][p])]
            assert not apart, f"{name}: rank {rank} has other weights than rank 0. Average after the step."
        wrong = difference(by_updates, by_gradients, "value")
        assert name != "SGD" or not wrong, f"For plain SGD both must agree, but {wrong}"
        assert name != "Adam" or wrong, "Adam: exactly as if gradients were averaged. Step first, then average weights."
        measured = "differ" if wrong else "are equal"
        assert predicted[name] == (not wrong), (
            f"{name}: you predict {predicted[name]!r}, but after two steps weights {measured}."
        )
    by_gradients, by_updates = (on_each_rank(weights_after, "SGD", merge, dp=2) for merge in (None, merge_updates))
    wrong = difference(by_updates, by_gradients[0], "value")
    assert not wrong, f"Right on 4 ranks, but on 2 ranks, with SGD, {wrong} How many are there along the axis?"
    print("as predicted:", ", ".join(OPTIMIZERS))

# %% [markdown] lang="en"
# ## 03a.9 · Mend: the bug that a loss curve hides
#
# This step cuts a rank's rows into microbatches, to save memory. It has trained models for months, and its loss curve
# is the same with and without microbatches. Yet it breaks a law. The cell after it compares one microbatch with two,
# on five lines: run it, read, and say which law fails. Then mend the step.
#
# (If the curve looks right, what is it to you? Your learning rate does not mean what you think, weight decay and
# clipping work at another strength than you set, and plain SGD goes astray.)

# %% [markdown] lang="en" hint="03a.9"
# Run the cell below the step and compare its two columns. On one line the second number is twice the first.

# %% [markdown] lang="en" hint="03a.9"
# The gradients are `microbatches` times too large: `.backward()` *adds* to `.grad`, and each microbatch divides by the
# tokens of one microbatch. Adam does not care for the size of a gradient, so its loss curve does not show it.

# %% [markdown] lang="en" hint="03a.9"
# Divide by the tokens of the whole batch. Then the losses of the microbatches add up to the loss that is shown, with
# no division left.


# %% task="03a.9" title="Mend: the bug that a loss curve hides"
def broken_law() -> str:
    """What differs and should not: "loss", "gradients", "calls" or "bytes"?"""
    ### BEGIN SOLUTION
    return "gradients"
    ### END SOLUTION


def train_step(model: nn.Module, tokens: Tensor, targets: Tensor, axis: Axis, microbatches: int):
    """Set .grad to the gradients of the mean loss over this batch. Returns that loss, 0-d."""
    mine, labels = rows(tokens, axis.size)[axis.index], rows(targets, axis.size)[axis.index]
    model.zero_grad()
    shown = torch.zeros((), dtype=torch.float64)
    ### BEGIN SOLUTION
    count = all_reduce((labels != -100).sum(), axis)  # tokens of the whole batch
    for x, y in zip(rows(mine, microbatches), rows(labels, microbatches), strict=True):
        loss = total_loss(model, x, y) / count
        loss.backward()
        shown += loss.detach()
    ### INSTEAD
    # count = all_reduce((labels != -100).sum(), axis) / microbatches  # tokens of one microbatch
    # for x, y in zip(rows(mine, microbatches), rows(labels, microbatches), strict=True):
    #     loss = total_loss(model, x, y) / count
    #     loss.backward()
    #     shown += loss.detach() / microbatches
    ### END SOLUTION
    for p in model.parameters():
        p.grad = all_reduce(p.grad, axis)
    return all_reduce(shown, axis)


# %%
one, two = (on_each_rank(train, train_step, targets, microbatches, 5)[0] for microbatches in (1, 2))
print(f"{'microbatches':<34}{1:>10}{2:>10}")
for what, get in {
    "loss of step 1": lambda run: f"{run['losses'][0]:.4f}",
    "loss of step 5, with Adam": lambda run: f"{run['losses'][-1]:.4f}",
    "gradients, norm over all": lambda run: f"{sum(g.norm() ** 2 for g in run['gradients'].values()) ** 0.5:.4f}",
    "calls of a step": lambda run: run["calls"],
    "bytes sent in a step": lambda run: f"{run['bytes']:,}",
}.items():
    print(f"{what:<34}{get(one):>10}{get(two):>10}")

# %% check="03a.9" seconds=30
# Check of 03a.9: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    law, calls = str(broken_law()), {}
    assert law in ("loss", "gradients", "calls", "bytes"), f'{law!r} is none of "loss", "gradients", "calls", "bytes".'
    assert law == "gradients", f"{law!r} is as it should be: which line differs between the two columns?"
    full, short, fewer = "full rows", "rows of different lengths", "rows of different lengths, 2 ranks in place of 4"
    for case, microbatches, ranks in [(full, 2, 4), (short, 1, 4), (short, 2, 4), (fewer, 2, 2)]:
        labels = targets if case == full else padded([32, 28, 20, 4, 6, 1, 9, 17])
        answers = on_each_rank(train, train_step, labels, microbatches, 1, dp=ranks)[:: 4 // ranks]
        got, whole = [answer["gradients"] for answer in answers], one_process(tokens, labels)
        old = f"{case}: .grad holds the gradient of this step and what was there before it: empty it first."
        assert difference(got, {p: g + ranks for p, g in whole.items()}), old  # 1 on each rank
        wrong = difference(got, whole)
        assert not wrong, f"{case}, {microbatches} microbatches: {wrong}"
        expected = loss_of_one_process(labels)
        for rank, answer in enumerate(answers):
            off, n, parts = answer["losses"][0] - expected, sum(answer["rows"]), len(answer["rows"])
            right = f"{case}, rank {rank}: the gradients are right, but"
            assert abs(off) < 1e-9, f"{right} the loss that is returned is off by {off:.3g}."
            assert n == 8 // ranks, f"{right} {n} rows went through the model. Its share of the 8 rows is {8 // ranks}."
            assert parts == microbatches, f"{right} rows went through it in {parts} parts, not {microbatches}."
            calls[microbatches, rank] = answer["calls"]
    told = (
        f"All is right, but a rank makes {calls[1, 0]} calls with one microbatch and {calls[2, 0]} with two: why more?"
    )
    assert calls[1, 0] == calls[2, 0], told
    print("mended, for full rows and for padded ones")

# %% [markdown] lang="en"
# ## 03a.10 · Write: step on a share only
#
# After an all-reduce all ranks have the same gradient, and all take the same step. That is the same work, and the same
# optimizer state, on each of them. An all-reduce is a reduce-scatter and an all-gather. Take the step between the two:
# each rank updates its own share of the weights, and the *weights* are gathered. It sends what an all-reduce sends, and
# each rank keeps a share of the state (stage 1 of ZeRO).
#
# All weights of the model lie in one flat tensor, side by side. This rank's share of it is `own`, the only parameter
# that `optimizer` knows. `reduce_scatter(x, axis)` returns this rank's share of the sum of every rank's `x`;
# `all_gather(x, axis)` puts every rank's `x` side by side.

# %% [markdown] lang="en" hint="03a.10"
# Three lines of work: a gradient for `own`, a step, the weights of all. An optimizer reads `own.grad`.

# %% [markdown] lang="en" hint="03a.10"
# `own.grad = reduce_scatter(gradients, axis)`: a share of the *sum*, with the shape of `own`. Nothing is to be divided,
# the loss already was.

# %% [markdown] lang="en" hint="03a.10"
# After `optimizer.step()` the new weights of this rank stand in `own`. What `all_gather` makes of every rank's
# `own.detach()` is the answer.


# %% task="03a.10" title="Write: step on a share only"
def zero_step(gradients: Tensor, own: nn.Parameter, optimizer: torch.optim.Optimizer, axis: Axis) -> Tensor:
    """Take a step between the two halves of an all-reduce. Returns all weights after it, (size * share,).

    gradients: (size * share,), of this rank's part of the loss. Those of the loss are their *sum* over the ranks.
    own: (share,), the weights that this rank updates.
    """
    ### BEGIN SOLUTION
    own.grad = reduce_scatter(gradients, axis)
    optimizer.step()
    return all_gather(own.detach(), axis)
    ### END SOLUTION


# %% check="03a.10" seconds=20
# Check of 03a.10: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    start = {name: p.detach() for name, p in two_layers().named_parameters()}
    numbers = sum(p.numel() for p in start.values())
    for optimizer, n in [("SGD with momentum", 4), ("Adam", 4), ("Adam", 2)]:
        answers = on_each_rank(train_in_shares, optimizer, zero_step, dp=n)[:: 4 // n]
        moved = max(float((answers[0]["weights"][p] - start[p]).abs().max()) for p in start)
        assert moved, f"{optimizer}: after two steps no weight has moved. Are the weights gathered after the step?"
        wrong = difference([answer["weights"] for answer in answers], answers[0]["right"], "value")
        assert not wrong, f"{optimizer}, {n} ranks, after two steps: {wrong}"
        least, state = 2 * (n - 1) * numbers * 8 // n, (1 if "SGD" in optimizer else 2) * numbers // n
        for rank, answer in enumerate(answers):
            what = f"{optimizer}, {n} ranks: the weights are right, but rank {rank}"
            sent, kept = answer["bytes"], answer["state"]
            assert sent <= least, f"{what} sends {sent:,} bytes a step, and an all-reduce {least:,}: two halves do."
            assert kept == state, f"{what} keeps {kept:,} numbers of state, and its share is {state:,}."
    print(f"2 ranks: {sent:,} bytes a step, {kept:,} of {2 * numbers:,} numbers of Adam's state on each")

# %% [markdown] lang="en"
# ## 03a.11 · Mend: gradients that nobody gets
#
# In stage 2 of ZeRO a rank keeps no whole gradient. Each microbatch's gradients are sent to their owners at once, who
# add up their shares. Shares must be equally long: `start_reduce_scatter(x, axis)` wants a 1-d `x` that divides by the
# number of ranks, and its `.wait()` gives this rank's share of the sum. Ten numbers on four ranks do not divide.
#
# Someone found a way around the error message. The model trains, and its loss falls. Yet some weights never move. Say
# which, and mend it, with what the text books call *padding*: zeros behind the last number. Each share then has
# $\lceil 10/4 \rceil = 3$ numbers, and the last rank's share is $[g_9, 0, 0]$.

# %% [markdown] lang="en" hint="03a.11"
# `one[:fits]` drops up to `axis.size - 1` numbers at the end. Make `one` longer, not shorter.

# %% [markdown] lang="en" hint="03a.11"
# `F.pad(x, (0, k))` puts `k` zeros behind `x`. How many are needed? None where it divides already.

# %% [markdown] lang="en" hint="03a.11"
# In Python `-10 % 4` is 2: `-len(one) % axis.size` is what is missing to the next multiple.


# %% task="03a.11" title="Mend: gradients that nobody gets"
def lost_numbers() -> list[int]:
    """Of ten gradients, 0 to 9, on four ranks: those that no rank gets from the function below, before it is mended."""
    ### BEGIN SOLUTION
    return [8, 9]
    ### END SOLUTION


def my_share_of_gradients(microbatches: Iterable[Tensor], axis: Axis) -> Tensor:
    """This rank's share of the gradients' sum over microbatches and ranks, with zeros behind the last number.

    microbatches: the gradient of one after the other, 1-d, all of one length.
    """
    total = torch.zeros((), dtype=torch.float64)
    for one in microbatches:
        ### BEGIN SOLUTION
        padded = F.pad(one, (0, -len(one) % axis.size))
        total = total + start_reduce_scatter(padded, axis).wait()
        ### INSTEAD
        # fits = len(one) // axis.size * axis.size
        # total = total + start_reduce_scatter(one[:fits], axis).wait()
        ### END SOLUTION
    return total


# %% check="03a.11" seconds=20
# Check of 03a.11: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    lost = list(returned(lost_numbers(), "lost_numbers"))
    assert len(lost) == 2, f"lost_numbers gives {lost}: how many does `one[:fits]` drop?"
    assert sorted(lost) == [8, 9], f"lost_numbers gives {lost}: `one[:fits]` keeps the first ones. Numbers begin at 0."
    for numbers, n in [(10, 4), (8, 4), (9, 4), (7, 2)]:
        answers = on_each_rank(add_up, my_share_of_gradients, numbers, dp=n)[:: 4 // n]
        size, case = -(-numbers // n), f"{numbers} numbers on {n} ranks"
        whole = 111 * sum(range(n + 1)) * torch.arange(1, numbers + 1, dtype=torch.float64)
        for rank, answer in enumerate(answers):
            share, what = answer["share"], f"{case}: rank {rank}"
            shape = tuple(share.shape)
            assert shape == (size,), f"{what} returns the shape {shape}: {n} equal shares are of {size} numbers each."
            expected = F.pad(whole, (0, size * n - numbers))[size * rank : size * (rank + 1)]
            told = f"{what} has the sums {share.tolist()}, and they are {expected.tolist()}."
            assert torch.allclose(share, expected, rtol=1e-12), told
            calls, sent, least = answer["calls"], answer["bytes"], 3 * (n - 1) * size * 8
            told = f"{what} has the right sums, but"
            assert answer["held"] <= 1, f"{told} held {answer['held']} whole gradients: send one before the next comes."
            assert calls == 3, f"{told} makes {calls} calls for 3 microbatches: each one is sent at once, none is kept."
            assert sent == least, f"{told} sends {sent} bytes: 3 reduce-scatters of {size * n} numbers send {least}."
    print(
        "every number has an owner, padding or not:", f"{calls} calls, {sent} bytes for {numbers} numbers on {n} ranks"
    )

# %% [markdown] lang="en"
# ## All together
#
# Your pieces, at work: rows, parts of the loss, one flat call, four ranks. It runs once tasks 2, 4 and 5 are done.
# What is left for the engine in `minipar/data.py` is your task 7, with views in place of copies.


# %% tags=["raises-exception"]
def your_training(axis, steps):
    model, losses = fresh_model(), []
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for batch, labels_of_batch in corpus.batches(steps, rows=10, context=32):
        mine, labels = my_rows(batch, axis), my_rows(labels_of_batch, axis)
        model.zero_grad()
        part = my_part_of_the_loss(total_loss(model, mine, labels), (labels != -100).sum(), axis)
        part.backward()
        reduce_flat(list(model.parameters()), axis)
        optimizer.step()
        losses.append(all_reduce(part.detach(), axis).item())
    return losses


losses = on_each_rank(your_training, 40)[0]
print("loss:", *(f"{loss:.2f}" for loss in losses[::5]))
