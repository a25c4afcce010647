# %% [markdown] lang="en"
# # Ranks and collectives
#
# Training on many devices comes down to two questions: who holds which numbers, and who sends which numbers to whom.
# This chapter is about the second one. At its end you can
#
# - run a function on four processes of your laptop, and move tensors between them;
# - say why a program with one `send` and one `recv` per process can wait forever, and mend it;
# - write the [collectives](../docs/glossary.md#collective) that all large-scale training is made of:
#   [broadcast](../docs/glossary.md#broadcast), [all-gather](../docs/glossary.md#all-gather),
#   [reduce-scatter](../docs/glossary.md#reduce-scatter), [all-reduce](../docs/glossary.md#all-reduce);
# - count the bytes that each process sends, and check the count against your computer's own network counter;
# - lay [ranks](../docs/glossary.md#rank) out on a [mesh](../docs/glossary.md#mesh), and say which of them talk to each
#   other.
#
# **Time:** about two hours. **You need:** Python and a little PyTorch. No GPU, no network.
# The chapter mirrors sections 2.2 and 2.3 of the article that this course follows and tests,
# 《大规模语言模型从理论到实践 混合并行》 ("LLMs from theory to practice: hybrid parallelism", in Chinese).
# "The document" below is that article; you need not know it.
#
# **How to read it.** Before most runs you are asked for a prediction. Write it into the cell (`prediction = ...`)
# before you go on. A wrong prediction that you wrote down teaches more than a right answer that you read. The outputs
# of an earlier run stand below the cells; *Edit → Clear Outputs of All Cells* hides them. Four times you are asked to
# write a function yourself. One answer follows in a cell that is folded: run it as any other, and click on its three
# dots to read it.
#
# ## Three questions to warm up
#
# 1. A model has 7 billion parameters and is trained with Adam in mixed precision. How many bytes do its weights,
#    gradients and [optimizer states](../docs/glossary.md#optimizer-state) take?
# 2. Eight processes train on a laptop with two cores. Which of these can you trust to carry over to a cluster: the
#    seconds, the bytes sent, the order of events, the memory of each process?
# 3. One block of a GPT of width $h$ has about $12h^2$ weights. How many are that for $h = 256$?
#
# <details><summary>Answers</summary>
#
# 1. 16 bytes a parameter (2 for the weight, 2 for its gradient, 12 for what Adam keeps): 112 GB. No single GPU
#    of today's common sizes (24 to 80 GB) holds that. This is the first reason to use many devices.
# 2. Bytes, order and memory carry over. Seconds do not: eight processes share two cores.
# 3. 786,432.
#
# </details>

# %%
import os
import time

import psutil
import torch
import torch.distributed as dist

from minipar import Mesh, RankError, World, connect, ledger, rings, viz, widgets
from minipar.collectives import all_gather, all_reduce, broadcast, irecv, isend, recv, reduce_scatter, send
from minipar.rings import ring_all_gather, ring_all_reduce, ring_reduce_scatter, tree_broadcast

assert 7_000_000_000 * 16 == 112e9 and 12 * 256**2 == 786_432  # the answers above
world = World(4)

# %% [markdown] lang="en"
# ## 1. Four processes that share nothing
#
# `World(4)` has started four processes. In this field each of them is called a **rank**, and its number, 0 to 3, is
# called its rank, too. `world.run(fn)` sends a function to all of them, each calls it, and you get four answers, in
# rank order. On a cluster, each rank would own one GPU. Here they share your processor. The program is the same.
#
# `torch.distributed`, imported as `dist`, is PyTorch's part for talking between ranks. Two of its functions tell a
# rank where it is: `get_rank()` and `get_world_size()`.


# %%
def where_am_i():
    return dist.get_rank(), dist.get_world_size(), os.getpid()


answers = world.run(where_am_i)
for rank, size, _ in answers:
    print(f"I am rank {rank} of {size}")
print("processes, this notebook's included:", len({os.getpid(), *(process for _, _, process in answers)}))

# %% [markdown] lang="en"
# **Question.** A list lives in this notebook. Every rank appends one element to it. What is in the list afterwards,
# here and on the ranks?
#
# **Your prediction:** its length on each rank, and here.

# %%
prediction = None  # for instance ([1, 1, 1, 1], 4)

shared = []


def append_my_rank():
    shared.append(dist.get_rank())
    return len(shared)


print("you wrote:            ", prediction)
print("lengths on the ranks: ", world.run(append_my_rank))
print("length here:          ", len(shared))
assert shared == []

# %% [markdown] lang="en"
# Each rank got a *copy* of the function and of the list it uses. Ranks have no common memory. On a cluster they do
# not even have a common computer. **Whatever one rank is to know of another has to be sent.** All of parallel
# training follows from this sentence.
#
# Section 2.2 of the document defines parallelism as cutting a computation into subtasks that run at the same time on
# several nodes. That is right, and it leaves out the half that makes it hard: the subtasks need each other's results.
# In this course you will cut very little that does not have to be sewn together again. Section 2.3 gives computing
# time as the reason for all this. The first question above gave the other one, memory: a model that does not fit on
# one device cannot be trained there at any speed.
#
# ## 2. Send and receive
#
# Two functions are enough to build everything else:
#
# - `dist.send(x, to)`: send tensor `x` to rank `to`, and return when it has been taken over.
# - `dist.recv(x, source)`: wait for a tensor from rank `source`, and write it into `x`. The receiver must know shape
#   and type beforehand: only the numbers travel.
#
# **Question.** A tensor with one number goes from rank 0 to 1, to 2, to 3, and back to 0. Each rank adds its own
# number plus one. What does rank 0 hold at the end?

