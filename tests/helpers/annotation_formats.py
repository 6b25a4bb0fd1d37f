"""A small set of strips in every annotation format, for tests that damage one of its files: `file`, read by
`reader`."""

import json

import numpy as np
from PIL import Image

from helpers.data_formats import rle_of
from helpers.data_sets import class_masks
from sam2_lora_ext.data.coco import COCOReader
from sam2_lora_ext.data.kaggle import KaggleReader
from sam2_lora_ext.data.label_png import LabelPNGReader
from sam2_lora_ext.data.rle import encode_mask, format_rle
from sam2_lora_ext.data.supervisely import SuperviselyReader
from sam2_lora_ext.data.supervisely_bitmap import encode_bitmap

NAMES = ["pit", "slit", "scratch"]
SIZE = (40, 200)  # rows, columns
STRIPS = {
    "a.png": [(1, 2, 3, 12, 9), (1, 12, 3, 20, 9), (3, 60, 0, 64, 40)],  # two annotations of class 1 touch
    "b.png": [],
    "c.png": [(2, 100, 10, 190, 30)],
}


def mask_of(box):
    mask = np.zeros(SIZE, bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


class Kaggle:
    """The new table."""

    instances = False

    def __init__(self, folder):
        self.folder, self.file = folder, folder / "train.csv"
        self.file.write_text("\n".join([self.header(), *self.rows(), ""]))

    def header(self):
        return "ImageId,ClassId,EncodedPixels"

    def rows(self):
        return [
            f"{name},{number},{format_rle(encode_mask(mask))}"
            for name, boxes in STRIPS.items()
            for number, mask in class_masks_of(boxes).items()
        ]

    def reader(self):
        return KaggleReader(self.folder / "images", self.file, NAMES, SIZE)


class KaggleOld(Kaggle):
    """The old table, with a row for every image and class."""

    def header(self):
        return "ImageId_ClassId,EncodedPixels"

    def rows(self):
        return [
            f"{name}_{number},{format_rle(encode_mask(class_masks_of(boxes).get(number, np.zeros(SIZE))))}"
            for name, boxes in STRIPS.items()
            for number in (1, 2, 3)
        ]


class COCO:
    """Compressed RLE with area and bbox."""

    instances = True

    def __init__(self, folder):
        self.folder, self.file = folder, folder / "coco.json"
        images = [{"id": n, "file_name": name, "height": 40, "width": 200} for n, name in enumerate(STRIPS, 10)]
        boxes = [(n, *box) for n, boxes in enumerate(STRIPS.values(), 10) for box in boxes]
        annotations = [
            {"id": k, "image_id": n, "category_id": 10 * number, "iscrowd": 0, **self.shape(box)}
            for k, (n, number, *box) in enumerate(boxes, 100)
        ]
        categories = [{"id": 10 * number, "name": name} for number, name in enumerate(NAMES, 1)]
        self.valid = {"images": images, "annotations": annotations, "categories": categories}
        self.file.write_text(json.dumps(self.valid))

    def shape(self, box):
        x0, y0, x1, y1 = box
        return {"area": (x1 - x0) * (y1 - y0), "bbox": [x0, y0, x1 - x0, y1 - y0], "segmentation": rle_of(box, True)}

    def reader(self):
        return COCOReader(self.folder / "images", self.file, NAMES)


class COCOPlain(COCO):
    """RLE as a list of counts."""

    def shape(self, box):
        return {"segmentation": rle_of(box, False)}


class COCOPolygon(COCO):
    """Polygons."""

    def shape(self, box):
        x0, y0, x1, y1 = box
        return {"segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]]}


class Supervisely:
    """A project with one split; the annotation of a.png is damaged."""

    instances = True

    def __init__(self, folder):
        self.folder = folder
        (folder / "train/ann").mkdir(parents=True)
        (folder / "images").rename(folder / "train/img")
        (folder / "meta.json").write_text(json.dumps({"classes": [{"title": name} for name in NAMES]}))
        for name, boxes in STRIPS.items():
            objects = [{"classTitle": NAMES[n - 1], "bitmap": encode_bitmap(mask_of(box))} for n, *box in boxes]
            content = {"size": {"height": 40, "width": 200}, "objects": objects}
            (folder / f"train/ann/{name}.json").write_text(json.dumps(content))
        self.file = folder / "train/ann/a.png.json"
        self.valid = json.loads(self.file.read_text())

    def reader(self):
        return SuperviselyReader(self.folder)


class Labels:
    """Label images; that of a.png is damaged."""

    instances = False

    def __init__(self, folder):
        self.folder, self.file = folder, folder / "labels/a.png"
        (folder / "labels").mkdir()
        for name, boxes in STRIPS.items():
            label = np.zeros(SIZE, np.uint8)
            for number, mask in class_masks_of(boxes).items():
                label[mask] = number
            Image.fromarray(label).save(folder / "labels" / name)

    def reader(self):
        return LabelPNGReader(self.folder / "images", self.folder / "labels", NAMES)


def class_masks_of(boxes):
    return dict(sorted(class_masks(boxes).items()))


def truth(instances):
    """name -> the class and runs of each mask, as the index holds them."""
    return {
        name: sorted(
            (number, encode_mask(mask).tolist())
            for number, mask in (
                [(number, mask_of(box)) for number, *box in boxes] if instances else class_masks_of(boxes).items()
            )
        )
        for name, boxes in STRIPS.items()
    }
