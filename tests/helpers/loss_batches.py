"""Outputs and targets for the losses, without a model."""

import torch

WEIGHTS = {"loss_mask": 20, "loss_dice": 1, "loss_iou": 1, "loss_class": 1}


NAMES = ("pred_multimasks_high_res", "pred_ious", "object_score_logits")


def make_batch(frames=1, objects=3, steps=2, channels=3, size=12, seed=0):
    """Random outputs (leaves that need a gradient) and targets; the middle object is absent from every frame."""
    rng = torch.Generator().manual_seed(seed)
    shapes = ((objects, channels, size, size), (objects, channels), (objects, 1))
    outputs = [
        {
            f"multistep_{name}": [torch.randn(shape, generator=rng).requires_grad_() for _ in range(steps)]
            for name, shape in zip(NAMES, shapes, strict=True)
        }
        for _ in range(frames)
    ]
    targets = torch.rand(frames, objects, size, size, generator=rng) > 0.6
    targets[:, objects // 2] = False
    return outputs, targets


def leaves(outputs):
    return [tensor for frame in outputs for name in NAMES for tensor in frame[f"multistep_{name}"]]
