"""The goals of a training step as ratios to full fine-tuning: pinned for a small model, and slowly for SAM 2.1's own.

Fake tensors, bfloat16 autocast, rank 8, dropout 0.05.
"""

import dataclasses

import pytest

from benchmarks.compiled import BACKENDS, kept_bytes
from benchmarks.counting import count
from benchmarks.methods import SAMPLING, build
from benchmarks.pieces import ALL, PIECES, table, without
from benchmarks.table import value
from sam2_lora_ext.activations.policy import PRESETS, ActivationsConfig
from sam2_lora_ext.lora.layer import LoRALinear

KEYS = ("kernels", "saved_bytes", "peak_live_bytes", "flops", "moved_bytes")
SMALL = {  # most of each key's ratio for two images with three objects, two prediction steps, 128 px: as counted + 0.02
    "lean_fast": (1.14, 0.33, 0.53, 0.83, 0.76),
    "lean_channels": (1.23, 0.28, 0.48, 0.83, 0.72),
    "lean": (1.29, 0.14, 0.38, 0.95, 0.85),
    "lean_memory": (1.34, 0.06, 0.31, 1.05, 0.88),
}
GOALS = {  # of SAM 2.1 tiny at 1024 px: KEYS without the last for 1x2, then the modelled step, A100 1x2 and A10G 8x3
    "lean_fast": (1.15, 0.60, 0.65, 0.80, 1.15, 0.92),
    "lean_channels": (1.15, 0.60, 0.65, 0.80, 1.15, 0.85),
    "lean": (1.50, 0.30, 0.35, 0.88, 1.50, 1.00),
    "lean_memory": (1.70, 0.06, 0.12, 1.05, 1.70, 1.20),
}
ROUNDING = 0.005  # the goals have two digits


def ratios(rows, keys):
    """Method -> each key's value by that of full fine-tuning."""
    return {name: [value(row, key) / value(rows["full"], key) for key in keys] for name, row in rows.items()}


@pytest.mark.slow
def test_a_small_model_s_step_keeps_to_its_ratios(monkeypatch):
    monkeypatch.setitem(SAMPLING, "num_correction_pt_per_frame", 1)
    rows = {method: count(method, "nano", 128, 2, 3, autocast=True) for method in ("full", *SMALL)}
    found = ratios(rows, KEYS)
    for method, most in SMALL.items():
        for key, ratio, limit in zip(KEYS, found[method], most, strict=True):
            assert limit - 0.06 < ratio <= limit, (method, key)  # far below: pin it anew
    kept = {method: row["saved_bytes"] for method, row in rows.items()}
    assert kept["lean_memory"] < kept["lean"] < kept["lean_channels"] < kept["lean_fast"] < kept["full"]


@pytest.mark.slow
def test_the_goals():
    """The claims of the benchmark's table, and the same number of launches for eight images as for one."""
    one, eight = (
        {method: count(method, "tiny", 1024, *batch, autocast=True) for method in ("full", *GOALS)}
        for batch in ((1, 2), (8, 3))
    )
    small, large = ratios(one, (*KEYS[:-1], "A100")), ratios(eight, ("A10G",))
    for method, goals in GOALS.items():
        found = [*small[method], *large[method]]
        assert all(ratio <= goal + ROUNDING for ratio, goal in zip(found, goals, strict=True)), (method, found)
        assert eight[method]["kernels"] <= 1.05 * one[method]["kernels"], method


@pytest.mark.slow
@pytest.mark.parametrize("size", ["base_plus", "large"])
def test_larger_models_have_tiny_s_ratios(size):
    methods = ("full", "lean", "lean_memory")
    tiny, found = (
        ratios({method: count(method, model, 1024, autocast=True) for method in methods}, KEYS[:2])
        for model in ("tiny", size)
    )
    for method in methods:
        assert found[method] == pytest.approx(tiny[method], abs=0.05), method


def test_every_switch_is_a_piece_that_can_be_turned_off():
    """Each by itself; without all of them every module, layer and loss is the plain one."""
    preset = PRESETS["default"]
    switches = {field.name for field in dataclasses.fields(ActivationsConfig)}
    assert {name for piece in PIECES for name in piece.activations} == switches
    left = preset
    for piece in PIECES:
        changed = without(preset, piece)
        assert sum(getattr(changed, name) != getattr(preset, name) for name in switches) == len(piece.activations)
        left = without(left, piece)
    assert left == without(preset, ALL) == PRESETS["stock"]
    none = build("lean", "nano", 128, activations=left, implementations=ALL.implementations)
    plain, stock = build("plain", "nano", 128), build("full", "nano", 128)
    assert not none.loss.lean and not plain.loss.lean
    adapted = {name for name, module in plain.model.named_modules() if type(module) is LoRALinear}
    expected = {name: type(module) for name, module in stock.model.named_modules() if name}
    for found in (none, plain):
        kinds = {name: type(module) for name, module in found.model.named_modules() if name}
        assert kinds == expected | dict.fromkeys(adapted, LoRALinear) and adapted


def test_the_table_of_pieces():
    numbers = {"kernels": 100, "saved_bytes": 2e6, "peak_live_bytes": 3e6, "flops": 4e9, "moved_bytes": 5e9}
    rows = [
        {**numbers, "modelled_ms": {"A10G": 10.0, "A100": 5.0}},
        {**numbers, "kernels": 1090, "saved_bytes": 1e6, "modelled_ms": {"A10G": 12.0, "A100": 5.0}},
    ]
    assert table(["default", "none"], rows).splitlines()[2:] == [
        "| default | 100 | 2 | 3 | 4 | 5.0 | 10 | 5 |",
        "| none | 1,090 (+990) | 1 (-1) | 3 (+0) | 4 (+0) | 5.0 (+0.0) | 12 (+2) | 5 (+0) |",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lean_fast"])
def test_a_compiled_image_encoder_keeps_no_more_than_an_eager_one(method):
    found = kept_bytes(method, "nano", 128, BACKENDS[0])
    assert 0.8 * found["eager_bytes"] < found["compiled_bytes"] <= found["eager_bytes"]
