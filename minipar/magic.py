"""The cell magic %%spmd: run a cell on every rank, where its names stay for the next one."""

import argparse
import ast
import linecache
import shlex
from typing import Any

import torch
import torch.distributed as dist
from IPython.core.interactiveshell import InteractiveShell
from IPython.core.magic import Magics, cell_magic, magics_class

from .rank import cores, here
from .world import World

_names: dict[str, Any] = {}  # of this rank; they live as long as it does


def _run_cell(source: str, file: str) -> str | None:
    """Run a cell on this rank. Returns how the value of its last expression is written, if it has one."""
    if not _names:
        me = here()
        _names.update(__name__="__spmd__", rank=me.rank, size=me.size, torch=torch, dist=dist)
    tree = ast.parse(source, file)
    last = tree.body[-1] if tree.body else None
    if not isinstance(last, ast.Expr):
        exec(compile(tree, file, "exec"), _names)
        return None
    exec(compile(ast.Module(tree.body[:-1], []), file, "exec"), _names)
    value = eval(compile(ast.Expression(last.value), file, "eval"), _names)
    return None if value is None else repr(value)


@magics_class
class SPMD(Magics):
    """%%spmd [-n RANKS]: single program, multiple data."""

    def __init__(self, shell: InteractiveShell) -> None:
        super().__init__(shell)
        self.names = shell.user_ns
        self.world: World | None = None
        self.cells = 0

    @cell_magic
    def spmd(self, line: str, cell: str) -> None:
        """Run the cell on every rank and show the value of its last expression, a line a rank.

        Names live on the ranks from one cell to the next; rank, size, torch and dist are there from the start.
        -n RANKS starts a world of that size. Without it the cell runs on the notebook's own `world` if there is
        one, else on the world of the last %%spmd cell, else on a new one with a rank a core, at least 2.
        """
        parser = argparse.ArgumentParser("%%spmd", exit_on_error=False, add_help=False)
        parser.add_argument("-n", type=int)
        try:
            wanted = parser.parse_args(shlex.split(line)).n
        except (argparse.ArgumentError, SystemExit) as e:
            raise ValueError(f"%%spmd {line}: it takes -n RANKS and nothing else") from e
        self.cells += 1
        file = f"<spmd cell {self.cells}>"
        linecache.cache[file] = len(cell), None, cell.splitlines(True), file  # so that reports can show its lines
        compile(cell, file, "exec")
        for rank, value in enumerate(self._world(wanted).run(_run_cell, cell, file)):
            if value is not None:
                print(f"[{rank}] {value}")

    def _world(self, wanted: int | None) -> World:
        own = self.names.get("world")
        if isinstance(own, World) and not own.closed and wanted in (None, own.n):
            return own
        if self.world is None or self.world.closed or wanted not in (None, self.world.n):
            if self.world is not None:
                self.world.close()
            self.world = World(wanted or max(2, cores()))
        return self.world
