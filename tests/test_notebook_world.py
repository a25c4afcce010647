"""A world in a real notebook kernel: functions of cells travel, reports show the cell, nothing stays behind."""

import queue
import re
import time
from collections.abc import Iterator

import psutil
import pytest
from jupyter_client import KernelManager
from jupyter_client.blocking import BlockingKernelClient
from test_world import gone


class Notebook:
    """Runs cells in a kernel of its own."""

    def __init__(self) -> None:
        self.manager = KernelManager(kernel_name="python3")
        self.manager.start_kernel()
        self.client: BlockingKernelClient = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def start(self, cell: str) -> None:
        self.client.execute(cell, store_history=True)

    def output(self, until: str = "idle") -> str:
        """What a cell shows until it is done, or until it has shown a text."""
        text = ""
        while True:
            try:
                message = self.client.get_iopub_msg(timeout=60)
            except queue.Empty:
                raise AssertionError(f"the kernel is silent after: {text}") from None
            content = message["content"]
            if message["msg_type"] == "stream":
                text += content["text"]
            elif message["msg_type"] == "error":
                text += "\n".join(content["traceback"])
            if content.get("execution_state") == until or until in text:
                return text

    def run(self, cell: str) -> str:
        self.start(cell)
        return self.output()


@pytest.fixture(scope="module")
def notebook() -> Iterator[Notebook]:
    notebook = Notebook()
    notebook.run("import time, torch, torch.distributed as dist\nfrom minipar import World, here\nworld = World(2)")
    yield notebook
    notebook.client.stop_channels()
    notebook.manager.shutdown_kernel(now=True)


def test_a_function_of_a_cell_travels_and_prints_into_the_cell(notebook: Notebook) -> None:
    notebook.run("def double(x):\n    print('twice')\n    return 2 * x + here().rank")
    shown = notebook.run("print(world.run(double, 5))")
    assert sorted(shown.splitlines()) == ["[0] twice", "[10, 11]", "[1] twice"]


def test_a_report_is_all_that_is_shown_and_names_the_cell_and_its_line(notebook: Notebook) -> None:
    notebook.run(
        "def wrong():\n    dist.barrier()\n    if here().rank == 1:\n        raise ValueError('no')\n    dist.barrier()"
    )
    shown = notebook.run("world.run(wrong)")
    assert shown.startswith("RankError: rank 1 raised ValueError: no\n\nCell In["), "not the frames of minipar"
    assert "--->    4         raise ValueError('no')\n" in shown
    assert re.search(r"rank 0 waits for rank 1 in barrier, line 5 of Cell In\[\d+\]: dist.barrier\(\)", shown)
    shown = notebook.run("world.run(lambda: dist.all_reduce(torch.ones(2 + here().rank)))")
    for rank in range(2):
        line = rf"  rank {rank}: all_reduce\(sum\) of float32 \({2 + rank},\)   line 1: world.run\(lambda"
        assert re.search(line, shown), "a rank does not know the source of a cell, its report must"


def test_an_interrupt_stops_the_cell_and_says_where_the_ranks_were(notebook: Notebook) -> None:
    notebook.start(
        "def forever():\n    dist.barrier()\n    if not here().rank: time.sleep(0.5); print('here')\n"
        "    time.sleep(1000)\nworld.run(forever)"
    )
    notebook.output(until="[0] here")  # by now rank 1 sleeps
    notebook.manager.interrupt_kernel()
    shown = notebook.output()
    assert "KeyboardInterrupt: stopped by you" in shown
    assert re.search(r"rank 1 is at line 4 of Cell In\[\d+\]: time.sleep\(1000\)", shown)
    assert notebook.run("print(world.run(here)[1].rank)") == "1\n"


def test_spmd_cells_keep_their_names_on_every_rank(notebook: Notebook) -> None:
    notebook.run("%load_ext minipar")
    assert notebook.run("%%spmd\nx = torch.tensor(float(rank))\ndist.all_reduce(x)") == ""
    assert notebook.run("%%spmd\ny = x + rank\ny.item(), size") == "[0] (1.0, 2)\n[1] (2.0, 2)\n"
    shown = notebook.run("%%spmd\nz = 1\nassert rank == 0, z")
    assert "rank 1 raised AssertionError: 1" in shown and "--->    2 assert rank == 0, z" in shown
    assert notebook.run("%%spmd\nint(y)").splitlines() == ["[0] 1", "[1] 2"], "names outlive an error"
    assert notebook.run("%%spmd -n 3\nsize").splitlines() == ["[0] 3", "[1] 3", "[2] 3"]
    assert "SyntaxError" in notebook.run("%%spmd\nx =")
    assert "it takes -n RANKS and nothing else" in notebook.run("%%spmd --ranks 3\nx")


def test_a_killed_kernel_leaves_no_process(notebook: Notebook) -> None:
    notebook.start(
        "def stuck():\n    print('stuck')\n    while here().rank: pass\n    dist.barrier()\nworld.run(stuck)"
    )
    notebook.output(until="[0] stuck")
    kernel = psutil.Process(notebook.manager.provisioner.pid)
    pids = [child.pid for child in kernel.children(recursive=True)]
    assert len(pids) >= 4
    time.sleep(0.2)
    kernel.kill()
    assert gone(pids, within=30)
