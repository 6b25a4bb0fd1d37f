"""Reads JSON files of annotations strictly: complete, and without repeated keys."""

import json
from pathlib import Path
from typing import Any

from sam2_lora_ext.data.records import InvalidData
from sam2_lora_ext.utils.files import read_bytes


def read_annotations(path: Path) -> Any:
    """The content of a JSON file in UTF-8, with or without a BOM; NaN and Infinity become floats.

    Raises:
        UserError: the file cannot be read, or the path is not a file.
        InvalidData: it is not JSON, has data after its end, or an object repeats a key; the text is a clause.
    """
    content = read_bytes(path)
    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=_once)
    except InvalidData:
        raise
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        if str(error).startswith("Extra data"):
            said = f"it has data after the end of its JSON ({error}); are two files joined?"
            raise InvalidData("not JSON", said) from error
        raise InvalidData("not JSON", f"it is not JSON ({error}); is it cut off?") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise InvalidData(
            "key twice", f"one of its objects has the key {twice!r} twice, so one hides the other; keep one"
        )
    return table
