"""Counts the work of a GPU in a block: kernels, their FLOPs and the bytes that they move; all repeat exactly.

A kernel here is an operation that torch dispatches inside the block and that computes or copies. Not counted: views;
allocations (`empty` and its kin, not `zeros`, which is filled); `_unsafe_view`, a view by another name;
`_local_scalar_dense`, which reads a value back and is a wait (see `benchmarks.waits`); the profiler's marks. One
operation counts as one kernel, although a GPU may launch more: two or three for a convolution or the backward pass of
attention, several for `cat` or `_foreach_...` over many tensors.

Bytes moved are those of an operation's inputs and outputs, each tensor at its own size, expanded ones at full size;
tensors written in place count as read and written. No cache is assumed between operations.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import addmm_flop, baddbmm_flop, flop_registry, sdpa_backward_flop, sdpa_flop

aten = torch.ops.aten
# in-place and CPU operations that torch's counter does not know, with its formulas for equivalent ones
UNKNOWN = {
    aten.addmm_: addmm_flop.__wrapped__,  # the counter wraps these itself
    aten.baddbmm_: baddbmm_flop.__wrapped__,
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop.__wrapped__,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop.__wrapped__,
}
FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten.addmm_: addmm_flop,
    aten.baddbmm_: baddbmm_flop,
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}
ALLOCATIONS = {
    "empty",
    "empty_like",
    "empty_strided",
    "empty_permuted",
    "new_empty",
    "new_empty_strided",
    "resize_",
    "set_",
}
NO_KERNEL = ALLOCATIONS | {"_unsafe_view", "_local_scalar_dense", "detach", "lift_fresh", "alias"}
NARROW = (torch.bfloat16, torch.float16)


class Kernel(NamedTuple):
    """One kernel of a step.

    Attributes:
        phase: the part of the step: "forward", "loss", "backward" or "optimizer".
        name: of the operation, without `aten.` and the overload.
        flops: of products, convolutions and attention; a multiply-add counts two; 0 of all others.
        moved: bytes of inputs and outputs.
        narrow: whether its result has two bytes a number, so that a product runs on tensor cores.
    """

    phase: str
    name: str
    flops: int
    moved: int
    narrow: bool


class Kernels(TorchDispatchMode):
    """`counts` holds how often each `Kernel` was dispatched inside the block; set `phase` to name the next part."""

    def __init__(self, phase: str = "forward"):
        super().__init__()
        self.phase = phase
        self.counts: Counter[Kernel] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        name = packet.__name__
        if not (func.is_view or name in NO_KERNEL or func.namespace in ("prim", "profiler")):
            outputs = tensors(result) or written(func, args)
            if outputs:  # otherwise it is a query, such as whether a tensor is pinned
                formula = FORMULAS.get(packet)
                flops = formula(*args, **(kwargs or {}), out_val=result) if formula else 0
                moved = sum(tensor.numel() * tensor.itemsize for tensor in (*outputs, *tensors((args, kwargs))))
                self.counts[Kernel(self.phase, name, int(flops), moved, outputs[0].dtype in NARROW)] += 1
        return result

    def total(self, *phases: str) -> int:
        """Kernels of these phases; without a name, of all phases."""
        return sum(count for kernel, count in self.counts.items() if not phases or kernel.phase in phases)

    def moved(self, *phases: str) -> int:
        """Bytes moved in these phases; without a name, in all phases."""
        return sum(
            count * kernel.moved for kernel, count in self.counts.items() if not phases or kernel.phase in phases
        )

    def flops(self) -> int:
        """FLOPs of all phases."""
        return sum(count * kernel.flops for kernel, count in self.counts.items())

    def by_operation(self) -> dict[str, Counter[str]]:
        """Kernels of each phase by the operation's name."""
        found: dict[str, Counter[str]] = {}
        for kernel, count in self.counts.items():
            found.setdefault(kernel.phase, Counter())[kernel.name] += count
        return found


def tensors(tree: Any) -> list[Tensor]:
    """The tensors in nested arguments or results."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def written(func: Any, args: tuple) -> list[Tensor]:
    """The tensors among the arguments that an operation writes to, such as `_foreach_add_`, which returns none."""
    formal = zip(func._schema.arguments, args)  # not strict: defaults are omitted
    return tensors(
        [value for argument, value in formal if argument.alias_info is not None and argument.alias_info.is_write]
    )


@contextmanager
def cuda_dropout() -> Iterator[None]:
    """Within the block, `F.dropout` and `nn.Dropout` are as on CUDA: one kernel and a mask of bools in forward and
    backward, for all methods.

    On a CPU torch draws a mask of the input's type, divides and multiplies: three kernels, and as many bytes as the
    input.
    """
    plain = torch.nn.functional.dropout

    def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if inplace or not training or p == 0:
            return plain(input, p, training, inplace)
        return torch.native_dropout(input, p, True)[0]

    with mock.patch.object(torch.nn.functional, "dropout", dropout):
        yield
