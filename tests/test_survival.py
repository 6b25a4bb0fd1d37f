"""Signals, numbers that are not finite, a second run in the folder, a full disk: the run ends well."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_runs import environment, rank_environment, train_here, write_config
from test_resume import assert_same_run, assert_same_tensors
from training.dataset.utils import ConcatDataset, RepeatFactorWrapper
from training.utils.train_utils import Phase

from sam2_lora_ext.adapter import load_adapter
from sam2_lora_ext.errors import UserError
from sam2_lora_ext.interrupt import Interrupt
from sam2_lora_ext.run_lock import CONFIGS, check_free, lock_folder, lock_run
from sam2_lora_ext.step_guard import _names, raw_datasets
from sam2_lora_ext.trainer import LoRATrainer


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


@pytest.fixture
def env(tmp_path, nano_base, strips) -> dict[str, str]:
    return environment(nano_base, strips, tmp_path / "run")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, nano_base, strips) -> Path:
    """The run that is never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train_here(environment(nano_base, strips, folder))
    return folder


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
    with pytest.raises(KeyboardInterrupt), Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)  # as torch's spawned ranks get it after their parent's end
        assert interrupt.signum == signal.SIGINT
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


def test_skipped_steps_of_float16_are_counted(env, tmp_path, monkeypatch):
    """The scaler's own skip: weights stay, the scale halves, the run goes on, the summary tells."""
    scales = []

    def overflow(trainer) -> None:
        trainer.trained[0].grad[0] = float("inf")
        scales.append(trainer.scaler.get_scale())

    with monkeypatch.context() as patch:
        at_step(patch, 3, overflow)
        trainer = train_here(
            env, "trainer.optim.amp={enabled: true, amp_dtype: float16}", "trainer.optim.gradient_clip=null"
        )
    assert trainer.guard.skipped == 1 and trainer.scaler.get_scale() == scales[0] / 2
    assert json.loads((tmp_path / "run/training_summary.json").read_text())["skipped_steps"] == 1
    assert "float16 overflow at step 3: 1 steps skipped so far" in (tmp_path / "run/logs/log.txt").read_text()


def test_bfloat16_is_not_scaled(env, tmp_path, monkeypatch):
    """Stock's scale doubles until something overflows; without one, what is not finite is real, and ends the run."""
    amp = "trainer.optim.amp={enabled: true, amp_dtype: bfloat16}"
    scaled = {"scale": 2.0**126, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 0}
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
    """Mixed, repeated and concatenated; a number that several data sets know gets all its names."""

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


def test_a_second_run_in_the_same_folder_is_refused(env, tmp_path):
    """And the lock is free again when the first ends, however."""
    lock = lock_folder(tmp_path / "run")
    said = ends_with(2, env)
    assert f"a run is at work in {tmp_path / 'run'} (process {os.getpid()} on" in said
    assert not (tmp_path / "run/run.json").exists()
    with pytest.raises(UserError, match="a run is at work"):
        check_free(tmp_path / "run")
    lock.close()
    check_free(tmp_path / "run")
    check_free(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    child = subprocess.Popen(["python3", "-c", (
        "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); "
        "print('locked', flush=True); time.sleep(60)"
    ), str(tmp_path / "run/.lock")], stdout=subprocess.PIPE)  # fmt: skip
    assert child.stdout.readline() == b"locked\n"
    with pytest.raises(UserError, match="a run is at work"):
        lock_folder(tmp_path / "run")
    child.kill()
    child.wait()
    child.stdout.close()
    lock_folder(tmp_path / "run").close()


def test_a_refused_run_puts_the_config_files_back(tmp_path):
    """The stock launcher has replaced them before anybody could refuse it."""
    for name in ("config.yaml", "config_resolved.yaml"):
        (tmp_path / name).write_text(f"{name}: 1")
    with rank_environment({}):
        torch.distributed.init_process_group("gloo")
        lock = lock_run(tmp_path)
        for name in ("config.yaml", "config_resolved.yaml"):
            (tmp_path / name).write_text("another: 1")
        with pytest.raises(UserError, match="a run is at work"):
            lock_run(tmp_path)
        assert [(tmp_path / name).read_text() for name in CONFIGS] == ["config.yaml: 1", "config_resolved.yaml: 1"]
        lock.close()
        (tmp_path / "config.yaml").write_text("third: 1")
        lock_run(tmp_path).close()  # a resume with other settings: they hold from now on
        assert (tmp_path / ".config.yaml").read_text() == "third: 1"


def test_leftovers_of_a_kill_are_removed(env, tmp_path):
    for place in ("checkpoints", "adapters/best", "logs"):
        (tmp_path / "run" / place).mkdir(parents=True)
        (tmp_path / "run" / place / ".checkpoint.pt.123.tmp").write_bytes(b"half")
    (tmp_path / "run/mine.tmp").write_text("a user's own")
    train_here(env, "scratch.steps=2")
    assert [path.name for path in (tmp_path / "run").rglob("*.tmp")] == ["mine.tmp"]


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
    train_here(env)
    assert torch.load(small_disk / "run/checkpoints/checkpoint.pt", weights_only=True)["steps"]["train"] == 6


def test_a_read_only_disk(small_disk, nano_base, strips):
    env = environment(nano_base, strips, small_disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    said = ends_with(2, env)
    assert f"cannot use {small_disk / 'run'} as the run's folder: Read-only file system" in said


def test_a_disk_that_fills_up_while_saving(small_disk, nano_base, strips, monkeypatch):
    """In the middle of a checkpoint: the sentence, and the checkpoint before it."""
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
