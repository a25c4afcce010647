# %% [markdown] lang="en"
# # Scale, cost and serving
#
# Section 8 of the document looks back, and then ahead: models will grow, and computing resources are the first of the
# challenges that it names. It gives no numbers. You have all the pieces to compute them. At the end of this chapter you
# can
#
# - say what happens to a run between 8 GPUs and 16,384, and which part of a step pays for it;
# - choose how often to write a checkpoint when something breaks every three hours;
# - write the bill of a run, in GPU-hours, money and megawatt-hours, and hold it against a published one;
# - generate text from a model that is cut over ranks, with a cache of keys and values, token for token as one process;
# - say why eight GPUs write 145 tokens a second for one reader and 4,500 for 64, and what follows for serving.
#
# **Time:** about two hours and a half. **You need:** [Tensor parallelism](03b_tensor_parallel.ipynb),
# [Hybrid parallelism](03g_hybrid.ipynb) and [Cost models](04b_cost_models.ipynb). The chapter mirrors sections 8.1,
# the first trend of 8.2 and the first challenge of 8.3 of 《大规模语言模型从理论到实践 混合并行》. The other trends and
# challenges follow in [the next chapter](08b_trust_and_beyond.ipynb).
#
# **How to read it.** As before: write your prediction into the cell before you run it.
#
# ## Three questions on the chapters before
#
# 1. How many all-reduces over the tensor axis does a block need in *forward*, and of what?
# 2. Four stages and eight microbatches, 1F1B: which share of the time is a rank idle? And with 64 microbatches?
# 3. A kernel does 50 FLOPs for each byte that it moves. An H100 does 989 TFLOP/s and moves 3.35 TB/s. What does the
#    kernel wait for?
#
# <details><summary>Answers</summary>
#
# 1. Two: behind attention's output and behind the MLP, each of one activation (rows × tokens × width).
# 2. $3/11$, that is 27 percent; and $3/67$, 4 percent.
# 3. For memory: below 295 FLOPs a byte the memory is the slower part.
#
# </details>

# %%
import heapq
import time
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
import transformers

import minipar
from minipar import CLUSTERS, Config, Costs, Mesh, World, bubble, corpus, cost, find_model, ledger, parallelize

from minipar import published, viz  # isort: skip
from minipar.planner import bill
from minipar.prediction import Kernel, product
from minipar.schedule import one_f_one_b, zero_bubble_h1
from minipar.timeline import simulate
from minipar.train import Parallel
from minipar.widgets import explore

assert round(3 / 11, 2) == 0.27 and round(3 / 67, 2) == 0.04 and round(989 / 3.35) == 295  # the answers above
config = Config()  # the small GPT of all chapters
torch.set_num_threads(1)  # its matrices are small: a second thread costs more than it brings
world = World(4)

# %% [markdown] lang="en"
# ## 1. What the course found
#
# "Remarkable results", says section 8.1. Here they are as numbers. A few of them once more, computed:


# %%
def whole(dtype=torch.float64):
    torch.manual_seed(0)
    return minipar.gpt(config).to(dtype)


def gradients(mesh, tokens, targets):
    model = parallelize(whole(), mesh, microbatches=2)
    model.step(tokens, targets)
    return model.full_gradients()


batch = next(corpus.batches(steps=1, rows=8, context=32))
alone = whole()
F.cross_entropy(alone(batch[0]).flatten(0, 1), batch[1].flatten()).backward()
wanted = {name: p.grad for name, p in alone.named_parameters()}
found = world.run(gradients, Mesh(pp=2, tp=2), *batch)[0]
off = max((found[name] - g).abs().max() for name, g in wanted.items()) / max(g.abs().max() for g in wanted.values())

idle = [bubble(simulate(make(4, 8), Costs(1, 1, 1))) for make in (one_f_one_b, zero_bubble_h1)]
zero = [sum(cost.states(1, 64, stage).values()) for stage in (0, 3)]
late = []
for run in published.RUNS:
    place, size = CLUSTERS[run.cluster].of(run.gpus), (run.batch, run.sequence)
    guess = minipar.predict(run.model, run.layout, place, *size, kernels=run.kernels)
    late.append(guess.flops_per_device(run.recomputed, causal=not run.recomputed) / run.flops - 1)

# %%
print(f"gradients on Mesh(pp=2, tp=2) against one process: off by {off:.0e} of the largest")
print(f"idle, 4 stages and 8 microbatches: 1F1B {idle[0]:.0%}, zero bubble H1 {idle[1]:.0%}")
print(f"bytes a parameter, 64 data ranks: {zero[0]:.0f} without ZeRO, {zero[1]:.2f} with stage 3")
print(f"eight published runs, speed predicted above what was printed: {min(late):.0%} to {max(late):.0%}")
assert off < 1e-12 and [round(100 * share) for share in idle] == [27, 11] and zero == [16, 0.25]
assert (round(100 * min(late)), round(100 * max(late))) == (8, 29)

# %% [markdown] lang="en"
# - **Is a sharded step the same step?** Yes, on every mesh that we tried, up to rounding in float64:
#   [03g](03g_hybrid.ipynb), and [04a](04a_math.ipynb) for the reason.
# - **What travels?** Gradients once a step (dp), four sums of activations a block and microbatch (tp), one activation a
#   boundary (pp), keys and values (cp), tokens (ep). All counted to the byte: [03a](03a_data_parallel.ipynb),
#   [03b](03b_tensor_parallel.ipynb), [03c](03c_pipeline_parallel.ipynb), [03e](03e_long_context.ipynb),
#   [03f](03f_experts.ipynb).
# - **How long does a pipeline wait?** $(p-1)/(m+p-1)$ of the time. With a backward in two halves it is 11 percent in
#   place of 27 here: [03d](03d_schedules.ipynb).
# - **What does ZeRO save?** All but an $n$-th of 16 bytes a parameter: [03a](03a_data_parallel.ipynb).
# - **Can a run survive a lost rank?** Yes, from a checkpoint, and on a smaller mesh:
#   [03h](03h_memory_and_recovery.ipynb).
# - **How good is a prediction?** Published runs are predicted 8 to 29 percent too fast. That ranks layouts, and does
#   not choose between two that are close: [04b](04b_cost_models.ipynb), [04c](04c_faq.ipynb).
# - **Do the document's claims hold?** Most hold under a condition that it does not name: [03i](03i_claims.ipynb).
#
# ## 2. Sixteen thousand GPUs
#
# You have no 16,384 GPUs. But you have what one needs before one gets them: a cost model of the step that was held
# against published runs. Take it as a flight simulator, with the error that was just printed.
#
# ### Their layouts
#
# [The Llama Team (2024)](https://arxiv.org/abs/2407.21783) print three layouts for their model of 405 billion
# parameters (Table 4). Beside the speeds, where does the predicted time go?

# %%
llama, h100 = find_model("llama-405b"), CLUSTERS["h100"]
runs = published.RUNS[5:]
steps = [minipar.predict(llama, run.layout, h100.of(run.gpus), run.batch, run.sequence) for run in runs]
for run, step in zip(runs, steps, strict=True):
    ours, theirs = step.flops_per_device(causal=True) / 1e12, run.flops / 1e12
    print(f"{run.gpus:6,} GPUs, {run.layout.mesh}, rows of {run.sequence:,} tokens")
    print(f"{'':13} {theirs:.0f} TFLOP/s a GPU printed, {ours:.0f} predicted")

plan = minipar.plan(llama, h100.of(16384), runs[1].batch, 8192)
ours = plan.best.flops_per_device(causal=True) / 1e12
print(f"the planner's, for rows of 8,192: {plan.best.layout.mesh}, {ours:.0f} predicted")
names = ["8,192 GPUs", "16,384 GPUs", "16,384, rows of 131,072", "16,384, the planner's"]
shown = [*steps, plan.best]
parts = {part: [100 * step.parts[part] / step.seconds for step in shown] for part in plan.best.parts}
viz.show(viz.draw_bars(names, parts, "percent of a step", "Llama 3 405B, where a step goes, predicted"))

