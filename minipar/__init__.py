"""Hybrid parallelism for language models, small enough to read whole."""

from .mesh import Mesh
from .world import RankError, World, here

__all__ = ["Mesh", "RankError", "World", "here"]
