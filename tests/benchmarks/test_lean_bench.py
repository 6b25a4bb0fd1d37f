"""The counters of the benchmarks on known operations, on fake and real tensors, and the estimate and a real step."""

import json
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from benchmarks.counting import count, real_step
from benchmarks.estimate import Estimate, _step, estimate
from benchmarks.fake import _click
from benchmarks.measure import LiveBytes, step_cost
from benchmarks.methods import METHODS, SAMPLING
from benchmarks.table import add_ratios, table
from benchmarks.train_step import main, parse_batch, parse_case
from sam2_lora_ext.host.compose import compose, locate
from sam2_lora_ext.utils.errors import UserError


def test_live_bytes_follow_storages():
    known = torch.ones(1000)
    with LiveBytes([known]) as live:
        a = torch.ones(1000)  # 4000 bytes
        view = a[:10]
        b = a + known
        assert (live.now, live.peak) == (8000, 8000)
        del a
        assert live.now == 8000  # the view holds it
        del view
        assert live.now == 4000
        known.add_(1)
        del b
        assert (live.now, live.peak) == (0, 8000)


def test_the_cost_of_one_linear_layer():
    layer, x = nn.Linear(8, 16, bias=False), torch.ones(10, 8)
    cost, kernels = step_cost(
        layer, torch.optim.AdamW(layer.parameters(), foreach=True), [x], lambda: layer(x), lambda y: y.square().sum()
    )
    assert cost.flops == 2 * 2 * 10 * 8 * 16  # forward and the weight's gradient
    assert cost.hooked_bytes == 10 * 16 * 4 and cost.saved_bytes == cost.hooked_bytes + 4  # and the loss itself
    assert cost.gradient_bytes == 8 * 16 * 4 and cost.optimizer_bytes == 2 * 8 * 16 * 4 + 4  # and the step counter
    found = kernels.by_operation()
    assert found["forward"] == {"mm": 1} and found["loss"] == {"pow": 1, "sum": 1}
    assert found["backward"] == {"ones_like": 1, "pow": 1, "mul": 2, "mm": 1} and cost.kernels == 8
    assert all(name.startswith("_foreach") for name in found["optimizer"]) and cost.optimizer_kernels == 9


def test_the_cost_of_an_attention_on_a_cpu():
    q, k, v = (torch.randn(2, 3, tokens, 16, requires_grad=True) for tokens in (10, 14, 14))
    optimizer = torch.optim.SGD([q, k, v])
    attention = nn.functional.scaled_dot_product_attention
    cost, _ = step_cost(nn.Identity(), optimizer, [q, k, v], lambda: attention(q, k, v), Tensor.sum)
    # two products, and in backward one of them again and four gradients
    assert cost.flops == (2 + 5) * 2 * (2 * 3 * 10 * 14 * 16)


@pytest.fixture
def few_clicks(monkeypatch):
    """Four prediction steps, of which the low preset keeps one, not eight: fake tensors take as long for a small model
    as for a large one."""
    monkeypatch.setitem(SAMPLING, "num_correction_pt_per_frame", 3)


@pytest.mark.parametrize("method", ["full", "lean", "lean_memory"])
def test_fake_tensors_cost_what_real_ones_do(method, monkeypatch, few_clicks):
    monkeypatch.setattr("training.model.sam2.get_next_point", _click)
    monkeypatch.setattr("sam2_lora_ext.prompts.get_next_point", _click)
    fake, real = count(method, "nano", 128), real_step(method, "nano", 128)[0]._asdict()
    assert fake["flops"] == real["flops"]
    for key in ("saved_bytes", "hooked_bytes", "peak_live_bytes", "gradient_bytes", "optimizer_bytes"):
        # which map of the loss has a gradient, values decide
        assert fake[key] == pytest.approx(real[key], rel=0.01), key


@pytest.mark.slow
@pytest.mark.parametrize("amp", [False, True])
def test_the_estimate_is_what_a_real_step_takes(amp):
    """Under autocast a model's first step casts its frozen weights permanently: they do not count as saved."""
    changes = [
        f"trainer.optim.amp.enabled={amp}",
        "trainer.optim.amp.amp_dtype=bfloat16",
        "trainer.model.num_correction_pt_per_frame=1",
    ]
    config = compose(locate("configs/demo.yaml")[0], changes)
    found = estimate(config, objects=2)
    model, loss = instantiate(config.trainer.model).train(), instantiate(config.trainer.loss.severstal)
    model.prob_to_use_box_input_for_train = 0.0
    size, adapters = config.trainer.model.image_size, sum(p.nbytes for p in model.parameters() if p.requires_grad)
    _step(model, loss, size, 1, 2, amp)
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert (found.weights, found.gradients, found.optimizer) == (weights, adapters, 2 * adapters)
    for images in (1, 2, 4):
        saved, peak = _step(model, loss, size, images, 2, amp)
        assert found.total(images) == pytest.approx(weights + 2 * adapters + peak, rel=0.02 if images < 4 else 0.1)
        assert images > 1 or found.saved == pytest.approx(saved, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["severstal_lora_tiny", "severstal_lora_base_plus"])
