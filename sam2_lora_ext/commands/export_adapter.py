"""Writes an adapter folder in PEFT's format from a training run, a checkpoint of SAM 2's Trainer, or another folder.

The adapter's modules are named as in SAM 2, or with --for transformers as in Hugging Face's Sam2Model; the names of an
adapter trained on Sam2Model are converted back.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from sam2_lora_ext.settings.arguments import ALPHA, number

EXAMPLES = """\
examples:
  the best adapter of a run:
    python tools/export_adapter.py runs/my_run my_adapter
  an unfinished run, or a run of SAM 2's own Trainer; records the base:
    python tools/export_adapter.py runs/my_run/checkpoints/checkpoint.pt my_adapter --base sam2.1_hiera_tiny.pt
  for transformers' Sam2Model, and back from an adapter that was trained on it:
    python tools/export_adapter.py runs/my_run my_hf_adapter --for transformers
    python tools/export_adapter.py their_adapter my_adapter --base sam2.1_hiera_tiny.pt

PEFT loads it on a stock SAM 2: PeftModel.from_pretrained(build_sam2(...), "my_adapter")
or on transformers' model: PeftModel.from_pretrained(Sam2Model.from_pretrained(...), "my_hf_adapter")
"""


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    options = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument(
        "source",
        type=Path,
        metavar="RUN_DIR|FOLDER|checkpoint.pt",
        help="a run folder (its best adapter, else its final), an adapter folder, or a checkpoint.pt",
    )
    options.add_argument("out", type=Path, metavar="OUT", help="the adapter folder to write")
    options.add_argument(
        "--base",
        type=Path,
        metavar="FILE",
        help="the weights that training started from; checked, or recorded if the run did not record them",
    )
    options.add_argument(
        "--alpha",
        type=number(ALPHA),
        help="only for a checkpoint.pt that does not record alpha and whose run has no lora.json",
    )
    options.add_argument(
        "--for",
        dest="target",
        choices=("sam2", "transformers"),
        default="sam2",
        help="model whose module names the adapter uses (default: sam2)",
    )
    options.add_argument("--force", action="store_true", help="replace an adapter in OUT")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Reads an adapter, writes it as a folder, and prints a summary."""
    args = parser().parse_args(argv)
    from sam2_lora_ext.adapters.folder import refuse_adapter_folder
    from sam2_lora_ext.adapters.merge_state import require_fit
    from sam2_lora_ext.adapters.peft import save_adapter
    from sam2_lora_ext.adapters.sources import check_base, read_adapter, source_files
    from sam2_lora_ext.adapters.transformers_names import rename_adapter
    from sam2_lora_ext.adapters.weights import identify, read_weights, weights_id

    refuse_adapter_folder(args.out, [*source_files(args.source), *([args.base] if args.base else [])], args.force)
    base = read_weights(args.base) if args.base else None
    adapter = read_adapter(args.source, args.alpha, base)
    if base is not None and check_base(args.base, base, adapter):
        adapter.metadata |= {"base_id": weights_id(base), "base_path": str(args.base), "model_config": identify(base)}
    if base is not None:
        require_fit(base, adapter)
    theirs = args.target == "transformers"
    save_adapter(rename_adapter(adapter) if theirs else adapter, args.out, force=args.force)
    ranks = sorted({layer.rank for layer in adapter.layers.values()})
    size = sum(file.stat().st_size for file in args.out.iterdir() if file.name.startswith("adapter_"))
    print(
        f"written  {args.out}: {len(adapter.layers)} LoRA layers (rank {', '.join(map(str, ranks)) or '-'}), "
        f"{len(adapter.full_modules)} modules trained in full, {size / 1e6:,.2f} MB"
        + (", for transformers' Sam2Model" if theirs else "")
    )
    facts = adapter.metadata
    noted = facts.get("base_path") or (f"SHA-256 of its values {facts['base_id']}" if facts.get("base_id") else None)
    print(f"base     {noted or 'not recorded; give --base to record it'}")
