"""Works an adapter into base weights, so that stock SAM 2 loads the result: as state dicts, and from file to file."""

import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from sam2_lora_ext.adapter import CONFIG, OLD_WEIGHTS, WEIGHTS, Adapter, load_adapter
from sam2_lora_ext.checkpoints import ADAPTER_KEYS, identify, read_weights, weights_id, write_weights
from sam2_lora_ext.errors import UserError
from sam2_lora_ext.files import refuse_existing
from sam2_lora_ext.lora import LoRAConfig, adapter_from_state

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
HALVES = (torch.float16, torch.bfloat16)
Item = TypeVar("Item")


def merge_state_dict(
    base: Mapping[str, Tensor], adapter: Adapter, dtype: torch.dtype | None = None, *, progress: bool = False,
) -> dict[str, Tensor]:
    """The base's state dict with the adapter worked in, see `LayerAdapter.merged_weight`; what stays is `base`'s own.

    Sums are in float64 and cast once: to the base's dtype, or to float32 where that is a half precision.

    Args:
        base: keys and shapes of a SAM 2 without adapters; not changed.
        adapter: low-rank updates, and modules that replace the base's.
        dtype: for all floating-point tensors of the result, instead.
        progress: show a bar on a terminal.

    Raises:
        UserError: the adapter has modules or shapes that the base has not, or the result is not finite.
    """
    for key in base:
        if key.endswith(ADAPTER_KEYS):
            raise UserError(f"the base has adapters itself ({key}): give the weights that its training began with")
    if words := adapter.misfit(base):
        raise UserError(f"{words} in the base: the adapter is of another model than this base, which looks like "
                        f"{identify(base) or 'no stock SAM 2'}")
    merged = {}
    for key, value in _shown(base.items(), "merging", progress):
        layer = adapter.layers.get(key.removesuffix(".weight")) if key.endswith(".weight") else None
        target = value.dtype
        if value.is_floating_point():
            target = dtype or (torch.float32 if value.dtype in HALVES else value.dtype)
        total = layer.merged_weight(value) if layer else adapter.full.get(key, value)
        merged[key] = total.to(target)
        if not _is_finite(merged[key]):
            cause = f"its values are too large for {target}" if _is_finite(total) else "its base holds NaN or infinity"
            raise UserError(f"{key} would not be finite after the merge: {cause}")
    return merged


