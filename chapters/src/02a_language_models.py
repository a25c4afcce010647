# %% [markdown] lang="en"
# # Language models
#
# Before a model is cut into pieces, it is worth knowing what is in it. This chapter takes one small language model
# apart, on one process: what it computes, what it costs in parameters, operations and bytes, how it is trained, and
# what it has learned afterwards. At its end you can
#
# - read a small GPT line by line, and write its [attention](../docs/glossary.md#attention) yourself;
# - compute from the shape of such a model how many parameters and operations it has, and check both by counting;
# - say what [Adam](../docs/glossary.md#adam) keeps, and where 16 bytes for each parameter come from, in two ways;
# - say what grows with the number of rows and with their length, and what recomputing does about it;
# - pretrain the model in a short run, and judge it against simple baselines, on text that it has not seen;
# - say what "large" means, in numbers.
#
# **Time:** about two hours. **You need:** Python, a little PyTorch, and [the first chapter](01_background.ipynb).
# The chapter mirrors section 2.1 of the document that this course follows and tests, an article in Chinese:
# 《大规模语言模型从理论到实践 混合并行》. That section names three marks of large language models: they are huge, they
# are pretrained on much text, and they generalize. We take the three in this order.
#
# **How to read it.** Write your prediction into the cell (`prediction = ...`) before you run it. Five times you are
# asked to write a function yourself; one answer follows in a folded cell, which you run like any other.
#
# ## Three questions to warm up
#
# 1. A matrix has 128 rows and 512 columns. How many bytes does it take in float32, and how many in a 16-bit format?
# 2. A model has 70 billion parameters. Do its weights alone, in 16 bits, fit a GPU with 80 GB?
# 3. `loss.backward()` runs twice, with nothing between. What is in `.grad` then?
#
# <details><summary>Answers</summary>
#
# 1. 65,536 numbers: 262,144 bytes with 4 bytes each, 131,072 with 2.
# 2. No: 140 GB.
# 3. Twice the gradient: `backward()` adds to what is there.
#
# </details>

# %%
import itertools
import json
import math
import time
from collections import Counter
from functools import partial
from importlib import resources

import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

import minipar
from minipar import Config, corpus, viz
from minipar.model import GPT, MLP, Attention, Block, Embedding
from minipar.widgets import explore

torch.set_num_threads(1)  # sums come out the same, however many cores there are
assert 4 * 128 * 512 == 262_144 and 2 * 70e9 == 140e9  # the answers above

# %% [markdown] lang="en"
# ## 1. Text becomes numbers
#
# The text of this course is Python's own reference, what `help("with")` and its like print. It lies in the package, so
# that everyone has the same one. A model needs numbers: a **tokenizer** cuts text into pieces, the
# **[tokens](../docs/glossary.md#token)**, and gives each its number in a list, the
# **[vocabulary](../docs/glossary.md#vocabulary)**. Ours has 512 entries.

# %%
text, tokenizer, tokens = corpus.text(), corpus.tokenizer(), corpus.tokens()
start = text.index('The "with" statement is used')
sample = text[start : start + 61]
encoded = tokenizer.encode(sample)
print(sample)
print([tokenizer.decode([token]) for token in encoded.ids])
print(encoded.ids)

# %% [markdown] lang="en"
# Frequent words and endings are one token, rare ones several. Where does such a list come from? From counting. Begin
# with single bytes. Find the pair of neighbors that comes most often, make it one new piece, and repeat, until the
# vocabulary is full. This is **byte pair encoding**, BPE (Sennrich et al. 2016 for translation). Since it begins with
# bytes, any text can be encoded.
#
# Pairs do not reach across words. The tokenizer first cuts the text into words, a space before a word being part of it
# (shown as Ġ; a line break is Ċ).
#
# **Your turn.** `my_best_pair(words)` gets a dictionary: for each word, as a tuple of its pieces, how often it comes.
# It returns the pair of neighboring pieces that comes most often in the text.
#
# **Predict:** which pair is it in English text about Python?

# %%
prediction = None  # for instance ("e", "r")

split_up = tokenizer.pre_tokenizer.pre_tokenize_str(text)
words = Counter(tuple(word) for word, _ in split_up)


def my_best_pair(words):
    return ("e", "r")  # your lines in place of this one


print("words:", len(split_up), "different ones:", len(words), "- yours:", my_best_pair(words))

# %% jupyter={"source_hidden": true}
# One answer


def best_pair(words):
    count = Counter()
    for word, times in words.items():
        for pair in itertools.pairwise(word):
            count[pair] += times
    return max(count, key=count.__getitem__)


def merge(words, pair):
    """The same words, with the pair as one piece."""
    merged = Counter()
    for word, times in words.items():
        pieces, i = [], 0
        while i < len(word):
            width = 2 if word[i : i + 2] == pair else 1
            pieces.append("".join(word[i : i + width]))
            i += width
        merged[tuple(pieces)] += times
    return merged


# %%
found = []
for _ in range(8):
    found.append(best_pair(words))
    words = merge(words, found[-1])
print("you wrote:", prediction, "- ours:", *("+".join(pair) for pair in found))
shipped = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
assert found == shipped[:8] and len(shipped) == 512 - 256

# %% [markdown] lang="en"
# The same pairs in the same order as in the tokenizer that the package ships: 256 bytes and 256 merges are 512 tokens.
# Two spaces come first, because the text is indented, and then two dashes, because it has tables drawn with them. The
# package trains its tokenizer with a library (`tokenizers`). It does the same, and fast: after a merge it changes the
# counts of those words only that have the pair.

# %%
viz.show_source(corpus.train_tokenizer)

# %% [markdown] lang="en"
# **Question.** The text has about 465,000 characters. How many tokens is that? And which loss does a model have that
# knows nothing, so that each of the 512 tokens is equally likely?
#
# The **loss** is the mean over all tokens of $-\ln p$, where $p$ is the probability that the model gave to the token
# that came. With $p = 1$ it is 0.

# %%
prediction = None  # (tokens, loss)

uniform = -math.log(1 / 512)
print(f"you wrote: {prediction} - {len(text):,} characters are {len(tokens):,} tokens, loss {uniform:.3f}")
assert len(text) // 10_000 == 46 and round(uniform, 3) == 6.238

# %% [markdown] lang="en"
# A token here stands for two characters and a bit. Large models have vocabularies of 50,000 tokens (GPT-2) or 128,000
# (Llama 3), so that a token is often a whole word. For half a megabyte of text that would be a waste: most of it would
# come once or never.
#
# What is to be learned? For each token, the next one. The text itself has the answers: nobody has to label anything.
# Rows are cut out of the text at random places, and the **targets** are the same rows, one token further.

# %%
inputs, targets = next(corpus.batches(steps=1, rows=8, context=128))
print("shapes:", tuple(inputs.shape), tuple(targets.shape), "- row, position")
for name, row in (("inputs", inputs[0]), ("targets", targets[0])):
    print(f"{name:<8}", [tokenizer.decode([token]) for token in row[:10].tolist()])
assert torch.equal(inputs[:, 1:], targets[:, :-1])

# %% [markdown] lang="en"
# ## 2. The model
#
# `Config` describes the shape, `minipar.gpt` builds it: [embedding](../docs/glossary.md#embedding), four **blocks**,
# and a head. A **hook** is a function that PyTorch calls after a layer has run. With hooks we see the shape of what
# each layer gives:

# %%
config = Config()
print(config)


def fresh(config=config):
    torch.manual_seed(0)  # the same weights each time
    return minipar.gpt(config)


def show_shape(name):
    return lambda layer, given, result: print(f"{name:<24} {type(layer).__name__:<10} {tuple(result.shape)}")


model = fresh()
shown = ("embed", "blocks.0.", "blocks.3", "norm", "head")
hooks = [
    layer.register_forward_hook(show_shape(name))
    for name, layer in model.named_modules()
    if name.startswith(shown) and "dropout" not in name and not name.startswith("blocks.3.")
]
logits = model(inputs)
for hook in hooks:
    hook.remove()

