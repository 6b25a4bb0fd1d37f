"""Inspects strips without clicks: for each strip the mask of every defect class, or "clean".

The weights must have class prompts (train with a config such as severstal_lora_classes). A stopped inspection
resumes where it stopped. Unreadable files are reported, listed in inspection.csv, and tried again by the next call.
"""

import argparse
import hashlib
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sam2_lora_ext.data.arguments import add_pixels
from sam2_lora_ext.inspection.options import add_model
from sam2_lora_ext.run.paths import find_run
from sam2_lora_ext.settings.arguments import number
from sam2_lora_ext.settings.kinds import Number
from sam2_lora_ext.utils.errors import UserError

EXAMPLES = """\
examples:
  a folder of strips, all formats:
    python tools/inspect_strips.py --checkpoint steel.pt strips/ --out inspected
  an adapter on its base, and a submission for Kaggle:
    python tools/inspect_strips.py --checkpoint runs/classes --base sam2.1_hiera_large.pt strips/*.jpg \\
        --out inspected --formats kaggle
  a production line that writes files into a folder, until Ctrl-C:
    python tools/inspect_strips.py --checkpoint steel.pt --watch /line/strips --out inspected

OUT then has inspection.csv (a row for each strip) and, by --formats:
  label_png   label_png/annotations/X.png: the class number as grey value
  coco        coco/annotations.json: RLE, score and area of each defect, for CVAT and this package;
              coco/polygons.json: outlines without holes, for tools without RLE, such as Label Studio
  supervisely supervisely/: a project, with a copy of the images
  kaggle      submission.csv: a row for each image and class
  overlays    overlays/X.jpg: strips with defects, which are outlined
"""
USUAL = "coco,kaggle,overlays"


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = options.add_argument
    add("images", nargs="*", type=Path, metavar="IMAGES", help="image files, or folders of them")
    add_model(options)
    add("--out", type=Path, required=True, metavar="DIR", help="the folder of the results")
    add("--watch", type=Path, metavar="FOLDER", help="inspect new files in a folder, until Ctrl-C")
    add("--idle", type=number(Number(0, 1e9)), metavar="SECONDS", help="with --watch: end after S without a new file")
    usual = f"{USUAL}, and label_png if classes exclude each other"
    add("--formats", metavar="A,B,..|all", help=f"label_png, coco, supervisely, kaggle, overlays (default: {usual})")
    add("--run", type=Path, metavar="RUN", help="run with the bits and orientation (default: that of --checkpoint)")
    add_pixels(options)
    add("--force", action="store_true", help="replace an inspection in --out")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Inspects and prints a summary."""
    args = parser().parse_args(argv)
    try:
        from sam2_lora_ext.inspection.arguments import segmenter_of
        from sam2_lora_ext.inspection.inspecting import Inspector, find_images, watch
        from sam2_lora_ext.inspection.journal import Journal
        from sam2_lora_ext.inspection.prelabels import Prelabels, check_formats
    except ModuleNotFoundError as error:
        raise UserError(f"inspection needs SAM 2 ({error}): pip install -e '.[sam2]'") from error
    from sam2_lora_ext.utils.folders import refuse_inputs

    if bool(args.images) == bool(args.watch):
        raise UserError("give either image files or folders, or a folder with --watch")
    if args.idle is not None and not args.watch:
        raise UserError("--idle is only for --watch: leave it out")
    refuse_inputs(args.out, [path for path in (args.watch, *args.images) if path is not None and path.is_dir()])
    source = _source(args)
    bits, exif = args.bits or (source.bits if source else 16), not args.as_stored and (source.exif if source else True)
    segmenter = segmenter_of(args)
    prompts = segmenter.prompts
    mixed = not prompts.decision.exclusive or max(prompts.class_ids) > 255
    wanted = args.formats or (USUAL if mixed else f"label_png,{USUAL}")
    formats = check_formats(wanted, prompts.decision.exclusive, prompts.class_ids)
    if note := prompts.decision.note():
        print(note)
    facts = {
        **_identity(segmenter),
        "bits": bits,
        "exif": exif,
        "overlap": args.overlap,
        "half": args.half,
        "formats": formats,
    }
    names = dict(zip(prompts.class_ids, prompts.class_names, strict=True))
    with Journal(args.out, facts, args.force) as journal:
        if args.force:
            _clear(args.out)
        inspector = Inspector(segmenter, journal, Prelabels(args.out, formats, names), bits, exif)
        before = len(journal.places)
        began = time.perf_counter()
        if args.watch:
            print(f"watching {args.watch}; stop with Ctrl-C")
            tally = inspector.run(watch(args.watch, journal, args.idle))
        else:
            files = find_images(args.images, journal)
            tally = inspector.run(files, len(files))
    seconds = time.perf_counter() - began
    if before:
        print(f"{before} strips were already in {args.out}")
    if tally.inspected:
        print(
            f"{tally.inspected} strips inspected, {tally.defective} with a defect and {tally.clean} clean: "
            f"{tally.inspected / seconds:.2f} strips per second; model and decision took "
            f"{1000 * tally.seconds / tally.inspected:.1f} ms per strip"
        )
    if tally.bad:
        print(f"{tally.bad} could not be inspected, see the column error; the last one: {tally.reason}")
    print(f"results in {args.out}")
    if tally.bad and not tally.inspected and not before:
        raise UserError(f"none of {tally.bad} images could be inspected; the last one: {tally.reason}")


def _source(args: argparse.Namespace) -> Any:
    from sam2_lora_ext.data.source import from_run

    run = args.run or find_run(args.checkpoint)
    return None if run is None else from_run(run)


def _identity(segmenter: Any) -> dict[str, str]:
    """The identity of the model and its settings."""
    from sam2_lora_ext.adapters.class_prompts import header_of
    from sam2_lora_ext.adapters.weights import weights_id

    tokens = hashlib.sha256(segmenter.prompts.tokens.numpy().tobytes()).hexdigest()
    model = {"weights": weights_id(segmenter.network.model.state_dict()), "class tokens": tokens}
    return {**model, "class table or decision": header_of(segmenter.prompts)}


def _clear(out: Path) -> None:
    """Removes the results of an earlier inspection."""
    for name in ("label_png", "coco", "supervisely", "overlays"):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in ("submission.csv", "inspection.csv"):
        (out / name).unlink(missing_ok=True)
