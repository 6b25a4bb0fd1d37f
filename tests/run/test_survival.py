"""Signals and numbers that are not finite: the run ends well."""

import json
import os
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from training.dataset.utils import ConcatDataset, RepeatFactorWrapper
from training.utils.train_utils import Phase

from helpers.kills import Killed, assert_same_run, at_step, ends_with, kill_at
from helpers.small_runs import environment, train_here
from helpers.whole_runs import whole  # noqa: F401
from sam2_lora_ext.adapters.peft import load_adapter
from sam2_lora_ext.run.guard import _names, raw_datasets
from sam2_lora_ext.run.signals import TWICE, Interrupt
from sam2_lora_ext.trainer import LoRATrainer


@pytest.fixture
def env(tmp_path, nano_base, strips) -> dict[str, str]:
    return environment(nano_base, strips, tmp_path / "run")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step(number, code, env, tmp_path, whole, monkeypatch):
    """`latest` is of the finished step, checkpoint.pt of the phase before; a resume ends like the whole run."""
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda trainer: os.kill(os.getpid(), number))
        ends_with(code, env)
    assert signal.getsignal(number) is before
    assert torch.load(tmp_path / "run/checkpoints/checkpoint.pt", weights_only=True)["steps"]["train"] == 2
    assert load_adapter(tmp_path / "run/adapters/latest").metadata["step"] == 3
    assert f"{number.name}: stopped after step 3" in (tmp_path / "run/logs/log.txt").read_text()
    assert not (tmp_path / "run/training_summary.json").exists() and not (tmp_path / "run/adapters/final").exists()
    train_here(env)
    assert_same_run(tmp_path / "run", whole)


def test_handlers_of_others_stay():
    """submitit's: it ignores SIGTERM, and requeues on USR2."""

    def theirs(number, frame):
        pass

    before = signal.signal(signal.SIGTERM, theirs)
    try:
        with Interrupt() as interrupt:
            assert signal.getsignal(signal.SIGTERM) is theirs
            assert signal.getsignal(signal.SIGINT) == interrupt._remember
        assert signal.getsignal(signal.SIGTERM) is theirs
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_same_signal_again_ends_at_once_and_another_does_not():
    """Again is a second later: a rank gets a terminal's signal twice, from it and from its parent."""
    with pytest.raises(KeyboardInterrupt), Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)  # as torch's spawned ranks get it after their parent's end
        assert interrupt.signum == signal.SIGINT
        time.sleep(TWICE + 0.1)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run(what, env, tmp_path, whole, monkeypatch):
    """With step, samples and parts of the loss; the batch is kept, the checkpoint is that of the last phase."""

    def poison(trainer) -> None:
        if what == "gradient":
            trainer.trained[0].grad[0] = float("inf")
        else:
            with torch.no_grad():
                trainer.trained[0][0] = float("nan")

    with monkeypatch.context() as patch:
        at_step(patch, 3, poison)
        said = ends_with(2, env)
    step = 3 if what == "gradient" else 4
    assert (
        f"{'a gradient' if what == 'gradient' else 'the loss (train)'} is not finite at step {step} (samples: syn0007"
        in said
    )
    kept = torch.load(tmp_path / f"run/debug/step{step}_rank0.pt", weights_only=True)
    assert kept["step"] == step and all(name in said for name in kept["names"])
    assert kept["img_batch"].shape[-3:] == (3, 128, 128) and kept["masks"].dtype == torch.bool
    assert all(
        any(name.endswith(part) for name in kept["losses"])
        for part in ("loss_mask", "loss_dice", "loss_iou", "loss_class")
    )
    assert torch.load(tmp_path / "run/checkpoints/checkpoint.pt", weights_only=True)["steps"]["train"] == 2
    train_here(env)
    shutil.rmtree(tmp_path / "run/debug")
    assert_same_run(tmp_path / "run", whole)


