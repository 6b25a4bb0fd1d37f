"""Label images and COCO, and images of every kind."""

import json

import numpy as np
import pytest
from PIL import Image

from helpers.data_formats import assert_same_objects, make_coco, make_labels, rle_of, truth
from helpers.data_sets import HEIGHT, STRIPS, WIDTH, reader, write_image, write_kaggle
from sam2_lora_ext.data.coco import COCOReader
from sam2_lora_ext.data.images import ImageError, read_rgb
from sam2_lora_ext.data.index import build_index
from sam2_lora_ext.data.label_png import LabelPNGReader


def test_neu_seg(real_data):
    folder = real_data / "neu_seg"
    index = build_index(
        LabelPNGReader(folder / "images", folder / "annotations", ["inclusion", "patches", "scratches"])
    )
    assert len(index) == 3630
    label = np.asarray(Image.open(folder / "annotations/000201.png"))
    masks = truth(index)["000201.jpg"]
    assert sorted(masks) == sorted(set(np.unique(label).tolist()) - {0})
    for class_id, mask in masks.items():
        np.testing.assert_array_equal(mask, label == class_id)


COLORS = {1: [255, 0, 0], 2: [0, 255, 0], 3: [0, 0, 255], 4: [9, 9, 9]}


def save_palette(label, path):
    image = Image.fromarray(label).convert("P")
    image.putpalette([0, 0, 0, *(value for color in COLORS.values() for value in color)])
    image.save(path)


def save_colors(label, path):
    table = np.zeros((5, 3), np.uint8)
    table[1:] = list(COLORS.values())
    Image.fromarray(table[label]).save(path)


@pytest.mark.parametrize(
    ("save", "kwargs"),
    [
        (lambda label, path: Image.fromarray(label).save(path), {}),
        (lambda label, path: Image.fromarray(label.astype(np.uint16)).save(path), {}),
        (lambda label, path: Image.fromarray(label).save(path.with_suffix(".tif")), {}),
        (save_palette, {}),
        (save_palette, {"colors": COLORS}),
        (save_colors, {"colors": COLORS}),
    ],
    ids=["grey", "16 bit", "tif", "palette", "palette by colour", "rgb"],
)
def test_label_images(tmp_path, save, kwargs):
    make_labels(tmp_path / "l", save)
    write_kaggle(tmp_path / "k")
    index = build_index(LabelPNGReader(tmp_path / "l/images", tmp_path / "l/annotations", **kwargs))
    assert_same_objects(index, build_index(reader(tmp_path / "k")), STRIPS)
    assert index.clean().sum() == 2


@pytest.mark.parametrize(
    "segmentation",
    [
        lambda box: rle_of(box, True),
        lambda box: rle_of(box, False),
        lambda box: [[box[0], box[1], box[2], box[1], box[2], box[3], box[0], box[3]]],
    ],
    ids=["compressed", "plain", "polygon"],
)
def test_coco(tmp_path, segmentation):
    make_coco(tmp_path / "c", segmentation)
    write_kaggle(tmp_path / "k")
    classes = ["defect_1", "defect_2", "defect_3", "defect_4"]
    index = build_index(COCOReader(tmp_path / "c/images", tmp_path / "c/coco.json", classes))
    assert_same_objects(index, build_index(reader(tmp_path / "k")), STRIPS)
    assert build_index(COCOReader(tmp_path / "c/images", tmp_path / "c/coco.json")).class_names == {
        10: "defect_1",
        20: "defect_2",
        30: "defect_3",
        40: "defect_4",
    }


def test_coco_crowd_and_files_that_are_not_listed(tmp_path):
    content = make_coco(tmp_path, lambda box: rle_of(box, False))
    write_image(tmp_path / "images/other.jpg")
    for annotation in content["annotations"]:
        annotation["iscrowd"] = int(annotation["image_id"] == 11)  # b.jpg has just that one
    (tmp_path / "coco.json").write_text(json.dumps(content))
    with_crowd = build_index(COCOReader(tmp_path / "images", tmp_path / "coco.json"))
    assert with_crowd.names() == sorted(STRIPS)
    without = build_index(COCOReader(tmp_path / "images", tmp_path / "coco.json", crowd=False))
    assert without.names() == [
        name for name in sorted(STRIPS) if name != "b.jpg"
    ]  # not clean, though nothing is left of it


@pytest.mark.parametrize(
    ("suffix", "mode"),
    [
        (".jpg", "L"),
        (".jpg", "RGB"),
        (".png", "RGB"),
        (".png", "L"),
        (".png", "RGBA"),
        (".png", "P"),
        (".png", "1"),
        (".bmp", "L"),
        (".bmp", "RGB"),
        (".tif", "L"),
        (".tiff", "RGB"),
        (".png", "LA"),
        (".jpg", "CMYK"),
    ],
)
def test_image_kinds(tmp_path, suffix, mode):
    (tmp_path / "images").mkdir()
    write_image(tmp_path / "grey.png")
    Image.open(tmp_path / "grey.png").convert(mode).save(tmp_path / f"images/x{suffix}")
    (tmp_path / "train.csv").write_text(f"ImageId,ClassId,EncodedPixels\nx{suffix},1,1 5\n")
    index = build_index(reader(tmp_path))
    assert index.sizes.tolist() == [[HEIGHT, WIDTH]] and not index.special[0]
    assert read_rgb(index.path(0)).shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bit(tmp_path, suffix):
    (tmp_path / "images").mkdir()
    values = np.arange(HEIGHT * WIDTH, dtype=np.uint16).reshape(HEIGHT, WIDTH) * 8
    Image.fromarray(values).save(tmp_path / f"images/x{suffix}")
    (tmp_path / "train.csv").write_text(f"ImageId,ClassId,EncodedPixels\nx{suffix},1,1 5\n")
    index = build_index(reader(tmp_path))
    assert index.special[0]
    np.testing.assert_array_equal(read_rgb(index.path(0))[..., 1], values >> 8)
    with pytest.raises(ImageError, match="63,992 does not fit into 12 bits"):
        read_rgb(index.path(0), bits=12)
