"""Predicted against measured step time, for layouts that nothing was fitted to: `python benchmarks/calibration.py`.

Takes a few minutes with nothing else running. Prints the tables, and writes calibration.json beside this file and
docs/images/calibration.png.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from minipar import Mesh, viz
from minipar.calibration import calibrate, compare
from minipar.cost import Layout
from minipar.machine import load_machine
from minipar.model import Config

HERE = Path(__file__).resolve().parent
CONFIG, ROWS = Config(depth=8, width=256, heads=8), 16

LAYOUTS = [
    Layout(Mesh(dp=2), microbatches=4),
    Layout(Mesh(dp=2), microbatches=2, zero=2),
    Layout(Mesh(dp=2), microbatches=2, zero=3),
    Layout(Mesh(tp=2)),
    Layout(Mesh(tp=2), microbatches=4, sequence_parallel=True),
    Layout(Mesh(pp=2), microbatches=2),
    Layout(Mesh(pp=2), microbatches=4, schedule="gpipe"),
    Layout(Mesh(pp=2), microbatches=8),
    Layout(Mesh(pp=2), microbatches=8, recompute="full"),
    Layout(Mesh(pp=2), microbatches=8, schedule="interleaved", chunks=2),
    Layout(Mesh(pp=2), microbatches=8, schedule="zero-bubble-h1"),
    Layout(Mesh(pp=2), microbatches=8, schedule="zero-bubble-v"),
    Layout(Mesh(dp=4)),
    Layout(Mesh(dp=4), microbatches=2, zero=1),
    Layout(Mesh(tp=4)),
    Layout(Mesh(pp=4), microbatches=4),
    Layout(Mesh(pp=4), microbatches=8, schedule="zero-bubble-h2"),
    Layout(Mesh(dp=2, pp=2), microbatches=4),
    Layout(Mesh(dp=2, tp=2), zero=1),
    Layout(Mesh(pp=2, tp=2), microbatches=4),
    Layout(Mesh(dp=8)),
    Layout(Mesh(pp=8), microbatches=8),
    Layout(Mesh(tp=8)),
    Layout(Mesh(dp=2, pp=4), microbatches=8),
    Layout(Mesh(pp=4, tp=2), microbatches=4, sequence_parallel=True),
    Layout(Mesh(dp=2, pp=2, tp=2), microbatches=4),
]


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks/calibration.py", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="steps of each layout (5)")
    parser.add_argument("--machine", type=Path, help="calibrated before: where Machine.save wrote it")
    parser.add_argument("--out", type=Path, help="write here, in place of the two files of the repository")
    options = parser.parse_args()
    machine = load_machine(options.machine) if options.machine else calibrate(CONFIG, ROWS)
    print(machine, flush=True)
    seen = compare(machine, CONFIG, LAYOUTS, ROWS, options.rounds)
    print(f"\n{seen}")
    rows = [
        {"layout": what, "predicted": predicted, "measured": measured}
        for what, predicted, measured in zip(seen.names, seen.predicted, seen.measured, strict=True)
    ]
    found = {"machine": asdict(machine), "median_error": seen.median_error, "steps": rows}
    folder, images = options.out or HERE, options.out or HERE.parent / "docs" / "images"
    (folder / "calibration.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    picture = viz.draw_predictions(seen.names, seen.predicted, seen.measured, "seconds a step")
    (images / "calibration.png").write_bytes(viz.png(picture, dpi=120))


if __name__ == "__main__":
    main()
