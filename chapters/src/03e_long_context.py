# %% [markdown] lang="en"
# # Long context
#
# So far each row of a batch stayed on one rank, whatever else was cut. What if a single row is too long for that? Then
# the ranks share out its *positions*. This is **[context parallelism](../docs/glossary.md#context-parallelism)**, the
# axis `cp` of a mesh. At the end of this chapter you can
#
# - say what grows with the length of a row, and why more data ranks do not help;
# - put attention together from blocks of keys, exactly ([online softmax](../docs/glossary.md#online-softmax)), by hand
#   and in code;
# - write [ring attention](../docs/glossary.md#ring-attention), forward and backward, and predict every byte that it
#   sends;
# - show why a causal mask makes ranks unequal, and cure it by the order of the sequence;
# - write the other way, [all-to-all](../docs/glossary.md#all-to-all) over the heads, and say when to take which;
# - train on `Mesh(cp=4)` and get the gradients of one process.
#
# **Time:** about two hours. **You need:** [Ranks and collectives](02b_ranks_and_collectives.ipynb) and sections 1 and 6
# of [Data parallelism](03a_data_parallel.ipynb). The chapter belongs to section 3.2.1 (model parallelism) of the
# document that this course follows and tests, 《大规模语言模型从理论到实践 混合并行》. The document does not mention
# long sequences. Section 1 shows what is missing without them.
#
# **How to read it.** As before: write your prediction into the cell before you run it. Answers to "Your turn" are in
# the folded cell that follows.
#
# ## Three questions to warm up
#
# 1. Which parts of a GPT block let a token see another token: the norms, attention, the MLP?
# 2. Four ranks call `all_to_all` with a tensor of 8 MB each. How many bytes does each rank send?
# 3. All ranks send to the right, then receive from the left, with `send` and `recv`. What happens, and which two
#    functions mend it?
#
# <details><summary>Answers</summary>
#
# 1. Attention only. Norms and MLP treat each token by itself.
# 2. 3/4 × 8 MB = 6 MB. A quarter stays.
# 3. A deadlock: everyone waits in `send`. With `isend` and `irecv` all transfers are under way at the same time.
#
# </details>

# %%
import itertools
import math
import time
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import torch
import torch.nn.functional as F

import minipar
from minipar import Config, Mesh, World, connect, context, corpus, ledger, parallelize, viz
from minipar.collectives import all_to_all, irecv, isend
from minipar.context import causal_pairs, ring_attention, zigzag, zigzag_order
from minipar.widgets import explore

assert 3 / 4 * 8 == 6  # the second answer above
world = World(4)

# %% [markdown] lang="en"
# ## 1. What grows with the length of a row
#
# Attention compares each token with each other one. Every token has a **query**, a **key** and a **value**, three
# vectors $q$, $k$, $v$. A token's **scores** are the products of its query with all keys. Softmax makes weights of
# them, and the token gets the weighted sum of the values:
#
# $$o = \sum_j \frac{e^{s_j}}{\sum_i e^{s_i}}\, v_j \qquad s_j = \frac{q \cdot k_j}{\sqrt{d}}$$
#
# where $d$ is the length of the vectors. There are several **heads**, each with vectors of its own. For a row of $T$
# tokens each head has $T \times T$ scores.
#
# Backward needs some of what forward computed. We count it: PyTorch calls a function of ours for each tensor that it
# keeps for backward (`saved_tensors_hooks`), and we add up the memory of those that are no parameters.


# %%
@contextmanager
def what_backward_needs(parameters=()):
    """Gives a dict, place in memory -> bytes, of what autograd keeps inside `with`. Parameters are left out."""
    theirs, found = {p.untyped_storage().data_ptr() for p in parameters}, {}

    def note(x):
        memory = x.untyped_storage()
        if memory.data_ptr() not in theirs:
            found[memory.data_ptr()] = memory.nbytes()  # each piece once, however many tensors are in it
        return x.detach()

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        yield found


# %% [markdown] lang="en"
# Two ways to compute the same attention. The first is the formula, line by line. The second is PyTorch's
# `scaled_dot_product_attention`, a **fused** kernel: it goes through the keys in blocks and never has all scores in
# memory (FlashAttention, Dao et al. 2022). How it can do that is the subject of section 2.
#
# **Predict:** from 512 to 1,024 tokens, by what factor does each one's memory for backward grow?

# %%
prediction = None  # (the formula, fused)


def by_the_formula(q, k, v):
    scores = q @ k.mT / math.sqrt(q.size(-1))
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)  # a token does not see later ones
    return scores.masked_fill(future, -torch.inf).softmax(-1) @ v


fused = partial(F.scaled_dot_product_attention, is_causal=True)


# %%
def kept(attention, length, heads=8, head_dim=16):
    q, k, v = torch.randn(3, 1, heads, length, head_dim, requires_grad=True).unbind()
    with what_backward_needs() as found:
        attention(q, k, v)
    return sum(found.values())


lengths = [64, 128, 256, 512, 1024, 2048]
ways = {"by the formula": by_the_formula, "fused": fused}
memory = {name: [kept(way, n) for n in lengths] for name, way in ways.items()}
growth = {name: sizes[4] / sizes[3] for name, sizes in memory.items()}
print("you wrote:", prediction, "- measured:", ", ".join(f"{name} {x:.2f}" for name, x in growth.items()))
assert growth["by the formula"] > 3.7 and growth["fused"] == 2

# %%
drawing, (panel,) = viz.figure(6.5, 3)
for (name, sizes), color, marker in zip(memory.items(), viz.PALETTE[5:], "os", strict=False):
    panel.loglog(lengths, [size / 1e6 for size in sizes], color=color, marker=marker, label=name)
panel.set_xticks(lengths, [f"{n:,}" for n in lengths])
panel.minorticks_off()
panel.set(xlabel="tokens in the row", ylabel="MB kept for backward")
panel.set_title("One attention, 8 heads of 16, float32", fontsize=10)
panel.legend(frameon=False, fontsize=9)
told = "; ".join(f"{name}: {sizes[0] / 1e6:.2g} to {sizes[-1] / 1e6:.3g}" for name, sizes in memory.items())
viz.show(drawing, f"MB kept for backward against tokens, 64 to 2,048, logarithmic. {told}. The formula grows faster.")

# %% [markdown] lang="en"
# The formula keeps a $T \times T$ matrix for each head: twice the length, four times the memory. The fused kernel grows
# with $T$. So is the problem solved? Let us see what a whole block keeps, with [fused
# attention](../docs/glossary.md#fused-attention).

# %%
config = Config(context=1024)  # 4 blocks of width 128, 8 heads


def fresh(dtype=torch.float64, config=config):
    torch.manual_seed(0)
    return minipar.gpt(config).to(dtype)


model = fresh(torch.float32)
per_length = {}
for length in (256, 512, 1024):
    with what_backward_needs(model.parameters()) as found:
        logits = model(torch.zeros(1, length, dtype=torch.int64))
    per_length[length] = sum(found.values())
slope = (per_length[1024] - per_length[512]) / 512
numbers_per_token = slope / 4 / config.width / config.depth  # in units of the width, a block
print(f"kept: {slope:,.0f} bytes for each token = {numbers_per_token:.1f} × width numbers a block")
assert per_length[512] - per_length[256] == slope * 256 and 16 < numbers_per_token < 17

# %% [markdown] lang="en"
# About 16 times the width, for each token and block: what goes into the two norms and what comes out of them (4), $q$,
# $k$, $v$ and what attention gives (4), and two tensors of four times the width in the MLP (8). The rest is small.
#
# Now a large model. Llama 3's largest has 126 layers of width 16,384, and was trained on rows of 8,192 tokens, in the
# end on rows of 131,072 (Llama Team 2024). Its blocks are built a little differently from ours; with our count, in 16
# bits, **how much memory does one row take?** Write down the order of magnitude: 10 GB, 100 GB, 1 TB, 10 TB?

# %%
prediction = None


def row_bytes(length, layers=126, width=16_384):
    return 16 * width * 2 * length * layers


