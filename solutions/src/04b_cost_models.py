# %% [markdown] lang="en"
# # Exercises of 04b: cost models
#
# Eight small functions, an hour and a half or so. Together they are a cost model: a link in two numbers, the idle time
# of a schedule, the memory of a rank, the bytes of an axis, the seconds of a step. At the end you search for the best
# layout of a model on a cluster that you do not have.
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
#     python -m minipar grade exercises/04b_cost_models.ipynb
#
#     # hints for task 2, one at a time; its solution, once it passes
#     python -m minipar hint 04b.2
#     python -m minipar solution 04b.2
#
# `grade` reads only the cells with a function to finish. Cells that you add are for trying things out. The folded cells
# belong to the checks, so an answer that uses their variables or functions is refused: take what your function is
# given, and what is imported. The package has all of these formulas, too, and the checks compare with them. Answers
# that call them are refused.

# %% tags=["setup"]
from itertools import product
from typing import Any

import torch

from minipar import CLUSTERS, Config, Layout, Mesh, World, ledger, parallelize, predict
from minipar.course.checks import names_in, returned, verdict
from minipar.course.given import along, rows_of_text
from minipar.hardware import Cluster
from minipar.transformer import Transformer

world = World(4)

# %% [markdown] lang="en"
# The next cells are folded: what the checks compare with. The sizes and seconds of task 2 were measured on a machine
# with two cores: all-reduces on two ranks, the fastest of 240 each.


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given: measured all-reduces, in bytes and seconds; and whether an answer is the learner's own
SIZES = [4.0**k for k in range(1, 13)]
TOOK = [95.7, 166.8, 167.2, 164.4, 163.6, 171.9, 201.7, 182.8, 227.8, 399.6, 1549.3, 10440.3]
SECONDS = [1e-6 * microseconds for microseconds in TOOK]


def by_hand(answer: Any, *allowed: str) -> None:
    """AssertionError if an answer asks the package for what it is to compute."""
    for name in sorted(names_in(answer)):
        module = getattr(globals().get(name), "__module__", None) or name
        own = module.split(".")[0] != "minipar" or name in allowed
        assert own, f"{answer.__name__} uses `{name}`: here compute it yourself, from what it is given."


def number(got: Any, what: str) -> float:
    """What should be a number, if it is one."""
    assert isinstance(returned(got, what), int | float), f"{what} should be a number, and is {got!r:.60}."
    return float(got)


def same(got: float, wanted: float, far: float = 1e-9) -> bool:
    return abs(got - wanted) <= far * max(abs(got), abs(wanted))


def cause(got: float, mistakes: dict[str, float]) -> str:
    """What a wrong number smells of, as a sentence; '' if nobody knows."""
    return next((f" {why}" for why, wrong in mistakes.items() if same(got, wrong)), "")


def fitted(sizes: list[float], seconds: list[float], weigh: bool = True) -> tuple[float, float]:
    """alpha and beta by least squares, relative errors or not: the two equations that the derivatives give."""
    a = [1 / t if weigh else 1.0 for t in seconds]
    b = [n * x for n, x in zip(sizes, a, strict=True)]
    y = [t * x for t, x in zip(seconds, a, strict=True)]
    aa, ab, bb = (sum(p * q for p, q in zip(x, z, strict=True)) for x, z in ((a, a), (a, b), (b, b)))
    ay, by = (sum(p * q for p, q in zip(x, y, strict=True)) for x in (a, b))
    return (bb * ay - ab * by) / (aa * bb - ab * ab), (aa * by - ab * ay) / (aa * bb - ab * ab)


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for tasks 3 and 4: the schedules that run, simulated
def simulated(schedule: str, p: int, m: int, f: float, i: float, w: float, chunks: int) -> float:
    """The share of time in which ranks idle."""
    from minipar.schedule import SCHEDULES, interleaved
    from minipar.timeline import Costs, bubble, simulate

    order = interleaved(p, m, chunks) if schedule == "interleaved" else SCHEDULES[schedule](p, m)
    return bubble(simulate(order, Costs(f / chunks, i / chunks, w / chunks)))


def held(p: int, m: int, stage: int) -> int:
    """Microbatches of which a stage of 1F1B holds activations, at most."""
    from minipar.schedule import in_flight, one_f_one_b

    return in_flight(one_f_one_b(p, m)[stage])


def find_model(name: str) -> Transformer:
    """A model of the catalogue."""
    from minipar.transformer import find_model

    return find_model(name)


