"""The names of SAM 2's modules in Hugging Face transformers' `Sam2Model` and `Sam2VideoModel` (5.24)."""

from collections.abc import Mapping

POSITIONS = "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
THEIR_POSITIONS = (
    "prompt_encoder.shared_embedding.positional_embedding",
    "shared_image_embedding.positional_embedding",
)
ATTENTION = {"": "", ".q_proj": ".q_proj", ".k_proj": ".k_proj", ".v_proj": ".v_proj", ".out_proj": ".o_proj"}
MLP = {"": "", ".layers.0": ".proj_in", ".layers.1": ".proj_out"}
HEAD = {"": "", ".layers.0": ".proj_in", ".layers.1": ".layers.0", ".layers.2": ".proj_out"}
NORMS = {f".norm{number}": f".layer_norm{number}" for number in range(1, 5)}


def name_pairs(downsamplings: int = 4) -> dict[str, str]:
    """SAM 2's names -> theirs, of modules and of bare parameters; `*` is a number.

    Args:
        downsamplings: steps of the memory encoder's mask downsampler: a convolution, a norm and an activation each.
    """

    def below(ours: str, theirs: str, *groups: Mapping[str, str]) -> dict[str, str]:
        return {ours + end: theirs + other for group in groups for end, other in group.items()}

    def same(*names: str) -> dict[str, str]:
        return {f".{name}": f".{name}" for name in names}

    block, their_block = "image_encoder.trunk.blocks.*", "vision_encoder.backbone.blocks.*"
    layer, their_layer = "sam_mask_decoder.transformer.layers.*", "mask_decoder.transformer.layers.*"
    memory, encoder, their_encoder = "memory_attention.layers.*", "memory_encoder", "memory_encoder"
    down = f"{encoder}.mask_downsampler"
    return {
        "image_encoder": "vision_encoder",
        "image_encoder.trunk": "vision_encoder.backbone",
        **below(
            "image_encoder.trunk",
            "vision_encoder.backbone",
            same("pos_embed", "pos_embed_window", "patch_embed"),
            {".patch_embed.proj": ".patch_embed.projection"},
        ),
        **below(block, their_block, {"": ""}, same("attn", "attn.qkv", "attn.proj", "proj"), NORMS),
        **below(f"{block}.mlp", f"{their_block}.mlp", MLP),
        "image_encoder.neck": "vision_encoder.neck",
        "image_encoder.neck.convs.*.conv": "vision_encoder.neck.convs.*",
        "sam_prompt_encoder": "prompt_encoder",
        POSITIONS: THEIR_POSITIONS[0],
        "sam_prompt_encoder.point_embeddings": "prompt_encoder.point_embed",
        **below("sam_prompt_encoder", "prompt_encoder", same("not_a_point_embed", "no_mask_embed")),
        **below(
            "sam_prompt_encoder.mask_downscaling",
            "prompt_encoder.mask_embed",
            {"": "", ".0": ".conv1", ".1": ".layer_norm1", ".3": ".conv2", ".4": ".layer_norm2", ".6": ".conv3"},
        ),
        **below(
            "sam_mask_decoder",
            "mask_decoder",
            {"": ""},
            same(
                "transformer",
                "iou_token",
                "mask_tokens",
                "obj_score_token",
                "conv_s0",
                "conv_s1",
                "output_hypernetworks_mlps",
            ),
            {
                ".output_upscaling.0": ".upscale_conv1",
                ".output_upscaling.1": ".upscale_layer_norm",
                ".output_upscaling.3": ".upscale_conv2",
                ".transformer.norm_final_attn": ".transformer.layer_norm_final_attn",
            },
        ),
        **below(layer, their_layer, {"": ""}, NORMS),
        **below(f"{layer}.mlp", f"{their_layer}.mlp", MLP),
        **{
            name: other
            for attention in (
                "layers.*.self_attn",
                "layers.*.cross_attn_token_to_image",
                "layers.*.cross_attn_image_to_token",
                "final_attn_token_to_image",
            )
            for name, other in below(
                f"sam_mask_decoder.transformer.{attention}", f"mask_decoder.transformer.{attention}", ATTENTION
            ).items()
        },
        **{
            name: other
            for head in ("output_hypernetworks_mlps.*", "iou_prediction_head", "pred_obj_score_head")
            for name, other in below(f"sam_mask_decoder.{head}", f"mask_decoder.{head}", HEAD).items()
        },
        **below("memory_attention", "memory_attention", {"": "", ".norm": ".layer_norm"}),
        **below(memory, memory, {"": ""}, same("linear1", "linear2"), NORMS),
        **below(f"{memory}.self_attn", f"{memory}.self_attn", ATTENTION),
        **below(f"{memory}.cross_attn_image", f"{memory}.cross_attn_image", ATTENTION),
        **below(
            encoder,
            their_encoder,
            {
                "": "",
                ".pix_feat_proj": ".feature_projection",
                ".out_proj": ".projection",
                ".fuser": ".memory_fuser",
                ".fuser.layers.*": ".memory_fuser.layers.*",
                ".mask_downsampler": ".mask_downsampler",
            },
        ),
        **below(
            f"{encoder}.fuser.layers.*",
            f"{their_encoder}.memory_fuser.layers.*",
            {
                ".gamma": ".scale",
                ".dwconv": ".depthwise_conv",
                ".norm": ".layer_norm",
                ".pwconv1": ".pointwise_conv1",
                ".pwconv2": ".pointwise_conv2",
            },
        ),
        **{f"{down}.encoder.{3 * step}": f"{down}.layers.{step}.conv" for step in range(downsamplings)},
        **{f"{down}.encoder.{3 * step + 1}": f"{down}.layers.{step}.layer_norm" for step in range(downsamplings)},
        f"{down}.encoder.{3 * downsamplings}": f"{down}.final_conv",
        **below("obj_ptr_proj", "object_pointer_proj", HEAD),
        "obj_ptr_tpos_proj": "temporal_positional_encoding_projection_layer",
        "mask_downsample": "mask_downsample",
        "no_mem_embed": "no_memory_embedding",
        "no_mem_pos_enc": "no_memory_positional_encoding",
        "maskmem_tpos_enc": "memory_temporal_positional_encoding",
        "no_obj_ptr": "no_object_pointer",
        "no_obj_embed_spatial": "occlusion_spatial_embedding_parameter",
    }
