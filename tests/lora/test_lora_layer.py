"""LoRALinear: exact identities, closed forms, PEFT as an independent implementation, gradients, life cycle."""

import copy
import math
import pickle
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from torch.nn import functional as F

from sam2_lora_ext.lora import LoRALinear

PARTS = [(True,), (True, False, True), (False, True, True), (False, True, False), (True, True, True)]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def make(inputs: int = 8, outputs: int = 12, rank: int = 2, alpha: float = 4, **kwargs) -> LoRALinear:
    """A layer with a B that is not zero, so that its update does something."""
    layer = LoRALinear(nn.Linear(inputs, outputs), rank, alpha, **kwargs)
    nn.init.normal_(layer.lora_b)
    return layer


def test_adopts_the_same_parameters_and_adds_two_bare_ones():
    base = nn.Linear(4, 6).eval()
    layer = LoRALinear(base, 2, 8, 0.1)
    assert layer.weight is base.weight and layer.bias is base.bias
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias", "lora_a", "lora_b"]
    assert (layer.lora_a.shape, layer.lora_b.shape, layer.scaling) == ((2, 4), (6, 2), 4.0)
    assert isinstance(layer, nn.Linear) and not layer.training and not list(layer.buffers())
    assert set(base.state_dict()) == {"weight", "bias"}
    assert repr(layer) == "LoRALinear(in_features=4, out_features=6, bias=True, rank=2, alpha=8, dropout=0.1)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("bias", [True, False])
def test_at_step_zero_the_output_is_bitwise_the_base(parts, bias, dtype):
    base = nn.Linear(8, 12, bias=bias, dtype=dtype)
    layer = LoRALinear(base, 3, 16, 0.3, parts)
    x = torch.randn(5, 7, 8, dtype=dtype)
    assert torch.equal(layer(x), base(x))
    assert layer.lora_a.dtype == layer.lora_b.dtype == dtype


def test_closed_form_on_two_by_two():
    layer = LoRALinear(nn.Linear(2, 2), 1, 3.0)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        layer.bias.copy_(torch.tensor([10.0, 20.0]))
        layer.lora_a.copy_(torch.tensor([[1.0, -1.0]]))
        layer.lora_b.copy_(torch.tensor([[2.0], [5.0]]))
    x = torch.tensor([3.0, 1.0])  # A x = 2, B A x = (4, 10), scaled by 3: (12, 30); W x + b = (15, 33)
    assert layer(x).tolist() == [27.0, 63.0]
    assert layer.delta_weight().tolist() == [[6.0, -6.0], [15.0, -15.0]]


def test_closed_form_of_a_fused_layer():
    layer = LoRALinear(nn.Linear(2, 3, bias=False), 1, 2.0, parts=(True, False, True))
    with torch.no_grad():
        layer.weight.zero_()
        layer.lora_a.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))  # q reads x0, v reads x1
        layer.lora_b.copy_(torch.tensor([[5.0], [7.0]]))
    assert layer(torch.tensor([3.0, 4.0])).tolist() == [30.0, 0.0, 56.0]
    assert layer.delta_weight().tolist() == [[10.0, 0.0], [0.0, 0.0], [0.0, 14.0]]


@pytest.mark.parametrize("parts", PARTS)
def test_a_fused_layer_is_its_parts_as_layers_of_their_own(parts):
    """q, k and v as three separate layers give the same outputs; those not adapted stay bitwise the base's."""
    layer = make(8, 12, 3, parts=parts).double()
    base = F.linear(x := torch.randn(6, 8, dtype=torch.float64), layer.weight, layer.bias)
    a, b = iter(layer.lora_a.split(3)), iter(layer.lora_b.chunk(sum(parts)))
    for adapted, y, y_base in zip(parts, layer(x).chunk(len(parts), -1), base.chunk(len(parts), -1)):
        if adapted:
            torch.testing.assert_close(y, y_base + layer.scaling * F.linear(F.linear(x, next(a)), next(b)))
        else:
            assert torch.equal(y, y_base)


