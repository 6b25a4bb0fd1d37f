"""Broken Kaggle data: one sentence with file and row for each, all in one pass; `skip` drops only broken entries."""

import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from helpers.data_sets import STRIPS, WIDTH, reader, rows_of, write_image, write_kaggle
from sam2_lora_ext.data.index import build_index, collect, remarks
from sam2_lora_ext.data.records import Problem
from sam2_lora_ext.utils.errors import UserError

HEADER = "ImageId,ClassId,EncodedPixels"

ROWS = rows_of(STRIPS)  # row 2: a.jpg,1  3: a.jpg,3  4: b.jpg,4  5: d.jpg,2  6: d.jpg,3  7: f.jpg,3


@dataclass
class Case:
    """A damage to a valid set, `damage(folder)`, and the expected message."""

    name: str
    damage: Callable[[Path], None]
    cause: str
    row: int | None = None  # of the table
    file: str = "train.csv"  # what the place ends with
    lost: tuple[str, ...] = ()  # images that are left out
    kept_masks: int | None = None  # of a.jpg
    doubt: bool = False  # any image may have lost a row: none is whole, and none without a good row is clean


def table(*lines: str, header: str = HEADER, end: str = "\n") -> Callable[[Path], None]:
    return lambda folder: (folder / "train.csv").write_text("\n".join([header, *lines]) + end, encoding="utf-8")


def row(number: int, line: str) -> Callable[[Path], None]:
    """Replaces one line, counted from 1 with the header."""
    return table(*[line if place == number else old for place, old in enumerate(ROWS, 2)])


