#!/usr/bin/env python
"""Trains every member of a grid of settings, one after another or as a Slurm job array, and compares them."""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sam2_lora_ext.ablation import (
    LOG, Member, best_of, collect, finished, members_of, metrics_of, parse_grid, plot, reason_of_failure, to_csv,
    to_markdown,
)  # fmt: skip
from sam2_lora_ext.compose import compose, locate
from sam2_lora_ext.errors import UserError, run_cli
from sam2_lora_ext.files import write_atomic
from sam2_lora_ext.host import USER_CONFIG_DIR, import_launcher

PATIENCE = 300.0  # seconds that a member has for its running step after a signal, before it is ended

EXAMPLES = """\
examples:
  python tools/ablate.py -c severstal_lora_tiny --grid lora.rank=4,8,16 lora.dropout=0,0.05 --out runs/ranks
  python tools/ablate.py -c severstal_lora --grid 'lora.targets=[image_encoder.*.qkv],[sam_mask_decoder.*_proj]' \\
      --out runs/targets --slurm --partition gpu --num-gpus 2 scratch.steps=5000

The same command goes on where it was: finished members are not run again, others resume from their checkpoints.
OUT then holds a run folder a member, ablation.csv, ablation.md and ablation.png.
"""


class Task:
    """Trains one member in a process of its own; what submitit sends to the cluster."""

    def __init__(self, command: list[str], folder: Path):
        self.command, self.folder = command, folder

    def __call__(self) -> int:
        """The exit code of the training; when this process is ended, so is the training."""
        with self.start() as process:
            try:
                return process.wait()
            except BaseException:
                process.kill()
                raise

    def start(self, new_session: bool = False) -> subprocess.Popen[bytes]:
        """Starts the training, whose output goes to the member's log; a session of its own gets no Ctrl-C of ours."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SUBMITIT_"))}
        with open(self.folder / LOG, "a") as log:
            return subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment,
                start_new_session=new_session,
            )  # fmt: skip

    def checkpoint(self) -> "submitit.helpers.DelayedSubmission":  # noqa: F821
        """submitit asks for this before it requeues; the run resumes by itself."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def attend(task: Task) -> int:
    """Runs a member; SIGINT and SIGTERM go on to it, so that it finishes its step, and end us when it has ended."""
    got: list[tuple[int, float]] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        got.append((number, time.monotonic()))
        if len(started) and started[0].poll() is None:
            started[0].send_signal(number)

    started: list[subprocess.Popen[bytes]] = []
    before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        started.append(task.start(new_session=True))
        if got:  # while it was started
            started[0].send_signal(got[0][0])
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = started[0].wait(timeout=1)
                break
            waited = time.monotonic() - got[0][1] if got else 0
            if waited > PATIENCE:
                started[0].send_signal(got[0][0])  # the second one ends it at once
            if waited > 1.2 * PATIENCE:
                os.killpg(started[0].pid, signal.SIGKILL)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if got:
        raise KeyboardInterrupt if got[0][0] == signal.SIGINT else SystemExit(128 + signal.SIGTERM)
    return code


def run_here(tasks: dict[Member, Task], failures: dict[str, str]) -> None:
    """One after another."""
    with tqdm(tasks.items(), unit="member") as bar:
        for member, task in bar:
            bar.set_postfix_str(member.name)
            if code := attend(task):
                failures[member.folder.name] = reason_of_failure(member, code)
                bar.write(f"failed   {member.name}: {failures[member.folder.name]}")
                if code in (-2, -15, 130, 143):
                    raise KeyboardInterrupt


def run_on_slurm(tasks: dict[Member, Task], failures: dict[str, str], args: argparse.Namespace) -> None:
    """As a job array; waits for its end."""
    import submitit

    executor = submitit.SlurmExecutor(folder=args.out / "submitit_logs")
    options = {name: value for name, value in (("account", args.account), ("qos", args.qos)) if value}
    executor.update_parameters(
        job_name="ablate", partition=args.partition, time=60 * args.hours, nodes=1, ntasks_per_node=1,
        cpus_per_task=args.cpus, array_parallelism=args.parallel, **options,
        **({"gres": f"gpu:{args.num_gpus}"} if args.gpus else {}),
    )  # fmt: skip
    try:
        with executor.batch():
            jobs = {member: executor.submit(task) for member, task in tasks.items()}
    except submitit.core.utils.FailedJobError as error:
        raise UserError(f"Slurm refused the jobs: {' '.join(str(error).split())}") from error
    print(
        f"array    {next(iter(jobs.values())).job_id.partition('_')[0]}, {len(jobs)} jobs; "
        f"logs: {args.out / 'submitit_logs'}"
    )
    waiting = dict(jobs)
    array = next(iter(jobs.values())).job_id.partition("_")[0]
    with tqdm(total=len(jobs), unit="member") as bar:
        while waiting:
            gone = not in_queue(array)  # asked before the results are looked for, which come first
            time.sleep(2)
            for member, job in list(waiting.items()):
                if job.paths.result_pickle.exists():
                    try:
                        code = job.result()
                    except Exception as error:  # of any kind, from the cluster; the others go on
                        failures[member.folder.name] = " ".join(str(error).split())[-500:]
                    else:
                        if code:
                            failures[member.folder.name] = reason_of_failure(member, code)
                elif gone:
                    failures[member.folder.name] = f"its job ended without a result, see {job.paths.stderr}"
                else:
                    continue
                del waiting[member]
                bar.update()
                if reason := failures.get(member.folder.name):
                    bar.write(f"failed   {member.name}: {reason}")


