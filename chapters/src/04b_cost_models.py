# %% [markdown] lang="en"
# # Cost models
#
# A run on 16,384 GPUs is planned before the GPUs are there. What will a step take, in memory, in bytes on the wire, in
# seconds? This chapter counts, and then holds each count against something that was measured: by PyTorch, by the
# ledger, by the clock of your machine, and by the people who trained the largest models. At the end you can
#
# - count the parameters and FLOPs of a model, and say what "percent of peak" means in a paper;
# - say what memory goes to, before you run out of it;
# - fit the two numbers of a link, [alpha](../docs/glossary.md#alpha) and beta, on your own machine;
# - compute the idle time of any pipeline schedule to four decimals;
# - predict a step on a cluster that you do not have, and say how far such a prediction can be trusted.
#
# **Time:** about two hours and a half. **You need:** [Language models](02a_language_models.ipynb), [Ranks and
# collectives](02b_ranks_and_collectives.ipynb), [data](03a_data_parallel.ipynb) (with ZeRO),
# [tensor](03b_tensor_parallel.ipynb) and [pipeline parallelism](03c_pipeline_parallel.ipynb). Words from later
# chapters, such as recompute or context ranks, are explained in a sentence; the [glossary](../docs/glossary.md) has
# them all. The chapter belongs to section 4.2 (formulas) of the document that this course follows and tests,
# 《大规模语言模型从理论到实践 混合并行》. The document derives a loss and an update rule there: see
# [The mathematics](04a_math.ipynb). What they cost it leaves open, and that decides what can be trained at all.
#
# **How to read it.** As before: write your prediction into the cell before you run it.
#
# ## Three questions on the chapters before
#
# 1. A ring all-reduce of $M$ bytes on $n$ ranks: how many bytes does each rank send?
# 2. What does mixed precision training with Adam keep for each parameter, in bytes?
# 3. Four stages, eight microbatches, 1F1B: which share of the time is a rank idle, if nothing else costs time?
#
# <details><summary>Answers</summary>
#
# 1. $2(n-1)/n \cdot M$.
# 2. 2 for the weight and 2 for its gradient, both in 16 bits; 12 for the optimizer, which keeps the weight and two
#    moments in 32 bits. Together 16.
# 3. $(p-1)/(m+p-1) = 3/11$.
#
# </details>

# %%
import time
from dataclasses import replace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import minipar
from minipar import CLUSTERS, Config, Costs, Layout, Mesh, World, bubble, cost, find_model, ledger, parallelize

from minipar import corpus, published, viz, widgets  # isort: skip
from minipar.collectives import all_reduce, everyone
from minipar.planner import bill
from minipar.prediction import Kernel, block_kernels
from minipar.schedule import one_f_one_b, zero_bubble_h1, zero_bubble_h2
from minipar.timeline import simulate
from minipar.transformer import from_config

assert 2 + 2 + 12 == 16  # the second answer above
world = World(4)

# %% [markdown] lang="en"
# ## 1. Parameters and FLOPs
#
# A model is described by a handful of numbers: layers $l$, width $h$, heads $a$, vocabulary $V$, and the tokens $s$ of
# a row. `Transformer` holds them, for the small GPT and for models that fill a data center. It has no weights.

# %%
config = Config()
small = from_config(config)
names = ["gpt2", "megatron-1.7b", "llama-8b", "mixtral-8x7b", "megatron-175b", "llama-405b"]
for model in [small, *map(find_model, names)]:
    print(f"{model.name:14} {model.layers:4} layers of width {model.hidden:6,}: {model.parameters:16,} parameters")

assert small.parameters == sum(p.numel() for p in minipar.gpt(config).parameters())

# %% [markdown] lang="en"
# The last line counted the small GPT's tensors, and found the same. The Llama numbers are those of the released
# weights, to the parameter.
#
# **Question.** A block of a GPT has four matrices of attention, $h \times h$ each, and two of the MLP, $h \times 4h$
# and $4h \times h$. How many weights is that in all? What is it for `megatron-175b`, times its 96 layers, in billions?

# %%
prediction = None  # (weights of a block in units of h², billions)

# %%
gpt3 = find_model("megatron-175b")
in_matrices = gpt3.layers * (gpt3.attention_matrices + gpt3.mlp_matrices)
assert in_matrices == 12 * gpt3.layers * gpt3.hidden**2
print(f"12 l h² = {in_matrices / 1e9:.1f} billion of {gpt3.parameters / 1e9:.1f} billion parameters")

