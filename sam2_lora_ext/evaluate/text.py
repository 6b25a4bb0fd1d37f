"""Formats the tables of an evaluation as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from sam2_lora_ext.evaluate.protocol import Protocol
from sam2_lora_ext.evaluate.tables import Interval
from sam2_lora_ext.evaluate.titles import (
    OTHER,
    OTHER_TITLE,
    SIZES_TITLE,
    details,
    grouped,
    headline,
    overview,
    prompt_title,
)


def describe(record: Mapping[str, Any]) -> str:
    """All tables of an `evaluation.json` as Markdown."""
    protocol, models = Protocol.of(record["protocol"]), record["models"]
    names, parts = [model["name"] for model in models], [f"{summary_line(record)}\n"]
    if lines := conditions_lines(record.get("conditions")):
        parts.append("".join(f"- {line}\n" for line in lines))
    if len(models) > 1:
        parts.append(overview_table(models, overview(protocol)))
    columns = [(model["name"], model["metrics"]) for model in models]
    parts.append(text_table(columns, headline(protocol)))
    if record["differences"]:
        changes = list(record["differences"].items())
        parts += [
            f"Differences from {record['reference']} on the same objects (* where the interval excludes 0):\n",
            text_table(changes, headline(protocol) | other_differences(record), signed=True),
        ]
    parts += ["Dice and boundary F:\n", text_table(columns, details(protocol))]
    for kind, heading in (("classes", "By class"), ("sizes", SIZES_TITLE)):
        parts += [f"{heading}:\n", group_table(models, kind, grouped(protocol))]
    rows = [[title, *cells] for title, cells in other_rows(models) if any(cell != "-" for cell in cells)]
    parts += [f"{OTHER_TITLE}:\n", _lines(["", *names], rows)]
    return "\n".join(parts)


def summary_line(record: Mapping[str, Any]) -> str:
    """A sentence about the data and the prompts."""
    protocol, data = Protocol.of(record["protocol"]), record["data"]
    split = f", split {data['split']}" if data["split"] else ""
    clicks = f"clicks of {record['reference']} for all" if protocol.same_clicks else "clicks in the largest error"
    return (
        f"{data['objects']} objects in {data['images'] - data['clean_images']} images and {data['clean_images']} clean "
        f"images of {data['image_dir']}{split}; {protocol.view}, {clicks}. "
        "Means over objects with 95 % intervals by image."
    )


def conditions_lines(said: Mapping[str, Any] | None) -> list[str]:
    """Lines about the conditions and their differences from each run's own; empty for old evaluations."""
    if not said:
        return []
    used = said["used"]
    view = f"tiles of {used['tile']} columns" if used["tile"] else f"crop {used['crop']}" if used["crop"] else "whole"
    size = f"{used['resolution']} px" if used["resolution"] else "the stock config's size"
    splits = [used["split"]] if isinstance(used["split"], str) else used["split"] or []
    names = f", split {', '.join(splits)}" if splits else ""
    turned = "upright by EXIF" if used["exif"] else "as stored"
    return [
        f"conditions, from {said['origin']}: {view}, {size}, {used['bits']} bits, images {turned}, "
        f"objects {used['objects']} of at least {used['min_area']} px{names}"
        + (f" of {used['split_file']}" if used["split_file"] else ""),
        f"data: {used['data']}",
        *said["sentences"],
    ]


