# ruff: noqa
# Plausible wrong answers. Each must be refused with a message that contains what stands in `says`.

# %% task="03c.1" says="Stage 0: B1 begins in square 6 of your drawing, but it waits for B1 of stage 1, which fills square 6. It can begin in square 7."
def drawing():  # B1 goes on at once, as if nobody had to send anything
    return "F0 F1 . . B0 B0 B1 B1 F2 . . . B2 B2", ". F0 B0 B0 F1 B1 B1 . . F2 B2 B2"


# %% task="03c.1" says="Stage 1: F2 begins in square 7 of your drawing, but it waits for F2 of stage 0, which fills square 9. It can begin in square 10."
def drawing():  # stage 1 does not wait for activations
    return "F0 F1 . . B0 B0 . B1 B1 F2 B2 B2", ". F0 B0 B0 F1 B1 B1 F2 B2 B2"


# %% task="03c.1" says="Stage 0: you have the order F0 F1 B0 F2 B1 B2, and here it does F0 F1 B0 B1 F2 B2."
def drawing():  # the order of the chapter
    return "F0 F1 . . B0 B0 F2 B1 B1 . B2 B2", ". F0 B0 B0 F1 B1 B1 F2 B2 B2 . ."


# %% task="03c.1" says="Stage 0: B0 fills the squares [4], and takes 2 squares."
def drawing():  # a backward as long as a forward
    return "F0 F1 . . B0 . B1 F2 . . B2", ". F0 B0 F1 B1 . . . F2 B2"


# %% task="03c.1" says="Stage 0: B2 begins in square 14 of your drawing, and nothing holds it back from beginning in square 13."
def drawing():
    return "F0 F1 . . B0 B0 . B1 B1 F2 . . . . B2 B2", ". F0 B0 B0 F1 B1 B1 . . . F2 B2 B2"


# %% task="03c.1" says="Stage 1: F2 begins in square 9 of your drawing, but it waits for F2 of stage 0, which fills square 9. It can begin in square 10."
def drawing():  # in the very square in which stage 0 is at it
    return "F0 F1 . . B0 B0 . B1 B1 F2 . . B2 B2", ". F0 B0 B0 F1 B1 B1 . . F2 B2 B2"


# %% task="03c.1" says="Stage 0: B1 is missing."
def drawing():
    return "F0 F1 . . B0 B0", ". F0 B0 B0 F1 B1"


# %% task="03c.1" says="Stage 1: F2 is missing."
def drawing():
    return "F0 F1 .  .  B0 B0 .  B1 B1 F2 .  .  .  B2 B2", ".  F0 B0 B0 F1 B1 B1"


# %% task="03c.2" says="What goes into the second half still knows how it was made."
def carry(first, second, tokens, targets):  # one long graph
    y = first(tokens)
    y.retain_grad()
    loss = total_loss(second, y, targets)
    loss.backward()
    return loss.item(), y.grad


# %% task="03c.2" says="Nobody has asked for the gradient of x, so nothing can go back: requires_grad_()."
def carry(first, second, tokens, targets):
    y = first(tokens)
    x = y.detach()
    loss = total_loss(second, x, targets)
    loss.backward()
    return loss.item(), x.grad


# %% task="03c.2" says="The first half has no gradients. It goes on where the second one stopped, from x.grad."
def carry(first, second, tokens, targets):  # forgets the first half
    x = first(tokens).detach().requires_grad_()
    loss = total_loss(second, x, targets)
    loss.backward()
    return loss.item(), x.grad


# %% task="03c.2" says="2 blocks, 8 rows: the gradient of embed.token.weight (512, 32) is off by"
def carry(first, second, tokens, targets):  # hands back what went forward
    y = first(tokens)
    x = y.detach().requires_grad_()
    loss = total_loss(second, x, targets)
    loss.backward()
    y.backward(y.detach())
    return loss.item(), x.grad