def test_weights_that_are_not_finite_are_not_saved(env, tmp_path, whole, monkeypatch):
    """After the last step of a phase, by a step that was too large: checkpoint and adapters are of the phase before."""

    def too_large(trainer) -> None:
        trainer.optim.optimizer.param_groups[0]["lr"] = 1e38

    with monkeypatch.context() as patch:
        at_step(patch, 4, too_large)
        assert "trained weights are not finite after step 4" in ends_with(2, env)
    assert torch.load(tmp_path / "run/checkpoints/checkpoint.pt", weights_only=True)["steps"]["train"] == 2
    assert load_adapter(tmp_path / "run/adapters/latest").metadata["step"] == 2
    train_here(env)
    assert_same_run(tmp_path / "run", whole)


def test_skipped_steps_of_float16_are_counted(env, tmp_path, monkeypatch):
    """The scaler's own skip: weights stay, the scale halves, the run continues; summary and resume keep the count."""
    amp = ("trainer.optim.amp={enabled: true, amp_dtype: float16}", "trainer.optim.gradient_clip=null")
    scales = []

    def overflow(trainer) -> None:
        trainer.trained[0].grad[0] = float("inf")
        scales.append(trainer.scaler.get_scale())

    with monkeypatch.context() as patch:
        at_step(patch, 3, overflow)
        kill_at(patch, LoRATrainer, "run_val", 2, False)
        with pytest.raises(Killed):
            train_here(env, *amp)
    trainer = train_here(env, *amp)
    assert trainer.guard.skipped == 1 and trainer.scaler.get_scale() == scales[0] / 2
    assert json.loads((tmp_path / "run/training_summary.json").read_text())["skipped_steps"] == 1
    assert "float16 overflow at step 3: 1 steps skipped so far" in (tmp_path / "run/logs/log.txt").read_text()


@pytest.mark.slow
def test_bfloat16_is_not_scaled(env, tmp_path, monkeypatch):
    """Stock's scale doubles until something overflows; without one, what is not finite is real, and ends the run."""
    amp = "trainer.optim.amp={enabled: true, amp_dtype: bfloat16}"
    scaled = {"scale": 2.0**126, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}
    scaled["_growth_tracker"] = 0
    with monkeypatch.context() as patch:

        def poison(trainer) -> None:
            trainer.trained[0].grad[0] = float("nan")

        at_step(patch, 3, poison)
        assert "a gradient is not finite at step 3" in ends_with(2, env, amp)
    file = tmp_path / "run/checkpoints/checkpoint.pt"
    state = torch.load(file, weights_only=True)
    assert state["scaler"] == {}
    torch.save(state | {"scaler": scaled}, file)  # as runs of stock, and older ones of ours, have it
    trainer = train_here(env, amp)
    assert trainer.steps[Phase.TRAIN] == 6 and not trainer.scaler.is_enabled() and trainer.guard.skipped == 0
    assert all(parameter.isfinite().all() for parameter in trainer.trained)


def test_samples_inside_stocks_wrappers_have_names():
    """Mixed, repeated and concatenated; a number with an image in several data sets gets all their names."""

    class Raw:
        def __init__(self, *names):
            self.index = Index(names)

    class Index(tuple):
        def name(self, number):
            return self[number]

    class VOS(torch.utils.data.Dataset):
        def __init__(self, *names):
            self.video_dataset, self.repeat_factors = Raw(*names), torch.ones(len(names))

        def __len__(self):
            return len(self.repeat_factors)

    both = ConcatDataset([VOS("a.jpg", "b.jpg"), RepeatFactorWrapper(VOS("c.jpg")).dataset])
    mixed = SimpleNamespace(datasets=[RepeatFactorWrapper(both)])
    raws = raw_datasets(mixed)
    assert [list(raw.index) for raw in raws] == [["a.jpg", "b.jpg"], ["c.jpg"]]
    assert _names([1, 0, 1, 7], raws) == ["b.jpg", "a.jpg or c.jpg", "7"]
    assert _names([2], raw_datasets(None)) == ["2"]
