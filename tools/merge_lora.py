#!/usr/bin/env python
"""Merges a LoRA adapter into SAM 2's weights, so that stock SAM 2 loads the result without this package.

The merge itself needs torch and safetensors only; --verify builds stock SAM 2 and compares masks.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sam2_lora_ext.adapter import Adapter
from sam2_lora_ext.checkpoints import FORMATS
from sam2_lora_ext.errors import UserError, run_cli
from sam2_lora_ext.merge import DTYPES, merge_files

EXAMPLES = """\
examples:
  the best adapter of a run, proven on stock SAM 2:
    python tools/merge_lora.py --base checkpoints/sam2.1_hiera_large.pt --adapter runs/my_run \\
        --out merged.pt --verify configs/sam2.1/sam2.1_hiera_l.yaml --image strip.jpg
  an adapter folder (ours or PEFT's), written in half precision:
    python tools/merge_lora.py --base sam2.1_hiera_tiny.pt --adapter my_adapter --out merged.pt --dtype float16
  a checkpoint of SAM 2's Trainer:
    python tools/merge_lora.py --base sam2.1_hiera_tiny.pt --adapter my_run/checkpoints/checkpoint.pt --out merged.pt

The merged file then works everywhere in place of the base:
    build_sam2("configs/sam2.1/sam2.1_hiera_l.yaml", "merged.pt")
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Merges, verifies on request, and prints a summary."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, metavar="FILE", help="the weights that training began with")
    parser.add_argument("--adapter", type=Path, required=True, metavar="PATH",
                        help="a run folder (its best adapter, else its final), an adapter folder, or a checkpoint.pt")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the merged file to write")
    parser.add_argument("--format", choices=FORMATS, help="default: what the suffix of --out says; build_sam2 loads pt")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: that of the base, or float32 if that is a half")
    parser.add_argument("--alpha", type=float, help="only for a checkpoint.pt whose run has no lora.json")
    parser.add_argument("--verify", metavar="CONFIG",
                        help="build this stock config from the result and compare its masks with the live adapter's")
    parser.add_argument("--image", type=Path, metavar="FILE", help="what --verify segments (default: smooth noise)")
    parser.add_argument("--force", action="store_true", help="replace --out when it exists")
    args = parser.parse_args(argv)
    if args.image and not args.verify:
        raise UserError("--image is what --verify segments: give --verify CONFIG too")

    if args.verify:
        try:
            from sam2_lora_ext.verify import check_inputs
            import hydra, sam2  # noqa: E401, F401
        except ModuleNotFoundError as error:
            raise UserError(f"--verify needs SAM 2 ({error}): pip install -e '.[sam2]', or merge without it") from error
        check_inputs(args.verify, args.image)

    start = time.perf_counter()
    merged = merge_files(args.base, args.adapter, args.out, file_format=args.format, dtype=args.dtype,
                         alpha=args.alpha, force=args.force, progress=True)
    print(f"merged   {args.adapter} into {args.base}: {merged.changed} of {merged.tensors} tensors changed")
    print(f"written  {args.out}: {args.out.stat().st_size / 1e6:,.1f} MB, {' and '.join(merged.dtypes)}, "
          f"in {time.perf_counter() - start:.1f} s")
    if merged.note:
        print(f"note     {merged.note}")
    if args.verify:
        verify(args, merged.adapter)


def verify(args: argparse.Namespace, adapter: Adapter) -> None:
    """Compares the written file with base plus live adapter, and fails past the bound."""
    from sam2_lora_ext.verify import compare_merged

    print(f"verify   stock SAM 2 from {args.out}, and from {args.base} with the live adapter ...", flush=True)
    result = compare_merged(args.out, args.base, adapter, args.verify, args.image)
    print(f"weights  differ by at most {result.max_abs_weight_diff:.3g}")
    print(f"logits   differ by at most {result.max_abs_logit_diff:.3g} (allowed {result.bound:g}; they reach "
          f"{result.max_abs_logit:.3g}); {result.flipped:.4%} of the mask pixels differ")
    if not result.passed:
        raise UserError(f"{args.out} is not the adapter's model: its mask logits differ by "
                        f"{result.max_abs_logit_diff:.3g}, and {result.bound:g} is allowed")
    print("verified")


if __name__ == "__main__":
    run_cli(main)
