#!/usr/bin/env python
"""Trains the demo's base, `assets/sam2_nano.pt`: SAM 2's own classes at 128 px, from scratch, on synthetic shapes.

    python tools/make_demo_base.py --out assets/sam2_nano.pt

Takes about 75 minutes on one core. Deterministic for a seed and a number of threads. It can be stopped at any time:
the same command continues from the last checkpoint in --work. Legend: T frames, B images, O objects.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from sam2_lora_ext.utils.errors import UserError, catch_interrupts, run_cli

if __name__ == "__main__":
    catch_interrupts()  # before the slow imports

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from fvcore.common.param_scheduler import CompositeParamScheduler, CosineParamScheduler, LinearParamScheduler
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tqdm import tqdm
from training.loss_fns import MultiStepMultiMasksAndIous
from training.utils.data_utils import BatchedVideoDatapoint, BatchedVideoMetaData

from sam2_lora_ext.data import shapes
from sam2_lora_ext.data.ids import CLEAN, object_id
from sam2_lora_ext.settings.arguments import COUNT, SEED, THREADS, number
from sam2_lora_ext.settings.kinds import Number, Whole
from sam2_lora_ext.utils.files import refuse_existing, refuse_input_files, write_atomic

ROOT = Path(__file__).resolve().parent.parent
SIZE = 128
MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
Scene = tuple[np.ndarray, np.ndarray]  # images uint8 [T, H, W, 3], masks bool [T, O, H, W]


def make_pool(count: int, frames: int, seed: int, clean_share: float) -> list[Scene]:
    """Draws `count` scenes once; training uses each of them many times, rotated and recoloured."""
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
    """SAM 2's batch from scenes with the same number of frames; without `rng` nothing is random and all objects
    are used."""
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


def corrections(progress: float) -> int:
    """Correction clicks in training: few while the masks are poor, all seven at the end, few after the restart
    (> 1)."""
    return 1 if progress < 0.55 or progress >= 1 else 3 if progress < 0.9 else 7


def learning_rate(lr: float, step: int, steps: int, polish: int) -> float:
    """Warm-up and cosine over `steps`, then a warm restart at half the rate over `polish` (arXiv 1608.03983)."""
    if step >= steps:
        return CosineParamScheduler(lr / 2, lr / 100)((step - steps) / polish)
    first = [LinearParamScheduler(0.0, lr), CosineParamScheduler(lr, lr / 50)]
    return CompositeParamScheduler(first, lengths=[0.04, 0.96], interval_scaling=["rescaled", "rescaled"])(step / steps)


@torch.no_grad()
def evaluate(model: torch.nn.Module, scenes: list[Scene]) -> dict[str, float]:
    """Mean IoU over all objects of held-out images at 1 and 8 clicks and with an exact box, and the clean accuracy."""
    model.eval()
    model.num_correction_pt_per_frame = 7
    sums: dict[str, list[float]] = {"iou_1click": [], "iou_8clicks": [], "iou_box": [], "clean_accuracy": []}
    for start in range(0, len(scenes), 32):
        batch = collate(None, scenes[start : start + 32], 0)
        for box in (0.0, 1.0):
            model.prob_to_use_box_input_for_eval = box
            out = model(batch)[0]
            pred, truth = out["multistep_pred_masks_high_res"] > 0, out["gt_masks"]
            iou = (pred & truth).sum((2, 3)) / (pred | truth).sum((2, 3)).clamp(min=1)  # O steps
            defect = out["class_ids"] != CLEAN
            if box:
                sums["iou_box"] += iou[defect, 0].tolist()
            else:
                sums["iou_1click"] += iou[defect, 0].tolist()
                sums["iou_8clicks"] += iou[defect, 7].tolist()
                sums["clean_accuracy"] += (out["multistep_object_score_logits"][0][~defect, 0] < 0).float().tolist()
    model.train()
    return {name: float(np.mean(values)) for name, values in sums.items()}


def build(config: Path, seed: int) -> torch.nn.Module:
    """The small SAM 2 of `config` as a training model with random weights."""
    torch.manual_seed(seed)
    model = OmegaConf.load(config).model
    model._target_ = "sam2_lora_ext.model.LoRASAM2Train"
    model = instantiate(model, prob_to_use_pt_input_for_train=0.7, num_frames_to_correct_for_eval=1)
    # An object score below 0 replaces the mask by -1024, without a gradient: start from "present".
    torch.nn.init.constant_(model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias, 2.0)
    return model


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "assets/sam2_nano.pt", help="half-precision weights to write"
    )
    parser.add_argument("--config", type=Path, default=ROOT / "configs/sam2_nano.yaml")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/demo_base", help="checkpoint, log and curve")
    parser.add_argument("--steps", type=number(COUNT), default=6000)
    parser.add_argument(
        "--polish",
        type=number(Whole(0, 10**9)),
        default=2000,
        help="steps after that, with few clicks, at a restarted rate",
    )
    parser.add_argument("--batch", type=number(Whole(1, 100_000)), default=16, help="images a step")
    parser.add_argument("--objects", type=number(Whole(1, 1000)), default=2, help="largest number of objects per image")
    parser.add_argument(
        "--scenes",
        type=number(Whole(10, 10**7)),
        default=12000,
        help="number of training images; there are a tenth as many clips",
    )
    parser.add_argument("--lr", type=number(Number(0, 100, above=True)), default=8e-4)
    parser.add_argument("--seed", type=number(SEED), default=42)
    parser.add_argument("--threads", type=number(THREADS), default=1)
    parser.add_argument("--force", action="store_true", help="replace --out")
    args = parser.parse_args(argv)
    refuse_existing(args.out, args.force)
    refuse_input_files(args.out, [args.config, args.work])
    torch.set_num_threads(args.threads)

    model = build(args.config, args.seed).train()
    average = {name: value.clone() for name, value in model.state_dict().items()}
    decay = [p for p in model.parameters() if p.dim() > 1]
    no_decay = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": no_decay, "weight_decay": 0.0}], lr=args.lr
    )
    # Focal loss from scratch collapses to empty masks (measured), so plain cross-entropy: gamma 0, no alpha.
    loss_of = MultiStepMultiMasksAndIous(
        {"loss_mask": 10, "loss_dice": 1, "loss_iou": 1, "loss_class": 1},
        focal_alpha=-1,
        focal_gamma=0,
        pred_obj_scores=True,
        iou_use_l1_loss=True,
        supervise_all_iou=True,
    )

    first, total = 0, args.steps + args.polish
    checkpoint = args.work / "checkpoint.pt"
    facts = {name: getattr(args, name) for name in ("steps", "polish", "batch", "objects", "scenes", "lr", "seed")}
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        if saved["facts"] != facts:
            raise UserError(f"{checkpoint} has other settings ({saved['facts']}): use these, or another --work")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        average, first = saved["average"], saved["step"]
        print(f"continuing from step {first} of {checkpoint}")

    stills = make_pool(args.scenes, 1, args.seed, clean_share=0.1)
    clips = make_pool(args.scenes // 10, 3, args.seed, clean_share=0.05)
    held_out = make_pool(300, 1, args.seed + 1, clean_share=0.1)
    began, running = time.time(), 0.0
    bar = tqdm(range(first, total), initial=first, total=total, desc="training", unit="step", mininterval=5)
    for step in bar:
        rng = np.random.default_rng((args.seed, step))
        torch.manual_seed(args.seed * 1_000_003 + step)
        model.rng = np.random.default_rng((args.seed, 7, step))
        progress = step / args.steps
        moving = progress > 0.4 and step % 6 == 0
        pool, batch_size = (clips, args.batch // 2) if moving else (stills, args.batch)
        model.num_correction_pt_per_frame = 1 if moving else corrections(progress)
        model.prob_to_use_box_input_for_train = 0.8 if progress < 0.2 else 0.5
        batch = collate(rng, [pool[i] for i in rng.integers(len(pool), size=batch_size)], args.objects)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args.lr, step, args.steps, args.polish)
        loss = loss_of(model(batch), batch.masks)["core_loss"] / len(batch.masks)
        if not math.isfinite(loss.item()):
            raise UserError(f"the loss is {loss.item()} at step {step}: lower --lr and start with another --work")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            keep = min(0.9985, (1 + step) / (10 + step))
            for name, value in model.state_dict().items():
                average[name].lerp_(value, 1 - keep) if value.is_floating_point() else average[name].copy_(value)
        seen = min(loss.item(), 20.0)  # one object with the score "absent" would dominate the average
        running = seen if step == first else 0.98 * running + 0.02 * seen
        bar.set_postfix(loss=f"{running:.3f}", refresh=False)
        done = step + 1
        if done % 250 == 0 or done == total:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "average": average,
                "step": done,
                "facts": facts,
            }
            write_atomic(checkpoint, lambda path: torch.save(state, path))
        if done % 1000 == 0 or done == total:
            raw = {name: value.clone() for name, value in model.state_dict().items()}
            model.load_state_dict(average)
            row = {
                "step": done,
                "loss": round(running, 4),
                **{k: round(v, 4) for k, v in evaluate(model, held_out).items()},
            }
            model.load_state_dict(raw)
            tqdm.write(json.dumps(row))
            with open(args.work / "log.jsonl", "a") as log:
                log.write(json.dumps(row) + "\n")
    half = {name: value.half() for name, value in average.items()}
    write_atomic(args.out, lambda path: torch.save({"model": half}, path), force=args.force)
    print(f"wrote {args.out} ({args.out.stat().st_size / 1e6:.2f} MB) after {(time.time() - began) / 60:.0f} min")


if __name__ == "__main__":
    run_cli(main)
