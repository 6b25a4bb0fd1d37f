"""A run that is killed after its first phase, the same resumed, and what lies in a run's folder."""

import shutil
from pathlib import Path

import pytest

from helpers.kills import (  # noqa: F401
    Killed,
    assert_same_tensors,
    ends_with,
    kill_at,
)
from helpers.small_runs import environment, train_here
from sam2_lora_ext.run.lock import CONFIGS
from sam2_lora_ext.trainer import LoRATrainer

STEPS = ("scratch.steps=4", "scratch.steps_per_phase=2")


GO_ON = "trainer.resume_with_changes=true"


def launched(run: Path, words: str) -> None:
    """The steps of the stock launcher before the Trainer exists: it replaces its two files."""
    run.mkdir(parents=True, exist_ok=True)
    for name in CONFIGS:
        (run / name).write_text(f"{name}: {words}")


def records(run: Path) -> dict[str, bytes]:
    """All files of a run but its lock and what stock's loggers append to."""
    skipped = {".lock", "logs/log.txt", "logs/val_stats.json"}
    files = {file.relative_to(run).as_posix(): file for file in run.rglob("*") if file.is_file()}
    return {
        name: file.read_bytes()
        for name, file in sorted(files.items())
        if name not in skipped and not name.startswith("tensorboard/")
    }


@pytest.fixture(scope="module")
def half(tmp_path_factory, nano_base, strips) -> Path:
    """Killed after the first of two phases."""
    run = tmp_path_factory.mktemp("half") / "run"
    launched(run, "first")
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, LoRATrainer, "run_val", 1, False)
        with pytest.raises(Killed):
            train_here(environment(nano_base, strips, run), *STEPS)
    return run


@pytest.fixture(scope="module")
def whole(half, tmp_path_factory, nano_base, strips) -> Path:
    """The same, resumed and finished."""
    run = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(half, run)
    train_here(environment(nano_base, strips, run), *STEPS)
    return run
