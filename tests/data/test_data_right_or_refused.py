"""Damaged annotations of every format: the right masks or a refusal; never fewer objects, never a clean strip.

Truncation is tried at every byte (of JSON at every third), damage to syntax at every position with syntax, damage to
structure at every value of a JSON, and changed bits in data with a checksum. Data read without a problem must be
complete; with `on_invalid: skip`, an image that counts as complete or clean must be so.

Changes that give a valid file with another meaning cannot be detected and are not tried: rows lost at a line's end of a
new Kaggle table (a clean image has no row), or of an old one within its first image; other digits in a number, and
another name of an image or class; an entry removed from a JSON list; coordinates of a polygon, and of an RLE whose
annotation has neither `area` nor `bbox`; a pixel of a label in a format without a checksum; the `origin` of a
Supervisely bitmap that remains inside its image.
"""

import base64
import json
import random

import pytest

from helpers.annotation_formats import (
    COCO,
    STRIPS,
    COCOPlain,
    COCOPolygon,
    Kaggle,
    KaggleOld,
    Labels,
    Supervisely,
    truth,
)
from helpers.data_sets import write_image
from sam2_lora_ext.data.index import collect
from sam2_lora_ext.utils.errors import UserError

KINDS = [Kaggle, KaggleOld, COCO, COCOPlain, COCOPolygon, Supervisely, Labels]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request, tmp_path):
    (tmp_path / "images").mkdir()
    for number, name in enumerate(STRIPS):
        write_image(tmp_path / "images" / name, 17 * number)
    made = request.param(tmp_path)
    assert right(made)
    return made


def right(kind):
    """True: everything was read, and right; False: refused. Anything else fails."""
    expected = truth(kind.instances)
    try:
        index = collect(kind.reader())
    except UserError:
        return False
    found = {
        index.name(image): sorted((number, runs.tolist()) for number, runs in index.masks(image))
        for image in range(len(index))
    }
    if not index.problems:
        assert found == expected and index.complete.all() and not index.unknown
        return True
    for image, (name, masks) in enumerate(found.items()):  # with on_invalid: skip
        assert not index.complete[image] or masks == expected[name], f"{name} is not whole"
    assert not set(index.unknown) & set(found)
    return False


def try_all(kind, contents):
    """Feeds the contents, each damaged; returns how many were refused."""
    refused = 0
    for content in contents:
        kind.file.write_bytes(content)
        refused += not right(kind)
    return refused


def test_truncation(kind):
    whole = kind.file.read_bytes()
    starts = {Kaggle: whole.count(b"\n"), KaggleOld: 3}.get(type(kind), 0)  # lines whose loss at the end is not seen
    step = 3 if kind.file.suffix == ".json" else 1
    contents = [whole[:length] for length in range(0, len(whole), step)]
    contents = [cut for cut in contents if not (cut.endswith(b"\n") and cut.count(b"\n") <= starts)]
    refused = try_all(kind, contents)
    after_the_pixels = 12 if isinstance(kind, Labels) else 0  # bytes that no pixel needs
    assert refused >= len(contents) - after_the_pixels


def test_syntax(kind):
    """A syntax character removed, doubled or inserted elsewhere; bytes that are not text."""
    whole = kind.file.read_bytes()
    signs = {".csv": b',\n"', ".json": b'{}[],:"', ".png": b""}[kind.file.suffix]
    places = [place for place, byte in enumerate(whole) if byte in signs]
    contents = [whole[:place] + whole[place + 1 :] for place in places]
    contents += [whole[:place] + whole[place : place + 1] + whole[place:] for place in places]
    draw = random.Random(5)
    contents = draw.sample(contents, min(300, len(contents)))
    for place in draw.sample(range(len(whole)), min(60, len(whole))):
        for extra in (b"\xff", b"\0", b'"', b"\n"):
            contents.append(whole[:place] + extra + whole[place:])
    try_all(kind, contents)


def test_structure(kind):
    """A value of the JSON replaced by another kind of value, a key taken out, an object's key given twice."""
    if not hasattr(kind, "valid"):
        pytest.skip("no JSON")
    contents = []
    for path in paths(kind.valid):
        *above, last = path
        for wrong in (None, "x", -1, 1.5, True, {}, "gone"):
            if isinstance(last, int) and wrong == "gone" or numeric(kind.valid, path) and wrong in (-1, 1.5, True):
                continue  # valid files of another meaning
            content = json.loads(json.dumps(kind.valid))
            place = value_of(content, above)
            if wrong == "gone":
                del place[last]
            else:
                place[last] = wrong
            contents.append(json.dumps(content).encode())
        if isinstance(last, str):
            text = json.dumps(kind.valid)
            value = json.dumps(value_of(kind.valid, path))
            contents.append(text.replace(f'"{last}": {value}', f'"{last}": {value}, "{last}": {value}', 1).encode())
    try_all(kind, contents)


def paths(value, path=()):
    """The path of every value except the root and the names of images and classes."""
    inner = value.items() if isinstance(value, dict) else list(enumerate(value))[:6] if isinstance(value, list) else ()
    for key, part in inner:
        if key not in ("name", "file_name", "classTitle"):
            yield (*path, key)
            yield from paths(part, (*path, key))


def value_of(content, path):
    for key in path:
        content = content[key]
    return content


def numeric(valid, path):
    """Whether a path leads into numbers that any number may replace: a polygon's coordinates, a bitmap's origin."""
    free = {"segmentation", "origin"} & set(path) and not {"counts", "size"} & set(path)
    return bool(free) and isinstance(value_of(valid, path), int | float)


def test_counts_of_a_compressed_rle(kind):
    """They must sum to the pixels of the image, which no single character can change unseen."""
    if type(kind) is not COCO:
        pytest.skip("no compressed RLE")
    counts = kind.valid["annotations"][0]["segmentation"]["counts"]
    contents = []
    for place in range(len(counts)):
        for sign in "05@PZ`m":
            if sign != counts[place]:
                kind.valid["annotations"][0]["segmentation"]["counts"] = counts[:place] + sign + counts[place + 1 :]
                contents.append(json.dumps(kind.valid).encode())
    assert try_all(kind, contents) == len(contents)


def test_checksums(kind):
    """A changed bit inside of what a checksum covers."""
    draw = random.Random(7)
    if isinstance(kind, Labels):
        whole = kind.file.read_bytes()
        contents = []
        for place in range(8, len(whole)):
            contents.append(whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :])
        try_all(kind, contents)
    elif isinstance(kind, Supervisely):
        data = bytearray(base64.b64decode(kind.valid["objects"][0]["bitmap"]["data"]))
        contents = []
        for place in range(len(data)):
            changed = bytearray(data)
            changed[place] ^= 1 << draw.randrange(8)
            kind.valid["objects"][0]["bitmap"]["data"] = base64.b64encode(changed).decode()
            contents.append(json.dumps(kind.valid).encode())
        try_all(kind, contents)
    else:
        pytest.skip("no checksum")