# %%
prediction = None


def relay():
    me, n = dist.get_rank(), dist.get_world_size()
    token = torch.zeros(1)
    if me > 0:
        dist.recv(token, me - 1)
    token += me + 1
    dist.send(token, (me + 1) % n)
    if me == 0:
        dist.recv(token, n - 1)
    return token.item()


held = world.run(relay)
print("you wrote:", prediction, "- held by ranks 0 to 3:", held)
assert held[0] == sum(rank + 1 for rank in range(4))  # one process, no messages

# %% [markdown] lang="en"
# 1 + 2 + 3 + 4 = 10. Look at the order: rank 1 could not begin before rank 0 was done, and so on. Four ranks worked,
# but never two at once. This was parallel in name only. Such idle time
# has a name where models are cut into pipelines: the *bubble*.
#
# How much traveled? A tensor has `x.numel()` numbers of `x.element_size()` bytes: here 1 × 4 bytes, sent 4 times.
#
# ## 3. A deadlock, explained
#
# The relay starts with rank 0. Why not let everyone pass its number on at once? Each rank sends to its right, then
# receives from its left. Every send has its receive. What could go wrong?

# %%
prediction = None  # "works", "waits forever", or "an error"


def everyone_sends_first():
    me, n = dist.get_rank(), dist.get_world_size()
    mine, from_left = torch.tensor([float(me)]), torch.empty(1)
    dist.send(mine, (me + 1) % n)
    dist.recv(from_left, (me - 1) % n)
    return from_left.item()


print("you wrote:", prediction)
try:
    world.run(everyone_sends_first)
except RankError as report:
    print(report)

# %% [markdown] lang="en"
# `send` returns when the other side has taken the tensor over. The other side takes it over in its `recv`. But it has
# not come to its `recv`: it is in its own `send`, and waits for the next one. Draw an arrow from each rank to the one
# that it waits for:

# %%
viz.show(viz.draw_waits({rank: (rank + 1) % 4 for rank in range(4)}))

# %% [markdown] lang="en"
# The arrows close a circle. Nobody in a circle can move, so nobody ever will: this is a
# **[deadlock](../docs/glossary.md#deadlock)**. Nothing crashed, and no message appears. On a cluster the job would wait
# until a time limit ends it: PyTorch's default is 30 minutes with gloo, its CPU [backend](../docs/glossary.md#backend),
# and 10 with nccl, its GPU backend. The report above comes from minipar's `World`: when no rank has moved for five
# seconds, it asks each one where it stands and names the circle.
#
# Some libraries copy small tensors into a buffer and return from `send` at once. The same mistake then works in a
# small test and hangs with real sizes. Here it hangs with 4 bytes, which is kinder.
#
# **Mend it, first way.** Break the circle at one place: rank 0 receives first.


# %%
def rank_0_receives_first():
    me, n = dist.get_rank(), dist.get_world_size()
    mine, from_left = torch.tensor([float(me)]), torch.empty(1)
    if me == 0:
        dist.recv(from_left, n - 1)
        dist.send(mine, 1)
    else:
        dist.send(mine, (me + 1) % n)
        dist.recv(from_left, me - 1)
    return from_left.item()


print(world.run(rank_0_receives_first))

# %% [markdown] lang="en"
# It works, one after the other: rank 3's send ends first, then 2's, then 1's, then 0's.
#
# **Mend it, second way.** `isend` and `irecv` (i for *immediate*) only start a transfer. They return at once, with an
# object whose `wait()` returns when it is done. Now all four transfers are under way at the same time.


# %%
def everyone_starts_then_waits():
    me, n = dist.get_rank(), dist.get_world_size()
    mine, from_left = torch.tensor([float(me)]), torch.empty(1)
    sending = dist.isend(mine, (me + 1) % n)
    receiving = dist.irecv(from_left, (me - 1) % n)
    receiving.wait()
    sending.wait()
    return from_left.item()


got = world.run(everyone_starts_then_waits)
print(got)
assert got == world.run(rank_0_receives_first) == [(rank - 1) % 4 for rank in range(4)]

# %% [markdown] lang="en"
# This exchange is the heartbeat of what follows. One rule comes with it: until `wait()` has returned, do not touch
# the tensor. Before that, `from_left` may still hold anything.
#
# ### A mistake that most ranks do not notice
#
# The second mistake that everybody makes: ranks that disagree about sizes. Say the last rank has one row more than
# the others. What gloo makes of it depends on the sizes. With 2, 2, 2 and 3 numbers we saw three ranks return, with
# whatever they had added, while the fourth waited forever; with other sizes a process was aborted. Neither tells you
# what went wrong. So a `World` compares what the ranks are about to do, before they do it.


