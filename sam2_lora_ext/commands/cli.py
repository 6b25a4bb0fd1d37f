"""`sam2-lora NAME ...` runs every command of this package.

A command is a module with `parser()` and `main(argv)`; neither imports torch before the options are parsed, so that
`--help` is fast.
"""

if __name__ == "__main__":  # from here on, Ctrl-C ends the process with one sentence
    from sam2_lora_ext.utils.command_line import catch_interrupts

    catch_interrupts()

import argparse
import importlib
import sys
from collections.abc import Sequence

from sam2_lora_ext.utils.command_line import catch_interrupts, run_cli
from sam2_lora_ext.utils.errors import UserError

COMMANDS = {  # name -> module and description
    "train": ("sam2_lora_ext.train", "train adapters with SAM 2's own launcher and Trainer"),
    "doctor": ("sam2_lora_ext.commands.doctor", "check in about a minute that a training will work"),
    "data": ("sam2_lora_ext.commands.data", "scan, split, convert or synthesise a data set"),
    "ablate": ("sam2_lora_ext.commands.ablate", "train a grid of settings and compare them"),
    "evaluate": ("sam2_lora_ext.commands.evaluate", "evaluate models on the same objects, with intervals"),
    "fit-decision": ("sam2_lora_ext.commands.fit_decision", "fit the thresholds of class prompts on validation strips"),
    "inspect": ("sam2_lora_ext.commands.inspect", "inspect strips without a click: masks, tables, pre-labels"),
    "evaluate-inspection": ("sam2_lora_ext.commands.evaluate_inspection", "evaluate an inspection on annotated strips"),
    "report": ("sam2_lora_ext.commands.report", "write an HTML report about runs"),
    "merge": ("sam2_lora_ext.commands.merge", "merge adapters into weights that stock SAM 2 loads"),
    "unmerge": ("sam2_lora_ext.commands.unmerge", "recover the adapter of a merged file"),
    "export-adapter": ("sam2_lora_ext.commands.export_adapter", "export a run or a checkpoint as a PEFT folder"),
    "export-onnx": ("sam2_lora_ext.commands.export_onnx", "export a merged file to ONNX and verify it"),
    "serve": ("sam2_lora_ext.commands.serve", "serve a local page for clicks and pre-labels"),
    "track": ("sam2_lora_ext.commands.track", "track a defect along a strip"),
}
SHELLS = ("bash", "zsh", "tcsh")


def parser() -> argparse.ArgumentParser:
    """The parser of the options without a command."""
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:{width}}  {what}" for name, (_, what) in COMMANDS.items())
    options = argparse.ArgumentParser(
        prog="sam2-lora",
        description="LoRA for Meta's SAM 2 training framework.",
        epilog=f"commands:\n{listed}\n\n`sam2-lora COMMAND --help` lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="sam2-lora COMMAND ...",
    )
    options.add_argument(
        "--print-completion", choices=SHELLS, metavar="SHELL", help=f"print a completion script for {', '.join(SHELLS)}"
    )
    return options


def main(argv: Sequence[str] | None = None) -> int | None:
    """Runs a command, or prints help or a completion script."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words and words[0] in COMMANDS:
        sys.argv = [f"sam2-lora {words[0]}", *words[1:]]  # the name in usage lines and records
        return importlib.import_module(COMMANDS[words[0]][0]).main(words[1:])
    if words and not words[0].startswith("-"):
        raise UserError(f"there is no command {words[0]!r}: choose from {', '.join(COMMANDS)}")
    options = parser()
    args = options.parse_args(words)
    if args.print_completion:
        print(completion(args.print_completion))
    else:
        options.print_help()
    return 0


def completion(shell: str) -> str:
    """The completion script of all commands for a shell."""
    try:
        import shtab
    except ModuleNotFoundError as error:
        raise UserError("shell completion needs the package shtab: pip install shtab") from error
    root = parser()
    commands = root.add_subparsers()
    for name, (module, what) in COMMANDS.items():
        one = importlib.import_module(module).parser()
        one.prog = f"sam2-lora {name}"
        commands.choices[name] = one
        commands._choices_actions.append(commands._ChoicesPseudoAction(name, (), what))
    return shtab.complete(root, shell)


def entry() -> None:
    """The entry point `sam2-lora`."""
    catch_interrupts()
    run_cli(main)


if __name__ == "__main__":
    entry()
