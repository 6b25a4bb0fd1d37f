"""The rows of `dataset` and `vos`, and of the classes that sample, crop and batch the data.

Pixels and columns in messages are those of the stored image.
"""

from collections.abc import Mapping
from typing import Any

from sam2_lora_ext.settings.containers import ListOf, MapOf, Nullable, Part, Section, either
from sam2_lora_ext.settings.kinds import Flag, Number, Text, Whole, one_of

PIXELS = 1_000_000  # of a side: more than any decoder takes
PATH = Text()
SHARE = Number(0, 1)
SEED = Whole(0, 2**31 - 1)  # numpy takes 32 bits, and SAM 2's Trainer uses the upper ones for phases
OBJECTS = Nullable(one_of("instances", "components", "classes", "all")).called("dataset.objects")
ON_INVALID = one_of("error", "skip").called("dataset.on_invalid")
BITS = Whole(8, 16).called("dataset.bits")
FULL_CHECK = Flag().called("dataset.full_check")
EXIF = Flag().called("dataset.exif")
CLASS = Whole(1, 32767)
CLASS_NAME = Text(longest=300)
CLASSES = Nullable(either(CLASS, ListOf(CLASS_NAME, least=1, most=32767), MapOf(CLASS, CLASS_NAME, most=32767)))
MIN_AREA = Whole(1).called("dataset.min_area")
CLEAN_PART = Nullable(Whole(1, PIXELS)).called("dataset.clean_part_width")
THRESHOLD = Nullable(Number(0, 1, above=True)).called("dataset.class_threshold")
MAX_OBJECTS = Nullable(Whole(1)).called("dataset.max_objects")
GROUP_WIDTH = Nullable(Whole(1, PIXELS)).called("dataset.group_width")
CROP = Nullable(Whole(1, PIXELS)).called("scratch.crop_width")
RESOLUTION = Whole(32, 8192, multiple=32).called("scratch.resolution")
FRAMES = Nullable(Whole(1, 10_000)).called("scratch.num_frames")
STEPS = Nullable(Whole(1)).called("scratch.steps")
EPOCHS = Nullable(Number(0, 1e6, above=True)).called("scratch.epochs")
BATCH = Whole(1, 100_000).called("scratch.batch_size")
WORKERS = Whole(0, 1024).called("scratch.num_workers")
LEVELS = ListOf(Number(-1e3, 1e3), least=3, most=3)
SPREADS = ListOf(Number(0, 1e3, above=True), least=3, most=3)


def one_length(section: Mapping[str, Any]) -> str | None:
    """The length of a training is set once."""
    steps, epochs = section.get("steps"), section.get("epochs")
    if (steps is None) == (epochs is None):
        return f"give the length of the training as steps or as epochs, got steps: {steps}, epochs: {epochs}"
    return None


def overlapping(section: Mapping[str, Any]) -> str | None:
    """Windows of a clip must overlap."""
    if section["stride"] >= section["width"]:
        return f"windows must overlap, but the stride {section['stride']} is not below the width {section['width']}"
    return None


def clean_parts(section: Mapping[str, Any]) -> str | None:
    """Settings of clean samples and groups must have an effect and not contradict each other."""
    share, width, training = section.get("clean_share"), section.get("clean_part_width"), section.get("training", True)
    if not training and share is not None:
        return f"clean_share is for training (evaluation uses every clean image once), got {share}"
    if share and section.get("include_clean", True) is False and width is None:
        return f"clean_share is {share}, but include_clean is false and there is no clean_part_width"
    if width is not None and (not share or section.get("windows") is not None):
        return f"clean_part_width needs a clean_share above 0 and no windows, got the share {share}"
    if training and (section.get("max_objects") or section.get("group_width")):
        return "max_objects and group_width are for evaluation (training: false); the sampler has max_num_objects"
    if section.get("group_width") is not None and section.get("windows") is not None:
        return "group_width is for crops, and windows are given: set it to null"
    return None


def whole_strips(section: Mapping[str, Any]) -> str | None:
    """Crops at a grid must cover all columns."""
    if section.get("width") is not None and (section.get("grid") or 1) > section["width"]:
        return (
            f"crops of {section['width']} columns at multiples of {section['grid']} would leave columns out; "
            "lower the grid"
        )
    return None


def evaluates_all(section: Mapping[str, Any]) -> str | None:
    """An evaluation's sampler takes all objects forwards."""
    if section.get("training", True) is False and (section.get("max_num_objects") or section.get("reverse_time_prob")):
        return "an evaluation takes all objects forwards; limit them with the data set's max_objects"
    return None


WINDOWS = Section(
    {"width": Whole(2, PIXELS), "stride": Whole(1, PIXELS), "num_frames": Whole(2, 10_000)},
    required=("width", "stride", "num_frames"),
    rules=(overlapping,),
)
DATASET = Section(
    {
        "root": PATH,
        "split_file": Nullable(PATH),
        "objects": OBJECTS,
        "include_clean": Flag(),
        "on_invalid": ON_INVALID,
        "min_area": MIN_AREA,
        "max_objects": MAX_OBJECTS,
        "group_width": GROUP_WIDTH,
        "windows": Nullable(WINDOWS),
        "class_threshold": THRESHOLD,
        "clean_part_width": CLEAN_PART,
        "full_check": FULL_CHECK,
        "exif": EXIF,
        "bits": BITS,
        "cache_dir": Nullable(PATH),
        "reader": Part(),
        "readers": MapOf(kind=Part()),
    }
)
VOS = Section({"train_transforms": ListOf(Part()), "val_transforms": ListOf(Part())})

