# %% [markdown] lang="en"
# # Exercises of 03e: long context
#
# Four small functions, an hour or so. With them four ranks share one row: each has a quarter of its tokens, keys and
# values go around a ring, and what comes out is whole causal attention, to twelve digits.
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
#     python -m minipar grade exercises/03e_long_context.ipynb
#
#     # hints for task 2, one at a time; its solution, once it passes
#     python -m minipar hint 03e.2
#     python -m minipar solution 03e.2
#
# `grade` reads only the cells with a function to finish. Cells that you add are for trying things out. The folded cells
# belong to the checks, so an answer may not use their variables and functions: take what your function is given, and
# what is imported here.

# %% tags=["setup"]
import gc
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minipar import Axis, World, ledger
from minipar.collectives import irecv, isend
from minipar.context import zigzag
from minipar.course.checks import names_in, returned, verdict
from minipar.course.given import along

world = World(4)

# %% [markdown] lang="en"
# The next cells are folded, too: attention to a block of keys, and what the checks run on each rank. Run them all; read
# them when you want to know. `axis` is the line of ranks that share a row: `axis.size` is their number and `axis.index`
# this rank's place, 0 to `axis.size - 1`.


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given: attention to some keys, and the truth
def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> tuple[Tensor, Tensor]:
    """Attention to these keys alone, (..., T, d), and each query's logarithm of the sum of exponentials, (..., T, 1).

    causal: these are the keys of the queries' own tokens, and a token does not see later ones.
    """
    scores = q @ k.mT / q.size(-1) ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    return (scores - lse).exp() @ v, lse


