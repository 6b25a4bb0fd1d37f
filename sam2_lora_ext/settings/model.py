"""The rows for the model, its adapters, the loss and the meters."""

from collections.abc import Mapping
from typing import Any

from sam2_lora_ext.settings.class_data import EXCLUSIVE
from sam2_lora_ext.settings.containers import INSIDE, ListOf, MapOf, Nullable, Section, either
from sam2_lora_ext.settings.data import CLASS, CLASS_NAME, CROP, PATH, RESOLUTION, SEED, SHARE
from sam2_lora_ext.settings.kinds import Flag, Number, Text, Whole, one_of

GLOBS = ListOf(Text(longest=300))
RANK, ALPHA = Whole(1, 4096), Number(0, 1e6, above=True)
WEIGHT = Number(0, 1e6)  # of a term of the loss, or of a class


def something_to_train(section: Mapping[str, Any]) -> str | None:
    """Something is trained (adapters, or modules in full); DoRA adapts a fused qkv as one."""
    if section.get("targets") == [] and not section.get("trainable"):
        return "targets and trainable are both empty, so there is nothing to train"
    if section.get("variant") == "dora" and section.get("qkv_parts") is not None:
        return "variant dora gives every row of a fused qkv a magnitude; set qkv_parts to null"
    return None


def once_each(section: Mapping[str, Any]) -> str | None:
    """q, k and v at most once."""
    parts = section.get("qkv_parts") or []
    return f"qkv_parts must name each of q, k, v at most once, got {parts}" if len(set(parts)) < len(parts) else None


def some_weight(section: Mapping[str, Any]) -> str | None:
    """A loss needs a weight other than 0."""
    return None if any(section.values()) else "all weights are 0, so the loss has no gradient; give one a weight"


def corrects_prompted(section: Mapping[str, Any]) -> str | None:
    """SAM 2 corrects the prompted frames first, so at least these must be corrected."""
    for phase in ("train", "eval"):
        prompted = section.get(f"num_init_cond_frames_for_{phase}", 1)
        corrected = section.get(f"num_frames_to_correct_for_{phase}", 1)
        if corrected < prompted:
            return f"num_frames_to_correct_for_{phase} is {corrected}, below the {prompted} frames that are prompted"
    return None


