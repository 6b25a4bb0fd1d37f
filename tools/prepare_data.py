#!/usr/bin/env python
"""Looks at steel-defect data, splits it, converts it between formats, or makes synthetic strips.

Formats are told by what is found: Kaggle's csv (new and old), Supervisely folders, label images, COCO.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sam2_lora_ext.data.duplicates import groups
from sam2_lora_ext.data.folders import refuse_inputs, write_folder
from sam2_lora_ext.data.guess import guess_reader
from sam2_lora_ext.data.index import build_index
from sam2_lora_ext.data.records import Reader
from sam2_lora_ext.data.report import render
from sam2_lora_ext.data.scan import class_sets, combination, look_at_pixels, scan
from sam2_lora_ext.data.splits import fold_shares, parse_shares, stratified_split, write_split
from sam2_lora_ext.data.synthetic import write_strips
from sam2_lora_ext.data.writers import FORMATS, convert
from sam2_lora_ext.errors import UserError, run_cli
from sam2_lora_ext.files import refuse_existing, write_atomic, write_json

EXAMPLES = """\
examples:
  python tools/prepare_data.py scan data/severstal --out runs/scan        # scan.json and scan.html
  python tools/prepare_data.py split data/severstal --out data/severstal/split.csv
  python tools/prepare_data.py split data/severstal --folds 5 --out folds.csv
  python tools/prepare_data.py split splits --as-given --out split.csv    # splits/{train,val,test}_split/{img,ann}
  python tools/prepare_data.py convert data/severstal --to coco --out data/severstal_coco
  python tools/prepare_data.py synth --out data/synthetic --count 200
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one of the commands."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    source = argparse.ArgumentParser(add_help=False)
    source.add_argument("data", type=Path, help="the data set's folder, its csv or its json")
    source.add_argument(
        "--images", type=Path, metavar="DIR", help="the image folder, where it is not beside the annotations"
    )
    source.add_argument(
        "--classes", metavar="A,B,..", help="class names in the order of their numbers; Severstal's four by default"
    )
    source.add_argument(
        "--size", default="1600x256", metavar="WxH|any", help="size of the images of a Kaggle csv (%(default)s)"
    )
    source.add_argument("--split-folder", metavar="NAME", help="one split of a Supervisely project, e.g. train")
    invalid = argparse.ArgumentParser(add_help=False)
    invalid.add_argument(
        "--on-invalid",
        choices=("error", "skip"),
        default="error",
        help="what to do with data that cannot be used (%(default)s)",
    )
    output = argparse.ArgumentParser(add_help=False)
    output.add_argument("--out", type=Path, required=True, metavar="PATH")
    output.add_argument("--force", action="store_true", help="replace what is there")
    output.add_argument("--quiet", action="store_true", help="no progress bars")

    commands.add_parser(
        "scan", parents=[source, output], help="counts, problems, duplicates; PATH is a folder"
    ).set_defaults(run=run_scan)
    split = commands.add_parser(
        "split", parents=[source, invalid, output], help="train, val, test or folds; PATH is a csv"
    )
    split.set_defaults(run=run_split)
    ways = split.add_mutually_exclusive_group()
    ways.add_argument("--shares", default="train=0.8,val=0.1,test=0.1", metavar="NAME=X,..", help="(%(default)s)")
    ways.add_argument("--folds", type=int, metavar="K", help="K equal folds named fold0, fold1, ...")
    ways.add_argument(
        "--as-given", action="store_true", help="take the split folders of a Supervisely project as they are"
    )
    split.add_argument("--seed", type=int, default=42)
    split.add_argument(
        "--keep-duplicates-apart", action="store_true", help="do not look for duplicates (pixels are not read then)"
    )
    to = commands.add_parser("convert", parents=[source, invalid, output], help="another format; PATH is a folder")
    to.add_argument("--to", choices=FORMATS, required=True, metavar="FORMAT", help=", ".join(FORMATS))
    to.set_defaults(run=run_convert)
    synth = commands.add_parser("synth", parents=[output], help="synthetic strips in Kaggle's format; PATH is a folder")
    synth.add_argument("--count", type=int, default=100)
    synth.add_argument("--seed", type=int, default=42)
    synth.add_argument("--clean-share", type=float, default=0.3)
    synth.set_defaults(run=run_synth)

    args = parser.parse_args(argv)
    args.run(args)


