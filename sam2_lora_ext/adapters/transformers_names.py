"""The names of Hugging Face transformers' `Sam2Model` and `Sam2VideoModel` for the modules and tensors of SAM 2.

Both have the same modules (the fused `qkv` of Hiera too) under other names, so weights and adapters are converted both
ways by renaming. Only these tensors differ: transformers has the four point embeddings as one matrix (4, C), and the
matrix of the positional encoding twice. The names are those of transformers 5.24. Needs torch only.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from sam2_lora_ext.lora.adapter_state import Adapter
from sam2_lora_ext.utils.errors import UserError

ENDS = (".weight", ".bias")
POINTS = "sam_prompt_encoder.point_embeddings.{}.weight"  # four of (1, C)
THEIR_POINTS = "prompt_encoder.point_embed.weight"  # (4, C)
THEIR_POSITIONS = (
    "prompt_encoder.shared_embedding.positional_embedding",
    "shared_image_embedding.positional_embedding",
)
THEIR_ROOTS = ("vision_encoder.", "mask_decoder.", "prompt_encoder.")  # no name of SAM 2 begins with it
APART = re.compile(r"vision_encoder\..*\.attn\.(?!qkv$|proj$)\w*(q|k|v|query|key|value)\w*")
DOWNSAMPLER = re.compile(r"memory_encoder\.mask_downsampler\.(?:encoder|layers)\.(\d+)")

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
        "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": THEIR_POSITIONS[0],
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


class Names:
    """Renames in one direction; `names[...]` takes a module's or a tensor's name.

    Args:
        theirs: from their names to SAM 2's, instead of the other way.
        downsamplings: see `name_pairs`.
    """

    def __init__(self, theirs: bool = False, downsamplings: int = 4):
        self.theirs = theirs
        self._plain: dict[str, str] = {}
        for ours, other in name_pairs(downsamplings).items():
            self._plain[other if theirs else ours] = ours if theirs else other

    @classmethod
    def of(cls, names: Iterable[str], theirs: bool = False) -> "Names":
        """The renaming for the names of one model, whose mask downsampler may have another number of steps."""
        found = [int(match.group(1)) for name in names if (match := DOWNSAMPLER.match(name))]
        return cls(theirs, (max(found) + 1 if theirs else max(found) // 3) if found else 4)

    def get(self, name: str) -> str | None:
        """The other name; None for an unknown one."""
        end = next((end for end in ENDS if name.endswith(end)), "")
        for stem, rest in ((name, ""), (name.removesuffix(end), end)):
            for key, numbers in _with_stars(stem):
                if key in self._plain:
                    other = self._plain[key]
                    for number in numbers:
                        other = other.replace("*", number, 1)
                    return other + rest
        return None

    def __getitem__(self, name: str) -> str:
        """The other name.

        Raises:
            UserError: there is none.
        """
        if (other := self.get(name)) is not None:
            return other
        if self.theirs and APART.fullmatch(name.removesuffix(".weight").removesuffix(".bias")):
            raise UserError(
                f"{name} is no module of SAM 2, whose image encoder has query, key and value fused in one attn.qkv, as "
                "transformers 5.24 has it: an adapter that has them apart, or fused otherwise, cannot be carried over"
            )
        ours, other = ("transformers' Sam2Model", "SAM 2") if self.theirs else ("SAM 2", "transformers' Sam2VideoModel")
        raise UserError(f"{name} of {ours} has no counterpart in {other}: it cannot be carried over")


def speaks_transformers(names: Iterable[str]) -> bool:
    """Whether names of modules or tensors are transformers' and not SAM 2's; names that both use do not count."""
    ours, theirs = Names(), Names(theirs=True)
    return any(
        name.startswith(THEIR_ROOTS) or ours.get(name) is None and theirs.get(name) is not None for name in names
    )


def state_to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of SAM 2 under the names of `Sam2VideoModel`, which has all that `Sam2Model` has.

    The second copy of the positional encoding's matrix is not among them, see `THEIR_POSITIONS`.

    Raises:
        UserError: a tensor has no counterpart.
    """
    names, renamed = Names.of(state), {}
    points = [POINTS.format(number) for number in range(4)]
    joined = all(point in state for point in points)
    for key, value in state.items():
        if not joined or key not in points:
            renamed[names[key]] = value
    if joined:
        renamed[THEIR_POINTS] = torch.cat([state[point] for point in points])
    return renamed


def state_from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of `state_to_transformers`.

    Raises:
        UserError: a tensor has no counterpart, or the two copies of the positional encoding's matrix differ.
    """
    names, renamed = Names.of(state, theirs=True), {}
    first, second = (state.get(key) for key in THEIR_POSITIONS)
    if first is not None and second is not None and not torch.equal(first, second):
        raise UserError(f"{THEIR_POSITIONS[0]} and {THEIR_POSITIONS[1]} differ, and SAM 2 has one for both")
    for key, value in state.items():
        if key == THEIR_POINTS:
            renamed |= {POINTS.format(number): row for number, row in enumerate(value.split(1))}
        elif key != THEIR_POSITIONS[1]:
            renamed[names[key]] = value
    return renamed


def rename_adapter(adapter: Adapter, *, theirs: bool = False) -> Adapter:
    """An adapter for transformers' models from one for SAM 2, or with `theirs` the other way round.

    Raises:
        UserError: it changes a module that the other model lacks; the message names it.
    """
    names, rename = Names.of(adapter.full, theirs), state_from_transformers if theirs else state_to_transformers
    layers = {names[name]: layer for name, layer in adapter.layers.items()}
    modules = [names[module] for module in adapter.full_modules]
    return replace(adapter, layers=layers, full=rename(adapter.full), full_modules=modules)


def _with_stars(name: str) -> Iterator[tuple[str, list[str]]]:
    """A name with its first numbers, or none of them, replaced by `*`, and those numbers; fewest stars last."""
    parts = name.split(".")
    positions = [position for position, part in enumerate(parts) if part.isdecimal()]
    for count in range(len(positions), -1, -1):
        replaced = ["*" if position in positions[:count] else part for position, part in enumerate(parts)]
        yield ".".join(replaced), [parts[position] for position in positions[:count]]
