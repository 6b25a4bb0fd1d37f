"""Training through SAM 2's launcher on a real Slurm of one node, started for these tests by tools/slurm_local.sh."""

import contextlib
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from helpers.kills import assert_same_run
from helpers.ranks import recorded, with_path, with_recorder
from helpers.small_runs import QUICK, environment, launch, write_config

pytestmark = pytest.mark.slurm
ON_CLUSTER = ["submitit.cpus_per_task=1", "submitit.timeout_hour=1", "submitit.name=test"]
OPTIONS = ("--use-cluster", "1", "--partition", "debug", "--num-gpus", "2")


def folder_for_cluster(tmp_path_factory) -> Path:
    """One that munged, which does not run as root, may enter."""
    folder = tmp_path_factory.mktemp("cluster")
    for parent in (folder, *folder.parents):
        if parent.stat().st_mode & 0o055 != 0o055:
            parent.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, repository) -> Iterator[Path]:
    """The folder of a running cluster, which is in the environment of everything that the tests start."""
    if os.geteuid() or not all(map(shutil.which, ("munged", "slurmctld", "slurmd", "sbatch"))):
        missing = "a test cluster needs root and Debian's slurm-wlm and munge"
        if os.environ.get("CI", "").lower() in ("1", "true"):
            pytest.fail(missing, pytrace=False)
        pytest.skip(missing)
    folder = folder_for_cluster(tmp_path_factory)
    script = repository / "tools/slurm_local.sh"
    with contextlib.ExitStack() as stack:
        stack.callback(subprocess.run, [script, "down", folder], check=True, capture_output=True)
        up = subprocess.run([script, "up", folder], capture_output=True, text=True)
        assert up.returncode == 0, up.stderr + up.stdout
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        status = subprocess.run([script, "status", folder], capture_output=True, text=True)
        assert status.returncode == 0 and "idle" in status.stdout
        yield folder
    assert subprocess.run([script, "status", folder], capture_output=True).returncode == 1
    for name in ("slurmctld", "slurmd", "munged"):
        assert not (folder / "run" / f"{name}.pid").exists()


def test_down_stops_only_what_up_started(cluster, tmp_path_factory, repository):
    """Another cluster stays up, and a process that has the number in an old pid file lives."""
    other, script = folder_for_cluster(tmp_path_factory), repository / "tools/slurm_local.sh"
    subprocess.run([script, "up", other], check=True, capture_output=True)
    again = subprocess.run([script, "up", other], capture_output=True, text=True)
    assert again.returncode == 2 and f"error: a cluster of this script is up in {other}" in again.stderr
    assert subprocess.run([script, "down", other]).returncode == 0
    assert subprocess.run([script, "status", other], capture_output=True).returncode == 1
    with subprocess.Popen(["sleep", "60"]) as stranger:
        (other / "run/slurmd.pid").write_text(f"{stranger.pid}\n")
        assert subprocess.run([script, "down", other]).returncode == 0
        assert stranger.poll() is None
        stranger.kill()
    assert subprocess.run([script, "status", cluster], capture_output=True).returncode == 0


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.3)


def state_of(job: str) -> str:
    """RUNNING, COMPLETED, FAILED ..."""
    shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True).stdout
    found = re.search(r"JobState=(\w+)", shown)
    return found[1] if found else "GONE"


def logs_of(run: Path) -> str:
    return "".join(path.read_text(errors="replace") for path in sorted(run.glob("submitit_logs/*_log.*")))


def submit(config: Path, env: dict[str, str], *options: str) -> str:
    """Submits through the stock launcher and returns the job's id."""
    process = launch(config, env, *(options or OPTIONS))
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output[-3000:]
    return re.search(r"Submitit Job ID: (\d+)", output)[1]


@pytest.fixture(scope="module")
def finished(cluster, tmp_path_factory, nano_base, strips) -> Path:
    """A job of two tasks on one node that ran to its end."""
    folder = tmp_path_factory.mktemp("job")
    job = submit(write_config(folder / "config", ON_CLUSTER), environment(nano_base, strips, folder / "run"))
    wait_for(lambda: state_of(job) not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), 300, "the job")
    assert state_of(job) == "COMPLETED", logs_of(folder / "run")
    return folder / "run"


def test_two_tasks_train_validate_and_export(finished):
    summary = json.loads((finished / "training_summary.json").read_text())
    assert summary["world_size"] == 2 and summary["steps"] == 6
    assert len(json.loads((finished / "validations.json").read_text())) == 3
    for kind in ("best", "latest", "final"):
        assert (finished / "adapters" / kind / "adapter_model.safetensors").exists()


