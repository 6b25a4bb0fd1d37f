"""Adapters on disk, in PEFT's format. Needs torch and safetensors only.

A folder holds `adapter_config.json` (PEFT's `LoraConfig`) and `adapter_model.safetensors` with the keys

    base_model.model.<module>.lora_A.weight (r, in)   base_model.model.<module>.lora_B.weight (out, r)
    base_model.model.<module>.lora_magnitude_vector   (out), with DoRA
    base_model.model.<module>.<parameter>             of a module trained in full (PEFT's `modules_to_save`)

PEFT has no parts of a fused layer: n adapted parts of rank r are written as one update of rank n·r whose B is
block-diagonal, which computes the same. The header of the safetensors file has, beside `format`, one entry
`sam2_lora_ext`: JSON of `Adapter.metadata`, under `fused` the parts and the alpha of such layers, and under `digest`
a hash that binds the two files to each other (`adapters.folder`). Class prompts are in a separate file beside them,
which PEFT ignores (`adapters.class_prompts`).
"""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sam2_lora_ext.adapters.class_binding import prompts_in_folder, tokens_digest
from sam2_lora_ext.adapters.class_prompts import save_class_prompts
from sam2_lora_ext.adapters.folder import (
    CONFIG,
    DIGEST,
    FUSED,
    HEADER,
    OLD_WEIGHTS,
    PARTS,
    TOKENS,
    TOKENS_DIGEST,
    WEIGHTS,
    check_digest,
    digest_of,
    write_adapter_folder,
)
from sam2_lora_ext.adapters.name_patterns import NamePatterns
from sam2_lora_ext.adapters.peft_config import read_config
from sam2_lora_ext.adapters.weights import read_weights, write_weights
from sam2_lora_ext.lora import Adapter, LayerAdapter, apply_adapter, attach_adapter, lora_scaling
from sam2_lora_ext.lora.inject import above, outermost
from sam2_lora_ext.lora.layer import PLAIN, block_diagonal
from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.files import parse_json, write_json
from sam2_lora_ext.utils.folders import existing_folder

__all__ = ["Adapter", "LayerAdapter", "apply_adapter", "attach_adapter", "load_adapter", "save_adapter"]

PREFIX = "base_model.model."
A, B, MAGNITUDE = "A.weight", "B.weight", "magnitude_vector"
READS = 3
KEYS = {A: 2, B: 2, MAGNITUDE: 1}  # ends of a layer's keys after `lora_`, and their numbers of dimensions


def save_adapter(adapter: Adapter, folder: str | Path, *, force: bool = True) -> None:
    """Writes an adapter folder that PEFT and `load_adapter` read, as one unit.

    Args:
        adapter: what to write.
        folder: created or replaced; files in it that are not an adapter's are kept.
        force: replace a folder that is not empty.

    Raises:
        UserError: the folder is not empty and `force` is off, or the system refuses.
    """
    rslora = any(layer.rslora for layer in adapter.layers.values())
    tensors, ranks, alphas, fused = {}, {}, {}, {}
    for name, layer in adapter.layers.items():
        adapted, alpha = sum(layer.parts), layer.alpha_for(rslora)
        tensors[f"{PREFIX}{name}.lora_{A}"] = layer.lora_a
        tensors[f"{PREFIX}{name}.lora_{B}"] = block_diagonal(layer.lora_b, layer.parts)
        if layer.magnitude is not None:
            tensors[f"{PREFIX}{name}.lora_{MAGNITUDE}"] = layer.magnitude
        ranks[name] = adapted * layer.rank
        alphas[name] = alpha * (math.sqrt(adapted) if rslora else adapted)  # the same scaling at the larger rank
        if layer.parts != PLAIN:
            fused[name] = {"parts": layer.parts, "alpha": alpha}
    rank, alpha = next(iter(ranks.values()), 8), next(iter(alphas.values()), 8)
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_dora": adapter.is_dora,
        "target_modules": list(adapter.layers),
        "modules_to_save": adapter.full_modules or None,
        "rank_pattern": {re.escape(name): value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {re.escape(name): value for name, value in alphas.items() if value != alpha},
    }
    tensors |= {PREFIX + key: value for key, value in adapter.full.items()}
    header, prompts = {**adapter.metadata, FUSED: fused}, adapter.class_prompts
    if prompts is not None:
        header[TOKENS_DIGEST] = tokens_digest(prompts)
    digest = digest_of(tensors, config, header)
    metadata = {HEADER: json.dumps({**header, DIGEST: digest}, allow_nan=False)}

    def write(temporary: Path) -> None:
        write_json(temporary / CONFIG, config)
        write_weights(temporary / WEIGHTS, tensors, "safetensors", metadata=metadata)
        if prompts is not None:
            save_class_prompts(replace(prompts, digest=digest), temporary / TOKENS)

    write_adapter_folder(folder, write, force)


def load_adapter(path: str | Path) -> Adapter:
    """Reads an adapter folder of this package or of PEFT; `path` is the folder or its weight file.

    Layers and modules are taken from the tensors' names, since PEFT may shorten the lists in its config. A folder that
    is replaced while it is read is read again.

    Raises:
        UserError: a file is missing or damaged, the adapter is not LoRA or DoRA on linear layers, its tensors do not
            fit its config, or its files do not belong together.
    """
    path = Path(path)
    folder = path.parent if path.name in PARTS or path.is_file() else path
    for _ in range(READS):
        before = _identity(folder)
        try:
            return _read_folder(existing_folder(folder))
        except UserError:
            if before is not None and _identity(folder) == before:
                raise
    return _read_folder(existing_folder(folder))