LORA = Section(
    {
        "targets": GLOBS,
        "rank": RANK,
        "alpha": ALPHA,
        "dropout": Number(0, 1, below=True),
        "dropout_on": one_of("inputs", "channels"),
        "rslora": Flag(),
        "rank_pattern": MapOf(kind=RANK),
        "alpha_pattern": MapOf(kind=ALPHA),
        "qkv_parts": Nullable(ListOf(one_of("q", "k", "v"), least=1, most=3)),
        "trainable": GLOBS,
        "freeze_a": Flag(),
        "variant": one_of("lora", "dora", "pissa"),
        "implementation": one_of("plain", "lean"),
    },
    rules=(once_each, something_to_train),
).called("lora")
PRESET = one_of("stock", "fast", "default", "low")
ACTIVATIONS = either(
    PRESET,
    Section(
        {"encoder": SHARE, "decoder": SHARE} | dict.fromkeys(("pool", "conv", "norms", "positions", "weights"), Flag())
    ),
)
MEMORY = either(
    PRESET,
    Section(  # the name in version 0.1
        {"encoder": SHARE, "decoder": SHARE}
        | dict.fromkeys(("pool", "conv", "operations", "selective", "weights"), Flag())
    ),
)
ARCHITECTURE = (
    dict.fromkeys(
        (  # Meta's configs set these
            "image_encoder",
            "memory_attention",
            "memory_encoder",
            "sam_mask_decoder_extra_args",
        ),
        INSIDE,
    )
    | dict.fromkeys(
        (
            "binarize_mask_from_pts_for_mem_enc",
            "use_mask_input_as_output_without_sam",
            "directly_add_no_mem_embed",
            "use_high_res_features_in_sam",
            "multimask_output_in_sam",
            "multimask_output_for_tracking",
            "use_multimask_token_for_obj_ptr",
            "iou_prediction_use_sigmoid",
            "non_overlap_masks_for_mem_enc",
            "use_obj_ptrs_in_encoder",
            "add_tpos_enc_to_obj_ptrs",
            "proj_tpos_enc_in_obj_ptrs",
            "use_signed_tpos_enc_to_obj_ptrs",
            "only_obj_ptrs_in_the_past_for_eval",
            "pred_obj_scores",
            "pred_obj_scores_mlp",
            "fixed_no_obj_ptr",
            "soft_no_obj_ptr",
            "use_mlp_for_obj_ptr_proj",
            "no_obj_embed_spatial",
            "compile_image_encoder",
        ),
        Flag(),
    )
    | {
        "num_maskmem": Whole(1, 1000),
        "backbone_stride": Whole(1, 64),
        "sigmoid_scale_for_mem_enc": Number(-1e4, 1e4),
        "sigmoid_bias_for_mem_enc": Number(-1e4, 1e4),
        "max_cond_frames_in_attn": Whole(-1, 10_000),
        "multimask_min_pt_num": Whole(0, 1000),
        "multimask_max_pt_num": Whole(0, 1000),
        "memory_temporal_stride_for_eval": Whole(1, 1000),
        "max_obj_ptrs_in_encoder": Whole(1, 1000),
    }
)
PROMPTS = (
    {f"prob_to_use_{kind}_input_for_{phase}": SHARE for kind in ("pt", "box") for phase in ("train", "eval")}
    | {
        "prob_to_sample_from_gt_for_train": SHARE,
        "num_correction_pt_per_frame": Whole(1, 100),
        "pt_sampling_for_eval": one_of("center", "uniform"),
        "add_all_frames_to_correct_as_cond": Flag(),
        "use_act_ckpt_iterative_pt_sampling": Flag(),
        "forward_backbone_per_frame_for_eval": Flag(),
        "freeze_image_encoder": Flag(),
    }
    | {
        f"{name}_for_{phase}": kind
        for phase in ("train", "eval")
        for name, kind in {
            "num_frames_to_correct": Whole(1, 10_000),
            "num_init_cond_frames": Whole(1, 10_000),
            "rand_frames_to_correct": Flag(),
            "rand_init_cond_frames": Flag(),
        }.items()
    }
)
MODEL = {"image_size": RESOLUTION, **PROMPTS, **ARCHITECTURE}
CACHE = Section({"folder": PATH, "max_gb": Number(0, 1e6, above=True)}, required=("folder", "max_gb"))
CLASS_PROMPTS = Section(
    {
        "classes": MapOf(CLASS, Nullable(CLASS_NAME), most=32767),
        "tokens": Whole(1, 4096),
        "init": one_of("clicks", "normal"),
        "crop": CROP,
        "exclusive": EXCLUSIVE,
    },
    required=("classes",),
)
STOCK_TERMS = dict.fromkeys(("loss_mask", "loss_dice", "loss_iou", "loss_class"), WEIGHT)
NEEDED = ("loss_mask", "loss_dice", "loss_iou")
STOCK_LOSS = {
    "weight_dict": Section(STOCK_TERMS, required=NEEDED, rules=(some_weight,)),
    "focal_alpha": Number(-1, 1),
    "focal_gamma": Number(0, 100),
    "supervise_all_iou": Flag(),
    "iou_use_l1_loss": Flag(),
    "pred_obj_scores": Flag(),
    "focal_gamma_obj_score": Number(0, 100),
    "focal_alpha_obj_score": Number(-1, 1),
}
TERMS = Section({**STOCK_TERMS, "loss_tversky": WEIGHT}, required=NEEDED, rules=(some_weight,))

TARGETS = {
    "sam2_lora_ext.model.LoRASAM2Train": Section(
        {
            **MODEL,
            "lora": Nullable(LORA),
            "activations": ACTIVATIONS,
            "memory": Nullable(MEMORY),
            "feature_cache": Nullable(CACHE),
            "class_prompts": Nullable(CLASS_PROMPTS),
            "prompt_seed": Nullable(SEED).called("trainer.seed_value"),
        },
        required=("image_encoder",),
        rules=(corrects_prompted,),
    ),
    "training.model.sam2.SAM2Train": Section(MODEL, required=("image_encoder",), rules=(corrects_prompted,)),
    "sam2_lora_ext.losses.SeverstalLoss": Section(
        {
            **STOCK_LOSS,
            "weight_dict": TERMS,
            "class_weights": Nullable(MapOf(Whole(0, 32767), WEIGHT, most=32768)),
            "tversky_alpha": WEIGHT,
            "tversky_beta": WEIGHT,
            "tversky_gamma": Number(0, 100, above=True),
            "absent_focal": WEIGHT,
            "implementation": one_of("plain", "lean"),
        },
        required=("weight_dict",),
    ),
    "training.loss_fns.MultiStepMultiMasksAndIous": Section(STOCK_LOSS, required=("weight_dict",)),
    "sam2_lora_ext.meters.SegmentationMeter": Section(
        {
            "classes": ListOf(CLASS, most=32767),
            "prompt": one_of("click", "box"),
            "losses": Flag(),
            "distinct": Flag(),
        }
    ),
}
