# %% [markdown] lang="en"
# # Exercises of 03d: schedules
#
# Five functions, an hour and a half, and the last one for as long as you like. You send microbatches around a ring of
# thin slices, split a backward in two, fill most of 1F1B's bubble and train with that order on four ranks, and play
# golf.
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
#     python -m minipar grade exercises/03d_schedules.ipynb
#
#     # hints for task 2, one at a time; its solution, once it passes
#     python -m minipar hint 03d.2
#     python -m minipar solution 03d.2
#
# `grade` reads only the cells with a function to finish. Cells that you add are for trying things out. The folded cells
# belong to the checks, so an answer that uses their variables or functions is refused, but for those that a task names.

# %% tags=["setup"]
from collections import Counter
from collections.abc import Callable
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from minipar import Costs, Mesh, World, bubble, connect, parallelize, simulate, zero_bubble_v
from minipar.course.checks import difference, names_in, returned, verdict
from minipar.course.given import fresh_model, gradients, one_process, targets, tokens, total_loss
from minipar.data import rows
from minipar.schedule import Action, Op, check, depends_on, in_flight, owners
from minipar.timeline import Deadlock, memory, peak

world = World(4)

# %% [markdown] lang="en"
# The next cells are folded, too. What you need is what you know from the chapters: an order of work is a list of
# actions for each rank, and `Action(Op.F, 2, 0)` is the forward of microbatch 0 on stage 2. `Op.B` is a whole backward.
# Its halves are `Op.I`, the gradient of the input, and `Op.W`, that of the weights.


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given: is a list an order, how long does it take, what do ranks keep
OURS = {"interleaved", "zero_bubble_h1", "zero_bubble_h2", "_zero_bubble", "SCHEDULES"}


def own_work(function: Callable, *more: str) -> None:
    """AssertionError if it uses the package's schedules."""
    names = {*OURS, *more} & names_in(function)
    assert not names, f"{function.__name__} uses minipar's {min(names)}: here write the order yourself."


def problem(order: list, ranks: int, microbatches: int) -> str:
    """Why a list of lists is no schedule, in a sentence; "" if it is."""
    if len(order) != ranks:
        return f"there are lists for {len(order)} ranks, and {ranks} are needed."
    for rank, program in enumerate(order):
        strange = [action for action in program if not isinstance(action, Action)]
        if strange:
            return f"rank {rank}: {strange[0]!r:.60} is no Action, such as Action(Op.F, {rank}, 0)."
    try:
        check(order, microbatches)
        simulate(order)
    except (ValueError, Deadlock) as report:
        return f"{report}."
    return ""


def timed(order: list):
    """Its run, where F, I and W of a rank's whole part take one unit each: several stages of a rank share it."""
    chunks = len(owners(order)) / len(order)
    return simulate(order, Costs(1 / chunks, 1 / chunks, 1 / chunks))


def kept(order: list) -> list[float]:
    """The most microbatches that each rank keeps at a time, in those of its whole part, from F to B or W."""
    return list(peak(memory(timed(order), len(order) / len(owners(order)))).values())


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for task 1: a row of a drawing, read
RING = (
    "F0/s0 F1/s0 F0/s2 F1/s2 F2/s0 F3/s0 F2/s2 F3/s2",
    ". F0/s1 F1/s1 F0/s3 F1/s3 F2/s1 F3/s1 F2/s3 F3/s3",
)


def read_ring(rows_of_text: tuple) -> dict[str, tuple[int, int]]:
    """Action -> its rank and tick. AssertionError for what is not there, or there twice, or on the wrong rank."""
    places = {}
    for rank, text in enumerate(rows_of_text):
        for tick, name in enumerate(str(text).split()):
            if name == ".":
                continue
            parts = name.removeprefix("F").split("/s")
            known = name.startswith("F") and len(parts) == 2 and all(part in "0123" and part for part in parts)
            assert known, f"Rank {rank}, tick {tick}: {name!r} is neither a point nor like F0/s2."
            home = int(parts[1]) % 2
            assert home == rank, f"Rank {rank}, tick {tick}: stage {parts[1]} of {name} is on rank {home}."
            assert name not in places, f"Rank {rank}: {name} is there twice, in ticks {places.get(name)} and {tick}."
            places[name] = tick
    return places


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for task 3: a linear layer whose backward is your function
class Split(torch.autograd.Function):
    """F.linear. Its backward gives the gradient of the input, by backward_input, and that of the bias."""

    @staticmethod
    def forward(ctx, x, bias, weight, later, backward_input):
        ctx.save_for_backward(x)
        ctx.more = weight, later, backward_input
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, g):
        weight, later, backward_input = ctx.more
        (x,) = ctx.saved_tensors
        dx = returned(backward_input(x.detach(), weight, g, later), "backward_input")
        return dx, g.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None, None, None, None


