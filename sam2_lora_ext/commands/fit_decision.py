"""Fits the decision of class prompts on validation strips only, and writes it into their file.

It fits the threshold of each class's score, the scale and bias of its logits, and the minimum areas, to maximise the
mean Dice over all (strip, class) pairs. Run it on the adapter before merging; merged files work too.
"""

import argparse
from collections.abc import Sequence

from sam2_lora_ext.inspection.options import add_model, add_strips
from sam2_lora_ext.utils.errors import UserError

EXAMPLES = """\
examples:
  python tools/fit_decision.py --checkpoint runs/classes                    # on the strips that the run validates on
  python tools/fit_decision.py --checkpoint steel.pt --data data/severstal --split-file split.csv --split val
"""


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model(options)
    add_strips(options)
    kinds = options.add_mutually_exclusive_group()
    kinds.add_argument("--overlapping", action="store_true", help="a pixel may have several classes")
    kinds.add_argument("--exclusive", action="store_true", help="a pixel has at most one class (default: unchanged)")
    options.add_argument("--force", action="store_true", help="replace an earlier fit")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Fits, writes and prints what changed."""
    args = parser().parse_intermixed_args(argv)
    try:
        from tqdm import tqdm

        from sam2_lora_ext.inspection.arguments import segmenter_of, strips_of
        from sam2_lora_ext.inspection.decision_file import place_of, write_decision
        from sam2_lora_ext.inspection.fitting import fit_decision, look_at
    except ModuleNotFoundError as error:
        raise UserError(f"fitting needs SAM 2 and its training code ({error}): pip install -e '.[sam2]'") from error
    if args.split and (args.split in ("train", "test") or args.split.startswith("!")):
        raise UserError(f"thresholds must not be fitted to --split {args.split}: name validation strips")
    segmenter = segmenter_of(args)
    place = place_of(args.checkpoint)
    if segmenter.decision.fitted and not args.force:
        raise UserError(f"the decision of {place} is already fitted: give --force to fit it again")
    strips, facts = strips_of(args, segmenter.prompts)
    exclusive = args.exclusive or segmenter.decision.exclusive and not args.overlapping
    print(f"fitting to {facts['strips']} strips: {facts['origin']}", flush=True)
    looked = look_at(segmenter, tqdm(strips, desc="strips", unit="strip"))
    names = segmenter.prompts.class_names
    fit = fit_decision(looked, names, exclusive, lambda rows: tqdm(rows, desc="fitting", unit="strip", leave=False))
    written = write_decision(place, fit.decision)
    for note in fit.notes:
        print(f"note: {note}")
    print(f"{'class':16} {'threshold':>9} {'scale':>7} {'bias':>7} {'area':>7} {'weak area':>10} below score")
    rows = zip(names, *(getattr(fit.decision, key) for key in ROWS), strict=True)
    for name, threshold, scale, bias, area, weak, score in rows:
        more = f"{weak:10} {score:11.2f}" if weak != area else ""
        print(f"{name[:16]:16} {threshold:9.2f} {scale:7.2f} {bias:7.2f} {area:7} {more}")
    print(
        f"mean Dice over {len(looked) * len(names)} (strip, class) pairs of these strips: {fit.before:.4f} with the "
        f"default decision, {fit.after:.4f} fitted"
    )
    print(f"written {written}")


ROWS = ("threshold", "scale", "bias", "min_area", "weak_area", "weak_score")
