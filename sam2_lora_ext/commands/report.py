"""Writes one HTML report about runs: facts, curves, tables, pictures, updates by layer, commands.

The page needs no network and no other file. It includes an evaluation in RUN_DIR/evaluation (tools/evaluate.py --out)
and an inspection in RUN_DIR/inspection (tools/evaluate_inspection.py --out). Data, crop and resolution come from the
run's record.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from sam2_lora_ext.run.paths import find_run
from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.files import refuse_existing, refuse_input_files, write_atomic

EXAMPLES = """\
examples:
  python tools/report.py runs/severstal_lora                                   # writes runs/severstal_lora/report.html
  python tools/report.py runs/r8 runs/decoder --evaluation runs/evaluation --out report.html
"""


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    options = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN_DIR",
        help="the folder launcher.experiment_log_dir, or a path inside it, such as adapters/best",
    )
    options.add_argument(
        "--evaluation",
        type=Path,
        action="append",
        metavar="DIR",
        help="an evaluation to show; may be repeated (default: RUN_DIR/evaluation)",
    )
    options.add_argument(
        "--inspection",
        type=Path,
        action="append",
        metavar="DIR",
        help="an evaluated inspection; may be repeated (default: RUN_DIR/inspection)",
    )
    options.add_argument("--out", type=Path, metavar="FILE", help="default: report.html in the first run's folder")
    options.add_argument("--force", action="store_true", help="replace an existing --out")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the runs and writes the page."""
    args = parser().parse_args(argv)
    args.runs = [find_run(path) or path for path in args.runs]
    out = args.out or args.runs[0] / "report.html"
    refuse_existing(out, args.force)
    try:
        from sam2_lora_ext.report.collect import read_evaluation, read_runs
        from sam2_lora_ext.report.inspection import read_inspection
        from sam2_lora_ext.report.page import render
    except ModuleNotFoundError as error:
        raise UserError(f"the report needs the packages of training ({error}): pip install -e '.[sam2]'") from error
    runs = read_runs(args.runs)
    found = [path / "evaluation" for path in args.runs if (path / "evaluation/evaluation.json").exists()]
    folders = args.evaluation or found
    there = [path / "inspection" for path in args.runs if (path / "inspection/inspection.json").exists()]
    others = args.inspection or there
    refuse_input_files(out, (file for folder in (*args.runs, *folders, *others) for file in read_by_report(folder)))
    text = render(runs, [read_evaluation(folder) for folder in folders], [read_inspection(path) for path in others])
    page = text.encode("utf-8", "backslashreplace")  # a file name that is not UTF-8 is shown with escapes
    write_atomic(out, lambda path: path.write_bytes(page), force=args.force)
    print(
        f"written  {out}: {len(text) / 1e6:.1f} MB, {len(runs)} runs, {len(folders)} evaluations, "
        f"{len(others)} inspections"
    )


def read_by_report(folder: Path) -> list[Path]:
    """The files of a run or an evaluation except report pages."""
    files = folder.rglob("*") if folder.is_dir() else [folder]
    return [file for file in files if file.suffix != ".html" and file.is_file()]
