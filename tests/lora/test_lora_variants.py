"""DoRA and PiSSA as layers: identities, closed forms, PEFT as the oracle, and the order build, then load."""

import copy
import pickle

import pytest
import torch
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraConfig
from torch import nn
from torch.nn import functional as F

from sam2_lora_ext.lora import LoRALinear
from sam2_lora_ext.lora.variants import LAYERS

IMPLEMENTATIONS = ["plain", "lean"]
VARIANTS = [(variant, implementation) for variant in ("dora", "pissa") for implementation in IMPLEMENTATIONS]
QV = (True, False, True)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def make(kind: tuple[str, str], base: nn.Linear | None = None, rank: int = 2, alpha: float = 4, **kwargs) -> LoRALinear:
    return LAYERS[kind](nn.Linear(16, 24) if base is None else base, rank, alpha, **kwargs)


def moved(layer: LoRALinear) -> LoRALinear:
    """Simulates training: changes every adapter parameter."""
    with torch.no_grad():
        for parameter in layer.adapter_parameters().values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def peft_of(layer: LoRALinear, **config) -> PeftLinear:
    """PEFT's layer on the same base, as PEFT starts it."""
    base = nn.Linear(layer.in_features, layer.out_features)
    base.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    settings = LoraConfig(r=layer.rank, lora_alpha=layer.alpha, use_rslora=layer.rslora, **config)
    return PeftLinear(base, "default", settings, r=layer.rank, lora_alpha=layer.alpha)


def peft_parameters(other: PeftLinear) -> dict[str, nn.Parameter]:
    named = {"lora_a": other.lora_A, "lora_b": other.lora_B, "lora_m": other.lora_magnitude_vector}
    return {name: entry["default"].weight for name, entry in named.items() if "default" in entry}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
def test_dora_begins_bitwise_as_the_base(implementation, dtype, bias):
    base = nn.Linear(16, 24, bias=bias, dtype=dtype)
    layer = make(("dora", implementation), base, dropout=0.3)
    x = torch.randn(5, 7, 16, dtype=dtype)
    assert torch.equal(layer(x), base(x)) and layer.lora_m.dtype == dtype
    assert torch.equal(layer.lora_m, base.weight.norm(dim=1))


def test_dora_closed_form():
    layer = make(("dora", "plain"), nn.Linear(2, 2), 1, 2.0)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 4.0], [0.0, 2.0]]))
        layer.bias.copy_(torch.tensor([10.0, 20.0]))
        layer.lora_a.copy_(torch.tensor([[1.0, 0.0]]))
        layer.lora_b.copy_(torch.tensor([[1.0], [0.0]]))
        layer.lora_m.copy_(torch.tensor([10.0, 3.0]))
    # W + s B A = [[3, 4], [0, 2]] with rows of length 5 and 2, brought to lengths 10 and 3: [[6, 8], [0, 3]]
    assert layer.merged_weight().tolist() == [[6.0, 8.0], [0.0, 3.0]]
    assert layer(torch.tensor([1.0, 1.0])).tolist() == [24.0, 23.0]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rslora", [False, True])
def test_dora_is_pefts(implementation, rslora):
    """Outputs, merged weights and gradients; PEFT too takes the norm as a constant."""
    layer = moved(make(("dora", implementation), rslora=rslora))
    other = peft_of(layer, use_dora=True)
    with torch.no_grad():
        for name, parameter in peft_parameters(other).items():
            parameter.copy_(layer.get_parameter(name))
    x = torch.randn(3, 5, 16)
    torch.testing.assert_close(layer(x), other(x))
    for name, parameter in peft_parameters(other).items():
        gradients = [
            torch.autograd.grad(model(x).square().sum(), value)[0]
            for model, value in ((layer, layer.get_parameter(name)), (other, parameter))
        ]
        torch.testing.assert_close(*gradients)
    other.merge()
    torch.testing.assert_close(layer.merged_weight(), other.base_layer.weight)


def test_dora_of_a_row_of_zeros_is_finite():
    base = nn.Linear(4, 3)
    nn.init.zeros_(base.weight[1])
    layer = make(("dora", "plain"), base)
    layer(torch.randn(5, 4)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.adapter_parameters().values())
    assert layer.merged_weight().isfinite().all()


@pytest.mark.parametrize("kind", VARIANTS)
@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 4, 5, 16), (0, 16)])
def test_the_forward_pass_is_the_merged_weight(kind, shape):
    layer = moved(make(kind)).double()
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.linear(x, layer.merged_weight(), layer.bias))


