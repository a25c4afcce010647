"""Which device and backend a rank gets, on machines with any number of GPUs."""

import pytest
import torch

from minipar.device import pick


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[torch.device]:
    """Pretend that the machine has so many GPUs. The list collects the devices that were made current."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


@pytest.mark.parametrize(
    ("current", "device", "local_rank", "local_ranks", "expected", "backend"),
    [
        (0, None, 0, 4, "cpu", "gloo"),
        (8, None, 0, 4, "cpu", "gloo"),
        (0, "auto", 0, 1, "cpu", "gloo"),
        (4, "auto", 3, 8, "cpu", "gloo"),
        (4, "auto", 3, 4, "cuda:3", "cpu:gloo,cuda:nccl"),
        (4, "cuda", 3, 4, "cuda:3", "cpu:gloo,cuda:nccl"),
        (1, "cuda", 0, 1, "cuda:0", "cpu:gloo,cuda:nccl"),
        (1, "cuda", 3, 4, "cuda:0", "gloo"),
        (2, "cuda", 3, 4, "cuda:1", "gloo"),
    ],
    indirect=["current"],
)
def test_nccl_where_each_rank_has_a_gpu_and_gloo_where_ranks_share_or_there_is_none(
    current: list[torch.device], device: str, local_rank: int, local_ranks: int, expected: str, backend: str
) -> None:
    assert pick(device, local_rank, local_ranks) == (torch.device(expected), backend)
    assert current == ([torch.device(expected)] if expected != "cpu" else [])


@pytest.mark.parametrize("current", [0], indirect=True)
def test_a_device_that_does_not_fit_is_named(current: list[torch.device]) -> None:
    with pytest.raises(ValueError, match="device='cuda': torch sees no CUDA GPU"):
        pick("cuda")
    with pytest.raises(ValueError, match="device='tpu': it can be None, 'cpu', 'cuda' or 'auto'"):
        pick("tpu")
