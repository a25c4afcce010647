# %% [markdown] lang="en"
# # Exercises of 02b: ranks and collectives
#
# Eight small functions, an hour and a half or so. They are what all parallel training talks with: an exchange that does
# not deadlock, the two halves of an all-reduce on a ring, the whole of it, a broadcast, and a mesh. At the end they
# train a GPT on four ranks.
#
# **How it works.** Run the cells from the top with Shift+Enter. Each task is a cell with a function for you to
# finish, where it says `raise NotImplementedError("your turn")`. The cell below it is its check, folded away since it
# gives things away; run it after yours. For a right answer it prints one line, the one that stands there already. For
# a wrong one it says what is wrong, and on which rank. Checks do not use your earlier answers: once the cells above
# the first task have run, start anywhere.
#
# Or let a terminal check, in the folder of the course:
#
#     # all tasks, a line each; with --watch again at each save
#     python -m minipar grade exercises/02b_ranks_and_collectives.ipynb
#
#     # hints for task 3, one at a time; its solution, once it passes
#     python -m minipar hint 02b.3
#     python -m minipar solution 02b.3
#
# `grade` reads only the cells with a function to finish. Cells that you add are for trying things out. The folded cells
# belong to the checks, so an answer that uses their variables or functions is refused: take what your function is
# given, and what is imported.

# %% tags=["setup"]
import ctypes
import threading
import traceback
from math import ceil, log2, prod
from time import process_time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipar import Axis, World, corpus, ledger
from minipar.collectives import all_gather, all_reduce, irecv, isend, recv, reduce_scatter, send
from minipar.course.checks import names_in, returned, verdict
from minipar.course.given import along, fresh_model, total_loss

world = World(4)

# %% [markdown] lang="en"
# Your functions are given an `axis`, the line of ranks that talk to each other: `axis.size` ranks stand on it, and
# `axis.index` is this rank's place, from 0. On it you have
#
# - `isend(x, axis, to)` and `irecv(like, axis, source)`: start a transfer, and return at once. `.wait()` returns when
#   it is done, and for `irecv` it gives what came, a tensor of the shape and dtype of `like`.
# - `send(x, axis, to)` and `recv(like, axis, source)`: the same with the wait in it. A send ends when the other side
#   has come to its receive.
#
# The next cells are folded: what the checks run your functions on. Four ranks are processes, as in the chapter. For
# lines of two, three, five or eight ranks they are threads that take turns. There the check sees at once when nobody
# can move, and counts **rounds**: messages that go at the same time are one round. In a round a rank can send one
# message and receive one.


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given: ranks as threads that take turns, any number of them. A transfer takes one round and needs both sides
class Transfer:
    """A message that one side or both have posted. `end`: the round after which it has arrived."""

    def __init__(self, network, source, to):
        self.network, self.source, self.to, self.posted, self.end = network, source, to, {}, None

    def post(self, side, x):
        rank = {"send": self.source, "recv": self.to}[side]
        self.posted[side] = x, self.network.clock[rank]
        if len(self.posted) < 2:
            return
        (sent, a), (received, b) = self.posted["send"], self.posted["recv"]
        told = (
            f"{self.network.size} ranks: rank {self.source} sends {tuple(sent.shape)} of {sent.dtype} to rank {self.to}"
        )
        same = (sent.shape, sent.dtype) == (received.shape, received.dtype)
        assert same, f"{told}, which waits for {tuple(received.shape)} of {received.dtype}: only numbers travel."
        busy = self.network.busy
        self.end = 1 + max(a, b, busy.get(("send", self.source), 0), busy.get(("recv", self.to), 0))
        busy["send", self.source] = busy["recv", self.to] = self.end
        received.copy_(sent)

    def wait(self, rank):
        if self.end is None:
            self.network.pause(rank, self)
        self.network.clock[rank] = max(self.network.clock[rank], self.end)


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, continued: what an axis of such ranks has for a transport
class Waiting:
    """One side of a transfer, as isend and irecv return it."""

    def __init__(self, transfer, rank, x):
        self.transfer, self.rank, self.x, self.waited = transfer, rank, x, False

    def wait(self):
        self.waited = True
        self.transfer.wait(self.rank)
        return self.x


