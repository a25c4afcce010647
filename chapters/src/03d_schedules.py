# %% [markdown] lang="en"
# # Schedules
#
# The pipeline of the last chapter works, and its ranks wait. With four ranks and eight microbatches, 1F1B leaves 27% of
# their time empty. The document that this course follows names that as a drawback of pipelines (section 3.3.3: hard to
# make full use of the resources) and leaves it there. It need not stay so large. In this chapter you fill the gaps, in
# several ways, and ask each what it costs. At the end you can
#
# - measure a bubble in two ways, and say when which one counts;
# - cut each rank's part into thin slices, derive the bubble $(p-1)/(vm)$, and say what that takes;
# - split a backward into two halves, by hand and with the package, and say what each half needs;
# - derive three schedules that split the backward, ZB-H1, ZB-H2 and ZB-V, each from a rule;
# - choose among them when the halves do not take as long, and when messages are not free;
# - say what all this gives on real ranks, and why it is little on your laptop;
# - write a schedule of your own, and see how it scores.
#
# **Time:** about two hours. **You need:** [Pipeline parallelism](03c_pipeline_parallel.ipynb), sections 1 to 6. This
# chapter is optional: no later one needs it. It belongs to section 3.2.3 of the document,
# 《大规模语言模型从理论到实践 混合并行》.
#
# **How to read it.** As before: write your prediction into the cell before you run it. Where it says *your turn*, an
# answer follows in the folded cell.
#
# ## Three questions to warm up
#
# 1. Four stages, eight microbatches, 1F1B. Which share of the rank time is bubble?
# 2. How many microbatches does rank $r$ of $p$ keep in 1F1B?
# 3. Two neighbors both stand in a send, and neither returns. Must you change the order of work?
#
# <details><summary>Answers</summary>
#
# 1. $(p-1)/(m+p-1) = 3/11$, 27%.
# 2. $\min(m, p - r)$. Rank 0 has the most.
# 3. Not necessarily. If the order is possible, sends that do not wait are enough.
#
# </details>

# %%
import json
import statistics
import time
from collections import Counter
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F

import minipar
from minipar import Config, Costs, Mesh, World, bubble, corpus, interleaved, ledger, one_f_one_b, simulate, viz

from minipar import zero_bubble_h1, zero_bubble_h2, zero_bubble_v  # isort: skip
from minipar.deferral import Deferral, WeightGradients, _Linear
from minipar.pipeline import Executor
from minipar.schedule import Action, Op, _zero_bubble, check, communicate, depends_on, in_flight, owners
from minipar.timeline import Deadlock, memory, peak
from minipar.widgets import SCHEDULES, schedule_explorer

torch.set_num_threads(1)  # as each rank has
assert bubble(simulate(one_f_one_b(4, 8))) == 3 / 11  # the first answer above

# %% [markdown] lang="en"
# ## 1. Where the gaps are
#
# A schedule is plain data: for each rank the list of its actions. `simulate` runs it, `viz.draw_schedule` shows what
# comes out: who does what, and below it how many microbatches each rank keeps. Here is the pipeline that you know, with
# $p = 4$ ranks and $m = 8$ microbatches. F takes one unit, B two.

# %%
viz.show(viz.draw_schedule(one_f_one_b(4, 8), name="1F1B"))

# %% [markdown] lang="en"
# **Question.** Count the idle units of rank 0, and those of rank 3. Which of the two waits more?

# %%
prediction = None  # (units of rank 0, units of rank 3)

run = simulate(one_f_one_b(4, 8))
idle = [run.end - sum(s.end - s.start for s in run.of(rank)) for rank in range(4)]
print("you wrote:", prediction, "- idle units, rank 0 to 3:", [f"{units:g}" for units in idle])
assert run.end == 33 and idle == [9] * 4

# %% [markdown] lang="en"
# Neither. Each rank works for 24 units and waits for 9. Rank 3 begins 3 forwards late, and after its last backward the
# gradient still has to climb through three backwards of 2 units each: $3 \times (1 + 2) = 9$. In general a rank waits
# for
#
# $$(p-1)(F + B)$$
#
# Three ways lead to less. The **ramp** at both ends could be steeper: thin slices, section 2. The climb could be
# quicker, and there could be **other work** for those who wait: split backwards, sections 3 to 6. Or one takes more
# microbatches: the ramp stays as it is, and the work grows.
#
# First, to have a number for all of them: **your turn.** Write the bubble of a timeline, the share of the rank time in
# which ranks do not compute. `timeline.spans` are tuples with `rank`, `action`, `start` and `end`; `timeline.end` is
# the length of the run, `timeline.ranks` the list of ranks.


# %%
def my_bubble(timeline):
    return None  # your lines in place of this one


print("you say", my_bubble(run), "- it is", bubble(run))


# %% jupyter={"source_hidden": true}
# One answer: the time in boxes, over the time of all rows
def share_of_idle_time(timeline):
    busy = sum(span.end - span.start for span in timeline.spans)
    return 1 - busy / (len(timeline.ranks) * timeline.end)


assert abs(share_of_idle_time(run) - bubble(run)) < 1e-12

# %% [markdown] lang="en"
# The package's version does the same. It also takes timelines with messages in them, which are no work. And it knows a
# second way to count, `of="stage"`, to which section 5 will come.

# %%
viz.show_source(bubble)

# %% [markdown] lang="en"
# ## 2. Thin slices
#
# Cut each rank's part of the model in two. There are then eight smaller stages, and a forward through one of them takes
# half a unit. Which ranks get which? Two ways: each rank keeps its two slices, which lie next to each other, or they go
# around: rank $r$ has the stages $r$ and $r + 4$.
#
# **Question.** After how many units can rank 3 begin, in each of the two?

# %%
prediction = None  # (next to each other, around)

around = interleaved(4, 8, chunks=2)
half = Costs(0.5, 0.5, 0.5)  # of a slice: F, and the two parts of a backward that section 3 is about
starts = [simulate(order, costs).of(3)[0].start for order, costs in ((one_f_one_b(4, 8), Costs()), (around, half))]
print("you wrote:", prediction, "- it begins after", starts)
print("stages of each rank:", [sorted({action.stage for action in program}) for program in around])
assert starts == [3, 1.5] and owners(around) == {stage: stage % 4 for stage in range(8)}

# %% [markdown] lang="en"
# Next to each other, nothing is gained: the first microbatch passes through six slices before it comes to rank 3, as
# long as ever. Around, it passes through three. This is **[interleaving](../docs/glossary.md#interleaving)** (Narayanan
# et al. 2021), and the slices are called **[chunks](../docs/glossary.md#chunk)**, $v$ of them on each rank. The ramp
# shrinks to $(p-1)F/v$ at the beginning and $(p-1)B/v$ at the end. *If* nobody waits in between, a rank is idle for
# $(p-1)(F+B)/v$. It works for $m(F+B)$. As a share of the work that is
#
# $$\frac{(p-1)(F+B)/v}{m(F+B)} = \frac{p-1}{vm} \qquad\text{and of the run}\qquad \frac{p-1}{vm + p - 1}$$
#
# Whether nobody waits in between depends on the order. Look from rank 0. Microbatch 0 leaves its slice 0, goes around
# the ring, and comes back for slice 4 after $p$ slice times. Until then there is time for $p$ forwards, and what then
# comes back is again one microbatch after the other, $p$ of them.
#
# **Your turn.** In which order does rank 0 do its forwards, as pairs of stage and microbatch? As it stands, all eight
# microbatches go through the first slice, then all through the second.


# %%
def my_forwards(rank, ranks, microbatches, chunks):
    return [(rank + chunk * ranks, m) for chunk in range(chunks) for m in range(microbatches)]


def forwards_of(program):
    return [(action.stage, action.microbatch) for action in program if action.op == Op.F]


for label, order in (("the package's", forwards_of(around[0])), ("yours", my_forwards(0, 4, 8, 2))):
    print(f"{label}: microbatches", " ".join(f"{m}/s{stage}" for stage, m in order), sep="\n  ")


# %% jupyter={"source_hidden": true}
# One answer: microbatches go around in groups of p
def forwards_in_groups(rank, ranks, microbatches, chunks):
    order = []
    for start in range(0, microbatches, ranks):
        for chunk in range(chunks):
            order += [(rank + chunk * ranks, m) for m in range(start, start + ranks)]
    return order