def find_adapter(path: str | Path) -> Path:
    """The adapter that a path means: its own folder or file, or of a run folder `adapters/best`, else `adapters/final`.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"there is no {path}: give a run folder, an adapter folder or a Trainer's checkpoint.pt")
    if path.is_file() or any((path / name).exists() for name in (CONFIG, WEIGHTS, OLD_WEIGHTS)):
        return path
    for name in ("best", "final"):
        if (path / "adapters" / name / CONFIG).exists():
            return path / "adapters" / name
    if (path / "weights").is_dir():
        raise UserError(f"{path} is a run that trained the whole model: there is nothing to merge, for its "
                        "weights/best.pt and weights/final.pt are what build_sam2 loads")
    others = (path / "adapters" / "latest", path / "checkpoints" / "checkpoint.pt")
    hint = " or ".join(str(other) for other in others if other.exists())
    raise UserError(f"{path} is no adapter folder (no {CONFIG}), and no run with adapters/best or adapters/final"
                    + (f": to use what is there, give {hint}" if hint else ": was it trained up to a validation?"))


def read_adapter(path: str | Path, alpha: float | None = None, base: Mapping[str, Tensor] | None = None) -> Adapter:
    """The adapter that `find_adapter` finds: a PEFT folder, or what a Trainer's checkpoint holds of one.

    A checkpoint knows neither alpha nor parts: `lora.json`, which `LoRATrainer` writes into the run folder, does.

    Args:
        path: see `find_adapter`.
        alpha: for a checkpoint whose run has no `lora.json`, or instead of the one there.
        base: for a checkpoint of the whole model whose run has no `lora.json`: to tell what of it was trained.

    Raises:
        UserError: there is no adapter, or it is damaged, of another kind, or not known well enough.
    """
    path = find_adapter(path)
    if path.is_dir() or path.name in (CONFIG, WEIGHTS, OLD_WEIGHTS):
        if alpha is not None:
            raise UserError(f"{path} says itself what its alpha is: --alpha is for checkpoints of the Trainer")
        return load_adapter(path)
    state = read_weights(path)
    config, metadata = None, {}
    notes = [folder / "lora.json" for folder in (path.parent, path.parent.parent) if (folder / "lora.json").exists()]
    if notes:
        try:
            facts = json.loads(notes[0].read_text(encoding="utf-8"))
            if facts["config"] is not None:
                config = LoRAConfig.of(facts["config"])
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise UserError(f"{notes[0]} is damaged ({error}): it should be as LoRATrainer writes it") from error
        metadata = {key: facts[key] for key in ("base_id", "base_path", "model_config") if facts.get(key)}
    if not any(key.endswith(ADAPTER_KEYS) for key in state) and not (config and config.trainable):
        raise UserError(f"{path} holds no LoRA adapter: give the checkpoint of a LoRA run (one that trained the whole "
                        "model leaves what build_sam2 loads in its folder weights)")
    return adapter_from_state(state, config, alpha, base=base, metadata=metadata)


def check_base(base_path: str | Path, base: Mapping[str, Tensor], adapter: Adapter) -> str | None:
    """Compares a base with the one that an adapter was trained on, by `weights_id`.

    Returns:
        A note, when the adapter does not say which base that was.

    Raises:
        UserError: it was another one; the sentence names both.
    """
    facts = adapter.metadata
    if not facts.get("base_id"):
        return "the adapter does not say which base it was trained on: only names and shapes could be checked"
    base_id = weights_id(base)
    if facts["base_id"] != base_id:
        raise UserError(
            f"the adapter was trained on {facts.get('base_path') or 'another file'} "
            f"({facts.get('model_config') or 'config unknown'}, sha256 {str(facts['base_id'])[:12]}), but the base is "
            f"{base_path} ({identify(base) or 'no stock SAM 2'}, sha256 {base_id[:12]}): give the right --base")
    return None


@dataclass
class Merged:
    """What a merge did, for messages and for `compare_merged`.

    Attributes:
        adapter: what was merged, with its metadata.
        note: what could not be checked, if anything.
        changed: number of tensors that now differ from the base's, or may.
        tensors: number of all.
        dtypes: of the written tensors.
    """

    adapter: Adapter
    note: str | None
    changed: int
    tensors: int
    dtypes: list[str]


def merge_files(
    base: str | Path, adapter: str | Path, out: str | Path, *, file_format: str | None = None, dtype: str | None = None,
    alpha: float | None = None, force: bool = False, progress: bool = False,
) -> Merged:
    """Merges an adapter into a base weight file, and writes the result atomically.

    Args:
        base: the weights that the adapter was trained on.
        adapter: see `find_adapter`.
        out: the file to make, never the base.
        file_format: "pt" for what `build_sam2` loads, or "safetensors"; by default what the name of `out` says.
        dtype: one of `DTYPES`; by default the base's, or float32 where that is a half precision.
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
    if out.is_dir() or out.exists() and base.exists() and out.samefile(base):
        raise UserError(f"--out {out} is {'a folder' if out.is_dir() else 'the base itself'}: give another file name")
    weights = read_weights(base)
    delta = read_adapter(adapter, alpha, weights)
    note = check_base(base, weights, delta)
    state = merge_state_dict(weights, delta, DTYPES[dtype] if dtype else None, progress=progress)
    write_weights(out, state, file_format, force=force)
    dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in state.values()})
    return Merged(delta, note, len(delta.layers) + len(delta.full), len(state), dtypes)


def _is_finite(tensor: Tensor) -> bool:
    # one NaN or infinity makes the sum so; only then is each value looked at, for a sum may just be too large
    return math.isfinite(tensor.sum()) or bool(tensor.isfinite().all())


def _shown(items: Collection[Item], what: str, wanted: bool) -> Iterable[Item]:
    try:
        from tqdm import tqdm  # here, for merging must work without it
    except ImportError:
        return items
    return tqdm(items, desc=what, unit="tensor", leave=False, disable=None if wanted else True)
