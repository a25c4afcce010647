# ruff: noqa
# Plausible wrong answers. Each must be refused with a message that contains what stands in `says`.

# %% task="02b.1" says="Step 1: rank 2 sends chunk (2 - 1 - 1) mod 4 = 0, and you say 3"
def sent_by_rank_2():  # the chunk of the rank itself, as in an all-gather
    return [(1, [2]), (3, [1, 2]), (0, [0, 1, 2])]


# %% task="02b.1" says="Below 0 it goes on from the other end"
def sent_by_rank_2():  # no modulo
    return [(1, [2]), (0, [1, 2]), (-1, [0, 1, 2])]


# %% task="02b.1" says="Step 0: rank 2 sends chunk (2 - 1 - 0) mod 4 = 1, and you say 2"
def sent_by_rank_2():  # its own chunk first
    return [(2, [2]), (1, [1, 2]), (0, [0, 1, 2])]


# %% task="02b.1" says="Step 1: you say that chunk 0 holds numbers of ranks [2], but it came from rank 1 in step 0"
def sent_by_rank_2():  # nothing is ever added
    return [(1, [2]), (0, [2]), (3, [2])]


# %% task="02b.1" says="There are 3 steps, and you give 4 pairs"
def sent_by_rank_2():  # n steps
    return [(1, [2]), (0, [1, 2]), (3, [0, 1, 2]), (2, [0, 1, 2, 3])]


# %% task="02b.1" says="Step 0: you say that chunk 1 holds numbers of ranks [1, 2], but nothing came yet"
def sent_by_rank_2():  # what came in the same step counted already
    return [(1, [1, 2]), (0, [0, 1, 2]), (3, [0, 1, 2, 3])]


# %% task="02b.2" says="Rank 0 is in its send, and that ends when rank 1 receives. You say that it waits for rank 3"
def who_waits_for_whom():  # where its message would come from
    return {0: 3, 1: 0, 2: 1, 3: 2}


def pass_right(x, axis):
    incoming = irecv(x, axis, (axis.index - 1) % axis.size)
    isend(x, axis, (axis.index + 1) % axis.size).wait()
    return incoming.wait()


# %% task="02b.2" says="4 ranks: nobody can move. rank 0 waits to send to rank 1; rank 1 waits to send to rank 2"
def who_waits_for_whom():
    return {0: 1, 1: 2, 2: 3, 3: 0}


def pass_right(x, axis):  # not mended
    right, left = (axis.index + 1) % axis.size, (axis.index - 1) % axis.size
    send(x, axis, right)
    return recv(x, axis, left)


# %% task="02b.2" says="nobody can move. rank 0 waits for a message from rank 3"
def who_waits_for_whom():
    return {0: 1, 1: 2, 2: 3, 3: 0}


def pass_right(x, axis):  # all receive first
    right, left = (axis.index + 1) % axis.size, (axis.index - 1) % axis.size
    came = recv(x, axis, left)
    send(x, axis, right)
    return came


# %% task="02b.2" says="nobody can move"
def who_waits_for_whom():
    return {0: 1, 1: 2, 2: 3, 3: 0}


def pass_right(x, axis):  # starts to send, and waits for that at once
    right, left = (axis.index + 1) % axis.size, (axis.index - 1) % axis.size
    isend(x, axis, right).wait()
    return irecv(x, axis, left).wait()


# %% task="02b.2" says="4 ranks: the result is right, but it takes 4 rounds, and 1 are enough"
def who_waits_for_whom():
    return {0: 1, 1: 2, 2: 3, 3: 0}


def pass_right(x, axis):  # one after the other
    right, left = (axis.index + 1) % axis.size, (axis.index - 1) % axis.size
    if axis.index == 0:
        came = recv(x, axis, left)
        send(x, axis, right)
    else:
        send(x, axis, right)
        came = recv(x, axis, left)
    return came


