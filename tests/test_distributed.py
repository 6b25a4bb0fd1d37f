"""Several gloo ranks through SAM 2's launcher: one training, and one end, whatever their number."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from small_runs import environment, launch, rank_environment, train_here, write_config

from sam2_lora_ext.adapter import load_adapter
from sam2_lora_ext.interrupt import Forward, Interrupt

RECORDER = '''\
"""Stands where SAM 2's Trainer calls a gradient logger: writes what a rank holds, and ends one on demand."""
import hashlib, json, os, signal, sys, time
from pathlib import Path


class Recorder:
    def __init__(self, folder, action=None, rank=None, step=None):
        self.folder, self.action, self.rank, self.step, self.count = Path(folder), action, rank, step, 0

    def __call__(self, model, rank, where):
        self.count += 1
        digest = hashlib.sha256()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                digest.update(parameter.detach().numpy().tobytes() + parameter.grad.numpy().tobytes())
        with open(self.folder / f"rank{rank}.jsonl", "a") as file:
            file.write(json.dumps({"pid": os.getpid(), "parent": os.getppid(), "digest": digest.hexdigest()}) + "\\n")
        if self.rank == rank and self.step == self.count:
            if self.action == "raise":
                raise RuntimeError("the disk of this machine is on fire")
            if self.action == "nan":
                next(p for p in model.parameters() if p.requires_grad).grad[0] = float("nan")
            if self.action == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
        if self.action == "slow":
            time.sleep(0.5)
