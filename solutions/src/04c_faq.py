# %% [markdown] lang="en"
# # Exercises of 04c: which model, which layout
#
# Three small functions, an hour or so with the second capstone in mind: a rule that chooses a model and does not fall
# for luck, a search for a layout, and a layout that you choose yourself, for 64 GPUs. No ranks are started.
#
# **How it works.** Run the cells from the top with Shift+Enter. Each task is a cell with a function for you to finish;
# the folded cell below it is its check. In a terminal, in the folder of the course:
#
#     python -m minipar grade exercises/04c_faq.ipynb
#     python -m minipar hint 04c.1
#     python -m minipar solution 04c.1    # once it has passed

# %% tags=["setup"]
from dataclasses import dataclass, replace

from minipar import Mesh, plan, predict
from minipar.cost import Layout
from minipar.course.checks import names_in, returned, verdict
from minipar.hardware import CLUSTERS, Cluster

# %% [markdown] lang="en"
# ## 04c.1 · Write: the cheapest that is good enough
#
# Several models were trained with a few seeds each and tested on the same rows. One is better by half a percent; is it
# better, or lucky? A rule that many use: a model is good enough if its accuracy **less one standard error of its mean**
# reaches the target. Of those that are good enough take the one with the lowest cost; at equal cost the one with the
# higher mean. If none is, say so: `None`.
#
# With $k$ seeds the standard error of the mean is $s/\sqrt{k}$, with the sample's standard deviation
# $s = \sqrt{\frac{1}{k-1}\sum (a_i - \bar a)^2}$. One seed tells nothing about luck: such a model is not good enough.

# %% [markdown] lang="en" hint="04c.1"
# `statistics.mean` and `statistics.stdev` (which divides by $k-1$) may be imported in your cell.

# %% [markdown] lang="en" hint="04c.1"
# `min(good, key=lambda t: (t.cost, -mean(t.accuracies)), default=None)`, with `good` the list of those that pass.


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for 04c.1: what is known of a model
@dataclass(frozen=True)
class Trial:
    """A model, its accuracy for each seed, and what a prediction costs, in milliseconds."""

    name: str
    accuracies: tuple[float, ...]
    cost: float


# %% task="04c.1" title="Write: the cheapest that is good enough"
def choose(trials: list[Trial], target: float) -> Trial | None:
    """The cheapest model whose mean accuracy less one standard error is at least the target, or None."""
    ### BEGIN SOLUTION
    good = []
    for trial in trials:
        k = len(trial.accuracies)
        if k > 1:
            mean = sum(trial.accuracies) / k
            s = (sum((a - mean) ** 2 for a in trial.accuracies) / (k - 1)) ** 0.5
            if mean - s / k**0.5 >= target:
                good.append((trial.cost, -mean, trial))
    return min(good, key=lambda one: one[:2])[2] if good else None
    ### END SOLUTION


# %% check="04c.1" seconds=20
# Check of 04c.1: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    words = Trial("counted words", (0.760, 0.764, 0.762, 0.758), 0.2)
    tiny = Trial("tiny", (0.70, 0.74, 0.66, 0.72), 1.5)
    lucky = Trial("one lucky seed", (0.95,), 1.0)
    noisy = Trial("noisy", (0.90, 0.74, 0.80), 2.0)  # mean 0.813, s 0.0808, standard error 0.0467
    frozen = Trial("frozen", (0.812, 0.806, 0.811), 9.0)
    tuned = Trial("tuned", (0.842, 0.851, 0.839), 9.0)
    steady = Trial("steady", (0.75, 0.75), 3.0)
    every = [tuned, lucky, words, noisy, tiny, frozen]
    cases = [
        (every, 0.75, words, "counted words reach it with 0.761 less 0.001, for 0.2 ms"),
        (every, 0.80, tuned, "noisy has 0.813 less 0.047, one seed is no evidence, and of two at 9 ms tuned is better"),
        (every, 0.86, None, "tuned has 0.844 less 0.004; a single seed does not count"),
        ([noisy, frozen], 0.766, noisy, "noisy has 0.813 less 0.0467, which is 0.7666"),
        ([noisy, frozen], 0.767, frozen, "noisy has 0.813 less 0.0467, which is 0.7666"),
        ([steady, frozen], 0.75, steady, "steady has 0.75 less 0, and reaching the target is enough"),
        ([lucky], 0.5, None, "one seed is no evidence"),
        ([], 0.5, None, "there are no models"),
    ]
    for trials, target, right, why in cases:
        got = choose(list(trials), target)
        name, wanted = getattr(got, "name", got), getattr(right, "name", right)
        assert got is right, f"Target {target}: you choose {name!r}, and it is {wanted!r}: {why}."
    twins = [Trial("one", (0.75, 0.75), 3.0), Trial("the other", (0.75, 0.75), 3.0)]
    assert choose(twins, 0.7) in twins, "Of two models with equal costs and means either will do, and you give none."
    print(
        "chosen for 0.75, 0.80 and 0.86:", *(getattr(right, "name", "none") for _, _, right, _ in cases[:3]), sep="  "
    )

