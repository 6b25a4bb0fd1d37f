"""Adapters for transformers' `Sam2Model` in PEFT's format: from ours to theirs and back, by names."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers.stock_models import NANO, build, train_a_little
from sam2_lora_ext.adapters.merge import merge_files
from sam2_lora_ext.adapters.peft import Adapter, LayerAdapter, load_adapter, save_adapter
from sam2_lora_ext.adapters.sources import read_adapter
from sam2_lora_ext.adapters.transformers_names import (
    Names,
    rename_adapter,
    speaks_transformers,
    state_from_transformers,
    state_to_transformers,
)
from sam2_lora_ext.adapters.transformers_table import name_pairs
from sam2_lora_ext.adapters.weights import read_weights, weights_id, write_weights
from sam2_lora_ext.deploy.stock import build_stock, mask_logits, noise_image
from sam2_lora_ext.lora import build_lora_model
from sam2_lora_ext.utils.command_line import run_cli
from sam2_lora_ext.utils.errors import UserError

transformers = pytest.importorskip("transformers")
from sam2_lora_ext.deploy.transformers_folder import make_config, model_logits, their_state  # noqa: E402

BOUND = 1e-4  # of a logit; sums of attention are in another order
SIZE = 128
UPSCALING = "sam_mask_decoder.output_upscaling.3"
QKV = "vision_encoder.backbone.blocks.0.attn.qkv"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.pt"
    write_weights(path, build(NANO).state_dict())
    return path


def their_model(base: Path) -> Any:
    """A `Sam2Model` with the base's weights."""
    state = read_weights(base)
    model = transformers.Sam2Model(make_config(state)).eval()
    model.load_state_dict(their_state(state, model.config))
    model.mask_decoder.dynamic_multimask_via_stability = False
    return model


@torch.no_grad()
def stock_logits(weights: Path) -> torch.Tensor:
    return mask_logits(build_stock(NANO, weights), noise_image(SIZE))


def export(monkeypatch: pytest.MonkeyPatch, repository: Path, *args: object) -> None:
    """Runs tools/export_adapter.py."""
    monkeypatch.syspath_prepend(repository / "tools")
    import export_adapter

    export_adapter.main([str(arg) for arg in args])


@pytest.mark.parametrize(
    "lora",
    [
        {"rank": 2, "qkv_parts": ["q", "v"], "trainable": [UPSCALING, "image_encoder.trunk.blocks.0.norm1"]},
        {"rank": 3, "rslora": True, "rank_pattern": {"image_encoder.*": 5}},
        {"rank": 2, "variant": "dora"},
    ],
)
def test_ours_on_their_model(base, tmp_path, monkeypatch, repository, capsys, lora):
    """PEFT, and for plain LoRA the loader of transformers, give the masks of the merged file."""
    model = build(NANO)
    build_lora_model(model, lora)
    train_a_little(model, 0.02)
    facts = {"base_id": weights_id(read_weights(base)), "base_path": "base.pt"}
    save_adapter(Adapter.from_model(model, facts), tmp_path / "ours")
    export(monkeypatch, repository, tmp_path / "ours", tmp_path / "theirs", "--for", "transformers", "--base", base)
    assert "for transformers' Sam2Model" in capsys.readouterr().out
    merge_files(base, tmp_path / "ours", tmp_path / "m.pt")
    expected = stock_logits(tmp_path / "m.pt")
    assert (expected - stock_logits(base)).abs().max() > 0.01
    peft = PeftModel.from_pretrained(their_model(base), tmp_path / "theirs").eval()
    assert (model_logits(peft, noise_image(SIZE)) - expected).abs().max() < BOUND
    if "trainable" not in lora and "variant" not in lora:  # its own loader knows plain LoRA only
        live = their_model(base)
        live.load_adapter(str(tmp_path / "theirs"))
        assert (model_logits(live, noise_image(SIZE)) - expected).abs().max() < BOUND

    back, ours = read_adapter(tmp_path / "theirs"), load_adapter(tmp_path / "ours")
    assert back.layers.keys() == ours.layers.keys() and back.full.keys() == ours.full.keys()
    assert all(
        torch.equal(value, back.layers[name].tensors[key])
        for name, layer in ours.layers.items()
        for key, value in layer.tensors.items()
    )
    assert all(layer.parts == ours.layers[name].parts for name, layer in back.layers.items())
    assert back.metadata == ours.metadata and sorted(back.full_modules) == sorted(ours.full_modules)
    merge_files(base, tmp_path / "theirs", tmp_path / "n.pt")  # and so every tool reads it
    again = read_weights(tmp_path / "n.pt")
    assert all(torch.equal(value, again[key]) for key, value in read_weights(tmp_path / "m.pt").items())


