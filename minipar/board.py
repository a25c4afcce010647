"""A page of memory that the ranks of a world share: each rank writes what it is in, everyone can read it.

Every rank has a region that only it writes, so there is no lock. Calls are counted along *lines*: a group has one
line for its collectives, and each way from one rank to another has one for its messages. The n-th call of a rank
along a line belongs to the n-th call of the others, so a rank can compare its call with theirs before it makes it.
It writes its own first and then reads the others': whoever comes second sees both, and nobody waits for that.

A region holds what the rank is in now, then a row per line: the line's key, the number of calls so far, and the
signature and text of each of the last calls.
"""

import ast
import linecache
import mmap
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

import torch

ROWS, DEPTH = 512, 16  # lines of a rank, calls remembered along each
TEXT = 1024  # bytes: of a text, and of the head of a region or row
ROW = TEXT * (1 + DEPTH)
REGION = TEXT + ROWS * ROW
# What the 8-byte words of a region's head mean, and those of a row's head. A text begins at the last one.
MOVED, WAITING, BALANCE, CALL, SINCE, PLACE = range(6)
KEY, COUNT, BASE, SIGNATURES, TITLE = 0, 1, 2, 3, 3 + DEPTH
MASK = (1 << 64) - 1

Splits = tuple[list[int], list[int]]  # elements that a rank sends to, and expects from, each rank of a group


def digest(*parts: object) -> int:
    """64 bits that are the same in every process, never 0."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "little") | 1


def text_of(what: str, file: str, line: int) -> bytes:
    """How a call is written."""
    return b"%b\n%b\n%d\0" % (what.encode()[:300], file.encode()[-300:], line)


def nth(kind: str, ranks: tuple[int, ...], number: int) -> str:
    """Which call along a line, in words."""
    if kind == "message":
        return f"message {number} from rank {ranks[0]} to rank {ranks[1]}"
    return f"call {number} of the group of ranks {', '.join(map(str, ranks))}"


@dataclass(frozen=True)
class Call:
    """A call as the board knows it."""

    what: str  # "all_reduce(sum) of float32 (4,)"
    file: str  # with `line`: where in the caller's own source
    line: int
    number: int  # along its line since the run began, from 1

    @property
    def source(self) -> str:
        """The text of that line, where this process knows it, else the name of the file."""
        return linecache.getline(self.file, self.line).strip() or f"of {self.file}"


@dataclass(frozen=True)
class Standing:
    """What a rank waits in, or was in last."""

    call: Call
    kind: str  # "group" or "message"
    ranks: tuple[int, ...]  # of the group; of a message: from, to
    missing: tuple[int, ...]  # those of them that have not come to this call
    waiting: bool
    since: float  # of time.monotonic


class MismatchError(RuntimeError):
    """Two ranks made calls that do not fit together. Raised before anything is sent."""

    def __init__(self, kind: str, ranks: tuple[int, ...], sides: dict[int, Call]) -> None:
        super().__init__(kind, ranks, sides)
        self.kind, self.ranks, self.sides = kind, ranks, sides

    def __str__(self) -> str:
        which = nth(self.kind, self.ranks, min(call.number for call in self.sides.values()))
        lines = [f"these calls do not fit together ({which}):"]
        lines += [f"  rank {r}: {c.what}   line {c.line}: {c.source}" for r, c in sorted(self.sides.items())]
        return "\n".join(lines)


# -- the caller's own source ---------------------------------------------------------------------------------------

_LIBRARIES = (
    f"{Path(torch.__file__).parents[1]}/",
    f"{Path(linecache.__file__).parent}/",
    f"{Path(__file__).parent}/",
    "<frozen",
    "<string>",
)
_own: dict[str, bool] = {}


def is_own(file: str) -> bool:
    """Whether a source file is the caller's: not minipar's, not Python's, not that of an installed package."""
    own = _own.get(file)
    if own is None:
        own = _own[file] = not file.startswith(_LIBRARIES)
    return own


def place() -> tuple[str, int]:
    """The file and line of the caller's own source that led here."""
    frame = inner = sys._getframe(2)
    while not is_own(frame.f_code.co_filename):
        if frame.f_back is None:
            frame = inner
            break
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


# -- the board -----------------------------------------------------------------------------------------------------


