"""Kaggle tables in all their dialects, and real images through three readers."""

import numpy as np
import pytest

from helpers.data_formats import assert_same_objects, truth
from helpers.data_sets import STRIPS, class_masks, reader, rows_of, write_kaggle
from sam2_lora_ext.data.index import build_index
from sam2_lora_ext.data.kaggle import KaggleReader
from sam2_lora_ext.data.supervisely import SuperviselyReader


def test_real_images_are_the_same_through_three_tables(real_data):
    images = real_data / "severstal/train_images"
    new = build_index(KaggleReader(images, real_data / "severstal/train.csv"))
    old = build_index(KaggleReader(images, real_data / "severstal/train_old_format.csv"))
    ninja = build_index(SuperviselyReader(real_data / "severstal_supervisely", "train"))
    assert len(new) == len(old) == 9 and len(ninja) == 6
    assert new.names() == old.names()
    np.testing.assert_array_equal(new.runs, old.runs)
    np.testing.assert_array_equal(new.mask_class, old.mask_class)
    assert [new.name(image) for image in np.flatnonzero(new.clean())] == [
        "000789191.jpg",
        "005b92582.jpg",
        "017d75655.jpg",
    ]
    assert ninja.class_names == {1: "defect_1", 2: "defect_2", 3: "defect_3", 4: "defect_4"}
    assert_same_objects(new, ninja, ninja.names())


@pytest.mark.parametrize("absent", ["", "nan", "NaN", "-1", "0 0", "1 1"])
def test_every_way_of_saying_no_mask(tmp_path, absent):
    write_kaggle(tmp_path)
    new = build_index(reader(tmp_path))
    lines = [
        *rows_of(STRIPS),
        *(f"{name},{class_id},{absent}" for name in ("c.jpg", "e.jpg") for class_id in range(1, 5)),
    ]
    (tmp_path / "train.csv").write_text("\n".join(["ImageId,ClassId,EncodedPixels", *lines, ""]))
    assert (build_index(reader(tmp_path)).runs == new.runs).all()
    rows = {tuple(line.split(",")[:2]): line.split(",")[2] for line in rows_of(STRIPS)}
    old = [
        f"{name}_{class_id},{rows.get((name, str(class_id)), absent)}" for name in STRIPS for class_id in range(1, 5)
    ]
    (tmp_path / "train.csv").write_text("\n".join(["ImageId_ClassId,EncodedPixels", *old, ""]))
    index = build_index(reader(tmp_path))
    assert (index.runs == new.runs).all() and index.clean().tolist() == new.clean().tolist()


def test_clean_rows_and_float_classes_as_pandas_writes_them(tmp_path):
    write_kaggle(tmp_path)
    lines = [line.replace(",", ".0,", 2).replace(".0,", ",", 1) for line in rows_of(STRIPS)]
    assert ",1.0," in lines[0]
    (tmp_path / "train.csv").write_text(
        "\n".join(["ImageId,ClassId,EncodedPixels", *lines, "c.jpg,,", "e.jpg,nan,nan", ""])
    )
    index = build_index(reader(tmp_path))
    assert index.clean().tolist() == [False, False, True, False, True, False]
    assert sorted(set(index.mask_class.tolist())) == [1, 2, 3, 4]


def test_table_dialects(tmp_path):
    """BOM, CRLF, quotes, shuffled and further columns, blank lines, names with spaces, commas and umlauts."""
    strips = {
        "ein Blech, grün.jpg": STRIPS["a.jpg"],
        "鋼_1.png": STRIPS["b.jpg"],
        "c.bmp": [],
        "d.TIF": STRIPS["d.jpg"],
    }
    write_kaggle(tmp_path, strips)
    plain = [line.rsplit(",", 2) for line in rows_of(strips)]
    lines = [
        "note,EncodedPixels, ImageId ,ClassId",
        *(f'"say ""x"", y","{rle}","{name}",{class_id}' for name, class_id, rle in plain),
    ]
    (tmp_path / "train.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*lines, "", ""]).encode())
    found = truth(build_index(reader(tmp_path)))
    assert set(found) == set(strips)
    for name, boxes in strips.items():
        expected = class_masks(boxes)
        assert set(found[name]) == set(expected)
        for class_id, mask in expected.items():
            np.testing.assert_array_equal(found[name][class_id], mask)
    old = [f'"{name}_{class_id}",{rle}' for name, class_id, rle in plain]
    (tmp_path / "train.csv").write_text("\n".join(["ImageId_ClassId,EncodedPixels", *old, ""]), encoding="utf-8")
    assert set(truth(build_index(reader(tmp_path)))["鋼_1.png"]) == {4}