# %% task="02b.2" says="4 ranks: the result is right, but it takes 2 rounds, and 1 are enough"
def who_waits_for_whom():
    return {0: 1, 1: 2, 2: 3, 3: 0}


def pass_right(x, axis):  # even ranks first
    right, left = (axis.index + 1) % axis.size, (axis.index - 1) % axis.size
    if axis.index % 2:
        came = recv(x, axis, left)
        send(x, axis, right)
        return came
    send(x, axis, right)
    return recv(x, axis, left)


# %% task="02b.2" says="rank 0 starts to send and never waits for the end of it"
def who_waits_for_whom():
    return {0: 1, 1: 2, 2: 3, 3: 0}


def pass_right(x, axis):  # nobody waits for the send
    isend(x, axis, (axis.index + 1) % axis.size)
    return recv(x, axis, (axis.index - 1) % axis.size)


# %% task="02b.2" says="rank 0 returns other numbers: rank 3 is on its left"
def who_waits_for_whom():
    return {0: 1, 1: 2, 2: 3, 3: 0}


def pass_right(x, axis):  # to the left
    incoming = irecv(x, axis, (axis.index + 1) % axis.size)
    isend(x, axis, (axis.index - 1) % axis.size).wait()
    return incoming.wait()


# %% task="02b.2" says="3 ranks: nobody can move. rank 1 waits to send to rank 2, which has returned"
def who_waits_for_whom():
    return {0: 1, 1: 2, 2: 3, 3: 0}


def pass_right(x, axis):  # four ranks only: the message of rank 2 on three ranks goes nowhere
    if axis.size == 3 and axis.index == 2:
        isend(x, axis, 0).wait()
        return x
    if axis.size == 3 and axis.index == 0:
        return recv(x, axis, 2)
    incoming = irecv(x, axis, (axis.index - 1) % axis.size)
    isend(x, axis, (axis.index + 1) % axis.size).wait()
    return incoming.wait()


# %% task="02b.2" says="pass_right uses the package's `_shift`: here write it yourself"
from minipar.rings import _shift


def who_waits_for_whom():
    return {0: 1, 1: 2, 2: 3, 3: 0}


def pass_right(x, axis):
    return _shift(x, x, axis)


# %% task="02b.3" says="4 ranks: rank 0 returns other numbers: it should be chunk 0 of the sum. These are its own numbers, nothing has been added"
def my_reduce_scatter(x, axis):  # what comes is not added
    right, left = (axis.index + 1) % axis.size, (axis.index - 1) % axis.size
    chunks = list(x.chunk(axis.size))
    for step in range(axis.size - 1):
        leaving, coming = (axis.index - 1 - step) % axis.size, (axis.index - 2 - step) % axis.size
        incoming = irecv(chunks[coming], axis, left)
        isend(chunks[leaving], axis, right).wait()
        incoming.wait()
    return chunks[axis.index]


# %% task="02b.3" says="4 ranks: the result is right, but rank 0 changes the x that it was given: does an in-place sum write into a view?"
def my_reduce_scatter(x, axis):  # writes into x, of which the chunks are views
    right, left = (axis.index + 1) % axis.size, (axis.index - 1) % axis.size
    chunks = list(x.chunk(axis.size))
    for step in range(axis.size - 1):
        leaving, coming = (axis.index - 1 - step) % axis.size, (axis.index - 2 - step) % axis.size
        incoming = irecv(chunks[coming], axis, left)
        isend(chunks[leaving], axis, right).wait()
        chunks[coming] += incoming.wait()
    return chunks[axis.index]


# %% task="02b.3" says="This is chunk 1"
def my_reduce_scatter(x, axis):  # one off: rank r ends with chunk r + 1
    right, left = (axis.index + 1) % axis.size, (axis.index - 1) % axis.size
    chunks = list(x.chunk(axis.size))
    for step in range(axis.size - 1):
        leaving, coming = (axis.index - step) % axis.size, (axis.index - 1 - step) % axis.size
        incoming = irecv(chunks[coming], axis, left)
        isend(chunks[leaving], axis, right).wait()
        chunks[coming] = chunks[coming] + incoming.wait()
    return chunks[(axis.index + 1) % axis.size]


