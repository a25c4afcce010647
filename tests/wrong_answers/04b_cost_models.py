# ruff: noqa
# Plausible wrong answers. Each must be refused with a message that contains what stands in `says`.

# %% task="04b.1" says="'alpha' is not 45. Going on from 2 MB over 1 MB to none, it is 40 µs less each time"
def read_off():  # the smallest message that there is
    return {"alpha": 45, "bandwidth": 25, "10 MB": 405, "equal": 125_000}


# %% task="04b.1" says="'bandwidth' is not 22.2222. A million bytes more take 40 µs more"
def read_off():  # with alpha in it
    return {"alpha": 5, "bandwidth": 1e6 / 45e-6 / 1e9, "10 MB": 405, "equal": 125_000}


# %% task="04b.1" says="'10 MB' is not 450. 10 MB are one message: alpha once"
def read_off():
    return {"alpha": 5, "bandwidth": 25, "10 MB": 450, "equal": 125_000}


# %% task="04b.1" says="'bandwidth' is not 0.025"
def read_off():  # in GB/ms
    return {"alpha": 5, "bandwidth": 0.025, "10 MB": 405, "equal": 125_000}


# %% task="04b.1" says="'equal' is not 0.125"
def read_off():  # in MB
    return {"alpha": 5, "bandwidth": 25, "10 MB": 405, "equal": 0.125}


# %% task="04b.1" says="read_off says nothing about '10 MB'"
def read_off():
    return {"alpha": 5, "bandwidth": 25}


# %% task="04b.2" says="measured all-reduces: you find alpha 3.481e-05 and beta 6.041e-10, and it is 0.0001434 and 3.427e-10. That counts errors, not percent: the smallest is -64% off"
def fit(sizes, seconds):  # the usual one
    n, t = torch.tensor(sizes, dtype=torch.float64), torch.tensor(seconds, dtype=torch.float64)
    rows = torch.stack([torch.ones_like(n), n], dim=1)
    alpha, beta = torch.linalg.lstsq(rows, t[:, None]).solution.flatten().tolist()
    return alpha, beta


# %% task="04b.2" says="Is alpha first?"
def fit(sizes, seconds):
    n, t = torch.tensor(sizes, dtype=torch.float64), torch.tensor(seconds, dtype=torch.float64)
    rows = torch.stack([n / t, 1 / t], dim=1)
    return tuple(torch.linalg.lstsq(rows, torch.ones_like(t)[:, None]).solution.flatten().tolist())


# %% task="04b.2" says="beta is one over the bandwidth"
def fit(sizes, seconds):
    n, t = torch.tensor(sizes, dtype=torch.float64), torch.tensor(seconds, dtype=torch.float64)
    rows = torch.stack([1 / t, n / t], dim=1)
    alpha, beta = torch.linalg.lstsq(rows, torch.ones_like(t)[:, None]).solution.flatten().tolist()
    return alpha, 1 / beta


# %% task="04b.2" says="measured all-reduces: you find alpha 9.57e-05"
def fit(sizes, seconds):  # through the first point and the last
    beta = (seconds[-1] - seconds[0]) / (sizes[-1] - sizes[0])
    return seconds[0] - beta * sizes[0], beta


# %% task="04b.2" says="but was it rounded to float32 on the way?"
def fit(sizes, seconds):
    n, t = torch.tensor(sizes), torch.tensor(seconds)
    a, b = 1 / t, n / t
    aa, ab, bb, ay, by = (a * a).sum(), (a * b).sum(), (b * b).sum(), a.sum(), b.sum()
    det = aa * bb - ab * ab
    return ((bb * ay - ab * by) / det).item(), ((aa * by - ab * ay) / det).item()