# %% task="03c.2" says="The first half ran forward 2 times: once is enough."
def carry(first, second, tokens, targets):  # computes the first half again
    y = first(tokens)
    x = first(tokens).detach().requires_grad_()
    loss = total_loss(second, x, targets)
    loss.backward()
    y.backward(x.grad)
    return loss.item(), x.grad


# %% task="03c.2" says="What is returned second must be the gradient of x, of the shape (8, 32, 32)."
def carry(first, second, tokens, targets):
    y = first(tokens)
    x = y.detach().requires_grad_()
    loss = total_loss(second, x, targets)
    loss.backward()
    y.backward(x.grad)
    return loss.item(), x


# %% task="03c.2" says="The gradients are right, but the loss is"
def carry(first, second, tokens, targets):
    y = first(tokens)
    x = y.detach().requires_grad_()
    loss = total_loss(second, x, targets)
    loss.backward()
    y.backward(x.grad)
    return loss.item() / targets.numel(), x.grad


# %% task="03c.3" says="full rows, 4 microbatches: the gradient of embed.token.weight (512, 32) is 4 times that of one process. By which count"
def accumulate(model, tokens, targets, microbatches):  # a mean of each microbatch
    shown = 0.0
    for some, wanted in zip(rows(tokens, microbatches), rows(targets, microbatches)):
        loss = total_loss(model, some, wanted) / (wanted != -100).sum().clamp(min=1)
        loss.backward()
        shown += loss.item() / microbatches
    return shown


# %% task="03c.3" says="full rows, 3 microbatches: the gradient of embed.token.weight (512, 32) is off by"
def accumulate(model, tokens, targets, microbatches):  # a mean of means
    shown = 0.0
    for some, wanted in zip(rows(tokens, microbatches), rows(targets, microbatches)):
        loss = total_loss(model, some, wanted) / (wanted != -100).sum().clamp(min=1) / microbatches
        loss.backward()
        shown += loss.item()
    return shown


# %% task="03c.3" says="rows of different lengths, 8 microbatches: the gradient of embed.token.weight (512, 32) is 0."
def accumulate(model, tokens, targets, microbatches):  # padding counted
    shown = 0.0
    for some, wanted in zip(rows(tokens, microbatches), rows(targets, microbatches)):
        loss = total_loss(model, some, wanted) / targets.numel()
        loss.backward()
        shown += loss.item()
    return shown


# %% task="03c.3" says="full rows, 4 microbatches: the gradients are right, but 4 microbatches were kept at a time: be done with one before the next."
def accumulate(model, tokens, targets, microbatches):  # one backward for all
    count = (targets != -100).sum()
    pieces = zip(rows(tokens, microbatches), rows(targets, microbatches))
    loss = sum(total_loss(model, some, wanted) / count for some, wanted in pieces)
    loss.backward()
    return loss.item()


# %% task="03c.3" says="full rows, 4 microbatches: forward runs on [8] rows, and the microbatches have [2, 2, 2, 2]."
def accumulate(model, tokens, targets, microbatches):  # no microbatches
    loss = total_loss(model, tokens, targets) / (targets != -100).sum()
    loss.backward()
    return loss.item()


# %% task="03c.3" says="the gradients are right, but the loss that is returned is off by"
def accumulate(model, tokens, targets, microbatches):  # the last microbatch's part
    count = (targets != -100).sum()
    for some, wanted in zip(rows(tokens, microbatches), rows(targets, microbatches)):
        loss = total_loss(model, some, wanted) / count
        loss.backward()
    return loss.item()


# %% task="03c.3" says="full rows, 4 microbatches: the gradient of embed.token.weight (512, 32) is off by"
def accumulate(model, tokens, targets, microbatches):  # each begins anew
    count, shown = (targets != -100).sum(), 0.0
    for some, wanted in zip(rows(tokens, microbatches), rows(targets, microbatches)):
        model.zero_grad()
        loss = total_loss(model, some, wanted) / count
        loss.backward()
        shown += loss.item()
    return shown