# %% [markdown] lang="en"
# Read the shapes from top to bottom, with B rows, T positions and width C: 8, 128 and 128 here.
#
# - The **embedding** looks up a vector of width C for each token and adds one for its position.
# - A **block** changes each of these vectors: first by **attention**, which looks at other positions, then by an
#   **MLP**, two matrices with a bend (*GELU*) between, which looks at one position only. Each of the two *adds* its
#   result to what came in. Before each stands a **norm**, which brings a vector to mean 0 and spread 1.
# - The **head** turns each vector into 512 numbers, the **[logits](../docs/glossary.md#logits)**. Softmax makes
#   probabilities of them.
#
# All of it but the attention fits a screen. It is the shape of GPT-2 (Radford et al. 2019):

# %%
viz.show_source(Embedding.forward, MLP.__init__, MLP.forward, Block.__init__, Block.forward, GPT.forward)

# %% [markdown] lang="en"
# (`c.experts` and `dropout` are off here. You meet them later in the course.)
#
# ### Attention
#
# Attention is the only place where positions talk to each other. Each position makes three vectors from its own: a
# *query* $q$, a *key* $k$ and a *value* $v$. A position looks at every position up to itself. It weighs each by how
# well its key fits the query, and takes the weighted mean of the values:
#
# $$\mathrm{attention}(q, k, v) = \mathrm{softmax}\!\left(\frac{q k^\top}{\sqrt d} + \text{mask}\right) v$$
#
# The mask is $-\infty$ where a position would look at a later one, so that softmax gives 0 there. The width is divided
# among **heads**, which do this side by side, each with $d$ numbers: here 8 heads of 16.
#
# **Your turn.** Write it, in at most 15 lines. All three have the shape (rows, heads, positions, d).

# %%
q, k, v = torch.randn(3, 2, 8, 10, 16, generator=torch.Generator().manual_seed(0))


def my_attention(q, k, v):
    return v  # your lines in place of this one


right = F.scaled_dot_product_attention(q, k, v, is_causal=True)
print("right:", torch.allclose(my_attention(q, k, v), right, atol=1e-5))


# %% jupyter={"source_hidden": true}
# One answer
def attention(q, k, v):
    T, d = q.shape[-2:]
    fits = q @ k.transpose(-1, -2) / math.sqrt(d)  # (rows, heads, T, T)
    later = torch.ones(T, T, dtype=torch.bool).triu(1)
    weights = fits.masked_fill(later, -math.inf).softmax(-1)
    return weights @ v


assert torch.allclose(attention(q, k, v), right, atol=1e-5)
print("shape of the weights: (rows, heads, T, T) =", (*q.shape[:2], q.size(2), q.size(2)))

# %% [markdown] lang="en"
# The package calls PyTorch's `scaled_dot_product_attention`, which has one advantage that will count below: it never
# holds the whole table of T × T weights. It goes through it in pieces (*fused* attention; Dao et al. 2022).

# %%
viz.show_source(Attention.__init__, Attention.forward)

# %% [markdown] lang="en"
# **Question.** We change one token of a row, at position 60 of 128. At which positions do the logits change?

# %%
prediction = None  # (first position, last position)

other = inputs[:1].clone()
other[0, 60] = (other[0, 60] + 1) % 512
with torch.no_grad():
    differs = (model(other) != model(inputs[:1])).any(-1)[0].nonzero().flatten().tolist()
print("you wrote:", prediction, "- changed:", (differs[0], differs[-1]), "number:", len(differs))
assert differs == list(range(60, 128))

# %% [markdown] lang="en"
# From 60 on, and nothing before. The model is **causal**. So one forward pass over a row of 128 tokens gives 128
# predictions, each made without a look at what it has to predict. That is why training on text is so efficient.
#
# ## 3. Scale: parameters
#
# **Question.** How many parameters has the model? Width h = 128, l = 4 blocks, vocabulary V = 512, longest row s = 128.
#
# **Your turn.** `my_parameters(config)` computes it from the shape. A linear layer from $a$ to $b$ numbers has $ab$
# weights and $b$ biases; a norm has a weight and a bias for each of its h numbers; the head has no bias.

# %%
prediction = None  # a number


def my_parameters(c):  # c.width, c.depth, c.vocab, c.context
    return 0  # your lines in place of this one


def counted(model):
    return sum(p.numel() for p in model.parameters())


print("right:", my_parameters(config) == counted(model))


# %% jupyter={"source_hidden": true}
# One answer
def parameters(c):
    h, l, V, s = c.width, c.depth, c.vocab, c.context
    attention = 4 * (h * h + h)  # q, k, v, out
    mlp = (h * 4 * h + 4 * h) + (4 * h * h + h)
    block = attention + mlp + 2 * 2 * h  # and two norms
    embedding, head = V * h + s * h, (0 if c.tied else V * h)
    return embedding + l * block + 2 * h + head


for c in (config, Config(depth=2, width=64), Config(vocab=1000, context=32, width=96, tied=True)):
    assert parameters(c) == counted(minipar.gpt(c))
P = parameters(config)
print(f"you wrote: {prediction} - parameters: {P:,}")

# %% [markdown] lang="en"
# A block has $12h^2 + 13h$, of which $4h^2$ are in attention and $8h^2$ in the MLP. For all of it, Narayanan et al.
# (2021) give
#
# $$P = 12\,l\,h^2\left(1 + \frac{13}{12h} + \frac{V + s}{12\,l\,h}\right)$$
#
# Does it hold for our model? Not quite. **Predict:** what does it leave out?

# %%
prediction = None


def formula(l, h, V, s):
    return 12 * l * h**2 * (1 + 13 / (12 * h) + (V + s) / (12 * l * h))


missing = counted(model) - round(formula(config.depth, config.width, config.vocab, config.context))
print("you wrote:", prediction, "- not in the formula:", f"{missing:,}")
assert missing == 512 * 128 + 2 * 128
tied = minipar.gpt(Config(tied=True))
assert counted(tied) - round(formula(4, 128, 512, 128)) == 2 * 128

# %% [markdown] lang="en"
# The head, 512 × 128, and the last norm, 2 × 128. GPT-2 and GPT-3 use the embedding's weights for the head, too
# (**tied** weights), and two numbers for each of h channels do not show in a large model. So the formula is right
# where it was meant, to the last 2h.
#
# Where are the parameters of models with tied weights? It depends on the vocabulary and on the width:

# %%
shapes = {
    "ours: 4 × 128": (4, 128, 512, 128),
    "GPT-2 small: 12 × 768": (12, 768, 50257, 1024),
    "GPT-3: 96 × 12,288": (96, 12288, 50257, 2048),
}
parts = {"attention": [], "MLP": [], "embedding": []}
for l, h, V, s in shapes.values():
    sizes = {"attention": 4 * l * h * h, "MLP": 8 * l * h * h, "embedding": (V + s) * h}
    for part, size in sizes.items():
        parts[part].append(100 * size / sum(sizes.values()))
viz.show(viz.draw_bars(list(shapes), parts, "per cent of the weights", "Weights, tied (blocks × width)"))
print("embedding, per cent:", *(f"{share:.2f}" for share in parts["embedding"]))

# %% [markdown] lang="en"
# GPT-2 small (12 × 768) has nearly a third of its weights in the embedding of its 50,257 tokens. In GPT-3 (96 × 12,288)
# that is less than half a per cent. Width counts twice in a block and once in the embedding. So for large models
# $P \approx 12\,l\,h^2$ is enough.
#
# ## 4. What "large" means
#
# The document says that large language models have millions to billions of parameters. That was so until about 2020.
# We compute a few from the shapes that were published. A model on PyTorch's `meta` device has shapes, but no numbers:
# it takes no memory, and can be counted all the same.
#
# **Predict:** GPT-3 has 96 blocks of width 12,288. Is that more like 2, 20 or 200 billion?

