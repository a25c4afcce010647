# %% [markdown] lang="en"
# # Experts
#
# All weights of the models so far work on every token. A **mixture of [experts](../docs/glossary.md#expert)** has many
# more weights, of which each token uses a few. That makes a large model cheap to compute, and it needs a new way to
# share it out: ranks hold different experts, and *tokens* travel to them. This is **[expert
# parallelism](../docs/glossary.md#expert-parallelism)**, the axis `ep` of a mesh. At the end of this chapter you can
#
# - write a [router](../docs/glossary.md#router) and a [mixture of experts](../docs/glossary.md#mixture-of-experts), and
#   count its parameters and operations;
# - say what [capacity](../docs/glossary.md#capacity) is, what it drops and what it leaves empty;
# - show in a short run what the [load-balancing loss](../docs/glossary.md#load-balancing-loss) is for;
# - write the two all-to-alls that carry tokens to their experts and back, and predict every byte;
# - say which gradients are summed over which ranks, and show what happens when that is wrong;
# - train on `Mesh(dp=2, ep=2)` and get the gradients of one process.
#
# **Time:** about two hours. **You need:** [Ranks and collectives](02b_ranks_and_collectives.ipynb) and sections 1 and 6
# of [Data parallelism](03a_data_parallel.ipynb). The chapter belongs to section 3.2.1 (model parallelism) of the
# document that this course follows and tests, 《大规模语言模型从理论到实践 混合并行》. It does not mention experts.
#
# **How to read it.** As before: write your prediction into the cell before you run it. Answers to "Your turn" are in
# the folded cell that follows.
#
# ## Three questions to warm up
#
# 1. A block of a GPT of width $h$ has about $12h^2$ weights. How many of them are in its MLP?
# 2. Eight ranks call `all_to_all` with a tensor of 16 MB each. How many bytes does each rank send?
# 3. Why does minipar's `step` divide the loss by the number of *all* tokens, and then sum gradients over the ranks? Why
#    does it not take the mean of the ranks' gradients?
#
# <details><summary>Answers</summary>
#
# 1. $8h^2$, two thirds: two matrices of $h \times 4h$.
# 2. 7/8 × 16 MB = 14 MB.
# 3. Ranks may have unlike numbers of tokens. Then the mean of their means is not the mean over all tokens.
#
# </details>

# %%
import itertools
import math
from contextlib import nullcontext
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import minipar
from minipar import Config, Mesh, World, connect, corpus, expert, ledger, parallelize, viz
from minipar.collectives import irecv, isend
from minipar.model import Experts, MoE
from minipar.widgets import explore

assert 12 - 4 == 8 and 7 / 8 * 16 == 14  # the answers above
world = World(4)
tokens, targets = next(corpus.batches(steps=1, rows=8, context=64))  # 8 rows of 64 tokens

# %% [markdown] lang="en"
# ## 1. More weights, the same work
#
# In a **dense** model every token passes through every weight. A forward pass takes about 2 operations for each weight
# and token, so a model that is 8 times as large takes 8 times as long. A mixture breaks this tie. In place of the one
# MLP of a block it has several, the **experts**, side by side. A small layer, the **router**, picks a few of them for
# each token (Shazeer et al. 2017). `Config(experts=8, top=2)` describes our GPT with 8 experts a block, of which each
# token uses its top 2.
#
# **Question.** How many times the parameters of the dense GPT does it have? And how many times the operations of a
# forward pass?

# %%
prediction = None  # (parameters, operations), in times of the dense model

dense = Config(depth=2)  # two of the small GPT's four blocks: this chapter works in float64, with many experts


def mixture(**changes):
    """The settings of the dense GPT, but for these."""
    return Config(depth=2, **changes)


def fresh(config, dtype=torch.float64):
    torch.manual_seed(0)
    return minipar.gpt(config).to(dtype)


def size_and_work(config):
    """Parameters, and operations for each token: those of the matrix products that PyTorch runs in a forward pass."""
    model = fresh(config, torch.float32)
    with FlopCounterMode(display=False) as counter:
        model(tokens)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() / tokens.numel()


(size, work), (more_size, more_work) = size_and_work(dense), size_and_work(mixture(experts=8, top=2, capacity=1))
print(f"you wrote: {prediction} - measured: {more_size / size:.2f} and {more_work / work:.2f}")

# %% [markdown] lang="en"
# The number of experts drops out of the work. It counts only how many a token uses:

# %%
counts = [4, 8, 16, 32]
found = [size_and_work(mixture(experts=count, top=2, capacity=1)) for count in counts]
parameters, operations = [p / size for p, _ in found], [w / work for _, w in found]
drawing, (panel,) = viz.figure(6.5, 2.8)
panel.plot(counts, parameters, color=viz.PALETTE[5], marker="o", label="parameters")
panel.plot(counts, operations, color=viz.PALETTE[6], marker="s", label="operations for a token")
panel.set(xticks=counts, xlabel="experts, of which a token uses 2", ylabel="× the dense model", ylim=(0, None))
panel.legend(frameon=False, fontsize=9)
told = ", ".join(f"{c} experts {p:.1f} and {o:.2f}" for c, p, o in zip(counts, parameters, operations, strict=True))
viz.show(drawing, f"Parameters and operations of mixtures, in times of the dense model: {told}.")
assert max(operations) / min(operations) < 1.02 and parameters[-1] > 3 * parameters[0]

# %% [markdown] lang="en"
# The small rise is the router, which grows with the experts. For real sizes take Mixtral 8x7B (Jiang et al. 2024): 32
# layers of width 4,096, 8 experts of which a token uses 2, and experts of three matrices of 4,096 × 14,336. Its 32
# heads have 128 numbers each, and 8 key–value heads share them. The vocabulary has 32,000 tokens. The paper says that a
# token has access to 47 billion parameters and uses 13 billion. **Do the numbers come out?**

