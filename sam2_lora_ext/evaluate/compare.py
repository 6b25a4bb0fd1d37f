"""Several models on the same objects: one record for `evaluation.json`, and its tables as text."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sam2_lora_ext.data.dataset import SeverstalRawDataset
from sam2_lora_ext.data.items import read_split, select_images
from sam2_lora_ext.errors import UserError
from sam2_lora_ext.evaluate.gallery import write_gallery
from sam2_lora_ext.evaluate.kaggle import KaggleTally
from sam2_lora_ext.evaluate.models import Candidate, build
from sam2_lora_ext.evaluate.run import ModelResult, Protocol, run_model
from sam2_lora_ext.evaluate.tables import differences, headline, summarize, text_table
from sam2_lora_ext.evaluation import Sample, read_sample
from sam2_lora_ext.summary import versions


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
    candidates: Sequence[Candidate],
    samples: Samples,
    protocol: Protocol,
    out: Path,
    *,
    device: str = "cpu",
    submitted: str = "1click",
    pictures: int = 4,
    split: tuple[Path | None, str | None] = (None, None),
    force: bool = False,
) -> dict[str, Any]:
    """Evaluates every model; writes galleries and submissions below `out`.

    Args:
        candidates: the first one is what the others are compared with.
        samples: what is asked about.
        protocol: how.
        out: folder; each model gets `<name>/` in it.
        device: such as cuda.
        submitted: the prompt whose masks go into submission.csv.
        pictures: of each kind in a gallery.
        split: split file and split of the data set, for Kaggle's score, which counts images without objects too.
        force: replace files.

    Returns:
        What evaluation.json holds.

    Raises:
        UserError: two models have one name, or a model cannot be built.
    """
    names = [wanted.name for wanted in candidates]
    if len(set(names)) < len(names) or any("/" in name or name in ("", ".", "..") for name in names):
        raise UserError(f"each model needs a name of its own without slashes (write name=path), got {', '.join(names)}")
    dataset = samples.dataset
    whole = protocol.crop is None and len(samples) == len(dataset)
    records, results = [], []
    for wanted in candidates:
        model, facts = build(wanted, device)
        tally = _tally(dataset, split, submitted) if whole else None
        result = run_model(model, tqdm(samples, desc=wanted.name, unit="image"), protocol, tally)
        if not result.objects:
            raise UserError(f"{dataset.index.image_dir} has no defect to ask about; look at --min-area and the split")
        gallery = (
            write_gallery(out / wanted.name / "gallery", result, samples, dataset.class_names, pictures)
            if pictures
            else []
        )
        if tally is not None:
            tally.write(out / wanted.name / "submission.csv", force)
        records.append(
            {
                **facts,
                **summarize(result, protocol, dataset.class_names),
                "kaggle": tally and tally.summary(),
                "gallery": [{**entry, "file": f"{wanted.name}/{entry['file']}"} for entry in gallery],
                "objects": _rows(result),
            }
        )
        results.append(result)
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
        "reference": names[0],
        "differences": {
            name: differences(results[0], result, protocol) for name, result in zip(names[1:], results[1:], strict=True)
        },
        "versions": versions(),
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
    }


def describe(record: dict[str, Any]) -> str:
    """The tables of an evaluation as Markdown."""
    protocol, models = Protocol(**record["protocol"]), record["models"]
    titles, data = headline(protocol), record["data"]
    parts = [
        f"{data['objects']} objects in {data['images'] - data['clean_images']} images, {data['clean_images']} clean images; "
        "means over objects with 95 % intervals by image.\n",
        text_table([(model["name"], model["metrics"]) for model in models], titles),
    ]
    if record["differences"]:
        parts += [
            f"Differences from {record['reference']}, object by object (* where the interval leaves out 0):\n",
            text_table(list(record["differences"].items()), titles, signed=True),
        ]
    few = {key: title for key, title in titles.items() if key.startswith("iou_") and not title.endswith("%")}
    for kind, heading in (
        ("classes", "By class"),
        ("sizes", "By size of the object (small < 32² <= medium < 96² <= large, in pixels)"),
    ):
        for model in models:
            groups = [(f"{name} ({len_of(values)})", values) for name, values in model[kind].items()]
            parts += [f"{heading}, {model['name']}:\n", text_table(groups, few)]
    lines = []
    for model in models:
        if presence := model["presence"]:
            bounds = "{:.3f} [{:.3f}, {:.3f}]".format
            lines.append(
                f"{model['name']}: defect or sound steel by object score: AUROC {bounds(presence['auroc'], *presence['auroc_ci95'])}, "
                f"false alarms at {presence['recall']:.0%} recall {bounds(presence['false_alarms'], *presence['false_alarms_ci95'])}"
            )
        for prompt, scores in (model["kaggle"] or {}).items():
            if prompt in ("1click", "box"):
                lines.append(
                    f"{model['name']}: Kaggle mean Dice, classes given by prompt, {prompt}: {scores['dice']:.4f} "
                    f"(an empty submission {scores['empty_submission']:.4f}; where there is a defect {scores['dice_present']:.4f})"
                )
        speed = model["speed"]
        lines.append(
            f"{model['name']}: {speed['encode_ms']} ms an image, {speed['click_ms']} ms a click ({model['device']})"
        )
    return "\n".join([*parts, *[f"- {line}" for line in lines]]) + "\n"


def len_of(values: dict[str, Any]) -> int:
    """Objects behind a row of a table."""
    return next(iter(values.values()))["objects"]


def _tally(dataset: SeverstalRawDataset, split: tuple[Path | None, str | None], submitted: str) -> KaggleTally:
    names = None if split[0] is None else read_split(*split)
    return KaggleTally(dataset.index, select_images(dataset.index, names, split[0]), submitted)


def _rows(result: ModelResult) -> list[dict[str, Any]]:
    return [
        {
            "image": row.image,
            "object_id": row.object_id,
            "by_clicks": row.by_clicks,
            "areas": row.areas,
            "boundary": row.boundary,
            "score": row.score,
            "automatic": row.automatic,
        }
        for row in result.objects
    ]
