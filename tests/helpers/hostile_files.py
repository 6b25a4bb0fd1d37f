"""Builds files with a single error, and one that runs code, for test_hostile_inputs.py."""

import json
import os
import struct
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

NAME = "base_model.model.encoder.0"


class Evil:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple:
        return os.system, (f"touch '{self.trace}'",)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 4))
        self.norm = nn.LayerNorm(4)


def tensors(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"{NAME}.lora_A.weight": torch.ones(2, 6), f"{NAME}.lora_B.weight": torch.ones(4, 2)} | changes


def adapter_folder(
    folder: Path, state: dict[str, torch.Tensor] | None = None, metadata: dict[str, str] | None = None, **config: object
) -> Path:
    """A good PEFT folder, but for the changes."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["encoder.0"], "bias": "none"} | config
    (folder / "adapter_config.json").write_text(json.dumps(values))
    save_file(
        tensors() if state is None else state,
        folder / "adapter_model.safetensors",
        metadata={"format": "pt", **(metadata or {})},
    )
    return folder


def safetensors_of(header: bytes, body: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + body


def entry(dtype: str = "F32", shape: list = [1], offsets: list = [0, 4]) -> bytes:  # noqa: B006
    return json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


def evil_run(folder: Path) -> Path:
    """The checkpoint of a run folder whose configs name a `_target_`, which tools must not call."""
    target = {"_target_": "os.system", "command": f"touch '{folder / 'trace'}'"}
    (folder / "run").mkdir()
    (folder / "run/config.yaml").write_text(f"trainer: {json.dumps(target)}\n")
    (folder / "run/lora.json").write_text(json.dumps({"config": target}))
    (folder / "run/checkpoints").mkdir()
    torch.save(
        {"model": {"encoder.0.lora_a": torch.ones(2, 6), "encoder.0.lora_b": torch.ones(4, 2)}},
        folder / "run/checkpoints/checkpoint.pt",
    )
    return folder / "run/checkpoints/checkpoint.pt"
