"""For tests of training: a random small base, a few synthetic strips, and runs of seconds."""

import contextlib
import gc
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hydra.utils import instantiate
from omegaconf import OmegaConf
from training.utils.data_utils import BatchedVideoDatapoint, BatchedVideoMetaData

from sam2_lora_ext.adapters.weights import write_weights
from sam2_lora_ext.data.synthetic import write_strips
from sam2_lora_ext.host.compose import compose
from sam2_lora_ext.host.configs import USER_CONFIG_DIR

OURS = ("lora", "activations", "prompt_seed", "feature_cache")  # what LoRASAM2Train takes beyond SAM2Train
# Two images a batch, two prompt steps, six optimizer steps in three phases: about a second.
QUICK = (
    "scratch.batch_size=2",
    "scratch.steps=6",
    "scratch.steps_per_phase=2",
    "trainer.model.num_correction_pt_per_frame=1",
    "trainer.data.val.batch_sizes=[4]",
    "trainer.metrics_every=1",
)


def make_base(path: Path, config: str = "configs/sam2_nano.yaml", seed: int = 0) -> Path:
    """A randomly initialised SAM 2 as a file that stock SAM 2 loads."""
    from sam2.build_sam import build_sam2

    torch.manual_seed(seed)
    write_weights(path, build_sam2(config, None, device="cpu", apply_postprocessing=False).state_dict())
    return path


def make_strips(folder: Path, count: int = 12) -> Path:
    """Synthetic strips with split.csv: every third one validates."""
    write_strips(folder, count, seed=7, clean_share=0.2, progress=False)
    names = sorted(path.name for path in (folder / "train_images").iterdir())
    rows = [f"{name},{'val' if index % 3 == 2 else 'train'}" for index, name in enumerate(names)]
    (folder / "split.csv").write_text("\n".join(["image,split", *rows]) + "\n")
    return folder


def environment(base: Path, strips: Path, run_dir: Path) -> dict[str, str]:
    """What configs/demo.yaml reads from the environment."""
    return {
        "SEVERSTAL_ROOT": str(strips),
        "SEVERSTAL_SPLIT": str(strips / "split.csv"),
        "SAM2_LORA_NANO": str(base),
        "SAM2_LORA_DEMO_RUN": str(run_dir),
        "OMP_NUM_THREADS": "1",
    }


def write_config(folder: Path, overrides: Sequence[str] = (), name: str = "configs/demo.yaml") -> Path:
    """`quick.yaml`: a config on top of `name` with `QUICK` and `overrides`, which the stock launcher cannot take."""
    changes = OmegaConf.from_dotlist([*QUICK, *overrides])
    header = f"# @package _global_\ndefaults:\n  - /{name.removesuffix('.yaml')}\n  - _self_\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "quick.yaml").write_text(header + OmegaConf.to_yaml(changes))
    return folder / "quick.yaml"


def launch(config: Path, env: Mapping[str, str], *options: str, cwd: Path | None = None) -> subprocess.Popen[str]:
    """Starts SAM 2's own launcher on a file of `write_config`; its output is one pipe."""
    command = [sys.executable, "-m", "training.train", "-c", config.name, *options]
    return subprocess.Popen(
        command,
        cwd=cwd or config.parent,
        env={**os.environ, **env, USER_CONFIG_DIR: str(config.parent)},
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        errors="replace",
        start_new_session=True,
    )


@contextlib.contextmanager
def rank_environment(more: Mapping[str, str]) -> Iterator[None]:
    """The environment of a lone rank, as the launcher sets it, and `more`; undone afterwards, process group too."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    wanted = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    } | dict(more)
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
        gc.collect()  # a Trainer holds itself; its lock and files go with it


def config_of(env: Mapping[str, str], overrides: Sequence[str] = (), name: str = "configs/demo.yaml") -> Any:
    """The composed config as the launcher hands it over, with `QUICK` and `overrides`."""
    with rank_environment(env):
        composed = compose(name, [*QUICK, *overrides])
        return OmegaConf.create(OmegaConf.to_container(composed, resolve=True))


def train_here(env: Mapping[str, str], *overrides: str, name: str = "configs/demo.yaml") -> Any:
    """Trains in this process as the launcher would in a rank; returns the Trainer."""
    config = config_of(env, overrides, name)
    with rank_environment(env):
        trainer = instantiate(config.trainer, _recursive_=False)
        trainer.run()
        return trainer


def make_batch(
    objects: Sequence[Sequence[int]], frames: int = 1, size: int = 128, seed: int = 0
) -> BatchedVideoDatapoint:
    """A random batch: `objects[b]` are the object ids of image b; clean ones have an empty mask, others a rectangle.

    The left eighth of each image is black. An image's content depends on (seed, b) only.
    """
    images, entries = [], []
    for place, ids in enumerate(objects):
        generator = torch.Generator().manual_seed(seed * 1000 + place)
        image = torch.rand(frames, 3, size, size, generator=generator)
        image[..., : size // 8] = -2.0
        images.append(image)
        for number in ids:
            mask = torch.zeros(size, size, dtype=torch.bool)
            if number >= 1_000_000:
                y, x = torch.randint(size // 8, size // 2, (2,), generator=generator).tolist()
                mask[y : y + size // 4, x : x + size // 3] = True
            entries.append((place, number, mask))
    return BatchedVideoDatapoint(
        img_batch=torch.stack(images, 1),
        obj_to_frame_idx=torch.tensor([[[t, place] for place, *_ in entries] for t in range(frames)], dtype=torch.int),
        masks=torch.stack([torch.stack([mask for *_, mask in entries])] * frames),
        metadata=BatchedVideoMetaData(
            unique_objects_identifier=torch.tensor(
                [[[place, number, t] for place, number, _ in entries] for t in range(frames)]
            ),
            frame_orig_size=torch.full((frames, len(entries), 2), size),
        ),
        dict_key="severstal",
        batch_size=[frames],
    )


def make_model(**changes: Any) -> Any:
    """A small `LoRASAM2Train` with random weights, the same each time; `changes` to its config, None removes a key."""
    with rank_environment({}):
        config = compose("configs/demo.yaml", []).trainer.model
    values = OmegaConf.to_container(config, resolve=True) | changes
    if values["_target_"].endswith("SAM2Train") and "LoRA" not in values["_target_"]:
        values = {key: value for key, value in values.items() if key not in OURS}
    torch.manual_seed(0)
    return instantiate(OmegaConf.create(values), _convert_="all")