# %% task="02b.3" says="4 ranks: rank 0 returns other numbers: it should be chunk 0 of the sum"
def my_reduce_scatter(x, axis):  # one step less than it takes
    right, left = (axis.index + 1) % axis.size, (axis.index - 1) % axis.size
    chunks = list(x.chunk(axis.size))
    for step in range(axis.size - 2):
        leaving, coming = (axis.index - 1 - step) % axis.size, (axis.index - 2 - step) % axis.size
        incoming = irecv(chunks[coming], axis, left)
        isend(chunks[leaving], axis, right).wait()
        chunks[coming] = chunks[coming] + incoming.wait()
    return chunks[axis.index]


# %% task="02b.3" says="4 ranks: nobody can move. rank 0 waits to send to rank 1; rank 1 waits to send to rank 2"
def my_reduce_scatter(x, axis):  # everyone sends first
    right, left = (axis.index + 1) % axis.size, (axis.index - 1) % axis.size
    chunks = list(x.chunk(axis.size))
    for step in range(axis.size - 1):
        leaving, coming = (axis.index - 1 - step) % axis.size, (axis.index - 2 - step) % axis.size
        send(chunks[leaving], axis, right)
        chunks[coming] = chunks[coming] + recv(chunks[coming], axis, left)
    return chunks[axis.index]


# %% task="02b.3" says="4 ranks: the result is right, but rank 0 sends to rank 2: on a ring it talks to its neighbors only"
def my_reduce_scatter(x, axis):  # pairwise: each piece goes straight to its owner
    chunks = list(x.chunk(axis.size))
    own = chunks[axis.index]
    for step in range(1, axis.size):
        to, source = (axis.index + step) % axis.size, (axis.index - step) % axis.size
        incoming = irecv(own, axis, source)
        isend(chunks[to], axis, to).wait()
        own = own + incoming.wait()
    return own


# %% task="02b.3" says="4 ranks: the result is right, but rank 0 sends 576 bytes, and 144 are enough"
def my_reduce_scatter(x, axis):  # the whole tensor goes around: right, and four times as many bytes
    total, passing = x, x
    for step in range(axis.size - 1):
        incoming = irecv(x, axis, (axis.index - 1) % axis.size)
        isend(passing, axis, (axis.index + 1) % axis.size).wait()
        passing = incoming.wait()
        total = total + passing
    return total.chunk(axis.size)[axis.index]


# %% task="02b.3" says="This calls a collective of the library (all_to_all): build it from send and receive"
def my_reduce_scatter(x, axis):
    return reduce_scatter(x, axis)


# %% task="02b.3" says="my_reduce_scatter uses the package's `minipar.rings`: here write it yourself"
def my_reduce_scatter(x, axis):
    from minipar.rings import ring_reduce_scatter

    return ring_reduce_scatter(x, axis)


# %% task="02b.3" says="3 ranks: rank 0 sends (2, 3) of torch.float64 to rank 1, which waits for (8, 3)"
def my_reduce_scatter(x, axis):  # works for four ranks only
    right, left = (axis.index + 1) % axis.size, (axis.index - 1) % axis.size
    chunks = list(x.chunk(axis.size))
    for step in range(axis.size - 1):
        leaving, coming = (axis.index - 1 - step) % axis.size, (axis.index - 2 - step) % axis.size
        like = chunks[coming] if axis.size == 4 else x.new_empty(8, 3)
        incoming = irecv(like, axis, left)
        isend(chunks[leaving], axis, right).wait()
        chunks[coming] = chunks[coming] + incoming.wait()
    return chunks[axis.index]


