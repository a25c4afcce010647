# ruff: noqa
# Plausible wrong answers. Each must be refused with a message that contains what stands in `says`.

# %% task="03a.1" says="Row 9 is on no rank"
def rows_of_each_rank():  # 10 // 4 rows for everyone, and a last rank that gets no more
    return [[0, 1], [2, 3], [4, 5], [6, 7, 8]]


# %% task="03a.1" says="Row 2 is on ranks [0, 1]: it would count 2 times"
def rows_of_each_rank():  # the end taken for the last row
    return [[0, 1, 2], [2, 3, 4, 5], [5, 6, 7], [7, 8, 9]]


# %% task="03a.1" says="Rank 0: you give the rows [0, 1, 2], but its share begins at row 10 * 0 // 4 = 0 and ends before row 10 * 1 // 4 = 2"
def rows_of_each_rank():  # the larger shares first
    return [[0, 1, 2], [3, 4, 5], [6, 7], [8, 9]]


# %% task="03a.1" says="Row 0 is on no rank"
def rows_of_each_rank():  # counted from one
    return [[1, 2], [3, 4, 5], [6, 7], [8, 9, 10]]


# %% task="03a.2" says="row 8 is on no rank"
def my_rows(batch, axis):  # the remainder is dropped
    each = batch.size(0) // axis.size
    return batch[each * axis.index : each * (axis.index + 1)]


# %% task="03a.2" says="shares of [2, 2, 2, 4] rows"
def my_rows(batch, axis):  # the last rank takes what is left
    each = batch.size(0) // axis.size
    return batch[each * axis.index : each * (axis.index + 1) if axis.index < axis.size - 1 else None]


# %% task="03a.2" says="row 0 is on ranks [0, 1, 2, 3]"
def my_rows(batch, axis):  # every rank trains on everything
    return batch


