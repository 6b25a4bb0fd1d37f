"""`LoRASAM2Train`: bitwise stock where required, prompts by object, targets in the outputs, all gradients."""

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from helpers.small_runs import make_batch, make_model
from sam2_lora_ext.host.configs import config_root
from sam2_lora_ext.lora import lora_layers

DEFECTS = [[1_000_001], [3_000_001, 2_000_002]]
MIXED = [[1_000_001], [0], [4_000_003]]
STOCK = "training.model.sam2.SAM2Train"
FEW = {"num_correction_pt_per_frame": 2}


def outputs_of(model: torch.nn.Module, batch: object, *, train: bool, seed: int = 5) -> list[dict]:
    """A forward pass from a given state of the random numbers."""
    model.train(train)
    torch.manual_seed(seed)
    model.rng = np.random.default_rng(seed)
    return model(batch)


def assert_equal_outputs(one: list[dict], other: list[dict], keys: set[str] | None = None) -> None:
    """Bitwise, every tensor that stock returns."""
    for left, right in zip(one, other, strict=True):
        for key in keys or right.keys():
            pairs = (
                zip(left[key], right[key], strict=True) if isinstance(right[key], list) else [(left[key], right[key])]
            )
            for a, b in pairs:
                if isinstance(b, dict):
                    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b)
                elif b is not None:
                    assert a == b if isinstance(b, bool) else torch.equal(a, b), key


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("frames", [1, 2])
def test_without_lora_it_is_stocks_model(train, frames):
    """Bitwise, from the same random numbers: outputs, and gradients of all parameters, with `activations: stock` and
    `prompt_seed: null`."""
    batch = make_batch(DEFECTS, frames)
    settings = {
        "lora": None,
        "activations": "stock",
        "prompt_seed": None,
        "num_init_cond_frames_for_train": 1,
        "prob_to_use_box_input_for_train": 0.5,
        **FEW,
    }
    ours, stock = make_model(**settings), make_model(**settings, _target_=STOCK)
    assert all(torch.equal(value, ours.state_dict()[key]) for key, value in stock.state_dict().items())
    for seed in (5, 6, 7):  # clicks and boxes
        got, expected = (outputs_of(model, batch, train=train, seed=seed) for model in (ours, stock))
        skipped = {"maskmem_features", "maskmem_pos_enc"} if frames == 1 else set()
        assert_equal_outputs(got, expected, expected[0].keys() - skipped)
    if train:
        for out in (got, expected):
            sum(frame["multistep_pred_masks_high_res"].square().mean() for frame in out).backward()
        gradients = dict(ours.named_parameters())
        for name, parameter in stock.named_parameters():
            if parameter.grad is not None:
                assert torch.equal(parameter.grad, gradients[name].grad), name


@pytest.mark.parametrize("train", [True, False])
def test_at_step_0_the_adapters_change_nothing(train):
    """B = 0; also with dropout on A's input, whose random numbers must not shift stock's clicks' (dropout 0 here)."""
    lora = make_model(**FEW)
    # as in the other: frozen convolutions are rounded otherwise
    base = make_model(lora=None, **FEW).requires_grad_(False)
    assert sum(1 for _ in lora_layers(lora)) == 48
    got, expected = (outputs_of(model, make_batch(MIXED), train=train) for model in (lora, base))
    assert_equal_outputs(got, expected)


def test_targets_and_classes_stand_beside_the_outputs():
    batch = make_batch([[1_000_001], [0, 3_000_007]], frames=2)
    outputs = outputs_of(make_model(**FEW), batch, train=False)
    for t, frame in enumerate(outputs):
        assert torch.equal(frame["gt_masks"], batch.masks[t][:, None]) and frame["gt_masks"].dtype == torch.bool
        assert frame["class_ids"].tolist() == [1, 0, 3]
        assert frame["multistep_pred_masks_high_res"].shape[:2] == (3, 3 if t == 0 else 1)


def test_prompts_of_a_clean_object():
    """One positive click on what is not black, in both modes and whatever is drawn; then negative ones; never a box."""
    model = make_model(prob_to_use_box_input_for_train=0.5, prob_to_use_box_input_for_eval=0.5, **FEW)
    batch = make_batch(MIXED)
    boxes = 0
    for seed in range(6):
        for train in (True, False):
            prompts = outputs_of(model, batch, train=train, seed=seed)[0]["multistep_point_inputs"]
            coords, labels = prompts[-1]["point_coords"][1], prompts[-1]["point_labels"][1].tolist()
            boxed = len(labels) == 4
            boxes += boxed
            assert labels == ([1, -1, 0, 0] if boxed else [1, 0, 0])
            assert coords[0, 0] >= 128 // 8
    assert 0 < boxes < 12


def test_validation_draws_the_same_prompts_each_time():
    """From whatever state of the random numbers, and a clean object's click depends on the object only."""
    model = make_model(**FEW)
    first, again = (outputs_of(model, make_batch(MIXED), train=False, seed=seed) for seed in (1, 2))
    assert_equal_outputs(first, again)
    coords = [out[0]["multistep_point_inputs"][0]["point_coords"][1] for out in (first, again)]
    assert torch.equal(*coords)


