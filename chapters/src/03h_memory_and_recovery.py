# %% [markdown] lang="en"
# # Memory and recovery
#
# A training run needs two things beside a layout. Its ranks must not run out of memory, and the run must outlive the
# machines that it runs on. At the end of this chapter you can
#
# - say what a forward pass leaves in memory for backward, count it, and trade most of it for one more forward;
# - name what is lost in [bfloat16](../docs/glossary.md#bfloat16) and in float16, with numbers, and train in both;
# - clip gradients by a norm that no single rank knows;
# - drop the same elements on every layout;
# - save on 8 ranks and go on with 4, or with one, bit for bit;
# - kill a rank with `kill -9` and get the losses of a run that nothing happened to;
# - compute how often to save, for your machine and for 16,384 GPUs.
#
# **Time:** about three hours. **You need:** [Data parallelism](03a_data_parallel.ipynb) and
# [tensor parallelism](03b_tensor_parallel.ipynb); of [pipelines](03c_pipeline_parallel.ipynb) that a model is cut into
# stages. The chapter belongs to section 3.2 of the document that this course follows and tests,
# 《大规模语言模型从理论到实践 混合并行》. That section lists the steps of each kind of parallelism for nodes that have
# memory enough, compute exactly, and never fail. This chapter is about the rest.
#
# **How to read it.** As before: write your prediction into the cell before you run it. Eight times you are asked to
# write a few lines yourself; one answer follows in a cell that is folded.
#
# ## Three questions on the chapters before
#
# 1. Seven billion parameters are trained with Adam in mixed precision. How many bytes does a replica keep, and which
#    part of them does stage 1 of ZeRO share out?
# 2. On `Mesh(dp=2, pp=2, tp=2)`, how many of the eight ranks hold the first block's LayerNorm weight?
# 3. A pipeline of four stages runs eight microbatches in the order 1F1B. For how many of them does the first stage
#    keep activations at a time?
#
# <details><summary>Answers</summary>
#
# 1. 16 bytes a parameter, 112 GB. Stage 1 shares out the optimizer's 12, so 84 GB.
# 2. Four. The first stage has four ranks, and tensor ranks hold copies of what is not cut.
# 3. Four: as many as there are stages from it to the end.
#
# </details>

# %%
import contextlib
import io
import itertools
import json
import math
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

# %%
import psutil
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint as keep_only_the_input
from torch.utils.flop_counter import FlopCounterMode

import minipar
from minipar import Config, Loader, Mesh, RankError, World, checkpoint, corpus, here, ledger, parallelize, viz
from minipar.collectives import all_reduce, everyone
from minipar.precision import LossScale
from minipar.randomness import Masks
from minipar.recompute import DEAR, keep_less
from minipar.train import Parallel
from minipar.widgets import explore

assert 7_000_000_000 * 16 == 112e9 and 7_000_000_000 * 12 == 84e9  # the answers above
assert len(Mesh(dp=2, pp=2, tp=2).plane(("dp", "tp"), 0)) == 4 == min(8, 4 - 0)
world, eight, single = World(4), World(8), World(1)

# %% [markdown] lang="en"
# **Part one: memory**
#
# ## 1. What forward leaves behind
#
# Weights, gradients and optimizer state are there all the time. A fourth part comes and goes in every step. To compute
# gradients, backward needs results of forward: the gradient of $W x$ with respect to $W$ contains $x$. So PyTorch
# keeps $x$ from forward until backward has used it. All that is kept in this way is called **activations**.
#
# How much is it? We take one block of our GPT, and an input of 8 rows of 32 tokens of width 128. In float32 that has
# 131,072 bytes. Call its size one **unit**.


# %%
def fresh(dtype=torch.float64, **changes):
    torch.manual_seed(0)  # the same seed, so the same weights, in every process
    return minipar.gpt(Config(**changes)).to(dtype)


def mean_loss(model, tokens, targets):
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


def distance(got, wanted):
    """The largest difference, as a share of the largest number."""
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


block = fresh(torch.float32).blocks[0]
x = torch.randn(8, 32, 128, generator=torch.Generator().manual_seed(0))
unit = x.nbytes
assert unit == 4 * 8 * 32 * 128 == 131_072
tokens, targets = next(corpus.batches(steps=1, rows=8, context=32))

# %% [markdown] lang="en"
# PyTorch lets you watch. Inside `with torch.autograd.graph.saved_tensors_hooks(pack, unpack)` it calls `pack` with each
# tensor that it keeps for backward, and `unpack` when it takes it out again.
#
# **Your turn.** Write `my_kept`. It runs `run()` and returns the bytes that it leaves. There are two traps. The same
# tensor may be kept by several operations, and is in memory once. And weights are kept, too, but they are there anyway.
# `tensor.untyped_storage()` is the memory behind a tensor, `.data_ptr()` of it is where it begins, `.nbytes()` its
# size.
#
# **Question.** How many units does one block leave?

# %%
prediction = None  # units


def my_kept(run, weights):
    sizes = []

    def pack(tensor):
        return tensor  # your lines before it

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()  # as long as it lives, so does what it needs for backward
    del output
    return sum(sizes)


# %% jupyter={"source_hidden": true}
# One answer: by where the memory begins
def kept(run, weights):
    """Bytes of each piece of memory that `run()` leaves for backward, beside the weights."""
    there = {w.untyped_storage().data_ptr() for w in weights}
    found = {}

    def pack(tensor):
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in there:
            found[memory.data_ptr()] = memory.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    del output
    return list(found.values())


# %%
x.requires_grad_()
pieces = kept(lambda: block(x), block.parameters())
units = sorted((size / unit for size in pieces), reverse=True)
large = [round(u) for u in units if u >= 1]
print(f"you wrote: {prediction} - {len(pieces)} pieces, in units:", *(f"{u:.3g}" for u in units))
yours = my_kept(lambda: block(x), block.parameters()) / unit
print(f"large ones together: {sum(large)} units; all: {sum(units):.2f}; by your function: {yours:.2f}")
assert sum(large) == 16 and sum(units) < 16.2

# %% [markdown] lang="en"
# Sixteen times its input. Operation by operation:
#
# | in the block | it keeps | units |
# |---|---|---|
# | first norm | its input | 1 |
# | q, k, v | the norm's output, once for all three | 1 |
# | attention | q, k and v, and its own output | 4 |
# | output matrix | its input is attention's output: there already | 0 |
# | second norm | its input | 1 |
# | up | the norm's output | 1 |
# | GELU | its input, four times as wide | 4 |
# | down | GELU's output | 4 |
#
# The small pieces are a mean and a scale for each token and norm, and one number for each token and head of attention.
#
# A published count of the same block is $34\,sbh + 5\,as^2b$ bytes (Korthikanti et al. 2022), with $b$ rows of $s$
# tokens, width $h$ and $a$ heads. It is the same sixteen: they have 2 bytes each, that is 32. Two more are the masks of
# two [dropouts](../docs/glossary.md#dropout), a byte for each element. The term with $s^2$ comes from attention that is
# written out: the matrix of every token against every token, for each head. **Fused attention** computes it piece by
# piece and never has it in memory (Dao et al. 2022). PyTorch has both. How many units do they leave, if rows are four
# times as long?

# %%
prediction = None  # units at 128 tokens, (fused, written out)


def units_of(length, backend):
    x = torch.randn(8, length, 128, requires_grad=True)
    with nn.attention.sdpa_kernel(backend):
        return sum(kept(lambda: block(x), block.parameters())) / x.nbytes


FUSED, WRITTEN_OUT = nn.attention.SDPBackend.FLASH_ATTENTION, nn.attention.SDPBackend.MATH
grows = {length: [units_of(length, backend) for backend in (FUSED, WRITTEN_OUT)] for length in (32, 128)}
print("you wrote:", prediction)
for length, (fused, written_out) in grows.items():
    print(f"{length:>3} tokens: fused {fused:.1f} units, written out {written_out:.1f}")
assert abs(grows[32][0] - grows[128][0]) < 0.01 and grows[128][1] > grows[32][1] + 5

# %% [markdown] lang="en"
# Fused attention leaves the same number of units for each token, however long the row. Written out, the units grow
# with the row, so the bytes grow with its square.
#
# ## 2. Keep the input, compute the rest again
#
# All sixteen units follow from one: the block's input. So forget everything else, and when backward comes to the block,
# run its forward once more. This is **recomputation**, or activation checkpointing (Chen et al. 2016). In this chapter
# a *[checkpoint](../docs/glossary.md#checkpoint)* is a file; we say [recompute](../docs/glossary.md#recompute).
#
# The price is work. Count a forward as 1. Backward is 2, since each matrix product needs two more, one for the
# gradient of its input and one for that of its weight.
#
# **Your turn.** Write the backward of `MyAgain`. You have the block, its input `x`, and the gradient of its output.
# Inside an `autograd.Function` nothing is recorded; `with torch.enable_grad():` switches that on. `y.backward(g)`
# starts from an output `y` whose gradient is `g`. Return the gradient of `x`.
#
# **Question.** How many forwards is a step now, 3 before? How many units are kept? And how far off are gradients?

# %%
prediction = None  # (forwards, units, distance)


class MyAgain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, block, x):
        ctx.block = block
        ctx.save_for_backward(x)
        return block(x)

    @staticmethod
    def backward(ctx, gradient):
        # ctx.block is the block, ctx.saved_tensors[0] its input
        return None, gradient  # your lines in place of this one; None is for the block


# %% jupyter={"source_hidden": true}
# One answer: forward once more, this time recorded
class Again(MyAgain):
    @staticmethod
    def backward(ctx, gradient):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.block(x)
        y.backward(gradient)  # adds to the gradients of the block's weights
        return None, x.grad


# %%
def gradients_of(run):
    """Of the block's weights and of x, as one vector."""
    block.zero_grad()
    x.grad = None
    run().square().sum().backward()
    found = [torch.zeros_like(t) if t.grad is None else t.grad for t in (x, *block.parameters())]
    return torch.cat([g.flatten() for g in found])


def work_of(run):
    """Operations of matrix products, forward and backward. (On a CPU the counter leaves attention out.)"""
    with FlopCounterMode(display=False) as counter:
        gradients_of(run)
    return counter.get_total_flops()


with FlopCounterMode(display=False) as counter:
    block(x)
forward = counter.get_total_flops()
ways = {"all is kept": block, "by hand": lambda x: Again.apply(block, x)}
ways |= {"PyTorch's": lambda x: keep_only_the_input(block, x, use_reentrant=False)}
ways |= {"yours": lambda x: MyAgain.apply(block, x)}
wanted = gradients_of(lambda: block(x))

