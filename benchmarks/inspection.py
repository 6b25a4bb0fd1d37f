"""Compares class prompts with networks without prompts, on real steel and on synthetic strips.

    python -m benchmarks.inspection [--data neu synthetic] [--rows k8 samed unet_r34 ...] [--seeds 0] [--steps 150]

All rows have the same images, batches, steps, tiles and threshold fitting. SAM 2 is the small model. The decision is
fitted to validation images only; the results are on test images that are used for nothing else. Finished rows with the
same settings are skipped, so the command can be stopped and resumed. Writes inspection.json and inspection.md to --out.
NEU-Seg is split as in `benchmarks.quality`; it has no clean images, so only the synthetic strips measure false alarms.
"""

from sam2_lora_ext.utils.command_line import catch_interrupts, run_cli
from sam2_lora_ext.utils.errors import UserError

if __name__ == "__main__":
    catch_interrupts()  # before the slow imports

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from hydra.utils import instantiate
from tqdm import tqdm

from benchmarks import pretraining, rivals
from benchmarks.quality import BASE, ROOT, write_split
from sam2_lora_ext.data.source import Source, from_config
from sam2_lora_ext.data.splits import write_split as write_parts
from sam2_lora_ext.data.synthetic import write_strips
from sam2_lora_ext.host.compose import load
from sam2_lora_ext.inspection.evaluation import InspectionTally
from sam2_lora_ext.inspection.fitting import fit_decision, look_at
from sam2_lora_ext.inspection.segmenter import Segmenter, load_segmenter
from sam2_lora_ext.inspection.strips import TrueStrips
from sam2_lora_ext.settings.arguments import COUNT, number
from sam2_lora_ext.utils.files import write_json

TOKENS = "trainer.model.class_prompts.tokens"
OURS = {
    **{f"k{count}": [f"{TOKENS}={count}"] for count in (1, 4, 8, 16)},
    "k8_no_lora": [
        f"{TOKENS}=8",
        "lora.targets=[]",
        "trainer.checkpoint.model_weight_initializer.ignore_missing_keys=null",
    ],
    "k8_decoder": [  # trains the whole decoder instead of its LoRA
        "lora.targets=[image_encoder.trunk.blocks.*.attn.qkv,image_encoder.trunk.blocks.*.attn.proj]",
        "lora.trainable=[sam_mask_decoder]",
    ],
    "k8_absent": ["trainer.loss.severstal.absent_focal=0.1"],
    "k8_tversky": ["++trainer.loss.severstal.weight_dict.loss_tversky=1"],
}
RIVALS = {**dict.fromkeys(rivals.SAMS, 3e-3), **dict.fromkeys(rivals.CNNS, 1e-3)}  # row: learning rate
IMAGENET = {"unet_r34_imagenet": "unet_r34", "fpn_r34_imagenet": "fpn_r34"}
SHAPES = {"unet_r34_shapes": "unet_r34"}  # pretrained on the same images as the small SAM 2
ROWS = (*OURS, *RIVALS, *IMAGENET, *SHAPES)
CONFIGS = {"neu": "neu_seg_classes.yaml", "synthetic": "synthetic_classes.yaml"}
STRIPS, CUT = 400, (240, 320)  # synthetic strips: 240 for training, 80 for validation, 80 for test
NANO = "the small SAM 2: synthetic shapes, 8,000 steps"
SHOWN = {
    "macro_dice": "macro Dice",
    "dice_present": "Dice, present",
    "kaggle_dice": "Kaggle Dice",
    "kaggle_dice_empty": "of an empty submission",
    "recall": "recall",
    "false_alarms": "false alarms",
    "false_alarms_at_recall_95": "at 95 % recall",
    "image_auroc": "AUROC",
    "ms_per_strip": "ms",
}


class Data(NamedTuple):
    """A data set: its training config, the config's overrides, and the source of validation and test images."""

    config: str
    overrides: list[str]
    source: Source


def prepare(name: str, folder: Path, real: Path) -> Data:
    """Writes the split and the synthetic strips if they are missing, and returns the data set."""
    folder.mkdir(parents=True, exist_ok=True)
    config, split = str(ROOT / "benchmarks" / CONFIGS[name]), folder / "split.csv"
    root = real if name == "neu" else folder
    if name == "neu" and not (real / "images").is_dir():
        raise UserError(f"there is no folder {real}/images: give NEU-Seg's training part with --neu")
    if not split.exists() and name == "neu":
        write_split(real, split)
    elif not split.exists():
        write_strips(folder, STRIPS, seed=7)
        names = sorted(path.name for path in (folder / "train_images").iterdir())
        parts = ["train"] * CUT[0] + ["val"] * (CUT[1] - CUT[0]) + ["test"] * (STRIPS - CUT[1])
        write_parts(split, names, parts)
    overrides = [f"dataset.root={root}", f"dataset.split_file={split}"]
    os.environ["SAM2_LORA_NANO"] = str(BASE)
    return Data(config, overrides, from_config(config, overrides))


def train_ours(run: Path, data: Data, settings: list[str]) -> tuple[Segmenter, int]:
    """The segmenter and number of trained parameters of a run of SAM 2's launcher, started unless it is finished."""
    command = [sys.executable, "-m", "sam2_lora_ext.train", "-c", data.config, *data.overrides, *settings]
    if not (run / "training_summary.json").exists():
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir(parents=True, exist_ok=True)
        with open(run / "train.log", "w") as log:
            done = subprocess.run(
                [*command, f"launcher.experiment_log_dir={run}"], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
            )
        if done.returncode:
            raise UserError(f"the training of {run.name} failed: see {run / 'train.log'}")
    trained = json.loads((run / "training_summary.json").read_text())["parameters"]["trained"]
    return load_segmenter(None, run, base=BASE, device="cpu", overlap=overlap_of(data)), trained


