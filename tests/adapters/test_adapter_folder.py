"""An adapter folder is one unit: replaced atomically, bound by its digest, and never read in part."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import export_adapter
import pytest
import torch
from safetensors.torch import load_file, save_file

from sam2_lora_ext.adapters.folder import digest_of
from sam2_lora_ext.adapters.peft import Adapter, LayerAdapter, load_adapter, save_adapter
from sam2_lora_ext.adapters.sources import find_adapter, read_adapter, source_files
from sam2_lora_ext.run.cleaning import clean_up
from sam2_lora_ext.utils.errors import UserError

NAMES = [f"a.{number}.qkv" for number in range(6)]


def make(number: int, alpha: float = 8, rank: int = 4) -> Adapter:
    """An adapter whose tensors all hold `number`; its alpha is `alpha` plus that."""
    layers = {
        name: LayerAdapter(
            torch.full((2 * rank, 12), float(number)),
            torch.full((24, rank), float(number)),
            alpha + number,
            False,
            (True, False, True),
        )
        for name in NAMES
    }
    return Adapter(layers, metadata={"base_id": "b" * 64, "kind": "best", "step": number})


def is_whole(adapter: Adapter) -> bool:
    """Whether all of it is of one `make`."""
    number = adapter.metadata["step"]
    return all(
        layer.alpha == 8 + number and (layer.lora_a == number).all() and (layer.lora_b == number).all()
        for layer in adapter.layers.values()
    )


@pytest.fixture
def folder(tmp_path) -> Path:
    save_adapter(make(1), tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder: Path, **changes: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    "changes",
    [{"lora_alpha": 400}, {"use_rslora": True}, {"alpha_pattern": {"a\\.1\\.qkv": 3}}, {"modules_to_save": ["head"]}],
    ids=str,
)
def test_a_config_that_was_changed_is_not_the_adapters(folder, changes):
    edit(folder, **changes)
    with pytest.raises(UserError, match="do not belong together|its header does not fit"):
        load_adapter(folder)


def test_weights_and_config_of_two_adapters(folder, tmp_path):
    """Equal shapes and settings except for alpha: without the digest the mixture would be silently wrong."""
    save_adapter(make(1, alpha=20), tmp_path / "other")
    for adapter in (folder, tmp_path / "other"):  # plain layers, whose header says nothing of alpha
        loaded = load_adapter(adapter)
        for layer in loaded.layers.values():
            layer.lora_b, layer.parts = layer.lora_b[:12].repeat(3, 1), (True,)
            layer.lora_a = layer.lora_a[:4]
        save_adapter(loaded, adapter)
    shutil.copy(folder / "adapter_model.safetensors", tmp_path / "other")
    with pytest.raises(
        UserError, match="other/adapter_model.* and the adapter_config.json in its folder do not belong"
    ):
        load_adapter(tmp_path / "other")


def test_a_tensor_that_was_changed(folder):
    file = folder / "adapter_model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1  # of a float's exponent or sign: no checksum of safetensors' own would tell
    file.write_bytes(raw)
    with pytest.raises(UserError, match="do not belong together"):
        load_adapter(folder)


def test_what_does_not_change_the_result_may_change(folder):
    edit(folder, lora_dropout=0.5, inference_mode=False, peft_version="9", target_modules=["qkv"])
    assert is_whole(load_adapter(folder)) and "digest" not in load_adapter(folder).metadata


def test_peft_has_no_header_and_loads(folder):
    """PEFT's `save_pretrained` drops our header; an adapter of several parts then has a larger rank."""
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt"})
    edit(folder, lora_alpha=400)
    assert {layer.alpha for layer in load_adapter(folder).layers.values()} == {400}


def test_the_digest_is_of_values_types_and_names():
    one = {"a": torch.ones(2, 3), "b": torch.zeros(2, dtype=torch.bfloat16)}
    same = digest_of(one, {"r": 1}, {})
    assert same == digest_of(dict(reversed(one.items())), {"r": 1, "lora_dropout": 3}, {"step": 3})
    assert same == digest_of({**one, "a": torch.ones(3, 2).T}, {"r": 1}, {})
    others = [
        ({**one, "a": torch.ones(3, 2)}, {"r": 1}, {}),
        ({**one, "a": torch.ones(2, 3).half()}, {"r": 1}, {}),
        ({"c": one["a"], "b": one["b"]}, {"r": 1}, {}),
        (one, {"r": 2}, {}),
        (one, {"r": 1}, {"base_id": "x"}),
        (one, {"r": 1}, {"fused": {"a": {}}}),
    ]
    assert len({same, *(digest_of(*other) for other in others)}) == 7


