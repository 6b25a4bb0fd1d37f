"""The commands that repeat a run: its config with the environment it was composed with, then merge and evaluate."""

import re
import shlex
from collections.abc import Iterator
from typing import Any

from sam2_lora_ext.report.collect import Run

VARIABLE = re.compile(
    r"^(?P<before>[^$]*)(?:\$\{oc\.decode:)?\$\{oc\.env:(?P<name>\w+)[^}]*(?:\{[^}]*\}[^}]*)?\}\}?(?P<after>[^$}]*)$"
)


def training_command(run: Run) -> str | None:
    """The shell command that trains the same again into another folder; None where the run has no config.yaml."""
    config = run.path / "config.yaml"
    if not config.exists():
        return None
    variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in environment(run).items())
    folder = shlex.quote(f"{run.path}_again")
    return f"{variables} python -m sam2_lora_ext.train -c {shlex.quote(str(config.resolve()))} launcher.experiment_log_dir={folder}".strip()


def environment(run: Run) -> dict[str, str]:
    """The values that environment variables had in the run's config, found by laying its two forms side by side."""
    from omegaconf import OmegaConf

    files = [run.path / "config.yaml", run.path / "config_resolved.yaml"]
    if not all(file.exists() for file in files):
        return {}
    raw, resolved = (OmegaConf.to_container(OmegaConf.load(file), resolve=False) for file in files)
    found: dict[str, str] = {}
    for text, value in _pairs(raw, resolved):
        if (match := VARIABLE.match(text)) and value is not None and "launcher.experiment_log_dir" not in text:
            known = str(value)
            if known.startswith(match["before"]) and known.endswith(match["after"]):
                found[match["name"]] = known[len(match["before"]) : len(known) - len(match["after"])]
    log_dir = _at(raw, "launcher", "experiment_log_dir")
    if log_dir and (match := VARIABLE.match(str(log_dir))):
        found.pop(match["name"], None)  # the command names another folder
    return found


def use_commands(run: Run) -> list[str]:
    """Merging the adapter, and measuring it against its base."""
    base, config = run.lora.get("base_path"), run.lora.get("model_config")
    if not base or not (run.path / "adapters").is_dir():
        return []
    merged = f"{run.path.name}_merged.pt"
    verify = f" --verify {shlex.quote(config)}" if config else ""
    return [
        f"python tools/merge_lora.py --base {shlex.quote(base)} --adapter {shlex.quote(str(run.path))} --out {shlex.quote(merged)}{verify}",
        f"python tools/evaluate.py --compare base={shlex.quote(base)} {shlex.quote(str(run.path))} --data DATA --split-file SPLIT.csv "
        f"--split val --out {shlex.quote(str(run.path / 'evaluation'))}",
    ]


def _pairs(raw: Any, resolved: Any) -> Iterator[tuple[str, Any]]:
    """Strings of the raw config with what became of them."""
    if isinstance(raw, dict) and isinstance(resolved, dict):
        for key in raw.keys() & resolved.keys():
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
