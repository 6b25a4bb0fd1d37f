"""Checks the machine: packages, the import of SAM 2 (with the cause of a failure), GPU, shared memory, ports, disk."""

import importlib
import importlib.metadata
import os
import platform
import random
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sam2_lora_ext.doctor.findings import Finding, green, red, root_cause, yellow
from sam2_lora_ext.host.configs import INSTALL_SAM2

AREA = "environment"
HIDDEN = "run from another folder, remove that folder from PYTHONPATH, or rename it"
IMPORTS = ("torch", "torchvision.ops", "sam2.build_sam", "training.train", "training.trainer", "sam2_lora_ext.trainer")
EXTRA = "train"
PORTS, PORTS_TRIED = (10000, 65000), 5
GIGA = 1e9


def installed_version(name: str) -> str | None:
    """The version of an installed package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_packages(
    version: Callable[[str], str | None] = installed_version, python: tuple[int, ...] = sys.version_info[:3]
) -> Iterator[Finding]:
    """Python and every package that training needs, compared with the lowest required versions."""
    from packaging.requirements import Requirement

    if python < (3, 11):
        yield red(
            AREA,
            f"Python {'.'.join(map(str, python))} is too old",
            "use Python 3.11 or newer: make PYTHON=python3.12 env",
        )
    wanted = [Requirement(line) for line in importlib.metadata.requires("sam2_lora_ext") or ()]
    wanted = [line for line in wanted if line.marker is None or line.marker.evaluate({"extra": EXTRA})]
    found = {line.name: version(line.name) for line in wanted}
    for line in wanted:
        if found[line.name] is None:
            yield red(AREA, f"the package {line.name} is not installed", 'pip install -e ".[train]"')
        elif not line.specifier.contains(found[line.name], prereleases=True):
            yield yellow(
                AREA,
                f"{line.name} {found[line.name]} is older than the tested versions ({line.specifier})",
                f'pip install "{line}"',
            )
    sam2 = version("sam2") or version("SAM-2")
    named = f"torch {found.get('torch')}, sam2 {sam2 or 'from a checkout'}, {platform.system()}"
    yield green(AREA, f"Python {platform.python_version()}, {named}")


def check_imports(modules: tuple[str, ...] = IMPORTS) -> Iterator[Finding]:
    """Imports SAM 2 and its training code; reports the cause of the first failure."""
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as error:
            missing = getattr(error, "name", None) or ""
            if hidden := hiding(missing):
                yield red(AREA, f"import {name} fails: {hidden} hides SAM 2's own {missing.split('.')[0]}", HIDDEN)
                return
            if isinstance(error, ModuleNotFoundError) and missing.split(".")[0] in ("sam2", "training"):
                advice = f"install SAM 2 with its training code: {INSTALL_SAM2}"
            elif isinstance(error, ModuleNotFoundError):
                advice = f'install {missing}: pip install -e ".[train]"'
            elif "torchvision::" in str(error):
                advice = "torch and torchvision are from different releases: install the versions in requirements.txt"
            elif "parent directory" in str(error):
                advice = "run from another folder: a folder named sam2 in this one hides the package"
            else:
                advice = "fix the cause in the error; make env installs the tested versions"
            yield red(AREA, f"import {name} fails: {root_cause(error)}", advice)
            return
    yield green(AREA, f"SAM 2 and its training code work ({Path(importlib.import_module('sam2').__file__).parent})")


def hiding(missing: str) -> str | None:
    """The path that hides SAM 2's own `sam2` or `training` and lacks the module `missing`; None if nothing does."""
    top, _, inside = missing.partition(".")
    found = sys.modules.get(top)
    if top not in ("sam2", "training") or not inside or found is None:
        return None
    own = [Path(place) / top / f"{inside.replace('.', '/')}.py" for place in sys.path]
    return [*getattr(found, "__path__", []), found.__file__][0] if any(file.exists() for file in own) else None


