"""Draw timeline.png, the README's picture: a step of 1F1B as predicted, and as four ranks of this machine ran it.

python docs/images/timeline.py
"""

from pathlib import Path
from statistics import median

import torch

import minipar
from minipar import Costs, Mesh, Timeline, World, corpus, viz
from minipar.schedule import Op

STAGES, MICROBATCHES, STEPS = 4, 8, 5


def record() -> Timeline:
    """On a rank: train a few steps and return the last one, of all ranks."""
    torch.manual_seed(0)
    module = minipar.gpt(minipar.Config(depth=8, width=256))
    model = minipar.parallelize(module, Mesh(pp=STAGES), microbatches=MICROBATCHES)
    for tokens, targets in corpus.batches(STEPS, rows=32, context=128):
        model.step(tokens, targets)
    return model.timeline()


def main() -> None:
    with World(STAGES) as world:
        recorded = world.run(record)[0]

    def seconds(op: Op) -> float:
        return median(span.end - span.start for span in recorded.spans if span.action.op == op)

    # The schedule with what an action took here, and communication for nothing.
    costs = Costs(seconds(Op.F), backward_input=seconds(Op.B) / 2, backward_weight=seconds(Op.B) / 2)
    predicted = minipar.simulate(minipar.one_f_one_b(STAGES, MICROBATCHES), costs)
    picture = viz.compare(predicted, recorded, unit="s")
    (Path(__file__).parent / "timeline.png").write_bytes(viz.png(picture, dpi=120))
    print(viz.description(picture))


if __name__ == "__main__":
    main()
