"""Supervisely folders in every variant of their bitmaps, titles and splits."""

import base64
import io
import json
import zlib

import numpy as np
import pytest
from PIL import Image

from helpers.data_formats import assert_same_objects, make_supervisely
from helpers.data_sets import HEIGHT, STRIPS, WIDTH, reader, write_kaggle
from sam2_lora_ext.data.index import build_index
from sam2_lora_ext.data.rle import decode_runs
from sam2_lora_ext.data.supervisely import SuperviselyReader
from sam2_lora_ext.data.supervisely_bitmap import decode_bitmap, encode_bitmap
from sam2_lora_ext.utils.errors import UserError


def png_bitmap(mode, compress, **save):
    """An encoder that writes the whole mask as a PNG of one mode."""

    def encode(mask):
        grey = Image.fromarray(mask.astype(np.uint8) * 255)
        if mode == "RGBA":
            image = Image.merge("RGBA", (*[Image.new("L", grey.size, 200)] * 3, grey))
        elif mode == "LA":
            image = Image.merge("LA", (Image.new("L", grey.size), grey))
        elif mode == "RGBA opaque":
            image = grey.convert("RGBA")
        elif mode == "P":
            image = Image.fromarray(mask.astype(np.uint8)).convert("P")
            image.putpalette([9, 9, 9, 200, 10, 10])
        else:
            image = grey.convert(mode)
        file = io.BytesIO()
        image.save(file, format="PNG", **save)
        data = zlib.compress(file.getvalue()) if compress else file.getvalue()
        return {"data": base64.b64encode(data).decode(), "origin": [0, 0]}

    return encode


@pytest.mark.parametrize(
    "encode",
    [
        encode_bitmap,
        png_bitmap("RGBA", True),
        png_bitmap("RGBA", False),
        png_bitmap("P", True),
        png_bitmap("P", False, transparency=0),
        png_bitmap("L", True),
        png_bitmap("1", True),
        png_bitmap("LA", False),
        png_bitmap("RGB", True),
        png_bitmap("RGBA opaque", True),
    ],
    ids=[
        "ours",
        "rgba",
        "rgba raw",
        "palette",
        "palette transparent raw",
        "grey",
        "one bit",
        "black alpha raw",
        "rgb",
        "opaque",
    ],
)
def test_supervisely_bitmaps(tmp_path, encode):
    make_supervisely(tmp_path / "s", encode=encode)
    write_kaggle(tmp_path / "k")
    assert_same_objects(build_index(SuperviselyReader(tmp_path / "s")), build_index(reader(tmp_path / "k")), STRIPS)


def test_bitmap_round_trip_and_border():
    rng = np.random.default_rng(1)
    mask = rng.random((13, 17)) < 0.3
    entry = encode_bitmap(mask)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    assert entry["origin"] == [columns[0], rows[0]]
    np.testing.assert_array_equal(
        decode_bitmap(entry["data"]), mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    )


def test_supervisely_bitmap_over_the_border_is_cut(tmp_path):
    make_supervisely(tmp_path)
    path = tmp_path / "train/ann/c.jpg.json"
    big = encode_bitmap(np.ones((10, 10), bool))["data"]
    corners = [[-4, -7], [WIDTH - 3, HEIGHT - 2]]
    path.write_text(
        json.dumps(
            {"objects": [{"classTitle": "defect_2", "bitmap": {"data": big, "origin": corner}} for corner in corners]}
        )
    )
    index = build_index(SuperviselyReader(tmp_path))
    expected = np.zeros((HEIGHT, WIDTH), bool)
    expected[:3, :6] = expected[-2:, -3:] = True
    union = np.logical_or.reduce([decode_runs(runs, HEIGHT, WIDTH) > 0 for _, runs in index.masks(2)])
    np.testing.assert_array_equal(union, expected)


@pytest.mark.parametrize(
    ("folder", "split"),
    [
        ("train", "train"),
        ("train_images", "train"),
        ("train_split", "train"),
        ("val_split", "val"),
        ("test_split", "test_split"),
        ("test", None),
    ],
)
def test_supervisely_split_folders(tmp_path, folder, split):
    make_supervisely(tmp_path, folder)
    assert build_index(SuperviselyReader(tmp_path, split)).names() == sorted(STRIPS)


def test_supervisely_all_splits_and_unknown_split(tmp_path):
    make_supervisely(tmp_path, "train_split")
    make_supervisely(tmp_path, "val_split")
    assert build_index(SuperviselyReader(tmp_path)).names() == [
        f"{split}/img/{name}" for split in ("train_split", "val_split") for name in sorted(STRIPS)
    ]
    assert build_index(SuperviselyReader(tmp_path / "val_split")).names() == sorted(STRIPS)
    with pytest.raises(UserError, match="no split 'test'.*train_split, val_split"):
        SuperviselyReader(tmp_path, "test")


def test_supervisely_titles_without_numbers(tmp_path):
    make_supervisely(tmp_path)
    titles = ["pit", "slit", "scratch", "patch"]
    (tmp_path / "meta.json").write_text(json.dumps({"classes": [{"title": title} for title in titles]}))
    for path in (tmp_path / "train/ann").iterdir():
        text = path.read_text()
        for number, title in enumerate(titles, 1):
            text = text.replace(f"defect_{number}", title)
        path.write_text(text)
    index = build_index(SuperviselyReader(tmp_path))
    assert index.class_names == dict(enumerate(titles, 1))
    write_kaggle(tmp_path / "k")
    assert_same_objects(index, build_index(reader(tmp_path / "k")), STRIPS)
