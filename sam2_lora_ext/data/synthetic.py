"""Synthetic steel strips in the Kaggle layout of Severstal, for the demo and the tests: 1600x256, four kinds of defect.

They contain no real data, but have the geometry, file format and typical features of the real set: long thin defects,
clusters annotated as one region, unexposed black ends, clean strips, sometimes two classes on one strip.
Legend: H = 256 and W = 1600 pixels; images are uint8 [H, W]; masks are bool [H, W].
"""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

from sam2_lora_ext.data.rle import encode_mask, format_rle
from sam2_lora_ext.utils.csv_text import csv_text
from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.files import write_atomic

HEIGHT, WIDTH = 256, 1600


def _noise(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Smooth noise [H, W] of deviation about 1 from a coarse random grid."""
    coarse = rng.standard_normal((rows, columns), dtype=np.float32)
    return cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)


def steel(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A clean strip float32 [H, W] and its exposed pixels bool [H, W]: rolling marks, uneven light, grain, black
    ends."""
    image = rng.uniform(75, 150) + 9 * _noise(rng, 3, 14) + 5 * _noise(rng, 64, 5) + 4 * _noise(rng, 40, 250)
    image += rng.normal(0, rng.uniform(2, 5), image.shape).astype(np.float32)
    exposed = np.ones((HEIGHT, WIDTH), bool)
    if rng.random() < 0.25:
        width = int(rng.uniform(80, 600))
        exposed[:, slice(None, width) if rng.random() < 0.5 else slice(WIDTH - width, None)] = False
    return image, exposed


def _blob(rng: np.random.Generator, x: float, y: float, rx: float, ry: float, roughness: float = 0.25) -> np.ndarray:
    angles = np.linspace(0, 2 * np.pi, 18, endpoint=False)
    radii = 1 + roughness * rng.uniform(-1, 1, len(angles))
    outline = np.stack([x + rx * radii * np.cos(angles), y + ry * radii * np.sin(angles)], 1)
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    cv2.fillPoly(mask, [np.int32(np.round(outline))], 1)
    return cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 3) > 0.5


def pits(rng: np.random.Generator, image: np.ndarray, x: float, y: float) -> np.ndarray:
    """Class 1: many small dark pits, annotated as the region that they occupy."""
    region = _blob(rng, x, y, rng.uniform(25, 70), rng.uniform(18, 55))
    rows, columns = region.nonzero()
    for index in rng.integers(len(rows), size=max(8, int(len(rows) * rng.uniform(0.010, 0.022)))):
        cv2.circle(
            image, (int(columns[index]), int(rows[index])), int(rng.integers(1, 4)), float(rng.uniform(15, 55)), -1
        )
    return region


def notches(rng: np.random.Generator, image: np.ndarray, x: float, y: float) -> np.ndarray:
    """Class 2: a narrow upright slit with a bright rim."""
    half = rng.uniform(25, 75)
    lean = rng.normal(0, 4)
    ends = (int(x - lean), int(y - half)), (int(x + lean), int(y + half))
    width = int(rng.integers(9, 20))
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    cv2.line(mask, *ends, 1, width)
    cv2.line(image, *ends, float(image.mean() + rng.uniform(15, 45)), width)
    cv2.line(image, *ends, float(image.mean() - rng.uniform(20, 60)), max(2, width // 3))
    return mask.astype(bool)


def scratches(rng: np.random.Generator, image: np.ndarray, x: float, y: float) -> np.ndarray:
    """Class 3: a bundle of fine parallel scratches, often as tall as the strip, annotated as one band."""
    half = HEIGHT if rng.random() < 0.4 else rng.uniform(50, 120)
    lean, width = rng.normal(0, 0.12), rng.uniform(12, 40)
    rows = np.arange(max(0, int(y - half)), min(HEIGHT, int(y + half)))
    centre = x + lean * (rows - y) + 4 * np.sin(rows / rng.uniform(20, 60))
    columns = np.arange(WIDTH)
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[rows] = np.abs(columns[None] - centre[:, None]) <= width / 2
    for offset in rng.uniform(-width / 2, width / 2, int(rng.integers(3, 9))):
        points = np.stack([centre + offset, rows], 1)
        shade = float(image.mean() + rng.choice([-1, 1]) * rng.uniform(25, 70))
        cv2.polylines(image, [np.int32(np.round(points))], False, shade, int(rng.integers(1, 3)))
    return mask


def patches(rng: np.random.Generator, image: np.ndarray, x: float, y: float) -> np.ndarray:
    """Class 4: a large rough area, coarse grain lighter and darker than the steel around it."""
    region = _blob(rng, x, y, rng.uniform(45, 120), rng.uniform(35, 95), 0.3)
    grain = cv2.GaussianBlur(rng.standard_normal(image.shape).astype(np.float32), (0, 0), rng.uniform(1.5, 3.0))
    rough = image + rng.uniform(-18, 12) + grain / grain.std() * rng.uniform(22, 40)
    soft = cv2.GaussianBlur(region.astype(np.float32), (0, 0), 2)
    image += soft * (rough - image)
    return region


DEFECTS: dict[int, Callable[[np.random.Generator, np.ndarray, float, float], np.ndarray]] = {
    1: pits,
    2: notches,
    3: scratches,
    4: patches,
}


def strip(rng: np.random.Generator, clean: bool = False) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """One strip.

    Args:
        rng: every draw comes from it.
        clean: no defect.

    Returns:
        The image uint8 [H, W], and for each class on it the mask bool [H, W] of its one to three objects. Classes never
        overlap, and no mask is on unexposed black.
    """
    image, exposed = steel(rng)
    masks: dict[int, np.ndarray] = {}
    taken = ~exposed
    wanted = [] if clean else list(rng.choice([1, 2, 3, 4], size=1 if rng.random() < 0.8 else 2, replace=False))
    for class_id in wanted:
        for _ in range(int(rng.integers(1, 4))):
            canvas = image.copy()
            x, y = rng.uniform(60, WIDTH - 60), rng.uniform(60, HEIGHT - 60)
            mask = DEFECTS[int(class_id)](rng, canvas, x, y)
            near = cv2.dilate(mask.astype(np.uint8), np.ones((9, 9), np.uint8)).astype(bool)
            if (near & taken).any():
                continue  # drawn on a copy, which is discarded
            image = canvas
            taken |= near
            masks[int(class_id)] = masks.get(int(class_id), False) | mask
    image = np.where(exposed, image, rng.uniform(0, 4, image.shape))
    image = cv2.GaussianBlur(image.astype(np.float32), (0, 0), 0.6)
    return np.clip(np.round(image), 0, 255).astype(np.uint8), masks


def write_strips(
    folder: str | Path, count: int, seed: int = 42, clean_share: float = 0.3, progress: bool = True
) -> Path:
    """Writes `count` strips as `train_images/*.jpg` and `train.csv` (new Kaggle format); the seed determines them.

    Args:
        folder: created if missing; must not have a `train.csv` or an image yet.
        count: number of strips.
        seed: strip i depends on (seed, i) only.
        clean_share: every strip is clean with this probability.
        progress: show a bar.

    Returns:
        The path of the csv, which is written last.

    Raises:
        UserError: the folder already contains a set.
    """
    folder = Path(folder)
    table = folder / "train.csv"
    images = folder / "train_images"
    for old in (table, *(images.iterdir() if images.is_dir() else ())):  # an image without a row would be a clean strip
        if old.exists():
            raise UserError(f"{old} exists already: choose an empty folder for the synthetic strips")
    images.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in tqdm(range(count), desc="synthetic strips", unit="strip", disable=not progress):
        rng = np.random.default_rng((seed, index))
        image, masks = strip(rng, clean=rng.random() < clean_share)
        name = f"syn{seed:04d}{index:05d}.jpg"
        Image.fromarray(image).convert("RGB").save(images / name, quality=95)
        rows += [(name, class_id, format_rle(encode_mask(masks[class_id]))) for class_id in sorted(masks)]
    text = csv_text(["ImageId", "ClassId", "EncodedPixels"], rows)
    write_atomic(table, lambda path: path.write_text(text, encoding="utf-8"))
    return table
