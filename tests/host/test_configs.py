"""Every config composes and builds for real: model, loss, meters, and the optimizer with all its globs."""

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from training.optimizer import construct_optimizer
from training.utils.train_utils import collect_dict_keys

from helpers.small_runs import rank_environment
from sam2_lora_ext.adapters.weights import ADAPTER_KEYS
from sam2_lora_ext.host.compose import compose, locate
from sam2_lora_ext.host.configs import config_root, known_configs
from sam2_lora_ext.lora import lora_layers
from sam2_lora_ext.lora.class_tokens import STATE_KEY

ROOT = config_root()
LEAVES = [name for name in known_configs() if (ROOT / name).is_file()]
HEAVY = [
    name for name in LEAVES if "severstal" in name and not any(size in name for size in ("tiny", "small", "base_plus"))
]


def composed(name: str, tmp_path: Path):
    with rank_environment({"SAM2_LORA_RUNS": str(tmp_path)}):
        config = compose(name, [])
        return OmegaConf.create(OmegaConf.to_container(config, resolve=True))


def test_the_configs_of_the_product_are_there():
    names = {Path(name).stem for name in LEAVES}
    wanted = {
        "severstal_lora",
        "severstal_lora_tiny",
        "severstal_lora_small",
        "severstal_lora_base_plus",
        "severstal_lora_2.0_large",
        "severstal_lora_r4",
        "severstal_lora_r16",
        "severstal_lora_all",
        "severstal_lora_decoder",
        "severstal_full",
        "severstal_norms",
        "demo",
    }
    assert wanted <= names


@pytest.mark.parametrize("name", LEAVES)
def test_a_leaf_is_short_and_its_header_is_its_command(name):
    text = (ROOT / name).read_text()
    body = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    assert text.startswith("# @package _global_\n") and len(body) < 30
    commands = re.findall(r"python \S+(?: training\.train| sam2_lora_ext\.train)? -c (\S+)", text)
    assert commands and all(locate(command) == (name, None) for command in commands)


@pytest.mark.parametrize("name", LEAVES)
def test_the_parts_fit_together(name, tmp_path):
    """The requirements of the Trainer's own checks and globs, without building the model."""
    trainer = composed(name, tmp_path).trainer
    assert not OmegaConf.missing_keys(trainer)
    keys = collect_dict_keys(trainer.data.val)
    assert keys == collect_dict_keys(trainer.data.train) == list(trainer.loss) == list(trainer.meters.val)
    for group in ("loss", "meters"):
        assert instantiate(trainer[group], _convert_="all")
    schedule = instantiate(trainer.optim.options, _convert_="all")["lr"][0]["scheduler"]
    peak = max(schedule(w / 1000) for w in range(1000))
    assert schedule(0.0) < peak and schedule(0.999) < peak and 1e-6 <= peak <= 1e-2
    assert trainer.checkpoint.model_weight_initializer.state_dict.checkpoint_path.endswith(".pt")
    assert trainer.run_dir and trainer.checkpoint.save_dir.startswith(trainer.run_dir)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in HEAVY[1:] else []) for name in LEAVES]
)
def test_it_builds_and_all_globs_match(name, tmp_path):
    """The model for real, the optimizer on it, and the strict load that the initializer will make."""
    trainer = composed(name, tmp_path).trainer
    model = instantiate(trainer.model, _convert_="all")
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    full = trainer.model.lora is None
    assert bool(list(lora_layers(model))) == (not full and bool(trainer.model.lora.targets))
    assert (len(trained) == len(list(model.parameters()))) == full
    optimizer = construct_optimizer(
        model, trainer.optim.optimizer, trainer.optim.options, trainer.optim.get("param_group_modifiers")
    ).optimizer
    assert isinstance(optimizer, torch.optim.AdamW)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    missing = trainer.checkpoint.model_weight_initializer.ignore_missing_keys or []
    state = set(model.state_dict())
    adapters = {key for key in state if any(fnmatch(key, glob) for glob in missing)}
    # class tokens need no glob: any load, stock's strict one too, may lack them
    assert adapters == {key for key in state if key.endswith(ADAPTER_KEYS)} - {STATE_KEY}
    for glob in missing:
        assert any(fnmatch(key, glob) for key in state), glob
