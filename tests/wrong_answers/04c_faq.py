# ruff: noqa
# Plausible wrong answers. Each must be refused with a message that contains what stands in `says`.

# %% task="04c.1" says="Target 0.8: you choose 'one lucky seed', and it is 'tuned'"
def choose(trials, target):  # by the mean alone
    good = [t for t in trials if sum(t.accuracies) / len(t.accuracies) >= target]
    return min(good, key=lambda t: t.cost, default=None)


# %% task="04c.1" says="you choose 'tuned', and it is 'counted words'"
def choose(trials, target):  # the best, not the cheapest
    from statistics import mean, stdev

    good = [
        t
        for t in trials
        if len(t.accuracies) > 1 and mean(t.accuracies) - stdev(t.accuracies) / len(t.accuracies) ** 0.5 >= target
    ]
    return max(good, key=lambda t: mean(t.accuracies), default=None)


# %% task="04c.1" says="Target 0.766: you choose 'frozen', and it is 'noisy'"
def choose(trials, target):  # the standard deviation, not the standard error
    from statistics import mean, stdev

    good = [t for t in trials if len(t.accuracies) > 1 and mean(t.accuracies) - stdev(t.accuracies) >= target]
    return min(good, key=lambda t: (t.cost, -mean(t.accuracies)), default=None)


# %% task="04c.1" says="Target 0.767: you choose 'noisy', and it is 'frozen'"
def choose(trials, target):  # divided by k
    from statistics import mean, pstdev

    good = [
        t
        for t in trials
        if len(t.accuracies) > 1 and mean(t.accuracies) - pstdev(t.accuracies) / len(t.accuracies) ** 0.5 >= target
    ]
    return min(good, key=lambda t: (t.cost, -mean(t.accuracies)), default=None)


# %% task="04c.1" says="you choose 'frozen', and it is 'tuned'"
def choose(trials, target):  # the worse one at equal cost
    from statistics import mean, stdev

    good = [
        t
        for t in trials
        if len(t.accuracies) > 1 and mean(t.accuracies) - stdev(t.accuracies) / len(t.accuracies) ** 0.5 >= target
    ]
    return min(good, key=lambda t: (t.cost, mean(t.accuracies)), default=None)


# %% task="04c.2" says="ValueError"
def fastest(model, candidates, cluster, batch, sequence, share):  # as if all were possible
    found = [predict(model, layout, cluster, batch, sequence) for layout in candidates]
    found = [p for p in found if p.peak_memory <= share * cluster.device.memory]
    return min(found, key=lambda p: p.seconds).layout if found else None


# %% task="04c.2" says="on its fullest device"
def fastest(model, candidates, cluster, batch, sequence, share):  # the reserve forgotten
    found = []
    for layout in candidates:
        try:
            found.append(predict(model, layout, cluster, batch, sequence))
        except ValueError:
            pass
    found = [p for p in found if p.fits]
    return min(found, key=lambda p: p.seconds).layout if found else None


# %% task="04c.2" says="s a step, and the fastest"
def fastest(model, candidates, cluster, batch, sequence, share):  # the first that fits
    for layout in candidates:
        try:
            p = predict(model, layout, cluster, batch, sequence)
        except ValueError:
            continue
        if p.peak_memory <= share * cluster.device.memory:
            return layout


# %% task="04c.2" says="s a step, and the fastest"
def fastest(model, candidates, cluster, batch, sequence, share):  # the least memory
    found = []
    for layout in candidates:
        try:
            p = predict(model, layout, cluster, batch, sequence)
        except ValueError:
            continue
        if p.peak_memory <= share * cluster.device.memory:
            found.append(p)
    return min(found, key=lambda p: p.peak_memory).layout if found else None


# %% task="04c.2" says="fastest uses the package's planner"
def fastest(model, candidates, cluster, batch, sequence, share):
    return plan(model, cluster, batch, sequence).best.layout


# %% task="04c.3" says="It does not fit: 143 of 80 GB"
def my_layout():  # the pipeline alone
    return Layout(Mesh(dp=8, pp=8), microbatches=32, zero=1)


# %% task="04c.3" says="the target is 12.5 s. The largest other part: data axis"
def my_layout():  # weights gathered for each of many microbatches
    return Layout(Mesh(dp=16, tp=4), microbatches=16, zero=3, sequence_parallel=True)


# %% task="04c.3" says="ValueError"
def my_layout():  # 16 ranks too few
    return Layout(Mesh(dp=8, pp=3, tp=2), microbatches=32, zero=1)


# %% task="04c.3" says="my_layout asks the planner"
def my_layout():
    return plan("llama-70b", CLUSTERS["h100"].of(64), 256, 4096).best.layout


# %% task="04c.3" says="a Layout, such as"
def my_layout():
    return Mesh(dp=16, tp=4)
