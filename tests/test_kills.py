"""Runs that are killed with SIGKILL, and resumed with worker processes: slow, and the last word on exactness."""

import os
import random
import shutil
import signal
import time

import pytest
import torch
from small_runs import environment, launch, train_here, write_config
from test_resume import assert_same_run
from test_survival import at_step, ends_with, whole  # noqa: F401


@pytest.mark.slow
def test_kills_at_random_moments(tmp_path, nano_base, strips, whole):  # noqa: F811
    """kill -9, thirty times, many of them during a write: the checkpoint on the disk is always whole."""
    env = environment(nano_base, strips, tmp_path / "run")
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "sitecustomize.py").write_text(
        "import os, time\noriginal = os.fsync\n\n\ndef fsync(file):\n    time.sleep(0.25)\n    original(file)\n\n\n"
        "os.fsync = fsync\n"
    )
    # a slow disk: most of the time goes into writing
    env |= {"PYTHONPATH": os.pathsep.join(filter(None, [str(slow), os.environ.get("PYTHONPATH")]))}
    config, generator, kills = write_config(tmp_path / "config"), random.Random(1), 0
    checkpoint = tmp_path / "run/checkpoints/checkpoint.pt"
    deadline = time.monotonic() + 3600
    wanted = int(os.environ.get("SAM2_LORA_KILLS", "30"))
    while kills < wanted:
        assert time.monotonic() < deadline
        if (tmp_path / "run/training_summary.json").exists():
            assert_same_run(tmp_path / "run", whole)
            shutil.rmtree(tmp_path / "run")
        began = len((tmp_path / "run/logs/log.txt").read_text()) if (tmp_path / "run/logs/log.txt").exists() else 0
        process = launch(config, env)
        # start-up takes most of a run: the moment is drawn from the first line of the log on
        log = tmp_path / "run/logs/log.txt"
        while process.poll() is None and not (log.exists() and log.stat().st_size > began):
            time.sleep(0.02)
        moment = time.monotonic() + generator.uniform(0, 8)
        while time.monotonic() < moment and process.poll() is None:
            time.sleep(0.01)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        output = process.communicate(timeout=60)[0]
        assert process.returncode in (0, -signal.SIGKILL), output[-3000:]
        if checkpoint.exists():
            state = torch.load(checkpoint, weights_only=True)
            assert state["steps"]["train"] == 2 * state["epoch"] and state["epoch"] in (1, 2, 3)
    process = launch(config, env)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output[-3000:]
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.slow
def test_resume_is_exact_with_worker_processes(tmp_path, nano_base, strips):
    """The same as in test_resume, with two loader workers."""
    workers = ("scratch.num_workers=2", "scratch.steps=4")
    train_here(environment(nano_base, strips, tmp_path / "whole"), *workers)
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 3, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
        ends_with(143, environment(nano_base, strips, tmp_path / "run"), *workers)
    train_here(environment(nano_base, strips, tmp_path / "run"), *workers)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
