"""Files that are cut off or changed: the right pixels and masks, or a refusal; never others.

Truncation is tried at every byte, a changed bit wherever a format has a checksum (PNG; TIFF with deflate), and numbers
in a TIFF's tags. A change to a valid file with another meaning is not detected: pixels of BMP, GIF, JPEG, WebP, and
of TIFF without a checksum, its size, its photometric interpretation.
"""

import base64
import io
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, TiffImagePlugin

from helpers.image_files import labelled, square
from sam2_lora_ext.data.decode import decode
from sam2_lora_ext.data.images import ImageError, probe, read_rgb
from sam2_lora_ext.data.index import collect
from sam2_lora_ext.data.label_png import LabelPNGReader
from sam2_lora_ext.data.supervisely_bitmap import BitmapError, decode_bitmap, encode_bitmap

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of what it reads over in damaged TIFFs
GREY = np.random.default_rng(0).integers(0, 256, (11, 17), dtype=np.uint8)
LABEL = square()[::2, ::2].copy()
KINDS = {
    "png": ("PNG", {}),
    "bmp": ("BMP", {}),
    "gif": ("GIF", {}),
    "jpg": ("JPEG", {}),
    "webp": ("WEBP", {"lossless": True}),
    "tif": ("TIFF", {}),
    "lzw": ("TIFF", {"compression": "tiff_lzw"}),
    "deflate": ("TIFF", {"compression": "tiff_adobe_deflate"}),
    "packbits": ("TIFF", {"compression": "packbits"}),
}
DEPTHS = {"8 bits": GREY, "16 bits": GREY.astype(np.uint16) * 250, "label": LABEL}


def written(kind, pixels):
    form, how = KINDS[kind]
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format=form, **how)
    return stream.getvalue()


def outcome(content, take=decode):
    """The pixels, or None for a refusal."""
    try:
        return take(content if take is decode_bitmap else io.BytesIO(content))
    except (ImageError, BitmapError):
        return None


def same_or_refused(content, expected, take=decode):
    found = outcome(content, take)
    assert found is None or np.array_equal(found, expected)
    return found is None


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_cut_off(kind, depth):
    pixels = DEPTHS[depth]
    if pixels.dtype == np.uint16 and KINDS[kind][0] not in ("PNG", "TIFF"):
        pytest.skip("8 bits only")
    content = written(kind, pixels)
    expected = decode(io.BytesIO(content))
    refused = [same_or_refused(content[:length], expected) for length in range(len(content))]
    assert sum(refused) >= len(refused) - 8  # what follows the last pixel may be missing


@pytest.mark.parametrize("kind", ["png", "deflate"])
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_changed_bit_where_there_is_a_checksum(kind, data):
    content = bytearray(written(kind, LABEL))
    expected = decode(io.BytesIO(bytes(content)))
    first, last = 0, len(content)
    if kind == "deflate":  # a TIFF's tags have no checksum
        with Image.open(io.BytesIO(content)) as image:
            first = image.tag_v2[273][0]
            last = first + sum(image.tag_v2[279])
    content[data.draw(st.integers(first, last - 1))] ^= 1 << data.draw(st.integers(0, 7))
    same_or_refused(bytes(content), expected)


@pytest.mark.parametrize("kind", ["tif", "lzw", "deflate", "packbits"])
def test_a_tiff_whose_tags_do_not_fit_its_pixels(kind, monkeypatch):
    """Rows of a strip, offsets of strips, bits of a sample: with a wrong number decoders leave pixels black or read
    other bytes."""
    monkeypatch.setattr(TiffImagePlugin, "STRIP_SIZE", 30 * 4)
    form, how = KINDS[kind]
    if kind == "tif":
        how = {"tiffinfo": {278: 4}}
    stream = io.BytesIO()
    Image.fromarray(LABEL).save(stream, format=form, **how)
    content = stream.getvalue()
    expected = decode(io.BytesIO(content))
    start = int.from_bytes(content[4:8], "little")
    refused = 0
    for entry in range(int.from_bytes(content[start : start + 2], "little")):
        place = start + 2 + 12 * entry
        tag = int.from_bytes(content[place : place + 2], "little")
        fields = {258: range(8, 12), 273: range(4, 8), 278: range(8, 12), 279: range(4, 8)}.get(tag, ())
        for byte in fields:
            for bit in range(8):
                changed = bytearray(content)
                changed[place + byte] ^= 1 << bit
                refused += same_or_refused(bytes(changed), expected)
    assert refused >= 30
    without = bytearray(content)
    place = content.index(b"\x06\x01\x03\0")  # PhotometricInterpretation: is 0 black or white?
    without[place : place + 2] = b"\x0e\x01"
    assert outcome(bytes(without)) is None


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_bitmap_of_supervisely(data):
    text = encode_bitmap(LABEL > 0)["data"]
    expected = decode_bitmap(text)
    if data.draw(st.booleans()):
        same_or_refused(text[: data.draw(st.integers(0, len(text) - 1))], expected, decode_bitmap)
    raw = bytearray(base64.b64decode(text))
    if data.draw(st.booleans()):
        raw = bytearray(zlib.decompress(raw))  # the bare PNG
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    same_or_refused(base64.b64encode(raw).decode(), expected, decode_bitmap)


@pytest.mark.parametrize("part", ["images", "annotations"])
def test_a_data_set_with_a_file_that_is_cut_off(tmp_path, part):
    """Through the reader: the image is a problem or right, and never clean."""
    labelled(tmp_path, np.repeat(np.repeat(GREY, 4, 0), 4, 1)[:40, :60], square())
    reader = LabelPNGReader(tmp_path / "images", tmp_path / "annotations", 1)
    whole = collect(reader)
    path = tmp_path / part / "a.png"
    content = path.read_bytes()
    for length in range(0, len(content), 1 + len(content) // 60):
        path.write_bytes(content[:length])
        index = collect(reader)
        assert not index.clean().any() and (index.problems or np.array_equal(index.runs, whole.runs))


def test_damage_is_told_apart_from_a_wrong_kind(tmp_path):
    content = written("png", GREY)
    (tmp_path / "a.png").write_bytes(content[:60] + bytes([content[60] ^ 1]) + content[61:])
    for call in (read_rgb, lambda path: probe(path, full=True)):
        with pytest.raises(ImageError, match="cannot be decoded .*; fetch it again") as caught:
            call(tmp_path / "a.png")
        assert caught.value.cause == "image damaged"
