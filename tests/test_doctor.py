"""The doctor finds every planted fault, names it, and says what to do; a sound training is green."""

import json
import shutil
import socket
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from sam2_lora_ext.doctor import environment
from sam2_lora_ext.doctor.config import check_keys, check_targets, load, resolve
from sam2_lora_ext.doctor.examine import examine
from sam2_lora_ext.doctor.findings import green, guarded, red, root_cause, to_json, yellow
from sam2_lora_ext.errors import UserError
from doctor_cases import find, only, place  # noqa: F401
from small_runs import QUICK

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import doctor as tool  # noqa: E402

Usage = namedtuple("Usage", "total used free")


# ---- a sound training -----------------------------------------------------------------------------------------------


def test_a_sound_training_is_green_and_leaves_nothing_behind(place, capsys):
    assert tool.main(["-c", "demo", *QUICK]) == 0
    out = capsys.readouterr().out
    for word in (
        "environment",
        "config",
        "checkpoint",
        "adapters",
        "data",
        "step",
        "disk",
        "all 48 adapters get a gradient",
        "configs/sam2_nano.yaml",
    ):
        assert word in out
    assert "FAIL" not in out and not place.exists()


def test_json_and_exit_code(place, capsys):
    assert tool.main(["-c", "demo", "lora.targets=[nothing.*]", "--no-step", "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert not result["ok"] and result["counts"]["red"] == 1
    assert all(set(row) == {"level", "area", "text", "advice"} for row in result["findings"])


def test_without_a_config_the_environment_is_looked_at():
    findings = list(examine(None))
    assert {finding.area for finding in findings} == {"environment", "disk"} and {
        finding.level for finding in findings
    } == {"green"}


# ---- planted in the environment -------------------------------------------------------------------------------------


def test_a_missing_and_an_old_package_and_python():
    def version(name: str) -> str | None:
        return {"hydra-core": None, "numpy": "1.20.0"}.get(name, environment.installed_version(name))

    findings = list(environment.check_packages(version, python=(3, 10, 4)))
    assert [(finding.level, finding.text.split()[0]) for finding in findings if finding.level != "green"] == [
        ("red", "Python"),
        *sorted([("yellow", "numpy"), ("red", "the")], key=lambda row: row[0] != "yellow"),
    ]
    assert any("hydra-core is not installed" in finding.text for finding in findings)


def test_a_broken_sam2_is_shown_with_its_real_cause(tmp_path, repository, run_python):
    (tmp_path / "sam2").mkdir()
    (tmp_path / "sam2/__init__.py").write_text("raise ImportError('libGL.so.1: cannot open shared object file')")
    done = run_python([repository / "tools/doctor.py", "-c", "demo"], env={"PYTHONPATH": str(tmp_path)}, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout.count("FAIL") == 1
    assert "import sam2.build_sam fails" in done.stdout and "libGL.so.1" in done.stdout


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("import a_package_that_is_not_there", ["a_package_that_is_not_there", "pip install"]),
        ("import sam2.nothing_of_the_kind", ["install SAM 2 with its training code"]),
        (
            "raise RuntimeError('likely running Python from the parent directory of the sam2 repository')",
            ["another folder"],
        ),
        (
            "try:\n    1 / 0\nexcept ZeroDivisionError as error:\n    raise ImportError('outside') from error",
            ["ZeroDivisionError: division by zero"],
        ),
    ],
)
def test_other_causes_and_what_to_do(tmp_path, monkeypatch, content, words):
    (tmp_path / "planted_import.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    only(list(environment.check_imports(("planted_import",))), *words)


def test_torchvision_of_another_release_is_recognised(monkeypatch):
    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(environment.importlib, "import_module", broken)
    only(list(environment.check_imports()), "requirements.txt")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_wanted_and_not_there(place):
    only(find("trainer.accelerator=cuda"), "wants CUDA", "trainer.accelerator=cpu")


def test_too_many_gpus_asked_for_and_no_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    config = {
        "trainer": {"accelerator": "cuda", "optim": {"amp": {"enabled": True, "amp_dtype": "bfloat16"}}},
        "launcher": {"gpus_per_node": 4},
    }
    levels = [(finding.level, finding.text) for finding in environment.check_gpu(config)]
    assert [level for level, _ in levels] == ["green", "red", "yellow"] and "there are 2 GPUs" in levels[1][1]


def test_too_little_shared_memory(place, monkeypatch):
    disk_usage = shutil.disk_usage
    monkeypatch.setattr(
        environment.shutil,
        "disk_usage",
        lambda path: Usage(1, 1, 1000) if str(path) == "/dev/shm" else disk_usage(path),
    )
    only(find("scratch.num_workers=4"), "shared memory", "--shm-size")
    assert not find()  # without workers none is needed


def test_no_port_is_free(place):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        only(find(f"submitit.port_range=[{port},{port}]"), "no port", "submitit.port_range")
    only(find("submitit.port_range=[65000,100]"), "no range of ports")


def test_too_little_disk(place, monkeypatch):
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda path: Usage(1, 1, 10**6))
    only(find(), "disk", "launcher.experiment_log_dir")
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda path: Usage(1, 1, 10**8))
    assert [finding.area for finding in find(level="yellow")].count("disk") == 1


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
        resolve("sam2_lora_ext.errors.Nothing")


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
