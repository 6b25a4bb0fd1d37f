"""Ends a run after a signal, between two steps, or on non-finite numbers, before anything is saved.

In training on one rank only one flag is read back from the device, one step late, after stock has synchronised.
"""

import logging
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from training.utils.data_utils import BatchedVideoDatapoint

from sam2_lora_ext.run.checkpoint import write_checkpoint
from sam2_lora_ext.run.signals import Interrupt
from sam2_lora_ext.utils.errors import UserError

SHOWN = 8  # sample names in a message


class Seen(NamedTuple):
    """A forward pass: batch, losses by name (the total first), number of training steps including it, phase."""

    batch: BatchedVideoDatapoint
    losses: dict[str, Tensor]
    step: int
    phase: str


class StepGuard(Interrupt):
    """Catches signals inside its `with` block, and checks losses, gradients and weights.

    Args:
        folder: receives batches whose loss or gradient is not finite.

    Attributes:
        agreed: the signal received by any rank, shared with all after the next forward pass; 0 for none.
        skipped: steps that AMP's scaler skipped because float16 overflowed; checkpoints keep the number.
    """

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder
        self.agreed = self.skipped = 0
        self.seen: Seen | None = None  # the last forward pass
        self.pending: Seen | None = None  # its gradients are checked, but the flag has not been read yet
        self.flag: Tensor | None = None  # on the CPU: whether a gradient of `pending` is not finite
        self.scaled = False  # whether AMP's scaler handles such a gradient
        self.datasets: Sequence[Any] = ()

    @property
    def stop_signal(self) -> int:
        """The signal to end with now, the same on all ranks; 0 for none."""
        return self.signum if dist.get_world_size() == 1 else self.agreed

    def exit(self, step: int) -> NoReturn:
        """Ends the process with 128 + the signal's number, after all ranks have called this.

        torch's launcher kills the other ranks when the first one ends, and one of them may be writing.
        """
        dist.barrier()
        name = signal.Signals(self.stop_signal).name
        logging.info(f"{name}: stopped after step {step}; the same command continues from the last checkpoint")
        raise SystemExit(128 + self.stop_signal)

    def watch(
        self, batch: BatchedVideoDatapoint, losses: Mapping[str, Tensor], step: int, phase: str, datasets: Sequence[Any]
    ) -> None:
        """Checks the total loss; all ranks must call this after each forward pass.

        In training on one rank, stock itself checks the total, see `diagnosis`.

        Args:
            batch: the input.
            losses: name -> scalar; the total first, then its parts.
            step: training steps so far, including this one.
            phase: "train" or "val".
            datasets: the raw data sets, for the samples' names.

        Raises:
            UserError: the total is not finite on at least one rank; all ranks raise the same message.
        """
        # detached: otherwise the graph may keep memory until after the next forward pass
        self.seen = Seen(batch, {name: loss.detach() for name, loss in losses.items()}, step, phase)
        self.datasets = datasets
        if phase == "train" and dist.get_world_size() == 1:
            return
        wrong = ~next(iter(self.seen.losses.values())).isfinite()
        shared = torch.stack([torch.full_like(wrong, self.signum, dtype=torch.int64), wrong.long()])
        mine = shared.clone()
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        self.agreed, any_wrong, wrong = torch.cat([shared, mine[1:]]).tolist()
        if any_wrong:
            raise UserError(_first(self.diagnosis() if wrong else None))

    def diagnosis(self) -> str:
        """The message for a total loss that is not finite; the cause may be the gradient of the previous step."""
        if self._flagged() and not self.scaled:
            return self._report("a gradient", self.pending)
        return self._report(f"the loss ({self.seen.phase})", self.seen)

    def check_gradients(self, parameters: Sequence[nn.Parameter], scaled: bool) -> None:
        """Checks the gradients, which are equal on all ranks, when all are computed; reports one step later.

        Args:
            parameters: the trained parameters.
            scaled: whether AMP's scaler handles overflows by skipping the step and lowering its scale.

        Raises:
            UserError: a gradient of the previous step is not finite, and no scaler handles it.
        """
        self.settle()
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not gradients:
            return
        wrong = ~torch.stack(torch._foreach_norm(gradients)).isfinite().all()
        if self.flag is None:
            self.flag = torch.empty((), dtype=torch.bool, pin_memory=wrong.is_cuda)
        self.flag.copy_(wrong, non_blocking=True)
        self.pending, self.scaled = self.seen, scaled

    def settle(self) -> None:
        """Reads the flag of the last gradients; the device must have been synchronised after `check_gradients`.

        Raises:
            UserError: see `check_gradients`.
        """
        flagged = self._flagged()
        if flagged and not self.scaled:
            raise UserError(self._report("a gradient", self.pending))
        if flagged:
            self.skipped += 1
            logging.warning(f"float16 overflow at step {self.pending.step}: {self.skipped} steps skipped so far")
        self.pending = None

    def check_weights(self, parameters: Sequence[nn.Parameter], step: int) -> None:
        """Checks parameters before they are saved, since a step with finite gradients can still be too large.

        Args:
            parameters: the trained parameters.
            step: training steps so far.

        Raises:
            UserError: a parameter is not finite, or a gradient of the last step was not.
        """
        norms = torch.stack(torch._foreach_norm([parameter.detach() for parameter in parameters]))
        finite = bool(norms.isfinite().all())
        self.settle()
        if not finite:
            raise UserError(
                f"trained weights are not finite after step {step}; the last checkpoint is untouched: lower the "
                "learning rate"
            )

    def _flagged(self) -> bool:
        return self.pending is not None and bool(self.flag)

    def _report(self, what: str, seen: Seen) -> str:
        """Saves the batch and returns the error message."""
        ids = seen.batch.metadata.unique_objects_identifier
        parts = {name.rpartition("/")[2]: float(value) for name, value in seen.losses.items()}
        names = _names(ids[..., 0].flatten().tolist(), self.datasets)
        file = self.folder / f"step{seen.step}_rank{dist.get_rank()}.pt"
        content = {"step": seen.step, "names": names, "losses": parts, "unique_objects_identifier": ids}
        content |= {key: getattr(seen.batch, key) for key in ("img_batch", "masks", "obj_to_frame_idx")}
        try:
            write_checkpoint(content, file, keep_previous=False)
            kept = f"is in {file}"
        except UserError as error:  # the failed save must not hide the error itself
            kept = f"could not be saved ({error})"
        shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        numbers = ", ".join(f"{name} {value:g}" for name, value in parts.items())
        return (
            f"{what} is not finite at step {seen.step} (samples: {shown}; losses: {numbers}); the batch {kept}, the "
            "last checkpoint is untouched: lower the learning rate, or check these samples"
        )


def raw_datasets(dataset: Any) -> list[Any]:
    """The raw data sets inside stock's wrappers (mixed, concatenated, repeated, `Subset`, `VOSDataset`)."""
    if hasattr(dataset, "datasets"):
        return [raw for part in dataset.datasets for raw in raw_datasets(part)]
    inner = next((getattr(dataset, name) for name in ("video_dataset", "dataset") if hasattr(dataset, name)), None)
    return [dataset] if inner is None else raw_datasets(inner)


def _names(video_ids: Sequence[int], datasets: Sequence[Any]) -> list[str]:
    """The images' names without repeats; their numbers if no data set has an index.

    If several data sets have an image with a number, the entry lists all their names.
    """
    indices = [raw.index for raw in datasets if hasattr(raw, "index")]
    names = []
    for number in dict.fromkeys(video_ids):
        known = dict.fromkeys(index.name(number) for index in indices if number < len(index))
        names.append(" or ".join(known) or str(number))
    return names


def _first(message: str | None) -> str:
    """The message of the first rank that has one; all ranks must call this."""
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    return next(filter(None, messages))
