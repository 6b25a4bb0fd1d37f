"""Object identifiers that encode the defect class, since a SAM 2 batch holds integers only.

`object_id = class_id * OBJECTS_PER_CLASS + component`. Class 0 is a clean sample: an empty mask on clean steel.
The object of a class prompt is a class in a whole image: its identifier has `CLASS_PROMPT` added, and `CORRECTED` too
if correction clicks follow the prompt. These two encode the kind of prompt, not the class.
"""

from typing import TypeVar

OBJECTS_PER_CLASS = 1_000_000
CLEAN = 0
CLASS_PROMPT = 1 << 40
CORRECTED = 1 << 41

Integers = TypeVar("Integers")  # int, numpy integer array or torch integer tensor


def object_id(class_id: int, component: int) -> int:
    """The identifier of the `component`-th object (from 0) of a class in one image."""
    assert 0 <= component < OBJECTS_PER_CLASS, component
    return class_id * OBJECTS_PER_CLASS + component


def class_of(object_ids: Integers) -> Integers:
    """The class of an identifier, or of an array or tensor of them."""
    return object_ids % CLASS_PROMPT // OBJECTS_PER_CLASS


def class_prompt_id(class_id: int, corrected: bool = False) -> int:
    """The identifier of the object of a class prompt: the class in a whole image."""
    return object_id(class_id, 0) + CLASS_PROMPT + (CORRECTED if corrected else 0)


def by_class_prompt(object_ids: Integers) -> Integers:
    """Whether the prompt of an object is a class prompt."""
    return object_ids // CLASS_PROMPT % 2 == 1


def is_corrected(object_ids: Integers) -> Integers:
    """Whether correction clicks follow the class prompt of an object."""
    return object_ids // CORRECTED % 2 == 1