def test_a_preempted_job_is_requeued_and_ends_the_same(finished, tmp_path, nano_base, strips, recorder):
    """TERM and USR2 as Slurm sends them before a preemption: submitit ignores the one and requeues on the other."""
    config = write_config(tmp_path / "config", [*ON_CLUSTER, *with_recorder(recorder, action="slow")])
    job = submit(config, with_path(environment(nano_base, strips, tmp_path / "run"), recorder))
    checkpoint = tmp_path / "run/checkpoints/checkpoint.pt"
    wait_for(lambda: checkpoint.exists() and len(recorded(recorder, 0)) >= 3, 180, "the first checkpoint")
    name = (tmp_path / "run/run.json").read_text()
    subprocess.run(["scancel", "--signal=TERM", job], check=True)
    steps = len(recorded(recorder, 0))
    wait_for(lambda: len(recorded(recorder, 0)) > steps, 60, "a step after SIGTERM")
    assert steps < 5
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    wait_for(lambda: "Requeued" in logs_of(tmp_path / "run") or state_of(job) == "PENDING", 60, "the requeue")
    wait_for(lambda: state_of(job) in ("COMPLETED", "FAILED", "GONE"), 300, "the job")
    assert state_of(job) == "COMPLETED", logs_of(tmp_path / "run")[-4000:]
    assert "Bypassing signal SIGTERM" in logs_of(tmp_path / "run")
    assert "Resuming training from" in (tmp_path / "run/logs/log.txt").read_text()
    assert (tmp_path / "run/run.json").read_text() == name
    assert_same_run(tmp_path / "run", finished)


def test_a_failed_job_shows_its_reason(cluster, tmp_path, strips):
    config = write_config(tmp_path / "config", ON_CLUSTER)
    job = submit(config, environment(tmp_path / "none.pt", strips, tmp_path / "run"))
    wait_for(lambda: state_of(job) in ("COMPLETED", "FAILED", "GONE"), 180, "the job")
    assert state_of(job) == "FAILED"
    assert f"error: there is no base checkpoint {tmp_path / 'none.pt'}" in logs_of(tmp_path / "run")


def test_a_wrong_partition_is_named(cluster, tmp_path, nano_base, strips, run_python):
    config = write_config(tmp_path / "config", ON_CLUSTER)
    env = environment(nano_base, strips, tmp_path / "run")
    process = launch(config, env, "--use-cluster", "1", "--partition", "nowhere")
    assert "invalid partition specified: nowhere" in process.communicate(timeout=120)[0] and process.returncode
    ours = run_python(
        ["-m", "sam2_lora_ext.train", "-c", config, "--use-cluster", "1", "--partition", "nowhere"], env=env
    )
    assert ours.returncode == 2 and "invalid partition specified: nowhere" in ours.stderr
    assert ours.stderr.count("error: Slurm refused the job") == 1 and "Traceback" not in ours.stderr


def test_an_ablation_as_a_job_array(cluster, tmp_path, nano_base, strips, repository, run_python):
    """A failing member does not end the others; a second start submits only that one."""
    env = environment(nano_base, strips, tmp_path / "unused")
    command = [
        repository / "tools/ablate.py",
        "-c",
        "demo",
        *QUICK,
        "scratch.steps=2",
        "--out",
        tmp_path / "out",
        "--slurm",
        "--partition",
        "debug",
        "--no-gpus",
        "--cpus",
        "1",
        "--hours",
        "1",
        "--grid",
        "lora.rank=2,0,4",
    ]
    done = run_python(command, env=env, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    with open(tmp_path / "out/ablation.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["finished", "failed", "finished"]
    assert "lora.rank must be a whole number from 1 to 4096, got 0" in rows[1]["reason"]
    assert re.search(r"array    \d+, 3 jobs", done.stdout) and "best     rank-" in done.stdout
    again = run_python(command, env=env, cwd=tmp_path)
    assert "2 of them already finished" in again.stdout and re.search(r"array    \d+, 1 jobs", again.stdout)
    assert torch.load(tmp_path / "out/rank-4/checkpoints/checkpoint.pt", weights_only=True)["epoch"] == 1


def test_a_preempted_member_of_an_ablation_goes_on(cluster, tmp_path, nano_base, strips, repository, recorder):
    """Slurm signals the training too, which leaves TERM and USR2 to submitit, and resumes when it is requeued."""
    command = [
        sys.executable,
        repository / "tools/ablate.py",
        "-c",
        "demo",
        *QUICK,
        "scratch.steps=12",
        *(f"+{setting}" for setting in with_recorder(recorder, action="slow")),
        "--out",
        tmp_path / "out",
        "--slurm",
        "--partition",
        "debug",
        "--no-gpus",
        "--cpus",
        "1",
        "--hours",
        "1",
        "--grid",
        "lora.rank=2",
    ]
    env = with_path(environment(nano_base, strips, tmp_path / "unused"), recorder)
    tool = subprocess.Popen(command, env=os.environ | env, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    run = tmp_path / "out/rank-2"
    ready = lambda: (run / "checkpoints/checkpoint.pt").exists() and len(recorded(recorder, 0)) >= 3
    wait_for(lambda: ready() or tool.poll() is not None, 180, "the first checkpoint")
    job = re.search(r"array    (\d+)", tool.stdout.readline() + tool.stdout.readline())[1]
    subprocess.run(["scancel", "--signal=TERM", job], check=True)
    steps = len(recorded(recorder, 0))
    wait_for(lambda: len(recorded(recorder, 0)) > steps + 1, 60, "two steps after SIGTERM")
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    said = tool.communicate(timeout=300)[0]
    assert tool.returncode == 0, said
    assert "best     rank-2" in said and "Resuming training from" in (run / "logs/log.txt").read_text()
    assert json.loads((run / "training_summary.json").read_text())["steps"] == 12
