"""Unmerging: base and merged file give the same update at its rank; changes that are not low-rank are refused."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor

from helpers.stock_models import NANO, build, train_a_little
from sam2_lora_ext.adapters.merge import merge_files
from sam2_lora_ext.adapters.merge_state import merge_state_dict
from sam2_lora_ext.adapters.peft import Adapter, LayerAdapter, load_adapter, save_adapter
from sam2_lora_ext.adapters.unmerge import unmerge
from sam2_lora_ext.adapters.weights import read_weights, weights_id, write_weights
from sam2_lora_ext.lora import build_lora_model
from sam2_lora_ext.utils.command_line import run_cli
from sam2_lora_ext.utils.errors import UserError

HEAD = "sam_mask_decoder.iou_prediction_head"
CONFIGS = {
    "plain": {"rank": 8},
    "q and v": {"rank": 4, "qkv_parts": ["q", "v"]},
    "k": {"rank": 2, "qkv_parts": ["k"], "rslora": True},
    "head": {"rank": 3, "trainable": [HEAD]},
    "ranks": {"rank": 2, "alpha": 5, "rank_pattern": {"sam_mask_decoder.*": 5}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base.pt`, and for each config an adapter folder and its merged file."""
    folder = tmp_path_factory.mktemp("unmerge")
    write_weights(folder / "base.pt", build(NANO).state_dict())
    for name, config in CONFIGS.items():
        model = build_lora_model(build(NANO), config)
        train_a_little(model)
        save_adapter(Adapter.from_model(model), folder / name)
        merge_files(folder / "base.pt", folder / name, folder / f"{name}.pt")
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_the_adapter_comes_back_at_its_rank_and_in_its_parts(folder, name):
    before = load_adapter(folder / name)
    base, merged = read_weights(folder / "base.pt"), read_weights(folder / f"{name}.pt")
    found = unmerge(base, merged, keep_full=name == "head")
    assert found.adapter.layers.keys() == before.layers.keys() == found.errors.keys()
    for key, layer in before.layers.items():
        back = found.adapter.layers[key]
        assert (back.rank, back.parts, back.scaling) == (layer.rank, layer.parts, 1.0)
        torch.testing.assert_close(back.delta_weight(), layer.delta_weight(), rtol=0, atol=1e-7)  # the file's rounding
    assert max(found.errors.values()) < 1e-6 and found.max_abs_weight_diff < 1e-7
    assert all(torch.equal(value, found.adapter.full[key]) for key, value in before.full.items())
    again = merge_state_dict(base, found.adapter)
    for key, value in merged.items():
        torch.testing.assert_close(again[key], value, rtol=0, atol=1e-7)