# %% [markdown] lang="en"
# **Read it.** From 8,192 to 16,384 GPUs the batch stays the same, 16 million tokens. So each data rank has half as
# many rows, and the pipeline fills and drains as before over half as many microbatches: its share grows from 10 percent
# to 18. With rows of 131,072 tokens a rank has 16 microbatches as well, and the pipeline's share is the same. There
# attention computes so long that the messages of the context axis hide behind it.
#
# The planner's layout, with a context axis of four, has fewer data ranks with more microbatches each, 64 in place of
# 16. [Cost models](04b_cost_models.ipynb) and [the FAQ](04c_faq.ipynb) argue about who is right: the gain, 12 percent,
# is smaller than the error of such predictions.
#
# ### More GPUs: strong and weak
#
# There are two ways to ask for more. **[Strong scaling](../docs/glossary.md#strong-scaling)**: the same batch on more
# devices, so that a step gets shorter. **Weak scaling**: each device keeps its rows, so that the batch grows. The
# measure is **efficiency**: tokens per second and device, compared with the smallest number of devices.
#
# Take `llama-8b`, which fits on 8 GPUs, and for each number of GPUs the best layout that the planner finds. Strong: 512
# rows of 8,192 tokens. Weak: one row a GPU.
#
# **Predict:** at how many GPUs does the strong curve fall below 90 percent? Does the weak one ever?

# %%
prediction = None  # (strong: GPUs, weak: yes or no)


@lru_cache
def best(gpus, batch):
    return minipar.plan("llama-8b", h100.of(gpus), batch, 8192).best


GPUS = (8, 64, 512, 1024, 4096, 16384)
strong, weak = [best(gpus, 512) for gpus in GPUS], [best(gpus, gpus) for gpus in GPUS]


def efficiency(curve):
    each = [step.tokens_per_second / step.cluster.gpus for step in curve]
    return [speed / each[0] for speed in each]


for name, curve in {"strong": strong, "weak": weak}.items():
    print(name)
    for step, share in zip(curve, efficiency(curve), strict=True):
        mesh = f"{step.layout.mesh!s:30} ZeRO {step.layout.zero}"
        tokens = step.batch * step.sequence / 1e6
        print(f"  {step.cluster.gpus:6,} GPUs: {mesh}, {step.seconds:6.2f} s, {tokens:6.1f}M tokens, {share:4.0%}")

# %%
drawing, (left, right) = viz.figure(8.0, 3.6, columns=2)
for name, curve, mark, color in (("strong", strong, "o", 5), ("weak", weak, "s", 6)):
    left.plot(GPUS, [100 * e for e in efficiency(curve)], marker=mark, label=name, color=viz.PALETTE[color])
left.set(xscale="log", ylim=(0, 110), xlabel="GPUs", ylabel="percent of the speed at 8", title="efficiency")
left.set_xticks(GPUS, [f"{g:,}" for g in GPUS], fontsize=7, rotation=45)
left.minorticks_off()
left.legend(frameon=False, loc="lower left")
bottom = np.zeros(len(GPUS))
for color, part in zip(viz.PALETTE, strong[0].parts, strict=False):
    share = np.array([100 * step.parts[part] / step.seconds for step in strong])
    right.bar(range(len(GPUS)), share, bottom=bottom, color=color, ec=viz.INK, lw=0.4, label=part)
    bottom += share
right.set_xticks(range(len(GPUS)), [f"{g:,}" for g in GPUS], fontsize=7, rotation=45)
right.set(ylim=(0, 100), xlabel="GPUs", ylabel="percent of a step", title="strong: where a step goes")
drawing.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
told = "; ".join(
    f"{g:,}: {s:.0%} and {w:.0%}" for g, s, w in zip(GPUS, efficiency(strong), efficiency(weak), strict=True)
)
last = ", ".join(f"{part} {seconds / strong[-1].seconds:.0%}" for part, seconds in strong[-1].parts.items())
told += f". Right: where a step of strong scaling goes, at {GPUS[-1]:,}: {last}"
viz.show(drawing, f"Efficiency over GPUs, strong and weak: {told}.")

# %% [markdown] lang="en"
# **Strong** is perfect up to 512 GPUs: a row for each. That is the limit of the [batch](../docs/glossary.md#batch).
# Beyond it there are more GPUs than rows, and at 1,024 the curve is at 81 percent: four tensor ranks share two rows.
# At 16,384 a group of 256 ranks shares eight, over axes that cost more: tensor ranks, context ranks, stages that wait.
# And the gradients have little left to hide behind: the data axis alone takes 21 percent of a step. More than two
# thirds of it are no matrix products at all.
#
# **Weak** holds much longer, and falls below 90 percent at 4,096, to 83 at the end. (It is a bit above 100 before: on 8
# GPUs each has an eighth of the optimizer's states to update, on 64 much less.) Who pays? One row computes for 0.6
# seconds, and in that time the gradients of eight billion parameters have to go around a ring of all data ranks. Bytes
# hardly grow with the ring; the number of its hops does, and each has a latency.

# %%
for step in (weak[2], weak[-1]):
    share = step.parts["data axis"] / step.seconds
    hops = h100.between.latency * (step.layout.replicas - 1)  # 5 microseconds each
    print(f"{step.cluster.gpus:6,} GPUs: data axis {share:4.0%} of a step; once around the ring {1e3 * hops:.1f} ms")
used = {step.cluster.gpus: step.parts["matrix products"] / step.seconds for step in (strong[0], strong[-1])}
print("strong, share of matrix products:", ", ".join(f"{share:.0%} on {gpus:,} GPUs" for gpus, share in used.items()))
assert [round(100 * e) for e in efficiency(strong)] == [100, 100, 100, 81, 48, 25] and used[16384] < 1 / 3
assert min(efficiency(weak)) == efficiency(weak)[-1] and round(100 * efficiency(weak)[-1]) == 83
assert weak[-1].parts["data axis"] == max(
    p for n, p in weak[-1].parts.items() if n not in ("matrix products", "other kernels")
)

# %% [markdown] lang="en"
# Up to 512 GPUs the messages hide behind computation. On 16,384 the data axis takes 12 percent of 0.74 seconds, 91 ms.
# With ZeRO 1 gradients go once around the ring and weights once more: latency alone is 82 ms of it. (Our cost model has
# one flat ring. Libraries build trees and rings of rings, whose latency grows more slowly.)
#
# But 16,384 rows of 8,192 tokens are 134 million tokens a step, eight times what the Llama team used for a model fifty
# times as large. A batch of that size most likely wastes tokens: half of it would give nearly the same gradient
# ([McCandlish et al. 2018](https://arxiv.org/abs/1812.06162)). So weak scaling ends where a larger batch is of no more
# use, and strong scaling where the batch has no more rows. **What really scales is the model**: a larger one has more
# to compute for each byte that it sends. On 16,384 GPUs the 405B model reached 400 TFLOP/s a GPU.
#
# ### When something breaks every three hours
#
# In 54 days on 16,384 GPUs the Llama team counted 466 interruptions, of which 419 were unexpected (Table 5 there, and
# the text beside it); more than 90 percent of the time was effective training, that is, useful: no restart, no
# work done twice.
#
# **Question.** How many hours from one unexpected interruption to the next? If all of them came from GPUs that fail
# independently, how many years would one GPU last on the average?

# %%
prediction = None  # (hours, years)

HOURS, FAILURES, EVERYTHING = 54 * 24, 419, 466
between = HOURS / FAILURES
years = between * 16384 / 24 / 365
most = 0.1 * HOURS * 60 / EVERYTHING
minutes = 60 * between * 16384 / 100_000
print(f"every {between:.1f} hours; one GPU every {years:.1f} years; 100,000 GPUs every {minutes:.0f} minutes")
print(f"a tenth of the time, shared out over all interruptions: {most:.0f} minutes each, at most")