# %%
def sum_of_rows():
    last = dist.get_rank() == dist.get_world_size() - 1
    time.sleep(0.3 * last)  # more rows take longer to load
    x = torch.ones(3 if last else 2)
    dist.all_reduce(x)
    return x


try:
    world.run(sum_of_rows)
except RankError as report:
    print(report)

# %% [markdown] lang="en"
# The report shows the line, the ranks and both shapes. After a failure the `World` replaces its ranks where it has to:
# it can be used again at once, and you need not restart anything.
#
# Pieces of unequal length are not exotic: it is what you get when 9 rows are cut for 4 ranks.
# Chapter 3a has more to say about them.
#
# ## 4. Broadcast: one has it, all need it
#
# A **collective** is an operation that all ranks of a group call together. The first is **broadcast**: one rank, the
# *root*, has a tensor, and afterwards all have it. Training often begins with one: every rank must start from the
# same weights.
#
# From here on we use minipar's own functions. They call `dist` underneath:
#
# - `send(x, axis, to=1)`: send tensor `x` to the rank with index 1.
# - `recv(like, axis, source=0)`: wait for a tensor from index 0, and return it. The argument `like` is only a model
#   for its shape and dtype. None of its numbers is read, and none is changed.
#
# They talk along an **[axis](../docs/glossary.md#axis)**, which is a line of ranks: `axis.size` is how many stand on
# it, and `axis.index` is this rank's place. For now there is one axis, with all four ranks on it. And they keep a
# **[ledger](../docs/glossary.md#ledger)**: who sent how many bytes. The next cell makes a function that runs an
# operation on every rank with the ledger open.


# %%
def numbers(rank, count):
    """The same `count` random numbers for a rank, whoever asks: float32, 4 bytes each."""
    return torch.randn(count, generator=torch.Generator().manual_seed(rank))


def on_this_rank(operation, count):
    axis = connect(Mesh(dp=dist.get_world_size()))["dp"]  # all ranks in one line; section 9 explains meshes
    x = numbers(axis.index, count)
    with ledger() as book:
        y = operation(x, axis)
    return y, book.bytes()


def counted(operation, count, where=world):
    """Run operation(x, axis) on all ranks; gives their results, and the bytes that each of them sent."""
    return tuple(zip(*where.run(on_this_rank, operation, count), strict=True))


# %% [markdown] lang="en"
# **Your turn.** Write broadcast with `send` and `recv`: on every rank, return the `x` of rank 0. If your ranks wait for
# each other, you get the report of section 3 after five seconds, and can go on at once.
#
# **Question.** For a tensor of $M$ bytes and four ranks: how many times $M$ does rank 0 send?

# %%
prediction = None  # bytes that ranks 0 to 3 send, in units of M


def my_broadcast(x, axis):
    return x  # your lines in place of this one


results, sent = counted(my_broadcast, 1_000)
right = [rank for rank in range(4) if torch.equal(results[rank], numbers(0, 1_000))]
print("right on ranks:", right)

# %% [markdown] lang="en"
# The attempt that comes to mind first is folded below: the root sends to each in turn.


# %% jupyter={"source_hidden": true}
# One answer: the root sends to each in turn
def broadcast_by_hand(x, axis):
    if axis.index > 0:
        return recv(x, axis, source=0)
    for other in range(1, axis.size):
        send(x, axis, to=other)
    return x


M = 4 * 1_000_000
results, direct = counted(broadcast_by_hand, 1_000_000)
assert all(torch.equal(y, numbers(0, 1_000_000)) for y in results)
print("you wrote:", prediction, "- sent, in units of M:", [sent / M for sent in direct])

# %% [markdown] lang="en"
# Rank 0 sends everything, one after the other, and the ranks that already have the tensor do nothing. With 1,024
# ranks it would send 1,023 times.
#
# **What the package does.** Whoever has the tensor helps. After the first round two have it, then four, then eight:
# a *tree*, and $\log_2 n$ rounds.

# %%
viz.show_source(tree_broadcast)

# %%
with World(8) as eight:
    _, direct = counted(broadcast_by_hand, 1_000_000, eight)
    results, tree = counted(tree_broadcast, 1_000_000, eight)
assert all(torch.equal(y, numbers(0, 1_000_000)) for y in results)
assert max(direct) == 7 * M and max(tree) == 3 * M and sum(direct) == sum(tree) == 7 * M

drawing, panels = viz.figure(7, 2.4, columns=2)
for panel, name, sent in zip(panels, ("direct", "tree"), (direct, tree), strict=True):
    panel.bar(range(8), [b / M for b in sent], color=viz.PALETTE[0], edgecolor=viz.INK)
    panel.set(title=name, xlabel="rank", ylabel="× M sent", ylim=(0, 7.5), xticks=range(8))
told = ", ".join(f"rank {rank} {d // M} and {t // M}" for rank, (d, t) in enumerate(zip(direct, tree, strict=True)))
viz.show(drawing, alt=f"Bars: what each of 8 ranks sends in a broadcast, direct and as a tree, in units of M: {told}.")

