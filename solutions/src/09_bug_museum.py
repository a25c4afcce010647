# %% [markdown] lang="en"
# # The bug museum
#
# Nine bugs that real frameworks for training have had, one to a showcase. In each, a run looks fine: nothing crashes,
# and the loss falls. Yet a law is broken. You are shown the evidence; say to yourself which law it is, then mend the
# code. About an hour and a half, in any order. You need [data](../chapters/03a_data_parallel.ipynb),
# [tensor](../chapters/03b_tensor_parallel.ipynb) and [pipeline parallelism](../chapters/03c_pipeline_parallel.ipynb).
#
# **How it works.** Run the cells from the top with Shift+Enter. In each showcase there is a function with a bug, a cell
# that shows the evidence, and a folded check. Run the evidence before and after you mend it. In a terminal:
#
#     python -m minipar grade exercises/09_bug_museum.ipynb
#     python -m minipar hint 09.1
#     python -m minipar solution 09.1    # once it has passed
#
# The laws:
#
# 1. Gradients equal those of one process.
# 2. Copies of a parameter stay equal on all ranks that hold one.
# 3. No more bytes and calls than the formula says.
# 4. No rank waits for ever.
# 5. What is random is the same where ranks hold the same, and different where they hold parts.

# %% tags=["setup"]
from collections.abc import Callable, Iterable
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipar import Axis, RankError, World, ledger
from minipar.collectives import all_reduce, isend, recv, send
from minipar.course.checks import difference, returned, verdict
from minipar.course.given import (
    along,
    fresh_model,
    gradients,
    loss_of_one_process,
    one_process,
    padded,
    targets,
    tokens,
    total_loss,
)
from minipar.data import rows

world = World(4)

# %% [markdown] lang="en"
# The next cells are folded: what the showcases run. An `axis` is the line of ranks that a function talks along:
# `axis.size` ranks, of which this one is number `axis.index`.


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given: half a GPT of two blocks, for two stages
class Stage(nn.Module):
    """Stage 0 has the embedding and a block, stage 1 the other block, the norm and the head."""

    def __init__(self, index: int, tied: bool = False):
        super().__init__()
        model = fresh_model(depth=2, tied=tied)
        self.names = {p: name for name, p in model.named_parameters()}
        first, second = (model.embed, model.blocks[0]), (model.blocks[1], model.norm, model.head)
        self.layers = nn.Sequential(*(second if index else first))
        self.shared = model.head.weight if index else model.embed.token.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def gradients(self) -> dict[str, Tensor]:
        return {self.names[p]: p.grad for p in self.parameters()}


def on_two_stages(function: Callable, *args) -> list:
    """What function(axis, *args) returns on stage 0 and on stage 1."""
    return along(world, "pp", function, *args, size=2)[::2]


def attempt(function: Callable, *args) -> str:
    """What it returns, or the first line of its error."""
    try:
        return str(function(*args))
    except RankError as error:
        return str(error).splitlines()[0]


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


# %% [markdown] lang="en"
# ## 09.1 · A pipeline that learns too fast
#
# Two stages, one microbatch after the other. The loss that it reports is right to the last digit, whatever the number
# of microbatches. With Adam its curve is right, too. The best-loved of all teaching repositories had this bug for
# years.
#
# **Target:** the gradients of the mean loss over all labeled tokens of the batch, also when rows have different
# lengths.

# %% [markdown] lang="en" hint="09.1"
# Compare the gradients for 1, 2 and 4 microbatches in the evidence. Each `.backward()` adds to `.grad`.

# %% [markdown] lang="en" hint="09.1"
# A mean over the labels of one microbatch is the wrong thing to add up. What would you have to divide the *sum* of a
# microbatch's losses by, so that the sum over microbatches is the mean of the batch?

# %% [markdown] lang="en" hint="09.1"
# `F.cross_entropy(..., reduction="sum") / labeled`, with `labeled = (targets != -100).sum()` of the whole batch.