# %% task="03c.4" says="2 stages, 3 microbatches: stage 0 does F0 B0 F1 B1 F2 B2. GPipe has all forwards before the first backward."
def gpipe_order(stages, microbatches):  # one after the other
    return [[Action(op, s, m) for m in range(microbatches) for op in (Op.F, Op.B)] for s in range(stages)]


# %% task="03c.4" says="stage 0 does B of the microbatches [2, 1, 0]: each of 3 once, in order."
def gpipe_order(stages, microbatches):  # backwards from the last one
    return [
        [Action(Op.F, s, m) for m in range(microbatches)] + [Action(Op.B, s, m) for m in reversed(range(microbatches))]
        for s in range(stages)
    ]


# %% task="03c.4" says="you give 3 lists: one for each stage."
def gpipe_order(stages, microbatches):  # takes one for the other
    return [[Action(op, s, m) for op in (Op.F, Op.B) for m in range(stages)] for s in range(microbatches)]


# %% task="03c.4" says="stage 1, place 0: the action says that it belongs to stage 0."
def gpipe_order(stages, microbatches):  # the same list for all
    return [[Action(op, 0, m) for op in (Op.F, Op.B) for m in range(microbatches)] for _ in range(stages)]


# %% task="03c.4" says="stage 0, place 0: 'F0' is no Action, such as Action(Op.F, 0, 0)."
def gpipe_order(stages, microbatches):
    return [[f"{op}{m}" for op in "FB" for m in range(microbatches)] for _ in range(stages)]


# %% task="03c.4" says="gpipe_order uses minipar's gpipe: here write the list yourself."
def gpipe_order(stages, microbatches):
    from minipar import gpipe

    return gpipe(stages, microbatches)


# %% task="03c.4" says="stage 0 does F of the microbatches [1, 2, 3]"
def gpipe_order(stages, microbatches):  # counted from one
    return [[Action(op, s, m + 1) for op in (Op.F, Op.B) for m in range(microbatches)] for s in range(stages)]


# %% task="03c.5" says="rank 0 does F0 F1 B0 F2 B1 F3 B2 F4 B3 B4. It does B0 with 2 in flight, a limit of 3 and 3 left to begin: the rule says F."
def one_f_one_b_order(stages, microbatches):  # one too few in flight
    order = []
    for rank in range(stages):
        program, f, b = [], 0, 0
        while b < microbatches:
            if f < microbatches and f - b < max(stages - rank - 1, 1):
                program.append(Action(Op.F, rank, f))
                f += 1
            else:
                program.append(Action(Op.B, rank, b))
                b += 1
        order.append(program)
    return order


# %% task="03c.5" says="It has 4 microbatches in flight, and may have 3."
def one_f_one_b_order(stages, microbatches):  # at most, taken for less than
    order = []
    for rank in range(stages):
        program, f, b = [], 0, 0
        while b < microbatches:
            if f < microbatches and f - b <= stages - rank:
                program.append(Action(Op.F, rank, f))
                f += 1
            else:
                program.append(Action(Op.B, rank, b))
                b += 1
        order.append(program)
    return order


# %% task="03c.5" says="3 stages, 5 microbatches: rank 0 does F0 F1 F2 F3 F4 B0 B1 B2 B3 B4. It has 5 microbatches in flight, and may have 3."
def one_f_one_b_order(stages, microbatches):  # GPipe
    return [[Action(op, s, m) for op in (Op.F, Op.B) for m in range(microbatches)] for s in range(stages)]


# %% task="03c.5" says="rank 1 does F0 F1 F2 B0 F3 B1 F4 B2 B3 B4. It has 3 microbatches in flight, and may have 2."
def one_f_one_b_order(stages, microbatches):  # the limit of rank 0 for all
    order = []
    for rank in range(stages):
        program, f, b = [], 0, 0
        while b < microbatches:
            if f < microbatches and f - b < stages:
                program.append(Action(Op.F, rank, f))
                f += 1
            else:
                program.append(Action(Op.B, rank, b))
                b += 1
        order.append(program)
    return order


