"""The demo's second part: inspects its strips with class prompts that were trained on top of the click model.

Thresholds are fitted to the validation strips; the table and the picture show test strips, which were not used before.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import cv2
import numpy as np
import torch
from tqdm import tqdm

from sam2_lora_ext.data.source import from_run
from sam2_lora_ext.evaluate.pictures import AFTER, BEFORE, TRUTH, overlay, save_grid
from sam2_lora_ext.inspection.decision_file import write_decision
from sam2_lora_ext.inspection.evaluation import InspectionTally
from sam2_lora_ext.inspection.fitting import fit_decision, look_at
from sam2_lora_ext.inspection.segmenter import Inspection, Segmenter, load_segmenter
from sam2_lora_ext.inspection.strips import TrueStrip, TrueStrips

WIDTH = 800  # pixels of a strip in the picture
KEYS = ("kaggle_dice", "kaggle_dice_empty", "dice_present", "false_alarms", "recall", "ms_per_strip")


def inspect(run: Path, base: Path, picture: Path) -> dict[str, Any]:
    """Fits the decision of a run's class prompts, inspects its test strips, and draws some of them.

    Args:
        run: a run with class prompts, whose split has the parts val and test.
        base: its base.
        picture: the PNG to write.

    Returns:
        The summary of `InspectionTally`.
    """
    segmenter = load_segmenter(None, run, base=base, device="cpu")
    validation = from_run(run, "val")
    names = segmenter.prompts.class_names
    looked = look_at(segmenter, bar(TrueStrips(validation, segmenter.prompts), "fitting to validation strips"))
    fit = fit_decision(looked, names, segmenter.decision.exclusive)
    write_decision(run, fit.decision)
    segmenter.decision = fit.decision
    tally, shown = InspectionTally(names, fit.decision), Chosen(len(names))
    for strip in bar(TrueStrips(replace(validation, split="test"), segmenter.prompts), "inspecting test strips"):
        began = perf_counter()
        found = segmenter(strip.image)
        tally.add(strip.name, found, strip.truth, perf_counter() - began)
        shown.add(strip, found)
    draw(picture, segmenter, shown.kept())
    return tally.summary()


def figures(summary: Mapping[str, Any]) -> dict[str, float | None]:
    """`KEYS` of the result of `inspect`, each a number, or None if its mean would be over nothing."""
    return {key: value["mean"] if isinstance(value := summary[key], Mapping) else value for key in KEYS}


def bar(strips: TrueStrips, words: str) -> Iterable[TrueStrip]:
    """The strips, with a progress bar."""
    return tqdm(strips, desc=words, unit="strip")


class Chosen:
    """Keeps the first two strips of each class and the first two clean ones, however well they were segmented."""

    def __init__(self, classes: int):
        self.strips: list[list[tuple[TrueStrip, Inspection]]] = [[] for _ in range(classes + 1)]

    def add(self, strip: TrueStrip, found: Inspection) -> None:
        """Adds a strip if there are fewer than two of its class."""
        there = strip.truth.flatten(1).any(1).tolist()
        rows = self.strips[there.index(True) if any(there) else -1]
        if len(rows) < 2:
            rows.append((strip, found))

    def kept(self) -> list[tuple[TrueStrip, Inspection]]:
        """The strips by class, the clean ones last."""
        return [pair for rows in self.strips for pair in rows]


def draw(path: Path, segmenter: Segmenter, rows: Sequence[tuple[TrueStrip, Inspection]]) -> None:
    """Draws each strip with its truth and with the predicted masks, classes that are absent in another colour."""
    names, cells, captions = segmenter.prompts.class_names, [], []
    for strip, found in rows:
        there, said = strip.truth.flatten(1).any(1), found.masks.flatten(1).any(1)
        wrong = found.masks[~there].any(0) if bool((~there).any()) else torch.zeros(found.masks.shape[1:], dtype=bool)
        truth = overlay(strip.image, strip.truth.any(0).numpy(), TRUTH, scale=2)
        right = overlay(strip.image, (found.masks.any(0) & ~wrong).numpy(), AFTER, scale=2)
        cells.append([smaller(truth), smaller(overlay(right, wrong.numpy(), BEFORE, scale=2))])
        captions.append([f"{strip.name}: {words(there, names)}", words(said, names)])
    save_grid(path, cells, captions, ["truth", "found without a click (orange: a class that is absent)"])


def words(present: torch.Tensor, names: Sequence[str]) -> str:
    """`defect_1, defect_3`, or clean."""
    return ", ".join(name for name, there in zip(names, present.tolist(), strict=True) if there) or "clean"


def smaller(image: np.ndarray) -> np.ndarray:
    """An image resized to the picture's width."""
    height = round(image.shape[0] * WIDTH / image.shape[1])
    return cv2.resize(image, (WIDTH, height), interpolation=cv2.INTER_AREA)


def table(summary: Mapping[str, Any]) -> str:
    """The result of `inspect` for a terminal."""
    lines = [f"{summary['strips']} test strips without a click, {summary['clean_strips']} of them clean"]
    lines.append("".join(f"{key:>18}" for key in KEYS))
    values = figures(summary).items()
    texts = ["-" if value is None else f"{value:.{1 if key == 'ms_per_strip' else 4}f}" for key, value in values]
    return "\n".join([*lines, "".join(f"{text:>18}" for text in texts)])
