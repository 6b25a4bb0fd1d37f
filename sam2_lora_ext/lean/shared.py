"""What all prediction steps of a forward pass read alike, made once for them."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch

Made = TypeVar("Made")

_held: ContextVar[dict[Hashable, object] | None] = ContextVar("held", default=None)


@contextmanager
def sharing() -> Iterator[None]:
    """Inside, `shared` makes a thing once and holds it to the end of the block."""
    token = _held.set({})
    try:
        yield
    finally:
        _held.reset(token)


def shared(key: Hashable, make: Callable[[], Made]) -> Made:
    """What `make` made for this key; outside of `sharing`, and while `torch.compile` traces, made anew."""
    held = None if torch.compiler.is_compiling() else _held.get()
    if held is None:
        return make()
    if key not in held:
        held[key] = make()
    return held[key]
