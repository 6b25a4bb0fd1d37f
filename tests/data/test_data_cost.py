"""The CPU time of the data, which other load hardly affects; `python -m benchmarks.data` measures everything."""

import pickle
import time

import numpy as np
import pytest
from training.utils import data_utils

from benchmarks.data import LINES, table
from benchmarks.data_index import IMAGES, MASKS, full_set
from benchmarks.data_masks import naive_decode
from benchmarks.data_samples import both_paths, compare, cost
from sam2_lora_ext.data.cache import cached_index
from sam2_lora_ext.data.collate import collate_fn
from sam2_lora_ext.data.dataset import SeverstalRawDataset
from sam2_lora_ext.data.kaggle import KaggleReader
from sam2_lora_ext.data.rle import decode_runs, parse_rle

pytestmark = pytest.mark.slow  # timed


def test_index_of_a_full_size_set(real_data, tmp_path):
    full_set(real_data / "severstal", tmp_path / "full", IMAGES)
    reader = KaggleReader(tmp_path / "full/train_images", tmp_path / "full/train.csv")
    start = time.process_time()
    index = cached_index(reader, cache_dir=tmp_path / "cache")
    built = time.process_time() - start
    start = time.process_time()
    again = cached_index(reader, cache_dir=tmp_path / "cache")
    assert built < 5 and time.process_time() - start < 1
    assert len(again) == len(index) == IMAGES and len(index.mask_class) == MASKS
    raw = SeverstalRawDataset(reader, cache_dir=tmp_path / "cache")
    arrays = [value for part in (raw, raw.index, raw.objects, raw.items) for value in vars(part).values()]
    held = sum(value.nbytes for value in arrays if isinstance(value, np.ndarray))
    start = time.process_time()
    text = pickle.dumps(raw)
    pickle.loads(text)
    assert time.process_time() - start < 1
    assert held < 150e6 and len(text) < held + 1e4  # arrays and nothing else: no object for each image


def test_samples_are_those_of_stock_and_cost_half(real_data, tmp_path):
    _, plugin, stock = both_paths(real_data / "severstal", tmp_path)
    found = compare(plugin, stock)
    assert found["mask_difference"] == 0 and found["image_difference"] < 0.0176  # one grey level
    assert cost(stock, data_utils.collate_fn) > 2 * cost(plugin, collate_fn)


@pytest.mark.parametrize("text", ["1 1", "1 409600", "257 256 600 1 409600 1"])
def test_the_naive_decoder_is_right(text):
    np.testing.assert_array_equal(naive_decode(text), decode_runs(parse_rle(text, 256, 1600), 256, 1600))


def test_the_table_says_what_is_missed():
    figures = dict.fromkeys(("rate", "naive_rate", "class_rate", "naive_class_rate", "class_ratio"), 1.0) | {
        "ratio": 3.0
    }
    lines = table({"masks": figures}).splitlines()
    assert len(lines) == 2 + len(LINES["masks"]) and lines[3].endswith("| 10 times (missed) |")
    assert "missed" not in table({"masks": figures | {"ratio": 10.0}})
