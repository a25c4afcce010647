# %% [markdown] lang="en"
# # Tools
#
# So far everything ran on minipar. It is made for reading. What you will train with at work is another tool:
# PyTorch's own, Megatron-LM, DeepSpeed, on a cluster with a queue. At the end of this chapter you can
#
# - write one training step with four of PyTorch's tools, show that each computes what minipar does, and say what each
#   does better;
# - read a command line of Megatron-LM, and look up what DeepSpeed, torchtitan, accelerate, JAX and TensorFlow call a
#   thing;
# - find out which kernels a step spends its time in, and see them below the boxes of a pipeline;
# - start a run on several nodes with torchrun, Slurm or Kubernetes;
# - publish a model so that others can check what they have got;
# - choose what to read next.
#
# **Time:** about two hours and a half. **You need:** [data](03a_data_parallel.ipynb),
# [tensor](03b_tensor_parallel.ipynb) and [pipeline parallelism](03c_pipeline_parallel.ipynb). The chapter mirrors
# sections 7.1 to 7.4 of the document that this course follows and tests, 《大规模语言模型从理论到实践 混合并行》: its
# list of tools (7.2) is sections 1 to 4 here, its other resources (7.4) section 5, its books and papers (7.1, 7.3)
# section 6.
#
# **How to read it.** As before: write your prediction into the cell before you run it.
#
# ## Three questions on the chapters before
#
# 1. A model's gradient has $M$ bytes. What does each of $n$ ranks send in a step with plain data parallelism, and
#    what with ZeRO-3?
# 2. How many all-reduces does a block need under tensor parallelism, forward and backward together?
# 3. What travels from one pipeline stage to the next, and how many numbers are that?
#
# <details><summary>Answers</summary>
#
# 1. $2\frac{n-1}{n}M$, and $3\frac{n-1}{n}M$: the weights twice, the gradients once.
# 2. Four: two forward, two backward.
# 3. A microbatch's activations at the boundary: rows × positions × width numbers. Their gradients come back, as many.
#
# </details>

# %%
import contextlib
import hashlib
import json
import math
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from IPython.display import Markdown, display
from safetensors import safe_open
from torch import nn

# %%
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

import minipar
from minipar import CLUSTERS, Config, Layout, Mesh, World, corpus, here, ledger, parallelize, viz
from minipar.course.dictionary import FRAMEWORKS, ROWS, SOURCES, lookup, read_megatron

world = World(2)

# %% [markdown] lang="en"
# ## 1. The same step, four times
#
# The document names three tools: TensorFlow, PyTorch, Transformers. That is where most people start. For large models
# PyTorch itself brings four tools of interest to us:
#
# | tool | what it does | in minipar |
# |---|---|---|
# | `DistributedDataParallel` (DDP) | data parallelism (Li et al. 2020) | `Mesh(dp=2)` |
# | `fully_shard` (FSDP2) | shares out parameters, as ZeRO-3 (Zhao et al. 2023) | `zero=3` |
# | `parallelize_module` (DTensor) | tensor parallelism | `Mesh(tp=2)` |
# | `torch.distributed.pipelining` | pipelines | `Mesh(pp=2)` |
#
# We give all of them the same small GPT, the same eight rows of text and two ranks, in float64. First the truth, one
# process.

# %%
config = Config()  # 4 blocks of width 128
tokens, targets = next(corpus.batches(steps=1, rows=8, context=32))


def fresh():
    torch.manual_seed(0)
    return minipar.gpt(config).double()


