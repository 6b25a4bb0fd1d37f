"""Pixel values of images: floats, 12 bits in 16, 16-bit colours, 32 bits; read correctly or refused."""

import json
import logging

import cv2
import numpy as np
import pytest
import torch
import track_strip
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from helpers.data_sets import video_dataset
from helpers.image_files import case, labelled, square
from sam2_lora_ext.data.dataset import SeverstalRawDataset
from sam2_lora_ext.data.images import ImageError, probe, read_rgb
from sam2_lora_ext.data.index import build_index, collect
from sam2_lora_ext.data.label_png import LabelPNGReader
from sam2_lora_ext.data.units import LOOKED_AT, unit_warning
from sam2_lora_ext.doctor.data import decode_some
from sam2_lora_ext.evaluate.predictor import evaluate, read_sample
from sam2_lora_ext.host.configs import config_root
from sam2_lora_ext.utils.errors import UserError

SIDE = 40 * 60


def reader(folder, **kwargs):
    return LabelPNGReader(folder / "images", folder / "annotations", 1, **kwargs)


def twelve_bits(folder, most=3900, count=1):
    """`count` images of uint16 with values up to `most`."""
    values = np.linspace(900, most, SIDE).reshape(40, 60).astype(np.uint16)
    for number in range(count):
        labelled(folder, values, square(), f"{number:03}.png")
    return values


def test_floats_in_0_to_1_are_scaled(tmp_path):
    values = np.linspace(0.3, 0.95, SIDE, dtype=np.float32).reshape(40, 60)
    labelled(tmp_path, None, square())
    Image.fromarray(values).save(tmp_path / "images/a.tif")
    data = SeverstalRawDataset(reader(tmp_path), training=False)
    assert data.index.special[0]
    expected = np.rint(values * 255).astype(np.uint8)
    np.testing.assert_array_equal(data.index.read(0)[..., 1], expected)
    frame = data.get_video(0)[0].frames[0].data
    np.testing.assert_array_equal((frame.numpy() * 255).astype(np.uint8)[2], expected)


@pytest.mark.parametrize(
    ("most", "words"),
    [(250.0, "0.3..250"), (np.inf, "not all finite"), (np.nan, "not all finite"), (-0.1, "-0.1..0.3")],
)
def test_other_floats_are_refused_when_the_data_is_read(tmp_path, most, words):
    values = np.full((40, 60), 0.3, np.float32)
    values[3, 4] = most
    labelled(tmp_path, None, square())
    Image.fromarray(values).save(tmp_path / "images/a.tif")
    (problem,) = [problem for problem in collect(reader(tmp_path)).problems if problem.cause == "float values"]
    assert words in problem.sentence and "save the image with 8 or 16 bits" in problem.sentence


def test_floats_in_colour_are_refused_by_name(tmp_path):
    cv2.imwrite(str(tmp_path / "a.tif"), np.full((40, 60, 3), 0.5, np.float32))
    with pytest.raises(ImageError, match="floats in colour, 64 bits.*save it again with 8 or 16 bits"):
        probe(tmp_path / "a.tif")


def test_twelve_bits_in_sixteen_are_said_everywhere(tmp_path, caplog, run_python, repository):
    values = twelve_bits(tmp_path, count=3)
    sentence = "the largest value of 3 images is 3,900 of 65,535: set dataset.bits=12 (--bits 12)"
    with caplog.at_level(logging.WARNING):
        data = SeverstalRawDataset(reader(tmp_path))
    assert sentence in caplog.text
    assert sorted(finding.level for finding in decode_some("train", data)) == ["green", "yellow"]
    assert [f"{f.text}: {f.advice}" for f in decode_some("train", data) if f.level == "yellow"] == [
        f"train: {sentence}"
    ]
    done = run_python(
        [repository / "tools/prepare_data.py", "scan", tmp_path, "--classes", "pit", "--out", tmp_path / "scan"],
        check=True,
    )
    assert sentence in done.stdout
    assert json.loads((tmp_path / "scan/scan.json").read_text())["units"] == [sentence]
    assert sentence in (tmp_path / "scan/scan.html").read_text()

    caplog.clear()
    data = SeverstalRawDataset(reader(tmp_path), bits=12)
    assert not caplog.records and [finding.level for finding in decode_some("train", data)] == ["green"]
    np.testing.assert_array_equal(data.index.read(0, 12)[..., 0], values >> 4)


@pytest.mark.parametrize(
    ("largest", "bits", "depth"),
    [(3900, 16, 12), (4095, 16, 12), (4096, 16, 14), (200, 16, 8), (900, 12, 10), (16384, 16, None), (4095, 12, None)],
)
def test_the_depth_that_is_meant(largest, bits, depth):
    said = unit_warning(largest, 1, bits)
    assert said is None if depth is None else said.endswith(f"set dataset.bits={depth} (--bits {depth})")


def test_the_tracker_says_so_too_and_takes_its_own_mistakes_alone_for_a_click(tmp_path, monkeypatch, capsys):
    twelve_bits(tmp_path)
    words = ["--checkpoint", "none.pt", "--image", str(tmp_path / "images/000.png"), "--out", str(tmp_path / "o.png")]
    with pytest.raises(UserError, match="there is no file none.pt"):
        track_strip.main([*words, "--click", "5,5"])
    assert "000.png: the largest value of 1 image is 3,900 of 65,535: set dataset.bits=12" in capsys.readouterr().out
    monkeypatch.setenv("SAM2_LORA_MAX_PIXELS", "abc")
    with pytest.raises(UserError, match="SAM2_LORA_MAX_PIXELS is a number"):
        track_strip.main([*words, "--click", "5,5"])


