"""Class prompts on disk: tokens, classes and decision. Needs torch and safetensors only.

    <adapter folder>/class_prompts.safetensors       of an adapter
    <name>.class_prompts.safetensors                 next to merged weights <name>.safetensors
    the key `class_prompts` next to `model`          inside merged weights .pt, ignored by stock SAM 2

The only tensor is `tokens`, float32 [C, K, D]: C classes in ascending order of their ids, K tokens per class, D numbers
per token. Everything else is one JSON text: `sam2_lora_ext` in the safetensors header, `header` in the entry of a .pt.
`digest` identifies the weights that the tokens belong to: the digest of the adapter folder, or `weights_id` of merged
weights.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sam2_lora_ext.adapters.decision import Decision
from sam2_lora_ext.adapters.folder import DIGEST, HEADER, PARTS, WEIGHTS
from sam2_lora_ext.adapters.weights import read_file, write_weights
from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.files import LARGEST_NOTE, open_regular, parse_json
from sam2_lora_ext.utils.folders import existing_folder

NAME, KEY, TOKENS, VERSION = "class_prompts.safetensors", "class_prompts", "tokens", 1
FACTS = ("class_ids", "class_names", "crop", "resolution", "base_id", "digest")


@dataclass(frozen=True)
class ClassPrompts:
    """Everything that a class segmenter needs in addition to the weights.

    Args:
        tokens: float32 [C, K, D].
        class_ids: of the class table, ascending.
        class_names: in the order of the ids.
        decision: thresholds, calibration and areas.
        crop: columns of a training window, and of a tile in inspection; None for whole images.
        resolution: side of the model's input in pixels.
        base_id: `weights_id` of the adapted base, None if unknown.
        digest: of the weights that the tokens belong to, "" if unknown.

    Raises:
        UserError: a value is invalid, or the numbers of classes differ.
    """

    tokens: Tensor
    class_ids: tuple[int, ...]
    class_names: tuple[str, ...]
    decision: Decision
    crop: int | None
    resolution: int
    base_id: str | None = None
    digest: str = ""

    def __post_init__(self) -> None:
        if sentence := _fault(self):
            raise UserError(f"these are not valid class prompts: {sentence}")


def _fault(prompts: ClassPrompts) -> str | None:
    """The first error, as the end of a sentence."""
    tokens, ids, names = prompts.tokens, prompts.class_ids, prompts.class_names
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.float32 or tokens.dim() != 3 or not tokens.numel():
        found = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
        return f"the tokens must be float32 [classes, tokens, width], got {found}"
    if not bool(tokens.isfinite().all()):
        return "a token contains NaN or infinity: the training diverged or the file is damaged"
    if not isinstance(ids, tuple) or not all(_is_whole(number, 0) for number in ids) or list(ids) != sorted(set(ids)):
        return f"class ids must be whole numbers of at least 0 in ascending order, got {str(ids)[:100]}"
    if not isinstance(names, tuple) or not all(isinstance(name, str) and name for name in names):
        return f"class names must be non-empty strings, got {str(names)[:100]}"
    if not len(tokens) == len(ids) == len(names) == len(prompts.decision) or len(set(names)) < len(names):
        counts = f"{len(tokens)} sets, {len(ids)} ids, {len(set(names))} names, {len(prompts.decision)} thresholds"
        return f"each class needs one set of tokens, one id, one distinct name and one threshold, got {counts}"
    if not _is_whole(prompts.resolution, 1) or not (prompts.crop is None or _is_whole(prompts.crop, 1)):
        return f"crop and resolution must be numbers of pixels, got {str((prompts.crop, prompts.resolution))[:100]}"
    if not isinstance(prompts.base_id, str | None) or not isinstance(prompts.digest, str):
        return "the identities of base and weights must be strings"
    return None


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 1 << 31


def header_of(prompts: ClassPrompts) -> str:
    """Everything except the tokens, as JSON."""
    facts = {name: getattr(prompts, name) for name in FACTS}
    return json.dumps({**facts, "decision": prompts.decision.as_dict(), "version": VERSION}, allow_nan=False)


def from_header(tokens: Any, text: Any, where: str | Path) -> ClassPrompts:
    """Class prompts from the tokens and the text of `header_of`.

    Raises:
        UserError: the text is invalid; the message names the file `where`.
    """
    facts = parse_json(text, f"{where} is damaged: its class prompts' header") if isinstance(text, str) else None
    if not isinstance(facts, dict) or not isinstance(facts.get("version"), int):
        raise UserError(f"{where} is damaged: its class prompts lack this package's header; export them again")
    if facts.pop("version") != VERSION:
        raise UserError(f"{where} has class prompts of another version of this package: export them again")
    if set(facts) != {*FACTS, "decision"}:
        raise UserError(f"{where} is damaged: its class prompts' header has {', '.join(sorted(facts))[:200]}")
    try:
        rows = {name: tuple(value) if isinstance(value, list) else value for name, value in facts.items()}
        return ClassPrompts(tokens=tokens, **{**rows, "decision": Decision.from_dict(facts["decision"])})
    except UserError as error:
        raise UserError(f"{where} is damaged: {error}") from error


def as_entry(prompts: ClassPrompts) -> dict[str, Any]:
    """The value of the key `class_prompts` of merged weights; `torch.load(weights_only=True)` reads it."""
    return {TOKENS: prompts.tokens.detach().cpu().contiguous().clone(), "header": header_of(prompts)}


def from_entry(entry: Any, where: str | Path) -> ClassPrompts:
    """The inverse of `as_entry`; raises `UserError` for anything else."""
    if not isinstance(entry, Mapping) or set(entry) != {TOKENS, "header"}:
        raise UserError(f"{where} is damaged: its entry {KEY} was not written by this package; merge the adapter again")
    return from_header(entry[TOKENS], entry["header"], where)


def prompts_file(path: str | Path) -> Path:
    """The path of the class prompts file of an adapter folder or of merged .safetensors weights.

    Args:
        path: an adapter folder or its weight file, merged weights, or a class prompts file, which is returned itself.
    """
    path = Path(path)
    if path.is_dir() or existing_folder(path).is_dir():
        return existing_folder(path) / NAME
    if path.name in PARTS:
        return path.with_name(NAME)
    return path if path.name.endswith(NAME) else path.with_name(f"{path.stem}.{NAME}")


def save_class_prompts(prompts: ClassPrompts, path: str | Path, force: bool = True) -> None:
    """Writes class prompts to a file or into an adapter folder, atomically.

    Raises:
        UserError: the file exists and `force` is off, or it cannot be written.
    """
    tokens = {TOKENS: prompts.tokens.detach().cpu()}
    write_weights(prompts_file(path), tokens, "safetensors", metadata={HEADER: header_of(prompts)}, force=force)


def load_class_prompts(path: str | Path) -> ClassPrompts | None:
    """The class prompts in an adapter folder, in merged weights or in a separate file; None if there are none.

    Raises:
        UserError: they are damaged, or belong to another adapter than the one in their folder.
    """
    path = Path(path)
    file = prompts_file(path)
    if path.is_file() and file != path and path.suffix != ".safetensors" and path.name not in PARTS:
        content = read_file(path)
        entry = content.get(KEY) if isinstance(content, Mapping) else None
        return None if entry is None else from_entry(entry, path)
    if not file.exists():
        return None
    open_regular(file, LARGEST_NOTE).close()
    try:
        with safe_open(file, "pt") as opened:
            text = (opened.metadata() or {}).get(HEADER)
            tokens = opened.get_tensor(TOKENS) if TOKENS in opened.keys() else None  # noqa: SIM118 (not a mapping)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{file} is damaged or not a safetensors file ({error}): copy or export it again") from error
    prompts = from_header(tokens, text, file)
    if file.name == NAME and (file.parent / WEIGHTS).is_file():
        _check_adapter(prompts, file)
    return prompts


def _check_adapter(prompts: ClassPrompts, file: Path) -> None:
    """Raises a `UserError` if the adapter in the folder has another digest."""
    weights = file.with_name(WEIGHTS)
    try:
        with safe_open(weights, "pt") as opened:
            facts = parse_json((opened.metadata() or {}).get(HEADER, "{}"), f"{weights} is damaged: its header")
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"cannot read {weights}: {error}") from error
    found = facts.get(DIGEST) if isinstance(facts, dict) else None
    if prompts.digest and found != prompts.digest:
        raise UserError(f"{file} belongs to another adapter than the {WEIGHTS} next to it: copy the folder again")
