"""An index written out in each format that the readers know; what is read back gives the same objects.

A whole data set is written beside its place and then renamed, so a folder is there complete or not at all.
"""

import csv
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image
from pycocotools import mask as mask_utils
from tqdm import tqdm

from sam2_lora_ext.data.folders import refuse_folder, refuse_inputs, write_folder
from sam2_lora_ext.data.index import AnnotationIndex
from sam2_lora_ext.data.objects import ObjectTable, make_objects
from sam2_lora_ext.data.rle import decode_runs, format_rle, to_coco_counts
from sam2_lora_ext.data.supervisely import encode_bitmap
from sam2_lora_ext.errors import UserError

Write = Callable[[AnnotationIndex, list[str], Path, bool], None]


def write_kaggle(index: AnnotationIndex, names: list[str], folder: Path, progress: bool) -> None:
    """`train_images/` and `train.csv`, a row for each mask."""
    masks = make_objects(index, "classes")
    rows = [(names[image], class_id, format_rle(masks.runs_of(place))) for image, class_id, place in _places(masks)]
    _table(folder / "train.csv", ["ImageId", "ClassId", "EncodedPixels"], rows)


def write_kaggle_old(index: AnnotationIndex, names: list[str], folder: Path, progress: bool) -> None:
    """`train_images/` and `train.csv` with a row for each image and class, empty where there is no mask."""
    masks = make_objects(index, "classes")
    texts = {(image, class_id): format_rle(masks.runs_of(place)) for image, class_id, place in _places(masks)}
    _table(
        folder / "train.csv",
        ["ImageId_ClassId", "EncodedPixels"],
        [
            (f"{name}_{class_id}", texts.get((image, class_id), ""))
            for image, name in enumerate(names)
            for class_id in sorted(index.class_names)
        ],
    )


def write_label_png(index: AnnotationIndex, names: list[str], folder: Path, progress: bool) -> None:
    """`images/` and `annotations/`: the class number as grey value.

    Raises:
        UserError: classes overlap, are above 255, or two images have one stem: label images cannot say that.
    """
    if max(index.class_names) > 255:
        raise UserError(f"a label image holds classes up to 255, the data has class {max(index.class_names)}")
    if len({Path(name).stem for name in names}) < len(names):
        raise UserError("two images differ in their suffix alone, so they would share a label image; rename one")
    for image, name in enumerate(_bar(names, progress)):
        height, width = index.sizes[image].tolist()
        label = np.zeros((height, width), dtype=np.uint8)
        for class_id, runs in index.masks(image):
            mask = decode_runs(runs, height, width) > 0
            other = label[mask & (label != 0) & (label != class_id)]
            if len(other):
                raise UserError(
                    f"classes {class_id} and {int(other[0])} overlap in {name}, which a label image cannot hold; "
                    "choose another format"
                )
            label[mask] = class_id
        Image.fromarray(label).save(folder / "annotations" / f"{Path(name).stem}.png")


def write_supervisely(index: AnnotationIndex, names: list[str], folder: Path, progress: bool) -> None:
    """`meta.json`, `train/img/` and `train/ann/`, an object for each 8-connected component."""
    objects = make_objects(index, "components")
    colors = ["#E6194B", "#3CB44B", "#FFE119", "#0082C8", "#F58231", "#911EB4"]
    classes = [
        {
            "title": index.class_names[number],
            "shape": "bitmap",
            "color": colors[place % len(colors)],
            "id": number,
            "geometry_config": {},
            "hotkey": "",
        }
        for place, number in enumerate(sorted(index.class_names))
    ]
    _json(folder / "meta.json", {"classes": classes, "tags": [], "projectType": "images"})
    for image, name in enumerate(_bar(names, progress)):
        height, width = index.sizes[image].tolist()
        entries = [
            {
                "classTitle": index.class_names[objects.class_of(place)],
                "description": "",
                "tags": [],
                "bitmap": encode_bitmap(decode_runs(objects.runs_of(place), height, width) > 0),
                "geometryType": "bitmap",
                "shape": "bitmap",
            }
            for place in range(*objects.offsets[image : image + 2])
        ]
        _json(
            folder / "train/ann" / f"{name}.json",
            {"description": "", "tags": [], "size": {"height": height, "width": width}, "objects": entries},
        )


