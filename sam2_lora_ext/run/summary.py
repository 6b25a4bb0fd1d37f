"""The content of `training_summary.json`: model, settings, duration and results of a training."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from sam2_lora_ext.run.history import History
from sam2_lora_ext.utils.versions import git_commit, versions


def launched_config(argv: Sequence[str]) -> str | None:
    """The training config in a launcher's command line (-c CONFIG); None if it has none."""
    for position, word in enumerate(argv):
        if word in ("-c", "--config") and position + 1 < len(argv):
            return argv[position + 1]
        if word.startswith("--config="):
            return word.removeprefix("--config=")
    return None


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
    """The summary as plain values; epochs are phases, `skipped_steps` counts float16 overflows."""
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
