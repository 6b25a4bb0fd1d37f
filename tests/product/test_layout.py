"""The layout: imports run one way, the core needs torch alone, files are short, tests are independent."""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "sam2_lora_ext"
CORE = ("lora", "adapters", "utils")  # torch and safetensors only
HOST = {"sam2", "training", "hydra", "omegaconf", "iopath", "fvcore", "submitit", "torchvision", "cv2", "PIL"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def imported(path: Path, inside: bool = True) -> set[str]:
    """The modules that a file imports, in functions too or not; of this package the module that holds the name."""
    found, tree = set(), ast.parse(path.read_text())
    for node in ast.walk(tree) if inside else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return found


def folder(module: str) -> str:
    """`lora` for `sam2_lora_ext.lora.layer`; a module on top of the package counts by itself."""
    return module.split(".")[1] if "." in module else ""


def folder_graph() -> dict[str, set[str]]:
    """What each folder imports of the others; the package itself, whose names are made on access, is left out."""
    graph: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        ours = {folder(name) for name in imported(path) if name.startswith("sam2_lora_ext.")}
        if folder(module):
            graph.setdefault(folder(module), set()).update(ours - {folder(module), ""})
    return graph


def test_folders_import_one_way():
    tuple(graphlib.TopologicalSorter(folder_graph()).static_order())  # raises on a circle


def test_modules_import_one_way():
    """At their import; the kinds of settings look their table up when they check."""
    graph = {name: imported(path, inside=False) & MODULES.keys() - {name} for name, path in MODULES.items()}
    tuple(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("name", CORE)
def test_the_core_needs_torch_alone(name):
    for path in (PACKAGE / name).glob("*.py"):
        outside = {module.split(".")[0] for module in imported(path)} & HOST
        assert not outside, f"{path} imports {outside}"
    assert folder_graph().get(name, set()) <= set(CORE)


def test_files_are_short():
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "tools").glob("*.py")]
    long = {str(path.relative_to(ROOT)): count for path in files if (count := len(path.read_text().split("\n"))) > 251}
    assert not long


def test_no_tool_shadows_the_standard_library():
    assert not {path.stem for path in (ROOT / "tools").iterdir()} & set(sys.stdlib_module_names)


def test_no_test_imports_another():
    for path in (ROOT / "tests").rglob("*.py"):
        assert not {name for name in imported(path) if name.split(".")[-1].startswith("test_")}, path
