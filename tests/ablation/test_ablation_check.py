"""The check of members' folders by the rule of a resume, for real runs."""

import shutil
from pathlib import Path

import pytest

from helpers.small_runs import QUICK, environment, make_base, rank_environment
from helpers.started_runs import GO_ON, STEPS, half, whole  # noqa: F401
from sam2_lora_ext.ablation.check import MemberCheck
from sam2_lora_ext.ablation.grid import Member
from sam2_lora_ext.utils.errors import UserError


@pytest.mark.slow
def test_an_ablation_compares_its_members_by_the_same_rule(whole, half, nano_base, strips, tmp_path):
    """Finished or not: harmless changes pass, others are named; data and base are compared by content."""
    env, moved = environment(nano_base, strips, tmp_path), Path(shutil.copytree(strips, tmp_path / "moved"))
    done, begun = Member({"trainer.seed_value": "42"}, whole), Member({"lora.alpha": "16"}, half)

    def finished(member: Member, *overrides: str, ranks: int = 1, **more: str) -> bool:
        with rank_environment(env | more):
            return MemberCheck("configs/demo.yaml", [*QUICK, *STEPS, *overrides], ranks).finished(member)

    elsewhere = {"SEVERSTAL_ROOT": str(moved), "SEVERSTAL_SPLIT": str(moved / "split.csv")}
    assert finished(done) and finished(done, "scratch.num_workers=2", **elsewhere) and not finished(begun)
    assert not finished(Member({}, tmp_path / "new")) and not finished(done, "scratch.steps=8", GO_ON)
    for member, overrides, words in (
        (done, ["scratch.steps=8"], "trainer.data.train.steps was 4 and is now 8"),
        (begun, ["lora.dropout=0.5"], "lora.dropout was 0.0 and is now 0.5"),
    ):
        with pytest.raises(UserError, match=f"has a member with other settings: .*{words}"):
            finished(member, *overrides)
    with pytest.raises(UserError, match="the number of ranks was 1 and is now 2"):
        finished(done, ranks=2)
    with pytest.raises(UserError, match="the base was"):
        finished(done, SAM2_LORA_NANO=str(make_base(tmp_path / "other.pt", seed=1)))
    (moved / "split.csv").write_text((moved / "split.csv").read_text().replace(",train\n", ",val\n", 1))
    with pytest.raises(UserError, match="the content of trainer.data.train"):
        finished(done, **elsewhere)
