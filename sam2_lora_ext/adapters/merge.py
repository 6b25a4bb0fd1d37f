"""Merges adapters into base weights from file to file, so that stock SAM 2 loads the result."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from sam2_lora_ext.adapters.class_prompts import KEY, ClassPrompts, as_entry, prompts_file, save_class_prompts
from sam2_lora_ext.adapters.combine import combine
from sam2_lora_ext.adapters.merge_state import merge_state_dict, require_fit
from sam2_lora_ext.adapters.peft import Adapter
from sam2_lora_ext.adapters.sources import check_base, find_adapter, read_adapter, source_files
from sam2_lora_ext.adapters.weights import identify, read_weights, weights_id, write_weights
from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.files import refuse_existing, refuse_input_files, sha256_of

HALVES = (torch.float16, torch.bfloat16)
AT_ONCE = 1 << 15  # float64 values of a weight; pieces above half a megabyte would be allocated anew each time


@dataclass
class Merged:
    """What a merge did, for messages, for the record beside the file and for `compare_merged`.

    Attributes:
        adapter: the adapter that was merged, or the combination of several.
        sources: for each adapter, the path that was found, its weight in the sum, and its metadata.
        changed: number of tensors that the adapter changes.
        tensors: number of all tensors.
        dtypes: of the written tensors.
        base_id: `weights_id` of the base.
        model: name of the stock config that the base looks like.
        sha256: of the written file.
        notes: sentences on what could not be checked or was left out.
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
        out: the file to write; it must not be one of the inputs.
        weights: one factor for each adapter, see `combine`; may be left out for a single one.
        file_format: "pt" for what `build_sam2` loads, or "safetensors"; by default the suffix of `out` decides.
        dtype: one of `names.DTYPES`; by default the base's, or float32 if that is a half precision.
        alpha: see `read_adapter`.
        force: replace an existing file.
        progress: show a bar on a terminal.

    Raises:
        UserError: a file is missing, damaged, of another model, or would be overwritten; then nothing is written.
    """
    base, out = Path(base), Path(out)
    refuse_existing(out, force)
    file_format = file_format or ("safetensors" if out.suffix == ".safetensors" else "pt")
    if (file_format == "safetensors") != (out.suffix == ".safetensors"):
        raise UserError(f"{out} would hold {file_format}, but readers go by the suffix: name it *.{file_format}")
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
    """Merges adapters into a base, and hands the result to `write(state, class_prompts, on_written)`.

    Args:
        base: see `merge_files`, also for the arguments that are not listed here.
        write: writes both, and calls `on_written` with the file, open for reading, as `write_weights` does.

    Raises:
        UserError: a file is missing, damaged or of another model; then `write` is not called.
    """
    found = [find_adapter(path) for path in adapters]
    state, hashes, left_out = read_weights(base), [], []
    with ThreadPoolExecutor(1) as other:  # it hashes while this thread merges, writes and waits for the disk
        base_id = other.submit(weights_id, state)
        read = [read_adapter(source, alpha, state) for source in found]
        try:
            for part in read:
                require_fit(state, part)
            adapter = combine(read, weights, state, list(map(str, adapters)))
            merged = merge_state_dict(state, adapter, getattr(torch, dtype) if dtype else None, progress)
        finally:  # also after an error: a wrong base explains any other mismatch
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
    """Writes merged weights and their class prompts: in a .pt as a separate entry, else in a file beside it.

    Args:
        out: the file to write.
        merged: its weights.
        file_format: see `write_weights`.
        prompts: None if there are none.
        force: replace existing files, and remove class prompts beside an earlier file.
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