def in_queue(array: str) -> bool:
    """Whether Slurm still has jobs of this array, by `squeue`: `sacct` needs accounting, which many clusters lack."""
    shown = subprocess.run(["squeue", "--noheader", "--format=%i", f"--jobs={array}"], capture_output=True, text=True)
    return bool(shown.stdout.strip()) or (shown.returncode != 0 and "Invalid job id" not in shown.stderr)


def check_metric(args: argparse.Namespace, grid: dict[str, list[str]]) -> str:
    """Fills in `args.metric`, and says whether its best is its "max" or "min".

    Raises:
        UserError: no validation of a member gives this metric.
    """
    name, folder = locate(args.config)
    if folder is not None:
        os.environ[USER_CONFIG_DIR] = str(folder)
    known, monitor, mode = metrics_of(compose(name, args.overrides))
    args.metric = args.metric or monitor or "iou_1click"
    for change in [f"{key}={value}" for key, values in grid.items() for value in values]:
        if args.metric not in known:
            with contextlib.suppress(UserError):  # the member's own failure
                known += metrics_of(compose(name, [*args.overrides, change]))[0]
    if args.metric not in known:
        raise UserError(f"--metric {args.metric}: the validation does not give it; choose from {', '.join(dict.fromkeys(known))}")
    return mode if args.metric == monitor else "min" if args.metric.startswith("loss") else "max"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is not finished, then compares; exit code 1 when a member failed."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("-c", "--config", required=True, help="as for python -m sam2_lora_ext.train")
    parser.add_argument(
        "--grid", nargs="+", required=True, metavar="key=value,value", help="the axes; all combinations are run"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the members' run folders go")
    parser.add_argument("--metric", help="decides about the best (default: the config's trainer.monitor)")
    parser.add_argument("--num-gpus", type=int, default=1, help="processes of each member (default: 1)")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="for all members (before --grid, or after --)"
    )
    slurm = parser.add_argument_group("on a cluster")
    slurm.add_argument("--slurm", action="store_true", help="a Slurm job array instead of one after another")
    slurm.add_argument("--partition", help="Slurm partition")
    slurm.add_argument("--account", help="Slurm account")
    slurm.add_argument("--qos", help="Slurm quality of service")
    slurm.add_argument("--hours", type=int, default=24, help="time limit of a member (default: 24)")
    slurm.add_argument("--cpus", type=int, default=6, help="of each member (default: 6)")
    slurm.add_argument("--parallel", type=int, default=16, help="members at a time, at most (default: 16)")
    slurm.add_argument("--no-gpus", dest="gpus", action="store_false", help="ask for no GPU")
    args = parser.parse_intermixed_args(argv)
    import_launcher()
    if args.slurm and not args.partition:
        raise UserError("--slurm needs --partition")

    args.out = args.out.resolve()
    common = ["-c", args.config, *args.overrides]
    grid = parse_grid(args.grid)
    mode = check_metric(args, grid)
    members = members_of(grid, args.out, common)
    start = [sys.executable, "-m", "sam2_lora_ext.train", *common, "--num-gpus", str(args.num_gpus), "--use-cluster", "0"]
    tasks = {member: Task([*start, *member.overrides, f"launcher.experiment_log_dir={member.folder}"], member.folder)
             for member in members if not finished(member)}  # fmt: skip
    print(f"members  {len(members)}, of which {len(members) - len(tasks)} are finished already")
    failures: dict[str, str] = {}
    try:
        if tasks:
            run_on_slurm(tasks, failures, args) if args.slurm else run_here(tasks, failures)
    finally:
        rows = collect(members, failures, args.metric)
        write_atomic(args.out / "ablation.csv", lambda path: path.write_text(to_csv(rows), encoding="utf-8"))
        table = to_markdown(rows, args.metric, mode)
        write_atomic(args.out / "ablation.md", lambda path: path.write_text(table, encoding="utf-8"))
        plot(rows, args.metric, args.out / "ablation.png")
    print(f"\n{table}")
    if best := best_of(rows, args.metric, mode):
        quality = f"{args.metric} {best[args.metric]:.4f} with {best['params_trained']:,} parameters trained"
        print(f"best     {best['member']}: {quality}")
    print(f"written  {args.out}/ablation.csv, ablation.md, ablation.png")
    return int(any(row["status"] != "finished" for row in rows))


if __name__ == "__main__":
    run_cli(main)
