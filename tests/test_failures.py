"""Whatever goes wrong on a rank: one report that names it, soon, and a world that works again."""

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from minipar import RankError, World, here, main
from minipar.board import MismatchError


def failed(world: World, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> RankError:
    """The error of a run, after which the world must work at once."""
    with pytest.raises(RankError) as caught:
        world.run(fn, *args, **kwargs)
    begin = time.monotonic()
    assert world.run(reduced) == [world.n] * world.n
    assert time.monotonic() - begin < 2, "0.1 s on an idle machine"
    return caught.value


def reduced() -> float:
    x = torch.tensor(1.0)
    dist.all_reduce(x)
    return x.item()


# -- a rank raises -------------------------------------------------------------------------------------------------


def fails_on_two() -> None:
    x = torch.ones(3)
    if here().rank == 2:
        raise KeyError("a key")  # the line
    dist.all_reduce(x)


def test_an_exception_shows_its_line_first_and_then_where_the_others_stood(world4: World) -> None:
    error = failed(world4, fails_on_two)
    first, others = str(error).split("The others:")
    assert first.startswith("rank 2 raised KeyError: 'a key'\n\n")
    assert re.search(r"test_failures.py, line \d+, in fails_on_two\n", first)
    assert re.search(r"---> +\d+         raise KeyError\(\"a key\"\)  # the line\n", first)
    for rank in (0, 1, 3):
        call = r"all_reduce\(sum\) of float32 \(3,\), line \d+ of .*: dist.all_reduce\(x\)"
        assert re.search(rf"rank {rank} waits for rank 2 in {call}", others)
    assert error.rank == 2 and isinstance(error.exception, KeyError) and error.exception.args == ("a key",)
    assert set(error.reports) == {0, 1, 2, 3}
    assert error._render_traceback_() == [f"RankError: {error}"]


def test_an_exception_inside_a_library_shows_the_callers_line(world2: World) -> None:
    def multiply() -> None:
        torch.nn.Linear(3, 4)(torch.ones(2, 5))  # the line

    error = failed(world2, multiply)
    assert re.search(r"---> .* # the line\n(.*\n)*inside forward, nn/modules/linear.py:\d+", str(error))
    assert "So did rank 1." in str(error) or "So did rank 0." in str(error), "said once for both"


@pytest.mark.parametrize(
    ("end", "says"),
    [
        (lambda: exit(3), "called exit(3)"),
        (lambda: (_ for _ in ()).throw(KeyboardInterrupt()), "raised KeyboardInterrupt"),
    ],
)
def test_what_would_end_a_program_is_an_error_like_others(world2: World, end: Callable[[], None], says: str) -> None:
    assert says in str(failed(world2, lambda: end() if here().rank else None))


def test_the_rank_that_failed_first_is_to_blame(world2: World) -> None:
    def fail() -> None:
        time.sleep(0.3 * (1 - here().rank))
        raise ValueError(f"of rank {here().rank}")

    error = failed(world2, fail)
    assert error.rank == 1 and str(error).startswith("rank 1 raised ValueError: of rank 1")
    assert "rank 0 raised ValueError: of rank 0" in str(error)


def test_an_exception_that_cannot_travel_is_reported_all_the_same(world2: World) -> None:
    class Local(Exception):
        def __init__(self) -> None:
            super().__init__("held")
            self.lock = threading.Lock()

    def fail() -> None:
        raise Local

    error = failed(world2, fail)
    assert "raised Local: held" in str(error) and error.exception is None


def test_an_error_on_every_rank_keeps_the_ranks_and_one_that_leaves_others_waiting_does_not(world4: World) -> None:
    def alike() -> None:
        reduced()
        raise ValueError

    def in_flight() -> None:
        if here().rank == 0:
            dist.isend(torch.ones(2), 1)
        raise ValueError

    before = world4.run(os.getpid)
    failed(world4, alike)
    assert world4.run(os.getpid) == before
    for fn in (fails_on_two, in_flight):
        failed(world4, fn)
        after = world4.run(os.getpid)
        assert not set(before) & set(after)
        before = after


def test_no_message_of_one_run_is_received_in_the_next(world2: World) -> None:
    def leave() -> int:
        if here().rank == 0:
            dist.isend(torch.full((3,), 13.0), 1)
        return here().rank

    def receive() -> float:
        x = torch.full((3,), float(here().rank))
        if here().rank == 0:
            dist.send(x, 1)
        else:
            dist.recv(x, 0)
        return x.sum().item()

    with pytest.warns(
        UserWarning, match=r"rank 0 did isend to rank 1 of float32 \(3,\).*dist.isend\(.*\n?.*rank 1"
    ) as w:
        assert world2.run(leave) == [0, 1]
    assert w[0].filename == __file__
    assert world2.run(receive) == [0.0, 0.0]


# -- ranks wait for ever -------------------------------------------------------------------------------------------


def test_a_deadlock_names_the_circle(world4: World, impatient: None) -> None:
    def crossed() -> None:
        if here().rank < 3:
            dist.send(torch.ones(5), (here().rank + 1) % 3)

    text = str(failed(world4, crossed))
    assert text.startswith("deadlock: every rank that has not returned waits")
    assert re.search(r"rank 0 waits for rank 1 in send to rank 1 of float32 \(5,\), line \d+ of .*: dist.send\(", text)
    assert "rank 3 returned" in text
    assert "the circle: rank 0 -> rank 1 -> rank 2 -> rank 0" in text


def test_a_deadlock_names_the_rank_that_never_came(world4: World, impatient: None) -> None:
    def leaves() -> None:
        reduced()
        if here().rank != 3:
            dist.all_reduce(torch.ones(2))

    text = str(failed(world4, leaves))
    assert "rank 3 returned without joining all_reduce(sum), call 2 of the group of ranks 0, 1, 2, 3" in text
    assert "rank 0 waits for rank 3 in all_reduce(sum) of float32 (2,)" in text


def test_a_deadlock_names_the_message_that_was_never_sent(world2: World, impatient: None) -> None:
    def lonely() -> None:
        if here().rank:
            first, _ = dist.irecv(torch.ones(2), 0), dist.irecv(torch.ones(3), 0)
            first.wait()  # the line

    text = str(failed(world2, lonely))
    assert re.search(r"rank 1 waits for rank 0 in irecv from rank 0 of float32 \(2,\), .*# the line", text)
    assert "rank 0 returned without sending message 1 to rank 1" in text


def test_a_group_that_not_every_rank_makes_is_told_of(world4: World) -> None:
    def half() -> None:
        if here().rank < 2:
            dist.new_group([0, 1])

    with pytest.warns(UserWarning, match=r"rank 0 did new_group\(\(0, 1\)\).*ranks 2, 3 returned without joining"):
        world4.run(half)
    assert world4.run(reduced) == [4.0] * 4


def test_waits_that_the_board_does_not_know_are_found_in_the_stacks(world2: World, impatient: None) -> None:
    def backward() -> None:
        model = DistributedDataParallel(torch.nn.Linear(3, 3))
        if here().rank:
            model(torch.ones(2, 3)).sum().backward()  # the line

    text = str(failed(world2, backward))
    assert re.search(r"rank 1 is at .*# the line \(inside _engine_run_backward", text)
    assert "rank 0 returned while rank 1 wait" in text


def test_without_a_watch_the_stacks_tell(impatient: None) -> None:
    def leaves() -> None:
        if here().rank:
            dist.barrier()

    with World(2, watch=False) as world:
        assert "rank 1 is at" in str(failed(world, leaves))


@pytest.mark.parametrize(
    "busy",
    [lambda: time.sleep(2.5), lambda: spin(2.5), lambda: spin(1.0).backward()],
    ids=["sleeps", "computes", "is in a long backward pass"],
)
def test_a_rank_that_sleeps_or_computes_is_not_deadlocked(
    world2: World, impatient: None, busy: Callable[[], None]
) -> None:
    def late() -> float:
        if here().rank == 0:
            busy()
        return reduced()

    assert world2.run(late) == [2.0, 2.0]


def spin(seconds: float) -> torch.Tensor:
    """Compute for so long. The backward pass of the answer takes twice that."""
    end, x, w = time.monotonic() + seconds, torch.ones(700, 700), torch.eye(700, requires_grad=True)
    while time.monotonic() < end:
        x = x @ w
    return x.sum()


def test_a_limit_says_where_every_rank_still_is(world2: World) -> None:
    def forever() -> None:
        while here().rank:
            pass
        reduced()

    begin = time.monotonic()
    text = str(failed(world2, forever, limit=0.5))
    assert time.monotonic() - begin < 4
    assert text.startswith("the limit of 0.5 s is over")
    assert "rank 0 waits for rank 1 in all_reduce(sum)" in text
    assert re.search(r"rank 1 is at line \d+ of .*: (while here\(\).rank:|pass)", text)


# -- a rank dies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "says"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "was killed by SIGKILL"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "was killed by SIGSEGV"),
        (lambda: os._exit(3), "ended its process with status 3"),
    ],
)
def test_a_dead_rank_is_named_with_its_end_and_its_place(world4: World, end: Callable[[], None], says: str) -> None:
    def die() -> None:
        reduced()
        if here().rank == 1:
            end()
        dist.all_reduce(torch.ones(2))

    begin = time.monotonic()
    with pytest.raises(RankError) as caught:
        world4.run(die)
    assert time.monotonic() - begin < 2
    assert world4.run(reduced) == [4.0] * 4
    first, others = str(caught.value).split("The others:")
    assert first.startswith(f"rank 1 {says}") and caught.value.rank == 1
    assert re.search(r"line \d+ of .*test_failures.py", first)
    assert ("---> " in first) == ("SIGSEGV" in says), "Python leaves a stack when it crashes itself"
    assert "onnection closed" not in others and "onnection reset" not in others and "rank 3" in others


