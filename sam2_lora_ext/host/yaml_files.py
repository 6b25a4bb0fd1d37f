"""Checks YAML files of users and runs before they are loaded: limits on size, depth and repetition.

Ten lines of aliases of aliases can expand to a billion nodes. The YAML library first composes a graph, in which a
repeated node exists once, so the expanded nodes are counted there.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.files import read_text

LARGEST = 1 << 20  # bytes; the largest config of SAM 2 or ours has under 20,000
MOST_NODES = 100_000
DEEPEST = 100


def check_yaml(path: str | Path) -> yaml.Node | None:
    """The node graph of a YAML file; None for an empty one.

    Raises:
        UserError: the file cannot be read, is not YAML, or expands to more than `MOST_NODES` nodes or `DEEPEST` levels.
    """
    text = read_text(path, LARGEST)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        nodes, depth = _size(root, {}) if root is not None else (0, 0)
    except RecursionError as error:
        raise UserError(f"{path} is nested too deep, more than {DEEPEST} levels, or contains itself") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if nodes > MOST_NODES or depth > DEEPEST:
        raise UserError(
            f"{path} expands to more than {MOST_NODES:,} values or {DEEPEST} levels, by aliases (*name) that repeat "
            "each other or by nesting; write it out"
        )
    return root


def load_yaml(path: str | Path) -> Any:
    """The content of a YAML file as OmegaConf's container, its interpolations unresolved; raises as `check_yaml`."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    check_yaml(path)
    try:
        return OmegaConf.load(path)
    except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path} is not a valid config: {' '.join(str(error).split())}") from error


def check_config(name: str, folder: Path) -> None:
    """Checks a user's config in `folder`, and the files of its defaults there, before Hydra reads them.

    Raises:
        UserError: as `check_yaml`.
    """
    waiting, seen = [folder / name], set()
    while waiting:
        file = waiting.pop()
        if file in seen or not file.is_file():  # other files are in SAM 2's or this project's folder
            continue
        seen.add(file)
        root = check_yaml(file)
        for key, value in root.value if isinstance(root, yaml.MappingNode) else ():
            if key.value == "defaults":
                waiting += [near / f"{entry}.yaml" for near in (folder, file.parent) for entry in _names(value)]


def _names(node: yaml.Node) -> Iterator[str]:
    """The files that an entry of a defaults list may name: `name`, `/group/name@package`, `group: name`."""
    if isinstance(node, yaml.ScalarNode):
        yield node.value.partition("@")[0].strip("/ ").removesuffix(".yaml")
    elif isinstance(node, yaml.SequenceNode):
        for entry in node.value:
            yield from _names(entry)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            group = next(iter(_names(key)), "").split(" ")[-1].strip("/")
            yield from (f"{group}/{name}" for name in _names(value))


def _size(node: yaml.Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """(nodes, depth) of an expanded node; a node inside itself counts as too deep nesting."""
    if id(node) not in known:
        known[id(node)] = None
        pairs = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = [part for entry in pairs for part in (entry if isinstance(entry, tuple) else (entry,))]
        sizes = [_size(part, known) for part in parts]
        known[id(node)] = 1 + sum(nodes for nodes, _ in sizes), 1 + max((depth for _, depth in sizes), default=0)
    found = known[id(node)]
    if found is None:
        raise RecursionError
    return found
