"""Runs the members of an ablation, each in its own process: one after another, or as a Slurm job array."""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from sam2_lora_ext.ablation.grid import LOG, Member, reason_of_failure
from sam2_lora_ext.utils.errors import UserError

# submitit ignores the first and requeues on the second. Slurm sends them to all processes of a job, also to training.
OF_SUBMITIT = (signal.SIGTERM, signal.SIGUSR2)
PATIENCE = 300.0  # seconds for a member's current step after a signal, before it is killed


class Task:
    """Trains one member in its own process; submitit sends this object to the cluster."""

    def __init__(self, command: list[str], folder: Path):
        self.command, self.folder = command, folder

    def __call__(self) -> int:
        """Trains and returns the exit code; the training ignores submitit's signals and ends with this process."""
        with self.start(preexec_fn=_ignore) as process:
            try:
                return process.wait()
            except BaseException:
                process.kill()
                raise

    def start(self, **options: Any) -> subprocess.Popen[bytes]:
        """Starts the training with its output in the member's log; `options` are those of `Popen`."""
        foreign = ("SLURM_", "SUBMITIT_")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        with open(self.folder / LOG, "a") as log:
            return subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment, **options
            )

    def checkpoint(self) -> "submitit.helpers.DelayedSubmission":  # noqa: F821
        """Called by submitit before it requeues the job; the run resumes by itself."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def attend(task: Task) -> int:
    """Runs a member; forwards SIGINT and SIGTERM so that it finishes its step, and then ends too."""
    got: list[tuple[int, float]] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        got.append((number, time.monotonic()))
        if len(started) and started[0].poll() is None:
            started[0].send_signal(number)

    started: list[subprocess.Popen[bytes]] = []
    before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        started.append(task.start(start_new_session=True))  # gets a terminal's Ctrl-C only from this process
        if got:  # a signal came while the process was starting
            started[0].send_signal(got[0][0])
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = started[0].wait(timeout=1)
                break
            waited = time.monotonic() - got[0][1] if got else 0
            if waited > PATIENCE:
                started[0].send_signal(got[0][0])  # a second signal ends it at once
            if waited > 1.2 * PATIENCE:
                os.killpg(started[0].pid, signal.SIGKILL)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if got:
        raise KeyboardInterrupt if got[0][0] == signal.SIGINT else SystemExit(128 + signal.SIGTERM)
    return code


def run_here(tasks: dict[Member, Task], failures: dict[str, str]) -> None:
    """Runs the members one after another."""
    with tqdm(tasks.items(), unit="member") as bar:
        for member, task in bar:
            bar.set_postfix_str(member.name)
            if code := attend(task):
                failures[member.folder.name] = reason_of_failure(member, code)
                bar.write(f"failed   {member.name}: {failures[member.folder.name]}")
                if code in (-2, -15, 130, 143):
                    raise KeyboardInterrupt


def run_on_slurm(tasks: dict[Member, Task], failures: dict[str, str], args: argparse.Namespace) -> None:
    """Runs the members as a Slurm job array and waits for its end.

    Raises:
        UserError: there is no Slurm on this machine, or it refuses the jobs.
    """
    import submitit

    if shutil.which("sbatch") is None:
        raise UserError("--slurm needs sbatch, which this machine lacks: leave --slurm out, or use the cluster")
    executor = submitit.SlurmExecutor(folder=args.out / "submitit_logs")
    options = {name: value for name, value in (("account", args.account), ("qos", args.qos)) if value}
    executor.update_parameters(
        job_name="ablate",
        partition=args.partition,
        time=60 * args.hours,
        nodes=1,
        ntasks_per_node=1,
        cpus_per_task=args.cpus,
        array_parallelism=args.parallel,
        **options,
        **({"gres": f"gpu:{args.num_gpus}"} if args.gpus else {}),
    )
    try:
        with executor.batch():
            jobs = {member: executor.submit(task) for member, task in tasks.items()}
    except submitit.core.utils.FailedJobError as error:
        raise UserError(f"Slurm refused the jobs: {' '.join(str(error).split())}") from error
    array = next(iter(jobs.values())).job_id.partition("_")[0]
    print(f"array    {array}, {len(jobs)} jobs; logs: {args.out / 'submitit_logs'}", flush=True)
    try:
        await_jobs(array, jobs, failures)
    except KeyboardInterrupt:
        print(f"the jobs of array {array} continue; to end them: scancel {array}", file=sys.stderr)
        raise


def await_jobs(array: str, jobs: dict[Member, Any], failures: dict[str, str]) -> None:
    """Waits for all jobs of the array, and records failed members with their reasons."""
    waiting = dict(jobs)
    with tqdm(total=len(jobs), unit="member") as bar:
        while waiting:
            gone = not in_queue(array)  # queried before the results, since a job writes its result before it ends
            time.sleep(2)
            for member, job in list(waiting.items()):
                if job.paths.result_pickle.exists():
                    try:
                        code = job.result()
                    except Exception as error:  # any error of the cluster must not stop the other jobs
                        failures[member.folder.name] = " ".join(str(error).split())[-500:]
                    else:
                        if code:
                            failures[member.folder.name] = reason_of_failure(member, code)
                elif gone:
                    failures[member.folder.name] = f"the job ended without a result, see {job.paths.stderr}"
                else:
                    continue
                del waiting[member]
                bar.update()
                if reason := failures.get(member.folder.name):
                    bar.write(f"failed   {member.name}: {reason}")


def in_queue(array: str) -> bool:
    """Whether `squeue` still lists jobs of this array; `sacct` needs accounting, which many clusters lack."""
    shown = subprocess.run(["squeue", "--noheader", "--format=%i", f"--jobs={array}"], capture_output=True, text=True)
    return bool(shown.stdout.strip()) or (shown.returncode != 0 and "Invalid job id" not in shown.stderr)


def _ignore() -> None:
    for number in OF_SUBMITIT:
        signal.signal(number, signal.SIG_IGN)
