"""Class tokens in stock's prompt encoder: equal to the clicks that they copy, and without effect on other prompts."""

import copy

import pytest
import torch
from sam2.build_sam import _load_checkpoint
from sam2.sam2_image_predictor import SAM2ImagePredictor

from helpers.stock_models import build
from sam2_lora_ext.deploy.predictors import fit_predictor
from sam2_lora_ext.host.class_encoder import ClassPromptEncoder, click_embeddings, install_class_prompts
from sam2_lora_ext.lora.class_tokens import FIRST_LABEL, STATE_KEY, ClassTokens, find_tokens
from sam2_lora_ext.utils.errors import UserError

NAMES = ("pit", "line", "scratch")
IDS = (1, 4, 255)
POINTS = torch.tensor([[[10.0, 20.0], [90.0, 5.0], [64.0, 64.0]], [[3.0, 3.0], [1.0, 120.0], [50.0, 60.0]]])
LABELS = torch.tensor([[1, 0, -1], [2, 3, 4]], dtype=torch.int32)


def tokens_of(values: torch.Tensor) -> ClassTokens:
    return ClassTokens(values, IDS[: len(values)], NAMES[: len(values)])


def random_tokens(count: int, width: int = 64, classes: int = 3) -> torch.Tensor:
    return torch.randn(classes, count, width, generator=torch.Generator().manual_seed(3))


def heads(model: torch.nn.Module, coords: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor | None = None):
    """The mask decoder's single masks, IoU and scores for prompts [N, P] on one image's features."""
    features = torch.randn(1, 64, 8, 8, generator=torch.Generator().manual_seed(4))
    high = [
        torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(5))
        for channels, side in ((8, 32), (16, 16))
    ]
    with torch.no_grad():
        sparse, dense = model.sam_prompt_encoder((coords, labels), None, mask)
        found = model.sam_mask_decoder(
            image_embeddings=features,
            image_pe=model.sam_prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
            repeat_image=True,
            high_res_features=high,
        )
    return found[0], found[1], found[3]