def split_layers(model: nn.Module, later: list, backward_input: Callable) -> list[nn.Parameter]:
    """Have all linear layers of a model do so. Their weights."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    for layer in layers:
        layer.forward = lambda x, layer=layer: Split.apply(x, layer.bias, layer.weight, later, backward_input)
    return [layer.weight for layer in layers]


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for task 3: tensors and products that are watched
class Watched:
    """A tensor of whose memory one can see whether it is still in use."""

    def __init__(self, *shape: int):
        torch.manual_seed(sum(shape))
        numbers = torch.randn(*shape, dtype=torch.float64).numpy().copy()
        self.tensor, self.memory = torch.from_numpy(numbers), ref(numbers)

    @property
    def there(self) -> bool:
        return self.memory() is not None


class Products(TorchDispatchMode):
    """Counts the matrix products inside `with`."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.__name__.split(".")[0] in ("mm", "bmm", "addmm", "baddbmm")
        return function(*args, **(kwargs or {}))


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for task 3: one call of your function
def put_off(backward_input: Callable, weight: nn.Parameter, front: tuple, later: list) -> tuple[Tensor, list[Watched]]:
    """The gradient of the weight that is due after it; x and g."""
    x, g = Watched(*front, weight.size(1)), Watched(*front, weight.size(0))
    case = f"x of {tuple(x.tensor.shape)}, weight of {tuple(weight.shape)}"
    expected = torch.einsum("...o,oi->...i", g.tensor, weight.detach())
    due = torch.einsum("no,ni->oi", g.tensor.flatten(0, -2), x.tensor.flatten(0, -2))
    with Products() as products:
        dx = returned(backward_input(x.tensor, weight, g.tensor, later), "backward_input")
    assert dx.shape == expected.shape, f"{case}: I gives {tuple(dx.shape)}, and x is {tuple(x.tensor.shape)}."
    assert torch.allclose(dx, expected, rtol=1e-12), f"{case}: what I gives is not g @ weight."
    assert weight.grad is None, f"{case}: after I the weight has a gradient already. To add it is W's part."
    del x.tensor, g.tensor, dx
    for name, one in (("x", x), ("g", g)):
        assert one.there, f"{case}: after I nobody keeps {name} itself. Is W computed already, or is there a copy?"
    assert products.count == 1, f"{case}: I makes {products.count} products: g @ weight is one, the other is W's."
    return due, [x, g]


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for task 4: a step of training in your order
def trained(make: Callable, pp: int, microbatches: int) -> dict:
    """The gradients of a step, the order in which it was done, bytes sent along the pipeline."""
    mesh = Mesh(pp=pp, dp=4 // pp)
    model = parallelize(fresh_model(depth=4), mesh, schedule=make, microbatches=microbatches)
    model.step(tokens, targets)
    axis, run = connect(mesh)["pp"], model.timeline()
    did = [span.action for span in run.of(axis.ranks[axis.index]) if span.action.op in "FIWB"]
    return {"gradients": model.full_gradients(), "stage": axis.index, "did": did}


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for task 5: by_rule, as in section 4 of the chapter
def by_rule(owner: list[int], microbatches: int, rule: Callable) -> list[list[Action]]:
    """The order that arises if each rank, tick by tick, does the first of its wishes that is ready.

    owner: the rank of each stage. rule(rank, ranks, out, waiting) -> wishes, most wanted first: "F", "I" or "W", or
    "F1" for the second stage of a rank that has several. out: F done and I not; waiting: I done and W not.
    """
    ranks, last = max(owner) + 1, len(owner) - 1
    done, programs, count = set(), [[] for _ in range(ranks)], Counter()
    while len(done) < 3 * len(owner) * microbatches:
        before = set(done)  # what happens elsewhere in this tick, a rank does not know yet
        for rank, program in enumerate(programs):
            mine = [stage for stage, home in enumerate(owner) if home == rank]
            f, i, w = (sum(count[op, stage] for stage in mine) for op in "FIW")
            places = [(f"{op}{way}", Op(op), stage) for op in "FIW" for way, stage in enumerate(mine)]
            following = {name: Action(op, stage, count[op, stage]) for name, op, stage in places}
            possible = {name: a for name, a in following.items() if a.microbatch < microbatches}
            ready = {name: a for name, a in possible.items() if before.issuperset(depends_on(a, last))}
            wishes = rule(rank, ranks, out=f - i, waiting=i - w)
            picked = [ready[name] for wish in wishes for name in ready if name.startswith(wish)][:1]
            program += picked
            done.update(picked)
            count.update(action[:2] for action in picked)
        if done == before:
            raise RuntimeError("by_rule: no wish of any rank is ready, and nobody does anything any more")
    return programs


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for task 5: the holes, and the best orders that a search of some minutes has found for them
HOLES = [(4, 8, 4), (4, 8, 3), (4, 8, 2), (3, 7, 2)]  # ranks, microbatches, the most that a rank may keep
FOUND = {  # two stages a rank, as in a V: F, I and W of its first one, f, i and w of its second
    (4, 8, 3): (
        "FFFfifiFwfiIWFIwFwfiWFwfiIwIFWfiwWfiwIfiIWWIWwIW",
        "FFFffifiwFIiWIFwWfFIwifwWiIFfWwIFfiWifwIiIWwWIWw",
        "FFFfffiwiIFIiWwfFIwWfiFwIiWfFwIWfFWifiIWIiWwIwWw",
        "FfFfFfiIiIwFWifIWWFfwwiIwFfiwIFfWWFfiIiIWwiIWWww",
    ),
    (4, 8, 2): (
        "FFfifiwFwIFWfiIWwFfiIWwFfiIWFwfiIwFWfiIwWfiIWwIW",
        "FFffiwiwFIWFfIiWwfFIiwWfFIiwWfFIiwWfFIiwWfIiWIWw",
        "FFffiwiIFWwfIFWifwIFWifwIFWifwIFWifwIFWifIwiWwIW",
        "FfFfiIWwFfiIWwFfiIwWFfiIWwFfiIwWFfiIWwFfiIwWiIWw",
    ),
    (3, 7, 2): (
        "FFfifiwFIwWFIfiWwFfiIwWFfiIWFwfiIwWfiIWwIW",
        "FFffiwiIwFWIfFWiwfFIWiwfFIWifwFIiwfWIiwWIW",
        "FfFfiIiIwFwfWWFfiIWFwfiIWwFfiIwFWfiIwWiIwW",
    ),
}


def read_found(lines: tuple[str, ...]) -> list[list[Action]]:
    order, last = [], 2 * len(lines) - 1
    for rank, line in enumerate(lines):
        number = Counter()
        order.append([])
        for letter in line:
            order[-1].append(Action(Op(letter.upper()), rank if letter.isupper() else last - rank, number[letter]))
            number[letter] += 1
    return order


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for task 5: scores
def score(order: list, microbatches: int, limit: float) -> float:
    """The bubble of the run, as in the chapter's golf. ValueError where a rank keeps too much or has many stages."""
    if wrong := problem(order, len(order), microbatches):
        raise ValueError(wrong.rstrip("."))
    stages, most = len(owners(order)), max(kept(order))
    each = set(Counter(owners(order).values()).values())
    if each not in ({1}, {2}):
        raise ValueError(f"{stages} stages on {len(order)} ranks: each has one, or each has two")
    if most > limit:
        raise ValueError(f"rank {kept(order).index(most)} keeps {most:g}, more than {limit}")
    return bubble(timed(order))


def par(ranks: int, microbatches: int, limit: int) -> float:
    """What one stage a rank and one rule reach."""

    def rule(rank, ranks, out, waiting):
        return ["W"] * (waiting > rank) + ["F"] * (out < ranks - rank and out + waiting < limit) + ["I", "W"]

    return score(by_rule(list(range(ranks)), microbatches, rule), microbatches, limit)


def best_known(ranks: int, microbatches: int, limit: int) -> float:
    """ZB-V's where it may keep what it keeps; no order with two stages a rank can be shorter. Else what was found."""
    if limit == ranks:
        return score(zero_bubble_v(ranks, microbatches), microbatches, limit)
    return score(read_found(FOUND[ranks, microbatches, limit]), microbatches, limit)


PAR, BEST = ({hole: value(*hole) for hole in HOLES} for value in (par, best_known))
work = {(ranks, microbatches, limit): 3 * microbatches for ranks, microbatches, limit in HOLES}
assert [round(work[hole] / (1 - share), 6) for hole, share in PAR.items()] == [27, 32, 41, 30]  # units
assert [round(work[hole] / (1 - share), 6) for hole, share in BEST.items()] == [25.5, 26.5, 29.5, 23.5]


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for task 5: your scorecard
def scorecard(make: Callable) -> tuple[str, str]:
    """The table, and why the first of its rows that is above par is so, in a sentence."""
    lines, first = [f"{'ranks  microbatches  may keep':<30}{'par':>7}{'best known':>13}{'yours':>9}"], ""
    for hole in HOLES:
        ranks, microbatches, limit = hole
        case = f"{ranks} ranks, {microbatches} microbatches, {limit} to keep"
        row = f"{ranks:>5}{microbatches:>14}{limit:>10}{'':<1}{PAR[hole]:>7.1%}{BEST[hole]:>13.1%}"
        try:
            order = returned(make(*hole), "my_schedule")
            if len(order) != ranks:
                raise ValueError(f"there are lists for {len(order)} ranks")
            yours, end = score(order, microbatches, limit), timed(order).end
        except NotImplementedError:
            raise
        except (ValueError, RuntimeError) as wrong:
            row, told = f"{row}     none", f"{case}: {wrong}."
        else:
            row += f"{yours:>9.1%}" + "  better than the best known" * (yours < BEST[hole] - 1e-9)
            told = f"{case}: your {end:g} units have a bubble of {yours:.1%}, and par is {PAR[hole]:.1%}."
            told = "" if yours <= PAR[hole] + 1e-9 else told
        lines.append(row)
        first = first or told
    return "\n".join(lines), first


# %% [markdown] lang="en"
# ## 03d.1 · Trace: around the ring
#
# Two ranks, four stages, four microbatches, forwards only. Rank 0 has the stages 0 and 2, rank 1 has the stages 1 and
# 3: a microbatch goes from rank 0 to rank 1, back to rank 0, and to rank 1 again. F1/s2 is the forward of microbatch 1
# on stage 2. Each takes one tick, and F on a stage waits for the same F on the stage before.
#
# Where a rank could go on with a microbatch that has come back, or begin a new one, **the one that has come back goes
# first**. The beginning is done:
#
#     tick      0      1      2      3      4    ...
#     rank 0  F0/s0  F1/s0  F0/s2  F1/s2         ...
#     rank 1    .    F0/s1  F1/s1                ...

# %% [markdown] lang="en" hint="03d.1"
# In tick 3 rank 1 can do stage 3 of microbatch 0: rank 0 has done stage 2 of it in tick 2. Nothing else is ready there.

# %% [markdown] lang="en" hint="03d.1"
# After tick 3 both early microbatches have left rank 0 for good. So it begins two new ones, then these two come back.
# Nobody has a gap.


# %% task="03d.1" title="Trace: around the ring"
def forwards() -> tuple[str, str]:
    """Row of rank 0, row of rank 1: a word a tick, a point for an empty one."""
    ### BEGIN SOLUTION
    rank_0 = "F0/s0 F1/s0 F0/s2 F1/s2 F2/s0 F3/s0 F2/s2 F3/s2"
    rank_1 = "  .   F0/s1 F1/s1 F0/s3 F1/s3 F2/s1 F3/s1 F2/s3 F3/s3"
    ### INSTEAD
    # rank_0 = "F0/s0 F1/s0 F0/s2 F1/s2"
    # rank_1 = "  .   F0/s1 F1/s1"
    # raise NotImplementedError("your turn")
    ### END SOLUTION
    return rank_0, rank_1


# %% check="03d.1" seconds=20
# Check of 03d.1: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    given = returned(forwards(), "forwards")
    assert len(given) == 2, f"There are two ranks, and forwards gives {len(given)} rows."
    yours, right = read_ring(given), read_ring(RING)
    for name, tick in sorted(right.items(), key=lambda item: item[1]):
        number, at = name[1:].split("/s")
        rank, here = int(at) % 2, yours.get(name)
        assert here is not None, f"Rank {rank}: {name} is missing."
        before = f"F{number}/s{int(at) - 1}"
        told = f"Rank {rank}: {name} is in tick {here}"
        early = at != "0" and here <= yours.get(before, 99)
        assert not early, f"{told}, and waits for {before}, which is in tick {yours[before]}."
        others = [other for other, place in yours.items() if place == tick and int(other[-1]) % 2 == rank]
        back = f"{told}, and in tick {tick} you have {others[0]}" if others else f"{told}, and tick {tick} is empty"
        assert here == tick, f"{back}. There {name} could be: what has come back goes first, then a new one."
    print("rank 0 is busy for ticks 0 to 7, rank 1 for ticks 1 to 8: the ring closes without a gap")

# %% [markdown] lang="en"
# ## 03d.2 · Write: an interleaved order
#
# Now for any number of ranks $p$ and of chunks $v$, and with backwards. Rank $r$ has the stages $r$, $r + p$,
# $r + 2p$, ... ($v$ of them); $p$ divides the number of microbatches.
#
# - Forwards go in groups of $p$ microbatches: a group through the rank's first chunk, then through its second, and so
#   on; then the next group. This is what you have just drawn.
# - Backwards go in the same groups, through the last chunk first.
# - Rank $r$ begins with $2(p - 1 - r) + (v - 1)p$ forwards (or with all, if there are fewer). Then one forward and one
#   backward by turns, then the backwards that are left.
#
# **Target:** a bubble of $(p-1)/(vm + p - 1)$, which is that of 1F1B with $v$ times the microbatches. Rank $r$ keeps at
# most $2(p - r - 1) + (v - 1)p + 1$ of the thin slices' microbatches. (Where messages cost nothing, as in this check,
# $p - 1 - r$ in place of $2(p - 1 - r)$ has the same bubble and keeps less. Where they cost something, it is slower.)

# %% [markdown] lang="en" hint="03d.2"
# Three loops, one inside the other: `for start in range(0, microbatches, ranks)`, `for chunk in range(chunks)`,
# `for m in range(start, start + ranks)`. The stage is `rank + chunk * ranks`.

# %% [markdown] lang="en" hint="03d.2"
# For the backwards the middle loop is `for chunk in reversed(range(chunks))`, and all else the same.

# %% [markdown] lang="en" hint="03d.2"
# With both lists and `warmup`: `program = downs[:warmup]`, then `for f, b in zip(downs[warmup:], ups)` add both, then
# `ups[len(downs) - warmup :]`.


# %% task="03d.2" title="Write: an interleaved order"
def interleaved_order(ranks: int, microbatches: int, chunks: int) -> list[list[Action]]:
    """For each rank the list of its actions, F and B: 2 * chunks * microbatches of them. ranks divides microbatches."""
    order = []
    for rank in range(ranks):
        ### BEGIN SOLUTION
        downs, ups = [], []
        for start in range(0, microbatches, ranks):
            for chunk in range(chunks):
                for m in range(start, start + ranks):
                    downs.append(Action(Op.F, rank + chunk * ranks, m))
                    ups.append(Action(Op.B, rank + (chunks - 1 - chunk) * ranks, m))
        warmup = min(2 * (ranks - 1 - rank) + (chunks - 1) * ranks, len(downs))
        program = downs[:warmup]
        for f, b in zip(downs[warmup:], ups, strict=False):
            program += [f, b]
        program += ups[len(downs) - warmup :]
        ### END SOLUTION
        order.append(program)
    return order


# %% check="03d.2" seconds=20
# Check of 03d.2: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    for p, m, v in [(2, 4, 2), (4, 8, 2), (3, 6, 3), (1, 2, 2), (4, 4, 1), (2, 2, 4), (4, 8, 3)]:
        order = returned(interleaved_order(p, m, v), "interleaved_order")
        own_work(interleaved_order)
        case = f"{p} rank{'s' * (p > 1)}, {m} microbatches, {v} chunk{'s' * (v > 1)}"
        wrong = problem(order, p, m)
        assert not wrong, f"{case}: {wrong}"
        assert not any(action.op in "IW" for program in order for action in program), f"{case}: only F and B here."
        for number, home in owners(order).items():
            assert home == number % p, f"{case}: stage {number} is on rank {home}, and belongs on rank {number % p}."
        assert len(owners(order)) == p * v, f"{case}: there are {len(owners(order))} stages, not {p * v}."
        for rank, program in enumerate(order):
            most, held = min(m * v, 2 * (p - rank - 1) + (v - 1) * p + 1), in_flight(program)
            told = f"{case}: rank {rank} keeps {held}, and {most} are enough. How many F before the first B?"
            assert held <= most, told
        share, least = bubble(timed(order)), (p - 1) / (v * m + p - 1)
        begin = " ".join(f"{a}/s{a.stage}" for a in order[0][:6])
        told = f"{case}: a bubble of {share:.1%}, and {least:.1%} can be had. Rank 0 begins with {begin}."
        assert share < least + 1e-9, told
    straight = (p - 1) / (m + p - 1)
    print(f"{case}: a bubble of {share:.1%}, and with one chunk {straight:.1%}")

# %% [markdown] lang="en"
# ## 03d.3 · Write: I now, W later
#
# The backward of a linear layer, $y = x\,w^T$, is two products. The stage above waits for one of them:
#
#     I, now     g @ w      the gradient of x, at once       needs g and w
#     W, later   g.T @ x    is added to w.grad, some day     needs g and x: these two are kept until then
#
# Write both. `backward_input` returns the gradient of `x` and puts into the list `later` whatever the second product
# will need. `backward_weights` is called some time after that, when several layers and microbatches have left something
# in `later`. It does them all and leaves the list empty.
#
# `x` and `g` may have any number of dimensions in front: a weight's gradient is summed over all of them. If a weight
# has a gradient already, add to it.
#
# **Target:** one product in each half. Until W nothing is kept but `x` and `g` as they are, after it nothing.

# %% [markdown] lang="en" hint="03d.3"
# `later.append((weight, x, g))` and `return g @ weight`: the shapes of `g` (..., out) and `weight` (out, in) fit,
# however many dimensions are in front.

# %% [markdown] lang="en" hint="03d.3"
# `x.flatten(0, -2)` is (N, in): all dimensions in front in one. Then `g.flatten(0, -2).T @ x.flatten(0, -2)` is
# (out, in).

# %% [markdown] lang="en" hint="03d.3"
# `while later:` and in it `weight, x, g = later.pop(0)`. The first time, `weight.grad` is None.


# %% task="03d.3" title="Write: I now, W later"
def backward_input(x: Tensor, weight: nn.Parameter, g: Tensor, later: list) -> Tensor:
    """I of y = x @ weight.T: the gradient of x. Puts W off, in `later`.

    x: (..., in). weight: (out, in). g: the gradient of y, (..., out).
    """
    ### BEGIN SOLUTION
    later.append((weight, x, g))
    return g @ weight
    ### END SOLUTION


def backward_weights(later: list) -> None:
    """W of all that was put off: adds to weight.grad, (out, in), and gives up what was kept."""
    ### BEGIN SOLUTION
    while later:
        weight, x, g = later.pop(0)
        part = g.flatten(0, -2).T @ x.flatten(0, -2)
        weight.grad = part if weight.grad is None else weight.grad + part
    ### END SOLUTION


# %% check="03d.3" seconds=20
# Check of 03d.3: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    weights, later, seen = [nn.Parameter(Watched(*shape).tensor) for shape in ((3, 4), (5, 3))], [], []
    totals = [torch.zeros_like(w) for w in weights]
    for again in range(2):
        for front in [(6,), (2, 5), (2, 3, 2)][: 3 - again]:
            for w, total in zip(weights, totals, strict=True):
                before, w.grad = w.grad, None
                due, pair = put_off(backward_input, w, front, later)
                total += due
                w.grad, seen = before, seen + pair
        assert later, "backward_input has left nothing in `later`: what will W work with?"
        with Products() as products:
            backward_weights(later)
        for w, total in zip(weights, totals, strict=True):
            what = f"After W the weight of {tuple(w.shape)}"
            assert w.grad is not None, f"{what} has no gradient."
            told = f"{what} has the gradient {w.grad[0].tolist()}, ..., and it is {total[0].tolist()}, ..."
            assert torch.allclose(w.grad, total, rtol=1e-12), f"{told} It adds up over calls and microbatches."
        assert not later, f"After W {len(later)} entries are left in `later`: the next W would count them again."
        left, calls = sum(one.there for one in seen), 2 * (3 - again)
        assert not left, f"After W {left} of {len(seen)} tensors x and g are still kept somewhere."
        told = f"W makes {products.count} products for {calls} calls of I: one each."
        assert products.count == calls, told
    model, later = fresh_model(), []
    split = split_layers(model, later, backward_input)
    for x, y in zip(rows(tokens, 2), rows(targets, 2), strict=True):
        (total_loss(model, x, y) / targets.numel()).backward()
    early = sum(w.grad is not None for w in split)
    backward_weights(later)
    wrong = difference([gradients(model)], one_process(tokens, targets)).removeprefix("rank 0: ")
    assert not wrong, f"In the GPT, two microbatches, W after both: {wrong}"
    print(f"GPT, after two I: {early} of {len(split)} weights have a gradient; after W all have that of one process")

# %% [markdown] lang="en"
# ## 03d.4 · Write: fill the bubble
#
# Split backwards, one stage a rank, and F, I and W take one unit each. First 1F1B with I and W in place of B, each W at
# once. Two ranks, four microbatches:
#
#     rank 0   F0 F1  . I0 W0 F2 I1 W1 F3 I2 W2  . I3 W3
#     rank 1    . F0 I0 W0 F1 I1 W1 F2 I2 W2 F3 I3 W3  .
#
# Each rank works for 12 units and waits for two, $2(p-1)$ in general: the run takes $3m + 2(p-1)$ units. But nobody
# waits for a W. If rank 1 put one off, each of its later I's would come a unit earlier, and so would what waits for it.
#
# **Target**, for at least $p$ microbatches: $3m + (p - 1)$ units, a bubble of $(p-1)/(3m + p - 1)$. No order with one
# stage a rank is shorter. And that in the memory of 1F1B's first rank: **no rank keeps more than $p$ microbatches**
# from F to W.
#
# The check simulates your order, then trains with it on four ranks and on two, and compares with one process.

# %% [markdown] lang="en" hint="03d.4"
# In 1F1B rank $r$ keeps $p - r$. So there is room for $r$ more: let up to $r$ W's wait on rank $r$, none on rank 0 and
# the most on the last.

# %% [markdown] lang="en" hint="03d.4"
# As in 03c.5, count f, i and w, each rank for itself. In flight is now `f - i`, waiting is `i - w`. In which order
# do you ask? A W if more than $r$ wait; else F, if fewer than $p - r$ are in flight and one is left; else I, if one is
# left; else W.

# %% [markdown] lang="en" hint="03d.4"
# `while w < microbatches:` and in it `if i - w > rank:` W, `elif f < microbatches and f - i < ranks - rank:` F,
# `elif i < microbatches:` I, `else:` W.


# %% task="03d.4" title="Write: fill the bubble"
def zero_bubble_order(ranks: int, microbatches: int) -> list[list[Action]]:
    """For each rank the list of its actions: F, I and W of each microbatch on the stage `rank`."""
    order = []
    for rank in range(ranks):
        program, f, i, w = [], 0, 0, 0
        ### BEGIN SOLUTION
        while w < microbatches:
            if i - w <= rank and f < microbatches and f - i < ranks - rank:
                program.append(Action(Op.F, rank, f))
                f += 1
            elif i - w <= rank and i < microbatches:
                program.append(Action(Op.I, rank, i))
                i += 1
            else:
                program.append(Action(Op.W, rank, w))
                w += 1
        ### END SOLUTION
        order.append(program)
    return order


# %% check="03d.4" seconds=30
# Check of 03d.4: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    for p, m in [(2, 4), (4, 8), (3, 7), (1, 3), (4, 4), (5, 11)]:
        order = returned(zero_bubble_order(p, m), "zero_bubble_order")
        own_work(zero_bubble_order, "zero_bubble_v")
        case = f"{p} rank{'s' * (p > 1)}, {m} microbatches"
        wrong = problem(order, p, m)
        assert not wrong, f"{case}: {wrong}"
        assert list(owners(order)) == list(range(p)), f"{case}: {len(owners(order))} stages. Here it is one a rank."
        for rank, held in enumerate(map(in_flight, order)):
            assert held <= p, f"{case}: rank {rank} keeps {held} microbatches from F to W, and may keep {p}."
        end, least = timed(order).end, 3 * m + p - 1
        told = f"{case}: {end:g} units, and {least} can be had (1F1B takes {3 * (m + p - 1)}, split {least + p - 1})."
        assert end <= least + 1e-9, told
    for p, m in [(4, 8), (2, 4)]:
        order, case = zero_bubble_order(p, m), f"Trained on {p} ranks, {m} microbatches"
        answers = world.run(trained, zero_bubble_order, p, m, limit=20)
        wrong = difference([answer["gradients"] for answer in answers], one_process(tokens, targets, 4))
        assert not wrong, f"{case}: {wrong}"
        for rank, answer in enumerate(answers):
            told = f"{case}: rank {rank} did not do what your order says."
            assert answer["did"] == order[answer["stage"]], told
    share = bubble(timed(zero_bubble_order(4, 8)))
    print(f"4 ranks, 8 microbatches: a bubble of {share:.1%} in place of 27.3%, and the gradients of one process")

# %% [markdown] lang="en"
# ## 03d.5 · Schedule golf
#
# The last task has no best answer that we could prove, but for its first hole. Write the order with the smallest bubble
# of the run that keeps no more than `limit` microbatches on any rank. F, I and W of a rank's part take one unit each,
# messages nothing. Give each rank **one stage, or each two**, in any order. (With two, an action takes half a unit, and
# what it keeps counts half.)
#
# | ranks | microbatches | limit | par | best known |
# |---|---|---|---|---|
# | 4 | 8 | 4 | 11.1% | 5.9% |
# | 4 | 8 | 3 | 25.0% | 9.4% |
# | 4 | 8 | 2 | 41.5% | 18.6% |
# | 3 | 7 | 2 | 30.0% | 10.6% |
#
# **Par**, with which the task passes, is what one stage a rank and one rule reach, close to that of the task before.
# The best known of the first hole is ZB-V's, and nothing with two stages a rank can be shorter: the last rank begins
# after three half forwards. For the others a search of some minutes tried all ways to lay out two stages a rank. Your
# scorecard stands below the check.
#
# You may use `by_rule(owner, microbatches, rule)`, the game of the chapter's section 4: `owner` is the rank of each
# stage, `rule(rank, ranks, out, waiting)` gives wishes such as `["F", "I", "W"]`, the most wanted first, and a rank
# does the first one that is ready. `out` counts what it has with F done and I not, `waiting` what has I done and W not.
# `"F"` is any forward; where a rank has two stages, `"F0"` is that of its first and `"F1"` that of its second.

# %% [markdown] lang="en" hint="03d.5"
# Par: `by_rule(list(range(stages)), microbatches, rule)`, where the rule is that of 03d.4 with one more condition for
# F: `out + waiting < limit`.

# %% [markdown] lang="en" hint="03d.5"
# Below par: a V, `owner = [*range(stages), *reversed(range(stages))]`. Now `"F0"` is the way down and `"F1"` the way
# up, and a rank has room for `2 * limit` halves. Keep one place free for the way up, or nobody will do anything any
# more.

# %% [markdown] lang="en" hint="03d.5"
# The rule of the solution, with `kept = out + waiting`: F1 if `kept < 2 * limit`, F0 if `kept < 2 * limit - 1`, then
# I1, I0, W. It has 5.9%, 11.1%, 31.4% and 14.3%: there is something left for you.


# %% task="03d.5" title="Schedule golf"
def my_schedule(stages: int, microbatches: int, limit: int) -> list[list[Action]]:
    """An order for `stages` ranks, of which none keeps more than `limit` microbatches."""
    ### BEGIN SOLUTION

    def rule(rank: int, ranks: int, out: int, waiting: int) -> list[str]:
        kept = out + waiting
        return ["F1"] * (kept < 2 * limit) + ["F0"] * (kept < 2 * limit - 1) + ["I1", "I0", "W"]

    return by_rule([*range(stages), *reversed(range(stages))], microbatches, rule)
    ### END SOLUTION


# %% check="03d.5" seconds=30
# Check of 03d.5: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    card, above_par = scorecard(my_schedule)
    own_work(my_schedule, "zero_bubble_v")
    assert not above_par, f"{above_par}\n\n{card}"
    print("par or better on four holes; the best known:", ", ".join(f"{share:.1%}" for share in BEST.values()))

# %% tags=["raises-exception"]
print(scorecard(my_schedule)[0])

# %% [markdown] lang="en"
# ## And on real ranks
#
# A schedule that scores is one that trains. Yours, on four ranks that keep three microbatches each: the order that
# they followed, and the loss before and after 20 steps.


# %% tags=["raises-exception"]
def your_training(steps):
    model = parallelize(fresh_model(depth=8), Mesh(pp=4), schedule=lambda p, m: my_schedule(p, m, 3), microbatches=8)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        losses.append(model.step(tokens, targets).item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, model.timeline()


losses, run = world.run(your_training, 20)[0]
for rank in run.ranks:
    print(f"rank {rank}", *(f"{span.action}/s{span.action.stage}" for span in run.of(rank)[:12]), "...")
print(f"loss {losses[0]:.2f}, and after 20 steps on the same eight rows {losses[-1]:.2f}")
