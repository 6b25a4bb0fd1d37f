"""Class prompts in adapter folders, merged files, checkpoints and live adapters."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from sam2.build_sam import build_sam2

from helpers.stock_models import NANO, build, train_a_little
from sam2_lora_ext import add_adapter, load_sam2, set_adapter
from sam2_lora_ext.adapters.class_binding import facts_of, prompts_of, prompts_of_state
from sam2_lora_ext.adapters.class_prompts import load_class_prompts
from sam2_lora_ext.adapters.merge import merge_files
from sam2_lora_ext.adapters.merge_state import require_fit
from sam2_lora_ext.adapters.peft import Adapter, load_adapter, save_adapter
from sam2_lora_ext.adapters.sources import source_files
from sam2_lora_ext.adapters.weights import read_weights, weights_id, write_weights
from sam2_lora_ext.host.class_encoder import ClassPromptEncoder, install_class_prompts
from sam2_lora_ext.inspection.segmenter import load_segmenter
from sam2_lora_ext.lora import build_lora_model
from sam2_lora_ext.lora.class_tokens import STATE_KEY, ClassTokens, find_tokens
from sam2_lora_ext.utils.errors import UserError

NAMES, IDS = ("pit", "line"), (1, 255)
TOKENS = "class_prompts.safetensors"


def trained(seed: int) -> tuple[torch.nn.Module, Adapter]:
    """A model whose adapters, object-score head and tokens were trained, and its adapter with class prompts."""
    model = build()
    base_id = weights_id(model.state_dict())
    trainable = ["sam_mask_decoder.pred_obj_score_head", "sam_mask_decoder.obj_score_token"]
    build_lora_model(model, {"trainable": trainable, "dropout": 0.0})
    install_class_prompts(model, ClassTokens(torch.randn(2, 3, 64), IDS, NAMES, crop=96))
    train_a_little(model, seed=seed)
    adapter = Adapter.from_model(model, {"base_id": base_id})
    adapter.class_prompts = prompts_of(model, base_id)
    return model, adapter


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a base and its adapters `one` and `two`."""
    made = tmp_path_factory.mktemp("files")
    write_weights(made / "base.pt", build().state_dict())
    for seed, name in ((1, "one"), (2, "two")):
        save_adapter(trained(seed)[1], made / name)
    return made


def answer(model: torch.nn.Module) -> list[torch.Tensor]:
    """Mask logits and scores of all classes, from the model's heads."""
    tokens = find_tokens(model)
    features = torch.randn(2, 64, 8, 8, generator=torch.Generator().manual_seed(4))
    high = [
        torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(5))
        for channels, side in ((8, 32), (16, 16))
    ]
    with torch.no_grad():
        sparse, dense = model.sam_prompt_encoder(tokens.prompt_of(torch.arange(2)), None, None)
        found = model.sam_mask_decoder.predict_masks(
            features, model.sam_prompt_encoder.get_dense_pe(), sparse, dense, False, high
        )
    return [found[0][:, 0], found[3]]


def test_the_model_is_known_without_its_tokens():
    """The base's identity and PEFT's file do not include the tokens, and weights with tokens are not a base."""
    model, adapter = trained(1)
    assert weights_id(build().state_dict()) == adapter.metadata["base_id"]
    plain = build()
    install_class_prompts(plain, ClassTokens(torch.zeros(2, 3, 64), IDS, NAMES))
    assert weights_id(plain.state_dict()) == adapter.metadata["base_id"]
    assert not any("class_tokens" in name for name in (*adapter.full, *adapter.full_modules, *adapter.layers))
    assert {"sam_mask_decoder.pred_obj_score_head", "sam_mask_decoder.obj_score_token"} == set(adapter.full_modules)
    with pytest.raises(UserError, match="the base itself has adapters"):
        require_fit(plain.state_dict(), adapter)
    assert torch.equal(adapter.class_prompts.tokens, find_tokens(model).tokens)
    assert adapter.class_prompts.crop == 96 and adapter.class_prompts.resolution == 128