# %% [markdown] lang="en"
# 12 $h^2$, and 173.9 billion. So $P \approx 12\,l\,h^2$. The rest, half a percent, are the embedding, biases and norms.
#
# Now the **FLOPs**: additions and multiplications. A product of a token's $h$ numbers with an $h \times k$ matrix takes
# $2hk$ of them, a multiplication and an addition for each weight. So forward takes **two FLOPs for each weight and
# token**. Attention adds two products without weights, of the queries with all keys and of the scores with all values:
# $4sh$ a layer and token.
#
# Backward has two products for each one of forward, one for the gradient of the input and one for that of the weight.
# In all that is 6 for each weight and token, and three times attention.
#
# **Predict:** what share of the FLOPs of a step are attention's, for the small GPT with rows of 128 tokens? And for
# `llama-405b` with rows of 8,192?

# %%
prediction = None  # (small GPT, llama-405b)

# %%
for model, sequence in [(small, config.context), (find_model("llama-405b"), 8192), (find_model("llama-405b"), 131072)]:
    parts = cost.forward_flops(model, sequence)
    shares = ", ".join(f"{name} {flops / sum(parts.values()):.1%}" for name, flops in parts.items())
    six = 6 * model.parameters / (3 * sum(parts.values()))
    print(f"{model.name}, {sequence:,} tokens: {shares}; 6 x parameters are {six:.0%} of the FLOPs")

# %% [markdown] lang="en"
# 13 and 8 percent. All pairs of tokens are counted here, also those that a causal mask hides; without these,
# attention's share would be about half. The rule of thumb, $6P$ a token, is good where rows are short and the model is
# large. With 131,072 tokens it leaves out more than half.
#
# Is the count right? PyTorch can count, too: `FlopCounterMode` watches every operator. (It does not know the CPU's
# fused attention, so we ask for the plain one.)

# %%
rows = 2
tokens, targets = next(corpus.batches(steps=1, rows=rows, context=config.context))
model = minipar.gpt(config)
with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
    loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    loss.backward()
counted = counter.get_total_flops()
computed = cost.step_flops(small, rows, config.context)
print(f"PyTorch counts {counted:,}, the formula gives {computed:,.0f}")
assert counted == computed

# %% [markdown] lang="en"
# Equal, to the last FLOP. The package's version says where the formulas come from, and what recompute adds:

# %%
viz.show_source(cost.forward_flops, cost.step_flops)

# %% [markdown] lang="en"
# ### What "percent of peak" means
#
# An A100 multiplies 16-bit matrices at 312 TFLOP/s at most (its data sheet).
# [Narayanan et al. 2021](https://arxiv.org/abs/2104.04473) trained GPTs on up to 3,072 of them and printed what each
# reached: 137 to 163 TFLOP/s, 44 to 52 percent of the peak. [Korthikanti et al.
# 2022](https://arxiv.org/abs/2205.05198) printed 41.5 to 57.0 percent. Are these the same thing?
#
# They are not. The first paper recomputes every activation in backward (as in
# [Memory and recovery](03h_memory_and_recovery.ipynb)), which is one more forward: 8 FLOPs a weight and token where the
# model needs 6. It counts all 8. The second prints both:
#
# - **[MFU](../docs/glossary.md#mfu)**, model FLOPs utilization: the FLOPs that the model needs, by the time and the
#   peak. Recompute does not help.
# - **[HFU](../docs/glossary.md#hfu)**, hardware FLOPs utilization: all FLOPs that are done.
#
# **Question.** 44 to 52 percent with full recompute: about how much MFU is that?

# %%
prediction = None  # (from, to)

# %%
for run in published.RUNS[:5]:
    model = find_model(run.model)
    done, needed = (cost.step_flops(model, run.batch, run.sequence, how) for how in ("full", "none"))
    seconds = done / (run.gpus * run.flops)  # an iteration, from the printed FLOP/s
    hfu, mfu = (flops / seconds / run.gpus / 312e12 for flops in (done, needed))
    size = f"{model.parameters / 1e9:7.1f}B"
    print(f"{size} on {run.gpus:5,} GPUs: {seconds:6.1f} s an iteration, HFU {hfu:.0%}, MFU {mfu:.0%}")

