"""For tests of several ranks: starts them, and a gradient logger that writes what each holds and ends one on demand."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from helpers.small_runs import environment, launch, write_config

RECORDER = '''\
"""Replaces the gradient logger of SAM 2's Trainer."""
import hashlib, json, os, signal, time
from pathlib import Path

from torch.optim.optimizer import register_optimizer_step_post_hook


def digest(tensors):
    return hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)).hexdigest()


class Recorder:
    def __init__(self, folder, action=None, rank=None, step=None):
        self.folder, self.action, self.rank, self.step, self.count = Path(folder), action, rank, step, 0
        register_optimizer_step_post_hook(self.after_step)

    def write(self, name, **row):
        with open(self.folder / f"{name}{os.environ['RANK']}.jsonl", "a") as file:
            file.write(json.dumps(row) + "\\n")

    def after_step(self, optimizer, args, kwargs):
        self.write("after", digest=digest(p for group in optimizer.param_groups for p in group["params"]))

    def __call__(self, model, rank, where):
        self.count += 1
        self.write("rank", pid=os.getpid(), digest=digest(p.grad for p in model.parameters() if p.requires_grad))
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


def recorded(folder: Path, rank: int, name: str = "rank") -> list[dict]:
    """The rows of one rank so far: of each step when its gradients are there, or ("after") when it has been applied."""
    file = folder / f"{name}{rank}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def with_recorder(folder: Path, **more: object) -> list[str]:
    """Overrides; `action` "raise", "nan" or "kill" happens on `rank` at `step`, "slow" always and everywhere."""
    values = ", ".join(f"{key}: {value}" for key, value in {"folder": folder, **more}.items())
    return [f"trainer.optim.gradient_logger={{_target_: recorder.Recorder, {values}}}"]


def with_path(env: dict[str, str], folder: Path) -> dict[str, str]:
    """`env` with a folder before others on PYTHONPATH."""
    return env | {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))}


def start(
    tmp_path: Path, base: Path, strips: Path, ranks: int, overrides: list[str], name: str = "run"
) -> subprocess.Popen:
    """Starts SAM 2's launcher with some ranks on `tmp_path / name`; the recorder is in `tmp_path / "recorder"`."""
    config = write_config(tmp_path / f"config of {name}", overrides)
    env = with_path(environment(base, strips, tmp_path / name), tmp_path / "recorder")
    return launch(config, env, "--num-gpus", str(ranks))


def alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def pids_of(folder: Path, ranks: int = 2) -> set[int]:
    """The processes of all ranks that have recorded something."""
    return {row["pid"] for rank in range(ranks) for row in recorded(folder, rank)}


def run_ranks(program: str, folder: Path, ranks: int) -> None:
    """Runs a program in so many processes with the environment of ranks, and `folder` as its argument."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = os.environ | {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", program, str(folder)]
    processes = [subprocess.Popen(command, env=common | {"RANK": str(rank)}) for rank in range(ranks)]
    assert [process.wait(timeout=120) for process in processes] == [0] * ranks