@given(
    inputs=st.integers(1, 9),
    part=st.integers(1, 5),
    rank=st.integers(1, 12),
    parts=st.sampled_from(PARTS),
    alpha=st.floats(0.1, 64),
    rslora=st.booleans(),
    shape=st.lists(st.integers(0, 3), min_size=0, max_size=3),
)
@settings(max_examples=60, deadline=None)
def test_the_forward_pass_is_the_weight_plus_its_delta(inputs, part, rank, parts, alpha, rslora, shape):
    layer = make(inputs, part * len(parts), rank, alpha=alpha, rslora=rslora, parts=parts).double()
    x = torch.randn(*shape, inputs, dtype=torch.float64)
    y = layer(x)
    assert y.shape == (*shape, part * len(parts))
    torch.testing.assert_close(y, F.linear(x, layer.weight + layer.delta_weight(), layer.bias), rtol=1e-10, atol=1e-10)
    assert torch.linalg.matrix_rank(layer.delta_weight()) <= sum(parts) * rank


def test_delta_in_float64_is_exact_where_float32_rounds():
    layer = make(64, 64, 8)
    exact = layer.scaling * (layer.lora_b.double() @ layer.lora_a.double())
    assert torch.equal(layer.delta_weight(torch.float64), exact)
    assert layer.delta_weight().dtype == torch.float32 and not torch.equal(layer.delta_weight().double(), exact)


@pytest.mark.parametrize("rslora, expected", [(False, 16 / 4), (True, 16 / 2)])
def test_scaling(rslora, expected):
    assert make(rank=4, alpha=16, rslora=rslora).scaling == expected


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("rank, alpha", [(1, 1), (3, 16), (8, 16)])
def test_peft_gives_bitwise_the_same_output(rank, alpha, rslora):
    from peft.tuners.lora import Linear as PeftLinear
    from peft.tuners.lora import LoraConfig

    layer = make(16, 24, rank, alpha=alpha, rslora=rslora)
    config = LoraConfig(r=rank, lora_alpha=alpha, use_rslora=rslora)
    other = PeftLinear(nn.Linear(16, 24), "default", config, r=rank, lora_alpha=alpha)
    with torch.no_grad():
        other.base_layer.weight.copy_(layer.weight)
        other.base_layer.bias.copy_(layer.bias)
        other.lora_A["default"].weight.copy_(layer.lora_a)
        other.lora_B["default"].weight.copy_(layer.lora_b)
    x = torch.randn(3, 5, 16)
    assert torch.equal(layer(x), other(x))
    torch.testing.assert_close(layer.delta_weight(), other.get_delta_weight("default"))
    for ours, theirs in zip((layer.lora_a, layer.lora_b), (other.lora_A, other.lora_B)):
        gradients = [
            torch.autograd.grad(model(x).square().sum(), parameter)[0]
            for model, parameter in ((layer, ours), (other, theirs["default"].weight))
        ]
        torch.testing.assert_close(*gradients)


def test_a_starts_uniform_as_a_linear_layer_does_and_b_zero():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(400, 30), 50, 16)
    bound = 1 / math.sqrt(400)
    values = layer.lora_a.detach().flatten().numpy()
    assert not layer.lora_b.any() and abs(values).max() <= bound
    assert stats.kstest(values, stats.uniform(-bound, 2 * bound).cdf).pvalue > 0.01  # seeded: no flake
    torch.manual_seed(1)
    again = LoRALinear(nn.Linear(400, 30), 50, 16)
    assert not torch.equal(layer.lora_a, again.lora_a)


