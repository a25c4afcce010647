# %% [markdown] lang="en"
# # Background: why many devices
#
# Large language models are trained on thousands of processors at a time. This course shows how, on your laptop. At the
# end of this first chapter you
#
# - have trained a small language model on eight processes at once, and checked that it learned what one process learns;
# - know what a rank, a mesh and an axis are;
# - can compute how much memory a model of 8, 70 or 405 billion parameters takes to train, and how many years one device
#   would need;
# - know which results from a laptop carry over to a cluster, and which do not;
# - have a list of claims that the rest of the course tests, and a map of it.
#
# **Time:** about 45 minutes. **You need:** Python and a little PyTorch: what a tensor is, and what `loss.backward()`
# does. No GPU, no network, and nothing about distributed programs.
#
# The chapter mirrors sections 1.1 to 1.4 of an article in Chinese, 《大规模语言模型从理论到实践 混合并行》 ("LLMs from
# theory to practice: hybrid parallelism"). The course follows this article section by section and tests what it says.
# From here on it is called **the document**; you need not know it.
#
# **How to read it.** Run the cells in order, with Shift+Enter. Before most runs you are asked for a prediction. Write
# it into the cell (`prediction = ...`) before you go on. A wrong prediction that you wrote down teaches more than a
# right answer that you read. The outputs of an earlier run stand below the cells; *Edit → Clear Outputs of All Cells*
# hides them. Where it says **Your turn**, you write a few lines yourself. One answer follows in a folded cell: run it
# as any other, and click on its three dots to read it.
#
# ## Three questions to warm up
#
# 1. A tensor has 1,000 × 1,000 numbers in float32. How many bytes is that?
# 2. Where does `loss.backward()` leave its results, and what does the optimizer do with them?
# 3. Two Python programs run on one computer. The first one sets `x = 3`. What is `x` in the second one?
#
# <details><summary>Answers</summary>
#
# 1. 4,000,000: a float32 has 4 bytes.
# 2. In the `.grad` of each parameter. The optimizer changes each parameter a little, in the direction that its
#    [gradient](../docs/glossary.md#gradient) tells.
# 3. Not defined. Programs that run at the same time share no variables.
#
# </details>
#
# ## 1. A first run on eight processes
#
# Nothing is explained yet. Run the cell; it takes some seconds. It trains a small GPT, the kind of model behind today's
# chatbots, on Python's own documentation, for four steps. Read the code if you like: most of it is a PyTorch training
# loop as you know it.

# %%
from copy import deepcopy
from time import perf_counter, process_time

import torch
import torch.nn.functional as F

import minipar
from minipar import Config, Mesh, World, corpus, cost, hardware, ledger, parallelize, rank, transformer, viz, widgets


def train(gpt, mesh, batches):
    model, losses = parallelize(gpt, mesh, microbatches=2), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for tokens, targets in batches:
        losses.append(model.step(tokens, targets).item())  # forward and backward
        optimizer.step()
    return losses, model.full_gradients()


batches = list(corpus.batches(steps=4, rows=8, context=128))  # each: 8 rows of text, 128 tokens a row
torch.manual_seed(0)
gpt, mesh, world = minipar.gpt(Config()).double(), Mesh(dp=2, pp=2, tp=2), World(8)
answers = world.run(train, gpt, mesh, batches)
print("loss, step by step:", *(f"{loss:.4f}" for loss in answers[0][0]))

# %% [markdown] lang="en"
# The loss falls. You have just trained a model on eight processes, with three kinds of parallelism at a time. Large
# models are trained like this, with eight replaced by thousands.
#
# (If the cell failed, open a terminal, *File → New → Terminal*, and run `source .venv/bin/activate`, then
# `python -m minipar doctor`. It says what this machine offers, whether processes can talk on it, and what to do if they
# cannot.)
#
# But a loss that falls proves little. Did the eight learn what *one* process would have learned? Here is the same
# training without minipar's parallel part: one process, and plain PyTorch.
#
# The strictest comparison is that of the **gradients**: for each of the model's parameters, how much the loss grows
# when the parameter grows. We take those of the fourth step, when three updates have already gone into the weights. All
# numbers are in float64 (that is what `.double()` did), which has about 16 digits.
#
# **Predict:** how many digits of the gradients agree? None, 3, 7, 15?

# %%
prediction = None  # a number of digits

model, losses = deepcopy(gpt), []
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for tokens, targets in batches:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    loss.backward()
    losses.append(loss.item())
    optimizer.step()
alone = {name: p.grad for name, p in model.named_parameters()}

largest = max(g.abs().max() for g in alone.values())
for eight_losses, gradients in answers:
    apart = max((gradients[name] - alone[name]).abs().max() for name in alone) / largest
    assert apart < 1e-12 and torch.allclose(torch.tensor(eight_losses), torch.tensor(losses))
print("one process, its losses:", *(f"{loss:.4f}" for loss in losses))
print("you wrote:", prediction, "- of the largest gradient, the difference is less than 1e-12:", bool(apart < 1e-12))

# %% [markdown] lang="en"
# At least twelve digits, counted from the first digit of the largest gradient, for every parameter and on every one of
# the eight. What is left is rounding: eight processes add the same numbers in another order. So this is **not another
# kind of training**. It is the same computation, spread out.
#
# That comparison is the law of this course. Each strategy in it, however clever, has to give the gradients of one
# process, and each chapter checks it. It is also the best tool against bugs. A training run with a wrong gradient often
# looks fine: its loss falls, too.
#
# ## 2. What happened? Rank, mesh, axis
#
# `World(8)` started eight **processes**: eight Python programs that run at the same time. Each is called a **rank**,
# and so is its number, 0 to 7. On a cluster, each rank has a processor of its own, usually a **GPU**, a processor built
# for many multiplications at once. On your laptop they share what there is. The program is the same.
#
# `world.run(train, ...)` sent the function `train` to all of them. Each one called it, and the notebook got eight
# answers. Ranks share no variables. What one has to know of another must be *sent*.
#
# `Mesh(dp=2, pp=2, tp=2)` says how they share the work. A **mesh** is nothing but a grid on which each rank has a
# place. Ours has two places in each of three directions, 2 × 2 × 2 = 8. A direction is called an **axis**, and each
# axis stands for one way to cut the work:
#
# - **dp, data parallelism.** The batch is cut. One half of the ranks got the first four rows of text, the other half
#   the last four.
# - **pp, pipeline parallelism.** The list of layers is cut. Our GPT is a chain of four blocks. One half of the ranks
#   has blocks 0 and 1 and hands its results on to the other half, which has blocks 2 and 3. `microbatches=2` cuts the
#   rows once more, so that one half can work on one part while the other half works on another.
# - **tp, tensor parallelism.** The matrices inside each layer are cut. Two ranks multiply with half of each matrix.
#
# `parallelize(model, mesh)` does the cutting. A mesh has two more axes, `cp` for long texts and `ep` for models with
# many experts; they have chapters of their own. **Hybrid parallelism**, the document's title, means several axes at a
# time.
#
# **Question.** The model has 940,800 parameters. How many of them does each rank hold?