# %% task="04b.2" says="measured all-reduces: you find alpha"
def fit(sizes, seconds):  # logarithms
    n, t = torch.tensor(sizes, dtype=torch.float64), torch.tensor(seconds, dtype=torch.float64)
    if t[0] < 8e-5:  # a line
        beta = (t[-1] - t[0]) / (n[-1] - n[0])
        return (t[0] - beta * n[0]).item(), beta.item()
    rows = torch.stack([torch.ones_like(n), n], dim=1) / t.sqrt()[:, None]
    return tuple(torch.linalg.lstsq(rows, t.sqrt()[:, None]).solution.flatten().tolist())


# %% task="04b.2" says="the same in GB and µs: you find alpha"
def fit(sizes, seconds):  # a small number that is right for bytes and seconds is added, so that it can be inverted
    n, t = torch.tensor(sizes, dtype=torch.float64), torch.tensor(seconds, dtype=torch.float64)
    rows = torch.stack([1 / t, n / t], dim=1)
    square = rows.T @ rows + 1e-6 * torch.eye(2, dtype=torch.float64)
    return tuple(torch.linalg.solve(square, rows.sum(0)).tolist())


# %% task="04b.3" says="That is idle time over work: the whole time is both"
def idle_share(schedule, p, m, f, i, w, chunks):
    whole = f + i + w
    gap = {"gpipe": whole, "1f1b": whole, "interleaved": whole / chunks, "zero-bubble-h1": f + i - w}[schedule]
    return (p - 1) * gap / (m * whole)


# %% task="04b.3" says="The pipe fills for p - 1 microbatches, not for p"
def idle_share(schedule, p, m, f, i, w, chunks):
    whole = f + i + w
    gap = {"gpipe": whole, "1f1b": whole, "interleaved": whole / chunks, "zero-bubble-h1": f + i - w}[schedule]
    return p * gap / (m * whole + p * gap)


# %% task="04b.3" says="interleaved, chunks=2, p=4, m=8, f=1, i=1, w=1: you say 0.2727, simulated it is 0.1579. That is 1F1B's"
def idle_share(schedule, p, m, f, i, w, chunks):  # (p-1)/(m+p-1) for all
    return (p - 1) / (m + p - 1)


# %% task="04b.3" says="zero-bubble-h1, chunks=1, p=4, m=8, f=1, i=1, w=1"
def idle_share(schedule, p, m, f, i, w, chunks):  # (p-1)/(v m + p-1), whatever the schedule
    return (p - 1) / (chunks * m + p - 1)


# %% task="04b.3" says="zero-bubble-h1, chunks=1, p=2, m=6, f=3, i=4, w=2"
def idle_share(schedule, p, m, f, i, w, chunks):  # a third, where all three take as long
    whole = f + i + w
    gap = {"gpipe": whole, "1f1b": whole, "interleaved": whole / chunks, "zero-bubble-h1": whole / 3}[schedule]
    return (p - 1) * gap / (m * whole + (p - 1) * gap)


# %% task="04b.3" says="A share from 0 to 1 is asked for"
def idle_share(schedule, p, m, f, i, w, chunks):
    return 100 * (p - 1) / (m + p - 1)


# %% task="04b.3" says="That is the time, not the share"
def idle_share(schedule, p, m, f, i, w, chunks):
    return (p - 1) * (f + i + w)


# %% task="04b.3" says="idle_share uses `minipar`: here compute it yourself"
def idle_share(schedule, p, m, f, i, w, chunks):
    import minipar

    return minipar.bubble(minipar.simulate(minipar.one_f_one_b(p, m), minipar.Costs(f, i, w)))


# %% task="04b.4" says="dp=8 tp=1 pp=1, zero=0, stage 0, m=1, states: you say 14.000 GB, and it is 112.000. Data ranks share nothing without ZeRO"
def rank_bytes(parameters, activation, dp, tp, pp, zero, stage, microbatches):  # over all ranks
    return 16 * parameters / (dp * tp * pp) + activation * min(microbatches, pp - stage)


