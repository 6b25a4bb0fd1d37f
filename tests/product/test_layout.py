"""The layout: the core needs torch alone, files are short, tests stand by themselves; imports: test_architecture.py."""

import pytest

from helpers.imports import PACKAGE, ROOT, folder_graph, imports_of

CORE = ("lora", "adapters", "utils")  # torch and safetensors only
HOST = {"sam2", "training", "hydra", "omegaconf", "iopath", "fvcore", "submitit", "torchvision", "cv2", "PIL"}
LONGEST = 250


@pytest.mark.parametrize("name", CORE)
def test_the_core_needs_torch_alone(name):
    """Nothing of SAM 2 is imported in it, in no function either, nor a folder outside of the core."""
    for path in (ROOT / PACKAGE / name).glob("*.py"):
        outside = {module.split(".")[0] for module in imports_of(path)} & HOST
        assert not outside, f"{path} imports {outside}"
    assert folder_graph()[name] <= set(CORE)


def test_files_are_short():
    folders = (PACKAGE, "tools", "benchmarks")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def test_no_test_imports_another():
    for path in (ROOT / "tests").rglob("*.py"):
        assert not [part for name in imports_of(path) for part in name.split(".") if part.startswith("test_")], path
