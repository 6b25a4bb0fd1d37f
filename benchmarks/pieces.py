"""The effect of each setting of a preset: a step of the preset, without each setting in turn, and without all.

    python -m benchmarks.pieces [--case tiny:1024] [--batch 8x3] [--type bfloat16] [--preset default]

Counted on fake tensors and modelled as by `benchmarks.train_step`. Prints a table and writes `runs/bench/pieces.json`.
In brackets is the difference of a row from the preset: the saving (or cost) of the setting that it lacks. "none" is
`activations: stock` with the plain layer and the plain loss.
"""

from sam2_lora_ext.utils.command_line import catch_interrupts, run_cli

if __name__ == "__main__":
    catch_interrupts()  # before the slow imports

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from benchmarks.counting import count
from benchmarks.output import add_out, check_out, write_result
from benchmarks.table import COLUMNS, value
from benchmarks.train_step import TYPES, parse_batch, parse_case
from sam2_lora_ext.activations.policy import PRESETS, SWITCHES, ActivationsConfig
from sam2_lora_ext.settings.arguments import COUNT, number

SHOWN = ("kernels", "saved_bytes", "peak_live_bytes", "flops", "moved_bytes", "A10G", "A100")


class Piece(NamedTuple):
    """A setting that is turned off: its name in a config, and the values that turn it off."""

    name: str
    activations: Mapping[str, Any] = {}
    implementations: Mapping[str, str] = {}


PIECES = (
    Piece("activations.encoder", {"encoder": 0.0}),
    Piece("activations.decoder", {"decoder": 0.0}),
    *(Piece(f"activations.{name}", {name: False}) for name in SWITCHES),
    Piece("lora.implementation", {}, {"lora": "plain"}),
    Piece("loss.implementation", {}, {"loss": "plain"}),
)
ALL = Piece("none", dataclasses.asdict(PRESETS["stock"]), {"lora": "plain", "loss": "plain"})


def main(argv: Sequence[str] | None = None) -> None:
    """Counts and prints; see the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pieces", description=__doc__.splitlines()[0])
    parser.add_argument("--case", default="tiny:1024", metavar="MODEL:RESOLUTION")
    parser.add_argument("--batch", default="8x3", metavar="IMAGESxOBJECTS")
    parser.add_argument("--type", default="bfloat16", choices=TYPES)
    parser.add_argument("--preset", default="default", choices=[name for name in PRESETS if name != "stock"])
    parser.add_argument("--jobs", type=number(COUNT), default=2, help="processes that count")
    add_out(parser, Path("runs/bench/pieces.json"))
    args = parser.parse_args(argv)
    check_out(args)
    place = (*parse_case(args.case), *parse_batch(args.batch), args.type == "bfloat16")
    preset = PRESETS[args.preset]
    lacks = [piece for piece in PIECES if piece.implementations or without(preset, piece) != preset]
    rows = [Piece(args.preset), *lacks, ALL]
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(count_without, preset, piece, *place) for piece in rows]
        found = [job.result() for job in tqdm(jobs, desc="pieces", unit="row", leave=False)]
    names = [args.preset, *(f"without {piece.name}" for piece in lacks), "none"]
    print(f"{args.case}, {args.batch}, {args.type}; milliseconds are modelled\n" + table(names, found))
    write_result(args, [{"name": name, **row} for name, row in zip(names, found, strict=True)])
    print(f"written {args.out}")


def without(preset: ActivationsConfig, piece: Piece) -> ActivationsConfig:
    """The preset with a piece turned off."""
    return dataclasses.replace(preset, **piece.activations)


def count_without(
    preset: ActivationsConfig, piece: Piece, size: str, resolution: int, images: int, objects: int, autocast: bool
) -> dict[str, Any]:
    """The row of `benchmarks.counting.count` for a preset without a piece."""
    kinds = {"lora": "lean", "loss": "lean", **piece.implementations}
    return count(
        "lean", size, resolution, images, objects, autocast, activations=without(preset, piece), implementations=kinds
    )


def table(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown; in brackets the difference to the first."""
    lines = ["| step | " + " | ".join(COLUMNS[key][0] for key in SHOWN) + " |", "|---" * (len(SHOWN) + 1) + "|"]
    for name, row in zip(names, rows, strict=True):
        cells = []
        for key in SHOWN:
            _, unit, style = COLUMNS[key]
            number, more = value(row, key) / unit, (value(row, key) - value(rows[0], key)) / unit
            cells.append(f"{number:{style}}" + ("" if row is rows[0] else f" ({more:+{style}})"))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_cli(main)
