"""Results that backward computes again from what they were computed of, instead of keeping them.

Checkpointing computes a whole part of the model again, products included. Here a norm, an activation, a sum or a small product
says how it was made, and what another operation wanted to keep of it is made anew when backward asks for it: a few passes over memory.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class _Kept(NamedTuple):
    """A tensor that is kept, and how often it had been written to."""

    tensor: Tensor
    version: int

    def make(self) -> Tensor:
        if self.tensor._version != self.version:
            shape = tuple(self.tensor.shape)
            raise RuntimeError(f"a tensor {shape} that backward needs was changed in place: change a clone of it")
        return self.tensor


@dataclass
class _Recipe:
    """A function and its arguments, under the autocast that there was.

    The result is made once for all its readers and held until each has read it; where one never does, as its gradient is not
    wanted, as long as the graph is.
    """

    function: Callable[..., Tensor]
    sources: "tuple[_Kept | _View, ...]"
    autocast: tuple[str, torch.dtype, bool]
    unread: int = 0  # readers that have not asked yet
    made: Tensor | None = None  # for the readers to come

    def make(self) -> Tensor:
        result = self.made
        if result is None:
            sources = [source.make() for source in self.sources]
            with torch.no_grad(), torch.autocast(*self.autocast, cache_enabled=False):
                result = self.function(*sources)
        self.unread -= 1
        self.made = result if self.unread > 0 else None
        return result


class _View(NamedTuple):
    """A view of a recipe's result, or all of it."""

    recipe: _Recipe
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def make(self) -> Tensor:
        return self.recipe.make().as_strided(self.size, self.stride, self.offset)


class _Result(NamedTuple):
    """What need not be kept, and how often it had been written to; held, so that no other tensor gets the same storage."""

    tensor: Tensor
    version: int
    recipe: _Recipe


_Recipes = dict[int, _Result]  # by storage
_of_block: ContextVar[_Recipes | None] = ContextVar("recipes", default=None)


def recomputing(wanted: bool = True) -> AbstractContextManager[None]:
    """Inside, what `recomputed` returns is not kept for backward; it lives to the end of the block, for its place in memory.

    Checkpointing inside of this works; this inside of checkpointing keeps what checkpointing would not. Other hooks of saved
    tensors (`save_on_cpu`, a counter) see nothing of the block, as torch calls the innermost alone. `torch.compile` chooses
    by itself what it keeps, so there this does nothing.

    Args:
        wanted: False does nothing.
    """
    return _recomputing() if wanted and not torch.compiler.is_compiling() else contextlib.nullcontext()


@contextlib.contextmanager
def _recomputing() -> Iterator[None]:
    recipes: _Recipes = {}
    token = _of_block.set(recipes)
    try:
        with saved_tensors_hooks(lambda tensor: _pack(tensor, recipes), lambda kept: kept.make()):
            yield
    finally:
        _of_block.reset(token)
        recipes.clear()  # the graph holds the hooks


def recomputed(result: Tensor, function: Callable[..., Tensor], *sources: Tensor) -> Tensor:
    """`result`, which is `function(*sources)`; called again, it must put the same numbers at the same places of a storage.

    So it draws no random numbers, and parameters that it reads are not changed before backward. It is for operations whose own
    gradient needs no result (`exp` keeps it before this is called).
    """
    recipes = _recipes()
    if recipes is not None and torch.is_grad_enabled():
        kind = result.device.type
        autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        kept = tuple(_pack(source.detach(), recipes) for source in sources)
        recipes[_place(result)] = _Result(result, result._version, _Recipe(function, kept, autocast))
    return result


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in another type, which is not kept either if x is not."""
    result, recipes = x.to(dtype), _recipes()
    if result is x or recipes is None or _place(x) not in recipes:
        return result
    return recomputed(result, lambda x: x.to(dtype), x)


def _recipes() -> _Recipes | None:
    return None if torch.compiler.is_compiling() else _of_block.get()


def _pack(tensor: Tensor, recipes: _Recipes) -> _Kept | _View:
    found = recipes.get(_place(tensor))
    if found is None or found.version != tensor._version or found.tensor.dtype != tensor.dtype:  # `view_as_complex`
        # A node may save its own result: it and its graph would hold each other for good.
        return _Kept(tensor if tensor.is_leaf else tensor.detach(), tensor._version)
    found.recipe.unread += 1
    return _View(found.recipe, tensor.size(), tensor.stride(), tensor.storage_offset())


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
