"""Atomic files: written under a temporary name, flushed to the disk, then renamed. See also `folders`."""

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

from sam2_lora_ext.utils.errors import UserError

LARGEST_TEXT = 1 << 30
"""Size limit in bytes of text files: annotations of a large data set."""
PIECE = 1 << 20  # bytes that are read at a time
LARGEST_NOTE = 1 << 26
"""Size limit in bytes of this package's files (records of a run, configs, adapter_config.json)."""
EXISTS = "{} exists already: choose another name, or give --force to replace it"
REFUSED = "cannot write {}: {}; check the folder, its permissions and the free disk space"


def refuse_existing(path: str | Path, force: bool) -> None:
    """Raises a `UserError` when `path` exists and may not be replaced; with `force`, only files may."""
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return
    if not stat.S_ISREG(mode):
        kind = "folder" if stat.S_ISDIR(mode) else "link" if stat.S_ISLNK(mode) else "device or pipe"
        raise UserError(f"{path} is a {kind}, and only files can be replaced: choose another name")
    if not force:
        raise UserError(EXISTS.format(path))


def refuse_input_files(out: str | Path, inputs: Iterable[str | Path]) -> None:
    """Raises a `UserError` when `out` is one of the inputs or inside one; links are followed."""
    if not os.path.exists(out):
        return
    real = Path(out).resolve()
    for source in map(Path, inputs):
        if source.is_dir() and source.resolve() in real.parents:
            raise UserError(f"{out} is a file in {source}, which is read: choose another file for the result")
        if source.is_file() and real.samefile(source):
            raise UserError(f"{out} is the same file as {source}, which is read: choose another file for the result")


def write_atomic(path: str | Path, write: Callable[[Path], Any], *, force: bool = True) -> None:
    """Calls `write(temporary)` in the folder of `path`, then renames it to `path`; a failure leaves `path` unchanged.

    Args:
        path: the file to write; its folder is created if missing.
        write: writes the content to the path that is its argument.
        force: replace an existing file; otherwise that is a `UserError`, even for one that appears in the meantime.

    Raises:
        UserError: the file exists and `force` is off, or is not a regular file, or the system refuses.
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
        with contextlib.suppress(OSError):  # such as a file with the name of the folder
            temporary.unlink()


def write_json(path: str | Path, value: Any, *, force: bool = True) -> None:
    """Writes `value` as indented JSON, atomically; NaN and infinities are refused, since they are not valid JSON."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"), force=force)


def open_regular(path: str | Path, limit: int | None = None) -> BinaryIO:
    """Opens a regular file for reading; folders, pipes and devices are refused without blocking.

    Args:
        path: the file.
        limit: largest size in bytes; None for no limit.

    Raises:
        UserError: it is missing, cannot be read, is not a regular file, or is larger than `limit`.
    """
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:  # ValueError: an impossible name, such as one with a null byte
        raise UserError(f"cannot read {_short(path)}: {getattr(error, 'strerror', None) or error}") from error
    state = os.fstat(number)
    if stat.S_ISREG(state.st_mode) and (limit is None or state.st_size <= limit):
        return os.fdopen(number, "rb")
    os.close(number)
    if not stat.S_ISREG(state.st_mode):
        kind = "a folder" if stat.S_ISDIR(state.st_mode) else "a pipe, a socket or a device"
        raise UserError(f"cannot read {path}: it is {kind}, not a file; give the file itself")
    size = f"{state.st_size:,} bytes, expected at most {limit:,}"
    raise UserError(f"cannot read {path}: it has {size}; give another file")


def _short(path: str | Path) -> str:
    """The path for a message: only its ends if it is longer than any system allows."""
    text = str(path)
    return text if len(text) <= 500 else f"{text[:200]}...{text[-100:]}"


def read_bytes(path: str | Path, limit: int = LARGEST_TEXT) -> bytes:
    """The content of a regular file of at most `limit` bytes; raises `UserError` as `open_regular` does."""
    try:
        with open_regular(path, limit) as file:
            # a file may grow, and files of /proc have size 0; read(limit) would allocate the limit at once
            pieces, size = [], 0
            while size <= limit and (piece := file.read(PIECE)):
                pieces.append(piece)
                size += len(piece)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if size > limit:
        raise UserError(f"cannot read {path}: it has more than {limit:,} bytes; give another file")
    return b"".join(pieces)


def read_text(path: str | Path, limit: int = LARGEST_TEXT) -> str:
    """The text of a regular UTF-8 file, with or without a byte order mark; line ends are unchanged.

    Raises:
        UserError: as `open_regular`, or the content is not UTF-8.
    """
    try:
        return read_bytes(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path}: it is not UTF-8 text (byte {error.start:,}); save it as UTF-8") from error


def read_json(path: str | Path, limit: int = LARGEST_TEXT) -> Any:
    """The value of a JSON file; raises `UserError` as `read_text`, and for invalid JSON or too deep nesting."""
    return parse_json(read_text(path, limit), path)


def parse_json(text: str, where: str | Path) -> Any:
    """The value of a JSON text; `where` names it in the `UserError` for invalid JSON or too deep nesting."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        cause = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{where} is not valid JSON: {cause}") from error


def inside(folder: Path, name: object) -> Path:
    """The file of a relative name in a folder; raises `UserError` if the name, or a link, leads out of it."""
    path = folder / name if isinstance(name, str) and "\0" not in name else None
    if path is None or not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{folder} names the file {str(name)[:200]!r}, which is not inside that folder: it is not used")
    return path


def sha256_of(file: str | Path | BinaryIO) -> str:
    """The SHA-256 of a file as `sha256sum` prints it; raises `UserError` when it cannot be read."""
    try:
        with open_regular(file) if isinstance(file, (str, Path)) else file as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from error


def _claim(temporary: Path, path: Path) -> None:
    """Renames a complete file if the name is still free."""
    try:
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links; a kill at this moment leaves an empty file
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except FileExistsError:
        raise UserError(EXISTS.format(path)) from None
