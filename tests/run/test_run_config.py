"""The run's own record of its config, and the differences of two records that affect the result."""

import copy
import logging
from pathlib import Path

import numpy as np
import pytest

from helpers.small_runs import config_of, environment
from sam2_lora_ext.data.index import pack
from sam2_lora_ext.data.records import ImageRecord
from sam2_lora_ext.run import changes as run_changes
from sam2_lora_ext.run.changes import ALLOWED, Change, changes, unrecorded
from sam2_lora_ext.run.config import plain, read_run_config, write_run_config
from sam2_lora_ext.utils.errors import UserError


@pytest.fixture(scope="module")
def record() -> dict:
    """That of the small run, as if everything was known; not to be changed."""
    trainer = plain(config_of(environment(Path("base.pt"), Path("strips"), Path("run"))).trainer)
    return {"trainer": trainer, "ranks": 2, "data": {"train": "a" * 64, "val": "b" * 64}, "base": {}, "changes": []}


def changed(record: dict, key: str, value: object) -> dict:
    """A copy with another value at a dotted key (numbers are list indices) of the trainer section."""
    made = copy.deepcopy(record)
    *path, last = [int(part) if part.isdigit() else part for part in key.split(".")]
    place = made["trainer"]
    for part in path:
        place = place[part]
    place[last] = value
    return made


DATA = "data.train.datasets.0.dataset.video_dataset"
REFUSED = {
    "model.lora.alpha": 3,
    "model.lora.rank": 2,
    "model.lora.rslora": True,
    "model.lora.qkv_parts": ["q"],
    "model.lora.targets": ["a"],
    "model.lora.rank_pattern": {"a": 4},
    "model.lora.dropout": 0.5,
    "model.lora.variant": "dora",
    "model.image_size": 256,
    "model.prompt_seed": 1,
    "model.num_correction_pt_per_frame": 7,
    "loss.severstal.weight_dict": {"loss_mask": 1},
    "loss.severstal.class_weights": {3: 2.0},
    "optim.optimizer": {"_target_": "torch.optim.AdamW", "betas": [0.9, 0.95]},
    "optim.amp.enabled": True,
    "optim.options.lr.0.scheduler.schedulers.0.end_value": 0.5,
    "optim.gradient_clip.max_norm": 0.1,
    "seed_value": 43,
    "data.train.steps": 7,
    "data.train.steps_per_phase": 3,
    "data.train.batch_sizes": [1],
    "monitor": "loss",
    "early_stop": None,
    "val_epoch_freq": 2,
    f"{DATA}.bits": 12,
    f"{DATA}.split": "fold0",
    f"{DATA}.min_area": 3,
    f"{DATA}.objects": "classes",
    f"{DATA}.clean_share": 0.5,
    f"{DATA}.reader.classes": ["a"],
    "data.train.datasets.0.dataset.transforms.0.width": 128,
    "a_key_of_tomorrow": 1,
    "mode": "train_only",
}
PASSED = {
    "run_dir": "elsewhere",
    "metrics_every": 7,
    "keep_previous": 1,
    "export": {"merged": True},
    "accelerator": "cuda",
    "resume_with_changes": True,
    "data.train.num_workers": 3,
    "data.val.pin_memory": True,
    "mode": "val",
    "logging.log_freq": 3,
    "logging.tensorboard_writer": None,
    "checkpoint.save_dir": "x",
    "checkpoint.save_freq": 2,
    "checkpoint.model_weight_initializer.state_dict.checkpoint_path": "moved.pt",
    "model.memory": "low",
    "model.lora.implementation": "plain",
    "loss.severstal.implementation": "stock",
    f"{DATA}.cache_dir": "c",
    f"{DATA}.reader.csv": "moved.csv",
    f"{DATA}.reader.image_dir": "moved",
    f"{DATA}.split_file": "moved.csv",
    "model.lora.freeze_a": False,
    "val_epoch_freq": 1,
    "distributed.timeout_mins": 3,
    "optim.amp.enabled": False,
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_changes_the_result_is_found_with_both_values(record, key):
    found = changes(record, changed(record, key, REFUSED[key]))
    assert found and all(change.key.startswith(f"trainer.{key.split('.')[0]}") for change in found)
    if not isinstance(REFUSED[key], dict):
        assert any(change.after == REFUSED[key] for change in found)
        words = [["not set" if value is None else str(value) for value in (c.before, c.after)] for c in found]
        assert [str(c) for c in found] == [f"{c.key} was {a} and is now {b}" for c, (a, b) in zip(found, words)]
    assert changes(changed(record, key, REFUSED[key]), record), "and the other way round"


@pytest.mark.parametrize("key", PASSED)
def test_what_does_not_is_let_pass(record, key):
    assert changes(record, changed(record, key, PASSED[key])) == []


def test_all_changes_at_once(record):
    other = changed(changed(record, "model.lora.alpha", 4), "seed_value", 1) | {"ranks": 1}
    assert [change.key for change in changes(record, other)] == [
        "trainer.model.lora.alpha",
        "trainer.seed_value",
        "the number of ranks",
    ]
    assert changes(record, other)[:2] == [
        Change("trainer.model.lora.alpha", 16, 4),
        Change("trainer.seed_value", 42, 1),
    ]


def test_data_is_known_by_content(record):
    """Paths may differ where the content is known on both sides, and content may not where it is known."""
    moved = changed(record, f"{DATA}.reader.csv", "moved.csv")
    other = record | {"data": record["data"] | {"train": "c" * 64}}
    [change] = changes(record, other)
    assert "the content of trainer.data.train" in change.key and "a" * 12 in change.before and "c" * 12 in change.after
    unknown = record | {"data": {"train": None, "val": "b" * 64}}
    [change] = changes(unknown, moved)
    assert change.key.endswith("reader.csv") and change.after == "moved.csv"
    assert changes(unknown, record) == [] and len(unrecorded(unknown | {"ranks": None}, record)) == 2


def test_defaults_and_names_of_other_versions(record, monkeypatch):
    """A missing key is its default, as the code says; a renamed one is found under its new name."""
    older = copy.deepcopy(record)
    for key in ("rslora", "freeze_a", "variant"):
        older["trainer"]["model"]["lora"].pop(key)
    for key in ("seed_value", "monitor", "early_stop"):
        older["trainer"].pop(key)
    assert [change.key for change in changes(older, record)] == [
        "trainer.early_stop.patience",
        "trainer.early_stop.min_delta",
    ]  # fmt: skip  (without any a run never stops early)
    video = older["trainer"]["data"]["val"]["datasets"][0]["video_dataset"]
    video["bit_depth"] = video.pop("bits")
    monkeypatch.setitem(run_changes.RENAMED, "video_dataset.bit_depth", "video_dataset.bits")
    assert len(changes(older, record)) == 2
    video["bit_depth"] = 12
    assert ("bits", 12, 16) in [(c.key.rpartition(".")[2], c.before, c.after) for c in changes(older, record)]


def test_objects_null_is_what_it_means(record):
    """`null` means components for a format without instances."""
    components, null = (changed(record, f"{DATA}.objects", value) for value in ("components", None))
    assert changes(components, null) == changes(null, components) == []

    class Instances:
        instances = True

    run_changes.Instances = Instances
    try:
        coco = changed(record, f"{DATA}.reader", {"_target_": "sam2_lora_ext.run.changes.Instances"})
        components = changed(coco, f"{DATA}.objects", "components")
        [change] = changes(components, changed(coco, f"{DATA}.objects", None))
        assert (change.before, change.after) == ("components", "instances")
    finally:
        del run_changes.Instances


def test_nothing_that_a_record_alone_names_is_imported(record, tmp_path, monkeypatch):
    (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    evil = changed(record, f"{DATA}.reader", {"_target_": "evil_module.Reader"})
    assert changes(evil, record) and not (tmp_path / "trace").exists()


def test_the_list_of_what_may_change_has_a_reason_for_each():
    assert all(reason and not reason.endswith(".") for reason in ALLOWED.values())


def test_the_record_is_read_as_it_was_written(record, tmp_path):
    values = {"a": 1e-5, "b": float("inf"), "c": "1e-5", "d": {3: None}, "e": ["on", True, 2**40], "f": "ä: #"}
    shared = {"x": [1]}
    written = record | {"trainer": {**values, "g": shared, "h": shared}}
    write_run_config(tmp_path, written)
    assert read_run_config(tmp_path) == {"version": None} | written


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "trainer: 3",
        "trainer: {}\ndata: 3",
        "a: &a [1]\ntrainer: {b: *a}",
        "{" * 9999,
        "\0",
        "!!python/name:os.system",
    ],
    ids=range(8),
)
def test_a_damaged_record(tmp_path, text):
    (tmp_path / "run_config.yaml").write_text(text)
    with pytest.raises(UserError, match="run_config.yaml (is damaged|lacks)"):
        read_run_config(tmp_path)