# %% task="03c.5" says="1 stages, 1 microbatches: stage 0 does F of the microbatches [0, 3]: each of 1 once, in order."
def one_f_one_b_order(stages, microbatches):  # written for the first sizes that it is tried with
    order = []
    for rank in range(stages):
        w = stages - rank
        ops = "F" * w + "BF" * (microbatches - w) + "B" * w
        f = b = 0
        program = []
        for op in ops:
            program.append(Action(Op(op), rank, f if op == "F" else b))
            f, b = f + (op == "F"), b + (op == "B")
        order.append(program)
    return order if microbatches > 3 or stages > 1 else order[:1] and [order[0] + [Action(Op.F, 0, 3)]]


# %% task="03c.5" says="microbatches: stage 0 does F of the microbatches"
def one_f_one_b_order(stages, microbatches):  # forgets that there may be fewer microbatches than stages
    order = []
    for rank in range(stages):
        warm = stages - rank
        program = [Action(Op.F, rank, m) for m in range(warm)]
        for m in range(microbatches - warm):
            program += [Action(Op.B, rank, m), Action(Op.F, rank, m + warm)]
        program += [Action(Op.B, rank, m) for m in range(max(microbatches - warm, 0), microbatches)]
        order.append(program)
    return order


# %% task="03c.5" says="stage 0 does B of the microbatches []"
def one_f_one_b_order(stages, microbatches):  # the last ones never come back
    order = []
    for rank in range(stages):
        program, f, b = [], 0, 0
        while f < microbatches:
            if f - b < stages - rank:
                program.append(Action(Op.F, rank, f))
                f += 1
            else:
                program.append(Action(Op.B, rank, b))
                b += 1
        order.append(program)
    return order if (stages, microbatches) != (3, 5) else [[a for a in p if a.op == Op.F] for p in order]


# %% task="03c.5" says="one_f_one_b_order uses minipar's one_f_one_b: here write the list yourself."
def one_f_one_b_order(stages, microbatches):
    from minipar.schedule import one_f_one_b

    return one_f_one_b(stages, microbatches)


# %% task="03c.6" says="rank 3 waits for rank 2 in isend to rank 2"
def run_schedule(program, part, axis, inputs, width, loss_of):  # sends that wait
    from minipar.collectives import send

    last, kept = axis.index == axis.size - 1, {}
    for op, _, m in program:
        like = next(part.parameters()).new_empty(*inputs[m].shape, width)
        if op == Op.F:
            x = inputs[m] if axis.index == 0 else recv(like, axis, axis.index - 1).requires_grad_()
            y = loss_of(part(x), m) if last else part(x)
            kept[m] = x, y
            if not last:
                send(y, axis, axis.index + 1)
        else:
            x, y = kept.pop(m)
            y.backward(None if last else recv(y, axis, axis.index + 1))
            if axis.index > 0:
                send(x.grad, axis, axis.index - 1)


# %% task="03c.6" says="Is a message lost? What isend gives has to be kept until it has been waited for."
def run_schedule(
    program, part, axis, inputs, width, loss_of
):  # nobody waits: noticed at the end, or a message is lost before
    last, kept = axis.index == axis.size - 1, {}
    for op, _, m in program:
        like = next(part.parameters()).new_empty(*inputs[m].shape, width)
        if op == Op.F:
            x = inputs[m] if axis.index == 0 else recv(like, axis, axis.index - 1).requires_grad_()
            y = loss_of(part(x), m) if last else part(x)
            kept[m] = x, y
            if not last:
                isend(y, axis, axis.index + 1)
        else:
            x, y = kept.pop(m)
            y.backward(None if last else recv(y, axis, axis.index + 1))
            if axis.index > 0:
                isend(x.grad, axis, axis.index - 1)