# %% [markdown] lang="en"
# ## 04c.2 · Write: a small planner
#
# `predict(model, layout, cluster, batch, sequence)` gives a prediction with `.seconds`, `.peak_memory` and `.fits`
# (into a device's memory). For layouts that are not possible it raises `ValueError`: a batch that does not divide, say.
# Find the fastest of some layouts that fits, and keeps a reserve: at most `share` of a device's memory,
# `cluster.device.memory` bytes.
#
# **Target:** the right one of up to 60 layouts; each is predicted once.

# %% [markdown] lang="en" hint="04c.2"
# A loop over the candidates with `try: ... except ValueError: continue` inside.

# %% [markdown] lang="en" hint="04c.2"
# Keep those with `p.peak_memory <= share * cluster.device.memory`. Then `min(..., key=lambda p: p.seconds)`; a
# prediction knows its `.layout`.


# %% task="04c.2" title="Write: a small planner"
def fastest(
    model: str, candidates: list[Layout], cluster: Cluster, batch: int, sequence: int, share: float
) -> Layout | None:
    """The fastest of the candidates that is possible and fits. None if there is none."""
    ### BEGIN SOLUTION
    found = []
    for layout in candidates:
        try:
            prediction = predict(model, layout, cluster, batch, sequence)
        except ValueError:
            continue
        if prediction.peak_memory <= share * cluster.device.memory:
            found.append(prediction)
    return min(found, key=lambda p: p.seconds).layout if found else None
    ### END SOLUTION


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for 04c.2: some layouts of 64 devices
def some_layouts() -> list[Layout]:
    shapes = [(64, 1, 1), (16, 1, 4), (8, 1, 8), (8, 4, 2), (4, 4, 4), (2, 8, 4), (4, 2, 8), (1, 8, 8), (3, 1, 1)]
    return [
        Layout(Mesh(dp=dp, pp=pp, tp=tp), m, zero=zero, sequence_parallel=True, recompute=recompute)
        for dp, pp, tp in shapes
        for m in (4, 32, 24)
        for zero, recompute in ((1, "none"), (1, "full"))
    ]


# %% check="04c.2" seconds=30
# Check of 04c.2: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    assert not names_in(fastest) & {"plan", "Plan"}, (
        "fastest uses the package's planner: here write your own, by predict."
    )
    cluster = CLUSTERS["h100"].of(64)
    for model, batch, sequence, share in [
        ("llama-8b", 256, 4096, 1.0),
        ("llama-70b", 128, 4096, 0.6),
        ("llama-70b", 128, 4096, 0.1),
    ]:
        priced = {}
        for layout in some_layouts():
            try:
                priced[layout] = predict(model, layout, cluster, batch, sequence)
            except ValueError:
                continue
        fitting = {layout: p for layout, p in priced.items() if p.peak_memory <= share * cluster.device.memory}
        right = min(fitting, key=lambda layout: fitting[layout].seconds) if fitting else None
        got = fastest(model, some_layouts(), cluster, batch, sequence, share)
        case = f"{model}, at most {share:.0%} of {cluster.device.memory / 1e9:.0f} GB"
        assert right is not None or got is None, f"{case}: none of the layouts fits, and you give {got.mesh}."
        assert right is None or got is not None, f"{case}: {len(fitting)} layouts fit, and you give none."
        if right is not None:
            assert got in priced, f"{case}: {got} is not one of the candidates, or not possible."
            need, seconds, best = priced[got].peak_memory, priced[got].seconds, fitting[right].seconds
            assert got in fitting, f"{case}: what you give needs {need / 1e9:.0f} GB on its fullest device."
            told = f"{case}: yours takes {seconds:.2f} s a step, and the fastest {best:.2f} s."
            assert seconds <= best * (1 + 1e-9), f"{told} Is the smallest number of seconds taken?"
    full = predict("llama-8b", Layout(Mesh(dp=64), 4), cluster, 256, 4096).peak_memory
    edge = replace(cluster, device=replace(cluster.device, memory=full))
    assert fastest("llama-8b", [Layout(Mesh(dp=64), 4)], edge, 256, 4096, 1.0), "What fills a device to the byte fits."
    print("found among", len(some_layouts()), "layouts, for 8B and 70B")

