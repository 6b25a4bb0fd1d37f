"""Adapter sources: finds and reads the adapter that a path on a command line names, and checks its base."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sam2_lora_ext.adapters.class_binding import prompts_of_state
from sam2_lora_ext.adapters.folder import PARTS, TOKENS, is_adapter_folder
from sam2_lora_ext.adapters.peft import CONFIG, OLD_WEIGHTS, WEIGHTS, Adapter, load_adapter
from sam2_lora_ext.adapters.transformers_names import rename_adapter, speaks_transformers
from sam2_lora_ext.adapters.weights import ADAPTER_KEYS, identify, read_checkpoint_notes, read_weights, weights_id
from sam2_lora_ext.lora import LoRAConfig, adapter_from_state
from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.files import LARGEST_NOTE, read_json
from sam2_lora_ext.utils.folders import existing_folder

GIVE = "give a run folder, an adapter folder or a Trainer's checkpoint.pt"

log = logging.getLogger(__name__)


def find_adapter(path: str | Path) -> Path:
    """The adapter that a path names: an adapter folder or file, or `adapters/best`, else `adapters/final`, of a run.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    if not existing_folder(path).exists():
        raise UserError(f"there is no {path}: {GIVE}")
    if not existing_folder(path).is_dir() and not path.is_file():
        raise UserError(f"{path} is a pipe or a device, not a file: {GIVE}")
    if path.is_file() or any((existing_folder(path) / name).exists() for name in PARTS):
        return path
    for name in ("best", "final"):
        if is_adapter_folder(path / "adapters" / name):
            return path / "adapters" / name
    if (path / "weights").is_dir():
        raise UserError(
            f"{path} is a run that trained the whole model: there is nothing to merge, since its "
            "weights/best.pt and weights/final.pt are what build_sam2 loads"
        )
    others = (path / "adapters" / "latest", path / "checkpoints" / "checkpoint.pt")
    hint = " or ".join(str(other) for other in others if other.exists())
    raise UserError(
        f"{path} is neither an adapter folder (with {CONFIG}) nor a run with adapters/best or adapters/final"
        + (f": to use another adapter of it, give {hint}" if hint else ": was it trained up to a validation?")
    )


def read_adapter(path: str | Path, alpha: float | None = None, base: Mapping[str, Tensor] | None = None) -> Adapter:
    """Reads the adapter that `find_adapter` finds: a PEFT folder, or a checkpoint of the Trainer.

    An adapter that PEFT trained on transformers' `Sam2Model` is renamed to SAM 2's modules.

    A checkpoint of version 0.1.0 records neither alpha nor parts: they come from `lora.json` in its run's folder.

    Args:
        path: see `find_adapter`.
        alpha: for a checkpoint that does not record it; replaces that of `lora.json`.
        base: for a checkpoint of the whole model without `lora.json`, to find its trained parameters.

    Raises:
        UserError: there is no adapter, or it is damaged, of another kind, or lacks needed settings.
    """
    path = find_adapter(path)
    if existing_folder(path).is_dir() or path.name in PARTS:
        if alpha is not None:
            raise UserError(f"{path} records its alpha: --alpha is for checkpoints of the Trainer")
        adapter = load_adapter(path)
        theirs = speaks_transformers([*adapter.layers, *adapter.full])
        return rename_adapter(adapter, theirs=True) if theirs else adapter
    state, facts, where = read_weights(path), read_checkpoint_notes(path), path
    if facts and alpha is not None:
        raise UserError(f"{path} records its alpha: --alpha is for checkpoints that do not")
    if not facts and (notes := _notes(path)):
        where = notes[0]
        facts = _read_notes(where)
        log.warning("%s is of version 0.1.0, which did not record alpha, parts and base: %s is read", path, where)
    config = None
    try:
        if (facts or where != path) and facts["config"] is not None:
            config = LoRAConfig.of(facts["config"])
    except (UserError, LookupError) as error:
        raise UserError(f"{where} is damaged ({error}): it should be as LoRATrainer writes it") from error
    metadata = {key: facts[key] for key in ("base_id", "base_path", "model_config") if facts.get(key)}
    if not any(key.endswith(ADAPTER_KEYS) for key in state) and not (config and config.trainable):
        raise UserError(
            f"{path} holds no LoRA adapter: give the checkpoint of a LoRA run (a run that trained the whole model has "
            "files for build_sam2 in its folder weights)"
        )
    adapter = adapter_from_state(state, config, alpha, base=base, metadata=metadata)
    adapter.class_prompts = prompts_of_state(state, facts)
    return adapter


def source_files(path: str | Path) -> list[Path]:
    """The files that `read_adapter` reads for a path."""
    path = find_adapter(path)
    if path.is_file() and path.name not in PARTS:
        return [path, *_notes(path)]
    folder = existing_folder(path.parent if path.is_file() else path)
    weights = next((name for name in (WEIGHTS, OLD_WEIGHTS) if (folder / name).exists()), WEIGHTS)
    return [folder / CONFIG, folder / weights, *([folder / TOKENS] if (folder / TOKENS).exists() else [])]


def check_base(
    base_path: str | Path,
    base: Mapping[str, Tensor],
    adapter: Adapter,
    base_id: str | None = None,
) -> str | None:
    """Compares a base with the one that an adapter was trained on, by `weights_id`.

    Args:
        base_path: for the message.
        base: its weights.
        adapter: with the base's identity in its metadata, or without.
        base_id: of `base`, if already computed.

    Returns:
        A note, when the adapter does not record its base.

    Raises:
        UserError: the adapter was trained on another base; the message names both.
    """
    facts = adapter.metadata
    if not facts.get("base_id"):
        return "the adapter does not record which base it was trained on: only names and shapes could be checked"
    base_id = base_id or weights_id(base)
    if facts["base_id"] != base_id:
        raise UserError(
            f"the adapter was trained on {facts.get('base_path') or 'another file'} "
            f"({facts.get('model_config') or 'config unknown'}, sha256 {str(facts['base_id'])[:12]}), but the base is "
            f"{base_path} ({identify(base) or 'no stock SAM 2'}, sha256 {base_id[:12]}): give the right --base"
        )
    return None


def _notes(checkpoint: Path) -> list[Path]:
    """The `lora.json` of the run of a checkpoint that does not record its own settings."""
    if read_checkpoint_notes(checkpoint):
        return []
    found = [folder / "lora.json" for folder in (checkpoint.parent, checkpoint.parent.parent)]
    return [path for path in found if path.exists()][:1]


def _read_notes(file: Path) -> dict[str, Any]:
    try:
        facts = read_json(file, LARGEST_NOTE)
    except UserError as error:
        raise UserError(f"{file} is damaged ({error}): it should be as LoRATrainer writes it") from error
    if not isinstance(facts, dict):
        raise UserError(f"{file} is damaged (it holds a {type(facts).__name__}): it should be as LoRATrainer writes it")
    return facts
