# ruff: noqa
# Plausible wrong answers. Each must be refused with a message that contains what stands in `says`.

# %% task="03e.1" says="parts of 9, 3 keys, scores +1,000: the output is not a finite number: does e**1000 occur in it"
def merge_parts(out, lse, more, more_lse):  # the sums themselves
    a, b = lse.exp(), more_lse.exp()
    return (a * out + b * more) / (a + b), (a + b).log()


# %% task="03e.1" says="parts of 6, 6 keys: the output is off by"
def merge_parts(out, lse, more, more_lse):  # the mean of both
    return (out + more) / 2, torch.logaddexp(lse, more_lse)


# %% task="03e.1" says="is each part weighted by its own sum?"
def merge_parts(out, lse, more, more_lse):  # weights taken for each other
    total = torch.logaddexp(lse, more_lse)
    return out * (more_lse - total).exp() + more * (lse - total).exp(), total


# %% task="03e.1" says="parts of 6, 6 keys: the output is right, but the logarithm is off by"
def merge_parts(out, lse, more, more_lse):  # the larger one in place of the sum
    total = torch.logaddexp(lse, more_lse)
    return out * (lse - total).exp() + more * (more_lse - total).exp(), torch.maximum(lse, more_lse)


# %% task="03e.1" says="merge_parts returns two things: output, logarithm."
def merge_parts(out, lse, more, more_lse):  # the output alone
    total = torch.logaddexp(lse, more_lse)
    return out * (lse - total).exp() + more * (more_lse - total).exp()


# %% task="03e.1" says="is not a finite number"
def merge_parts(out, lse, more, more_lse):  # relative to the first part's, which may be none
    b = (more_lse - lse).exp()
    return (out + b * more) / (1 + b), lse + (1 + b).log()


# %% task="03e.1" says="parts of 6, 6 keys: the output is off by"
def merge_parts(out, lse, more, more_lse):  # logarithms taken for sums
    total = lse + more_lse
    return (lse * out + more_lse * more) / total, total


# %% task="03e.2" says="2 ranks, rank 1: the output is not that of whole attention"
def ring_forward(q, k, v, axis, attend, merge):  # its own keys only
    return attend(q, k, v, causal=True)[0]


# %% task="03e.2" says="2 ranks, rank 0: the output is not that of whole attention"
def ring_forward(q, k, v, axis, attend, merge):  # later tokens are seen
    right, left = (axis.index + 1) % axis.size, (axis.index - 1) % axis.size
    block = torch.stack([k, v])
    out, lse = attend(q, k, v, causal=True)
    for step in range(1, axis.size):
        going, coming = isend(block, axis, to=right), irecv(block, axis, source=left)
        block = coming.wait()
        going.wait()
        out, lse = merge(out, lse, *attend(q, *block))
    return out


# %% task="03e.2" says="It attends to 1 blocks, and sees something of 2."
def ring_forward(q, k, v, axis, attend, merge):  # off by one: the first rank's block is left out
    right, left = (axis.index + 1) % axis.size, (axis.index - 1) % axis.size
    block = torch.stack([k, v])
    out, lse = attend(q, k, v, causal=True)
    for step in range(1, axis.size):
        going, coming = isend(block, axis, to=right), irecv(block, axis, source=left)
        block = coming.wait()
        going.wait()
        if step < axis.index or axis.size == 2 and step <= axis.index:
            out, lse = merge(out, lse, *attend(q, *block))
    return out


# %% task="03e.2" says="it sends 2 M, and (n - 1) M = 1 M is enough"
def ring_forward(q, k, v, axis, attend, merge):  # the block comes home
    right, left = (axis.index + 1) % axis.size, (axis.index - 1) % axis.size
    block = torch.stack([k, v])
    out, lse = attend(q, k, v, causal=True)
    for step in range(1, axis.size + 1):
        going, coming = isend(block, axis, to=right), irecv(block, axis, source=left)
        block = coming.wait()
        going.wait()
        if step <= axis.index:
            out, lse = merge(out, lse, *attend(q, *block))
    return out


