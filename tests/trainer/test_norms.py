"""The cheap baseline for LoRA, layer norms only: stock loads its weights; evaluated and reported as any run."""

import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from helpers.small_runs import environment, train_here
from sam2_lora_ext.adapters.weights import read_weights
from sam2_lora_ext.evaluate.models import build, candidate
from sam2_lora_ext.host.configs import config_root
from sam2_lora_ext.report.collect import read_run
from sam2_lora_ext.report.page import render

TRAINABLE = OmegaConf.load(config_root() / "configs/severstal_norms.yaml").lora.trainable
NORMS = ("lora.targets=[]", f"lora.trainable=[{','.join(TRAINABLE)}]", "scratch.steps=4")
NOTHING_MISSING = "trainer.checkpoint.model_weight_initializer.ignore_missing_keys=null"


@pytest.fixture(scope="module")
def run(tmp_path_factory, nano_base, strips) -> Path:
    folder = tmp_path_factory.mktemp("norms") / "run"
    train_here(environment(nano_base, strips, folder), *NORMS, NOTHING_MISSING)
    return folder


def test_only_norms_changed_and_stock_loads_them(run, nano_base):
    from sam2.build_sam import build_sam2

    model = build_sam2("configs/sam2_nano.yaml", str(run / "weights/final.pt"), device="cpu")
    base, final = read_weights(nano_base), read_weights(run / "weights/final.pt")
    norms = {name for name, module in model.named_modules() if isinstance(module, torch.nn.LayerNorm)}
    changed = {key for key in base if not torch.equal(base[key], final[key])}
    assert changed == {f"{name}.{kind}" for name in norms if "memory" not in name for kind in ("weight", "bias")}


def test_it_is_evaluated_and_reported(run):
    _, facts = build(candidate(str(run)))
    assert facts["trained_parameters"] == read_run(run).lora["trained"] < 5000 and facts["adapter"] is None
    page = render([read_run(run)], [])
    assert "modules in full" in page and "relative to the base" in page and "Update by block" in page
    assert read_run(run).name.startswith("sam2_nano_modules_lr")


def test_the_initializer_s_glob_of_adapters_is_named(nano_base, strips, tmp_path, capfd):
    with pytest.raises(SystemExit) as stop:
        train_here(environment(nano_base, strips, tmp_path / "run"), *NORMS)
    said = capfd.readouterr().err
    assert stop.value.code == 2 and re.search("ignore_missing_keys: param_names .*lora_.* set it to null", said)
    assert "Traceback" not in said
