"""Fits the decision to validation strips by mean Dice, and keeps the default decision if none is better.

1. Scale and bias of a class: logistic regression of "the pixel is of the class" on its logit (Platt 1999), so that
   classes have a common scale, then a shift of the bias.
2. Threshold and minimum areas of a class: those with the largest mean Dice over strips, 1 where both masks are empty.
   They are searched in tables of components for each class while the other classes are fixed; the masks of a table are
   those of the previous threshold, though a threshold also selects the tiles that contribute to a mask.
3. Both steps again, starting from the result. The best round by the mean Dice of the complete decision is returned.

Test strips are never used. Legend: C classes, H W pixels of a strip.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sam2_lora_ext.adapters.decision import ABSENT, Decision, calibrated
from sam2_lora_ext.class_prompts.decide import decide
from sam2_lora_ext.class_prompts.stitching import Tiles, merge_tiles
from sam2_lora_ext.evaluate.metrics import dice, mask_counts
from sam2_lora_ext.inspection.areas import Table, best_areas, components_of
from sam2_lora_ext.inspection.segmenter import Segmenter
from sam2_lora_ext.inspection.strips import TrueStrip

ROUNDS = 2
SHIFTS = (-1.5, -0.75, 0.0, 0.75, 1.5)  # candidate shifts of a calibrated logit
SAMPLED = 2000  # pixels per strip and class
PRIOR = 1.0  # weight of the L2 penalty towards scale 1 and bias 0


@dataclass(frozen=True)
class Looked:
    """The network's outputs for a validation strip: tiles with float16 logits, and its truth bool [C, H, W]."""

    name: str
    tiles: Tiles
    truth: Tensor


@dataclass(frozen=True)
class Fit:
    """The result of a fit.

    Args:
        decision: the best one.
        before: mean Dice over all (strip, class) pairs with the default decision.
        after: mean Dice with `decision`.
        notes: sentences about what could not be fitted to these validation strips.
    """

    decision: Decision
    before: float
    after: float
    notes: tuple[str, ...]


def look_at(segmenter: Segmenter, strips: Iterable[TrueStrip]) -> list[Looked]:
    """Runs the network on every strip once."""
    looked = []
    for strip in strips:
        tiles = segmenter.look(strip.image)
        kept = replace(tiles, logits=tiles.logits.half().cpu(), scores=tiles.scores.cpu())
        looked.append(Looked(strip.name, kept, strip.truth))
    return looked


def fit_decision(
    strips: Sequence[Looked],
    class_names: Sequence[str],
    exclusive: bool = True,
    progress: Callable[[Sequence[Looked]], Iterable[Looked]] = iter,
) -> Fit:
    """The decision with the largest mean Dice over the (strip, class) pairs of validation strips.

    Args:
        strips: of the validation split, including clean ones.
        class_names: for the notes.
        exclusive: whether a pixel has at most one class.
        progress: wraps each pass over the strips.
    """
    default = Decision.default(len(class_names), exclusive)
    there = torch.stack([strip.truth.flatten(1).any(1) for strip in strips])  # strips C
    usable = there.any(0)
    best, before = default, score_of(strips, default)
    after, found = before, default
    for _ in range(ROUNDS):
        found = _calibrate(progress(strips), found, usable)
        found = _cut(strips, found, usable, progress)
        value = score_of(strips, found)
        if value > after:
            best, after = found, value
    return Fit(replace(best, fitted=True), before, after, _notes(there, class_names))


def score_of(strips: Iterable[Looked], decision: Decision) -> float:
    """Mean Dice over all (strip, class) pairs, 1 where both masks are empty."""
    values = []
    for strip in strips:
        masks = decide(*merge_tiles(strip.tiles, decision), decision)
        values.append(dice(mask_counts(masks, strip.truth)))
    return float(torch.stack(values).mean())


def _notes(there: Tensor, class_names: Sequence[str]) -> tuple[str, ...]:
    notes = [
        f"no validation strip has {name}, so its thresholds are the default: use a larger validation split"
        for name, count in zip(class_names, there.sum(0).tolist(), strict=True)
        if not count
    ]
    if bool(there.any(1).all()):
        notes.append("no validation strip is clean, so the thresholds do not account for false alarms on clean strips")
    return tuple(notes)


