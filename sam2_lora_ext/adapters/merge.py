"""Merges adapters into base weights for stock SAM 2: as state dicts, and from file to file."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from sam2_lora_ext.adapters.class_prompts import KEY, ClassPrompts, as_entry, prompts_file, save_class_prompts
from sam2_lora_ext.adapters.combine import combine
from sam2_lora_ext.adapters.peft import Adapter
from sam2_lora_ext.adapters.sources import check_base, find_adapter, read_adapter, source_files
from sam2_lora_ext.adapters.weights import ADAPTER_KEYS, identify, read_weights, weights_id, write_weights
from sam2_lora_ext.lora import LayerAdapter
from sam2_lora_ext.lora.layer import block_diagonal, delta_weight, merged_weight
from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.files import refuse_existing, refuse_input_files, sha256_of

HALVES = (torch.float16, torch.bfloat16)
AT_ONCE = 1 << 15  # float64 values of a weight; pieces of more than half a megabyte would be new pages each time


def merge_state_dict(
    base: Mapping[str, Tensor],
    adapter: Adapter,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The base's state dict with the adapter merged, see `LayerAdapter.merged_weight`; other tensors are `base`'s own.

    Sums are in float64 and cast once: to the base's dtype, or to float32 where that is a half precision.

    Args:
        base: keys and shapes of a SAM 2 without adapters; not changed.
        adapter: low-rank updates, and modules that replace the base's.
        dtype: for all floating-point tensors of the result, instead.

    Raises:
        UserError: the adapter has modules or shapes that the base lacks, or the result is not finite.
    """
    require_fit(base, adapter)
    return _merge(base, adapter, dtype)


def require_fit(base: Mapping[str, Tensor], adapter: Adapter) -> None:
    """Raises a `UserError` when the base has adapters, or the adapter's modules or shapes differ from the base's."""
    for key in base:
        if key.endswith(ADAPTER_KEYS):
            raise UserError(f"the base has adapters itself ({key}): give the weights that its training started from")
    if words := adapter.misfit(base):
        raise UserError(
            f"{words} in the base: the adapter belongs to another model than this base, which looks like "
            f"{identify(base) or 'no stock SAM 2'}"
        )


@dataclass
class Merged:
    """The result of a merge, for messages, for the record of the file and for `compare_merged`.

    Attributes:
        adapter: the merged adapter, or the combination of several.
        sources: of each adapter, the path that was found, its weight in the sum, and its metadata.
        changed: number of tensors that now differ from the base's, or may.
        tensors: number of all.
        dtypes: of the written tensors.
        base_id: `weights_id` of the base.
        model: name of the stock config that it looks like.
        sha256: of the written file.
        notes: sentences on what could not be checked or was omitted.
    """

    adapter: Adapter
    sources: list[tuple[Path, float, dict[str, Any]]]
    changed: int
    tensors: int
    dtypes: list[str]
    base_id: str
    model: str | None
    sha256: str
    notes: list[str]


OnWritten = Callable[[BinaryIO], Any]  # takes the written file, open for reading


def merge_files(
    base: str | Path,
    adapters: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    file_format: str | None = None,
    dtype: str | None = None,
    alpha: float | None = None,
    force: bool = False,
    progress: bool = False,
) -> Merged:
    """Merges adapters into a base weight file, and writes the result atomically.

    Args:
        base: the weights that the adapters were trained on.
        adapters: one or several, see `find_adapter`.
        out: the file to write, never one that is read.
        weights: one factor per adapter, see `combine`; optional for a single one.
        file_format: "pt", which `build_sam2` loads, or "safetensors"; by default from the suffix of `out`.
        dtype: one of `names.DTYPES`; by default the base's, or float32 where that is a half precision.
        alpha: see `read_adapter`.
        force: replace an existing file.
        progress: show a bar on a terminal.

    Raises:
        UserError: something is missing, damaged, of another model, or would be overwritten; then nothing is written.
    """
    base, out = Path(base), Path(out)
    refuse_existing(out, force)
    file_format = file_format or ("safetensors" if out.suffix == ".safetensors" else "pt")
    if (file_format == "safetensors") != (out.suffix == ".safetensors"):
        raise UserError(f"{out} would hold {file_format}, but a file is read by its suffix: name it *.{file_format}")
    given = [adapters] if isinstance(adapters, (str, Path)) else list(adapters)
    refuse_input_files(out, [base, *(file for path in given for file in source_files(find_adapter(path)))])

    def write(merged: Mapping[str, Tensor], prompts: ClassPrompts | None, on_written: OnWritten) -> None:
        write_merged(out, merged, file_format, prompts, force=force, on_written=on_written)

    return merge_to(base, given, write, weights=weights, dtype=dtype, alpha=alpha, progress=progress)