for length in (8_192, 131_072):
    print(f"one row of {length:>7,} tokens: {row_bytes(length) / 1e12:5.2f} TB of activations")
assert 8e12 < row_bytes(131_072) < 9e12
rows_in_batch = 2**24 // 131_072
print(f"rows in a batch of 2^24 tokens: {rows_in_batch}")

# %% [markdown] lang="en"
# Which of the known cuts helps?
#
# - **Data ranks** share out rows. There is one row here, and a rank cannot have less than one. Rows run out, too: a
#   batch of 16.8 million tokens has 128 rows of this length, and the run used 16,384 GPUs.
# - **Tensor parallelism** ([03b](03b_tensor_parallel.ipynb)) divides this memory by its number of ranks, if it cuts the
#   sequence between the layers, too. But it stops where a machine's fast links stop: commonly at 8.
# - **Pipeline parallelism** ([03c](03c_pipeline_parallel.ipynb)) divides the layers. But its first stage holds as many
#   microbatches as there are stages, which eats up the gain.
# - **Recomputing** keeps one tensor of the 16 a block, and computes the rest again. The last one stays, and one block
#   at a time needs all.
#
# 8.66 TB / 8 by tensor parallelism is more than 1 TB on each GPU. So cut the one thing that is left: the row.
#
# (The document's section 3.2.1 lets ranks share out "layers or neurons", and send each other parameters and gradients.
# Positions are a third thing to share out. No parameter is sent then, and none is cut.)
#
# For norms, MLP, embedding and loss that is trivial: they treat each token by itself, so a rank computes its share of
# the tokens and asks nobody. Attention is the one place where the shares have to meet. A query needs **all** keys and
# values. The rest of this chapter is about this one place.
#
# ## 2. Softmax, block by block
#
# A rank has the queries of its tokens. Say that it sees the keys in two blocks, A and B, one after the other. Softmax
# divides by a sum over *all* scores. Can it begin before it has seen B?
#
# Attend to each block alone. Block A gives an output $o_A$ and the sum of its exponentials $z_A = \sum_{j \in A}
# e^{s_j}$. So $z_A\, o_A = \sum_{j \in A} e^{s_j} v_j$: the output times its sum is the numerator. Numerators add, and
# so do sums:
#
# $$o = \frac{z_A\, o_A + z_B\, o_B}{z_A + z_B}$$
#
# A weighted mean of the two outputs. **Try it by hand.** Four keys with scores 0, ln 2, ln 3, ln 4, so that the
# exponentials are 1, 2, 3, 4. The values are 10, 20, 30, 40. Block A has the first two keys, B the others. Compute
# $o_A$, $z_A$, $o_B$, $z_B$, and $o$.

# %%
prediction = None  # (o_A, z_A, o_B, z_B, o)

e, values = [1, 2, 3, 4], [10, 20, 30, 40]


def attend_by_hand(keys):
    z = sum(e[j] for j in keys)
    return sum(e[j] * values[j] for j in keys) / z, z


(o_a, z_a), (o_b, z_b) = attend_by_hand([0, 1]), attend_by_hand([2, 3])
o = (z_a * o_a + z_b * o_b) / (z_a + z_b)
print("you wrote:", prediction, "- computed:", (round(o_a, 2), z_a, round(o_b, 2), z_b, round(o, 2)))
assert math.isclose(o, attend_by_hand([0, 1, 2, 3])[0]) and math.isclose(o, 30)

