"""Runs that are killed at a chosen call, and whether two runs are the same."""

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training.utils.train_utils import Phase

from helpers.small_runs import train_here
from sam2_lora_ext.trainer import LoRATrainer


class Killed(BaseException):
    """Ends a run as a kill would: nothing of ours catches it."""


def kill_at(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, call: int, before: bool = True) -> None:
    """Makes the `call`-th call (from 1) of `owner.name` raise `Killed`, before or after it did its work."""
    original, count = getattr(owner, name), [0]

    def killing(*args, **kwargs):
        count[0] += 1
        if count[0] == call and before:
            raise Killed
        result = original(*args, **kwargs)
        if count[0] == call:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, killing)


def assert_same_tensors(one: object, other: object) -> None:
    """Bitwise, through nested dicts and lists."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same_tensors(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_same_tensors(*pair)
    else:
        assert one == other


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, optimizer, metrics, decisions and adapters of two run folders, bitwise; times and names may differ."""
    states = [torch.load(folder / "checkpoints/checkpoint.pt", weights_only=True) for folder in (one, other)]
    for state in states:
        state.pop("time_elapsed")
        state.pop("best_meter_values")  # stock's note for `save_best_meters`, which nothing of ours reads
        state["steps"].pop("val")  # a validation that was cut off is counted, but leaves nothing
    assert_same_tensors(*states)
    for name in ("logs/metrics.csv", "validations.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    for kind in ("best", "latest", "final"):
        files = [load_file(folder / f"adapters/{kind}/adapter_model.safetensors") for folder in (one, other)]
        assert_same_tensors(*files)
    summaries = [json.loads((folder / "training_summary.json").read_text()) for folder in (one, other)]
    for key in ("steps", "phases", "best", "last", "stopped_early", "learning_rate"):
        assert summaries[0][key] == summaries[1][key]
    assert not list(one.rglob("*.tmp"))


def ends_with(code: int, env: dict[str, str], *overrides: str) -> str:
    """Trains in process until it ends the process; returns what it says."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), pytest.raises(SystemExit) as stopped:
        train_here(env, *overrides)
    assert stopped.value.code == code
    assert "Traceback" not in errors.getvalue()
    return errors.getvalue()


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action) -> None:
    """Calls `action(trainer)` once, when the gradients of training step `step` are there."""
    original, done = LoRATrainer._after_gradients, []

    def hook(self, model, rank, where):
        if self.steps[Phase.TRAIN] == step and not done:
            done.append(step)
            action(self)
        original(self, model, rank, where)

    monkeypatch.setattr(LoRATrainer, "_after_gradients", hook)