def test_the_estimate_on_meta_models(name):
    config = compose(locate(name)[0], ["scratch.resolution=256", "trainer.optim.amp.enabled=false"])
    found = estimate(config, objects=2)
    model, loss = instantiate(config.trainer.model).train(), instantiate(config.trainer.loss.severstal)
    for images in (1, 2):
        _, peak = _step(model, loss, 256, images, 2, amp=False)
        assert found.total(images) == pytest.approx(found.weights + found.optimizer + peak, rel=0.1)


def test_the_largest_batch():
    found = Estimate(weights=10, gradients=1, optimizer=2, saved=20, step=30, step_of_two=55, per_image=20)
    assert [found.total(images) for images in (1, 2, 3)] == [42, 67, 87]
    assert [found.largest_batch(capacity) for capacity in (10, 41, 42, 66, 67, 86, 87, 107)] == [0, 0, 1, 1, 2, 2, 3, 4]


def test_ratios_table_and_cases():
    rows = add_ratios(
        [{"model": "tiny", "resolution": 512, "method": m, "flops": f} for m, f in (("full", 4e9), ("lean", 3e9))]
    )
    assert rows[1]["ratio_to_full"] == {"flops": 0.75}
    times = {"full": [1.0, 2.0, 4.0], "lean": [0.5, 1.8, 2.8]}
    timed = add_ratios([{"method": m, "step_seconds": sorted(t)[1], "rounds_seconds": t} for m, t in times.items()])
    # the median of 0.5, 0.9 and 0.7, not 1.8 / 2.0
    assert timed[1]["ratio_to_full"]["step_seconds"] == pytest.approx(0.7)
    assert table(rows).splitlines()[-1] == "| tiny 512 | lean | 3 (0.75) |"
    assert parse_case("tiny:512") == ("tiny", 512) and parse_batch("8x3") == (8, 3)
    for batch in ("8", "0x2", "8x", "ax2"):
        with pytest.raises(UserError, match=batch):
            parse_batch(batch)
    for case in ("huge:512", "tiny", "tiny:100"):
        with pytest.raises(UserError, match=case):
            parse_case(case)


@pytest.mark.slow
def test_the_command_writes_every_key(tmp_path, capsys, monkeypatch):
    processes = []
    monkeypatch.setattr("benchmarks.timing.FRESH", 1)
    monkeypatch.setattr(
        "benchmarks.timing.ProcessPoolExecutor", lambda *a, **k: processes.append(1) or ProcessPoolExecutor(*a, **k)
    )
    out = tmp_path / "new" / "train_step.json"
    main(
        [
            "--cases",
            "nano:128",
            "--timed",
            "nano:128",
            "--rounds",
            "2",
            "--threads",
            "1",
            "--out",
            str(out),
            "--methods",
            "full",
            "lean",
            "--batches",
            "1x2",
            "2x3",
        ]
    )
    rows = json.loads(out.read_text())
    keys = {
        "model",
        "resolution",
        "method",
        "images",
        "objects",
        "autocast",
        "flops",
        "saved_bytes",
        "hooked_bytes",
        "peak_live_bytes",
        "gradient_bytes",
        "optimizer_bytes",
        "kernels",
        "moved_bytes",
        "waits",
        "host_ms",
        "modelled_ms",
        "step_seconds",
        "peak_rss_bytes",
        "threads",
        "torch",
        "parameters",
        "trained_parameters",
        "ratio_to_full",
    }
    assert all(keys <= set(row) for row in rows) and all(
        set(row["modelled_ms"]) == {"A10G", "RTX4090", "A100", "H200"} for row in rows
    )
    places = [(row["autocast"], row["images"], row["objects"], row["method"]) for row in rows]
    assert places == [
        (kind, *batch, method) for kind in (False, True) for batch in ((1, 2), (2, 3)) for method in ("full", "lean")
    ]
    assert [len(row.get("rounds_seconds", ())) for row in rows] == [2, 2, 0, 0, 0, 0, 0, 0]
    assert len(processes) == 6  # of each method two that are timed and one for its resident memory
    assert "| nano 128 1x2 float32 | lean |" in capsys.readouterr().out and set(METHODS) >= {"peft", "decoder"}
