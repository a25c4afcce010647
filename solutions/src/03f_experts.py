# %% [markdown] lang="en"
# # Exercises of 03f: experts
#
# Four small functions, an hour or so: who is dropped when experts are full, two all-to-alls that carry tokens to their
# experts and back, the loss that keeps experts busy, and a drop that looks into the future.
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
#     python -m minipar grade exercises/03f_experts.ipynb
#
#     # hints for task 2, one at a time; its solution, once it passes
#     python -m minipar hint 03f.2
#     python -m minipar solution 03f.2
#
# `grade` reads only the cells with a function to finish. Cells that you add are for trying things out. The folded cells
# belong to the checks, so an answer may not use their variables and functions: take what your function is given, and
# what is imported here.

# %% tags=["setup"]
from collections.abc import Callable
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from minipar import Axis, World, ledger
from minipar.collectives import all_to_all
from minipar.course.checks import names_in, returned, verdict
from minipar.course.given import along

world = World(4)

# %% [markdown] lang="en"
# The next cells are folded, too: routers to try, and what the checks run on each rank. Run them all; read them when you
# want to know.


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for tasks 1, 3 and 4: probabilities of a router, and who is kept
def probabilities_of(tokens: int, experts: int, seed: int = 0) -> Tensor:
    """(tokens, experts), float64, each row sums to 1. The first expert is the likeliest for many tokens."""
    scores = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scores[:, 0] += 1
    return scores.softmax(-1)


def places_in_queue(choices: list[int]) -> list[int]:
    """How many choices before this one fell on the same expert."""
    return [choices[:i].count(e) for i, e in enumerate(choices)]


def kept_in_order(choices: Tensor, room: int) -> Tensor:
    """For choices of one row, (tokens, top): whether there was room left."""
    return torch.tensor([place < room for place in places_in_queue(choices.flatten().tolist())]).view_as(choices)


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for task 2: experts on ranks
def numbers(*shape: int, seed: int) -> Tensor:
    """Random ones in float64, the same for whoever asks."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def through_all(slots: Tensor) -> Tensor:
    """What experts give if all of them are here. slots: (experts, N, width)."""
    return torch.bmm(F.gelu(slots), numbers(slots.size(0), slots.size(2), slots.size(2), seed=100))


def on_each(axis: Axis, function: Callable, experts: int, per_expert: int) -> dict:
    """What a function makes of this rank's slots, what is right, what it sends, and what its experts got."""
    slots, got = numbers(experts, per_expert, 5, seed=axis.index), []
    mine, held = numbers(experts, 5, 5, seed=100).chunk(axis.size)[axis.index], experts // axis.size

    def my_experts(x: Tensor) -> Tensor:
        got.append(tuple(x.shape))
        return torch.bmm(F.gelu(x), mine) if x.dim() == 3 and len(x) == held and x.size(2) == 5 else x

    with ledger() as book:
        out = returned(function(slots.clone(), axis, my_experts), "through_experts")
    sent = {"bytes": book.bytes("ep"), "calls": book.calls("ep"), "M": slots.nbytes}
    return {"out": out, "right": through_all(slots), "got": got} | sent


# %% [markdown] lang="en"
# ## 03f.1 · Write: who is dropped
#
# A router gives each token a probability for each expert. The token chooses its `top` likeliest experts, and each
# expert has room for `room` choices of a row. Choices queue up: in the order of the tokens, and of one token the
# likeliest expert comes first. Who finds an expert full is dropped there.
#
# For instance two tokens with the choices 0, 1 and 0, 2, and room for one: the second token's choice of expert 0 is
# dropped, and the other three are kept.

# %% [markdown] lang="en" hint="03f.1"
# `probabilities.topk(top).indices` are the choices, the likeliest first. Flattened, they stand in the order of the
# queue.

# %% [markdown] lang="en" hint="03f.1"
# The place of a choice is the number of choices *before* it that fell on the same expert. It is kept if its place is
# below `room`. A loop with a count for each expert will do.

# %% [markdown] lang="en" hint="03f.1"
# Without a loop: `F.one_hot(flat, experts).cumsum(0)` says for each choice how often each expert has come up so far,
# this choice included. `.gather(1, flat[:, None])` takes the number of its own expert.


