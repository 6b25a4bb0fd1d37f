"""A run that was stopped anywhere and resumed gives exactly the results of an uninterrupted run."""

import shutil
from pathlib import Path

import pytest
import torch

import sam2_lora_ext.run.checkpoint as checkpoint_files
from helpers.kills import Killed, assert_same_run, assert_same_tensors, kill_at  # noqa: F401
from helpers.small_runs import environment, make_base, train_here
from sam2_lora_ext.run.folder import RunFolder
from sam2_lora_ext.run.guard import StepGuard
from sam2_lora_ext.trainer import LoRATrainer

RANDOM = ("lora.dropout=0.1", "scratch.clean_share=0.4")  # beside crops, flips, colours, clicks and boxes


@pytest.fixture(scope="module")
def whole(tmp_path_factory, nano_base, strips) -> Path:
    """Three phases of two steps without a stop."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train_here(environment(nano_base, strips, folder), *RANDOM)
    return folder


POINTS = {  # where: (owner, method, which call, before or after it)
    "after the first phase": (LoRATrainer, "run_val", 1, False),
    "after the second phase": (LoRATrainer, "run_val", 2, False),
    "between checkpoint and validation": (LoRATrainer, "run_val", 2, True),
    "in the middle of the second phase": (StepGuard, "check_gradients", 4, True),
    "before the first checkpoint": (checkpoint_files.os, "replace", 4, True),
    "between latest adapter and checkpoint": (LoRATrainer, "save_checkpoint", 2, True),
    "between best adapter and the record of its validation": (RunFolder, "write_validations", 1, True),
    "after the record of the last validation": (RunFolder, "write_validations", 3, False),
}


MORE = (
    "after the second phase",
    "between best adapter and the record of its validation",
    "before the first checkpoint",
)


@pytest.mark.parametrize("point", [pytest.param(name, marks=[pytest.mark.slow] * (name in MORE)) for name in POINTS])
def test_a_stopped_run_resumes_exactly(point, whole, tmp_path, nano_base, strips, monkeypatch):
    owner, name, call, before = POINTS[point]
    env = environment(nano_base, strips, tmp_path / "run")
    with monkeypatch.context() as patch:
        kill_at(patch, owner, name, call, before)
        with pytest.raises(Killed):
            train_here(env, *RANDOM)
    train_here(env, *RANDOM)
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.slow
def test_early_stopping_counts_on(tmp_path, nano_base, strips, monkeypatch):
    """Two validations without improvement, one before the stop and one after the resume."""
    setting = ("trainer.early_stop={patience: 2, min_delta: 2.0}", "scratch.steps=20")
    train_here(environment(nano_base, strips, tmp_path / "whole"), *setting)
    with monkeypatch.context() as patch:
        kill_at(patch, LoRATrainer, "run_val", 2, False)
        with pytest.raises(Killed):
            train_here(environment(nano_base, strips, tmp_path / "run"), *setting)
    trainer = train_here(environment(nano_base, strips, tmp_path / "run"), *setting)
    assert [entry["step"] for entry in trainer.history.entries] == [2, 4, 6]
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_runs_of_one_seed_are_equal_and_of_another_are_not(whole, tmp_path, nano_base, strips):
    train_here(environment(nano_base, strips, tmp_path / "same"), *RANDOM)
    assert_same_run(tmp_path / "same", whole)
    train_here(environment(nano_base, strips, tmp_path / "other"), *RANDOM, "trainer.seed_value=43", "scratch.steps=2")
    assert (tmp_path / "other/logs/metrics.csv").read_text().splitlines()[1] not in (
        whole / "logs/metrics.csv"
    ).read_text()


def test_a_damaged_checkpoint_is_named(whole, tmp_path, nano_base, strips, monkeypatch, capsys):
    """With `keep_previous` the previous one is used, and the run still ends the same."""
    env = environment(nano_base, strips, tmp_path / "run")
    with monkeypatch.context() as patch:
        kill_at(patch, LoRATrainer, "run_val", 2, False)
        with pytest.raises(Killed):
            train_here(env, *RANDOM, "trainer.keep_previous=1")
    path = tmp_path / "run/checkpoints/checkpoint.pt"
    previous = path.with_name("checkpoint.previous.pt")
    assert torch.load(previous, weights_only=True)["epoch"] == 1 and torch.load(path, weights_only=True)["epoch"] == 2
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    kept = previous.read_bytes()
    previous.unlink()
    with pytest.raises(SystemExit, match="2"):
        train_here(env, *RANDOM)
    said = capsys.readouterr().err
    assert f"cannot resume: {path} is damaged" in said and "Traceback" not in said
    assert path.read_bytes() == good[: len(good) // 2]
    previous.write_bytes(kept)
    train_here(env, *RANDOM, "trainer.keep_previous=1")
    assert_same_run(tmp_path / "run", whole)
    assert "the previous checkpoint" in (tmp_path / "run/logs/log.txt").read_text()


def _zeroed(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[: middle - 2000] + bytes(4000) + data[middle + 2000 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:100],
        _zeroed,
        lambda data: bytes(len(data)),
        lambda data: b"PK\x03\x04" + data[50:],
        lambda data: b"hello",
    ],
)
def test_each_kind_of_damage_is_found(damage, whole, tmp_path):
    good = whole / "checkpoints/checkpoint.pt"
    state = torch.load(good, weights_only=True)["model"]
    checkpoint_files.check_checkpoint(good, state)
    (tmp_path / "checkpoint.pt").write_bytes(damage(good.read_bytes()))
    with pytest.raises(checkpoint_files.UserError, match="cannot resume: .*checkpoint.pt (is|holds) .*delete it"):
        checkpoint_files.prepare_resume(tmp_path, state)


def test_a_foreign_checkpoint_is_refused(whole, tmp_path):
    good = torch.load(whole / "checkpoints/checkpoint.pt", weights_only=True)
    torch.save({"model": good["model"]}, tmp_path / "checkpoint.pt")
    with pytest.raises(checkpoint_files.UserError, match="is not a checkpoint of SAM 2's Trainer"):
        checkpoint_files.prepare_resume(tmp_path, good["model"])
    torch.save(good, tmp_path / "checkpoint.pt")
    other = {key.replace("q_proj", "r_proj"): value for key, value in good["model"].items()}
    with pytest.raises(checkpoint_files.UserError, match="another model or LoRA config: .*q_proj"):
        checkpoint_files.prepare_resume(tmp_path, other)
    other = {key: value[:1] for key, value in good["model"].items()}
    with pytest.raises(checkpoint_files.UserError, match="another model or LoRA config"):
        checkpoint_files.prepare_resume(tmp_path, other)


def test_another_base_than_at_the_start_is_refused(whole, nano_base, tmp_path, strips, capsys):
    """The adapters belong to the weights that they were trained on."""
    shutil.copytree(whole, tmp_path / "run")
    other = make_base(tmp_path / "other.pt", seed=1)
    with pytest.raises(SystemExit, match="2"):
        train_here(environment(other, strips, tmp_path / "run"), *RANDOM)
    said = capsys.readouterr().err
    assert f"the run in {tmp_path / 'run'} has other settings: the base was {nano_base} (sha256 " in said
    assert f"and is now {other} (sha256 " in said
