"""What others measured and printed, and the formulas they printed it with: the yardstick of `minipar.prediction`.

Nothing in the package is fitted to these numbers.
"""

from dataclasses import dataclass

from .cost import MEGATRON_2021, TODAY, Kernels, Layout
from .mesh import Mesh

# -- formulas as printed -------------------------------------------------------------------------------------


def narayanan_parameters(layers: int, hidden: int, vocabulary: int, sequence: int) -> float:
    """P = 12 l h^2 (1 + 13/(12h) + (V + s)/(12 l h)): Narayanan et al. 2021 (arXiv 2104.04473), eq. 2."""
    l, h, v, s = layers, hidden, vocabulary, sequence
    return 12 * l * h**2 * (1 + 13 / (12 * h) + (v + s) / (12 * l * h))


def narayanan_flops(batch: int, layers: int, hidden: int, vocabulary: int, sequence: int) -> float:
    """F = 96 B s l h^2 (1 + s/(6h) + V/(16 l h)), FLOPs of an iteration with full recomputation: eq. 3 there. Its
    "percent of peak" counts them all, so it is a hardware utilization: the model's is about three quarters of it."""
    l, h, v, s = layers, hidden, vocabulary, sequence
    return 96 * batch * s * l * h**2 * (1 + s / (6 * h) + v / (16 * l * h))


def narayanan_seconds(tokens: float, parameters: float, gpus: int, flops: float) -> float:
    """8 T P / (n X), the time of a run with full recomputation at X FLOP/s a device: eq. 4 there. 6 in place of 8
    without recomputation."""
    return 8 * tokens * parameters / (gpus * flops)


def korthikanti_model_flops(batch: int, layers: int, hidden: int, vocabulary: int, sequence: int) -> float:
    """72 B L s h^2 (1 + s/(6h) + V/(12 h L)): Korthikanti et al. 2022 (arXiv 2205.05198), eq. 8. MFU counts these."""
    l, h, v, s = layers, hidden, vocabulary, sequence
    return 72 * batch * l * s * h**2 * (1 + s / (6 * h) + v / (12 * h * l))


def korthikanti_hardware_flops(batch: int, layers: int, hidden: int, vocabulary: int, sequence: int) -> float:
    """72 B L s h^2 (1 + s/(3h) + V/(12 h L)), with selective recomputation: eq. 9 there. HFU counts these.

    Selective recomputation makes attention's two products once more: four times 4 B s^2 h a layer, in place of three.
    That is 2s/(9h), see `cost.step_flops`; s/(3h) is six times. The printed HFU column agrees with s/(3h).
    """
    l, h, v, s = layers, hidden, vocabulary, sequence
    return 72 * batch * l * s * h**2 * (1 + s / (3 * h) + v / (12 * h * l))


# -- tables --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A run that was published. flops: per device and second, as printed; recompute: whether that counts what is made
    again. What the source leaves open is a choice of ours, named in `open`."""

    model: str
    cluster: str
    layout: Layout
    batch: int
    sequence: int
    flops: float
    recomputed: bool
    kernels: Kernels
    source: str
    open: str

    @property
    def gpus(self) -> int:
        return self.layout.mesh.size


def _megatron(model: str, t: int, p: int, gpus: int, batch: int, tflops: float, rows: int, chunks: int) -> Run:
    """Table 1: tensor and pipeline sizes, devices and batch are printed; rows of a microbatch and chunks are not."""
    mesh, schedule = Mesh(dp=gpus // (t * p), pp=p, tp=t), "interleaved" if chunks > 1 else "1f1b"
    layout = Layout(mesh, batch // mesh.dp // rows, schedule, chunks, recompute="full")
    source = "Narayanan et al. 2021, arXiv 2104.04473, Table 1"
    return Run(
        model, "a100", layout, batch, 2048, tflops * 1e12, True, MEGATRON_2021, source, "rows of a microbatch, chunks"
    )


def _llama(gpus: int, cp: int, dp: int, sequence: int, tflops: float) -> Run:
    """Table 4: 16M tokens a batch, tp=8, pp=16. Chunks of the interleaved schedule are not printed."""
    batch = 2**24 // sequence
    mesh = Mesh(dp=dp, pp=16, cp=cp, tp=8)
    assert mesh.size == gpus
    layout = Layout(mesh, batch // dp, "interleaved", 4, zero=1, sequence_parallel=True)
    source = "Llama Team 2024, arXiv 2407.21783, Table 4"
    return Run("llama-405b", "h100", layout, batch, sequence, tflops * 1e12, False, TODAY, source, "chunks")


RUNS = [
    _megatron("megatron-1.7b", 1, 1, 32, 512, 137, rows=16, chunks=1),
    _megatron("megatron-7.5b", 4, 1, 128, 512, 142, rows=4, chunks=1),
    _megatron("megatron-39b", 8, 2, 512, 1536, 138, rows=4, chunks=2),
    _megatron("megatron-145b", 8, 8, 1536, 2304, 148, rows=1, chunks=2),
    _megatron("megatron-1t", 8, 64, 3072, 3072, 163, rows=1, chunks=2),
    _llama(8192, 1, 64, 8192, 430),
    _llama(16384, 1, 128, 8192, 400),
    _llama(16384, 16, 8, 131072, 380),
]