def test_at_most_64_images_are_looked_at_when_training_starts(tmp_path, monkeypatch, caplog):
    decoded = []
    monkeypatch.setattr(
        "sam2_lora_ext.data.units.decode", lambda path, exif: decoded.append(path) or np.full((2, 2), 9, np.uint16)
    )
    twelve_bits(tmp_path, count=LOOKED_AT + 6)
    SeverstalRawDataset(reader(tmp_path))
    assert len(set(decoded)) == len(decoded) == LOOKED_AT
    assert f"the largest value of {LOOKED_AT} images is 9 of 65,535: set dataset.bits=8" in caplog.text


def test_a_value_that_does_not_fit_is_named_and_not_clipped(tmp_path):
    twelve_bits(tmp_path, most=4096)
    with pytest.raises(UserError, match=r"000\.png: its value 4,096 does not fit into 12 bits.*at least 13"):
        SeverstalRawDataset(reader(tmp_path), bits=12)
    with pytest.raises(UserError, match=r"000\.png: its value 4,096"):
        build_index(reader(tmp_path)).read(0, 12)


def test_a_value_that_turns_up_in_training_stops_it(tmp_path):
    """SAM 2's data set replaces a sample after many errors; this error must be raised, with the file's name."""
    twelve_bits(tmp_path, most=4095)
    samples = video_dataset(SeverstalRawDataset(reader(tmp_path), bits=12), num_frames=1)
    assert samples[0].frames[0].data.size == (60, 40)
    twelve_bits(tmp_path, most=4200)
    with pytest.raises(UserError, match=r"000\.png: its value 4,200"):
        samples[0]


@pytest.mark.parametrize("bits", [7, 17, 0, -1, 12.0, True, "12", None])
def test_a_depth_is_in_8_to_16(tmp_path, bits):
    with pytest.raises(UserError, match="dataset.bits must be a whole number from 8 to 16, got"):
        SeverstalRawDataset(reader(tmp_path), bits=bits)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [3, 4])
def test_colours_of_sixteen_bits_keep_all_bits(tmp_path, suffix, channels):
    values = (np.arange(SIDE * channels).reshape(40, 60, channels) % 4096).astype(np.uint16)
    path = tmp_path / f"a{suffix}"
    cv2.imwrite(str(path), values)
    assert probe(path) == (40, 60, True)
    np.testing.assert_array_equal(read_rgb(path, 12), values[..., 2::-1] >> 4)
    np.testing.assert_array_equal(read_rgb(path), values[..., 2::-1] >> 8)
    with pytest.raises(ImageError, match="does not fit into 11 bits"):
        read_rgb(path, 11)


@pytest.mark.parametrize(("value", "words"), [(70_000, "70,000"), (-1, "-1")])
def test_integers_of_32_bits_must_fit_too(tmp_path, value, words):
    values = np.full((40, 60), 30_000, np.int32)
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert (read_rgb(tmp_path / "a.tif") == 30_000 >> 8).all()
    values[0, 0] = value
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match=f"value {words} does not fit into 16 bits"):
        probe(tmp_path / "a.tif")


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("LA", ".png"),
        ("P", ".png"),
        ("RGBA", ".png"),
        ("1", ".png"),
        ("1", ".tif"),
        ("CMYK", ".jpg"),
        ("CMYK", ".tif"),
        ("P", ".bmp"),
        ("YCbCr", ".jpg"),
        ("YCbCr", ".tif"),
    ],
)
def test_other_modes_look_as_opencv_shows_them(tmp_path, mode, suffix):
    small = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    path = tmp_path / f"a{suffix}"
    Image.fromarray(cv2.resize(small, (90, 60))).convert(mode).save(path)
    shown = cv2.imread(str(path))[..., ::-1].astype(int)
    assert np.abs(read_rgb(path) - shown).max() <= 1  # rounding of CMYK and YCbCr
    assert probe(path) == (60, 90, False)  # so SAM 2's data set, which uses PIL, may read it
    with Image.open(path) as image:
        np.testing.assert_array_equal(read_rgb(path), np.asarray(image.convert("RGB")))


def test_sixteen_bits_evaluated_are_their_eight_bit_twin(tmp_path):
    folder = case("deep1")
    with Image.open(folder / "images/a.png") as image, Image.open(folder / "masks/a.png") as label:
        labelled(tmp_path, (np.asarray(image) >> 8).astype(np.uint8), np.asarray(label))
    torch.manual_seed(0)
    model = instantiate(OmegaConf.load(config_root() / "configs/sam2_nano.yaml").model).eval()
    rows = []
    for images, labels in ((folder / "images", folder / "masks"), (tmp_path / "images", tmp_path / "annotations")):
        data = SeverstalRawDataset(LabelPNGReader(images, labels), training=False)
        rows.append(evaluate(model, [read_sample(data, 0, None), read_sample(data, 0, 128)], clicks=2))
    assert rows[0] == rows[1] and len(rows[0]) == 2