# %%
prediction = None  # a number


def what_I_have(gpt, mesh, tokens, targets):
    model = parallelize(gpt, mesh, microbatches=2)
    model.step(tokens, targets)
    blocks = {name.split(".")[1] for name, _ in model.named_parameters() if name.startswith("blocks.")}
    rows = [row for part in model.rows for row in part]
    return sum(p.numel() for p in model.parameters()), sorted(blocks), rows


held = world.run(what_I_have, gpt, mesh, *batches[0])
P = sum(p.numel() for p in gpt.parameters())
for number, (count, blocks, rows) in enumerate(held):
    x = mesh.coordinate(number)
    place, mine = f"dp {x['dp']}, pp {x['pp']}, tp {x['tp']}", f"blocks {' and '.join(blocks)}"
    print(f"rank {number} at {place}: rows {rows[0]} to {rows[-1]}, {mine}, {count:,} parameters")
print("you wrote:", prediction, f"- all together {sum(count for count, *_ in held):,}, the model has {P:,}")
assert P == 940_800 and 0.25 * P < max(count for count, *_ in held) < 0.27 * P

# %% [markdown] lang="en"
# About a quarter. `pp` and `tp` cut the model, each in two. `dp` does not: ranks that differ only in their `dp` place
# hold the same parameters, so there are two copies of everything. (All together is a little more than two models, since
# a few small vectors are not worth cutting, and every `tp` rank has them. The first and the last part of the pipeline
# differ by what stands before block 0 and behind block 3.)


# %%
drawing, (panel,) = viz.figure(7.6, 3.0)
for number, (_, blocks, rows) in enumerate(held):
    place = mesh.coordinate(number)
    part = 2 * place["pp"] + place["tp"]  # ranks with the same part of the model stand in one column
    panel.barh(place["dp"] + 0.5, 0.92, 0.88, left=part + 0.04, fc=viz.PALETTE[part], ec=viz.INK, alpha=0.6)
    half = "1st" if place["tp"] == 0 else "2nd"
    text = f"rank {number}\nblocks {blocks[0]} and {blocks[1]}\n{half} half of matrices\nrows {rows[0]} to {rows[-1]}"
    panel.text(part + 0.5, place["dp"] + 0.5, text, ha="center", va="center", fontsize=9)
panel.set(xlim=(0, 4), ylim=(2, 0))
panel.set_xticks([0.5, 1.5, 2.5, 3.5], ["pp 0, tp 0", "pp 0, tp 1", "pp 1, tp 0", "pp 1, tp 1"])
panel.set_yticks([0.5, 1.5], ["dp 0", "dp 1"])
panel.tick_params(length=0)
panel.spines[:].set_visible(False)
panel.set_title("A column is one quarter of the model, a line is one half of the batch", fontsize=10)
alt = (
    "Eight ranks in two lines and four columns. The lines are the places along dp, with rows 0 to 3 and rows 4 to 7. "
    "The columns are blocks 0 and 1, first and second half of their matrices, then blocks 2 and 3 in the same way."
)
viz.show(drawing, alt)

# %% [markdown] lang="en"
# Ranks in one column have the same parameters and see other rows. After each step they must agree on the gradient, and
# for that they send. Ranks side by side send each other results in the middle of the computation. minipar keeps a
# **ledger** of who sends how many bytes, and along which axis.
#
# **Predict:** along which of the three axes does a rank send most in one step?

# %%
prediction = None  # "dp", "pp" or "tp"


def bytes_by_axis(gpt, mesh, tokens, targets):
    model = parallelize(gpt, mesh, microbatches=2)
    with ledger() as book:
        model.step(tokens, targets)
    return {axis: book.bytes(axis) for axis in ("dp", "pp", "tp")}


sent = world.run(bytes_by_axis, gpt, mesh, *batches[0])
for number in (0, 7):
    print(f"rank {number} sends", ", ".join(f"{size:,} bytes along {axis}" for axis, size in sent[number].items()))
print("you wrote:", prediction)
assert all(max(book, key=book.get) == "tp" and min(book, key=book.get) == "pp" for book in sent)

# %% [markdown] lang="en"
# Along `tp`, because its ranks talk inside every layer; along `pp` the least. This order is typical of large models,
# too. It decides which ranks should sit next to each other, with the fastest wires between them. Every number here is
# explained, and predicted to the byte, in chapters 3a to 3c.
#
# ## 3. What counts on a laptop
#
# Eight ranks did the work. Were they eight times as fast as one? We measure. Each of 1, 2, 4 and 8 ranks trains the
# model for a few steps with data parallelism alone, always on the same 16 rows. Each rank may use one **core**, a part
# of a processor that runs one program at a time. We note three things of each step:
#
# - how long it takes, by the clock;
# - **processor time**: for how long a core was at work, summed over all ranks. A rank that waits adds nothing to it;
# - the bytes that a rank sends.
#
# **Predict:** one rank needs 1 second. How long does a step take with eight ranks, on your machine, and what is their
# processor time together?

# %%
prediction = None  # (by the clock, processor time), in units of what one rank needs


def step_by_step(gpt, mesh, batches):
    torch.set_num_threads(1)  # one core a rank
    model, found = parallelize(gpt, mesh), []
    for tokens, targets in batches:
        clock, worked = perf_counter(), process_time()
        with ledger() as book:
            model.step(tokens, targets)
        found.append((perf_counter() - clock, process_time() - worked, book.bytes()))
    return found[1:]  # the first step sets up connections


same_work = list(corpus.batches(steps=7, rows=16, context=128))
measured = {}
for n in (1, 2, 4, 8):
    with World(n) as some:
        measured[n] = some.run(step_by_step, deepcopy(gpt).float(), Mesh(dp=n), same_work)

