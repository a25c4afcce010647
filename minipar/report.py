"""What the caller reads: the ranks' output line by line, and when a run fails, what happened where."""

import linecache
import os
import signal
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch

from . import travel
from .board import MismatchError, Standing, is_own, nth
from .rank import Failure, Frame

TORCH = f"{Path(torch.__file__).parent}/"
HOME = f"{Path(__file__).parent}/"
LOST = ("onnection closed", "onnection reset", "roken pipe", "pair closure", "Socket")  # said where a peer is gone


@dataclass(frozen=True)
class Witness:
    """All that is known of one rank when a run fails."""

    rank: int
    returned: bool = False
    failure: Failure | None = None
    exit: int | None = None  # how its process ended: a status, or minus a signal
    frames: tuple[Frame, ...] = ()  # where it is, if it still runs
    standing: Standing | None = None  # its last call of torch.distributed

    @property
    def waits(self) -> bool:
        """Whether it waits in a call that the board knows."""
        return self.pending and self.standing is not None and self.standing.waiting

    @property
    def pending(self) -> bool:
        """Whether it is neither done nor dead."""
        return not self.returned and self.failure is None and self.exit is None

    @property
    def lost(self) -> bool:
        """Whether it failed only because another rank was gone."""
        return self.failure is not None and any(words in self.failure.text for words in LOST)


# -- places --------------------------------------------------------------------------------------------------------


def name_of(file: str) -> str:
    """How the caller calls a source file: the cell's number in a notebook, else its path from here."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    cell = shell.compile.format_code_name(file) if shell else None
    if cell:
        return " ".join(cell)
    return os.path.relpath(file) if os.path.isabs(file) and Path(file).is_relative_to(Path.cwd()) else file


def _source(file: str, line: int) -> str:
    return linecache.getline(file, line).strip()


def _at(file: str, line: int) -> str:
    text = _source(file, line)
    return f"line {line} of {name_of(file)}" + (f": {text}" if text else "")


def _own(frames: Iterable[Frame]) -> list[Frame]:
    frames = list(frames)
    return [f for f in frames if is_own(f.file)] or frames[-1:]


def excerpt(frame: Frame, around: int = 2) -> str:
    """The lines around a place, with a mark."""
    numbers = range(max(1, frame.line - around), frame.line + around + 1)
    lines = [(n, linecache.getline(frame.file, n).rstrip()) for n in numbers]
    while lines and not lines[-1][1]:
        lines.pop()
    return "\n".join(f"{'--->' if n == frame.line else '    '} {n:4} {text}".rstrip() for n, text in lines)


# -- one rank ------------------------------------------------------------------------------------------------------


def ending(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"ended its process with status {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def raised(failure: Failure, brief: bool = False) -> str:
    """What a function raised, in words; its first line only where `brief`."""
    if failure.kind == "SystemExit":
        return f"called exit({failure.text})"
    text = failure.text
    if failure.kind == MismatchError.__name__ and failure.exception:
        text = str(travel.loads(failure.exception))  # this process knows the source of a cell, a rank does not
    if brief:
        text = text.partition("\n")[0].rstrip(":")
    return f"raised {failure.kind}" + (f": {text}" if text else "")


def stand(w: Witness) -> str:
    """Where a rank stands, in a line."""
    call = w.standing.call if w.standing else None
    if w.returned:
        return "returned"
    if w.exit is not None:
        if w.frames:
            return f"{ending(w.exit)}, {_at(*_own(w.frames)[-1][:2])}"
        when = "while it waited in" if w.standing and w.standing.waiting else "after"
        return ending(w.exit) + (f" {when} {call.what}, {_at(call.file, call.line)}" if call else "")
    if w.failure is not None:
        place = "".join(f", {_at(f.file, f.line)}" for f in _own(w.failure.frames)[-1:])
        return ("lost the connection to a rank that was gone" if w.lost else raised(w.failure, brief=True)) + place
    if w.waits and w.standing and call:
        whom = " for " + _ranks(w.standing.missing) if w.standing.missing else ""
        return f"waits{whom} in {call.what}, {_at(call.file, call.line)}"
    if not w.frames:
        return "gives no answer" + (f"; its last call was {call.what}" if call else "")
    own, inner = _own(w.frames)[-1], w.frames[-1]
    inside = "" if own is inner else f" (inside {inner.function}, {_short(inner.file)}:{inner.line})"
    return f"is at {_at(own.file, own.line)}{inside}"


def _short(file: str) -> str:
    return "/".join(Path(file).parts[-3:])


def _ranks(ranks: Iterable[int]) -> str:
    ranks = list(ranks)
    return f"rank {ranks[0]}" if len(ranks) == 1 else "ranks " + ", ".join(map(str, ranks))


def table(witnesses: Iterable[Witness]) -> dict[int, str]:
    """A line a rank."""
    return {w.rank: f"rank {w.rank} {stand(w)}" for w in witnesses}


# -- the whole run -------------------------------------------------------------------------------------------------


def explain(witnesses: list[Witness], verdict: str) -> tuple[str, int | None]:
    """The report of a failed run, and the rank that is to blame if there is one.

    verdict: why the world stopped waiting where no rank had failed.
    """
    linecache.checkcache()  # files may have changed since they were read
    lines = table(witnesses)
    first = _first(witnesses)
    if first is None:
        cause = why(witnesses)
        return "\n\n".join(filter(None, [verdict, indent(lines.values()), cause])), None
    alike = [w.rank for w in witnesses if w is not first and w.failure and _same(w.failure, first.failure)]
    parts = [_blame(first)]
    if alike:
        parts.append(f"So did {_ranks(alike)}.")
    others = [line for rank, line in lines.items() if rank != first.rank and rank not in alike]
    if others:
        parts.append("The others:\n" + indent(others))
    return "\n\n".join(parts), first.rank


def _first(witnesses: list[Witness]) -> Witness | None:
    """The rank that failed first, not counting those that failed because it was gone."""
    failed = [w for w in witnesses if w.failure or w.exit is not None]
    causes = [w for w in failed if not w.lost] or failed
    return min(causes, key=lambda w: w.failure.when if w.failure else 0.0, default=None)


def _same(one: Failure, other: Failure | None) -> bool:
    if other is None or one.kind != other.kind:
        return False
    return one.kind == MismatchError.__name__ or (one.text, one.frames) == (other.text, other.frames)


def _blame(w: Witness) -> str:
    if w.lost:
        return f"rank {w.rank} {stand(w)}"
    lines = [f"rank {w.rank} {raised(w.failure) if w.failure else stand(w)}"]
    frames = w.failure.frames if w.failure else w.frames
    own = [f for f in frames if is_own(f.file)]
    if own:
        place, inner = own[-1], frames[-1]
        lines += ["", f"{name_of(place.file)}, line {place.line}, in {place.function}", excerpt(place)]
        if inner is not place and not inner.file.startswith((HOME, "<")):
            lines.append(f"inside {inner.function}, {_short(inner.file)}:{inner.line}")
        lines += [f"called from {_at(f.file, f.line)}" for f in reversed(own[:-1])]
    return "\n".join(lines)


def indent(lines: Iterable[str]) -> str:
    """Each line two spaces to the right."""
    return "\n".join(f"  {line}" for line in lines)


def why(witnesses: list[Witness]) -> str:
    """Why ranks wait for ever: who never came, or who waits for whom in a circle."""
    by_rank = {w.rank: w for w in witnesses}
    sentences = []
    for w in witnesses:
        if w.waits and w.standing:
            for rank in w.standing.missing:
                if by_rank[rank].returned:
                    sentences.append(f"rank {rank} returned without {_part(w.standing, rank)}")
    if sentences:
        return "\n".join(dict.fromkeys(sentences))
    circle = _circle({w.rank: w.standing.missing for w in witnesses if w.waits and w.standing})
    if circle:
        return "the circle: " + " -> ".join(f"rank {rank}" for rank in circle)
    returned = [w.rank for w in witnesses if w.returned]
    inside = [w.rank for w in witnesses if w.pending and not w.waits]
    if returned and inside:
        return f"{_ranks(returned)} returned while {_ranks(inside)} wait inside torch, most likely for that"
    return ""


def _part(s: Standing, rank: int) -> str:
    """What a rank should have done for others' call to end."""
    if s.kind == "group":
        return f"joining {s.call.what.split(' of ')[0]}, {nth(s.kind, s.ranks, s.call.number)}"
    if len(s.ranks) == 1:
        return f"sending what rank {s.ranks[0]} waits for"
    source, target = s.ranks
    return (
        f"receiving message {s.call.number} of rank {source}"
        if rank == target
        else f"sending message {s.call.number} to rank {target}"
    )