STATES = {  # what a kill can leave beside or instead of `best`, and which adapter there then is
    "first export half written": ([(".best.77.tmp", 2, True)], None),
    "first export whole, not yet named": ([(".best.77.tmp", 2, False)], None),
    "half written beside the old": ([("best", 1, False), (".best.77.tmp", 2, True)], 1),
    "old moved away": ([(".best.old", 1, False), (".best.77.tmp", 2, False)], 1),
    "new named, old not yet deleted": ([("best", 2, False), (".best.old", 1, False)], 2),
    "old half deleted": ([("best", 2, False), (".best.old", 1, True)], 2),
    "version 0.1.0, config without weights": ([("best", 2, True)], None),
}


@pytest.mark.parametrize("state", STATES)
def test_each_state_that_a_kill_leaves(state, tmp_path):
    """It is read without writing; the next start completes the replacement; the next export replaces it."""
    laid, number = STATES[state]
    run = tmp_path / "run"
    save_adapter(make(9), run / "adapters/final")
    for name, content, half in laid:
        save_adapter(make(content), run / "adapters" / name)
        if half:
            (run / "adapters" / name / "adapter_model.safetensors").unlink()
    before = sorted(path.relative_to(run) for path in run.rglob("*"))
    expected = number or 9
    found = read_adapter(run)
    assert is_whole(found) and found.metadata["step"] == expected
    if number:
        assert is_whole(load_adapter(run / "adapters/best")) and is_whole(read_adapter(run / "adapters/best"))
    assert find_adapter(run).name == ("best" if number else "final") and all(f.exists() for f in source_files(run))
    assert sorted(path.relative_to(run) for path in run.rglob("*")) == before
    clean_up(run, run / "checkpoints")
    if number:
        assert {path.name for path in (run / "adapters").iterdir()} == {"best", "final"}
    assert not list((run / "adapters").glob(".*")) and read_adapter(run).metadata["step"] == expected
    save_adapter(make(3), run / "adapters/best")
    assert read_adapter(run).metadata["step"] == 3
    assert set(os.listdir(run / "adapters/best")) == {"adapter_config.json", "adapter_model.safetensors"}


def writer(folder: Path) -> int:
    """Starts a process that writes adapters there in a loop; returns its number."""
    if child := os.fork():
        return child
    try:
        for number in range(10**6):
            save_adapter(make(number % 5), folder)
    finally:
        os._exit(0)


def test_real_kills(tmp_path):
    """SIGKILL, thirty times: the folder is always a complete adapter, and no other file remains."""
    folder, generator = tmp_path / "adapters/best", random.Random(1)
    save_adapter(make(0), folder)
    for _ in range(30):
        child = writer(folder)
        time.sleep(generator.uniform(0.01, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert is_whole(load_adapter(folder))
        assert is_whole(read_adapter(tmp_path))
    clean_up(tmp_path, tmp_path)
    assert os.listdir(tmp_path / "adapters") == ["best"] and is_whole(load_adapter(folder))


def test_a_reader_meets_a_writer(tmp_path):
    """A report while the run exports: every read adapter is complete."""
    folder = tmp_path / "best"
    save_adapter(make(0), folder)
    child = writer(folder)
    try:
        until = time.monotonic() + 1
        while time.monotonic() < until:
            assert is_whole(load_adapter(folder))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_exports_replace_adapters_and_nothing_else(folder, tmp_path):
    """Not without --force, no folder with other content, and never an input."""
    out = tmp_path / "out"
    export_adapter.main([str(folder), str(out)])
    with pytest.raises(UserError, match="out exists already"):
        export_adapter.main([str(folder), str(out)])
    (out / "README.md").write_text("mine")
    export_adapter.main([str(folder), str(out), "--force"])
    assert (out / "README.md").read_text() == "mine" and is_whole(load_adapter(out))
    for strange in ("data", "file"):
        (tmp_path / strange / "x").mkdir(parents=True) if strange == "data" else (tmp_path / strange).touch()
        with pytest.raises(UserError, match="--force replaces an adapter, but .* is not one"):
            export_adapter.main([str(folder), str(tmp_path / strange), "--force"])
    (tmp_path / "link").symlink_to(folder)
    for same in (folder, tmp_path / "link", tmp_path):
        with pytest.raises(UserError, match="which is read; choose another folder"):
            export_adapter.main([str(folder), str(same), "--force"])
    assert is_whole(load_adapter(folder))
