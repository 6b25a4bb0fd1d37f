"""The mask decoder's upscaling by corners against stock's, and where it is used."""

import copy
import dataclasses
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
from sam2_lora_ext.lean.upscaling import ByCorners, CornerGELU, CornerMaskDecoder, CornerUpscaling, by_corners


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
    lean.output_upscaling[4].__class__ = CornerGELU
    return stock, lean


def inputs(prompts, images, expanded=False, dtype=torch.float64):
    """Embedding, positions, prompts, dense prompts and fine and coarse features, that need gradients."""
    generator = torch.Generator().manual_seed(1)
    shapes = (images, 32, 3, 5), (1, 32, 3, 5), (prompts, 2, 32), (prompts, 32, 3, 5), (images, 4, 12, 20), (images, 8, 6, 10)
    leaves = [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]
    features = [level.expand(prompts, -1, -1, -1) if expanded else level for level in leaves[4:]]
    return leaves, [*leaves[:4], features]


def predict(decoder, image, positions, points, dense, features, repeat, wanted=by_corners, several=True):
    """What the decoder returns."""
    return decoder(
        image_embeddings=image, image_pe=positions, sparse_prompt_embeddings=points, dense_prompt_embeddings=dense,
        multimask_output=several, repeat_image=repeat, high_res_features=wanted(decoder, features),
    )  # fmt: skip


def with_gradients(got, leaves):
    """What a decoder returned, and the gradients of its inputs for fixed ones of that."""
    generator = torch.Generator().manual_seed(2)
    total = sum((part * torch.randn(part.shape, generator=generator, dtype=torch.float64)).sum() for part in got)
    return [*got, *torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize(("selective", "several", "chunk"), [(False, True, 2**20), (True, True, 2**20), (True, False, 2**20), (True, True, 900)])
@pytest.mark.parametrize(("prompts", "images", "expanded"), [(2, 2, False), (3, 1, True), (3, 1, False), (1, 1, False)])
def test_masks_and_gradients_are_stocks(prompts, images, expanded, selective, several, chunk, monkeypatch):
    monkeypatch.setattr("sam2_lora_ext.lean.mlp.CPU_CHUNK", chunk)  # 900: of 60 tokens, 28 at a time and fewer
    results = []
    for decoder in decoders():
        leaves, args = inputs(prompts, images, expanded)
        with recomputing(selective):
            got = predict(decoder, *args, repeat=images != prompts, several=several)
        results.append(with_gradients(got, leaves))
    for one, other in zip(*results, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-11)
    assert not several or results[1][0].stride() == results[0][0].stride()


def test_features_as_they_are_give_stocks_numbers_to_the_bit():
    leaves, args = inputs(2, 2)
    stock, lean = decoders()
    lean.output_upscaling[4].__class__ = nn.GELU  # the other one sorts the channels
    stock, lean = (predict(decoder, *args, repeat=False, wanted=lambda _, features: features) for decoder in (stock, lean))
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
        assert all(isinstance(level, ByCorners) for level in found) and by_corners(lean, list(features)) is found
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


def test_nothing_is_kept_of_the_first_sum():
    _, lean = decoders()
    coarse = by_corners(lean, inputs(2, 2)[1][-1])[1]
    x = torch.randn(2, 32, 3, 5, dtype=torch.float64, requires_grad=True)
    with Saved([coarse.weight]) as saved:
        lean.output_upscaling[0](x) + coarse
    assert saved.total == 0


def test_the_second_sum_is_never_there_as_a_whole(monkeypatch):
    monkeypatch.setattr("sam2_lora_ext.lean.mlp.CPU_CHUNK", 2000)
    _, lean = decoders()
    fine = by_corners(lean, [level.expand(2, -1, -1, -1) for level in inputs(2, 1)[1][-1]])[0]
    fine = dataclasses.replace(fine, maps=torch.randn(1, 16, 1500, dtype=torch.float64))
    x = torch.randn(2, 8, 30, 50, dtype=torch.float64, requires_grad=True)
    hyper = torch.randn(2, 1, 4, dtype=torch.float64, requires_grad=True)
    inputs_of_it = [x, hyper, fine.maps, fine.weight]
    with Saved(inputs_of_it) as saved:
        hyper @ lean.output_upscaling[4](lean.output_upscaling[3](x) + fine).view(2, 4, 6000)
    assert saved.total == 0
    with LiveBytes(inputs_of_it) as live:
        masks = hyper @ lean.output_upscaling[4](lean.output_upscaling[3](x) + fine).view(2, 4, 6000)
        torch.autograd.grad(masks.square().sum(), [x, hyper])
    whole = 2 * 16 * 1500 * 8
    assert live.peak < 1.2 * whole  # masks, a gradient of them and of x, which is half as large, and a few of each
    assert masks.shape == (2, 1, 6000)


@pytest.mark.parametrize("case", ["training", "evaluation", "trained hypernetworks", "several masks"])
def test_one_mask_alone_is_made_where_one_is_wanted_in_training(case, monkeypatch):
    _, lean = decoders()
    lean.train(case != "evaluation")
    lean.output_hypernetworks_mlps.requires_grad_(case == "trained hypernetworks")
    made, predict_masks = [], lean.predict_masks
    monkeypatch.setattr(lean, "predict_masks", lambda *args, **kwargs: made.append(predict_masks(*args, **kwargs)) or made[0])
    got = predict(lean, *inputs(2, 2)[1], repeat=False, wanted=lambda _, features: features, several=case == "several masks")
    assert made[0][0].shape[1] == (1 if case == "training" else 4) and made[0][1].shape[1] == 4
    assert got[0].shape[1] == got[1].shape[1] == (3 if case == "several masks" else 1)
    assert lean.num_mask_tokens == 4


@pytest.mark.parametrize(("memory", "by_corner"), [("default", True), ({"conv": True}, False), ("stock", False)])
def test_where_it_stands(memory, by_corner):
    setup = build("lean", "nano", 128, memory=memory)
    decoder, seen = setup.model.sam_mask_decoder, []
    assert [type(part) is CornerUpscaling for part in decoder.output_upscaling] == [by_corner, False, False, by_corner, False]
    decoder.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["high_res_features"]), with_kwargs=True)
    setup.step_loss(make_batch(128))
    assert len(seen) == 8 and all(isinstance(level, ByCorners) == by_corner for features in seen for level in features)
    assert not by_corner or all(features is seen[0] for features in seen)
