"""Networks without prompts to compare class prompts with, and their training on the same batches.

    softmax over C + 1 channels, with z = 0 for "no class": loss = cross-entropy + Dice over the classes of the batch
    logit_c = z_c - log(sum over the other channels of exp z)      the input of the decision
    score_c = mean of the largest 1 % of logit_c                   replaces the presence score

Batches, learning-rate schedule, optimizer and threshold fitting are the same as for class prompts.
Legend: B images, C classes, S pixels of a side, h w of the network's masks.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor, nn
from torch.nn import functional as F

from sam2_lora_ext.adapters.class_prompts import ClassPrompts
from sam2_lora_ext.adapters.decision import Decision
from sam2_lora_ext.adapters.weights import read_weights
from sam2_lora_ext.data.ids import class_of
from sam2_lora_ext.deploy.stock import MEAN, STD
from sam2_lora_ext.inspection.segmenter import BATCH, Segmenter
from sam2_lora_ext.utils.errors import UserError

CNNS = {"unet_r34": "Unet", "fpn_r34": "FPN"}
TOKENS = 8  # of each class
WARM_UP, LAST = 0.05, 0.01  # share of the steps, and final share of the learning rate, as in configs/base
LARGEST = 100  # a score is the mean of the largest 1 / LARGEST of the logits


class MaskTokens(nn.Module):
    """SAMed's method (arXiv 2304.13785) on SAM 2: stock's four mask tokens predict the classes, without a prompt.

    Args:
        model: SAM 2 with LoRA.
        classes: C, at most 4.
        learned: use one learned prompt token, the same for all images, instead of no prompt.
    """

    def __init__(self, model: nn.Module, classes: int, learned: bool):
        super().__init__()
        self.model, self.classes = model, classes
        width = model.sam_prompt_embed_dim
        self.token = nn.Parameter(torch.randn(1, 1, width)) if learned else None

    def forward(self, pixels: Tensor) -> Tensor:
        """z [B, C, S/4, S/4] of normalised pixels [B, 3, S, S]."""
        count, width = len(pixels), self.model.sam_prompt_embed_dim
        prompts = pixels.new_zeros(count, 0, width) if self.token is None else self.token.expand(count, 1, -1)
        masks = decode(self.model, features(self.model, pixels), prompts)
        return masks[:, -self.classes :] if self.classes < masks.shape[1] else masks


class ClassTokens(nn.Module):
    """Class prompts without Trainer and object score: K tokens of each class give one mask each, trained by softmax.

        q = T + W softmax((T Wq)(F Wk)^T / sqrt(d)) (F Wv)      with `refined`, for image features F and W = 0 at first

    Args:
        model: SAM 2 with LoRA.
        classes: C.
        tokens: K.
        refined: add one cross-attention from the tokens T to the image.
    """

    def __init__(self, model: nn.Module, classes: int, tokens: int, refined: bool):
        super().__init__()
        self.model = model
        width = model.sam_prompt_embed_dim
        self.tokens = nn.Parameter(torch.randn(classes, tokens, width))
        self.attention = nn.MultiheadAttention(width, 8, batch_first=True) if refined else None
        if self.attention is not None:
            nn.init.zeros_(self.attention.out_proj.weight)

    def forward(self, pixels: Tensor) -> Tensor:
        """z [B, C, S/4, S/4] of normalised pixels [B, 3, S, S]."""
        fine, middle, coarse = features(self.model, pixels)
        (classes, _, width), count = self.tokens.shape, len(pixels)
        prompts = self.tokens.flatten(0, 1).expand(count, -1, -1)  # B (C K) D
        if self.attention is not None:
            image = (coarse + self.model.sam_prompt_encoder.get_dense_pe()).flatten(2).mT
            prompts = prompts + self.attention(prompts, image, coarse.flatten(2).mT, need_weights=False)[0]
        prompts = prompts.reshape(count * classes, -1, width)
        images = [part.repeat_interleave(classes, 0) for part in (fine, middle, coarse)]
        return decode(self.model, images, prompts)[:, 0].unflatten(0, (count, classes))


def features(model: nn.Module, pixels: Tensor) -> list[Tensor]:
    """The three feature maps that SAM 2's mask decoder reads, the finest first."""
    fine, middle, coarse = model.forward_image(pixels)["backbone_fpn"]
    if model.directly_add_no_mem_embed:
        coarse = coarse + model.no_mem_embed.reshape(1, -1, 1, 1)
    return [fine, middle, coarse]


def decode(model: nn.Module, images: Sequence[Tensor], prompts: Tensor) -> Tensor:
    """All mask logits [N, 4, S/4, S/4] of prompts [N, K, D] on the feature maps of as many images."""
    fine, middle, coarse = images
    _, dense = model.sam_prompt_encoder(points=None, boxes=None, masks=None)
    masks, *_ = model.sam_mask_decoder.predict_masks(
        image_embeddings=coarse,
        image_pe=model.sam_prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=prompts,
        dense_prompt_embeddings=dense.expand(len(prompts), -1, -1, -1),
        repeat_image=False,
        high_res_features=[fine, middle],
    )
    return masks


