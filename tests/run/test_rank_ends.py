"""The end of several ranks under SAM 2's launcher and ours: a signal, an exception, a kill, a mistake of the user."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helpers.ranks import alive, pids_of, recorded, start, with_path, with_recorder
from helpers.small_runs import environment, write_config
from sam2_lora_ext.adapters.peft import load_adapter
from sam2_lora_ext.run.lock import lock_folder

SIGNALS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])


def await_steps(process: subprocess.Popen, recorder: Path, steps: int, rank: int = 0) -> None:
    """Waits until a rank has the gradients of this number of steps."""
    while len(recorded(recorder, rank)) < steps and process.poll() is None:
        time.sleep(0.05)


def assert_gone(pids: set[int], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(pids) == 2 and not any(map(alive, pids))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("action", "said"),
    [
        ("raise", "the disk of this machine is on fire"),
        ("kill", "process 1 terminated with signal SIGKILL"),
    ],
)
def test_the_end_of_one_rank_is_the_end_of_the_job(action, said, tmp_path, nano_base, strips, recorder):
    """Within a minute, with the first cause on the screen and no process left."""
    overrides = [
        "scratch.steps=400",
        "scratch.steps_per_phase=200",
        *with_recorder(recorder, action=action, rank=1, step=3),
    ]
    process = start(tmp_path, nano_base, strips, 2, overrides)
    await_steps(process, recorder, 3, rank=1)
    failed = time.monotonic()
    output = process.communicate(timeout=120)[0]
    assert time.monotonic() - failed < 60
    assert process.returncode not in (0, None) and said in output
    assert_gone(pids_of(recorder), seconds=60 - (time.monotonic() - failed))
    lock_folder(tmp_path / "run").close()  # it is free


@pytest.fixture
def ours(tmp_path, nano_base, strips, recorder) -> Iterator:
    """`ours(overrides, base)` starts our command line with two ranks."""
    started = []

    def begin(overrides: list[str], base: Path = nano_base) -> subprocess.Popen:
        config = write_config(tmp_path / "config", overrides)
        env = with_path(environment(base, strips, tmp_path / "run"), recorder)
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "sam2_lora_ext.train", "-c", config, "--num-gpus", "2"],
                env={**os.environ, **env},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
        return started[-1]

    yield begin
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
@SIGNALS
def test_exit_codes_of_our_command_line_with_two_ranks(number, tmp_path, recorder, ours):
    """SIGTERM to the parent alone, as `kill` sends it, and Ctrl-C to the group: 143 and 130, with the step finished."""
    process = ours(["scratch.steps=8", "scratch.steps_per_phase=4", *with_recorder(recorder, action="slow")])
    await_steps(process, recorder, 5)
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + number and "Traceback" not in said, said[-3000:]
    assert_gone(pids_of(recorder))
    assert load_adapter(tmp_path / "run/adapters/latest").metadata["step"] >= 5
    assert torch.load(tmp_path / "run/checkpoints/checkpoint.pt", weights_only=True)["steps"]["train"] == 4


@pytest.mark.slow
def test_a_killed_rank_under_our_command_line(recorder, ours):
    """One sentence instead of torch's traceback, and the code that a shell gives a killed process."""
    process = ours(["scratch.steps=400", *with_recorder(recorder, action="kill", rank=1, step=2)])
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 137 and "Traceback" not in said, said[-3000:]
    assert said.count("error: rank 1 was ended by SIGKILL") == 1
    assert_gone(pids_of(recorder))


@pytest.mark.slow
def test_a_mistake_of_the_user_with_two_ranks(tmp_path, ours):
    """Exit code 2, the sentence of each rank, no traceback."""
    process = ours([], tmp_path / "none.pt")
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 2 and "Traceback" not in said, said[-3000:]
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert lines and {line.replace("rank 1: ", "").split(":")[1] for line in lines} == {
        f" there is no base checkpoint {tmp_path / 'none.pt'}"
    }


@pytest.mark.slow
@SIGNALS
def test_a_signal_to_the_group_stops_all_ranks_after_the_step(number, tmp_path, nano_base, strips, recorder):
    """As Ctrl-C and a service manager send it: `latest` is written, checkpoint.pt is of the last phase."""
    overrides = ["scratch.steps=8", "scratch.steps_per_phase=4", *with_recorder(recorder, action="slow")]
    process = start(tmp_path, nano_base, strips, 2, overrides)
    await_steps(process, recorder, 6)
    os.killpg(process.pid, number)
    output = process.communicate(timeout=120)[0]
    assert process.returncode in (-number, 128 + number, 1), output[-3000:]
    assert_gone(pids_of(recorder))
    assert f"{number.name}: stopped after step" in (tmp_path / "run/logs/log.txt").read_text()
    state = torch.load(tmp_path / "run/checkpoints/checkpoint.pt", weights_only=True)
    assert state["steps"]["train"] == 4
    assert 6 <= load_adapter(tmp_path / "run/adapters/latest").metadata["step"] <= 8
    if number == signal.SIGTERM:
        again = start(tmp_path, nano_base, strips, 2, overrides)
        output = again.communicate(timeout=300)[0]
        assert again.returncode == 0, output[-3000:]
        assert json.loads((tmp_path / "run/training_summary.json").read_text())["steps"] == 8


RANKS = '''\
"""Two processes that simulate ranks of torch's launcher, whose step takes 1.5 seconds, and their parent."""
import multiprocessing, os, sys, time

from sam2_lora_ext.run.signals import Forward, Interrupt


def rank():
    with Interrupt() as interrupt:
        os.write(1, b"ready\\n")
        while not interrupt.signum:
            time.sleep(0.05)
        time.sleep(1.5)
        raise SystemExit(128 + interrupt.signum)


if __name__ == "__main__":
    ranks = [multiprocessing.get_context("spawn").Process(target=rank) for _ in range(2)]
    with Forward() as forward:
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    print(*(process.exitcode for process in ranks))
    sys.exit(128 + forward.signum)
'''


@SIGNALS
@pytest.mark.parametrize("group", [True, False], ids=["to the group", "to the parent"])
def test_the_parent_of_the_ranks_hands_signals_on_once(number, group, tmp_path, repository):
    """A rank that got the signal itself, from a terminal, is not ended by the signal that its parent forwards."""
    (tmp_path / "parent.py").write_text(RANKS)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "parent.py"],
        stdout=subprocess.PIPE,
        start_new_session=True,
        env=os.environ | with_path({}, repository),
    )
    assert [process.stdout.readline() for _ in range(2)] == [b"ready\n"] * 2
    (os.killpg if group else os.kill)(process.pid, number)
    codes = process.communicate(timeout=60)[0].decode().split()
    assert codes == [str(128 + number)] * 2 and process.returncode == 128 + number


def test_a_signal_that_is_ignored_stays_ignored(tmp_path, repository):
    """SIGINT, as a shell's script starts its background jobs: SIGTERM still ends the ranks."""
    (tmp_path / "parent.py").write_text(RANKS)
    process = subprocess.Popen(
        ["sh", "-c", f"'{sys.executable}' '{tmp_path / 'parent.py'}' & echo $!; wait $!"],
        stdout=subprocess.PIPE,
        env=os.environ | with_path({}, repository),
    )
    pid = int(process.stdout.readline())
    assert [process.stdout.readline() for _ in range(2)] == [b"ready\n"] * 2
    os.kill(pid, signal.SIGINT)
    time.sleep(0.5)
    os.kill(pid, signal.SIGTERM)
    codes = process.communicate(timeout=60)[0].decode().split()
    assert codes == ["143", "143"] and process.returncode == 143
