"""Kernels and waits of a full step at a small size: known operations, and no more of either for a larger batch."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.counting import count, real_step
from benchmarks.kernels import Kernel, Kernels, cuda_dropout
from benchmarks.methods import SAMPLING
from benchmarks.roofline import CARDS, device_ms, host_ms, largest_batch, modelled
from benchmarks.wait_counter import Waits, reads_booleans
from benchmarks.waits import count_waits

SMALL, LARGE = (1, 2), (2, 3)  # images, and objects of each
STOCK_WAITS = 9  # of the loss and its five parts, their number of objects, and the gradients' scale
OUR_WAITS = STOCK_WAITS  # one more for the step guard, one less when the epoch ends
# Of a step with two prediction steps, of whatever batch.
KERNELS = {"full": 1871, "peft": 2371, "lean_fast": 2478, "lean_channels": 2711, "lean": 2810, "lean_memory": 2940}


@pytest.fixture
def few_clicks(monkeypatch):
    """Two prediction steps, not eight."""
    monkeypatch.setitem(SAMPLING, "num_correction_pt_per_frame", 1)


def test_kernels_are_what_computes_or_copies():
    x, mask = torch.ones(4, 6), torch.ones(6, dtype=torch.bool)
    with Kernels() as kernels:
        y = x.t().reshape(2, 12)  # a view, and a copy of what it shows: 96 bytes read, 96 written
        torch.empty(100)
        kernels.phase = "later"
        y.view(3, 8).mul_(2)  # read and written
        (x @ torch.ones(6, 2)).sum().item()
        x[:, mask]
        x.expand(5, 4, 6) + 1
    found = {(kernel.phase, kernel.name): kernel for kernel in kernels.counts}
    assert found[("forward", "clone")] == Kernel("forward", "clone", 0, 192, False)
    assert found[("later", "mul_")].moved == 192
    assert found[("later", "mm")] == Kernel("later", "mm", 2 * 4 * 6 * 2, 4 * (24 + 12 + 8), False)
    assert found[("later", "add")].moved == 2 * 5 * 96
    # mul_, ones, mm, sum, index, add
    assert kernels.total("forward") == 1 and kernels.total("later") == kernels.total() - 1 == 6


def test_in_place_operations_without_a_result_count():
    group = [torch.ones(10), torch.ones(20)]
    with Kernels() as kernels:
        torch._foreach_add_(group, 1)
    assert [*kernels.counts] == [Kernel("forward", "_foreach_add_", 0, 2 * 120, False)]


def test_dropout_is_one_kernel_both_ways_as_on_cuda():
    x = torch.ones(10, 10, requires_grad=True)
    with cuda_dropout(), Kernels() as kernels:
        torch.manual_seed(0)
        y = nn.Dropout(0.5)(x)
        assert torch.equal(F.dropout(x, 0.5, training=False), x)
        kernels.phase = "backward"
        y.backward(torch.ones(10, 10))
    assert kernels.by_operation()["forward"]["native_dropout"] == 1
    assert kernels.by_operation()["backward"] == {"native_dropout_backward": 1, "ones": 1}
    assert set(y.unique().tolist()) == {0.0, 2.0} and torch.equal(x.grad, y.detach())
    assert next(k.moved for k in kernels.counts if k.name == "native_dropout") == 400 + 400 + 100  # a mask of bools


def test_the_roofline_takes_the_largest_of_three():
    card = CARDS["A100"]._replace(narrow=100, wide=10, bandwidth=1000)
    launch = Kernel("forward", "add", 0, 8, False)
    product = Kernel("backward", "mm", 600_000_000, 8, True)  # 1e-5 s at 0.6 of 100 TFLOP/s
    copy = Kernel("loss", "clone", 0, 8_000_000, False)  # 1e-5 s at 0.8 of 1000 GB/s
    assert device_ms({launch: 5}, card) == pytest.approx(5 * 2e-3)
    assert device_ms({product: 1}, card) == device_ms({copy: 1}, card) == pytest.approx(1e-2)
    assert device_ms({product._replace(narrow=False): 1}, card) == pytest.approx(1e-1)
    assert device_ms({product._replace(phase="optimizer"): 1}, card) == 0
    assert host_ms(1000) == pytest.approx(6)
    assert modelled({launch: 1000})["modelled_ms"] == dict.fromkeys(CARDS, pytest.approx(6))
    assert largest_batch(weights=10**9, optimizer=10**9, gradients=10**9, peak=5 * 10**9, images=2) == 10


def test_waits_are_named_by_kind_and_line():
    x, mask = torch.arange(6.0), torch.arange(6) > 2
    parameter = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(1)
    with Waits() as waits:
        if x.sum() > 0:
            x.tolist()
        x[mask], x.cpu(), x.to("cpu"), x.to(x.device), x.nonzero(), float(x[0])
        x[mask] = 0.0  # filled, nothing is looked up
        x[torch.tensor([1, 2])]
        optimizer.step()
    kinds = {}
    for (kind, line), times in waits.counts.items():
        kinds[kind] = kinds.get(kind, 0) + times
        assert line.startswith("benchmarks/test_bench_kernels.py:")
    assert kinds == {"item": 2, "tolist": 1, "boolean index": 1, "cpu": 1, "to": 1, "nonzero": 1}
    assert reads_booleans((x, [mask])) and not reads_booleans((x, [mask], torch.tensor(0.0)))


@pytest.mark.parametrize("method", KERNELS)
def test_kernels_of_a_step_do_not_grow_with_the_batch(method, few_clicks):
    """Real tensors, real clicks: detects any loop over objects or maps."""
    found = [real_step(method, "nano", 128, *batch)[0].kernels for batch in (SMALL, LARGE)]
    assert found == pytest.approx([KERNELS[method]] * 2, rel=0.002)


def test_counting_repeats_exactly(few_clicks):
    rows = [count("lean", "nano", 128, *LARGE, autocast=True) for _ in range(2)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("method", ["full", "lean"])
def test_waits_of_a_step_through_the_trainer(method):
    found = [count_waits(method, batch).total() for batch in (SMALL, LARGE)]
    assert found == 2 * [STOCK_WAITS if method == "full" else OUR_WAITS]