def image(name: str, content: bytes | Callable[[Path], object] | None) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "images" / name
        path.unlink(missing_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            content(path)

    return damage


def cut_short(path: Path) -> None:
    write_image(path)
    path.write_bytes(path.read_bytes()[:-200])


def cut_png(path: Path) -> None:
    write_image(path.with_suffix(".png"))
    path.write_bytes(path.with_suffix(".png").read_bytes()[:-100])
    path.with_suffix(".png").unlink()


def picture(content: bytes | Callable[[Path], object] | None) -> Callable[[Path], None]:
    return image("a.jpg", content)


def latin(line: str) -> Callable[[Path], None]:
    """Replaces the last row by one that is not UTF-8."""

    def damage(folder: Path) -> None:
        (folder / "train.csv").write_bytes("\n".join([HEADER, *ROWS[:5], line, ""]).encode("latin-1"))

    return damage


NO_ROW = {"lost": ("c.jpg", "e.jpg", "f.jpg"), "doubt": True}  # any image without a good row
A = {"file": "a.jpg", "lost": ("a.jpg",)}  # said of the image, not of a row


KAGGLE = [
    Case("cut off inside a run", row(7, ROWS[5].rsplit(" ", 1)[0]), "RLE odd", 7, lost=("f.jpg",)),
    Case("cut off inside a row", table(*ROWS[:5], "f.jpg,3", end=""), "row length", 7, **NO_ROW),
    Case("cut off inside quotes", table(*ROWS[:5], '"f.jpg,3,1 5', end=""), "csv syntax", 7, **NO_ROW),
    Case("cut off inside a number", table(*ROWS[:5], "f.jpg,3,1 5", end=""), "row cut", 7, **NO_ROW),
    Case("cut off before the mask", table(*ROWS[:5], "f.jpg,3,", end=""), "row cut", 7, **NO_ROW),
    Case("cut off inside a name", table(*ROWS[:5], "f.j", end=""), "row length", 7, **NO_ROW),
    Case("a quote that swallows a row", table(*ROWS[:5], 'f.jpg,3,"1 5', 'c.jpg,3,1 5"'), "csv syntax", 7, **NO_ROW),
    Case("not UTF-8 in the name", latin("\xe9.jpg,3,1 5"), "not UTF-8", 7, **NO_ROW),
    Case("not UTF-8 in the mask", latin("f.jpg,3,1 5\xe9"), "not UTF-8", 7, lost=("f.jpg",)),
    Case("too many fields", row(3, ROWS[1] + ",x"), "row length", 3, kept_masks=1),
    Case("id in another case", row(7, "F.JPG,3,1 5"), "image id", 7, lost=("f.jpg",)),
    Case("id with another suffix", row(7, "f.png,3,1 5"), "image id", 7, lost=("f.jpg",)),
    Case("id without a suffix", row(7, "f,3,1 5"), "image id", 7, lost=("f.jpg",)),
    Case("cut by a spreadsheet", row(3, "a.jpg,3,1 5 " + "9" * 32763), "RLE cut by a spreadsheet", 3, kept_masks=1),
    Case("rounded by a spreadsheet", row(3, "a.jpg,3,1.2E+05 5"), "RLE changed by a spreadsheet", 3, kept_masks=1),
    Case("quoted commas in the run-length code", row(3, 'a.jpg,3,"1,5"'), "RLE not integers", 3, kept_masks=1),
    Case("unknown class", row(3, "a.jpg,7,1 5"), "unknown class", 3, kept_masks=1),
    Case("class zero", row(3, "a.jpg,0,1 5"), "unknown class", 3, kept_masks=1),
    Case("class that is a word", row(3, "a.jpg,three,1 5"), "unknown class", 3, kept_masks=1),
    Case("half a class", row(3, "a.jpg,2.5,1 5"), "unknown class", 3, kept_masks=1),
    Case("no class but a mask", row(3, "a.jpg,,1 5"), "unknown class", 3, kept_masks=1),
    Case("past the end", row(3, "a.jpg,3,7999 3"), "RLE out of range", 3, kept_masks=1),
    Case("far past the end", row(3, "a.jpg,3,99999999999999999999 3"), "RLE out of range", 3, kept_masks=1),
    Case("start zero", row(3, "a.jpg,3,0 3"), "RLE out of range", 3, kept_masks=1),
    Case("zero length", row(3, "a.jpg,3,5 0"), "RLE length", 3, kept_masks=1),
    Case("negative length", row(3, "a.jpg,3,5 -2"), "RLE length", 3, kept_masks=1),
    Case("overlapping runs", row(3, "a.jpg,3,5 4 7 3"), "RLE overlap", 3, kept_masks=1),
    Case("runs that go back", row(3, "a.jpg,3,50 4 7 3"), "RLE order", 3, kept_masks=1),
    Case("odd count", row(3, "a.jpg,3,5 4 7"), "RLE odd", 3, kept_masks=1),
    Case("letters", row(3, "a.jpg,3,abc"), "RLE not integers", 3, kept_masks=1),
    Case("a broken mask on an image with no other", row(4, "b.jpg,4,5 0"), "RLE length", 4, lost=("b.jpg",)),
    Case("two rows for one pair", row(3, "a.jpg,1,85 2"), "rows overlap", 3, kept_masks=1),
    Case("a mask and none for one pair", row(3, "a.jpg,1,"), "duplicate row", 3, kept_masks=1),
    Case("image missing", picture(None), "image missing", 2, lost=("a.jpg",)),
    Case("path with ..", row(7, "../f.jpg,3,1 5"), "image id", 7, lost=("f.jpg",)),
    Case("absolute path", row(7, "/etc/f.jpg,3,1 5"), "image id", 7, lost=("f.jpg",)),
    Case("empty name", row(7, ",3,1 5"), "no image name", 7, **NO_ROW),
    Case("zero bytes", picture(b""), "image empty", **A),
    Case("text renamed", picture(b"hello, I am no picture\n" * 9), "not an image", **A),
    Case("truncated JPEG", picture(cut_short), "image damaged", **A),
    Case("header only", picture(b"\xff\xd8\xff\xe0\0\x10JFIF"), "image damaged", **A),
    Case("truncated PNG", picture(cut_png), "image damaged", **A),
    Case(
        "a PNG of another size", picture(lambda path: Image.new("L", (WIDTH, 10)).save(path, "PNG")), "image size", **A
    ),
    Case("a link that leads to itself", picture(lambda path: path.symlink_to(path.name)), "link loop", **A),
    Case("a link to nothing", picture(lambda path: path.symlink_to("gone.jpg")), "image missing", **A),
    Case("a folder with an image's name", picture(lambda path: path.mkdir()), "not a file", **A),
]


@pytest.mark.parametrize("case", KAGGLE, ids=lambda case: case.name)
def test_broken_kaggle_data(tmp_path, case, caplog):
    folder = write_kaggle(tmp_path / "ein Ordner, ü")
    whole = build_index(reader(folder))
    case.damage(folder)
    with pytest.raises(UserError) as caught:
        build_index(reader(folder))
    first, place, *others = str(caught.value).splitlines()
    assert not others and "1 invalid entries" in first and case.cause in first and "(--on-invalid skip)" in first
    assert f"{case.file}{'' if case.row is None else f', row {case.row}'}: " in place
    with caplog.at_level(logging.WARNING):
        index = build_index(reader(folder), "skip")
    said = [record.getMessage().removeprefix(f"{folder / 'images'}: ") for record in caplog.records]
    assert said[0] == f"skipped 1 invalid entries: 1 {case.cause}"
    assert said[1:] == remarks(index)
    (problem,) = index.problems
    assert isinstance(problem, Problem) and problem.cause == case.cause and len(problem.sentence) > 20
    assert index.names() == [name for name in whole.names() if name not in case.lost]
    there = [name for name in case.lost if os.path.lexists(folder / "images" / name)]
    assert list(index.unknown) == there and not set(there) & set(index.names())
    if case.doubt:
        assert not index.complete.any() and not index.clean().any()
    elif case.kept_masks is None:
        assert index.complete.all()
    if case.kept_masks is not None:
        assert len(index.masks(index.names().index("a.jpg"))) == case.kept_masks
        assert not index.complete[index.names().index("a.jpg")] and index.complete[1:].all()
    same = [name for name in index.names() if name not in ("a.jpg", "f.jpg")]
    for name in same:
        (old, new) = (
            sorted((c, runs.tolist()) for c, runs in one.masks(one.names().index(name))) for one in (whole, index)
        )
        assert old == new


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("ImageId,EncodedPixels", "ImageId,ClassId,EncodedPixels"),
        ("Image,Class,Pixels", "rename the columns"),
        ("ImageId;ClassId;EncodedPixels", "rename the columns"),
        ("ImageId,ImageId,ClassId,EncodedPixels", "rename the columns"),
        ("", "the header"),
    ],
)
def test_wrong_header(tmp_path, header, words):
    table(*ROWS, header=header)(write_kaggle(tmp_path / "k"))
    for how in ("error", "skip"):
        with pytest.raises(UserError, match=words):
            build_index(reader(tmp_path / "k"), how)


