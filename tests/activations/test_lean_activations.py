"""The presets of `activations` give stock's results: on a small SAM 2, and each setting by itself."""

import copy
import gc
import math
import pickle
from unittest import mock

import pytest
import torch
from sam2.modeling.sam2_utils import LayerNorm2d
from torch import nn
from training.utils.data_utils import BatchedVideoDatapoint, BatchedVideoMetaData

from benchmarks.measure import LiveBytes, Saved, run_step
from benchmarks.methods import build, make_batch
from sam2_lora_ext.activations.conv import LeanConv2d, LeanConvTranspose2d
from sam2_lora_ext.activations.maps import LeanLayerNorm2d
from sam2_lora_ext.activations.policy import (
    PRESETS,
    ActivationsConfig,
    CheckpointedBlock,
    blocks_for_share,
    falls_due,
    renamed,
)
from sam2_lora_ext.activations.pool import LeanMaxPool2d
from sam2_lora_ext.host.compose import compose, locate
from sam2_lora_ext.lora.shared import checkpointed
from sam2_lora_ext.settings.model import MEMORY
from sam2_lora_ext.utils.errors import UserError

SIZE, RESOLUTION = "nano", 128
SWITCHES = ("pool", "conv", "norms", "positions", "weights")


def lively(setup):
    """A setup with effective adapters and object scores: a random B, objects that are present."""
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in setup.model.named_parameters():
            if name.endswith("lora_b"):
                parameter.normal_(std=0.02)
        setup.model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(3.0)
    return setup


def train(setup, steps=1, autocast=False):
    """Loss and gradients of each step, with the same clicks and dropout for each setup."""
    torch.manual_seed(3)
    history, batch = [], make_batch(RESOLUTION)
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = setup.step_loss(batch)
        loss.backward()
        history.append([loss.detach()] + [p.grad.clone() for p in setup.model.parameters() if p.grad is not None])
        setup.optimizer.step()
        setup.optimizer.zero_grad()
    return history


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("preset", ["fast", "default", "low"])
def test_a_preset_changes_no_bit(preset, autocast):
    """Except `norms`, which rounds differently: see below."""
    off, lean = (
        train(lively(build("lean", SIZE, RESOLUTION, dropout=0.2, activations=choice)), steps=2, autocast=autocast)
        for choice in ({"norms": True}, preset)
    )
    for step, expected in zip(lean, off, strict=True):
        assert len(step) == len(expected) > 20
        assert all(map(torch.equal, step, expected))
    assert off[0][0] != off[1][0] and any(value.abs().max() > 1e-6 for value in off[0][1:])


@pytest.mark.parametrize("switch", [*SWITCHES, "encoder", "decoder"])
def test_each_piece_alone(switch):
    """Each can be switched by itself, and never saves more for backward."""
    results, kept = [], []
    for choice in ("stock", {switch: True if switch in SWITCHES else 0.5}):
        setup, batch = lively(build("lean", SIZE, RESOLUTION, dropout=0.0, activations=choice)), make_batch(RESOLUTION)
        torch.manual_seed(3)
        with LiveBytes([*setup.model.parameters(), *setup.model.buffers()]) as live:
            loss = setup.step_loss(batch)
            kept.append(live.now)
        loss.backward()
        results.append([loss.detach(), *[p.grad for p in setup.model.parameters() if p.grad is not None]])
    assert kept[1] < kept[0] or (switch == "weights" and kept[1] == kept[0])  # without autocast it does nothing
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item() + 1e-7)


