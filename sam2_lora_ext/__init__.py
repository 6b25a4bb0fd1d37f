"""LoRA for Meta's SAM 2 training framework: adapters, steel-defect data, Trainer hooks, merging for stock SAM 2."""

from importlib import import_module

__version__ = "0.2.0"

_HOME = {
    "active_adapter": "lora.live",
    "adapter_names": "lora.live",
    "add_adapter": "deploy.load",
    "disable_adapters": "lora.live",
    "fit_predictor": "deploy.predictors",
    "load_sam2": "deploy.load",
    "remove_adapter": "lora.live",
    "set_adapter": "lora.live",
}


def __getattr__(name: str) -> object:
    """The functions that deploy adapters, imported on first access, since this package is also used without torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
