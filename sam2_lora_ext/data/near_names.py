"""Suggests images for an id without an exact match, which may differ in case, suffix or folder."""

import re
import unicodedata
from collections.abc import Iterable

from sam2_lora_ext.data.images import SUFFIXES


class NearNames:
    """Looks up ids by stem, ignoring case.

    Args:
        names: of the images.
    """

    def __init__(self, names: Iterable[str]):
        self._images: dict[str, list[str]] = {}
        for name in names:
            for key in _keys(name):
                self._images.setdefault(key, []).append(name)

    def find(self, text: str) -> list[str]:
        """The images that `text` may mean, sorted; empty for text without a name."""
        return sorted({name for key in _keys(text) for name in self._images.get(key, ())})


def _keys(text: str) -> set[str]:
    """The last part of a path, case-folded and composed as Unicode, with and without its suffixes."""
    name = unicodedata.normalize("NFC", re.split(r"[/\\]", text.strip())[-1].strip()).casefold()
    keys = {name, name.rpartition(".")[0]}
    while name.endswith(tuple(SUFFIXES)):
        name = name.rpartition(".")[0]
        keys.add(name)
    return keys - {""}