def test_norms_equal_stock():
    """Outputs and gradients in double precision to rounding, whatever the layout."""
    torch.manual_seed(0)
    stock = LayerNorm2d(6).double()
    nn.init.normal_(stock.weight)
    nn.init.normal_(stock.bias)
    lean = copy.deepcopy(stock)
    lean.__class__ = LeanLayerNorm2d
    for layout in (torch.contiguous_format, torch.channels_last):
        results = []
        for layer in (stock, lean):
            x = torch.randn(2, 6, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
            x = x.contiguous(memory_format=layout).requires_grad_()
            y = layer(x)
            results.append([y, *torch.autograd.grad(y.pow(3).sum(), [x, layer.weight, layer.bias])])
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("preset", ["default", "low"])
def test_beside_sam2s_own_checkpoints_of_the_clicks(preset):
    results = []
    for choice, own in (({"norms": True}, False), (preset, True)):
        setup = lively(build("lean", SIZE, RESOLUTION, dropout=0.2, activations=choice))
        setup.model.use_act_ckpt_iterative_pt_sampling = own
        setup.model.prompt_seed = None  # clicks as stock draws them
        with mock.patch("sam2_lora_ext.model.checkpointed", wraps=checkpointed) as again:
            results.append(train(setup)[0])
        assert again.call_count == 0  # SAM 2 computes them again itself
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["lean", "lean_memory", "decoder_lean"])
def test_ten_steps_equal_the_plain_implementation_with_the_plain_loss(method):
    plain = {"decoder_lean": "decoder_plain"}.get(method, "plain")
    lean, expected = (lively(build(name, SIZE, RESOLUTION, dropout=0.0)) for name in (method, plain))
    for step, expected_step in zip(train(lean, 10), train(expected, 10), strict=True):
        torch.testing.assert_close(step[0], expected_step[0], rtol=1e-4, atol=1e-5)
    for (key, value), other in zip(lean.model.state_dict().items(), expected.model.state_dict().values(), strict=True):
        # AdamW moves each weight by about lr a step whatever the gradient's size: rounding can turn a tiny one's sign
        torch.testing.assert_close(value, other, rtol=1e-3, atol=2e-4, msg=lambda text, key=key: f"{key}: {text}")


def as_video(batch, frames):
    """A batch of several frames from a batch of one, with images shifted from frame to frame."""

    def repeated(x):
        return x.repeat(frames, *[1] * (x.dim() - 1))

    index = repeated(batch.obj_to_frame_idx)
    index[..., 0] = torch.arange(frames)[:, None]
    metadata = BatchedVideoMetaData(
        unique_objects_identifier=repeated(batch.metadata.unique_objects_identifier),
        frame_orig_size=repeated(batch.metadata.frame_orig_size),
        batch_size=[frames],
    )
    images = torch.cat([batch.img_batch.roll(4 * t, -1) for t in range(frames)])
    masks = torch.cat([batch.masks.roll(4 * t, -1) for t in range(frames)])
    return BatchedVideoDatapoint(images, index, masks, metadata, dict_key=batch.dict_key, batch_size=[frames])


@pytest.mark.parametrize("lean", ["lean", "lean_memory"])
def test_gradients_of_several_frames_and_images_equal_the_plain_implementation(lean):
    losses, gradients = [], []
    for method in ("plain", lean):
        setup = lively(build(method, SIZE, RESOLUTION, dropout=0.0))
        torch.manual_seed(3)
        loss = setup.step_loss(as_video(make_batch(RESOLUTION, images=2), 3))
        loss.backward()
        losses.append(loss.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in setup.model.parameters() if p.grad is not None]))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    assert (gradients[1] - gradients[0]).norm() <= 1e-5 * gradients[0].norm()


