"""Formats an evaluated inspection as text, and draws found and missed defects and false alarms by class."""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

from PIL import Image

from sam2_lora_ext.evaluate.pictures import AFTER, BEFORE, TRUTH, overlay
from sam2_lora_ext.inspection.evaluation import InspectionTally, Value
from sam2_lora_ext.inspection.segmenter import Inspection, Segmenter
from sam2_lora_ext.inspection.strips import TrueStrip
from sam2_lora_ext.utils.files import write_atomic

KINDS = ("found", "missed", "false")
WIDEST = 900  # pixels of a picture
OVERALL = {
    "kaggle_dice": "Kaggle's mean Dice",
    "kaggle_dice_empty": "  of an empty submission",
    "dice_present": "Dice of present classes",
    "macro_dice": "macro Dice of pixels",
    "macro_iou": "mIoU of pixels",
    "recall": "recall of (strip, class)",
    "precision": "precision of (strip, class)",
    "false_alarms": "false alarms, clean strips",
    "false_alarms_at_recall_95": "  at 95 % recall of strips",
    "image_auroc": "AUROC, defect or clean",
    "false_objects_per_clean_strip": "false defects per clean strip",
}
BY_CLASS = {
    "dice_present": "Dice present",
    "dice": "Dice pixels",
    "iou": "IoU pixels",
    "pixel_ap": "pixel AP",
    "image_auroc": "AUROC",
    "recall": "recall",
    "precision": "precision",
}


class Gallery:
    """Keeps the strips with the largest areas, at most `count` of each class and kind.

    Args:
        class_names: in the order of the classes.
        count: maximum number of pictures of each class and kind.
    """

    def __init__(self, class_names: Sequence[str], count: int):
        self.class_names, self.count = class_names, count
        self.kept: dict[tuple[int, str], list[tuple[int, int, TrueStrip, Inspection]]] = {}
        self.seen = 0

    def add(self, strip: TrueStrip, found: Inspection) -> None:
        """Adds a strip."""
        self.seen += 1
        found = replace(found, logits=found.logits[:0])  # pictures do not need them, and they are large
        for place in range(len(self.class_names)):
            there, said = int(strip.truth[place].sum()), int(found.masks[place].sum())
            if self.count and (there or said):
                kind = "found" if there and said else "missed" if there else "false"
                rows = self.kept.setdefault((place, kind), [])
                heapq.heappush(rows, (there or said, -self.seen, strip, found))
                if len(rows) > self.count:
                    heapq.heappop(rows)

    def write(self, folder: Path, force: bool) -> list[dict[str, Any]]:
        """Writes `<class>_<kind>_<n>.jpg`; returns `{class, kind, file, caption}` of each, with `file` relative to the
        folder's parent."""
        written = []
        for place, name in enumerate(self.class_names):
            for kind in KINDS:
                rows = sorted(self.kept.get((place, kind), []), key=lambda row: -row[0])
                for number, (area, _, strip, found) in enumerate(rows):
                    file = f"{place}_{kind}_{number}.jpg"
                    picture = self._draw(place, kind, strip, found)
                    write_atomic(
                        folder / file, lambda path, p=picture: p.save(path, format="JPEG", quality=88), force=force
                    )
                    caption = f"{strip.name}: {name}, {area:,} px, score {float(found.scores[place]):.1f}"
                    written.append({"class": name, "kind": kind, "file": f"{folder.name}/{file}", "caption": caption})
        return written

    def _draw(self, place: int, kind: str, strip: TrueStrip, found: Inspection) -> Image.Image:
        scale = max(1.0, strip.image.shape[1] / WIDEST)
        shown = overlay(strip.image, strip.truth[place].numpy(), TRUTH, scale=scale)
        colour = BEFORE if kind == "false" else AFTER
        picture = Image.fromarray(overlay(shown, found.masks[place].numpy(), colour, scale=scale))
        if picture.width > WIDEST:
            picture = picture.resize((WIDEST, round(picture.height * WIDEST / picture.width)))
        return picture


def evaluate_strips(
    segmenter: Segmenter, strips: Iterable[TrueStrip], gallery: Gallery | None = None
) -> dict[str, Any]:
    """Inspects annotated strips and returns `InspectionTally.summary`."""
    tally = InspectionTally(segmenter.prompts.class_names, segmenter.decision)
    for strip in strips:
        began = perf_counter()
        found = segmenter(strip.image)
        tally.add(strip.name, found, strip.truth, perf_counter() - began)
        if gallery is not None:
            gallery.add(strip, found)
    return tally.summary()


def describe(summary: dict[str, Any]) -> str:
    """Tables for a terminal: overall, by class, objects by size."""
    lines = [f"{summary['strips']} strips, {summary['clean_strips']} of them clean", ""]
    lines += [f"{title:28} {shown(summary[key])}" for key, title in OVERALL.items()]
    lines += [f"{'ms per strip':28} {summary['ms_per_strip']:.1f}", ""]
    lines.append(f"{'class':16}" + "".join(f"{title:>14}" for title in BY_CLASS.values()) + "  found missed  false")
    for name, row in summary["classes"].items():
        cells = "".join(f"{short(row[key]):>14}" for key in BY_CLASS)
        lines.append(f"{name[:16]:16}{cells}{row['found']:7}{row['missed']:7}{row['false']:7}")
    lines += ["", f"{'true defects':16}{'number':>10}{'IoU >= 0.1':>26}{'IoU >= 0.5':>26}"]
    for name, row in summary["objects"].items():
        cells = "".join(f"{shown(row[f'recall_iou_{bound}']):>26}" for bound in (10, 50))
        lines.append(f"{name:16}{row['objects']:10}{cells}")
    return "\n".join(lines)


def shown(value: Value | float | None) -> str:
    """`0.512 [0.490, 0.530]`, or a dash."""
    if isinstance(value, dict):
        return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
    return "-" if value is None else f"{value:.3f}"


def short(value: Value | float | None) -> str:
    """The mean without its interval, or a dash."""
    return "-" if value is None else f"{value['mean'] if isinstance(value, dict) else value:.3f}"