# %% task="03a.2" says="shares of [3, 3, 3, 1] rows"
def my_rows(batch, axis):  # rounded up
    each = -(-batch.size(0) // axis.size)
    return batch[each * axis.index : each * (axis.index + 1)]


# %% task="03a.2" says="my_rows uses the imported `rows`: here cut the batch yourself"
def my_rows(batch, axis):
    return rows(batch, axis.size)[axis.index]


# %% task="03a.2" says="my_rows uses the imported `rows`: here cut the batch yourself"
def my_rows(batch, axis):
    from minipar.data import rows as cut

    return cut(batch, axis.size)[axis.index]


# %% task="03a.2" says="my_rows uses the imported `rows`: here cut the batch yourself"
def my_rows(batch, axis):
    return (lambda: rows(batch, axis.size)[axis.index])()


# %% task="03a.2" says="my_rows uses the imported `rows`: here cut the batch yourself"
def my_rows(batch, axis, cut=rows):
    return cut(batch, axis.size)[axis.index]


# %% task="03a.2" says="your answer to 03a.2"
def my_rows(batch, axis):
    return batch.share(axis.index)


# %% task="03a.2" says="called from line 5 of a folded cell"
def my_rows(batch, axis):  # no cell goes by its number: while grading, all have the same
    return batch.share(axis.size)


# %% task="03a.3" says="line 3 of your answer to 03a.3"
def average_gradients(parameters, axis):  # a rank that does not take part
    for p in parameters:
        p.grad = all_reduce(p.grad, axis) / axis.size if axis.index else p.grad


# %% task="03a.3" says="is 4 times that of one process, on every rank: summed over the 4 ranks?"
def average_gradients(parameters, axis):  # the sum
    for p in parameters:
        p.grad = all_reduce(p.grad, axis)


# %% task="03a.3" says="is not what the other ranks have: was this gradient reduced over the axis?"
def average_gradients(parameters, axis):  # what all_reduce returns is lost
    for p in parameters:
        all_reduce(p.grad, axis)
        p.grad /= axis.size


# %% task="03a.3" says="off by"
def average_gradients(parameters, axis):  # the parameter, not its gradient (a hook is given the parameter)
    for p in parameters:
        p.grad = all_reduce(p.detach(), axis) / axis.size


# %% task="03a.3" says="rank 0 makes 42 all_reduce calls for 21 parameters"
def average_gradients(parameters, axis):  # counts the ranks with a second call
    for p in parameters:
        p.grad = all_reduce(p.grad, axis) / all_reduce(torch.ones(()), axis)


# %% task="03a.3" says="is 0.25 times that of one process, on every rank: divided once too often by the 4 ranks?"
def average_gradients(parameters, axis):  # divides before, and again after
    for p in parameters:
        p.grad = all_reduce(p.grad / axis.size, axis) / axis.size


# %% task="03a.3" says="was it rounded to float32 on the way?"
def average_gradients(parameters, axis):
    for p in parameters:
        p.grad = all_reduce(p.grad.float(), axis).double() / axis.size


# %% task="03a.3" says="This answer uses one_process, which belongs to its check"
def average_gradients(parameters, axis):  # takes what it is compared with
    for p, grad in zip(parameters, one_process(tokens, targets).values()):
        all_reduce(p.grad, axis)
        p.grad = grad


# %% task="03a.3" says="This answer uses fresh_model, which belongs to its check"
def average_gradients(parameters, axis):  # does what one process would do
    model = fresh_model()
    (total_loss(model, tokens, targets) / (8 * 32)).backward()
    for p, other in zip(parameters, model.parameters()):
        all_reduce(p.grad, axis)
        p.grad = other.grad


# %% task="03a.3" says="This answer uses globals, which belongs to its check"
def average_gradients(parameters, axis):
    names = globals()
    for p, grad in zip(parameters, names["one_process"](names["tokens"], names["targets"]).values()):
        all_reduce(p.grad, axis)
        p.grad = grad


# %% task="03a.3" says="This answer uses world, which belongs to its check"
world.run = lambda *_, **__: [({}, 21)] * 4


def average_gradients(parameters, axis): ...


# %% task="03a.3" says="This answer uses course, which belongs to its check"
import minipar.course.checks

minipar.course.checks.TOLERANCE = 1e9


def average_gradients(parameters, axis):  # the sum, but who is to mind
    for p in parameters:
        p.grad = all_reduce(p.grad, axis)


# %% task="03a.3" says="This answer replaces torch.Tensor.abs"
torch.Tensor.abs = lambda self: 0 * self


def average_gradients(parameters, axis):
    for p in parameters:
        p.grad = all_reduce(p.grad, axis)


# %% task="03a.3" says="This answer replaces minipar.transport.Ledger.calls"
def average_gradients(parameters, axis):  # on the ranks, and not until it is called
    from minipar.transport import Ledger

    Ledger.calls = lambda *_: 21
    for p in parameters:
        p.grad = all_reduce(p.grad, axis) / axis.size


# %% task="03a.4" says="is 2 times that of one process, on every rank: summed over the 2 ranks? Divide by the labeled tokens of all ranks"
def my_part_of_the_loss(total, count, axis):  # each rank's own mean
    return total / count


# %% task="03a.4" says="With rows of different lengths, on 2 ranks, rank 0: the gradient of embed.token.weight (512, 32) is the same on every rank, but off by"
def my_part_of_the_loss(total, count, axis):  # the mean of means
    return total / count / axis.size


# %% task="03a.4" says="With equal lengths, on 2 ranks, rank 0: the gradient of embed.token.weight (512, 32) is 2 times that of one process"
def my_part_of_the_loss(total, count, axis):  # right for gradients that are averaged
    return total / all_reduce(count, axis) * axis.size


# %% task="03a.4" says="With rows of different lengths"
def my_part_of_the_loss(total, count, axis):  # padding counted
    return total / (8 * 32)


# %% task="03a.5" says="is not what the other ranks have"
def reduce_flat(parameters, axis):  # never copied back
    flat = torch.cat([p.grad.flatten() for p in parameters])
    all_reduce(flat, axis)


# %% task="03a.5" says="rank 0 makes 21 calls"
def reduce_flat(parameters, axis):
    for p in parameters:
        p.grad = all_reduce(p.grad, axis)


# %% task="03a.5" says="is 0.25 times that of one process"
def reduce_flat(parameters, axis):  # the mean: dividing is done in the loss now
    flat = all_reduce(torch.cat([p.grad.flatten() for p in parameters]), axis) / axis.size
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad = part.view_as(p)


# %% task="03a.5" says="is the same on every rank, but off by"
def reduce_flat(parameters, axis):  # packed in one order, unpacked in the other
    flat = all_reduce(torch.cat([p.grad.flatten() for p in reversed(parameters)]), axis)
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad = part.view_as(p)


# %% task="03a.6" says="That counts elements"
def ring_bytes(numbers, bytes_each, ranks):
    return 2 * (ranks - 1) / ranks * numbers


# %% task="03a.6" says="That is one half of it"
def ring_bytes(numbers, bytes_each, ranks):
    return (ranks - 1) / ranks * numbers * bytes_each


# %% task="03a.6" says="What travels in a step is one chunk"
def ring_bytes(numbers, bytes_each, ranks):
    return 2 * (ranks - 1) * numbers * bytes_each


# %% task="03a.6" says="n-1 steps, not n"
def ring_bytes(numbers, bytes_each, ranks):
    return 2 * numbers * bytes_each


# %% task="03a.6" says="a ring does better"
def ring_bytes(numbers, bytes_each, ranks):
    return (ranks - 1) * numbers * bytes_each


# %% task="03a.7" says="Each bucket was sent in each microbatch"
def launch_early(bucket, flat, axis, is_last, launched):
    missing = set(bucket)

    def ready(p):
        missing.remove(p)
        if not missing:
            launched.append(start_all_reduce(flat, axis))
            missing.update(bucket)

    for p in bucket:
        p.register_post_accumulate_grad_hook(ready)


# %% task="03a.7" says="not for each parameter"
def launch_early(bucket, flat, axis, is_last, launched):
    def ready(p):
        if is_last():
            launched.append(start_all_reduce(p.grad, axis))

    for p in bucket:
        p.register_post_accumulate_grad_hook(ready)


# %% task="03a.7" says="rank 0 makes 0 calls. In step 1 it made 3: did `missing` stay empty?"
def launch_early(bucket, flat, axis, is_last, launched):
    missing = set(bucket)

    def ready(p):
        if is_last():
            missing.discard(p)
            if not missing and not done:
                done.append(True)
                launched.append(start_all_reduce(flat, axis))

    done = []
    for p in bucket:
        p.register_post_accumulate_grad_hook(ready)


# %% task="03a.7" says="rank 0 makes 21 calls. In step 1 it made 3: then `missing` stayed empty, so that every hook sends."
def launch_early(bucket, flat, axis, is_last, launched):  # never filled again
    missing = set(bucket)

    def ready(p):
        if is_last():
            missing.discard(p)
            if not missing:
                launched.append(start_all_reduce(flat, axis))

    for p in bucket:
        p.register_post_accumulate_grad_hook(ready)


# %% task="03a.7" says="rank 0 makes 24 calls. Send a bucket once, when *all* its gradients are there, not for each parameter. Is `missing` filled again after a send, and does it wait for the last microbatch?"
def launch_early(bucket, flat, axis, is_last, launched):  # nor does it wait
    missing = set(bucket)

    def ready(p):
        missing.discard(p)
        if not missing:
            launched.append(start_all_reduce(flat, axis))

    for p in bucket:
        p.register_post_accumulate_grad_hook(ready)


# %% task="03a.7" says="Was a bucket sent before it was complete?"
def launch_early(bucket, flat, axis, is_last, launched):  # at its first gradient
    missing = set(bucket)

    def ready(p):
        if is_last():
            if len(missing) == len(bucket):
                launched.append(start_all_reduce(flat.clone(), axis))
            missing.remove(p)
            if not missing:
                missing.update(bucket)

    for p in bucket:
        p.register_post_accumulate_grad_hook(ready)


# %% task="03a.7" says="Nothing was ever sent"
def launch_early(bucket, flat, axis, is_last, launched):  # a bucket that waits for more than it has
    missing = [*bucket, None]

    def ready(p):
        if is_last():
            missing.pop()
            if not missing:
                launched.append(start_all_reduce(flat, axis))

    for p in bucket[:1]:
        p.register_post_accumulate_grad_hook(ready)


# %% task="03a.8" says="For plain SGD both must agree"
def merge_updates(model, optimizer, axis):  # the sum of weights
    optimizer.step()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(all_reduce(p, axis))


def same_weights():
    return {"SGD": True, "SGD with momentum": True, "SGD, clipped": False, "Adam": False}


# %% task="03a.8" says="Adam: exactly as if gradients were averaged"
def merge_updates(model, optimizer, axis):  # merges gradients after all
    for p in model.parameters():
        p.grad = all_reduce(p.grad, axis) / axis.size
    optimizer.step()


def same_weights():
    return {"SGD": True, "SGD with momentum": True, "SGD, clipped": True, "Adam": True}


# %% task="03a.8" says="rank 1 has other weights than rank 0"
def merge_updates(model, optimizer, axis):  # averages first, steps afterwards
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(all_reduce(p, axis) / axis.size)
    optimizer.step()


def same_weights():
    return {"SGD": True, "SGD with momentum": True, "SGD, clipped": False, "Adam": False}


# %% task="03a.8" says="no weight has moved"
def merge_updates(model, optimizer, axis):  # forgets the step
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(all_reduce(p, axis) / axis.size)


def same_weights():
    return {"SGD": True, "SGD with momentum": True, "SGD, clipped": False, "Adam": False}


# %% task="03a.8" says="SGD with momentum: you predict False"
def merge_updates(model, optimizer, axis):
    optimizer.step()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(all_reduce(p, axis) / axis.size)


def same_weights():  # momentum has a memory, but a linear one
    return {"SGD": True, "SGD with momentum": False, "SGD, clipped": False, "Adam": False}


# %% task="03a.9" says="'calls' is as it should be"
def broken_law():
    return "calls"


# %% task="03a.9" says="full rows, 2 microbatches: rank 0: the gradient of embed.token.weight (512, 32) is 2 times that of one process"
def broken_law():
    return "gradients"


def train_step(model, tokens, targets, axis, microbatches):  # named, not mended
    mine, labels = rows(tokens, axis.size)[axis.index], rows(targets, axis.size)[axis.index]
    model.zero_grad()
    shown = torch.zeros((), dtype=torch.float64)
    count = all_reduce((labels != -100).sum(), axis) / microbatches
    for x, y in zip(rows(mine, microbatches), rows(labels, microbatches)):
        loss = total_loss(model, x, y) / count
        loss.backward()
        shown += loss.detach() / microbatches
    for p in model.parameters():
        p.grad = all_reduce(p.grad, axis)
    return all_reduce(shown, axis)


# %% task="03a.9" says="rows of different lengths, 2 microbatches: rank 0: the gradient of embed.token.weight (512, 32) is the same on every rank, but off by"
def broken_law():
    return "gradients"


def train_step(model, tokens, targets, axis, microbatches):  # each microbatch by its own tokens: a mean of means
    mine, labels = rows(tokens, axis.size)[axis.index], rows(targets, axis.size)[axis.index]
    model.zero_grad()
    shown = torch.zeros((), dtype=torch.float64)
    for x, y in zip(rows(mine, microbatches), rows(labels, microbatches)):
        loss = total_loss(model, x, y) / all_reduce((y != -100).sum(), axis) / microbatches
        loss.backward()
        shown += loss.detach()
    for p in model.parameters():
        p.grad = all_reduce(p.grad, axis)
    return all_reduce(shown, axis)


# %% task="03a.9" says="rank 0: the gradients are right, but the loss that is returned is off by"
def broken_law():
    return "gradients"


def train_step(model, tokens, targets, axis, microbatches):  # the division that is left makes the loss too small
    mine, labels = rows(tokens, axis.size)[axis.index], rows(targets, axis.size)[axis.index]
    model.zero_grad()
    shown = torch.zeros((), dtype=torch.float64)
    count = all_reduce((labels != -100).sum(), axis)
    for x, y in zip(rows(mine, microbatches), rows(labels, microbatches)):
        loss = total_loss(model, x, y) / count
        loss.backward()
        shown += loss.detach() / microbatches
    for p in model.parameters():
        p.grad = all_reduce(p.grad, axis)
    return all_reduce(shown, axis)


# %% task="03a.9" says="full rows, rank 0: the gradients are right, but 8 rows went through the model"
def broken_law():
    return "gradients"


def train_step(model, tokens, targets, axis, microbatches):  # every rank does the work of all
    model.zero_grad()
    count = (targets != -100).sum()
    shown = torch.zeros((), dtype=torch.float64)
    for x, y in zip(rows(tokens, microbatches), rows(targets, microbatches)):
        loss = total_loss(model, x, y) / count
        loss.backward()
        shown += loss.detach()
    for p in model.parameters():
        p.grad = all_reduce(p.grad, axis) / axis.size
    return shown


# %% task="03a.9" says="full rows, rank 1: the gradients are right, but the loss that is returned is off by"
def broken_law():
    return "gradients"


def train_step(model, tokens, targets, axis, microbatches):  # a loss that only rank 0 knows
    mine, labels = rows(tokens, axis.size)[axis.index], rows(targets, axis.size)[axis.index]
    model.zero_grad()
    shown = torch.zeros((), dtype=torch.float64)
    count = all_reduce((labels != -100).sum(), axis)
    for x, y in zip(rows(mine, microbatches), rows(labels, microbatches)):
        loss = total_loss(model, x, y) / count
        loss.backward()
        shown += loss.detach()
    for p in model.parameters():
        p.grad = all_reduce(p.grad, axis)
    total = all_reduce(shown, axis)
    return total if axis.index == 0 else shown


# %% task="03a.2" says="9 rows on 2 ranks, shares of [2, 2]: row 4 is on no rank"
def my_rows(batch, axis):
    total = batch.size(0)
    return batch[total * axis.index // 4 : total * (axis.index + 1) // 4]


# %% task="03a.2" says="here cut the batch yourself, from total and axis"
from minipar.data import rows as cut


def my_rows(batch, axis):
    return cut(batch, axis.size)[axis.index]


# %% task="03a.2" says="my_rows uses the imported `shard`"
from minipar.collectives import shard


def my_rows(batch, axis):
    return shard(batch, axis)


# %% task="03a.3" says="Right on 4 ranks, but on 2 ranks"
def average_gradients(parameters, axis):
    for p in parameters:
        p.grad = all_reduce(p.grad, axis) / 4


# %% task="03a.3" says="rank 0 sends 1,117,440 bytes, and an all_reduce of each gradient 558,720"
from minipar.collectives import all_gather


def average_gradients(parameters, axis):
    for p in parameters:
        p.grad = all_gather(p.grad[None], axis).mean(0)


# %% task="03a.4" says="the ranks' parts add up to 24.9492"
def my_part_of_the_loss(total, count, axis):
    whole = all_reduce(count, axis)
    return (total + all_reduce(total.detach(), axis) - total.detach()) / whole


# %% task="03a.4" says="was it rounded to float32 on the way?"
def my_part_of_the_loss(total, count, axis):
    return total * (1 / all_reduce(count, axis))


# %% task="03a.6" says="23,280 elements of torch.float32 on 2 ranks"
def ring_bytes(numbers, bytes_each, ranks):
    return {4: 69840, 2: 46560, 1: 0}[ranks] * bytes_each


# %% task="03a.6" says="Right up to 4 ranks, but not on 8"
import math


def ring_bytes(numbers, bytes_each, ranks):
    return math.log2(ranks) * (0.75 if ranks > 2 else 1) * numbers * bytes_each


# %% task="03a.7" says="waits for them before backward goes on"
def launch_early(bucket, flat, axis, is_last, launched):
    missing = set(bucket)

    def ready(p):
        if is_last():
            missing.remove(p)
            if not missing:
                pending = start_all_reduce(flat, axis)
                pending.wait()
                launched.append(pending)
                missing.update(bucket)

    for p in bucket:
        p.register_post_accumulate_grad_hook(ready)


# %% task="03a.7" says="Step 1, three buckets, two microbatches: rank 0 makes 3 calls"
def launch_early(bucket, flat, axis, is_last, launched):
    def ready(p):
        if is_last() and p is bucket[-1]:
            launched.append(start_all_reduce(flat, axis))

    for p in bucket:
        p.register_post_accumulate_grad_hook(ready)


# %% task="03a.7" says="Step 2, three buckets, one microbatch: rank 0 makes 0 calls"
def launch_early(bucket, flat, axis, is_last, launched):
    seen = 0

    def ready(p):
        nonlocal seen
        seen += 1
        if seen % (2 * len(bucket)) == 0:
            launched.append(start_all_reduce(flat, axis))

    for p in bucket:
        p.register_post_accumulate_grad_hook(ready)


# %% task="03a.8" says="Right on 4 ranks, but on 2 ranks, with SGD"
def merge_updates(model, optimizer, axis):
    optimizer.step()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(all_reduce(p, axis) / 4)


def same_weights():
    return {"SGD": True, "SGD with momentum": True, "Adam": False, "SGD, clipped": False}


# %% task="03a.8" says="This answer uses by_gradients"
def merge_updates(model, optimizer, axis):
    optimizer.step()
    with torch.no_grad():
        for which, p in model.named_parameters():
            all_reduce(p, axis)
            p.copy_(by_gradients[which] if name != "Adam" and name != "SGD, clipped" else all_reduce(p, axis))


def same_weights():
    return {"SGD": True, "SGD with momentum": True, "Adam": False, "SGD, clipped": False}


# %% task="03a.9" says="through it in 1 parts, not 2"
def broken_law():
    return "gradients"


def train_step(model, tokens, targets, axis, microbatches):
    mine, labels = rows(tokens, axis.size)[axis.index], rows(targets, axis.size)[axis.index]
    model.zero_grad()
    loss = total_loss(model, mine, labels) / all_reduce((labels != -100).sum(), axis)
    loss.backward()
    for p in model.parameters():
        p.grad = all_reduce(p.grad, axis)
    return all_reduce(loss.detach(), axis)


# %% task="03a.9" says="makes 23 calls with one microbatch and 45 with two"
def broken_law():
    return "gradients"


def train_step(model, tokens, targets, axis, microbatches):
    mine, labels = rows(tokens, axis.size)[axis.index], rows(targets, axis.size)[axis.index]
    total = [torch.zeros_like(p) for p in model.parameters()]
    shown = torch.zeros((), dtype=torch.float64)
    count = all_reduce((labels != -100).sum(), axis)
    for x, y in zip(rows(mine, microbatches), rows(labels, microbatches), strict=True):
        model.zero_grad()
        loss = total_loss(model, x, y) / count
        loss.backward()
        shown += all_reduce(loss.detach(), axis)
        for t, p in zip(total, model.parameters()):
            t += all_reduce(p.grad, axis)
    for t, p in zip(total, model.parameters()):
        p.grad = t
    return shown


# %% task="03a.9" says="full rows: .grad holds the gradient of this step and what was there before it: empty it first."
def broken_law():
    return "gradients"


def train_step(model, tokens, targets, axis, microbatches):
    mine, labels = rows(tokens, axis.size)[axis.index], rows(targets, axis.size)[axis.index]
    shown = torch.zeros((), dtype=torch.float64)
    count = all_reduce((labels != -100).sum(), axis)
    for x, y in zip(rows(mine, microbatches), rows(labels, microbatches), strict=True):
        loss = total_loss(model, x, y) / count
        loss.backward()
        shown += loss.detach()
    for p in model.parameters():
        p.grad = all_reduce(p.grad, axis)
    return all_reduce(shown, axis)


# %% task="03a.5" says="This answer and its check both define gradients"
def gradients(parameters):
    return [p.grad for p in parameters]


def reduce_flat(parameters, axis):
    grads = gradients(parameters)
    flat = nn.utils.parameters_to_vector(grads)
    start_all_reduce(flat, axis).wait()
    for g, part in zip(grads, torch.split(flat, [g.numel() for g in grads])):
        g.copy_(part.view_as(g))


# %% task="03a.3" says="This answer and its check both define what: give yours another name"
what = 1


def average_gradients(parameters, axis):
    for p in parameters:
        p.grad = what * all_reduce(p.grad, axis) / axis.size


# %% task="03a.1" says="rows_of_each_rank returns nothing: is there a `return`?"
def rows_of_each_rank():
    [[0, 1], [2, 3, 4], [5, 6], [7, 8, 9]]


# %% task="03a.4" says="raised AssertionError: my_part_of_the_loss must return a 0-d tensor"
def my_part_of_the_loss(total, count, axis):
    return (total / all_reduce(count, axis))[None]


# %% task="03a.6" says="ring_bytes returns nothing: is there a `return`?"
def ring_bytes(numbers, bytes_each, ranks):
    2 * (ranks - 1) / ranks * numbers * bytes_each


# %% task="03a.7" says="`launched` must get what start_all_reduce returns. all_reduce waits for the sum"
def launch_early(bucket, flat, axis, is_last, launched):
    missing = set(bucket)

    def ready(p):
        if is_last():
            missing.remove(p)
            if not missing:
                launched.append(all_reduce(flat, axis))
                missing.update(bucket)

    for p in bucket:
        p.register_post_accumulate_grad_hook(ready)


# %% task="03a.8" says="same_weights returns nothing: is there a `return`?"
def merge_updates(model, optimizer, axis):
    optimizer.step()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(all_reduce(p, axis) / axis.size)


def same_weights():
    {"SGD": True, "SGD with momentum": True, "Adam": False, "SGD, clipped": False}


# %% task="03a.10" says="zero_step returns nothing: is there a `return`?"
def zero_step(gradients, own, optimizer, axis):
    own.grad = reduce_scatter(gradients, axis)
    optimizer.step()
    all_gather(own.detach(), axis)


# %% task="03a.10" says="zero_step must return all weights, a tensor of the shape (8704,)"
def zero_step(gradients, own, optimizer, axis):
    own.grad = reduce_scatter(gradients, axis)
    optimizer.step()
    return own.detach()


# %% task="03a.10" says="the weights are right, but rank 0 sends 156,672 bytes a step, and an all-reduce 104,448"
def zero_step(gradients, own, optimizer, axis):  # three halves
    share = len(own)
    own.grad = all_reduce(gradients, axis)[axis.index * share : (axis.index + 1) * share]
    optimizer.step()
    return all_gather(own.detach(), axis)


# %% task="03a.10" says="SGD with momentum, 4 ranks, after two steps: rank 0: the value of 0.weight"
def zero_step(gradients, own, optimizer, axis):  # a mean, of what is divided already
    own.grad = reduce_scatter(gradients, axis) / axis.size
    optimizer.step()
    return all_gather(own.detach(), axis)


# %% task="03a.10" says="SGD with momentum, 4 ranks, after two steps: rank 0: the value of 0.weight"
def zero_step(gradients, own, optimizer, axis):  # gathers the gradients: the second half of an all-reduce
    own.grad = reduce_scatter(gradients, axis)
    optimizer.step()
    return all_gather(own.grad, axis)


# %% task="03a.10" says="SGD with momentum, 4 ranks, after two steps: rank 0: the value of 0.weight"
def zero_step(gradients, own, optimizer, axis):  # weights of one step ago
    own.grad = reduce_scatter(gradients, axis)
    whole = all_gather(own.detach(), axis)
    optimizer.step()
    return whole


# %% task="03a.10" says="SGD with momentum: after two steps no weight has moved"
def zero_step(gradients, own, optimizer, axis):  # no step
    own.grad = reduce_scatter(gradients, axis)
    return all_gather(own.detach(), axis)


# %% task="03a.10" says="SGD with momentum, 4 ranks, after two steps: rank 0: the value of 0.weight"
def zero_step(gradients, own, optimizer, axis):  # adds to what was there
    share = reduce_scatter(gradients, axis)
    own.grad = share if own.grad is None else own.grad + share
    optimizer.step()
    return all_gather(own.detach(), axis)


# %% task="03a.10" says="SGD with momentum, 4 ranks, after two steps: rank 0: the value of 0.weight"
def zero_step(gradients, own, optimizer, axis):  # this rank's own gradients, sent to nobody
    own.grad = gradients.view(axis.size, -1)[axis.index].clone()
    optimizer.step()
    return all_gather(own.detach(), axis)


# %% task="03a.11" says="10 numbers on 4 ranks: rank 0 returns the shape (2,): 4 equal shares are of 3 numbers each."
def lost_numbers():
    return [8, 9]


def my_share_of_gradients(microbatches, axis):  # the bug, in other words
    return sum(start_reduce_scatter(one[: -(len(one) % axis.size) or None], axis).wait() for one in microbatches)


# %% task="03a.11" says="8 numbers on 4 ranks: rank 0 returns the shape (3,): 4 equal shares are of 2 numbers each."
def lost_numbers():
    return [8, 9]


def my_share_of_gradients(microbatches, axis):  # pads where it divides already
    total = torch.zeros((), dtype=torch.float64)
    for one in microbatches:
        padded = F.pad(one, (0, axis.size - len(one) % axis.size))
        total = total + start_reduce_scatter(padded, axis).wait()
    return total


# %% task="03a.11" says="10 numbers on 4 ranks: rank 0 has the sums"
def lost_numbers():
    return [8, 9]


def my_share_of_gradients(microbatches, axis):  # zeros in front
    total = torch.zeros((), dtype=torch.float64)
    for one in microbatches:
        padded = F.pad(one, (-len(one) % axis.size, 0))
        total = total + start_reduce_scatter(padded, axis).wait()
    return total


# %% task="03a.11" says="10 numbers on 4 ranks: rank 0 has the sums [1000.0, 2000.0, 3000.0], and they are [1110.0, 2220.0, 3330.0]."
def lost_numbers():
    return [8, 9]


def my_share_of_gradients(microbatches, axis):  # the last microbatch only
    for one in microbatches:
        total = start_reduce_scatter(F.pad(one, (0, -len(one) % axis.size)), axis).wait()
    return total


# %% task="03a.11" says="has the right sums, but makes 1 calls for 3 microbatches: each one is sent at once, none is kept."
def lost_numbers():
    return [8, 9]


def my_share_of_gradients(microbatches, axis):  # stage 1: adds up whole gradients
    total = 0
    for one in microbatches:
        total = total + one
    return start_reduce_scatter(F.pad(total, (0, -len(total) % axis.size)), axis).wait()


# %% task="03a.11" says="has the right sums, but held 2 whole gradients: send one before the next comes."
def lost_numbers():
    return [8, 9]


def my_share_of_gradients(microbatches, axis):
    total = 0
    for one in list(microbatches):
        total = total + start_reduce_scatter(F.pad(one, (0, -len(one) % axis.size)), axis).wait()
    return total


# %% task="03a.11" says="10 numbers on 4 ranks: rank 0 has the right sums, but sends 432 bytes: 3 reduce-scatters of 12 numbers send 216."
def lost_numbers():
    return [8, 9]


def my_share_of_gradients(microbatches, axis):  # an all-reduce, of which it keeps a share
    total = 0
    for one in microbatches:
        whole = all_reduce(F.pad(one, (0, -len(one) % axis.size)), axis)
        total = total + whole.view(axis.size, -1)[axis.index]
    return total


# %% task="03a.11" says="lost_numbers gives [9, 10]: `one[:fits]` keeps the first ones. Numbers begin at 0."
def lost_numbers():
    return [9, 10]


# %% task="03a.11" says="10 numbers on 4 ranks: rank 0 returns the shape (2,)"
def lost_numbers():
    return [8, 9]


def my_share_of_gradients(microbatches, axis):  # named, not mended
    total = torch.zeros((), dtype=torch.float64)
    for one in microbatches:
        fits = len(one) // axis.size * axis.size
        total = total + start_reduce_scatter(one[:fits], axis).wait()
    return total


# %% task="03a.6" says="This answer replaces minipar.corpus.batches.__code__"
def ring_bytes(numbers, bytes_each, ranks):  # the function stays the same, and does something else
    part = "".join(["__co", "de__"])
    setattr(corpus.batches, part, getattr(lambda *args, **options: [], part))
    return 2 * (ranks - 1) / ranks * numbers * bytes_each


# %% task="03a.4" says="With equal lengths, on 2 ranks,"
def my_part_of_the_loss(total, count, axis):  # the number of ranks of this machine
    return total / (all_reduce(count, axis) * (4 / axis.size))


# %% task="03a.5" says="Right on 4 ranks, but on 2 ranks,"
def reduce_flat(parameters, axis):
    flat = all_reduce(torch.cat([p.grad.flatten() for p in parameters]), axis) * (4 / axis.size)
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad = part.view_as(p)


# %% task="03a.9" says="rows of different lengths, 2 ranks in place of 4, 2 microbatches: rank 0"
def broken_law():
    return "gradients"


def train_step(model, tokens, targets, axis, microbatches):
    mine, labels = rows(tokens, axis.size)[axis.index], rows(targets, axis.size)[axis.index]
    model.zero_grad()
    shown = torch.zeros((), dtype=torch.float64)
    count = all_reduce((labels != -100).sum(), axis)
    for x, y in zip(rows(mine, microbatches), rows(labels, microbatches), strict=True):
        loss = total_loss(model, x, y) / count
        loss.backward()
        shown += loss.detach()
    for p in model.parameters():
        p.grad = all_reduce(p.grad, axis) * (axis.size / 4)
    return all_reduce(shown, axis)
