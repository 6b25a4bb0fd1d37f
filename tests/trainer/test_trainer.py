"""`LoRATrainer` under SAM 2's own launcher: the files of a run and their content."""

import csv
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from helpers.small_runs import environment, launch, train_here, write_config
from sam2_lora_ext.adapters.merge_state import merge_state_dict
from sam2_lora_ext.adapters.peft import load_adapter
from sam2_lora_ext.adapters.weights import read_weights, weights_id

STEPS, PHASE = 6, 2


@pytest.fixture(scope="module")
def run(tmp_path_factory, nano_base, strips) -> SimpleNamespace:
    """One run of the stock launcher, from a foreign working directory, with everything exported."""
    folder = tmp_path_factory.mktemp("a foreign folder")
    env = environment(nano_base, strips, folder / "run") | {
        "MY_API_TOKEN": "hunter2",
        "PROXY": "http://me:hunter3@host/",
    }
    before = nano_base.read_bytes()
    config = write_config(folder, ["trainer.export.merged=true", "trainer.export.flat_files=true"])
    process = launch(config, env)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output[-4000:]
    assert nano_base.read_bytes() == before
    return SimpleNamespace(path=folder / "run", env=env, config=config, output=output, base=nano_base)


def checkpoint(run_dir: Path) -> dict:
    return torch.load(run_dir / "checkpoints/checkpoint.pt", weights_only=True)


