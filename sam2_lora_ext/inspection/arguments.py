"""Shared parts of the inspection tools: the model and the annotated strips that their arguments name."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from sam2_lora_ext.adapters.class_prompts import ClassPrompts
from sam2_lora_ext.data.arguments import source_of
from sam2_lora_ext.data.source import from_run
from sam2_lora_ext.evaluate.conditions import images_among
from sam2_lora_ext.evaluate.models import check_device
from sam2_lora_ext.inspection.segmenter import Segmenter, load_segmenter
from sam2_lora_ext.inspection.strips import TrueStrips
from sam2_lora_ext.run.paths import find_run
from sam2_lora_ext.utils.errors import UserError


def segmenter_of(args: argparse.Namespace) -> Segmenter:
    """The model that the arguments name; raises `UserError` if there is none."""
    if not args.checkpoint.exists():
        raise UserError(f"there is no {args.checkpoint}: give merged weights, an adapter folder or a run")
    if args.device:
        check_device(args.device)
    return load_segmenter(
        args.config,
        args.checkpoint,
        base=args.base,
        device=args.device,
        overlap=args.overlap,
        batch_size=args.batch_size,
        half=args.half,
    )


def seen_in_fitting(args: argparse.Namespace, strips: TrueStrips) -> str | None:
    """A note if strips belong to the run's validation data, to which its thresholds were fitted; else None."""
    run = args.run or find_run(args.checkpoint)
    if run is None:
        return None
    shared = images_among({str(Path(path).resolve()) for path in strips.paths()}, from_run(run, "val").image_paths())
    if not shared:
        return None
    return (
        f"{len(shared)} of these {len(strips)} strips are validation strips of the run, on which the best weights were "
        "chosen and thresholds may be fitted, so the results are too optimistic: name test strips"
    )


def strips_of(args: argparse.Namespace, prompts: ClassPrompts) -> tuple[TrueStrips, dict[str, Any]]:
    """The strips that the arguments name, by default the validation strips of the model's run, and facts about them.

    Raises:
        UserError: no data is named and there is no run, the data has other classes, or the model was trained on some
            of the strips without `--split train` being given.
    """
    run = args.run or find_run(args.checkpoint)
    like = None if run is None else from_run(run)
    train = args.split == "train" and args.split_file is None
    source = source_of(args, "train" if train else "val", like)
    if source is None and run is None:
        raise UserError("no strips are named and the model is not in a run: give --data PATH, -c CONFIG or --run RUN")
    if source is None:
        source = from_run(run, "train" if train else "val", **({"exif": False} if args.as_stored else {}))
    if args.bits is not None:
        source = replace(source, bits=args.bits)
    if args.split_file is not None:
        source = replace(source, split_file=args.split_file, split=args.split)
    elif args.split is not None and (source.phase is None or args.split not in ("train", "val")):
        source = replace(source, split=args.split)
    strips = TrueStrips(source, prompts)
    if run is not None and args.split != "train":
        own = from_run(run, "train")
        shared = images_among({str(Path(path).resolve()) for path in strips.paths()}, own.image_paths())
        if shared:
            raise UserError(
                f"the model was trained on {len(shared)} of these {len(strips)} strips: name others, or "
                "give --split train to evaluate training strips"
            )
    facts = {
        "origin": source.origin,
        "data": source.data,
        "strips": len(strips),
        "split": source.split,
        "split_file": None if source.split_file is None else str(source.split_file),
    }
    return strips, facts
