"""Norms of updates by layer and block: by hand, and for every way in which a model can have been changed."""

import pytest
import torch

from sam2_lora_ext.lora.adapter_state import Adapter, LayerAdapter
from sam2_lora_ext.report.adapter_stats import adapter_changes, block_of, by_block, weight_changes

QKV, PROJ = (f"image_encoder.trunk.blocks.3.attn.{name}" for name in ("qkv", "proj"))
MLP, NORM = "sam_mask_decoder.transformer.layers.1.mlp.layers.0", "image_encoder.trunk.blocks.3.norm1"


def adapter() -> Adapter:
    def layer(a: list[float], b: list[float], alpha: float, magnitude: torch.Tensor | None = None) -> LayerAdapter:
        return LayerAdapter(torch.tensor([a]), torch.tensor(b)[:, None], alpha, magnitude=magnitude)

    layers = {
        QKV: layer([3.0, 4.0], [1.0, 0.0], 2.0),  # D = 2 [[3, 4], [0, 0]]
        PROJ: layer([1.0, 0.0], [0.0, 0.0], 1.0),
        MLP: layer([1.0, 0.0], [1.0, 1.0], 1.0),
    }
    return Adapter(layers)


def test_norms_by_hand():
    base = {f"{name}.weight": torch.full((2, 2), 5.0) for name in (QKV, PROJ, MLP)}  # norm 10
    changes = adapter_changes(adapter(), base)
    assert [change.norm for change in changes] == pytest.approx([10.0, 0.0, 2**0.5])
    assert [change.relative for change in changes] == pytest.approx([1.0, 0.0, 2**0.5 / 10])
    blocks = by_block(changes)
    assert [block.name for block in blocks] == ["encoder block 3", "decoder layer 1"]
    assert blocks[0].relative == pytest.approx(10 / 200**0.5)  # sqrt(100 + 0) / sqrt(100 + 100)
    alone = adapter_changes(adapter(), None)
    assert [change.norm for change in alone] == pytest.approx([10.0, 0.0, 2**0.5])
    assert [block.relative for block in by_block(alone)] == [None, None]


def test_modules_trained_in_full_count_with_their_block():
    layers = adapter().layers
    both = Adapter({QKV: layers[QKV]}, {f"{NORM}.weight": torch.tensor([3.0, 4.0])}, [NORM])
    base = {f"{QKV}.weight": torch.full((2, 2), 5.0), f"{NORM}.weight": torch.zeros(2)}
    rows = adapter_changes(both, base)
    assert [(row.name, row.norm, row.relative) for row in rows] == [(QKV, 10.0, 1.0), (f"{NORM}.weight", 5.0, None)]
    assert by_block(rows)[0].norm == pytest.approx(125**0.5)
    assert [row.name for row in adapter_changes(both, None)] == [QKV]  # what the norm was before is not known


def test_dora_is_measured_by_what_the_weight_becomes():
    """W' = m (W + D) / ||W + D||, by rows; with D = 0 and m = 2 ||W|| the update is W itself."""
    weight = torch.tensor([[3.0, 4.0], [6.0, 8.0]])
    layer = LayerAdapter(torch.ones(1, 2), torch.zeros(2, 1), 1.0, magnitude=2 * weight.norm(dim=1))
    change = adapter_changes(Adapter({QKV: layer}), {f"{QKV}.weight": weight})[0]
    assert change.norm == pytest.approx(125**0.5) and change.relative == pytest.approx(1.0)
    assert adapter_changes(Adapter({QKV: layer}), None) == []


def test_whole_weights_are_compared_tensor_by_tensor():
    same, bias, alone = "image_encoder.neck.convs.0.conv.weight", f"{NORM}.bias", "no_mem_embed"
    base = {same: torch.ones(4), bias: torch.ones(4), alone: torch.ones(1)}
    state = {same: torch.ones(4).half(), bias: torch.full((4,), 1.5), alone: torch.tensor([3.0])}
    rows = weight_changes(state, base)
    assert [(row.name, row.norm, row.relative) for row in rows] == [(bias, 1.0, 0.5), (alone, 2.0, 2.0)]
    assert [row.name for row in by_block(rows)] == ["encoder block 3", "no_mem_embed"]


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("sam_mask_decoder.transformer.final_attn_token_to_image.q_proj", "decoder final_attn_token_to_image"),
        ("sam_mask_decoder.transformer.layers.1.norm4.weight", "decoder layer 1"),
        ("sam_mask_decoder.output_upscaling.0.weight", "decoder output_upscaling"),
        ("memory_attention.layers.0.self_attn.q_proj", "memory layer 0"),
        ("image_encoder.trunk.blocks.12.mlp.layers.0", "encoder block 12"),
        ("image_encoder.neck.convs.0.conv.weight", "encoder neck"),
        ("sam_prompt_encoder.mask_downscaling.0.weight", "prompt encoder mask_downscaling"),
        ("maskmem_tpos_enc", "maskmem_tpos_enc"),
    ],
)
def test_block_names(name, block):
    assert block_of(name) == block