@pytest.mark.parametrize(("lean", "images"), [("lean_memory", 1), ("lean", 2)])
def test_gradients_equal_the_plain_implementation_in_double_precision(lean, images):
    results = []
    for method in ("plain", lean):
        setup = lively(build(method, SIZE, RESOLUTION, dropout=0.0))
        setup.model.double().sam_prompt_encoder.pe_layer.float()  # stock asks for float32 there, and below by `float()`
        batch = make_batch(RESOLUTION, images)
        batch.img_batch = batch.img_batch.double()
        torch.manual_seed(3)
        with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
            loss = setup.step_loss(batch)
            loss.backward()
        assert loss.dtype == torch.float64
        results.append(
            {"loss": loss.detach()} | {n: p.grad for n, p in setup.model.named_parameters() if p.grad is not None}
        )
    assert len(results[0]) > 20
    for name, value in results[0].items():
        torch.testing.assert_close(
            results[1][name], value, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_keys_copies_pickles_and_evaluation():
    plain, lean = build("plain", SIZE, RESOLUTION), build("lean_memory", SIZE, RESOLUTION)
    assert list(plain.model.state_dict()) == list(lean.model.state_dict())
    assert {type(block) for block in lean.model.image_encoder.trunk.blocks} == {CheckpointedBlock}
    batch = make_batch(RESOLUTION)
    frames = []
    for model in (plain.model, lean.model, copy.deepcopy(lean.model), pickle.loads(pickle.dumps(lean.model))):
        model.eval()
        with torch.no_grad():
            frames.append(model(batch)[0]["pred_masks_high_res"])
    torch.testing.assert_close(frames[1], frames[0], rtol=1e-5, atol=1e-5)  # `norms` rounds otherwise
    assert torch.equal(frames[2], frames[1]) and torch.equal(frames[3], frames[1])


def test_which_of_a_series_fall_due():
    due = {share: [k for k in range(1, 9) if falls_due(k, share)] for share in (0, 0.25, 0.75, 0.875, 1)}
    assert due == {0: [], 0.25: [1, 5], 0.75: [1, 2, 3, 5, 6, 7], 0.875: [1, 2, 3, 4, 5, 6, 7], 1: list(range(1, 9))}


def test_the_share_of_prediction_steps_is_counted_anew_in_each_forward_pass(monkeypatch):
    setup, batch = build("lean", SIZE, RESOLUTION, activations={"decoder": 0.75}), make_batch(RESOLUTION)
    calls = []
    monkeypatch.setattr(
        "sam2_lora_ext.model.checkpointed", lambda heads, *args, **kwargs: (calls.append(1), heads(*args, **kwargs))[1]
    )
    for _ in range(2):
        setup.step_loss(batch)
        assert setup.model.predictions == 8 and len(calls) == 6
        calls.clear()


def test_which_blocks_are_computed_again():
    blocks = blocks_of(1, 2, 7, 2)  # SAM 2.1 tiny
    # sizes 1 | 1 1/2 | 1/2 1/4 1/4 1/4 1/4 1/4 1/4 | 1/4 1/8, together 4.875
    shares = (0, 0.1, 0.2, 0.21, 0.5, 0.52, 0.61, 0.62, 0.97, 0.98, 1)
    assert [blocks_for_share(blocks, share) for share in shares] == [0, 0, 0, 1, 2, 3, 3, 4, 10, 11, 12]


@pytest.mark.parametrize(
    ("stages", "default", "low"),
    [((1, 2, 7, 2), 3, 12), ((1, 2, 11, 2), 5, 16), ((2, 3, 16, 3), 7, 24), ((2, 6, 36, 4), 19, 48)],
)
def test_what_presets_compute_again_of_tiny_small_base_plus_and_large(stages, default, low):
    blocks = blocks_of(*stages)
    assert [blocks_for_share(blocks, PRESETS[name].encoder) for name in ("default", "low")] == [default, low]


def blocks_of(*stages):
    """The same number of blocks in each stage; the first of each later stage pools."""

    class Block(nn.Module):
        def __init__(self, q_stride):
            super().__init__()
            self.q_stride = q_stride

    return nn.ModuleList(Block((2, 2) if s and not b else None) for s, n in enumerate(stages) for b in range(n))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("small", "'small'.*stock, fast, default, low"),
        ({"encoder": 1.5}, "encoder.*1.5"),
        ({"encoder": math.nan}, "encoder"),
        ({"decoder": True}, "decoder.*number.*True"),
        ({"pool": "yes"}, "pool.*'yes'"),
        ({"trunk": 1}, "'trunk'.*encoder, decoder, pool, conv, norms, positions, weights"),
    ],
)
def test_bad_settings_are_refused(value, message):
    with pytest.raises(UserError, match=message):
        ActivationsConfig.of(value)


def test_presets_mappings_and_what_they_were_called():
    assert ActivationsConfig.of({}) == PRESETS["stock"] == ActivationsConfig()
    assert ActivationsConfig.of("low") == ActivationsConfig(1.0, 1.0, *[True] * 5)
    old = {"encoder": 0.3, "pool": True, "conv": True, "operations": True, "selective": True, "weights": True}
    assert renamed(old) == ActivationsConfig(0.3, 0.0, *[True] * 5) and renamed("fast") == PRESETS["fast"]
    with pytest.raises(UserError, match="memory has no setting 'norms'"):
        renamed({"norms": True})
    for value in ("stock", "fast", "default", "low", old):
        MEMORY.check("trainer.model.memory", value)
    assert compose(locate("severstal_lora_low_memory")[0], []).trainer.model.activations == "low"
    model = build("lean", SIZE, RESOLUTION).model
    assert type(model)(**{**arguments_of(model), "memory": {"pool": True}}).activations == ActivationsConfig(pool=True)


def arguments_of(model):
    """The parts of a `LoRASAM2Train`, for constructing another one."""
    parts = "image_encoder", "memory_attention", "memory_encoder"
    return {name: copy.deepcopy(getattr(model, name)) for name in parts} | {"image_size": RESOLUTION}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (1, 1, 2, 2), (0, 3, 4, 4), (2, 3, 5, 7), (1, 2, 2, 2**16)])
