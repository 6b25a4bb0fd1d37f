"""Splits into train, validation and test, or k folds: stratified, duplicates together, reproducible from a seed."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from sam2_lora_ext.utils.csv_text import csv_text
from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.files import write_atomic


def parse_shares(text: str) -> dict[str, float]:
    """`train=0.8,val=0.1,test=0.1` -> a share for each split, summing to 1."""
    shares = {}
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        try:
            share = float(value)
        except ValueError:
            share = 0.0
        if not (name and equals and share > 0) or name in shares:
            raise UserError(f"shares are like train=0.8,val=0.1,test=0.1, each above 0, got {text!r}")
        shares[name] = share
    if abs(sum(shares.values()) - 1) > 1e-6:
        raise UserError(f"the shares {text} sum to {sum(shares.values()):g}, but must sum to 1")
    return shares


def fold_shares(count: int) -> dict[str, float]:
    """`fold0` ... with equal shares."""
    if count < 2:
        raise UserError(f"at least 2 folds are needed, got {count}")
    return {f"fold{number}": 1 / count for number in range(count)}


def stratified_split(
    names: Sequence[str],
    classes: Sequence[tuple[int, ...]],
    groups: Sequence[int],
    shares: Mapping[str, float],
    seed: int = 42,
) -> list[str]:
    """A split for each image.

    Groups of duplicates stay together. All groups are sorted by class combination (those with the same rarest class are
    adjacent), and within a combination by a hash of the seed and their names; in this order each goes to the split that
    is furthest behind its share. So the shares hold for every combination to within a group or two, rare combinations
    count as their rarest class, and no split is empty.

    Args:
        names: of N images.
        classes: of each image, empty for clean.
        groups: a number for each image.
        shares: share of each split, summing to 1.
        seed: of the order.

    Raises:
        UserError: there are fewer groups than splits.
    """
    members: dict[int, list[int]] = {}
    for image, group in enumerate(groups):
        members.setdefault(int(group), []).append(image)
    if len(members) < len(shares):
        raise UserError(
            f"{len(names)} images in {len(members)} groups of duplicates cannot be split into {len(shares)} parts; "
            "use fewer parts, or ignore the duplicates"
        )
    frequency = Counter(c for present in classes for c in present)

    def place_in_row(images: list[int]) -> tuple:
        present = sorted({c for image in images for c in classes[image]}, key=lambda c: (frequency[c], c))
        return present, _order(seed, min(names[image] for image in images))

    row = sorted(members.values(), key=place_in_row)
    result = [""] * len(names)
    done = dict.fromkeys(shares, 0)
    placed = 0
    for number, images in enumerate(row):
        placed += len(images)
        empty = [split for split in shares if not done[split]]
        open_splits = empty if len(empty) == len(row) - number else shares  # the last groups, if a split is empty
        split = max(open_splits, key=lambda split: shares[split] * placed - done[split])
        done[split] += len(images)
        for image in images:
            result[image] = split
    return result


def given_splits(names: Sequence[str]) -> list[str]:
    """The split of each image whose data came in split folders: `train_split/img/X.jpg` -> `train`.

    Raises:
        UserError: a name has no such folder.
    """
    folders = [PurePosixPath(name).parts[0] if name.count("/") >= 2 else "" for name in names]
    if not all(folders):
        raise UserError(
            "only a Supervisely project with several split folders has its own splits; for other data make a split "
            "file with tools/prepare_data.py split"
        )
    return [folder.removesuffix("_split").removesuffix("_images") for folder in folders]


def take(rows: Sequence[tuple[str, str]], split: str | Sequence[str], where: str | Path) -> list[str]:
    """The images of one split.

    Args:
        rows: (image, split).
        split: the split or splits to take; `!fold0` takes all others.
        where: the source of the rows, for messages.

    Raises:
        UserError: no row has such a split.
    """
    known = {str(value) for _, value in rows}
    wanted = [split] if isinstance(split, str) else list(split)
    unknown = [value for value in wanted if value.removeprefix("!") not in known]
    if unknown or not wanted:
        raise UserError(
            f"{where} has no split {', '.join(unknown) or wanted!r}; it has {', '.join(sorted(known)) or 'no rows'}"
        )
    taken = set().union(*(known - {value[1:]} if value.startswith("!") else {value} for value in wanted))
    return [image for image, value in rows if value in taken]


def _order(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{name}".encode("utf-8", "surrogateescape")).digest()


def write_split(path: str | Path, names: Sequence[str], splits: Sequence[str], force: bool = False) -> None:
    """Writes the csv (`image,split`) that `SeverstalRawDataset` takes as `split_file`."""
    text = csv_text(["image", "split"], sorted(zip(names, splits, strict=True)))
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"), force=force)