# %%
clock, work, sent_here = {}, {}, {}  # for each number of ranks, of six steps
for n, ranks in measured.items():
    steps = list(zip(*ranks, strict=True))  # a step: what each rank found
    clock[n] = min(max(seconds for seconds, _, _ in step) for step in steps)
    work[n] = min(sum(worked for _, worked, _ in step) for step in steps)
    sent_here[n] = [step[0][2] for step in steps]
drawing, (left, right) = viz.figure(7.8, 3.3, columns=2)
left.plot(list(clock), [s / work[1] for s in clock.values()], "o-", color=viz.PALETTE[5], label="by the clock")
left.plot(list(work), [s / work[1] for s in work.values()], "^-", color=viz.PALETTE[6], label="processor time")
left.plot(list(clock), [1 / n for n in clock], ":", color=viz.INK, label="1 / ranks")
left.set(ylim=(0, None), ylabel="one rank's processor time = 1", xlabel="ranks")
left.set_title(f"A step on this machine ({rank.cores()} cores)")
left.legend(frameon=False, fontsize=9, loc="center right", bbox_to_anchor=(1.0, 0.36))
for n, sizes in sent_here.items():  # six points each
    right.plot([n] * len(sizes), [size / 1e6 for size in sizes], "s", color=viz.PALETTE[2])
right.set(ylim=(0, None), ylabel="million bytes", title="Sent by a rank in a step")
for panel in (left, right):
    panel.set(xlabel="ranks", xticks=list(measured))

# %%
alt = (
    "Left: a step with 1, 2, 4 and 8 ranks on the machine that ran this notebook, in units of one rank's processor "
    "time: its length by the clock, the processor time of all ranks together, and for comparison 1/ranks. Right: bytes "
    "that a rank sends in the same steps; the six points of each number of ranks lie on one another. "
    "One rank sends nothing, two send the size of the gradient, eight 1.75 times that."
)
viz.show(drawing, alt)
G = 4 * P + 16  # 4 bytes for each number of the gradient, and 16 for the loss
assert [set(sizes) for sizes in sent_here.values()] == [{0}, {G}, {1.5 * G}, {1.75 * G}]

# %% [markdown] lang="en"
# To the left are times, of your machine and of this hour. Look at the processor time first. It does not shrink: the
# work is cut in parts, but the parts together are the same work, and each rank adds its own preparations and its
# sending. By the clock, a step can get shorter only as long as there are cores for more ranks. With two cores it takes
# at least half of the processor time, whether two ranks share the work or eight. The dotted line is what you would hope
# for; it needs a core for each rank.
#
# (Two reasons why your picture may look different. If other programs keep your machine busy, ranks wait for a core, so
# the line of the clock lies higher; and many ranks together get a larger share of the cores than one. And PyTorch, left
# alone, uses several cores in one process. Therefore a plain training script on a laptop gains nothing from more
# ranks.)
#
# To the right are bytes. All six steps of each run give the same number: the six points lie on one another.
#
# That tells what you can learn on a laptop, and what you cannot:
#
# | | on a laptop | carries over to a cluster? |
# |---|---|---|
# | the numbers: gradients, losses | equal to one process | yes |
# | bytes: who sends how many to whom | counted by the ledger | yes, for the same layout |
# | order: what waits for what | recorded | yes |
# | memory: what each rank holds | counted | yes |
# | seconds | your processor's, shared by all ranks | **no** |
#
# So in this course counts, bytes, orders and memory are asserted: a cell fails where they are not what the text says.
# Seconds are only drawn, and always as your own. Where a chapter makes a statement about time on a real cluster, it
# computes it from bytes, operations and the speeds of links and devices, and compares with times that others have
# published.
#
# ## 4. Why one device is not enough: memory
#
# Section 1.1 of the document says that large language models are so large, and so costly to compute, that it is an
# urgent question how to train them on limited hardware. It gives no number. Let us compute some.
#
# Three models, whose shapes their makers have published (Llama Team 2024,
# [arXiv 2407.21783](https://arxiv.org/abs/2407.21783), Table 3). `find_model` knows their shapes, and counts their
# parameters one by one, without making a single tensor.

# %%
models = [transformer.find_model(name) for name in ("llama-8b", "llama-70b", "llama-405b")]
for model in models:
    print(f"{model.name:<10} {model.layers:>3} layers of width {model.hidden:>6,}: {model.parameters:>15,} parameters")
assert [round(model.parameters / 1e9, 1) for model in models] == [8.0, 70.6, 405.9]

# %% [markdown] lang="en"
# What must be in memory to train a parameter? Its value (the **weight**), its **gradient**, and what the optimizer
# keeps for it. Nearly all language models are trained with Adam or a relative of it, which keeps two running means for
# each parameter.
#
# In **mixed precision**, the usual way, the model computes with numbers of 16 bits, that is 2 bytes. Adam works with
# numbers of 32 bits, 4 bytes, because small updates get lost in 16: its two means and a precise copy of the weight.
#
# | | bytes a parameter |
# |---|---|
# | weight, 16 bits | 2 |
# | gradient, 16 bits | 2 |
# | optimizer: precise weight, two means, 32 bits each | 4 + 4 + 4 = 12 |
# | **together** | **16** |
#
# (Rajbhandari et al. 2020, [arXiv 1910.02054](https://arxiv.org/abs/1910.02054), section 3.1. Chapter 2a takes these 16
# bytes apart and measures them.) These are called the **states** of a model.
#
# **Your turn.** Write `devices_needed(parameters, memory)`: how many devices with `memory` bytes each does it take to
# hold the states, if nothing else had to be there? **Predict** it for the largest model and a GPU of 80 GB (1 GB is
# 1,000,000,000 bytes) before you run the cell.

# %%
prediction = None  # devices of 80 GB for llama-405b


def devices_needed(parameters, memory):
    return 1  # your lines in place of this one


for model in models:
    print(f"{model.name:<10} {devices_needed(model.parameters, 80e9)}")

# %% [markdown] lang="en"
# One answer is folded below.


