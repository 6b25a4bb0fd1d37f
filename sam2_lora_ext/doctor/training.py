"""Checks the parts of a training: the base, the adapted model, the data, and one real step on one sample."""

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from sam2_lora_ext.doctor.data import DataSets
from sam2_lora_ext.doctor.findings import Finding, green, red, yellow
from sam2_lora_ext.doctor.step_checks import check_gradients, peak_memory
from sam2_lora_ext.settings import check_class_ids
from sam2_lora_ext.utils.errors import UserError

GIGA = 1e9
TRIES = 50  # samples searched for one with a defect


class Training:
    """The parts of a training, built on first use and shared by several checks.

    Args:
        config: the resolved config as plain containers.
    """

    def __init__(self, config: Mapping[str, Any]):
        self.trainer = config["trainer"]
        self.data = DataSets(self.trainer["data"])
        self.device = torch.device(str(self.trainer.get("accelerator", "cuda")))
        self._model: nn.Module | None = None

    @property
    def initializer(self) -> Mapping[str, Any]:
        """The config of `model_weight_initializer`; empty without one."""
        return (self.trainer.get("checkpoint") or {}).get("model_weight_initializer") or {}

    @property
    def base_path(self) -> str | None:
        """The file of the base, or None."""
        return (self.initializer.get("state_dict") or {}).get("checkpoint_path")

    @property
    def model(self) -> nn.Module:
        """The model as in the Trainer, without weights."""
        if self._model is None:
            from hydra.utils import instantiate

            torch.manual_seed(0)
            self._model = instantiate(self.trainer["model"], _convert_="all")
        return self._model

    @property
    def buildable(self) -> bool:
        """Whether the model can be built; `check_adapters` reports the reason if not."""
        try:
            return self.model is not None
        except Exception:
            return False

    def check_checkpoint(self) -> Iterator[Finding]:
        """Checks that the base is readable, finite and fits the model, reports its size and identity, and loads it."""
        from sam2_lora_ext.adapters.weights import ADAPTER_KEYS, explain_mismatch, identify, read_weights, weights_id

        area = "checkpoint"
        if self.base_path is None:
            yield yellow(
                area,
                "the config names no base, so training would start from random weights",
                "set trainer.checkpoint.model_weight_initializer as in configs/base/severstal.yaml",
            )
            return
        if not os.path.exists(self.base_path):
            return  # reported by check_paths
        state = read_weights(self.base_path)
        count = sum(value.numel() for value in state.values())
        kind = identify(state) or "no stock SAM 2"
        said = f"{self.base_path} is {kind}, {count / 1e6:,.1f} M parameters, id {weights_id(state)[:12]}"
        yield green(area, said)
        if any(key.endswith(ADAPTER_KEYS) for key in state):
            yield red(
                area,
                f"{self.base_path} is a training checkpoint with adapters, not a base",
                "give the file that its training started from, or merge it first: tools/merge_lora.py",
            )
            return
        if self.buildable and (sentence := explain_mismatch(state, self.model.state_dict())):
            yield red(area, sentence, "use the config for this checkpoint, or the checkpoint for this config")
            return
        missing = [key for key in self.model.state_dict() if key not in state] if self.buildable else []
        for glob in (self.initializer.get("ignore_missing_keys") or []) if self.buildable else []:
            if not any(fnmatchcase(key, glob) for key in missing):
                said = f"trainer.checkpoint.model_weight_initializer.ignore_missing_keys: {glob!r} matches nothing"
                yield red(area, said, "set it to null if no adapter is trained")
        if bad := [
            key for key, value in state.items() if value.is_floating_point() and not bool(value.isfinite().all())
        ]:
            yield red(
                area,
                f"{self.base_path} holds NaN or infinity in {bad[0]} and {len(bad) - 1} more tensors",
                "copy or download it again",
            )
            return
        if self.buildable:
            self.model.load_state_dict(state, strict=False)

    def check_adapters(self) -> Iterator[Finding]:
        """Reports the trained parameters; building the model fails if a target matches nothing."""
        from sam2_lora_ext.lora import report

        facts = report(self.model)
        if not facts["trained"]:
            yield red(
                "adapters",
                "nothing in the model is trainable",
                "give trainer.model.lora some targets, or set it to null",
            )
            return
        groups = ", ".join(f"{len(row['layers'])} in {name}" for name, row in facts["groups"].items())
        said = f"{facts['trained']:,} of {facts['total']:,} parameters are trained ({facts['share']:.2%})"
        yield green("adapters", f"{said}; layers: {groups or 'all'}")

    def check_loss(self) -> Iterator[Finding]:
        """Checks that the loss can be built and the data has the classes that it weights; no finding if so."""
        from hydra.utils import instantiate

        losses = {key: instantiate(conf, _convert_="all") for key, conf in (self.trainer.get("loss") or {}).items()}
        check_class_ids(losses, self.data.built["train"])
        yield from ()

    def check_step(self) -> Iterator[Finding]:
        """Runs a click step on one sample with a defect."""
        yield from self.one_step(self.sample(), "one sample")

    def one_step(self, batch: Any, what: str) -> Iterator[Finding]:
        """Runs forward, loss, backward and an optimizer step on a batch, called `what`; reports time and memory."""
        from hydra.utils import instantiate

        model, area = self.model.to(self.device).train(), "step"
        model.zero_grad()
        batch = batch.to(self.device)
        losses = nn.ModuleDict({key: instantiate(conf, _convert_="all") for key, conf in self.trainer["loss"].items()})
        trained = [value for value in model.parameters() if value.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-6)
        before = peak_memory(self.device)
        began = time.perf_counter()
        with self.autocast():
            outputs = model(batch)
            values = losses[batch.dict_key](outputs, batch.masks)
        loss = values["core_loss"] if isinstance(values, Mapping) else values
        if not torch.isfinite(loss):
            yield red(
                area,
                f"the loss of {what} is {float(loss)}",
                "check the base and the sample's image; try trainer.optim.amp.enabled=false",
            )
            return
        loss.backward()
        optimizer.step()
        seconds = time.perf_counter() - began
        where = "on the GPU" if self.device.type == "cuda" else "of the process at most"
        yield green(
            area,
            f"{what}, {len(batch.masks[0])} object(s): loss {float(loss):.3f}, {seconds:.1f} s, "
            f"{peak_memory(self.device) / GIGA:.2f} GB {where} ({before / GIGA:.2f} GB before)",
        )
        yield from check_gradients(model)

    def sample(self) -> Any:
        """A batch of one training sample, with a defect if one of the first `TRIES` has any."""
        from hydra.utils import instantiate

        conf = self.trainer["data"]["train"]
        dataset = instantiate(conf["datasets"][0], _convert_="all")
        holder = find_with(dataset, "video_dataset")
        return instantiate(conf["collate_fn"])([holder[self.place_with_defect(holder)]])

    @staticmethod
    def place_with_defect(dataset: Any) -> int:
        """The index of the first sample with a defect in a wrapper of a `video_dataset`; 0 if `TRIES` have none."""
        inner = getattr(dataset, "video_dataset", None)
        known = getattr(inner, "classes_of", lambda index: {1})
        return next((index for index in range(min(len(inner or dataset), TRIES)) if known(index)), 0)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Mixed precision as in the config; the Trainer uses it on CUDA only."""
        amp = (self.trainer.get("optim") or {}).get("amp") or {}
        if not amp.get("enabled") or self.device.type != "cuda":
            return contextlib.nullcontext()
        return torch.autocast("cuda", dtype=getattr(torch, amp.get("amp_dtype", "bfloat16")))

    def disk_need(self) -> float:
        """Bytes that a run writes: checkpoints with optimizer state (two during a replacement), exports, logs."""
        from sam2_lora_ext.lora import lora_layers

        trained = sum(value.numel() for value in self.model.parameters() if value.requires_grad)
        total = sum(value.numel() for value in self.model.parameters())
        exported = 3 * trained if next(lora_layers(self.model), None) else 2 * total  # best, final (and latest)
        export = self.trainer.get("export") or {}
        merged = total * (bool(export.get("merged")) + bool(export.get("flat_files")))
        copies = 2 + int(self.trainer.get("keep_previous") or 0)
        return 4 * (copies * 3 * trained + exported + 2 * merged) + 50e6


def find_with(dataset: Any, name: str) -> Any:
    """The data set with an attribute `name`, searched inside wrappers with an attribute `dataset`.

    Raises:
        UserError: there is none.
    """
    inner = dataset
    while inner is not None and not hasattr(inner, name):
        inner = getattr(inner, "dataset", None)
    if inner is None:
        raise UserError(f"the training data {type(dataset).__name__} has no {name}: the step needs a VOSDataset")
    return inner
