"""Class steps in the phases of a training: the same kinds on all ranks and workers, and the strips of click steps."""

import random

import pytest
import torch
from training.dataset.utils import RepeatFactorWrapper

from helpers.data_sets import reader, video_dataset, write_kaggle
from sam2_lora_ext.class_prompts.agreement import agree
from sam2_lora_ext.class_prompts.meter import ClassPromptMeter
from sam2_lora_ext.data.class_samples import ClassSteps
from sam2_lora_ext.data.collate import collate_fn
from sam2_lora_ext.data.dataset import SeverstalRawDataset
from sam2_lora_ext.data.ids import by_class_prompt, is_corrected
from sam2_lora_ext.data.phases import PhasedDataset
from sam2_lora_ext.data.pixels import ModelInput
from sam2_lora_ext.lora.class_tokens import ClassTokens
from sam2_lora_ext.utils.errors import UserError

CLASSES = [1, 2, 3, 4]
NAMES = [f"defect_{number}" for number in CLASSES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_kaggle(tmp_path_factory.mktemp("kaggle") / "k")


def phased(folder, share=0.5, corrections=0.5, workers=0, transforms=(), batch=2, **settings):
    raw = SeverstalRawDataset(reader(folder), clean_share=0.3)
    dataset = RepeatFactorWrapper(video_dataset(raw, transforms=[ModelInput(32)], max_num_objects=2))
    steps = ClassSteps(50, [ModelInput(32)], share, corrections)
    return PhasedDataset(
        [dataset],
        [batch],
        workers,
        False,
        steps_per_phase=4,
        steps=10,
        collate_fn=Collate(),
        **{"class_steps": steps, **settings},
    )


class Collate:
    """Collates float images; a class, so that it can be pickled for workers."""

    __name__ = "collate_fn"

    def __call__(self, batch):
        return collate_fn(batch, "severstal")


def kinds_of(batches):
    """The kind of each batch, from its identifiers, which are all of one kind."""
    found = []
    for batch in batches:
        ids = batch.metadata.unique_objects_identifier[0, :, 1]
        kinds = {(bool(by), bool(corrected)) for by, corrected in zip(by_class_prompt(ids), is_corrected(ids))}
        assert len(kinds) == 1
        found.append({(False, False): "clicks", (True, False): "classes", (True, True): "corrected"}[kinds.pop()])
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_the_kind_of_a_step_is_in_the_identifiers_whatever_the_workers(folder, workers):
    random.seed(0)
    dataset = phased(folder, workers=workers)
    wanted = dataset.class_steps.kinds(dataset.seed, range(10))
    assert len(set(wanted)) == 3
    for phase, steps in ((0, wanted[:4]), (2, wanted[8:]), (1, wanted[4:8])):
        assert kinds_of(dataset.get_loader(phase)) == steps


def test_the_sequence_of_strips_is_that_of_click_training(folder):
    with_classes, clicks = phased(folder), phased(folder, class_steps=None)
    for phase in range(3):
        assert with_classes.sample_ids(phase) == clicks.sample_ids(phase)
        assert list(with_classes.get_loader(phase).dataloaders[0].dataset.items) == clicks.sample_ids(phase)


def test_a_share_of_0_is_training_without_class_steps(folder):
    def batches(dataset):
        random.seed(5)
        return [batch for phase in range(3) for batch in dataset.get_loader(phase)]

    for one, other in zip(batches(phased(folder, share=0.0)), batches(phased(folder, class_steps=None)), strict=True):
        assert torch.equal(one.img_batch, other.img_batch) and torch.equal(one.masks, other.masks)
        ids = [batch.metadata.unique_objects_identifier for batch in (one, other)]
        assert torch.equal(*ids)


def test_a_resumed_phase_gives_the_same_samples(folder):
    """Seeds as LoRATrainer does, where the phase determines all random draws."""

    def batches(phase):
        random.seed(100 + phase)
        return [batch.masks for batch in phased(folder).get_loader(phase)]

    whole = [batches(phase) for phase in range(3)]
    assert all(torch.equal(one, other) for one, other in zip(batches(2), whole[2], strict=True))


def test_ranks_share_kinds_and_split_samples(folder, monkeypatch):
    single = phased(folder, batch=4)
    pairs = []
    for rank in range(2):
        monkeypatch.setattr("sam2_lora_ext.data.phases.rank_and_ranks", lambda rank=rank: (rank, 2))
        pairs.append(phased(folder, batch=2).get_loader(1).dataloaders[0].dataset)
    monkeypatch.undo()
    whole = single.get_loader(1).dataloaders[0].dataset
    assert pairs[0].kinds == pairs[1].kinds == whole.kinds[::2]
    assert [item for pair in zip(pairs[0].items, pairs[1].items) for item in pair] == list(whole.items)


def test_class_steps_need_tokens_of_the_classes_of_the_data(folder):
    train = phased(folder)
    with pytest.raises(UserError, match="the model has no class prompts"):
        agree(torch.nn.Identity(), {}, train, None, [])
    agree(ClassTokens(torch.zeros(4, 2, 8), CLASSES, NAMES, 50), {}, train, None, [])
    with pytest.raises(UserError, match=r"classes has 1 \(a\), 2 \(b\), but the data has 1 \(defect_1\)"):
        agree(ClassTokens(torch.zeros(2, 2, 8), [1, 2], "ab"), {}, train, None, [])
    with pytest.raises(UserError, match="class_steps.width is 50, but trainer.model.class_prompts.crop is None"):
        agree(ClassTokens(torch.zeros(4, 2, 8), CLASSES, NAMES), {}, train, None, [])
    with pytest.raises(UserError, match="ClassPromptMeter needs"):
        agree(ClassTokens(torch.zeros(4, 2, 8), CLASSES, NAMES, 50), {}, train, train, [ClassPromptMeter()])
    agree(torch.nn.Identity(), {}, phased(folder, class_steps=None), None, [])
