"""Checks the ranges of numbers on a command line before any work begins."""

import argparse
from collections.abc import Callable
from typing import Any

from sam2_lora_ext.settings.data import RESOLUTION, SEED
from sam2_lora_ext.settings.kinds import Kind, Whole, shown
from sam2_lora_ext.settings.model import ALPHA, RANK

__all__ = ["ALPHA", "COUNT", "GPUS", "NODES", "RANK", "RESOLUTION", "SEED", "THREADS", "number"]

GPUS, NODES, THREADS = Whole(1, 1024), Whole(1, 10_000), Whole(1, 1024)
COUNT = Whole(1, 10**9)  # of images, steps, rounds


def number(kind: Kind) -> Callable[[str], Any]:
    """The `type` of an argument with the range of a `Whole` or a `Number`: `type=number(RANK)`."""

    def parse(text: str) -> Any:
        try:
            value = (int if isinstance(kind, Whole) else float)(text)
        except ValueError:  # words, and numbers of more digits than Python parses
            value = text
        if not kind.takes(value):
            raise argparse.ArgumentTypeError(f"must be {kind.says}, got {shown(value)}")
        return value

    return parse
