"""Checks of gradients after a step, and of memory."""

import resource
from collections.abc import Iterator

import torch
from torch import nn

from sam2_lora_ext.doctor.findings import Finding, green, red


def check_gradients(model: nn.Module) -> Iterator[Finding]:
    """After a backward pass: every adapter has a gradient. With B = 0 that of A is zero, so that of B is checked."""
    from sam2_lora_ext.lora import lora_layers

    layers = dict(lora_layers(model))
    if not layers:
        none = [name for name, value in model.named_parameters() if value.requires_grad and value.grad is None]
        said = f"gradients in the model; {len(none)} trained parameters got none (the memory's, for one frame)"
        yield green("step", said)
        return
    gradients = {name: layer.lora_b.grad for name, layer in layers.items()}
    dead = [name for name, gradient in gradients.items() if gradient is None or not bool(gradient.abs().sum() > 0)]
    if any(gradient is not None and not bool(gradient.isfinite().all()) for gradient in gradients.values()):
        advice = "lower the learning rate's peak, or try trainer.optim.amp.enabled=false"
        yield red("step", "the gradient of an adapter is not finite", advice)
    elif dead:
        said = f"{len(dead)} of {len(layers)} adapters get no gradient, the first is {dead[0]}"
        advice = (
            "take them out of lora.targets (the memory attention learns from clips only: set windows), or set "
            "find_unused_parameters: true"
        )
        yield red("step", said, advice)
    else:
        yield green("step", f"all {len(layers)} adapters get a gradient")


def peak_memory(device: torch.device) -> int:
    """Peak bytes so far: of the GPU, or resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