# %%
prediction = None  # billions

published = {
    "GPT-2 small (2019)": Config(vocab=50257, context=1024, depth=12, width=768, heads=12, tied=True),
    "GPT-2 XL (2019)": Config(vocab=50257, context=1024, depth=48, width=1600, heads=25, tied=True),
    "GPT-3 (2020)": Config(vocab=50257, context=2048, depth=96, width=12288, heads=96, tied=True),
}
sizes = {"ours": P}
for name, shape in published.items():
    with torch.device("meta"):
        sizes[name] = counted(minipar.gpt(shape))
    assert sizes[name] == parameters(shape)
    print(f"{name:<20} {sizes[name]:>15,}")
print("you wrote:", prediction)

# %% [markdown] lang="en"
# Shapes and names: GPT-2, Radford et al. 2019, Table 2; GPT-3, Brown et al. 2020, Table 2.1. The largest of them is
# called GPT-3 175B. Its 174.6 billion come out of the formula. (GPT-2's table lists the smallest model with 117
# million. What was released under that name has the 124 million that we count.)
#
# Llama 3 405B has another block. Its MLP has three matrices (*SwiGLU*) of 16,384 × 53,248. Of its 128 attention heads,
# groups share keys and values, so that there are only 8 of those. It has no biases and no position vectors, norms with
# one number a channel, and a head of its own (Llama Team 2024, Table 3):


# %%
def llama(l, h, inner, heads, kv_heads, V):
    kv = h // heads * kv_heads
    block = h * h + 2 * h * kv + h * h + 3 * h * inner + 2 * h  # q; k, v; out; MLP; two norms
    return l * block + 2 * V * h + h


sizes["Llama 3 405B (2024)"] = llama(126, 16384, 53248, 128, 8, 128_256)
print(f"Llama 3 405B: {sizes['Llama 3 405B (2024)']:,}")
assert sizes["Llama 3 405B (2024)"] // 10**9 == 405

drawing, (panel,) = viz.figure(7, 2.6)
panel.barh(range(len(sizes)), list(sizes.values()), color=viz.PALETTE[0], edgecolor=viz.INK, linewidth=0.6)
for place, size in enumerate(sizes.values()):
    panel.text(1.2 * size, place, f"{size:,.0f}", va="center", fontsize=9)
panel.set(xscale="log", xlim=(1e5, 2e14), xlabel="parameters (from line to line: a hundred times more)")
panel.set_yticks(range(len(sizes)), list(sizes))
panel.invert_yaxis()
panel.grid(axis="x", alpha=0.4)
told = "; ".join(f"{name} {size:,}" for name, size in sizes.items())
viz.show(drawing, alt=f"Bars on a logarithmic scale: parameters of five models. {told}.")

# %% [markdown] lang="en"
# (The vocabulary is 128,000 tokens in the paper; with those for special purposes the released model has 128,256.)
#
# From our model to Llama 3 it is a factor of about 450,000. So when you read "large" in this course, think of hundreds
# of billions: models whose weights alone, at 2 bytes each, do not fit one device. What we measure with the small one
# carries over where it is a formula in h, l, s and V. That is why we check formulas here, and not only numbers.
#
# ## 5. Scale: operations
#
# Multiplying a vector of $a$ numbers by an $a × b$ matrix takes $ab$ multiplications and as many additions: 2
# [FLOPs](../docs/glossary.md#flop) (*floating point operations*) for each weight. Backward needs twice that: once for
# the gradient of the vector, once for the gradient of the weights. So a token costs about **6 FLOPs for each
# parameter**, 2 forward and 4 backward.
#
# What this rule leaves out is attention: $q k^\top$ and the mean of the values have no weights, and their cost grows
# with the length of the row. Counted with it, forward and backward of a batch take (Korthikanti et al. 2022; Narayanan
# et al. 2021 count one forward more, for recomputing)
#
# $$F = 72\,b\,l\,s\,h^2\left(1 + \frac{s}{6h} + \frac{V}{12\,h\,l}\right)$$
#
# for $b$ rows of $s$ tokens. PyTorch has a counter for the operations that really run. **Predict:** does it agree with
# the formula, and how far off is the rule of 6, for our model?

# %%
prediction = None  # (formula: per cent off, rule of 6: per cent off)


def flops(l, h, V, b, s):
    return 72 * b * l * s * h**2 * (1 + s / (6 * h) + V / (12 * h * l))


def mean_loss(model, inputs, targets):
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def run_and_count(model, inputs, targets):
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # plain matrix products
        mean_loss(model, inputs, targets).backward()
    return counter.get_total_flops()


measured = run_and_count(model, inputs, targets)
computed, rule = flops(4, 128, 512, 8, 128), 6 * P * inputs.numel()
print("you wrote:", prediction)
print(f"counted {measured:,}, formula {computed / measured - 1:+.1%}, rule of 6 {rule / measured - 1:+.1%}")
assert measured == computed

# %% [markdown] lang="en"
# The formula is exact: it counts the matrix products, and nothing else. (Norms, GELU and softmax are left out by both.
# They are few operations. That they need not be few *seconds* is another matter.)
#
# The rule of 6 counts weights that are only looked up, those of the embedding, and misses attention. Two errors, and
# here they cancel in part. In a large model both are small, as long as rows are short compared with the width. How
# large is attention's share?
#
# **Before you move it:** from which length on does attention's part exceed that of all weights, for width 1,024?

# %%
prediction = None  # tokens


def draw_share(width, context):
    lengths = [2**k for k in range(7, 18)]
    share = [100 * (s / (6 * width)) / (1 + s / (6 * width)) for s in lengths]
    here = 100 * (context / (6 * width)) / (1 + context / (6 * width))
    drawing, (panel,) = viz.figure(7, 2.8)
    panel.semilogx(lengths, share, color=viz.PALETTE[5], marker="o")
    panel.axhline(50, color=viz.INK, ls="--", lw=0.8)
    panel.plot([context], [here], "D", color=viz.PALETTE[6], ms=10)
    panel.set(xlabel="tokens in a row", ylabel="attention, % of the FLOPs", ylim=(0, 103))
    panel.set_xticks(lengths[::2], [f"{s:,}" for s in lengths[::2]])
    panel.set_title(f"width {width:,}, rows of {context:,}: {here:.1f} %", fontsize=10)
    return viz.describe(
        drawing, f"Attention's share of a block's FLOPs for width {width}, {context} tokens: {here:.1f} %."
    )


explore(draw_share, width=[128, 1024, 4096, 16384], context=[1024, 4096, 8192, 32768, 131072])

# %%
print("you wrote:", prediction, "- the share is one half at s = 6h =", 6 * 1024)
assert math.isclose(flops(1, 1024, 0, 1, 6 * 1024), 2 * 72 * 6 * 1024 * 1024**2)

# %% [markdown] lang="en"
# At 6h: 6,144 tokens for width 1,024. (Both count the whole table of T × T, as is usual. A causal kernel may skip
# the half that the mask makes zero.)
#
# Now a whole training run: 6 P FLOPs for each of D tokens. GPT-3 saw 300 billion tokens, Llama 3 405B 15.6 trillion.
# Their papers say 3.14 × 10²³ and 3.8 × 10²⁵ FLOPs (Brown et al. 2020, Table D.1; Llama Team 2024, section 1).
#
# **Predict:** how long would one core of your machine take for GPT-3? What is printed below is your own machine's.

# %%
prediction = None  # years

runs = {"GPT-3 (2020)": (300e9, 3.14e23), "Llama 3 405B (2024)": (15.6e12, 3.8e25)}
for name, (seen, paper) in runs.items():
    needed = 6 * sizes[name] * seen
    print(f"{name}: 6 P D = {needed:.2e} FLOPs, the paper says {paper:.2e}")
    assert abs(needed / paper - 1) < 0.01

taken = []
for _ in range(4):  # the first one is for warming up
    began = time.perf_counter()
    mean_loss(model, inputs, targets).backward()
    taken.append(time.perf_counter() - began)
