"""Paths that are not files, impossible names, exploding YAML and JSON: one sentence, immediately."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.hostile_files import adapter_folder, safetensors_of
from sam2_lora_ext.adapters.peft import load_adapter
from sam2_lora_ext.adapters.weights import read_weights
from sam2_lora_ext.host.compose import compose, locate
from sam2_lora_ext.host.configs import USER_CONFIG_DIR, known_configs
from sam2_lora_ext.host.yaml_files import check_yaml, load_yaml
from sam2_lora_ext.report.collect import read_evaluation, read_run
from sam2_lora_ext.report.page import galleries
from sam2_lora_ext.utils.command_line import run_cli
from sam2_lora_ext.utils.errors import UserError
from sam2_lora_ext.utils.files import inside

ROOT = Path(__file__).resolve().parents[2]
MAKE: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
    "loop": lambda path: path.symlink_to(path),
    "empty": Path.touch,
}
LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)


def adapter(folder: Path, name: str, kind: str) -> object:
    path = adapter_folder(folder / "adapter")
    (path / name).unlink()
    MAKE[kind](path / name)
    return load_adapter(path)


def run(folder: Path, name: str, kind: str) -> object:
    (folder / "run.json").write_text('{"name": "x"}')
    (folder / name).unlink(missing_ok=True)
    MAKE[kind](folder / name)
    return read_run(folder)


READS: dict[str, Callable[[Path, str], object]] = {
    "weights": lambda folder, kind: (MAKE[kind](folder / "x.pt"), read_weights(folder / "x.pt")),
    "safetensors": lambda folder, kind: (MAKE[kind](folder / "x.safetensors"), read_weights(folder / "x.safetensors")),
    "adapter config": lambda folder, kind: adapter(folder, "adapter_config.json", kind),
    "adapter weights": lambda folder, kind: adapter(folder, "adapter_model.safetensors", kind),
    "run": lambda folder, kind: run(folder, "run.json", kind),
    "summary": lambda folder, kind: run(folder, "training_summary.json", kind),
    "metrics": lambda folder, kind: run(folder, "logs", "folder") and None or table(folder, kind),
    "evaluation": lambda folder, kind: (MAKE[kind](folder / "evaluation.json"), read_evaluation(folder)),
    "config": lambda folder, kind: (
        MAKE[kind](folder / "x.yaml"),
        locate(str(folder / "x.yaml")),
        check_yaml(folder / "x.yaml"),
        no(kind),
    ),
}


def no(kind: str) -> None:
    raise UserError(f"an {kind} YAML file is none to train with")


def table(folder: Path, kind: str) -> object:
    (folder / "run.json").write_text('{"name": "x"}')
    MAKE[kind](folder / "logs/metrics.csv")
    return read_run(folder)


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("what", READS)
def test_what_is_no_file_is_a_sentence(what, kind, tmp_path):
    if kind == "loop" and what in ("summary", "metrics"):
        pytest.skip("a link to nothing is no such file, and a run need not have it")
    began = time.monotonic()
    with pytest.raises(UserError) as refused:
        READS[what](tmp_path, kind)
    assert "\n" not in str(refused.value) and time.monotonic() - began < 30


@pytest.mark.parametrize("name", ["x" * 300, "x" * 5000, "a/" * 3000, "/proc/self/mem", "nul\0", "\ud800"])
def test_a_name_that_no_file_can_have_is_a_sentence(name, tmp_path):
    for read in (read_weights, load_adapter, locate, check_yaml):
        with pytest.raises((UserError, OSError, ValueError)) as refused:
            read(name)
        assert isinstance(refused.value, UserError) or read is load_adapter


@pytest.mark.parametrize(
    "arguments",
    [
        ["merge_lora", "--base", "LONG", "--adapter", "LONG", "--out", "OUT/m.pt"],
        ["merge_lora", "--base", "OUT/b.pt", "--adapter", "OUT", "--out", "LONG"],
        ["report", "LONG"],
        ["export_adapter", "LONG", "OUT/x"],
        ["unmerge_lora", "--base", "LONG", "--merged", "LONG", "--out", "OUT/x"],
        ["doctor", "-c", "LONG", "--no-step"],
        ["doctor", "-c", "demo", "--no-step", "launcher.experiment_log_dir=LONG"],
        [
            "doctor",
            "-c",
            "demo",
            "--no-step",
            "trainer.checkpoint.model_weight_initializer.state_dict.checkpoint_path=LONG",
        ],
    ],
)
def test_tools_say_so(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    arguments = [argument.replace("OUT", str(tmp_path)).replace("LONG", "x" * 5000) for argument in arguments]
    with pytest.raises(SystemExit) as stopped:
        run_cli(__import__(arguments[0]).main, arguments[1:])
    out, err = capsys.readouterr()
    assert stopped.value.code == (1 if arguments[0] == "doctor" else 2)
    assert "Traceback" not in err and "Errno" not in out and len(err) < 3000
    assert arguments[0] == "doctor" or err.startswith("error: ") and err.count("\n") == 1


def test_a_folder_without_permission_is_a_sentence(tmp_path, monkeypatch, capsys):
    """As another user, since root may do everything."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    report = __import__("report")
    import sam2_lora_ext.report.page  # noqa: F401  (another user may not read this Python's folder)

    closed = tmp_path / "closed"
    (closed / "run").mkdir(parents=True)
    closed.chmod(0)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)
        with pytest.raises(SystemExit) as stopped:
            run_cli(report.main, [str(closed / "run"), "--out", str(closed / "report.html")])
    finally:
        os.seteuid(user)
        closed.chmod(0o700)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    assert "Permission denied" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LAUGHS, "expands to more than 100,000 values"),
        ("a: &a [*a]\n", "contains itself"),
        ("[" * 100_000, "nested too deep"),
        ("a:\n" + "".join(" " * n + "a:\n" for n in range(1, 150)), "levels"),
        ("a: " + "x" * (1 << 20), "expected at most"),
        ("a: [1\n", "not valid YAML"),
        ("a: !!python/object:os.system x\n", "not a valid config|not valid YAML"),
    ],
)
def test_yaml_that_explodes_is_a_sentence(text, said, tmp_path):
    """In a run's config, and in a user's own, itself or by its defaults."""
    (tmp_path / "x.yaml").write_text(text)
    began = time.monotonic()
    with pytest.raises(UserError, match=said) as refused:
        load_yaml(tmp_path / "x.yaml")
    assert "\n" not in str(refused.value) and time.monotonic() - began < 20


