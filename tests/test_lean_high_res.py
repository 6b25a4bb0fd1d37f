"""The two convolutions of a high-resolution level as one, against SAM 2's own."""

import copy
import pickle

import pytest
import torch
from small_runs import make_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Saved
from sam2_lora_ext.lean.cast import cast_frozen
from sam2_lora_ext.lean.conv import frozen_pointwise
from sam2_lora_ext.lean.high_res import HighResConv, PassedLateral, pair_convolutions

SETTINGS = {"num_correction_pt_per_frame": 1, "lora": None}


def models(**settings):
    """Stock's operations and the fewer ones, with frozen weights in double precision."""
    made = [make_model(memory={"operations": fewer, **settings}, **SETTINGS).double().requires_grad_(False) for fewer in (False, True)]
    for model in made:
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return made


def maps_and_gradient(model, images, dtype=torch.float64):
    """The decoder's three maps of an image, and a gradient of the image by all of them."""
    images = images.clone().requires_grad_()
    maps = model.forward_image(images)["backbone_fpn"]
    weights = [torch.randn(level.shape, generator=torch.Generator().manual_seed(i), dtype=dtype) for i, level in enumerate(maps)]
    return [*maps, *torch.autograd.grad(maps, images, [weight.to(level) for weight, level in zip(weights, maps)])]