def open_reader(args: argparse.Namespace) -> Reader:
    """The reader for the arguments."""
    size = None
    if args.size != "any":
        try:
            width, height = map(int, args.size.lower().split("x"))
            size = (height, width)
        except ValueError as error:
            raise UserError(f"--size is like 1600x256, or any, got {args.size!r}") from error
    classes = None if args.classes is None else [name.strip() for name in args.classes.split(",")]
    return guess_reader(args.data, args.images, classes, size, args.split_folder)


def run_scan(args: argparse.Namespace) -> None:
    """Writes `scan.json` and `scan.html`."""
    for name in ("scan.json", "scan.html"):
        refuse_existing(args.out / name, args.force)
    summary, index = scan(open_reader(args), progress=not args.quiet)
    write_json(args.out / "scan.json", summary, force=args.force)
    write_atomic(
        args.out / "scan.html", lambda path: path.write_text(render(index, summary), encoding="utf-8"), force=args.force
    )
    print(
        f"{summary['images']} images, {summary['clean']} clean, {summary['masks']} masks, "
        f"{summary['objects']} objects, "
        f"{len(summary['duplicates']['near'])} groups of duplicates, "
        f"{len(summary['problems'])} problems"
    )
    for cause, count in summary["problems_per_cause"].items():
        print(f"  {count} {cause}")
    print(f"written to {args.out / 'scan.json'} and scan.html")


def run_split(args: argparse.Namespace) -> None:
    """Writes the csv that the data set takes as `split_file`."""
    refuse_existing(args.out, args.force)
    shares = fold_shares(args.folds) if args.folds is not None else parse_shares(args.shares)
    reader = open_reader(args)
    index = build_index(reader, args.on_invalid)
    names, classes = index.names(), class_sets(index)
    if args.as_given:
        if any(len(PurePosixPath(name).parts) < 3 for name in names):
            raise UserError(f"--as-given is for a Supervisely project with several split folders; {args.data} has none")
        splits = [PurePosixPath(name).parts[0].removesuffix("_split").removesuffix("_images") for name in names]
    else:
        pairs = []
        if not args.keep_duplicates_apart:
            facts = look_at_pixels(index, progress=not args.quiet)
            pairs = [facts.equal(), facts.near()]
        splits = stratified_split(names, classes, groups(len(names), *pairs).tolist(), shares, args.seed)
    write_split(args.out, names, splits, args.force)
    counts = Counter(zip(map(combination, classes), splits))
    columns = sorted(set(splits), key=list(shares).index) if not args.as_given else sorted(set(splits))
    print(f"{'classes':12}" + "".join(f"{column:>10}" for column in columns))
    for label in sorted(set(map(combination, classes))):
        print(f"{label:12}" + "".join(f"{counts[label, column]:>10}" for column in columns))
    print(f"{'all':12}" + "".join(f"{splits.count(column):>10}" for column in columns))


def run_convert(args: argparse.Namespace) -> None:
    """Writes the data set in another format."""
    reader = open_reader(args)
    refuse_inputs(args.out, reader.inputs())
    index = build_index(reader, args.on_invalid)
    left_out = convert(index, args.to, args.out, args.force, progress=not args.quiet, inputs=reader.inputs())
    print(
        f"{len(index) - left_out} images written to {args.out} as {args.to}"
        + (f"; {left_out} left out because a mask of theirs is invalid" if left_out else "")
    )


def run_synth(args: argparse.Namespace) -> None:
    """Writes synthetic strips; with --force in the place of an old set, no image of which stays."""
    if args.count < 1 or not 0 <= args.clean_share <= 1:
        raise UserError(f"--count is at least 1 and --clean-share in 0..1, got {args.count} and {args.clean_share}")
    empty = args.out.is_dir() and not any(args.out.iterdir())
    write_folder(
        args.out,
        lambda folder: write_strips(folder, args.count, args.seed, args.clean_share, progress=not args.quiet),
        args.force or empty,
    )
    print(f"{args.count} strips written to {args.out}")


if __name__ == "__main__":
    run_cli(main)
