"""Watches the training steps: signals end the run between two of them, non-finite numbers at once, on all ranks."""

import logging
import math
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from training.utils.data_utils import BatchedVideoDatapoint

from sam2_lora_ext.checkpoint_files import write_checkpoint
from sam2_lora_ext.errors import UserError
from sam2_lora_ext.interrupt import Interrupt

SHOWN = 8  # sample names in a sentence


class StepGuard(Interrupt):
    """Catches signals while entered.

    Args:
        folder: where batches are kept that gave a number which is not finite.

    Attributes:
        agreed: the signal that some rank got, known to all of them after the next forward pass; 0 for none.
        skipped: steps that AMP's scaler skipped because float16 overflowed; checkpoints keep the number.
    """

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder
        self.agreed = self.skipped = 0
        self.batch: BatchedVideoDatapoint | None = None

    @property
    def stop_signal(self) -> int:
        """The signal to end with now, the same on all ranks; 0 for none."""
        return self.signum if dist.get_world_size() == 1 else self.agreed

    def exit(self, step: int) -> NoReturn:
        """Ends the process as the signal would have, 128 + its number, when all ranks are here: torch's launcher kills
        the others at the end of the first, and one of them may be writing.
        """
        dist.barrier()
        name = signal.Signals(self.stop_signal).name
        logging.info(f"{name}: stopped after step {step}; the same command goes on from the last checkpoint")
        raise SystemExit(128 + self.stop_signal)

    def check_loss(
        self, batch: BatchedVideoDatapoint, losses: Mapping[str, Tensor], step: int, phase: str, datasets: Sequence[Any]
    ) -> None:
        """To be called by all ranks after each forward pass.

        Args:
            batch: kept until the next call, for `check_gradients`.
            losses: name -> scalar; the total first, then its parts.
            step: training steps so far, with this one.
            phase: "train" or "val".
            datasets: the raw data sets, for the samples' names.

        Raises:
            UserError: the total is not finite on some rank; all of them say the same.
        """
        # detached: a graph may hold more than its backward frees, and would do so through the next forward pass
        self.batch, self.losses = batch, {name: loss.detach() for name, loss in losses.items()}
        self.datasets = datasets
        total = next(iter(losses.values()))
        wrong = not math.isfinite(total.item())
        self.agreed, any_wrong = _largest([self.signum, int(wrong)], total.device)
        if any_wrong:
            raise UserError(_first(self._report(f"the loss ({phase})", step) if wrong else None))

    def check_gradients(self, parameters: Sequence[nn.Parameter], step: int, scaled: bool) -> None:
        """To be called when all gradients are there, which are the same on all ranks.

        Args:
            parameters: what is trained.
            step: training steps so far, with this one.
            scaled: whether AMP's scaler handles overflows: it skips such a step and lowers its scale.

        Raises:
            UserError: a gradient is not finite, and no scaler expects that.
        """
        norms = [parameter.grad.norm() for parameter in parameters if parameter.grad is not None]
        if not norms or torch.stack(norms).isfinite().all():
            self.batch = None
            return
        if not scaled:
            raise UserError(self._report("a gradient", step))
        self.skipped += 1
        logging.warning(f"float16 overflow at step {step}: {self.skipped} steps skipped so far")

    def check_weights(self, parameters: Sequence[nn.Parameter], step: int) -> None:
        """To be called before they are saved: a step with good gradients can still be too large.

        Args:
            parameters: what is trained.
            step: training steps so far.

        Raises:
            UserError: one of them is not finite.
        """
        if not torch.stack([parameter.detach().norm() for parameter in parameters]).isfinite().all():
            raise UserError(
                f"trained weights are not finite after step {step}; the last checkpoint is untouched: lower the "
                "learning rate"
            )

    def _report(self, what: str, step: int) -> str:
        """Saves the batch and says in a sentence what happened to it."""
        ids = self.batch.metadata.unique_objects_identifier
        parts = {name.rpartition("/")[2]: float(value) for name, value in self.losses.items()}
        names = _names(ids[..., 0].flatten().tolist(), self.datasets)
        file = self.folder / f"step{step}_rank{dist.get_rank()}.pt"
        content = {"step": step, "names": names, "losses": parts, "unique_objects_identifier": ids}
        content |= {key: getattr(self.batch, key) for key in ("img_batch", "masks", "obj_to_frame_idx")}
        try:
            write_checkpoint(content, file, keep_previous=False)
            kept = f"is in {file}"
        except UserError as error:  # this is not what the user must hear of first
            kept = f"could not be kept ({error})"
        shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        numbers = ", ".join(f"{name} {value:g}" for name, value in parts.items())
        return (
            f"{what} is not finite at step {step} (samples: {shown}; losses: {numbers}); the batch {kept}, the "
            "last checkpoint is untouched: lower the learning rate, or look at these samples"
        )


def raw_datasets(dataset: Any) -> list[Any]:
    """The raw data sets inside stock's wrappers: mixed, concatenated, repeated, a `Subset`, a `VOSDataset`."""
    if hasattr(dataset, "datasets"):
        return [raw for part in dataset.datasets for raw in raw_datasets(part)]
    inner = next((getattr(dataset, name) for name in ("video_dataset", "dataset") if hasattr(dataset, name)), None)
    return [dataset] if inner is None else raw_datasets(inner)


def _names(video_ids: Sequence[int], datasets: Sequence[Any]) -> list[str]:
    """The images' names, each once; their numbers where no data set has an index.

    A number tells no data set: where several have an image of it, all their names are given.
    """
    indices = [raw.index for raw in datasets if hasattr(raw, "index")]
    names = []
    for number in dict.fromkeys(video_ids):
        known = dict.fromkeys(index.name(number) for index in indices if number < len(index))
        names.append(" or ".join(known) or str(number))
    return names


def _largest(values: list[int], device: torch.device) -> list[int]:
    """The largest of each value over all ranks, so that they decide alike."""
    if dist.get_world_size() == 1:
        return values
    shared = torch.tensor(values, device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return shared.tolist()


def _first(message: str | None) -> str:
    """The message of the first rank that has one; to be called by all of them."""
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    return next(filter(None, messages))
