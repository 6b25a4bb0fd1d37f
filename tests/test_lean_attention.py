"""The mask decoder's attention without projections of the image computes what stock's does, and keeps less."""

import contextlib
import copy
import pickle
from unittest import mock

import pytest
import torch
from sam2.modeling.sam.transformer import Attention
from torch import nn

from benchmarks.measure import LiveBytes
from benchmarks.methods import build, make_batch
from sam2_lora_ext.lean.attention import LeanAttention, Projection, _Scores, _WeightedSums
from sam2_lora_ext.lean.recompute import recomputing
from sam2_lora_ext.lora import build_lora_model
from sam2_lora_ext.lora.lean import drawn_gaps

pytestmark = pytest.mark.usefixtures("lean_however_small")

CHANNELS, HEADS = 32, 2  # and 16 / 2 channels a head: as many prompt tokens at most
DIRECTIONS = ["prompt", "image"]  # which asks the other
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


def twins(targets=PROJECTIONS, dropout=0.0, dtype=torch.float64, std=0.4, bias=True, **lora):
    """A stock attention, adapted, whose projections are frozen, and its lean copy."""
    torch.manual_seed(0)
    stock = Attention(CHANNELS, HEADS, downsample_rate=2).to(dtype)
    if not bias:
        for projection in stock.children():
            projection.bias = None
    build_lora_model(stock, {"targets": list(targets), "rank": 3, "dropout": dropout, "implementation": "lean", **lora})
    for parameter in stock.parameters():
        nn.init.normal_(parameter, std=std)
    lean = copy.deepcopy(stock)
    lean.__class__ = LeanAttention
    return stock, lean


def inputs(direction, few=5, many=40, dtype=torch.float64, objects=2):
    torch.manual_seed(1)
    prompt, placed, image = (torch.randn(objects, tokens, CHANNELS, dtype=dtype) for tokens in (few, many, many))
    return [prompt, placed, image] if direction == "prompt" else [placed, prompt, torch.randn_like(prompt)]


def results(module, xs, seed=3, wanted=(True, True, True), parameters=None):
    """The output and the gradients of inputs and adapters."""
    leaves = [x.clone().requires_grad_(want) for x, want in zip(xs, wanted)]
    torch.manual_seed(seed)
    y = module(*leaves)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(4), dtype=y.dtype)
    asked = [leaf for leaf in [*leaves, *(parameters or module).parameters()] if leaf.requires_grad]
    return [y, *torch.autograd.grad(y, asked, weights)]


def absorbs(module, xs):
    """Whether `module` goes another way than stock's."""
    with mock.patch.object(Attention, "forward", side_effect=AssertionError("stock")):
        try:
            module(*xs)
        except AssertionError:
            return False
    return True