def test_folders_and_files_that_are_not_there(tmp_path):
    folder = write_kaggle(tmp_path / "k")
    (folder / "train.csv").rename(folder / "away.csv")
    with pytest.raises(UserError, match="cannot read .*train.csv"):
        build_index(reader(folder))
    (folder / "train.csv").write_bytes("ImageId,ClassId,EncodedPixels\né.jpg,1,1 5\n".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        build_index(reader(folder))
    for path in (folder / "images").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="holds no image"):
        build_index(reader(folder), "skip")
    (folder / "images").rmdir()
    with pytest.raises(UserError, match="cannot list the image folder"):
        build_index(reader(folder), "skip")


def test_no_read_permission():
    """Root may read everything, so the test temporarily runs as the user nobody."""
    with tempfile.TemporaryDirectory() as name:
        folder = write_kaggle(Path(name) / "k")
        (folder / "images/a.jpg").chmod(0)
        Path(name).chmod(0o755)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            problems = collect(reader(folder)).problems
        finally:
            os.seteuid(user)
    assert [problem.cause for problem in problems] == ["no permission"]


def test_everything_is_listed_in_one_pass_and_bounded(tmp_path):
    folder = write_kaggle(tmp_path / "k")
    image("c.jpg", b"")(folder)
    image("f.jpg", cut_short)(folder)
    table("a.jpg,3,5 0", "a.jpg,9,1 1", "gone.jpg,1,1 5", "b.jpg,4,1 5", "b.jpg,4,1 5", "d.jpg,3")(folder)
    with pytest.raises(UserError) as caught:
        build_index(reader(folder))
    text = str(caught.value)
    assert "7 invalid entries" in text and len(text.splitlines()) == 8
    assert [problem.row for problem in collect(reader(folder)).problems] == [None, None, 2, 3, 4, 6, 7]
    table(*[f"gone{number}.jpg,1,1 5" for number in range(300)])(folder)
    with pytest.raises(UserError) as caught:
        build_index(reader(folder))
    assert "302 invalid entries (300 image missing" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1 + 302 and "gone299.jpg" in str(caught.value)
    table(*[f"gone{number}.jpg,1,1 5" for number in range(1200)])(folder)
    with pytest.raises(UserError) as caught:
        build_index(reader(folder))
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 + 1000 + 1 and lines[-1].startswith("  ... and 202 more") and "scan.json" in lines[-1]


def test_nothing_left_names_all_problems(tmp_path):
    folder = write_kaggle(tmp_path / "k", {"a.jpg": STRIPS["a.jpg"], "b.jpg": []})
    for name in ("a.jpg", "b.jpg"):
        image(name, b"")(folder)
    with pytest.raises(UserError, match="(?s)is left: 2 invalid entries [^;]*; correct them:.*a.jpg.*b.jpg"):
        build_index(reader(folder), "skip")
