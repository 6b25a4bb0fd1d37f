"""Weights & Biases and MLflow in addition to TensorBoard, through the Trainer's logger hook; both are optional.

    trainer.logging.tensorboard_writer._target_=sam2_lora_ext.trackers.make_wandb_logger
    +trainer.logging.tensorboard_writer.project=steel

or, in a user's config, `defaults: [/configs/severstal_lora, /configs/base/wandb, _self_]`. Only rank 0 logs. Values
keep the Trainer's step or epoch number.
"""

import atexit
import hashlib
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from training.utils.logger import Scalar, TensorBoardLogger, make_tensorboard_logger

from sam2_lora_ext.utils.errors import UserError

STEP = "trainer_step"
MODES = ("online", "offline", "disabled")
ILLEGAL = re.compile(r"[^\w. :/-]", re.ASCII)  # allowed in the names of MLflow's metrics


class Tracker(Protocol):
    """A destination of scalars."""

    def scalar(self, name: str, value: float, step: int) -> None:
        """Logs one value."""
        ...

    def params(self, values: Mapping[str, Any]) -> None:
        """Logs settings of the run."""
        ...

    def close(self) -> None:
        """Ends the run; nothing is logged afterwards."""
        ...


class WandbTracker:
    """A run of Weights & Biases; a resumed training continues it.

    Args:
        folder: the parent of `wandb/`; the hash of its path identifies the run.
        project: W&B's project.
        name: the run's name; by default the name of the folder above `folder`.
        mode: "online", "offline" (send it later with `wandb sync`) or "disabled".
        entity: team or user.
    """

    def __init__(
        self, folder: Path, project: str, name: str | None = None, mode: str = "offline", entity: str | None = None
    ):
        if mode not in MODES:
            raise UserError(f"the mode of Weights & Biases must be one of {', '.join(MODES)}, got {mode!r}")
        wandb = _optional("wandb", "wandb")
        identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        self.run = wandb.init(
            project=project,
            entity=entity,
            name=name or folder.resolve().parent.name,
            id=identity,
            resume="allow",
            mode=mode,
            dir=str(folder),
            settings=wandb.Settings(console="off", disable_git=True),
        )
        # Steps and epochs are mixed, so W&B's own step, which must increase, cannot be used.
        self.run.define_metric(STEP)
        self.run.define_metric("*", step_metric=STEP)

    def scalar(self, name: str, value: float, step: int) -> None:
        self.run.log({name: value, STEP: step})

    def params(self, values: Mapping[str, Any]) -> None:
        self.run.config.update(dict(values), allow_val_change=True)

    def close(self) -> None:
        self.run.finish()


