"""Which module and which folder of the package imports which, read from the source."""

import ast
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

PACKAGE = "sam2_lora_ext"
ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / PACKAGE).is_dir())
HOST = {"sam2", "training", "hydra", "omegaconf"}
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
