# %% [markdown] lang="en"
# # Exercises of 02a: language models
#
# Seven small functions, an hour or so, on one process. They are what you count before you cut a model into pieces:
# parameters, operations, memory, the share of a device that a run makes use of. And two loops, one to write so that it
# fits, and one to mend.
#
# **How it works.** Run the cells from the top with Shift+Enter. Each task is a cell with a function for you to
# finish, where it says `raise NotImplementedError("your turn")`. The cell below it is its check, folded away since it
# gives things away; run it after yours. For a right answer it prints one line, the one that stands there already. For
# a wrong one it says what is wrong. Checks do not use your earlier answers: once the cells above the first task have
# run, start anywhere.
#
# Or let a terminal check, in the folder of the course:
#
#     # all tasks, a line each; with --watch again at each save
#     python -m minipar grade exercises/02a_language_models.ipynb
#
#     # hints for task 2, one at a time; its solution, once it passes
#     python -m minipar hint 02a.2
#     python -m minipar solution 02a.2
#
# `grade` reads only the cells with a function to finish. Cells that you add are for trying things out. The folded cells
# belong to the checks, so an answer that uses their variables or functions is refused: take what your function is
# given, and what is imported. Counts are to be computed from the shape: an answer that builds the model to count, or
# asks the package, is refused, too.

# %% tags=["setup"]
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from minipar import Config, corpus
from minipar.course.checks import difference, names_in, returned, verdict
from minipar.course.given import fresh_model, gradients, padded, rows_of_text

# %% [markdown] lang="en"
# A `Config` is the shape of the chapter's small GPT: `c.depth` blocks of width `c.width` with `c.heads` heads,
# `c.vocab` tokens in the vocabulary, rows of at most `c.context` tokens, and `c.tied`, whether the head uses the
# embedding's weights.


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given: what PyTorch counts
def real_parameters(c: Config) -> int:
    from minipar import gpt

    with torch.device("meta"):
        return sum(p.numel() for p in gpt(c).parameters())


def real_flops(c: Config, rows: int, tokens: int, recompute: bool) -> dict[str, int]:
    """FLOPs of matrix products in forward and backward: those with weights, and attention's two without."""
    from minipar import gpt

    model, ids = gpt(c), torch.zeros(rows, tokens, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), set_checkpoint_early_stop(False):
        x = model.embed(ids)
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False) if recompute else block(x)
        F.cross_entropy(model.head(model.norm(x)).flatten(0, 1), ids.flatten()).backward()
    counts = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    attention = sum(flops for op, flops in counts.items() if "bmm" in op)
    return {"weights": sum(counts.values()) - attention, "attention": attention}


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3),
}


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given: what training keeps, measured on real tensors; and what an answer may not use
def real_states(optimizer: str, mixed: bool) -> dict[str, float]:
    """Bytes a parameter of weights, gradients, the master copy and the optimizer's own numbers, after a step."""
    model = nn.Linear(8, 8, bias=False)
    master = [p.detach().clone().requires_grad_() for p in model.parameters()] if mixed else []
    model = model.bfloat16() if mixed else model
    weights = list(model.parameters())
    stepper = OPTIMIZERS[optimizer](master or weights)
    model(torch.ones(1, 8, dtype=weights[0].dtype)).sum().backward()
    for w, p in zip(master, weights, strict=False):
        w.grad = p.grad.float()
    stepper.step()
    own = [x for state in stepper.state.values() for x in state.values() if isinstance(x, Tensor) and x.dim()]
    kept = {"weights": weights, "gradients": [p.grad for p in weights], "master": master, "optimizer": own}
    return {what: sum(x.nbytes for x in tensors) / 64 for what, tensors in kept.items()}


