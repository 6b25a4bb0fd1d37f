"""Images with an orientation tag: masks are where viewers and labelling tools show them, in every tool."""

import json
import logging
import shutil

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from helpers.data_formats import truth
from helpers.data_sets import video_dataset
from helpers.image_files import case, labelled, save_stored, square
from sam2_lora_ext.data.cache import cached_index, fingerprint
from sam2_lora_ext.data.coco import COCOReader
from sam2_lora_ext.data.dataset import SeverstalRawDataset
from sam2_lora_ext.data.decode import decode
from sam2_lora_ext.data.images import probe, read_rgb
from sam2_lora_ext.data.index import build_index, collect
from sam2_lora_ext.data.kaggle import KaggleReader
from sam2_lora_ext.data.label_png import LabelPNGReader, read_label
from sam2_lora_ext.data.scan import scan
from sam2_lora_ext.data.scan_text import overlay
from sam2_lora_ext.data.supervisely import SuperviselyReader
from sam2_lora_ext.data.writers import convert
from sam2_lora_ext.deploy.stock import read_pixels
from sam2_lora_ext.evaluate.predictor import read_sample

SUFFIXES = [".jpg", ".png", ".tif", ".webp"]


def scene(height=40, width=60):
    """uint8 [H, W, 3] that no rotation or reflection maps to itself."""
    small = np.random.default_rng(1).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)


def turned_strip(folder, tag):
    """The case `exif3`, and the same image stored for another orientation."""
    source = case("exif3")
    upright = read_rgb(source / "images/a.jpg")
    for part in ("images", "masks"):
        (folder / part).mkdir()
    shutil.copy(source / "masks/a.png", folder / "masks")
    if tag == 3:
        shutil.copy(source / "images/a.jpg", folder / "images")
    else:
        save_stored(folder / "images/a.jpg", upright, tag, quality=100, subsampling=0)
    return LabelPNGReader(folder / "images", folder / "masks", 1)


@pytest.mark.parametrize("tag", [3, 6])
def test_masks_lie_on_the_defect_on_all_paths(tmp_path, tag):
    reader = turned_strip(tmp_path, tag)
    data = SeverstalRawDataset(reader, training=False)
    assert data.index.sizes.tolist() == [[256, 1600]] and data.index.special[0]
    (mask,) = truth(data.index)["a.jpg"].values()
    means = {"read": data.index.read(0)[mask].mean()}

    (frame,) = video_dataset(data, num_frames=1)[0].frames  # as SAM 2's data set hands it on
    means["training, whole"] = np.asarray(frame.data)[frame.objects[0].segment.numpy() > 0].mean()
    windows = {"width": 512, "stride": 256, "num_frames": 2}
    moving = SeverstalRawDataset(reader, training=False, windows=windows)
    frame = video_dataset(moving, num_frames=2)[0].frames[0]
    means["training, windows"] = np.asarray(frame.data)[frame.objects[0].segment.numpy() > 0].mean()
    sample = read_sample(data, 0, 512)
    means["evaluation"] = sample.image[sample.masks[0, 0].numpy()].mean()
    pixels = read_pixels(tmp_path / "images/a.jpg", 320)[0].mean(0).numpy() * 255  # of merge --verify and ONNX
    means["one image"] = pixels[30:70, 22:38].mean()  # rows 20..60 of 256, columns 100..200 of 1600, without the edge
    assert all(value == pytest.approx(250, abs=4) for value in means.values()), means
    shown = np.asarray(overlay(data.index, 0))
    assert np.abs(shown[mask].mean(0) - (0.55 * 250 + 0.45 * np.array([230, 25, 75]))).max() < 4


def test_duplicates_are_found_whatever_the_orientation(tmp_path):
    for number, tag in enumerate((1, 3, 6)):
        labelled(tmp_path, None, square(), f"{number}.png")
        save_stored(tmp_path / f"images/{number}.png", scene(), tag)
    summary, _ = scan(LabelPNGReader(tmp_path / "images", tmp_path / "annotations", 1), progress=False)
    assert summary["duplicates"]["exact"] == [["0.png", "1.png", "2.png"]] and summary["turned"] == 2


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("tag", range(1, 9))
def test_every_orientation_in_every_format(tmp_path, suffix, tag):
    path = tmp_path / f"a{suffix}"
    how = {".jpg": {"quality": 100, "subsampling": 0}, ".webp": {"lossless": True}}
    save_stored(path, scene(), tag, **how.get(suffix, {}))
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    np.testing.assert_array_equal(read_rgb(path), expected)
    assert np.abs(expected.astype(int) - scene()).max() <= 6 * (suffix == ".jpg")  # its loss
    assert probe(path) == (40, 60, tag != 1)
    if suffix in (".jpg", ".png"):
        np.testing.assert_allclose(read_rgb(path), cv2.imread(str(path))[..., ::-1], atol=2)  # two JPEG decoders

    stored = read_rgb(path, exif=False)
    assert probe(path, exif=False) == (*stored.shape[:2], tag != 1)
    assert stored.shape[:2] == ((60, 40) if tag > 4 else (40, 60))
    upright = ImageOps.exif_transpose(_tagged(stored, tag))
    np.testing.assert_array_equal(np.asarray(upright), expected)