def length(f: float, b: float, p: int, m: int) -> float:
    """Seconds of a 1F1B pipeline."""
    from minipar.schedule import one_f_one_b
    from minipar.timeline import Costs, simulate

    return simulate(one_f_one_b(p, m), Costs(f, b / 2, b / 2)).end


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for task 5: what the ledger of four ranks says
def booked(mesh: Mesh, depth: int, microbatches: int) -> dict[str, float]:
    """Of a step of a small GPT in float64, on rank 1: bytes sent by axis, of its gradients, and of an activation."""
    tokens, targets = rows_of_text()

    def step(axis):
        from minipar import gpt

        torch.manual_seed(0)
        config = Config(context=32, depth=depth, width=32, heads=4)
        model = parallelize(gpt(config).double(), mesh, microbatches=microbatches)
        model.step(tokens, targets)  # in the first step, shapes travel ahead
        with ledger() as book:
            model.step(tokens, targets)
        sent = {name: book.bytes(name) for name in ("dp", "tp", "pp")}
        return sent | {"gradients": sum(p.numel() for p in model.parameters()) * 8}

    rows = 8 // mesh.dp // microbatches
    return along(world, "dp", step)[1] | {"activation": rows * 32 * 32 * 8}


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for task 7: what stands in data sheets. NVIDIA's of the SXM form, and the network port that a device has
SHEETS = {
    "V100": {"TFLOPS": 125, "with sparsity": False, "NVLink GB/s": 300, "network Gbit/s": 100},
    "A100": {"TFLOPS": 624, "with sparsity": True, "NVLink GB/s": 600, "network Gbit/s": 200},
    "H100": {"TFLOPS": 1979, "with sparsity": True, "NVLink GB/s": 900, "network Gbit/s": 400},
    "B200": {"TFLOPS": 4500, "with sparsity": True, "NVLink GB/s": 1800, "network Gbit/s": 400},
}


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for task 8: what there is to choose from
def all_layouts(model, cluster, batch):
    """The predictions for all layouts that the task names, by numbers alone."""

    def parts(number, most):
        return [n for n in range(1, min(number, most) + 1) if number % n == 0]

    for tp, pp in product(parts(cluster.node, model.heads), parts(model.layers, cluster.gpus)):
        dp = cluster.gpus // (tp * pp)
        if dp * tp * pp == cluster.gpus and model.heads % tp == 0 and batch % dp == 0:
            for m in parts(batch // dp, batch):
                layout = Layout(Mesh(dp=dp, pp=pp, tp=tp), m, zero=1)
                yield predict(model, layout, cluster, batch, 2048, exact=False)


# %% [markdown] lang="en"
# ## 04b.1 · Trace: read off a link
#
# A message of $n$ bytes takes $\alpha + n\beta$ seconds. Suppose that on some link a message of 1 MB takes 45 µs, and
# one of 2 MB takes 85 µs (1 MB is a million bytes). On paper:
#
# - What does a message cost however small it is, in µs?
# - How many GB a second is the link good for, when messages are large? That is $1/\beta$.
# - How long does a message of 10 MB take, in µs?
# - For how many bytes do both parts, $\alpha$ and $n\beta$, cost the same?

# %% [markdown] lang="en" hint="04b.1"
# The second megabyte takes 85 − 45 = 40 µs. So does the first: the rest of its 45 µs is $\alpha$.

# %% [markdown] lang="en" hint="04b.1"
# 40 µs for a million bytes are 25,000 bytes in a µs. A µs is a millionth of a second: 25 GB a second.

# %% [markdown] lang="en" hint="04b.1"
# 10 MB: 5 + 10 · 40. Both parts are 5 µs for 5 · 25,000 bytes.


# %% task="04b.1" title="Trace: read off a link"
def read_off() -> dict[str, float]:
    """alpha in µs; bandwidth in GB/s; 10 MB: µs that they take; equal: bytes for which both parts cost the same."""
    ### BEGIN SOLUTION
    return {"alpha": 5, "bandwidth": 25, "10 MB": 405, "equal": 125_000}
    ### END SOLUTION


# %% check="04b.1" seconds=10
# Check of 04b.1: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    yours = dict(returned(read_off(), "read_off"))
    alpha, beta = fitted([1e6, 2e6], [45e-6, 85e-6])  # two points: the line through them
    right = {
        "alpha": (1e6 * alpha, "Going on from 2 MB over 1 MB to none, it is 40 µs less each time"),
        "bandwidth": (1e-9 / beta, "A million bytes more take 40 µs more"),
        "10 MB": (1e6 * (alpha + 1e7 * beta), "10 MB are one message: alpha once, and 40 µs for each MB"),
        "equal": (alpha / beta, "alpha, and how many bytes travel in that time"),
    }
    for name, (wanted, why) in right.items():
        assert name in yours, f"read_off says nothing about {name!r}."
        got = number(yours[name], repr(name))
        assert same(got, wanted, 1e-6), f"{name!r} is not {got:g}. {why}."
    shares = [n * beta / (alpha + n * beta) for n in (1e6, 1e7)]
    print("a message of 1 MB gets {:.0%} of the bandwidth, one of 10 MB {:.0%}".format(*shares))

# %% [markdown] lang="en"
# ## 04b.2 · Write: fit a link
#
# Now with twelve measured all-reduces, from 4 bytes to 16 MB, that take from 0.1 to 10 milliseconds. No line goes
# through all of them. The usual least squares makes the sum of squared *errors* as small as it can. An error of a tenth
# of a millisecond weighs nothing for the largest message, and is all that the smallest ones take: the fit listens to
# the largest sizes only.
#
# So use *relative* errors. Find the $\alpha$ and $\beta$ for which
#
# $$\sum_k \left(\frac{\alpha + n_k\,\beta - t_k}{t_k}\right)^2$$
#
# is least. It is linear least squares, with rows divided by $t_k$. Such a fit says the same whatever the units.
#
# **Target:** the least sum, to eight digits, in bytes and seconds as well as in GB and µs.

# %% [markdown] lang="en" hint="04b.2"
# Each term is $(\alpha \cdot \frac{1}{t_k} + \beta \cdot \frac{n_k}{t_k} - 1)^2$: a matrix with the columns $1/t$ and
# $n/t$, times the vector $(\alpha, \beta)$, should be a column of ones.

# %% [markdown] lang="en" hint="04b.2"
# `torch.linalg.lstsq(A, b).solution` solves it, for A of shape (12, 2) and b of shape (12, 1). Make the tensors with
# `dtype=torch.float64`: sizes and seconds differ by a factor of $10^{11}$.


# %% task="04b.2" title="Write: fit a link"
def fit(sizes: list[float], seconds: list[float]) -> tuple[float, float]:
    """alpha and beta for which the sum of squared relative errors of alpha + size * beta is least."""
    ### BEGIN SOLUTION
    n, t = torch.tensor(sizes, dtype=torch.float64), torch.tensor(seconds, dtype=torch.float64)
    rows = torch.stack([1 / t, n / t], dim=1)
    alpha, beta = torch.linalg.lstsq(rows, torch.ones_like(t)[:, None]).solution.flatten().tolist()
    return alpha, beta
    ### END SOLUTION


# %% check="04b.2" seconds=10
# Check of 04b.2: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    by_hand(fit)
    line = [3e-5 + 4e-11 * n for n in SIZES]
    for case, sizes, seconds, per_size, per_second in [
        ("points on a line", SIZES, line, 1, 1),
        ("measured all-reduces", SIZES, SECONDS, 1, 1),
        ("the same in GB and µs", SIZES, SECONDS, 1e-9, 1e6),
        ("the same in kB and hours", SIZES, SECONDS, 1e-3, 1 / 3600),
        ("three of them", SIZES[3::4], SECONDS[3::4], 1, 1),
    ]:
        n, t = [per_size * size for size in sizes], [per_second * second for second in seconds]
        both = returned(fit(n, t), "fit")
        assert len(both) == 2, f"{case}: fit must return two numbers, alpha and beta."
        (alpha, beta), right, plain = map(float, both), fitted(n, t), fitted(n, t, weigh=False)
        told = f"{case}: you find alpha {alpha:.4g} and beta {beta:.4g}, and it is {right[0]:.4g} and {right[1]:.4g}."
        off = (plain[0] + n[0] * plain[1]) / t[0] - 1
        told += f" That counts errors, not percent: the smallest is {off:+.0%} off." * same(alpha, plain[0], 1e-5)
        told += " Is alpha first?" * same(alpha, right[1], 1e-5)
        told += " beta is one over the bandwidth." * same(beta, 1 / right[1], 1e-5)
        near = same(alpha, right[0], 0.1) and same(beta, right[1], 0.1)
        told += " Near, but was it rounded to float32 on the way?" * near
        assert same(alpha, right[0], 1e-8) and same(beta, right[1], 1e-8), told
    alpha, beta = fit(SIZES, SECONDS)
    print(f"alpha {1e6 * alpha:.0f} µs, {1e-9 / beta:.2f} GB/s; both parts cost the same at {alpha / beta:,.0f} bytes")

# %% [markdown] lang="en"
# ## 04b.3 · Write: the idle share of a schedule
#
# A pipeline of $p$ equal stages and $m$ microbatches. For each microbatch a stage needs $f$ seconds for forward, $i$
# for the gradient of the input, $w$ for that of the weights, and messages are free. So each rank works for
# $m\,(f + i + w)$ seconds. What is it idle for?
#
# - GPipe and 1F1B: $(p-1)\,(f + i + w)$. The pipe has to fill and to drain.
# - interleaved, each rank with $v$ smaller stages (chunks): $v$ times less.
# - ZB-H1, which does weight gradients where 1F1B waits: $(p-1)\,(f + i - w)$.
#
# **Target:** the share of the *whole* time in which ranks are idle, as the simulator of the package finds it.

# %% [markdown] lang="en" hint="04b.3"
# The whole time is work and idle time together: share = idle / (work + idle).

# %% [markdown] lang="en" hint="04b.3"
# `gap = {"gpipe": f + i + w, ...}[schedule]` is a way to write it. `chunks` is 1 for all but "interleaved".


# %% task="04b.3" title="Write: the idle share of a schedule"
def idle_share(schedule: str, p: int, m: int, f: float, i: float, w: float, chunks: int) -> float:
    """The share of the time, 0 to 1. schedule: "gpipe", "1f1b", "interleaved" or "zero-bubble-h1"."""
    ### BEGIN SOLUTION
    whole = f + i + w
    gap = {"gpipe": whole, "1f1b": whole, "interleaved": whole / chunks, "zero-bubble-h1": f + i - w}[schedule]
    return (p - 1) * gap / (m * whole + (p - 1) * gap)
    ### END SOLUTION


# %% check="04b.3" seconds=10
# Check of 04b.3: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    by_hand(idle_share)
    for schedule, chunks in [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 4), ("zero-bubble-h1", 1)]:
        for p, m, f, i, w in [(4, 8, 1, 1, 1), (2, 6, 3, 4, 2), (8, 16, 2, 2, 1), (1, 4, 1, 1, 1)]:
            got = number(idle_share(schedule, p, m, f, i, w, chunks), "idle_share")
            right, whole = simulated(schedule, p, m, f, i, w, chunks), f + i + w
            work, idle, plain = m * whole, m * whole * right / (1 - right), (p - 1) * whole
            more = idle * p / max(p - 1, 1)
            mistakes = {
                "That is idle time over work: the whole time is both.": idle / work,
                "The pipe fills for p - 1 microbatches, not for p.": more / (work + more),
                "That is 1F1B's.": plain / (work + plain),
                "That is the time, not the share.": idle,
                "A share from 0 to 1 is asked for.": 100 * right,
            }
            what = f"{schedule}, chunks={chunks}, p={p}, m={m}, f={f}, i={i}, w={w}"
            why = cause(got, mistakes) if right else " One stage waits for nobody."
            assert abs(got - right) < 1e-9, f"{what}: you say {got:.4f}, simulated it is {right:.4f}.{why}"
    shares = {s: idle_share(s, 8, 32, 1, 1, 1, c) for s, c in (("1f1b", 1), ("interleaved", 2), ("zero-bubble-h1", 1))}
    print("8 stages, 32 microbatches:", ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))