def by_hand(answer: Any) -> None:
    """AssertionError if an answer asks the package or PyTorch for what it is to compute."""
    for name in sorted(names_in(answer)):
        module = getattr(globals().get(name), "__module__", None) or name
        own = module.split(".")[0] not in ("minipar", "torch") or name in ("Config", "Tensor", "F")
        assert own, f"{answer.__name__} uses `{name}`: here compute it yourself, from what it is given."


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given: what a shape and a difference are called
def shape(c: Config) -> str:
    return f"width {c.width}, depth {c.depth}, vocab {c.vocab}, context {c.context}{', tied' if c.tied else ''}"


def unlike(got: dict, wanted: dict, what: str = "gradient") -> str:
    """As difference, for one process."""
    told = difference([got], wanted, what).removeprefix("rank 0: ").replace("the same on every rank, but ", "")
    return told.replace("that of one process, on every rank", "what it should be").replace(
        "what one process gets", "it"
    )


def number(got: Any, name: str) -> float:
    """What a function of this name has returned, if it is one number."""
    assert isinstance(returned(got, name), int | float), f"{name} must return a number, not {got!r:.60}."
    return got


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for task 5: how many bytes autograd keeps for backward, at most at a time
class Kept:
    """A tensor that autograd keeps. It counts as long as it lives."""

    now, most, places = 0, 0, {}

    def __init__(self, x):
        self.x, self.place, self.size = x, x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()
        self.places[self.place] = self.places.get(self.place, 0) + 1
        Kept.now += self.size if self.places[self.place] == 1 else 0
        Kept.most = max(Kept.most, Kept.now)

    def __del__(self):
        self.places[self.place] -= 1
        Kept.now -= self.size if self.places[self.place] == 0 else 0


def most_kept(model: nn.Module, function, *args) -> tuple[Any, int]:
    """What a function returns, and the most bytes kept at a time while it ran; weights do not count."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    Kept.now, Kept.most, Kept.places = 0, 0, {}

    def pack(x):
        return x if x.untyped_storage().data_ptr() in weights else Kept(x)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.x if isinstance(kept, Kept) else kept):
        answer = function(model, *args)
    return answer, Kept.most


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for task 7: rows of text, and training as it should be and as it should not
def batches_of_text(steps: int) -> list[Tensor]:
    """So many batches of 8 rows of 33 tokens."""
    return [torch.cat([x, y[:, -1:]], 1) for x, y in corpus.batches(steps, rows=8, context=32)]


def right_or_wrong(model, batches, optimizer, first: int, shift: int, clear: bool) -> list[float]:
    losses = []
    for batch in batches:
        inputs, targets = batch[:, first : first + 32], batch[:, first + shift : first + shift + 32]
        if clear:
            optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


CHANGES = {
    "right": (0, 1, True),
    "what it costs to copy: targets are the inputs": (0, 0, True),
    "what it costs to copy: targets are the inputs, and gradients of earlier steps are still there": (0, 0, False),
    "with targets from the step of time before: what comes next is at a larger place": (1, -1, True),
    "with the gradients of earlier steps still in .grad": (0, 1, False),
}


def trained(*change, answer=right_or_wrong) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of four steps of SGD in float64, and the weights after them."""
    model = fresh_model()
    losses = answer(model, batches_of_text(4), torch.optim.SGD(model.parameters(), lr=0.3), *change)
    return losses, {name: p.detach() for name, p in model.named_parameters()}


# %% [markdown] lang="en"
# ## 02a.1 · Trace: what is predicted from what
#
# A text of nine tokens: 7 3 3 8 1 5 2 2 9. It is cut into two rows of four tokens each, the inputs of a step. The
# target of each token is the token that comes next in the text.
#
# Write down the inputs and the targets, two rows of four numbers each.

# %% [markdown] lang="en" hint="02a.1"
# The first row of the inputs is 7 3 3 8. Which token follows on the 7? And on the 8?

# %% [markdown] lang="en" hint="02a.1"
# The targets of the first row are 3 3 8 1. The last of them is the first token of the next row. Nothing is predicted
# from the 9.


