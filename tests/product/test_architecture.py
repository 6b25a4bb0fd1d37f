"""docs/architecture.md against the package: its folders, what each imports, and the classes that a training swaps.

When a table is out of date, the failure prints the one that is right.
"""

import ast
import re
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from helpers.small_runs import make_model

PACKAGE = "sam2_lora_ext"
ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / PACKAGE).is_dir())
TEXT = (ROOT / "docs/architecture.md").read_text()
HOST = {"sam2", "training", "hydra", "omegaconf"}
HEADER = "| folder | imports | SAM 2 or Hydra |\n|---|---|---|\n"
Graph = dict[str, set[str]]
Nodes = Callable[[ast.AST], Iterator[ast.AST]]


def modules() -> dict[str, Path]:
    """All modules below the package by their dotted name in it; a folder is its `__init__`."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    del found[""]  # the package's own names, which nothing in it imports
    return found


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when a module is imported: none inside a function, nor what only type checkers read."""
    for child in ast.iter_child_nodes(node):
        later = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if not later and not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            yield child
            yield from at_import(child)


@lru_cache
def imports_of(path: Path, nodes: Nodes = ast.walk) -> tuple[str, ...]:
    """What a file imports as dotted names, anywhere in it or in what `nodes` gives; relative imports are not used."""
    found: list[str] = []
    for node in nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            found += (f"{node.module}.{alias.name}" for alias in node.names)
    return tuple(found)


@lru_cache
def module_graph(nodes: Nodes = ast.walk) -> Graph:
    """Which modules of the package each module imports."""
    known = modules()
    graph: Graph = {name: set() for name in known}
    for name, path in known.items():
        for imported in imports_of(path, nodes):
            inner = imported.removeprefix(f"{PACKAGE}.")
            while inner and inner != imported and inner not in known:
                inner = inner.rpartition(".")[0]
            if inner in known and inner != name:
                graph[name].add(inner)
    return graph


def folder_of(module: str) -> str:
    """The first part of a module's name: a folder, or a module on top of the package."""
    return module.partition(".")[0]


def folder_graph() -> Graph:
    graph: Graph = {folder_of(name): set() for name in modules()}
    for name, imported in module_graph().items():
        graph[folder_of(name)] |= {folder_of(other) for other in imported} - {folder_of(name)}
    return graph


def needs_host(folder: str) -> bool:
    """Whether importing a file of the folder imports SAM 2 or Hydra."""
    files = [path for name, path in modules().items() if folder_of(name) == folder]
    return any(imported.partition(".")[0] in HOST for path in files for imported in imports_of(path, at_import))


def ordered(graph: Graph) -> list[str]:
    """The folders, each after those that it imports; by name if there is a choice, or in an import cycle."""
    sorter, done = TopologicalSorter(graph), []
    try:
        sorter.prepare()
    except CycleError:
        return sorted(graph)
    while ready := sorter.get_ready():
        done += sorted(ready)
        sorter.done(*ready)
    return done


def folder_table() -> str:
    """The table of docs/architecture.md as it has to be."""
    graph = folder_graph()
    rows = [
        f"| `{name}` | {', '.join(f'`{other}`' for other in sorted(graph[name])) or '-'} "
        f"| {'yes' if needs_host(name) else 'no'} |\n"
        for name in ordered(graph)
    ]
    return HEADER + "".join(rows)


def first_column(header: str) -> list[str]:
    """The names in backticks of the first column of the table with this header."""
    table = TEXT.split(header, 1)[1].split("\n\n")[0]
    return [name for row in table.splitlines()[2:] for name in re.findall(r"`([\w./]+)`", row.split("|")[1])]


def test_the_table_of_imports_is_right():
    expected = folder_table()
    assert expected in TEXT, f"put this table into docs/architecture.md:\n\n{expected}"


def test_every_folder_is_described():
    described = [name.removesuffix("/").removesuffix(".py") for name in first_column("| folder or module | holds |")]
    assert sorted(described) == sorted(folder_graph())


@pytest.mark.parametrize("graph", [lambda: module_graph(at_import), folder_graph], ids=["modules", "folders"])
def test_imports_run_one_way(graph):
    """Folders with all imports; modules with those that run at import: two may need each other later."""
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        circle = " <- ".join(error.args[1])
        edges = sorted(
            f"{name} imports {other}"
            for name, others in module_graph().items()
            for other in others
            if {folder_of(name), folder_of(other)} <= {folder_of(member) for member in error.args[1]}
            and folder_of(name) != folder_of(other)
        )
        pytest.fail(f"a circle: {circle}\n" + "\n".join(edges), pytrace=False)


@pytest.mark.parametrize("folder", ["lora", "adapters"])
def test_the_core_needs_no_host(folder):
    """Nor does anything that it imports."""
    graph, reached, queue = folder_graph(), set(), [folder]
    while queue:
        name = queue.pop()
        if name not in reached:
            reached.add(name)
            queue += graph[name]
    assert {name for name in reached if needs_host(name)} == set()


def test_no_script_hides_the_standard_library():
    """Python puts a script's folder first on the path, so a script's name is found before a module's."""
    assert {path.stem for path in (ROOT / "tools").glob("*.py")} & sys.stdlib_module_names == set()


def test_swapped_classes_are_those_of_the_page_and_keep_the_keys():
    stock = make_model(_target_="training.model.sam2.SAM2Train")
    ours = make_model(activations="low")
    theirs = dict(stock.named_modules())
    swapped = {
        type(theirs[name]).__name__
        for name, module in ours.named_modules()
        if name in theirs and type(module) is not type(theirs[name])
    }
    assert swapped - {"SAM2Train", "Linear"} == set(first_column("| class of SAM 2 or torch | its replacement |"))
    keys = {key: value.shape for key, value in ours.state_dict().items() if ".lora_" not in key}
    assert keys == {key: value.shape for key, value in stock.state_dict().items()}
    assert set(theirs) <= {name for name, _ in ours.named_modules()}
