"""`--out` of the benchmarks: the default may be overwritten, any other file only with --force."""

import argparse
from pathlib import Path
from typing import Any

from sam2_lora_ext.utils.files import refuse_existing, write_json


def add_out(parser: argparse.ArgumentParser, default: Path) -> None:
    """Adds --out and --force."""
    parser.add_argument("--out", type=Path, default=default, metavar="FILE", help="default: %(default)s")
    parser.add_argument("--force", action="store_true", help="replace an existing --out")
    parser.set_defaults(default_out=default)


def check_out(args: argparse.Namespace) -> None:
    """Raises a `UserError` when --out exists and may not be replaced."""
    args.force = args.force or args.out == args.default_out
    refuse_existing(args.out, args.force)


def write_result(args: argparse.Namespace, value: Any) -> None:
    """Writes `value` as JSON to --out; a command may overwrite its own output."""
    write_json(args.out, value, force=args.force)
    args.force = True
