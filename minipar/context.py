"""Context parallelism: the ranks of an axis share a sequence, and attention brings it together.

Everything but attention works on each token alone, so a rank needs no more than its share of them. For attention there
are two ways: keys and values go around a ring, or the ranks change over from shares of the sequence to shares of the
heads.

Under a causal mask late queries have more keys than early ones, so shares are in zigzag order: of 2n chunks of the
sequence, index i has i and 2n-1-i, one early and one late (Llama Team 2024, The Llama 3 Herd of Models, 3.3.2).

Gradients: each rank's loss is that of its own tokens, and what is wanted is the gradient of their sum. Parameters are
the same on all ranks and each rank's gradient of them is its part of that sum, so they are summed over the axis, as in
data parallelism.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from .collectives import Axis, Collective, all_gather, all_to_all, irecv, isend, reduce_scatter

# -- the order of the sequence -------------------------------------------------------------------------------


def zigzag_order(ranks: int) -> list[int]:
    """The chunks of index 0, of index 1, ...: zigzag_order(3) == [0, 5, 1, 4, 2, 3]."""
    return [chunk for i in range(ranks) for chunk in (i, 2 * ranks - 1 - i)]


def causal_pairs(length: int, order: Sequence[int]) -> list[int]:
    """How many causal (query, key) pairs each rank computes if index i has the chunks order[2i] and order[2i+1].

    >>> causal_pairs(32, range(8))  # contiguous
    [36, 100, 164, 228]
    >>> causal_pairs(32, zigzag_order(4))
    [132, 132, 132, 132]
    """
    _check_length(length, len(order) // 2, "cp")
    size = length // len(order)
    keys = [sum(range(c * size + 1, (c + 1) * size + 1)) for c in order]  # the query at position p has p + 1 keys
    return [early + late for early, late in zip(keys[::2], keys[1::2], strict=True)]


def zigzag(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's share of x along `dim`: (..., T, ...) -> (..., T/n, ...). Sends nothing, forward or backward.

    x is the same on every rank. Its gradient is not: it is zero outside of this rank's share, which is what this rank's
    loss depends on. If x comes from parameters, their gradients are parts of a sum, to be added up over the axis with
    those of all others. To gather the gradient here (as `split` does) would count it n times.
    """
    _check_length(x.size(dim), axis.size, axis.name)
    chunks = x.tensor_split(2 * axis.size, dim)
    return torch.cat([chunks[axis.index], chunks[-1 - axis.index]], dim)


