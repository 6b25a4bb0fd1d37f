"""`python -m sam2_lora_ext.train`: names, overrides and mistakes, on SAM 2's own launcher, ranks and submitit."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from helpers.launching import CONFIG, write_recorder
from sam2_lora_ext import train
from sam2_lora_ext.host.compose import compose, locate
from sam2_lora_ext.host.configs import USER_CONFIG_DIR, config_root, known_configs
from sam2_lora_ext.utils.errors import UserError

STOCK = "configs/sam2.1_training/sam2.1_hiera_b+_MOSE_finetune.yaml"


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """`main` names the user's folder in the environment: not beyond one test."""
    monkeypatch.setenv(USER_CONFIG_DIR, "")


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A user's own config in a folder with a space, with the trainer that records."""
    folder = write_recorder(tmp_path / "my experiments")
    (folder / "mine.yaml").write_text(CONFIG)
    return folder / "mine.yaml"


def start(run_python, mine: Path, *args: str, **more):
    environment = {"PYTHONPATH": os.pathsep.join([str(mine.parent), str(config_root())]), USER_CONFIG_DIR: ""}
    environment |= more.pop("env", {})
    return run_python(["-m", "sam2_lora_ext.train", *args], cwd=mine.parent, env=environment, **more)


def test_overrides_reach_every_rank(run_python, mine):
    """Two spawned ranks of the stock launcher get the overrides, also through an interpolation with a resolver."""
    start(
        run_python,
        mine,
        "trainer.value=second",
        "-c",
        "./mine.yaml",
        "scale=21",
        "--num-gpus",
        "2",
        "+trainer.more=[1,2]",
        check=True,
    )
    for rank in (0, 1):
        seen = json.loads((mine.parent / "recorded" / f"rank{rank}.json").read_text())
        assert (seen["rank"], seen["world_size"]) == (rank, 2)
        assert seen["values"] == {"value": "second", "doubled": 42, "more": [1, 2]}
    written = OmegaConf.load(mine.parent / "recorded" / "config.yaml")
    assert written.scale == 21 and written.trainer.value == "second"


def test_overrides_reach_a_submitted_job(run_python, mine):
    """submitit pickles the config into the job; without `srun` on the PATH it runs the job here."""
    start(
        run_python,
        mine,
        "-c",
        str(mine),
        "--use-cluster",
        "1",
        "trainer.value=third",
        check=True,
        env={"PATH": str(Path(sys.executable).parent)},
    )
    answer = mine.parent / "recorded" / "rank0.json"
    deadline = time.monotonic() + 120
    while not answer.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    logs = "".join(path.read_text() for path in mine.parent.glob("recorded/submitit_logs/*.err"))
    assert answer.exists(), logs
    assert json.loads(answer.read_text())["values"]["value"] == "third"


def test_a_users_mistake_inside_the_trainer_ends_in_its_sentence(run_python, mine):
    """Hydra wraps an error of what it instantiates; the sentence comes out, without a traceback."""
    done = start(run_python, mine, "-c", "./mine.yaml", "+trainer.mistake='no rank -1: give lora.rank=8'")
    assert (done.returncode, done.stderr) == (2, "error: no rank -1: give lora.rank=8\n")


def test_printed_config_is_a_config(run_python, mine):
    """`--print-config` prints YAML and nothing else, which trains the same when given as a file; nothing is run."""
    done = start(run_python, mine, "-c", "mine", "--print-config", "scale=3", check=True)
    assert not (mine.parent / "recorded").exists()
    again = mine.with_name("again.yaml")
    again.write_text("# @package _global_\n" + done.stdout)
    name, folder = locate(str(again))
    os.environ[USER_CONFIG_DIR] = str(folder)
    assert compose(name, []) == OmegaConf.create(done.stdout)
    assert compose(name, []).trainer.doubled == 6


def test_a_stock_config_composes_by_any_of_its_names():
    short = Path(STOCK).stem
    for name in (STOCK, STOCK.removesuffix(".yaml"), STOCK.removeprefix("configs/"), short, f"{short}.yaml"):
        assert locate(name) == (STOCK, None)
    config = compose(STOCK, ["scratch.resolution=512"])
    assert config.scratch.resolution == 512
    assert config.trainer.model._target_ == "training.model.sam2.SAM2Train"


def test_names_of_this_projects_configs(monkeypatch, tmp_path):
    """With or without folder and ending; a path into the checkout means the same config; a user's copy means itself."""
    monkeypatch.chdir(tmp_path)
    ours = [name for name in known_configs() if (config_root() / name).is_file()]
    assert ours
    for name in ours:
        for form in (name, name.removesuffix(".yaml"), str(config_root() / name)):
            assert locate(form) == (name, None)
    copy = tmp_path / ours[0]
    copy.parent.mkdir(parents=True)
    copy.write_text("a: 1\n")
    assert locate(ours[0]) == (ours[0], None)
    assert locate(f"./{ours[0]}") == (copy.name, copy.parent)