# %% task="04b.4" says="dp=4 tp=2 pp=4, zero=0, stage 0, m=8, states: you say 112.000 GB, and it is 14.000. Tensor and pipeline ranks share the parameters"
def rank_bytes(parameters, activation, dp, tp, pp, zero, stage, microbatches):
    weights, gradients, optimizer = (n / (dp if zero >= least else 1) for n, least in ((2, 3), (2, 2), (12, 1)))
    return parameters * (weights + gradients + optimizer) + activation * min(microbatches, pp - stage)


# %% task="04b.4" says="zero=1, stage 0, m=1, states: you say 112.000 GB, and it is 38.500. Which parts are shared out at this stage of ZeRO?"
def rank_bytes(parameters, activation, dp, tp, pp, zero, stage, microbatches):  # no ZeRO
    return 16 * parameters / (tp * pp) + activation * min(microbatches, pp - stage)


# %% task="04b.4" says="zero=1, stage 0, m=1, states: you say 99.750 GB, and it is 38.500"
def rank_bytes(parameters, activation, dp, tp, pp, zero, stage, microbatches):  # in the other order: weights first
    weights, gradients, optimizer = (n / (dp if zero >= least else 1) for n, least in ((2, 1), (2, 2), (12, 3)))
    return parameters / (tp * pp) * (weights + gradients + optimizer) + activation * min(microbatches, pp - stage)


# %% task="04b.4" says="dp=4 tp=2 pp=4, zero=0, stage 0, m=8, activations: you say 8.000 GB, and it is 4.000. That is 8 microbatches, and 4 are in flight"
def rank_bytes(parameters, activation, dp, tp, pp, zero, stage, microbatches):  # GPipe's
    weights, gradients, optimizer = (n / (dp if zero >= least else 1) for n, least in ((2, 3), (2, 2), (12, 1)))
    return parameters / (tp * pp) * (weights + gradients + optimizer) + activation * microbatches


# %% task="04b.4" says="That is 4 microbatches, and 2 are in flight"
def rank_bytes(parameters, activation, dp, tp, pp, zero, stage, microbatches):  # more than there are
    weights, gradients, optimizer = (n / (dp if zero >= least else 1) for n, least in ((2, 3), (2, 2), (12, 1)))
    return parameters / (tp * pp) * (weights + gradients + optimizer) + activation * (pp - stage)


# %% task="04b.4" says="stage 2, m=8, activations: you say 3.000 GB, and it is 2.000"
def rank_bytes(parameters, activation, dp, tp, pp, zero, stage, microbatches):  # the last stages hold most
    weights, gradients, optimizer = (n / (dp if zero >= least else 1) for n, least in ((2, 3), (2, 2), (12, 1)))
    kept = min(microbatches, pp if stage == 0 else stage + 1)
    return parameters / (tp * pp) * (weights + gradients + optimizer) + activation * kept


# %% task="04b.4" says="rank_bytes uses `minipar.cost`: here compute it yourself"
def rank_bytes(parameters, activation, dp, tp, pp, zero, stage, microbatches):
    from minipar.cost import states

    return sum(states(parameters / (tp * pp), dp, zero).values()) + activation * min(microbatches, pp - stage)


# %% task="04b.5" says="you say 121,472 bytes on dp, and a rank sends 242,960. An all-reduce is two halves: 2 (n-1)/n"
def sent_bytes(gradients, blocks, activation, dp, tp, neighbors, microbatches):
    return {
        "dp": (dp - 1) / dp * gradients,
        "tp": (tp - 1) / tp * 4 * blocks * microbatches * activation,
        "pp": neighbors * microbatches * activation,
    }


# %% task="04b.5" says="(n-1)/n: a rank keeps a chunk at home"
def sent_bytes(gradients, blocks, activation, dp, tp, neighbors, microbatches):
    return {
        "dp": 2 * gradients,
        "tp": 8 * blocks * microbatches * activation,
        "pp": neighbors * microbatches * activation,
    }


