"""Requirements on image and label files: one page, lossless labels, limited size, not hidden."""

import base64
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from helpers.data_formats import make_supervisely
from helpers.data_sets import STRIPS, write_image, write_kaggle
from helpers.image_files import case, labelled, square
from sam2_lora_ext.data.guess_format import guess_reader
from sam2_lora_ext.data.images import ImageError, list_images, probe, read_rgb, unread
from sam2_lora_ext.data.index import build_index, collect
from sam2_lora_ext.data.label_png import LabelPNGReader
from sam2_lora_ext.data.supervisely_bitmap import BitmapError, decode_bitmap
from sam2_lora_ext.utils.errors import UserError

NOISE = np.random.default_rng(0).integers(0, 256, (40, 60), dtype=np.uint8)


def reader(folder):
    return LabelPNGReader(folder / "images", folder / "annotations", 1)


def problem_of(folder):
    (problem,) = collect(reader(folder)).problems
    return problem


def png_of_size(width, height):
    """A PNG whose header declares a large size but that has little data; 1 bit per pixel."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_a_lossy_label_is_refused_whatever_its_suffix(tmp_path):
    folder = case("jpgmin")
    (problem,) = collect(LabelPNGReader(folder / "images", folder / "masks")).problems
    assert problem.cause == "lossy label" and problem.file.endswith("masks/a.jpg")
    assert "a lossy label image" in problem.sentence and "export it as PNG" in problem.sentence
    for suffix, form, how in (
        (".png", "JPEG", {}),
        (".tif", "TIFF", {"compression": "jpeg"}),
        (".bmp", "WEBP", {}),
        (".jpeg", "MPO", {"save_all": True, "append_images": [Image.new("L", (60, 40))]}),
    ):
        labelled(tmp_path / form, NOISE, square())
        (tmp_path / form / "annotations/a.png").unlink()
        Image.fromarray(square()).save(tmp_path / form / f"annotations/a{suffix}", format=form, **how)
        assert problem_of(tmp_path / form).cause == "lossy label"


def test_a_coloured_label_of_sixteen_bits_is_not_read_as_empty(tmp_path):
    import cv2

    labelled(tmp_path, NOISE, square())
    colours = np.zeros((40, 60, 3), np.uint16)
    colours[5:20, 10:30] = 200
    cv2.imwrite(str(tmp_path / "annotations/a.png"), colours)
    coloured = LabelPNGReader(tmp_path / "images", tmp_path / "annotations", 1, colors={1: [200, 200, 200]})
    (problem,) = collect(coloured).problems
    assert problem.cause == "label mode" and "16 bits a channel; save it with 8" in problem.sentence


@pytest.mark.parametrize(("part", "cause"), [("images", "several pages"), ("annotations", "several pages")])
@pytest.mark.parametrize("suffix", [".tif", ".png"])
def test_several_pages_are_a_problem_with_their_number(tmp_path, part, cause, suffix):
    labelled(tmp_path, NOISE, square())
    (tmp_path / part / "a.png").unlink()
    pages = [Image.fromarray(NOISE if part == "images" else square() * number) for number in (1, 0, 1)]
    pages[0].save(tmp_path / part / f"a{suffix}", save_all=True, append_images=pages[1:])
    problem = problem_of(tmp_path)
    assert problem.cause == cause and problem.file.endswith(f"{part}/a{suffix}")
    assert "has 3 pages, but only one would be read" in problem.sentence


def test_previews_are_no_pages(tmp_path):
    """A TIFF with a preview after the image, and a camera's JPEG with one."""
    image, small = Image.fromarray(NOISE), Image.fromarray(NOISE[::4, ::4].copy())
    stream = io.BytesIO()
    with TiffImagePlugin.AppendingTiffWriter(stream, True) as writer:
        image.save(writer, format="TIFF")
        writer.newFrame()
        small.save(writer, format="TIFF", tiffinfo={254: 1})
    (tmp_path / "a.tif").write_bytes(stream.getvalue())
    np.testing.assert_array_equal(read_rgb(tmp_path / "a.tif")[..., 0], NOISE)
    image.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[small])
    assert probe(tmp_path / "a.jpg") == (40, 60, False)