def test_a_users_file_comes_before_a_stock_file_of_its_name(tmp_path, monkeypatch):
    """`sam2_hiera_t.yaml` lies at the top of SAM 2's package, too."""
    own = tmp_path / "sam2_hiera_t.yaml"
    own.write_text(CONFIG)
    name, folder = locate(str(own))
    monkeypatch.setenv(USER_CONFIG_DIR, str(folder))
    assert compose(name, []).trainer._target_ == "recorder.Recorder"
    assert locate("sam2_hiera_t") == ("sam2_hiera_t.yaml", None)


def test_an_unknown_config_lists_the_known_ones_closest_first(run_python, tmp_path):
    done = run_python(["-m", "sam2_lora_ext.train", "-c", "sam21_hiera_b+_MOSE_finetun"], cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    message, listed = done.stderr.strip().split("known configs are: ")
    assert message.startswith("error: there is no config 'sam21_hiera_b+_MOSE_finetun'") and "\n" not in message
    assert listed.split(", ") == [STOCK, *[name for name in listed.split(", ") if name != STOCK]]
    assert set(listed.split(", ")) == set(known_configs())


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("scael=2", "Could not override 'scael'.*did you mean scale"),
        ("trainer.valu=2", "did you mean trainer.value"),
        ("~trainer.valeu", "did you mean trainer.value"),
        ("scale=[1", r"in the override 'scale=\[1'"),
        ("scale", "override 'scale'"),
        ("trainer.value=${nowhere}", "'nowhere' not found; at trainer.value"),
        ("trainer.value=${oc.env:SURELY_NOT_SET}", "SURELY_NOT_SET"),
        ("scale=???", "leaves scale for you to set: add scale=VALUE"),
        ("trainer=none_of_it", "not a training config: it has no trainer"),
    ],
)
def test_a_wrong_override_is_one_sentence(mine, monkeypatch, override, said):
    monkeypatch.setenv(USER_CONFIG_DIR, str(mine.parent))
    with pytest.raises(UserError, match=said) as caught:
        compose("mine.yaml", [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1\nb: 2\n", "line 2"),
        ("defaults:\n  - /configs/severstal_nowhere\n  - _self_\n", "configs/severstal_nowhere"),
        ("model: {}\n", "has no launcher, trainer, submitit"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path, monkeypatch, text, said):
    monkeypatch.setenv(USER_CONFIG_DIR, str(tmp_path))
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        compose("wrong.yaml", [])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", ".", "..", "/", "./", "configs", "configs/"])
def test_a_folder_is_no_config(name):
    with pytest.raises(UserError, match="known configs are"):
        locate(name)


def test_a_file_of_another_ending_is_refused(tmp_path):
    (tmp_path / "mine.yml").write_text(CONFIG)
    with pytest.raises(UserError, match=r"ends in \.yaml"):
        locate(str(tmp_path / "mine.yml"))


@pytest.mark.parametrize("option", [["--num-gpus", "0"], ["--num-nodes", "-1"], ["--use-cluster", "2"], []])
def test_wrong_options(option, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main([*option, *(["-c", STOCK] if option else [])])
    assert stopped.value.code == 2
    assert (option[0] if option else "--config") in capsys.readouterr().err


def test_help_and_the_sentence_without_sam2(run_python, repository, tmp_path):
    """A Python without any site-packages: the help still comes, and training says in one line what to install."""
    bare = ["-S", "-m", "sam2_lora_ext.train"]
    environment = {"PYTHONPATH": str(repository)}
    helped = run_python([*bare, "--help"], cwd=tmp_path, env=environment)
    assert helped.returncode == 0 and "--print-config" in helped.stdout and "key=value" in helped.stdout
    for name in known_configs():
        assert (name in helped.stdout) == (name != STOCK)
    done = run_python([*bare, "-c", "demo"], cwd=tmp_path, env=environment)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: SAM 2's training code is not installed") and done.stderr.count("\n") == 1


def test_a_missing_package_of_the_training_code_is_named(run_python, repository, tmp_path):
    """SAM 2 is there, but not all that its training code needs."""
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "__init__.py").touch()
    (tmp_path / "training" / "train.py").write_text("import a_package_that_is_not_there\n")
    environment = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(repository)])}
    done = run_python(["-m", "sam2_lora_ext.train", "-c", "demo"], cwd=tmp_path, env=environment)
    assert done.returncode == 2
    assert "'a_package_that_is_not_there'" in done.stderr and done.stderr.count("\n") == 1
