"""Both kinds of installation, in a venv of their own: the unmodified launcher, in SAM 2's sdist, finds our configs."""

import json
import os
import re
import shutil
import site
import subprocess
import sysconfig
import tarfile
import venv
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from safetensors.torch import load_file

from helpers.launching import CONFIG, write_recorder
from helpers.small_runs import environment

RECORDED = "configs/recorded.yaml"


@pytest.fixture(scope="session")
def sam2_checkout(run_python, repository, tmp_path_factory) -> Path:
    """PyPI's sdist of SAM 2, its hash checked, unpacked into a folder."""
    folder = tmp_path_factory.mktemp("sdist")
    done = run_python(
        [
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "--require-hashes",
            "--dest",
            folder,
            "-r",
            repository / "requirements-sam2.txt",
        ],
        env={"SAM2_BUILD_CUDA": "0"},
    )
    if done.returncode:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"cannot get SAM 2's sdist: {done.stderr[-500:]}")
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return next(path.parent.parent for path in folder.glob("*/training/train.py"))


@pytest.fixture(scope="session", params=["pip install .", "pip install -e ."])
def installed(request, project_copy, run_python, tmp_path_factory) -> Path:
    """The Python of a new venv in which this project was installed from a copy, with one more config.

    The other packages come from this environment's folder through a path file; path files inside that folder, such as
    the editable install of the checkout under test, are not read then, so that nothing of it can help.
    """
    source = tmp_path_factory.mktemp("source") / "sam2 lora"
    shutil.copytree(project_copy, source)
    (source / RECORDED).write_text(CONFIG)
    folder = tmp_path_factory.mktemp("venv") / "venv"
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    packages = run_python(["-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], python=python, check=True)
    Path(packages.stdout.strip(), "others.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    run_python(
        [
            "-m",
            "pip",
            "install",
            "-q",
            "--no-index",
            "--no-deps",
            "--no-build-isolation",
            "--ignore-installed",
            *request.param.split()[2:],
        ],
        cwd=source,
        python=python,
        env={"PYTHONPATH": ""},
        check=True,
    )
    return python


def clean(**more: str) -> dict[str, str]:
    """An environment in which nothing but the installation leads to this project."""
    return {"PYTHONPATH": "", "SAM2_LORA_CONFIG_DIR": "", **more}


def test_the_unmodified_launcher_in_a_checkout_finds_our_configs(installed, sam2_checkout, run_python, tmp_path):
    """The mission's command, to the letter, in the sdist's folder; the trainer only records what it was given."""
    recorder = write_recorder(tmp_path / "recorder")
    shutil.rmtree(sam2_checkout / "recorded", ignore_errors=True)
    run_python(
        ["training/train.py", "-c", RECORDED],
        cwd=sam2_checkout,
        python=installed,
        env=clean(PYTHONPATH=str(recorder)),
        check=True,
    )
    seen = json.loads((sam2_checkout / "recorded" / "rank0.json").read_text())
    assert seen["values"] == {"value": "first", "doubled": 2}
    assert not Path(seen["package"]).is_relative_to(Path(__file__).parents[2])


@pytest.mark.slow
def test_the_unmodified_launcher_trains_the_demo(installed, sam2_checkout, run_python, nano_base, strips, tmp_path):
    """The same command with `configs/demo.yaml`, which takes data, base and length from the environment."""
    settings = environment(nano_base, strips, tmp_path / "run") | {"SAM2_LORA_DEMO_STEPS": "4"}
    run_python(
        ["training/train.py", "-c", "configs/demo.yaml"],
        cwd=sam2_checkout,
        python=installed,
        env=clean(**settings),
        check=True,
    )
    weights = load_file(tmp_path / "run" / "adapters" / "final" / "adapter_model.safetensors")
    assert any(tensor.any() for key, tensor in weights.items() if ".lora_B." in key)


def test_python_m_training_train_works_from_anywhere(installed, run_python, tmp_path):
    recorder = write_recorder(tmp_path / "recorder")
    run_python(
        ["-m", "training.train", "-c", RECORDED],
        cwd=tmp_path,
        python=installed,
        env=clean(PYTHONPATH=str(recorder)),
        check=True,
    )
    assert (tmp_path / "recorded" / "rank0.json").is_file()


def test_every_config_of_the_checkout_is_installed(installed, repository, run_python, tmp_path):
    """The files are the checkout's, byte for byte, and our own command line lists them."""
    code = "from sam2_lora_ext.host.configs import *; print(config_root()); print(*known_configs(), sep='\\n')"
    root, *known = run_python(["-c", code], cwd=tmp_path, python=installed, env=clean(), check=True).stdout.splitlines()
    assert not Path(root).is_relative_to(repository) and "configs/demo.yaml" in known
    ours, theirs = (
        sorted(path.relative_to(folder).as_posix() for path in folder.glob("configs/**/*.yaml"))
        for folder in (repository, Path(root))
    )
    assert theirs == sorted([*ours, RECORDED])
    for name in ours:
        assert Path(root, name).read_bytes() == (repository / name).read_bytes()


def test_the_page_to_click_on_is_installed(installed, repository, run_python, tmp_path):
    code = "from importlib import resources; print(resources.files('sam2_lora_ext.serve') / 'page')"
    folder = Path(run_python(["-c", code], cwd=tmp_path, python=installed, env=clean(), check=True).stdout.strip())
    ours = sorted((repository / "sam2_lora_ext/serve/page").iterdir())
    assert len(ours) == 4 and not folder.is_relative_to(repository)
    assert [(path.name, path.read_bytes()) for path in sorted(folder.iterdir())] == [
        (path.name, path.read_bytes()) for path in ours
    ]


def test_a_wheel_holds_the_packages_alone(installed, run_python, tmp_path):
    """No tests or tools land in site-packages, and `hydra_plugins` stays a namespace for others' plugins."""
    code = (
        "from importlib.metadata import files; import json, hydra_plugins as h;"
        "print(json.dumps([[str(f) for f in files('sam2_lora_ext')], getattr(h, '__file__', None)]))"
    )
    done = run_python(["-c", code], cwd=tmp_path, python=installed, env=clean(), check=True)
    files, namespace = json.loads(done.stdout)
    assert namespace is None
    tops = {name.split("/")[0] for name in files if not name.endswith("/bin/sam2-lora")}
    assert {top for top in tops if not re.search(r"dist-info$|\.pth$", top)} <= {"sam2_lora_ext", "hydra_plugins"}


def needed_by(*names: str) -> set[str]:
    """These distributions of this environment and all that they need, as far as they are here; without setuptools."""
    found, queue = set(), list(names)
    while queue:
        name = re.sub(r"[-_.]+", "-", queue.pop()).lower()
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # needed on another system or by another Python
            continue
        if name not in found and name != "setuptools":
            found.add(name)
            queue += [re.match(r"[\w.-]+", need)[0] for need in needs if "extra ==" not in need]
    return found


def install_lines(repository: Path) -> list[str]:
    """The commands of the README's section Install for those who have no checkout of SAM 2."""
    section = (repository / "README.md").read_text().split("\n## Install")[1].split("\n## ")[0]
    lines = [line.split("  #")[0].strip() for line in re.search(r"```bash\n(.*?)```", section, re.S)[1].splitlines()]
    return [line for line in lines if line and not line.startswith("#") and ".[train]" not in line]


@pytest.fixture
def fresh_venv(tmp_path) -> Iterator[Path]:
    """A new venv with its own pip and setuptools (65 for Python 3.11), in which torch and torchvision are there.

    Their gigabytes are links to this environment's; the rest of it is not to be seen.
    """
    venv.create(tmp_path / "venv", symlinks=True, with_pip=True)
    packages, torch = Path(sysconfig.get_path("purelib")), tmp_path / "torch"
    torch.mkdir()
    for name in {file.parts[0] for name in needed_by("torch", "torchvision") for file in metadata.files(name)}:
        if name not in ("..", "__pycache__"):
            (torch / name).symlink_to(packages / name)
    (next(tmp_path.glob("venv/lib/python*/site-packages")) / "torch.pth").write_text(f"{torch}\n")
    yield tmp_path / "venv/bin/python"
    shutil.rmtree(tmp_path / "venv")  # a gigabyte


@pytest.mark.docs
def test_the_readmes_lines_install_in_a_fresh_venv(fresh_venv, repository, project_copy, run_python, tmp_path):
    """Then SAM 2's launcher reaches our Trainer class, from another folder; needs PyPI."""
    source = tmp_path / "sam2 lora"
    shutil.copytree(project_copy, source)
    (source / RECORDED).write_text(CONFIG)
    env = {**os.environ, **clean(), "PATH": f"{fresh_venv.parent}:{os.environ['PATH']}"}
    lines = install_lines(repository)
    assert len(lines) == 2 and lines[0].startswith("pip install torch torchvision"), lines
    for line in lines:
        done = subprocess.run(line, shell=True, cwd=source, env=env, capture_output=True, text=True, timeout=1200)
        if done.returncode and re.search("No matching distribution|Temporary failure|Connection|timed", done.stderr):
            (pytest.fail if os.environ.get("CI") else pytest.skip)(f"cannot reach PyPI: {done.stderr[-500:]}")
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    seen = run_python(
        ["-c", "import sam2, sam2_lora_ext.trainer as t; print(sam2.__file__, t.__file__)"],
        cwd=tmp_path,
        python=fresh_venv,
        env=clean(),
        check=True,
    ).stdout
    assert str(source) in seen and str(fresh_venv.parent.parent) in seen
    run_python(
        ["-m", "training.train", "-c", RECORDED],
        cwd=tmp_path,
        python=fresh_venv,
        env=clean(PYTHONPATH=str(write_recorder(tmp_path / "recorder"))),
        check=True,
    )
    assert (tmp_path / "recorded" / "rank0.json").is_file()


def test_the_setuptools_of_a_fresh_venv_builds_the_project(project_copy, run_python, tmp_path):
    """Python 3.11 has setuptools 65, which knows neither licence strings nor a form of them that later ones take."""
    source = tmp_path / "source"
    shutil.copytree(project_copy, source)
    venv.create(tmp_path / "venv", symlinks=True, with_pip=True)
    python = tmp_path / "venv/bin/python"
    folder = next(tmp_path.glob("venv/lib/python*/site-packages"))
    (folder / "others.pth").write_text("\n".join(site.getsitepackages()) + "\n")  # for wheel, which has no setuptools
    run_python(
        ["-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-build-isolation", "-e", source],
        python=python,
        env={"PYTHONPATH": ""},
        check=True,
    )
    shown = next(folder.glob("sam2_lora_ext-*.dist-info/METADATA")).read_text()
    assert re.search(r"^License(-Expression)?: Apache-2.0$", shown, re.M) and "License-File: LICENSE" in shown


@pytest.mark.docs
@pytest.mark.parametrize("version", ["3.12", "3.13", "3.14"])
def test_other_pythons_build_the_project(version, project_copy, run_python, tmp_path):
    """Their venvs come without setuptools, so pip takes one from PyPI for the build."""
    other = shutil.which(f"python{version}")
    if other is None or subprocess.run([other, "--version"], capture_output=True).returncode:
        pytest.skip(f"there is no python{version} here")
    run_python(["-m", "venv", tmp_path / "venv"], python=other, env={"PYTHONPATH": ""}, check=True)
    run_python(
        ["-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, project_copy],
        python=tmp_path / "venv/bin/python",
        env={"PYTHONPATH": ""},
        check=True,
    )
    assert next(tmp_path.glob("sam2_lora_ext-*.whl"))


def test_sam2_is_no_hard_requirement():
    """A user's own checkout of SAM 2 (a distribution of another name) must not be overwritten."""
    needed = metadata.requires("sam2_lora_ext")
    hard = {re.split(r"[^\w-]", line)[0] for line in needed if "extra ==" not in line}
    assert hard == {"torch", "numpy", "safetensors"}
    assert any(line.startswith("sam2==1.1.0") and 'extra == "sam2"' in line for line in needed)


def test_the_makefile_works_in_a_path_with_spaces(repository, tmp_path):
    """Started from elsewhere by `-f` and by `-C`; two spaces in a row, too."""
    folder = tmp_path / "two  spaces"
    folder.mkdir()
    shutil.copy2(repository / "Makefile", folder)
    for where in (["-f", str(folder / "Makefile")], ["-C", str(folder)]):
        done = subprocess.run(["make", *where, "help"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "make demo" in done.stdout
        wrong = subprocess.run(["make", *where, "env", "PYTHON=false"], cwd=tmp_path, capture_output=True, text=True)
        assert wrong.returncode == 2 and not (folder / ".venv").exists()
