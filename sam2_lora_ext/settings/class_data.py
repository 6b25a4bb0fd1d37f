"""The rows for the data of class prompts: `dataset.class_prompts`, and the classes that read it."""

from collections.abc import Mapping
from typing import Any

from sam2_lora_ext.settings.containers import ListOf, Nullable, Part, Section
from sam2_lora_ext.settings.data import CROP, PIXELS, SHARE
from sam2_lora_ext.settings.data import TARGETS as DATA
from sam2_lora_ext.settings.kinds import Flag, Whole

NAME = "dataset.class_prompts"
MOST = Nullable(Whole(1)).called(f"{NAME}.max_classes")
OVERLAP = Whole(0, PIXELS).called(f"{NAME}.overlap")
TILES = Whole(1, 100_000).called(f"{NAME}.tiles_per_batch")
EXCLUSIVE = Flag().called(f"{NAME}.exclusive")
SHARES = {name: SHARE.called(f"{NAME}.{name}") for name in ("share", "corrections", "around")}


def no_gaps(section: Mapping[str, Any]) -> str | None:
    """Windows at a grid must cover all columns."""
    if section.get("width") is not None and (section.get("grid") or 1) > section["width"]:
        return (
            f"windows of {section['width']} columns at multiples of {section['grid']} would leave columns out; "
            "lower the grid"
        )
    return None


def overlapping(section: Mapping[str, Any]) -> str | None:
    """The overlap of tiles must be smaller than their width."""
    if section["tile_width"] is not None and section["overlap"] >= section["tile_width"]:
        return f"tiles of {section['tile_width']} columns must overlap by less than that, got {section['overlap']}"
    return None


CLASS_PROMPTS = Section(
    {
        **SHARES,
        "max_classes": MOST,
        "overlap": OVERLAP,
        "tiles_per_batch": TILES,
        "exclusive": EXCLUSIVE,
    }
)
HOME = "sam2_lora_ext"
VALIDATION = DATA["training.dataset.sam2_datasets.TorchTrainMixedDataset"]
TARGETS = {
    f"{HOME}.data.class_samples.ClassSteps": Section(
        {
            "width": CROP,
            "transforms": ListOf(Part()),
            **SHARES,
            "max_classes": MOST,
            "grid": Nullable(Whole(1, PIXELS)),
        },
        required=("width", "transforms"),
        rules=(no_gaps,),
    ),
    f"{HOME}.data.class_validation.ClassValidation": Section(
        {
            **VALIDATION.rows,
            "datasets": ListOf(Part(), least=1, most=1),
            "tile_width": CROP,
            "overlap": OVERLAP,
            "tile_transforms": ListOf(Part()),
            "tiles_per_batch": TILES,
        },
        required=(*VALIDATION.required, "tile_width", "overlap", "tile_transforms"),
        rules=(overlapping,),
    ),
    f"{HOME}.class_prompts.meter.ClassPromptMeter": Section({"exclusive": EXCLUSIVE}),
}
