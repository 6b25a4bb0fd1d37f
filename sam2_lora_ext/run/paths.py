"""Finds the run that a path belongs to, its recorded training config and its working directory. Needs no torch."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from sam2_lora_ext.run.config import NAME, OLD_NAME, read_run_config

INSIDE = ("adapters", "checkpoints", "weights")  # folders of a run that a user may name instead of the run


def find_run(path: str | Path) -> Path | None:
    """The run of a path, which may be the run's folder or a file or folder in it (adapters/best, checkpoint.pt ...)."""
    path = Path(path)
    for folder in (path, *path.parents)[:4]:
        if any((folder / name).is_file() for name in (NAME, OLD_NAME)):
            inner = path.relative_to(folder).parts
            return folder if not inner or inner[0] in INSIDE or len(inner) <= 2 and path.is_file() else None
    return None


def trainer_of(run: Path) -> Mapping[str, Any]:
    """The `trainer` section of a run's record, see `read_run_config`; read again only when the record changes."""
    changed = max((run / name).stat().st_mtime_ns for name in (NAME, OLD_NAME) if (run / name).is_file())
    return _trainer(run.resolve(), changed)


@lru_cache
def _trainer(run: Path, changed: int) -> Mapping[str, Any]:
    return read_run_config(run)["trainer"]


def started_in(run: Path, trainer: Mapping[str, Any]) -> Path | None:
    """The working directory of a run's start, to which its paths are relative; None if it is not recorded."""
    given, place = Path(str(trainer.get("run_dir") or "/")), run.resolve()
    ours = not given.is_absolute() and place.parts[-len(given.parts) :] == given.parts
    return Path(*place.parts[: -len(given.parts)]) if ours else None
