"""`python -m benchmarks [NAME ...]`, or `make bench`: the cost of training, data, ranks, merging and clicks; without a
name all of them.

Each is a separate module with its own options: `python -m benchmarks.NAME --help`. Not included, since they serve other
purposes: `benchmarks.quality` (40 minutes), `benchmarks.large_run` (7 GB, four minutes) and `benchmarks.estimate` (of
your own config).
"""

from sam2_lora_ext.utils.command_line import catch_interrupts, run_cli
from sam2_lora_ext.utils.errors import UserError

if __name__ == "__main__":
    catch_interrupts()  # before the slow imports

import argparse
import subprocess
import sys

NAMES = ("train_step", "pieces", "compiled", "features", "traffic", "merge", "data", "clicks")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(NAMES)}")
    names = parser.parse_args(argv).names or NAMES
    if unknown := [name for name in names if name not in NAMES]:
        raise UserError(f"there is no benchmark {unknown[0]!r}: choose from {', '.join(NAMES)}")
    for name in names:  # in separate processes, so that they do not share memory and threads
        print(f"== benchmarks.{name}", flush=True)
        if code := subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False).returncode:
            raise UserError(f"benchmarks.{name} ended with {code}: see above")


if __name__ == "__main__":
    run_cli(main)