def unzigzag(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """The inverse: whole sequences in their order, on every rank: (..., T/n, ...) -> (..., T, ...).

    Every rank's loss may depend on this share, so backward sums what all ranks have for it. (`gather` does not: it is
    for ranks that go on to one and the same loss, which counts once.) Sends n-1 times the bytes of x, both forward, in
    an all-gather, and backward, in a reduce-scatter.
    """
    whole = Collective.apply(x, axis, partial(all_gather, dim=dim), partial(reduce_scatter, dim=dim))
    return _in_order(whole, axis, dim)


def _in_zigzag(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """A whole sequence, from its own order to that of the ranks' shares side by side."""
    chunks = x.tensor_split(2 * axis.size, dim)
    return torch.cat([chunks[place] for place in zigzag_order(axis.size)], dim)


def _in_order(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """And back."""
    chunks, order = x.tensor_split(2 * axis.size, dim), zigzag_order(axis.size)
    return torch.cat([chunks[order.index(place)] for place in range(len(order))], dim)


def _check_length(length: int, ranks: int, name: str) -> None:
    if ranks > 1 and length % (2 * ranks):  # one rank cuts nothing
        below = length - length % (2 * ranks)
        fits = " or ".join(str(n) for n in (below, below + 2 * ranks) if n)
        raise ValueError(
            f"sequence length {length} is not divisible by 2·{name} = {2 * ranks} chunks: {fits} would fit; "
            "pad the sequence"
        )


# -- keys and values go around -------------------------------------------------------------------------------


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, axis: Axis, *, is_causal: bool = True, scale: float | None = None
) -> Tensor:
    """Exact attention over the whole sequence: what F.scaled_dot_product_attention gives, in zigzag shares.

    q (B, heads, T/n, head_dim), k and v (B, kv heads, T/n, head_dim) -> (B, heads, T/n, head_dim). With fewer kv heads
    than heads, neighboring heads share one. scale: of the scores, by default 1/√head_dim.

    Keys and values go around the ring (Liu et al. 2023, Ring Attention with Blockwise Transformers). The next share
    arrives while this rank computes with the one that is here, so it holds two beside its own, whatever n.

    Bytes that each rank sends, with M = k.nbytes + v.nbytes of its share:
        forward   (n-1) M    in n-1 messages
        backward 2(n-1) M    in 2(n-1): k and v once more, and their gradients
    """
    heads, kv_heads = q.size(1), k.size(1)
    if heads % kv_heads:
        fits = [n for n in range(1, heads + 1) if heads % n == 0]
        raise ValueError(f"{kv_heads} kv heads do not divide the {heads} heads; kv heads can be one of {fits}")
    if not q.size(2) == k.size(2) == v.size(2):
        raise ValueError(f"shares of q, k, v have lengths {q.size(2)}, {k.size(2)}, {v.size(2)}: they must be equal")
    _check_length(q.size(2) * axis.size, axis.size, axis.name)
    return _RingAttention.apply(q, k, v, axis, is_causal, q.size(-1) ** -0.5 if scale is None else scale)


class _RingAttention(torch.autograd.Function):
    """What is computed is in float32 or wider; what travels keeps its dtype."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, axis: Axis, is_causal: bool, scale: float) -> Tensor:
        ctx.axis, ctx.is_causal, ctx.scale = axis, is_causal, scale
        wide, blocks = _wide(q), _blocks(k, v, axis, is_causal)
        out, lse = (x.clone() for x in _attend(wide, next(blocks), scale))  # a checkpoint may keep what is given
        for block in blocks:
            _merge(out[block.rows], lse[block.rows], *_attend(wide[block.rows], block, scale))
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (q, k, v, out, lse), axis, scale = ctx.saved_tensors, ctx.axis, ctx.scale
        wide, out, d_out = _wide(q), _wide(out), _wide(gradients[0])
        d_q, d_own, coming = torch.zeros_like(wide), torch.empty(0), None
        for block in _blocks(k, v, axis, ctx.is_causal):
            rows = block.rows
            d_rows, d_k, d_v = _gradients(d_out[rows], wide[rows], block, out[rows], lse[rows], scale)
            d_q[rows] += d_rows
            d_block = k.new_zeros(block.pair.shape)
            d_block[block.columns] = torch.cat([d_k, d_v], -1).to(k.dtype)
            # What a block's own rank has for it stays at home. The others' goes after the block, a step behind it: what
            # this rank adds to is what its left neighbor had in the step before. It ends where it belongs.
            if block.own:
                d_own = d_block
            else:
                coming = _Shift(d_block + coming.wait() if coming else d_block, axis, tag=1)
        d_k, d_v = (d_own + coming.wait() if coming else d_own).tensor_split([k.size(-1)], -1)
        return d_q.to(q.dtype), d_k, d_v, None, None, None


@dataclass
class _Block:
    """Keys and values of one share, and what this rank's queries see of it. rows, columns: indices of queries, keys."""

    own: bool
    masked: bool  # causal inside
    pair: Tensor  # k and v of the share, side by side along head_dim
    width: int  # head_dim of k
    rows: Any
    columns: Any

    @property
    def k(self) -> Tensor:
        return self.pair[self.columns][..., : self.width]

    @property
    def v(self) -> Tensor:
        return self.pair[self.columns][..., self.width :]


def _blocks(k: Tensor, v: Tensor, axis: Axis, is_causal: bool) -> Iterator[_Block]:
    """All shares of k and v, this rank's own first, then those to its left. The next travels while one is in use."""
    pair = torch.cat([k, v], -1)
    for step in range(axis.size):
        coming = _Shift(pair, axis, tag=0) if step < axis.size - 1 else None
        origin = (axis.index - step) % axis.size
        rows, columns = _visible(axis.index, origin, k.size(-2)) if is_causal else (..., ...)
        yield _Block(step == 0, is_causal and step == 0, _wide(pair), k.size(-1), rows, columns)
        pair = coming.wait() if coming else pair


def _visible(mine: int, other: int, length: int) -> tuple[Any, Any]:
    """Which queries of index `mine` see keys of index `other`, and which keys: the rest is not computed.

    Early chunks lie in the order of the ranks and before all late ones, which lie in the opposite order. So of two
    shares half is visible, wholly: every rank has the same work in every step, and there is no mask but in its own.
    """
    all_heads = slice(None), slice(None)
    early, late = (*all_heads, slice(length // 2)), (*all_heads, slice(length // 2, None))
    if other == mine:
        return ..., ...
    return (..., early) if other < mine else (late, ...)


class _Shift:
    """Everyone's x moves one place to the right. The receive is posted first; there is time until `wait`."""

    def __init__(self, x: Tensor, axis: Axis, tag: int):
        self.incoming = irecv(x, axis, (axis.index - 1) % axis.size, tag)
        self.outgoing = isend(x, axis, (axis.index + 1) % axis.size, tag)

    def wait(self) -> Tensor:
        """The x of the left neighbor."""
        self.outgoing.wait()
        return self.incoming.wait()


def _attend(q: Tensor, block: _Block, scale: float) -> tuple[Tensor, Tensor]:
    """Attention to the keys of one block alone: (B, heads, queries, head_dim), and the logarithm of the sum of the
    exponentials of each query's scores, (B, heads, queries)."""
    if _fused(q, block):
        return KERNEL(q, block.k, block.v, 0.0, block.masked, scale=scale)
    scores = _scores(q, block, scale)
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp_() @ _for_heads(block.v, q), lse


def _merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """Let queries that attended to some keys attend to more, in place: softmax online (Milakov and Gimelshein 2018)."""
    total = torch.logaddexp(lse, more_lse)
    out.mul_((lse - total).exp_()[..., None]).add_(more * (more_lse - total).exp_()[..., None])
    lse.copy_(total)


def _gradients(
    d_out: Tensor, q: Tensor, block: _Block, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of q and of the block's k and v, by probabilities P computed again. out and lse are over all keys.

    dV = Pᵀ dO, dP = dO Vᵀ, dS = P * (dP - rowsum(dO * O)), dQ = dS K, dK = dSᵀ Q
    (Dao et al. 2022, FlashAttention, appendix B.2).
    """
    if _fused(q, block):
        return KERNEL_BACKWARD(d_out, q, block.k, block.v, out, lse, 0.0, block.masked, scale=scale)
    k, v = _for_heads(block.k, q), _for_heads(block.v, q)
    p = (_scores(q, block, scale) - lse[..., None]).exp_()
    d_scores = p * (d_out @ v.mT - (d_out * out).sum(-1, keepdim=True)) * scale
    d_k, d_v = ((x.unflatten(1, (block.k.size(1), -1)).sum(2)) for x in (d_scores.mT @ q, p.mT @ d_out))
    return d_scores @ k, d_k, d_v


# torch's own attention on the CPU, which F.scaled_dot_product_attention calls, with the logarithms that it leaves out.
# It never has the scores in memory. Elsewhere they are computed by the formulas.
KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
KERNEL_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _fused(q: Tensor, block: _Block) -> bool:
    return q.device.type == "cpu" and block.k.shape == block.v.shape


def _scores(q: Tensor, block: _Block, scale: float) -> Tensor:
    """(B, heads, queries, keys)"""
    scores = q @ _for_heads(block.k, q).mT * scale
    if block.masked:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores.masked_fill_(future, -torch.inf)
    return scores


def _for_heads(x: Tensor, q: Tensor) -> Tensor:
    """Neighboring heads share one of k or v: (B, kv heads, ...) -> (B, heads, ...)"""
    return x.repeat_interleave(q.size(1) // x.size(1), 1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# -- shares of the sequence for shares of the heads ----------------------------------------------------------


Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def all_to_all_attention(q: Tensor, k: Tensor, v: Tensor, axis: Axis, attention: Attention) -> Tensor:
    """Any attention over the whole sequence, each rank for its share of the heads, in zigzag shares.

    q (B, heads, T/n, head_dim), k and v (B, kv heads, T/n, head_dim) -> (B, heads, T/n, head_dim).
    attention: (B, heads/n, T, head_dim) of each, in the order of the sequence -> the same. Such as
    `partial(F.scaled_dot_product_attention, is_causal=True)`.

    An all-to-all for each of q, k, v, and one for the result (Jacobs et al. 2023, DeepSpeed Ulysses). Each rank sends
    (n-1)/n of the bytes of these four shares in 4 calls forward, and as much in 4 calls backward.
    """
    for name, heads in (("heads", q.size(1)), ("kv heads", k.size(1))):
        if heads % axis.size:
            fits = [n for n in range(1, heads + 1) if heads % n == 0]
            raise ValueError(
                f"{axis.name}={axis.size} does not divide the {heads} {name}; {axis.name} can be one of {fits}, "
                "or use ring_attention"
            )
    _check_length(q.size(2) * axis.size, axis.size, axis.name)
    q, k, v = (_to_heads(x, axis) for x in (q, k, v))
    return _to_sequence(attention(q, k, v), axis)


def _to_heads(x: Tensor, axis: Axis) -> Tensor:
    """(B, heads, T/n, head_dim) in zigzag shares -> (B, heads/n, T, head_dim) in order."""
    x = _exchange(x, axis).unflatten(1, (axis.size, -1))  # (B, n, heads/n, T/n, head_dim), by whence it came
    return _in_order(x.transpose(1, 2).flatten(2, 3), axis, dim=2)


def _to_sequence(x: Tensor, axis: Axis) -> Tensor:
    """And back."""
    x = _in_zigzag(x, axis, dim=2).unflatten(2, (axis.size, -1))  # (B, heads/n, n, T/n, head_dim), by whither it goes
    return _exchange(x.transpose(1, 2).flatten(1, 2), axis)


def _exchange(x: Tensor, axis: Axis) -> Tensor:
    """Share i of dim 1 goes to index i: a transposition of equal shares, so it is its own adjoint."""
    return Collective.apply(x, axis, partial(all_to_all, dim=1), partial(all_to_all, dim=1))


# -- a model whose sequence is cut ---------------------------------------------------------------------------


def cut_behind(layer: nn.Module, axis: Axis) -> None:
    """From behind this layer on, each rank has its share of the sequence: (B, T, C) -> (B, T/n, C)."""
    inner = layer.forward
    layer.forward = lambda *args, **more: zigzag(inner(*args, **more), axis, dim=1)


class WholeAttention(TorchFunctionMode):
    """Inside `with`, attention is over the whole sequence, whoever calls it: the model need not know."""

    def __init__(self, axis: Axis):
        super().__init__()
        self.axis = axis

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is F.scaled_dot_product_attention:
            return self.attention(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if attn_mask is not None or dropout_p:
            what = "a mask of its own" if attn_mask is not None else f"dropout_p={dropout_p}"
            raise ValueError(f"{self.axis.name}={self.axis.size}: attention around a ring cannot have {what}")
        return ring_attention(query, key, value, self.axis, is_causal=is_causal, scale=scale)
