"""Lists training configs and their folders, and finds SAM 2's launcher.

Needs only the standard library, so that the command lines can report missing packages.
"""

import importlib
import importlib.util
import os
import re
from pathlib import Path
from types import ModuleType

from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.files import LARGEST_NOTE, read_text

USER_CONFIG_DIR = "SAM2_LORA_CONFIG_DIR"
"""Environment variable: a folder of the user's own configs, searched by Hydra before SAM 2's and this project's."""

INSTALL_SAM2 = (
    "SAM2_BUILD_CUDA=0 pip install --no-build-isolation sam2==1.1.0 (after torch), "
    "or pip install -e . in a checkout of facebookresearch/sam2"
)


def config_root() -> Path:
    """The folder that contains `configs/`: the package in an installed wheel, else the checkout's root."""
    package = Path(__file__).resolve().parents[1]
    return package if (package / "configs").is_dir() else package.parent


def sam2_root() -> Path | None:
    """The folder of the installed `sam2` package, with SAM 2's own `configs/`; None if it is not installed."""
    spec = importlib.util.find_spec("sam2")
    return Path(spec.origin).parent if spec and spec.origin else None


def known_configs() -> list[str]:
    """The training configs, by Hydra's names: the user's own folder, this project's, SAM 2's training files."""
    names = []
    if folder := os.environ.get(USER_CONFIG_DIR):
        names += _yaml_names(Path(folder), "*.yaml")
    names += _yaml_names(config_root(), "configs/*.yaml")  # configs/base/ has their shared parts
    if root := sam2_root():
        names += _yaml_names(root, "configs/*_training/*.yaml")
    return list(dict.fromkeys(names))


def import_launcher() -> ModuleType:
    """SAM 2's own launcher, the module `training.train`.

    Raises:
        UserError: SAM 2's training code, or a package that it needs, is not installed.
    """
    try:
        return importlib.import_module("training.train")
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing.split(".")[0] in ("sam2", "training"):
            raise UserError(
                f"SAM 2's training code is not installed in this Python (no module {missing!r}): {INSTALL_SAM2}"
            ) from error
        raise UserError(
            f"SAM 2's training code needs the package {missing!r}, which is not installed: "
            'pip install "sam2_lora_ext[train]" from this project\'s folder (pip install -e ".[train]")'
        ) from error


def _yaml_names(root: Path, pattern: str) -> list[str]:
    """Config files under `root`, except inference files: these have a top-level `model`, for `build_sam2`."""
    return sorted(path.relative_to(root).as_posix() for path in root.glob(pattern) if _trains(path))


def _trains(path: Path) -> bool:
    """Whether a YAML file may be a training config, by its text; False for one that cannot be read."""
    try:
        return not re.search(r"^model:", read_text(path, LARGEST_NOTE), re.MULTILINE)
    except UserError:
        return False