speed = measured / min(taken)
years = 6 * sizes["GPT-3 (2020)"] * 300e9 / speed / (365 * 24 * 3600)
print(f"you wrote: {prediction} - one core here: {speed / 1e9:.0f} GFLOP/s with our model, GPT-3 in {years:,.0f} years")
print(f"at 400 TFLOP/s: {3.14e23 / 4e14 / (365 * 24 * 3600):.0f} years")

# %% [markdown] lang="en"
# Time is the reason for many devices that the document gives. 400 TFLOP/s (4 × 10¹⁴ a second) is what a GPU of 2024
# gave in a well-tuned run: Llama 3 405B was trained with 380 to 430 on each (Table 4 there). One such GPU alone would
# still take decades for GPT-3. The other reason is memory.
#
# ## 6. Memory: what Adam keeps
#
# Nearly all language models are trained with **Adam** (Kingma and Ba 2015), mostly in the form AdamW (Loshchilov and
# Hutter 2019). For each weight it keeps two numbers: $m$, a running mean of the gradient $g$, and $v$, a running mean
# of its square.
#
# $$m \leftarrow \beta_1 m + (1 - \beta_1)\,g \qquad v \leftarrow \beta_2 v + (1 - \beta_2)\,g^2 \qquad
#   w \leftarrow w - \alpha\,\frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \varepsilon}$$
#
# The divisions by $1 - \beta^t$ make up for both means beginning at 0; $t$ is the number of the step, from 1.
#
# **Your turn.** Write one step, in place. (AdamW also lets weights shrink a little each step. We leave that out,
# `weight_decay=0`.)


# %%
def my_adam_step(w, g, m, v, t, lr=1e-3, b1=0.9, b2=0.999, eps=1e-8):
    pass  # your lines in place of this one


def three_steps(step):
    w, m, v = torch.ones(4, dtype=torch.float64), *torch.zeros(2, 4, dtype=torch.float64)
    for t in (1, 2, 3):
        step(w, torch.tensor([1.0, -2, 0.5, 1e-3], dtype=torch.float64) / t, m, v, t)
    return w


weight = nn.Parameter(torch.ones(4, dtype=torch.float64))
optimizer = torch.optim.AdamW([weight], lr=1e-3, weight_decay=0)
for t in (1, 2, 3):
    weight.grad = torch.tensor([1.0, -2, 0.5, 1e-3], dtype=torch.float64) / t
    optimizer.step()
print("right:", torch.allclose(three_steps(my_adam_step), weight.detach(), rtol=0, atol=1e-12))


# %% jupyter={"source_hidden": true}
# One answer
def adam_step(w, g, m, v, t, lr=1e-3, b1=0.9, b2=0.999, eps=1e-8):
    m.mul_(b1).add_((1 - b1) * g)
    v.mul_(b2).add_((1 - b2) * g**2)
    w -= lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)


print("weights after three steps:", [round(x, 4) for x in three_steps(adam_step).tolist()])
assert torch.allclose(three_steps(adam_step), weight.detach(), rtol=0, atol=1e-12)

# %% [markdown] lang="en"
# All four weights moved by nearly the same distance, though their gradients differ by a factor of 2,000. Adam divides
# the gradient by its own size. So its steps are about as long as the learning rate, whatever the gradient.
#
# **Question.** How many bytes do the weights of our model, their gradients, and what Adam keeps take in float32? Count
# on the real ones, after one step.

# %%
prediction = None  # (weights, gradients, Adam)


def kept_by(model, optimizer):
    weights = sum(p.nbytes for p in model.parameters())
    gradients = sum(p.grad.nbytes for p in model.parameters())
    state = sum(s["exp_avg"].nbytes + s["exp_avg_sq"].nbytes for s in optimizer.state.values())
    return weights, gradients, state


model = fresh()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
mean_loss(model, inputs, targets).backward()
optimizer.step()
full = kept_by(model, optimizer)
print("you wrote:", prediction, "- measured:", *(f"{size:,}" for size in full))
print("bytes a parameter:", *(size / P for size in full), "- together", sum(full) / P)
assert full == (4 * P, 4 * P, 8 * P)

# %% [markdown] lang="en"
# 4 + 4 + 8 = 16 bytes a parameter. Adam's part is as large as the rest together.
#
# ### Mixed precision
#
# GPUs multiply matrices several times faster in 16 bits than in 32. **bfloat16** is float32 with the last 16 bits cut
# off: the same range, from 10⁻³⁸ to 10³⁸, but only 8 significant bits, two to three decimal digits. Is that enough?
#
# **Predict:** a weight is 1. A thousand times, 0.001 is added to it, in bfloat16. Where does it end?

# %%
prediction = None

for dtype in (torch.float32, torch.bfloat16):
    x = torch.ones((), dtype=dtype)
    for _ in range(1000):
        x += 0.001
    print(f"{dtype}: {x.item():.4f}")
print("you wrote:", prediction)
assert x.item() == 1

# %% [markdown] lang="en"
# It never moves. The next number above 1 in bfloat16 is 1.0078, and 1.001 is rounded back to 1, a thousand times. A
# product in few digits is a product with a small error. A *sum of many small steps* in few digits is no sum at all.
#
# So the usual way is **[mixed precision](../docs/glossary.md#mixed-precision)** (Micikevicius et al. 2018): compute in
# 16 bits, but keep a **master copy** of the weights in float32, and let Adam step on that. After each step the 16-bit
# weights are rounded from the master.


# %%
def mixed(model, lr=3e-4):
    """A 16-bit model, its master copy, and an optimizer for that."""
    master = [p.detach().clone().requires_grad_() for p in model.parameters()]  # float32, before rounding
    return model.bfloat16(), master, torch.optim.AdamW(master, lr=lr, weight_decay=0)


def mixed_step(model, master, optimizer):
    for p, w in zip(model.parameters(), master, strict=True):
        w.grad = p.grad.float()
    optimizer.step()
    optimizer.zero_grad()  # the float32 gradients were there for a moment only
    with torch.no_grad():
        for p, w in zip(model.parameters(), master, strict=True):
            p.copy_(w)  # rounds


def kept_by_mixed(model, master, optimizer):
    weights, gradients, _ = kept_by(model, optimizer)
    state = sum(s["exp_avg"].nbytes + s["exp_avg_sq"].nbytes for s in optimizer.state.values())
    return weights, gradients, state + sum(w.nbytes for w in master)


# %% [markdown] lang="en"
# **Predict:** how many bytes a parameter now: weights, gradients, and optimizer with the master copy?

# %%
prediction = None  # (weights, gradients, optimizer)

model, master, optimizer = mixed(fresh())
mean_loss(model, inputs, targets).backward()
mixed_step(model, master, optimizer)
found = [size / P for size in kept_by_mixed(model, master, optimizer)]
print("you wrote:", prediction, "- measured:", found, "together", sum(found))
assert found == [2, 2, 12]

# %% [markdown] lang="en"
# 2 + 2 + 12 = 16 again. **Mixed precision does not save memory for weights and optimizer.** It saves time, and it
# halves the [activations](../docs/glossary.md#activation), which come next. The 12 are the K of the ZeRO paper
# (Rajbhandari et al. 2020): master copy, $m$ and $v$.
#
# Is the master copy worth its 4 bytes? We train 20 steps, with and without. **Predict:** which share of the norms'
# weights, which begin at 1, has moved at all? The learning rate is 0.0003, a usual one.

# %%
prediction = None  # (with master, without)


def moved(with_master):
    """The share of the norms' weights that differ from their beginning after 20 steps."""
    model, master, optimizer = mixed(fresh())
    start = [p.detach().clone() for p in model.parameters()]
    plain = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0)
    for batch in corpus.batches(steps=20, rows=4, context=32):
        mean_loss(model, *batch).backward()
        mixed_step(model, master, optimizer) if with_master else plain.step()
        model.zero_grad()
    names = [name for name, _ in model.named_parameters()]
    now = master if with_master else model.parameters()
    changed = {n: (p != s) for n, p, s in zip(names, now, start, strict=True)}
    norms = torch.cat([c for n, c in changed.items() if "norm" in n and n.endswith("weight")])
    return norms.float().mean().item()