# %% task="02a.1" title="Trace: what is predicted from what"
def inputs_and_targets() -> tuple[list[list[int]], list[list[int]]]:
    """Of the text 7 3 3 8 1 5 2 2 9: two rows of four inputs, and two rows of four targets."""
    ### BEGIN SOLUTION
    return [[7, 3, 3, 8], [1, 5, 2, 2]], [[3, 3, 8, 1], [5, 2, 2, 9]]
    ### END SOLUTION


# %% check="02a.1" seconds=10
# Check of 02a.1: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    text = [7, 3, 3, 8, 1, 5, 2, 2, 9]
    both = returned(inputs_and_targets(), "inputs_and_targets")
    assert len(both) == 2, "Give two things: the inputs, and the targets."
    for what, rows, shift in zip(("inputs", "targets"), both, (0, 1), strict=True):
        assert [len(row) for row in rows] == [4, 4], f"The {what} are two rows of four tokens, and you give {rows}."
        for row, place in ((0, 0), (1, 4)):
            got, right = list(rows[row]), text[place + shift : place + shift + 4]
            told = f"Row {row} of the {what} is {right}, and you give {got}."
            if shift and got == text[place : place + 4]:
                told += " These are the inputs: a model that may look at its target learns to copy."
            elif shift and got[:3] == right[:3]:
                told += f" What comes behind token {text[place + 3]} in the text?"
            assert got == right, told
    print(f"{len(text)} tokens: {sum(map(len, both[1]))} predictions, each made without a look at its target")

# %% [markdown] lang="en"
# ## 02a.2 · Complete: count the parameters
#
# From the shape alone. In a block, attention has four matrices of $h \times h$ (q, k, v, out), and the MLP two, of
# $h \times 4h$ and $4h \times h$. Each matrix has a bias, as long as what it gives. A norm has two numbers for each of
# the $h$ channels. A block has two norms, and there is a last one behind all blocks. The embedding has a vector of
# width $h$ for each token of the vocabulary, and one for each position. The head is a matrix without bias; tied to the
# embedding, it has no numbers of its own.
#
# **Target:** the number of parameters, to the last one, for every shape.

# %% [markdown] lang="en" hint="02a.2"
# Attention: $4(h^2 + h)$. MLP: $h \cdot 4h + 4h$ and $4h \cdot h + h$. Two norms: $4h$.

# %% [markdown] lang="en" hint="02a.2"
# Together a block has $12h^2 + 13h$. The embedding has $(V + s)\,h$, the last norm $2h$, and a head of its own $Vh$.


# %% task="02a.2" title="Complete: count the parameters"
def parameters(c: Config) -> int:
    """How many parameters the GPT of this shape has."""
    h, l, V, s = c.width, c.depth, c.vocab, c.context
    ### BEGIN SOLUTION
    block = 12 * h * h + 13 * h
    embedding = (V + s) * h
    head = 2 * h + (0 if c.tied else V * h)
    ### END SOLUTION
    return embedding + l * block + head


# %% check="02a.2" seconds=10
# Check of 02a.2: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    by_hand(parameters)
    shapes = [
        Config(),
        Config(tied=True),
        Config(depth=1, width=32, heads=4, vocab=100, context=16),
        Config(depth=3, width=48, heads=6, vocab=77, context=200, tied=True),
    ]
    for c in shapes:
        got, right = number(parameters(c), "parameters"), real_parameters(c)
        h, l, V, s = c.width, c.depth, c.vocab, c.context
        parts = {
            "the head": V * h,
            "the positions": s * h,
            "the embedding of tokens": V * h,
            "the last norm": 2 * h,
            "the biases of the blocks": 9 * h * l,
            "the norms of the blocks": 4 * h * l,
            "the biases of the MLPs": 5 * h * l,
            "the second matrix of the MLPs": 4 * h * h * l,
            "the biases of the norms": (2 * l + 1) * h,
        }
        cause = next((f" That is without {name}." for name, size in parts.items() if got == right - size), "")
        cause = cause or " The head is counted, and it is the embedding." * (c.tied and got == right + V * h)
        assert got == right, f"{shape(c)}: you count {got:,}, and the model has {right:,}.{cause}"
    large = Config(vocab=50257, context=2048, depth=96, width=12288, heads=96, tied=True)
    print(f"GPT-3: {parameters(large):,.0f} parameters, {12 * 96 * 12288**2 / parameters(large):.1%} of them 12 l h²")