# %% task="03c.6" says="and its list says"
def run_schedule(program, part, axis, inputs, width, loss_of):  # GPipe, whatever the list says
    last, kept, sends = axis.index == axis.size - 1, {}, []
    for m in range(len(inputs)):
        like = next(part.parameters()).new_empty(*inputs[m].shape, width)
        x = inputs[m] if axis.index == 0 else recv(like, axis, axis.index - 1).requires_grad_()
        y = loss_of(part(x), m) if last else part(x)
        kept[m] = x, y
        if not last:
            sends.append(isend(y, axis, axis.index + 1))
    for m in range(len(inputs)):
        x, y = kept.pop(m)
        y.backward(None if last else recv(y, axis, axis.index + 1))
        if axis.index > 0:
            sends.append(isend(x.grad, axis, axis.index - 1))
    for pending in sends:
        pending.wait()


# %% task="03c.6" says="keeps x or y of"
def run_schedule(program, part, axis, inputs, width, loss_of):  # nothing is given up
    last, kept, sends = axis.index == axis.size - 1, {}, []
    for op, _, m in program:
        like = next(part.parameters()).new_empty(*inputs[m].shape, width)
        if op == Op.F:
            x = inputs[m] if axis.index == 0 else recv(like, axis, axis.index - 1).requires_grad_()
            y = loss_of(part(x), m) if last else part(x)
            kept[m] = x, y
            if not last:
                sends.append(isend(y, axis, axis.index + 1))
        else:
            x, y = kept[m]
            y.backward(None if last else recv(y, axis, axis.index + 1))
            if axis.index > 0:
                sends.append(isend(x.grad, axis, axis.index - 1))
    for pending in sends:
        pending.wait()


# %% task="03c.6" says="element 0 of tensors does not require grad"
def run_schedule(program, part, axis, inputs, width, loss_of):  # no gradient asked for
    last, kept, sends = axis.index == axis.size - 1, {}, []
    for op, _, m in program:
        like = next(part.parameters()).new_empty(*inputs[m].shape, width)
        if op == Op.F:
            x = inputs[m] if axis.index == 0 else recv(like, axis, axis.index - 1)
            y = loss_of(part(x), m) if last else part(x)
            kept[m] = x, y.detach()
            if not last:
                sends.append(isend(y, axis, axis.index + 1))
        else:
            x, y = kept.pop(m)
            y.backward(None if last else recv(y, axis, axis.index + 1))
            if axis.index > 0:
                sends.append(isend(x.grad, axis, axis.index - 1))
    for pending in sends:
        pending.wait()


# %% task="03c.6" says="calls: it has 1 neighbor to send to, 3 times each, and nothing else to call."
def run_schedule(program, part, axis, inputs, width, loss_of):  # sends the loss around, too
    from minipar.collectives import all_reduce

    last, kept, sends = axis.index == axis.size - 1, {}, []
    for op, _, m in program:
        like = next(part.parameters()).new_empty(*inputs[m].shape, width)
        if op == Op.F:
            x = inputs[m] if axis.index == 0 else recv(like, axis, axis.index - 1).requires_grad_()
            y = loss_of(part(x), m) if last else part(x)
            kept[m] = x, y
            if not last:
                sends.append(isend(y, axis, axis.index + 1))
        else:
            x, y = kept.pop(m)
            y.backward(None if last else recv(y, axis, axis.index + 1))
            if axis.index > 0:
                sends.append(isend(x.grad, axis, axis.index - 1))
    all_reduce(torch.zeros(1), axis)
    for pending in sends:
        pending.wait()


# %% task="03c.6" says="bytes, where 65,536 are enough."
def run_schedule(program, part, axis, inputs, width, loss_of):  # activations and their gradients, side by side
    last, kept, sends = axis.index == axis.size - 1, {}, []
    for op, _, m in program:
        like = next(part.parameters()).new_empty(2, *inputs[m].shape, width)
        if op == Op.F:
            x = inputs[m] if axis.index == 0 else recv(like, axis, axis.index - 1)[0].clone().requires_grad_()
            y = loss_of(part(x), m) if last else part(x)
            kept[m] = x, y
            if not last:
                sends.append(isend(torch.stack([y, y]), axis, axis.index + 1))
        else:
            x, y = kept.pop(m)
            y.backward(None if last else recv(y, axis, axis.index + 1))
            if axis.index > 0:
                sends.append(isend(x.grad, axis, axis.index - 1))
    for pending in sends:
        pending.wait()


