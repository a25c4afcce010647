"""Hybrid parallelism for language models, small enough to read whole."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .calibration import calibrate, compare
    from .checkpoint import latest, load, load_weights, save, save_pretrained, save_weights
    from .collectives import Axis, connect
    from .cost import Layout
    from .hardware import CLUSTERS, Cluster
    from .loading import Loader
    from .mesh import Mesh
    from .model import Config, gpt
    from .planner import plan
    from .prediction import predict
    from .schedule import gpipe, interleaved, one_f_one_b, zero_bubble_h1, zero_bubble_h2, zero_bubble_v
    from .tensor import cross_entropy
    from .timeline import Costs, Timeline, bubble, simulate
    from .train import parallelize
    from .transformer import Transformer, find_model
    from .transport import ledger
    from .world import RankError, World, here, main

# Where the names are. A module is imported when one of its names is first used: the command line answers at once,
# without waiting for torch.
_HOMES = {
    "calibration": ("calibrate", "compare"),
    "checkpoint": ("latest", "load", "load_weights", "save", "save_pretrained", "save_weights"),
    "collectives": ("Axis", "connect"),
    "cost": ("Layout",),
    "hardware": ("CLUSTERS", "Cluster"),
    "loading": ("Loader",),
    "mesh": ("Mesh",),
    "model": ("Config", "gpt"),
    "planner": ("plan",),
    "prediction": ("predict",),
    "schedule": ("gpipe", "one_f_one_b", "interleaved", "zero_bubble_h1", "zero_bubble_h2", "zero_bubble_v"),
    "tensor": ("cross_entropy",),
    "timeline": ("Costs", "Timeline", "bubble", "simulate"),
    "train": ("parallelize",),
    "transformer": ("Transformer", "find_model"),
    "transport": ("ledger",),
    "world": ("RankError", "World", "here", "main"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "CLUSTERS",
    "Axis",
    "Cluster",
    "Config",
    "Costs",
    "Layout",
    "Loader",
    "Mesh",
    "RankError",
    "Timeline",
    "Transformer",
    "World",
    "bubble",
    "calibrate",
    "compare",
    "connect",
    "cross_entropy",
    "find_model",
    "gpipe",
    "gpt",
    "here",
    "interleaved",
    "latest",
    "ledger",
    "load",
    "load_weights",
    "main",
    "one_f_one_b",
    "parallelize",
    "plan",
    "predict",
    "save",
    "save_pretrained",
    "save_weights",
    "simulate",
    "zero_bubble_h1",
    "zero_bubble_h2",
    "zero_bubble_v",
]


def __getattr__(name: str) -> Any:
    try:
        if name in _HOME:
            return getattr(import_module(f".{_HOME[name]}", __name__), name)
        return import_module(f".{name}", __name__)  # a module: minipar.corpus, minipar.viz
    except ModuleNotFoundError as missing:
        if missing.name != f"{__name__}.{name}":
            raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load_ipython_extension(shell: Any) -> None:
    """`%load_ext minipar` adds the cell magic %%spmd."""
    from .magic import SPMD

    shell.register_magics(SPMD)