# %% [markdown] lang="en"
# The total is the same, 7 × $M$: seven ranks lack the tensor, and each must get it once. What changes is the busiest
# rank: 3 × $M$ instead of 7 × $M$, in 3 rounds instead of 7. **Total bytes tell you the work of the whole network.
# The time is set by the busiest rank.** Keep both numbers apart.
#
# ## 5. All-reduce: the sum of everyone's numbers, for everyone
#
# In **all-reduce** each rank brings a tensor of the same shape, and each gets the sum. It is the most used collective
# of training. In data parallelism (next chapter) every rank computes a gradient from its own rows, and the sum of
# those gradients is the gradient of the whole batch.
#
# **Question.** Four ranks, $M$ bytes each. The attempt: everyone sends to rank 0, which adds and sends the sum back.
# How many bytes does rank 0 send, and how many does rank 3?

# %%
prediction = None  # bytes that ranks 0 to 3 send, in units of M


def all_reduce_by_hand(x, axis):
    if axis.index > 0:
        send(x, axis, to=0)
        return recv(x, axis, source=0)
    total = x.clone()
    for other in range(1, axis.size):
        total += recv(x, axis, source=other)
    for other in range(1, axis.size):
        send(total, axis, to=other)
    return total


whole = sum(numbers(rank, 1_000_000) for rank in range(4))  # one process
results, center = counted(all_reduce_by_hand, 1_000_000)
assert all(torch.allclose(y, whole, atol=1e-5) for y in results)
print("you wrote:", prediction, "- sent, in units of M:", [sent / M for sent in center])

# %% [markdown] lang="en"
# Right, and badly balanced: rank 0 sends 3 × $M$ and receives 3 × $M$, while its neighbors send $M$. With 1,024 ranks
# rank 0 would move 1,023 × $M$ each way. If $M$ is the gradient of a model with 7 billion parameters in 16 bits, that
# is 14 GB × 1,023.
#
# ### The ring
#
# Here is the idea that made data parallelism scale. Cut the tensor into as many chunks as there are ranks. Put the
# ranks on a circle. In every step each rank sends *one chunk* to its right neighbor and receives another one from its
# left. All links work all the time, and nobody is in the middle.
#
# It has two halves:
#
# - **reduce-scatter**: each chunk travels once around the circle and collects one term from each rank. After $n-1$
#   steps rank $r$ holds the finished sum of chunk $r$, and only of that one.
# - **all-gather**: each finished chunk travels once around and is copied. After $n-1$ steps everyone has all of them.
#
# Move `step` in the picture below. On the left: which chunk each rank has just sent. On the right: every rank's copy
# of every chunk, with a stripe for each rank whose numbers are in it. A thick frame: this copy has just arrived.
#
# **Before you move it:** after how many steps does a copy with all four stripes appear for the first time? And after
# how many are there 16?

# %%
prediction = None  # (steps until the first, steps until all 16)

widgets.ring_explorer()

# %% [markdown] lang="en"
# Count them, without a picture:

# %%
complete = [sum(len(copy) == 4 for row in viz.ring_state(4, step).held for copy in row) for step in range(7)]
print("you wrote:", prediction, "- complete copies after step 0 to 6:", complete)
assert complete == [0, 0, 0, 4, 8, 12, 16]
for n in (4, 64, 1024):
    print(f"{n:>5} ranks: each sends {2 * (n - 1) / n:.3f} M, rank 0 of the first attempt {n - 1:>5} M")

# %% [markdown] lang="en"
# The first complete sums appear after step 3, one on each rank; all 16 are there after step 6. In each step a rank
# sends one chunk, so $M/n$ bytes:
#
# $$\underbrace{(n-1)\,\frac{M}{n}}_{\text{reduce-scatter}} + \underbrace{(n-1)\,\frac{M}{n}}_{\text{all-gather}}
#   = 2\,\frac{n-1}{n}\,M$$
#
# For $n = 4$ that is 1.5 × $M$. For $n = 1{,}024$ it is 1.998 × $M$: **what a rank sends hardly depends on how many
# ranks there are.** (The [ring](../docs/glossary.md#ring) for training was made popular by Baidu in 2017. Patarasu and
# Yuan showed in 2009 that no all-reduce can send less per rank.)
#
# ### Write the first half
#
# One step needs the exchange from section 3: start sending to the right, receive from the left. Which chunk leaves?
# Rank $r$ must end with chunk $r$. So its last *incoming* chunk is $r$, the one before is $r+1$, and what comes in at
# one step leaves at the next. At step $s$ rank $r$ sends chunk $r-1-s$ (modulo $n$) and receives chunk $r-2-s$.
#
# **Your turn.** minipar's `isend(x, axis, to=...)` and `irecv(like, axis, source=...)` start a transfer, as in section
# 3. The `wait()` of the second one returns what came.


# %%
def my_reduce_scatter(x, axis):
    n = axis.size
    chunks = list(x.chunk(n))
    # your lines here: in each of n - 1 steps one chunk leaves, and one comes
    return chunks[axis.index]


results, sent = counted(my_reduce_scatter, 1_000)
parts = sum(numbers(rank, 1_000) for rank in range(4)).chunk(4)
right = [rank for rank in range(4) if torch.allclose(results[rank], parts[rank], atol=1e-5)]
print("right on ranks:", right)