# %% [markdown] lang="en"
# ## 04b.4 · Write: the memory of a rank
#
# In mixed precision with Adam, a parameter takes 2 bytes for its weight, 2 for its gradient, and 12 for the optimizer.
# Tensor and pipeline ranks share the parameters; say, evenly. Data ranks all have the same ones, and ZeRO lets them
# share a part: stage 1 the optimizer's bytes, stage 2 the gradients as well, stage 3 the weights as well.
#
# Activations: one microbatch leaves `activation` bytes on a rank, from its forward to its backward. With 1F1B, stage
# $r$ of $p$ (from 0) begins its first backward when its first $p - r$ microbatches have gone ahead. It holds no more
# than these, and no more than there are.
#
# **Target:** the bytes that the package computes, for every rank of the pipe.

# %% [markdown] lang="en" hint="04b.4"
# A rank has `parameters / (tp * pp)` parameters.

# %% [markdown] lang="en" hint="04b.4"
# `12 / (dp if zero >= 1 else 1)` for the optimizer; the same for gradients from stage 2 on, and for weights at stage 3.

# %% [markdown] lang="en" hint="04b.4"
# The number of microbatches held is `min(microbatches, pp - stage)`.


# %% task="04b.4" title="Write: the memory of a rank"
def rank_bytes(
    parameters: float, activation: float, dp: int, tp: int, pp: int, zero: int, stage: int, microbatches: int
) -> float:
    """Bytes of states and activations on a rank of this stage. parameters: of the whole model. zero: 0 to 3."""
    ### BEGIN SOLUTION
    weights, gradients, optimizer = (size / (dp if zero >= least else 1) for size, least in ((2, 3), (2, 2), (12, 1)))
    states = parameters / (tp * pp) * (weights + gradients + optimizer)
    return states + activation * min(microbatches, pp - stage)
    ### END SOLUTION


