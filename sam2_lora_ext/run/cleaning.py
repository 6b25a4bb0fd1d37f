"""Deletes the temporary files of a killed run at its next start, by their names and folders.

The temporary file or folder for `NAME` is `.NAME.<process>.tmp` in the same folder.
"""

import contextlib
import re
import shutil
from pathlib import Path

from sam2_lora_ext.adapters.folder import PARTS
from sam2_lora_ext.utils.folders import settle_folder

KINDS = ("best", "latest", "final")
CHECKPOINTS = r"checkpoint(\.previous|\.damaged|_\d+)?\.pt"
OURS = {  # glob of folders below the run's -> regular expression of the names that a run writes there
    ".": r"(run|lora|validations|training_summary(\.previous)?)\.json|run_config\.yaml|merged_best\.pt"
    r"|\.?config(_resolved)?\.yaml",
    "logs": r"metrics\.csv",
    "checkpoints": CHECKPOINTS,
    "weights": r"(best|final)\.pt",
    "adapters": "|".join(KINDS),
    "adapters/*": "|".join(map(re.escape, sorted(PARTS))),
    "sam2_*": r"(best|latest|final)_(lora|merged)_step.*\.torch",
}


def clean_up(run: Path, checkpoints: Path) -> None:
    """Deletes temporary files and completes interrupted replacements of adapters; the run must be locked.

    Args:
        run: the run's folder.
        checkpoints: the folder of its checkpoints, inside the run's folder or elsewhere.
    """
    for kind in KINDS:
        with contextlib.suppress(OSError):
            settle_folder(run / "adapters" / kind, PARTS)
    places = {(folder, names) for glob, names in OURS.items() for folder in ([run] if glob == "." else run.glob(glob))}
    for folder, names in places | {(checkpoints, CHECKPOINTS)}:
        pattern = re.compile(rf"\.({names})\.\d+\.tmp")
        for path in folder.iterdir() if folder.is_dir() else ():
            if pattern.fullmatch(path.name):
                _delete(path)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
