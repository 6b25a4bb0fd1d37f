"""Names in a COCO file: the class numbers of its categories, and the paths of its images."""

import os
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from sam2_lora_ext.data.near_names import NearNames
from sam2_lora_ext.data.records import MOST_CLASSES, InvalidData, class_table, describe_classes, shorten
from sam2_lora_ext.utils.errors import UserError


def number_categories(
    categories: Sequence[dict[str, Any]],
    used: Iterable[Any],
    classes: int | Sequence[str] | dict[int, str] | None,
    where: str | Path,
) -> tuple[dict[int, str], dict[int, int]]:
    """Assigns class numbers to the categories of a file.

    Args:
        categories: of the file, with `id` and `name`.
        used: category ids of its annotations.
        classes: names with numbers, see `class_table`; categories are matched by name. With None, the class numbers are
            the ids if all are in 1..32767, else their order.
        where: the file, for messages.

    Returns:
        class number -> name, and category id -> class number; an unused category may have none.

    Raises:
        UserError: an id or a used name occurs twice, or a used category is not in `classes`.
    """
    names: dict[int, str] = {}
    for entry in categories:
        if entry["id"] in names:
            raise UserError(f"{where} has two categories with the id {entry['id']}; give each its own")
        names[entry["id"]] = str(entry["name"])
    used = {number for number in names if number in {key for key in used if _is_id(key)}}
    kept: dict[str, int] = {}
    for number, name in sorted(names.items(), key=lambda item: (item[0] not in used, item[0])):
        if name in kept and number in used:
            raise UserError(
                f"{where} has annotations of two categories with the name {name!r} (ids {kept[name]} and {number}); "
                "give them different names, or one id"
            )
        kept.setdefault(name, number)
    if classes is None:
        ids = sorted(kept.values())
        as_they_are = bool(ids) and 1 <= ids[0] and ids[-1] <= MOST_CLASSES
        order = {number: number if as_they_are else position for position, number in enumerate(ids, 1)}
        return class_table({order[number]: names[number] for number in ids}), order
    table = class_table(classes)
    numbers = {name: number for number, name in table.items()}
    strange = sorted(number for number in used if names[number] not in numbers)
    if strange:
        known = {names[number] for number in used}
        every = [name for name in table.values() if name in known] + [names[number] for number in strange]
        raise UserError(
            f"{where} has the categories {describe_classes(names)}; of these {shorten([names[n] for n in strange])} is "
            f"used but not one of the given classes {describe_classes(table)}; give the reader all names that are used "
            f"(--classes {','.join(every)})"
        )
    return table, {number: numbers[name] for name, number in kept.items() if name in numbers}


class ImageFinder:
    """Finds the image of a `file_name` in a folder.

    Args:
        folder: the image folder.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._above = Path(os.path.abspath(folder)).parts

    @cached_property
    def _near(self) -> NearNames:
        return NearNames(os.listdir(self.folder) if self.folder.is_dir() else ())

    def find(self, name: Any) -> str:
        """The image's path, relative to the folder.

        A backslash separates folders, as on Windows; leading folders that repeat the end of the image folder's path are
        removed.

        Raises:
            InvalidData: there is no name or no such file, or the path leads out of the folder.
        """
        if not isinstance(name, str) or not name:
            raise InvalidData("path in name", f"its file_name is {name!r}, but the path of an image is expected")
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or re.match("[A-Za-z]:", name) or ".." in path.parts or "\0" in name:
            raise InvalidData(
                "path in name",
                f"it leads out of {self.folder}; write the path below the image folder, with / between folders",
            )
        for drop in range(len(path.parts)):
            if self._above[len(self._above) - drop :] == path.parts[:drop]:
                found = "/".join(path.parts[drop:])
                if os.path.lexists(self.folder / found):
                    return found
        known = self._near.find(name)
        hint = f"the folder has {shorten(known)}: correct file_name or the image folder" if known else "add it"
        raise InvalidData("image missing", f"the image does not exist in {self.folder}; {hint}")


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