# %% [markdown] lang="en"
# Between 33 and 39 percent. The sizes are the printed ones: 1.7, 7.5, 39.1, 145.6 and 1008 billion.
#
# From FLOPs to days: $8TP/(nX)$ for $T$ tokens on $n$ devices at $X$ FLOP/s each, with full recompute (eq. 4 there).

# %%
day = 24 * 3600
for size, tokens_, gpus, tflops, printed in [(175e9, 300e9, 1024, 140, 34), (1e12, 450e9, 3072, 163, 84)]:
    days = published.narayanan_seconds(tokens_, size, gpus, tflops * 1e12) / day
    print(f"{size / 1e9:,.0f}B parameters, {tokens_ / 1e9:.0f}B tokens: {days:.1f} days ({printed} printed)")
    assert abs(days / printed - 1) < 0.01

# %% [markdown] lang="en"
# ### A formula to argue with
#
# Korthikanti et al. recompute only attention's two products. For a GPT the model's FLOPs of a step are, with $B$ rows,
#
# $$72\,B\,l\,s\,h^2 \left(1 + \frac{s}{6h} + \frac{V}{12\,l\,h}\right)$$
#
# where $s/(6h)$ stands for attention: three times the forward's two products. For the hardware's they write $s/(3h)$ in
# its place. Their printed columns come out (the last number is ours, see below):

# %%
shapes = {"22B": (48, 6144, 8, 4, 1.10, 41.5, 43.7), "530B": (105, 20480, 280, 280, 37.83, 56.0, 57.0)}
for name, (layers, hidden, gpus, batch, seconds, mfu, hfu) in shapes.items():
    peak = gpus * 312e12 * seconds / 100
    shape = batch, layers, hidden, 51200, 2048
    model = minipar.Transformer(name, layers, hidden, 64, 51200, positions=2048, tied=True)
    theirs = published.korthikanti_model_flops(*shape) / peak, published.korthikanti_hardware_flops(*shape) / peak
    ours = cost.step_flops(model, batch, 2048, "selective") / peak
    print(
        f"{name:>4}: MFU {theirs[0]:.1f} ({mfu} printed), HFU {theirs[1]:.1f} ({hfu} printed), HFU derived {ours:.1f}"
    )
    assert abs(theirs[0] - mfu) < 0.5 and abs(theirs[1] - hfu) < 0.5

# %% [markdown] lang="en"
# $s/(3h)$ is six times the forward's two products. We count four: one forward, two in backward, one recomputed. That is
# $2s/(9h)$, and makes HFU 1.4 points less for 22B, and 0.6 for 530B. Both
# numbers are in print, and neither is wrong as a definition. But two papers can be compared only after one has asked
# which FLOPs were counted.
#
# ## 2. Memory
#
# What a rank holds is of two kinds. **States** live from step to step: weights, gradients, and what the optimizer
# keeps. **Activations** live from forward to backward.
#
# ### States
#
# 16 bytes a parameter, in mixed precision and in pure float32 alike. Tensor and pipeline ranks share the parameters,
# and with ZeRO the data ranks share a part of these bytes.
#
# **Question.** `llama-405b` on 16,384 GPUs with tp=8, pp=16 and dp=128. How many gigabytes of states has a rank without
# ZeRO, and how many if the optimizer's part is shared out (stage 1)? A GPU has 80.

# %%
prediction = None  # (GB without, GB with)

# %%
llama = find_model("llama-405b")
for zero in (0, 1, 3):
    layout = Layout(Mesh(dp=128, pp=16, tp=8), 16, zero=zero, sequence_parallel=True)
    parts = max(cost.stage_memory(llama, layout, 2048, 8192), key=lambda memory: sum(memory.values()))
    told = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items() if size > 5e7)
    held = sum(parts[name] for name in ("weights", "gradients", "optimizer"))
    print(f"zero={zero}: states {held / 1e9:4.1f} GB, in all {sum(parts.values()) / 1e9:5.1f}: {told}")

# %% [markdown] lang="en"
# 51 and 13 GB of states, on the fullest rank, which is the first: it has the embedding, too. Together with activations
# only ZeRO makes it fit. ("gathered" are weights that stage 3 has whole for a while.)
#
# ### Activations
#
# Backward needs what forward computed. For a block with attention that is not fused, in 16 bits, with dropout,
# Korthikanti et al. count $sbh(34 + 5as/h)$ bytes for $b$ rows (Table 2 there). `block_activations` counts the inputs
# of each operation, and finds their number; it also counts blocks that are not theirs, with fused attention, gates, or
# 32 bits. For the small GPT we can look. PyTorch calls a function of ours for each tensor that it keeps:

