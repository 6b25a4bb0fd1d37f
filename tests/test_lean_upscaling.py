"""The mask decoder's last upscaling and its sum with the image's finest features, against the two by themselves."""

import copy

import numpy as np
import pytest
import torch
from sam2.sam2_image_predictor import SAM2ImagePredictor
from torch import nn

from benchmarks.measure import LiveBytes, Saved
from benchmarks.methods import build
from sam2_lora_ext.lean.recompute import recomputing
from sam2_lora_ext.lean.upscaling import LastUpscaling


def both(conv, autocast=False, features_as=torch.float64, layout=torch.contiguous_format, batch=2, expanded=True):
    """Sum and gradients, of the convolution plus the features of one image and of `LastUpscaling`."""
    torch.manual_seed(0)
    lean = copy.deepcopy(conv)
    lean.__class__ = LastUpscaling
    dtype = conv.weight.dtype
    x = torch.randn(batch, 5, 3, 4, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
    side = conv(x.detach()).shape[2:]
    image = torch.randn(1, 6, *side).to(features_as).requires_grad_()
    results = []
    for layer in (conv, lean):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = layer(x) + (image.expand(batch, -1, -1, -1) if expanded else image)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
        trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        results.append([y, *torch.autograd.grad(y, [x, image, *trained], dy)])
    return results


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("batch", [0, 1, 2])
@pytest.mark.parametrize("conv", [
    nn.ConvTranspose2d(5, 6, 2, 2).requires_grad_(False),
    nn.ConvTranspose2d(5, 6, 2, 2),
    nn.ConvTranspose2d(5, 6, 2, 2, bias=False).requires_grad_(False),
    nn.ConvTranspose2d(5, 6, 3, 2, padding=1, output_padding=1).requires_grad_(False),
    nn.ConvTranspose2d(5, 6, 2, 2, dilation=2).requires_grad_(False),
], ids=["frozen", "trained", "without bias", "overlapping", "dilated"])  # fmt: skip
def test_the_sum_and_its_gradients(conv, batch, layout):
    expected, got = both(conv.double(), batch=batch, layout=layout)
    for one, other in zip(expected, got, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-12)
    assert got[0].is_contiguous()


@pytest.mark.parametrize("features_as", [torch.float32, torch.bfloat16])
def test_under_autocast(features_as):
    expected, got = both(nn.ConvTranspose2d(5, 6, 2, 2).requires_grad_(False), autocast=True, features_as=features_as)
    for one, other in zip(expected, got, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(other, one, rtol=0.02, atol=0.02)  # bfloat16 has 8 bits


@pytest.mark.parametrize("trained", [False, True])
def test_features_of_one_image_for_several_prompts(trained):
    expected, got = both(nn.ConvTranspose2d(5, 6, 2, 2).double().requires_grad_(trained), batch=3, expanded=False)
    for one, other in zip(expected, got, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-12)


def test_a_live_model_in_the_predictor_with_several_prompts():
    masks = []
    for memory in ("stock", "default"):
        predictor = SAM2ImagePredictor(build("lean", "nano", 128, memory=memory).model.eval())
        predictor._bb_feat_sizes = [(32, 32), (16, 16), (8, 8)]  # SAM 2 writes those of 1024 px
        predictor.set_image(np.random.default_rng(0).integers(0, 255, (96, 128, 3), np.uint8))
        points = np.array([[[20, 30]], [[60, 10]], [[90, 80]]])
        masks.append(predictor.predict(points, np.ones((3, 1)), return_logits=True)[0])
    assert masks[0].shape == (3, 3, 96, 128)
    np.testing.assert_allclose(masks[1], masks[0], rtol=1e-4, atol=1e-4)


def test_compiled():
    layer = LastUpscaling(8, 4, 2, 2).requires_grad_(False)
    x, features = torch.randn(2, 8, 4, 4, requires_grad=True), torch.randn(2, 4, 8, 8)
    compiled = torch.compile(lambda x: layer(x) + features, fullgraph=True, backend="aot_eager")
    got, expected = compiled(x), layer(x) + features
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got.cos().sum(), x), torch.autograd.grad(expected.cos().sum(), x))


def test_nothing_is_kept_of_what_may_be_computed_again():
    layer = LastUpscaling(8, 4, 2, 2).requires_grad_(False)
    x, features = torch.randn(2, 8, 4, 4, requires_grad=True), torch.randn(2, 4, 8, 8)
    with Saved([x, *layer.parameters()]) as saved:
        layer(x) + features
    assert saved.total == 0
    with LiveBytes([x, features, *layer.parameters()]) as live, recomputing():
        y = (layer(x) + features).square().sum()
    assert live.now == y.nbytes
    expected = torch.autograd.grad((nn.ConvTranspose2d.forward(layer, x) + features).square().sum(), x)
    torch.testing.assert_close(torch.autograd.grad(y, x), expected)


@pytest.mark.parametrize(("memory", "is_one"), [("default", True), ({"conv": True}, False), ("stock", False)])
def test_where_it_stands(memory, is_one):
    model = build("lean", "nano", 128, memory=memory).model
    assert [type(part) is LastUpscaling for part in model.sam_mask_decoder.output_upscaling] == [False] * 3 + [is_one, False]
