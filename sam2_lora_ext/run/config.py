"""`run_config.yaml`, the run's own record of the arguments of its Trainer; read by evaluate, report and resume.

The launcher writes `config.yaml` and `config_resolved.yaml` before the run can be refused. This file is written only by
an accepted start that has the lock. Its YAML keys are

    version   version of this package at the last start that wrote the file
    trainer   the resolved `trainer:` section, with `_target_`
    ranks     number of processes
    base      {"id": `weights_id` of the base or null, "path": its file}
    data      {"train": digest, "val": digest}; null where a data set has no `AnnotationIndex`
    changes   allowed by `trainer.resume_with_changes`: a list of {"step", "key", "before", "after"}

A refused start may overwrite `config_resolved.yaml`, until its Trainer restores the copy of the last accepted start
(`.config_resolved.yaml`). Needs neither torch nor Hydra.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

import yaml

from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.files import LARGEST_NOTE, read_text, write_atomic

NAME, OLD_NAME = "run_config.yaml", "config_resolved.yaml"

log = logging.getLogger(__name__)


class _Loader(yaml.SafeLoader):
    """Loads plain values only, and no aliases, since a few lines of aliases can expand to any size."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it contains aliases, which a run never writes")
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Writes repeated values without aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def read_run_config(run: Path, *, warn: bool = True) -> dict[str, Any]:
    """The record of a run, as described above.

    A run of version 0.1.0 has no record. For it the launcher's `config_resolved.yaml` is read, `ranks` is None, `base`
    and `data` are empty, and a warning is logged.

    Args:
        run: the run's folder.
        warn: log that warning.

    Raises:
        UserError: neither file exists, or the file is damaged.
    """
    run = Path(run)
    unknown: dict[str, Any] = {"version": None, "ranks": None, "base": {}, "data": {}, "changes": []}
    if (run / NAME).is_file():
        return {**unknown, **_read(run / NAME)}
    old = next((run / name for name in (f".{OLD_NAME}", OLD_NAME) if (run / name).is_file()), None)
    if old is None:
        raise UserError(f"{run} holds no {NAME} and no {OLD_NAME}: give the folder of a run of LoRATrainer")
    if warn:
        log.warning(
            "%s is a run of version 0.1.0, which did not record its Trainer's arguments, its ranks and the content of "
            "its data: the launcher's %s is read instead",
            run,
            OLD_NAME,
        )
    return {"trainer": _read(old)["trainer"], **unknown}


def write_run_config(run: Path, record: Mapping[str, Any]) -> None:
    """Replaces the record atomically; the run must be locked."""
    text = yaml.dump(dict(record), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    write_atomic(run / NAME, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def plain(value: Any) -> Any:
    """A config's value as plain YAML (dicts, lists, numbers, text), with interpolations resolved."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        return {key if type(key) in (bool, int, float) else str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [plain(inner) for inner in value]
    return str(value)


def _read(file: Path) -> dict[str, Any]:
    try:
        record = _Loader(read_text(file, LARGEST_NOTE)).get_single_data()
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{file} is damaged or cannot be read ({' '.join(str(error).split())}): restore it") from error
    if not isinstance(record, dict) or not isinstance(record.get("trainer"), dict):
        raise UserError(f"{file} lacks the trainer section of a run: restore it")
    for name, kind in (("base", dict), ("data", dict), ("changes", list), ("ranks", (int, NoneType))):
        if name in record and not isinstance(record[name], kind):
            raise UserError(f"{file} is damaged: its {name} is {record[name]!r}; restore it")
    return record