class Wire:
    def __init__(self, network, rank):
        self.network, self.rank = network, rank

    def send(self, x, to, tag):
        return self.start("send", self.rank, range(self.network.size)[to], tag, x)

    def recv(self, x, source, tag):
        return self.start("recv", range(self.network.size)[source], self.rank, tag, x)

    def start(self, side, source, to, tag, x):
        assert source != to, f"rank {to} sends to itself, or waits for itself."
        open_ones = self.network.open.setdefault((source, to, tag), [])
        transfer = next((t for t in open_ones if side not in t.posted), None)
        if transfer is None:
            open_ones.append(transfer := Transfer(self.network, source, to))
        transfer.post(side, x)
        self.network.started.append((side, Waiting(transfer, self.rank, x)))
        return self.network.started[-1][1]

    def __getattr__(self, name):
        raise AssertionError(f"This calls a collective of the library ({name}): build it from send and receive.")


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, continued: the network. One rank runs at a time, until it waits for what is not there
class Network:
    """`results` of function(x, axis, *more) on each of `size` ranks, with x = given(rank), and what was sent."""

    def __init__(self, size, function, given, *more):
        self.size, self.clock, self.busy, self.started, self.open = size, [0] * size, {}, [], {}
        self.turn, self.back = [threading.Semaphore(0) for _ in range(size)], threading.Semaphore(0)
        self.waits, self.ended, self.error, self.results = {}, set(), None, [None] * size
        self.given = [given(rank) for rank in range(size)]

        def body(rank):
            self.turn[rank].acquire()
            try:
                axis = Axis("dp", tuple(range(size)), rank, Wire(self, rank))
                self.results[rank] = function(self.given[rank], axis, *more)
            except BaseException as error:
                if self.error is None:
                    self.error, self.failed = error, rank
            self.ended.add(rank)
            self.back.release()

        self.threads = [threading.Thread(target=body, args=(rank,), daemon=True) for rank in range(size)]
        for thread in self.threads:
            thread.start()
        while self.error is None and len(self.ended) < size:
            self.step()
        self.stop()
        self.unchanged = [torch.equal(x, given(rank)) for rank, x in enumerate(self.given)]


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, continued: how ranks wait
def pause(self, rank, transfer):
    """This rank waits, and the others go on."""
    self.waits[rank] = transfer
    self.back.release()
    self.turn[rank].acquire()
    del self.waits[rank]
    if self.error is not None:
        raise SystemExit


def step(self):
    """Let a rank run that can. An error if none can, or if it does not come back."""
    able = [r for r in range(self.size) if r not in self.ended and (r not in self.waits or self.waits[r].end)]
    if not able:
        self.error = AssertionError(f"{self.size} ranks: {self.deadlock()}")
        return
    self.turn[able[0]].release()
    if not self.back.acquire(timeout=2):
        self.error = AssertionError(f"{self.size} ranks: rank {able[0]} runs on and on: a loop without end?")


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, the rest of it: what a deadlock is called, and how all ranks end
def deadlock(self):
    """Who waits for whom, in a sentence."""
    told = []
    for rank, transfer in sorted(self.waits.items()):
        sends = rank == transfer.source
        other = transfer.to if sends else transfer.source
        gone = ", which has returned" if other in self.ended else ""
        told.append(f"rank {rank} waits {'to send to' if sends else 'for a message from'} rank {other}{gone}")
    return f"nobody can move. {'; '.join(told)}."


def stop(self):
    """End all threads. An error of theirs is told with the lines of the answer that led to it."""
    for rank, thread in enumerate(self.threads):
        self.turn[rank].release()
        thread.join(timeout=0.2)
        if thread.is_alive():
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
    if isinstance(self.error, AssertionError | NotImplementedError):
        raise self.error
    if self.error is not None:
        frames = traceback.extract_tb(self.error.__traceback__)[1:]
        lines = [f"  line {frame.lineno} of {frame.name}: {frame.line}" for frame in frames if frame.line]
        told = f"{self.size} ranks: rank {self.failed} raises {type(self.error).__name__}: {self.error}"
        raise AssertionError("\n".join([told, *lines])) from None