# %%
drawing, panels = viz.figure(7.5, 2.3, columns=3)
shown = ("block A alone", [1 / 3, 2 / 3, 0, 0]), ("block B alone", [0, 0, 3 / 7, 4 / 7]), ("both", [0.1, 0.2, 0.3, 0.4])
for panel, (title, weights) in zip(panels, shown, strict=True):
    panel.bar(range(4), weights, color=[viz.PALETTE[i // 2] for i in range(4)], edgecolor=viz.INK)
    panel.set(xticks=range(4), ylim=(0, 0.75), xlabel="key")
    panel.set_title(title, fontsize=10)
panels[0].set_ylabel("weight")
viz.show(
    drawing,
    "Softmax weights of four keys. Block A alone: 1/3, 2/3. Block B alone: 3/7, 4/7. Both: 0.1, 0.2, 0.3, 0.4, "
    "which is A's times 3/10 and B's times 7/10.",
)

# %% [markdown] lang="en"
# The weights of a block keep their proportions. Only their common size changes: A's shrink to 3/10, since A has 3 of
# the 10 that the exponentials sum to, and B's to 7/10.
#
# One thing is wrong with this formula on a computer. **Predict:** what does it give if the scores are 1,000 higher?
# Softmax does not change when all scores grow by the same number. (The largest float64 is about $10^{308}$.)

# %%
prediction = None


def merge_by_sums(scores_a, scores_b, values_a, values_b):
    z_a, z_b = scores_a.exp().sum(), scores_b.exp().sum()
    o_a, o_b = scores_a.softmax(0) @ values_a, scores_b.softmax(0) @ values_b
    return ((z_a * o_a + z_b * o_b) / (z_a + z_b)).item()


four = torch.tensor([e, values], dtype=torch.float64)
scores, v = four[0].log(), four[1]
small = merge_by_sums(scores[:2], scores[2:], v[:2], v[2:])
large = merge_by_sums(1000 + scores[:2], 1000 + scores[2:], v[:2], v[2:])
print("you wrote:", prediction, "- measured:", round(small, 9), "and", large)
assert math.isnan(large)

# %% [markdown] lang="en"
# $e^{1000}$ is too large for a float64. So never have the sums themselves: carry their **logarithms**,
# $\ell_A = \ln z_A$. PyTorch's `logsumexp` computes them safely. Then
#
# $$\ell = \ln\!\left(e^{\ell_A} + e^{\ell_B}\right) \qquad o = e^{\ell_A - \ell}\, o_A + e^{\ell_B - \ell}\, o_B$$
#
# The exponents $\ell_A - \ell$ are never above 0, so nothing overflows. `torch.logaddexp` computes $\ell$. This is
# **online softmax** (Milakov and Gimelshein 2018).
#
# We take $q$, $k$ and $v$ from the first block of our GPT, for two rows of the documentation text. An untrained model
# looks at all tokens nearly alike, and a mistake in softmax would hardly show. So we make its queries 40 times as
# large.

# %%
tokens, targets = next(corpus.batches(steps=1, rows=2, context=128))


def first_block(tokens):
    """q, k and v of the first block: (rows, heads, tokens, head_dim) each."""
    model, found = fresh(), {}
    for name in "qkv":
        layer = getattr(model.blocks[0].attention, name)
        layer.register_forward_hook(lambda _, given, y, name=name: found.update({name: y.detach()}))
    model(tokens)
    return [found[name].unflatten(-1, (8, 16)).transpose(1, 2).contiguous() for name in "qkv"]


q, k, v = first_block(tokens)
q = 40 * q
largest = (q @ k.mT / 4).softmax(-1).amax(-1).mean()
print(f"q, k and v: {tuple(q.shape)} each; the largest weight of a query is {largest:.2f} on average")
whole = F.scaled_dot_product_attention(q, k, v)  # the truth, without a mask for now


# %%
def distance(got, wanted):
    """The largest difference, as a share of the largest number."""
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


# %% [markdown] lang="en"
# **Your turn:** write `my_merge` in at most 3 lines. It gets output and logarithm of some keys, and of some more, and
# returns both for all of them. `attend` is given.


# %%
def attend(q, k, v):
    """Attention to these keys alone, and each query's logarithm: (..., T, d) and (..., T, 1)."""
    scores = q @ k.mT / math.sqrt(q.size(-1))
    lse = scores.logsumexp(-1, keepdim=True)  # logarithm of the sum of the exponentials
    return (scores - lse).exp() @ v, lse


def my_merge(out, lse, more, more_lse):
    return out, lse  # your lines in place of this one


first = [x[:, :, :64] for x in (k, v)]
second = [x[:, :, 64:] for x in (k, v)]
got, _ = my_merge(*attend(q, *first), *attend(q, *second))
print("right:", distance(got, whole) < 1e-12)


# %% jupyter={"source_hidden": true}
# One answer
def merge(out, lse, more, more_lse):
    total = torch.logaddexp(lse, more_lse)
    return out * (lse - total).exp() + more * (more_lse - total).exp(), total


got, _ = merge(*attend(q, *first), *attend(q, *second))
print(f"two blocks: distance to whole attention {distance(got, whole):.0e}")
assert distance(got, whole) < 1e-12

# %% [markdown] lang="en"
# **Question.** Blocks of 1, 5 and 32 keys, and the blocks in another order: for which of them is the result that of
# whole attention?

# %%
prediction = None


def in_blocks(q, k, v, size, backwards=False):
    blocks = list(zip(k.split(size, 2), v.split(size, 2), strict=True))[:: -1 if backwards else 1]
    out, lse = attend(q, *blocks[0])
    for block in blocks[1:]:
        out, lse = merge(out, lse, *attend(q, *block))
    return out


print("you wrote:", prediction)
for size, backwards in itertools.product((1, 5, 32), (False, True)):
    off = distance(in_blocks(q, k, v, size, backwards), whole)
    print(f"blocks of {size:>2}, {'last' if backwards else 'first'} one first: distance {off:.0e}")
    assert off < 1e-12

# %% [markdown] lang="en"
# All of them. Blocks may be of any size and come in any order: this is what makes a ring possible, where every rank
# begins with another block. It is also how the fused kernel does without the matrix of scores, on one device.
#
# One trap. A block of which a query may see nothing has no sum at all. Under a causal mask there are many such blocks.

# %%
hidden = torch.full((1, 4), -torch.inf)  # the scores of four keys, all behind a mask
lse = hidden.logsumexp(-1, keepdim=True)
out = (hidden - lse).exp() @ torch.ones(4, 1)
print("logarithm:", lse.item(), "- output:", out.item())
assert math.isinf(lse.item()) and math.isnan(out.item())

# %% [markdown] lang="en"
# $-\infty - (-\infty)$ is not a number, and one of those spoils all that it meets. Real kernels treat the case. We
# will do better: blocks that nobody may see are not computed.
#
# ## 3. Ring attention, forward
#
# Cut the row into four shares, one a rank. Each rank has the queries, keys and values of its own tokens, and must
# attend to all keys. Blocks may come in any order. So let keys and values go around the ring of chapter 2b: each rank
# attends to the block that it has, passes it on to the right, and gets the next from the left. Queries stay where they
# are. (If they traveled, outputs would have to come home with them.) This is **ring attention** (Li et al. 2021; with
# online softmax, Liu et al. 2023).
#
# Which blocks does each rank meet? We send rank numbers around, in place of keys.


# %%
def shift(x, axis):
    """Everyone's x moves one place to the right; returns that of the left neighbor."""
    sending = isend(x, axis, to=(axis.index + 1) % axis.size)
    received = irecv(x, axis, source=(axis.index - 1) % axis.size).wait()
    sending.wait()
    return received


def whose_blocks():
    axis = connect(Mesh(cp=4))["cp"]
    block = torch.tensor([axis.index])
    met = [block.item()]
    for _ in range(axis.size - 1):
        block = shift(block, axis)
        met.append(block.item())
    return met


met = world.run(whose_blocks)
assert all(sorted(blocks) == [0, 1, 2, 3] for blocks in met)
table = {f"keys in step {step}": [[blocks[step]] for blocks in met] for step in range(4)}
viz.show(viz.draw_tensors(table, hue=int))

# %% [markdown] lang="en"
# In each step all four blocks are in use, each on another rank, and after four steps every rank has met every block.
# In step $s$ rank $r$ has the block of rank $r - s$ (modulo $n$).
#
# **Your turn.** Write `my_ring_forward` in at most 15 lines, from `attend`, `merge` and `shift`. Send $k$ and $v$ in
# one message: `torch.stack([k, v])` makes one tensor of them.
#
# **Question.** $M$ are the bytes of one share of $k$ and $v$ together. How many times $M$ does a rank send, in how many
# messages?

# %%
prediction = None  # (bytes in units of M, messages)


def my_ring_forward(q, k, v, axis):
    return attend(q, k, v)  # your lines: so far it sees its own keys only


def on_shares(operation, *wholes):
    axis = connect(Mesh(cp=4))["cp"]
    mine = [x.chunk(axis.size, 2)[axis.index].contiguous() for x in wholes]
    with ledger() as book:
        result = operation(*mine, axis)
    return result, book.bytes("cp"), book.calls("cp")


answers = world.run(on_shares, my_ring_forward, q, k, v)
together = torch.cat([out for (out, _), *_ in answers], 2)
print("right:", distance(together, whole) < 1e-12)


# %% jupyter={"source_hidden": true}
# One answer
def ring_forward(q, k, v, axis, attend=attend):
    out, lse = attend(q, k, v)
    block = torch.stack([k, v])
    for _ in range(axis.size - 1):
        block = shift(block, axis)
        out, lse = merge(out, lse, *attend(q, *block))
    return out, lse


# %%
n, M = 4, (k.nbytes + v.nbytes) // 4
answers = world.run(on_shares, ring_forward, q, k, v)
results, sent, messages = zip(*answers, strict=True)
together = torch.cat([out for out, _ in results], 2)
print("you wrote:", prediction, "- each rank:", (sent[0] / M, messages[0]))
print(f"distance to one process {distance(together, whole):.0e}")
assert distance(together, whole) < 1e-12 and set(sent) == {(n - 1) * M} and set(messages) == {n - 1}

# %% [markdown] lang="en"
# $(n-1)\,M$ in $n - 1$ messages: a rank passes on every block but the last.
#
# An all-gather of $k$ and $v$ would send the same bytes. But then each rank would hold all keys and values, $n\,M$,
# and what a rank holds would not shrink with more ranks. In the ring it has its own block, the one in use and the one
# that arrives, whatever $n$.
#
# Our attempt has a flaw that no value shows. It waits for a block, then computes, then waits for the next. But the
# next block does not depend on the computation: it could travel meanwhile. The package's version, in section 6, does
# that.
#
# ## 4. Ring attention, backward
#
# The loss is somewhere above. Backward gives each rank $dO$, the gradient of its output: how much the loss grows when
# $o$ grows. Wanted are $dQ$, $dK$ and $dV$. We write $P$ for the weights, $P = e^{S - \ell}$, so that $O = P V$.
#
# - From $O = PV$: $\;dV = P^T dO\;$ and $\;dP = dO\, V^T$.
# - Softmax: when one score of a query grows, all of its weights change. For one query,
#   $dS_j = P_j\,(dP_j - \sum_i P_i\, dP_i)$.
# - From $S = QK^T/\sqrt d$: $\;dQ = dS\, K/\sqrt d\;$ and $\;dK = dS^T Q/\sqrt d$.
#
# The middle line looks bad: a sum over all keys again, now of gradients. But
#
# $$\sum_i P_i\, dP_i = \sum_i P_i\,(dO \cdot v_i) = dO \cdot \sum_i P_i\, v_i = dO \cdot O$$
#
# It is the product of two vectors that the rank has already (Dao et al. 2022). So if it keeps $O$ and $\ell$ from
# forward, **each block's part of the gradient can be computed from that block alone**, in any order:


# %%
def block_gradients(d_out, q, k, v, out, lse):
    """What one block of keys adds to the gradient of q, and the gradients of its k and v. out, lse: of all keys."""
    scale = 1 / math.sqrt(q.size(-1))
    p = (q @ k.mT * scale - lse).exp()  # the weights, computed again
    d_p = d_out @ v.mT
    d_scores = p * (d_p - (d_out * out).sum(-1, keepdim=True)) * scale
    return d_scores @ k, d_scores.mT @ q, p.mT @ d_out


def by_autograd(q, k, v, d_out, attention=F.scaled_dot_product_attention):
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    return torch.autograd.grad(attention(q, k, v), (q, k, v), d_out)


d_out = torch.randn(q.shape, dtype=q.dtype, generator=torch.Generator().manual_seed(1))
wanted = by_autograd(q, k, v, d_out)
out, lse = attend(q, k, v)
parts = [block_gradients(d_out, q, *block, out, lse) for block in (first, second)]
got = parts[0][0] + parts[1][0], *(torch.cat(halves, 2) for halves in list(zip(*parts, strict=True))[1:])
off = [distance(a, b) for a, b in zip(got, wanted, strict=True)]
print("two blocks on one process, distance of dQ, dK, dV:", *(f"{x:.0e}" for x in off))
assert max(off) < 1e-12

# %% [markdown] lang="en"
# Now on the ring. $dQ$ is for the rank's own queries and stays. $dK$ and $dV$ are for the keys of *another* rank: each
# rank that meets a block adds its part to the block's gradient, and in the end that gradient must be at home.
#
# The attempt: the gradient travels with its block. It starts at home with zeros, each rank adds its part, and after
# $n$ shifts it is home again.
#
# **Predict** its bytes, in units of $M$. What is the least that a ring could do with?

# %%
prediction = None  # (the attempt's bytes, the least), in units of M


def ring_backward(d_out, q, k, v, out, lse, axis):
    d_q = torch.zeros_like(q)
    block = torch.stack([k, v, torch.zeros_like(k), torch.zeros_like(v)])
    for _ in range(axis.size):
        more_q, *more = block_gradients(d_out, q, *block[:2], out, lse)
        d_q += more_q
        block = torch.cat([block[:2], block[2:] + torch.stack(more)])
        block = shift(block, axis)
    return d_q, *block[2:]


answers = world.run(on_shares, ring_backward, d_out, q, k, v, out, lse)
results, sent, messages = zip(*answers, strict=True)
got = [torch.cat(shares, 2) for shares in zip(*results, strict=True)]
print("you wrote:", prediction, "- the attempt:", sent[0] / M)
print("distance of dQ, dK, dV:", *(f"{distance(a, b):.0e}" for a, b in zip(got, wanted, strict=True)))
assert all(distance(a, b) < 1e-12 for a, b in zip(got, wanted, strict=True)) and set(sent) == {2 * n * M}

# %% [markdown] lang="en"
# Right, with $2n\,M$. Two things travel for nothing:
#
# - In the last shift $k$ and $v$ come home, where they never left. That is one $M$.
# - In the first shift the gradient leaves home with the rank's own part in it. That part can wait at home. Then the
#   gradient sets off from the first *other* rank, one shift later. That is another $M$.
#
# $2n\,M - 2M = 2(n-1)\,M$: $n-1$ shifts of the block, and $n-1$ of its gradient. The package's version sends that.
#
# ## 5. A causal mask makes ranks unequal
#
# So far every query saw every key. A GPT has a **causal** mask: a token sees itself and earlier ones. With contiguous
# shares rank 0 has the first quarter of the row, and rank 3 the last.
#
# **Question.** A row of 32 tokens on four ranks. Count the pairs of query and key that each rank has to compute. (The
# token at position $p$, from 0, sees $p + 1$ keys.)

# %%
prediction = None  # pairs of ranks 0 to 3

visible = torch.ones(32, 32).tril()
pairs = [int(share.sum()) for share in visible.chunk(4)]
print("you wrote:", prediction, "- counted:", pairs, "- all:", sum(pairs))
assert pairs == causal_pairs(32, range(8)) == [36, 100, 164, 228]

# %% [markdown] lang="en"
# Rank 3 has more than six times the work of rank 0. In a ring it is worse than that sounds, since everyone waits for
# the slowest one in *each* step. In step 1 rank 0 has the keys of rank 3, which its queries may not see at all.
#
# How much does it cost? With $n$ ranks and long rows the last rank has $\frac{1}{n} - \frac{1}{2n^2}$ of all $T^2$
# pairs, and the mean is $\frac{1}{2n}$. The quotient is $2 - \frac1n$: with many ranks, nearly half of all
# computing time is waiting.
#
# The cure sends nothing and computes nothing: **another order**. Cut the row into $2n$ chunks in place of $n$ shares,
# and give each rank two of them.
#
# **Your turn.** Eight chunks, numbered 0 to 7 from early to late. Which two does each of the four ranks get, so that
# all have the same number of pairs? Write them side by side: rank 0's two, rank 1's two, and so on.

# %%
my_order = [0, 1, 2, 3, 4, 5, 6, 7]  # contiguous: put yours in place of it

print("pairs of ranks 0 to 3:", causal_pairs(32, my_order), "- all equal:", len(set(causal_pairs(32, my_order))) == 1)

# %% [markdown] lang="en"
# A late chunk has more pairs than an early one, and the difference from chunk to chunk is always the same. So take the
# earliest with the latest, the second with the last but one, and so on: the sum is the same each time. This is
# **zigzag** order. Llama 3 was trained with it (Llama Team 2024, section 3.3.2). The package's version:

# %%
viz.show_source(zigzag_order, causal_pairs)
for ranks in (2, 4, 8, 64):
    size = 2 * ranks * 64
    even, uneven = (causal_pairs(size, order) for order in (zigzag_order(ranks), range(2 * ranks)))
    assert len(set(even)) == 1 and sum(even) == sum(uneven) == size * (size + 1) // 2
    worst = max(uneven) / even[0]
    print(f"{ranks:>2} ranks: contiguous, the busiest has {worst:.3f} times its share; 2 - 1/n = {2 - 1 / ranks:.3f}")
print("zigzag order for 4 ranks:", zigzag_order(4), causal_pairs(32, zigzag_order(4)))

# %% [markdown] lang="en"
# Equal totals are not enough: a ring needs equal work in *every step*. Look at it. The picture below has a row for each
# chunk of queries and a column for each chunk of keys, in the order of the text. A color is a rank. Strong: computed in
# this step. Pale: in another one. White: hidden by the mask.
#
# **Before you move it:** with four ranks in [zigzag order](../docs/glossary.md#zigzag-order), how many chunk pairs does
# each rank compute in step 1, 2 and 3? And how many does the busiest rank compute in contiguous order?

# %%
prediction = None  # (zigzag, busiest of contiguous)

ORDERS = {"contiguous": lambda n: list(range(2 * n)), "zigzag": zigzag_order}


def step_of(order, n, query, key):
    """The rank that computes a pair of chunks, and in which step: when the key's block has come to it."""
    mine, theirs = order.index(query) // 2, order.index(key) // 2
    return mine, (mine - theirs) % n


def loads(order, n, step):
    """Pairs of chunks that each rank computes in a step; a chunk with itself is half visible."""
    counts = [0.0] * n
    for query, key in itertools.product(range(2 * n), repeat=2):
        rank, when = step_of(order, n, query, key)
        if when == step and key <= query:
            counts[rank] += 0.5 if key == query else 1
    return counts


# %%
def draw_load(ranks, order, step):
    step, chunks = min(step, ranks - 1), ORDERS[order](ranks)
    drawing, (grid, bars) = viz.figure(8, 3.4, columns=2)
    for query, key in itertools.product(range(2 * ranks), repeat=2):
        rank, when = step_of(chunks, ranks, query, key)
        if key <= query:
            corners = [(key, query), (key, query + 1), (key + 1, query + 1), (key + 1, query)]
            shape = corners[:3] if key == query else corners
            strength = 1 if when == step else 0.18
            grid.fill(*zip(*shape, strict=True), fc=(viz.PALETTE[rank], strength), ec=viz.INK, lw=0.5)
    grid.set(xlim=(0, 2 * ranks), ylim=(2 * ranks, 0), aspect="equal", xlabel="keys", ylabel="queries")
    middles = [c + 0.5 for c in range(2 * ranks)]
    grid.set_xticks(middles, range(2 * ranks))
    grid.set_yticks(middles, [f"{c} (rank {chunks.index(c) // 2})" for c in range(2 * ranks)])
    grid.tick_params(length=0, labelsize=8)
    now = loads(chunks, ranks, step)
    bars.bar(range(ranks), now, color=viz.PALETTE[:ranks], edgecolor=viz.INK)
    bars.set(xticks=range(ranks), yticks=range(5), xlabel="rank", ylabel="chunk pairs in this step", ylim=(0, 4.4))
    grid.spines[:].set_visible(False)
    waits = sum(max(loads(chunks, ranks, s)) for s in range(ranks))
    bars.set_title(f"step {step}; all steps: {waits:g} chunk pairs long", fontsize=10)
    grid.set_title(f"{order}, {ranks} ranks", fontsize=10)
    text = f"Causal ring, {order}, ranks: {ranks}, step {step}. Chunk pairs: {', '.join(f'{x:g}' for x in now)}."
    return viz.describe(drawing, f"{text} The slowest of each step have {waits:g} in all.")


# %%
explore(draw_load, ranks=[4, 2, 3], order=ORDERS, step=range(4))

# %%
steps = {name: [loads(order(4), 4, step) for step in range(4)] for name, order in ORDERS.items()}
print("you wrote:", prediction)
for name, found in steps.items():
    print(f"{name:<10} steps 1 to 3: {found[1:]}, slowest of all four steps: {sum(map(max, found)):g}")
assert steps["zigzag"][1:] == [[2.0] * 4] * 3 and all(max(found) == 4 for found in steps["contiguous"][1:])

# %% [markdown] lang="en"
# In zigzag order every rank computes two chunk pairs in each step, half of the four, whoever's block it has. In
# contiguous order someone has all four in every step, and everyone waits. 14 against 8, and
# $14/8 = 2 - 1/4$.
#
# Look at *which* half. If the block comes from a lower rank, all of this rank's queries see its early chunk, and none
# its late one. If it comes from a higher rank, the late queries see both chunks, and the early ones nothing. Either way
# it is a rectangle, wholly visible: there is no mask except in a rank's own block. (Another order with the same aim
# deals out tokens like cards; each block then has a mask. This is striped attention, Brandon et al. 2023.)
#
# ## 6. The package's version
#
# `_visible` says which rectangle. `_blocks` gives one block after the other:

# %%
viz.show_source(context._visible, context._blocks, context._Shift.__init__, context._Shift.wait)

# %% [markdown] lang="en"
# Look at where `_Shift` is made: *before* the `yield`. The next block sets off, then the caller computes with this one,
# then `wait` finds it arrived, or nearly. Receives are posted before sends. Then forward and backward:

# %%
viz.show_source(context._RingAttention.forward, context._RingAttention.backward, context._merge)

# %% [markdown] lang="en"
# What is better than in ours:
#
# - Blocks and gradients travel while the rank computes.
# - What is hidden is not computed: `block.rows` and `block.columns` pick the visible half.
# - A rank's own part of $dK$ and $dV$ stays at home (`block.own`), and $k$ and $v$ do not come back to it.
# - `_attend` calls PyTorch's fused kernel, which gives the logarithms as well, so that no rank ever has a matrix of
#   scores. It adds up in float32 when the tensors have 16 bits.
# - Several heads may share one key and value (`k` and `v` have fewer heads than `q`): more on that in section 8.
#
# First the order. On every rank we note when it computes, and the ledger notes when a block sets off and when the rank
# has stopped waiting for it. Our attempt and the package's version, on rows of 1,024 tokens:


# %%
def recorded(ours, q, k, v):
    """On a rank: spans of computing, and spans of a block on its way, in seconds."""
    axis, computed, theirs = connect(Mesh(cp=4))["cp"], [], context._attend
    mine = [zigzag(x, axis, dim=2) for x in (q, k, v)]

    def watched(*given):
        start, result = time.perf_counter(), (attend if ours else theirs)(*given)
        computed.append((start, time.perf_counter()))
        return result

    with ledger() as book, patch.object(context, "_attend", watched):
        ring_forward(*mine, axis, watched) if ours else ring_attention(*mine, axis, is_causal=False)
    moved, first = [(e.start, e.end) for e in book.entries], computed[0][0]
    return [[(start - first, end - first) for start, end in spans] for spans in (computed, moved)]


# %%
long_tokens, _ = next(corpus.batches(steps=1, rows=2, context=1024))
long_q, long_k, long_v = first_block(long_tokens)
for _ in range(3):  # the first rounds are for warming up
    records = {
        name: world.run(recorded, ours, long_q, long_k, long_v)[0]
        for name, ours in (("our attempt", True), ("the package's version", False))
    }

# %%
drawing, panels = viz.figure(8, 3.2, rows=2)
for panel, (name, (computed, moved)) in zip(panels, records.items(), strict=True):
    for lane, (spans, color) in enumerate(((computed, viz.PALETTE[1]), (moved, viz.PALETTE[5]))):
        for start, end in spans:
            panel.barh(lane, 1000 * (end - start), 0.7, left=1000 * start, color=color, ec=viz.INK, lw=0.6)
    panel.set_yticks([0, 1], ["computes", "a block travels"])
    panel.set(ylim=(1.6, -0.6))
    panel.tick_params(axis="y", length=0)
    panel.set_title(f"{name}: forward, recorded on rank 0 of this machine", fontsize=10, loc="left")
panels[1].set_xlabel("ms since the first block was begun")
viz.show(
    drawing,
    "Two recorded rings. In our attempt a block sets off after each computation, and the next computation begins when "
    "it has arrived. In the package's version it sets off before a computation.",
)
(ours, our_moves), (theirs, their_moves) = records.values()
assert all(moved[0] > span[1] for moved, span in zip(our_moves, ours, strict=False))
assert all(moved[0] < span[0] for moved, span in zip(their_moves, theirs, strict=False))

# %% [markdown] lang="en"
# In ours a block sets off when a computation has ended. In the package's it sets off before one begins, and travels
# under it. A blue box ends when the rank has stopped waiting for that block, so it may have arrived earlier. (Mind the
# two scales. How long things take says little here: four ranks and all that travels share a few cores, and the kernels
# differ.)
#
# **Predict:** causal, in zigzag shares, on four ranks: bytes sent forward and backward, and the distance to one
# process.

# %%
prediction = None  # (forward, backward, in units of M; distance)


def causal_ring(q, k, v, d_out):
    axis = connect(Mesh(cp=4))["cp"]
    q, k, v, d_out = (zigzag(x, axis, dim=2) for x in (q, k, v, d_out))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    with ledger() as there:
        out = ring_attention(q, k, v, axis)
    with ledger() as back:
        gradients = torch.autograd.grad(out, (q, k, v), d_out)
    return [out.detach(), *gradients], [(book.bytes("cp"), book.calls("cp")) for book in (there, back)]


def in_text_order(shares):
    """Zigzag shares of ranks 0, 1, ... -> the whole, in the order of the text."""
    chunks = [chunk for share in shares for chunk in share.chunk(2, 2)]
    return torch.cat([chunks[zigzag_order(len(shares)).index(i)] for i in range(len(chunks))], 2)


# %%
causal = partial(F.scaled_dot_product_attention, is_causal=True)
truth = [causal(q, k, v), *by_autograd(q, k, v, d_out, causal)]
shares, sent = zip(*world.run(causal_ring, q, k, v, d_out), strict=True)
off = [distance(in_text_order(parts), wanted) for parts, wanted in zip(zip(*shares, strict=True), truth, strict=True)]
forward, backward = sent[0]
print("you wrote:", prediction, "- each rank:", (forward[0] / M, backward[0] / M))
print("distance of O, dQ, dK, dV:", *(f"{x:.0e}" for x in off))
assert all(s == sent[0] for s in sent)
assert forward == ((n - 1) * M, n - 1) and backward == (2 * (n - 1) * M, 2 * (n - 1)) and max(off) < 1e-12

# %% [markdown] lang="en"
# $(n-1)\,M$ forward and $2(n-1)\,M$ backward. For 4 ranks that is 9 $M$ in place of our attempts' 11.
#
# ## 7. The other way: exchange tokens for heads
#
# Heads do not talk to each other within attention. So there is another cut. Before attention each rank has *all heads
# of some tokens*. Let it have *some heads of all tokens* instead: then its attention is the one of a single device,
# with a quarter of the heads, and after it the ranks change back. Who has what and who needs what? Rank $i$ needs from
# everyone the $i$-th quarter of the heads: an **all-to-all**. (The name for this is Ulysses: Jacobs et al. 2023.)
#
# **Your turn.** Two functions, one line each. `all_to_all(x, axis, dim=1)` sends the $i$-th quarter of the heads to
# rank $i$, and puts what comes side by side along the same dimension, in the order of the ranks it came from.
# Contiguous shares for now. Shapes: `to_heads` (B, heads, T/n, d) → (B, heads/n, T, d), and `to_tokens` back.


# %%
def my_to_heads(x, axis):
    return x  # your line in place of this one


def my_to_tokens(x, axis):
    return x  # and of this one


def there_and_back(to_heads, to_tokens, x):
    """Four heads, and tokens named head × 10 + place: before, between and after."""
    axis = connect(Mesh(cp=4))["cp"]
    before = x.chunk(4, 2)[axis.index]
    between = to_heads(before, axis)
    return [y.flatten().tolist() for y in (before, between, to_tokens(between, axis))]


names = (10 * torch.arange(4).view(1, 4, 1, 1) + torch.arange(4).view(1, 1, 4, 1)).double()
before, between, after = zip(*world.run(there_and_back, my_to_heads, my_to_tokens, names), strict=True)
print("right:", between == tuple([10.0 * r + i for i in range(4)] for r in range(4)) and after == before)


# %% jupyter={"source_hidden": true}
# One answer
def to_heads(x, axis):
    return torch.cat(all_to_all(x, axis, dim=1).chunk(axis.size, 1), 2)


def to_tokens(x, axis):
    return all_to_all(torch.cat(x.chunk(axis.size, 2), 1), axis, dim=1)


before, between, after = zip(*world.run(there_and_back, to_heads, to_tokens, names), strict=True)
assert between == tuple([10.0 * r + i for i in range(4)] for r in range(4)) and after == before

# %%
table = {"all heads of one token": before, "one head of all tokens": between, "back": after}
viz.show(viz.draw_tensors(table, hue=lambda name: int(name) // 10))

# %% [markdown] lang="en"
# The tens are the head (and the color), the ones the place in the row. An all-to-all turns rows into columns; the
# second one turns them back.
#
# **Question.** Attention takes three tensors there, $q$, $k$ and $v$, and one back. How many bytes does a rank send in
# forward? And in backward? ($M$ are the bytes of a share of $k$ and $v$, so each of the four tensors has $M/2$.)

# %%
prediction = None  # (forward, backward), in units of M


def all_to_all_forward(q, k, v, axis):
    out = F.scaled_dot_product_attention(*(to_heads(x, axis) for x in (q, k, v)), is_causal=True)
    return to_tokens(out, axis)


shares, sent, calls = zip(*world.run(on_shares, all_to_all_forward, q, k, v), strict=True)
print(f"you wrote: {prediction} - forward: {sent[0] / M} M, distance {distance(torch.cat(shares, 2), truth[0]):.0e}")
assert distance(torch.cat(shares, 2), truth[0]) < 1e-12
assert set(sent) == {4 * (n - 1) / n * M / 2} and set(calls) == {4}

# %% [markdown] lang="en"
# Each of the four tensors sends $(n-1)/n$ of itself: $4 \cdot \frac34 \cdot \frac M2 = 1.5\,M$, where the ring sends
# 3 $M$. And there is no load to balance: every rank has whole rows, with the whole mask.
#
# Backward: the gradient of an exchange is the exchange back, so each of the four tensors' gradients travels once, and
# backward sends as much as forward. (`all_to_all` above gives no gradient to autograd. The package's version does, by
# `Collective.apply`, which takes the way there and the way back.)

# %%
viz.show_source(context.all_to_all_attention, context._to_heads, context._to_sequence, context._exchange)

# %% [markdown] lang="en"
# It takes any attention as a function, so masks of all kinds work, also those that a ring would not know how to cut.
# Its shares are in zigzag order, like those of the ring, so that a model can use either. `_in_order` and `_in_zigzag`
# put chunks in the order of the text and back.


# %%
def causal_exchange(q, k, v, d_out):
    axis = connect(Mesh(cp=4))["cp"]
    q, k, v, d_out = (zigzag(x, axis, dim=2) for x in (q, k, v, d_out))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    with ledger() as there:
        out = context.all_to_all_attention(q, k, v, axis, causal)
    with ledger() as back:
        gradients = torch.autograd.grad(out, (q, k, v), d_out)
    return [out.detach(), *gradients], [(book.bytes("cp"), book.calls("cp")) for book in (there, back)]


shares, sent = zip(*world.run(causal_exchange, q, k, v, d_out), strict=True)
off = [distance(in_text_order(parts), wanted) for parts, wanted in zip(zip(*shares, strict=True), truth, strict=True)]
print("distance of O, dQ, dK, dV:", *(f"{x:.0e}" for x in off))
print("sent forward and backward:", *(f"{sent[0][i][0] / M} M in {sent[0][i][1]} calls" for i in range(2)))
assert max(off) < 1e-12 and all(s == [(3 * M // 2, 4)] * 2 for s in sent)

# %% [markdown] lang="en"
# ## 8. When which?
#
# Many models let several heads share one key and value (**grouped-query attention**, GQA, Ainslie et al. 2023). With
# $g$ heads for each, $k$ and $v$ are $g$ times smaller than $q$. A share of $q$ then has $gM/2$ bytes. Forward and
# backward together:
#
# | | a rank sends | what it needs |
# |---|---|---|
# | ring | $3(n-1)\,M$ | $2n$ divides the length |
# | all-to-all | $2\,\frac{n-1}{n}\,(g+1)\,M$ | $n$ divides heads *and* key–value heads |
#
# The quotient is $\frac{3n}{2(g+1)}$. **Predict:** 8 ranks. For which $g$ does the ring send less: 1, 4, 8, 16?

# %%
prediction = None


def sent_by_ring(n, g, length, width, bytes_each=2):
    share = 2 * bytes_each * length / n * width / g  # M
    return 3 * (n - 1) * share


def sent_by_all_to_all(n, g, length, width, bytes_each=2):
    share = 2 * bytes_each * length / n * width / g
    return 2 * (n - 1) / n * (g + 1) * share


print("you wrote:", prediction)
for g in (1, 4, 8, 16):
    quotient = sent_by_ring(8, g, 2**17, 8192) / sent_by_all_to_all(8, g, 2**17, 8192)
    print(f"{g:>2} heads share a key: the ring sends {quotient:.2f} times as much")
    assert math.isclose(quotient, 3 * 8 / (2 * (g + 1)))

# %% [markdown] lang="en"
# With 16 heads a key the ring sends less, with 8 or fewer it sends more. (Of 64 heads, 16 a key leave 4 keys. On 8
# ranks there is no all-to-all at all then.) But look at how the two depend on the number of ranks. The model below has
# 64 heads, a width of 8,192, and rows of 131,072 tokens in 16 bits. The lines are bytes of one layer, forward and
# backward.
#
# **Before you move it:** as ranks are added, what becomes of each line? Where does the all-to-all end?

# %%
prediction = None  # (ring, all-to-all, ends at)


def draw_bytes(kv_heads):
    g, ranks = 64 // kv_heads, [2, 4, 8, 16, 32, 64]
    possible = [n for n in ranks if kv_heads % n == 0]
    ring, exchange = (
        [f(n, g, 2**17, 8192) / 1e9 for n in some]
        for f, some in ((sent_by_ring, ranks), (sent_by_all_to_all, possible))
    )
    drawing, (panel,) = viz.figure(6.5, 3.2)
    panel.loglog(ranks, ring, color=viz.PALETTE[5], marker="o", label="ring")
    panel.loglog(possible, exchange, color=viz.PALETTE[6], marker="s", label="all-to-all")
    panel.set_xticks(ranks, ranks)
    panel.minorticks_off()
    panel.set(xlabel="ranks of cp", ylabel="GB each rank sends, a layer", ylim=(0.05, 25))
    note = "" if possible else " (no all-to-all)"
    panel.set_title(f"64 heads, key-value heads: {kv_heads}{note}", fontsize=10)
    panel.legend(frameon=False, fontsize=9)
    last = f"all-to-all on {possible[-1]} ranks {exchange[-1]:.2g}" if possible else "no all-to-all is possible"
    text = f"GB that each rank sends, key-value heads: {kv_heads}. Ring on 64 ranks {ring[-1]:.2g}; {last}."
    return viz.describe(drawing, text)


explore(draw_bytes, kv_heads=[64, 16, 8, 1])

# %% [markdown] lang="en"
# The ring's line soon is flat: every rank must see all keys. $M$ falls as $1/n$, so $3(n-1)M$ grows only as $(n-1)/n$
# does. The line of the all-to-all falls: each rank sends its own tokens once, whatever $n$. But it ends at the number
# of key–value heads, and tensor parallelism takes its ranks from the same heads. Llama 3's largest model has 128 heads
# and 8 key–value heads, and `tp=8` gives each rank one of those. Nothing is left for an all-to-all.
#
# Bytes are not all. The ring's bytes can **hide** under computing, those of an all-to-all cannot: attention needs them
# all before it begins. When do they hide? Say each rank has $L = T/n$ tokens and $h$ is the width. In one step a rank
# computes half of $L^2$ pairs, for $QK^T$ and $PV$ with 2 operations a number each: $2L^2h$ operations at speed $S$.
# Meanwhile a block of $k$ and $v$ in 16 bits, $4Lh/g$ bytes, travels at bandwidth $B$:
#
# $$\frac{2L^2h}{S} \ge \frac{4Lh}{gB} \quad\Longleftrightarrow\quad L \ge \frac{2S}{gB}$$
#
# The width cancels. **Predict:** at $4\cdot10^{14}$ operations a second and 50 GB/s (one GPU and one fast network card,
# rounded), how many tokens does a rank need, for $g = 1$ and $g = 16$?

# %%
prediction = None

print("you wrote:", prediction)
for name, bandwidth in (("400 Gbit/s", 50e9), ("300 GB/s", 300e9)):
    least = {g: 2 * 4e14 / (g * bandwidth) for g in (1, 16)}
    print(f"{name:<10} {least[1]:>6,.0f} tokens a rank with a key for each head, {least[16]:>5,.0f} with one for 16")
assert 2 * 4e14 / 50e9 == 16_000

# %% [markdown] lang="en"
# (Backward computes five matrix products for these two, and sends twice as much: if forward hides, backward does.)
# Llama 3's long rows left 8,192 tokens to a rank, with 16 heads a key: eight times what this estimate asks for.
#
# So:
#
# - **All-to-all** where links are fast and heads are enough: inside one machine, on up to 8 or so ranks. It sends
#   little, and needs no kernel of its own.
# - **Ring** where ranks are many, key–value heads few, or links slow and shares long: it hides, and heads set no limit.
# - **All-gather** of $k$ and $v$: the ring's bytes in one call, nothing hidden, any mask. It is what Llama 3's training
#   used: with GQA, $k$ and $v$ are small beside $q$, and masks that keep documents apart are easy with it (section
#   3.3.2 there). Memory for all keys and values of one layer is the price.
# - **Both**: all-to-all inside a machine and a ring between machines. They are two factors of `cp`.
#
# ## 9. The whole thing: `Mesh(cp=)`
#
# What has to change in a model? Very little:
#
# - Behind the embedding each rank takes its zigzag share of the sequence. *Behind* it, because the embedding adds a
#   vector for the position, and a share's tokens must keep the positions that they have in the row.
# - Whoever calls `scaled_dot_product_attention` gets ring attention. The model is not told.
# - The targets are cut the same way.

# %%
viz.show_source(context.cut_behind, context.zigzag, context.WholeAttention.__torch_function__)

# %% [markdown] lang="en"
# `WholeAttention` is a mode of PyTorch: inside `with`, its `__torch_function__` sees every call of a torch function and
# may replace it.
#
# And the gradients? All ranks have the same weights. Each rank's loss is that of its own tokens, and the loss of the
# row is their sum. So each rank's gradient is its part of a sum: **for parameters, `cp` is a data axis.** They are
# all-reduced over it, as in chapter 3a.
#
# **Predict** for our GPT on four ranks, 2 rows of 128 tokens in float64: how many sends does a rank start in one step,
# and how many bytes? (4 blocks; in each, $M$ is the $M$ from above.) What else travels?

# %%
prediction = None  # (sends, bytes in units of M)


def whole_gradient(model):
    return torch.cat([g.flatten() for g in model.full_gradients().values()])


def one_step(tokens, targets, mesh, options):
    model = parallelize(fresh(), mesh, **options)
    with ledger() as book:
        loss = model.step(tokens, targets)
    return loss.item(), whole_gradient(model), book


model = fresh()
loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
loss.backward()
alone = torch.cat([p.grad.flatten() for p in model.parameters()])
answers = world.run(one_step, tokens, targets, Mesh(cp=4), {})
book = answers[0][2]
print("you wrote:", prediction, "- measured:", (book.calls("cp", "send"), book.bytes("cp", "send") / M))
print(book)
print("distance to one process:", *(f"{distance(got, alone):.0e}" for _, got, _ in answers))

# %%
for value, got, book in answers:
    assert abs(value - loss.item()) < 1e-12 and distance(got, alone) < 1e-12
    assert book.calls("cp", "send") == 4 * 3 * (n - 1) and book.bytes("cp", "send") == 4 * 3 * (n - 1) * M
    assert book.bytes("cp", "all_reduce") == 2 * (n - 1) / n * (alone.nbytes + 16)

# %% [markdown] lang="en"
# Four blocks, $3(n-1)M$ in each, and the all-reduce of gradients with the loss and the number of tokens. The gradients
# are those of one process on every rank.
#
# ### A bug that the loss does not show
#
# Suppose someone cuts the tokens *before* the embedding. Each rank then adds the positions 0 to 31 to its share, though
# its tokens come from other places. No shape is wrong and nothing crashes.
#
# **Predict:** by how much does the first loss change (a thousandth, a hundredth, a tenth)? And the gradient?

# %%
prediction = None


def cut_too_early(tokens, targets):
    model, axis = fresh(), connect(Mesh(cp=4))["cp"]
    with context.WholeAttention(axis):
        logits = model(zigzag(tokens, axis, dim=1))
    mine = zigzag(targets, axis, dim=1)
    loss = F.cross_entropy(logits.flatten(0, 1), mine.flatten(), reduction="sum") / targets.numel()
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])


losses, parts = zip(*world.run(cut_too_early, tokens, targets), strict=True)
changed, off = abs(sum(losses) / loss.item() - 1), distance(sum(parts), alone)
print(f"you wrote: {prediction} - the loss changes by {changed:.1e} of itself, the gradient is off by {off:.0%}")
assert changed < 0.01 and off > 0.05

# %% [markdown] lang="en"
# Nobody would see that in a loss, and the model would train all the same. Only a comparison with one process shows it.
#
# ### On a mesh with others
#
# `cp` goes with every other axis. Each data rank has rows of its own, and its `cp` line shares each of them:

# %%
layouts = {
    Mesh(dp=2, cp=2): {},
    Mesh(cp=2, tp=2): {"sequence_parallel": True},
    Mesh(pp=2, cp=2): {"microbatches": 2},
}
for mesh, options in layouts.items():
    for _, got, _ in world.run(one_step, tokens, targets, mesh, options):
        assert distance(got, alone) < 1e-12
    print(f"{mesh}: distance to one process {distance(got, alone):.0e}")
viz.show(viz.draw_mesh(Mesh(dp=2, cp=4), "cp"))

# %% [markdown] lang="en"
# With `tp` each rank's ring carries only its own heads. Tensor parallelism with `sequence_parallel` cuts the sequence,
# too, but only between attention and MLP: inside them every tensor rank has all tokens of the row. The names are
# confusing. **Sequence parallelism** is a refinement of `tp` (Korthikanti et al. 2022); **context parallelism** is an
# axis of its own.
#
# ## 10. What it saves
#
# **Question.** One row of 1,024 tokens for each data rank. `Mesh(dp=4)`, `Mesh(dp=2, cp=2)` and `Mesh(cp=4)`: how do
# the activations that a rank keeps for backward compare? And weights and gradients?

# %%
prediction = None  # for instance {"activations": [1, 1, 1], "weights": [1, 1, 1]}


def memory_of(mesh, zero):
    model = parallelize(fresh(torch.float32), mesh, zero=zero)
    tokens, targets = next(corpus.batches(steps=1, rows=mesh.dp, context=1024))
    with what_backward_needs(model.module.parameters()) as found:
        model.step(tokens, targets)
    owned = sum(p.nbytes for p in model.parameters())
    return sum(found.values()), owned


found = {mesh: world.run(memory_of, mesh, 0) for mesh in (Mesh(dp=4), Mesh(dp=2, cp=2), Mesh(cp=4))}
print("you wrote:", prediction)
for mesh, ranks in found.items():
    print(f"{mesh}: activations {max(kept for kept, _ in ranks):>12,} bytes, weights {ranks[0][1]:,}")

# %%
whole_row = found[Mesh(dp=4)][0][0]
for mesh, ranks in found.items():
    assert all(abs(kept * mesh.cp / whole_row - 1) < 0.03 for kept, _ in ranks), mesh
assert len({owned for ranks in found.values() for _, owned in ranks}) == 1
names, sizes = [str(mesh) for mesh in found], {"activations": [ranks[0][0] / 1e6 for ranks in found.values()]}
viz.show(viz.draw_bars(names, sizes, "MB kept on each rank, one row of 1,024 tokens", "Activations"))

# %% [markdown] lang="en"
# Activations fall as $1/n$. Weights, gradients and optimizer state do not fall at all: `cp` shares out tokens, nothing
# else. But since it is a data axis for parameters, ZeRO (chapter 3a) shares them out over it as well:

# %%
shared = world.run(memory_of, Mesh(cp=4), 1)
total = found[Mesh(cp=4)][0][1]
print(f"Mesh(cp=4), zero=1: a rank updates {shared[0][1]:,} bytes of weights out of {total:,}")
assert abs(sum(owned for _, owned in shared) / total - 1) < 0.01

# %% [markdown] lang="en"
# ## 11. At scale
#
# Table 4 of the Llama 3 paper has the layouts of its 405B model on 16,384 GPUs, before and after the rows grew from
# 8,192 to 131,072 tokens. How many tokens of a row does each `cp` rank have? And what became of `dp`?

# %%
before, after = Mesh(dp=128, pp=16, tp=8), Mesh(dp=8, pp=16, cp=16, tp=8)
for mesh, length in ((before, 8_192), (after, 131_072)):
    rows, share = 2**24 // length, length // mesh.cp
    print(f"{mesh}: {mesh.size:,} GPUs, {rows:,} rows, {rows // mesh.dp} for each data rank, {share:,} tokens a rank")
    assert mesh.size == 16_384 and share == 8_192 and rows // mesh.dp == 16
per_gpu = row_bytes(131_072) / 8 / 16
print(f"activations of one row on each GPU, by our count, with tp=8 and cp=16: {per_gpu / 1e9:.0f} GB")

# %% [markdown] lang="en"
# A rank has 8,192 tokens in both. Sixteen times the length, sixteen times as many `cp` ranks, a sixteenth of the data
# ranks. And 16 rows for each data rank in both, as many as there are pipeline stages. With `dp=128` each data rank
# would have one row, and a pipeline of 16 stages with one microbatch would idle most of the time. The paper reports a
# *model FLOPs utilization* of 41 % before and 38 % after: the share of a GPU's peak that goes into the model's own
# operations.
#
# 68 GB of activations for one row are still much beside weights and optimizer state, and a pipeline holds several rows
# in flight, though only of its own layers. Recomputing (chapter [03h](03h_memory_and_recovery.ipynb)) takes care of the
# rest.
#
# ## What you have now
#
# - **context parallelism**: ranks share the positions of a row. Only attention needs other ranks.
# - **online softmax**: outputs of blocks merge by their logarithms, exactly, in any order.
# - **ring attention**: keys and values go around; $(n-1)M$ forward, $2(n-1)M$ backward, hidden under computing if a
#   rank has $2S/(gB)$ tokens.
# - **zigzag order**: an early and a late chunk for each rank, so that a causal mask leaves all with the same work in
#   every step. Without it the busiest rank has $2 - 1/n$ times its share.
# - **all-to-all over heads**: $2\frac{n-1}{n}(g+1)M$, on at most as many ranks as there are key–value heads.
# - For parameters `cp` is a data axis: gradients are summed over it, and ZeRO shares over it.
#
# ## Three questions to take along
#
# 1. A model has 32 heads, 8 key–value heads, and `tp=4`. On how many `cp` ranks at most can it use an all-to-all?
# 2. 16 ranks, contiguous shares, a causal mask. What share of the ranks' time in attention is waiting?
# 3. Someone makes rows 4 times as long and `cp` 4 times as large. What happens to a rank's activations, to the bytes
#    that its ring sends in a layer, and to the operations of its attention?
#
# <details><summary>Answers</summary>
#
# 1. Each tensor rank has 2 key–value heads, so on 2.
# 2. The busiest rank has $2 - 1/16 = 1.9375$ times the mean, so $1 - 1/1.9375 = 48\,\%$ of the time.
# 3. Activations stay the same, since its share has as many tokens as before. $M$ stays, and $n - 1$ grows a little more
#    than 4 times, so it sends about 4 times as much. Its queries see 4 times as many keys: 4 times the operations.
#
# </details>

# %%
assert 8 // 4 == 2 and round(1 - 1 / (2 - 1 / 16), 2) == 0.48  # the answers above
world.close()

# %% [markdown] lang="en"
# **Next:** [the exercises](../exercises/03e_long_context.ipynb), four graded tasks, from two parts of a softmax to a
# ring on four ranks:
#
#     python -m minipar grade exercises/03e_long_context.ipynb
#
# Then [03f, experts](03f_experts.ipynb), where tokens travel to the weights, by the same all-to-all.
#
# ## References
#
# - Milakov and Gimelshein 2018, *Online normalizer calculation for softmax*,
#   [arXiv 1805.02867](https://arxiv.org/abs/1805.02867)
# - Li et al. 2021, *Sequence Parallelism: Long Sequence Training from System Perspective*,
#   [arXiv 2105.13120](https://arxiv.org/abs/2105.13120)
# - Dao et al. 2022, *FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness*,
#   [arXiv 2205.14135](https://arxiv.org/abs/2205.14135)
# - Korthikanti et al. 2022, *Reducing Activation Recomputation in Large Transformer Models*,
#   [arXiv 2205.05198](https://arxiv.org/abs/2205.05198)
# - Ainslie et al. 2023, *GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints*,
#   [arXiv 2305.13245](https://arxiv.org/abs/2305.13245)
# - Jacobs et al. 2023, *DeepSpeed Ulysses*, [arXiv 2309.14509](https://arxiv.org/abs/2309.14509)
# - Liu et al. 2023, *Ring Attention with Blockwise Transformers for Near-Infinite Context*,
#   [arXiv 2310.01889](https://arxiv.org/abs/2310.01889)
# - Brandon et al. 2023, *Striped Attention*, [arXiv 2311.09431](https://arxiv.org/abs/2311.09431)
# - Llama Team 2024, *The Llama 3 Herd of Models*, [arXiv 2407.21783](https://arxiv.org/abs/2407.21783)
