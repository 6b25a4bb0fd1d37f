"""Cast and scaled adapter factors, computed once per forward pass and shared by all its uses."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch.utils.checkpoint import checkpoint

Made = TypeVar("Made")

_held: ContextVar[dict[Hashable, object] | None] = ContextVar("held", default=None)


@contextmanager
def sharing(held: dict[Hashable, object] | None = None) -> Iterator[None]:
    """Within the block, `shared` computes each value once and keeps it to the end, in `held` if that is given."""
    token = _held.set({} if held is None else held)
    try:
        yield
    finally:
        _held.reset(token)


def shared(key: Hashable, make: Callable[[], Made]) -> Made:
    """The result of `make` for this key; outside of `sharing`, and while `torch.compile` traces, computed anew."""
    held = None if torch.compiler.is_compiling() else _held.get()
    if held is None:
        return make()
    if key not in held:
        held[key] = make()
    return held[key]


def checkpointed(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)` with activation checkpointing; recomputation uses the shared values of forward."""
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    held = None if torch.compiler.is_compiling() else _held.get()
    contexts = {} if held is None else {"context_fn": lambda: (nullcontext(), sharing(held))}
    return checkpoint(function, *args, use_reentrant=False, **contexts, **kwargs)