shares = moved(True), moved(False)
print("you wrote:", prediction, "- with master, without:", [f"{share:.0%}" for share in shares])
assert shares[0] > 0.99 and shares[1] == 0

# %% [markdown] lang="en"
# Without a master copy not one of these 1,152 weights ever moves. No error, no warning, and the loss still falls,
# because other weights are smaller than 1 and do move. It is a bug that trains.
#
# There is a second way to 16 bytes, PyTorch's **autocast**: weights, gradients and Adam's numbers stay in float32,
# which makes 4 + 4 + 8. Inside `with torch.autocast(...)` each matrix product rounds its inputs to 16 bits first. This
# way needs no master copy, because the weights are it. minipar's option `dtype=torch.bfloat16` works like that.

# %%
model = fresh()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
with torch.autocast("cpu", torch.bfloat16):
    logits = model(inputs)
F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()).backward()
optimizer.step()
print("logits:", logits.dtype, "- gradients:", {p.grad.dtype for p in model.parameters()})
print("bytes a parameter:", [size / P for size in kept_by(model, optimizer)])
assert kept_by(model, optimizer) == full

# %% [markdown] lang="en"
# ## 7. Memory: activations
#
# Backward needs what forward computed: to get the gradient of a weight, PyTorch needs the input that it was multiplied
# by. What is kept for that are the **activations**. PyTorch calls a hook of ours for every tensor that it saves. Here
# is what one block keeps, with parameters left out, and tensors that share their memory counted once:


