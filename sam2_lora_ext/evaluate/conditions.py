"""The conditions of an evaluation, from the first run or the command line, and how they differ from each run's own.

By default a model is evaluated as it was trained: with the run's crop, resolution, bits and definition of an object, on
its validation data. The results list every difference from a run's own conditions as a sentence.
"""

import argparse
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sam2_lora_ext.data.arguments import source_of
from sam2_lora_ext.data.records import describe_classes
from sam2_lora_ext.data.source import Source, from_run
from sam2_lora_ext.evaluate.models import Candidate
from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.files import sha256_of

VIEW = ("crop", "stride", "max_objects", "group_width", "resolution")  # settings of the view of images
HABITS = ("bits", "objects", "min_area", "include_clean", "on_invalid")  # settings of a run for reading other data


@dataclass(frozen=True)
class Conditions:
    """Data and views of an evaluation.

    Args:
        source: the data, with crop and resolution.
        own: model name -> the validation data of its run.
        runs: model name -> the run's folder.
        tile: columns of a tile; None without tiles.
        overlap: overlap of tiles.
        chosen: whether the command line names the data or the split.
        train: whether the command line has `--split train`.
        notes: sentences about conditions that could not be compared.
    """

    source: Source
    own: Mapping[str, Source] = field(default_factory=dict)
    runs: Mapping[str, Path] = field(default_factory=dict)
    tile: int | None = None
    overlap: int = 0
    chosen: bool = True
    train: bool = False
    notes: Sequence[str] = ()

    def sentences(self) -> list[str]:
        """Sentences about the differences between each run's own conditions and these."""
        return [f"{name}: {said}" for name, own in self.own.items() for said in self._differences(own)]

    def _differences(self, own: Source) -> list[str]:
        used = self.source
        said = []
        if self.tile is not None or own.crop != used.crop:
            trained = f"trained at crop {own.crop}" if own.crop else "trained on whole images"
            said.append(f"{trained}{' as video' if own.stride else ''}, evaluated {self._view()}")
        elif own.stride:
            said.append(f"trained on windows of {own.crop} columns as video, evaluated window by window")
        if used.resolution is not None and own.resolution != used.resolution:
            said.append(f"trained at {own.resolution} px, evaluated at {used.resolution} px")
        for key in ("bits", "objects", "min_area"):
            before, now = getattr(own, key), getattr(used, key)
            if before != now:
                said.append(f"{key} was {_default(before)} in its validation, evaluated with {_default(now)}")
        if own.exif != used.exif:
            ways = {True: "upright", False: "as stored"}
            said.append(f"trained on images {ways[own.exif]}, evaluated on images {ways[used.exif]}")
        other = not own.same_data(used)
        if other:
            said.append(f"validated on {own.data}, evaluated on {used.data}")
        if other or own.settings != used.settings:
            before, now = own.class_names(), used.class_names()
            if before is not None and now is not None and before != now:
                tables = describe_classes(before), describe_classes(now)
                said.append("trained with the classes {}, evaluated with {}".format(*tables))
        if (own.split, os.path.realpath(own.split_file or "")) != (used.split, os.path.realpath(used.split_file or "")):
            said.append(f"validated on {_split(own)}, evaluated on {_split(used)}")
        return said

    def _view(self) -> str:
        if self.tile is not None:
            return f"in tiles of {self.tile} columns"
        return f"at crop {self.source.crop}" if self.source.crop else "whole"

    def training_images(self, dataset: Any) -> list[str]:
        """Sentences about the runs that were trained on images of the evaluated data set.

        Raises:
            UserError: there is such a run, and the command line chooses the data without `--split train`.
        """
        evaluated = {str(Path(dataset.index.path(int(image))).resolve()) for image in dataset.images}
        said = []
        for name, run in self.runs.items():
            try:
                shared = len(images_among(evaluated, from_run(run, "train").image_paths()))
            except UserError as error:
                said.append(f"{name}: it is unknown whether it was trained on these images ({error})")
                continue
            if shared and self.chosen and not self.train:
                raise UserError(
                    f"{name} was trained on {shared} of these {len(evaluated)} images: name no data to use the run's "
                    "validation data, choose a split without them, or give --split train to evaluate training images"
                )
            if shared:
                why = "" if self.train else ", which are in both its training data and its validation data"
                said.append(f"{name}: trained on {shared} of these {len(evaluated)} images{why}")
        return said

    def record(self, dataset: Any) -> dict[str, Any]:
        """The entry for evaluation.json: the conditions `used`, the runs' `own`, and `sentences` about differences.

        Raises:
            UserError: see `training_images`.
        """
        view = {"objects": dataset.objects.mode, "tile": self.tile, "overlap": self.overlap}
        return {
            "origin": self.source.origin,
            "used": self.source.conditions() | view,
            "own": {name: own.conditions() for name, own in self.own.items()},
            "sentences": [*self.sentences(), *self.training_images(dataset), *self.notes],
        }


