# %% [markdown] lang="en"
# # Data parallelism
#
# Every rank has the whole model. Every rank gets other rows of the [batch](../docs/glossary.md#batch). After each
# backward pass the ranks add up their gradients, so that all take the same step. That is **[data
# parallelism](../docs/glossary.md#data-parallelism)**, the oldest and most used way to train on many devices. At the
# end of this chapter you can
#
# - write it three ways: one call for each parameter, in [buckets](../docs/glossary.md#bucket), and overlapped with the
#   backward pass;
# - say why ranks merge gradients and not updates, and show it with numbers;
# - accumulate gradients over microbatches, load data on all ranks, and weigh rows right when
#   [shares](../docs/glossary.md#shard) are unequal;
# - catch a bug that a loss curve hides;
# - share out optimizer state, gradients and weights among the ranks ([ZeRO](../docs/glossary.md#zero)), and say what
#   each stage keeps and sends;
# - compute bytes, time and memory for a model, and say when data parallelism alone is enough.
#
# **Time:** about three hours, the exercises not counted. **You need:**
# [Ranks and collectives](02b_ranks_and_collectives.ipynb). The chapter mirrors sections 3.1, 3.2.2 and 3.3.2 of
# the document that this course follows and tests, an article in Chinese: 《大规模语言模型从理论到实践 混合并行》.
#
# **How to read it.** As before: write your prediction into the cell before you run it. Most sections end with the
# graded tasks that belong to them, in [the exercise notebook](../exercises/03a_data_parallel.ipynb). Tasks are
# numbered as they stand there. Here they come in the order 1, 2, 3, 8, 5, 7, 4, 9, 6, 10, 11; each stands alone.
#
# ## Three questions on the chapter before
#
# 1. Four ranks all-reduce a tensor of 12 MB by a ring. How many bytes does each rank send?
# 2. What does `isend` do that `send` does not, and what must you not do before `wait()` has returned?
# 3. Three ranks call `all_reduce`, the fourth one does not. What happens?
#
# <details><summary>Answers</summary>
#
# 1. 2 × 3/4 × 12 MB = 18 MB.
# 2. `isend` starts the transfer and returns at once. Until `wait()` has returned, the tensor must not be touched.
# 3. The three wait forever. minipar's `World` notices that nothing moves, and says who waits for whom.
#
# </details>

# %%
import itertools
import tempfile
import time
import weakref

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import minipar
from minipar import Config, Mesh, World, connect, corpus, ledger, parallelize, viz, zero
from minipar.collectives import all_gather, all_reduce, bounds, reduce_scatter, start_all_reduce
from minipar.data import BUCKET, Gradients, rows
from minipar.rings import ring_all_reduce
from minipar.widgets import explore

assert 2 * 3 / 4 * 12 == 18  # the first answer above
world = World(4)

# %% [markdown] lang="en"
# ## 1. The same model, other rows
#
# A **row** is one piece of text, here 32 tokens, and a **batch** is the rows of one training step. The loss of a batch
# is the mean of the losses of its tokens. `backward()` computes its **gradient**: for each weight, how much the loss
# grows when the weight grows.
#
# We work with one small GPT and one text, Python's own documentation, all through the course. In this chapter mostly
# in float64, numbers of 8 bytes with 16 digits. Two programs that do the same then agree to about 15 digits, and
# whatever is larger is a bug and no rounding error.

# %%
config = Config()  # 4 blocks of width 128
tokens, targets = next(corpus.batches(steps=1, rows=8, context=32))  # 8 rows of 32 tokens each


def fresh(dtype=torch.float64):
    torch.manual_seed(0)  # the same seed, so the same weights, in every process
    return minipar.gpt(config).to(dtype)


def mean_loss(model, tokens, targets):
    """The mean over the given tokens. The target of a token is the one that follows it."""
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


def gradient(model):
    """All of it, as one long vector."""
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def distance(got, wanted):
    """The largest difference, as a share of the largest number."""
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


# %% [markdown] lang="en"
# First the truth that everything below is compared with: one process, all eight rows.

# %%
model = fresh()
mean_loss(model, tokens, targets).backward()
alone = gradient(model)

P, tensors = alone.numel(), len(list(model.parameters()))
M = alone.nbytes
print(f"{P:,} parameters in {tensors} tensors; their gradient has {M:,} bytes in float64")

# %% [markdown] lang="en"
# Now four ranks. `rows(batch, 4)` cuts a batch into four shares, and a rank takes the one of its own index.


# %%
def my_rows(axis, *batch):
    return [rows(x, axis.size)[axis.index] for x in batch]


