"""The synthetic data: deterministic, readable by our own Kaggle reader, with the properties that the demo relies on."""

import numpy as np
import pytest

from sam2_lora_ext.data import shapes, synthetic
from sam2_lora_ext.data.index import build_index
from sam2_lora_ext.data.kaggle import KaggleReader
from sam2_lora_ext.utils.errors import UserError


def test_strips_are_the_same_for_a_seed_and_differ_between_seeds(tmp_path):
    first = synthetic.write_strips(tmp_path / "a", 3, seed=5, progress=False)
    again = synthetic.write_strips(tmp_path / "b", 3, seed=5, progress=False)
    other = synthetic.write_strips(tmp_path / "c", 3, seed=6, progress=False)
    images = [sorted((table.parent / "train_images").iterdir()) for table in (first, again, other)]
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()
    assert [p.read_bytes() for p in images[0]] == [p.read_bytes() for p in images[1]]
    assert all(a.read_bytes() != b.read_bytes() for a, b in zip(images[0], images[2], strict=True))


def test_a_strip_does_not_depend_on_how_many_are_drawn(tmp_path):
    few = synthetic.write_strips(tmp_path / "few", 2, seed=5, progress=False)
    more = synthetic.write_strips(tmp_path / "more", 4, seed=5, progress=False)
    assert more.read_text().startswith(few.read_text())


def test_our_reader_finds_what_was_drawn(tmp_path):
    count, seed = 12, 42
    table = synthetic.write_strips(tmp_path, count, seed=seed, progress=False)
    index = build_index(KaggleReader(tmp_path / "train_images", table), "error")
    assert len(index.sizes) == count and (index.sizes == (synthetic.HEIGHT, synthetic.WIDTH)).all()
    assert 0 < index.clean().sum() < count


def test_strips_have_all_classes_disjoint_masks_and_exposed_defects():
    seen = set()
    for index in range(40):
        image, masks = synthetic.strip(np.random.default_rng((1, index)))
        assert image.shape == (256, 1600) and image.dtype == np.uint8
        seen |= set(masks)
        total = sum((mask.astype(int) for mask in masks.values()), np.zeros(image.shape, int))
        assert total.max() <= 1
        for mask in masks.values():
            assert mask.any() and (image[mask] > 10).mean() > 0.5  # not on unexposed black
    assert seen == {1, 2, 3, 4}


def test_a_clean_strip_has_no_mask():
    assert synthetic.strip(np.random.default_rng(0), clean=True)[1] == {}


def test_a_folder_with_a_set_is_refused(tmp_path):
    synthetic.write_strips(tmp_path, 1, progress=False)
    with pytest.raises(UserError, match="exists already"):
        synthetic.write_strips(tmp_path, 1, progress=False)


def test_shapes_do_not_overlap_and_are_large_enough():
    for index in range(30):
        image, masks = shapes.sample(np.random.default_rng(index))
        assert image.shape == (128, 128, 3) and image.dtype == np.uint8 and masks.dtype == bool
        assert masks.sum(0).max() <= 1 and masks.sum((1, 2)).min() >= shapes.MIN_AREA


def test_every_object_of_a_clip_is_in_its_first_frame():
    images, masks = shapes.clip(np.random.default_rng(3), 3)
    assert images.shape == (3, 128, 128, 3) and masks.shape[0] == 3 and masks[0].any((1, 2)).all()