def mean_loss(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


model = fresh()
loss = mean_loss(model(tokens), targets)
loss.backward()
truth = {name: p.grad for name, p in model.named_parameters()}
P = sum(p.numel() for p in model.parameters())
M = 8 * P
print(f"loss {loss.item():.6f}, {P:,} parameters; the gradient has M = {M:,} bytes in float64")

# %% [markdown] lang="en"
# What does a tool send? minipar keeps a [ledger](../docs/glossary.md#ledger), others do not. But on two CPUs all of
# them end in the same few calls of gloo, and torch's **[profiler](../docs/glossary.md#profiler)** records each call
# with the shape of what it is given. So we count there, for everybody alike. With two ranks, as in [chapter
# 2b](02b_ranks_and_collectives.ipynb), an all-reduce sends its tensor once. An all-gather is given this rank's half
# and sends all of it. An all-to-all sends half of its tensor, and a send what it carries. `SENDS` says so:

# %%
SENDS = {"gloo:all_reduce": 1, "gloo:all_gather": 1, "gloo:all_to_all": 0.5, "gloo:send": 1}


@contextlib.contextmanager
def quiet():
    """On stderr torch's profiler says that it begins and ends. Not to us."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)


# %%
def measured(step, gradients):
    """On a rank: loss, gradients, and {operation: [calls, bytes sent]} of one step, after two to warm up."""
    step()
    step()
    with quiet(), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as p:
        loss = step()
    sent = defaultdict(lambda: [0, 0])
    for event in p.profiler.kineto_results.events():
        if event.name() in SENDS:
            call = sent[event.name().removeprefix("gloo:")]
            call[0] += 1
            call[1] += int(8 * SENDS[event.name()] * math.prod(event.shapes()[0]))  # float64
    return loss, gradients(), dict(sent)


# %%
def mine(batch):
    return batch.chunk(2)[here().rank]


def with_minipar(mesh, **options):
    model = parallelize(fresh(), mesh, **options)
    book = None

    def step():
        nonlocal book
        with ledger() as book:
            return model.step(tokens, targets).item()

    found = measured(step, model.full_gradients)
    assert book.bytes() == sum(size for _, size in found[2].values()), "the ledger says the same"
    return found


# %% [markdown] lang="en"
# And one function holds every tool against the truth. Each rank may have gradients of other parameters (a stage has
# only its own). Together they have to be all, and the same. How far they are apart is printed as a share of the
# largest gradient.

# %%
results = {}


def compare(name, answers):
    """Gradients of all ranks against one process. Prints and keeps what rank 0 sent."""
    found = {parameter: g for _, gradients, _ in answers for parameter, g in gradients.items()}
    largest = max(g.abs().max() for g in truth.values())
    far = max(((found[p] - g).abs().max() / largest).item() for p, g in truth.items())
    losses = [loss for loss, *_ in answers if loss is not None]
    assert found.keys() == truth.keys() and far < 1e-12
    assert abs(sum(losses) / len(losses) - loss.item()) < 1e-12
    results[name] = answers[0][2]
    print(f"{name}: gradients apart by {far:.0e}, losses", *(f"{x:.4f}" for x in losses))
    for operation, (calls, size) in results[name].items():
        print(f"    {operation:<12} {calls:>3} calls {size:>11,} bytes")


# %% [markdown] lang="en"
# ### DDP
#
# **Question.** DDP sums gradients in [buckets](../docs/glossary.md#bucket), the first of 1 MiB, the others of up to
# 25 MiB. minipar's have 4 MiB. Who sends more, and in how many calls? ($M$ was printed above.)

# %%
prediction = None  # (calls of DDP, calls of minipar, who sends more)


def with_ddp():
    module = fresh()
    model = DistributedDataParallel(module)

    def step():
        module.zero_grad()
        loss = mean_loss(model(mine(tokens)), mine(targets))
        loss.backward()
        return loss.item()

    return measured(step, lambda: {name: p.grad for name, p in module.named_parameters()})


compare("DDP", world.run(with_ddp))
compare("minipar, dp=2", world.run(with_minipar, Mesh(dp=2)))
print("you wrote:", prediction)
assert results["DDP"] == {"all_reduce": [2, M]} and results["minipar, dp=2"] == {"all_reduce": [3, M + 16]}

# %% [markdown] lang="en"
# The same $M$ bytes, in two buckets on either side: 1 MiB and the rest, or 4 MiB and the rest. minipar's third call
# has 16 bytes: the sum of the losses and the number of tokens, so that each rank has the loss of the whole batch.
# DDP's ranks have the losses of their own rows.
#
# That difference goes deeper. DDP takes the *mean* of the ranks' gradients. That is right if all ranks have as many
# tokens that count. What if they do not? Let the last four rows be padding after their tenth token. Padded targets
# are −100, which `cross_entropy` leaves out.

# %%
uneven = targets.clone()
uneven[4:, 10:] = -100
model = fresh()
mean_loss(model(tokens), uneven).backward()
right = torch.cat([p.grad.flatten() for p in model.parameters()])


def off(gradients):
    got = torch.cat([g.flatten() for g in gradients])
    return ((got - right).norm() / right.norm()).item()


# %%
def uneven_ddp():
    model = DistributedDataParallel(fresh())
    mean_loss(model(mine(tokens)), mine(uneven)).backward()
    return off([p.grad for p in model.parameters()])


def uneven_minipar():
    model = parallelize(fresh(), Mesh(dp=2))
    model.step(tokens, uneven)
    return off(model.full_gradients().values())


ddp, own = world.run(uneven_ddp)[0], world.run(uneven_minipar)[0]
print(f"off by, as a share of the gradient: DDP {ddp:.0%}, minipar {own:.0e}")
assert ddp > 0.2 and own < 1e-12

# %% [markdown] lang="en"
# Rank 1 has 40 tokens that count, rank 0 has 128, and both means weigh the same. Not a bug of DDP: it was never told
# how many tokens count.
#
# **Your turn.** Mend it. Sum the losses of your own tokens, find out how many tokens count on all ranks together
# (`dist.all_reduce`), and remember that DDP will divide by the number of ranks. Our answer is in the next cell. To
# try yours, put its name in place of `our_loss` in the last lines there.


# %%
def your_loss(logits, labels):
    """What to call backward() on, so that DDP's mean of gradients is that of the whole batch."""
    return None


# %%
def our_loss(logits, labels):
    count = (labels != -100).sum()
    dist.all_reduce(count)
    return 2 * F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / count


def mended_ddp(loss):
    model = DistributedDataParallel(fresh())
    loss(model(mine(tokens)), mine(uneven)).backward()
    return off([p.grad for p in model.parameters()])


mended = world.run(mended_ddp, our_loss)[0]
print(f"off by {mended:.0e}")
assert mended < 1e-12

# %% [markdown] lang="en"
# (Give the wrapper a name. In `DistributedDataParallel(module)(tokens)` nobody holds it. It is gone before backward
# begins, and nothing is summed, without a word. We did that first.)
#
# One number travels, and the gradient is right. Many training scripts leave it out. transformers' Trainer does it by
# default now (its option is called average_tokens_across_devices).
#
# **What DDP does better.** It has had many users for many years, on CPUs and GPUs. It finds parameters that got no
# gradient (find_unused_parameters), compresses gradients by hooks, works with `torch.compile`, and with any module: it
# does not ask for a list of blocks. In [our benchmark](../benchmarks/README.md), on two CPUs, a step takes minipar
# 1.03 times as long.
#
# ### FSDP2
#
# `fully_shard` is called on each block and then on the model. Its parameters are then DTensors, of which each rank
# has a share. A block's weights are gathered before its forward and again before its backward, and its gradients
# are reduce-scattered: [ZeRO-3](../docs/glossary.md#zero).
#
# **Question.** What is gathered at once is a unit. Here it is each of the four blocks, and the rest of the model
# (embeddings, last norm, head) as a fifth. How many all-gathers does a step have?

# %%
prediction = None  # (of FSDP2, of minipar)


def with_fsdp():
    model, mesh = fresh(), init_device_mesh("cpu", (2,))
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh)

    def step():
        model.zero_grad()
        loss = mean_loss(model(mine(tokens)), mine(targets))
        loss.backward()
        return loss.item()

    return measured(step, lambda: {name: p.grad.full_tensor() for name, p in model.named_parameters()})


compare("FSDP2", world.run(with_fsdp))
compare("minipar, zero=3", world.run(with_minipar, Mesh(dp=2), zero=3))
print("you wrote:", prediction)
gathers = [results[name]["all_gather"][0] for name in ("FSDP2", "minipar, zero=3")]
assert gathers == [9, 10]

# %% [markdown] lang="en"
# minipar gathers five units twice. FSDP2 has nine gathers. Its outermost unit (the rest of the model) is needed last
# in forward and first in backward, so FSDP2 keeps it. That saves the bytes of one gather. minipar should do so, too.
#
# In the second line FSDP2 sends more: its reduce-scatter shows up as an all-reduce. That is gloo's doing, not
# FSDP2's: gloo has no reduce-scatter of its own, and on a GPU, over NCCL, half of these bytes would travel. minipar
# writes it as an all-to-all and a local sum, so it sends half on any backend. Counted as on NCCL:

# %%
fsdp = results["FSDP2"]
on_nccl = fsdp["all_gather"][1] + fsdp["all_reduce"][1] // 2
zero3 = sum(size for _, size in results["minipar, zero=3"].values())
print(f"a rank sends: FSDP2 on gloo {fsdp['all_gather'][1] + fsdp['all_reduce'][1]:,} bytes, on NCCL {on_nccl:,}")
print(f"minipar on either {zero3:,}: three halves of M, and 16")
assert zero3 == 3 * M // 2 + 16 and on_nccl < zero3

# %% [markdown] lang="en"
# So over NCCL FSDP2 sends 5 percent less than minipar: the one gather that it saves.
#
# **What FSDP2 does better.** On GPUs it gathers the next unit in a queue of its own (a CUDA stream) while this one
# computes. It has a policy for mixed precision (`torch.distributed.fsdp.MixedPrecisionPolicy`), moves shares to the
# CPU if asked (`torch.distributed.fsdp.CPUOffloadPolicy`), keeps each parameter's shape, and composes with DTensor and
# `torch.compile`. In [our benchmark](../benchmarks/README.md) minipar takes 0.90 of its time, but on two CPUs, for
# which FSDP2 is not made. For a real run on GPUs take FSDP2. With minipar you need not choose: `wrap=` puts it around
# each stage, and the pipeline stays minipar's. Its gradients, as before:


