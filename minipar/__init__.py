"""Hybrid parallelism for language models, small enough to read whole."""

from typing import Any

from .collectives import Axis, connect
from .mesh import Mesh
from .model import Config, gpt
from .schedule import gpipe, one_f_one_b
from .tensor import cross_entropy
from .timeline import Costs, Timeline, bubble, simulate
from .train import parallelize
from .transport import ledger
from .world import RankError, World, here, main

__all__ = [
    "Axis",
    "Config",
    "Costs",
    "Mesh",
    "RankError",
    "Timeline",
    "World",
    "bubble",
    "connect",
    "cross_entropy",
    "gpipe",
    "gpt",
    "here",
    "ledger",
    "main",
    "one_f_one_b",
    "parallelize",
    "simulate",
]


def load_ipython_extension(shell: Any) -> None:
    """`%load_ext minipar` adds the cell magic %%spmd."""
    from .magic import SPMD

    shell.register_magics(SPMD)