def test_pooling_equals_stock_to_the_bit_with_ties(shape, dtype):
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        x = torch.randint(0, 3, shape).to(dtype).contiguous(memory_format=layout).requires_grad_()
        y, expected = LeanMaxPool2d((2, 2), (2, 2))(x), nn.MaxPool2d((2, 2), (2, 2))(x)
        assert torch.equal(y, expected) and y.stride() == expected.stride()
        for dy in (torch.randn_like(expected), torch.randn_like(expected.mT).mT):
            grads = [torch.autograd.grad(result, x, dy, retain_graph=True)[0] for result in (y, expected)]
            assert torch.equal(*grads) and (1 in shape or grads[0].stride() == grads[1].stride())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("stock", "settings"),
    [
        (nn.Conv2d, {}),
        (nn.Conv2d, {"bias": False}),
        (nn.Conv2d, {"stride": 2, "padding": 1, "kernel_size": 3}),
        (nn.Conv2d, {"groups": 2}),
        (nn.ConvTranspose2d, {"stride": 2, "output_padding": 1, "kernel_size": 2}),
        (nn.ConvTranspose2d, {"stride": 2, "kernel_size": 2}),
        (nn.ConvTranspose2d, {"bias": False, "groups": 2, "padding": 1, "kernel_size": 3}),
    ],
)
def test_a_frozen_convolution_equals_stock_to_the_bit_and_keeps_nothing(stock, settings, autocast, layout):
    torch.manual_seed(0)
    stock = stock(4, 6, **{"kernel_size": 1, **settings}).requires_grad_(False)
    lean = copy.deepcopy(stock)
    lean.__class__ = {nn.Conv2d: LeanConv2d, nn.ConvTranspose2d: LeanConvTranspose2d}[type(stock)]
    x = torch.randn(2, 4, 9, 7).contiguous(memory_format=layout).requires_grad_()
    results = []
    for layer in (stock, lean):
        if layer.bias is not None:
            layer.bias.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), Saved(layer.parameters()) as saved:
            y = layer(x)
        trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        results.append((y, *torch.autograd.grad(y.float().square().sum(), [x, *trained])))
    assert all(map(torch.equal, *results)) and results[1][1].dtype == x.dtype
    assert results[1][1].stride() == results[0][1].stride()
    assert saved.total == 0
    lean.requires_grad_(True)
    assert torch.autograd.grad(lean(x).sum(), lean.weight)[0].shape == lean.weight.shape


def test_convolutions_that_stock_must_do():
    cases = [
        (LeanConv2d(4, 6, 3, padding="same"), nn.Conv2d, {}),
        (LeanConvTranspose2d(4, 6, 2, stride=2), nn.ConvTranspose2d, {"output_size": [11, 10]}),
    ]
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    for lean, stock, settings in cases:
        y, expected = lean.requires_grad_(False)(x, **settings), stock.forward(lean, x, **settings)
        assert torch.equal(y, expected)
        assert torch.equal(*(torch.autograd.grad(result.square().sum(), x)[0] for result in (y, expected)))


@pytest.mark.parametrize("preset", ["fast", "default", "low"])
def test_steps_leave_nothing_behind(preset):
    setup, batch = build("lean", SIZE, RESOLUTION, activations=preset), make_batch(RESOLUTION)
    with LiveBytes([*setup.model.parameters(), *setup.model.buffers()]) as live:
        left = []
        for _ in range(3):
            run_step(setup.optimizer, lambda: setup.step_loss(batch))
            gc.collect()
            left.append(live.now)
    assert left[2] == left[1] == left[0]


def test_position_encodings_that_nobody_reads_are_neither_made_nor_gathered():
    model = build("lean", SIZE, RESOLUTION).model
    *unread, last = model.forward_image(torch.zeros(2, 3, RESOLUTION, RESOLUTION))["vision_pos_enc"]
    side = RESOLUTION // 16
    assert [level.shape for level in unread] == [(2, 0, 4 * side, 4 * side), (2, 0, 2 * side, 2 * side)]
    assert last.shape[2:] == (side, side) and last.shape[1] > 0
    assert (side, side) in model.image_encoder.neck.position_encoding.cache


@pytest.mark.parametrize("objects", [1, 2])
def test_evaluation_frame_by_frame(objects):
    """SAM 2 then gathers by itself, and for one object not at all."""
    setup, batch = build("lean", SIZE, RESOLUTION), make_batch(RESOLUTION, objects=objects)
    setup.model.eval()
    frames = []
    for per_frame in (False, True):
        setup.model.forward_backbone_per_frame_for_eval = per_frame
        with torch.no_grad():
            frames.append(setup.model(batch)[0]["pred_masks_high_res"])
    assert torch.equal(*frames)
