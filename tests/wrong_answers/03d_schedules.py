# ruff: noqa
# Plausible wrong answers. Each must be refused with a message that contains what stands in `says`.

# %% task="03d.1" says="Rank 0: F0/s2 is in tick 4, and in tick 2 you have F2/s0. There F0/s2 could be: what has come back goes first, then a new one."
def forwards():  # all through the first chunk
    return "F0/s0 F1/s0 F2/s0 F3/s0 F0/s2 F1/s2 F2/s2 F3/s2", ". F0/s1 F1/s1 F2/s1 F3/s1 F0/s3 F1/s3 F2/s3 F3/s3"


# %% task="03d.1" says="Rank 0, tick 1: stage 1 of F0/s1 is on rank 1."
def forwards():  # neighbors on one rank
    return "F0/s0 F0/s1 F1/s0 F1/s1", ". . F0/s2 F0/s3 F1/s2 F1/s3"


# %% task="03d.1" says="Rank 1: F0/s1 is in tick 0, and waits for F0/s0, which is in tick 0."
def forwards():  # both at once
    return "F0/s0 F1/s0 F0/s2 F1/s2 F2/s0 F3/s0 F2/s2 F3/s2", "F0/s1 F1/s1 F0/s3 F1/s3 F2/s1 F3/s1 F2/s3 F3/s3"


# %% task="03d.1" says="Rank 1: F0/s3 is in tick 4, and tick 3 is empty. There F0/s3 could be"
def forwards():
    return "F0/s0 F1/s0 F0/s2 F1/s2 F2/s0 F3/s0 F2/s2 F3/s2", ". F0/s1 F1/s1 . F0/s3 F1/s3 F2/s1 F3/s1 F2/s3 F3/s3"


# %% task="03d.1" says="Rank 0: F2/s0 is missing."
def forwards():
    return "F0/s0 F1/s0 F0/s2 F1/s2", ". F0/s1 F1/s1 F0/s3 F1/s3"


# %% task="03d.1" says="Rank 0, tick 2: 'F0' is neither a point nor like F0/s2."
def forwards():
    return "F0/s0 F1/s0 F0 F1", ". F0/s1 F1/s1"


# %% task="03d.2" says="rank 0 keeps 6, and 5 are enough. How many F before the first B?"
def interleaved_order(ranks, microbatches, chunks):  # all microbatches through the first chunk
    order = []
    for rank in range(ranks):
        downs = [Action(Op.F, rank + c * ranks, m) for c in range(chunks) for m in range(microbatches)]
        ups = [Action(Op.B, rank + c * ranks, m) for c in reversed(range(chunks)) for m in range(microbatches)]
        warmup = min((ranks - 1 - rank) + (chunks - 1) * microbatches, len(downs))
        program = downs[:warmup]
        for f, b in zip(downs[warmup:], ups):
            program += [f, b]
        order.append(program + ups[len(downs) - warmup :])
    return order


# %% task="03d.2" says="2 ranks, 4 microbatches, 2 chunks: a bubble of"
def interleaved_order(ranks, microbatches, chunks):  # nothing to do for the way to the last rank
    order = []
    for rank in range(ranks):
        downs, ups = [], []
        for start in range(0, microbatches, ranks):
            for c in range(chunks):
                for m in range(start, start + ranks):
                    downs.append(Action(Op.F, rank + c * ranks, m))
                    ups.append(Action(Op.B, rank + (chunks - 1 - c) * ranks, m))
        warmup = min((chunks - 1) * ranks, len(downs))
        program = downs[:warmup]
        for f, b in zip(downs[warmup:], ups):
            program += [f, b]
        order.append(program + ups[len(downs) - warmup :])
    return order


# %% task="03d.2" says="2 ranks, 4 microbatches, 2 chunks: rank 0 has B0 before F0, which it needs."
def interleaved_order(ranks, microbatches, chunks):  # the warm-up of 1F1B
    order = []
    for rank in range(ranks):
        downs, ups = [], []
        for start in range(0, microbatches, ranks):
            for c in range(chunks):
                for m in range(start, start + ranks):
                    downs.append(Action(Op.F, rank + c * ranks, m))
                    ups.append(Action(Op.B, rank + (chunks - 1 - c) * ranks, m))
        warmup = min(ranks - 1 - rank, len(downs))
        program = downs[:warmup]
        for f, b in zip(downs[warmup:], ups):
            program += [f, b]
        order.append(program + ups[len(downs) - warmup :])
    return order


