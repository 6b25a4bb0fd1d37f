"""Checks a training config: it composes, its classes import, its files exist, its keys match, its folder is free."""

import importlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sam2_lora_ext.doctor.findings import Finding, green, red, root_cause, yellow
from sam2_lora_ext.run.state import is_finished

AREA = "config"
ANOTHER = "choose another launcher.experiment_log_dir for a new run"


def walk(tree: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of all leaves."""
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list) else None
    if items is None:
        yield where, tree
        return
    for key, value in items:
        yield from walk(value, f"{where}.{key}".lstrip("."))


def check_targets(config: Mapping[str, Any]) -> Iterator[Finding]:
    """Imports every `_target_`, since Hydra would hide the cause behind "Error locating target"."""
    targets: dict[str, str] = {}
    for where, value in walk(config):
        if where.rpartition(".")[2] == "_target_":
            targets.setdefault(value, where)
    bad = 0
    for target, where in targets.items():
        try:
            resolve(target)
        except Exception as error:
            bad += 1
            yield red(
                AREA,
                f"{where}: {target} cannot be imported: {root_cause(error)}",
                "correct the name, or fix the import",
            )
    if not bad:
        yield green(AREA, f"the config composes; all {len(targets)} classes and functions in it can be imported")


def resolve(target: str) -> Any:
    """The object of a dotted name.

    Raises:
        ImportError: there is no such module, or an import inside it fails.
        AttributeError: the module has no such name.
    """
    parts = target.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:cut])
        try:
            found = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name and (name == error.name or name.startswith(f"{error.name}.")) and cut > 1:
                continue  # `name` may be a class, not a module
            raise
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise ImportError(f"{target!r} is not the dotted name of a class or function")


def check_paths(config: Mapping[str, Any]) -> Iterator[Finding]:
    """Whether the files and folders that the data sets and the checkpoint read exist."""
    ours, stocks = "image_dir|label_dir|csv|split_file|json|checkpoint_path|root", "img_folder|gt_folder|file_list_txt"
    keys = re.compile(rf"(^|\.)({ours}|{stocks})$")
    inputs = {
        where: value
        for section in ("data", "checkpoint")
        for where, value in walk(config["trainer"].get(section) or {}, f"trainer.{section}")
        if keys.search(where) and isinstance(value, str)
    }
    missing: dict[str, str] = {}
    for where, value in inputs.items():
        if not os.path.exists(value):  # Path.exists raises for a name that is too long
            missing.setdefault(value, where)
    for value, where in missing.items():
        said = f"{where} is {value}, which does not exist (seen from {Path.cwd()})"
        yield red(AREA, said, "correct the path; the config's header lists the environment variables that set it")
    if not missing:
        yield green(AREA, f"all {len(set(inputs.values()))} input paths exist")


def check_keys(config: Mapping[str, Any]) -> Iterator[Finding]:
    """Whether the keys of batches, losses and meters match, which the Trainer checks only when it uses them."""
    trainer = config["trainer"]
    losses = set(trainer.get("loss") or {})
    bad = False
    for phase in ("train", "val"):
        key = (((trainer["data"].get(phase) or {}).get("collate_fn")) or {}).get("dict_key")
        if key is None:
            continue
        if key not in losses:
            bad = True
            has = ", ".join(sorted(losses)) or "nothing"
            said = f"trainer.data.{phase}.collate_fn.dict_key is {key}, but trainer.loss has {has}"
            yield red(AREA, said, f"add an entry {key} to trainer.loss")
        if phase == "val" and key == "all":
            bad = True
            said = "the dict_key of validation is all, which the Trainer refuses"
            yield red(AREA, said, "choose another key in data, loss and meters")
        meters = set((trainer.get("meters") or {}).get(phase) or {})
        if meters and meters != {key}:
            bad = True
            said = f"trainer.meters.{phase} has {', '.join(sorted(meters))}, but its batches have the key {key}"
            yield red(AREA, said, f"name it {key}")
    if not bad:
        yield green(AREA, "the keys of data, loss and meters match")


def run_folder(config: Mapping[str, Any]) -> Path:
    """The run's folder; by default that of SAM 2's launcher."""
    return Path(config["launcher"].get("experiment_log_dir") or "sam2_logs").absolute()


def check_folder(config: Mapping[str, Any]) -> Iterator[Finding]:
    """Whether the run's folder can be written and already contains a run."""
    folder = run_folder(config)
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        yield red(AREA, f"{existing} cannot be written", "choose another launcher.experiment_log_dir")
    elif is_finished(folder):
        yield yellow(AREA, f"{folder} contains a finished run, which will not be trained again", ANOTHER)
    elif (folder / "checkpoints/checkpoint.pt").exists():
        yield yellow(AREA, f"{folder} contains an unfinished run, which will be continued", ANOTHER)
    else:
        yield green(AREA, f"the run will be written to {folder}")