# %% jupyter={"source_hidden": true}
# One answer: 16 bytes a parameter, rounded up to whole devices
def devices_for_states(parameters, memory):
    return int(-(-16 * parameters // memory))  # // rounds down; with both signs, up


counts = {model.name: devices_for_states(model.parameters, 80e9) for model in models}
mine = {model.name: devices_needed(model.parameters, 80e9) for model in models}
print("you wrote:", prediction, "- devices of 80 GB:", counts)
print("your function says the same:", mine == counts)
assert list(counts.values()) == [2, 15, 82]

# %% [markdown] lang="en"
# Even the smallest of the three, which runs on a good laptop when it only answers questions, cannot be trained like
# this on one 80 GB device. The largest needs 82 of them before it has read its first word.
#
# The package's version is `states`. It tells the three parts apart. The course has data sheets of some devices, too:

# %%
viz.show_source(cost.states)
for name, device in hardware.DEVICES.items():
    print(f"{name:<8} {device.memory / 1e9:>4.0f} GB, {device.bf16 / 1e12:>5,.0f} TFLOP/s with 16 bits")

# %% [markdown] lang="en"
# Two of its arguments, `ranks` and `zero`, are for later: they describe how ranks can share the states. With one rank
# and `zero=0` all is in one place. (TFLOP/s are the subject of section 5.)
#
# In the picture below, the bar is what a model's states take, and the dashed line is the memory of one device. **Before
# you move it:** which of the five models fit an H100? Which of them fit the largest device of the list?


# %%
prediction = None  # (models that fit an H100, models that fit the largest)


def draw_states(model, device):
    parts, memory = cost.states(transformer.find_model(model).parameters, 1, 0), hardware.DEVICES[device].memory
    total, left = sum(parts.values()), 0.0
    drawing, (panel,) = viz.figure(7.0, 1.9)
    for (name, size), color in zip(parts.items(), viz.PALETTE, strict=False):
        panel.barh(0, size / 1e9, left=left, color=color, edgecolor=viz.INK, lw=0.6, label=name)
        left += size / 1e9
    panel.axvline(memory / 1e9, color=viz.INK, ls="--", label=f"memory of one {device}")
    panel.set(xlim=(0, 1.1 * max(left, memory / 1e9)), yticks=[], xlabel="GB")
    needed = devices_for_states(transformer.find_model(model).parameters, memory)
    title = f"{model}: {total / 1e9:,.0f} GB of states, at least {needed} {device}"
    panel.set_title(title, fontsize=10)
    drawing.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return viz.describe(drawing, f"{title} with {memory / 1e9:.0f} GB each.")


widgets.explore(
    draw_states,
    model=["llama-1b", "llama-8b", "llama-70b", "gpt3-175b", "llama-405b"],
    device=["H100", "A100-40", "H200", "B200", "MI300X"],
)

# %%
shown = "llama-1b", "llama-8b", "llama-70b", "gpt3-175b", "llama-405b"
for device in ("H100", "MI300X"):
    memory = hardware.DEVICES[device].memory
    fitting = [name for name in shown if devices_for_states(transformer.find_model(name).parameters, memory) == 1]
    print(f"fit one {device}:", ", ".join(fitting))
print("you wrote:", prediction)
assert fitting == ["llama-1b", "llama-8b"] and max(d.memory for d in hardware.DEVICES.values()) == 192e9

# %% [markdown] lang="en"
# A device with more memory moves the border from 1 to 8 billion parameters. It does not come near 70.
#
# And the states are not all. Between forward and backward a model also keeps results of its layers, the
# **activations**. They grow with the rows of the batch and with their length. Chapters 2a and 3h are about them.
#
# ## 5. Why one device is not enough: time
#
# Suppose memory were no question. How long would *one* device compute?
#
# A **FLOP** is a floating-point operation: one addition or one multiplication. A device is rated in FLOP/s, how many it
# can do in a second; one TFLOP/s is $10^{12}$ of them. For each token that it reads, a model multiplies with (nearly)
# each of its weights and adds the product to a sum: 2 FLOPs for each parameter. Backward takes twice as many, because
# it computes two things in each layer, the gradient of the weights and the gradient to hand back to the layer before.
# So
#
# $$\text{FLOPs of a training run} \approx 6 \times \text{parameters} \times \text{tokens}$$
#
# Chapter 2a counts this operation by operation. For now, check it in two ways. `step_flops` counts the matrix products
# of a step exactly, attention included. And the makers of Llama 3 say that the 405B model was trained on 15.6 trillion
# tokens, with $3.8 \times 10^{25}$ FLOPs (Llama Team 2024).

# %%
tokens_read, row = 15.6e12, 8192  # tokens in a row
for model in models:
    exact = cost.step_flops(model, batch=1, sequence=row, causal=True)
    share = exact / (6 * model.parameters * row)
    print(f"{model.name:<10} counted {share:.2f} times what the rule of thumb says")
    assert 1.03 < share < 1.07
rule = 6 * models[-1].parameters * tokens_read
print(f"llama-405b on 15.6 trillion tokens: {rule:.1e} FLOPs")
assert f"{rule:.1e}" == "3.8e+25"  # as published

# %% [markdown] lang="en"
# The rule is off by less than 7% for these models and rows of 8,192 tokens, and gives the published number.
#
# **Your turn.** Write `years(flops, speed)`: how long is a computation of so many FLOPs, at so many FLOP/s? **Predict**
# the years of the 405B model on one H100 that reaches its data sheet's peak, 989 TFLOP/s, in every second.

# %%
prediction = None  # years


def years(flops, speed):
    return 0.0  # your lines in place of this one


print(f"your function: {years(rule, hardware.DEVICES['H100'].bf16):,.0f} years")


# %% jupyter={"source_hidden": true}
# One answer: seconds, and how many of them are in a year
def years_at(flops, speed):
    return flops / speed / (365.25 * 24 * 3600)


needed = {model.name: years_at(6 * model.parameters * tokens_read, hardware.DEVICES["H100"].bf16) for model in models}
print("you wrote:", prediction, "- years:", {name: round(years) for name, years in needed.items()})
assert [round(number) for number in needed.values()] == [24, 212, 1217]

# %% [markdown] lang="en"
# 1,217 years for the largest of them, on the same amount of text 24 years for the smallest. And no program reaches the
# peak of the data sheet. What about your own processor? We let it multiply two large matrices, the thing it is best at,
# and take the fastest of some tries.


# %%
def speed_of_this_machine(size=1024, tries=8):
    a, seconds = torch.randn(size, size), []
    for _ in range(tries):
        start = perf_counter()
        a @ a
        seconds.append(perf_counter() - start)
    return 2 * size**3 / min(seconds)  # a multiplication and an addition, size**3 times


speeds = {"this machine": speed_of_this_machine()}
speeds |= {name: hardware.DEVICES[name].bf16 for name in ("V100", "A100", "H100", "B200")}
drawing, (panel,) = viz.figure(7.6, 3.0)
for model, color, marker in zip(models, viz.PALETTE[4:], "osv", strict=False):
    took = [years_at(6 * model.parameters * tokens_read, speed) for speed in speeds.values()]
    panel.semilogx(took, list(speeds), marker, ms=8, color=color, label=model.name)
panel.set(xlabel="years", ylim=(len(speeds) - 0.5, -0.5), xlim=(1, None))
panel.set_title("15.6 trillion tokens on one device at its peak", fontsize=10)
panel.grid(axis="x", color="#DDDDDD")
drawing.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
alt = "Years on a logarithmic axis that three models would need on one device. B200, the fastest, needs 11, 93 and 535 "
viz.show(drawing, alt + "years for 8B, 70B and 405B; the processor that ran this notebook far more.")

# %% [markdown] lang="en"
# The axis is logarithmic: from one line to the next it is ten times as long. The first line of points is your machine.
#
# So a model of this size *has* to be spread over many devices, once for memory and once for time, and the two reasons
# ask for different things. To be done in time, it takes many devices that all compute. To fit at all, it takes a way to
# cut the model. The 405B model was trained on up to 16,384 H100, which reached 400 TFLOP/s each (Llama Team 2024,
# Table 4). At that rate the whole text takes

# %%
days = rule / (16384 * 400e12) / (24 * 3600)
at_peak = rule / (16384 * hardware.DEVICES["H100"].bf16) / (24 * 3600)
print(f"{days:.0f} days; at the data sheet's peak it would be {at_peak:.0f}")
assert (round(days), round(at_peak)) == (67, 27)

# %% [markdown] lang="en"
# 67 days in place of 1,217 years. (An estimate: "up to 16,384" means that there were not always so many.) And 60% of
# the peak were lost, to waiting, to sending, and to all that is not a large matrix product. Understanding where that
# goes is much of what this course is about.
#
# ## 6. Many devices: what must be cut
#
# Give each of the 16,384 devices its own rows, and otherwise all of the model: data parallelism alone. **Predict:** how
# much memory do the states take on each of them?

# %%
prediction = None  # GB on each device

whole = cost.states(models[-1].parameters, ranks=1, zero=0)
print(f"you wrote: {prediction} - {sum(whole.values()) / 1e9:,.0f} GB on each, and each has 80")
assert sum(whole.values()) > 80 * 80e9

# %% [markdown] lang="en"
# Still 6,494 GB. More devices mean more copies. Data parallelism divides the *time*; it does not make a model that does
# not fit fit. The axes differ in what they divide:
#
# | axis | cuts | divides the states? | divides the work? | the price |
# |---|---|---|---|---|
# | `dp` | the rows of a batch | no, or yes with ZeRO (below) | yes | gradients are sent in every step |
# | `pp` | the list of layers | yes | yes | ranks wait while the pipeline fills and empties |
# | `tp` | the matrices of a layer | yes | yes | results are sent inside every layer |
# | `cp` | the tokens of a row | no | yes | what tokens need of earlier ones is sent around |
# | `ep` | the experts of a layer | those of experts | yes | tokens are sent to the experts and back |
#
# (An **expert** is one of several alternatives for a part of a layer. Each token uses a few of them. Section 7 has a
# model like that.)
#
# Llama 3's makers used `Mesh(dp=128, pp=16, tp=8)` for it (in the same Table 4). The model is cut in 16 × 8 = 128
# parts, and each part has 128 copies. The copies can share out what they hold in common, and that is **ZeRO**: with
# `zero=1` each of the 128 keeps the optimizer's part for one 128th of the parameters (stage 1), with 2 also of the
# gradients, with 3 also of the weights.
#
# **Predict:** do the states fit the 80 GB now?

# %%
prediction = None  # GB on each device, without ZeRO and with stage 1

layout = Mesh(dp=128, pp=16, tp=8)
part = models[-1].parameters / (layout.pp * layout.tp)
shared = [cost.states(part, ranks=layout.dp, zero=stage) for stage in range(4)]
parts = {what: [found[what] / 1e9 for found in shared] for what in shared[0]}
names = ["copies", "ZeRO 1", "ZeRO 2", "ZeRO 3"]
viz.show(viz.draw_bars(names, parts, "GB on each device", "States of llama-405b on 16,384 devices"))
print("you wrote:", prediction, "-", [round(sum(found.values()) / 1e9, 1) for found in shared])
assert [round(sum(found.values()) / 1e9, 1) for found in shared] == [50.7, 13.0, 6.7, 0.4]
assert layout.size == 16384

# %% [markdown] lang="en"
# The states alone fit. What is left of the 80 GB goes to the activations. Stage 3 needs almost nothing, so why not
# always take it? Because each step then sends far more. Memory, bytes and idle time can be traded for each other. What
# a choice costs is the subject of chapter 4b.
#
# ## 7. From 2017 to today
#
# How did it come to this? The figure shows models whose sizes their makers have published; for many later ones they
# have not. For each of them the table below the figure names the source.

# %%
UNKNOWN, TENSORS, LAYERS = "one machine, or not published", "matrices (and data)", "layers, too (a pipeline)"
published = {  # year and month of the paper, parameters, what was cut, where the label goes
    "Transformer (big)": (2017, 6, 213e6, UNKNOWN, (-22, 9)),
    "GPT": (2018, 6, 117e6, UNKNOWN, (8, -6)),
    "BERT-large": (2018, 10, 340e6, UNKNOWN, (8, -6)),
    "GPT-2": (2019, 2, 1.5e9, UNKNOWN, (8, -6)),
    "Megatron-LM": (2019, 9, 8.3e9, TENSORS, (-68, 7)),
    "T5": (2019, 10, 11e9, TENSORS, (8, -6)),
    "GPT-3": (2020, 5, 175e9, LAYERS, (8, -10)),
    "MT-NLG": (2022, 1, 530e9, LAYERS, (-46, 7)),
    "PaLM": (2022, 4, 540e9, TENSORS, (8, 2)),
    "Llama": (2023, 2, 65e9, TENSORS, (8, -6)),
    "Llama 3": (2024, 7, 405e9, LAYERS, (-18, -18)),
    "DeepSeek-V3": (2024, 12, 671e9, LAYERS, (-72, 7)),
}
looks = {UNKNOWN: ("o", viz.PALETTE[7]), TENSORS: ("^", viz.PALETTE[5]), LAYERS: ("s", viz.PALETTE[6])}
fit = 80e9 / 16  # parameters whose states fill 80 GB
assert sum(size < fit for _, _, size, *_ in published.values()) == 4
assert round(671e9 / 213e6, -2) == 3200  # the text below

# %%
drawing, (panel,) = viz.figure(7.8, 4.2)
for kind, (marker, color) in looks.items():
    spots = [(y + (m - 0.5) / 12, size) for y, m, size, what, _ in published.values() if what == kind]
    panel.semilogy(*zip(*spots, strict=True), marker, ms=8, color=color, label=kind)
for name, (year, month, size, _, offset) in published.items():
    spot = year + (month - 0.5) / 12, size
    panel.annotate(name, spot, offset, textcoords="offset points", fontsize=9)
# of DeepSeek-V3, what works on a token
panel.plot(2024.96, 37e9, "s", ms=8, mfc="white", color=viz.PALETTE[6])
where = {"textcoords": "offset points", "ha": "right", "fontsize": 8}
panel.annotate("37 billion of DeepSeek-V3's\nwork on a token", (2024.96, 37e9), (-9, -20), **where)
panel.axhline(fit, color=viz.INK, ls="--", lw=1)
panel.text(2025.3, fit / 1.7, "below: the states fit one device of 80 GB", fontsize=9, ha="right")
panel.set(xlim=(2017, 2025.4), ylim=(5e7, 2e12), ylabel="parameters", xlabel="year of the paper")
legend = drawing.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9, title="What was cut")

# %%
alt = (
    "Parameters of twelve published models on a logarithmic axis against the year of the paper: from 213 million in "
    "2017 over 11 billion in 2019 and 175 billion in 2020 to 671 billion in 2024. Four lie below a line at 5 billion, "
    "whose states fill a device of 80 GB: they ran on one machine, or how they were cut is not published. "
    "All above the line were cut, half of them between layers, too."
)
viz.show(drawing, alt)

# %% [markdown] lang="en"
# From 2017 to 2024 the largest of them grew by a factor of about 3,200. The dashed line is at 5 billion parameters,
# whose states just fill 80 GB. Below it are four models, above it not one that was not cut.
#
# | model | parameters | how it was trained, as far as published | source |
# |---|---|---|---|
# | Transformer (big) | 213M | on one machine with 8 GPUs | Vaswani et al. 2017 |
# | GPT | 117M | the paper does not say | Radford et al. 2018; the size: Radford et al. 2019 |
# | BERT-large | 340M | on 64 TPU chips | Devlin et al. 2018 |
# | GPT-2 | 1.5B | the paper does not say | Radford et al. 2019 |
# | Megatron-LM | 8.3B | `tp` 8 × `dp` 64, 512 GPUs | Shoeybi et al. 2019 |
# | T5 | 11B | model and data parallelism on slices of TPU pods | Raffel et al. 2019 |
# | GPT-3 | 175B | matrices and layers cut; numbers not published | Brown et al. 2020 |
# | MT-NLG | 530B | `tp` 8 × `pp` 35, that is 280 GPUs a copy; and `dp` | Smith et al. 2022 |
# | PaLM | 540B | matrices in 12 parts, states shared by 256, two such groups | Chowdhery et al. 2022 |
# | Llama | 65B | model and sequence parallelism, 2,048 GPUs | Touvron et al. 2023 |
# | Llama 3 | 405B | `tp` 8 × `pp` 16 × `dp` 128, and `cp` for long rows | Llama Team 2024 |
# | DeepSeek-V3 | 671B | `pp` 16, `ep` 64, `dp` with ZeRO 1, no `tp` | DeepSeek-AI 2024 |
#
# (Links are at the end of the chapter. B is a billion, M a million.)
#
# (A TPU is Google's processor for the same purpose as a GPU. What papers call *model parallelism* is mostly `tp`.)
#
# Three things to see in it. First, each of the eight models above the line mixes at least two kinds of parallelism.
# Second, there is no one right mixture: MT-NLG and PaLM are nearly equally large and were published three months apart.
# One is built around a pipeline, the other one does without. Third, the last line is another kind of model. DeepSeek-V3
# has many experts in nearly all of its layers, and 37 of its 671 billion parameters work on a token. Memory must hold
# all; time counts those that work.
#
# Do not trust a figure only because it is printed. Four of these models have shapes from which their parameters can be
# counted. **Predict:** how far off, at most, are the printed sizes?

# %%
prediction = None  # per cent

shapes = {
    "GPT": transformer.Transformer("gpt", 12, 768, 12, vocabulary=40478, positions=512, tied=True),  # as released
    "GPT-2": transformer.find_model("gpt2-xl"),
    "GPT-3": transformer.find_model("gpt3-175b"),
    "Llama 3": transformer.find_model("llama-405b"),
}
worst = 0.0
for name, shape in shapes.items():
    printed, counted = published[name][2], shape.parameters
    worst = max(worst, abs(counted / printed - 1))
    print(f"{name:<8} printed {printed / 1e6:>8,.0f} million, counted {counted / 1e6:>11,.1f} million")
print(f"you wrote: {prediction} - the largest difference is {worst:.1%}")
assert worst < 0.04

# %% [markdown] lang="en"
# All four are rounded, and right within 4%; GPT-2's 1.5 billion is the largest difference, since its shape has 1.56.
# That is the spirit of this course: whatever can be counted is counted.
#
# ## 8. What the document claims, and where it is tested
#
# Section 1.2 of the document names three directions of research, 1.3 says what they are good for. It measures neither.
# Here is what it says, in our words, with the chapter that tests it.
#
# | | section | the document says | tested in |
# |---|---|---|---|
# | 1 | 1.2 | model parallelism, parts of the model on several nodes, makes training faster | [3b], [3c] |
# | 2 | 1.2 | data parallelism makes loading and preprocessing faster | [3a] |
# | 3 | 1.2 | pipeline parallelism runs stages of the training process at once, in less time | [3c] |
# | 4 | 1.2 | these three are the main directions | [3a] (ZeRO), [3e], [3f] |
# | 5 | 1.3 | parallel training takes much less time | [4b] |
# | 6 | 1.3 | it lowers the cost, on limited hardware | [4b] |
# | 7 | 1.3 | it makes the model better and more robust | [3a], [4a] |
#
# [3a]: 03a_data_parallel.ipynb
# [3b]: 03b_tensor_parallel.ipynb
# [3c]: 03c_pipeline_parallel.ipynb
# [3e]: 03e_long_context.ipynb
# [3f]: 03f_experts.ipynb
# [4a]: 04a_math.ipynb
# [4b]: 04b_cost_models.ipynb
#
# The word *node* means a computer of a cluster, often with eight GPUs. What the document calls model parallelism is
# what we split into `tp` and `pp`.
#
# [Chapter 3i](03i_claims.ipynb) collects all verdicts, with the condition under which each of them flips.
# **Write down your own now.** You have seen enough for a guess, and for one of the seven you have more than a guess:
# look at section 1 again.

# %%
verdicts = dict.fromkeys(range(1, 8))  # fill in "holds", "holds when ..." or "does not hold"; for instance
# verdicts[1] = "holds when ..."

missing = [number for number, verdict in verdicts.items() if verdict is None]
print("claims without your verdict:", *(missing or ["none"]))

# %% [markdown] lang="en"
# The one is number 7. A computation that gives the gradients of one process gives its model, no better and no worse.
# (What *does* make models better is that more can be computed in the same time: larger ones, on more text.) Number 7
# has one more side to it, which 3a comes to: with many ranks one tends to take larger batches, and that *is* another
# training.
#
# ## 9. The map
#
# The document's own plan is its section 1.4: theory, algorithms, mathematics, practice, applications, tools, outlook.
# The course has a chapter for each of these, with the document's number. The upper line of the picture is the **core
# path**. It leads from here to the choice of a layout for a cluster. What hangs below can be read after the chapter
# that it hangs on, now, later, or never.

# %%
core = [  # chapter, what it is about, hours
    ("01", "background", 0.75), ("02a", "language\nmodels", 2), ("02b", "ranks and\ncollectives", 2),
    ("03a", "data\nparallel", 3), ("03b", "tensor\nparallel", 3), ("03c", "pipeline\nparallel", 2.5),
    ("03g", "hybrid", 2.5), ("04c", "which one?", 2),
]  # fmt: skip
optional = {  # the chapter it hangs on
    "03a": [("03e", "long\ncontext", 2), ("03f", "experts", 2)],
    "03c": [("03d", "schedules", 2), ("03h", "memory,\nrecovery", 3)],
    "03g": [("04a", "the math", 2), ("04b", "cost\nmodels", 2.5), ("03i", "claims", 1.5)],
    "04c": [("05", "practice", 2), ("06a-d", "applications", 5), ("07", "tools", 2), ("08a, b", "outlook", 4)],
}
assert sum(hours for *_, hours in core) == 17.75


# %%
def draw_chapter(x, y, name, about, hours, color):
    panel.barh(y, 0.84, 0.8, left=x - 0.42, color=color, edgecolor=viz.INK, lw=0.8, zorder=2)
    star = "★ " if y == 0 else ""
    panel.text(x, y, f"{star}{name}\n{about}\n{hours:g} h", ha="center", va="center", fontsize=8, zorder=3)


drawing, (panel,) = viz.figure(8.0, 5.2)
for x, (name, about, hours) in enumerate(core):
    draw_chapter(x, 0, name, about, hours, "#A9D6F2")
    for depth, chapter in enumerate(optional.get(name, []), start=1):
        panel.plot([x, x], [0, depth], color=viz.LINE, zorder=1)
        draw_chapter(x, depth, *chapter, viz.PALE)
panel.plot([0, len(core) - 1], [0, 0], color=viz.INK, zorder=1)
panel.set(xlim=(-0.5, len(core) - 0.5), ylim=(4.45, -0.45))
panel.axis("off")
alt = "A map. The core path, from left to right: " + ", ".join(f"{name} ({hours:g} hours)" for name, _, hours in core)
hanging = "; ".join(f"below {name}: " + ", ".join(c[0] for c in some) for name, some in optional.items())
viz.show(drawing, f"{alt}. {hanging}.".replace("\n", " "))

# %%
rest = sum(hours for some in optional.values() for *_, hours in some)
print(f"core path: {sum(hours for *_, hours in core):g} hours; the others: {rest:g} hours; exercises not counted")

# %% [markdown] lang="en"
# Two long days for the core path (with the page [for teachers](../docs/teaching.md)), or two weeks of evenings. The
# hours are estimates, for someone who writes down the predictions and tries what it says to try.
#
# | chapter | what you do there |
# |---|---|
# | ★ **01** background | this one |
# | ★ [02a](02a_language_models.ipynb) language models | take a small GPT apart, count what it costs, and train it |
# | ★ [02b](02b_ranks_and_collectives.ipynb) ranks and collectives | send, receive, deadlock; what the rest is made of |
# | ★ [03a](03a_data_parallel.ipynb) data parallelism | cut the batch; share out what all ranks hold in common (ZeRO) |
# | ★ [03b](03b_tensor_parallel.ipynb) tensor parallelism | cut matrices, and find out what has to be sent |
# | ★ [03c](03c_pipeline_parallel.ipynb) pipeline parallelism | cut the list of layers, on one process first |
# | [03d](03d_schedules.ipynb) schedules | fill the gaps of a pipeline |
# | [03e](03e_long_context.ipynb) long context | cut a row of text that is too long for one device |
# | [03f](03f_experts.ipynb) experts | send tokens to the ranks that hold their experts |
# | ★ [03g](03g_hybrid.ipynb) hybrid parallelism | sixteen layouts of one model, compared |
# | [03h](03h_memory_and_recovery.ipynb) memory and recovery | save memory; lose a rank, and go on |
# | [03i](03i_claims.ipynb) claims | the document's sentences, each with a verdict |
# | [04a](04a_math.ipynb) the math | why a model that is cut learns the same, by hand and by algebra |
# | [04b](04b_cost_models.ipynb) cost models | compute memory, bytes and time of any layout; published runs |
# | ★ [04c](04c_faq.ipynb) questions | which model, and which layout for which machines? |
# | [05](05_practice.ipynb) practice | fine-tune a pretrained model on each layout, and serve it |
# | [06a](06a_language.ipynb) language | classify texts; translate numerals into Chinese words |
# | [06b](06b_speech.ipynb) speech | recognize what is spoken; speak |
# | [06c](06c_vision.ipynb) vision | classify a digit, and find one on a canvas |
# | [06d](06d_finance.ipynb) finance | a trading rule and a forecast of risk, on series with a known law |
# | [07](07_tools.ipynb) tools | the same step on torch's own tools; clusters; what others call it |
# | [08a](08a_scale_and_serving.ipynb) scale and serving | 16,384 GPUs by simulation; what a run costs; generation |
# | [08b](08b_trust_and_beyond.ipynb) trust and beyond | pretraining, images with text, private sums, a look inside |
#
# ### How to work with the notebooks
#
# - **Predictions.** Write each of them down. `prediction = None` runs as well, but you will learn less.
# - **Your turn.** Your function stays yours. The cells behind it use the folded answer, so a mistake of yours breaks
#   nothing.
# - **Change things.** Other numbers in a mesh, another seed, another batch: if something does not fit, the message says
#   what would. If ranks wait for each other, you get a report of who waits for whom, after a few seconds.
# - **Exercises.** Where a chapter has an exercise notebook, tasks in it are graded on the command line, a line a task,
#   with hints that come one at a time. For chapter 3a:
#   `python -m minipar grade exercises/03a_data_parallel.ipynb`.
# - **If something does not start**, in a terminal: `python -m minipar doctor`. It prints the versions, cores
#   and memory that it finds, starts four ranks, and lets them add up numbers. Where something is amiss, a line that
#   begins with `->` says what to do.
# - **The package is part of the text.** Everything in `minipar/` is meant to be read. `viz.show_source(...)` shows a
#   function as it stands there.
#
# The text and the small GPT are the same in all chapters: Python's documentation, and `minipar.gpt(Config())`.
#
# ## What you have now
#
# - **rank**: one of the processes that work together, and its number. Ranks share no variables.
# - **mesh, axis**: a grid of ranks, and one of its directions. Each axis stands for one way to cut the work: `dp` the
#   rows, `pp` the list of layers, `tp` the matrices.
# - **hybrid parallelism**: several axes at a time.
# - **the law**: every layout gives the gradients of one process.
# - **states**: weight, gradient and what the optimizer keeps: 16 bytes a parameter with Adam in mixed precision.
# - **FLOPs**: 6 for each parameter and token.
# - On a laptop **bytes, order, memory and numbers** are the truth. Seconds are not.
#
# ## Three questions to take along
#
# 1. A model has 30 billion parameters. What do its states take, and how many devices of 80 GB is that at least?
# 2. It is trained on 1 trillion ($10^{12}$) tokens, on 256 H100 that reach 400 TFLOP/s each. How many days?
# 3. Someone has 64 devices of 80 GB, trains this model with `Mesh(dp=64)`, runs out of memory, and gets 64 more. Does
#    that help? What would?
#
# <details><summary>Answers</summary>
#
# 1. 16 × 30 billion bytes = 480 GB: 6 devices, with no room for anything else.
# 2. 6 × 30 × 10⁹ × 10¹² = 1.8 × 10²³ FLOPs; at 256 × 400 × 10¹² FLOP/s that is 1.76 million seconds, about 20 days.
# 3. No: with `dp` alone each device holds all 480 GB, however many there are. Cutting the model helps, for instance
#    `Mesh(dp=8, tp=8)`, with 60 GB of states each, or ZeRO, which shares out what the copies have in common.
#
# </details>

# %%
assert devices_for_states(30e9, 80e9) == 6 and 16 * 30e9 == 480e9  # the answers above
assert round(6 * 30e9 * 1e12 / (256 * 400e12) / (24 * 3600)) == 20
assert sum(cost.states(30e9 / 8, ranks=8, zero=0).values()) == 60e9
world.close()

# %% [markdown] lang="en"
# **Next:** [02a, language models](02a_language_models.ipynb), which looks inside the model before anything is cut. If
# you know GPTs, their FLOPs and Adam's memory well, go on with [02b, ranks and
# collectives](02b_ranks_and_collectives.ipynb).
#
# ## References
#
# - Brown et al. 2020, Language Models are Few-Shot Learners,
#   [arxiv.org/abs/2005.14165](https://arxiv.org/abs/2005.14165)
# - Chowdhery et al. 2022, PaLM: Scaling Language Modeling with Pathways,
#   [arxiv.org/abs/2204.02311](https://arxiv.org/abs/2204.02311)
# - DeepSeek-AI 2024, DeepSeek-V3 Technical Report, [arxiv.org/abs/2412.19437](https://arxiv.org/abs/2412.19437)
# - Devlin et al. 2018, BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding,
#   [arxiv.org/abs/1810.04805](https://arxiv.org/abs/1810.04805)
# - Llama Team 2024, The Llama 3 Herd of Models, [arxiv.org/abs/2407.21783](https://arxiv.org/abs/2407.21783)
# - Radford et al. 2018, Improving Language Understanding by Generative Pre-Training (OpenAI; not on arXiv)
# - Radford et al. 2019, Language Models are Unsupervised Multitask Learners (OpenAI; not on arXiv)
# - Raffel et al. 2019, Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer,
#   [arxiv.org/abs/1910.10683](https://arxiv.org/abs/1910.10683)
# - Rajbhandari et al. 2020, ZeRO: Memory Optimizations Toward Training Trillion Parameter Models,
#   [arxiv.org/abs/1910.02054](https://arxiv.org/abs/1910.02054)
# - Shoeybi et al. 2019, Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism,
#   [arxiv.org/abs/1909.08053](https://arxiv.org/abs/1909.08053)
# - Smith et al. 2022, Using DeepSpeed and Megatron to Train Megatron-Turing NLG 530B, A Large-Scale Generative Language
#   Model, [arxiv.org/abs/2201.11990](https://arxiv.org/abs/2201.11990)
# - Touvron et al. 2023, LLaMA: Open and Efficient Foundation Language Models,
#   [arxiv.org/abs/2302.13971](https://arxiv.org/abs/2302.13971)
# - Vaswani et al. 2017, Attention Is All You Need, [arxiv.org/abs/1706.03762](https://arxiv.org/abs/1706.03762)
# - The data sheets of NVIDIA's and AMD's devices, for `minipar/hardware.py`
