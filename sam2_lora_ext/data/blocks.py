"""Finds the data set blocks of a training config, their crops and their readers."""

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

from sam2_lora_ext.data.records import Reader
from sam2_lora_ext.utils.errors import UserError

PLACES = ("csv", "json", "label_dir", "root", "image_dir")  # a reader's arguments with the paths of its data
READER_NAMES = {
    "KaggleReader": "Kaggle's csv",
    "COCOReader": "COCO",
    "SuperviselyReader": "Supervisely",
    "LabelPNGReader": "label images",
}


def raw_blocks(data: Any) -> Iterator[tuple[Mapping[str, Any], Any]]:
    """The config of each raw data set inside wrappers (each `video_dataset` below), with its wrapper's transforms."""
    if isinstance(data, Mapping):
        if isinstance(data.get("video_dataset"), Mapping):
            yield data["video_dataset"], data.get("transforms")
            return
        data = list(data.values())
    if isinstance(data, list):
        for inner in data:
            yield from raw_blocks(inner)


def crop_width(transforms: Any) -> int | None:
    """The width of the first crop among transforms; None where there is none."""
    for transform in transforms if isinstance(transforms, list) else []:
        if isinstance(transform, Mapping) and str(transform.get("_target_")).endswith("StripCrop"):
            return transform.get("width")
    return None


def build_reader(config: Mapping[str, Any], origin: str) -> Reader:
    """Builds the reader of a config.

    Records are untrusted, so only classes with a `records` method are called, and only with plain values.

    Args:
        config: `_target_` and the reader's arguments.
        origin: where the config comes from, for messages.

    Raises:
        UserError: the class does not exist, is not a reader or does not take these arguments; or the data is wrong.
    """
    module, _, name = str(config["_target_"]).rpartition(".")
    arguments = {key: value for key, value in config.items() if key != "_target_"}
    try:
        kind = getattr(import_module(module), name, None)
        if not isinstance(kind, type) or not hasattr(kind, "records"):
            raise TypeError(f"{config['_target_']} is not a reader")
        return kind(**arguments)
    except (ImportError, TypeError) as error:
        raise UserError(f"the reader of {origin} cannot be built ({error}): name the data by its folder") from error


def describe(reader: Mapping[str, Any]) -> str:
    """A reader's config in words: `Kaggle's csv data/train.csv, images in data/train_images`."""
    name = str(reader.get("_target_")).rpartition(".")[2]
    place = next((reader[key] for key in PLACES if reader.get(key) is not None), "an unknown path")
    images = reader.get("image_dir")
    return f"{READER_NAMES.get(name, name)} {place}" + (f", images in {images}" if images not in (None, place) else "")
