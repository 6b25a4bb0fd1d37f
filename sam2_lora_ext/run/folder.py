"""The files of a run besides the Trainer's own, written atomically by rank 0.

run_dir/
  run_config.yaml         arguments of the Trainer, ranks, identities of base and data, changes: see `run.config`
  run.json                the run's name with its start time, fixed at the first start
  lora.json               adapted layers, parameters, the LoRA config, the identity of the base
  validations.json        the metrics of every validation, which determine early stopping and `best`
  adapters/{best,latest,final}/   PEFT folders
  weights/{best,final}.pt         full weights instead, if no adapter is trained (class prompts as a further entry)
  merged_best.pt          on request: weights that stock `build_sam2` loads
  <name>/*.torch          on request: the flat files of the older Severstal script
  training_summary.json   at the end
"""

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

import sam2_lora_ext
from sam2_lora_ext.adapters.class_binding import CLASS_PROMPTS, facts_of, prompts_of
from sam2_lora_ext.adapters.class_prompts import ClassPrompts
from sam2_lora_ext.adapters.merge import write_merged
from sam2_lora_ext.adapters.merge_state import merge_state_dict
from sam2_lora_ext.adapters.peft import save_adapter
from sam2_lora_ext.adapters.weights import ADAPTER_KEYS, NOTES, read_weights
from sam2_lora_ext.lora import lora_layers, report
from sam2_lora_ext.lora.adapter_state import Adapter
from sam2_lora_ext.lora.class_tokens import STATE_KEY
from sam2_lora_ext.run.checkpoint import write_checkpoint
from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.files import LARGEST_NOTE, read_json, write_json

SIZES = {"t": "tiny", "s": "small", "b+": "base_plus", "l": "large"}


def model_size(config_name: str | None) -> str:
    """The size of a stock config, such as "large" for "configs/sam2.1/sam2.1_hiera_l.yaml"; else its file's name."""
    name = Path(config_name or "custom").stem
    hiera = re.search(r"hiera_(t|s|b\+|l)$", name)
    return SIZES[hiera.group(1)] if hiera else name.removeprefix("sam2_")


def short_number(value: float) -> str:
    """A learning rate in short notation for a folder's name: 1e-3, 2.5e-4, 0."""
    mantissa, exponent = f"{value:.4e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}" if value else "0"


