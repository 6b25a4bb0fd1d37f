"""The evaluation's metrics against independent code (torchmetrics, pycocotools, exact distances) and closed forms."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sam2_lora_ext.data.ids import object_id
from sam2_lora_ext.evaluate.boundary import boundary_f, outline
from sam2_lora_ext.evaluate.evaluation import CleanResult, ModelResult, ObjectResult
from sam2_lora_ext.evaluate.presence import Scores, auroc, false_alarms, presence_difference, presence_table
from sam2_lora_ext.evaluate.protocol import Protocol
from sam2_lora_ext.evaluate.tables import columns, differences, means, summarize
from sam2_lora_ext.evaluate.text import cell
from sam2_lora_ext.utils.errors import UserError


def square(y: int, x: int, side: int = 12, size: int = 40) -> np.ndarray:
    mask = np.zeros((size, size), dtype=bool)
    mask[y : y + side, x : x + side] = True
    return mask


# ---- boundary F ----------------------------------------------------------------------------------------------------


def davis_f(found: np.ndarray, wanted: np.ndarray, radius: int) -> float:
    """The measure of the DAVIS benchmark, written from its definition with loops and exact distances."""
    from scipy.ndimage import distance_transform_edt

    def contour(mask: np.ndarray) -> np.ndarray:
        height, width = mask.shape
        edge = np.zeros_like(mask)
        for y in range(height):
            for x in range(width):
                right, below = min(x + 1, width - 1), min(y + 1, height - 1)
                edge[y, x] = (
                    len({bool(mask[y, x]), bool(mask[y, right]), bool(mask[below, x]), bool(mask[below, right])}) > 1
                )
        return edge

    a, b = contour(found), contour(wanted)
    if not a.any() or not b.any():
        return 1.0 if a.any() == b.any() else 0.0
    precision = (distance_transform_edt(~b)[a] <= radius).mean()
    recall = (distance_transform_edt(~a)[b] <= radius).mean()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_boundary_f_is_that_of_davis(seed, radius):
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(seed)
    found, wanted = (gaussian_filter(rng.standard_normal((24, 31)), 3) > rng.normal(0, 0.05) for _ in range(2))
    assert boundary_f(found, wanted, radius) == pytest.approx(davis_f(found, wanted, radius))


def test_boundary_f_forgives_its_tolerance_and_no_more():
    assert boundary_f(square(10, 10), square(10, 10)) == 1.0
    assert boundary_f(square(10, 10), square(12, 10), 2) == 1.0
    # two columns of the outline are along the move, two across it; three pixels are too many for those across
    assert 0 < boundary_f(square(10, 10), square(13, 10), 2) < 1
    assert boundary_f(square(2, 2), square(24, 24), 2) == 0.0


def test_boundary_f_of_empty_and_full_masks():
    empty, full = np.zeros((20, 20), bool), np.ones((20, 20), bool)
    assert boundary_f(empty, empty) == 1.0
    assert boundary_f(full, full) == 1.0  # the edge of the image is no outline
    assert boundary_f(empty, square(4, 4, 5, 20)) == 0.0
    assert boundary_f(square(4, 4, 5, 20), empty) == 0.0


def test_outline_of_one_pixel():
    mask = np.zeros((4, 4), bool)
    mask[2, 2] = True
    assert np.argwhere(outline(mask)).tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]


# ---- object score --------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-5, 5), min_size=1, max_size=30), st.lists(st.integers(-5, 5), min_size=1, max_size=30))
def test_auroc_agrees_with_torchmetrics(defects, sound):
    from torchmetrics.functional.classification import binary_auroc

    scores = torch.tensor([*defects, *sound], dtype=torch.float64)
    target = torch.tensor([1] * len(defects) + [0] * len(sound))
    theirs = float(binary_auroc((scores / 20 + 0.5), target))  # it wants probabilities
    assert auroc(defects, sound) == pytest.approx(theirs, abs=1e-6)  # theirs sums in float32


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-50, 50), min_size=1, max_size=40), st.lists(st.integers(-50, 50), min_size=1, max_size=40))
def test_false_alarms_are_those_of_the_best_threshold(defects, sound):
    share, threshold = false_alarms(defects, sound, 0.95)
    fitting = [t for t in sorted(set(defects)) if np.mean(np.array(defects) >= t) >= 0.95]
    assert threshold == max(fitting)
    assert share == np.mean(np.array(sound) >= max(fitting))


def test_false_alarms_by_hand():
    defects = list(range(1, 21))  # 19 of 20 are at least 2
    assert false_alarms(defects, [0, 1, 2, 3]) == (0.5, 2.0)
    assert false_alarms([], [1.0]) is None and auroc([1.0], []) is None


def test_presence_interval_holds_the_value_and_needs_both_kinds():
    table = presence_table(Scores([2.0, 3.0, 4.0], ["a", "b", "c"], [0.0, 2.5], ["d", "e"]))
    assert table["auroc"] == pytest.approx(5 / 6)
    assert table["auroc_ci95"][0] <= table["auroc"] <= table["auroc_ci95"][1]
    assert (table["defect_clicks"], table["sound_clicks"], table["clean_images"]) == (3, 2, 2)
    assert presence_table(Scores([1.0], ["a"], [], [])) is None
    assert presence_difference(Scores([1.0], ["a"], [], []), Scores([1.0], ["a"], [], [])) == {}


def test_presence_intervals_agree_with_a_plain_bootstrap_and_differences_are_paired():
    rng = np.random.default_rng(3)
    defects, sound = rng.normal(1, 1, 60), rng.normal(0, 1, 40)
    where = [f"d{o // 2}" for o in range(60)], [f"s{o // 4}" for o in range(40)]  # 30 and 10 images
    first = Scores(defects, where[0], sound, where[1])
    areas = []
    for _ in range(2000):
        drawn = [
            values.reshape(-1, each)[rng.integers(count, size=count)].ravel()
            for values, each, count in ((defects, 2, 30), (sound, 4, 10))
        ]
        areas.append(np.mean(drawn[0][:, None] > drawn[1][None]))  # no ties among real numbers
    table = presence_table(first)
    assert table["auroc_ci95"] == pytest.approx(np.quantile(areas, (0.025, 0.975)).tolist(), abs=0.03)  # Monte Carlo
    better = Scores(defects + 0.3, where[0], sound, where[1])
    gain = presence_difference(first, better)["auroc"]
    assert gain["mean"] == pytest.approx(presence_table(better)["auroc"] - table["auroc"])
    assert 0 < gain["low"] and gain["high"] - gain["low"] < 0.5 * (table["auroc_ci95"][1] - table["auroc_ci95"][0])
    assert presence_difference(first, first)["auroc"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "objects": 100}


# ---- tables --------------------------------------------------------------------------------------------------------

PROTOCOL = Protocol(clicks=(1, 2), max_clicks=3, shifts=(0.1,), automatic=4)


def result(steps: list[list[list[int]]], images: list[str], classes: list[int]) -> ModelResult:
    rows = []
    for o, (image, number, by_clicks) in enumerate(zip(images, classes, steps, strict=True)):
        areas = {"1click": by_clicks[0], "2clicks": by_clicks[1], "box": by_clicks[2], "box_10": by_clicks[0]}
        rows.append(
            ObjectResult(
                image,
                o,
                object_id(number, o),
                by_clicks,
                areas,
                dict.fromkeys(areas, 0.5),
                float(o),
                np.zeros((0, 2), np.int32),
                0.4 + 0.1 * o,
                [[3, 4, 1]],
            )
        )
    return ModelResult(objects=rows, image_seconds=[0.1], click_seconds=[0.01], automatic_counts=[3, 5])


def three() -> ModelResult:
    return result(
        [
            [[10, 10, 20], [16, 16, 20], [20, 20, 20]],
            [[0, 0, 1100], [0, 9, 1100], [1, 1, 1100]],
            [[900, 1000, 1000], [950, 950, 1000], [0, 0, 1000]],
        ],
        ["a", "a", "b"],
        [1, 2, 2],
    )


def test_clicks_to_a_goal_by_hand():
    table = columns(three().objects, PROTOCOL)
    assert table["iou_1click"].tolist() == pytest.approx([0.5, 0.0, 900 / 1100])
    assert table["clicks_to_80"].tolist() == [2.0, 3.0, 1.0] and table["missed_80"].tolist() == [0.0, 1.0, 0.0]
    assert table["clicks_to_90"].tolist() == [3.0, 3.0, 2.0] and table["missed_90"].tolist() == [0.0, 1.0, 0.0]
    assert table["automatic_recall"].tolist() == [0.0, 1.0, 1.0]


def test_tables_by_class_and_size():
    tables = summarize(three(), PROTOCOL, {1: "one", 2: "two", 3: "never"})
    assert list(tables["classes"]) == ["one", "two"]
    assert tables["classes"]["two"]["iou_1click"]["mean"] == pytest.approx(900 / 1100 / 2)
    assert {name: values["iou_1click"]["objects"] for name, values in tables["sizes"].items()} == {
        "small": 2,
        "medium": 1,
    }
    assert tables["automatic_masks_per_image"] == 4.0 and tables["presence"] is None
    speed = {"encode_ms": 100.0, "click_ms": 10.0, "box_ms": None, "automatic_ms": None, "images": 1}
    assert tables["speed"] == speed


def test_iou_and_dice_agree_with_torchmetrics_and_pycocotools():
    import pycocotools.mask as coco
    from torchmetrics.functional.classification import binary_f1_score, binary_jaccard_index

    from sam2_lora_ext.evaluate.metrics import mask_counts

    rng = np.random.default_rng(0)
    found, wanted = (torch.from_numpy(rng.random((6, 1, 20, 30)) < share) for share in (0.4, 0.6))
    areas = mask_counts(found, wanted)[:, 0].tolist()
    table = columns(result([[row, row, row] for row in areas], list("aabbcc"), [1] * 6).objects, PROTOCOL)
    for o in range(6):
        a, b = found[o, 0], wanted[o, 0]
        assert table["iou_1click"][o] == pytest.approx(
            float(binary_jaccard_index(a.int(), b.int())), abs=1e-6
        )  # float32
        assert table["dice_1click"][o] == pytest.approx(float(binary_f1_score(a.int(), b.int())), abs=1e-6)
        codes = [coco.encode(np.asfortranarray(mask.numpy().astype(np.uint8))) for mask in (a, b)]
        assert table["iou_1click"][o] == pytest.approx(coco.iou([codes[0]], [codes[1]], [0])[0, 0])


def test_paired_differences():
    gained = [
        [[12, 12, 20], [16, 16, 20], [20, 20, 20]],
        [[110, 110, 1100], [0, 9, 1100], [1, 1, 1100]],
        [[1000, 1000, 1000], [950, 950, 1000], [0, 0, 1000]],
    ]
    worse, better = three(), result(gained, ["a", "a", "b"], [1, 2, 2])
    same = differences(worse, worse, PROTOCOL).values()
    assert all(value["mean"] == value["low"] == value["high"] == 0.0 for value in same)
    gain = differences(worse, better, PROTOCOL)["iou_1click"]
    assert gain["mean"] == pytest.approx((0.1 + 0.1 + (1 - 900 / 1100)) / 3)
    # every image gained, so the interval leaves out 0 although the two models' own intervals overlap
    assert gain["low"] > 0 and cell(gain, signed=True).startswith("+0.127*")
    assert "auroc" not in differences(worse, better, PROTOCOL)  # no clean image
    for one in (worse, better):
        one.clean.append(CleanResult("c", 3, (1.0, 2.0), 0.5, np.zeros((0, 2), np.int32)))
    assert differences(worse, better, PROTOCOL)["auroc"]["mean"] == 0.0
    other = three()
    other.objects.pop()
    with pytest.raises(UserError, match="same objects"):
        differences(worse, other, PROTOCOL)


def test_means_of_nothing_are_absent():
    assert means({"iou": np.array([1.0])}, ["a"], np.array([False])) == {}
