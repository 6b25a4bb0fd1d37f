"""Compares the settings of a restarted run with its record; only those in `ALLOWED` may change.

A key is the dotted path below `trainer:`, as in a composed config. A key that one side lacks gets the default of its
`_target_`, so settings added by a later version compare by their defaults; `RENAMED` maps the settings of earlier
versions. The base is compared by its identity, data by content. Imports neither torch nor Hydra itself; defaults come
from the classes that a config names.
"""

import dataclasses
import importlib
import inspect
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

ALLOWED = {  # key -> the reason why it does not change the result
    "run_dir": "where the run is",
    "resume_with_changes": "only permits other changes",
    "accelerator": "the same numbers up to rounding",
    "metrics_every": "how often a row is written",
    "keep_previous": "how many checkpoints are kept",
    "export.*": "what is written besides adapters",
    "logging.*": "what is logged and where",
    "optim.gradient_logger": "only reads gradients",
    "optim.gradient_logger.*": "only reads gradients",
    "env_variables.*": "settings of the machine",
    "distributed.backend": "how ranks communicate",
    "distributed.timeout_mins": "how long ranks wait",
    "distributed.find_unused_parameters": "the same gradients",
    "cuda.cudnn_*": "which of several equivalent algorithms runs",
    "checkpoint.save_*": "where and how often checkpoints are written",
    "checkpoint.resume_from": "read at the first start only",
    "checkpoint.skip_saving_parameters": "set by LoRATrainer",
    "checkpoint.initialize_after_preemption": "set by LoRATrainer",
    "checkpoint.model_weight_initializer.state_dict.checkpoint_path": "the base is compared by its identity",
    "model.activations": "what is saved for backward: the same numbers up to rounding",
    "model.activations.*": "what is saved for backward: the same numbers up to rounding",
    "model.memory": "the name of activations in version 0.1",
    "model.memory.*": "the name of activations in version 0.1",
    "model.feature_cache": "features are read instead of computed",
    "model.feature_cache.*": "features are read instead of computed",
    "model.compile_image_encoder": "the same numbers up to rounding",
    "model.use_act_ckpt_iterative_pt_sampling": "the same numbers, recomputed",
    "model.lora.implementation": "the same numbers up to rounding",
    "loss.*.implementation": "the same numbers up to rounding",
    "data.*.num_workers": "which process draws a sample: other crops and flips of the same kind",
    "data.*.pin_memory": "how batches reach the device",
    "data.*.cache_dir": "where the index is stored",
    "data.*.full_check": "how thoroughly files are checked",
}
# Settings that may change if the content of the data is recorded, since the content is compared.
PATHS = ("image_dir", "label_dir", "csv", "json", "root", "split_file")
RENAMED: dict[str, str] = {}  # end of a key of an earlier version -> end of its current key in the same section
SECTIONS = {  # key -> the class of a section without `_target_`
    "model.lora": "sam2_lora_ext.lora.LoRAConfig",
    "optim": "training.trainer.OptimConf",
    "optim.amp": "training.trainer.OptimAMPConf",
    "distributed": "training.trainer.DistributedConf",
    "cuda": "training.trainer.CudaConf",
    "checkpoint": "training.trainer.CheckpointConf",
    "logging": "training.trainer.LoggingConf",
}
Record = Mapping[str, Any]  # as in `run.config`


@dataclass(frozen=True)
class Change:
    """A changed setting: its key and both values."""

    key: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.key} was {_shown(self.before)} and is now {_shown(self.after)}"


def changes(before: Record, after: Record) -> list[Change]:
    """Changes between two records of `run.config` that affect the result; empty when the run may continue.

    Base, data and ranks are not compared if one record lacks them (None, or no entry), see `unrecorded`.
    """
    known = set(_targets(after["trainer"]))  # never imports a module that only the run folder names
    old, new = (dict(_walk("", record["trainer"], known)) for record in (before, after))
    if new.get("mode") == "val":  # validation does not affect the run
        old["mode"] = "val"
    found = []
    for key in dict.fromkeys([*new, *old]):
        pair = old.get(key), new.get(key)
        if not _equal(*pair) and not _is_allowed(key, before, after) and not _is_same_file(key, *pair):
            found.append(Change(f"trainer.{key}", *pair))
    for key, pair in _facts(before, after).items():
        if None not in pair and pair[0] != pair[1]:
            found.append(Change(key, *pair))
    return found


