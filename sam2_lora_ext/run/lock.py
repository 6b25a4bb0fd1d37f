"""Locks a run's folder for one process; the system releases the lock when the process ends."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.files import write_atomic

NAME = ".lock"
CONFIGS = ("config.yaml", "config_resolved.yaml")


def read_configs(folder: Path) -> dict[str, bytes]:
    """The contents of the launcher's config files, by name."""
    return {name: (folder / name).read_bytes() for name in CONFIGS if (folder / name).is_file()}


def keep_configs(folder: Path, configs: Mapping[str, bytes]) -> None:
    """Writes the config files of the run that has the lock, and a copy of each for `restore_configs`.

    They were read immediately after locking; another start may have replaced them since.
    """
    for name, content in configs.items():
        for file in (folder / f".{name}", folder / name):
            if not file.is_file() or file.read_bytes() != content:
                write_atomic(file, lambda temporary, content=content: temporary.write_bytes(content))


def restore_configs(folder: Path) -> None:
    """Restores the config files that the launcher replaced, after a start that was refused or did not train."""
    with contextlib.suppress(UserError, OSError):
        kept = {name: (folder / f".{name}").read_bytes() for name in CONFIGS if (folder / f".{name}").is_file()}
        keep_configs(folder, kept)


def lock_folder(folder: Path) -> IO[str]:
    """Creates the folder if needed and locks it for as long as the returned file is open.

    Raises:
        UserError: another process has the lock, or the folder cannot be used.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / NAME, "a+", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot use {folder} as the run's folder: {error.strerror or error}; check it and its rights"
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise UserError(
            f"a run is active in {folder} ({holder}): wait for its end, or choose another launcher.experiment_log_dir"
        ) from None
    except OSError:
        return file  # a file system without locks
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    try:
        file.flush()
    except OSError as error:
        raise UserError(f"cannot write in {folder}: {error.strerror or error}; check the free disk") from error
    return file


def check_free(folder: Path) -> None:
    """Raises a `UserError` when a run is active in the folder; creates nothing."""
    if (folder / NAME).exists():
        lock_folder(folder).close()