# %% [markdown] lang="en"
# ## 02a.3 · Write: the FLOPs of a step
#
# A product of a vector with a matrix takes 2 FLOPs for each weight. Attention has two products without weights: each
# token's query with the keys of all tokens of its row, and its probabilities with their values. For each pair of
# tokens, either takes $h$ multiplications and as many additions, all heads together. (Pairs that the causal mask hides
# count, too.) Looking up an embedding is no product.
#
# Backward takes twice what forward takes. With full recompute, the forward of the blocks, and of nothing else, is done
# once more.
#
# **Target:** what PyTorch's own counter sees, exactly.

# %% [markdown] lang="en" hint="02a.3"
# For one token, the blocks' matrices have $12\,l\,h^2$ weights, and the head $Vh$. That is 2 FLOPs for each.

# %% [markdown] lang="en" hint="02a.3"
# Attention of one token: two products of $2h$ FLOPs with each of the row's $s$ tokens, so $4sh$ in each block. Here $s$
# is the argument `tokens`, not `c.context`.

# %% [markdown] lang="en" hint="02a.3"
# With blocks = $l\,(24h^2 + 4sh)$ and head = $2Vh$, forward and backward are three times their sum. Recompute adds
# blocks once.


# %% task="02a.3" title="Write: the FLOPs of a step"
def step_flops(c: Config, rows: int, tokens: int, recompute: bool) -> int:
    """FLOPs of forward and backward of so many rows, of so many tokens each."""
    ### BEGIN SOLUTION
    blocks = c.depth * (24 * c.width**2 + 4 * tokens * c.width)
    head = 2 * c.vocab * c.width
    each = 3 * (blocks + head) + (blocks if recompute else 0)
    return rows * tokens * each
    ### END SOLUTION


# %% check="02a.3" seconds=20
# Check of 02a.3: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    by_hand(step_flops)
    small, other = Config(depth=1, width=32, heads=4, vocab=64), Config(depth=2, width=48, heads=4, vocab=80, tied=True)
    for c, *case in [(small, 5, 16, False), (small, 2, 100, False), (other, 1, 40, False), (other, 2, 24, True)]:
        got, seen = number(step_flops(c, *case), "step_flops"), real_flops(c, *case)
        rows, tokens, recompute = case
        right, each = sum(seen.values()), rows * tokens
        head, attention = 2 * c.vocab * c.width * each, seen["attention"]
        blocks = (right - 3 * head) // (3 + recompute)
        wrong = {
            right // 3 if not recompute else 0: "That is forward alone: backward takes twice as much.",
            right // 2: "A weight takes a multiplication and an addition: 2 FLOPs.",
            right - attention: "That is without attention's two products.",
            right - attention // 2: "Attention has two products: with the keys, and with the values.",
            right - 3 * head: "That is without the head.",
            right - head: "The head has a backward, too.",
            right // rows: "That is for one row.",
            right // each: "That is for one token.",
            right - blocks: "Recompute does the blocks' forward once more." if recompute else "",
            right + head: "Recompute does not do the head again." if recompute else "",
            right + attention // tokens * (c.context - tokens): f"Rows have {tokens} tokens here, not {c.context}.",
        }
        what = f"{shape(c)}, {rows} rows of {tokens} tokens, recompute={recompute}: you say {got:,.0f} FLOPs"
        told = f"{what}, PyTorch counts {right:,}, {attention:,} of them attention's two products."
        assert abs(got - right) < 0.5, f"{told} {wrong.get(round(got), '')}".rstrip()
    more = step_flops(Config(), 8, 128, True) / step_flops(Config(), 8, 128, False) - 1
    print(f"the small GPT: {step_flops(Config(), 8, 128, False):,.0f} FLOPs for 8 rows, {more:.0%} more with recompute")

