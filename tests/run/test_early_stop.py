"""Early stopping as a function of the validations, and in a run."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.small_runs import environment, train_here
from sam2_lora_ext.run.early_stop import EarlyStop
from sam2_lora_ext.run.history import History
from sam2_lora_ext.utils.errors import UserError

NAN = float("nan")


@pytest.mark.parametrize(
    ("values", "stalled", "best"),
    [
        ([], 0, None),
        ([0.5], 0, 0),
        ([0.5, 0.65, 0.55], 1, 1),
        ([0.5, 0.5], 1, 0),  # equal is no improvement
        ([0.5, 0.55, 0.6], 2, 2),  # best, but within min_delta of the first
        ([0.5, 0.61], 0, 1),
        ([NAN, NAN], 2, None),
        ([NAN, 0.1], 0, 1),
        ([0.1, NAN, 0.05], 2, 0),
        ([-math.inf, -math.inf], 1, 0),
    ],
)
def test_cases(values, stalled, best):
    rule = EarlyStop(patience=2, min_delta=0.1)
    assert rule.stalled(values) == stalled and rule.best(values) == best
    assert rule.should_stop(values) == (stalled >= 2)


def test_minimum():
    rule = EarlyStop(patience=1, min_delta=0.0, mode="min")
    assert rule.best([3.0, 1.0, 2.0]) == 1 and rule.should_stop([3.0, 1.0, 2.0]) and not rule.should_stop([3.0, 1.0])


@pytest.mark.parametrize("wrong", [{"patience": 0}, {"min_delta": -1}, {"mode": "best"}])
def test_wrong_settings(wrong):
    with pytest.raises(UserError, match="early_stop needs"):
        EarlyStop(**wrong)


@given(st.lists(st.floats(allow_nan=True), max_size=30), st.integers(1, 5), st.floats(0, 1))
def test_against_a_counter(values, patience, min_delta):
    """The usual loop with a counter, which a resume would have to store."""
    best, count, stopped_at = None, 0, None
    for index, value in enumerate(values):
        if not math.isnan(value) and (best is None or value > best + min_delta):
            best, count = value, 0
        else:
            count += 1
        if count >= patience:
            stopped_at = index
            break
    rule = EarlyStop(patience, min_delta)
    first = next((index for index in range(len(values)) if rule.should_stop(values[: index + 1])), None)
    assert first == stopped_at


def test_history_tells_the_best_and_refuses_an_unknown_metric():
    history = History("iou", EarlyStop(2))
    assert history.best is None and not history.last_is_best and history.last_epoch == -1
    history.add(0, 10, {"iou": 0.3})
    history.add(1, 20, {"iou": 0.2})
    assert history.best["step"] == 10 and not history.last_is_best and history.stop_reason is None
    history.add(2, 30, {"iou": 0.1})
    assert history.stop_reason == "iou has not improved by more than 0.0001 for 2 validations; best at step 10"
    with pytest.raises(UserError, match="monitor is 'iou'.*choose from dice"):
        history.add(3, 40, {"dice": 0.1})


def test_a_run_stops_says_why_and_stays_stopped(tmp_path, nano_base, strips):
    """A min_delta that no metric can reach: the second validation stalls, the third is never made."""
    env = environment(nano_base, strips, tmp_path / "run")
    setting = ("trainer.early_stop={patience: 1, min_delta: 2.0}", "scratch.steps=20")
    train_here(env, *setting)
    validations = (tmp_path / "run/validations.json").read_text()
    assert [entry["step"] for entry in json.loads(validations)] == [2, 4]
    summary = json.loads((tmp_path / "run/training_summary.json").read_text())
    assert summary["stopped_early"] and summary["phases"] == 2 and summary["phases_planned"] == 10
    assert summary["stop_reason"].startswith(
        "iou_1click has not improved by more than 2 for 1 validations; best at step"
    )
    assert f"Early stop at step 4: {summary['stop_reason']}" in (tmp_path / "run/logs/log.txt").read_text()
    rows = (tmp_path / "run/logs/metrics.csv").read_text()
    train_here(env, *setting)
    assert (tmp_path / "run/validations.json").read_text() == validations
    assert (tmp_path / "run/logs/metrics.csv").read_text() == rows
    patient = ("trainer.early_stop={patience: 2, min_delta: 2.0}", "trainer.resume_with_changes=true")
    longer = train_here(env, *patient, "scratch.steps=20")
    assert [entry["step"] for entry in longer.history.entries] == [2, 4, 6]
