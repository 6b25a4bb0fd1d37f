"""The protocol of an evaluation (prompts and views), which evaluation.json records."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from sam2_lora_ext.utils.errors import UserError, check_keys


@dataclass(frozen=True)
class Protocol:
    """Prompts and views, the same for every model of a comparison.

    Args:
        clicks: the numbers of clicks that are reported.
        max_clicks: largest number of clicks per object (for clicks to reach an IoU); at least the largest of `clicks`.
        shifts: shares of the box size by which boxes are shifted.
        tolerance: tolerance of the boundary F, in pixels.
        clean_clicks: number of clicks on each clean image.
        tile: width of tiles, None for whole strips.
        overlap: overlap of tiles, in columns.
        crop: columns of the window around the objects, as in the run's own validation; None for whole images.
        automatic: points per side for automatic masks; None omits them.
        thresholds: minimum predicted IoU and minimum stability of an automatic mask.
        same_clicks: later clicks are the same for all models too, and correct the errors of the first model.
        image_size: side of the model's input in pixels; None takes the config's.
        seed: seed of box shifts and clean clicks.
    """

    clicks: tuple[int, ...] = (1, 2, 4, 8)
    max_clicks: int = 8
    shifts: tuple[float, ...] = (0.05, 0.10, 0.20)
    tolerance: int = 2
    clean_clicks: int = 4
    tile: int | None = None
    overlap: int = 0
    crop: int | None = None
    automatic: int | None = None
    thresholds: tuple[float, float] = (0.8, 0.95)  # stock's
    same_clicks: bool = False
    image_size: int | None = None
    seed: int = 0

    @classmethod
    def of(cls, values: Any) -> "Protocol":
        """The protocol in an evaluation.json; raises `UserError` for a protocol that this version does not write."""
        if not isinstance(values, Mapping):
            raise UserError(f"the protocol of an evaluation must be a mapping, got {values!r}")
        check_keys("the protocol of an evaluation", values, [field.name for field in fields(cls)])
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})

    @property
    def prompts(self) -> list[str]:
        """The names of the prompts: 1click, 2clicks, ..., box, box_5, ... ."""
        return [*map(clicks_name, self.clicks), "box", *map(box_name, self.shifts)]

    @property
    def view(self) -> str:
        """The view of a strip in words."""
        if self.tile:
            return f"tiles of {self.tile} columns that overlap by {self.overlap}"
        return f"windows of {self.crop} columns around the objects" if self.crop else "whole strips"


def clicks_name(count: int) -> str:
    """`1click`, `2clicks`, ... ."""
    return f"{count}click{'s' if count > 1 else ''}"


def box_name(share: float) -> str:
    """`box_5` for a box shifted by 0.05 of its size."""
    return f"box_{round(100 * share)}"