for p, groups, v in product(range(1, 6), range(1, 4), range(1, 4)):
    for rank, program in enumerate(interleaved(p, groups * p, chunks=v)):
        assert forwards_of(program) == forwards_in_groups(rank, p, groups * p, v)

# %% [markdown] lang="en"
# Groups of $p$ microbatches, chunk after chunk. Backwards go in the same groups, the last chunk first, and after a
# longer ramp the two alternate, as in 1F1B. In the picture the later stages are paler. **Predict** the length, which
# was 33, and what rank 0 keeps, which was 4.

# %%
prediction = None  # (units, microbatches that rank 0 keeps)

viz.show(viz.draw_schedule(around, half, "interleaved, 2 chunks", activation=1 / 2))
print("you wrote:", prediction)

# %%
for p, groups, v in product(range(1, 7), range(1, 5), range(1, 5)):
    m = groups * p
    order = interleaved(p, m, chunks=v)
    run = simulate(order, Costs(1 / v, 1 / v, 1 / v))
    assert abs(bubble(run) - (p - 1) / (v * m + p - 1)) < 1e-12
    kept = [min(m * v, 2 * (p - r - 1) + (v - 1) * p + 1) for r in range(p)]
    assert [in_flight(program) for program in order] == kept
print(f"closed forms hold; 4 ranks, 8 microbatches, 2 chunks: {bubble(simulate(around, half)):.1%}")
viz.show_source(interleaved)

# %% [markdown] lang="en"
# 28.5 units in place of 33: the 9 idle units became 4.5. Where $p$ does not divide $m$, minipar makes some groups
# larger; Megatron-LM asks that it does. What is the price?
#
# - **Memory.** Rank 0 keeps 5.5 microbatches in place of 4. The cell above has checked the count: $2(p-r-1) + (v-1)p +
#   1$ chunks. $(v-1)p$ of them because the earlier chunks of a group have to be done before its last one, and
#   $2(p-r-1)$ more because from rank $r$ to the end and back are $2(p-r-1)$ hops, and at each of them the rank could
#   otherwise only wait. Divided by $v$ that is $p\,(1 + (p-1)/(pv))$ microbatches on rank 0 (Korthikanti et al. 2022).
# - **Messages.** A microbatch crosses $pv - 1$ boundaries in place of $p - 1$, and the last rank sends to the first.
# - **Layers.** A rank needs at least $v$ of them.
#
# **Question.** Let each message take a tenth of a forward. Of 1, 2, 4 and 8 chunks, which is fastest now?

# %%
prediction = None

chunks, links = (1, 2, 3, 4, 6, 8), (0, 0.05, 0.1, 0.2)


def length(v, message):
    order = one_f_one_b(4, 8) if v == 1 else interleaved(4, 8, chunks=v)
    return round(simulate(order, Costs(1 / v, 1 / v, 1 / v, message)).end, 9)


lengths = {message: [length(v, message) for v in chunks] for message in links}
best = {message: chunks[ends.index(min(ends))] for message, ends in lengths.items()}
print("you wrote:", prediction)
print("fastest:", ", ".join(f"{v} chunks at {c:g} F" for c, v in best.items()))
assert best == {0: 8, 0.05: 4, 0.1: 3, 0.2: 2} and length(4, 0.1) < length(2, 0.1) < length(8, 0.1)

# %%
drawing, (panel,) = viz.figure(6.5, 3.0)
looks = zip(lengths.items(), (viz.PALETTE[5], viz.PALETTE[2], viz.PALETTE[1], viz.PALETTE[6]), "osD^", strict=True)
for (message, ends), color, marker in looks:
    panel.plot(chunks, ends, color=color, marker=marker, label="messages free" if message == 0 else f"{message:g} F")
panel.set(xlabel="chunks on each rank", ylabel="length of the step", xticks=chunks, ylim=(24, 41.5))
panel.legend(frameon=False, ncols=4, loc="upper center", fontsize=9)
text = "; ".join(f"messages of {c:g} F: " + ", ".join(f"{end:g}" for end in ends) for c, ends in lengths.items())
viz.show(drawing, f"Length of a step with 1 to 8 chunks. {text}. The dearer the messages, the fewer chunks.")

# %% [markdown] lang="en"
# Of those in the question 4, and 3 would be a little faster still. Slices get thinner, messages do not. Two chunks pay
# on all of these links, eight only where messages are almost free. Narayanan et al. report 10% and more throughput from
# interleaving.
#
# **Exercise:** [tasks 03d.1 and 03d.2](../exercises/03d_schedules.ipynb): around the ring, and the whole order.
#
# ## 3. Two halves of a backward
#
# Now for the other way: work for those who wait. In 1F1B everything that a rank could do is needed at once by someone.
# Or is it? Take one linear layer, $y = x\,w^T$, with $x$ of $N \times \text{in}$ and $w$ of $\text{out} \times
# \text{in}$. Backward is given $g$, the gradient of $y$, and computes two matrix products:
#
# - the [gradient of the input](../docs/glossary.md#input-gradient-weight-gradient), $I$: as large as $x$;
# - the gradient of the weights, $W$: as large as $w$.
#
# **Question.** Which of the two is awaited by another rank? And which of $x$, $w$, $g$ does each of the two need?

# %%
prediction = None

# %% [markdown] lang="en"
# **Your turn.** Write both products. The shapes leave no choice.


# %%
def my_halves(x, w, g):
    return None, None  # the gradient of x, the gradient of w


torch.manual_seed(0)
x, w = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((6, 4), (3, 4)))
y = x @ w.T
g = torch.randn_like(y)
y.backward(g)
for mine, true in zip(my_halves(x, w, g), (x.grad, w.grad), strict=True):
    print("right" if mine is not None and mine.shape == true.shape and torch.allclose(mine, true) else "not yet")


# %% jupyter={"source_hidden": true}
# One answer
def input_gradient(w, g):
    return g @ w


def weight_gradient(x, g):
    return g.T @ x


assert torch.allclose(input_gradient(w, g), x.grad) and torch.allclose(weight_gradient(x, g), w.grad)

# %% [markdown] lang="en"
# The stage above waits for $I$, and $I$ needs no $x$, only $g$ and $w$. For $W$ nobody waits before the optimizer's
# step. It needs $x$ and $g$, so whoever puts it off must keep both. And each of the two is as much work as the forward:
# $2N \times \text{in} \times \text{out}$ operations. A backward is twice a forward because it is two halves.
#
# Those halves are actions of their own in minipar: `I` and `W` in place of `B`. Qi et al. 2023 call them B and W. The
# idea: run $I$ as soon as possible, and put $W$ where a rank would wait. They call the schedules **[zero
# bubble](../docs/glossary.md#zero-bubble)**.
#
# ### The halves of a whole model
#
# `loss.backward()` computes both together. minipar's `Deferral` takes them apart. Inside `with deferral:` a forward
# runs as always, but each product with a weight is noted down; its backward gives the input's gradient at once, and
# puts the weight's off. `finish` makes up for it. The small GPT of this course, here with 8 blocks, in one process:
#
# **Question.** The model has 133 tensors of parameters. After $I$, how many of them have a gradient: all, none, some?
# And after $W$, by how much do the gradients differ from those of `loss.backward()`?

# %%
prediction = None  # (tensors with a gradient after I, difference after W)

config = Config(depth=8)
batch = tokens, targets = next(corpus.batches(steps=1, rows=12, context=32))


def fresh(dtype=torch.float64):
    torch.manual_seed(0)  # the same weights in every process
    return minipar.gpt(config).to(dtype)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(got, wanted):
    """The largest difference, as a share of the largest number."""
    assert got.keys() == wanted.keys()
    off = max((got[name] - wanted[name]).abs().max() for name in wanted)
    return (off / max(x.abs().max() for x in wanted.values())).item()


# %%
model = fresh()
F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()).backward()
alone = gradients(model)  # the truth: the whole model, the whole batch, one process

model, deferral = fresh(), Deferral(holds=True)
later = deferral.begin()
with deferral:
    loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
deferral.backward([loss], [torch.ones_like(loss)])  # I
early, waiting = gradients(model), len(later.coming)
share = sum(g.numel() for g in early.values()) / sum(g.numel() for g in alone.values())
later.finish()  # W

