"""Checks class prompts: whether model and data agree, whether the validation is complete, and a step of each kind."""

from collections.abc import Iterator
from typing import Any

from sam2_lora_ext.class_prompts.agreement import check_rates, check_tokens, shortcomings
from sam2_lora_ext.data.class_validation import ClassTiles
from sam2_lora_ext.doctor.findings import Finding, green, yellow
from sam2_lora_ext.doctor.training import Training, find_with
from sam2_lora_ext.lora.class_tokens import find_tokens

AREA = "class prompts"


def check_classes(training: Training) -> Iterator[Finding]:
    """Whether model and data agree on the classes and the width of windows; no finding without class prompts.

    Raises:
        UserError: they do not agree, with the same message as in training.
    """
    tokens, steps, val = find_tokens(training.model), class_steps(training), training.trainer["data"].get("val") or {}
    check_rates((training.trainer.get("optim") or {}).get("options"), training.model)
    tiles = None
    if "tile_width" in val and training.data.built["val"]:
        tiles = ClassTiles(training.data.built["val"][0], val["tile_width"], val["overlap"], ())
    check_tokens(tokens, [raw for built in training.data.built.values() for raw in built], steps, tiles)
    if tokens is None:
        return
    if steps is None:
        yield yellow(AREA, "no step trains the class prompts", "set dataset.class_prompts.share above 0")
        return
    table = ", ".join(f"{number} {name}" for number, name in zip(tokens.class_ids, tokens.class_names, strict=True))
    said = f"{tokens.tokens.shape[1]} tokens each for {table}; {steps.share:.0%} of the steps train them"
    yield green(AREA, f"{said}, {steps.corrections:.0%} of these with correction clicks")
    for sentence in shortcomings(tiles) if tiles is not None else ():
        yield yellow(AREA, sentence, "check the split")


def check_steps(training: Training) -> Iterator[Finding]:
    """Runs a class step and a class step with correction clicks, on one window with all classes."""
    steps = class_steps(training)
    if steps is None or find_tokens(training.model) is None:
        return
    for corrected in (False, True):
        if steps.corrections < 1 if not corrected else steps.corrections > 0:
            what = "a window with class prompts" + (" and correction clicks" if corrected else "")
            yield from training.one_step(class_batch(training, steps, corrected), what)
            yield from _check_reached(training, what)


def _check_reached(training: Training, what: str) -> Iterator[Finding]:
    """Warns of parameters without a gradient, for which DDP waits unless `find_unused_parameters` is set.

    A class step without clicks uses fewer parameters than a click step.
    """
    unused = bool((training.trainer.get("distributed") or {}).get("find_unused_parameters"))
    trained = [(name, value) for name, value in training.model.named_parameters() if value.requires_grad]
    missed = [name for name, value in trained if value.grad is None]
    if missed and not unused and len(missed) < len(trained):
        said = f"{what}: {len(missed)} trained parameters get no gradient, the first is {missed[0]}"
        advice = "with several GPUs set trainer.distributed.find_unused_parameters=true, or freeze these parameters"
        yield yellow("step", said, advice)


def class_steps(training: Training) -> Any:
    """The training's `ClassSteps`; None if the training has no class steps."""
    from hydra.utils import instantiate

    steps = instantiate((training.trainer["data"].get("train") or {}).get("class_steps"), _convert_="all")
    return steps if steps is not None and steps.share > 0 else None


def class_batch(training: Training, steps: Any, corrected: bool) -> Any:
    """A batch of one window; raises a `UserError` if the data has no suitable window."""
    from hydra.utils import instantiate

    conf = training.trainer["data"]["train"]
    dataset = find_with(instantiate(conf["datasets"][0], _convert_="all"), "video_dataset")
    steps.check(dataset)
    place = training.place_with_defect(dataset)
    return instantiate(conf["collate_fn"])([steps.sample(dataset, place, corrected)])
