#!/usr/bin/env python
"""Measures models as they will run in production: stock predictors, simulated clicks and boxes, 95 % intervals.

Reports IoU and Dice at 1, 2, 4, 8 clicks, with the exact box and with boxes that are 5, 10, 20 % off, clicks to an IoU
of 0.80 and 0.90, boundary F, all by class and size too; false alarms on clean images; Kaggle's mean Dice and
submission.csv. With several models, the same objects are asked of all and differences are paired.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sam2_lora_ext.errors import UserError, run_cli
from sam2_lora_ext.files import refuse_existing, write_atomic, write_json

CLICKS = (1, 2, 4, 8)
EXAMPLES = """\
examples:
  the base alone, whole strips of the validation split:
    python tools/evaluate.py --checkpoint checkpoints/sam2.1_hiera_large.pt --data data/severstal \\
        --split-file data/severstal/split.csv --split val --out runs/evaluation
  base, two runs and a merged file on the same objects, in tiles:
    python tools/evaluate.py --compare checkpoints/sam2.1_hiera_large.pt runs/r8 decoder=runs/decoder merged.pt \\
        --data data/severstal --tile 512 --overlap 128 --device cuda --out runs/evaluation
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluates and writes evaluation.json, evaluation.md, galleries and submissions."""
    args = parse(argv)
    for name in ("evaluation.json", "evaluation.md"):
        refuse_existing(args.out / name, args.force)
    try:
        from sam2_lora_ext.evaluate.compare import Samples, compare
        from sam2_lora_ext.evaluate.models import candidate, candidates, check_device
        from sam2_lora_ext.evaluate.protocol import Protocol
        from sam2_lora_ext.evaluate.text import describe
    except ModuleNotFoundError as error:
        message = f"the evaluation needs SAM 2 and its training code ({error}): pip install -e '.[sam2]'"
        raise UserError(message) from error
    from sam2_lora_ext.data.dataset import SeverstalRawDataset
    from sam2_lora_ext.data.guess import guess_reader

    check_device(args.device)
    protocol = Protocol(
        clicks=tuple(count for count in CLICKS if count <= args.max_clicks), max_clicks=args.max_clicks,
        clean_clicks=args.clean_clicks, tile=args.tile, overlap=args.overlap, crop=args.crop, automatic=args.automatic,
        thresholds=tuple(args.automatic_thresholds), same_clicks=args.same_clicks, image_size=args.image_size,
        seed=args.seed,
    )  # fmt: skip
    if args.submission_prompt not in protocol.prompts:
        raise UserError(f"--submission-prompt is one of {', '.join(protocol.prompts)}, got {args.submission_prompt!r}")
    if args.compare:
        wanted = candidates(args.compare, args.checkpoint, args.config)
    else:
        wanted = [candidate(str(args.adapter or args.checkpoint), args.checkpoint, args.config)]
    classes = None if args.classes is None else [name.strip() for name in args.classes.split(",")]
    dataset = SeverstalRawDataset(
        guess_reader(args.data, args.images, classes, args.size), training=False, objects=args.objects,
        min_area=args.min_area, split_file=args.split_file, split=args.split, group_width=args.crop,
    )  # fmt: skip
    record = compare(
        wanted, Samples(dataset, args.crop, args.limit), protocol, args.out, device=args.device,
        submitted=args.submission_prompt, pictures=args.pictures, split=(args.split_file, args.split), force=args.force,
    )  # fmt: skip
    record["command"] = ["python", "tools/evaluate.py", *(sys.argv[1:] if argv is None else argv)]
    text = describe(record)
    write_json(args.out / "evaluation.json", record, force=args.force)
    write_atomic(args.out / "evaluation.md", lambda path: path.write_text(text, encoding="utf-8"), force=args.force)
    further = {"galleries": args.pictures, "submission.csv of each model": record["models"][0]["kaggle"]}
    written = ["evaluation.md", *[name for name, there in further.items() if there]]
    print(f"\n{text}\nwritten  {args.out / 'evaluation.json'}, {', '.join(written)}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = parser.add_argument_group("models")
    add = models.add_argument
    add("--checkpoint", type=Path, metavar="FILE", help="weights: the model itself, or the base of adapters")
    add("--adapter", type=Path, metavar="PATH", help="a run folder, an adapter folder or a Trainer's checkpoint.pt")
    add("--compare", nargs="+", metavar="[NAME=]PATH", help="several models; the others are compared with the first")
    add("--config", metavar="NAME", help="the stock config, as build_sam2 takes it (default: told from the weights)")
    add("--image-size", type=_multiple, metavar="PIXELS",
        help="of the model's input, as scratch.resolution was (default: the config's)")
    add("--device", default="cpu", help="cpu, cuda, cuda:1 ... (default: cpu)")
    add = parser.add_argument_group("data").add_argument
    add("--data", type=Path, required=True, metavar="PATH", help="the data set's folder, its csv or its json")
    add("--images", type=Path, metavar="DIR", help="the image folder, where it is not beside the annotations")
    add("--classes", metavar="A,B,..", help="class names in the order of their numbers; Severstal's four by default")
    add("--size", type=_size, default=(256, 1600), metavar="WxH|any",
        help="of images of a Kaggle csv (default: 1600x256)")
    add("--split-file", type=Path, metavar="FILE", help="csv with the columns image and split")
    add("--split", metavar="NAME", help="the part of it to use, such as val")
    add("--objects", choices=("components", "classes", "all"), default="components",
        help="what an object is (default: components)")
    add("--min-area", type=_positive, default=16, metavar="PIXELS", help="smaller specks are no objects (default: 16)")
    add("--limit", type=_positive, metavar="N", help="only N items, spread evenly (then without Kaggle's score)")
    add = parser.add_argument_group("how it is asked").add_argument
    add("--max-clicks", type=_positive, default=8, help="clicks that a user makes at most (default: 8)")
    add("--same-clicks", action="store_true",
        help="all models get the clicks of the first one's errors (default: from the second click on, each its own)")
    add("--clean-clicks", type=_positive, default=4, help="clicks on each clean image (default: 4)")
    add("--tile", type=_positive, metavar="COLUMNS", help="look at the strip in tiles of this width")
    add("--overlap", type=int, default=0, metavar="COLUMNS", help="columns that neighbouring tiles share at least")
    add("--crop", type=_positive, metavar="COLUMNS",
        help="cut so many columns around the objects, as the run's own validation does")
    add("--automatic", type=_positive, metavar="POINTS",
        help="also automatic masks, from POINTS x POINTS clicks (stock: 32)")
    add("--automatic-thresholds", type=float, nargs=2, default=(0.8, 0.95), metavar=("IOU", "STABILITY"),
        help="of automatic masks (default: stock's, 0.8 0.95)")
    add("--submission-prompt", default="1click", metavar="PROMPT",
        help="whose masks go into submission.csv (default: 1click)")
    add("--seed", type=int, default=0, help="of shifted boxes and clicks on clean steel")
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/evaluation"), metavar="DIR", help="default: runs/evaluation")
    add("--pictures", type=_count, default=4, metavar="N",
        help="of each kind in the galleries (default: 4; 0 for none)")
    add("--force", action="store_true", help="replace an earlier evaluation in --out")
    args = parser.parse_args(argv)
    if not (args.checkpoint or args.adapter or args.compare):
        raise UserError("say what to evaluate: --checkpoint FILE, --adapter PATH (with --checkpoint for its base), or "
                        "--compare A B ...")
    if args.compare and args.adapter:
        raise UserError("--adapter is for one model: put it among those of --compare")
    if args.crop and args.tile:
        raise UserError("--crop and --tile are two ways to look at a strip: give one of them")
    if args.tile and not 0 <= args.overlap < args.tile or not args.tile and args.overlap:
        raise UserError(f"--overlap needs --tile and is below it, got {args.overlap} and {args.tile}")
    return args


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def _count(text: str) -> int:
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"expected 0 or more, got {number}")
    return number


def _multiple(text: str) -> int:
    if (number := int(text)) < 64 or number % 32:
        raise argparse.ArgumentTypeError(f"expected a multiple of 32 from 64, got {number}")
    return number


def _size(text: str) -> tuple[int, int] | None:
    if text == "any":
        return None
    width, _, height = text.lower().partition("x")
    if not (width.isdigit() and height.isdigit()):
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT such as 1600x256, or any, got {text}")
    return int(height), int(width)


if __name__ == "__main__":
    run_cli(main)
