"""The commands that repeat a run: its config with the environment it was composed with, then merge and evaluate."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sam2_lora_ext.report.collect import Run
from sam2_lora_ext.yaml_files import load_yaml

VARIABLE = re.compile(
    r"^(?P<before>[^$]*)(?:\$\{oc\.decode:)?\$\{oc\.env:(?P<name>\w+)[^}]*(?:\{[^}]*\}[^}]*)?\}\}?(?P<after>[^$}]*)$"
)


def training_command(run: Run) -> str | None:
    """The shell command that trains the same again into another folder; None where the run has no config.yaml."""
    config = run.path / "config.yaml"
    if not config.exists():
        return None
    variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in environment(run).items())
    command = ["python", "-m", "sam2_lora_ext.train", "-c", str(config.resolve())]
    return f"{variables} {shlex.join([*command, f'launcher.experiment_log_dir={run.path}_again'])}".strip()


def environment(run: Run) -> dict[str, str]:
    """The values that environment variables had in the run's config, found by laying its two forms side by side."""
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
        found.pop(match["name"], None)  # the command names another folder
    return found


def use_commands(run: Run) -> list[str]:
    """Merging the adapter, and measuring it against its base on the run's own validation data."""
    base, config = run.lora.get("base_path"), run.lora.get("model_config")
    if not base:
        return []
    words = []
    if (run.path / "adapters").is_dir():
        merge = ["--base", base, "--adapter", str(run.path), "--out", f"{run.path.name}_merged.pt"]
        words.append(["python", "tools/merge_lora.py", *merge, *(["--verify", config] if config else [])])
    if (run.path / "adapters").is_dir() or (run.path / "weights").is_dir():
        compared, out = ["--compare", f"base={base}", str(run.path)], ["--out", str(run.path / "evaluation")]
        words.append(["python", "tools/evaluate.py", *compared, *evaluation_options(run), *out])
    return [shlex.join(line) for line in words]


def evaluation_options(run: Run) -> list[str]:
    """What tools/evaluate.py needs to ask about the run's validation data in the run's own way."""
    trainer = _resolved(run).get("trainer") or {}
    video = validation_data(run)
    reader = video.get("reader") or {}
    labels = Path(str(reader.get("label_dir")))
    sources = {
        "KaggleReader": ["--data", reader.get("csv"), "--images", reader.get("image_dir"), "--size", _size(reader)],
        "COCOReader": ["--data", reader.get("json"), "--images", reader.get("image_dir")],
        "SuperviselyReader": ["--data", reader.get("root")],
        "LabelPNGReader": ["--data", labels.parent, "--images", reader.get("image_dir")],
    }
    options = sources.get(str(reader.get("_target_")).rpartition(".")[2], ["--data", "DATA"])
    if isinstance(reader.get("classes"), list):
        options += ["--classes", ",".join(map(str, reader["classes"]))]
    named = {"split_file": "--split-file", "split": "--split", "objects": "--objects", "min_area": "--min-area",
             "group_width": "--crop"}  # fmt: skip
    for key, option in named.items():
        options += [option, video[key]] if video.get(key) is not None else []
    size = (trainer.get("model") or {}).get("image_size")
    return list(map(str, [*options, *(["--image-size", size] if size else [])]))


def validation_data(run: Run) -> dict[str, Any]:
    """The config of the data set that the run validates on; empty where it is not one of ours."""
    sets = _at(_resolved(run), "trainer", "data", "val", "datasets")
    data = sets[0] if isinstance(sets, list) and sets else {}
    while "video_dataset" not in data and isinstance(data.get("dataset"), dict):
        data = data["dataset"]
    return data.get("video_dataset") or {}


def data_of(run: Run) -> str:
    """Where the run's images and splits are."""
    video = validation_data(run)
    reader = video.get("reader") or {}
    images = reader.get("image_dir") or reader.get("root")
    return "-" if not images else f"{images}" + (f", split by {video['split_file']}" if video.get("split_file") else "")


def _resolved(run: Run) -> Any:
    from omegaconf import OmegaConf

    file = run.path / "config_resolved.yaml"
    return OmegaConf.to_container(load_yaml(file), resolve=False) if file.exists() else {}


def _size(reader: dict[str, Any]) -> str:
    size = reader.get("size", (256, 1600))
    return "any" if size is None else f"{size[1]}x{size[0]}"


def _pairs(raw: Any, resolved: Any) -> Iterator[tuple[str, Any]]:
    """Strings of the raw config with what became of them."""
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
