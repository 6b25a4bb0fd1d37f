"""Rows of `benchmarks.train_step` as a Markdown table, with ratios to full fine-tuning."""

import statistics
from typing import Any

COLUMNS = {  # key -> heading, unit, format
    "kernels": ("kernels", 1, ",.0f"),
    "saved_bytes": ("MB kept", 1e6, ",.0f"),
    "peak_live_bytes": ("MB peak", 1e6, ",.0f"),
    "flops": ("GFLOP", 1e9, ",.0f"),
    "moved_bytes": ("GB moved", 1e9, ",.1f"),
    "host_ms": ("host ms, modelled", 1, ",.0f"),
    "A10G": ("A10G ms, modelled", 1, ",.0f"),
    "RTX4090": ("RTX 4090", 1, ",.0f"),
    "A100": ("A100", 1, ",.0f"),
    "H200": ("H200", 1, ",.0f"),
    "waits": ("waits", 1, ".0f"),
    "largest_batch_24gb": ("images in 24 GB", 1, ".0f"),
    "optimizer_bytes": ("MB optimizer", 1e6, ",.0f"),
    "peak_rss_bytes": ("MB resident", 1e6, ",.0f"),
    "step_seconds": ("s a step, CPU", 1, ".2f"),
}
PLACE = ("model", "resolution", "images", "objects", "autocast")  # keys that compared rows have in common
CARDS_KEY = "modelled_ms"


def value(row: dict[str, Any], key: str) -> float | None:
    """A row's number in a column; for a card, the modelled milliseconds."""
    return row.get(CARDS_KEY, {}).get(key, row.get(key))


def add_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds `ratio_to_full` to each row: key -> ratio to full fine-tuning in the same case; for times, by round."""
    for row in rows:
        full = next((one for one in rows if one["method"] == "full" and _place(one) == _place(row)), {})
        row["ratio_to_full"] = {
            key: value(row, key) / value(full, key) for key in COLUMNS if value(row, key) and value(full, key)
        }
        if "rounds_seconds" in row and "rounds_seconds" in full:
            pairs = zip(row["rounds_seconds"], full["rounds_seconds"], strict=True)
            row["ratio_to_full"]["step_seconds"] = statistics.median(one / other for one, other in pairs)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown; ratios to full fine-tuning in brackets."""
    keys = [key for key in COLUMNS if any(value(row, key) for row in rows)]
    lines = ["| step | method | " + " | ".join(COLUMNS[key][0] for key in keys) + " |", "|---" * (len(keys) + 2) + "|"]
    for row in rows:
        batch = f" {row['images']}x{row['objects']}" if "images" in row else ""
        kind = {True: " bfloat16", False: " float32", None: ""}[row.get("autocast")]
        cells = [f"{row['model']} {row['resolution']}{batch}{kind}", row["method"]]
        for key in keys:
            _, unit, style = COLUMNS[key]
            number, ratio = value(row, key), row["ratio_to_full"].get(key)
            cells.append(
                (f"{number / unit:{style}}" + (f" ({ratio:.2f})" if ratio is not None else "")) if number else ""
            )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _place(row: dict[str, Any]) -> tuple:
    return tuple(row.get(key) for key in PLACE)