print("you wrote:", prediction)
print(f"after I: {len(early)} of {len(alone)} tensors have a gradient, {share:.1%} of the numbers; {waiting} wait")
print(f"after W: distance to loss.backward(): {distance(gradients(model), alone):.0e}")
assert (len(early), waiting, len(alone)) == (84, 49, 133) and share < 0.06
assert distance(gradients(model), alone) < 1e-12

# %% [markdown] lang="en"
# Some: norms, biases and embeddings come with $I$, since they are cheap. The 49 matrices wait, six in each of eight
# blocks, and the head. They are nearly all of the parameters. After $W$ the gradients are those of one backward. Here
# is how it is done:

# %%
viz.show_source(Deferral.linear, _Linear.forward, _Linear.backward, WeightGradients.run)

# %% [markdown] lang="en"
# `_Linear.backward` is your two lines, the second one left for later: `put_off` keeps $g$ and $x$ in a list. `run` goes
# through the list. What is better than in ours: a weight that is used twice gets its gradient once, with both uses in
# it; a gradient that is there already is added to in place. And no model has to be rewritten. `Deferral` is a
# `TorchFunctionMode`: inside `with`, PyTorch asks it about every function that is called, and it picks out `F.linear`
# and products with parameters.
#
# ### What is kept in between
#
# **Question.** After $F$ a rank keeps activations. After $I$, before $W$: does it keep fewer, as many, or more? Count
# for one block: its six linear layers keep their $x$ and $g$. (One `x` serves q, k and v.)

# %%
prediction = None  # (bytes after I) / (bytes after F)


def size(tensors, block):
    """Bytes, shared memory once, weights not at all."""
    weights = {p.untyped_storage().data_ptr() for p in block.parameters()}
    pieces = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(number for place, number in pieces.items() if place not in weights)


block, saved = fresh().blocks[0], []
x = torch.randn(12, 32, config.width, dtype=torch.float64, requires_grad=True)
deferral = Deferral(holds=True)
later = deferral.begin()
with deferral, torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
    y = block(x)
after_forward = size(saved, block)
deferral.backward([y], [torch.ones_like(y)])
after_input = size([tensor for _, *pair in later.waiting for tensor in pair], block)
print("you wrote:", prediction)
print(f"kept after F: {after_forward / x.nbytes:.2f} times x; after I: {after_input / x.nbytes:.2f} times x")
assert after_input == 16 * x.nbytes and 16 * x.nbytes < after_forward < 16.5 * x.nbytes

# %% [markdown] lang="en"
# As many. Of what forward kept, $I$ uses up some things for good, and in their place come the gradients $g$. For this
# block it is nearly a tie: 7 widths of $x$ and 9 of $g$. So a [weight
# gradient](../docs/glossary.md#input-gradient-weight-gradient) that waits costs as much memory as a microbatch in
# flight. `in_flight` and `memory` count it so: a microbatch is kept **from its F to its W**.
#
# ### Do F, I and W take as long?
#
# In a linear layer they are one product each. A block also has attention and norms, which have an $I$, but hardly
# weights. **Question.** So what comes out: is $I$ longer than $W$, or shorter? And which of the two grows when rows get
# longer?

# %%
prediction = None


# %%
def parts_of(block, x):
    """F, I and W of a block, as three functions to call one after the other."""
    deferral, given = Deferral(holds=True), []
    later = deferral.begin()

    def forward():
        with deferral:
            given.append(block(x))

    return forward, lambda: deferral.backward(given, [torch.ones_like(x)]), later.finish


