"""Starts of a run on the real Trainer: refused, finished or extended, and what they leave of its records."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from helpers.kills import (
    Killed,
    assert_same_tensors,
    ends_with,
    kill_at,
)
from helpers.small_runs import environment, launch, make_base, train_here, write_config
from helpers.started_runs import GO_ON, STEPS, half, launched, records, whole  # noqa: F401
from sam2_lora_ext.ablation.grid import Member, collect
from sam2_lora_ext.adapters.sources import read_adapter
from sam2_lora_ext.report.collect import read_run
from sam2_lora_ext.report.page import facts
from sam2_lora_ext.run.config import NAME, OLD_NAME, read_run_config
from sam2_lora_ext.run.state import is_finished
from sam2_lora_ext.trainer import LoRATrainer


@pytest.fixture
def copy(half, tmp_path) -> Path:
    """A copy of `half`."""
    return Path(shutil.copytree(half, tmp_path / "run"))


CHANGES = {
    "lora.alpha=4": ["model.lora.alpha was 16 and is now 4"],
    "lora.rank=4": ["model.lora.rank was 8 and is now 4"],
    "lora.rslora=true": ["model.lora.rslora was False and is now True"],
    "scratch.lr=0.1": ["end_value was 0.003 and is now 0.1"],
    "scratch.crop_width=128": ["transforms[0].width was 256 and is now 128", "group_width was 256"],
    "scratch.steps_per_phase=1": ["trainer.data.train.steps_per_phase was 2 and is now 1"],
    "trainer.data.train.batch_sizes=[1]": ["trainer.data.train.batch_sizes was [2] and is now [1]"],
    "trainer.data.val.datasets.0.video_dataset.split=train": ["split was val and is now train", "the content of"],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_refused_and_nothing_is_touched(change, copy, nano_base, strips):
    before = records(copy)
    launched(copy, "other")
    said = ends_with(2, environment(nano_base, strips, copy), *STEPS, change, "trainer.seed_value=1")
    assert f"error: the run in {copy} has other settings: " in said
    assert "trainer.seed_value was 42 and is now 1" in said and "trainer.resume_with_changes=true" in said
    assert all(words in said for words in CHANGES[change])
    assert records(copy) == before


def test_data_is_known_by_content(copy, nano_base, strips, tmp_path):
    """The same data elsewhere passes; other masks under the same path do not, nor do other chosen images."""
    moved = Path(shutil.copytree(strips, tmp_path / "moved"))
    table, split = (moved / "train.csv").read_text(), (moved / "split.csv").read_text()
    env = environment(nano_base, moved, copy)
    row = next(line for line in table.splitlines()[1:] if not line.endswith(","))
    (moved / "train.csv").write_text(table.replace(f"{row}\n", ""))
    assert "the content of trainer.data." in ends_with(2, env, *STEPS)
    (moved / "train.csv").write_text(table)
    (moved / "split.csv").write_text(split.replace(",train\n", ",val\n", 1))
    said = ends_with(2, env, *STEPS)
    assert "the content of trainer.data.train" in said and "the content of trainer.data.val" in said
    (moved / "split.csv").write_text(split)
    train_here(
        env,
        *STEPS,
        "scratch.num_workers=0",
        "trainer.metrics_every=2",
        "trainer.keep_previous=1",
        "lora.implementation=plain",
        "trainer.model.activations=stock",
    )
    assert is_finished(copy) and read_run_config(copy)["changes"] == []


def test_changes_on_request_are_recorded_and_hold(copy, nano_base, strips, capsys):
    """They are printed, take effect although the checkpoint brings the optimizer's own, and are compared next time."""
    env = environment(nano_base, strips, copy)
    changed = ("lora.alpha=4", "+trainer.optim.optimizer.betas=[0.5,0.6]")
    launched(copy, "changed")
    trainer = train_here(env, *STEPS, *changed, GO_ON)
    assert trainer.optim.optimizer.param_groups[0]["betas"] == (0.5, 0.6)
    assert "from step 2 on: trainer.model.lora.alpha was 16 and is now 4" in capsys.readouterr().out
    record = read_run_config(copy)
    assert {(entry["step"], entry["key"]) for entry in record["changes"]} == {
        (2, "trainer.model.lora.alpha"),
        (2, "trainer.optim.optimizer.betas"),
    }
    assert [(e["before"], e["after"]) for e in record["changes"] if e["key"].endswith("alpha")] == [(16, 4)]
    assert record["trainer"]["model"]["lora"]["alpha"] == 4 and (copy / "config.yaml").read_text().endswith("changed")
    assert {layer.alpha for layer in read_adapter(copy / "adapters/final").layers.values()} == {4}
    assert "lora.alpha was 4 and is now 16" in ends_with(2, env, *STEPS)
    train_here(env, *STEPS, *changed)
    assert read_run_config(copy) == record


def test_a_finished_run_started_again_changes_nothing(whole, nano_base, strips, capsys):
    """Nor does one that only validates; the launcher's files are put back."""
    before = records(whole)
    assert {"run_config.yaml", "training_summary.json", "config.yaml", ".config.yaml"} <= set(before)
    for more in ([], ["trainer.mode=val"], ["trainer.metrics_every=3", "trainer.logging.log_freq=1"]):
        launched(whole, "again")
        train_here(environment(nano_base, strips, whole), *STEPS, *more)
        assert records(whole) == before
    assert "is finished: nothing is trained" in capsys.readouterr().out