def test_a_rank_that_died_between_runs_is_replaced_with_a_warning(world2: World) -> None:
    os.kill(world2.run(os.getpid)[1], signal.SIGKILL)
    time.sleep(0.2)
    with pytest.warns(UserWarning, match="since the last run rank 1 was killed by SIGKILL"):
        assert world2.run(reduced) == [2.0, 2.0]


def test_an_interrupt_says_where_the_ranks_were(world2: World) -> None:
    def forever() -> None:
        if here().rank:
            dist.barrier()
        time.sleep(1000)

    threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt) as caught:
        world2.run(forever)
    text = str(caught.value)
    assert re.search(r"rank 0 is at line \d+ of .*: time.sleep\(1000\)", text)
    assert "rank 1 waits for rank 0 in barrier" in text
    assert world2.run(reduced) == [2.0, 2.0]


def test_a_world_is_fresh_again_within_half_a_second(world8: World) -> None:
    def die() -> None:
        if here().rank == 5:
            os._exit(1)

    def fresh() -> float:
        with pytest.raises(RankError):
            world8.run(die)
        begin = time.monotonic()
        world8.run(reduced)
        return time.monotonic() - begin

    assert min(fresh() for _ in range(3)) < 0.5


# -- calls that do not fit together --------------------------------------------------------------------------------