# %% task="03d.2" says="rank 0 keeps 8, and 5 are enough. How many F before the first B?"
def interleaved_order(ranks, microbatches, chunks):  # GPipe on the ring
    order = []
    for rank in range(ranks):
        downs, ups = [], []
        for start in range(0, microbatches, ranks):
            for c in range(chunks):
                for m in range(start, start + ranks):
                    downs.append(Action(Op.F, rank + c * ranks, m))
                    ups.append(Action(Op.B, rank + (chunks - 1 - c) * ranks, m))
        order.append(downs + ups)
    return order


# %% task="03d.2" says="stage 1 is on rank 0, and belongs on rank 1."
def interleaved_order(ranks, microbatches, chunks):  # neighbors on one rank
    order = []
    for rank in range(ranks):
        downs, ups = [], []
        for m in range(microbatches):
            for c in range(chunks):
                downs.append(Action(Op.F, rank * chunks + c, m))
                ups.append(Action(Op.B, rank * chunks + chunks - 1 - c, m))
        order.append(downs + ups)
    return order


# %% task="03d.2" says="rank 0 has B0 before F0, which it needs."
def interleaved_order(ranks, microbatches, chunks):  # backwards from the first chunk on
    order = []
    for rank in range(ranks):
        downs, ups = [], []
        for start in range(0, microbatches, ranks):
            for c in range(chunks):
                for m in range(start, start + ranks):
                    downs.append(Action(Op.F, rank + c * ranks, m))
                    ups.append(Action(Op.B, rank + (chunks - 1 - c) * ranks, m))
        order.append(ups + downs)
    return order


# %% task="03d.2" says="interleaved_order uses minipar's interleaved: here write the order yourself."
def interleaved_order(ranks, microbatches, chunks):
    from minipar import interleaved

    return interleaved(ranks, microbatches, chunks)


# %% task="03d.2" says="there are lists for 1 ranks, and 2 are needed."
def interleaved_order(ranks, microbatches, chunks):  # rank 0's list only
    return [[Action(op, c, m) for op in (Op.F, Op.B) for c in range(chunks) for m in range(microbatches)]]


# %% task="03d.3" says="x of (6, 4), weight of (3, 4): after I the weight has a gradient already. To add it is W's part."
def backward_input(x, weight, g, later):  # both at once
    weight.grad = g.flatten(0, -2).T @ x.flatten(0, -2)
    return g @ weight


def backward_weights(later): ...


# %% task="03d.3" says="after I nobody keeps x itself. Is W computed already, or is there a copy?"
def backward_input(x, weight, g, later):  # computed at once, added later
    later.append((weight, g.flatten(0, -2).T @ x.flatten(0, -2)))
    return g @ weight


def backward_weights(later):
    while later:
        weight, part = later.pop(0)
        weight.grad = part if weight.grad is None else weight.grad + part


# %% task="03d.3" says="has the gradient"
def backward_input(x, weight, g, later):
    later.append((weight, x, g))
    return g @ weight


def backward_weights(later):  # forgets what was there
    while later:
        weight, x, g = later.pop(0)
        weight.grad = g.flatten(0, -2).T @ x.flatten(0, -2)


# %% task="03d.3" says="After W 6 entries are left in `later`: the next W would count them again."
def backward_input(x, weight, g, later):
    later.append((weight, x, g))
    return g @ weight


def backward_weights(later):  # the list stays
    for weight, x, g in later:
        part = g.flatten(0, -2).T @ x.flatten(0, -2)
        weight.grad = part if weight.grad is None else weight.grad + part


# %% task="03d.3" says="tensors x and g are still kept somewhere."
def backward_input(x, weight, g, later):
    later.append((weight, x, g))
    archive.append(x)
    return g @ weight


def backward_weights(later):
    while later:
        weight, x, g = later.pop(0)
        part = g.flatten(0, -2).T @ x.flatten(0, -2)
        weight.grad = part if weight.grad is None else weight.grad + part


archive = []


# %% task="03d.3" says="I makes 2 products: g @ weight is one, the other is W's."
def backward_input(x, weight, g, later):
    part = g.flatten(0, -2).T @ x.flatten(0, -2)
    later.append((weight, part, x, g))
    return g @ weight


def backward_weights(later):
    while later:
        weight, part, *_ = later.pop(0)
        weight.grad = part if weight.grad is None else weight.grad + part


# %% task="03d.3" says="attempting to assign a gradient of size '[4, 3]' to a tensor of size '[3, 4]'"
def backward_input(x, weight, g, later):
    later.append((weight, x, g))
    return g @ weight