def train_rival(
    row: str, data: Data, settings: list[str], steps: int, seed: int, shapes: Path
) -> tuple[Segmenter, int]:
    """`train_ours` for a network without prompts, on the same batches; `shapes` is the file of its pretraining."""
    trainer = load(data.config, [*data.overrides, *settings])["trainer"]
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    classes = {k: name for k, name in trainer["model"]["class_prompts"]["classes"].items() if name is not None}
    kind = (IMAGENET | SHAPES).get(row, row)
    if kind in rivals.CNNS:
        network = rivals.make_cnn(kind, len(classes), imagenet=row in IMAGENET)
    else:
        network = rivals.make_sam(kind, trainer, len(classes))
    if row in SHAPES:
        before = rivals.make_cnn(kind, 1)
        pretraining.pretrain(before, shapes)
        pretraining.copy_body(before, network)
    dataset = instantiate(trainer["data"]["train"], _convert_="all")
    phases = -(-steps // trainer["data"]["train"]["steps_per_phase"])
    batches = (batch for phase in range(phases) for batch in dataset.get_loader(phase))
    rivals.train(network, tqdm(batches, desc=row, unit="step", total=steps), sorted(classes), steps, RIVALS[kind])
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    crop, size = data.source.crop or 200, trainer["model"]["image_size"]
    return rivals.as_segmenter(network, classes, crop, size, overlap_of(data)), trained


def overlap_of(data: Data) -> int | None:
    """The overlap of tiles in columns, 0 for NEU-Seg, whose images are one tile; None for the default."""
    return None if data.source.format == "KaggleReader" else 0


def measure(segmenter: Segmenter, data: Data, words: str) -> dict[str, Any]:
    """Fits the decision to the validation images, and evaluates on the test images."""
    names = segmenter.prompts.class_names
    parts = {part: TrueStrips(replace(data.source, split=part), segmenter.prompts) for part in ("val", "test")}
    fit = fit_decision(look_at(segmenter, tqdm(parts["val"], desc=f"{words}: val", unit="image")), names)
    segmenter.decision = fit.decision
    tally = InspectionTally(names, fit.decision)
    for strip in tqdm(parts["test"], desc=f"{words}: test", unit="image"):
        began = time.perf_counter()
        found = segmenter(strip.image)
        tally.add(strip.name, found, strip.truth, time.perf_counter() - began)
    return tally.summary() | {"notes": list(fit.notes)}


def starting_weights(row: str) -> str:
    """The pretraining of a row's network, for the table."""
    if row in IMAGENET:
        return "ImageNet"
    if row in SHAPES:
        return f"the same shapes, {pretraining.STEPS} steps"
    return "none" if row in rivals.CNNS else NANO


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table for each data set: the mean over seeds, and the range if there are several."""
    text = ""
    for data in dict.fromkeys(row["data"] for row in rows):
        text += f"\n{data}\n\n| row | pretraining | steps | seeds | trained | " + " | ".join(SHOWN.values()) + " |\n"
        text += "|---" * (5 + len(SHOWN)) + "|\n"
        mine = [row for row in rows if row["data"] == data]
        for name, steps in dict.fromkeys((row["row"], row["steps"]) for row in mine):
            same = [row for row in mine if (row["row"], row["steps"]) == (name, steps)]
            facts = [name, starting_weights(name), steps, len(same), f"{same[0]['trained']:,}"]
            cells = [*map(str, facts), *(cell([row["result"][key] for row in same], key) for key in SHOWN)]
            text += f"| {' | '.join(cells)} |\n"
    return text


def cell(values: list[Any], key: str) -> str:
    """`0.512 (0.490 to 0.530)`, the range over seeds; with one seed `0.512 [0.490, 0.530]`, the bootstrap interval."""
    means = [value["mean"] if isinstance(value, dict) else value for value in values]
    if None in means:
        return "-"
    digits = 0 if key == "ms_per_strip" else 3
    text = f"{sum(means) / len(means):.{digits}f}"
    if len(means) > 1:
        return f"{text} ({min(means):.{digits}f} to {max(means):.{digits}f})"
    return text + (f" [{values[0]['low']:.3f}, {values[0]['high']:.3f}]" if isinstance(values[0], dict) else "")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the missing rows and prints the tables."""
    default = Path(os.environ.get("SAM2_LORA_REAL_DATA", ROOT / "../shared/data")) / "neu_seg"
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--neu", type=Path, default=default, help="NEU-Seg: images/ and annotations/")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/inspection")
    parser.add_argument("--data", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[*OURS, *RIVALS, *SHAPES])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=number(COUNT), default=300)
    args = parser.parse_args(argv)
    out = args.out.resolve()
    file = out / "inspection.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    for name in args.data:
        data = prepare(name, out / name, args.neu.resolve())
        for seed in args.seeds:
            for row in args.rows:
                key = {"data": name, "row": row, "seed": seed, "steps": args.steps}
                if any(key.items() <= old.items() for old in rows):
                    continue
                words = f"{name} {row} seed {seed}"
                settings = [f"scratch.steps={args.steps}", f"trainer.seed_value={seed}", *OURS.get(row, [])]
                run = out / name / f"{row}_{args.steps}_{seed}"
                segmenter, trained = (
                    train_ours(run, data, settings)
                    if row in OURS
                    else train_rival(row, data, settings, args.steps, seed, out / f"{row}.pt")
                )
                rows.append(key | {"trained": trained, "result": measure(segmenter, data, words)})
                write_json(file, rows)
                (out / "inspection.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    run_cli(main)