def milliseconds(tokens, rounds=15):
    block = minipar.gpt(Config(context=1024)).blocks[0]
    x, clocks = torch.randn(512 // tokens, tokens, config.width, requires_grad=True), []
    for _ in range(rounds + 1):
        clocks.append([])
        for part in parts_of(block, x):
            start = time.perf_counter()
            part()
            clocks[-1].append(1000 * (time.perf_counter() - start))
    return [statistics.median(part) for part in zip(*clocks[1:], strict=True)]  # the first round warms up


# %%
measured = {f"rows of {tokens}": milliseconds(tokens) for tokens in (32, 128, 512)}
print("you wrote:", prediction)
drawing, (panel,) = viz.figure(7, 2.0)
for row, times in enumerate(measured.values()):
    left = 0.0
    for op, part in zip((Op.F, Op.I, Op.W), (100 * part / sum(times) for part in times), strict=True):
        panel.barh(row, part, left=left, color=viz.COLORS[op], ec=viz.INK, lw=0.6)
        panel.text(left + part / 2, row, f"{op} {part:.0f}", ha="center", va="center", fontsize=9)
        left += part
panel.set_yticks(range(3), list(measured))
panel.set(xlim=(0, 100), ylim=(2.6, -0.6), xlabel="% of F + I + W: one block, 512 tokens, measured on this machine")
text = "; ".join(f"{name}: " + ", ".join(f"{part:.2g}" for part in times) for name, times in measured.items())
viz.show(drawing, f"Shares of F, I and W in the time of one block. In ms, {text}.")

# %% [markdown] lang="en"
# $I$ is the longest and grows with the rows, $W$ is the shortest. By operations a token's forward takes $24h^2 + 4Th$
# in a block of width $h$ with rows of $T$ tokens, where $4Th$ is attention. Attention has no weights: its backward is
# all $I$, $8Th$. So $F : I : W = (6h + T) : (6h + 2T) : 6h$. Norms and GELU add to the time of $F$ and $I$, too, and on
# GPUs not little: Qi et al. measured 18.5, 18.1 and 9.3 ms for a model of 1.5 billion parameters (their Table 9).
#
# In the next three sections all three take one unit. Section 8 is about what happens when they do not.
#
# **Exercise:** [task 03d.3](../exercises/03d_schedules.ipynb): I now, W later, for a layer of your own.
#
# ## 4. One more line in the rule: ZB-H1
#
# In chapter 3c you derived 1F1B from a rule, with a function that plays it tick by tick. Here is that function again,
# for three kinds of actions. A rule is asked at each tick what a rank would like to do, most wanted first; it gets what
# is ready. It is told
#
# - `out`: microbatches of this rank with F done and I not;
# - `waiting`: those with I done and W not.


# %%
def by_rule(owner, microbatches, rule):
    """The schedule that arises if each rank, tick by tick, does the first of its wishes that is ready.

    owner: the rank of each stage. A wish: "F", "I" or "W", or "F1" for the second stage of a rank that has several.
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
            raise RuntimeError("nobody does anything any more")
    return programs


# %% [markdown] lang="en"
# First 1F1B with every B replaced by I and W, the W at once. As in chapter 3c, at most $p - r$ microbatches are out.
#
# **Question.** 1F1B takes 33 units. How many does this take, and why not as many?

# %%
prediction = None


def split_1f1b(rank, ranks, out, waiting):
    return ["W"] + ["F"] * (out < ranks - rank) + ["I"]


run = simulate(by_rule(range(4), 8, split_1f1b))
print(f"you wrote: {prediction} - {run.end:g} units")
assert run.end == 30

# %% [markdown] lang="en"
# It takes 30. Nothing has moved but one thing: the climb at the end is quicker. The stage above waits for $I$, no
# longer for $I$ and $W$. So each rank is idle for $(p-1)(F+I)$, 6 units.
#
# Now let W's wait. How many may wait on rank $r$? Look at memory. In 1F1B rank 0 keeps $p$ microbatches and rank $r$
# only $p - r$. A cluster's devices are all of one kind; if rank 0 has room for $p$, then rank $r$ has room for $r$
# more. **Let $r$ weight gradients wait on rank $r$.**
#
# **Your turn.** Change `split_1f1b`: W is the first wish only if more than `rank` are waiting. And where a rank has
# nothing else to do, it should do a W, too.


# %%
def my_rule(rank, ranks, out, waiting):
    return ["W"] + ["F"] * (out < ranks - rank) + ["I"]


run = simulate(by_rule(range(4), 8, my_rule))
print(f"your rule: {run.end:g} units, bubble {bubble(run):.1%}, kept {list(peak(memory(run)).values())}")


# %% jupyter={"source_hidden": true}
# One answer: W first if more than `rank` wait, and last in any case
def h1(rank, ranks, out, waiting):
    return ["W"] * (waiting > rank) + ["F"] * (out < ranks - rank) + ["I", "W"]


# %%
viz.show(viz.draw_schedule(by_rule(range(4), 8, h1), name="ZB-H1"))
for p in range(1, 7):
    for m in range(p, 13):
        assert by_rule(range(p), m, h1) == zero_bubble_h1(p, m)
        assert [in_flight(program) for program in zero_bubble_h1(p, m)] == [p] * p

# %% [markdown] lang="en"
# 27 units, 3 idle ones in place of 9, and no rank keeps more than rank 0 did: **ZB-H1** of Qi et al. 2023. A third of
# the idle time, from one more line in the rule. Look at rank 3: it begins with F and I by turns, puts off three W's,
# and does them at the very end, while the last I's climb.
#
# ### How long is it?
#
# Follow the longest way through the picture. Say that rank $r$ puts off $d \cdot r$ weight gradients; here $d = 1$.
#
# 1. The last rank begins after $(p-1)F$, and never waits.
# 2. When it does its last I, it has done all of its work, $m(F+I+W)$, but for the W's that it has put off, $d(p-1)$,
#    and the one that belongs to that I.
# 3. That I climbs: $(p-1)I$ later rank 0 does its own last I. After it comes one W.
#
# Added up, rank 0 is at work for $m(F+I+W)$, and idle for
#
# $$(p-1)(F + I - dW)$$
#
# **Predict** with $p = 4$, $F = 1.5$, $I = 1.25$, $W = 0.75$: how long are rank 0's idle times without putting off, and
# with $d = 1$? And what would $d = 2$ give?

# %%
prediction = None

costs = Costs(forward=1.5, backward_input=1.25, backward_weight=0.75)
work = 8 * (1.5 + 1.25 + 0.75)
got = [simulate(by_rule(range(4), 8, rule), costs).end - work for rule in (split_1f1b, h1)]
print("you wrote:", prediction, "- idle:", got)
assert got == [3 * (1.5 + 1.25), 3 * (1.5 + 1.25 - 0.75)]
for p, m in product(range(1, 7), range(11, 15)):
    assert abs(simulate(zero_bubble_h1(p, m), costs).end - 3.5 * m - (p - 1) * 2) < 1e-9
    assert abs(simulate(one_f_one_b(p, m), costs).end - 3.5 * m - (p - 1) * 3.5) < 1e-9

# %% [markdown] lang="en"
# **Exercise:** [task 03d.4](../exercises/03d_schedules.ipynb): fill the bubble, and train with your order on four
# ranks.
#
# ## 5. ZB-H2, and what a bubble is
#
# For the times above, $d = 2$ would leave 3.75 units. And if $F = I = W$, it leaves nothing. What does that take? The
# last rank has to put off $2(p-1)$ W's, so there have to be that many microbatches whose I it has done. And rank 0
# should not wait for its first I: from rank 0 to the end and back are $2(p-1)$ hops, so it needs $2(p-1)$ more forwards
# to do. On rank $r$, then, at most $2(p-1-r) + 1$ are out and $2r$ wait. Together that is
#
# $$2(p-1-r) + 1 + 2r = 2p - 1$$
#
# on every rank: 7 microbatches in place of 4. This is **ZB-H2**. **Question.** Four ranks, eight microbatches: how long
# is the run now? (The work is 24.)

# %%
prediction = None


def h2(rank, ranks, out, waiting):
    return ["W"] * (waiting > 2 * rank) + ["F"] * (out < 2 * (ranks - 1 - rank) + 1) + ["I", "W"]


for p in range(1, 6):
    for m in range(2 * p - 1, 12):
        assert by_rule(range(p), m, h2) == zero_bubble_h2(p, m)
        assert [in_flight(program) for program in zero_bubble_h2(p, m)] == [2 * p - 1] * p
viz.show(viz.draw_schedule(zero_bubble_h2(4, 8), name="ZB-H2"))
print("you wrote:", prediction)

# %% [markdown] lang="en"
# 27, as before! Yet no rank waits, once it has begun. The picture is a slanted box: rank 0 begins first and ends first,
# rank 3 begins 3 units later and ends 3 units later. In the title stand two bubbles, 11.1% and 0%, by the two ways to
# count:
#
# - **of the run**: idle time over *ranks × length of the run*. This is what you wrote in section 1.
# - **of the longest rank's own span**: from a rank's own first start to its own last end. Qi et al. count so.
#
# Is the second one a trick? It depends on what comes next. A rank that has ended could take its optimizer's step and
# begin with the *next* step's forwards, while rank 3 is still busy with this one. Let us put several steps one after
# the other, without any waiting in between.
#
# **Question.** How long do ten steps take with ZB-H1, and with ZB-H2?

# %%
prediction = None  # (ZB-H1, ZB-H2)


def repeated(order, microbatches, steps):
    """The same schedule several times in a row, with new microbatches each time."""
    again = range(0, steps * microbatches, microbatches)
    return [[a._replace(microbatch=a.microbatch + first) for first in again for a in program] for program in order]


def simulated(order, f=1.0, i=1.0, w=1.0, message=0.0):
    """A run where F, I and W are of a rank's whole part: where it has several stages, they share them."""
    chunks = len(owners(order)) // len(order)
    return simulate(order, Costs(f / chunks, i / chunks, w / chunks, message))


print("length of   1 step   10 steps   each further one")
for name, make in SCHEDULES.items():
    one, ten, eleven = (simulated(repeated(make(4, 8), 8, steps)).end for steps in (1, 10, 11))
    print(f"{name:<22} {one:>6g} {ten:>10g} {eleven - ten:>10g}")
    assert abs(eleven - ten - 24 / (1 - bubble(simulated(make(4, 8)), of="stage"))) < 1e-9
print("you wrote:", prediction)

# %% [markdown] lang="en"
# 270 and 243. Each further step costs 27 with ZB-H1 and 24 with ZB-H2. So `of="stage"` is what a step costs **if the
# next one may begin rank by rank**, and `of="run"` is what it costs if all ranks wait for each other between steps.
#
# Do they have to? The optimizer's step is local: a rank needs only its own gradients. But the norm of the *whole*
# gradient, by which it is clipped, is known when all ranks are through, and so is an overflow in 16 bits. Qi et al.
# take the step before they know, and take it back in the rare case that it was wrong. minipar does not: its `step` ends
# with a loss that all ranks know. **Here, count of the run.** Then ZB-H2 gains nothing over ZB-H1, for nearly twice the
# memory, unless times are unequal or messages cost something (section 8).
#
# The closed forms of both, checked for many sizes. The run cannot be shorter than the last rank's start and its work:

# %%
for p, more, (f, i, w) in product(range(1, 8), (0, 1, 6), ((1, 1, 1), (1.5, 1.0, 0.5), (1.0, 1.75, 0.75))):
    for make, d in ((zero_bubble_h1, 1), (zero_bubble_h2, 2)):
        m = 2 * p - 1 + more
        run, work = simulate(make(p, m), Costs(f, i, w)), m * (f + i + w)
        idle = (p - 1) * max(f + i - d * w, 0)
        assert abs(bubble(run, of="stage") - idle / (work + idle)) < 1e-12
        idle = max(idle, (p - 1) * f)
        assert abs(bubble(run, of="run") - idle / (work + idle)) < 1e-12
viz.show_source(_zero_bubble)

# %% [markdown] lang="en"
# The package writes the order down directly: `warmup` forwards, then F, I and a W that comes `delay` microbatches
# later, by turns. `depth` is $d$.
#
# ## 6. The V
#
# ZB-H2 doubles the memory. There is a schedule with a zero of the same kind that does not. Think of who keeps what in
# 1F1B: 4, 3, 2, 1. On rank 0 a microbatch arrives first and leaves last, on rank 3 it stays the shortest. Put two
# slices on each rank again, but not around: rank 0 gets the first *and the last*, rank 1 the second and the last but
# one. Stages go down to rank 3 and come back up, like a **V**: rank $r$ has the stages $r$ and $2p - 1 - r$.
#
# **Questions.** Which rank computes the loss? Between which ranks is nothing sent? And on rank $r$, for which of its
# two stages does a microbatch stay longer?

# %%
prediction = None

down_and_up = [0, 1, 2, 3, 3, 2, 1, 0]  # the rank of each stage
print("you wrote:", prediction, "- stage -> rank:", owners(zero_bubble_v(4, 8)))
assert list(owners(zero_bubble_v(4, 8)).values()) == down_and_up
drawing, panels = viz.figure(8, 2.3, columns=3)
paths = {"straight": [0, 1, 2, 3], "around": [0, 1, 2, 3] * 2, "V": down_and_up}
for panel, (title, path) in zip(panels, paths.items(), strict=True):
    panel.plot(path, color=viz.INK, lw=1.2, marker="o", ms=15, mfc=viz.PALETTE[0], mec=viz.INK)
    for stage, rank in enumerate(path):
        panel.text(stage, rank, f"{stage}", ha="center", va="center_baseline", fontsize=9)
    panel.set(title=title, xlim=(-0.6, 7.6), ylim=(3.6, -0.6), xlabel="stage", xticks=[], yticks=range(4))
panels[0].set_ylabel("rank")
text = "; ".join(f"{title}: {', '.join(map(str, path))}" for title, path in paths.items())
viz.show(drawing, f"Three ways to lay stages on four ranks. The rank of stage 0, 1 and so on: {text}.")

# %% [markdown] lang="en"
# Rank 0, which also embeds the tokens. (With an embedding tied to the head, both uses of the matrix are on one rank,
# and the exchange of chapter 3c falls away.) At the tip, stages 3 and 4 are on one rank. And a microbatch stays long
# where it passes early, on the way down, and briefly on the way up. One long and one brief stay on each rank: their sum
# is the same for all. So each rank can use the same memory, that of $p$ whole microbatches, or $2p$ halves.
#
# **Your turn.** Write a rule. `"F0"` is the forward on the way down, `"F1"` the one on the way up. A rank keeps `out +
# waiting` halves and has room for `2 * ranks`. What should it prefer? As it stands, it takes any forward as long as
# there is room, then I, then W. Run it and see what happens.


# %%
def my_v_rule(rank, ranks, out, waiting):
    room = out + waiting < 2 * ranks
    return ["F"] * room + ["I", "W"]


try:
    run = simulated(by_rule(down_and_up, 8, my_v_rule))
    print(f"{run.end:g} units, bubble {bubble(run):.1%}; the work is 24")
except RuntimeError as problem:
    print(problem)


# %% jupyter={"source_hidden": true}
# One answer: the way up first, and one place is always kept for it
def v_rule(rank, ranks, out, waiting):
    kept = out + waiting
    return ["F1"] * (kept < 2 * ranks) + ["F0"] * (kept < 2 * ranks - 1) + ["I", "W"]


run = simulated(by_rule(down_and_up, 8, v_rule))
print(f"{run.end:g} units, bubble {bubble(run):.1%} of the run, {bubble(run, of='stage'):.1%} of the longest span")
assert run.end == 25.5 and set(peak(memory(run, 1 / 2)).values()) == {4}

# %% [markdown] lang="en"
# The first attempt fills rank 0 with eight microbatches on their way down. Then the first one comes back and finds no
# room: nobody does anything any more. **One place has to stay free for the way up.** With it the run takes 25.5 units.
# It cannot be shorter, for rank 3 begins after three forwards of half a unit. Here is the package's:

# %%
prediction = None  # what rank 0 keeps

viz.show(viz.draw_schedule(zero_bubble_v(4, 8), half, "ZB-V", activation=1 / 2))
print("you wrote:", prediction)

# %%
print("length of a step, 2p microbatches:  your rule   the package's   the least possible")
for p in (2, 4, 6, 8):
    ours = simulated(by_rule([*range(p), *reversed(range(p))], 2 * p, v_rule))
    theirs, least = simulated(zero_bubble_v(p, 2 * p)), 6 * p + (p - 1) / 2
    print(f"{p} ranks {ours.end:>37g} {theirs.end:>15g} {least:>20g}")
    assert theirs.end == least and bubble(theirs, of="stage") == 0
    assert [in_flight(program) for program in zero_bubble_v(p, 2 * p)] == [2 * p] * p
viz.show_source(zero_bubble_v)

# %% [markdown] lang="en"
# A rule is easy to find and not always the best. The package's **ZB-V** (Qi et al. 2023) is written down as a pattern:
# a ramp, then rounds of F, I, W on the way down and F, I, W on the way up, then what is left. It reaches the least
# possible for every $p$ here, in the memory of 1F1B, with no bubble by the longest span.
#
# ## 7. Bubble against memory
#
# Now all of them side by side: four ranks, eight microbatches, $F = I = W$, messages free. **Question.** GPipe, 1F1B,
# interleaved with 2 and 4 chunks, ZB-H1, ZB-H2, ZB-V. For which of them is there another one that is better in one of
# the two, bubble and memory, and not worse in the other?

# %%
prediction = None


def fullest(order, run):
    """The most microbatches that a rank keeps, in microbatches of its whole part."""
    return max(peak(memory(run, len(order) / len(owners(order)))).values())


def messages(order):
    return sum(a.op in (Op.SEND_ACTIVATION, Op.SEND_GRADIENT) for program in communicate(order) for a in program)


print("                     bubble: of the run  of the span    kept    messages")
found = {}
for name, make in SCHEDULES.items():
    order = make(4, 8)
    run = simulated(order)
    found[name] = fullest(order, run), bubble(run), bubble(run, of="stage")
    print(f"{name:<22} {found[name][1]:>16.1%} {found[name][2]:>12.1%} {found[name][0]:>7g} {messages(order):>11}")
print("you wrote:", prediction)
assert {name: kept for name, (kept, *_) in found.items() if kept > 4} == {
    "GPipe": 8, "interleaved, 2 chunks": 5.5, "interleaved, 4 chunks": 4.75, "ZB-H2": 7,
}  # fmt: skip
assert all(found["ZB-V"][1] <= bubbles[0] and found["ZB-V"][0] <= kept for kept, *bubbles in found.values())

# %%
drawing, (panel,) = viz.figure(7, 3.6)
for (name, (kept, of_run, of_stage)), color in zip(found.items(), viz.PALETTE, strict=False):
    panel.plot([kept, kept], [100 * of_run, 100 * of_stage], color=viz.LINE, lw=1.2, zorder=1)
    panel.scatter(kept, 100 * of_stage, s=70, color="white", edgecolors=viz.INK, zorder=2)
    panel.scatter(kept, 100 * of_run, s=70, color=color, edgecolors=viz.INK, lw=0.8, zorder=3)
    left = name in ("ZB-H1", "ZB-V", "1F1B")
    panel.annotate(name, (kept, 100 * of_run), (-9 if left else 9, 0), textcoords="offset points",
        ha="right" if left else "left", va="center", fontsize=9)  # fmt: skip
for color, label in ((viz.LINE, "bubble of the run"), ("white", "of the longest span, where it differs")):
    panel.scatter([], [], s=70, color=color, edgecolors=viz.INK, label=label)
panel.legend(frameon=False, fontsize=9, loc="upper right", bbox_to_anchor=(1, 0.8))
panel.set(xlim=(2.8, 9.2), ylim=(-1.5, 31), xlabel="microbatches that the fullest rank keeps", ylabel="bubble (%)")
panel.grid(color=viz.PALE, zorder=0)
text = "; ".join(f"{name}: keeps {kept:g}, {a:.1%} and {b:.1%}" for name, (kept, a, b) in found.items())
viz.show(drawing, "Bubble against memory, a filled circle for the bubble of the run and an open one for that of the "
    f"longest span, joined where they differ. {text}.")  # fmt: skip

# %% [markdown] lang="en"
# There is one for all of them but ZB-V, and it is ZB-V. And 1F1B is beaten by ZB-H1, which keeps no more on its fullest
# rank. (In sum over the ranks it keeps 16 and 1F1B 10; where several ranks share one memory, that matters.) What ZB-V
# pays does not show here: it sends twice as many messages as 1F1B, and its zero needs $F = I = W$.
#
# ### Against published numbers
#
# Closed forms leave messages out. Qi et al. measured $F$, $I$, $W$ and the communication for real models on 8 stages
# (Table 9), and print the bubbles of the longest span that follow (Table 5). Two of their rows:

# %%
ROWS = {  # model: p, m, F, I, W, communication (ms), printed bubbles of 1F1B, ZB-H1, ZB-H2
    "1.5B": (8, 24, 18.522, 18.086, 9.337, 0.601, 0.2431, 0.1585, 0.1083),
    "6.2B": (8, 64, 29.935, 29.621, 19.388, 0.535, 0.1091, 0.0554, 0.0294),
}
for model, (p, m, f, i, w, message, *printed) in ROWS.items():
    idle = [(p - 1) * (f + i + w), *((p - 1) * max(f + i - d * w, 0) for d in (1, 2))]
    closed = [gap / (m * (f + i + w) + gap) for gap in idle]
    orders = [make(p, m) for make in (one_f_one_b, zero_bubble_h1, zero_bubble_h2)]
    ours = [bubble(simulate(order, Costs(f, i, w, message)), of="stage") for order in orders]
    for label, numbers in (("closed form", closed), ("simulated", ours), ("printed", printed)):
        print(f"{model} {m} microbatches  {label:<12}", "  ".join(f"{number:.4f}" for number in numbers))
    assert [round(number, 4) for number in ours] == printed

# %% [markdown] lang="en"
# The simulator agrees to the last printed digit, for 1F1B, ZB-H1 and ZB-H2. (Chapter [04b](04b_cost_models.ipynb) has
# all 18 numbers.) And ZB-H2 is not at zero: $W$ takes half of $F$. With their schedules the authors report up to 23%
# more throughput than 1F1B in about its memory, and up to 31% with more.
#
# ## 8. When times differ, and messages cost something
#
# **Question.** Say $W$ takes half as long as $F$ and $I$. What becomes of the bubbles of ZB-H1 and ZB-H2? (Use the
# closed forms.) And which schedules do not care?

# %%
prediction = None

CASES = {
    "F = I = W, messages free": (1, 1, 1, 0),
    "F = I = W, messages F/10": (1, 1, 1, 0.1),
    "F = I = 2 W, messages free": (1, 1, 0.5, 0),
    "F = I = 2 W, messages F/4": (1, 1, 0.5, 0.25),
}
rates = {name: [bubble(simulated(make(4, 8), *costs)) for costs in CASES.values()] for name, make in SCHEDULES.items()}
print(f"{'bubble of the run':<23} equal   equal, F/10   W half   W half, F/4")
for name, numbers in rates.items():
    print(f"{name:<22} {numbers[0]:>6.1%} {numbers[1]:>11.1%} {numbers[2]:>10.1%} {numbers[3]:>11.1%}")
print("you wrote:", prediction)
whole = ["GPipe", "1F1B", "interleaved, 2 chunks", "interleaved, 4 chunks"]
assert all(abs(rates[name][0] - rates[name][2]) < 1e-12 for name in whole)
first = {case: min(rates, key=lambda name: rates[name][at]) for at, case in enumerate(CASES)}
assert list(first.values()) == ["ZB-V", "ZB-V", "ZB-V", "ZB-H2"]

# %% [markdown] lang="en"
# Schedules with whole backwards do not care how a backward is divided. Those that split it were drawn for $F = I = W$:
# shorter W's fill less. ZB-H1 waits for $3 \times 1.5$ of 24.5 units, 18%, and ZB-H2 for 3 of 23. That is still less
# than 1F1B's 27%.
#
# Messages hurt everyone, but not alike. Each turn between neighbors pays the link, so 1F1B loses most; four chunks make
# four times the turns. In the last column ZB-H2 wins: seven microbatches in flight leave each rank something to do
# while a message travels. **Memory buys slack.** That is a use of memory that the closed forms do not show.
#
# Look at it. Below the timeline is what each rank keeps. **Before you move it:** behind its ramp, rank 0 of ZB-V waits
# for its first forward on the way up. For how long, when messages take F/10, and when they take F/4?

# %%
prediction = None

schedule_explorer(ranks=[4], microbatches=[8], costs=CASES)

# %%
for case in ("F = I = W, messages F/10", "F = I = 2 W, messages F/4"):
    ramp, up = simulated(zero_bubble_v(4, 8), *CASES[case]).of(0)[6:8]
    print(f"{case}: rank 0 waits for {up.start - ramp.end:.2g} between {ramp.action} and {up.action}")
    assert abs(up.start - ramp.end - 6 * CASES[case][3]) < 1e-9
print("you wrote:", prediction)

# %% [markdown] lang="en"
# Microbatch 0 goes down over three boundaries and up over three: six messages, which nothing hides. The gaps that
# follow are shorter, for by then most messages arrive while a rank has other work.
#
# So there is no best schedule, there is a best one for given times and a given memory. Qi et al. draw the conclusion:
# their software measures $F$, $I$, $W$ and the links of a run, then searches for an order. DeepSeek-V3 was trained with
# another relative, in which two directions of microbatches share each rank, and the backward is split as here
# (DeepSeek-AI 2024). You will search for one in section 11.
#
# ## 9. Sends that wait
#
# All of this took it for granted that a send waits for nobody. In chapter 3c a send that waits for its receive, a
# rendezvous, let 1F1B hang, and GPipe not.
#
# **Question.** Which of the seven get done with `sends="rendezvous"`? And in interleaving, how many ranks stand in the
# circle?

# %%
prediction = None

hangs = {}
for name, make in SCHEDULES.items():
    try:
        simulate(make(4, 8), sends="rendezvous")
        print(f"{name:<22} is done")
    except Deadlock as report:
        hangs[name] = [line for line in str(report).splitlines() if line.startswith("rank")]
        print(f"{name:<22} hangs in a circle of ranks", ", ".join(line.split()[1] for line in hangs[name]))
print("you wrote:", prediction)
print(*hangs["interleaved, 2 chunks"], sep="\n")
assert set(SCHEDULES) - set(hangs) == {"GPipe"}
viz.show(viz.draw_waits({0: 1, 1: 2, 2: 3, 3: 0}))

# %% [markdown] lang="en"
# GPipe only. In 1F1B and the straight zero bubble schedules two neighbors stand face to face, one with an activation,
# one with a gradient. In interleaving all four ranks hold an activation for the next, the last one for the first. Real
# frameworks post both directions in one call, or use sends that return at once. minipar does the latter: messages of
# each boundary and direction go in the order of the schedule, and `check` sees to it that both sides agree on that
# order.
#
# ## 10. On real ranks
#
# Four processes, the GPT with 8 blocks, in float64. An executor that has no opinion on the order needs little for all
# this: an action `I` that leaves the weights' gradients out, and an action `W` that makes up for them.

# %%
viz.show_source(Executor.input_backward, Executor._backward, Executor.weight_backward)

# %% [markdown] lang="en"
# The law of this course: every schedule, and numbers of microbatches that do and do not suit it, give the gradient of
# one process. **Predict** also the bytes: a microbatch of one row of 32 tokens has $32 \times 128$ numbers of 8 bytes
# at each boundary and direction. How many bytes do all four ranks send together in a step of 12 microbatches, with
# 1F1B? How many times as many with interleaving (2 chunks), and with ZB-V?

# %%
prediction = None  # (bytes, times, times)


def through_the_package(batch, make, microbatches):
    model = minipar.parallelize(fresh(), Mesh(pp=4), schedule=make, microbatches=microbatches)
    model.step(*batch)  # the first step also sends shapes ahead
    with ledger() as book:
        model.step(*batch)
    return model.full_gradients(), book.bytes("pp"), model.timeline()


# %%
world, sent, recorded = World(4), {}, {}
six = {name: make for name, make in SCHEDULES.items() if "4 chunks" not in name}  # 8 blocks are 8 stages at most
for (name, make), microbatches in product(six.items(), (3, 12)):
    answers = world.run(through_the_package, batch, make, microbatches)
    assert all(distance(got, alone) < 1e-12 for got, *_ in answers)
    sent[name], recorded[name] = [number for _, number, _ in answers], answers[0][2]
print(f"{len(six)} schedules, 3 and 12 microbatches: the gradients of one process")

# %%
for name, make in six.items():
    program = communicate(make(4, 12))
    sends = [sum(a.op in (Op.SEND_ACTIVATION, Op.SEND_GRADIENT) for a in mine) for mine in program]
    assert sent[name] == [count * 32 * 128 * 8 + 24 for count in sends]  # 24: the loss and its count, all-reduced
    part = 4 / len(owners(program))
    predicted = memory(simulated(make(4, 12)), part)
    assert peak(memory(recorded[name], part)) == peak(predicted)
    print(f"{name:<22} {sum(sent[name]):>10,} bytes, kept at most {max(peak(predicted).values()):g}")
times = [(sum(sent[name]) - 96) / (sum(sent["1F1B"]) - 96) for name in ("interleaved, 2 chunks", "ZB-V")]
print("you wrote:", prediction, "- as many as 1F1B, times:", [round(number, 2) for number in times])
assert times == [7 / 3, 2]

# %% [markdown] lang="en"
# Byte for byte: $p - 1 = 3$ boundaries in 1F1B, $pv - 1 = 7$ in interleaving, and $2p - 2 = 6$ in ZB-V, whose tip is
# free. (24 bytes a rank are not of the pipeline: the loss and its count.) And the recorded timelines, given to the same
# `memory`, say the same as the predicted ones: how much a rank keeps follows from its order, not from its clock.
#
# ### The true shape
#
# Your laptop hardly has four idle cores, so we use `pace=` as in chapter 3c: real processes and messages, but where
# they would compute, ranks wait, 20 ms for a whole F, I or W. **Predict:** 1F1B takes 660 ms by the simulator. And
# ZB-V?

# %%
prediction = None


def paced(batch, make, costs):
    model = minipar.parallelize(fresh(), Mesh(pp=4), schedule=make, microbatches=8, pace=costs)
    for _ in range(2):
        model.step(*batch)
    return model.timeline()


def order_of(timeline):
    return [[span.action for span in timeline.of(rank)] for rank in timeline.ranks]


for make, each in ((one_f_one_b, 0.02), (zero_bubble_v, 0.01)):
    costs = Costs(each, each, each)
    predicted, run = simulate(make(4, 8), costs), world.run(paced, batch, make, costs)[0]
    print(f"{make.__name__}: predicted {1000 * predicted.end:.0f} ms, recorded {1000 * run.end:.0f} ms")
    assert order_of(run) == make(4, 8) and run.end >= predicted.end
print("you wrote:", prediction)
viz.show(viz.compare(predicted, run, unit="ms"))

# %% [markdown] lang="en"
# Every box is where it should be, a little later each time: messages and the operating system take their part, and
# nothing in ZB-V has slack to hide it. (Sections 7 and 8 were computed. This one ran.)
#
# ### What it gives on your machine
#
# Without `pace`, ranks compute, and share cores. **Question.** Four ranks share *two* cores. The simulator shares them,
# too. By how much is ZB-V faster than 1F1B then?

# %%
prediction = None

print("cores:                 " + "".join(f"{cores:>8}" for cores in (4, 2, 1)))
for name, make in six.items():
    order = make(4, 8)
    part = 4 / len(owners(order))
    ends = [simulate(order, Costs(part, part, part), cores=cores).end for cores in (4, 2, 1)]
    print(f"{name:<22}", "".join(f"{end:>8.1f}" for end in ends))
    assert abs(ends[2] - 96) < 1e-6 and ends[1] > 48 - 1e-6
print("you wrote:", prediction)

# %% [markdown] lang="en"
# On one core not at all, and on two very little. The work of all ranks is $4 \times 24 = 96$ units, 48 for each of two
# cores, and while one rank waits, another uses the core. **A bubble is only lost if nobody else can use it.** On a GPU,
# which belongs to one rank, nobody can.
#
# So for a fair test take as many ranks as cores: two. Then a bubble is a bubble. Let us measure all six schedules in
# turn, several rounds, and predict each from the durations of F, I and W that ZB-H1's timeline shows.


# %%
def clocked(batch, schedules, rounds):
    """Seconds of a step for each schedule, by turns, and the seconds of F, I and W: medians."""
    models, clocks = {}, {name: [] for name in schedules}
    for name, make in schedules.items():
        models[name] = minipar.parallelize(fresh(torch.float32), Mesh(pp=2), schedule=make, microbatches=8)
        models[name].step(*batch)
    for _, name in product(range(rounds), models):
        start = time.perf_counter()
        models[name].step(*batch)  # ends for both ranks together
        clocks[name].append(time.perf_counter() - start)
    models["ZB-H1"].step(*batch)
    run, parts = models["ZB-H1"].timeline(), []
    for op in (Op.F, Op.I, Op.W):
        ranks = [[s.end - s.start for s in run.of(rank) if s.action.op == op] for rank in run.ranks]
        parts.append(statistics.mean(statistics.median(lengths) for lengths in ranks))
    return {name: statistics.median(times) for name, times in clocks.items()}, parts


# %%
with World(2) as two:
    seconds, parts = two.run(clocked, next(corpus.batches(steps=1, rows=16, context=64)), six, 5)[0]
print("F, I, W of a rank's part, ms:", [round(1000 * part, 1) for part in parts])
forecast = [1000 * simulated(make(2, 8), *parts).end for make in six.values()]
taken = [1000 * seconds[name] for name in six]
print(f"{'beside 1F1B':<24} promised  measured")
for at, name in enumerate(six):
    print(f"{name:<24}" + "".join(f"{times[at] / times[1] - 1:>+9.0%}" for times in (forecast, taken)))
viz.show(viz.draw_predictions(list(six), forecast, taken, "ms a step, two ranks, measured on this machine"))

# %% [markdown] lang="en"
# Read your own picture; it will not look twice the same. Circles are what the schedules promise: less than a tenth lies
# between the slowest and the fastest. Squares are what the clock says. In quiet runs for this chapter ZB-H1 and ZB-H2
# were level with 1F1B, as far as two runs of the same agree. Interleaving was slower. ZB-V was slower with these rows
# of 64 tokens, and level with rows of 128. Of what was promised, next to nothing arrived.
#
# minipar's [benchmark](../benchmarks/README.md) measures this with care: a larger GPT, 31 rounds, torch's own schedules
# beside it, two ranks on two cores. Here is what its file says:

# %%
file = Path(minipar.__file__).parents[1] / "benchmarks" / "results.json"
for row in json.loads(file.read_text()):
    if row["what"].startswith(("pipeline step", "step with split")):
        print(f"{row['what']:<27} {1000 * row['minipar']:>5.0f} ms, {row['ratio']:.2f} of {row['peer_name']}")

# %% [markdown] lang="en"
# When this was written, zero bubble (a V) took 3% less than 1F1B there, and as long as torch's own. Interleaving took
# longer than torch's, and longer than 1F1B. Why so little?
#
# - **There is little to gain.** With two ranks and eight microbatches the bubble of 1F1B is 1/9. The gain grows with
#   the ranks: with 8 ranks and 16 microbatches the bubble is 30%.
# - **W is short**, and fills less than F and I leave.
# - **Splitting costs.** Every product passes a function of Python, and each weight's gradient is handed over by itself.
#   The file's last row is a step with split backwards beside one with whole ones.
# - **Slices cost.** Two slices a rank mean twice as many messages and calls, around products of the same size. In a
#   profile of interleaving the ranks themselves worked no longer than without a pipeline. What was left was waiting.
# - **Bubbles were not empty.** The threads that carry messages need a core, too. Where ranks use all cores, they run in
#   the bubbles.
#
# On GPUs most of this is different: a GPU is idle in its bubble, messages are carried by others, there are eight or
# more stages, and the gain was measured (section 7). What carries over from here are order, memory, bytes and
# gradients, and those you have checked.
#
# ## 11. Schedule golf
#
# Your turn, for good. A schedule is a function from `(stages, microbatches)` to a list of actions for each rank. The
# course has four ranks, eight microbatches, and three holes:

# %%
HOLES = {  # most microbatches in flight on any rank; F, I, W and message
    "1, all equal": (4, (1, 1, 1, 0)),
    "2, less memory": (3, (1, 1, 1, 0)),
    "3, slow link": (4, (1, 1, 0.5, 0.25)),
}


def score(make, limit, costs):
    """The bubble of the run, or None where a rank keeps too much. Raises if the schedule is not one."""
    order = make(4, 8)
    if len(order) != 4 or len(owners(order)) % 4:
        raise ValueError("the course has 4 ranks, each with as many stages as the others")
    check(order, 8)  # each microbatch once through each stage, forth and back, nothing before what it needs
    run = simulated(order, *costs)  # Deadlock, if ranks wait for each other
    return bubble(run) if fullest(order, run) <= limit else None


# %%
def scorecard(players):
    print(f"{'':<22} kept " + "".join(f"{hole:>16}" for hole in HOLES))
    for name, make in players.items():
        bubbles = [score(make, *hole) for hole in HOLES.values()]
        row = ["too much" if share is None else f"{share:.1%}" for share in bubbles]
        print(f"{name:<22} {fullest(make(4, 8), simulated(make(4, 8))):>4g} " + "".join(f"{cell:>16}" for cell in row))


scorecard(SCHEDULES)
assert all(score(make, *HOLES["2, less memory"]) is None for make in SCHEDULES.values())

# %% [markdown] lang="en"
# That is par. On the second hole none of the known ones may play: all keep four or more somewhere. `check` is the
# package's own, the one that `parallelize` calls. It refuses what is no schedule:

# %%
F0, F1, B0, B1 = (Action(op, 0, m) for op, m in ((Op.F, 0), (Op.F, 1), (Op.B, 0), (Op.B, 1)))


def below(*actions):
    return [action._replace(stage=1) for action in actions]


for order in (
    [[F0, F1, B0], below(F0, B0, F1, B1)],
    [[F0, B0, B1, F1], below(F0, B0, F1, B1)],
    [[F0, F1, B0, B1], below(F0, F1, B1, B0)],
    [[F0, B0, F1, B1], below(F0, F1, B0, B1)],
):
    try:
        check(order, 2)
        simulate(order)
    except (ValueError, Deadlock) as refusal:
        print(str(refusal).splitlines()[0])

# %% [markdown] lang="en"
# **Your turn.** As it stands, `my_schedule` is legal and poor: a microbatch is carried all the way through before the
# next one begins. Beat 1F1B on the first hole, then on the third, then play the second. You may use B or I and W, one
# stage on each rank or several, plain lists or `by_rule` with a rule of your own. A hint for the second hole: the rule
# for the V has a limit in it.


# %%
def my_schedule(stages, microbatches):
    return [[Action(op, rank, m) for m in range(microbatches) for op in (Op.F, Op.I, Op.W)] for rank in range(stages)]


scorecard({"1F1B": one_f_one_b, "yours": my_schedule})
viz.show(viz.draw(simulate(my_schedule(4, 8)), title="your schedule", unit="forward passes"))


# %% jupyter={"source_hidden": true}
# One answer: the V with your rule for it, and a limit that one can choose
def small_v(stages, microbatches, limit=3):
    def rule(rank, ranks, out, waiting):
        kept = out + waiting
        return ["F1"] * (kept < 2 * limit) + ["F0"] * (kept < 2 * limit - 1) + ["I1", "I0", "W"]

    return by_rule([*range(stages), *reversed(range(stages))], microbatches, rule)


def v_of_four(stages, microbatches):
    return small_v(stages, microbatches, limit=4)


scorecard({"1F1B": one_f_one_b, "a V that keeps 3": small_v, "a V that keeps 4": v_of_four})
assert score(small_v, *HOLES["2, less memory"]) == score(zero_bubble_h1, *HOLES["1, all equal"])
assert all(score(v_of_four, *HOLES[hole]) < score(one_f_one_b, *HOLES[hole]) for hole in HOLES if hole[0] in "13")
viz.show(viz.draw_schedule(small_v(4, 8), half, "a V that keeps 3", activation=1 / 2))

# %% [markdown] lang="en"
# With three quarters of ZB-H1's memory, ZB-H1's bubble. That a V can trade memory for bubble in small steps was found
# by Qi et al. 2024; they lay out V's that keep about $p/2$ and $p/3$ microbatches. Our answer beats 1F1B on holes 1 and
# 3, ties with ZB-V on the first, and does not come near it on the third: its rule was played with ticks of one length.
# Can you do better there? And with four slices on each rank, on the first?
#
# A schedule that scores is one that trains. Any function goes into `parallelize`; here is the V that keeps 3 (put your
# own in its place), on four ranks:

# %%
answers = world.run(through_the_package, batch, small_v, 8)
print(f"distance to one process: {max(distance(got, alone) for got, *_ in answers):.0e}")
print("kept by each rank:", list(peak(memory(answers[0][2], 1 / 2)).values()))
assert all(distance(got, alone) < 1e-12 for got, *_ in answers)
assert set(peak(memory(answers[0][2], 1 / 2)).values()) == {3}
world.close()

# %% [markdown] lang="en"
# ## What you have now
#
# - **bubble**: of the run, if all ranks wait for each other between steps; of the longest span, if the next step may
#   begin rank by rank.
# - **interleaving**: $v$ thin slices a rank, $(p-1)/(vm)$ of the work; more messages, a few more activations.
# - **I and W**: $g\,w$, which the stage above awaits, and $g^T x$, for which nobody waits. Until its W, a microbatch
#   counts as kept.
# - **ZB-H1**: rank $r$ puts off $r$ W's; idle $(p-1)(F+I-W)$ in the memory that 1F1B's first rank needs.
# - **ZB-H2**: twice as many, $(p-1)(F+I-2W)$ of the span, $2p-1$ microbatches.
# - **ZB-V**: the first and the last slice on one rank; no bubble by the span if $F = I = W$, in the memory of $p$.
# - **slack**: what messages and unequal times eat; it is bought with memory.
#
# About section 3.3.3 of the document. That resources are hard to use fully holds for the three steps that it describes;
# with a better order little of it is left. That the times of the stages must be controlled precisely holds more than
# ever: the smaller the bubble, the less slack there is.
#
# ## Three questions to take along
#
# 1. 8 stages, 32 microbatches, messages free. How large is 1F1B's bubble, by the run? And interleaved with 4 chunks?
# 2. $F = I = 10$ ms, $W = 5$ ms, $p = 8$. How long is a rank idle in ZB-H1? Does ZB-H2 come to zero?
# 3. A colleague measures ZB-H2 and ZB-H1 and finds the same time a step. Every step ends with clipping by the norm of
#    the whole gradient. Is something wrong?
#
# <details><summary>Answers</summary>
#
# 1. 7/39, 18%; and 7/135, 5%.
# 2. $7 \times (10 + 10 - 5) = 105$ ms. No: $7 \times (10 + 10 - 10) = 70$ ms are left.
# 3. No. All ranks wait for the norm, so the bubble of the run counts, and with equal times it is the same for both.
#
# </details>

# %%
assert abs(bubble(simulate(one_f_one_b(8, 32))) - 7 / 39) < 1e-12
assert abs(bubble(simulate(interleaved(8, 32, chunks=4))) - 7 / 135) < 1e-12
runs = [simulate(make(8, 32), Costs(10, 10, 5)) for make in (zero_bubble_h1, zero_bubble_h2)]
assert [max(s.end for s in run.of(0)) - 32 * 25 for run in runs] == [105, 70]

# %% [markdown] lang="en"
# **Next:** [the exercises](../exercises/03d_schedules.ipynb), five graded tasks. The last one is golf, with other
# limits and a scorecard beside the best known scores:
#
#     python -m minipar grade exercises/03d_schedules.ipynb
#
# Then [Long context](03e_long_context.ipynb).
#
# ## References
#
# - DeepSeek-AI 2024, *DeepSeek-V3 Technical Report*, [arXiv:2412.19437](https://arxiv.org/abs/2412.19437).
# - Huang et al. 2018, *GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism*,
#   [arXiv:1811.06965](https://arxiv.org/abs/1811.06965).
# - Korthikanti et al. 2022, *Reducing Activation Recomputation in Large Transformer Models*,
#   [arXiv:2205.05198](https://arxiv.org/abs/2205.05198).
# - Narayanan et al. 2021, *Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM*,
#   [arXiv:2104.04473](https://arxiv.org/abs/2104.04473).
# - Qi et al. 2023, *Zero Bubble Pipeline Parallelism*, [arXiv:2401.10241](https://arxiv.org/abs/2401.10241).
# - Qi et al. 2024, *Pipeline Parallelism with Controllable Memory*,
#   [arXiv:2405.15362](https://arxiv.org/abs/2405.15362).
