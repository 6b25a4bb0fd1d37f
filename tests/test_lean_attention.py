"""The mask decoder's attention without projections of the image computes what stock's does, and keeps less."""

import copy
from unittest import mock

import pytest
import torch
from sam2.modeling.sam.transformer import Attention
from torch import nn

from benchmarks.measure import Saved
from sam2_lora_ext.lean.attention import LeanAttention, _Mixed, _Scores
from sam2_lora_ext.lean.recompute import recomputing
from sam2_lora_ext.lora import build_lora_model
from sam2_lora_ext.lora.lean import drawn_gaps

pytestmark = pytest.mark.usefixtures("lean_however_small")

CHANNELS, HEADS = 32, 2  # and 16 / 2 channels a head: as many prompt tokens at most
DIRECTIONS = ["prompt", "image"]  # which asks the other
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


def twins(targets=PROJECTIONS, dropout=0.0, dtype=torch.float64, variant="lora", std=0.4):
    """A stock attention, adapted, whose projections are frozen, and its lean copy."""
    torch.manual_seed(0)
    stock = Attention(CHANNELS, HEADS, downsample_rate=2).to(dtype)
    if targets:
        build_lora_model(stock, {"targets": list(targets), "rank": 3, "dropout": dropout, "implementation": "lean", "variant": variant})
    stock.requires_grad_(False)
    for name, parameter in stock.named_parameters():
        nn.init.normal_(parameter, std=std)
        parameter.requires_grad_("lora" in name)
    lean = copy.deepcopy(stock)
    lean.__class__ = LeanAttention
    return stock, lean


def inputs(direction, few=5, many=40, dtype=torch.float64):
    torch.manual_seed(1)
    prompt, placed, image = (torch.randn(2, tokens, CHANNELS, dtype=dtype) for tokens in (few, many, many))
    return [prompt, placed, image] if direction == "prompt" else [placed, prompt, torch.randn_like(prompt)]


def results(module, xs, seed=3, wanted=(True, True, True)):
    """The output and the gradients of inputs and adapters."""
    leaves = [x.clone().requires_grad_(want) for x, want in zip(xs, wanted)]
    torch.manual_seed(seed)
    y = module(*leaves)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(4), dtype=y.dtype)
    asked = [leaf for leaf in [*leaves, *module.parameters()] if leaf.requires_grad]
    return [y, *torch.autograd.grad(y, asked, weights)]


def absorbs(module, xs):
    """Whether `module` goes another way than stock's."""
    with mock.patch.object(Attention, "forward", side_effect=AssertionError("stock")):
        try:
            module(*xs)
        except AssertionError:
            return False
    return True


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("targets", [PROJECTIONS, ("q_proj", "v_proj"), ("k_proj",), ("out_proj",)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_equals_stock_with_the_same_zeros_of_the_dropout(direction, targets, dropout):
    stock, lean = twins(targets, dropout)
    assert absorbs(lean, inputs(direction))
    for few, many in ((5, 40), (1, 40), (8, 40), (5, 6)):
        for wanted in ((True, True, True), (True, False, True), (False, True, False)):
            xs = inputs(direction, few, many)
            for got, expected in zip(results(lean, xs, wanted=wanted), results(stock, xs, wanted=wanted), strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    if dropout:
        assert not torch.equal(results(lean, xs, seed=3)[0], results(lean, xs, seed=5)[0])


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_selective_recomputation_changes_nothing(direction):
    _, lean = twins(dropout=0.3)
    xs = inputs(direction)
    with recomputing():
        got = results(lean, xs)
    assert all(map(torch.equal, got, results(lean, xs)))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_within_its_rounding(direction, dtype):
    stock, lean = twins(dtype=torch.float32, std=0.2)
    xs = inputs(direction, dtype=torch.float32)
    exact = results(stock, xs)
    with torch.autocast("cpu", dtype):
        assert absorbs(lean, xs)
        got, rounded = results(lean, xs), results(stock, xs)
    for one, other, true in zip(got, rounded, exact, strict=True):
        assert one.dtype == other.dtype
        assert (one - true).norm() <= 2 * (other - true).norm() + 1e-6 * true.norm()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_without_a_graph_and_in_evaluation(direction):
    stock, lean = (module.eval() for module in twins(dropout=0.3))
    xs = inputs(direction)
    with torch.no_grad():
        torch.testing.assert_close(lean(*xs), stock(*xs))
    assert absorbs(lean, xs)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_goes_stocks_way_where_it_must(direction):
    xs = inputs(direction)
    _, lean = twins(dropout=0.3)
    assert not absorbs(lean, inputs(direction, few=9))  # more than a head has channels: stock's needs fewer FLOPs
    lean.dropout_p = 0.1  # of the attention's weights
    assert not absorbs(lean, xs)
    assert absorbs(lean.eval(), xs)
    name = "v_proj" if direction == "prompt" else "q_proj"
    for spoil in (lambda layer: layer.weight.requires_grad_(), lambda layer: layer.register_forward_hook(print)):
        _, lean = twins()
        spoil(lean.get_submodule(name))
        assert not absorbs(lean, xs)
    _, lean = twins(variant="dora")
    assert not absorbs(lean, xs)


def test_small_inputs_go_the_plain_way(monkeypatch):
    monkeypatch.setattr("sam2_lora_ext.lora.lean.SMALL", 2 * 40 * CHANNELS)
    _, lean = twins()
    assert not absorbs(lean, inputs("prompt")) and absorbs(lean, inputs("prompt", many=41))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_no_projection_of_the_image_is_kept(direction):
    stock, lean = twins(dtype=torch.float32)
    few, many = 2, 400
    kept = []
    for module in (lean, stock):
        xs = [x.requires_grad_() for x in inputs(direction, few, many, torch.float32)]
        with Saved([*module.parameters(), *xs]) as saved:
            module(*xs)
        kept.append(saved.total)
    projections = 2 * many * CHANNELS // 2 * 4
    attention, low = 2 * HEADS * few * many * 4, 2 * many * 3 * 4
    if direction == "prompt":
        assert 0 <= kept[0] - attention - 2 * low < projections / 4  # the rest is of the prompt
        assert kept[1] > 2 * projections
    else:  # what the last projection reads is there in both
        assert 0 <= kept[0] - attention - 2 * low - projections < projections / 4
        assert kept[1] > 2 * projections


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_of_the_two_functions(dropout):
    torch.manual_seed(0)
    q, u, x, a, p = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 4), (2, 3, 2), (2, 5, 4), (2, 4), (2, 3, 5)))
    gaps = drawn_gaps(10, 4, dropout, x.device) if dropout else None
    assert torch.autograd.gradcheck(lambda *args: _Scores.apply(*args, gaps), (q, u, x, a))
    assert torch.autograd.gradcheck(lambda *args: _Mixed.apply(*args, gaps), (p, x, a))


def test_compiles_as_a_whole():
    _, lean = twins(dtype=torch.float32)
    for direction in DIRECTIONS:
        xs = inputs(direction, dtype=torch.float32)
        got = results(torch.compile(lean, fullgraph=True, backend="aot_eager"), xs)
        for one, other in zip(got, results(lean, xs), strict=True):
            torch.testing.assert_close(one, other)