def make_cnn(kind: str, outputs: int, imagenet: bool = False) -> nn.Module:
    """One of `CNNS` with random weights, or with an encoder pretrained on ImageNet.

    Raises:
        UserError: segmentation-models-pytorch is not installed.
    """
    try:
        import segmentation_models_pytorch as smp
    except ImportError as error:
        raise UserError(f"{kind} needs segmentation-models-pytorch ({error}): install it with pip") from error
    return getattr(smp, CNNS[kind])("resnet34", encoder_weights="imagenet" if imagenet else None, classes=outputs)


def make_sam(kind: str, trainer: dict[str, Any], classes: int) -> nn.Module:
    """SAM 2 with LoRA, without the class prompts of this package: one of `SAMS`.

    Args:
        kind: a key of `SAMS`.
        trainer: the block `trainer` of the class prompts' config.
        classes: C.
    """
    model = instantiate({**trainer["model"], "class_prompts": None}, _convert_="all")
    base = trainer["checkpoint"]["model_weight_initializer"]["state_dict"]["checkpoint_path"]
    _, unexpected = model.load_state_dict(read_weights(Path(base)), strict=False)
    assert not unexpected, unexpected
    model.sam_mask_decoder.pred_obj_score_head.requires_grad_(False)  # not used
    return SAMS[kind](model, classes)


SAMS = {
    "samed": lambda model, classes: MaskTokens(model, classes, learned=False),
    "shared_token": lambda model, classes: MaskTokens(model, classes, learned=True),
    "tokens_softmax": lambda model, classes: ClassTokens(model, classes, TOKENS, refined=False),
    "tokens_refined": lambda model, classes: ClassTokens(model, classes, TOKENS, refined=True),
}


def train(network: nn.Module, batches: Iterable[Any], class_ids: Sequence[int], steps: int, rate: float) -> None:
    """Trains with AdamW on the batches of class steps, in place."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.01)
    network.train()
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate * factor(step / steps)
        z = network(batch.img_batch[0])
        target = labels(batch, class_ids)  # B h w after resizing
        z = F.interpolate(z, target.shape[-2:], mode="bilinear", align_corners=False)
        loss = softmax_loss(z, target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    network.eval()


def factor(done: float) -> float:
    """The learning rate's factor after a share of the steps: warm-up, then cosine, as in configs/base."""
    if done < WARM_UP:
        return LAST + (1 - LAST) * done / WARM_UP
    return LAST + (1 - LAST) * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP))) / 2


def labels(batch: Any, class_ids: Sequence[int]) -> Tensor:
    """The class of each pixel, int64 [B, S, S]: 1 + position, or 0 for no class or a class that is not used."""
    masks, images = batch.masks[0], batch.obj_to_frame_idx[0, :, 1].tolist()
    ids = class_of(batch.metadata.unique_objects_identifier[0, :, 1]).tolist()
    result = torch.zeros(batch.img_batch.shape[1], *masks.shape[1:], dtype=torch.long)
    for mask, image, class_id in zip(masks, images, ids, strict=True):
        result[image][mask] = 1 + class_ids.index(class_id)
    return result


def softmax_loss(z: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy plus the mean Dice loss of the classes in the batch; z [B, C, S, S], target [B, S, S]."""
    z = torch.cat([torch.zeros_like(z[:, :1]), z], 1)
    truth = F.one_hot(target, z.shape[1]).movedim(-1, 1).float()[:, 1:]
    drawn = z.softmax(1)[:, 1:]
    overlap, total = (drawn * truth).sum((0, 2, 3)), (drawn + truth).sum((0, 2, 3))
    there = truth.sum((0, 2, 3)) > 0
    dice = 1 - (2 * overlap + 1) / (total + 1)
    return F.cross_entropy(z, target) + (dice * there).sum() / there.sum().clamp(min=1)


class Channels(nn.Module):
    """A network in the form that `Segmenter` needs: pixels in [0, 1] -> logits [B, C, h, w] and scores [B, C]."""

    def __init__(self, network: nn.Module, size: int):
        super().__init__()
        self.network, self.size = network.eval(), size
        self.device = torch.device("cpu")
        self.mean, self.std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        z = self.network((pixels - self.mean) / self.std)
        whole = torch.cat([torch.zeros_like(z[:, :1]), z], 1)
        others = torch.stack(
            [torch.cat([whole[:, : c + 1], whole[:, c + 2 :]], 1).logsumexp(1) for c in range(z.shape[1])], 1
        )
        logits = z - others
        flat = logits.flatten(2)
        return logits, flat.topk(max(1, flat.shape[2] // LARGEST), dim=2).values.mean(2)


def as_segmenter(
    network: nn.Module, class_names: dict[int, str], crop: int, size: int, overlap: int | None
) -> Segmenter:
    """A `Segmenter` around the network, so that tiles, stitching and decision are the same as for class prompts."""
    ids = tuple(sorted(class_names))
    segmenter = Segmenter.__new__(Segmenter)
    segmenter.network, segmenter.overlap, segmenter.batch_size, segmenter.half = (
        Channels(network, size),
        overlap,
        BATCH,
        False,
    )
    segmenter.prompts = ClassPrompts(
        torch.zeros(len(ids), 1, 1),
        ids,
        tuple(class_names[number] for number in ids),
        Decision.default(len(ids)),
        crop,
        size,
        None,
    )
    return segmenter
