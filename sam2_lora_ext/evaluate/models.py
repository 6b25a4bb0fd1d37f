"""Finds the model at a path (weights, an adapter with its base, or a run) and builds it as in production."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sam2.build_sam import build_sam2
from sam2.modeling.sam2_base import SAM2Base

from sam2_lora_ext.adapters.peft import CONFIG, OLD_WEIGHTS, WEIGHTS, Adapter
from sam2_lora_ext.adapters.sources import check_base, find_adapter, read_adapter, source_files
from sam2_lora_ext.adapters.weights import ADAPTER_KEYS, explain_mismatch, identify, read_weights
from sam2_lora_ext.deploy.stock import check_inputs
from sam2_lora_ext.lora.adapter_state import attach_adapter
from sam2_lora_ext.run.paths import find_run
from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.files import LARGEST_NOTE, read_json
from sam2_lora_ext.utils.folders import existing_folder

SUFFIXES = (".pt", ".safetensors", ".torch")


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate.

    Args:
        name: the model's name in tables.
        weights: full weights, or the base of the adapter.
        adapter: a folder, or a Trainer's checkpoint with adapters; None for full weights.
        config: a stock config's name; None identifies it from the weights.
        trained: number of trained parameters recorded by a run of full weights; an adapter's are counted instead.
        run: the run that produced the model, whose record has its training conditions; None if there is none.
    """

    name: str
    weights: Path
    adapter: Path | None = None
    config: str | None = None
    trained: int | None = None
    run: Path | None = None

    def inputs(self) -> list[Path]:
        """The files that are read to build the model."""
        return [self.weights, *([] if self.adapter is None else source_files(self.adapter))]


def candidates(texts: Sequence[str], base: Path | None = None, config: str | None = None) -> list[Candidate]:
    """The models at several paths, see `candidate`; the first full weights replace a base that is missing."""
    paths = [split_name(text)[1] for text in texts]
    spare = next((path for path in paths if path.is_file() and _is_whole(path)), None)
    return [candidate(text, base, config, spare) for text in texts]


def candidate(text: str, base: Path | None = None, config: str | None = None, spare: Path | None = None) -> Candidate:
    """The model of `path` or `name=path`: a weight file, an adapter folder, a run folder or a Trainer's checkpoint.

    Args:
        text: as given on the command line.
        base: the base of adapters; by default the file that the adapter was trained on, if it still exists.
        config: a stock config's name; by default identified from the weights.
        spare: used as the base if that file is missing.

    Raises:
        UserError: the path does not exist, or an adapter's base is unknown.
    """
    given, path = split_name(text)
    name = short_name(path) if given is None else given
    if not path.exists():
        raise UserError(f"there is no {path}: give a weight file, an adapter folder or a run folder")
    run = find_run(path)
    if path.is_dir() and (path / "weights").is_dir():
        files = [path / "weights" / f"{kind}.pt" for kind in ("best", "final")]
        if whole := [file for file in files if file.exists()]:
            return Candidate(name, whole[0], None, config, _trained(path), run)
    if path.is_file() and _is_whole(path):
        return Candidate(name, path, None, config, run=run)
    facts = read_adapter(path).metadata
    known = Path(facts["base_path"]) if facts.get("base_path") else None
    found = next((file for file in (base, known, spare) if file is not None and (file == base or file.exists())), None)
    if found is None or not found.exists():
        wanted = base or known or "not recorded"
        raise UserError(f"{path} is an adapter, but its base ({wanted}) is missing: give it with --checkpoint")
    return Candidate(name, found, find_adapter(path), config, run=run)


def build(wanted: Candidate, device: str = "cpu", image_size: int | None = None) -> tuple[SAM2Base, dict[str, Any]]:
    """Builds the model as `build_sam2` does by default, with an active adapter; also returns its description.

    Args:
        wanted: the model to build.
        device: such as cuda.
        image_size: side of the model's input in pixels, instead of the config's.

    Raises:
        UserError: the weights do not fit the config, or the adapter belongs to another base.
    """
    state = read_weights(wanted.weights)
    config = wanted.config or identify(state)
    if config is None:
        raise UserError(f"{wanted.weights} fits no stock SAM 2 config: name its config with --config")
    check_inputs(config)
    overrides = [] if image_size is None else [f"++model.image_size={image_size}"]
    model = build_sam2(config, None, device="cpu", hydra_overrides_extra=overrides)
    if sentence := explain_mismatch(state, model.state_dict()):
        raise UserError(f"{wanted.weights}: {sentence}")
    model.load_state_dict(state)
    trained, stored = wanted.trained, wanted.weights.stat().st_size
    if wanted.adapter is not None:
        adapter: Adapter = read_adapter(wanted.adapter, base=state)
        check_base(wanted.weights, state, adapter)
        attach_adapter(model, adapter)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        stored = _size(wanted.adapter)
    facts = {
        "name": wanted.name,
        "config": config,
        "image_size": model.image_size,
        "weights": str(wanted.weights),
        "adapter": None if wanted.adapter is None else str(wanted.adapter),
        "trained_parameters": trained,
        "file_bytes": stored,
        "device": device,
    }
    return model.to(torch.device(device)).eval(), facts


def check_device(device: str) -> None:
    """Raises a `UserError` for a device that torch does not support or the machine does not have."""
    try:
        kind = torch.device(device)
    except RuntimeError:
        raise UserError(f"--device must be cpu, cuda, cuda:1 and so on, or mps, got {device!r}") from None
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (kind.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not there.get(kind.type, False):
        raise UserError(f"--device {device} is missing: torch finds {torch.cuda.device_count()} CUDA devices; use cpu")


def split_name(text: str) -> tuple[str | None, Path]:
    """The name and path of `path` or `name=path`; an existing path may itself contain an equals sign."""
    name, given, rest = text.partition("=")
    return (name, Path(rest)) if given and not Path(text).exists() else (None, Path(text))


def short_name(path: Path) -> str:
    """A path's name in tables, such as r8, the name of the run, for `runs/r8/adapters/best`."""
    resolved = path.absolute()
    if resolved.parent.name in ("adapters", "weights", "checkpoints"):
        resolved = resolved.parent.parent
    return resolved.stem if resolved.suffix in SUFFIXES else resolved.name


def _is_whole(path: Path) -> bool:
    adapter = path.name in (CONFIG, WEIGHTS, OLD_WEIGHTS)
    return not adapter and not any(key.endswith(ADAPTER_KEYS) for key in read_weights(path))


def _trained(run: Path) -> int | None:
    try:
        return int(read_json(run / "lora.json", LARGEST_NOTE)["trained"])
    except (OSError, ValueError, LookupError, TypeError):
        return None  # weights without a record can be evaluated too


def _size(adapter: Path) -> int:
    folder = existing_folder(adapter)
    files = [folder / name for name in (WEIGHTS, OLD_WEIGHTS)] if folder.is_dir() else [adapter]
    return next(file.stat().st_size for file in files if file.exists())
