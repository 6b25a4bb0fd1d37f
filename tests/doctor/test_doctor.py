"""The doctor finds every planted error, names it and its fix; a valid training is green."""

import json

import doctor as tool
import pytest
import torch

from helpers.doctor_cases import find, only, place  # noqa: F401
from helpers.small_runs import QUICK
from sam2_lora_ext.doctor.config import check_keys, check_targets, resolve
from sam2_lora_ext.doctor.examine import examine
from sam2_lora_ext.doctor.findings import green, guarded, red, root_cause, to_json, yellow
from sam2_lora_ext.host.compose import load
from sam2_lora_ext.utils.errors import UserError

# ---- a sound training -----------------------------------------------------------------------------------------------


def test_a_sound_training_is_green_and_leaves_nothing_behind(place, capsys):
    assert tool.main(["-c", "demo", *QUICK]) == 0
    out = capsys.readouterr().out
    for word in ("environment", "config", "checkpoint", "adapters", "data", "step", "disk"):
        assert f"  {word}" in out
    assert "all 48 adapters get a gradient" in out and "configs/sam2_nano.yaml" in out and "images decode" in out
    assert "FAIL" not in out and not place.exists()


def test_json_and_exit_code(place, capsys):
    assert tool.main(["-c", "demo", "lora.targets=[nothing.*]", "--no-step", "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert not result["ok"] and result["counts"]["red"] == 1
    assert all(set(row) == {"level", "area", "text", "advice"} for row in result["findings"])


def test_without_a_config_the_environment_is_looked_at():
    findings = list(examine(None))
    assert {finding.area for finding in findings} == {"environment", "disk"}
    assert {finding.level for finding in findings} == {"green"}
    assert all(any(word in finding.text for finding in findings) for word in ("CUDA", "shared memory", "ports in"))


# ---- planted in the config ------------------------------------------------------------------------------------------


def test_no_such_config_and_no_such_key(place):
    only([finding for finding in examine("sevrstal_lora") if finding.level == "red"], "severstal_lora.yaml")
    only(find("lora.rnak=4"), "did you mean lora.rank")


def test_a_target_that_does_not_exist(place):
    findings = find("trainer.model._target_=sam2_lora_ext.model.NoSuchModel")
    assert (
        "sam2_lora_ext.model.NoSuchModel cannot be imported" in findings[0].text and "NoSuchModel" in findings[0].text
    )


def test_the_real_cause_of_a_target(tmp_path, monkeypatch):
    (tmp_path / "planted_module.py").write_text("import another_that_is_not_there\nclass Thing: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    finding = only(
        [f for f in check_targets({"a": {"_target_": "planted_module.Thing"}})],
        "a._target_",
        "another_that_is_not_there",
    )
    assert finding.level == "red"
    assert resolve("sam2_lora_ext.data.kaggle.KaggleReader").__name__ == "KaggleReader"
    assert resolve("torch.optim.AdamW") is torch.optim.AdamW
    with pytest.raises(AttributeError):
        resolve("sam2_lora_ext.utils.errors.Nothing")


def test_a_glob_that_hits_nothing(place):
    only(find("lora.targets=[image_encoder.trunk.blocks.*.attn.qvk]"), "qvk")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("dataset.root=/nowhere", ["trainer.data", "/nowhere/train_images"]),
        (
            "trainer.checkpoint.model_weight_initializer.state_dict.checkpoint_path=/nowhere/base.pt",
            ["checkpoint_path", "/nowhere/base.pt"],
        ),
        ("dataset.split_file=/nowhere/split.csv", ["split_file"]),
    ],
)
def test_a_path_that_does_not_exist(place, override, words):
    findings = [finding for finding in find(override) if "does not exist" in finding.text and finding.area == "config"]
    assert findings
    for word in words:
        assert any(word in finding.text for finding in findings)


def test_keys_that_do_not_fit(place):
    config = load("demo", [])
    assert [finding.level for finding in check_keys(config)] == ["green"]
    config["trainer"]["meters"]["val"] = {"steel": config["trainer"]["meters"]["val"]["severstal"]}
    only(list(check_keys(config)), "trainer.meters.val has steel", "name it severstal")
    config = load("demo", [])
    config["trainer"]["loss"] = {"all": config["trainer"]["loss"]["severstal"]}
    assert len([finding for finding in check_keys(config) if "trainer.loss has all" in finding.text]) == 2
    config["trainer"]["data"]["val"]["collate_fn"]["dict_key"] = "all"
    assert any("which the Trainer refuses" in finding.text for finding in check_keys(config))


def test_a_run_that_is_there_already_and_a_folder_that_cannot_be_written(place):
    (place / "checkpoints").mkdir(parents=True)
    (place / "checkpoints/checkpoint.pt").touch()
    assert any("unfinished run" in finding.text for finding in find(level="yellow"))
    (place / "training_summary.json").touch()
    assert any("finished run, which will not" in finding.text for finding in find(level="yellow"))
    (place.parent / "file").touch()
    found = find(f"launcher.experiment_log_dir={place.parent}/file/run")
    assert any("cannot be written" in finding.text for finding in found)


def test_a_config_of_stock_sam2_is_looked_at_too(tmp_path, monkeypatch):
    """Its run folder is null, its data set another; nothing of it is here, but every line is a sentence."""
    monkeypatch.chdir(tmp_path)
    name = "configs/sam2.1_training/sam2.1_hiera_b+_MOSE_finetune.yaml"
    findings = list(examine(name, ["trainer.accelerator=cpu"], step=False))
    assert {finding.area for finding in findings} == {"environment", "config", "adapters", "data", "disk"}
    assert any(f"the run will be written to {tmp_path / 'sam2_logs'}" in finding.text for finding in findings)
    reds = [finding.text for finding in findings if finding.level == "red"]
    assert sum("which does not exist" in text for text in reds) == 2 and not any("Traceback" in text for text in reds)


# ---- how it is said -------------------------------------------------------------------------------------------------


def test_findings():
    rows = [green("a", "x"), yellow("b", "y", "look"), red("c", "z", "mend")]
    assert to_json(rows)["counts"] == {"green": 1, "yellow": 1, "red": 1} and not to_json(rows)["ok"]

    def broken():
        yield green("a", "before")
        try:
            raise OSError("disk on fire")
        except OSError as error:
            raise RuntimeError("could not") from error

    found = list(guarded("a", broken, "call someone"))
    assert [finding.level for finding in found] == ["green", "red"] and found[1].text == "OSError: disk on fire"
    assert root_cause(UserError("a sentence")) == "a sentence"