# %% [markdown] lang="en"
# ## 02a.4 · Write: what training keeps
#
# Of each parameter a step keeps the weight, the gradient, and what the optimizer keeps. Plain SGD keeps nothing, SGD
# with momentum one number (a running mean), Adam two. All of them in float32, 4 bytes.
#
# In mixed precision, weight and gradient have 16 bits. The optimizer's numbers stay in float32, and so does a master
# copy of the weight.
#
# **Target:** bytes as they are measured on real tensors, and whole devices.

# %% [markdown] lang="en" hint="02a.4"
# In float32: 4 for the weight, 4 for the gradient, and 4 for each number of the optimizer's.

# %% [markdown] lang="en" hint="02a.4"
# In mixed precision: 2 + 2, 4 for the master copy, and 4 for each number of the optimizer's. The master copy is there
# with SGD, too.

# %% [markdown] lang="en" hint="02a.4"
# `ceil(size / memory)` rounds up: 81 GB do not fit one device of 80.


# %% task="02a.4" title="Write: what training keeps"
def state_bytes(parameters: int, optimizer: str, mixed: bool) -> int:
    """Bytes of weights, gradients and optimizer. optimizer: "SGD", "momentum" or "Adam"."""
    ### BEGIN SOLUTION
    own = 4 * {"SGD": 0, "momentum": 1, "Adam": 2}[optimizer]
    return parameters * ((2 + 2 + 4 if mixed else 4 + 4) + own)
    ### END SOLUTION


def devices(size: int, memory: int) -> int:
    """How many devices of so many bytes of memory it takes to hold `size` bytes."""
    ### BEGIN SOLUTION
    return ceil(size / memory)
    ### END SOLUTION


# %% check="02a.4" seconds=10
# Check of 02a.4: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    by_hand(state_bytes)
    for optimizer in OPTIMIZERS:
        for mixed in (False, True):
            for size in (1, 1000):
                got, kept = state_bytes(size, optimizer, mixed), real_states(optimizer, mixed)
                got = number(got, "state_bytes") / size
                parts = ", ".join(f"{part} {each:.0f}" for part, each in kept.items() if each)
                told = f"{optimizer}, {'mixed precision' if mixed else 'float32'}: you say {got:g} bytes a parameter"
                right = sum(kept.values())
                cause = " What does the optimizer step on, if the weights have 16 bits?" * (got == right - 4 and mixed)
                assert got == right, f"{told}, and {right:.0f} are kept ({parts}).{cause}"
    for size, memory, right in [(112, 80, 2), (80, 80, 1), (81, 80, 2), (10, 80, 1), (160 * 10**9, 80 * 10**9, 2)]:
        got = number(devices(size, memory), "devices")
        told = f"{size:,} bytes on devices of {memory:,}: you say {got}, and it takes {right}."
        assert got == right, told
    every = {name: devices(state_bytes(70 * 10**9, name, True), 80 * 10**9) for name in OPTIMIZERS}
    print(
        "70 billion parameters, mixed precision, devices of 80 GB:", ", ".join(f"{k} {n:g}" for k, n in every.items())
    )

# %% [markdown] lang="en"
# ## 02a.5 · Write: a step that fits
#
# The activations of ten rows do not fit, so the step runs them in microbatches: forward and backward for some rows,
# then for the next ones, while gradients add up in `.grad`. What comes out must be the gradients of the mean loss over
# **all** labeled tokens of the batch, as if there were no microbatches. Rows are padded: a target of −100 is not
# labeled, and does not count. Ten rows in four microbatches make shares of 2, 3, 2 and 3, as `tensor_split` or a
# slice may cut them.
#
# **Target:** gradients and loss to twelve digits, each row through the model once, and never more activations at a time
# than those of the largest microbatch.

# %% [markdown] lang="en" hint="02a.5"
# Count the labeled tokens of the whole batch first: `(targets != -100).sum()`. Each microbatch's loss is the *sum* over
# its tokens, divided by that number: then gradients and losses just add up.