def test_a_run_without_a_record(tmp_path, caplog):
    with pytest.raises(UserError, match="holds no run_config.yaml and no config_resolved.yaml"):
        read_run_config(tmp_path)
    run = Path(__file__).parents[1] / "fixtures/run_0_1_0/plain"
    with caplog.at_level(logging.WARNING):
        found = read_run_config(run)
    assert found["trainer"]["model"]["lora"]["alpha"] == 4 and found["data"] == {} and found["ranks"] is None
    [line] = caplog.messages
    assert "of version 0.1.0, which did not record" in line


def test_a_digest_is_of_the_content():
    """Not of paths or arrays' types; every part of it counts."""
    runs = np.array([[3, 4], [20, 2]], dtype=np.int32)

    def digest(names=("a.jpg", "b.jpg"), size=(8, 9), runs=runs, class_id=1, classes=None, complete=True, at="x"):
        records = [ImageRecord(names[0], *size, [(class_id, runs)], False, complete), ImageRecord(names[1], 8, 9, [])]
        return pack(records, at, classes or {1: "pit", 2: "scratch"}).digest()

    same = digest()
    assert digest(at="y") == same and digest(runs=runs.astype(np.int64)) == same and len(same) == 64
    others = [
        digest(names=("a.jpg", "c.jpg")),
        digest(size=(9, 8)),
        digest(runs=runs + [[0, 1], [0, 0]]),
        digest(class_id=2),
        digest(classes={1: "pit", 2: "dent"}),
        digest(complete=False),
    ]
    assert len({same, *others}) == 7
