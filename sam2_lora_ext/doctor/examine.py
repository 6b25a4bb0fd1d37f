"""Runs all checks in the order in which a user would meet the faults."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from sam2_lora_ext.doctor import config as configs
from sam2_lora_ext.doctor import environment
from sam2_lora_ext.doctor.findings import Finding, guarded, red
from sam2_lora_ext.errors import UserError

STEP_ADVICE = (
    "out of memory: lower scratch.resolution or scratch.max_num_objects, or set +trainer.model.memory=low; anything else: start the "
    "training with scratch.num_workers=0 and read the traceback"
)


def examine(name: str | None, overrides: Sequence[str] = (), step: bool = True) -> Iterator[Finding]:
    """All findings; what cannot be looked at because of an earlier fault is left out.

    Args:
        name: a config, or None for the environment alone.
        overrides: for the config, in Hydra's grammar.
        step: make the real step too.
    """
    yield from guarded("environment", environment.check_packages, "make env installs what is needed")
    imports = list(guarded("environment", environment.check_imports, "make env installs what is needed"))
    yield from imports
    if any(finding.level == "red" for finding in imports):
        return
    if name is None:
        yield from guarded("environment", lambda: environment.check_gpu(None), "check the driver with nvidia-smi")
        free = shutil.disk_usage(Path.cwd()).free
        yield Finding(
            "green",
            "disk",
            f"{free / environment.GIGA:,.1f} GB free in {Path.cwd()}; with -c CONFIG this is set against the need",
        )
        return
    try:
        config = configs.load(name, overrides)
    except UserError as error:
        yield red("config", str(error), "python -m sam2_lora_ext.train --help lists the configs")
        return
    for check in (configs.check_targets, configs.check_paths, configs.check_keys, configs.check_folder):
        yield from guarded("config", lambda check=check: check(config), "compare with configs/base/severstal.yaml")
    for check in (environment.check_gpu, environment.check_shared_memory, environment.check_ports):
        yield from guarded("environment", lambda check=check: check(config), "compare with configs/base/severstal.yaml")
    yield from examine_training(config, step)


def examine_training(config: dict, step: bool) -> Iterator[Finding]:
    """Base, adapters, data, the step and the disk."""
    from sam2_lora_ext.doctor.training import Training

    training = Training(config)
    checks = [("adapters", training.check_adapters), ("checkpoint", training.check_checkpoint)]
    checks += [("data", lambda phase=phase: training.check_data(phase)) for phase in ("train", "val")]
    causes: list[str] = []
    for area, check in checks:
        for finding in guarded(area, check, "compare with configs/base/severstal.yaml"):
            if finding.level == "red" and finding.text in causes:
                continue  # such as the annotations that both phases read
            causes += [finding.text] if finding.level == "red" else []
            yield finding
    if step and not causes:
        yield from guarded("step", training.check_step, STEP_ADVICE)
    if training.buildable:
        folder = Path(config["launcher"]["experiment_log_dir"]).absolute()
        yield from guarded(
            "disk",
            lambda: environment.check_disk(folder, training.disk_need(), "checkpoints, exports, logs"),
            "check the folder",
        )