# %%
def wrapped():
    model = parallelize(fresh(), Mesh(dp=2), wrap=lambda stage, mesh: fully_shard(stage, mesh=mesh["dp"]))
    return model.step(tokens, targets).item(), model.full_gradients(), {}


compare("FSDP2 inside of minipar", world.run(wrapped))
del results["FSDP2 inside of minipar"]

# %% [markdown] lang="en"
# ### DTensor
#
# torch's tensor parallelism is a plan: for each layer by name, `ColwiseParallel` or `RowwiseParallel`. minipar's
# plans look alike, with words in place of classes (`"colwise"`), since both follow Megatron-LM: first columns, then
# rows.


# %%
def with_dtensor():
    model, mesh = fresh(), init_device_mesh("cpu", (2,))
    whole = Replicate()
    plan = {
        "embed.token": RowwiseParallel(input_layouts=whole, output_layouts=whole),
        "head": ColwiseParallel(output_layouts=whole),
    }
    for i in range(config.depth):
        block = f"blocks.{i}"
        plan |= {f"{block}.{x}": ColwiseParallel() for x in ("attention.q", "attention.k", "attention.v", "mlp.up")}
        plan |= {f"{block}.{x}": RowwiseParallel() for x in ("attention.out", "mlp.down")}
        plan[f"{block}.attention"] = PrepareModuleInput(input_layouts=(whole,), desired_input_layouts=(whole,))
    parallelize_module(model, mesh, plan)

    def step():
        model.zero_grad()
        loss = mean_loss(model(tokens), targets)
        loss.backward()
        return loss.item()

    grads = [(name, p) for name, p in model.named_parameters()]
    return measured(step, lambda: {n: p.grad.full_tensor() if isinstance(p, DTensor) else p.grad for n, p in grads})


# %% [markdown] lang="en"
# The line with `PrepareModuleInput` is one that is easily left out. It makes the input of attention a DTensor once.
# Then the gradients that come back from q, k and v are added before they travel. Without it the result is the same,
# with three all-reduces in place of one.
#
# **Question.** Each of the four blocks has four all-reduces. The embedding, whose rows are cut, has one more, and so
# has the input of the head, in backward. That makes 18. What else has to travel, so that the loss can be computed?

# %%
prediction = None  # in words

compare("DTensor", world.run(with_dtensor))
compare("minipar, tp=2", world.run(with_minipar, Mesh(tp=2)))
print("you wrote:", prediction)
A = 8 * 8 * 32 * 128  # bytes of the activations: rows x positions x width
assert results["DTensor"] == {"all_reduce": [18, 18 * A], "all_gather": [1, 2 * A]}
assert results["minipar, tp=2"] == {"all_reduce": [20, 18 * A + 3 * 8 * 256]}

# %% [markdown] lang="en"
# 18 all-reduces each, of the same size. Then DTensor gathers the logits: for each token of the text a number for each
# token of the vocabulary. With our vocabulary of 512 that is as much as two more all-reduces; with 128,000 it would be
# more than all else. minipar computes the loss where the logits are. Its other two calls send three numbers for each
# token of the text. DTensor can do that, too
# (`torch.distributed.tensor.parallel.loss_parallel`): it is not the default.
#
# **What DTensor does better.** It is a tensor that knows how it is cut, so it works for any operator and any model,
# and for meshes of several dimensions. A checkpoint of DTensors knows its layout. Its price is Python: each
# operator passes a dispatcher, code that looks up what to do with tensors cut like these. In [our
# benchmark](../benchmarks/README.md) minipar takes 0.80 of its time with the usual plan, 0.89 with the best one.
#
# ### Pipelining
#
# In torch you cut the model yourself, into a module for each stage, and torch runs the schedule. (It can also cut by
# tracing, with `torch.distributed.pipelining.pipeline` and `torch.distributed.pipelining.SplitPoint`.)


# %%
class Half(nn.Module):
    """The first or the second half of the model, under the names of the whole."""

    def __init__(self, model, stage):
        super().__init__()
        half = len(model.blocks) // 2
        self.embed = model.embed if stage == 0 else nn.Identity()
        self.blocks = nn.ModuleDict({str(half * stage + i): model.blocks[half * stage + i] for i in range(half)})
        self.norm, self.head = (model.norm, model.head) if stage else (nn.Identity(), nn.Identity())

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks.values():
            x = block(x)
        return self.head(self.norm(x))


# %%
def with_pipelining():
    rank, losses = here().rank, []
    half = Half(fresh(), rank)
    stage = PipelineStage(half, rank, 2, torch.device("cpu"))
    schedule = Schedule1F1B(stage, n_microbatches=4, loss_fn=mean_loss)

    def step():
        losses.clear()
        half.zero_grad()
        if rank == 0:
            schedule.step(tokens)
            return None
        schedule.step(target=targets, losses=losses)
        return torch.stack(losses).mean().item()

    return measured(step, lambda: {name: p.grad for name, p in half.named_parameters()})


compare("pipelining", world.run(with_pipelining))
compare("minipar, pp=2", world.run(with_minipar, Mesh(pp=2), microbatches=4))
assert results["pipelining"] == {"send": [4, A]} and results["minipar, pp=2"]["send"] == [4, A]

# %% [markdown] lang="en"
# Four sends of a microbatch each, to the byte the same. In torch only the last rank knows the loss, and the loss
# function gives a mean, so unequal microbatches have the same trap as above.
#
# **What torch's pipelining does better.** It takes any module as a stage, has schedules that minipar lacks (breadth
# first, DualPipeV), and knows when a stage is an FSDP2 module that has to be gathered. In [our
# benchmark](../benchmarks/README.md) both take as long for 1F1B (ratio 1.01). For the interleaved schedule minipar
# takes 1.07 times as long, give or take: 0.98 to 1.12.
#
# ### All together

# %%
rows = list(results)
operations = ("all_reduce", "all_gather", "all_to_all", "send")
parts = {o.replace("_", "-"): [results[r].get(o, (0, 0))[1] / 1e6 for r in rows] for o in operations}
viz.show(viz.draw_bars(rows, parts, "MB that a rank sends in a step, over gloo", "The same step, the same gradients"))

# %% [markdown] lang="en"
# Four pairs. In two of them the bars are of the same length, and in a third (tensor parallelism) the difference is
# the gathered logits. In the fourth, FSDP2's bar is long because of gloo: over NCCL it would be 10.7. The algorithms
# leave little choice. What differs is what is around them.
#
# | | torch's four | minipar |
# |---|---|---|
# | to combine them | you nest four interfaces, in the right order | one call, one mesh |
# | the loss | yours to weigh | divided by the global count |
# | GPUs, compilers, many years of users | yes | not tested, no, no |
# | when ranks wait for each other | a timeout, later | a report: who waits for whom, on which line |
# | meant for | training | understanding |
#
# So: learn here, and train there. [torchtitan](https://github.com/pytorch/torchtitan) is the place to see torch's
# four nested (Liang et al. 2024).

# %% [markdown] lang="en"
# ## 2. What others call it
#
# Every framework has the same handful of ideas, and its own word for each. `minipar.course.dictionary` is a table of
# twenty of them.


