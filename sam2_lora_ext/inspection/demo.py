"""What the demo shows of an inspection without clicks: six numbers, and a picture of what was found and what not."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sam2_lora_ext.evaluate.pictures import save_grid
from sam2_lora_ext.inspection.showing import KINDS
from sam2_lora_ext.utils.files import inside

KEYS = ("kaggle_dice", "kaggle_dice_empty", "dice_present", "false_alarms", "recall", "ms_per_strip")


def figures(result: dict[str, Any]) -> dict[str, float | None]:
    """The numbers of an inspection.json's `result` that summary.json has; None where there is nothing to measure."""
    return {key: result[key]["mean"] if isinstance(result[key], dict) else result[key] for key in KEYS}


def draw_inspection(path: Path, folder: Path, record: dict[str, Any]) -> None:
    """A PNG: a row for each class with its largest defect found, missed, and false; truth green, found blue or orange.

    Args:
        path: of the picture.
        folder: of the inspection.
        record: its inspection.json.
    """
    first: dict[tuple[str, str], dict[str, str]] = {}
    for entry in record["gallery"]:
        first.setdefault((entry["class"], entry["kind"]), entry)
    names = list(record["result"]["classes"])
    shots = {key: np.asarray(Image.open(inside(folder, entry["file"]))) for key, entry in first.items()}
    height, width = next((shot.shape[:2] for shot in shots.values()), (64, 400))
    white = np.full((height, width, 3), 255, dtype=np.uint8)
    rows = [[_fit(shots.get((name, kind), white), height, width) for kind in KINDS] for name in names]
    captions = [
        [first[name, kind]["caption"] if (name, kind) in first else f"{name}: none {kind}" for kind in KINDS]
        for name in names
    ]
    save_grid(path, rows, captions, KINDS)


def _fit(shot: np.ndarray, height: int, width: int) -> np.ndarray:
    return shot if shot.shape[:2] == (height, width) else np.asarray(Image.fromarray(shot).resize((width, height)))