def test_an_adapter_folder_keeps_them_and_is_one_unit(folder, tmp_path):
    """Class prompts are read back equal; those of another folder are an error; saving without any removes the file."""
    expected = trained(1)[1]
    got = load_adapter(folder / "one")
    assert torch.equal(got.class_prompts.tokens, expected.class_prompts.tokens)
    assert got.class_prompts.class_names == NAMES and got.metadata == expected.metadata
    assert [path.name for path in source_files(folder / "one")][-1] == TOKENS
    mixed = tmp_path / "mixed"
    shutil.copytree(folder / "one", mixed)
    shutil.copy(folder / "two" / TOKENS, mixed)
    with pytest.raises(UserError, match="belongs to another adapter"):
        load_adapter(mixed)
    (mixed / TOKENS).unlink()
    with pytest.raises(UserError, match="lacks class_prompts.safetensors"):
        load_adapter(mixed)
    expected.class_prompts = None
    save_adapter(trained(1)[1], tmp_path / "again")
    save_adapter(expected, tmp_path / "again")
    assert not (tmp_path / "again" / TOKENS).exists() and load_adapter(tmp_path / "again").class_prompts is None
    shutil.copy(folder / "one" / TOKENS, tmp_path / "again")
    with pytest.raises(UserError, match="belongs to another adapter|trained without class prompts"):
        load_adapter(tmp_path / "again")


def test_peft_loads_the_adapter_beside(folder):
    """PEFT also loads the trained heads, and ignores the file of class prompts."""
    from peft import PeftModel

    model = trained(1)[0]
    wrapped = PeftModel.from_pretrained(build(), str(folder / "one")).base_model.model
    install_class_prompts(wrapped, copy.deepcopy(find_tokens(model)))
    for got, expected in zip(answer(wrapped), answer(model), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_merged_file_is_stocks_and_carries_them(suffix, folder, tmp_path):
    out = tmp_path / f"steel.{suffix}"
    merge_files(folder / "base.pt", folder / "one", out)
    model, adapter = trained(1)
    state = read_weights(out)
    assert state.keys() == build().state_dict().keys() and STATE_KEY not in state
    prompts = load_class_prompts(out)
    assert torch.equal(prompts.tokens, adapter.class_prompts.tokens) and prompts.digest == weights_id(state)
    if suffix == "pt":
        size = ["++model.image_size=128"]
        stock = build_sam2(NANO, str(out), device="cpu", apply_postprocessing=False, hydra_overrides_extra=size)
        install_class_prompts(stock, ClassTokens(prompts.tokens, prompts.class_ids, prompts.class_names))
        for got, expected in zip(answer(stock), answer(model.eval()), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert load_segmenter(None, out, device="cpu").prompts.class_names == NAMES
    adapter.class_prompts = None
    save_adapter(adapter, tmp_path / "clicks")
    merge_files(folder / "base.pt", tmp_path / "clicks", out, force=True)
    assert load_class_prompts(out) is None
    merged = merge_files(folder / "base.pt", folder / "one", out, weights=[0.5], force=True)
    assert load_class_prompts(out) is None and "class prompts are left out" in merged.notes[-1]


def test_live_adapters_switch_their_tokens(folder):
    """Without an adapter, the base has stock's own prompt encoder again."""
    model = load_sam2(
        NANO, folder / "base.pt", {"one": folder / "one"}, image_size=128, apply_postprocessing=False, device="cpu"
    )
    add_adapter(model, "two", folder / "two")
    for name, seed in (("one", 1), ("two", 2), ("one", 1)):
        set_adapter(model, name)
        expected = trained(seed)[0].eval()
        assert torch.equal(find_tokens(model).tokens, find_tokens(expected).tokens)
        for got, wanted in zip(answer(model), answer(expected), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    set_adapter(model, None)
    assert find_tokens(model) is None and type(model.sam_prompt_encoder) is not ClassPromptEncoder
    assert model.state_dict().keys() == build().state_dict().keys()
    assert weights_id(model.state_dict()) == weights_id(build().state_dict())


@pytest.mark.parametrize("wrong", [5, None, "ab", {}])
def test_damaged_notes_of_tokens_are_a_sentence(wrong):
    facts = {"class_ids": [1, 2], "class_names": wrong, "crop": None, "resolution": 64, "exclusive": True}
    with pytest.raises(UserError, match="it is damaged"):
        prompts_of_state({STATE_KEY: torch.zeros(2, 2, 8)}, {"class_prompts": facts})


def test_a_checkpoint_notes_what_its_tokens_are():
    model, adapter = trained(1)
    notes = {"class_prompts": facts_of(model), "base_id": "a"}
    prompts = prompts_of_state(model.state_dict(), notes)
    assert torch.equal(prompts.tokens, adapter.class_prompts.tokens) and prompts.class_ids == IDS
    assert prompts.base_id == "a" and prompts_of_state(build().state_dict(), {}) is None
    assert facts_of(build()) is None
    with pytest.raises(UserError, match="does not record their classes"):
        prompts_of_state(model.state_dict(), {})
