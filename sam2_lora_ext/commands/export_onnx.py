"""Exports a merged SAM 2 as two ONNX files, compares their masks with PyTorch's under onnxruntime, and times both."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from sam2_lora_ext.settings.arguments import RESOLUTION, number
from sam2_lora_ext.utils.errors import UserError

EXAMPLES = """\
examples:
  a merged file, verified on a strip:
    python tools/export_onnx.py --config configs/sam2.1/sam2.1_hiera_l.yaml --checkpoint merged.pt --out onnx \\
        --image strip.jpg
  for AnyLabeling, X-AnyLabeling and samexporter:
    python tools/export_onnx.py --config configs/sam2.1/sam2.1_hiera_l.yaml --checkpoint steel.pt --out labelling \\
        --layout samexporter
  trained at 512 pixels, deployed at 512 pixels:
    python tools/export_onnx.py --config configs/sam2.1/sam2.1_hiera_t.yaml --checkpoint merged.pt --out onnx \\
        --image-size 512
  class prompts as one graph that applies the thresholds:
    python tools/export_onnx.py --classes --decide --config configs/sam2.1/sam2.1_hiera_l.yaml \\
        --checkpoint steel.pt --out onnx

OUT then has, for S pixels per side:
  image_encoder.onnx  pixels (1, 3, S, S), RGB in [0, 1], the whole image squashed to a square
                      -> image_embed, high_res_feats_0, high_res_feats_1
  mask_decoder.onnx   these, point_coords (B, N, 2), point_labels (B, N)
                      -> masks (B, 4, S/4, S/4), iou_predictions (B, 4), object_score (B, 1)
  export.json         inputs, outputs, the identity of the weights, the largest difference, times, versions
A point is x, y in pixels of the squashed image with the label 1 (on the object) or 0 (not on it); a box is two points
with the labels 2 (top left) and 3 (bottom right); -1 is padding. masks[:, 0] is the single mask, the others are the
multimask outputs.

With --classes OUT has instead:
  class_segmenter.onnx   pixels (B, 3, S, S) of tiles -> logits (B, C, S/4, S/4), scores (B, C); with --decide also
                         masks (B, C, S/4, S/4), 1 in the pixels of a class (without minimum areas)
  class_segmenter.json   classes, tile width, thresholds, the largest difference, versions

With --layout samexporter the two files are for samexporter's runner, which labelling tools share:
  image_encoder.onnx  image (1, 3, S, S), normalised -> high_res_feats_0, high_res_feats_1, image_embed
  mask_decoder.onnx   image_embed, high_res_feats_0, high_res_feats_1, point_coords, point_labels as floats,
                      mask_input (B, 1, S/4, S/4), has_mask_input (B or 1)
                      -> the multimask outputs: masks (B, 3, S/4, S/4), iou_predictions (B, 3)
