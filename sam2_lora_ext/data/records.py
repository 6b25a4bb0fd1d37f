"""The output of every reader: an `ImageRecord` per image, a `Problem` per unusable entry, notes and unread files."""

import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from sam2_lora_ext.utils.errors import UserError

SEVERSTAL_CLASSES = {1: "defect_1", 2: "defect_2", 3: "defect_3", 4: "defect_4"}
MOST_CLASSES = 32767  # the largest class number: the index keeps 16 bits
LISTED = 1000  # problems in one message
OnInvalid = Literal["error", "skip"]


@dataclass
class ImageRecord:
    """One image and its masks."""

    name: str  # below the reader's image folder
    height: int
    width: int
    masks: list[tuple[int, np.ndarray]] = field(default_factory=list)  # (class from 1, runs int32 [R, 2])
    special: bool = False  # only `images.read_rgb` reads it correctly: more than 8 bits a channel, float, turned
    complete: bool = True  # False: one of its masks was dropped, so it must not count as clean
    ids: list[int] = field(default_factory=list)  # the file's annotation id of each mask, -1: none; [] without ids
    crowd: list[bool] = field(default_factory=list)  # COCO's iscrowd of each mask; [] where the format has none
    source_id: int = -1  # the file's image id, -1 where it has none

    def add(self, class_id: int, runs: np.ndarray, annotation: int = -1, crowd: bool = False) -> None:
        """Adds the mask of one annotation."""
        self.masks.append((class_id, runs))
        self.ids.append(annotation)
        self.crowd.append(crowd)


@dataclass(frozen=True)
class Problem:
    """An entry of the data that cannot be used."""

    file: str
    row: int | None  # line of a table, counted from 1 as editors do; None where a file has no rows
    cause: str  # a few fixed words, to count by
    sentence: str  # actual value, expected value, and the fix
    image: str | None = None  # the image that it concerns, if known

    def __str__(self) -> str:
        return f"{self.file}{'' if self.row is None else f', row {self.row}'}: {self.sentence}"


@dataclass(frozen=True)
class Note:
    """A remark on valid data that a user should know."""

    sentence: str


@dataclass(frozen=True)
class Unread:
    """A file or folder of the data set that the reader did not use."""

    path: str


class Reader(Protocol):
    """One annotation format. No image is read before `records` is called; the file with the classes (COCO's JSON,
    Supervisely's `meta.json`) is read by the constructor."""

    image_dir: Path
    class_names: dict[int, str]
    exif: bool  # images are turned upright by their orientation tag
    instances: bool  # the format has instances: a mask is one annotation of the file

    def records(self) -> Iterator[ImageRecord | Problem | Note | Unread]:
        """All images, problems, notes and unread files, in one pass.

        An image with an unreadable part is either not among the records or marked by `complete`: no reader may treat
        unreadable data as the absence of a defect.
        """
        ...

    def files(self) -> list[Path]:
        """The files besides the images that determine the records (the cache is keyed by their content)."""
        ...

    def inputs(self) -> list[Path]:
        """The folders and files of the data set: nothing may be written into or over them."""
        ...


class InvalidData(ValueError):
    """Data that cannot be used; `cause` is a few fixed words to count by, the text a clause for a sentence."""

    def __init__(self, cause: str, text: str):
        super().__init__(text)
        self.cause = cause


def class_table(classes: int | Sequence[str] | dict[int, str] | None) -> dict[int, str]:
    """Class number -> name from a count, a list of names (numbered from 1), a table, or None for Severstal's four."""
    if classes is None:
        return dict(SEVERSTAL_CLASSES)
    if isinstance(classes, int):
        classes = [f"defect_{number}" for number in range(1, classes + 1)]
    if not hasattr(classes, "items"):
        classes = dict(enumerate(classes, 1))
    try:
        table = {int(number): str(name) for number, name in classes.items()}
    except (TypeError, ValueError) as error:
        raise UserError(f"classes must be numbers with names, got {dict(classes)}") from error
    if not table or min(table) < 1 or max(table) > MOST_CLASSES:
        raise UserError(
            f"classes are numbered from 1 (0 is a clean image) to at most {MOST_CLASSES}, got {table or 'none'}"
        )
    if any(not is_text(name) for name in table.values()):
        raise UserError(f"a class name must be text, got {list(table.values())!r}; correct it at its source")
    if len(set(table.values())) < len(table):
        raise UserError(f"class names must differ, got {', '.join(table.values())}")
    return table


