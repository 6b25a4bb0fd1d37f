"""Conversion between all formats, and telling them apart."""

from pathlib import Path

import pytest
from PIL import Image

from helpers.data_formats import assert_same_objects, make_coco, make_labels, make_supervisely, rle_of
from helpers.data_sets import STRIPS, reader, write_kaggle
from helpers.prepare import run
from sam2_lora_ext.data.guess_format import guess_reader
from sam2_lora_ext.data.index import build_index
from sam2_lora_ext.data.writers import WRITERS
from sam2_lora_ext.utils.errors import UserError

SIZE = ["--size", "200x40", "--quiet"]


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("source", WRITERS)
def test_conversion_is_lossless_from_every_format_to_every_format(tmp_path, source, kind):
    write_kaggle(tmp_path / "k")
    original = build_index(reader(tmp_path / "k"))
    run("convert", tmp_path / "k", "--to", source, "--out", tmp_path / "one", *SIZE)
    run("convert", tmp_path / "one", "--to", kind, "--out", tmp_path / "two", *SIZE)
    index = build_index(guess_reader(tmp_path / "two", size=(40, 200)))
    assert_same_objects(original, index, STRIPS)
    assert index.clean().tolist() == original.clean().tolist() and index.class_names == original.class_names
    for image in range(len(index)):
        assert Path(index.path(image)).read_bytes() == (tmp_path / "k/images" / index.name(image)).read_bytes()


def test_what_a_plain_scan_would_not_read_is_said(tmp_path, capsys):
    write_kaggle(tmp_path / "k")
    for number, kind in enumerate(("kaggle", "coco")):
        run("convert", tmp_path / "k", "--to", kind, "--out", tmp_path / kind, *SIZE)
        assert capsys.readouterr().out.count("read them with --size any") == 1 - number
    run("convert", tmp_path / "kaggle", "--to", "coco", "--out", tmp_path / "two", "--size", "any", "--quiet")


def test_real_images_survive_all_formats(real_data, tmp_path):
    original = build_index(guess_reader(real_data / "severstal/train.csv"))
    source = real_data / "severstal/train.csv"
    for kind in WRITERS:
        run("convert", source, "--to", kind, "--out", tmp_path / kind, "--quiet")
        index = build_index(guess_reader(tmp_path / kind))
        assert_same_objects(original, index, original.names())
        source = tmp_path / kind  # through all of them in a row


def test_conversion_refuses_what_it_cannot_say(tmp_path):
    folder = write_kaggle(tmp_path / "k", {"a.jpg": [(1, 0, 0, 9, 9), (2, 5, 5, 12, 12)]})
    with pytest.raises(UserError, match="classes 1 and 2|classes 2 and 1"):
        run("convert", folder, "--to", "label_png", "--out", tmp_path / "out", *SIZE)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    with pytest.raises(UserError, match="holds .*images, which is read"):
        run("convert", folder, "--to", "coco", "--out", folder, "--force", *SIZE)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="--force"):
        run("convert", folder, "--to", "coco", "--out", tmp_path / "out", *SIZE)
    run("convert", folder, "--to", "coco", "--out", tmp_path / "out", "--force", *SIZE)
    assert len(build_index(guess_reader(tmp_path / "out"))) == 1


def test_conversion_leaves_out_images_that_lost_a_mask(tmp_path, capsys):
    folder = write_kaggle(tmp_path / "k")
    (folder / "train.csv").write_text((folder / "train.csv").read_text().replace("a.jpg,1,", "a.jpg,1,0 "))
    with pytest.raises(UserError, match="RLE"):
        run("convert", folder, "--to", "coco", "--out", tmp_path / "out", *SIZE)
    run("convert", folder, "--to", "coco", "--out", tmp_path / "out", "--on-invalid", "skip", *SIZE)
    assert "1 left out" in capsys.readouterr().out
    assert build_index(guess_reader(tmp_path / "out")).names() == [name for name in sorted(STRIPS) if name != "a.jpg"]