def message(sent: torch.Tensor, received: torch.Tensor) -> None:
    if here().rank == 0:
        dist.send(sent, 1)
    else:
        dist.recv(received, 0)


def either(zero: Callable[[], Any], one: Callable[[], Any]) -> Callable[[], None]:
    return lambda: (one if here().rank else zero)()


def pieces(inputs: list[list[int]], outputs: list[list[int]]) -> None:
    mine, theirs = inputs[here().rank], outputs[here().rank]
    dist.all_to_all_single(torch.zeros(sum(theirs), 2), torch.ones(sum(mine), 2), theirs, mine)


@pytest.mark.parametrize(
    ("fn", "says"),
    [
        (lambda: dist.all_reduce(torch.ones(4 + here().rank)), ["float32 (4,)", "float32 (5,)"]),
        (lambda: dist.all_reduce(torch.ones(4, dtype=(torch.float32, torch.int32)[here().rank])), ["float32", "int32"]),
        (
            either(lambda: dist.all_reduce(torch.ones(4)), lambda: dist.broadcast(torch.ones(4), 0)),
            ["all_reduce", "broad"],
        ),
        (lambda: dist.all_reduce(torch.ones(4), [dist.ReduceOp.SUM, dist.ReduceOp.MAX][here().rank]), ["sum", "max"]),
        (lambda: dist.broadcast(torch.ones(4), here().rank), ["root 0", "root 1"]),
        (lambda: dist.all_gather([x := torch.ones(1 + here().rank), x.clone()], x), ["(1,)", "(2,)"]),
        (lambda: bool(dist.new_group([here().rank])), ["new_group((0,))", "new_group((1,))"]),
        (
            lambda: message(torch.ones(6), torch.ones(5)),
            ["send to rank 1 of float32 (6,)", "recv from rank 0 of float32 (5,)"],
        ),
        (lambda: message(torch.ones(6), torch.ones(6).double()), ["float32", "float64"]),
        (lambda: pieces([[1, 2], [3, 4]], [[1, 2], [2, 4]]), ["all_to_all_single"]),
    ],
    ids=[
        "shape",
        "dtype",
        "function",
        "reduction",
        "root",
        "gather",
        "new_group",
        "elements",
        "message dtype",
        "pieces",
    ],
)
def test_calls_that_do_not_fit_are_refused_before_anything_is_sent(
    world2: World, fn: Callable[[], Any], says: list[str]
) -> None:
    begin = time.monotonic()
    error = failed(world2, fn)
    assert time.monotonic() - begin < 4, "nobody had to wait for a deadlock"
    assert isinstance(error.exception, MismatchError)
    assert set(error.exception.sides) == {0, 1}
    head, rank0, rank1, *_ = str(error).splitlines()
    assert re.search(r"together \((call 1 of the group of ranks 0, 1|message 1 from rank [01] to rank [01])\):", head)
    assert rank0.startswith("  rank 0: ") and rank1.startswith("  rank 1: ")
    assert says[0] in rank0 and says[-1] in rank1
    assert re.search(r"line \d+: \S+", rank0) and re.search(r"line \d+: \S+", rank1)