@pytest.mark.parametrize(("width", "height"), [(100_000, 100_000), (13_378, 13_378)])
def test_too_large_is_said_from_the_header(tmp_path, width, height):
    path = tmp_path / "a.png"
    path.write_bytes(png_of_size(width, height))
    with pytest.raises(
        ImageError, match=f"has {width}x{height} = .* limit of 178,956,970; cut it.*SAM2_LORA_MAX_PIXELS"
    ):
        probe(path)


def test_the_limit_can_be_set(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(png_of_size(20_000, 10_000))
    monkeypatch.setenv("SAM2_LORA_MAX_PIXELS", "200000000")
    assert probe(tmp_path / "a.png") == (10_000, 20_000, True)  # special: SAM 2's own reading stops at PIL's limit
    assert Image.MAX_IMAGE_PIXELS == 89_478_485  # for others it is as it was
    labelled(tmp_path / "d", NOISE, square())
    monkeypatch.setenv("SAM2_LORA_MAX_PIXELS", "2400")
    build_index(reader(tmp_path / "d"))
    monkeypatch.setenv("SAM2_LORA_MAX_PIXELS", "2399")
    problem = problem_of(tmp_path / "d")
    assert problem.cause == "image too large" and "60x40 = 2,400 pixels" in problem.sentence
    for wrong in ("0", "-1", "1e9", "many"):
        monkeypatch.setenv("SAM2_LORA_MAX_PIXELS", wrong)
        with pytest.raises(UserError, match="SAM2_LORA_MAX_PIXELS is a number of pixels, got"):
            collect(reader(tmp_path / "d"))


def test_labels_and_bitmaps_have_the_same_limit(tmp_path):
    labelled(tmp_path, NOISE, square())
    (tmp_path / "annotations/a.png").write_bytes(png_of_size(90_000, 90_000))
    problem = problem_of(tmp_path)
    assert problem.cause == "label too large" and "90000x90000" in problem.sentence
    with pytest.raises(BitmapError, match="90000x90000") as caught:
        decode_bitmap(base64.b64encode(png_of_size(90_000, 90_000)).decode())
    assert caught.value.cause == "bitmap too large"


def test_hidden_files_and_those_of_systems_are_no_images(tmp_path):
    labelled(tmp_path, NOISE, square())
    for part in ("images", "annotations"):
        for name in ("._a.png", ".b.png", "Thumbs.db", "desktop.ini", ".DS_Store"):
            (tmp_path / part / name).write_bytes(b"\0\5\x16\7")
    index = collect(reader(tmp_path))
    assert index.names() == ["a.png"] and not index.problems
    (tmp_path / "images/notes.txt").touch()
    (tmp_path / "images/more").mkdir()
    write_image(tmp_path / "images/c.webp")
    assert list_images(tmp_path / "images") == ["a.png"]
    assert unread(tmp_path / "images", ["a.png"]) == ["c.webp", "more/", "notes.txt"]
    assert unread(tmp_path / "nowhere", []) == []


def test_a_data_set_unpacked_from_a_mac(tmp_path):
    make_supervisely(tmp_path / "s")
    (tmp_path / "s/train/ann/._a.jpg.json").write_bytes(b"\0\5\x16\7")
    (tmp_path / "s/train/img/._a.jpg").write_bytes(b"\0\5\x16\7")
    index = collect(guess_reader(tmp_path / "s"))
    assert len(index) == len(STRIPS) and not index.problems
    write_kaggle(tmp_path / "k")
    (tmp_path / "k/images").rename(tmp_path / "k/pictures")
    (tmp_path / "k/__MACOSX").mkdir()
    (tmp_path / "k/__MACOSX/._a.jpg").write_bytes(b"\0\5\x16\7")
    assert guess_reader(tmp_path / "k").image_dir == tmp_path / "k/pictures"


@pytest.mark.parametrize(("name", "cause"), [("a" * 300, "image unreadable"), ("a\0b", "file name")])
def test_a_name_that_no_file_can_have(tmp_path, name, cause):
    with pytest.raises(ImageError) as caught:
        probe(tmp_path / name)
    assert caught.value.cause == cause and "fetch it again" not in str(caught.value)


def test_a_format_that_no_other_tool_shows_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")  # PIL would start a program
    with pytest.raises(ImageError, match="the file is none of JPEG, PNG, BMP, TIFF"):
        probe(tmp_path / "a.png")
