"""A run that loses a rank goes on as if nothing had happened."""

import ast
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "elastic.py"
STEPS, EVERY = 10, 4
DEADLINE = 240  # seconds, on a machine that has other work, too


@pytest.fixture
def process():
    """Starts processes, and leaves none."""
    started = []

    def start(*command):
        started.append(subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        family = [process, *psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
        for member in family:
            member.kill()
        process.wait()
        process.stdout.close()


def losses(said):
    (line,) = re.findall(r"^losses (.*)$", said, re.M)
    return ast.literal_eval(line)


def test_a_run_that_loses_a_rank_in_mid_step_has_the_losses_of_an_undisturbed_run(tmp_path, process, world4):
    train = runpy.run_path(str(SCRIPT))["train"]
    wanted = world4.run(train, tmp_path / "undisturbed", STEPS, EVERY)[0]
    assert len(set(wanted)) == STEPS

    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", "--max-restarts=2"]
    run = process(*torchrun, SCRIPT, tmp_path / "run", f"--steps={STEPS}", f"--every={EVERY}")
    deadline = threading.Timer(DEADLINE, run.kill)
    deadline.start()
    said, ranks = [], []
    for line in run.stdout:
        said.append(line)
        if line.startswith("step 6:") and not ranks:  # rank 0 has told, and all are in step 7
            ranks = psutil.Process(run.pid).children()
            os.kill(random.choice(ranks).pid, signal.SIGKILL)
    deadline.cancel()
    assert run.wait(timeout=DEADLINE) == 0 and len(ranks) == 4
    steps = [int(step) for step in re.findall(r"^step (\d+):", "".join(said), re.M)]
    first = steps.index(5, 5)  # the second time
    assert steps[:6] == [1, 2, 3, 4, 5, 6] and steps[first:] == list(range(5, STEPS + 1)), "from the checkpoint on"
    assert losses("".join(said)) == wanted
    assert not any(rank.is_running() for rank in ranks)
