"""What `make gpu` checks on a CUDA machine, each also on a CPU, so that the checks themselves work when such a machine
is there.

Small models, minutes in all, no network. The real table is `benchmarks.gpu`'s.
"""

import json
from pathlib import Path

import evaluate as tool
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.fake import _click
from benchmarks.gpu import main, make_step, profiled
from benchmarks.methods import SAMPLING, Setup, build, make_batch
from helpers.kills import Killed, assert_same_run, kill_at
from helpers.small_runs import environment, train_here
from sam2_lora_ext.adapters.merge_state import merge_state_dict
from sam2_lora_ext.adapters.sources import read_adapter
from sam2_lora_ext.adapters.weights import read_weights, write_weights
from sam2_lora_ext.evaluate.models import build as build_candidate
from sam2_lora_ext.evaluate.models import candidate
from sam2_lora_ext.run.guard import StepGuard

OURS = ("lean_fast", "lean", "lean_memory")
needs_cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")]
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]


@pytest.fixture(params=DEVICES, scope="module")
def device(request) -> str:
    """A CPU, and a GPU where there is one."""
    return request.param


@pytest.fixture
def fixed_clicks(monkeypatch):
    """Two prediction steps with clicks independent of the masks, whose rounding would otherwise move them."""
    monkeypatch.setitem(SAMPLING, "num_correction_pt_per_frame", 1)
    monkeypatch.setattr("training.model.sam2.get_next_point", _click)
    monkeypatch.setattr("sam2_lora_ext.prompts.PromptSampler.next_point", lambda self, **call: _click(**call))


@pytest.fixture(scope="module")
def run(device, tmp_path_factory, nano_base, strips) -> Path:
    """A finished run of six steps on the device, bfloat16 on a GPU."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    train_here(environment(nano_base, strips, folder), *settings(device))
    return folder


def settings(device: str) -> tuple[str, ...]:
    """Overrides for a run on the device; on a GPU with bfloat16, as the shipped configs have it."""
    return (
        f"trainer.accelerator={device}",
        f"trainer.optim.amp.enabled={device == 'cuda'}",
        "trainer.optim.amp.amp_dtype=bfloat16",
    )


def loss_and_gradients(
    setup: Setup, device: str, dtype: torch.dtype | None = None
) -> tuple[float, dict[str, torch.Tensor]]:
    """Of one step on the device, under autocast to `dtype`; the gradients on the CPU."""
    setup.model.to(device)
    batch = make_batch(128, 2, 2).to(device)
    with torch.autocast(torch.device(device).type, dtype or torch.bfloat16, enabled=dtype is not None):
        loss = setup.seeded_loss(batch)
    (loss * 64).backward()  # as a scaler would, for float16
    return loss.item(), {name: p.grad.cpu() / 64 for name, p in setup.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", ["full", *OURS])
def test_the_cpu_and_the_device_agree(method, device, fixed_clicks):
    """Float32 without dropout; sums of 16,384 pixels in another order, and a random model whose losses are large."""
    (loss, found), (wanted, expected) = (
        loss_and_gradients(build(method, "nano", 128, dropout=0.0), where) for where in (device, "cpu")
    )
    assert loss == pytest.approx(wanted, rel=1e-4) and found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 2e-3 * gradient.norm() + 1e-6, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", OURS)
def test_a_step_under_autocast_is_near_the_one_in_float32(method, dtype, device, fixed_clicks):
    """bfloat16 has three digits; the loss is a sum of a few hundred terms."""
    wanted, expected = loss_and_gradients(build(method, "nano", 128, dropout=0.0), device)
    loss, found = loss_and_gradients(build(method, "nano", 128, dropout=0.0), device, dtype)
    assert loss == pytest.approx(wanted, rel=0.05) and found.keys() == expected.keys()
    assert all(gradient.isfinite().all() for gradient in found.values())
    one, other = (torch.cat([grads[name].float().flatten() for name in expected]) for grads in (found, expected))
    assert torch.cosine_similarity(one, other, dim=0) > 0.95


@pytest.mark.parametrize("method", OURS)
def test_in_deterministic_mode_a_step_repeats_to_the_bit(method, device, fixed_clicks):
    """With dropout; `make gpu` sets CUBLAS_WORKSPACE_CONFIG, without which cuBLAS refuses."""
    torch.use_deterministic_algorithms(True)
    try:
        (one, first), (other, second) = (loss_and_gradients(build(method, "nano", 128), device) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert one == other and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_a_killed_run_resumes(device, run, tmp_path, nano_base, strips, monkeypatch):
    """On a CPU to the bit; on a GPU, whose sums may run in any order, the adapters are near."""
    env = environment(nano_base, strips, tmp_path / "run")
    with monkeypatch.context() as patch:
        kill_at(patch, StepGuard, "check_gradients", 4)
        with pytest.raises(Killed):
            train_here(env, *settings(device))
    train_here(env, *settings(device))
    if device == "cpu":
        assert_same_run(tmp_path / "run", run)
    one, other = (load_file(folder / "adapters/final/adapter_model.safetensors") for folder in (tmp_path / "run", run))
    flat, whole = (torch.cat([tensors[name].flatten() for name in sorted(other)]) for tensors in (one, other))
    assert (flat - whole).norm() <= 0.02 * whole.norm()


@pytest.mark.slow
def test_a_run_is_merged_and_evaluated_on_the_device(device, run, nano_base, strips, tmp_path):
    """The merged file and the adapter give the same results in an evaluation on the device."""
    base = read_weights(nano_base)
    write_weights(tmp_path / "merged.pt", merge_state_dict(base, read_adapter(run)))
    model, facts = build_candidate(candidate(str(tmp_path / "merged.pt"), config="configs/sam2_nano.yaml"), device)
    assert facts["device"] == device and next(model.parameters()).device.type == device
    data = ["--data", str(strips), "--split-file", str(strips / "split.csv"), "--split", "val", "--device", device]
    quick = ["--max-clicks", "2", "--clean-clicks", "1", "--pictures", "0"]
    tool.main(
        ["--compare", f"lora={run}", f"merged={tmp_path / 'merged.pt'}", *data, *quick, "--out", str(tmp_path / "out")]
    )
    found = json.loads((tmp_path / "out/evaluation.json").read_text())
    lora, merged = found["models"]
    assert lora["metrics"].keys() == merged["metrics"].keys()
    for key, value in lora["metrics"].items():
        if value["mean"] is not None and "iou" in key:
            # a pixel at an edge may turn
            assert value["mean"] == pytest.approx(merged["metrics"][key]["mean"], abs=0.05), key


@pytest.mark.slow
def test_the_table_is_written_beside_the_model_s(device, tmp_path, fixed_clicks):
    out = tmp_path / "gpu.json"
    main(
        [
            "--device",
            device,
            "--cases",
            "nano:128",
            "--methods",
            "full",
            "lean",
            "--batches",
            "1x2",
            "--steps",
            "2",
            "--out",
            str(out),
        ]
    )
    rows = json.loads(out.read_text())
    assert [row["method"] for row in rows] == ["full", "lean"] and all(row["error"] is None for row in rows)
    for row in rows:
        assert row["cuda_step_seconds"] > 0 and row["images_per_second"] > 0 and row["modelled_ms"]["H200"] > 0
        assert (row["cuda_peak_bytes"] is None) == (row["launches"] is None) == (device == "cpu")
        assert device == "cpu" or row["launches"] > 0.5 * row["kernels"]
    assert profiled(make_step("cpu", "full", "nano", 128, 1, 2, None), "cpu") == {
        "launches": None,
        "device_seconds": None,
    }
