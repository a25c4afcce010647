"""Inside the kernel: put a notebook's names back as they were before an answer."""

from typing import Any

_kept: dict[str, Any] = {}


def keep(names: dict[str, Any]) -> None:
    _kept.clear()
    _kept.update(names)


def restore(names: dict[str, Any]) -> None:
    for name in [name for name in names if name not in _kept]:
        del names[name]
    names.update(_kept)