# %%
print("you wrote:", prediction)
measured = {}
for name, way in ways.items():
    same = torch.equal(gradients_of(lambda way=way: way(x)), wanted)
    here_kept = sum(kept(lambda way=way: way(x), block.parameters())) / unit
    measured[name] = work_of(lambda way=way: way(x))
    print(f"{name:<12} {measured[name] / forward:.2f} forwards, {here_kept:>5.2f} units, same gradients: {same}")
    assert same or name == "yours"
assert measured["by hand"] == measured["all is kept"] + forward > measured["PyTorch's"]

# %% [markdown] lang="en"
# The gradients are equal to the last bit: the same operations ran on the same numbers. A step costs one forward more.
# PyTorch's own function does with less. It stops as soon as it has all that backward wants. The last product of the
# block, `down`, has 4 of the 12 units of matrix work, and nobody needs its result a second time.
#
# ### Selective
#
# Between all and nothing there is a better trade. Matrix products are dear to compute. Norms, GELU, sums and dropout
# are cheap, and their results take as much memory. So keep what is dear, and compute again what is cheap. Korthikanti
# et al. called their form of it *selective*.
#
# **The package's version** wraps a block's forward. `DEAR` is a list of operations whose results stay.

# %%
viz.show_source(keep_less, minipar.recompute._policy)
print(len(DEAR), "operations are dear, among them", *sorted(str(op) for op in DEAR)[-2:])

# %% [markdown] lang="en"
# Two things are better than in ours. `remember` brings back the random numbers, so that a dropout drops the same
# elements the second time. And it works where a block's forward talks to other ranks: all of them compute again in the
# same order, so their sends and receives still meet.
#
# The hooks of section 1 do not see what selective keeps, so we measure otherwise. The class below is told of each
# operation that PyTorch runs, and adds up the memory that was made since and has not been freed.


# %%
class Alive(TorchDispatchMode):
    """After each operation: bytes of what was made inside of `with` and is still there."""

    def __init__(self, known):
        super().__init__()
        self.known = {StorageWeakRef(t.untyped_storage()) for t in known}
        self.made, self.curve = {}, []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                memory = tensor.untyped_storage()
                self.made[StorageWeakRef(memory)] = memory.nbytes()
        self.curve.append(self.bytes())
        return result

    def bytes(self):
        self.made = {ref: size for ref, size in self.made.items() if not ref.expired()}
        return sum(size for ref, size in self.made.items() if ref not in self.known)


# %% [markdown] lang="en"
# The four blocks of our GPT, one after the other, forward and backward. **Predict:** sketch the memory over time for
# the three ways. How many units are there at the highest point? (A product also needs room for what it computes now.)

# %%
prediction = None  # {"none": ..., "selective": ..., "full": ...}


def memory_of(how):
    blocks = fresh(torch.float32).blocks
    for one in blocks:
        if how != "none":
            keep_less(one, how, contextlib.nullcontext)
    for p in blocks.parameters():
        p.grad = torch.zeros_like(p)  # there before we look
    start, known = x.detach().requires_grad_(), [*blocks.parameters(), *(p.grad for p in blocks.parameters())]
    with Alive([x, *known]) as alive:
        y = start
        for one in blocks:
            y = one(y)
        turn, between = len(alive.curve), alive.bytes()
        y.backward(torch.ones_like(y))
    return [size / unit for size in alive.curve], turn, between / unit / len(blocks)


curves = {how: memory_of(how) for how in minipar.recompute.HOW}
highest = {how: max(curve) for how, (curve, *_) in curves.items()}
print("you wrote:", prediction, "- measured:", {how: round(top, 1) for how, top in highest.items()})
assert highest["none"] > highest["selective"] > highest["full"]

# %%
drawing, (panel,) = viz.figure(7.5, 3.2)
for (how, (curve, turn, _)), color, marker in zip(curves.items(), viz.PALETTE[4:], "osv", strict=False):
    panel.plot(curve, color=color, label=f"{how}: at most {highest[how]:.0f} units")
    panel.plot(turn - 1, curve[turn - 1], marker, color=color, ms=8, mec=viz.INK)
panel.set(xlabel="operations so far", ylabel="units in memory", ylim=(0, 1.25 * highest["none"]))
panel.set_title("Activations of four blocks (marks: forward ends, backward begins)", fontsize=10)
panel.legend(frameon=False, fontsize=9, loc="upper right")
told = ", ".join(f"{how} {top:.0f}" for how, top in highest.items())
alt = f"Memory over the operations of a forward and backward. All rise in forward and fall after it; units: {told}."
viz.show(drawing, alt)

# %%
after = {how: round(between, 1) for how, (*_, between) in curves.items()}
print("kept for each block when forward ends, in units:", after)
assert after == {"none": 16.1, "selective": 11.1, "full": 1}

selective = fresh(torch.float32).blocks[0]
keep_less(selective, "selective", contextlib.nullcontext)
with FlopCounterMode(display=False) as counter:
    selective(x).sum().backward()
work = counter.get_total_flops() / forward
print(f"selective: {work:.2f} forwards of matrix products")
assert work == 3

# %% [markdown] lang="en"
# Without recomputation a block leaves its sixteen units. (The input of the first was there before, but the output of
# the last is new.) `full` climbs by one unit a block. In backward it needs one whole block at a time: the teeth of the
# curve. `selective` lies between, and repeats no matrix product. For each block it keeps q, k, v, attention's output,
# and what comes out of the other three matrices: with the input, eleven units.
#
# ### On ranks
#
# Nothing changes in the result, on any layout. But a forward that is run again also *sends* again what it sent.
#
# **Predict:** with `tp=2` a step has some number of all-reduces along that axis. Does `recompute="full"` add none, one
# a block, or two a block (as many as forward has)?

# %%
prediction = None  # all-reduces that "full" adds for each of the 4 blocks


def whole_gradient(model):
    return torch.cat([g.flatten() for g in model.full_gradients().values()])


def recomputed(how):
    model = parallelize(fresh(), Mesh(dp=2, tp=2), microbatches=2, recompute=how)
    with ledger() as book:
        model.step(tokens, targets)
    return whole_gradient(model), book.calls("tp") / model.microbatches


model = fresh()
mean_loss(model, tokens, targets).backward()
alone = torch.cat([p.grad.flatten() for p in model.parameters()])
calls = {}
for how in minipar.recompute.HOW:
    found, calls[how] = world.run(recomputed, how)[0]
    print(f"{how:<9} distance to one process {distance(found, alone):.0e}, calls along tp: {calls[how]:g}")
    assert distance(found, alone) < 1e-12
print("you wrote:", prediction, "- added for each block:", (calls["full"] - calls["none"]) / 4)

# %% [markdown] lang="en"
# One a block, not two, thanks to the early stop: the second all-reduce of forward stands at the very end of the block,
# and nobody waits for its result in backward. `selective` sends as much: it keeps products, not what is summed over
# ranks.
#
# ### Large models
#
# With $t$ tensor ranks and sequence parallelism (chapter 3b), a rank keeps a $t$-th of each activation. Per layer, in
# 16 bits, with attention written out, Korthikanti et al. (2022, Table 2) have
#
# | | bytes of a layer |
# |---|---|
# | tensor parallel | $sbh\,(10 + 24/t + 5as/(ht))$ |
# | and sequence parallel | $sbh/t\,(34 + 5as/h)$ |
# | and attention computed again (their selective) | $34\,sbh/t$ |
# | full recomputation | $2\,sbh$ |
#
# The first stage of a pipeline in 1F1B keeps as many microbatches as there are stages, so altogether what all $l$
# layers keep for one: $l$ times a row of the table. **Before you move it:** which of the four fit a GPU of 80 GB at
# 175 billion parameters and rows of 2,048 tokens? And which at 8,192?

# %%
prediction = None  # for instance {2048: ["full"], 8192: []}

GPTS = {"22B": (64, 6144, 48), "175B": (96, 12288, 96), "530B": (128, 20480, 105), "1T": (160, 25600, 128)}


def layer_bytes(model, s, t=8, b=1):
    a, h, _ = GPTS[model]
    size, square = s * b * h, 5 * a * s / h
    return {
        "tensor parallel": size * (10 + 24 / t + square / t),
        "+ sequence parallel": size / t * (34 + square),
        "+ selective": 34 * size / t,
        "full": 2 * size,
    }


def draw_activations(model, tokens):
    found = {how: GPTS[model][2] * size / 1e9 for how, size in layer_bytes(model, tokens).items()}
    title = f"{model}, rows of {tokens:,} tokens, 8 tensor ranks: activations of the first stage"
    drawing = viz.draw_bars(list(found), {"activations": list(found.values())}, "GB on each rank", title)
    drawing.axes[0].axvline(80, color=viz.INK, ls="--", lw=1)
    drawing.axes[0].set_xlim(0, 1.14 * max(80, *found.values()))
    return drawing


# %%
explore(draw_activations, model=["175B", "22B", "530B", "1T"], tokens=[2048, 8192, 32768])

# %%
fits = {s: [how for how, size in layer_bytes("175B", s).items() if 96 * size < 80e9] for s in (2048, 8192)}
print("you wrote:", prediction)
for s, hows in fits.items():
    print(f"{s:>5} tokens, below 80 GB:", ", ".join(hows))
saved = {m: 1 - 34 / (34 + 5 * a * 2048 / h) for m, (a, h, _) in GPTS.items()}
print("selective saves", {m: f"{share:.0%}" for m, share in saved.items()}, "of a layer at 2,048 tokens")
assert fits[8192] == ["+ selective", "full"] and round(saved["175B"], 2) == 0.70 and round(saved["530B"], 2) == 0.65

# %% [markdown] lang="en"
# (The line of dashes is 80 GB. Weights and states need room, too.) At 2,048 tokens all four fit, which is not to say
# that all fit *beside* the states. At 8,192 the square term has overtaken everything. Fused attention does away with
# that term for good, and for nothing: it is selective recomputation inside one kernel. So the
# first question today is whether attention is fused. The next one is how much of the rest to give up.
#
# When to take which:
#
# - **none**, while it fits. It is the fastest.
# - **selective** next. In our block it keeps about two thirds, and repeats no matrix product.
# - **full** when nothing else helps: for a step of 4 forwards in place of 3, or a little less.
#
# **Exercise:** [tasks 03h.1 and 03h.2](../exercises/03h_memory_and_recovery.ipynb): what is kept, and a block that is
# computed again, with dropout.
#
# ## 3. Sixteen bits, and what is lost in them
#
# A number of 16 bits takes half the memory, half the time to send, and on a GPU's matrix units far less than half the
# time to multiply. A floating point number is a sign, some bits for the size (exponent) and some for the digits
# (fraction). Two formats share out 16 bits differently.
#
# **Predict** four results: in bfloat16, 256 + 1 and 1 − 0.001; in float16, 70,000 and 0.00000001.

# %%
prediction = None  # four numbers

FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def number(value, dtype):
    return torch.tensor(value, dtype=dtype)


