"""LeanLoRALinear against the plain layer, which is its oracle, and against finite differences."""

import copy
import math
import pickle
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks.measure import Saved
from sam2_lora_ext.lora import LoRALinear, build_lora_model, lora_layers
from sam2_lora_ext.lora.lean import SMALL, LeanLoRALinear, drawn_gaps, drop, places_of

QKV = (True, False, True)
pytestmark = pytest.mark.usefixtures("lean_however_small")


def pair(dtype=torch.float64, parts=(True,), bias=True, dropout=0.0, frozen=True, width=(12, 24)):
    """A plain and a lean layer with the same parameters and a B that is not zero."""
    torch.manual_seed(0)
    base = nn.Linear(*width, bias=bias).to(dtype).requires_grad_(not frozen)
    plain = LoRALinear(base, 4, 8, dropout, parts)
    nn.init.normal_(plain.lora_b)
    lean = LeanLoRALinear(copy.deepcopy(base), 4, 8, dropout, parts)
    lean.load_state_dict(plain.state_dict())
    return plain, lean


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


@pytest.mark.parametrize("parts", [(True,), QKV, (False, True, False), (True,) * 3])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_outputs_apart_are_the_parts_of_the_output(parts, dropout):
    for frozen in (True, False):
        for part in (slice(None), slice(1, 2)):  # one alone: the others get no gradient
            _, lean = pair(parts=parts, dropout=dropout, frozen=frozen)
            x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
            results = []
            for outputs in (None, 3):
                torch.manual_seed(1)
                ys = lean(x) if outputs is None else lean(x, outputs=outputs)
                ys = torch.stack((ys.chunk(3, -1) if outputs is None else ys)[part])
                wanted = [x, *[p for p in lean.parameters() if p.requires_grad]]
                results.append([ys, *torch.autograd.grad(ys.square().sum(), wanted)])
            for got, expected in zip(*results, strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


def test_backward_under_autocast():
    _, lean = pair(torch.float32)
    x = torch.randn(5, 12, requires_grad=True)
    y = lean(x)
    expected = torch.autograd.grad(y.sum(), (x, lean.lora_a, lean.lora_b), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(y.sum(), (x, lean.lora_a, lean.lora_b))
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize(("parts", "outputs"), [(QKV, 2), (QKV, 1), ((True,), 5)])
def test_outputs_that_do_not_come_apart(parts, outputs):
    with pytest.raises(ValueError, match=f"do not come apart in {outputs}"):
        pair(parts=parts)[1](torch.randn(2, 12, dtype=torch.float64), outputs=outputs)


def test_a_small_input_can_come_apart_too(monkeypatch):
    monkeypatch.setattr("sam2_lora_ext.lora.lean.SMALL", SMALL)
    _, lean = pair()
    x = torch.randn(5, 12, dtype=torch.float64)
    assert torch.equal(torch.cat(lean(x, outputs=3), 1), lean(x))


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


@pytest.mark.parametrize("outputs", [None, 3])
@pytest.mark.parametrize("parts", [QKV, (True,)])
def test_under_autocast_the_error_is_that_of_plain(parts, outputs):
    plain, lean = pair(torch.float32, parts, width=(256, 384))
    if outputs:
        apart = lean.forward
        lean.forward = lambda x: torch.cat(apart(x, outputs=outputs), -1)
    x = torch.randn(64, 256, requires_grad=True)
    exact = gradients(copy.deepcopy(plain).double(), x.detach().double().requires_grad_())
    with torch.autocast("cpu", torch.bfloat16):
        results = [gradients(layer, x) for layer in (plain, lean)]
    assert results[1][0].dtype == torch.bfloat16 and all(grad.dtype == torch.float32 for grad in results[1][1])
    errors = [[(a - b).norm() / b.norm() for a, b in zip((y, *grads), (exact[0], *exact[1]), strict=True)]
              for y, grads in results]  # fmt: skip
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


def drawn_places(tokens, features, p):
    return places_of(drawn_gaps(tokens, features, p, torch.device("cpu")), tokens * features)


def test_dropout_is_the_formula():
    _, lean = pair(dropout=0.25)
    x = torch.randn(40, 12, dtype=torch.float64)
    torch.manual_seed(5)
    mask = drop(torch.ones_like(x), drawn_places(40, 12, 0.25))
    torch.manual_seed(5)
    expected = nn.functional.linear(x, lean.weight, lean.bias)
    expected = expected + lean.scaling * (x * mask / 0.75) @ lean.lora_a.T @ lean.lora_b.T
    torch.testing.assert_close(lean(x), expected)


@pytest.mark.parametrize("p", [0.01, 0.05, 0.5, 0.9])
def test_zeros_are_independent_and_at_the_right_rate(p):
    torch.manual_seed(0)
    zeros = drop(torch.ones(2000, 500), drawn_places(2000, 500, p)) == 0
    n = zeros.numel()
    deviation = (p * (1 - p) / n) ** 0.5
    assert abs(zeros.double().mean() - p) < 5 * deviation
    assert (zeros.double().mean(0) - p).abs().max() < 6 * (p * (1 - p) / 2000) ** 0.5  # every feature
    assert (zeros.double().mean(1) - p).abs().max() < 6 * (p * (1 - p) / 500) ** 0.5 + 0.01  # every token, to the last
    pairs = (zeros[:, 1:] & zeros[:, :-1]).double().mean()
    assert abs(pairs - p * p) < 6 * (p * p / n) ** 0.5


def test_gaps_take_two_bytes_where_that_is_enough():
    cpu = torch.device("cpu")
    assert torch.empty(2**22).uniform_(2**-24, 1).min() >= 2**-24
    for p, dtype in ((0.05, torch.int16), (0.0006, torch.int16), (0.0005, torch.int64), (1e-9, torch.int64)):
        with mock.patch("torch.Tensor.uniform_", lambda drawn, low, high: drawn.fill_(low)):
            gaps = drawn_gaps(1000, 100, p, cpu)
        expected = 1 + 24 * math.log(2) / p
        assert gaps.dtype == dtype and (gaps.double() - expected).abs().max() < 1 + 24 * p * expected


def test_places_never_run_over():
    assert places_of(torch.full((3,), 2**14, dtype=torch.int16), 2**20).tolist() == [2**14, 2**15, 3 * 2**14]
    assert places_of(torch.tensor([2, 2**40]), 2**33).tolist() == [2, 2**33]
    for p in (0.05, 1e-3, 1e-6, 1e-7, 1e-8, 1e-9):
        for _ in range(200):
            places = drawn_places(1, 2, p)
            assert 0 <= places.min() and places.max() <= 2


def test_tiny_inputs_get_each_pattern_at_its_rate():
    torch.manual_seed(0)
    patterns = torch.stack([drop(torch.ones(1, 2), drawn_places(1, 2, 0.5))[0] for _ in range(4000)])
    rates = (patterns @ torch.tensor([1.0, 2.0])).long().bincount(minlength=4) / 4000
    torch.testing.assert_close(rates, torch.full((4,), 0.25), atol=0.035, rtol=0)  # 5 deviations


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


def test_layers_that_share_an_input_keep_it_once():
    x = torch.randn(100, 64, requires_grad=True)
    layers = [LeanLoRALinear(nn.Linear(64, 64).requires_grad_(False), 4, 8, 0.1) for _ in range(3)]
    with Saved([p for layer in layers for p in layer.parameters()]) as saved:
        outputs = [layer(x) for layer in layers]
    functions = [output.grad_fn.next_functions[0][0] for output in outputs]  # below the view that restores the shape
    gaps = sum(2 * len(function.saved_tensors[-1]) for function in functions)
    assert saved.total == x.nbytes + 3 * 100 * 4 * 4 + gaps
    with Saved(()) as saved, torch.no_grad():
        layers[0](x)
    assert saved.total == 0


def test_a_small_input_goes_the_plain_way(monkeypatch):
    """To the bit, with the same zeros; one number more and it does not."""
    monkeypatch.setattr("sam2_lora_ext.lora.lean.SMALL", SMALL)
    plain, lean = pair(dropout=0.3, width=(16, 8))
    for tokens, same in ((SMALL // 16, True), (SMALL // 16 + 1, False)):
        results = []
        for layer in (plain, lean):
            torch.manual_seed(1)
            results.append(layer(torch.ones(tokens, 16, dtype=torch.float64)))
        assert torch.equal(*results) is same
    results = []
    for layer in (plain, lean):
        torch.manual_seed(1)
        results.append(layer(torch.ones(3, 16, 4, dtype=torch.float64).transpose(0, 2).transpose(1, 2)))
    assert torch.equal(*results)


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
    assert saved.total == 100 * 4 * 4
    y.sum().backward()
    assert layer.lora_b.grad is not None and layer.lora_a.grad is None
