"""Object identifiers that carry the defect class, since a SAM 2 batch has room for integers only.

`object_id = class_id * OBJECTS_PER_CLASS + component`. Class 0 is a clean sample: an empty mask on sound steel.
"""

from typing import TypeVar

OBJECTS_PER_CLASS = 1_000_000
CLEAN = 0

Integers = TypeVar("Integers")  # int, numpy integer array or torch integer tensor


def object_id(class_id: int, component: int) -> int:
    """The identifier of the `component`-th object (from 0) of a class in one image."""
    assert 0 <= component < OBJECTS_PER_CLASS, component
    return class_id * OBJECTS_PER_CLASS + component


def class_of(object_ids: Integers) -> Integers:
    """The class of an identifier, or of an array or tensor of them."""
    return object_ids // OBJECTS_PER_CLASS
