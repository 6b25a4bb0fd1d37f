"""Evaluates models under production conditions: stock predictors, simulated clicks and boxes, 95 % intervals.

Reports IoU and Dice at 1, 2, 4, 8 clicks, with the exact box and with boxes shifted by 5, 10, 20 %, clicks to an IoU
of 0.80 and 0.90, and boundary F, also by class and size; false alarms on clean images; Kaggle's mean Dice and
submission.csv. Several models are evaluated on the same objects, and their differences are paired.

By default a run is evaluated as it was trained: on its validation data, with its crop, resolution and bits. The results
list every difference from these conditions.
"""

import argparse
import sys
from collections.abc import Sequence

from sam2_lora_ext.evaluate.arguments import evaluate_parser, parse
from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.files import write_atomic, write_json

CLICKS = (1, 2, 4, 8)


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    return evaluate_parser(__doc__)


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluates and writes evaluation.json, evaluation.md, galleries and submissions."""
    args = parse(__doc__, argv)
    try:
        from sam2_lora_ext.evaluate.checks import prepare
        from sam2_lora_ext.evaluate.compare import compare
        from sam2_lora_ext.evaluate.conditions import settle
        from sam2_lora_ext.evaluate.models import candidate, candidates, check_device
        from sam2_lora_ext.evaluate.protocol import Protocol
        from sam2_lora_ext.evaluate.text import conditions_lines, describe
    except ModuleNotFoundError as error:
        message = f"the evaluation needs SAM 2 and its training code ({error}): pip install -e '.[sam2]'"
        raise UserError(message) from error

    check_device(args.device)
    if args.compare:
        wanted = candidates(args.compare, args.checkpoint, args.config)
    else:
        wanted = [candidate(str(args.adapter or args.checkpoint), args.checkpoint, args.config)]
    conditions = settle(args, wanted)
    protocol = Protocol(
        clicks=tuple(count for count in CLICKS if count <= args.max_clicks),
        max_clicks=args.max_clicks,
        clean_clicks=args.clean_clicks,
        tile=args.tile,
        overlap=args.overlap,
        crop=conditions.source.crop,
        automatic=args.automatic,
        thresholds=tuple(args.automatic_thresholds),
        same_clicks=args.same_clicks,
        image_size=conditions.source.resolution,
        seed=args.seed,
    )
    if args.submission_prompt not in protocol.prompts:
        raise UserError(
            f"--submission-prompt must be one of {', '.join(protocol.prompts)}, got {args.submission_prompt!r}"
        )
    samples, said = prepare(wanted, conditions, args.out, args.limit, args.force)
    print(shown("\n".join(conditions_lines(said))), flush=True)
    record = compare(
        wanted,
        samples,
        protocol,
        args.out,
        device=args.device,
        submitted=args.submission_prompt,
        pictures=args.pictures,
        conditions=said,
        force=args.force,
    )
    record["command"] = ["python", "tools/evaluate.py", *(sys.argv[1:] if argv is None else argv)]
    text = shown(describe(record))
    write_json(args.out / "evaluation.json", record, force=args.force)
    write_atomic(args.out / "evaluation.md", lambda path: path.write_text(text, encoding="utf-8"), force=args.force)
    further = {"galleries": args.pictures, "submission.csv of each model": record["models"][0]["kaggle"]}
    written = ["evaluation.md", *[name for name, there in further.items() if there]]
    print(f"\n{text}\nwritten  {args.out / 'evaluation.json'}, {', '.join(written)}")


def shown(text: str) -> str:
    """The text with escapes for file names that are not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
