"""The share of full fine-tuning's gain that LoRA recovers on real steel: NEU-Seg, the small SAM 2, the same Trainer \
and steps for all.

    python -m benchmarks.quality [--data FOLDER] [--steps 300] [--methods lora_r8 full ...]

Trains each method on 1,500 images with SAM 2's Trainer and evaluates it on 300 others, which were used for no decision,
through the stock predictor. Finished methods with the same settings are skipped. Needs about 40 minutes on two cores.
Writes quality.json, quality.md and quality.png into --out.
"""

from sam2_lora_ext.utils.command_line import catch_interrupts, run_cli
from sam2_lora_ext.utils.errors import UserError

if __name__ == "__main__":
    catch_interrupts()  # before the slow imports

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image
from sam2.build_sam import build_sam2
from tqdm import tqdm

from benchmarks.quality_report import draw, table
from sam2_lora_ext.adapters.peft import load_adapter
from sam2_lora_ext.data.dataset import SeverstalRawDataset
from sam2_lora_ext.data.duplicates import difference_hash, equal_pairs, groups, near_pairs, thumbnail
from sam2_lora_ext.data.label_png import LabelPNGReader
from sam2_lora_ext.evaluate.bootstrap import bootstrap_interval
from sam2_lora_ext.evaluate.predictor import Row, averages, evaluate, read_samples
from sam2_lora_ext.lora.adapter_state import attach_adapter
from sam2_lora_ext.settings.arguments import COUNT, number
from sam2_lora_ext.utils.csv_text import csv_text
from sam2_lora_ext.utils.files import write_json

ROOT = Path(__file__).resolve().parent.parent
CONFIG, BASE = "configs/sam2_nano.yaml", ROOT / "assets/sam2_nano.pt"
DECODER = (
    "[sam_mask_decoder.transformer.*.q_proj,sam_mask_decoder.transformer.*.k_proj,"
    "sam_mask_decoder.transformer.*.v_proj,sam_mask_decoder.transformer.*.out_proj,"
    "sam_mask_decoder.transformer.*.mlp.layers.*]"
)
ALL = (
    DECODER[:-1] + ",sam_mask_decoder.output_hypernetworks_mlps.*.layers.*,image_encoder.trunk.blocks.*.attn.qkv,"
    "image_encoder.trunk.blocks.*.attn.proj,image_encoder.trunk.blocks.*.mlp.layers.*]"
)
NO_ADAPTERS = "trainer.checkpoint.model_weight_initializer.ignore_missing_keys=null"
METHODS = {
    "base": None,
    "lora_r4": ["lora.rank=4", "lora.alpha=8"],
    "lora_r8": [],
    "lora_r16": ["lora.rank=16", "lora.alpha=32"],
    "all_r8": [f"lora.targets={ALL}"],  # as in configs/severstal_lora_all.yaml
    "decoder_r8": [f"lora.targets={DECODER}"],
    "norms": [  # as in configs/severstal_norms.yaml
        "lora.targets=[]",
        "lora.trainable=[image_encoder.trunk.blocks.*.norm*,sam_mask_decoder.transformer.*norm*]",
        NO_ADAPTERS,
    ],
    "full": ["lora=null", "scratch.lr=5e-4", "trainer.distributed.find_unused_parameters=true", NO_ADAPTERS],
}
SEED, TRAIN, TEST, VAL = 20, 1500, 300, 60


def distinct_images(folder: Path) -> list[str]:
    """The names of a folder's images in order, one of each group of exact or near duplicates, so that none is in two
    splits."""
    paths = sorted(folder.iterdir())
    hashes, thumbnails, digests = [], [], []
    for path in tqdm(paths, desc="duplicates", unit="image"):
        with Image.open(path) as image:
            hashes.append(difference_hash(image))
            thumbnails.append(thumbnail(image))
            digests.append(hashlib.sha256(image.tobytes()).digest())
    group = groups(len(paths), near_pairs(np.array(hashes), np.array(thumbnails)), equal_pairs(digests))
    firsts = np.unique(group, return_index=True)[1]
    return [paths[position].name for position in sorted(firsts)]


def write_split(data: Path, file: Path) -> None:
    """Writes a split: 1,500 images to train on, 60 for the curves, 300 to report on, drawn from a fixed seed."""
    names = distinct_images(data / "images")
    if len(names) < TRAIN + TEST + VAL:
        raise UserError(
            f"{data}/images holds {len(names)} images, but {TRAIN + TEST + VAL} are needed: "
            "give NEU-Seg's training part"
        )
    chosen = [names[i] for i in np.random.default_rng(SEED).permutation(len(names))[: TRAIN + TEST + VAL]]
    parts = ["train"] * TRAIN + ["test"] * TEST + ["val"] * VAL
    file.write_text(csv_text(["image", "split"], zip(chosen, parts, strict=True)), encoding="utf-8")


