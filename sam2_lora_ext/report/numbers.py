"""Formats the tables of an evaluation as HTML."""

from collections.abc import Mapping
from html import escape
from typing import Any

from sam2_lora_ext.evaluate.protocol import Protocol
from sam2_lora_ext.evaluate.text import (
    cell,
    conditions_lines,
    costs,
    groups,
    other_differences,
    other_rows,
    summary_line,
)
from sam2_lora_ext.evaluate.titles import (
    FEWER_IS_BETTER,
    OTHER_TITLE,
    SIZES_TITLE,
    details,
    grouped,
    headline,
    overview,
)
from sam2_lora_ext.report.collect import Evaluation
from sam2_lora_ext.report.html import Raw, folded, table


def tables(evaluation: Evaluation) -> str:
    """The overview, the main table, differences, classes, sizes, false alarms, Kaggle's score and speed."""
    record = evaluation.record
    protocol, models = Protocol.of(record["protocol"]), record["models"]
    names = [model["name"] for model in models]

    def means(titles: Mapping[str, str]) -> str:
        rows = [[title, *[_shown(model["metrics"].get(key)) for model in models]] for key, title in titles.items()]
        return table(["", *names], rows)

    parts = [f"<h2>Evaluation</h2><p>{escape(summary_line(record))}</p>"]
    if lines := conditions_lines(record.get("conditions")):
        parts.append(f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>")
    if len(models) > 1:
        titles = overview(protocol)
        lines = [
            [model["name"], *costs(model), *[_shown(model["metrics"].get(key)) for key in titles]] for model in models
        ]
        parts.append(table(["", "trained", "file", *titles.values()], lines))
    parts += ["<h3>IoU, clicks, automatic masks</h3>" if len(models) > 1 else "", means(headline(protocol))]
    parts.append(folded("Dice and boundary F at each prompt", means(details(protocol))))
    if record["differences"]:
        changes = record["differences"].values()
        titles = headline(protocol) | other_differences(record)
        lines = [[title, *[_difference(values.get(key), key) for values in changes]] for key, title in titles.items()]
        parts += [
            f"<h3>Differences from {escape(record['reference'])}</h3>",
            "<p class=soft>On the same objects; green is better, red is worse, where the interval excludes 0.</p>",
            table(["", *record["differences"]], lines),
        ]
    for kind, heading in (("classes", "By class"), ("sizes", SIZES_TITLE)):
        titles = grouped(protocol)
        lines = [[name, *[_shown(values.get(key)) for key in titles]] for name, values in groups(models, kind)]
        parts += [f"<h3>{heading}</h3>", table(["", *titles.values()], lines)]
    lines = [[title, *map(_small, cells)] for title, cells in other_rows(models) if any(text != "-" for text in cells)]
    parts += [f"<h3>{OTHER_TITLE}</h3>", table(["", *names], lines)]
    return "".join(parts)


def _shown(value: Mapping[str, Any] | None) -> Raw:
    return _small(cell(value))


def _difference(value: Mapping[str, Any] | None, metric: str) -> Raw:
    """A signed difference, coloured as better or worse if its interval excludes 0."""
    shown = _small(cell(value, signed=True).replace("*", ""))
    if value is None or value["low"] <= 0 <= value["high"]:
        return shown
    better = (value["mean"] > 0) != metric.startswith(FEWER_IS_BETTER)
    return Raw(f'<span class="{"better" if better else "worse"}">{shown}</span>')


def _small(text: str) -> Raw:
    """`0.512 [0.490, 0.530]` with the interval in small print."""
    return Raw(escape(text).replace("[", "<small>[").replace("]", "]</small>"))