def is_text(name: str) -> bool:
    """Whether a name can be encoded as UTF-8, which file names and JSON do not guarantee."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def shorten(names: Sequence[str], most: int = 5) -> str:
    """The first names, and the number of the others."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def source_id(value: Any) -> int:
    """An id of a file as stored in the index: -1 for anything but an integer of 0..2^63-1."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63 else -1


def describe_classes(class_names: dict[int, str]) -> str:
    """The known classes for a message: `1 (patches), 2 (scratches)`."""
    return ", ".join(f"{number} ({name})" for number, name in sorted(class_names.items()))


def compare_class_tables(a: dict[int, str], b: dict[int, str], where_a: str, where_b: str) -> None:
    """Checks that class numbers mean the same in two data sets; classes of only one of them are ignored.

    Raises:
        UserError: a name has two numbers, or a number two names.
    """
    numbers = {name: number for number, name in b.items()}
    wrong = [number for number, name in a.items() if numbers.get(name, number) != number or b.get(number, name) != name]
    if wrong:
        raise UserError(
            f"the classes of {where_a} are {describe_classes(a)}, but those of {where_b} are {describe_classes(b)}, so "
            f"class {min(wrong)} is not the same in both: give both readers one table, such as classes: "
            f"[{', '.join(dict.fromkeys([*a.values(), *b.values()]))}]"
        )


def compare_datasets(phases: Mapping[str, Sequence[Any]]) -> None:
    """Calls `compare_class_tables` for all pairs of this package's data sets; others have no `class_names`."""
    tables = [
        (phase, dataset.class_names, dataset.index.image_dir)
        for phase, datasets in phases.items()
        for dataset in datasets
        if hasattr(dataset, "class_names") and hasattr(dataset, "index")
    ]
    for (one, a, where_a), (other, b, where_b) in itertools.combinations(tables, 2):
        compare_class_tables(a, b, f"{one} ({where_a})", f"{other} ({where_b})")


def settle(problems: Sequence[Problem], on_invalid: OnInvalid, where: str | Path) -> None:
    """Reports all problems: in one error with at most `LISTED` lines, or with "skip" in one line of the log.

    Raises:
        UserError: there are problems and `on_invalid` is "error".
    """
    if on_invalid not in ("error", "skip"):
        raise UserError(f"on_invalid must be error or skip, got {on_invalid!r}")
    if not problems:
        return
    if on_invalid == "skip":
        said = _counted(problems)
        logging.getLogger(__name__).warning("%s: skipped %d invalid entries: %s", where, len(problems), said)
        return
    todo = "correct them, or set on_invalid: skip (--on-invalid skip) to leave them out"
    raise UserError(f"{where} has {listed(problems, todo)}")


def listed(problems: Sequence[Problem], todo: str = "correct them") -> str:
    """The number of problems, the advice, and each problem on a separate line."""
    lines = [f"  {problem}" for problem in problems[:LISTED]]
    if len(problems) > LISTED:
        lines.append(
            f"  ... and {len(problems) - LISTED} more; tools/prepare_data.py scan lists all of them in its scan.json"
        )
    return "\n".join([f"{len(problems)} invalid entries ({_counted(problems)}); {todo}:", *lines])


def _counted(problems: Sequence[Problem]) -> str:
    return ", ".join(f"{count} {cause}" for cause, count in Counter(p.cause for p in problems).most_common())
