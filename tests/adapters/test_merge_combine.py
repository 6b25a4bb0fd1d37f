"""Several adapters in one merge: the exact sum, PEFT's own sum as the oracle, and refusals of others."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor

from helpers.stock_models import NANO, build, train_a_little
from sam2_lora_ext.adapters.combine import combine
from sam2_lora_ext.adapters.merge import merge_files
from sam2_lora_ext.adapters.peft import Adapter, LayerAdapter, attach_adapter, save_adapter
from sam2_lora_ext.adapters.weights import read_weights, weights_id, write_weights
from sam2_lora_ext.deploy.verify import compare_merged, mask_logits, noise_image
from sam2_lora_ext.lora import build_lora_model
from sam2_lora_ext.utils.errors import UserError

HEAD = "sam_mask_decoder.iou_prediction_head"
PARTS = [(True,), (True, False, True), (True, True, True)]


def layer(seed: int, out: int = 6, inputs: int = 5, rank: int = 2, parts=(True,), rslora: bool = False) -> LayerAdapter:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(sum(parts) * rank, inputs, generator=generator)
    b = torch.randn(sum(parts) * (out // len(parts)), rank, generator=generator)
    return LayerAdapter(a, b, 3.0, rslora, parts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base.pt`, and adapters of it: `one` with a head, `two` on q and v, `three` and `four` on the fused layer."""
    folder = tmp_path_factory.mktemp("combine")
    base = build(NANO).state_dict()
    write_weights(folder / "base.pt", base)
    facts = {"base_id": weights_id(base), "base_path": "base.pt", "model_config": NANO}
    configs = {
        "one": {"rank": 4, "qkv_parts": ["q", "v"], "trainable": [HEAD]},
        "two": {"rank": 2, "qkv_parts": ["q", "v"], "rslora": True},
        "three": {"rank": 3},
        "four": {"rank": 2, "alpha": 5},
    }
    for seed, (name, config) in enumerate(configs.items(), 1):
        model = build_lora_model(build(NANO), config)
        train_a_little(model, seed=seed)
        save_adapter(Adapter.from_model(model, facts), folder / name)
    return folder


@given(st.lists(st.sampled_from(PARTS), min_size=2, max_size=4), st.booleans(), st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_the_update_is_the_weighted_sum(parts, rslora, seed):
    layers = [layer(seed + i, rank=1 + i, parts=kind, rslora=rslora and i > 0) for i, kind in enumerate(parts)]
    weights = [0.7, -0.4, 1.0, 2.5][: len(parts)]
    adapters = [Adapter({"m.qkv": one, **({"only": layer(9)} if i == 1 else {})}) for i, one in enumerate(layers)]
    found = combine(adapters, weights, {}, [str(i) for i in range(len(parts))])
    expected = sum(weight * one.delta_weight() for weight, one in zip(weights, layers))
    torch.testing.assert_close(found.layers["m.qkv"].delta_weight(), expected, rtol=1e-12, atol=1e-12)
    only = found.layers["only"].delta_weight()
    torch.testing.assert_close(only, -0.4 * layer(9).delta_weight(), rtol=1e-12, atol=1e-12)
    found.config()  # one that `attach_adapter` can use: all layers named qkv have the same parts


def test_one_adapter_of_weight_one_is_itself_and_any_weight_scales():
    adapter = Adapter({"a": layer(1)}, {"h.weight": torch.tensor([3.0])}, ["h"])
    base = {"h.weight": torch.tensor([1.0])}
    assert combine([adapter], None, base, ["x"]) is combine([adapter], [1.0], base, ["x"]) is adapter
    half = combine([adapter], [0.5], base, ["x"])
    torch.testing.assert_close(half.layers["a"].delta_weight(), 0.5 * adapter.layers["a"].delta_weight())
    assert half.full["h.weight"].tolist() == [2.0] and half.metadata["combined"] == [{"adapter": "x", "weight": 0.5}]


def test_peft_makes_the_same_sum(folder, tmp_path):
    names, weights = ["three", "four"], [0.7, 0.3]
    model = PeftModel.from_pretrained(build(NANO), folder / "three", "three")
    model.load_adapter(folder / "four", "four")
    model.add_weighted_adapter(names, weights, "sum", combination_type="cat")
    model.set_adapter("sum")
    theirs = model.base_model.merge_and_unload().state_dict()
    merge_files(folder / "base.pt", [folder / name for name in names], tmp_path / "m.pt", weights=weights)
    ours, base = read_weights(tmp_path / "m.pt"), read_weights(folder / "base.pt")
    for key, value in ours.items():  # PEFT adds in float32
        torch.testing.assert_close(theirs[key], value, rtol=1e-5, atol=1e-6)
    assert sum(not torch.equal(value, base[key]) for key, value in ours.items()) > 20


def test_the_live_combination_has_the_masks_of_the_merged_file(folder, tmp_path):
    """Also where the fused layers are adapted in different parts, and with a head of one of them."""
    paths = [folder / name for name in ("one", "two", "three")]
    merged = merge_files(folder / "base.pt", paths, tmp_path / "m.pt", weights=[0.5, 1.5, -0.25])
    result = compare_merged(tmp_path / "m.pt", folder / "base.pt", merged.adapter, NANO)
    assert result.passed and result.bound == 1e-4 and result.max_abs_weight_diff < 1e-6
    assert [(path.name, weight) for path, weight, _ in merged.sources] == [("one", 0.5), ("two", 1.5), ("three", -0.25)]
    live = attach_adapter(build(NANO), merged.adapter)
    with torch.no_grad():
        before, after = (mask_logits(model, noise_image(128)) for model in (build(NANO), live))
    assert (before - after).abs().max() > 0.01


def test_adding_and_taking_away_is_the_other_one(folder, tmp_path):
    base: dict[str, Tensor] = read_weights(folder / "base.pt")
    merge_files(folder / "base.pt", [folder / "two", folder / "three"], tmp_path / "m.pt", weights=[1, 1])
    merge_files(tmp_path / "m.pt", _without_base(folder / "two", tmp_path), tmp_path / "n.pt", weights=[-1])
    merge_files(folder / "base.pt", folder / "three", tmp_path / "three.pt")
    found, expected = read_weights(tmp_path / "n.pt"), read_weights(tmp_path / "three.pt")
    for key in base:
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=2e-7)  # two roundings to float32