# %% task="09.1" title="A pipeline that learns too fast"
def pipeline_step(stage: nn.Module, axis: Axis, tokens: Tensor, targets: Tensor, microbatches: int) -> float:
    """Set .grad on both stages. Returns the mean loss on stage 1, 0 on stage 0. tokens, targets: (8, 32)."""
    shown = 0.0
    for x, y in zip(rows(tokens, microbatches), rows(targets, microbatches), strict=True):
        if axis.index == 0:
            out = stage(x)  # (rows, 32, 32)
            send(out, axis, 1)
            out.backward(recv(out, axis, 1))
        else:
            received = recv(torch.empty(*x.shape, 32, dtype=torch.float64), axis, 0).requires_grad_()
            logits = stage(received).flatten(0, 1)
            ### BEGIN SOLUTION
            loss = F.cross_entropy(logits, y.flatten(), reduction="sum") / (targets != -100).sum()
            shown += loss.item()
            ### INSTEAD
            # loss = F.cross_entropy(logits, y.flatten())
            # shown += loss.item() / microbatches
            ### END SOLUTION
            loss.backward()
            send(received.grad, axis, 0)
    return shown


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for 09.1: a step of the pipeline
def pipelined(axis: Axis, step: Callable, targets: Tensor, microbatches: int) -> dict:
    stage = Stage(axis.index)
    with ledger() as book:
        loss = step(stage, axis, tokens, targets, microbatches)
    return {"loss": loss, "gradients": stage.gradients(), "bytes": book.bytes("pp"), "calls": book.calls("pp")}


# %%
whole = one_process(tokens, targets, depth=2)["head.weight"]
for microbatches in (1, 2, 4):
    last = on_two_stages(pipelined, pipeline_step, targets, microbatches)[1]
    norm = last["gradients"]["head.weight"].norm() / whole.norm()
    print(f"{microbatches} microbatches: loss {last['loss']:.6f}, head's gradient {norm:.3f} of one process's")

# %% check="09.1" seconds=30
# Check of 09.1: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    short = padded([32, 28, 20, 4, 6, 1, 9, 17])
    for case, labels, microbatches in [("full rows", targets, 4), ("rows of different lengths", short, 2)]:
        first, last = on_two_stages(pipelined, pipeline_step, labels, microbatches)
        what = f"{case}, {microbatches} microbatches"
        wanted = one_process(tokens, labels, depth=2)
        wrong = difference([first["gradients"] | last["gradients"]], wanted).removeprefix("rank 0: ")
        assert not wrong, f"{what}: {wrong} Do the microbatches' losses add up to the mean over the whole batch?"
        assert isinstance(returned(last["loss"], "pipeline_step"), float), "pipeline_step must return a number: .item()"
        off = abs(last["loss"] - loss_of_one_process(labels, depth=2))
        assert off < 1e-9, f"{what}: the gradients are right, but the loss that is returned is off by {off:.3g}."
        sent = 8 * 32 * 32 * 8
        for name, stage in (("stage 0", first), ("stage 1", last)):
            told = f"{what}: all is right, but {name} sends {stage['bytes']:,} bytes"
            assert stage["bytes"] == sent, f"{told}: activations, or their gradients, are {sent:,}."
    print(f"4 microbatches, gradients of one process, {sent:,} bytes each way")

# %% [markdown] lang="en"
# ## 09.2 · A hook that does its work for nothing
#
# As soon as backward has a gradient, a hook starts its all-reduce: as many calls and bytes as there should be, at the
# right moment. Each rank's loss falls. The ranks' weights are equal at the start, and drift apart.
#
# **Target:** one all-reduce for each parameter, and the gradients of one process on every rank.

# %% [markdown] lang="en" hint="09.2"
# What does PyTorch call this hook with? `help(torch.Tensor.register_post_accumulate_grad_hook)`.

# %% [markdown] lang="en" hint="09.2"
# It is called with the parameter, whatever the argument is called here; and nobody sees the new tensor, which has
# only a name in the hook. The gradient is in `.grad`.

# %% [markdown] lang="en" hint="09.2"
# In the hook: `p.grad = all_reduce(p.grad, axis)`.


# %% task="09.2" title="A hook that does its work for nothing"
def sum_when_ready(parameters: Iterable[nn.Parameter], axis: Axis) -> None:
    """Have each parameter's .grad summed over the ranks as soon as backward has added to it."""

    ### BEGIN SOLUTION
    def ready(p: nn.Parameter) -> None:
        p.grad = all_reduce(p.grad, axis)

    for p in parameters:
        p.register_post_accumulate_grad_hook(ready)
    ### INSTEAD
    # def ready(gradient: Tensor) -> None:
    #     gradient = all_reduce(gradient, axis)
    #
    # for p in parameters:
    #     p.register_post_accumulate_grad_hook(ready)
    ### END SOLUTION


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for 09.2: backward with the hooks in place
def hooked(axis: Axis, register: Callable) -> dict:
    model = fresh_model()
    register(model.parameters(), axis)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with ledger() as book:
        x, y = (rows(batch, axis.size)[axis.index] for batch in (tokens, targets))
        (total_loss(model, x, y) / targets.numel()).backward()
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    return {"gradients": gradients(model), "calls": book.calls("dp"), "bytes": book.bytes("dp"), "moved": moved}