# %% check="04b.4" seconds=10
# Check of 04b.4: run this after your answer
# NBVAL_CHECK_OUTPUT
def right_bytes(parameters, activation, dp, tp, pp, zero, stage, microbatches):
    from minipar.cost import states

    return sum(states(parameters / (tp * pp), dp, zero).values()) + activation * held(pp, microbatches, stage)


with verdict():
    by_hand(rank_bytes)
    for dp, tp, pp, m in [(8, 1, 1, 1), (4, 2, 4, 8), (2, 8, 4, 2), (1, 1, 4, 6)]:
        for zero in range(4):
            for stage in {0, pp // 2, pp - 1}:
                case, what = (dp, tp, pp, zero, stage, m), f"dp={dp} tp={tp} pp={pp}, zero={zero}, stage {stage}, m={m}"
                for part, P, A in (("states", 7e9, 0), ("activations", 0, 1e9), ("both", 7e9, 1e9)):
                    got, right = number(rank_bytes(P, A, *case), "rank_bytes"), right_bytes(P, A, *case)
                    share, n = P / (tp * pp), right / 1e9
                    mistakes = {
                        "Tensor and pipeline ranks share the parameters.": right * tp * pp,
                        "Data ranks share nothing without ZeRO.": share * 16 / dp,
                        "Which parts are shared out at this stage of ZeRO?": share * 16,
                    }
                    more = f" That is {got / 1e9:g} microbatches, and {n:g} are in flight." * (part == "activations")
                    told = f"{what}, {part}: you say {got / 1e9:.3f} GB, and it is {right / 1e9:.3f}."
                    assert same(got, right), told + (more or cause(got, mistakes))
    states = [rank_bytes(405e9, 0, 128, 8, 16, zero, 0, 16) / 1e9 for zero in range(4)]
    print("405B, dp=128 pp=16 tp=8, ZeRO 0 to 3:", ", ".join(f"{size:.1f}" for size in states), "GB of states")

# %% [markdown] lang="en"
# ## 04b.5 · Write: what each axis sends
#
# What does one rank send in a step, without ZeRO, along each axis?
#
# - **dp**: its gradients, once, in an all-reduce.
# - **tp**: in each block and for each microbatch four all-reduces of an activation, two in forward, two in backward.
# - **pp**: for each microbatch an activation to the next stage, and a gradient, as large, to the one before. A stage
#   has `neighbors` of these: 2 in the middle of the pipe, 1 at its ends.
#
# In a ring all-reduce of $M$ bytes on $n$ ranks each sends $2\,(n-1)/n \cdot M$.
#
# **Target:** what the ledger of real ranks says. (On tp, embedding, head and loss send a little more. Leave that out.)

# %% [markdown] lang="en" hint="04b.5"
# `2 * (n - 1) / n * size` is 0 for one rank, so no case is special.

# %% [markdown] lang="en" hint="04b.5"
# tp: `4 * blocks * microbatches` all-reduces of `activation` bytes. pp: one message of `activation` bytes for each
# neighbor and microbatch.


# %% task="04b.5" title="Write: what each axis sends"
def sent_bytes(
    gradients: float, blocks: int, activation: float, dp: int, tp: int, neighbors: int, microbatches: int
) -> dict[str, float]:
    """Bytes that a rank sends in a step: {"dp": ..., "tp": ..., "pp": ...}.

    gradients: bytes of all gradients on this rank. blocks: on this rank. activation: bytes of one microbatch's, as it
    goes from block to block.
    """
    ### BEGIN SOLUTION
    return {
        "dp": 2 * (dp - 1) / dp * gradients,
        "tp": 2 * (tp - 1) / tp * 4 * blocks * microbatches * activation,
        "pp": neighbors * microbatches * activation,
    }
    ### END SOLUTION


# %% check="04b.5" seconds=30
# Check of 04b.5: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    by_hand(sent_bytes)
    names = ("gradients", "blocks", "activation", "dp", "tp", "neighbors", "microbatches")
    two, one, pipe = booked(Mesh(dp=2, tp=2), 2, 4), booked(Mesh(dp=2, tp=2), 1, 4), booked(Mesh(pp=4), 4, 4)
    for case, axis, sent, *given in [
        ("dp=2", "dp", two["dp"], two["gradients"], 2, two["activation"], 2, 2, 0, 4),
        ("tp=2, a block", "tp", two["tp"] - one["tp"], 0, 1, two["activation"], 2, 2, 0, 4),
        ("pp=4, in the middle", "pp", pipe["pp"], pipe["gradients"], 1, pipe["activation"], 1, 1, 2, 4),
        ("dp=8", "dp", 1.75e9, 1e9, 4, 1e6, 8, 1, 2, 8),
        ("tp=8", "tp", 224e6, 1e9, 4, 1e6, 8, 8, 2, 8),
        ("the end of a pipe", "pp", 8e6, 1e9, 4, 1e6, 8, 8, 1, 8),
        ("one rank", "dp", 0, 1e9, 4, 1e6, 1, 1, 0, 8),
        ("one rank", "tp", 0, 1e9, 4, 1e6, 1, 1, 0, 8),
    ]:
        got = returned(sent_bytes(*given), "sent_bytes")
        assert axis in got, f"sent_bytes says nothing about {axis!r}."
        g, blocks, a, dp, tp, neighbors, m = given
        value, n = number(got[axis], axis), {"dp": dp, "tp": tp, "pp": 2}[axis]
        size = {"dp": g, "tp": 4 * blocks * m * a, "pp": neighbors * m * a}[axis]
        right = 2 * (n - 1) / n * size
        mistakes = {
            "(n-1)/n: a rank keeps a chunk at home.": 2 * size,
            "An all-reduce is two halves: 2 (n-1)/n."
            + " And there are four, two in forward and two in backward." * (axis == "tp"): right / 2,
            "Gradients travel once a step, not with each microbatch.": m * right,
            "And that for each microbatch.": right / m,
        }
        if axis == "pp":
            mistakes = {"One message for each neighbor and microbatch.": 2 * right, "For each microbatch.": right / m}
        said = ", ".join(f"{name}={value:,.0f}" for name, value in zip(names, given, strict=True))
        told = f"{case} ({said}): you say {value:,.0f} bytes on {axis}, and a rank sends {sent:,.0f}."
        assert abs(value - sent) <= 64, told + cause(value, mistakes)
    print(f"a small GPT on four ranks: dp {two['dp']:,}, tp {two['tp'] - one['tp']:,} a block, pp {pipe['pp']:,} bytes")

# %% [markdown] lang="en"
# ## 04b.6 · Write: the seconds of a step
#
# Put it together for 1F1B with data parallelism. Each of $p$ equal stages takes `forward` and `backward` seconds for a
# microbatch; messages between stages are free. Gradients become final while the last microbatch's backward runs. Say
# that their ring all-reduce begins with it: $2(n-1)$ messages of `gradients` / $n$ bytes, one after the other, each in
# $\alpha$ + bytes / bandwidth seconds. So it hides behind that one backward, and what it takes longer comes on top.
#
# **Target:** what the simulator and the ledger's formula give, to nine digits.

# %% [markdown] lang="en" hint="04b.6"
# The pipeline takes $(m + p - 1)\,(f + b)$ seconds: the work of $m$ microbatches, and of $p - 1$ more in which it fills
# and drains.

# %% [markdown] lang="en" hint="04b.6"
# `ring = 2 * (ranks - 1) * (alpha + gradients / ranks / bandwidth)`, of which `max(ring - backward, 0)` is not hidden.


# %% task="04b.6" title="Write: the seconds of a step"
def step_seconds(
    forward: float,
    backward: float,
    stages: int,
    microbatches: int,
    gradients: float,  # bytes on this rank
    ranks: int,  # on the data axis
    alpha: float,  # seconds a message
    bandwidth: float,  # bytes a second
) -> float:
    """Seconds from the first forward until all gradients are summed."""
    ### BEGIN SOLUTION
    pipeline = (microbatches + stages - 1) * (forward + backward)
    ring = 2 * (ranks - 1) * (alpha + gradients / ranks / bandwidth)
    return pipeline + max(ring - backward, 0)
    ### END SOLUTION


# %% check="04b.6" seconds=10
# Check of 04b.6: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    by_hand(step_seconds)
    for f, b, p, m, size, n, alpha, bandwidth in [
        (0.1, 0.2, 4, 8, 0, 1, 0, 1e9),
        (0.1, 0.2, 1, 3, 1e9, 1, 5e-6, 25e9),
        (0.03, 0.05, 2, 5, 1e9, 8, 5e-6, 1e12),
        (0.1, 0.2, 4, 2, 14e9, 64, 1e-2, 50e9),
        (0.1, 0.2, 4, 8, 14e9, 16, 5e-6, 25e9),
    ]:
        got = number(step_seconds(f, b, p, m, size, n, alpha, bandwidth), "step_seconds")
        pipeline, ring = length(f, b, p, m), 2 * (n - 1) * alpha + 2 * (n - 1) / n * size / bandwidth
        right, half = pipeline + max(ring - b, 0), (m + p - 1) * (f + b)
        mistakes = {
            "That is without the time in which the pipe fills and drains.": right - (p - 1) * (f + b),
            "p - 1 microbatches' time is lost, not p's.": right + f + b,
            "The ring hides behind a backward.": pipeline + ring,
            "Not all of the ring is hidden.": pipeline,
            "It hides behind the last microbatch's backward alone.": pipeline + max(ring - m * b, 0),
            "A ring has 2 (n-1) messages, and each of them costs alpha.": right - 2 * (n - 1) * alpha + alpha,
            "alpha is missing.": right - 2 * (n - 1) * alpha,
            "An all-reduce is two halves.": pipeline + max(ring / 2 - b, 0),
        }
        case = f"p={p}, m={m}, forward {f}, backward {b}, {size / 1e9:g} GB over {n} ranks, alpha {alpha:g} s"
        told = f"{case}, {bandwidth / 1e9:g} GB/s: you say {got:.4f} s, and it is {right:.4f}"
        told += f" (pipeline {pipeline:.4f}, ring {ring:.4f})."
        assert same(got, right), told + cause(got, mistakes)
    print(f"a step of {got:.2f} s, of which {m * (f + b):.2f} are work: {m * (f + b) / got:.0%}")

# %% [markdown] lang="en"
# ## 04b.7 · Mend: what a data sheet says
#
# This function takes a device's numbers from its data sheet, and every plan that is made with it is too good. The cell
# below compares it with a run that was published. What data sheets do:
#
# - They print FLOP/s *with sparsity* where the device has it: twice what it does with the usual, dense matrices.
# - NVLink's GB/s are those of both directions together. A ring uses each direction by itself.
# - Networks are sold in bits.
#
# Say by which factors the function's numbers are too large for an H100. Then mend it, also for devices without
# sparsity.

# %% [markdown] lang="en" hint="04b.7"
# A byte has 8 bits: 400 Gbit/s are 50 GB/s. (Each direction by itself, for network ports.)

# %% [markdown] lang="en" hint="04b.7"
# `sheet["TFLOPS"] * 1e12 / (2 if sheet["with sparsity"] else 1)`. A V100 has no sparsity: its 125 TFLOP/s are dense.


# %% task="04b.7" title="Mend: what a data sheet says"
def too_large() -> dict[str, int]:
    """For an H100, before it is mended: the factor by which "flops", "inside" and "between" are too large."""
    ### BEGIN SOLUTION
    return {"flops": 2, "inside": 2, "between": 8}
    ### END SOLUTION


def read_sheet(sheet: dict) -> dict[str, float]:
    """FLOP/s in 16 bits, dense; bytes/s, one direction, to devices of the node ("inside") and to others ("between").

    sheet: "TFLOPS", and whether that is "with sparsity"; "NVLink GB/s"; "network Gbit/s".
    """
    ### BEGIN SOLUTION
    return {
        "flops": sheet["TFLOPS"] * 1e12 / (2 if sheet["with sparsity"] else 1),
        "inside": sheet["NVLink GB/s"] * 1e9 / 2,
        "between": sheet["network Gbit/s"] * 1e9 / 8,
    }
    ### INSTEAD
    # return {
    #     "flops": sheet["TFLOPS"] * 1e12,
    #     "inside": sheet["NVLink GB/s"] * 1e9,
    #     "between": sheet["network Gbit/s"] * 1e9,
    # }
    ### END SOLUTION


# %%
h100 = read_sheet(SHEETS["H100"])
print("Llama 3 405B, 16,384 H100 (Llama Team 2024, Table 4): about 400 TFLOP/s a device, 41 % of the peak")
print(f"by this function 400 TFLOP/s are {400e12 / h100['flops']:.0%}")
print(f"the gradients of 7B, 14 GB, over 16 nodes: {2 * 15 / 16 * 14e9 / h100['between']:.2f} s")

# %% check="04b.7" seconds=10
# Check of 04b.7: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    factors = dict(returned(too_large(), "too_large"))
    catalogue = {name: CLUSTERS[name.lower()] for name in SHEETS}
    printed = {"flops": 1979e12, "inside": 900e9, "between": 400e9}
    why = {
        "flops": "with sparsity it is twice as much",
        "inside": "both directions together are twice as much",
        "between": "a byte has 8 bits",
    }
    for name, device in catalogue.items():
        right = {"flops": device.device.bf16, "inside": device.inside.bandwidth, "between": device.between.bandwidth}
        if name == "H100":
            for part, size in right.items():
                factor = round(printed[part] / size)
                told = f"{part!r}: {printed[part]:.4g} in place of {size:.4g} is {factor} times too much"
                assert factors.get(part) == factor, f"{told}, and you say {factors.get(part)}."
    for name, device in catalogue.items():
        right = {"flops": device.device.bf16, "inside": device.inside.bandwidth, "between": device.between.bandwidth}
        got = returned(read_sheet(dict(SHEETS[name])), "read_sheet")
        for part, size in right.items():
            assert part in got, f"read_sheet gives no {part!r}."
            value = number(got[part], part)
            told = f"{name}: {part!r} is {value:.4g}, and should be {size:.4g}"
            note = "a V100 has no sparsity" if (name, part) == ("V100", "flops") else why[part]
            assert same(value, size, 1e-3), f"{told}: {note}."
    print("H100:", ", ".join(f"{part} {value:.4g}" for part, value in read_sheet(SHEETS["H100"]).items()))

# %% [markdown] lang="en"
# ## 04b.8 · Write: find the layout
#
# `predict(model, Layout(Mesh(dp=..., pp=..., tp=...), microbatches, zero=1), cluster, batch, sequence, exact=False)`
# prices one layout, in about a millisecond: its `.seconds` a step, and whether it `.fits` into memory. Which layout is
# the fastest of those that fit? Try them all:
#
# - every `tp` that stays within a node, so divides `cluster.node`, and divides `model.heads`;
# - every `pp` that divides `model.layers`;
# - `dp` is what is left: `dp * pp * tp` is `cluster.gpus`, and `dp` divides the rows of the batch;
# - every number of microbatches that divides the rows of a data rank.
#
# **Target:** as fast as the best of them, on three clusters; None where nothing fits. (The fastest of all would often
# be data parallelism alone. It just needs several times the memory that there is.)

# %% [markdown] lang="en" hint="04b.8"
# `[n for n in range(1, number + 1) if number % n == 0]` are the divisors of a number. Three loops: over tp, pp and
# microbatches.

# %% [markdown] lang="en" hint="04b.8"
# `dp, rest = divmod(cluster.gpus, tp * pp)`: skip where `rest` is not 0, and where dp does not divide the batch.

# %% [markdown] lang="en" hint="04b.8"
# Collect those predictions that fit. `min(found, key=lambda one: one.seconds).layout` is the fastest's layout, if there
# is any in `found`.


# %% task="04b.8" title="Write: find the layout"
def find_layout(model: Transformer, cluster: Cluster, batch: int, sequence: int) -> Layout | None:
    """The fastest layout that fits, with ZeRO stage 1; None if none does. batch: rows of a step."""

    def divisors(number: int) -> list[int]:
        return [n for n in range(1, number + 1) if number % n == 0]

    ### BEGIN SOLUTION
    found = []
    for tp in divisors(cluster.node):
        for pp in divisors(model.layers):
            dp, rest = divmod(cluster.gpus, tp * pp)
            if rest or model.heads % tp or batch % dp:
                continue
            for microbatches in divisors(batch // dp):
                layout = Layout(Mesh(dp=dp, pp=pp, tp=tp), microbatches, zero=1)
                one = predict(model, layout, cluster, batch, sequence, exact=False)
                found += [one] if one.fits else []
    return min(found, key=lambda one: one.seconds).layout if found else None
    ### END SOLUTION


# %% check="04b.8" seconds=30
# Check of 04b.8: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    by_hand(find_layout, "predict", "Layout", "Mesh")
    for name, device, gpus, batch in [
        ("llama-8b", "a100-40", 16, 64),
        ("megatron-7.5b", "a100-40", 24, 48),
        ("llama-70b", "h100", 64, 128),
        ("llama-405b", "h100", 16, 64),
    ]:
        model, cluster, case = find_model(name), CLUSTERS[device].of(gpus), f"{name} on {gpus} {device}, {batch} rows"
        every = list(all_layouts(model, cluster, batch))
        best = min((one for one in every if one.fits), key=lambda one: one.seconds, default=None)
        layout = find_layout(model, cluster, batch, 2048)
        if best is None:
            assert layout is None, f"{case}: nothing fits, so find_layout should return None, not {layout!r:.60}."
            continue
        assert isinstance(layout, Layout), f"{case}: find_layout returns {layout!r:.60}, not a Layout."
        told, allowed = f"{case}: you find {layout.mesh}, m={layout.microbatches}", {one.layout for one in every}
        assert layout in allowed, f"{told}. That is none of those that are to be tried: tp in a node, zero=1, ...?"
        yours, memory = predict(model, layout, cluster, batch, 2048, exact=False), cluster.device.memory / 1e9
        assert yours.fits, f"{told}. It needs {yours.peak_memory / 1e9:.0f} GB, and a device has {memory:.0f}."
        other = f"{best.layout.mesh}, m={best.layout.microbatches} takes {best.seconds:.3f}"
        assert yours.seconds <= best.seconds * (1 + 1e-9), f"{told}: {yours.seconds:.3f} s a step. {other}."
        if name == "llama-70b":
            fastest = f"{best.layout.mesh}, {best.layout.microbatches} microbatches, MFU {best.mfu:.0%}"
    print(f"llama-70b on 64 H100: {fastest}")
