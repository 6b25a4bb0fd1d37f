"""Compares models on the same objects: one record for `evaluation.json`, galleries and submissions."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sam2_lora_ext.data.dataset import SeverstalRawDataset
from sam2_lora_ext.evaluate.evaluation import ModelResult, ObjectResult, run_model
from sam2_lora_ext.evaluate.gallery import write_gallery
from sam2_lora_ext.evaluate.kaggle_score import KaggleTally
from sam2_lora_ext.evaluate.models import Candidate, build
from sam2_lora_ext.evaluate.predictor import Sample, read_sample
from sam2_lora_ext.evaluate.protocol import Protocol
from sam2_lora_ext.evaluate.tables import differences, summarize
from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.versions import versions

SUBMISSION, GALLERY = "submission.csv", "gallery"


class Samples(Sequence[Sample]):
    """The samples of a data set, read on demand.

    Args:
        dataset: built with `training=False`.
        crop: see `Protocol`.
        limit: number of samples, evenly spaced; None for all.
    """

    def __init__(self, dataset: SeverstalRawDataset, crop: int | None = None, limit: int | None = None):
        self.dataset, self.crop = dataset, crop
        count = min(limit or len(dataset), len(dataset))
        self.items = [position * len(dataset) // count for position in range(count)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, position: int) -> Sample:
        return read_sample(self.dataset, self.items[position], self.crop)

    def __iter__(self) -> Iterator[Sample]:
        return (self[position] for position in range(len(self)))


def compare(
    candidates: Sequence[Candidate],
    samples: Samples,
    protocol: Protocol,
    out: Path,
    *,
    device: str = "cpu",
    submitted: str = "1click",
    pictures: int = 4,
    conditions: Mapping[str, Any] | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Evaluates every model; writes galleries and submissions below `out`. Call `checks.prepare` first.

    Args:
        candidates: the models; the others are compared with the first one.
        samples: the data set's samples, with at least one defect.
        protocol: the prompts and views.
        out: output folder; each model gets `<name>/` in it.
        device: such as cuda.
        submitted: the prompt of the masks in submission.csv.
        pictures: number of pictures of each kind in a gallery.
        conditions: see `Conditions.record`.
        force: replace files.

    Returns:
        The content of evaluation.json.

    Raises:
        UserError: a model cannot be built or predicts NaN, or a file cannot be written.
    """
    dataset, conditions = samples.dataset, dict(conditions or {})
    used = conditions.get("used", {})
    whole = protocol.crop is None and len(samples) == len(dataset)
    records: list[dict[str, Any]] = []
    results: list[ModelResult] = []
    tallies: list[KaggleTally] = []
    for wanted in candidates:
        model, facts = build(wanted, device, protocol.image_size)
        tally = KaggleTally(dataset.index, dataset.images, submitted) if whole else None
        replay = results[0].clicks() if protocol.same_clicks and results else None
        try:
            bar = tqdm(samples, desc=wanted.name, unit="image", disable=None)
            result = run_model(model, bar, protocol, tally, replay)
        except UserError as error:
            raise UserError(f"{wanted.name}: {error}") from error
        gallery = []
        if pictures:
            gallery = write_gallery(
                out / wanted.name / GALLERY, result, samples, dataset.class_names, pictures, force=force
            )
        if tally is not None:
            tally.write(out / wanted.name / SUBMISSION, force)
            tallies.append(tally)
        records.append(
            {
                **facts,
                **summarize(result, protocol, dataset.class_names),
                "kaggle": tally and tally.summary(),
                "gallery": [{**entry, "file": f"{wanted.name}/{entry['file']}"} for entry in gallery],
                "objects": _rows(result, samples),
            }
        )
        results.append(result)
    changes = {}
    for number, wanted in enumerate(candidates[1:], start=1):
        changes[wanted.name] = differences(results[0], results[number], protocol)
        changes[wanted.name] |= tallies[0].difference(tallies[number]) if tallies else {}
    return {
        "protocol": asdict(protocol),
        "data": {
            "image_dir": dataset.index.image_dir,
            "images": len({row.image for row in [*results[0].objects, *results[0].clean]}),
            "objects": len(results[0].objects),
            "clean_images": len({row.image for row in results[0].clean}),
            "split": used.get("split"),
            "split_file": used.get("split_file"),
        },
        "conditions": conditions,
        "models": records,
        "reference": candidates[0].name,
        "differences": changes,
        "versions": versions(),
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
    }


def _rows(result: ModelResult, samples: Samples) -> list[dict[str, Any]]:
    """The results of each object, with `annotation`, the id of an instance in the annotation file (null: none)."""
    items, objects = samples.dataset.items, samples.dataset.objects

    def annotation(row: ObjectResult) -> int | None:
        image = items[samples.items[row.item]].image
        number = int(objects.annotation[objects.place_of(image, row.object_id)])
        return None if number < 0 else number

    kept = ("image", "object_id", "by_clicks", "clicks", "areas", "boundary", "score", "automatic")
    return [{**{name: getattr(row, name) for name in kept}, "annotation": annotation(row)} for row in result.objects]