@pytest.mark.parametrize("defaults", [None, "x", "/x", "/x@trainer", {"group": "x"}, {"override /group": "x"}])
def test_a_users_config_that_explodes_is_a_sentence(defaults, tmp_path, monkeypatch):
    monkeypatch.setenv(USER_CONFIG_DIR, str(tmp_path))
    (tmp_path / "group").mkdir()
    for place in ("x.yaml", "group/x.yaml"):
        (tmp_path / place).write_text(LAUGHS)
    (tmp_path / "mine.yaml").write_text(json.dumps({"defaults": [defaults, "_self_"]}))
    with pytest.raises(UserError, match="expands to more than 100,000 values"):
        compose("x.yaml" if defaults is None else "mine.yaml", [])


def test_a_pipe_among_the_users_configs_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setenv(USER_CONFIG_DIR, str(tmp_path))
    os.mkfifo(tmp_path / "x.yaml")
    (tmp_path / "mine.yaml").write_text("a: 1\n")
    assert [name for name in known_configs() if "/" not in name] == ["mine.yaml"]


@pytest.mark.parametrize("depth", [100_000])
def test_a_header_nested_deep(depth, tmp_path):
    """Our entry in the header of a safetensors file, and the header itself."""
    nested = "[" * depth + "]" * depth
    with pytest.raises(UserError, match="nested too deep"):
        load_adapter(adapter_folder(tmp_path / "adapter", metadata={"sam2_lora_ext": nested}))
    with pytest.raises(UserError, match="damaged"):
        (tmp_path / "x.safetensors").write_bytes(safetensors_of(('{"__metadata__":' + nested + "}").encode()))
        read_weights(tmp_path / "x.safetensors")


def test_an_adapters_patterns_cannot_hang(tmp_path):
    evil = {"(" * 5 + "(a+)+" + ")" * 5 + r"\1": 2, "(a|a)*b": 2}
    with pytest.raises(UserError, match="bounded time"):
        load_adapter(adapter_folder(tmp_path / "adapter", rank_pattern=evil))
    assert load_adapter(adapter_folder(tmp_path / "good", rank_pattern={r".*\.0": 2, "(x+x+)+y": 3})).layers


@pytest.mark.parametrize(
    "name", ["../secret.png", "/etc/passwd", "link.png", "a/../../secret.png", "nul\0", 5, None, ["x"]]
)
def test_a_picture_outside_of_its_evaluation_is_not_embedded(name, tmp_path):
    folder = tmp_path / "evaluation"
    folder.mkdir()
    from PIL import Image

    for place in (tmp_path / "secret.png", folder / "good.png"):
        Image.new("RGB", (4, 4)).save(place)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    evaluation = type(
        "Evaluation",
        (),
        {
            "folder": folder,
            "record": {"models": [{"name": "m", "gallery": [{"file": name, "caption": "c", "kind": "best"}]}]},
        },
    )
    with pytest.raises(UserError, match="is not inside that folder"):
        galleries(evaluation)
    assert inside(folder, "good.png") == folder / "good.png"
    evaluation.record["models"][0]["gallery"][0]["file"] = "good.png"
    assert "data:image/png" in galleries(evaluation)
