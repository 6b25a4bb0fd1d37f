"""docs/architecture.md against the package: its folders, what each imports, and the classes that a training swaps.

When a table is out of date, the failure prints the one that is right.
"""

import re
import sys
from graphlib import CycleError, TopologicalSorter

import pytest

from helpers.imports import ROOT, Graph, at_import, folder_graph, folder_of, module_graph, needs_host
from helpers.small_runs import make_model

TEXT = (ROOT / "docs/architecture.md").read_text()
HEADER = "| folder | imports | SAM 2 or Hydra |\n|---|---|---|\n"


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
