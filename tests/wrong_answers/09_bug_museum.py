# ruff: noqa
# Plausible wrong answers. Each must be refused with a message that contains what stands in `says`.

# %% task="09.1" says="full rows, 4 microbatches: the gradient of embed.token.weight (512, 32) is 4 times that of one process"
def pipeline_step(stage, axis, tokens, targets, microbatches):  # as it was
    shown = 0.0
    for x, y in zip(rows(tokens, microbatches), rows(targets, microbatches)):
        if axis.index == 0:
            out = stage(x)
            send(out, axis, 1)
            out.backward(recv(out, axis, 1))
        else:
            received = recv(torch.empty(*x.shape, 32, dtype=torch.float64), axis, 0).requires_grad_()
            loss = F.cross_entropy(stage(received).flatten(0, 1), y.flatten())
            shown += loss.item() / microbatches
            loss.backward()
            send(received.grad, axis, 0)
    return shown


# %% task="09.1" says="rows of different lengths, 2 microbatches: the gradient of embed.token.weight (512, 32) is the same on every rank, but off by"
def pipeline_step(stage, axis, tokens, targets, microbatches):  # a mean of means
    shown = 0.0
    for x, y in zip(rows(tokens, microbatches), rows(targets, microbatches)):
        if axis.index == 0:
            out = stage(x)
            send(out, axis, 1)
            out.backward(recv(out, axis, 1))
        else:
            received = recv(torch.empty(*x.shape, 32, dtype=torch.float64), axis, 0).requires_grad_()
            loss = F.cross_entropy(stage(received).flatten(0, 1), y.flatten()) / microbatches
            shown += loss.item()
            loss.backward()
            send(received.grad, axis, 0)
    return shown


# %% task="09.1" says="the gradients are right, but the loss that is returned is off by"
def pipeline_step(stage, axis, tokens, targets, microbatches):  # divided twice where it is shown
    shown = 0.0
    for x, y in zip(rows(tokens, microbatches), rows(targets, microbatches)):
        if axis.index == 0:
            out = stage(x)
            send(out, axis, 1)
            out.backward(recv(out, axis, 1))
        else:
            received = recv(torch.empty(*x.shape, 32, dtype=torch.float64), axis, 0).requires_grad_()
            logits = stage(received).flatten(0, 1)
            loss = F.cross_entropy(logits, y.flatten(), reduction="sum") / (targets != -100).sum()
            shown += loss.item() / microbatches
            loss.backward()
            send(received.grad, axis, 0)
    return shown


# %% task="09.1" says="all is right, but stage 0 sends 131,072 bytes"
def pipeline_step(stage, axis, tokens, targets, microbatches):  # sends an activation twice
    shown = 0.0
    for x, y in zip(rows(tokens, microbatches), rows(targets, microbatches)):
        if axis.index == 0:
            out = stage(x)
            send(out, axis, 1)
            send(out, axis, 1)
            out.backward(recv(out, axis, 1))
        else:
            recv(torch.empty(*x.shape, 32, dtype=torch.float64), axis, 0)
            received = recv(torch.empty(*x.shape, 32, dtype=torch.float64), axis, 0).requires_grad_()
            logits = stage(received).flatten(0, 1)
            loss = F.cross_entropy(logits, y.flatten(), reduction="sum") / (targets != -100).sum()
            shown += loss.item()
            loss.backward()
            send(received.grad, axis, 0)
    return shown


# %% task="09.2" says="On 2 ranks: rank 0: the gradient of embed.token.weight (512, 32) is not what the other ranks have"
def sum_when_ready(parameters, axis):  # as it was
    def ready(gradient):
        gradient = all_reduce(gradient, axis)

    for p in parameters:
        p.register_post_accumulate_grad_hook(ready)


# %% task="09.2" says="is 0.5 times that of one process, on every rank: divided once too often by the 2 ranks?"
def sum_when_ready(parameters, axis):  # a mean, where the division was done already
    def ready(p):
        p.grad = all_reduce(p.grad, axis) / axis.size

    for p in parameters:
        p.register_post_accumulate_grad_hook(ready)


# %% task="09.2" says="Tensor post accumulate grad hooks should return None"
def sum_when_ready(parameters, axis):  # returns it, as other hooks do
    for p in parameters:
        p.register_post_accumulate_grad_hook(lambda p: all_reduce(p.grad, axis))