# %% [markdown] lang="en" hint="02a.5"
# `F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum")` leaves out targets of −100 by itself. Call
# `.backward()` on each microbatch's loss before the next one's forward: that frees its activations.

# %% [markdown] lang="en" hint="02a.5"
# What you return must hold no graph: add up `loss.detach()`.


# %% task="02a.5" title="Write: a step that fits"
def train_step(model: nn.Module, tokens: Tensor, targets: Tensor, microbatches: int) -> Tensor:
    """Set every .grad to the gradient of the mean loss over the labeled tokens. Returns that loss, 0-d.

    tokens, targets: (rows, T) of int64. model(tokens) gives logits, (rows, T, vocabulary).
    """
    model.zero_grad()
    ### BEGIN SOLUTION
    count = (targets != -100).sum()
    shown = torch.zeros((), dtype=torch.float64)
    for x, y in zip(tokens.tensor_split(microbatches), targets.tensor_split(microbatches), strict=True):
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum") / count
        loss.backward()
        shown += loss.detach()
    return shown
    ### END SOLUTION


# %% check="02a.5" seconds=20
# Check of 02a.5: run this after your answer
# NBVAL_CHECK_OUTPUT
def one_step(model, tokens, targets):
    """What it should be: all rows at once."""
    model.zero_grad()
    loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    loss.backward()
    return loss.detach()