def images_for(model, dtype=torch.float64):
    return torch.randn(2, 3, model.image_size, model.image_size, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize("conv", [False, True])
def test_maps_and_gradients_equal_stocks(conv):
    stock, lean = models(conv=conv)
    assert [type(module) for module in lean.modules()].count(PassedLateral) == 2
    images = images_for(stock)
    for got, expected in zip(maps_and_gradient(lean, images), maps_and_gradient(stock, images), strict=True):
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("held", [False, True])
def test_under_autocast_the_product_is_rounded_once(held, monkeypatch):
    """The factors are those of stock's autocast, so weights that are held in its type change no bit."""
    _, lean = models()
    lean.float()
    both = [conv.weight.bfloat16() for conv in (lean.image_encoder.neck.convs[-1].conv, lean.sam_mask_decoder.conv_s0)]
    exact = both[1].double().flatten(1) @ both[0].double().flatten(1)
    if held:
        cast_frozen(lean, torch.bfloat16)
    applied = []
    monkeypatch.setattr("sam2_lora_ext.lean.high_res.frozen_pointwise", lambda *tensors: applied.append(tensors) or frozen_pointwise(*tensors))
    with torch.autocast("cpu", torch.bfloat16):
        maps = lean.forward_image(images_for(lean, torch.float32))["backbone_fpn"]
    x, weight, bias = applied[0]
    assert {x.dtype, weight.dtype, bias.dtype, maps[0].dtype} == {torch.bfloat16}
    torch.testing.assert_close(weight[..., 0, 0].double(), exact, rtol=2**-8, atol=1e-5)  # bfloat16's half a unit; float32's sums
    expected = torch.nn.functional.conv2d(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(maps[0].double(), expected, rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize("trained", [False, True])
def test_compiled_as_one_graph(trained):
    _, lean = models()
    trunk, lateral = lean.image_encoder.trunk, lean.image_encoder.neck.convs[-1]

    def level(x):
        return lean.sam_mask_decoder.conv_s0(lateral(x)), trunk._get_pos_embed((16, 16))

    x = torch.randn(1, trunk.channel_list[-1], 4, 4, dtype=torch.float64, requires_grad=trained)
    results = [function(x) for function in (torch.compile(level, backend="aot_eager", fullgraph=True), level)]
    if trained:
        results = [(*maps, *torch.autograd.grad(maps[0].square().sum(), x)) for maps in results]
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_the_necks_map_is_neither_made_nor_kept():
    _, lean = models()
    images = images_for(lean)
    levels = lean.image_encoder(images)["backbone_fpn"]
    assert [level.shape[1] for level in levels[:2]] == lean.image_encoder.trunk.channel_list[:1:-1]
    conv, x = lean.sam_mask_decoder.conv_s0, levels[0].detach().requires_grad_()
    with Saved(conv.parameters()) as saved, FlopCounterMode(display=False) as flops:
        y = conv(x)
    assert y.shape[1] == conv.out_channels
    assert saved.total <= 8 * x.shape[1] * conv.out_channels  # their product
    numbers = x.shape[1] * conv.out_channels
    assert flops.get_total_flops() <= 2 * numbers * (len(x) * x[0, 0].numel()) + 2 * conv.in_channels * (numbers + conv.out_channels)


@pytest.mark.parametrize("part", ["image_encoder.neck.convs.3.conv", "sam_mask_decoder.conv_s0", "sam_mask_decoder.conv_s1"])
def test_what_is_trained_is_computed_as_stock_does(part):
    stock, lean = models()
    results = []
    for model in (stock, lean):
        trained = model.get_submodule(part).requires_grad_()
        maps = model.forward_image(images_for(model))["backbone_fpn"]
        results.append(torch.autograd.grad(sum(level.square().sum() for level in maps), list(trained.parameters())))
    for got, expected in zip(*results, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_reads_its_own_weights(duplicate):
    _, lean = models()
    images = images_for(lean)
    before = lean.forward_image(images)["backbone_fpn"]
    copied = duplicate(lean)
    assert copied.state_dict().keys() == lean.state_dict().keys()
    copied.image_encoder.neck.convs[-1].conv.weight.zero_()
    maps = copied.forward_image(images)["backbone_fpn"]
    assert not torch.allclose(maps[0], before[0]) and torch.equal(maps[1], before[1])
    assert torch.equal(lean.forward_image(images)["backbone_fpn"][0], before[0])


def test_other_models_are_left_alone():
    def paired(**changes):
        model = make_model(memory="stock", **SETTINGS)
        for path, value in changes.items():
            owner, _, name = path.replace("__", ".").rpartition(".")
            setattr(model.get_submodule(owner), name, value)
        pair_convolutions(model)
        return [type(conv) is HighResConv for conv in (model.sam_mask_decoder.conv_s0, model.sam_mask_decoder.conv_s1)]

    assert paired() == [True, True]
    assert paired(image_encoder__neck__fpn_top_down_levels=[1, 2, 3]) == [False, False]
    assert paired(use_high_res_features_in_sam=False) == [False, False]
    assert paired(sam_mask_decoder__conv_s1=nn.Linear(256, 8)) == [True, False]


def replaced(model):
    first = model.image_encoder.neck.convs[-1].conv
    model.image_encoder.neck.convs[-1].conv = nn.Conv2d(first.in_channels, first.out_channels, 1)  # to be trained


def widened(model):
    first = model.image_encoder.neck.convs[-1].conv
    model.image_encoder.neck.convs[-1].conv = nn.Conv2d(first.in_channels, first.out_channels, 3, padding=1).requires_grad_(False)


def followed(model):
    model.image_encoder.neck.convs[-1].add_module("act", nn.GELU())


def without_bias(model):
    second = model.sam_mask_decoder.conv_s0
    model.sam_mask_decoder.conv_s0 = nn.Conv2d(second.in_channels, second.out_channels, 1, bias=False).requires_grad_(False)


def wrapped(model):
    model.sam_mask_decoder.conv_s0 = nn.Sequential(model.sam_mask_decoder.conv_s0)


@pytest.mark.parametrize("change", [replaced, widened, followed, without_bias, wrapped])
def test_a_layer_that_is_changed_afterwards_is_computed(change):
    stock, lean = models()
    for model in (stock, lean):
        torch.manual_seed(3)
        change(model)
        model.double()
    images = images_for(stock)
    for got, expected in zip(maps_and_gradient(lean, images), maps_and_gradient(stock, images), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