# %% task="09.2" says="has changed the weights of embed.token.weight in backward"
def sum_when_ready(parameters, axis):
    def ready(p):
        p.grad = all_reduce(p.grad, axis)
        p.data -= 0.1 * p.grad  # a step, while it is at it

    for p in parameters:
        p.register_post_accumulate_grad_hook(ready)


# %% task="09.2" says="makes 42 calls for 21 parameters"
def sum_when_ready(parameters, axis):
    def ready(p):
        total = all_reduce(p.grad, axis)
        p.grad = all_reduce(p.grad, axis, "max") * 0 + total

    for p in parameters:
        p.register_post_accumulate_grad_hook(ready)


# %% task="09.3" says="stage 1: the gradient of the shared weight is off by 61.5%"
def add_up_shared(p, axis):  # as it was
    if axis.index == 0:
        p.grad = p.grad + recv(p.grad, axis, 1)
    else:
        send(p.grad, axis, 0)


# %% task="09.3" says="stage 0: the gradient of the shared weight is off by 50.0%"
def add_up_shared(p, axis):  # the mean of the two
    p.grad = all_reduce(p.grad, axis) / axis.size


# %% task="09.3" says="stage 0: the gradient of the shared weight is off by"
def add_up_shared(p, axis):  # swapped, not added
    pending = isend(p.grad, axis, 1 - axis.index)
    p.grad = recv(p.grad, axis, 1 - axis.index)
    pending.wait()


# %% task="09.3" says="makes 3 calls: one all-reduce does it"
def add_up_shared(p, axis):
    total = all_reduce(p.grad, axis)
    all_reduce(total, axis)
    p.grad = all_reduce(total, axis, "max")


# %% task="09.4" says="the gradient of norm.weight (32,) is not what the other ranks have"
def sum_norms(model, axis):  # as it was
    norms = [norm for block in model.blocks for norm in (block.norm1, block.norm2)]
    parameters = [p for norm in norms for p in norm.parameters()]
    flat = all_reduce(torch.cat([p.grad for p in parameters]), axis)
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad = part


# %% task="09.4" says="the gradient of blocks.0.norm1.bias (32,) is not what the other ranks have"
def sum_norms(model, axis):  # weights only
    parameters = [m.weight for m in model.modules() if isinstance(m, nn.LayerNorm)]
    flat = all_reduce(torch.cat([p.grad for p in parameters]), axis)
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad = part


# %% task="09.4" says="is 0.5 times that of one process, on every rank"
def sum_norms(model, axis):  # averaged
    parameters = [p for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()]
    flat = all_reduce(torch.cat([p.grad for p in parameters]), axis) / axis.size
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad = part


# %% task="09.4" says="with 10 calls: put them side by side"
def sum_norms(model, axis):
    for m in model.modules():
        if isinstance(m, nn.LayerNorm):
            for p in m.parameters():
                p.grad = all_reduce(p.grad, axis)


# %% task="09.5" says="The same elements are dropped"
def generators(seed, step, axis):  # as it was
    return torch.Generator().manual_seed(seed + step), torch.Generator().manual_seed(seed + step)


# %% task="09.5" says="The same elements are dropped outside, seed 1, step 1 and outside, seed 2, step 0"
def generators(seed, step, axis):  # steps and ranks collide
    return torch.Generator().manual_seed(seed + step), torch.Generator().manual_seed(10_000 + seed + step + axis.index)


# %% task="09.5" says="The same elements are dropped inside, rank 0, seed 1, step 1 and inside, rank 1, seed 1, step 0"
def generators(seed, step, axis):
    base = seed * 100_000 + step
    return torch.Generator().manual_seed(base), torch.Generator().manual_seed(1_000_000_000 + base + axis.index)


# %% task="09.5" says="rank 1 drops other elements than rank 0"
def generators(seed, step, axis):  # of its own everywhere
    base = (seed * 1_000_000 + step) * 1000 + axis.index
    return torch.Generator().manual_seed(base), torch.Generator().manual_seed(base + 500)


# %% task="09.5" says="The same elements are dropped outside, seed 1, step 0 and outside, seed 1, step 1"
def generators(seed, step, axis):  # the step is forgotten
    return torch.Generator().manual_seed(seed * 1000), torch.Generator().manual_seed(seed * 1000 + 1 + axis.index)


# %% task="09.6" says="all_reduce(sum) of float64 (2,)"
def mean_loss(losses, axis):  # as it was
    return all_reduce(losses, axis).mean() / axis.size