with verdict():
    tokens, labels = rows_of_text()
    short = padded([32, 28, 20, 4, 6, 1, 9, 17])
    for case, targets, rows, parts in [("full", labels, 8, 4), ("padded", short, 8, 4), ("padded", short, 7, 3)]:
        model, seen = fresh_model(), []
        loss, whole = most_kept(model, one_step, tokens[:rows], targets[:rows])
        wanted = {name: grad.clone() for name, grad in gradients(model).items()}
        largest = most_kept(model, one_step, tokens[: -(-rows // parts)], targets[: -(-rows // parts)])[1]
        model.register_forward_pre_hook(lambda model, args, seen=seen: seen.append(len(args[0])))
        got, most = most_kept(model, train_step, tokens[:rows], targets[:rows], parts)
        told = f"{rows} {case} rows, {parts} microbatches"
        wrong = unlike(gradients(model), wanted)
        assert not wrong, f"{told}: {wrong} Is each loss divided by the labeled tokens of the whole batch?"
        assert isinstance(returned(got, "train_step"), Tensor), f"{told}: train_step must return a tensor, the loss."
        off = float(got.detach() - loss)
        assert abs(off) < 1e-9, f"{told}: the gradients are right, but the loss that is returned is off by {off:.3g}."
        told = f"{told}: gradients and loss are right, but"
        assert sum(seen) == rows, f"{told} {sum(seen)} rows went through the model in parts of {seen}."
        assert len(seen) == parts, f"{told} rows went through the model in {len(seen)} parts, {seen}."
        why = "Is there a backward before the next forward, and are rows shared out evenly?"
        assert most <= 1.01 * largest, f"{told} {most:,} bytes are kept at a time, and {largest:,} will do. {why}"
        assert not got.requires_grad, f"{told} the loss that is returned holds on to a graph: detach it."
    whole, part = (most_kept(model, one_step, tokens[:rows], labels[:rows])[1] for rows in (8, 2))
    print(f"kept at a time: {whole:,} bytes for 8 rows at once, {part:,} in 4 microbatches")

# %% [markdown] lang="en"
# ## 02a.6 · Write: how much of the device is used
#
# A run prints its speed in tokens a second. Is that fast? **MFU**, model FLOPs utilization, says it (Chowdhery et al.
# 2022, [arxiv.org/abs/2204.02311](https://arxiv.org/abs/2204.02311)): the FLOPs a second that the model needs, over
# those that the devices could do at most. What is computed a second time, to save memory, does not count: the model
# does not need it.
#
# A token takes $6P$ FLOPs, forward and backward, and attention $12\,l\,h\,s$ more, in rows of $s$ tokens.
#
# **Target:** exact, for any run. The check has two that were printed: Korthikanti et al. 2022
# ([arxiv.org/abs/2205.05198](https://arxiv.org/abs/2205.05198)) trained GPTs of 22 and 530 billion parameters on A100s,
# which do 312 TFLOP/s at most, with an MFU of 41.5 and 56.0 percent.

# %% [markdown] lang="en" hint="02a.6"
# FLOPs needed in a second = (FLOPs of a token) × (tokens in a second). All devices together could do
# `devices * peak` in that second.

# %% [markdown] lang="en" hint="02a.6"
# A run of `tokens` needs `flops * tokens`, and gets `used * devices * peak` of them a second. A day has 24 · 3600
# seconds.


# %% task="02a.6" title="Write: how much of the device is used"
def token_flops(parameters: float, layers: int, width: int, row: int) -> float:
    """What the model needs for one token, forward and backward, in rows of so many tokens."""
    ### BEGIN SOLUTION
    return 6 * parameters + 12 * layers * width * row
    ### END SOLUTION


def mfu(flops: float, speed: float, devices: int, peak: float) -> float:
    """The share of the peak that is used, 0 to 1.

    flops: of a token. speed: tokens that all devices together train on in a second. peak: FLOP/s of one device.
    """
    ### BEGIN SOLUTION
    return flops * speed / (devices * peak)
    ### END SOLUTION


def days(flops: float, tokens: float, used: float, devices: int, peak: float) -> float:
    """How long a run over so many tokens takes at an MFU of `used`."""
    ### BEGIN SOLUTION
    return flops * tokens / (used * devices * peak) / (24 * 3600)
    ### END SOLUTION


# %% check="02a.6" seconds=10
# Check of 02a.6: run this after your answer
# NBVAL_CHECK_OUTPUT
def held(name, case, got, right, causes):
    cause = next((f" {why}" for wrong, why in causes.items() if abs(got / wrong - 1) < 1e-9), "")
    assert abs(got / right - 1) < 1e-9, f"{case}: {name} gives {got:.6g}, and it is {right:.6g}.{cause}"


with verdict():
    # Korthikanti et al. 2022: parameters, layers, width, devices, rows of a step, seconds of a step
    for P, l, h, n, rows, seconds in [(22e9, 48, 6144, 8, 4, 1.1), (530e9, 105, 20480, 280, 280, 37.83)]:
        by_hand(token_flops), by_hand(mfu), by_hand(days)
        case, speed, A = f"{P / 1e9:.0f}B on {n} A100s", rows * 2048 / seconds, 12 * l * h * 2048
        causes = {
            6 * P: "That is without attention.",
            8 * P + A / 3 * 4: "What is computed again does not count: 6, not 8.",
            2 * P + A / 3: "That is forward alone.",
            6 * P + A / 2048: "A token attends to all tokens of its row.",
            6 * P + A / l: "Each layer has attention.",
        }
        flops = 6 * P + A
        held("token_flops", case, number(token_flops(P, l, h, 2048), "token_flops"), flops, causes)
        share, full = flops * speed / (n * 312e12), flops * speed / 312e12
        causes = {
            100 * share: "A share from 0 to 1 is asked for.",
            full: "All devices share the work.",
            1 / share: "Up.",
        }
        got = number(mfu(flops, speed, n, 312e12), "mfu")
        held("mfu", f"{case}, {speed:,.0f} tokens a second", got, share, causes)
        time = flops * 3e11 / (share * n * 312e12)
        causes = {
            time: "That is in seconds.",
            time * share / 86400: "That is at the peak.",
            n * time / 86400: "On one.",
        }
        got = number(days(flops, 3e11, share, n, 312e12), "days")
        held("days", f"{case}, 300 billion tokens, MFU {share:.1%}", got, time / 86400, causes)
    print(f"530B: MFU {100 * mfu(flops, speed, n, 312e12):.1f} %, {got:,.0f} days for 300 billion tokens on 280 A100s")

# %% [markdown] lang="en"
# ## 02a.7 · Mend: a loss that is too good
#
# This loop trains a small GPT on Python's documentation, and its loss falls as no other. The cell after it runs 60
# steps and prints five numbers. There are two mistakes in the loop, one in *what* is learned and one in *how*, and each
# shows in one of these numbers.
#
# Say which number shows the first mistake: a model that predicts what comes next cannot have it after 60 steps. Then
# mend the loop.

# %% [markdown] lang="en" hint="02a.7"
# In the chapter, a guesser that had counted all pairs had a loss of 3.7, and the model 3.6 after 600 steps.

# %% [markdown] lang="en" hint="02a.7"
# Which token is to be predicted at place 0 of a row? Cut a row of $T + 1$ tokens so that inputs and targets have $T$
# tokens each.

# %% [markdown] lang="en" hint="02a.7"
# `backward()` *adds* to `.grad`. In step 60 the gradients of 60 steps are in it.


# %% task="02a.7" title="Mend: a loss that is too good"
def learns_something_else() -> str:
    """The line that shows it: "first loss", "last loss", "tokens", "gradient 1" or "gradient 60"?"""
    ### BEGIN SOLUTION
    return "last loss"
    ### END SOLUTION


def train(model: nn.Module, batches: list[Tensor], optimizer: torch.optim.Optimizer) -> list[float]:
    """A step for each batch, (rows, T + 1) tokens of text. Returns the losses, each from before its step."""
    losses = []
    for batch in batches:
        ### BEGIN SOLUTION
        inputs, targets = batch[:, :-1], batch[:, 1:]
        optimizer.zero_grad()
        ### INSTEAD
        # inputs, targets = batch[:, :-1], batch[:, :-1]
        ### END SOLUTION
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# %%
model, norms = fresh_model().float(), []
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
optimizer.register_step_pre_hook(lambda *_: norms.append(sum(p.grad.norm() ** 2 for p in model.parameters()) ** 0.5))
losses = train(model, batches_of_text(60), optimizer)
print(f"first loss   {losses[0]:6.2f}")
print(f"last loss    {losses[-1]:6.2f}")
print(f"tokens       {60 * 8 * 32:6,}")
print(f"gradient 1   {norms[0]:6.2f}   (its norm, in step 1)")
print(f"gradient 60  {norms[-1]:6.2f}")

# %% check="02a.7" seconds=20
# Check of 02a.7: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    line = str(returned(learns_something_else(), "learns_something_else"))
    lines = ("first loss", "last loss", "tokens", "gradient 1", "gradient 60")
    assert line in lines, f"{line!r} is none of {', '.join(map(repr, lines))}."
    told = f"{line!r} says nothing of *what* is learned." if "gradient" in line else f"{line!r} is as it should be."
    assert line == "last loss", f"{told} How low may a loss be that is honestly come by?"
    runs = {name: trained(*change) for name, change in CHANGES.items()}
    got, model = trained(answer=train)
    losses, weights = runs["right"]
    assert isinstance(returned(got, "train"), list) and len(got) == 4, (
        f"train returns {got!r:.60}: a loss for each step."
    )
    graph = "train returns losses that hold on to their graphs, and with these to all activations: use .item()"
    assert all(isinstance(loss, float) for loss in got), graph
    for step in range(4):
        other = next((name for name, run in runs.items() if abs(got[step] - run[0][step]) < 1e-9), "")
        cause = f" That is {other}." * (other not in ("", "right"))
        told = f"The loss of step {step + 1} is {got[step]:.4f}, and should be {losses[step]:.4f}.{cause}"
        assert abs(got[step] - losses[step]) < 1e-9, told
    wrong = unlike(model, weights, "value")
    assert not wrong, f"The losses are right, but after four steps {wrong}"
    print("four steps:", ", ".join(f"{loss:.2f}" for loss in losses), "- and no look at the target")