# %% task="03e.2" says="the output is right, but it sends 2 messages: 1 are enough, with k and v in one."
def ring_forward(q, k, v, axis, attend, merge):  # keys and values one by one
    right, left = (axis.index + 1) % axis.size, (axis.index - 1) % axis.size
    out, lse = attend(q, k, v, causal=True)
    for step in range(1, axis.size):
        going = [isend(x, axis, to=right) for x in (k, v)]
        coming = [irecv(x, axis, source=left) for x in (k, v)]
        k, v = [x.wait() for x in coming]
        [x.wait() for x in going]
        if step <= axis.index:
            out, lse = merge(out, lse, *attend(q, k, v))
    return out


# %% task="03e.2" says="M beside its own share: let go of a block once it is passed on."
def ring_forward(q, k, v, axis, attend, merge):  # all keys first, then attention
    right, left = (axis.index + 1) % axis.size, (axis.index - 1) % axis.size
    blocks = [torch.stack([k, v])]
    for _ in range(1, axis.size):
        going, coming = isend(blocks[-1], axis, to=right), irecv(blocks[-1], axis, source=left)
        blocks.append(coming.wait())
        going.wait()
    out, lse = attend(q, k, v, causal=True)
    for block in blocks[1 : axis.index + 1]:
        out, lse = merge(out, lse, *attend(q, *block))
    return out


# %% task="03e.2" says="the output is right, but it attends 2 times, and sees something of 1 blocks."
def ring_forward(q, k, v, axis, attend, merge):  # computes what it may not see, and throws it away
    right, left = (axis.index + 1) % axis.size, (axis.index - 1) % axis.size
    block = torch.stack([k, v])
    out, lse = attend(q, k, v, causal=True)
    for step in range(1, axis.size):
        going, coming = isend(block, axis, to=right), irecv(block, axis, source=left)
        block = coming.wait()
        going.wait()
        both = merge(out, lse, *attend(q, *block))
        out, lse = both if step <= axis.index else (out, lse)
    return out


# %% task="03e.2" says="4 ranks, rank 0: the output is not that of whole attention"
def ring_forward(q, k, v, axis, attend, merge):  # goes around to the left
    right, left = (axis.index + 1) % axis.size, (axis.index - 1) % axis.size
    block = torch.stack([k, v])
    out, lse = attend(q, k, v, causal=True)
    for step in range(1, axis.size):
        going, coming = isend(block, axis, to=left), irecv(block, axis, source=right)
        block = coming.wait()
        going.wait()
        if step <= axis.index if axis.size == 2 else step >= axis.size - axis.index - 1:
            out, lse = merge(out, lse, *attend(q, *block))
    return out


# %% task="03e.2" says="rank"
def ring_forward(q, k, v, axis, attend, merge):  # everyone waits for a block before it sends one
    right, left = (axis.index + 1) % axis.size, (axis.index - 1) % axis.size
    block = torch.stack([k, v])
    out, lse = attend(q, k, v, causal=True)
    for step in range(1, axis.size):
        coming = irecv(block, axis, source=left).wait()
        isend(block, axis, to=right).wait()
        block = coming
        if step <= axis.index:
            out, lse = merge(out, lse, *attend(q, *block))
    return out


# %% task="03e.3" says="16 positions on 2 ranks: the ranks have 36, 100 pairs, and should have 68 each."
def zigzag_positions(length, ranks):  # contiguous
    size = length // ranks
    return [list(range(rank * size, (rank + 1) * size)) for rank in range(ranks)]


# %% task="03e.3" says="16 positions on 2 ranks: the ranks have 64, 72 pairs"
def zigzag_positions(length, ranks):  # dealt out like cards
    return [list(range(rank, length, ranks)) for rank in range(ranks)]


