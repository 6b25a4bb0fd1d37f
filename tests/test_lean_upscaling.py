"""The mask decoder's upscaling by corners against stock's, and where it is used."""

import copy
import weakref

import numpy as np
import pytest
import torch
from sam2.modeling.sam.mask_decoder import MaskDecoder
from sam2.modeling.sam.transformer import TwoWayTransformer
from sam2.sam2_image_predictor import SAM2ImagePredictor
from torch import nn

from benchmarks.measure import LiveBytes, Saved
from benchmarks.methods import build, make_batch
from sam2_lora_ext.lean.recompute import recomputing
from sam2_lora_ext.lean.shared import sharing
from sam2_lora_ext.lean.upscaling import ByCorners, CornerMaskDecoder, CornerUpscaling, by_corners


def decoders(dtype=torch.float64):
    """Stock's mask decoder with random weights, frozen, and the same by corners."""
    torch.manual_seed(0)
    transformer = TwoWayTransformer(depth=1, embedding_dim=32, mlp_dim=16, num_heads=2)
    stock = MaskDecoder(transformer_dim=32, transformer=transformer, use_high_res_features=True, pred_obj_scores=True)
    stock = stock.to(dtype).requires_grad_(False)
    for parameter in stock.parameters():
        nn.init.normal_(parameter, std=0.2)
    lean = copy.deepcopy(stock)
    lean.__class__ = CornerMaskDecoder
    for part in (lean.output_upscaling[0], lean.output_upscaling[3]):
        part.__class__ = CornerUpscaling
    return stock, lean


def inputs(prompts, images, expanded=False, dtype=torch.float64):
    """Embedding, positions, prompts, dense prompts and fine and coarse features, that need gradients."""
    generator = torch.Generator().manual_seed(1)
    shapes = (images, 32, 3, 5), (1, 32, 3, 5), (prompts, 2, 32), (prompts, 32, 3, 5), (images, 4, 12, 20), (images, 8, 6, 10)
    leaves = [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]
    features = [level.expand(prompts, -1, -1, -1) if expanded else level for level in leaves[4:]]
    return leaves, [*leaves[:4], features]


def predict(decoder, image, positions, points, dense, features, repeat, wanted=by_corners):
    """What the decoder returns."""
    return decoder(
        image_embeddings=image, image_pe=positions, sparse_prompt_embeddings=points, dense_prompt_embeddings=dense,
        multimask_output=True, repeat_image=repeat, high_res_features=wanted(decoder, features),
    )  # fmt: skip