# %% jupyter={"source_hidden": true}
# One answer: reduce-scatter on a ring
def reduce_scatter_by_hand(x, axis):
    n, right, left = axis.size, (axis.index + 1) % axis.size, (axis.index - 1) % axis.size
    chunks = list(x.chunk(n))
    for step in range(n - 1):
        leaving, coming = (axis.index - 1 - step) % n, (axis.index - 2 - step) % n
        sending = isend(chunks[leaving], axis, to=right)
        chunks[coming] = chunks[coming] + irecv(chunks[coming], axis, source=left).wait()
        sending.wait()
    return chunks[axis.index]


results, sent = counted(reduce_scatter_by_hand, 1_000_000)
assert all(torch.allclose(y, part, atol=1e-5) for y, part in zip(results, whole.chunk(4), strict=True))
print("numbers held by each rank:", [y.numel() for y in results], "- sent, in units of M:", [b / M for b in sent])
assert set(sent) == {3 * M // 4}

# %% [markdown] lang="en"
# **Your turn:** write the second half the same way, in at most 15 lines. `my_all_gather` gets this rank's chunk and
# returns all of them, in order, as one tensor. At step $s$ rank $r$ passes on chunk $r - s$.


# %%
def my_all_gather(x, axis):
    chunks = [torch.zeros_like(x) for _ in range(axis.size)]
    chunks[axis.index] = x
    # your lines here
    return torch.cat(chunks)


results, sent = counted(my_all_gather, 1_000)
together = torch.cat([numbers(rank, 1_000) for rank in range(4)])
print("right on ranks:", [rank for rank in range(4) if torch.equal(results[rank], together)])

# %% [markdown] lang="en"
# The package's version of both halves, and of the whole. It is the output of the next cell, and folded until you run
# that.

# %% jupyter={"outputs_hidden": true}
viz.show_source(rings._shift, ring_reduce_scatter, ring_all_gather, ring_all_reduce)

# %%
print("5 numbers, cut for 4 ranks by chunk:", [len(piece) for piece in torch.ones(5).chunk(4)])

# %% [markdown] lang="en"
# What the package does better than our attempt, and why:
#
# - It receives *before* it sends (`_shift`): a receive that is posted early lets the data go straight to its place.
# - It takes tensors of any size: `ring_all_reduce` adds zeros until the ranks divide it, and cuts them off at the
#   end. Our attempt fails with 5 numbers on 4 ranks, because `chunk` then gives three pieces, as the last line shows.
# - It returns a copy of the chunk, so the caller can change it without changing `x`.
#
# ## 6. Four collectives and how they hang together
#
# Let us look at real numbers. Rank 0 holds 1000, 2000, 3000, 4000, rank 1 holds 100 to 400, rank 2 holds 10 to 40,
# rank 3 holds 1 to 4. In a sum, the place of a digit tells whose number is in it, and the digit tells which chunk.
#
# **Predict** the four pictures behind the first before you run the cell: what does each rank hold after a broadcast
# from rank 0, after an all-reduce, after a reduce-scatter, and after an all-gather of what the reduce-scatter gave?
# Write down rank 1's.

# %%
prediction = None  # what rank 1 holds after each of the four: [[...], [...], [...], [...]]


def four_collectives():
    axis = connect(Mesh(dp=4))["dp"]
    mine = 10.0 ** (3 - axis.index) * torch.arange(1, 5)
    part = reduce_scatter(mine, axis)
    after = {
        "before": mine,
        "broadcast from 0": broadcast(mine, axis, root=0),
        "all_reduce": all_reduce(mine, axis),
        "reduce_scatter": part,
        "then all_gather": all_gather(part, axis),
    }
    return {title: x.int().tolist() for title, x in after.items()}


held = world.run(four_collectives)
assert all(h["then all_gather"] == h["all_reduce"] == [1111, 2222, 3333, 4444] for h in held)
print("you wrote:", prediction)
print("rank 1:   ", *list(held[1].values())[1:])
states = {title: [h[title] for h in held] for title in held[0]}
viz.show(viz.draw_tensors(states, hue=lambda value: int(str(value)[0]) - 1))

# %% [markdown] lang="en"
# The last picture equals that of `all_reduce`. **An all-reduce is a reduce-scatter followed by an all-gather**,
# whatever algorithm carries them out. Remember this: between the two halves, each rank holds a finished 1/n of the
# sum. A rank
# that does its work *there*, on 1/n of the numbers, before the all-gather, saves memory and sends nothing more. That
# is the idea behind ZeRO and FSDP.
#
# Here are all collectives so far, and one more, which section 7 and later chapters use: in an **all-to-all** each rank
# cuts its tensor into $n$ pieces and sends piece $i$ to rank $i$. Nothing is summed.
#
# | collective | a rank brings | a rank gets | a rank sends |
# |---|---|---|---|
# | broadcast | the root: $M$ | $M$ | in a tree, at most $\log_2 n$ × $M$ |
# | reduce-scatter | $M$ | $M/n$, summed | $(n-1)/n$ × $M$ |
# | all-gather | $M/n$ | $M$ | $(n-1)/n$ × $M$ |
# | all-reduce | $M$ | $M$, summed | $2(n-1)/n$ × $M$ |
# | all-to-all | $n$ pieces of $M/n$ | one piece from each | $(n-1)/n$ × $M$ |
#
# $M$ is always the whole tensor. The engine of minipar calls the library's collectives, and our rings are there to be
# read. Do they agree, and do both send what the table says?

# %%
n, count = 4, 1_000_000  # an all-gather brings M/n: a quarter of the numbers
for ring, library, given, formula in [
    (ring_reduce_scatter, reduce_scatter, count, (n - 1) / n),
    (ring_all_gather, all_gather, count // n, (n - 1) / n),
    (ring_all_reduce, all_reduce, count, 2 * (n - 1) / n),
]:
    ours, ours_sent = counted(ring, given)
    theirs, theirs_sent = counted(library, given)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))
    assert set(ours_sent) == set(theirs_sent) == {formula * 4 * count}
    print(f"{library.__name__:<14} each rank sends {ours_sent[0]:>9,} bytes = {formula} M")

