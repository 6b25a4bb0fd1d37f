"""`python -m sam2_lora_ext.train -c CONFIG key=value ...`: SAM 2's own launcher, with Hydra overrides.

The launcher (`training.train`) has no overrides. This command line composes the config with them, then runs the
launcher's own `main` with that config instead of its own; ranks and cluster jobs use it too.

Exit codes, with one rank or several: 0 on success, 2 on a user's mistake, 143 after SIGTERM, 130 after Ctrl-C. The
first signal lets the current step finish and `latest` be written; a second one ends the run at once.
"""

if __name__ == "__main__":  # from here on, Ctrl-C ends the process with one sentence
    from sam2_lora_ext.utils.command_line import catch_interrupts

    catch_interrupts()

import argparse
import contextlib
import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sam2_lora_ext.host.compose import compose, locate
from sam2_lora_ext.host.configs import USER_CONFIG_DIR, import_launcher, known_configs
from sam2_lora_ext.run.signals import Forward
from sam2_lora_ext.settings.arguments import GPUS, NODES, number
from sam2_lora_ext.utils.command_line import run_cli
from sam2_lora_ext.utils.errors import UserError, find_user_error

EXAMPLES = """\
examples:
  python -m sam2_lora_ext.train -c severstal_lora
  python -m sam2_lora_ext.train -c severstal_lora lora.rank=16 launcher.experiment_log_dir=runs/r16 --num-gpus 2
  python -m sam2_lora_ext.train -c ./my_experiment.yaml --print-config

configs:
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Composes and checks the config, then prints it or trains; see `--help`."""
    args = parse(argv)
    launcher = import_launcher()
    args.config, folder = locate(args.config)
    if folder is not None:
        os.environ[USER_CONFIG_DIR] = str(folder)
    if args.resume_with_changes:
        args.overrides.append("++trainer.resume_with_changes=true")
    config = compose(args.config, args.overrides)
    if args.print_config:
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(config), end="")
        return 0
    launcher.compose = lambda config_name: config
    from sam2_lora_ext.run.lock import check_free  # needs torch, which `import_launcher` has checked

    run_dir = config.launcher.experiment_log_dir
    if run_dir is not None:
        check_free(Path(run_dir))  # before the launcher replaces the config files of an active run
    forward = Forward()
    try:
        with forward if _starts_ranks(args, config) else contextlib.nullcontext():
            launcher.main(args)
    except Exception as error:
        if forward.signum:  # torch's own message about ranks that ended as requested
            return 128 + forward.signum
        if type(error).__name__ == "ProcessExitedException":  # torch's: a rank ended without an exception
            return _code_of_rank(error)
        if mistake := find_user_error(error):  # Hydra wraps what the dataset, model or Trainer raised
            raise mistake from error
        if isinstance(error, OSError) and run_dir is not None and _of_the_launcher(error, str(run_dir)):
            raise UserError(
                f"cannot write {error.filename or run_dir}: {error.strerror}; check the folder, its rights and the "
                "free disk, or choose another launcher.experiment_log_dir"
            ) from error
        if type(error).__name__ == "FailedJobError":  # submitit's: sbatch failed
            raise UserError(f"Slurm refused the job: {' '.join(str(error).split())}") from error
        raise
    return 128 + forward.signum if forward.signum else 0


def _starts_ranks(args: argparse.Namespace, config: Any) -> bool:
    """Whether the launcher will start processes here; a single rank is this process."""
    on_cluster = config.submitit.use_cluster if args.use_cluster is None else args.use_cluster
    return not on_cluster and (args.num_gpus or config.launcher.gpus_per_node) > 1


def _code_of_rank(error: Any) -> int:
    """The exit code of a failed rank; for a killed rank, prints a message and returns 128 + the signal."""
    if error.exit_code >= 0:
        return error.exit_code
    hint = " (the system does this when memory runs out)" if error.signal_name == "SIGKILL" else ""
    print(
        f"error: rank {error.error_index} was ended by {error.signal_name}{hint}, and so were the others; the same "
        "command continues from the last checkpoint",
        file=sys.stderr,
    )
    return 128 - error.exit_code


def _of_the_launcher(error: OSError, run_dir: str) -> bool:
    """Whether an error is about the launcher's first files; a full disk raises an error without a file name."""
    full = error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    return full or str(error.filename).startswith(run_dir)


def parser() -> argparse.ArgumentParser:
    """The stock launcher's options, `--print-config`, and overrides anywhere among them."""
    options = argparse.ArgumentParser(
        prog="python -m sam2_lora_ext.train",
        description="Train with SAM 2's own launcher and Trainer, with Hydra overrides on the command line.",
        epilog=EXAMPLES + "\n".join(f"  {name}" for name in known_configs()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument(
        "-c",
        "--config",
        required=True,
        help="a name below, with or without configs/ and .yaml, "
        "or the path of your own file (./my.yaml), whose defaults may name the configs below",
    )
    options.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="Hydra overrides: key=value, +new_key=value, ~key_to_remove; quote lists and dicts: 'lora.targets=[a,b]'",
    )
    options.add_argument("--print-config", action="store_true", help="print the composed config as YAML and exit")
    options.add_argument(
        "--resume-with-changes",
        action="store_true",
        help="trainer.resume_with_changes=true: continue "
        "a run although settings that affect its result have changed; its record "
        "lists them",
    )
    slurm = options.add_argument_group("options of SAM 2's launcher")
    slurm.add_argument("--use-cluster", type=int, choices=(0, 1), help="1: submit (SLURM); 0: run here")
    slurm.add_argument("--partition", help="SLURM partition")
    slurm.add_argument("--account", help="SLURM account")
    slurm.add_argument("--qos", help="SLURM quality of service")
    slurm.add_argument("--num-gpus", type=number(GPUS), help="GPUs (processes) per node")
    slurm.add_argument("--num-nodes", type=number(NODES), help="nodes, on a cluster")
    return options


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    args = parser().parse_intermixed_args(argv)
    args.use_cluster = None if args.use_cluster is None else bool(args.use_cluster)
    return args


if __name__ == "__main__":
    run_cli(main)
