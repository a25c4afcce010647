"""Collectives are arithmetic: over all ranks each gives what one process computes, and sends what its formula says."""

import os
import socket
import stat
import struct
import sys
import time
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from laws import batch_of, model_of

from minipar import Config, Mesh, World, connect, gpt, ledger, one_f_one_b, parallelize, rings, zero_bubble_h1
from minipar import collectives as c
from minipar.board import DEPTH
from minipar.data import Gradients
from minipar.deferral import WeightGradients
from minipar.transport import Done, Torch


@pytest.fixture(scope="module")
def world3():
    with World(3) as world:
        yield world


@pytest.fixture(params=["world2", "world3", "world4"])
def world(request):
    return request.getfixturevalue(request.param)


def axis_of_all():
    return c.everyone()


def inputs(n, *shape, dtype=torch.float64):
    """One tensor for each rank. Whole numbers, so that sums are exact in any order."""
    draw = torch.Generator().manual_seed(n)
    return [torch.randint(-50, 50, shape, generator=draw).to(dtype) for _ in range(n)]


def apply(op, tensors, /, **options):
    """On a rank: the result for this rank's tensor, whether the input is unchanged, what was booked."""
    axis = axis_of_all()
    x = tensors[axis.index]
    before = x.clone()
    with ledger() as book:
        y = op(x, axis, **options)
    return y, x.equal(before) and x.untyped_storage().data_ptr() != y.untyped_storage().data_ptr(), book


def results(world, collective, tensors, /, **options):
    answers = world.run(apply, collective, tensors, **options)
    assert all(untouched for _, untouched, _ in answers), "a collective is out of place"
    return [y for y, _, _ in answers]


