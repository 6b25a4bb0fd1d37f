"""Command-line arguments of the tools that read data: a training config with overrides, a run, or a data folder."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam2_lora_ext.run.paths import find_run
from sam2_lora_ext.settings.arguments import number
from sam2_lora_ext.settings.data import BITS
from sam2_lora_ext.utils.errors import UserError

if TYPE_CHECKING:
    from sam2_lora_ext.data.source import Source

DATA = "the data set's folder, its csv or its json; or a run, whose record names its data"
OVERRIDE = "overrides of -c, as in training"


def add_source(parser: Any, positional: bool) -> None:
    """Adds the arguments that `source_of` reads.

    Args:
        parser: parser or group; with `positional` it must be parsed with `parse_intermixed_args`.
        positional: DATA is the first argument without a name; else it is `--data`.
    """
    add = parser.add_argument
    if positional:
        add("words", nargs="*", metavar="DATA", help=f"{DATA}; with -c: key=value, {OVERRIDE}")
        which = "the data of a config or run: training or validation (default: %(default)s)"
        add("--phase", choices=("train", "val"), default="train", help=which)
    else:
        add("words", nargs="*", metavar="key=value", help=OVERRIDE)
        add("--data", type=Path, metavar="PATH", help=DATA)
    add_config(parser)
    add("--images", type=Path, metavar="DIR", help="the image folder, unless it is in the folder of the annotations")
    names = "class names, numbered from 1, or with numbers: 255=defect,.. (default: the format's, or Severstal's four)"
    add("--classes", type=classes, metavar="A,B,..|N=A,..", help=names)
    add("--colors", type=colors, metavar="N=R/G/B,..", help="class colours of label images: 1=250/50/83,2=51/221/255")
    add("--size", type=size, metavar="WxH|any", help="size of every image of a Kaggle csv (default: 1600x256)")
    add("--split-folder", metavar="NAME", help="one split of a Supervisely project, such as train")
    add_pixels(parser)


def add_config(parser: Any) -> None:
    """Adds the training config, whose overrides are the positional `words`."""
    described = "a training config, whose data is read as in training"
    parser.add_argument("-c", "--training-config", metavar="CONFIG", help=described)


def add_pixels(parser: Any) -> None:
    """Adds the options for decoding images."""
    add = parser.add_argument
    add("--bits", type=number(BITS), metavar="N", help="depth of images of more than 8 bits a channel (default: 16)")
    add("--as-stored", action="store_true", help="do not turn images upright by their EXIF orientation")


def source_of(args: argparse.Namespace, phase: str = "val", like: "Source | None" = None) -> "Source | None":
    """The data that the arguments name; None if they name none.

    Args:
        args: with the arguments of `add_source`.
        phase: the data of a config or run to read: "train" or "val".
        like: see `guessed`.

    Raises:
        UserError: the arguments contradict each other, or the data cannot be determined.
    """
    from sam2_lora_ext.data.guess_format import guessed
    from sam2_lora_ext.data.source import from_config, from_run

    words, data = list(args.words), getattr(args, "data", None)
    if hasattr(args, "phase"):  # DATA is a word
        phase = args.phase
        if not args.training_config and words:
            data = Path(words.pop(0))
    if words and not args.training_config:
        raise UserError(f"{words[0]!r} is one too many: key=value overrides a training config, so add -c CONFIG")
    if wrong := next((word for word in words if "=" not in word and not word.startswith("~")), None):
        raise UserError(f"with -c CONFIG the data is the config's: {wrong!r} is not key=value; leave it out")
    if args.training_config and data is not None:
        raise UserError(f"-c {args.training_config} and {data} both name the data: give one of them")
    turned = {"exif": False} if args.as_stored else {}
    more = {} if args.bits is None else {"bits": args.bits}
    if args.training_config or data is not None and find_run(data) is not None:
        for name in ("classes", "colors", "size", "images", "split_folder"):
            if getattr(args, name) is not None:
                option = name.replace("_", "-")
                raise UserError(f"--{option} is only for a data folder: leave it out, the config or run defines it")
        if args.training_config:
            return replace(from_config(args.training_config, words, phase, **turned), **more)
        return replace(from_run(data, phase, **turned), **more)
    if data is None:
        return None
    given = {"classes": args.classes, "colors": args.colors, **turned}
    if args.size is not None:
        given["size"] = None if args.size == "any" else args.size
    return guessed(data, args.images, args.split_folder, given, like, **more)


def source_of_model(args: argparse.Namespace, weights: Path) -> "Source | None":
    """The training config of weights: from `-c`, from `--run`, or from the run that contains the weights.

    Args:
        args: `words`, `training_config` and `run`.
        weights: a file or folder; the result is None when no run contains it and nothing else is named.

    Raises:
        UserError: the arguments contradict each other, or the run or config cannot be read.
    """
    from sam2_lora_ext.data.source import from_config, from_run

    if args.words and not args.training_config:
        raise UserError(f"{args.words[0]!r} is one too many: key=value overrides a training config, so add -c CONFIG")
    if args.training_config and args.run:
        raise UserError(f"-c {args.training_config} and --run {args.run} exclude each other: give one of them")
    if args.training_config:
        return from_config(args.training_config, args.words)
    run = args.run or find_run(weights)
    return None if run is None else from_run(run)


def classes(text: str) -> list[str] | dict[int, str]:
    """`A,B` as a list, `255=defect,7=scale` as a table."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise argparse.ArgumentTypeError(f"expected names such as A,B, or numbers with names, got {text!r}")
    if not any("=" in part for part in parts):
        return parts
    return _table(text, parts, "255=defect", lambda name: name.strip())


def colors(text: str) -> dict[int, list[int]]:
    """`1=250/50/83,2=51/221/255` as class number -> [r, g, b]."""

    def color(value: str) -> list[int]:
        channels = [int(channel) for channel in value.split("/")]
        if len(channels) != 3 or not all(0 <= channel <= 255 for channel in channels):
            raise ValueError
        return channels

    return _table(text, text.split(","), "1=250/50/83", color)


def size(text: str) -> tuple[int, int] | str:
    """`1600x256` as (H, W); `any` unchanged."""
    if text == "any":
        return text
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT such as 1600x256, or any, got {text!r}")
    return int(height), int(width)


def _table(text: str, parts: list[str], example: str, value: Any) -> dict[int, Any]:
    """The parts `number=value` of a text as a table."""
    table: dict[int, Any] = {}
    for part in parts:
        number, _, rest = part.partition("=")
        try:
            key, read = int(number), value(rest)
        except ValueError:
            key, read = 0, ""
        if key < 1 or not read or key in table:
            raise argparse.ArgumentTypeError(f"expected {example} and so on, each number once, got {text!r}")
        table[key] = read
    return table
