"""Finds a training config by any usual name, composes it with overrides, and reports its errors."""

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam2_lora_ext.host.configs import USER_CONFIG_DIR, config_root, import_launcher, known_configs, sam2_root
from sam2_lora_ext.settings import check, check_literals
from sam2_lora_ext.utils.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

LAUNCHER_SECTIONS = ("launcher", "trainer", "submitit")
"""The sections that `training.train.main` reads from a config."""


def locate(name: str) -> tuple[str, Path | None]:
    """The name by which Hydra finds a config, and an additional search folder for a user's own file.

    A shipped config has priority over a file of the same relative path; `./` in front, or an absolute path, selects
    the file.

    Raises:
        UserError: there is no such config; the known ones are listed, the closest first.
    """
    file = Path(name).expanduser()
    if not (file.is_absolute() or name.startswith(("./", "../", "~"))):
        wanted = name if name.endswith(".yaml") else f"{name}.yaml"
        for root in (sam2_root(), config_root()):  # Hydra's search order
            if root and "configs" in Path(wanted).parts[:1] and os.path.isfile(root / wanted):
                return wanted, None
        found = [known for known in known_configs() if f"/{known}".endswith(f"/{wanted}")]
        if len(found) == 1:
            return found[0], None
    if not os.path.isfile(file):  # unlike Path.is_file, no error for a name that is too long
        file = Path(f"{file}.yaml")
    if not os.path.isfile(file):
        raise UserError(f"there is no config {name[:500]!r}, neither installed nor as a file; {_choices(name)}")
    file = file.resolve()
    for root in (sam2_root(), config_root()):
        if root and file.is_relative_to(root / "configs"):
            return file.relative_to(root).as_posix(), None
    if file.suffix != ".yaml":
        raise UserError(f"the config {file} must have a name that ends in .yaml, since Hydra reads no other")
    return file.name, file.parent


def compose(name: str, overrides: Sequence[str]) -> "DictConfig":
    """Composes a config from SAM 2's, this project's and the user's folders, as the launcher does, and checks it.

    Its values are checked against the table of settings.

    Args:
        name: as `locate` returns it.
        overrides: in Hydra's grammar.

    Raises:
        UserError: a file or key is missing, an override cannot be read, a setting has a wrong value, or the config is
            not a training config.
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
    from yaml import YAMLError

    from sam2_lora_ext.host.yaml_files import check_config

    if not OmegaConf.has_resolver("times"):  # one of SAM 2's own, which cannot be registered twice
        import_launcher().register_omegaconf_resolvers()
    GlobalHydra.instance().clear()  # `import sam2` initialised it, perhaps before the user's folder was known
    hydra.initialize_config_module("sam2", version_base="1.2")
    if folder := os.environ.get(USER_CONFIG_DIR):
        check_config(name, Path(folder))
    try:
        config = hydra.compose(config_name=name, overrides=list(overrides))
        OmegaConf.to_container(config, throw_on_missing=True)
        check_literals(config)
        OmegaConf.to_container(config, resolve=True)
    except MissingMandatoryValue as error:
        missing = error.full_key
        raise UserError(f"{name} leaves {missing} for you to set: add {missing}=VALUE to the command") from error
    except (HydraException, OmegaConfBaseException, YAMLError, RecursionError) as error:
        raise UserError(f"cannot compose {name}: {_sentence(error)}{_likely_key(name, error)}") from error
    if absent := [section for section in LAUNCHER_SECTIONS if not OmegaConf.is_dict(config.get(section))]:
        raise UserError(f"{name} is not a training config: it has no {', '.join(absent)}; {_choices(name)}")
    check(config)
    return config


def load(name: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A config by the name that a user gives, composed and resolved, as plain containers.

    Raises:
        UserError: as `locate` and `compose`.
    """
    from omegaconf import OmegaConf

    found, folder = locate(name)
    if folder is not None:
        os.environ[USER_CONFIG_DIR] = str(folder)
    return OmegaConf.to_container(compose(found, overrides), resolve=True)


def _sentence(error: Exception) -> str:
    """The message of Hydra's error and its cause on one line, without search path, links and dumps."""
    said = []
    for part in (error, error.__cause__):
        text = re.split(r"\n\s*(?:full_key:|See https?:|Set the environment|Config search path:)", str(part))[0]
        text = " ".join(text.split()).rstrip(".")
        if part is not None and not any(text in earlier for earlier in said):
            said.append(text)
    if (key := getattr(error, "full_key", None)) and key not in said[0]:
        said.append(f"at {key}")
    if (override := getattr(error, "override", None)) and repr(override) not in said[0]:
        said.append(f"in the override {override!r}")
    return "; ".join(said)


def _likely_key(name: str, error: Exception) -> str:
    """` (did you mean ...?)` for an override whose key the config lacks, if a similar key exists."""
    import hydra
    from hydra.errors import HydraException

    if not (unknown := re.search(r"Could not (?:override|delete from config\.) '([^']+)'", str(error))):
        return ""
    try:
        known = list(_keys(hydra.compose(config_name=name)))
    except HydraException:  # the file itself overrides a missing key
        return ""
    close = difflib.get_close_matches(unknown[1], known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _keys(config: "DictConfig", prefix: str = "") -> Iterator[str]:
    """The dotted names of all values and sections of a config."""
    from omegaconf import DictConfig

    for key, value in config.items_ex(resolve=False):
        yield f"{prefix}{key}"
        if isinstance(value, DictConfig) and not value._is_none() and not value._is_interpolation():
            yield from _keys(value, f"{prefix}{key}.")


def _choices(name: str) -> str:
    """The known configs in one line, the closest to `name` first."""
    known = known_configs()
    stem = Path(name).name.removesuffix(".yaml")
    likeness = {config: difflib.SequenceMatcher(None, stem, Path(config).stem).ratio() for config in known}
    ordered = sorted(known, key=lambda config: -likeness[config])
    return f"known configs are: {', '.join(ordered)}" if ordered else "no configs are installed"
