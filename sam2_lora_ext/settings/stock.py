"""The rows of the Trainer (this package's and SAM 2's), its loggers and the loading of its weights."""

from collections.abc import Iterator, Mapping
from typing import Any

from sam2_lora_ext.settings.containers import INSIDE, ListOf, MapOf, Nullable, Part, Section
from sam2_lora_ext.settings.data import PATH, SEED
from sam2_lora_ext.settings.kinds import Flag, Number, Text, Whole, one_of

NAME = Text(longest=300)
HALF = one_of("bfloat16", "float16")
LEVEL = one_of("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def seed_fits(section: Mapping[str, Any]) -> str | None:
    """SAM 2's Trainer seeds numpy, which takes 32 bits, with (seed + rank) * max_epochs."""
    seed, epochs = section.get("seed_value", 123), section.get("max_epochs") or 1
    if (seed + 1024) * epochs >= 2**32:
        return f"seed_value times max_epochs must stay below 2^32, got {seed} and {epochs}"
    return None


def trains_on_something(section: Mapping[str, Any]) -> str | None:
    """Everything that the mode needs is set."""
    mode, data = section.get("mode", "train"), section["data"]
    if mode != "val":
        missing = [name for name in ("optim", "loss") if not section.get(name)]
        if missing or not data.get("train"):
            return f"{(*missing, 'data.train')[0]} must be set for training"
    if mode != "train_only" and not data.get("val"):
        return "data.val must be set for validation; set mode: train_only to train without validation"
    return None


def parts_of(tree: Any, ending: str) -> Iterator[Mapping[str, Any]]:
    """All parts in a section whose `_target_` ends with `ending`."""
    if isinstance(tree, Mapping):
        if str(tree.get("_target_", "")).endswith(ending):
            yield tree
        for entry in tree.values():
            yield from parts_of(entry, ending)
    elif isinstance(tree, list):
        for entry in tree:
            yield from parts_of(entry, ending)


def one_resolution(section: Mapping[str, Any]) -> str | None:
    """Images are resized to the model's input size."""
    size = section["model"].get("image_size")
    for part in parts_of(section["data"], "pixels.ModelInput"):
        if size is not None and part["size"] != size:
            made = f"the data is resized to {part['size']} pixels"
            return f"model.image_size is {size}, but {made}; set only scratch.resolution"
    return None


def frames_suffice(section: Mapping[str, Any]) -> str | None:
    """A clip has at least as many frames as are corrected; a single image is corrected on its only frame."""
    for phase, suffix in (("train", "train"), ("val", "eval")):
        wanted = section["model"].get(f"num_frames_to_correct_for_{suffix}", 1)
        for part in parts_of(section["data"].get(phase), "sampler.ObjectSampler"):
            if 1 < (part.get("num_frames", 1) or wanted) < wanted:
                clip = f"a clip has {part['num_frames']} frames"
                return f"model.num_frames_to_correct_for_{suffix} is {wanted}, but {clip}"
    return None


OPTION = Section(
    {
        "scheduler": Part(),
        "param_names": Nullable(ListOf(NAME)),
        "module_cls_names": Nullable(ListOf(NAME)),
    },
    required=("scheduler",),
)
OPTIM = Section(
    {
        "optimizer": Part(),
        "options": Nullable(MapOf(NAME, ListOf(OPTION, least=1))),
        "param_group_modifiers": Nullable(ListOf(Part())),
        "amp": Nullable(Section({"enabled": Flag(), "amp_dtype": HALF})),
        "gradient_clip": Nullable(Part()),
        "gradient_logger": Nullable(Part()),
    }
)
LOGGING = Section(
    {
        "log_dir": PATH,
        "log_freq": Whole(1),
        "tensorboard_writer": Nullable(Part()),
        "log_level_primary": LEVEL,
        "log_level_secondary": LEVEL,
        "log_scalar_frequency": Whole(1),
        "log_visual_frequency": Whole(1),
        "scalar_keys_to_log": Nullable(MapOf(NAME, INSIDE)),
        "log_batch_stats": Flag(),
    },
    required=("log_dir", "log_freq", "tensorboard_writer"),
)
CHECKPOINT = Section(
    {
        "save_dir": PATH,
        "save_freq": Whole(0),
        "save_list": ListOf(Whole(0)),
        "model_weight_initializer": Nullable(Part()),
        "save_best_meters": Nullable(ListOf(NAME)),
        "skip_saving_parameters": ListOf(NAME),
        "initialize_after_preemption": Nullable(Flag()),
        "resume_from": Nullable(PATH),
    },
    required=("save_dir", "save_freq"),
)
STOCK = {
    "data": Section({"train": Nullable(Part()), "val": Nullable(Part())}),
    "model": Part(),
    "logging": LOGGING,
    "checkpoint": CHECKPOINT,
    "max_epochs": Whole(1, 10**6),
    "mode": one_of("train", "train_only", "val"),
    "accelerator": one_of("cuda", "cpu"),
    "seed_value": SEED,
    "val_epoch_freq": Whole(1, 10**6),
    "distributed": Nullable(
        Section(
            {
                "backend": Nullable(one_of("nccl", "gloo")),
                "comms_dtype": Nullable(HALF),
                "find_unused_parameters": Flag(),
                "timeout_mins": Whole(1, 10**6),
            }
        )
    ),
    "cuda": Nullable(
        Section(
            dict.fromkeys(("cudnn_deterministic", "cudnn_benchmark", "allow_tf32"), Flag())
            | dict.fromkeys(("matmul_allow_tf32", "cudnn_allow_tf32"), Nullable(Flag()))
        )
    ),
    "env_variables": Nullable(MapOf(NAME, Text(empty=True, longest=100_000))),
    "optim": Nullable(OPTIM),
    "optim_overrides": Nullable(ListOf(INSIDE)),
    "meters": Nullable(MapOf(NAME, Nullable(MapOf(NAME, Nullable(MapOf(NAME, Part())))))),
    "loss": Nullable(MapOf(NAME, Part())),
}
OURS = {
    "run_dir": PATH.called("launcher.experiment_log_dir"),
    "model_config": Nullable(PATH),
    "monitor": NAME,
    "monitor_mode": one_of("max", "min"),
    "early_stop": Nullable(Section({"patience": Whole(1), "min_delta": Number(0, 1e6)})),
    "metrics_every": Whole(1),
    "export": Nullable(Section({"merged": Flag(), "flat_files": Flag()})),
    "keep_previous": Whole(0, 1),
    "resume_with_changes": Flag(),
    "max_epochs": Nullable(STOCK["max_epochs"]),
}
WRITER = {
    "log_dir": PATH,
    "flush_secs": Whole(1, 10**6),
    "should_log": Flag(),
    "max_queue": Whole(1),
    "comment": Text(empty=True),
    "filename_suffix": Text(empty=True, longest=200),
    "purge_step": Nullable(Whole(0)),
    "log_every": Whole(1),
}
NOTED = {"name": Nullable(NAME), "params": Nullable(MapOf(NAME, INSIDE))}
TARGETS = {
    "sam2_lora_ext.trainer.LoRATrainer": Section(
        {**STOCK, **OURS},
        required=("run_dir", "data", "model", "logging", "checkpoint"),
        rules=(seed_fits, trains_on_something, one_resolution, frames_suffice),
    ),
    "training.trainer.Trainer": Section(
        STOCK, required=("data", "model", "logging", "checkpoint", "max_epochs"), rules=(seed_fits, trains_on_something)
    ),
    "training.utils.logger.make_tensorboard_logger": Section(WRITER, required=("log_dir",)),
    "sam2_lora_ext.trackers.make_wandb_logger": Section(
        {
            **WRITER,
            **NOTED,
            "project": NAME,
            "mode": one_of("online", "offline", "disabled"),
            "entity": Nullable(NAME),
        },
        required=("log_dir", "project"),
    ),
    "sam2_lora_ext.trackers.make_mlflow_logger": Section(
        {
            **WRITER,
            **NOTED,
            "experiment": NAME,
            "uri": Nullable(Text()),
        },
        required=("log_dir", "experiment"),
    ),
    "training.utils.checkpoint_utils.load_state_dict_into_model": Section(
        {
            "strict": Flag(),
            "ignore_missing_keys": Nullable(ListOf(NAME)),
            "ignore_unexpected_keys": Nullable(ListOf(NAME)),
            "state_dict": Part(),
            "checkpoint_kernels": Nullable(ListOf(Part())),
        },
        required=("state_dict",),
    ),
    "training.utils.checkpoint_utils.load_checkpoint_and_apply_kernels": Section(
        {
            "checkpoint_path": PATH,
            "checkpoint_kernels": Nullable(ListOf(Part())),
            "ckpt_state_dict_keys": ListOf(NAME),
            "map_location": Text(longest=100),
        },
        required=("checkpoint_path",),
    ),
}