DATA = "sam2_lora_ext.data"
TARGETS = {
    f"{DATA}.dataset.SeverstalRawDataset": Section(
        {
            "reader": Part(),
            "training": Flag(),
            "objects": OBJECTS,
            "min_area": MIN_AREA,
            "include_clean": Flag(),
            "clean_share": Nullable(Number(0, 1, below=True)).called("scratch.clean_share"),
            "clean_part_width": CLEAN_PART,
            "split_file": Nullable(PATH).called("dataset.split_file"),
            "split": Nullable(either(Text(longest=300), ListOf(Text(longest=300), least=1))),
            "max_objects": MAX_OBJECTS,
            "group_width": GROUP_WIDTH,
            "windows": Nullable(WINDOWS),
            "on_invalid": ON_INVALID,
            "bits": BITS,
            "cache_dir": Nullable(PATH).called("dataset.cache_dir"),
        },
        required=("reader",),
        rules=(clean_parts,),
    ),
    f"{DATA}.sampler.ObjectSampler": Section(
        {
            "num_frames": FRAMES,
            "max_num_objects": Nullable(Whole(1)).called("scratch.max_num_objects"),
            "training": Flag(),
            "reverse_time_prob": SHARE.called("scratch.reverse_time_prob"),
        },
        rules=(evaluates_all,),
    ),
    f"{DATA}.balance.BalancedVOSDataset": Section(
        {
            "video_dataset": Part(),
            "class_threshold": THRESHOLD,
            "multiplier": Number(0, 1e4, above=True),
            "training": Flag(),
            "sampler": Part(),
            "transforms": ListOf(Part()),
            "always_target": Flag(),
            "target_segments_available": Flag(),
        },
        required=("video_dataset", "sampler", "transforms", "training"),
    ),
    f"{DATA}.phases.PhasedDataset": Section(
        {
            "datasets": ListOf(Part(), least=1, most=1),
            "batch_sizes": ListOf(BATCH, least=1, most=1),
            "num_workers": WORKERS,
            "pin_memory": Flag(),
            "steps": STEPS,
            "epochs": EPOCHS,
            "steps_per_phase": Whole(1).called("scratch.steps_per_phase"),
            "seed": SEED.called("trainer.seed_value"),
            "collate_fn": Nullable(Part()),
            "worker_init_fn": Nullable(Part()),
            "class_steps": Nullable(Part()),
        },
        required=("datasets", "batch_sizes", "num_workers", "pin_memory", "steps_per_phase"),
        rules=(one_length,),
    ),
    f"{DATA}.transforms.RandomStripCrop": Section(
        {
            "width": CROP,
            "height": Nullable(Whole(1, PIXELS)),
            "grid": Nullable(Whole(1, PIXELS)),
        },
        required=("width",),
        rules=(whole_strips,),
    ),
    f"{DATA}.transforms.FixedStripCrop": Section({"width": CROP}, required=("width",)),
    f"{DATA}.transforms.RandomHorizontalFlip": Section({"p": SHARE}),
    f"{DATA}.transforms.RandomVerticalFlip": Section({"p": SHARE}),
    f"{DATA}.pixels.RandomBrightnessContrast": Section({"brightness": SHARE, "contrast": SHARE}),
    f"{DATA}.pixels.ModelInput": Section(
        {
            "size": RESOLUTION,
            "normalise": Flag(),
            "mean": LEVELS,
            "std": SPREADS,
        },
        required=("size",),
    ),
    f"{DATA}.collate.collate_fn": Section(
        {
            "dict_key": Text(longest=100),
            "mean": LEVELS,
            "std": SPREADS,
        },
        required=("dict_key",),
    ),
    "training.dataset.sam2_datasets.TorchTrainMixedDataset": Section(
        {
            "datasets": ListOf(Part(), least=1),
            "batch_sizes": ListOf(Whole(1, 100_000), least=1),
            "num_workers": WORKERS,
            "shuffle": Flag(),
            "pin_memory": Flag(),
            "drop_last": Flag(),
            "collate_fn": Nullable(Part()),
            "worker_init_fn": Nullable(Part()),
            "phases_per_epoch": Whole(1, 10_000),
            "dataset_prob": Nullable(ListOf(SHARE, least=1)),
        },
        required=("datasets", "batch_sizes", "num_workers", "shuffle", "pin_memory", "drop_last"),
    ),
    "training.dataset.vos_dataset.VOSDataset": Section(
        {
            "transforms": ListOf(Part()),
            "training": Flag(),
            "video_dataset": Part(),
            "sampler": Part(),
            "multiplier": Number(0, 1e4, above=True),
            "always_target": Flag(),
            "target_segments_available": Flag(),
        },
        required=("transforms", "training", "video_dataset", "sampler", "multiplier"),
    ),
    "training.dataset.utils.RepeatFactorWrapper": Section({"dataset": Part(), "seed": SEED}, required=("dataset",)),
}
