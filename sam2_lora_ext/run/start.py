"""Starts a run: locks its folder and compares its settings with the record before anything changes.

A start that is refused, or whose run is finished, leaves the run's records unchanged; the two files that the launcher
has already written are restored from the copies of the last accepted start.
"""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

import torch.distributed as dist

import sam2_lora_ext
from sam2_lora_ext.run import config as run_config
from sam2_lora_ext.run.changes import Change, changes, unrecorded
from sam2_lora_ext.run.checkpoint import notes_to_resume
from sam2_lora_ext.run.cleaning import clean_up
from sam2_lora_ext.run.folder import read_notes
from sam2_lora_ext.run.guard import raw_datasets
from sam2_lora_ext.run.lock import keep_configs, lock_folder, read_configs, restore_configs
from sam2_lora_ext.run.state import OLD_SUMMARY, SUMMARY
from sam2_lora_ext.utils.errors import UserError

Result = TypeVar("Result")
SINCE_0_1 = (
    "; training clicks continue with other random numbers, and images with an orientation tag are turned upright "
    "unless dataset.exif is false"
)

log = logging.getLogger(__name__)


def on_rank_0(work: Callable[[], Result]) -> Result | None:
    """The result of `work` on rank 0, None on the others; its `UserError` is raised on all ranks."""
    result, refusal = None, [None]
    if dist.get_rank() == 0:
        try:
            result = work()
        except UserError as error:
            refusal = [str(error)]
    dist.broadcast_object_list(refusal, src=0)
    if refusal[0] is not None:
        raise UserError(refusal[0])
    return result


class RunStart:
    """A start of a run; every rank has one, rank 0 reads and writes.

    Args:
        run_dir: the run's folder.
        trainer: the class of the Trainer.
        received: the Trainer's arguments.
    """

    def __init__(self, run_dir: Path, trainer: type, received: Mapping[str, Any]):
        self.run_dir = run_dir
        section = {"_target_": f"{trainer.__module__}.{trainer.__qualname__}", **run_config.plain(received)}
        self.record: dict[str, Any] = {"version": sam2_lora_ext.__version__, "trainer": section}
        self.allowed = bool(section.get("resume_with_changes"))
        self.lock: IO[str] | None = None
        self.before: Mapping[str, Any] | None = None
        self.found: list[Change] = []
        self.configs: dict[str, bytes] = {}  # the files written by this start's launcher

    def take(self) -> None:
        """Locks the folder; the process group must exist.

        Raises:
            UserError: on all ranks: a run is active in the folder, or the folder cannot be used.
        """
        self.lock = on_rank_0(lambda: lock_folder(self.run_dir))
        if self.lock is not None:
            self.configs = read_configs(self.run_dir)

    def compare(self, checkpoints: Path, train: Any, val: Any) -> None:
        """Cleans up after a kill, and compares this start with the run's record if there is a checkpoint to resume.

        Args:
            checkpoints: the folder of the checkpoint; without one the run starts from the beginning.
            train: the training data set, or None.
            val: the validation data set, or None.

        Raises:
            UserError: on all ranks: settings that affect the result have changed; the message names all of them.
        """
        self.record |= {
            "ranks": dist.get_world_size(),
            "base": {},
            "changes": [],
            "data": {"train": data_digest(train), "val": data_digest(val)},
        }
        on_rank_0(lambda: self._compare(checkpoints))

    def _compare(self, checkpoints: Path) -> None:
        clean_up(self.run_dir, checkpoints)
        checkpoint = notes_to_resume(checkpoints)
        if checkpoint is None:
            return
        self.before = record_of(self.run_dir, self.record, checkpoint)
        if self.before is None:  # a checkpoint of stock's Trainer
            return
        self.record["changes"] = list(self.before["changes"])
        missing = unrecorded(self.before, self.record)
        if missing:
            old = self.before["version"] in (None, "0.1.0")
            why = f"{self.run_dir} was started by version 0.1.0, which did not record {', '.join(missing)}"
            if not old:
                why = f"{self.run_dir / run_config.NAME} is missing or lacks {', '.join(missing)}"
            log.warning(f"{why}: they cannot be compared; a resume records them{SINCE_0_1 if old else ''}")
        self._refuse_or_note(changes(self.before, self.record))

    def check_base(self, base_id: str | None, path: str | None) -> None:
        """Compares the loaded base with the run's record.

        Raises:
            UserError: on all ranks: the run started from another base.
        """
        self.record["base"] = {"id": base_id, "path": path}
        on_rank_0(self._check_base)

    def _check_base(self) -> None:
        if self.before is None:
            return
        before, after = self.before["base"], self.record["base"]
        if "id" in before and before["id"] != after["id"]:
            words = [f"{base.get('path')} (sha256 {str(base['id'])[:12]})" for base in (before, after)]
            self._refuse_or_note([Change("the base", *words)])

    def _refuse_or_note(self, found: list[Change]) -> None:
        if found and not self.allowed:
            raise UserError(
                f"the run in {self.run_dir} has other settings: {'; '.join(map(str, found))}. Restore them, "
                "choose another launcher.experiment_log_dir, or set trainer.resume_with_changes=true to continue"
            )
        self.found += found

    def accept(self, step: int) -> None:
        """Records the settings of this start, on rank 0; the run is no longer finished.

        Args:
            step: optimizer steps so far.
        """
        for change in self.found:
            log.warning(f"from step {step} on: {change}")
            noted = {"step": step, "key": change.key, "before": change.before, "after": change.after}
            self.record["changes"].append(run_config.plain(noted))
        with contextlib.suppress(FileNotFoundError):
            os.replace(self.run_dir / SUMMARY, self.run_dir / OLD_SUMMARY)
        run_config.write_run_config(self.run_dir, self.record)
        keep_configs(self.run_dir, self.configs)

    def withdraw(self) -> None:
        """Restores the config files that the launcher replaced, so that the run is unchanged."""
        if os.environ.get("RANK", "0") == "0":
            restore_configs(self.run_dir)

    def release(self) -> None:
        """Releases the lock of the folder."""
        if self.lock is not None:
            self.lock.close()