bf16, fp16 = torch.bfloat16, torch.float16
results = [
    (number(256, bf16) + number(1, bf16)).item(),
    (number(1, bf16) - number(0.001, bf16)).item(),
    number(7e4, fp16).item(),
    number(1e-8, fp16).item(),
]
print("you wrote:", prediction, "- computed:", results)
assert results == [256, 1, math.inf, 0]

# %%
print(f"{'':<9} {'largest':>10} {'smallest':>10} {'behind 1 comes':>15} {'digits':>7}")
for name, dtype in FORMATS.items():
    info = torch.finfo(dtype)
    least = info.smallest_normal * info.eps  # with fewer and fewer digits on the way there
    digits = -math.log10(info.eps / 2)
    print(f"{name:<9} {info.max:>10.3g} {least:>10.2g} {1 + info.eps:>15.10g} {digits:>7.1f}")

# %% [markdown] lang="en"
# bfloat16 is a float32 with the last 16 bits cut off: the same range, under three digits. float16 has a digit more, and
# pays with its range. It ends at 65,504, and below 0.00006 it loses digits, until below 0.00000003 nothing is left. The
# picture shows how much of a number is lost by rounding, from very small numbers to very large ones.

# %%
magnitudes = torch.logspace(-12, 12, 24_000, dtype=torch.float64)
drawing, (panel,) = viz.figure(7, 3)
for (name, dtype), color, style in zip(FORMATS.items(), viz.PALETTE[4:], ("-", "--", "-."), strict=False):
    rounded = magnitudes.to(dtype).double()
    lost = ((rounded - magnitudes).abs() / magnitudes).clamp(max=1).nan_to_num(1)
    worst = lost.view(-1, 100).amax(1)
    panel.loglog(magnitudes[50::100], worst, color=color, ls=style, lw=2, label=name)
panel.set(xlabel="size of the number", ylabel="share lost at most", ylim=(1e-9, 10))
panel.legend(frameon=False, ncols=3, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, 1.15))
alt = (
    "The share of a number that rounding loses, for sizes from 1e-12 to 1e12: float32 6e-8 and bfloat16 0.4 percent "
    "everywhere; float16 0.05 percent from 6e-5 to 65504, rising to all of it below, and all of it above."
)
viz.show(drawing, alt)

# %% [markdown] lang="en"
# Three things go wrong in training, one after the other.
#
# ### A step too small to be seen
#
# **Question.** A weight is 1. An optimizer takes 0.001 from it, a thousand times. Where is it in float32, bfloat16,
# float16?

# %%
prediction = None  # three numbers

ends = {}
for name, dtype in FORMATS.items():
    weight, step = number(1.0, dtype), number(0.001, dtype)
    for _ in range(1000):
        weight = weight - step
    ends[name] = weight.item()
print("you wrote:", prediction, "- ends at:", {name: round(end, 3) for name, end in ends.items()})
assert ends["bfloat16"] == 1 and abs(ends["float32"]) < 1e-4

# %% [markdown] lang="en"
# In bfloat16 it has not moved. Below 1 the next number is 0.996, and 0.999 is rounded back to 1, a thousand times. So
# **weights are kept in float32**, where small steps add up, and 16-bit copies are made of them to compute with
# (Micikevicius et al. 2018). This is the "mixed" in mixed precision.
#
# ### A sum that stops growing
#
# **Question.** Ten thousand ones, added up one after the other. Where does the sum end?

# %%
prediction = None  # {"float32": 10000, ...}

sums = {}
for name, dtype in FORMATS.items():
    total, one = number(0, dtype), number(1, dtype)
    for _ in range(10_000):
        total = total + one
    sums[name] = total.item()
print("you wrote:", prediction, "- sums:", sums)
assert sums == {"float32": 10_000, "bfloat16": 256, "float16": 2048}

# %% [markdown] lang="en"
# So long sums stay in float32: those inside a matrix product (the hardware sees to it), of norms, of softmax, of the
# loss, and of gradients over microbatches and ranks.
#
# `parallelize(..., dtype=torch.bfloat16)` follows these rules: matrix products and attention in 16 bits, all else
# in the module's own type. PyTorch calls it *autocast*. We train three times: in float32, mixed, and with everything
# in bfloat16, weights and optimizer included.
#
# **Predict:** the gains of the LayerNorms begin at 1, and the step is 0.001. What share of them has moved after 20
# steps, in each of the three?

# %%
prediction = None  # for instance {"float32": 1.0, "mixed": 1.0, "all bfloat16": 0.5}


def trained(weights, dtype, batches):
    model = parallelize(fresh(weights), Mesh(dp=2, tp=2), dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for batch in batches:
        losses.append(model.step(*batch).item())
        optimizer.step()
    gains = [w for name, w in model.full_state_dict().items() if "norm" in name and "weight" in name]
    return losses, (torch.cat(gains) != 1).double().mean().item()


batches = list(corpus.batches(steps=20, rows=8, context=32))
KINDS = {
    "float32": (torch.float32, None),
    "mixed": (torch.float32, torch.bfloat16),
    "all bfloat16": (torch.bfloat16, None),
}
runs = {name: world.run(trained, *kind, batches)[0] for name, kind in KINDS.items()}
moved = {name: round(share, 3) for name, (_, share) in runs.items()}
print("you wrote:", prediction, "- moved:", moved)
assert moved == {"float32": 1, "mixed": 1, "all bfloat16": 0}

# %%
drawing, (panel,) = viz.figure(7, 3)
widths = (6, 2.5, 2)
for (name, (losses, _)), color, style, width in zip(
    runs.items(), viz.PALETTE[4:], ("-", "--", "-."), widths, strict=False
):
    panel.plot(range(1, 21), losses, color=color, ls=style, lw=width, label=name)
panel.set(xlabel="step", ylabel="loss", xticks=[1, 5, 10, 15, 20])
panel.legend(frameon=False, fontsize=9)
last = ", ".join(f"{name} {losses[-1]:.2f}" for name, (losses, _) in runs.items())
viz.show(drawing, f"Loss over 20 steps in three precisions, close to each other. After the last step: {last}.")

# %% [markdown] lang="en"
# The losses hardly differ in so short a run. Yet in the third one not a single gain has moved, and none will while
# steps are so small. It is one more bug that a loss curve hides.
#
# What does mixed precision save? Not the states. minipar keeps 4 bytes of weight, 4 of gradient and 8 of Adam. Others
# keep a second weight of 2 bytes and its gradient of 2, beside 12. Both are 16. Matrix products become faster where the
# hardware has units for them. **Predict** the rest: what share remains of a block's activations, of the bytes between
# tensor ranks, and of those between stages?

# %%
prediction = None  # three shares


def bytes_sent(dtype):
    model = parallelize(fresh(torch.float32), Mesh(pp=2, tp=2), dtype=dtype)
    with ledger() as book:
        model.step(tokens, targets)
    return book.bytes("tp"), book.bytes("pp")


def bytes_kept(mixed):
    x = torch.randn(32, 128, 128, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        return sum(kept(lambda: block(x), block.parameters()))


found = [(bytes_kept(dtype is not None), *world.run(bytes_sent, dtype)[0]) for dtype in (None, torch.bfloat16)]
shares = [half / full for full, half in zip(*found, strict=True)]
print("you wrote:", prediction, "- measured:", *(f"{share:.2f}" for share in shares))
assert 0.5 < shares[0] < 0.65 and 0.7 < shares[1] < 0.85 and abs(shares[2] - 1) < 0.01

# %% [markdown] lang="en"
# Not a half, since not everything is in 16 bits. Of a block's activations, the inputs of both norms stay in float32,
# and small copies of the weights come on top. Between tensor ranks, forward sends what comes out of matrix products, in
# 16 bits; backward sends gradients of what has not been rounded yet, in 32. Between stages travels the sum over all
# blocks so far, and here that is never rounded. Programs that hold it in 16 bits send half, and lose some digits in
# each block.
#
# ### Gradients below the smallest number
#
# bfloat16 has float32's range, so it needs nothing more. float16 was there first, and many GPUs have nothing else. How
# large are gradients? We look at those that backward computes in 16 bits: of the outputs of all linear layers.


# %%
def output_gradients(tokens, targets):
    model, found = fresh(torch.float32), []
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.register_full_backward_hook(lambda layer, inputs, outputs: found.append(outputs[0].flatten()))
    mean_loss(model, tokens, targets).backward()
    return torch.cat(found)


sizes = output_gradients(tokens, targets).abs()
sizes = sizes[sizes > 0][::8]  # every eighth is enough
logs = sizes.log2()
heights = torch.histc(logs, 60, -60, 0) / len(logs)
places = torch.linspace(-60, 0, 61)[:-1]


def lost_at(scale, tokens_of_a_step):
    """Shares of the gradients that become 0, and infinite, in float16."""
    scaled = (sizes * scale * len(targets.flatten()) / tokens_of_a_step).half()
    return (scaled == 0).double().mean().item(), scaled.isinf().double().mean().item()


# %% [markdown] lang="en"
# What is too small becomes 0. The cure is a trick: multiply the loss by a large number $S$, the
# **[loss scale](../docs/glossary.md#loss-scaling)**. By the
# chain rule every gradient is then $S$ times as large. Divide the weights' gradients by $S$ again, in float32, before
# the optimizer sees them. If $S$ is a power of two, nothing is rounded on the way.
#
# The loss is a mean over the tokens of a step. So each token's gradient is divided by their number: here 256, in a
# large run about four million ($2^{22}$).
#
# **Before you move it:** with a scale of 1, what share of the gradients is lost here, and in the large run? Which
# scales lose less than one in a hundred there, and none at the upper end?

# %%
prediction = None  # (share lost here, share in the large run, scales)

STEPS = {"256 tokens a step": 256, "4,194,304 tokens a step": 2**22}


def draw_scale(step, scale):
    shift = math.log2(STEPS[step] / 256)
    under, over = lost_at(2.0**scale, STEPS[step])
    drawing, (panel,) = viz.figure(7.5, 2.9)
    panel.axvspan(-25, 16, color=viz.PALETTE[0], alpha=0.3, label="float16: anything at all")
    panel.axvspan(-14, 16, color=viz.PALETTE[0], alpha=0.5, label="with all digits")
    panel.bar(places + scale - shift, heights, 1, align="edge", color=viz.PALETTE[1], ec=viz.INK, lw=0.4)
    panel.set(xlim=(-62, 32), ylim=(0, 0.16), xlabel="size of gradient × scale, as a power of 2", ylabel="share")
    panel.set_title(f"scale $2^{{{scale}}}$: {under:.1%} become 0, {over:.1%} infinite", fontsize=10)
    panel.legend(frameon=False, fontsize=8, loc="upper left")
    return viz.describe(
        drawing, f"{step}, scale 2^{scale}: {under:.1%} of the gradients become 0, {over:.1%} infinite."
    )


explore(draw_scale, step=STEPS, scale=range(0, 41, 4))

# %%
print("you wrote:", prediction)
for step, count in STEPS.items():
    good = [k for k in range(41) if lost_at(2.0**k, count)[0] < 0.01 and lost_at(2.0**k, count)[1] == 0]
    print(f"{step}: {lost_at(1, count)[0]:.1%} lost at scale 1; good scales 2^{good[0]} to 2^{good[-1]}")

# %% [markdown] lang="en"
# Here, hardly anything is lost at a scale of 1. In the large run it is nearly nine tenths, without a scale. There is
# room between too small and too large, but where it lies depends on the model, the batch and the stage of
# training. So one does not choose a scale, one lets it find its place. Begin high. If anything becomes infinite, an
# **overflow**, throw the step away and halve the scale. After many good steps, double it.
#
# **Your turn.** Write `my_scaled_step` with at most 15 lines: the forward under `torch.autocast("cpu", torch.float16)`,
# the loss times `scale`, and gradients divided by it. It returns whether there was an overflow, and in that case no
# weight has moved.
#
# **Question.** Double the scale again and again, from $2^{16}$. At which power of two does our step overflow?

# %%
prediction = None  # the exponent


def my_scaled_step(model, optimizer, batch, scale):
    optimizer.zero_grad()
    mean_loss(model, *batch).backward()
    optimizer.step()
    return False  # your lines in place of these four


# %% jupyter={"source_hidden": true}
# One answer: look at all gradients before anything else happens
def scaled_step(model, optimizer, batch, scale):
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.float16):
        loss = mean_loss(model, *batch)
    (loss * scale).backward()
    gradients = [p.grad for p in model.parameters()]
    if not all(g.isfinite().all() for g in gradients):
        return True
    for g in gradients:
        g /= scale
    optimizer.step()
    return False


# %% seconds=90
def first_overflow(step):
    model = fresh(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    found = (k for k in range(16, 24) if step(model, optimizer, (tokens, targets), 2.0**k))
    return next(found, None)


limit = first_overflow(scaled_step)
print(f"you wrote: {prediction} - first overflow at scale 2^{limit}; of your step: {first_overflow(my_scaled_step)}")
model = fresh(torch.float32)
before = [p.detach().clone() for p in model.parameters()]
optimizer = torch.optim.AdamW(model.parameters())
assert scaled_step(model, optimizer, (tokens, targets), 2.0**limit)
assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)) and not optimizer.state

