"""SAM 2's prompt encoder extended by the labels of class prompts, which it embeds as learned tokens.

Everything after it is stock: the image and video predictors, correction clicks and the mask decoder treat these labels
like those of clicks. Use the single mask of a class prompt, even with one token (stock predicts three for one point),
and switch off `dynamic_multimask_via_stability`, which could replace it by another mask.

Legend: N prompts, P points of each, C classes, K tokens of a class, D width of a prompt token.
"""

import copy
import math
from typing import Any

import torch
from sam2.modeling.sam.prompt_encoder import PromptEncoder
from torch import Tensor, nn

from sam2_lora_ext.lora.class_tokens import FIRST_LABEL, TOKENS, ClassTokens
from sam2_lora_ext.utils.errors import UserError

CLICK, POSITIONS = "point_embeddings.1.weight", "pe_layer.positional_encoding_gaussian_matrix"


class ClassPromptEncoder(PromptEncoder):
    """`PromptEncoder` with `class_tokens`; for prompts without their labels it is bitwise equal to stock."""

    class_tokens: ClassTokens
    clicks_seed: int | None = None  # if set, loading weights without tokens sets the tokens to click embeddings

    def _embed_points(self, points: Tensor, labels: Tensor, pad: bool) -> Tensor:
        """Embeds points [N, P, 2] with labels [N, P] as [N, P (+ 1), D]: as tokens for their labels, else like stock.

        The tokens are always in the graph, with a zero gradient if no label selects them, since DDP waits for the
        gradient of every trained parameter.

        Raises:
            UserError: a label is beyond those of the tokens. On a GPU this is not checked, since that would
                synchronise; such a label selects the last token.
        """
        most = FIRST_LABEL + self.class_tokens.tokens.shape[:2].numel()
        readable = not torch.compiler.is_compiling() and type(labels) is Tensor and labels.device.type == "cpu"
        if readable and bool((labels >= most).any()):
            raise UserError(f"class prompts have the labels {FIRST_LABEL} to {most - 1}, got {int(labels.max())}")
        embedded = super()._embed_points(points, labels, pad)
        labels = nn.functional.pad(labels, (0, int(pad)), value=-1)
        tokens = self.class_tokens.rows(labels).to(embedded.dtype)
        return torch.where((labels >= FIRST_LABEL)[..., None], tokens, embedded)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Initialises tokens from the loaded base, since SAM 2's Trainer builds the model before it loads the base."""
        super()._load_from_state_dict(state_dict, prefix, *args)
        click, matrix = (state_dict.get(prefix + key) for key in (CLICK, POSITIONS))
        if self.clicks_seed is None or f"{prefix}{TOKENS}.tokens" in state_dict or click is None or matrix is None:
            return
        if click.shape == self.point_embeddings[1].weight.shape:  # otherwise `load_state_dict` fails anyway
            tokens = self.class_tokens.tokens
            drawn = click_embeddings(click, matrix, tokens.shape[0] * tokens.shape[1], self.clicks_seed)
            with torch.no_grad():
                tokens.copy_(drawn.view_as(tokens))


def click_embeddings(click: Tensor, matrix: Tensor, count: int, seed: int) -> Tensor:
    """The embeddings [count, D] of positive clicks at random points of the image, float32 on the CPU.

        e(x, y) = [sin v, cos v] + click,    v = 2 pi (2 (x, y) - 1) matrix,    x, y uniform in [0, 1)

    Args:
        click: SAM 2's embedding of a positive click [1, D].
        matrix: the Gaussian matrix [2, D/2] of its position encoding.
        count: number of clicks.
        seed: of the random points.
    """
    places = torch.rand(count, 2, generator=torch.Generator().manual_seed(seed))
    angles = 2 * math.pi * (2 * places - 1) @ matrix.detach().float().cpu()
    return torch.cat([angles.sin(), angles.cos()], 1) + click.detach().float().cpu()


def install_class_prompts(model: nn.Module, tokens: ClassTokens, clicks_seed: int | None = None) -> None:
    """Adds class prompts to a SAM 2 for training or inference, in place; existing tokens are replaced.

    The parameter's key is `sam_prompt_encoder.class_tokens.tokens`; it is moved to the model's device.

    Args:
        model: with stock's prompt encoder, or one that this function created.
        tokens: of the model's width.
        clicks_seed: set the tokens to `click_embeddings`, now and whenever weights are loaded without tokens.

    Raises:
        UserError: the model's prompt encoder is not stock's, or its tokens have another width.
    """
    encoder = getattr(model, "sam_prompt_encoder", None)
    if type(encoder) not in (PromptEncoder, ClassPromptEncoder):
        raise UserError(
            f"class prompts need SAM 2's PromptEncoder as the model's sam_prompt_encoder, "
            f"not a {type(encoder).__name__}"
        )
    width = tokens.tokens.shape[2]
    if width != encoder.embed_dim:
        raise UserError(
            f"the class tokens have width {width}, but the model's prompt tokens have {encoder.embed_dim}: "
            "they belong to another model"
        )
    encoder.__class__ = ClassPromptEncoder
    encoder.clicks_seed = clicks_seed
    setattr(encoder, TOKENS, tokens.to(encoder.no_mask_embed.weight.device).train(encoder.training))
    if clicks_seed is not None:
        encoder.load_state_dict({key: value for key, value in encoder.state_dict().items() if TOKENS not in key})


def with_class_prompts(encoder: PromptEncoder, tokens: ClassTokens) -> ClassPromptEncoder:
    """A copy of stock's prompt encoder with class prompts; see `install_class_prompts`."""
    holder = nn.Module()
    holder.sam_prompt_encoder = copy.deepcopy(encoder)
    install_class_prompts(holder, tokens)
    return holder.sam_prompt_encoder
