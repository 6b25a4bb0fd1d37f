"""What `LoRASAM2Train` does in a class step: the prompt is a class's tokens, and masks stay as they are predicted.

The objects of a batch have class prompts all or none, by their identifiers (`data.ids`). An object is a class of an
image; where the class is absent its mask is empty. A class step has one prediction, or with correction clicks after the
prompt the usual number of them; each gives a single mask.

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
    """A step by class prompts.

    Attributes:
        prompt: coordinates [O, K, 2] and labels [O, K] of the objects' tokens.
        corrected: whether correction clicks follow.
    """

    prompt: tuple[Tensor, Tensor]
    corrected: bool

    @classmethod
    def of(cls, ids: Tensor, tokens: ClassTokens | None) -> "ClassStep | None":
        """What a batch with the object ids int64 [T, O] asks for; None for clicks. A GPU is waited for.

        Args:
            ids: of the batch.
            tokens: the model's. Where it has none, a GPU is not waited for, and every step is one by clicks.

        Raises:
            UserError: the batch mixes kinds of prompts, is of clips, or has a class for which there are no tokens.
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
                "a batch has objects of several kinds of prompts (clicks, class prompts, class prompts "
                "with corrections), but all objects of a step must have the same"
            )
        if len(host) > 1:
            raise UserError(
                f"class prompts are for single images, but a clip has {len(host)} frames: set scratch.num_frames to 1"
            )
        positions = tokens.position_of(class_of(host[0])).to(ids.device, non_blocking=True)
        return cls(tokens.prompt_of(positions), kinds.pop()[1])


def raw_heads(model: nn.Module, heads: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """`heads`, stock's `_forward_sam_heads`, without its -1024 for masks of objects whose score is at most 0.

    In training such a mask would have no gradient, so that a defect that was missed is never learned; at inference
    the threshold of the score is the class's own. The decoder gives the score all the same. This is what an activation
    checkpoint is to run, not to be around: the second run would have the switch else.
    """
    before = model.pred_obj_scores
    model.pred_obj_scores = False
    try:
        return heads(*args, **kwargs)
    finally:
        model.pred_obj_scores = before


def steel_without_objects(sound: Tensor, masks: Tensor, images: Tensor) -> Tensor:
    """Where an absent class may be clicked: on sound pixels without an object of any class of the same image.

    Args:
        sound: bool [O, H, W], pixels that are no black border.
        masks: bool [O, H, W].
        images: int64 [O], the image of each object.
    """
    same = images[:, None] == images  # O O
    taken = (same.float() @ masks.flatten(1).float()).view(masks.shape) > 0
    return sound & ~taken


def new_tokens(settings: Mapping[str, Any], width: int, seed: int) -> tuple[ClassTokens, int | None]:
    """The tokens that training begins with, and the `clicks_seed` for `install_class_prompts`.

    Args:
        settings: the block `class_prompts` of a model: `classes` (id -> name, or None for a class of the config below
            that the data has not, since a config can add to a mapping only), `tokens` (K, default 8), `init`
            ("clicks": embeddings of positive clicks at random places; "normal": N(0, 1) as SAM 2 draws its own); and
            what the file of the tokens shall say, `crop` (columns of a training window, null for whole images) and
            `exclusive` (a pixel has one class at most).
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
            f"class_prompts.classes must name the classes of the data, as {{1: pit, 2: scratch}}, got "
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