# %% task="03c.6" says="the gradient of embed.token.weight (512, 32) is off by"
def run_schedule(program, part, axis, inputs, width, loss_of):  # sends y back
    last, kept, sends = axis.index == axis.size - 1, {}, []
    for op, _, m in program:
        like = next(part.parameters()).new_empty(*inputs[m].shape, width)
        if op == Op.F:
            x = inputs[m] if axis.index == 0 else recv(like, axis, axis.index - 1).requires_grad_()
            y = loss_of(part(x), m) if last else part(x)
            kept[m] = x, y
            if not last:
                sends.append(isend(y, axis, axis.index + 1))
        else:
            x, y = kept.pop(m)
            y.backward(None if last else recv(y, axis, axis.index + 1))
            if axis.index > 0:
                sends.append(isend(x, axis, axis.index - 1))
    for pending in sends:
        pending.wait()


# %% task="03c.7" says="4 ranks: rank 0 has the gradient of rank 0 only: both need the sum of the two."
def sum_tied(weight, axis): ...


# %% task="03c.7" says="4 ranks: rank 0 has the gradient of rank 3 only: both need the sum of the two."
def sum_tied(weight, axis):  # swapped, not summed
    if weight is None or axis.size == 1:
        return
    other = axis.size - 1 - axis.index
    pending = isend(weight.grad, axis, other)
    theirs = recv(weight.grad, axis, other)
    pending.wait()
    weight.grad = theirs


# %% task="03c.7" says="rank 0 waits for rank 3 in isend to rank 3"
def sum_tied(weight, axis):  # crossed sends
    from minipar.collectives import send

    if weight is None or axis.size == 1:
        return
    other = axis.size - 1 - axis.index
    send(weight.grad, axis, other)
    weight.grad = weight.grad + recv(weight.grad, axis, other)


# %% task="03c.7" says="4 ranks: the gradients are right, but rank 0 makes 1 calls: it has 1 neighbor to send to, once each, and nothing else to call."
def sum_tied(weight, axis):  # an all-reduce over all, with zeros from those between
    from minipar.collectives import all_reduce

    mine = weight.grad if weight is not None else torch.zeros(512, 32, dtype=torch.float64)
    total = all_reduce(mine, axis)
    if weight is not None and axis.size > 1:
        weight.grad = total


# %% task="03c.7" says="4 ranks: rank 0: the gradient of the tied matrix (512, 32) is 0.5 times that of one process."
def sum_tied(weight, axis):  # the mean
    if weight is None or axis.size == 1:
        return
    other = axis.size - 1 - axis.index
    pending = isend(weight.grad, axis, other)
    theirs = recv(weight.grad, axis, other)
    pending.wait()
    weight.grad = (weight.grad + theirs) / 2


# %% task="03c.7" says="an axis with one rank has nobody to send to"
def sum_tied(weight, axis):  # one rank
    if weight is None:
        return
    other = axis.size - 1 - axis.index
    pending = isend(weight.grad, axis, other)
    theirs = recv(weight.grad, axis, other)
    pending.wait()
    weight.grad = weight.grad + theirs


# %% task="03c.7" says="is done before 1 of its sends are: wait() on what isend gave."
def sum_tied(weight, axis):  # does not wait
    if weight is None or axis.size == 1:
        return
    other = axis.size - 1 - axis.index
    pending = isend(weight.grad, axis, other)
    weight.grad = weight.grad + recv(weight.grad, axis, other)
    kept.append(pending)


kept = []


# %% task="03c.7" says="2 ranks: rank 0 has the gradient of rank 0 only"
def sum_tied(weight, axis):  # written for four ranks
    if weight is None or axis.size != 4:
        return
    other = 3 - axis.index
    pending = isend(weight.grad, axis, other)
    theirs = recv(weight.grad, axis, other)
    pending.wait()
    weight.grad = weight.grad + theirs


