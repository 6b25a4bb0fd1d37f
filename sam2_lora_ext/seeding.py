"""Random numbers that depend on where a run is (seed, phase, epoch, rank ...), not on how it got there."""

import hashlib
import random

import numpy as np
import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from integers and words, equal on every machine (Python's own hash is not promised to be)."""
    digest = hashlib.blake2b(",".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_everything(*parts: int | str) -> None:
    """Seeds Python, NumPy and torch (all devices) from `parts`; workers of a DataLoader follow from torch's."""
    seed = derive_seed(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
