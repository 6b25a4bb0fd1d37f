"""Evaluates inspection without clicks on annotated strips: mask quality, false alarms, missed defects, time.

Writes inspection.json, inspection.md and pictures of found and missed defects and false alarms, by class. The
thresholds are those saved with the class prompts, which tools/fit_decision.py fits on validation strips; name test
strips here.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sam2_lora_ext.inspection.options import add_model, add_strips
from sam2_lora_ext.settings.arguments import number
from sam2_lora_ext.settings.kinds import Whole
from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.files import refuse_existing, write_atomic, write_json

EXAMPLES = """\
examples:
  python tools/evaluate_inspection.py --checkpoint runs/classes --out runs/classes/inspection
  python tools/evaluate_inspection.py --checkpoint steel.pt --data data/severstal --split-file split.csv --split test \\
      --out inspection
"""


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model(options)
    add_strips(options)
    options.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder of the results")
    pictures = "pictures of each class and kind (%(default)s)"
    options.add_argument("--pictures", type=number(Whole(0, 1000)), default=4, metavar="N", help=pictures)
    options.add_argument("--force", action="store_true", help="replace results in --out")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Inspects the strips, compares with the truth and writes the results."""
    args = parser().parse_intermixed_args(argv)
    try:
        from tqdm import tqdm

        from sam2_lora_ext.inspection.arguments import seen_in_fitting, segmenter_of, strips_of
        from sam2_lora_ext.inspection.showing import Gallery, describe, evaluate_strips
    except ModuleNotFoundError as error:
        message = f"the evaluation needs SAM 2 and its training code ({error}): pip install -e '.[sam2]'"
        raise UserError(message) from error
    for name in ("inspection.json", "inspection.md"):
        refuse_existing(args.out / name, args.force)
    segmenter = segmenter_of(args)
    strips, facts = strips_of(args, segmenter.prompts)
    if note := segmenter.decision.note():
        print(note)
    note = facts["note"] = seen_in_fitting(args, strips) if segmenter.decision.fitted else None
    if note:
        print(f"note: {note}")
    gallery = Gallery(segmenter.prompts.class_names, args.pictures)
    summary = evaluate_strips(segmenter, tqdm(strips, desc="strips", unit="strip"), gallery)
    text = "\n\n".join([describe(summary), *([f"note: {note}"] if note else [])])
    record = {
        "checkpoint": str(args.checkpoint),
        "strips": facts,
        "device": str(segmenter.network.device),
        "result": summary,
        "gallery": gallery.write(args.out / "pictures", args.force),
        "command": ["python", "tools/evaluate_inspection.py", *(sys.argv[1:] if argv is None else argv)],
    }
    write_json(args.out / "inspection.json", record, force=args.force)
    body = f"# Inspection\n\n```\n{text}\n```\n"
    write_atomic(args.out / "inspection.md", lambda path: path.write_text(body, encoding="utf-8"), force=args.force)
    print(f"\n{text}\n\nwritten  {args.out / 'inspection.json'}, inspection.md, pictures/")