def test_every_refusal_puts_the_launchers_files_back(whole, nano_base, strips, tmp_path):
    """Another base, a damaged checkpoint, a locked run, no GPU, a damaged table."""
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    env = environment(nano_base, strips, run)
    other = make_base(tmp_path / "other.pt", seed=1)
    good = (run / "checkpoints/checkpoint.pt").read_bytes()

    def refused(words: str, *overrides: str, **more: str) -> None:
        before = records(run)
        launched(run, "refused")
        assert words in ends_with(2, env | more, *STEPS, *overrides)
        assert records(run) == before

    refused(f"the base was {nano_base} (sha256 ", SAM2_LORA_NANO=str(other))
    refused("no GPU is visible", "trainer.accelerator=cuda")
    (run / "checkpoints/checkpoint.pt").write_bytes(good[:-2000])
    refused("cannot resume: ")
    (run / "checkpoints/checkpoint.pt").write_bytes(good)
    (run / "validations.json").write_text("{")
    refused("validations.json is damaged")


def test_a_run_that_is_extended_is_not_finished(whole, nano_base, strips, tmp_path, monkeypatch):
    """Report and ablation say so until it is; a kill in between changes nothing about that."""
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    env, longer = environment(nano_base, strips, run), ("scratch.steps=8", "scratch.steps_per_phase=2")

    def state() -> tuple[str, str]:
        [row] = collect([Member({"a": "1"}, run)], {})
        return row["status"], facts([read_run(run)])

    assert state()[0] == "finished" and "not finished" not in state()[1]
    with monkeypatch.context() as patch:
        kill_at(patch, LoRATrainer, "run_val", 1, False)
        with pytest.raises(Killed):
            train_here(env, *longer, GO_ON)
    status, page = state()
    assert status == "unfinished" and "not finished: extended after its end at step 4" in page
    assert json.loads((run / "training_summary.previous.json").read_text())["steps"] == 4
    train_here(env, *longer)
    assert state()[0] == "finished" and json.loads((run / "training_summary.json").read_text())["steps"] == 8


def test_an_old_summary_does_not_say_finished(whole, tmp_path):
    """Version 0.1.0 left it there while a run was extended."""
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    entries = json.loads((run / "validations.json").read_text())
    (run / "validations.json").write_text(json.dumps([*entries, entries[-1] | {"step": 6, "epoch": 2}]))
    assert not is_finished(run) and read_run(run).summary == {} and read_run(run).extended == 4


def test_a_checkpoint_knows_what_it_is(whole, nano_base, tmp_path):
    """Alone, elsewhere, it is the adapter that its run would export; and so are the flat files."""
    path = Path(shutil.copy(whole / "checkpoints/checkpoint.pt", tmp_path))
    alone, beside = read_adapter(path), read_adapter(whole / "adapters/latest")
    assert alone.layers.keys() == beside.layers.keys() and alone.metadata["base_id"] == beside.metadata["base_id"]
    for name, layer in alone.layers.items():
        assert (layer.alpha, layer.rslora, layer.parts) == tuple(
            getattr(beside.layers[name], field) for field in ("alpha", "rslora", "parts")
        )
        assert torch.equal(layer.delta_weight(), beside.layers[name].delta_weight())
    (tmp_path / "lora.json").write_text('{"config": {"alpha": 400}}')  # a stranger's: nobody needs it
    assert_same_tensors(read_adapter(path).full, alone.full)
    assert {layer.alpha for layer in read_adapter(path).layers.values()} == {16}
    with pytest.raises(ValueError, match="records its alpha"):
        read_adapter(path, alpha=4)


@pytest.mark.slow
def test_a_checkpoint_of_another_run_is_compared_too(whole, nano_base, strips, tmp_path):
    """`resume_from` has no record to compare with, but the checkpoint has its LoRA config."""
    env = environment(nano_base, strips, tmp_path / "new")
    other = f"trainer.checkpoint.resume_from={whole}/checkpoints/checkpoint.pt"
    assert "lora.alpha was 16 and is now 4" in ends_with(2, env, "scratch.steps=6", "lora.alpha=4", f"+{other}")
    shutil.rmtree(tmp_path / "new")
    train_here(env, "scratch.steps=6", "scratch.lr=0.001", f"+{other}")
    assert is_finished(tmp_path / "new")


def test_a_record_that_was_lost_is_missed(copy, nano_base, strips, capsys):
    for name in (NAME, f".{OLD_NAME}"):
        (copy / name).unlink()
    train_here(environment(nano_base, strips, copy), *STEPS)
    assert f"{NAME} is missing or lacks the number of ranks, " in capsys.readouterr().out and is_finished(copy)


def test_all_ranks_refuse_together(copy, nano_base, strips, tmp_path):
    """One rank more: both end with the sentence, at once, and the launcher's own files are what they were."""
    before = records(copy)
    process = launch(write_config(tmp_path / "config", STEPS), environment(nano_base, strips, copy), "--num-gpus", "2")
    said = process.communicate(timeout=120)[0]
    assert "error: the run in" in said and "the number of ranks was 1 and is now 2" in said
    assert "error: rank 1: the run in" in said
    assert process.returncode == 2 or process.returncode == 1 and "ProcessExitedException" in said
    assert records(copy) == before


def test_the_launchers_flag(capsys, monkeypatch):
    from sam2_lora_ext.train import main

    monkeypatch.setenv("SAM2_LORA_CONFIG_DIR", "")
    assert main(["-c", "demo", "--resume-with-changes", "--print-config"]) == 0
    assert "resume_with_changes: true" in capsys.readouterr().out
