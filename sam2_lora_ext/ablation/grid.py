"""Builds the members of a grid of overrides, collects their results, and writes a table and a plot of them.

A member is a separate run in its own folder, so it resumes like any run and is finished when its summary exists.
"""

import csv
import hashlib
import io
import itertools
import json
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sam2_lora_ext.run.state import SUMMARY, is_finished, validations
from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.files import LARGEST_NOTE, read_json, write_atomic, write_json

MEMBER, LOG = "member.json", "ablation.log"
METRICS = ("iou_1click", "dice_1click", "iou_8clicks", "dice_8clicks", "clean_accuracy")
OPENING, CLOSING = "[{(", "]})"


@dataclass(frozen=True)
class Member:
    """One point of the grid: its overrides by key, and its run folder."""

    values: dict[str, str] = field(hash=False)
    folder: Path

    @property
    def name(self) -> str:
        """The last part of each key with its value, such as "rank=8, dropout=0.1"."""
        return ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in self.values.items())

    @property
    def overrides(self) -> list[str]:
        """The overrides in Hydra's grammar."""
        return [f"{key}={value}" for key, value in self.values.items()]


def parse_grid(axes: Sequence[str]) -> dict[str, list[str]]:
    """Key -> values of axes such as "lora.rank=4,8,16" or "lora.targets=[a,b],[c]" (not split in brackets).

    Raises:
        UserError: an axis does not have this form, or repeats a key or a value.
    """
    grid: dict[str, list[str]] = {}
    for axis in axes:
        key, equals, text = axis.partition("=")
        values = [value.strip() for value in _split(text)]
        if not equals or not re.fullmatch(r"\+{0,2}[\w.@/-]+", key) or not all(values):
            raise UserError(f"--grid must be key=value,value ..., got {axis!r}")
        if key in grid or len(set(values)) < len(values):
            raise UserError(f"--grid names {key} or one of its values twice: {axis!r}")
        grid[key] = values
    return grid


def members_of(grid: dict[str, list[str]], out: Path) -> list[Member]:
    """All combinations of a grid's values, each with a folder below `out` named after its values."""
    found = []
    for values in itertools.product(*grid.values()):
        chosen = dict(zip(grid, values, strict=True))
        member = Member(chosen, out / label_of(chosen))
        found.append(member)
    return found


def note_settings(members: Sequence[Member], common: Sequence[str]) -> None:
    """Writes each member's settings into its folder, for people to read."""
    for member in members:
        write_json(member.folder / MEMBER, {"values": member.values, "common": list(common)})


def label_of(values: dict[str, str]) -> str:
    """A folder's name for key -> value, the same in every grid; shortened with a hash if necessary."""
    whole = "_".join(f"{key.rpartition('.')[2]}-{value}" for key, value in values.items())
    label = re.sub(r"[^\w.-]+", "-", whole).strip("-")
    if label == whole and len(label) <= 80:
        return label
    return f"{label[:70]}_{hashlib.sha256(json.dumps(values).encode()).hexdigest()[:8]}"


def metrics_of(config: Any) -> tuple[list[str], str | None, str]:
    """The metrics of a composed config's validation, the monitored metric, and its mode, "max" or "min"."""
    from hydra.utils import instantiate

    trainer = config.trainer
    steps = trainer.model.get("num_correction_pt_per_frame", 7) + 1
    meters = [instantiate(meter) for group in trainer.meters.val.values() for meter in group.values()]
    keys = [key for meter in meters if hasattr(meter, "keys") for key in meter.keys(steps, tracked=True)]
    return keys, trainer.get("monitor"), trainer.get("monitor_mode", "max")


