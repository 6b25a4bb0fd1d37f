"""Puts this project's `configs/` on Hydra's search path, so that SAM 2's unmodified launcher finds them."""

import os

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from sam2_lora_ext.host.configs import USER_CONFIG_DIR, config_root


class SAM2LoRASearchPath(SearchPathPlugin):
    """Appends the folder that holds `configs/`, and puts the user's own folder, if the environment names one, first."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append(provider="sam2_lora_ext", path=f"file://{config_root()}")
        if folder := os.environ.get(USER_CONFIG_DIR):
            search_path.prepend(provider="sam2_lora_ext-user", path=f"file://{os.path.abspath(folder)}")