# %%
def table(frameworks):
    """Rows of the dictionary, minipar's side first."""
    lines = [f"| | minipar | {' | '.join(f'[{FRAMEWORKS[f]}]({SOURCES[f]})' for f in frameworks)} |"]
    lines.append("|---" * (2 + len(frameworks)) + "|")
    for row in ROWS:
        cells = [row.minipar, *(getattr(row, framework) for framework in frameworks)]
        lines.append(f"| {row.what} | " + " | ".join(f"`{cell}`" if cell else "" for cell in cells) + " |")
    display(Markdown("\n".join(lines)))


table(["megatron", "deepspeed"])

# %%
table(["torchtitan", "accelerate"])

# %%
table(["jax", "tensorflow"])

# %% [markdown] lang="en"
# An empty cell means that we found nothing that does the same by a flag or a name, as of November 2026. (accelerate
# can also hand a run over to DeepSpeed or Megatron-LM, and then takes what those have.) Four things to know when you
# read such tables:
#
# - **Data ranks are what is left.** Megatron-LM and DeepSpeed have no flag for them: ranks divided by all other
#   sizes.
# - **Experts are counted in two ways.** In Megatron-LM and torchtitan they live on the data ranks: `ep` takes nothing
#   from the number of ranks. In minipar they are an axis beside `dp`. The rows are shared out over both, so
#   `Mesh(dp=2, ep=8)` here is what Megatron calls 16 data ranks with 8 of them for experts.
# - **A microbatch is a size or a number.** `--micro-batch-size` counts rows, `microbatches=` counts pieces.
# - **JAX and TensorFlow's DTensor have no names for strategies at all.** You say how each array lies on the mesh,
#   and the compiler finds out what has to travel (Xu et al. 2021 describe how). What others call data or tensor
#   parallelism is which dimension you name. A pipeline does not come out of that. You write it, with sends.
#
# One word, looked up:

# %%
for row in lookup("recompute"):
    print(f"{row.what}: {row.minipar}")
    for framework, name in FRAMEWORKS.items():
        if getattr(row, framework):
            print(f"    {name:<12} {getattr(row, framework)}")

# %% [markdown] lang="en"
# **Question.** Here is a command line of Megatron-LM, for 128 GPUs. Which mesh is it, and how many microbatches does
# each data rank have? The other sizes are written out. The data ranks are not.

# %%
prediction = None  # (dp, pp, tp), microbatches

COMMAND = """
torchrun --nnodes 16 --nproc-per-node 8 pretrain_gpt.py --num-layers 80 --hidden-size 8192
    --tensor-model-parallel-size 8 --pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 5
    --micro-batch-size 1 --global-batch-size 256 --sequence-parallel --use-distributed-optimizer
    --recompute-granularity selective --overlap-grad-reduce --bf16
"""
axes, options = read_megatron(COMMAND, ranks=128)
print("you wrote:", prediction)
print("mesh:   ", Mesh(**axes))
print("options:", ", ".join(f"{name}={value}" for name, value in options.items()))
assert Mesh(**axes).size == 128 and (axes["dp"], options["microbatches"]) == (4, 64)

# %% [markdown] lang="en"
# 128 ranks over 8 × 4 leave four data ranks, and 256 rows over four ranks of one row each are 64 microbatches. Eighty
# blocks in four stages are twenty a rank; in pieces of five, each rank has four thin stages.
#
# So any command line can be priced before it is started. What would the same run take without the distributed
# optimizer, without interleaving, and with `tp` twice as wide?

# %%
cluster = CLUSTERS["h100"].of(128)


def priced(command):
    axes, options = read_megatron(command, ranks=128)
    chunks = 80 // axes["pp"] // 5 if options["schedule"] == "interleaved" else 1
    layout = Layout(
        Mesh(**axes),
        options["microbatches"],
        "interleaved" if chunks > 1 else "1f1b",
        chunks,
        options.get("zero", 0),
        sequence_parallel=options["sequence_parallel"],
        recompute=options["recompute"],
    )
    return minipar.predict("llama-70b", layout, cluster, 256, 4096)


changes = {
    "as it stands": ("", ""),
    "without the distributed optimizer": ("--use-distributed-optimizer", ""),
    "without interleaving": ("--num-layers-per-virtual-pipeline-stage 5", ""),
    "tp=16, across two nodes": ("--tensor-model-parallel-size 8", "--tensor-model-parallel-size 16"),
}
# %%
steps = {name: priced(COMMAND.replace(*change)) for name, change in changes.items()}
for name, step in steps.items():
    print(f"{name:<34} {step.seconds:5.2f} s, {step.peak_memory / 1e9:3.0f} GB{'' if step.fits else ', does not fit'}")
first, whole, plain, wide = steps.values()
assert first.seconds < plain.seconds and first.seconds < wide.seconds / 1.5 and first.peak_memory < whole.peak_memory

# %% [markdown] lang="en"
# These are predictions for llama-70b with rows of 4,096 tokens, with the assumptions of
# [chapter 4b](04b_cost_models.ipynb). The distributed optimizer costs no time and saves 20 GB a GPU: a reduce-scatter
# and an all-gather send what one all-reduce does. Interleaving saves 3 percent of the time and takes 2 GB. `tp=16` has
# its all-reduces between nodes, and the step takes half as long again. A difference of a few percent is less than what
# such a prediction is off by. The last one you can rely on.
#
# `read_megatron` is short. It shows what such a program works out from its flags before the first step:

# %%
viz.show_source(read_megatron)

# %% [markdown] lang="en"
# ## 3. Where does the time go?
#
# minipar records when a rank worked on which microbatch. It does not say what it did in that time. torch's profiler
# does: it notes begin and end of every **[kernel](../docs/glossary.md#kernel)**, each function that does the
# arithmetic of one operator. We run both in the same step, on two pipeline ranks with four microbatches. Other programs
# on the machine disturb a step, so we take the fastest of eight.
#
# **Question.** Of the time in which rank 1 computes, how much are matrix products? What comes second?

# %%
prediction = None  # (percent, what is second)

KINDS = {
    "matrix products": r"(add|b|badd)?mm_?",
    "attention": r"_scaled_dot_product.*",
    "normalization": r"native_layer_norm.*",
    "activation function": r"gelu.*",
    "softmax and loss": r"_log_softmax.*|nll_loss.*",
    "copies and sums": r"(copy|add|sum|mul|fill|cat|div)_?",
}


def kind_of(name):
    return next((kind for kind, names in KINDS.items() if re.fullmatch(names, name.removeprefix("aten::"))), None)


# %%
long_tokens, long_targets = next(corpus.batches(steps=1, rows=8, context=128))


