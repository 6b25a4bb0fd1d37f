"""Cached features are bitwise the encoder's, and only a frozen encoder can be cached."""

import logging

import numpy as np
import pytest
import torch
from hydra.errors import InstantiationException
from sam2.modeling.sam2_utils import DropPath
from torch import nn

from helpers.small_runs import environment as demo_environment
from helpers.small_runs import make_batch, make_model, train_here
from sam2_lora_ext.activations.feature_cache import FeatureCache
from sam2_lora_ext.utils.errors import UserError

DECODER = ["sam_mask_decoder.transformer.*.q_proj", "sam_mask_decoder.transformer.*.mlp.layers.*"]
LORA = {"targets": DECODER, "dropout": 0.0, "implementation": "lean"}
OBJECTS = [[1_000_000, 3_000_001], [0]]


def cached(folder, max_gb=1.0, **changes):
    return make_model(lora=LORA, feature_cache={"folder": str(folder), "max_gb": max_gb}, **changes)


def step(model, batch, autocast=False):
    """Mask logits of all frames and the gradients of one step, with the same clicks each time."""
    torch.manual_seed(1)
    model.rng = np.random.default_rng(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        frames = model.train()(batch)
    loss = sum(x.square().mean() for frame in frames for x in frame["multistep_pred_multimasks_high_res"])
    trained = [p for p in model.parameters() if p.requires_grad]
    return [frame["pred_masks_high_res"] for frame in frames] + list(
        torch.autograd.grad(loss, trained, allow_unused=True)
    )


def equal(values, expected):
    return len(values) == len(expected) and all(a is b is None or torch.equal(a, b) for a, b in zip(values, expected))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("frames", [1, 3])
def test_a_step_is_the_same_to_the_bit(tmp_path, autocast, frames):
    model, batch = cached(tmp_path), make_batch(OBJECTS, frames=frames)
    expected = step(make_model(lora=LORA), batch, autocast)
    for found in (0, 2 * frames):
        assert equal(step(model, batch, autocast), expected)
        assert (model.feature_cache.found, model.feature_cache.missed) == (found, 2 * frames)
    assert len(list(tmp_path.iterdir())) == 2 * frames
    other = cached(tmp_path)  # a later run
    assert equal(step(other, batch, autocast), expected) and other.feature_cache.missed == 0


def test_other_pixels_weights_and_types_are_other_features(tmp_path):
    batch = make_batch(OBJECTS)
    step(cached(tmp_path), batch)
    changed = make_batch(OBJECTS)
    changed.img_batch[0, 0, 0, 0, 0] += 1e-3
    again = cached(tmp_path)
    step(again, changed)
    assert (again.feature_cache.found, again.feature_cache.missed) == (1, 1)
    again = cached(tmp_path)
    with torch.no_grad():
        again.sam_mask_decoder.conv_s1.bias[0] += 1e-3
    step(again, batch)
    step(again, batch, autocast=True)
    assert (again.feature_cache.found, again.feature_cache.missed) == (0, 4)


def test_the_bound_holds_and_damage_is_mended(tmp_path, caplog):
    batch = make_batch(OBJECTS)
    model = cached(tmp_path)
    expected = step(model, batch)
    files = sorted(tmp_path.iterdir())
    one = files[0].stat().st_size
    files[0].write_bytes(b"not features")
    files[1].unlink()
    tight = cached(tmp_path, max_gb=1.5 * one / 1e9)
    with caplog.at_level(logging.WARNING):
        assert equal(step(tight, batch), expected)
    assert str(files[0]) in caplog.text and tight.feature_cache.missed == 2
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 1.5 * one
    assert equal(step(tight, batch), expected) and tight.feature_cache.found == 1


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    model, batch = cached(tmp_path / "file"), make_batch(OBJECTS)
    with caplog.at_level(logging.WARNING):
        assert equal(step(model, batch), step(make_model(lora=LORA), batch))
    assert "no more features are stored" in caplog.text


@pytest.mark.parametrize(
    ("lora", "cache", "words"),
    [
        (
            {"targets": ["image_encoder.*.attn.qkv"]},
            {"folder": "x", "max_gb": 1},
            "image_encoder.*is trained.*only the decoder",
        ),
        ({**LORA, "trainable": ["sam_mask_decoder.conv_s0"]}, {"folder": "x", "max_gb": 1}, "conv_s0.*is trained"),
        (None, {"folder": "x", "max_gb": 1}, "is trained"),
        (LORA, {"folder": "x", "max_gb": 0}, "max_gb above 0"),
        (LORA, {"folder": "x", "max_gb": 1, "size": 3}, "size"),
        (LORA, {"max_gb": 1}, "needs a folder"),
    ],
)
def test_what_makes_no_sense_is_refused(lora, cache, words):
    with pytest.raises(InstantiationException, match=words) as caught:
        make_model(lora=lora, feature_cache=cache)
    assert isinstance(caught.value.__cause__, UserError)


def test_an_encoder_that_draws_at_random_is_refused(tmp_path):
    encoder = nn.Sequential(nn.Linear(2, 2), DropPath(0.1)).requires_grad_(False)
    with pytest.raises(UserError, match="image_encoder has dropout or drop_path"):
        FeatureCache({"folder": str(tmp_path), "max_gb": 1}, {"image_encoder": encoder})


def test_training_and_validation_use_it(tmp_path, nano_base, strips):
    folder, env = tmp_path / "features", demo_environment(nano_base, strips, tmp_path / "run")
    targets = f"lora.targets=[{','.join(DECODER)}]"
    trainer = train_here(env, targets, f"trainer.model.feature_cache={{folder: {folder}, max_gb: 1}}")
    cache = trainer.model.module.feature_cache
    stored = len(list(folder.iterdir()))
    assert stored == cache.missed > 0 and cache.found > 0  # later validations find the first one's windows
    plain = train_here({**env, "SAM2_LORA_DEMO_RUN": str(tmp_path / "plain")}, targets)
    for (name, value), other in zip(
        trainer.model.module.named_parameters(), plain.model.module.parameters(), strict=True
    ):
        assert torch.equal(value, other), name
