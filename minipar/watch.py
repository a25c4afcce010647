"""torch.distributed's functions, watched: each call is written on the board before it is made.

What must agree between ranks is a call's signature: the function, the reduction, the root, the dtype and the size.
Where sizes may differ by design (the pieces of an all-to-all) they are compared pair by pair.
"""

import functools
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ReduceOp
from torch.distributed import distributed_c10d as c10d

from .board import Board, Line, Splits, digest, place, text_of

SUM = ReduceOp.SUM


class _Collective(NamedTuple):
    """What the board is told of a call. `size` is what must agree: a shape, or a number of elements."""

    group: Any
    at_once: bool  # returns before it is done
    tensor: Tensor | None
    size: Any = None
    detail: tuple[Any, ...] = ()  # the reduction, the root
    splits: Splits | None = None


def _global(group: Any, rank: int | None, index: int | None) -> int | None:
    """The rank that a call names as a rank of the world, or as an index in its group."""
    return rank if index is None else dist.get_process_group_ranks(group)[index]


def _pieces(whole: Tensor, sizes: list[int] | None, group: Any) -> list[int]:
    """Elements of each piece of an all-to-all, where `sizes` counts along dim 0 and None means even pieces."""
    if not sizes:
        ranks = dist.get_world_size(group)
        return [whole.numel() // ranks] * ranks
    return [size * (whole[:1].numel()) for size in sizes]


# A describer a function, with the arguments of the function that it describes.
COLLECTIVES: dict[str, Callable[..., _Collective]] = {
    "all_reduce": lambda tensor, op=SUM, group=None, async_op=False: _Collective(
        group, async_op, tensor, tensor.shape, (op,)
    ),
    "reduce": lambda tensor, dst=None, op=SUM, group=None, async_op=False, group_dst=None: _Collective(
        group, async_op, tensor, tensor.shape, (op, _global(group, dst, group_dst))
    ),
    "broadcast": lambda tensor, src=None, group=None, async_op=False, group_src=None: _Collective(
        group, async_op, tensor, tensor.numel(), (_global(group, src, group_src),)
    ),
    "all_gather": lambda tensor_list, tensor, group=None, async_op=False: _Collective(
        group, async_op, tensor, tensor.numel()
    ),
    "all_gather_single": lambda output_tensor, input_tensor, group=None, async_op=False: _Collective(
        group, async_op, input_tensor, input_tensor.numel()
    ),
    "gather": lambda tensor, gather_list=None, dst=None, group=None, async_op=False, group_dst=None: _Collective(
        group, async_op, tensor, tensor.numel(), (_global(group, dst, group_dst),)
    ),
    "scatter": lambda tensor, scatter_list=None, src=None, group=None, async_op=False, group_src=None: _Collective(
        group, async_op, tensor, tensor.numel(), (_global(group, src, group_src),)
    ),
    "reduce_scatter": lambda output, input_list, op=SUM, group=None, async_op=False: _Collective(
        group, async_op, input_list[0], tuple(piece.shape for piece in input_list), (op,)
    ),
    "reduce_scatter_single": lambda output, input, op=SUM, group=None, async_op=False: _Collective(
        group, async_op, input, input.shape, (op,)
    ),
    "all_to_all": lambda output_tensor_list, input_tensor_list, group=None, async_op=False: _Collective(
        group,
        async_op,
        input_tensor_list[0],
        splits=([x.numel() for x in input_tensor_list], [x.numel() for x in output_tensor_list]),
    ),
    "all_to_all_single": (
        lambda output, input, output_split_sizes=None, input_split_sizes=None, group=None, async_op=False: _Collective(
            group,
            async_op,
            input,
            splits=(_pieces(input, input_split_sizes, group), _pieces(output, output_split_sizes, group)),
        )
    ),
    "barrier": lambda group=None, async_op=False, device_ids=None, timeout=None: _Collective(group, async_op, None),
    # Every rank of the world must call new_group, unless it is told to synchronize its members only.
    "new_group": lambda ranks=None, *_, use_local_synchronization=False, **__: _Collective(
        c10d.GroupMember.NON_GROUP_MEMBER if use_local_synchronization else None,
        False,
        None,
        None,
        (tuple(ranks or ()),),
    ),
}
COLLECTIVES["all_gather_into_tensor"] = COLLECTIVES["all_gather_single"]
COLLECTIVES["reduce_scatter_tensor"] = COLLECTIVES["reduce_scatter_single"]


def _to(tensor: Tensor, dst: Any = None, group: Any = None, tag: int = 0, group_dst: Any = None) -> tuple[Any, ...]:
    return tensor, group, tag, _global(group, dst, group_dst)


def _from(tensor: Tensor, src: Any = None, group: Any = None, tag: int = 0, group_src: Any = None) -> tuple[Any, ...]:
    return tensor, group, tag, _global(group, src, group_src)


# The describer; whether it sends; whether it returns at once.
MESSAGES: dict[str, tuple[Callable[..., tuple[Any, ...]], bool, bool]] = {
    "send": (_to, True, False),
    "isend": (_to, True, True),
    "recv": (_from, False, False),
    "irecv": (_from, False, True),
}


def _word(part: Any) -> str:
    if isinstance(part, ReduceOp.RedOpType):
        return part.name.lower()
    return f"root {part}" if isinstance(part, int) else str(part)


class Work:
    """A call under way: torch's own Work, whose wait shows on the board. `then` is told when it is over."""

    def __init__(self, work: Any, board: Board, then: Callable[[Any], None] | None = None) -> None:
        self._work, self._board, self._call, self._then = work, board, board.last, then

    def wait(self, *timeout: timedelta) -> bool:
        """Wait until the call is done."""
        self._board.wait_again(self._call, place())
        try:
            result = self._work.wait(*timeout)
        finally:
            self._board.done()
        if self._then:
            self._then(self._work)
            self._then = None
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


class Watch:
    """Watches the functions of torch.distributed in this process, once the default group is there."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self.inside = threading.local()  # torch's functions call one another: the outermost is written
        self.texts: dict[Any, tuple[int, bytes]] = {}
        self.lines: dict[Any, Line] = {}
        for name, describe in COLLECTIVES.items():
            if hasattr(c10d, name):
                self._replace(name, self._collective(name, getattr(c10d, name), describe))
        for name, how in MESSAGES.items():
            self._replace(name, self._message(name, getattr(c10d, name), *how))

    def _replace(self, name: str, watched: Callable[..., Any]) -> None:
        functools.update_wrapper(watched, getattr(c10d, name))
        setattr(c10d, name, watched)
        setattr(dist, name, watched)

    def _collective(self, name: str, real: Callable[..., Any], describe: Callable[..., _Collective]) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if getattr(self.inside, "a_call", False):
                return real(*args, **kwargs)
            try:
                group, at_once, tensor, size, detail, splits = describe(*args, **kwargs)
                line = self.lines.get(group) or self._line(group)
            except Exception:  # wrong arguments, or a group of others: torch knows best what to say
                return real(*args, **kwargs)
            self.board.enter(line, *self._text(name, "", tensor, size, detail, place()), splits)
            result = self._make(line, at_once, real, args, kwargs)
            return Work(result, self.board) if at_once else result

        return call

    def _message(self, name: str, real: Callable[..., Any], describe: Any, sends: bool, at_once: bool) -> Any:
        board = self.board

        def call(*args: Any, **kwargs: Any) -> Any:
            if getattr(self.inside, "a_call", False):
                return real(*args, **kwargs)
            try:
                tensor, group, tag, peer = describe(*args, **kwargs)
                line = self.lines.get((group, tag, peer, sends)) or self._line(group, tag, peer, sends)
            except Exception:
                return real(*args, **kwargs)
            way = f"to rank {peer}" if sends else "from any rank" if peer is None else f"from rank {peer}"
            text = self._text(name, way, tensor, tensor.numel(), (), place())
            board.enter(line, *text)
            result = self._make(line, at_once, real, args, kwargs)
            if peer is not None:
                return Work(result, board) if at_once else result

            def received(source: int) -> None:  # only now is it known along which line it came
                board.enter(self._line(group, tag, source, False), *text)

            if at_once:
                return Work(result, board, lambda work: received(self._members(group)[work._source_rank()]))
            received(result)
            return result

        return call

    def _make(self, line: Line, at_once: bool, real: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Make the call. A call that raises has not sent anything."""
        if not at_once:
            self.board.wait()
        self.inside.a_call = True
        try:
            return real(*args, **kwargs)
        except BaseException:
            self.board.undo(line)
            raise
        finally:
            self.inside.a_call = False
            self.board.done()

    def _line(self, group: Any, *way: Any) -> Line:
        """The line of a group's collectives, or of its messages: way is their tag, the other rank, whether to it."""
        pg: Any = group or c10d.GroupMember.WORLD
        me: Any = self.board.rank
        if way:
            tag, peer, sends = way
            ranks = (me,) if peer is None else (me, peer) if sends else (peer, me)
            line = self.lines[group, *way] = self.board.line("message", ranks, (pg.group_name, tag))
        else:
            line = self.lines[group] = self.board.line("group", self._members(pg), pg.group_name)
        return line

    @staticmethod
    def _members(group: Any) -> tuple[int, ...]:
        return tuple(dist.get_process_group_ranks(group))

    def _text(
        self, name: str, way: str, tensor: Tensor | None, size: Any, detail: tuple[Any, ...], where: tuple[str, int]
    ) -> tuple[int, bytes]:
        """The signature of a call, and the call as it is written on the board."""
        content = (tensor.dtype, tensor.shape) if tensor is not None else ()
        key = name, way, detail, content, size, where
        known = self.texts.get(key)
        if known is None:
            words = f"{name} {way}".strip()
            if detail:
                words += f"({', '.join(_word(part) for part in detail)})"
            if tensor is not None:
                words += f" of {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
            must_agree = "message" if way else name, [_word(part) for part in detail], str(content[:1]), size
            known = self.texts[key] = digest(must_agree), text_of(words, *where)
        return known
