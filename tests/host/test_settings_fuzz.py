"""Random values for every setting: one sentence, or a config that is recorded exactly and trains or says why not.

`SAM2_LORA_FUZZ_SEED` draws others.
"""

import contextlib
import io
import math
import os
import random
from typing import Any

import pytest
from omegaconf import OmegaConf

from helpers.settings_rows import rows, values, with_value
from helpers.small_runs import environment, rank_environment, train_here
from sam2_lora_ext.host.compose import compose
from sam2_lora_ext.settings import check
from sam2_lora_ext.utils.errors import UserError

SEED = int(os.environ.get("SAM2_LORA_FUZZ_SEED", "20"))


def resolved(name: str, *overrides: str) -> dict[str, Any]:
    with rank_environment({}):
        return OmegaConf.to_container(compose(name, list(overrides)), resolve=True)


def same(a: Any, b: Any) -> bool:
    """Equal in values and types, at all depths."""
    if isinstance(a, dict) and isinstance(b, dict):
        pairs = list(zip(a.items(), b.items()))
        return len(a) == len(b) and all(same(x[0], y[0]) and same(x[1], y[1]) for x, y in pairs)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return type(a) is type(b) and (a == b or isinstance(a, float) and math.isnan(a) and math.isnan(b))


@pytest.mark.parametrize("name", ["configs/demo.yaml", "configs/severstal_lora_video.yaml"])
def test_any_value_is_a_sentence_or_recorded_exactly(name):
    """Each row of the table, with the ends of its range and hostile values, in the config as it is recorded."""
    drawn = random.Random(f"{SEED} {name}")
    config = resolved(name)
    taken = refused = 0
    seen = {place for place, _ in rows(resolved("configs/demo.yaml"))} if name != "configs/demo.yaml" else ()
    for place, kind in rows(config):
        for value in values(kind, drawn, hostile=5) if place not in seen else ():
            changed = with_value(config, place, value)
            try:
                check(changed)
            except UserError as error:
                said = str(error)
                assert "\n" not in said and 20 < len(said) < 1500, (place, value, said)
                refused += 1
                continue
            taken += 1
            text = OmegaConf.to_yaml(OmegaConf.create({"value": value})).encode()
            assert same(OmegaConf.to_container(OmegaConf.create(text.decode()))["value"], value), (place, value, text)
    assert taken > 50 and refused > 100, (taken, refused)


def grammar(value: Any) -> str:
    """A value in Hydra's grammar for overrides."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    if isinstance(value, list):
        return f"[{','.join(map(grammar, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{grammar(key)}: {grammar(entry)}" for key, entry in value.items()) + "}"
    return repr(value)


@pytest.mark.slow
def test_overrides_end_to_end():
    """What a user types: composed, resolved through all interpolations, checked, and written as the launcher does."""
    drawn = random.Random(SEED)
    places = [(place, kind) for place, kind in rows(resolved("configs/demo.yaml")) if 2 <= len(place) <= 4]
    places = [(place, kind) for place, kind in places if not any(isinstance(key, int) for key in place)]
    for place, kind in drawn.sample(places, 25):
        value = drawn.choice(values(kind, drawn, hostile=4))
        try:
            with rank_environment({}):
                config = compose("configs/demo.yaml", [f"++{'.'.join(map(str, place))}={grammar(value)}"])
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 3000
            continue
        plain = OmegaConf.to_container(config, resolve=True)
        recorded = OmegaConf.create(OmegaConf.to_yaml(config, resolve=True))
        assert same(OmegaConf.to_container(recorded), plain), (place, value)


EDGES = {
    "the smallest image": ["scratch.resolution=32", "scratch.crop_width=32"],
    "one column": ["scratch.crop_width=1", "dataset.group_width=1"],
    "the whole strip": ["scratch.crop_width=null", "dataset.group_width=null"],
    "a crop wider than any": ["scratch.crop_width=1000000"],
    "the largest rate": ["scratch.lr=100"],
    "the smallest rate": ["scratch.lr=1e-300"],
    "rank and alpha at an end": ["lora.rank=1", "lora.alpha=1e6", "lora.dropout=0.999999"],
    "a tiny alpha": ["lora.alpha=1e-300", "lora.freeze_a=true", "lora.qkv_parts=[k]"],
    "the largest numbers": [
        "trainer.metrics_every=2147483647",
        "scratch.steps_per_phase=2147483647",
        "dataset.min_area=1",
        "dataset.max_objects=2147483647",
        "scratch.max_num_objects=2147483647",
    ],
    "no strip large enough": ["dataset.min_area=2147483647", "scratch.clean_share=null"],
    "all clean but a few": ["scratch.clean_share=0.99"],
    "a billionth of a pass": ["scratch.steps=null", "scratch.epochs=1e-9"],
    "the largest seed": ["trainer.seed_value=2147483647"],
    "no weight but one": [f"trainer.loss.severstal.weight_dict.loss_{name}=0" for name in ("mask", "dice", "iou")],
    "heavy weights": [
        "trainer.loss.severstal.weight_dict.loss_mask=1e6",
        "trainer.loss.severstal.class_weights={1: 1e6, 0: 0}",
    ],
    "patience and delta": ["trainer.early_stop.patience=1", "trainer.early_stop.min_delta=1e6", "scratch.steps=4"],
    "no prompt but boxes": [
        "trainer.model.prob_to_use_box_input_for_train=1",
        "trainer.model.prob_to_use_box_input_for_eval=1",
    ],
    "masks as prompts": ["trainer.model.prob_to_sample_from_gt_for_train=1", "scratch.reverse_time_prob=1"],
    "clipped to nothing": ["trainer.optim.gradient_clip.max_norm=1e-300", "scratch.weight_decay=100"],
    "everything again": [
        "trainer.model.activations={encoder: 1, decoder: 1, norms: true, positions: true}",
        "dataset.bits=8",
    ],
}


def test_there_are_at_most_twenty():
    assert len(EDGES) <= 20


@pytest.mark.slow
@pytest.mark.parametrize("edge", EDGES)
def test_values_at_the_ends_of_their_ranges_train(edge, tmp_path, nano_base, strips):
    """A finished run, or one sentence with exit code 2 about what the values lead to; never a traceback."""
    env = environment(nano_base, strips, tmp_path / "run")
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        try:
            train_here(env, "scratch.steps=2", *EDGES[edge])
        except SystemExit as stopped:
            assert stopped.code == 2 and errors.getvalue().count("error: ") == 1, errors.getvalue()
            return
    assert (tmp_path / "run/training_summary.json").exists()