def profiled_steps(folder):
    """On a rank: the fastest of 8 profiled steps, and the times of as many with and without, in turns."""
    torch.set_num_threads(1)
    model, took = parallelize(minipar.gpt(config), Mesh(pp=2), microbatches=4), {False: [], True: []}
    for turn in range(16):
        looked = turn % 2 == 1
        with quiet(), profile(activities=[ProfilerActivity.CPU]) if looked else contextlib.nullcontext() as p:
            dist.barrier()
            start = time.perf_counter()
            model.step(long_tokens, long_targets)
            slowest = torch.tensor(time.perf_counter() - start)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)  # of the two ranks
        took[looked].append(slowest.item())
        if looked and slowest.item() == min(took[True]):
            best, timeline = p, model.timeline()
            zero = model.spans[0][1] - timeline.of(here().rank)[0].start  # of the timeline, on this rank's perf_counter
            zero += (time.time_ns() - time.perf_counter_ns()) / 1e9  # ... and on the clock that the profiler reads
    best.export_chrome_trace(str(folder / f"rank{here().rank}.json"))
    events = best.profiler.kineto_results.events()
    kernels = [(e.name(), e.start_ns() / 1e9 - zero, e.duration_ns() / 1e9) for e in events if e.name()[:4] == "aten"]
    return timeline, kernels, took


# %% [markdown] lang="en"
# Two clocks have to meet. minipar's spans are on `perf_counter`, which counts from an unknown moment. The
# profiler's are on the time of day. Read both at once, and the difference takes one to the other.
#
# torch's own operators begin with `aten::` there. One inside another (`aten::linear` calls `aten::addmm`) would be
# counted twice. So each one's time is what its own inner ones leave:


# %%
def own_seconds(kernels):
    """[(name, start, seconds), ...] of one rank -> seconds by kind, without what inner kernels take."""
    found, open_ones = defaultdict(float), []
    for name, start, seconds in sorted(kernels, key=lambda kernel: (kernel[1], -kernel[2])):
        while open_ones and open_ones[-1][1] <= start:
            open_ones.pop()
        if open_ones:
            found[open_ones[-1][0]] -= seconds
        kind = kind_of(name) or "all else"
        found[kind] += seconds
        open_ones.append((kind, start + seconds))
    return found


traces = tempfile.TemporaryDirectory()
folder = Path(traces.name)
answers = world.run(profiled_steps, folder)
timeline, kernels, took = answers[1][0], [answer[1] for answer in answers], answers[1][2]
shares = [own_seconds(some) for some in kernels]
total = sum(shares[1].values())
print("you wrote:", prediction, "- rank 1:")
for kind, seconds in sorted(shares[1].items(), key=lambda item: -item[1]):
    print(f"{kind:<20} {seconds / total:4.0%}")
assert max(shares[1], key=shares[1].get) == "matrix products" and shares[1]["matrix products"] > 0.3 * total

# %% [markdown] lang="en"
# Matrix products lead, as they should: they are what [FLOPs](../docs/glossary.md#flop) are counted for. Attention was
# second when we ran it. It is two matrix products and a softmax in one fused kernel, and it grows with the length of a
# row. What the other lines name does a few FLOPs for each number, and every call costs some microseconds, however small
# its tensors. The wider the model, the larger the first line has to become. If it does not, something is wrong.
#
# Below the boxes of the pipeline, kernel by kernel:


# %%
def draw_kernels(panel, kernels, length):
    """A row a rank, a bar a kernel, in milliseconds."""
    for color, kind in zip(viz.PALETTE[2:], KINDS, strict=False):  # the first two are taken, above
        for rank, some in enumerate(kernels):
            bars = [(1e3 * start, 1e3 * seconds) for name, start, seconds in some if kind_of(name) == kind]
            panel.broken_barh(bars, (rank - 0.4, 0.8), facecolors=color, label=kind if rank == 0 else None)
    panel.set(xlim=(0, length), ylim=(len(kernels) - 0.5, -0.5), xlabel="time (ms)")
    panel.set_yticks(range(len(kernels)), [f"rank {rank}" for rank in range(len(kernels))])
    panel.legend(frameon=False, ncols=3, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.32))


drawing, (above, below) = viz.figure(9, 4.4, rows=2)
viz.draw(timeline, above, unit="ms")
draw_kernels(below, kernels, above.get_xlim()[1])
below.set_title("kernels", loc="left", fontsize=10)
alt = (
    "A step of two pipeline ranks twice, on one time axis: above, boxes of forwards and backwards with their "
    "microbatch; below, the kernels inside, colored by kind. Where a box is, there are kernels, "
    "most of them matrix products; where a rank waits, there are none."
)
viz.show(drawing, alt)

# %% [markdown] lang="en"
# What to look for: kernels stop where a box ends, and gaps in the lower rows within a box are Python, which decides
# what comes next (or another program that has the core). A kernel ten times as long as its likes was interrupted by
# another program. If there are more gaps than kernels, no faster GPU will help.
#
# **Is looking free?** The same step without and with the profiler, and what it writes:

# %%
middle = {looked: sorted(some[1:])[len(some) // 2 - 1] for looked, some in took.items()}
raw = (folder / "rank0.json").stat().st_size
print(f"without {1e3 * middle[False]:.0f} ms, with {1e3 * middle[True]:.0f} ms, the middle of seven steps each")
print(f"one step of one rank is {raw / 1e6:.1f} MB of JSON")
print(f"{len(kernels[0])} kernels recorded on rank 0")

# %% [markdown] lang="en"
# If your two times are about the same, it is because a kernel takes much longer than the note of it. Where
# kernels are short, or where shapes and call stacks are noted, too, it is more. What costs in any case is the file: a
# thousand steps of one rank are more than a gigabyte.
#
# So profile a few steps in the middle of a run, not the run: `torch.profiler.schedule(wait=…, warmup=…, active=…)`
# does that. And keep times apart: those from a profiled step say where time goes, not how much there is.
#
# ### In Perfetto
#
# The raw file of a rank opens in [ui.perfetto.dev](https://ui.perfetto.dev), a viewer for traces in the browser: zoom
# with W and S, move with A and D, click for details. Two ranks are two files, though, and Perfetto does not know that
# they belong together. The trace format is simple enough to put them into one: a list of events, each with a
# process (`pid`, for us a rank) and a thread (`tid`, for us a row). We keep names and times only.


# %%
def event(rank, row, name, start, seconds, **more):
    """A box in Chrome's trace format. Times are in microseconds."""
    return {"ph": "X", "pid": rank, "tid": row, "name": name, "ts": 1e6 * start, "dur": 1e6 * seconds, **more}


def named(rank):
    rows = {0: "pipeline", 1: "kernels"}
    yield {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}}
    for row, name in rows.items():
        yield {"ph": "M", "name": "thread_name", "pid": rank, "tid": row, "args": {"name": name}}


events = [label for rank in range(2) for label in named(rank)]
events += [event(s.rank, 0, f"{s.action}", s.start, s.end - s.start, cat=s.action.op.name) for s in timeline.spans]
events += [event(rank, 1, *kernel, cat=kind_of(kernel[0]) or "else") for rank in range(2) for kernel in kernels[rank]]
merged = folder / "step.json"
merged.write_text(json.dumps({"traceEvents": events}))
print(f"{len(events)} events, {merged.stat().st_size / 1e6:.2f} MB")
assert merged.stat().st_size < raw and len(events) == 6 + len(timeline.spans) + sum(map(len, kernels))

# %% [markdown] lang="en"
# To look at it, set a name of your own for `KEEP`, run the cell, and drag the file into
# [ui.perfetto.dev](https://ui.perfetto.dev). The page runs in your browser, and the trace stays there. Nothing in
# this notebook sends it anywhere.

# %%
KEEP = None  # "step.json", for instance

if KEEP:
    Path(KEEP).write_bytes(merged.read_bytes())
print(f"kept in {KEEP}" if KEEP else "not kept")

# %% [markdown] lang="en"
# `python -m minipar train --trace step.json` writes the upper row of each rank by itself, for any mesh. Other tools
# that you will meet: NVIDIA's [Nsight Systems](https://developer.nvidia.com/nsight-systems), which also sees the GPU's
# own queue, and [Holistic Trace Analysis](https://github.com/facebookresearch/HolisticTraceAnalysis), which reads many
# ranks' files of torch's profiler at once.

# %% [markdown] lang="en"
# ## 4. On a cluster
#
# A `World` starts ranks on your machine. On a cluster somebody else does: a
# **[scheduler](../docs/glossary.md#scheduler)** gives you nodes, and a **[launcher](../docs/glossary.md#launcher)**
# on each node starts the ranks. The ranks then need three things: who am I, how many are we, and where do we meet?
# torchrun tells them by environment variables:
#
# | variable | says | with 2 nodes of 8 GPUs |
# |---|---|---|
# | `RANK` | who am I, in all | 0 … 15 |
# | `LOCAL_RANK` | who am I on this node; it chooses the GPU | 0 … 7 |
# | `WORLD_SIZE` | how many are we | 16 |
# | `LOCAL_WORLD_SIZE` | how many on this node | 8 |
# | MASTER_ADDR, MASTER_PORT | where rank 0 is, which the others ask for addresses | the first node's name, and a port |
#
# `minipar.main` reads these, and takes torchrun's ranks in place of a World. The script that we start is
# `examples/cluster/train.py`. Its core:

# %%
ROOT = Path(minipar.__file__).parents[1]
EXAMPLES = ROOT / "examples" / "cluster"
script = (EXAMPLES / "train.py").read_text()
core = script[script.index("def train(") : script.index("if __name__")].rstrip()


def show_text(text, language):
    """In a box as wide as its longest line, so that lines do not break."""
    wide = 0.62 * max(map(len, text.splitlines()))
    display(Markdown(f'<div style="min-width: {wide:.0f}em">\n\n```{language}\n{text}\n```\n\n</div>'))


show_text(core, "python")

# %% [markdown] lang="en"
# Nothing in it says how many nodes there are. `dp` is what is left, as in Megatron-LM. And it goes on from its newest
# checkpoint: on a cluster a job ends when its time is up, or when a node dies, and has to be started again.
#
# ### torchrun
#
# On one machine: `torchrun --standalone --nproc-per-node 2 examples/cluster/train.py --tp 2`. On several, one
# torchrun a node, all with the same address to meet at. That address is the
# **[rendezvous](../docs/glossary.md#rendezvous)**. We have one machine, so we pretend: two torchruns on it, two
# ranks each, are two nodes.
#
# **Question.** `Mesh(dp=2, tp=2)` on two nodes of two ranks: which axis stays within a node?

# %%
prediction = None  # "dp" or "tp"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


meet = f"127.0.0.1:{free_port()}"
here_only = {"GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo", "OMP_NUM_THREADS": "1"}
torchrun = f"torchrun --nnodes 2 --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint {meet} --local-addr 127.0.0.1"
arguments = "train.py --tp 2 --steps 3"
words = shlex.split(f"{torchrun} {arguments}")[1:]
nodes = [
    subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *words],
        cwd=EXAMPLES,
        env=os.environ | here_only,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for _ in range(2)
]

# %%
try:
    printed = "".join(node.communicate(timeout=50)[0] for node in nodes)
finally:
    for node in nodes:
        node.terminate()
assert [node.returncode for node in nodes] == [0, 0], printed
losses = [float(line.split("loss ")[1].split(",")[0]) for line in printed.splitlines() if line.startswith("step")]
mesh = Mesh(dp=2, tp=2)
print("you wrote:", prediction, "- lines of tp:", sorted({mesh.line("tp", rank) for rank in range(4)}))
print("losses on two nodes:", losses)
assert {mesh.line("tp", rank) for rank in range(4)} == {(0, 1), (2, 3)}

# %% [markdown] lang="en"
# Node 0 has ranks 0 and 1, node 1 has 2 and 3: neighbors share a node. minipar's innermost axis is `tp`, so its lines
# are neighbors, and what is sent most stays within the node. [Hybrid parallelism](03g_hybrid.ipynb) has the reasons.
#
# Which torchrun becomes node 0? With `--rdzv-backend c10d` that is settled when they meet. It need not be the order
# in which you started them. Are these the losses of one process?

# %%
batches = list(corpus.batches(steps=3, rows=32, context=64))