def test_calls_that_torch_allows_to_differ_are_let_through(world4: World) -> None:
    def legal() -> float:
        me, n = here().rank, here().size
        dist.broadcast(torch.ones(4) if me == 0 else torch.zeros(2, 2), 0)
        # Rank r sends r + to + 1 rows to each rank.
        mine, theirs = [me + to + 1 for to in range(n)], [source + me + 1 for source in range(n)]
        out = torch.zeros(sum(theirs), 3)
        dist.all_to_all_single(out, torch.full((sum(mine), 3), float(me)), theirs, mine)
        assert out.sum() == sum(3 * source * rows for source, rows in enumerate(theirs))
        dist.all_to_all([torch.zeros(2) for _ in range(n)], [torch.ones(2) for _ in range(n)])
        objects: list[Any] = [None] * n
        dist.all_gather_object(objects, "x" * me)
        assert [len(o) for o in objects] == list(range(n))
        outputs = torch.zeros(me + 1)
        dist.reduce_scatter(outputs, [torch.ones(r + 1) for r in range(n)])
        assert torch.equal(outputs, torch.full((me + 1,), 4.0))
        ring = [
            dist.P2POp(dist.isend, torch.full((2,), float(me)), (me + 1) % n),
            dist.P2POp(dist.irecv, x := torch.zeros(2), (me - 1) % n),
        ]
        for work in dist.batch_isend_irecv(ring):
            work.wait()
        assert x[0] == (me - 1) % n
        evens = dist.new_group([0, 2])
        if me % 2 == 0:
            dist.all_reduce(x, group=evens)
            message_in(evens, x)
        if me == 0:
            assert sorted(dist.recv(x.zero_()) + x[0].item() for _ in range(n - 1)) == [2.0, 4.0, 6.0]
        else:
            dist.send(torch.full((2,), float(me)), 0)
        work = dist.all_reduce(x, async_op=True)
        assert work is not None and work.wait() is not False
        dist.barrier()
        return reduced()

    def message_in(group: Any, x: torch.Tensor) -> None:
        if here().rank == 0:
            dist.send(x, 2, group=group, tag=5)
        else:
            dist.irecv(x, group=group, group_src=0, tag=5).wait()

    before = world4.run(os.getpid)
    assert world4.run(legal, limit=60) == [4.0] * 4
    assert world4.run(os.getpid) == before, "nothing was left under way"


