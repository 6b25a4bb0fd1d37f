"""Selects the frames and objects of a strip for one sample."""

import random

from training.dataset.vos_raw_dataset import VOSVideo
from training.dataset.vos_sampler import SampledFramesAndObjects, VOSSampler

from sam2_lora_ext.data.segments import StripSegmentLoader
from sam2_lora_ext.data.windows import fits, walk
from sam2_lora_ext.utils.errors import UserError


class ObjectSampler(VOSSampler):
    """Samples for training (some objects, drawn with `random`) or evaluation (all of them, in their order).

    In training every object in the first frame is equally likely to be selected, whatever its size, and the order is
    random; the first frame is drawn from those that show an object, so that there is one to prompt. A clean object is
    kept although its mask is empty.

    Args:
        num_frames: consecutive frames of a sample; None takes all.
        max_num_objects: largest number of objects of a training sample; None takes all.
        training: whether to draw at random.
        reverse_time_prob: probability of reversing the frames (always, if they only fit in reverse).
    """

    def __init__(
        self,
        num_frames: int | None = 1,
        max_num_objects: int | None = None,
        training: bool = True,
        reverse_time_prob: float = 0.0,
    ):
        super().__init__()
        if num_frames is not None and num_frames < 1 or max_num_objects is not None and max_num_objects < 1:
            raise UserError(f"num_frames and max_num_objects are at least 1, got {num_frames} and {max_num_objects}")
        if not training and (max_num_objects is not None or reverse_time_prob):
            raise UserError(
                "an evaluation sampler takes all objects forwards; limit them with the data set's max_objects"
            )
        self.num_frames = num_frames
        self.max_num_objects = max_num_objects
        self.training = training
        self.reverse_time_prob = reverse_time_prob

    def sample(
        self, video: VOSVideo, segment_loader: StripSegmentLoader, epoch: int | None = None
    ) -> SampledFramesAndObjects:
        """Frames, and the objects in the first of them."""
        count = len(video.frames) if self.num_frames is None else self.num_frames
        if len(video.frames) < count:
            raise UserError(
                f"{video.video_name} has {len(video.frames)} frames, but the sampler's num_frames is {count}; "
                "lower it, or make the data set's windows narrower"
            )
        if not self.training:
            frames = video.frames[:count]
            return SampledFramesAndObjects(
                frames=frames, object_ids=list(segment_loader.load(frames[0].frame_idx).keys())
            )
        shown = [position for position, frame in enumerate(video.frames) if len(segment_loader.load(frame.frame_idx))]
        if not shown:
            raise UserError(f"no frame of {video.video_name} shows an object")
        step = -1 if random.random() < self.reverse_time_prob else 1
        first = random.choice([position for position in shown if fits(position, count, len(video.frames))] or shown)
        frames = [video.frames[position] for position in walk(first, count, len(video.frames), step)]
        object_ids = list(segment_loader.load(frames[0].frame_idx).keys())
        if self.max_num_objects is not None:
            object_ids = random.sample(object_ids, min(len(object_ids), self.max_num_objects))
        return SampledFramesAndObjects(frames=frames, object_ids=object_ids)
