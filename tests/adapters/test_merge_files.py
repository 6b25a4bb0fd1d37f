"""Merging files: every kind of source, the right base only, and nothing written after an error."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from helpers.stock_models import NANO, build, train_a_little
from sam2_lora_ext.adapters.merge import merge_files
from sam2_lora_ext.adapters.merge_state import merge_state_dict
from sam2_lora_ext.adapters.peft import Adapter, attach_adapter, save_adapter
from sam2_lora_ext.adapters.sources import find_adapter, read_adapter
from sam2_lora_ext.adapters.weights import read_weights, weights_id, write_weights
from sam2_lora_ext.lora import LoRAConfig, LoRALinear, build_lora_model
from sam2_lora_ext.utils.errors import UserError

HEAD = "sam_mask_decoder.iou_prediction_head"
CONFIG = {"rank": 4, "qkv_parts": ["q", "v"], "trainable": [HEAD], "rslora": True}


@pytest.fixture(scope="module")
def base() -> dict[str, Tensor]:
    """The small SAM 2's weights; not to be changed."""
    return {key: value.clone() for key, value in build().state_dict().items()}


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """The same with adapters and a head that have moved; not to be changed."""
    model = build_lora_model(build(), CONFIG)
    train_a_little(model)
    return model.eval()


@pytest.fixture
def run(tmp_path: Path, base: dict[str, Tensor], trained: nn.Module) -> Path:
    """A folder `run` as written by LoRATrainer, with `base.pt` next to it."""
    write_weights(tmp_path / "base.pt", base)
    facts = {"base_id": weights_id(base), "base_path": "base.pt", "model_config": NANO}
    folder = tmp_path / "run"
    for name in ("best", "final", "latest"):
        save_adapter(Adapter.from_model(trained, {**facts, "which": name}), folder / "adapters" / name)
    (folder / "checkpoints").mkdir()
    kept = {name for name, parameter in trained.named_parameters() if parameter.requires_grad}
    state = {key: value for key, value in trained.state_dict().items() if key in kept}
    checkpoint = {"model": state, "optimizer": {"state": {}}, "epoch": 2, "steps": {"train": 9}, "time_elapsed": 1.5}
    torch.save(checkpoint, folder / "checkpoints" / "checkpoint.pt")
    (folder / "lora.json").write_text(json.dumps({"config": LoRAConfig.of(CONFIG).to_dict(), **facts}))
    return folder


def test_which_adapter_a_path_means(run):
    best, final = run / "adapters" / "best", run / "adapters" / "final"
    assert find_adapter(run) == best and find_adapter(final) == final
    best.rename(run / "adapters" / "was best")
    assert find_adapter(run) == final
    final.rename(run / "adapters" / "was final")
    with pytest.raises(
        UserError,
        match="nor a run with adapters/best or adapters/final: to use another adapter of it, give .*latest or .*check",
    ):
        find_adapter(run)
    with pytest.raises(UserError, match="was it trained up to a validation"):
        find_adapter(run / "adapters")
    with pytest.raises(UserError, match="there is no .*nothing: give a run folder"):
        find_adapter(run / "nothing")


def test_every_kind_of_source_merges_to_the_same_weights(run, tmp_path):
    results = []
    sources = ("", "adapters/latest", "adapters/final/adapter_model.safetensors", "checkpoints/checkpoint.pt")
    for index, source in enumerate(run / name for name in sources):
        facts = merge_files(tmp_path / "base.pt", source, tmp_path / f"{index}.pt")
        assert not facts.notes and facts.adapter.metadata["model_config"] == NANO and facts.dtypes == ["float32"]
        results.append(read_weights(tmp_path / f"{index}.pt"))
    for other in results[1:]:
        assert all(torch.equal(value, other[key]) for key, value in results[0].items())
    assert merge_files(tmp_path / "base.pt", run, tmp_path / "m.pt").adapter.metadata["which"] == "best"


def test_a_checkpoint_of_a_run_without_lora_json(run, tmp_path):
    (run / "lora.json").unlink()
    with pytest.raises(UserError, match="give --alpha"):
        read_adapter(run / "checkpoints" / "checkpoint.pt")
    with pytest.raises(UserError, match="for 1 adapted part"):  # q and v of a fused layer: alpha alone does not say so
        read_adapter(run / "checkpoints" / "checkpoint.pt", 16.0)
    model = build_lora_model(build(), {"rank": 2, "alpha": 6})
    train_a_little(model)
    torch.save({"model": model.state_dict()}, tmp_path / "whole.pt")  # as the plain Trainer saves
    facts = merge_files(tmp_path / "base.pt", tmp_path / "whole.pt", tmp_path / "m.pt", alpha=6)
    assert "does not record which base" in facts.notes[0] and facts.changed == len(facts.adapter.layers)
    expected = merge_state_dict(read_weights(tmp_path / "base.pt"), Adapter.from_model(model))
    assert all(torch.equal(value, expected[key]) for key, value in read_weights(tmp_path / "m.pt").items())


