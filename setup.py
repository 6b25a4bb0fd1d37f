"""How the package is laid out for setuptools; its metadata is in pyproject.toml.

`package_dir={"": "."}` makes an editable install a plain path entry, the only kind in which Hydra finds the plugin in
the `hydra_plugins` namespace package; one more entry would switch setuptools to an import hook that hides it.
"""

import shutil
from pathlib import Path

from setuptools import find_namespace_packages, setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Ships `configs/` inside the package, where the plugin finds it; an editable install reads the checkout's."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "sam2_lora_ext", "configs")
            shutil.rmtree(target, ignore_errors=True)  # a config deleted since the last build must not come back
            shutil.copytree("configs", target, ignore=shutil.ignore_patterns("__pycache__", ".*"))


setup(
    license="Apache-2.0",
    package_dir={"": "."},
    packages=find_namespace_packages(include=["sam2_lora_ext", "sam2_lora_ext.*", "hydra_plugins.sam2_lora_ext"]),
    package_data={"sam2_lora_ext": ["serve/page/*"]},
    cmdclass={"build_py": BuildWithConfigs},
    zip_safe=False,
)
