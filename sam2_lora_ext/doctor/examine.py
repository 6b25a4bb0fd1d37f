"""Runs all checks in the order in which errors would occur in a training."""

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from sam2_lora_ext.doctor import config as configs
from sam2_lora_ext.doctor import environment
from sam2_lora_ext.doctor.findings import Finding, green, guarded, red, yellow
from sam2_lora_ext.host.compose import load
from sam2_lora_ext.utils.errors import UserError

BASE = "compare with configs/base/severstal.yaml"
STEP_ADVICE = (
    "out of memory: lower scratch.resolution or scratch.max_num_objects, or set trainer.model.activations=low; "
    "anything else: start the training with scratch.num_workers=0 and read the traceback"
)


def examine(name: str | None, overrides: Sequence[str] = (), step: bool = True) -> Iterator[Finding]:
    """Runs all checks and yields their findings; checks that an earlier error makes impossible are skipped.

    Args:
        name: a config, or None to check only the environment.
        overrides: for the config, in Hydra's grammar.
        step: run the real step too.
    """
    yield from guarded("environment", environment.check_packages, "make env installs all packages")
    imports = list(guarded("environment", environment.check_imports, "make env installs all packages"))
    yield from imports
    if any(finding.level == "red" for finding in imports):
        return
    machine = (environment.check_gpu, environment.check_shared_memory, environment.check_ports)
    if name is None:
        for check in machine:
            yield from guarded("environment", lambda check=check: check(None), "fix the cause in the error")
        free = shutil.disk_usage(Path.cwd()).free / environment.GIGA
        said = f"{free:,.1f} GB free in {Path.cwd()}; -c CONFIG compares this with the need of a run"
        yield green("disk", said)
        return
    try:
        config = load(name, overrides)
    except UserError as error:
        yield red("config", str(error), "python -m sam2_lora_ext.train --help lists the configs")
        return
    for check in (configs.check_targets, configs.check_paths, configs.check_keys, configs.check_folder):
        yield from guarded("config", lambda check=check: check(config), BASE)
    broken = False
    for check in machine:
        for finding in guarded("environment", lambda check=check: check(config), BASE):
            broken = broken or check is environment.check_gpu and finding.level == "red"
            yield finding
    yield from examine_training(config, step, gpu=not broken)


def examine_training(config: dict, step: bool, gpu: bool) -> Iterator[Finding]:
    """Checks base, adapters, data, the step (only if `gpu`: the config's device is available) and the disk."""
    from sam2_lora_ext.doctor import class_prompts
    from sam2_lora_ext.doctor.training import Training

    training = Training(config)
    checks = [("adapters", training.check_adapters), ("checkpoint", training.check_checkpoint)]
    checks += [("data", lambda phase=phase: training.data.check(phase)) for phase in ("train", "val")]
    checks += [
        ("data", training.data.check_apart),
        ("data", training.data.check_classes),
        ("loss", training.check_loss),
        ("class prompts", lambda: class_prompts.check_classes(training)),
    ]
    causes: list[str] = []
    for area, check in checks:
        for finding in guarded(area, check, BASE):
            if finding.level == "red" and finding.text in causes:
                continue  # for instance an error in annotations that both phases read
            causes += [finding.text] if finding.level == "red" else []
            yield finding
    missing = training.base_path is not None and not os.path.exists(training.base_path)
    if step and gpu and not causes and not missing:
        yield from guarded("step", training.check_step, STEP_ADVICE)
        yield from guarded("step", lambda: class_prompts.check_steps(training), STEP_ADVICE)
    elif step:
        yield yellow("step", "the step was skipped because of a failure above", "fix it and run the doctor again")
    if training.buildable:
        folder = configs.run_folder(config)
        what = "checkpoints, exports, logs"
        check_disk = lambda: environment.check_disk(folder, training.disk_need(), what)  # noqa: E731
        yield from guarded("disk", check_disk, "check the folder")
