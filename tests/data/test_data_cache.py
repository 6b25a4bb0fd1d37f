"""The cached index."""

import logging

import numpy as np
import pytest

from helpers.data_formats import truth
from helpers.data_sets import reader, write_image, write_kaggle
from sam2_lora_ext.data.cache import cached_index, fingerprint
from sam2_lora_ext.data.index import AnnotationIndex, build_index
from sam2_lora_ext.utils.errors import UserError


def test_cache(tmp_path, caplog):
    folder, cache = write_kaggle(tmp_path / "k"), tmp_path / "cache"
    fresh = build_index(reader(folder))
    for _ in range(2):
        index = cached_index(reader(folder), cache_dir=cache)
        assert truth(index).keys() == truth(fresh).keys()
        for name, value in vars(fresh).items():
            assert (
                np.array_equal(getattr(index, name), value)
                if isinstance(value, np.ndarray)
                else getattr(index, name) == value
            )
    (stored,) = cache.iterdir()
    whole = stored.read_bytes()
    for damaged in (b"", whole[:500], whole[:-1], whole[:90] + b"\0" * 40 + whole[130:], b"\x80\x04.", b"\x93NUMPY"):
        stored.write_bytes(damaged)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert len(cached_index(reader(folder), cache_dir=cache)) == 6
        assert "built again" in caplog.text and len(stored.read_bytes()) == len(whole)


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "train.csv").write_text(
            (folder / "train.csv").read_text().replace("b.jpg,4", "b.jpg,1")
        ),
        lambda folder: write_image(folder / "images/new.jpg"),
        lambda folder: (folder / "images/c.jpg").unlink(),
        lambda folder: write_image(folder / "images/a.jpg", 99),
    ],
    ids=["table", "new image", "image gone", "other pixels"],
)
def test_cache_follows_the_files(tmp_path, change):
    folder = write_kaggle(tmp_path / "k")
    before = fingerprint(reader(folder))
    assert fingerprint(reader(folder)) == before
    change(folder)
    assert fingerprint(reader(folder)) != before
    assert fingerprint(reader(folder, classes=5)) != fingerprint(reader(folder))


def test_problems_are_not_cached_and_an_unwritable_cache_is_no_error(tmp_path, caplog):
    folder = write_kaggle(tmp_path / "k")
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        assert len(cached_index(reader(folder), cache_dir=tmp_path / "file")) == 6
    assert "not stored" in caplog.text
    (folder / "images/a.jpg").write_bytes(b"")
    for _ in range(2):
        assert len(cached_index(reader(folder), "skip", tmp_path / "cache").problems) == 1
        with pytest.raises(UserError, match="image empty"):
            cached_index(reader(folder), "error", tmp_path / "cache")


def test_subset_and_size(tmp_path):
    index = build_index(reader(write_kaggle(tmp_path / "k")))
    part = index.subset(np.array([3, 0]))
    assert isinstance(part, AnnotationIndex) and part.names() == ["a.jpg", "d.jpg"]
    for name, masks in truth(part).items():
        for class_id, mask in masks.items():
            np.testing.assert_array_equal(mask, truth(index)[name][class_id])
    assert index.nbytes < 5000