def _identity(folder: Path) -> tuple[int, int] | None:
    """Inode and time of change, which differ after `replace_folder`; the inode number alone may be reused."""
    try:
        found = folder.stat()
        return found.st_ino, found.st_ctime_ns
    except OSError:
        return None


def _read_folder(folder: Path) -> Adapter:
    config = read_config(folder / CONFIG)
    weights = next((folder / name for name in (WEIGHTS, OLD_WEIGHTS) if (folder / name).exists()), folder / WEIGHTS)
    tensors, header = read_weights(weights), _read_header(weights)
    fused = header.get(FUSED, {})
    found: dict[str, dict[str, Tensor]] = {}
    full = {}
    for key, tensor in tensors.items():
        name, matched, kind = key.removeprefix(PREFIX).rpartition(".lora_")
        if not key.startswith(PREFIX):
            raise UserError(f"{weights}: {key!r} does not begin with {PREFIX!r}, as PEFT's adapters of a model do")
        if not matched:
            full[key.removeprefix(PREFIX)] = tensor
        elif KEYS.get(kind) != tensor.dim():
            raise UserError(f"{weights}: {key!r} is not the A or B of a linear layer: only LoRA and DoRA can be used")
        elif kind == MAGNITUDE and not config.get("use_dora"):
            raise UserError(f"{weights}: {key!r} is DoRA's, but its config does not set use_dora")
        else:
            found.setdefault(name, {})[kind] = tensor
    for name, entries in found.items():
        for kind in KEYS if config.get("use_dora") else (A, B):
            if kind not in entries:
                present, missing = (f"lora_{word.removesuffix('.weight')}" for word in (next(iter(entries)), kind))
                raise UserError(f"{weights}: {name} has {present} but no {missing}: the file is incomplete")
    ranks, alphas = (NamePatterns(config.get(f"{key}_pattern"), str(folder / CONFIG)) for key in ("rank", "alpha"))
    layers = {
        name: _layer(
            name,
            entries,
            config,
            fused.get(name),
            ranks.value(name, config.get("r")),
            alphas.value(name, config.get("lora_alpha")),
        )
        for name, entries in found.items()
    }
    saved = config.get("modules_to_save") or []
    full_modules = []
    for key in full:
        modules = [name for name in above(key) if any(f".{name}".endswith(f".{end}") for end in saved)]
        if not modules:
            raise UserError(f"{weights}: {key!r} is neither LoRA nor in a module of the config's modules_to_save")
        full_modules.append(modules[-1])
    full_modules = outermost(list(dict.fromkeys(full_modules)))
    metadata = {key: value for key, value in header.items() if key not in (FUSED, DIGEST, TOKENS_DIGEST)}
    prompts = prompts_in_folder(folder, header.get(TOKENS_DIGEST))
    adapter = Adapter(layers, full, full_modules, config.get("lora_dropout") or 0.0, metadata, prompts)
    check_digest(weights, tensors, config, header)  # last, since it cannot tell what is wrong
    return adapter


def _read_header(weights: Path) -> dict[str, Any]:
    if weights.suffix != ".safetensors":
        return {}
    try:
        with safe_open(weights, "pt") as file:
            text = (file.metadata() or {}).get(HEADER, "{}")
    except (OSError, RuntimeError, SafetensorError) as error:  # replaced since its tensors were read
        raise UserError(f"cannot read {weights}: {error}") from error
    metadata = parse_json(text, f"{weights} is damaged: its header entry {HEADER}")
    if not isinstance(metadata, dict) or not isinstance(metadata.get(FUSED, {}), dict):
        raise UserError(f"{weights} is damaged: its header entry {HEADER} is not what this package writes")
    return metadata


def _layer(
    name: str, tensors: dict[str, Tensor], config: dict[str, Any], fused: dict[str, Any] | None, rank: Any, alpha: Any
) -> LayerAdapter:
    """One layer of a PEFT adapter; `fused` lists the parts of its B that are not zero, see `save_adapter`."""
    a, b = tensors[A], tensors[B]
    rslora = bool(config.get("use_rslora"))
    if rank != a.shape[0] or a.shape[0] != b.shape[1] or not isinstance(alpha, (int, float)):
        raise UserError(
            f"the adapter of {name} has A {list(a.shape)} and B {list(b.shape)}, its config has rank "
            f"{rank} and alpha {alpha}: they do not belong together"
        )
    if not fused:
        return LayerAdapter(a, b, alpha, rslora, magnitude=tensors.get(MAGNITUDE))
    try:
        parts, part_alpha = tuple(map(bool, fused["parts"])), float(fused["alpha"])
        step_out, step_in = b.shape[0] // len(parts), rank // sum(parts)
        rows = [index for index, adapted in enumerate(parts) if adapted]
        blocks = [
            b[row * step_out : (row + 1) * step_out, column * step_in : (column + 1) * step_in]
            for column, row in enumerate(rows)
        ]
        layer = LayerAdapter(a, torch.cat(blocks), part_alpha, rslora, parts)
        fits = torch.equal(block_diagonal(layer.lora_b, parts), b)
        fits = fits and math.isclose(layer.scaling, lora_scaling(rank, alpha, rslora))
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError):
        fits = False
    if not fits:
        raise UserError(f"the adapter of {name} is damaged: its header does not fit its tensors and its config")
    return layer
