"""Checks within a minute that a training will work: environment, config, checkpoint, data, one real step, disk.

Green lines are fine, yellow ones are warnings, red ones will not work and name the fix. Exit code 1 with a red one.
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
  python tools/doctor.py                                                  # the environment alone
  python tools/doctor.py -c severstal_lora lora.rank=16                   # a training as it would be started
  python tools/doctor.py -c demo --json > doctor.json
"""


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("-c", "--config", help="the config of a training, by name or file, as for sam2_lora_ext.train")
    options.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides")
    options.add_argument(
        "--no-step", action="store_true", help="skip the real step (a large model needs minutes on a CPU)"
    )
    options.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the findings; 1 when one is red."""
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
        print(f"\n{counts['green']} fine, {counts['yellow']} to look at, {counts['red']} that will not work")
    return 0 if result["ok"] else 1


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppresses output, warnings and logs of libraries."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