# %%
def saved(forward, owner):
    """The tensors that autograd saves during forward(), by memory; those of the owner's parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in owner.parameters()}
    kept = {}

    def pack(x):
        place = x.untyped_storage().data_ptr()
        if place not in own:
            kept.setdefault(place, x)  # held, so its memory is not given to another one
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        forward()
    return list(kept.values())


def bytes_of(some):
    return sum(x.untyped_storage().nbytes() for x in some)


# %% [markdown] lang="en"
# **Question.** A block gets one vector of h numbers for each token. How many numbers does it keep for it, in units of
# h? Think of what each layer multiplies: norm, q, k, v, attention, out, norm, up, GELU, down.

# %%
prediction = None  # units of h

model = fresh()
block, b, s, h, a = model.blocks[0], 2, 64, 128, 8
x = torch.randn(b, s, h, requires_grad=True)
some = saved(partial(block, x), block)
shapes = Counter(tuple(y.shape) for y in some)
for shape, times in shapes.items():
    print(f"{times} × {shape}")
units = bytes_of(some) / (4 * b * s * h)
print(f"you wrote: {prediction} - {bytes_of(some):,} bytes, in units of h: {units:.2f}")
assert bytes_of(some) == 4 * b * s * (16 * h + 4 + a)

# %% [markdown] lang="en"
# 16 h, and a few numbers more:
#
# | what | why | numbers a token |
# |---|---|---|
# | input of the first norm | gradient of the norm | h, and 2 for mean and spread |
# | its output | input of q, k and v, saved once | h |
# | q, k, v, and the result of attention | gradient of attention, input of `out` | 4 h, and one for each of `a` heads |
# | input and output of the second norm | the norm, and `up` | 2 h, and 2 |
# | output of `up` | gradient of GELU | 4 h |
# | output of GELU | input of `down` | 4 h |
#
# Korthikanti et al. (2022) count the same block in 16 bits as $s b h\,(34 + 5 a s / h)$ bytes. Our 16 h at 2 bytes are
# 32. The other 2 are the masks of two dropouts, one byte for each number, which we do not have:

# %%
half = fresh().blocks[0].bfloat16()
x16 = torch.randn(b, s, h, dtype=torch.bfloat16, requires_grad=True)
size = bytes_of(saved(partial(half, x16), half)) / (b * s * h)
print(f"in 16 bits: {size:.2f} bytes for each token and number of the width")
assert 32 <= size < 33

# %% [markdown] lang="en"
# And $5as/h$ is the table of T × T weights for each head (before and after dropout, with its mask), which fused
# attention does not keep. With attention by plain matrix products, we would have it, too, once:

# %%
rows = []
for length in (32, 64, 128):
    x = torch.randn(b, length, h, requires_grad=True)
    fused = bytes_of(saved(partial(block, x), block))
    with sdpa_kernel(SDPBackend.MATH):
        plain = bytes_of(saved(partial(block, x), block))
    rows.append((fused, plain - fused))
    print(f"{length:>4} tokens: fused {fused:>9,} bytes, plain matrix products {plain - fused:>9,} more")
assert rows[1][0] == 2 * rows[0][0] and rows[2][0] == 4 * rows[0][0]
table = 4 * b * a * 128 * 128
print(f"one table of weights, 128 tokens, float32: {table:,} bytes")
assert rows[2][1] == table - 4 * b * a * 128

# %% [markdown] lang="en"
# With fused attention, memory grows with the number of tokens: twice the length, twice the bytes. Without it, the table
# comes on top, and that grows with the square of the length. (To the byte: the table, less one number for each token
# and head, which the fused kernel keeps in order to compute the table again.) Papers from before fused kernels have
# this part in their formulas.
#
# Now the whole model. **Predict** the bytes for 8 rows of 128 tokens, and say what is larger: the activations of one
# step, or the 16 bytes a parameter?

# %%
prediction = None  # (bytes, "activations" or "states")


def activation_bytes(c, b, s):
    """float32, fused attention: blocks; last norm and head; log-probabilities; ids and targets; a count."""
    token = c.depth * (16 * c.width + 4 + c.heads) + (2 * c.width + 2) + c.vocab
    return 4 * b * s * token + 2 * 8 * b * s + 4


def kept_in_forward(model, batch):
    return bytes_of(saved(lambda: mean_loss(model, *batch), model))


found = {}
for b, s in ((1, 128), (8, 32), (8, 64), (8, 128), (16, 128)):
    found[b, s] = kept_in_forward(model, next(corpus.batches(steps=1, rows=b, context=s)))
    print(f"{b:>2} rows of {s:>3} tokens: {found[b, s]:>12,} bytes, formula {activation_bytes(config, b, s):>12,}")
    assert found[b, s] == activation_bytes(config, b, s)
print("you wrote:", prediction, "- states:", f"{16 * P:,}")

# %%
drawing, (panel,) = viz.figure(6.5, 2.8)
batch_sizes = [1, 2, 4, 8, 16]
for length, color, marker in ((32, 0, "o"), (64, 1, "s"), (128, 5, "v")):
    heights = [activation_bytes(config, b, length) / 1e6 for b in batch_sizes]
    panel.plot(batch_sizes, heights, color=viz.PALETTE[color], label=f"{length} tokens (formula)")
    dots = [(b, size / 1e6) for (b, s), size in found.items() if s == length]
    panel.plot(*zip(*dots, strict=True), marker, color=viz.INK, ms=6)
panel.axhline(16 * P / 1e6, color=viz.PALETTE[6], ls="--", label="weights, gradients, Adam")
panel.set(xlabel="rows", ylabel="MB kept for backward", xticks=batch_sizes)
panel.legend(frameon=False, fontsize=9)
alt = (
    "Bytes of activations against the number of rows, for rows of 32, 64 and 128 tokens: straight lines through the "
    "origin, and on them the measured values as dots. A dashed line: the bytes of weights, gradients and Adam."
)
viz.show(drawing, alt)

# %% [markdown] lang="en"
# The dots are measured, the lines computed. With 8 rows of 128 tokens the activations are more than twice the states.
# They are proportional to the number of tokens, rows times length. So a step keeps two kinds of things: **states**, 16
# bytes a parameter, whatever the batch; and **activations**, so many bytes a token and block, whatever the optimizer.
#
# If the activations of a batch do not fit, it is cut into **microbatches**: forward and backward for one after the
# other, while gradients add up in `.grad`. Only one microbatch's activations are there at a time.
#
# ### Recompute
#
# One can also keep less, and compute again. With **recompute** (also called *activation checkpointing*; Chen et al.
# 2016) a block keeps only its input. When backward comes to it, it runs its forward once more. PyTorch's `checkpoint`
# does that.
#
# Our hook does not see what `checkpoint` holds. So here is a second, independent way of counting: note every piece of
# memory that any operation makes, and look afterwards which of them still exist.


# %%
class Memory(TorchDispatchMode):
    """Notes all memory that operations make while it is on; not that of what was there before."""

    def __init__(self, *before):
        super().__init__()
        self.made, self.before = {}, {x.untyped_storage()._cdata for x in before}

    def __torch_dispatch__(self, operation, types, arguments=(), more=None):
        result = operation(*arguments, **(more or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            memory = x.untyped_storage() if isinstance(x, torch.Tensor) else None
            if memory and memory._cdata not in self.before:
                self.made.setdefault(memory._cdata, (StorageWeakRef(memory), memory.nbytes()))
        return result

    def alive(self):
        return sum(size for reference, size in self.made.values() if not reference.expired())


def logits_with(model, recompute, inputs):
    x = model.embed(inputs)
    for block in model.blocks:
        x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False) if recompute else block(x)
    return model.head(model.norm(x))


# %% [markdown] lang="en"
# **Predict**, for 8 rows of 128 tokens: how many times less is kept with recompute? And how many FLOPs more does the
# step take?

# %%
prediction = None  # (times less, per cent more FLOPs)


def with_recompute(recompute, early_stop=True):
    model = fresh()
    with Memory(inputs, *model.parameters()) as memory:
        logits = logits_with(model, recompute, inputs)
    kept = memory.alive()
    del logits  # all of it hangs on these
    stop = set_checkpoint_early_stop(early_stop)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), stop:
        F.cross_entropy(logits_with(model, recompute, inputs).flatten(0, 1), targets.flatten()).backward()
    return kept, counter.get_total_flops(), torch.cat([p.grad.flatten() for p in model.parameters()])


(kept, work, gradient), (kept_less, more_work, again) = with_recompute(False), with_recompute(True)
print(f"you wrote: {prediction} - {kept:,} bytes and {kept_less:,}: {kept / kept_less:.1f} times less")
print(f"FLOPs: {more_work / work - 1:+.0%}, gradients equal: {torch.equal(gradient, again)}")
to_the_end = with_recompute(True, early_stop=False)[1]
print(f"FLOPs, if a block's forward runs to its end: {to_the_end / work - 1:+.0%}")
assert kept == activation_bytes(config, 8, 128) - 16 * 8 * 128 - 4 and torch.equal(gradient, again)
assert kept_less == 4 * 8 * 128 * (4 * 128 + (2 * 128 + 2) + 512) and more_work < to_the_end < 4 / 3 * work

# %% [markdown] lang="en"
# The first count agrees with the hook's: two ways of counting, one number (less the ids, the targets and a count, which
# the second leaves out). With recompute a block keeps h numbers a token in place of 16 h and a few. What is left is
# mostly the head's and the loss's. The gradients are the same, bit for bit: backward sees the same numbers, only later.
#
# In papers you read that recompute costs a third more work: one forward more, on top of one forward and of a backward
# that is worth two. Why is it 22 % here? The head is not computed again; that leaves 31 %. And PyTorch stops a block's
# second forward as soon as it has all that backward asks for. The result of the block's last product, `down`, nobody
# asks for, and that product is a third of a block's weights. Memory for time: this is the trade in all large training
# runs. Between the two extremes lies *selective* recompute, which computes again only what is cheap. minipar has both,
# `recompute="full"` and `"selective"`.
#
# ### What one step keeps
#
# Now put it together for large models, in 16 bits with fused attention and without dropout: states 16 bytes a
# parameter; activations 2 × 16 h bytes a token and block, or 2 h with recompute, and 4 V bytes a token for the loss,
# which is computed in float32. It is an estimate: libraries differ in details.
#
# **Before you move it:** GPT-3 with one row of 2,048 tokens, on GPUs of 80 GB. How many of them would it take to hold
# the states alone? And is there a model here whose activations are more than its states?

# %%
prediction = None  # (GPUs, which model)

KINDS = {  # blocks, width, vocabulary, context
    "GPT-2 XL, 1.6 billion": (48, 1600, 50257, 1024),
    "GPT-3 6.7B": (32, 4096, 50257, 2048),
    "GPT-3 175B": (96, 12288, 50257, 2048),
}


def step_bytes(model, rows, recompute):
    """Weights, gradients, optimizer, activations in bytes: an estimate."""
    l, h, V, s = KINDS[model]
    size, a_block = formula(l, h, V, s), 32 * h
    blocks = 2 * h * l + a_block if recompute else a_block * l  # one block's are there while it is computed again
    activations = rows * s * (blocks + 4 * h + 4 * V)
    return {"weights": 2 * size, "gradients": 2 * size, "master, m, v": 12 * size, "activations": activations}


# %%
def draw_step(model, rows, recompute):
    sizes = {part: size / 1e9 for part, size in step_bytes(model, rows, recompute == "yes").items()}
    total, left = sum(sizes.values()), 0
    drawing, (panel,) = viz.figure(7.5, 2.4)
    for (part, size), color in zip(sizes.items(), viz.PALETTE, strict=False):
        panel.barh(0, size, left=left, color=color, ec=viz.INK, lw=0.6, label=f"{part}: {size:,.1f}")
        left += size
    panel.axvline(80, color=viz.INK, ls="--", lw=1)
    panel.text(80, 0.62, " 80 GB", fontsize=9, color=viz.INK)
    panel.set(xlabel="GB", yticks=[], ylim=(-0.6, 0.85), xlim=(0, 1.05 * max(total, 90)))
    panel.set_title(f"{model}, rows: {rows}, recompute: {recompute}: {total:,.0f} GB", fontsize=10)
    drawing.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    told = ", ".join(f"{part} {size:,.1f}" for part, size in sizes.items())
    return viz.describe(drawing, f"Estimate for {model}, rows: {rows}, recompute: {recompute}. GB: {told}.")


explore(draw_step, model=list(KINDS), rows=[1, 4, 16, 64], recompute=["no", "yes"])

# %%
devices = math.ceil(16 * formula(*KINDS["GPT-3 175B"]) / 80e9)
print("you wrote:", prediction, "- GPUs for the states of GPT-3:", devices)
for kind in KINDS:
    *states, activations = step_bytes(kind, 16, False).values()
    print(f"{kind:<22} 16 rows: activations are {activations / sum(states):.2f} of the states")
assert devices == 35

# %% [markdown] lang="en"
# 35 GPUs, before the first row has been read. And with 16 rows the activations of the two smaller models are more than
# all their states. Both have to be divided among devices, and by different means. That is what the rest of the course
# is about.
#
# ## 8. Pretraining
#
# The document's second mark: models are **pretrained**, on much text, without labels. We do it on little text. The
# last tenth of it is put aside. The model never trains on that, and we judge it there: **held-out** text.

# %%
cut = len(tokens) * 9 // 10
known, held_out = tokens[:cut], tokens[cut:]
print(f"to train on: {len(known):,} tokens; held out: {len(held_out):,}, beginning with")
print(repr(tokenizer.decode(held_out[:40].tolist())))


def draw_rows(data, rows, context, generator):
    place = torch.randint(len(data) - context, (rows, 1), generator=generator) + torch.arange(context)
    return data[place], data[place + 1]


def loss_on(model, data, context=64):
    """The mean loss over a text, cut into rows side by side; of a long text some of them."""
    starts = range(0, len(data) - context, context)
    places = torch.tensor(starts[:: 1 + len(starts) // 64])[:, None] + torch.arange(context)
    with torch.no_grad():
        return mean_loss(model, data[places], data[places + 1]).item()


# %% [markdown] lang="en"
# What would be a good loss? Without something to compare with, a number means nothing. Three guessers, from dull to
# less dull, all fitted to the text to train on and judged on the text held out:
#
# - each token equally likely: ln 512;
# - each token as likely as it is frequent, whatever stands before it. On the text it was fitted to, its loss is the
#   **entropy** of single tokens, and no guesser that ignores the context can do better;
# - as likely as it is frequent *behind the token before it*.
#
# **Predict** the loss of the second and the third.

# %%
prediction = None  # (single tokens, pairs)

alone = (torch.bincount(known, minlength=512) + 0.5) / (len(known) + 256)  # no token gets probability 0


def single_tokens(data):
    return -alone[data].log().mean().item()


def pairs(data):
    """Frequencies of pairs, mixed with those of single tokens for pairs that came rarely or never."""
    count = torch.zeros(512, 512).index_put((known[:-1], known[1:]), torch.ones(()), accumulate=True)
    share = (count + 20 * alone) / (count.sum(1, keepdim=True) + 20)
    return -share[data[:-1], data[1:]].log().mean().item()


baselines = {"equally likely": uniform, "single tokens": single_tokens(held_out), "pairs": pairs(held_out)}
print("you wrote:", prediction, "- held out:", {name: round(loss, 2) for name, loss in baselines.items()})
print(f"on the text to train on: single tokens {single_tokens(known):.2f}, pairs {pairs(known):.2f}")
assert baselines["pairs"] < baselines["single tokens"] < uniform

# %% [markdown] lang="en"
# Now the model: 600 steps of 8 rows with 64 tokens. The learning rate rises over the first steps, the
# **[warm-up](../docs/glossary.md#warm-up)**, and then falls to 0. The second of Adam's $\beta$ is 0.95, as it was for
# GPT-3.
#
# **Predict:** which of the three baselines does it beat, and after about how many steps?

# %% seconds=240
prediction = None  # for instance {"single tokens": 50, "pairs": "never"}


def pretrain(model, data, steps, lr=2e-3, every=30):
    """Trains as far as one asks for (step, loss on the text to train on, loss on text held out)."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(0)
    for step in range(steps + 1):
        if step % every == 0:
            yield step, loss_on(model, data), loss_on(model, held_out)
        optimizer.param_groups[0]["lr"] = lr * min(step / (steps / 6), (1 - step / steps) * 1.5, 1)
        optimizer.zero_grad()
        mean_loss(model, *draw_rows(data, 8, 64, generator)).backward()
        optimizer.step()


