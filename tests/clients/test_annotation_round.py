"""A round of annotation: pre-labels of a model, corrected in a tool's own format, read back, used in training.

Pre-labels are the stock predictor's masks for boxes on synthetic strips. A tool is represented by its output files:
COCO's JSON with a polygon (checked with pycocotools), Supervisely's JSON with a bitmap, a painted palette PNG. Masks
that were not corrected must be read back pixel for pixel, with their ids.
"""

import base64
import io
import json
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from sam2.sam2_image_predictor import SAM2ImagePredictor

from helpers.small_runs import environment, train_here
from sam2_lora_ext.data.guess_format import guess_reader
from sam2_lora_ext.data.index import AnnotationIndex, build_index, pack
from sam2_lora_ext.data.objects import make_objects
from sam2_lora_ext.data.records import ImageRecord
from sam2_lora_ext.data.rle import decode_runs, encode_mask
from sam2_lora_ext.data.writers import convert
from sam2_lora_ext.deploy.predictors import fit_predictor
from sam2_lora_ext.deploy.stock import build_stock

HEIGHT, WIDTH = 256, 1600
BOX = (1000, 30, 1200, 90)  # x0, y0, x1, y1: where somebody corrects by hand
Objects = dict[int, tuple[str, int, bytes]]  # id -> image, class, mask


class Round(NamedTuple):
    """Pre-labels, and what a person does to them."""

    index: AnnotationIndex
    changed: int  # the id of an object that gets the mask of BOX
    removed: int  # of one that is no defect
    clean: str  # an image without pre-labels, which gets an object of class 3


@pytest.fixture(scope="module")
def pre(strips: Path, repository: Path) -> Round:
    """The model's masks for the objects' boxes on six strips; ids and image ids in no order, as tools give them."""
    truth = build_index(guess_reader(strips))
    objects = make_objects(truth)
    model = build_stock("configs/sam2_nano.yaml", repository / "assets/sam2_nano.pt")
    predictor = fit_predictor(SAM2ImagePredictor(model))
    records, ids = [], iter(range(900, 0, -7))
    full = [image for image in range(len(truth)) if not truth.clean()[image]]
    clean = int(np.flatnonzero(truth.clean())[0])
    for image in (*full[:5], clean):
        predictor.set_image(truth.read(image, bits=8))
        record = ImageRecord(truth.name(image), HEIGHT, WIDTH, source_id=50 - image)
        taken = np.zeros((HEIGHT, WIDTH), bool)
        taken[BOX[1] : BOX[3], BOX[0] : BOX[2]] = True  # kept free, for a label image holds one class a pixel
        for place in range(*objects.offsets[image : image + 2]):
            masks, _, _ = predictor.predict(box=objects.boxes[place].astype(np.float32), multimask_output=False)
            mask = (masks[0] > 0) & ~taken
            if mask.any():
                record.add(objects.class_of(place), encode_mask(mask), next(ids))
                taken |= mask
        records.append(record)
    index = replace(pack(records, truth.image_dir, truth.class_names), instances=True)
    changed, removed = index.mask_id[0], index.mask_id[-1]
    assert len(index.mask_id) >= 5 and index.mask_image()[0] != index.mask_image()[-1]
    return Round(index, int(changed), int(removed), truth.name(clean))


def objects_of(index: AnnotationIndex) -> Objects:
    """The content of an index, by id."""
    table = make_objects(index, "instances")
    return {
        int(table.annotation[place]): (name, table.class_of(place), table.runs_of(place).tobytes())
        for image, name in enumerate(Path(name).name for name in index.names())
        for place in range(*table.offsets[image : image + 2])
    }


def by_hand() -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[BOX[1] : BOX[3], BOX[0] : BOX[2]] = 1
    return mask


def corrected(pre: Round) -> Objects:
    """The expected content after the corrections."""
    hand, wanted = encode_mask(by_hand() > 0).tobytes(), objects_of(pre.index)
    name, class_id, _ = wanted[pre.changed]
    del wanted[pre.removed]
    return {**wanted, pre.changed: (name, class_id, hand), 5000: (pre.clean, 3, hand)}


def correct_coco(folder: Path, pre: Round) -> None:
    """With pycocotools, which reads our file too: each mask, area and box of it is the pre-label's."""
    tool = COCO(str(folder / "annotations.json"))
    for number, (_, class_id, runs) in objects_of(pre.index).items():
        entry = tool.anns[number]
        mask = decode_runs(np.frombuffer(runs, np.int32).reshape(-1, 2), HEIGHT, WIDTH)
        assert np.array_equal(tool.annToMask(entry), mask) and entry["category_id"] == class_id
    x0, y0, x1, y1 = BOX
    drawn = {
        "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]],
        "area": (x1 - x0) * (y1 - y0),
        "iscrowd": 0,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
    }
    rle = mask_utils.merge(mask_utils.frPyObjects(drawn["segmentation"], HEIGHT, WIDTH))
    assert np.array_equal(mask_utils.decode(rle), by_hand())
    image_id = next(entry["id"] for entry in tool.dataset["images"] if entry["file_name"] == pre.clean)
    entries = [{**entry, **drawn} if entry["id"] == pre.changed else entry for entry in tool.dataset["annotations"]]
    entries = [entry for entry in reversed(entries) if entry["id"] != pre.removed]
    entries.append({"id": 5000, "image_id": image_id, "category_id": 3, **drawn})
    (folder / "annotations.json").write_text(json.dumps({**tool.dataset, "annotations": entries}, indent=1))