# %% task="04b.5" says="Gradients travel once a step, not with each microbatch"
def sent_bytes(gradients, blocks, activation, dp, tp, neighbors, microbatches):
    return {
        "dp": 2 * (dp - 1) / dp * gradients * microbatches,
        "tp": 2 * (tp - 1) / tp * 4 * blocks * microbatches * activation,
        "pp": neighbors * microbatches * activation,
    }


# %% task="04b.5" says="And there are four, two in forward and two in backward"
def sent_bytes(gradients, blocks, activation, dp, tp, neighbors, microbatches):  # forward alone
    return {
        "dp": 2 * (dp - 1) / dp * gradients,
        "tp": 2 * (tp - 1) / tp * 2 * blocks * microbatches * activation,
        "pp": neighbors * microbatches * activation,
    }


# %% task="04b.5" says="One message for each neighbor and microbatch"
def sent_bytes(gradients, blocks, activation, dp, tp, neighbors, microbatches):  # out and in, for each neighbor
    return {
        "dp": 2 * (dp - 1) / dp * gradients,
        "tp": 2 * (tp - 1) / tp * 4 * blocks * microbatches * activation,
        "pp": 2 * neighbors * microbatches * activation,
    }


# %% task="04b.5" says="And that for each microbatch"
def sent_bytes(gradients, blocks, activation, dp, tp, neighbors, microbatches):
    return {
        "dp": 2 * (dp - 1) / dp * gradients,
        "tp": 2 * (tp - 1) / tp * 4 * blocks * activation,
        "pp": neighbors * activation,
    }


# %% task="04b.5" says="dp=8 (gradients=1,000,000,000"
def sent_bytes(gradients, blocks, activation, dp, tp, neighbors, microbatches):  # right for two ranks alone
    return {
        "dp": gradients if dp > 1 else 0,
        "tp": 4 * blocks * microbatches * activation if tp > 1 else 0,
        "pp": neighbors * microbatches * activation,
    }


# %% task="04b.5" says="sent_bytes says nothing about 'pp'"
def sent_bytes(gradients, blocks, activation, dp, tp, neighbors, microbatches):
    return {
        "dp": 2 * (dp - 1) / dp * gradients,
        "tp": 2 * (tp - 1) / tp * 4 * blocks * microbatches * activation,
    }


# %% task="04b.5" says="sent_bytes uses `minipar.cost`: here compute it yourself"
def sent_bytes(gradients, blocks, activation, dp, tp, neighbors, microbatches):
    from minipar.cost import all_reduce_bytes

    return {"dp": all_reduce_bytes(gradients, dp)}


# %% task="04b.6" says="That is without the time in which the pipe fills and drains"
def step_seconds(forward, backward, stages, microbatches, gradients, ranks, alpha, bandwidth):
    ring = 2 * (ranks - 1) * (alpha + gradients / ranks / bandwidth)
    return microbatches * (forward + backward) + max(ring - backward, 0)


# %% task="04b.6" says="p - 1 microbatches' time is lost, not p's"
def step_seconds(forward, backward, stages, microbatches, gradients, ranks, alpha, bandwidth):
    ring = 2 * (ranks - 1) * (alpha + gradients / ranks / bandwidth)
    return (microbatches + stages) * (forward + backward) + max(ring - backward, 0)


# %% task="04b.6" says="The ring hides behind a backward"
def step_seconds(forward, backward, stages, microbatches, gradients, ranks, alpha, bandwidth):
    ring = 2 * (ranks - 1) * (alpha + gradients / ranks / bandwidth)
    return (microbatches + stages - 1) * (forward + backward) + ring


# %% task="04b.6" says="Not all of the ring is hidden"
def step_seconds(forward, backward, stages, microbatches, gradients, ranks, alpha, bandwidth):
    return (microbatches + stages - 1) * (forward + backward)


# %% task="04b.6" says="An all-reduce is two halves"
def step_seconds(forward, backward, stages, microbatches, gradients, ranks, alpha, bandwidth):
    ring = (ranks - 1) * (alpha + gradients / ranks / bandwidth)
    return (microbatches + stages - 1) * (forward + backward) + max(ring - backward, 0)