def test_guessing(tmp_path):
    write_kaggle(tmp_path / "kaggle")
    make_supervisely(tmp_path / "ninja", "train_images")
    make_labels(tmp_path / "labels", lambda label, path: Image.fromarray(label).save(path))
    make_coco(tmp_path / "coco", lambda box: rle_of(box, True))
    original = build_index(reader(tmp_path / "kaggle"))
    for path in ("kaggle", "kaggle/train.csv", "ninja", "ninja/train_images", "labels", "coco", "coco/coco.json"):
        classes = list(original.class_names.values()) if "coco" in path else None
        index = build_index(guess_reader(tmp_path / path, size=(40, 200), classes=classes))
        assert_same_objects(original, index, STRIPS)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/readme.txt").write_text("")
    (tmp_path / "kaggle/other.csv").write_text((tmp_path / "kaggle/train.csv").read_text())
    assert guess_reader(tmp_path / "kaggle").csv.name == "train.csv"
    (tmp_path / "kaggle/train.csv").rename(tmp_path / "kaggle/second.csv")
    for path, words in (
        ("empty", "no annotations"),
        ("gone", "there is no"),
        ("empty/readme.txt", "neither"),
        ("kaggle", "several annotation files"),
    ):
        with pytest.raises(UserError, match=words):
            guess_reader(tmp_path / path)


@pytest.mark.parametrize(
    ("source", "out"),
    [
        ("kaggle", "one/train_images/new"),
        ("kaggle", "one/train.csv"),
        ("label_png", "one/annotations"),
        ("label_png", "one/annotations/new"),
        ("supervisely", "one/train"),
        ("supervisely", "one/train/ann/new"),
        ("supervisely", "one"),
        ("coco", "."),
    ],
)
def test_conversion_never_writes_over_its_input(tmp_path, source, out):
    write_kaggle(tmp_path / "k")
    run("convert", tmp_path / "k", "--to", source, "--out", tmp_path / "one", *SIZE)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="which is read"):
        run("convert", tmp_path / "one", "--to", "kaggle", "--out", tmp_path / out, "--force", *SIZE)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_conversion_never_removes_what_its_images_link_to(tmp_path):
    folder = write_kaggle(tmp_path / "k")
    (folder / "images").rename(tmp_path / "real")
    (folder / "images").mkdir()
    for path in (tmp_path / "real").iterdir():
        (folder / "images" / path.name).symlink_to(path)
    with pytest.raises(UserError, match="which is read"):
        run("convert", folder, "--to", "coco", "--out", tmp_path / "real", "--force", *SIZE)
    assert len(list((tmp_path / "real").iterdir())) == len(STRIPS)


def test_a_failed_conversion_keeps_the_old_result_and_the_input(tmp_path, monkeypatch):
    folder, out = write_kaggle(tmp_path / "k"), tmp_path / "out"
    run("convert", folder, "--to", "coco", "--out", out, *SIZE)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(source, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left"):
        patch.setattr("shutil.copy2", full)
        run("convert", folder, "--to", "kaggle", "--out", out, "--force", *SIZE)
    rename = Path.rename

    def no_swap(path, target):
        if path.name.endswith(".tmp"):
            raise OSError(16, "Device or resource busy")
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="busy"):
        patch.setattr(Path, "rename", no_swap)
        run("convert", folder, "--to", "kaggle", "--out", out, "--force", *SIZE)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    (out / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="'thesis.tex', which is not part of one"):
        run("convert", folder, "--to", "kaggle", "--out", out, "--force", *SIZE)
    assert (out / "thesis.tex").exists()


def test_a_mask_of_the_first_pixel_alone_survives_kaggle(tmp_path):
    folder = write_kaggle(tmp_path / "k", {"a.png": [(3, 0, 0, 1, 1)], "b.png": []})
    for kind in ("coco", "kaggle_old", "kaggle"):
        run("convert", folder, "--to", kind, "--out", tmp_path / kind, *SIZE)
        folder = tmp_path / kind
        index = build_index(guess_reader(folder, size=(40, 200)))
        assert [(number, runs.tolist()) for number, runs in index.masks(0)] == [(3, [[0, 1]])]
    assert [int(number) for number in (folder / "train.csv").read_text().split(",")[-1].split()] == [1, 1]
