"""Writes an index as COCO or Supervisely: an entry for each instance, or for each component if there are no instances.

Converting COCO to COCO keeps the ids, areas, boxes and iscrowd of annotations, and the ids of images and categories.
New ids replace those that are negative, not integers or repeated, and category ids that would change class numbers.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils
from tqdm import tqdm

from sam2_lora_ext.data.coco_names import number_categories
from sam2_lora_ext.data.index import AnnotationIndex
from sam2_lora_ext.data.objects import ObjectTable, make_objects
from sam2_lora_ext.data.rle import decode_runs, to_coco_counts
from sam2_lora_ext.data.supervisely_bitmap import encode_bitmap

COLORS = ("#E6194B", "#3CB44B", "#FFE119", "#0082C8", "#F58231", "#911EB4")


def write_supervisely(index: AnnotationIndex, names: list[str], folder: Path, progress: bool) -> None:
    """Writes `meta.json`, `train/img/` and `train/ann/` with an entry for each object; existing ids are kept."""
    objects = make_objects(index)
    classes = [
        {
            "title": index.class_names[number],
            "shape": "bitmap",
            "color": COLORS[position % len(COLORS)],
            "id": number,
            "geometry_config": {},
            "hotkey": "",
        }
        for position, number in enumerate(sorted(index.class_names))
    ]
    _json(folder / "meta.json", {"classes": classes, "tags": [], "projectType": "images"})
    for image, name in enumerate(progress_bar(names, progress)):
        height, width = index.sizes[image].tolist()
        entries = [
            {
                **({"id": int(objects.annotation[position])} if objects.annotation[position] >= 0 else {}),
                "classTitle": index.class_names[objects.class_of(position)],
                "description": "",
                "tags": [],
                "bitmap": encode_bitmap(decode_runs(objects.runs_of(position), height, width) > 0),
                "geometryType": "bitmap",
                "shape": "bitmap",
            }
            for position in range(*objects.offsets[image : image + 2])
        ]
        _json(
            folder / "train/ann" / f"{name}.json",
            {"description": "", "tags": [], "size": {"height": height, "width": width}, "objects": entries},
        )


def write_coco(index: AnnotationIndex, names: list[str], folder: Path, progress: bool) -> None:
    """Writes `images/` and `annotations.json` with a compressed RLE for each object, and its `area` and `bbox`."""
    objects = make_objects(index)
    crowd = index.mask_crowd if objects.mode == "instances" else np.zeros(len(objects), dtype=bool)
    ids, image_ids, categories = _ids(objects.annotation), _ids(index.image_id), _category_ids(index)
    annotations = []
    for image, class_id, position in places(objects):
        height, width = index.sizes[image].tolist()
        plain = {"size": [height, width], "counts": to_coco_counts(objects.runs_of(position), height, width)}
        rle = mask_utils.frPyObjects(plain, height, width)
        x0, y0, x1, y1 = objects.boxes[position].tolist()
        annotations.append(
            {
                "id": ids[position],
                "image_id": image_ids[image],
                "category_id": categories[class_id],
                "iscrowd": int(crowd[position]),
                "area": int(objects.areas[position]),
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "segmentation": {"size": [height, width], "counts": rle["counts"].decode("ascii")},
            }
        )
    images = [
        {"id": image_ids[image], "file_name": name, "height": height, "width": width}
        for (image, name), (height, width) in zip(enumerate(names), index.sizes.tolist(), strict=True)
    ]
    table = [{"id": categories[number], "name": name} for number, name in sorted(index.class_names.items())]
    _json(folder / "annotations.json", {"images": images, "categories": table, "annotations": annotations})


def _ids(source: np.ndarray) -> list[int]:
    """An id for each entry: its own if it has one that no earlier entry has, else the next free one."""
    taken: set[int] = set()
    result: list[int | None] = []
    for number in source.tolist():
        result.append(number if number >= 0 and number not in taken else None)
        taken.add(number)
    free = max(taken, default=0)
    for position, number in enumerate(result):
        if number is None:
            free = max(free, 0) + 1
            result[position] = free
    return result


def _category_ids(index: AnnotationIndex) -> dict[int, int]:
    """Class number -> category id: those of the source if every class has one and they give the same class numbers."""
    ids = {number: index.class_source.get(number, -1) for number in index.class_names}
    if min(ids.values()) >= 0 and len(set(ids.values())) == len(ids):
        categories = [{"id": ids[number], "name": name} for number, name in index.class_names.items()]
        if number_categories(categories, ids.values(), None, index.image_dir)[0] == index.class_names:
            return ids
    return {number: number for number in index.class_names}


def places(objects: ObjectTable) -> list[tuple[int, int, int]]:
    """(image, class, position in the table) of each object."""
    return [
        (image, objects.class_of(position), position)
        for image in range(len(objects.offsets) - 1)
        for position in range(*objects.offsets[image : image + 2])
    ]


def progress_bar(names: list[str], progress: bool) -> Iterable[str]:
    """The names, with a progress bar over the images."""
    return tqdm(names, desc="annotations", unit="image", disable=not progress)


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False) + "\n", encoding="utf-8")
