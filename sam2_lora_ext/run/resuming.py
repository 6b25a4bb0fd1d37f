"""SAM 2's Trainer that identifies its base, checks a checkpoint before a resume, and writes checkpoints atomically."""

from pathlib import Path
from typing import Any

from training.trainer import Trainer

from sam2_lora_ext.adapters.weights import read_file, weights_id
from sam2_lora_ext.run.base_weights import base_path, load_base
from sam2_lora_ext.run.checkpoint import contents_of, own_options, prepare_resume, write_checkpoint
from sam2_lora_ext.run.guard import StepGuard
from sam2_lora_ext.run.record import RunRecord
from sam2_lora_ext.run.start import RunStart, on_rank_0


class ResumingTrainer(Trainer):
    """Overrides the stock Trainer's hooks for weights; a subclass sets the attributes before its `super().__init__`.

    Attributes:
        start: compares this start with the run's record.
        guard: counts the steps that the scaler skipped.
        record: provides the notes for checkpoints.
        keep_previous: keep the second-to-last checkpoint.
        base_path: the file of the base, None without a base; set by this class.
        base_id: `weights_id` of the base; set by this class.
    """

    start: RunStart
    guard: StepGuard
    record: RunRecord
    keep_previous: bool
    base_path: Path | None
    base_id: str | None

    def load_checkpoint(self) -> None:
        folder = Path(self.checkpoint_conf.save_dir)
        self.start.compare(folder, self.train_dataset, self.val_dataset)
        skipped = set(self.checkpoint_conf.skip_saving_parameters)
        saved = {name: value for name, value in self.model.state_dict().items() if name not in skipped}
        on_rank_0(lambda: prepare_resume(folder, saved))
        super().load_checkpoint()

    def _load_resuming_checkpoint(self, ckpt_path: str) -> None:
        with own_options(self.optim.optimizer, self.start.allowed):
            super()._load_resuming_checkpoint(ckpt_path)
        self.guard.skipped = read_file(ckpt_path).get("skipped_steps", 0)

    def _call_model_initializer(self) -> None:
        self.base_path = base_path(self.checkpoint_conf.model_weight_initializer)
        load_base(self.base_path, self.model, super()._call_model_initializer)
        self.base_id = weights_id(self.model.state_dict()) if self.base_path is not None else None

    def _save_checkpoint(self, checkpoint: dict[str, Any], checkpoint_path: str) -> None:
        contents = contents_of(checkpoint, self.guard.skipped, self.record.notes)
        write_checkpoint(contents, Path(checkpoint_path), self.keep_previous)
