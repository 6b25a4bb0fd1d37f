"""Random numbers that depend on the position in a run (seed, phase, epoch, rank ...), not on its history."""

import hashlib
import random

import numpy as np
import torch
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from integers and words, equal on every machine (which Python's own hash does not guarantee)."""
    digest = hashlib.blake2b(",".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def mixed(values: Tensor) -> Tensor:
    """Mixes the 64 bits of each integer of an int64 tensor by splitmix64's finalizer (Steele, Lea, Flood, 2014).

    It turns consecutive multiples of an odd number into random numbers, which do not depend on device or order.
    """
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64)):
        values = (values ^ _shifted(values, shift)) * factor  # products of 64 bits wrap around
    return values ^ _shifted(values, 31)


def _shifted(values: Tensor, bits: int) -> Tensor:
    return (values >> bits) & (2 ** (64 - bits) - 1)  # torch's shift copies the sign bit


def seed_everything(*parts: int | str) -> None:
    """Seeds Python, NumPy and torch (all devices) from `parts`; DataLoader workers derive their seeds from torch's."""
    seed = derive_seed(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