@pytest.mark.parametrize("prompt_seed", [None, 3])
def test_clicks_differ_between_training_steps(prompt_seed):
    """A defect's and a clean object's, however often the same image comes."""
    model = make_model(
        prompt_seed=prompt_seed, prob_to_use_box_input_for_train=0.0, prob_to_sample_from_gt_for_train=0.0, **FEW
    ).train()
    torch.manual_seed(0)
    prompts = [model(make_batch(MIXED))[0]["multistep_point_inputs"][0]["point_coords"][:, 0] for _ in range(5)]
    for clicks in zip(*prompts):
        assert len({tuple(click.tolist()) for click in clicks}) > 1


@pytest.mark.parametrize("box", [0.0, 1.0])
def test_prompt_seed_makes_clicks_independent_of_the_batch_and_changes_them_with_the_step(box):
    model = make_model(
        prompt_seed=3, prob_to_use_box_input_for_train=box, prob_to_sample_from_gt_for_train=0.0, lora=None, **FEW
    ).train()
    together, alone = make_batch([[1_000_001, 0]]), make_batch([[1_000_001]])

    def first_prompts(batch: object, seed: int) -> list[torch.Tensor]:
        """Of two steps, from a state of the global random numbers."""
        torch.manual_seed(seed)
        model.rng = np.random.default_rng(7)
        return [model(batch)[0]["multistep_point_inputs"][0]["point_coords"][0] for _ in range(2)]

    one, two = first_prompts(together, 1)
    assert not torch.equal(one, two)
    for expected, got in zip((one, two), first_prompts(alone, 2), strict=True):
        assert torch.equal(expected, got)


def test_the_memory_of_a_single_frame_is_not_encoded():
    """And of two it is: the second frame reads it."""
    model = make_model(**FEW)
    calls = []
    model.memory_encoder.register_forward_hook(lambda *args: calls.append(1))
    outputs_of(model, make_batch(DEFECTS), train=True)
    assert not calls
    outputs_of(model, make_batch(DEFECTS, frames=2), train=True)
    assert len(calls) == 2


def assert_every_adapter_gets_a_gradient(prompt: str, frames: int, **changes: object) -> None:
    model = make_model(
        prob_to_use_pt_input_for_train=0.0 if prompt == "mask" else 1.0,
        num_correction_pt_per_frame=1,
        prob_to_use_box_input_for_train=1.0 if prompt == "box" else 0.0,
        **changes,
    )
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.lora_b.normal_(std=0.01)  # so that A gets one too
    outputs = outputs_of(model, make_batch(DEFECTS, frames), train=True)
    loss = sum(frame["multistep_pred_masks_high_res"].square().mean() for frame in outputs)
    loss = loss + sum(score.square().mean() for frame in outputs for score in frame["multistep_object_score_logits"])
    loss.backward()
    for name, layer in lora_layers(model):
        for half in ("lora_a", "lora_b"):
            gradient = getattr(layer, half).grad
            assert gradient is not None and gradient.isfinite().all() and gradient.any(), (name, half)
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("prompt", ["click", "box", "mask"])
def test_every_adapter_gets_a_gradient(prompt, frames):
    """So `find_unused_parameters` may stay off for the default targets, whatever is drawn (one frame takes no mask)."""
    assert_every_adapter_gets_a_gradient(prompt, frames)


@pytest.mark.parametrize("corrected", [1, 2])
@pytest.mark.parametrize("prompt", ["click", "box", "mask"])
def test_every_adapter_of_the_video_config_gets_a_gradient(prompt, corrected):
    """The memory attention's too, from any clip; `corrected` frames get clicks."""
    video = OmegaConf.load(config_root() / "configs/base/video.yaml")
    targets = list(video.lora.targets)
    assert any(target.startswith("memory_attention") for target in targets)
    clips = {
        **video.trainer.model,
        "num_frames_to_correct_for_train": corrected,
        "rand_frames_to_correct_for_train": False,
    }
    assert_every_adapter_gets_a_gradient(prompt, 3, lora={"targets": targets, "rank": 2}, **clips)


def compiled_gradients(activations: str, compile_as: str | None) -> list[torch.Tensor]:
    """Of the encoder's adapters, after a step whose image encoder is compiled as SAM 2 does it, or not at all."""
    settings = {"activations": activations, "num_correction_pt_per_frame": 1}
    model = make_model(compile_image_encoder=compile_as == "inductor", **settings)
    if compile_as == "aot_eager":
        torch._dynamo.reset()
        model.image_encoder.forward = torch.compile(model.image_encoder.forward, fullgraph=True, backend=compile_as)
    layers = [layer for name, layer in lora_layers(model) if name.startswith("image_encoder")]
    for layer in layers:
        layer.lora_b.data.fill_(0.01)
    outputs = outputs_of(model, make_batch(DEFECTS), train=True)
    sum(frame["multistep_pred_masks_high_res"].square().mean() for frame in outputs).backward()
    return [layer.lora_a.grad for layer in layers]


@pytest.mark.parametrize(
    ("activations", "compile_as"),
    [
        ("default", "aot_eager"),
        pytest.param("low", "aot_eager", marks=pytest.mark.slow),
        pytest.param("default", "inductor", marks=pytest.mark.slow),
    ],
)
def test_a_compiled_image_encoder_trains_its_adapters(activations, compile_as):
    """SAM 2's `compile_image_encoder` wants one graph without a break."""
    for got, expected in zip(*(compiled_gradients(activations, how) for how in (compile_as, None)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-8)