def rows(run_dir: Path) -> list[dict[str, str]]:
    with open(run_dir / "logs/metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_checkpoint_holds_what_is_trained_and_nothing_else(run):
    state = checkpoint(run.path)
    assert state["steps"]["train"] == STEPS
    assert state["epoch"] == STEPS // PHASE
    assert state["model"] and all(key.endswith((".lora_a", ".lora_b")) for key in state["model"])
    facts = json.loads((run.path / "lora.json").read_text())
    assert sum(value.numel() for value in state["model"].values()) == facts["trained"]
    assert all(value.isfinite().all() for value in state["model"].values())
    assert any(
        value.any() for key, value in state["model"].items() if key.endswith(".lora_b") and "image_encoder" in key
    )


def test_rows_of_metrics_are_whole_and_agree_with_the_validations(run):
    table = rows(run.path)
    assert [(row["step"], row["phase"]) for row in table] == [
        ("1", "train"),
        ("2", "train"),
        ("2", "val"),
        ("3", "train"),
        ("4", "train"),
        ("4", "val"),
        ("5", "train"),
        ("6", "train"),
        ("6", "val"),
    ]
    for row in table:
        assert all(row[name] for name in ("epoch", "loss", "loss_mask", "loss_dice", "loss_iou", "loss_class"))
        assert bool(row["learning_rate"]) == (row["phase"] == "train")
    validations = json.loads((run.path / "validations.json").read_text())
    of_table = [row for row in table if row["phase"] == "val"]
    assert [entry["step"] for entry in validations] == [2, 4, 6]
    for row, entry in zip(of_table, validations, strict=True):
        assert int(row["epoch"]) == entry["epoch"]
        assert {key: float(row[key]) for key in entry["metrics"]} == entry["metrics"]
        assert (
            float(row["iou"]) == entry["metrics"]["iou_1click"]
            and float(row["dice"]) == entry["metrics"]["dice_1click"]
        )


def test_the_learning_rate_warms_up_then_falls(run):
    rates = [float(row["learning_rate"]) for row in rows(run.path) if row["phase"] == "train"]
    assert rates[0] == pytest.approx(3e-5) and max(rates) == rates[1] <= 3e-3
    assert rates[1:] == sorted(rates[1:], reverse=True)


def test_adapters_are_of_the_right_moment(run):
    validations = json.loads((run.path / "validations.json").read_text())
    best = max(validations, key=lambda entry: entry["metrics"]["iou_1click"])
    adapters = {kind: load_adapter(run.path / "adapters" / kind) for kind in ("best", "latest", "final")}
    assert adapters["best"].metadata["step"] == best["step"]
    assert adapters["best"].metadata["metrics"] == best["metrics"]
    assert adapters["latest"].metadata["step"] == adapters["final"].metadata["step"] == STEPS
    state = checkpoint(run.path)["model"]
    for kind in ("latest", "final"):
        for name, layer in adapters[kind].layers.items():
            assert torch.equal(layer.lora_a, state[f"{name}.lora_a"]) and torch.equal(
                layer.lora_b, state[f"{name}.lora_b"]
            )
    assert adapters["best"].metadata["base_id"] == weights_id(read_weights(run.base))


def test_lora_json_and_the_summary_are_complete(run):
    facts = json.loads((run.path / "lora.json").read_text())
    assert facts["config"]["rank"] == 8 and facts["model_config"] == "configs/sam2_nano.yaml"
    assert facts["base_path"] == str(run.base) and facts["base_id"] == weights_id(read_weights(run.base))
    assert {"encoder attention", "decoder attention", "decoder mlp"} == set(facts["groups"])
    for group in facts["groups"].values():
        assert group["layers"] and group["ranks"] == [8] and group["share"] == group["trained"] / group["total"]
    summary = json.loads((run.path / "training_summary.json").read_text())
    validations = json.loads((run.path / "validations.json").read_text())
    assert summary["name"] == json.loads((run.path / "run.json").read_text())["name"]
    assert summary["steps"] == STEPS and summary["phases"] == summary["phases_planned"] == 3
    assert summary["stopped_early"] is False and summary["stop_reason"] is None
    assert summary["best"] == max(validations, key=lambda entry: entry["metrics"]["iou_1click"])
    assert summary["last"] == validations[-1] and summary["monitor"] == "iou_1click"
    assert summary["lora"] == facts["config"] and summary["seed"] == 42 and summary["world_size"] == 1
    assert summary["learning_rate"] == pytest.approx(3e-3, rel=0.02)  # the schedule's peak is between two of 200 points
    assert summary["parameters"] == {"trained": facts["trained"], "total": facts["total"]}
    assert summary["wall_seconds"] > 0 and summary["versions"]["torch"] == torch.__version__.split("+")[0]


def test_the_runs_name(run):
    name = json.loads((run.path / "run.json").read_text())["name"]
    assert re.fullmatch(r"sam2_nano_lora_r8_a16_lr3e-3_\d{8}-\d{6}", name)


def test_flat_files_of_the_older_script(run):
    """The merged ones load in stock SAM 2, the others hold what the checkpoint holds, only the newest are kept."""
    from sam2.build_sam import build_sam2

    summary = json.loads((run.path / "training_summary.json").read_text())
    best, metrics = summary["best"]["step"], summary["best"]["metrics"]
    quality = f"iou{metrics['iou_1click']:.4f}_dice{metrics['dice_1click']:.4f}"
    folder = run.path / summary["name"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [
            f"best_lora_step{best}_{quality}.torch",
            f"best_merged_step{best}_{quality}.torch",
            f"final_lora_step{STEPS}.torch",
            f"latest_lora_step{STEPS}.torch",
        ]
    )
    final = torch.load(folder / f"final_lora_step{STEPS}.torch", weights_only=True)["model"]
    state = checkpoint(run.path)["model"]
    assert final.keys() == state.keys() and all(torch.equal(final[key], state[key]) for key in state)
    expected = merge_state_dict(read_weights(run.base), load_adapter(run.path / "adapters/best"))
    for file in (run.path / "merged_best.pt", folder / f"best_merged_step{best}_{quality}.torch"):
        model = build_sam2("configs/sam2_nano.yaml", str(file), device="cpu", apply_postprocessing=False)
        assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    base = read_weights(run.base)
    changed = {key for key in base if not torch.equal(base[key], expected[key])}
    assert changed == {f"{name}.weight" for name in load_adapter(run.path / "adapters/best").layers}


def test_the_log_says_what_is_trained_and_keeps_secrets(run):
    log = (run.path / "logs/log.txt").read_text()
    for text in (log, run.output):
        assert "hunter2" not in text and "hunter3" not in text
    assert "MY_API_TOKEN=<redacted>" in log and "PROXY=http://me:<redacted>@host/" in log
    assert "encoder attention" in log and "samples" in log  # the report, and the data set's own line
    assert "Traceback" not in run.output and "deprecated" not in run.output


def test_a_finished_run_started_again_does_nothing(run):
    """It neither trains nor validates; the name is the first one; what the run left is as it was."""
    kept = [
        path
        for path in run.path.rglob("*")
        if path.is_file()
        and path.suffix in (".csv", ".json", ".pt", ".torch")
        or path.name == "adapter_model.safetensors"
    ]
    before = {path: path.read_bytes() for path in kept}
    assert len(before) > 10
    trainer = train_here(run.env, "trainer.export.merged=true", "trainer.export.flat_files=true")
    assert trainer.steps["val"] == checkpoint(run.path)["steps"]["val"]
    assert {path: path.read_bytes() for path in kept} == before


def test_full_fine_tuning_writes_whole_models(tmp_path, nano_base, strips):
    """Without LoRA the checkpoint holds the model, and `weights/final.pt` loads in stock SAM 2."""
    from sam2.build_sam import build_sam2

    env = environment(nano_base, strips, tmp_path / "full")
    trainer = train_here(
        env,
        "lora=null",
        "trainer.checkpoint.model_weight_initializer.ignore_missing_keys=null",
        "scratch.lr=1e-4",
        "trainer.distributed.find_unused_parameters=true",
        "scratch.steps=2",
    )
    model = build_sam2(
        "configs/sam2_nano.yaml", str(tmp_path / "full/weights/final.pt"), device="cpu", apply_postprocessing=False
    )
    trained = trainer.model.module.state_dict()
    assert all(torch.equal(value, trained[key]) for key, value in model.state_dict().items())
    assert checkpoint(tmp_path / "full")["model"].keys() == trained.keys()
    assert not (tmp_path / "full/adapters").exists()
    base = read_weights(nano_base)
    assert not torch.equal(trained["sam_mask_decoder.mask_tokens.weight"], base["sam_mask_decoder.mask_tokens.weight"])


def test_modules_trained_in_full_travel_with_the_adapter(tmp_path, nano_base, strips):
    env = environment(nano_base, strips, tmp_path / "run")
    train_here(env, "+lora.trainable=[sam_mask_decoder.pred_obj_score_head]", "scratch.steps=2")
    saved = load_file(tmp_path / "run/adapters/final/adapter_model.safetensors")
    head = {key for key in saved if "pred_obj_score_head" in key}
    assert len(head) == 6 and all(".lora_" not in key for key in head)
    assert {key for key in checkpoint(tmp_path / "run")["model"] if "pred_obj_score_head" in key} == {
        key.removeprefix("base_model.model.") for key in head
    }
