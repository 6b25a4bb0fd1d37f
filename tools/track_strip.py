#!/usr/bin/env python
"""Follows one defect along a strip with SAM 2's own video predictor: a click in one window, its mask in all others.

The strip is cut into overlapping windows that move to both sides of the click, as `configs/severstal_lora_video.yaml`
trains it; what the windows say is stitched back to the strip and drawn into a picture. Windows, bits, orientation and
resolution are those of the run that the weights lie in or that --run names, or of a training config (-c).
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from sam2_lora_ext.utils.errors import UserError, catch_interrupts, run_cli

if __name__ == "__main__":
    catch_interrupts()  # before the imports that take long

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sam2_lora_ext.data.arguments import OVERRIDE, add_config, add_pixels, source_of_model
from sam2_lora_ext.data.images import ImageError, probe, read_rgb
from sam2_lora_ext.data.units import look_at_units
from sam2_lora_ext.data.windows import Windows
from sam2_lora_ext.evaluate.tiles import stitch
from sam2_lora_ext.settings.arguments import COUNT, RESOLUTION, number
from sam2_lora_ext.utils.files import refuse_existing, refuse_input_files, write_atomic

EXAMPLES = """\
examples:
  python tools/track_strip.py --checkpoint runs/video/merged_best.pt --image strip.png --click 640,120 --out tracked.png
  python tools/track_strip.py --checkpoint steel.pt --run runs/video --image strip.png --click 640,120 --out tracked.png
  python tools/track_strip.py --checkpoint steel.pt -c severstal_lora_video dataset.bits=12 --image strip.png \\
      --click 640,120 --out tracked.png
