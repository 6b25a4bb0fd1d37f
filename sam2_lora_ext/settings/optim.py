"""The rows of the optimizer, its schedules and gradient clipping."""

import math
from collections.abc import Mapping
from typing import Any

from sam2_lora_ext.settings.containers import ListOf, Nullable, Part, Section, either
from sam2_lora_ext.settings.kinds import Flag, Number, one_of

RATE = Number(0, 100)  # a learning rate or a weight decay somewhere in its schedule


def whole_schedule(section: Mapping[str, Any]) -> str | None:
    """The parts of a schedule cover the whole training."""
    lengths, count = section["lengths"], len(section["schedulers"])
    scaling = section.get("interval_scaling")
    if len(lengths) != count or isinstance(scaling, list) and len(scaling) != count:
        given = f"{len(lengths)} and {len(scaling or lengths)}"
        return f"{count} schedulers need as many lengths and interval_scaling, got {given}"
    if not math.isclose(sum(lengths), 1, abs_tol=1e-6):
        return f"lengths are shares of the training that sum to 1, got {lengths}"
    return None


SCHEDULER = "fvcore.common.param_scheduler"
BETA = Number(0, 1, below=True)
SCALING = one_of("rescaled", "fixed")
PAIR = {"start_value": RATE.called("scratch.lr"), "end_value": RATE.called("scratch.lr")}

TARGETS = {
    "torch.optim.AdamW": Section(
        {
            "lr": RATE,
            "betas": ListOf(BETA, least=2, most=2),
            "eps": Number(0, 1),
            "weight_decay": RATE,
            "amsgrad": Flag(),
            "maximize": Flag(),
            "capturable": Flag(),
            "differentiable": Flag(),
            "foreach": Nullable(Flag()),
            "fused": Nullable(Flag()),
        }
    ),
    "training.optimizer.GradientClipper": Section(
        {
            "max_norm": Number(0, 1e6, above=True),
            "norm_type": Number(0, 100, above=True),
        }
    ),
    "training.optimizer.ValueScaler": Section(
        {
            "scheduler": Part(),
            "mult_val": Number(0, 1e6, above=True).called("scratch.lr_ratio"),
        },
        required=("scheduler", "mult_val"),
    ),
    f"{SCHEDULER}.LinearParamScheduler": Section(PAIR, required=tuple(PAIR)),
    f"{SCHEDULER}.CosineParamScheduler": Section(PAIR, required=tuple(PAIR)),
    f"{SCHEDULER}.ConstantParamScheduler": Section({"value": RATE}, required=("value",)),
    f"{SCHEDULER}.CompositeParamScheduler": Section(
        {
            "schedulers": ListOf(Part(), least=1),
            "lengths": ListOf(Number(0, 1), least=1),
            "interval_scaling": either(SCALING, ListOf(SCALING, least=1)),
        },
        required=("schedulers", "lengths"),
        rules=(whole_schedule,),
    ),
}
