# %% [markdown] lang="en"
# # Pipeline parallelism
#
# A model that does not fit on one device can be cut between its layers: the first device has the first layers, the
# second one the next. Each such slice is a **[stage](../docs/glossary.md#stage)**. Activations travel down from stage
# to stage, gradients travel back up. That is **[pipeline parallelism](../docs/glossary.md#pipeline-parallelism)**.
#
# If you gave up on pipelines elsewhere: four things usually come at once, a cut through autograd,
# [microbatches](../docs/glossary.md#microbatch), messages that must not block each other, and an order of work with a
# strange name. Here we take them one at a time, in six small steps. Each ends with something that works, and you can
# take a break after any of them. At the end you can
#
# - cut a model in two, and carry the gradient across the cut by hand;
# - accumulate gradients over microbatches, and catch the mistake that a loss curve hides;
# - draw what two stages do with three microbatches, on paper;
# - find out before a run whether an order of work will hang;
# - write a pipeline in three short functions that trains on real ranks, and gives what one process gives;
# - derive the order that large runs use, [1F1B](../docs/glossary.md#1f1b), from a rule of one sentence, and say what it
#   costs in time and memory.
#
# **Time:** about two and a half hours, or six times 20 minutes. **You need:** [Ranks and
# collectives](02b_ranks_and_collectives.ipynb), sections 1 to 4; [Data parallelism](03a_data_parallel.ipynb) helps,
# but is not needed. The chapter mirrors section 3.2.3 of the document that this course follows and tests, an article
# in Chinese: 《大规模语言模型从理论到实践 混合并行》.
#
# **How to read it.** Write your prediction into the cell before you run it. Where it says *your turn*, a cell has a
# line to replace; one answer follows in a folded cell. Everything also runs if you change nothing.
#
# ## Three questions to warm up
#
# 1. Two ranks each call `send` first, then `recv`. What happens?
# 2. A model has 7 billion parameters, and training it takes 16 bytes a parameter. How much does each of 8 ranks keep
#    if the layers are shared out evenly?
# 3. `backward()` runs twice on the same model, without `zero_grad()` in between. What is in `p.grad`?
#
# <details><summary>Answers</summary>
#
# 1. Each waits until the other one receives, which never comes: a deadlock.
# 2. 14 GB in place of 112. This is what the chapter is for.
# 3. The sum of both gradients.
#
# </details>

# %%
import weakref
from collections import Counter
from contextlib import contextmanager
from itertools import combinations, product

import torch
import torch.nn.functional as F
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from torch import nn

import minipar
from minipar import Config, Costs, Mesh, RankError, World, bubble, connect, corpus, gpipe, one_f_one_b, simulate, viz
from minipar.collectives import bounds, isend, recv, send
from minipar.data import rows
from minipar.pipeline import Executor, Stages, _ask_window
from minipar.schedule import Action, Op, communicate, depends_on, in_flight
from minipar.timeline import Deadlock
from minipar.widgets import explore

assert 7e9 * 16 == 112e9 and 112 / 8 == 14  # the second answer above

# %% [markdown] lang="en"
# ## 1. A model in two pieces
#
# No ranks yet. Everything in this section happens in one process, so you can look at every number.
#
# The model is the small GPT of this course, in float64, so that whatever differs by more than the last digits is a
# bug and no rounding error. The batch is 12 rows of 32 tokens of Python's documentation.

# %%
torch.set_num_threads(1)  # as each rank has
config = Config()  # 4 blocks of width 128
batch = tokens, targets = next(corpus.batches(steps=1, rows=12, context=32))


def fresh(config=config):
    torch.manual_seed(0)  # the same seed, so the same weights, in every process
    return minipar.gpt(config).double()


