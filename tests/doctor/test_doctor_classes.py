"""The doctor on a config with class prompts: a step of each kind, and classes, widths and rates that do not agree."""

import pytest

from helpers.doctor_cases import find, only, place  # noqa: F401

CONFIG, SMALL = "demo_classes", "scratch.resolution=64"


def test_class_prompts_and_their_steps_are_said(place):  # noqa: F811
    said = [finding.text for finding in find(SMALL, level="green", step=True, config=CONFIG)]
    assert any("8 tokens each for 1 defect_1, 2" in text and "50% of the steps" in text for text in said)
    assert any(text.startswith("a window with class prompts, 4 object(s)") for text in said)
    assert any(text.startswith("a window with class prompts and correction clicks, 4 object(s)") for text in said)
    assert not any("class prompts" in finding.text for finding in find(level="green"))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.model.class_prompts.classes={1: pit}", "1 (pit)"),
        ("trainer.model.class_prompts.crop=96", "class_steps.width is 256"),
        ("trainer.model.class_prompts=null", "the model has no class prompts"),
    ],
)
def test_what_does_not_agree(place, override, words):  # noqa: F811
    only(find(SMALL, override, config=CONFIG), words)


def test_what_class_prompts_do_not_reach_is_said(place):  # noqa: F811
    trained = "lora.trainable=[sam_prompt_encoder.mask_downscaling]"
    found = find(SMALL, trained, level="yellow", step=True, config=CONFIG)
    assert any("mask_downscaling" in row.text and "find_unused_parameters=true" in row.advice for row in found)