'''

# The same samples and clicks however they are spread: no random transforms, all objects, clicks by object, no dropout.
SPREADABLE = (
    "trainer.model.prompt_seed=1", "trainer.model.prob_to_sample_from_gt_for_train=0.0", "scratch.max_num_objects=null",
    "lora.dropout=0.0", "scratch.clean_share=0.0", "trainer.data.val.batch_sizes=[1]",
    "trainer.early_stop={patience: 1, min_delta: 2.0}", "scratch.steps=20",
    # Adam's first steps turn the sign of a tiny gradient into a whole step
    "trainer.optim.optimizer._target_=torch.optim.SGD", "scratch.lr=0.1",
)  # fmt: skip
VALIDATION = "${trainer.data.val.datasets[0]."
FIXED = (
    "trainer.data.train.datasets=[{_target_: training.dataset.vos_dataset.VOSDataset, training: true, multiplier: 1, "
    f"video_dataset: '{VALIDATION}video_dataset}}', transforms: '{VALIDATION}transforms}}', "
    f"sampler: '{VALIDATION}sampler}}'}}]"
)


@pytest.fixture
def recorder(tmp_path) -> Path:
    folder = tmp_path / "recorder"
    folder.mkdir()
    (folder / "recorder.py").write_text(RECORDER)
    return folder


def recorded(folder: Path, rank: int) -> list[dict]:
    file = folder / f"rank{rank}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def with_recorder(folder: Path, **more: object) -> list[str]:
    values = ", ".join(f"{key}: {value}" for key, value in {"folder": folder, **more}.items())
    return [f"trainer.optim.gradient_logger={{_target_: recorder.Recorder, {values}}}"]


def start(
    tmp_path: Path, base: Path, strips: Path, ranks: int, overrides: list[str], name: str = "run"
) -> subprocess.Popen:
    config = write_config(tmp_path / f"config of {name}", overrides)
    env = environment(base, strips, tmp_path / name) | {"PYTHONPATH": str(tmp_path / "recorder")}
    return launch(config, env, "--num-gpus", str(ranks))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_two_ranks_train_as_one(tmp_path, nano_base, strips, recorder, monkeypatch):
    """Adapters are equal on both before every step; batch 1 on two ranks is batch 2 on one; both stop early."""
    shared = [*SPREADABLE, FIXED]
    process = start(tmp_path, nano_base, strips, 2, [*shared, "scratch.batch_size=1", *with_recorder(recorder)], "two")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output[-4000:]
    first, second = recorded(recorder, 0), recorded(recorder, 1)
    assert len(first) == len(second) == 4  # both stopped after the second phase of ten
    assert [row["digest"] for row in first] == [row["digest"] for row in second]
    assert len({row["digest"] for row in first}) == 4 and first[0]["pid"] != second[0]["pid"]

    train_here(
        environment(nano_base, strips, tmp_path / "one"),
        *(f"++{setting}" for setting in shared),
        "scratch.batch_size=2",
    )
    states = [torch.load(tmp_path / name / "checkpoints/checkpoint.pt", weights_only=True) for name in ("one", "two")]
    assert states[0]["epoch"] == states[1]["epoch"] == 2
    for key, value in states[0]["model"].items():
        torch.testing.assert_close(
            states[1]["model"][key], value, rtol=1e-4, atol=1e-6
        )  # the order of sums, over 4 steps
    moved = [float(value.abs().max()) for key, value in states[0]["model"].items() if key.endswith("lora_b")]
    assert min(moved) > 0 and max(moved) > 1e-3


def test_only_the_gradients_of_adapters_travel():
    """Counted in DDP's communication hook; `python -m benchmarks.traffic` does the same for SAM 2.1 large."""
    from benchmarks.traffic import reduced_bytes

    with rank_environment({}):
        dist.init_process_group("gloo")
        sent, trained = reduced_bytes("demo")
    assert trained == 123_200 and sent == 4 * trained


@pytest.mark.slow
def test_sam_2_1_large_sends_under_a_percent():
    """Rank 8 on the default targets against full fine-tuning, counted as above on the real models."""
    from benchmarks.traffic import reduced_bytes

    with rank_environment({}):
        dist.init_process_group("gloo")
        sent, trained = reduced_bytes("severstal_lora")
        whole, total = reduced_bytes("severstal_full")
    assert sent == 4 * trained and whole == 4 * total and total > 220_000_000
    assert 0 < sent < 0.01 * whole


@pytest.mark.slow
def test_validation_does_not_depend_on_the_ranks(tmp_path, nano_base, strips):
    """1, 2 and 3 ranks, which do not divide the samples: every metric is the same to the last digit."""
    results = []
    for ranks in (1, 2, 3):
        process = start(
            tmp_path, nano_base, strips, ranks, ["trainer.mode=val", "trainer.data.val.batch_sizes=[1]"], f"run{ranks}"
        )
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output[-3000:]
        stats = json.loads((tmp_path / f"run{ranks}/logs/val_stats.json").read_text().splitlines()[0])
        results.append({key: value for key, value in stats.items() if key.startswith("Meters_train/")})
    assert results[0] == results[1] == results[2] and len(results[0]) > 10
    samples = (
        results[0]["Meters_train/val_severstal/segmentation/objects"]
        + results[0]["Meters_train/val_severstal/segmentation/clean"]
    )
    assert samples % 2 or samples % 3


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
    while not len(recorded(recorder, 1)) >= 3 and process.poll() is None:
        time.sleep(0.2)
    failed = time.monotonic()
    output = process.communicate(timeout=120)[0]
    assert time.monotonic() - failed < 60
    assert process.returncode not in (0, None) and said in output
    pids = {row["pid"] for rank in (0, 1) for row in recorded(recorder, rank)}
    assert len(pids) == 2 and not any(alive(pid) for pid in pids)
    again = start(tmp_path, nano_base, strips, 1, ["scratch.steps=2"], "run")  # the lock is free
    output = again.communicate(timeout=300)[0]
    assert again.returncode == 0, output[-3000:]


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_on_one_rank(tmp_path, nano_base, strips, recorder):
    """Poisoned after the exchange, so that only rank 1 sees it: the whole job ends, with the sentence."""
    process = start(tmp_path, nano_base, strips, 2, with_recorder(recorder, action="nan", rank=1, step=2))
    output = process.communicate(timeout=300)[0]
    assert process.returncode != 0 and "not finite" in output


def _rank() -> None:
    """Stands for a rank of torch's launcher: its step takes a second."""
    with Interrupt() as interrupt:
        os.write(1, b"ready\n")
        while not interrupt.signum:
            time.sleep(0.05)
        time.sleep(1)
        raise SystemExit(128 + interrupt.signum)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("group", [True, False], ids=["to the group", "to the parent"])
def test_the_parent_of_the_ranks_hands_signals_on_once(number, group, tmp_path):
    """A rank that got the signal itself, from a terminal, is not ended by what its parent hands on."""
    code = (
        f"import multiprocessing, sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_distributed as t\n"
        "ranks = [multiprocessing.get_context('fork').Process(target=t._rank) for _ in range(2)]\n"
        "with t.Forward() as forward:\n    [rank.start() for rank in ranks]\n    [rank.join() for rank in ranks]\n"
        "print(*(rank.exitcode for rank in ranks))\nsys.exit(128 + forward.signum)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert [process.stdout.readline() for _ in range(2)] == [b"ready\n"] * 2
    (os.killpg if group else os.kill)(process.pid, number)
    codes = set(process.communicate(timeout=60)[0].decode().split())
    assert codes <= {"130", "143"} and process.returncode == 128 + number


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_exit_codes_of_our_command_line_with_two_ranks(number, tmp_path, nano_base, strips, recorder):
    """SIGTERM to the parent alone, as `kill` sends it, and Ctrl-C to the group: 143 and 130, with the step finished."""
    overrides = ["scratch.steps=8", "scratch.steps_per_phase=4", *with_recorder(recorder, action="slow")]
    config = write_config(tmp_path / "config", overrides)
    env = environment(nano_base, strips, tmp_path / "run") | {"PYTHONPATH": str(recorder)}
    process = subprocess.Popen(
        [sys.executable, "-m", "sam2_lora_ext.train", "-c", config, "--num-gpus", "2"], env={**os.environ, **env},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    while not len(recorded(recorder, 0)) >= 5 and process.poll() is None:
        time.sleep(0.05)
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + number and "Traceback" not in said, said[-3000:]
    assert not any(alive(row["pid"]) for rank in (0, 1) for row in recorded(recorder, rank))
    assert load_adapter(tmp_path / "run/adapters/latest").metadata["step"] >= 5
    assert torch.load(tmp_path / "run/checkpoints/checkpoint.pt", weights_only=True)["steps"]["train"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_group_stops_all_ranks_after_the_step(number, tmp_path, nano_base, strips, recorder):
    """As Ctrl-C and a service manager send it: `latest` is written, checkpoint.pt is of the last phase."""
    overrides = ["scratch.steps=8", "scratch.steps_per_phase=4", *with_recorder(recorder, action="slow")]
    process = start(tmp_path, nano_base, strips, 2, overrides)
    while not len(recorded(recorder, 0)) >= 6 and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, number)
    output = process.communicate(timeout=120)[0]
    assert process.returncode in (-number, 128 + number, 1), output[-3000:]
    pids = {row["pid"] for rank in (0, 1) for row in recorded(recorder, rank)}
    deadline = time.monotonic() + 30
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in pids)
    assert f"{number.name}: stopped after step" in (tmp_path / "run/logs/log.txt").read_text()
    state = torch.load(tmp_path / "run/checkpoints/checkpoint.pt", weights_only=True)
    assert state["steps"]["train"] == 4
    assert 6 <= load_adapter(tmp_path / "run/adapters/latest").metadata["step"] <= 8
    again = start(tmp_path, nano_base, strips, 2, overrides)
    output = again.communicate(timeout=300)[0]
    assert again.returncode == 0, output[-3000:]
    assert json.loads((tmp_path / "run/training_summary.json").read_text())["steps"] == 8
