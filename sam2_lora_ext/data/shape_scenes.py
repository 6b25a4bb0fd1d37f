"""Scenes of synthetic shapes as SAM 2 batches, on which `tools/make_demo_base.py` trains the demo's base.

Legend: T frames, B images, O objects, H = W = SIZE pixels.
"""

import numpy as np
import torch
from tqdm import tqdm
from training.utils.data_utils import BatchedVideoDatapoint, BatchedVideoMetaData

from sam2_lora_ext.data import pixels, shapes
from sam2_lora_ext.data.ids import CLEAN, object_id

SIZE = 128
MEAN, STD = np.float32(pixels.MEAN), np.float32(pixels.STD)
Scene = tuple[np.ndarray, np.ndarray]  # images uint8 [T, H, W, 3], masks bool [T, O, H, W]


def make_pool(count: int, frames: int, seed: int, clean_share: float) -> list[Scene]:
    """Draws `count` scenes once; training shows each of them many times, turned and recoloured."""
    scenes: list[Scene] = []
    for index in tqdm(range(count), desc=f"scenes of {frames} frame(s)", unit="scene"):
        rng = np.random.default_rng((seed, frames, index))
        if rng.random() < clean_share:
            image = shapes.clean(rng)
            scenes.append((np.repeat(image[None], frames, 0), np.zeros((frames, 0, SIZE, SIZE), bool)))
        elif frames == 1:
            image, masks = shapes.sample(rng)
            scenes.append((image[None], masks[None]))
        else:
            scenes.append(shapes.clip(rng, frames))
    return scenes


def turn(rng: np.random.Generator, scene: Scene) -> Scene:
    """One of the eight symmetries of the square, channels shuffled, brightness inverted in a quarter of the cases."""
    images, masks = scene
    quarter, mirror = int(rng.integers(4)), rng.random() < 0.5
    images, masks = np.rot90(images, quarter, (1, 2)), np.rot90(masks, quarter, (2, 3))
    if mirror:
        images, masks = images[:, :, ::-1], masks[..., ::-1]
    images = images[..., rng.permutation(3)].astype(np.float32)
    if rng.random() < 0.25:
        images = 255 - images
    return np.clip(images * rng.uniform(0.85, 1.15) + rng.uniform(-15, 15), 0, 255), masks


def collate(rng: np.random.Generator | None, scenes: list[Scene], objects_per_image: int) -> BatchedVideoDatapoint:
    """SAM 2's batch of scenes with the same number of frames; without `rng` nothing is random and all objects are
    taken."""
    images, where, masks, identifiers = [], [], [], []
    for b, scene in enumerate(scenes):
        frames, segments = turn(rng, scene) if rng is not None else (scene[0].astype(np.float32), scene[1])
        images.append(torch.from_numpy(((frames / 255 - MEAN) / STD).transpose(0, 3, 1, 2).copy()))
        count = segments.shape[1]
        chosen = np.arange(count) if rng is None else rng.permutation(count)[:objects_per_image]
        taken = [(object_id(1, int(o)), segments[:, o]) for o in chosen]
        for identifier, segment in taken or [
            (object_id(CLEAN, 0), np.zeros(segments.shape[:1] + segments.shape[2:], bool))
        ]:
            where.append(b)
            masks.append(torch.from_numpy(segment.copy()))
            identifiers.append((b, identifier))
    length, total = len(scenes[0][0]), len(masks)
    time_index = torch.arange(length, dtype=torch.int)[:, None].expand(length, total)
    frame_and_image = torch.stack([time_index, torch.tensor(where, dtype=torch.int).expand(length, total)], -1)
    names = torch.tensor(identifiers)[None].expand(length, total, 2)
    metadata = BatchedVideoMetaData(
        unique_objects_identifier=torch.cat([names, time_index[..., None]], -1).long(),
        frame_orig_size=torch.full((length, total, 2), SIZE),
    )
    return BatchedVideoDatapoint(
        img_batch=torch.stack(images, 1),
        obj_to_frame_idx=frame_and_image,
        masks=torch.stack(masks, 1),
        metadata=metadata,
        dict_key="shapes",
        batch_size=[length],
    )