@pytest.mark.parametrize("dora", [False, True])
def test_theirs_on_sam2(base, tmp_path, monkeypatch, repository, dora):
    """An adapter that PEFT made of `Sam2Model`, by its short names, merged for stock SAM 2."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["qkv", "o_proj", "mlp.proj_in"],
        use_dora=dora,
        modules_to_save=["upscale_conv2"],
        init_lora_weights=False,
    )
    peft = get_peft_model(their_model(base), config).eval()
    with torch.no_grad():
        for name, value in peft.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                value.add_(0.02 * torch.randn_like(value))
    peft.save_pretrained(tmp_path / "theirs")
    export(monkeypatch, repository, tmp_path / "theirs", tmp_path / "ours", "--base", base)
    adapter = load_adapter(tmp_path / "ours")
    assert "image_encoder.trunk.blocks.0.attn.qkv" in adapter.layers and adapter.full_modules == [UPSCALING]
    assert "sam_mask_decoder.transformer.layers.1.mlp.layers.0" in adapter.layers and adapter.is_dora == dora
    merge_files(base, tmp_path / "theirs", tmp_path / "m.pt")
    expected = model_logits(peft, noise_image(SIZE))
    assert (expected - stock_logits(base)).abs().max() > 0.01
    assert (stock_logits(tmp_path / "m.pt") - expected).abs().max() < BOUND


def theirs(folder: Path, module: str, rows: int = 72, columns: int = 24) -> Path:
    """PEFT's folder of an adapter that changes one module of `Sam2Model`."""
    layer = LayerAdapter(torch.ones(2, columns), torch.ones(rows, 2), 4)
    save_adapter(Adapter({module: layer}), folder)
    return folder


@pytest.mark.parametrize(
    "module, words",
    [
        (QKV.replace("qkv", "q_proj"), "query, key and value fused in one attn.qkv"),
        (QKV.replace("qkv", "kv"), "attn.kv is no module of SAM 2.*or otherwise fused"),
        (QKV.replace("attn.qkv", "attn.rel_pos"), "rel_pos of transformers' Sam2Model has no counterpart in SAM 2"),
        ("vision_encoder.backbone.layers.0.attn.qkv", "layers.0.attn.qkv .*has no counterpart|is no module of SAM 2"),
        ("mask_decoder.transformer.layers.0.self_attn.out_proj", "has no counterpart in SAM 2"),
    ],
)
def test_theirs_that_cannot_be_carried_over_are_named(tmp_path, module, words):
    with pytest.raises(UserError, match=words):
        read_adapter(theirs(tmp_path / "theirs", module))


def test_what_is_fused_otherwise_by_its_shape_is_named(base, tmp_path, monkeypatch, repository, capsys):
    folder = theirs(tmp_path / "theirs", QKV, rows=48)
    with pytest.raises(SystemExit):
        run_cli(lambda _: export(monkeypatch, repository, folder, tmp_path / "ours", "--base", base))
    message = capsys.readouterr().err
    assert "image_encoder.trunk.blocks.0.attn.qkv.weight of shape [48, 24], which is [72, 24]" in message
    assert not (tmp_path / "ours").exists()


def test_ours_that_cannot_be_carried_over_are_named():
    layer = LayerAdapter(torch.ones(2, 8), torch.ones(8, 2), 4)
    with pytest.raises(UserError, match="trunk.extra of SAM 2 has no counterpart in transformers' Sam2VideoModel"):
        rename_adapter(Adapter({"image_encoder.trunk.extra": layer}))
    full = {"sam_prompt_encoder.point_embeddings.1.weight": torch.ones(1, 8)}
    with pytest.raises(UserError, match="point_embeddings.1 of SAM 2 has no counterpart"):
        rename_adapter(Adapter({}, full, ["sam_prompt_encoder.point_embeddings.1"]))


def test_adapters_with_names_that_both_have_stay_as_they_are(tmp_path):
    both = "memory_attention.layers.0.self_attn.q_proj"
    assert not speaks_transformers([both]) and list(read_adapter(theirs(tmp_path / "a", both)).layers) == [both]
    other = "memory_attention.layers.0.self_attn.o_proj"
    assert speaks_transformers([both, other])
    assert list(read_adapter(theirs(tmp_path / "b", other)).layers) == [other.replace("o_proj", "out_proj")]
    unknown = "somebody.elses.layer"  # refused later, by its base, in words about the base
    assert list(read_adapter(theirs(tmp_path / "c", unknown)).layers) == [unknown]


def test_names_and_tensors_go_there_and_back(base):
    pairs = name_pairs()
    assert len(set(pairs.values())) == len(pairs)
    for theirs_ in (False, True):
        names, back = Names(theirs_), Names(not theirs_)
        for name in pairs.values() if theirs_ else pairs:
            one = name.replace("*", "3")
            assert back[names[one]] == one and back[names[f"{one}.weight"]] == f"{one}.weight"
    state = read_weights(base)
    again = state_from_transformers(state_to_transformers(state))
    assert again.keys() == state.keys() and all(torch.equal(value, again[key]) for key, value in state.items())
    encoder = {key: value for key, value in state.items() if key.startswith("sam_prompt_encoder.")}
    adapter = Adapter({}, encoder, ["sam_prompt_encoder"])
    renamed = rename_adapter(adapter)
    assert renamed.full["prompt_encoder.point_embed.weight"].shape == (4, 64)
    assert rename_adapter(renamed, theirs=True).full.keys() == encoder.keys()


def test_two_copies_that_differ_are_refused(base):
    state = their_state(read_weights(base), make_config(read_weights(base)))
    state["shared_image_embedding.positional_embedding"] += 1
    with pytest.raises(UserError, match="positional_embedding differ, and SAM 2 has one for both"):
        state_from_transformers(state)


def test_a_changed_file_is_still_found_out(tmp_path):
    folder = theirs(tmp_path / "theirs", QKV)
    weights = folder / "adapter_model.safetensors"
    with safe_open(weights, "pt") as file:
        metadata = file.metadata()
    save_file({key: value + 1 for key, value in load_file(weights).items()}, weights, metadata)
    with pytest.raises(UserError, match="do not belong together"):
        read_adapter(folder)