# %% [markdown] lang="en"
# That is earlier than the picture says. The gradients in it are those of layers' outputs. Those of weights are sums
# over all tokens, so they are larger, and backward computes them in 16 bits, too.
#
# ### An overflow on one rank
#
# On a mesh each rank sees its own shares only. Say that a gradient on rank 2 becomes infinite, and on no other. If each
# rank looks for itself, rank 2 throws the step away, and the others take it. The model is then made of two different
# steps. Nothing crashes.
#
# **Predict:** on which of four ranks do weights move, if each decides for itself, and if they ask each other?

# %%
prediction = None  # ([...], [...])


def after_overflow(agree):
    model = parallelize(fresh(torch.float32), Mesh(pp=2, tp=2), dtype=torch.float16)
    optimizer, check = torch.optim.AdamW(model.parameters()), model._check_overflow
    before = [p.detach().clone() for p in model.parameters()]

    def one_is_infinite():
        if here().rank == 2:
            next(model.parameters()).grad.view(-1)[0] = math.inf
        if agree:
            check()
        elif not all(p.grad.isfinite().all() for p in model.parameters()):
            optimizer.zero_grad()  # an optimizer skips what has no gradient

    model._check_overflow = one_is_infinite
    model.step(tokens, targets)
    optimizer.step()
    same = all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    return not same, bool(optimizer.state), model.scale.value


# %%
by_itself, together = (list(zip(*world.run(after_overflow, agree), strict=True)) for agree in (False, True))
print("you wrote:", prediction)
print("each for itself, moved:", by_itself[0])
print("they ask, moved:       ", together[0], "optimizer has a state:", together[1], "scale:", together[2][0])
assert by_itself[0] == (True, True, False, True) and together == [(False,) * 4, (False,) * 4, (2.0**15,) * 4]

# %% [markdown] lang="en"
# With one question to all, nobody moves. Weights, Adam's means and its count of steps are what they were, and the
# scale has gone from $2^{16}$ to $2^{15}$. The question is one number that travels: an all-reduce of the maximum.

# %%
viz.show_source(Parallel._check_overflow, LossScale.update)

# %% [markdown] lang="en"
# **Exercise:** [task 03h.3](../exercises/03h_memory_and_recovery.ipynb): a scale that finds its place, the same on
# every rank.
#
# ## 4. Clipping by a norm that nobody knows
#
# One bad batch can give a gradient so large that the step ruins the weights. So most runs **clip**: if the norm of the
# gradient (the root of the sum of all squares) is above a limit, say 1, the whole gradient is scaled down to it
# (Pascanu et al. 2013). Its direction stays.
#
# PyTorch's `clip_grad_norm_` does it for the parameters that it is given. On a mesh a rank has a part of them.
#
# **Question.** Two ranks have one weight each, with gradients 3 and 4. The limit is 1. What are the gradients after
# [clipping](../docs/glossary.md#gradient-clipping), right, and if each rank calls `clip_grad_norm_` on its own?

# %%
prediction = None  # ((.., ..), (.., ..))


def clipped(values):
    weights = [nn.Parameter(torch.zeros(())) for _ in values]
    for weight, value in zip(weights, values, strict=True):
        weight.grad = torch.tensor(value)
    nn.utils.clip_grad_norm_(weights, 1.0)
    return [round(weight.grad.item(), 3) for weight in weights]


print("you wrote:", prediction, "- right:", clipped([3.0, 4.0]), "- each by itself:", clipped([3.0]) + clipped([4.0]))
assert clipped([3.0, 4.0]) == [0.6, 0.8] and clipped([3.0]) + clipped([4.0]) == [1, 1]

# %% [markdown] lang="en"
# Clipped by local norms, the result is too long and points elsewhere. The repair seems clear: sum the squares over all
# ranks. But then a parameter that several ranks hold counts several times. There are three kinds: copies on data ranks
# (all of them), copies on tensor ranks (norms, biases of row cuts), and a weight that two stages share (an embedding
# that is also the head, called **tied**).
#
# **Your turn.** Write `my_norm(model)`. It is called on every rank and returns the norm of the whole gradient.
# `model.named_parameters()` gives this rank's parameters, `model.counts(name)` says whether this rank's part is the
# first of all its copies, and `all_reduce(x, everyone())` sums a tensor over all ranks.
#
# **Predict:** on `Mesh(dp=4)`, how many times the true norm do you get if you forget about copies?

# %%
prediction = None  # times


def my_norm(model):
    return torch.zeros(())  # your lines in place of this one


# %% jupyter={"source_hidden": true}
# One answer: squares of what counts here, summed over all
def whole_norm(model, once=True):
    squares = torch.zeros((), dtype=torch.float64)
    for name, p in model.named_parameters():
        if model.counts(name) or not once:
            squares += p.grad.double().square().sum()
    return all_reduce(squares, everyone()).sqrt()


# %%
def norms(mesh, zero):
    model = parallelize(fresh(tied=True), mesh, zero=zero)
    model.step(tokens, targets)
    own = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
    mine, once, every = my_norm(model).item(), whole_norm(model).item(), whole_norm(model, once=False).item()
    return own, every, once, model.clip_gradients(1.0).item(), mine


model = fresh(tied=True)
mean_loss(model, tokens, targets).backward()
true = nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
LAYOUTS = [(Mesh(dp=4), 0), (Mesh(dp=4), 2), (Mesh(tp=4), 0), (Mesh(pp=4), 0), (Mesh(dp=2, tp=2), 1)]
found = {(str(mesh), zero): world.run(norms, mesh, zero) for mesh, zero in LAYOUTS}
found["Mesh(dp=2, pp=2, tp=2)", 0] = eight.run(norms, Mesh(dp=2, pp=2, tp=2), 0)

# %%
print(f"you wrote: {prediction} - one process: {true:.3f}")
for (mesh, zero), answers in found.items():
    own, every, once, package, mine = zip(*answers, strict=True)
    own = f"own {min(own):.3f} to {max(own):.3f}"
    print(f"{mesh:<23} zero={zero}: {own}, with copies {every[0]:.3f}, once {once[0]:.3f}, yours {mine[0]:.3f}")
    assert all(abs(value / true - 1) < 1e-12 for value in once + package)
assert abs(found["Mesh(dp=4)", 0][0][1] / true - 2) < 1e-12

# %%
own, every, *_ = zip(*found["Mesh(dp=2, pp=2, tp=2)", 0], strict=True)
drawing, (panel,) = viz.figure(7, 2.8)
panel.bar(range(8), own, color=viz.PALETTE[0], ec=viz.INK, lw=0.6, label="norm of what the rank holds")
for height, style, label in (
    (true, "-", "the norm of the gradient"),
    (every[0], "--", "copies counted as often as they are"),
):
    panel.axhline(height, color=viz.INK, ls=style, lw=1.5, label=label)
panel.set(xticks=range(8), xlabel="rank", ylabel="norm", ylim=(0, 1.7 * every[0]))
panel.legend(frameon=False, fontsize=9, loc="upper left", ncols=1)
panel.set_title("One gradient on Mesh(dp=2, pp=2, tp=2)", fontsize=10)
told = ", ".join(f"{value:.2f}" for value in own)
viz.show(drawing, f"Norms on eight ranks: {told}. The true norm is {true:.2f}, with copies {every[0]:.2f}.")

# %% [markdown] lang="en"
# No rank's own norm is the right one, except where a rank holds everything (`dp=4` without ZeRO: the reason why the bug
# stays unnoticed until someone turns sharding on). With four copies of everything the sum is $\sqrt4 = 2$ times too
# large.
#
# What does a local norm break? Not only the length. **Predict:** two tensor ranks hold copies of a LayerNorm's gain.
# Are the copies still equal after one step with a local clip?

# %%
prediction = None  # equal?


