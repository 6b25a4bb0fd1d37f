#!/usr/bin/env python
"""Looks at steel-defect data, splits it, converts it between formats, or makes synthetic strips.

The data is that of a training config (-c CONFIG key=value ...), of a run, or a folder, whose format is told by what is
found: Kaggle's csv (new and old), Supervisely folders, label images, COCO. All of it is read, whatever its split.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
from sam2_lora_ext.utils.errors import UserError, catch_interrupts, run_cli

if __name__ == "__main__":
    catch_interrupts()  # before the imports that take long

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from sam2_lora_ext.data.arguments import add_source, source_of
from sam2_lora_ext.data.duplicates import groups
from sam2_lora_ext.data.folders import write_folder
from sam2_lora_ext.data.index import build_index, remarks
from sam2_lora_ext.data.kaggle import SIZE
from sam2_lora_ext.data.records import settle, shorten
from sam2_lora_ext.data.scan import class_sets, combination, look_at_pixels, scan
from sam2_lora_ext.data.scan_text import render
from sam2_lora_ext.data.source import Source
from sam2_lora_ext.data.splits import fold_shares, given_splits, parse_shares, stratified_split, write_split
from sam2_lora_ext.data.synthetic import write_strips
from sam2_lora_ext.data.writers import FORMATS, convert
from sam2_lora_ext.settings.arguments import COUNT, SEED, number
from sam2_lora_ext.settings.kinds import Number, Whole
from sam2_lora_ext.utils.files import refuse_existing, refuse_input_files, write_atomic, write_json
from sam2_lora_ext.utils.folders import refuse_inputs

EXAMPLES = """\
examples:
  python tools/prepare_data.py scan data/severstal --out runs/scan        # scan.json and scan.html
  python tools/prepare_data.py scan -c severstal_lora dataset.bits=12 --out runs/scan     # what training would read
  python tools/prepare_data.py scan runs/severstal_lora --out runs/scan                   # what that run was trained on
  python tools/prepare_data.py scan data/binary --classes 255=defect --out runs/scan      # label images of 0 and 255
  python tools/prepare_data.py scan data/cvat --colors 1=250/50/83,2=51/221/255 --classes pit,crack --out runs/scan
  python tools/prepare_data.py split data/severstal --out data/severstal/split.csv
  python tools/prepare_data.py split data/severstal --folds 5 --out folds.csv
  python tools/prepare_data.py split splits --as-given --out split.csv    # splits/{train,val,test}_split/{img,ann}
  python tools/prepare_data.py convert data/severstal --to coco --out data/severstal_coco
  python tools/prepare_data.py synth --out data/synthetic --count 200
