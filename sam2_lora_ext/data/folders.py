"""A data set's folder: whole or not there at all, and never written over what is read."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.files import EXISTS
from sam2_lora_ext.utils.folders import existing_folder, replace_folder

PARTS = frozenset(  # what a data set that this package wrote may hold
    {"train_images", "train.csv", "split.csv", "images", "annotations", "annotations.json", "meta.json", "train"}
)


def refuse_folder(out: Path, force: bool) -> None:
    """Raises a `UserError` when a data set may not be written to `out`; links are followed.

    Args:
        out: where nothing is, or with `force` an empty folder, or one that holds parts of a data set and nothing else.
        force: replace that folder.
    """
    out = existing_folder(out.resolve())
    if not os.path.lexists(out):
        return
    if not force:
        raise UserError(EXISTS.format(out))
    strangers = sorted(entry.name for entry in out.iterdir() if entry.name not in PARTS) if out.is_dir() else []
    if strangers or not out.is_dir():
        found = f"holds {strangers[0]!r}, which is none of its parts" if strangers else "is a file"
        raise UserError(f"--force replaces a data set, but {out} {found}; choose another folder")


def write_folder(out: str | Path, write: Callable[[Path], Any], force: bool = False) -> None:
    """Calls `write(temporary)` with a new folder beside `out`, then puts it in the place of `out`.

    A failure leaves `out` as it was: the old folder is moved aside, and deleted only when the new one stands.

    Args:
        out: the folder to make.
        write: fills the empty folder that it is given.
        force: replace a folder that holds a data set of this package, with all its images, or nothing.

    Raises:
        UserError: `out` exists and `force` is off, it holds something else, or the system refuses.
    """
    refuse_folder(Path(out), force)
    replace_folder(out, write, PARTS, force=force)