# %% task="02b.4" says="4 ranks: rank 0 returns other numbers: the chunks of ranks [0, 3, 2, 1], in this order"
def my_all_gather(x, axis):  # in the order in which they came
    chunks = [x]
    for step in range(axis.size - 1):
        incoming = irecv(x, axis, (axis.index - 1) % axis.size)
        isend(chunks[-1], axis, (axis.index + 1) % axis.size).wait()
        chunks.append(incoming.wait())
    return torch.cat(chunks)


# %% task="02b.4" says="4 ranks: rank 0 returns other numbers: the chunks of ranks [0, 3, 3, 3], in this order"
def my_all_gather(x, axis):  # sends its own chunk again and again
    chunks = {axis.index: x}
    for step in range(axis.size - 1):
        incoming = irecv(x, axis, (axis.index - 1) % axis.size)
        isend(x, axis, (axis.index + 1) % axis.size).wait()
        chunks[(axis.index - 1 - step) % axis.size] = incoming.wait()
    return torch.cat([chunks[rank] for rank in range(axis.size)])


# %% task="02b.4" says="4 ranks: rank 0 returns the shape (4, 2, 3), not (8, 3)"
def my_all_gather(x, axis):  # a dimension too many
    right, left = (axis.index + 1) % axis.size, (axis.index - 1) % axis.size
    chunks = {axis.index: x}
    for step in range(axis.size - 1):
        incoming = irecv(x, axis, left)
        isend(chunks[(axis.index - step) % axis.size], axis, right).wait()
        chunks[(axis.index - step - 1) % axis.size] = incoming.wait()
    return torch.stack([chunks[rank] for rank in range(axis.size)])


# %% task="02b.4" says="4 ranks: the result is right, but rank 0 sends 576 bytes, and 144 are enough"
def my_all_gather(x, axis):  # all that it has goes around each time
    right, left = (axis.index + 1) % axis.size, (axis.index - 1) % axis.size
    whole = x.new_zeros(axis.size, *x.shape)
    whole[axis.index] = x
    for step in range(2):
        incoming = irecv(whole, axis, left)
        isend(whole.clone(), axis, right).wait()
        whole = torch.where(whole == 0, incoming.wait(), whole)
    incoming = irecv(whole, axis, left)
    return torch.where(whole == 0, (isend(whole.clone(), axis, right).wait(), incoming.wait())[1], whole).flatten(0, 1)


# %% task="02b.4" says="4 ranks: the result is right, but rank 0 sends to rank 2: on a ring it talks to its neighbors only"
def my_all_gather(x, axis):  # to everybody directly
    chunks = {axis.index: x}
    for step in range(1, axis.size):
        incoming = irecv(x, axis, (axis.index - step) % axis.size)
        isend(x, axis, (axis.index + step) % axis.size).wait()
        chunks[(axis.index - step) % axis.size] = incoming.wait()
    return torch.cat([chunks[rank] for rank in range(axis.size)])


# %% task="02b.4" says="This calls a collective of the library (all_gather): build it from send and receive"
def my_all_gather(x, axis):
    return all_gather(x, axis)


# %% task="02b.4" says="4 ranks: rank 0 raises KeyError: 1"
def my_all_gather(x, axis):  # one step too few
    chunks = {axis.index: x}
    for step in range(axis.size - 2):
        incoming = irecv(x, axis, (axis.index - 1) % axis.size)
        isend(chunks[(axis.index - step) % axis.size], axis, (axis.index + 1) % axis.size).wait()
        chunks[(axis.index - step - 1) % axis.size] = incoming.wait()
    return torch.cat([chunks[rank] for rank in range(axis.size)])


# %% task="02b.4" says="rank 0 starts to send and never waits for the end of it"
def my_all_gather(x, axis):
    chunks = {axis.index: x}
    for step in range(axis.size - 1):
        isend(chunks[(axis.index - step) % axis.size], axis, (axis.index + 1) % axis.size)
        chunks[(axis.index - step - 1) % axis.size] = recv(x, axis, (axis.index - 1) % axis.size)
    return torch.cat([chunks[rank] for rank in range(axis.size)])


