"""Inside the kernel: put a notebook's names back as they were before an answer."""

import ast
import sys
from collections.abc import Collection
from typing import Any

_kept: dict[str, Any] = {}


def keep(names: dict[str, Any]) -> None:
    _kept.clear()
    _kept.update({name: _own(value) for name, value in names.items()})


def _own(value: Any) -> Any:
    """A tensor of our own: an answer may write into the one that it is given."""
    torch = sys.modules.get("torch")
    return value.clone() if torch and isinstance(value, torch.Tensor) and value.is_leaf else value


def _back(names: dict[str, Any], without: Collection[str] = ()) -> None:
    names.update({name: _own(value) for name, value in _kept.items() if name not in without})
    if torch := sys.modules.get("torch"):
        torch.set_default_dtype(torch.float32)


def restore(names: dict[str, Any]) -> None:
    """All names as they were kept. Raises RuntimeError where that is not enough, since a World was closed."""
    for name in [name for name in names if name not in _kept]:
        del names[name]
    _back(names)
    if any(getattr(value, "closed", None) is True for value in _kept.values()):
        raise RuntimeError("a World of the set-up is closed")


def protect(names: dict[str, Any], answer: str) -> None:
    """The kept names again, but for those that the reference's answer defines: only they are the learner's to give."""
    defined = set()
    for node in ast.parse(answer).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        defined |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    _back(names, defined)
