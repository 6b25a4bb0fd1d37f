"""Splits and duplicates."""

import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from helpers.data_sets import noise
from sam2_lora_ext.data.duplicates import difference_hash, equal_pairs, groups, near_pairs, thumbnail
from sam2_lora_ext.data.splits import fold_shares, parse_shares, stratified_split
from sam2_lora_ext.utils.errors import UserError

FULL_SET = {
    (3,): 4759,
    (1,): 769,
    (4,): 516,
    (3, 4): 284,
    (2,): 195,
    (1, 3): 91,
    (1, 2): 35,
    (2, 3): 14,
    (1, 2, 3): 2,
    (2, 4): 1,
    (): 5902,
}


def test_split_of_the_full_set_is_stratified():
    classes = [combination for combination, count in FULL_SET.items() for _ in range(count)]
    names = [f"{number:05d}.jpg" for number in range(len(classes))]
    shares = {"train": 0.8, "val": 0.1, "test": 0.1}
    splits = stratified_split(names, classes, range(len(names)), shares, seed=1)
    for combination, count in FULL_SET.items():
        here = Counter(split for split, present in zip(splits, classes) if present == combination)
        for split, share in shares.items():
            assert abs(here[split] - share * count) <= 2, (combination, here)
    assert {split for split, present in zip(splits, classes) if present == (2, 3)} == set(shares)
    totals = Counter(splits)
    assert all(abs(totals[split] - share * len(names)) <= 1 for split, share in shares.items())
    assert stratified_split(names, classes, range(len(names)), shares, seed=1) == splits
    assert stratified_split(names, classes, range(len(names)), shares, seed=2) != splits


def test_split_does_not_depend_on_the_order_of_files():
    names = [f"{number}.jpg" for number in range(40)]
    classes = [(1 + number % 3,) for number in range(40)]
    splits = dict(zip(names, stratified_split(names, classes, range(40), fold_shares(4))))
    back = dict(zip(names[::-1], stratified_split(names[::-1], classes[::-1], range(40), fold_shares(4))))
    assert splits == back
    # made once with this seed; any machine must give the same
    assert "".join(splits[name][-1] for name in names[:20]) == EXPECTED_FOLDS


EXPECTED_FOLDS = "20332113000221212311"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sets(st.integers(1, 4), max_size=3), st.integers(0, 9)), min_size=12, max_size=60),
    st.integers(2, 3),
)
def test_groups_stay_together_and_no_split_is_empty(images, folds):
    classes = [tuple(sorted(present)) for present, _ in images]
    names = [f"{number}.jpg" for number in range(len(images))]
    group = [number for _, number in images]
    if len(set(group)) < folds:
        with pytest.raises(UserError, match="cannot be split"):
            stratified_split(names, classes, group, fold_shares(folds))
        return
    splits = stratified_split(names, classes, group, fold_shares(folds))
    assert set(splits) == set(fold_shares(folds))
    assert all(len({split for split, other in zip(splits, group) if other == number}) == 1 for number in set(group))


@pytest.mark.parametrize(
    "text", ["", "train", "train=1.2", "train=0.5,val=0.4", "train=0.5,train=0.5", "a=x,b=0.5", "=1", "a=0,b=1"]
)
def test_bad_shares(text):
    with pytest.raises(UserError, match="shares"):
        parse_shares(text)


def test_near_duplicates(tmp_path):
    images = [noise(seed) for seed in range(12)]
    images[3].save(tmp_path / "again.jpg", quality=40)
    images.append(Image.open(tmp_path / "again.jpg"))
    images.append(images[5].resize((400, 80)))
    images += [Image.new("L", (200, 40), 7), Image.new("L", (200, 40), 8)]  # nothing to tell them by
    hashes, thumbs = np.array([difference_hash(one) for one in images]), np.array([thumbnail(one) for one in images])
    assert near_pairs(hashes, thumbs).tolist() == [[3, 12], [5, 13]]
    assert near_pairs(hashes[:0], thumbs[:0]).shape == (0, 2)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.integers(0, 99))
def test_near_pairs_join_what_all_pairs_join(steps, seed):
    """Thumbnails that drift: neighbours are near, and chains of them long."""
    rng = np.random.default_rng(seed)
    base, drift = rng.integers(60, 190, (16, 64)), np.cumsum(steps) / 10
    thumbs = np.clip(base + drift[:, None, None] * rng.choice([-1, 1], (16, 64)), 0, 255).astype(np.uint8)
    hashes = rng.random(256) < np.where(rng.random(256) < 0.9, 0.5, np.linspace(0, 1, len(steps))[:, None])
    apart = (hashes[:, None] != hashes).sum(axis=2)
    grey = np.abs(thumbs[:, None].astype(float) - thumbs).mean(axis=(2, 3))
    every = np.argwhere(np.triu((apart <= 40) & (grey <= 3.0), 1))
    found = near_pairs(hashes, thumbs)
    assert groups(len(steps), found).tolist() == groups(len(steps), every).tolist()
    assert len(found) == len(steps) - len(set(groups(len(steps), every).tolist()))


def test_thousands_of_one_image_are_found_without_comparing_all_pairs():
    image = noise(1)
    hashes, thumbs = np.tile(difference_hash(image), (4000, 1)), np.tile(thumbnail(image), (4000, 1, 1))
    tracemalloc.start()
    found = near_pairs(hashes, thumbs)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) == 3999 and set(groups(4000, found)) == {0}
    assert peak < 200e6  # the 8 million pairs took 7.8e9


def test_groups_of_pairs():
    assert equal_pairs([b"a", b"b", b"a", b"a", b"c"]).tolist() == [[0, 2], [0, 3]]
    found = groups(6, np.array([[0, 2], [2, 4]]), np.array([[1, 5]])).tolist()
    assert found[0] == found[2] == found[4] and found[1] == found[5] and len(set(found)) == 3