class MlflowTracker:
    """A run of MLflow; a resumed training continues it.

    Args:
        folder: receives `mlflow_run.txt` with the run's identity.
        experiment: MLflow's experiment.
        uri: tracking server or store; by default `sqlite:///<folder>/mlflow.db`, which needs no server.
        name: the run's name; by default the name of the folder above `folder`.
    """

    def __init__(self, folder: Path, experiment: str, uri: str | None = None, name: str | None = None):
        client = _optional("mlflow.tracking", "mlflow").MlflowClient
        folder.mkdir(parents=True, exist_ok=True)
        self.client = client(uri or f"sqlite:///{folder.resolve()}/mlflow.db")
        note = folder / "mlflow_run.txt"
        if note.exists():
            self.run = note.read_text().strip()
            self.client.update_run(self.run, status="RUNNING")
        else:
            known = self.client.get_experiment_by_name(experiment)
            number = known.experiment_id if known else self.client.create_experiment(experiment)
            self.run = self.client.create_run(number, run_name=name or folder.resolve().parent.name).info.run_id
            note.write_text(self.run + "\n")

    def scalar(self, name: str, value: float, step: int) -> None:
        self.client.log_metric(self.run, ILLEGAL.sub("_", name), value, timestamp=int(time.time() * 1000), step=step)

    def params(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            self.client.set_tag(self.run, name, str(value))  # a tag, not a param: a resumed run may have another value

    def close(self) -> None:
        self.client.set_terminated(self.run)


class TrackedLogger:
    """The Trainer's logger hook: TensorBoard as stock, and each scalar to a tracker (None on other ranks)."""

    def __init__(self, tensorboard: TensorBoardLogger, tracker: Tracker | None):
        self.tensorboard, self.tracker = tensorboard, tracker
        atexit.register(self.close)

    def log(self, name: str, data: Scalar, step: int) -> None:
        """Logs one scalar."""
        self.tensorboard.log(name, data, step)
        if self.tracker is not None:
            self.tracker.scalar(name, float(data.detach() if isinstance(data, Tensor) else data), int(step))

    def log_dict(self, payload: Mapping[str, Scalar], step: int) -> None:
        """Logs several scalars of one step."""
        for name, data in payload.items():
            self.log(name, data, step)

    def log_hparams(self, hparams: dict[str, Scalar], meters: dict[str, Scalar]) -> None:
        """Logs settings."""
        self.tensorboard.log_hparams(hparams, meters)
        if self.tracker is not None:
            self.tracker.params(hparams)

    def flush(self) -> None:
        """Flushes TensorBoard."""
        self.tensorboard.flush()

    def close(self) -> None:
        """Closes TensorBoard and the tracker; further calls do nothing more."""
        self.tensorboard.close()
        tracker, self.tracker = self.tracker, None
        if tracker is not None:
            tracker.close()


def make_wandb_logger(
    log_dir: str,
    project: str,
    name: str | None = None,
    mode: str = "offline",
    entity: str | None = None,
    params: Mapping[str, Any] | None = None,
    **writer: Any,
) -> TrackedLogger:
    """The W&B logger for `trainer.logging.tensorboard_writer._target_`.

    Args:
        log_dir: TensorBoard's folder; W&B's files go into it too.
        project: see `WandbTracker`, as `name`, `mode` and `entity`.
        params: settings to log, such as `{lora: ${lora}}`.
        writer: further arguments of TensorBoard's `SummaryWriter`.

    Raises:
        UserError: wandb is not installed.
    """
    tracker = WandbTracker(Path(log_dir), project, name, mode, entity) if _first_rank() else None
    return _logger(log_dir, tracker, params, writer)


def make_mlflow_logger(
    log_dir: str,
    experiment: str,
    uri: str | None = None,
    name: str | None = None,
    params: Mapping[str, Any] | None = None,
    **writer: Any,
) -> TrackedLogger:
    """The MLflow logger for `trainer.logging.tensorboard_writer._target_`.

    Args:
        log_dir: TensorBoard's folder; MLflow's store is in it too, unless `uri` is set.
        experiment: see `MlflowTracker`, as `uri` and `name`.
        params: settings to log, such as `{lora: ${lora}}`.
        writer: further arguments of TensorBoard's `SummaryWriter`.

    Raises:
        UserError: mlflow is not installed.
    """
    tracker = MlflowTracker(Path(log_dir), experiment, uri, name) if _first_rank() else None
    return _logger(log_dir, tracker, params, writer)


def _logger(
    log_dir: str, tracker: Tracker | None, params: Mapping[str, Any] | None, writer: dict[str, Any]
) -> TrackedLogger:
    if tracker is not None and params:
        tracker.params(flat(params))
    return TrackedLogger(make_tensorboard_logger(log_dir, **writer), tracker)


def flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Settings by dotted name (`lora.rank`): plain values unchanged, lists as text; objects are ignored."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{above}{key}"
        if isinstance(value, Mapping):
            found |= flat(value, f"{name}.")
        elif value is None or isinstance(value, (str, int, float)):
            found[name] = value
        elif isinstance(value, Sequence):
            found[name] = ", ".join(map(str, value))
    return found


def _first_rank() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _optional(module: str, package: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f'tracking needs the package {package}, which is not installed ({error}): pip install -e ".[{package}]"'
        ) from error
