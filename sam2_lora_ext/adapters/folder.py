"""An adapter folder as one unit: its files are replaced together, and a digest proves that they belong together.

The digest is in the entry `sam2_lora_ext` of the safetensors header, which PEFT's own adapters lack. It covers

    tensors              names, types, shapes and values, in the order of the names
    adapter_config.json  the fields of `BOUND`, which change the meaning of the tensors
    the header           the parts of fused layers, the identity of the base, the digest of class prompts
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.files import EXISTS
from sam2_lora_ext.utils.folders import existing_folder, refuse_inputs, replace_folder

CONFIG, WEIGHTS, OLD_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
TOKENS = "class_prompts.safetensors"  # only with class prompts, see `class_prompts`
PARTS = frozenset({CONFIG, WEIGHTS, OLD_WEIGHTS, TOKENS})
HEADER, FUSED, DIGEST = "sam2_lora_ext", "fused", "digest"
TOKENS_DIGEST = "class_prompts"  # the header's entry with the digest of the adapter's class prompts
BOUND = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save")

log = logging.getLogger(__name__)


def write_adapter_folder(folder: str | Path, write: Callable[[Path], Any], force: bool) -> None:
    """Replaces an adapter folder with a new one that `write` fills; see `utils.folders.replace_folder`."""
    replace_folder(folder, write, PARTS, force=force)


def refuse_adapter_folder(out: Path, inputs: Iterable[str | Path], force: bool) -> None:
    """Raises a `UserError` when an adapter may not be written to the folder `out`.

    Args:
        out: missing or an empty folder, or with `force` an adapter folder.
        inputs: files and folders that are read; `out` must not be, contain or be inside one of them.
        force: replace an adapter.
    """
    refuse_inputs(out, inputs)
    there = existing_folder(out.resolve())
    if not os.path.lexists(there) or there.is_dir() and not any(there.iterdir()):
        return
    if not force:
        raise UserError(EXISTS.format(out))
    if not is_adapter_folder(there):
        raise UserError(f"--force replaces an adapter, but {out} is not one: choose another folder")


def is_adapter_folder(folder: Path) -> bool:
    """Whether both files of an adapter exist; one alone is not an adapter."""
    folder = existing_folder(folder)
    return (folder / CONFIG).is_file() and any((folder / name).is_file() for name in (WEIGHTS, OLD_WEIGHTS))


def digest_of(tensors: Mapping[str, Tensor], config: Mapping[str, Any], header: Mapping[str, Any]) -> str:
    """The SHA-256 described above.

    Args:
        tensors: of the weight file, on the CPU.
        config: of adapter_config.json.
        header: of the safetensors file, with `fused` and the adapter's metadata.
    """
    facts = {**{name: config.get(name) for name in BOUND}, FUSED: header.get(FUSED), "base_id": header.get("base_id")}
    facts |= {TOKENS_DIGEST: header[TOKENS_DIGEST]} if TOKENS_DIGEST in header else {}
    digest = hashlib.sha256(json.dumps(facts).encode())
    for key in sorted(tensors):
        tensor = tensors[key].contiguous()
        digest.update(f"\n{key} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def check_digest(
    weights: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], header: Mapping[str, Any]
) -> None:
    """Checks the digest in this package's header; PEFT's adapters have no such header.

    Raises:
        UserError: the files of the folder do not belong together.
    """
    if not header:
        return
    if DIGEST not in header:
        log.warning(
            "%s is of version 0.1.0, which did not record which %s belongs to it: only ranks and shapes are compared",
            weights,
            CONFIG,
        )
    elif header[DIGEST] != digest_of(tensors, config, header):
        raise UserError(
            f"{weights} and the {CONFIG} in its folder do not belong together, or one of them was changed: "
            "copy the whole folder again, or export it again with tools/export_adapter.py"
        )
