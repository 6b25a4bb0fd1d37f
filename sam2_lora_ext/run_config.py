"""`run_config.yaml`, the run's own record of what its Trainer received; evaluate, report and resume read this one.

The launcher's `config.yaml` and `config_resolved.yaml` are written before anybody can refuse the run. This file is
written by the run that has the lock, and only by one that was not refused. It is YAML of

    version   of this package, of the last start that wrote it
    trainer   the resolved `trainer:` section, with `_target_`
    ranks     number of processes
    base      {"id": `weights_id` of the base or null, "path": its file}
    data      {"train": digest, "val": digest}; null where a data set has no `AnnotationIndex`
    changes   what `trainer.resume_with_changes` allowed: a list of {"step", "key", "before", "after"}

Needs neither torch nor Hydra.
"""

import logging
from pathlib import Path
from typing import Any

import yaml

from sam2_lora_ext.errors import UserError
from sam2_lora_ext.files import write_atomic

NAME, OLD_NAME = "run_config.yaml", "config_resolved.yaml"
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)

log = logging.getLogger(__name__)


def read_run_config(run: Path) -> dict[str, Any]:
    """The record of a run, as described above.

    A run of version 0.1.0 has none: then the launcher's `config_resolved.yaml` is taken, `ranks` is None, `base` and
    `data` are empty, and a warning says so.

    Args:
        run: the run's folder.

    Raises:
        UserError: neither file is there, or it is damaged.
    """
    run = Path(run)
    if (run / NAME).is_file():
        record = _read(run / NAME)
        return {"ranks": None, "base": {}, "data": {}, "changes": [], **record}
    if not (run / OLD_NAME).is_file():
        raise UserError(f"{run} holds no {NAME} and no {OLD_NAME}: give the folder of a run of LoRATrainer")
    log.warning(
        "%s was made by a version that did not record what its Trainer received: the launcher's %s is taken for it",
        run, OLD_NAME,
    )  # fmt: skip
    return {"trainer": _read(run / OLD_NAME)["trainer"], "ranks": None, "base": {}, "data": {}, "changes": []}


def write_run_config(run: Path, record: dict[str, Any]) -> None:
    """Replaces the record atomically, unless it says the same already; the run must be locked."""
    text = yaml.dump(record, Dumper=DUMPER, sort_keys=False, allow_unicode=True, width=120)
    file = run / NAME
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        write_atomic(file, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _read(file: Path) -> dict[str, Any]:
    try:
        record = yaml.load(file.read_text(encoding="utf-8"), Loader=LOADER)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{file} is damaged or cannot be read ({' '.join(str(error).split())}): restore it") from error
    if not isinstance(record, dict) or not isinstance(record.get("trainer"), dict):
        raise UserError(f"{file} does not hold the trainer section of a run: restore it")
    return record