def data_digest(dataset: Any) -> str | None:
    """SHA-256 of a data set's content: of each index and the selected images. None without a data set, or if one of
    its raw data sets has no index."""
    raws = raw_datasets(dataset) if dataset is not None else []
    if not raws or not all(hasattr(raw, "index") and hasattr(raw, "images") for raw in raws):
        return None
    digest = hashlib.sha256()
    for raw in raws:
        names = [raw.index.name(int(image)) for image in raw.images]
        digest.update(json.dumps([raw.index.digest(), names]).encode())
    return digest.hexdigest()


def record_of(run: Path, now: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of the run's last accepted start, or one rebuilt from the files of version 0.1.0; None without both.

    The launcher has already written `config_resolved.yaml` for this start; its copy belongs to the run. Without a
    copy, or for a checkpoint of another run (`resume_from`), only LoRA's config and the base are known, and the rest
    comes from `now`.
    """
    file, copy = run / "lora.json", run / f".{run_config.OLD_NAME}"
    if (run / run_config.NAME).is_file():
        return run_config.read_run_config(run)
    facts = checkpoint or (read_notes(file, {"config", "base_id"}) if file.is_file() else {})
    if not facts:
        return None
    record: dict[str, Any] = {"trainer": now["trainer"], "ranks": None, "data": {}, "changes": []}
    if copy.is_file() and file.is_file():
        record = run_config.read_run_config(run, warn=False)
    elif isinstance(model := now["trainer"].get("model"), Mapping):
        record["trainer"] = {**now["trainer"], "model": {**model, "lora": facts["config"]}}
    base = {"id": facts["base_id"], "path": facts.get("base_path")}
    return {**record, "version": facts.get("version"), "base": base}
