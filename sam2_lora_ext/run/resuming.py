"""SAM 2's Trainer with what it reads and writes of weights: the base, a checkpoint to go on from, and a new one."""

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
    """The stock Trainer's hooks about weights; a subclass sets what they use before its `super().__init__`.

    Attributes:
        start: what a run may go on from.
        guard: counts the steps that the scaler skipped.
        record: what is noted in a checkpoint.
        keep_previous: keep the checkpoint before the last one.
        base_path: the file of the base, None without one; set here.
        base_id: `weights_id` of the base; set here.
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
