"""For the check cells of exercises: what is wrong with these tensors, and how a learner is told."""

import sysconfig
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FunctionType
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


def _told(error: Exception) -> str:
    """The error, and the lines that led to it, without those of libraries, nor those of the check (the first two: this
    file and the cell)."""
    frames = [f for f in traceback.extract_tb(error.__traceback__)[2:] if not f.filename.startswith(LIBRARIES)]
    lines = [f"  line {frame.lineno} of {frame.name}: {frame.line}" for frame in frames if frame.line]
    return "\n".join([f"{type(error).__name__}: {error}", *lines])


def returned(answer: Any, name: str) -> Any:
    """What the function of this name has returned. AssertionError if that is nothing."""
    assert answer is not None, f"{name} returns nothing: is there a `return`?"
    return answer


def names_in(answer: Any) -> set[str]:
    """The names of variables, attributes and modules that a function uses: in functions within it, in its defaults, and
    in those functions of its notebook that it calls, too."""
    found, seen, left = set[str](), set[int](), [answer]
    while left:
        part = left.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, FunctionType):
            used, space = {name for code in nested(part.__code__) for name in code.co_names}, part.__globals__
            found |= used
            called = [space.get(name) for name in used]
            left += [f for f in called if isinstance(f, FunctionType) and f.__globals__ is space]
            left += [*(part.__defaults__ or ()), *(part.__kwdefaults__ or {}).values()]
            left += [cell.cell_contents for cell in part.__closure__ or ()]
            if part.__module__.startswith("minipar."):
                found.add(part.__name__)
        elif isinstance(part, partial):
            left += [part.func, *part.args, *part.keywords.values()]
    return found


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
