"""Writes the model card, the README.md of a Hugging Face folder: base, adapters, data, metrics, licence.

All facts come from the merge and the records of the adapters' runs; missing ones are marked as unknown. Only the last
part of a path is written, since a card is meant to be published.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import sam2_lora_ext
from sam2_lora_ext.adapters.merge import Merged
from sam2_lora_ext.data.blocks import READER_NAMES
from sam2_lora_ext.data.source import from_run
from sam2_lora_ext.run.config import read_run_config
from sam2_lora_ext.run.paths import find_run
from sam2_lora_ext.run.state import SUMMARY
from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.files import LARGEST_NOTE, read_json

HUB = {"hiera_t": "hiera-tiny", "hiera_s": "hiera-small", "hiera_b+": "hiera-base-plus", "hiera_l": "hiera-large"}
FRONT = """\
---
library_name: transformers
pipeline_tag: mask-generation
license: apache-2.0
tags:
  - sam2
  - lora
{base}---
"""
USE = """\
# {title}

{what}

```python
import torch
from transformers import Sam2Model, Sam2Processor

model, processor = Sam2Model.from_pretrained("{folder}"), Sam2Processor.from_pretrained("{folder}")
inputs = processor(images=image, input_points=[[[[x, y]]]], input_labels=[[[1]]], return_tensors="pt")
with torch.no_grad():
    outputs = model(**inputs, multimask_output=False)
masks = processor.post_process_masks(outputs.pred_masks, inputs["original_sizes"])
```
"""
VIDEO = "\n`Sam2VideoModel` and `Sam2VideoProcessor` load the same folder for tracking.\n"
LICENCE = """\
## Licence

Meta's SAM 2 and its weights are under the Apache License 2.0, hence the `license` above. The terms of use of the data
are not recorded: check them before you publish this model.
"""


def model_card(merged: Merged, base: Path, folder: str, *, video: bool) -> str:
    """The text of the card.

    Args:
        merged: the merge, with the adapters' metadata.
        base: the file of the base's weights.
        folder: name of the model's folder.
        video: whether the folder contains the weights of the memory.
    """
    stem = PurePath(merged.model or "").stem
    size = next((name for end, name in HUB.items() if stem.endswith(end)), None)
    version = "sam2.1" if "sam2.1" in stem else "sam2"
    note = f"# base_model: facebook/{version}-{size}  # if the base was Meta's own file\n" if size else ""
    runs = {run: None for path, *_ in merged.sources if (run := find_run(path)) is not None}
    parts = [
        FRONT.format(base=note)
        + USE.format(title=_title(list(runs), folder), folder=folder, what=_what(merged))
        + (VIDEO if video else ""),
        "\n".join(["## Base", "", *_base(merged, base)]) + "\n",
        "\n".join(["## Adapters" if len(merged.sources) > 1 else "## Adapter", "", *_adapters(merged)]) + "\n",
        *("\n".join(_data(run)) + "\n" for run in runs or [None]),
        *("\n".join(_metrics(path, facts)) + "\n" for path, _, facts in merged.sources),
        LICENCE,
    ]
    return "\n".join(parts)


def _title(runs: list[Path], folder: str) -> str:
    return str(_note(runs[0] / "run.json").get("name", folder)) if len(runs) == 1 else folder


def _what(merged: Merged) -> str:
    kind = "DoRA" if merged.adapter.is_dora else "LoRA"
    count = "an adapter" if len(merged.sources) == 1 else f"{len(merged.sources)} adapters"
    return (
        f"SAM 2 ({merged.model or 'of no stock size'}) with {count} ({kind}) merged into its weights by "
        f"sam2_lora_ext {sam2_lora_ext.__version__}."
    )


def _base(merged: Merged, base: Path) -> Iterator[str]:
    metas = any(PurePath(merged.model or "").stem.endswith(end) for end in HUB)
    yield f"- architecture: `{merged.model or 'unknown'}`" + (" of SAM 2's repository" if metas else "")
    yield f"- weights: `{base.name}`, SHA-256 of their values `{merged.base_id}`"
    yield f"- written as {' and '.join(merged.dtypes)}; {merged.changed} of {merged.tensors} tensors were changed"
    yield from (f"- {note}" for note in merged.notes)


def _adapters(merged: Merged) -> Iterator[str]:
    adapter = merged.adapter
    ranks = ", ".join(map(str, sorted({layer.rank for layer in adapter.layers.values()})))
    for path, weight, facts in merged.sources:
        step = f", after {facts['step']} steps" if facts.get("step") is not None else ""
        kind = f" ({facts['kind']})" if facts.get("kind") else ""
        yield f"- `{path.name}`{kind}{step}" + (f", times {weight:g}" if weight != 1 else "")
    if adapter.layers:
        yield f"- {len(adapter.layers)} adapted layers of rank {ranks}"
    if adapter.full_modules:
        yield f"- trained in full: {', '.join(f'`{name}`' for name in adapter.full_modules)}"


def _data(run: Path | None) -> Iterator[str]:
    """The training data of the run; without a run, a sentence that it is unknown."""
    yield from ("## Data", "")
    if run is None:
        yield "The adapter does not belong to a run folder: its training data is unknown."
        return
    digests, source = read_run_config(run, warn=False)["data"], None
    for phase in ("train", "val"):
        word = "training" if phase == "train" else "validation"
        try:
            source = from_run(run, phase)
        except UserError:
            yield f"- {word}: unknown, since the run's record names no data set that the tools can read"
            continue
        places = ", ".join(f"`{PurePath(place).name}`" for place in source.places.values())
        split = f", split {source.split} of `{PurePath(source.split_file).name}`" if source.split_file else ""
        split = split or (f", split {source.split}" if source.split else "")
        digest = f", SHA-256 of its content `{digests[phase]}`" if digests.get(phase) else ""
        yield f"- {word}: {READER_NAMES.get(source.format, source.format)}, {places}{split}{digest}"
    if source is not None:
        yield (
            f"- model input: {f'windows of {source.crop} columns' if source.crop else 'whole images'} at "
            f"{source.resolution} x {source.resolution} pixels"
        )
    summary = _note(run / SUMMARY)
    if {"steps", "learning_rate", "seed"} <= summary.keys():
        yield (
            f"- {summary['steps']} steps, learning rate {summary['learning_rate']:g}, seed {summary['seed']}, "
            f"{summary.get('world_size')} process(es)"
        )


def _metrics(path: Path, facts: Mapping[str, Any]) -> Iterator[str]:
    """The metrics of the validation at which the adapter was exported."""
    yield from (f"## Metrics of `{path.name}`", "")
    metrics = facts.get("metrics")
    rows = (
        {
            name: value
            for name, value in metrics.items()
            if not str(name).startswith("loss") and isinstance(value, (int, float)) and math.isfinite(value)
        }
        if isinstance(metrics, dict)
        else {}
    )
    if not rows:
        yield "The adapter records no validation."
        return
    yield from (
        "On the run's validation data, with the prompts of training; `tools/evaluate.py` measures with the stock "
        "predictors and computes intervals.",
        "",
        "| metric | value |",
        "|---|---|",
    )
    yield from (
        f"| {name} | {value:.4f} |"
        if isinstance(value, float) and not value.is_integer()
        else f"| {name} | {value:g} |"
        for name, value in rows.items()
    )


def _note(file: Path) -> dict[str, Any]:
    """A JSON record of a run; empty if it is missing or damaged, since a card can do without it."""
    try:
        content = read_json(file, LARGEST_NOTE)
    except UserError:
        return {}
    return content if isinstance(content, dict) else {}
