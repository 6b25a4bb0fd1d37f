"""Summary of the trained layers, per group of the model, with ranks, parameters and their share."""

from collections.abc import Iterator, Set
from typing import Any

from torch import nn

from sam2_lora_ext.lora.layer import LoRALinear

GROUPS = ("encoder attention", "encoder mlp", "decoder attention", "decoder mlp", "memory attention", "other")
FULL = "full modules"


def group_of(name: str) -> str:
    """The part of SAM 2 that the layer `name` belongs to, one of `GROUPS`."""
    if name.startswith("memory_attention."):
        return "memory attention"
    for start, part in (("image_encoder.", "encoder"), ("sam_mask_decoder.transformer.", "decoder")):
        if name.startswith(start):
            kinds = name.removeprefix(start).split(".")[:-1]
            if any("attn" in kind for kind in kinds):
                return f"{part} attention"
            if "mlp" in kinds:
                return f"{part} mlp"
    return "other"


def full_modules(model: nn.Module, trained: Set[str] | None = None) -> list[str]:
    """The outermost modules without adapters whose parameters are all trained; `""` is the model itself.

    Args:
        model: with or without adapters.
        trained: names of the trained parameters; by default those with `requires_grad`.
    """
    trained = _trained(model) if trained is None else trained

    def search(name: str, module: nn.Module) -> Iterator[str]:
        parameters = [f"{name}.{key}".lstrip(".") for key, _ in module.named_parameters()]
        if not any(parameter in trained for parameter in parameters) or isinstance(module, LoRALinear):
            return
        adapted = any(isinstance(inner, LoRALinear) for inner in module.modules())
        if not adapted and all(parameter in trained for parameter in parameters):
            yield name
        else:
            for key, child in module.named_children():
                yield from search(f"{name}.{key}".lstrip("."), child)

    return list(search("", model))


def report(model: nn.Module, trained: Set[str] | None = None) -> dict[str, Any]:
    """The trained layers and parameters, as plain values for JSON.

    Args:
        model: with or without adapters.
        trained: names of the trained parameters; by default those with `requires_grad`.

    Returns:
        `groups`: group -> {`layers`: names, `ranks`: the different ranks, `trained` and `total` parameters of these
        layers with their adapters, `share` = trained / total}, without the groups that have none; `trained`, `total`
        and `share` of the whole model, which count parameters outside the groups too.
    """
    trained = _trained(model) if trained is None else trained
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    members: dict[str, list[str]] = {group: [] for group in (*GROUPS, FULL)}
    ranks: dict[str, set[int]] = {group: set() for group in members}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            members[group_of(name)].append(name)
            ranks[group_of(name)].add(module.rank)
    members[FULL] = full_modules(model, trained)
    groups = {}
    for group, names in members.items():
        inside = [key for name in names for key in sizes if not name or key.startswith(f"{name}.")]
        if names:
            groups[group] = {"layers": names, "ranks": sorted(ranks[group]), **_counts(sizes, inside, trained)}
    return {"groups": groups, **_counts(sizes, list(sizes), trained)}


def format_report(facts: dict[str, Any]) -> str:
    """The report as a text table, one line a group and one for the whole model."""
    rows = [("group", "layers", "rank", "trained", "of", "share")]
    for group, row in facts["groups"].items():
        rows.append((group, str(len(row["layers"])), ",".join(map(str, row["ranks"])) or "-", *_cells(row)))
    rows.append(("whole model", "", "", *_cells(facts)))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(
            (cell.ljust if column == 0 else cell.rjust)(width) for column, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    )


def _trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def _counts(sizes: dict[str, int], names: list[str], trained: Set[str]) -> dict[str, Any]:
    total = sum(sizes[name] for name in names)
    learned = sum(sizes[name] for name in names if name in trained)
    return {"trained": learned, "total": total, "share": learned / total if total else 0.0}


def _cells(counts: dict[str, Any]) -> tuple[str, str, str]:
    return f"{counts['trained']:,}", f"{counts['total']:,}", f"{counts['share']:.2%}"
