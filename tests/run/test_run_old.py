"""Run folders, checkpoints and adapters of version 0.1.0 (tests/data/run_0_1_0): they load, merge and resume."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from helpers.kills import ends_with
from helpers.small_runs import environment, train_here
from helpers.started_runs import launched, records
from sam2_lora_ext.adapters.merge import merge_files
from sam2_lora_ext.adapters.peft import load_adapter, save_adapter
from sam2_lora_ext.adapters.sources import read_adapter
from sam2_lora_ext.adapters.weights import read_weights, weights_id
from sam2_lora_ext.report.collect import read_run
from sam2_lora_ext.report.page import facts
from sam2_lora_ext.run.config import read_run_config
from sam2_lora_ext.run.state import is_finished

OLD = Path(__file__).parents[1] / "fixtures/run_0_1_0"
PLAIN = (
    "lora.rank=1",
    "lora.alpha=4",
    "trainer.export={flat_files: true}",
    "trainer.logging.tensorboard_writer=null",
    "lora.targets=[sam_mask_decoder.transformer.layers.0.self_attn.q_proj,"
    "sam_mask_decoder.transformer.layers.0.self_attn.v_proj]",
)
SCALES = {"plain": 4.0, "rslora": 2.0, "qkv_parts": 2.0}  # alpha / r, or alpha / sqrt(r)


@pytest.fixture
def place(tmp_path, monkeypatch, nano_base, strips) -> Path:
    """Where the runs were made: their paths are relative to it."""
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    (tmp_path / "nano.pt").symlink_to(nano_base)
    (tmp_path / "strips").symlink_to(strips)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def env_of(run: str) -> dict[str, str]:
    return environment(Path("nano.pt"), Path("strips"), Path(run))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [entry.getMessage() for entry in caplog.records if entry.levelno >= logging.WARNING]


@pytest.mark.parametrize("name", SCALES)
def test_checkpoints_and_adapters_load_and_merge(name, place, caplog):
    """To the same, with one warning each that names what they do not record."""
    adapter = place / name / "adapters" / ("latest" if name == "plain" else "final")
    checkpoint = place / name / "checkpoints/checkpoint.pt"
    sources = [adapter, checkpoint, *(place / name).glob("*/latest_lora_step2.torch")]
    merged = []
    for number, source in enumerate(sources):
        caplog.clear()
        result = merge_files(place / "nano.pt", source, place / f"{number}.pt")
        [line] = warnings(caplog)
        assert "is of version 0.1.0, which did not record" in line and str(source) in line
        assert not result.notes, "the base is known"
        assert {layer.scaling for layer in result.adapter.layers.values()} == {SCALES[name]}
        merged.append(torch.load(place / f"{number}.pt", weights_only=True)["model"])
    assert len(merged) == (3 if name == "plain" else 2)
    for other in merged[1:]:
        assert other.keys() == merged[0].keys() and all(torch.equal(other[key], merged[0][key]) for key in other)
    parts = {layer.parts for layer in load_adapter(adapter).layers.values()}
    assert ((True, False, True) in parts) == (name == "qkv_parts")


def test_an_old_adapter_is_completed_when_it_is_written(place, caplog):
    save_adapter(load_adapter(place / "rslora/adapters/final"), place / "new")
    caplog.clear()
    assert load_adapter(place / "new").metadata == load_adapter(place / "rslora/adapters/final").metadata
    assert not any("/new/" in line for line in warnings(caplog))
    with safe_open(place / "new/adapter_model.safetensors", "pt") as file:
        assert "digest" in json.loads(file.metadata()["sam2_lora_ext"])


def test_an_old_run_resumes_and_is_completed(place, nano_base, capsys):
    """One warning, as the base is known and data, ranks and the rest are not; the next time there is none."""
    known = json.loads((place / "plain/lora.json").read_text())["base_id"]
    assert weights_id(read_weights(nano_base)) == known, "torch draws other weights than when the runs were made"
    before = records(place / "plain")
    launched(place / "plain", "refused")
    said = ends_with(2, env_of("plain"), *PLAIN, "lora.alpha=5", "trainer.seed_value=1")
    assert "lora.alpha was 4 and is now 5" in said and "seed_value was 42 and is now 1" in said
    assert records(place / "plain") == before
    capsys.readouterr()
    launched(place / "plain", "resumed")
    train_here(env_of("plain"), *PLAIN)
    lines = {line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING")}
    [line] = [line for line in lines if "0.1.0" in line]
    assert "did not record the number of ranks, the content of trainer.data.train" in line
    assert "they cannot be compared; a resume records them" in line
    assert "training clicks continue with other random numbers" in line
    record = read_run_config(place / "plain")
    assert record["ranks"] == 1 and record["base"]["id"] == known and all(record["data"].values())
    assert is_finished(place / "plain") and len(json.loads((place / "plain/validations.json").read_text())) == 3
    assert read_adapter(place / "plain/checkpoints/checkpoint.pt").metadata["base_id"] == known
    train_here(env_of("plain"), *PLAIN)
    assert "0.1.0" not in capsys.readouterr().out


def test_a_finished_old_run_stays_as_it_is(place):
    before = records(place / "rslora")
    rslora = (*PLAIN[3:], "lora.rank=4", "lora.alpha=4", "lora.rslora=true", "scratch.steps=4")
    train_here(env_of("rslora"), *rslora)
    assert records(place / "rslora") == before
    said = ends_with(2, env_of("rslora"), *rslora, "lora.rslora=false")  # no copy of its config, but lora.json
    assert "lora.rslora was True and is now False" in said and records(place / "rslora") == before
    assert "finished" in facts([read_run(place / "rslora")])


def test_half_an_old_export_is_no_adapter(place):
    """Version 0.1.0 wrote the config first: a kill before the weights of a first export left it alone."""
    import export_adapter

    run = place / "qkv_parts"
    (run / "adapters/best").mkdir()
    shutil.copy(run / "adapters/final/adapter_config.json", run / "adapters/best")
    assert read_adapter(run).metadata["kind"] == "final"
    with pytest.raises(ValueError, match="best/adapter_model.safetensors"):
        read_adapter(run / "adapters/best")
    export_adapter.main([str(run), str(place / "out")])
    assert load_adapter(place / "out").layers.keys() == read_adapter(run).layers.keys()
