"""Loads the base through the Trainer's own `model_weight_initializer`; a failure is one sentence."""

import os
from collections.abc import Callable
from typing import Any

from torch import nn

from sam2_lora_ext.adapters.weights import explain_mismatch, read_weights
from sam2_lora_ext.utils.errors import UserError

WHERE = "trainer.checkpoint.model_weight_initializer.state_dict.checkpoint_path"

NO_MATCH = "don't match any param"  # stock's words about a glob


def base_path(initializer: Any) -> str | None:
    """The file that the Trainer's `model_weight_initializer` config reads; None if it reads none."""
    try:
        return initializer.state_dict.checkpoint_path
    except AttributeError:
        return None


def load_base(path: str | None, model: nn.Module, load: Callable[[], None]) -> None:
    """Calls `load`, stock's loading of the base.

    Args:
        path: the file that it reads, or None.
        model: that it loads into.
        load: loads strictly.

    Raises:
        UserError: the file is missing or damaged, or of another model than the config's; or a glob matches nothing.
    """
    if path is not None and not os.path.exists(path):
        raise UserError(
            f"there is no base checkpoint {path}: download it from the SAM 2 repository, or set its path by the "
            f"environment variable in the config's header ({WHERE})"
        )
    if path is not None:
        read_weights(path)  # maps the file only; stock's own loading would run code in it, with torch before 2.6
    try:
        load()
    except Exception as error:
        if path is None:
            raise
        if isinstance(error, AssertionError) and NO_MATCH in str(error):
            raise UserError(
                f"trainer.checkpoint.model_weight_initializer.ignore_missing_keys: {error} A model without adapters "
                "lacks no key: set it to null"
            ) from error
        sentence = explain_mismatch(read_weights(path), model.state_dict())
        if sentence is None:
            raise
        raise UserError(f"{path}: {sentence}") from error
