"""Checks the data: a short scan of the training and validation data, and a search for shared images."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sam2_lora_ext.data.blocks import raw_blocks
from sam2_lora_ext.data.index import remarks
from sam2_lora_ext.data.objects import components_note
from sam2_lora_ext.data.records import compare_datasets
from sam2_lora_ext.data.units import look_at_units, spread
from sam2_lora_ext.doctor.findings import Finding, green, red, yellow
from sam2_lora_ext.utils.errors import UserError

AREA = "data"
LOOKED_AT = 16  # images of each phase that are decoded


class DataSets:
    """The data sets of a config, built as in training on first use.

    Args:
        data: the config's `trainer.data`.
    """

    def __init__(self, data: Mapping[str, Any]):
        self.data = data
        self.built: dict[str, list[Any]] = {"train": [], "val": []}

    def check(self, phase: str) -> Iterator[Finding]:
        """Builds the data sets of a phase, counts their content, and decodes some of the images."""
        from hydra.utils import instantiate

        for data in (self.data.get(phase) or {}).get("datasets", []):
            configs = [config for config, _ in raw_blocks(data)]
            if not configs:
                said = f"{phase}: {data.get('_target_')} has no video_dataset, so it was not checked"
                yield yellow(AREA, said, "check this data yourself")
            for config in configs:
                dataset = instantiate(config, _convert_="all")
                self.built[phase].append(dataset)
                if hasattr(dataset, "index"):
                    yield from describe(phase, dataset)
                    yield from decode_some(phase, dataset)
                else:
                    yield green(AREA, f"{phase}: {len(dataset)} videos in a {type(dataset).__name__}")

    def check_apart(self) -> Iterator[Finding]:
        """Warns of images in both training and validation, which make the metrics too optimistic."""
        paths = {phase: set().union(*map(image_paths, built)) for phase, built in self.built.items()}
        if shared := sorted(paths["train"] & paths["val"]):
            said = f"{len(shared)} of {len(paths['val'])} validation images are also in training, such as {shared[0]}"
            yield yellow(AREA, said, "set dataset.split_file to a file written by tools/prepare_data.py split")

    def check_classes(self) -> list[Finding]:
        """Raises training's `UserError` if class numbers differ in meaning between training and validation."""
        compare_datasets(self.built)
        return []


def describe(phase: str, dataset: Any) -> Iterator[Finding]:
    """The content of a `SeverstalRawDataset`."""
    counts = Counter(number for item in range(len(dataset)) for number in dataset.classes_of(item))
    names = ", ".join(f"{name} {counts[number]}" for number, name in sorted(dataset.class_names.items()))
    clean = sum(not dataset.classes_of(item) for item in range(len(dataset)))
    said = f"{phase}: {len(dataset)} samples from {len(dataset.images)} images, with {names}; {clean} clean"
    yield green(AREA, f"{said}; {dataset.index.image_dir}")
    if skipped := dataset.index.problems:
        said = f"{phase}: {len(skipped)} entries are skipped, the first is {skipped[0]}"
        yield yellow(AREA, said, "python tools/prepare_data.py scan DATA lists all")
    for sentence in remarks(dataset.index):
        yield yellow(AREA, f"{phase}: {sentence}", "python tools/prepare_data.py scan DATA lists all")
    if dataset.objects.mode == "components" and (sentence := components_note(dataset.index)):
        yield yellow(AREA, f"{phase}: {sentence}", "set dataset.objects=null")
    absent = [name for number, name in sorted(dataset.class_names.items()) if not counts[number]]
    if not counts:
        yield red(AREA, f"{phase}: no sample has a defect", "check split_file and min_area")
    elif absent:
        said = f"{phase}: no sample of {', '.join(absent)}"
        yield yellow(AREA, said, "check the split if it should contain these classes")


def decode_some(phase: str, dataset: Any) -> Iterator[Finding]:
    """Decodes a few evenly spaced images, since building the data set reads only the headers of most."""
    index, images = dataset.index, list(dataset.images)
    chosen = spread(images, LOOKED_AT)
    damaged, began = [], time.perf_counter()
    for image in chosen:
        try:
            index.read(int(image), dataset.bits)
        except UserError as error:
            damaged.append(str(error))
    if damaged:
        said = f"{phase}: {len(damaged)} of {len(chosen)} decoded images are damaged, the first is {damaged[0]}"
        yield red(AREA, said, "python tools/prepare_data.py scan DATA lists all")
        return
    speed = 1000 * (time.perf_counter() - began) / len(chosen)
    yield green(AREA, f"{phase}: {len(chosen)} images decode, {speed:.0f} ms each")
    special = [index.path(int(image)) for image in images if index.special[image]]
    for sentence in look_at_units(special, dataset.bits, index.exif):
        said, _, todo = sentence.partition(": ")
        yield yellow(AREA, f"{phase}: {said}", todo)


def image_paths(dataset: Any) -> set[str]:
    """The image files of one of our data sets, with links resolved; empty for other data sets."""
    if not hasattr(dataset, "index"):
        return set()
    return {str(Path(dataset.index.path(int(image))).resolve()) for image in dataset.images}
