"""Merges an adapter into a state dict of base weights; `merge.py` does so from file to file."""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from sam2_lora_ext.adapters.weights import ADAPTER_KEYS, identify
from sam2_lora_ext.lora import Adapter, LayerAdapter
from sam2_lora_ext.lora.layer import block_diagonal, delta_weight, merged_weight
from sam2_lora_ext.utils.errors import UserError

HALVES = (torch.float16, torch.bfloat16)
AT_ONCE = 1 << 15  # float64 values of a weight; pieces above half a megabyte would be allocated anew each time


def merge_state_dict(
    base: Mapping[str, Tensor],
    adapter: Adapter,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> dict[str, Tensor]:
    """The base's state dict with the adapter merged in, see `LayerAdapter.merged_weight`; other tensors are `base`'s.

    Sums are in float64 and cast once: to the base's dtype, or to float32 if that is a half precision.

    Args:
        base: keys and shapes of a SAM 2 without adapters; not changed.
        adapter: low-rank updates, and modules that replace the base's.
        dtype: of all floating-point tensors of the result, instead.
        progress: show a bar on a terminal.

    Raises:
        UserError: the adapter has modules or shapes that the base lacks, or the result is not finite.
    """
    require_fit(base, adapter)
    merged = {}
    with one_thread():
        for key, value in _shown(base.items(), progress):
            layer = adapter.layers.get(key.removesuffix(".weight")) if key.endswith(".weight") else None
            target = value.dtype
            if value.is_floating_point():
                target = dtype or (torch.float32 if value.dtype in HALVES else value.dtype)
            merged[key] = _sum(layer, value, target) if layer else adapter.full.get(key, value).to(target)
            if not _is_finite(merged[key]):
                large = _is_finite(value)
                cause = f"its values are too large for {target}" if large else "its base holds NaN or infinity"
                raise UserError(f"{key} would not be finite after the merge: {cause}")
    return merged


def require_fit(base: Mapping[str, Tensor], adapter: Adapter) -> None:
    """Raises a `UserError` when the base itself has adapters, or the adapter's modules or shapes do not fit it."""
    for key in base:
        if key.endswith(ADAPTER_KEYS):
            raise UserError(f"the base itself has adapters ({key}): give the weights that its training started from")
    if words := adapter.misfit(base):
        raise UserError(
            f"{words} in the base: the adapter belongs to another model than this base, which looks like "
            f"{identify(base) or 'no stock SAM 2'}"
        )


def _sum(layer: LayerAdapter, weight: Tensor, target: torch.dtype) -> Tensor:
    """`layer.merged_weight(weight)` cast to `target`, some rows at a time, so that no whole matrix is in float64."""
    a, b = layer.lora_a.double(), block_diagonal(layer.lora_b.double(), layer.parts)
    result = torch.empty_like(weight, dtype=target)
    rows = max(1, AT_ONCE // weight.shape[1])
    for begin in range(0, len(weight), rows):
        part = slice(begin, begin + rows)
        magnitude = None if layer.magnitude is None else layer.magnitude[part].double()
        result[part] = merged_weight(weight[part].double(), delta_weight(a, b[part], layer.scaling), magnitude)
    return result


@contextmanager
def one_thread() -> Iterator[None]:
    """Limits torch to one thread: on two busy cores, starting threads for many small sums takes ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _is_finite(tensor: Tensor) -> bool:
    # a NaN or infinity makes the sum non-finite, but so can large finite values: only then check each value
    return math.isfinite(tensor.sum()) or bool(tensor.isfinite().all())


def _shown(items: Collection[tuple[str, Tensor]], wanted: bool) -> Iterable[tuple[str, Tensor]]:
    try:
        from tqdm import tqdm  # merging must work without it
    except ImportError:
        return items
    return tqdm(items, desc="merging", unit="tensor", leave=False, disable=None if wanted else True)