def gradients(model):
    """Name -> gradient, of the parameters that have one."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def distance(got, wanted):
    """The largest difference, as a share of the largest number."""
    assert got.keys() == wanted.keys()
    off = max((got[name] - wanted[name]).abs().max() for name in wanted)
    return (off / max(x.abs().max() for x in wanted.values())).item()


# %% [markdown] lang="en"
# First the truth that everything in this chapter is compared with: the whole model, the whole batch, one process.

# %%
model = fresh()
logits = model(tokens)
F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
alone = gradients(model)

P, tensors = sum(g.numel() for g in alone.values()), len(alone)
print(f"{P:,} parameters in {tensors} tensors, each with its gradient")

# %% [markdown] lang="en"
# A GPT is a list of layers: an embedding, some blocks, a norm and a head. So a stage is a slice of that list. `bounds`
# says where to cut: for 4 blocks and 2 stages at 0, 2 and 4.


# %%
def stage(model, index, count):
    """A slice of the model: its share of the blocks. The first one also embeds, the last one also predicts."""
    start, end = bounds(len(model.blocks), count)[index : index + 2]
    layers = list(model.blocks[start:end])
    if index == 0:
        layers = [model.embed, *layers]
    if index == count - 1:
        layers = [*layers, model.norm, model.head]
    return nn.Sequential(*layers)  # calls one after the other


model = fresh()
first, second = stage(model, 0, 2), stage(model, 1, 2)
for name, part in (("first", first), ("second", second)):
    print(f"{name:<7}", *(type(layer).__name__ for layer in part))
assert torch.equal(second(first(tokens)), logits)
print("one after the other, they give what the whole model gives")

# %% [markdown] lang="en"
# Forward was easy. Now backward. If we called `backward()` here, PyTorch would walk through both halves, because it
# remembers how every number was made. But the halves will live in two processes, and **what is sent is only numbers**.
# How they were made stays behind. `detach()` does the same to a tensor: the same numbers, without their history. So we
# put it where the message will be.
#
# **Question.** Then `backward()` starts from the loss. Which parameters get a gradient: all, those of the first half,
# those of the second half, none?

# %%
prediction = None

y = first(tokens)  # what the first half gives
x = y.detach()  # what the second half will receive: numbers
loss = F.cross_entropy(second(x).flatten(0, 1), targets.flatten())
loss.backward()

got = gradients(model)
print("you wrote:", prediction)
print(f"with a gradient: {len(got)} of {tensors}, from {next(iter(got))} to {list(got)[-1]}")
assert set(got) == {name for name in alone if name.startswith(("blocks.2", "blocks.3", "norm", "head"))}
assert distance(got, {name: alone[name] for name in got}) == 0

# %% [markdown] lang="en"
# The second half has its gradients, and they are right to the last bit. Backward stopped at the cut. The first half
# has none. What is missing? The first half needs to know how the loss changes when *its output* changes. Nobody but
# the second half can say, and it can: for the second half, `x` is an input, and PyTorch computes gradients of inputs,
# too. One has to ask for it with `requires_grad_()`.
#
# **Question.** What shape will `x.grad` have?

# %%
prediction = None  # a tuple of numbers

model.zero_grad()
y = first(tokens)
x = y.detach().requires_grad_()  # the only new thing
loss = F.cross_entropy(second(x).flatten(0, 1), targets.flatten())
loss.backward()

print("you wrote:", prediction, "- it is", tuple(x.grad.shape))
assert x.grad.shape == x.shape == (12, 32, 128)

# %% [markdown] lang="en"
# The shape of `x`: one number for each number that crossed the cut. This is what travels back. And the first half?
# `backward()` is mostly called on a loss. But it can start anywhere, if you hand it the gradient of the tensor that
# you call it on: `y.backward(x.grad)`.

# %%
y.backward(x.grad)  # the first half goes on where the second one stopped

print(f"with a gradient: {len(gradients(model))} of {tensors}")
print(f"distance to one process: {distance(gradients(model), alone):.0e}")
assert distance(gradients(model), alone) < 1e-12

# %% [markdown] lang="en"
# **First success.** Two halves, joined by nothing but numbers, give the gradient of the whole model. Here are the four
# steps in a picture:


# %%
def draw_the_cut():
    drawing, (panel,) = viz.figure(8, 2.5)
    halves = (0.2, "embed, block 0, block 1"), (6.2, "block 2, block 3, norm, head")
    for i, (left, inside) in enumerate(halves):
        look = {"boxstyle": "round,pad=0.1", "fc": viz.PALE, "ec": viz.INK}
        panel.add_patch(FancyBboxPatch((left, 0.3), 3.6, 2.4, **look))
        panel.text(left + 1.8, 2.35, f"stage {i}", ha="center", weight="bold")
        panel.text(left + 1.8, 1.95, inside, ha="center", fontsize=9)
    steps = ((0.35, 1.5, "1  y = first(tokens)"), (6.35, 1.5, "2  loss = ... second(x)"))
    steps += ((6.35, 0.6, "3  loss.backward()"), (0.35, 0.6, "4  y.backward(x.grad)"))
    for left, height, text in steps:
        panel.text(left, height, text, fontsize=9, family="monospace")
    for ends, height, text in ((((3.95, 6.05), 1.58, "x: 12 × 32 × 128")), ((6.05, 3.95), 0.68, "x.grad: as many")):
        start, end = ((at, height) for at in ends)
        color = viz.COLORS[Op.F] if height > 1 else viz.COLORS[Op.B]
        panel.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=16, lw=2.5, color=color))
        panel.text(5, height + 0.14, text, ha="center", fontsize=9)
    panel.set(xlim=(0, 10), ylim=(0, 3))
    panel.axis("off")
    return viz.describe(drawing, "Two boxes. 1: stage 0 computes y from the tokens and sends it as x. 2: stage 1 "
        "computes the loss. 3: it runs backward and sends x.grad. 4: stage 0 runs backward from there.")  # fmt: skip


viz.show(draw_the_cut())

# %% [markdown] lang="en"
# The numbers 1 to 4 are the order. Between steps 1 and 4 the first stage has to *keep* what its forward computed,
# because its backward will need it. Remember this; it is where the memory of a pipeline goes.
#
# Section 3.2.3 of the document describes a pipeline in three steps: divide the training process into stages, run the
# stages in parallel, pass the output of each stage to the next. What you have just done makes two things more exact.
# The stages are slices of the *model*, not of the training process. And passing outputs on is half of it: without the
# gradients that come back, only the last stage would learn.
#
# **Exercise:** [task 03c.2](../exercises/03c_pipeline_parallel.ipynb): carry the gradient across the cut.
#
# ## 2. The same in small portions
#
# Look at the picture again. While stage 0 does step 1, stage 1 has nothing to do, and the other way around. Cutting a
# model gives room, not speed. The document's second step, run the stages in parallel, is impossible with one batch.
#
# The way out is to cut the batch, too. While stage 1 works on one piece, stage 0 can work on the next. The pieces are
# called **microbatches**. Before we let anything run at the same time, we make sure that cutting the batch changes no
# result. Still one process.
#
# This function carries one microbatch across the cut and back: the four steps above. The loss is a *sum* over the
# tokens of the microbatch, divided by a `count` that we choose.


# %%
def carry(first, second, tokens, targets, count):
    y = first(tokens)
    x = y.detach().requires_grad_()
    loss = F.cross_entropy(second(x).flatten(0, 1), targets.flatten(), reduction="sum") / count
    loss.backward()
    y.backward(x.grad)
    return loss.item()


# %% [markdown] lang="en"
# `backward()` *adds* to `p.grad`. So after the last microbatch the sum over all of them is there. This is **[gradient
# accumulation](../docs/glossary.md#gradient-accumulation)**.
#
# **Your turn.** The cell below carries only the first of three microbatches. Make it a loop over all of them:
# `rows(tokens, 3)` gives a list of three pieces. By which `count` must each loss be divided, so that the sum is the
# gradient of the mean over the whole batch?


# %%
def my_accumulation(model, tokens, targets, microbatches):
    first, second = stage(model, 0, 2), stage(model, 1, 2)
    pieces = list(zip(rows(tokens, microbatches), rows(targets, microbatches), strict=True))
    carry(first, second, *pieces[0], count=targets.numel())  # your loop in place of this line


model = fresh()
my_accumulation(model, tokens, targets, 3)
print(f"distance to one process: {distance(gradients(model), alone):.1e} (below 1e-12 is right)")


# %% jupyter={"source_hidden": true}
# One answer: every loss is divided by the tokens of the whole batch
def accumulate(model, tokens, targets, microbatches, divided=True):
    first, second = stage(model, 0, 2), stage(model, 1, 2)
    loss = 0.0
    for some, wanted in zip(rows(tokens, microbatches), rows(targets, microbatches), strict=True):
        count = targets.numel() if divided else wanted.numel()
        loss += carry(first, second, some, wanted, count)
    return loss if divided else loss / microbatches


for microbatches in (1, 3, 5, 12):
    model = fresh()
    accumulate(model, tokens, targets, microbatches)
    assert distance(gradients(model), alone) < 1e-12
print("1, 3, 5 and 12 microbatches: the gradient of one process")

# %% [markdown] lang="en"
# **Second success.** Five microbatches of 12 rows are not equally large, 2 or 3 rows each. Since the loss is a sum
# divided by the count of the *whole* batch, that does not matter.
#
# ### The mistake that everybody makes once
#
# The usual loss function gives a *mean*. It is natural to call it on each microbatch, then `backward()`, and to forget
# that the means must be averaged, not summed. (In the cell above: `divided=False`. Each loss is then divided by its own
# microbatch's tokens.)
#
# **Question.** With $m = 4$ microbatches of equal size, how much larger are the gradients? And if you train 15 steps
# with AdamW, how does the loss curve look beside the right one: higher, lower, the same, does it explode?

# %%
prediction = None  # (times larger, the curve)


def train(divided, batches, microbatches=4):
    model = fresh()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        losses.append(accumulate(model, *batch, microbatches, divided))
        optimizer.step()
    return losses


batches = list(corpus.batches(steps=15, rows=12, context=32, seed=1))
right, wrong = train(True, batches), train(False, batches)
apart = max(abs(a - b) for a, b in zip(right, wrong, strict=True))
print("you wrote:", prediction)
print(f"after 15 steps: loss {right[-1]:.3f} and {wrong[-1]:.3f}, never more than {apart:.1g} apart")
assert right[0] == wrong[0] and apart < 1e-3

# %%
drawing, (panel,) = viz.figure(6.5, 2.8)
panel.plot(range(15), right, color=viz.PALETTE[0], lw=5, label="divided")
panel.plot(range(15), wrong, color=viz.PALETTE[6], lw=1.5, ls="--", label="not divided")
panel.set(xlabel="step of AdamW", ylabel="loss")
panel.legend(frameon=False)
alt = f"Two loss curves over 15 steps, from {right[0]:.2f} to {right[-1]:.2f}. They lie on top of each other."
viz.show(drawing, alt)

# %% [markdown] lang="en"
# You cannot see the mistake. Adam divides each gradient by its own recent size, so a factor that is always there
# cancels. It comes back where gradients are used as they are: clipping at a norm of 1 cuts four times as early, the
# gradient norm in your logs is four times too large, and with SGD the learning rate is. One comparison in float64
# shows it at once:

# %%
model = fresh()
accumulate(model, tokens, targets, 4, divided=False)
off = distance(gradients(model), alone)
print(f"not divided: distance to one process {off:.6f}")
assert abs(off - 3) < 1e-9  # gradients 4 times too large: 4 - 1 = 3 times too much

# %% [markdown] lang="en"
# The gradients are exactly $m$ times too large. **A loss curve is no test; the gradient of one process is.** We will
# use it after every step from here on.
#
# **Exercise:** [task 03c.3](../exercises/03c_pipeline_parallel.ipynb): microbatches add up, with rows of different
# lengths.
#
# ## 3. On paper
#
# Take a sheet of squared paper. Two stages, so two rows. Three microbatches, numbered 0, 1, 2. Write `F1` for the
# forward of microbatch 1 and `B1` for its backward. A forward takes one square, a backward two (for each matrix it
# computes two gradients: of the weights and of the input). There are three rules:
#
# - **F** of a microbatch on stage 1 waits for its F on stage 0 (it needs the activations).
# - **B** of a microbatch on the last stage waits for its own F there.
# - **B** on stage 0 waits for the B on stage 1 (it needs the gradients).
#
# A stage does one thing at a time. Draw it, with as few empty squares as you can.
#
# **Question.** With *one* microbatch, how many squares are used, and which share of both rows is empty? And with
# three: after how many squares is your drawing done?

# %%
prediction = None  # (squares, share empty) with one; squares with three


# %% [markdown] lang="en"
# To check your drawing, write it down: one line of text a stage, in the order from left to right. `simulate` then
# starts each action as early as the rules allow, and `viz.draw` draws it. In minipar such a list of lists of actions is
# called a **[schedule](../docs/glossary.md#schedule)**, and it is plain data: no tensors, no processes.


# %%
def schedule(*lines):
    """One line of text a stage, such as "F0 F1 B0 B1", as a schedule: a list of actions for each rank."""
    return [[Action(Op(a[0]), rank, int(a[1:])) for a in line.split()] for rank, line in enumerate(lines)]


one = simulate(schedule("F0 B0", "F0 B0"))
print(f"one microbatch: {one.end:g} squares, {bubble(one):.0%} of the rows empty")
assert one.end == 6 and bubble(one) == 0.5
viz.show(viz.draw(one, title="one microbatch", unit="squares"))

# %% [markdown] lang="en"
# (The picture says *rank*, because each stage will live on a rank of its own.) Half of the time of both is empty. Gray
# is idle time, and its share has a name: the **[bubble](../docs/glossary.md#bubble)**.
#
# **Your turn.** Replace the two lines below by your drawing. As they stand, each microbatch is carried through before
# the next one begins.

# %%
mine = schedule(
    "F0 B0 F1 B1 F2 B2",  # stage 0
    "F0 B0 F1 B1 F2 B2",  # stage 1
)
run = simulate(mine)
print(f"{run.end:g} squares, bubble {bubble(run):.0%}")
viz.show(viz.draw(run, title="your order", unit="squares"))

# %% [markdown] lang="en"
# Three microbatches one after the other take three times 6 squares: small portions alone help nothing either. It is
# the order that does it. Here are two answers. The first one does all forwards, then all backwards. In the second one,
# stage 1 turns each microbatch around as soon as it has it.

# %%
forwards_first = schedule("F0 F1 F2 B0 B1 B2", "F0 F1 F2 B0 B1 B2")
turn_around = schedule("F0 F1 B0 F2 B1 B2", "F0 B0 F1 B1 F2 B2")
for name, order in (("all forwards first", forwards_first), ("turn around at once", turn_around)):
    run = simulate(order)
    assert run.end == 12 and bubble(run) == 0.25
    viz.show(viz.draw(run, title=f"{name}: {run.end:g} squares", unit="squares"))

# %% [markdown] lang="en"
# 12 squares each, and a quarter of them empty. Can it be done in 11? Each stage has three F and three B, which are
# 9 squares. Stage 1 cannot begin before stage 0 has done one F. And when stage 1 has done its last B, stage 0 still
# has to do its own. That is 1 + 9 + 2 = 12: no order is faster. **Third success**, if your drawing has 12.
#
# **Exercise:** [task 03c.1](../exercises/03c_pipeline_parallel.ipynb): draw an order with a detour.
#
# ## 4. An order that hangs
#
# How many orders are there? If each stage takes microbatches in turn, it can mix its three F and three B in 5 ways.
# Two stages make 25 orders. Let the computer try them all.
#
# **Question.** How many of the 25 are done after 12 squares? And do all 25 get done?

# %%
prediction = None  # (done after 12, never done)


def mixes(microbatches):
    """All ways to mix F0 F1 ... and B0 B1 ..., where no B comes before its F."""
    for places in combinations(range(2 * microbatches), microbatches):
        names, counts = ["F" if i in places else "B" for i in range(2 * microbatches)], Counter()
        line = []
        for name in names:
            line.append(f"{name}{counts[name]}")
            counts[name] += 1
            if counts["B"] > counts["F"]:
                break
        else:
            yield " ".join(line)


def outcome(order, sends="buffered"):
    try:
        return f"{simulate(order, sends=sends).end:g} squares"
    except Deadlock:
        return "never done"


# %%
every_order = list(product(mixes(3), repeat=2))
found = Counter(outcome(schedule(*lines)) for lines in every_order)
print("you wrote:", prediction, f"- of {len(every_order)} orders:")
for result in sorted(found):
    print(f"  {result}: {found[result]}")
assert len(every_order) == 25 == found.total() and (found["12 squares"], found["never done"]) == (6, 11)

# %% [markdown] lang="en"
# Six are done after 12 squares, which nothing can beat. And 11 are never done. Here is one of those, and what the
# simulator says about it.

# %%
hangs = schedule("F0 B0 F1 B1 F2 B2", "F0 F1 B0 F2 B1 B2")
try:
    simulate(hangs)
except Deadlock as report:
    print(report)

# %% [markdown] lang="en"
# Stage 0 wants to see microbatch 0 come back before it sends the next one. Stage 1 wants the next one before it sends
# microbatch 0 back. A circle of two: a **deadlock**. It took no processes and no time to find it. On a cluster this
# order would stand still until a time limit ends it.
#
# ### When a send waits, too
#
# So far a stage that has computed something was free to go on: the message was under way by itself. In chapter 2b you
# met another kind of send, `send`, which returns only when the other side *has come to its receive*. This meeting is
# called a **[rendezvous](../docs/glossary.md#rendezvous-send)**. The simulator can do that, too, and then an order has
# more to wait for.
#
# **Question.** Back to the two good orders, `forwards_first` and `turn_around`. With `sends="rendezvous"`, which of
# the two still gets done?

# %%
prediction = None  # "both", "forwards_first", "turn_around" or "none"

print("you wrote:", prediction)
for name, order in (("forwards_first", forwards_first), ("turn_around", turn_around)):
    print(f"{name}: {outcome(order, 'buffered')}; with rendezvous: {outcome(order, 'rendezvous')}")
try:
    simulate(turn_around, sends="rendezvous")
except Deadlock as report:
    print(report)
assert outcome(turn_around, "rendezvous") == "never done" != outcome(forwards_first, "rendezvous")
viz.show(viz.draw_waits({0: 1, 1: 0}))

# %%
polite = Counter(outcome(schedule(*lines), "rendezvous") for lines in every_order)
print("the 25 orders with rendezvous:")
print(*(f"  {result}: {polite[result]}" for result in sorted(polite)), sep="\n")
assert polite["12 squares"] == 1

# %% [markdown] lang="en"
# Stage 0 has microbatch 1's activations in its hand and waits until stage 1 takes them. Stage 1 has microbatch 0's
# gradients in its hand and waits until stage 0 takes them. Both stand at the door and say *after you*. Nothing is wrong
# with the order of work; the sends are too polite. Of the six orders that were done after 12 squares, one is left: all
# forwards first. **Fourth success:** you have found a hang before it happened, and you know its two kinds. An order
# that is impossible must be changed. An order that is fine needs sends that do not wait.
#
# ## 5. Real ranks
#
# Now two processes, real messages, real gradients. All the parts are there; we put them into one function that
# follows a list. What do the two actions do?
#
# - **F**: get `x` (stage 0: from the batch; others: receive it). Compute `y`. Send it on (the last stage: make it the
#   loss). Keep `x` and `y`.
# - **B**: take the kept `x` and `y`. Get the gradient of `y` (the last stage needs none: `y` is the loss). Call
#   `backward`. Send `x.grad` back (stage 0: to nobody).
#
# Here is the first. `axis.index` is this rank's place in the pipeline, as in chapter 2b. `recv(like, axis, source)`
# reads from `like` only shape and type. `tell` is the function that sends, for now `send`.


# %%
def forward(part, axis, tokens, targets, count, tell):
    """F of one microbatch: gives what went into this stage, and what came out of it."""
    x = tokens
    if axis.index > 0:
        like = torch.empty(*tokens.shape, config.width, dtype=torch.float64)
        x = recv(like, axis, axis.index - 1).requires_grad_()
    y = part(x)
    if axis.index == axis.size - 1:
        y = F.cross_entropy(y.flatten(0, 1), targets.flatten(), reduction="sum") / count
    else:
        tell(y.detach(), axis, axis.index + 1)
    return x, y


# %% [markdown] lang="en"
# **Your turn.** Write the second: three lines, one for each sentence of B above. `y.backward(None)` is the same as
# `y.backward()`. As it stands, it does nothing. If your ranks wait for each other, you get a report after five
# seconds, and can go on at once.


# %%
def my_backward(x, y, axis, tell):
    pass  # your lines in place of this one


# %% jupyter={"source_hidden": true}
# One answer: get the gradient, go back, hand it on
def backward(x, y, axis, tell):
    given = None if axis.index == axis.size - 1 else recv(y, axis, axis.index + 1)
    y.backward(given)
    if axis.index > 0:
        tell(x.grad, axis, axis.index - 1)


# %% [markdown] lang="en"
# And the function that follows the list. There is nothing else to a pipeline:


# %%
def follow(model, order, tokens, targets, tell, back=backward):
    """One step of this rank. Gives the loss (0 but on the last stage), and the most microbatches kept at a time."""
    axis = connect(Mesh(pp=len(order)))["pp"]
    part, program = stage(model, axis.index, axis.size), order[axis.index]
    microbatches = len(program) // 2
    pieces = list(zip(rows(tokens, microbatches), rows(targets, microbatches), strict=True))
    kept, most, loss = {}, 0, 0.0
    for op, _, m in program:
        if op == "F":
            kept[m] = forward(part, axis, *pieces[m], targets.numel(), tell)
        else:
            x, y = kept.pop(m)
            back(x, y, axis, tell)
            loss += y.item() if axis.index == axis.size - 1 else 0.0
        most = max(most, len(kept))
    return loss, most


# %% [markdown] lang="en"
# Each rank builds the whole model, uses its slice, and gives back the gradients that it has. (A waste of memory, which
# the package's version below does not have.) Together they must be the gradients of one process.
#
# **Question.** How many bytes does each of the two ranks send in a step, with three microbatches? Would it be more
# with six? Each microbatch has its share of the 12 × 32 × 128 numbers of 8 bytes.

# %%
prediction = None  # (bytes of rank 0, bytes of rank 1, more with six?)


def one_step(order, tokens, targets, tell=send, back=backward):
    model = fresh()
    with minipar.ledger() as book:
        _, most = follow(model, order, tokens, targets, tell, back)
    return gradients(model), most, book.bytes("pp")


def together(answers):
    """The gradients of all ranks; each parameter is on one of them."""
    parts = [answer[0] for answer in answers]
    assert sum(map(len, parts)) == len(set().union(*parts))
    return {name: part[name] for part in parts for name in part}


two = World(2)
answers = two.run(one_step, forwards_first, *batch, back=my_backward)
missing = tensors - len(together(answers))
print(f"with your backward: {tensors - missing} of {tensors} gradients are there")

# %%
answers = two.run(one_step, forwards_first, *batch)
sent = [bytes_ for _, _, bytes_ in answers]
print("you wrote:", prediction, "- sent:", sent)
print(f"distance to one process: {distance(together(answers), alone):.0e}")
assert distance(together(answers), alone) < 1e-12
assert sent == [12 * 32 * 128 * 8] * 2

six = two.run(one_step, gpipe(2, 6), *batch)
assert [bytes_ for _, _, bytes_ in six] == sent and distance(together(six), alone) < 1e-12

# %% [markdown] lang="en"
# **Fifth success:** two processes, each with half of a model, train it as one. And they send little. Activations go
# one way, as many gradients the other way, and the number of microbatches only says in how many portions. How does
# that compare with data parallelism, where each of two ranks sends the whole gradient once a step (chapter 3a)?

# %%
print(f"pipeline: {sent[0]:,} bytes; data parallelism: {P * 8:,} bytes, {P * 8 / sent[0]:.0f} times as many")

# %% [markdown] lang="en"
# (It depends on the batch. A pipeline sends in proportion to the tokens, data parallelism to the parameters.)
#
# ### The other order
#
# `forwards_first` ran with plain `send`, as the simulator said. For `turn_around` it predicted a hang. A prediction is
# worth a test:

# %%
try:
    two.run(one_step, turn_around, *batch)
except RankError as report:
    print(report)

# %% [markdown] lang="en"
# Rank 0 in a send to 1, rank 1 in a send to 0: as predicted. The cure is a send that does not wait, `isend`. It
# returns at once, with an object whose `wait()` we call at the end of the step.


# %%
def without_waiting(order, tokens, targets, step=one_step):
    started = []
    result = step(order, tokens, targets, tell=lambda *message: started.append(isend(*message)))
    for pending in started:
        pending.wait()
    return result


answers = two.run(without_waiting, turn_around, *batch)
print(f"distance to one process: {distance(together(answers), alone):.0e}")
assert distance(together(answers), alone) < 1e-12
two.close()

# %% [markdown] lang="en"
# That is all. `follow` has no opinion on the order, and none on the number of stages. **Predict:** four stages on four
# ranks, six microbatches, all forwards first (`gpipe(4, 6)` gives that schedule). What do you have to change?

# %%
prediction = None

four = World(4)
answers = four.run(without_waiting, gpipe(4, 6), *batch)
print("you wrote:", prediction)
print(f"four stages: distance to one process {distance(together(answers), alone):.0e}")
assert distance(together(answers), alone) < 1e-12

# %% [markdown] lang="en"
# Nothing. The two ranks in the middle receive and send in both directions, and the code for it was there already.
#
# **Exercise:** [tasks 03c.6 and 03c.8](../exercises/03c_pipeline_parallel.ipynb): an executor of your own, held to
# its bytes and its memory, and ranks that all send first.
#
# ## 6. 1F1B, from one rule
#
# Two good orders for two stages you found on paper. What about four stages and eight microbatches? Nobody should have
# to write 64 actions by hand. Let each rank decide for itself, at each moment, what to do next.
#
# The function `greedy` plays that game: tick by tick, each rank looks at what it could do. `choose` gets
#
# - `ready`: a set, with `"F"` if the next forward could start now, and `"B"` if the next backward could;
# - `in_flight`: the **microbatches [in flight](../docs/glossary.md#in-flight)** on this rank, those with F done and B
#   not yet. For each of them the rank keeps activations;
# - `cap`: the number of stages from this one to the end, $p - r$ for rank $r$ of $p$.
#
# and returns `"F"`, `"B"`, or None to wait.


# %%
def greedy(stages, microbatches, choose):
    """The schedule that arises if each rank, tick by tick, does what `choose` picks. An action takes one tick."""
    done, programs = set(), [[] for _ in range(stages)]
    while len(done) < 2 * stages * microbatches:
        before = set(done)  # what happens elsewhere in this tick, a rank does not know yet
        for rank, program in enumerate(programs):
            forwards = sum(action.op == Op.F for action in program)
            backwards = len(program) - forwards
            following = Action(Op.F, rank, forwards), Action(Op.B, rank, backwards)
            possible = [a for a in following if a.microbatch < microbatches]
            ready = {a.op: a for a in possible if before.issuperset(depends_on(a, stages - 1))}
            if picked := choose(set(ready), forwards - backwards, stages - rank):
                program.append(ready[picked])
                done.add(ready[picked])
        if done == before:
            raise RuntimeError("nobody does anything any more")
    return programs


# %% [markdown] lang="en"
# (`depends_on` are the three rules of section 3, as a function of the package.) Start with the simplest choice: a
# forward, if there is one.


# %%
def forward_first(ready, in_flight, cap):
    if "F" in ready:
        return "F"
    if "B" in ready:
        return "B"
    return None


assert greedy(4, 8, forward_first) == gpipe(4, 8)
viz.show(viz.draw(simulate(greedy(4, 8, forward_first)), title="forward first", unit="forward passes"))

# %% [markdown] lang="en"
# All forwards, then all backwards. This is **[GPipe](../docs/glossary.md#gpipe)** (Huang et al. 2018,
# [arXiv:1811.06965](https://arxiv.org/abs/1811.06965)). Look at rank 0 just before its first backward: it keeps the
# activations of all eight microbatches. With 100 microbatches, it would keep 100. This limits the number of
# microbatches, and many are what makes the bubble small.
#
# The remedy is to be eager to finish: **do a backward if one is ready. Else do a forward, but only while fewer than
# $p - r$ microbatches are in flight.** A microbatch's activations are given up in its backward, so backward first
# keeps them few. The cap keeps rank 0 from running ahead of what can come back.
#
# **Your turn.** Write this rule. It is `forward_first` with two changes.


# %%
def my_rule(ready, in_flight, cap):
    if "F" in ready:
        return "F"
    if "B" in ready:
        return "B"
    return None


mine = greedy(4, 8, my_rule)
print("your rule gives 1F1B" if mine == one_f_one_b(4, 8) else "your rule gives another order")


# %% jupyter={"source_hidden": true}
# One answer: backward first, and a cap on the forwards
def the_rule(ready, in_flight, cap):
    if "B" in ready:
        return "B"
    if "F" in ready and in_flight < cap:
        return "F"
    return None


# %%
viz.show(viz.draw(simulate(greedy(4, 8, the_rule)), title="the rule", unit="forward passes"))
for stages, microbatches in product(range(1, 9), range(1, 17)):
    assert greedy(stages, microbatches, the_rule) == one_f_one_b(stages, microbatches)
    assert greedy(stages, microbatches, forward_first) == gpipe(stages, microbatches)
print("the same as minipar.one_f_one_b for 1 to 8 stages and 1 to 16 microbatches")

# %% [markdown] lang="en"
# Follow rank 0: some forwards until the pipe is full, then one forward, one backward, one forward, one backward, then
# the backwards that are left. Hence the name **1F1B**. You did not have to invent that pattern; it falls out of the
# rule. (It comes from PipeDream, Harlap et al. 2018, [arXiv:1806.03377](https://arxiv.org/abs/1806.03377). The form
# that waits for all backwards before the optimizer's step, as here, is used by Megatron-LM, Narayanan et al. 2021,
# [arXiv:2104.04473](https://arxiv.org/abs/2104.04473).) And `turn_around` of section 3 was 1F1B already:

# %%
assert turn_around == one_f_one_b(2, 3) and forwards_first == gpipe(2, 3)

# %% [markdown] lang="en"
# ### What it saves: memory
#
# **Question.** Four stages, 12 microbatches. How many microbatches are in flight at most, on each rank, in GPipe and
# in 1F1B? Read the two pictures above, or think of the cap.

# %%
prediction = None  # {"GPipe": [...], "1F1B": [...]}

SCHEDULES = {"1F1B": one_f_one_b, "GPipe": gpipe}
listed = {name: [in_flight(program) for program in make(4, 12)] for name, make in SCHEDULES.items()}
print("you wrote:", prediction)
print(listed)
for p, m in product(range(1, 9), range(1, 17)):
    assert [in_flight(program) for program in one_f_one_b(p, m)] == [min(m, p - r) for r in range(p)]
    assert [in_flight(program) for program in gpipe(p, m)] == [m] * p

# %% [markdown] lang="en"
# In 1F1B rank $r$ keeps $\min(m, p - r)$ microbatches, however many there are; in GPipe $m$. That is a count in a
# list. Does it hold for bytes, on real ranks? We count what PyTorch keeps for backward. `saved_tensors_hooks` calls a
# function of ours for each tensor that is kept, and `weakref.finalize` another one when it is given up. Weights and the
# batch are there anyway, and do not count.


# %%
class Keep:
    def __init__(self, tensor):
        self.tensor = tensor


@contextmanager
def counting_what_is_kept(*there):
    """Gives a list: the bytes that autograd keeps, after each change. Shared memory counts once, `there` not at all."""
    known = {x.untyped_storage().data_ptr() for x in there}
    uses, history = Counter(), [0]

    def change(memory, size, by):
        before = uses[memory] > 0
        uses[memory] += by
        history.append(history[-1] + size * ((uses[memory] > 0) - before))

    def keep(tensor):
        memory, box = tensor.untyped_storage(), Keep(tensor)
        if memory.data_ptr() not in known:
            change(memory.data_ptr(), memory.nbytes(), 1)
            weakref.finalize(box, change, memory.data_ptr(), memory.nbytes(), -1)
        return box

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda box: box.tensor):
        yield history


# %%
def step_with_memory(order, tokens, targets, tell):
    model = fresh()
    with counting_what_is_kept(*model.parameters(), tokens, targets) as history:
        _, most = follow(model, order, tokens, targets, tell)
    return gradients(model), most, max(history), history[-1]


kept = {}
for name, make in SCHEDULES.items():
    answers = four.run(without_waiting, make(4, 12), *batch, step=step_with_memory)
    assert distance(together(answers), alone) < 1e-12
    _, most, kept[name], left = zip(*answers, strict=True)
    assert list(most) == listed[name] and set(left) == {0}  # all is given up at the end
    print(f"{name:<6} microbatches in flight {list(most)}, MB kept", [f"{b / 1e6:.1f}" for b in kept[name]])
for r in range(4):  # exactly in proportion to the microbatches in flight
    assert kept["1F1B"][r] * 12 == kept["GPipe"][r] * (4 - r)

# %%
drawing, (panel,) = viz.figure(6.5, 2.8)
for (name, sizes), shift, color in zip(kept.items(), (-0.19, 0.19), viz.PALETTE, strict=False):
    places = [r + shift for r in range(4)]
    bars = panel.bar(places, [b / 1e6 for b in sizes], 0.36, color=color, ec=viz.INK, lw=0.6, label=name)
    panel.bar_label(bars, [f"{b / 1e6:.1f}" for b in sizes], fontsize=8, padding=2)
panel.set(ylabel="MB kept for backward, at most", ylim=(0, 1.3 * max(kept["GPipe"]) / 1e6))
panel.set_xticks(range(4), [f"rank {r}" for r in range(4)])
panel.legend(frameon=False, ncols=2, loc="upper right")
text = "; ".join(f"{name}: " + ", ".join(f"{b / 1e6:.1f}" for b in sizes) for name, sizes in kept.items())
viz.show(drawing, f"MB that ranks 0 to 3 keep for backward, at most, 12 microbatches, measured. {text}.")

# %% [markdown] lang="en"
# Byte for byte in proportion. On rank 0 GPipe keeps three times as much, with 24 microbatches it would be six times.
# Rank 0 keeps the most in 1F1B and the last rank the least. (The last rank's bars are higher than you may expect: its
# microbatches carry the logits, 512 numbers for each token.) GPipe's authors knew, and kept only what enters a stage;
# they computed the rest again in backward, for about a third more work.
#
# ### What it does not save: time
#
# **Question.** The same two schedules, F one unit, B two. Which is done first, and after how many units? And
# which share is bubble?

# %%
prediction = None  # (units of GPipe, units of 1F1B, bubble)

ends = {name: simulate(make(4, 12)).end for name, make in SCHEDULES.items()}
print("you wrote:", prediction, "-", ends, f"bubble {bubble(simulate(one_f_one_b(4, 12))):.1%}")
for p, m in product(range(1, 9), range(1, 17)):
    for make in SCHEDULES.values():
        run = simulate(make(p, m))
        assert run.end == 3 * (m + p - 1)
        assert abs(bubble(run) - (p - 1) / (m + p - 1)) < 1e-12

# %% [markdown] lang="en"
# A tie. 1F1B does not wait less, it keeps less. Why? The first stage can begin at once, the
# last one after $p - 1$ forwards. At the end, the gradient of the last microbatch goes up through $p - 1$ more
# backwards. So each rank is idle for $(p-1)(F + B)$ and computes for $m(F + B)$, in either order:
#
# $$\text{bubble} = \frac{p-1}{m + p - 1}$$
#
# For $p = 2$, $m = 3$ that is the quarter of section 3. What 1F1B buys is that you can *afford* a large $m$, and a
# large $m$ makes the bubble small.
#
# (Some papers, Narayanan et al. 2021 among them, divide by the time of the work, not by the length of the run, and
# write $(p-1)/m$. Both are in use. Ask which one, before you compare two numbers.)
#
# ## Watch it
#
# Now the real thing, recorded: minipar's `parallelize` runs the same list of actions, and writes down when each began
# and ended. Four ranks, 1F1B, eight microbatches. Above the simulator's prediction, below the record. For the
# prediction we take F = 1 and B = 2 forward passes; the record is in milliseconds of your machine.
#
# **Predict:** your laptop may have fewer than four free cores. How will the lower picture differ?

# %%
prediction = None


def recorded(tokens, targets, pace=None):
    model = minipar.parallelize(fresh().float(), Mesh(pp=4), microbatches=8, pace=pace)
    for _ in range(2):  # the first step is for warming up
        model.step(tokens, targets)
    return model.timeline()


def order_of(timeline):
    return [[s.action for s in timeline.of(rank) if s.action.op in (Op.F, Op.B)] for rank in range(4)]


long = next(corpus.batches(steps=1, rows=32, context=128))
run = four.run(recorded, *long)[0]
assert order_of(run) == one_f_one_b(4, 8)
viz.show(viz.compare(simulate(one_f_one_b(4, 8)), run))

# %% [markdown] lang="en"
# The order is the same, action by action (the cell asserts it). The lengths are not: where ranks share cores, an
# action takes longer while others compute, and gaps move. The simulator can share cores, too. For the same schedule:

# %%
ends = {cores: simulate(one_f_one_b(4, 8), cores=cores).end for cores in (4, 3, 2, 1)}
print("; ".join(f"cores: {cores}, length of the step: {end:.0f}" for cores, end in ends.items()))
assert ends[4] == 33 and ends[1] == 4 * 8 * 3  # one core does all the work, one after the other

# %% [markdown] lang="en"
# With one core nothing is gained: the step takes as long as the work of all ranks together. **On a laptop, trust order,
# bytes and memory; do not trust seconds.**
#
# There is a way to see the true shape all the same. With `pace=` the ranks do not compute: they *wait* for as long as
# the computation would take, and waiting needs no core. Everything else is real: four processes, messages, the order.
# (The loss is then NaN, "not a number", and gradients are zero: this is for looking, not for training.)
#
# We say 20 ms for a forward, and 20 each for the two halves of a backward. Now both pictures can have one unit.

# %%
pace = Costs(forward=0.02, backward_input=0.02, backward_weight=0.02)
predicted = simulate(one_f_one_b(4, 8), pace)
run = four.run(recorded, *batch, pace)[0]
assert order_of(run) == one_f_one_b(4, 8) and run.end >= predicted.end
print(f"predicted: {1000 * predicted.end:.0f} ms, bubble {bubble(predicted):.1%}")
viz.show(viz.compare(predicted, run, unit="ms"))

# %% [markdown] lang="en"
# There it is: the ramp, the steady middle where everyone alternates, the drain. The record is a little longer than the
# prediction, by what messages and the operating system take.
#
# ### The natural end: train with it
#
# **Sixth success.** Your own pipeline, `follow`, with the order from the rule, trains the GPT on four ranks: 15 steps
# of AdamW, each rank with an optimizer for its own slice. Beside it, one process that knows nothing of ranks.
#
# **Predict:** how far apart are the two loss curves after 15 steps?

# %%
prediction = None


def train_in_a_pipeline(order, batches):
    model, losses = fresh(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)  # skips parameters without a gradient
    for batch in batches:
        optimizer.zero_grad()
        loss, _ = without_waiting(order, *batch, step=lambda *how, tell: follow(model, *how, tell))
        optimizer.step()
        losses.append(loss)
    return losses


order = greedy(4, 6, the_rule)
losses = four.run(train_in_a_pipeline, order, batches)[-1]  # the last stage has the loss
apart = max(abs(a - b) for a, b in zip(losses, right, strict=True))
print("you wrote:", prediction, f"- apart: {apart:.0e}")
assert apart < 1e-9

# %%
drawing, (panel,) = viz.figure(6.5, 2.6)
panel.plot(range(15), right, color=viz.PALETTE[0], lw=5, label="one process")
panel.plot(range(15), losses, color=viz.INK, lw=1.2, ls="--", label="your pipeline, four ranks, 1F1B")
panel.set(xlabel="step of AdamW", ylabel="loss", xticks=range(0, 15, 5))
panel.legend(frameon=False)
viz.show(drawing, f"Loss of one process and of the pipeline over 15 steps: one curve, from {losses[0]:.2f} down.")

# %% [markdown] lang="en"
# (The one process has four microbatches and the pipeline six. As you know by now, that changes nothing.)
#
# **Exercise:** [tasks 03c.4 and 03c.5](../exercises/03c_pipeline_parallel.ipynb): GPipe and 1F1B as lists of actions.
#
# **You can stop here.** You have cut a model, carried gradients over the cut, met both kinds of deadlock, and written
# 1F1B. What follows is for another day: two things to play with, then how the package does it.
#
# ## 7. How many microbatches?
#
# **Before you move it:** four stages. How many microbatches does it take to bring the bubble down to 10%? What does it
# cost in each schedule? And which is worse for the bubble: twice the stages, or half the microbatches?

# %%
prediction = None


def draw_pipeline(stages, microbatches, schedule):
    order = SCHEDULES[schedule](stages, microbatches)
    run, most = simulate(order), in_flight(order[0])
    title = f"bubble {bubble(run):.0%}, rank 0 keeps {most}"
    drawing = viz.draw(run, title=title, unit="forward passes")
    case = f"{schedule}, stages: {stages}, microbatches: {microbatches}"
    return viz.describe(drawing, f"{case}. It takes {run.end:g} forward passes; {title}.")


many = [4, 1, 2, 8, 16, 32]
explore(draw_pipeline, stages=[4, 2, 8], microbatches=many, schedule=list(SCHEDULES))

# %%
enough = next(m for m in range(1, 100) if round(bubble(simulate(one_f_one_b(4, m))), 9) <= 0.1)
print(f"you wrote: {prediction} - {enough} microbatches; rank 0 keeps {enough} of them in GPipe and 4 in 1F1B")
assert enough == 27 and bubble(simulate(one_f_one_b(8, 8))) > bubble(simulate(one_f_one_b(4, 4)))
assert [f"{bubble(simulate(one_f_one_b(p, p))):.0%}" for p in (4, 8)] == ["43%", "47%"]

# %% [markdown] lang="en"
# The bubble depends on $m/p$ almost alone: 4 stages with 4 microbatches lose 43%, 8 with 8 47%. A common rule of thumb
# is $m \ge 4p$ (Huang et al. 2018), where the bubble is below 20%. But $m$ is not free: the batch has to have that many
# rows, and a microbatch that is too small leaves a GPU half idle inside each action.
#
# ### A slow stage
#
# Section 3.3.3 of the document names a drawback: the time of each stage has to be controlled precisely. Is that so?
#
# **Question.** Four stages, eight microbatches, 1F1B: 33 units. Now one stage, the third, takes twice as long for
# everything. The others are as before. How long does the step take?

# %%
prediction = None


def twice_for_the_third(action):
    return 2.0 if action.stage == 2 else 1.0


uneven = Costs(forward=twice_for_the_third, backward_input=twice_for_the_third, backward_weight=twice_for_the_third)
run = simulate(one_f_one_b(4, 8), uneven)
print(f"you wrote: {prediction} - {run.end:g} units, bubble {bubble(run):.0%}")
viz.show(viz.draw(run, title="the third stage takes twice as long", unit="forward passes"))
assert simulate(one_f_one_b(4, 8)).end == 33 and run.end == 55

# %% [markdown] lang="en"
# A quarter more work, and two thirds more time: **everyone waits for the slowest stage.** So the document's drawback
# holds, with one correction: it is not the schedule that one controls, it is the cut. In large models the first stage
# has the embedding and the last one the head, so they get fewer blocks: Llama 3 405B has one block less on the first
# and on the last stage for that reason (Llama Team 2024, [arXiv:2407.21783](https://arxiv.org/abs/2407.21783), section
# 3.3.2).
#
# ### A slow link
#
# So far messages took no time. **Question.** Eight stages, 24 microbatches, and each message takes a tenth of a
# forward. Is it still a tie between GPipe and 1F1B?

# %%
prediction = None  # the end of (GPipe, 1F1B)

slow = Costs(communication=0.1)
ends = {name: round(simulate(make(8, 24), slow).end, 3) for name, make in SCHEDULES.items()}
print("you wrote:", prediction, "-", ends)
assert simulate(gpipe(8, 24)).end == simulate(one_f_one_b(8, 24)).end == 93
assert ends == {"GPipe": 94.4, "1F1B": 98.4}

# %% [markdown] lang="en"
# No. Without messages both take 93. GPipe pays for each boundary once on the way down and once on the way up. In 1F1B
# the stages hand work to and fro all the time, and each turn pays the link. A few per cent of time for a fraction of
# the memory: a good bargain, but no free one.
#
# ## 8. The package's version
#
# **The schedule.** minipar's `one_f_one_b` writes the pattern down directly: a number of forwards to fill the pipe,
# pairs, and what is left. No simulation is needed, and you have checked that the lists are the same.

# %%
viz.show_source(one_f_one_b)

# %% [markdown] lang="en"
# **The communication.** Our `forward` and `backward` decide by rank whether to receive. minipar makes that part of the
# list: `communicate` puts sends and receives around the actions.
#
# **Predict:** where rank 1 receives activations, what stands on rank 0? And where rank 0 receives gradients, what
# stands on rank 1?

# %%
prediction = None

print("you wrote:", prediction)
for rank, program in enumerate(communicate(one_f_one_b(2, 2))):
    print(f"rank {rank}:", ", ".join(f"{a.op} {a.microbatch}" for a in program))

# %% [markdown] lang="en"
# Rank 0 has `load` where the others have `recv x`, and the last rank has `loss` where the others have `recv g`. The
# first and the last stage are no exceptions any more; they get their things from elsewhere. And look where receives
# stand: *before* the computation that comes before the one that needs them. A receive is posted early, so that the
# data can arrive while the rank still computes. `reduce` marks the last backward of a stage: from here on its
# gradients are final, and data parallelism may sum them.
#
# **The executor** carries out such a list. It has no opinion on the order, as our `follow` had none:

# %%
viz.show_source(Executor.run, Executor.load, Executor.forward, Executor.loss, Executor._backward)

# %% [markdown] lang="en"
# `self.DO[action.op]` finds the method for an action. You know what they do; three things are better than in ours:
#
# - **Shapes.** Our `forward` has to know that activations are rows × tokens × width. Here the first message of its kind
#   carries a note with the shapes ahead, so stages can send whatever a model passes from block to block.
# - **Sends never wait**, and receives are waited for where the data is needed (`_arrived`).
# - **`self.deferral`** can put off a part of the backward. That is for the next chapter.
#
# **The cut.** Ours made an `nn.Sequential` of layers. That works as long as blocks take one tensor and give one. Real
# models hand masks, positions and caches to each block, and the code for it is in the model's own `forward`. So minipar
# leaves that forward alone and opens a *window* on the list of blocks: each stage calls the whole forward, and each
# block asks whether it is its turn.

# %%
viz.show_source(Stages.__call__, _ask_window)

# %% [markdown] lang="en"
# Before the window a block gives NaN and computes nothing. At its beginning, what was received takes the place of the
# NaN. Behind its end the forward is left through an exception, `Leave`, which carries the state out. If a number from a
# block that is not here were ever used, the loss would be NaN, and not slightly wrong.
#
# **The memory.** What lives on other ranks is given up. **Predict** the share of the parameters on each of four ranks:
# a quarter each?

# %%
prediction = None


def through_the_package(batch, mesh, make, microbatches, config=config):
    model = minipar.parallelize(fresh(config), mesh, schedule=make, microbatches=microbatches)
    model.step(*batch)
    return model.full_gradients(), sum(p.numel() for p in model.parameters())


for make, microbatches in product(SCHEDULES.values(), (1, 5, 12)):
    answers = four.run(through_the_package, batch, Mesh(pp=4), make, microbatches)
    assert all(distance(got, alone) < 1e-12 for got, _ in answers)
held = [count for _, count in answers]
print("you wrote:", prediction, "- held:", [f"{count / P:.1%}" for count in held])
assert sum(held) == P

# %% [markdown] lang="en"
# A little more at both ends, for the embedding and the head. The cell has also checked the law: two schedules, three
# numbers of microbatches, and `full_gradients`, which collects the gradient from all ranks, is that of one process.
#
# **The hang.** `parallelize` simulates a schedule before the first step. The order from section 4 is refused, and no
# rank ever waits:

# %%
with World(2) as pair:
    try:
        pair.run(through_the_package, batch, Mesh(pp=2), lambda stages, microbatches: hangs, 3)
    except RankError as report:
        print(*str(report.exception).splitlines(), sep="\n")

# %% [markdown] lang="en"
# ## 9. One weight on two stages
#
# Many models use one matrix twice: to look tokens up at the beginning, and to predict them at the end. The embedding is
# **[tied](../docs/glossary.md#tied-embedding)** to the head. In a pipeline these two places are the first and the last
# rank.
#
# **Question.** Run our pipeline on a tied model. Both ranks start with equal copies of that matrix. Which of them gets
# the right gradient for it?

# %%
prediction = None  # "first", "last", "both" or "none"

tied = Config(tied=True)
model = fresh(tied)
accumulate(model, *batch, 1)
alone_tied = gradients(model)
NAME = "embed.token.weight"
assert "head.weight" not in alone_tied  # one matrix, one name


def tied_by_hand(order, tokens, targets, tell):
    model = fresh(tied)
    follow(model, order, tokens, targets, tell)
    return gradients(model)


parts = four.run(without_waiting, one_f_one_b(4, 6), *batch, step=tied_by_hand)
ends = parts[0][NAME], parts[3][NAME]
whole = alone_tied[NAME]
print("you wrote:", prediction)
for name, part in (("first", ends[0]), ("last", ends[1]), ("their sum", sum(ends))):
    print(f"{name:<9} distance to one process: {distance({NAME: part}, {NAME: whole}):.0e}")
assert distance({NAME: sum(ends)}, {NAME: whole}) < 1e-12

# %% [markdown] lang="en"
# Neither. Each rank sees one of the two uses, and the gradient of the matrix is the sum of both. If each rank took a
# step with its own part, the two copies would drift apart after the first step, and the model would not be tied any
# more. No error, no hang. So the two ranks exchange their parts once a step, and both add them up:

# %%
viz.show_source(minipar.train.Parallel._sum_tied)
answers = four.run(through_the_package, batch, Mesh(pp=4), one_f_one_b, 6, tied)
print(f"distance to one process: {max(distance(got, alone_tied) for got, _ in answers):.0e}")
assert all(distance(got, alone_tied) < 1e-12 for got, _ in answers)
four.close()

# %% [markdown] lang="en"
# Both add in the same order, that of the ranks. $a + b$ and $b + a$ are equal, but with a third copy the order of a sum
# decides on its last digit, and copies that differ in a digit drift.
#
# **Exercise:** [task 03c.7](../exercises/03c_pipeline_parallel.ipynb): one matrix on two ranks.
#
# ## What you have now
#
# - **stage**: a slice of the model's layers. Activations travel down, as many gradients travel back.
# - **the cut**: `detach`, `requires_grad_`, and `y.backward(x.grad)`.
# - **microbatch, accumulation**: each loss is divided by the count of the whole batch, or gradients are $m$ times too
#   large, and AdamW's loss curve does not show it.
# - **schedule**: a list of actions for each rank; plain data that can be simulated, run and drawn.
# - **deadlock**: an impossible order, or a good order with sends that wait. `simulate` finds both.
# - **bubble**: $(p-1)/(m+p-1)$, for GPipe and for 1F1B.
# - **microbatches in flight**: $m$ in GPipe, $\min(m, p - r)$ in 1F1B. This is what 1F1B is for.
#
# About section 3.2.3 of the document: stages divide the model; they work in parallel only if there are microbatches,
# and never all of the time; and results pass in both directions.
#
# ## Three questions to take along
#
# 1. A pipeline of 8 stages runs 56 microbatches. How large is the bubble, and how many microbatches does the first
#    stage keep in 1F1B?
# 2. A colleague replaces GPipe by 1F1B, and the step takes as long as before. Has something gone wrong?
# 3. A run with 1F1B hangs in its first step. Both neighbors stand in a send. What do you change: the schedule or the
#    sends?
#
# <details><summary>Answers</summary>
#
# 1. 7/63, a ninth. It keeps 8.
# 2. No. What 1F1B saves is memory; with it, one can use more microbatches, and these make the bubble small.
# 3. The sends: the order is possible, but two ranks that send first wait for each other. Use sends that do not wait.
#
# </details>

# %%
assert abs(bubble(simulate(one_f_one_b(8, 56))) - 7 / 63) < 1e-12  # the first answer
assert in_flight(one_f_one_b(8, 56)[0]) == 8

# %% [markdown] lang="en"
# **Next:** [the exercises](../exercises/03c_pipeline_parallel.ipynb), eight graded tasks, from a drawing to 1F1B on
# four ranks:
#
#     python -m minipar grade exercises/03c_pipeline_parallel.ipynb
#
# Then [Long context](03e_long_context.ipynb). If you want to know how the bubble shrinks further, read
# [Schedules](03d_schedules.ipynb) first; it is optional. A glimpse: one way gives each rank several thin slices in
# place of a thick one. Another one splits backward into the two halves that you saw as `backward_input` and
# `backward_weight`. Only the first is awaited by another rank, so the second can fill the gaps. With four ranks and
# eight microbatches each:

# %%
for make in (one_f_one_b, minipar.interleaved, minipar.zero_bubble_h1):
    costs = Costs(0.5, 0.5, 0.5) if make is minipar.interleaved else Costs()  # slices half as thick
    run = simulate(make(4, 8), costs)
    print(f"{make.__name__:<15} {run.end:4.1f} units, bubble {bubble(run):.0%}")

# %% [markdown] lang="en"
# ## References
#
# - Huang et al. 2018, *GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism*,
#   [arXiv:1811.06965](https://arxiv.org/abs/1811.06965).
# - Harlap et al. 2018, *PipeDream: Fast and Efficient Pipeline Parallel DNN Training*,
#   [arXiv:1806.03377](https://arxiv.org/abs/1806.03377).
# - Narayanan et al. 2021, *Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM*,
#   [arXiv:2104.04473](https://arxiv.org/abs/2104.04473).
# - Llama Team 2024, *The Llama 3 Herd of Models*, [arXiv:2407.21783](https://arxiv.org/abs/2407.21783).
