"""The focal-Tversky loss, for thin defects: from masks, or from sums over their pixels.

Shapes: O objects, H W pixels.
"""

from torch import Tensor

from sam2_lora_ext.utils.errors import UserError

FLOOR = 1e-6  # x ** (1 / gamma) has an infinite slope at 0, which gives NaN with a saturated sigmoid


def checked_numbers(alpha: float, beta: float, gamma: float) -> dict[str, float]:
    """The arguments of `focal_tversky` by their names; raises a `UserError` when one is out of its range."""
    if not (alpha >= 0 and beta >= 0 and gamma > 0):
        raise UserError(
            "the Tversky term needs tversky_alpha >= 0, tversky_beta >= 0 and tversky_gamma > 0, "
            f"but got {alpha}, {beta} and {gamma}"
        )
    return {"alpha": alpha, "beta": beta, "gamma": gamma}


def focal_tversky(logits: Tensor, targets: Tensor, alpha: float, beta: float, gamma: float) -> Tensor:
    """Focal-Tversky loss (arXiv 1810.07842), `(1 - TI) ** (1 / gamma)`, of each object.

    `TI = (TP + 1) / (TP + alpha FN + beta FP + 1)` on probabilities p = sigmoid(logits): TP = sum(p g),
    FN = sum((1 - p) g), FP = sum(p (1 - g)). Only the target empty:
    `(beta FP / (beta FP + 1)) ** (1 / gamma)`. `1 - TI` is clamped at 1e-6, so a perfect mask (two empty ones too)
    costs `1e-6 ** (1 / gamma)` and has no gradient.

    Args:
        logits: [O H W].
        targets: [O H W], 0.0 or 1.0.
        alpha: weight of false negatives.
        beta: weight of false positives.
        gamma: values above 1 emphasise objects that are nearly right (the paper's range is 1 to 3).

    Returns:
        [O].
    """
    p, g = logits.sigmoid().flatten(1), targets.flatten(1)
    return tversky_of_sums((p * g).sum(-1), p.sum(-1, dtype=g.dtype), g.sum(-1), alpha, beta, gamma)


def tversky_of_sums(hit: Tensor, drawn: Tensor, area: Tensor, alpha: float, beta: float, gamma: float) -> Tensor:
    """`focal_tversky` [O] from TP = `hit`, sum(p) = `drawn` and sum(g) = `area`, each [O]."""
    wrong = alpha * (area - hit) + beta * (drawn - hit)
    return (wrong / (hit + wrong + 1)).clamp(min=FLOOR) ** (1 / gamma)
