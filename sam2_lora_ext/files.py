"""Files and folders that are either whole or absent: written beside, flushed to the disk, then renamed over.

A folder cannot be renamed over another that is not empty: `replace_folder` first renames `best` to `.best.old`. A kill
between its two renames leaves the old folder under that name: `existing_folder` reads it there, and `settle_folder`,
which the next writer calls, gives it its name again.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, BinaryIO

from sam2_lora_ext.errors import UserError

EXISTS = "{} exists already: choose another name, or give --force to replace it"
REFUSED = "cannot write {}: {}; check the folder, its rights and the free disk"


def refuse_existing(path: str | Path, force: bool) -> None:
    """Raises a `UserError` when there is something at `path` that may not be replaced: with `force` all but a file."""
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return
    if not stat.S_ISREG(mode):
        kind = "folder" if stat.S_ISDIR(mode) else "link" if stat.S_ISLNK(mode) else "device or pipe"
        raise UserError(f"{path} is a {kind}, and only a file is ever replaced: choose another name")
    if not force:
        raise UserError(EXISTS.format(path))


def refuse_input_files(out: str | Path, inputs: Iterable[str | Path]) -> None:
    """Raises a `UserError` when `out` is one of the files that are read, or lies in a folder of them; links count."""
    if not os.path.exists(out):
        return
    real = Path(out).resolve()
    for source in map(Path, inputs):
        if source.is_dir() and source.resolve() in real.parents:
            raise UserError(f"{out} is a file in {source}, which is read: choose another file for the result")
        if source.is_file() and real.samefile(source):
            raise UserError(f"{out} is the same file as {source}, which is read: choose another file for the result")


def write_atomic(path: str | Path, write: Callable[[Path], Any], *, force: bool = True) -> None:
    """Calls `write(temporary)` in the folder of `path`, then renames it to `path`; a failure leaves `path` as it was.

    Args:
        path: the file to make; its folder is made when it is missing.
        write: writes the whole content to the path that it is given.
        force: replace an existing file; otherwise that is a `UserError`, even for one that appears in the meantime.

    Raises:
        UserError: the file exists and `force` is off, or is no regular file, or the system refuses.
    """
    path = Path(path)
    refuse_existing(path, force)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if not force:
            _claim(temporary, path)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(REFUSED.format(path, error.strerror or error)) from error
    finally:
        with contextlib.suppress(OSError):  # such as a file where the folder should be
            temporary.unlink()


def write_json(path: str | Path, value: Any, *, force: bool = True) -> None:
    """Writes `value` as indented JSON, atomically; NaN and infinities are refused, for no JSON reader takes them."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"), force=force)


def sha256_of(file: str | Path | BinaryIO) -> str:
    """The SHA-256 of a file as `sha256sum` prints it; raises `UserError` when it cannot be read."""
    try:
        with open(file, "rb") if isinstance(file, (str, Path)) else file as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from error


def replace_folder(
    folder: str | Path, write: Callable[[Path], Any], parts: Collection[str], *, force: bool = True
) -> None:
    """Calls `write(temporary)` with a new empty folder beside `folder`, then puts it in the place of `folder`.

    Args:
        folder: the folder to make.
        write: fills the folder that it is given.
        parts: names of what a folder of this kind consists of, which are deleted with the old one; what else the old
            one holds goes on to the new one.
        force: replace a folder that is not empty; otherwise that is a `UserError`, even for one that appears meanwhile.

    Raises:
        UserError: the folder is not empty and `force` is off, or the system refuses; then `folder` is as it was.
    """
    folder = Path(folder).resolve()
    temporary, old = folder.with_name(f".{folder.name}.{os.getpid()}.tmp"), _old(folder)
    try:
        settle_folder(folder, parts)
        shutil.rmtree(temporary, ignore_errors=True)  # of a killed process of the same number
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
    """Where the content of a folder is that `replace_folder` makes: there, or under the old one's name."""
    old = _old(folder)
    return old if old.is_dir() and not folder.exists() else folder


def settle_folder(folder: Path, parts: Collection[str]) -> None:
    """Ends what a killed `replace_folder` began: the old folder gets its name again, or makes way for the new one."""
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


def _claim(temporary: Path, path: Path) -> None:
    """Gives a whole file its name if that is still free."""
    try:
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links; a kill at this moment leaves an empty file
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except FileExistsError:
        raise UserError(EXISTS.format(path)) from None
