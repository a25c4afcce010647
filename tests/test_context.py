"""Attention over a shared sequence is attention: one process gives the same, and each rank does the same work."""

from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minipar import Mesh, World, connect, context, here, ledger, parallelize


@pytest.fixture(scope="module")
def world1():
    with World(1) as world:
        yield world


@pytest.fixture(scope="module")
def world3():
    with World(3) as world:
        yield world


@pytest.fixture(params=["world1", "world2", "world3", "world4"])
def world(request):
    return request.getfixturevalue(request.param)


def axis_of_all():
    return connect(Mesh(cp=here().size))["cp"]


def places(length, n, index):
    """Where in the sequence the tokens of a share are: chunks index and 2n-1-index of 2n."""
    chunks = torch.arange(length).chunk(2 * n)
    return torch.cat([chunks[index], chunks[2 * n - 1 - index]])


def drawn(*shapes, dtype=torch.float64):
    draw = torch.Generator().manual_seed(len(shapes))
    return [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for shape in shapes]


def tensors(rows, heads, kv_heads, length, head_dim, dtype=torch.float64):
    """q, k, v, and the gradient of the result. Some keys stand out, so that softmax has to be shifted online."""
    few, many = (rows, kv_heads, length, head_dim), (rows, heads, length, head_dim)
    q, k, v, gradient = drawn(many, few, few, many, dtype=dtype)
    return q, k * torch.linspace(1, 9, length, dtype=dtype)[:, None], v, gradient


def with_gradients(attention, q, k, v, gradient):
    """The result, and the gradients of q, k and v."""
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    out = attention(q, k, v)
    out.backward(gradient)
    return [out.detach(), q.grad, k.grad, v.grad]


def whole_attention(q, k, v, **options):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)


def ring(axis, is_causal, **options):
    return partial(context.ring_attention, axis=axis, is_causal=is_causal, **options)


def all_to_all(axis, is_causal, **options):
    whole = partial(whole_attention, is_causal=is_causal, **options)
    return partial(context.all_to_all_attention, axis=axis, attention=whole)


def on_shares(kind, is_causal, given, **options):
    """On a rank: this rank's shares of the result and of the gradients, from its shares of q, k, v."""
    axis = axis_of_all()
    mine = places(given[0].size(2), axis.size, axis.index)
    return with_gradients(kind(axis, is_causal, **options), *(x[:, :, mine] for x in given))


def put_together(answers, length):
    """From each rank's list of shares to a list of whole tensors."""
    order = torch.cat([places(length, len(answers), i) for i in range(len(answers))]).argsort()
    return [torch.cat(shares, 2)[:, :, order] for shares in zip(*answers, strict=True)]


def off(got, wanted):
    """The largest difference, relative to the largest element; infinite if shapes differ or anything is NaN."""
    if [x.shape for x in got] != [x.shape for x in wanted]:
        return float("inf")
    return max(
        ((x - y).abs().max() / y.abs().max()).nan_to_num(torch.inf).item() for x, y in zip(got, wanted, strict=True)
    )


def sizes(n, kind):
    """(rows, heads, kv heads, length, head_dim): chunks of one token and of several, heads that n does not divide."""
    heads = [(3, 3), (5, 1), (6, 2)] if kind is ring else [(n, n), (2 * n, 2 * n), (4 * n, 2 * n)]
    return [
        (2, *heads[0], 2 * n, 4),
        (1, *heads[1], 6 * n, 3),
        (3, *heads[2], 14 * n, 8),
    ]


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("kind", [ring, all_to_all], ids=lambda kind: kind.__name__)
def test_attention_on_shares_is_attention_over_the_whole_sequence(world, kind, is_causal):
    for size in sizes(world.n, kind):
        given = tensors(*size)
        for options in ({}, {"scale": 0.7}):
            whole = partial(whole_attention, is_causal=is_causal, **options)
            got = put_together(world.run(on_shares, kind, is_causal, given, **options), given[0].size(2))
            assert off(got, with_gradients(whole, *given)) <= 1e-12, (size, options)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
def test_the_formulas_give_what_the_kernel_gives(world2, is_causal):
    def difference(given):
        kernel = on_shares(ring, is_causal, given)
        with patch.object(context, "_fused", lambda *_: False):
            return off(on_shares(ring, is_causal, given), kernel)

    for dtype, most in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        assert max(world2.run(difference, tensors(2, 4, 2, 12, 8, dtype=dtype))) <= most


