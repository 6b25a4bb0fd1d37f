"""Cache of the index on disk, so that the next start does not read the data again.

The key is a hash of the reader's settings, the content of its annotation files, and name, size and time of each image
(reading a gigabyte of pixels would take longer than building the index). A damaged cache file is rebuilt.
"""

import hashlib
import json
import logging
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from sam2_lora_ext.data.index import AnnotationIndex, announce, build_index
from sam2_lora_ext.data.records import OnInvalid, Problem, Reader
from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.files import read_bytes, write_atomic

VERSION = 2  # of the arrays' layout and of the checks; increase it when either changes
log = logging.getLogger(__name__)


def cached_index(
    reader: Reader, on_invalid: OnInvalid = "error", cache_dir: str | Path | None = None
) -> AnnotationIndex:
    """`build_index`, or the stored result of an earlier call on the same files.

    Args:
        reader: the annotation format.
        on_invalid: see `build_index`; an index with problems is not stored, so they are reported each time.
        cache_dir: folder of the cache; None builds each time. If it cannot be written, a warning is logged.
    """
    if cache_dir is None:
        return build_index(reader, on_invalid)
    path = Path(cache_dir).expanduser() / f"index_{fingerprint(reader)[:24]}.npz"
    try:
        index = load_index(path)
        announce(index)
        return index
    except FileNotFoundError:
        pass
    except Exception as error:  # a damaged file causes many kinds of errors; a cache must never end the program
        log.warning("the stored index %s cannot be used (%s) and is built again", path, error or type(error).__name__)
    index = build_index(reader, on_invalid)
    if not index.problems:
        try:
            save_index(index, path)
        except UserError as error:
            log.warning("the index is not stored: %s", error)
    return index


def fingerprint(reader: Reader) -> str:
    """SHA-256 of everything that determines a reader's records."""
    digest = hashlib.sha256()
    settings = {key: str(value) for key, value in vars(reader).items() if not key.startswith("_")}
    digest.update(json.dumps([VERSION, type(reader).__qualname__, settings], sort_keys=True).encode())
    for path in reader.files():
        digest.update(str(path).encode("utf-8", "surrogateescape"))
        digest.update(hashlib.sha256(read_bytes(path)).digest())
    for folder, folders, names in os.walk(reader.image_dir):
        folders.sort()
        for name in sorted(names):
            try:
                stat = os.stat(os.path.join(folder, name))
                state = f"{stat.st_size} {stat.st_mtime_ns}"
            except OSError as error:
                state = str(error.errno)
            digest.update(f"{folder}/{name} {state}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def save_index(index: AnnotationIndex, path: Path) -> None:
    """Writes the arrays as an npz (no pickles)."""
    arrays = {key: value for key, value in vars(index).items() if isinstance(value, np.ndarray)}
    other = {key: _plain(value) for key, value in vars(index).items() if key not in arrays}

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays, other=np.frombuffer(json.dumps(other).encode(), dtype=np.uint8))

    write_atomic(path, write)


def load_index(path: Path) -> AnnotationIndex:
    """Reads a file of `save_index`."""
    with np.load(path, allow_pickle=False) as arrays:
        other = json.loads(arrays["other"].tobytes())
        values = {
            field.name: _value(field.name, other[field.name]) if field.name in other else arrays[field.name]
            for field in fields(AnnotationIndex)
        }
    return AnnotationIndex(**values)


def _plain(value: Any) -> Any:
    """A field that is not an array, as a JSON value: a dict becomes a list of items, since its keys are numbers."""
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, tuple):
        return [asdict(entry) if isinstance(entry, Problem) else entry for entry in value]
    return value


def _value(name: str, stored: Any) -> Any:
    """The inverse of `_plain`."""
    if name in ("class_names", "class_source"):
        return {int(key): value for key, value in stored}
    if name == "problems":
        return tuple(Problem(**problem) for problem in stored)
    return tuple(stored) if isinstance(stored, list) else stored