def cut(x, n, dim):
    """Shares that differ by one at most: [size·i/n, size·(i+1)/n)."""
    edges = [x.size(dim) * i // n for i in range(n + 1)]
    return [x.narrow(dim, a, b - a) for a, b in pairwise(edges)]


def same(got, wanted):
    return len(got) == len(wanted) and all(
        a.shape == b.shape and a.dtype == b.dtype and a.equal(b) for a, b in zip(got, wanted, strict=True)
    )


SHAPES = [(7, 5, 4), (8, 8), (1,), (3, 1)]  # n does not divide all of them
DTYPES = [torch.float64, torch.float32, torch.int64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["sum", "max", "min"])
def test_all_reduce_gives_everyone_the_sum_or_an_extreme(world, op, dtype):
    for shape in [*SHAPES, ()]:
        tensors = inputs(world.n, *shape, dtype=dtype)
        stack = torch.stack(tensors)
        wanted = {"sum": stack.sum(0), "max": stack.amax(0), "min": stack.amin(0)}[op]
        assert same(results(world, c.all_reduce, tensors, op=op), [wanted] * world.n)


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_all_gather_puts_shares_side_by_side(world, dim):
    tensors = inputs(world.n, 3, 5, 4)
    assert same(results(world, c.all_gather, tensors, dim=dim), [torch.cat(tensors, dim)] * world.n)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_uneven_shares_are_put_together_as_shard_cut_them(world, dim):
    whole = inputs(1, 7, 5, 9)[0]
    shares = cut(whole, world.n, dim)
    assert same(world.run(lambda: c.shard(whole, axis_of_all(), dim)), shares)
    assert same(results(world, c.all_gather, shares, dim=dim, size=whole.size(dim)), [whole] * world.n)


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_reduce_scatter_gives_each_its_share_of_the_sum(world, dim):
    for shape in [(7, 5, 6), (8, 4, 12), (2, 2, 2)]:
        tensors = inputs(world.n, *shape)
        wanted = cut(torch.stack(tensors).sum(0), world.n, dim)
        assert same(results(world, c.reduce_scatter, tensors, dim=dim), wanted)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_all_to_all_is_a_transposition_of_shares(world, dim):
    for shape in [(12, 12, 12), (7, 5, 9)]:
        tensors = inputs(world.n, *shape)
        shares = [cut(x, world.n, dim) for x in tensors]
        wanted = [torch.cat([shares[source][i] for source in range(world.n)], dim) for i in range(world.n)]
        assert same(results(world, c.all_to_all, tensors, dim=dim), wanted)


def test_broadcast_gives_everyone_the_tensor_of_the_root(world):
    tensors = inputs(world.n, 3, 4)
    for root in range(world.n):
        assert same(results(world, c.broadcast, tensors, root=root), [tensors[root]] * world.n)


def test_tensors_need_not_be_contiguous(world):
    def turned(op, x, axis, **options):
        return op(x.transpose(0, 2), axis, **options)

    for op in (c.all_reduce, c.all_gather, c.reduce_scatter, c.all_to_all, c.broadcast):
        tensors = inputs(world.n, 4, 5, 6)
        wanted = results(world, op, [x.transpose(0, 2).contiguous() for x in tensors])
        assert same(results(world, partial(turned, op), tensors), wanted)


def test_messages_arrive_whole_and_in_order_from_each_side(world):
    """Each rank sends two messages to each other rank, first both, then receives both."""

    def exchange():
        axis = axis_of_all()
        others = [i for i in range(axis.size) if i != axis.index]
        sent = [c.isend(torch.full((2, 3), 10.0 * axis.index + k), axis, i) for i in others for k in (1, 2)]
        got = {i: [c.recv(torch.empty(2, 3), axis, i)[0, 0].item() for _ in (1, 2)] for i in others}
        for pending in sent:
            pending.wait()
        return got

    for me, got in enumerate(world.run(exchange)):
        assert got == {i: [10.0 * i + 1, 10.0 * i + 2] for i in range(world.n) if i != me}


def test_a_sender_may_be_far_ahead(world2):
    """The board remembers the last calls along a line only: a message that it has forgotten is not a mismatch."""

    def exchange(messages):
        axis = connect(Mesh(dp=2))["dp"]
        xs = [torch.full((1 + i % 3,), float(i)) for i in range(messages)]
        if axis.index == 0:
            sending = [c.isend(x, axis, 1) for x in xs]
            c.recv(torch.empty(1), axis, 1)  # comes after all of them
            for pending in sending:
                pending.wait()
            return True
        # Wait for news by another way, so that this rank makes its first call when all messages are on the board.
        c.send(torch.zeros(1), axis, 0)
        return all(c.recv(torch.empty_like(x), axis, 0).equal(x) for x in xs)

    assert world2.run(exchange, 3 * DEPTH + 1) == [True, True]


def test_blocking_messages_go_around(world):
    def around():
        axis = axis_of_all()
        right, left = (axis.index + 1) % axis.size, (axis.index - 1) % axis.size
        token = torch.zeros(1)
        if axis.index == 0:
            c.send(token, axis, right)
            return c.recv(token, axis, left).item()
        token = c.recv(token, axis, left) + axis.index
        c.send(token, axis, right)
        return token.item()

    answers = world.run(around)
    assert answers[0] == answers[-1] == sum(range(world.n))


@pytest.mark.parametrize("mesh", [Mesh(dp=2, tp=2), Mesh(pp=2, tp=2), Mesh(dp=4), Mesh(dp=2, pp=2)], ids=str)
def test_each_axis_adds_over_its_own_ranks_only(world4, mesh):
    def sums():
        return {
            name: c.all_reduce(torch.tensor(2.0 ** c.here().rank), axis).item() for name, axis in connect(mesh).items()
        }

    for rank, answers in enumerate(world4.run(sums)):
        assert answers == {name: sum(2.0**r for r in mesh.line(name, rank)) for name in mesh.shape}


def test_an_axis_of_one_rank_is_like_any_other_and_sends_nothing():
    axis, x = connect(Mesh())["tp"], torch.randn(4, 6)
    with ledger() as book:
        for op in (c.all_reduce, c.all_gather, c.reduce_scatter, c.all_to_all, c.broadcast, c.shard):
            y = op(x, axis)
            assert y.equal(x) and (y.data_ptr() != x.data_ptr() or op is c.shard)
        for op in (rings.ring_all_reduce, rings.ring_all_gather, rings.ring_reduce_scatter):
            assert op(x, axis).equal(x)
        assert rings.tree_broadcast(x, axis).equal(x) and rings.pairwise_all_to_all(x, axis).equal(x)
    assert book.bytes() == book.calls() == 0


# The collectives written out.

TWINS = [
    (rings.ring_all_reduce, c.all_reduce),
    (rings.ring_all_gather, c.all_gather),
    (rings.ring_reduce_scatter, c.reduce_scatter),
    (rings.pairwise_all_to_all, c.all_to_all),
    (rings.tree_broadcast, c.broadcast),
]


@pytest.mark.parametrize(("written", "library"), TWINS, ids=lambda op: op.__name__)
def test_a_collective_written_out_gives_what_its_namesake_gives(world, written, library):
    for shape in [(12, 3), (7, 2), (24,), (5, 2, 2)]:
        tensors = inputs(world.n, *shape)
        assert same(results(world, written, tensors), results(world, library, tensors))


@pytest.mark.parametrize(("written", "library"), TWINS, ids=lambda op: op.__name__)
def test_a_collective_written_out_sends_as_many_bytes(world, written, library):
    tensors = inputs(world.n, 12, 5)

    def booked(op):
        return [book.bytes() for _, _, book in world.run(apply, op, tensors)]

    sent, wanted = booked(written), booked(library)
    assert sent == wanted if written is not rings.tree_broadcast else sum(sent) == sum(wanted)


def test_a_tree_broadcast_works_from_every_root(world):
    tensors = inputs(world.n, 3, 4)
    for root in range(world.n):
        assert same(results(world, rings.tree_broadcast, tensors, root=root), [tensors[root]] * world.n)


# Adjoints: <A x, y> over the ranks = <x, A' y> over the ranks. What is copied on all ranks counts once.


def both_sides(op, x, y):
    axis = axis_of_all()
    x = x[axis.index].clone().requires_grad_()
    z = op(x, axis)
    z.backward(y[axis.index])
    return (z * y[axis.index]).sum().item(), (x * x.grad).sum().item(), x.grad


def shares(n, dim):
    return cut(inputs(1, 5, 7, 6)[0], n, dim)


def copies(n):
    return [inputs(1, 5, 7, 6)[0]] * n


def own(n):
    return inputs(n, 5, 7, 6)


ADJOINTS = {  # op, what goes in, what comes out; (is copied) or is each rank's own
    "enter": (c.enter, copies, own),
    "leave": (c.leave, own, copies),
    "gather": (partial(c.gather, dim=1, size=7), partial(shares, dim=1), copies),
    "gather along the last": (partial(c.gather, size=6), partial(shares, dim=2), copies),
    "split": (partial(c.split, dim=1), copies, partial(shares, dim=1)),
    "split along the last": (c.split, copies, partial(shares, dim=2)),
}


@pytest.mark.parametrize("name", ADJOINTS)
def test_the_gradient_of_a_collective_is_its_adjoint(world, name):
    op, into, out_of = ADJOINTS[name]
    x, y = into(world.n), [2 * t + 1 for t in out_of(world.n)]
    answers = world.run(both_sides, op, x, y)
    left = answers[0][0] if out_of is copies else sum(a[0] for a in answers)
    right = answers[0][1] if into is copies else sum(a[1] for a in answers)
    assert left == right != 0
    if into is copies:
        assert all(gradient.equal(answers[0][2]) for *_, gradient in answers), "copies get the same gradient"


@pytest.mark.parametrize("name", ["enter", "leave"])
def test_the_same_along_a_sequence(world, name):
    """Shares of a sequence on one side, each rank's own whole on the other."""
    n = world.n
    parts, wholes = [x.contiguous() for x in cut(inputs(1, 5, 4 * n, 3)[0], n, 1)], inputs(n, 5, 4 * n, 3)
    op, x, y = (c.enter_sequence, parts, wholes) if name == "enter" else (c.leave_sequence, wholes, parts)
    answers = world.run(both_sides, op, x, [2 * t + 1 for t in y])
    assert sum(a[0] for a in answers) == sum(a[1] for a in answers) != 0


# What is booked.


def test_the_ledger_books_the_formulas(world):
    n, size = world.n, 24 * 8
    formulas = {
        c.all_reduce: 2 * (n - 1) / n * size,
        c.all_gather: (n - 1) * size,
        c.reduce_scatter: (n - 1) / n * size,
        c.all_to_all: (n - 1) / n * size,
    }
    for op, formula in formulas.items():
        for _, _, book in world.run(apply, op, inputs(n, 24)):
            (entry,) = book.entries
            assert (entry.op, entry.axis, entry.bytes) == (op.__name__, "all", formula)
            assert entry.end >= entry.start and Path(entry.source.rpartition(":")[0]).name == "test_collectives.py"


@pytest.mark.parametrize("n", range(2, 17))
def test_a_broadcast_is_a_tree_that_reaches_each_rank_once(n, monkeypatch):
    monkeypatch.setattr("torch.distributed.broadcast", lambda *_, **__: Done())
    for root in range(n):
        with ledger() as book:
            for index in range(n):
                Torch("all", tuple(range(n)), index, None, None).broadcast(torch.zeros(10), root)
        assert book.bytes() == 40 * (n - 1)
        assert book.entries[root].bytes == 40 * (n - 1).bit_length()  # one child a round


def test_ledgers_may_be_open_at_the_same_time_and_closed_ones_are_complete(world2):
    def books():
        axis = axis_of_all()
        with ledger() as outer:
            c.all_reduce(torch.ones(4), axis)
            with ledger() as inner:
                c.all_gather(torch.ones(4), axis)
        c.all_reduce(torch.ones(4), axis)
        return (
            outer.calls(),
            inner.calls(),
            outer.calls(op="all_gather"),
            outer.bytes("all"),
            outer.bytes("tp"),
            str(outer),
        )

    for outer, inner, gathers, sent, elsewhere, text in world2.run(books):
        assert (outer, inner, gathers, sent, elsewhere) == (2, 1, 1, 16 + 16, 0)
        assert [line.split() for line in text.splitlines()[1:]] == [
            ["all", "all_gather", "1", "16"],
            ["all", "all_reduce", "1", "16"],
        ]


# What a step sends.

SHAPE = Config(vocab=19, context=8, depth=4, width=16, heads=4)
ROWS, LENGTH, WORD = 8, 8, 8  # float64
ACTIVATION = ROWS * LENGTH * SHAPE.width * WORD  # of the whole global batch
TOTALS = 2 * WORD  # loss and count, at the end of a step


def booked(layout, tied=False, dtype=torch.float64):
    """On a rank: the ledger of a second step (in the first, shapes travel ahead), and the bytes of its gradients."""
    parallel = parallelize(model_of(Config(**{**vars(SHAPE), "tied": tied})).to(dtype), **layout)
    batch = batch_of(SHAPE, ROWS, LENGTH)
    parallel.step(*batch)
    with ledger() as book:
        parallel.step(*batch)
    return book, sum(p.grad.nbytes for p in parallel.parameters())


def reduced(size, n):
    return 2 * size * (n - 1) // n


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("mesh", [Mesh(dp=4), Mesh(dp=2, pp=2), Mesh(dp=2, tp=2)], ids=str)
def test_data_parallelism_sends_each_gradient_once_a_step(world4, mesh, microbatches):
    for book, gradients in world4.run(booked, {"mesh": mesh, "microbatches": microbatches}):
        assert book.bytes("dp") == reduced(gradients, mesh.dp) + reduced(TOTALS, mesh.dp)
        assert book.calls("dp") == 2


def test_a_bucket_is_an_all_reduce(world2):
    def reduce(bucket):
        torch.manual_seed(0)
        layers = torch.nn.Sequential(*(torch.nn.Linear(10, 10) for _ in range(6)))
        gradients = Gradients(layers.parameters(), connect(Mesh(dp=2))["dp"], bucket)
        gradients.arm()
        with ledger() as book:
            layers(torch.ones(3, 10)).sum().backward()
            during = book.calls()
            gradients.finish()
        return book.calls(), during, book.bytes(), [b.numel() for b in gradients.buckets], gradients.flat.numel()

    for calls, during, sent, buckets, numbers in world2.run(reduce, 600):
        assert calls == len(buckets) == during == 3  # a bucket closes once it holds 600 bytes; all start in backward
        assert sum(buckets) == numbers == 660 and sent == 660 * 4
    for calls, during, sent, _, _ in world2.run(reduce, 10**6):
        assert (calls, during, sent) == (1, 1, 660 * 4)


@pytest.mark.parametrize("bucket", [1, 600, 10**6])
def test_each_bucket_holds_its_own_sum_and_bears_a_parameter_without_gradient(world2, bucket):
    def differences():
        torch.manual_seed(0)
        layers = torch.nn.Sequential(*(torch.nn.Linear(10, 10) for _ in range(6))).double()
        unused = torch.nn.Linear(10, 10).double()
        axis = connect(Mesh(dp=2))["dp"]
        gradients = Gradients([*unused.parameters(), *layers.parameters()], axis, bucket)
        rows = torch.randn(6, 10, dtype=torch.float64)
        for _ in range(2):  # the second step must not see the first one's
            gradients.attach()
            for last, part in enumerate(rows[axis.index :: 2].tensor_split(2)):  # two microbatches
                if last:
                    gradients.arm()
                layers(part).square().sum().backward()
            gradients.finish()
        whole = torch.autograd.grad(layers(rows).square().sum(), list(layers.parameters()))
        apart = [(p.grad - g).abs().max().item() for p, g in zip(layers.parameters(), whole, strict=True)]
        return max(apart), [p.grad.abs().max().item() for p in unused.parameters()]

    for apart, nothing in world2.run(differences):
        assert apart < 1e-12 and nothing == [0, 0]


def test_buckets_leave_while_backward_still_runs(world2):
    def moments():
        model = gpt(Config(depth=4, width=256))  # more than three buckets
        parallel = parallelize(model, Mesh(dp=2), microbatches=2)
        tokens = torch.arange(4 * 64).view(4, 64)
        with ledger() as book:
            parallel.step(tokens, tokens)
        (*_, (first, _, first_ended), (last, last_started, last_ended)) = [
            span for span in parallel.executor.spans if span[0].op == "B"
        ]
        assert (first.microbatch, last.microbatch) == (0, 1)
        starts = [e.start for e in book.select("dp", "all_reduce")][:-1]  # the last is of loss and count
        return len(starts), min(starts) > last_started > first_ended, sum(t < last_ended for t in starts)

    for buckets, in_last_backward, during in world2.run(moments):
        assert in_last_backward and during == buckets > 3


def test_a_step_leaves_nothing_under_way(world4):
    def ends():
        parallel = parallelize(model_of(SHAPE), Mesh(dp=2, pp=2), microbatches=2)
        with ledger() as book:
            parallel.step(*batch_of(SHAPE, ROWS, LENGTH))
        return [(e.op, e.axis) for e in book.entries if not e.end >= e.start]

    assert world4.run(ends) == [[]] * 4


def test_weight_gradients_are_computed_while_the_gradient_of_an_activation_travels(world2):
    def hidden(sequence):
        parallel = parallelize(model_of(SHAPE), Mesh(tp=2), sequence_parallel=sequence)
        products, run = [], WeightGradients.run

        def watched(weights):
            products.extend([time.perf_counter()] * len(weights.waiting))
            run(weights)

        with patch.object(WeightGradients, "run", watched), ledger() as book:
            parallel.step(*batch_of(SHAPE, ROWS, LENGTH))
        travels = book.select("tp", "reduce_scatter" if sequence else "all_reduce")
        return sum(any(e.start < t < e.end for e in travels) for t in products), len(products)

    for sequence in (False, True):  # all six layers of each block
        assert world2.run(hidden, sequence) == [(6 * SHAPE.depth, 6 * SHAPE.depth)] * 2


def test_gradients_are_views_into_one_buffer():
    model, (tokens, targets) = gpt(SHAPE).double(), batch_of(SHAPE, ROWS, LENGTH)
    parallel = parallelize(model, Mesh())
    (gradients,) = parallel.gradients[0]
    for clear in (True, False):
        parallel.step(tokens, targets)
        assert {p.grad.untyped_storage().data_ptr() for p in parallel.parameters()} == {
            gradients.flat.untyped_storage().data_ptr()
        }
        torch.optim.SGD(parallel.parameters()).zero_grad(set_to_none=clear)
    assert sum(p.numel() for p in parallel.parameters()) == gradients.flat.numel()


@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize(
    ("mesh", "tied"), [(Mesh(tp=4), False), (Mesh(dp=2, tp=2), False), (Mesh(tp=4), True)], ids=str
)
def test_tensor_parallelism_sends_four_all_reduces_a_layer_and_microbatch(world4, mesh, tied, microbatches):
    """And one for the embedding, one for the head's input, three numbers a token for the loss."""
    for book, _ in world4.run(booked, {"mesh": mesh, "microbatches": microbatches}, tied):
        activations = (4 * SHAPE.depth + 2) * ACTIVATION // mesh.dp
        loss = 3 * ROWS * LENGTH * WORD // mesh.dp
        assert book.bytes("tp") == reduced(activations + loss, mesh.tp)
        assert book.calls("tp") == book.calls("tp", "all_reduce") == (4 * SHAPE.depth + 4) * microbatches


@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize("mesh", [Mesh(tp=4), Mesh(dp=2, tp=2)], ids=str)
def test_sequence_parallelism_sends_gathers_and_scatters_in_their_place(world4, mesh, microbatches):
    """Each all-reduce becomes a gather and a scatter of half its bytes. Once a step, the gradients of what saw only a
    part of the sequence are summed: norms and the biases of row-cut layers."""
    t, layers = mesh.tp, SHAPE.depth
    whole = ACTIVATION // mesh.dp
    for book, _ in world4.run(booked, {"mesh": mesh, "microbatches": microbatches, "sequence_parallel": True}):
        pairs = 4 * layers + 1  # with the head's input
        assert book.calls("tp", "all_gather") == (pairs + 1) * microbatches  # and the embedding's gradient
        assert book.calls("tp", "reduce_scatter") == pairs * microbatches
        assert book.bytes("tp", "all_gather") == (pairs + 1) * whole * (t - 1) // t
        assert book.bytes("tp", "reduce_scatter") == pairs * whole * (t - 1) // t
        partial_sums = (layers * (2 * 2 + 2) + 2) * SHAPE.width * WORD
        loss = 3 * ROWS * LENGTH * WORD // mesh.dp
        assert book.calls("tp", "all_reduce") == 3 * microbatches + 1  # embedding, loss; partial sums
        assert book.bytes("tp", "all_reduce") == reduced(whole + loss + partial_sums, t)
    # Together: the bytes of tensor parallelism, with the embedding's gradient and the partial sums on top.


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize("mesh", [Mesh(pp=4), Mesh(dp=2, pp=2)], ids=str)
def test_a_pipeline_sends_an_activation_and_a_gradient_over_each_boundary(world4, mesh, microbatches, tied):
    embedding = SHAPE.vocab * SHAPE.width * WORD
    answers = world4.run(booked, {"mesh": mesh, "microbatches": microbatches, "schedule": one_f_one_b}, tied)
    for rank, (book, _) in enumerate(answers):
        stage = mesh.coordinate(rank)["pp"]
        down, up, ends = stage < mesh.pp - 1, stage > 0, tied and stage in (0, mesh.pp - 1)
        assert book.calls("pp", "send") == (down + up) * microbatches + ends
        assert book.bytes("pp", "send") == (down + up) * ACTIVATION // mesh.dp + ends * embedding
        assert book.bytes("pp", "all_reduce") == reduced(TOTALS, mesh.pp)
        assert set(e.op for e in book.select("pp")) <= {"send", "all_reduce"}


# An independent witness: what the kernel counted on the connections between the ranks.

LARGE = 2**21  # elements of float32: 8 MiB, beside which gloo's own headers do not count
BYTES_RECEIVED = 128  # where Linux's `struct tcp_info` has tcpi_bytes_received, without headers and acknowledgements
only_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts the bytes of a connection")


def received():
    """Bytes that this process took from its TCP connections so far. The loopback's counter would see everyone's."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # one that was closed since
            if stat.S_ISSOCK(os.stat(int(name)).st_mode):
                with socket.socket(fileno=os.dup(int(name))) as copy:
                    if copy.family in (socket.AF_INET, socket.AF_INET6):
                        info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256).ljust(256, b"\0")
                        total += struct.unpack_from("Q", info, BYTES_RECEIVED)[0]
    return total


def witnessed(world, prepare):
    """prepare() -> what is to be watched, on each rank. What is booked as sent must arrive, and hardly more."""

    def watched():
        work = prepare()
        torch.distributed.barrier()
        before = received()
        torch.distributed.barrier()
        with ledger() as book:
            work()
        torch.distributed.barrier()
        return book.bytes(), received() - before

    booked, arrived = (sum(of_ranks) for of_ranks in zip(*world.run(watched), strict=True))
    if not arrived:
        pytest.skip("this kernel does not count the bytes of a connection")
    assert booked <= arrived < 1.01 * booked, f"{arrived:,} bytes arrived where {booked:,} were booked"


@only_linux
@pytest.mark.parametrize("op", [c.all_reduce, c.all_gather, c.reduce_scatter, c.all_to_all, c.broadcast, *dict(TWINS)])
def test_what_the_ledger_books_arrives(world4, op):
    witnessed(world4, lambda: lambda: op(torch.ones(LARGE), axis_of_all()))


@only_linux
@pytest.mark.parametrize(
    "layout",
    [
        {"mesh": Mesh(dp=2, tp=2), "microbatches": 2},
        {"mesh": Mesh(dp=2, tp=2), "sequence_parallel": True},
        {"mesh": Mesh(dp=2, pp=2), "microbatches": 4},
        {"mesh": Mesh(pp=4), "microbatches": 2},
        {"mesh": Mesh(dp=4), "zero": 3, "microbatches": 2},
        {"mesh": Mesh(cp=4)},
        {"mesh": Mesh(dp=2, cp=2), "zero": 2, "microbatches": 2},
    ],
    ids=lambda layout: " ".join([str(layout["mesh"]), *(layout.keys() - {"mesh", "microbatches"})]),
)
def test_what_the_ledger_books_arrives_for_a_step(world4, layout):
    def a_step():
        parallel = parallelize(gpt(Config(vocab=400, width=128, depth=4, tied=True)), **layout)
        tokens = torch.arange(64 * 128).view(64, 128) % 400
        return lambda: parallel.step(tokens, tokens)

    witnessed(world4, a_step)


def test_ranks_with_unlike_numbers_of_groups_still_find_each_other():
    def meet():
        if torch.distributed.get_rank() < 2:
            torch.distributed.new_group([0, 1], use_local_synchronization=True)
        axes = connect(Mesh(dp=2, tp=2))
        return c.all_reduce(torch.ones(1), axes["dp"]).item() + c.all_reduce(torch.ones(1), axes["tp"]).item()

    with World(4) as world:
        assert world.run(meet, limit=30) == [4.0] * 4


def test_with_split_backwards_buckets_leave_before_the_last_weight_gradient(world4):
    """What a stage's last W is still to give is what its sums wait for, and nothing else."""

    config = Config(vocab=19, context=8, depth=4, width=16, heads=4)

    def all_under_way():
        parallel, seen = parallelize(model_of(config), Mesh(dp=2, pp=2), microbatches=2, schedule=zero_bubble_h1), []
        for some in parallel._all_gradients():
            finish = some.finish

            def ended(some=some, finish=finish):
                seen.append(len(some.pending) == len(some.buckets))  # else they start only now
                finish()

            some.finish = ended
        parallel.step(*batch_of(config, 8, 8))
        return seen

    assert all(seen and all(seen) for seen in world4.run(all_under_way))