def check_gpu(config: Mapping[str, Any] | None) -> Iterator[Finding]:
    """Compares the GPUs with the config's needs; without a config only lists them."""
    import torch

    trainer = config["trainer"] if config is not None else {}
    wanted = trainer.get("accelerator", "cuda") == "cuda" if config is not None else False
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        why = (
            "this torch is built without CUDA"
            if torch.version.cuda is None
            else "no GPU is visible to torch (driver, CUDA_VISIBLE_DEVICES?)"
        )
        if wanted:
            yield red(
                AREA,
                f"the config needs CUDA, but {why}",
                "set trainer.accelerator=cpu trainer.optim.amp.enabled=false, or fix the driver",
            )
        else:
            use = "the config trains on the CPU" if config is not None else "training on a CPU works but is slow"
            yield green(AREA, f"no CUDA ({why}); {use}")
        return
    names = {torch.cuda.get_device_name(number) for number in range(count)}
    yield green(AREA, f"{count} GPU(s): {', '.join(sorted(names))}")
    if config is None:
        return
    asked = (config.get("launcher") or {}).get("gpus_per_node", 1)
    if wanted and asked > count:
        yield red(
            AREA,
            f"launcher.gpus_per_node is {asked}, but there are {count} GPUs",
            f"set launcher.gpus_per_node={count}",
        )
    amp = trainer.get("optim", {}).get("amp") or {}
    if wanted and amp.get("enabled") and amp.get("amp_dtype") == "bfloat16" and not torch.cuda.is_bf16_supported():
        yield yellow(AREA, "this GPU has no bfloat16", "set trainer.optim.amp.amp_dtype=float16")


def check_shared_memory(config: Mapping[str, Any] | None, folder: str = "/dev/shm") -> Iterator[Finding]:
    """Whether the workers' queued batches fit: workers x 2 batches of float32 images and their masks.

    Without a config the settings of configs/base/severstal.yaml are assumed.
    """
    trainer = config["trainer"] if config is not None else {"data": {"train": {"num_workers": 4}}, "model": {}}
    data = trainer["data"]
    workers = max(int((data.get(phase) or {}).get("num_workers", 0)) for phase in ("train", "val"))
    if not workers:
        yield green(AREA, "no data workers, so no shared memory is needed")
        return
    side = int(trainer["model"].get("image_size", 1024))
    images = max(int(size) for phase in ("train", "val") for size in (data.get(phase) or {}).get("batch_sizes", [1]))
    need = workers * 2 * images * side * side * (3 * 4 + 16)  # bytes; 16 masks of one byte per pixel
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        said = f"there is no {folder}, so shared memory cannot be checked"
        yield yellow(AREA, said, "if workers die with a bus error, set scratch.num_workers=0")
        return
    text = f"shared memory: {free / GIGA:.2f} GB free, about {need / GIGA:.2f} GB needed for {workers} workers"
    if free < need:
        yield red(AREA, text, "start the container with --shm-size=8g (or --ipc=host), or set scratch.num_workers=0")
    else:
        yield green(AREA, text)


def check_ports(config: Mapping[str, Any] | None) -> Iterator[Finding]:
    """Whether ranks can connect: tries a few ports of `submitit.port_range`, drawn as in the launcher."""
    wanted = (config.get("submitit") or {}).get("port_range") if config is not None else None
    low, high = (int(port) for port in wanted or PORTS)
    reason = ""
    for port in random.sample(range(low, high + 1), min(PORTS_TRIED, high - low + 1)):
        try:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
            yield green(AREA, f"ports in [{low}, {high}] can be opened")
            return
        except OSError as error:
            reason = error.strerror or str(error)
    yield red(AREA, f"no port in [{low}, {high}] can be opened ({reason})", "set submitit.port_range to free ports")


def check_disk(folder: Path, need: float, what: str) -> Iterator[Finding]:
    """Compares the free space in a run's folder with the size of its files."""
    existing = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    free = shutil.disk_usage(existing).free
    text = f"disk of {existing}: {free / GIGA:,.1f} GB free, about {need / GIGA:,.2f} GB needed ({what})"
    if free < need:
        yield red("disk", text, "free some space, or write elsewhere: launcher.experiment_log_dir=FOLDER")
    elif free < 3 * need:
        yield yellow("disk", text, "this is enough for one or two runs only")
    else:
        yield green("disk", text)
