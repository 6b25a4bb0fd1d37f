"""Loads the base through the Trainer's own `model_weight_initializer`; a failure raises a one-sentence `UserError`."""

import os
from collections.abc import Callable
from typing import Any

from torch import nn

from sam2_lora_ext.adapters.weights import explain_mismatch, read_weights
from sam2_lora_ext.utils.errors import UserError

WHERE = "trainer.checkpoint.model_weight_initializer.state_dict.checkpoint_path"

NO_MATCH = "don't match any param"  # part of stock's message about a glob


def base_path(initializer: Any) -> str | None:
    """The file that the Trainer's `model_weight_initializer` config reads; None if it reads none."""
    try:
        return initializer.state_dict.checkpoint_path
    except AttributeError:
        return None


def load_base(path: str | None, model: nn.Module, load: Callable[[], None]) -> None:
    """Calls `load` and turns its failures into sentences.

    Args:
        path: the file that `load` reads, or None.
        model: the model that `load` fills.
        load: stock's strict loading of the base.

    Raises:
        UserError: the file is missing, damaged or does not fit the config's model; or a glob matches nothing.
    """
    if path is not None and not os.path.exists(path):
        raise UserError(
            f"there is no base checkpoint {path}: download it from the SAM 2 repository, or set its path with the "
            f"environment variable in the config's header ({WHERE})"
        )
    if path is not None:
        read_weights(path)  # rejects files with code, which stock's own loading would run with torch before 2.6
    try:
        load()
    except Exception as error:
        if path is None:
            raise
        if isinstance(error, AssertionError) and NO_MATCH in str(error):
            raise UserError(
                f"trainer.checkpoint.model_weight_initializer.ignore_missing_keys: {error} Without adapters no key is "
                "missing: set it to null"
            ) from error
        sentence = explain_mismatch(read_weights(path), model.state_dict())
        if sentence is None:
            raise
        raise UserError(f"{path}: {sentence}") from error
