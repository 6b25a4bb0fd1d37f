"""The JSON record of a merged file: inputs with hashes, command and result.

<merged file>.json
    command, created    the command line; the time, with its zone
    base                path, bytes, model (stock config), weights_id: SHA-256 of its values, recorded in adapters
    adapters            for each: path, weight in the sum, files (name -> sha256), its metadata about its base
    result              path, bytes, sha256 of the file, dtypes, number of tensors, number of changed ones
    versions, git_commit
    verify              with --verify: config and the fields of `Comparison`
"""

import math
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sam2_lora_ext.adapters.merge import Merged
from sam2_lora_ext.adapters.sources import source_files
from sam2_lora_ext.utils.files import sha256_of
from sam2_lora_ext.utils.versions import git_commit, versions

FACTS = ("base_id", "base_path", "model_config")


def record_path(merged: Path) -> Path:
    """The path of the record of a merged file."""
    return merged.with_name(f"{merged.name}.json")


def describe(merged: Merged, base: Path, out: Path, command: Sequence[str]) -> dict[str, Any]:
    """The record of a merge that was just written to `out`, without `verify`."""
    return {
        "command": shlex.join(command),
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "base": {"path": str(base), "bytes": base.stat().st_size, "weights_id": merged.base_id, "model": merged.model},
        "adapters": [
            {
                "path": str(path),
                "weight": weight,
                "files": {file.name: sha256_of(file) for file in source_files(path)},
                **{key: str(facts[key]) for key in FACTS if facts.get(key)},
            }
            for path, weight, facts in merged.sources
        ],
        "result": {
            "path": str(out),
            "bytes": out.stat().st_size,
            "sha256": merged.sha256,
            "dtypes": merged.dtypes,
            "tensors": merged.tensors,
            "changed": merged.changed,
        },
        "versions": versions(),
        "git_commit": git_commit(),
    }


def with_proof(record: Mapping[str, Any], config: str, proof: Mapping[str, float]) -> dict[str, Any]:
    """The record with the result of `--verify CONFIG`; numbers that are not finite become null, as JSON requires."""
    numbers = {key: value if math.isfinite(value) else None for key, value in proof.items()}
    return {**record, "verify": {"config": config, **numbers}}