def test_alpha_for_an_adapter_that_says_its_own_is_refused(run):
    with pytest.raises(UserError, match="records its alpha"):
        read_adapter(run, 16.0)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"config": 3}', '{"config": {"rnak": 1}}'])
def test_a_damaged_lora_json(run, content):
    (run / "lora.json").write_text(content)
    with pytest.raises(UserError, match="lora.json is damaged"):
        read_adapter(run / "checkpoints" / "checkpoint.pt")


def test_a_checkpoint_without_adapters(tmp_path, base):
    write_weights(tmp_path / "base.pt", base)
    with pytest.raises(UserError, match="base.pt holds no LoRA adapter"):
        read_adapter(tmp_path / "base.pt")


def test_a_wrong_base_is_refused_naming_both(run, tmp_path):
    other = build(seed=5).state_dict()
    write_weights(tmp_path / "other.pt", other)
    right, wrong = weights_id(read_weights(tmp_path / "base.pt"))[:12], weights_id(other)[:12]
    (tmp_path / "m.pt").write_text("old")
    with pytest.raises(
        UserError,
        match=rf"trained on base.pt \({NANO}, sha256 {right}\), but the base is .*other.pt "
        rf"\({NANO}, sha256 {wrong}\): give the right --base",
    ):
        merge_files(tmp_path / "other.pt", run, tmp_path / "m.pt", force=True)
    write_weights(tmp_path / "tiny.pt", build("configs/sam2/sam2_hiera_t.yaml").state_dict())
    with pytest.raises(UserError, match=r"trained on base.pt .*/tiny.pt \(configs/sam2/sam2_hiera_t.yaml, sha256"):
        merge_files(tmp_path / "tiny.pt", run, tmp_path / "m.pt", force=True)
    assert (tmp_path / "m.pt").read_text() == "old" and len(list(tmp_path.glob("*"))) == 5


def test_a_half_precision_copy_is_the_same_base_and_merges_to_float32(run, tmp_path, base):
    half = {key: value.half() for key, value in base.items()}
    config = json.loads((run / "lora.json").read_text())
    (run / "lora.json").write_text(json.dumps({**config, "base_id": weights_id(half)}))
    write_weights(tmp_path / "half.safetensors", half, "safetensors")
    source, checkpoint = tmp_path / "half.safetensors", run / "checkpoints" / "checkpoint.pt"
    facts = merge_files(source, checkpoint, tmp_path / "m.safetensors")
    assert not facts.notes and facts.dtypes == ["float32"]
    assert merge_files(source, checkpoint, tmp_path / "h.pt", dtype="float16").dtypes == ["float16"]
    exact, rounded = read_weights(tmp_path / "m.safetensors"), read_weights(tmp_path / "h.pt")
    adapted = {f"{name}.weight" for name in facts.adapter.layers}  # these are rounded from float64
    assert all(torch.equal(rounded[key], value.half()) for key, value in exact.items() if key not in adapted)


def test_outputs_that_are_refused(run, tmp_path):
    source = tmp_path / "base.pt"
    before = source.read_bytes()
    (tmp_path / "m.pt").touch()
    for out, options, words in (
        ("m.pt", {}, "m.pt exists already: choose another name, or give --force"),
        ("base.pt", {"force": True}, "base.pt is the same file as .*base.pt, which is read"),
        ("run", {"force": True}, "run is a folder, and only files"),
        ("x.pt", {"file_format": "safetensors"}, r"x.pt would hold safetensors, .* name it \*.safetensors"),
        ("x.safetensors", {"file_format": "pt"}, r"x.safetensors would hold pt"),
        ("m.pt/x.pt", {}, "cannot write .*m.pt/x.pt"),
    ):
        with pytest.raises(UserError, match=words):
            merge_files(source, run, tmp_path / out, **options)
    assert source.read_bytes() == before and {path.name for path in tmp_path.iterdir()} == {"base.pt", "run", "m.pt"}


@pytest.mark.parametrize("missing", ["base.pt", "run"])
def test_missing_inputs(run, tmp_path, missing):
    (tmp_path / missing).rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"there is no .*{missing}"):
        merge_files(tmp_path / "base.pt", run, tmp_path / "m.pt")
    assert not (tmp_path / "m.pt").exists()


def test_merging_is_attaching(run, tmp_path):
    merge_files(tmp_path / "base.pt", run, tmp_path / "m.pt")
    live = attach_adapter(build(), read_adapter(run))
    for name, layer in live.named_modules():
        if isinstance(layer, LoRALinear):
            written = read_weights(tmp_path / "m.pt")[f"{name}.weight"]
            assert torch.equal(written, (layer.weight.double() + layer.delta_weight(torch.float64)).float())