# %%
prediction = None  # (all, used), in billions


def mixtral(experts):
    """Parameters if each token uses so many experts. Norms are left out: a few hundred thousand."""
    h, kv, hidden, layers, vocabulary = 4096, 8 * 128, 14_336, 32, 32_000
    attention = 2 * h * h + 2 * h * kv  # q and out, k and v
    return layers * (attention + 8 * h + experts * 3 * h * hidden) + 2 * vocabulary * h  # 8 h: the router


print("you wrote:", prediction, f"- computed: {mixtral(8) / 1e9:.2f} and {mixtral(2) / 1e9:.2f} billion")
used, every = 2 * mixtral(2) / 1e9, 2 * mixtral(8) / 1e9
print(f"billion operations of a token, forward: {used:.0f}; if all experts were used {every:.0f}")
assert round(mixtral(8) / 1e9) == 47 and round(mixtral(2) / 1e9) == 13

# %% [markdown] lang="en"
# They do. (And "8x7B" is not 56: only the experts are there eight times. The operations are 2 for each weight that a
# token meets. Those of attention's scores come on top, in both.) All 47 billion must be kept somewhere, with
# gradients and optimizer state. This is why mixtures are trained on many devices even where a dense model of the same
# speed needs few. DeepSeek-V3 goes further: 671 billion parameters, of which a token uses 37 (DeepSeek-AI 2024).
#
# ## 2. The router
#
# The router is one matrix: a token's vector in, one number an expert out. Softmax makes probabilities of them. The
# token goes to the `top` likeliest experts, and gets the sum of what they give, **each weighted with its probability**:
#
# $$p = \operatorname{softmax}(W x) \qquad y = \sum_{e \,\in\, \text{top}} p_e\, \text{MLP}_e(x)$$
#
# **Your turn.** Write it in at most 15 lines: a loop over the experts, and for each one the tokens that chose it.
# Useful: `p.topk(top)` gives values and numbers of the likeliest, both (tokens, top); `(choices ==
# e).nonzero(as_tuple=True)` gives token and place of each choice that fell on expert `e`.
#
# `x` is what the first mixture of our GPT really sees, for a row of the documentation text.


# %%
def first_mixture(config):
    """The first block's mixture, and what comes to it for our tokens."""
    model, seen = fresh(config), []
    layer = model.blocks[0].mlp
    hook = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    model(tokens)
    hook.remove()
    return layer, seen[0]


layer, x = first_mixture(mixture(experts=8, top=2))
print("x, rows by tokens by width:", tuple(x.shape), "- up:", tuple(layer.experts.up.shape))


# %%
def my_mixture(x, router, up, down, top):
    """x (tokens, width), router (experts, width), up (experts, width, hidden), down (experts, hidden, width)"""
    return x  # your lines in place of this one


parts = layer.router.weight, layer.experts.up, layer.experts.down
truth = layer.eval()(x)  # in eval() no choice is dropped: section 3
print("right:", torch.allclose(my_mixture(x[0], *parts, top=2), truth[0], atol=1e-12))


# %% jupyter={"source_hidden": true}
# One answer
def mixture_by_hand(x, router, up, down, top):
    probabilities = (x @ router.T).softmax(-1)
    weights, choices = probabilities.topk(top)
    y = torch.zeros_like(x)
    for e in range(len(router)):
        token, place = (choices == e).nonzero(as_tuple=True)
        given = F.gelu(x[token] @ up[e]) @ down[e]
        y = y.index_add(0, token, given * weights[token, place].unsqueeze(-1))
    return y


# %%
def distance(got, wanted):
    """The largest difference, as a share of the largest number."""
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


off = distance(mixture_by_hand(x[0], *parts, top=2), truth[0])
print(f"distance to the package's mixture: {off:.0e}")
assert off < 1e-12

# %% [markdown] lang="en"
# Why are the experts weighted by $p$? The choice itself has no gradient: a token goes here or there. **Predict:** with
# one expert a token (`top=1`), in which of these cases does the router get a gradient that is not zero?
#
# - weighted by $p_e$, as above;
# - by $p_e$ scaled so that the weights of a token sum to 1;
# - not weighted.

# %%
prediction = None


def router_gradient(weigh):
    router = layer.router.weight.detach().requires_grad_()
    weights, choices = (x[0] @ router.T).softmax(-1).topk(1)
    experts = [F.gelu(x[0] @ up) @ down for up, down in zip(*parts[1:], strict=True)]
    chosen = torch.stack(experts)[choices[:, 0], torch.arange(len(x[0]))]
    loss = (weigh(weights) * chosen).square().sum()
    return torch.autograd.grad(loss, router)[0].abs().max().item()


ways = {
    "weighted": lambda w: w,
    "scaled to 1": lambda w: w / w.sum(-1, keepdim=True),
    "not weighted": lambda w: 0 * w + 1,
}
gradients = {name: router_gradient(weigh) for name, weigh in ways.items()}
print("you wrote:", prediction)
print(", ".join(f"{name}: {value:.0e}" for name, value in gradients.items()))
assert max(gradients["scaled to 1"], gradients["not weighted"]) < 1e-12 * gradients["weighted"]

