"""Checks in about a minute that a training will work: environment, config, checkpoint, data, one real step, disk.

Green lines are passed checks, yellow lines warnings, red lines errors with their fix. A red line gives exit code 1.
"""

import argparse
import contextlib
import io
import json
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence

from sam2_lora_ext.doctor.examine import examine
from sam2_lora_ext.doctor.findings import show, to_json

EXAMPLES = """\
examples:
  python tools/doctor.py                                                  # only the environment
  python tools/doctor.py -c severstal_lora lora.rank=16                   # a training with its overrides
  python tools/doctor.py -c demo --json > doctor.json
"""


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    options = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("-c", "--config", help="the config of a training, by name or file, as for sam2_lora_ext.train")
    options.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides")
    options.add_argument(
        "--no-step", action="store_true", help="skip the real step (a large model needs minutes on a CPU)"
    )
    options.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the findings; returns 1 if one is red."""
    options = parser()
    args = options.parse_intermixed_args(argv)
    if args.overrides and not args.config:
        options.error("overrides need -c CONFIG")
    findings = []
    out = sys.stdout
    with quiet():
        for finding in examine(args.config, args.overrides, step=not args.no_step):
            findings.append(finding)
            if not args.json:
                show(finding, out)
    result = to_json(findings)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        counts = result["counts"]
        print(f"\n{counts['green']} passed, {counts['yellow']} warnings, {counts['red']} errors")
    return 0 if result["ok"] else 1


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppresses the output, warnings and logs of libraries."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
