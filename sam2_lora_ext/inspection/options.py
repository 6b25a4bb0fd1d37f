"""The options that the inspection tools share; `arguments` reads them."""

from pathlib import Path
from typing import Any

from sam2_lora_ext.data.arguments import add_source
from sam2_lora_ext.settings.arguments import COUNT, number
from sam2_lora_ext.settings.kinds import Whole


def add_model(parser: Any) -> None:
    """Adds the options that `segmenter_of` reads."""
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="PATH", help="merged weights, an adapter folder or a run")
    add("--base", type=Path, metavar="FILE", help="base of the adapter (default: the file that it was trained on)")
    add("--config", metavar="NAME", help="the stock config (default: identified from the weights)")
    add(
        "--overlap",
        type=number(Whole(0, 10**6)),
        metavar="N",
        help="columns that tiles share (default: a quarter)",
    )
    add("--batch-size", type=number(COUNT), default=8, metavar="N", help="tiles at once (%(default)s)")
    add("--half", action="store_true", help="compute in bfloat16 on a GPU")
    add("--device", metavar="NAME", help="cpu, cuda ... (default: cuda if there is one, else cpu)")


def add_strips(parser: Any) -> None:
    """Adds the options that `strips_of` reads."""
    add_source(parser, positional=False)
    parser.add_argument("--split-file", type=Path, metavar="CSV", help="table with the columns image and split")
    parser.add_argument("--split", metavar="NAME", help="part of the data (default: the run's validation strips)")
    parser.add_argument("--run", type=Path, metavar="RUN", help="run whose data to use (default: that of --checkpoint)")
