"""Counts kernels, FLOPs, bytes saved for backward and peak live bytes of a training step; all repeat exactly on any
machine.

Everything here also works on fake tensors, which have shapes and storages but no memory (see `benchmarks.estimate`).
"""

import gc
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.kernels import Kernels


class Cost(NamedTuple):
    """The cost of one step.

    Attributes:
        flops: multiply-adds count two; elementwise operations count nothing.
        saved_bytes: everything that is saved for backward: live after the loss is computed and the model's outputs are
            dropped, beyond the weights, the batch and the optimizer's state.
        hooked_bytes: seen by autograd's saved-tensor hooks (distinct storages, without parameters, buffers and the
            batch): includes tensors saved for parts without a gradient, which are dropped before backward, but not the
            inputs of checkpoints.
        peak_live_bytes: the largest sum of live storages from forward to the end of the optimizer's step, beyond the
            weights, the batch and the optimizer's state; with the gradients.
        gradient_bytes: of all parameters.
        optimizer_bytes: the optimizer's state.
        kernels: of forward pass, loss and backward pass; see `benchmarks.kernels`.
        moved_bytes: of the same.
        optimizer_kernels: of the optimizer's step, not in `kernels`: on a GPU AdamW handles many tensors in each.
        optimizer_moved_bytes: of the same.
    """

    flops: int
    saved_bytes: int
    hooked_bytes: int
    peak_live_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    kernels: int
    moved_bytes: int
    optimizer_kernels: int
    optimizer_moved_bytes: int


class LiveBytes(TorchDispatchMode):
    """Tracks every storage that an operation creates, by weak reference, until it is freed.

    Args:
        known: tensors that do not count, such as the weights.
    """

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, weakref.finalize] = {}
        for tensor in known:
            self._follow(tensor, counts=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._follow(leaf)
        return result

    def _follow(self, tensor: Tensor, counts: bool = True) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        size = storage.nbytes() if counts else 0
        self.now += size
        self.peak = max(self.peak, self.now)
        self._alive[key] = weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self.now -= size
        del self._alive[key]


class Saved(AbstractContextManager):
    """The storages that autograd saves for backward inside the block, each once: `total` is their size in bytes, `seen`
    holds their addresses and those of ignored tensors."""

    def __init__(self, left_out: Iterable[Tensor]):
        self.total = 0
        self.seen = {tensor.untyped_storage()._cdata for tensor in left_out}
        self._kept: list[Any] = []  # so that no address is used twice
        self._hooks = saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self._kept.append(storage)
            self.total += storage.nbytes()
        return tensor

    def __enter__(self) -> "Saved":
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._kept.clear()
        self._hooks.__exit__(*exception)


def step_cost(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Iterable[Tensor],
    forward: Callable[[], Any],
    loss: Callable[[Any], Tensor],
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> tuple[Cost, Kernels]:
    """Runs a forward pass that fills caches, then one training step that is counted; also returns its kernels by phase
    and operation.

    Autograd's hooks count in the first pass, since hooks extend the life of some tensors.

    Args:
        model: whose parameters and buffers are the weights.
        optimizer: of the model, still without state; its steps change the weights.
        batch: the tensors that exist before the step.
        forward: the forward pass; it must keep only its outputs, and do the same at each call.
        loss: of the forward pass's outputs, which are dropped afterwards, as in the Trainer.
        autocast: creates the context of forward pass and loss.
    """
    known = [*model.parameters(), *model.buffers(), *batch]
    with Saved(known) as saved, autocast():
        value = loss(forward())
    del value
    gc.collect()
    with LiveBytes(known) as live, Kernels() as kernels:
        with autocast():
            outputs = forward()
            kernels.phase = "loss"
            value = loss(outputs)
            del outputs
        kept = live.now
        kernels.phase = "backward"
        value.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    optimizer.step()  # creates its state
    state = [leaf for leaf in tree_leaves(dict(optimizer.state)) if isinstance(leaf, Tensor)]
    kernels.phase = "optimizer"
    with LiveBytes([*known, *state, *gradients]) as live_in_optimizer, kernels:
        optimizer.step()
    optimizer_bytes, gradient_bytes = (sum(tensor.nbytes for tensor in group) for group in (state, gradients))
    peak = max(live.peak, live.now + live_in_optimizer.peak)
    optimizer.zero_grad()
    step = ("forward", "loss", "backward")
    return Cost(
        kernels.flops(),
        kept,
        saved.total,
        peak,
        gradient_bytes,
        optimizer_bytes,
        kernels.total(*step),
        kernels.moved(*step),
        kernels.total("optimizer"),
        kernels.moved("optimizer"),
    ), kernels


def run_step(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> None:
    """One training step."""
    loss().backward()
    optimizer.step()
    optimizer.zero_grad()
