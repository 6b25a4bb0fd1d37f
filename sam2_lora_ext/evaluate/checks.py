"""Checks data, models and outputs before an evaluation starts."""

import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sam2_lora_ext.evaluate.compare import GALLERY, SUBMISSION, Samples
from sam2_lora_ext.evaluate.conditions import Conditions
from sam2_lora_ext.evaluate.gallery import refuse_gallery
from sam2_lora_ext.evaluate.models import Candidate, build
from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.files import refuse_existing

RECORDS = ("evaluation.json", "evaluation.md")  # in the output folder
LONGEST = 200  # bytes of a folder's name: the limit of file systems is 255
DEEPEST = 3500  # bytes of the output folder's path: the limit of Linux is 4096


def prepare(
    candidates: Sequence[Candidate], conditions: Conditions, out: Path, limit: int | None = None, force: bool = False
) -> tuple[Samples, dict[str, Any]]:
    """Runs all checks; returns the samples to evaluate and the record of the conditions.

    Args:
        candidates: the models.
        conditions: the data and the protocol.
        out: the output folder.
        limit: see `Samples`.
        force: replace existing files.

    Raises:
        UserError: a mistake in data, models or outputs.
    """
    source, names = conditions.source, [wanted.name for wanted in candidates]
    check_names(names)
    read = [*source.make_reader().files(), *([] if source.split_file is None else [Path(source.split_file)])]
    check_outputs(out, names, force, [*read, *[file for wanted in candidates for file in wanted.inputs()]])
    dataset = source.dataset()
    said = conditions.record(dataset)
    samples = Samples(dataset, source.crop, limit)
    check_samples(samples, source.min_area)
    check_models(candidates, source.resolution)
    return samples, said


def check_names(names: Sequence[str]) -> None:
    """Raises a `UserError` unless all names are unique and valid folder names."""
    if len(set(names)) < len(names) or any("/" in name or name in ("", ".", "..") for name in names):
        raise UserError(f"each model needs a unique name without slashes (write name=path), got {', '.join(names)}")
    for name in names:
        if name in RECORDS:
            raise UserError(f"a model cannot be named {name}, like a file of the evaluation: write name=path")
        if not name.isprintable() or len(name.encode("utf-8", "surrogateescape")) > LONGEST:
            raise UserError(
                f"the model name {name[:40]!r} with {len(name)} characters is not a valid folder name: "
                f"write name=path with a name of printable characters and at most {LONGEST} bytes"
            )


def check_outputs(out: Path, names: Sequence[str], force: bool, inputs: Iterable[Path] = ()) -> None:
    """Checks every file and folder that an evaluation writes.

    Args:
        out: the output folder.
        names: the models' names.
        force: replace existing files.
        inputs: files that are read and must not be replaced.

    Raises:
        UserError: an output exists already, cannot be written, or is an input.
    """
    if any(len(os.fsencode(part)) > LONGEST for part in out.parts) or len(os.fsencode(out.absolute())) > DEEPEST:
        raise UserError(f"the path of --out {str(out)[:60]}... is too long for a file system: choose a shorter one")
    files = [out / name for name in RECORDS] + [out / name / SUBMISSION for name in names]
    for folder in (out, *[path for name in names for path in (out / name, out / name / GALLERY)]):
        there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
        try:
            with tempfile.TemporaryFile(dir=there):  # for root, os.access allows even /proc
                pass
        except OSError as error:
            raise UserError(f"{there} is not a writable folder: give another --out") from error
        if folder.name == GALLERY:
            refuse_gallery(folder, force)
    read = {Path(path).resolve() for path in inputs}
    for file in files:
        refuse_existing(file, force)
        if os.path.lexists(file) and not file.is_file():
            raise UserError(f"{file} is not a file that can be replaced: give another --out")
        if file.resolve() in read:
            raise UserError(f"{file} is an input and cannot be replaced: give another --out")


def check_samples(samples: Samples, min_area: int) -> None:
    """Reads every sample once.

    Raises:
        UserError: an image cannot be decoded, a crop does not contain its objects, or there is no defect.
    """
    dataset = samples.dataset
    if not any(dataset.classes_of(item) for item in samples.items):
        raise UserError(
            f"the {len(samples)} evaluated items of {dataset.index.image_dir} have no defect of at least "
            f"{min_area} pixels: check --limit, --min-area and the split"
        )
    for _ in tqdm(samples, desc="reading images", unit="image", disable=None, leave=False):
        pass


def check_models(candidates: Sequence[Candidate], image_size: int | None) -> None:
    """Builds each of several models once to find errors early; the evaluation itself builds a single model anyway."""
    if len(candidates) > 1:
        for wanted in candidates:
            build(wanted, "cpu", image_size)
