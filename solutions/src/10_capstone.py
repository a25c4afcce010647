# %% [markdown] lang="en"
# # Capstone: an engine of your own
#
# Each function of yours that has passed and is a piece of an engine stands in `my_parallel.py`, above this folder. What
# you have not written yet is the reference's, so you can begin today. Four tasks put the pieces together. The last one
# trains a GPT on eight ranks, 2 × 2 × 2, with your code, under the laws of the course. About an hour.
#
# **How it works.** Run the cells from the top. Each task has a folded check below it; in a terminal:
#
#     python -m minipar grade exercises/10_capstone.ipynb
#     python -m minipar hint 10.1
#     python -m minipar solution 10.1    # once it has passed
#
# If a check fails in a piece that you wrote earlier, the message names its line. Then mend that piece in its own
# exercise, and grade that one again: `my_parallel.py` follows. In the notebook, tasks 3 and 4 also use your functions
# of tasks 1 and 2.

# %% tags=["setup"]
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipar import Axis, Mesh, World, connect, corpus, ledger
from minipar.collectives import all_gather, all_reduce, shard
from minipar.course import engine
from minipar.course.checks import difference, returned, verdict
from minipar.course.given import fresh_model, one_process, padded, targets, tokens
from minipar.data import rows

my = engine.load()
world = World(8)

# %% [markdown] lang="en"
# These are the pieces. `help(my.run_schedule)` shows what one of them wants.

# %%
for name in ["my_rows", "my_part_of_the_loss", "reduce_flat", "column_linear", "row_linear"]:
    print(f"my.{name}")
print("my.one_f_one_b_order\nmy.run_schedule")

# %% [markdown] lang="en"
# ## 10.1 · A slice of the model
#
# Between two ranks of the pipeline there is a cut. The first has the embedding, the last the final norm and the head,
# and the blocks are shared out as rows are: stage $s$ of $p$ has the blocks from $\lfloor Ls/p \rfloor$ up to where the
# next stage begins. `nn.Sequential` calls its parts one after the other.
#
# **Target:** every parameter on one stage, and the stages, one after the other, give the model's logits.

# %% [markdown] lang="en" hint="10.1"
# `model.embed`, `model.blocks` (a list), `model.norm`, `model.head`. Begin with the blocks of this stage.

# %% [markdown] lang="en" hint="10.1"
# Put the embedding in front if `stage == 0`, the norm and the head behind if `stage == stages - 1`. With one stage it
# is both.


