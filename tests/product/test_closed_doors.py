"""Nothing that a run folder, an adapter or a checkpoint names is ever called, by tools or by a training."""

import json
import re
from pathlib import Path

import export_adapter
import merge_lora
import pytest
import report
import torch
from safetensors.torch import load_file, save_file

from helpers.hostile_files import Evil
from helpers.kills import ends_with
from helpers.small_runs import environment, train_here


@pytest.fixture(scope="module")
def run(tmp_path_factory, nano_base, strips) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("good") / "run"
    train_here(environment(nano_base, strips, folder), "scratch.steps=2")
    return folder


def poison(run: Path, trace: Path) -> None:
    """Every note of the run names a `_target_`, or a config that has one, which would leave a trace."""
    target = {"_target_": "os.system", "command": f"touch '{trace}'"}
    evil = trace.with_name("evil.yaml")
    evil.write_text(json.dumps({"model": target}))
    for name in ("config.yaml", "config_resolved.yaml"):
        (run / name).write_text(json.dumps({"trainer": target, "launcher": target | {"experiment_log_dir": "x"}}))
    for name in ("lora.json", "training_summary.json"):
        notes = json.loads((run / name).read_text())
        (run / name).write_text(json.dumps({**notes, **target, "model_config": str(evil)}))
    for folder in run.glob("adapters/*"):
        weights = folder / "adapter_model.safetensors"
        facts = {"model_config": str(evil), "fused": {}, "base_path": str(trace.with_name("evil.pt")), **target}
        save_file(load_file(weights), weights, metadata={"format": "pt", "sam2_lora_ext": json.dumps(facts)})


def test_tools_call_nothing_that_a_run_names(run, nano_base, tmp_path, capsys):
    """Merging, exporting, the report and the model of an evaluation come out as without it."""
    from sam2_lora_ext.evaluate.models import build, candidate

    merge_lora.main(["--base", str(nano_base), "--adapter", str(run), "--out", str(tmp_path / "good.safetensors")])
    poison(run, tmp_path / "trace")
    merge_lora.main(["--base", str(nano_base), "--adapter", str(run), "--out", str(tmp_path / "out.safetensors")])
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "good.safetensors").read_bytes()
    export_adapter.main([str(run), str(tmp_path / "exported")])
    report.main([str(run), "--out", str(tmp_path / "report.html")])
    _, facts = build(candidate(str(run), nano_base))
    assert facts["config"] == "configs/sam2_nano.yaml"  # told from the weights
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("what", ["base", "checkpoint"])
def test_a_training_refuses_weights_that_run_code(what, tmp_path, nano_base, strips):
    """One sentence, before SAM 2's own loading."""
    env = environment(nano_base, strips, tmp_path / "run")
    file = tmp_path / "evil.pt" if what == "base" else tmp_path / "run/checkpoints/checkpoint.pt"
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": {"a": torch.ones(1)}, "note": Evil(tmp_path / "trace")}, file)
    said = ends_with(2, env | ({"SAM2_LORA_NANO": str(file)} if what == "base" else {}))
    assert f"{file} holds Python objects, which run code" in said
    assert not (tmp_path / "trace").exists()


def test_no_load_of_ours_may_run_code(repository):
    """Every `torch.load`, `pickle` and `numpy.load` in the sources is the safe kind."""
    for path in [*(repository / "sam2_lora_ext").rglob("*.py"), *(repository / "tools").glob("*.py")]:
        text = path.read_text()
        assert not re.search(r"^\s*(import|from) (pickle|dill|joblib|shelve|marshal)\b", text, re.MULTILINE), path
        for call in re.findall(r"torch\.load\((.*?)\)\n", text, re.DOTALL):
            assert "weights_only=True" in call, path
        assert (
            "allow_pickle=True" not in text and "yaml.load(" not in text and "eval(" not in text.replace(".eval(", "")
        ), path
