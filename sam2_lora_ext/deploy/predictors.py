"""Adapts SAM 2's own predictors to a model with an input size other than 1024. Does not import SAM 2."""

from typing import Any, TypeVar

from sam2_lora_ext.utils.errors import UserError

STRIDES = (4, 8, 16)  # strides of the three feature maps that the image predictor keeps
Predictor = TypeVar("Predictor")


def fit_predictor(predictor: Predictor) -> Predictor:
    """Sets the predictor's feature map sizes for the model's input size, in place; stock's are for 1024 pixels.

    Args:
        predictor: a `SAM2ImagePredictor`, or a `SAM2AutomaticMaskGenerator`, which contains one. A
            `SAM2VideoPredictor` does not need this.

    Raises:
        UserError: the predictor is neither of them.
    """
    inner: Any = getattr(predictor, "predictor", predictor)
    if not hasattr(inner, "_bb_feat_sizes"):
        raise UserError(
            f"a {type(predictor).__name__} has no feature sizes to set: give a SAM2ImagePredictor or a "
            "SAM2AutomaticMaskGenerator"
        )
    inner._bb_feat_sizes = [(inner.model.image_size // stride,) * 2 for stride in STRIDES]
    return predictor