class Line:
    """One rank's end of a line."""

    def __init__(self, kind: str, ranks: tuple[int, ...], me: int, name: object) -> None:
        self.kind, self.ranks, self.me = kind, ranks, me
        self.key = digest(kind, ranks, name)
        self.count = 0  # calls so far
        self.row = 0  # word where this rank's row begins, 0 before the first call
        self.peers = [[rank, 0] for rank in ranks if rank != me]  # with the word of their row, 0 while not known
        # One call by every rank of the line adds up to 0. Calls by some of them do not.
        shares = [digest(self.key, rank) for rank in ranks[1:]]
        self.share = (-sum(shares) if me == ranks[0] else digest(self.key, me)) & MASK


class Board:
    """The page, as seen by one of `size` ranks, or by the world, which only reads (rank None)."""

    def __init__(self, path: str, size: int, rank: int | None = None) -> None:
        with open(path, "r+b") as file:
            self.bytes = mmap.mmap(file.fileno(), size * REGION)
        self.words = memoryview(self.bytes).cast("Q")
        self.seconds = memoryview(self.bytes).cast("d")
        self.size, self.rank = size, rank
        self.head = (rank or 0) * REGION // 8
        self.lines: dict[object, Line] = {}

    @staticmethod
    def create(path: str, size: int) -> None:
        """Make the file. It takes room only where something is written."""
        with open(path, "xb") as file:
            file.truncate(size * REGION)

    # -- a rank writes

    def line(self, kind: str, ranks: tuple[int, ...], name: object) -> Line:
        """This rank's end of a line. `name` tells apart lines between the same ranks."""
        line = self.lines.get((kind, ranks, name))
        if line is None:
            assert self.rank is not None, "only a rank has lines"
            line = self.lines[kind, ranks, name] = Line(kind, ranks, self.rank, name)
        return line

    def begin(self) -> None:
        """A new run: calls are numbered from 1 again."""
        for line in self.lines.values():
            if line.row:
                self.words[line.row + BASE] = line.count

    def enter(self, line: Line, signature: int, text: bytes, splits: Splits | None = None) -> None:
        """Write this rank's next call along a line and compare it with what the others wrote.

        text: as `text_of` gives it. Raises MismatchError where another rank's call of the same number has another
        signature, or sends another number of elements than this one expects.
        """
        words, head, number = self.words, self.head, line.count
        row = line.row or self._open(line)
        slot = number % DEPTH
        at = row * 8 + TEXT * (1 + slot)
        if splits:
            text = (text[:-1] + b"\n%a" % (splits,))[: TEXT - 1] + b"\0"
        self.bytes[at : at + len(text)] = text
        words[row + SIGNATURES + slot] = signature
        line.count = words[row + COUNT] = number + 1
        words[head + CALL] = at
        words[head + PLACE] = 0
        for peer in line.peers:
            theirs = peer[1] or self._meet(peer, line)
            if theirs and number < words[theirs + COUNT] <= number + DEPTH:
                there = theirs * 8 + TEXT * (1 + slot)
                if words[theirs + SIGNATURES + slot] != signature or (
                    splits and not self._agree(line, splits, peer[0], there)
                ):
                    raise MismatchError(line.kind, line.ranks, {line.me: self._call(at), peer[0]: self._call(there)})
        words[head + BALANCE] = (words[head + BALANCE] + line.share) & MASK

    def undo(self, line: Line) -> None:
        """The call failed before it sent anything: it does not answer what the others sent."""
        self.words[self.head + BALANCE] = (self.words[self.head + BALANCE] - line.share) & MASK

    def wait(self) -> None:
        """From now on this rank waits in the call that it entered last."""
        self.seconds[self.head + SINCE] = time.monotonic()
        self.words[self.head + WAITING] = 1

    def wait_again(self, call: int, where: tuple[str, int]) -> None:
        """From now on this rank waits, at `where`, for an earlier call: `call` is what `last` was then."""
        text = text_of("", *where)
        at = (self.head + PLACE) * 8
        self.bytes[at : at + len(text)] = text
        self.words[self.head + CALL] = call
        self.wait()

    def done(self) -> None:
        """This rank waits no longer."""
        self.words[self.head + WAITING] = 0
        self.words[self.head + MOVED] += 1

    @property
    def last(self) -> int:
        """The call that this rank entered last."""
        return self.words[self.head + CALL]

    # -- rows

    def _rows(self, rank: int, key: int) -> Iterator[int]:
        """Words where the rows of a rank begin, from the one where this key is looked for first."""
        first = rank * REGION + TEXT
        return ((first + (key + i) % ROWS * ROW) // 8 for i in range(ROWS))

    def _find(self, rank: int, key: int) -> int:
        """The word where the row of a line begins in a rank's region, 0 if it has none."""
        for row in self._rows(rank, key):
            if self.words[row] == key:
                return row
            if not self.words[row]:
                break
        return 0

    def _meet(self, peer: list[int], line: Line) -> int:
        peer[1] = self._find(peer[0], line.key)
        return peer[1]

    def _open(self, line: Line) -> int:
        """Take a free row for a line of this rank."""
        for row in self._rows(line.me, line.key):
            if not self.words[row]:
                text = f"{line.kind} {line.ranks}\0".encode()
                at = (row + TITLE) * 8
                self.bytes[at : at + len(text)] = text
                self.words[row] = line.key
                line.row = row
                return row
        raise RuntimeError(f"more than {ROWS} groups and ways of messages: start a new World, or one with watch=False")

    # -- everyone reads

    def _text(self, at: int) -> str:
        return self.bytes[at : self.bytes.find(b"\0", at, at + TEXT)].decode(errors="replace")

    def _call(self, at: int) -> Call:
        row, number = self._where(at)
        what, file, line, *_ = self._text(at).split("\n")
        return Call(what, file, int(line), number - self.words[row + BASE] + 1)

    def _where(self, at: int) -> tuple[int, int]:
        """The word of the row that the text of a call stands in, and the number of that call along its line."""
        row = (at - (at % REGION - TEXT) % ROW) // 8
        slot = (at - row * 8) // TEXT - 1
        last = self.words[row + COUNT] - 1
        return row, last - (last - slot) % DEPTH

    def _title(self, row: int) -> tuple[str, tuple[int, ...]]:
        kind, ranks = self._text((row + TITLE) * 8).split(" ", 1)
        return kind, ast.literal_eval(ranks)

    def _agree(self, line: Line, mine: Splits, peer: int, there: int) -> bool:
        try:
            theirs = ast.literal_eval(self._text(there).split("\n")[3])
        except SyntaxError:  # too many ranks for the text
            return True
        me, you = line.ranks.index(line.me), line.ranks.index(peer)
        return (mine[0][you], mine[1][you]) == (theirs[1][me], theirs[0][me])

    def standing(self, rank: int) -> Standing | None:
        """What a rank waits in, or was in last. None if it never communicated."""
        head = rank * REGION // 8
        at = self.words[head + CALL]
        if not at:
            return None
        call = self._call(at)
        row, number = self._where(at)
        kind, ranks = self._title(row)
        where = self._text((head + PLACE) * 8)
        if where:
            _, file, line = where.split("\n")
            call = replace(call, file=file, line=int(line))
        missing = tuple(r for r in ranks if r != rank and self._count(r, self.words[row]) <= number)
        return Standing(call, kind, ranks, missing, bool(self.words[head + WAITING]), self.seconds[head + SINCE])

    def _count(self, rank: int, key: int) -> int:
        row = self._find(rank, key)
        return self.words[row + COUNT] if row else 0

    def moved(self) -> tuple[int, ...]:
        """Changes whenever a rank begins or ends to wait."""
        heads = range(0, self.size * REGION // 8, REGION // 8)
        return tuple(self.words[head + MOVED] * 2 + self.words[head + WAITING] for head in heads)

    def waits(self, rank: int) -> bool:
        """Whether a rank waits now."""
        return bool(self.words[rank * REGION // 8 + WAITING])

    def balanced(self) -> bool:
        """Whether every call was made by all the ranks that it needs: no message is under way."""
        return not sum(self.words[rank * REGION // 8 + BALANCE] for rank in range(self.size)) & MASK

    def leftovers(self) -> list[tuple[int, Standing]]:
        """The last call of each rank along each line where another rank made fewer, with the ranks that did."""
        found = []
        for rank in range(self.size):
            for row in self._rows(rank, 0):
                key, count = self.words[row], self.words[row + COUNT]
                if not key:
                    continue
                kind, ranks = self._title(row)
                missing = tuple(r for r in ranks if self._count(r, key) < count)
                if missing:
                    call = self._call(row * 8 + TEXT * (1 + (count - 1) % DEPTH))
                    found.append((rank, Standing(call, kind, ranks, missing, False, 0.0)))
        return found