# %% [markdown] lang="en"
# ### Equal, but equal to what?
#
# We compared with `allclose`, not with `equal`. **Predict:** after a ring all-reduce of random float32 numbers, are
# the four ranks' results equal to each other, bit for bit? Are they equal to the sum that one process computes?

# %%
prediction = None  # (equal to each other, equal to one process)

results, _ = counted(ring_all_reduce, 1_000_000)
among_ranks = all(torch.equal(y, results[0]) for y in results)
as_one_process = torch.equal(results[0], whole)
largest = (results[0] - whole).abs().max().item()
print("you wrote:", prediction, "- measured:", (among_ranks, as_one_process))
assert among_ranks and not as_one_process and largest < 1e-5

# %% [markdown] lang="en"
# Equal among ranks: each chunk is summed once and then copied. Not equal to one process: floating-point addition
# depends on its order, and in the ring chunk $r$ begins its sum at rank $r + 1$. The differences are below $10^{-5}$.
# Two lessons. A test that asks for bit equality with one process asks for too much. And a test with a loose tolerance
# can hide a real bug; so minipar's own tests compare gradients in float64 with a tolerance of $10^{-12}$.
#
# ## 7. An independent witness
#
# The ledger is minipar's own bookkeeping. For `send` it books the tensor's bytes. Into the library's collectives it
# cannot look: there it books the formula of the table. Who checks the books? Ranks on one machine talk over the
# *loopback*, a network device inside the operating system, and the system counts every byte that passes. We let both
# count.

# %%
loopback = next(name for name in psutil.net_if_stats() if name.lower().startswith("lo"))


def bytes_on_the_loopback(operation, count, tries=30):
    """What passed while the ranks worked. Others use the loopback, too: try until the two least tries agree."""
    seen = []
    while len(seen) < 2 or (len(seen) < tries and seen[1] > 1.01 * seen[0]):
        before = psutil.net_io_counters(pernic=True)[loopback].bytes_sent
        world.run(on_this_rank, operation, count)
        seen.append(psutil.net_io_counters(pernic=True)[loopback].bytes_sent - before)
        seen.sort()
    return seen[0]


def witness(operation, count):
    _, booked = counted(operation, count)
    ratio = bytes_on_the_loopback(operation, count) / sum(booked)
    print(f"{operation.__name__:<20} booked {sum(booked):>11,} bytes, the loopback saw {ratio:.1f} times that")
    return ratio


for operation in (tree_broadcast, ring_all_reduce, all_reduce, reduce_scatter):
    assert witness(operation, 1_000_000) > 0.99  # whatever is booked has passed; other programs can only add

# %% [markdown] lang="en"
# On a quiet computer the ratio is 1.0: all that is booked has passed, and nothing else. (Packet headers and
# acknowledgements add less than one per cent. If yours is larger, another program used the loopback meanwhile.)
#
# A witness is worth having, because a formula and a program can be wrong together. One example. PyTorch has a
# reduce-scatter of its own. **Predict:** for 4 ranks, how many times $M$ do all ranks together send in it? The table
# says 4 × 3/4 × $M$ = 3 × $M$.

# %%
prediction = None  # in units of M, all ranks together