# %% task="09.6" says="10 rows on 4 ranks, rank 0: you get"
def mean_loss(losses, axis):  # a mean of means
    return all_reduce(losses.mean(), axis) / axis.size


# %% task="09.6" says="right, with 2 calls. One is enough"
def mean_loss(losses, axis):
    return all_reduce(losses.sum(), axis) / all_reduce(torch.tensor(float(len(losses))), axis)


# %% task="09.6" says="right, but"
def mean_loss(losses, axis):  # room for all rows of all ranks
    sent = losses.new_zeros(8)
    sent[0], sent[1] = losses.sum(), len(losses)
    total = all_reduce(sent, axis)
    return total[0] / total[1]


# %% task="09.7" says="deadlock: every rank waits"
def exchange(x, like, axis):  # as it was
    send(x, axis, 1 - axis.index)
    return recv(like, axis, 1 - axis.index)


# %% task="09.7" says="which is not what the other rank has sent"
def exchange(x, like, axis):  # one of them gets its own
    if axis.index == 0:
        send(x, axis, 1)
        return x
    received = recv(like, axis, 0)
    return received


# %% task="09.7" says="rank 0 sends 2 times: once is enough"
def exchange(x, like, axis):
    other = 1 - axis.index
    first = isend(x, axis, other)
    received = recv(like, axis, other)
    first.wait()
    again = isend(x, axis, other)
    received = recv(like, axis, other)
    again.wait()
    return received


# %% task="09.8" says="full rows, shares of [3, 4] rows"
def set_gradients(model, tokens, targets, axis):  # as it was
    model.zero_grad()
    F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()).backward()
    for p in model.parameters():
        p.grad = all_reduce(p.grad, axis) / axis.size


# %% task="09.8" says="padding, shares of [1, 1, 1, 2] rows"
def set_gradients(model, tokens, targets, axis):  # rows count the same, tokens do not
    model.zero_grad()
    total = all_reduce(torch.tensor(float(len(tokens))), axis)
    (F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()) * len(tokens) / total).backward()
    for p in model.parameters():
        p.grad = all_reduce(p.grad, axis)


# %% task="09.8" says="padding, shares of [1, 1, 1, 2] rows"
def set_gradients(model, tokens, targets, axis):  # padding counts
    model.zero_grad()
    total = all_reduce(torch.tensor(targets.numel()), axis)
    (F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="sum") / total).backward()
    for p in model.parameters():
        p.grad = all_reduce(p.grad, axis)


# %% task="09.8" says="right, with 42 calls for 21 parameters"
def set_gradients(model, tokens, targets, axis):  # the count is asked for again and again
    model.zero_grad()
    F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="sum").backward()
    for p in model.parameters():
        p.grad = all_reduce(p.grad, axis) / all_reduce((targets != -100).sum(), axis)


# %% task="09.9" says="rank 0 returns the norm 10.0488, and that of the whole model is 11.9385"
def clip(parts, copies, most, axis):  # as it was
    norm = sum(g.square().sum() for g in parts + copies).sqrt()
    for g in parts + copies:
        g *= (most / norm).clamp(max=1)
    return norm


# %% task="09.9" says="Parts count once each, copies once in all"
def clip(parts, copies, most, axis):  # copies are counted on every rank
    norm = all_reduce(sum(g.square().sum() for g in parts + copies), axis).sqrt()
    for g in parts + copies:
        g *= (most / norm).clamp(max=1)
    return norm


# %% task="09.9" says="Parts count once each, copies once in all"
def clip(parts, copies, most, axis):  # norms do not add up, squares do
    norm = all_reduce(sum(g.square().sum() for g in parts).sqrt(), axis) + sum(g.square().sum() for g in copies).sqrt()
    for g in parts + copies:
        g *= (most / norm).clamp(max=1)
    return norm


# %% task="09.9" says="the norm is right, but a part is off by"
def clip(parts, copies, most, axis):  # small gradients are made larger
    norm = (all_reduce(sum(g.square().sum() for g in parts), axis) + sum(g.square().sum() for g in copies)).sqrt()
    for g in parts + copies:
        g *= most / norm
    return norm


# %% task="09.9" says="right, with 2 calls: one number needs one"
def clip(parts, copies, most, axis):
    square = sum(all_reduce(g.square().sum(), axis) for g in parts) + sum(g.square().sum() for g in copies)
    for g in parts + copies:
        g *= (most / square.sqrt()).clamp(max=1)
    return square.sqrt()
