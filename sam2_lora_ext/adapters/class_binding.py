"""Carries class prompts from a model or a checkpoint to an adapter folder, and checks that they belong together.

Needs torch and safetensors only.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sam2_lora_ext.adapters.class_prompts import ClassPrompts, load_class_prompts
from sam2_lora_ext.adapters.decision import Decision
from sam2_lora_ext.adapters.folder import TOKENS
from sam2_lora_ext.lora.class_tokens import STATE_KEY, ClassTokens, find_tokens
from sam2_lora_ext.utils.errors import UserError

FACTS = ("class_ids", "class_names", "crop", "resolution", "exclusive")
CLASS_PROMPTS = "class_prompts"  # the entry of a checkpoint's notes and of an adapter's header


def facts_of(model: nn.Module) -> dict[str, Any] | None:
    """The notes about a model's class prompts for a checkpoint, as plain values; None if the model has none."""
    tokens = find_tokens(model)
    if tokens is None:
        return None
    return {
        "class_ids": list(tokens.class_ids),
        "class_names": list(tokens.class_names),
        "crop": tokens.crop,
        "resolution": model.image_size,
        "exclusive": tokens.exclusive,
    }


def prompts_of_state(state: Mapping[str, Tensor], notes: Mapping[str, Any]) -> ClassPrompts | None:
    """The class prompts in a training state dict, with the checkpoint's notes about them; None if there are none.

    The decision is the default: thresholds are fitted after training, for the final weights.

    Raises:
        UserError: the state dict contains tokens, but the notes about them are missing or damaged.
    """
    if STATE_KEY not in state:
        return None
    facts = notes.get(CLASS_PROMPTS)
    whole = isinstance(facts, Mapping) and set(facts) == set(FACTS)
    if not whole or not all(isinstance(facts[name], (list, tuple)) for name in ("class_ids", "class_names")):
        raise UserError("the checkpoint contains class tokens, but does not record their classes: it is damaged")
    ids, names, crop, resolution, exclusive = (facts[name] for name in FACTS)
    tokens = state[STATE_KEY].detach().float().cpu().clone()
    return ClassPrompts(
        tokens, tuple(ids), tuple(names), Decision.default(len(ids), exclusive), crop, resolution, notes.get("base_id")
    )


def prompts_of(model: nn.Module, base_id: str | None) -> ClassPrompts | None:
    """The class prompts of a model in training, with the default decision; None if it has none."""
    facts = facts_of(model)
    if facts is None:
        return None
    return prompts_of_state({STATE_KEY: find_tokens(model).tokens}, {CLASS_PROMPTS: facts, "base_id": base_id})


def tokens_of(prompts: ClassPrompts) -> ClassTokens:
    """The module that represents class prompts in a model."""
    return ClassTokens(prompts.tokens, prompts.class_ids, prompts.class_names, prompts.crop, prompts.decision.exclusive)


def tokens_digest(prompts: ClassPrompts) -> str:
    """SHA-256 of the tokens and their classes, without the thresholds, which may be fitted again."""
    digest = hashlib.sha256(json.dumps([prompts.class_ids, prompts.class_names, list(prompts.tokens.shape)]).encode())
    digest.update(prompts.tokens.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def prompts_in_folder(folder: Path, digest: Any) -> ClassPrompts | None:
    """The class prompts in an adapter folder.

    Args:
        folder: of the adapter.
        digest: the `tokens_digest` in the adapter's header; None if it has none.

    Raises:
        UserError: they are missing or damaged, or the header does not list them.
    """
    file = folder / TOKENS
    if digest is None:
        if file.exists():
            raise UserError(
                f"the adapter in {folder} was trained without class prompts, so {TOKENS} belongs to another adapter: "
                "remove it, or copy the whole folder again"
            )
        return None
    prompts = load_class_prompts(file)
    if prompts is None:
        raise UserError(f"{folder} lacks {TOKENS}, which belongs to its adapter: copy the whole folder again")
    if tokens_digest(prompts) != digest:
        raise UserError(
            f"{file} contains other class prompts than those trained with the adapter in its folder: copy the "
            "whole folder again"
        )
    return prompts
