"""Merges LoRA adapters into SAM 2's weights, so that stock SAM 2 loads the result without this package.

Merging needs torch and safetensors only; --verify builds stock SAM 2 and compares masks.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam2_lora_ext.adapters.names import DTYPES, WEIGHT_FORMATS
from sam2_lora_ext.settings.arguments import ALPHA, RESOLUTION, number
from sam2_lora_ext.settings.kinds import Number
from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.files import refuse_existing, refuse_input_files, write_json

if TYPE_CHECKING:
    from sam2_lora_ext.adapters.merge import Merged

FOLDER = "transformers"
EXAMPLES = """\
examples:
  the best adapter of a run, verified on stock SAM 2:
    python tools/merge_lora.py --base checkpoints/sam2.1_hiera_large.pt --adapter runs/my_run \\
        --out merged.pt --verify configs/sam2.1/sam2.1_hiera_l.yaml --image strip.jpg
  an adapter folder (ours or PEFT's), merged in half precision; prints the effect on masks:
    python tools/merge_lora.py --base sam2.1_hiera_tiny.pt --adapter my_adapter --out merged.pt --dtype bfloat16 \\
        --verify configs/sam2.1/sam2.1_hiera_t.yaml
  a checkpoint of SAM 2's Trainer:
    python tools/merge_lora.py --base sam2.1_hiera_tiny.pt --adapter my_run/checkpoints/checkpoint.pt --out merged.pt
  two adapters of one base, 0.7 of the first update and 0.3 of the second:
    python tools/merge_lora.py --base sam2.1_hiera_tiny.pt --adapter line_1 line_2 --weights 0.7 0.3 --out merged.pt
  a folder that Hugging Face transformers loads (Sam2Model, Sam2VideoModel, Sam2Processor), with a model card:
    python tools/merge_lora.py --base sam2.1_hiera_tiny.pt --adapter runs/my_run --format transformers --out steel-sam2

The merged file replaces the base everywhere:
    build_sam2("configs/sam2.1/sam2.1_hiera_l.yaml", "merged.pt")
merged.pt.json records the inputs with SHA-256 sums. tools/unmerge_lora.py reverses a merge.
"""


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    options = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument(
        "--base", type=Path, required=True, metavar="FILE", help="the weights that training started from"
    )
    options.add_argument(
        "--adapter",
        type=Path,
        required=True,
        nargs="+",
        metavar="PATH",
        help="a run folder (its best adapter, else its final), an adapter folder, or a checkpoint.pt",
    )
    options.add_argument(
        "--weights",
        type=number(Number(-1e6, 1e6)),
        nargs="+",
        metavar="W",
        help="factor of each adapter's update in the sum (default for a single adapter: 1)",
    )
    options.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="the merged file to write, or with --format transformers a folder",
    )
    options.add_argument(
        "--format", choices=(*WEIGHT_FORMATS, FOLDER), help="default: by the suffix of --out; build_sam2 loads pt"
    )
    options.add_argument(
        "--image-size",
        type=number(RESOLUTION),
        metavar="S",
        help="with --format transformers: side of the model's input in pixels (default: the run's)",
    )
    options.add_argument("--dtype", choices=DTYPES, help="default: the base's, or float32 if that is a half type")
    options.add_argument(
        "--alpha",
        type=number(ALPHA),
        help="only for a checkpoint.pt that does not record alpha and whose run has no lora.json",
    )
    options.add_argument(
        "--verify",
        metavar="CONFIG",
        help="build this stock config from the result and compare its masks with those of the unmerged adapter",
    )
    options.add_argument("--image", type=Path, metavar="FILE", help="image for --verify (default: smooth noise)")
    options.add_argument("--force", action="store_true", help="replace an existing --out and its record")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Merges, verifies on request, and prints a summary."""
    args = parser().parse_args(argv)
    from sam2_lora_ext.adapters.merge import merge_files
    from sam2_lora_ext.adapters.record import describe, record_path
    from sam2_lora_ext.adapters.sources import source_files

    if args.image_size and args.format != FOLDER:
        raise UserError(f"--image-size is only for a folder: give --format {FOLDER} too")
    if args.image and not args.verify:
        raise UserError("--image is only for --verify: give --verify CONFIG too")

    if args.verify:
        try:
            import hydra  # noqa: F401
            import sam2  # noqa: F401
        except ModuleNotFoundError as error:
            raise UserError(f"--verify needs SAM 2 ({error}): pip install -e '.[sam2]', or merge without it") from error
        from sam2_lora_ext.deploy.stock import check_inputs

        check_inputs(args.verify, args.image)

    start, record = time.perf_counter(), record_path(args.out)
    read = [args.base, *(file for path in args.adapter for file in source_files(path))]
    read += [args.image] if args.image else []
    for path in (record,) if args.format == FOLDER else (args.out, record):
        refuse_existing(path, args.force)
        refuse_input_files(path, read)
    options = {"weights": args.weights, "dtype": args.dtype, "alpha": args.alpha, "force": args.force, "progress": True}
    if args.format == FOLDER:
        from sam2_lora_ext.deploy.transformers_folder import WEIGHTS, write_model_folder

        merged = write_model_folder(args.base, args.adapter, args.out, image_size=args.image_size, **options)
        written = args.out / WEIGHTS
    else:
        merged, written = merge_files(args.base, args.adapter, args.out, file_format=args.format, **options), args.out
    facts = describe(merged, args.base, written, [Path(sys.argv[0]).name, *(sys.argv[1:] if argv is None else argv)])
    write_json(record, facts, force=args.force)
    for path, weight, _ in merged.sources:
        print(f"merged   {path}{'' if weight == 1 else f', times {weight:g}'}")
    print(f"into     {args.base}: {merged.changed} of {merged.tensors} tensors changed")
    print(
        f"written  {args.out}: {written.stat().st_size / 1e6:,.1f} MB, {' and '.join(merged.dtypes)}, "
        f"in {time.perf_counter() - start:.1f} s"
    )
    print(f"record   {record}: sha256 {merged.sha256[:12]} from base {merged.base_id[:12]}")
    for note in merged.notes:
        print(f"note     {note}")
    if args.verify:
        verify(args, merged, facts)


def verify(args: argparse.Namespace, merged: "Merged", facts: dict[str, Any]) -> None:
    """Compares the written file with base and unmerged adapter and records the result; fails beyond the bound."""
    from sam2_lora_ext.adapters.record import record_path, with_proof
    from sam2_lora_ext.deploy.verify import compare_merged

    made = "transformers' Sam2Model" if args.out.is_dir() else "stock SAM 2"
    print(f"verify   {made} from {args.out} against stock SAM 2 from {args.base} with the adapter ...", flush=True)
    result = compare_merged(args.out, args.base, merged.adapter, args.verify, args.image)
    write_json(record_path(args.out), with_proof(facts, args.verify, asdict(result)))
    print(f"weights  differ by at most {result.max_abs_weight_diff:.3g}")
    print(
        f"logits   differ by at most {result.max_abs_logit_diff:.3g} (allowed {result.bound:.3g}; they reach "
        f"{result.max_abs_logit:.3g})"
    )
    half = [name for name in merged.dtypes if name in ("float16", "bfloat16")]
    print(
        f"masks    {result.flipped:.4%} of the pixels differ, IoU at least {result.lowest_iou:.4f}, on average "
        f"{result.mean_iou:.4f}{f': the effect of {half[0]}' if half else ''}"
    )
    if not result.passed:
        raise UserError(
            f"{args.out} does not match base and adapter: its mask logits differ by "
            f"{result.max_abs_logit_diff:.3g}, but only {result.bound:.3g} is allowed"
        )
    print("verified")
