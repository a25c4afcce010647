"""What a kernel for grading does before it listens: it imports torch once, for itself and for the ranks.

The process that ranks are forked from is a fork of the kernel, made before there is anything that forks badly. A
fresh one would import torch once more.
"""

import gc
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from itertools import pairwise
from multiprocessing import forkserver, resource_tracker, util
from types import ModuleType, SimpleNamespace
from typing import Any

MOST_MEMORY = 4 * 2**30  # bytes that a kernel, or a rank of its worlds, may have for itself


def main() -> None:
    """Become a kernel."""
    gc.disable()  # collecting garbage would take a tenth of the import, and there is none
    import torch

    from .. import crew, train  # noqa: F401

    gc.freeze()  # nor will there be, here or on the ranks
    gc.enable()
    if crew.FORK:
        with _forking():
            crew.warm()
    if sys.platform == "linux":  # an answer that asks for all memory gets an error, and not the machine
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY, MOST_MEMORY))
    torch.set_num_threads(1)  # its tensors are small, and a second thread would take a core from the ranks
    from ipykernel.kernelapp import launch_new_instance

    launch_new_instance()


@contextmanager
def _forking() -> Iterator[None]:
    """The server of forks starts as a fork of this process, in place of a fresh Python."""
    resource_tracker.ensure_running()  # one that is fresh
    spawn: Any = util.spawnv_passfds
    util.spawnv_passfds = _fork  # type: ignore[assignment]
    try:
        yield
    finally:
        util.spawnv_passfds = spawn


def _fork(path: bytes, args: Sequence[Any], fds: Sequence[int]) -> int:
    """Run the last argument, the source of the server, in a fork that keeps these files only. Its process id."""
    if pid := os.fork():
        return pid
    try:
        for before, after in pairwise(sorted({2, *fds, os.sysconf("SC_OPEN_MAX")})):
            os.closerange(before + 1, after)
        for one in (forkserver._forkserver, resource_tracker._resource_tracker):
            type(one).__init__(one)  # else it would hold the kernel's lock and files
        sys.modules["torch._dynamo"] = _NoCompiler("torch._dynamo")
        exec(args[-1], {})
    finally:
        os._exit(0)


class _NoCompiler(ModuleType):
    """Stands for torch._dynamo, whose import takes a second, and gives way to it when asked for more than what
    optimizers and process groups use: these three do nothing where nothing is compiled."""

    trace_rules = SimpleNamespace(clear_lru_cache=lambda: None)

    def graph_break(self, *_: Any) -> None: ...

    def disable(self, function: Any, *_: Any, **__: Any) -> Any:
        return function

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(import_module(self.__name__), name)