def add_keys(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """What task 1 asks for."""
    total = torch.logaddexp(lse, more_lse)
    return out * (lse - total).exp() + more * (more_lse - total).exp(), total


def queries_keys_values(length: int) -> list[Tensor]:
    """Random ones, the same for whoever asks: (1, 2, length, 8) each. Queries are large, so that weights differ."""
    x = torch.randn((3, 1, 2, length, 8), generator=torch.Generator().manual_seed(length), dtype=torch.float64)
    return list(x * torch.tensor([4, 1, 1]).view(3, 1, 1, 1, 1))


def off(got: Tensor, wanted: Tensor) -> float:
    """The largest difference, as a share of the largest number."""
    return float((got - wanted).abs().max() / wanted.abs().max())


def whole_attention(length: int) -> Tensor:
    """Causal, on one process."""
    return F.scaled_dot_product_attention(*queries_keys_values(length), is_causal=True)


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for task 2: a ring on which each rank notes what it holds
def on_ring(axis: Axis, function: Callable, length: int) -> dict:
    """What a function returns for this rank's share of a row, what it sends, and which blocks it attends to."""
    q, k, v = (x.chunk(axis.size, 2)[axis.index].contiguous() for x in queries_keys_values(length))
    own, held, seen = {x.data_ptr() for x in (q, k, v)}, [], []

    def watched(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> tuple[Tensor, Tensor]:
        tensors = [x.untyped_storage() for x in gc.get_objects() if type(x) is Tensor]
        held.append(sum({x.data_ptr(): x.nbytes() for x in tensors if x.data_ptr() not in own}.values()))
        seen.append(k.size(-2))
        return attend(q, k, v, causal)

    gc.freeze()  # what is there already is not counted
    try:
        with ledger() as book:
            out = returned(function(q, k, v, axis, watched, add_keys), "ring_forward")
    finally:
        gc.unfreeze()
    return {"out": out, "bytes": book.bytes("cp"), "calls": book.calls("cp"), "held": max(held, default=0)} | {
        "seen": seen, "M": k.nbytes + v.nbytes,
    }  # fmt: skip


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for task 4
def tables() -> tuple[Tensor, Tensor, Tensor]:
    """Two rows of 64 tokens, a vector for each of 50 words, and one for each of 64 positions."""
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(50, (2, 64), generator=draw)
    words, places = (torch.randn(n, 6, generator=draw, dtype=torch.float64) for n in (50, 64))
    return tokens, words, places


def embedded(axis: Axis, function: Callable, length: int) -> tuple[Tensor, Tensor, int]:
    """What a function makes of rows of this length on a rank, what is right, and bytes sent."""
    tokens, words, places = tables()
    with ledger() as book:
        x = returned(function(tokens[:, :length], words, places, axis), "embed_share")
    return x, zigzag(words[tokens[:, :length]] + places[:length], axis, dim=1), book.bytes("cp")


# %% [markdown] lang="en"
# ## 03e.1 · Write: two parts of a softmax
#
# A rank has attended to some keys and then to some more. Of each part it has the output $o$ and, for each query, the
# logarithm $\ell$ of the sum of the exponentials of its scores. Make one output and one logarithm of them, as if all
# keys had been there at once:
#
# $$\ell = \ln\left(e^{\ell_A} + e^{\ell_B}\right) \qquad o = e^{\ell_A - \ell}\, o_A + e^{\ell_B - \ell}\, o_B$$
#
# It must hold for scores of 1,000 and of −1,000, whose exponentials no float64 can hold. And it must be able to begin
# with nothing: no key seen, output 0 and logarithm $-\infty$.

# %% [markdown] lang="en" hint="03e.1"
# Never compute $e^{\ell}$ itself. Only differences go into `exp`.

# %% [markdown] lang="en" hint="03e.1"
# `torch.logaddexp(a, b)` is $\ln(e^a + e^b)$, for a and b of any size.


# %% task="03e.1" title="Write: two parts of a softmax" engine="merge_parts"
def merge_parts(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Output and logarithm for all keys, from those of some keys and of some more.

    out, more: (rows, heads, T, d). lse, more_lse: (rows, heads, T, 1), logarithms of the sums of exponentials.
    """
    ### BEGIN SOLUTION
    total = torch.logaddexp(lse, more_lse)
    return out * (lse - total).exp() + more * (more_lse - total).exp(), total
    ### END SOLUTION


# %% check="03e.1" seconds=20
# Check of 03e.1: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    q, k, v = queries_keys_values(12)
    nothing = torch.zeros_like(q), torch.full_like(q[..., :1], -torch.inf)
    for shift, sizes in [(0, [6, 6]), (0, [1, 11]), (0, [5, 4, 3]), (1000, [9, 3]), (-1000, [2, 10]), (0, [0, 7, 5])]:
        case = f"parts of {', '.join(map(str, sizes))} keys" + (f", scores {shift:+,}" if shift else "")
        parts = [
            attend(q, a, b) if a.size(2) else nothing for a, b in zip(k.split(sizes, 2), v.split(sizes, 2), strict=True)
        ]
        parts = [(out, lse + shift) for out, lse in parts]  # what a shift of all scores does
        out, lse = parts[0]
        for more in parts[1:]:
            both = returned(merge_parts(out, lse, *more), "merge_parts")
            assert isinstance(both, tuple | list) and len(both) == 2, (
                "merge_parts returns two things: output, logarithm."
            )
            out, lse = both
        wanted, wanted_lse = attend(q, k, v)
        for what, got, right in (("output", out, wanted), ("logarithm", lse, wanted_lse + shift)):
            shapes = f"{tuple(got.shape)}, and should be {tuple(right.shape)}"
            assert got.shape == right.shape, f"{case}: the {what} has the shape {shapes}."
            why = "does e**1000 occur in it, or a division by 0?"
            assert got.isfinite().all(), f"{case}: the {what} is not a finite number: {why}"
        by = out / wanted
        factor = f"{case}: the output is {float(by.mean()):.3g} times what it should be: do the weights sum to 1?"
        assert off(out, wanted) < 1e-12 or float(by.std()) > 1e-9, factor
        told = f"{case}: the output is off by {off(out, wanted):.0e}: is each part weighted by its own sum?"
        assert off(out, wanted) < 1e-12, told
        told = f"{case}: the output is right, but the logarithm is off by {off(lse, wanted_lse + shift):.0e}."
        assert off(lse, wanted_lse + shift) < 1e-12, told
    print("parts of any size, scores of 1,000 and -1,000, and nothing to begin with")

# %% [markdown] lang="en"
# ## 03e.2 · Write: keys go around a ring
#
# Each of $n$ ranks has the queries, keys and values of its share of a row: rank 0 the first tokens, the last rank the
# last ones. A token sees itself and all earlier tokens. Queries stay; blocks of keys and values go around to the right,
# so that rank $r$ has the block of rank $r - s$ (modulo $n$) after $s$ steps.
#
# You are given two functions: `attend(q, k, v)` returns output and logarithm for these keys; with `causal=True` it
# hides later tokens, which is what a rank's own block needs. `merge(out, lse, more, more_lse)` is task 1. From the
# imports: `isend(x, axis, to=i)` and `irecv(like, axis, source=i)` begin a transfer. `.wait()` ends it, and that of
# `irecv` gives what came.
#
# **Target.** Let $M$ be the bytes of one share of $k$ and $v$. A rank sends at most $(n-1)\,M$ in $n-1$ messages; it
# never holds more than $3M$ beside its own $q$, $k$, $v$, whatever $n$; and it attends only to blocks of which it
# sees something. (A rank that gathers all keys holds $4M$ on four ranks, and needs no ring.)

# %% [markdown] lang="en" hint="03e.2"
# First the own block, with `causal=True`. Then $n-1$ times: pass on the block that you have, take the next, attend to
# it if it is of earlier tokens, merge. `torch.stack([k, v])` makes one tensor of two, and `*block` two of one.

# %% [markdown] lang="en" hint="03e.2"
# Ranks that all wait for a block before they send one wait forever. Begin both transfers, then wait for both.

# %% [markdown] lang="en" hint="03e.2"
# In step $s$ the block is that of rank `axis.index - s`. If that is negative, it has gone around the end: its tokens
# are later ones, and nothing of it is visible. It must be passed on all the same.


# %% task="03e.2" title="Write: keys go around a ring" engine="ring_forward"
def ring_forward(q: Tensor, k: Tensor, v: Tensor, axis: Axis, attend: Callable, merge: Callable) -> Tensor:
    """Causal attention of this rank's queries to all keys of the row. Returns the output, (rows, heads, T/n, d).

    q, k, v: (rows, heads, T/n, d), this rank's share of the tokens, in the order of the text.
    """
    ### BEGIN SOLUTION
    right, left = (axis.index + 1) % axis.size, (axis.index - 1) % axis.size
    block = torch.stack([k, v])
    out, lse = attend(q, k, v, causal=True)
    for step in range(1, axis.size):
        going, coming = isend(block, axis, to=right), irecv(block, axis, source=left)
        block = coming.wait()
        going.wait()
        if step <= axis.index:  # the block of an earlier rank
            out, lse = merge(out, lse, *attend(q, *block))
    return out
    ### END SOLUTION


# %% check="03e.2" seconds=30
# Check of 03e.2: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    ready = names_in(ring_forward) & {"ring_attention", "_RingAttention", "all_to_all_attention", "unzigzag"}
    assert not ready, f"ring_forward uses minipar's {', '.join(ready)}: here write it with isend and irecv."
    for n, length in ((2, 12), (4, 24), (4, 64)):
        whole, share = whole_attention(length), length // n
        answers = along(world, "cp", on_ring, ring_forward, length, size=n)[:: 4 // n]
        for rank, answer in enumerate(answers):
            out, what = answer["out"], f"{n} ranks, rank {rank}"
            assert isinstance(out, Tensor), f"{what}: ring_forward returns the output alone, a tensor."
            wanted = whole[:, :, rank * share : (rank + 1) * share]
            shapes = f"{tuple(out.shape)}, and should be {tuple(wanted.shape)}"
            assert out.shape == wanted.shape, f"{what}: the output has the shape {shapes}."
            blocks = len(answer["seen"])
            told = f"{what}: the output is not that of whole attention, off by {off(out, wanted):.0e}"
            told += f". It attends to {blocks} blocks, and sees something of {rank + 1}."
            assert off(out, wanted) < 1e-12, told
            M, right = answer["M"], f"{what}: the output is right, but"
            sent, calls, most = answer["bytes"], answer["calls"], (n - 1) * answer["M"]
            assert sent <= most, f"{right} it sends {sent / M:g} M, and (n - 1) M = {most / M:g} M is enough."
            assert calls <= n - 1, f"{right} it sends {calls} messages: {n - 1} are enough, with k and v in one."
            seen = f"{right} it attends {blocks} times, and sees something of {rank + 1} blocks."
            assert blocks == rank + 1 and set(answer["seen"]) == {share}, seen
            held = answer["held"] / M
            assert held <= 3, (
                f"{right} it holds {held:.1f} M beside its own share: let go of a block once it is passed on."
            )
    print(f"4 ranks: {calls} messages, {sent // M} M sent, and never more than 3 M held on any of them")

# %% [markdown] lang="en"
# ## 03e.3 · Write: the same work for everyone
#
# In task 2 the last rank computes most, and the others wait for it. Deal out the positions of a row in another way: cut
# it into $2n$ chunks of the same length, from early to late, and give each rank two of them, so that all ranks have
# the same number of pairs (a query and a key that it sees). That is *zigzag* order. Rank 0 gets the first chunk, rank 1
# the second, ...; which is the other one?
#
# **Target.** Of the $T(T+1)/2$ pairs of a row exactly $1/n$ on each rank. For 64 positions on 4 ranks that is 520. In
# contiguous shares the last rank has 904, 1.74 times as many.

# %% [markdown] lang="en" hint="03e.3"
# A late chunk has more pairs than an early one, always by the same number. The earliest goes with the latest.

# %% [markdown] lang="en" hint="03e.3"
# Rank $r$ has the chunks $r$ and $2n - 1 - r$. Chunk $c$ has the positions from $cL$ up to $(c+1)L - 1$, with
# $L = T / 2n$.


# %% task="03e.3" title="Write: the same work for everyone" engine="zigzag_positions"
def zigzag_positions(length: int, ranks: int) -> list[list[int]]:
    """The positions, 0 to length - 1, of each rank, ascending. length is a multiple of 2 * ranks."""
    ### BEGIN SOLUTION
    size = length // (2 * ranks)
    chunks = [list(range(c * size, (c + 1) * size)) for c in range(2 * ranks)]
    return [chunks[rank] + chunks[2 * ranks - 1 - rank] for rank in range(ranks)]
    ### END SOLUTION


# %% check="03e.3" seconds=20
# Check of 03e.3: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    ready = names_in(zigzag_positions) & {"zigzag", "zigzag_order", "_in_zigzag", "causal_pairs"}
    assert not ready, f"zigzag_positions uses minipar's {', '.join(ready)}: here deal the positions out yourself."
    for length, n in ((16, 2), (8, 4), (64, 4), (60, 3), (64, 8), (6, 1)):
        case = f"{length} positions on {n} ranks"
        yours = [list(positions) for positions in returned(zigzag_positions(length, n), "zigzag_positions")]
        assert len(yours) == n, f"{case}: there are lists for {len(yours)} ranks."
        every = sorted(p for positions in yours for p in positions)
        missing = sorted({*range(length)} - {*every})
        assert not missing, f"{case}: position {missing[0]} is on no rank."
        assert every == [*range(length)], f"{case}: a position is on two ranks, or beyond the end."
        for rank, positions in enumerate(yours):
            told = f"{case}: rank {rank} has {len(positions)} positions, and each should have {length // n}."
            assert len(positions) == length // n, told
            told = f"{case}: the positions of rank {rank} do not ascend: {positions}"
            assert positions == sorted(positions), told
        pairs = [sum(p + 1 for p in positions) for positions in yours]
        told = f"{case}: the ranks have {', '.join(map(str, pairs))} pairs, and should have {sum(pairs) // n} each."
        assert len(set(pairs)) == 1, told
        size = length // (2 * n)
        right = [
            [*range(r * size, (r + 1) * size), *range(length - (r + 1) * size, length - r * size)] for r in range(n)
        ]
        wrong = next((rank for rank in range(n) if yours[rank] != right[rank]), None)
        told = f"{case}: the work is even, but rank {wrong} should have chunk {wrong} and another one, both whole."
        assert wrong is None, told
    share = sum(range(49, 65)) / 520
    print(f"64 positions on 4 ranks: 520 pairs each; contiguous, the last rank has {share:.2f} times as many")

# %% [markdown] lang="en"
# ## 03e.4 · Mend: tokens in the wrong place
#
# Each rank makes vectors for its zigzag share of the tokens: the word's vector plus that of the position. Nothing
# crashes here, shapes are right, the loss falls, and it starts within a hundredth of what it should be. Only the
# gradients are off. `zigzag(x, axis, dim)` is this rank's share of `x` along `dim`: its chunk $r$ and its chunk
# $2n-1-r$, one behind the other.
#
# First say how bad it is: a row of 64 tokens on 4 ranks. How many of the 64 get the vector of their own position from
# the function as it stands? Then mend it. (**Target:** no bytes sent. Every rank has all tokens.)

# %% [markdown] lang="en" hint="03e.4"
# Each rank has 16 tokens and gives them the positions 0 to 15. Chunks have 8 positions. Rank 1 has the chunks 1 and 6,
# the positions 8 to 15 and 48 to 55. Which of them are right? And on rank 0?

# %% [markdown] lang="en" hint="03e.4"
# Positions must be cut as tokens are. Add the vectors of the positions first, then cut; or cut both. Rows may be
# shorter than the table of positions.


# %% task="03e.4" title="Mend: tokens in the wrong place" engine="embed_share"
def right_by_chance() -> int:
    """Of 64 tokens on 4 ranks, how many get their own position from the function below, before it is mended."""
    ### BEGIN SOLUTION
    return 8
    ### END SOLUTION


def embed_share(tokens: Tensor, words: Tensor, places: Tensor, axis: Axis) -> Tensor:
    """Vectors of this rank's zigzag share of the tokens, (rows, T/n, width).

    tokens: (rows, T), the same on every rank. words: (vocabulary, width). places: (T or more, width), by position.
    """
    ### BEGIN SOLUTION
    return zigzag(words[tokens] + places[: tokens.size(1)], axis, dim=1)
    ### INSTEAD
    # mine = zigzag(tokens, axis, dim=1)
    # return words[mine] + places[: mine.size(1)]
    ### END SOLUTION


# %% check="03e.4" seconds=20
# Check of 03e.4: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    yours = returned(right_by_chance(), "right_by_chance")
    told = f"right_by_chance gives {yours}: rank 0 has the positions 0 to 7 and 56 to 63, and gives them 0 to 15."
    assert yours == 8, told
    for n, length in ((4, 64), (4, 40), (2, 16)):
        for rank, (x, right, sent) in enumerate(along(world, "cp", embedded, embed_share, length, size=n)[:: 4 // n]):
            case = f"rows of {length} on {n} ranks: rank {rank}"
            shapes = f"{tuple(x.shape)}, and should be {tuple(right.shape)}"
            assert x.shape == right.shape, f"{case} returns the shape {shapes}."
            wrong = ((x - right).abs().amax((0, 2)) > 1e-12).sum()
            told = f"{case} has wrong vectors for {wrong} of its {length // n} tokens: which positions are they at?"
            assert not wrong, told
            assert not sent, f"{case} sends {sent} bytes, and has all that it needs."
    print("each token at its own place on 4 ranks and on 2, and nothing sent")

# %% [markdown] lang="en"
# ## All together
#
# Your ring with your merge, on four ranks, against one process. It runs once tasks 1 and 2 are done, and says how far
# the whole row is from what one process computes.


# %% tags=["raises-exception"]
def your_ring(axis, length):
    mine = [x.chunk(axis.size, 2)[axis.index].contiguous() for x in queries_keys_values(length)]
    return ring_forward(*mine, axis, attend, merge_parts)


row = torch.cat(along(world, "cp", your_ring, 256, size=4), 2)
print("256 tokens on four ranks, as on one process:", off(row, whole_attention(256)) < 1e-12)