# %%
ranks = along(world, "dp", hooked, sum_when_ready)
whole = one_process(tokens, targets)
print(f"calls: {ranks[0]['calls']} for {len(whole)} parameters")
for rank, got in enumerate(ranks):
    print(
        f"rank {rank}: head's gradient is off by {relative(got['gradients']['head.weight'], whole['head.weight']):.1%}"
    )

# %% check="09.2" seconds=20
# Check of 09.2: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    whole = one_process(tokens, targets)
    for n in (2, 4):
        answers = along(world, "dp", hooked, sum_when_ready, size=n)[:: 4 // n]
        wrong = difference([answer["gradients"] for answer in answers], whole)
        assert not wrong, f"On {n} ranks: {wrong} What is the hook given, and where does its result go?"
        least = sum(2 * (n - 1) * g.nbytes // n for g in whole.values())
        for rank, answer in enumerate(answers):
            what = f"On {n} ranks, the gradients are right, but rank {rank}"
            assert answer["calls"] == len(whole), f"{what} makes {answer['calls']} calls for {len(whole)} parameters."
            assert abs(answer["bytes"] - least) <= len(whole), f"{what} sends {answer['bytes']:,} bytes, not {least:,}."
            assert not answer["moved"], f"{what} has changed the weights of {answer['moved'][0]} in backward."
    print(f"{len(whole)} calls for {len(whole)} parameters, the same gradients on every rank")

# %% [markdown] lang="en"
# ## 09.3 · One weight in two places
#
# The embedding and the head share a weight. In a pipeline the embedding is on the first stage, the head on the last, so
# there are two copies, each with a gradient of its own use. The one weight's gradient is their sum. This code adds
# them up. After a step the model is not the one it was meant to be.
#
# **Target:** both copies have the same gradient, the one of one process. 2 calls at most for each stage.

# %% [markdown] lang="en" hint="09.3"
# Look at both lines of the evidence. Whose gradient is complete, and whose is not?

# %% [markdown] lang="en" hint="09.3"
# Both stages take an optimizer step on their copy. So both need the sum.

# %% [markdown] lang="en" hint="09.3"
# An all-reduce over the two stages does it in one line.


# %% task="09.3" title="One weight in two places"
def add_up_shared(p: nn.Parameter, axis: Axis) -> None:
    """After backward: make p.grad, of this stage's copy of the shared weight, what it is in one process.

    axis: of two ranks, the stages that hold a copy.
    """
    ### BEGIN SOLUTION
    p.grad = all_reduce(p.grad, axis)
    ### INSTEAD
    # if axis.index == 0:
    #     p.grad = p.grad + recv(p.grad, axis, 1)
    # else:
    #     send(p.grad, axis, 0)
    ### END SOLUTION


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for 09.3: a pipeline of one microbatch, with a tied weight
def tied(axis: Axis, add_up: Callable, scale: float) -> dict:
    stage = Stage(axis.index, tied=True)
    if axis.index == 0:
        out = stage(tokens)
        send(out, axis, 1)
        out.backward(recv(out, axis, 1))
    else:
        received = recv(torch.empty(8, 32, 32, dtype=torch.float64), axis, 0).requires_grad_()
        (scale * F.cross_entropy(stage(received).flatten(0, 1), targets.flatten())).backward()
        send(received.grad, axis, 0)
    others = {name: g.clone() for name, g in stage.gradients().items() if name != "embed.token.weight"}
    with ledger() as book:
        add_up(stage.shared, axis)
    kept = all(torch.equal(g, stage.gradients()[name]) for name, g in others.items())
    return {"shared": stage.shared.grad, "calls": book.calls("pp"), "others": kept}


# %%
whole = one_process(tokens, targets, depth=2, tied=True)["embed.token.weight"]
for stage, got in enumerate(on_two_stages(tied, add_up_shared, 1.0)):
    print(f"stage {stage}: the shared weight's gradient is off by {relative(got['shared'], whole):.1%}")

# %% check="09.3" seconds=20
# Check of 09.3: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    whole = one_process(tokens, targets, depth=2, tied=True)["embed.token.weight"]
    for scale in (1.0, 3.0):
        answers = on_two_stages(tied, add_up_shared, scale)
        for stage, answer in enumerate(answers):
            got, told = answer["shared"], f"stage {stage}: the gradient of the shared weight"
            assert got is not None, f"{told} is gone."
            both = torch.equal(got, answers[1 - stage]["shared"]) if answers[1 - stage]["shared"] is not None else False
            drift = "" if both else " The two copies have unlike gradients, and drift apart from the first step on."
            off = relative(got, scale * whole)
            assert off < 1e-10, f"{told} is off by {off:.1%} of what one process gets.{drift}"
            assert answer["others"], f"stage {stage}: the gradients of other parameters have changed."
            assert answer["calls"] <= 2, f"stage {stage} makes {answer['calls']} calls: one all-reduce does it."
    print("both copies have the gradient of one process")

# %% [markdown] lang="en"
# ## 09.4 · Norms that see half a sentence
#
# With sequence parallelism each tensor rank runs the norms on its part of the positions. Norms are not cut, each rank
# has them whole, and what a rank's backward gives is the part of the gradient that comes from *its* positions. Those
# parts have to be summed. This code does, and most norms agree with one process.
#
# **Target:** every norm's gradient equals that of one process, weights and biases, one call for all of them.

# %% [markdown] lang="en" hint="09.4"
# The evidence has a line for each norm. Which is off, and where is it in the model?

# %% [markdown] lang="en" hint="09.4"
# `model.blocks` has two norms in each block. There is one more: `model.norm`, before the head.

# %% [markdown] lang="en" hint="09.4"
# Or ask every module: `[m for m in model.modules() if isinstance(m, nn.LayerNorm)]`.


# %% task="09.4" title="Norms that see half a sentence"
def sum_norms(model: nn.Module, axis: Axis) -> None:
    """Sum the gradients of all norms over the tensor axis, in one call."""
    ### BEGIN SOLUTION
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    ### INSTEAD
    # norms = [norm for block in model.blocks for norm in (block.norm1, block.norm2)]
    ### END SOLUTION
    parameters = [p for norm in norms for p in norm.parameters()]
    flat = all_reduce(torch.cat([p.grad for p in parameters]), axis)
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = part


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for 09.4: a model in which only norms learn, on a part of the positions
class PartOfSequence(nn.Module):
    """The small GPT with an MLP in place of attention: then positions do not need each other."""

    def __init__(self):
        super().__init__()
        self.model = fresh_model(depth=2)
        for p in self.model.parameters():
            p.requires_grad_(False)
        for module in self.model.modules():
            if isinstance(module, nn.LayerNorm):
                module.requires_grad_(True)

    def forward(self, positions: slice) -> dict[str, Tensor]:
        """The gradients of the norms, of the loss over these positions. It is divided by all of them."""
        x = self.model.embed(tokens)[:, positions]
        for block in self.model.blocks:
            x = x + block.mlp(block.norm1(x))
            x = x + block.mlp(block.norm2(x))
        logits = self.model.head(self.model.norm(x))
        loss = F.cross_entropy(logits.flatten(0, 1), targets[:, positions].flatten(), reduction="sum")
        (loss / targets.numel()).backward()
        return self.norms()

    def norms(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.model.named_parameters() if p.requires_grad}


def on_part_of_the_sequence(axis: Axis, sum_up: Callable) -> dict:
    part = PartOfSequence()
    each = 32 // axis.size
    part(slice(each * axis.index, each * (axis.index + 1)))
    with ledger() as book:
        sum_up(part.model, axis)
    return {"gradients": part.norms(), "calls": book.calls("tp"), "bytes": book.bytes("tp")}


# %%
whole = PartOfSequence()(slice(0, 32))
got = along(world, "tp", on_part_of_the_sequence, sum_norms, size=2)[0]["gradients"]
for name in [name for name in whole if name.endswith("weight")]:
    print(f"{name:<24} is off by {relative(got[name], whole[name]):6.1%}")

# %% check="09.4" seconds=20
# Check of 09.4: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    whole = PartOfSequence()(slice(0, 32))
    for n in (2, 4):
        answers = along(world, "tp", on_part_of_the_sequence, sum_norms, size=n)[:n]
        wrong = difference([answer["gradients"] for answer in answers], whole)
        assert not wrong, f"On {n} ranks: {wrong} Was it summed over the ranks, which saw other positions?"
        calls, sent = answers[0]["calls"], answers[0]["bytes"]
        least = 2 * (n - 1) * sum(g.nbytes for g in whole.values()) // n
        assert calls == 1, f"The gradients are right, with {calls} calls: put them side by side, and make one."
        assert sent <= least, f"The gradients are right, but {sent:,} bytes are sent: the norms alone are {least:,}."
    print(f"{len(whole)} parameters of norms, one call, {sent:,} bytes")

# %% [markdown] lang="en"
# ## 09.5 · Dropout that is too much alike
#
# Outside the cut region all tensor ranks hold the same activations, and must drop the same ones. Inside it each holds
# other columns, and must draw for itself. This code gives both the same seed: on two ranks, columns 0 and 16 are always
# dropped together. The loss falls all the same; the model learns with less noise than it was told to.
#
# Whoever mends it in a hurry writes `seed + step + axis.index`. Then rank 1 drops in step 5 what rank 0 drops in step
# 6.
#
# **Target:** `outside` is the same on every rank; `inside` is another one on each rank; all of them are new in each
# step and for each seed.

# %% [markdown] lang="en" hint="09.5"
# A stream is made from three numbers: seed, step, and who draws. Different triples should give different streams.

# %% [markdown] lang="en" hint="09.5"
# `(a * 1000 + b) * 1000 + c` is another number for each triple, as long as `b` and `c` are below 1000. Let `c` be 0
# outside and `1 + axis.index` inside.


# %% task="09.5" title="Dropout that is too much alike"
def generators(seed: int, step: int, axis: Axis) -> tuple[torch.Generator, torch.Generator]:
    """Two streams of random numbers, for dropout outside and inside the cut region. step: below a million."""
    ### BEGIN SOLUTION
    base = (seed * 1_000_000 + step) * 1000
    outside = torch.Generator().manual_seed(base)
    inside = torch.Generator().manual_seed(base + 1 + axis.index)
    ### INSTEAD
    # outside = torch.Generator().manual_seed(seed + step)
    # inside = torch.Generator().manual_seed(seed + step)
    ### END SOLUTION
    return outside, inside


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for 09.5: what would be kept by dropout with p = 0.5, by seed and step
SEEDS, STEPS = (1, 2, 3), (0, 1, 2, 3, 999, 1000, 1001)


def masks(axis: Axis, make: Callable) -> dict:
    drawn, before = {}, torch.get_rng_state()
    for seed in SEEDS:
        for step in STEPS:
            for where, generator in zip(("outside", "inside"), make(seed, step, axis), strict=True):
                drawn[where, seed, step] = torch.rand(128, generator=generator) < 0.5
    others = (
        "torch's own generator was seeded anew: all else that draws from it would repeat itself. Make two of yours."
    )
    assert torch.equal(torch.get_rng_state(), before), others
    return drawn


# %%
first, second, *_ = along(world, "tp", masks, generators)
for where in ("outside", "inside"):
    same = [float((first[where, 1, step] == second[where, 1, step]).double().mean()) for step in STEPS[:4]]
    print(f"{where:<8} ranks 0 and 1 agree on", *(f"{share:.0%}" for share in same), "of the elements, by step")

# %% check="09.5" seconds=20
# Check of 09.5: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    for n in (2, 4):
        ranks = along(world, "tp", masks, generators, size=n)[:n]
        streams = {}  # (where, rank, seed, step) -> what is kept
        for rank, drawn in enumerate(ranks):
            for (where, seed, step), kept in drawn.items():
                what = f"outside, seed {seed}, step {step}: rank {rank} drops other elements than rank 0."
                assert where == "inside" or torch.equal(kept, ranks[0][where, seed, step]), what
                if where == "inside" or rank == 0:
                    streams[f"{where}, " + f"rank {rank}, " * (where == "inside") + f"seed {seed}, step {step}"] = kept
        for one, other in combinations(streams, 2):
            assert not torch.equal(streams[one], streams[other]), f"The same elements are dropped {one} and {other}."
    print(f"{len(streams)} streams, no two of them alike")

# %% [markdown] lang="en"
# ## 09.6 · Sums of unlike things
#
# Each rank reports the losses of its rows, and all want to know their mean. With 8 rows on 4 ranks this has worked for
# months. The last batch of an epoch has 10 rows. On bare gloo an all-reduce of tensors of different lengths raises no
# error: one rank gets numbers that mean nothing. `World` compares what ranks are about to send, and says so.
#
# **Target:** the mean over all rows, on every rank, in one call, with 16 bytes a rank in it.

# %% [markdown] lang="en" hint="09.6"
# Tensors that are summed over ranks must have the same shape. Which few numbers does each rank have to tell?

# %% [markdown] lang="en" hint="09.6"
# The sum of its losses, and how many they are. Both fit into one tensor of two numbers.

# %% [markdown] lang="en" hint="09.6"
# `torch.stack([losses.sum(), torch.tensor(float(len(losses)))])` wants one dtype: `losses.new_tensor(len(losses))`.


# %% task="09.6" title="Sums of unlike things"
def mean_loss(losses: Tensor, axis: Axis) -> Tensor:
    """The mean over the rows of all ranks, 0-d. losses: (rows of this rank,), float64; their number may differ."""
    ### BEGIN SOLUTION
    total, count = all_reduce(torch.stack([losses.sum(), losses.new_tensor(len(losses))]), axis)
    return total / count
    ### INSTEAD
    # return all_reduce(losses, axis).mean() / axis.size
    ### END SOLUTION


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for 09.6: losses of some rows, shared out
def shared_losses(axis: Axis, mean: Callable, total: int) -> dict:
    losses = torch.arange(1, total + 1, dtype=torch.float64) ** 2
    with ledger() as book:
        got = mean(rows(losses, axis.size)[axis.index], axis)
    return {"mean": got, "wanted": float(losses.mean()), "calls": book.calls("dp"), "bytes": book.bytes("dp")}


# %%
for total in (8, 10):
    said = attempt(lambda total=total: along(world, "dp", shared_losses, mean_loss, total)[0]["mean"])
    print(f"{total:>2} rows: {said}; it should be {(total + 1) * (2 * total + 1) / 6:.2f}")

# %% check="09.6" seconds=30
# Check of 09.6: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    for total, n in [(8, 4), (10, 4), (3, 4), (9, 2)]:
        answers = along(world, "dp", shared_losses, mean_loss, total, size=n)[:: 4 // n]
        for rank, answer in enumerate(answers):
            got = returned(answer["mean"], "mean_loss")
            assert isinstance(got, Tensor) and got.shape == (), f"mean_loss must return a 0-d tensor, not {got!r}"
            what = f"{total} rows on {n} ranks, rank {rank}"
            right = abs(float(got) - answer["wanted"]) < 1e-9
            assert right, f"{what}: you get {float(got):.4f}, the mean is {answer['wanted']:.4f}. Does every row count?"
            assert answer["calls"] == 1, f"{what}: right, with {answer['calls']} calls. One is enough."
            most = 2 * (n - 1) * 16 // n
            assert answer["bytes"] <= most, f"{what}: right, but {answer['bytes']} bytes are sent. {most} are enough."
    print("the mean of 8, 10, 3 and 9 rows, one call each")

# %% [markdown] lang="en"
# ## 09.7 · After you. No, after you
#
# In the steady state of a pipeline the first stage hands an activation down while the second hands a gradient up.
# With a library that buffers small messages this code works. Then the model grows.
#
# **Target:** both have what they wait for, with one send each, and no rank waits for ever, however large the message.

# %% [markdown] lang="en" hint="09.7"
# Read the report: both ranks are in `send`. Neither comes to its `recv`.

# %% [markdown] lang="en" hint="09.7"
# Either one rank receives first. Or a send is *started*, and waited for only when the receive is done.

# %% [markdown] lang="en" hint="09.7"
# `pending = isend(x, axis, other)`, then `recv`, then `pending.wait()`.


# %% task="09.7" title="After you. No, after you"
def exchange(x: Tensor, like: Tensor, axis: Axis) -> Tensor:
    """Give x to the other rank of an axis of two, and take from it what has the shape and dtype of `like`."""
    other = 1 - axis.index
    ### BEGIN SOLUTION
    pending = isend(x, axis, other)
    received = recv(like, axis, other)
    pending.wait()
    ### INSTEAD
    # send(x, axis, other)
    # received = recv(like, axis, other)
    ### END SOLUTION
    return received


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for 09.7: an activation goes down, a gradient up
def exchanged(axis: Axis, swap: Callable, size: int) -> dict:
    down, up = torch.arange(size, dtype=torch.float64), -torch.ones(size // 2, 2)
    mine, other = (down, up) if axis.index == 0 else (up, down)
    with ledger() as book:
        got = swap(mine.clone(), torch.empty_like(other), axis)
    right = isinstance(got, Tensor) and got.shape == other.shape and torch.equal(got, other)
    return {"right": right, "got": got, "calls": book.calls("pp"), "bytes": book.bytes("pp"), "sent": mine.nbytes}


# %%
print(attempt(lambda: [got["right"] for got in on_two_stages(exchanged, exchange, 100_000)]))

# %% check="09.7" seconds=30
# Check of 09.7: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    for size in (4, 100_000):
        for rank, answer in enumerate(on_two_stages(exchanged, exchange, size)):
            what = f"Messages of {size:,} numbers, rank {rank}"
            got = returned(answer["got"], "exchange")
            assert answer["right"], f"{what} returns {str(got)[:60]}, which is not what the other rank has sent."
            assert answer["calls"] == 1, f"{what} sends {answer['calls']} times: once is enough."
            assert answer["bytes"] == answer["sent"], f"{what} sends {answer['bytes']:,} bytes, not {answer['sent']:,}."
    print("both have what they wait for, with one send each")

# %% [markdown] lang="en"
# ## 09.8 · A vote in which some count double
#
# Ten rows on four ranks: two of them have three rows, two have two. Each takes the mean loss over its rows, and the
# gradients are averaged. As long as all have equally many rows this is right. Now a row counts more on a rank with few.
#
# **Target:** the gradients of the mean over all labeled tokens of the batch, on every rank; one call besides those for
# the gradients.

# %% [markdown] lang="en" hint="09.8"
# What should one token weigh? The same wherever it is: one over the number of labeled tokens on all ranks.

# %% [markdown] lang="en" hint="09.8"
# Sum the losses of this rank's tokens, divide by the global count (an all-reduce of the local one), sum the gradients,
# and divide by nothing else.


# %% task="09.8" title="A vote in which some count double"
def set_gradients(model: nn.Module, tokens: Tensor, targets: Tensor, axis: Axis) -> None:
    """Set .grad to the gradients of the mean loss over all ranks' rows. tokens, targets: (rows of this rank, 32)."""
    model.zero_grad()
    logits = model(tokens).flatten(0, 1)
    ### BEGIN SOLUTION
    count = all_reduce((targets != -100).sum(), axis)
    (F.cross_entropy(logits, targets.flatten(), reduction="sum") / count).backward()
    for p in model.parameters():
        p.grad = all_reduce(p.grad, axis)
    ### INSTEAD
    # F.cross_entropy(logits, targets.flatten()).backward()
    # for p in model.parameters():
    #     p.grad = all_reduce(p.grad, axis) / axis.size
    ### END SOLUTION


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for 09.8: a step on some of the rows
def on_some_rows(axis: Axis, set_them: Callable, targets: Tensor, total: int) -> dict:
    model = fresh_model()
    for p in model.parameters():
        p.grad = torch.ones_like(p)  # of a step before
    x, y = (rows(batch[:total], axis.size)[axis.index] for batch in (tokens, targets))
    with ledger() as book:
        set_them(model, x, y, axis)
    return {"gradients": gradients(model), "calls": book.calls("dp"), "rows": len(x)}


# %%
for total in (8, 7, 5):
    ranks = along(world, "dp", on_some_rows, set_gradients, targets, total)
    off = relative(ranks[0]["gradients"]["head.weight"], one_process(tokens[:total], targets[:total])["head.weight"])
    print(f"{total} rows, shares of {[got['rows'] for got in ranks]}: head's gradient is off by {off:.1%}")

# %% check="09.8" seconds=30
# Check of 09.8: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    short = padded([32, 28, 20, 4, 6, 1, 9, 17])
    for case, labels, total, n in [
        ("full rows", targets, 8, 4),
        ("full rows", targets, 7, 2),
        ("padding", short, 5, 4),
    ]:
        answers = along(world, "dp", on_some_rows, set_gradients, labels, total, size=n)[:: 4 // n]
        shares = [answer["rows"] for answer in answers]
        whole = one_process(tokens[:total], labels[:total])
        wrong = difference([answer["gradients"] for answer in answers], whole)
        assert not wrong, f"{case}, shares of {shares} rows: {wrong} What does one token weigh, on each of the ranks?"
        calls = max(answer["calls"] for answer in answers)
        told = f"{case}, shares of {shares} rows: right, with {calls} calls for {len(whole)} parameters."
        assert calls <= len(whole) + 1, f"{told} One more than that is enough."
    print("every token weighs the same, whatever the shares")

# %% [markdown] lang="en"
# ## 09.9 · Clipped by half
#
# Clipping scales all gradients by one factor, so that their norm over the *whole model* is at most some number. Here a
# tensor axis holds parts of some parameters, and copies of the others. Each rank clips by the norm of what it holds.
# The factors differ, so copies of a parameter that were equal are not, from the first clipped step on.
#
# **Target:** the norm of one process and its clipped gradients, on every rank, in one call of 8 bytes.

# %% [markdown] lang="en" hint="09.9"
# Squares of norms add up. Parts of a parameter on different ranks are different numbers: their squares have to be
# summed over the ranks. A copy is the same everywhere: how often should it count?

# %% [markdown] lang="en" hint="09.9"
# The square of the whole norm is `all_reduce(sum over parts)` + `sum over copies`. The copies are not sent.

# %% [markdown] lang="en" hint="09.9"
# Scale by `min(1, most / norm)`: gradients that are small enough stay as they are.


# %% task="09.9" title="Clipped by half"
def clip(parts: list[Tensor], copies: list[Tensor], most: float, axis: Axis) -> Tensor:
    """Scale all gradients in place so that their norm over the whole model is at most `most`. Returns the norm before.

    parts: gradients of which each rank holds other elements. copies: the same on every rank.
    """
    ### BEGIN SOLUTION
    square = all_reduce(sum(g.square().sum() for g in parts), axis) + sum(g.square().sum() for g in copies)
    norm = square.sqrt()
    ### INSTEAD
    # norm = sum(g.square().sum() for g in parts + copies).sqrt()
    ### END SOLUTION
    for g in parts + copies:
        g *= (most / norm).clamp(max=1)
    return norm


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for 09.9: three gradients, two of them cut
def clipped(axis: Axis, function: Callable, most: float) -> dict:
    draw = torch.Generator().manual_seed(3)
    up, down, norm, bias = (torch.randn(s, generator=draw, dtype=torch.float64) for s in [(8, 4), (4, 8), (5,), (3,)])
    up[0] *= 10  # the ranks' parts differ in size
    parts = [up.chunk(axis.size, 0)[axis.index].clone(), down.chunk(axis.size, 1)[axis.index].clone()]
    copies = [norm.clone(), bias.clone()]
    whole = torch.cat([g.flatten() for g in (up, down, norm, bias)]).norm()
    factor = min(1.0, most / float(whole))
    with ledger() as book:
        got = function(parts, copies, most, axis)
    wanted = [up.chunk(axis.size, 0)[axis.index], down.chunk(axis.size, 1)[axis.index], norm, bias]
    off = [float((g - factor * w).abs().max()) for g, w in zip(parts + copies, wanted, strict=True)]
    sent = {"calls": book.calls("tp"), "bytes": book.bytes("tp")}
    return {"norm": got, "whole": float(whole), "off": off, "copies": copies, **sent}


# %%
for rank, got in enumerate(along(world, "tp", clipped, clip, 1.0)):
    print(f"rank {rank}: norm {float(got['norm']):.3f} (one process: {got['whole']:.3f}), "
          f"first number of a copy {float(got['copies'][0][0]):+.4f}")  # fmt: skip

# %% check="09.9" seconds=20
# Check of 09.9: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    for most, n in [(1.0, 4), (1.0, 2), (1000.0, 4), (7.5, 2)]:
        for rank, answer in enumerate(along(world, "tp", clipped, clip, most, size=n)[:n]):
            got, what = returned(answer["norm"], "clip"), f"{n} ranks, at most {most:g}: rank {rank}"
            told = f"{what} returns the norm {float(got):.4f}, and that of the whole model is {answer['whole']:.4f}."
            assert abs(float(got) - answer["whole"]) < 1e-9, f"{told} Parts count once each, copies once in all."
            for name, off in zip(("a part", "a part", "a copy", "a copy"), answer["off"], strict=True):
                assert off < 1e-12, (
                    f"{what}: the norm is right, but {name} is off by {off:.2g}. At most 1 is the factor."
                )
            sent, least = answer["bytes"], 2 * (n - 1) * 8 // n
            assert answer["calls"] == 1, f"{what}: right, with {answer['calls']} calls: one number needs one."
            assert sent <= least, f"{what}: right, but {sent} bytes are sent: one number is {least}."
    print("one norm for all ranks, one call of one number")

# %% [markdown] lang="en"
# ## What they have in common
#
# None of the nine is found by looking at a loss curve. Each is found by a law that takes a line to state: gradients
# equal those of one process, copies stay equal, bytes equal a formula, nobody waits for ever. `tests/test_parity.py`
# and `tests/test_planted_bugs.py` hold this engine to them, and plant such bugs to see that they are noticed.
