"""Renames weights and adapters of SAM 2 for Hugging Face transformers' `Sam2Model` and `Sam2VideoModel`, and back.

Both libraries have the same modules (the fused `qkv` of Hiera too) under different names, so renaming converts weights
and adapters in both directions. Two things differ: transformers has the four point embeddings as one matrix (4, C), and
two copies of the positional encoding's matrix. The names are those of transformers 5.24. Needs torch only.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from sam2_lora_ext.adapters.transformers_table import THEIR_POSITIONS, name_pairs
from sam2_lora_ext.lora.adapter_state import Adapter
from sam2_lora_ext.utils.errors import UserError

ENDS = (".weight", ".bias")
POINTS = "sam_prompt_encoder.point_embeddings.{}.weight"  # four of (1, C)
THEIR_POINTS = "prompt_encoder.point_embed.weight"  # (4, C)
THEIR_ROOTS = ("vision_encoder.", "mask_decoder.", "prompt_encoder.")  # no name of SAM 2 begins with these
APART = re.compile(r"vision_encoder\..*\.attn\.(?!qkv$|proj$)\w*(q|k|v|query|key|value)\w*")
DOWNSAMPLER = re.compile(r"memory_encoder\.mask_downsampler\.(?:encoder|layers)\.(\d+)")


class Names:
    """Renames in one direction; `names[...]` takes a module's or a tensor's name.

    Args:
        theirs: from transformers' names to SAM 2's, instead of the other way.
        downsamplings: see `name_pairs`.
    """

    def __init__(self, theirs: bool = False, downsamplings: int = 4):
        self.theirs = theirs
        self._plain: dict[str, str] = {}
        for ours, other in name_pairs(downsamplings).items():
            self._plain[other if theirs else ours] = ours if theirs else other

    @classmethod
    def of(cls, names: Iterable[str], theirs: bool = False) -> "Names":
        """The `Names` for the names of one model, whose mask downsampler may have another number of steps."""
        found = [int(match.group(1)) for name in names if (match := DOWNSAMPLER.match(name))]
        return cls(theirs, (max(found) + 1 if theirs else max(found) // 3) if found else 4)

    def get(self, name: str) -> str | None:
        """The other name; None for an unknown name."""
        end = next((end for end in ENDS if name.endswith(end)), "")
        for stem, rest in ((name, ""), (name.removesuffix(end), end)):
            for key, numbers in _with_stars(stem):
                if key in self._plain:
                    other = self._plain[key]
                    for number in numbers:
                        other = other.replace("*", number, 1)
                    return other + rest
        return None

    def __getitem__(self, name: str) -> str:
        """The other name.

        Raises:
            UserError: there is none.
        """
        if (other := self.get(name)) is not None:
            return other
        if self.theirs and APART.fullmatch(name.removesuffix(".weight").removesuffix(".bias")):
            raise UserError(
                f"{name} is no module of SAM 2, whose image encoder has query, key and value fused in one attn.qkv, as "
                "transformers 5.24 has it: an adapter with separate or otherwise fused ones cannot be carried over"
            )
        ours, other = ("transformers' Sam2Model", "SAM 2") if self.theirs else ("SAM 2", "transformers' Sam2VideoModel")
        raise UserError(f"{name} of {ours} has no counterpart in {other}: it cannot be carried over")


def speaks_transformers(names: Iterable[str]) -> bool:
    """Whether names of modules or tensors are transformers' and not SAM 2's; names that both have do not count."""
    ours, theirs = Names(), Names(theirs=True)
    return any(
        name.startswith(THEIR_ROOTS) or ours.get(name) is None and theirs.get(name) is not None for name in names
    )


def state_to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of SAM 2 under the names of `Sam2VideoModel`, which has all that `Sam2Model` has.

    The second copy of the positional encoding's matrix is not among them, see `THEIR_POSITIONS`.

    Raises:
        UserError: a tensor has no counterpart.
    """
    names, renamed = Names.of(state), {}
    points = [POINTS.format(number) for number in range(4)]
    joined = all(point in state for point in points)
    for key, value in state.items():
        if not joined or key not in points:
            renamed[names[key]] = value
    if joined:
        renamed[THEIR_POINTS] = torch.cat([state[point] for point in points])
    return renamed


def state_from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of `state_to_transformers`.

    Raises:
        UserError: a tensor has no counterpart, or the two copies of the positional encoding's matrix differ.
    """
    names, renamed = Names.of(state, theirs=True), {}
    first, second = (state.get(key) for key in THEIR_POSITIONS)
    if first is not None and second is not None and not torch.equal(first, second):
        raise UserError(f"{THEIR_POSITIONS[0]} and {THEIR_POSITIONS[1]} differ, and SAM 2 has one for both")
    for key, value in state.items():
        if key == THEIR_POINTS:
            renamed |= {POINTS.format(number): row for number, row in enumerate(value.split(1))}
        elif key != THEIR_POSITIONS[1]:
            renamed[names[key]] = value
    return renamed


def rename_adapter(adapter: Adapter, *, theirs: bool = False) -> Adapter:
    """An adapter for transformers' models from one for SAM 2, or with `theirs` the other way round.

    Raises:
        UserError: it changes a module that the other model lacks; the message names it.
    """
    names, rename = Names.of(adapter.full, theirs), state_from_transformers if theirs else state_to_transformers
    layers = {names[name]: layer for name, layer in adapter.layers.items()}
    modules = [names[module] for module in adapter.full_modules]
    return replace(adapter, layers=layers, full=rename(adapter.full), full_modules=modules)


def _with_stars(name: str) -> Iterator[tuple[str, list[str]]]:
    """A name with its first numbers, or none of them, replaced by `*`, and those numbers; fewest stars last."""
    parts = name.split(".")
    positions = [position for position, part in enumerate(parts) if part.isdecimal()]
    for count in range(len(positions), -1, -1):
        replaced = ["*" if position in positions[:count] else part for position, part in enumerate(parts)]
        yield ".".join(replaced), [parts[position] for position in positions[:count]]
