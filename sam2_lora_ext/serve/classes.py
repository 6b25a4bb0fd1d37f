"""Inspects whole strips with class prompts for the page, and caches the results.

Legend: C classes, H W pixels of the strip.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from cachetools import LRUCache

from sam2_lora_ext.adapters.class_prompts import load_class_prompts
from sam2_lora_ext.data.rle import encode_mask
from sam2_lora_ext.serve.images import Images
from sam2_lora_ext.utils.errors import UserError

INSPECTED = 64  # cached results


@dataclass(frozen=True)
class Finding:
    """The result of one class: its presence score, and the runs of each 8-connected part of its mask."""

    class_id: int
    score: float
    parts: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Inspector:
    """A segmenter and its classes.

    Args:
        segment: uint8 [H, W, 3] -> an object with `masks` bool [C, H, W] and `scores` float [C].
        class_ids: of the C classes.
    """

    segment: Callable[[np.ndarray], Any]
    class_ids: tuple[int, ...]


class ClassPages:
    """The inspectors of the models with class prompts, each built at its first use.

    Args:
        images: to inspect.
        makers: model's name -> function that builds its inspector.
        lock: held while a model computes.
    """

    def __init__(self, images: Images, makers: Mapping[str, Callable[[], Inspector]], lock: Any = None):
        self.images, self.makers, self.lock = images, dict(makers), lock or threading.RLock()
        self._inspectors: dict[str, Inspector] = {}
        self._found: LRUCache = LRUCache(INSPECTED)

    def inspect(self, image: int, name: str) -> Sequence[Finding]:
        """A model's `Finding` of each class on an image; raises `UserError` if the model has no class prompts."""
        if name not in self.makers:
            raise UserError(f"the model {name[:100]!r} has no class prompts")
        with self.lock:
            if (image, name) not in self._found:
                pixels = self.images.read(image)
                if name not in self._inspectors:
                    self._inspectors[name] = self.makers[name]()
                inspector = self._inspectors[name]
                found = inspector.segment(pixels)
                self._found[image, name] = [
                    Finding(class_id, float(score), tuple(parts_of(np.asarray(mask))))
                    for class_id, score, mask in zip(inspector.class_ids, found.scores, found.masks, strict=True)
                ]
            return self._found[image, name]


def parts_of(mask: np.ndarray) -> list[np.ndarray]:
    """The runs of each 8-connected part of a mask bool [H, W]; an empty list for an empty mask."""
    count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    return [encode_mask(labels == part) for part in range(1, count)]


def maker_of(
    config: str, path: Path, base: Path | None, device: str | None
) -> tuple[Callable[[], Inspector], dict[int, str]] | None:
    """A function that builds the inspector of an adapter or merged weights, and its class table; None without class
    prompts."""
    prompts = load_class_prompts(path)
    if prompts is None:
        return None

    def make() -> Inspector:
        from sam2_lora_ext.inspection.segmenter import load_segmenter

        return Inspector(load_segmenter(config, path, base=base, device=device), prompts.class_ids)

    return make, dict(zip(prompts.class_ids, prompts.class_names, strict=True))