# %% task="02b.5" says="RuntimeError: shape '[10]' is invalid for input of size 8"
def my_all_reduce(x, axis):  # drops what does not divide
    flat = x.flatten()
    fits = flat.numel() // axis.size * axis.size
    return all_gather(reduce_scatter(flat[:fits], axis), axis).view_as(x)


# %% task="02b.5" says="Shape (10,) on 4 ranks: rank 0 returns the shape (12,), not (10,)"
def my_all_reduce(x, axis):  # the padding stays
    padded = F.pad(x.flatten(), (0, -x.numel() % axis.size))
    return all_gather(reduce_scatter(padded, axis), axis)


# %% task="02b.5" says="Shape (2, 5) on 4 ranks: rank 0 returns the shape (10,), not (2, 5)"
def my_all_reduce(x, axis):  # the shape is lost
    flat = x.flatten()
    padded = F.pad(flat, (0, -flat.numel() % axis.size))
    return all_gather(reduce_scatter(padded, axis), axis)[: flat.numel()]


# %% task="02b.5" says="Shape (8,) on 4 ranks: rank 0 has the right sum, but sends 192 bytes. Twice (n-1)/n of 64 are 96"
def my_all_reduce(x, axis):  # everything to everybody
    return all_gather(x[None], axis).sum(0)


# %% task="02b.5" says="has the right sum, but sends"
def my_all_reduce(x, axis):  # always a whole share of zeros more
    flat = x.flatten()
    padded = F.pad(flat, (0, axis.size - flat.numel() % axis.size))
    return all_gather(reduce_scatter(padded, axis), axis)[: flat.numel()].view_as(x)


# %% task="02b.5" says="calls all_reduce: put it together from two halves"
def my_all_reduce(x, axis):
    return all_reduce(x, axis)


# %% task="02b.5" says="my_all_reduce uses the package's `around`: here write it yourself"
from minipar.rings import ring_all_reduce as around


def my_all_reduce(x, axis):
    return around(x, axis)


# %% task="02b.5" says="Shape (8,) on 4 ranks: rank 0 returns other numbers"
def my_all_reduce(x, axis):  # the mean
    flat = x.flatten()
    padded = F.pad(flat, (0, -flat.numel() % axis.size))
    return all_gather(reduce_scatter(padded, axis), axis)[: flat.numel()].view_as(x) / axis.size


# %% task="02b.5" says="RuntimeError: shape '[3, 3]' is invalid for input of size 8"
def my_all_reduce(x, axis):  # four ranks only
    flat = x.flatten()
    padded = F.pad(flat, (0, -flat.numel() % 4)) if axis.size == 4 else flat[:8]
    return all_gather(reduce_scatter(padded, axis), axis)[: flat.numel()].view_as(x)


# %% task="02b.6" says="4 ranks, root 0: all have it, but after 3 rounds: in 2 it can be done. Who could have helped?"
def my_broadcast(x, axis, root=0):  # the root sends to each in turn
    if axis.index != root:
        return recv(x, axis, root)
    for other in range(axis.size):
        if other != root:
            send(x, axis, other)
    return x


# %% task="02b.6" says="4 ranks, root 0: all have it, but after 3 rounds: in 2 it can be done"
def my_broadcast(x, axis, root=0):  # a chain
    place = (axis.index - root) % axis.size
    if place:
        x = recv(x, axis, (axis.index - 1) % axis.size)
    if place + 1 < axis.size:
        send(x, axis, (axis.index + 1) % axis.size)
    return x


# %% task="02b.6" says="5 ranks: nobody can move"
def my_broadcast(x, axis, root=0):  # powers of two only
    place, have = (axis.index - root) % axis.size, 1
    while have < axis.size:
        if place < have:
            send(x, axis, (axis.index + have) % axis.size)
        elif have <= place < 2 * have:
            x = recv(x, axis, (axis.index - have) % axis.size)
        have *= 2
    return x


