"""Image files of kinds that went wrong: the small cases, and writers of turned, deep and damaged ones."""

import os
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from PIL import Image

ORIENTATION = 274  # the tag


def case(name: str) -> Path:
    """A folder of the small cases; without them: skipped, or a failure in CI."""
    folder = Path(os.environ.get("SAM2_LORA_CASES") or REPOSITORY.parent / "shared" / "cases") / name
    if not folder.is_dir():
        missing = f"no small cases in {folder.parent} (environment variable SAM2_LORA_CASES)"
        if os.environ.get("CI", "").lower() in ("1", "true"):
            pytest.fail(missing, pytrace=False)
        pytest.skip(missing)
    return folder


def save_stored(path: Path, upright: np.ndarray, tag: int, **how) -> None:
    """Writes pixels so that they are upright after the rotation of the orientation tag."""
    back = {
        2: np.fliplr,
        3: lambda pixels: np.rot90(pixels, 2),
        4: np.flipud,
        5: lambda pixels: pixels.swapaxes(0, 1),
        6: np.rot90,
        7: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
        8: lambda pixels: np.rot90(pixels, -1),
    }
    stored = back[tag](upright) if tag in back else upright
    exif = Image.Exif()
    exif[ORIENTATION] = tag
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, **how)


def labelled(folder: Path, image: np.ndarray | None, label: np.ndarray, name: str = "a.png") -> Path:
    """`images/` (without an image where None is given) and `annotations/`, for `LabelPNGReader`."""
    for part in ("images", "annotations"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    if image is not None:
        Image.fromarray(image).save(folder / "images" / name)
    Image.fromarray(label).save(folder / "annotations" / f"{Path(name).stem}.png")
    return folder


def square(height: int = 40, width: int = 60) -> np.ndarray:
    """A label of one object of class 1."""
    label = np.zeros((height, width), np.uint8)
    label[5:20, 10:30] = 1
    return label
