"""Inside the kernel: what an answer may use, and everything back as it was before it."""

import ast
import dis
import linecache
import os
import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

Parts = dict[str, Any]
YOURS = "your answer to"  # how reports begin to name the cell that is graded

# What checks rely on. Of these modules and of their classes no function may be replaced.
LIBRARIES = {"builtins", "math", "torch", "torch._tensor", "torch.autograd", "torch.distributed", "torch.nn.functional"}
PACKAGES = ("minipar", "torch.nn.modules", "torch.nn.utils")
CHECKS = "minipar.course"
# What reaches any name without naming it.
FUNCTIONS = {"eval", "exec", "get_ipython", "globals", "locals", "vars"}
OWNERS = {"builtins", "__builtins__", "IPython"}  # of these functions
ATTRIBUTES = {"course", "__main__", "__code__", "__globals__", "f_globals", "f_locals", "user_ns", "_kept", "_reading"}
ATTRIBUTES |= {"inspect", "_getframe", "tb_frame", "get_objects", "get_referrers", "__eq__"}

_kept: dict[str, Any] = {}
_usual: list[Any] = []  # what else holds for whoever comes next
_answer: list[str] = []  # the file that the cell to be graded is to Python
_whole: dict[str, tuple[Any, Parts]] = {}  # a module, class or object by name, and what it is made of


def keep(names: dict[str, Any]) -> None:
    """These are the names before an answer."""
    _kept.clear()
    _kept.update({name: _own(value) for name, value in names.items()})
    _everywhere(_record)
    _whole.update(_noted(_kept))


def _own(value: Any) -> Any:
    """A tensor of our own: an answer may write into the one that it is given."""
    torch = sys.modules.get("torch")
    return value.clone() if torch and isinstance(value, torch.Tensor) and value.is_leaf else value


def _back(names: dict[str, Any], without: Collection[str] = ()) -> None:
    names.update({name: _own(value) for name, value in _kept.items() if name not in without})
    if torch := sys.modules.get("torch"):
        torch.set_default_dtype(torch.float32)


def call(source: str, task: str) -> None:
    """Reports call the cell of this source the answer to a task. All other cells are the check's."""
    from IPython import get_ipython

    compiler = get_ipython().compile
    file, cells = compiler.get_code_name(source, source, 0), compiler._filename_map
    compiler.format_code_name = lambda name: (
        (YOURS, task) if name == file else ("a folded", "cell") if name in cells else None
    )
    _answer[:] = [file]


def fold() -> bool:
    """No report quotes a line of any cell but the answer's: the others give things away. Says whether there is one."""
    from IPython import get_ipython

    if _answer:
        for name in get_ipython().compile._filename_map.keys() - {*_answer}:
            linecache.cache.pop(name, None)
    return bool(_answer)


def restore(names: dict[str, Any]) -> None:
    """All names as they were kept, and all libraries. RuntimeError where that is not enough: a World was closed, or an
    answer has left behind what changes how everything after it runs."""
    if not all(_everywhere(_as_usual)):
        raise RuntimeError("not everything is as it was")
    for name in [name for name in names if name not in _kept]:
        del names[name]
    _back(names)
    if any(getattr(value, "closed", None) is True for value in _kept.values()):
        raise RuntimeError("a World of the set-up is closed")


def protect(names: dict[str, Any], reference: str, answer: str, given: Collection[str], check: str) -> None:
    """The kept names again, but for those that the reference's answer defines: only they are the learner's to give.

    given: names that the set-up defines. An answer may use those of them that the reference's uses, for the others
    make up its check. Nor may its functions use what the check defines: it would find the check's there, not its own.
    PermissionError for an answer that does, or that could without naming them.
    """
    _back(names, defined(reference))
    hidden = {*given} - _mentions(reference)[0] | FUNCTIONS
    variables, others = _mentions(answer)
    late = _mentions(answer, inside=True)[0] & (defined(check) - _mentions(reference)[0])
    forbidden = others & (ATTRIBUTES | FUNCTIONS if others & OWNERS else ATTRIBUTES)
    forbidden |= {name for name in others if name.startswith(CHECKS)}
    for name in sorted(variables & hidden | late | forbidden):
        if name == "get_ipython" and name not in answer:
            raise PermissionError("This answer has a line of % or !, which cannot be graded: take it out.")
        if _gives(answer, name):
            raise PermissionError(f"This answer and its check both define {name}: give yours another name.")
        raise PermissionError(f"This answer uses {name}, which belongs to its check: write it without.")


