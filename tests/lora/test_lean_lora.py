"""LeanLoRALinear compared with the plain layer, which is its oracle, and with finite differences."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks.measure import Saved
from helpers.lora_pairs import QKV, pair
from sam2_lora_ext.lora import LoRALinear, build_lora_model, lora_layers
from sam2_lora_ext.lora.backward import LeanLoRALinear
from sam2_lora_ext.lora.shared import checkpointed, sharing


def gradients(layer, x, seed=1):
    torch.manual_seed(seed)
    y = layer(x)
    wanted = [tensor for tensor in (x, *layer.parameters()) if tensor.requires_grad]
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(y.dtype)
    return y, torch.autograd.grad(y, wanted, weights)


def assert_same(layers, x, **tolerance):
    (y, grads), (expected, expected_grads) = (gradients(layer, x) for layer in reversed(layers))
    torch.testing.assert_close(y, expected, **tolerance)
    assert len(grads) == len(expected_grads)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, **tolerance)


@pytest.mark.parametrize("shape", [(7, 12), (2, 7, 12), (2, 3, 5, 12), (12,), (0, 12), (2, 0, 12)])
@pytest.mark.parametrize("parts", [(True,), QKV, (True,) * 3])
def test_equals_plain_in_double_precision(shape, parts):
    for bias, frozen in ((True, True), (False, True), (True, False)):
        for frozen_input in (False, True):
            x = torch.randn(shape, dtype=torch.float64, requires_grad=not frozen_input)
            assert_same(pair(parts=parts, bias=bias, frozen=frozen), x, rtol=1e-13, atol=1e-13)


def test_backward_under_autocast():
    _, lean = pair(torch.float32)
    x = torch.randn(5, 12, requires_grad=True)
    y = lean(x)
    expected = torch.autograd.grad(y.sum(), (x, lean.lora_a, lean.lora_b), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(y.sum(), (x, lean.lora_a, lean.lora_b))
    assert all(map(torch.equal, got, expected))


def test_equals_plain_in_single_precision_and_for_strided_input():
    x = torch.randn(5, 12, 3).transpose(1, 2).requires_grad_()
    assert not x.is_contiguous()
    assert_same(pair(torch.float32), x)
    assert_same(pair(torch.float32, QKV), torch.randn(4, 1, 12).expand(4, 6, 12).detach().requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [(True,), QKV, (True,) * 3])
def test_without_an_update_the_output_is_the_bases_to_the_bit(dtype, parts):
    base = nn.Linear(64, 96).to(dtype)
    layer = LeanLoRALinear(base, 4, 8, 0.1, parts)
    x = torch.randn(50, 64, dtype=dtype)
    assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize("parts", [QKV, (True,)])
def test_under_autocast_the_error_is_that_of_plain(parts):
    plain, lean = pair(torch.float32, parts, width=(256, 384))
    x = torch.randn(64, 256, requires_grad=True)
    exact = gradients(copy.deepcopy(plain).double(), x.detach().double().requires_grad_())
    with torch.autocast("cpu", torch.bfloat16):
        results = [gradients(layer, x) for layer in (plain, lean)]
    assert results[1][0].dtype == torch.bfloat16 and all(grad.dtype == torch.float32 for grad in results[1][1])
    errors = [
        [(a - b).norm() / b.norm() for a, b in zip((y, *grads), (exact[0], *exact[1]), strict=True)]
        for y, grads in results
    ]
    for plain_error, lean_error in zip(*errors, strict=True):
        assert lean_error < 1.2 * plain_error + 1e-3 and lean_error < 0.02  # bf16 has 8 bits: 0.004 a rounding


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-4)])
def test_ten_steps_of_adamw_end_at_the_same_weights(dtype, tolerance):
    # float32: AdamW divides by the gradient's size, so rounding of tiny gradients shows
    ends = []
    for layer in pair(dtype, QKV):
        net = nn.Sequential(layer, nn.GELU(), nn.Linear(24, 1).to(dtype).requires_grad_(False))
        nn.init.constant_(net[2].weight, 0.1)
        nn.init.zeros_(net[2].bias)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        data = torch.Generator().manual_seed(3)
        for _ in range(10):
            x = torch.randn(32, 12, generator=data, dtype=dtype)
            (net(x) - x.sum(1, keepdim=True)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(layer)
    for key, value in ends[0].state_dict().items():
        torch.testing.assert_close(ends[1].state_dict()[key], value, rtol=tolerance, atol=tolerance)
    assert not torch.equal(ends[0].lora_a, pair(dtype, QKV)[0].lora_a)


def test_dropout_has_the_same_zeros_in_forward_and_backward():
    _, lean = pair(dropout=0.3)
    x = torch.randn(6, 12, dtype=torch.float64, requires_grad=True)

    def seeded(*tensors):
        torch.manual_seed(5)
        return lean(tensors[0])

    assert torch.autograd.gradcheck(seeded, (x, lean.lora_a, lean.lora_b))


def test_dropout_is_the_formula():
    _, lean = pair(dropout=0.25)
    x = torch.randn(40, 12, dtype=torch.float64)
    torch.manual_seed(5)
    dropped, _ = torch.native_dropout(x, 0.25, True)
    torch.manual_seed(5)
    expected = nn.functional.linear(x, lean.weight, lean.bias)
    torch.testing.assert_close(lean(x), expected + lean.scaling * dropped @ lean.lora_a.T @ lean.lora_b.T)


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_zeros_are_at_the_right_rate(p):
    """Measured with an identity layer: A and B are the unit matrix, and the base is zero."""
    lean = LeanLoRALinear(nn.Linear(500, 500, bias=False).requires_grad_(False), 500, 500, p)
    with torch.no_grad():
        nn.init.zeros_(lean.weight)
        lean.lora_a.copy_(torch.eye(500))
        lean.lora_b.copy_(torch.eye(500))
    torch.manual_seed(0)
    y = lean(torch.ones(1000, 500))
    zeros = (y == 0).double()
    torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 1 / (1 - p)))
    assert abs(zeros.mean() - p) < 5 * (p * (1 - p) / zeros.numel()) ** 0.5
    assert (zeros.mean(0) - p).abs().max() < 6 * (p * (1 - p) / 1000) ** 0.5  # every feature
    assert (zeros.mean(1) - p).abs().max() < 6 * (p * (1 - p) / 500) ** 0.5  # every token


@pytest.mark.parametrize("lean", [False, True])
def test_dropout_on_channels_drops_whole_columns(lean):
    """The same channels for all tokens of a call, others in the next; no pass over the input, and nothing more is
    saved."""
    layer = pair(dropout=0.5, width=(60, 24), dropout_on="channels")[lean]
    x = torch.randn(2, 3, 60, dtype=torch.float64, requires_grad=True)
    base = nn.functional.linear(x, layer.weight, layer.bias)
    torch.manual_seed(5)
    columns = nn.functional.dropout(torch.ones(60, dtype=torch.float64), 0.5)
    torch.manual_seed(5)
    expected = base + layer.scaling * (x * columns) @ layer.lora_a.T @ layer.lora_b.T
    first = layer(x)
    torch.testing.assert_close(first, expected)
    assert not torch.equal(layer(x), first) and 10 < (columns == 0).sum() < 50
    assert torch.equal(layer.eval()(x), layer(x))

    def seeded(*tensors):
        torch.manual_seed(5)
        return layer.train()(tensors[0])

    assert torch.autograd.gradcheck(seeded, (x, layer.lora_a, layer.lora_b))


def test_dropout_where_torch_is_to_be_repeatable():
    _, lean = pair(dropout=0.2)
    x = torch.randn(30, 12, dtype=torch.float64, requires_grad=True)
    expected, expected_grads = gradients(lean, x)
    torch.use_deterministic_algorithms(True)
    try:
        got, grads = gradients(lean, x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(got, expected) and all(map(torch.equal, grads, expected_grads))


def test_dropout_follows_the_seed_and_differs_between_calls():
    _, lean = pair(dropout=0.2)
    x = torch.randn(30, 12, dtype=torch.float64)
    torch.manual_seed(7)
    first, second = lean(x), lean(x)
    torch.manual_seed(7)
    assert torch.equal(lean(x), first) and not torch.equal(first, second)
    state = torch.get_rng_state()
    assert torch.equal(lean.eval()(x), lean(x)) and torch.equal(torch.get_rng_state(), state)


class Twice(nn.Module):
    def __init__(self, layer, recompute=False):
        super().__init__()
        self.layer, self.recompute = layer, recompute

    def forward(self, x):
        return checkpoint(self.twice, x, use_reentrant=False) if self.recompute else self.twice(x)

    def twice(self, x):
        return self.layer(self.layer(x).relu())


def test_used_twice_and_under_a_checkpoint_with_dropout():
    _, lean = pair(dropout=0.2, width=(12, 12))
    x = torch.randn(9, 12, dtype=torch.float64, requires_grad=True)

    (y, grads), (expected, expected_grads) = gradients(Twice(lean, recompute=True), x), gradients(Twice(lean), x)
    assert torch.equal(y, expected) and all(map(torch.equal, grads, expected_grads))
    plain, lean = pair(width=(12, 12))
    assert_same((Twice(plain), Twice(lean)), x)


def test_copies_pickles_and_state_dicts():
    plain, lean = pair()
    x = torch.randn(5, 12, dtype=torch.float64)
    for other in (copy.deepcopy(lean), pickle.loads(pickle.dumps(lean))):
        assert type(other) is LeanLoRALinear and torch.equal(other(x), lean(x))
        assert other.lora_a is not lean.lora_a
    assert list(lean.state_dict()) == list(plain.state_dict())
    assert torch.equal(lean.delta_weight(), plain.delta_weight())


def test_the_config_chooses_the_class():
    def build(implementation):
        lora = {"targets": ["0"], "implementation": implementation}
        return build_lora_model(nn.Sequential(nn.Linear(4, 4)), lora)

    assert type(build("lean")[0]) is LeanLoRALinear and type(build("plain")[0]) is LoRALinear
    assert [name for name, _ in lora_layers(build("lean"))] == ["0"]


def test_what_is_kept_is_the_dropped_input_its_mask_and_the_low_product():
    x = torch.randn(100, 64, requires_grad=True)
    for dropout, kept in ((0.1, 100 * 64 * 5), (0.0, 100 * 64 * 4)):
        layer = LeanLoRALinear(nn.Linear(64, 64).requires_grad_(False), 4, 8, dropout)
        with Saved(layer.parameters()) as saved:
            layer(x)
        assert saved.total == kept + 100 * 4 * 4 + layer.lora_b.nbytes  # and B times s
    with Saved(()) as saved, torch.no_grad():
        layer(x)
    assert saved.total == 0


def test_factors_are_cast_once_in_a_forward_pass_and_again_in_no_checkpoint():
    """`shared` makes them; the second run of a checkpoint, after the block, takes those of the first."""
    _, lean = pair(torch.float32, dropout=0.2, width=(12, 12))
    made, factors = [], lean._factors_for
    lean._factors_for = lambda dtype: made.append(dtype) or factors(dtype)
    x = torch.randn(5, 12, requires_grad=True)
    results = []
    for run in (lambda: lean(lean(x)), lambda: checkpointed(lambda x: lean(lean(x)), x)):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16), sharing():
            y = run()
        results.append(torch.autograd.grad(y.sum(), (x, lean.lora_a, lean.lora_b)))
    assert made == [torch.bfloat16] * 2 and all(map(torch.equal, *results))
    lean(lean(x))
    assert len(made) == 4  # without the block each use makes its own


def test_the_output_may_be_written_to_in_place():
    layers = pair()
    x = torch.randn(2, 6, 12, dtype=torch.float64, requires_grad=True)

    def rotated(layer):  # as SAM 2's rotary attention does with its keys
        keys = layer(x).view(2, 6, 2, 12).transpose(1, 2)
        keys[:, :, :3] = 2 * keys[:, :, :3]
        return torch.autograd.grad(keys.square().sum(), (x, layer.lora_a, layer.lora_b))

    for grad, expected in zip(*map(rotated, layers), strict=True):
        torch.testing.assert_close(grad, expected)


def test_nothing_of_the_input_is_kept_where_a_is_frozen():
    layer = LeanLoRALinear(nn.Linear(64, 64).requires_grad_(False), 4, 8)
    layer.lora_a.requires_grad_(False)
    with Saved(list(layer.parameters())) as saved:
        y = layer(torch.randn(100, 64, requires_grad=True))
    assert saved.total == 100 * 4 * 4 + layer.lora_b.nbytes
    y.sum().backward()
    assert layer.lora_b.grad is not None and layer.lora_a.grad is None