# %%
block = minipar.gpt(config).blocks[0]
weights = {p.untyped_storage().data_ptr() for p in block.parameters()}
kept: dict[int, int] = {}


def keep(x):
    if x.untyped_storage().data_ptr() not in weights:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return x


with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
    y = block(torch.randn(4, 128, config.width, requires_grad=True))
found = sum(kept.values())
formula = cost.block_activations(small, Layout(Mesh()), 4, 128, cost.FP32)
statistics = 4 * 128 * 4 * (4 + config.heads)  # a mean and a deviation for each norm, a number for each head
print(f"kept {found:,} bytes; the formula {formula:,.0f}, and {statistics:,} of statistics that it leaves out")
assert found == formula + statistics

# %% [markdown] lang="en"
# How many microbatches are in memory at a time is up to the schedule: all of them for GPipe, at most $p - r$ on stage
# $r$ for 1F1B. Nothing needs a formula here: `in_flight` counts along the schedule itself.
#
# Try the memory calculator, for a model of 70 billion parameters. Which settings fit on devices of 80 GB? What does
# full recompute (keep only a block's input, make the rest again in backward) save, and what can it not save?

# %%
widgets.memory_explorer(model=["llama-70b"])

# %% [markdown] lang="en"
# ## 3. Bytes on each axis
#
# The chapters before derived what each axis sends. `traffic` has it in one place. Is it true? The ledger books what is
# sent. Here are four layouts of the small GPT on four ranks, in float64:

# %%
F64 = cost.Formats(8, 8, 16, 8)
layouts = [
    Layout(Mesh(dp=4)),
    Layout(Mesh(dp=2, tp=2), microbatches=2),
    Layout(Mesh(pp=2, tp=2), microbatches=4, sequence_parallel=True),
    Layout(Mesh(dp=2, pp=2), microbatches=2, zero=3),
]


def sent():
    """On a rank: bytes by axis, a line for each layout."""
    found = []
    for layout in layouts:
        torch.manual_seed(0)
        model = parallelize(minipar.gpt(config).double(), layout.mesh, **layout.options())
        tokens, targets = next(corpus.batches(steps=1, rows=8, context=config.context))
        model.step(tokens, targets)  # in the first step, shapes travel ahead
        with ledger() as book:
            model.step(tokens, targets)
        found.append({axis: book.bytes(axis) for axis in ("dp", "tp", "pp")})
    return found


# %%
booked = world.run(sent)[0]
for layout, seen in zip(layouts, booked, strict=True):
    computed = cost.traffic(small, layout, 8, config.context, F64)[0]
    for axis in [axis for axis in seen if seen[axis] > 99]:
        print(f"{layout.mesh!s:18} {axis}: {seen[axis]:>10,} sent, {computed[axis]:>12,.0f} computed")
    assert all(abs(seen[axis] - computed[axis]) < 4096 + 0.002 * computed[axis] for axis in seen)

# %% [markdown] lang="en"
# What is left, at most 24 bytes, are the sums of loss and count. (`Formats(8, 8, 16, 8)` are the bytes of a number in
# float64: of weights, gradients, the optimizer's states, activations.)
#
# Which axis of a large run sends most? `llama-405b`, a rank in the middle of the pipe, 16 microbatches:

# %%
layout = Layout(Mesh(dp=128, pp=16, tp=8), 16, zero=1, sequence_parallel=True)
middle = cost.traffic(llama, layout, 2048, 8192)[8]
for axis, size in middle.items():
    print(f"{axis}: {size / 1e9:7.1f} GB a step")
assert middle["tp"] > 10 * middle["dp"] > 10 * middle["pp"] / 2

# %% [markdown] lang="en"
# The tensor axis sends by far the most, and computation waits for it. That is why it is the innermost axis, and stays
# inside a [node](../docs/glossary.md#node).
#
# ## 4. Seconds on the wire: alpha and beta
#
# A message of $n$ bytes takes $\alpha + n\beta$ seconds (Hockney 1994): $\alpha$ is what a message costs however small,
# $\beta$ what a byte costs. Two numbers, and a straight line. Let us measure it here: all-reduces of several sizes on
# two ranks, the fastest of 15 each (what else runs on the machine can only slow them down).
#
# **Predict:** up to what size is an all-reduce on your machine as expensive as an empty one, within a factor of two?

