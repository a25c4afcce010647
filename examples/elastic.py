"""Train through failures: a run that loses a rank goes on from its last checkpoint.

    torchrun --standalone --nproc-per-node 4 --max-restarts 2 examples/elastic.py FOLDER

torchrun notices that a process is gone, ends the others and starts all of them again; what they find in FOLDER says
where to go on. Losses are those of a run that nothing happened to, to the last bit. On several nodes set
TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, else new ranks look for the old ones.
"""

import argparse
from pathlib import Path

import torch

import minipar
from minipar import Config, Loader, Mesh, corpus, here, parallelize

MESH = Mesh(dp=2, pp=2)
CONFIG = Config(depth=2, width=64, heads=4, context=32, dropout=0.1)


def train(folder: Path, steps: int, every: int) -> list[float]:
    """The loss of each step, from the first one on. A checkpoint is saved every so many steps."""
    model = parallelize(minipar.gpt(CONFIG), MESH, microbatches=2, zero=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = Loader(corpus.Windows(CONFIG.context), 8, model, drop_last=True)
    losses: list[float] = []
    if minipar.latest(folder):
        found = minipar.load(folder, model, optimizer)
        loader.load_state_dict(found["data"])
        losses = found["losses"]
    for tokens, targets in loader.batches(steps - model.steps):
        losses.append(model.step(tokens, targets, local=True).item())
        optimizer.step()
        if here().rank == 0:
            print(f"step {model.steps}: loss {losses[-1]:.4f}", flush=True)
        if model.steps % every == 0:
            minipar.save(folder, model, optimizer, data=loader.state_dict(), losses=losses)
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train through failures.")
    parser.add_argument("folder", type=Path, help="where the checkpoints are")
    parser.add_argument("--steps", type=int, default=60, help="steps in all")
    parser.add_argument("--every", type=int, default=5, help="steps between two checkpoints")
    options = parser.parse_args()
    losses = minipar.main(train, options.folder, options.steps, options.every, ranks=MESH.size)[0]
    if here().rank == 0:
        print(f"losses {losses}")
