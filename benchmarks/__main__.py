"""`python -m benchmarks [NAME ...]`, or `make bench`: what training, data, ranks, merging and clicks cost; all without
a name.

Each is a module of its own with options of its own: `python -m benchmarks.NAME --help`. Not among them, for they answer
other questions: `benchmarks.quality` (40 minutes), `benchmarks.large_run` (7 GB, four minutes) and
`benchmarks.estimate` (of a config of yours).
"""

from sam2_lora_ext.utils.errors import UserError, catch_interrupts, run_cli

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
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    names = parser.parse_args(argv).names or NAMES
    if unknown := [name for name in names if name not in NAMES]:
        raise UserError(f"there is no benchmark {unknown[0]!r}: choose from {', '.join(NAMES)}")
    for name in names:  # in processes of their own, so that one's memory and threads are not another's
        print(f"== benchmarks.{name}", flush=True)
        if code := subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False).returncode:
            raise UserError(f"benchmarks.{name} ended with {code}: see above")


if __name__ == "__main__":
    run_cli(main)
