#!/usr/bin/env python
"""Trains the demo's base, `assets/sam2_nano.pt`: SAM 2's own classes at 128 px, from scratch, on synthetic shapes.

    python tools/make_demo_base.py --out assets/sam2_nano.pt

Takes about 75 minutes on one core, and is deterministic for a seed and a number of threads. After an interruption the
same command continues from the last checkpoint in --work. Legend: O objects.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from sam2_lora_ext.utils.command_line import catch_interrupts, run_cli
from sam2_lora_ext.utils.errors import UserError

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

from sam2_lora_ext.data.ids import CLEAN
from sam2_lora_ext.data.shape_scenes import Scene, collate, make_pool
from sam2_lora_ext.settings.arguments import COUNT, SEED, THREADS, number
from sam2_lora_ext.settings.kinds import Number, Whole
from sam2_lora_ext.utils.files import refuse_existing, refuse_input_files, write_atomic

ROOT = Path(__file__).resolve().parent.parent


def corrections(progress: float) -> int:
    """The number of correction clicks in training: one while masks are poor, seven at the end, one while polishing
    (progress > 1)."""
    return 1 if progress < 0.55 or progress >= 1 else 3 if progress < 0.9 else 7


def learning_rate(lr: float, step: int, steps: int, polish: int) -> float:
    """Warm-up and cosine over `steps`, then a warm restart at half the rate over `polish` (arXiv 1608.03983)."""
    if step >= steps:
        return CosineParamScheduler(lr / 2, lr / 100)((step - steps) / polish)
    first = [LinearParamScheduler(0.0, lr), CosineParamScheduler(lr, lr / 50)]
    return CompositeParamScheduler(first, lengths=[0.04, 0.96], interval_scaling=["rescaled", "rescaled"])(step / steps)


@torch.no_grad()
def evaluate(model: torch.nn.Module, scenes: list[Scene]) -> dict[str, float]:
    """The mean IoU over objects of held-out images at 1 and 8 clicks and with an exact box, and the clean accuracy."""
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
    # An object score below 0 replaces the mask by -1024, without a gradient, so the score starts above 0.
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
        help="further steps with few clicks and a restarted learning rate",
    )
    parser.add_argument("--batch", type=number(Whole(1, 100_000)), default=16, help="images per step")
    parser.add_argument("--objects", type=number(Whole(1, 1000)), default=2, help="largest number of objects per image")
    parser.add_argument(
        "--scenes",
        type=number(Whole(10, 10**7)),
        default=12000,
        help="number of different training images; a tenth as many clips are added",
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
    # Focal loss from scratch collapses to empty masks (measured), so this is plain cross-entropy: gamma 0, no alpha.
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
            raise UserError(
                f"{checkpoint} was written with other settings ({saved['facts']}): use them, or choose another --work"
            )
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
