"""Results that backward computes again from what they were computed of, instead of keeping them.

Checkpointing computes a whole part of the model again, products included. Here each sum, norm and activation says how it was
made, and what another operation wanted to keep of it is made anew when backward asks for it: a few passes over memory.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

# Of the tensors that need not be kept, by their storage; each with its tensor, so that no other gets the same storage.
_running: ContextVar[dict[int, "tuple[Tensor, Recipe]"] | None] = ContextVar("recipes", default=None)


@dataclass(frozen=True)
class Recipe:
    """A function and its arguments, tensors or recipes of them, under the autocast that there was."""

    function: Callable[..., Tensor]
    sources: "tuple[Tensor | Recipe, ...]"
    autocast: Callable[[], torch.autocast]

    def make(self) -> Tensor:
        sources = [source.make() if isinstance(source, Recipe) else source for source in self.sources]
        with torch.no_grad(), self.autocast():
            return self.function(*sources)


@dataclass(frozen=True)
class _View:
    """What was to be kept: a view of a recipe's result."""

    recipe: Recipe
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def make(self) -> Tensor:
        return self.recipe.make().as_strided(self.size, self.stride, self.offset)


@contextlib.contextmanager
def recomputing() -> Iterator[None]:
    """Inside, what `recomputed` returns is not kept for backward.

    Checkpointing inside of this works; this inside of checkpointing keeps what checkpointing would not.
    """
    recipes = {}
    token = _running.set(recipes)
    try:
        with saved_tensors_hooks(lambda tensor: _pack(tensor, recipes), lambda kept: kept if isinstance(kept, Tensor) else kept.make()):
            yield
    finally:
        _running.reset(token)
        recipes.clear()  # the graph holds the hooks


def recomputed(result: Tensor, function: Callable[..., Tensor], *sources: Tensor) -> Tensor:
    """`result`, which is `function(*sources)` in a storage of its own and draws no random numbers.

    It is for sums, norms and others whose own gradient needs no result (`exp` keeps it before this is called).
    """
    recipes = _recipes()
    if recipes is not None and result.requires_grad:
        kind = result.device.type
        enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        kept = tuple(recipes[_place(s)][1] if _place(s) in recipes else s.detach() for s in sources)
        recipes[_place(result)] = result, Recipe(function, kept, lambda: torch.autocast(kind, dtype, enabled))
    return result


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in another type, which is not kept either if x is not."""
    result, recipes = x.to(dtype), _recipes()
    if result is x or recipes is None or _place(x) not in recipes:
        return result
    return recomputed(result, lambda x: x.to(dtype), x)


def _recipes() -> dict[int, tuple[Tensor, Recipe]] | None:
    return None if torch.compiler.is_compiling() else _running.get()


def _pack(tensor: Tensor, recipes: dict[int, tuple[Tensor, Recipe]]) -> Tensor | _View:
    if _place(tensor) not in recipes:
        return tensor
    return _View(recipes[_place(tensor)][1], tensor.size(), tensor.stride(), tensor.storage_offset())


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
