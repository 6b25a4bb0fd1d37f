"""The class steps of `LoRASAM2Train`: the tokens of a class are the prompt, and absent objects keep their mask logits.

All objects of a batch have class prompts or none has, by their identifiers (`data.ids`). An object is a class of an
image, with an empty mask if the class is absent. A class step has one prediction, or the usual number if correction
clicks follow the prompt; each is a single mask.

Legend: T frames, O objects, K tokens of a class, B images, H W pixels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sam2_lora_ext.data.ids import by_class_prompt, class_of, is_corrected
from sam2_lora_ext.lora.class_tokens import ClassTokens
from sam2_lora_ext.utils.errors import UserError, check_keys

Result = TypeVar("Result")
INITS = ("clicks", "normal")


@dataclass(frozen=True)
class ClassStep:
    """The prompts of a class step.

    Attributes:
        prompt: coordinates [O, K, 2] and labels [O, K] of the objects' tokens.
        corrected: whether correction clicks follow.
    """

    prompt: tuple[Tensor, Tensor]
    corrected: bool

    @classmethod
    def of(cls, ids: Tensor, tokens: ClassTokens | None) -> "ClassStep | None":
        """The class step of a batch with object ids int64 [T, O]; None for a click step. Synchronises with a GPU.

        Args:
            ids: of the batch.
            tokens: the model's. Without any, every step is a click step, and there is no synchronisation.

        Raises:
            UserError: the batch mixes kinds of prompts, consists of clips, or has a class without tokens.
        """
        if tokens is None:
            return None
        host = ids.cpu()
        kinds = {
            (bool(prompted), bool(corrected))
            for prompted, corrected in zip(
                by_class_prompt(host).flatten().tolist(), is_corrected(host).flatten().tolist()
            )
        }
        if kinds <= {(False, False)}:
            return None
        if len(kinds) > 1:
            raise UserError(
                "a batch mixes kinds of prompts (clicks, class prompts, class prompts "
                "with corrections), but all objects of a step must have the same kind"
            )
        if len(host) > 1:
            raise UserError(
                f"class prompts are for single images, but a clip has {len(host)} frames: set scratch.num_frames to 1"
            )
        positions = tokens.position_of(class_of(host[0])).to(ids.device, non_blocking=True)
        return cls(tokens.prompt_of(positions), kinds.pop()[1])


def raw_heads(model: nn.Module, heads: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """Calls `heads`, stock's `_forward_sam_heads`, without its -1024 for masks of objects whose score is at most 0.

    In training such a mask would have no gradient, so that missed defects would never be learned; at inference each
    class has its own threshold. The decoder still predicts the score. Activation checkpointing must wrap this function,
    not be called inside it: otherwise recomputation would run with `pred_obj_scores` back on.
    """
    before = model.pred_obj_scores
    model.pred_obj_scores = False
    try:
        return heads(*args, **kwargs)
    finally:
        model.pred_obj_scores = before


def steel_without_objects(sound: Tensor, masks: Tensor, images: Tensor) -> Tensor:
    """The pixels where an absent class may be clicked: sound steel without an object of any class of the same image.

    Args:
        sound: bool [O, H, W], pixels outside the black border.
        masks: bool [O, H, W].
        images: int64 [O], the image of each object.
    """
    same = images[:, None] == images  # O O
    taken = (same.float() @ masks.flatten(1).float()).view(masks.shape) > 0
    return sound & ~taken


def new_tokens(settings: Mapping[str, Any], width: int, seed: int) -> tuple[ClassTokens, int | None]:
    """The initial tokens of a training, and the `clicks_seed` for `install_class_prompts`.

    Args:
        settings: the block `class_prompts` of a model: `classes` (id -> name; None removes a class of the base config,
            since configs cannot delete keys), `tokens` (K, default 8), `init` ("clicks": embeddings of positive clicks
            at random points; "normal": N(0, 1) as SAM 2 draws its own embeddings); and two facts that are saved with
            the tokens, `crop` (columns of a training window, null for whole images) and `exclusive` (a pixel has at
            most one class).
        width: D.
        seed: of the random numbers.

    Raises:
        UserError: a setting is unknown or out of its range.
    """
    check_keys("class_prompts", settings, ("classes", "tokens", "init", "crop", "exclusive"))
    classes, count, init = settings.get("classes"), settings.get("tokens", 8), settings.get("init", "clicks")
    if isinstance(classes, Mapping):
        classes = {number: name for number, name in classes.items() if name is not None}
    if not isinstance(classes, Mapping) or not classes:
        raise UserError(
            f"class_prompts.classes must name the classes of the data, like {{1: pit, 2: scratch}}, got "
            f"{settings.get('classes')!r}"
        )
    if type(count) is not int or count < 1:
        raise UserError(f"class_prompts.tokens must be a whole number of at least 1, got {count!r}")
    if init not in INITS:
        raise UserError(f"class_prompts.init must be one of {list(INITS)}, got {init!r}")
    ids = sorted(classes)
    values = torch.randn(len(ids), count, width, generator=torch.Generator().manual_seed(seed))
    names = [classes[number] for number in ids]
    tokens = ClassTokens(values, ids, names, settings.get("crop"), settings.get("exclusive", True))
    return tokens, seed if init == "clicks" else None