def untouched() -> None:
    """PermissionError for an answer that has replaced a part of what checks rely on."""
    if patched := next(filter(None, _everywhere(_mend)), ""):
        raise PermissionError(f"This answer replaces {patched}, for everybody: change nothing but what is yours.")


def defined(source: str) -> set[str]:
    """The names that a cell gives a value: functions, classes, variables, and what it imports for checks alone."""
    found, nodes = set(), list[ast.AST](ast.parse(source).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(CHECKS):
            found |= {name.asname or name.name for name in node.names}
        nodes += ast.iter_child_nodes(node)
    return found


def _gives(source: str, name: str) -> bool:
    try:
        return name in defined(source)
    except SyntaxError:  # a magic
        return False


def nested(code: CodeType) -> Iterator[CodeType]:
    """A piece of code, and that of the functions and classes in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from nested(constant)


def _mentions(source: str, inside: bool = False) -> tuple[set[str], set[str]]:
    """The notebook's variables that a cell reads, and the names of attributes and modules in it.

    inside: in functions only, so those that are read when it has run.
    """
    from IPython import get_ipython

    variables, others = set[str](), set[str]()
    for code in nested(compile(get_ipython().transform_cell(source), "answer", "exec")):
        reads = [i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_NAME", "LOAD_GLOBAL")]
        variables |= set() if inside and code.co_name == "<module>" else set(reads)
        others |= set(code.co_names)
    return variables, others


# -- libraries, here and on the ranks ------------------------------------------------------------------------------


def _everywhere(function: Callable[[], Any]) -> list[Any]:
    """What a function of this module returns here and on all ranks."""
    found = [function()]
    world = sys.modules.get("minipar.world")
    for value in _kept.values():
        if world and isinstance(value, world.World) and not value.closed:
            found += value.run(function, limit=15)
    return found


def _parts(owner: Any) -> Parts:
    """The functions of a module, class or object, and its constants. Of a function: what it does."""
    if isinstance(owner, FunctionType):
        return {part: getattr(owner, part) for part in ("__code__", "__defaults__", "__kwdefaults__")}
    return {
        name: value
        for name, value in vars(owner).items()
        if (callable(value) or hasattr(type(value), "__get__") or name.isupper())
        and not isinstance(value, MethodType)  # such as `input`, which the kernel sets anew for each cell
        and name != "manual_seed"  # which torch wraps when it imports its compiler
    }


def _noted(owners: dict[str, Any]) -> dict[str, tuple[Any, Parts]]:
    return {name: (owner, _parts(owner)) for name, owner in owners.items() if hasattr(owner, "__dict__")}


def _state() -> list[Any]:
    """What is neither a name nor a part of a library, and holds for all that runs later."""
    found: list[Any] = [sys.stdout, sys.stderr, sys.getrecursionlimit(), os.getcwd(), sys.gettrace()]
    found += [any(action == "error" for action, *_ in warnings.filters)]
    found += [thread for thread in threading.enumerate() if _of_notebook(thread)]
    if torch := sys.modules.get("torch"):
        found += [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")]
        found += [torch.get_default_device(), len(torch.overrides._get_current_function_mode_stack())]
    return found


def _of_notebook(thread: threading.Thread) -> bool:
    work = getattr(thread, "_target", None) or getattr(thread, "function", None)
    return "__main__" in (getattr(work, "__module__", ""), type(thread).__module__)


def _as_usual() -> bool:
    """Libraries whole again, and all else as when the names were kept."""
    _mend()
    return not _usual or _usual == _state()


def _record() -> None:
    """Note what the libraries are made of, the first time, and the rest each time."""
    _usual[:] = _state()
    if not _whole:
        modules = {name: m for name, m in sys.modules.items() if name in LIBRARIES or name.startswith(PACKAGES)}
        for name, module in modules.items():
            owners = {
                k: v for k, v in vars(module).items() if isinstance(v, type | FunctionType) and v.__module__ == name
            }
            _whole.update(_noted({name: module, **{f"{name}.{k}": owner for k, owner in owners.items()}}))


def _mend() -> str:
    """Put back what was replaced since it was noted. The name of one such part, or ""."""
    found = ""
    for name, (owner, parts) in _whole.items():
        now = _parts(owner)
        for part in parts.keys() | now.keys():
            if parts.get(part) is now.get(part):
                continue
            found = found or f"{name}.{part}"
            if part in parts:
                setattr(owner, part, parts[part])
            else:
                delattr(owner, part)
    return found