def merge_to(
    base: str | Path,
    adapters: Sequence[str | Path],
    write: Callable[[Mapping[str, Tensor], ClassPrompts | None, OnWritten], Any],
    *,
    weights: Sequence[float] | None = None,
    dtype: str | None = None,
    alpha: float | None = None,
    progress: bool = False,
) -> Merged:
    """Merges adapters into a base, and passes the result to `write(state, class_prompts, on_written)`.

    Args:
        base: see `merge_files`, as for arguments that are not listed here.
        write: writes both, and calls `on_written` with the file, open for reading, as `write_weights` does.

    Raises:
        UserError: something is missing, damaged or of another model; then `write` is not called.
    """
    found = [find_adapter(path) for path in adapters]
    state, hashes, left_out = read_weights(base), [], []
    with ThreadPoolExecutor(1) as other:  # one processor hashes while this one merges, writes and waits for the disk
        base_id = other.submit(weights_id, state)
        read = [read_adapter(source, alpha, state) for source in found]
        try:
            for part in read:
                require_fit(state, part)
            adapter = combine(read, weights, state, list(map(str, adapters)))
            merged = _merge(state, adapter, getattr(torch, dtype) if dtype else None, progress)
        finally:  # a wrong base explains any other mismatch
            notes = [check_base(base, state, part, base_id.result()) for part in read]
        prompts = adapter.class_prompts
        if prompts is None and any(part.class_prompts for part in read):
            left_out.append("class prompts are left out: they work only with the adapter that they were trained with")
        write(merged, prompts, lambda file: hashes.append(other.submit(sha256_of, file)))
    return Merged(
        adapter,
        sources=[(path, weight, part.metadata) for path, weight, part in zip(found, weights or [1.0], read)],
        changed=len(adapter.layers) + len(adapter.full),
        tensors=len(merged),
        dtypes=sorted({str(value.dtype).removeprefix("torch.") for value in merged.values()}),
        base_id=base_id.result(),
        model=identify(state),
        sha256=hashes[0].result(),
        notes=[note if len(adapters) == 1 else f"{path}: {note}" for path, note in zip(adapters, notes) if note]
        + left_out,
    )


def write_merged(
    out: Path,
    merged: Mapping[str, Tensor],
    file_format: str,
    prompts: ClassPrompts | None,
    *,
    force: bool = True,
    **more: Any,
) -> None:
    """Writes merged weights and their class prompts: in a .pt as a separate entry, else in a second file.

    Args:
        out: the file to write.
        merged: its weights.
        file_format: see `write_weights`.
        prompts: None where there are none.
        force: replace existing files, including the class prompts of an earlier file.
        more: see `write_weights`.
    """
    if prompts is not None:
        prompts = replace(prompts, digest=weights_id(merged))
    if file_format == "pt":
        entry = {} if prompts is None else {KEY: as_entry(prompts)}
        write_weights(out, merged, file_format, force=force, beside=entry, **more)
        return
    if prompts is not None:
        save_class_prompts(prompts, out, force=force)
    elif force:
        prompts_file(out).unlink(missing_ok=True)
    write_weights(out, merged, file_format, force=force, **more)


def _merge(
    base: Mapping[str, Tensor],
    adapter: Adapter,
    dtype: torch.dtype | None,
    progress: bool = False,
) -> dict[str, Tensor]:
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


def _sum(layer: LayerAdapter, weight: Tensor, target: torch.dtype) -> Tensor:
    """`layer.merged_weight(weight)` cast to `target`, a few rows at a time: no full matrix is in float64."""
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
    """One thread: on a busy machine, starting threads for each of many small sums takes ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _is_finite(tensor: Tensor) -> bool:
    # one NaN or infinity makes the sum so; only then is each value checked, since a sum may also overflow
    return math.isfinite(tensor.sum()) or bool(tensor.isfinite().all())


def _shown(items: Collection[tuple[str, Tensor]], wanted: bool) -> Iterable[tuple[str, Tensor]]:
    try:
        from tqdm import tqdm  # imported here, since merging must work without it
    except ImportError:
        return items
    return tqdm(items, desc="merging", unit="tensor", leave=False, disable=None if wanted else True)