def one_clipped_step(local):
    model = parallelize(fresh(), Mesh(pp=2, tp=2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.step(tokens, targets)
    if local:
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    else:
        model.clip_gradients(0.5)
    optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}["norm.weight"] if model.pp.index else None


print("you wrote:", prediction)
for local in (True, False):
    first, second = (gain for gain in world.run(one_clipped_step, local) if gain is not None)
    print(f"{'own norm' if local else 'norm of all':<12} copies equal: {torch.equal(first, second)}")
    assert torch.equal(first, second) != local

# %% [markdown] lang="en"
# From here on the two tensor ranks train two different models, and each computes with the other's half.
#
# **The package's version:**

# %%
viz.show_source(Parallel.clip_gradients, Parallel.counts)

# %% [markdown] lang="en"
# It does what ours does, axis by axis. `together` puts the shares of a foreign wrapper together first. The factor is
# PyTorch's, with its 0.000001 in the divisor, so that the result equals one process to the last digits.
#
# ## 5. Dropout that does not know the layout
#
# **Dropout** sets a random share $p$ of an activation's elements to zero in training, and multiplies the others by
# $1/(1-p)$. Random numbers come from a generator, and each rank has its own. Two mistakes are possible, and both are
# silent:
#
# - tensor ranks hold *copies* of a block's output. If they draw different masks, the copies differ from there on;
# - ranks hold *parts* of something. If they draw the same mask, what should be independent is not.
#
# And a run on another layout draws other numbers, so that no gradient can be compared with one process.
#
# All three vanish if an element is dropped, or not, **by where it lies in the whole tensor**: by step, layer, row,
# position and channel, and by nothing else. A row's mask is drawn whole, from a seed that names step, layer and row.
# Whoever has a part of the row takes its part of the mask.
#
# **Your turn.** Write `my_mask(seed, row, length, start, stop, p)`: which of the positions from `start` to `stop` of a
# row of `length` positions are kept. Cut in any way, the pieces must be those of the whole.

# %%
prediction = None  # how does your function draw positions 8 to 16, without those before?


def my_mask(seed, row, length, start, stop, p):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(stop - start, generator=generator) >= p  # wrong in two ways


# %% jupyter={"source_hidden": true}
# One answer: draw the whole row, take a part
def mask_by_place(seed, row, length, start, stop, p):
    generator = torch.Generator().manual_seed(hash((seed, row)))
    return (torch.rand(length, generator=generator) >= p)[start:stop]


# %%
def verdict(draw):
    rows = [draw(7, row, 32, 0, 32, 0.3) for row in range(4)]
    cuts = [torch.cat([draw(7, row, 32, a, a + 8, 0.3) for a in range(0, 32, 8)]) for row in range(4)]
    distinct = len({tuple(row.tolist()) for row in rows}) == 4
    return torch.equal(torch.stack(rows), torch.stack(cuts)), distinct


for draw in (my_mask, mask_by_place):
    same, distinct = verdict(draw)
    print(f"{draw.__name__:<14} cut in four the same: {same}, another for each row: {distinct}")
assert verdict(mask_by_place) == (True, True)

# %% [markdown] lang="en"
# In the package the same idea handles any number of cuts. Here are real masks: those that four ranks draw in the first
# block, on `Mesh(dp=2, tp=2)` with sequence parallelism, where each has half of the rows and half of the positions.


# %%
def first_mask(mesh, **options):
    model = parallelize(fresh(dropout=0.3), mesh, **options)
    seen = []
    dropout = model.module.get_submodule("blocks.0.dropout")
    dropout.register_forward_hook(lambda layer, inputs, output: seen.append(output[..., 0] != 0))
    model.step(tokens, targets)
    return model.dp.index, model.tp.index, seen[0]


((_, _, whole),) = single.run(first_mask, Mesh())
parts = world.run(first_mask, Mesh(dp=2, tp=2), sequence_parallel=True)
put_together = torch.zeros_like(whole)
owner = torch.zeros(8, 32)
for rank, (row, place, part) in enumerate(parts):
    put_together[4 * row : 4 * row + 4, 16 * place : 16 * place + 16] = part
    owner[4 * row : 4 * row + 4, 16 * place : 16 * place + 16] = rank
assert torch.equal(whole, put_together)

# %%
drawing, panels = viz.figure(7.5, 2.6, columns=2)
colors = [[viz.PALETTE[int(rank)] for rank in line] for line in owner]
for panel, ranks, title in zip(panels, (False, True), ("one process", "four ranks, by color"), strict=True):
    for row, place in itertools.product(range(8), range(32)):
        color = colors[row][place] if ranks else viz.PALETTE[0]
        kept_here = (put_together if ranks else whole)[row, place]
        panel.add_patch(viz.Rectangle((place, row), 1, 1, fc=color if kept_here else "white", ec=viz.LINE, lw=0.3))
    panel.set(xlim=(0, 32), ylim=(8, 0), xlabel="position (channel 0)", xticks=[0, 16, 32])
    panel.set_title(title, fontsize=10)
panels[0].set_ylabel("row")
alt = "What dropout keeps in 8 rows of 32 positions, on one process and on four ranks with a quarter each: the same."
viz.show(drawing, alt)

# %% [markdown] lang="en"
# White is dropped. The pictures agree, square by square. So the gradient law of chapter 3a holds with dropout, too.
# We try layouts that cut rows, layers, matrices and sequences, with recomputation, for two steps, since each step must
# draw other masks.
#
# **Predict** the distance to one process.

# %%
prediction = None


def with_dropout(mesh, **options):
    model = parallelize(fresh(dropout=0.3), mesh, **options)
    for _ in range(2):
        loss = model.step(tokens, targets)
    return loss.item(), whole_gradient(model)


((loss_alone, dropped_alone),) = single.run(with_dropout, Mesh())
print("you wrote:", prediction)
cases = [(Mesh(dp=4), {"zero": 3}), (Mesh(dp=2, tp=2), {"sequence_parallel": True, "recompute": "full"})]
cases += [(Mesh(pp=4), {"microbatches": 4}), (Mesh(cp=2, tp=2), {"recompute": "selective"})]
for mesh, options in cases:
    loss, found = world.run(with_dropout, mesh, **options)[0]
    off = distance(found, dropped_alone), abs(loss - loss_alone)
    print(f"{mesh!s:<16} distance of gradients {off[0]:.0e}, of losses {off[1]:.0e}")
    assert max(off) < 1e-12

# %%
viz.show_source(Masks.mask)

# %% [markdown] lang="en"
# It has a price: each rank draws the masks of whole rows and uses a part of them. Generators that give the random
# number of any place directly, from a counter, avoid that (Salmon et al. 2011); those of GPUs are of this kind.
#
# **Part two: recovery**
#
# ## 6. What is a run?
#
# Suppose that the power fails after step 3, and you have saved. You start again. What must have been on disk, so that
# steps 4, 5 and 6 have the losses that they would have had, to the last bit?
#
# **Write down your list** before you read on.

# %%
prediction = None  # ["weights", ...]


def begin(mesh, **options):
    """A run of four parts: model, optimizer, and a loader that hands each data rank its rows."""
    model = parallelize(fresh(dropout=0.1), mesh, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return model, optimizer, Loader(corpus.Windows(32), 8, model, drop_last=True)


def go_on(model, optimizer, loader, steps):
    losses = []
    for batch in loader.batches(steps):
        losses.append(model.step(*batch, local=True).item())
        optimizer.step()
    return losses


# %% [markdown] lang="en"
# `minipar.save(folder, model, optimizer, ...)` writes a **checkpoint**, and what else you give it by name.
# `minipar.load` takes it up again and returns those extras. We save after three of six steps, and go on undisturbed.
# Then we load into fresh runs, and each forgets one thing.


# %%
def undisturbed(folder):
    run = begin(Mesh(dp=2, pp=2), microbatches=2, zero=1)
    go_on(*run, 3)
    minipar.save(folder, *run[:2], data=run[2].state_dict())
    return go_on(*run, 3)


def resumed(folder, forgets):
    model, optimizer, loader = begin(Mesh(dp=2, pp=2), microbatches=2, zero=1)
    extra = minipar.load(folder, model, None if forgets == "the optimizer" else optimizer)
    if forgets != "the place in the data":
        loader.load_state_dict(extra["data"])
    if forgets == "the count of steps":
        model.steps = 0
    return go_on(model, optimizer, loader, 3)


room = tempfile.TemporaryDirectory()
home = Path(room.name)
wanted = world.run(undisturbed, home / "six")[0]
print("you wrote:", prediction)
for forgets in ("the optimizer", "the place in the data", "the count of steps", "nothing"):
    losses = world.run(resumed, home / "six", forgets)[0]
    print(f"forgets {forgets:<22} losses off by", *(f"{abs(a - b):.0e}" for a, b in zip(losses, wanted, strict=True)))
    assert (losses == wanted) == (forgets == "nothing")

# %% [markdown] lang="en"
# - **Weights** alone are not enough.
# - **The optimizer's state**: without it, Adam has forgotten its means. The first loss is right (the weights are), the
#   later ones are not.
# - **The place in the data**: without it, the run sees the first rows again and others never.
# - **The count of steps**: here dropout draws from it. Learning rates that change over time depend on it, too.
# - **Random numbers**, if anything draws from a generator that goes on by itself. With masks by place, nothing does.
# - With float16, **the loss scale**.
#
# With all of it, the losses are equal. Not nearly: `==`.
#
# ### In the middle of an epoch
#
# An **epoch** is one pass through all rows, in an order of its own. minipar's `Loader` draws the order from seed and
# epoch, and cuts each global batch for the data ranks. What does it keep?


# %%
def position(folder):
    model, _, loader = begin(Mesh(dp=2, pp=2), microbatches=2, zero=1)
    loader.load_state_dict(minipar.load(folder, model)["data"])
    return loader.state_dict(), len(loader)


state, length = world.run(position, home / "six")[0]
print(state, f"- an epoch has {length} batches")
assert state["row"] == 3 * 8 and state["epoch"] == 0
viz.show_source(Loader.__iter__, Loader.state_dict)

# %% [markdown] lang="en"
# The epoch, and how many rows of its order have been *handed out*: 3 batches of 8. The loop at the end of `__iter__`
# moves the place on as it hands a batch over. Rows that were only read do not count: workers read ahead, and what was
# read and not handed out would be lost. And it counts in rows of the global order, not in batches of a rank. So the
# next layout may have another number of data ranks.
#
# **Predict:** 20 rows. Two batches of 4 rows on four data ranks, then the run moves to two data ranks. Which rows are
# left, and does any row come twice?

# %%
prediction = None


def read_rows(mesh, state, count):
    model = parallelize(fresh(), mesh)
    loader = Loader(list(range(20)), 4, model, shuffle=False)
    if state:
        loader.load_state_dict(state)
    return [batch.tolist() for batch in loader.batches(count)], model.dp.index, loader.state_dict()


four = world.run(read_rows, Mesh(dp=4), None, 2)
two = world.run(read_rows, Mesh(dp=2, tp=2), four[0][2], 3)
titles = [f"dp=4, batch {i}" for i in (1, 2)], [f"dp=2, tp=2, batch {i}" for i in (3, 4, 5)]
table = {name: [rows[i] for rows, *_ in four] for i, name in enumerate(titles[0])}
table |= {name: [rows[i] for rows, *_ in two] for i, name in enumerate(titles[1])}
seen = [row for name in table for row in sorted({row for rank in table[name] for row in rank})]
assert seen == list(range(20))
print("you wrote:", prediction, "- in order, each row once:", seen == list(range(20)))
viz.show(viz.draw_tensors(table, hue=lambda row: int(row) // 4))

# %% [markdown] lang="en"
# Tensor ranks of one data rank get the same rows, and together every row comes once.
#
# ## 7. What is in the folder
#
# Now 2 × 2 × 2 ranks with ZeRO-1: every kind of cut at once. We save after two steps.
#
# **Predict:** our GPT has $P$ parameters, in float64 here, 8 bytes each. With Adam's two numbers, how many bytes has a
# checkpoint: 8 P, 24 P, or 8 times one of these, since eight ranks write?

# %%
prediction = None  # times P


def contents(model, optimizer):
    """Weights, and Adam's two numbers for each, whole."""
    found = dict(model.full_state_dict())
    for what in ("exp_avg", "exp_avg_sq"):
        for p in model.parameters():
            p.grad = optimizer.state[p][what].clone()  # so that the package puts its shares together
        found |= {f"{what} of {name}": x for name, x in model.full_gradients().items()}
    optimizer.zero_grad()
    return found if here().rank == 0 else None


# %%
def save_on(mesh, folder):
    run = begin(mesh, microbatches=2, zero=1)
    go_on(*run, 2)
    minipar.save(folder, *run[:2], data=run[2].state_dict())
    return contents(*run[:2]), go_on(*run, 2)


saved, losses_saved = eight.run(save_on, Mesh(dp=2, pp=2, tp=2), home / "eight")[0]
path = minipar.latest(home / "eight")
files = sorted(path.glob("*.safetensors"))
P, size = sum(p.numel() for p in fresh().parameters()), sum(file.stat().st_size for file in files)
print(f"you wrote: {prediction} - {size:,} bytes = {size / P:.2f} P in {len(files)} files of {path.name}")
assert 24 < size / P < 24.5

# %% [markdown] lang="en"
# 24 P and a little: each number is written once, by one of the ranks that hold it. (The rest are headers: what is
# where.) The files are *safetensors*: a header in JSON, then plain numbers. Nothing in them can run code, as a pickle
# could.
#
# A page beside them holds all that is not a tensor:

# %%
page = json.loads((path / "checkpoint.json").read_text())
for name in ("mesh", "counters", "optimizer", "extra"):
    print(f"{name:<10}", page[name])
print("and", *(name for name in page if name not in ("mesh", "counters", "optimizer", "extra")))

# %% [markdown] lang="en"
# Each tensor in a file is a **box** of a whole tensor, and the header says where the box lies in it. A rank may have
# several boxes of one tensor. Let us look for the one in the most boxes: who wrote which?


# %%
def boxes_of(path, key):
    """For each box of a tensor: (rank that wrote it, its corner in the whole, its size)."""
    found = []
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            if key in opened.keys():  # noqa: SIM118
                corner = json.loads(opened.metadata()["DCP_SHARDING_INFO"])[key]["saved_offsets"]
                rank = int(file.name.split("-")[1]) - 1
                found.append((rank, corner, opened.get_slice(key).get_shape()))
    return found


def keys_of(path):
    """Every tensor's name in the folder's files, in order."""
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= dict.fromkeys(opened.keys())
    return list(found)


# %%
KEY = max(keys_of(path), key=lambda key: len(boxes_of(path, key)))
shape = tuple(saved[KEY.split("/")[-1]].shape)
boxes = boxes_of(path, KEY)
print(f"{KEY}: {shape[0]} x {shape[1]} numbers in {len(boxes)} boxes")
assert sum(math.prod(size) for *_, size in boxes) == math.prod(shape)


# %%
def draw_boxes(panel, boxes, title):
    for rank, (row, column), (high, wide) in boxes:
        color = viz.PALETTE[rank % 8]
        panel.add_patch(viz.Rectangle((column, row), wide, high, fc=(color, 0.6), ec=viz.INK, lw=1))
        if high > shape[0] / 20 and wide > shape[1] / 5:
            panel.text(column + wide / 2, row + high / 2, f"rank {rank}", **viz.CENTER, fontsize=9)
    panel.set(xlim=(0, shape[1]), ylim=(shape[0], 0), xticks=[0, shape[1]])
    panel.set_title(title, fontsize=9)


def wanted_boxes(mesh, key):
    """What each rank of a mesh needs of a tensor of Adam's, by the package's own account."""
    model, *_ = begin(mesh, zero=1)
    name = key.split("/")[-1]
    p = dict(model.named_parameters()).get(name)
    found = checkpoint.piece(model, name, p).boxes if p is not None else {}
    return [(here().rank, corner, tuple(box.shape)) for corner, box in found.items()]


# %% [markdown] lang="en"
# Eight boxes. Tensor ranks cut this matrix from top to bottom: two halves. Then ZeRO-1 lays all parameters of a rank
# end to end and cuts the list into two equal shares, wherever that falls: here in the middle of a row of this matrix.
# So the first share ends with whole rows and the beginning of a row, and the second begins with the rest of that row.
# The picture below shows them on its left; the row in two pieces is the thin line.
#
# ## 8. Another shape
#
# Now four data ranks and two tensor ranks, no pipeline: `Mesh(dp=4, tp=2)`. The ZeRO shares are quarters of another
# list. Which of the old boxes does a new rank need? Whatever overlaps with its own. This is all there is to a
# checkpoint that changes shape: **nobody writes "my part"; everyone writes "this box of that tensor"**.

# %%
needs = [box for boxes in eight.run(wanted_boxes, Mesh(dp=4, tp=2), KEY) for box in boxes]
drawing, panels = viz.figure(7, 3.6, columns=2)
draw_boxes(panels[0], boxes, "written on Mesh(dp=2, pp=2, tp=2)")
draw_boxes(panels[1], needs, "needed on Mesh(dp=4, tp=2)")
panels[0].set_ylabel("row of the matrix")
told = ["; ".join(f"rank {r}: {h} x {w} from {tuple(c)}" for r, c, (h, w) in some) for some in (boxes, needs)]
viz.show(drawing, f"Boxes of one matrix of {shape[0]} x {shape[1]}. Written: {told[0]}. Needed: {told[1]}.")

# %% [markdown] lang="en"
# **Your turn,** in one dimension. `files` is a list of pairs (start, numbers): a tensor of one dimension in pieces, in
# any order. Write `my_read(files, start, stop)`, which puts the numbers from `start` to `stop` together, and reads
# nothing twice.

# %%
prediction = None  # which condition says that two ranges overlap?


def my_read(files, start, stop):
    return torch.zeros(stop - start)  # your lines in place of this one


# %% jupyter={"source_hidden": true}
# One answer: the common part of each piece and what is wanted
def read(files, start, stop):
    wanted = torch.empty(stop - start)
    for begin_at, numbers in files:
        first, last = max(start, begin_at), min(stop, begin_at + len(numbers))
        if first < last:
            wanted[first - start : last - start] = numbers[first - begin_at : last - begin_at]
    return wanted


# %%
line = torch.arange(24.0)
thirds = [(start, line[start : start + 8]) for start in (16, 0, 8)]
quarters = [(0, 6), (6, 12), (12, 18), (18, 24)]
for attempt in (my_read, read):
    right = [torch.equal(attempt(thirds, *quarter), line[slice(*quarter)]) for quarter in quarters]
    print(f"{attempt.__name__:<8} right for quarters:", right)
assert all(torch.equal(read(thirds, *quarter), line[slice(*quarter)]) for quarter in quarters)

# %% [markdown] lang="en"
# **The package's version** turns a range of a flat list into boxes of a matrix, since that is what ZeRO shares are:
# the rest of a row, whole rows, the beginning of a row.

# %%
viz.show_source(checkpoint.boxes)

# %% [markdown] lang="en"
# Finding overlaps and reading them is left to `torch.distributed.checkpoint`. Each rank plans for itself: nobody
# collects lists from thousands of ranks.
#
# **Predict:** weights and Adam's numbers after loading on `Mesh(dp=4, tp=2)`, on one process, and on the old mesh: how
# far are they from what was saved? And the losses of the next two steps from those of the run that went on?

# %%
prediction = None  # (distance of the states, distance of the losses on each mesh)


def load_on(mesh, folder, zero):
    run = begin(mesh, zero=zero)
    with torch.no_grad():
        for p in run[0].parameters():
            p.zero_()  # whatever was there before
    run[2].load_state_dict(minipar.load(folder, *run[:2])["data"])
    return contents(*run[:2]), go_on(*run, 2)


print("you wrote:", prediction)
for some, mesh, zero in (eight, Mesh(dp=4, tp=2), 3), (single, Mesh(), 0), (eight, Mesh(dp=2, pp=2, tp=2), 1):
    loaded, losses = some.run(load_on, mesh, home / "eight", zero)[0]
    same = loaded.keys() == saved.keys() and all(torch.equal(loaded[name], saved[name]) for name in saved)
    off = max(abs(a - b) for a, b in zip(losses, losses_saved, strict=True))
    name = str(mesh) if mesh.size > 1 else "one process"
    print(f"{name:<23} {len(loaded)} tensors equal: {same}, losses off by {off:.0e}")
    assert same and off < 1e-12

# %% [markdown] lang="en"
# What is loaded is equal bit for bit, whatever the shape. Losses on another layout differ in the last digits, since
# sums are made in another order. (On the same mesh they can differ, too, if the number of microbatches does: here it
# saved with two, and loaded with one.)
#
# `minipar.save_weights(file, model)` writes one plain file for the rest of the world: weights only, whole, under the
# names of the unsharded model.
#
# **Exercise:** [task 03h.4](../exercises/03h_memory_and_recovery.ipynb): what each rank reads, when their number
# changes.
#
# ## 9. Killed while saving
#
# A process may be killed at any moment, in the middle of a save too. So what is on disk must be good at every moment.
#
# **Your turn.** `my_write(path, data, die)` is to replace the file `path`. It calls `die()` after a part of the bytes:
# in the test, this kills the process, as `kill -9` does, without a last word. Afterwards `path` must hold the old file
# or the new one, whole. One operation of the operating system happens entirely or not at all: `os.replace(old_name,
# new_name)`.

# %%
prediction = None  # what does the version below leave: the old file, the new one, or neither?


def my_write(path, data, die):
    with open(path, "wb") as file:
        file.write(data[: len(data) // 2])
        die()
        file.write(data[len(data) // 2 :])


# %% jupyter={"source_hidden": true}
# One answer: write elsewhere, then change the name
def write_beside(path, data, die):
    part = path.with_name(f".{path.name}.part")
    with open(part, "wb") as file:
        file.write(data[: len(data) // 2])
        die()
        file.write(data[len(data) // 2 :])
        file.flush()
        os.fsync(file.fileno())  # until it is on the disk itself
    os.replace(part, path)


# %%
def kill_9():
    os.kill(os.getpid(), signal.SIGKILL)


def what_is_left(world, write, die):
    path = home / "weights.safetensors"
    path.write_bytes(save({"weight": torch.full((1000,), 1.0)}))
    try:
        world.run(write, path, save({"weight": torch.full((1000,), 2.0)}), die)
    except RankError as error:
        assert "killed by SIGKILL" in str(error)
    try:
        return {1.0: "the old file", 2.0: "the new file"}[load_file(path)["weight"].unique().item()]
    except Exception as error:
        return f"neither: {type(error).__name__}"


print("you wrote:", prediction)
for write in (my_write, write_beside):
    left = [what_is_left(single, write, die) for die in (kill_9, list)]
    print(f"{write.__name__:<13} killed: {left[0]}; not killed: {left[1]}")
assert left == ["the old file", "the new file"]

# %% [markdown] lang="en"
# Written in place, the old file is gone with the first byte. Written beside it, the old one stays until the new one is
# complete. (`fsync` is for power failures. After a kill, the operating system still writes what it was given.)
#
# With many ranks there are many files, and they must become valid *together*. So the package writes into a hidden
# folder. When all have written, one rank renames the folder.

# %%
viz.show_source(minipar.save, checkpoint._finish)

# %% [markdown] lang="en"
# `on_all` calls a function on every rank and fails on all if it fails on one, so that nobody waits for a rank whose
# disk is full. Now kill rank 2 in the middle of a save. **Predict:** what is in the folder, and what does `latest` say?

# %%
prediction = None


def die_while_saving(folder):
    run = begin(Mesh(dp=2, pp=2))
    for _ in range(2):
        go_on(*run, 1)
        if run[0].steps == 2 and here().rank == 2:
            checkpoint._alone = lambda *_, **__: kill_9()  # in place of writing its tensors
        minipar.save(folder, *run[:2])


try:
    world.run(die_while_saving, home / "cut")
except RankError as error:
    print("rank", error.rank, "was killed")
print("you wrote:", prediction)
print("in the folder:", sorted(p.name for p in (home / "cut").iterdir()))
print("the latest:", minipar.latest(home / "cut").name)
assert minipar.latest(home / "cut").name == "step-000001" and (home / "cut" / ".step-000002").is_dir()

# %% [markdown] lang="en"
# Step 1 is whole. The hidden folder of step 2 is no checkpoint, and the next save clears it away. (The package's tests
# kill savers at random moments, and load after each kill.)
#
# **Exercise:** [task 03h.5](../exercises/03h_memory_and_recovery.ipynb): a save that may be killed at any moment.
#
# ## 10. `kill -9`, and on
#
# Everything is there for a run that outlives its ranks:


# %%
def train(folder, mesh, steps, every):
    """The loss of each step from the first one on. Goes on from the folder's latest checkpoint."""
    model, optimizer, loader = begin(mesh, microbatches=2)
    losses = []
    if minipar.latest(folder):
        found = minipar.load(folder, model, optimizer)
        loader.load_state_dict(found["data"])
        losses = found["losses"]
    for batch in loader.batches(steps - model.steps):
        losses.append(model.step(*batch, local=True).item())
        optimizer.step()
        if model.steps % every == 0:
            minipar.save(folder, model, optimizer, data=loader.state_dict(), losses=losses)
    return losses


quiet = world.run(train, home / "quiet", Mesh(dp=2, pp=2), 12, 3)[0]
print("losses without any trouble:", *(f"{loss:.3f}" for loss in quiet))

# %% [markdown] lang="en"
# The killer is a thread of this notebook. It waits for the first checkpoint, then a moment longer, and sends signal 9
# to the process of one rank: no handler runs, nothing is cleaned up. The loop around the run is the whole recovery:
# catch the `RankError`, and run again.
#
# **Predict:** are the losses equal to the quiet run's, nearly, or to the last bit?

# %%
prediction = None


def kill_when_saved(folder, process):
    while not minipar.latest(folder):
        time.sleep(0.01)
    time.sleep(0.1)
    os.kill(process, signal.SIGKILL)


def outlive(folder, mesh, victim):
    """Run, and run again, until a run ends."""
    process = world.run(os.getpid)[victim]
    killer = threading.Thread(target=kill_when_saved, args=(folder, process))
    killer.start()
    for attempt in itertools.count(1):
        try:
            losses = world.run(train, folder, mesh, 12, 3)[0]
            killer.join()
            return losses, attempt
        except RankError as error:
            print(f"attempt {attempt}: rank {error.rank} was killed, and there is a checkpoint")


# %%
losses, attempts = outlive(home / "loud", Mesh(dp=2, pp=2), victim=2)
print(f"you wrote: {prediction} - after {attempts} attempts the losses are equal: {losses == quiet}")
assert losses == quiet and attempts == 2

# %% [markdown] lang="en"
# Equal, to the last bit: weights, Adam's numbers, the rows and the dropout masks are those of the quiet run.
#
# **If the machine does not come back,** go on with fewer ranks. The run above was on four. We take up its checkpoint of
# step 9 on two, which share each matrix:

# %%
(step_9,) = (p for p in (home / "loud").iterdir() if p.name == "step-000009")
(home / "fewer").mkdir()
step_9.rename(home / "fewer" / step_9.name)
with World(2) as two:
    fewer = two.run(train, home / "fewer", Mesh(tp=2), 12, 3)[0]
off = max(abs(a - b) for a, b in zip(fewer, quiet, strict=True))
print(f"on two ranks from step 9 on: losses off by {off:.0e} at most")
assert fewer[:9] == quiet[:9] and off < 1e-12

# %% [markdown] lang="en"
# ## 11. The same under torchrun
#
# On a cluster there is no notebook that catches an error. PyTorch's launcher `torchrun` does it. It starts the ranks,
# sees when one is gone, ends the others, and starts all of them again, as often as `--max-restarts` says. The script
# has to do one thing: begin by looking for a checkpoint. [examples/elastic.py](../examples/elastic.py) is such a
# script:

# %%
script = Path("../examples/elastic.py").resolve()
text = script.read_text()
print(text[text.index("def train") : text.index("if __name__")].rstrip())

# %% [markdown] lang="en"
# It is the function of section 10. Try it in a terminal, in the folder of this repository, and kill one of its
# processes while it runs (`kill -9` and a number that `ps` shows):
#
#     torchrun --standalone --nproc-per-node 4 --max-restarts 2 examples/elastic.py checkpoints
#
# Here we do it from the notebook: start, wait until step 6 is told, `kill -9` one of the four. The script saves after
# each fourth step. **Predict:** which steps are computed twice?

# %%
prediction = None


def torchrun(folder):
    options = ["--standalone", "--nproc-per-node=4", "--max-restarts=2"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, script, folder, "--steps=10", "--every=4"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


launcher, told = torchrun(home / "torchrun"), []
for line in launcher.stdout:
    told.append(line)
    if line.startswith("step 6:"):
        break
psutil.Process(launcher.pid).children()[2].kill()  # signal 9

# %%
told += list(launcher.stdout)  # until it ends
launcher.wait()
steps = [int(line.split()[1].rstrip(":")) for line in told if line.startswith("step ")]
again = steps.index(5, 5)  # the second time
losses = json.loads(told[-1].removeprefix("losses "))

# %%
with contextlib.redirect_stdout(io.StringIO()):  # it tells its steps, too
    quiet = world.run(runpy.run_path(str(script))["train"], home / "no torchrun", 10, 4)[0]
print("you wrote:", prediction)
print("first attempt, until it was killed:", steps[:6], "- second:", steps[again:])
print("losses equal to those of a quiet run in a World:", losses == quiet)
assert steps[:6] == [1, 2, 3, 4, 5, 6] and steps[again:] == [5, 6, 7, 8, 9, 10] and losses == quiet

# %% [markdown] lang="en"
# Steps 5 and 6 (and 7, if a rank had come so far) were computed twice, and the second time they had the same losses. On
# a cluster, `torchrun` runs on each machine, all with one rendezvous address, and the folder is one that all machines
# see. (With several machines, one setting more is needed: the first lines of the script say which.) All else stays.
#
# ## 12. How often to save?
#
# Save often, and the run spends its time saving. Save seldom, and each failure throws much away. Where is the middle?
#
# Let a save take $C$ seconds, and let failures come every $M$ seconds on average (the *mean time between failures*).
# Save every $T$ seconds of work. Then per second of work:
#
# - saving costs $C/T$;
# - a failure comes every $M$ seconds, and throws away $T/2$ on average: $T/(2M)$.
#
# **Your turn.** Find the $T$ for which the sum is least: set its derivative to zero. Write `my_interval(C, M)`.
#
# **Question.** How often should one save if a save takes a minute, and a failure comes every three hours? And how much
# of the time is lost even so?

# %%
prediction = None  # (minutes, share lost)


def my_interval(save_seconds, between_failures):
    return between_failures  # your line in place of this one


# %% jupyter={"source_hidden": true}
# One answer: -C/T² + 1/(2M) = 0
def young(save_seconds, between_failures):
    return math.sqrt(2 * save_seconds * between_failures)


# %%
def lost(interval, save_seconds, between_failures):
    return save_seconds / interval + interval / (2 * between_failures)


C, M = 60, 3 * 3600
best = young(C, M)
tried = min(range(60, M), key=lambda interval: lost(interval, C, M))
print(f"you wrote: {prediction} - every {best / 60:.0f} minutes, lost: {lost(best, C, M):.1%}")
print(f"by trying every second up to {M:,}: {tried} s; by formula {best:.0f} s; yours: {my_interval(C, M):.0f} s")
assert abs(tried - best) <= 1 and math.isclose(C / best, best / (2 * M))

# %% [markdown] lang="en"
# $T = \sqrt{2CM}$ is **Young's formula** (Young 1974). At the best point both losses are equal, and their sum is
# $\sqrt{2C/M}$. Four times as many machines fail four times as often: save twice as often, and lose twice as much.
#
# It assumes that $C$ and $T$ are much smaller than $M$. Daly (2006) did it without. If failures come at random, the
# same at every moment, a piece of $T$ seconds of work and its save of $C$ take
#
# $$M\,\bigl(e^{(T+C)/M} - 1\bigr)$$
#
# seconds on average until they get through, failed attempts included. Why: an attempt at $x = T + C$ seconds ends with
# a failure or at its goal, after $M(1 - e^{-x/M})$ seconds on average. It reaches its goal with probability $e^{-x/M}$,
# so it takes $e^{x/M}$ attempts. The product of the two is the formula. (Starting again takes time too. It multiplies
# the result by a factor that does not depend on $T$.) Daly gives the best $T$ as
#
# $$T = \sqrt{2CM}\,\Bigl(1 + \tfrac13\sqrt{\tfrac{C}{2M}} + \tfrac19\,\tfrac{C}{2M}\Bigr) - C.$$
#
# We do not have to believe the average. We can play it: random failures, thousands of pieces.


# %%
def exact(interval, save_seconds, between_failures):
    """Seconds for a second of work, less one."""
    return between_failures * math.expm1((interval + save_seconds) / between_failures) / interval - 1


def daly(save_seconds, between_failures):
    ratio = save_seconds / (2 * between_failures)
    return young(save_seconds, between_failures) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_seconds


def played(interval, save_seconds, between_failures, pieces=20_000):
    draw, clock, need = random.Random(0), 0.0, interval + save_seconds
    for _ in range(pieces):
        while (failure := draw.expovariate(1 / between_failures)) < need:
            clock += failure
        clock += need
    return clock / (pieces * interval) - 1


# %%
for save_seconds in (60, 600, 3600):
    options = {"Young": young(save_seconds, M), "Daly": daly(save_seconds, M)}
    options["best"] = min(range(60, 3 * M, 10), key=lambda interval: exact(interval, save_seconds, M))
    for name, interval in options.items():
        both = exact(interval, save_seconds, M), played(interval, save_seconds, M)
        print(
            f"save {save_seconds:>4} s, {name:<5} every {interval:>6,.0f} s: lost {both[0]:6.1%}, played {both[1]:6.1%}"
        )
        assert abs(both[0] - both[1]) < 0.05 * (1 + both[0])

# %% [markdown] lang="en"
# While a save is short, Young's formula is as good as any. When it takes an hour of three, Young saves too seldom, and
# Daly's is right. Daly prints three examples, which our function must give:

# %%
printed = {24 * 60: 117, 6 * 60: 57, 15: 9.1}  # minutes between failures -> best interval, for a save of 5 minutes
for between, minutes in printed.items():
    assert abs(daly(5, between) - minutes) < 0.5, (between, daly(5, between))
    print(f"failures every {between:>4} min: Daly prints {minutes} min, our function gives {daly(5, between):.1f}")

# %% [markdown] lang="en"
# What is $M$ for a large run? Llama 3's 405B model was trained on 16,384 GPUs, and in 54 days there were 419 unexpected
# interruptions (Llama Team 2024, section 3.3.4). That is one in three hours. A single GPU with its share of host,
# cables and switches, then, fails once in some years.

# %%
between = 54 * 24 * 3600 / 419
PER_GPU = between * 16_384
print(f"one interruption in {between / 3600:.1f} hours; for one GPU: {PER_GPU / 3600 / 24 / 365:.1f} years")

drawing, (panel,) = viz.figure(7, 3.4)
minutes = [10 ** (k / 40) for k in range(-40, 121)]
cases = {"256 GPUs": 256, "2,048 GPUs": 2048, "16,384 GPUs": 16_384, "131,072 GPUs": 131_072}
for (name, gpus), color, style in zip(cases.items(), viz.PALETTE[4:], ("-", "--", "-.", ":"), strict=False):
    M = PER_GPU / gpus
    panel.loglog(minutes, [exact(60 * m, 60, M) for m in minutes], color=color, ls=style, lw=2, label=name)
    best = young(60, M)
    panel.plot(best / 60, exact(best, 60, M), "o", color=color, mec=viz.INK, ms=8)
panel.set(xlabel="minutes of work between saves", ylabel="time lost, per time of work", ylim=(3e-3, 10))
panel.set_title("A save takes one minute; dots: Young's interval", fontsize=10)
drawing.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=4)
told = "; ".join(f"{name} {young(60, PER_GPU / gpus) / 60:.0f} minutes" for name, gpus in cases.items())
viz.show(drawing, f"Lost time against the interval between saves: U-shaped curves. Best intervals: {told}.")

# %% [markdown] lang="en"
# The valleys are wide: half or twice the best interval costs little. But look at the right edge. On 16,384 GPUs,
# someone who saves once in eight hours needs nearly five times as long.
#
# **Before you move it:** on 16,384 GPUs, how short must a save be, so that less than 5 % of the time is lost?

# %%
prediction = None  # seconds


def draw_losses(gpus, save_seconds):
    M = PER_GPU / gpus
    best = max(daly(save_seconds, M), 1)
    total = exact(best, save_seconds, M)
    intervals = {"half of it": best / 2, "best interval": best, "twice": 2 * best}
    saving = [100 * save_seconds / interval for interval in intervals.values()]
    twice = [100 * exact(t, save_seconds, M) - part for t, part in zip(intervals.values(), saving, strict=True)]
    drawing = viz.draw_bars(list(intervals), {"saving": saving, "work done twice": twice}, "% of the time of work")
    title = f"{gpus:,} GPUs, a save of {save_seconds} s: every {best / 60:.1f} minutes"
    drawing.axes[0].set_title(title, fontsize=10)
    return viz.describe(drawing, f"{title}; {total:.1%} of the time of work is lost.")


explore(draw_losses, gpus=[16_384, 256, 2048, 131_072], save_seconds=[60, 300, 30, 10, 1])

# %%
enough = max(s for s in range(1, 301) if exact(daly(s, between), s, between) < 0.05)
print(f"you wrote: {prediction} - at most {enough} seconds")
assert 5 < enough < 20 and 4.5 < 1 + exact(8 * 3600, 60, between) < 5

# %% [markdown] lang="en"
# How long does a save take? It has to write at least weights and states: 12 bytes a parameter in float32, 4.9 TB for
# 405 billion. All ranks write at once, each its part, so it is the file system that counts. And one can hide it: copy
# to the host's memory, go on, and write meanwhile. Then $C$ is only the copy.
#
# On your own machine, our GPT on four ranks, beside a step of 8 rows of 32 tokens:


# %%
def step_and_save(folder):
    run, taken = begin(Mesh(dp=2, pp=2)), {"one step": [], "one save": []}
    for _ in range(5):
        for what, work in ("one step", lambda: go_on(*run, 1)), ("one save", lambda: minipar.save(folder, *run[:2])):
            start = time.perf_counter()
            work()
            taken[what].append(1000 * (time.perf_counter() - start))
    return {what: min(times) for what, times in taken.items()}


assert round(12 * 405e9 / 1e12, 1) == 4.9
taken = world.run(step_and_save, home / "timed")[0]
title = f"A checkpoint of {24 * P / 1e6:.0f} MB"
viz.show(viz.draw_bars(list(taken), {"time": list(taken.values())}, "ms, on this machine", title))

# %% [markdown] lang="en"
# ## What you have now
#
# - **activations**: what forward leaves for backward; sixteen times its input for a block with fused attention.
# - **recompute**: keep the input and run forward again: one unit a block, and 4 forwards' work in place of 3, or a
#   little less. **selective**: keep what is dear, compute what is cheap.
# - **bfloat16** loses digits, **float16** loses range. **Main weights** and long sums stay in float32.
# - **loss scale**: float16's way around small gradients; an **overflow** throws a step away, on all ranks or on none.
# - **clipping** needs the norm of the whole gradient, with each parameter counted once.
# - **dropout by place**: the same elements on every layout.
# - **checkpoint**: boxes of whole tensors, so that the next layout may be any; valid by one rename.
# - **a run** is weights, states, counters and its place in the data. With all of it, losses are equal after a kill.
# - **Young**: save every $\sqrt{2CM}$, lose $\sqrt{2C/M}$.
#
# **Try:** kill two ranks in section 10. Make `train` keep only one checkpoint (`keep=1`), and say why that is enough.
# Change the mesh in `examples/elastic.py` between two starts.
#
# ## Three questions to take along
#
# 1. A pipeline of 8 stages recomputes fully. A microbatch has 4 rows of 4,096 tokens, width 8,192, in 16 bits, and a
#    stage has 10 layers. How many bytes of activations does the first stage of 1F1B keep between forward and backward?
# 2. With `tp=4`, a colleague calls PyTorch's `clip_grad_norm_` on every rank. The loss falls. What do you look at?
# 3. A save takes 20 seconds, and a failure comes every 10 hours. How often do you save, and what share is lost?
#
# <details><summary>Answers</summary>
#
# 1. 2 × 4 × 4,096 × 8,192 bytes for a layer, times 10 layers, times 8 microbatches: 21.5 GB.
# 2. Whether copies of one parameter are still equal on the four ranks, and one clipped gradient against one process.
# 3. Every 20 minutes, and 3.3 %.
#
# </details>

# %%
assert round(2 * 4 * 4096 * 8192 * 10 * 8 / 1e9, 1) == 21.5  # the answers above
assert young(20, 36_000) == 1200 and round(lost(1200, 20, 36_000), 3) == 0.033
for some in (world, eight, single):
    some.close()
room.cleanup()

# %% [markdown] lang="en"
# **Exercises:** [five tasks](../exercises/03h_memory_and_recovery.ipynb), from a block that is computed twice to a save
# that may be killed:
#
#     python -m minipar grade exercises/03h_memory_and_recovery.ipynb
#
# **Next:** [Claims, measured](03i_claims.ipynb): what the document says is good and bad about each strategy, and when
# it holds. Or go on to [The mathematics](04a_math.ipynb): why sharded gradients equal whole ones.
#
# ## References
#
# - Chen, Xu, Zhang, Guestrin 2016, *Training deep nets with sublinear memory cost*,
#   [arxiv.org/abs/1604.06174](https://arxiv.org/abs/1604.06174)
# - Korthikanti et al. 2022, *Reducing activation recomputation in large transformer models*,
#   [arxiv.org/abs/2205.05198](https://arxiv.org/abs/2205.05198)
# - Dao et al. 2022, *FlashAttention*, [arxiv.org/abs/2205.14135](https://arxiv.org/abs/2205.14135)
# - Micikevicius et al. 2018, *Mixed precision training*, [arxiv.org/abs/1710.03740](https://arxiv.org/abs/1710.03740)
# - Pascanu, Mikolov, Bengio 2013, *On the difficulty of training recurrent neural networks*,
#   [arxiv.org/abs/1211.5063](https://arxiv.org/abs/1211.5063)
# - Salmon, Moraes, Dror, Shaw 2011, *Parallel random numbers: as easy as 1, 2, 3*,
#   [doi.org/10.1145/2063384.2063405](https://doi.org/10.1145/2063384.2063405)
# - Young 1974, *A first order approximation to the optimum checkpoint interval*,
#   [doi.org/10.1145/361147.361115](https://doi.org/10.1145/361147.361115)
# - Daly 2006, *A higher order estimate of the optimum checkpoint interval for restart dumps*,
#   [doi.org/10.1016/j.future.2004.11.016](https://doi.org/10.1016/j.future.2004.11.016)
# - Llama Team 2024, *The Llama 3 herd of models*, [arxiv.org/abs/2407.21783](https://arxiv.org/abs/2407.21783)
