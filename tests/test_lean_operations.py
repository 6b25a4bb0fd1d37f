"""The trunk, the two-way transformer, norms and mask gradients of `lean` compute what stock's do, in double precision to rounding."""

import copy
from unittest import mock

import pytest
import torch
from sam2.modeling.backbones.hieradet import Hiera, MultiScaleBlock
from sam2.modeling.backbones.utils import window_partition
from sam2.modeling.sam2_utils import LayerNorm2d
from sam2.modeling.sam.transformer import TwoWayAttentionBlock, TwoWayTransformer
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import UNKNOWN
from sam2_lora_ext.lean.blocks import LeanBlock, LeanHiera, attend, joined, regions_of, split
from sam2_lora_ext.lean.maps import LeanLayerNorm2d
from sam2_lora_ext.lean.mask_sums import _reduced
from sam2_lora_ext.lean.pool import LeanMaxPool2d
from sam2_lora_ext.lean.recompute import recomputing
from sam2_lora_ext.lean.shared import sharing
from sam2_lora_ext.lean.transformer import LeanTwoWayBlock, LeanTwoWayTransformer
from sam2_lora_ext.lean.upscaling import CornerGELU
from sam2_lora_ext.lora import build_lora_model

pytestmark = pytest.mark.usefixtures("lean_however_small")


def twins(module, classes):
    """A module in double precision with all norms and biases at random, and its copy with other classes."""
    torch.manual_seed(0)
    for parameter in module.double().parameters():
        nn.init.normal_(parameter, std=0.3)
    lean = copy.deepcopy(module)
    for part in lean.modules():
        part.__class__ = classes.get(type(part), type(part))
    return module, lean


def assert_same(modules, *inputs):
    """Outputs, and the gradients of inputs and parameters."""
    results = []
    for module in modules:
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = module(*leaves)
        out = out if isinstance(out, tuple) else (out,)
        weights = [torch.randn(o.shape, generator=torch.Generator().manual_seed(i), dtype=o.dtype) for i, o in enumerate(out)]
        wanted = [*leaves, *[p for p in module.parameters() if p.requires_grad]]
        results.append([*out, *torch.autograd.grad(out, wanted, weights)])
    assert len(results[0]) == len(results[1]) > len(inputs)
    for expected, got in zip(*results, strict=True):
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("size", "window"), [((16, 16), 8), ((24, 40), 8), ((7, 7), 7), ((3, 5), 1)])
@pytest.mark.parametrize(("dtype", "autocast"), [(torch.float64, False), (torch.float32, True)])
def test_positions_by_rows_and_columns(size, window, dtype, autocast):
    torch.manual_seed(0)
    trunk = Hiera(
        embed_dim=8, num_heads=1, stages=(1, 1, 1, 1), global_att_blocks=(2,), window_spec=(window, 4, 14, 7),
        window_pos_embed_bkg_spatial_size=(7, 5),
    ).to(dtype)  # fmt: skip
    nn.init.normal_(trunk.pos_embed)
    nn.init.normal_(trunk.pos_embed_window)
    lean = copy.deepcopy(trunk)
    lean.__class__ = LeanHiera
    results = []
    for module in (trunk, lean):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            positions = module._get_pos_embed(size)
        results.append((positions, *torch.autograd.grad(positions.square().sum(), [module.pos_embed, module.pos_embed_window])))
    assert results[0][0].stride() == results[1][0].stride()
    for expected, got in zip(*results, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got, expected, **({"rtol": 1e-5, "atol": 1e-5} if autocast else {"rtol": 1e-9, "atol": 1e-10}))


def test_a_block_of_odd_windows():
    block = MultiScaleBlock(8, 16, 2, window_size=7, q_stride=(2, 2))
    for tokens in (8, 10, 12):
        assert_same(twins(block, {MultiScaleBlock: LeanBlock}), torch.randn(1, tokens, tokens, 8, dtype=torch.float64))


