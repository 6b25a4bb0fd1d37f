"""Weight files: reads them safely, writes them atomically, and identifies the SAM 2 that they belong to."""

import hashlib
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sam2_lora_ext.lora.class_tokens import TOKENS
from sam2_lora_ext.lora.variants import TENSORS
from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.files import write_atomic

# Ends of the keys that `LoRALinear`, its variants and `ClassTokens` add to a model's state dict.
ADAPTER_KEYS = (*sorted({f".{name}" for names in TENSORS.values() for name in names}), f".{TOKENS}.tokens")
NOTES = "sam2_lora_ext"  # a checkpoint's entry: `config` (of LoRA), `base_id`, `base_path`, `model_config`, `version`
HASH_CHUNK = 1 << 22  # values converted at a time
SIZES = {  # (width of the first stage, blocks, channels of the neck) -> config of SAM 2.0, config of SAM 2.1
    **{
        (width, blocks, 256): (f"configs/sam2/sam2_hiera_{size}.yaml", f"configs/sam2.1/sam2.1_hiera_{size}.yaml")
        for width, blocks, size in ((96, 12, "t"), (96, 16, "s"), (112, 24, "b+"), (144, 48, "l"))
    },
    (24, 8, 64): (None, "configs/sam2_nano.yaml"),
}
NEW_IN_2_1 = ("no_obj_embed_spatial", "obj_ptr_tpos_proj.weight")


