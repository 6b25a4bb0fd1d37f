"""Phases of steps: the same samples for any number of ranks and workers, and after a resume."""

import json
from collections import Counter

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.data import Dataset
from training.dataset.sam2_datasets import MixedDataLoader
from training.dataset.utils import RepeatFactorWrapper

from sam2_lora_ext.data.phases import PhasedDataset
from sam2_lora_ext.utils.errors import UserError


class Numbers(Dataset):
    """Sample i is i."""

    def __init__(self, factors):
        self.repeat_factors = torch.tensor(factors, dtype=torch.float32)

    def __len__(self):
        return len(self.repeat_factors)

    def __getitem__(self, item):
        return int(item)


def collate_fn(batch):
    return list(batch)


def phased(length=10, batch=3, factors=None, **kwargs):
    data = Numbers(factors or [1.0] * length)
    if factors:
        data = RepeatFactorWrapper(data)
    return PhasedDataset(
        [data], [batch], 0, False, collate_fn=collate_fn, **{"steps_per_phase": 4, "steps": 11, **kwargs}
    )


def batches(dataset):
    return [[batch for batch in dataset.get_loader(phase)] for phase in range(dataset.num_phases)]


def test_phases_cut_an_endless_sequence_of_passes():
    dataset = phased()
    assert (dataset.num_phases, dataset.total_steps, dataset.steps_per_epoch) == (3, 11, 4)
    phases = batches(dataset)
    assert [len(phase) for phase in phases] == [4, 4, 3]
    samples = [sample for phase in phases for batch in phase for sample in batch]
    assert all(len(batch) == 3 for phase in phases for batch in phase)
    for start in (0, 10, 20):
        assert sorted(samples[start : start + 10]) == list(range(10))
    assert samples[:10] != samples[10:20] != list(range(10))
    assert isinstance(dataset.get_loader(0), MixedDataLoader)


def test_a_phase_does_not_depend_on_those_before():
    whole = batches(phased())
    for phase in (2, 0, 1):
        assert [batch for batch in phased().get_loader(phase)] == whole[phase]


def test_seeds_and_defaults_differ():
    assert batches(phased(seed=1)) != batches(phased(seed=2))
    assert batches(phased(seed=42)) == batches(phased())


@pytest.mark.parametrize(("epochs", "steps", "phases"), [(1, 4, 1), (3, 10, 3), (2.5, 9, 3), (0.1, 1, 1)])
def test_length_in_epochs(epochs, steps, phases):
    dataset = phased(steps=None, epochs=epochs)
    assert (dataset.total_steps, dataset.num_phases) == (steps, phases)
    assert sum(map(len, batches(dataset))) == steps


def test_one_phase_may_hold_several_passes():
    dataset = phased(length=4, batch=3, steps=5, steps_per_phase=5)
    counts = Counter(dataset.sample_ids(0))
    assert (
        sum(counts.values()) == 15 and set(counts) == {0, 1, 2, 3} and max(counts.values()) - min(counts.values()) == 1
    )


def test_repeat_factors_are_drawn_anew_in_each_pass():
    factors = [1.0, 2.0, 0.5, 1.5]
    dataset = phased(factors=factors, batch=1, steps=5000, steps_per_phase=5000)
    counts = Counter(dataset.sample_ids(0))
    shares = torch.tensor([counts[item] / 5000 for item in range(4)])
    torch.testing.assert_close(shares, torch.tensor(factors) / 5, atol=0.01, rtol=0)
    wrapper = RepeatFactorWrapper(Numbers(factors))
    wrapper.set_epoch(0)
    assert sorted(dataset.sample_ids(0)[: len(wrapper)]) == wrapper.epoch_ids.tolist()


def show_rank(rank, world, batch, store, out):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    (out / f"{rank}.json").write_text(json.dumps(batches(phased(length=23, batch=batch))))
    dist.destroy_process_group()


def test_global_batches_are_the_same_for_two_ranks(tmp_path):
    mp.start_processes(show_rank, (2, 2, tmp_path / "store", tmp_path), nprocs=2, start_method="fork")
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    single = batches(phased(length=23, batch=4))
    assert [len(phase) for phase in ranks[0]] == [len(phase) for phase in single]
    for phase in range(3):
        for step, batch in enumerate(single[phase]):
            pair = [ranks[rank][phase][step] for rank in range(2)]
            assert [sample for row in zip(*pair) for sample in row] == batch


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"epochs": 2}, "steps or as epochs"),
        ({"steps": None}, "steps or as epochs"),
        ({"steps": 0}, "steps must be"),
        ({"steps_per_phase": 0}, "steps_per_phase"),
        ({"batch": 0}, "batch size"),
        ({"steps": None, "epochs": 0}, "epochs must be"),
        ({"steps_per_phase": 2.5}, "steps_per_phase"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(UserError, match=words):
        phased(**arguments)


def test_other_mistakes():
    with pytest.raises(UserError, match="one data set"):
        PhasedDataset([Numbers([1.0]), Numbers([1.0])], [1, 1], 0, False, 5, steps=5)
    with pytest.raises(UserError, match="RepeatFactorWrapper"):
        PhasedDataset([Numbers([1.0, 2.0])], [1], 0, False, 5, steps=5)
    with pytest.raises(UserError, match="phase 3"):
        phased().get_loader(3)