# %% [markdown] lang="en"
# Nothing is wrong with these GPUs: one lasts for nearly six years. (And longer, since hosts, cables and software fail
# as well: the paper puts about six in ten of the unexpected interruptions down to GPUs.) But all are needed at the same
# time.
#
# So a run writes [checkpoints](../docs/glossary.md#checkpoint) ([Memory and recovery](03h_memory_and_recovery.ipynb)
# has the code, and a rank that is killed). How often? Each costs $\delta$ seconds. After a failure the work since the
# last one is lost, on the average half an interval $\tau$, and $R$ seconds go by until the run goes on. With $M$
# seconds from failure to failure the share of time that is lost is about
#
# $$\frac{\delta}{\tau} + \frac{\tau}{2M} + \frac{R}{M}, \qquad \text{least for}\quad \tau = \sqrt{2\,\delta M}$$
#
# (Young 1974; Daly 2006 has a better formula for checkpoints that take long.) What is $\delta$? 14 bytes a parameter
# (16-bit weights, and 12 of the optimizer) at the 2 TB/s that the team's storage sustains (section 3.3.1 there). For
# $R$ we assume ten minutes. It fits: a tenth of the time is at most 17 minutes an interruption, as just printed, and
# lost work has to fit in there, too.
#
# **Your turn.** Write the share that is lost. Then **predict**: what does a checkpoint every hour cost at 16,384 GPUs,
# and which interval is best if a checkpoint takes half a minute?

# %%
prediction = None  # (share at an hour, best interval in minutes)


def my_lost(interval, write, failure, restart):
    return 0.0  # your formula in place of this


# %% jupyter={"source_hidden": true}
def lost(interval, write, failure, restart):
    return write / interval + interval / (2 * failure) + restart / failure


# %% [markdown] lang="en"
# A formula is an opinion until something is counted. So we let failures come at random, with an exponential time
# between them, and count the work that survives. From one failure to the next, whole intervals count and the rest does
# not:


# %%
def simulated(interval, write, failure, restart, failures=50_000):
    """The share of time that is lost, over so many random failures."""
    times = np.random.default_rng(0).exponential(failure, failures)
    kept = np.floor(times / (interval + write)) * interval
    return 1 - kept.sum() / (times + restart).sum()


size, M, R = 14 * llama.parameters, 3600 * between, 600.0  # bytes, seconds, seconds
print(f"a checkpoint of {size / 1e12:.1f} TB, {size / 16384 / 1e6:.0f} MB a GPU, takes {size / 2e12:.0f} s at 2 TB/s")
young = {}
for write in (3.0, 30.0):
    young[write] = (2 * write * M) ** 0.5
    for minutes in sorted((1, 5, young[write] / 60, 60, 180)):
        tau = 60 * minutes
        told = f"write {write:2.0f} s, every {minutes:5.1f} min: simulated {simulated(tau, write, M, R):5.1%} lost"
        print(f"{told}, formula {lost(tau, write, M, R):5.1%}, yours {my_lost(tau, write, M, R):5.1%}")
best_of = {w: min(range(60, 1800, 30), key=lambda tau: simulated(tau, w, M, R)) for w in young}
print("best interval, simulated, in minutes:", {w: round(tau / 60, 1) for w, tau in best_of.items()})
assert round(young[30.0] / 60) == 14 and all(abs(best_of[w] / young[w] - 1) < 0.25 for w in young)

# %%
DELTAS = {3: "o", 30: "s", 120: "^"}


def draw_lost(gpus, restart_minutes):
    failure, restart = M * 16384 / gpus, 60 * restart_minutes
    drawing, (panel,) = viz.figure(7.0, 3.4)
    taus, told = np.geomspace(30, 4 * 3600, 40), []
    for (write, mark), color in zip(DELTAS.items(), (5, 6, 2), strict=True):
        share = [100 * simulated(tau, write, failure, restart, 5_000) for tau in taus]
        panel.plot(taus / 60, share, color=viz.PALETTE[color], label=f"a checkpoint takes {write} s")
        tau = (2 * write * failure) ** 0.5
        at = 100 * simulated(tau, write, failure, restart, 5_000)
        panel.plot(tau / 60, at, mark, color=viz.INK)
        told.append(f"{write} s: every {tau / 60:.0f} minutes, {at:.0f} percent lost")
    panel.set(xscale="log", ylim=(0, 100), xlabel="minutes between checkpoints", ylabel="percent of the time lost")
    panel.set_xticks([0.5, 1, 3, 10, 30, 100, 240], ["0.5", "1", "3", "10", "30", "100", "240"])
    panel.minorticks_off()
    panel.set_title(
        f"{gpus:,} GPUs: a failure every {failure / 3600:.1f} h, {restart_minutes} min to restart", fontsize=10
    )
    drawing.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=3)
    return viz.describe(drawing, f"{gpus:,} GPUs. Marks are Young's intervals. " + "; ".join(told))


explore(draw_lost, gpus=[16384, 1024, 4096, 100_000], restart_minutes=[10, 2, 30])

# %% [markdown] lang="en"
# An hour between checkpoints costs 20 percent, most of it work done twice. (The formula counts a bit too much, and far
# too much at both ends. Where $\tau$ is only twice $\delta$, writing takes $\delta/(\tau+\delta)$ of the time,
# not $\delta/\tau$: a third in place of a half. Where $\tau$ is not small against $M$, there is often a second failure,
# and it has less work left to destroy.) At 2 TB/s a checkpoint takes 3 seconds, and one every four minutes is best: 7
# percent are lost. If it takes half a minute, every 14 minutes, and 12 percent. The curve is flat around its lowest
# point, so Young's simple formula is good enough. What matters is the size of $\delta$ and of $R$. That is where
# engineers put their work: checkpoints that are written while training goes on, restarts within minutes.
#
# **In the explorer** the mark on each curve is Young's interval. At 1,024 GPUs a failure comes every two days, and an
# interval of an hour is fine: 1 percent lost, or 2 with checkpoints of 30 seconds. At 100,000 it comes every half an
# hour, and with ten minutes to restart 29 percent are lost even if a checkpoint takes 3 seconds. So runs of that size
# need spare nodes that take over quickly, or go on with fewer ranks, as [examples/elastic.py](../examples/elastic.py)
# does on your laptop.
#
# ## 3. The bill
#
# **Question.** A model of $N$ = 405 billion parameters, $D$ = 15.6 trillion tokens, $6ND$ FLOPs. How many GPU-hours at
# 400 TFLOP/s, and how many were reported?

# %%
prediction = None  # (million GPU-hours at 400 TFLOP/s, reported)

TOKENS, REPORTED = 15.6e12, 30.84e6  # the Llama 3 paper; the model card of Llama 3.1 405B
needed = 6 * llama.parameters * TOKENS
bills = {
    "predicted, their layout": bill(steps[1], TOKENS, 2.0),
    "predicted, the planner's": bill(plan.best, TOKENS, 2.0),
}
hours = {name: b.gpu_hours for name, b in bills.items()}
hours |= {"6ND at 400 TFLOP/s": needed / 400e12 / 3600, "the same, 90% effective": needed / 400e12 / 3600 / 0.9}
hours["reported"] = REPORTED
print(f"{needed:.2e} FLOPs; the paper says 3.8e25")
viz.show(viz.draw_bars(list(hours), {"GPU-hours": [h / 1e6 for h in hours.values()]}, "million GPU-hours"))

