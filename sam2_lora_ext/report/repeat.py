"""Writes the commands that repeat a run: training with its environment variables, then merge and evaluation."""

import re
import shlex
from collections.abc import Iterator
from typing import Any

from sam2_lora_ext.data.source import from_run
from sam2_lora_ext.host.yaml_files import load_yaml
from sam2_lora_ext.report.collect import Run
from sam2_lora_ext.run.paths import find_run
from sam2_lora_ext.utils.errors import UserError

VARIABLE = re.compile(
    r"^(?P<before>[^$]*)(?:\$\{oc\.decode:)?\$\{oc\.env:(?P<name>\w+)[^}]*(?:\{[^}]*\}[^}]*)?\}\}?(?P<after>[^$}]*)$"
)


def training_command(run: Run) -> str | None:
    """The shell command that repeats the training in another folder; None if the run has no config.yaml."""
    config = run.path / "config.yaml"
    if not config.exists():
        return None
    variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in environment(run).items())
    command = ["python", "-m", "sam2_lora_ext.train", "-c", str(config.resolve())]
    return f"{variables} {shlex.join([*command, f'launcher.experiment_log_dir={run.path}_again'])}".strip()


def environment(run: Run) -> dict[str, str]:
    """The environment variables of the run's config and their values, found by comparing raw and resolved config."""
    from omegaconf import OmegaConf

    files = [run.path / "config.yaml", run.path / "config_resolved.yaml"]
    if not all(file.exists() for file in files):
        return {}
    raw, resolved = OmegaConf.to_container(load_yaml(files[0]), resolve=False), _resolved(run)
    found: dict[str, str] = {}
    for text, value in _pairs(raw, resolved):
        if (match := VARIABLE.match(text)) and value is not None and "launcher.experiment_log_dir" not in text:
            known = str(value)
            if known.startswith(match["before"]) and known.endswith(match["after"]):
                found[match["name"]] = known[len(match["before"]) : len(known) - len(match["after"])]
    log_dir = _at(raw, "launcher", "experiment_log_dir")
    if log_dir and (match := VARIABLE.match(str(log_dir))):
        found.pop(match["name"], None)  # the command sets another folder
    return found


def use_commands(run: Run) -> list[str]:
    """The commands that merge the adapter and compare it with its base under the run's recorded conditions."""
    base, config = run.lora.get("base_path"), run.lora.get("model_config")
    if not base:
        return []
    words = []
    if (run.path / "adapters").is_dir():
        merge = ["--base", base, "--adapter", str(run.path), "--out", f"{run.path.name}_merged.pt"]
        words.append(["python", "tools/merge_lora.py", *merge, *(["--verify", config] if config else [])])
    if (run.path / "adapters").is_dir() or (run.path / "weights").is_dir():
        out = run.path / "evaluation"
        out = out.with_name("evaluation_again") if out.exists() else out
        compared = ["--compare", f"base={base}", str(run.path), *([] if knows_data(run) else ["--data", "DATA"])]
        words.append(["python", "tools/evaluate.py", *compared, "--out", str(out)])
    return [shlex.join(line) for line in words]


def knows_data(run: Run) -> bool:
    """Whether the run's record names a data set that tools can read."""
    try:
        from_run(run.path)
    except UserError:
        return False
    return True


def data_of(run: Run) -> str:
    """The run's images, split and view in words, or the reason why they are unknown."""
    if find_run(run.path) is None:
        return "-"
    try:
        source = from_run(run.path)
    except UserError as error:
        return f"unknown: {error}"
    split = f", split by {source.split_file}" if source.split_file else ""
    view = f"crop {source.crop}" if source.crop else "whole images"
    return f"{source.data}{split}; {view}, {source.resolution} px, {source.bits} bits"


def _resolved(run: Run) -> Any:
    from omegaconf import OmegaConf

    file = run.path / "config_resolved.yaml"
    return OmegaConf.to_container(load_yaml(file), resolve=False) if file.exists() else {}


def _pairs(raw: Any, resolved: Any) -> Iterator[tuple[str, Any]]:
    """Strings of the raw config with their resolved values."""
    if isinstance(raw, dict) and isinstance(resolved, dict):
        for key in (key for key in raw if key in resolved):
            yield from _pairs(raw[key], resolved[key])
    elif isinstance(raw, list) and isinstance(resolved, list):
        for pair in zip(raw, resolved):
            yield from _pairs(*pair)
    elif isinstance(raw, str):
        yield raw, resolved


def _at(tree: Any, *keys: str) -> Any:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree
