"""Synthetic shapes on textured backgrounds: the training data of the demo's small base model.

Legend: H W image side in pixels, O objects. Images are uint8 [H, W, 3]; masks are bool [O, H, W] and never overlap.
"""

import cv2
import numpy as np

MIN_AREA = 60  # visible pixels at 128 px; smaller objects are dropped


def texture(rng: np.random.Generator, size: int, octaves: tuple[int, ...] = (2, 4, 8, 16, 64)) -> np.ndarray:
    """Smooth noise float32 [H, W], mean about 0 and deviation about 1: random grids of several sizes, upsampled and
    summed."""
    total = np.zeros((size, size), np.float32)
    for grid in octaves:
        weight = rng.random() ** 2
        coarse = rng.standard_normal((grid, grid), dtype=np.float32)
        total += weight * cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
    return (total - total.mean()) / (total.std() + 1e-6)


def ground(rng: np.random.Generator, size: int) -> np.ndarray:
    """A textured background without objects, float32 [H, W, 3] in 0..255: noise, sometimes stripes or a gradient."""
    base = rng.uniform(40, 215)
    tint = rng.normal(0, rng.choice([0.0, 12.0, 35.0]), 3)
    field = texture(rng, size) * rng.uniform(2, 16)
    ys, xs = np.mgrid[0:size, 0:size].astype(np.float32) / size
    if rng.random() < 0.4:  # a gradient across the image
        angle = rng.uniform(0, 2 * np.pi)
        field += rng.uniform(10, 50) * (np.cos(angle) * xs + np.sin(angle) * ys - 0.5)
    if rng.random() < 0.3:  # stripes, such as rolling marks
        angle = rng.uniform(0, np.pi)
        field += rng.uniform(3, 14) * np.sin(2 * np.pi * rng.uniform(3, 20) * (np.cos(angle) * xs + np.sin(angle) * ys))
    return base + tint + field[..., None]


def _star(rng: np.random.Generator, centre: np.ndarray, radius: float, corners: int, roughness: float) -> np.ndarray:
    """Vertices [N, 2] (x, y) of a star-convex outline with its own aspect and rotation."""
    angles = np.linspace(0, 2 * np.pi, corners, endpoint=False) + rng.uniform(0, 2 * np.pi)
    radii = radius * (1 + roughness * rng.uniform(-1, 1, corners))
    points = np.stack([np.cos(angles), np.sin(angles)], 1) * radii[:, None]
    points[:, 1] *= rng.uniform(0.3, 1.0)
    turn = rng.uniform(0, np.pi)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return centre + points @ rotation.T


def outline(rng: np.random.Generator, size: int) -> np.ndarray:
    """The mask uint8 [H, W] (0 or 1) of one random shape: ellipse, polygon, blob, band, ring or a union of them."""
    mask = np.zeros((size, size), np.uint8)
    kind = rng.choice(["ellipse", "polygon", "blob", "band", "ring", "union"], p=[0.22, 0.22, 0.24, 0.16, 0.06, 0.10])
    radius = size * np.exp(rng.uniform(np.log(0.06), np.log(0.33)))
    centre = rng.uniform(0.08, 0.92, 2) * size
    if kind == "band":
        points = [centre]
        heading = rng.uniform(0, 2 * np.pi)
        for _ in range(int(rng.integers(2, 7))):
            heading += rng.normal(0, 0.4)
            points.append(points[-1] + np.array([np.cos(heading), np.sin(heading)]) * size * rng.uniform(0.08, 0.25))
        cv2.polylines(mask, [np.int32(points)], False, 1, thickness=int(rng.integers(3, max(4, size // 12))))
        return mask
    pieces = int(rng.integers(2, 5)) if kind == "union" else 1
    for _ in range(pieces):
        corners, roughness = {"ellipse": (40, 0.0), "ring": (40, 0.0), "polygon": (int(rng.integers(3, 9)), 0.35)}.get(
            str(kind), (int(rng.integers(8, 20)), 0.3)
        )
        points = _star(rng, centre + (rng.normal(0, radius * 0.6, 2) if pieces > 1 else 0), radius, corners, roughness)
        cv2.fillPoly(mask, [np.int32(np.round(points))], 1)
    if kind == "blob":
        side = int(radius / 3) * 2 + 1
        mask = (cv2.GaussianBlur(mask * np.float32(1), (side, side), 0) > 0.5).astype(np.uint8)
    if kind == "ring":
        inner = cv2.erode(mask, np.ones((3, 3), np.uint8), iterations=max(2, int(radius * rng.uniform(0.2, 0.5))))
        mask -= inner
    return mask


def paint(rng: np.random.Generator, image: np.ndarray, mask: np.ndarray) -> None:
    """Blends one object into `image` in place, with its own contrast, a texture and a soft edge."""
    size = image.shape[0]
    sign = rng.choice([-1.0, 1.0])
    contrast = sign * rng.uniform(22, 95) + rng.normal(0, rng.choice([0.0, 10.0, 30.0]), 3)
    surface = contrast + (texture(rng, size) * rng.uniform(0, 22))[..., None]
    if rng.random() < 0.5:  # keeps the pattern of the background, as a stain does
        colour = image + surface
    else:
        colour = image[mask > 0].mean(0) + surface if mask.any() else image
    soft = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), rng.uniform(0.4, 1.4))[..., None]
    image += soft * (colour - image)


def finish(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Camera blur, noise and rounding to uint8; half of the images become grey."""
    if rng.random() < 0.3:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 1.0))
    if rng.random() < 0.5:
        image = np.repeat(image.mean(2, keepdims=True), 3, 2)
    image = image + rng.normal(0, rng.uniform(0, 7), image.shape[:2])[..., None]
    return np.clip(np.round(image), 0, 255).astype(np.uint8)


def sample(rng: np.random.Generator, size: int = 128, max_objects: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """One image and the visible part of each of its objects, later ones in front.

    Returns:
        The image uint8 [H, W, 3] and masks bool [O, H, W], O from 1 to `max_objects`, each of at least `MIN_AREA`
        pixels (scaled with the side).
    """
    least = MIN_AREA * (size / 128) ** 2
    while True:
        image = ground(rng, size)
        masks: list[np.ndarray] = []
        for _ in range(int(rng.integers(1, max_objects + 1))):
            mask = outline(rng, size)
            if mask.sum() < least or mask.mean() > 0.5:
                continue
            paint(rng, image, mask)
            masks = [m & ~mask.astype(bool) for m in masks] + [mask.astype(bool)]
        masks = [m for m in masks if m.sum() >= least]
        if masks:
            return finish(rng, image), np.stack(masks)


def clip(rng: np.random.Generator, frames: int, size: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """A short clip: a window that moves over a larger image, as a line-scan camera sees a strip.

    Returns:
        Images uint8 [T, H, W, 3] and masks bool [T, O, H, W]; every object is visible in the first frame.
    """
    large = 2 * size
    while True:
        image, masks = sample(rng, large, max_objects=8)
        step = rng.uniform(-0.16, 0.16, 2) * size
        start = rng.uniform(0, size, 2)
        corners = [np.clip(np.int32(start + t * step), 0, size) for t in range(frames)]
        windows = [(slice(y, y + size), slice(x, x + size)) for x, y in corners]
        seen = [m for m in masks if m[windows[0]].sum() >= MIN_AREA]
        if seen:
            images = np.stack([image[w] for w in windows])
            return images, np.stack([np.stack([m[w] for m in seen]) for w in windows])


def clean(rng: np.random.Generator, size: int = 128) -> np.ndarray:
    """An image without any object, uint8 [H, W, 3]."""
    return finish(rng, ground(rng, size))