# %% [markdown] lang="en"
# The model card, the page of facts that comes with the weights, reports 30.84 million GPU-hours at 700 W
# ([Llama 3.1](https://github.com/meta-llama/llama-models/blob/main/models/llama3_1/MODEL_CARD.md)). The printed speed
# and a tenth for interruptions explain all but 1.5 million of them. What is left out: earlier phases with fewer GPUs
# and other batches, the phase with long rows, attention's FLOPs, all that was run twice for other reasons. Both
# predictions are lower. They leave out what real machines lose, so they are a lower bound.
#
# **Energy** is hours times watts. The card's 700 W are the most that a GPU draws. Hosts, network and cooling come on
# top: a data center's *power usage effectiveness* (PUE) is all of its power over that of its computers. **Money** is
# hours times a price, and there is no such thing as *the* price. Both are assumptions; move them:


# %%
def draw_bill(percent_of_peak, price, pue):
    done = needed / (percent_of_peak / 100 * h100.device.bf16) / 3600
    drawing, panels = viz.figure(7.5, 2.3, columns=3)
    values = {"million GPU-hours": 1e-6, "million dollars": 1e-6 * price, "GWh": h100.device.watts * pue * 1e-9}
    told = []
    for panel, (unit, each) in zip(panels, values.items(), strict=True):
        both = [done * each, REPORTED * each]
        panel.bar([0, 1], both, 0.6, color=[viz.PALETTE[0], viz.PALETTE[7]], ec=viz.INK, lw=0.6)
        for x, y in enumerate(both):
            panel.text(x, y, f"{y:.1f}", ha="center", va="bottom", fontsize=9)
        panel.set_xticks([0, 1], ["computed", "reported\nhours"], fontsize=8)
        panel.set(ylim=(0, 1.2 * max(both)), title=unit)
        told.append(f"{unit} {both[0]:.1f} and {both[1]:.1f}")
    setting = f"{percent_of_peak} percent of peak, {price} dollars an hour, PUE {pue}"
    return viz.describe(drawing, f"At {setting}, computed and from the reported hours: {'; '.join(told)}.")


explore(draw_bill, percent_of_peak=[40, 30, 50], price=[2, 1, 4], pue=[1.1, 1.5])

# %%
energy = REPORTED * 700 / 1e3  # kWh, of the GPUs alone
print(f"reported hours: {energy / 1e6:.1f} GWh, {2 * REPORTED / 1e6:.0f} million dollars at 2 an hour")
print(f"the card's 8,930 tons of CO2 are {8930e6 / energy:.0f} g a kWh of that")
print(f"a token: {energy * 3.6e6 / TOKENS:.1f} J, {1e6 * 2 * REPORTED / TOKENS:.1f} dollars a million tokens")
assert [round(h / 1e6, 1) for h in hours.values()] == [23.6, 21.1, 26.4, 29.3, 30.8] and round(energy / 1e6, 1) == 21.6

# %% [markdown] lang="en"
# 21.6 GWh in the GPUs alone. The 8,930 tons of CO2 are the card's number for the grid where it ran ("location-based").
# It is "adjusted for power usage efficiency", so the 414 g hold some PUE that the card does not print: with 1.1 the
# grid would give 376 g a kWh. A token that the model was trained on took 5 joules. At two dollars an hour a million of
# them cost four dollars.
#
# From 40 percent of the peak to 41 the run gets 0.65 million GPU-hours shorter ($26.7 \cdot 1/41$): that is what
# schedules and overlap are worth.
#
# ### Was it the right size?
#
# $6ND$ is parameters times tokens. For so many FLOPs, a larger model on fewer tokens or a smaller one on more?
# [Hoffmann et al. 2022](https://arxiv.org/abs/2203.15556) trained over 400 models and fitted the loss,
# $L = 1.69 + 406.4/N^{0.34} + 410.7/D^{0.28}$ (their third approach). Their other two say that both should grow alike,
# about 20 tokens a parameter. For the budget of the Llama run, the least loss is at:

# %%
a, b, budget = 0.34, 0.28, needed / 6
fitted = ((a * 406.4) / (b * 410.7)) ** (1 / (a + b)) * budget ** (b / (a + b))
sizes = {"the fitted formula": fitted, "20 tokens a parameter": (budget / 20) ** 0.5, "Llama 3 405B": llama.parameters}
for name, n in sizes.items():
    d = budget / n
    print(f"{name:22} {n / 1e9:4.0f}B parameters, {d / 1e12:4.1f}T tokens, {d / n:4.0f} tokens a parameter")

# %% [markdown] lang="en"
# Three answers, from 213 to 563 billion: laws fitted to small models do not agree when they are carried so far. (The
# third approach was fitted again with another result, near 20: [Besiroglu et al.
# 2024](https://arxiv.org/abs/2404.10102). The Llama team fitted a law of their own, section 3.2.1 of their paper: 402
# billion parameters on 16.55 trillion tokens. Our 406 billion count every weight of the model that they call 405B.)
#
# And the question leaves something out: a model is trained once and used for years. Then smaller is better than
# "optimal", since every token that it writes costs $2N$ FLOPs. What *that* costs is the rest of this chapter.
#
# ## 4. Generate
#
# A language model writes one token at a time: it gives [logits](../docs/glossary.md#logits) for the next token, one is
# chosen, and the row is one longer. Choosing the likeliest is called **greedy**. We need a model that has something to
# say, and quickly. So the small GPT learns one page of Python's documentation by heart, 512 tokens of it, in one
# process:


