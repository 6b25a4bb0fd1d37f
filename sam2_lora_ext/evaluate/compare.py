"""Several models on the same objects: one record for `evaluation.json`, galleries and submissions."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sam2_lora_ext.data.dataset import SeverstalRawDataset
from sam2_lora_ext.errors import UserError
from sam2_lora_ext.evaluate.gallery import refuse_gallery, write_gallery
from sam2_lora_ext.evaluate.kaggle import KaggleTally
from sam2_lora_ext.evaluate.models import Candidate, build
from sam2_lora_ext.evaluate.protocol import Protocol
from sam2_lora_ext.evaluate.run import ModelResult, run_model
from sam2_lora_ext.evaluate.tables import differences, summarize
from sam2_lora_ext.evaluation import Sample, read_sample
from sam2_lora_ext.files import refuse_existing
from sam2_lora_ext.summary import versions

SUBMISSION, GALLERY = "submission.csv", "gallery"


class Samples(Sequence[Sample]):
    """The samples of a data set, read when they are asked for.

    Args:
        dataset: built with `training=False`.
        crop: see `Protocol`.
        limit: only the first so many, spread evenly; None for all.
    """

    def __init__(self, dataset: SeverstalRawDataset, crop: int | None = None, limit: int | None = None):
        self.dataset, self.crop = dataset, crop
        count = min(limit or len(dataset), len(dataset))
        self.items = [place * len(dataset) // count for place in range(count)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, place: int) -> Sample:
        return read_sample(self.dataset, self.items[place], self.crop)

    def __iter__(self) -> Iterator[Sample]:
        return (self[place] for place in range(len(self)))


def compare(
    candidates: Sequence[Candidate], samples: Samples, protocol: Protocol, out: Path, *, device: str = "cpu",
    submitted: str = "1click", pictures: int = 4, split: tuple[Path | None, str | None] = (None, None),
    force: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Evaluates every model; writes galleries and submissions below `out`.

    Args:
        candidates: the first one is what the others are compared with.
        samples: what is asked about.
        protocol: how.
        out: folder; each model gets `<name>/` in it.
        device: such as cuda.
        submitted: the prompt whose masks go into submission.csv.
        pictures: of each kind in a gallery.
        split: split file and split of the data set, for the record.
        force: replace files.

    Returns:
        What evaluation.json holds.

    Raises:
        UserError: a mistake in any of the models, found before the first one is asked; or there is nothing to ask.
    """
    check_candidates(candidates, protocol, out, force)
    dataset = samples.dataset
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
        if not result.objects:
            raise UserError(
                f"the {len(samples)} items of {dataset.index.image_dir} that are evaluated show no defect of at least "
                "--min-area pixels: look at --limit, --min-area and the split"
            )
        gallery = []
        if pictures:
            gallery = write_gallery(
                out / wanted.name / GALLERY, result, samples, dataset.class_names, pictures, force=force
            )
        if tally is not None:
            tally.write(out / wanted.name / SUBMISSION, force)
            tallies.append(tally)
        records.append({
            **facts,
            **summarize(result, protocol, dataset.class_names),
            "kaggle": tally and tally.summary(),
            "gallery": [{**entry, "file": f"{wanted.name}/{entry['file']}"} for entry in gallery],
            "objects": _rows(result),
        })  # fmt: skip
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
            "split": split[1],
            "split_file": str(split[0]) if split[0] else None,
        },
        "models": records,
        "reference": candidates[0].name,
        "differences": changes,
        "versions": versions(),
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
    }


def check_candidates(candidates: Sequence[Candidate], protocol: Protocol, out: Path, force: bool) -> None:
    """Finds what would stop an evaluation in the middle: names, files in the way, models that cannot be built.

    Raises:
        UserError: the first such thing.
    """
    names = [wanted.name for wanted in candidates]
    if len(set(names)) < len(names) or any("/" in name or name in ("", ".", "..") for name in names):
        raise UserError(f"each model needs a name of its own without slashes (write name=path), got {', '.join(names)}")
    folder = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"{folder} is no folder that can be written to: give another --out")
    for name in names:
        refuse_existing(out / name / SUBMISSION, force)
        refuse_gallery(out / name / GALLERY, force)
    if len(candidates) > 1:  # a lone one is built at once anyway
        for wanted in candidates:
            build(wanted, "cpu", protocol.image_size)


def _rows(result: ModelResult) -> list[dict[str, Any]]:
    kept = ("image", "object_id", "by_clicks", "clicks", "areas", "boundary", "score", "automatic")
    return [{name: getattr(row, name) for name in kept} for row in result.objects]
