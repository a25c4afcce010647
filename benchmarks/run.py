"""minipar beside torch's own, on this machine: `make bench`, or `python benchmarks/run.py --help`."""

import argparse
import itertools
import json
import os
import platform
import random
import sys
from collections.abc import Callable
from pathlib import Path

import sides
import starts
import torch
from measure import Row, table
from torch import Tensor

from minipar import World

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- table: written by run.py -->\n", "<!-- end of table -->\n"


class Wrong(Exception):
    """Two sides that should compute the same do not. Nothing is timed then."""


def agree(name: str, gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Are these the expected gradients, to what fp32 gives? Raises Wrong.

    Everywhere at most 1e-5 of the model's largest entry apart, and, in norm, at most 1e-3 of each gradient whose norm
    is not itself lost in rounding (a key bias has a gradient that is zero in theory).
    """
    if missing := expected.keys() ^ gradients.keys():
        raise Wrong(f"{name}: gradients of other parameters, for example {min(missing)}")
    largest = max(g.abs().max().item() for g in expected.values())
    norm = max(g.norm().item() for g in expected.values())
    for parameter, wanted in expected.items():
        apart = gradients[parameter] - wanted
        small = wanted.norm() < 1e-4 * norm
        if apart.abs().max() > 1e-5 * largest or (not small and apart.norm() > 1e-3 * wanted.norm()):
            raise Wrong(f"{name}: the gradient of {parameter} is off by {apart.abs().max():.2e} of {largest:.2e}")


class Bench:
    """Two Worlds of two ranks: one watches torch.distributed, as by default, the other lets it be."""

    def __init__(self, setting: sides.Setting) -> None:
        self.setting = setting
        self.worlds = {"watched": World(sides.RANKS), "plain": World(sides.RANKS, watch=False)}

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, *_: object) -> None:
        for world in self.worlds.values():
            world.close()

    def make(self, comparison: str) -> tuple[list[tuple[str, str]], str]:
        """Build all sides of a comparison, and hold their gradients against those of one process.

        Returns the sides that run, (world, side), and a note on one that does not. torch's own ways and the floor are
        not watched, minipar is there both ways.
        """
        setting, places, note = self.of(comparison), [], ""
        expected = sides.alone(setting)
        for world, side in [("watched", "minipar"), *(("plain", side) for side in sides.COMPARISONS[comparison].sides)]:
            answers = self.worlds[world].run(sides.make, comparison, side, setting)
            if isinstance(answers[0], str):
                note = f'{side} does not run here: "{answers[0]}"'
                continue
            if side != "floor":
                agree(f"{comparison}, {side}", {k: g for answer in answers for k, g in answer.items()}, expected)
            places.append((world, side))
        return places, note

    def of(self, comparison: str) -> sides.Setting:
        return self.setting.long() if sides.COMPARISONS[comparison].long else self.setting

    def compare(self, comparison: str, pairs: int) -> Row:
        """In each round every side makes one step, in random order."""
        (places, note), order = self.make(comparison), random.Random(0)
        c, took = sides.COMPARISONS[comparison], {place: list[float]() for place in places}
        for _ in range(pairs):
            for world, side in order.sample(places, len(places)):
                begins, ends = zip(*self.worlds[world].run(sides.time_step, comparison, side), strict=True)
                took[world, side].append(max(ends) - min(begins))
        there = [name for name in c.peers if ("plain", name) in took]
        peer = min(there, key=lambda name: sorted(took["plain", name])[pairs // 2], default="")
        return Row(
            comparison,
            c.what,
            took["watched", "minipar"],
            took.get(("plain", peer)),
            peer,
            took["plain", "floor"],
            took["plain", "minipar"],
            self.memory(comparison, "minipar"),
            self.memory(comparison, peer) if peer else None,
            note,
            most_ratio=c.mark,
        )

    def memory(self, comparison: str, side: str) -> int:
        """The peak of a step, in bytes, on the rank that takes most. The side is made anew, and nothing is timed."""
        return max(self.worlds["plain"].run(sides.peak_memory, comparison, side, self.of(comparison)))

    def profile(self, comparison: str, steps: int) -> None:
        """Print where a step's time goes, on each rank and for each side."""
        places, _ = self.make(comparison)
        print(f"\n{comparison}: milliseconds, medians of {steps} steps")
        for world, side in places:
            for rank, parts in enumerate(self.worlds[world].run(sides.where, comparison, side, steps)):
                numbers = "  ".join(f"{part} {1e3 * s:7.1f}" for part, s in parts.items())
                print(f"{side + (' (watched)' if world == 'watched' else ''):<24} rank {rank}  {numbers}")
        for side in [side for world, side in places if world == "plain"]:
            print(f"\n{comparison}, {side}, rank 0, one step:")
            print(self.worlds["plain"].run(sides.operators, comparison, side)[0])


def sections(pairs: int, setting: sides.Setting) -> dict[str, Callable[[], list[Row]]]:
    """Name -> what measures it."""

    def compare(name: str) -> list[Row]:
        with Bench(setting) as bench:
            return [bench.compare(name, pairs)]

    few = -(-pairs // 6)  # of what takes seconds
    return {
        **{name: lambda name=name: compare(name) for name in sides.COMPARISONS},
        "start": lambda: starts.start(pairs, few),
        "run": lambda: [starts.empty_run(pairs)],
        "watch": lambda: [starts.watching(pairs)],
        "restart": lambda: starts.restart(pairs),
        "grade": lambda: [starts.grading(few)],
    }


def machine() -> str:
    """What the numbers were taken on, in general terms."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    python = ".".join(map(str, sys.version_info[:3]))
    return f"{cores} cores ({platform.machine()}), {platform.system()}, Python {python}, torch {torch.__version__}"


def write(results: list[dict], folder: Path) -> None:
    """results.json, and the table in the README between its two marks, if it has one."""
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    readme = folder / "README.md"
    if readme.exists():
        before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
        behind = rest.split(END)[1]
        readme.write_text(f"{before}{BEGIN}\n{machine()}.\n\n{table(results)}\n\n{END}{behind}", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    names = list(sections(1, sides.Setting()))
    parser = argparse.ArgumentParser(prog="benchmarks/run.py", description=__doc__)
    parser.add_argument("--only", metavar="NAME,...", help=f"some sections: {', '.join(names)}")
    parser.add_argument("--pairs", type=int, default=31, help="rounds in which every side makes one step (31)")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the bench itself")
    parser.add_argument("--out", type=Path, help="write results.json and the README's table in this folder")
    parser.add_argument("--profile", action="store_true", help="show where a step's time goes; measures no ratios")
    options = parser.parse_args(arguments)
    chosen = options.only.split(",") if options.only else names
    if unknown := set(chosen) - set(names):
        parser.error(f"there is no section {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    setting = sides.SMALL if options.small else sides.Setting()

    if options.profile:
        with Bench(setting) as bench:
            for name in filter(sides.COMPARISONS.__contains__, chosen):
                bench.profile(name, options.pairs)
        return 0

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the ranks' profiler says when it begins and ends
    measure = sections(options.pairs, setting)
    print(machine(), flush=True)
    rows = []
    for name in chosen:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        rows.append([row.as_dict() for row in measure[name]()])
        print(table(rows[-1]), file=sys.stderr, flush=True)
    results = list(itertools.chain(*rows))
    print(table(results))
    whole = chosen == names and not options.small
    if folder := options.out or (HERE if whole else None):
        write(results, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
