"""Savers that are killed: `python tests/kills.py 100` kills a hundred, and prints as JSON what came of it.

A saver is two ranks that save one checkpoint after the other. Both get SIGKILL at a random moment. Checkpoint number n
has n in every tensor, so that parts of two are seen at once; the next saver goes on from what the last one has left.
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

import minipar
from minipar import Config, Mesh, parallelize

CONFIG = Config(vocab=64, context=16, depth=1, width=32, heads=2)
RANKS = 2


@dataclass
class Report:
    kills: int = 0
    during: int = 0  # of these, how many left a save half done
    saves: int = 0  # that were completed
    broken: list[str] = field(default_factory=list)  # what was wrong, and after which kill


def build(mesh):
    """A model and an optimizer with states, without a step: a saver must not have run a backward before it forks."""
    torch.manual_seed(0)
    model = parallelize(minipar.gpt(CONFIG), mesh, zero=1)
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        optimizer.state[p] = {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    return model, optimizer


def tensors(model, optimizer):
    yield from model.parameters()
    for state in optimizer.state.values():
        yield from state.values()


def save_forever(folder, rank, store, told):
    """A rank's life."""
    dist.init_process_group("gloo", store=dist.FileStore(store, RANKS), rank=rank, world_size=RANKS)
    model, optimizer = build(Mesh(dp=RANKS))
    if minipar.latest(folder):
        minipar.load(folder, model, optimizer)
    os.write(told, b"\n")
    while True:
        model.steps += 1
        with torch.no_grad():
            for x in tensors(model, optimizer):
                x.fill_(model.steps)
        minipar.save(folder, model, optimizer, number=model.steps)
        if rank == 0:
            os.write(told, b"%d\n" % model.steps)


def start(folder, store):
    """The ranks as a process group of their own: its leader's id, and where rank 0 tells what it has saved."""
    reading, writing = os.pipe()
    leader = 0
    for rank in range(RANKS):
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, leader)
            os.close(reading)
            try:
                save_forever(folder, rank, store, writing)
            finally:
                os._exit(1)
        leader = leader or pid
        os.setpgid(pid, leader)
    os.close(writing)
    return leader, reading


def kill_savers(folder, kills, seed=0):
    """Kill that many savers, one after the other, and load what each has left on one process."""
    report, draw, last = Report(), random.Random(seed), 0
    model, optimizer = build(Mesh())
    with tempfile.TemporaryDirectory() as elsewhere:  # savers are forks: what takes long at first is done once
        minipar.save(elsewhere, model, optimizer)
        minipar.load(elsewhere, model, optimizer)
    for number in range(kills):
        with tempfile.TemporaryDirectory() as place:
            leader, told = start(folder, f"{place}/store")
            ready = b""
            while ready.count(b"\n") < RANKS:
                ready += os.read(told, 1000)
            time.sleep(draw.uniform(0, 0.2))
            os.killpg(leader, signal.SIGKILL)
            for _ in range(RANKS):
                os.waitpid(-leader, 0)
            said = ready
            while more := os.read(told, 1000):
                said += more
            os.close(told)
        report.kills += 1
        report.during += any(folder.glob(".step-*"))
        saved = [int(line) for line in said.split()]
        report.saves += len(saved)
        last = max([last, *saved])
        if found := fault(folder, model, optimizer, last):
            report.broken.append(f"kill {number}: {found}")
        last = max(last, model.steps)
    return report


def fault(folder, model, optimizer, last):
    """What is wrong with the newest checkpoint, after number `last` was said to be done; "" if nothing."""
    if not minipar.latest(folder):
        return f"none is there, and {last} was done" if last else ""
    try:
        extra = minipar.load(folder, model, optimizer)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if model.steps not in (last, last + 1) or extra != {"number": model.steps}:
        return f"{model.steps} is there with {extra}, and {last} was done"
    parts = [x for x in tensors(model, optimizer) if not (x == model.steps).all()]
    return f"{len(parts)} tensors are of another checkpoint than {model.steps}" if parts else ""


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as where:
        answer = asdict(kill_savers(Path(where), int(sys.argv[1])))
    print(json.dumps(answer | {"seconds": round(time.perf_counter() - begun, 1)}))