Network.step, Network.pause, Network.deadlock, Network.stop = step, pause, deadlock, stop


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given: the numbers that ranks hold, and runs on real ranks
def numbers(rank: int, *shape: int) -> Tensor:
    """The same random numbers for a rank, whoever asks, in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def total(size: int, *shape: int) -> Tensor:
    """The sum of the numbers of so many ranks."""
    return torch.stack([numbers(rank, *shape) for rank in range(size)]).sum(0)


def on_processes(function, size, shape, *more) -> list[dict]:
    """function(x, axis, *more) on real ranks: what it returns, whether x is as it was, and what the ledger says."""

    def run(axis):
        x = numbers(axis.index, *shape)
        with ledger() as book:
            y = function(x, axis, *more)
        ops = {entry.op for entry in book.entries}
        same = torch.equal(x, numbers(axis.index, *shape))
        return {"y": y, "same": same, "ops": ops, "calls": book.calls(), "bytes": book.bytes()}

    return along(world, "dp", run, size=size)[:: world.n // size]


def differs(got, wanted) -> str:
    """What is wrong with a tensor that should be another, or ''."""
    if not isinstance(got, Tensor):
        return f"returns {got!r:.40}, not a tensor"
    if got.shape != wanted.shape:
        return f"returns the shape {tuple(got.shape)}, not {tuple(wanted.shape)}"
    if got.dtype != wanted.dtype:
        return f"returns {got.dtype}: the numbers are {wanted.dtype}, and should stay so"
    return "" if torch.allclose(got, wanted, rtol=1e-12, atol=1e-12) else "returns other numbers"


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given: is what was sent as little as it can be, and is the answer the learner's own?
def thrifty(run, messages, size, rounds) -> None:
    """AssertionError if a rank of a ring sends more messages or bytes, to others than its neighbors, or for longer."""
    n = run.size
    for rank in range(n):
        sent = [side for kind, side in run.started if kind == "send" and side.rank == rank]
        what, of_bytes = f"{n} ranks: the result is right, but rank {rank}", sum(side.x.nbytes for side in sent)
        assert run.unchanged[rank], f"{what} changes the x that it was given: does an in-place sum write into a view?"
        others = {side.transfer.to for side in sent} - {(rank + 1) % n, (rank - 1) % n}
        assert not others, f"{what} sends to rank {min(others, default=0)}: on a ring it talks to its neighbors only."
        assert of_bytes <= size, f"{what} sends {of_bytes} bytes, and {size} are enough."
        assert len(sent) <= messages, f"{what} sends {len(sent)} messages, and {messages} are enough."
    all_waited_for(run)
    rounds_are = max(run.clock)
    told = f"{n} ranks: the result is right, but it takes {rounds_are} rounds, and {rounds} are enough"
    assert rounds_are <= rounds, f"{told}: start both transfers of a step before you wait for one."


def all_waited_for(run) -> None:
    for kind, side in run.started:
        told = f"{run.size} ranks: rank {side.rank} starts to {kind} and never waits for the end of it"
        assert side.waited, f"{told}: until then the tensor must not be touched, and nobody would know."


def borrowed(answer, *names) -> None:
    """AssertionError if a function of the package does an answer's work for it."""
    for name in sorted(names_in(answer)):
        module = getattr(globals().get(name), "__module__", "") or ""
        told = f"{answer.__name__} uses the package's `{name}`: here write it yourself."
        assert "rings" not in (*name.split("."), *module.split(".")) and name not in names, told


# %% [markdown] lang="en"
# ## 02b.1 · Trace: what rank 2 sends
#
# Four ranks stand on a ring, each with a tensor that is cut into four chunks, 0 to 3. In step $s = 0, 1, 2$ of a
# reduce-scatter, rank $r$ sends chunk $r - 1 - s$ (modulo 4) to its right neighbor, rank $r + 1$, and adds what comes
# from its left neighbor to its own copy of that chunk.
#
# Follow rank 2, on paper. For each step: which chunk does it send, and which ranks' numbers have been added up in that
# copy by then?

# %% [markdown] lang="en" hint="02b.1"
# In step 0 rank 2 sends chunk 2 − 1 − 0 = 1. Nothing has been added to it yet: it holds rank 2's own numbers.

# %% [markdown] lang="en" hint="02b.1"
# In step 0 rank 1 sent chunk 1 − 1 − 0 = 0 to rank 2, with its own numbers in it. Rank 2 added its own. That is the
# chunk which it sends in step 1.


# %% task="02b.1" title="Trace: what rank 2 sends"
def sent_by_rank_2() -> list[tuple[int, list[int]]]:
    """For steps 0, 1 and 2: the chunk that rank 2 sends, and the ranks whose numbers are in it."""
    ### BEGIN SOLUTION
    return [(1, [2]), (0, [1, 2]), (3, [0, 1, 2])]
    ### END SOLUTION


# %% check="02b.1" seconds=20
# Check of 02b.1: run this after your answer
# NBVAL_CHECK_OUTPUT
def ring_of_powers(x, axis):
    from minipar.rings import ring_reduce_scatter

    return ring_reduce_scatter(x, axis)


with verdict():
    yours = [(chunk, sorted(ranks)) for chunk, ranks in returned(sent_by_rank_2(), "sent_by_rank_2")]
    assert len(yours) == 3, f"There are 3 steps, and you give {len(yours)} pairs: a chunk and its ranks for each."
    # rank r holds 10 to the power of r: a sum shows whose numbers are in it
    run = Network(4, ring_of_powers, lambda rank: torch.full((4,), 10.0**rank))
    sent = [int(side.x) for kind, side in run.started if kind == "send" and side.rank == 2]
    for step, (sum_of_powers, (got, ranks)) in enumerate(zip(sent, yours, strict=True)):
        chunk = (2 - 1 - step) % 4
        told = f"Step {step}: rank 2 sends chunk (2 - 1 - {step}) mod 4 = {chunk}, and you say {got}."
        assert got == chunk, told + " Below 0 it goes on from the other end." * (got == 2 - 1 - step)
        inside = [rank for rank in range(4) if f"{sum_of_powers:04}"[3 - rank] == "1"]
        came = f"it came from rank 1 in step {step - 1}, and rank 2 has added its own" if step else "nothing came yet"
        assert ranks == inside, f"Step {step}: you say that chunk {chunk} holds numbers of ranks {ranks}, but {came}."
    print(f"another chunk in each step, with one term more: {len(yours[-1][1])} of 4 in the last")