def overview_table(models: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> str:
    """A table with the cost and quality of each model."""
    rows = [
        [model["name"], *costs(model), *[cell(model["metrics"].get(metric)) for metric in titles]] for model in models
    ]
    return _lines(["model", "trained", "file", *titles.values()], rows)


def group_table(models: Sequence[Mapping[str, Any]], kind: str, titles: Mapping[str, str]) -> str:
    """A table with a line for each model and class, or each model and size."""
    rows = [[name, *[cell(values.get(metric)) for metric in titles]] for name, values in groups(models, kind)]
    return _lines(["", *titles.values()], rows)


def groups(models: Sequence[Mapping[str, Any]], kind: str) -> list[tuple[str, Mapping[str, Interval]]]:
    """The name (with the number of objects) and the means of each group, by class or size and then by model."""
    found = [(model["name"], name, model[kind][name]) for name in models[0][kind] for model in models]
    return [(f"{name} ({next(iter(values.values()))['objects']}), {model}", values) for model, name, values in found]


def costs(model: Mapping[str, Any]) -> list[str]:
    """The number of trained parameters and the size of their file."""
    trained = model["trained_parameters"]
    return ["-" if trained is None else f"{trained:,}", f"{model['file_bytes'] / 1e6:.2f} MB"]


def other_rows(models: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Rows of a title and a cell for each model: false alarms, Kaggle's score, automatic masks, speed."""

    def presence(model: Mapping[str, Any], key: str) -> str:
        found = model["presence"]
        return "-" if not found else bounds(found[key], *found[f"{key}_ci95"])

    def kaggle(model: Mapping[str, Any], prompt: str, key: str) -> str:
        found = (model["kaggle"] or {}).get(prompt)
        return "-" if not found else bounds(found[key], *found[f"{key}_ci95"], digits=4)

    def speed(model: Mapping[str, Any], key: str) -> str:
        value = model["speed"].get(key)
        return "-" if value is None else f"{value:.0f} ({model['device']})"

    prompts = next((list(model["kaggle"]) for model in models if model["kaggle"]), [])
    rows: list[tuple[str, Any]] = [(title, lambda model, key=key: presence(model, key)) for key, title in OTHER.items()]
    threshold = lambda model: _number((model["presence"] or {}).get("threshold"))  # noqa: E731
    rows.append(("object score at this recall", threshold))
    for prompt in prompts:
        title = f"Kaggle Dice {prompt_title(prompt)}"
        rows.append((title, lambda model, prompt=prompt: kaggle(model, prompt, "dice")))
        present = lambda model, prompt=prompt: kaggle(model, prompt, "dice_present")  # noqa: E731
        rows.append((f"{title}, defects only", present))
    if prompts:
        empty = next(model["kaggle"][prompts[0]]["empty_submission"] for model in models if model["kaggle"])
        rows.append(("Kaggle Dice of an empty submission", lambda model: f"{empty:.4f}"))
    rows.append(("automatic masks per image", lambda model: _number(model["automatic_masks_per_image"])))
    speeds = {"encode_ms": "per image", "click_ms": "per click", "box_ms": "per box", "automatic_ms": "automatic masks"}
    for key, what in speeds.items():
        rows.append((f"ms {what}, median", lambda model, key=key: speed(model, key)))
    return [(title, [value(model) for model in models]) for title, value in rows]


def text_table(
    columns: Sequence[tuple[str, Mapping[str, Interval]]], metrics: Mapping[str, str], signed: bool = False
) -> str:
    """A Markdown table: a column for each name, a row for each metric (key -> title); for `signed` see `cell`."""
    rows = [[title, *[cell(values.get(metric), signed) for _, values in columns]] for metric, title in metrics.items()]
    return _lines(["", *[name for name, _ in columns]], rows)


def cell(value: Interval | None, signed: bool = False) -> str:
    """`0.512 [0.490, 0.530]`; a signed cell has a `*` if its interval excludes 0. One image has no interval."""
    if value is None:
        return "-"
    if value.get("images") == 1:
        return f"{value['mean']:{'+' if signed else ''}.3f}"
    mark = "*" if signed and (value["low"] > 0 or value["high"] < 0) else ""
    return bounds(value["mean"], value["low"], value["high"], signed, mark)


def bounds(mean: float, low: float, high: float, signed: bool = False, mark: str = "", digits: int = 3) -> str:
    """`0.512 [0.490, 0.530]`."""
    form = f"{'+' if signed else ''}.{digits}f"
    return f"{mean:{form}}{mark} [{low:{form}}, {high:{form}}]"


def other_differences(record: Mapping[str, Any]) -> dict[str, str]:
    """The metrics whose differences are not means over objects, and their titles."""
    keys = dict.fromkeys(key for values in record["differences"].values() for key in values)
    prompts = {key: prompt_title(key.removeprefix("kaggle_")) for key in keys if key.startswith("kaggle_")}
    kaggle = {key: f"Kaggle Dice {title}" for key, title in prompts.items()}
    return {key: title for key, title in OTHER.items() if key in keys} | kaggle


def _lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [list(header), ["---"] * len(header), *map(list, rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells) + "\n"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
