"""Stock's own `Trainer` trains the same config, without the keys that only `LoRATrainer` knows."""

import json

import torch
from hydra.utils import instantiate

from helpers.small_runs import config_of, environment, rank_environment

OURS = (
    "run_dir",
    "model_config",
    "monitor",
    "monitor_mode",
    "early_stop",
    "metrics_every",
    "export",
    "keep_previous",
    "resume_with_changes",
)


def test_plain_trainer(tmp_path, nano_base, strips, monkeypatch):
    """Only `torch.cuda.reset_peak_memory_stats` is stubbed: without CUDA the stock Trainer cannot make a step."""
    from sam2.build_sam import build_sam2

    from sam2_lora_ext.adapters.merge_state import merge_state_dict
    from sam2_lora_ext.adapters.sources import read_adapter
    from sam2_lora_ext.adapters.weights import read_weights, write_weights

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *args: None)
    env = environment(nano_base, strips, tmp_path / "run")
    trainer_config = config_of(env).trainer
    for key in OURS:
        trainer_config.pop(key, None)
    trainer_config._target_ = "training.trainer.Trainer"
    trainer_config.max_epochs = 3
    trainer_config.logging.tensorboard_writer = {
        "_target_": "sam2_lora_ext.logger.make_csv_logger",
        "log_dir": str(tmp_path / "run/tensorboard"),
        "csv_path": str(tmp_path / "run/logs/scalars.csv"),
    }
    skipped = ["image_encoder.*.weight", "image_encoder.*.bias", "sam_mask_decoder.*.weight", "sam_mask_decoder.*.bias"]
    trainer_config.checkpoint.skip_saving_parameters = skipped
    with rank_environment(env):
        trainer = instantiate(trainer_config, _recursive_=False)
        trainer.run()
        assert type(trainer).__module__ == "training.trainer"
        assert trainer.epoch == 2 and trainer.steps["train"] == 6

    path = tmp_path / "run/checkpoints/checkpoint.pt"
    state = torch.load(path, weights_only=True)["model"]
    assert any(key.endswith(".lora_b") and value.any() for key, value in state.items())
    assert not any(key.startswith("image_encoder.trunk.blocks") and key.endswith(".weight") for key in state)
    base = read_weights(nano_base)
    assert all(torch.equal(value, base[key]) for key, value in state.items() if key in base)
    lines = [json.loads(line) for line in (tmp_path / "run/logs/val_stats.json").read_text().splitlines()]
    assert "Meters_train/val_severstal/segmentation/iou_1click" in lines[-1]
    assert "Step_Losses/Losses/train_severstal_loss" in (tmp_path / "run/logs/scalars.csv").read_text()

    adapter = read_adapter(path, alpha=16.0, base=base)
    write_weights(tmp_path / "merged.pt", merge_state_dict(base, adapter))
    build_sam2("configs/sam2_nano.yaml", str(tmp_path / "merged.pt"), device="cpu", apply_postprocessing=False)