shares = [share.tolist() for share in rows(torch.arange(8), 4)]
table = {"rows that all are given": [list(range(8))] * 4, "it computes": shares}
viz.show(viz.draw_tensors(table, hue=lambda row: row // 2))

# %% [markdown] lang="en"
# The batch's loss is a mean over all tokens. The shares are equally large, so it is also the mean of the four ranks'
# losses, and the gradient of a mean is the mean of the gradients:
#
# $$\nabla L = \tfrac14\,(\nabla L_0 + \nabla L_1 + \nabla L_2 + \nabla L_3)$$
#
# Each rank can compute its own $\nabla L_r$ without asking anyone. One all-reduce gives the sum to all. This line is
# all of data parallelism; the rest of the chapter is about doing it fast, and about the ways to get it wrong.
#
# (Section 3.1 of the document says that data parallelism spreads the training data over several nodes, which process
# it in parallel. That is so. What makes it *one* training run and not four is the sum.)
#
# **Question.** Let every rank all-reduce the gradient of each parameter tensor, one after the other. How many calls
# are that, and how many bytes does each rank send? (The number of tensors and $M$, the bytes of the whole gradient,
# were printed above.)
#
# In the code, `connect(Mesh(dp=4))["dp"]` is an axis with all four ranks on it, as in chapter 2b, and `axis.index` is
# this rank's place on it.

# %%
prediction = None  # (calls, bytes)


def naive(tokens, targets):
    axis, model = connect(Mesh(dp=4))["dp"], fresh()
    mean_loss(model, *my_rows(axis, tokens, targets)).backward()
    mine = gradient(model)
    with ledger() as book:
        for p in model.parameters():
            p.grad = all_reduce(p.grad, axis) / axis.size
    return mine, gradient(model), book.calls("dp"), book.bytes("dp")


answers = world.run(naive, tokens, targets)
own, merged, calls, sent = zip(*answers, strict=True)
print("you wrote:", prediction, "- each rank:", (calls[0], sent[0]))
assert set(calls) == {tensors} and set(sent) == {2 * 3 / 4 * M}
print("distance to one process:", *(f"{distance(g, alone):.0e}" for g in merged))
assert all(distance(g, alone) < 1e-12 for g in merged)

# %% [markdown] lang="en"
# One call for each of the tensors, and 2 × 3/4 × $M$ bytes: a sum in pieces sends no more than a sum in one. And the
# gradient is the one of a single process, up to the last digits. How far off was each rank's own gradient before?

# %%
drawing, (panel,) = viz.figure(6.5, 2.6)
panel.set_prop_cycle(color=viz.PALETTE[1:])
cases = ("its own rows only", own, -0.19), ("after the all-reduce", merged, 0.19)
for label, found, shift in cases:
    heights = [max(distance(g, alone), 1e-17) for g in found]
    panel.bar([rank + shift for rank in range(4)], heights, 0.36, label=label)
panel.set(yscale="log", ylim=(1e-17, 1e5), ylabel="distance to one process", xticks=range(4))
panel.set_xticks(range(4), [f"rank {rank}" for rank in range(4)])
panel.legend(frameon=False, ncols=2, loc="upper right", fontsize=9)
alt = (
    "Each rank's gradient compared with one process, on a logarithmic scale. From its own two rows "
    "it is off by about its own size; after the all-reduce by less than 1e-12 of it."
)
viz.show(drawing, alt)

# %% [markdown] lang="en"
# Why can we rely on equal weights at the start? `fresh` sets the same seed in every process. PyTorch's own data
# parallelism (DDP) broadcasts rank 0's weights at the start, to be sure. From then on weights stay equal by
# themselves: equal weights and equal gradients give equal steps.
#
# The package's `rows` cuts batches that are dictionaries of tensors, too (token ids, masks, labels). `bounds` says
# where it cuts: for 10 rows and 4 parts at 0, 2, 5, 7 and 10.

# %%
viz.show_source(rows, bounds)
assert bounds(10, 4) == [0, 2, 5, 7, 10]

# %% [markdown] lang="en"
# **Exercise:** [tasks 03a.1, 03a.2 and 03a.3](../exercises/03a_data_parallel.ipynb): which rows are mine,
# cut them yourself, average the gradients.
#
# ## 2. Merge gradients, or merge updates?
#
# Section 3.2.2 of the document gives three steps: divide the data, train *independently* on every node, merge the
# *parameter updates*. We merged gradients, before the update. Is that the same? Here are two ways for two ranks whose
# gradients for one weight are 3 and −1:
#
# - merge gradients: both take one step with the mean gradient, 1;
# - merge updates: one takes a step with 3, the other with −1, then both take the mean of the two weights.
#
# **Predict** for plain SGD (the step is −0.1 × gradient) and for Adam. Adam divides the gradient by its own recent
# size, so that its first step is −0.1 × the *sign* of the gradient. Does the weight end at the same place?

# %%
prediction = None  # for instance {"SGD": "same", "Adam": "other"}


def weight_after(optimizer, gradient):
    """Where one step takes a weight that starts at 0."""
    weight = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    weight.grad = torch.full_like(weight, gradient)
    optimizer([weight], lr=0.1).step()
    return round(weight.item(), 6)


print("you wrote:", prediction)
for optimizer in (torch.optim.SGD, torch.optim.Adam):
    merged_gradient = weight_after(optimizer, (3 - 1) / 2)
    merged_update = (weight_after(optimizer, 3) + weight_after(optimizer, -1)) / 2
    print(f"{optimizer.__name__:<5} merged gradients: {merged_gradient:.2f}")
    print(f"{'':<5} merged updates:   {merged_update:.2f}")
    assert (abs(merged_gradient - merged_update) < 1e-12) == (optimizer is torch.optim.SGD)

# %% [markdown] lang="en"
# With SGD both ways end at −0.1. With Adam the ranks vote +1 and −1, and the weight stays where it was. The rule
# behind it: SGD's update is *linear* in the gradient, so the mean of the updates is the update of the mean. Adam's is
# not. Neither is gradient clipping, which divides by a norm that differs from rank to rank.
#
# Does it matter for a model? We train two copies side by side on every rank, one for each way, and measure after each
# step how far apart they are, as a share of how far the weights have moved from the start. (AdamW is Adam with
# another form of weight decay.)


# %%
def average(some, axis):
    """Replace tensors by their mean over the ranks. One call for all of them: see section 3."""
    some = [x.detach() for x in some]
    mean = all_reduce(torch.cat([x.flatten() for x in some]), axis) / axis.size
    for x, part in zip(some, mean.split([x.numel() for x in some]), strict=True):
        x.copy_(part.view_as(x))


def two_ways(kind, settings, batches):
    axis, ways, apart = connect(Mesh(dp=4))["dp"], (fresh(), fresh()), []
    start = torch.cat([p.detach().flatten() for p in fresh().parameters()])
    optimizers = [kind(model.parameters(), **settings) for model in ways]
    for batch in batches:
        for model in ways:
            model.zero_grad()
            mean_loss(model, *my_rows(axis, *batch)).backward()
        average([p.grad for p in ways[0].parameters()], axis)  # merge gradients,
        for optimizer in optimizers:
            optimizer.step()
        average(ways[1].parameters(), axis)  # or merge updates
        ends = [torch.cat([p.detach().flatten() for p in model.parameters()]) for model in ways]
        apart.append(((ends[0] - ends[1]).norm() / (ends[0] - start).norm()).item())
    return apart


# %%
batches = list(corpus.batches(steps=3, rows=8, context=32))
cases = {
    "SGD": (torch.optim.SGD, {"lr": 0.1}),
    "SGD with momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "AdamW": (torch.optim.AdamW, {"lr": 1e-3}),
}
apart = {name: world.run(two_ways, *case, batches)[0] for name, case in cases.items()}
for name, steps in apart.items():
    print(f"{name:<18} after each step:", *(f"{x:.0e}" for x in steps))
assert max(apart["SGD"] + apart["SGD with momentum"]) < 1e-12 and min(apart["AdamW"]) > 0.1

# %%
drawing, (panel,) = viz.figure(6.5, 2.8)
for (name, steps), color, marker in zip(apart.items(), viz.PALETTE[4:], "osv", strict=False):
    panel.semilogy(range(1, 4), steps, color=color, marker=marker, label=name)
panel.set(xticks=[1, 2, 3], xlabel="step", ylabel="apart, share of the way", ylim=(1e-17, 100))
panel.set_title("Merging updates against merging gradients", fontsize=10)
panel.legend(frameon=False, fontsize=9, loc="center right")
alt = (
    "Distance between weights from merged updates and from merged gradients over three steps. "
    "For SGD with and without momentum it stays near 1e-14; for AdamW it is a large share of the way."
)
viz.show(drawing, alt)

# %% [markdown] lang="en"
# So the document's description holds for SGD, with momentum too, and only if the ranks merge after every step. For
# Adam, which trains nearly every language model, it describes another algorithm. If ranks train for many steps before
# they merge, that is another one again, with a name and a use of its own: *local SGD* (Stich 2019), or *federated
# averaging* where the data may not leave its owner (McMahan et al. 2017). It is not wrong, it is not what one process
# would do. **Merging gradients gives what one process gives, with every optimizer**, and sends the same number of
# bytes. So this is what training libraries mean by data parallelism.
#
# **Exercise:** [task 03a.8](../exercises/03a_data_parallel.ipynb):
# merge the updates yourself, and predict for four optimizers.
#
# ## 3. Fewer calls: buckets
#
# Each call costs something before its first byte moves: ranks find each other, messages set off. This is the latency
# of chapter 2b, and a ring pays it 2(n − 1) times a call. Our smallest gradients have 128 numbers. Real models have
# thousands of parameter tensors. So put many gradients side by side in one flat tensor, a **bucket**, and all-reduce
# that.
#
# **Question.** Fill buckets from the back of the model, and close one as soon as it holds 512 KiB (524,288 bytes).
# How many calls, and how many bytes does a rank send? More than before, fewer, the same?

# %%
prediction = None  # (calls, bytes)


def cut_into_buckets(parameters, limit):
    buckets, full = [], True
    for p in list(parameters)[::-1]:
        if full:
            buckets.append([])
        buckets[-1].append(p)
        full = sum(q.nbytes for q in buckets[-1]) >= limit
    return buckets


def pack(bucket):
    return torch.cat([p.grad.flatten() for p in bucket])


def unpack(flat, bucket):
    for p, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
        p.grad = part.view_as(p)


# %%
def bucketed(tokens, targets, limit):
    axis, model = connect(Mesh(dp=4))["dp"], fresh()
    mean_loss(model, *my_rows(axis, tokens, targets)).backward()
    with ledger() as book:
        for bucket in cut_into_buckets(model.parameters(), limit):
            unpack(all_reduce(pack(bucket), axis) / axis.size, bucket)
    return gradient(model), book.calls("dp"), book.bytes("dp")


LIMIT = 512 * 1024
merged, calls, sent = world.run(bucketed, tokens, targets, LIMIT)[0]
print("you wrote:", prediction, "- each rank:", (calls, sent))
assert distance(merged, alone) < 1e-12 and sent == 2 * 3 / 4 * M
assert calls == len(cut_into_buckets(model.parameters(), LIMIT)) < tensors / 4

# %% [markdown] lang="en"
# The same bytes in far fewer calls. What is it worth in time? The bars are your own machine's: milliseconds for the
# exchange alone, for several limits. Here all messages stay within one computer, so latency is small; between
# computers it weighs more.


# %%
def exchange_seconds(tokens, targets, limit, repeats=5):
    axis, model, taken = connect(Mesh(dp=4))["dp"], fresh(), []
    mean_loss(model, *my_rows(axis, tokens, targets)).backward()
    flats = [pack(bucket) for bucket in cut_into_buckets(model.parameters(), limit)]
    for _ in range(repeats):
        all_reduce(torch.zeros(1), axis)  # all ranks begin together
        start = time.perf_counter()
        for flat in flats:
            all_reduce(flat, axis)
        taken.append(time.perf_counter() - start)
    return sorted(taken)[repeats // 2], len(flats)


limits = {"a tensor each": 1, "128 KiB": 2**17, "512 KiB": LIMIT, "2 MiB": 2**21, "all in one": 2**40}
found = {name: max(world.run(exchange_seconds, tokens, targets, limits[name])) for name in limits}
names = [f"{name}: {calls} call{'s' * (calls > 1)}" for name, (_, calls) in found.items()]
times = {"time": [1000 * seconds for seconds, _ in found.values()]}
viz.show(viz.draw_bars(names, times, "ms for one exchange, on this machine", "Size of buckets"))

# %% [markdown] lang="en"
# **The package's version.** Our `pack` copies all gradients into a new tensor, and `unpack` back. minipar allocates
# one flat buffer once, and makes every `.grad` a *view* of its piece, a window into the same memory. `backward()`
# writes into the buffer, and the optimizer reads from it: nothing is copied, no second set of gradients exists. A
# bucket is a slice of the buffer.

# %%
viz.show_source(Gradients.__init__, Gradients.attach)

# %% [markdown] lang="en"
# `register_post_accumulate_grad_hook`, near the end of `__init__`, is for the next section. `attach` is called before
# each step, because `optimizer.zero_grad()` by default drops the gradients, views and all.
#
# **Exercise:** [task 03a.5](../exercises/03a_data_parallel.ipynb): one call for all gradients.
#
# ## 4. While backward still runs
#
# If few calls are good, why not one? Because of *when* it can start. Backward computes gradients one by one. As soon
# as a bucket's last gradient is there, its all-reduce could set off, while backward goes on with the rest.
#
# PyTorch lets you watch. A **hook** is a function of yours that PyTorch calls at a certain moment. What you register
# with `register_post_accumulate_grad_hook` is called each time a parameter's gradient is complete.
#
# **Question.** Whose gradient is ready first, the one of the token embedding (which forward uses first) or the one of
# the head (which it uses last)?

# %%
prediction = None  # "embed" or "head"

model, ready = fresh(), []
for name, p in model.named_parameters():
    p.register_post_accumulate_grad_hook(lambda _, name=name: ready.append(name))
mean_loss(model, tokens, targets).backward()
print("you wrote:", prediction)
print("first:", *ready[:3], sep="\n  ")
print("last:", *ready[-3:], sep="\n  ")
assert ready[0] == "head.weight" and ready[-1].startswith("embed.") and len(ready) == tensors

# %% [markdown] lang="en"
# Backward walks from the loss to the input, so gradients come from the back of the model to its front. That is why we
# filled the buckets from the back. Now the attempt: start each bucket's all-reduce from the hook, *without waiting*
# (`start_all_reduce` sums in place and returns at once, as `isend` did), and wait for all of them at the end.


# %%
def overlapped(axis, model, tokens, targets, limit, start=start_all_reduce):
    buckets = cut_into_buckets(model.parameters(), limit)
    place = {p: i for i, bucket in enumerate(buckets) for p in bucket}
    missing, started = [len(bucket) for bucket in buckets], {}

    def ready(p):  # called when p.grad is complete
        i = place[p]
        missing[i] -= 1
        if missing[i] == 0:
            started[i] = start(pack(buckets[i]), axis)

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(ready)
    mean_loss(model, *my_rows(axis, tokens, targets)).backward()
    for i, pending in started.items():
        unpack(pending.wait() / axis.size, buckets[i])


# %%
def run_overlapped(tokens, targets, limit):
    axis, model = connect(Mesh(dp=4))["dp"], fresh()
    with ledger() as book:
        overlapped(axis, model, tokens, targets, limit)
    return gradient(model), book.calls("dp"), book.bytes("dp")


merged, calls_now, sent = world.run(run_overlapped, tokens, targets, LIMIT)[0]
off = distance(merged, alone)
print(f"{calls_now} calls, {sent:,} bytes, distance to one process {off:.0e}")
assert off < 1e-12 and (calls_now, sent) == (calls, 2 * 3 / 4 * M)

# %% [markdown] lang="en"
# The same gradient, the same calls and bytes. The difference is in time, so let us record it: on rank 0, when each
# gradient was ready, and when each bucket set off and arrived. Once with one large bucket, once with 512 KiB.
#
# **Predict:** sketch both pictures, with time to the right. Where does the one large bucket begin?


# %%
def recorded(tokens, targets, limit):
    axis, model, now = connect(Mesh(dp=4))["dp"], fresh(), time.perf_counter
    ready, moved, done = [], [], []

    def start(x, axis):
        began, pending = now(), start_all_reduce(x, axis)
        # what `then` is given is called by PyTorch when the bucket has arrived
        done.append(pending.work.get_future().then(lambda _: moved.append((began, now()))))
        return pending

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda _: ready.append(now()))
    overlapped(axis, model, tokens, targets, limit, start)
    for arrival in done:
        arrival.wait()
    return [t - ready[0] for t in ready], sorted((a - ready[0], b - ready[0]) for a, b in moved)


long = next(corpus.batches(steps=1, rows=8, context=128))  # more to compute
for _ in range(2):  # the first round is for warming up
    records = {
        "one bucket": world.run(recorded, *long, 2**40)[0],
        "512 KiB": world.run(recorded, *long, LIMIT)[0],
    }


# %%
def draw_exchange(panel, ready, moved, title, lanes):
    """Above: a line when a gradient was ready. Below: a box a bucket, from start to arrival."""
    panel.barh(0, 1000 * ready[-1], 0.8, color=viz.PALETTE[1], alpha=0.35)
    panel.vlines([1000 * t for t in ready], -0.4, 0.4, color=viz.INK, lw=0.7)
    for i, (start, end) in enumerate(moved):
        color = viz.PALETTE[(0, 5)[i % 2]]
        lane, size = 1 + i % lanes, 1000 * (end - start)
        panel.barh(lane, size, 0.8, left=1000 * start, color=color, ec=viz.INK, lw=0.5)
    panel.set(ylim=(lanes + 0.7, -0.7), xlabel="ms since the first gradient was ready")
    panel.set_yticks([0, (lanes + 1) / 2], ["backward", "buckets"])
    panel.tick_params(axis="y", length=0)
    panel.set_title(title, fontsize=10, loc="left")


drawing, panels = viz.figure(8, 5, rows=2)
for panel, (name, (ready, moved)) in zip(panels, records.items(), strict=True):
    draw_exchange(panel, ready, moved, f"{name}: recorded on rank 0 of this machine", len(moved))
    panel.set_xlim(0, 1030 * max(moved[-1][1] for _, moved in records.values()))
early = sum(start < ready[-1] for start, _ in moved)
alt = (
    "Two recorded exchanges. With one bucket, sending begins when backward has ended. "
    f"With 512 KiB, {early} of {calls} buckets set off while backward still computes."
)
viz.show(drawing, alt)

# %% [markdown] lang="en"
# The thin lines are gradients becoming ready. With one bucket, nothing moves before the last of them (and before all
# are copied into one tensor: that is the gap). With smaller buckets sending begins early, *under* backward, and only
# the last bucket has to wait for its end.
#
# What the picture shows is order. Do not read a speed-up from it: here the ranks and the sending share a few cores,
# and what one takes the other lacks. On a GPU, the network card and a small part of the chip move the bytes, and time
# under backward is nearly free.
#
# So bucket size is a compromise. Small buckets start early and pay latency often; large ones start late. The explorer
# below takes the ready times recorded above, stretched to a backward of 200 ms, and *estimates* the rest: a bucket
# sets off when it is complete and the one before it has arrived. It takes 2(n − 1)α + 2(n − 1)/n × bytes / bandwidth,
# where α is the latency of a message.
# **Before you move it:** which size wins on the slow network, and does the same one win on the fast one?

# %%
prediction = None  # the best size on the (slow, fast) network

ready = [0.2 * t / records["512 KiB"][0][-1] for t in records["512 KiB"][0]]
networks = {  # latency and bandwidth
    "0.5 ms, 0.1 GB/s": (5e-4, 1e8),
    "50 µs, 1 GB/s": (5e-5, 1e9),
    "5 µs, 10 GB/s": (5e-6, 1e10),
}
groups = {name: cut_into_buckets(model.parameters(), limit) for name, limit in limits.items()}


def estimate(bucket, network):
    """When each bucket starts and arrives on four ranks."""
    (alpha, bandwidth), moved, gradients, free = networks[network], [], 0, 0.0
    for some in groups[bucket]:
        gradients += len(some)
        start = max(free, ready[gradients - 1])
        free = start + 6 * alpha + 1.5 * sum(p.nbytes for p in some) / bandwidth
        moved.append((start, free))
    return moved


# %%
def late(bucket, network):
    """Milliseconds from the end of backward to the last arrival."""
    return 1000 * (estimate(bucket, network)[-1][1] - ready[-1])


def draw_estimate(network, bucket):
    drawing, (panel,) = viz.figure(8, 2.1)
    moved = estimate(bucket, network)
    result = f"calls: {len(moved)}, the last one arrives {late(bucket, network):.1f} ms after backward"
    draw_exchange(panel, ready, moved, f"estimate, {result}", lanes=1)
    panel.set_xlim(0, 1030 * max(estimate(other, network)[-1][1] for other in limits))
    return viz.describe(drawing, f"Estimate for {network}, buckets: {bucket}; {result}.")


explore(draw_estimate, network=networks, bucket=list(limits))

# %%
slow, _, fast = networks
best = min(limits, key=lambda bucket: late(bucket, slow))
spread = max(late(bucket, fast) for bucket in limits)
print("you wrote:", prediction)
print(f"slow network: {best} wins; fast network: no size ends more than {spread:.1f} ms after backward")
assert best not in ("a tensor each", "all in one") and spread < 5

# %% [markdown] lang="en"
# On the slow network many calls cost more than they gain, and one bucket wastes the time under backward: a size in
# between wins. On the fast network any size will do.
#
# **The package's version** is these few lines, on the buffer that you saw above:

# %%
viz.show_source(Gradients._ready, Gradients._start_complete, Gradients._start, Gradients.finish)

# %% [markdown] lang="en"
# Three things are better than in ours:
#
# - **Order.** `_start_complete` looks only at the next bucket in line, so a bucket starts after all earlier ones, even
#   if it was complete before them. Collectives are matched by order alone: if one rank's backward took another path,
#   and it started bucket 3 before 2, ranks would add apples to pears.
# - **Parameters without a gradient.** If a layer was not used, its hook never comes. Our bucket would never start, and
#   the other gradients in it would silently stay this rank's own. `finish` starts what is left.
# - **No copies**, and no division at the end. The loss was divided by the number of *all* tokens before backward, so
#   the sum is the answer. Section 6 shows why this is more than a convenience.
#
# Its default bucket has 4 MiB. The whole gradient of our GPT in float32 is smaller than that, so it goes in one:

# %%
assert BUCKET == 4 * 2**20 > 4 * P
print(f"default bucket: {BUCKET:,} bytes; the small GPT's gradient in float32: {4 * P:,}")
print(f"buckets for 7 billion parameters in 16 bits: {2 * 7e9 / BUCKET:,.0f}, if all are just full")

# %% [markdown] lang="en"
# **Exercise:** [task 03a.7](../exercises/03a_data_parallel.ipynb): send while backward still runs.
#
# ## 5. Several backwards, one exchange
#
# A rank's rows may be too many for its memory at once. Then it cuts them into **microbatches** and runs forward and
# backward for one after the other. PyTorch helps: `backward()` *adds* to `.grad`. After the last microbatch the sum is
# there. This is **gradient accumulation**.
#
# **Question.** Two microbatches on each rank. Program A exchanges gradients after each of them, program B once after
# the last. Which of the two gives the gradient of one process: A, B, both? And how many bytes does A send, compared
# with B?

# %%
prediction = None  # (who is right, bytes of A / bytes of B)


def accumulate(tokens, targets, every_time):
    axis, model, microbatches = connect(Mesh(dp=4))["dp"], fresh(), 2
    mine, wanted = my_rows(axis, tokens, targets)
    with ledger() as book:
        for i in range(microbatches):
            part = mean_loss(model, rows(mine, microbatches)[i], rows(wanted, microbatches)[i])
            (part / microbatches).backward()
            if every_time or i == microbatches - 1:
                average([p.grad for p in model.parameters()], axis)
    return gradient(model), book.bytes("dp")


a, bytes_a = world.run(accumulate, tokens, targets, True)[0]
b, bytes_b = world.run(accumulate, tokens, targets, False)[0]
print("you wrote:", prediction)
print(f"A: distance to one process {distance(a, alone):.0e}, each rank sends {bytes_a:,} bytes")
print(f"B: distance to one process {distance(b, alone):.0e}, each rank sends {bytes_b:,} bytes")
assert distance(a, alone) < 1e-12 and distance(b, alone) < 1e-12
assert bytes_a == 2 * bytes_b and bytes_b == 2 * 3 / 4 * M

# %% [markdown] lang="en"
# Both are right. A is right because what was averaged before is equal on all ranks, and the mean of equal numbers
# changes nothing. (With a sum in place of a mean, A would be wrong: the first microbatch would count four times.) But
# A sends twice as much, and with 64 microbatches 64 times as much. No test of values would notice. **Count bytes.**
#
# Hooks do A by default: they come after every backward. So the package arms them only before the last one of a step
# (PyTorch's DDP has `no_sync()` for the others):

# %%
viz.show_source(Gradients.arm)

# %% [markdown] lang="en"
# `_start_complete` is the loop that you saw in section 4. `coming` is for schedules that put weight gradients off.
# Here it is None: all gradients are still to come.
#
# `parallelize(model, mesh)` lays a model out on a mesh, and its `step` does a forward and backward pass over all ranks,
# with all that we have built so far. We hold its bytes against the formula:


# %%
def whole_gradient(model):
    return torch.cat([g.flatten() for g in model.full_gradients().values()])


def one_step(tokens, targets, microbatches):
    model = parallelize(fresh(), Mesh(dp=4), microbatches=microbatches)
    with ledger() as book:
        model.step(tokens, targets)
    return whole_gradient(model), book.bytes("dp")


twice = [x.repeat(2, 1) for x in (tokens, targets)]  # 16 rows, each two times: the same mean
for microbatches in (1, 2, 4):
    got, sent = world.run(one_step, *twice, microbatches)[0]
    off = distance(got, alone)
    print(f"microbatches: {microbatches}, distance {off:.0e}, each rank sends {sent:,} bytes")
    assert off < 1e-12 and sent == 2 * 3 / 4 * (M + 16)

# %% [markdown] lang="en"
# The same bytes for any number of microbatches. The 16 bytes beside $M$ are two more numbers that travel, the sum of
# the losses and the number of tokens. The next section shows what they are for.
#
# ## 6. Loading in parallel, and unequal shares
#
# The document counts less time for loading and preparing data among the advantages of data parallelism (3.3.2). This
# holds if each rank prepares only its own share. Let us see it for **tokenizing**, turning text into token ids. Each
# rank takes a quarter of the text. A cut must not go through the middle of a token, so we cut where a line ends.
#
# **Predict:** are the four pieces, put together, the same tokens as those of the whole text? And by how much is the
# time divided on your machine?

# %%
prediction = None  # (same?, times faster)


def tokenize_share(text, parts, index):
    cuts = [0, *(text.index("\n", len(text) * i // parts) for i in range(1, parts)), len(text)]
    share = text[cuts[index] : cuts[index + 1]]
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        ids = corpus.tokenizer().encode(share).ids
        taken.append(time.perf_counter() - start)
    return ids, len(share), min(taken)  # the best of three: the first run is cold


def on_my_rank(text):
    axis = connect(Mesh(dp=4))["dp"]
    all_reduce(torch.zeros(1), axis)  # all begin together
    return tokenize_share(text, axis.size, axis.index)


# %%
text = corpus.text()
_, _, one = tokenize_share(text, 1, 0)
pieces, lengths, seconds = zip(*world.run(on_my_rank, text), strict=True)
same = [token for piece in pieces for token in piece] == corpus.tokens().tolist()
print(f"you wrote: {prediction} - same tokens: {same}, characters on each rank: {lengths}")
assert same and max(lengths) < 0.26 * len(text)
names, bars = ["one process", "slowest of 4 ranks"], {"time": [one, max(seconds)]}
viz.show(viz.draw_bars(names, bars, "seconds, best of three, on this machine", "Tokenizing the text"))

# %% [markdown] lang="en"
# The claim holds: each rank handles a quarter of the characters, and the tokens are the same. (Time falls as far as
# there are cores: with two, four ranks cannot be four times as fast.)
#
# The same goes for the batches of training. The tokens lie in a file. Each rank *maps* it into its memory, which
# loads only the pages that it touches. All ranks draw the same random positions from the same seed, which is cheap,
# and each reads its own rows.
#
# **Predict:** a step takes 10 rows. How many does each rank read, and are the four shares together the same 10 rows
# that one process would take?

# %%
prediction = None  # (rows of ranks 0 to 3, same?)

folder = tempfile.TemporaryDirectory()
file, length = f"{folder.name}/tokens.bin", len(corpus.tokens())
corpus.tokens().numpy().tofile(file)


def load(file, length, count, context, seed):
    axis = connect(Mesh(dp=4))["dp"]
    data = torch.from_file(file, size=length, dtype=torch.int64)  # mapped, not read
    generator = torch.Generator().manual_seed(seed)  # the same on every rank
    starts = torch.randint(length - context, (count, 1), generator=generator)
    position = my_rows(axis, starts)[0] + torch.arange(context)
    return data[position], data[position + 1]


ten = next(corpus.batches(steps=1, rows=10, context=32, seed=1))  # one process takes these
loaded = world.run(load, file, length, 10, 32, 1)
read = [len(tokens) for tokens, _ in loaded]
same = torch.equal(torch.cat([tokens for tokens, _ in loaded]), ten[0])
print("you wrote:", prediction, "- measured:", (read, same))
assert same and sum(read) == 10

# %% [markdown] lang="en"
# Two mistakes lurk here, and neither crashes. If every rank reads the *same* rows, you pay for four ranks and learn
# from the rows of one. If every rank draws positions from *its own* seed, some rows come twice and others never.
#
# ### Ten rows on four ranks
#
# 10 rows do not divide by 4: two ranks have 2, two have 3. Each takes the mean loss over its own rows, and then the
# ranks average. Is that right? First with plain numbers and two ranks: rank 0 has losses 1, 2 and 3, rank 1 has 9.

# %%
first, second = [1, 2, 3], [9]
mean_of_means = (sum(first) / len(first) + sum(second) / len(second)) / 2
mean = sum(first + second) / len(first + second)
print("mean of means:", mean_of_means, "- mean:", mean)
assert (mean_of_means, mean) == (5.5, 3.75)

# %% [markdown] lang="en"
# A **mean of means is not the mean** when the shares are unequal. The single row of rank 1 counts three times as much
# as each row of rank 0. The same happens with equal rows if some labels do not count, for instance because short
# texts are filled up with padding.
#
# **Question.** How far is the gradient of 10 rows on 4 ranks from the one of one process, if ranks average their mean
# gradients: nothing, about a thousandth, about a tenth? And how would you repair it?

# %%
prediction = None  # distance


def uneven(tokens, targets, fair):
    axis, model = connect(Mesh(dp=4))["dp"], fresh()
    mine, wanted = my_rows(axis, tokens, targets)
    total, count = mean_loss(model, mine, wanted) * wanted.numel(), torch.tensor(wanted.numel())
    everyone = all_reduce(count, axis) if fair else count * axis.size
    (total / everyone).backward()
    return all_reduce(gradient(model), axis)  # parts of one mean, or a mean of means


model = fresh()
mean_loss(model, *ten).backward()
alone_ten = gradient(model)
unfair, fair = (distance(world.run(uneven, *ten, fair)[0], alone_ten) for fair in (False, True))
print(f"you wrote: {prediction} - mean of means: {unfair:.3f}, sums and counts: {fair:.0e}")
assert unfair > 0.01 and fair < 1e-12

# %% [markdown] lang="en"
# The repair: do not pass means around, but **sums and counts**. Each rank divides the *sum* of its losses by the
# number of tokens on *all* ranks. The gradients then only have to be added. What each row weighs, both ways:

# %%
owner = [rank for rank, share in enumerate(rows(torch.arange(10), 4)) for _ in share]
weight = [1 / 4 / owner.count(rank) for rank in owner]
drawing, (panel,) = viz.figure(6.5, 2.6)
panel.bar(range(10), weight, color=[viz.PALETTE[rank] for rank in owner], ec=viz.INK, lw=0.6)
for row, rank in enumerate(owner):
    panel.text(row, 0.004, f"rank {rank}", ha="center", fontsize=7, color=viz.INK)
panel.axhline(0.1, color=viz.INK, linestyle="--", linewidth=1)
panel.text(9.6, 0.101, "right: 1/10", ha="right", va="bottom", fontsize=8, color=viz.INK)
panel.set(xticks=range(10), xlabel="row", ylabel="weight in the mean")
alt = (
    "The weight of each of ten rows in a mean of means on four ranks: 1/8 for the rows of ranks 0 and "
    "2, which have two each, 1/12 for those of 1 and 3, which have three. A dashed line: 1/10, the right one."
)
viz.show(drawing, alt)
assert sorted(set(weight)) == [1 / 12, 1 / 8]

# %% [markdown] lang="en"
# **The package's version** makes the mistake hard to write: a loss returns its *sum* and its *count*, and the step
# divides by the count of all ranks. The default loss:

# %%
viz.show_source(minipar.cross_entropy)

# %% [markdown] lang="en"
# `local=True` tells `step` that each rank brings rows of its own, of any number. We try 1, 2, 1 and 6 of the ten:


# %%
def own_rows(tokens, targets, ends):
    axis = connect(Mesh(dp=4))["dp"]
    mine = slice(ends[axis.index], ends[axis.index + 1])
    model = parallelize(fresh(), Mesh(dp=4))
    loss = model.step(tokens[mine], targets[mine], local=True)
    return loss.item(), whole_gradient(model)


expected = mean_loss(fresh(), *ten).item()
for loss, got in world.run(own_rows, *ten, [0, 1, 3, 4, 10]):
    off = distance(got, alone_ten)
    print(f"distance to one process {off:.0e}, loss {loss:.6f}")
    assert off < 1e-12 and abs(loss - expected) < 1e-12

# %% [markdown] lang="en"
# **Exercise:** [task 03a.4](../exercises/03a_data_parallel.ipynb): a mean of means is not the mean.
#
# ## 7. The bug that a loss curve hides
#
# `all_reduce` sums. Suppose that someone forgets the division by the number of ranks. All gradients are then four
# times too large. We train twice with AdamW, right and wrong.
#
# **Predict:** what do you see when you lay the two loss curves on top of each other? What is their largest difference
# in 15 steps, when the loss itself is about 6?

# %%
prediction = None  # the largest difference of the losses


def train(batches, kind, lr, divide_by):
    axis, model, losses = connect(Mesh(dp=4))["dp"], fresh(torch.float32), []
    optimizer = kind(model.parameters(), lr=lr)
    for batch in batches:
        optimizer.zero_grad()
        loss = mean_loss(model, *my_rows(axis, *batch))
        loss.backward()
        unpack(all_reduce(gradient(model), axis) / divide_by, list(model.parameters()))
        optimizer.step()
        losses.append(loss.detach())
    return (all_reduce(torch.stack(losses), axis) / axis.size).tolist()


batches = list(corpus.batches(steps=15, rows=8, context=32))
adam, sgd = (
    [world.run(train, batches, kind, lr, divide_by)[0] for divide_by in (4, 1)]
    for kind, lr in ((torch.optim.AdamW, 1e-3), (torch.optim.SGD, 0.1))
)
gaps = [max(abs(x - y) for x, y in zip(*curves, strict=True)) for curves in (adam, sgd)]
print(f"you wrote: {prediction} - with AdamW: {gaps[0]:.0e}; with SGD: {gaps[1]:.2f}")
assert gaps[0] < 0.01 < 0.1 < gaps[1] and sum(sgd[1]) < sum(sgd[0])

# %%
drawing, panels = viz.figure(8, 2.9, columns=2)
for panel, (right, wrong), name in zip(panels, (adam, sgd), ("AdamW", "SGD"), strict=True):
    panel.plot(range(1, 16), right, color=viz.PALETTE[0], linewidth=6, label="right")
    panel.plot(range(1, 16), wrong, color=viz.PALETTE[6], label="gradients 4 × too large")
    panel.set(xlabel="step", title=name, xticks=[1, 5, 10, 15])
panels[0].set_ylabel("loss")
panels[0].legend(frameon=False, fontsize=9)
alt = (
    "Loss over 15 steps with right gradients and with gradients four times too large. "
    "With AdamW the two curves lie on top of each other; with SGD they part."
)
viz.show(drawing, alt)

# %% [markdown] lang="en"
# With AdamW the curves are one curve. Adam divides each gradient by its own recent size, so a constant factor cancels.
# With SGD they differ, and the wrong one even looks better here: its steps are four times as long, and so short a run
# profits from that. Would you have looked for a bug?
#
# A bug of this kind crashes nothing, and the plot beside it shows a falling loss. It bites later: clipping by norm sets
# in four times too early, the small constant in Adam's division is four times too small, and the first run with SGD
# takes steps four times too long.
#
# **A loss curve is no test.** What is one: the gradient, raw, in float64, against one process.


# %%
def summed(tokens, targets, divide_by):
    axis, model = connect(Mesh(dp=4))["dp"], fresh()
    mean_loss(model, *my_rows(axis, tokens, targets)).backward()
    return all_reduce(gradient(model), axis) / divide_by


for label, divide_by in (("right", 4), ("wrong", 1)):
    off = distance(world.run(summed, tokens, targets, divide_by)[0], alone)
    verdict = "holds" if off < 1e-12 else "BROKEN"
    print(f"{label}: distance to one process {off:.0e}. Gradient law {verdict}")
    assert (off < 1e-12) == (label == "right")

# %% [markdown] lang="en"
# One step, no training, and the verdict is not a matter of taste: a distance of 3 means that the gradient is off by
# three times itself, so it is four times too large. Every layout of minipar is held to this law by its tests.
#
# **Exercise:** [task 03a.9](../exercises/03a_data_parallel.ipynb): mend a step that has a bug of this kind.
#
# ## 8. Bytes and seconds
#
# Chapter 2b derived what a rank sends in a ring all-reduce: 2(n − 1)/n × $M$. Let us hold it against the ledger for
# several numbers of ranks, with the library's all-reduce and with the ring that is written out from `isend` and
# `irecv`, whose every message is booked on its own.
#
# **Question.** You go from 4 ranks to 1,024. By what factor does the number of bytes grow that *each rank* sends?

# %%
prediction = None  # factor


def sent_by_each(operation, mesh, count):
    with ledger() as book:
        operation(torch.ones(count), connect(mesh)["dp"])
    return book.bytes("dp")


size = 4 * P  # the small GPT's gradient in float32
for n in (2, 4, 8):
    with World(n) as some:
        library = set(some.run(sent_by_each, all_reduce, Mesh(dp=n), P))
        ring = set(some.run(sent_by_each, ring_all_reduce, Mesh(dp=n), P))
    assert library == ring == {2 * (n - 1) / n * size}
    print(f"{n} ranks: each sends {library.pop():>9,} bytes = {2 * (n - 1) / n} M")
factor = (2 * 1023 / 1024) / (2 * 3 / 4)
print(f"you wrote: {prediction} - from 4 to 1,024 ranks: {factor:.2f} times")
assert factor < 4 / 3

# %% [markdown] lang="en"
# Never more than 2 $M$, whatever the number of ranks. This is why data parallelism scales so far. What grows is the
# number of messages, 2(n − 1) one after the other, and what *shrinks* is the work that the sending can hide behind.
#
# Let us estimate a step. The model is simple: computing costs 6 operations for each parameter and token (2 forward,
# 4 backward); a ring costs α for each message and bytes / bandwidth; and sending can hide behind backward, not behind
# forward. The speeds are round numbers that we *assume*, not measurements. For a model of 7 billion parameters and a
# batch of $2^{22}$ (4,194,304) tokens:

# %%
SPEED = 4e14  # operations a second that one GPU sustains
NETWORKS = {  # seconds a message, bytes a second
    "400 Gbit/s": (1e-5, 50e9),
    "300 GB/s": (5e-6, 300e9),  # inside one machine; beyond 8 ranks a thought experiment
    "10 Gbit/s": (5e-5, 1.25e9),
}


def exchange(parameters, ranks, network):
    """Seconds of a ring all-reduce of 16-bit gradients (2 bytes each): an estimate."""
    alpha, bandwidth = NETWORKS[network]
    return 2 * (ranks - 1) * alpha + 2 * (ranks - 1) / ranks * 2 * parameters / bandwidth


def step_seconds(parameters, tokens, ranks, network):
    """Forward, backward, sending, and the step with as much sending hidden as can be: an estimate."""
    forward, backward = 2 * parameters * tokens / SPEED, 4 * parameters * tokens / SPEED
    sending = exchange(parameters, ranks, network)
    return forward, backward, sending, forward + max(backward, sending)


for n in (1, 64, 1024):
    *_, sending, step = step_seconds(7e9, 2**22 / n, n, "400 Gbit/s")
    print(f"{n:>5,} ranks: sending {sending:.2f} s, step {step:6.2f} s, all GPUs {n * step:.0f} s")

# %% [markdown] lang="en"
# The same for any number of ranks, as a picture. It needs a function:


# %%
PER_STEP = {"4,194,304 for all": lambda n: 2**22 / n, "16,384 a rank": lambda n: 2**14}


def draw_step(network, tokens):
    ranks = [2**k for k in range(11)]
    times = [step_seconds(7e9, PER_STEP[tokens](n), n, network) for n in ranks]
    forward, backward, sending, step = map(list, zip(*times, strict=True))
    computing = [f + b for f, b in zip(forward, backward, strict=True)]
    drawing, (panel,) = viz.figure(7, 3.3)
    panel.loglog(ranks, computing, color=viz.PALETTE[1], marker="o", label="computing")
    panel.loglog(ranks, backward, color=viz.PALETTE[1], ls="--", label="of it backward")
    panel.loglog(ranks[1:], sending[1:], color=viz.PALETTE[5], marker="s", label="sending")
    panel.loglog(ranks, step, color=viz.INK, lw=2, label="step, sending hidden if possible")
    panel.set(xlabel="ranks", ylabel="seconds (estimate)", ylim=(0.05, 500), xticks=ranks[::2])
    panel.set_xticks(ranks[::2], [f"{n:,}" for n in ranks[::2]], minor=False)
    panel.minorticks_off()
    panel.legend(frameon=False, fontsize=9)
    share = computing[-1] / step[-1]
    panel.set_title(f"7B model: 1,024 ranks compute {share:.0%} of the time", fontsize=10)
    last = f"computing {computing[-1]:.2f} s, sending {sending[-1]:.2f} s, step {step[-1]:.2f} s"
    text = f"Estimate for a 7B model, {network}, tokens: {tokens}. 1,024 ranks: {last}."
    return viz.describe(drawing, text)


# %% [markdown] lang="en"
# 300 GB/s is a speed inside one machine. Machines of 8 GPUs have it; beyond 8 ranks it is a thought experiment.
#
# **Before you move it:** 1,024 ranks compute for some share of each step, and wait for the network in the rest. On
# which network, and with which way of counting tokens, is the share more than nine tenths?

# %%
prediction = None  # for instance ["10 Gbit/s, for all", "400 Gbit/s, a rank"]

explore(draw_step, network=NETWORKS, tokens=PER_STEP)

# %%
print("you wrote:", prediction)
for network, (counting, per_rank) in itertools.product(NETWORKS, PER_STEP.items()):
    forward, backward, _, step = step_seconds(7e9, per_rank(1024), 1024, network)
    print(f"{network:<12} {counting:<18} computing {(forward + backward) / step:4.0%} of the step")

# %% [markdown] lang="en"
# With a fixed number of tokens for all, computing shrinks with every rank that you add and sending does not. To the
# right of where the line of sending crosses that of backward, more ranks help little. With a fixed number of tokens *a
# rank*, 1,024 ranks work nearly as well as 4, or as badly. But then the batch grows with the ranks, and beyond some
# size, the *critical batch size* (McCandlish et al. 2018), a larger batch teaches the model little more per step.
#
# Where do they cross? Backward takes 4 $P t/S$ seconds for $t$ tokens on a rank and speed $S$. Sending takes close to
# 4 $P/B$ for bandwidth $B$, if we leave latency out. The parameters cancel: **sending hides behind backward if a rank
# has at least $S/B$ tokens a step**, however large the model.
#
# Latency comes on top: 2(n − 1)α, for a small model as for a large one. On 1,024 ranks and 400 Gbit/s it is 0.02 s.
# For 7 billion parameters, whose bytes take 0.56 s, it hardly counts. For 125 million, whose bytes take 0.01 s, it is
# two thirds of the sending. So a small model on many ranks needs more than $S/B$ tokens: see the table in section 14.

# %%
for network, (_, bandwidth) in NETWORKS.items():
    enough = SPEED / bandwidth
    for parameters in (1e8, 7e9, 1e12):
        sending = 2 * 2 * parameters / bandwidth  # many ranks, latency left out
        assert abs(4 * parameters * enough / SPEED - sending) < 1e-9 * sending
    print(f"{network:<12} at least {enough:>9,.0f} tokens a rank and step")

# %% [markdown] lang="en"
# The document's list of drawbacks says that data parallelism can hardly use its resources to the full (3.3.2). It
# depends, and now you can say on what. Above $S/B$ tokens a rank, the ranks hardly wait; below, they wait for the
# network.
#
# **Exercise:** [task 03a.6](../exercises/03a_data_parallel.ipynb): predict the bytes.
#
# ## 9. Memory: what a replica costs
#
# A rank's complete copy of the model is called a **replica**. While training with Adam, four numbers are kept for
# each parameter: the weight, its gradient, and two that Adam remembers, a mean of recent gradients and a mean of their
# squares. Those two are the **optimizer state**. In float32 each has 4 bytes.
#
# **Predict:** how many bytes does each of four ranks keep for our GPT in float32, and how many would one process keep?

# %%
prediction = None  # (each of four ranks, one process)


def kept(tokens, targets, mesh):
    model = parallelize(fresh(torch.float32), mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    model.step(tokens, targets)
    optimizer.step()
    weights = sum(p.nbytes for p in model.parameters())
    gradients = sum(p.grad.nbytes for p in model.parameters())
    state = sum(s["exp_avg"].nbytes + s["exp_avg_sq"].nbytes for s in optimizer.state.values())
    return weights, gradients, state


four = world.run(kept, tokens, targets, Mesh(dp=4))
with World(1) as single:
    one = single.run(kept, tokens, targets, Mesh())
print(f"you wrote: {prediction} - each of four: {sum(four[0]):,}, one process: {sum(one[0]):,}")
assert four == one * 4 == [(4 * P, 4 * P, 8 * P)] * 4 and sum(four[0]) == 16 * P

# %% [markdown] lang="en"
# 16 bytes a parameter, with four ranks as with one. Each rank keeps the whole optimizer state, 8 bytes a parameter
# here, though all copies of it are equal.
#
# In **mixed precision**, the usual way for large models, it is 16 again: 2 for a 16-bit weight, 2 for its gradient, and
# 12 for the optimizer, which keeps a 32-bit weight and its two numbers. For a model of 7 billion parameters:

# %%
parts = {"weights": 2, "gradients": 2, "optimizer": 12}
ranks = (1, 8, 64)
sizes = {part: [per * 7e9 / 1e9] * len(ranks) for part, per in parts.items()}
assert sum(parts.values()) * 7e9 == 112e9 and sizes["optimizer"] == [84.0] * 3
names = ["1 rank", "each of 8 ranks", "each of 64 ranks"]
viz.show(viz.draw_bars(names, sizes, "GB", "A 7B model with Adam in mixed precision"))

# %% [markdown] lang="en"
# The bars do not shrink. 112 GB on each rank, 84 of them optimizer state, do not fit a GPU of 80 GB, and no number of
# GPUs changes that, as long as each keeps all of it. The document says that data parallelism "may lead to lack of
# memory" (3.3.2). More exactly: it does not cause the lack, it does not cure it. A replica needs what one process
# needs. What does fall is the memory for **activations**, the intermediate results that backward needs: they go with
# the rows on a rank.
#
# It also lists lower cost as an advantage. Computing is the same work whether one rank does all rows or four do a
# quarter each, and sending comes on top. The hours fall, the *GPU-hours*, which are what one pays for, do not: see the
# last column of the estimate in section 8.
#
# ## 10. Between the two halves of an all-reduce
#
# After the sum, all four ranks hold the same gradient, take the same step, and keep the same optimizer state. Three of
# them do it for nothing. Could each do a quarter of it?
#
# An all-reduce is a *reduce-scatter* and an *all-gather* (chapter 2b). After the first half each rank has the sum of
# one quarter of the gradient, its **share**. The second half brings the shares to everyone. Now, to update a quarter
# of the weights, a quarter of the gradient is enough: Adam treats each number by itself. So take the step *between* the
# two halves, and gather weights instead of gradients. This is stage 1 of **ZeRO**, the *zero redundancy optimizer*
# (Rajbhandari et al. 2020). Four ranks with four weights, for real. The weights begin at 18, 28, 38 and 48, and the
# step is SGD's, −0.1 × gradient:


# %%
def four_weights():
    axis = connect(Mesh(dp=4))["dp"]
    gradients = torch.tensor([10.0, 20, 30, 40]) + axis.index  # of this rank's rows
    mean = reduce_scatter(gradients, axis) / axis.size
    stepped = torch.tensor([18.0, 28, 38, 48])[axis.index] - 0.1 * mean  # of one weight only
    return gradients, mean, stepped, all_gather(stepped, axis)


moments = ("each rank's gradients", "reduce-scatter, ÷ 4", "step", "all-gather: weights")
held = zip(*world.run(four_weights), strict=True)
table = {what: [x.tolist() for x in ranks] for what, ranks in zip(moments, held, strict=True)}
viz.show(viz.draw_tensors(table, hue=lambda value: int(value / 10) - 1))

# %% [markdown] lang="en"
# **Question.** Train our GPT like this, with AdamW in float64, for three steps. How many bytes does each rank send in
# a step? How many bytes of optimizer state does it keep, when one process keeps 2 $M$? And how far from the weights of
# one process does it end?
#
# All shares must be equally long, so zeros are put behind the last number where they do not divide: **padding**.

# %%
prediction = None  # (bytes sent in a step, bytes of state, distance)


def padded(flat, axis):
    return F.pad(flat, (0, -len(flat) % axis.size))  # at most size - 1 zeros


def my_share(tensors, axis):
    flat = torch.cat([x.detach().flatten() for x in tensors])
    return padded(flat, axis).view(axis.size, -1)[axis.index].clone()


def sharded_step(model, own, optimizer, axis):
    """own: this rank's share of the weights, all that `optimizer` knows of."""
    own.grad = reduce_scatter(padded(gradient(model), axis), axis) / axis.size  # the first half,
    optimizer.step()
    whole = all_gather(own, axis)  # and the second
    nn.utils.vector_to_parameters(whole, model.parameters())  # what is behind them is padding
    model.zero_grad()


# %%
def train_in_shares(batches):
    axis, model = connect(Mesh(dp=4))["dp"], fresh()
    own = my_share(model.parameters(), axis)
    optimizer = torch.optim.AdamW([own], lr=1e-3)
    with ledger() as book:
        for batch in batches:
            mean_loss(model, *my_rows(axis, *batch)).backward()
            sharded_step(model, own, optimizer, axis)
    state = sum(x.nbytes for x in optimizer.state[own].values() if x.dim())  # all but the number of steps
    return nn.utils.parameters_to_vector(model.parameters()).detach(), book.bytes("dp"), state


def train_alone(batches):
    model = fresh()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for batch in batches:
        optimizer.zero_grad()
        mean_loss(model, *batch).backward()
        optimizer.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


# %%
three = batches[:3]
start = nn.utils.parameters_to_vector(fresh().parameters()).detach()
moved_alone = train_alone(three) - start
for after, sent, state in world.run(train_in_shares, three):
    off = distance(after - start, moved_alone)
    assert off < 1e-9 and sent == 3 * 2 * 3 / 4 * M and state == 2 * M / 4
print("you wrote:", prediction)
print(f"each rank: {sent // 3:,} bytes a step, {state:,} bytes of state, distance {off:.0e}")

# %% [markdown] lang="en"
# The bytes of an all-reduce, a quarter of the state, a quarter of the optimizer's work, and the weights of one process.
# There are two conditions:
#
# - The optimizer must be **elementwise**: what it does to a number depends on that number's gradients only. SGD,
#   momentum and Adam are. One that works on whole matrices, such as Shampoo or Muon, needs them in one place.
# - **Clipping** needs the norm of the *whole* gradient. Each rank sums the squares of its share, and one number more
#   goes around. A rank that clips by the norm of its share alone has a bug that no loss curve shows.
#
# **The package's version**, `parallelize(..., zero=1)`. A `Unit` is what a bucket was, parameters that travel together:

# %%
viz.show_source(zero.Unit.start_reduce, zero.Unit.finish_reduce, zero.Shares.refresh)

# %% [markdown] lang="en"
# What is better than in ours: gradients are views into the unit, and the share of the weights is a view into the whole
# ones, so nothing is packed and nothing unpacked. Each unit's reduce-scatter sets off from the hooks while backward
# runs, as in section 4. The second half cannot hide there, since it comes after the step. `refresh` starts it for all
# units before it waits for the first.
#
# **Exercise:** [task 03a.10](../exercises/03a_data_parallel.ipynb): take the step between the two halves.
#
# ## 11. Gradients in shares
#
# After the reduce-scatter a rank reads its share of the gradient and nothing of the rest. Why keep the rest? In
# **stage 2** it is dropped: 4 bytes a parameter become 4/n.
#
# There is a price. Section 5 let `backward()` add up the gradients of several microbatches, and sent them once. But
# they were added up in whole gradients. Without these, each microbatch's gradient has to go to its owners at once.
#
# **Question.** How many bytes does a rank send in a step, weights included, with 1, 2 and 4 microbatches? Count in
# units of 3/4 $M$, of which stage 1 sends two.

# %%
prediction = None  # for instance [2, 2, 2]


def accumulate_shares(tokens, targets, microbatches):
    axis, model = connect(Mesh(dp=4))["dp"], fresh()
    share = torch.zeros_like(my_share(model.parameters(), axis))
    batch = [rows(x, microbatches) for x in my_rows(axis, tokens, targets)]
    with ledger() as book:
        for part in zip(*batch, strict=True):
            (mean_loss(model, *part) / microbatches / axis.size).backward()
            share += reduce_scatter(padded(gradient(model), axis), axis)
            model.zero_grad()  # nothing whole is left
        all_gather(share, axis)  # the step and its weights, as before: here only for its bytes
    return share, book.bytes("dp")


# %%
found = []
for microbatches in (1, 2, 4):
    shares, sent = zip(*world.run(accumulate_shares, *twice, microbatches), strict=True)
    assert distance(torch.cat(shares)[:P], alone) < 1e-12  # side by side they are the gradient of one process
    found.append(sent[0] / (3 / 4 * M))
    assert found[-1] == microbatches + 1
print("you wrote:", prediction, "- measured:", found)

# %% [markdown] lang="en"
# $m + 1$: one reduce-scatter for each of $m$ microbatches, and one all-gather. With one microbatch it is stage 1's
# traffic, with less memory. With many it is half an all-reduce for each of them.
#
# One can have it the other way, and keep whole gradients until the end of the step: then it sends 2 units again, and
# keeps what stage 1 keeps. It is a trade of memory for bytes, and `parallelize` lets you choose: `zero=2`, and
# `whole_gradients=True` for the second way.
#
# Mind the word *keep*: a gradient that is under way needs its room until it has arrived. The package sends the
# gradients of a unit as soon as they are there, and lets two units be under way at most.
#
# **Exercise:** [task 03a.11](../exercises/03a_data_parallel.ipynb): mend shares that forget the padding.
#
# ## 12. Weights in shares
#
# What does a rank need whole weights for? To run forward and backward. But it runs one block at a time. In
# **stage 3** a rank keeps only its share of each block. Just before a block runs, its weights are gathered; just
# after, they are freed. In backward the same again. (PyTorch calls this *fully sharded data parallel*, FSDP.)
#
# For an attempt we need three tools of PyTorch. `functional_call(part, weights, x)` runs a module with weights that it
# is given. `checkpoint(f, x)` forgets what `f` computed in forward and runs it again when backward needs it, so what
# `f` gathers is gone when it ends. And an `autograd.Function` has a backward of our own: the way back through an
# all-gather is a reduce-scatter.


# %%
class Whole(torch.autograd.Function):
    """Shares become the whole. Backward: gradients of the whole become shares of their sum."""

    @staticmethod
    def forward(ctx, own, axis):
        ctx.axis = axis
        return all_gather(own, axis)

    @staticmethod
    def backward(ctx, gradient):
        return reduce_scatter(gradient, ctx.axis), None


def run_part(part, own, axis, note, x):
    whole = Whole.apply(own, axis)
    note(whole)
    sizes = [p.numel() for p in part.parameters()]
    pieces = whole[: sum(sizes)].split(sizes)
    named = zip(part.named_parameters(), pieces, strict=True)
    return functional_call(part, {name: piece.view_as(p) for (name, p), piece in named}, x)


# %% [markdown] lang="en"
# **Question.** The model in six parts: embedding, four blocks, head. How many bytes does a rank send in a step with 1
# and 2 microbatches, again in units of 3/4 $M$? And how many bytes of gathered weights are there at most at a time:
# about $M$, $M$/2, or $M$/5?

# %%
prediction = None  # (units for 1 microbatch, units for 2, most at a time)


def weights_in_shares(tokens, targets, microbatches):
    axis, model, alive, there = connect(Mesh(dp=4))["dp"], fresh(), weakref.WeakSet(), []
    parts = [model.embed, *model.blocks, nn.Sequential(model.norm, model.head)]
    shares = [my_share(part.parameters(), axis).requires_grad_() for part in parts]
    model.to("meta")  # shapes stay, numbers go

    def note(whole):
        alive.add(whole)  # a WeakSet forgets what is freed
        there.append(sum(x.nbytes for x in alive))

    batch = [rows(x, microbatches) for x in my_rows(axis, tokens, targets)]
    with ledger() as book:
        for x, wanted in zip(*batch, strict=True):
            for part, own in zip(parts, shares, strict=True):
                x = checkpoint(run_part, part, own, axis, note, x, use_reentrant=False)
            loss = F.cross_entropy(x.flatten(0, 1), wanted.flatten())
            (loss / microbatches / axis.size).backward()
    return [own.grad for own in shares], book.bytes("dp"), max(there)


# %%
found = []
for microbatches in (1, 2):
    shares, sent, most = zip(*world.run(weights_in_shares, tokens, targets, microbatches), strict=True)
    whole = torch.cat([x for part in zip(*shares, strict=True) for x in part])  # part by part, rank by rank
    assert distance(whole, alone) < 1e-12
    found.append(sent[0] / (3 / 4 * M))
    assert found[-1] == 3 * microbatches and 0.2 < max(most) / M < 0.22
print(f"you wrote: {prediction} - measured: {found}, at most {max(most) / M:.2f} M of weights at a time")

# %% [markdown] lang="en"
# $3m$: for each microbatch the weights are gathered for forward and once more for backward, and the gradients are
# scattered. At most one block is whole at any time.
#
# **The package's version**, `zero=3`, wraps the forward of each block:

# %%
viz.show_source(zero.gather_around, zero._exchange, zero._Gather)

# %% [markdown] lang="en"
# Three things are better than in ours:
#
# - **No second forward.** `checkpoint` computes each block twice. What backward needs of forward are activations and
#   weights, and only the weights went away. So a unit empties the *memory* of its weights (`resize_(0)`) and fills it
#   again in the same place. All that PyTorch remembered about them is valid again.
# - **The next one is on its way.** `ahead` starts the gather of the block that comes next (in backward, of the one
#   before), so it travels while this one computes. Then two blocks are whole at a time, not one.
# - **In backward it comes in time.** `_Gather` does nothing in forward. It stands at the end of a block, so in
#   backward it is the first thing that is met, just before the block's own gradients are computed.
#
# What is in no block (embedding, last norm, head) is one more unit, gathered for each forward and for each backward.
#
# ## 13. What a stage keeps, and what it sends
#
# For $P$ parameters on $n$ ranks in float32 with Adam, and a step of $m$ microbatches (Rajbhandari et al. 2020, who
# count one microbatch):
#
# | stage | weights | gradients | optimizer state | elements sent by each rank, times (n − 1)/n |
# |---|---|---|---|---|
# | 0: replicas | 4 P bytes | 4 P | 8 P | 2 P |
# | 1 | 4 P | 4 P | 8 P/n | 2 P |
# | 2 | 4 P | 4 P/n | 8 P/n | (m + 1) P, or 2 P with whole gradients |
# | 3 | 4 P/n | 4 P/n | 8 P/n | 3 m P |
#
# This is what is kept between two steps. Strictly, $P$ counts the padding, too. Does the package keep to the table?
#
# **Predict:** how many bytes does each of four ranks keep for our GPT at stages 1, 2 and 3? Stage 0 was 16 $P$, in
# section 9.

# %%
prediction = None  # (stage 1, stage 2, stage 3)


def bytes_kept(stage, ranks, parameters, each=(4, 4, 8)):
    """Weights, gradients, optimizer state of one rank; `each`: bytes a parameter."""
    return [size * parameters / (ranks if stage >= 3 - i else 1) for i, size in enumerate(each)]


def elements_sent(stage, ranks, parameters, microbatches):
    return (2, 2, microbatches + 1, 3 * microbatches)[stage] * (ranks - 1) / ranks * parameters


def measured(tokens, targets, mesh, stage, microbatches):
    model = parallelize(fresh(torch.float32), mesh, zero=stage, microbatches=microbatches)
    optimizer = torch.optim.AdamW(model.parameters())
    with ledger() as book:
        model.step(tokens, targets)
    optimizer.step()
    units = [unit for shares in model.shares.values() for unit in shares.units]
    weights = sum(u.whole.untyped_storage().nbytes() for u in units)  # at stage 3 freed: empty
    weights += sum(u.own.nbytes for u in units) if stage == 3 else 0  # before, a view into them
    gradients = sum(u.gradient.nbytes or u.own_gradient.nbytes for u in units)
    state = sum(s["exp_avg"].nbytes + s["exp_avg_sq"].nbytes for s in optimizer.state.values())
    padding = sum(u.padded for u in units) - P
    return (weights, gradients, state), book.bytes("dp"), padding, len(units)


# %%
kept_at = {0: four[0]}  # of section 9
for n, stage, microbatches in itertools.product((4, 3), (1, 2, 3), (1, 4)):
    with World(n) as some:
        answers = some.run(measured, *twice, Mesh(dp=n), stage, microbatches)
    for (weights, gradients, state), sent, padding, units in answers:
        formula = bytes_kept(stage, n, P + padding)
        assert 0 <= padding < n * units  # less than a number a rank and unit
        assert [weights, gradients] == formula[:2] and state <= formula[2]  # padding has no state
        travels = 4 * elements_sent(stage, n, P + padding, microbatches)
        assert abs(sent - travels - 2 * (n - 1) / n * 16) < 1  # 16: loss and count, section 5
    assert sum(state for (*_, state), *_ in answers) == 8 * P  # each number has one owner
    if n == 4:
        kept_at[stage] = answers[0][0]
    else:
        case = f"3 ranks, stage {stage}, m = {microbatches}"
        print(f"{case}: padding {padding}, sends {sent:,} bytes")
found = [f"{sum(kept_at[stage]):,}" for stage in (1, 2, 3)]
print("you wrote:", prediction, "- each of 4 ranks:", *found)

# %% [markdown] lang="en"
# To the byte, padding included. (Padding grows with the number of units: stage 3 has one for each block and one for the
# rest, here five, the others only one.) As a picture:

# %%
names = ["0: replicas", "1: states shared out", "2: and gradients", "3: and weights"]
parts = ("weights", "gradients", "optimizer state")
sizes = {part: [kept_at[stage][i] / 1e6 for stage in range(4)] for i, part in enumerate(parts)}
viz.show(viz.draw_bars(names, sizes, "MB on each of 4 ranks, float32, measured", "Stages of ZeRO"))

# %% [markdown] lang="en"
# And the law: raw gradients, then three steps of AdamW, in float64 against one process.


# %%
def train_at(stage, tokens, targets, batches):
    model = parallelize(fresh(), Mesh(dp=4), zero=stage, microbatches=2)
    model.step(tokens, targets)
    first = whole_gradient(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for batch in batches:
        model.step(*batch)
        optimizer.step()
    return first, torch.cat([w.flatten() for w in model.full_state_dict().values()])


for stage in range(4):
    for got, after in world.run(train_at, stage, tokens, targets, three):
        off, moved = distance(got, alone), distance(after - start, moved_alone)
        assert off < 1e-12 and moved < 1e-9
    print(f"stage {stage}: distance of the gradients {off:.0e}, of three steps of AdamW {moved:.0e}")

# %% [markdown] lang="en"
# (Why not 1e-12 for Adam? It divides by the gradient's size, so where a gradient is all but zero, its last digits
# count as much as the first digits of another.)
#
# ### Large models
#
# In mixed precision the three parts have 2, 2 and 12 bytes. The paper's own example is a model of 7.5 billion
# parameters on 64 ranks. Its numbers come out of our function:

# %%
MIXED = (2, 2, 12)
paper = [sum(bytes_kept(stage, 64, 7.5e9, MIXED)) / 1e9 for stage in range(4)]
print("7.5B on 64 ranks:", *(f"{gigabytes:.4g} GB" for gigabytes in paper))
assert [round(gigabytes, 2) for gigabytes in paper] == [120, 31.41, 16.64, 1.88]

# %% [markdown] lang="en"
# **Before you move it:** a GPU of 80 GB. What is the first stage at which 70 billion parameters fit, and on how many
# ranks: 8, 16, 64 or 512? And who sends more in a step of 16 microbatches, stage 1 or stage 3, and how many times?

# %%
prediction = None  # (stage, ranks, times)

MODELS = {"7 billion": 7e9, "70 billion": 7e10, "405 billion": 4.05e11}
ABOVE = {"textcoords": "offset points", "bbox": {"fc": "white", "ec": "none", "pad": 0.3}}


def short(number):
    return f"{number:,.0f}" if number >= 1000 else f"{number:.4g}"


# %%
def draw_stages(parameters, ranks, microbatches):
    count, places = MODELS[parameters], range(4)
    drawing, (memory, traffic) = viz.figure(8, 3.2, columns=2)
    kept = [[size / 1e9 for size in bytes_kept(i, ranks, count, MIXED)] for i in places]
    sent = [2 * elements_sent(i, ranks, count, microbatches) / 1e9 for i in places]
    for i, part in enumerate(("weights", "gradients", "optimizer state")):
        below = [sum(sizes[:i]) for sizes in kept]
        size = [sizes[i] for sizes in kept]
        look = {"color": viz.PALETTE[i], "ec": viz.INK, "lw": 0.6, "label": part}
        memory.bar(places, size, bottom=below, **look)
    memory.axhline(80, color=viz.INK, ls="--", lw=1, label="80 GB")
    memory.legend(frameon=False, fontsize=8)
    traffic.bar(places, sent, 0.6, color=viz.PALETTE[5], ec=viz.INK, lw=0.6)
    for panel, totals in ((memory, [sum(sizes) for sizes in kept]), (traffic, sent)):
        panel.set(xlabel="stage", xticks=places, ylim=(0, 1.12 * max(*totals, 1)))
        for i, total in enumerate(totals):
            panel.annotate(short(total), (i, total), (0, 3), ha="center", fontsize=8, **ABOVE)
    memory.set_title("GB on each rank, mixed precision", fontsize=10)
    traffic.set_title(f"GB sent in a step, microbatches: {microbatches}", fontsize=10)
    listed = "; ".join(f"stage {i}: {short(sum(kept[i]))} and {short(sent[i])}" for i in places)
    text = f"{parameters} parameters, {ranks} ranks. GB kept and GB sent: {listed}."
    return viz.describe(drawing, text)


# %%
explore(draw_stages, parameters=MODELS, ranks=[8, 16, 64, 512], microbatches=[1, 4, 16])

# %%
cases = itertools.product(range(4), (8, 16, 64, 512))
first = next((i, n) for i, n in cases if sum(bytes_kept(i, n, 7e10, MIXED)) < 80e9)
times = elements_sent(3, 64, 1, 16) / elements_sent(1, 64, 1, 16)
print(f"you wrote: {prediction} - {first}, stage 3 sends {times:g} times as much")
assert first == (3, 16) and times == 24

# %% [markdown] lang="en"
# ### When does a stage pay?
#
# Bytes matter where they cannot hide. With section 8's estimate, take 16-bit weights and a microbatch of $t$ tokens on
# a rank. Stage 3 gathers 2 $P$ bytes under a forward of 2 $Pt/S$ seconds, and gathers and scatters 4 $P$ bytes under a
# backward of 4 $Pt/S$. Both hide if $t \ge S/B$. It is the threshold of section 8, but there $t$ were the tokens of
# the backward that sends, and only one did. Here **each microbatch** needs them.
#
# **Predict:** 7 billion parameters, 64 ranks, $2^{22}$ tokens a step, so 65,536 on a rank. They are cut into 1, 4 or 16
# microbatches. On 400 Gbit/s, in which of these cases does stage 3 wait for the network? And stage 1?

# %%
prediction = None  # for instance {"stage 1": [16], "stage 3": [1, 4, 16]}


def waiting(stage, parameters, tokens, microbatches, network):
    """Seconds of a step that sending adds, hidden as well as can be: an estimate.

    Latency and (n - 1)/n are left out. Stages 1 and 2 gather weights under the next forward.
    """
    forward = 2 * parameters * tokens / microbatches / SPEED
    backward, half = 2 * forward, 2 * parameters / NETWORKS[network][1]  # of an all-reduce
    gather, scatter = max(0, half - forward), max(0, half - backward)
    both = max(0, 2 * half - backward)
    by_stage = both, gather + scatter, gather + microbatches * scatter, microbatches * (gather + both)
    return by_stage[stage]


print("you wrote:", prediction)
for network, stage in itertools.product(NETWORKS, (0, 1, 2, 3)):
    waits = [waiting(stage, 7e9, 2**16, m, network) for m in (1, 4, 16)]
    computing = 6 * 7e9 * 2**16 / SPEED
    listed = " ".join(f"{x:6.2f} s" for x in waits)
    print(f"{network:<12} stage {stage}: waits {listed}, beside {computing:.2f} s of computing")
    if network == "400 Gbit/s":  # 16 microbatches cost stages 0 to 2 a fraction of a second
        assert waits[:2] == [0, 0] and waits[2] > 0 and (waits[2] > 1) == (stage == 3)

# %% [markdown] lang="en"
# - **Stage 1** sends what replicas send, and keeps less. What it saves depends on $n$: of 16 bytes a parameter, 10 are
#   left on 2 ranks, 5.5 on 8, and never less than 4. There is little reason not to take it.
# - **Stage 2** costs nothing more with one microbatch. With many, on a slow network, keep whole gradients.
# - **Stage 3** is for models whose weights alone are too much. It pays where a microbatch has $S/B$ tokens on a rank:
#   on a fast network, with few and large microbatches. On a slow one it waits in each of them. There the other ways
#   to cut a model, those of later chapters, are worth a look: they send activations, not weights.

# %%
left = {n: sum(bytes_kept(1, n, 1, MIXED)) for n in (2, 8, 10**6)}
assert left[2] == 10 and left[8] == 5.5 and 4 < left[10**6] < 4.001

# %% [markdown] lang="en"
# ## 14. When is data parallelism alone enough?
#
# Three conditions, and each is one comparison:


# %%
def obstacles(parameters, ranks, tokens, network, memory=80e9, context=4096):
    """What stands against data parallelism alone, for a step of so many tokens: an estimate."""
    found = []
    if 16 * parameters > memory:
        fits = [i for i in range(4) if sum(bytes_kept(i, ranks, parameters, MIXED)) <= memory]
        stage = f"stage {fits[0]} fits" if fits else "no stage fits"
        found.append(f"a replica needs {16 * parameters / 1e9:,.0f} GB ({stage})")
    if tokens / context < ranks:
        found.append(f"{tokens / context:,.0f} rows for {ranks:,} ranks")
    _, backward, sending, _ = step_seconds(parameters, tokens / ranks, ranks, network)
    if sending > backward:
        found.append(f"sending = {sending / backward:.1f} × backward")
    return found


for name, parameters in (("125M", 125e6), ("1.3B", 1.3e9), ("7B", 7e9), ("70B", 70e9)):
    for ranks in (8, 256, 1024):
        network = "300 GB/s" if ranks == 8 else "400 Gbit/s"
        found = obstacles(parameters, ranks, 2**22, network)
        print(f"{name:>5} on {ranks:>5,} ranks, {network:<12}", "; ".join(found) or "enough")

# %% [markdown] lang="en"
# - **It is enough** when a replica fits one device with room for the activations, when the batch has a row for every
#   rank, and when a rank has enough tokens to hide the sending. Then take it: nothing is simpler, and nothing sends
#   less often.
# - **It is not enough** when a replica does not fit. Then the ranks share it out, by one of the stages above, or the
#   model itself is cut, so that a rank computes a part of it only; often both. Replicas are not enough either when so
#   many ranks share a batch that the sending shows. ZeRO does not help there, since it sends no less. Then some of the
#   ranks should do something else than take rows of their own.
#
# ## 15. The whole thing: `parallelize`
#
# The package does all of this in one line: `parallelize(model, Mesh(dp=4))`. Its `step` runs forward and backward for
# every microbatch, with the exchange under the last backward, and divides by the global count:

# %%
viz.show_source(minipar.train.Parallel.step)

# %% [markdown] lang="en"
# Most of it you know: rows cut for ranks and microbatches, `attach` and `finish`, the loss as sum and count, and
# `_refresh` with the gathers of section 10. Skip the lines with `_gather_heads`, `_sum_partial` and `_sum_tied`: they
# do nothing here. (They are for other axes of the mesh; the randomness is for dropout.) The executor in the middle
# runs forwards and backwards in the order of a schedule, and arms the hooks before the last backward.
#
# `guess` is a small trick. The division comes before the first backward, but how many labels count, only the ranks
# together know. So `step` divides by the number of labels, counting or not. Where all count, that was right and
# nothing is left to do; else the gradients are scaled once, at the end.
#
# **Predict:** we hold `parallelize` against one process, with 8 rows and with 10, with one and two microbatches. How
# far apart are the gradients? Then both take one step of SGD. How far apart are the steps?

# %%
prediction = None  # (gradients, steps)


def the_law(tokens, targets, mesh, microbatches):
    model = parallelize(fresh(), mesh, microbatches=microbatches)
    loss = model.step(tokens, targets)
    got = whole_gradient(model)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    after = torch.cat([w.flatten() for w in model.full_state_dict().values()])
    return loss.item(), got, after


start = torch.cat([p.detach().flatten() for p in fresh().parameters()])
print("you wrote:", prediction)
eight = (tokens, targets)
for batch, wanted, microbatches in (eight, alone, 1), (eight, alone, 2), (ten, alone_ten, 2):
    for _, got, weights in world.run(the_law, *batch, Mesh(dp=4), microbatches):
        off, moved = distance(got, wanted), distance(weights - start, -0.1 * wanted)
        assert off < 1e-12 and moved < 1e-12
    case = f"rows: {len(batch[0])}, microbatches: {microbatches}"
    print(f"{case}, distance of gradients {off:.0e}, of the step {moved:.0e}")

# %% [markdown] lang="en"
# And the run itself, recorded on all four ranks: two microbatches, each forward and backward. Everyone does the same
# in the same order, and nobody waits for anybody before the last backward: where a rank pauses earlier, your cores
# were busy with another one. It is the simplest timeline in this course.
#
# The exchange is not drawn: it hides in the last B. Gray at the start is a rank that got its turn later, gray at the
# end one that was through and waited for the sums.


# %%
def timeline(tokens, targets):
    model = parallelize(fresh(torch.float32), Mesh(dp=4), microbatches=2)
    for _ in range(2):  # the first step is for warming up
        model.step(tokens, targets)
    return model.timeline()


run = world.run(timeline, tokens, targets)[0]
viz.show(viz.draw(run, title="Mesh(dp=4), recorded on this machine"))

# %% [markdown] lang="en"
# ## What you have now
#
# - **data parallelism**: whole model everywhere, other rows on each rank, one sum of gradients a step.
# - **bucket**: many gradients in one call. **[overlap](../docs/glossary.md#overlap)**: a bucket sets off while backward
#   still runs.
# - **microbatch, accumulation**: several backwards, one exchange; the bytes do not depend on how many.
# - **sum and count** travel, not means.
# - **the gradient law**: raw gradients, float64, against one process. A loss curve is no test.
# - **replica**: 16 bytes a parameter with Adam, on each rank, however many ranks there are.
# - **ZeRO**: optimizer state (1), gradients (2), weights (3) in shares. The step stands between reduce-scatter and
#   all-gather. Stages 0 and 1 send 2 $P$ elements a step, 2 sends $(m+1)P$, 3 sends $3mP$, times (n − 1)/n.
#
# ## Four questions to take along
#
# 1. A model has 1 billion parameters and 16-bit gradients. How many bytes does each of 8 ranks send in a step with 32
#    microbatches?
# 2. A colleague doubles the ranks, keeps the global batch, and finds that the step does not get faster. What do you ask
#    first?
# 3. Why does the loss of a run with AdamW not tell you whether gradients were summed or averaged, and what does?
# 4. The model of question 1 trains in mixed precision at stage 3, on the 8 ranks and with the 32 microbatches. How many
#    bytes does each rank keep, and how many does it send in a step?
#
# <details><summary>Answers</summary>
#
# 1. 2 × 7/8 × 2 GB = 3.5 GB, once a step, whatever the number of microbatches.
# 2. How many tokens a rank has in a step. Below $S/B$ (speed over bandwidth) the sending no longer hides behind
#    backward.
# 3. Adam divides by the gradient's own size, so a constant factor cancels. One gradient against one process, in
#    float64, shows it at once.
# 4. It keeps 16/8 = 2 bytes a parameter, 2 GB in place of 16. It sends 3 × 32 × 7/8 × 2 GB = 168 GB, 48 times as much.
#
# </details>

# %%
assert 2 * 7 / 8 * 2e9 == 3.5e9  # the first answer above
assert sum(bytes_kept(3, 8, 1e9, MIXED)) == 2e9 and 2 * elements_sent(3, 8, 1e9, 32) == 168e9 == 48 * 3.5e9

# %% [markdown] lang="en"
# **Next:** [the exercises](../exercises/03a_data_parallel.ipynb), eleven graded tasks:
#
#     python -m minipar grade exercises/03a_data_parallel.ipynb
#
# And a first look at the other thing to do when a replica does not fit. The mesh has more axes, which cut the model
# itself. The function `the_law` above does not care. Give it a mesh on which two ranks share each matrix (`tp`), or
# each has half of the layers (`pp`), and compare with one process again:

# %%
for mesh in (Mesh(dp=2, tp=2), Mesh(dp=2, pp=2), Mesh(pp=2, tp=2)):
    for _, got, _ in world.run(the_law, tokens, targets, mesh, 2):
        assert distance(got, alone) < 1e-12
    print(f"{mesh}: distance to one process {distance(got, alone):.0e}")
world.close()
folder.cleanup()
