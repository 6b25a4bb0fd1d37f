"""The kinds of steps have exact shares, do not depend on earlier calls, and differ between seeds."""

import pytest

from sam2_lora_ext.data.class_schedule import KINDS, kind_of_step


def kinds(count, share, corrections, seed=42, first=0):
    return [kind_of_step(seed, step, share, corrections) for step in range(first, first + count)]


@pytest.mark.parametrize("first", [0, 977, 10**9])
@pytest.mark.parametrize(("share", "corrections"), [(0.5, 0.25), (0.3, 0.5), (0.9, 0.1), (1.0, 1.0), (0.5, 0.0)])
def test_any_stretch_has_its_share_to_within_one_step(share, corrections, first):
    found = kinds(400, share, corrections, first=first)
    classes = 400 - found.count("clicks")
    assert abs(classes - 400 * share) <= 1
    assert abs(found.count("corrected") - classes * corrections) <= 1
    assert set(found) <= set(KINDS)


def test_ends_are_exact():
    assert set(kinds(1000, 0, 0.25)) == {"clicks"}
    assert set(kinds(1000, 1, 0)) == {"classes"}
    assert set(kinds(1000, 1, 1)) == {"corrected"}


def test_a_step_has_one_kind_whoever_asks_and_whatever_was_asked_before():
    whole = kinds(60, 0.4, 0.5)
    assert kinds(20, 0.4, 0.5, first=40) == whole[40:]
    assert [kind_of_step(42, step, 0.4, 0.5) for step in reversed(range(60))] == whole[::-1]


def test_seeds_begin_at_other_places():
    assert len({tuple(kinds(40, 0.3, 0.3, seed=seed)) for seed in range(20)}) > 5