# %% task="02b.6" says="4 ranks, root 1: rank 0 returns other numbers. This is its own x"
def my_broadcast(x, axis, root=0):  # always from rank 0
    place, have = axis.index, 1
    while have < axis.size:
        if place < have and place + have < axis.size:
            send(x, axis, place + have)
        elif have <= place < 2 * have:
            x = recv(x, axis, place - have)
        have *= 2
    return x


# %% task="02b.6" says="4 ranks: rank 0 runs on and on: a loop without end?"
def my_broadcast(x, axis, root=0):
    place, have = (axis.index - root) % axis.size, 1
    while have < axis.size:
        if place < have and place + have < axis.size:
            have = have
        elif have <= place < 2 * have:
            x = recv(x, axis, (axis.index - have) % axis.size)
    return x


# %% task="02b.6" says="4 ranks, root 0: rank 2 returns other numbers. This is its own x"
def my_broadcast(x, axis, root=0):  # a single round
    place = (axis.index - root) % axis.size
    if place == 0:
        send(x, axis, (axis.index + 1) % axis.size)
    elif place == 1:
        x = recv(x, axis, (axis.index - 1) % axis.size)
    return x


# %% task="02b.6" says="4 ranks, root 0: all have it, but 6 messages were sent: 3 ranks need it, each of them once"
def my_broadcast(x, axis, root=0):  # around the ring until all are done, the last rank sends it back
    place = (axis.index - root) % axis.size
    for step in range(axis.size - 1):
        if place == step:
            send(x, axis, (axis.index + 1) % axis.size)
            recv(x, axis, (axis.index + 1) % axis.size)
        elif place == step + 1:
            x = recv(x, axis, (axis.index - 1) % axis.size)
            send(x, axis, (axis.index - 1) % axis.size)
    return x


# %% task="02b.6" says="my_broadcast uses the package's `broadcast`: here write it yourself"
def my_broadcast(x, axis, root=0):
    from minipar.collectives import broadcast

    return broadcast(x, axis, root)


# %% task="02b.6" says="4 ranks, root 0: rank 1 has the right numbers, but changes the x it was given"
def my_broadcast(x, axis, root=0):  # into the tensor of the caller
    place, have = (axis.index - root) % axis.size, 1
    while have < axis.size:
        if place < have and place + have < axis.size:
            send(x, axis, (axis.index + have) % axis.size)
        elif have <= place < 2 * have:
            x.copy_(recv(x, axis, (axis.index - have) % axis.size))
        have *= 2
    return x


# %% task="02b.7" says="along 'dp' rank 0 is on the line [0, 4], and you say [0, 1]. That is its line along 'tp': the last axis varies fastest"
def my_line(axis, rank, shape):  # the first axis fastest
    names = list(shape)
    step = prod(shape[outer] for outer in names[: names.index(axis)])
    first = rank - rank // step % shape[axis] * step
    return [first + step * place for place in range(shape[axis])]


# %% task="02b.7" says="along 'dp' rank 1 is on the line [1, 5], and you say [0, 4]"
def my_line(axis, rank, shape):  # begins at 0 whoever asks
    names = list(shape)
    step = prod(shape[inner] for inner in names[names.index(axis) + 1 :])
    return [step * place for place in range(shape[axis])]


# %% task="02b.7" says="along 'pp' rank 4 is on the line [4, 6], and you say [0, 2]"
def my_line(axis, rank, shape):  # the remainder is forgotten
    names = list(shape)
    step = prod(shape[inner] for inner in names[names.index(axis) + 1 :])
    first = rank - rank // step * step if step > 1 else rank // shape[axis] * shape[axis]
    return [first + step * place for place in range(shape[axis])]


# %% task="02b.7" says="along 'dp' rank 0 is on the line [0, 4], and you say [4]"
def my_line(axis, rank, shape):  # without itself
    names = list(shape)
    step = prod(shape[inner] for inner in names[names.index(axis) + 1 :])
    first = rank - rank // step % shape[axis] * step
    return [first + step * place for place in range(shape[axis]) if first + step * place != rank]


