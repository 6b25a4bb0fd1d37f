"""Files that are either whole or absent: write beside, flush to the disk, then rename over."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from sam2_lora_ext.errors import UserError


def refuse_existing(path: str | Path, force: bool) -> None:
    """Raises a `UserError` when `path` exists and may not be replaced."""
    if os.path.lexists(path) and not force:
        raise UserError(f"{path} exists already: choose another name, or give --force to replace it")


def write_atomic(path: str | Path, write: Callable[[Path], Any], *, force: bool = True) -> None:
    """Calls `write(temporary)` in the folder of `path`, then renames it to `path`; a failure leaves `path` as it was.

    Args:
        path: the file to make; its folder is made when it is missing.
        write: writes the whole content to the path that it is given.
        force: replace an existing file; otherwise that is a `UserError`.

    Raises:
        UserError: the file exists and `force` is off, or the system refuses the folder or the file.
    """
    path = Path(path)
    refuse_existing(path, force)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; check the folder, its rights and the free disk") from error
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
