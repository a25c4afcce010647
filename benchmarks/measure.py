"""What is measured, and how sure it is."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """The bootstrap interval of the median: how far it moves when the values are drawn again from themselves."""
    drawn = np.random.default_rng(0).choice(np.asarray(values), (RESAMPLES, len(values)))
    low, high = np.quantile(np.median(drawn, axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@dataclass
class Row:
    """One line of the table. Values are in seconds, one for each round; the i-th of all columns share a round."""

    name: str
    what: str
    minipar: list[float]
    peer: list[float] | None = None
    peer_name: str = ""
    floor: list[float] | None = None
    unwatched: list[float] | None = None  # minipar in a World that does not watch
    memory: int | None = None  # bytes of tensors at the peak of a step ...
    peer_memory: int | None = None  # ... and the peer's
    note: str = ""  # why there is no peer
    most_ratio: float | None = None  # the mark, for the ratio ...
    most_seconds: float | None = None  # ... or for minipar itself

    @property
    def ratios(self) -> list[float]:
        """minipar over peer, round by round."""
        return _over(self.minipar, self.peer or [])

    @property
    def met(self) -> bool | None:
        """A mark is met when the interval reaches it. None: there is no mark."""
        if self.most_ratio is not None:
            return interval(self.ratios)[0] <= self.most_ratio
        if self.most_seconds is not None:
            return interval(self.minipar)[0] <= self.most_seconds
        return None

    def as_dict(self) -> dict:
        """Medians in seconds, ratios with their 95 % intervals; None for what there is not."""
        return {
            "name": self.name,
            "what": self.what,
            "rounds": len(self.minipar),
            "minipar": _median(self.minipar),
            "minipar_interval": interval(self.minipar),
            "peer": _median(self.peer),
            "peer_name": self.peer_name or None,
            **_ratio("", self.minipar, self.peer),
            "unwatched": _median(self.unwatched),
            **_ratio("unwatched_", self.unwatched, self.peer),
            "floor": _median(self.floor),
            **_ratio("floor_", self.floor, self.peer),
            "memory": self.memory,
            "peer_memory": self.peer_memory,
            "note": self.note or None,
            "mark_ratio": self.most_ratio,
            "mark_seconds": self.most_seconds,
            "met": self.met,
        }


def _median(values: list[float] | None) -> float | None:
    return float(np.median(values)) if values else None


def _over(some: list[float], others: list[float]) -> list[float]:
    return [a / b for a, b in zip(some, others, strict=True)]


def _ratio(prefix: str, some: list[float] | None, others: list[float] | None) -> dict:
    """The median of the paired ratios: what slows a whole round slows both sides of it."""
    if not some or not others:
        return {f"{prefix}ratio": None, f"{prefix}interval": None}
    ratios = _over(some, others)
    return {f"{prefix}ratio": _median(ratios), f"{prefix}interval": interval(ratios)}


# -- the table -----------------------------------------------------------------------------------------------------

HEAD = ["", "minipar", "peer", "ratio (95 %)", "mark", "met", "unwatched", "floor", "memory", "peer's"]


def table(results: list[dict]) -> str:
    """The results as a table in Markdown, aligned so that it also reads well in a terminal, and notes below."""
    rows = [HEAD, *(_cells(r) for r in results)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    notes = [f"\n{r['what']}: {r['note']}" for r in results if r["note"]]
    return "\n".join(lines + notes)


def _cells(r: dict) -> list[str]:
    mark = f"ratio ≤ {r['mark_ratio']:.2f}" if r["mark_ratio"] is not None else ""
    if r["mark_seconds"] is not None:
        mark = f"≤ {seconds(r['mark_seconds'])}"
    return [
        r["what"],
        seconds(r["minipar"]),
        f"{seconds(r['peer'])} {r['peer_name']}" if r["peer"] is not None else "",
        _with_interval(r["ratio"], r["interval"]),
        mark,
        {True: "yes", False: "no", None: ""}[r["met"]],
        _with_interval(r["unwatched_ratio"], r["unwatched_interval"]),
        _with_interval(r["floor_ratio"], r["floor_interval"]) or (seconds(r["floor"]) if r["floor"] else ""),
        *(f"{r[key] / 2**20:.0f} MiB" if r[key] else "" for key in ("memory", "peer_memory")),
    ]


def _with_interval(ratio: float | None, edges: Sequence[float] | None) -> str:
    return "" if ratio is None or edges is None else f"{ratio:.2f} ({edges[0]:.2f} to {edges[1]:.2f})"


def seconds(s: float) -> str:
    """Three digits and a unit: 0.0123 -> "12.3 ms"."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if s >= size:
            return f"{s / size:.3g} {unit}"
    return f"{s / 1e-6:.3g} µs"
