"""What a cluster offers, as plain data: devices, links, and which of them a pair of ranks has between it.

Figures are those of the vendors' data sheets, for dense matrices (a sheet's "with sparsity" is twice as much), a
direction of a link, a device. What a run reaches of them is not in here: see `minipar.cost`.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .mesh import Mesh

GB, TFLOP = 1e9, 1e12


@dataclass(frozen=True)
class Device:
    """bf16, fp32: FLOP/s of matrix products in that dtype (fp16 is as bf16). memory: bytes. bandwidth: of that memory,
    bytes/s. watts: at full load, for the device alone."""

    name: str
    bf16: float
    fp32: float
    memory: float
    bandwidth: float
    watts: float

    def __post_init__(self) -> None:
        _check(self, dict.fromkeys(("bf16", "fp32", "memory", "bandwidth"), None) | {"watts": 0.0})


def _check(what: Any, least: dict[str, float | None]) -> None:
    """ValueError for a field that is no number, or too small. least: None where it has to be above 0."""
    for name, bound in least.items():
        value = getattr(what, name)
        fits = isinstance(value, int | float) and (value > 0 if bound is None else value >= bound)
        if not fits:
            limit = "above 0" if bound is None else "from 0 on"
            raise ValueError(f"{type(what).__name__}({name}={value!r}): a number {limit}")


@dataclass(frozen=True)
class Link:
    """A message of n bytes takes latency + n / bandwidth seconds (the alpha-beta model, Hockney 1994)."""

    latency: float
    bandwidth: float

    def __post_init__(self) -> None:
        _check(self, {"latency": 0.0, "bandwidth": None})

    def seconds(self, size: float, messages: int = 1) -> float:
        """`size` bytes in all, in so many messages one after the other."""
        return messages * self.latency + size / self.bandwidth


@dataclass(frozen=True)
class Cluster:
    """So many devices, `node` of them in a node. inside, between: the links of a device to others of its node, and to
    those of other nodes, one direction, when all devices talk at a time."""

    device: Device
    gpus: int
    node: int
    inside: Link
    between: Link

    def __post_init__(self) -> None:
        for name in ("gpus", "node"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"Cluster({name}={value!r}): a whole number, at least 1")

    def link(self, mesh: Mesh, axis: str) -> Link:
        """What each rank of an axis has to the next one, when the whole axis talks. Ranks are numbered as in `Mesh`,
        `node` of them side by side in a node.

        Where an axis has several ranks in a node, rings through different ports carry parts of what goes between nodes,
        as NCCL lays them: together at most as much as goes inside.
        """
        step, size = mesh.step(axis), mesh.shape[axis]
        if mesh.size <= self.node or self.node % (step * size) == 0:  # no line of the axis straddles two nodes
            return self.inside
        together = -(-self.node // step)  # of an axis' ranks, in a node
        return Link(self.between.latency, min(self.inside.bandwidth, together * self.between.bandwidth))

    def of(self, gpus: int) -> "Cluster":
        """The same with another number of devices."""
        return replace(self, gpus=gpus)

    def save(self, file: str | Path) -> None:
        """Write the cluster as JSON."""
        Path(file).write_text(json.dumps(asdict(self), indent=2) + "\n")


def load_cluster(file: str | Path) -> Cluster:
    """Read what `Cluster.save` wrote, or somebody by hand. ValueError names a field that is missing or unknown."""
    try:
        read: dict[str, Any] = json.loads(Path(file).read_text())
        device, inside, between = Device(**read.pop("device")), Link(**read.pop("inside")), Link(**read.pop("between"))
        return Cluster(device=device, inside=inside, between=between, **read)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} does not describe a cluster: {error}") from None


def _device(name: str, bf16: float, fp32: float, memory: float, bandwidth: float, watts: float) -> Device:
    return Device(name, bf16 * TFLOP, fp32 * TFLOP, memory * GB, bandwidth * GB, watts)


# NVIDIA's data sheets of the SXM form of each; AMD's of the MI300X. V100 has fp16, not bf16.
DEVICES = {
    device.name: device
    for device in (
        _device("V100", 125, 15.7, 32, 900, 300),
        _device("A100-40", 312, 19.5, 40, 1555, 400),
        _device("A100", 312, 19.5, 80, 2039, 400),
        _device("H100", 989, 67, 80, 3350, 700),
        _device("H200", 989, 67, 141, 4800, 700),
        _device("B200", 2250, 75, 180, 7700, 1000),
        _device("MI300X", 1307, 163, 192, 5300, 750),
    )
}


def _cluster(device: str, inside: float, between: float) -> Cluster:
    return Cluster(DEVICES[device], 8, 8, Link(2e-6, inside * GB), Link(5e-6, between * GB))


# Nodes of 8, as their vendors build them: NVLink 2, 3, 4 and 5 (150, 300, 450, 900 GB/s a direction) or AMD's Infinity
# Fabric inside; one network port a device between: 100, 200 or 400 Gbit/s. Latencies are those of one hop of a ring, of
# the usual order of magnitude and from no sheet.
CLUSTERS = {
    "v100": _cluster("V100", 150, 12.5),
    "a100-40": _cluster("A100-40", 300, 25),
    "a100": _cluster("A100", 300, 25),
    "h100": _cluster("H100", 450, 50),
    "h200": _cluster("H200", 450, 50),
    "b200": _cluster("B200", 900, 50),
    "mi300x": _cluster("MI300X", 448, 50),
}