def equal(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def class_heads(model: torch.nn.Module, positions: list[int], **more):
    return heads(model, *find_tokens(model).prompt_of(torch.tensor(positions)), **more)


@pytest.mark.parametrize("label", [0, 1])
def test_a_token_that_is_a_click_is_that_click(label):
    """With K = 1, masks, IoU and score are bitwise equal."""
    model = build()
    coords, labels = torch.tensor([[[40.0, 70.0]]]), torch.tensor([[label]], dtype=torch.int32)
    embedding = model.sam_prompt_encoder._embed_points(coords, labels, pad=False)
    expected = heads(model, coords, labels)
    install_class_prompts(model, tokens_of(embedding))
    assert equal(class_heads(model, [0]), expected)


def test_a_token_that_is_no_point_is_the_padded_prompt_of_training():
    """`_forward_sam_heads` uses that prompt without clicks: two tokens of padding."""
    model = build()
    padding = torch.zeros(1, 1, 2), -torch.ones(1, 1, dtype=torch.int32)
    expected = heads(model, *padding)
    install_class_prompts(model, tokens_of(model.sam_prompt_encoder.not_a_point_embed.weight[None]))
    assert equal(class_heads(model, [0]), expected)


@pytest.mark.parametrize("pad", [True, False])
def test_without_class_labels_it_is_stock_bit_for_bit(pad):
    """Covers the labels -1 to 4 (4 is not a label of stock), boxes, and the image predictor."""
    plain, ours = build(), build()
    install_class_prompts(ours, tokens_of(random_tokens(8)))
    embedded = [model.sam_prompt_encoder._embed_points(POINTS, LABELS, pad) for model in (plain, ours)]
    assert torch.equal(*embedded)
    assert equal(heads(ours, POINTS, LABELS), heads(plain, POINTS, LABELS))
    if pad:
        image = torch.randint(0, 255, (64, 96, 3), generator=torch.Generator().manual_seed(1)).byte().numpy()
        found = []
        for model in (plain, ours):
            predictor = fit_predictor(SAM2ImagePredictor(model))
            predictor.set_image(image)
            found.append(
                predictor.predict(
                    point_coords=POINTS[0, :2].numpy(), point_labels=LABELS[0, :2].numpy(), return_logits=True
                )
            )
        assert all((a == b).all() for a, b in zip(*found))


def test_one_call_for_all_classes_is_a_call_for_each():
    model = build()
    install_class_prompts(model, tokens_of(random_tokens(4)))
    together = class_heads(model, [0, 1, 2])
    for position in range(3):
        for part, alone in zip(together, class_heads(model, [position]), strict=True):
            torch.testing.assert_close(part[position : position + 1], alone, rtol=1e-4, atol=1e-4)  # order of sums


def test_permutations():
    """Permuted classes permute the outputs bitwise; the order of a class's tokens only changes rounding."""
    model, values = build(), random_tokens(4)
    install_class_prompts(model, tokens_of(values))
    before = class_heads(model, [0, 1, 2])
    order = [2, 0, 1]
    assert equal(class_heads(model, order), [part[order] for part in before])
    install_class_prompts(model, tokens_of(values[order]))
    assert equal(class_heads(model, [0, 1, 2]), [part[order] for part in before])
    install_class_prompts(model, tokens_of(values[:, [3, 1, 0, 2]]))
    for one, other in zip(class_heads(model, [0, 1, 2]), before, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_a_click_beside_class_tokens_is_stocks():
    """The rows of a mixed prompt are those of its two parts."""
    model = build()
    install_class_prompts(model, tokens_of(random_tokens(2)))
    coords, labels = find_tokens(model).prompt_of(torch.tensor([2]))
    click = torch.tensor([[[5.0, 6.0]]]), torch.tensor([[0]], dtype=torch.int32)
    mixed = model.sam_prompt_encoder._embed_points(
        torch.cat([coords, click[0]], 1), torch.cat([labels, click[1]], 1), pad=True
    )
    assert torch.equal(mixed[0, :2], random_tokens(2)[2])
    assert torch.equal(mixed[:, 2:], model.sam_prompt_encoder._embed_points(*click, pad=True))


def test_stocks_strict_load_takes_metas_file(tmp_path):
    """A model with tokens loads Meta's file and keeps its tokens; it also loads a state dict with tokens."""
    model = build(seed=1)
    torch.save({"model": build().state_dict()}, tmp_path / "base.pt")
    install_class_prompts(model, tokens_of(random_tokens(8)))
    _load_checkpoint(model, tmp_path / "base.pt")
    assert torch.equal(find_tokens(model).tokens, random_tokens(8))
    assert torch.equal(model.no_mem_embed, build().no_mem_embed)
    other = build()
    install_class_prompts(other, tokens_of(torch.zeros(3, 8, 64)))
    other.load_state_dict(model.state_dict())
    assert torch.equal(find_tokens(other).tokens, random_tokens(8))
    assert STATE_KEY in model.state_dict()


def test_tokens_that_begin_as_clicks_of_the_base_that_is_loaded():
    """Each token is a positive click at a random point; weights with tokens replace them."""
    model, base = build(seed=1), build(seed=2)
    install_class_prompts(model, tokens_of(torch.zeros(3, 8, 64)), clicks_seed=7)
    begun = find_tokens(model).tokens.clone()
    model.load_state_dict(base.state_dict())
    tokens = find_tokens(model).tokens
    assert not torch.equal(tokens, begun)
    places = torch.rand(24, 2, generator=torch.Generator().manual_seed(7))
    labels = torch.ones(1, 24, dtype=torch.int32)
    clicks = base.sam_prompt_encoder._embed_points(places[None] * 128 - 0.5, labels, False)
    torch.testing.assert_close(tokens.flatten(0, 1), clicks[0], rtol=1e-4, atol=1e-4)  # sines of angles up to 20
    state = {**base.state_dict(), STATE_KEY: torch.ones(3, 8, 64)}
    model.load_state_dict(state)
    assert (find_tokens(model).tokens == 1).all()
    drawn = click_embeddings(torch.zeros(1, 64), torch.randn(2, 32), 4, 0)
    assert torch.allclose(drawn.square().sum(1), torch.full((4,), 32.0))


def test_labels_positions_and_faults():
    tokens = tokens_of(random_tokens(2))
    coords, labels = tokens.prompt_of(tokens.position_of(torch.tensor([255.0, 1.0, 4.0])))
    assert labels.tolist() == [[FIRST_LABEL + 4, FIRST_LABEL + 5], [16, 17], [18, 19]] and labels.dtype == torch.int32
    assert coords.shape == (3, 2, 2) and not coords.any()
    with pytest.raises(
        UserError, match="no class prompt for class 3: the model has prompts for 1 pit, 4 line, 255 scr"
    ):
        tokens.position_of(torch.tensor([[1, 3]]))
    for values, ids, names, words in (
        (torch.zeros(2, 64), (1, 2), NAMES[:2], "must be"),
        (torch.zeros(2, 1, 64), (2, 1), NAMES[:2], "ascending"),
        (torch.zeros(2, 1, 64), (1, 2), NAMES, "the same number of ids"),
        (torch.full((1, 1, 64), torch.nan), (1,), ("a",), "finite"),
    ):
        with pytest.raises(UserError, match=words):
            ClassTokens(values, ids, names)
    model = build()
    install_class_prompts(model, tokens)
    with pytest.raises(UserError, match="have the labels 16 to 21, got 22"):
        heads(model, torch.zeros(1, 1, 2), torch.tensor([[22.0]]))
    with pytest.raises(UserError, match="width 32, but the model's prompt tokens have 64"):
        install_class_prompts(build(), tokens_of(random_tokens(2, 32)))
    with pytest.raises(UserError, match="not a NoneType"):
        install_class_prompts(torch.nn.Linear(1, 1), tokens)


def test_copies_have_tokens_of_their_own():
    model = build()
    install_class_prompts(model, tokens_of(random_tokens(2)))
    other = copy.deepcopy(model)
    assert type(other.sam_prompt_encoder) is ClassPromptEncoder
    with torch.no_grad():
        find_tokens(other).tokens.zero_()
    assert torch.equal(find_tokens(model).tokens, random_tokens(2)) and find_tokens(build()) is None
