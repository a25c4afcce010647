"""Mixed precision: compute in 16 bits, keep weights, gradients and their sums in the module's own dtype.

bfloat16 has float32's range, so nothing more is needed. float16 ends at 65504 and loses what is below 6e-8: the loss is
multiplied by a large number before backward, and the gradients divided by it after (Micikevicius et al. 2018, Mixed
Precision Training).
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch


def computing_in(dtype: torch.dtype | None, device: torch.device) -> AbstractContextManager[Any]:
    """Inside `with`, matrix products and attention compute in `dtype`; what needs the range (softmax, norms, losses)
    stays as it is."""
    return torch.autocast(device.type, dtype) if dtype else nullcontext()


@dataclass
class LossScale:
    """The number by which the loss is multiplied: halved after each overflow, doubled after `patience` good steps."""

    value: float = 2.0**16
    patience: int = 2000
    good: int = 0

    def update(self, overflow: bool) -> None:
        self.good = 0 if overflow else self.good + 1
        if overflow:
            self.value /= 2
        elif self.good == self.patience:
            self.value, self.good = self.value * 2, 0