# %% task="10.1" title="A slice of the model"
def stage_of(model: nn.Module, stage: int, stages: int) -> nn.Sequential:
    """The layers of one stage, in order: (rows, context) or (rows, context, width) -> the next stage's input."""
    ### BEGIN SOLUTION
    depth = len(model.blocks)
    layers = list(model.blocks[depth * stage // stages : depth * (stage + 1) // stages])
    if stage == 0:
        layers.insert(0, model.embed)
    if stage == stages - 1:
        layers += [model.norm, model.head]
    return nn.Sequential(*layers)
    ### END SOLUTION


# %% check="10.1" seconds=20
# Check of 10.1: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    sizes = []
    for depth, stages in [(4, 2), (4, 4), (3, 2), (2, 1), (5, 3)]:
        model = fresh_model(depth=depth)
        names = {p: name for name, p in model.named_parameters()}
        parts = [returned(stage_of(model, stage, stages), "stage_of") for stage in range(stages)]
        what = f"{depth} blocks on {stages} stage{'s' * (stages > 1)}"
        held = [[names[p] for p in part.parameters()] for part in parts]
        for name in names.values():
            owners = [stage for stage, mine in enumerate(held) if name in mine]
            assert owners, f"{what}: {name} is on no stage."
            assert len(owners) == 1, f"{what}: {name} is on the stages {owners}."
        blocks = [sum(name.endswith("norm1.weight") for name in mine) for mine in held]
        wanted = [depth * (s + 1) // stages - depth * s // stages for s in range(stages)]
        assert blocks == wanted, f"{what}: you share them out as {blocks}, and the formula as {wanted}."
        x = tokens
        for part in parts:
            x = part(x)
        off = "the stages, one after the other, give other logits than the model. In which order are the layers?"
        assert x.shape == (8, 32, 512) and torch.equal(x, model(tokens)), f"{what}: {off}"
        sizes.append(blocks)
    print("blocks of the stages:", *sizes)

# %% [markdown] lang="en"
# ## 10.2 · A block on two ranks
#
# Now the tensor axis. In each block the layers `q`, `k`, `v` and `up` are cut by columns (this rank has some of the
# outputs), `out` and `down` by rows (some of the inputs). `nn.Linear` keeps its weight as (out, in), so a column cut is
# along dim 0, a row cut along dim 1. A column cut has a share of the bias; a row cut has all of it.
#
# `shard(x, axis, dim)` gives this rank's share. The model does not know of any of this: give each of the layers its
# share as its `weight` (and `bias`), and a `forward` of its own, which calls your piece.
#
# **Target:** on 2 and on 4 ranks the logits and gradients of one process, with 6 all-reduces for each block in forward
# and backward together. (The package needs 4: what enters `q`, `k` and `v` is one tensor, and so is its gradient.)

# %% [markdown] lang="en" hint="10.2"
# `layer.weight = nn.Parameter(shard(layer.weight.data, axis, 0))` replaces it. `layer.forward = lambda x: ...` works,
# too, if the lambda keeps its own layer: `lambda x, layer=layer: ...`.

# %% [markdown] lang="en" hint="10.2"
# `my.column_linear(x, layer.weight, layer.bias, axis)`, and `my.row_linear` with the same arguments.


# %% task="10.2" title="A block on two ranks"
def cut_block(block: nn.Module, axis: Axis) -> None:
    """Cut the six linear layers of a block over the tensor axis, in place."""
    attention, mlp = block.attention, block.mlp
    ### BEGIN SOLUTION
    for layer in (attention.q, attention.k, attention.v, mlp.up):
        layer.weight = nn.Parameter(shard(layer.weight.data, axis, 0))
        layer.bias = nn.Parameter(shard(layer.bias.data, axis, 0))
        layer.forward = lambda x, layer=layer: my.column_linear(x, layer.weight, layer.bias, axis)
    for layer in (attention.out, mlp.down):
        layer.weight = nn.Parameter(shard(layer.weight.data, axis, 1))
        layer.forward = lambda x, layer=layer: my.row_linear(x, layer.weight, layer.bias, axis)
    ### END SOLUTION


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given: how the shares of a cut model are put together again
COLUMNS = ("q.weight", "q.bias", "k.weight", "k.bias", "v.weight", "v.bias", "up.weight", "up.bias")
ROWS = ("out.weight", "down.weight")


def together(name: str, x: Tensor, axis: Axis) -> Tensor:
    """The whole of a tensor that the plan cuts, on every rank of the tensor axis."""
    dim = 0 if name.endswith(COLUMNS) else 1 if name.endswith(ROWS) else None
    return x if dim is None else all_gather(x.contiguous(), axis, dim)


def cut_step(function, depth: int, tp: int) -> dict:
    """Forward and backward of a model whose blocks are cut."""
    axis = connect(Mesh(dp=8 // tp, tp=tp))["tp"]
    model = fresh_model(depth=depth)
    bias = model.blocks[0].attention.out.bias
    bias.data += torch.arange(32.0)  # else nobody sees how often it is added
    for block in model.blocks:
        function(block, axis)
    with ledger() as book:
        logits = model(tokens)
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    calls = book.calls("tp")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing, f"{missing[0]} has no gradient: is it used in forward?"
    whole = {name: together(name, p.grad, axis) for name, p in model.named_parameters()}
    return {"logits": logits.detach(), "gradients": whole, "calls": calls, "shapes": shapes}


def whole_step(depth: int) -> tuple[Tensor, dict]:
    model = fresh_model(depth=depth)
    model.blocks[0].attention.out.bias.data += torch.arange(32.0)
    logits = model(tokens)
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


# %% check="10.2" seconds=30
# Check of 10.2: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    for depth, tp in [(1, 2), (2, 4)]:
        answers, (logits, gradients) = world.run(cut_step, cut_block, depth, tp, limit=15)[:tp], whole_step(depth)
        whole_shapes = {name: tuple(g.shape) for name, g in gradients.items()}
        for name, shape in answers[0]["shapes"].items():
            share = list(whole_shapes[name])
            if name.endswith(COLUMNS + ROWS):
                share[0 if name.endswith(COLUMNS) else 1] //= tp
            assert shape == tuple(share), f"{tp} ranks: {name} has the shape {shape} on rank 0, not {tuple(share)}."
        for rank, answer in enumerate(answers):
            off = float((answer["logits"] - logits).abs().max())
            assert off < 1e-9, f"{tp} ranks: rank {rank}'s logits are off by {off:.2g}. Is a row cut's bias added once?"
        wrong = difference([answer["gradients"] for answer in answers], gradients)
        assert not wrong, f"{tp} ranks: the logits are right, but {wrong}"
        calls, most = answers[0]["calls"], 6 * depth  # q, k, v and up each sum a gradient; out and down each an output
        assert calls <= most, f"{tp} ranks: all is right, with {calls} calls, and {most} are enough."
    print(f"logits and gradients of one process on 2 and 4 ranks, {calls} calls for {depth} blocks")

# %% [markdown] lang="en"
# ## 10.3 · A step on three axes
#
# All pieces are there. Each data rank takes its rows and cuts them into microbatches. The pipeline runs them in your
# 1F1B order; the last stage divides each microbatch's summed loss by the number of labeled tokens in the *whole* batch.
# Then gradients are summed over the data axis. Along the tensor axis nothing is left to do: why?
#
# **Target:** the gradients of one process for every parameter, on four layouts, also with rows of different lengths.
# No more than `stages - stage` microbatches in flight.

# %% [markdown] lang="en" hint="10.3"
# In this order: `my.my_rows` for tokens and targets, `rows(..., microbatches)` for the microbatches (a list),
# `my.one_f_one_b_order(stages, microbatches)[stage]`, `my.run_schedule(...)`, `my.reduce_flat(list of parameters, dp)`.

# %% [markdown] lang="en" hint="10.3"
# `run_schedule` wants `loss_of(logits, m)`. It is `my.my_part_of_the_loss(total, count, dp)`, where `total` is the
# cross-entropy of microbatch `m`, summed, and `count` the labeled tokens of *all* of this rank's rows.

# %% [markdown] lang="en" hint="10.3"
# Tensor ranks have the same rows. Your column cut sums the gradient of its input in backward, so what is whole on
# every tensor rank has a whole gradient there.


# %% task="10.3" title="A step on three axes"
def train_step(part: nn.Module, axes: dict[str, Axis], tokens: Tensor, targets: Tensor, microbatches: int, width: int):
    """Set .grad of this rank's part to its gradients of the mean loss over the whole batch (8, 32).

    part: this stage's layers, cut over axes["tp"]. width: what travels between stages is (rows, 32, width).
    """
    dp, pp = axes["dp"], axes["pp"]
    part.zero_grad()
    ### BEGIN SOLUTION
    mine, labels = my.my_rows(tokens, dp), my.my_rows(targets, dp)
    inputs, answers = rows(mine, microbatches), rows(labels, microbatches)

    def loss_of(logits: Tensor, m: int) -> Tensor:
        total = F.cross_entropy(logits.flatten(0, 1), answers[m].flatten(), reduction="sum")
        return my.my_part_of_the_loss(total, (labels != -100).sum(), dp)

    program = my.one_f_one_b_order(pp.size, microbatches)[pp.index]
    my.run_schedule(program, part, pp, inputs, width, loss_of)
    my.reduce_flat(list(part.parameters()), dp)
    ### END SOLUTION


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for 10.3 and 10.4: this rank's part of a model, and whole gradients from all parts
def part_of(model: nn.Module, axes: dict[str, Axis]) -> nn.Sequential:
    """The stage of this rank (task 1), its blocks cut over the tensor axis (task 2)."""
    part = stage_of(model, axes["pp"].index, axes["pp"].size)
    for block in part:
        if hasattr(block, "attention"):
            cut_block(block, axes["tp"])
    return part


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for 10.3: a step, and what is counted in it
class Counted(nn.Module):
    """A part that counts its microbatches in flight: forwards less backwards."""

    def __init__(self, part: nn.Module):
        super().__init__()
        self.part, self.now, self.most = part, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.now += 1
        self.most = max(self.most, self.now)
        y = self.part(x)
        y.register_hook(self._back)
        return y

    def _back(self, gradient: Tensor) -> None:
        self.now -= 1


def stepped(step, mesh: Mesh, targets: Tensor, microbatches: int, depth: int) -> dict:
    axes = connect(mesh)
    model = fresh_model(depth=depth)
    part = Counted(part_of(model, axes))
    names = {p: name for name, p in model.named_parameters()}
    for p in part.parameters():
        p.grad = torch.ones_like(p)  # of a step before
    with ledger() as book:
        step(part, axes, tokens, targets, microbatches, 32)
    sent = {axis: book.bytes(axis) for axis in ("dp", "pp", "tp")}
    missing = [names[p] for p in part.parameters() if p.grad is None]
    assert not missing, f"{missing[0]} has no gradient"
    whole = {names[p]: together(names[p], p.grad, axes["tp"]) for p in part.parameters()}
    small = sum(p.numel() for p in part.parameters()) * 8
    return {"gradients": whole, "most": part.most, "stage": axes["pp"].index, "sent": sent, "held": small}


# %% check="10.3" seconds=40
# Check of 10.3: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    short = padded([32, 28, 20, 4, 6, 1, 9, 17])
    for labels, mesh, microbatches in [
        (targets, Mesh(dp=2, pp=2, tp=2), 4),
        (short, Mesh(dp=2, pp=2, tp=2), 2),
        (short, Mesh(dp=4, pp=2), 2),
        (targets, Mesh(pp=4, tp=2), 8),
    ]:
        depth = 4 if mesh.pp == 4 else 2
        answers = world.run(stepped, train_step, mesh, labels, microbatches, depth, limit=15)
        rows_are = "full rows" if labels is targets else "rows of different lengths"
        what = f"dp {mesh.dp} × pp {mesh.pp} × tp {mesh.tp}, {microbatches} microbatches, {rows_are}"
        whole = one_process(tokens, labels, depth=depth)
        for rank, answer in enumerate(answers):
            mine = {name: g for name, g in whole.items() if name in answer["gradients"]}
            wrong = difference([answer["gradients"]], mine).replace("rank 0:", f"rank {rank}:")
            assert not wrong, f"{what}: {wrong}"
            most, stage = answer["most"], answer["stage"]
            told = f"{what}: right, but stage {stage} has {most} microbatches in flight"
            assert most <= mesh.pp - stage, f"{told}, and 1F1B needs {mesh.pp - stage}."
            sent, least = answer["sent"]["dp"], 2 * (mesh.dp - 1) * answer["held"] // mesh.dp
            told = f"{what}: right, but rank {rank} sends {sent:,} bytes along dp"
            assert sent <= least + 16 * microbatches, f"{told}: once all gradients of its part are {least:,}."
    print("gradients of one process on four layouts of eight ranks")

# %% [markdown] lang="en"
# ## 10.4 · Train
#
# A run: batches of Python's documentation, your step, Adam on each rank's own parameters, and the loss of each step.
# The loss is on the last stage only, in parts: each data rank has that of its rows. After twenty steps the model should
# be the one that one process would have trained.
#
# To know the loss, run the model forward without gradients: `loss_now(part, axes, tokens, targets)` is given, and gives
# the mean loss over the batch on every rank.
#
# **Target:** twenty losses equal to those of one process, to nine digits, on 2 × 2 × 2.

# %% [markdown] lang="en" hint="10.4"
# For each batch: note the loss, set the gradients with `train_step`, `optimizer.step()`.

# %% [markdown] lang="en" hint="10.4"
# `torch.optim.Adam(part.parameters(), lr=lr)`. Adam works element by element, so a share of a matrix is updated as it
# would be within the whole.


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for 10.4: the loss of a batch, and the run of one process
def loss_now(part: nn.Module, axes: dict[str, Axis], tokens: Tensor, targets: Tensor) -> float:
    """The mean loss over the batch, on every rank, one microbatch through the pipeline. No gradients."""
    dp, pp = axes["dp"], axes["pp"]
    x = rows(tokens, dp.size)[dp.index]
    labels = rows(targets, dp.size)[dp.index]
    total = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for stage in range(pp.size):
            mine = part(x) if pp.index == stage else None
            if stage == pp.size - 1:
                if mine is not None:
                    total = F.cross_entropy(mine.flatten(0, 1), labels.flatten(), reduction="sum")
                break
            x = all_reduce(mine if mine is not None else torch.zeros(*labels.shape, 32, dtype=torch.float64), pp)
    total = all_reduce(all_reduce(total, pp), dp)
    return float(total / (targets != -100).sum())


def batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    return list(corpus.batches(steps, rows=8, context=32))


def alone(steps: int, lr: float) -> list[float]:
    model, losses = fresh_model(depth=2), []
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for x, y in batches(steps):
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


# %% task="10.4" title="Train"
def train(part: nn.Module, axes: dict[str, Axis], batches: list[tuple[Tensor, Tensor]], lr: float) -> list[float]:
    """Train this rank's part with Adam, a step a batch, in 4 microbatches. Returns the loss before each step."""
    optimizer, losses = torch.optim.Adam(part.parameters(), lr=lr), []
    ### BEGIN SOLUTION
    for x, y in batches:
        losses.append(loss_now(part, axes, x, y))
        train_step(part, axes, x, y, 4, 32)
        optimizer.step()
    ### END SOLUTION
    return losses


# %% check="10.4" seconds=40
# Check of 10.4: run this after your answer
# NBVAL_CHECK_OUTPUT
def trained(function, mesh, steps, lr):
    axes = connect(mesh)
    part = part_of(fresh_model(depth=2), axes)
    return function(part, axes, batches(steps), lr)


with verdict():
    for mesh, lr in [(Mesh(dp=2, pp=2, tp=2), 3e-3), (Mesh(dp=2, pp=1, tp=4), 1e-3)]:
        steps = 20 if mesh.pp == 2 else 5
        wanted = alone(steps, lr)
        for rank, got in enumerate(world.run(trained, train, mesh, steps, lr, limit=20)):
            what = f"dp {mesh.dp} × pp {mesh.pp} × tp {mesh.tp}, rank {rank}"
            n = len(returned(got, "train"))
            assert n == steps, f"{what}: {n} losses for {steps} steps."
            for step, (mine, whole) in enumerate(zip(got, wanted, strict=True), start=1):
                told = f"{what}: the loss before step {step} is {mine:.9f}, in one process {whole:.9f}."
                assert abs(mine - whole) < 1e-9 * max(1, whole), told
    losses = alone(20, 3e-3)
    print(f"20 steps on 2 x 2 x 2: loss {losses[0]:.2f} -> {losses[-1]:.2f}, every one that of one process")

# %% [markdown] lang="en"
# ## And now
#
# You have a data-, tensor- and pipeline-parallel training engine in about 150 lines, most of them yours. Compare
# `my_parallel.py` with `minipar/data.py`, `minipar/tensor.py` and `minipar/pipeline.py`: the package does the same,
# with buckets that leave during backward, receives that are posted early, split backwards, and checks.
#
# The second capstone needs no code: one page that defends a layout for 1,024 GPUs. What it should have, and how it is
# judged, is on the page [for teachers](../docs/teaching.md#two-capstones). Your numbers come from
#
#     python -m minipar plan --model llama-70b --gpus 1024
