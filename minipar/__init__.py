"""Hybrid parallelism for language models, small enough to read whole."""

from .collectives import Axis, connect
from .mesh import Mesh
from .model import Config, gpt
from .schedule import gpipe, one_f_one_b
from .tensor import cross_entropy
from .timeline import Costs, Timeline, bubble, simulate
from .train import parallelize
from .transport import ledger
from .world import RankError, World, here

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
    "one_f_one_b",
    "parallelize",
    "simulate",
]