def _without_base(source: Path, tmp_path: Path) -> Path:
    from sam2_lora_ext.adapters.peft import load_adapter

    adapter = load_adapter(source)
    adapter.metadata.clear()
    save_adapter(adapter, tmp_path / "anonymous")
    return tmp_path / "anonymous"


def test_what_has_no_sum_is_refused():
    plain, base = Adapter({"a": layer(1)}), {"h.weight": torch.ones(1)}
    other = Adapter({"a": layer(2)})
    head = Adapter({}, {"h.weight": torch.zeros(1)}, ["h"])
    dora = Adapter({"a": LayerAdapter(*layer(3).tensors.values(), 1.0, magnitude=torch.ones(6))})
    inside = Adapter({"h": layer(4)})
    known = [Adapter({"a": layer(5 + i)}, metadata={"base_id": str(i) * 64}) for i in range(2)]
    for adapters, weights, words in (
        ([plain, other], None, "2 adapters need --weights, one number each, such as --weights 0.5 0.5"),
        ([plain, other], [1.0], "--weights has 1 numbers for 2 adapters"),
        ([plain, other], [1.0, float("nan")], "the weight of n1 is nan: give a finite number"),
        ([plain, other], [0.0, 1.0], "the weight of n0 is 0"),
        ([plain, plain], [0.5, 0.5], "n0 and n1 are the same adapter: give it once, with the summed weight"),
        ([plain, dora], [0.5, 0.5], "n1 is DoRA, whose magnitudes cannot be summed"),
        ([dora], [0.5], "n0 is DoRA"),
        ([head, Adapter({}, {"h.weight": torch.ones(1)}, ["h"])], [0.5, 0.5], "n0 trained h.weight in full, and n1 "),
        ([inside, head], [0.5, 0.5], "n1 trained h.weight in full, and n0 changes it too"),
        (known, [0.5, 0.5], "n0 and n1 were trained on different bases .sha256 000000000000, sha256 111111111111."),
    ):
        with pytest.raises(UserError, match=words):
            combine(adapters, weights, base, [f"n{i}" for i in range(len(adapters))])


def test_the_command_line_and_its_record(folder, tmp_path, repository, run_python):
    done = run_python(
        [
            repository / "tools/merge_lora.py",
            "--base",
            folder / "base.pt",
            "--adapter",
            folder / "one",
            folder / "three",
            "--weights",
            "0.7",
            "-0.3",
            "--out",
            "m.safetensors",
            "--dtype",
            "bfloat16",
            "--verify",
            NANO,
        ],
        cwd=tmp_path,
        check=True,
    )
    assert f"merged   {folder / 'three'}, times -0.3" in done.stdout and "the effect of bfloat16" in done.stdout
    record = json.loads((tmp_path / "m.safetensors.json").read_text())
    assert [entry["weight"] for entry in record["adapters"]] == [0.7, -0.3]
    assert record["result"]["dtypes"] == ["bfloat16"] and record["verify"]["flipped"] < 0.05
