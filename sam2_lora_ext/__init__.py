"""LoRA for Meta's SAM 2 training framework: adapters, steel-defect data, Trainer hooks, and a merge that stock SAM 2 loads."""

__version__ = "0.1.0"