def write_coco(index: AnnotationIndex, names: list[str], folder: Path, progress: bool) -> None:
    """`images/` and `annotations.json`, a compressed RLE for each 8-connected component."""
    objects = make_objects(index, "components")
    annotations = []
    for number, (image, class_id, place) in enumerate(_places(objects), 1):
        height, width = index.sizes[image].tolist()
        plain = {"size": [height, width], "counts": to_coco_counts(objects.runs_of(place), height, width)}
        rle = mask_utils.frPyObjects(plain, height, width)
        x0, y0, x1, y1 = objects.boxes[place].tolist()
        annotations.append(
            {
                "id": number,
                "image_id": image + 1,
                "category_id": class_id,
                "iscrowd": 0,
                "area": int(objects.areas[place]),
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "segmentation": {"size": [height, width], "counts": rle["counts"].decode("ascii")},
            }
        )
    images = [
        {"id": image + 1, "file_name": name, "height": int(index.sizes[image, 0]), "width": int(index.sizes[image, 1])}
        for image, name in enumerate(names)
    ]
    categories = [{"id": number, "name": name} for number, name in sorted(index.class_names.items())]
    _json(folder / "annotations.json", {"images": images, "categories": categories, "annotations": annotations})


FORMATS: dict[str, tuple[Write, str, tuple[str, ...]]] = {  # writer, image folder, further folders
    "kaggle": (write_kaggle, "train_images", ()),
    "kaggle_old": (write_kaggle_old, "train_images", ()),
    "supervisely": (write_supervisely, "train/img", ("train/ann",)),
    "label_png": (write_label_png, "images", ("annotations",)),
    "coco": (write_coco, "images", ()),
}


def convert(
    index: AnnotationIndex,
    kind: str,
    out: str | Path,
    force: bool = False,
    progress: bool = True,
    inputs: Sequence[str | Path] = (),
) -> int:
    """Writes a data set; the image files are copied as they are.

    Args:
        index: what to write; images that lost a mask as invalid are left out, since nobody could tell.
        kind: a key of `FORMATS`.
        out: the folder to make.
        force: replace it if it exists; see `write_folder`.
        progress: show a bar.
        inputs: what the index was read from besides its images; `out` may not contain or lie in any of it.

    Returns:
        The number of images left out.
    """
    write, image_folder, others = FORMATS[kind]
    refuse_inputs(Path(out), [index.image_dir, *inputs, *map(index.path, range(len(index)))])
    refuse_folder(Path(out), force)
    chosen = np.flatnonzero(index.complete)
    left_out = len(index) - len(chosen)
    if left_out:
        index = index.subset(chosen)
    names = [PurePosixPath(name).name for name in index.names()]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{twice} stands in several folders of the data; convert one split at a time")

    def fill(folder: Path) -> None:
        for name in (image_folder, *others):
            (folder / name).mkdir(parents=True)
        write(index, names, folder, progress)
        for image, name in enumerate(tqdm(names, desc="images", unit="image", disable=not progress)):
            shutil.copy2(index.path(image), folder / image_folder / name)

    write_folder(out, fill, force)
    return left_out


def _bar(names: list[str], progress: bool) -> Iterable[str]:
    return tqdm(names, desc="annotations", unit="image", disable=not progress)


def _places(objects: ObjectTable) -> list[tuple[int, int, int]]:
    """(image, class, place in the table) of each object."""
    return [
        (image, objects.class_of(place), place)
        for image in range(len(objects.offsets) - 1)
        for place in range(*objects.offsets[image : image + 2])
    ]


def _table(path: Path, header: list[str], rows: list[tuple]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(header)
        table.writerows(rows)


def _json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False) + "\n", encoding="utf-8")