def unrecorded(before: Record, after: Record) -> list[str]:
    """Names of the entries that the earlier record lacks and the later one has."""
    return [key for key, (old, new) in _facts(before, after).items() if old is None and new is not None]


def _facts(before: Record, after: Record) -> dict[str, tuple[Any, Any]]:
    """Name -> value before and after, for entries that are not settings."""
    facts = {"the number of ranks": (before.get("ranks"), after.get("ranks"))}
    for phase in ("train", "val"):
        pair = (_digest(before, phase), _digest(after, phase))
        facts[f"the content of trainer.data.{phase} (images, masks, classes, split)"] = pair
    return facts


def _digest(record: Record, phase: str) -> str | None:
    digest = (record.get("data") or {}).get(phase)
    return digest and f"sha256 {digest[:12]}"


def _is_allowed(key: str, before: Record, after: Record) -> bool:
    if any(fnmatchcase(key, pattern) for pattern in ALLOWED):
        return True
    parts = key.split(".")
    known = parts[0] == "data" and parts[-1] in PATHS
    return known and all(_digest(record, parts[1]) is not None for record in (before, after))


def _is_same_file(key: str, one: Any, other: Any) -> bool:
    is_path = key.startswith("data.") and key.rpartition(".")[2] in PATHS
    return is_path and bool(one and other) and os.path.realpath(one) == os.path.realpath(other)


def _renamed(key: str, name: str) -> str:
    """The current name of a setting `name` of the section `key`."""
    for old, new in RENAMED.items():
        if f".{key}.{name}".endswith(f".{old}"):
            return new.rpartition(".")[2]
    return name


def _targets(value: Any) -> Iterator[str]:
    for inner in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        yield from _targets(inner)
    if isinstance(value, Mapping) and "_target_" in value:
        yield str(value["_target_"])


def _walk(key: str, value: Any, known: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Key and value of every leaf; a list of plain values is one leaf."""
    if isinstance(value, Mapping):
        for name, inner in _filled(key, value, known).items():
            yield from _walk(f"{key}.{name}" if key else str(name), inner, known)
    elif isinstance(value, list) and any(isinstance(inner, (Mapping, list)) for inner in value):
        for position, inner in enumerate(value):
            yield from _walk(f"{key}[{position}]", inner, known)
    else:
        yield key, value


def _filled(key: str, section: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """A section with the defaults of its missing keys."""
    target = section.get("_target_", SECTIONS.get(key))
    filled = {_renamed(key, name): value for name, value in section.items()}
    if target in known or target in SECTIONS.values():
        filled |= {name: value for name, value in _defaults(target).items() if name not in filled}
    reader = filled.get("reader")
    if "objects" in filled and filled["objects"] is None and isinstance(reader, Mapping):
        found = _import(reader["_target_"]) if reader.get("_target_") in known else None
        filled["objects"] = "instances" if getattr(found, "instances", False) is True else "components"
    return filled


def _defaults(target: Any) -> dict[str, Any]:
    """Keyword -> default of a class (and its bases that receive `**kwargs`) or function; plain values only."""
    found: dict[str, Any] = {}
    named = _import(target)
    for owner in getattr(named, "__mro__", [named]):
        takes = owner.__init__ if isinstance(owner, type) else owner
        if takes is None or takes is object.__init__:
            continue
        try:
            parameters = inspect.signature(takes).parameters.values()
        except (TypeError, ValueError):
            continue
        for parameter in parameters:
            if parameter.default is not parameter.empty:
                found.setdefault(parameter.name, parameter.default)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    if dataclasses.is_dataclass(named):
        made = [field for field in dataclasses.fields(named) if field.default_factory is not dataclasses.MISSING]
        found |= {field.name: field.default_factory() for field in made}
    return {name: value for name, value in found.items() if _is_plain(value)}


def _import(target: Any) -> Any:
    """The object of a dotted name; None if there is none."""
    module, _, name = str(target).rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception:  # any error of a user's own module; then missing keys have no defaults
        return None


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str)) or value == {}


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return one == other or one != one and other != other  # NaN


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)