def _calibrate(strips: Iterable[Looked], decision: Decision, usable: Tensor) -> Decision:
    """Refits scale and bias of each class, from pixels of the strips where it is present or predicted present."""
    rng = np.random.default_rng(0)
    drawn: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in range(len(decision))]
    for strip in strips:
        logits, scores = merge_tiles(strip.tiles, _lenient(decision, strip.tiles))
        for place in range(len(decision)):
            if float(scores[place]) < decision.threshold[place] and not bool(strip.truth[place].any()):
                continue
            values, truth = logits[place].numpy().ravel(), strip.truth[place].numpy().ravel()
            chosen = rng.integers(values.size, size=min(SAMPLED, values.size))
            chosen = chosen[values[chosen] > ABSENT]
            drawn[place].append((values[chosen], truth[chosen]))
    scale, bias = list(decision.scale), list(decision.bias)
    for place, parts in enumerate(drawn):
        if parts and bool(usable[place]):
            scale[place], bias[place] = platt(*map(np.concatenate, zip(*parts, strict=True)))
    return replace(decision, scale=tuple(scale), bias=tuple(bias))


def platt(logits: np.ndarray, truth: np.ndarray, steps: int = 50) -> tuple[float, float]:
    """Scale a > 0 and bias b of the logistic regression p = sigmoid(a logit + b), with a weak penalty towards (1, 0).

    Args:
        logits: [n].
        truth: bool [n].
        steps: of Newton's method.

    Returns:
        (a, b); (1, 0) if all pixels have the same truth, or if larger logits do not make the class more likely.
    """
    if truth.all() or not truth.any():
        return 1.0, 0.0
    design = np.stack([logits.astype(np.float64), np.ones(len(logits))], 1)
    weights = np.array([1.0, 0.0])

    def loss(value: np.ndarray) -> float:
        z = design @ value
        return float(np.logaddexp(0, z).sum() - z[truth].sum() + PRIOR * ((value - (1, 0)) ** 2).sum() / 2)

    for _ in range(steps):
        p = 1 / (1 + np.exp(-np.clip(design @ weights, -50, 50)))
        gradient = design.T @ (p - truth) + PRIOR * (weights - (1, 0))
        curvature = (design * (p * (1 - p))[:, None]).T @ design + PRIOR * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        size = 1.0
        while size > 1e-6 and loss(weights - size * step) > loss(weights):
            size /= 2
        weights = weights - size * step
        if np.abs(size * step).max() < 1e-9:
            break
    return (float(weights[0]), float(weights[1])) if weights[0] > 1e-3 else (1.0, 0.0)


def _lenient(decision: Decision, tiles: Tiles) -> Decision:
    """The decision with thresholds low enough that the best tile of each class passes."""
    highest = tiles.scores.float().amax(0).tolist()
    return replace(decision, threshold=tuple(map(min, decision.threshold, highest)))


def _cut(
    strips: Sequence[Looked],
    decision: Decision,
    usable: Tensor,
    progress: Callable[[Sequence[Looked]], Iterable[Looked]],
) -> Decision:
    """Refits the shift of the bias, the threshold and the areas, class by class from tables.

    For the tables all classes have the same shift, which keeps the largest class of each pixel: one pass over the
    strips is enough for all shifts.
    """
    rows = {
        name: list(getattr(decision, name)) for name in ("threshold", "bias", "min_area", "weak_area", "weak_score")
    }
    tables = {shift: [Table() for _ in range(len(decision))] for shift in sorted(SHIFTS, key=abs)}
    for strip in progress(strips):
        _fill(tables, strip, decision, usable)
    for place in map(int, usable.nonzero()):
        best = -1.0
        for shift, by_class in tables.items():
            value, found = best_areas(by_class[place], decision.threshold[place])
            if value > best + 1e-9:
                best = value
                rows["bias"][place] = decision.bias[place] + shift
                for name, number in found.items():
                    rows[name][place] = number
    return replace(decision, **{name: tuple(row) for name, row in rows.items()})


def _fill(tables: Mapping[float, Sequence[Table]], strip: Looked, decision: Decision, usable: Tensor) -> None:
    """Adds a strip to the tables of each class, as if that class were present and the others were unchanged."""
    logits, scores = merge_tiles(strip.tiles, _lenient(decision, strip.tiles))
    z, present = calibrated(logits, decision), scores >= torch.tensor(decision.threshold)
    for place in map(int, usable.nonzero()):
        others = present.clone()
        others[place] = False
        mine, truth = z[place], strip.truth[place].numpy()
        if decision.exclusive and bool(others.any()):
            mine = mine.masked_fill(z[others].amax(0) > mine, ABSENT)
        mine = mine.numpy()
        for shift, by_class in tables.items():
            areas, overlaps = components_of(mine > -shift, truth)
            by_class[place].add(float(scores[place]), int(truth.sum()), areas, overlaps)
