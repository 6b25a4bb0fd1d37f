"""The actions of `sam2-lora data` (scan, split, convert, synth), which take the parsed options."""

import argparse
from collections import Counter

from sam2_lora_ext.data.arguments import source_of
from sam2_lora_ext.data.duplicates import groups
from sam2_lora_ext.data.folders import write_folder
from sam2_lora_ext.data.index import build_index, remarks
from sam2_lora_ext.data.kaggle import SIZE
from sam2_lora_ext.data.records import settle, shorten
from sam2_lora_ext.data.scan import class_sets, combination, look_at_pixels, scan
from sam2_lora_ext.data.scan_text import render
from sam2_lora_ext.data.source import Source
from sam2_lora_ext.data.splits import fold_shares, given_splits, parse_shares, stratified_split, write_split
from sam2_lora_ext.data.synthetic import write_strips
from sam2_lora_ext.data.writers import convert
from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.files import refuse_existing, refuse_input_files, write_atomic, write_json
from sam2_lora_ext.utils.folders import refuse_inputs


def open_source(args: argparse.Namespace) -> Source:
    """The data that the arguments name, in all splits; prints its description."""
    source = source_of(args)
    if source is None:
        raise UserError("name the data: a folder, csv, json or run, or -c CONFIG for the data of a training config")
    print(f"reading {source.data} ({source.origin})")
    if source.other_data:
        other = "val" if args.phase == "train" else "train"
        print(f"--phase {other} reads other data: {source.other_data}")
    return source


def scan_data(args: argparse.Namespace) -> None:
    """Writes `scan.json` and `scan.html`."""
    for name in ("scan.json", "scan.html"):
        refuse_existing(args.out / name, args.force)
    source = open_source(args)
    reader = source.make_reader()
    for name in ("scan.json", "scan.html"):
        refuse_input_files(args.out / name, [*reader.inputs(), *reader.files()])
    summary, index = scan(reader, not args.quiet, source.bits)
    # file names that are not UTF-8 are shown with escapes
    page = render(index, summary, source.bits).encode("utf-8", "backslashreplace")
    write_json(args.out / "scan.json", summary, force=args.force)
    write_atomic(args.out / "scan.html", lambda path: path.write_bytes(page), force=args.force)
    print(
        f"{summary['images']} images, {summary['clean']} clean, {summary['unknown']} unknown, "
        f"{summary['masks']} masks, {summary['objects']} objects ({summary['objects_are']}), "
        f"{len(summary['duplicates']['near'])} groups of duplicates, "
        f"{len(summary['problems'])} problems"
    )
    for cause, count in summary["problems_per_cause"].items():
        print(f"  {count} {cause}")
    for sentence in dict.fromkeys([*remarks(index), *summary["notes"], *summary["units"]]):
        print(f"  {sentence}")
    print(f"written to {args.out / 'scan.json'} and scan.html")


def split_data(args: argparse.Namespace) -> None:
    """Writes the csv that the data set reads as `split_file`."""
    refuse_existing(args.out, args.force)
    shares = fold_shares(args.folds) if args.folds is not None else parse_shares(args.shares)
    source = open_source(args)
    reader = source.make_reader()
    refuse_input_files(args.out, [*reader.inputs(), *reader.files()])
    on_invalid = args.on_invalid or source.on_invalid
    index = build_index(reader, on_invalid, not args.quiet)
    names, classes = index.names(), class_sets(index)
    if args.as_given:
        splits = given_splits(names)
    else:
        pairs = []
        if not args.ignore_duplicates:
            facts = look_at_pixels(index, not args.quiet, source.bits)
            settle(facts.problems, on_invalid, index.image_dir)
            pairs = [facts.equal(), facts.near()]
        splits = stratified_split(names, classes, groups(len(names), *pairs).tolist(), shares, args.seed)
    write_split(args.out, names, splits, args.force)
    counts = Counter(zip(map(combination, classes), splits))
    columns = sorted(set(splits), key=list(shares).index) if not args.as_given else sorted(set(splits))
    print(f"{'classes':12}" + "".join(f"{column:>10}" for column in columns))
    for label in sorted(set(map(combination, classes))):
        print(f"{label:12}" + "".join(f"{counts[label, column]:>10}" for column in columns))
    print(f"{'all':12}" + "".join(f"{splits.count(column):>10}" for column in columns))
    if index.unknown:
        print(f"{len(index.unknown)} images are unknown and in no split: {shorten(index.unknown)}")


def convert_data(args: argparse.Namespace) -> None:
    """Writes the data set in another format."""
    source = open_source(args)
    reader = source.make_reader()
    refuse_inputs(args.out, reader.inputs())
    index = build_index(reader, args.on_invalid or source.on_invalid, not args.quiet)
    left_out = convert(index, args.to, args.out, args.force, progress=not args.quiet, inputs=reader.inputs())
    print(
        f"{len(index) - left_out} images written to {args.out} as {args.to}"
        + (f"; {left_out} left out because of an invalid mask" if left_out else "")
        + (f"; {len(index.unknown)} left out as unknown" if index.unknown else "")
    )
    if args.to.startswith("kaggle") and (index.sizes != SIZE).any():
        print(f"not all images are {SIZE[1]}x{SIZE[0]}: read them with --size any (dataset.readers.kaggle.size=null)")


def synthesise(args: argparse.Namespace) -> None:
    """Writes synthetic strips; with --force they replace an old set with all its images."""
    empty = args.out.is_dir() and not any(args.out.iterdir())
    write_folder(
        args.out,
        lambda folder: write_strips(folder, args.count, args.seed, args.clean_share, progress=not args.quiet),
        args.force or empty,
    )
    print(f"{args.count} strips written to {args.out}")
