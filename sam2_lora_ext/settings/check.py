"""Checks a config against the table before anything is built; the first fault is one sentence."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from sam2_lora_ext.errors import UserError
from sam2_lora_ext.settings.containers import INSIDE
from sam2_lora_ext.settings.table import SECTIONS, TARGETS, USERS

TRAINER = "sam2_lora_ext.trainer.LoRATrainer"


def check(config: Mapping[str, Any], whole: bool = True) -> None:
    """Checks a config.

    Args:
        config: a whole config, or with `whole` off its trainer section; plain, or OmegaConf's with its interpolations.
        whole: check `scratch`, `dataset`, `lora`, `launcher` and `submitit` too, the first three where the config is
            one of ours: SAM 2's own have sections of these names with other keys.

    Raises:
        UserError: a value is out of its range or of a wrong type, or a key is unknown.
    """
    plain, text = _plain(config)
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
            value = {key: entry for key, entry in value.items() if key in section.rows or not _read(name, key, text)}
        section.check(name, value)
    INSIDE.check("trainer", trainer)


def check_trainer(settings: Mapping[str, Any]) -> None:
    """Checks what `LoRATrainer` was given, by whatever name a user's own class of it has.

    Raises:
        UserError: as `check`.
    """
    plain, _ = _plain({key: value for key, value in settings.items() if key not in ("self", "stock", "__class__")})
    TARGETS[TRAINER].check("trainer", plain)


def check_class_ids(losses: Mapping[str, Any], datasets: Iterable[Any]) -> None:
    """Checks the classes that the losses weight against those that the data has; by now it is read.

    Args:
        losses: as the Trainer makes them; those without `class_weights` have none to check.
        datasets: raw data sets; those without `class_names` are another's own.

    Raises:
        UserError: a weight is given to a class that no data set has.
    """
    tables = [dataset.class_names for dataset in datasets if hasattr(dataset, "class_names")]
    known = {0: "clean strips"} | {number: name for table in tables for number, name in table.items()}
    for key, loss in losses.items():
        strange = sorted(set(getattr(loss, "class_weights", None) or ()) - set(known)) if tables else []
        if strange:
            raise UserError(
                f"trainer.loss.{key}.class_weights weights class {strange[0]}, which the data does not have: it has "
                f"{', '.join(f'{number} ({name})' for number, name in sorted(known.items()))}"
            )


def _plain(config: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The resolved values, and the text of the config with its interpolations; None for what is resolved already."""
    from omegaconf import OmegaConf

    if OmegaConf.is_config(config):
        return OmegaConf.to_container(config, resolve=True), OmegaConf.to_yaml(config)
    return {
        key: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        for key, value in config.items()
    }, None


def _read(section: str, key: Any, text: str | None) -> bool:
    """Whether an interpolation of the config reads the key; yes where its text is not known."""
    return text is None or re.search(rf"\$\{{[^{{}}]*\b{re.escape(str(key))}\b", text) is not None
