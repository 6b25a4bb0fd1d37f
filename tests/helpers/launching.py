"""For tests of the launchers: a config and a trainer that writes down what each rank was given, then stops."""

from pathlib import Path

RECORDER = '''\
"""A trainer for SAM 2's launcher that writes one JSON file per rank."""
import json, os
from pathlib import Path


class Recorder:
    def __init__(self, folder, **values):
        if "mistake" in values:
            from sam2_lora_ext.utils.errors import UserError

            raise UserError(values["mistake"])
        self.folder, self.values = Path(folder), values

    def run(self):
        from omegaconf import OmegaConf
        import sam2_lora_ext

        values = OmegaConf.to_container(OmegaConf.create(self.values), resolve=True)
        seen = {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"]), "values": values,
                "package": sam2_lora_ext.__file__}
        part = self.folder / f"rank{seen['rank']}.part"
        part.write_text(json.dumps(seen))
        part.rename(part.with_suffix(".json"))
'''

CONFIG = """\
# @package _global_
scale: 1
trainer:
  _target_: recorder.Recorder
  folder: ${launcher.experiment_log_dir}
  value: first
  doubled: ${times:2,${scale}}
launcher:
  num_nodes: 1
  gpus_per_node: 1
  experiment_log_dir: recorded
submitit:
  partition: null
  account: null
  qos: null
  use_cluster: false
  cpus_per_task: 1
  timeout_hour: 1
  name: recorder
  port_range: [20000, 60000]
"""


def write_recorder(folder: Path) -> Path:
    """Makes `folder` with `recorder.py`, to be put on PYTHONPATH, and returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recorder.py").write_text(RECORDER)
    return folder