# %% [markdown] lang="en"
# ## 02b.2 · Mend: a circle of sends
#
# Each rank passes a tensor to its right neighbor and gets one from its left: the heartbeat of every ring. With a
# library that copies small tensors into a buffer and returns from `send` at once, the version below works. Where a send
# ends when the other side receives, it waits forever.
#
# Say who waits for whom, on four ranks. Then mend it.
#
# **Target:** one round, however many ranks there are. (If rank 0 receives first and the others after it, one after the
# other, it is $n$ rounds. If even ranks send first and odd ones receive first, it is two or three.)

# %% [markdown] lang="en" hint="02b.2"
# All four are in their `send`. Rank 0 waits there until rank 1 receives.

# %% [markdown] lang="en" hint="02b.2"
# `isend` and `irecv` only start a transfer, so a rank can have both under way. Wait afterwards, for both.

# %% [markdown] lang="en" hint="02b.2"
# `incoming = irecv(x, axis, left)` and `outgoing = isend(x, axis, right)`. Of their two `.wait()`, the first returns
# what came.


# %% task="02b.2" title="Mend: a circle of sends" engine="pass_right"
def who_waits_for_whom() -> dict[int, int]:
    """On four ranks, with the function below before it is mended: each rank, and the rank that it waits for."""
    ### BEGIN SOLUTION
    return {0: 1, 1: 2, 2: 3, 3: 0}
    ### END SOLUTION


def pass_right(x: Tensor, axis: Axis) -> Tensor:
    """Send x to the right neighbor; that of the last rank is rank 0. Returns what the left one sent, of x's shape."""
    right, left = (axis.index + 1) % axis.size, (axis.index - 1) % axis.size
    ### BEGIN SOLUTION
    incoming = irecv(x, axis, left)
    outgoing = isend(x, axis, right)
    came = incoming.wait()
    outgoing.wait()
    return came
    ### INSTEAD
    # send(x, axis, right)
    # return recv(x, axis, left)
    ### END SOLUTION


# %% check="02b.2" seconds=20
# Check of 02b.2: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    waits = dict(returned(who_waits_for_whom(), "who_waits_for_whom"))
    for rank in range(4):
        told = f"Rank {rank} is in its send, and that ends when rank {(rank + 1) % 4} receives."
        assert waits.get(rank) == (rank + 1) % 4, f"{told} You say that it waits for rank {waits.get(rank)}."
    borrowed(pass_right)
    for size in (4, 3, 2, 5):
        run = Network(size, pass_right, lambda rank: numbers(rank, 2, 3))
        for rank, got in enumerate(run.results):
            left = (rank - 1) % size
            wrong = differs(got, numbers(left, 2, 3))
            assert not wrong, f"{size} ranks: rank {rank} {wrong}: rank {left} is on its left."
        thrifty(run, 1, 48, 1)
    for rank, real in enumerate(on_processes(pass_right, 4, (2, 3))):
        wrong = differs(real["y"], numbers((rank - 1) % 4, 2, 3))
        assert not wrong, f"On four processes rank {rank} {wrong}."
    print(f"{max(run.clock)} round on {size} ranks; {real['bytes']} bytes sent by each")

# %% [markdown] lang="en"
# ## 02b.3 · Complete: reduce-scatter on a ring
#
# The first half of an all-reduce. The tensor is cut into $n$ chunks along its first dimension. In each of $n - 1$ steps
# every rank passes one chunk to its right neighbor, and adds what comes from the left to its own copy. Rank $r$ ends
# with the finished sum of chunk $r$.
#
# Which chunk leaves? At step $s$ rank $r$ sends chunk $r - 1 - s$ and gets chunk $r - 2 - s$, modulo $n$.
#
# **Target:** $n-1$ messages and $(n-1)/n \cdot M$ bytes from each rank, in $n - 1$ rounds. Nobody does with less.

# %% [markdown] lang="en" hint="02b.3"
# In each step: start to send `chunks[leaving]` to the right, start to receive something of the shape of
# `chunks[coming]` from the left, wait for both, add.

# %% [markdown] lang="en" hint="02b.3"
# `chunks[coming] = chunks[coming] + came` makes a new tensor. `chunks[coming] += came` would write into `x`, of which
# the chunks are views.


# %% task="02b.3" title="Complete: reduce-scatter on a ring" engine="my_reduce_scatter"
def my_reduce_scatter(x: Tensor, axis: Axis) -> Tensor:
    """This rank's chunk of the sum of every rank's x. (size * k, ...) -> (k, ...). Leaves x as it is."""
    right, left = (axis.index + 1) % axis.size, (axis.index - 1) % axis.size
    chunks = list(x.chunk(axis.size))
    for step in range(axis.size - 1):
        ### BEGIN SOLUTION
        leaving, coming = (axis.index - 1 - step) % axis.size, (axis.index - 2 - step) % axis.size
        incoming = irecv(chunks[coming], axis, left)
        outgoing = isend(chunks[leaving], axis, right)
        chunks[coming] = chunks[coming] + incoming.wait()
        outgoing.wait()
        ### END SOLUTION
    return chunks[axis.index]