def losses_of_one():
    model = minipar.gpt(Config(context=64))
    optimizer, found = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for tokens, targets in batches:
        loss = mean_loss(model(tokens), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


expected = world.run(losses_of_one, seed=0)[0]
print("losses of one process:", [round(x, 4) for x in expected])
assert all(abs(a - b) < 2e-4 for a, b in zip(losses, expected, strict=True))

# %% [markdown] lang="en"
# They are, to the four digits that the script prints. It computes in float32.
#
# ### Slurm
#
# [Slurm](https://slurm.schedmd.com/) is the scheduler of many universities' clusters. You hand in a shell script whose
# comments (`#SBATCH`) say what you want, and wait. This one is complete:

# %%
show_text((EXAMPLES / "slurm.sh").read_text(), "bash")

# %% [markdown] lang="en"
# Line by line, where it is not obvious:
#
# - `--ntasks-per-node=1`: one *torchrun* a node. It starts the eight ranks itself. A common mistake is eight tasks,
#   so eight torchruns a node.
# - `--requeue` and `--open-mode=append`: after a node has failed, Slurm starts the job again, under the same number.
#   The script finds its checkpoints by that number, and the log goes on. When the time is up, Slurm does not start it
#   again. `scontrol requeue` with the job's number does, for as long as Slurm remembers the job. A new sbatch gets a
#   new number: to go on, copy the folder of checkpoints to it.
# - `scontrol show hostnames` turns `node[07-08]` into names. The first is where all meet.
# - srun starts the line once on each node. `--kill-on-bad-exit=1`: when one torchrun fails, end the others. Else
#   they would wait for it until the time is up, and you would pay. `--cpus-per-task` has to be said again: since Slurm
#   22.05, srun does not take it over from above ([sbatch](https://slurm.schedmd.com/sbatch.html)).
# - The `--save` folder has to be one that all nodes see.
#
# You cannot run it without Slurm. But its command can be run: the tests of this repository put a small srun and a
# small scontrol in its way that set the variables as Slurm does, and start two "nodes" on the loopback. What is not
# tested there: GPUs, real nodes, a real queue.
#
# ### Kubernetes
#
# Other clusters run [Kubernetes](https://kubernetes.io/), many of companies among them. An *image* is a file system
# with your program in it, packed; a *pod* is one running copy of it. An **Indexed Job** starts several pods and gives
# each a number. A *headless Service* gives each a name, so that they find each other. (Kubernetes' documentation has a
# page on [the two](https://kubernetes.io/docs/tasks/job/job-with-pod-to-pod-communication/).) A *claim* asks for disk
# space. All of it is in one file, in YAML:

# %%
show_text((EXAMPLES / "kubernetes.yaml").read_text(), "yaml")

# %% [markdown] lang="en"
# Here the pod's number is torchrun's `--node-rank`, and pod 0's name is the address, so nothing is left to settle.
# The same fields as before stand in other words: how many nodes (completions), how many GPUs (nvidia.com/gpu),
# where checkpoints go (a claim for disk space), what happens after a failure (backoffLimit).
#
# [Kubeflow's Trainer](https://www.kubeflow.org/docs/components/trainer/) is a program on the cluster that makes such
# jobs for you, from a shorter file. What it makes is much like this.
#
# **Your turn.** Someone starts `slurm.sh` with `--ntasks-per-node=8` and `--cpus-per-task=8` on two nodes of eight
# GPUs. How many torchruns are started, how many ranks, and what will you see?

# %%
yours = None  # torchruns, ranks

# %% [markdown] lang="en"
# <details><summary>Answer</summary>
#
# 16 torchruns and, as before, 16 ranks. The first two torchruns that meet are the group of `--nnodes 2`, and each
# starts 8 ranks. The other 14 find the group complete, and wait. (We tried three torchruns with `--nnodes 2` on one
# machine. The third waited until the run was over, and then failed, since nobody answered it any more.) If the first
# two are on the same node, that node's GPUs get two ranks each, which NCCL refuses, and the other node's GPUs get none.
# If they are not, all goes well until the end, and the job counts as failed. If a job behaves strangely, count the
# processes on each node first.
#
# </details>

# %% [markdown] lang="en"
# ## 5. Hub and GitHub
#
# The document's other resources (7.4) are two addresses: Hugging Face and GitHub. The first has a *hub* with models,
# the second has code. What do you put there after a run?
#
# | what | why |
# |---|---|
# | weights as safetensors | a file of numbers and a header. A pickled checkpoint can run code when it is loaded |
# | config.json | without the shapes the numbers are of no use |
# | tokenizer files | other tokens, other model |
# | a model card | what it is for, what it was trained on, how it was measured, its license (Mitchell et al. 2019) |
# | the commit of the code, and the lock of its packages | else nobody can repeat it |
#
# A model that lies on a mesh has no rank with all of it. `minipar.save_pretrained` puts it together and writes what
# `from_pretrained` reads. Two ranks, `Mesh(tp=2)`, a tiny Llama with random weights:

# %%
transformers.utils.logging.disable_progress_bar()
shape = transformers.LlamaConfig(
    vocab_size=corpus.VOCAB,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


def llama():
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(shape)


def train_and_save(folder):
    model = parallelize(llama(), Mesh(tp=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.step(tokens, targets)
    optimizer.step()
    minipar.save_pretrained(folder, model)
    return model(tokens)


# %%
storage = tempfile.TemporaryDirectory()
folder = Path(storage.name) / "tiny-llama"
on_mesh = world.run(train_and_save, folder)[0]
loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
with torch.no_grad():
    again = loaded(tokens).logits
print(f"logits of two ranks and of the loaded model: apart by {(again - on_mesh).abs().max():.0e}")
assert (again - on_mesh).abs().max() < 1e-5

for file in sorted(folder.iterdir()):
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    print(f"{file.name:<24} {file.stat().st_size:>9,} bytes, sha256 {digest[:12]}…")
with safe_open(folder / "model.safetensors", "pt") as weights:
    name = sorted(weights.keys())[0]
    print(f"one of {len(weights.keys())} tensors: {name} {weights.get_slice(name).get_shape()}")

# %% [markdown] lang="en"
# Now the **[model card](../docs/glossary.md#model-card)**. It is a README whose head is YAML, so that the hub can
# sort by license, language and data. (The hub has a [list of
# licenses](https://huggingface.co/docs/hub/repositories-licenses). Python's is not on it, so it is `other`, with a name
# and an address.) The text is the part that takes work. Four questions it has to answer, with the numbers of this run:

# %%
card = f"""\
---
language: en
license: other
license_name: psf-2.0
license_link: https://docs.python.org/3/license.html
library_name: transformers
pipeline_tag: text-generation
---
# tiny-llama

**What it is.** A Llama of {loaded.num_parameters():,} parameters after one step of training. It shows how a model is
saved from a mesh. It is of no other use.

**What it was trained on.** {tokens.numel()} tokens of Python's own documentation (PSF license), tokenizer of minipar.

**How it was measured.** Logits of the loaded file against those of the mesh: equal to 1e-5.

**How to repeat it.** minipar, chapter 07, torch {torch.__version__.split("+")[0]}, `Mesh(tp=2)`, AdamW, seed 0.
"""
(folder / "README.md").write_text(card)
print(card)

# %% [markdown] lang="en"
# A card of yours also names the commit of your code. To publish is one call, which needs an account and a token of
# yours. So it is not run here:
#
#     hf auth login
#     loaded.push_to_hub("YOUR-NAME/tiny-llama", private=True)
#
# Begin with `private=True`: what was public for a minute may be on other machines. And never put the token into a
# notebook.
#
# **Who loads a model pins it.** A name on the hub is a branch, and branches move. A commit does not:
#
#     AutoModelForCausalLM.from_pretrained("YOUR-NAME/tiny-llama", revision="4c77982…")
#
# This course does so for its own weights, and compares their SHA-256 before it uses them
# ([the document's practice](05_practice.ipynb)). `trust_remote_code=True` runs Python from that repository on your
# machine, with your rights. With a pinned revision you can at least read it before.
#
# **GitHub** keeps the code, and runs your tests after each push. A *workflow* is a file that says when and what.
# The one below grades the exercises of this course: copied to .github/workflows, it runs `python -m minipar
# grade` on every notebook that a push has changed, and shows the verdicts on the page of that run.

# %%
show_text((ROOT / "examples" / "github" / "grade.yml").read_text(), "yaml")

# %% [markdown] lang="en"
# It works since `grade` ends with a code other than 0 if a task fails, and since a fresh machine can set itself up
# from two files of this repository, requirements.lock and the Makefile. So a green mark says more than "it works on my
# machine": it worked on a machine that had only what you pushed.
#
# ## 6. Books and papers
#
# The document recommends two books and two papers (7.1, 7.3). Two of the four entries have slips:
#
# - 《自然语言处理入门》 is by 何晗 (2019, 人民邮电出版社), the author of HanLP; the document names 赵军.
# - The GPT paper is Radford, Narasimhan, Salimans and Sutskever 2018, *Improving Language Understanding by Generative
#   Pre-Training*. The document gives another title, and Vaswani et al. as authors. Theirs is the paper of the
#   transformer itself, a year older.
#
# And its practical part (5.2) imports `TFBertForSequenceClassification`. Is it still there?

# %%
print("transformers", transformers.__version__)
gone = not hasattr(transformers, "TFBertForSequenceClassification")
print("TFBertForSequenceClassification:", "gone" if gone else "there")
assert gone and hasattr(transformers, "BertForSequenceClassification")

# %% [markdown] lang="en"
# Since version 5, transformers is for PyTorch. TensorFlow itself lives on; what to do with the document's snippet
# is in [chapter 5](05_practice.ipynb).
#
# What we would read, in this order, and why.
#
# **Books**
#
# - Goodfellow, Bengio, Courville 2016, *Deep Learning* ([free to read](https://www.deeplearningbook.org/)): the
#   document's first book. Still the place for the mathematics; older than the transformer.
# - 何晗 2019, 《自然语言处理入门》: the document's second. Classical language processing in Chinese, with code:
#   what one had to do before models were pretrained.
# - Zhang, Lipton, Li, Smola 2023, *Dive into Deep Learning* ([free](https://d2l.ai/), [in
#   Chinese](https://zh.d2l.ai/)): if you want to run what you read.
# - Jurafsky and Martin, *Speech and Language Processing*, third edition, draft
#   ([free](https://web.stanford.edu/~jurafsky/slp3/)): language and speech in one book, kept up to date.
# - Austin et al. 2025, *How to Scale Your Model* ([free](https://jax-ml.github.io/scaling-book/)): the arithmetic of
#   chapter 4b for TPUs, in JAX's words.
# - Tazi et al. 2025, *The Ultra-Scale Playbook*
#   ([free](https://huggingface.co/spaces/nanotron/ultrascale-playbook)): thousands of measured runs on up to 512
#   GPUs.
#
# **The models**
#
# - Vaswani et al. 2017, *Attention Is All You Need* ([1706.03762](https://arxiv.org/abs/1706.03762)): the
#   transformer.
# - Radford et al. 2018, *Improving Language Understanding by Generative Pre-Training*: a decoder, pretrained and
#   fine-tuned. Read it for how small the step from there to here was.
# - Devlin et al. 2019, *BERT* ([1810.04805](https://arxiv.org/abs/1810.04805)): the document's other paper; the
#   encoder of chapters 4c and 5.
# - Hoffmann et al. 2022, *Training Compute-Optimal Large Language Models*
#   ([2203.15556](https://arxiv.org/abs/2203.15556)): how many tokens for how many parameters.
#
# **The parallelism**
#
# - Li et al. 2020, *PyTorch Distributed* ([2006.15704](https://arxiv.org/abs/2006.15704)): buckets and overlap, as in
#   chapter 3a.
# - Rajbhandari et al. 2020, *ZeRO* ([1910.02054](https://arxiv.org/abs/1910.02054)): three stages, two pages that
#   matter.
# - Zhao et al. 2023, *PyTorch FSDP* ([2304.11277](https://arxiv.org/abs/2304.11277)): what ZeRO-3 takes in practice.
# - Shoeybi et al. 2019, *Megatron-LM* ([1909.08053](https://arxiv.org/abs/1909.08053)): column, then row. Chapter
#   3b in five pages.
# - Huang et al. 2019, *GPipe* ([1811.06965](https://arxiv.org/abs/1811.06965)): microbatches.
# - Narayanan et al. 2021, *Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM*
#   ([2104.04473](https://arxiv.org/abs/2104.04473)): data, tensor and pipeline together, with the formulas. If you
#   read one, read this.
# - Korthikanti et al. 2022, *Reducing Activation Recomputation in Large Transformer Models*
#   ([2205.05198](https://arxiv.org/abs/2205.05198)): where memory goes, to the byte.
# - Qi et al. 2023, *Zero Bubble Pipeline Parallelism* ([2401.10241](https://arxiv.org/abs/2401.10241)): chapter 3d.
# - Liu et al. 2023, *Ring Attention* ([2310.01889](https://arxiv.org/abs/2310.01889)): chapter 3e.
# - Fedus et al. 2021, *Switch Transformers* ([2101.03961](https://arxiv.org/abs/2101.03961)): chapter 3f.
# - Xu et al. 2021, *GSPMD* ([2105.04663](https://arxiv.org/abs/2105.04663)): the compiler's way, for years
#   behind JAX. Its successor there is [Shardy](https://docs.jax.dev/en/latest/shardy_jax_migration.html).
# - Liang et al. 2024, *TorchTitan* ([2410.06511](https://arxiv.org/abs/2410.06511)): section 1 of this chapter, put
#   together for real.
# - Llama Team 2024, *The Llama 3 Herd of Models* ([2407.21783](https://arxiv.org/abs/2407.21783)): its section 3.3
#   is a report from 16,384 GPUs. You can read all of it now.
#
# ## What you have now
#
# - **Tools:** one step on four of PyTorch's, gradients equal, calls and bytes side by side.
# - **Words:** twenty things in seven languages, and a command line that you can read and price.
# - **A profile:** kernels below the pipeline's boxes, on one clock.
# - **A cluster:** three ways to start the same script: by hand with torchrun, a Slurm script, a Kubernetes file.
#
# ## Three questions to take along
#
# 1. A colleague wraps a model in DDP and pads rows to equal length. Labels of padding are ignored. What is wrong with
#    the gradient, and would the loss curve tell?
# 2. A Megatron-LM command on 512 GPUs has `--tensor-model-parallel-size 8 --pipeline-model-parallel-size 8
#    --context-parallel-size 2 --global-batch-size 1024 --micro-batch-size 1`. How many data ranks, and how many
#    microbatches does each have?
# 3. You are given weights as a `.bin` file of pickled tensors from an address that you do not know, and as
#    `model.safetensors` with a SHA-256. Which do you load, and what do you check?
#
# <details><summary>Answers</summary>
#
# 1. Each rank divides by its own number of labels, and DDP takes the mean of the means. Ranks with few labels count
#    too much. The curve looks fine. (minipar divides by the global count.)
# 2. 512 / (8 × 8 × 2) = 4 data ranks; 1,024 / 4 = 256 microbatches.
# 3. The second, after its hash. To unpickle is to run code.
#
# </details>
#
# ## References
#
# Those above, and
#
# - Mitchell et al. 2019, *Model Cards for Model Reporting*, [arXiv 1810.03993](https://arxiv.org/abs/1810.03993)
# - PyTorch 2.13, [torchrun](https://docs.pytorch.org/docs/stable/elastic/run.html) and
#   [torch.profiler](https://docs.pytorch.org/docs/2.13/profiler.html)
# - Perfetto, [Visualizing external trace formats](https://perfetto.dev/docs/getting-started/other-formats)
# - the frameworks' documentation, linked in the heads of the tables of section 2
#
# **Next:** [Scale and serving](08a_scale_and_serving.ipynb): what changes at 16,384 GPUs, and when a model answers
# instead of learns.

# %%
assert 512 // (8 * 8 * 2) == 4 and 1024 // 4 == 256
traces.cleanup()
storage.cleanup()
world.close()
