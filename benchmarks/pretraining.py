"""Pretrains a CNN of `benchmarks.inspection` on the images on which the demo's small SAM 2 was trained.

The small SAM 2 learned from scenes of synthetic shapes (`tools/make_demo_base.py`) to segment what a click or a box
points at. A network without prompts gets the same scenes, turned and recoloured in the same way, at the same input
size, and segments all shapes at once: binary cross-entropy plus Dice loss over their union.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

from benchmarks.rivals import factor
from sam2_lora_ext.data.shape_scenes import MEAN, STD, make_pool, turn
from sam2_lora_ext.utils.files import write_atomic

SCENES, SEED, CLEAN_SHARE = 12_000, 42, 0.1  # as in make_demo_base.py
BATCH, STEPS, RATE, EVERY = 16, 500, 1e-3, 100


def pretrain(network: nn.Module, file: Path) -> None:
    """Loads the weights in `file` into a network with one output channel, or trains them and writes the file.

    A stopped training resumes from the last multiple of a hundred steps, in `file` with the suffix `.part`.
    """
    if file.exists():
        network.load_state_dict(torch.load(file, weights_only=True))
        return
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.01)
    part, first = file.with_name(file.name + ".part"), 0
    if part.exists():
        saved = torch.load(part, weights_only=True)
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    pool = make_pool(SCENES, 1, SEED, clean_share=CLEAN_SHARE)
    network.train()
    for step in trange(first, STEPS, initial=first, total=STEPS, desc="pretraining", unit="step"):
        for group in optimizer.param_groups:
            group["lr"] = RATE * factor(step / STEPS)
        pixels, target = batch_of(pool, np.random.default_rng((SEED, step)))
        loss = shape_loss(network(pixels), target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % EVERY == 0 or step + 1 == STEPS:
            state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            write_atomic(part, lambda path: torch.save(state, path))
    write_atomic(file, lambda path: torch.save(network.state_dict(), path))
    part.unlink(missing_ok=True)


def copy_body(source: nn.Module, target: nn.Module) -> None:
    """Copies all weights but the last layer, `segmentation_head`, whose outputs differ in number."""
    body = {key: value for key, value in source.state_dict().items() if not key.startswith("segmentation_head")}
    missing, unexpected = target.load_state_dict(body, strict=False)
    assert not unexpected and all(key.startswith("segmentation_head") for key in missing), (missing, unexpected)


def batch_of(pool: list, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Normalised pixels float [B, 3, S, S] and the union of the shapes float [B, 1, S, S]."""
    images, masks = zip(*(turn(rng, pool[i]) for i in rng.integers(len(pool), size=BATCH)), strict=True)
    pixels = np.stack([((image[0] / 255 - MEAN) / STD).transpose(2, 0, 1) for image in images])
    union = np.stack([mask[0].any(0)[None] for mask in masks])
    return torch.from_numpy(pixels).float(), torch.from_numpy(union).float()


def shape_loss(z: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy plus Dice loss over a batch, of logits z [B, 1, S, S]."""
    drawn = z.sigmoid()
    dice = 1 - (2 * (drawn * target).sum() + 1) / ((drawn + target).sum() + 1)
    return F.binary_cross_entropy_with_logits(z, target) + dice
