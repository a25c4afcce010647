"""For the check cells of exercises: what is wrong with these tensors, and how a learner is told."""

import sys
import sysconfig
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor

from ..world import RankError
from .names import YOURS, fold, nested

Tensors = dict[str, Tensor]

TOLERANCE = 1e-12  # of the largest value of the reference, in float64
FLOAT32 = 1e-5  # of the largest value: what rounding to float32 may cost
LIBRARIES = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
NOT_BEGUN = "Not begun: NotImplementedError stands where your code goes."


class Refused(AssertionError):
    """The verdict on a wrong answer. A notebook shows its message alone: the code of the check gives things away."""

    def _render_traceback_(self) -> list[str]:
        return str(self).splitlines()


@contextmanager
def verdict() -> Iterator[None]:
    """What fails in a check is told without the check: the message of an assert, the report of ranks, or the error
    with the lines of the answer that led to it. Raises Refused."""
    graded = fold()
    try:
        yield
    except AssertionError as error:
        raise Refused(str(error)) from None
    except NotImplementedError:
        raise Refused(NOT_BEGUN) from None
    except RankError as error:
        told = str(error)
        first = told.split("\n")[0]
        if graded and error.exception is not None and YOURS not in told:
            told = first  # it was raised by the check
        raise Refused(NOT_BEGUN if "NotImplementedError" in first else told) from None
    except Exception as error:
        raise Refused(_told(error)) from None


def _told(error: BaseException) -> str:
    """The error, and the lines that led to it, without those of libraries, nor those of the check (the first two: this
    file and the cell)."""
    frames = [f for f in traceback.extract_tb(error.__traceback__)[2:] if not f.filename.startswith(LIBRARIES)]
    lines = [f"  line {frame.lineno} of {frame.name}: {frame.line}" for frame in frames if frame.line]
    times = [(line, len([*same])) for line, same in groupby(lines)]  # of a function that calls itself
    told = [f"{line} ({n} times)" if n > 1 else line for line, n in times]
    return "\n".join([f"{type(error).__name__}: {error}", *told])


def returned(answer: Any, name: str) -> Any:
    """What the function of this name has returned. AssertionError if that is nothing."""
    assert answer is not None, f"{name} returns nothing: is there a `return`?"
    return answer


def names_in(answer: Any) -> set[str]:
    """The names of variables, attributes and modules that an answer uses. Functions and classes of the package count
    under their own names, whatever it calls them, and those of its notebook with all that they use in their turn;
    wherever it has them: in defaults, closures, partials, wrappers, classes, lists and dicts."""
    found, seen, left = set[str](), dict[int, Any](), [answer]
    while left:
        part = left.pop()
        if id(part) in seen:
            continue
        seen[id(part)] = part  # kept, so that nothing else gets its id
        home = str(getattr(part, "__module__", "")).split(".")[0]
        if isinstance(part, FunctionType | type) and home == "minipar":
            found.add(part.__name__)
            if vars(sys.modules["__main__"]).get(part.__name__) is not part:  # else a check sees what it is
                found.add(part.__module__)
        elif isinstance(part, FunctionType) and part.__globals__.get("__name__") == "__main__":
            found |= _names(part)
            left += _values(part)
        elif isinstance(part, dict):
            left += part.values()
        elif isinstance(part, list | tuple | set | frozenset):
            left += part
        elif isinstance(part, type):
            left += [*vars(part).values(), *part.__bases__] if home == "__main__" else []
        elif type(part).__module__ in ("builtins", "functools") and not isinstance(part, ModuleType):
            left += [getattr(part, name, None) for name in WRAPPED]
        elif type(part).__module__ == "__main__":
            left += [type(part), getattr(part, "__dict__", None)]
    return found


WRAPPED = ("func", "args", "keywords", "__wrapped__", "__func__", "__self__", "fget")
# By these a function gets with a string at what it does not name.
BY_STRING = {"getattr", "attrgetter", "methodcaller", "import_module", "__import__", "modules", "__dict__"}


def _names(function: FunctionType) -> set[str]:
    codes = [*nested(function.__code__)]
    names = {name for code in codes for name in code.co_names}
    if names & BY_STRING:
        strings = [constant for code in codes for constant in code.co_consts if isinstance(constant, str)]
        names |= {part for string in strings for part in (string, *string.split("."))}
    return names


def _values(function: FunctionType) -> Iterator[Any]:
    """What is there under its names, and what it was given when it was made."""
    space = function.__globals__
    yield from (space[name] for name in _names(function) if name in space)
    yield from (function.__defaults__, function.__kwdefaults__, vars(function))
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # it is empty still
            yield cell.cell_contents


def difference(ranks: Sequence[Tensors], whole: Tensors, what: str = "gradient") -> str:
    """Why the tensors that ranks hold are not those of one process, in a sentence; "" if they are.

    ranks: for each rank its tensors by parameter name; whole: those of one process.
    """
    for rank, mine in enumerate(ranks):
        for name, wanted in whole.items():
            got = mine.get(name)
            if got is None:
                return f"rank {rank}: {name} has no {what}."
            if got.shape != wanted.shape:
                shapes = f"{tuple(got.shape)}, and the parameter is {tuple(wanted.shape)}"
                return f"rank {rank}: the {what} of {name} has the shape {shapes}."
    largest = max(float(wanted.abs().max()) for wanted in whole.values())
    wrong = {
        (name, rank): mine[name]
        for name in whole
        for rank, mine in enumerate(ranks)
        if not float((mine[name] - whole[name]).abs().max()) <= TOLERANCE * largest
    }
    if not wrong:
        return ""
    (name, rank), got = next(iter(wrong.items()))
    start = f"rank {rank}: the {what} of {name} {tuple(got.shape)}"
    return f"{start} {_explain(ranks, whole, name, rank, what)}"


def _explain(ranks: Sequence[Tensors], whole: Tensors, name: str, rank: int, what: str) -> str:
    got, wanted = ranks[rank][name], whole[name]
    if not got.isfinite().all():
        return "is not finite."
    if not got.any():
        return "is zero everywhere."
    factors = [_factor(mine[name], wanted) for mine in ranks]
    factor = factors[rank] if abs((factors[rank] or 0) - 1) > FLOAT32 else None  # 1.0000001 times: rounded
    if factor is not None and factors.count(factor) == len(ranks):
        return f"is {factor:.4g} times that of one process, on every rank" + _counts(factor, len(ranks))
    if factor is not None:
        return f"is {factor:.4g} times that of one process, and other ranks have another factor."
    if any(float((mine[name] - got).abs().max()) > 0 for mine in ranks):
        return f"is not what the other ranks have: was this {what} reduced over the axis?"
    off = float((got - wanted).abs().max() / wanted.abs().max())
    if off < FLOAT32:
        return f"is the same on every rank, but off by {off:.0e} of it: was it rounded to float32 on the way?"
    return f"is the same on every rank, but off by {off:.2g} times what one process gets."


def _factor(got: Tensor, wanted: Tensor) -> float | None:
    """The number that `got` is a multiple of `wanted` by, if there is one."""
    factor = float((got * wanted).sum() / (wanted * wanted).sum())
    return factor if float((got - factor * wanted).abs().max()) <= 1e-9 * float(got.abs().max()) else None


def _counts(factor: float, ranks: int) -> str:
    """What a factor smells of, as the end of a sentence."""
    for number, cause in ((ranks, "summed over"), (1 / ranks, "divided once too often by")):
        if abs(factor / number - 1) < 1e-6:
            return f": {cause} the {ranks} ranks?"
    return "."
