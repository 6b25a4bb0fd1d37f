"""For tests of tools on a machine that lacks packages."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

BLOCKED = """
import sys, runpy
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
sys.argv = {argv}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_without(run_python: Any, names: Sequence[str], tool: Path, *args: object) -> Any:
    """Runs a tool in a Python where packages of these names cannot be imported; `run_python` is the fixture."""
    return run_python(["-c", BLOCKED.format(names=tuple(names), argv=[str(tool), *map(str, args)])])