def test_a_call_from_inside_a_library_is_shown_at_the_callers_line(world2: World) -> None:
    def differ() -> None:
        if here().rank:
            dist.all_reduce(torch.ones(2))
        else:
            dist.all_gather_object([None, None], "an object")  # the line

    assert re.search(r"rank 0: all_gather of int64 .*# the line\n", str(failed(world2, differ)))


def test_the_watch_sees_calls_from_a_backward_pass(world2: World) -> None:
    class Sum(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
            g = torch.ones(2 + here().rank)
            dist.all_reduce(g)
            return g

    def step() -> None:
        Sum.apply(torch.ones(2 + here().rank, requires_grad=True)).sum().backward()

    assert isinstance(failed(world2, step).exception, MismatchError)


# -- what cannot begin ---------------------------------------------------------------------------------------------


def one_line(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text and len(text) < 250, text
    return text


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda w: World(0), ValueError, "World(0): a world has at least 1 rank"),
        (lambda w: World(2.0), TypeError, "World(2.0)"),
        (lambda w: World(True), TypeError, "World(True)"),
        (lambda w: World(1000), ValueError, "World(1000, most=1000) starts them all the same"),
        (lambda w: w.run(lambda a: a), TypeError, "missing a required argument: 'a'"),
        (lambda w: w.run(reduced, 1), TypeError, "reduced() -> float cannot be run with these arguments: too many"),
        (lambda w: w.run(reduced, lr=1), TypeError, "unexpected keyword argument 'lr'"),
        (lambda w: w.run(reduced()), TypeError, "the first argument is the function, not its answer"),
        (lambda w: w.run(print, threading.Lock()), TypeError, "argument 0, of type lock, cannot travel to the ranks"),
        (lambda w: w.run(print, end=threading.Lock()), TypeError, "argument 'end', of type lock, cannot travel"),
        (lambda w: w.run(lambda: w), TypeError, "a World cannot travel to its own ranks"),
        (lambda w: World(1, device="tpu"), ValueError, "device='tpu'"),
    ],
)
def test_a_run_that_cannot_begin_says_why_in_a_line(
    world2: World, call: Callable[[World], Any], error: type[Exception], says: str, alone: None
) -> None:
    with pytest.raises(error) as caught:
        call(world2)
    assert says in one_line(caught.value)
    assert world2.run(reduced) == [2.0, 2.0]


@pytest.fixture
def alone() -> Any:
    """A group of this process alone, in which the functions for ranks may be called."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="device='cuda': torch sees no CUDA GPU") as caught:
        World(1, device="cuda")
    one_line(caught.value)


def test_an_answer_that_cannot_travel_names_the_rank_and_the_type(world2: World) -> None:
    before = world2.run(os.getpid)
    error = failed(world2, lambda: (i for i in "ab") if here().rank else None)
    assert "rank 1 raised TypeError: the answer, of type generator, cannot be pickled" in str(error)
    assert world2.run(os.getpid) == before


def test_a_rank_cannot_start_a_world(world2: World) -> None:
    for fn in (lambda: World(2), lambda: main(reduced)):
        assert "World(2) inside rank 0" in str(failed(world2, lambda: World(2) if here().rank == 0 else None)), fn


def test_a_world_runs_one_function_at_a_time(world2: World) -> None:
    first = threading.Thread(target=world2.run, args=(time.sleep, 0.5))
    first.start()
    time.sleep(0.1)
    with pytest.raises(RuntimeError, match=r"World\(2\) is busy with another run"):
        world2.run(reduced)
    first.join()
    assert world2.run(reduced) == [2.0, 2.0]


def test_a_deadlock_names_the_message_that_was_never_received(world2, impatient):
    def lonely():
        if here().rank == 0:
            torch.distributed.send(torch.ones(2), 1)

    with pytest.raises(RankError, match="rank 1 returned without receiving message 1 of rank 0"):
        world2.run(lonely)
