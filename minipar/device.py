"""Which device and which backend a rank gets. The only file with torch.cuda calls."""

import torch


def pick(device: str | None, local_rank: int = 0, local_ranks: int = 1) -> tuple[torch.device, str]:
    """Choose for one of the `local_ranks` ranks of this machine, and make the device its current one.

    device: None or "cpu"; "cuda"; or "auto": cuda where every rank of this machine has a GPU to itself,
    else cpu. Returns the device and the backend of torch.distributed that fits it: gloo on the CPU and
    where ranks share a GPU (nccl refuses that), else nccl for GPU tensors and gloo for the others.
    Raises ValueError for a device that is not one of these or not there.
    """
    if device not in (None, "cpu", "cuda", "auto"):
        raise ValueError(f"device={device!r}: it can be None, 'cpu', 'cuda' or 'auto'")
    gpus = torch.cuda.device_count() if device in ("cuda", "auto") else 0  # to ask wakes the driver
    if device in (None, "cpu") or (device == "auto" and gpus < local_ranks):
        return torch.device("cpu"), "gloo"
    if not gpus:
        raise ValueError("device='cuda': torch sees no CUDA GPU here; leave device out to use the CPU")
    mine = torch.device("cuda", local_rank % gpus)
    torch.cuda.set_device(mine)
    return mine, "cpu:gloo,cuda:nccl" if gpus >= local_ranks else "gloo"


def default_generator(device: torch.device) -> torch.Generator:
    """The generator that dropout draws from on a device."""
    return torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index or 0]


def seed(seed: int, device: torch.device) -> None:
    """Seed torch's generators of the CPU and of a device. (torch.manual_seed asks every kind of accelerator that
    torch knows, which takes a tenth of a millisecond.)"""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(seed)
