"""A model of a GPU's time for a step, from counted kernels: not a measurement, and always labelled "modelled".

    device = sum over kernels of max(LAUNCH_FLOOR, FLOPs / (0.6 peak), bytes moved / (0.8 bandwidth))
    host   = kernels x HOST_PER_KERNEL
    step   = max(device, host)

It ignores caches (an output that the next kernel reads from L2), fusion, synchronisation, the optimizer's step and the
data. It serves to compare methods and cards. `python -m benchmarks.gpu` measures on a real card.
"""

from collections.abc import Mapping
from typing import NamedTuple

from benchmarks.kernels import Kernel

LAUNCH_FLOOR, HOST_PER_KERNEL = 2e-6, 6e-6  # seconds
OF_PEAK, OF_BANDWIDTH = 0.6, 0.8  # shares of a data sheet's numbers that good kernels reach
RESERVE = 1.0  # GB of CUDA, cuDNN and the allocator, as in `benchmarks.estimate`


class Card(NamedTuple):
    """Peaks of a data sheet, dense (without sparsity).

    Attributes:
        narrow: TFLOP/s of bfloat16 and float16 products with float32 sums, on tensor cores.
        wide: TFLOP/s of float32 products, without TF32, as PyTorch and SAM 2's configs have it.
        bandwidth: GB/s of its memory.
        source: of the numbers.
    """

    narrow: float
    wide: float
    bandwidth: float
    source: str


CARDS = {
    "A10G": Card(70, 35, 600, "AWS and NVIDIA, A10G data sheet (the A10's 125 TFLOP/s are another card's)"),
    "RTX4090": Card(165.2, 82.6, 1008, "NVIDIA, Ada GPU architecture white paper, appendix A"),
    "A100": Card(312, 19.5, 2039, "NVIDIA, A100 80 GB SXM data sheet"),
    "H200": Card(989, 67, 4800, "NVIDIA, H200 SXM data sheet (1,979 with sparsity)"),
}


def device_ms(kernels: Mapping[Kernel, int], card: Card) -> float:
    """Modelled milliseconds of the device for kernels (kernel -> count), without the optimizer's."""
    seconds = 0.0
    for kernel, count in kernels.items():
        if kernel.phase != "optimizer":
            peak = OF_PEAK * 1e12 * (card.narrow if kernel.narrow else card.wide)
            seconds += count * max(
                LAUNCH_FLOOR, kernel.flops / peak, kernel.moved / (OF_BANDWIDTH * 1e9 * card.bandwidth)
            )
    return 1e3 * seconds


def host_ms(kernels: int) -> float:
    """Modelled milliseconds that eager PyTorch needs to launch this number of kernels."""
    return 1e3 * HOST_PER_KERNEL * kernels


def modelled(kernels: Mapping[Kernel, int]) -> dict[str, float | dict[str, float]]:
    """`host_ms`, and by card `device_ms` and `modelled_ms`, the larger of the two."""
    host = host_ms(sum(count for kernel, count in kernels.items() if kernel.phase != "optimizer"))
    device = {name: device_ms(kernels, card) for name, card in CARDS.items()}
    return {
        "host_ms": host,
        "device_ms": device,
        "modelled_ms": {name: max(host, value) for name, value in device.items()},
    }


def largest_batch(weights: int, optimizer: int, gradients: int, peak: int, images: int, capacity: float = 24e9) -> int:
    """The largest number of images of a batch within `capacity` bytes, less `RESERVE`; 0 if no image fits.

    Linear model: a step's peak without the gradients grows with the number of images.

    Args:
        weights: bytes of parameters and buffers.
        optimizer: bytes of its state.
        gradients: bytes of them, part of `peak`.
        peak: bytes of a step with `images` images, beyond weights and optimizer.
        images: of that step; at least two, since a single image's features are shared by its objects.
    """
    room = capacity - RESERVE * 1e9 - weights - optimizer - gradients
    return max(0, int(room * images // (peak - gradients)))
