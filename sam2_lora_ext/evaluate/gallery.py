"""Draws the gallery of an evaluation: best, median and worst one-click masks, and false alarms on clean strips."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sam2.modeling.sam2_utils import get_next_point

from sam2_lora_ext.data.ids import class_of
from sam2_lora_ext.data.rle import decode_runs
from sam2_lora_ext.evaluate.evaluation import CleanResult, ModelResult, ObjectResult
from sam2_lora_ext.evaluate.metrics import iou
from sam2_lora_ext.evaluate.pictures import AFTER, BEFORE, TRUTH, overlay
from sam2_lora_ext.evaluate.predictor import Sample
from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.files import EXISTS
from sam2_lora_ext.utils.folders import existing_folder, replace_folder

PICTURE = re.compile(r"(best|median|worst|false_alarms)_\d+\.jpg")
WIDEST, GAP = 900, 4  # pixels: largest width of a picture, distance between its halves


def choose(result: ModelResult, count: int = 4) -> dict[str, list[ObjectResult | CleanResult]]:
    """Chooses the best, median and worst objects by IoU at one click, at most `count` each, and false alarms.

    No object is chosen twice; of fewer than three objects only the best is chosen. A false alarm is a click on clean
    steel with a positive object score; they are in descending order of score, one per image.
    """
    values = iou(torch.tensor([row.by_clicks[0] for row in result.objects]).reshape(-1, 3)).tolist()
    order = [result.objects[o] for o in sorted(range(len(values)), key=lambda o: -values[o])]
    each = max(min(count, len(order) // 3), 1)
    best, rest = order[:each], order[each:]
    worst, rest = rest[::-1][:each], rest[: max(len(rest) - each, 0)]
    middle = max((len(rest) - each) // 2, 0)
    alarms: dict[str, CleanResult] = {}
    for row in sorted(result.clean, key=lambda row: -row.score):
        if row.score > 0:
            alarms.setdefault(row.image, row)
    return {
        "best": best,
        "median": rest[middle : middle + each],
        "worst": worst,
        "false alarms": list(alarms.values())[:count],
    }


def refuse_gallery(folder: Path, force: bool) -> None:
    """Raises a `UserError` if `folder` is not empty; with `force`, if it contains files other than pictures."""
    folder = existing_folder(folder)
    if not os.path.lexists(folder) or folder.is_dir() and not any(folder.iterdir()):
        return
    if not force:
        raise UserError(EXISTS.format(folder))
    strangers = (
        sorted(entry.name for entry in folder.iterdir() if not PICTURE.fullmatch(entry.name))
        if folder.is_dir()
        else [folder.name]
    )
    if strangers:
        raise UserError(
            f"--force replaces a gallery, but {folder} has {strangers[0]!r}, which is not one of its pictures: "
            "choose another --out"
        )


def write_gallery(
    folder: Path,
    result: ModelResult,
    samples: Sequence[Sample],
    class_names: dict[int, str],
    count: int = 4,
    *,
    force: bool = True,
) -> list[dict[str, Any]]:
    """Replaces a gallery with new JPEG pictures.

    Returns:
        `{kind, file, caption}` of each picture, `file` relative to the folder's parent.

    Raises:
        UserError: see `refuse_gallery`, or the folder cannot be written.
    """
    written = []

    def write(temporary: Path) -> None:
        for kind, rows in choose(result, count).items():
            for number, row in enumerate(rows):
                file = f"{kind.replace(' ', '_')}_{number}.jpg"
                picture, caption = draw(row, samples[row.item], class_names)
                picture.save(temporary / file, format="JPEG", quality=85)
                written.append({"kind": kind, "file": f"{folder.name}/{file}", "caption": caption})

    refuse_gallery(folder, force)
    old = existing_folder(folder)
    pictures = {entry.name for entry in old.iterdir() if PICTURE.fullmatch(entry.name)} if old.is_dir() else set()
    replace_folder(folder, write, pictures, force=force)
    return written


def draw(row: ObjectResult | CleanResult, sample: Sample, class_names: dict[int, str]) -> tuple[Image.Image, str]:
    """A picture of the truth and of the prediction with its click, and its caption."""
    height, width = sample.image.shape[:2]
    predicted, scale = decode_runs(row.runs, height, width) > 0, max(1.0, 2 * width / WIDEST)
    if isinstance(row, CleanResult):
        caption = f"{row.image}: clean, object score {row.score:.1f}, {predicted.mean():.1%} of the image masked"
        cells = [overlay(sample.image, predicted, BEFORE, row.click, scale)]
    else:
        truth = sample.masks[sample.object_ids.index(row.object_id), 0].numpy()
        value = float(iou(torch.tensor(row.by_clicks[0])))
        class_id = class_of(row.object_id)
        caption = f"{row.image}: {class_names.get(class_id, class_id)}, IoU {value:.2f}, score {row.score:.1f}"
        click = get_next_point(torch.from_numpy(truth)[None, None], None, "center")[0][0, 0].tolist()
        cells = [overlay(sample.image, truth, TRUTH, scale=scale)]
        cells.append(overlay(sample.image, predicted, AFTER, tuple(click), scale))
    axis = 0 if width > 2 * height else 1  # long strips are stacked
    gap = np.full((GAP, width, 3) if axis == 0 else (height, GAP, 3), 255, dtype=np.uint8)
    picture = Image.fromarray(np.concatenate(cells if len(cells) == 1 else [cells[0], gap, cells[1]], axis))
    if picture.width > WIDEST:
        picture = picture.resize((WIDEST, round(picture.height * WIDEST / picture.width)), Image.Resampling.LANCZOS)
    return picture, caption
