"""Writes a merged SAM 2 as a folder that Hugging Face transformers loads without this package. Needs transformers.

    FOLDER/
      config.json            for `Sam2VideoModel`; `Sam2Model` and the pipelines read it too
      processor_config.json  for `Sam2VideoProcessor`; `Sam2Processor` reads it too
      model.safetensors      all weights, including those of the memory, which `Sam2Model` ignores
      README.md              the model card, see `model_card`

`Sam2VideoModel` supports only a memory of 64 channels: the folder of another model (configs/sam2_nano.yaml has 16) is
for `Sam2Model` and `Sam2Processor`, without the weights of the memory.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sam2_lora_ext.adapters.merge import Merged, merge_to
from sam2_lora_ext.adapters.transformers_names import state_from_transformers, state_to_transformers
from sam2_lora_ext.adapters.transformers_table import THEIR_POSITIONS
from sam2_lora_ext.adapters.weights import read_weights, write_weights
from sam2_lora_ext.deploy.model_card import model_card
from sam2_lora_ext.deploy.stock import PROMPTS
from sam2_lora_ext.deploy.transformers_config import MEMORY_WIDTH, STRIDES, image_config, memory_width, video_config
from sam2_lora_ext.run.paths import find_run, trainer_of
from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.files import EXISTS, LARGEST_NOTE, read_json
from sam2_lora_ext.utils.folders import existing_folder, refuse_inputs, replace_folder

if TYPE_CHECKING:
    from transformers import Sam2Config, Sam2Processor, Sam2VideoConfig, Sam2VideoProcessor

CONFIG, PROCESSOR, WEIGHTS, CARD = "config.json", "processor_config.json", "model.safetensors", "README.md"
PARTS = frozenset({CONFIG, PROCESSOR, WEIGHTS, CARD})


def require_transformers() -> None:
    """Raises a `UserError` if transformers is missing or has no SAM 2."""
    try:
        from transformers import Sam2VideoModel  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"writing a folder for transformers needs that library ({error}): pip install 'transformers>=5.24'"
        ) from error


def refuse_model_folder(out: Path, inputs: Iterable[str | Path], force: bool) -> None:
    """Raises a `UserError` when a model may not be written to the folder `out`.

    Args:
        out: missing or an empty folder, or with `force` a folder of this kind.
        inputs: files and folders that are read; `out` must not be one of them, contain one or be inside one.
        force: replace an existing model folder.
    """
    refuse_inputs(out, inputs)
    there = existing_folder(out.resolve())
    if not os.path.lexists(there) or there.is_dir() and not any(there.iterdir()):
        return
    if not force:
        raise UserError(EXISTS.format(out))
    if not all((there / name).is_file() for name in (CONFIG, WEIGHTS)):
        raise UserError(f"--force replaces a transformers model, but {out} is not one: choose another folder")


def write_model_folder(
    base: str | Path,
    adapters: Sequence[Path],
    out: Path,
    *,
    image_size: int | None = None,
    force: bool = False,
    **options: Any,
) -> Merged:
    """Merges adapters into a base and writes the result as a folder, completely or not at all.

    Args:
        base: see `merge_files`.
        adapters: see `merge_files`.
        out: the folder to write.
        image_size: side of the model's input in pixels; by default that of the adapters' runs, else the stock one.
        force: replace a folder of this kind.
        **options: see `merge_to`.

    Raises:
        UserError: an input is missing, damaged, of another model or of no known size, or `out` would be overwritten.
    """
    require_transformers()
    refuse_model_folder(out, [base, *adapters], force)
    size = image_size or trained_size(adapters)
    made: list[Merged] = []
    notes: list[str] = []
    dropped: list[str] = []

    def write(temporary: Path) -> None:
        def save(merged: Mapping[str, Tensor], prompts: Any, on_written: Any) -> None:
            if prompts is not None:
                dropped.append("class prompts are left out: Sam2Model supports only clicks and boxes")
            config = make_config(merged, size)
            state = their_state(merged, config)
            config.save_pretrained(temporary)
            make_processor(config).save_pretrained(temporary)
            notes.extend(left_out(merged, state))
            write_weights(temporary / WEIGHTS, state, "safetensors", on_written=on_written)

        made.append(merge_to(base, adapters, save, **options))
        made[0].notes.extend(notes + dropped)
        card = model_card(made[0], Path(base), out.resolve().name, video=not notes)
        (temporary / CARD).write_text(card, encoding="utf-8")

    replace_folder(out, write, PARTS, force=force)
    return made[0]


def trained_size(adapters: Iterable[str | Path]) -> int | None:
    """Side of the input in pixels at which the adapters' runs trained; None if no run records it.

    Raises:
        UserError: the runs differ.
    """
    runs = {run: None for path in adapters if (run := find_run(path)) is not None}
    sizes = {run: size for run in runs if (size := (trainer_of(run).get("model") or {}).get("image_size"))}
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{run} at {size}" for run, size in sizes.items())
        raise UserError(f"the runs trained at different sizes ({found}): choose one with --image-size")
    return next(iter(sizes.values()), None)


def make_config(state: Mapping[str, Tensor], image_size: int | None = None) -> "Sam2VideoConfig | Sam2Config":
    """transformers' config for a state dict of SAM 2; see `video_config`."""
    from transformers import Sam2Config, Sam2VideoConfig

    if memory_width(state) == MEMORY_WIDTH:
        config = Sam2VideoConfig(**video_config(state, image_size), architectures=["Sam2VideoModel"])
    else:
        config = Sam2Config(**image_config(state, image_size), architectures=["Sam2Model"])
    dtypes = {value.dtype for value in state.values() if value.is_floating_point()}
    if len(dtypes) == 1:
        config.dtype = str(dtypes.pop()).removeprefix("torch.")
    return config


