"""Writes an index in each format of the readers; reading it back gives the same objects.

A data set is written to a temporary folder and then renamed, so it is complete or absent.
"""

import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image
from tqdm import tqdm

from sam2_lora_ext.data.folders import refuse_folder, write_folder
from sam2_lora_ext.data.images import mode_and_tag
from sam2_lora_ext.data.index import AnnotationIndex
from sam2_lora_ext.data.instance_writers import places, progress_bar, write_coco, write_supervisely
from sam2_lora_ext.data.objects import make_objects
from sam2_lora_ext.data.rle import decode_runs, format_rle
from sam2_lora_ext.utils.csv_text import csv_text
from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.folders import refuse_inputs

log = logging.getLogger(__name__)

Write = Callable[[AnnotationIndex, list[str], Path, bool], None]


def write_kaggle(index: AnnotationIndex, names: list[str], folder: Path, progress: bool) -> None:
    """Writes `train_images/` and `train.csv`, a row for each mask."""
    masks = make_objects(index, "classes")
    rows = [
        (names[image], class_id, format_rle(masks.runs_of(position))) for image, class_id, position in places(masks)
    ]
    _table(folder / "train.csv", ["ImageId", "ClassId", "EncodedPixels"], rows)


def write_kaggle_old(index: AnnotationIndex, names: list[str], folder: Path, progress: bool) -> None:
    """Writes `train_images/` and `train.csv` with a row for each image and class, empty where there is no mask."""
    masks = make_objects(index, "classes")
    texts = {(image, class_id): format_rle(masks.runs_of(position)) for image, class_id, position in places(masks)}
    _table(
        folder / "train.csv",
        ["ImageId_ClassId", "EncodedPixels"],
        [
            (f"{name}_{class_id}", texts.get((image, class_id), ""))
            for image, name in enumerate(names)
            for class_id in sorted(index.class_names)
        ],
    )


def write_label_png(index: AnnotationIndex, names: list[str], folder: Path, progress: bool) -> None:
    """Writes `images/` and `annotations/` with the class number as grey value.

    Raises:
        UserError: classes overlap or are above 255, or two images have the same stem: label images cannot store these.
    """
    if max(index.class_names) > 255:
        raise UserError(f"a label image stores classes up to 255, the data has class {max(index.class_names)}")
    if len({Path(name).stem for name in names}) < len(names):
        raise UserError("two images differ only in their suffix, so they would share a label image; rename one")
    for image, name in enumerate(progress_bar(names, progress)):
        height, width = index.sizes[image].tolist()
        label = np.zeros((height, width), dtype=np.uint8)
        for class_id, runs in index.masks(image):
            mask = decode_runs(runs, height, width) > 0
            other = label[mask & (label != 0) & (label != class_id)]
            if len(other):
                raise UserError(
                    f"classes {class_id} and {int(other[0])} overlap in {name}, which a label image cannot store; "
                    "choose another format"
                )
            label[mask] = class_id
        Image.fromarray(label).save(folder / "annotations" / f"{Path(name).stem}.png")


BY_CLASS = ("kaggle", "kaggle_old", "label_png")  # formats with one mask for each class of an image
WRITERS: dict[str, tuple[Write, str, tuple[str, ...]]] = {  # writer, image folder, further folders
    "kaggle": (write_kaggle, "train_images", ()),
    "kaggle_old": (write_kaggle_old, "train_images", ()),
    "supervisely": (write_supervisely, "train/img", ("train/ann",)),
    "label_png": (write_label_png, "images", ("annotations",)),
    "coco": (write_coco, "images", ()),
}


def convert(
    index: AnnotationIndex,
    kind: str,
    out: str | Path,
    force: bool = False,
    progress: bool = True,
    inputs: Sequence[str | Path] = (),
) -> int:
    """Writes a data set; the image files are copied unchanged.

    Args:
        index: the annotations; images that lost an invalid mask are left out, since they would seem complete. COCO and
            Supervisely keep all annotations; the log lists what other formats lose.
        kind: a key of `WRITERS`.
        out: the folder to write.
        force: replace it if it exists; see `write_folder`.
        progress: show a bar.
        inputs: the index's source files and folders besides its images; `out` must be outside all of them.

    Returns:
        The number of images of the index that are left out.

    Raises:
        UserError: no image is left, two have the same name, or the format cannot store the masks.
    """
    write, image_folder, others = WRITERS[kind]
    refuse_inputs(Path(out), [index.image_dir, *inputs, *map(index.path, range(len(index)))])
    refuse_folder(Path(out), force)
    chosen = np.flatnonzero(index.complete)
    left_out = len(index) - len(chosen)
    if not len(chosen):
        raise UserError(f"every image of {index.image_dir} may lack masks, so none is converted; correct the problems")
    if left_out:
        index = index.subset(chosen)
    if kind in BY_CLASS and (sentence := joined(index, kind)):
        log.warning("%s", sentence)
    if kind != "coco" and index.mask_crowd.any():
        log.warning("%s has no iscrowd: %d annotations lose that flag", kind, index.mask_crowd.sum())
    names = [PurePosixPath(name).name for name in index.names()]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{twice} is in several folders of the data; convert one split at a time")

    def fill(folder: Path) -> None:
        for name in (image_folder, *others):
            (folder / name).mkdir(parents=True)
        write(index, names, folder, progress)
        for image, name in enumerate(tqdm(names, desc="images", unit="image", disable=not progress)):
            shutil.copy2(index.path(image), folder / image_folder / name)

    write_folder(out, fill, force)
    tagged = [name for image, name in enumerate(names) if not index.exif and mode_and_tag(index.path(image))[1] != 1]
    if tagged:
        log.warning(
            "%d images (%s, ...) are copied with their EXIF orientation tag, but the masks are those of the images as "
            "stored: read the copy with dataset.exif=false too, or remove the tags",
            len(tagged),
            tagged[0],
        )
    return left_out


def joined(index: AnnotationIndex, kind: str) -> str | None:
    """A sentence on the annotations that a format with one mask per class of an image joins; None if it joins none."""
    pairs = index.mask_image().astype(np.int64) * (max(index.class_names) + 1) + index.mask_class
    counts = np.unique(pairs, return_counts=True)[1]
    if not index.instances or not (counts > 1).any():
        return None
    return (
        f"{kind} has one mask for each class of an image: {int(counts[counts > 1].sum())} of {len(pairs)} annotations "
        f"are joined with another one, so {len(counts)} masks are written"
    )


def _table(path: Path, header: list[str], rows: list[tuple]) -> None:
    path.write_text(csv_text(header, rows), encoding="utf-8")
