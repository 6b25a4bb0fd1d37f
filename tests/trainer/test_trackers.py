"""W&B and MLflow offline: everything that TensorBoard gets, once, on rank 0; a resume continues the run."""

import json
import sys

import pytest
from mlflow.tracking import MlflowClient
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from helpers.small_runs import environment, launch, rank_environment, write_config
from sam2_lora_ext.trackers import ILLEGAL, STEP, TrackedLogger, flat, make_mlflow_logger, make_wandb_logger
from sam2_lora_ext.utils.errors import UserError


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


def user_config(folder, tracker: str):
    """A user's file on top of the demo and base/{wandb,mlflow}.yaml, for the stock launcher."""
    config = write_config(folder)
    config.write_text(config.read_text().replace("  - _self_", f"  - /configs/base/{tracker}\n  - _self_"))
    return config


def train_by_config(tracker: str, nano_base, strips, run_dir, config_dir, **variables: str) -> None:
    env = environment(nano_base, strips, run_dir) | variables
    process = launch(user_config(config_dir, tracker), env)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output[-3000:]


def written_to_tensorboard(run_dir) -> dict[str, list[tuple[int, float]]]:
    """What the stock part of the hook wrote: steps and values by name."""
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    return {
        name: [(event.step, float(make_ndarray(event.tensor_proto))) for event in events.Tensors(name)]
        for name in events.Tags()["tensors"]
    }


@pytest.mark.slow
def test_mlflow_tracks_a_training_of_the_stock_launcher(nano_base, strips, run_dir, tmp_path):
    train_by_config("mlflow", nano_base, strips, run_dir, tmp_path / "config", MLFLOW_EXPERIMENT_NAME="steel")
    client = MlflowClient(f"sqlite:///{run_dir}/tensorboard/mlflow.db")
    identity = (run_dir / "tensorboard/mlflow_run.txt").read_text().strip()
    run = client.get_run(identity)
    assert run.info.status == "FINISHED" and run.data.tags["lora.rank"] == "8" and run.data.tags["scratch.steps"] == "6"
    assert client.get_experiment(run.info.experiment_id).name == "steel"
    events = written_to_tensorboard(run_dir)
    assert {ILLEGAL.sub("_", name) for name in events} == set(run.data.metrics)  # MLflow takes no parentheses
    name = next(name for name in events if name.endswith("iou_1click") and "val" in name)
    noted = [(point.step, point.value) for point in client.get_metric_history(identity, name)]
    assert noted == [(step, pytest.approx(value)) for step, value in events[name]] and len(noted) == 3
    with rank_environment({}):
        again = make_mlflow_logger(str(run_dir / "tensorboard"), "steel")
    assert again.tracker.run == identity and client.get_run(identity).info.status == "RUNNING"
    again.close()


def test_wandb_tracks_a_training_of_the_stock_launcher_offline(nano_base, strips, run_dir, tmp_path):
    train_by_config("wandb", nano_base, strips, run_dir, tmp_path / "config", WANDB_PROJECT="steel")
    written = list((run_dir / "tensorboard/wandb").glob("offline-run-*/run-*.wandb"))
    assert len(written) == 1
    settings, history, identity = read_wandb(written[0])
    assert (
        settings["lora.rank"] == 8 and settings["scratch.steps"] == 6 and not any("schedule" in key for key in settings)
    )
    events = written_to_tensorboard(run_dir)
    assert set(events) == set(history)
    for name, points in events.items():
        assert history[name] == [(step, pytest.approx(value, nan_ok=True)) for step, value in points]
    with rank_environment({}):
        again = make_wandb_logger(str(run_dir / "tensorboard"), "steel")
    assert again.tracker.run.id == identity
    again.close()


def read_wandb(file) -> tuple[dict, dict[str, list[tuple[int, float]]], str]:
    """Settings, steps and values by name, and the run's identity, from the file that `wandb sync` would send."""
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    store = DataStore()
    store.open_for_scan(str(file))
    settings, history, identity = {}, {}, ""
    while (data := store.scan_data()) is not None:
        record = Record.FromString(data)
        identity = record.run.run_id or identity
        settings |= {item.key: json.loads(item.value_json) for item in record.config.update if item.key}
        row = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for name in row.keys() - {STEP}:
            if not name.startswith("_"):
                history.setdefault(name, []).append((row[STEP], float(row[name])))
    return settings, history, identity


def test_settings_are_flat_and_plain():
    values = OmegaConf.create({"lora": {"rank": 8, "targets": ["a", "b"], "qkv_parts": None}, "name": "x"})
    assert flat(values) == {"lora.rank": 8, "lora.targets": "a, b", "lora.qkv_parts": None, "name": "x"}
    assert flat({"schedule": object(), "lr": 0.1}) == {"lr": 0.1}


def test_an_unknown_mode_is_a_sentence(tmp_path):
    with rank_environment({}), pytest.raises(UserError, match="one of online, offline, disabled, got 'offlin'"):
        make_wandb_logger(str(tmp_path), "steel", mode="offlin")
