"""The command line of tools/evaluate.py."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from sam2_lora_ext.data.arguments import add_source
from sam2_lora_ext.settings.arguments import COUNT, RESOLUTION, SEED, number
from sam2_lora_ext.settings.kinds import Number, Whole
from sam2_lora_ext.utils.errors import UserError

FEW = Whole(1, 1000)  # clicks, or points per side

EXAMPLES = """\
examples:
  a run compared with its base, on the run's own validation data and with its own views:
    python tools/evaluate.py --compare checkpoints/sam2.1_hiera_large.pt runs/r8 --out runs/r8/evaluation
  the run in tiles, as in production; on its training images; on images of another folder:
    python tools/evaluate.py --adapter runs/r8 --tile 512 --overlap 128 --device cuda --out runs/tiles
    python tools/evaluate.py --adapter runs/r8 --split train --out runs/on_training_images
    python tools/evaluate.py --adapter runs/r8 --data data/line_2 --out runs/line_2
  the base alone, on the validation data of a training config, or whole images of a split:
    python tools/evaluate.py --checkpoint checkpoints/sam2.1_hiera_large.pt -c severstal_lora --out runs/base
    python tools/evaluate.py --checkpoint checkpoints/sam2.1_hiera_large.pt --data data/severstal \\
        --split-file data/severstal/split.csv --split val --out runs/whole
"""


def evaluate_parser(description: str) -> argparse.ArgumentParser:
    """The parser of all options, in groups."""
    parser = argparse.ArgumentParser(
        description=description, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = parser.add_argument_group("models")
    add = models.add_argument
    add("--checkpoint", type=Path, metavar="FILE", help="weights: the model itself, or the base of adapters")
    add("--adapter", type=Path, metavar="PATH", help="a run folder, an adapter folder or a Trainer's checkpoint.pt")
    add("--compare", nargs="+", metavar="[NAME=]PATH", help="several models; the others are compared with the first")
    add("--config", metavar="NAME", help="the stock config, as build_sam2 takes it (default: by the weights)")
    add(
        "--image-size",
        type=number(RESOLUTION),
        metavar="PIXELS",
        help="side of the model's input, like scratch.resolution (default: the run's, else the stock config's)",
    )
    add("--device", default="cpu", help="cpu, cuda, cuda:1 ... (default: cpu)")
    data = parser.add_argument_group("data (default: the validation data of the first run among the models)")
    add_source(data, positional=False)
    add = data.add_argument
    add("--split-file", type=Path, metavar="FILE", help="csv with the columns image and split")
    add(
        "--split",
        metavar="NAME[,..]",
        help="split in the split file; without one: val (default) or train, the run's or config's own data",
    )
    add(
        "--objects",
        choices=("instances", "components", "classes", "all"),
        help="definition of an object (default: the run's, else instances if the format has them, else components)",
    )
    add(
        "--min-area",
        type=number(COUNT),
        metavar="PIXELS",
        help="smaller objects are ignored (default: the run's, else 16)",
    )
    add("--limit", type=number(COUNT), metavar="N", help="only N items, evenly spaced; omits Kaggle's score")
    add = parser.add_argument_group("prompts and views").add_argument
    add("--max-clicks", type=number(FEW), default=8, help="largest number of clicks on an object (default: 8)")
    add(
        "--same-clicks",
        action="store_true",
        help="all models get the clicks on the first model's errors (default: each gets clicks on its own errors)",
    )
    add("--clean-clicks", type=number(FEW), default=4, help="clicks on each clean image (default: 4)")
    add("--tile", type=number(COUNT), metavar="COLUMNS", help="segment the strip in tiles of this width")
    add(
        "--overlap",
        type=number(Whole(0, 10**6)),
        default=0,
        metavar="COLUMNS",
        help="minimum overlap of neighbouring tiles in columns",
    )
    add(
        "--crop",
        type=_crop,
        metavar="COLUMNS|none",
        help="columns of the window around the objects; none: whole images (default: the run's validation crop)",
    )
    add(
        "--automatic",
        type=number(FEW),
        metavar="POINTS",
        help="also evaluate automatic masks from POINTS x POINTS clicks (stock: 32)",
    )
    add(
        "--automatic-thresholds",
        type=number(Number(0, 1)),
        nargs=2,
        default=(0.8, 0.95),
        metavar=("IOU", "STABILITY"),
        help="minimum for automatic masks (default: stock's, 0.8 0.95)",
    )
    add(
        "--submission-prompt",
        default="1click",
        metavar="PROMPT",
        help="prompt of the masks in submission.csv (default: 1click)",
    )
    add("--seed", type=number(SEED), default=0, help="seed of shifted boxes and clicks on clean steel")
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/evaluation"), metavar="DIR", help="default: runs/evaluation")
    add(
        "--pictures",
        type=number(Whole(0, 1000)),
        default=4,
        metavar="N",
        help="pictures of each kind in a gallery (default: 4; 0 for none)",
    )
    add("--force", action="store_true", help="replace an earlier evaluation in --out")
    return parser


def parse(description: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line.

    Raises:
        UserError: options contradict each other, or are out of range.
    """
    args = evaluate_parser(description).parse_intermixed_args(argv)
    if not (args.checkpoint or args.adapter or args.compare):
        raise UserError(
            "nothing to evaluate: give --checkpoint FILE, --adapter PATH (with --checkpoint for its base), or "
            "--compare A B ..."
        )
    if args.compare and args.adapter:
        raise UserError("--adapter cannot be combined with --compare: add its path to --compare")
    if args.tile and args.crop not in (None, "none"):
        raise UserError("--crop and --tile exclude each other: give one of them")
    if args.tile and not 0 <= args.overlap < args.tile or not args.tile and args.overlap:
        raise UserError(f"--overlap needs --tile and must be smaller, got {args.overlap} and {args.tile}")
    return args


def _crop(text: str) -> int | str:
    return text if text == "none" else number(COUNT)(text)