"""
WIDTH = 512  # columns of a window, where nothing says it
TINT = (0, 180, 255)
SURE = 10.0  # logits are cut off here: a window without the object says -1024, which would outvote all others
GAP = 5  # white columns between the windows of the picture


def main(argv: Sequence[str] | None = None) -> None:
    """Tracks, prints what was found, writes the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="key=value", help=OVERRIDE)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="merged (or any SAM 2) weights")
    parser.add_argument("--config", metavar="NAME", help="the stock config (default: told from the weights)")
    parser.add_argument("--image", type=Path, required=True, metavar="FILE", help="the strip")
    parser.add_argument(
        "--click", required=True, metavar="X,Y", help="a pixel of the defect, from the strip's top left"
    )
    parser.add_argument(
        "--run", type=Path, metavar="RUN", help="what the weights are from (default: the run that --checkpoint lies in)"
    )
    add_config(parser)
    add_pixels(parser)
    count, size = number(COUNT), number(RESOLUTION)
    parser.add_argument("--width", type=count, metavar="N", help="columns of a window (default: the run's, else 512)")
    parser.add_argument(
        "--stride", type=count, metavar="N", help="columns between windows (default: the run's, else half the width)"
    )
    parser.add_argument("--image-size", type=size, metavar="PIXELS", help="of the model's input (default: the run's)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, metavar="NAME", help="where to compute (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the picture, a PNG")
    parser.add_argument("--force", action="store_true", help="replace an existing picture")
    args = parser.parse_intermixed_args(argv)
    refuse_existing(args.out, args.force)
    refuse_input_files(args.out, [args.image, args.checkpoint])
    source = source_of_model(args, args.checkpoint)
    bits, exif = (16, True) if source is None else (source.bits, source.exif)
    bits, exif = args.bits or bits, exif and not args.as_stored
    try:
        probe(args.image)
        for sentence in look_at_units([str(args.image)], bits, exif):
            print(f"{args.image}: {sentence}")
        strip = read_rgb(args.image, bits, exif)
    except ImageError as error:
        raise UserError(f"{args.image}: {error}") from error
    try:
        click = tuple(int(value) for value in args.click.split(","))
        if len(click) != 2 or not (0 <= click[0] < strip.shape[1] and 0 <= click[1] < strip.shape[0]):
            raise ValueError
    except ValueError as error:
        raise UserError(f"--click is x,y inside the strip, got {args.click!r}") from error
    if not args.checkpoint.is_file():
        raise UserError(f"there is no file {args.checkpoint}; give merged weights with --checkpoint")
    width = min(args.width or (source and source.crop) or WIDTH, strip.shape[1])
    own = None if source is None or args.width else source.stride
    stride = args.stride or own or max(width // 2, 1)
    windows = Windows(width, stride, 2).fixed(strip.shape[1])
    size = args.image_size or (source and source.resolution)

    from sam2.build_sam import build_sam2_video_predictor

    from sam2_lora_ext.adapters.weights import identify, read_weights
    from sam2_lora_ext.deploy.stock import check_inputs, load_strictly
    from sam2_lora_ext.evaluate.models import check_device

    check_device(args.device)
    config = args.config or identify(read_weights(args.checkpoint))
    if config is None:
        raise UserError(f"{args.checkpoint} looks like no stock SAM 2: name its config with --config")
    check_inputs(config)
    overrides = [f"++model.image_size={size}"] if size else []
    predictor = build_sam2_video_predictor(config, device=args.device, hydra_overrides_extra=overrides)
    load_strictly(predictor, args.checkpoint)
    tiles = track(predictor, strip, windows, click)
    mask = stitch(tiles, [start for start, _ in windows], strip.shape[1]).numpy() > 0
    picture = draw(strip, mask, click, windows, tiles.numpy() > 0)
    write_atomic(args.out, lambda path: picture.save(path, format="PNG"), force=args.force)
    columns = np.flatnonzero(mask.any(axis=0))
    origin = f" (from {source.origin})" if source is not None else ""
    print(f"windows of {width} columns at every {stride}, {bits} bits{origin}")
    print(
        f"{len(windows)} windows, {int(mask.sum())} pixels found"
        + (f" in columns {columns[0]}..{columns[-1]}" if len(columns) else "")
        + f"; picture in {args.out}"
    )


def track(
    predictor: Any, strip: np.ndarray, windows: Sequence[tuple[int, int]], click: tuple[int, int]
) -> torch.Tensor:
    """Logits float32 [N, H, w] of the clicked object in each of N windows, within -`SURE`..`SURE`.

    Args:
        predictor: a `SAM2VideoPredictor`.
        strip: uint8 [H, W, 3].
        windows: [start, stop) columns, from left to right, all of one width.
        click: (x, y) on the strip.
    """
    holding = [place for place, (start, stop) in enumerate(windows) if start <= click[0] < stop]
    first = min(holding, key=lambda place: abs(sum(windows[place]) / 2 - click[0]))
    logits: dict[int, torch.Tensor] = {}
    for path in (range(first, len(windows)), range(first, -1, -1)):  # to the right, then to the left
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            for step, place in enumerate(path):
                start, stop = windows[place]
                Image.fromarray(strip[:, start:stop]).save(f"{folder}/{step:05d}.jpg", quality=100, subsampling=0)
            state = predictor.init_state(folder)
            points = np.array([[click[0] - windows[first][0], click[1]]], dtype=np.float32)
            predictor.add_new_points_or_box(state, frame_idx=0, obj_id=1, points=points, labels=np.array([1]))
            for place, _, found in predictor.propagate_in_video(state):
                logits[path[place]] = found[0, 0].float().cpu().clamp(-SURE, SURE)
    return torch.stack([logits[place] for place in range(len(windows))])


def draw(
    strip: np.ndarray,
    mask: np.ndarray,
    click: tuple[int, int],
    windows: Sequence[tuple[int, int]],
    tiles: np.ndarray,
) -> Image.Image:
    """The strip; below it the strip with the mask tinted and the click as a cross; below that what each window says.

    Args:
        strip: uint8 [H, W, 3].
        mask: bool [H, W].
        click: (x, y).
        windows: [start, stop) columns of N windows of one width w.
        tiles: bool [N, H, w].
    """
    height, width = mask.shape
    shown = tint(strip, mask)
    x, y = click
    shown[y, max(x - 6, 0) : x + 7] = shown[max(y - 6, 0) : y + 7, x] = (255, 40, 40)
    step = width / len(windows)  # columns of the picture for each window, GAP of them white
    small = max(1, round(step) - GAP), max(1, round(height * (step - GAP) / (windows[0][1] - windows[0][0])))
    picture = Image.new("RGB", (width, 2 * height + GAP + small[1]), (255, 255, 255))
    picture.paste(Image.fromarray(np.concatenate([strip, shown])))
    for place, ((start, stop), tile) in enumerate(zip(windows, tiles, strict=True)):
        frame = Image.fromarray(tint(strip[:, start:stop], tile)).resize(small)
        picture.paste(frame, (round(place * step), 2 * height + GAP))
    return picture


def tint(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A copy of uint8 [H, W, 3] with the mask bool [H, W] in colour."""
    shown = pixels.copy()
    shown[mask] = (shown[mask] * 0.5 + np.array(TINT) * 0.5).astype(np.uint8)
    return shown


if __name__ == "__main__":
    run_cli(main)