# %% check="02b.3" seconds=20
# Check of 02b.3: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    borrowed(my_reduce_scatter)
    for size in (4, 3, 2, 5):
        run = Network(size, my_reduce_scatter, lambda rank, size=size: numbers(rank, 2 * size, 3))
        whole = total(size, 2 * size, 3).chunk(size)
        for rank, got in enumerate(run.results):
            wrong = differs(got, whole[rank])
            why = f"it should be chunk {rank} of the sum"
            for other in range(size):
                own = not differs(got, run.given[rank].chunk(size)[rank])
                why += f". This is chunk {other}" * (not differs(got, whole[other]))
            why += ". These are its own numbers, nothing has been added" * own
            assert not wrong, f"{size} ranks: rank {rank} {wrong}: {why}."
        thrifty(run, size - 1, (size - 1) * 2 * 3 * 8, size - 1)
    for size in (4, 2):
        whole = total(size, 8, 3).chunk(size)
        for rank, real in enumerate(on_processes(my_reduce_scatter, size, (8, 3))):
            told, wrong = f"On {size} processes rank {rank}", differs(real["y"], whole[rank])
            assert not wrong, f"{told} {wrong}."
            assert real["same"], f"{told} changes the x that it was given."
    print(f"5 ranks: {max(run.clock)} rounds of 48 bytes; 2 processes: {real['bytes']} bytes of 192 from each")

# %% [markdown] lang="en"
# ## 02b.4 · Write: all-gather on a ring
#
# The second half. Each rank brings one chunk, and in the end all have all of them, side by side in the order of their
# ranks. In each of $n - 1$ steps every rank passes on what came last: in the first its own chunk, at step $s$ chunk
# $r - s$ (modulo $n$).
#
# **Target:** $n-1$ messages of one chunk from each rank, to a neighbor, in $n - 1$ rounds.

# %% [markdown] lang="en" hint="02b.4"
# Keep the chunks in a list or a dictionary by number, with your own in its place, and join them at the end with
# `torch.cat`.

# %% [markdown] lang="en" hint="02b.4"
# In step $s$ chunk $r - s$ leaves, and chunk $r - s - 1$ comes. All chunks have the same shape, that of `x`.


# %% task="02b.4" title="Write: all-gather on a ring" engine="my_all_gather"
def my_all_gather(x: Tensor, axis: Axis) -> Tensor:
    """Every rank's x along the first dimension, in the order of the ranks. (k, ...) -> (size * k, ...)"""
    ### BEGIN SOLUTION
    right, left = (axis.index + 1) % axis.size, (axis.index - 1) % axis.size
    chunks = {axis.index: x}
    for step in range(axis.size - 1):
        leaving, coming = (axis.index - step) % axis.size, (axis.index - step - 1) % axis.size
        incoming = irecv(x, axis, left)
        outgoing = isend(chunks[leaving], axis, right)
        chunks[coming] = incoming.wait()
        outgoing.wait()
    return torch.cat([chunks[rank] for rank in range(axis.size)])
    ### END SOLUTION


# %% check="02b.4" seconds=20
# Check of 02b.4: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    borrowed(my_all_gather)
    for size in (4, 3, 2, 5):
        run = Network(size, my_all_gather, lambda rank: numbers(rank, 2, 3))
        parts = [numbers(rank, 2, 3) for rank in range(size)]
        for rank, got in enumerate(run.results):
            wrong = differs(got, torch.cat(parts))
            if wrong == "returns other numbers":
                found = [next((r for r in range(size) if not differs(g, parts[r])), "?") for g in got.chunk(size)]
                wrong += f": the chunks of ranks {found}, in this order"
            assert not wrong, f"{size} ranks: rank {rank} {wrong}."
        thrifty(run, size - 1, (size - 1) * 2 * 3 * 8, size - 1)
    for size in (4, 2):
        for rank, real in enumerate(on_processes(my_all_gather, size, (2, 3))):
            wrong = differs(real["y"], torch.cat(parts[:size]))
            assert not wrong, f"On {size} processes rank {rank} {wrong}."
    print(f"5 ranks: {max(run.clock)} rounds of 48 bytes; 2 processes: {real['bytes']} bytes from each")

# %% [markdown] lang="en"
# ## 02b.5 · Write: an all-reduce of any size
#
# An all-reduce is a reduce-scatter and an all-gather. Put it together from the library's two halves:
# `reduce_scatter(x, axis)` gives this rank's share of the sum, along the first dimension, and `all_gather(x, axis)`
# puts shares of one length side by side.
#
# The difficulty: tensors have any shape, `(2, 5)` say, and ten numbers do not make four equal shares. The usual way is
# *padding*: put zeros behind the last number until it divides, and take them off at the end.
#
# **Target:** $2\,(n-1)/n \cdot M$ bytes from each rank, $M$ rounded up to what divides: for ten numbers on four ranks
# 144 bytes, and 240 if each rank sends all it has to all others. (`all_reduce` itself is for task 8. Here it is
# refused.)

# %% [markdown] lang="en" hint="02b.5"
# `x.flatten()` is 1-d with `x.numel()` numbers, `.view_as(x)` brings back the shape.

