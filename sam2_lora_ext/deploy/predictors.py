"""Adapts SAM 2's own predictors to a model with another input size than 1024. Imports nothing of SAM 2."""

from typing import Any, TypeVar

from sam2_lora_ext.utils.errors import UserError

STRIDES = (4, 8, 16)  # strides of the three feature maps that the image predictor keeps
Predictor = TypeVar("Predictor")


def fit_predictor(predictor: Predictor) -> Predictor:
    """Sets the sizes of the feature maps to those of the model's input, in place; stock has those of 1024 pixels.

    Args:
        predictor: a `SAM2ImagePredictor`, or a `SAM2AutomaticMaskGenerator`, which contains one. A
            `SAM2VideoPredictor` does not need this.

    Raises:
        UserError: it is neither.
    """
    inner: Any = getattr(predictor, "predictor", predictor)
    if not hasattr(inner, "_bb_feat_sizes"):
        raise UserError(
            f"a {type(predictor).__name__} has no feature sizes to set: give a SAM2ImagePredictor or a "
            "SAM2AutomaticMaskGenerator"
        )
    inner._bb_feat_sizes = [(inner.model.image_size // stride,) * 2 for stride in STRIDES]
    return predictor