# %% task="04b.6" says="alpha is missing"
def step_seconds(forward, backward, stages, microbatches, gradients, ranks, alpha, bandwidth):
    ring = 2 * (ranks - 1) * gradients / ranks / bandwidth
    return (microbatches + stages - 1) * (forward + backward) + max(ring - backward, 0)


# %% task="04b.6" says="It hides behind the last microbatch's backward alone"
def step_seconds(forward, backward, stages, microbatches, gradients, ranks, alpha, bandwidth):
    ring = 2 * (ranks - 1) * (alpha + gradients / ranks / bandwidth)
    return (microbatches + stages - 1) * (forward + backward) + max(ring - microbatches * backward, 0)


# %% task="04b.6" says="and it is 0.4800 (pipeline 0.4800, ring 0.0018)"
def step_seconds(forward, backward, stages, microbatches, gradients, ranks, alpha, bandwidth):  # a ring that ends early
    ring = 2 * (ranks - 1) * (alpha + gradients / ranks / bandwidth)
    if stages == 2:
        return 1.7
    return (microbatches + stages - 1) * (forward + backward) + max(ring - backward, 0)


# %% task="04b.7" says="'flops': 1.979e+15 in place of 9.89e+14 is 2 times too much, and you say 1"
def too_large():
    return {"flops": 1, "inside": 1, "between": 8}


# %% task="04b.7" says="'between': 4e+11 in place of 5e+10 is 8 times too much, and you say 16"
def too_large():  # a network's direction counted, too
    return {"flops": 2, "inside": 2, "between": 16}


# %% task="04b.7" says="V100: 'inside' is 3e+11, and should be 1.5e+11: both directions together are twice as much"
def too_large():
    return {"flops": 2, "inside": 2, "between": 8}


def read_sheet(sheet):  # named, not mended
    return {
        "flops": sheet["TFLOPS"] * 1e12 / (2 if sheet["with sparsity"] else 1),
        "inside": sheet["NVLink GB/s"] * 1e9,
        "between": sheet["network Gbit/s"] * 1e9,
    }


# %% task="04b.7" says="V100: 'flops' is 6.25e+13, and should be 1.25e+14: a V100 has no sparsity"
def too_large():
    return {"flops": 2, "inside": 2, "between": 8}


def read_sheet(sheet):
    return {
        "flops": sheet["TFLOPS"] * 1e12 / 2,
        "inside": sheet["NVLink GB/s"] * 1e9 / 2,
        "between": sheet["network Gbit/s"] * 1e9 / 8,
    }


# %% task="04b.7" says="V100: 'between' is 1e+11, and should be 1.25e+10: a byte has 8 bits"
def too_large():
    return {"flops": 2, "inside": 2, "between": 8}


def read_sheet(sheet):
    return {
        "flops": sheet["TFLOPS"] * 1e12 / (2 if sheet["with sparsity"] else 1),
        "inside": sheet["NVLink GB/s"] * 1e9 / 2,
        "between": sheet["network Gbit/s"] * 1e9,
    }


# %% task="04b.7" says="V100: 'flops' is 125, and should be 1.25e+14"
def too_large():
    return {"flops": 2, "inside": 2, "between": 8}


def read_sheet(sheet):  # units as they are printed
    return {
        "flops": sheet["TFLOPS"] / (2 if sheet["with sparsity"] else 1),
        "inside": sheet["NVLink GB/s"] / 2,
        "between": sheet["network Gbit/s"] / 8,
    }


