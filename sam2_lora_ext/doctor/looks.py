"""What the doctor says about a data set, about gradients after a step, and about memory."""

import resource
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from sam2_lora_ext.doctor.findings import Finding, green, red, yellow


def describe_dataset(phase: str, dataset: Any) -> Iterator[Finding]:
    """What a `SeverstalRawDataset` holds."""
    counts = Counter(number for item in range(len(dataset)) for number in dataset.classes_of(item))
    names = ", ".join(f"{name} {counts[number]}" for number, name in sorted(dataset.class_names.items()))
    clean = sum(not dataset.classes_of(item) for item in range(len(dataset)))
    yield green(
        "data",
        f"{phase}: {len(dataset)} samples, with {names}; {clean} clean; {len(dataset.index)} images in {dataset.index.image_dir}",
    )
    if skipped := dataset.index.problems:
        yield yellow(
            "data",
            f"{phase}: {len(skipped)} entries are skipped, the first: {skipped[0]}",
            "python tools/prepare_data.py scan DATA lists all",
        )
    if not counts:
        yield red("data", f"{phase}: no sample has a defect", "look at split_file and min_area")
    elif absent := [name for number, name in sorted(dataset.class_names.items()) if not counts[number]]:
        yield yellow(
            "data", f"{phase}: no sample of {', '.join(absent)}", "look at the split, if that class should be there"
        )


def check_gradients(model: nn.Module) -> Iterator[Finding]:
    """After a backward: every adapter has a gradient. With B = 0 that of A is zero, so B tells."""
    from sam2_lora_ext.lora import lora_layers

    layers = dict(lora_layers(model))
    if not layers:
        none = [name for name, value in model.named_parameters() if value.requires_grad and value.grad is None]
        yield green(
            "step", f"gradients in the model; {len(none)} trained parameters got none (the memory's, for one frame)"
        )
        return
    dead = [
        name
        for name, layer in layers.items()
        if layer.lora_b.grad is None or not bool(layer.lora_b.grad.abs().sum() > 0)
    ]
    if any(layer.lora_b.grad is not None and not bool(layer.lora_b.grad.isfinite().all()) for layer in layers.values()):
        yield red(
            "step",
            "the gradient of an adapter is not finite",
            "lower the learning rate's peak, or try trainer.optim.amp.enabled=false",
        )
    elif dead:
        yield red(
            "step",
            f"{len(dead)} of {len(layers)} adapters get no gradient, the first is {dead[0]}",
            "take them out of lora.targets (the memory attention learns from clips only: set windows), or set find_unused_parameters: true",
        )
    else:
        yield green("step", f"all {len(layers)} adapters get a gradient")


def peak_memory(device: torch.device) -> int:
    """Bytes at most so far: of the GPU, or resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
