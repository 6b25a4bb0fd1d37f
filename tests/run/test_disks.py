"""A full or read-only disk, damage by a kill, a folder in use: one sentence, nothing lost."""

import contextlib
import os
import subprocess

import pytest
import torch

from helpers.kills import (
    assert_same_tensors,
    ends_with,
)
from helpers.small_runs import environment, train_here, write_config
from sam2_lora_ext.adapters.peft import load_adapter
from sam2_lora_ext.run.lock import check_free, lock_folder
from sam2_lora_ext.trainer import LoRATrainer
from sam2_lora_ext.utils.errors import UserError


@pytest.fixture
def env(tmp_path, nano_base, strips) -> dict[str, str]:
    return environment(nano_base, strips, tmp_path / "run")


def test_a_second_run_in_the_same_folder_is_refused(env, tmp_path):
    """And the lock is free again when the first ends, however."""
    lock = lock_folder(tmp_path / "run")
    said = ends_with(2, env)
    assert f"a run is active in {tmp_path / 'run'} (process {os.getpid()} on" in said
    assert not (tmp_path / "run/run.json").exists()
    with pytest.raises(UserError, match="a run is active"):
        check_free(tmp_path / "run")
    lock.close()
    check_free(tmp_path / "run")
    check_free(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    child = subprocess.Popen(
        [
            "python3",
            "-c",
            (
                "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); "
                "print('locked', flush=True); time.sleep(60)"
            ),
            str(tmp_path / "run/.lock"),
        ],
        stdout=subprocess.PIPE,
    )
    assert child.stdout.readline() == b"locked\n"
    with pytest.raises(UserError, match="a run is active"):
        lock_folder(tmp_path / "run")
    child.kill()
    child.wait()
    child.stdout.close()
    lock_folder(tmp_path / "run").close()


def test_leftovers_of_a_kill_are_removed(env, tmp_path):
    """Only files with our names in our folders; files of users or other tools are kept."""
    run = tmp_path / "run"
    ours = [
        "checkpoints/.checkpoint.pt.123.tmp",
        "checkpoints/.checkpoint.previous.pt.123.tmp",
        ".lora.json.7.tmp",
        "logs/.metrics.csv.9.tmp",
        "adapters/.best.5.tmp/adapter_config.json",
        "..config.yaml.3.tmp",
        "adapters/best/.adapter_model.safetensors.123.tmp",
        "sam2_nano_lora/.best_lora_step2_iou0.1_dice0.2.torch.4.tmp",
    ]
    others = [
        "mine.tmp",
        ".mine.tmp",
        ".notes.txt.123.tmp",
        "logs/.checkpoint.pt.123.tmp",
        "mine/.lora.json.7.tmp",
        "evaluation/.evaluation.json.5.tmp",
        ".report.html.5.tmp",
        "adapters/.mine.5.tmp/file",
    ]
    for name in (*ours, *others):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(b"half")
    train_here(env, "scratch.steps=2")
    assert [name for name in ours if (run / name).exists()] == []
    assert [name for name in others if not (run / name).exists()] == []
    assert not (run / "adapters/.best.5.tmp").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of eight megabytes."""
    folder = tmp_path / "small disk"
    folder.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True).returncode
    ):
        if os.environ.get("CI", "").lower() in ("1", "true"):
            pytest.fail("CI must be allowed to mount a tmpfs", pytrace=False)
        pytest.skip("mounting a tmpfs is not allowed here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk(small_disk, nano_base, strips, tmp_path, run_python):
    """One sentence, and what was there before is whole; with room again the run goes on."""
    env = environment(nano_base, strips, small_disk / "run")
    train_here(env, "scratch.steps=2", "scratch.steps_per_phase=2")
    good = torch.load(small_disk / "run/checkpoints/checkpoint.pt", weights_only=True)
    adapter = load_adapter(small_disk / "run/adapters/latest")
    filler = small_disk / "filler"
    with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 12))
    command = ["-m", "sam2_lora_ext.train", "-c", write_config(tmp_path / "config")]
    done = run_python(command, env=env | {"TMPDIR": str(tmp_path)})
    output = done.stderr
    assert done.returncode == 2 and "Traceback" not in output and output.count("error: ") == 1, output
    filler.unlink()
    assert_same_tensors(torch.load(small_disk / "run/checkpoints/checkpoint.pt", weights_only=True), good)
    now = load_adapter(small_disk / "run/adapters/latest")
    assert all(torch.equal(layer.lora_b, now.layers[name].lora_b) for name, layer in adapter.layers.items())
    assert "No space left on device" in output
    train_here(env, "trainer.resume_with_changes=true")
    assert torch.load(small_disk / "run/checkpoints/checkpoint.pt", weights_only=True)["steps"]["train"] == 6


def test_a_read_only_disk(small_disk, nano_base, strips):
    env = environment(nano_base, strips, small_disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    said = ends_with(2, env)
    assert f"cannot use {small_disk / 'run'} as the run's folder: Read-only file system" in said


def test_a_disk_that_fills_up_while_saving(small_disk, nano_base, strips, monkeypatch):
    """While writing a checkpoint: the sentence, and the previous checkpoint remains."""
    env = environment(nano_base, strips, small_disk / "run")
    original, filler = LoRATrainer.save_checkpoint, small_disk / "filler"

    def filling(self, epoch, *args):
        if epoch == 2:
            with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(1 << 12))
        original(self, epoch, *args)

    with monkeypatch.context() as patch:
        patch.setattr(LoRATrainer, "save_checkpoint", filling)
        said = ends_with(2, env)
    assert "error: cannot write" in said and "checkpoint.pt" in said
    filler.unlink()
    assert torch.load(small_disk / "run/checkpoints/checkpoint.pt", weights_only=True)["epoch"] == 1
    assert not list((small_disk / "run").rglob(".*.tmp"))
    train_here(env)