def test_values_may_be_of_another_width_than_keys(world2):
    q, k, v, gradient = tensors(2, 4, 2, 12, 8)
    given = q, k, v[..., :5], gradient[..., :5]
    got = put_together(world2.run(on_shares, ring, True, given), 12)
    assert off(got, with_gradients(partial(whole_attention, is_causal=True), *given)) <= 1e-12


def test_half_precision_is_as_close_as_in_one_process(world4):
    exact = with_gradients(partial(whole_attention, is_causal=True), *tensors(2, 4, 2, 64, 16))
    given = tensors(2, 4, 2, 64, 16, dtype=torch.bfloat16)
    alone = with_gradients(partial(whole_attention, is_causal=True), *given)
    got = put_together(world4.run(on_shares, ring, True, given), 64)
    assert all(x.dtype == torch.bfloat16 for x in got)
    for mine, theirs, truth in zip(got, alone, exact, strict=True):
        assert off([mine], [truth]) <= 1.5 * off([theirs], [truth])


def test_what_comes_around_the_ring_is_merged_in_32_bits(world4):
    """So the result is the exact one, rounded once, and gradients are no further off than one process has them."""
    given = tensors(2, 4, 2, 256, 16, dtype=torch.bfloat16)
    whole = partial(whole_attention, is_causal=True)
    exact, alone = with_gradients(whole, *(x.double() for x in given)), with_gradients(whole, *given)
    got = put_together(world4.run(on_shares, ring, True, given), 256)
    assert (got[0] == exact[0].bfloat16()).double().mean() > 0.99
    for mine, theirs, truth in zip(got, alone, exact, strict=True):
        assert (mine - truth).norm() < (theirs - truth).norm()


# The order of the sequence.


def test_a_share_is_two_chunks_one_early_one_late(world):
    n = world.n

    def shares(x):
        axis = axis_of_all()
        mine = context.zigzag(x, axis, 1)
        return mine, context.unzigzag(mine, axis, 1), context.unzigzag(context.zigzag(x, axis, -2), axis, -2)

    x = torch.arange(2 * 6 * n * 3).view(2, 6 * n, 3)
    for index, (mine, *wholes) in enumerate(world.run(shares, x)):
        assert mine.equal(x[:, places(6 * n, n, index)])
        assert all(whole.equal(x) for whole in wholes)


def model(x, w, attention, take, give):
    """Layers before, between and behind, with weights that all ranks have. Returns a sum over this rank's tokens, and
    one over what it makes of the whole sequence."""
    x = take((x @ w[0]).tanh())  # (B, T, C) -> (B, T/n, C)
    q, k, v = ((x @ m).unflatten(-1, (2, -1)).transpose(1, 2) for m in w[1:4])
    y = attention(q, k, v).transpose(1, 2).flatten(2)
    return (y @ w[4]).square().sum(), (give(y) @ w[5]).square().sum()


@pytest.mark.parametrize("kind", [ring, all_to_all], ids=lambda kind: kind.__name__)
def test_gradients_of_parameters_add_up_over_the_ranks(world2, kind):
    """A loss over a rank's own tokens counts once. One that every rank computes from the whole counts n times."""
    x, *weights = drawn((2, 12, 8), *[(8, 8)] * 6)

    def gradients(loss):
        mine = [w.clone().requires_grad_() for w in weights]
        loss(mine).backward()
        return [w.grad for w in mine]

    def on_a_rank():
        axis = axis_of_all()
        take, give = (partial(f, axis=axis, dim=1) for f in (context.zigzag, context.unzigzag))
        return gradients(lambda w: sum(model(x, w, kind(axis, True), take, give)))

    def alone(w):
        own, whole = model(x, w, partial(whole_attention, is_causal=True), lambda x: x, lambda x: x)
        return own + 2 * whole

    got = [torch.stack(parts).sum(0) for parts in zip(*world2.run(on_a_rank), strict=True)]
    assert off(got, gradients(alone)) <= 1e-12


# What is sent.


def booked(kind, is_causal, given):
    """On a rank: ((bytes, calls) forward, (bytes, calls) backward), the ops, and the bytes of its shares of q, k, v."""
    axis = axis_of_all()
    q, k, v, gradient = (x[:, :, places(x.size(2), axis.size, axis.index)].requires_grad_() for x in given)
    with ledger() as forward:
        out = kind(axis, is_causal)(q, k, v)
    with ledger() as backward:
        out.backward(gradient)
    ops = {e.op for e in forward.entries + backward.entries}
    sent = [(book.bytes("cp"), book.calls("cp")) for book in (forward, backward)]
    assert all(e.end >= e.start for e in forward.entries + backward.entries), "nothing is left under way"
    return sent, ops, (q.nbytes, k.nbytes, v.nbytes)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
