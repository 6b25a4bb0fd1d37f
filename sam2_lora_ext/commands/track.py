"""Tracks one defect along a strip with SAM 2's own video predictor, from a click in one window to all other windows.

The strip is cut into overlapping windows, tracked to both sides of the click, as in the training of
`configs/severstal_lora_video.yaml`; their masks are stitched and drawn into a picture. Windows, bits, orientation and
resolution come from the run that contains the weights, from --run, or from a training config (-c).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from sam2_lora_ext.data.arguments import OVERRIDE, add_config, add_pixels, source_of_model
from sam2_lora_ext.settings.arguments import COUNT, RESOLUTION, number
from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.files import refuse_existing, refuse_input_files, write_atomic

EXAMPLES = """\
examples:
  python tools/track_strip.py --checkpoint runs/video/merged_best.pt --image strip.png --click 640,120 --out tracked.png
  python tools/track_strip.py --checkpoint steel.pt --run runs/video --image strip.png --click 640,120 --out tracked.png
  python tools/track_strip.py --checkpoint steel.pt -c severstal_lora_video dataset.bits=12 --image strip.png \\
      --click 640,120 --out tracked.png
"""
WIDTH = 512  # default columns of a window


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    options = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("words", nargs="*", metavar="key=value", help=OVERRIDE)
    options.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="merged (or any SAM 2) weights")
    options.add_argument("--config", metavar="NAME", help="the stock config (default: identified from the weights)")
    options.add_argument("--image", type=Path, required=True, metavar="FILE", help="the strip")
    options.add_argument(
        "--click", required=True, metavar="X,Y", help="a pixel of the defect, counted from the strip's top left"
    )
    options.add_argument(
        "--run", type=Path, metavar="RUN", help="the run of the weights (default: the run that contains --checkpoint)"
    )
    add_config(options)
    add_pixels(options)
    count, size = number(COUNT), number(RESOLUTION)
    options.add_argument("--width", type=count, metavar="N", help="columns of a window (default: the run's, else 512)")
    options.add_argument(
        "--stride", type=count, metavar="N", help="columns between windows (default: the run's, else half the width)"
    )
    options.add_argument(
        "--image-size", type=size, metavar="PIXELS", help="side of the model's input (default: the run's)"
    )
    options.add_argument("--device", metavar="NAME", help="cpu, cuda ... (default: cuda if there is one, else cpu)")
    options.add_argument("--out", type=Path, required=True, metavar="FILE", help="the picture, a PNG")
    options.add_argument("--force", action="store_true", help="replace an existing picture")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Tracks, prints a summary, writes the picture."""
    args = parser().parse_intermixed_args(argv)
    import numpy as np
    import torch

    from sam2_lora_ext.data.images import ImageError, probe, read_rgb
    from sam2_lora_ext.data.tiles import stitch
    from sam2_lora_ext.data.units import look_at_units
    from sam2_lora_ext.data.windows import Windows
    from sam2_lora_ext.deploy.tracking import draw, track

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
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
        raise UserError(f"--click must be x,y inside the strip, got {args.click!r}") from error
    if not args.checkpoint.is_file():
        raise UserError(f"there is no file {args.checkpoint}: give merged weights with --checkpoint")
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
        raise UserError(f"{args.checkpoint} fits no stock SAM 2 config: name its config with --config")
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
    print(f"windows of {width} columns, one every {stride}, {bits} bits{origin}")
    print(
        f"{len(windows)} windows, {int(mask.sum())} pixels found"
        + (f" in columns {columns[0]}..{columns[-1]}" if len(columns) else "")
        + f"; picture in {args.out}"
    )