@pytest.mark.parametrize(
    ("module", "classes", "shape"),
    [(MultiScaleBlock(8, 8, 2, window_size=4), {MultiScaleBlock: LeanBlock}, (2, 6, 6, 8)),
     (LayerNorm2d(6), {LayerNorm2d: LeanLayerNorm2d}, (2, 6, 3, 5))],
)  # fmt: skip
def test_under_autocast_within_its_rounding(module, classes, shape):
    stock, lean = (twin.float() for twin in twins(module, classes))
    x = torch.randn(shape)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = lean(x), stock(x)
    torch.testing.assert_close(got.float(), expected.float(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("stage_begins", [False, True])
@pytest.mark.parametrize("height_width", [(8, 8), (6, 10), (4, 4), (2, 6)])
def test_blocks(height_width, stage_begins, adapted):
    block = MultiScaleBlock(8, 16 if stage_begins else 8, 2, window_size=4, q_stride=(2, 2) if stage_begins else None)
    modules = twins(block, {MultiScaleBlock: LeanBlock, nn.MaxPool2d: LeanMaxPool2d})
    if adapted:
        for module in modules:
            torch.manual_seed(1)
            build_lora_model(module, {"targets": ["attn.qkv", "attn.proj"], "rank": 2, "dropout": 0.0})
            nn.init.normal_(module.attn.qkv.lora_b)
    assert_same(modules, torch.randn(2, *height_width, 8, dtype=torch.float64))


def test_a_block_takes_channels_that_are_apart():
    modules = twins(MultiScaleBlock(8, 8, 2, window_size=4), {MultiScaleBlock: LeanBlock})
    assert_same(modules, torch.randn(1, 8, 6, 6, dtype=torch.float64).permute(0, 2, 3, 1))


@pytest.mark.parametrize("stage_begins", [False, True])
def test_padding_is_neither_projected_nor_asks(stage_begins):
    """SAM 2.1 tiny's windows of 14 tokens at 512 px cover 32 x 32 tokens with 42 x 42."""
    flops, out = [], 32 if stage_begins else 16
    block = MultiScaleBlock(16, out, 2, window_size=14, q_stride=(2, 2) if stage_begins else None)
    for module in twins(block, {MultiScaleBlock: LeanBlock, nn.MaxPool2d: LeanMaxPool2d}):
        with FlopCounterMode(display=False, custom_mapping=UNKNOWN) as counter:
            module(torch.randn(1, 32, 32, 16, dtype=torch.float64))
        flops.append(counter.get_total_flops())
    less, asking = 42 * 42 - 32 * 32, 4 if stage_begins else 1  # of `asking` tokens one is left
    projections = 2 * less * (16 * 3 * out + out * out // asking)
    assert flops[0] - flops[1] == projections + 2 * 2 * less // asking * 14 * 14 * out


def test_windows_of_a_large_map_go_by_strips():
    modules = twins(MultiScaleBlock(8, 16, 2, window_size=4, q_stride=(2, 2)), {MultiScaleBlock: LeanBlock, nn.MaxPool2d: LeanMaxPool2d})
    for module in modules:
        torch.manual_seed(1)
        build_lora_model(module, {"targets": ["attn.qkv", "attn.proj"], "rank": 2, "dropout": 0.0})
        nn.init.normal_(module.attn.qkv.lora_b)
    x = torch.randn(2, 20, 8, 8, dtype=torch.float64)
    for numbers, strips, selective in ((20 * 8 * 16, 1, False), (20 * 8 * 16 - 1, 2, False), (800, 3, True), (1, 5, True)):
        with (
            recomputing(selective),
            mock.patch("sam2_lora_ext.lean.mlp.CPU_CHUNK", numbers),
            mock.patch("sam2_lora_ext.lean.blocks.attend", side_effect=attend) as called,
        ):
            assert_same(modules, x)
        assert called.call_count == strips, numbers


@pytest.mark.parametrize(("height", "width", "size"), [(3, 4, 4), (5, 7, 3), (4, 4, 2), (1, 1, 5)])
def test_regions_are_sam2s_windows_with_another_padding(height, width, size):
    x = torch.randn(2, height, width, 6, dtype=torch.float64, requires_grad=True)
    fill = torch.randn(6, dtype=torch.float64, requires_grad=True)
    regions = regions_of((height, width), size)
    padded = nn.functional.pad(x - fill, (0, 0, 0, -width % size, 0, -height % size)) + fill
    numbers = torch.arange(2 * -(-height // size) * -(-width // size)).view(2, -(-height // size), -(-width // size), 1)
    order = torch.cat([numbers[:, r.top // size :][:, : r.down, r.left // size :][:, :, : r.across].flatten() for r in regions])
    got, expected = torch.cat(split(x, fill, regions)), window_partition(padded, size)[0][order]
    weights = torch.randn_like(got)
    for one, other in zip((got, *grads(got, weights, x, fill)), (expected, *grads(expected, weights, x, fill)), strict=True):
        torch.testing.assert_close(one, other)

    parts = split(x, None, regions)
    assert [part.shape[1:3] for part in parts] == [(r.height, r.width) for r in regions]
    whole = joined(regions, (height, width), *parts)
    weights = torch.randn_like(x)
    assert torch.equal(whole, x) and torch.equal(grads(whole, weights, x)[0], weights)


def grads(y, weights, *wanted):
    return torch.autograd.grad(y, wanted, weights, retain_graph=True)


def test_two_way_transformer():
    modules = twins(TwoWayTransformer(2, 16, 2, 32), {TwoWayTransformer: LeanTwoWayTransformer, TwoWayAttentionBlock: LeanTwoWayBlock})
    image, positions = torch.randn(2, 16, 3, 5, dtype=torch.float64), torch.randn(1, 16, 3, 5, dtype=torch.float64)
    for module in modules:
        module.register_forward_pre_hook(lambda _, args: (args[0], args[1].repeat_interleave(2, 0), args[2]))  # as the mask decoder
    assert_same(modules, image, positions, torch.randn(2, 4, 16, dtype=torch.float64))


def test_positions_are_kept_once_for_all_steps_of_a_block():
    lean = twins(TwoWayTransformer(1, 16, 2, 32), {TwoWayTransformer: LeanTwoWayTransformer, TwoWayAttentionBlock: LeanTwoWayBlock})[1]
    lean.requires_grad_(False)
    prompts = torch.randn(1, 4, 16, dtype=torch.float64)
    seen = []
    lean.layers[0].register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["key_pe"]), with_kwargs=True)
    grids = [torch.randn(1, 16, 3, width, dtype=torch.float64) for width in (5, 5, 4)]
    for grid in grids:
        lean(grid, grid, prompts)
    with sharing():
        for grid in grids:
            lean(grid, grid, prompts)
    lean(grids[1], grids[1], prompts)
    assert seen[4] is seen[3] and torch.equal(seen[3], seen[0])  # the second of the same shape: the first's
    assert seen[5].shape == (1, 12, 16) and torch.equal(seen[5], seen[2])
    assert torch.equal(seen[6], seen[1]) and not torch.equal(seen[1], seen[0])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_operations_on_maps(layout):
    x = torch.randn(2, 6, 3, 5, dtype=torch.float64).contiguous(memory_format=layout)
    assert_same(twins(LayerNorm2d(6), {LayerNorm2d: LeanLayerNorm2d}), x)
    assert_same(twins(nn.Sequential(nn.GELU()), {nn.GELU: CornerGELU}), x)


@pytest.mark.parametrize(("small", "large"), [((8, 8), (32, 32)), ((5, 8), (20, 17)), ((8, 8), (8, 8)), ((6, 6), (5, 5))])
def test_the_gradient_of_an_enlarged_mask(small, large):
    x = torch.randn(1, 1, *small, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(large, dtype=torch.float64)
    expected = torch.autograd.grad(F.interpolate(x, large, mode="bilinear", align_corners=False), x, dy[None, None])[0]
    torch.testing.assert_close(_reduced(dy, x.shape[2:]), expected[0, 0], rtol=1e-12, atol=1e-12)
