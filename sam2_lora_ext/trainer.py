"""SAM 2's Trainer with CPU training, early stopping, adapters on disk and complete rows of metrics.

Thin on purpose: the training step, the validation pass, DDP, AMP, logging and checkpoints are stock's.
An "epoch" of the Trainer is a phase here: the steps between two validations.

A run that reaches its last phase or stops early writes `best` (at its validation), `final`, then the summary. SIGTERM
or Ctrl-C finish the step on all ranks and write `latest` only, since `final` and the summary mark a finished run.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from training.trainer import unwrap_ddp_if_wrapped
from training.utils.distributed import barrier
from training.utils.train_utils import Phase

from sam2_lora_ext.class_prompts.agreement import agree, check_rates
from sam2_lora_ext.class_prompts.pairs import TrainingWindow
from sam2_lora_ext.host.patches import at_work, share_log
from sam2_lora_ext.run.checkpoint import left_out
from sam2_lora_ext.run.guard import StepGuard, raw_datasets
from sam2_lora_ext.run.history import History
from sam2_lora_ext.run.record import RunRecord, metrics_of
from sam2_lora_ext.run.resuming import ResumingTrainer
from sam2_lora_ext.run.seeding import derive_seed, seed_everything
from sam2_lora_ext.run.start import RunStart
from sam2_lora_ext.run.summary import peak_rate
from sam2_lora_ext.settings import check_trainer
from sam2_lora_ext.utils.errors import UserError

WINDOW = "window"  # the name of the meter over the training steps since the last row of metrics.csv


class LoRATrainer(ResumingTrainer):
    """The stock Trainer, extended by hooks.

    Args:
        run_dir: the folder of adapters, metrics and summaries: `${launcher.experiment_log_dir}`.
        model_config: the stock inference config of the base, such as configs/sam2.1/sam2.1_hiera_l.yaml.
        monitor: the validation metric for `best` and early stopping.
        monitor_mode: "max" or "min".
        early_stop: `patience` and `min_delta`; None trains to the end.
        metrics_every: training steps between two rows of logs/metrics.csv.
        export: `merged` and `flat_files`, both off by default; see `run.folder`.
        keep_previous: 1 also keeps the second-to-last checkpoint, for a resume when the last one is damaged.
        resume_with_changes: resume although settings that affect the result have changed, and record the changes.
        max_epochs: number of phases; not needed when the training data is a `PhasedDataset`, which sets it.
        **stock: everything that `training.trainer.Trainer` takes.
    """

    def __init__(
        self,
        *,
        run_dir: str,
        model_config: str | None = None,
        monitor: str = "iou_1click",
        monitor_mode: str = "max",
        early_stop: Mapping[str, Any] | None = None,
        metrics_every: int = 100,
        export: Mapping[str, bool] | None = None,
        keep_previous: int = 0,
        resume_with_changes: bool = False,
        max_epochs: int | None = None,
        seed_value: int = 42,
        accelerator: str = "cuda",
        **stock: Any,
    ):
        received = {name: value for name, value in locals().items() if name not in ("self", "stock", "__class__")}
        received |= stock
        self.run_dir = Path(str(run_dir))  # checked below
        self.start = RunStart(self.run_dir, type(self), received)
        self.model_config, self.keep_previous = model_config, bool(keep_previous)
        self.seed_value, self.accelerator, self.metrics_every = seed_value, accelerator, metrics_every
        self.export_conf = {"merged": False, "flat_files": False, **(export or {})}
        self.base_id = self.base_path = None
        self.window, self.guard = TrainingWindow(), StepGuard(self.run_dir / "debug")
        with at_work(self.accelerator):
            try:
                check_trainer(received)
                if accelerator == "cuda" and not torch.cuda.is_available():
                    raise UserError("trainer.accelerator is cuda but no GPU is visible: set it to cpu")
                self.history = History.of(monitor, monitor_mode, early_stop)
                super().__init__(max_epochs=max_epochs or 1, seed_value=seed_value, accelerator=accelerator, **stock)
                self._open_run()
            except BaseException:
                self.start.withdraw()
                self.start.release()
                raise

    def _setup_torch_dist_and_backend(self, *args: Any) -> None:
        super()._setup_torch_dist_and_backend(*args)
        self.start.take()

    def _setup_components(self) -> None:
        share_log()
        super()._setup_components()
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if not self.trained:
            raise UserError("nothing in the model is trainable: give lora some targets, or set it to null")
        check_rates(self.optim_conf.options if self.optim_conf else None, self.model)
        if any(not parameter.requires_grad for parameter in self.model.parameters()):
            self.checkpoint_conf.skip_saving_parameters = left_out(self.model)
        # The base is loaded again on resume: the checkpoint lacks the frozen weights, and the base may have changed.
        self.checkpoint_conf.initialize_after_preemption = True
        if self.scaler.is_enabled() and self.optim_conf.amp.amp_dtype == "bfloat16":
            self.scaler = torch.amp.GradScaler(enabled=False)  # bfloat16 has float32's range
        for key in self.loss:
            self.meters.setdefault(Phase.TRAIN, {}).setdefault(key, {})[WINDOW] = self.window
        self.user_gradient_logger, self.gradient_logger = self.gradient_logger, self._after_gradients

    def _setup_dataloaders(self) -> None:
        super()._setup_dataloaders()
        meters = self._get_meters([Phase.VAL]).values()
        agree(self.model, self.loss, self.train_dataset, self.val_dataset, meters)
        self.max_epochs = getattr(self.train_dataset, "num_phases", self.max_epochs)

    def _open_run(self) -> None:
        self.start.check_base(self.base_id, self.base_path)
        model = unwrap_ddp_if_wrapped(self.model)
        steps = getattr(model, "num_correction_pt_per_frame", 7) + 1
        meters = self._get_meters([Phase.VAL]).values()
        meter_keys = [key for meter in meters for key in meter.keys(steps, tracked=True)]
        if self.mode == "train":
            self.history.check(meter_keys)
        self.record = RunRecord(
            self.start,
            model,
            history=self.history,
            lora=self.model_conf.get("lora"),
            facts={"base_id": self.base_id, "base_path": self.base_path, "model_config": self.model_config},
            export=self.export_conf,
            meter_keys=meter_keys,
            learning_rate=peak_rate(self.optim),
            epoch=self.epoch,
            step=self.steps[Phase.TRAIN],
            last_epoch=self.max_epochs,
            trains=self.mode != "val",
        )
        self.history = self.record.history

    def run(self) -> None:
        """Trains to the end or to early stopping, unless the run is finished; `mode: val` validates once."""
        try:
            with at_work(self.accelerator), self.guard:
                if self.mode == "val":
                    self.run_val()
                if self.mode == "val" or self.record.finished:
                    return
                done = self.epoch - 1
                if self.mode == "train" and self.history.last_epoch < done and self._validates(done):
                    self.epoch -= 1  # the run ended between its checkpoint and its validation
                    self.run_val()
                    self.epoch += 1
                self.run_train()
                self.record.finish(
                    self.steps[Phase.TRAIN],
                    seed=self.seed_value,
                    epochs=self.epoch + 1,
                    planned_epochs=self.max_epochs,
                    stop_reason=self._stop_reason(),
                    wall_seconds=max(self.time_elapsed_meter.val, self.ckpt_time_elapsed or 0),
                    skipped_steps=self.guard.skipped,
                )
        finally:
            self.start.release()

    def run_train(self) -> None:
        """Stock's loop, with one validation per phase, early stopping, and seeds that depend on the phase only."""
        while self.epoch < self.max_epochs and not self._stop_reason():
            self._reseed(Phase.TRAIN, self.epoch)
            loader = self.train_dataset.get_loader(epoch=int(self.epoch))
            barrier()
            outs = self.train_epoch(loader)
            self.logger.log_dict(outs, self.epoch)
            self.guard.check_weights(self.trained, self.steps[Phase.TRAIN])
            self.record.export("latest", self.steps[Phase.TRAIN])
            self.save_checkpoint(self.epoch + 1)
            if self.mode == "train" and self._validates(self.epoch):
                self.run_val()
            self.epoch += 1
        self.epoch -= 1  # as stock leaves it

    def run_val(self) -> None:
        """Stock's validation, with the same prompts each time."""
        self._reseed(Phase.VAL, 0)
        super().run_val()

    def val_epoch(self, val_loader: Any, phase: str) -> dict[str, float]:
        outs = super().val_epoch(val_loader, phase)
        metrics = metrics_of(outs, self._get_meters([phase]))
        if self.mode != "val":
            self.record.validation(self.steps[Phase.TRAIN], self.epoch, metrics)
        return outs

    def _step(self, batch: Any, model: torch.nn.Module, phase: str) -> tuple:
        """Stock's step; on all ranks, a signal ends the run before it and a loss that is not finite after it."""
        if self.guard.stop_signal:
            self.guard.check_weights(self.trained, self.steps[Phase.TRAIN])
            # checkpoint.pt stays at the end of the last phase: a resume from inside a phase would repeat its steps
            self.record.export("latest", self.steps[Phase.TRAIN])
            self.guard.exit(self.steps[Phase.TRAIN])
        result = super()._step(batch, model, phase)
        losses = {**result[0], **result[2]}
        dataset = self.train_dataset if phase == Phase.TRAIN else self.val_dataset
        self.guard.watch(batch, losses, self.steps[Phase.TRAIN], phase, raw_datasets(dataset))
        return result

    def _run_step(self, *args: Any, **kwargs: Any) -> None:
        """Runs stock's step; its exception about a loss that is not finite becomes a `UserError`."""
        try:
            super()._run_step(*args, **kwargs)
        except FloatingPointError as error:
            raise UserError(self.guard.diagnosis()) from error

    def _after_gradients(self, model: torch.nn.Module, rank: int, where: float) -> None:
        """The Trainer's gradient hook, after the rate is set and gradients are clipped, before the update."""
        step = self.steps[Phase.TRAIN]
        self.guard.check_gradients(self.trained, scaled=self.scaler.is_enabled())
        if self.user_gradient_logger is not None:
            self.user_gradient_logger(model, rank=rank, where=where)
        if step % self.metrics_every == 0:
            self.record.window_row(step, self.epoch, self.window, self.optim.optimizer.param_groups[0]["lr"])

    def _validates(self, epoch: int) -> bool:
        return epoch >= 0 and (epoch % self.val_epoch_freq == 0 or epoch == self.max_epochs - 1)

    def _stop_reason(self) -> str | None:
        return self.history.stop_reason if self.mode == "train" else None

    def _reseed(self, phase: str, epoch: int) -> None:
        """Seeds from seed, phase, epoch and rank only, so that a resumed run equals an uninterrupted one."""
        seed_everything(self.seed_value, phase, epoch, self.distributed_rank)
        # the same on all ranks, as in stock
        unwrap_ddp_if_wrapped(self.model).rng = np.random.default_rng(derive_seed(self.seed_value, phase, epoch))
