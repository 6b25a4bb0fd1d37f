"""LoRA for Meta's SAM 2 training framework: adapters, steel-defect data, Trainer hooks, merging for stock SAM 2."""

__version__ = "0.2.0"

_SERVING = (
    "active_adapter",
    "adapter_names",
    "add_adapter",
    "disable_adapters",
    "fit_predictor",
    "load_sam2",
    "remove_adapter",
    "set_adapter",
)


def __getattr__(name: str) -> object:
    """The functions of `deploy.serving`, imported on first access, since this package is also used without torch."""
    if name not in _SERVING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sam2_lora_ext.deploy import serving

    return getattr(serving, name)


def __dir__() -> list[str]:
    return [*globals(), *_SERVING]
