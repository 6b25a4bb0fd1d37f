"""Class steps in SAM 2's Trainer: metrics of both kinds of steps, exact resume, and incompatible settings."""

import contextlib
import csv
import io
import json

import pytest
import torch

from helpers.small_runs import environment, train_here
from sam2_lora_ext.data.class_schedule import kind_of_step
from sam2_lora_ext.data.ids import by_class_prompt, is_corrected
from sam2_lora_ext.run.guard import StepGuard
from sam2_lora_ext.trainer import LoRATrainer
from sam2_lora_ext.utils.errors import UserError

CONFIG = "configs/demo_classes.yaml"
SMALL = ("scratch.resolution=64", "trainer.model.class_prompts.tokens=2")


def train(env, *overrides):
    small = SMALL[: 1 if "trainer.model.class_prompts=null" in overrides else None]
    return train_here(env, *small, *overrides, name=CONFIG)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, nano_base, strips):
    """A run of three phases of two steps: its folder, its Trainer, and the kind of each step by its batch."""
    folder, kinds = tmp_path_factory.mktemp("whole") / "run", []
    original = LoRATrainer._run_step

    def watched(self, batch, *args, **kwargs):
        number = int(batch.metadata.unique_objects_identifier[0, 0, 1])
        kinds.append("corrected" if is_corrected(number) else "classes" if by_class_prompt(number) else "clicks")
        original(self, batch, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoRATrainer, "_run_step", watched)
        trainer = train(environment(nano_base, strips, folder))
    return folder, trainer, kinds


def test_steps_have_the_kinds_of_the_schedule(whole):
    assert whole[2] == [kind_of_step(42, step, 0.5, 0.25) for step in range(6)]
    assert len(set(whole[2])) > 1


def test_a_validation_has_click_rows_and_class_rows(whole):
    folder, trainer, _ = whole
    entry = trainer.history.entries[-1]["metrics"]
    assert entry["strips"] == 4 and entry["clean_strips"] + entry["objects"] > 0
    assert {"iou_1click", "kaggle_dice", "kaggle_dice_empty", "false_alarms"} <= set(entry)
    rows = list(csv.DictReader((folder / "logs/metrics.csv").open()))
    assert float(rows[-1]["kaggle_dice"]) == pytest.approx(entry["kaggle_dice"])
    for row, kind in zip([row for row in rows if row["phase"] == "train"], whole[2], strict=True):
        assert bool(row["loss_mask"]) == (kind == "clicks") != bool(row["class_prompts_presence"])
        assert bool(row["class_prompts_loss_class"]) == (kind != "clicks")
    assert json.loads((folder / "training_summary.json").read_text())["best"]["metrics"]["kaggle_dice"] > 0


def test_a_stopped_run_goes_on_exactly(whole, nano_base, strips, tmp_path, monkeypatch):
    env = environment(nano_base, strips, tmp_path / "run")

    class Killed(BaseException):
        pass

    original, calls = StepGuard.check_gradients, [0]

    def killing(*args, **kwargs):
        calls[0] += 1
        if calls[0] == 4:  # in the middle of the second phase
            raise Killed
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(StepGuard, "check_gradients", killing)
        with pytest.raises(Killed):
            train(env)
    train(env)
    files = [folder / "checkpoints/checkpoint.pt" for folder in (tmp_path / "run", whole[0])]
    one, other = [torch.load(file, weights_only=True)["model"] for file in files]
    assert one.keys() == other.keys() and any("class_tokens" in key for key in one)
    assert all(torch.equal(one[key], other[key]) for key in one)
    for name in ("validations.json", "logs/metrics.csv"):
        assert (tmp_path / "run" / name).read_bytes() == (whole[0] / name).read_bytes()


def sentence_of(env, *overrides):
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), pytest.raises(SystemExit) as stopped:
        train(env, *overrides)
    assert stopped.value.code == 2
    return errors.getvalue()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "dataset.readers.kaggle.classes=[a,b,c,d,e]",
            "4 (defect_4), but the data has 1 (a), 2 (b), 3 (c), 4 (d), 5 (e)",
        ),
        (
            "trainer.model.class_prompts.classes={1: pit}",
            "classes={1: defect_1, 2: defect_2, 3: defect_3, ",
        ),
        ("trainer.model.class_prompts.crop=96", "class_steps.width is 256, but trainer.model.class_prompts.crop is 96"),
        (
            "trainer.model.class_prompts=null",
            "options.lr has an entry for *.class_tokens.tokens, but the model has no class",
        ),
        ("scratch.num_frames=2", "single frames"),
        ("trainer.data.val._target_=training.dataset.sam2_datasets.TorchTrainMixedDataset", "no setting"),
    ],
)
def test_what_does_not_go_together_is_a_sentence(nano_base, strips, tmp_path, override, said):
    try:
        text = sentence_of(environment(nano_base, strips, tmp_path / "run"), override)
    except UserError as error:  # before the Trainer
        text = str(error)
    assert said in text
