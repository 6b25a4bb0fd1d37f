"""The JSON record of a merged file: hashes as sha256sum gives them, never overwritten by accident."""

import hashlib
import importlib.metadata
import json
import shlex
from pathlib import Path

import pytest
import torch

from helpers.stock_models import NANO, build, train_a_little
from sam2_lora_ext.adapters.peft import Adapter, save_adapter
from sam2_lora_ext.adapters.record import with_proof
from sam2_lora_ext.adapters.weights import weights_id, write_weights
from sam2_lora_ext.lora import LoRAConfig, build_lora_model
from sam2_lora_ext.utils.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base.pt`, the adapter folder `a`, and a run with a checkpoint."""
    folder = tmp_path_factory.mktemp("record")
    model = build(NANO)
    write_weights(folder / "base.pt", model.state_dict())
    facts = {"base_id": weights_id(model.state_dict()), "base_path": "base.pt", "model_config": NANO}
    build_lora_model(model, {"rank": 2})
    train_a_little(model)
    save_adapter(Adapter.from_model(model, facts), folder / "a")
    (folder / "run" / "checkpoints").mkdir(parents=True)
    state = {key: value for key, value in model.state_dict().items() if ".lora_" in key}
    torch.save({"model": state}, folder / "run" / "checkpoints" / "checkpoint.pt")
    (folder / "run" / "lora.json").write_text(json.dumps({"config": LoRAConfig(rank=2).to_dict(), **facts}))
    return folder


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "source, files",
    [
        ("a", ["a/adapter_config.json", "a/adapter_model.safetensors"]),
        ("run/checkpoints/checkpoint.pt", ["run/checkpoints/checkpoint.pt", "run/lora.json"]),
    ],
)
def test_what_went_in_and_what_came_out(folder, tmp_path, monkeypatch, repository, capsys, source, files):
    monkeypatch.syspath_prepend(repository / "tools")
    import merge_lora

    out = tmp_path / "a file.pt"
    command = ["--base", str(folder / "base.pt"), "--adapter", str(folder / source), "--out", str(out)]
    merge_lora.main(command)
    base_id = weights_id(build(NANO).state_dict())
    assert f"record   {out}.json: sha256 {sha(out)[:12]} from base {base_id[:12]}" in capsys.readouterr().out
    record = json.loads((tmp_path / "a file.pt.json").read_text())
    assert shlex.split(record["command"])[1:] == command
    assert record["base"] == {
        "path": str(folder / "base.pt"),
        "bytes": (folder / "base.pt").stat().st_size,
        "weights_id": base_id,
        "model": NANO,
    }
    assert [entry["path"] for entry in record["adapters"]] == [str(folder / source)]
    assert record["adapters"][0]["files"] == {Path(name).name: sha(folder / name) for name in files}
    assert record["adapters"][0]["base_id"] == record["base"]["weights_id"]
    assert record["result"]["sha256"] == sha(out) and record["result"]["bytes"] == out.stat().st_size
    assert record["versions"]["torch"] == importlib.metadata.version("torch") and "verify" not in record

    for path in (out, Path(f"{out}.json")):
        kept = path.read_bytes()
        other = Path(f"{out}.json") if path == out else out
        other.rename(tmp_path / "aside")
        with pytest.raises(UserError, match=f"{path.name} exists already: .* give --force"):
            merge_lora.main(command)
        assert path.read_bytes() == kept and not other.exists()
        (tmp_path / "aside").rename(other)
    merge_lora.main([*command, "--force"])


def test_numbers_that_json_has_not():
    record = with_proof({"a": 1}, "c", {"x": float("nan"), "y": 2.0})
    assert record == {"a": 1, "verify": {"config": "c", "x": None, "y": 2.0}}