# %% [markdown] lang="en"
# Only in the first. The weight is the one path by which the loss can tell the router that a choice was good: more of
# this expert, or less. With `top=2` scaled weights work as well (Mixtral scales them), since they can shift from one
# expert to the other. minipar takes the probabilities as they are, like the Switch Transformer (Fedus et al. 2021).
#
# ## 3. Capacity
#
# Our loop has matrix products of other sizes each time, as many rows as tokens that chose the expert. Devices like
# fixed sizes. So each expert gets a fixed number of places, called **slots**, and all experts work at once: one tensor
# of shape (experts, slots, width). How many slots? On average an expert gets $\text{top} \cdot T / E$ of a row's
# choices ($T$ tokens, $E$ experts). With some room for chance, the **capacity factor**:
#
# $$\text{room} = \left\lceil \text{capacity} \cdot \frac{\text{top} \cdot T}{E} \right\rceil$$
#
# A slot that nobody takes holds zeros, and the device computes with zeros. A choice that finds its expert full is
# **dropped**: this expert adds nothing to the token. The token keeps what comes past the MLP, by the block's addition
# `x + mlp(x)`.
#
# **Question.** An untrained router, 8 experts, `top=2`, capacity 1.25. What share of choices is dropped?

# %%
prediction = None

layer.train()(x)
print(f"you wrote: {prediction} - dropped: {layer.dropped:.1%}")
print("share of choices that fell on each expert:", *(f"{share:.0%}" for share in layer.load))
assert 0 < layer.dropped < 0.5

# %% [markdown] lang="en"
# An untrained router is not an even one. Its weights are random, tokens of a text resemble each other, and some experts
# are nearer to all of them.
#
# **Your turn.** Who is dropped? Choices queue up in the order of the tokens, and of one token its likeliest expert
# comes first. Write `my_places`: for each choice, how many choices *before* it fell on the same expert. `choices` is a
# list of expert numbers. A choice is kept if its place is below `room`.


# %%
def my_places(choices):
    return [0 for _ in choices]  # your lines in place of this one


with torch.no_grad():
    choices = layer.router(x).softmax(-1).topk(2).indices  # (rows, tokens, 2)
print("right:", my_places([3, 1, 3, 3, 1]) == [0, 0, 1, 2, 1])


# %% jupyter={"source_hidden": true}
# One answer
def places_by_hand(choices):
    seen, places = {}, []
    for e in choices:
        places.append(seen.get(e, 0))
        seen[e] = places[-1] + 1
    return places


places, fell, room = layer.queue(choices)
assert room == math.ceil(1.25 * 2 * 64 / 8) == 20
for row, wanted in zip(choices, places, strict=True):
    assert places_by_hand(row.flatten().tolist()) == wanted.flatten().tolist()
print("right for all rows; room for", room, "choices of a row at each expert")

# %% [markdown] lang="en"
# The package's version, and the whole of `MoE.forward`:

# %%
viz.show_source(MoE.queue, MoE.forward, Experts.forward)

# %% [markdown] lang="en"
# - `queue` has no loop: one-hot vectors, summed up along the row, count how often each expert has come up so far.
# - `slot` is a pair, expert and place. `index_put` lays tokens into their slots; `self.experts(slots)[slot]` takes
#   results out of them. In between is one matrix product for all experts.
# - `whole_row` and `own_tokens` do nothing on one rank. On a mesh where ranks share rows (`cp`, chapter
#   [03e](03e_long_context.ipynb)) they fetch the choices of the whole row.
# - `_AlsoInLoss` adds the term of section 4 to the loss.
#
# **Before you move it:** which capacity drops nothing in this row, and how many of its slots are empty then?

# %%
prediction = None  # (capacity, share of slots that are empty)


def draw_capacity(row, capacity):
    fell_here, room = fell[row].tolist(), math.ceil(capacity * 2 * 64 / 8)
    kept = [min(count, room) for count in fell_here]
    drawing, (panel,) = viz.figure(7, 2.9)
    look = {"edgecolor": viz.INK, "linewidth": 0.6}
    panel.bar(range(8), kept, color=viz.PALETTE[2], label="in a slot", **look)
    panel.bar(range(8), [room - k for k in kept], bottom=kept, color="white", hatch="..", label="empty slot", **look)
    over = [count - k for count, k in zip(fell_here, kept, strict=True)]
    panel.bar(range(8), over, bottom=[room] * 8, color=viz.PALETTE[6], label="dropped", **look)
    panel.axhline(room, color=viz.INK, lw=1.2, ls="--")
    panel.set(xticks=range(8), xlabel="expert", ylabel="choices of one row", ylim=(0, 60))
    panel.legend(frameon=False, ncols=3, fontsize=9, loc="upper center")
    dropped, empty = sum(over) / 128, 1 - sum(kept) / (8 * room)
    panel.set_title(f"room {room}: {dropped:.0%} dropped, {empty:.0%} of the slots empty", fontsize=10)
    text = f"Row {row}, capacity {capacity}, room {room}. Choices by expert: {', '.join(map(str, fell_here))}."
    return viz.describe(drawing, f"{text} {dropped:.0%} are dropped, {empty:.0%} of the slots are empty.")


explore(draw_capacity, row=range(4), capacity=[1, 1.25, 1.5, 2, 3])

# %%
none_dropped = fell[0].max().item() * 8 / 128
print(f"you wrote: {prediction} - {none_dropped:.2f}, and {1 - 1 / none_dropped:.0%} of the slots are empty")

# %% [markdown] lang="en"
# Little room drops tokens, much room computes zeros. Common factors are between 1 and 2. There are other ways out:
# matrix products for unequal groups, with nothing dropped and nothing empty (MegaBlocks, Gale et al. 2022); experts
# that choose their tokens, so that all are full (Zhou et al. 2022). Best of all is to keep the load even.
#
# ### Capacity of what?
#
# We count by *row*: a token's fate depends on its own row alone. Many systems count over all tokens that a *device*
# has. That is simpler. **Predict:** if capacity is counted over a rank's rows, how many choices have another fate (kept
# or dropped) on 4 ranks with 2 rows each than on 1 rank with all 8?

# %%
prediction = None


def kept_by_rank(ranks):
    """Which choices are kept, if each rank counts over its rows. One long vector."""
    found = []
    for own in choices.flatten(1).chunk(ranks):
        limit = math.ceil(1.25 * own.numel() / 8)
        found += [place < limit for place in places_by_hand(own.flatten().tolist())]
    return torch.tensor(found)


