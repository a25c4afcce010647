"""Recompute: what a block's backward needs is not kept, it is computed again (Chen et al. 2016, Sublinear Memory Cost).

Of 3 units of work (1 forward, 2 backward) `full` makes 4.

    full        Only what goes into a block is kept. Backward begins with one more forward, in which the ranks of an
                axis send again what forward sends.
    selective   The results of matrix products and of fused attention are kept too. Computed again is what is cheap:
                norms, activations, dropout, sums, and what is sent (cf. Korthikanti et al. 2022).
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

Context = AbstractContextManager[Any]
HOW = ("none", "selective", "full")

aten = torch.ops.aten
DEAR = {
    aten.mm.default,
    aten.addmm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
}


def keep_less(block: nn.Module, how: str, remember: Callable[[], Context]) -> None:
    """Let a block keep less of its forward.

    remember: called before each forward; gives the context in which the block computes again what it computed now.
    """
    inner = block.forward

    def contexts() -> tuple[Context, Context]:
        keeping, kept = create_selective_checkpoint_contexts(_policy) if how == "selective" else (nullcontext(),) * 2
        return keeping, _both(remember(), kept)

    def forward(*arguments: Any, **more: Any) -> Any:
        if not torch.is_grad_enabled():
            return inner(*arguments, **more)
        return checkpoint(partial(inner, **more), *arguments, use_reentrant=False, context_fn=contexts)

    block.forward = forward


def _policy(context: Any, operation: Any, *arguments: Any, **more: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in DEAR else CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def _both(outer: Context, inner: Context) -> Iterator[None]:
    with outer, inner:
        yield
