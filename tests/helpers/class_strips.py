"""For tests of class prompts' validation: tiles of the strips of `data_sets`, and outputs of a model for them."""

from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from helpers.data_sets import HEIGHT, STRIPS, WIDTH, class_masks, reader
from sam2_lora_ext.class_prompts.meter import ClassPromptMeter
from sam2_lora_ext.data.class_validation import ClassTiles
from sam2_lora_ext.data.dataset import SeverstalRawDataset

CLASSES = [1, 2, 3, 4]
NAMES = list(STRIPS)


def raw_of(folder, **settings):
    return SeverstalRawDataset(reader(folder), training=False, **settings)


def tiles_of(folder, width=64, overlap=16, transforms=(), **settings):
    return ClassTiles(raw_of(folder, **settings), width, overlap, transforms)


def truth_of(image):
    """bool [C H W] by the drawing of the strip."""
    masks = class_masks(STRIPS[NAMES[image]])
    return np.array([masks.get(class_id, np.zeros((HEIGHT, WIDTH), bool)) for class_id in CLASSES])


def outputs_of(logits, scores, truth=None):
    """A model's outputs for objects: logits [O h w], scores [O], truth [O H W]."""
    truth = torch.zeros(len(scores), 1, 1) if truth is None else truth
    return [
        {
            "class_prompt": True,
            "multistep_pred_masks": logits[:, None],
            "gt_masks": truth[:, None].bool(),
            "multistep_object_score_logits": [scores[:, None]],
        }
    ]


def feed(meter, tiles, logits_of, scores_of, places=None, per_batch=3):
    """Updates a meter with logits float [C h w] and scores [C] of each tile, in batches."""
    places = range(len(tiles)) if places is None else places
    for first in range(0, len(places), per_batch):
        chosen = [tiles.tiles[place] for place in places[first : first + per_batch]]
        samples = [tiles[place] for place in places[first : first + per_batch]]
        ids = torch.tensor([[s.video_id, o.object_id, o.frame_index] for s in samples for o in s.frames[0].objects])
        logits = torch.cat([logits_of(*tile) for tile in chosen])
        scores = torch.cat([scores_of(*tile) for tile in chosen])
        truth = torch.stack([o.segment for s in samples for o in s.frames[0].objects])
        order = torch.randperm(len(ids))  # objects in any order
        metadata = SimpleNamespace(unique_objects_identifier=ids[order][None])
        meter.update(outputs_of(logits[order], scores[order], truth[order]), metadata)


def meter_of(tiles, **settings):
    meter = ClassPromptMeter(**settings)
    meter.bind(tiles)
    return meter


def random_outputs(tiles, low=16):
    """(logits, scores) of each tile, the same each time."""

    def logits(image, tile):
        noise = torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(100 * image + tile))
        return F.interpolate(noise[None], (low, low), mode="bilinear")[0]

    def scores(image, tile):
        return torch.randn(4, generator=torch.Generator().manual_seed(7777 + 100 * image + tile)) - 0.5

    return logits, scores