def test_a_ring_sends_keys_and_values_once_forward_and_twice_backward(world, is_causal):
    n = world.n
    for size in sizes(n, ring):
        for sent, ops, (_, k, v) in world.run(booked, ring, is_causal, tensors(*size)):
            assert sent == [((n - 1) * (k + v), n - 1), (2 * (n - 1) * (k + v), 2 * (n - 1))]
            assert ops == ({"send"} if n > 1 else set())


def test_an_all_to_all_sends_all_but_a_share_of_each_tensor(world):
    n = world.n
    for size in sizes(n, all_to_all):
        for sent, ops, (q, k, v) in world.run(booked, all_to_all, True, tensors(*size)):
            assert sent == [((n - 1) * (2 * q + k + v) // n, 4 * (n > 1))] * 2
            assert ops == ({"all_to_all"} if n > 1 else set())


def test_the_order_sends_nothing_but_what_a_whole_sequence_needs(world):
    n = world.n

    def sent():
        axis = axis_of_all()
        x = torch.ones(2, 4 * n, 3, requires_grad=True)
        with ledger() as taking:
            share = context.zigzag(x, axis, 1)
            share.sum().backward(retain_graph=True)
        with ledger() as giving:
            context.unzigzag(share, axis, 1).sum().backward()
        calls = [(e.op, e.bytes) for e in giving.entries]
        return taking.calls(), calls, share.nbytes

    for taking, calls, share in world.run(sent):
        assert taking == 0
        assert calls == ([("all_gather", (n - 1) * share), ("reduce_scatter", (n - 1) * share)] if n > 1 else [])


def test_an_axis_of_one_rank_sends_nothing_and_takes_any_length():
    axis, given = connect(Mesh())["cp"], tensors(2, 4, 2, 7, 3)
    wanted = with_gradients(partial(whole_attention, is_causal=True), *given)
    with ledger() as book:
        for kind in (ring, all_to_all):
            assert off(with_gradients(kind(axis, True), *given), wanted) <= 1e-12
        for length in (1, 7):
            x = torch.arange(length)
            assert context.unzigzag(context.zigzag(x, axis, 0), axis, 0).equal(x)
    assert book.calls() == 0


class Told:
    """A transport that says what is asked of it."""

    def __init__(self, transport, events):
        self.transport, self.events = transport, events

    def send(self, *arguments):
        self.events.append("send")
        return self.transport.send(*arguments)

    def recv(self, *arguments):
        self.events.append("recv")
        return self.transport.recv(*arguments)


@contextmanager
def watched(computes):
    """Tell computes(q, block) of every attention to a block, forward and backward."""
    attend, gradients = context._attend, context._gradients

    def forward(q, block, scale):
        computes(q, block)
        return attend(q, block, scale)

    def backward(d_out, q, block, *more):
        computes(q, block)
        return gradients(d_out, q, block, *more)

    with patch.object(context, "_attend", forward), patch.object(context, "_gradients", backward):
        yield


def test_shares_travel_while_a_rank_computes(world3, world4):
    """Both the receive and the send of what the next step needs are started before the work of this one."""

    def events():
        happened, axis = [], axis_of_all()
        q, k, v, gradient = (x.requires_grad_() for x in tensors(1, 2, 2, 4, 2))
        with watched(lambda *_: happened.append("work")):
            told = replace(axis, transport=Told(axis.transport, happened))
            out = context.ring_attention(q, k, v, told)
            forward = happened.copy()
            happened.clear()
            out.backward(gradient)
        return forward, happened

    post = ["recv", "send"]
    for world in (world3, world4):
        last = world.n - 1
        for forward, backward in world.run(events):
            assert forward == [*post, "work"] * last + ["work"]
            assert backward == [
                event for step in range(world.n) for event in [*post * (step < last), "work", *post * (step > 0)]
            ]


# What is computed.


def pairs_computed(given, is_causal):
    """On a rank: how many scores of a head each step computes, and how many are not masked; forward, then backward."""
    axis, computed = axis_of_all(), []

    def count(q, block):
        seen = torch.ones(q.size(2), block.k.size(2))
        computed.append((seen.numel(), int((seen.tril() if block.masked else seen).sum())))

    q, k, v, gradient = (x[:, :, places(x.size(2), axis.size, axis.index)].requires_grad_() for x in given)
    with watched(count):
        context.ring_attention(q, k, v, axis, is_causal=is_causal).backward(gradient)
    return computed


def test_each_rank_computes_the_same_number_of_pairs_in_each_step(world):
    n, chunk = world.n, 3
    length = 2 * n * chunk
    own, half, whole = chunk * (2 * chunk + 1), 2 * chunk**2, (2 * chunk) ** 2
    given = tensors(1, 2, 1, length, 4)
    causal = [(whole, own)] + [(half, half)] * (n - 1)  # only its own share has a mask inside
    assert world.run(pairs_computed, given, True) == [causal * 2] * n
    assert context.causal_pairs(length, context.zigzag_order(n)) == [own + (n - 1) * half] * n
    assert world.run(pairs_computed, given, False) == [[(whole, whole)] * (2 * n)] * n


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
def test_zigzag_shares_the_pairs_evenly_and_contiguous_order_does_not(n):
    length = 10 * n
    causal = torch.ones(length, length).tril()
    zigzag = context.causal_pairs(length, context.zigzag_order(n))
    assert zigzag == [int(causal[places(length, n, i)].sum()) for i in range(n)]
    assert len(set(zigzag)) == 1 and sum(zigzag) == length * (length + 1) // 2
    contiguous = context.causal_pairs(length, range(2 * n))
    assert contiguous == [int(rows.sum()) for rows in causal.chunk(n)]
    assert contiguous[-1] - contiguous[0] == (n - 1) * (length // n) ** 2  # the last rank does most


# What is refused.


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda axis: context.zigzag(torch.ones(2, 18), axis, 1),
            r"sequence length 18 is not divisible by 2·cp = 4 chunks: 16 or 20 would fit",
        ),
        (
            lambda axis: context.zigzag(torch.ones(3), axis, 0),
            r"sequence length 3 is not divisible by 2·cp = 4 chunks: 4 would fit",
        ),
        (
            lambda axis: context.ring_attention(*[torch.ones(1, 2, 3, 4)] * 3, axis),
            r"sequence length 6 is not divisible by 2·cp = 4 chunks: 4 or 8 would fit",
        ),
        (
            lambda axis: context.ring_attention(torch.ones(1, 2, 4, 4), *[torch.ones(1, 2, 2, 4)] * 2, axis),
            r"shares of q, k, v have lengths 4, 2, 2: they must be equal",
        ),
        (
            lambda axis: context.ring_attention(torch.ones(1, 6, 2, 4), *[torch.ones(1, 4, 2, 4)] * 2, axis),
            r"4 kv heads do not divide the 6 heads; kv heads can be one of \[1, 2, 3, 6\]",
        ),
        (
            lambda axis: context.all_to_all_attention(*[torch.ones(1, 3, 2, 4)] * 3, axis, whole_attention),
            r"cp=2 does not divide the 3 heads; cp can be one of \[1, 3\], or use ring_attention",
        ),
        (
            lambda axis: context.all_to_all_attention(
                torch.ones(1, 4, 2, 4), *[torch.ones(1, 1, 2, 4)] * 2, axis, whole_attention
            ),
            r"cp=2 does not divide the 1 kv heads; cp can be one of \[1\], or use ring_attention",
        ),
        (
            lambda axis: context.all_to_all_attention(*[torch.ones(1, 2, 3, 4)] * 3, axis, whole_attention),
            r"sequence length 6 is not divisible by 2·cp = 4 chunks: 4 or 8 would fit",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_sent(world2, call, says):
    def refused():
        with ledger() as book, pytest.raises(ValueError, match=says):
            call(axis_of_all())
        return book.calls()

    assert world2.run(refused) == [0, 0]


def test_the_pairs_of_a_length_that_does_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"sequence length 30 is not divisible by 2·cp = 8 chunks: 24 or 32 would fit"):
        context.causal_pairs(30, range(8))


class Scaled(nn.Module):
    """Attention with a scale of its own."""

    def __init__(self):
        super().__init__()
        self.q, self.scale = nn.Linear(8, 8).double(), 3.0

    def forward(self, x):
        q = self.q(x).unsqueeze(1)
        return F.scaled_dot_product_attention(q, q, q, is_causal=True, scale=self.scale).squeeze(1)


class Scaling(nn.Module):
    tp_plan = {"embed": "sequence_split"}

    def __init__(self):
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(19, 8).double(), Scaled(), nn.Linear(8, 19).double()

    def forward(self, ids):
        return self.head(self.inner(self.embed(ids)))


def test_a_scale_of_the_models_own_goes_around_the_ring(world2):
    def apart():
        torch.manual_seed(0)
        model, tokens = Scaling(), torch.arange(32).view(4, 8) % 19
        return (parallelize(model, Mesh(cp=2))(tokens) - model(tokens)).abs().max().item()

    assert all(x <= 1e-12 for x in world2.run(apart))
