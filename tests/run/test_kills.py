"""Runs that are killed with SIGKILL, and resumed with worker processes: slow, the strictest test of exactness."""

import os
import random
import shutil
import signal
import time

import pytest
import torch

from helpers.kills import (
    assert_same_run,
    at_step,
    ends_with,
)
from helpers.ranks import with_path
from helpers.small_runs import environment, launch, train_here, write_config
from helpers.whole_runs import whole  # noqa: F401
from sam2_lora_ext.adapters.peft import load_adapter

# A slow disk: most of the time goes into writing.
SLOW = """\
import os, time
original = os.fsync


def fsync(file):
    time.sleep(0.25)
    original(file)


os.fsync = fsync
"""


@pytest.mark.slow
def test_kills_at_random_moments(tmp_path, nano_base, strips, whole):
    """kill -9, thirty times, every third one while a checkpoint is written: files on the disk are always complete."""
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow/sitecustomize.py").write_text(SLOW)
    run, config = tmp_path / "run", write_config(tmp_path / "config")
    env = with_path(environment(nano_base, strips, run), tmp_path / "slow")
    generator, kills, in_writing = random.Random(1), 0, 0
    wanted = int(os.environ.get("SAM2_LORA_KILLS", "30"))
    log = run / "logs/log.txt"
    while kills < wanted:
        if (run / "training_summary.json").exists():
            assert_same_run(run, whole)
            shutil.rmtree(run)
        began = log.stat().st_size if log.exists() else 0
        process = launch(config, env)
        # start-up takes most of a run: the moment is drawn from the first line of the log on
        while process.poll() is None and not (log.exists() and log.stat().st_size > began):
            time.sleep(0.02)
        half_written = run / f"checkpoints/.checkpoint.pt.{process.pid}.tmp"
        moment = time.monotonic() + generator.uniform(0, 8)
        while process.poll() is None and not (half_written.exists() if kills % 3 == 0 else time.monotonic() >= moment):
            time.sleep(0.005)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        output = process.communicate(timeout=60)[0]
        assert process.returncode in (0, -signal.SIGKILL), output[-3000:]
        in_writing += half_written.exists()
        if (run / "checkpoints/checkpoint.pt").exists():
            state = torch.load(run / "checkpoints/checkpoint.pt", weights_only=True)
            assert state["steps"]["train"] == 2 * state["epoch"] and state["epoch"] in (1, 2, 3)
        for adapter in run.glob("adapters/*/adapter_model.safetensors"):
            load_adapter(adapter)
    assert in_writing >= wanted // 6
    process = launch(config, env)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output[-3000:]
    assert_same_run(run, whole)


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
