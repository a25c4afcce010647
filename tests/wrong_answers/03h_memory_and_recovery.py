# ruff: noqa
# Plausible wrong answers. Each must be refused with a message that contains what stands in `says`.

# %% task="03h.1" says="Without recompute you say 204 MB: each block keeps its input, too"
def kept():
    return 6 * 34, 46, 2


# %% task="03h.1" says="With recompute you say 12 MB: those are the inputs"
def kept():
    return 216, 12, 2


# %% task="03h.1" says="With recompute you say 36 MB: that is one block"
def kept():
    return 216, 36, 2


# %% task="03h.1" says="You say 3 forwards"
def kept():
    return 216, 46, 3


# %% task="03h.1" says="Without recompute you say 218 MB: what the last block gives is nobody's input"
def kept():
    return 6 * 36 + 2, 46, 2


# %% task="03h.1" says="With recompute you say 48 MB: is one input counted twice, or what the last block gives?"
def kept():
    return 216, 6 * 2 + 36, 2


# %% task="03h.1" says="kept gives 216: three numbers are asked for"
def kept():
    return 216


# %% task="03h.2" says="Does the second forward drop the same elements as the first?"
class Recomputed(torch.autograd.Function):  # new random numbers
    @staticmethod
    def forward(ctx, x, block):
        ctx.block = block
        ctx.save_for_backward(x)
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx, gradient):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            ctx.block(x).backward(gradient)
        return x.grad, None


# %% task="03h.2" says="but what is drawn afterwards is different"
class Recomputed(torch.autograd.Function):  # the generator stays where it was put
    @staticmethod
    def forward(ctx, x, block):
        ctx.block, ctx.state = block, torch.get_rng_state()
        ctx.save_for_backward(x)
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx, gradient):
        torch.set_rng_state(ctx.state)
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            ctx.block(x).backward(gradient)
        return x.grad, None


# %% task="03h.2" says="Right, but 340,480 numbers are kept"
class Recomputed:  # keeps everything
    @staticmethod
    def apply(x, block):
        return block(x)


# %% task="03h.2" says="does not require grad"
class Recomputed(torch.autograd.Function):  # nobody watches the second forward
    @staticmethod
    def forward(ctx, x, block):
        ctx.block, ctx.state = block, torch.get_rng_state()
        ctx.save_for_backward(x)
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx, gradient):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        ctx.block(x).backward(gradient)
        return x.grad, None


# %% task="03h.2" says="has no gradient"
class Recomputed(torch.autograd.Function):  # the gradient of x only
    @staticmethod
    def forward(ctx, x, block):
        ctx.block, ctx.state = block, torch.get_rng_state()
        ctx.save_for_backward(x)
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx, gradient):
        now = torch.get_rng_state()
        torch.set_rng_state(ctx.state)
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.block(x)
        torch.set_rng_state(now)
        return torch.autograd.grad(y, x, gradient)[0], None


# %% task="03h.3" says="overflow on ranks [2]: rank 0 gives (True, 1024.0, 1), and it is (False, 512.0, 0)"
def next_scale(overflow, scale, good, patience, axis):  # each for itself
    if overflow:
        return False, scale / 2, 0
    return (True, scale * 2, 0) if good + 1 == patience else (True, scale, good + 1)


# %% task="03h.3" says="step 2: rank 0 gives (True, 2048.0, 3), and it is (True, 2048.0, 0)"
def next_scale(overflow, scale, good, patience, axis):  # goes on counting
    if all_reduce(torch.tensor(float(overflow)), axis, "max") > 0:
        return False, scale / 2, 0
    good += 1
    return True, scale * 2 if good == patience else scale, good


# %% task="03h.3" says="step 2: rank 0 gives (True, 1024.0, 3), and it is (True, 2048.0, 0)"
def next_scale(overflow, scale, good, patience, axis):  # doubles one step late
    if all_reduce(torch.tensor(float(overflow)), axis, "max") > 0:
        return False, scale / 2, 0
    return (True, scale * 2, 0) if good == patience else (True, scale, good + 1)


# %% task="03h.3" says="and it is (False, 512.0, 0)"
def next_scale(overflow, scale, good, patience, axis):  # the step is taken all the same
    bad = all_reduce(torch.tensor(float(overflow)), axis, "max") > 0
    good = 0 if bad else good + 1
    scale = scale / 2 if bad else scale
    return (True, scale * 2, 0) if good == patience else (True, scale, good)


# %% task="03h.3" says="and it is (False, 512.0, 0)"
def next_scale(overflow, scale, good, patience, axis):  # the mean is an overflow only where all have one
    if all_reduce(torch.tensor(float(overflow)), axis) / axis.size == 1:
        return False, scale / 2, 0
    return (True, scale * 2, 0) if good + 1 == patience else (True, scale, good + 1)


# %% task="03h.3" says="overflow on ranks [2]: rank 0 gives (True, 1024.0, 1), and it is (False, 512.0, 0)"
def next_scale(overflow, scale, good, patience, axis):  # only the one that knows asks
    if overflow and all_reduce(torch.tensor(1.0), axis, "max") > 0:
        return False, scale / 2, 0
    return (True, scale * 2, 0) if good + 1 == patience else (True, scale, good + 1)


# %% task="03h.3" says="One all-reduce a step is enough"
def next_scale(overflow, scale, good, patience, axis):  # the scale, too
    bad = all_reduce(torch.tensor(float(overflow)), axis, "max") > 0
    scale = all_reduce(torch.tensor(scale), axis, "max").item()
    if bad:
        return False, scale / 2, 0
    return (True, scale * 2, 0) if good + 1 == patience else (True, scale, good + 1)


