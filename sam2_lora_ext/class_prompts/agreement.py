"""Checks before training that data, model, losses and meters have the same classes and agree on class prompts."""

import logging
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from torch import nn

from sam2_lora_ext.class_prompts.meter import ClassPromptMeter
from sam2_lora_ext.data.class_validation import ClassTiles
from sam2_lora_ext.data.ids import class_of
from sam2_lora_ext.data.records import compare_datasets
from sam2_lora_ext.lora.class_tokens import STATE_KEY, ClassTokens, find_tokens
from sam2_lora_ext.run.guard import raw_datasets
from sam2_lora_ext.settings import check_class_ids
from sam2_lora_ext.utils.errors import UserError

log = logging.getLogger(__name__)


def agree(model: nn.Module, losses: Mapping[str, Any], train: Any, val: Any, meters: Iterable[Any]) -> None:
    """Checks the parts of a Trainer against each other, and binds the meters of class prompts to the validation strips.

    Args:
        model: unwrapped.
        losses: by the key of a batch.
        train: the training data, or None.
        val: the validation data, or None.
        meters: of the validation.

    Raises:
        UserError: two of them are incompatible.
    """
    compare_datasets({"train": raw_datasets(train), "val": raw_datasets(val)})
    check_class_ids(losses, raw_datasets(train))
    steps, tiles = getattr(train, "class_steps", None), getattr(val, "class_tiles", None)
    tokens = find_tokens(model)
    check_tokens(tokens, [*raw_datasets(train), *raw_datasets(val)], steps, tiles)
    if tokens is not None and train is not None and steps is None:
        log.warning("no step trains the class prompts: trainer.data.train has no class_steps with a share above 0")
    for meter in meters:
        if not isinstance(meter, ClassPromptMeter):
            continue
        if tiles is not None:
            meter.bind(tiles)
        elif val is not None:
            raise UserError(
                "ClassPromptMeter needs sam2_lora_ext.data.class_validation.ClassValidation as trainer.data.val"
            )
    if tiles is not None:
        for sentence in shortcomings(tiles):
            log.warning(sentence)


def shortcomings(tiles: ClassTiles) -> list[str]:
    """Sentences about what a validation of class prompts cannot measure."""
    raw, said = tiles.raw, []
    if not raw.index.clean()[tiles.images].any():
        said.append("the validation has no clean strip, so it cannot measure false alarms: add some to fit thresholds")
    places = np.concatenate([np.arange(*raw.objects.offsets[image : image + 2]) for image in tiles.images])
    seen = set(class_of(raw.objects.ids[places]).tolist())
    if lacking := [name for number, name in sorted(raw.class_names.items()) if number not in seen]:
        said.append(f"the validation has no defect of {', '.join(lacking)}, so it cannot measure their recall and Dice")
    return said


def check_tokens(tokens: ClassTokens | None, datasets: Iterable[Any], steps: Any, tiles: Any) -> None:
    """Checks that the tokens have the data's classes, and that their `crop` is the width of windows and tiles.

    Args:
        tokens: of the model, or None.
        datasets: of training and validation.
        steps: the training's `ClassSteps`, or None.
        tiles: the validation's `ClassTiles`, or None.

    Raises:
        UserError: a class has another id or name, windows or tiles have another width than the tokens' `crop`, or
            there are class steps or tiles but no tokens.
    """
    if tokens is None:
        if steps is not None or tiles is not None:
            raise UserError(
                "the data has class steps, but the model has no class prompts: set trainer.model.class_prompts, or "
                "dataset.class_prompts.share to 0 and trainer.data.val to stock's TorchTrainMixedDataset"
            )
        return
    table = dict(zip(tokens.class_ids, tokens.class_names, strict=True))
    for raw in datasets:
        if (found := getattr(raw, "class_names", None)) is not None and dict(found) != table:
            said = [", ".join(f"{number} ({name})" for number, name in sorted(one.items())) for one in (table, found)]
            wanted = {**dict.fromkeys(table, "null"), **found}
            text = ", ".join(f"{number}: {name}" for number, name in sorted(wanted.items()))
            raise UserError(
                f"trainer.model.class_prompts.classes has {said[0]}, but the data has {said[1]}: set "
                f"trainer.model.class_prompts.classes={{{text}}}"
            )
    for part, what in ((steps, "trainer.data.train.class_steps.width"), (tiles, "trainer.data.val.tile_width")):
        if part is not None and part.width != tokens.crop:
            raise UserError(
                f"{what} is {part.width}, but trainer.model.class_prompts.crop is {tokens.crop}: strips are inspected "
                "in tiles of the crop, so set both to scratch.crop_width"
            )


def check_rates(options: Mapping[str, Any] | None, model: nn.Module) -> None:
    """Raises a `UserError` if the optimizer has settings for class tokens, but the model has none.

    Args:
        options: the Trainer's `optim.options`, lists of `{scheduler, param_names}`.
        model: the model that the optimizer trains.
    """
    if find_tokens(model) is not None:
        return
    rows = [(name, row) for name, value in (options or {}).items() for row in value]
    for name, row in rows:
        for glob in row.get("param_names") or []:
            if "class_tokens" in glob and fnmatchcase(STATE_KEY, glob):
                raise UserError(
                    f"trainer.optim.options.{name} has an entry for {glob}, but the model has no class prompts: set "
                    "trainer.model.class_prompts, or use a config without class prompts, such as severstal_lora"
                )
