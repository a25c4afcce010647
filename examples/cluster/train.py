"""Train the small GPT on all ranks of a job, and go on from its last checkpoint when the job is started again.

    torchrun --standalone --nproc-per-node 2 examples/cluster/train.py --tp 2 --steps 20

slurm.sh and kubernetes.yaml, beside this file, start it on several nodes. What is left of the ranks after pp and tp
shares out the rows. Without torchrun it starts --ranks of its own.
"""

import argparse
import time
from pathlib import Path

import torch

import minipar
from minipar import Config, Mesh, corpus, here, parallelize

ROWS, CONTEXT = 16, 64


def train(pp: int, tp: int, steps: int, every: int, folder: Path | None) -> list[float]:
    """The losses of the steps that this start of the job made."""
    if here().size % (pp * tp):
        raise ValueError(f"{here().size} ranks are no multiple of pp={pp} times tp={tp}")
    mesh = Mesh(dp=here().size // (pp * tp), pp=pp, tp=tp)
    model = parallelize(minipar.gpt(Config(context=CONTEXT)), mesh, microbatches=2 * pp, zero=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if folder and minipar.latest(folder):
        minipar.load(folder, model, optimizer)
    losses: list[float] = []
    began, first = time.perf_counter(), model.steps
    for step, (tokens, targets) in enumerate(corpus.batches(steps, ROWS * mesh.dp, CONTEXT)):
        if step < first:
            continue  # the run before this one had it
        losses.append(model.step(tokens, targets).item())
        optimizer.step()
        optimizer.zero_grad()
        if here().rank == 0:
            speed = len(losses) * tokens.numel() / (time.perf_counter() - began)
            print(f"step {model.steps}: loss {losses[-1]:.4f}, {speed:,.0f} tokens/s on {mesh}", flush=True)
        if folder and (model.steps % every == 0 or model.steps == steps):
            minipar.save(folder, model, optimizer)
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the small GPT on all ranks of a job.")
    parser.add_argument("--pp", type=int, default=1, help="pipeline stages")
    parser.add_argument("--tp", type=int, default=1, help="tensor ranks; keep them within a node")
    parser.add_argument("--steps", type=int, default=20, help="steps in all, over all starts of the job")
    parser.add_argument("--every", type=int, default=10, help="steps between two checkpoints")
    parser.add_argument("--save", type=Path, help="a folder that all nodes see; without it nothing is kept")
    parser.add_argument("--ranks", type=int, default=2, help="to start, where torchrun has started none")
    options = parser.parse_args()
    settings = options.pp, options.tp, options.steps, options.every, options.save
    minipar.main(train, *settings, ranks=options.ranks)