def backward_weights(later):  # the other way around
    while later:
        weight, x, g = later.pop(0)
        part = x.flatten(0, -2).T @ g.flatten(0, -2)
        weight.grad = part if weight.grad is None else weight.grad + part


# %% task="03d.3" says="backward_input has left nothing in `later`: what will W work with?"
def backward_input(x, weight, g, later):
    elsewhere.append((weight, x, g))
    return g @ weight


def backward_weights(later):
    while elsewhere:
        weight, x, g = elsewhere.pop(0)
        part = g.flatten(0, -2).T @ x.flatten(0, -2)
        weight.grad = part if weight.grad is None else weight.grad + part


elsewhere = []


# %% task="03d.3" says="backward_input returns nothing: is there a `return`?"
def backward_input(x, weight, g, later):
    later.append((weight, x, g))


def backward_weights(later):
    while later:
        weight, x, g = later.pop(0)
        part = g.flatten(0, -2).T @ x.flatten(0, -2)
        weight.grad = part if weight.grad is None else weight.grad + part


# %% task="03d.4" says="2 ranks, 4 microbatches: 14 units, and 13 can be had (1F1B takes 15, split 14)."
def zero_bubble_order(ranks, microbatches):  # W at once
    order = []
    for rank in range(ranks):
        program, f, i = [], 0, 0
        while i < microbatches:
            if f < microbatches and f - i < ranks - rank:
                program.append(Action(Op.F, rank, f))
                f += 1
            else:
                program += [Action(Op.I, rank, i), Action(Op.W, rank, i)]
                i += 1
        order.append(program)
    return order


# %% task="03d.4" says="keeps 4 microbatches from F to W, and may keep 2."
def zero_bubble_order(ranks, microbatches):  # all W's at the end
    order = []
    for rank in range(ranks):
        program, f, i = [], 0, 0
        while i < microbatches:
            if f < microbatches and f - i < ranks - rank:
                program.append(Action(Op.F, rank, f))
                f += 1
            else:
                program.append(Action(Op.I, rank, i))
                i += 1
        order.append(program + [Action(Op.W, rank, m) for m in range(microbatches)])
    return order


# %% task="03d.4" says="2 ranks, 4 microbatches: rank 0 keeps 3 microbatches from F to W, and may keep 2."
def zero_bubble_order(ranks, microbatches):  # ZB-H2
    order = []
    for rank in range(ranks):
        program, f, i, w = [], 0, 0, 0
        while w < microbatches:
            if i - w <= 2 * rank and f < microbatches and f - i < 2 * (ranks - 1 - rank) + 1:
                program.append(Action(Op.F, rank, f))
                f += 1
            elif i - w <= 2 * rank and i < microbatches:
                program.append(Action(Op.I, rank, i))
                i += 1
            else:
                program.append(Action(Op.W, rank, w))
                w += 1
        order.append(program)
    return order


# %% task="03d.4" says="2 ranks, 4 microbatches: 15 units, and 13 can be had (1F1B takes 15, split 14)."
def zero_bubble_order(ranks, microbatches):  # whole backwards
    order = []
    for rank in range(ranks):
        program, f, b = [], 0, 0
        while b < microbatches:
            if f < microbatches and f - b < ranks - rank:
                program.append(Action(Op.F, rank, f))
                f += 1
            else:
                program.append(Action(Op.B, rank, b))
                b += 1
        order.append(program)
    return order


# %% task="03d.4" says="the schedule leaves out W3 of stage 1 (1 such actions)."
def zero_bubble_order(ranks, microbatches):  # some W's are lost
    order = []
    for rank in range(ranks):
        program, f, i, w = [], 0, 0, 0
        while i < microbatches:
            if i - w > rank:
                program.append(Action(Op.W, rank, w))
                w += 1
            elif f < microbatches and f - i < ranks - rank:
                program.append(Action(Op.F, rank, f))
                f += 1
            else:
                program.append(Action(Op.I, rank, i))
                i += 1
        order.append(
            program + [Action(Op.W, rank, m) for m in range(w, microbatches)][: max(1, microbatches - w - rank)]
        )
    return order


# %% task="03d.4" says="zero_bubble_order uses minipar's zero_bubble_h1: here write the order yourself."
def zero_bubble_order(ranks, microbatches):
    from minipar import zero_bubble_h1

    return zero_bubble_h1(ranks, microbatches)