# %% [markdown] lang="en" hint="02b.5"
# `F.pad(flat, (0, k))` puts `k` zeros behind `flat`. In Python `-10 % 4` is 2: `-flat.numel() % axis.size` is what is
# missing to the next multiple.


# %% task="02b.5" title="Write: an all-reduce of any size" engine="my_all_reduce"
def my_all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """The sum of every rank's x, on every rank, in the shape of x, which may be any. Leaves x as it is."""
    ### BEGIN SOLUTION
    flat = x.flatten()
    padded = F.pad(flat, (0, -flat.numel() % axis.size))
    whole = all_gather(reduce_scatter(padded, axis), axis)
    return whole[: flat.numel()].view_as(x)
    ### END SOLUTION


# %% check="02b.5" seconds=20
# Check of 02b.5: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    borrowed(my_all_reduce)
    for shape, size in [((8,), 4), ((10,), 4), ((2, 5), 4), ((3,), 4), ((3, 3), 2), ((), 2)]:
        whole, count = total(size, *shape), prod(shape)
        for rank, real in enumerate(on_processes(my_all_reduce, size, shape)):
            told, wrong = f"Shape {shape} on {size} ranks: rank {rank}", differs(real["y"], whole)
            assert not wrong, f"{told} {wrong}."
            assert real["same"], f"{told} changes the x that it was given."
            once = "all_reduce" not in real["ops"]
            assert once, f"{told} has the right sum, but calls all_reduce: put it together from two halves."
            least = 2 * (size - 1) * ceil(count / size) * 8
            what = f"{told} has the right sum, but sends {real['bytes']} bytes"
            assert real["bytes"] <= least, f"{what}. Twice (n-1)/n of {ceil(count / size) * size * 8} are {least}."
            assert real["calls"] <= 2, f"{told} has the right sum, but makes {real['calls']} calls: two halves are 2."
            if shape == (10,):
                ten = least
    print(f"10 numbers on 4 ranks: no more than {ten} bytes from each")

# %% [markdown] lang="en"
# ## 02b.6 · Write: broadcast by a tree
#
# One rank, the *root*, has the weights, and all need them. If the root sends to each in turn, that is $n - 1$ rounds.
# But whoever has the tensor can help: after the first round two have it, then four, then eight.
#
# Count from the root: rank `axis.index` stands at place `(axis.index - root) % axis.size`. When `have` ranks have the
# tensor, those at the places below `have` send to the places `have` further on, as far as there are any.
#
# **Target:** $n - 1$ messages in all, and $\lceil \log_2 n \rceil$ rounds: three for eight ranks, and three for five.

# %% [markdown] lang="en" hint="02b.6"
# Begin with `have = 1`, and double it while it is below `axis.size`. In each round a rank sends, receives, or does
# nothing.

# %% [markdown] lang="en" hint="02b.6"
# With `place < have` it sends, if `place + have` is a place at all; with `have <= place < 2 * have` it receives.

# %% [markdown] lang="en" hint="02b.6"
# The rank at the place `have` further on is `(axis.index + have) % axis.size`. `recv(x, axis, source)` returns what
# came: send that on in later rounds.


# %% task="02b.6" title="Write: broadcast by a tree" engine="my_broadcast"
def my_broadcast(x: Tensor, axis: Axis, root: int = 0) -> Tensor:
    """The root's x, on every rank. All of them give a tensor of the same shape, and leave it as it is."""
    ### BEGIN SOLUTION
    place, have = (axis.index - root) % axis.size, 1
    while have < axis.size:
        if place < have and place + have < axis.size:
            send(x, axis, (axis.index + have) % axis.size)
        elif have <= place < 2 * have:
            x = recv(x, axis, (axis.index - have) % axis.size)
        have *= 2
    return x
    ### END SOLUTION


# %% check="02b.6" seconds=20
# Check of 02b.6: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    borrowed(my_broadcast, "broadcast", "all_reduce", "all_gather", "reduce_scatter")
    for size, root in [(4, 0), (2, 0), (8, 0), (5, 0), (4, 1), (5, 3), (7, 6), (2, 1)]:
        more = (root,) if root else ()  # it is 0 where nobody says
        run = Network(size, my_broadcast, lambda rank: numbers(rank, 3), *more)
        case = f"{size} ranks, root {root}"
        for rank, got in enumerate(run.results):
            wrong = differs(got, numbers(root, 3))
            why = " This is its own x." * (rank != root and not differs(got, numbers(rank, 3)))
            assert not wrong, f"{case}: rank {rank} {wrong}.{why}"
            assert run.unchanged[rank], f"{case}: rank {rank} has the right numbers, but changes the x it was given."
        sent, rounds = sum(kind == "send" for kind, _ in run.started), max(run.clock)
        told = f"{case}: all have it, but"
        assert sent == size - 1, f"{told} {sent} messages were sent: {size - 1} ranks need it, each of them once."
        all_waited_for(run)
        least = ceil(log2(size))
        assert rounds <= least, f"{told} after {rounds} rounds: in {least} it can be done. Who could have helped?"
        if size == 8:
            eight = rounds
    for root, rank in [(1, 0), (1, 2), (3, 3)]:
        wrong = differs(on_processes(my_broadcast, 4, (3,), root)[rank]["y"], numbers(root, 3))
        assert not wrong, f"On four processes, root {root}: rank {rank} {wrong}."
    print(f"8 ranks: {eight} rounds; 5 ranks: {ceil(log2(5))}")