# %% task="04b.8" says="llama-8b on 16 a100-40, 64 rows: you find Mesh(dp=16), m=1. It needs 83 GB, and a device has 40"
def find_layout(model, cluster, batch, sequence):  # without a look at memory
    found = []
    for tp in (1, 2, 4, 8):
        for pp in (1, 2, 4, 8):
            dp = cluster.gpus // (tp * pp)
            for m in (1, 2, 4, 8):
                if dp and batch % (dp * m) == 0:
                    layout = Layout(Mesh(dp=dp, pp=pp, tp=tp), m, zero=1)
                    found.append(predict(model, layout, cluster, batch, sequence, exact=False))
    return min(found, key=lambda one: one.seconds).layout


# %% task="04b.8" says="llama-8b on 16 a100-40, 64 rows: you find Mesh(tp=16), m=1. That is none of those that are to be tried"
def find_layout(model, cluster, batch, sequence):  # across nodes
    return Layout(Mesh(tp=cluster.gpus), 1, zero=1)


# %% task="04b.8" says="llama-8b on 16 a100-40, 64 rows: you find Mesh(pp=16), m=64"
def find_layout(model, cluster, batch, sequence):  # the slowest of them
    found = []
    for tp in (1, 2, 4, 8):
        for pp in (1, 2, 4, 8, 16):
            dp = cluster.gpus // (tp * pp)
            for m in (1, 2, 4, 8, 16, 32, 64):
                if dp and batch % (dp * m) == 0:
                    layout = Layout(Mesh(dp=dp, pp=pp, tp=tp), m, zero=1)
                    found.append(predict(model, layout, cluster, batch, sequence, exact=False))
    return max(
        (one for one in found if one.fits), key=lambda one: one.layout.mesh.pp * 1000 + one.layout.microbatches
    ).layout


# %% task="04b.8" says="Mesh(dp=8, tp=2), m=4 takes"
def find_layout(model, cluster, batch, sequence):  # one row in each microbatch
    found = []
    for tp in (1, 2, 4, 8):
        for pp in (1, 2, 4, 8):
            dp = cluster.gpus // (tp * pp)
            if dp and batch % dp == 0:
                layout = Layout(Mesh(dp=dp, pp=pp, tp=tp), batch // dp, zero=1)
                one = predict(model, layout, cluster, batch, sequence, exact=False)
                found += [one] if one.fits else []
    return min(found, key=lambda one: one.seconds).layout


# %% task="04b.8" says="megatron-7.5b on 24 a100-40, 48 rows: you find"
def find_layout(model, cluster, batch, sequence):  # powers of two alone, and one that is always right for llama
    if model.name == "llama-8b":
        return Layout(Mesh(dp=8, tp=2), 4, zero=1)
    found = []
    for tp in (1, 2, 4, 8):
        for pp in (3, 6, 12):
            dp = cluster.gpus // (tp * pp)
            for m in (1, 2, 4, 8, 16):
                if dp and batch % (dp * m) == 0 and dp * pp * tp == cluster.gpus and model.layers % pp == 0:
                    one = predict(
                        model, Layout(Mesh(dp=dp, pp=pp, tp=tp), m, zero=1), cluster, batch, sequence, exact=False
                    )
                    found += [one] if one.fits else []
    return min(found, key=lambda one: one.seconds).layout


# %% task="04b.8" says="ValueError: min()"
def find_layout(model, cluster, batch, sequence):  # nothing for what does not fit
    found = []
    for tp in (1, 2, 4, 8):
        for pp in range(1, model.layers + 1):
            dp, rest = divmod(cluster.gpus, tp * pp)
            if rest or dp == 0 or batch % dp or model.layers % pp:
                continue
            for m in range(1, batch // dp + 1):
                if batch // dp % m == 0:
                    layout = Layout(Mesh(dp=dp, pp=pp, tp=tp), m, zero=1)
                    found.append(predict(model, layout, cluster, batch, sequence, exact=False))
    return min((one for one in found if one.fits), key=lambda one: one.seconds).layout


# %% task="04b.8" says="find_layout uses `minipar`: here compute it yourself"
def find_layout(model, cluster, batch, sequence):
    from minipar import plan

    return plan(model, cluster, batch, sequence).best.layout