def reason_of_failure(member: Member, code: int) -> str:
    """The error message of a member's process, from its log."""
    log = member.folder / LOG
    lines = (
        [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
    )
    sentences = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (sentences or lines or ["no error message"])[-1][:500] + f" (exit code {code}; log: {log})"


def collect(members: Sequence[Member], failures: dict[str, str], metric: str = METRICS[0]) -> list[dict[str, Any]]:
    """One row per member: its values, `status`, trained parameters and best validation (by the monitored metric).

    Args:
        members: the grid's members.
        failures: folder name -> reason, for members that failed this time.
        metric: an additional column.
    """
    rows = []
    for member in members:
        row: dict[str, Any] = {"member": member.folder.name, **member.values, "status": "failed", "reason": ""}
        if is_finished(member.folder):
            summary = read_json(member.folder / SUMMARY, LARGEST_NOTE)
            best = summary["best"] or {"metrics": {}, "step": None}
            row |= {
                "status": "finished",
                "params_trained": summary["parameters"]["trained"],
                "best_step": best["step"],
                "steps": summary["steps"],
                "seconds": summary["wall_seconds"],
            }
            row |= {name: best["metrics"].get(name) for name in (*METRICS, summary["monitor"], metric)}
        elif reason := failures.get(member.folder.name):
            row["reason"] = reason
        elif entries := validations(member.folder):
            row |= {"status": "unfinished", "reason": f"last validation at step {entries[-1]['step']}"}
        else:
            row["reason"] = "not run"
        rows.append(row)
    return rows


def best_of(rows: Sequence[dict[str, Any]], metric: str, mode: str = "max") -> dict[str, Any] | None:
    """The finished member with the highest ("max") or lowest ("min") metric; of equal ones the smallest."""
    known = [row for row in rows if row.get(metric) is not None]
    sign = 1 if mode == "max" else -1
    return max(known, key=lambda row: (sign * row[metric], -row["params_trained"]), default=None)


def to_csv(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as CSV with the union of their columns."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def to_markdown(rows: Sequence[dict[str, Any]], metric: str, mode: str = "max") -> str:
    """A Markdown table of the members, numbered as in the plot, with the best in bold."""
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in ("member", "reason")]
    best = best_of(rows, metric, mode)
    lines = ["| " + " | ".join(["#", *columns]) + " |", "|" + " --- |" * (len(columns) + 1)]
    for number, row in enumerate(rows, start=1):
        cells = [str(number), *(_cell(row.get(column)) for column in columns)]
        cells = [f"**{cell}**" if row is best and cell else cell for cell in cells]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(members: Sequence[Member], rows: Sequence[dict[str, Any]], metric: str, path: Path, mode: str = "max") -> None:
    """Plots the metric over the trained parameters: a numbered point per finished member, a star for the best.

    Without a finished member nothing is written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, NullFormatter

    known = [
        (number, member, row)
        for number, (member, row) in enumerate(zip(members, rows, strict=True), start=1)
        if row.get(metric) is not None
    ]
    if not known:
        return
    best = best_of(rows, metric, mode)
    figure = Figure(figsize=(8, 4.5 + 0.18 * len(known)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, member, row in known:
        place, name = (row["params_trained"], row[metric]), textwrap.shorten(member.name, 110, placeholder=" ...")
        chosen = row is best
        axes.scatter(
            *place,
            marker="*" if chosen else "o",
            s=180 if chosen else 50,
            color=f"C{(number - 1) % 10}",
            zorder=3,
            label=f"{number}: {name}{' (best)' if chosen else ''}",
        )
        axes.annotate(str(number), place, textcoords="offset points", xytext=(6, 5), fontsize=9)
    axes.set(xlabel="trained parameters", ylabel=f"{metric} (best validation)", xscale="log")
    axes.margins(0.08)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    sizes = [row["params_trained"] for _, _, row in known]
    axes.xaxis.set_minor_formatter(EngFormatter(sep="") if max(sizes) < 10 * min(sizes) else NullFormatter())
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside lower left", fontsize=8, frameon=False)
    write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))


def _split(text: str) -> list[str]:
    """Splits at commas outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        depth += (character in OPENING and not quote) - (character in CLOSING and not quote)
        if character == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return (
        f"{value:.4f}"
        if isinstance(value, float)
        else f"{value:,}"
        if isinstance(value, int)
        else str(value).replace("|", "\\|")
    )
