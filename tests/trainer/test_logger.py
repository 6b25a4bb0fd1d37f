"""CSV files: exact round trips, resuming, kills in the middle of a row, and the plain Trainer's hook."""

import csv
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training.utils.logger import Logger

from sam2_lora_ext.logger import BASE_COLUMNS, CSVFile, MetricsCSV, metric_columns
from sam2_lora_ext.meters import SegmentationMeter
from sam2_lora_ext.utils.errors import UserError

COLUMNS = ["step", "epoch", "phase", "loss"]


@pytest.fixture(autouse=True)
def first_rank(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def filled(path):
    """Two epochs of two training rows and a validation row each, then a third that was not finished."""
    log = MetricsCSV(path, COLUMNS)
    for step in range(1, 6):
        log.write({"step": step, "epoch": (step - 1) // 2, "phase": "train", "loss": step / 10})
        if step % 2 == 0:
            log.write({"step": step, "epoch": (step - 1) // 2, "phase": "val", "loss": step / 7})
    return log


def test_columns_hold_everything_once():
    columns = metric_columns(SegmentationMeter(classes=[1, 2]).keys(8))
    assert len(columns) == len(set(columns)) and tuple(columns[: len(BASE_COLUMNS)]) == BASE_COLUMNS
    assert columns[len(BASE_COLUMNS)] == "iou_1click" and "dice_8clicks_class_2" in columns


def test_rows_are_whole_flushed_and_exact(tmp_path):
    path = tmp_path / "logs" / "metrics.csv"
    log = MetricsCSV(path, COLUMNS)
    assert read(path) == [COLUMNS]
    for value in (0.1, 1 / 3, 5e-324, -0.0, float("inf")):
        log.write({"loss": value, "step": 7, "phase": "train"})
        last = read(path)[-1]  # on the disk at once
        assert last[:3] == ["7", "", "train"] and float(last[3]) == value and last[3] == repr(value)
    log.write({"loss": np.float64(0.1), "step": np.int64(3)})
    assert read(path)[-1] == ["3", "", "", "0.1"]
    log.write({"phase": 'a "quoted", one'})
    assert read(path)[-1] == ["", "", 'a "quoted", one', ""] and log.read()[-1]["phase"] == 'a "quoted", one'
    with pytest.raises(UserError, match="no column iou: choose from step, epoch, phase, loss"):
        log.write({"step": 1, "iou": 0.5})


def test_opening_again_appends(tmp_path):
    path = tmp_path / "metrics.csv"
    filled(path)
    before = path.read_bytes()
    log = MetricsCSV(path, COLUMNS)
    assert path.read_bytes() == before
    log.write({"step": 6})
    assert path.read_bytes() == before + b"6,,,\n"
    with pytest.raises(UserError, match="has the columns step, epoch, phase, loss, but this run writes step, iou"):
        MetricsCSV(path, ["step", "iou"])


def test_truncation_drops_what_a_resume_writes_again(tmp_path):
    path = tmp_path / "metrics.csv"
    filled(path)
    # the checkpoint of epoch 1 is written before its validation, which a resume runs again
    assert MetricsCSV(path, COLUMNS).truncate_after(step=4, epoch=0) == 2
    assert [row[:3] for row in read(path)[1:]] == [
        ["1", "0", "train"],
        ["2", "0", "train"],
        ["2", "0", "val"],
        ["3", "1", "train"],
        ["4", "1", "train"],
    ]
    assert MetricsCSV(path, COLUMNS).truncate_after(step=4, epoch=0) == 0
    assert MetricsCSV(path, COLUMNS).truncate_after(step=2) == 2
    assert MetricsCSV(path, COLUMNS).truncate_after(step=0) == 3 and read(path) == [COLUMNS]
    assert os.listdir(tmp_path) == ["metrics.csv"]  # no temporary file is left


def test_resumed_equals_uninterrupted(tmp_path):
    filled(tmp_path / "whole.csv")
    log = filled(tmp_path / "resumed.csv")
    log.truncate_after(step=2, epoch=0)
    for step in (3, 4, 5):
        log.write({"step": step, "epoch": (step - 1) // 2, "phase": "train", "loss": step / 10})
        if step == 4:
            log.write({"step": 4, "epoch": 1, "phase": "val", "loss": 4 / 7})
    assert (tmp_path / "resumed.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_a_kill_at_any_byte_leaves_a_file_that_goes_on(tmp_path):
    path = tmp_path / "metrics.csv"
    filled(path)
    whole = path.read_bytes()
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        log = MetricsCSV(path, COLUMNS)
        log.write({"step": 99})
        complete = whole[: whole[:length].rfind(b"\n") + 1] or b"step,epoch,phase,loss\n"
        assert path.read_bytes() == complete + b"99,,,\n"


def test_zeros_after_a_power_cut_are_cut_off(tmp_path):
    path = tmp_path / "metrics.csv"
    filled(path)
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0" * 100 + b"\xff")
    MetricsCSV(path, COLUMNS)
    assert path.read_bytes() == whole


def test_damage_is_named(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,epoch,phase,loss\n1,2\n3,0,train,0.5\n")
    with pytest.raises(UserError, match="row 2, has 2 cells, but the header has 4"):
        MetricsCSV(path, COLUMNS)
    path.write_text("step,epoch,phase,loss\nx,0,train,0.5\n")
    with pytest.raises(UserError, match="a row with the step 'x'"):
        MetricsCSV(path, COLUMNS).truncate_after(1)
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(UserError, match="cannot read.*folder.csv"):
        MetricsCSV(tmp_path / "folder.csv", COLUMNS)
    log = MetricsCSV(tmp_path / "gone" / "metrics.csv", COLUMNS)
    (tmp_path / "gone" / "metrics.csv").unlink()
    (tmp_path / "gone").rmdir()
    with pytest.raises(UserError, match="cannot write.*metrics.csv"):
        log.write({"step": 1})


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    log = MetricsCSV(tmp_path / "metrics.csv", COLUMNS)
    log.write({"step": 1})
    assert log.truncate_after(0) == 0 and os.listdir(tmp_path) == []
    with pytest.raises(UserError, match="no column"):  # the same mistake shows on every rank
        log.write({"nothing": 1})


def hook(folder):
    """The Trainer's own Logger, made from a config as the Trainer makes it."""
    target = {
        "_target_": "sam2_lora_ext.logger.make_csv_logger",
        "log_dir": str(folder / "tensorboard"),
        "csv_path": str(folder / "logs" / "scalars.csv"),
        "flush_secs": 120,
        "should_log": True,
    }
    return Logger(SimpleNamespace(tensorboard_writer=OmegaConf.create(target)))


def test_the_plain_trainers_hook_writes_both(tmp_path):
    logger = hook(tmp_path)
    logger.log("Losses/train_severstal_loss", torch.tensor(0.1, dtype=torch.float64), 3)
    logger.log("Optim/lr", 1e-3, 3)
    logger.log_dict({"Meters_train/iou": 0.5, "Trainer/epoch": 2, "b": np.array(0.25)}, 4)
    logger.log_hparams({"rank": 8}, {"iou": 0.5})
    assert read(tmp_path / "logs" / "scalars.csv") == [
        ["step", "name", "value"],
        ["3", "Losses/train_severstal_loss", "0.1"],
        ["3", "Optim/lr", "0.001"],
        ["4", "Meters_train/iou", "0.5"],
        ["4", "Trainer/epoch", "2.0"],
        ["4", "b", "0.25"],
    ]
    logger.tb_logger.flush()
    logger.tb_logger.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"Losses/train_severstal_loss", "Optim/lr", "Meters_train/iou", "Trainer/epoch", "b"} <= set(
        events.Tags()["tensors"]
    )
    hook(tmp_path).log("Optim/lr", 2e-3, 5)  # a resumed run appends
    assert read(tmp_path / "logs" / "scalars.csv")[-2:] == [["4", "b", "0.25"], ["5", "Optim/lr", "0.002"]]


def test_the_hook_writes_nothing_on_other_ranks(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "2")
    logger = hook(tmp_path)
    logger.log_dict({"a": 1.0}, 1)
    assert not (tmp_path / "logs").exists() and isinstance(logger.tb_logger.scalars, CSVFile)
