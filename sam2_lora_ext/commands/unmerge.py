"""Recovers the adapter from a merged file and its base, by truncated singular value decomposition of the change."""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from sam2_lora_ext.adapters.names import LARGEST_ERROR
from sam2_lora_ext.settings.arguments import RANK, number
from sam2_lora_ext.settings.kinds import Number

EXAMPLES = """\
examples:
  the adapter of a merged file, at its own rank:
    python tools/unmerge_lora.py --base sam2.1_hiera_large.pt --merged merged.pt --out adapter
  norms or a head trained in full in addition to the adapter:
    python tools/unmerge_lora.py --base sam2.1_hiera_tiny.pt --merged merged.pt --out adapter --full
  a smaller adapter than the merged one, with a large allowed error:
    python tools/unmerge_lora.py --base sam2.1_hiera_tiny.pt --merged merged.pt --out adapter --rank 4 --bound 0.9

The folder works with merge_lora.py, further training and PEFT. Its scaling is 1 (alpha equals the rank).
"""


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    options = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--base", type=Path, required=True, metavar="FILE", help="the base of the merge")
    options.add_argument("--merged", type=Path, required=True, metavar="FILE", help="the merged file, in any precision")
    options.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the adapter folder to write")
    options.add_argument(
        "--rank", type=number(RANK), metavar="R", help="rank of every layer (default: the numerical rank)"
    )
    options.add_argument(
        "--bound",
        type=number(Number(0, 1)),
        default=LARGEST_ERROR,
        metavar="SHARE",
        help="largest error of a layer as a share of its change (default: %(default)g)",
    )
    options.add_argument("--full", action="store_true", help="keep other changes as modules trained in full")
    options.add_argument("--force", action="store_true", help="replace an adapter in --out")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Recovers the adapter, writes its folder, and prints a summary."""
    args = parser().parse_args(argv)
    from sam2_lora_ext.adapters.class_prompts import load_class_prompts
    from sam2_lora_ext.adapters.folder import refuse_adapter_folder
    from sam2_lora_ext.adapters.peft import save_adapter
    from sam2_lora_ext.adapters.unmerge import unmerge
    from sam2_lora_ext.adapters.weights import identify, read_weights, weights_id

    refuse_adapter_folder(args.out, [args.base, args.merged], args.force)
    base, merged = read_weights(args.base), read_weights(args.merged)
    found = unmerge(base, merged, args.rank, bound=args.bound, keep_full=args.full, shown=bar)
    adapter = found.adapter
    adapter.class_prompts = load_class_prompts(args.merged)
    adapter.metadata |= {
        "base_id": weights_id(base),
        "base_path": str(args.base),
        "model_config": identify(base),
        "unmerged_from": str(args.merged),
    }
    save_adapter(adapter, args.out, force=args.force)
    ranks = sorted(layer.rank for layer in adapter.layers.values())
    print(
        f"written  {args.out}: {len(ranks)} LoRA layers"
        + (f" of rank {ranks[0]} to {ranks[-1]}" if ranks else "")
        + f", {len(adapter.full_modules)} modules trained in full"
    )
    if found.errors:
        worst = max(found.errors, key=found.errors.__getitem__)
        print(
            f"error    {median(found.errors.values()):.3g} of a layer's change, at most {found.errors[worst]:.3g} in "
            f"{worst} ({args.bound:g} is allowed besides rounding errors)"
        )
        print(f"weights  base and adapter differ from {args.merged} by at most {found.max_abs_weight_diff:.3g}")


def bar(changes: Iterable[Any]) -> Iterable[Any]:
    """The layers with a progress bar, if tqdm is installed and the output is a terminal."""
    try:
        from tqdm import tqdm
    except ImportError:
        return changes
    return tqdm(changes, desc="decomposing", unit="layer", leave=False, disable=None)
