"""DoRA, PiSSA, LoRA-FA and LoRA+ through the stock Trainer: they train, resume to the bit, merge into stock keys."""

import json

import pytest
import torch
from hydra.utils import instantiate
from training.trainer import unwrap_ddp_if_wrapped

from helpers.kills import Killed, assert_same_run, kill_at
from helpers.small_runs import config_of, environment, rank_environment, train_here
from helpers.stock_models import NANO
from sam2_lora_ext.adapters.merge import merge_files
from sam2_lora_ext.adapters.peft import load_adapter
from sam2_lora_ext.adapters.sources import read_adapter
from sam2_lora_ext.adapters.weights import read_weights
from sam2_lora_ext.deploy.verify import compare_merged
from sam2_lora_ext.lora import Adapter, lora_layers
from sam2_lora_ext.trainer import LoRATrainer

VARIANTS = {
    "dora": ("lora.variant=dora",),
    "pissa": ("lora.variant=pissa", "lora.qkv_parts=[q,v]"),
    "fa": ("lora.freeze_a=true",),
}


@pytest.mark.parametrize(
    "settings",
    [VARIANTS["dora"], *(pytest.param(v, marks=pytest.mark.slow) for v in [*VARIANTS.values()][1:])],
    ids=VARIANTS,
)
def test_trains_resumes_exactly_and_merges(settings, tmp_path, nano_base, strips, monkeypatch):
    whole, run = tmp_path / "whole", tmp_path / "run"
    settings = ("lora.dropout=0.1", "trainer.export.flat_files=true", *settings)
    trainer = train_here(environment(nano_base, strips, whole), *settings)
    model = unwrap_ddp_if_wrapped(trainer.model)
    layers = dict(lora_layers(model))
    for key in next(iter(layers.values())).adapter_parameters():
        if key == "lora_a" and "lora.freeze_a=true" in settings:
            assert not any(layer.lora_a.requires_grad for layer in layers.values())
        else:
            assert all(layer.get_parameter(key).grad.any() for layer in layers.values()), key
    env = environment(nano_base, strips, run)
    with monkeypatch.context() as patch:
        kill_at(patch, LoRATrainer, "run_val", 1, False)
        with pytest.raises(Killed):
            train_here(env, *settings)
    train_here(env, *settings)
    assert_same_run(run, whole)

    adapter, expected = load_adapter(whole / "adapters/final"), Adapter.from_model(model)
    (flat,) = whole.glob("*/final_lora_step*.torch")
    for found in (adapter, read_adapter(whole / "checkpoints/checkpoint.pt"), read_adapter(flat)):
        assert found.layers.keys() == layers.keys()
        for name, layer in expected.layers.items():
            assert all(torch.equal(value, found.layers[name].tensors[key]) for key, value in layer.tensors.items())
    merged = merge_files(nano_base, whole, tmp_path / "merged.pt")
    assert read_weights(tmp_path / "merged.pt").keys() == read_weights(nano_base).keys()
    comparison = compare_merged(tmp_path / "merged.pt", nano_base, merged.adapter, NANO)
    assert comparison.passed and comparison.max_abs_weight_diff < 1e-6


def test_the_run_says_which_variant(tmp_path, nano_base, strips):
    train_here(environment(nano_base, strips, tmp_path), "lora.variant=dora", "scratch.steps=2")
    assert json.loads((tmp_path / "lora.json").read_text())["config"]["variant"] == "dora"


def test_lora_plus_gives_b_its_own_rate(tmp_path, nano_base, strips):
    """The options of configs/severstal_lora_plus.yaml on the small model: both rates arrive, all along the schedule."""
    env = environment(nano_base, strips, tmp_path)
    config = config_of(env)
    config.trainer.optim.options.lr = config_of(env, name="configs/severstal_lora_plus.yaml").trainer.optim.options.lr
    with rank_environment(env):
        trainer = instantiate(config.trainer, _recursive_=False)
        trainer.run()
    names = {id(value): name for name, value in unwrap_ddp_if_wrapped(trainer.model).named_parameters()}
    optim = trainer.optim
    groups = [{names[id(value)] for value in group["params"]} for group in optim.optimizer.param_groups]
    assert {name for name in names.values() if name.endswith(".lora_b")} == groups[1] and len(groups) == 2
    for where in (0.0, 0.03, 0.05, 0.5, 0.99):
        optim.step_schedulers(where, 0)
        slow, fast = (group["lr"] for group in optim.optimizer.param_groups)
        assert slow > 0 and fast == 16 * slow
    summary = json.loads((tmp_path / "training_summary.json").read_text())
    assert summary["learning_rate"] == pytest.approx(2e-4, rel=0.01)  # the peak is between two of 200 points
