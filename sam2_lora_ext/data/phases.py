"""Training data in phases of a set number of optimizer steps, whatever the size of the data set.

SAM 2's Trainer runs an epoch, validates and saves, so "validate every 500 steps" needs epochs of 500 steps. Here the
Trainer's epoch is a phase: `steps_per_phase` global batches, cut from the endless sequence of passes over the data.
Legend: S steps of a phase, B batch size of one rank, W ranks.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, Subset
from training.dataset.sam2_datasets import MixedDataLoader, TorchTrainMixedDataset
from training.dataset.utils import RepeatFactorWrapper

from sam2_lora_ext.data.class_samples import ClassSteps, StepSamples
from sam2_lora_ext.utils.errors import UserError


class PhasedDataset(TorchTrainMixedDataset):
    """Gives phase p the samples [p * S * B * W, (p + 1) * S * B * W) of the sequence of passes.

    A pass is a permutation of the data set seeded by (`seed`, pass). A `RepeatFactorWrapper` draws its repeats anew in
    each pass. Rank r takes every W-th sample from r on, so the samples of a global batch depend on B * W alone. All
    batches are full; the last phase may have fewer of them.

    Args:
        datasets: exactly one data set.
        batch_sizes: its B.
        num_workers: worker processes of the loader.
        pin_memory: as in `DataLoader`.
        steps_per_phase: S.
        steps: length of the training in optimizer steps; give this or `epochs`.
        epochs: length of the training in passes over the data.
        seed: of the permutations.
        collate_fn: builds a batch from samples.
        worker_init_fn: as in `DataLoader`.
        class_steps: selects the class steps and their samples; with None or a share of 0 there are none.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        batch_sizes: Sequence[int],
        num_workers: int,
        pin_memory: bool,
        steps_per_phase: int,
        steps: int | None = None,
        epochs: float | None = None,
        seed: int = 42,
        collate_fn: Callable | None = None,
        worker_init_fn: Callable | None = None,
        class_steps: ClassSteps | None = None,
    ):
        if len(datasets) != 1 or len(batch_sizes) != 1:
            raise UserError(
                f"PhasedDataset takes one data set with one batch size, got {len(datasets)} and "
                f"{len(batch_sizes)}; join data sets with training.dataset.utils.ConcatDataset"
            )
        if (steps is None) == (epochs is None):
            raise UserError(
                f"give the length of the training as steps or as epochs, got steps: {steps}, epochs: {epochs}"
            )
        for name, value in (("steps_per_phase", steps_per_phase), ("steps", steps), ("batch size", batch_sizes[0])):
            if value is not None and (value < 1 or value != int(value)):
                raise UserError(f"{name} must be a whole number, at least 1, got {value}")
        if epochs is not None and not epochs > 0:
            raise UserError(f"epochs must be above 0, got {epochs}")
        factors = getattr(datasets[0], "repeat_factors", None)
        if factors is not None and not bool((factors == 1).all()):
            raise UserError(
                "the data set has repeat factors that nothing applies; wrap it in "
                "training.dataset.utils.RepeatFactorWrapper"
            )
        super().__init__(
            datasets,
            batch_sizes,
            num_workers,
            shuffle=True,
            pin_memory=pin_memory,
            drop_last=False,
            collate_fn=collate_fn,
            worker_init_fn=worker_init_fn,
        )
        self.steps_per_phase = steps_per_phase
        self.steps = steps
        self.epochs = epochs
        self.seed = seed
        self.class_steps = class_steps if class_steps is not None and class_steps.share > 0 else None
        if self.class_steps is not None:
            self.class_steps.check(self._inner)
        self._lengths = []  # samples of each pass

    @property
    def _inner(self) -> Dataset:
        """The data set without its `RepeatFactorWrapper`, if it has one."""
        dataset = self.datasets[0]
        return dataset.dataset if isinstance(dataset, RepeatFactorWrapper) else dataset

    @property
    def _global_batch(self) -> int:
        return self.batch_sizes[0] * rank_and_ranks()[1]

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that see the whole data once (its first pass, if repeats vary)."""
        return math.ceil(self._length(0) / self._global_batch)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole training."""
        if self.steps is not None:
            return self.steps
        whole = int(self.epochs)
        samples = sum(self._length(number) for number in range(whole))
        if self.epochs > whole:
            samples += (self.epochs - whole) * self._length(whole)
        return math.ceil(samples / self._global_batch)

    @property
    def num_phases(self) -> int:
        """Phases of the whole training: the Trainer's `max_epochs`."""
        return math.ceil(self.total_steps / self.steps_per_phase)

    def steps_of(self, phase: int) -> int:
        """Optimizer steps of one phase; 0 past the end."""
        return max(0, min(self.steps_per_phase, self.total_steps - phase * self.steps_per_phase))

    def sample_ids(self, phase: int) -> list[int]:
        """The samples of a phase over all ranks: indices of the data set (inside its `RepeatFactorWrapper`, if any)."""
        first = phase * self.steps_per_phase * self._global_batch
        last = first + self.steps_of(phase) * self._global_batch
        ids, begin, number = [], 0, 0
        while begin < last:
            end = begin + self._length(number)
            if end > first:
                ids += self._pass(number)[max(first - begin, 0) : last - begin]
            begin, number = end, number + 1
        return ids

    def get_loader(self, epoch: int) -> MixedDataLoader:
        """This rank's batches of the phase that the Trainer calls `epoch`."""
        if not 0 <= epoch < self.num_phases:
            raise UserError(
                f"there is no phase {epoch}: the training has {self.num_phases} phases of {self.steps_per_phase} steps"
            )
        rank, world = rank_and_ranks()
        loader = DataLoader(
            self._samples(epoch, self.sample_ids(epoch)[rank::world]),
            batch_size=self.batch_sizes[0],
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            collate_fn=self.collate_fn,
            worker_init_fn=self.worker_init_fn,
        )
        return MixedDataLoader([loader], self.dataset_prob)

    def _samples(self, phase: int, ids: list[int]) -> Dataset:
        """This rank's samples of a phase; all samples of a step are of the same kind, on all ranks."""
        if self.class_steps is None:
            return Subset(self._inner, ids)
        first, batch = phase * self.steps_per_phase, self.batch_sizes[0]
        steps = [first + position // batch for position in range(len(ids))]
        return StepSamples(self._inner, ids, self.class_steps.kinds(self.seed, steps), self.class_steps)

    def _length(self, number: int) -> int:
        while len(self._lengths) <= number:
            self._set_dataset_epoch(self.datasets[0], len(self._lengths))
            self._lengths.append(len(self.datasets[0]))
            if not self._lengths[-1]:
                raise UserError("the training data has no sample")
        return self._lengths[number]

    def _pass(self, number: int) -> list[int]:
        """The samples of one pass in their order."""
        dataset = self.datasets[0]
        self._set_dataset_epoch(dataset, number)
        # seeds are far apart in the combined integer, so that neighbouring ones share no passes
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(self.seed * 1_000_003 + number))
        if isinstance(dataset, RepeatFactorWrapper):
            order = dataset.epoch_ids[order]
        return order.tolist()


def rank_and_ranks() -> tuple[int, int]:
    """(rank, ranks) of this process."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
