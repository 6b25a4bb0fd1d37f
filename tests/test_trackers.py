"""W&B and MLflow offline: everything that TensorBoard gets, once, on rank 0; a resume continues the run."""

import csv
import sys

import pytest

from sam2_lora_ext.errors import UserError
from sam2_lora_ext.trackers import STEP, TrackedLogger, make_mlflow_logger, make_wandb_logger
from small_runs import environment, rank_environment, train_here


class Notes:
    """A tracker that remembers."""

    def __init__(self):
        self.scalars, self.settings, self.closed = [], {}, 0

    def scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def params(self, values):
        self.settings |= values

    def close(self):
        self.closed += 1


def test_the_trainer_s_calls_arrive(tmp_path):
    import torch
    from training.utils.logger import make_tensorboard_logger

    notes = Notes()
    with rank_environment({}):
        logger = TrackedLogger(make_tensorboard_logger(str(tmp_path)), notes)
    logger.log("a", torch.tensor(0.5), 3)
    logger.log_dict({"b": 1, "c": 2.0}, 4)
    logger.log_hparams({"rank": 8}, {"iou": 0.1})
    logger.close()
    logger.close()
    assert notes.scalars == [("a", 0.5, 3), ("b", 1.0, 4), ("c", 2.0, 4)]
    assert notes.settings == {"rank": 8} and notes.closed == 1


@pytest.mark.parametrize(
    ("make", "package", "where"),
    [(make_wandb_logger, "wandb", "project"), (make_mlflow_logger, "mlflow", "experiment")],
)
def test_a_missing_package_is_a_sentence_and_other_ranks_do_not_need_it(tmp_path, monkeypatch, make, package, where):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "mlflow.tracking", None)
    with pytest.raises(UserError, match=rf"pip install -e \"\.\[{package}\]\""):
        make(str(tmp_path), **{where: "steel"})
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert make(str(tmp_path), **{where: "steel"}).tracker is None


def steps_of(run_dir) -> int:
    with open(run_dir / "logs/metrics.csv", newline="") as file:
        return max(int(row["step"]) for row in csv.DictReader(file))


HOOK = "trainer.logging.tensorboard_writer"


def test_mlflow_tracks_a_training(nano_base, strips, run_dir):
    for package in ("mlflow.tracking", "sqlalchemy", "alembic"):
        pytest.importorskip(package)
    env = environment(nano_base, strips, run_dir)
    trainer = train_here(
        env,
        f"{HOOK}._target_=sam2_lora_ext.trackers.make_mlflow_logger",
        f"+{HOOK}.experiment=steel",
        f"+{HOOK}.params={{rank: 8}}",
    )
    tracker = trainer.logger.tb_logger.tracker
    client = tracker.client
    data = client.get_run(tracker.run).data
    assert data.tags["rank"] == "8" and "Step_Stats/train/Mem _GB_" in data.metrics  # MLflow takes no parentheses
    name = next(name for name in data.metrics if name.startswith("Losses/train"))
    assert [point.step for point in client.get_metric_history(tracker.run, name)][-1] <= steps_of(run_dir)
    trainer.logger.tb_logger.close()
    assert client.get_run(tracker.run).info.status == "FINISHED"
    with rank_environment({}):
        again = make_mlflow_logger(str(run_dir / "tensorboard"), "steel")
    assert again.tracker.run == tracker.run and client.get_run(tracker.run).info.status == "RUNNING"
    again.close()


def test_wandb_tracks_a_training_offline(nano_base, strips, run_dir, monkeypatch):
    pytest.importorskip("wandb")
    logged = []
    env = environment(nano_base, strips, run_dir)
    from sam2_lora_ext import trackers

    scalar = trackers.WandbTracker.scalar
    monkeypatch.setattr(
        trackers.WandbTracker, "scalar", lambda self, *note: (logged.append(note), scalar(self, *note))[1]
    )
    trainer = train_here(
        env,
        f"{HOOK}._target_=sam2_lora_ext.trackers.make_wandb_logger",
        f"+{HOOK}.project=steel",
        f"+{HOOK}.params={{rank: 8}}",
    )
    run = trainer.logger.tb_logger.tracker.run
    last = {name: value for name, value, _ in logged}
    assert any(name.startswith("Losses/train") for name in last) and run.config["rank"] == 8
    assert (
        all(run.summary[name] == value for name, value in last.items() if value == value)
        and run.summary[STEP] == logged[-1][2]
    )
    trainer.logger.tb_logger.close()
    written = list((run_dir / "tensorboard/wandb").glob("offline-run-*/run-*.wandb"))
    assert len(written) == 1 and written[0].stat().st_size > 1000
    with rank_environment({}):
        again = make_wandb_logger(str(run_dir / "tensorboard"), "steel")
    assert again.tracker.run.id == run.id
    again.close()