def images_among(images: set[str], others: set[str]) -> set[str]:
    """The images that are also among others: the same file, or an equal file of the same name."""
    named = defaultdict(list)
    for other in others:
        named[os.path.basename(other)].append(other)

    def copied(path: str) -> bool:
        there = [other for other in named.get(os.path.basename(path), ()) if os.path.isfile(other)]
        there = [other for other in there if os.path.getsize(other) == os.path.getsize(path)]
        return bool(there) and sha256_of(path) in map(sha256_of, there)

    return {path for path in images if path in others or copied(path)}


def settle(args: argparse.Namespace, candidates: Sequence[Candidate]) -> Conditions:
    """The conditions for a command line of tools/evaluate.py.

    Raises:
        UserError: no data is named and no model belongs to a run, or the data cannot be determined.
    """
    runs = {wanted.name: wanted.run for wanted in candidates if wanted.run is not None}
    known = args.training_config or args.data
    own, notes = {}, []
    for name, run in runs.items():
        try:
            own[name] = from_run(run)
        except UserError as error:
            if not known:
                raise
            notes.append(f"{name}: its own conditions are unknown ({error})")
    first = next(iter(own), None)
    phase = "train" if args.split == "train" and args.split_file is None else "val"
    source = source_of(args, phase, None if first is None else own[first])
    if source is None and first is None:
        raise UserError(
            "no model belongs to a run, which would record its data: name the data by --data PATH, or by -c CONFIG for "
            "the data of a training config"
        )
    if source is None:
        source = from_run(runs[first], phase, **({"exif": False} if args.as_stored else {}))
    elif first is not None and not args.training_config:
        keys = VIEW if source.phase else VIEW + HABITS
        origin = f"{source.origin}, with the views of the run {runs[first]}"
        source = replace(source, origin=origin, **{key: getattr(own[first], key) for key in keys})
    chosen = known or args.split_file or args.split not in (None, "val")
    train = "train" in (args.split or "").split(",")
    return Conditions(changed(source, args), own, runs, args.tile, args.overlap, bool(chosen), train, notes)


def changed(source: Source, args: argparse.Namespace) -> Source:
    """The source changed by the settings of the command line."""
    options = {"bits": args.bits, "objects": args.objects, "min_area": args.min_area, "resolution": args.image_size}
    values = {key: value for key, value in options.items() if value is not None}
    if args.split is not None:
        split = args.split if "," not in args.split else [name.strip() for name in args.split.split(",")]
        if args.split_file is not None or source.phase is None or split not in ("train", "val"):
            values["split"] = split
    if args.split_file is not None:
        values |= {"split_file": args.split_file, "split": values.get("split")}
    crop = None if args.tile or args.crop == "none" else args.crop or source.crop
    if crop != source.crop:
        values |= {"crop": crop, "group_width": None, "stride": None}
    return replace(source, **values)


def _split(source: Source) -> str:
    if source.split is None:
        return "all images" if source.split_file is None else f"the images of {source.split_file}"
    names = source.split if isinstance(source.split, str) else ", ".join(source.split)
    return f"split {names}" + (f" of {source.split_file}" if source.split_file is not None else "")


def _default(value: Any) -> Any:
    return "the default" if value is None else value