# %% task="03f.1" title="Write: who is dropped" engine="route"
def route(probabilities: Tensor, top: int, room: int) -> tuple[Tensor, Tensor]:
    """The choices of each token, and which of them are kept: (T, top) whole numbers and (T, top) of bool.

    probabilities: (T, experts), of the tokens of one row in their order.
    """
    ### BEGIN SOLUTION
    choices = probabilities.topk(top).indices
    flat = choices.flatten()
    so_far = F.one_hot(flat, probabilities.size(1)).cumsum(0)
    place = so_far.gather(1, flat[:, None]).view_as(choices) - 1
    return choices, place < room
    ### END SOLUTION


# %% check="03f.1" seconds=20
# Check of 03f.1: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    told = "route uses minipar's queue: here count yourself."
    assert not names_in(route) & {"queue", "MoE"}, told
    for tokens, experts, top, room in ((6, 3, 2, 2), (16, 8, 2, 5), (16, 4, 1, 4), (9, 5, 3, 4), (7, 4, 2, 7)):
        case, p = f"{tokens} tokens, {experts} experts, top {top}, room {room}", probabilities_of(tokens, experts)
        both = returned(route(p.clone(), top, room), "route")
        assert isinstance(both, tuple | list) and len(both) == 2, (
            "route returns two tensors: choices, and which are kept."
        )
        for what, x in zip(("choices", "kept"), both, strict=True):
            shape = tuple(x.shape)
            assert shape == (tokens, top), f"{case}: {what} has the shape {shape}, and should be {(tokens, top)}."
        choices, kept = both
        right = p.topk(top).indices
        wrong = (choices != right).any(1).nonzero().flatten().tolist()
        told = (
            f"{case}: token {wrong and wrong[0]} chooses {choices[wrong[:1]].tolist()}, and its likeliest experts are"
        )
        assert not wrong, f"{told} {right[wrong[:1]].tolist()}, in this order."
        wanted, places = kept_in_order(right, room), places_in_queue(right.flatten().tolist())
        for i, (yours, true) in enumerate(zip(kept.flatten().tolist(), wanted.flatten().tolist(), strict=True)):
            told = f"{case}: choice {i % top} of token {i // top} has {places[i]} choices of the same expert before it"
            assert bool(yours) == true, f"{told}: it is {'kept' if true else 'dropped'}, and route says it is not."
    p = probabilities_of(16, 8)
    dropped = int((~kept_in_order(p.topk(2).indices, 5)).sum())
    print(f"16 tokens, 2 choices each, 8 experts with room for 5: {dropped} of 32 choices are dropped")

# %% [markdown] lang="en"
# ## 03f.2 · Write: to the experts and back
#
# $E$ experts are shared out over $n$ ranks: rank 0 has the first $E/n$, and so on. Each rank has laid its own tokens
# into slots, $N$ for each of all $E$ experts. Bring slots to the ranks of their experts, call `experts` once, and bring
# what it gives back, so that each result stands where its slot stood:
#
#     (E, N, C)  --dispatch-->  (E/n, nN, C)  --experts-->  (E/n, nN, C)  --combine-->  (E, N, C)
#
# `all_to_all(x, axis)` cuts `x` along dimension 0 into $n$ equal parts and sends part $i$ to rank $i$. What comes is
# put side by side along dimension 0, in the order of the ranks that sent it.
#
# **Target.** Two calls. Of the $M$ bytes of its slots a rank sends $\frac{n-1}{n} M$ there and as much back: on four
# ranks $1.5\,M$. (To send everything to everyone costs $3M$, before anything has come back.)

# %% [markdown] lang="en" hint="03f.2"
# After the first `all_to_all` dimension 0 has $n$ blocks of $E/n$ experts, a block from each rank. They belong side by
# side along dimension 1. `.chunk(n)` and `torch.cat(..., 1)` do that. A `view` does not: it mixes experts.

# %% [markdown] lang="en" hint="03f.2"
# On the way back the parts for the ranks lie along dimension 1. Cut there, put them together along dimension 0, and
# `all_to_all` once more. Then they are in place: part $i$ that comes back is of rank $i$'s experts.