# %% [markdown] lang="en"
# ## 04c.3 · Choose: 70 billion parameters on 64 GPUs
#
# Your own choice now. Llama 70B, 64 H100 in nodes of 8, a batch of 256 rows with 4,096 tokens. `predict("llama-70b",
# Layout(...), CLUSTERS["h100"].of(64), 256, 4096)` tells what a layout takes; print the prediction to see where time
# and memory go.
#
# | | seconds a step |
# |---|---|
# | it fits | any |
# | **target** | at most 12.5 |
# | best that the planner knows | 10.6 |
#
# Think before you try: what needs 16 bytes a parameter has to be shared out. What has to stay inside a node? What would
# leave no bubble at all?

# %% [markdown] lang="en" hint="04c.3"
# 70 billion × 16 bytes is 1.13 TB, and 64 × 80 GB is 5.1 TB. So states fit if all 64 share them: by tp and pp, by ZeRO,
# or both. Activations are the other half: `recompute`, `sequence_parallel`, fewer rows in a microbatch.

# %% [markdown] lang="en" hint="04c.3"
# Without a pipeline there is no bubble. Then `zero=3` shares the weights out over dp; a small tp, inside a node, cuts
# the activations. Try `Mesh(dp=16, tp=4)` and `Mesh(dp=32, tp=2)`. Each microbatch gathers all weights anew, so take
# few, as large as memory allows.


# %% task="04c.3" title="Choose: 70 billion parameters on 64 GPUs"
def my_layout() -> Layout:
    """For llama-70b on 64 H100, 256 rows of 4,096 tokens a step."""
    ### BEGIN SOLUTION
    return Layout(Mesh(dp=16, tp=4), microbatches=8, zero=3, sequence_parallel=True)
    ### END SOLUTION


# %% check="04c.3" seconds=30
# Check of 04c.3: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    cluster = CLUSTERS["h100"].of(64)
    assert not names_in(my_layout) & {"plan", "Plan"}, "my_layout asks the planner: it is you who chooses here."
    layout = returned(my_layout(), "my_layout")
    assert isinstance(layout, Layout), f"my_layout gives {layout!r}: a Layout, such as Layout(Mesh(dp=8, tp=8), 4)."
    yours, best = predict("llama-70b", layout, cluster, 256, 4096), plan("llama-70b", cluster, 256, 4096).best
    largest = max(yours.memory, key=yours.memory.get)
    need = f"{yours.peak_memory / 1e9:.0f} of {cluster.device.memory / 1e9:.0f} GB on its fullest device"
    assert yours.fits, f"It does not fit: {need}, {yours.memory[largest] / 1e9:.0f} GB of it {largest}."
    extra = {part: seconds for part, seconds in yours.parts.items() if part != "matrix products"}
    most = max(extra, key=extra.get)
    told = f"It fits ({need}) and takes {yours.seconds:.1f} s a step"
    assert yours.seconds <= 12.5, f"{told}; the target is 12.5 s. The largest other part: {most}, {extra[most]:.1f} s."
    assert abs(best.seconds - 10.56) < 0.05, "the planner's best is no longer what the text says"
    print("70B on 64 H100: it fits, in at most 12.5 s a step")

# %% [markdown] lang="en"
# ## The second capstone
#
# You have a layout and its numbers. Write the page that defends it: for this task, or for a model and a cluster of your
# own with 1,024 GPUs. Say what each part of memory takes, what each axis sends and on which link, what the largest part
# of the time is, which neighbor is the closest and under which assumption it would win, and what the planner leaves
# out. The rubric is on the page [for teachers](../docs/teaching.md#two-capstones); chapter 4c has an example of each
# piece. `python -m minipar plan --model llama-70b --gpus 1024` has the numbers.
