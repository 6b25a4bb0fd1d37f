"""The doctor finds errors planted in the environment: packages, imports, GPU, shared memory, ports, disk."""

import shutil
import socket
from collections import namedtuple

import pytest
import torch

from helpers.doctor_cases import find, only, place  # noqa: F401
from sam2_lora_ext.doctor import environment
from sam2_lora_ext.doctor.examine import examine

Usage = namedtuple("Usage", "total used free")


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


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_folder_named_training_hides_sam2s_own(tmp_path, repository, run_python, kind):
    """In a folder of one's own projects `training` is a likely name; Python then looks no further."""
    (tmp_path / "training").mkdir()
    hidden = tmp_path / ("training/__init__.py" if kind == "folder" else "training.py")
    hidden.touch()
    done = run_python([repository / "tools/doctor.py"], env={"PYTHONPATH": str(tmp_path)}, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout.count("FAIL") == 1
    assert f"{hidden if kind == 'file' else tmp_path / 'training'} hides SAM 2's own training" in done.stdout
    assert "-> run from another folder" in done.stdout


def test_torchvision_of_another_release_is_recognised(monkeypatch):
    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(environment.importlib, "import_module", broken)
    only(list(environment.check_imports()), "requirements.txt")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_wanted_and_not_there(place):
    only(find("trainer.accelerator=cuda"), "needs CUDA", "trainer.accelerator=cpu")
    findings = find("trainer.accelerator=cuda", level="yellow", step=True)
    assert ["the step was skipped" in finding.text for finding in findings if finding.area == "step"] == [True]


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
    little = lambda path: Usage(1, 1, 1000) if str(path) == "/dev/shm" else disk_usage(path)
    monkeypatch.setattr(environment.shutil, "disk_usage", little)
    only(find("scratch.num_workers=4"), "shared memory", "--shm-size")
    assert not find()  # without workers none is needed
    only([finding for finding in examine(None) if finding.level == "red"], "shared memory", "--shm-size")
    only(list(environment.check_shared_memory(None, "/nowhere")), "no /nowhere", "num_workers=0")


def test_no_port_is_free(place):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        only(find(f"submitit.port_range=[{port},{port}]"), "no port", "submitit.port_range")


def test_too_little_disk(place, monkeypatch):
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda path: Usage(1, 1, 10**6))
    only(find(), "disk", "launcher.experiment_log_dir")
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda path: Usage(1, 1, 10**8))
    assert [finding.area for finding in find(level="yellow")].count("disk") == 1
