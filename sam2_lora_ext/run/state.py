"""Reads the progress of a run from its files. Needs no torch."""

import os
from pathlib import Path
from typing import Any

from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.files import LARGEST_NOTE, read_json

SUMMARY, OLD_SUMMARY = "training_summary.json", "training_summary.previous.json"
VALIDATIONS = "validations.json"


def is_finished(run: Path) -> bool:
    """Whether the run was trained to its end and not extended since.

    A run that is extended renames its summary to `OLD_SUMMARY`. Version 0.1.0 did not, so a summary with fewer steps
    than the last validation does not count.
    """
    summary, entries = _read(run / SUMMARY, dict), validations(run)
    try:
        return summary is not None and not (entries and entries[-1]["step"] > summary["steps"])
    except (LookupError, TypeError):
        return summary is not None  # damaged: reported by the code that reads the whole summary


def validations(run: Path) -> list[dict[str, Any]]:
    """The run's validations so far, oldest first, with `step`; empty if their file is missing or damaged."""
    entries = _read(run / VALIDATIONS, list) or []
    return entries if all(isinstance(entry, dict) and "step" in entry for entry in entries) else []


def _read(file: Path, kind: type) -> Any:
    try:
        content = read_json(file, LARGEST_NOTE)
    except UserError:
        return kind() if os.path.isfile(file) else None  # is_file raises for a name that is too long
    return content if isinstance(content, kind) else kind()
