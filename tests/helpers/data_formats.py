"""The strips of `data_sets` in the other formats, and comparisons of what readers find."""

import json

import numpy as np

from helpers.data_sets import HEIGHT, STRIPS, WIDTH, class_masks, write_image
from sam2_lora_ext.data.objects import make_objects
from sam2_lora_ext.data.rle import decode_runs
from sam2_lora_ext.data.supervisely_bitmap import encode_bitmap


def truth(index):
    """name -> class -> mask, of all masks."""
    return {
        index.name(image): {
            class_id: decode_runs(runs, *index.sizes[image]) > 0 for class_id, runs in index.masks(image)
        }
        for image in range(len(index))
    }


def assert_same_objects(one, other, names):
    for mode in ("components", "classes", "all"):
        tables = [make_objects(index, mode) for index in (one, other)]
        for name in names:
            found = []
            for index, table in zip((one, other), tables):
                image = index.names().index(name)
                places = range(*table.offsets[image : image + 2])
                found.append(
                    [
                        (
                            int(table.ids[place]),
                            int(table.areas[place]),
                            table.boxes[place].tolist(),
                            table.runs_of(place).tolist(),
                        )
                        for place in places
                    ]
                )
            assert found[0] == found[1], (mode, name)


def make_supervisely(folder, split="train", encode=encode_bitmap):
    for part in ("img", "ann"):
        (folder / split / part).mkdir(parents=True)
    titles = [{"title": f"defect_{number}"} for number in range(1, 5)]
    (folder / "meta.json").write_text(json.dumps({"classes": titles}))
    for name, boxes in STRIPS.items():
        write_image(folder / split / "img" / name)
        objects = []
        for class_id, x0, y0, x1, y1 in boxes:
            mask = np.zeros((HEIGHT, WIDTH), bool)
            mask[y0:y1, x0:x1] = True
            objects.append({"classTitle": f"defect_{class_id}", "bitmap": encode(mask)})
        (folder / split / "ann" / f"{name}.json").write_text(
            json.dumps({"size": {"height": HEIGHT, "width": WIDTH}, "objects": objects})
        )


def make_labels(folder, save):
    for part in ("images", "annotations"):
        (folder / part).mkdir(parents=True)
    for name, boxes in STRIPS.items():
        write_image(folder / "images" / name)
        label = np.zeros((HEIGHT, WIDTH), np.uint8)
        for class_id, mask in class_masks(boxes).items():
            label[mask] = class_id
        save(label, folder / "annotations" / name.replace(".jpg", ".png"))


def make_coco(folder, segmentation):
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for image_id, (name, boxes) in enumerate(STRIPS.items(), 10):
        write_image(folder / "images" / name)
        images.append({"id": image_id, "file_name": name, "height": HEIGHT, "width": WIDTH})
        annotations += [
            {
                "id": len(annotations) + k,
                "image_id": image_id,
                "category_id": 10 * class_id,
                "iscrowd": 0,
                "segmentation": segmentation(box),
            }
            for k, (class_id, *box) in enumerate(boxes)
        ]
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 10 * number, "name": f"defect_{number}"} for number in range(1, 5)],
    }
    (folder / "coco.json").write_text(json.dumps(content))
    return content


def rle_of(box, compressed):
    from pycocotools import mask as mask_utils

    x0, y0, x1, y1 = box
    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    mask[y0:y1, x0:x1] = 1
    if compressed:
        rle = mask_utils.encode(mask)
        return {"size": rle["size"], "counts": rle["counts"].decode()}
    flat = mask.ravel(order="F").tolist()
    counts, value = [0], 0
    for pixel in flat:
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return {"size": [HEIGHT, WIDTH], "counts": counts}