"""

COMMANDS = {  # the help of each: in one line, in full
    "scan": (
        "what is in a data set, and what is wrong with it",
        "Reads a whole data set and writes scan.json and scan.html: counts by class and combination, object sizes, "
        "clean share, sizes and modes, unexposed share, images that are the same or nearly so, every problem, and a "
        "sheet of overlays. Problems do not stop it.",
    ),
    "split": (
        "train, val and test, or folds, as a csv",
        "Writes a csv with the columns image and split, which training reads as its split_file. Every combination of "
        "classes is spread by the shares, images that are the same or nearly so stay together, and one seed gives one "
        "split on any machine.",
    ),
    "convert": (
        "a data set in another format",
        "Writes a data set in another format, its images copied as they are. Read back, it has the same masks; what "
        "the format cannot hold is refused. Images that lost a mask with --on-invalid skip are left out.",
    ),
    "synth": (
        "synthetic strips",
        "Draws 1600x256 strips with four kinds of defects and writes them in Kaggle's format: train_images, train.csv.",
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one of the commands."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    known: dict[str, argparse.ArgumentParser] = {}

    def command(name: str, out: str, run: Callable[[argparse.Namespace], None], reads: bool = True):
        short, full = COMMANDS[name]
        one = known[name] = commands.add_parser(name, help=short, description=full)
        if reads:
            add_source(one, positional=True)
        one.add_argument("--out", type=Path, required=True, metavar="PATH", help=out)
        one.add_argument("--force", action="store_true", help="replace what is there")
        one.add_argument("--quiet", action="store_true", help="no progress bars")
        one.set_defaults(run=run)
        return one

    command("scan", "the folder for scan.json and scan.html", run_scan)
    split = command("split", "the csv", run_split)
    add_on_invalid(split)
    ways = split.add_mutually_exclusive_group()
    ways.add_argument(
        "--shares", default="train=0.8,val=0.1,test=0.1", metavar="NAME=X,..", help="splits and shares (%(default)s)"
    )
    folds = number(Whole(2, 1000))
    ways.add_argument("--folds", type=folds, metavar="K", help="K equal folds named fold0, fold1, ... instead")
    ways.add_argument("--as-given", action="store_true", help="the split folders of a Supervisely project, as they are")
    seed = number(SEED)
    split.add_argument("--seed", type=seed, default=42, metavar="N", help="another gives another split (%(default)s)")
    split.add_argument(
        "--ignore-duplicates", action="store_true", help="do not look for duplicates: quick, for pixels are not read"
    )
    to = command("convert", "the folder for the new data set", run_convert)
    add_on_invalid(to)
    to.add_argument("--to", choices=FORMATS, required=True, metavar="FORMAT", help=", ".join(FORMATS))
    synth = command("synth", "the folder for the strips", run_synth, reads=False)
    share = number(Number(0, 1))
    synth.add_argument("--count", type=number(COUNT), default=100, metavar="N", help="how many strips (%(default)s)")
    synth.add_argument("--seed", type=seed, default=42, metavar="N", help="strip i depends on it and i (%(default)s)")
    synth.add_argument("--clean-share", type=share, default=0.3, metavar="X", help="without a defect (%(default)s)")

    words = sys.argv[1:] if argv is None else list(argv)
    if words and words[0] in known:  # key=value may stand anywhere among the options
        args = known[words[0]].parse_intermixed_args(words[1:])
    else:
        args = parser.parse_args(words)
    args.run(args)


def add_on_invalid(parser: argparse.ArgumentParser) -> None:
    """What to do about problems."""
    parser.add_argument(
        "--on-invalid",
        choices=("error", "skip"),
        help="list all that cannot be used and stop, or leave just that out (default: the config's, else error)",
    )


def open_source(args: argparse.Namespace) -> Source:
    """The data that the arguments name, all of it; says which."""
    source = source_of(args)
    if source is None:
        raise UserError("say which data: a folder, a csv, a json or a run, or -c CONFIG for that of a training config")
    print(f"reading {source.data} ({source.origin})")
    if source.other_data:
        other = "val" if args.phase == "train" else "train"
        print(f"--phase {other} reads other data: {source.other_data}")
    return source


def run_scan(args: argparse.Namespace) -> None:
    """Writes `scan.json` and `scan.html`."""
    for name in ("scan.json", "scan.html"):
        refuse_existing(args.out / name, args.force)
    source = open_source(args)
    reader = source.make_reader()
    for name in ("scan.json", "scan.html"):
        refuse_input_files(args.out / name, [*reader.inputs(), *reader.files()])
    summary, index = scan(reader, not args.quiet, source.bits)
    # a bad file name is shown, not fatal
    page = render(index, summary, source.bits).encode("utf-8", "backslashreplace")
    write_json(args.out / "scan.json", summary, force=args.force)
    write_atomic(args.out / "scan.html", lambda path: path.write_bytes(page), force=args.force)
    print(
        f"{summary['images']} images, {summary['clean']} clean, {summary['unknown']} unknown, "
        f"{summary['masks']} masks, {summary['objects']} objects ({summary['objects_are']}), "
        f"{len(summary['duplicates']['near'])} groups of duplicates, "
        f"{len(summary['problems'])} problems"
    )
    for cause, count in summary["problems_per_cause"].items():
        print(f"  {count} {cause}")
    for sentence in dict.fromkeys([*remarks(index), *summary["notes"], *summary["units"]]):
        print(f"  {sentence}")
    print(f"written to {args.out / 'scan.json'} and scan.html")


def run_split(args: argparse.Namespace) -> None:
    """Writes the csv that the data set takes as `split_file`."""
    refuse_existing(args.out, args.force)
    shares = fold_shares(args.folds) if args.folds is not None else parse_shares(args.shares)
    source = open_source(args)
    reader = source.make_reader()
    refuse_input_files(args.out, [*reader.inputs(), *reader.files()])
    on_invalid = args.on_invalid or source.on_invalid
    index = build_index(reader, on_invalid, not args.quiet)
    names, classes = index.names(), class_sets(index)
    if args.as_given:
        splits = given_splits(names)
    else:
        pairs = []
        if not args.ignore_duplicates:
            facts = look_at_pixels(index, not args.quiet, source.bits)
            settle(facts.problems, on_invalid, index.image_dir)
            pairs = [facts.equal(), facts.near()]
        splits = stratified_split(names, classes, groups(len(names), *pairs).tolist(), shares, args.seed)
    write_split(args.out, names, splits, args.force)
    counts = Counter(zip(map(combination, classes), splits))
    columns = sorted(set(splits), key=list(shares).index) if not args.as_given else sorted(set(splits))
    print(f"{'classes':12}" + "".join(f"{column:>10}" for column in columns))
    for label in sorted(set(map(combination, classes))):
        print(f"{label:12}" + "".join(f"{counts[label, column]:>10}" for column in columns))
    print(f"{'all':12}" + "".join(f"{splits.count(column):>10}" for column in columns))
    if index.unknown:
        print(f"{len(index.unknown)} images are unknown and in no split: {shorten(index.unknown)}")


def run_convert(args: argparse.Namespace) -> None:
    """Writes the data set in another format."""
    source = open_source(args)
    reader = source.make_reader()
    refuse_inputs(args.out, reader.inputs())
    index = build_index(reader, args.on_invalid or source.on_invalid, not args.quiet)
    left_out = convert(index, args.to, args.out, args.force, progress=not args.quiet, inputs=reader.inputs())
    print(
        f"{len(index) - left_out} images written to {args.out} as {args.to}"
        + (f"; {left_out} left out because a mask of theirs is invalid" if left_out else "")
        + (f"; {len(index.unknown)} left out as unknown" if index.unknown else "")
    )
    if args.to.startswith("kaggle") and (index.sizes != SIZE).any():
        print(f"not all are {SIZE[1]}x{SIZE[0]}: read them with --size any (dataset.readers.kaggle.size=null)")


def run_synth(args: argparse.Namespace) -> None:
    """Writes synthetic strips; with --force in the place of an old set, no image of which stays."""
    empty = args.out.is_dir() and not any(args.out.iterdir())
    write_folder(
        args.out,
        lambda folder: write_strips(folder, args.count, args.seed, args.clean_share, progress=not args.quiet),
        args.force or empty,
    )
    print(f"{args.count} strips written to {args.out}")


if __name__ == "__main__":
    run_cli(main)