def make_processor(config: "Sam2VideoConfig | Sam2Config") -> "Sam2VideoProcessor | Sam2Processor":
    """The processor of images, videos and prompts: resizes to S x S and normalises as SAM 2 does."""
    from transformers import Sam2ImageProcessor, Sam2Processor, Sam2VideoProcessor, Sam2VideoVideoProcessor

    side = config.prompt_encoder_config.image_size
    size, masks = ({"height": pixels, "width": pixels} for pixels in (side, side // STRIDES[0]))
    images = Sam2ImageProcessor(size=size, mask_size=masks)
    if config.model_type == "sam2":
        return Sam2Processor(image_processor=images)
    return Sam2VideoProcessor(image_processor=images, video_processor=Sam2VideoVideoProcessor(size=size))


def their_state(state: Mapping[str, Tensor], config: "Sam2VideoConfig | Sam2Config") -> dict[str, Tensor]:
    """Converts a state dict of SAM 2 to that of the transformers model of this config.

    Raises:
        UserError: the modules of the installed transformers differ from those of version 5.24.
    """
    import transformers

    renamed = state_to_transformers(state)
    renamed[THEIR_POSITIONS[1]] = renamed[THEIR_POSITIONS[0]].clone()  # safetensors does not allow shared memory
    kind = transformers.Sam2Model if config.model_type == "sam2" else transformers.Sam2VideoModel
    with torch.device("meta"):
        wanted = kind(config).state_dict()
    for key in (*wanted, *([] if config.model_type == "sam2" else renamed)):
        if key not in wanted or key not in renamed or wanted[key].shape != renamed[key].shape:
            raise UserError(
                f"transformers {transformers.__version__} defines another {kind.__name__} than this version of "
                f"sam2_lora_ext writes ({key}): install transformers 5.24"
            )
    return {key: renamed[key] for key in wanted}


def left_out(state: Mapping[str, Tensor], written: Mapping[str, Tensor]) -> list[str]:
    """A note about the tensors of SAM 2 that are not in a folder; empty if all are."""
    missing = sorted({key.split(".")[0] for key in state.keys() - state_from_transformers(written).keys()})
    if not missing:
        return []
    return [
        f"left out: {', '.join(missing)}, since transformers' Sam2VideoModel supports only a memory of {MEMORY_WIDTH} "
        f"channels and this model's memory has {memory_width(state)}: the folder is for Sam2Model"
    ]


def folder_size(folder: Path) -> int:
    """Side of the input in pixels of the model in a folder."""
    return read_json(folder / CONFIG, LARGEST_NOTE)["prompt_encoder_config"]["image_size"]


def read_state(folder: Path) -> dict[str, Tensor]:
    """The weights in a folder as a state dict of SAM 2.

    Raises:
        UserError: there are none, or they do not belong to a `Sam2VideoModel`.
    """
    return state_from_transformers(read_weights(folder / WEIGHTS))


def folder_logits(folder: Path, image: Tensor) -> Tensor:
    """`mask_logits` of the `Sam2Model` in a folder: for `PROMPTS` on one image, at low resolution, (B, 4, S/4, S/4).

    Args:
        folder: the model's folder.
        image: SAM 2's input (1, 3, S, S).
    """
    from transformers import Sam2Model

    model = Sam2Model.from_pretrained(folder, local_files_only=True).eval()
    model.mask_decoder.dynamic_multimask_via_stability = False  # the unchanged single mask, as in `build_stock`
    return model_logits(model, image)


def model_logits(model: Any, image: Tensor) -> Tensor:
    """`folder_logits` of a loaded `Sam2Model`, which may be inside a PEFT model."""
    outputs, size = [], image.shape[-1]
    with torch.no_grad():
        for points, labels in PROMPTS:
            prompt = {"input_points": torch.tensor([[points]]) * size, "input_labels": torch.tensor([[labels]])}
            outputs.append(
                torch.cat(
                    [
                        model(pixel_values=image, multimask_output=multimask, **prompt).pred_masks[0]
                        for multimask in (False, True)
                    ],
                    dim=1,
                )
            )
    return torch.cat(outputs)