@given(st.integers(4, 20), st.integers(4, 20), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_truncation_is_the_best_there_is(out, inputs, rank, cut, seed):
    """The error is that of the singular values left out (Eckart and Young), by numpy's own decomposition."""
    generator = torch.Generator().manual_seed(seed)
    base = {"m.weight": torch.randn(out, inputs, generator=generator, dtype=torch.float64), "m.bias": torch.zeros(out)}
    a, b = torch.randn(rank, inputs, generator=generator), torch.randn(out, rank, generator=generator)
    layer = LayerAdapter(a, b, 2.0)
    merged = merge_state_dict(base, Adapter({"m": layer}))
    values = torch.linalg.svdvals(layer.delta_weight())
    expected = float(values[cut:].norm() / values.norm())
    found = unmerge(base, merged, cut, bound=0.999)
    assert found.errors["m"] == pytest.approx(expected, abs=1e-6)  # A and B are float32


def test_by_parts_only_where_it_takes_fewer_numbers():
    """A (T, T, T) adapter of rank 2 has rank 6 as one update; a fused one of rank 2 has parts of rank 2."""
    torch.manual_seed(0)
    base = {"a.qkv.weight": torch.randn(30, 12), "a.qkv.bias": torch.zeros(30)}
    for parts, rank in (((True, True, True), 2), ((True,), 2), ((False, False, True), 3)):
        a, b = torch.randn(sum(parts) * rank, 12), torch.randn(30 // len(parts) * sum(parts), rank)
        layer = LayerAdapter(a, b, 1.0, parts=parts)
        found = unmerge(base, merge_state_dict(base, Adapter({"a.qkv": layer}))).adapter.layers["a.qkv"]
        assert (found.parts, found.rank) == (parts, rank)


@pytest.mark.parametrize("dtype, bound", [("float16", 2e-3), ("bfloat16", 1.5e-2)])
def test_from_a_half_precision_file(folder, tmp_path, dtype, bound):
    """Rounding errors neither change the rank nor count as a change."""
    merge_files(folder / "base.pt", folder / "q and v", tmp_path / "m.pt", dtype=dtype)
    found = unmerge(read_weights(folder / "base.pt"), read_weights(tmp_path / "m.pt"))
    before = load_adapter(folder / "q and v")
    assert {layer.rank for layer in found.adapter.layers.values()} == {4}
    for key, layer in before.layers.items():
        delta = layer.delta_weight()
        assert (found.adapter.layers[key].delta_weight() - delta).norm() <= bound * delta.norm()


def change(state: dict[str, Tensor], key: str, seed: int = 0) -> dict[str, Tensor]:
    noise = torch.randn(state[key].shape, generator=torch.Generator().manual_seed(seed))
    return {**state, key: state[key] + 0.1 * noise}


def test_what_is_refused(folder):
    base = read_weights(folder / "base.pt")
    proj = "image_encoder.trunk.blocks.7.attn.proj.weight"
    position = "image_encoder.trunk.pos_embed"
    merged = read_weights(folder / "plain.pt")
    nan = {**merged, proj: merged[proj] * float("nan")}
    other = {key: value for key, value in merged.items() if key != proj}
    for state, options, words in (
        (base, {}, "holds the base's values"),
        (change(base, proj), {}, f"{proj} changed by a matrix of rank 192 of 192, which is not low: give --full"),
        (change(base, proj), {"rank": 8}, f"{proj} differs by 0.9.* of its change at rank 8 .0.01 is allowed."),
        (
            change(merged, "sam_mask_decoder.iou_token.weight"),
            {},
            "iou_token.weight changed, and is not the weight",
        ),
        (
            change(merged, position),
            {"keep_full": True},
            f"{position} changed, which an adapter can hold only with all "
            "of image_encoder.trunk, image_encoder.trunk.blocks.0.attn",
        ),
        (change(merged, "no_mem_embed"), {"keep_full": True}, "no_mem_embed changed, .* only with all of the model"),
        (nan, {}, f"{proj} of the merged file holds NaN"),
        (other, {}, "not of the base.s model: .*they lack image_"),
        (merged, {"rank": 0}, "--rank must be at least 1"),
        (merged, {"bound": 1.0}, "--bound is a share"),
    ):
        with pytest.raises(UserError, match=words):
            unmerge(base, state, **options)
    crude = unmerge(base, change(base, proj), 8, bound=0.99)
    assert crude.adapter.layers[proj.removesuffix(".weight")].rank == 8 and 0.8 < list(crude.errors.values())[0] < 0.99
    whole = unmerge(base, change(base, proj), keep_full=True).adapter
    assert not whole.layers and whole.full_modules == [proj.removesuffix(".weight")] and len(whole.full) == 2


def test_the_command_line(folder, tmp_path, monkeypatch, repository, capsys):
    monkeypatch.syspath_prepend(repository / "tools")
    import unmerge_lora

    command = ["--base", str(folder / "base.pt"), "--merged", str(folder / "q and v.pt"), "--out", str(tmp_path / "a")]
    unmerge_lora.main(command)
    printed = capsys.readouterr().out
    assert (
        "48 LoRA layers of rank 4 to 4, 0 modules trained in full" in printed and "(0.01 is allowed besides" in printed
    )
    metadata = load_adapter(tmp_path / "a").metadata
    assert metadata["base_id"] == weights_id(read_weights(folder / "base.pt")) and metadata["model_config"] == NANO
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["r"] == 8  # two parts of rank 4 for PEFT
    assert PeftModel.from_pretrained(build(NANO), tmp_path / "a").peft_config
    merge_files(folder / "base.pt", tmp_path / "a", tmp_path / "m.pt")
    for words, options in (("give --force", []), ("there is no file no.pt", ["--merged", "no.pt", "--force"])):
        with pytest.raises(SystemExit) as caught:
            run_cli(unmerge_lora.main, [*command, *options])
        assert caught.value.code == 2 and words in capsys.readouterr().err