# %% task="03h.3" says="One number a step is enough"
def next_scale(overflow, scale, good, patience, axis):  # all that it is given
    bad, scale, good = all_reduce(torch.tensor([float(overflow), scale, good]), axis, "max").tolist()
    if bad:
        return False, scale / 2, 0
    return (True, scale * 2, 0) if good + 1 == patience else (True, scale, good + 1)


# %% task="03h.3" says="next_scale returns nothing: is there a `return`?"
def next_scale(overflow, scale, good, patience, axis):
    all_reduce(torch.tensor(float(overflow)), axis, "max")


# %% task="03h.4" says="you read file 1 from 2 to 1, which is nothing: leave it out"
def pieces(length, saved, ranks, index):  # positions in the whole tensor
    begin, end = length * index // ranks, length * (index + 1) // ranks
    found = []
    for file in range(saved):
        first, behind = length * file // saved, length * (file + 1) // saved
        if max(begin, first) < min(end, behind):
            found.append((file, max(begin, first) % max(1, behind - first), min(end, behind) - first))
    return found


# %% task="03h.4" says="which is nothing: leave it out"
def pieces(length, saved, ranks, index):  # empty pieces, too
    begin, end = length * index // ranks, length * (index + 1) // ranks
    found = []
    for file in range(saved):
        first, behind = length * file // saved, length * (file + 1) // saved
        a, b = max(begin, first), min(end, behind)
        found.append((file, a - first, b - first))
    return found


# %% task="03h.4" says="you read the numbers"
def pieces(length, saved, ranks, index):  # all files, whole
    return [(i, 0, length * (i + 1) // saved - length * i // saved) for i in range(saved)]


# %% task="03h.4" says="you read the numbers"
def pieces(length, saved, ranks, index):  # equal shares, the rest forgotten
    each = length // ranks
    begin, end = each * index, each * (index + 1)
    found = []
    for file in range(saved):
        first, behind = length * file // saved, length * (file + 1) // saved
        if max(begin, first) < min(end, behind):
            found.append((file, max(begin, first) - first, min(end, behind) - first))
    return found


# %% task="03h.4" says="one a file is enough"
def pieces(length, saved, ranks, index):  # number by number
    begin, end = length * index // ranks, length * (index + 1) // ranks
    found = []
    for file in range(saved):
        first, behind = length * file // saved, length * (file + 1) // saved
        found += [(file, i - first, i - first + 1) for i in range(max(begin, first), min(end, behind))]
    return found


# %% task="03h.4" says="file 1 has no numbers 3 to 5: it has 3, from its own number 0 on"
def pieces(length, saved, ranks, index):  # places in the whole tensor
    begin, end = length * index // ranks, length * (index + 1) // ranks
    found = []
    for file in range(saved):
        a, b = max(begin, length * file // saved), min(end, length * (file + 1) // saved)
        if a < b:
            found.append((file, a, b))
    return found


# %% task="03h.5" says="load takes 'step-9.part' for a checkpoint: its name begins with step-"
def save(folder, step, parts, write, rename, remove):  # half written, and load looks at it
    part = folder / f"step-{step}.part"
    remove(part)
    for name, text in parts.items():
        write(part / name, text)
    rename(part, folder / f"step-{step}")
    for old in folder.glob("step-*"):
        if old.name != f"step-{step}":
            remove(old)


# %% task="03h.5" says="It must be the old checkpoint or the new one, whole"
def save(folder, step, parts, write, rename, remove):  # as it was
    for old in folder.glob("step-*"):
        rename(old, folder / f"step-{step}")
    for name, text in parts.items():
        write(folder / f"step-{step}" / name, text)


# %% task="03h.5" says="Killed before operation 2: load finds step -1 with nothing"
def save(folder, step, parts, write, rename, remove):  # makes room first
    for old in folder.glob("step-*"):
        remove(old)
    for name, text in parts.items():
        write(folder / "unfinished" / name, text)
    rename(folder / "unfinished", folder / f"step-{step}")


# %% task="03h.5" says="Killed before operation 2: load finds step 9"
def save(folder, step, parts, write, rename, remove):  # under its own name from the beginning
    for name, text in parts.items():
        write(folder / f"step-{step}" / name, text)
    for old in folder.glob("step-*"):
        if old != folder / f"step-{step}":
            remove(old)


# %% task="03h.5" says="['step-12', 'step-9'] are left"
def save(folder, step, parts, write, rename, remove):  # keeps them all
    remove(folder / "unfinished")
    for name, text in parts.items():
        write(folder / "unfinished" / name, text)
    rename(folder / "unfinished", folder / f"step-{step}")


# %% task="03h.5" says="use the write, rename and remove that it is given: they can be killed"
def save(folder, step, parts, write, rename, remove):
    new = folder / "unfinished"
    new.mkdir(exist_ok=True)
    for name, text in parts.items():
        (new / name).write_text(text)
    rename(new, folder / f"step-{step}")


# %% task="03h.5" says="save uses 'rename' of a path or a module"
def save(folder, step, parts, write, rename, remove):
    remove(folder / "new")
    for name, text in parts.items():
        write(folder / "new" / name, text)
    (folder / "new").rename(folder / f"step-{step}")
    for old in folder.glob("step-*"):
        if old.name != f"step-{step}":
            remove(old)
