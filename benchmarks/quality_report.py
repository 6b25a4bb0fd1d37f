"""The table and the picture of `benchmarks.quality`: IoU with intervals, and the share of full fine-tuning's gain."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

METRICS = {"iou_1click": "1 click", "iou_8clicks": "8 clicks", "iou_box": "box"}


def recovered(rows: list[dict], method: str, metric: str) -> float | None:
    """The share of full fine-tuning's gain over the base that a method reaches."""
    by_name = {row["method"]: row[metric] for row in rows}
    if not {"base", "full", method} <= set(by_name) or by_name["full"] <= by_name["base"]:
        return None
    return (by_name[method] - by_name["base"]) / (by_name["full"] - by_name["base"])


def table(rows: list[dict]) -> str:
    """A Markdown table with intervals, and the recovered share of the gain."""
    lines = [
        "| method | IoU 1 click | IoU 8 clicks | IoU box "
        "| gain recovered (1 click / 8 clicks / box) | trained | checkpoint |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [f"{row[m]:.3f} [{row[f'{m}_ci95'][0]:.3f}, {row[f'{m}_ci95'][1]:.3f}]" for m in METRICS]
        shares = [recovered(rows, row["method"], metric) for metric in METRICS]
        gain = (
            " / ".join("-" if share is None else f"{share:.0%}" for share in shares) if row["method"] != "base" else "-"
        )
        size = f"{row['checkpoint_bytes'] / 1e6:.2f} MB" if row["checkpoint_bytes"] else "-"
        lines.append(f"| {row['method']} | {' | '.join(cells)} | {gain} | {row['params_trained']:,} | {size} |")
    return "\n".join(lines) + "\n"


def draw(rows: list[dict], out: Path, path: Path) -> None:
    """Bars with intervals, and the validation curves of the runs."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 4.6))
    for offset, (metric, title) in enumerate(METRICS.items()):
        centres = np.arange(len(rows)) + 0.27 * (offset - 1)
        heights = np.array([row[metric] for row in rows])
        bounds = np.array([row[f"{metric}_ci95"] for row in rows]).T
        axes[0].bar(centres, heights, 0.25, yerr=np.abs(bounds - heights), capsize=2, label=title)
    axes[0].set(
        xticks=range(len(rows)),
        xticklabels=[row["method"] for row in rows],
        ylabel="mean IoU, 300 held-out images",
        ylim=(0, 1),
    )
    axes[0].legend()
    for row in rows:
        file = out / row["method"] / "validations.json"
        if file.exists():
            history = json.loads(file.read_text())
            axes[1].plot(
                [e["step"] for e in history],
                [e["metrics"]["iou_1click"] for e in history],
                marker="o",
                label=row["method"],
            )
    axes[1].set(xlabel="optimizer step", ylabel="IoU at 1 click, validation images")
    axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    axes[1].grid(alpha=0.3)
    figure.suptitle("NEU-Seg, the small SAM 2 of the demo")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