class RunFolder:
    """The files of one run; only rank 0 creates this object.

    Args:
        path: `launcher.experiment_log_dir`.
        model: the unwrapped model; read at each export.
        facts: the constant part of the adapter's metadata (`base_id`, `model_config` ...).
        lora: the `LoRAConfig` as given; None for full fine-tuning.
        merged: also write `merged_best.pt`.
        flat_files: also write the flat files.
        base_path: the base checkpoint, read again for merging.
        monitor: the metric in the names of the flat files.
    """

    def __init__(
        self,
        path: Path,
        model: nn.Module,
        facts: Mapping[str, Any],
        lora: Mapping[str, Any] | None,
        *,
        merged: bool,
        flat_files: bool,
        base_path: str | None,
        monitor: str = "iou_1click",
    ):
        self.path, self.model, self.facts = path, model, dict(facts)
        self.notes = {"config": lora, **facts, "version": sam2_lora_ext.__version__}  # notes of the checkpoint
        if class_facts := facts_of(model):
            self.notes[CLASS_PROMPTS] = class_facts
        self.merged, self.flat_files, self.base_path, self.monitor = merged, flat_files, base_path, monitor
        self.report = report(model)
        self.has_adapter = any(True for _ in lora_layers(model))
        if merged and not base_path:
            raise UserError(
                "trainer.export.merged needs trainer.checkpoint.model_weight_initializer to name the base checkpoint"
            )

    def name(self, learning_rate: float) -> str:
        """The run's name, such as sam2_large_lora_r8_a16_lr1e-3_20260102-030405; set once, then read from run.json."""
        file = self.path / "run.json"
        if file.exists():
            return read_notes(file, {"name"})["name"]
        layer = next((layer for _, layer in lora_layers(self.model)), None)
        method = "full" if self.report["trained"] == self.report["total"] else "modules"
        method = f"lora_r{layer.rank}_a{layer.alpha:g}" if layer is not None else method
        started = time.strftime("%Y%m%d-%H%M%S")
        name = f"sam2_{model_size(self.facts.get('model_config'))}_{method}_lr{short_number(learning_rate)}_{started}"
        write_json(file, {"name": name, "started": started})
        return name

    def write_lora(self) -> None:
        """Writes lora.json with the `LoRAConfig` as given, the base, the layers and their parameters."""
        write_json(self.path / "lora.json", {**self.notes, **self.report})

    def validations(self) -> list[dict[str, Any]]:
        """The validations so far, oldest first: `epoch` (from 0), `step` and `metrics`."""
        file = self.path / "validations.json"
        return read_notes(file, {"epoch", "step", "metrics"}) if file.exists() else []

    def write_validations(self, history: list[dict[str, Any]]) -> None:
        """Replaces the record of validations."""
        write_json(self.path / "validations.json", history)

    def export(self, kind: str, step: int, metrics: Mapping[str, float], name: str) -> None:
        """Writes the current model as `best`, `latest` or `final`."""
        prompts = prompts_of(self.model, self.facts.get("base_id"))
        if not self.has_adapter:
            if kind != "latest":  # checkpoint.pt already has the latest weights
                state = {key: value for key, value in self.model.state_dict().items() if key != STATE_KEY}
                write_merged(self.path / "weights" / f"{kind}.pt", state, "pt", prompts)
            return
        adapter = Adapter.from_model(self.model, {**self.facts, "step": step, "kind": kind, "metrics": dict(metrics)})
        adapter.class_prompts = prompts
        save_adapter(adapter, self.path / "adapters" / kind)
        merged = None
        if kind == "best" and (self.merged or (self.flat_files and self.base_path)):
            merged = merge_state_dict(read_weights(self.base_path), adapter)
        if kind == "best" and self.merged:
            write_merged(self.path / "merged_best.pt", merged, "pt", prompts)
        if self.flat_files:
            self._write_flat(kind, step, metrics, name, merged, prompts)

    def _write_flat(
        self,
        kind: str,
        step: int,
        metrics: Mapping[str, float],
        name: str,
        merged: dict | None,
        prompts: ClassPrompts | None,
    ) -> None:
        folder = self.path / name
        trained = {key for key, value in self.model.named_parameters() if value.requires_grad}
        kept = {
            key: value.detach().clone()
            for key, value in self.model.state_dict().items()
            if key in trained or key.endswith(ADAPTER_KEYS)
        }
        iou = next((key for key in (self.monitor, *metrics) if key.startswith("iou_")), "")
        values = metrics.get(iou, float("nan")), metrics.get(iou.replace("iou", "dice", 1), float("nan"))
        quality = f"iou{values[0]:.4f}_dice{values[1]:.4f}"
        file = {
            "best": f"best_lora_step{step}_{quality}.torch",
            "latest": f"latest_lora_step{step}.torch",
            "final": f"final_lora_step{step}.torch",
        }[kind]
        old = [path for path in folder.glob(f"{kind}_*.torch") if path.name != file]
        write_checkpoint({NOTES: self.notes, "model": kept}, folder / file, keep_previous=False)
        if merged is not None:
            merged_file = folder / f"best_merged_step{step}_{quality}.torch"
            write_merged(merged_file, merged, "pt", prompts)
            old = [path for path in old if path != merged_file]
        for path in old:
            path.unlink()


def read_notes(file: Path, fields: set[str]) -> Any:
    """The JSON of a file: an object, or a list of objects, with at least these fields."""
    again = "restore it, or choose another launcher.experiment_log_dir"
    try:
        content = read_json(file, LARGEST_NOTE)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error}): {again}") from error
    entries = content if isinstance(content, list) else [content]
    if not all(isinstance(entry, dict) and fields <= entry.keys() for entry in entries):
        raise UserError(f"{file} has unexpected content: {again}")
    return content
