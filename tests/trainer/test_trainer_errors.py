"""Mistakes in a training: one sentence, no traceback, exit code 2; and existing files are unchanged."""

import contextlib
import io
import re
import shutil
from pathlib import Path

import pytest
import torch

from helpers.small_runs import environment, launch, make_base, train_here, write_config
from sam2_lora_ext.adapters.weights import read_weights, write_weights

TINY_2_0, TINY_2_1 = "configs/sam2/sam2_hiera_t.yaml", "configs/sam2.1/sam2.1_hiera_t.yaml"


def sentence_of(env: dict[str, str], *overrides: str, name: str = "configs/demo.yaml") -> str:
    """Starts a training that must end with exit code 2, and returns what it says after "error: "."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), pytest.raises(SystemExit) as stopped:
        train_here(env, *overrides, name=name)
    assert stopped.value.code == 2
    said = errors.getvalue()
    assert "Traceback" not in said
    assert said.count("error: ") == 1, said
    return said.partition("error: ")[2].strip()


@pytest.fixture
def env(tmp_path, nano_base, strips) -> dict[str, str]:
    return environment(nano_base, strips, tmp_path / "run")


@pytest.fixture(scope="module")
def tiny_files(tmp_path_factory) -> dict[str, Path]:
    """Random weights of the real tiny models of both generations."""
    folder = tmp_path_factory.mktemp("tiny")
    return {config: make_base(folder / f"{index}.pt", config) for index, config in enumerate((TINY_2_0, TINY_2_1))}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["lora.ranks=4"], r"Could not override 'lora.ranks'.*did you mean lora.rank"),
        (["+lora.ranks=4"], r"lora has no setting 'ranks', did you mean 'rank'\?"),
        (["lora.targets=[image_encoder.nothing.*]"], r"image_encoder\.nothing\.\*"),
        (["lora.targets=[image_encoder.trunk.patch_embed.proj]"], "Conv2d; only nn.Linear can be adapted"),
        (["lora.targets=[]"], "nothing to train"),
        (["trainer.accelerator=cuda"], "no GPU is visible: set it to cpu"),
        (["trainer.monitor=iou_9clicks"], r"trainer.monitor is 'iou_9clicks'.*choose from iou_1click"),
        (["trainer.early_stop.patience=0"], "trainer.early_stop.patience must be a whole number of at least 1, got 0"),
        (["dataset.split_file=/nowhere/split.csv"], "/nowhere/split.csv"),
        (["dataset.root=/nowhere"], "/nowhere"),
        (
            ["trainer.checkpoint.model_weight_initializer.state_dict.checkpoint_path=/nowhere/base.pt"],
            "no base checkpoint /nowhere/base.pt: .*header",
        ),
        (["trainer.checkpoint.model_weight_initializer=null", "trainer.export.merged=true"], "export.merged needs"),
        (["scratch.steps=0"], "scratch.steps must be null or a whole number of at least 1, got 0"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a GPU that must not exist")
def test_mistakes_in_the_config(overrides, said, env):
    try:
        sentence = sentence_of(env, *overrides)
    except ValueError as error:  # what cannot even be composed; `python -m sam2_lora_ext.train` prints it the same way
        sentence = str(error)
    assert re.search(said, sentence), sentence
    assert "\n" not in sentence


def test_a_model_without_anything_to_train(env, nano_base):
    """A frozen model cannot come from a config of ours, but from a user's own class."""
    sentence = sentence_of(env, "lora=null", "trainer.model._target_=frozen_model.Frozen")
    assert "nothing in the model is trainable" in sentence


@pytest.fixture(autouse=True)
def frozen_model(tmp_path, monkeypatch):
    folder = tmp_path / "user"
    folder.mkdir()
    (folder / "frozen_model.py").write_text(
        "from sam2_lora_ext.model import LoRASAM2Train\n\n\nclass Frozen(LoRASAM2Train):\n"
        "    def __init__(self, **kwargs):\n        super().__init__(**kwargs)\n        self.requires_grad_(False)\n"
    )
    monkeypatch.syspath_prepend(str(folder))