trained = fresh()
run = pretrain(trained, known, steps=600)
curve = list(itertools.islice(run, 7))  # in three parts, so that you see it move
print("after {} steps: {:.2f} on text it trained on, {:.2f} on text held out".format(*curve[-1]))

# %% seconds=240
curve += itertools.islice(run, 7)
print("after {} steps: {:.2f} on text it trained on, {:.2f} on text held out".format(*curve[-1]))

# %% seconds=240
curve += run
below = {name: next((step for step, _, held in curve if held < loss), "never") for name, loss in baselines.items()}
print("you wrote:", prediction, "- measured, to the next 30 steps:", below)
print("after {} steps: {:.2f} on text it trained on, {:.2f} on text held out".format(*curve[-1]))
assert curve[-1][2] < baselines["pairs"]

# %%
drawing, (panel,) = viz.figure(7, 3.2)
steps, seen, unseen = zip(*curve, strict=True)
panel.plot(steps, seen, color=viz.PALETTE[0], marker="o", ms=4, label="text it trains on")
panel.plot(steps, unseen, color=viz.PALETTE[6], marker="s", ms=4, label="text held out")
for (name, loss), style in zip(baselines.items(), ("-", "--", ":"), strict=True):
    panel.axhline(loss, color=viz.INK, lw=1, ls=style)
    panel.text(600, loss + 0.04, f"{name} {loss:.2f}", ha="right", fontsize=9, color=viz.INK)
panel.set(xlabel="step", ylabel="loss")
panel.legend(frameon=False, fontsize=9, loc="lower left")
alt = (
    f"Loss over 600 steps. It begins at {unseen[0]:.2f}, falls below the lines of the baselines "
    f"({', '.join(f'{name} {loss:.2f}' for name, loss in baselines.items())}) and ends at {seen[-1]:.2f} on the text "
    f"that the model trains on and at {unseen[-1]:.2f} on text held out."
)
viz.show(drawing, alt)

# %% [markdown] lang="en"
# The model passes the second guesser early. The third one, pairs, takes it most of the run. That guesser is not stupid:
# it has counted every pair of the text. The model took 600 steps, over 307,200 tokens. What it has and pairs do not is
# context: it may use what stood ten tokens before. It is a short run: GPT-3 saw a million times as many tokens.
#
# The two curves part a little. Some of that is the text itself, since the last tenth is harder for the pairs, too (3.72
# against 3.26). The rest is learning by heart, to which we come below.
#
# (Try it without a warm-up: `lr=3e-3`, and `(1 - step / steps)` as the factor behind it. In one such run of ours, with
# 16 rows and Adam's usual $\beta$, the model was still at the loss of single tokens after 300 steps.)
#
# ## 9. What it writes
#
# A model that gives probabilities can write: draw a token, append it, ask again. **Temperature** divides the logits
# first. Below 1 it makes likely tokens likelier; at 0, by agreement, one takes the likeliest each time.
#
# **Your turn.** `my_next_token(logits, temperature, generator)` gets the 512 logits of the last position and returns a
# token id. `torch.multinomial(p, 1, generator=...)` draws from probabilities.


# %%
def my_next_token(logits, temperature, generator):
    return 0  # your lines in place of this one


def go_on(model, prompt, new, next_token, temperature=0.7):
    ids, generator = tokenizer.encode(prompt).ids, torch.Generator().manual_seed(0)
    for _ in range(new):
        with torch.no_grad():
            logits = model(torch.tensor([ids[-config.context :]]))[0, -1]
        ids.append(int(next_token(logits, temperature, generator)))
    return tokenizer.decode(ids)


print(repr(go_on(trained, "The", 4, my_next_token)))


# %% jupyter={"source_hidden": true}
# One answer
def next_token(logits, temperature, generator):
    if temperature == 0:
        return logits.argmax()
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)


# %%
prompt = 'The "for" statement'
for title, who, temperature in (
    ("before training", fresh(), 0.7),
    ("after, likeliest", trained, 0),
    ("after, drawn", trained, 0.7),
):
    print(f"--- {title}:\n{go_on(who, prompt, 60, next_token, temperature)}\n")

# %% [markdown] lang="en"
# Before training: noise. The likeliest token each time soon goes in circles: a small model repeats what it has just
# said. Drawn, it has picked up what the reference looks like: lines, a heading underlined with `=`, names in quotation
# marks, "raise" and "returns". It has no idea what it says. That is what a loss of 3.6 looks like.
#
# The package's version, for a model on any number of ranks, is `generate`. It needs the next chapters to be read.
#
# ## 10. Generalization
#
# The document's third mark: such models **generalize**, to tasks like classification or translation. That our model
# cannot show, and you should not expect it. What it can show is the weakest and first form of it: does what was learned
# on one text hold on another?
#
# To compare texts of different kinds fairly, count bits for each *character*, not for each token: a strange text
# falls into more tokens.
#
# **Predict** the order, from easy to hard: the text it trained on, the text held out, the license of the text
# (English, by lawyers), and the held-out text with its words in random order.

# %%
prediction = None

