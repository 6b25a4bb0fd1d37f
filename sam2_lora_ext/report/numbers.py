"""The tables of an evaluation as HTML: means with intervals, differences, classes, sizes, false alarms, speed."""

from collections.abc import Sequence
from html import escape
from typing import Any

from sam2_lora_ext.evaluate.run import Protocol
from sam2_lora_ext.evaluate.tables import headline
from sam2_lora_ext.report.collect import Evaluation
from sam2_lora_ext.report.html import Raw, table

FEWER_IS_BETTER = ("clicks_to", "missed")


def tables(evaluation: Evaluation) -> str:
    """The main table, differences, classes, sizes, false alarms, Kaggle, speed."""
    record, data = evaluation.record, evaluation.record["data"]
    protocol, models = Protocol(**record["protocol"]), record["models"]
    titles, names = headline(protocol), [model["name"] for model in models]
    view = (
        f"tiles of {protocol.tile} columns"
        if protocol.tile
        else f"cut to {protocol.crop} columns"
        if protocol.crop
        else "whole strips"
    )
    parts = [
        f"<h2>Evaluation</h2><p>{data['objects']} objects and {data['clean_images']} clean images of {escape(data['image_dir'])}"
        f"{', split ' + escape(data['split']) if data['split'] else ''}; {view}, stock predictors. Means over objects with 95 % intervals by image.</p>",
        table(
            ["", *names],
            [[title, *[_cell(model["metrics"].get(key)) for model in models]] for key, title in titles.items()],
        ),
    ]
    if record["differences"]:
        rows = [
            [title, *[_cell(values.get(key), key) for values in record["differences"].values()]]
            for key, title in titles.items()
        ]
        parts += [
            f"<h3>Differences from {escape(record['reference'])}</h3><p class=soft>Object by object on the same objects; coloured where the "
            "interval leaves out 0.</p>",
            table(["", *record["differences"]], rows),
        ]
    few = {key: title for key, title in titles.items() if key.startswith("iou_") and not title.endswith("%")}
    for kind, heading in (("classes", "By class"), ("sizes", "By size (small below 32², large from 96² pixels)")):
        rows = [
            [
                f"{model['name']}, {group} ({next(iter(values.values()))['objects']})",
                *[_cell(values.get(key)) for key in few],
            ]
            for model in models
            for group, values in model[kind].items()
        ]
        parts += [f"<h3>{heading}</h3>", table(["", *few.values()], rows)]
    parts += ["<h3>Sound steel, Kaggle, speed</h3>", table(["", *names], _other_rows(models))]
    return "".join(parts)


def _other_rows(models: Sequence[dict[str, Any]]) -> list[list[Any]]:
    def bounds(model: dict[str, Any], key: str) -> Any:
        presence = model["presence"]
        if not presence:
            return "-"
        low, high = presence[f"{key}_ci95"]
        return _cell({"mean": presence[key], "low": low, "high": high})

    def kaggle(model: dict[str, Any], prompt: str, key: str) -> str:
        return f"{model['kaggle'][prompt][key]:.4f}" if model["kaggle"] and prompt in model["kaggle"] else "-"

    def value(number: float | None, form: str) -> str:
        return "-" if number is None else form.format(number)

    return [
        ["AUROC of the object score", *[bounds(model, "auroc") for model in models]],
        ["false alarms at 95 % recall", *[bounds(model, "false_alarms") for model in models]],
        ["Kaggle mean Dice, classes by prompt, 1 click", *[kaggle(model, "1click", "dice") for model in models]],
        ["the same, box", *[kaggle(model, "box", "dice") for model in models]],
        ["the same, empty submission", *[kaggle(model, "box", "empty_submission") for model in models]],
        ["automatic masks an image", *[value(model["automatic_masks_per_image"], "{:.1f}") for model in models]],
        [
            "ms an image, ms a click",
            *[
                f"{value(model['speed']['encode_ms'], '{:.0f}')}, {value(model['speed']['click_ms'], '{:.0f}')} ({model['device']})"
                for model in models
            ],
        ],
    ]


def _cell(value: dict[str, float] | None, difference: str | None = None) -> str | Raw:
    """A mean with its interval; as the difference in a metric it is signed, and coloured by who is better."""
    if value is None:
        return "-"
    sign = "+" if difference else ""
    shown = f"{value['mean']:{sign}.3f}"
    if value.get("objects") == 1:  # one object has no interval
        return shown
    shown += f" <small>[{value['low']:{sign}.3f}, {value['high']:{sign}.3f}]</small>"
    if difference and (value["low"] > 0 or value["high"] < 0):
        better = (value["mean"] > 0) != difference.startswith(FEWER_IS_BETTER)
        shown = f'<span class="{"better" if better else "worse"}">{shown}</span>'
    return Raw(shown)
