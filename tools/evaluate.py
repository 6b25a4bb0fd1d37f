#!/usr/bin/env python
"""Measures models as they will run in production: stock predictors, simulated clicks and boxes, 95 % intervals.

Reports IoU and Dice at 1, 2, 4, 8 clicks, with the exact box and with boxes that are 5, 10, 20 % off, clicks to an IoU of
0.80 and 0.90, boundary F, all by class and size too; false alarms on clean images; Kaggle's mean Dice and submission.csv.
With several models, the same objects are asked of all and differences are paired.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sam2_lora_ext.errors import UserError, run_cli
from sam2_lora_ext.files import refuse_existing, write_atomic, write_json

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
    refuse_existing(args.out / "evaluation.json", args.force)
    try:
        from sam2_lora_ext.evaluate.compare import Samples, compare, describe
        from sam2_lora_ext.evaluate.models import candidate
        from sam2_lora_ext.evaluate.run import Protocol
    except ModuleNotFoundError as error:
        raise UserError(
            f"the evaluation needs SAM 2 and its training code ({error}): pip install -e '.[sam2]'"
        ) from error
    from sam2_lora_ext.data.dataset import SeverstalRawDataset
    from sam2_lora_ext.data.guess import guess_reader

    protocol = Protocol(
        clicks=tuple(count for count in (1, 2, 4, 8) if count <= args.max_clicks),
        max_clicks=args.max_clicks,
        clean_clicks=args.clean_clicks,
        tile=args.tile,
        overlap=args.overlap,
        crop=args.crop,
        automatic=args.automatic,
        seed=args.seed,
    )
    if args.submission_prompt not in protocol.prompts:
        raise UserError(f"--submission-prompt is one of {', '.join(protocol.prompts)}, got {args.submission_prompt!r}")
    if args.compare:
        wanted = [candidate(text, args.checkpoint, args.config) for text in args.compare]
    else:
        wanted = [candidate(str(args.adapter or args.checkpoint), args.checkpoint, args.config)]
    classes = None if args.classes is None else [name.strip() for name in args.classes.split(",")]
    reader = guess_reader(args.data, args.images, classes, args.size)
    dataset = SeverstalRawDataset(
        reader,
        training=False,
        objects=args.objects,
        min_area=args.min_area,
        split_file=args.split_file,
        split=args.split,
        group_width=args.crop,
    )
    record = compare(
        wanted,
        Samples(dataset, args.crop, args.limit),
        protocol,
        args.out,
        device=args.device,
        submitted=args.submission_prompt,
        pictures=args.pictures,
        split=(args.split_file, args.split),
        force=args.force,
    )
    record["command"] = ["python", "tools/evaluate.py", *(sys.argv[1:] if argv is None else argv)]
    text = describe(record)
    write_json(args.out / "evaluation.json", record, force=args.force)
    write_atomic(args.out / "evaluation.md", lambda path: path.write_text(text, encoding="utf-8"), force=args.force)
    print(
        f"\n{text}\nwritten  {args.out / 'evaluation.json'}, evaluation.md, galleries"
        f"{'' if record['models'][0]['kaggle'] is None else ' and submission.csv'} of each model"
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = parser.add_argument_group("models")
    models.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="weights: the model itself, or the base of adapters"
    )
    models.add_argument(
        "--adapter", type=Path, metavar="PATH", help="a run folder, an adapter folder or a Trainer's checkpoint.pt"
    )
    models.add_argument(
        "--compare",
        nargs="+",
        metavar="[NAME=]PATH",
        help="several models; the first is what the others are compared with",
    )
    models.add_argument(
        "--config", metavar="NAME", help="the stock config, as build_sam2 takes it (default: told from the weights)"
    )
    models.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", type=Path, required=True, metavar="PATH", help="the data set's folder, its csv or its json"
    )
    data.add_argument(
        "--images", type=Path, metavar="DIR", help="the image folder, where it is not beside the annotations"
    )
    data.add_argument(
        "--classes", metavar="A,B,..", help="class names in the order of their numbers; Severstal's four by default"
    )
    data.add_argument(
        "--size",
        type=_size,
        default=(256, 1600),
        metavar="WxH|any",
        help="of images of a Kaggle csv (default: 1600x256)",
    )
    data.add_argument("--split-file", type=Path, metavar="FILE", help="csv with the columns image and split")
    data.add_argument("--split", metavar="NAME", help="the part of it to use, such as val")
    data.add_argument(
        "--objects",
        choices=("components", "classes", "all"),
        default="components",
        help="what an object is (default: components)",
    )
    data.add_argument(
        "--min-area", type=_positive, default=16, metavar="PIXELS", help="smaller specks are no objects (default: 16)"
    )
    data.add_argument(
        "--limit", type=_positive, metavar="N", help="only N items, spread evenly (then without Kaggle's score)"
    )
    how = parser.add_argument_group("how it is asked")
    how.add_argument("--max-clicks", type=_positive, default=8, help="clicks that a user makes at most (default: 8)")
    how.add_argument("--clean-clicks", type=_positive, default=4, help="clicks on each clean image (default: 4)")
    how.add_argument("--tile", type=_positive, metavar="COLUMNS", help="look at the strip in tiles of this width")
    how.add_argument(
        "--overlap", type=int, default=0, metavar="COLUMNS", help="columns that neighbouring tiles share at least"
    )
    how.add_argument(
        "--crop",
        type=_positive,
        metavar="COLUMNS",
        help="cut so many columns around the objects, as the run's own validation does",
    )
    how.add_argument(
        "--automatic",
        type=_positive,
        metavar="POINTS",
        help="also automatic masks, from POINTS x POINTS clicks (stock: 32)",
    )
    how.add_argument(
        "--submission-prompt",
        default="1click",
        metavar="PROMPT",
        help="whose masks go into submission.csv (default: 1click)",
    )
    how.add_argument("--seed", type=int, default=0, help="of shifted boxes and clicks on clean steel")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/evaluation"), metavar="DIR", help="default: runs/evaluation"
    )
    parser.add_argument(
        "--pictures", type=int, default=4, metavar="N", help="of each kind in the galleries (default: 4; 0 for none)"
    )
    parser.add_argument("--force", action="store_true", help="replace an earlier evaluation in --out")
    args = parser.parse_args(argv)
    if bool(args.compare) == bool(args.adapter) and not (args.checkpoint and not args.compare):
        raise UserError(
            "say what to evaluate: --checkpoint FILE, --adapter PATH (with --checkpoint for its base), or --compare A B ..."
        )
    if args.crop and args.tile:
        raise UserError("--crop and --tile are two ways to look at a strip: give one of them")
    if args.tile and not 0 <= args.overlap < args.tile or not args.tile and args.overlap:
        raise UserError(f"--overlap needs --tile and is below it, got {args.overlap} and {args.tile}")
    return args


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def _size(text: str) -> tuple[int, int] | None:
    if text == "any":
        return None
    width, _, height = text.lower().partition("x")
    return int(height), int(width)


if __name__ == "__main__":
    run_cli(main)