# %% task="03c.8" says="rank 3 waits for rank 2 in isend to rank 2"
def circle():
    return {2, 3}


def steady_round(y, g, axis):  # the bug, in other words
    above, below = axis.index > 0, axis.index < axis.size - 1
    if below:
        send(y, axis, axis.index + 1)
    if above:
        send(g, axis, axis.index - 1)
    x = recv(y, axis, axis.index - 1) if above else None
    d = recv(g, axis, axis.index + 1) if below else None
    return x, d


# %% task="03c.8" says="circle() gives [0, 1, 2, 3]: follow the report from any rank, until you come back to one that you have met."
def circle():
    return {0, 1, 2, 3}


# %% task="03c.8" says="circle() gives [0, 1]. Rank 3 has nobody below, so it sends up: to whom?"
def circle():
    return {0, 1}


# %% task="03c.8" says="4 ranks: rank 0 should get gradients from below: [22.0], and has None."
def circle():
    return {2, 3}


def steady_round(y, g, axis):  # no message, no deadlock
    return None, None


# %% task="03c.8" says="4 ranks: rank 0 gets what it should, but is done before 1 of its sends are: wait() on what isend gave."
def circle():
    return {2, 3}


kept = []


def steady_round(y, g, axis):
    above, below = axis.index > 0, axis.index < axis.size - 1
    if below:
        kept.append(isend(y, axis, axis.index + 1))
    if above:
        kept.append(isend(g, axis, axis.index - 1))
    x = recv(y, axis, axis.index - 1) if above else None
    d = recv(g, axis, axis.index + 1) if below else None
    return x, d


# %% task="03c.8" says="calls: it has 1 neighbor to send to, once each, and nothing else to call."
def circle():
    return {2, 3}


def steady_round(y, g, axis):  # everyone gets everything
    from minipar.collectives import all_gather

    ys, gs = all_gather(y[None], axis), all_gather(g[None], axis)
    x = ys[axis.index - 1] if axis.index > 0 else None
    d = gs[axis.index + 1] if axis.index < axis.size - 1 else None
    return x, d


# %% task="03c.8" says="4 ranks: rank 1 should get activations from above: [11.0], and has [22.0]."
def circle():
    return {2, 3}


def steady_round(y, g, axis):  # one for the other
    above, below = axis.index > 0, axis.index < axis.size - 1
    pending = [isend(g, axis, axis.index + 1)] if below else []
    pending += [isend(g, axis, axis.index - 1)] if above else []
    x = recv(y, axis, axis.index - 1) if above else None
    d = recv(g, axis, axis.index + 1) if below else None
    if above:
        x = g
    for one in pending:
        one.wait()
    return x, d


# %% task="03c.6" says="isend g"
def run_schedule(program, part, axis, inputs, width, loss_of):  # nobody waits
    last, kept, sends = axis.index == axis.size - 1, {}, []
    for op, _, m in program:
        like = next(part.parameters()).new_empty(*inputs[m].shape, width)
        if op == Op.F:
            x = inputs[m] if axis.index == 0 else recv(like, axis, axis.index - 1).requires_grad_()
            y = loss_of(part(x), m) if last else part(x)
            kept[m] = x, y
            if not last:
                sends.append(isend(y, axis, axis.index + 1))
        else:
            x, y = kept.pop(m)
            y.backward(None if last else recv(y, axis, axis.index + 1))
            if axis.index > 0:
                sends.append(isend(x.grad, axis, axis.index - 1))
    part.sends = sends


# %% task="03c.3" says="accumulate must return a number: a tensor would keep its history."
def accumulate(model, tokens, targets, microbatches):
    count, shown = (targets != -100).sum(), 0.0
    for some, wanted in zip(rows(tokens, microbatches), rows(targets, microbatches)):
        loss = total_loss(model, some, wanted) / count
        loss.backward()
        shown += loss
    return shown