@pytest.mark.parametrize("parts", [(True,), QV])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_pissa_begins_with_the_largest_singular_values_and_computes_the_base(implementation, parts):
    base = nn.Linear(16, 24)
    layer = make(("pissa", implementation), base, 3, 6, parts=parts, dropout=0.2)
    x = torch.randn(5, 16)
    torch.testing.assert_close(layer(x), base(x))  # not bitwise: B A - B0 A0 is one product
    assert torch.equal(layer.lora_a, layer.lora_a0) and torch.equal(layer.lora_b, layer.lora_b0)
    assert layer.weight is base.weight
    a, b = iter(layer.lora_a.split(3)), iter(layer.lora_b.chunk(sum(parts)))
    for adapted, part in zip(parts, base.weight.chunk(len(parts))):
        if adapted:
            rest = part - layer.scaling * next(b) @ next(a)
            expected = torch.linalg.svdvals(part)
            expected[:3] = 0
            torch.testing.assert_close(torch.linalg.svdvals(rest), expected.sort(descending=True).values)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_trains_as_pefts(implementation, rslora):
    """PEFT subtracts the initial update from the base's weight, we from the output: the same steps of AdamW."""
    layer = make(("pissa", implementation), rank=3, rslora=rslora)
    other = peft_of(layer, init_lora_weights="pissa")
    assert all(torch.equal(layer.get_parameter(name), value) for name, value in peft_parameters(other).items())
    models = (layer, list(layer.adapter_parameters().values())), (other, list(peft_parameters(other).values()))
    optimizers = [torch.optim.AdamW(parameters, lr=0.01) for _, parameters in models]
    for _ in range(5):
        x, target = torch.randn(32, 16), torch.randn(32, 24)
        for (model, _), optimizer in zip(models, optimizers):
            optimizer.zero_grad()
            F.mse_loss(model(x), target).backward()
            optimizer.step()
    for name, value in peft_parameters(other).items():
        assert not torch.equal(value, layer.get_buffer(f"{name}0"))
        torch.testing.assert_close(layer.get_parameter(name), value, rtol=1e-4, atol=1e-5)  # five steps add up
    torch.testing.assert_close(layer(x), other(x), rtol=1e-4, atol=1e-5)  # five steps add up
    other.merge()
    torch.testing.assert_close(layer.merged_weight(), other.base_layer.weight, rtol=1e-4, atol=1e-5)  # likewise


@pytest.mark.parametrize("kind", VARIANTS)
def test_it_begins_again_when_a_base_is_loaded_and_not_when_a_checkpoint_is(kind):
    """The order of the stock Trainer: build, load the base, and on a resume the checkpoint of what is trained."""
    layer, other = make(kind), nn.Linear(16, 24)
    missing = layer.load_state_dict(other.state_dict(), strict=False).missing_keys
    assert missing == list(layer.adapter_state()) and all(key.startswith("lora_") for key in missing)
    fresh = make(kind, other)
    for key in set(missing) - {"lora_a", "lora_b"} if kind[0] == "dora" else missing:
        assert torch.equal(layer.state_dict()[key], fresh.state_dict()[key]), key

    moved(layer)
    checkpoint = {key: value.clone() for key, value in layer.adapter_state().items()}
    resumed = make(kind)
    resumed.load_state_dict(other.state_dict(), strict=False)
    resumed.load_state_dict(checkpoint, strict=False)
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in layer.state_dict().items())
    x = torch.randn(3, 16)
    assert torch.equal(resumed(x), layer(x))
    whole = make(kind)
    whole.load_state_dict(layer.state_dict())
    assert torch.equal(whole(x), layer(x))


@pytest.mark.parametrize("variant", ["dora", "pissa"])
def test_lean_and_plain_are_the_same(variant):
    plain, lean = (moved(make((variant, implementation))) for implementation in IMPLEMENTATIONS)
    lean.load_state_dict(plain.state_dict())
    x = torch.randn(4, 16, requires_grad=True)
    results = []
    for layer in (plain, lean):
        y = layer(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.adapter_parameters().values()])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", VARIANTS)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies(kind, duplicate):
    layer = moved(make(kind)).eval()
    other = duplicate(layer)
    x = torch.randn(3, 16)
    assert torch.equal(layer(x), other(x)) and other.lora_a is not layer.lora_a


@pytest.mark.parametrize("kind", VARIANTS)
def test_autocast_keeps_float32_gradients(kind):
    layer, x = moved(make(kind)), torch.randn(4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(parameter.grad.dtype == torch.float32 for parameter in layer.adapter_parameters().values())
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.1)  # bfloat16 keeps 8 bits


@pytest.mark.parametrize("variant", ["dora", "pissa"])
def test_compiles_into_one_graph(variant):
    layer, x = moved(make((variant, "plain"))), torch.randn(3, 16)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@pytest.mark.parametrize(
    "kind, kwargs, words",
    [
        (("dora", "plain"), {"parts": QV}, "DoRA cannot adapt the parts"),
        (("pissa", "plain"), {"rank": 17}, "starts with 17 singular values, the weight has 16"),
        (("pissa", "lean"), {"rank": 9, "parts": QV}, "starts with 9 singular values, the weight has 8"),
    ],
)
def test_refusals(kind, kwargs, words):
    with pytest.raises(ValueError, match=words):
        make(kind, **kwargs)