def correct_supervisely(folder: Path, pre: Round) -> None:
    """The bitmap is made as Supervisely's documentation says: a PNG with alpha, compressed once more, in base64."""
    file = io.BytesIO()
    drawn = np.full((BOX[3] - BOX[1], BOX[2] - BOX[0], 4), 255, np.uint8)
    Image.fromarray(drawn).save(file, format="PNG")
    bitmap = {"data": base64.b64encode(zlib.compress(file.getvalue())).decode(), "origin": list(BOX[:2])}
    for path in (folder / "train/ann").iterdir():
        content = json.loads(path.read_text())
        kept = [entry for entry in content["objects"] if entry["id"] != pre.removed]
        kept = [{**entry, "bitmap": bitmap} if entry["id"] == pre.changed else entry for entry in kept]
        if path.name == f"{pre.clean}.json":
            title = pre.index.class_names[3]
            kept.append({"id": 5000, "classTitle": title, "geometryType": "bitmap", "bitmap": bitmap})
        path.write_text(json.dumps({**content, "objects": kept[::-1]}))


def correct_label_png(folder: Path, pre: Round) -> None:
    """Painted, and saved with a palette."""
    known = objects_of(pre.index)
    for path in (folder / "annotations").iterdir():
        label = np.array(Image.open(path))
        for number in (pre.changed, pre.removed):
            name, _, runs = known[number]
            if Path(name).stem == path.stem:
                label[decode_runs(np.frombuffer(runs, np.int32).reshape(-1, 2), HEIGHT, WIDTH) > 0] = 0
        if path.stem == Path(known[pre.changed][0]).stem:
            label[by_hand() > 0] = known[pre.changed][1]
        if path.stem == Path(pre.clean).stem:
            label[by_hand() > 0] = 3
        image = Image.fromarray(label)
        image.putpalette([0, 0, 0, 230, 25, 75, 60, 180, 75, 255, 225, 25, 0, 130, 200])
        image.save(path)


def masks_by_class(objects: Objects) -> dict[tuple[str, int], bytes]:
    """(image, class) -> all of its pixels."""
    found: dict[tuple[str, int], np.ndarray] = {}
    for name, class_id, runs in objects.values():
        mask = decode_runs(np.frombuffer(runs, np.int32).reshape(-1, 2), HEIGHT, WIDTH) > 0
        found[name, class_id] = found.get((name, class_id), False) | mask
    return {key: encode_mask(mask).tobytes() for key, mask in found.items()}


CORRECT: dict[str, Callable[[Path, Round], None]] = {
    "coco": correct_coco,
    "supervisely": correct_supervisely,
    "label_png": correct_label_png,
}


@pytest.mark.parametrize("kind", ["coco", *(pytest.param(k, marks=pytest.mark.slow) for k in CORRECT if k != "coco")])
def test_pre_labels_are_corrected_read_back_and_trained_on(pre, nano_base, tmp_path, kind):
    convert(pre.index, kind, tmp_path / "desk", progress=False)
    CORRECT[kind](tmp_path / "desk", pre)
    index = build_index(guess_reader(tmp_path / "desk", classes=pre.index.class_names))
    assert not index.problems and [Path(name).name for name in index.names()] == [*map(str, pre.index.names())]
    wanted = corrected(pre)
    if kind == "label_png":
        found = [(name, *mask) for image, name in enumerate(index.names()) for mask in index.masks(image)]
        assert {(name, number): runs.tobytes() for name, number, runs in found} == masks_by_class(wanted)
    else:
        assert objects_of(index) == wanted
        convert(index, kind, tmp_path / "next", progress=False)  # the next round
        assert objects_of(build_index(guess_reader(tmp_path / "next"))) == wanted
    if kind == "coco":
        assert index.image_id.tolist() == pre.index.image_id.tolist()

    rows = [f"{Path(name).name},{'val' if place % 3 == 2 else 'train'}" for place, name in enumerate(index.names())]
    (tmp_path / "desk/split.csv").write_text("\n".join(["image,split", *rows]))
    env = environment(nano_base, tmp_path / "desk", tmp_path / "run")
    trainer = train_here(env, f"dataset.reader=${{dataset.readers.{kind}}}", "scratch.steps=2")
    read = trainer.train_dataset.datasets[0].dataset.video_dataset.index  # of both splits
    assert read.digest() == index.digest()
    assert (tmp_path / "run/adapters/final/adapter_model.safetensors").is_file()