changed = {ranks: (kept_by_rank(ranks) != kept_by_rank(1)).sum().item() for ranks in (2, 4, 8)}
print("you wrote:", prediction, f"- of {choices.numel():,} choices another fate have:", changed)
assert min(changed.values()) > 0

# %% [markdown] lang="en"
# Then the *model* depends on the layout: another number of ranks is another function. No run on one process can be
# compared with it. Counted by row it is the same function on every mesh, and the law of this course holds: gradients
# equal those of one process. And no text pushes another one's tokens out of their experts.
#
# ## 4. Balance
#
# Nothing so far keeps the router from sending all tokens to one expert. Worse, it feeds on itself: an expert that gets
# more tokens learns more, so it is chosen more. The cure is a term in the loss. For each row, with $f_e$ the share of
# choices that fell on expert $e$, and $P_e$ its mean probability (Fedus et al. 2021):
#
# $$L_{\text{balance}} = E \sum_e f_e\, P_e$$
#
# **By hand:** what is it for $E = 8$ if all is even, and what if every token goes to one expert with probability 1?

# %%
prediction = None  # (even, all to one)

even, one = torch.full((8,), 1 / 8), torch.eye(8)[0]
print("you wrote:", prediction, "- computed:", (8 * even @ even).item(), (8 * one @ one).item())
assert 8 * even @ even == 1 and 8 * one @ one == 8

# %% [markdown] lang="en"
# $f$ counts choices and has no gradient. $P$ has one. So the gradient of the term with respect to $P_e$ is $E f_e$: it
# pushes each probability down in proportion to the load, hardest where the load is highest. The term is multiplied by a
# small factor, `balance` in `Config` (0.01 by default), so that it does not outweigh the text.
#
# What happens without it? Four runs, one on each rank of our world, which do not talk to each other this time: without
# the term, and with factors of 0.001, 0.01 and 0.1. 50 steps of AdamW, 8 experts, one for each token.
#
# **Predict** for each factor: the share of tokens that the busiest expert has at the end. (An even load is 1/8.)

# %%
prediction = None  # four shares

FACTORS = 0.0, 0.001, 0.01, 0.1