license_text = (resources.files("minipar") / "corpus_data" / "LICENSE.txt").read_text(encoding="utf-8")
held_text = tokenizer.decode(held_out.tolist())
some_words = held_text.split(" ")
order = torch.randperm(len(some_words), generator=torch.Generator().manual_seed(0)).tolist()
kinds = {
    "trained on": tokenizer.decode(known.tolist()),
    "held out": held_text,
    "the license": license_text,
    "held out, words mixed": " ".join(some_words[i] for i in order),
}
bits = {}
for name, some_text in kinds.items():
    ids = torch.tensor(tokenizer.encode(some_text).ids)
    bits[name] = {"before": loss_on(fresh(), ids), "after": loss_on(trained, ids), "single tokens": single_tokens(ids)}
    for who in bits[name]:
        bits[name][who] *= len(ids) / len(some_text) / math.log(2)
    print(f"{name:<22}", {who: round(x, 2) for who, x in bits[name].items()}, "bits a character")
known_bits, held_bits, license_bits, mixed_bits = (some["after"] for some in bits.values())
print("you wrote:", prediction)
assert max(known_bits, held_bits) < mixed_bits < license_bits

# %% [markdown] lang="en"
# The model gained on all four, and not equally. Text held out is as easy as text it trained on, in bits for each
# character: what it learned is no property of those pages. (Its tokens are a little longer, which is why the loss for
# each token differed.) Mix the words, and nearly half of the gain over single tokens is gone: so much came from the
# order of words, the rest from their spelling. The license is English as well, and the hardest of the four: it has
# words of lawyers, which the reference hardly uses.
#
# So the model generalizes to what is like its text, and less to what is not. Large models are trained on text of all
# kinds for this reason. Whether they then do *tasks* is an empirical question for each task, and later chapters ask it.
#
# ### Learning by heart
#
# Why so much ado about text held out? Train the same model on 2,000 tokens only, two pages. **Predict** the two losses
# after 180 steps: on these two pages, and on text held out.

# %% seconds=240
prediction = None  # (its own pages, held out)

small = list(pretrain(fresh(), known[:2000], steps=180))
assert small[-1][1] < 2 and small[-1][2] > small[0][2]
print(f"you wrote: {prediction} - its own pages {small[-1][1]:.2f}, held out {small[-1][2]:.2f}")
print(f"on text held out: before training {small[0][2]:.2f}, at its best {min(held for *_, held in small):.2f}")

# %%
drawing, panels = viz.figure(8, 2.9, columns=2)
for panel, some, title in zip(panels, (curve, small), (f"{len(known):,} tokens", "2,000 tokens"), strict=True):
    steps, seen, unseen = zip(*some, strict=True)
    panel.plot(steps, seen, color=viz.PALETTE[0], marker="o", ms=4, label="text it trains on")
    panel.plot(steps, unseen, color=viz.PALETTE[6], marker="s", ms=4, label="text held out")
    panel.axhline(baselines["single tokens"], color=viz.INK, lw=1, ls="--", label="single tokens")
    panel.set(xlabel="step", title=f"trained on {title}", ylim=(0, 1.05 * max(held for *_, held in small)))
panels[0].set_ylabel("loss")
panels[0].legend(frameon=False, fontsize=9, loc="lower left")
alt = (
    "Two pairs of loss curves. Trained on much text, the curve of the training text and that of held-out text fall "
    "together. Trained on 2,000 tokens, the first falls toward 0 and the second turns and rises above where it began."
)
viz.show(drawing, alt)

# %% [markdown] lang="en"
# It is about to know its two pages by heart, and on text held out it is worse than before training. At some point in
# between it was best, and then it began to trade what holds everywhere for what holds on these pages. A training loss
# shows nothing of it. This is **overfitting**. With little text it comes soon. Large models see each text a few times
# at most: GPT-3 the parts of its own between 0.4 and 3.4 times (Brown et al. 2020, Table 2.2).
#
# ## What you have now
#
# - **token, vocabulary**: a piece of text and its number; BPE makes the list by counting pairs.
# - **logits, loss**: a model's scores for the next token; the mean of $-\ln p$ of the token that came.
# - **parameters**: $12h^2$ a block, and $h$ for each entry of the vocabulary.
# - **FLOPs**: 6 a parameter and token; attention adds $s/6h$ of the blocks' part.
# - **states**: 16 bytes a parameter with Adam, 2 + 2 + 12 in mixed precision, 4 + 4 + 8 in float32.
# - **activations**: 16 h numbers a token and block; with recompute h, for up to a third more work.
# - **held-out text**: the only judge of a language model that you should trust.
#
# What the document says of large language models, and what we have seen:
#
# | it says | here |
# |---|---|
# | millions to billions of parameters | of 2018 to 2020; published models today have hundreds of billions |
# | pretraining teaches language | holds in the small: below the loss of every counting guesser, on text not seen |
# | they adapt to many tasks | not shown here; it takes larger models |
#
# ## Three questions to take along
#
# 1. A model has 32 blocks of width 4,096. How many parameters do the blocks have, and how many bytes are the states?
# 2. You double the length of the rows and halve their number. What happens to the states, to the activations (fused
#    attention) and to the FLOPs?
# 3. Someone reports a training loss of 0.05 for a small model. What do you ask?
#
# <details><summary>Answers</summary>
#
# 1. 12 × 32 × 4,096² = 6.4 billion; 16 bytes each are 103 GB.
# 2. States and activations stay: the number of tokens is the same. The FLOPs grow by attention's part, which doubles.
# 3. The loss on text held out, and how much text it was trained on.
#
# </details>

# %%
blocks = 12 * 32 * 4096**2
assert round(blocks / 1e9, 1) == 6.4 and round(16 * blocks / 1e9) == 103  # the first answer above
assert activation_bytes(config, 4, 128) == activation_bytes(config, 8, 64)  # the second

# %% [markdown] lang="en"
# **Exercises.** Seven graded tasks are in [the exercise notebook](../exercises/02a_language_models.ipynb): parameters,
# FLOPs, bytes and MFU from the shape, a step that fits into memory, and a loop whose loss is too good. A terminal
# grades them: `python -m minipar grade exercises/02a_language_models.ipynb`.
#
# **Next:** [02b, ranks and collectives](02b_ranks_and_collectives.ipynb): how several processes work on one model.
#
# ## References
#
# - Brown et al. 2020, Language Models are Few-Shot Learners,
#   [arxiv.org/abs/2005.14165](https://arxiv.org/abs/2005.14165)
# - Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost,
#   [arxiv.org/abs/1604.06174](https://arxiv.org/abs/1604.06174)
# - Dao et al. 2022, FlashAttention, [arxiv.org/abs/2205.14135](https://arxiv.org/abs/2205.14135)
# - Kingma and Ba 2015, Adam, [arxiv.org/abs/1412.6980](https://arxiv.org/abs/1412.6980)
# - Korthikanti et al. 2022, Reducing Activation Recomputation in Large Transformer Models,
#   [arxiv.org/abs/2205.05198](https://arxiv.org/abs/2205.05198)
# - Llama Team 2024, The Llama 3 Herd of Models, [arxiv.org/abs/2407.21783](https://arxiv.org/abs/2407.21783)
# - Loshchilov and Hutter 2019, Decoupled Weight Decay Regularization,
#   [arxiv.org/abs/1711.05101](https://arxiv.org/abs/1711.05101)
# - Micikevicius et al. 2018, Mixed Precision Training, [arxiv.org/abs/1710.03740](https://arxiv.org/abs/1710.03740)
# - Narayanan et al. 2021, Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM,
#   [arxiv.org/abs/2104.04473](https://arxiv.org/abs/2104.04473)
# - Radford et al. 2019, Language Models are Unsupervised Multitask Learners (OpenAI; not on arXiv)
# - Rajbhandari et al. 2020, ZeRO, [arxiv.org/abs/1910.02054](https://arxiv.org/abs/1910.02054)
# - Sennrich et al. 2016, Neural Machine Translation of Rare Words with Subword Units,
#   [arxiv.org/abs/1508.07909](https://arxiv.org/abs/1508.07909)
