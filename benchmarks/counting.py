"""The counted cost of one training step of a method, on fake or real tensors: a row of numbers that repeat exactly.

Autocast here is the CPU's, since autograd does not run on fake CUDA tensors. Both autocasts cast products and
attention; CUDA's keeps norms, sums and softplus in float32 and so casts more. In full fine-tuning of the small model,
the forward pass has 942 kernels with CUDA's instead of 887, and moves a tenth more bytes; the loss is the same
(`tests/benchmarks/test_bench_cuda.py` counts both). Attention too is counted as on a CPU (one kernel, forward and
backward). With fake tensors the clicks are fixed, so sampling them is not counted.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from benchmarks.fake import convert, fake_tensors
from benchmarks.kernels import Kernels, cuda_dropout
from benchmarks.measure import Cost, step_cost
from benchmarks.methods import Setup, build, make_batch, make_optimizer, tensors_of
from benchmarks.roofline import largest_batch, modelled


def count(
    method: str, size: str, resolution: int, images: int = 1, objects: int = 2, autocast: bool = False, **more: Any
) -> dict[str, Any]:
    """A step's `Cost` on fake tensors, its modelled times, and the trained parameters, as one row.

    Args:
        method: see `benchmarks.methods.build`, also for the next two.
        size: of SAM 2.
        resolution: pixels of the input's side.
        images: in the batch.
        objects: of each image.
        autocast: the CPU's bfloat16 autocast; else float32.
        **more: for `build`.
    """
    setup, cost, kernels = fake_step(method, size, resolution, images, objects, autocast, **more)
    parameters = list(setup.model.parameters())
    weights = sum(tensor.nbytes for tensor in (*parameters, *setup.model.buffers()))
    row = {
        **cost._asdict(),
        **modelled(kernels.counts),
        "kernels_by_phase": {phase: kernels.total(phase) for phase in ("forward", "loss", "backward", "optimizer")},
        "weight_bytes": weights,
        "parameters": sum(p.numel() for p in parameters),
        "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
    }
    if images > 1:
        facts = weights, cost.optimizer_bytes, cost.gradient_bytes, cost.peak_live_bytes
        row["largest_batch_24gb"] = largest_batch(*facts, images)
    return row


def fake_step(
    method: str, size: str, resolution: int, images: int = 1, objects: int = 2, autocast: bool = False, **more: Any
) -> tuple[Setup, Cost, Kernels]:
    """One step on fake tensors; arguments as for `count`, and `more` goes to `build`."""
    setup = build(method, size, resolution, **more)
    with fake_tensors() as mode:
        convert(setup.model, mode)
        setup = setup._replace(optimizer=make_optimizer(setup.model, foreach=True))
        return setup, *_counted(setup, make_batch(resolution, images, objects), autocast, lambda: None)


def real_step(
    method: str, size: str, resolution: int, images: int = 1, objects: int = 2, autocast: bool = False
) -> tuple[Cost, Kernels]:
    """The same on real tensors, with real clicks; arguments as for `count`."""
    setup = build(method, size, resolution)
    setup = setup._replace(optimizer=make_optimizer(setup.model, foreach=True))
    with cuda_dropout():
        return _counted(setup, make_batch(resolution, images, objects), autocast, setup.seed)


def _counted(setup: Setup, batch: Any, autocast: bool, seed: Callable[[], None]) -> tuple[Cost, Kernels]:
    def context() -> AbstractContextManager:
        return torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()

    def forward() -> Any:
        seed()
        return setup.model(batch)

    if hasattr(setup.model, "hold_weights"):
        with context():
            setup.model.hold_weights("cpu")  # otherwise the first step would, and its new weights count as saved
    return step_cost(
        setup.model, setup.optimizer, tensors_of(batch), forward, lambda out: setup.loss_of(out, batch), context
    )
