"""The two convolutions of a high-resolution level as one, and the trunk's positions, against SAM 2's own."""

import copy
import pickle

import pytest
import torch
from sam2.modeling.backbones.hieradet import Hiera
from small_runs import make_model
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Saved
from sam2_lora_ext.lean.blocks import LeanHiera
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


def test_under_autocast_within_its_rounding():
    stock, lean = (model.float() for model in models())
    images = images_for(stock, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        results = [maps_and_gradient(model, images, torch.float32) for model in (lean, stock)]
    for got, expected in zip(*results, strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got.float(), expected.float(), rtol=0.05, atol=0.05 * expected.float().abs().max().item())


def test_a_map_of_256_channels_is_neither_made_nor_kept():
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


def test_other_necks_are_left_alone():
    def paired(change):
        model = make_model(memory="stock", **SETTINGS)
        change(model)
        pair_convolutions(model)
        return [isinstance(conv, HighResConv) for conv in (model.sam_mask_decoder.conv_s0, model.sam_mask_decoder.conv_s1)]

    assert paired(lambda model: None) == [True, True]
    assert paired(lambda model: model.image_encoder.neck.fpn_top_down_levels.append(1)) == [False, False]
    assert paired(lambda model: setattr(model, "use_high_res_features_in_sam", False)) == [False, False]
    wider = torch.nn.Conv2d(64, 8, 3, padding=1)
    assert paired(lambda model: setattr(model.image_encoder.neck.convs[-1], "conv", wider)) == [False, True]
    without_bias = torch.nn.Conv2d(256, 8, 1, bias=False)
    assert paired(lambda model: setattr(model.sam_mask_decoder, "conv_s1", without_bias)) == [True, False]


@pytest.mark.parametrize("size", [(16, 16), (24, 40), (7, 7)])
@pytest.mark.parametrize("autocast", [False, True])
def test_positions_by_rows_and_columns(size, autocast):
    torch.manual_seed(0)
    trunk = Hiera(embed_dim=8, num_heads=1, stages=(1, 1, 1, 1), global_att_blocks=(2,), window_pos_embed_bkg_spatial_size=(7, 5)).double()
    torch.nn.init.normal_(trunk.pos_embed)
    torch.nn.init.normal_(trunk.pos_embed_window)
    size = [side - side % trunk.pos_embed_window.shape[-1] or trunk.pos_embed_window.shape[-1] for side in size]
    lean = copy.deepcopy(trunk)
    lean.__class__ = LeanHiera
    results = []
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for module in (trunk, lean):
            positions = module._get_pos_embed(size)
            results.append((positions, *torch.autograd.grad(positions.square().sum(), list(module.parameters())[:2])))
    assert results[0][0].stride() == results[1][0].stride()
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