def with_gradients(got, leaves):
    """What a decoder returned, and the gradients of its inputs for fixed ones of that."""
    generator = torch.Generator().manual_seed(2)
    total = sum((part * torch.randn(part.shape, generator=generator, dtype=torch.float64)).sum() for part in got)
    return [*got, *torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize("selective", [False, True])
@pytest.mark.parametrize(("prompts", "images", "expanded"), [(2, 2, False), (3, 1, True), (3, 1, False), (1, 1, False)])
def test_masks_and_gradients_are_stocks(prompts, images, expanded, selective):
    results = []
    for decoder in decoders():
        leaves, args = inputs(prompts, images, expanded)
        with recomputing(selective):
            got = predict(decoder, *args, repeat=images != prompts)
        results.append(with_gradients(got, leaves))
    for one, other in zip(*results, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-11)
    assert results[1][0].stride() == results[0][0].stride()


def test_features_as_they_are_give_stocks_numbers_to_the_bit():
    leaves, args = inputs(2, 2)
    stock, lean = (predict(decoder, *args, repeat=False, wanted=lambda _, features: features) for decoder in decoders())
    for one, other in zip(with_gradients(stock, leaves), with_gradients(lean, leaves), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("features_as", [torch.float32, torch.bfloat16])
def test_under_autocast(features_as):
    results = []
    for decoder in decoders(torch.float32):
        leaves, (*args, features) = inputs(2, 1, expanded=True, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            got = predict(decoder, *args, [level.to(features_as) for level in features], repeat=True)
        results.append(with_gradients(got, leaves))
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(other, one, rtol=0.1, atol=0.02 * float(one.detach().abs().max()))  # bfloat16 has 8 bits


@pytest.mark.parametrize("change", ["trained", "without bias", "overlapping", "no graph", "compiled", "forward compiled"])
def test_what_cannot_be_made_by_corners_is_left_to_stock(change):
    _, lean = decoders()
    _, (*_, features) = inputs(2, 2)
    second = lean.output_upscaling[3]
    if change == "trained":
        second.weight.requires_grad_()
    elif change == "without bias":
        second.bias = None
    elif change == "overlapping":
        second.stride = (1, 1)
    elif change == "compiled":
        lean.compile()
    elif change == "forward compiled":  # as SAM 2's `vos_optimized` does
        lean.forward = torch.compile(lean.forward)
    with torch.set_grad_enabled(change != "no graph"):
        assert by_corners(lean, features) is features
    stock = MaskDecoder(transformer_dim=32, transformer=nn.Identity(), use_high_res_features=True)
    assert by_corners(stock, features) is features and by_corners(lean, None) is None


def test_features_are_sorted_once_for_all_steps_of_a_frame():
    _, lean = decoders()
    features, others = (inputs(2, 2)[1][-1] for _ in range(2))
    with sharing():
        found = by_corners(lean, features)
        assert all(type(level) is ByCorners for level in found) and by_corners(lean, list(features)) is found
        kept = weakref.ref(found[0].maps)
        del found
        assert kept() is not None
        by_corners(lean, others)
        assert kept() is None  # a frame's are not held with the next one's
    assert by_corners(lean, others) is not by_corners(lean, others)


def test_a_live_model_in_the_predictor_with_several_prompts():
    """The predictor makes no graph and reads the features as they are."""
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
    _, lean = decoders()
    leaves, args = inputs(2, 2)
    compiled = torch.compile(lambda *args: predict(lean, *args, repeat=False), fullgraph=True, backend="aot_eager")
    results = [with_gradients(forward(*args), leaves) for forward in (compiled, lambda *args: predict(lean, *args, repeat=False))]
    lean.compile(fullgraph=True, backend="aot_eager")  # and the decoder alone
    results.append(with_gradients(predict(lean, *args, repeat=False), leaves))
    for one, other, third in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
        torch.testing.assert_close(third, other)


def test_nothing_is_kept_of_what_may_be_computed_again():
    _, lean = decoders()
    _, (*_, features) = inputs(2, 2)
    fine, coarse = by_corners(lean, features)
    for level, kept in ((fine, 0), (coarse, 2 * 8 * 6 * 10 * 8)):
        x = torch.randn(2, level.weight.shape[0], 6 if level is fine else 3, 10 if level is fine else 5, dtype=torch.float64)
        x.requires_grad_()
        layer = lean.output_upscaling[3 if level is fine else 0]
        with Saved([x, level.weight]) as saved:
            layer(x) + level
        assert saved.total == 0
        with LiveBytes([x, level.maps, level.weight]) as live, recomputing():
            y = (layer(x) + level).square().sum()
        assert live.now == y.nbytes + kept
        torch.testing.assert_close(torch.autograd.grad(y, x), torch.autograd.grad(level.added_to(x).square().sum(), x))


@pytest.mark.parametrize(("memory", "by_corner"), [("default", True), ({"conv": True}, False), ("stock", False)])
def test_where_it_stands(memory, by_corner):
    setup = build("lean", "nano", 128, memory=memory)
    decoder, seen = setup.model.sam_mask_decoder, []
    assert [type(part) is CornerUpscaling for part in decoder.output_upscaling] == [by_corner, False, False, by_corner, False]
    decoder.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["high_res_features"]), with_kwargs=True)
    setup.step_loss(make_batch(128))
    assert len(seen) == 8 and all(isinstance(level, ByCorners) == by_corner for features in seen for level in features)
    assert not by_corner or all(features is seen[0] for features in seen)