# %% [markdown] lang="en"
# ## 02b.7 · Write: who is on my line?
#
# A mesh is a grid of ranks with named axes. Ranks are numbered with the last axis fastest: with the shape
# `{"dp": 2, "pp": 2, "tp": 2}` the `tp` neighbors 0 and 1 come first, then 2 and 3. The *line* of a rank along an axis
# are the ranks that differ from it in their place along that axis only. These talk to each other: along `tp` rank 5
# talks with 4, along `pp` with 7, along `dp` with 1.
#
# Write it for any shape, from division and remainder, without a search over all ranks: the check asks on a mesh of four
# million ranks, too.

# %% [markdown] lang="en" hint="02b.7"
# Neighbors along an axis differ by as many ranks as the axes behind it have places: along `tp` by 1, along `pp` by 2,
# along `dp` by 2 · 2. `prod(numbers)` multiplies; of no numbers it is 1.

# %% [markdown] lang="en" hint="02b.7"
# With that `step`, the rank's own place along the axis is `rank // step % shape[axis]`.

# %% [markdown] lang="en" hint="02b.7"
# The first of the line is `rank - place * step`.


# %% task="02b.7" title="Write: who is on my line?" engine="my_line"
def my_line(axis: str, rank: int, shape: dict[str, int]) -> list[int]:
    """The ranks that differ from `rank` along this axis only, itself too, in order.

    shape: of the mesh, the size of each axis by its name, the slowest first.
    """
    ### BEGIN SOLUTION
    names = list(shape)
    step = prod(shape[inner] for inner in names[names.index(axis) + 1 :])
    first = rank - rank // step % shape[axis] * step
    return [first + step * place for place in range(shape[axis])]
    ### END SOLUTION