def assert_equal_results(lean, stock, xs, **kwargs):
    for got, expected in zip(results(lean, xs, **kwargs), results(stock, xs, **kwargs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("targets", [PROJECTIONS, ("q_proj", "v_proj"), ("k_proj",), ("out_proj",)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_equals_stock_with_the_same_zeros_of_the_dropout(direction, targets, dropout):
    stock, lean = twins(targets, dropout)
    adapted = {"q_proj"} if direction == "image" else {"k_proj", "v_proj"}
    for few, objects in ((5, 2), (1, 2), (8, 2), (5, 1)):
        xs = inputs(direction, few, objects=objects)
        assert absorbs(lean, xs) is bool(adapted & set(targets))  # else nothing would keep the image's tokens
        for wanted in ((True, True, True), (True, False, True), (False, True, False)):
            assert_equal_results(lean, stock, xs, wanted=wanted)
    if dropout:
        assert not torch.equal(results(lean, xs, seed=3)[0], results(lean, xs, seed=5)[0])


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_equals_stock_in_every_layout_without_biases_and_pickled(direction):
    stock, lean = twins(dropout=0.3, bias=False)
    lean = pickle.loads(pickle.dumps(lean))
    xs = inputs(direction)
    for layout in (lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), lambda x: x[:1].expand(2, -1, -1)):
        assert absorbs(lean, [layout(x) for x in xs])
        results_of = [results(lambda *leaves, of=of: of(*map(layout, leaves)), xs, parameters=of) for of in (lean, stock)]
        for got, expected in zip(*results_of, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_backward_under_autocast(direction):
    _, lean = twins(dtype=torch.float32)
    xs = [x.requires_grad_() for x in inputs(direction, dtype=torch.float32)]
    y = lean(*xs)
    expected = torch.autograd.grad(y.sum(), xs, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(y.sum(), xs)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05 * other.abs().max().item())  # torch's own products round


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
def test_goes_stocks_way_where_nothing_is_gained(direction):
    xs = inputs(direction)
    _, lean = twins(dropout=0.3)
    assert not absorbs(lean, inputs(direction, few=9))  # more than a head has channels
    assert not absorbs(lean, inputs(direction, few=5, many=10)) and absorbs(lean, inputs(direction, few=5, many=11))
    assert not absorbs(lean, [torch.randn(9, 8, CHANNELS, dtype=torch.float64)] * 3)  # the prompt's own attention
    lean.dropout_p = 0.1  # of the attention's weights
    assert not absorbs(lean, xs)
    assert absorbs(lean.eval(), xs)
    assert not absorbs(twins(variant="dora")[1], xs)
    assert not absorbs(twins(freeze_a=True)[1], xs)  # a layer then keeps no input


@pytest.mark.parametrize(
    "spoil",
    [lambda layer: layer.weight.requires_grad_(), lambda layer: layer.bias.requires_grad_(),
     lambda layer: layer.register_forward_pre_hook(print), lambda layer: layer.register_forward_hook(print),
     lambda layer: layer.register_full_backward_pre_hook(print), lambda layer: layer.register_full_backward_hook(print)],
)  # fmt: skip
@pytest.mark.parametrize(("direction", "name"), [("prompt", "k_proj"), ("prompt", "v_proj"), ("image", "q_proj")])
def test_goes_stocks_way_where_a_projection_is_trained_or_has_hooks(direction, name, spoil):
    _, lean = twins()
    assert absorbs(lean, inputs(direction))
    spoil(lean.get_submodule(name))
    assert not absorbs(lean, inputs(direction))


def test_small_inputs_go_the_plain_way(monkeypatch):
    monkeypatch.setattr("sam2_lora_ext.lora.lean.SMALL", 2 * 40 * CHANNELS)
    _, lean = twins()
    assert not absorbs(lean, inputs("prompt")) and absorbs(lean, inputs("prompt", many=41))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("again", [False, True])
def test_no_projection_of_the_image_is_kept(direction, again):
    few, many = 2, 400
    kept = []
    for module in reversed(twins(dtype=torch.float32)):
        xs = [x.requires_grad_() for x in inputs(direction, few, many, torch.float32)]
        with LiveBytes([*module.parameters(), *xs]) as live, recomputing(again):
            y = module(*xs)
        kept.append(live.now - y.nbytes)
        y.sum().backward()
    projection = 2 * many * CHANNELS // 2 * 4
    attention, low = 2 * HEADS * few * many * 4, 2 * many * 3 * 4
    own = attention + 2 * low + (projection if direction == "image" and not again else 0)  # what the last projection reads
    assert 0 <= kept[0] - own < projection / 4  # the rest is of the prompt
    assert kept[1] > 2 * projection


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_of_the_two_functions(dropout):
    torch.manual_seed(0)
    shapes = (2, 2, 3, 4), (2, 5, 6), (2, 4, 6), (2, 4, 1), (2, 6), (2, 4, 2), (2, 6, 5)
    q, x, weight, bias, a, b, p = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    gaps = drawn_gaps(10, 6, dropout, x.device) if dropout else None
    for tensor in (q, x, a, b, p):
        tensor.requires_grad_()
    for function, first in ((_Scores, q), (_WeightedSums, p)):
        for adapter in ((a, b), ()):
            for constant in (bias, None):

                def called(first, x, *adapter):
                    return function.apply(first, x, weight, constant, *(adapter or (None, None)), 0.7, gaps)

                assert torch.autograd.gradcheck(called, (first, x, *adapter))


def test_compiles_as_a_whole():
    _, lean = twins(dtype=torch.float32)
    for direction in DIRECTIONS:
        xs = inputs(direction, dtype=torch.float32)
        got = results(torch.compile(lean, fullgraph=True, backend="aot_eager"), xs)
        for one, other in zip(got, results(lean, xs), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("preset", ["fast", "default", "low"])
def test_a_step_of_sam2_tiny(preset):
    """The small SAM 2 of the other tests has too few channels a head for it."""
    steps = []
    for absorbed in (True, False):
        setup, batch = build("lean", "tiny", 256, dropout=0.2, memory=preset), make_batch(256)
        torch.manual_seed(2)
        for name, parameter in setup.model.named_parameters():
            if name.endswith("lora_b"):
                nn.init.normal_(parameter, std=0.02)
        scores = Projection.scores
        with (
            contextlib.nullcontext() if absorbed else mock.patch.object(LeanAttention, "forward", Attention.forward),
            mock.patch.object(Projection, "scores", autospec=True, side_effect=scores) as called,
        ):
            torch.manual_seed(3)
            loss = setup.step_loss(batch)
            loss.backward()
        assert called.call_count >= (5 * 8 if absorbed else 0) and called.called is absorbed
        steps.append([loss.detach(), *[p.grad for p in setup.model.parameters() if p.grad is not None]])
    assert len(steps[0]) == len(steps[1]) > 100
    for got, expected in zip(*steps):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