def _tagged(pixels, tag):
    image = Image.fromarray(pixels)
    image.getexif()[274] = tag
    return image


def test_the_tag_of_a_png_may_stand_behind_its_pixels(tmp_path):
    save_stored(tmp_path / "a.png", scene(), 6)
    content = (tmp_path / "a.png").read_bytes()
    start = content.index(b"eXIf") - 4
    stop = start + 12 + int.from_bytes(content[start : start + 4], "big")
    end = content.index(b"IEND") - 4
    (tmp_path / "late.png").write_bytes(content[:start] + content[stop:end] + content[start:stop] + content[end:])
    assert probe(tmp_path / "late.png") == (40, 60, True)
    np.testing.assert_array_equal(read_rgb(tmp_path / "late.png"), scene())


def test_deep_images_and_labels_are_turned_too(tmp_path):
    values = np.arange(2400, dtype=np.uint16).reshape(40, 60)
    for suffix in (".png", ".tif"):
        save_stored(tmp_path / f"deep{suffix}", values, 8)
        np.testing.assert_array_equal(decode(tmp_path / f"deep{suffix}"), values)
        save_stored(tmp_path / f"label{suffix}", square(), 6)
        np.testing.assert_array_equal(read_label(tmp_path / f"label{suffix}"), square())
        assert read_label(tmp_path / f"label{suffix}", exif=False).shape == (60, 40)


def test_a_damaged_tag_counts_as_none(tmp_path):
    Image.fromarray(scene()).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert probe(tmp_path / "a.jpg") == (40, 60, False)
    save_stored(tmp_path / "b.jpg", scene(), 9)
    assert probe(tmp_path / "b.jpg") == (40, 60, False)


def test_xmp_does_not_turn(tmp_path):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
    for name, how in (("a.tif", {"tiffinfo": {700: xmp}}), ("a.jpg", {"xmp": xmp, "quality": 100})):
        Image.fromarray(scene()).save(tmp_path / name, **how)
        assert probe(tmp_path / name) == (40, 60, False) and read_rgb(tmp_path / name).shape == (40, 60, 3)


def test_where_sizes_differ_the_tag_is_named(tmp_path):
    """The annotations are for the image as it is stored; `exif: false` then reads them."""
    labelled(tmp_path, None, np.rot90(square()))
    save_stored(tmp_path / "images/a.png", scene(), 6)
    (tmp_path / "train.csv").write_text("ImageId,ClassId,EncodedPixels\na.png,1,1 5\n")
    coco = {
        "images": [{"id": 1, "file_name": "a.png", "height": 60, "width": 40}],
        "categories": [{"id": 1, "name": "pit"}],
        "annotations": [],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    (tmp_path / "s/img").mkdir(parents=True)
    (tmp_path / "s/ann").mkdir()
    shutil.copy(tmp_path / "images/a.png", tmp_path / "s/img/a.png")
    (tmp_path / "s/ann/a.png.json").write_text(json.dumps({"size": {"height": 60, "width": 40}, "objects": []}))
    readers = (
        lambda exif: LabelPNGReader(tmp_path / "images", tmp_path / "annotations", 1, exif=exif),
        lambda exif: KaggleReader(tmp_path / "images", tmp_path / "train.csv", size=(60, 40), exif=exif),
        lambda exif: COCOReader(tmp_path / "images", tmp_path / "coco.json", exif=exif),
        lambda exif: SuperviselyReader(tmp_path / "s", classes=1, exif=exif),
    )
    for make in readers:
        (problem,) = collect(make(True)).problems
        assert "a.png has the EXIF orientation tag 6, and was turned" in problem.sentence
        assert "set dataset.exif: false" in problem.sentence
        index = collect(make(False))
        assert not index.problems and index.sizes.tolist() == [[60, 40]] and not index.exif
        assert index.read(0).shape == (60, 40, 3)


def test_a_stored_index_is_of_one_rule(tmp_path):
    labelled(tmp_path, None, square(40, 40))
    save_stored(tmp_path / "images/a.png", scene(40, 40), 3)
    readers = [LabelPNGReader(tmp_path / "images", tmp_path / "annotations", 1, exif=exif) for exif in (True, False)]
    assert fingerprint(readers[0]) != fingerprint(readers[1])
    for _ in range(2):  # built, then loaded
        for reader in readers:
            index = cached_index(reader, cache_dir=tmp_path / "cache")
            assert index.exif == reader.exif
            np.testing.assert_array_equal(index.read(0), read_rgb(tmp_path / "images/a.png", exif=reader.exif))


def test_convert_says_what_the_copy_needs(tmp_path, caplog):
    labelled(tmp_path, None, square())
    save_stored(tmp_path / "images/a.png", scene(), 3)
    for exif in (True, False):
        index = build_index(LabelPNGReader(tmp_path / "images", tmp_path / "annotations", 1, exif=exif))
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            convert(index, "label_png", tmp_path / f"copy_{exif}", progress=False)
        assert ("read the copy with dataset.exif=false too" in caplog.text) == (not exif)
        copy = tmp_path / f"copy_{exif}"
        again = build_index(LabelPNGReader(copy / "images", copy / "annotations", 1, exif=exif))
        np.testing.assert_array_equal(again.read(0), index.read(0))
        np.testing.assert_array_equal(again.runs, index.runs)
