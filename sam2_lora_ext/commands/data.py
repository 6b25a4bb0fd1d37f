"""Scans steel-defect data, splits it, converts it between formats, or makes synthetic strips.

The data is that of a training config (-c CONFIG key=value ...), of a run, or of a folder, whose format is derived from
its files: Kaggle's csv (new and old), Supervisely folders, label images, COCO. All splits are read.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sam2_lora_ext.data.arguments import add_source
from sam2_lora_ext.data.output_formats import OUTPUT_FORMATS
from sam2_lora_ext.settings.arguments import COUNT, SEED, number
from sam2_lora_ext.settings.kinds import Number, Whole

EXAMPLES = """\
examples:
  python tools/prepare_data.py scan data/severstal --out runs/scan        # scan.json and scan.html
  python tools/prepare_data.py scan -c severstal_lora dataset.bits=12 --out runs/scan     # what training would read
  python tools/prepare_data.py scan runs/severstal_lora --out runs/scan                   # the data of that run
  python tools/prepare_data.py scan data/binary --classes 255=defect --out runs/scan      # label images of 0 and 255
  python tools/prepare_data.py scan data/cvat --colors 1=250/50/83,2=51/221/255 --classes pit,crack --out runs/scan
  python tools/prepare_data.py split data/severstal --out data/severstal/split.csv
  python tools/prepare_data.py split data/severstal --folds 5 --out folds.csv
  python tools/prepare_data.py split splits --as-given --out split.csv    # splits/{train,val,test}_split/{img,ann}
  python tools/prepare_data.py convert data/severstal --to coco --out data/severstal_coco
  python tools/prepare_data.py synth --out data/synthetic --count 200
"""

COMMANDS = {  # help of each command: one line, and in full
    "scan": (
        "statistics and problems of a data set",
        "Reads a whole data set and writes scan.json and scan.html: counts by class and combination, object sizes, "
        "clean share, image sizes and modes, unexposed share, exact and near duplicates, all problems, and a sheet of "
        "overlays. Problems do not stop the scan.",
    ),
    "split": (
        "train, val and test, or folds, as a csv",
        "Writes a csv with the columns image and split, which training reads as its split_file. The split is "
        "stratified by combination of classes, duplicates and near duplicates stay together, and a seed gives the same "
        "split on any machine.",
    ),
    "convert": (
        "a data set in another format",
        "Writes a data set in another format and copies its images unchanged. The masks stay exactly the same; masks "
        "that the format cannot represent are refused. Images that lost a mask by --on-invalid skip are left out.",
    ),
    "synth": (
        "synthetic strips",
        "Draws 1600x256 strips with four kinds of defects and writes them in Kaggle's format: train_images, train.csv.",
    ),
}


def parser() -> argparse.ArgumentParser:
    """The parser of the commands and their options."""
    options = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = options.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")

    def command(name: str, out: str, action: str, reads: bool = True):
        short, full = COMMANDS[name]
        one = commands.add_parser(name, help=short, description=full)
        if reads:
            add_source(one, positional=True)
        one.add_argument("--out", type=Path, required=True, metavar="PATH", help=out)
        one.add_argument("--force", action="store_true", help="replace existing results")
        one.add_argument("--quiet", action="store_true", help="no progress bars")
        one.set_defaults(action=action)
        return one

    command("scan", "the folder for scan.json and scan.html", "scan_data")
    split = command("split", "the csv", "split_data")
    add_on_invalid(split)
    ways = split.add_mutually_exclusive_group()
    ways.add_argument(
        "--shares", default="train=0.8,val=0.1,test=0.1", metavar="NAME=X,..", help="splits and shares (%(default)s)"
    )
    folds = number(Whole(2, 1000))
    ways.add_argument("--folds", type=folds, metavar="K", help="K equal folds named fold0, fold1, ... instead")
    ways.add_argument("--as-given", action="store_true", help="keep the split folders of a Supervisely project")
    seed = number(SEED)
    split.add_argument("--seed", type=seed, default=42, metavar="N", help="seed of the split (%(default)s)")
    split.add_argument(
        "--ignore-duplicates", action="store_true", help="do not search for duplicates; fast, since pixels are not read"
    )
    to = command("convert", "the folder for the new data set", "convert_data")
    add_on_invalid(to)
    to.add_argument("--to", choices=OUTPUT_FORMATS, required=True, metavar="FORMAT", help=", ".join(OUTPUT_FORMATS))
    synth = command("synth", "the folder for the strips", "synthesise", reads=False)
    share = number(Number(0, 1))
    synth.add_argument("--count", type=number(COUNT), default=100, metavar="N", help="number of strips (%(default)s)")
    synth.add_argument("--seed", type=seed, default=42, metavar="N", help="strip i depends on N and i (%(default)s)")
    synth.add_argument(
        "--clean-share", type=share, default=0.3, metavar="X", help="share of clean strips (%(default)s)"
    )
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one of the commands."""
    options = parser()
    words = sys.argv[1:] if argv is None else list(argv)
    commands = next(action for action in options._actions if isinstance(action, argparse._SubParsersAction)).choices
    if words and words[0] in commands:  # key=value is allowed anywhere among the options
        args = commands[words[0]].parse_intermixed_args(words[1:])
    else:
        args = options.parse_args(words)
    from sam2_lora_ext.commands import data_actions

    getattr(data_actions, args.action)(args)


def add_on_invalid(parser: argparse.ArgumentParser) -> None:
    """Adds the option for problems in the data."""
    parser.add_argument(
        "--on-invalid",
        choices=("error", "skip"),
        help="list all invalid entries and stop, or skip them (default: the config's, else error)",
    )
