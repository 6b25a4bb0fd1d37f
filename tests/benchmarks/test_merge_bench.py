"""The benchmark of merging runs, and its figures are consistent; their values depend on the machine."""

import json

import pytest

from benchmarks import merge
from helpers.stock_models import NANO
from sam2_lora_ext.utils.errors import UserError


@pytest.mark.slow
def test_figures_of_a_small_model(tmp_path, capsys):
    merge.main(["--config", NANO, "--rounds", "2", "--out", str(tmp_path / "merge.json")])
    result = json.loads((tmp_path / "merge.json").read_text())
    plain, merged = result["plain"], result["merge"]
    assert result["ratio_seconds"] == merged["seconds"] / plain["seconds"] > 0.5
    assert len(plain["all_seconds"]) == 2
    assert min(merged["all_seconds"]) <= merged["seconds"] <= max(merged["all_seconds"])
    for row in (plain, merged):  # Python with torch takes more than 100 MB
        assert 1e8 < row["peak_rss_bytes"] < 2e9 and row["cpu_seconds"] > 0
    assert result["adapter_bytes"] < 0.1 * result["base_bytes"]
    assert list(tmp_path.iterdir()) == [tmp_path / "merge.json"]
    assert "the goals are 1.5 in time and 1.3 in memory" in capsys.readouterr().out


def test_a_failing_step_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="a step of the benchmark failed: .*'configs/nothing.yaml'"):
        merge.main(["--config", "configs/nothing.yaml", "--out", str(tmp_path / "merge.json")])