def unmatched(leftovers: list[tuple[int, Standing]]) -> str:
    """What a run left under way that all ranks had ended."""
    lines = [
        f"rank {rank} did {s.call.what}, {_at(s.call.file, s.call.line)}; "
        f"{_ranks(s.missing)} returned without {_part(s, s.missing[0])}"
        for rank, s in leftovers
    ]
    return "calls of this run were left unanswered, so the world has fresh ranks now:\n" + indent(lines)


def _circle(waits_for: dict[int, tuple[int, ...]]) -> list[int]:
    """A shortest way from a rank back to itself along who waits for whom, [] if there is none."""
    best: list[int] = []
    for start in waits_for:
        ways = [[start]]
        seen = {start}
        while ways:
            way = ways.pop(0)
            for rank in waits_for.get(way[-1], ()):
                if rank == start and (not best or len(way) + 1 < len(best)):
                    best = [*way, rank]
                if rank not in seen:
                    seen.add(rank)
                    ways.append([*way, rank])
    return best


# -- output --------------------------------------------------------------------------------------------------------


class Output:
    """Prints what ranks write, each line behind its rank. A line redrawn with \\r is redrawn here too."""

    def __init__(self) -> None:
        self.tails: dict[tuple[int, str], bytes] = {}
        self.lines = 0  # printed so far
        self.open: tuple[int, str] | None = None  # whose unfinished line stands on the screen

    def add(self, rank: int, stream: str, data: bytes) -> None:
        """Print the complete lines of what has come, and keep the rest."""
        source = rank, stream
        *lines, tail = (self.tails.get(source, b"") + data).split(b"\n")
        text = [self._line(source, line) + "\n" for line in lines]
        if b"\r" in tail:
            tail = b"\r" + tail.rstrip(b"\r").rsplit(b"\r", 1)[-1]
            text.append(self._line(source, tail))
            self.open = source
        self.tails[source] = tail
        if text:
            _file(stream).write("".join(text))
            _file(stream).flush()

    def _line(self, source: tuple[int, str], line: bytes) -> str:
        before = "" if self.open is None else "\r" if self.open == source else "\n"
        self.open = None
        self.lines += 1
        last = line.rstrip(b"\r").rsplit(b"\r", 1)[-1]  # what stands there after all redrawing
        return f"{before}[{source[0]}] {last.decode(errors='replace')}"

    def finish(self) -> None:
        """Print the lines that were not ended."""
        for source, tail in self.tails.items():
            if tail:
                _file(source[1]).write(self._line(source, tail) + "\n")
        self.tails.clear()


def _file(stream: str) -> TextIO:
    return sys.stdout if stream == "stdout" else sys.stderr
