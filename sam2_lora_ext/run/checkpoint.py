"""The Trainer's checkpoint.pt: what it holds, how it is replaced, and its check before a resume."""

import contextlib
import logging
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sam2_lora_ext.adapters.weights import ADAPTER_KEYS, NOTES, read_checkpoint_notes, read_file
from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.files import write_atomic

NAME, PREVIOUS, DAMAGED = "checkpoint.pt", "checkpoint.previous.pt", "checkpoint.damaged.pt"
FIELDS = ("model", "optimizer", "epoch", "loss", "steps")


def left_out(model: nn.Module) -> list[str]:
    """The keys of a model that no checkpoint holds: the frozen base, which is in a file of its own."""
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    return [name for name in model.state_dict() if name not in trained and not name.endswith(ADAPTER_KEYS)]


def contents_of(checkpoint: Mapping[str, Any], skipped_steps: int, notes: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint: the stock Trainer's fields, the steps skipped by the scaler, and the notes of the run's record."""
    return {**checkpoint, "skipped_steps": skipped_steps, NOTES: notes}


def write_checkpoint(checkpoint: Mapping[str, Any], path: Path, keep_previous: bool) -> None:
    """Replaces the checkpoint atomically; after a kill or on a full disk the old one remains.

    Raises:
        UserError: the file cannot be written.
    """

    def save(temporary: Path) -> None:
        try:
            torch.save(checkpoint, temporary)
        except RuntimeError as error:  # torch wraps the system's error in it
            raise OSError(str(error).splitlines()[0]) from error
        if keep_previous and path.name == NAME and path.exists():
            write_atomic(path.with_name(PREVIOUS), lambda copy: _link(path, copy))

    write_atomic(path, save)


def prepare_resume(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Checks that checkpoint.pt, if it exists, can be resumed from; the previous checkpoint replaces a damaged one.

    Args:
        folder: the checkpoints' folder.
        state: name -> tensor, as in a checkpoint of this model.

    Raises:
        UserError: neither checkpoint can be resumed from.
    """
    path, previous = folder / NAME, folder / PREVIOUS
    if not os.path.lexists(path):
        if not previous.exists():
            return
        problem = UserError(f"there is no {path}")
    else:
        try:
            return check_checkpoint(path, state)
        except UserError as error:
            problem = error
    if not previous.exists():
        raise UserError(
            f"cannot resume: {problem}; delete it to start again, or choose another launcher.experiment_log_dir"
        ) from problem
    check_checkpoint(previous, state)
    if path.exists():
        os.replace(path, folder / DAMAGED)
    write_atomic(path, lambda copy: _link(previous, copy))
    logging.warning(f"{problem}. Resuming from {previous}, the previous checkpoint")


def check_checkpoint(path: Path, state: Mapping[str, Tensor]) -> None:
    """Reads a checkpoint as a resume would.

    Raises:
        UserError: it is damaged, contains code, or belongs to another model.
    """
    content = read_file(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:  # memory-mapping does not verify checksums
            if archive.testzip() is not None:
                raise UserError(f"{path} is damaged")
    if not isinstance(content, Mapping) or any(field not in content for field in FIELDS):
        raise UserError(f"{path} is not a checkpoint of SAM 2's Trainer: it lacks some of {', '.join(FIELDS)}")
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    found = {name: tuple(tensor.shape) for name, tensor in content["model"].items()}
    wrong = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
    if wrong:
        raise UserError(
            f"{path} belongs to another model or LoRA config: {wrong[0]} is {_shape(found.get(wrong[0]))} in it and "
            f"{_shape(shapes.get(wrong[0]))} in this model ({len(wrong)} tensors differ)"
        )


def notes_to_resume(folder: Path) -> dict[str, Any] | None:
    """The notes of the checkpoint that a start will resume; None without a checkpoint.

    Empty when the checkpoint has no notes or is damaged; `prepare_resume` reports the damage.
    """
    for path in (folder / NAME, folder / PREVIOUS):
        if os.path.lexists(path):
            with contextlib.suppress(UserError):
                return read_checkpoint_notes(path)
    return {} if any(os.path.lexists(folder / name) for name in (NAME, PREVIOUS)) else None


@contextlib.contextmanager
def own_options(optimizer: torch.optim.Optimizer, keep: bool) -> Iterator[None]:
    """With `keep`, an optimizer keeps its hyperparameters (such as betas) while the block loads a state into it."""
    options = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    yield
    if keep:
        for group, own in zip(optimizer.param_groups, options, strict=True):
            group.update(own)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))


def _link(path: Path, copy: Path) -> None:
    try:
        os.link(path, copy)
    except OSError:
        shutil.copyfile(path, copy)
