"""Checks gradients after a step and measures memory."""

import resource
from collections.abc import Iterator

import torch
from torch import nn

from sam2_lora_ext.doctor.findings import Finding, green, red


def check_gradients(model: nn.Module) -> Iterator[Finding]:
    """Whether every adapter has a gradient after a backward pass: B's, since with B = 0 the gradient of A is zero."""
    from sam2_lora_ext.lora import lora_layers

    layers = dict(lora_layers(model))
    if not layers:
        none = [name for name, value in model.named_parameters() if value.requires_grad and value.grad is None]
        said = (
            f"the model has gradients; {len(none)} trained parameters have none (such as the memory's, for one frame)"
        )
        yield green("step", said)
        return
    gradients = {name: layer.lora_b.grad for name, layer in layers.items()}
    dead = [name for name, gradient in gradients.items() if gradient is None or not bool(gradient.abs().sum() > 0)]
    if any(gradient is not None and not bool(gradient.isfinite().all()) for gradient in gradients.values()):
        advice = "lower the peak learning rate, or try trainer.optim.amp.enabled=false"
        yield red("step", "the gradient of an adapter is not finite", advice)
    elif dead:
        said = f"{len(dead)} of {len(layers)} adapters get no gradient, the first is {dead[0]}"
        advice = (
            "remove them from lora.targets (the memory attention learns from clips only: set windows), or set "
            "find_unused_parameters: true"
        )
        yield red("step", said, advice)
    else:
        yield green("step", f"all {len(layers)} adapters get a gradient")


def peak_memory(device: torch.device) -> int:
    """Peak bytes so far of the GPU's memory, or of this process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
