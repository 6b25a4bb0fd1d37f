"""Checks that the run in a member's folder has the same settings, by the rules of a resume (`run.changes`)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.utils import instantiate

from sam2_lora_ext.ablation.grid import Member
from sam2_lora_ext.adapters.weights import read_weights, weights_id
from sam2_lora_ext.host.compose import compose
from sam2_lora_ext.run import config as run_config
from sam2_lora_ext.run.base_weights import base_path
from sam2_lora_ext.run.changes import Change, changes
from sam2_lora_ext.run.start import data_digest, record_of
from sam2_lora_ext.run.state import is_finished
from sam2_lora_ext.utils.errors import UserError


class MemberCheck:
    """Compares members with the runs in their folders; shared data and bases are read once.

    Args:
        config: the name of the members' config, as `locate` returns it.
        overrides: the overrides of all members.
        ranks: number of processes of each member.
    """

    def __init__(self, config: str, overrides: Sequence[str], ranks: int):
        self.config, self.overrides, self.ranks = config, list(overrides), ranks
        self._digests: dict[str, str | None] = {}
        self._bases: dict[str, str | None] = {}

    def finished(self, member: Member) -> bool:
        """Whether the member is finished.

        Raises:
            UserError: its folder has a run with other settings, and `trainer.resume_with_changes` is off.
        """
        folder, done = member.folder, is_finished(member.folder)
        if not done and not (folder / "checkpoints/checkpoint.pt").exists():
            return False  # without a checkpoint the member starts from the beginning
        overrides = [*self.overrides, *member.overrides, f"launcher.experiment_log_dir={json.dumps(str(folder))}"]
        try:
            trainer = compose(self.config, overrides).trainer
        except UserError:
            return False  # the member's own run reports the error
        now = {"trainer": run_config.plain(trainer), "ranks": self.ranks, "data": self._data(trainer)}
        before = record_of(folder, now, {})
        if before is None:
            return done
        found = [*changes(before, now), *self._base(before, trainer)]
        if found and not trainer.get("resume_with_changes"):
            raise UserError(
                f"{folder} has a member with other settings: {'; '.join(map(str, found))}. Choose another --out, or "
                "add trainer.resume_with_changes=true to continue it with the new settings"
            )
        return done and not found

    def _data(self, trainer: Any) -> dict[str, str | None]:
        return {phase: self._digest(trainer.data[phase]) for phase in ("train", "val") if trainer.data.get(phase)}

    def _digest(self, section: Any) -> str | None:
        key = json.dumps(run_config.plain(section))
        if key not in self._digests:
            try:
                self._digests[key] = data_digest(instantiate(section))
            except Exception:  # any error of missing data; then paths are compared instead of content
                self._digests[key] = None
        return self._digests[key]

    def _base(self, before: Mapping[str, Any], trainer: Any) -> list[Change]:
        path, known = base_path(trainer.checkpoint.get("model_weight_initializer")), before["base"].get("id")
        if path is None or known is None or not Path(path).is_file():
            return []
        if path not in self._bases:
            self._bases[path] = weights_id(read_weights(path))
        return [Change("the base", known[:12], self._bases[path][:12])] if self._bases[path] != known else []