@pytest.mark.parametrize(
    ("model", "file", "likely"),
    [
        (
            "severstal_lora_tiny",
            TINY_2_0,
            "they look like configs/sam2/sam2_hiera_t.yaml, the model like configs/sam2.1/sam2.1_hiera_t.yaml",
        ),
        (
            "severstal_lora_2.0_tiny",
            TINY_2_1,
            "they look like configs/sam2.1/sam2.1_hiera_t.yaml, the model like configs/sam2/sam2_hiera_t.yaml",
        ),
    ],
)
def test_weights_of_the_other_generation_name_the_likely_config(model, file, likely, tiny_files, tmp_path, strips):
    """2.0 in 2.1 and the reverse; the 2.0 config is one of a user's own, like our large one."""
    config = "configs/severstal_lora_tiny.yaml"
    overrides = [
        "trainer.accelerator=cpu",
        "trainer.optim.amp.enabled=false",
        "scratch.num_workers=0",
        f"trainer.run_dir={tmp_path / 'run'}",
        f"launcher.experiment_log_dir={tmp_path / 'run'}",
        f"trainer.checkpoint.model_weight_initializer.state_dict.checkpoint_path={tiny_files[file]}",
    ]
    if "2.0" in model:
        overrides += [
            "trainer.model.no_obj_embed_spatial=false",
            "trainer.model.proj_tpos_enc_in_obj_ptrs=false",
            "trainer.model.use_signed_tpos_enc_to_obj_ptrs=false",
        ]
    env = {"SEVERSTAL_ROOT": str(strips)}
    sentence = sentence_of(env, *overrides, name=config)
    assert sentence.startswith(f"{tiny_files[file]}: the weights do not fit the model: {likely}")
    assert sentence.endswith("use config and weights of the same model") and "\n" not in sentence


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "folder", "lacks a key", "other shape"])
def test_a_damaged_base(damage, env, tmp_path, nano_base):
    base = tmp_path / "base.pt"
    data = nano_base.read_bytes()
    if damage == "folder":
        base.mkdir()
    elif damage in ("lacks a key", "other shape"):
        state = read_weights(nano_base)
        key = "image_encoder.trunk.pos_embed"
        state[key] = state[key][:, :, 1:]
        if damage == "lacks a key":
            del state[key]
        write_weights(base, state)
    else:
        base.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "text": b"not a model\n"}[damage])
    sentence = sentence_of(env | {"SAM2_LORA_NANO": str(base)})
    assert str(base) in sentence and "\n" not in sentence
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.parametrize(("row", "said"), [("x.jpg,1,1 2", "x.jpg"), ("NAME,1,409600 2", "409600")])
def test_a_bad_row_of_the_annotations(row, said, env, tmp_path, strips):
    """The other kinds are the readers' tests; here, that the Trainer shows the sentence with file and row."""
    root = tmp_path / "data"
    shutil.copytree(strips, root)
    table = (root / "train.csv").read_text()
    clean = next(path.name for path in (root / "train_images").iterdir() if path.name not in table)
    (root / "train.csv").write_text(table + row.replace("NAME", clean) + "\n")
    sentence = sentence_of(env | {"SEVERSTAL_ROOT": str(root), "SEVERSTAL_SPLIT": str(root / "split.csv")})
    assert "train.csv" in sentence and str(table.count("\n") + 1) in sentence and said in sentence


def test_a_run_folder_that_is_a_file(env, tmp_path):
    (tmp_path / "run").write_text("mine")
    assert f"cannot use {tmp_path / 'run'} as the run's folder" in sentence_of(env)
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.parametrize("place", ["logs", "checkpoints", "adapters"])
def test_a_file_where_a_folder_of_the_run_should_be(place, env, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / place).write_text("mine")
    assert str(tmp_path / "run" / place) in sentence_of(env, "scratch.steps=2")
    assert (tmp_path / "run" / place).read_text() == "mine"


def test_other_settings_than_the_runs_own(env, tmp_path):
    """A resume with another rank, or other metrics, says so and touches nothing."""
    train_here(env, "scratch.steps=2")
    before = {
        path: path.read_bytes() for path in (tmp_path / "run").rglob("*.*") if path.suffix in (".pt", ".csv", ".json")
    }
    steps = "scratch.steps=2"
    assert "lora.rank was 8 and is now 4" in sentence_of(env, steps, "lora.rank=4")
    assert "_per_frame was 1 and is now 2" in sentence_of(env, steps, "trainer.model.num_correction_pt_per_frame=2")
    allowed = "trainer.resume_with_changes=true"
    assert "another model or LoRA config" in sentence_of(env, steps, "lora.rank=4", allowed)
    longer = ("scratch.steps=4", "trainer.model.num_correction_pt_per_frame=2", allowed)
    assert "columns" in sentence_of(env, *longer)
    assert {path: path.read_bytes() for path in before} == before


def test_the_stock_launcher_shows_the_sentence_too(tmp_path, strips):
    """Without our command line: still no traceback, and exit code 2."""
    env = environment(tmp_path / "none.pt", strips, tmp_path / "run")
    process = launch(write_config(tmp_path / "config"), env)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 2
    assert f"error: there is no base checkpoint {tmp_path / 'none.pt'}" in output and "Traceback" not in output


def test_our_command_line_on_a_folder_that_cannot_be_made(tmp_path, nano_base, strips, run_python):
    """The launcher writes its config before there is a Trainer."""
    (tmp_path / "file").touch()
    folder = tmp_path / "file/run"
    done = run_python(
        ["-m", "sam2_lora_ext.train", "-c", "demo", f"launcher.experiment_log_dir={folder}"],
        env=environment(nano_base, strips, folder),
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"error: cannot write {folder}/config.yaml" in done.stderr
