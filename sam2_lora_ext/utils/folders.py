"""Atomic folders: written under a temporary name, then renamed; recovers from a kill between the renames."""

import errno
import os
import shutil
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.files import EXISTS, REFUSED


def replace_folder(
    folder: str | Path, write: Callable[[Path], Any], parts: Collection[str], *, force: bool = True
) -> None:
    """Calls `write(temporary)` with a new empty folder next to `folder`, then replaces `folder` with it.

    Args:
        folder: the folder to write.
        write: fills the folder that is its argument.
        parts: names of the files and folders of this kind of folder, which are deleted with the old one; all others
            are moved to the new one.
        force: replace a folder that is not empty; otherwise that is a `UserError`, even for one that appears meanwhile.

    Raises:
        UserError: the folder is not empty and `force` is off, or the system refuses; then `folder` is unchanged.
    """
    folder = Path(folder).resolve()
    temporary, old = folder.with_name(f".{folder.name}.{os.getpid()}.tmp"), _old(folder)
    try:
        settle_folder(folder, parts)
        shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process with the same id
        temporary.mkdir(parents=True)
        write(temporary)
        if force and folder.exists():
            folder.rename(old)
        try:
            temporary.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        settle_folder(folder, parts)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR) and os.path.lexists(folder):
            raise UserError(EXISTS.format(folder)) from None
        raise UserError(REFUSED.format(folder, error.strerror or error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def existing_folder(folder: Path) -> Path:
    """The folder that has the content: `folder` itself, or the old one after a kill of `replace_folder`."""
    old = _old(folder)
    return old if old.is_dir() and not folder.exists() else folder


def settle_folder(folder: Path, parts: Collection[str]) -> None:
    """Completes a killed `replace_folder`: restores the old folder's name, or deletes it if the new one is complete."""
    old = _old(folder)
    if not old.is_dir():
        return
    if not folder.exists():
        old.rename(folder)
        return
    for entry in old.iterdir():
        if entry.name not in parts:
            entry.rename(folder / entry.name)
        elif entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    old.rmdir()


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def refuse_inputs(out: Path, inputs: Iterable[str | Path]) -> None:
    """Raises a `UserError` when `out` contains, is, or is inside one of the inputs; links are followed."""
    out = out.resolve()
    for source in inputs:
        real = Path(source).resolve()
        if out == real or out in real.parents or real in out.parents:
            how = "holds" if out in real.parents else "is" if out == real else "lies in"
            raise UserError(f"{out} {how} {source}, which is read; choose another folder for the result")