def watch_balance(steps):
    config = mixture(experts=8, top=1, balance=FACTORS[dist.get_rank()])
    model, seen = fresh(config, torch.float32), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    layers = [block.mlp for block in model.blocks]
    for inputs, wanted in corpus.batches(steps=steps, rows=8, context=64):
        loss = F.cross_entropy(model(inputs).flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loads = torch.stack([layer.load for layer in layers])
        dropped = sum(layer.dropped.item() for layer in layers) / len(layers)
        seen.append((loads.amax(-1).mean().item(), dropped, loss.item(), loads))
    return seen


runs = dict(zip(FACTORS, world.run(watch_balance, 50), strict=True))

# %%
drawing, panels = viz.figure(8, 3, columns=2)
for (factor, seen), color, style in zip(runs.items(), viz.PALETTE[4:], ("-", "--", "-.", ":"), strict=False):
    for panel, i in zip(panels, (0, 1), strict=True):
        panel.plot([moment[i] for moment in seen], color=color, ls=style, label=f"{factor:g}")
panels[0].axhline(1 / 8, color=viz.INK, lw=0.8)
panels[0].set(xlabel="step", ylabel="share of the tokens", ylim=(0, 1))
panels[0].set_title("the busiest expert of 8 (line: even)", fontsize=10)
panels[1].set(xlabel="step", ylabel="share of the choices", ylim=(0, 1))
panels[1].set_title("dropped", fontsize=10)
drawing.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
ends = {factor: [sum(moment[i] for moment in seen[-10:]) / 10 for i in range(3)] for factor, seen in runs.items()}
told = "; ".join(f"factor {factor:g}: {busy:.2f} and {dropped:.2f}" for factor, (busy, dropped, _) in ends.items())
viz.show(drawing, f"Over 50 steps: the busiest expert's share, and what is dropped. In the last ten steps, {told}.")

# %%
print("you wrote:", prediction)
for factor, (busy, dropped, loss) in ends.items():
    print(f"factor {factor:<5g} busiest expert {busy:.0%}, dropped {dropped:.0%}, loss {loss:.2f} (last ten steps)")
assert ends[0.0][0] > 2 * ends[0.1][0] and ends[0.0][1] > 2 * ends[0.1][1]

# %%
drawing, panels = viz.figure(8, 2.4, columns=2)
for i, panel in enumerate(panels):
    table = torch.stack([torch.stack([moment[3][i] for moment in seen[-10:]]).mean(0) for seen in runs.values()])
    panel.imshow(table, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (row, e), share in zip(itertools.product(range(4), range(8)), table.flatten().tolist(), strict=True):
        ink = "white" if share > 0.6 else viz.INK
        panel.text(e, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=ink)
    panel.set(xticks=range(8), xlabel="expert")
    panel.set_yticks(range(4), [f"{factor:g}" for factor in runs])
    panel.set_title(f"layer {i}: percent of the tokens", fontsize=10)
    panel.tick_params(length=0)
panels[0].set_ylabel("factor")
viz.show(
    drawing,
    "The share of tokens that each of 8 experts got in the last ten steps, for two layers and four factors. Without "
    "the term most tokens are at few experts; with a factor of 0.1 all have some.",
)

# %% [markdown] lang="en"
# Without the term a few experts soon have nearly all tokens of a layer. They have no room for them, so most choices are
# dropped, and the other experts, most of the weights that we pay for, learn nothing. With the term the load spreads;
# the larger the factor, the sooner. But it is a second aim beside the text. A factor of 0.01 is common, as in the
# Switch Transformer.
#
# Now look at the losses: they hardly differ. In 50 steps a model learns which tokens are frequent, and needs no experts
# for it. **The loss does not show that experts have collapsed. Watch the load.** Each `MoE` keeps `load`, `dropped` and
# `balance_loss` of its last forward for that.
#
# (DeepSeek-V3 does most of its balancing without a loss. A number for each expert is added to its score when experts
# are chosen, and only then. It is raised where the load is low, and lowered where it is high.)
#
# ## 5. Tokens travel: dispatch and combine
#
# Now share out the experts. With 8 experts on 4 ranks each rank holds 2 of them, for every layer. For everything else,
# attention, norms, router, embedding, `ep` is a **data axis**: each rank has all of these weights, and rows of its own.
# Its tokens choose among all 8 experts, and 6 of them live elsewhere.
#
# A rank has laid its tokens into slots: (E, N, C), for each expert N slots of width C. Each rank has such a tensor, for
# its own rows. What does the rank with experts 2 and 3 need? Everyone's slots for these two. So: cut the tensor along
# the experts, and send the $i$-th part to rank $i$. That is an **all-to-all** (GShard, Lepikhin et al. 2020):
#
#     (E, N, C)  --dispatch-->  (E/n, nN, C)  --experts-->  (E/n, nN, C)  --combine-->  (E, N, C)
#
# **Your turn.** Write `my_dispatch` with `isend` and `irecv` in at most 15 lines. `slots.chunk(n)` cuts along the
# experts; what came is put side by side along dimension 1, in the order of the ranks.
#
# **Question.** $M$ are the bytes of a rank's slots. How many times $M$ does it send, in how many messages?

# %%
prediction = None  # (bytes in units of M, messages)


def my_dispatch(slots, axis):
    return slots  # your lines in place of this one


def named_slots(dispatch, combine):
    """One slot for each of 8 experts, named expert × 10 + rank. Where they are before, between and after."""
    axis = connect(Mesh(ep=4))["ep"]
    before = (10.0 * torch.arange(8) + axis.index).view(8, 1, 1)
    with ledger() as book:
        between = dispatch(before, axis)
    after = combine(between, axis)
    return [y.flatten().tolist() for y in (before, between, after)], book.bytes("ep") / before.nbytes, book.calls("ep")


wanted = [[10.0 * e + rank for e in (2 * mine, 2 * mine + 1) for rank in range(4)] for mine in range(4)]
held, *_ = zip(*world.run(named_slots, my_dispatch, lambda slots, axis: slots), strict=True)
print("right:", [between for _, between, _ in held] == wanted)


# %% jupyter={"source_hidden": true}
# One answer
def exchange(shares, axis):
    """Share i to rank i. Returns what came, in the order of the ranks."""
    others = [i for i in range(axis.size) if i != axis.index]
    coming = {i: irecv(shares[i], axis, source=i) for i in others}
    going = [isend(shares[i], axis, to=i) for i in others]
    arrived = [coming[i].wait() if i in coming else shares[i] for i in range(axis.size)]
    for transfer in going:
        transfer.wait()
    return arrived


def dispatch_by_hand(slots, axis):
    return torch.cat(exchange(slots.chunk(axis.size, 0), axis), 1)


def combine_by_hand(slots, axis):
    return torch.cat(exchange(slots.chunk(axis.size, 1), axis), 0)


# %%
held, sent, messages = zip(*world.run(named_slots, dispatch_by_hand, combine_by_hand), strict=True)
assert [between for _, between, _ in held] == wanted and all(before == after for before, _, after in held)
print("you wrote:", prediction, "- each rank sends", sent[0], "M in", messages[0], "messages")
assert set(sent) == {3 / 4} and set(messages) == {3}
moments = zip(("before", "at the experts", "back"), zip(*held, strict=True), strict=True)
viz.show(viz.draw_tensors(dict(moments), hue=lambda name: int(name) // 20))

# %% [markdown] lang="en"
# The tens are the expert, the ones the rank whose token it is, the color the rank that holds the expert. Before, each
# rank has a row of all colors. At the experts, each has one color, from all ranks. `combine` is the same exchange the
# other way.
#
# $\frac{n-1}{n} M$ each. And backward? The gradient of an exchange is the exchange back. So a layer sends
# $2\frac{n-1}{n}M$ forward and as much backward, in 4 calls. The package's version:

# %%
viz.show_source(expert.dispatch, expert.combine, expert._exchange, expert.cut_experts)

# %% [markdown] lang="en"
# - One collective in place of $2(n-1)$ messages, and a gradient: `Collective.apply` takes the way there and the way
#   back.
# - `cut_experts` keeps a rank's share of every weight, and puts [dispatch](../docs/glossary.md#dispatch) and combine
#   around the layer's `forward`. The mixture itself is not told.
# - Ranks may have unlike numbers of rows, so unlike N. An all-to-all with disagreeing sizes would hang or crash. So
#   they agree on the largest first, one number, and fill up with zeros.
#
# Does a mixture whose experts live on four ranks give what it gives on one?


# %%
def on_four(x):
    layer, _ = first_mixture(mixture(experts=8, top=2))
    axis = connect(Mesh(ep=4))["ep"]
    expert.cut_experts(layer.experts, axis)
    with ledger() as book:
        y = layer(x.chunk(4)[axis.index])  # two rows each
    return y.detach(), book.bytes("ep", "all_to_all"), layer.experts.up.size(0)


answers = world.run(on_four, x)
off = distance(torch.cat([y for y, *_ in answers]), layer(x))
M = 8 * (2 * room) * 128 * 8  # experts, slots of two rows, width, bytes
print(f"distance to one process {off:.0e}; each rank sends {answers[0][1] / M} M and holds {answers[0][2]} experts")
assert off < 1e-12 and all(sent == 2 * 3 / 4 * M and held == 2 for _, sent, held in answers)

# %% [markdown] lang="en"
# How much is it for a token? $M$ has $E \cdot N$ vectors, and $N$ is the rank's number of rows times $\text{room}$.
# With $\text{room} \approx \text{capacity} \cdot \text{top} \cdot T / E$ the number of experts cancels: **a token sends
# $\text{capacity} \cdot \text{top}$ vectors there and gets as many back**, however many experts there are. Of these,
# $(n-1)/n$ leave the rank.
#
# **Question.** Mixtral: width 4,096, `top` 2, 16 bits, capacity 1, 8 ranks. How many bytes does a token send in the
# forward pass of one layer, and how long does that take beside its experts' computing? Take $4 \cdot 10^{14}$
# operations a second, and 50 GB/s or 300 GB/s.

# %%
prediction = None  # (bytes, sending / computing at 50 GB/s, at 300 GB/s)


def sending_and_computing(width, hidden, top, ranks, bandwidth, matrices=3, speed=4e14):
    """Seconds of a token in one layer's forward pass: of its journeys, and of its experts."""
    sent = 2 * (ranks - 1) / ranks * top * width * 2
    return sent / bandwidth, top * matrices * 2 * width * hidden / speed, sent


print("you wrote:", prediction)
for name, shape in {"Mixtral": (4096, 14_336, 2, 8), "DeepSeek-V3": (7168, 2048, 8, 64)}.items():
    for bandwidth in (50e9, 300e9):
        sending, computing, sent = sending_and_computing(*shape, bandwidth)
        part = f"{sending / computing:.2f} of the time of computing"
        print(f"{name:<12} {sent:>9,.0f} bytes a token; at {bandwidth / 1e9:.0f} GB/s sending takes {part}")

# %% [markdown] lang="en"
# The quotient has neither `top` nor the width in it. With $n$ large it is $\frac{2S}{3BH}$ for experts of three
# matrices and hidden width $H$: **experts must be wide enough.** Mixtral's are 14,336 wide. DeepSeek-V3 has 256 narrow
# ones a layer (2,048 wide, a token uses 8, and one more that all use). By this estimate its tokens travel longer than
# their experts compute, unless links are fast. Its authors took two measures against that: a token's experts may be on
# 4 machines at most, and one microbatch travels while another computes (DeepSeek-AI 2024).
#
# An all-to-all cannot hide under its own experts: they wait for it. And it is sensitive to latency: on 64 ranks each
# message has $M/64$.
#
# ## 6. The whole thing: `Mesh(ep=)`
#
# `parallelize(model, Mesh(dp=2, ep=2))` on four ranks: two groups that each hold all experts, two ranks in a group,
# four experts a rank. Rows are shared out over all four.

# %%
viz.show(viz.draw_mesh(Mesh(dp=2, ep=4), "ep"))

# %% [markdown] lang="en"
# (Eight ranks here, so that one can see it. Ranks with one letter hold all experts together. Ranks one above the other
# hold the same ones.)
#
# First the law. One process, then the mesh, in float64. For the comparison to be fair, tokens must choose the same
# experts in both, so we compare the choices as well.
#
# **Predict:** the distance of the gradients, and how many choices differ.

# %%
prediction = None  # (distance, choices)

config = mixture(experts=8, top=2)


def note_choices(layers):
    """A list that gets the choices of each layer's forward."""
    noted = []
    for layer in layers:
        layer.router.register_forward_hook(lambda _, given, y: noted.append(y.detach().topk(2).indices))
    return noted


model = fresh(config)
chosen = note_choices([block.mlp for block in model.blocks])
loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
loss.backward()
alone = {name: p.grad for name, p in model.named_parameters()}
print(f"dropped in each layer: {', '.join(f'{block.mlp.dropped:.0%}' for block in model.blocks)}")
assert all(block.mlp.dropped > 0.02 for block in model.blocks)


# %%
def one_step(tokens, targets, mesh, options):
    model = parallelize(fresh(config), mesh, **options)
    noted = note_choices(model.mixtures)
    with ledger() as book:
        loss = model.step(tokens, targets)
    whole = model.full_gradients()
    return loss.item(), whole if dist.get_rank() == 0 else None, book, noted


def furthest(got, wanted):
    """The largest difference, as a share of the largest number in all of them."""
    largest = max(g.abs().max() for g in wanted.values())
    return (max((got[name] - wanted[name]).abs().max() for name in wanted) / largest).item()


answers = world.run(one_step, tokens, targets, Mesh(dp=2, ep=2), {})
value, got, book, _ = answers[0]
noted = [torch.cat([rank[3][i] for rank in answers]) for i in range(2)]
other = sum((a != b).sum().item() for a, b in zip(noted, chosen, strict=True))
print(f"you wrote: {prediction} - distance {furthest(got, alone):.0e}, other choices: {other}")
assert furthest(got, alone) < 1e-12 and other == 0 and abs(value - loss.item()) < 1e-12

# %% [markdown] lang="en"
# Same choices, same drops, same gradients, the balance term included. Here is what rank 0 sent:

# %%
print(book)

# %% [markdown] lang="en"
# Three axes are in it. `ep` carries slots. And gradients travel along two different ones. Why?
#
# ## 7. Which gradients are summed over whom
#
# A rule covers every case: **a gradient is summed over the ranks that hold the same parameter and saw other tokens.**
#
# - Attention, norms, router, embedding, head: all four ranks hold the same, and each saw its own rows. Sum over
#   `dp` × `ep`.
# - An expert: it is on two ranks of the four, those in one `dp` line. But the tokens of *both* ranks of its `ep` line
#   came to it. So its gradient holds their part already. What is missing are the tokens of the other group. Sum over
#   `dp` only.
#
# That is one line in the package:

# %%
viz.show_source(minipar.train.Parallel._replicas)

# %% [markdown] lang="en"
# **Question.** How many bytes does a rank send for gradients along each axis? And in the all-to-alls? $D$ are the bytes
# of all dense parameters, $X$ those of all experts.

# %%
prediction = None  # for instance {"dp·ep": "2 × 3/4 D", "dp": ..., "ep": ...}

is_expert = {name: ".experts." in name for name in alone}
D = sum(g.nbytes for name, g in alone.items() if not is_expert[name])
X = sum(g.nbytes for name, g in alone.items() if is_expert[name])
slots = 8 * (2 * room) * 128 * 8  # of two rows, as above
formula = {
    ("dp·ep", "all_reduce"): 2 * 3 / 4 * (D + 16),  # 16: the loss and the number of tokens
    ("dp", "all_reduce"): 2 * 1 / 2 * X / 2,
    ("ep", "all_to_all"): 2 * 4 * 1 / 2 * slots,  # layers, calls
    ("ep", "all_reduce"): 2 * 2 * 1 / 2 * 8,  # the agreement on N
}
print("you wrote:", prediction)
for (axis, op), count in formula.items():
    print(f"{axis:<6} {op:<11} {count:>12,.0f} bytes")
    assert all(rank[2].bytes(axis, op) == count for rank in answers)
assert all(rank[2].bytes() == sum(formula.values()) for rank in answers)

# %% [markdown] lang="en"
# Every byte is explained. Look at the experts' gradients: with `Mesh(dp=4)` they would send $2 \cdot \frac34 X$, here
# $\frac12 X$. **Expert parallelism takes bytes out of the gradient exchange and puts others into every layer.** For
# `Mesh(ep=4)` expert gradients send nothing at all.
#
# In systems that take the *mean* over data ranks, there is a trap here. The mean of dense gradients divides by
# `dp` × `ep`; an expert's must be divided by the same number, not by the `dp` ranks that it is summed over. minipar
# divides the loss before backward, so there is nothing to divide after.
#
# ### A bug that the loss does not show
#
# Suppose someone sums *all* gradients over all data ranks, as one does without experts. Shapes fit: every rank has four
# experts. But they are other experts.
#
# **Predict:** is the first step's loss wrong? Does the loss still fall in 20 steps of AdamW? And the gradient?

# %%
prediction = None


def all_over_both(self, parameter):
    return self.replicas  # of dense parameters


def train(batches, mistaken):
    bug = patch.object(minipar.train.Parallel, "_replicas", all_over_both) if mistaken else nullcontext()
    with bug:
        model = parallelize(fresh(config, torch.float32), Mesh(dp=2, ep=2))
    first = model.step(tokens, targets)
    gradient = model.full_gradients()
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for batch in batches:
        losses.append(model.step(*batch).item())
        optimizer.step()
    return first.item(), gradient if dist.get_rank() == 0 else None, losses


# %%
batches = list(corpus.batches(steps=20, rows=8, context=64, seed=1))
right, wrong = (world.run(train, batches, mistaken)[0] for mistaken in (False, True))
experts, others = ({name: g for name, g in alone.items() if is_expert[name] == kind} for kind in (True, False))
experts_off, others_off = furthest(wrong[1], experts), furthest(wrong[1], others)
print(f"you wrote: {prediction} - first loss {right[0]:.6f} and {wrong[0]:.6f}")
print(f"with the bug, gradients of experts are off by {experts_off:.0%}, all others by {others_off:.0e}")
assert abs(right[0] - wrong[0]) < 1e-6 and experts_off > 0.5 and others_off < 1e-4
assert wrong[2][-1] < wrong[2][0] - 0.5

# %%
drawing, (panel,) = viz.figure(6.5, 2.8)
panel.plot(right[2], color=viz.PALETTE[0], lw=6, label="right")
panel.plot(wrong[2], color=viz.PALETTE[6], marker="s", ms=4, ls="--", label="experts summed over ep, too")
panel.set(xlabel="step", ylabel="loss", xticks=range(0, 20, 5))
panel.legend(frameon=False, fontsize=9)
viz.show(
    drawing,
    f"Loss over 20 steps. Right: {right[2][0]:.2f} to {right[2][-1]:.2f}. With the bug: {wrong[2][0]:.2f} to "
    f"{wrong[2][-1]:.2f}. Both fall.",
)
apart = max(abs(a - b) for a, b in zip(right[2], wrong[2], strict=True))
assert apart < 0.05 < (right[2][0] - right[2][-1]) / 10

# %% [markdown] lang="en"
# The curves can hardly be told apart, even side by side: as in section 4, the first steps of training hardly need
# experts. The gradient of the first step shows it at once.
#
# ### On other meshes
#
# `ep` goes with every other axis. With `tp` each expert's matrices are cut as well; with `cp` the ranks of a row agree
# on who came first at an expert; with `pp` each stage has its own mixtures.

# %%
layouts = {
    Mesh(ep=4): {"microbatches": 2},
    Mesh(dp=2, ep=2): {"zero": 2},
    Mesh(ep=2, tp=2): {"sequence_parallel": True},
    Mesh(ep=2, cp=2): {},
    Mesh(pp=2, ep=2): {"microbatches": 2},
}
for mesh, options in layouts.items():
    _, got, *_ = world.run(one_step, tokens, targets, mesh, options)[0]
    print(f"{mesh} {options}: distance {furthest(got, alone):.0e}")
    assert furthest(got, alone) < 1e-12

# %% [markdown] lang="en"
# ## 8. What a rank holds
#
# **Question.** `Mesh(dp=4)`, `Mesh(dp=2, ep=2)`, `Mesh(ep=4)`: what share of the weights does a rank hold? Use $D$ and
# $X$ from above.

# %%
prediction = None


def held(mesh):
    model = parallelize(fresh(config), mesh)
    own = {name: p.nbytes for name, p in model.named_parameters()}
    experts = sum(size for name, size in own.items() if ".experts." in name)
    return sum(own.values()) - experts, experts


found = {mesh: world.run(held, mesh)[0] for mesh in (Mesh(dp=4), Mesh(dp=2, ep=2), Mesh(ep=4))}
assert all(sizes == (D, X // mesh.ep) for mesh, sizes in found.items())
print("you wrote:", prediction, "- measured:", *(f"{sum(sizes) / (D + X):.0%}" for sizes in found.values()))
parts = {"dense": [d / 1e6 for d, _ in found.values()], "experts": [e / 1e6 for _, e in found.values()]}
names = [str(mesh) for mesh in found]
viz.show(viz.draw_bars(names, parts, "MB of weights on each rank, float64", "What a rank holds"))

# %% [markdown] lang="en"
# $D + X/n$. The rest of what `dp` keeps four times, gradients and optimizer state, goes the same way. For Mixtral in
# mixed precision (16 bytes a parameter, chapter 3a):

# %%
expert_parameters = 32 * 8 * 3 * 4096 * 14_336
other_parameters = mixtral(8) - expert_parameters
for n in (1, 2, 4, 8):
    total = 16 * (other_parameters + expert_parameters / n)
    print(f"ep={n}: {total / 1e9:>4,.0f} GB on each GPU, {16 * other_parameters / 1e9:.0f} GB of them dense")
assert round(total / 1e9) == 116  # with ep=8

# %% [markdown] lang="en"
# With `ep=8`, one expert a GPU, it is 116 GB and still does not fit into 80: the rest is for ZeRO, `tp` or `pp`. `ep`
# divides experts only, and never further than their number.
#
# When which, for the experts' weights?
#
# - **ep** sends each token's vectors, $2\,\frac{n-1}{n} \cdot \text{capacity} \cdot \text{top}$ of them there and back
#   in a forward pass. Each expert stays whole, so its matrix products stay large.
# - **tp** cuts every expert into narrow strips, and sends what experts give as partial sums of all ranks. Its products
#   get thin.
# - **ZeRO-3** brings weights to the tokens. Each microbatch gathers *all* experts, used or not: $X$ in place of slots.
#   It pays where a rank has very many tokens.
#
# The document's section 3.2.1 lets ranks share out layers or neurons, and pass parameters and gradients on. Experts are
# yet another thing to share out, and again it is not parameters that travel.
#
# ## What you have now
#
# - **mixture of experts**: many MLPs in place of one, of which a token uses `top`. Parameters grow with the experts,
#   operations do not.
# - **router**: softmax and top-k. Its gradient comes through the weights of what experts give.
# - **capacity**: slots for each expert. Too few drop choices, too many compute zeros.
# - **balance loss**: $E \sum_e f_e P_e$, 1 when even. Without it the load goes to few experts.
# - **dispatch, combine**: two all-to-alls, $2\frac{n-1}{n}M$ forward and as much backward.
# - **expert parallelism**: for experts a cut, for all else a data axis. Dense gradients are summed over `dp` × `ep`,
#   those of experts over `dp`.
#
# ## Three questions to take along
#
# 1. A model has 64 experts a layer, `top=2`, capacity 1.25. Someone doubles the experts. What happens to the bytes of
#    an all-to-all, to the operations, and to the memory of each of 16 ranks?
# 2. `Mesh(dp=4, ep=8)`. Over how many ranks is the router's gradient summed, and over how many that of an expert?
# 3. Rank 3 gets no tokens at all in some step, since nobody chooses its experts. What does it send, and what does it
#    compute?
#
# <details><summary>Answers</summary>
#
# 1. Bytes and operations stay: a token still uses 2. (The router's own work doubles, and it is small.) The experts'
#    memory doubles.
# 2. Over 32, and over 4.
# 3. The same as always. Slots are sent and computed, full or empty; its experts compute zeros. And its own rows' tokens
#    go to the others.
#
# </details>

# %%
assert 4 * 8 == 32 and Mesh(dp=4, ep=8).size == 32 and len(Mesh(dp=4, ep=8).line("dp", 0)) == 4  # the answers above
world.close()

# %% [markdown] lang="en"
# **Next:** [the exercises](../exercises/03f_experts.ipynb), four graded tasks, from the router's queue to a drop that
# looks into the future:
#
#     python -m minipar grade exercises/03f_experts.ipynb
#
# Then [Hybrid parallelism](03g_hybrid.ipynb): all axes on one mesh.
#
# ## References
#
# - Shazeer et al. 2017, *Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer*,
#   [arXiv 1701.06538](https://arxiv.org/abs/1701.06538)
# - Lepikhin et al. 2020, *GShard: Scaling Giant Models with Conditional Computation and Automatic Sharding*,
#   [arXiv 2006.16668](https://arxiv.org/abs/2006.16668)
# - Fedus et al. 2021, *Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient Sparsity*,
#   [arXiv 2101.03961](https://arxiv.org/abs/2101.03961)
# - Zhou et al. 2022, *Mixture-of-Experts with Expert Choice Routing*,
#   [arXiv 2202.09368](https://arxiv.org/abs/2202.09368)
# - Gale et al. 2022, *MegaBlocks: Efficient Sparse Training with Mixture-of-Experts*,
#   [arXiv 2211.15841](https://arxiv.org/abs/2211.15841)
# - Jiang et al. 2024, *Mixtral of Experts*, [arXiv 2401.04088](https://arxiv.org/abs/2401.04088)
# - DeepSeek-AI 2024, *DeepSeek-V3 Technical Report*, [arXiv 2412.19437](https://arxiv.org/abs/2412.19437)