# %% task="03e.3" says="the work is even, but rank 0 should have chunk 0 and another one, both whole."
def zigzag_positions(length, ranks):  # back and forth like a snake
    deal = [[p for p in range(length) if p % (2 * ranks) in (rank, 2 * ranks - 1 - rank)] for rank in range(ranks)]
    return deal


# %% task="03e.3" says="16 positions on 2 ranks: the ranks have 52, 84 pairs"
def zigzag_positions(length, ranks):  # chunk r and chunk r + n
    size = length // (2 * ranks)
    chunk = lambda c: list(range(c * size, (c + 1) * size))
    return [chunk(rank) + chunk(rank + ranks) for rank in range(ranks)]


# %% task="03e.3" says="16 positions on 2 ranks: position"
def zigzag_positions(length, ranks):  # 2n - r in place of 2n - 1 - r
    size = length // (2 * ranks)
    chunk = lambda c: [p for p in range(c * size, (c + 1) * size) if p < length]
    return [chunk(rank) + chunk(2 * ranks - rank) for rank in range(ranks)]


# %% task="03e.3" says="the positions of rank 0 do not ascend"
def zigzag_positions(length, ranks):  # the late chunk backwards
    size = length // (2 * ranks)
    return [
        list(range(rank * size, (rank + 1) * size))
        + list(range(length - 1 - rank * size, length - 1 - (rank + 1) * size, -1))
        for rank in range(ranks)
    ]


# %% task="03e.3" says="the work is even, but rank 0 should have chunk 0 and another one, both whole."
def zigzag_positions(length, ranks):  # from the middle
    size = length // (2 * ranks)
    chunk = lambda c: list(range(c * size, (c + 1) * size))
    return [chunk(rank) + chunk(2 * ranks - 1 - rank) for rank in reversed(range(ranks))]


# %% task="03e.4" says="right_by_chance gives 16: rank 0 has the positions 0 to 7 and 56 to 63, and gives them 0 to 15."
def right_by_chance():  # all of rank 0
    return 16


# %% task="03e.4" says="rows of 64 on 4 ranks: rank 0 has wrong vectors for 8 of its 16 tokens"
def right_by_chance():
    return 8


def embed_share(tokens, words, places, axis):  # contiguous positions
    mine = zigzag(tokens, axis, dim=1)
    n = mine.size(1)
    return words[mine] + places[axis.index * n : (axis.index + 1) * n]


# %% task="03e.4" says="rows of 40 on 4 ranks: rank 0 has wrong vectors for 5 of its 10 tokens"
def right_by_chance():
    return 8


def embed_share(tokens, words, places, axis):  # cuts the whole table, which is longer than the row
    mine = zigzag(tokens, axis, dim=1)
    return (
        words[mine] + zigzag(places, axis, dim=0)[list(range(mine.size(1) // 2)) + list(range(-(mine.size(1) // 2), 0))]
    )


# %% task="03e.4" says="rows of 64 on 4 ranks: rank 0 returns the shape (2, 64, 6), and should be (2, 16, 6)."
def right_by_chance():
    return 8


def embed_share(tokens, words, places, axis):  # not cut
    return words[tokens] + places[: tokens.size(1)]


# %% task="03e.4" says="rows of 64 on 4 ranks: rank 0 has wrong vectors for 16 of its 16 tokens"
def right_by_chance():
    return 8


def embed_share(tokens, words, places, axis):  # positions left out
    return words[zigzag(tokens, axis, dim=1)]


# %% task="03e.4" says="rank 0 sends"
def right_by_chance():
    return 8


def embed_share(tokens, words, places, axis):  # vectors are sent around that everyone can make
    x = words[tokens] + places[: tokens.size(1)]
    irecv_, isend_ = (
        irecv(x, axis, source=(axis.index - 1) % axis.size),
        isend(x, axis, to=(axis.index + 1) % axis.size),
    )
    x = irecv_.wait()
    isend_.wait()
    return zigzag(x, axis, dim=1)