# %% check="02b.7" seconds=20
# Check of 02b.7: run this after your answer
# NBVAL_CHECK_OUTPUT
def line_of(axis, rank, shape):
    """By a search: places are the digits of a rank."""

    def places(number):
        return {name: number // prod([*shape.values()][i + 1 :]) % shape[name] for i, name in enumerate(shape)}

    mine = {name: place for name, place in places(rank).items() if name != axis}
    return [other for other in range(prod(shape.values())) if mine.items() <= places(other).items()]


with verdict():
    borrowed(my_line, "Mesh", "line", "lines", "plane", "connect", "device_mesh", "range_of_ranks")
    for shape in ({"dp": 2, "pp": 2, "tp": 2}, {"dp": 3, "tp": 4}, {"a": 2, "b": 3, "c": 1, "d": 2}, {"x": 5}):
        for rank in range(prod(shape.values())):
            right = {axis: line_of(axis, rank, shape) for axis in shape}
            for axis in shape:
                got = list(returned(my_line(axis, rank, shape), "my_line"))
                told = f"{shape}: along {axis!r} rank {rank} is on the line {right[axis]}, and you say {got}."
                other = next((name for name in shape if got == right[name]), None)
                told += f" That is its line along {other!r}: the last axis varies fastest." * (other is not None)
                told += " They are the right ones, in another order." * (sorted(got) == right[axis])
                assert got == right[axis], told
    start, many = process_time(), {"dp": 8000, "pp": 64, "tp": 8}
    told = f"dp=8000, pp=64, tp=8: along tp rank 5 is on the line [0, 1, ... 7], and you say {my_line('tp', 5, many)}."
    assert my_line("tp", 5, many) == list(range(8)), told
    took = process_time() - start
    assert took < 0.2, f"Right, but with 4,096,000 ranks it takes {took / 2:.1f} s: is there a search over all of them?"
    big = my_line("dp", 16_000, {"dp": 128, "pp": 16, "tp": 8})
    assert big == list(range(0, 16_384, 128)), f"dp=128, pp=16, tp=8: rank 16,000 is not on the dp line {big[:3]} ..."
    print(f"16,384 ranks: dp line of rank 16,000 has {len(big)} ranks, {big[1] - big[0]} apart")

# %% [markdown] lang="en"
# ## 02b.8 · Mend: the rank that does not come
#
# In 16 bits a gradient may overflow. Such a step is skipped. The function below does that: if my gradient is not
# finite, return None; else return the sum of all ranks' gradients. On one process it always works. On several it works
# until one rank meets an infinity and the others do not. Then they wait until a time limit ends the run.
#
# A collective is called by **all** ranks of its line or by none. Say which ranks wait, when rank 2 of four meets a NaN.
# Then mend it: all ranks have to decide the same.
#
# **Target:** the all-reduce of the gradient, and at most one more call of a few bytes. `all_reduce(x, axis)` returns
# the sum of every rank's `x`.

# %% [markdown] lang="en" hint="02b.8"
# Rank 2 knows of its NaN, and the others do not. How do they learn of it? There is only one way: something is sent, and
# all take part.

# %% [markdown] lang="en" hint="02b.8"
# `gradient.isfinite().all()` is a tensor with one truth value. Turn "mine is bad" into a number, sum it over the ranks,
# and decide by the sum. (Or look what a sum becomes if one of its terms is not finite.)


# %% task="02b.8" title="Mend: the rank that does not come"
def ranks_that_wait() -> list[int]:
    """On four ranks, rank 2 with a NaN: those that wait in the function below, before it is mended."""
    ### BEGIN SOLUTION
    return [0, 1, 3]
    ### END SOLUTION


def sum_if_finite(gradient: Tensor, axis: Axis) -> Tensor | None:
    """The sum of every rank's gradient; on all ranks None if one of them has a number that is not finite."""
    ### BEGIN SOLUTION
    bad = all_reduce((~gradient.isfinite().all()).long(), axis)
    if bad > 0:
        return None
    ### INSTEAD
    # if not gradient.isfinite().all():
    #     return None
    ### END SOLUTION
    return all_reduce(gradient, axis)


# %% check="02b.8" seconds=30
# Check of 02b.8: run this after your answer
# NBVAL_CHECK_OUTPUT
def step_of(size, bad, value):
    """Ranks `bad` have this value among their numbers."""

    def function(x, axis):
        gradient = x.index_fill(0, torch.tensor([1]), value) if axis.index in bad else x
        return sum_if_finite(gradient, axis)

    return on_processes(function, size, (1000,))


with verdict():
    waiting = list(returned(ranks_that_wait(), "ranks_that_wait"))
    assert 2 not in waiting, "Rank 2 does not wait: it returns None at once, and goes on to the next step."
    assert sorted(waiting) == [0, 1, 3], f"{waiting}: who calls all_reduce, and how many have to?"
    for size, bad, value in [(4, [2], torch.nan), (4, [], 0), (4, [0, 1, 2, 3], torch.inf), (2, [0], -torch.inf)]:
        case = f"{size} ranks, {value} on rank{'s' * (len(bad) > 1)} {', '.join(map(str, bad)) or 'none'}"
        for rank, real in enumerate(step_of(size, bad, value)):
            told = f"{case}: rank {rank}"
            if bad:
                assert real["y"] is None, f"{told} returns a tensor, and all have to skip this step: return None."
            else:
                assert real["y"] is not None, f"{told} skips the step, and every number is finite."
                wrong = differs(real["y"], total(size, 1000))
                assert not wrong, f"{told} {wrong}."
            least = 2 * (size - 1) * 8 * 1000 // size + 64
            assert real["bytes"] <= least, f"{told} is right, but sends {real['bytes']} bytes: {least} are enough."
            assert real["calls"] <= 2, f"{told} is right, but makes {real['calls']} calls: one more is enough."
    print(f"all skip the step or none: the gradient's {least - 64:,} bytes on 2 ranks, and at most 64 more")

# %% [markdown] lang="en"
# ## All together
#
# Your pieces at work: four ranks that begin with different weights, of which your tree makes the same; two rows of text
# for each; gradients summed over your ring; each rank updates its share of the weights, and your ring gathers them. It
# runs once tasks 3, 4 and 6 are done.


# %% tags=["raises-exception"]
def your_training(axis, steps):
    model, losses = fresh_model(), []
    weights = nn.utils.parameters_to_vector(model.parameters()).detach()
    size = len(weights)
    weights = my_broadcast(F.pad(weights, (0, -size % axis.size)) + axis.index, axis)
    own = nn.Parameter(weights.chunk(axis.size)[axis.index].clone())
    optimizer = torch.optim.Adam([own], lr=3e-3)
    for tokens, targets in corpus.batches(steps, rows=2 * axis.size, context=32):
        nn.utils.vector_to_parameters(weights[:size], model.parameters())
        model.zero_grad()
        mine = slice(2 * axis.index, 2 * axis.index + 2)
        loss = total_loss(model, tokens[mine], targets[mine]) / targets.numel()
        loss.backward()
        gradient = nn.utils.parameters_to_vector([p.grad for p in model.parameters()])
        with ledger() as book:
            own.grad = my_reduce_scatter(F.pad(gradient, (0, len(weights) - size)), axis)
            optimizer.step()
            weights = my_all_gather(own.detach(), axis)
        losses.append(all_reduce(loss.detach(), axis).item())
    return losses, book.bytes(), 2 * (axis.size - 1) * weights.nbytes // axis.size


losses, sent, formula = along(world, "dp", your_training, 50)[0]
print("loss:", *(f"{loss:.2f}" for loss in losses[::7]))
print(f"a step sends {sent:,} bytes from each rank; 2(n-1)/n of the weights are {formula:,}")