def read_file(path: str | Path) -> object:
    """The content of a weight file: tensors and plain containers only, on the CPU, memory-mapped where possible.

    Raises:
        UserError: there is no such file, or it is empty, damaged, or would run code when it is loaded.
    """
    path = Path(path)
    if os.path.isdir(path):  # unlike Path.is_dir, no error for a name that is too long
        raise UserError(f"{path} is a folder: give the weight file in it")
    if not os.path.isfile(path):
        kind = "it is a pipe or a device" if os.path.exists(path) else "check the name"
        raise UserError(f"there is no file {str(path)[:500]}: {kind}")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty: copy or download it again")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # files of torch before 1.6 are not zip files and cannot be memory-mapped
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (OSError, MemoryError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or not a safetensors file ({error}): copy or download it again") from error
    except Exception as error:  # torch.load raises arbitrary exceptions for other bytes
        if "GLOBAL" in str(error) or "TorchScript" in str(error):
            raise UserError(
                f"{path} holds Python objects, which run code when they are loaded: only files of tensors "
                "are read, so save its state dict again"
            ) from error
        raise UserError(f"{path} is damaged or not a file of weights: copy or download it again") from error


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Reads a state dict: `{"model": {...}}` as SAM 2 and its Trainer save it, a bare one, or safetensors.

    Raises:
        UserError: see `read_file`, or the file contains something other than named tensors.
    """
    content = read_file(path)
    state = content.get("model", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping):
        raise UserError(f"{path} holds no state dict: it holds a {type(state).__name__}")
    if not state:
        raise UserError(f"{path} holds no weights: its state dict is empty")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise UserError(
                f"{path} holds no state dict: the key {str(key)!r} has a {type(value).__name__}, expected named tensors"
            )
        if value.layout is not torch.strided or value.is_quantized or value.is_complex():
            raise UserError(f"{path} holds {key} as a sparse, quantized or complex tensor, which no SAM 2 has")
    return dict(state)


def write_weights(
    path: str | Path,
    state: Mapping[str, Tensor],
    file_format: str = "pt",
    *,
    metadata: Mapping[str, str] | None = None,
    force: bool = True,
    on_written: Callable[[BinaryIO], Any] | None = None,
    beside: Mapping[str, Any] | None = None,
) -> None:
    """Writes a state dict atomically: as `{"model": state}`, which stock `build_sam2` loads, or as safetensors.

    Args:
        path: the file to write.
        state: tensors by key.
        file_format: one of `names.WEIGHT_FORMATS`.
        metadata: for the header of a safetensors file.
        force: replace an existing file.
        on_written: called with the file, open for reading, when it is complete but not yet flushed to the disk.
        beside: further entries of a .pt next to "model", which stock SAM 2 ignores.

    Raises:
        UserError: the file exists and `force` is off, or the system refuses, for example because the disk is full.
    """

    def write(temporary: Path) -> None:
        try:
            if file_format == "pt":
                torch.save({"model": dict(state), **(beside or {})}, temporary)
            else:
                contiguous = {key: tensor.contiguous() for key, tensor in state.items()}
                save_file(contiguous, temporary, metadata={"format": "pt", **(metadata or {})})
        except (RuntimeError, SafetensorError) as error:  # both libraries wrap the system's error in these
            raise OSError(str(error).splitlines()[0]) from error
        if on_written:
            on_written(open(temporary, "rb"))

    write_atomic(path, write, force=force)


def read_checkpoint_notes(path: str | Path) -> dict[str, Any]:
    """The notes of a checkpoint about itself, see `NOTES`; empty for checkpoints of other programs.

    Raises:
        UserError: see `read_file`, or the notes are damaged.
    """
    content = read_file(path)
    notes = content.get(NOTES, {}) if isinstance(content, Mapping) else {}
    if not isinstance(notes, dict) or notes and not isinstance(notes.get("config", 0), (dict, NoneType)):
        raise UserError(f"{path} is damaged: its entry {NOTES} is not what LoRATrainer writes")
    return notes


def identify(state: Mapping[str, Tensor]) -> str | None:
    """The name of the stock config with the architecture of a state dict; None when there is none."""
    position = state.get("image_encoder.trunk.pos_embed")
    neck = state.get("image_encoder.neck.convs.0.conv.weight")
    if position is None or neck is None or position.dim() != 4:
        return None
    blocks = {key.split(".")[3] for key in state if key.startswith("image_encoder.trunk.blocks.")}
    configs = SIZES.get((position.shape[1], len(blocks), neck.shape[0]))
    new = {key in state for key in NEW_IN_2_1}
    return configs[new.pop()] if configs and len(new) == 1 else None


def weights_id(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and values (as float32) in the order of the names, without adapters.

    So a half-precision file and its float32 copy have the same identity, and so does a model before and after adapters
    are added. Memory beyond the tensors is bounded.
    """
    digest = hashlib.sha256()
    for key in sorted(state):
        if key.endswith(ADAPTER_KEYS):
            continue
        tensor = state[key].detach()
        digest.update(f"{key} {list(tensor.shape)}\n".encode())
        for chunk in tensor.reshape(-1).split(HASH_CHUNK):
            digest.update(chunk.to("cpu", torch.float32).contiguous().numpy())
    return digest.hexdigest()


def explain_mismatch(state: Mapping[str, Tensor], model_state: Mapping[str, Tensor]) -> str | None:
    """One sentence about why weights do not fit a model and which configs the two look like; None when they fit.

    Args:
        state: the weights of a file.
        model_state: the model's own state dict; its adapters may be missing in `state`.
    """
    missing = [key for key in model_state if key not in state and not key.endswith(ADAPTER_KEYS)]
    unknown = [key for key in state if key not in model_state]
    shapes = [
        f"{key} is {list(state[key].shape)} instead of {list(model_state[key].shape)}"
        for key in model_state
        if key in state and state[key].shape != model_state[key].shape
    ]
    faults = [
        what + entries[0] + (f" and {len(entries) - 1} more" if len(entries) > 1 else "")
        for what, entries in (("they lack ", missing), ("the model lacks ", unknown), ("", shapes))
        if entries
    ]
    if not faults:
        return None
    found, wanted = identify(state), identify(model_state)
    likely = f"they look like {found or 'no stock SAM 2'}, the model like {wanted or 'no stock SAM 2'}"
    advice = "use config and weights of the same model" if found != wanted else "check that it is a whole SAM 2 model"
    return f"the weights do not fit the model: {likely} ({'; '.join(faults)}); {advice}"