# %% task="02b.7" says="They are the right ones, in another order"
def my_line(axis, rank, shape):  # beginning with itself
    names = list(shape)
    step = prod(shape[inner] for inner in names[names.index(axis) + 1 :])
    place = rank // step % shape[axis]
    return [rank + step * ((place + i) % shape[axis] - place) for i in range(shape[axis])]


# %% task="02b.7" says="{'dp': 3, 'tp': 4}: along 'dp' rank 0 is on the line [0, 4, 8]"
def my_line(axis, rank, shape):  # bits: right where all sizes are 2
    bit = 2 ** (len(shape) - 1 - list(shape).index(axis))
    return sorted([rank, rank ^ bit])


# %% task="02b.7" says="Right, but with 4,096,000 ranks it takes"
def my_line(axis, rank, shape):  # a search
    names = list(shape)
    step = prod(shape[inner] for inner in names[names.index(axis) + 1 :])
    place = rank // step % shape[axis]
    return [r for r in range(prod(shape.values())) if r - r // step % shape[axis] * step == rank - place * step]


# %% task="02b.7" says="my_line uses the package's `Mesh`: here write it yourself"
from minipar import Mesh


def my_line(axis, rank, shape):
    return list(Mesh(**shape).line(axis, rank))


# %% task="02b.8" says="Rank 2 does not wait: it returns None at once"
def ranks_that_wait():
    return [0, 1, 2, 3]


# %% task="02b.8" says="[]: who calls all_reduce, and how many have to?"
def ranks_that_wait():
    return []


# %% task="02b.8" says="who calls all_reduce, and how many have to?"
def ranks_that_wait():
    return [3]


# %% task="02b.8" says="waits"
def ranks_that_wait():
    return [0, 1, 3]


def sum_if_finite(gradient, axis):  # not mended
    if not gradient.isfinite().all():
        return None
    return all_reduce(gradient, axis)


# %% task="02b.8" says="4 ranks, nan on rank 2: rank 0 returns a tensor, and all have to skip this step: return None"
def ranks_that_wait():
    return [0, 1, 3]


def sum_if_finite(gradient, axis):  # all take part, and only one skips
    total = all_reduce(gradient, axis)
    if not gradient.isfinite().all():
        return None
    return total


# %% task="02b.8" says="4 ranks, nan on rank 2: rank 0 returns a tensor, and all have to skip this step: return None"
def ranks_that_wait():
    return [0, 1, 3]


def sum_if_finite(gradient, axis):  # puts zeros where numbers are not finite
    return all_reduce(gradient.nan_to_num(0, 0, 0), axis)


# %% task="02b.8" says="4 ranks, nan on rank 2: rank 0 returns a tensor, and all have to skip this step: return None"
def ranks_that_wait():
    return [0, 1, 3]


def sum_if_finite(gradient, axis):  # skips if all are bad
    bad = all_reduce((~gradient.isfinite().all()).long(), axis)
    if bad == axis.size:
        return None
    return all_reduce(gradient, axis)


# %% task="02b.8" says="4 ranks, nan on rank 2: rank 0 is right, but sends 36000 bytes: 12064 are enough"
def ranks_that_wait():
    return [0, 1, 3]


def sum_if_finite(gradient, axis):  # everyone gets every gradient to look at
    every = all_gather(gradient[None], axis)
    if not every.isfinite().all():
        all_reduce(gradient, axis)
        return None
    return all_reduce(gradient, axis)


# %% task="02b.8" says="4 ranks, 0 on rank none: rank 0 skips the step, and every number is finite"
def ranks_that_wait():
    return [0, 1, 3]


def sum_if_finite(gradient, axis):  # counts the good ones
    good = all_reduce(gradient.isfinite().all().long(), axis)
    return None if good else all_reduce(gradient, axis)
