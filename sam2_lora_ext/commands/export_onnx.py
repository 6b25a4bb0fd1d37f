"""Exports a merged SAM 2 as two ONNX files, compares their masks with PyTorch's under onnxruntime, and times both."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from sam2_lora_ext.settings.arguments import RESOLUTION, number
from sam2_lora_ext.utils.errors import UserError

EXAMPLES = """\
examples:
  a merged file, proven on a strip:
    python tools/export_onnx.py --config configs/sam2.1/sam2.1_hiera_l.yaml --checkpoint merged.pt --out onnx \\
        --image strip.jpg
  trained at 512 pixels, deployed at 512 pixels:
    python tools/export_onnx.py --config configs/sam2.1/sam2.1_hiera_t.yaml --checkpoint merged.pt --out onnx \\
        --image-size 512

OUT then holds, S being the pixels of a side:
  image_encoder.onnx  pixels (1, 3, S, S), RGB in [0, 1], the whole image squashed
                      -> image_embed, high_res_0, high_res_1
  mask_decoder.onnx   these, point_coords (B, N, 2), point_labels (B, N)
                      -> masks (B, 4, S/4, S/4), iou (B, 4), object_score (B, 1)
  export.json         inputs, outputs, the identity of the weights, the largest difference, times, versions
A point is x, y in pixels of the squashed image with the label 1 (on the object) or 0 (beside it); a box is two points
with the labels 2 (top left) and 3 (bottom right); -1 fills up. masks[:, 0] is the single mask, the others multimask's.
"""


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--config", required=True, help="the stock config, e.g. configs/sam2.1/sam2.1_hiera_l.yaml")
    options.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="FILE",
        help="what merge_lora.py wrote, or any weights of stock SAM 2",
    )
    options.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the folder of the ONNX files")
    options.add_argument("--image", type=Path, metavar="FILE", help="what to compare on (default: smooth noise)")
    options.add_argument(
        "--image-size",
        type=number(RESOLUTION),
        metavar="S",
        help="pixels of a side, a multiple of 32 (default: the config's)",
    )
    options.add_argument("--force", action="store_true", help="replace ONNX files in --out")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Builds stock SAM 2, exports, and prints a summary."""
    args = parser().parse_args(argv)
    from sam2_lora_ext.adapters.weights import read_weights, weights_id

    try:
        import hydra  # noqa: F401
        import sam2  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(f"the export needs SAM 2 ({error}): pip install -e '.[sam2,onnx]'") from error
    from sam2_lora_ext.deploy.onnx_export import HALVES, check_output, export, require_packages
    from sam2_lora_ext.deploy.stock import build_stock, check_inputs, load_strictly, noise_pixels, read_pixels

    require_packages()
    check_output(args.out, args.force, [args.checkpoint, *([args.image] if args.image else [])])
    check_inputs(args.config, args.image)
    model = build_stock(args.config, image_size=args.image_size)
    load_strictly(model, args.checkpoint)
    pixels = read_pixels(args.image, model.image_size) if args.image else noise_pixels(model.image_size)
    facts = {
        "checkpoint": str(args.checkpoint),
        "weights_id": weights_id(read_weights(args.checkpoint)),
        "config": args.config,
    }
    proof = export(model, args.out, pixels, facts, force=args.force, report=lambda line: print(line, flush=True))
    for name in HALVES:
        seconds = proof.seconds[name]
        size = (args.out / f"{name}.onnx").stat().st_size / 1e6
        print(
            f"{name:14} {size:8,.1f} MB   PyTorch {seconds['pytorch']:.3f} s, "
            f"onnxruntime {seconds['onnxruntime']:.3f} s"
        )
    print(
        f"logits differ by at most {proof.max_abs_logit_diff:.3g} (allowed {proof.bound:.3g}; they reach "
        f"{proof.max_abs_logit:.3g}); {proof.flipped:.4%} of the mask pixels differ"
    )
    print(f"written {args.out}")