def test_dropout_zeroes_its_share_of_the_adapters_input_in_training_only():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(1, 1, bias=False), 1, 1.0, dropout=0.25)
    with torch.no_grad():
        layer.weight.zero_(), layer.lora_a.fill_(1), layer.lora_b.fill_(1)
    x = torch.ones(40_000, 1)
    y = layer(x)
    assert y.detach().unique().tolist() == pytest.approx([0.0, 1 / 0.75])  # what is kept is scaled up
    assert (y == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)  # 4.6 standard deviations of 40,000 draws
    assert not torch.equal(y, layer(x))
    layer.eval()
    assert torch.equal(layer(x), x)
    layer.train().dropout = 0.0
    assert torch.equal(layer(x), x)


@pytest.mark.parametrize("parts", [(True,), (True, False, True)])
def test_gradcheck_of_every_input(parts):
    layer = make(3, 6, 2, parts=parts).double()

    def run(x, weight, bias, lora_a, lora_b):
        values = {"weight": weight, "bias": bias, "lora_a": lora_a, "lora_b": lora_b}
        return torch.func.functional_call(layer, values, (x,))

    values = [torch.randn(2, 2, 3, dtype=torch.float64)] + [value.detach().clone() for value in layer.parameters()]
    assert torch.autograd.gradcheck(run, [value.requires_grad_() for value in values])


@pytest.mark.parametrize("parts", [(True,), (True, False, True)])
@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8), (2, 4, 5, 8), (0, 8), (2, 0, 8), (0, 7, 7, 8)])
def test_any_number_of_dimensions_and_empty_batches_also_backwards(shape, parts):
    layer = make(parts=parts)
    layer(torch.randn(shape)).sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad.isfinite().all()
    if 0 in shape:
        assert not layer.lora_a.grad.any() and not layer.lora_b.grad.any()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@pytest.mark.parametrize("parts", [(True,), (True, False, True)])
def test_copies_are_equal_and_independent(duplicate, parts):
    layer = make(parts=parts, dropout=0.1, rslora=True).eval()
    other = duplicate(layer)
    x = torch.randn(3, 8)
    assert torch.equal(layer(x), other(x)) and repr(layer) == repr(other)
    with torch.no_grad():
        other.lora_b.add_(1)
    assert not torch.equal(layer(x), other(x))


@pytest.mark.parametrize("parts", [(True,), (True, False, True)])
def test_compiles_into_one_graph_with_the_same_numbers(parts):
    layer = make(16, 24, 4, parts=parts)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 5, 16)
    torch.testing.assert_close(compiled(x), layer(x))
    adapter = [layer.lora_a, layer.lora_b]
    torch.testing.assert_close(
        torch.autograd.grad(compiled(x).square().sum(), adapter), torch.autograd.grad(layer(x).square().sum(), adapter)
    )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_the_default_compiler_gives_the_same_numbers():
    layer = make(16, 24, 4, dropout=0.1).eval()
    x = torch.randn(3, 16)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))


@pytest.mark.parametrize("parts", [(True,), (True, False, True)])
def test_autocast_computes_in_bfloat16_and_keeps_float32_gradients(parts):
    layer = make(parts=parts)
    x = torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and layer.lora_a.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.1)  # bfloat16 keeps 8 bits


def test_a_layer_used_twice_and_without_gradients():
    layer = make(8, 8)
    x = torch.randn(3, 8)
    with torch.no_grad():
        once = layer(x)
        assert torch.equal(
            layer(once),
            F.linear(once, layer.weight, layer.bias)
            + layer.scaling * F.linear(F.linear(once, layer.lora_a), layer.lora_b),
        )
    layer(layer(x)).sum().backward()
    assert layer.lora_a.grad.any() and layer.lora_b.grad.any()
    torch.testing.assert_close(layer(x.t().contiguous().t()), layer(x))  # not contiguous: another order of sums


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"rank": 0}, "rank of at least 1"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": -0.1}, "dropout"),
        ({"parts": (False,)}, "parts"),
        ({"parts": ()}, "parts"),
        ({"outputs": 10, "parts": (True, True, False)}, "10 outputs"),
    ],
)
def test_refuses_numbers_out_of_range(kwargs, words):
    with pytest.raises(ValueError, match=words):
        make(**kwargs)
