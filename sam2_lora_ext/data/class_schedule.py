"""The kind of prompt of each optimizer step: clicks, class prompts, or class prompts with correction clicks.

The kind depends only on the seed and the step number, so all ranks, workers and resumed runs agree.
Legend: s share of class steps, c share of corrected ones among them, t step (from 0), u v offsets in [0, 1).
"""

from typing import Literal, get_args

from sam2_lora_ext.run.seeding import derive_seed

StepKind = Literal["clicks", "classes", "corrected"]
KINDS: tuple[str, ...] = get_args(StepKind)
UNIT = 1 << 32  # shares and offsets are multiples of 1 / UNIT, so floor() is exact for large steps


def kind_of_step(seed: int, step: int, share: float, corrections: float) -> StepKind:
    """The kind of one step.

    There are floor(t s + u) class steps before step t, so any N consecutive steps have N s class steps, to within one.
    Step t is a class step if floor((t + 1) s + u) > floor(t s + u). A class step after n others is corrected if
    floor((n + 1) c + v) > floor(n c + v). The seed determines the offsets u and v.

    Args:
        seed: of the run.
        step: t, the number of optimizer steps before it.
        share: s, from 0 to 1.
        corrections: c, from 0 to 1.
    """
    before = _grown(seed, "classes", step, share)
    if _grown(seed, "classes", step + 1, share) == before:
        return "clicks"
    grows = _grown(seed, "corrected", before + 1, corrections) > _grown(seed, "corrected", before, corrections)
    return "corrected" if grows else "classes"


def _grown(seed: int, word: str, count: int, share: float) -> int:
    """floor(count * share + offset), with the offset of (seed, word)."""
    return (count * round(share * UNIT) + derive_seed(seed, word) % UNIT) // UNIT