# %% task="03f.2" title="Write: to the experts and back" engine="through_experts"
def through_experts(slots: Tensor, axis: Axis, experts: Callable) -> Tensor:
    """What the experts make of this rank's slots, (E, N, C).

    slots: (E, N, C), for all experts. experts: of (E/n, nN, C), those of all ranks for this rank's experts; the same
    shape comes out. Each slot's result depends on this slot alone.
    """
    ### BEGIN SOLUTION
    came = all_to_all(slots, axis)
    gave = experts(torch.cat(came.chunk(axis.size, 0), 1))
    return all_to_all(torch.cat(gave.chunk(axis.size, 1), 0), axis)
    ### END SOLUTION


# %% check="03f.2" seconds=30
# Check of 03f.2: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    ready = names_in(through_experts) & {"dispatch", "combine", "cut_experts"}
    assert not ready, f"through_experts uses minipar's {', '.join(ready)}: here write it with all_to_all."
    for n, experts, per_expert in ((4, 8, 3), (2, 6, 5), (4, 4, 2), (2, 2, 1)):
        answers = along(world, "ep", on_each, through_experts, experts, per_expert, size=n)[:: 4 // n]
        for rank, answer in enumerate(answers):
            what, out, right = f"{experts} experts on {n} ranks: rank {rank}", answer["out"], answer["right"]
            shape, got = (experts // n, n * per_expert, 5), answer["got"]
            assert len(got) == 1, f"{what} calls its experts {len(got)} times, and once is what they are for."
            told = f"{what}: its experts get {got[0]}, and should get {shape}"
            assert got[0] == shape, f"{told}: {experts // n} experts, slots of {n} ranks."
            assert out.shape == right.shape, (
                f"{what} returns {tuple(out.shape)}, and its slots are {tuple(right.shape)}."
            )
            wrong = ((out - right).abs().amax(2) > 1e-12).nonzero().tolist()
            told = f"{what} gets other results for {len(wrong)} of its {experts * per_expert} slots, the first of"
            told += f" expert {wrong and wrong[0][0]}: did each slot come to its own expert, and its result back?"
            assert not wrong, told
            sent, least, M = answer["bytes"], 2 * (n - 1) * answer["M"] // n, answer["M"]
            told = f"{what} has the right results, but sends {sent / M:g} M: {least / M:g} M is enough."
            assert sent <= least, told
            told = f"{what} has the right results, but makes {answer['calls']} calls: one there and one back."
            assert answer["calls"] == 2, told
        if experts == 8:
            print(f"8 experts on 4 ranks: 2 calls, {sent / M:g} M sent by each rank")

# %% [markdown] lang="en"
# ## 03f.3 · Write: the loss that keeps experts busy
#
# For a row, let $f_e$ be the share of all choices that fell on expert $e$, and $P_e$ its mean probability over the
# tokens. The term that is added to the loss is
#
# $$L = E \sum_e f_e P_e$$
#
# It is 1 if all is even, and $E$ if everything goes to one expert. Counts have no gradient, $P$ has one. First say
# which way it pushes: four experts have the shares $f = \frac12, \frac14, \frac14, 0$ of the choices. What is
# $\partial L / \partial P_e$ for each of them? (A step goes *against* the gradient.) Then write the term.

# %% [markdown] lang="en" hint="03f.3"
# $f$ is a constant, and $L$ is linear in $P_e$: its derivative is what stands in front of it.

# %% [markdown] lang="en" hint="03f.3"
# `torch.bincount(choices.flatten(), minlength=experts)` counts. Without `minlength` the last experts are missing if
# nobody chose them. All `top` choices of a token count, so the shares are of `choices.numel()`.


# %% task="03f.3" title="Write: the loss that keeps experts busy" engine="balance_loss"
def push_on_four() -> list[float]:
    """The derivative of L with respect to the mean probability of each expert, for f = 1/2, 1/4, 1/4, 0."""
    ### BEGIN SOLUTION
    return [2, 1, 1, 0]
    ### END SOLUTION


def balance_loss(probabilities: Tensor, choices: Tensor) -> Tensor:
    """E times the sum over experts of share of choices times mean probability, 0-d.

    probabilities: (T, E), with a gradient. choices: (T, top), numbers of experts.
    """
    ### BEGIN SOLUTION
    experts = probabilities.size(1)
    share = torch.bincount(choices.flatten(), minlength=experts) / choices.numel()
    return experts * (share * probabilities.mean(0)).sum()
    ### END SOLUTION


# %% check="03f.3" seconds=20
# Check of 03f.3: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    yours = [float(x) for x in returned(push_on_four(), "push_on_four")]
    assert len(yours) == 4, f"push_on_four gives {len(yours)} numbers, and there are four experts."
    assert min(yours) >= 0, f"push_on_four gives {yours}: L grows with each P, and no derivative is negative."
    assert yours == [2, 1, 1, 0], f"push_on_four gives {yours}: L is 4 (P0/2 + P1/4 + P2/4)."
    even, one = torch.full((8, 4), 0.25, dtype=torch.float64), torch.eye(4, dtype=torch.float64)[[2] * 8]
    cases = [("an even load", even, torch.arange(8)[:, None] % 4), ("all to expert 2", one, torch.full((8, 1), 2))]
    for tokens, experts, top in ((16, 8, 2), (9, 4, 1), (5, 12, 3)):
        p = probabilities_of(tokens, experts)
        cases.append((f"{tokens} tokens, {experts} experts, top {top}", p, p.topk(top).indices))
    for case, given, choices in cases:
        p, (tokens, experts) = given.clone().requires_grad_(), given.shape
        f = torch.tensor([(choices == e).sum() / choices.numel() for e in range(experts)], dtype=torch.float64)
        loss, right = returned(balance_loss(p, choices), "balance_loss"), float(experts * f @ given.mean(0))
        shape = tuple(loss.shape)
        assert not shape, f"{case}: the term has the shape {shape}, and is one number."
        told = f"{case}: the term is {float(loss.detach()):.4f}, and should be {right:.4f}."
        assert abs(float(loss.detach()) - right) < 1e-6, told
        assert loss.requires_grad, f"{case}: the term is right, but has no gradient: nothing would push the router."
        (gradient,) = torch.autograd.grad(loss, p)
        told = f"{case}: the term is right, but its gradient is not E f / T for each token: what is it taken of?"
        assert float((gradient - experts * f / tokens).abs().max()) < 1e-6, told
    print("1 for an even load, 4 if one of 4 experts has all; the busier an expert, the harder it is pushed down")

# %% [markdown] lang="en"
# ## 03f.4 · Mend: a drop that looks into the future
#
# Someone keeps the choices of the greatest weight: all choices of a batch line up at an expert, the heaviest first, and
# it has room for its part of the whole batch. That seems wise, since what is dropped weighs little. But in training the
# later tokens of a row take part in it, and a model that writes text does not have them yet: it computes with other
# drops than it was trained with. And what a token gets depends on who else is in the batch.
#
# A token's fate must depend on earlier tokens of its own row only (and on itself). First say what it depends on here
# besides: `"later"` (later tokens of its row), `"rows"` (tokens of other rows), or both. Then mend it: room is
# $\lceil \text{capacity} \cdot \text{top} \cdot T / E \rceil$ choices of *each row*, in the order of the tokens.

# %% [markdown] lang="en" hint="03f.4"
# Put a token with a heavy choice at the end of the row. Who loses a place? And put it into another row: who loses one
# now?

# %% [markdown] lang="en" hint="03f.4"
# No sorting is needed then. `choices.flatten(1)` is (rows, T · top), each row in the order of the queue, and
# `.cumsum(1)` counts along it.

# %% [markdown] lang="en" hint="03f.4"
# `F.one_hot(flat, experts).cumsum(1)` is (rows, T · top, experts). `.gather(2, flat[..., None])` takes the count of
# each choice's own expert. And the room is of one row: `choices[0].numel()`.


# %% task="03f.4" title="Mend: a drop that looks into the future" engine="kept_choices"
def depends_on() -> list[str]:
    """On which of "later", "rows" the fate of a choice depends in the function below, before it is mended."""
    ### BEGIN SOLUTION
    return ["later", "rows"]
    ### END SOLUTION


def kept_choices(choices: Tensor, weights: Tensor, experts: int, capacity: float) -> Tensor:
    """Which choices are kept: bool. choices: (rows, T, top), numbers of experts. weights: the same shape."""
    ### BEGIN SOLUTION
    room = ceil(capacity * choices[0].numel() / experts)
    flat = choices.flatten(1)
    so_far = F.one_hot(flat, experts).cumsum(1)
    return (so_far.gather(2, flat[..., None]) <= room).view_as(choices)
    ### INSTEAD
    # room = ceil(capacity * choices.numel() / experts)
    # heaviest_first = weights.flatten().argsort(descending=True)
    # flat = choices.flatten()[heaviest_first]
    # so_far = F.one_hot(flat, experts).cumsum(0)
    # kept = torch.zeros_like(flat, dtype=torch.bool)
    # kept[heaviest_first] = so_far.gather(1, flat[:, None])[:, 0] <= room
    # return kept.view_as(choices)
    ### END SOLUTION


# %% check="03f.4" seconds=20
# Check of 03f.4: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    yours = sorted(returned(depends_on(), "depends_on"))
    assert {*yours} <= {"later", "rows"}, f'depends_on gives {yours}: of "later" and "rows" name those that apply.'
    assert yours == ["later", "rows"], f"depends_on gives {yours}: try a heavy choice at the end, and in another row."
    for n, tokens, experts, top, capacity in ((3, 16, 4, 2, 0.7), (2, 10, 8, 1, 1), (4, 7, 3, 2, 0.5)):
        case = f"{n} rows of {tokens} tokens, {experts} experts, top {top}, capacity {capacity}"
        drawn = [probabilities_of(tokens, experts, seed=row).topk(top) for row in range(n + 1)]
        weights, choices = (torch.stack([row[i] for row in drawn[:n]]) for i in (0, 1))

        def fates(choices, weights, experts=experts, capacity=capacity):
            return returned(kept_choices(choices.clone(), weights.clone(), experts, capacity), "kept_choices")

        kept = fates(choices, weights)
        shapes = f"{tuple(kept.shape)}, and should be {tuple(choices.shape)}"
        assert kept.shape == choices.shape, f"{case}: the shape is {shapes}."
        for seed, row in ((20, 0), (21, 1)):
            other = [probabilities_of(tokens, experts, seed).flip(1).topk(top)[i] for i in (0, 1)]
            w, c = weights.clone(), choices.clone()
            w[row], c[row] = other
            told = f"{case}: with another text in row {row}, choices of row {1 - row} have another fate."
            assert torch.equal(fates(c, w)[1 - row], kept[1 - row]), told
            half, (w, c) = tokens // 2, (weights.clone(), choices.clone())
            w[:, half:], c[:, half:] = other[0][half:], other[1][half:]
            told = f"{case}: with other tokens from position {half} on, choices before it have another fate."
            assert torch.equal(fates(c, w)[:, :half], kept[:, :half]), told
        alone = f"{case}: the first row has another fate if it is the only one in the batch."
        assert torch.equal(fates(choices[:1], weights[:1]), kept[:1]), alone
        room = ceil(capacity * top * tokens / experts)
        right = torch.stack([kept_in_order(row, room) for row in choices])
        few = f"{case}: no leak is left, but {int(kept.sum())} choices are kept, and it should be {int(right.sum())}"
        assert int(kept.sum()) == int(right.sum()), f"{few}: each expert has room for {room} of a row."
        assert torch.equal(kept, right), (
            f"{case}: as many are kept as should be, but others: in the order of the tokens."
        )
    print("fates depend on no later token and on no other row")

# %% [markdown] lang="en"
# ## All together
#
# Your queue and your two exchanges on four ranks. Each has a row of 16 tokens and two of eight experts: it lays the
# choices that are kept into slots, sends them to their experts, and takes the results home. It runs once tasks 1 and 2
# are done, and says whether each rank has what all experts in one place would give.


# %% tags=["raises-exception"]
def your_mixture(axis):
    probabilities, x = probabilities_of(16, 8, seed=axis.index), numbers(16, 5, seed=axis.index)
    choices, kept = route(probabilities, 2, 5)
    slots = torch.zeros(8, 5, 5, dtype=torch.float64)
    for e in range(8):
        token = ((choices == e) & kept).any(1).nonzero().flatten()
        slots[e, : len(token)] = x[token]
    mine = numbers(8, 5, 5, seed=100).chunk(axis.size)[axis.index]
    out = through_experts(slots, axis, lambda came: torch.bmm(F.gelu(came), mine))
    return float((out - through_all(slots)).abs().max())


print("as in one place, on each rank:", [off < 1e-12 for off in along(world, "ep", your_mixture)])
