"""Trains every member of a grid of settings, one after another or as a Slurm job array, and compares them."""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from sam2_lora_ext.ablation.grid import (
    MEMBER,
    best_of,
    collect,
    members_of,
    metrics_of,
    note_settings,
    parse_grid,
    plot,
    to_csv,
    to_markdown,
)
from sam2_lora_ext.ablation.jobs import Task, run_here, run_on_slurm
from sam2_lora_ext.host.compose import compose, locate
from sam2_lora_ext.host.configs import USER_CONFIG_DIR, import_launcher
from sam2_lora_ext.settings.arguments import GPUS, number
from sam2_lora_ext.settings.kinds import Whole
from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.files import write_atomic

RESULTS = ("ablation.csv", "ablation.md", "ablation.png")  # written at the end of each call
EXAMPLES = """\
examples:
  python tools/ablate.py -c severstal_lora_tiny --grid lora.rank=4,8,16 lora.dropout=0,0.05 --out runs/ranks
  python tools/ablate.py -c severstal_lora --grid 'lora.targets=[image_encoder.*.qkv],[sam_mask_decoder.*_proj]' \\
      --out runs/targets --slurm --partition gpu --num-gpus 2 scratch.steps=5000

The same command continues an ablation: finished members are skipped, others resume from their checkpoints. A folder
with other settings is refused, as in a resume, unless trainer.resume_with_changes=true is among the overrides.
OUT then contains a run folder per member, ablation.csv, ablation.md and ablation.png.
"""


def check_metric(args: argparse.Namespace, grid: dict[str, list[str]]) -> str:
    """Sets `args.metric` and returns its mode: "max" if higher is better, "min" if lower is.

    Raises:
        UserError: no member's validation reports this metric.
    """
    name, folder = locate(args.config)
    if folder is not None:
        os.environ[USER_CONFIG_DIR] = str(folder)
    known, monitor, mode = metrics_of(compose(name, args.overrides))
    args.metric = args.metric or monitor or "iou_1click"
    for change in [f"{key}={value}" for key, values in grid.items() for value in values]:
        if args.metric not in known:
            with contextlib.suppress(UserError):  # the member's own run reports the error
                known += metrics_of(compose(name, [*args.overrides, change]))[0]
    if args.metric not in known:
        choices = ", ".join(dict.fromkeys(known))
        raise UserError(f"the validation does not report --metric {args.metric}: choose from {choices}")
    return mode if args.metric == monitor else "min" if args.metric.startswith("loss") else "max"


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    options = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("-c", "--config", required=True, help="config, as for python -m sam2_lora_ext.train")
    options.add_argument(
        "--grid", nargs="+", required=True, metavar="key=value,value", help="the axes; all combinations are run"
    )
    options.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder for the members' runs")
    options.add_argument("--metric", help="metric for the best member (default: the config's trainer.monitor)")
    options.add_argument("--num-gpus", type=number(GPUS), default=1, help="processes of each member (default: 1)")
    options.add_argument(
        "overrides", nargs="*", metavar="key=value", help="overrides of all members (before --grid, or after --)"
    )
    slurm = options.add_argument_group("on a cluster")
    slurm.add_argument("--slurm", action="store_true", help="run the members as a Slurm job array")
    slurm.add_argument("--partition", help="Slurm partition")
    slurm.add_argument("--account", help="Slurm account")
    slurm.add_argument("--qos", help="Slurm quality of service")
    slurm.add_argument(
        "--hours", type=number(Whole(1, 100_000)), default=24, help="time limit of a member (default: 24)"
    )
    slurm.add_argument("--cpus", type=number(Whole(1, 10_000)), default=6, help="CPUs of each member (default: 6)")
    slurm.add_argument(
        "--parallel",
        type=number(Whole(1, 10_000)),
        default=16,
        help="largest number of members at a time (default: 16)",
    )
    slurm.add_argument("--no-gpus", dest="gpus", action="store_false", help="request no GPU")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the unfinished members, then compares all; exit code 1 if a member is not finished."""
    args = parser().parse_intermixed_args(argv)
    from sam2_lora_ext.ablation.check import MemberCheck

    import_launcher()
    if args.slurm and not args.partition:
        raise UserError("--slurm needs --partition")

    args.out = args.out.resolve()
    common = ["-c", args.config, *args.overrides]
    grid = parse_grid(args.grid)
    for name in RESULTS:
        if (args.out / name).exists() and not any(args.out.glob(f"*/{MEMBER}")):
            raise UserError(f"{args.out / name} exists and is not from an ablation: choose another --out")
    mode = check_metric(args, grid)
    members = members_of(grid, args.out)
    check = MemberCheck(locate(args.config)[0], args.overrides, args.num_gpus)
    open_members = [member for member in members if not check.finished(member)]
    note_settings(members, common)
    here = ["--num-gpus", str(args.num_gpus), "--use-cluster", "0"]
    start = [sys.executable, "-m", "sam2_lora_ext.train", *common, *here]
    tasks = {
        member: Task([*start, *member.overrides, f"launcher.experiment_log_dir={member.folder}"], member.folder)
        for member in open_members
    }
    print(f"members  {len(members)}, {len(members) - len(tasks)} of them already finished")
    failures: dict[str, str] = {}
    try:
        if tasks:
            run_on_slurm(tasks, failures, args) if args.slurm else run_here(tasks, failures)
    finally:
        rows = collect(members, failures, args.metric)
        write_atomic(args.out / "ablation.csv", lambda path: path.write_text(to_csv(rows), encoding="utf-8"))
        table = to_markdown(rows, args.metric, mode)
        write_atomic(args.out / "ablation.md", lambda path: path.write_text(table, encoding="utf-8"))
        plot(members, rows, args.metric, args.out / "ablation.png", mode)
    print(f"\n{table}")
    if best := best_of(rows, args.metric, mode):
        quality = f"{args.metric} {best[args.metric]:.4f} with {best['params_trained']:,} trained parameters"
        print(f"best     {best['member']}: {quality}")
    print(f"written  {args.out}/ablation.csv, ablation.md, ablation.png")
    return int(any(row["status"] != "finished" for row in rows))
