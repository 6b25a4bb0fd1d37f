"""Writes a fitted decision into an existing file of class prompts, atomically."""

from dataclasses import replace
from pathlib import Path

import torch

from sam2_lora_ext.adapters.class_prompts import KEY, as_entry, load_class_prompts, prompts_file, save_class_prompts
from sam2_lora_ext.adapters.decision import Decision
from sam2_lora_ext.adapters.record import record_path
from sam2_lora_ext.adapters.sources import find_adapter
from sam2_lora_ext.adapters.weights import read_file
from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.files import read_json, sha256_of, write_atomic, write_json


def place_of(path: str | Path) -> Path:
    """The path with class prompts: merged weights or an adapter folder themselves, or a run's adapter.

    Raises:
        UserError: it does not exist or has no class prompts.
    """
    path = Path(path)
    if path.is_dir():
        path = find_adapter(path)
    if load_class_prompts(path) is None:
        raise UserError(f"{path} has no class prompts: train with a config that has them, and merge that adapter")
    return path


def write_decision(path: str | Path, decision: Decision) -> Path:
    """Replaces the decision of the class prompts at `path`, see `place_of`, and updates a merged file's record.

    Returns:
        The file that was written.

    Raises:
        UserError: there are no class prompts, or the file cannot be written.
    """
    path = place_of(path)
    prompts = replace(load_class_prompts(path), decision=decision)
    if prompts_file(path).is_file() and (path.is_dir() or path.suffix == ".safetensors"):
        save_class_prompts(prompts, path)
        return prompts_file(path)
    content = {**read_file(path), KEY: as_entry(prompts)}

    def save(temporary: Path) -> None:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # torch wraps the system's error in it
            raise OSError(str(error).splitlines()[0]) from error

    write_atomic(path, save)
    if record_path(path).is_file():
        record = read_json(record_path(path))
        if isinstance(record, dict) and isinstance(record.get("result"), dict):
            record["result"] |= {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
            write_json(record_path(path), record)
    return path