# %% task="03d.4" says="2 ranks, 4 microbatches: 4 stages. Here it is one a rank."
def zero_bubble_order(ranks, microbatches):
    return zero_bubble_v_by_another_name(ranks, microbatches)


def zero_bubble_v_by_another_name(ranks, microbatches):
    order = []
    for rank in range(ranks):
        program = []
        for m in range(microbatches):
            for stage in (rank, 2 * ranks - 1 - rank):
                program.append(Action(Op.F, stage, m))
            for stage in (2 * ranks - 1 - rank, rank):
                program += [Action(Op.I, stage, m), Action(Op.W, stage, m)]
        order.append(program)
    return order


# %% task="03d.4" says="4 ranks, 8 microbatches: rank"
def zero_bubble_order(ranks, microbatches):  # puts off by as many, wherever it is: right on two ranks
    order = []
    for rank in range(ranks):
        program, f, i, w = [], 0, 0, 0
        late = rank if ranks == 2 else ranks
        while w < microbatches:
            if i - w <= late and f < microbatches and f - i < ranks - rank:
                program.append(Action(Op.F, rank, f))
                f += 1
            elif i - w <= late and i < microbatches:
                program.append(Action(Op.I, rank, i))
                i += 1
            else:
                program.append(Action(Op.W, rank, w))
                w += 1
        order.append(program)
    return order


# %% task="03d.5" says="4 ranks, 8 microbatches, 4 to keep: your 72 units have a bubble of 66.7%, and par is 11.1%."
def my_schedule(stages, microbatches, limit):  # one after the other
    return [[Action(op, rank, m) for m in range(microbatches) for op in (Op.F, Op.I, Op.W)] for rank in range(stages)]


# %% task="03d.5" says="4 ranks, 8 microbatches, 3 to keep: rank 0 keeps 4, more than 3."
def my_schedule(stages, microbatches, limit):  # does not look at the limit
    def rule(rank, ranks, out, waiting):
        return ["W"] * (waiting > rank) + ["F"] * (out < ranks - rank) + ["I", "W"]

    return by_rule(list(range(stages)), microbatches, rule)


# %% task="03d.5" says="4 ranks, 8 microbatches, 4 to keep: by_rule: no wish of any rank is ready"
def my_schedule(stages, microbatches, limit):  # no place for the way up
    def rule(rank, ranks, out, waiting):
        return ["F"] * (out + waiting < 2 * limit) + ["I", "W"]

    return by_rule([*range(stages), *reversed(range(stages))], microbatches, rule)


# %% task="03d.5" says="4 ranks, 8 microbatches, 4 to keep: 16 stages on 4 ranks: each has one, or each has two."
def my_schedule(stages, microbatches, limit):
    owner = [*range(stages), *reversed(range(stages))] * 2

    def rule(rank, ranks, out, waiting):
        kept = out + waiting
        return ["F3"] * (kept < 4 * limit) + ["F2", "F1", "F0"] * (kept < 4 * limit - 3) + ["I", "W"]

    return by_rule(owner, microbatches, rule)


# %% task="03d.5" says="3 ranks, 7 microbatches, 2 to keep: there are lists for 4 ranks."
def my_schedule(stages, microbatches, limit):  # four ranks only
    def rule(rank, ranks, out, waiting):
        kept = out + waiting
        return ["F1"] * (kept < 2 * limit) + ["F0"] * (kept < 2 * limit - 1) + ["I1", "I0", "W"]

    return by_rule([0, 1, 2, 3, 3, 2, 1, 0], microbatches, rule)


# %% task="03d.5" says="my_schedule uses minipar's zero_bubble_v: here write the order yourself."
def my_schedule(stages, microbatches, limit):
    def rule(rank, ranks, out, waiting):
        return ["W"] * (waiting > rank) + ["F"] * (out < ranks - rank and out + waiting < limit) + ["I", "W"]

    if limit == stages:
        return zero_bubble_v(stages, microbatches)
    return by_rule(list(range(stages)), microbatches, rule)


# %% task="03d.5" says="This answer uses FOUND, which belongs to its check"
def my_schedule(stages, microbatches, limit):
    return read_found(FOUND[stages, microbatches, limit])


# %% task="03d.5" says="4 ranks, 8 microbatches, 4 to keep: 6 stages on 4 ranks: each has one, or each has two."
def my_schedule(stages, microbatches, limit):  # half a V
    def rule(rank, ranks, out, waiting):
        return ["F1"] + ["F0"] * (out + waiting < limit) + ["I", "W"]

    return by_rule([*range(stages), *reversed(range(2))], microbatches, rule)