# %%
def learned(page, steps=200, most=3e-3):
    torch.manual_seed(0)
    model, generator = minipar.gpt(config), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = most * min((step + 1) / 10, 1.25 * (1 - step / steps), 1)
        places = torch.randint(len(page) - 64, (4, 1), generator=generator) + torch.arange(64)
        loss = F.cross_entropy(model(page[places]).flatten(0, 1), page[places + 1].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.state_dict(), loss.item()


page = corpus.tokens()[5000:5512]
weights, loss = learned(page)
print(f"loss on the page {loss:.2f}; a guesser that knows nothing has {np.log(config.vocab):.2f}")
assert loss < 1

# %% [markdown] lang="en"
# Now the loop, as short as it can be: a forward over all that there is, the likeliest token, again. What `parallelize`
# gives can be called as a model, so the loop runs on any mesh, with pipeline stages too.
#
# We want *the same tokens* from every layout. In float64 rounding is far too small to change which token is likeliest.
# Three prompts of 32 tokens from the page, 40 new ones each. The first 55 characters are shown:


# %%
def loaded():
    model = minipar.gpt(config)
    model.load_state_dict(weights)
    return model.double().eval()


@torch.no_grad()
def plain(model, row, count):
    """Greedy: (rows, T) tokens -> (rows, count) more."""
    for _ in range(count):
        row = torch.cat([row, model(row)[:, -1:].argmax(-1)], 1)
    return row[:, -count:]


prompts = torch.stack([page[i : i + 32] for i in (0, 100, 300)])
truth = plain(loaded(), prompts, 40)
for prompt, more in zip(prompts.tolist(), truth.tolist(), strict=True):
    print(f"{corpus.tokenizer().decode(prompt)[-25:]!r} -> {corpus.tokenizer().decode(more)[:55]!r}")
assert min(len(set(more)) for more in truth.tolist()) > 15  # no row is one token over and over


# %%
def on_mesh(mesh):
    return plain(parallelize(loaded(), mesh), prompts, 40)


for mesh in (Mesh(pp=2, tp=2), Mesh(tp=4), Mesh(pp=4)):
    assert all(torch.equal(tokens, truth) for tokens in world.run(on_mesh, mesh))
    print(f"{mesh!s:17} {truth.numel()} tokens, all as from one process, on every rank")
viz.show_source(Parallel.generate)

# %% [markdown] lang="en"
# The model goes on as the page does: it learned it by heart. The package's version of the loop, shown here, pads rows
# where an axis cuts the sequence, and it can draw a token at random in place of taking the likeliest. But its
# documentation is honest: *each token costs a forward over the whole context.* How much is that?
#
# ### A cache of keys and values
#
# **Question.** The loop above wrote 40 tokens behind 32. How many tokens went through the model, in all? And how many
# had to, if nothing is computed twice?

# %%
prediction = None  # (tokens in the loop, tokens that have to)

seen = sum(32 + i for i in range(40))
print(f"the loop put {seen:,} tokens through the model; {32 + 39} are new to it")

# %% [markdown] lang="en"
# 71 and not 72: the last token is written, and never read. What a token's keys and values are in a block depends on the
# token and on those before it, never on later ones: attention is causal. So they can be kept. This is the **[KV
# cache](../docs/glossary.md#kv-cache)**: for each block and each token its keys and values. A new token then needs its
# own query only, and looks at all keys that are there.
#
# The attempt uses the model's own layers. `cache` is a list, empty at first, then with keys and values of shape
# (rows, heads, tokens so far, numbers a head):


# %%
def attend(attention, x, cache):
    """Attention of new tokens (rows, n, C) to those in the cache and to themselves."""
    layers = attention.q, attention.k, attention.v
    q, k, v = (layer(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for layer in layers)
    cache[:] = [k, v] if not cache else [torch.cat(pair, 2) for pair in zip(cache, (k, v), strict=True)]
    k, v = cache
    past = k.size(2) - q.size(2)
    mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool).tril(past)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return attention.out(y.transpose(1, 2).flatten(-2))


@torch.no_grad()
def run(model, tokens, caches):
    """Logits (rows, n, vocabulary) of the tokens (rows, n) that follow what is in the caches, one a block."""
    past = caches[0][0].size(2) if caches[0] else 0
    x = model.embed.token(tokens) + model.embed.position.weight[past : past + tokens.size(1)]
    for block, cache in zip(model.blocks, caches, strict=True):
        x = x + attend(block.attention, block.norm1(x), cache)
        x = x + block.mlp(block.norm2(x))
    return model.head(model.norm(x))


# %%
def cached(model, prompt, count):
    caches, new, found = [[] for _ in model.blocks], prompt, []
    for _ in range(count):
        new = run(model, new, caches)[:, -1:].argmax(-1)  # the prompt first, then one token at a time
        found.append(new)
    return torch.cat(found, 1), caches


tokens, caches = cached(loaded(), prompts, 40)
assert torch.equal(tokens, truth) and caches[0][0].shape == (3, config.heads, 32 + 39, config.width // config.heads)
print(f"{tokens.numel()} tokens, all as without a cache; {len(caches)} caches of {tuple(caches[0][0].shape)}, twice")

# %% [markdown] lang="en"
# The same tokens. The first call, over the prompt, is the **[prefill](../docs/glossary.md#prefill)**; each later one is
# a **decode** step. What is it worth in time? The same GPT with room for 1,024 tokens, untrained, since time does not
# depend on what it knows. Your machine:


# %%
def fastest(call, repeats=5):
    took = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        took.append(time.perf_counter() - start)
    return 1e3 * min(took)


# %%
long, lengths = minipar.gpt(Config(context=1024)).eval(), (32, 64, 128, 256, 512, 1000)
again, with_cache = [], []
for length in lengths:
    row, caches = corpus.tokens()[None, :length], [[] for _ in long.blocks]
    run(long, row, caches)  # the prefill
    copies = [[list(c) for c in caches] for _ in range(5)]  # a decode step makes its cache longer
    again.append(fastest(lambda row=row: plain(long, row, 1)))
    with_cache.append(fastest(lambda row=row, copies=copies: run(long, row[:, :1], copies.pop())))
drawing, (panel,) = viz.figure(7.0, 3.0)
panel.plot(lengths, again, "o-", color=viz.PALETTE[6], label="the whole row again")
panel.plot(lengths, with_cache, "s-", color=viz.PALETTE[5], label="one token and the cache")
panel.set(xlabel="tokens in front", ylabel="ms for a token, on this machine", ylim=(0, None))
panel.legend(frameon=False)
viz.show(
    drawing,
    "Time of a token over the tokens in front. Without a cache it grows with them; with one it stays nearly flat.",
)

# %% [markdown] lang="en"
# Without a cache the time of a token grows with all that is in front of it. With one it hardly does: one token goes
# through the matrices, and only attention looks at the rest. The price is memory: keys and values of four blocks,
# 2 × 4 × 128 numbers a token here.
#
# ### On tensor ranks
#
# Nothing in `run` knows of ranks. It calls `attention.q`, and on a cut model that layer gives the heads of this rank
# only. So the very same function is tensor parallel: each rank has the keys and values of *its* heads.
#
# **Question.** Two tensor ranks, float64, our three prompts side by side. How often do the ranks talk for a step of
# three new tokens, and how many bytes does a rank send for each of them? (An all-reduce of $M$ bytes sends $2(n-1)/n
# \cdot M$, a gather of $M$ in all $(n-1)/n \cdot M$.) And how many bytes of cache has a rank at the end?

# %%
prediction = None  # (calls, bytes a token, bytes of cache for 3 rows of 32 + 39 tokens)


def on_tensor_ranks(mesh, count):
    model = parallelize(loaded(), mesh).module
    with ledger() as book:
        tokens, caches = cached(model, prompts, count)
    return tokens, book.calls("tp"), book.bytes("tp"), sum(x.nbytes for cache in caches for x in cache)


def formulas(ranks, count, rows=3, prompt=32, size=8):
    """Calls, bytes sent and bytes of cache of a rank, for `count` new tokens behind a prompt."""
    h, layers = config.width, config.depth
    passed = rows * (prompt + count - 1)  # tokens that go through the model
    sums = 1 + 2 * layers  # the embedding, and two a block
    sent = sums * cost.all_reduce_bytes(passed * h * size, ranks)
    sent += cost.gather_bytes(passed * config.vocab * size, ranks)  # the head's logits
    return (sums + 1) * count, sent, 2 * layers * h / ranks * passed * size


# %%
for ranks, mesh in ((2, Mesh(dp=2, tp=2)), (4, Mesh(tp=4))):
    calls, sent, held = formulas(ranks, 40)
    for tokens, *counted in world.run(on_tensor_ranks, mesh, 40):
        assert torch.equal(tokens, truth) and tuple(counted) == (calls, sent, held)
    each = (9 * cost.all_reduce_bytes(8 * 128, ranks), cost.gather_bytes(8 * 512, ranks))
    print(f"tp={ranks}: tokens as from one process; {calls} calls, {sent:,.0f} bytes sent, {held:,.0f} bytes of cache")
    print(f"      a new token of a row: {each[0]:,.0f} bytes for sums and {each[1]:,.0f} for logits")

# %% [markdown] lang="en"
# Ten calls for a step: the embedding, two for each of four blocks, the logits. The formula, to the byte:
#
# - **sent**, for a token, with $l$ blocks of width $h$: $1 + 2l$ all-reduces of $h$ numbers, a gather of the logits;
# - **kept**, for a token, on each of $t$ tensor ranks: $2\,l\,h/t$ numbers, the keys and values of this rank's heads.
#
# So four ranks send more than two, and keep half as much. Each message is tiny: an all-reduce has 1,024 bytes a row. In
# [Cost models](04b_cost_models.ipynb) you saw what such a message costs, mostly its latency. That is why serving keeps
# tensor ranks inside a node, more strictly than training. (The logits of all tokens of the vocabulary travel although
# one number is wanted. Each rank could send its largest logit and where it is.)
#
# **With a library.** Does this work for models that others wrote? `parallelize` cuts the layers of a model of
# `transformers`, and its own `generate`, with its own cache, runs on them. A small Llama, untrained, with two heads of
# keys and values for eight of queries (*grouped-query attention*, [Ainslie et al.
# 2023](https://arxiv.org/abs/2305.13245)):


# %%
def small_llama():
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8}
    limits = {"num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 256, "eos_token_id": None}
    settings = transformers.AutoConfig.for_model("llama", **shape, **limits)
    return transformers.AutoModelForCausalLM.from_config(settings).double().eval()


def theirs(model, count=30):
    model.config.use_cache = True  # parallelize turns it off, for training
    told = model.generate(prompts, max_new_tokens=count, do_sample=False, return_dict_in_generate=True)
    return told.sequences, sum(x.nbytes for layer in told.past_key_values.layers for x in (layer.keys, layer.values))


def library_on_ranks():
    return theirs(parallelize(small_llama(), Mesh(dp=2, tp=2)).module)


expected, size = theirs(small_llama())
for tokens, part in world.run(library_on_ranks):
    assert torch.equal(tokens, expected) and part == size / 2
print(f"{expected[:, 32:].numel()} tokens as from one process; a rank's cache has {part:,} bytes, half of {size:,}")

# %% [markdown] lang="en"
# The cache of each rank has half of the heads, so half of the bytes. (Two heads cannot be cut over four ranks. There
# `parallelize` gives each query a head of keys for itself, two on each rank, and the cache is as large as that of one
# process. Try it: `Mesh(tp=4)`.)
#
# ## 5. Why decoding waits for memory
#
# Now to real sizes: `llama-70b` on the eight H100 of a node, in 16 bits. The kernels of a block for one decode step are
# products of a few rows with large matrices, and attention of one query to all that is in the cache. `Kernel` and
# `product` are those of [Cost models](04b_cost_models.ipynb), section 5: FLOPs, bytes, and the slower of the two.
#
# **Question.** In a decode step with one row, how many FLOPs are done for each byte that is read? In a prefill of 2,048
# tokens? An H100 needs 295 to be busy. And attention: does a larger batch help it?

# %%
prediction = None  # (one row, prefill, does a batch help attention)


def decode_kernels(model, rows, seen, ranks):
    """The kernels of one block on one rank for a new token of each row, with `seen` tokens a row in the cache."""
    h, queries, keys, wide = model.hidden, model.queries / ranks, model.keys / ranks, model.mlp / ranks
    return {
        "q, k and v": product(rows, h, queries + 2 * keys),
        "attention": Kernel(4 * rows * seen * queries, 2 * rows * seen * 2 * keys),
        "output": product(rows, queries, h),
        "MLP, in": product(rows, h, (2 if model.gated else 1) * wide),
        "MLP, out": product(rows, wide, h),
    }


large, ridge = find_model("llama-70b"), h100.device.bf16 / h100.device.bandwidth
print(f"{'tokens at a time':16}", *(f"{name:>10}" for name in decode_kernels(large, 1, 1, 8)), "  (FLOPs a byte)")
for rows in (1, 16, 64, 256, 2048):
    each = decode_kernels(large, rows, 4096, 8).values()
    print(f"{rows:16,}", *(f"{kernel.flops / kernel.bytes:10.0f}" for kernel in each))
print(f"an H100 needs {ridge:.0f}")


# %% [markdown] lang="en"
# One row: **one FLOP a byte**. Each weight of two bytes is read to do two FLOPs with it. So the device could do
# nearly 300 times as much in the time. With a batch, all rows use the weight that was read once, and
# **[arithmetic intensity](../docs/glossary.md#arithmetic-intensity)**, the FLOPs for each byte, grows with the batch. A
# prefill is a batch of tokens by itself: 2,048 tokens at a time are well above 295. (The products differ there, since
# cut matrices are narrow and what goes in and out counts, too.)
#
# Attention is another matter: each row has a cache of its own, so more rows bring more bytes. Its 8 FLOPs a byte are
# the 64 heads of queries that share 8 of keys. That is what grouped queries are for. (This is decoding, one token of
# each row, on all lines. In a prefill the tokens of a row share one cache, so attention does many more FLOPs a byte.)

# %%
drawing, (panel,) = viz.figure(7.5, 3.6)
x = np.geomspace(0.5, 3000, 100)
panel.plot(
    x, np.minimum(x * h100.device.bandwidth, h100.device.bf16) / 1e12, color=viz.INK, label="the roof of an H100"
)
for rows, color in zip((1, 16, 64, 256, 2048), (0, 1, 2, 4, 6), strict=True):
    kernel = decode_kernels(large, rows, 4096, 8)["MLP, in"]
    at, height = (
        kernel.flops / kernel.bytes,
        kernel.flops / max(kernel.flops / h100.device.bf16, kernel.bytes / h100.device.bandwidth),
    )
    panel.plot(
        at, height / 1e12, "o", ms=9, color=viz.PALETTE[color], mec=viz.INK, label=f"MLP, tokens at a time: {rows:,}"
    )
attention = decode_kernels(large, 64, 4096, 8)["attention"]
at = attention.flops / attention.bytes
panel.plot(at, at * h100.device.bandwidth / 1e12, "D", ms=9, color="white", mec=viz.INK, label="attention, any batch")
panel.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="TFLOP/s, at most")
panel.legend(frameon=False, fontsize=8, loc="lower right")
alt = "A roofline. It rises with the FLOPs a byte up to 295, then it is flat at 989 TFLOP/s. "
viz.show(
    drawing, alt + "One token at a time is at its foot, a prefill of 2,048 tokens on the flat part, attention at 8."
)

# %% [markdown] lang="en"
# ### Latency and throughput
#
# So there are two numbers. **Latency**: milliseconds from one token of a reader to the next. **Throughput**: tokens a
# second of all readers together, for each GPU. It decides what a token costs. Put the pieces together: kernels, two
# all-reduces a block, the head, and memory, which limits the batch, since the cache of all rows has to fit beside the
# weights.
#
# Small messages do not go around a ring. Each rank can send its part to all others directly: more bytes, one latency.


# %%
def step_seconds(model, rows, seen, ranks):
    """Of one decode step; infinite if weights and caches do not fit."""
    weights = 2 * model.parameters / ranks
    caches = 2 * 2 * model.layers * rows * seen * model.keys / ranks
    if weights + caches > 0.95 * h100.device.memory:
        return float("inf")
    block = sum(k.seconds(h100, cost.TODAY) for k in decode_kernels(model, rows, seen, ranks).values())
    head = product(rows, model.hidden, model.vocabulary / ranks).seconds(h100, cost.TODAY)
    size, link = 2 * rows * model.hidden, replace(h100.inside, bandwidth=cost.TODAY.reach * h100.inside.bandwidth)
    ring = link.seconds(cost.all_reduce_bytes(size, ranks), 2 * (ranks - 1))
    direct = link.seconds((ranks - 1) * size, 1)
    return model.layers * (block + (2 * min(ring, direct) if ranks > 1 else 0)) + head


# %%
def draw_serving(model, gpus, tokens_in_cache):
    batches = [2**i for i in range(11)]
    took = [step_seconds(find_model(model), rows, tokens_in_cache, gpus) for rows in batches]
    fits = [(rows, s) for rows, s in zip(batches, took, strict=True) if np.isfinite(s)]
    drawing, (left, right) = viz.figure(8.0, 3.0, columns=2)
    title = f"{model} on {gpus} H100, {tokens_in_cache:,} tokens a row"
    for panel in (left, right):
        panel.set(xscale="log", xlim=(0.8, 1300), xlabel="rows at a time")
        panel.set_xticks([1, 4, 16, 64, 256, 1024], ["1", "4", "16", "64", "256", "1,024"])
        panel.minorticks_off()
    drawing.suptitle(title if fits else f"{title}: does not fit", fontsize=10)
    left.set(ylabel="ms from token to token", ylim=(0, 1.15e3 * max([0.02, *(s for _, s in fits)])))
    left.plot([rows for rows, _ in fits], [1e3 * s for _, s in fits], "o-", color=viz.PALETTE[6])
    right.set(ylabel="tokens a second and GPU", ylim=(0, 1.15 * max([100, *(r / s / gpus for r, s in fits)])))
    right.plot([rows for rows, _ in fits], [r / s / gpus for r, s in fits], "s-", color=viz.PALETTE[5])
    told = "; ".join(f"{r} row{'s' * (r > 1)}: {1e3 * s:.1f} ms, {r / s / gpus:,.0f} tokens/s a GPU" for r, s in fits)
    return viz.describe(drawing, f"{title}. {told or 'Weights and cache do not fit'}.")


# %%
explore(draw_serving, model=["llama-70b", "llama-8b"], gpus=[8, 1, 2, 4], tokens_in_cache=[4096, 1024, 32768])

# %%
for gpus, rows in ((8, 1), (8, 64), (4, 64), (8, 256)):
    took = step_seconds(large, rows, 4096, gpus)
    told = f"{rows / took:6,.0f} tokens/s, {rows / took / gpus:5,.0f} a GPU"
    print(f"{gpus} GPUs, {rows:3} rows: {1e3 * took:4.1f} ms from token to token, {told}")
weights_only = 2 * large.parameters / 8 / h100.device.bandwidth / cost.TODAY.reach
print(f"reading the weights once takes {1e3 * weights_only:.1f} ms")
cache_each = 2 * 2 * large.layers * large.keys
print(f"the cache: {cache_each / 1e3:.0f} kB a token, {cache_each * 4096 / 1e9:.2f} GB for a row of 4,096")
prefill = 2048 * sum(cost.forward_flops(large, 2048).values()) / (8 * h100.device.bf16 * cost.TODAY.reach)
alone_, crowd = (step_seconds(large, rows, 4096, 8) for rows in (1, 64))
print(f"prefill of 2,048 tokens: {1e3 * prefill:.0f} ms of products; token by token {2048 * alone_:.0f} s")
assert [round(1e3 * s, 1) for s in (weights_only, alone_, crowd)] == [6.6, 6.9, 14.2] and 64 * alone_ > 30 * crowd
assert np.isinf(step_seconds(large, 1, 4096, 1)) and np.isinf(step_seconds(large, 128, 4096, 4))
assert np.isfinite(step_seconds(large, 8, 4096, 2)) and np.isinf(step_seconds(large, 16, 4096, 2))

# %% [markdown] lang="en"
# **One reader** waits 6.9 ms for a token, and 6.6 of them go into reading the weights. No faster arithmetic helps: more
# bandwidth does, more ranks to read with, or smaller weights (8 or 4 bits in place of 16). **64 readers** wait twice as
# long, and get over 30 times as much together. A **prefill** of 2,048 tokens takes as long as seven decode steps, since
# it uses the arithmetic; token by token it would take 14 seconds.
#
# (Kernels and links have the 0.8 of the data sheet that the course assumes. Norms are left out, and so are starts of
# kernels. At an assumed 5 microseconds each, the five kernels of 80 blocks would add 2 ms where nothing hides them.)
#
# **In the explorer:** with rows of 32,768 tokens the caches end the batch at 32, and reading them takes longer than
# reading the weights. `llama-70b` does not fit on one GPU; on two there is room for eight rows of 4,096. Four GPUs are
# cheaper than eight for 64 readers, 698 tokens a second and GPU in place of 561. But eight have room for 256, and then
# give 1,034.
#
# So the layout for serving is not that for training: as many tensor ranks as latency and memory ask for, all in one
# node, and copies of that for more readers ([Pope et al. 2022](https://arxiv.org/abs/2211.05102) work it out for 540
# billion parameters). A pipeline makes room for larger models, but no token faster, since each goes through all stages.
#
# ## 6. Many readers
#
# A batch makes a token cheap. But readers come when they like, and answers have different lengths. A batch has so many
# **places**, one for each row. If it is filled once, and everybody waits until its longest answer is done, places stand
# empty. With **[continuous
# batching](../docs/glossary.md#continuous-batching)** a place that is free takes the next request at the next step
# ([Yu et al. 2022](https://www.usenix.org/conference/osdi22/presentation/yu), *Orca*).
#
# **Predict:** 64 requests, all there from the start, and eight places. Their lengths are random, near 100 tokens on the
# average: many are short, a few are long. How many times as many steps do fixed batches take?

# %%
prediction = None  # a factor


def fixed(lengths, places):
    """(start, length, place) of each request; steps until all are done."""
    plan, now = [], 0
    for i in range(0, len(lengths), places):
        group = lengths[i : i + places]
        plan += [(now, length, place) for place, length in enumerate(group)]
        now += max(group)
    return plan, now


def continuous(lengths, places):
    free, plan = [(0, place) for place in range(places)], []
    for length in lengths:
        now, place = heapq.heappop(free)
        plan.append((now, length, place))
        heapq.heappush(free, (now + length, place))
    return plan, max(end for end, _ in free)


# %%
lengths = [int(x) for x in np.random.default_rng(0).geometric(0.01, 64)]
drawing, panels = viz.figure(8.0, 3.6, rows=2)
for panel, way in zip(panels, (fixed, continuous), strict=True):
    places, end = way(lengths, 8)
    starts, sizes, rows = zip(*places, strict=True)
    panel.barh(rows, sizes, left=starts, color=viz.PALETTE[0], ec=viz.INK, lw=0.6)
    panel.set(xlim=(0, 1.02 * fixed(lengths, 8)[1]), yticks=range(8), ylabel="place", ylim=(7.6, -0.6))
    panel.set_title(f"{way.__name__}: {end:,} steps, places busy {sum(lengths) / end / 8:.0%} of the time", fontsize=10)
panels[1].set_xlabel("decode steps")
ends = [way(lengths, 8)[1] for way in (fixed, continuous)]
assert round(ends[0] / ends[1], 1) == 2.4
alt = f"64 requests on eight places. Fixed batches leave gaps behind short answers and take {ends[0]:,} steps, "
viz.show(drawing, alt + f"continuous batching {ends[1]:,}.")

# %% [markdown] lang="en"
# 2.4 times as many. Each bar is a request, and each gap in the upper picture is a place that waits for the longest
# answer of its batch. The tokens are the same, and so is what a step costs, about.
#
# The picture leaves out two things. A new request has its prefill first, and the others wait for it. So prefills are
# cut into pieces ([Agrawal et al. 2023](https://arxiv.org/abs/2308.16369)) or done on other GPUs ([Zhong et al.
# 2024](https://arxiv.org/abs/2401.09670)). And nobody knows beforehand how long a cache will get. So caches are kept in
# small pages that lie anywhere in memory, as an operating system does it ([Kwon et al.
# 2023](https://arxiv.org/abs/2309.06180), *vLLM*).
#
# ## 7. Guess first, check later
#
# Decoding reads all weights for one token. Checking five tokens reads them once, too: intensity 5 in place of 1, at
# nearly the same time. So let somebody cheap guess the next few tokens, and let the model check them in one forward.
# What it would have written itself is kept, and behind it comes one token of its own. This is **[speculative
# decoding](../docs/glossary.md#speculative-decoding)** ([Leviathan et al. 2023](https://arxiv.org/abs/2211.17192)).
# Greedy text does not change at all, whoever guesses. (In float64. In 16 bits two tokens may be so close that rounding
# decides.)
#
# Our guesser has counted which token follows which on the page, nothing more.
#
# **Your turn:** it is a loop around `run`, and one thing is easy to forget: what was guessed wrong is in the cache.
# Write it before you unfold ours; the cell below ours compares the two. **Predict:** four guesses at a time, how many
# tokens does a forward bring?

# %%
prediction = None  # tokens a forward

counts = torch.zeros(config.vocab, config.vocab)
counts.index_put_((page[:-1], page[1:]), torch.ones(len(page) - 1), accumulate=True)
follows = counts.argmax(1)  # the likeliest next token of each


def guessed(row, ahead):
    """(1, T) tokens -> (1, ahead) that may follow."""
    found = [row[0, -1]]
    for _ in range(ahead):
        found.append(follows[found[-1]])
    return torch.stack(found[1:])[None]


# %%
def my_speculative(model, row, count, ahead):
    """The greedy tokens (1, count) behind row (1, T), and how many forwards they took."""
    return None, 0  # your loop in place of this


# %% jupyter={"source_hidden": true}
def speculative(model, row, count, ahead):
    """Greedy tokens (1, count); how many forwards it took, how many guesses were made and how many were kept."""
    caches, start, forwards, made, kept = [[] for _ in model.blocks], row.size(1), 0, 0, 0
    known = 0  # tokens in the caches
    while row.size(1) < start + count:
        guesses = guessed(row, ahead)
        answers = run(model, torch.cat([row[:, known:], guesses], 1), caches)[:, -ahead - 1 :].argmax(-1)
        right = (answers[0, :-1] == guesses[0]).long().cumprod(0).sum().item()  # up to the first wrong one
        row = torch.cat([row, answers[:, : right + 1]], 1)
        known = row.size(1) - 1  # the last one has not been through the model
        for cache in caches:
            cache[:] = [x[:, :, :known] for x in cache]  # forget what was guessed wrong
        forwards, made, kept = forwards + 1, made + ahead, kept + right
    return row[:, start : start + count], forwards, made, kept


# %%
table, kept_of = {}, {}
for ahead in (1, 2, 4, 8):
    found = [speculative(loaded(), row[None], 40, ahead) for row in prompts]
    assert torch.equal(torch.cat([tokens for tokens, *_ in found]), truth)
    forwards, made, kept = (sum(column) for column in list(zip(*found, strict=True))[1:])
    table[ahead], kept_of[ahead] = forwards, kept / made
    told = f"{kept} of {made} guesses kept ({kept / made:.0%})"
    print(f"{ahead} ahead: {forwards:3} forwards for {truth.numel()} tokens, {told}")


def speculative_on_ranks():
    model = parallelize(loaded(), Mesh(tp=4)).module
    with ledger() as book:
        tokens, forwards, *_ = speculative(model, prompts[:1], 40, 4)
    return tokens, forwards, book.calls("tp")


for tokens, forwards, calls in world.run(speculative_on_ranks):
    assert torch.equal(tokens, truth[:1]) and calls == 10 * forwards
print(f"tp=4: the same tokens in {forwards} forwards, {calls} calls in place of {10 * 40}")
tokens, forwards = my_speculative(loaded(), prompts[:1], 40, 4)
wrote = "nothing yet" if tokens is None else "the same" if torch.equal(tokens, truth[:1]) else "other tokens"
print(f"yours, the same row: {wrote}, {forwards} forwards")

# %% [markdown] lang="en"
# The same text, with four guesses in less than half of the forwards, by a guesser that knows nothing but pairs, on one
# process and on four tensor ranks. The more it guesses ahead, the more is thrown away. If each guess were right with
# the same chance $a$, a forward with $k$ guesses would bring $(1 - a^{k+1})/(1 - a)$ tokens (Leviathan et al. 2023,
# eq. 1). We take $a$ from the run with one guess, 59 percent. Does the formula hold for more?

# %%
a = kept_of[1]
for ahead, forwards in table.items():
    formula = (1 - a ** (ahead + 1)) / (1 - a)
    print(f"{ahead} ahead: {truth.numel() / forwards:.2f} tokens a forward, formula {formula:.2f}")
for rows in (1, 64, 256):
    one, five = (decode_kernels(large, n, 4096, 8)["MLP, in"].seconds(h100, cost.TODAY) for n in (rows, 5 * rows))
    print(f"llama-70b, MLP, {rows:3} rows: five tokens a row take {five / one:.1f} times as long as one")
assert truth.numel() / table[4] > 2 and table[8] <= table[4] < table[1] and five / one > 3

# %% [markdown] lang="en"
# The formula is close, though guesses are not independent. And the last lines say when speculation pays. For one reader
# four guesses are checked for free. In a batch of 256 the MLP takes four times as long, since five tokens of 256 rows
# are far beyond the 295 FLOPs a byte. Speculation and large batches sell the same thing, the arithmetic that waits, and
# it can be sold only once.
#
# ## What you have now
#
# - **Scale:** strong scaling ends when the batch has no more rows, weak scaling when a larger batch is of no more use.
#   Sixteen thousand GPUs are for models that have enough to compute for them.
# - **Failures:** at that size every three hours. $\sqrt{2\delta M}$ says when to save, and $\delta$ and $R$ what it
#   costs.
# - **Cost:** $6ND$, a speed and a price. The reported hours are 1.17 times those of $6ND$ at the printed speed.
# - **Serving:** a cache of keys and values, heads over tensor ranks, tokens equal to one process. Decoding waits for
#   memory, and everything that makes it cheap (batches, grouped heads, guesses) puts more FLOPs on each byte.
#
# ## Three questions to end with
#
# 1. Your run on 2,048 GPUs, each as reliable as the Llama team's, writes a checkpoint in 20 seconds. How often should
#    it do so?
# 2. A model has as many heads of keys as of queries. What is attention's arithmetic intensity in decoding, in 16 bits,
#    and what does a batch of 100 rows change?
# 3. You go from one tensor rank to two, and then to four. Which of these halve each time: the weights that a rank
#    reads, its cache, the bytes that it sends for a token?
#
# <details><summary>Answers</summary>
#
# 1. A failure every 24.7 hours. $\sqrt{2 \cdot 20 \cdot 89{,}100} = 1{,}890$ seconds: every half an hour.
# 2. 1 FLOP a byte: 4 FLOPs for each pair of a key number and a value number, which are 4 bytes. A batch changes
#    nothing.
# 3. The weights and the cache do (while the heads of keys can be divided). The bytes grow: nothing with one rank, then
#    once and one and a half times each activation.
#
# </details>
#
# ## References
#
# - Agrawal et al. 2023, *SARATHI: Efficient LLM Inference by Piggybacking Decodes with Chunked Prefills*, [arXiv
#   2308.16369](https://arxiv.org/abs/2308.16369)
# - Ainslie et al. 2023, *GQA*, [arXiv 2305.13245](https://arxiv.org/abs/2305.13245)
# - Besiroglu et al. 2024, *Chinchilla Scaling: A replication attempt*, [arXiv
#   2404.10102](https://arxiv.org/abs/2404.10102)
# - Daly 2006, *A higher order estimate of the optimum checkpoint interval for restart dumps*, Future Generation
#   Computer Systems 22(3)
# - Hoffmann et al. 2022, *Training Compute-Optimal Large Language Models*, [arXiv
#   2203.15556](https://arxiv.org/abs/2203.15556)
# - Kwon et al. 2023, *Efficient Memory Management for Large Language Model Serving with PagedAttention*, [arXiv
#   2309.06180](https://arxiv.org/abs/2309.06180)
# - Leviathan, Kalman and Matias 2023, *Fast Inference from Transformers via Speculative Decoding*, [arXiv
#   2211.17192](https://arxiv.org/abs/2211.17192)
# - Llama Team 2024, *The Llama 3 Herd of Models*, [arXiv 2407.21783](https://arxiv.org/abs/2407.21783)
# - McCandlish et al. 2018, *An Empirical Model of Large-Batch Training*, [arXiv
#   1812.06162](https://arxiv.org/abs/1812.06162)
# - Pope et al. 2022, *Efficiently Scaling Transformer Inference*, [arXiv 2211.05102](https://arxiv.org/abs/2211.05102)
# - Young 1974, *A first order approximation to the optimum checkpoint interval*, Communications of the ACM 17(9)
# - Yu et al. 2022, *Orca: A Distributed Serving System for Transformer-Based Generative Models*, OSDI
# - Zhong et al. 2024, *DistServe: Disaggregating Prefill and Decoding for Goodput-optimized Large Language Model
#   Serving*, [arXiv 2401.09670](https://arxiv.org/abs/2401.09670)
#
# **Next:** [trust, and what lies beyond](08b_trust_and_beyond.ipynb): other kinds of data, privacy, and looking inside
# a model that is cut into pieces.

# %%
world.close()
