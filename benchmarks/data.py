"""The cost of the data: the index of a full-size set, its workers, samples and masks per second.

    python -m benchmarks.data [--parts index workers samples masks]

Needs the real data (`SAM2_LORA_REAL_DATA`, default `../shared/data` of the repository). Prints a Markdown table and
writes `runs/bench/data.json`.
"""

from sam2_lora_ext.utils.command_line import catch_interrupts, run_cli
from sam2_lora_ext.utils.errors import UserError

if __name__ == "__main__":
    catch_interrupts()  # before the slow imports

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import torch

from benchmarks.data_index import IMAGES, full_set, index_figures
from benchmarks.data_masks import mask_figures
from benchmarks.data_samples import sample_figures
from benchmarks.data_workers import worker_figures
from benchmarks.output import add_out, check_out, write_result
from sam2_lora_ext.settings.arguments import COUNT, number

REPOSITORY = Path(__file__).resolve().parent.parent


class Line(NamedTuple):
    """A line of the table: title, figures of a part, and goal."""

    what: str
    value: Callable[[dict[str, Any]], str]
    goal: str = ""
    holds: Callable[[dict[str, Any]], bool] = lambda found: True


LINES = {
    "index": (
        Line(
            "index of {images:,} images and {masks:,} masks, built",
            lambda f: f"{f['build_s']:.1f} s; CPU {f['build_cpu_s']:.1f} s",
            "5 s",
            lambda f: f["build_s"] < 5,
        ),
        Line(
            "the same from its cache",
            lambda f: f"{f['cached_s']:.2f} s; CPU {f['cached_cpu_s']:.2f} s",
            "1 s",
            lambda f: f["cached_s"] < 1,
        ),
        Line(
            "in memory: masks; masks and {objects:,} objects",
            lambda f: f"{f['index_mb']:.0f}; {f['dataset_mb']:.0f} MB",
            "150 MB",
            lambda f: f["dataset_mb"] < 150,
        ),
        Line(
            "peak of building it, beyond Python and torch",
            lambda f: f"{f['peak_mb']:.0f} MB",
            "150 MB",
            lambda f: f["peak_mb"] < 150,
        ),
        Line("pickled for a worker: size; dump and load", lambda f: f"{f['pickle_mb']:.0f} MB; {f['pickle_s']:.2f} s"),
    ),
    "workers": (
        Line(
            "memory of a spawned worker for the full set, with 1 worker; with 4, each",
            lambda f: f"{f['with_1_mb']:.0f}; {f['with_4_mb']:.0f} MB",
            "no growth",
            lambda f: f["with_4_mb"] < f["with_1_mb"] + 5,
        ),
        Line(
            "the same after {samples} samples",
            lambda f: f"{f['later_1_mb']:.0f}; {f['later_4_mb']:.0f} MB",
            "no growth",
            lambda f: max(f["later_1_mb"] - f["with_1_mb"], f["later_4_mb"] - f["with_4_mb"]) < 10,
        ),
    ),
    "samples": (
        Line("samples a second, one worker, 1600x256 to 1024 px", lambda f: f"{f['rate']:.0f}"),
        Line(
            "the same with SAM 2's `PNGRawDataset` and transforms",
            lambda f: f"{f['stock_rate']:.0f}; {f['ratio']:.1f} times",
            "2 times",
            lambda f: f["ratio"] >= 2,
        ),
        Line(
            "CPU of the worker for a sample, with its transfer; stock",
            lambda f: f"{f['worker_ms']:.1f}; {f['stock_worker_ms']:.1f} ms; {f['worker_ratio']:.1f} times",
        ),
        Line(
            "CPU of data set and collate function alone; stock",
            lambda f: f"{f['cpu_ms']:.1f}; {f['stock_cpu_ms']:.1f} ms; {f['cpu_ratio']:.1f} times",
        ),
        Line(
            "where it goes: JPEG, masks, resizing the image, the masks, normalising, the rest",
            lambda f: f"{f['shares']} %",
        ),
        Line(
            "images differ by at most (a grey level is 0.0175); mask pixels",
            lambda f: f"{f['image_difference']:.4f}; {f['mask_difference']}",
            "0.0175; 0",
            lambda f: f["image_difference"] < 0.0176 and f["mask_difference"] == 0,
        ),
    ),
    "masks": (
        Line("masks of objects a second, of 500 real strips", lambda f: f"{f['rate']:,.0f}"),
        Line(
            "the same by a naive per-run decoder and scipy's labels",
            lambda f: f"{f['naive_rate']:,.0f}; {f['ratio']:.0f} times",
            "10 times",
            lambda f: f["ratio"] >= 10,
        ),
        Line(
            "masks of whole classes, which are not split; naive",
            lambda f: f"{f['class_rate']:,.0f}; {f['naive_class_rate']:,.0f}; {f['class_ratio']:.1f} times",
        ),
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", default=list(LINES), choices=list(LINES), metavar="PART", help="(all)")
    parser.add_argument(
        "--images", type=number(COUNT), default=IMAGES, metavar="N", help="of the full-size set (%(default)s)"
    )
    parser.add_argument(
        "--samples", type=number(COUNT), default=120, metavar="N", help="per loader and run (%(default)s)"
    )
    add_out(parser, REPOSITORY / "runs/bench/data.json")
    args = parser.parse_args(argv)
    check_out(args)
    data = Path(os.environ.get("SAM2_LORA_REAL_DATA", REPOSITORY.parent / "shared/data")) / "severstal"
    if not data.is_dir():
        raise UserError(f"there is no real data in {data}; set SAM2_LORA_REAL_DATA")
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    figures: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        full = Path(name) / "full"
        if {"index", "workers"} & set(args.parts):
            full_set(data, full, args.images)
        measure = {
            "index": lambda: index_figures(full),
            "workers": lambda: worker_figures(full, args.samples),
            "samples": lambda: sample_figures(data, Path(name), args.samples),
            "masks": lambda: mask_figures(data / "annotations_only_500.csv"),
        }
        for part in args.parts:
            print(f"measuring: {part} ...", flush=True)
            figures[part] = measure[part]()
    print(table(figures))
    write_result(args, {"torch": torch.__version__, "load": os.getloadavg()[0]} | figures)
    print(f"wrote {args.out}")


def table(figures: dict[str, dict[str, Any]]) -> str:
    """The figures as Markdown, each with its goal."""
    rows = ["| what | measured | goal |", "|---|---|---|"]
    for part, found in figures.items():
        for line in LINES[part]:
            missed = "" if line.holds(found) else " (missed)"
            rows.append(f"| {line.what.format(**found)} | {line.value(found)} | {line.goal}{missed} |")
    return "\n".join(rows)


if __name__ == "__main__":
    run_cli(main)
