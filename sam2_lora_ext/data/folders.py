"""Writes a data set's folder atomically, and never overwrites the inputs."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.files import EXISTS
from sam2_lora_ext.utils.folders import existing_folder, replace_folder

PARTS = frozenset(  # files and folders of a data set written by this package
    {"train_images", "train.csv", "split.csv", "images", "annotations", "annotations.json", "meta.json", "train"}
)


def refuse_folder(out: Path, force: bool) -> None:
    """Raises a `UserError` when a data set may not be written to `out`; links are followed.

    Args:
        out: a new path, or with `force` an empty folder or one with nothing but parts of a data set.
        force: replace that folder.
    """
    out = existing_folder(out.resolve())
    if not os.path.lexists(out):
        return
    if not force:
        raise UserError(EXISTS.format(out))
    strangers = sorted(entry.name for entry in out.iterdir() if entry.name not in PARTS) if out.is_dir() else []
    if strangers or not out.is_dir():
        found = f"contains {strangers[0]!r}, which is not part of one" if strangers else "is a file"
        raise UserError(f"--force replaces a data set, but {out} {found}; choose another folder")


def write_folder(out: str | Path, write: Callable[[Path], Any], force: bool = False) -> None:
    """Calls `write(temporary)` with a new folder next to `out`, then renames it to `out`.

    A failure leaves `out` unchanged: the old folder is moved away, and deleted only after the new one is complete.

    Args:
        out: the folder to write.
        write: fills the empty folder that is its argument.
        force: replace an empty folder, or a data set of this package with all its images.

    Raises:
        UserError: `out` exists and `force` is off, it contains something else, or the system refuses.
    """
    refuse_folder(Path(out), force)
    replace_folder(out, write, PARTS, force=force)
