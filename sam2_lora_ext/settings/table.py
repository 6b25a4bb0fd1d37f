"""The table of all settings: the sections of a config, and by `_target_` the objects that Hydra builds from it.

The rows are in `readers.py`, `data.py`, `class_data.py`, `model.py`, `stock.py` and `optim.py`.
"""

from sam2_lora_ext.settings import class_data, data, model, optim, readers, stock
from sam2_lora_ext.settings.containers import ListOf, Nullable, Part, Section
from sam2_lora_ext.settings.kinds import Flag, Number, Text, Whole

NAME = Nullable(Text(longest=300))
ROWS = (readers, data, class_data, model, stock, optim)
TARGETS = {target: section for rows in ROWS for target, section in rows.TARGETS.items()}
SCRATCH = Section(
    {
        "resolution": data.RESOLUTION,
        "crop_width": data.CROP,
        "batch_size": data.BATCH,
        "max_num_objects": Nullable(Whole(1)),
        "num_workers": data.WORKERS,
        "num_frames": data.FRAMES,
        "reverse_time_prob": data.SHARE,
        "steps": data.STEPS,
        "epochs": data.EPOCHS,
        "steps_per_phase": Whole(1),
        "lr": Number(0, 100, above=True),
        "lr_ratio": Number(0, 1e6, above=True),
        "token_lr": Number(0, 100, above=True),
        "lr_schedule": Part(),
        "weight_decay": optim.RATE,
        "clean_share": Nullable(Number(0, 1, below=True)),
        "window_stride": Whole(1, data.PIXELS),
    },
    rules=(data.one_length,),
)
DATASET = Section({**data.DATASET.rows, "class_prompts": Nullable(class_data.CLASS_PROMPTS)})
VOS = Section({**data.VOS.rows} | {f"class_{name}": row for name, row in data.VOS.rows.items()})
LAUNCHER = Section(
    {
        "num_nodes": Whole(1, 10_000),
        "gpus_per_node": Whole(1, 1024),
        "experiment_log_dir": Nullable(Text()),
    }
)


def ports(section) -> str | None:
    """The range of ports is not empty."""
    low, high = section.get("port_range", (1, 1))
    return f"port_range begins with {low}, above its end {high}" if low > high else None


SUBMITIT = Section(
    {
        "partition": NAME,
        "account": NAME,
        "qos": NAME,
        "cpus_per_task": Whole(1, 10_000),
        "use_cluster": Flag(),
        "timeout_hour": Whole(1, 100_000),
        "name": NAME,
        "port_range": ListOf(Whole(1, 65535), least=2, most=2),
        "mem_gb": Nullable(Number(0, 1e6, above=True)),
        "mem": NAME,
        "constraints": NAME,
        "comment": NAME,
        "exclude_nodes": ListOf(Text(longest=300)),
        "include_nodes": ListOf(Text(longest=300)),
        "srun_args": Nullable(Section({"cpu_bind": NAME})),
    },
    required=("port_range",),
    rules=(ports,),
)
SECTIONS = {  # in this order, so that an error has the name that a user knows
    "scratch": SCRATCH,
    "dataset": DATASET,
    "lora": Nullable(model.LORA),
    "vos": VOS,
    "launcher": LAUNCHER,
    "submitit": SUBMITIT,
}
USERS = ("scratch", "dataset", "vos")
"""Sections in which a user may add keys, if something in the config reads them."""
