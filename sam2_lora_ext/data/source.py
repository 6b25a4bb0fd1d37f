"""One description of a data set for all tools, from a training config or a run (`guess.guessed`: from a folder).

Tools get their readers only from a `Source`. Data is read on demand: a `Source` of a run whose data was moved still
describes how the run was trained.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam2_lora_ext.data.blocks import PLACES, build_reader, crop_width, describe, raw_blocks
from sam2_lora_ext.data.index import collect
from sam2_lora_ext.data.items import read_split
from sam2_lora_ext.data.records import OnInvalid, Reader, class_table
from sam2_lora_ext.data.splits import given_splits, take
from sam2_lora_ext.run.config import NAME, OLD_NAME
from sam2_lora_ext.run.paths import find_run, started_in, trainer_of
from sam2_lora_ext.utils.errors import UserError

if TYPE_CHECKING:
    from sam2_lora_ext.data.dataset import SeverstalRawDataset

MIN_AREA = 16  # pixels, by default
TAKEN = ("bits", "objects", "min_area", "include_clean", "on_invalid", "split_file", "split", "cache_dir")
"""Arguments of the data set that are fields of a source."""


@dataclass(frozen=True)
class Source:
    """A data set and all its settings.

    Args:
        origin: where this description comes from, such as "the validation data of the run runs/r8".
        data: format and paths, in words.
        places: the reader's arguments with the paths of the data.
        make_reader: builds the reader, one for all copies of this source; raises `UserError` if the data is missing.
        settings: the reader's other arguments: classes, colors, size, exif ...
        format: name of the reader's class.
        phase: of a config or run: "train" or "val"; None for data that was guessed.
        bits: depth of images with more than 8 bits a channel.
        objects: definition of an object; None takes the data set's default.
        min_area: smallest area of an object in pixels.
        include_clean: whether clean images are used.
        on_invalid: "error" or "skip".
        split_file: csv of splits; None takes all images, or the split folders.
        split: name of a split in it.
        crop: columns of the model's window in validation; None for whole images.
        stride: of the windows of a strip as a video, whose width is `crop`; None for single images.
        max_objects: largest number of objects of a cropped item.
        group_width: columns that the objects of a cropped item span; None: `crop`.
        resolution: pixels of a side of the model's input; None takes the model config's.
        cache_dir: of the index.
        other_data: the data of the other phase of the config, in words, if it differs from `data`.
    """

    origin: str
    data: str
    places: Mapping[str, str | Path]
    make_reader: Callable[[], Reader]
    settings: Mapping[str, Any]
    format: str
    phase: str | None = None
    bits: int = 16
    objects: str | None = None
    min_area: int = MIN_AREA
    include_clean: bool = True
    on_invalid: OnInvalid = "error"
    split_file: str | Path | None = None
    split: str | Sequence[str] | None = None
    crop: int | None = None
    stride: int | None = None
    max_objects: int | None = None
    group_width: int | None = None
    resolution: int | None = None
    cache_dir: str | Path | None = None
    other_data: str | None = None

    @property
    def exif(self) -> bool:
        """Whether images are turned upright by their EXIF orientation."""
        return self.settings.get("exif", True)

    def conditions(self) -> dict[str, Any]:
        """The settings that determine the numbers of an evaluation, as JSON values."""
        return {
            "data": self.data,
            "split_file": None if self.split_file is None else str(self.split_file),
            "split": self.split if self.split is None or isinstance(self.split, str) else list(self.split),
            "crop": self.crop,
            "resolution": self.resolution,
            "bits": self.bits,
            "exif": self.exif,
            "objects": self.objects,
            "min_area": self.min_area,
        }

    def same_data(self, other: "Source") -> bool:
        """Whether both read the same files, however their paths are written."""

        def found(source: Source) -> tuple[str, dict[str, str]]:
            return source.format, {key: os.path.realpath(place) for key, place in source.places.items()}

        return found(self) == found(other)

    def class_names(self) -> dict[int, str] | None:
        """Class number -> name; if the data is missing, from the settings; None if only the data has them."""
        try:
            return self.make_reader().class_names
        except UserError:
            classes = self.settings.get("classes")
            known = classes is not None or self.format in ("KaggleReader", "LabelPNGReader")
            return class_table(classes) if known else None

    def dataset(self) -> "SeverstalRawDataset":
        """The data set for evaluation; the objects of an image are in one item, or in one for each crop.

        Raises:
            UserError: the data is wrong.
        """
        from sam2_lora_ext.data.dataset import SeverstalRawDataset  # needs SAM 2's training code

        cropped = self.crop is not None
        return SeverstalRawDataset(
            self.make_reader(),
            training=False,
            max_objects=self.max_objects if cropped else None,
            group_width=self.group_width or self.crop if cropped else None,
            **{key: getattr(self, key) for key in TAKEN},
        )

    def image_paths(self) -> set[str]:
        """The image files of the split, with links followed.

        Raises:
            UserError: the data or the split cannot be read.
        """
        reader = self.make_reader()
        if self.split_file is not None:
            names = read_split(self.split_file, self.split)
        else:
            names = collect(reader).names()
            if self.split is not None:
                names = take(list(zip(names, given_splits(names))), self.split, reader.image_dir)
        return {str((Path(reader.image_dir) / name).resolve()) for name in names}


def from_config(name: str, overrides: Sequence[str] = (), phase: str = "val", **reader: Any) -> Source:
    """The data of a training config, as `python -m sam2_lora_ext.train -c NAME OVERRIDES` would read it.

    Args:
        name: of the config, or the path of a config file.
        overrides: in Hydra's grammar.
        phase: "train" or "val".
        **reader: arguments of the reader that replace the config's, such as exif.

    Raises:
        UserError: the config cannot be composed, or has no data set of this package.
    """
    from sam2_lora_ext.host.compose import load

    return from_trainer(load(name, overrides)["trainer"], phase, f"the config {name}", **reader)


def from_run(run: str | Path, phase: str = "val", **reader: Any) -> Source:
    """The data of a run, from the run's record; `run` is its folder or a path inside it, see `find_run`.

    Raises:
        UserError: there is no run, or its record is damaged or has no data set of this package.
    """
    folder = find_run(run)
    if folder is None:
        raise UserError(f"{run} is neither a run nor inside one: a run has a {NAME}, or {OLD_NAME} in version 0.1.0")
    trainer = trainer_of(folder)
    return from_trainer(trainer, phase, f"the run {folder}", started_in(folder, trainer), **reader)


def from_trainer(
    trainer: Mapping[str, Any], phase: str, origin: str, root: Path | None = None, **reader: Any
) -> Source:
    """The data of a `trainer` section; see `from_config`, `from_run`.

    Crop and resolution are those of validation in both phases, since they define what the model sees. A relative path
    is resolved from `root`, or if there is no such file, from the working directory.
    """

    def at(path: str | None) -> str | None:
        there = root is not None and path is not None and root != Path.cwd() and (root / path).exists()
        return str(root / path) if there else path

    data = trainer.get("data") or {}
    blocks = list(raw_blocks(data.get(phase)))
    if len(blocks) != 1 or not isinstance(blocks[0][0].get("reader"), Mapping):
        raise UserError(
            f"trainer.data.{phase} of {origin} has {len(blocks)} data sets"
            + (" of another kind than SeverstalRawDataset" if len(blocks) == 1 else "")
            + ", but tools need exactly one, with a reader: name the data by its folder instead"
        )
    block = blocks[0][0]
    seen, transforms = next(iter(raw_blocks(data.get("val"))), blocks[0])
    windows = seen.get("windows")
    config = {**block["reader"], **reader}
    places = {key: at(config[key]) for key in PLACES if config.get(key) is not None}
    config |= places

    @cache
    def make_reader() -> Reader:
        if gone := next((file for file in places.values() if not Path(file).exists()), None):
            raise UserError(
                f"{origin} reads {gone}, which is missing (from {Path.cwd()}): start in the folder that training "
                "was started in, or name the data by its folder"
            )
        return build_reader(config, origin)

    others = [other.get("reader") for other, _ in raw_blocks(data.get("val" if phase == "train" else "train"))]
    others = [describe(other) for other in others if isinstance(other, Mapping)]
    taken = {"min_area": 1} | {key: block[key] for key in TAKEN if key in block}  # 1 is the data set's own default
    taken["split_file"] = at(block.get("split_file"))
    return Source(
        origin=f"the {'training' if phase == 'train' else 'validation'} data of {origin}",
        data=describe(config),
        places=places,
        make_reader=make_reader,
        settings={key: value for key, value in config.items() if key not in (*PLACES, "_target_")},
        format=config["_target_"].rpartition(".")[2],
        phase=phase,
        crop=windows["width"] if windows else crop_width(transforms),
        stride=windows["stride"] if windows else None,
        max_objects=seen.get("max_objects"),
        group_width=seen.get("group_width"),
        resolution=(trainer.get("model") or {}).get("image_size"),
        other_data=next((other for other in others if other != describe(block["reader"])), None),
        **taken,
    )
