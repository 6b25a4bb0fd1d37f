"""The versions and the commit that a result depends on."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

import sam2_lora_ext

PACKAGES = ("torch", "torchvision", "hydra-core", "numpy", "safetensors")


def versions() -> dict[str, str | None]:
    """The versions that a result depends on; SAM 2's package is `sam2`, or `SAM-2` from Meta's checkout."""
    found: dict[str, str | None] = {"python": platform.python_version(), "sam2_lora_ext": sam2_lora_ext.__version__}
    for name in PACKAGES:
        found[name] = _version(name)
    found["sam2"] = _version("sam2") or _version("SAM-2")
    found["cuda"] = torch.version.cuda if torch.cuda.is_available() else None
    return found


def git_commit() -> str | None:
    """The commit of the checkout that this package runs from, with "-dirty" when it was changed; None outside one."""
    folder = Path(__file__).resolve().parent
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
