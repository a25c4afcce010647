"""What travels between the caller and the ranks: functions by value, tensors as plain bytes."""

import io
import pickle
import sys
from importlib import import_module
from types import ModuleType
from typing import Any

import cloudpickle
import torch
from torch import Tensor


class _Pickler(cloudpickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is Tensor and obj.layout is torch.strided and not obj.is_quantized:
            data = obj.detach().cpu().resolve_conj().resolve_neg().contiguous()
            raw: Any = data.reshape(-1).view(torch.uint8).numpy()
            return _tensor, (pickle.PickleBuffer(raw), data.dtype, tuple(data.shape), obj.requires_grad and obj.is_leaf)
        if isinstance(obj, ModuleType) and type(obj) is not ModuleType and sys.modules.get(obj.__name__) is obj:
            # Such as torch.distributed.config: cloudpickle takes it along with a function that uses torch.distributed
            # and anything called config, and knows plain modules only.
            return import_module, (obj.__name__,)
        return super().reducer_override(obj)


def _tensor(raw: bytearray, dtype: torch.dtype, shape: tuple[int, ...], requires_grad: bool) -> Tensor:
    flat = torch.frombuffer(raw, dtype=dtype) if len(raw) else torch.empty(0, dtype=dtype)
    return flat.reshape(shape).requires_grad_(requires_grad)


def dumps(obj: Any) -> memoryview:
    """Pickle. A function or class of a notebook or script goes by value; a tensor goes as its own elements only
    (not the storage that it is a view of), and arrives on the CPU, without its graph."""
    file = io.BytesIO()
    _Pickler(file, protocol=pickle.HIGHEST_PROTOCOL).dump(obj)
    return file.getbuffer()


loads = pickle.loads