def torch_reduce_scatter(x, axis):
    part = torch.empty(x.numel() // axis.size)
    dist.reduce_scatter(part, list(x.chunk(axis.size)))
    return part


seen = bytes_on_the_loopback(torch_reduce_scatter, 1_000_000) / M
print(f"you wrote: {prediction} - the loopback saw {seen:.1f} M")
assert seen > 5.9
viz.show_source(reduce_scatter)

# %% [markdown] lang="en"
# With gloo and this version of PyTorch it sends twice what is needed: a whole all-reduce, most of which is thrown
# away. The result is right, so no test of values would ever notice. On GPUs, with the *nccl* backend, reduce-scatter
# is a real one. minipar's version is an all-to-all (each rank sends each other rank its piece) and a local sum, which
# sends what the formula says with any backend.
#
# ## 8. How long does it take?
#
# Sending $m$ bytes takes about $\alpha + \beta m$ seconds: a fixed cost $\alpha$ for each message (*latency*), and a
# cost $\beta$ for each byte (one over the *bandwidth*). The ring sends few bytes in many messages. For a tensor of
# one number, the many messages cost more than they save.
#
# By hand, rank 0 moves $M$ three times in and three times out, one after the other: for $n$ ranks $2(n-1)$ messages of
# $M$. The ring needs $2(n-1)$ messages, too, of $M/n$ each, but every rank takes part in every step, and a step ends
# with the slowest of them.
#
# **Predict:** which of the two is faster for 4 bytes on your machine? The times below are your own: they depend on
# your machine, and on what else it does.

# %%
prediction = None  # "by hand" or "ring"


def seconds(operation, count, repeats=7):
    axis, taken = connect(Mesh(dp=4))["dp"], []
    x = torch.ones(count)
    for _ in range(repeats):
        dist.barrier()  # a collective without numbers: everyone waits until everyone is here
        start = time.perf_counter()
        operation(x, axis)
        taken.append(time.perf_counter() - start)
    return min(taken)  # what other programs do can only add


sizes = [4**k for k in range(12)]  # numbers: 4 bytes to 16 MB
times = {
    operation.__name__: [max(world.run(seconds, operation, count)) for count in sizes]
    for operation in (all_reduce_by_hand, ring_all_reduce, all_reduce)
}
told = ", ".join(f"{name} {1e3 * taken[0]:.2f} ms" for name, taken in times.items())
print(f"you wrote: {prediction} - 4 bytes took: {told}")

# %%
drawing, (panel,) = viz.figure(7, 3.4)
for (name, taken), color, marker in zip(times.items(), viz.PALETTE, "osv", strict=False):
    panel.loglog([4 * s for s in sizes], [1e3 * t for t in taken], color=color, marker=marker, label=name)
panel.set(xlabel="size of the tensor (bytes)", ylabel="milliseconds", title="All-reduce on 4 ranks, on this machine")
drawing.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
viz.show(
    drawing,
    alt="Milliseconds of three all-reduces against the size of the tensor, measured on the machine that ran this "
    "notebook. The lines are flat for small tensors, where latency counts, and rise for large ones.",
)

# %% [markdown] lang="en"
# To the left latency counts, and the lines are nearly flat; to the right bytes count, and they rise with the size. At
# the left the ring loses: with four ranks on fewer cores, each of its steps waits until the operating system has given
# every rank its turn. At the right it need not win here either: all bytes pass through the same memory, so the total
# counts, and that is the same. On a cluster each rank has a link of its own, and the busiest link is what you wait
# for. There the formula says $2(n-1)\beta M$ by hand and $2(n-1)/n \cdot \beta M$ in the ring: $n$ times less.
#
# ## 9. A mesh and its axes
#
# So far all ranks talked to all. Real training mixes several kinds of parallelism, and each has its own circle of
# ranks that talk to each other. Think of the ranks as a grid with one direction, an **axis**, per kind. That is a
# **mesh**. It is nothing but arithmetic: no process is needed for it.
#
# Sections 1.2 and 2.2 of the document name three kinds: model, data and pipeline parallelism. It is worth being more
# exact than they are:
#
# | axis | name | what is cut | what travels |
# |---|---|---|---|
# | `dp` | data | the rows of a batch | gradients |
# | `pp` | pipeline | the list of layers, into stages | activations, and their gradients, at the cuts |
# | `tp` | tensor | the matrices inside a layer | activations, and their gradients, in every layer |
# | `cp` | context | the positions of a sequence | keys and values |
# | `ep` | expert | the experts of a mixture-of-experts layer | tokens |
#
# - What the document calls model parallelism is two axes, `tp` and `pp`. Both cut the model, and they differ in
#   everything else: what they send, how often, and what idles.
# - It says that data parallelism speeds up *loading and preprocessing*. It may, but its point is that each rank does
#   the forward and backward pass for its own rows.
# - It says that pipeline parallelism runs *the stages of the training process* at the same time. The stages are
#   slices of the *model*: rank 0 computes the first layers for one part of the batch while rank 1 computes the next
#   layers for another.
# - Three is not the end of the list. Llama 3's 405B model was trained on up to 16,384 GPUs with `dp`, `pp` and `tp`,
#   and with `cp` as a fourth axis when sequences grew to 131,072 tokens (Llama Team 2024, Table 4).
#
# Eight ranks, two along each of three axes:

# %%
mesh = Mesh(dp=2, pp=2, tp=2)
print("rank 5 stands at", {axis: place for axis, place in mesh.coordinate(5).items() if mesh.shape[axis] > 1})
for axis in ("dp", "pp", "tp"):
    print(f"along {axis} it talks within", mesh.line(axis, 5))
viz.show(viz.draw_mesh(mesh, "tp"))

# %% [markdown] lang="en"
# Boxes with the same letter and color are one **group**: the ranks that differ in their `tp` coordinate only. Ranks
# are numbered with `tp` fastest, so the members of a `tp` group are neighbors: 0 and 1, 2 and 3. That is on purpose.
# Tensor parallelism talks in every layer, and neighboring ranks sit in the same machine, where links are fastest.
# `dp` talks once a step, and can live with the slow links between machines.
#
# **Your turn.** Write `my_coordinate(rank, shape)` in at most 15 lines, from division and remainder alone. It gives a
# rank's place along each axis. The last axis varies fastest: with the shape `{"dp": 2, "tp": 4}`, rank 6 stands at
# `{"dp": 1, "tp": 2}`.


# %%
def my_coordinate(rank, shape):
    return dict.fromkeys(shape, 0)  # your lines in place of this one


right = [rank for rank in range(8) if my_coordinate(rank, mesh.shape) == mesh.coordinate(rank)]
print("right for ranks:", right)


# %% jupyter={"source_hidden": true}
# One answer: the fastest axis first
def coordinate(rank, shape):
    place = {}
    for axis, size in reversed(shape.items()):
        rank, place[axis] = divmod(rank, size)
    return place


for layout in (Mesh(dp=2, pp=2, tp=2), Mesh(dp=4, tp=2), Mesh(dp=2, pp=2, ep=2, cp=2, tp=2)):
    assert all(coordinate(rank, layout.shape) == layout.coordinate(rank) for rank in range(layout.size))
print("right on three meshes")

# %% [markdown] lang="en"
# The package's version of it, and of `line`, which you called above. Again, it is folded until you run the cell.

# %% jupyter={"outputs_hidden": true}
viz.show_source(Mesh.coordinate, Mesh.line)

# %% [markdown] lang="en"
# The package's version also refuses a rank that is not on the mesh, and gives the axes in their order. `line` needs no
# search: neighbors along an axis are as many ranks apart as the axes to its right have places. Along `tp` that is 1,
# along `pp` 2, along `dp` 4.
#
# Try every layout of eight ranks on three axes. **Before you move it:** in `Mesh(dp=2, tp=4)`, who is in the `dp`
# group of rank 6?

# %%
prediction = None  # the ranks

widgets.mesh_explorer()

# %%
print("you wrote:", prediction, "- the dp group of rank 6:", Mesh(dp=2, tp=4).line("dp", 6))

# %% [markdown] lang="en"
# They differ by 4, the size of `tp`.
#
# Now with processes. `connect(mesh)` gives each rank its axes, one object per line that it stands on. Every
# collective of this chapter takes such an axis. We sum the rank numbers along each axis.
#
# **Predict** the answer of rank 5 for `tp` before you run it.

# %%
prediction = None


def sums_along(mesh, count):
    axes = connect(mesh)
    x = torch.full((count,), float(dist.get_rank()))
    with ledger() as book:
        sums = {name: all_reduce(x, axes[name])[0].item() for name in ("dp", "pp", "tp")}
    return sums, {name: book.bytes(name) for name in sums}


with World(8) as eight:
    answers = eight.run(sums_along, mesh, 1_000)
print("you wrote:", prediction, "- rank 5 got", answers[5][0])
for rank, (sums, sent) in enumerate(answers):
    assert sums == {axis: sum(mesh.line(axis, rank)) for axis in sums}  # one process, no messages
    assert sent == dict.fromkeys(sums, 4_000)  # 2 (n-1)/n M with n = 2: each axis sends M
print("the ledger of rank 5, bytes by axis:", answers[5][1])

# %% [markdown] lang="en"
# Three groups of two, three sums, 4,000 bytes along each axis. The same function runs on any mesh: it names an axis,
# not a rank. That is why, in this course, a model trained on one process and on a mesh of eight is one program.
#
# ## What you have now
#
# - **rank**: one of the processes that work together, and its number. Ranks share nothing; what is to be known is
#   sent.
# - **send, recv**: wait for each other. **isend, irecv**: start, and `wait()` later.
# - **deadlock**: a circle of ranks, each of which waits for the next.
# - **collective**: an operation that all ranks of a group call together.
# - **all-reduce** = **reduce-scatter** + **all-gather**; each half sends $(n-1)/n$ × $M$ per rank.
# - **mesh, axis, group**: a grid of ranks, one of its directions, the ranks on one line along it.
# - **ledger**: the bytes a rank sent, by axis; the loopback's counter agrees.
#
# **Exercises.** Eight graded tasks are in [the exercise notebook](../exercises/02b_ranks_and_collectives.ipynb): a
# circle of sends to untie, both halves of the ring, an all-reduce of any size, a broadcast by a tree, a mesh, and a
# rank that does not come. Rounds and bytes are graded, on two to eight ranks. A terminal does it:
# `python -m minipar grade exercises/02b_ranks_and_collectives.ipynb`.
#
# ## Three questions to take along
#
# 1. Eight ranks all-reduce a gradient of 1 GB by a ring. How much does each rank send?
# 2. Someone writes `if dist.get_rank() == 0: dist.all_reduce(loss)`, to print the loss once. What happens?
# 3. In `Mesh(dp=4, tp=2)`, which ranks share a `tp` group with rank 5, and which a `dp` group?
#
# <details><summary>Answers</summary>
#
# 1. 2 × 7/8 × 1 GB = 1.75 GB.
# 2. Rank 0 waits for the others, which never come. Try it: the report says which ranks are missing.
# 3. `tp`: 4 and 5. `dp`: 1, 3, 5 and 7.
#
# </details>

# %%
assert 2 * 7 / 8 * 1 == 1.75  # the answers above
assert Mesh(dp=4, tp=2).line("tp", 5) == (4, 5) and Mesh(dp=4, tp=2).line("dp", 5) == (1, 3, 5, 7)
world.close()

# %% [markdown] lang="en"
# **Next:** [03a, data parallelism](03a_data_parallel.ipynb). You have all its parts: a batch cut by rows, one
# all-reduce, and the question of what exactly must be divided by what.