# %%
prediction = None  # bytes


def timed(sizes, calls=15):
    """Seconds of the fastest all-reduce of each size, in bytes."""
    axis, found = everyone(), []
    for size in sizes:
        x, took = torch.zeros(max(size // 4, 1)), []
        for _ in range(calls):
            start = time.perf_counter()
            all_reduce(x, axis)
            took.append(time.perf_counter() - start)
        found.append(min(took))
    return found


sizes = [4**k for k in range(1, 13)]  # 4 bytes to 16 MiB
with World(2) as two:
    seconds = two.run(timed, sizes)[0]

# %% [markdown] lang="en"
# A line through these points: the smallest sizes give $\alpha$, the largest give $\beta$. In between it is their sum.
# (A fit by least squares would listen to the largest sizes only.)

# %%
alpha = sum(seconds[:3]) / 3
beta = (seconds[-1] - alpha) / sizes[-1]
print(f"alpha {1e6 * alpha:.0f} µs, 1/beta {1 / beta / 1e9:.2f} GB/s, both cost the same at {alpha / beta:,.0f} bytes")
drawing, (panel,) = viz.figure(7.0, 3.2)
panel.loglog(sizes, [1e3 * s for s in seconds], "o", color=viz.PALETTE[5], label="measured on your machine")
panel.loglog(sizes, [1e3 * (alpha + n * beta) for n in sizes], "-", color=viz.PALETTE[6], label="alpha + n beta")
panel.axvline(alpha / beta, color=viz.LINE, lw=0.8, ls=":")
panel.set(xlabel="bytes", ylabel="ms", title="an all-reduce on two ranks")
panel.legend(frameon=False)
alt = "All-reduce time over size, both in logarithms: about flat for small sizes, then rising with the size."
viz.show(drawing, alt)

# %% [markdown] lang="en"
# The dotted line is at $n = \alpha/\beta$, where both parts cost the same. Left of it, fewer and larger messages are
# all that helps; that is why gradients travel in buckets. On your machine "the wire" is memory and the network code of
# the operating system, and the ranks' own cores do the work. On a cluster the numbers differ by axis: H100s in a node
# have 450 GB/s to each other, and about 50 GB/s to other nodes. `Cluster.link` says which one an axis gets:

# %%
h100 = CLUSTERS["h100"].of(16384)
mesh = Mesh(dp=128, pp=16, tp=8)
for axis in ("tp", "pp", "dp"):
    link = h100.link(mesh, axis)
    print(f"{axis}: neighbors are {mesh.step(axis):3} ranks apart, {link.bandwidth / 1e9:.0f} GB/s a rank")
assert h100.link(mesh, "tp") == h100.inside and h100.link(mesh, "dp") == h100.between

# %% [markdown] lang="en"
# ## 5. Seconds on a device: the roofline
#
# A **kernel** is one function that runs on the device, a matrix product for instance. It reads its inputs, computes,
# and writes its outputs. It takes as long as its FLOPs at the device's speed, or its bytes at the memory's, whichever
# is longer (Williams et al. 2009). An H100 does 989 TFLOP/s and moves 3.35 TB/s: a kernel with less than 295 FLOPs a
# byte waits for memory. Large matrix products have thousands. Norms, activation functions and residuals have almost
# none.
#
# **Question.** In 2021 attention was not fused: its scores were written to memory, read for the softmax, written
# again, and so on. What share of a block's forward did an A100 spend outside of matrix products, for the 1.7B model?

# %%
prediction = None  # a share


def split(model, cluster, kernels, rows, sequence):
    """Seconds of a block's forward: in products with weights, in attention, in all else."""
    parts = dict.fromkeys(("weights", "attention", "other kernels"), 0.0)
    for kernel in block_kernels(model, Layout(Mesh()), rows, sequence, kernels):
        name = "other kernels" if not kernel.flops else "weights" if kernel.again[1] else "attention"
        parts[name] += kernel.seconds(cluster, kernels)
    return parts


megatron, a100 = find_model("megatron-1.7b"), CLUSTERS["a100"]
eras = {"not fused (2021)": cost.MEGATRON_2021, "fused": cost.TODAY}
bars = {name: split(megatron, a100, kernels, 16, 2048) for name, kernels in eras.items()}
parts = {part: [1e3 * bar[part] for bar in bars.values()] for part in next(iter(bars.values()))}
viz.show(viz.draw_bars(list(bars), parts, "ms", "one block of the 1.7B model forward, 16 rows, A100, computed"))

# %% [markdown] lang="en"
# 31 percent, and attention's own products, thin as they are, wait for memory as well. That is what fused attention
# changed (Dao et al. 2022): not the FLOPs, but the bytes.
#
# One number in these seconds is an assumption. No kernel reaches the data sheet. The best matrix products that people
# have measured reach 0.87 of it on an A100, 0.80 on an H100 and 0.78 on a B200
# ([Bekman, Machine Learning Engineering](https://github.com/stas00/ml-engineering/tree/master/compute/accelerator),
# "MAMF"), and links 0.84 ([an H100 pair, 380 of 450 GB/s](https://github.com/NVIDIA/nccl/issues/1264)). `Kernels` takes
# one round number, 0.8, for products, memory and links on all devices. Nothing in this chapter is fitted to the runs
# that it is compared with.
#
# ## 6. The pipeline's bubble, to four decimals
#
# With free communication the idle share of 1F1B is $(p-1)/(m+p-1)$. Real stages send, and the closed form then misses.
# Simulation does not: it runs the very lists of actions that the executor runs, with a cost for each.
#
# Qi et al. 2023 measured forward, the two halves of backward, and communication for two models on 8 stages (their
# Table 9), and printed the bubble rates that follow (Table 5), for 1F1B and for two schedules that split the backward.
# Their rate is the idle share of the stage that is at work for the longest time: `of="stage"`.

# %%
TABLE = [  # p, m, forward, input gradient, weight gradient, communication (ms); 1F1B, ZB-H1, ZB-H2
    (8, 24, 18.522, 18.086, 9.337, 0.601, 0.2431, 0.1585, 0.1083),
    (8, 32, 18.513, 18.086, 9.331, 0.626, 0.1985, 0.1242, 0.0837),
    (8, 64, 18.546, 18.097, 9.321, 0.762, 0.1240, 0.0674, 0.0444),
    (8, 24, 29.718, 29.444, 19.927, 0.527, 0.2347, 0.1323, 0.0698),
    (8, 32, 29.802, 29.428, 19.530, 0.577, 0.1898, 0.1045, 0.0559),
    (8, 64, 29.935, 29.621, 19.388, 0.535, 0.1091, 0.0554, 0.0294),
]
print("  m   1F1B: ours, printed     ZB-H1              ZB-H2")
for p, m, f, i, w, c, *printed in TABLE:
    schedules = one_f_one_b, zero_bubble_h1, zero_bubble_h2
    rates = [round(bubble(simulate(s(p, m), Costs(f, i, w, c)), of="stage"), 4) for s in schedules]
    print(f"{m:3}   " + "     ".join(f"{ours:.4f}, {theirs:.4f}" for ours, theirs in zip(rates, printed, strict=True)))
    assert rates == printed

# %% [markdown] lang="en"
# All 18 agree. The closed form for the first row, $7/31 = 0.2258$, is off by 1.7 points: what it leaves out is the
# communication, crossed back and forth.
#
# Try it, with all three costs equal and messages free: which schedule has the smallest bubble, and what does it pay in
# memory? ("Interleaved" gives each rank several smaller stages, its *chunks*; ZB splits the backward in two.)

# %%
widgets.schedule_explorer(ranks=[4], microbatches=[8, 4])

# %% [markdown] lang="en"
# ## 7. A step on a cluster that you do not have
#
# All the pieces are there. `predict` prices the kernels of a block by the [roofline](../docs/glossary.md#roofline), the
# collectives by alpha and beta, simulates the schedule with these costs, and adds what gradients cost that nothing
# hides.

# %%
run = published.RUNS[3]
megatron = minipar.predict(
    find_model(run.model), run.layout, CLUSTERS["a100"].of(run.gpus), run.batch, run.sequence, kernels=run.kernels
)
print(megatron)
predicted = megatron.flops_per_device(recompute=True)
print(f"TFLOP/s with recompute: {run.flops / 1e12:.0f} printed, {predicted / 1e12:.0f} predicted")

# %% [markdown] lang="en"
# This run was at 36 percent MFU in section 1. The prediction says 42: it is too fast by 18 percent.
#
# **Question.** For eight published runs, between 32 and 16,384 GPUs, will the prediction be too fast or too slow? By
# how much? Write down what you think that it leaves out.

# %%
prediction = None  # (fast or slow, percent)


def priced(run, reach, causal=True):
    """FLOP/s of a device as predicted, by the convention of the paper. reach: of the data sheet's numbers."""
    kernels, cluster = replace(run.kernels, reach=reach), CLUSTERS[run.cluster].of(run.gpus)
    got = minipar.predict(find_model(run.model), run.layout, cluster, run.batch, run.sequence, kernels=kernels)
    return got.flops_per_device(run.recomputed, causal=causal and not run.recomputed)


names = [f"{run.model.split('-')[1]}\n{run.gpus:,}\n{run.sequence // 1024}k" for run in published.RUNS]
low, middle, high = ([priced(run, reach) / 1e12 for run in published.RUNS] for reach in (0.7, 0.8, 0.9))
errors = [ours / (run.flops / 1e12) - 1 for ours, run in zip(middle, published.RUNS, strict=True)]
for run, ours, error in zip(published.RUNS, middle, errors, strict=True):
    size = f"{run.model:14} {run.gpus:6,} GPUs, {run.sequence:7,} tokens a row"
    print(f"{size}: {ours:4.0f} TFLOP/s predicted, {run.flops / 1e12:4.0f} published ({error:+.0%})")
    if not run.recomputed:
        print(f"{'':46} {priced(run, 0.8, causal=False) / 1e12:4.0f} with all of attention's FLOPs counted")
print(f"median {sorted(errors)[len(errors) // 2]:+.0%}")

# %%
drawing, (panel,) = viz.figure(8.0, 3.6)
places = range(len(names))
panel.vlines(places, low, high, color=viz.PALETTE[0], lw=7, label="predicted, reach 0.7 to 0.9")
panel.plot(places, middle, "_", color=viz.INK, ms=14, mew=2, label="predicted, 0.8")
panel.plot(places, [run.flops / 1e12 for run in published.RUNS], "D", color=viz.PALETTE[6], label="published")
panel.set_xticks(list(places), names, fontsize=8)
panel.set(ylim=(0, None), ylabel="TFLOP/s a device", xlabel="parameters, GPUs, tokens of a row")
panel.legend(frameon=False, loc="upper left", fontsize=8)
pairs = zip(middle, published.RUNS, strict=True)
told = "; ".join(f"{r.model} on {r.gpus:,}: {ours:.0f} and {r.flops / 1e12:.0f}" for ours, r in pairs)
viz.show(drawing, f"Predicted and published speed of eight runs in TFLOP/s a device: {told}. Predictions are higher.")

# %% [markdown] lang="en"
# Every run was slower than predicted, by 8 to 29 percent. That is what a bound looks like that good software comes
# near. The causes, as far as they can be named:
#
# - **Not every product is large.** 0.8 is for the best shapes. With eight tensor ranks, matrices are cut thin, and a
#   last wave of tiles leaves part of the device idle. The Megatron runs of 2021 lie close to 0.7.
# - **What the papers leave open.** Rows of a microbatch and chunks of the interleaved schedule are not in the tables;
#   we chose common ones. Narayanan et al. also send less between stages than we charge (scatter and gather).
# - **The collectives take compute units** from the products that they overlap with. The prediction lets both run at
#   full speed.
# - **Long rows.** Llama's context ranks gather keys and values before they compute; ours go around a ring behind the
#   computation. That run, with 131,072 tokens, is the farthest off.
# - **Which FLOPs.** Counted in full, attention's products would make the Llama run with 131,072 tokens 81 percent too
#   fast, and the two with 8,192 only 26 and 21. Counted without what the causal mask hides, all three agree within 13
#   points. The paper does not say which it counts; this says it was most likely the latter.
#
# And on your own machine? There the numbers need no data sheet. `minipar.calibrate` measures pieces of a step for a
# minute, and predicts whole steps of other layouts. On two cores, 26 layouts on 2 to 8 ranks were predicted with a
# median error of 7 percent: [the table](../benchmarks/README.md#predicted-step-times).
#
# So: trust such a prediction to rank layouts, and to about 30 percent in time. The next section lets a planner do the
# ranking.
#
# The whole of it is short enough to read:

# %%
viz.show_source(block_kernels, Kernel)

# %% [markdown] lang="en"
# ## 8. Argue with the authors
#
# `plan` prices every layout that fits and ranks them. Where does it put the layout that the Llama team used for 16,384
# GPUs?
#
# **Question.** They took tp=8, pp=16, dp=128 and no context ranks, with 16 rows for each data rank. What would you
# change?

# %%
prediction = None  # what, and why

# %%
run = published.RUNS[6]
found = minipar.plan(llama, h100, run.batch, run.sequence)
print(found.table(5))
theirs = minipar.predict(llama, run.layout, h100, run.batch, run.sequence)
slower = theirs.seconds / found.best.seconds - 1
print(f"\ntheirs, with 4 chunks: {theirs.seconds:.2f} s, {slower:.0%} more than the best")
print(f"in its pipeline {theirs.parts['pipeline']:.2f} s, and {found.best.parts['pipeline']:.2f} s in the best one's")
assert run.layout not in [p.layout for p in found.ranked[:10]]

# %% [markdown] lang="en"
# Theirs is not among the first ten (the cell asserts it), and the numbers say why. With 16 rows for 16 stages, the pipe
# is filling or draining for a good part of the step. The planner gives four ranks to the context axis. They share a
# row, so there are fewer data ranks with more rows each: 64 microbatches in place of 16, and the pipe is full most of
# the time.
#
# Are the authors wrong? The planner believes that the context axis costs nothing, since its messages hide behind
# attention; that thinner products are as fast as thick ones; and it knows nothing of failures, of code that has to be
# written and debugged first, or of the next phase of the run, for which a layout had to be ready. A planner finds
# candidates, and the reasons to look at. What its neighbors lack, it says itself:

# %%
print(found.why())

# %% [markdown] lang="en"
# The cost of the run, at 2.0 for a GPU-hour and for the devices' own power:

# %%


for name, what in (("the best", found.best), ("theirs", theirs)):
    print(f"{name}: {bill(what, tokens=15.6e12, price=2.0)}")

# %% [markdown] lang="en"
# The makers of Llama 3.1 405B report 30.84 million GPU-hours
# ([model card](https://github.com/meta-llama/llama-models/blob/main/models/llama3_1/MODEL_CARD.md)). A prediction
# without failures, restarts, evaluation and the first phases with fewer GPUs has to be below that.
#
# ## Three questions to end with
#
# 1. A paper reports 55 percent of peak with full recompute, counting all FLOPs. What is its MFU, about?
# 2. Your step on 64 GPUs spends 20 percent on the tensor axis. Someone proposes to double the network's bandwidth
#    between nodes. How much faster does the step become?
# 3. Why does a schedule with a bubble of zero not make the step as fast as its FLOPs?
#
# <details><summary>Answers</summary>
#
# 1. Three quarters of it, about 41 percent: the model needs 6 of the 8 FLOPs a weight and token.
# 2. Not at all, if the tensor ranks are in one node: their bytes never cross the slow network.
# 3. Kernels that wait for memory, the tensor axis, gradients that nothing hides, and the optimizer are all still there.
#
# </details>
#
# **Exercises.** Eight graded tasks are in [the exercise notebook](../exercises/04b_cost_models.ipynb): fit a link, the
# idle time of a schedule, the memory of a rank, the bytes of an axis, the seconds of a step, a data sheet read right,
# and a search for the best layout. A terminal grades them: `python -m minipar grade exercises/04b_cost_models.ipynb`.
#
# ## References
#
# - Dao et al. 2022, *FlashAttention*, [arXiv 2205.14135](https://arxiv.org/abs/2205.14135)
# - Hockney 1994, *The communication challenge for MPP: Intel Paragon and Meiko CS-2*, Parallel Computing 20(3)
# - Korthikanti et al. 2022, *Reducing Activation Recomputation in Large Transformer Models*,
#   [arXiv 2205.05198](https://arxiv.org/abs/2205.05198)
# - Llama Team 2024, *The Llama 3 Herd of Models*, [arXiv 2407.21783](https://arxiv.org/abs/2407.21783)
# - Narayanan et al. 2021, *Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM*,
#   [arXiv 2104.04473](https://arxiv.org/abs/2104.04473)
# - Qi et al. 2023, *Zero Bubble Pipeline Parallelism*, [arXiv 2401.10241](https://arxiv.org/abs/2401.10241)
# - Rajbhandari et al. 2020, *ZeRO*, [arXiv 1910.02054](https://arxiv.org/abs/1910.02054)
# - Williams, Waterman and Patterson 2009, *Roofline*, Communications of the ACM 52(4)
#
# **Next:** [which model, which layout, and how](04c_faq.ipynb). There you argue with the planner about a run of your
# own.

# %%
world.close()
