# %% [markdown] lang="en"
# # Exercises of 03c: pipeline parallelism
#
# Eight small functions, about an hour and a half. They go in small steps: a drawing, a cut, a sum, two lists, and then
# the executor that carries out such a list on real ranks. At the end your own 1F1B trains a GPT on four ranks.
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
#     python -m minipar grade exercises/03c_pipeline_parallel.ipynb
#
#     # hints for task 2, one at a time; its solution, once it passes
#     python -m minipar hint 03c.2
#     python -m minipar solution 03c.2
#
# `grade` reads only the cells with a function to finish. Cells that you add are for trying things out. The folded cells
# belong to the checks, so an answer that uses their variables (`tokens`, `targets`, ...) or functions is refused: take
# what your function is given, and what is imported.

# %% tags=["setup"]
from collections.abc import Callable
from itertools import product
from math import isnan
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipar import Axis, RankError, World, bubble, corpus, ledger, simulate
from minipar.collectives import bounds, isend, recv, send
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
from minipar.schedule import Action, Op, in_flight
from minipar.timeline import Deadlock

world = World(4)

# %% [markdown] lang="en"
# The next cells are folded, too. What they and the checks work on is in `minipar/course/given.py`: a small GPT in
# float64, eight rows of text, and what one process gets for them.
#
# What you need to know: `axis` is the line of ranks that a pipeline runs on. `axis.size` is the number of ranks,
# `axis.index` this rank's place, 0 to `axis.size - 1`. Rank 0 has the first layers and gets the tokens, the last rank
# has the last layers and makes the loss. A stage is what one rank has.


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given: how to call a function on each rank; a slice of the model; what is wrong with gradients
def on_each_rank(function: Callable, *args, pp: int = 4) -> list:
    """What function(axis, *args) returns on each rank of the pipeline. With pp=2 it is there twice: one counts."""
    try:
        return along(world, "pp", function, *args, size=pp, limit=10)[:: 4 // pp]
    except RankError as error:
        if "limit" in str(error).split("\n")[0]:
            lost = "Is a message lost? What isend gives has to be kept until it has been waited for."
            error.args = (f"{error}\n\n{lost}",)
        raise


def stage(model: nn.Module, index: int, count: int) -> nn.Sequential:
    """The share of a model that a rank has. The first one also embeds, the last one also predicts."""
    start, end = bounds(len(model.blocks), count)[index : index + 2]
    layers = [model.embed] * (index == 0) + list(model.blocks[start:end])
    return nn.Sequential(*layers, *([model.norm, model.head] if index == count - 1 else []))


def off(got: dict, whole: dict) -> str:
    """Why gradients are not those of one process, in a sentence; "" if they are."""
    wrong = difference([got], whole)
    for theirs, ours in {
        "rank 0: ": "",
        ", on every rank: divided once too often by the 1 ranks?": ".",
        ", on every rank": "",
        "is the same on every rank, but off": "is off",
    }.items():
        wrong = wrong.replace(theirs, ours)
    return wrong


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for task 1: a row of a drawing, read
ORDERS = ("F0 F1 B0 B1 F2 B2", "F0 B0 F1 B1 F2 B2")  # of stage 0, of stage 1
SQUARES = {"F": 1, "B": 2}


def read_row(stage: int, text: str) -> dict[str, int]:
    """Action -> its first square. AssertionError for a row in which an action is left out, torn apart or misplaced."""
    squares, begins = str(text).split(), {}
    for at, name in enumerate(squares):
        known = name == "." or name in ORDERS[stage].split()
        assert known, f"Stage {stage}, square {at}: {name!r} is none of {ORDERS[stage]}, and not a point."
        if name != ".":
            begins.setdefault(name, at)
    for name in ORDERS[stage].split():
        need = SQUARES[name[0]]
        assert name in begins, f"Stage {stage}: {name} is missing."
        there = [at for at, other in enumerate(squares) if other == name]
        what = f"Stage {stage}: {name} fills the squares {there}"
        assert len(there) == need, f"{what}, and takes {need} square{'s' * (need > 1)}."
        assert there == list(range(there[0], there[0] + need)), f"{what}: what a stage begins, it does to the end."
    order = " ".join(sorted(begins, key=begins.get))
    assert order == ORDERS[stage], f"Stage {stage}: you have the order {order}, and here it does {ORDERS[stage]}."
    return begins


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for tasks 2, 3 and 6: notes of what a part of a model does, and of what is kept
class Noted(torch.autograd.Function):
    """Passes its input on. What it saves lives until backward, its context as long as anyone has the output."""

    @staticmethod
    def forward(ctx, x, notes, number):
        ctx.save_for_backward(x)
        ctx.notes, ctx.number = notes, number
        notes["graphs"].append(ref(ctx))
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        ctx.notes["did"].append(("B", ctx.number))
        return g, None, None


class Box:
    """Holds a tensor that autograd has saved."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for tasks 2, 3 and 6: the part that notes it
class Watched(nn.Module):
    """notes: what was done, in order; what was given; the most microbatches saved, and held, at a time."""

    def __init__(self, part: nn.Module):
        super().__init__()
        self.part, self.saved = part, []
        self.notes = {"did": [], "graphs": [], "given": [], "saved": 0, "held": 0}

    def save(self, x: Tensor) -> Box:
        box = Box(x)
        self.saved.append(ref(box))
        return box

    def forward(self, x: Tensor) -> Tensor:
        notes, number = self.notes, len(self.notes["given"])
        through = [at for op, at in notes["did"] if op == "B"][-1:]  # its y may still have a name
        notes["did"].append(("F", number))
        notes["given"].append(x.detach().clone())
        y = self.part(x)
        with torch.autograd.graph.saved_tensors_hooks(self.save, lambda box: box.tensor):
            y = Noted.apply(y, notes, number)
        held = [one() is not None for at, one in enumerate(notes["graphs"]) if at not in through]
        notes["saved"] = max(notes["saved"], sum(one() is not None for one in self.saved))
        notes["held"] = max(notes["held"], sum(held))
        return y


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for tasks 4 to 6: orders as data
def problem(order: list, stages: int, microbatches: int) -> str:
    """Why a list of lists is not F and B of each microbatch, once for each stage and in order; "" if it is."""
    if len(order) != stages:
        return f"you give {len(order)} lists: one for each stage."
    for number, program in enumerate(order):
        for place, action in enumerate(program):
            if not isinstance(action, Action):
                return f"stage {number}, place {place}: {action!r:.60} is no Action, such as Action(Op.F, {number}, 0)."
            if action.stage != number:
                return f"stage {number}, place {place}: the action says that it belongs to stage {action.stage}."
        for op in "FB":
            there = [m for kind, _, m in program if kind == op]
            if there != list(range(microbatches)):
                return f"stage {number} does {op} of the microbatches {there}: each of {microbatches} once, in order."
    return ""


def own_work(function: Callable) -> None:
    """AssertionError if it uses the package's schedules."""
    names = {"gpipe", "one_f_one_b", "interleaved", "zero_bubble_h1", "SCHEDULES"} & names_in(function)
    assert not names, f"{function.__name__} uses minipar's {min(names)}: here write the list yourself."


def spoken(program: list) -> str:
    return " ".join(map(str, program))


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given: a drawing in text; an order by its name; what was sent
def draw(order: list) -> None:
    """Print an order, a square a unit: F takes one, B two."""
    run = simulate(order)
    for rank, program in enumerate(order):
        row = [" ."] * round(run.end)
        for _, action, start, end in run.of(rank):
            row[round(start) : round(end)] = [str(action)] * round(end - start)
        print(f"rank {rank}  {' '.join(row)}  keeps {in_flight(program)}")
    print(f"bubble {bubble(run):.0%}")


def some_order(name: str, p: int, microbatches: list[int]) -> list[list[Action]]:
    """1F1B or GPipe, with the microbatches in this order."""
    most = {"1F1B": [p - r for r in range(p)], "GPipe": [len(microbatches)] * p}[name]
    orders = []
    for rank in range(p):
        full = min(most[rank], len(microbatches))
        ops = "F" * full + "BF" * (len(microbatches) - full) + "B" * full
        left = {op: iter(microbatches) for op in "FB"}
        orders.append([Action(Op(op), rank, next(left[op])) for op in ops])
    return orders


def check_sent(what: str, answer: dict, neighbors: int, each: int, nbytes: int) -> None:
    """AssertionError for too many or too few sends, or bytes to a neighbor, or sends that nobody has waited for."""
    calls, wanted = answer["calls"], neighbors * each
    told = f"{what} makes {calls} calls: it has {neighbors} neighbor{'s' * (neighbors != 1)} to send to"
    times = "once" if each == 1 else f"{each} times"
    assert calls == wanted and answer["ops"] <= {"send"}, f"{told}, {times} each, and nothing else to call."
    most = neighbors * nbytes
    assert answer["bytes"] == most, f"{what} sends {answer['bytes']:,} bytes, where {most:,} are enough."
    told = f"{what} is done before {answer['left']} of its sends are: wait() on what isend gave."
    assert not answer["left"], told


def book_kept(book) -> dict:
    sends = book.select("pp")
    left = sum(isnan(entry.end) for entry in sends)
    return {"calls": len(sends), "bytes": book.bytes("pp"), "ops": {entry.op for entry in sends}, "left": left}


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for task 6: a step of your executor on one rank, and what came of it
def one_step(axis: Axis, run_schedule: Callable, order: list, labels: Tensor, microbatches: int) -> dict:
    """Gradients, losses, what was done in which order, what was kept, what was sent."""
    model, last, losses = fresh_model(depth=4), axis.index == axis.size - 1, {}
    part, count = Watched(stage(model, axis.index, axis.size)), (labels != -100).sum()
    inputs, wanted = rows(tokens, microbatches), rows(labels, microbatches)

    def loss_of(y: Tensor, m: int) -> Tensor:
        assert last, "only the last rank makes a loss: the others send on what they computed"
        loss = F.cross_entropy(y.flatten(0, 1), wanted[m].flatten(), reduction="sum") / count
        losses[m] = losses.get(m, 0.0) + loss.item()
        return loss

    with ledger() as book:
        run_schedule(order[axis.index], part, axis, list(inputs), 32, loss_of)
    notes, forwards = part.notes, [m for op, _, m in order[axis.index] if op == "F"]
    if axis.index == 0:
        known = [[m for m in range(microbatches) if torch.equal(x, inputs[m])] for x in notes["given"]]
        forwards = [found[0] if found else "?" for found in known]
    elif last:
        forwards = list(losses)
    did = [f"{op}{forwards[number] if number < len(forwards) else '?'}" for op, number in notes["did"]]
    got = {name: g for name, g in gradients(model).items() if g is not None}
    names = {name for name, p in model.named_parameters() if any(p is own for own in part.parameters())}
    return book_kept(book) | {
        "gradients": got,
        "missing": sorted(names - got.keys()),
        "did": " ".join(did),
        "loss": sum(losses.values()),
        "held": notes["held"],
    }


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for task 7: a model whose two ends each have a copy of one matrix
def ends_of_tied(axis: Axis, sum_tied: Callable) -> dict:
    """The gradient of the tied matrix after your function, what both ends had before it, what was sent."""
    model = fresh_model(tied=True)
    first = model.embed.token.weight
    if axis.size > 1:
        model.head.weight = nn.Parameter(first.detach().clone())  # the last rank's own copy
    (total_loss(model, tokens, targets) / targets.numel()).backward()
    last = model.head.weight
    mine = first if axis.index == 0 else last if axis.index == axis.size - 1 else None
    parts = [first.grad.clone(), last.grad.clone()]
    with ledger() as book:
        sum_tied(mine, axis)
    gradient = None if mine is None else mine.grad
    return book_kept(book) | {"gradient": gradient, "parts": parts}


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for task 8: one call of your function, with numbers that say whose they are
def one_round(axis: Axis, steady_round: Callable) -> dict:
    """What came from above and from below: 11 are the activations of rank 0, 12 its gradients, 21 those of rank 1..."""
    y, g = (torch.full((2, 3, 4), 10.0 * (axis.index + 1) + kind) for kind in (1, 2))
    with ledger() as book:
        got = returned(steady_round(y, g, axis), "steady_round")
    assert isinstance(got, tuple) and len(got) == 2, f"steady_round must return a pair, not {got!r:.60}"
    return book_kept(book) | {"got": [None if x is None else sorted(set(x.flatten().tolist())) for x in got]}


# %% [markdown] lang="en"
# ## 03c.1 · Trace: what waits for what
#
# Two stages, three microbatches. `F1` is the forward of microbatch 1 and takes one square, `B1` its backward and takes
# two. There are four things to wait for:
#
# - a stage does one thing at a time, in its own order;
# - F on stage 1 waits for the same F on stage 0;
# - B on stage 1 waits for its own F there;
# - B on stage 0 waits for the same B on stage 1.
#
# The order is one that the chapter has not shown. Stage 0 does F0 F1 B0 B1 F2 B2, stage 1 does F0 B0 F1 B1 F2 B2. Draw
# it: each action as early as it can. A point is an empty square. The beginning is done:
#
#     square    0  1  2  3  4  5  ...
#     stage 0  F0 F1  .  . B0 B0  ...
#     stage 1   . F0 B0 B0 F1 B1  ...
#
# Take a sheet of paper, or write it right into the cell.

# %% [markdown] lang="en" hint="03c.1"
# B1 of stage 1 fills the squares 5 and 6. B1 of stage 0 waits for it, so it begins in square 7. What does stage 0 do in
# square 6?

# %% [markdown] lang="en" hint="03c.1"
# Nothing: that square is empty. B1 fills the squares 7 and 8. F2 comes after it, in square 9. Now stage 1 can go on.


# %% task="03c.1" title="Trace: what waits for what"
def drawing() -> tuple[str, str]:
    """Row of stage 0, row of stage 1: a word a square, such as "F0 F1 . . B0 B0"."""
    ### BEGIN SOLUTION
    stage_0 = "F0 F1 .  .  B0 B0 .  B1 B1 F2 .  .  .  B2 B2"
    stage_1 = ".  F0 B0 B0 F1 B1 B1 .  .  .  F2 B2 B2 .  ."
    ### INSTEAD
    # stage_0 = "F0 F1 .  .  B0 B0"
    # stage_1 = ".  F0 B0 B0 F1 B1"
    # raise NotImplementedError("your turn")
    ### END SOLUTION
    return stage_0, stage_1


# %% check="03c.1" seconds=20
# Check of 03c.1: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    given = returned(drawing(), "drawing")
    assert len(given) == 2, f"There are two stages, and drawing gives {len(given)} rows."
    begins = [read_row(number, text) for number, text in enumerate(given)]
    order = [[Action(Op(a[0]), number, int(a[1:])) for a in text.split()] for number, text in enumerate(ORDERS)]
    run = simulate(order)
    for span in sorted(run.spans, key=lambda span: span.start):
        name, mine, other = str(span.action), span.rank, 1 - span.rank
        at, right = begins[mine][name], round(span.start)
        before = ORDERS[mine].split()[max(ORDERS[mine].split().index(name) - 1, 0)]
        awaited = f"{name} of stage {other}" if name[0] == "FB"[other] else f"its own {before}"
        end = next((round(s.end) for s in run.of(other) if str(s.action) == name), 0)
        awaited += f", which fills square {end - 1}" if name[0] == "FB"[other] and right == end else ""
        told = f"Stage {mine}: {name} begins in square {at} of your drawing"
        assert at >= right, f"{told}, but it waits for {awaited}. It can begin in square {right}."
        assert at <= right, f"{told}, and nothing holds it back from beginning in square {right}."
    swapped = [[order[0][at] for at in (0, 1, 2, 4, 3, 5)], order[1]]
    squares, empty = round(run.end), round(2 * run.end * bubble(run))
    less = round(simulate(swapped).end)
    print(f"{squares} squares a row, {empty} empty in both; with F2 before B1 on stage 0: {less} squares a row")

# %% [markdown] lang="en"
# ## 03c.2 · Complete: the gradient crosses the cut
#
# Two halves of a model, one process. Between them only numbers may pass, as if the halves were on two ranks:
#
#     first:   tokens -> y                         ... y.backward(x.grad)
#                        |                                    ^
#                     numbers                              numbers
#                        v                                    |
#     second:            x -> loss -> loss.backward() -> x.grad
#
# The first line is there. Write the other four steps: `x` from `y`, the loss, backward through the second half,
# backward through the first. `total_loss(second, x, targets)` gives the loss of what goes into the second half.

# %% [markdown] lang="en" hint="03c.2"
# `y.detach()` is the same numbers without their history. PyTorch computes a gradient for them only if it is asked to.

# %% [markdown] lang="en" hint="03c.2"
# `x = y.detach().requires_grad_()`. After `loss.backward()` the gradient of what crossed is in `x.grad`.

# %% [markdown] lang="en" hint="03c.2"
# Backward can begin at any tensor, if it is told that tensor's gradient: `y.backward(x.grad)`.


# %% task="03c.2" title="Complete: the gradient crosses the cut"
def carry(first: nn.Module, second: nn.Module, tokens: Tensor, targets: Tensor) -> tuple[float, Tensor]:
    """Add one batch's gradients to .grad in both halves. Returns the loss and the gradient of what crossed.

    tokens, targets: (rows, context). What crosses, and its gradient: (rows, context, width).
    """
    y = first(tokens)
    ### BEGIN SOLUTION
    x = y.detach().requires_grad_()
    loss = total_loss(second, x, targets)
    loss.backward()
    y.backward(x.grad)
    ### END SOLUTION
    return loss.item(), x.grad


# %% check="03c.2" seconds=20
# Check of 03c.2: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    for depth, some in [(2, 8), (3, 5)]:
        model, (mine, labels) = fresh_model(depth), (tokens[:some], targets[:some])
        parts = [Watched(stage(model, index, 2)) for index in range(2)]
        came = []
        parts[1].register_forward_pre_hook(lambda _, args, came=came: came.append((args[0], args[0].grad_fn is None)))
        loss, crossed = returned(carry(*parts, mine, labels), "carry")
        for name, part in zip(("first", "second"), parts, strict=True):
            times = len(part.notes["given"])
            assert times == 1, f"The {name} half ran forward {times} times: once is enough."
        x, plain = came[0]
        assert plain, (
            "What goes into the second half still knows how it was made. A rank receives only numbers: detach."
        )
        assert x.requires_grad, "Nobody has asked for the gradient of x, so nothing can go back: requires_grad_()."
        got, whole = gradients(model), one_process(mine, labels, depth)
        whole = {name: g * labels.numel() for name, g in whole.items()}  # of the sum, not of the mean
        told = "The first half has no gradients. It goes on where the second one stopped, from x.grad."
        assert got["embed.token.weight"] is not None, told
        wrong = off(got, whole)
        assert not wrong, f"{depth} blocks, {some} rows: {wrong}"
        expected = total_loss(fresh_model(depth), mine, labels).item()
        assert isinstance(loss, float), "carry must return the loss as a number: a tensor would keep its history."
        assert abs(loss - expected) < 1e-6, f"The gradients are right, but the loss is {loss:.3f}, not {expected:.3f}."
        right = isinstance(crossed, Tensor) and torch.equal(crossed, x.grad)
        assert right, f"What is returned second must be the gradient of x, of the shape {tuple(x.shape)}."
    print(f"8 rows: {8 * x[0].nbytes:,} bytes cross, and as many come back; gradients equal to one process")

# %% [markdown] lang="en"
# ## 03c.3 · Write: microbatches add up
#
# The batch is cut into microbatches, as even as it goes: eight rows in three are 2, 3 and 3 rows. And some rows end
# early: what is labeled -100 is padding and does not count. Each token that counts should weigh $1/N$, with $N$ the
# number of those tokens in the **whole** batch. Gradients add up in `.grad` by themselves.
#
# The reason for microbatches is memory: while one is under way, its activations are kept for backward. So be done with
# one before the next one begins. **Target:** one forward and one backward for each microbatch, and never more than one
# kept.
#
# `rows(x, 3)` cuts a tensor into three pieces. `total_loss(model, tokens, targets)` is the loss *summed* over the
# tokens that count.

# %% [markdown] lang="en" hint="03c.3"
# Count first: `(targets != -100).sum()` over all rows. Then a loop over the pairs of pieces.

# %% [markdown] lang="en" hint="03c.3"
# In the loop: the summed loss of this microbatch, divided by the count of the whole batch; `backward()` on it at once;
# add its `.item()` to what you will return.


# %% task="03c.3" title="Write: microbatches add up"
def accumulate(model: nn.Module, tokens: Tensor, targets: Tensor, microbatches: int) -> float:
    """Add the gradient of the mean loss over this batch to .grad, a microbatch at a time. Returns that loss.

    tokens, targets: (rows, context). A target of -100 does not count.
    """
    ### BEGIN SOLUTION
    count, shown = (targets != -100).sum(), 0.0
    for some, wanted in zip(rows(tokens, microbatches), rows(targets, microbatches), strict=True):
        loss = total_loss(model, some, wanted) / count
        loss.backward()
        shown += loss.item()
    return shown
    ### END SOLUTION


# %% check="03c.3" seconds=20
# Check of 03c.3: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    full, short = "full rows", "rows of different lengths"
    for case, microbatches in [(full, 1), (full, 4), (full, 3), (short, 8), (short, 3)]:
        labels = targets if case == full else padded([32, 28, 20, 4, 0, 1, 9, 17])
        model = Watched(fresh_model())
        loss = returned(accumulate(model, tokens, labels, microbatches), "accumulate")
        cut, wanted = [len(x) for x in model.notes["given"]], [len(x) for x in rows(tokens, microbatches)]
        what = f"{case}, {microbatches} microbatch{'es' * (microbatches > 1)}"
        assert cut == wanted, f"{what}: forward runs on {cut} rows, and the microbatches have {wanted}."
        wrong = off(gradients(model.part), one_process(tokens, labels))
        assert not wrong, f"{what}: {wrong} By which count is each loss divided?"
        what, kept = f"{what}: the gradients are right, but", model.notes["saved"]
        assert isinstance(loss, float), f"{what} accumulate must return a number: a tensor would keep its history."
        apart = loss - loss_of_one_process(labels)
        assert abs(apart) < 1e-9, f"{what} the loss that is returned is off by {apart:.3g}."
        assert kept == 1, f"{what} {kept} microbatches were kept at a time: be done with one before the next."
        backwards = sum(op == "B" for op, _ in model.notes["did"])
        assert backwards == microbatches, f"{what} there were {backwards} backwards: one for each microbatch."
    print("microbatches of", *wanted, "rows: one kept at a time, gradients equal to one process")

# %% [markdown] lang="en"
# ## 03c.4 · Write: GPipe as data
#
# From here on an order of work is *data*: for each stage a list of actions. `Action(Op.F, 0, 2)` is the forward of
# microbatch 2 on stage 0, `Action(Op.B, 0, 2)` its backward. GPipe does all forwards, then all backwards, both in the
# order 0, 1, 2, ... For two stages and three microbatches:
#
#     stage 0   F0 F1 F2 B0 B1 B2
#     stage 1   F0 F1 F2 B0 B1 B2
#
# `simulate` runs such a list without any ranks, and says how long it takes. **Target:** a bubble of
# $(p-1)/(m+p-1)$ for $p$ stages and $m$ microbatches, which no order of F and B beats. Each stage keeps all $m$
# microbatches at its fullest moment.

# %% [markdown] lang="en" hint="03c.4"
# One list for each stage, and in it first the F of every microbatch, then the B of every microbatch.

# %% [markdown] lang="en" hint="03c.4"
# For one stage: `[Action(op, stage, m) for op in (Op.F, Op.B) for m in range(microbatches)]`.


# %% task="03c.4" title="Write: GPipe as data"
def gpipe_order(stages: int, microbatches: int) -> list[list[Action]]:
    """For each stage the list of its actions: 2 * microbatches of them."""
    ### BEGIN SOLUTION
    one_of_each = [(op, m) for op in (Op.F, Op.B) for m in range(microbatches)]
    return [[Action(op, stage, m) for op, m in one_of_each] for stage in range(stages)]
    ### END SOLUTION


# %% check="03c.4" seconds=20
# Check of 03c.4: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    for p, m in [(2, 3), (4, 6), (1, 2), (3, 1), (3, 5)]:
        order = returned(gpipe_order(p, m), "gpipe_order")
        own_work(gpipe_order)
        wrong, case = problem(order, p, m), f"{p} stages, {m} microbatches"
        assert not wrong, f"{case}: {wrong}"
        for number, program in enumerate(order):
            kept = in_flight(program)
            told = f"{case}: stage {number} does {spoken(program)}. GPipe has all forwards before the first backward."
            assert kept == m, told
        share, least = bubble(simulate(order)), (p - 1) / (m + p - 1)
        assert abs(share - least) < 1e-9, f"{case}: a bubble of {share:.1%}, and GPipe has {least:.1%}."
    print(f"{case}: a bubble of {share:.1%}, and each stage keeps {kept} microbatches")

# %% [markdown] lang="en"
# ## 03c.5 · Write: 1F1B from one rule
#
# GPipe keeps every microbatch. The rule that cures this, for rank $r$ of $p$:
#
# > **If fewer than $p - r$ microbatches are in flight, and there is one left to begin: a forward. Else a backward.**
#
# In flight is what has its F behind it and its B before it. Follow rank 0 of 3, with five microbatches. It may have
# three in flight:
#
#     does        F0  F1  F2  B0  F3  B1  F4  B2  B3  B4
#     in flight    1   2   3   2   3   2   3   2   1   0
#
# (The chapter's rule also asked what is *ready*. A list knows no clock, so here a rank at its limit does a backward,
# which means that it waits for it.)
#
# **Target:** the bubble of GPipe, $(p-1)/(m+p-1)$, while rank $r$ keeps no more than $\min(m, p - r)$.

# %% [markdown] lang="en" hint="03c.5"
# Count two things for each rank: forwards and backwards done so far. In flight is their difference. Go on until all
# backwards are done.

# %% [markdown] lang="en" hint="03c.5"
# `while backwards < microbatches:` and in it
# `if forwards < microbatches and forwards - backwards < stages - rank:`

# %% [markdown] lang="en" hint="03c.5"
# The microbatch of the next F is the number of forwards so far; of the next B, the number of backwards.


# %% task="03c.5" title="Write: 1F1B from one rule" engine="one_f_one_b_order"
def one_f_one_b_order(stages: int, microbatches: int) -> list[list[Action]]:
    """For each stage the list of its actions by the rule above: 2 * microbatches of them."""
    order = []
    for rank in range(stages):
        program, forwards, backwards = [], 0, 0
        ### BEGIN SOLUTION
        while backwards < microbatches:
            if forwards < microbatches and forwards - backwards < stages - rank:
                program.append(Action(Op.F, rank, forwards))
                forwards += 1
            else:
                program.append(Action(Op.B, rank, backwards))
                backwards += 1
        ### END SOLUTION
        order.append(program)
    return order


# %% check="03c.5" seconds=20
# Check of 03c.5: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    for p, m in [(3, 5), (4, 8), *product(range(1, 7), range(1, 9)), (4, 9)]:
        order = returned(one_f_one_b_order(p, m), "one_f_one_b_order")
        own_work(one_f_one_b_order)
        wrong, case = problem(order, p, m), f"{p} stages, {m} microbatches"
        assert not wrong, f"{case}: {wrong}"
        for rank, program in enumerate(order):
            may, kept = min(m, p - rank), in_flight(program)
            what = f"{case}: rank {rank} does {spoken(program)}. It"
            assert kept <= may, f"{what} has {kept} microbatches in flight, and may have {may}."
            out = 0
            for place, action in enumerate(program):
                begun = sum(one.op == Op.F for one in program[:place])
                rule = "F" if begun < m and out < p - rank else "B"
                now = f"{out} in flight, a limit of {p - rank} and {m - begun} left to begin"
                assert action.op == rule, f"{what} does {action} with {now}: the rule says {rule}."
                out += 1 if rule == "F" else -1
        try:
            share, least = bubble(simulate(order)), (p - 1) / (m + p - 1)
        except Deadlock as report:
            raise AssertionError(f"{case}: {report}") from None
        assert abs(share - least) < 1e-9, f"{case}: a bubble of {share:.1%}, and GPipe has {least:.1%}."
    print(f"{case}: a bubble of {share:.1%}; ranks keep", *map(in_flight, order), f"where GPipe keeps {m}")

# %% tags=["raises-exception"]
draw(one_f_one_b_order(3, 5))  # yours, once it is there: try other numbers

# %% [markdown] lang="en"
# ## 03c.6 · Write: carry out a schedule
#
# Now a function that does what a list says, on a real rank, whatever the order is. `program` is the list of this rank.
# There are two kinds of action. What comes in stands on the left, what goes out on the right:
#
#     F   x: tokens on rank 0, else         y = part(x)      y goes to the next rank
#         from the rank before        ->                ->   (last rank: y = loss_of(part(x), m), to nobody)
#
#     B   gradient of y from the next       y.backward(...)  x.grad goes to the rank before
#         rank (last rank: none)      ->                ->   (rank 0: to nobody)
#
# From F to B of a microbatch its `x` and `y` are kept, and after B no longer.
#
# **Sends must not wait.** `send` returns only when the other side has come to its receive, and in 1F1B two neighbors
# often both have something to send: they would wait forever. `isend(x, axis, to)` returns at once. Keep what it gives,
# and call `.wait()` on it at the end of the step. `recv(like, axis, source)` waits for a tensor of the shape and dtype
# of `like`.
#
# **Target**, with $m$ microbatches: $m$ sends to each neighbor, each the size of a microbatch's activations; no more
# microbatches kept than the order says; no deadlock.

# %% [markdown] lang="en" hint="03c.6"
# F begins with `x = inputs[m] if axis.index == 0 else recv(like, axis, axis.index - 1).requires_grad_()`. Without
# `requires_grad_()` there would be no `x.grad` to send back.

# %% [markdown] lang="en" hint="03c.6"
# F goes on: `y = loss_of(part(x), m) if last else part(x)`, then `kept[m] = x, y`. If this is not the last rank,
# `sends.append(isend(y, axis, axis.index + 1))`.

# %% [markdown] lang="en" hint="03c.6"
# B: `x, y = kept.pop(m)`, then `y.backward(None if last else recv(y, axis, axis.index + 1))`. If this is not rank 0,
# send `x.grad` to the rank before.

# %% [markdown] lang="en" hint="03c.6"
# Behind the loop: `for pending in sends:` and in it `pending.wait()`.


# %% task="03c.6" title="Write: carry out a schedule" engine="run_schedule"
def run_schedule(program: list[Action], part: nn.Module, axis: Axis, inputs: list[Tensor], width: int, loss_of):
    """Do what this rank's list says. The gradients of its slice of the model, `part`, are added to .grad.

    inputs: tokens of each microbatch, (rows, context). Between ranks travels (rows, context, width).
    loss_of(what the last part gives, number of the microbatch) -> 0-d
    """
    last, kept, sends = axis.index == axis.size - 1, {}, []  # kept: microbatch -> x, y; sends: what isend gave
    ### BEGIN SOLUTION
    for op, _, m in program:
        like = next(part.parameters()).new_empty(*inputs[m].shape, width)
        if op == Op.F:
            x = inputs[m] if axis.index == 0 else recv(like, axis, axis.index - 1).requires_grad_()
            y = loss_of(part(x), m) if last else part(x)
            kept[m] = x, y
            if not last:
                sends.append(isend(y, axis, axis.index + 1))
        else:
            x, y = kept.pop(m)
            y.backward(None if last else recv(y, axis, axis.index + 1))
            if axis.index > 0:
                sends.append(isend(x.grad, axis, axis.index - 1))
    for pending in sends:
        pending.wait()
    ### INSTEAD
    # for op, _, m in program:
    #     like = next(part.parameters()).new_empty(*inputs[m].shape, width)  # what is received looks like this
    #     if op == Op.F:  # get x, compute y, keep both, send y on
    #         raise NotImplementedError("your turn")
    #     else:  # take both, get the gradient of y, go back, send x.grad on
    #         raise NotImplementedError("your turn")
    # # and at the end?
    ### END SOLUTION


# %% check="03c.6" seconds=30
# Check of 03c.6: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    cases = [("GPipe", 4, [0, 1, 2]), ("1F1B", 1, [0, 1]), ("GPipe", 2, [2, 0, 1]), ("1F1B", 4, [0, 1, 2, 3, 4, 5])]
    for name, p, microbatches in cases:
        order, m = some_order(name, p, microbatches), len(microbatches)
        labels = padded([32, 28, 20, 4, 6, 1, 9, 17]) if name == "1F1B" else targets
        answers = on_each_rank(one_step, run_schedule, order, labels, m, pp=p)
        case = f"{name}, {p} rank{'s' * (p > 1)}, {m} microbatches"
        for rank, answer in enumerate(answers):
            what = f"{case}: rank {rank}"
            assert answer["did"] == spoken(order[rank]), (
                f"{what} does {answer['did'] or 'nothing'}, and its list says {spoken(order[rank])}."
            )
            lost = answer["missing"]
            told = f"{what} has done its list, but {len(lost)} of its parameters have no gradient: {lost[:1]}, ..."
            assert not lost, told
        wrong = off(
            {k: g for answer in answers for k, g in answer["gradients"].items()}, one_process(tokens, labels, 4)
        )
        assert not wrong, f"{case}: {wrong}"
        for rank, answer in enumerate(answers):
            what, may = f"{case}: the gradients are right, but rank {rank}", in_flight(order[rank])
            check_sent(what, answer, (rank > 0) + (rank < p - 1), m, 8 * 32 * 32 * 8)
            held = answer["held"]
            assert held <= may, (
                f"{what} keeps x or y of {held} microbatches. By its list {may} are enough: pop them in B."
            )
    print(f"{case}: ranks keep", *[answer["held"] for answer in answers], "and make", *[a["calls"] for a in answers])

# %% [markdown] lang="en"
# ## 03c.7 · Write: one matrix on two ranks
#
# In a tied model one matrix looks tokens up at the beginning and predicts them at the end. In a pipeline these are the
# first and the last rank, and each has a copy. After backward, the first rank's copy has the gradient of the lookup,
# the last one's that of the prediction:
#
#     rank 0              rank 1     rank 2     rank 3
#     embedding: g_0         -          -       head: g_3           both need  g_0 + g_3
#
# If each takes a step with its own part, the copies drift apart, and nothing complains. So give both the sum.
#
# The ranks between have no copy: for them `weight` is None, and they should have nothing to do with it. With one rank
# only, both ends are the same parameter, and backward has summed already.
#
# **Target:** each end sends its gradient once, the ranks between send nothing. (An all-reduce over all ranks would take
# a matrix of zeros from each rank between, and send one and a half matrices from each of four ranks.)

# %% [markdown] lang="en" hint="03c.7"
# Who is at the other end? For index 0 it is `axis.size - 1`, for `axis.size - 1` it is 0: in one formula,
# `axis.size - 1 - axis.index`.

# %% [markdown] lang="en" hint="03c.7"
# Both ends have to send and to receive. If both begin with `send`, neither comes to its `recv`: start with
# `pending = isend(weight.grad, axis, other)`.

# %% [markdown] lang="en" hint="03c.7"
# Then `theirs = recv(weight.grad, axis, other)` and `pending.wait()`. Only after the wait may `weight.grad` change:
# until then it is on its way.


# %% task="03c.7" title="Write: one matrix on two ranks" engine="sum_tied"
def sum_tied(weight: nn.Parameter | None, axis: Axis) -> None:
    """Give both ends of the pipeline the sum of their gradients in weight.grad. Every rank calls it.

    weight: this rank's copy of the tied matrix, with its part of the gradient. None on the ranks between.
    """
    ### BEGIN SOLUTION
    if weight is None or axis.size == 1:
        return
    other = axis.size - 1 - axis.index
    pending = isend(weight.grad, axis, other)
    theirs = recv(weight.grad, axis, other)
    pending.wait()
    weight.grad = weight.grad + theirs
    ### END SOLUTION


# %% check="03c.7" seconds=30
# Check of 03c.7: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    whole = one_process(tokens, targets, tied=True)["embed.token.weight"]
    for p in (4, 2, 1):
        answers, case = on_each_rank(ends_of_tied, sum_tied, pp=p), f"{p} rank{'s' * (p > 1)}"
        for rank, answer in enumerate(answers):
            at_the_end = rank in (0, p - 1)
            if at_the_end:
                got, what = answer["gradient"], f"{case}: rank {rank}"
                assert got is not None, f"{what} has no gradient any more."
                for end, part in zip((0, p - 1), answer["parts"], strict=True):
                    alone = p > 1 and torch.equal(got, part)
                    assert not alone, f"{what} has the gradient of rank {end} only: both need the sum of the two."
                wrong = off({"the tied matrix": got}, {"the tied matrix": whole})
                assert not wrong, f"{what}: {wrong}"
            sends = at_the_end and p > 1
            what = f"{case}: the gradients are right, but rank {rank}"
            check_sent(what, answer, int(sends), 1, whole.nbytes)
        same = torch.equal(answers[0]["gradient"], answers[-1]["gradient"])
        assert same, (
            f"{case}: the two copies of the gradient differ in the last digit, so the weights will drift apart."
        )
    print(f"both ends have the same sum; each sends {whole.nbytes:,} bytes, the ranks between none")

# %% [markdown] lang="en"
# ## 03c.8 · Mend: everybody at the door
#
# In the middle of a 1F1B step every rank has something for both neighbors: activations `y` for the one below, gradients
# `g` for the one above. And it wants both: activations from above, gradients from below.
#
#     rank 0   -- y -->   rank 1   -- y -->   rank 2   -- y -->   rank 3
#              <-- g --            <-- g --            <-- g --
#
# The function below hangs with two or more ranks. Some of them wait *for each other*, in a circle; the others only
# stand behind them. **First** say which of four ranks are the circle. Then run the cell behind the function: it runs
# into the deadlock, and after five seconds it shows who waits where. **Then** mend the function. There are two cures:
# sends that do not wait, or an order in which one of two neighbors receives first.
#
# **Target:** one send to each neighbor, as now.

# %% [markdown] lang="en" hint="03c.8"
# Everyone but the last rank first sends `y` down. The last rank has nobody below and first sends `g` up. Who receives?
# Follow the arrows: 0 waits for 1, 1 waits for 2, 2 waits for 3, and 3?

# %% [markdown] lang="en" hint="03c.8"
# The first cure: `isend` in place of `send`. Keep what it returns, and `.wait()` on it after both receives.

# %% [markdown] lang="en" hint="03c.8"
# The second cure: neighbors meet in pairs, first (0, 1) and (2, 3), then (1, 2). In a pair the upper one sends first
# and then receives, the lower one receives first and then sends.


# %% task="03c.8" title="Mend: everybody at the door"
def circle() -> set[int]:
    """Of four ranks in the function below, before it is mended: those that wait for each other."""
    ### BEGIN SOLUTION
    return {2, 3}
    ### END SOLUTION


def steady_round(y: Tensor, g: Tensor, axis: Axis) -> tuple[Tensor | None, Tensor | None]:
    """What comes from above (activations) and from below (gradients), None where nobody is. Shapes as of y and g."""
    above, below = axis.index > 0, axis.index < axis.size - 1
    ### BEGIN SOLUTION
    x = d = None
    for turn in (0, 1):  # the pairs (0, 1), (2, 3), ..., then (1, 2), (3, 4), ...
        if below and axis.index % 2 == turn:
            send(y, axis, axis.index + 1)
            d = recv(g, axis, axis.index + 1)
        if above and axis.index % 2 != turn:
            x = recv(y, axis, axis.index - 1)
            send(g, axis, axis.index - 1)
    ### INSTEAD
    # if below:
    #     send(y, axis, axis.index + 1)
    # if above:
    #     send(g, axis, axis.index - 1)
    # x = recv(y, axis, axis.index - 1) if above else None
    # d = recv(g, axis, axis.index + 1) if below else None
    ### END SOLUTION
    return x, d


# %% tags=["raises-exception"]
for rank, answer in enumerate(on_each_rank(one_round, steady_round)):
    print(f"rank {rank} gets", *answer["got"])

# %% check="03c.8" seconds=30
# Check of 03c.8: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    given = set(returned(circle(), "circle"))
    told = "follow the report from any rank, until you come back to one that you have met."
    assert len(given) == 2, f"circle() gives {sorted(given)}: {told}"
    assert given == {2, 3}, f"circle() gives {sorted(given)}. Rank 3 has nobody below, so it sends up: to whom?"
    for p in (4, 2, 1):
        answers, case = on_each_rank(one_round, steady_round, pp=p), f"{p} rank{'s' * (p > 1)}"
        for rank, answer in enumerate(answers):
            what = f"{case}: rank {rank}"
            from_above = [10.0 * rank + 1] if rank > 0 else None
            from_below = [10.0 * (rank + 2) + 2] if rank < p - 1 else None
            for which, where, got, wanted in zip(
                ("activations", "gradients"), ("above", "below"), answer["got"], (from_above, from_below), strict=True
            ):
                assert got == wanted, f"{what} should get {which} from {where}: {wanted}, and has {got}."
            check_sent(f"{what} gets what it should, but", answer, (rank > 0) + (rank < p - 1), 1, 2 * 3 * 4 * 4)
    print("4, 2 and 1 ranks: nobody waits for ever, one send to each neighbor")

# %% [markdown] lang="en"
# ## All together
#
# Your 1F1B, your executor and your sum of the tied gradients, on four ranks. It runs once tasks 5, 6 and 7 are done;
# `grade` has put these three into `my_parallel.py`, your own engine. The package's are in `minipar/schedule.py` and
# `minipar/pipeline.py`.


# %% tags=["raises-exception"]
def your_training(axis, steps):
    model, losses = fresh_model(depth=4, tied=True), []
    part, order = stage(model, axis.index, axis.size), one_f_one_b_order(axis.size, 6)
    tied = model.embed.token.weight if axis.index in (0, axis.size - 1) else None
    optimizer = torch.optim.Adam(part.parameters(), lr=3e-3)
    for batch, labels in corpus.batches(steps, rows=12, context=32):
        inputs, wanted, noted = rows(batch, 6), rows(labels, 6), []

        def loss_of(y, m, wanted=wanted, noted=noted):
            noted.append(F.cross_entropy(y.flatten(0, 1), wanted[m].flatten(), reduction="sum") / (12 * 32))
            return noted[-1]

        optimizer.zero_grad()
        run_schedule(order[axis.index], part, axis, inputs, 32, loss_of)
        sum_tied(tied, axis)
        optimizer.step()
        losses.append(sum(loss.item() for loss in noted))
    return losses


losses = on_each_rank(your_training, 40)[-1]
print("loss:", *(f"{loss:.2f}" for loss in losses[::5]))
