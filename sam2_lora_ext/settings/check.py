"""Checks a config against the table before anything is built; reports the first error in one sentence."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from sam2_lora_ext.settings.containers import INSIDE
from sam2_lora_ext.settings.table import SECTIONS, TARGETS, USERS
from sam2_lora_ext.utils.errors import UserError

TRAINER = "sam2_lora_ext.trainer.LoRATrainer"


def check(config: Mapping[str, Any], whole: bool = True) -> None:
    """Checks a config.

    Args:
        config: a full config, or if `whole` is false its trainer section; plain, or OmegaConf's with interpolations.
        whole: check `scratch`, `dataset`, `lora`, `launcher` and `submitit` too, the first three only in a config of
            this package: SAM 2's own have sections of these names with other keys.

    Raises:
        UserError: a value is out of its range or has a wrong type, or a key is unknown.
    """
    plain = _plain(config)
    if not whole:
        check_trainer(plain)
        return
    trainer = plain.get("trainer")
    ours = "lora" in plain or isinstance(trainer, Mapping) and trainer.get("_target_") == TRAINER
    for name, section in SECTIONS.items():
        if name not in plain or not ours and name not in ("launcher", "submitit"):
            continue
        value = plain[name]
        if name in USERS and isinstance(value, Mapping):
            INSIDE.check(name, value)
            value = {key: entry for key, entry in value.items() if key in section.rows or not _read(key, config)}
        section.check(name, value)
    INSIDE.check("trainer", trainer)


def check_literals(config: Mapping[str, Any]) -> None:
    """Checks a user's values before interpolations use them, since errors of interpolations do not name the setting.

    Raises:
        UserError: a value is out of its range or has a wrong type.
    """
    from omegaconf import OmegaConf

    if not OmegaConf.is_config(config) or "lora" not in config:
        return
    for name, section in SECTIONS.items():
        given = None if OmegaConf.is_interpolation(config, name) else config.get(name)
        for key, row in getattr(section, "kind", section).rows.items() if OmegaConf.is_dict(given) else ():
            if key in given and not OmegaConf.is_interpolation(given, key) and not OmegaConf.is_missing(given, key):
                if not OmegaConf.is_config(value := given[key]):
                    row.check(f"{name}.{key}", value)


def check_trainer(settings: Mapping[str, Any]) -> None:
    """Checks the arguments of `LoRATrainer` or of a user's subclass of any name.

    Raises:
        UserError: as `check`.
    """
    plain = _plain({key: value for key, value in settings.items() if key not in ("self", "stock", "__class__")})
    TARGETS[TRAINER].check("trainer", plain)


def check_class_ids(losses: Mapping[str, Any], datasets: Iterable[Any]) -> None:
    """Checks the class weights of the losses against the classes of the data, once it has been read.

    Args:
        losses: the Trainer's; those without `class_weights` are skipped.
        datasets: raw data sets; those of other packages have no `class_names` and are skipped.

    Raises:
        UserError: a weight is given to a class that no data set has.
    """
    tables = [dataset.class_names for dataset in datasets if hasattr(dataset, "class_names")]
    known = {0: "clean strips"} | {number: name for table in tables for number, name in table.items()}
    for key, loss in losses.items():
        strange = sorted(set(getattr(loss, "class_weights", None) or ()) - set(known)) if tables else []
        if strange:
            raise UserError(
                f"trainer.loss.{key}.class_weights has a weight for class {strange[0]}, but the data only has "
                f"{', '.join(f'{number} ({name})' for number, name in sorted(known.items()))}"
            )


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved values as plain containers."""
    from omegaconf import OmegaConf

    if OmegaConf.is_config(config):
        return OmegaConf.to_container(config, resolve=True)
    return {
        key: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        for key, value in config.items()
    }


def _read(key: Any, config: Mapping[str, Any]) -> bool:
    """Whether an interpolation of the config reads the key; True if they are resolved already."""
    from omegaconf import OmegaConf

    if not OmegaConf.is_config(config):
        return True
    return re.search(rf"\$\{{[^{{}}]*\b{re.escape(str(key))}\b", OmegaConf.to_yaml(config)) is not None
