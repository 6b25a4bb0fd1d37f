"""The targets of test_fuzz_readers.py: one class per reader, with its strategies for damaged content."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from hypothesis import strategies as st
from safetensors.torch import save_file

from helpers.data_sets import HEIGHT, WIDTH, write_kaggle
from sam2_lora_ext.adapters.peft import load_adapter
from sam2_lora_ext.adapters.weights import read_weights
from sam2_lora_ext.data.cache import cached_index
from sam2_lora_ext.data.coco import COCOReader
from sam2_lora_ext.data.items import read_split
from sam2_lora_ext.data.kaggle import KaggleReader
from sam2_lora_ext.data.rle import RLEError, format_rle, parse_rle
from sam2_lora_ext.data.supervisely import SuperviselyReader
from sam2_lora_ext.data.supervisely_bitmap import encode_bitmap
from sam2_lora_ext.logger import CSVFile, MetricsCSV
from sam2_lora_ext.utils.errors import UserError

WORDS = [
    b"-1",
    b"0",
    b"1e999",
    b"NaN",
    b"null",
    b"[]",
    b"{}",
    b"\x00",
    b"\xff",
    b"9" * 30,
    b"\n",
    b",",
    b'"',
    b" ",
    b"../../x",
    b"1 1",
]


def mutated(valid: bytes) -> st.SearchStrategy[bytes]:
    """The valid content with up to six cuts, insertions, replacements and repetitions, or something else."""
    place = st.integers(0, len(valid))
    edit = st.tuples(
        place, st.integers(0, 40), st.one_of(st.sampled_from(WORDS), st.binary(max_size=12)), st.booleans()
    )

    def apply(edits: list[tuple[int, int, bytes, bool]]) -> bytes:
        content = valid
        for start, length, insert, twice in edits:
            part = content[start : start + length] if twice else b""
            content = content[:start] + insert + part * 2 + content[start + length :]
        return content

    return st.one_of(st.lists(edit, min_size=1, max_size=6).map(apply), st.binary(max_size=200))


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=8,
)


def with_a_wrong_value(valid: object) -> st.SearchStrategy[bytes]:
    """The valid JSON with one value, anywhere in it, replaced by any other."""
    places: list[tuple] = []

    def walk(value: object, path: tuple) -> None:
        places.append(path)
        for key, inner in (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        ):
            walk(inner, (*path, key))

    walk(valid, ())

    def replace(path: tuple, wrong: object) -> bytes:
        content = json.loads(json.dumps({"root": valid}))
        place, last = content, "root"
        for key in path:
            place, last = place[last], key
        place[last] = wrong
        return json.dumps(content["root"]).encode()

    return st.builds(replace, st.sampled_from(places), JSON)


class Target:
    """One reader: what it reads, and how."""

    def __init__(self, folder: Path):
        self.folder = folder
        write_kaggle(folder)


class KaggleTable(Target):
    def cases(self) -> st.SearchStrategy[bytes]:
        return mutated((self.folder / "train.csv").read_bytes())

    def read(self, content: bytes) -> None:
        (self.folder / "fuzzed.csv").write_bytes(content)
        cached_index(KaggleReader(self.folder / "images", self.folder / "fuzzed.csv", size=(HEIGHT, WIDTH)))


class SplitTable(Target):
    def cases(self) -> st.SearchStrategy[bytes]:
        return mutated(b"image,split\na.jpg,train\nb.jpg,val\nc.jpg,train\n")

    def read(self, content: bytes) -> None:
        (self.folder / "split.csv").write_bytes(content)
        read_split(self.folder / "split.csv", "train")


class MetricsTable(Target):
    def cases(self) -> st.SearchStrategy[bytes]:
        return mutated(b"step,epoch,phase,loss\n1,0,train,0.5\n2,0,val,0.25\n3,1,train,0.125\n")

    def read(self, content: bytes) -> None:
        (self.folder / "metrics.csv").write_bytes(content)
        table = MetricsCSV(self.folder / "metrics.csv", ["step", "epoch", "phase", "loss"])
        table.truncate_after(2, 0)
        CSVFile(self.folder / "metrics.csv", ["step", "epoch", "phase", "loss"]).read()


class Coco(Target):
    valid = {
        "images": [{"id": i, "file_name": " ab"[i] + ".jpg", "height": HEIGHT, "width": WIDTH} for i in (1, 2)],
        "categories": [{"id": 1, "name": "defect_1"}, {"id": 2, "name": "defect_2"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "segmentation": [[2.0, 2.0, 9.0, 2.0, 9.0, 9.0]]},
            {
                "id": 2,
                "image_id": 2,
                "category_id": 2,
                "iscrowd": 1,
                "segmentation": {"size": [HEIGHT, WIDTH], "counts": [5, 10, HEIGHT * WIDTH - 15]},
            },
        ],
    }

    def cases(self) -> st.SearchStrategy[bytes]:
        return st.one_of(mutated(json.dumps(self.valid).encode()), with_a_wrong_value(self.valid))

    def read(self, content: bytes) -> None:
        (self.folder / "coco.json").write_bytes(content)
        cached_index(COCOReader(self.folder / "images", self.folder / "coco.json"))


class Supervisely(Target):
    def __init__(self, folder: Path):
        super().__init__(folder)
        (folder / "train").mkdir()
        (folder / "train/ann").mkdir()
        (folder / "images").rename(folder / "train/img")
        for image in (folder / "train/img").iterdir():
            if image.name != "a.jpg":
                image.unlink()
        mask = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool).numpy()
        mask[3:9, 4:30] = True
        entry = {"classTitle": "defect_1", "geometryType": "bitmap", "bitmap": encode_bitmap(mask)}
        self.valid = {"size": {"height": HEIGHT, "width": WIDTH}, "objects": [entry]}
        self.read(json.dumps(self.valid).encode())

    def cases(self) -> st.SearchStrategy[bytes]:
        return st.one_of(mutated(json.dumps(self.valid).encode()), with_a_wrong_value(self.valid))

    def read(self, content: bytes) -> None:
        (self.folder / "train/ann/a.jpg.json").write_bytes(content)
        cached_index(SuperviselyReader(self.folder, "train"))


class SuperviselyMeta(Supervisely):
    meta = {"classes": [{"title": "defect_1", "shape": "bitmap", "color": "#ff0000"}], "tags": []}

    def cases(self) -> st.SearchStrategy[bytes]:
        return st.one_of(mutated(json.dumps(self.meta).encode()), with_a_wrong_value(self.meta))

    def read(self, content: bytes) -> None:
        if content != json.dumps(self.valid).encode():  # that is the annotation, once
            (self.folder / "meta.json").write_bytes(content)
            cached_index(SuperviselyReader(self.folder, "train"))
        else:
            super().read(content)


class Rle(Target):
    def cases(self) -> st.SearchStrategy[bytes]:
        return mutated(b"1 3 10 2 45 7 8000 1")

    def read(self, content: bytes) -> None:
        try:
            runs = parse_rle(content.decode("utf-8", "replace"), HEIGHT, WIDTH)
        except RLEError as error:
            raise UserError(str(error)) from error
        assert (parse_rle(format_rle(runs), HEIGHT, WIDTH) == runs).all()


class AdapterConfig(Target):
    valid = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["encoder.0"],
        "bias": "none",
        "use_rslora": False,
        "rank_pattern": {"encoder": 2},
        "alpha_pattern": {},
        "modules_to_save": None,
        "lora_dropout": 0.0,
    }

    def __init__(self, folder: Path):
        super().__init__(folder)
        name = "base_model.model.encoder.0"
        state = {f"{name}.lora_A.weight": torch.ones(2, 6), f"{name}.lora_B.weight": torch.ones(4, 2)}
        metadata = {"format": "pt", "sam2_lora_ext": json.dumps({"step": 1, "fused": {}})}
        save_file(state, folder / "adapter_model.safetensors", metadata=metadata)
        (folder / "adapter_config.json").write_text(json.dumps(self.valid))
        load_adapter(folder)

    def cases(self) -> st.SearchStrategy[bytes]:
        return st.one_of(mutated(json.dumps(self.valid).encode()), with_a_wrong_value(self.valid))

    def read(self, content: bytes) -> None:
        (self.folder / "adapter_config.json").write_bytes(content)
        load_adapter(self.folder)


class AdapterWeights(AdapterConfig):
    def cases(self) -> st.SearchStrategy[bytes]:
        return mutated((self.folder / "adapter_model.safetensors").read_bytes())

    def read(self, content: bytes) -> None:
        (self.folder / "adapter_model.safetensors").write_bytes(content)
        load_adapter(self.folder)


class Checkpoint(Target):
    def cases(self) -> st.SearchStrategy[bytes]:
        torch.save({"model": {"a": torch.ones(3), "b": torch.zeros(2, 2)}}, self.folder / "x.pt")
        return mutated((self.folder / "x.pt").read_bytes())

    def read(self, content: bytes) -> None:
        (self.folder / "x.pt").write_bytes(content)
        read_weights(self.folder / "x.pt")


TARGETS: list[Callable[[Path], Target]] = [
    KaggleTable,
    SplitTable,
    MetricsTable,
    Coco,
    Supervisely,
    SuperviselyMeta,
    Rle,
    AdapterConfig,
    AdapterWeights,
    Checkpoint,
]
