"""`training_summary.json`: what was trained, on what, how long, and what came out."""

import importlib.metadata
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import sam2_lora_ext
from sam2_lora_ext.run.history import History

PACKAGES = ("torch", "torchvision", "hydra-core", "numpy", "safetensors")


def versions() -> dict[str, str | None]:
    """The versions of what a result depends on; SAM 2 is called `sam2`, or `SAM-2` in Meta's checkout."""
    found: dict[str, str | None] = {"python": platform.python_version(), "sam2_lora_ext": sam2_lora_ext.__version__}
    for name in PACKAGES:
        found[name] = _version(name)
    found["sam2"] = _version("sam2") or _version("SAM-2")
    found["cuda"] = torch.version.cuda if torch.cuda.is_available() else None
    return found


def launched_config(argv: Sequence[str]) -> str | None:
    """The training config that a launcher's command line names (-c CONFIG); None where there was no such command."""
    for place, word in enumerate(argv):
        if word in ("-c", "--config") and place + 1 < len(argv):
            return argv[place + 1]
        if word.startswith("--config="):
            return word.removeprefix("--config=")
    return None


def git_commit() -> str | None:
    """The commit of the checkout that this package runs from, with "-dirty" when it was changed; None outside one."""
    folder = Path(__file__).resolve().parent
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def summarize(
    *,
    name: str,
    model_config: str | None,
    lora: Mapping[str, Any] | None,
    learning_rate: float,
    seed: int,
    world_size: int,
    history: History,
    steps: int,
    planned_epochs: int,
    epochs: int,
    stop_reason: str | None,
    parameters: Mapping[str, int],
    wall_seconds: float,
    base_id: str | None,
    base_path: str | None,
    skipped_steps: int,
) -> dict[str, Any]:
    """The summary as plain values; epochs are phases, `skipped_steps` those of float16 overflows."""
    return {
        "name": name,
        "config": launched_config(sys.argv),
        "model_config": model_config,
        "base_id": base_id,
        "base_path": base_path,
        "lora": dict(lora) if lora is not None else None,
        "learning_rate": learning_rate,
        "seed": seed,
        "world_size": world_size,
        "steps": steps,
        "phases": epochs,
        "phases_planned": planned_epochs,
        "stopped_early": stop_reason is not None,
        "stop_reason": stop_reason,
        "skipped_steps": skipped_steps,
        "monitor": history.monitor,
        "best": history.best,
        "last": history.entries[-1] if history.entries else None,
        "parameters": dict(parameters),
        "wall_seconds": round(wall_seconds, 1),
        "versions": versions(),
        "git_commit": git_commit(),
    }


def peak_rate(optim: Any) -> float:
    """The highest learning rate of the schedule of the first parameter group of SAM 2's `Optimizer`."""
    schedule = (optim.schedulers or [{}])[0].get("lr")
    return max(schedule(w / 200) for w in range(200)) if schedule else optim.optimizer.param_groups[0]["lr"]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