and OUT also has x_anylabeling.yaml and anylabeling.yaml: load them as a custom model in these tools.
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
        help="a file of merge_lora.py, or any weights of stock SAM 2",
    )
    options.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the folder of the ONNX files")
    options.add_argument("--image", type=Path, metavar="FILE", help="image for the comparison (default: smooth noise)")
    options.add_argument(
        "--image-size",
        type=number(RESOLUTION),
        metavar="S",
        help="pixels of a side, a multiple of 32 (default: the config's)",
    )
    options.add_argument("--classes", action="store_true", help="one graph of the class prompts, without clicks")
    options.add_argument("--decide", action="store_true", help="with --classes: include thresholds and calibration")
    options.add_argument("--half", action="store_true", help="with --classes: float16, with a comparison of the masks")
    options.add_argument(
        "--layout",
        choices=("plain", "samexporter"),
        default="plain",
        help="names, order and types: for your own code (%(default)s), or for labelling tools",
    )
    options.add_argument(
        "--name", metavar="NAME", help="the model's name in a labelling tool (default: that of --checkpoint)"
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
    from sam2_lora_ext.deploy.onnx_export import check_output, export, require_packages
    from sam2_lora_ext.deploy.onnx_layouts import PAIR
    from sam2_lora_ext.deploy.stock import build_stock, check_inputs, load_strictly, noise_pixels, read_pixels

    require_packages()
    if args.classes and args.layout != "plain":
        raise UserError("--layout is for image_encoder.onnx and mask_decoder.onnx: leave it out with --classes")
    if args.name and args.layout == "plain":
        raise UserError("--name is only for labelling tools: give --layout samexporter too")
    if args.classes:
        return export_class_graph(args)
    if args.decide or args.half:
        raise UserError("--decide and --half are only for --classes: give it too")
    check_output(args.out, args.force, [args.checkpoint, *([args.image] if args.image else [])], args.layout)
    check_inputs(args.config, args.image)
    model = build_stock(args.config, image_size=args.image_size)
    load_strictly(model, args.checkpoint)
    pixels = read_pixels(args.image, model.image_size) if args.image else noise_pixels(model.image_size)
    facts = {
        "checkpoint": str(args.checkpoint),
        "weights_id": weights_id(read_weights(args.checkpoint)),
        "config": args.config,
    }
    proof = export(
        model,
        args.out,
        pixels,
        facts,
        force=args.force,
        report=lambda line: print(line, flush=True),
        layout=args.layout,
        name=args.name or args.checkpoint.stem,
    )
    for name in PAIR:
        seconds = proof.seconds[name]
        size = (args.out / f"{name}.onnx").stat().st_size / 1e6
        print(
            f"{name:14} {size:8,.1f} MB   PyTorch {seconds['pytorch']:.3f} s, "
            f"onnxruntime {seconds['onnxruntime']:.3f} s"
        )
    print(
        f"logits differ by at most {proof.max_abs_logit_diff:.3g} (allowed {proof.bound:.3g}; largest logit "
        f"{proof.max_abs_logit:.3g}); {proof.flipped:.4%} of the mask pixels differ"
    )
    print(f"written {args.out}")


def export_class_graph(args: argparse.Namespace) -> None:
    """Exports class prompts as one graph, and prints a summary."""
    from sam2_lora_ext.deploy.stock import noise_pixels, read_pixels
    from sam2_lora_ext.inspection.onnx_graph import FILE, NOTES, export_classes
    from sam2_lora_ext.inspection.segmenter import load_segmenter
    from sam2_lora_ext.utils.files import refuse_existing, refuse_input_files

    for name in (FILE, NOTES):
        refuse_existing(args.out / name, args.force)
        refuse_input_files(args.out / name, [args.checkpoint, *([args.image] if args.image else [])])
    segmenter = load_segmenter(args.config, args.checkpoint, device="cpu")
    prompts, size = segmenter.prompts, segmenter.network.size
    if args.image_size not in (None, size):
        raise UserError(f"the class prompts were trained at {size} pixels: leave out --image-size {args.image_size}")
    pixels = read_pixels(args.image, size) if args.image else noise_pixels(size)
    if args.decide and (note := prompts.decision.note()):
        print(note)
    facts = {"checkpoint": str(args.checkpoint), "config": args.config}
    proof = export_classes(
        segmenter.network,
        prompts,
        args.out,
        pixels,
        facts,
        decide=args.decide,
        half=args.half,
        force=args.force,
        report=lambda line: print(line, flush=True),
    )
    allowed = "" if proof.bound is None else f" (allowed {proof.bound:.3g})"
    print(f"{FILE}: {(args.out / FILE).stat().st_size / 1e6:,.1f} MB, classes {', '.join(prompts.class_names)}")
    print(
        f"logits differ by at most {proof.max_abs_logit_diff:.3g}{allowed} of {proof.max_abs_logit:.3g}, scores by "
        f"{proof.max_abs_score_diff:.3g}; {proof.flipped:.4%} of the mask pixels differ, IoU {proof.mask_iou:.4f}"
    )
    print(f"written {args.out}")
