"""Which model a user means by a path: weights, an adapter on its base, or a run; built as in production."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sam2.build_sam import build_sam2
from sam2.modeling.sam2_base import SAM2Base

from sam2_lora_ext.adapter import CONFIG, OLD_WEIGHTS, WEIGHTS, Adapter
from sam2_lora_ext.checkpoints import ADAPTER_KEYS, explain_mismatch, identify, read_weights
from sam2_lora_ext.errors import UserError
from sam2_lora_ext.lora.adapter import attach_adapter
from sam2_lora_ext.merge import check_base, read_adapter


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate.

    Args:
        name: in tables.
        weights: whole weights, or the base of the adapter.
        adapter: a folder, or a Trainer's checkpoint with adapters; None for whole weights.
        config: a stock config's name; None tells it from the weights.
    """

    name: str
    weights: Path
    adapter: Path | None = None
    config: str | None = None


def candidate(text: str, base: Path | None = None, config: str | None = None) -> Candidate:
    """The model behind `path` or `name=path`: a weight file, an adapter folder, a run folder or a Trainer's checkpoint.

    Args:
        text: as given on the command line.
        base: for adapters; by default the file that the adapter was trained on, if it is still there.
        config: a stock config's name; by default told from the weights.

    Raises:
        UserError: there is nothing, or an adapter's base is not known.
    """
    name, given, rest = text.partition("=")
    path = Path(rest if given else text)
    name = name if given else (path.name if path.suffix not in (".pt", ".safetensors", ".torch") else path.stem)
    if not path.exists():
        raise UserError(f"there is no {path}: give a weight file, an adapter folder or a run folder")
    if path.is_dir() and (path / "weights").is_dir():
        files = [path / "weights" / f"{kind}.pt" for kind in ("best", "final")]
        if whole := [file for file in files if file.exists()]:
            return Candidate(name, whole[0], None, config)
    if (
        path.is_file()
        and path.name not in (CONFIG, WEIGHTS, OLD_WEIGHTS)
        and not any(key.endswith(ADAPTER_KEYS) for key in read_weights(path))
    ):
        return Candidate(name, path, None, config)
    facts = read_adapter(path).metadata
    base = base or (Path(facts["base_path"]) if facts.get("base_path") else None)
    if base is None or not base.exists():
        raise UserError(
            f"{path} is an adapter, and its base ({base or 'which it does not name'}) is not there: give it with --checkpoint"
        )
    return Candidate(name, base, path, config)


def build(wanted: Candidate, device: str = "cpu") -> tuple[SAM2Base, dict[str, Any]]:
    """The model as `build_sam2` makes it by default, with a live adapter, and the facts about it.

    Raises:
        UserError: the weights are of another model than the config, or the adapter is of another base.
    """
    state = read_weights(wanted.weights)
    config = wanted.config or identify(state)
    if config is None:
        raise UserError(f"{wanted.weights} looks like no stock SAM 2: name its config with --config")
    model = build_sam2(config, None, device="cpu")
    if sentence := explain_mismatch(state, model.state_dict()):
        raise UserError(f"{wanted.weights}: {sentence}")
    model.load_state_dict(state)
    trained = 0
    if wanted.adapter is not None:
        adapter: Adapter = read_adapter(wanted.adapter, base=state)
        check_base(wanted.weights, state, adapter)
        attach_adapter(model, adapter)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    facts = {
        "name": wanted.name,
        "config": config,
        "weights": str(wanted.weights),
        "adapter": None if wanted.adapter is None else str(wanted.adapter),
        "adapter_parameters": trained,
        "device": device,
    }
    return model.to(torch.device(device)).eval(), facts
