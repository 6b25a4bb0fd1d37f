"""Features of a frozen image encoder, cached on disk: training only the decoder then encodes each image once.

A file holds one image's feature maps as the decoder reads them, in the encoder's output dtype. Its name is a hash of
all that they depend on: the encoder's input pixels (so crop, flips and brightness too), its modules and weights (as
they are at first use), and autocast's dtype. So runs, ranks and validations may share a folder; but only a bitwise
identical image is found again. At the size limit nothing more is stored: if the oldest files were evicted instead,
passes over a data set larger than the limit would never find any.

Shapes: B images, C H W of a feature map, by level from the largest to the smallest.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from sam2_lora_ext.adapters.weights import weights_id, write_weights
from sam2_lora_ext.utils.errors import UserError, check_keys

log = logging.getLogger(__name__)
Maps = list[Tensor]  # (B, C, H, W) each


class FeatureCache:
    """A folder of feature maps for one model.

    Args:
        config: `folder`, and `max_gb`, the size (10^9 bytes) up to which this run, on all its ranks, fills the folder.
        parts: the frozen modules that compute the features, by name; hashed at first use, after loading.

    Raises:
        UserError: a setting is wrong, or one of the modules is trained or random.
    """

    def __init__(self, config: Mapping[str, Any], parts: Mapping[str, nn.Module]):
        check_keys("feature_cache", config, ("folder", "max_gb"))
        if not config.get("folder") or not isinstance(config.get("max_gb"), (int, float)) or not config["max_gb"] > 0:
            raise UserError(f"feature_cache needs a folder and a max_gb above 0, got {dict(config)}")
        for part, module in parts.items():
            if trained := [name for name, value in module.named_parameters() if value.requires_grad]:
                raise UserError(
                    f"feature_cache needs a frozen image encoder, but {part}.{trained[0]} is trained: set it to "
                    "null, or adapt only the decoder, as severstal_lora_decoder_cached.yaml does"
                )
            # DropPath, dropout
            if any(getattr(inner, "drop_prob", getattr(inner, "p", 0)) for inner in module.modules()):
                raise UserError(
                    f"feature_cache needs features that do not change, but {part} has dropout or drop_path: set it to 0"
                )
        self.folder, self.max_bytes, self.parts = Path(config["folder"]).expanduser(), config["max_gb"] * 1e9, parts
        self.found = self.missed = 0
        self.weights: str | None = None
        self.room = 0.0  # bytes that this rank may still store

    def __call__(self, images: Tensor, encode: Callable[[Tensor], Maps]) -> Maps:
        """The feature maps of images (B, 3, H, W), from the folder or from `encode`."""
        if self.weights is None:
            self._open()
        paths = [self._path(image) for image in images]
        maps = [self._read(path, images.device) for path in paths]
        missing = [index for index, found in enumerate(maps) if found is None]
        self.found, self.missed = self.found + len(maps) - len(missing), self.missed + len(missing)
        if missing:
            with torch.no_grad():
                encoded = encode(images[missing])
            for position, index in enumerate(missing):
                maps[index] = [level[position] for level in encoded]
                self._write(paths[index], maps[index])
        return [_stacked(level) for level in zip(*maps, strict=True)]

    def _open(self) -> None:
        state = {
            f"{part}.{key}": value for part, module in self.parts.items() for key, value in module.state_dict().items()
        }
        self.weights = f"{weights_id(state)} {hashlib.sha256(repr(dict(self.parts)).encode()).hexdigest()}"
        held = sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.room = (self.max_bytes - held) / ranks

    def _path(self, image: Tensor) -> Path:
        kind = image.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else image.dtype
        digest = hashlib.sha256(f"{self.weights} {dtype} {list(image.shape)}".encode())
        digest.update(image.detach().to("cpu", torch.float32).contiguous().numpy())
        return self.folder / f"{digest.hexdigest()}.safetensors"

    def _read(self, path: Path, device: torch.device) -> Maps | None:
        try:
            levels = sorted(load_file(path, device=str(device)).items())
            return [level.permute(2, 0, 1) if name.endswith("hwc") else level for name, level in levels]
        except FileNotFoundError:
            return None
        except Exception as error:  # any unreadable file can be computed again
            log.warning("the stored features %s cannot be read (%s) and are computed again", path, error)
            return None

    def _write(self, path: Path, maps: Maps) -> None:
        size = sum(level.nbytes for level in maps)
        if size > self.room:
            return
        tensors = {}
        for number, level in enumerate(maps):
            last = _channels_last(level)
            tensors[f"level_{number}_{'hwc' if last else 'chw'}"] = (
                level.permute(1, 2, 0) if last else level
            ).contiguous()
        try:
            write_weights(path, tensors, "safetensors")
            self.room -= size
        except UserError as error:
            log.warning("no more features are stored: %s", error)
            self.room = 0.0


def _channels_last(level: Tensor) -> bool:
    return level.stride(0) == 1


def _stacked(level: tuple[Tensor, ...]) -> Tensor:
    """Maps (C, H, W) as one (B, C, H, W) in their own memory layout, which affects the rounding of later results."""
    layout = torch.channels_last if _channels_last(level[0]) else torch.contiguous_format
    return torch.stack(level).contiguous(memory_format=layout)