def train(run: Path, overrides: Sequence[str], data: Path, split: Path, steps: int) -> None:
    """Trains one run with SAM 2's launcher; a finished run with the same settings is skipped."""
    command = [sys.executable, "-m", "sam2_lora_ext.train", "-c", "neu_seg_nano", f"scratch.steps={steps}", *overrides]
    stamp = run / "command.json"
    if (run / "training_summary.json").exists() and stamp.exists() and json.loads(stamp.read_text()) == command[1:]:
        return
    if run.exists():
        raise UserError(f"{run} holds a run with other settings or an unfinished one: remove it, or give another --out")
    environment = {**os.environ, "NEU_SEG_ROOT": str(data), "NEU_SEG_SPLIT": str(split), "SAM2_LORA_NANO": str(BASE)}
    run.mkdir(parents=True)
    write_json(stamp, command[1:])
    with open(run / "train.log", "w") as log:
        process = subprocess.run(
            [*command, f"launcher.experiment_log_dir={run}"],
            env=environment,
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    if process.returncode:
        raise UserError(f"the training of {run.name} failed: see {run / 'train.log'}")


def measure(method: str, run: Path, samples: list) -> dict:
    """The row of one method, from the weights after its last step."""
    facts = {"trained": 0, "total": 0}
    whole = run / "weights/final.pt"  # for a method without adapters
    weights = whole if whole.exists() else BASE
    model = build_sam2(CONFIG, str(weights), device="cpu", apply_postprocessing=False)
    size = 0
    if method != "base":
        facts = json.loads((run / "training_summary.json").read_text())["parameters"]
        file = whole if whole.exists() else run / "adapters/final/adapter_model.safetensors"
        size = file.stat().st_size
        if not whole.exists():
            attach_adapter(model, load_adapter(run / "adapters/final"))
    rows = evaluate(model, tqdm(samples, desc=f"evaluating {method}", unit="image"))
    return {
        "method": method,
        **averages(rows),
        **intervals(rows),
        "params_trained": facts["trained"],
        "checkpoint_bytes": size,
        "objects": len(rows),
        "rows": [asdict(row) for row in rows],
    }


def intervals(rows: Sequence[Row]) -> dict[str, list[float]]:
    """95 % bootstrap intervals by image, for IoU."""

    def area_iou(counts: Sequence[int]) -> float:
        return counts[0] / max(counts[1] + counts[2] - counts[0], 1)

    groups = [row.name for row in rows]
    values = {
        "iou_1click": [area_iou(row.by_clicks[0]) for row in rows],
        "iou_8clicks": [area_iou(row.by_clicks[-1]) for row in rows],
        "iou_box": [area_iou(row.by_box) for row in rows],
    }
    return {f"{name}_ci95": list(bootstrap_interval(column, groups)) for name, column in values.items()}


def main(argv: Sequence[str] | None = None) -> None:
    default = Path(os.environ.get("SAM2_LORA_REAL_DATA", ROOT / "../shared/data")) / "neu_seg"
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=default, help="NEU-Seg: images/ and annotations/")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/quality")
    parser.add_argument("--steps", type=number(COUNT), default=300)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    args = parser.parse_args(argv)
    data, out = args.data.resolve(), args.out.resolve()
    if not (data / "images").is_dir():
        raise UserError(f"there is no folder {data}/images: give NEU-Seg's training part with --data")
    out.mkdir(parents=True, exist_ok=True)
    split = out / "split.csv"
    write_split(data, split)
    reader = LabelPNGReader(data / "images", data / "annotations", classes=3)
    dataset = SeverstalRawDataset(
        reader, training=False, split_file=split, split="test", min_area=16, include_clean=False
    )
    samples = list(read_samples(dataset, None))
    rows = []
    for method in tqdm(args.methods, desc="methods", unit="method"):
        if METHODS[method] is not None:
            train(out / method, METHODS[method], data, split, args.steps)
        rows.append(measure(method, out / method, samples))
        write_json(out / "quality.json", rows)
    text = table(rows)
    (out / "quality.md").write_text(text)
    draw(rows, out, out / "quality.png")
    print(f"{text}\nwritten {out}/quality.json, quality.md, quality.png")


if __name__ == "__main__":
    run_cli(main)
