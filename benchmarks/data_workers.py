"""Memory of a data worker for a full-size data set, and its growth with the number of workers and with time.

Every worker gets the data set pickled (SAM 2 spawns them). Its memory is its private memory (`Private` in Linux's
smaps_rollup), less that of a worker without the data set, which is Python, torch and SAM 2.
"""

import warnings
from pathlib import Path

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from sam2_lora_ext.data.dataset import SeverstalRawDataset
from sam2_lora_ext.data.images import read_rgb
from sam2_lora_ext.data.kaggle import KaggleReader

EARLY = 10  # samples of a worker before the first measurement, to fill the decoders' buffers


class Watched(Dataset):
    """Decodes the image and masks of item i as in training, and returns the private MB of this process.

    Args:
        dataset: the strips; None decodes the image of `path` alone.
        path: any strip.
        length: number of items.
    """

    def __init__(self, dataset: SeverstalRawDataset | None, path: Path, length: int):
        self.dataset = dataset
        self.path = path
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, item: int) -> float:
        path = self.path
        if self.dataset is not None:
            video, loader = self.dataset.get_video(item * 7919 % len(self.dataset))  # all over the set
            path = video.frames[0].image_path
            assert all(mask.numel() for _, mask in loader.load(0).items())
        assert read_rgb(path).size
        return private_memory()


def worker_figures(folder: Path, samples: int) -> dict[str, float]:
    """MB of a worker among 1 and among 4, after its first samples and after its last.

    Args:
        folder: the set that `full_set` wrote.
        samples: of each worker.
    """
    reader = KaggleReader(folder / "train_images", folder / "train.csv")
    full = SeverstalRawDataset(reader, training=False, cache_dir=folder / "cache")
    path = Path(full.index.path(0))
    found: dict[str, float] = {"samples": samples}
    with tqdm(total=3, desc="loaders", leave=False) as bar:
        bare = watch(Watched(None, path, samples), 1)
        bar.update()
        for workers in (1, 4):
            early, late = watch(Watched(full, path, samples * workers), workers)
            found[f"with_{workers}_mb"], found[f"later_{workers}_mb"] = early - bare[0], late - bare[1]
            bar.update()
    return found


def watch(dataset: Watched, workers: int) -> tuple[float, float]:
    """The largest MB of a worker after `EARLY` samples and at the end."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores, on purpose
        loader = DataLoader(dataset, batch_size=None, num_workers=workers, multiprocessing_context="spawn")
        held = list(loader)  # item i is of worker i modulo `workers`
    return max(held[EARLY * workers :][:workers]), max(held[-workers:])


def private_memory() -> float:
    """MB that this process shares with no other."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private")) / 1024
