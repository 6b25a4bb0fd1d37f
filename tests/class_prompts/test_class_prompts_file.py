"""Class prompts on disk: all three formats are read back equal, and damaged files give one sentence."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sam2_lora_ext.adapters.class_prompts import (
    ClassPrompts,
    as_entry,
    from_entry,
    header_of,
    load_class_prompts,
    prompts_file,
    save_class_prompts,
)
from sam2_lora_ext.adapters.decision import Decision
from sam2_lora_ext.utils.errors import UserError

DECISION = Decision((0.5, -1.0), (1.0, 2.0), (0.0, 0.25), (600, 0), (1200, 0), (1.5, 0.0), fitted=True)


def make_prompts(**changes) -> ClassPrompts:
    """Class prompts of two classes, three tokens and width 5, with `changes`."""
    tokens = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    facts = {"tokens": tokens, "class_ids": (1, 255), "class_names": ("scratch", "scale"), "decision": DECISION}
    return ClassPrompts(**{**facts, "crop": 512, "resolution": 1024, "base_id": "b", "digest": "d", **changes})


def assert_equal(found: ClassPrompts | None, wanted: ClassPrompts) -> None:
    """Asserts that all fields are equal."""
    assert found is not None and torch.equal(found.tokens, wanted.tokens) and header_of(found) == header_of(wanted)
    assert found.decision == wanted.decision and found.class_ids == wanted.class_ids


def test_each_place_gives_back_what_was_written(tmp_path: Path) -> None:
    wanted = make_prompts()
    (tmp_path / "adapter").mkdir()
    save_class_prompts(wanted, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "class_prompts.safetensors").is_file()
    assert_equal(load_class_prompts(tmp_path / "adapter"), wanted)

    save_file({"x": torch.zeros(1)}, tmp_path / "steel.safetensors")
    assert load_class_prompts(tmp_path / "steel.safetensors") is None
    save_class_prompts(wanted, tmp_path / "steel.safetensors")
    assert prompts_file(tmp_path / "steel.safetensors").name == "steel.class_prompts.safetensors"
    assert_equal(load_class_prompts(tmp_path / "steel.safetensors"), wanted)
    assert_equal(load_class_prompts(tmp_path / "steel.class_prompts.safetensors"), wanted)

    torch.save({"model": {"x": torch.zeros(1)}}, tmp_path / "steel.pt")
    assert load_class_prompts(tmp_path / "steel.pt") is None
    torch.save({"model": {"x": torch.zeros(1)}, "class_prompts": as_entry(wanted)}, tmp_path / "steel.pt")
    assert_equal(load_class_prompts(tmp_path / "steel.pt"), wanted)


def test_a_file_is_not_replaced_without_force(tmp_path: Path) -> None:
    save_class_prompts(make_prompts(), tmp_path / "a.class_prompts.safetensors", force=False)
    with pytest.raises(UserError, match="exists already"):
        save_class_prompts(make_prompts(), tmp_path / "a.class_prompts.safetensors", force=False)


def test_tokens_of_another_adapter_are_refused(tmp_path: Path) -> None:
    for digest, refused in (("d", False), ("other", True)):
        header = {"sam2_lora_ext": json.dumps({"digest": digest})}
        save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors", metadata=header)
        save_class_prompts(make_prompts(), tmp_path)
        if refused:
            with pytest.raises(UserError, match="belongs to another adapter"):
                load_class_prompts(tmp_path)
        else:
            assert load_class_prompts(tmp_path) is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": torch.zeros(2, 3, 5, dtype=torch.float16)},
        {"tokens": torch.full((2, 3, 5), float("nan"))},
        {"tokens": torch.zeros(3, 3, 5)},
        {"tokens": torch.zeros(2, 5)},
        {"tokens": None},
        {"class_ids": (255, 1)},
        {"class_ids": (1, 1)},
        {"class_ids": (True, 2)},
        {"class_names": ("a", "a")},
        {"class_names": ("a", 1)},
        {"class_names": "ab"},
        {"decision": Decision.default(3)},
        {"resolution": 0},
        {"crop": 1.5},
        {"base_id": 3},
    ],
)
def test_what_does_not_fit_is_a_sentence(changes: dict) -> None:
    with pytest.raises(UserError, match="these are not valid class prompts"):
        make_prompts(**changes)


BROKEN = ["", "[]", "{}", '{"version": 2}', '{"version": 1}', "NaN", '{"version": 1, "a": {}}', 7]


@pytest.mark.parametrize("text", BROKEN)
def test_a_damaged_header_is_a_sentence(text, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"damaged|another version|not valid JSON"):
        from_entry({"tokens": torch.zeros(2, 3, 5), "header": text}, "x.pt")
    if isinstance(text, str):
        save_file({"tokens": torch.zeros(2, 3, 5)}, tmp_path / "class_prompts.safetensors", {"sam2_lora_ext": text})
        with pytest.raises(UserError, match=r"damaged|another version|not valid JSON"):
            load_class_prompts(tmp_path)


def test_any_damaged_decision_is_a_sentence() -> None:
    good = json.loads(header_of(make_prompts()))
    for key in good["decision"]:
        for wrong in (
            None,
            [],
            [1, float("inf")],
            ["a", "b"],
            {},
            [[1], [2]],
            "ab",
            [1e400, 0],
            [-1, -1],
            7,
            [10**400] * 3,
        ):
            header = json.dumps({**good, "decision": {**good["decision"], key: wrong}})
            if key in ("threshold", "bias", "weak_score") and wrong == [-1, -1]:
                continue
            with pytest.raises(UserError):
                from_entry({"tokens": make_prompts().tokens, "header": header}, "x.pt")


def test_foreign_bytes_are_a_sentence(tmp_path: Path) -> None:
    for content in (b"", b"abc", b"\xff" * 100, b"\0" * 4096):
        (tmp_path / "class_prompts.safetensors").write_bytes(content)
        with pytest.raises(UserError):
            load_class_prompts(tmp_path)
    with pytest.raises(UserError, match="entry class_prompts"):
        torch.save({"model": {}, "class_prompts": [1]}, tmp_path / "a.pt")
        load_class_prompts(tmp_path / "a.pt")
    assert load_class_prompts(tmp_path / "nothing") is None
