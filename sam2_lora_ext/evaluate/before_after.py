"""Draws one-click masks before and after a training."""

from pathlib import Path

from sam2_lora_ext.data.ids import class_of
from sam2_lora_ext.evaluate.metrics import iou, mask_counts
from sam2_lora_ext.evaluate.pictures import AFTER, BEFORE, TRUTH, overlay, save_grid
from sam2_lora_ext.evaluate.predictor import first_answers


def draw_before_after(path: Path, samples: list, base: object, merged: object) -> None:
    """Draws the first two defects of each class: image, truth, and one-click masks before and after."""
    rows, captions, shown = [], [], dict.fromkeys((1, 2, 3, 4), 0)
    for sample in samples:
        fresh = [o for o in sample.defects if shown[class_of(sample.object_ids[o])] < 2]
        if not fresh:
            continue
        place = sample.defects.index(fresh[0])
        shown[class_of(sample.object_ids[fresh[0]])] += 1
        truth = sample.masks[fresh[0], 0]
        cells, texts = (
            [sample.image, overlay(sample.image, truth.numpy(), TRUTH)],
            [sample.name, f"class {class_of(sample.object_ids[fresh[0]])}"],
        )
        for model, colour in ((base, BEFORE), (merged, AFTER)):
            answers, clicks = first_answers(model, sample)
            cells.append(overlay(sample.image, answers[place].numpy(), colour, tuple(clicks[place].tolist())))
            texts.append(f"IoU {float(iou(mask_counts(answers[place][None], truth[None]))):.2f}")
        rows.append(cells)
        captions.append(texts)
    save_grid(path, rows, captions, ["image", "truth", "before (base, 1 click)", "after (merged, 1 click)"])
